"""The loss against the lecture's formula, the parts of the script, and the script as a person runs it."""

import json
import math
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import common
import simclr

ROOT = Path(__file__).parent.parent


def small_run(data, out, *flags):
    """main on a few shapes, in two short epochs."""
    arguments = ["--dataset", str(data), "--encoder", "small", "--epochs", "2", "--batch-size", "32"]
    return simclr.main(simclr.parse_args([*arguments, "--out", str(out), *flags]))


def error_of(monkeypatch, capsys, *arguments):
    """What `python simclr.py ...` says of bad input: one line on stderr, and exit code 2."""
    monkeypatch.setattr(sys, "argv", ["simclr.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "simclr.py"), run_name="__main__")
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


# ------------------------------------------------------------------------------------------------------
# Loss
# ------------------------------------------------------------------------------------------------------


def lecture_loss(z1, z2, temperature):
    """Algorithm 1 of the lecture, line by line; the views 2k - 1 and 2k of picture k lie side by side."""
    z = [view for pair in zip(z1, z2, strict=True) for view in pair]
    s = [[(a @ b / (a.norm() * b.norm())).item() for b in z] for a in z]

    def pair_loss(i, j):
        return -math.log(
            math.exp(s[i][j] / temperature) / sum(math.exp(s[i][k] / temperature) for k in range(len(z)) if k != i)
        )

    return sum(pair_loss(k, k + 1) + pair_loss(k + 1, k) for k in range(0, len(z), 2)) / len(z)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("N", [2, 3, 13])
def test_nt_xent_is_the_lectures_formula(N, temperature):
    z1, z2 = torch.randn(2, N, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(N))
    expected = lecture_loss(z1, z2, temperature)
    assert simclr.nt_xent(z1, z2, temperature).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("N", [2, 16])
def test_nt_xent_of_identical_projections_is_chance(N):
    z = torch.randn(1, 6, dtype=torch.float64).expand(N, 6)
    assert simclr.nt_xent(z, z, 0.1).item() == pytest.approx(math.log(2 * N - 1), abs=1e-9)


def test_nt_xent_has_the_gradient_of_the_formula():
    z1, z2 = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda a, b: simclr.nt_xent(a, b, 0.3), (z1.requires_grad_(), z2.requires_grad_()))


# ------------------------------------------------------------------------------------------------------
# Views, model, optimizer
# ------------------------------------------------------------------------------------------------------


def test_two_views_keep_the_order_of_the_pictures():
    flat = torch.arange(0, 250, 10, dtype=torch.uint8)[:, None, None, None].expand(25, 3, 8, 8)
    args = simclr.parse_args(["--jitter-strength", "0", "--gray", "0", "--blur", "1"])
    views = simclr.two_views(flat, args, torch.Generator().manual_seed(0))
    torch.testing.assert_close(views, torch.cat([flat, flat]) / 255)


def test_two_views_differ_and_a_seed_fixes_them():
    images, args = common.load_dataset("shapes").train_images[:40], simclr.parse_args([])
    first, again, other = (simclr.two_views(images, args, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, again) and first.shape == (80, 3, 32, 32)
    assert ((first[:40] - first[40:]).abs().mean((1, 2, 3)) > 0.005).all() and not torch.equal(first, other)
    assert 0 <= first.min() and first.max() <= 1
    colourless = (first.amax(1) - first.amin(1)).amax((1, 2)) < 1e-6
    assert 0.3 < colourless.float().mean() < 0.7  # half of them


@pytest.mark.parametrize(("name", "size"), [("small", 32), ("resnet18", 32), ("resnet18", 96), ("resnet50", 32)])
def test_encoders_are_torchvisions(name, size):
    encoder, D = simclr.build_encoder(name, size)
    assert encoder.eval()(torch.zeros(2, 3, size, size)).shape == (2, D)
    reference = getattr(torchvision.models, "resnet18" if name == "small" else name)().state_dict()
    own_stem = name == "small" or size > 64
    if name != "small":
        assert {"fc.weight", "fc.bias"} == set(reference) ^ set(encoder.state_dict())
    for key, value in encoder.state_dict().items():
        assert (value.shape == reference[key].shape) == (own_stem or key != "conv1.weight")


@pytest.mark.parametrize(("projection", "layers"), [("none", 0), ("linear", 1), ("mlp", 4)])
def test_projection_heads(projection, layers):
    args = simclr.parse_args(["--projection", projection, "--projection-dim", "16"])
    model = simclr.SimCLR(args)
    assert len(list(model.projector.modules())) == layers + (layers != 1)
    x = torch.rand(4, 3, 32, 32)
    z, h = model.eval()(x), model.encoder(x)
    assert z.shape == (4, 16 if layers else 128) and torch.equal(z, h) == (layers == 0)


def test_learning_rate_rises_and_falls():
    rate = [simclr.warmup_cosine(step, 100, 0.1) for step in range(101)]
    assert rate[:11] == pytest.approx([(step + 1) / 11 for step in range(11)])
    assert rate[10:] == sorted(rate[10:], reverse=True) and rate[100] == pytest.approx(0)
    assert rate[55] == pytest.approx(0.5)


def test_only_matrices_and_kernels_are_decayed():
    model = simclr.SimCLR(simclr.parse_args([]))
    groups = simclr.adamw(model, simclr.parse_args(["--weight-decay", "0.3"]), 10)[0].param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    decayed, others = (group["params"] for group in groups)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)] for p in others} == {n for n in names.values() if "bn" in n or ".1." in n or "bias" in n}
    assert len(decayed) + len(others) == len(names)


# ------------------------------------------------------------------------------------------------------
# Probes
# ------------------------------------------------------------------------------------------------------


def test_knn_is_the_weighted_vote():
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(60, 5, generator=generator), torch.randn(30, 5, generator=generator)
    bank_labels, labels = (torch.randint(4, (n,), generator=generator) for n in (60, 30))
    correct = 0
    for query, label in zip(queries, labels, strict=True):
        s = F.cosine_similarity(query[None], bank)
        votes = [0.0] * 4
        for i in s.argsort(descending=True)[:7]:
            votes[bank_labels[i]] += math.exp(s[i] / 0.1)
        correct += votes.index(max(votes)) == label
    assert simclr.knn_accuracy(bank, bank_labels, queries, labels, k=7) == correct / 30


def test_features_come_from_a_frozen_encoder():
    images = common.load_dataset("shapes").test_images[:600]
    encoder = simclr.build_encoder("small")[0].train()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    features = simclr.features(encoder, images)
    assert features.shape == (600, 128) and not features.requires_grad
    torch.testing.assert_close(features[590:591], simclr.features(encoder.train(), images[590:591]))
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


def probe_data(noise):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (600,), generator=generator)
    x = F.one_hot(labels, 8).float() + noise * torch.randn(600, 8, generator=generator)
    return x[:400], labels[:400], x[400:], labels[400:]


def test_linear_probe():
    assert simclr.linear_probe(*probe_data(0.1)) == 1
    x, y, test, test_y = probe_data(1.0)
    accuracy = simclr.linear_probe(x, y, test, test_y)
    assert 0.45 < accuracy < 0.75  # the best possible classifier reads 0.63
    scale, shift = 10 ** torch.linspace(-2, 2, 8), torch.randn(8, generator=torch.Generator().manual_seed(0))
    assert simclr.linear_probe(x * scale + shift, y, test * scale + shift, test_y) == pytest.approx(accuracy, abs=0.02)
    shuffled = y[torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    assert simclr.linear_probe(x, shuffled, test, test_y) < 0.45  # chance is 0.33


# ------------------------------------------------------------------------------------------------------
# The script
# ------------------------------------------------------------------------------------------------------


def test_files_of_a_run(few_shapes, tmp_path):
    summary = small_run(few_shapes, tmp_path / "run", "--eval-every", "2")
    names = {"args.json", "metrics.jsonl", "summary.json", "checkpoint.pt", "encoder.pt"}
    names |= {"views.png", "neighbours.png"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == names
    assert json.loads((tmp_path / "run/args.json").read_text())["batch_size"] == 32
    assert json.loads((tmp_path / "run/summary.json").read_text()) == summary
    expected = "method command date dataset seed device threads torch epochs parameters images_per_second"
    expected += " peak_memory_gb resumed_at_epoch untrained trained history"
    assert set(expected.split()) <= set(summary) and summary["total_seconds"] > summary["pretrain_seconds"] > 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert summary["history"] == lines and set(summary["untrained"]) == {"knn", "linear_probe"}
    assert [line["epoch"] for line in lines] == [1, 2] and ["knn" in line for line in lines] == [False, True]
    assert all(line["bound"] == pytest.approx(math.log(63) - line["loss"]) for line in lines)

    encoder = torch.load(tmp_path / "run/encoder.pt", weights_only=True)
    missing, unexpected = torchvision.models.resnet18().load_state_dict(encoder, strict=False)
    assert not unexpected and all(key.startswith(("layer1.1", "layer2.1", "layer3", "layer4", "fc")) for key in missing)
    checkpoint = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert checkpoint["method"] == "simclr" and checkpoint["epoch"] == 2
    for key, value in encoder.items():
        assert torch.equal(checkpoint["model"]["encoder." + key], value)


def test_a_seed_fixes_the_encoder_and_labels_play_no_part(few_shapes, tmp_path):
    arrays = dict(np.load(few_shapes))
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "shuffled.npz", **arrays | {"train_labels": rng.permutation(arrays["train_labels"])})
    runs = {"first": few_shapes, "again": few_shapes, "shuffled": tmp_path / "shuffled.npz", "other": few_shapes}
    weights = {}
    for name, data in runs.items():
        small_run(data, tmp_path / name, "--seed", str(int(name == "other")))
        encoder = torch.load(tmp_path / name / "encoder.pt", weights_only=True)
        weights[name] = torch.cat([value.flatten().float() for value in encoder.values()])
    assert torch.equal(weights["first"], weights["again"])
    assert torch.equal(weights["first"], weights["shuffled"])
    assert not torch.equal(weights["first"], weights["other"])


def test_copied_with_common_alone_it_learns_on_shapes(tmp_path):
    for name in ("simclr.py", "common.py"):
        shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, "-W", "error", "simclr.py", "--epochs", "4", "--out", "run"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and result.stderr == ""
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["command"] == "python simclr.py --epochs 4 --out run"
    assert summary["trained"]["knn"] > summary["untrained"]["knn"] + 0.1
    assert summary["trained"]["linear_probe"] > summary["untrained"]["linear_probe"] + 0.1
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {"simclr.py", "common.py", "run"}


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler on a CPU")
def test_compiled_it_does_the_same(few_shapes, tmp_path):
    flags = ["--dataset", str(few_shapes), "--encoder", "small", "--epochs", "1", "--batch-size", "32", "--lr", "0"]
    command = [sys.executable, str(ROOT / "simclr.py"), *flags, "--blur", "0.5", "--compile", "--out", "compiled"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=300)
    compiled = json.loads((tmp_path / "compiled/summary.json").read_text())
    eager = small_run(few_shapes, tmp_path / "eager", "--epochs", "1", "--lr", "0", "--blur", "0.5")
    assert compiled["history"][0]["loss"] == pytest.approx(eager["history"][0]["loss"], abs=1e-4)
    assert compiled["trained"]["knn"] == pytest.approx(eager["trained"]["knn"], abs=0.021)


def test_help_needs_neither_network_nor_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.socket", None)
    monkeypatch.setattr(sys, "argv", ["simclr.py", "--dataset", "cifar10", "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "simclr.py"), run_name="__main__")
    assert caught.value.code == 0 and "--temperature" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_resume_may_name_a_run():
    for flags, out in (([], "runs/simclr-shapes-seed0"), (["elsewhere"], "elsewhere")):
        args = simclr.parse_args(["--resume", *flags, "--seed", "0"])
        assert args.out == out and args.resume
    assert not simclr.parse_args(["--out", "elsewhere"]).resume


def test_recipes_and_what_overrides_them():
    assert simclr.parse_args([]).batch_size == 64
    assert simclr.parse_args(["--dataset", "cifar10"]).encoder == "resnet18"
    small = simclr.parse_args(["--dataset", "mine.npz", "--encoder", "small", "--epochs", "3"])
    assert (small.encoder, small.epochs, small.batch_size) == ("small", 3, 64)
    assert small.out == "runs/simclr-mine-seed0"
    for recipe in simclr.RECIPES:
        simclr.parse_args(["--dataset", *recipe.split()])  # every value in its range


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "cifar"], "--dataset cifar: is not shapes"),
        (["--dataset", "none.npz"], "none.npz: no such file"),
        (["--batch-size", "4097"], "--batch-size 4097: shapes has only 4096 training pictures"),
        (["--batch-size", "1"], "--batch-size 1: must be at least 2"),
        (["--lr", "-1"], "--lr -1.0: must be at least 0"),
        (["--lr", "nan"], "--lr nan: must be at least 0"),
        (["--crop", "2"], "--crop 2.0: must be from 0.01 to 1"),
        (["--eval-every", "0"], "--eval-every 0: must be at least 1"),
        (["--epochs", "many"], "--epochs: invalid int value: 'many'"),
        (["--encoder", "vgg"], "--encoder: invalid choice: 'vgg'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--device", "abacus"], "--device abacus: not available"),
        (["--dataset"], "--dataset: expected one argument"),
        (["--labels", "500"], "--labels 500: the smallest class has only 409 training pictures"),
        (["--labels", "0.1", "-2"], "--labels -2.0: must be at least 0"),
        (["--projection", "cubic"], "--projection: invalid choice: 'cubic'"),
        (["--image-size", "4"], "--image-size 4: must be from 8 to 512"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(monkeypatch, capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_broken_npz(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 and no more")
    line = error_of(monkeypatch, capsys, "--dataset", tmp_path / "broken.npz", "--out", tmp_path / "run")
    assert "broken.npz: not a readable .npz file" in line and not (tmp_path / "run").exists()


def test_folders_that_cannot_be_written(few_shapes, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    flags = "--dataset", few_shapes, "--batch-size", 32, "--out"
    assert "cannot be written" in error_of(monkeypatch, capsys, *flags, tmp_path / "file")
    assert "cannot be written" in error_of(monkeypatch, capsys, *flags, tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_is_not_overwritten_and_a_loss_that_is_not_finite_stops_it(few_shapes, tmp_path, monkeypatch, capsys):
    with pytest.raises(common.UserError, match="the loss is not finite at step [2-9], in epoch 1"):
        small_run(few_shapes, tmp_path / "run", "--lr", "1e30")
    kept = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert kept["epoch"] == 0 and all(value.isfinite().all() for value in kept["model"].values())
    small_run(few_shapes, tmp_path / "other")
    before = {path: path.read_bytes() for path in (tmp_path / "other").iterdir()}
    flags = "--dataset", few_shapes, "--batch-size", 32, "--out", tmp_path / "other"
    assert "holds a run already" in error_of(monkeypatch, capsys, *flags)
    assert before == {path: path.read_bytes() for path in (tmp_path / "other").iterdir()}


# ------------------------------------------------------------------------------------------------------
# Few labels, no labels, no head
# ------------------------------------------------------------------------------------------------------


def test_few_labels(few_shapes, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(simclr, "fine_tune", lambda encoder, *rest: calls.append((encoder, *rest)) or len(calls) / 10)
    summary = small_run(few_shapes, tmp_path / "run", "--labels", "0.1", "3", "--fine-tune")
    some, few = summary["semi_supervised"]
    assert 19 <= some["labels"] <= 22 and few["labels"] == 30
    assert set(some) == {"labels", "knn", "linear_probe", "fine_tuned", "from_scratch"}
    assert [row[name] for row in (some, few) for name in ("fine_tuned", "from_scratch")] == [0.1, 0.2, 0.3, 0.4]
    assert "from_scratch" in capsys.readouterr().out
    trained = torch.load(tmp_path / "run/encoder.pt", weights_only=True)
    torch.manual_seed(0)
    scratch = simclr.SimCLR(simclr.parse_args([])).encoder.state_dict()
    for (encoder, *_, rows, _), expected in zip(calls, (trained, scratch, trained, scratch), strict=True):
        assert all(torch.equal(value, expected[key]) for key, value in encoder.state_dict().items())
        assert len(rows) in (some["labels"], 30)


def test_fine_tuning_learns_from_its_rows_alone_and_leaves_the_encoder_as_it_was():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    images = torch.randint(60, (60, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images[torch.arange(60), labels] += 150  # red, green or blue
    data = common.Dataset(images[:40], labels[:40], images[40:], labels[40:], ["r", "g", "b"])
    args, rows = simclr.parse_args(["--batch-size", "6", "--crop", "0.5"]), torch.arange(10, 22)
    encoder, D = simclr.build_encoder("small")
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    assert simclr.fine_tune(encoder, D, data, rows, args) > 0.9
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    data.train_labels[rows] = (data.train_labels[rows] + 1) % 3  # taught wrongly
    data.train_images[:10], data.train_images[22:] = 0, 0
    assert simclr.fine_tune(encoder, D, data, rows, args) < 0.1


@pytest.mark.parametrize(("projection", "z"), [("none", set()), ("linear", {"knn_z", "linear_probe_z"})])
def test_probes_with_and_without_a_head(few_shapes, tmp_path, projection, z):
    summary = small_run(few_shapes, tmp_path / "run", "--epochs", "1", "--projection", projection)
    assert set(summary["trained"]) == {"knn", "linear_probe"} | z


def test_the_head_is_probed_as_it_is_at_test_time(few_shapes):
    data = common.load_dataset(str(few_shapes))
    model = simclr.SimCLR(simclr.parse_args([])).train()
    model(simclr.network_input(data.train_images[:100] / 255))  # moves the statistics of batch norm
    accuracies, (h, test_h) = simclr.evaluate(model.train(), data, head=True)
    with torch.no_grad():
        z, test_z = (model.eval()(simclr.network_input(x / 255)) for x in (data.train_images, data.test_images))
    assert accuracies["knn_z"] == simclr.knn_accuracy(z, data.train_labels, test_z, data.test_labels)
    assert accuracies["knn"] == simclr.knn_accuracy(h, data.train_labels, test_h, data.test_labels)
    torch.testing.assert_close(test_h, model.encoder(simclr.network_input(data.test_images / 255)).detach())


def test_plain_pictures_are_pretrained_on(tmp_path, monkeypatch, capsys):
    (tmp_path / "album").mkdir()
    for i, image in enumerate(common.load_dataset("shapes").train_images[:70]):
        torchvision.utils.save_image(image / 255, tmp_path / f"album/{i}.png")
    cache = "--data-dir", str(tmp_path / "cache")
    summary = small_run(tmp_path / "album", tmp_path / "run", "--epochs", "1", *cache)
    assert summary["trained"] == summary["untrained"] == {} and "the probes are skipped" in capsys.readouterr().out
    assert {"encoder.pt", "views.png"} <= {path.name for path in (tmp_path / "run").iterdir()}
    flags = "--dataset", tmp_path / "album", "--batch-size", 32, *cache, "--out", tmp_path / "other", "--fine-tune"
    assert "has no classes" in error_of(monkeypatch, capsys, *flags)


def test_stl10_pretrains_on_all_and_probes_with_what_has_labels(few_shapes, tmp_path):
    arrays = dict(np.load(few_shapes))
    np.savez(tmp_path / "part.npz", **arrays | {"train_labels": arrays["train_labels"][:100]})
    np.savez(tmp_path / "less.npz", **{k: v[:100] if k[:5] == "train" else v for k, v in arrays.items()})
    part, less = (small_run(tmp_path / f"{name}.npz", tmp_path / name, "--epochs", "1") for name in ("part", "less"))
    assert part["untrained"] == less["untrained"] and part["history"][0]["loss"] != less["history"][0]["loss"]
    for summary, steps in ((part, 6), (less, 3)):
        line = summary["history"][0]
        assert round(line["images_per_second"] * line["seconds"] / 32) == steps


# ------------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------------


def test_views_are_rows_of_pairs(few_shapes, tmp_path):
    images, args = common.load_dataset(str(few_shapes)).train_images, simclr.parse_args([])
    sheets = []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simclr, "save_sheet", lambda _, blocks: sheets.append(blocks))
        simclr.save_views(tmp_path / "views.png", images, args)
    (_, picture), *pairs = sheets[0]
    assert torch.equal(picture[:, 0], images[:8] / 255) and len(pairs) == 4
    for _, pair in pairs:
        assert pair.shape == (8, 2, 3, 32, 32)
        assert not torch.equal(pair[:, 0], pair[:, 1]) and not torch.equal(pair, pairs[0][1][:, [1, 0]])
    simclr.save_views(tmp_path / "views.png", images, args)
    with Image.open(tmp_path / "views.png") as sheet:
        width, height = sheet.size
    assert width > 9 * 64 and height > 8 * 64


def test_neighbours_are_the_nearest_and_framed_by_class(tmp_path, monkeypatch):
    values = torch.arange(40, dtype=torch.uint8)
    images = values.view(40, 1, 1, 1).expand(40, 3, 4, 4) * 6
    labels = torch.arange(40) // 20
    data = common.Dataset(images, labels, images[[5, 30]], torch.tensor([0, 1]), ["a", "b"])
    angle = torch.linspace(0, 3, 40)
    h = torch.stack([angle.cos(), angle.sin()], dim=1)
    shuffled = h[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    sheets = []
    monkeypatch.setattr(simclr, "save_sheet", lambda _, blocks: sheets.append(blocks))
    simclr.save_neighbours(tmp_path / "n.png", data, (shuffled, h[[5, 30]]), (h, h[[5, 30]]), count=3)
    (_, query), (_, before), (_, after) = sheets[0]
    centre = (after[:, :, 0, 4, 4] * 255 / 6).round().long()  # which picture it is
    assert [set(row) for row in centre.tolist()] == [{4, 5, 6}, {29, 30, 31}]
    assert (query[:, 0, 0, 4, 4] * 255 / 6).round().tolist() == [5, 30]
    numbers = (before[:, :, 0, 4, 4] * 255 / 6).round().long()
    same = labels[numbers] == torch.tensor([[0], [1]])
    assert not same.all() and torch.equal(before[:, :, 1, 0, 0] > before[:, :, 0, 0, 0], same)  # green or red


# ------------------------------------------------------------------------------------------------------
# Resume
# ------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What no code catches."""


def kill_in_an_epoch(monkeypatch):
    calls, loss = [], simclr.nt_xent

    def nt_xent(*args):
        calls.append(1)
        if len(calls) == 9:  # of 6 steps an epoch
            raise Killed
        return loss(*args)

    monkeypatch.setattr(simclr, "nt_xent", nt_xent)


def kill_while_saving(monkeypatch):
    calls, save = [], torch.save

    def torn(content, path):
        calls.append(1)
        save(content, path)
        if len(calls) == 2:  # the end of the first epoch
            path.write_bytes(path.read_bytes()[:1000])
            raise Killed

    monkeypatch.setattr(torch, "save", torn)


def kill_between_log_and_checkpoint(monkeypatch):
    save = simclr.Run.save

    def killed(run, epoch, parts):
        if epoch == 3:
            raise Killed
        save(run, epoch, parts)

    monkeypatch.setattr(simclr.Run, "save", killed)


def lines_without_times(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines]


def assert_same(a, b):
    """Equal trees of dicts and lists, tensors in them bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, dict | list | tuple):
        assert len(a) == len(b)
        for key in a if isinstance(a, dict) else range(len(a)):
            assert_same(a[key], b[key])
    else:
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.fixture(scope="module")
def unbroken(few_shapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    small_run(few_shapes, folder, "--epochs", "3")
    return folder


@pytest.mark.parametrize("kill", [kill_in_an_epoch, kill_while_saving, kill_between_log_and_checkpoint])
def test_a_resumed_run_ends_where_an_unbroken_one_does(few_shapes, unbroken, tmp_path, kill):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill(patch)
        small_run(few_shapes, tmp_path / "run", "--epochs", "3")
    assert not (tmp_path / "run/summary.json").exists()
    summary = small_run(few_shapes, tmp_path / "run", "--epochs", "3", "--resume")
    assert summary["resumed_at_epoch"] == {kill_in_an_epoch: 1, kill_while_saving: 0}.get(kill, 2)
    assert lines_without_times(tmp_path / "run") == lines_without_times(unbroken)
    states = [torch.load(f / "checkpoint.pt", weights_only=True) for f in (tmp_path / "run", unbroken)]
    for name in ("model", "optimizer", "schedule"):
        assert_same(*(state[name] for state in states))


def test_a_finished_run_is_only_evaluated(few_shapes, unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path / "run")
    more = "--epochs", "3", "--resume", "--labels", "0.2", "4", "--data-dir", "elsewhere", "--eval-every", "1"
    summary = small_run(few_shapes, tmp_path / "run", *more)
    assert summary["resumed_at_epoch"] == 3 and [row["labels"] for row in summary["semi_supervised"]] == [40, 40]
    before = json.loads((unbroken / "summary.json").read_text())
    assert summary["trained"] == before["trained"] and summary["pretrain_seconds"] == before["pretrain_seconds"]
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == (unbroken / "checkpoint.pt").read_bytes()


def test_resume_without_a_checkpoint_starts(few_shapes, tmp_path):
    assert small_run(few_shapes, tmp_path / "run", "--resume")["resumed_at_epoch"] == 0


def test_checkpoints_that_do_not_fit(few_shapes, unbroken, tmp_path, monkeypatch, capsys):
    shutil.copytree(unbroken, tmp_path / "run")
    path = tmp_path / "run/checkpoint.pt"
    whole = path.read_bytes()
    given = "--dataset", few_shapes, "--encoder", "small", "--epochs", "3", "--batch-size", "32", "--resume"
    flags = *given, "--out", tmp_path / "run"
    assert "was made with --temperature 0.1, not 0.2" in error_of(monkeypatch, capsys, *flags, "--temperature", "0.2")
    assert "was made with --seed 0, not 1" in error_of(monkeypatch, capsys, *flags, "--seed", "1")
    torch.save(torch.load(path, weights_only=True) | {"method": "moco"}, path)
    assert "checkpoint.pt: is of moco, not of simclr" in error_of(monkeypatch, capsys, *flags)
    torch.save({"model": torch.zeros(1)}, path)
    assert "checkpoint.pt: not a checkpoint" in error_of(monkeypatch, capsys, *flags)
    for content in (whole[:5000], b"", b"text"):
        path.write_bytes(content)
        assert "checkpoint.pt: not a checkpoint" in error_of(monkeypatch, capsys, *flags)


def test_ctrl_c_leaves_a_checkpoint(few_shapes, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "batches", interrupted)
    flags = "--dataset", few_shapes, "--encoder", "small", "--batch-size", 32, "--out", tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["simclr.py", *map(str, flags)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "simclr.py"), run_name="__main__")
    assert caught.value.code == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert "--resume" in line
    assert torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["epoch"] == 0
