"""The loss against the lecture's formula, the parts of the script, and the script as a person runs it."""

import dataclasses
import json
import math
import os
import re
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
import moco
import simclr

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("shapes_once")


def small_run(data, out, *flags):
    """main on a few shapes, in two short epochs."""
    words = ["--dataset", str(data), "--encoder", "small", "--epochs", "2", "--batch-size", "32", "--out", str(out)]
    return simclr.main(simclr.parse_args([*words, *map(str, flags)]))


def resumed(run, *flags):
    return simclr.main(simclr.parse_args(["--resume", str(run), *map(str, flags)]))


def error_of(monkeypatch, capsys, *words):
    """What `python simclr.py ...` says of bad input: one line on stderr, and exit code 2."""
    monkeypatch.setattr(sys, "argv", ["simclr.py", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "simclr.py"), run_name="__main__")
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("simclr.py: error: ")
    return line


def files(folder):
    return {path.name for path in folder.iterdir()} - {".lock"}


# ----------------------------------------------------------------------------------------------------------------------
# Loss
# ----------------------------------------------------------------------------------------------------------------------


def lecture_loss(z1, z2, temperature):
    """Algorithm 1 of the lecture, line by line; the views 2k - 1 and 2k of image k lie side by side."""
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
    assert simclr.nt_xent(z1, z2, temperature).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("N", [2, 16])
def test_nt_xent_of_identical_projections_is_chance(N):
    z = torch.randn(1, 6, dtype=torch.float64).expand(N, 6)
    assert simclr.nt_xent(z, z, 0.1).item() == pytest.approx(math.log(2 * N - 1), abs=1e-9)


def test_nt_xent_has_the_gradient_of_the_formula():
    z1, z2 = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda a, b: simclr.nt_xent(a, b, 0.3), (z1.requires_grad_(), z2.requires_grad_()))


# ----------------------------------------------------------------------------------------------------------------------
# Views, model, optimizer
# ----------------------------------------------------------------------------------------------------------------------


def test_two_views_keep_the_order_of_the_images():
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
    colorless = (first.amax(1) - first.amin(1)).amax((1, 2)) < 1e-6
    assert abs(colorless.float().mean() - args.gray) < 0.15


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
    model = simclr.SimCLR(simclr.parse_args(["--projection", projection]))
    assert len(model.projector) == layers
    x = torch.rand(4, 3, 32, 32)
    z, h = model.eval()(x), model.encoder(x)
    assert z.shape == (4, 128) and torch.equal(z, h) == (layers == 0)


def rates(words, batch_size, steps):
    """The learning rate of each step, and of two beyond the last."""
    optimizer, schedule = simclr.make_optimizer(torch.nn.Linear(2, 2), simclr.parse_args(words), batch_size, steps)
    seen = []
    for _ in range(steps + 2):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen, optimizer


def test_learning_rate_rises_falls_and_stays_down():
    rate, _ = rates(["--warmup", "0.1", "--lr", "1"], 256, 100)
    assert rate[:11] == pytest.approx([(step + 1) / 11 for step in range(11)])
    assert rate[10:] == sorted(rate[10:], reverse=True) and rate[55] == pytest.approx(0.5)
    assert rate[100:] == pytest.approx([0, 0])
    assert rates(["--warmup", "0", "--lr", "1"], 256, 9)[0][0] == 1


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_optimizers_scale_the_learning_rate_with_the_batch(name, kind):
    words = ["--optimizer", name, "--lr", "0.06", "--weight-decay", "0.3", "--warmup", "0"]
    for batch_size, expected in ((256, 0.06), (512, 0.12), (64, 0.015)):
        rate, optimizer = rates(words, batch_size, 3)
        assert type(optimizer) is kind and rate[0] == pytest.approx(expected)
    (group,) = optimizer.param_groups
    assert group["weight_decay"] == 0.3 and len(group["params"]) == 2 and group.get("momentum", 0.9) == 0.9


# ----------------------------------------------------------------------------------------------------------------------
# Probes
# ----------------------------------------------------------------------------------------------------------------------


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
    encoder.bn1.weight.data[0] = math.nan
    with pytest.raises(common.UserError, match="the features are not finite"):
        simclr.features(encoder, images[:8])


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


def test_linear_probe_reads_a_test_image_as_if_it_were_the_only_one():
    x, y, test, test_y = probe_data(0.1)
    alone = [simclr.linear_probe(x, y, test[i : i + 1], test_y[i : i + 1]) for i in range(12)]
    assert alone == [1.0] * 12 and len(test_y[:12].unique()) == 3  # nothing is standardized by the test images


def test_linear_probe_of_one_label_per_class_and_a_constant_feature():
    x, y, test, test_y = probe_data(0.02)
    rows = torch.stack([(y == label).nonzero()[0, 0] for label in range(3)])
    x[:, 7], test[:, 7] = 5.0, 5.0
    assert simclr.linear_probe(x[rows], y[rows], test, test_y) > 0.5  # chance is 0.33


def test_linear_probe_is_regularized_as_scikit_learn_does_with_c_1(monkeypatch):
    layers, linear = [], torch.nn.Linear
    monkeypatch.setattr(simclr.nn, "Linear", lambda *size, **options: layers.append(linear(*size)) or layers[-1])
    x, y, test, test_y = probe_data(0.3)
    simclr.linear_probe(x, y, test, test_y)
    (layer,) = layers
    x = (x - x.mean(0)) / x.std(0, correction=0)
    objective = F.cross_entropy(layer(x), y, reduction="sum") + 0.5 * layer.weight.square().sum()  # C = 1
    gradient = torch.autograd.grad(objective, [layer.weight, layer.bias])
    assert max(g.abs().max() for g in gradient) < 1e-2 * len(x) ** 0.5
    assert layer.weight.norm() > 1


def test_held_out_labels_are_a_fixed_tenth_of_all_classes(tiny_shapes, tmp_path, monkeypatch):
    arrays = dict(np.load(tiny_shapes))
    periodic = arrays | {"train_labels": np.arange(96) % 10}
    np.savez(tmp_path / "periodic.npz", **periodic)
    seen, knn = [], simclr.knn_accuracy
    monkeypatch.setattr(simclr, "knn_accuracy", lambda *split: seen.append((split[1], split[3])) or knn(*split))
    small_run(tmp_path / "periodic.npz", tmp_path / "run", "--epochs", 1, "--seed", 3)
    ((bank, held),) = (labels for labels in seen if len(labels[1]) == 9)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))  # whatever the seed of the run
    assert torch.equal(held, order[:9] % 10) and torch.equal(bank, order[9:] % 10) and len(held.unique()) > 3


# ----------------------------------------------------------------------------------------------------------------------
# The script
# ----------------------------------------------------------------------------------------------------------------------


def test_files_of_a_run(tiny_shapes, tmp_path, capsys):
    summary = small_run(tiny_shapes, tmp_path / "run", "--eval-every", 2)
    names = {"args.json", "metrics.jsonl", "summary.json", "checkpoint.pt", "encoder.pt"}
    assert files(tmp_path / "run") == names | {"views.png", "neighbors.png"}
    assert json.loads((tmp_path / "run/args.json").read_text())["batch_size"] == 32
    saved = json.loads((tmp_path / "run/summary.json").read_text())
    assert saved == json.loads(json.dumps(summary))
    keys = "method command args date device threads torch parameters images_per_second pretrain_seconds total_seconds"
    assert set(keys.split()) | {"untrained", "trained", "semi_supervised", "history"} == set(summary)
    assert summary["total_seconds"] > summary["pretrain_seconds"] > 0
    assert summary["command"].startswith(f"python simclr.py --dataset {tiny_shapes} --encoder small --epochs 2")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert summary["history"] == lines and set(summary["untrained"]) == {"knn", "linear_probe"}
    assert set(summary["trained"]) == {"knn", "linear_probe", "knn_z", "linear_probe_z"}
    assert [line["epoch"] for line in lines] == [1, 2] and ["knn" in line for line in lines] == [False, True]
    assert all(line["bound"] == pytest.approx(math.log(63) - line["loss"]) for line in lines)
    assert all(0 < line["spread"] <= 1 for line in lines)
    out = capsys.readouterr().out
    assert "epoch 2/2" in out and "min left" not in out  # there is no terminal

    encoder = torch.load(tmp_path / "run/encoder.pt", weights_only=True)
    missing, unexpected = torchvision.models.resnet18().load_state_dict(encoder, strict=False)
    assert not unexpected and all(key.startswith(("layer1.1", "layer2.1", "layer3", "layer4", "fc")) for key in missing)
    checkpoint = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert checkpoint["history"] == lines and checkpoint["images"][:2] == [96, 3]
    for key, value in encoder.items():
        assert torch.equal(checkpoint["model"]["encoder." + key], value)


def test_the_first_epochs_have_views_of_half_the_side(tiny_shapes, tmp_path, monkeypatch):
    sides, two_views = [], simclr.two_views
    monkeypatch.setattr(simclr, "two_views", lambda *args: sides.append((x := two_views(*args)).shape[2:]) or x)
    small_run(tiny_shapes, tmp_path / "run", "--half-size", 0.5)
    assert sides == 4 * [(32, 32)] + 3 * [(16, 16)] + 3 * [(32, 32)]  # those of views.png come first


def test_progress_inside_an_epoch_on_a_terminal(tiny_shapes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda _: True)
    small_run(tiny_shapes, tmp_path / "run", "--batch-size", 8)
    out = capsys.readouterr().out
    for epoch in (1, 2):
        shares = [int(share) for share in re.findall(rf"epoch {epoch}/2 +(\d+)%, [\d.]+ min left \r", out)]
        assert shares == [round(100 * step / 12) for step in range(1, 13)]
    assert "min left" not in (tmp_path / "run/metrics.jsonl").read_text()


def test_a_seed_fixes_the_encoder_and_labels_play_no_part(tiny_shapes, unbroken, tmp_path):
    arrays = dict(np.load(tiny_shapes))
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "shuffled.npz", **arrays | {"train_labels": rng.permutation(arrays["train_labels"])})
    small_run(tmp_path / "shuffled.npz", tmp_path / "shuffled")
    small_run(tiny_shapes, tmp_path / "other", "--seed", 1)
    first, shuffled, other = (
        torch.load(folder / "encoder.pt", weights_only=True)
        for folder in (unbroken, tmp_path / "shuffled", tmp_path / "other")
    )
    assert_same(first, shuffled)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def test_copied_with_common_alone_it_learns(some_shapes, tmp_path):
    for path in (ROOT / "simclr.py", ROOT / "common.py", some_shapes):
        shutil.copy(path, tmp_path)
    recipe = [f"--{name.replace('_', '-')}={value}" for name, value in simclr.SHAPES.items()]
    words = ["simclr.py", "--dataset", "some.npz", *recipe, "--epochs", "3", "--eval-every", "9", "--out", "run"]
    command = [sys.executable, "-W", "error", *words]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and result.stderr == ""
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["command"] == " ".join(["python", *words])
    assert summary["trained"]["knn"] > summary["untrained"]["knn"] + 0.03
    assert summary["trained"]["linear_probe"] > summary["untrained"]["linear_probe"] + 0.03
    assert files(tmp_path) - {"__pycache__"} == {"simclr.py", "common.py", "some.npz", "run"}


def test_compiled_it_does_the_same(tiny_shapes, tmp_path, monkeypatch):
    """The graphs are traced and run as they are; generating code for them takes a minute and is PyTorch's business."""
    operators = ("resized_crop", "gaussian_blur", "color_jitter")
    plain = [getattr(common, name) for name in operators]
    flags = "--epochs", 1, "--lr", 0, "--blur", 0.5
    eager = small_run(tiny_shapes, tmp_path / "eager", *flags)
    calls, compile = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: calls.append(f) or compile(f, backend="eager"))
    compiled = small_run(tiny_shapes, tmp_path / "compiled", "--compile", *flags)
    assert len(calls) == 1 + len(plain)  # the network and the operators, which are as before afterwards
    assert [getattr(common, name) for name in operators] == plain
    assert compiled["history"][0]["loss"] == pytest.approx(eager["history"][0]["loss"], abs=1e-4)
    assert compiled["trained"]["knn"] == pytest.approx(eager["trained"]["knn"], abs=0.021)


def test_help_needs_neither_network_nor_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.socket", None)
    monkeypatch.setattr(sys, "argv", ["simclr.py", "--dataset", "cifar10", "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "simclr.py"), run_name="__main__")
    out = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0 and "0.1, CIFAR-10 0.5 (0.5)" in out and "long runs on a GPU (False)" in out
    assert list(tmp_path.iterdir()) == []


def test_recipes_and_what_overrides_them():
    assert (simclr.parse_args([]).batch_size, simclr.parse_args([]).optimizer) == (64, "adamw")
    cifar10 = simclr.parse_args(["--dataset", "cifar10"])
    assert (cifar10.encoder, cifar10.optimizer, cifar10.lr, cifar10.weight_decay) == ("resnet18", "sgd", 0.06, 5e-4)
    small = simclr.parse_args(
        ["--dataset", "mine.npz", "--encoder", "small", "--epoch", "3"]
    )  # as argparse abbreviates
    assert (small.encoder, small.epochs, small.batch_size, small.image_size) == ("small", 3, 128, 32)
    assert small.out == "runs/simclr-mine-seed0" and small.typed == ["dataset", "encoder", "epochs"]


@pytest.mark.parametrize(("size", "temperature", "blur"), [(28, 0.1, 0.0), (80, 0.1, 0.5), (80, 0.3, 0.5)])
def test_the_recipe_of_a_path_goes_by_the_size_and_number_of_its_images(tmp_path, size, temperature, blur, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (20, size, size, 3), dtype=np.uint8)
    labels = np.arange(20) % 2
    np.savez(tmp_path / "few.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    monkeypatch.setattr(simclr, "pretrain", lambda *_: [{"epoch": 1, "seconds": 1.0}])
    flags = ["--dataset", str(tmp_path / "few.npz"), "--out", str(tmp_path / "run"), "--encoder", "small"]
    typed = ["--temperature", "0.3"] if temperature == 0.3 else []
    args = simclr.main(simclr.parse_args([*flags, "--image-size", "96", *typed]))["args"]
    assert (args["batch_size"], args["temperature"], args["blur"]) == (20, temperature, blur)
    assert args["jitter_strength"] == (1.0 if size > 64 else 0.5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "cifar"], "--dataset cifar: not shapes"),
        (["--dataset", "none.npz"], "none.npz: no such file"),
        (["--batch-size", "4097"], "--batch-size 4097: at most the 4096 images, in equal parts for 1 process"),
        (["--batch-size", "1"], "--batch-size 1: must be from 2 to inf"),
        (["--lr", "-1"], "--lr -1.0: must be from 0 to inf"),
        (["--lr", "nan"], "--lr nan: must be from 0 to inf"),
        (["--crop", "2"], "--crop 2.0: must be from 0.01 to 1"),
        (["--eval-every", "0"], "--eval-every 0: must be from 1 to inf"),
        (["--epochs", "many"], "--epochs: invalid int value: 'many'"),
        (["--encoder", "vgg"], "--encoder: invalid choice: 'vgg'"),
        (["--optimizer", "lars"], "--optimizer: invalid choice: 'lars'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--device", "abacus"], "--device abacus: not available"),
        (["--device", "meta"], "--device meta: not available"),
        (["--dataset"], "--dataset: expected one argument"),
        (["--labels", "500"], "--labels 500: the smallest class has only 409 training images"),
        (["--labels", "0.1", "-2"], "--labels -2: must be a fraction up to 1.0, or a whole number of labels per class"),
        (["--labels", "1.5"], "--labels 1.5: must be a fraction"),
        (["--labels", "0"], "--labels 0: must be a fraction"),
        (["--labels", "few"], "--labels few: must be a fraction"),
        (["--projection", "cubic"], "--projection: invalid choice: 'cubic'"),
        (["--image-size", "4"], "--image-size 4: must be from 8 to 512"),
        (["--resume", "nothing"], "--resume nothing: there is no run of simclr.py in this folder"),
        (["--resume", "one", "--out", "other"], "--resume one: there is no run of simclr.py in this folder"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(monkeypatch, capsys, *words)
    assert list(tmp_path.iterdir()) == []


def test_broken_npz(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 and no more")
    line = error_of(monkeypatch, capsys, "--dataset", tmp_path / "broken.npz", "--out", tmp_path / "run")
    assert "broken.npz: not a readable .npz file" in line and not (tmp_path / "run").exists()


def test_folders_that_cannot_be_written(tiny_shapes, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    flags = "--dataset", tiny_shapes, "--batch-size", 32, "--encoder", "small", "--out"
    assert "cannot be used" in error_of(monkeypatch, capsys, *flags, tmp_path / "file")
    assert "cannot be used" in error_of(monkeypatch, capsys, *flags, tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(tiny_shapes, tmp_path, monkeypatch, capsys):
    flags = "--dataset", tiny_shapes, "--encoder", "small", "--batch-size", 32, "--epochs", 2, "--out", tmp_path / "run"
    calls, save = [], torch.save

    def full(content, file):
        calls.append(file)
        save(content, file)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert "cannot be written (No space left on device)" in error_of(monkeypatch, capsys, *flags)
    assert len(torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["history"]) == 1
    assert files(tmp_path / "run") == {"args.json", "metrics.jsonl", "checkpoint.pt", "views.png"}  # nothing partial


def test_a_run_is_not_overwritten(tiny_shapes, tmp_path, monkeypatch, capsys):
    small_run(tiny_shapes, tmp_path / "run", "--epochs", 1)
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    flags = "--dataset", tiny_shapes, "--encoder", "small", "--batch-size", 32, "--out", tmp_path / "run"
    assert "holds a run; go on with --resume" in error_of(monkeypatch, capsys, *flags)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}


@pytest.mark.skipif(os.name != "posix", reason="there are no such locks")
def test_two_runs_never_write_to_one_folder(tiny_shapes, unbroken, tmp_path, monkeypatch, capsys):
    flags = ["--dataset", str(tiny_shapes), "--encoder", "small", "--batch-size", "32", "--out", str(tmp_path / "run")]
    with simclr.run_folder(simclr.parse_args(flags)):
        assert "another run is writing there" in error_of(monkeypatch, capsys, *flags)
        shutil.copy(unbroken / "args.json", tmp_path / "run")
        assert "another run is writing there" in error_of(monkeypatch, capsys, "--resume", tmp_path / "run")
    small_run(tiny_shapes, tmp_path / "run", "--epochs", 1)  # before its first epoch a run holds nothing


def broken_loss(monkeypatch):
    loss, calls = simclr.nt_xent, []

    def nt_xent(*args):
        calls.append(args)
        return loss(*args) * (math.nan if len(calls) == 5 else 1)  # in the second of the epochs of 3 steps

    monkeypatch.setattr(simclr, "nt_xent", nt_xent)


def broken_weights(monkeypatch):
    step, calls = torch.optim.AdamW.step, []

    def broken(optimizer, closure=None):
        step(optimizer)
        calls.append(optimizer)
        if len(calls) == 6:  # the last step of the second epoch, behind the last loss
            optimizer.param_groups[0]["params"][0].data.fill_(math.inf)

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)


@pytest.mark.parametrize("fault", [broken_loss, broken_weights])
def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_checkpoint(tiny_shapes, tmp_path, fault):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(common.UserError, match="loss is not finite in epoch 2"):
        fault(patch)
        small_run(tiny_shapes, tmp_path / "run", "--epochs", 3, "--eval-every", 3)
    kept = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert len(kept["history"]) == 1 and all(value.isfinite().all() for value in kept["model"].values())


# ----------------------------------------------------------------------------------------------------------------------
# Few labels, no labels, no head
# ----------------------------------------------------------------------------------------------------------------------


def test_few_labels(tiny_shapes, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(simclr, "fine_tune", lambda *args: calls.append(args) or len(calls) / 10)
    summary = small_run(tiny_shapes, tmp_path / "run", "--epochs", 1, "--labels", 0.1, 1, 3)
    some, one, few = summary["semi_supervised"]
    assert 9 <= some["labels"] <= 11 and (one["labels"], few["labels"]) == (10, 30)
    assert set(some) == {"labels", "linear_probe", "fine_tuned", "from_scratch"}
    assert [row[name] for row in (some, one) for name in ("fine_tuned", "from_scratch")] == [0.1, 0.2, 0.3, 0.4]
    assert "labels 10  linear_probe" in capsys.readouterr().out
    trained = torch.load(tmp_path / "run/encoder.pt", weights_only=True)
    torch.manual_seed(0)
    untrained = simclr.SimCLR(simclr.parse_args([])).encoder.state_dict()
    for (encoder, *_, rows, _), expected in zip(calls, (trained, untrained) * 3, strict=True):
        assert all(torch.equal(value, expected[key]) for key, value in encoder.state_dict().items())
        assert len(rows) in (some["labels"], 10, 30)


def test_fine_tuning_learns_from_its_rows_alone_and_leaves_the_encoder_as_it_was():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    images = torch.randint(60, (60, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images[torch.arange(60), labels] += 150  # red, green or blue
    data = common.Dataset(images[:40], labels[:40], images[40:], labels[40:], ["r", "g", "b"])
    args = simclr.parse_args(
        ["--batch-size", "6", "--crop", "0.5", "--lr", "0.04", "--jitter-strength", "0", "--gray", "0"]
    )
    rows = torch.arange(10, 22)
    encoder, D = simclr.build_encoder("small")
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    data.train_images[:10], data.train_images[22:] = 0, 0
    data.train_labels[rows] = (data.train_labels[rows] + 1) % 3  # a rule of their own
    data.test_labels = (data.test_labels + 1) % 3
    assert simclr.fine_tune(encoder, D, data, rows, args) > 0.9
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


def test_without_a_head_there_is_one_probe(tiny_shapes, tmp_path):
    summary = small_run(tiny_shapes, tmp_path / "run", "--epochs", 1, "--projection", "none")
    assert set(summary["trained"]) == {"knn", "linear_probe"}


def test_the_head_is_probed_as_it_is_at_test_time(tiny_shapes):
    data = common.load_dataset(str(tiny_shapes))
    model = simclr.SimCLR(simclr.parse_args([])).train()
    model(common.normalize(data.train_images[:100] / 255))  # moves the statistics of batch norm
    accuracies, (h, test_h) = simclr.evaluate(model.train(), data, head=True)
    with torch.no_grad():
        z, test_z = (model.eval()(common.normalize(x / 255)) for x in (data.train_images, data.test_images))
    assert accuracies["knn_z"] == simclr.knn_accuracy(z, data.train_labels, test_z, data.test_labels)
    assert accuracies["knn"] == simclr.knn_accuracy(h, data.train_labels, test_h, data.test_labels)
    torch.testing.assert_close(test_h, model.encoder(common.normalize(data.test_images / 255)).detach())


def test_plain_images_are_pretrained_on_and_their_neighbors_shown(tmp_path, monkeypatch, capsys):
    (tmp_path / "album").mkdir()
    for i, image in enumerate(common.load_dataset("shapes").train_images[:70]):
        torchvision.utils.save_image(image / 255, tmp_path / f"album/{i:02}.png")
    flags = "--epochs", 1, "--data-dir", tmp_path / "cache"
    summary = small_run(tmp_path / "album", tmp_path / "album/run", *flags)
    assert summary["trained"] == summary["untrained"] == {} and "knn" not in summary["history"][0]
    assert {"encoder.pt", "views.png", "neighbors.png"} <= files(tmp_path / "album/run")
    small_run(tmp_path / "album", tmp_path / "album/again", *flags)  # the figures are not learned from
    assert (
        "album/again: 63 images" not in (out := capsys.readouterr().out)
        and out.count(": 63 images, 32 x 32, 0 labels") == 2
    )
    flags = "--dataset", tmp_path / "album", "--batch-size", 32, "--encoder", "small", *flags, "--labels", "0.1"
    assert "--labels 0.1: the dataset has no labels" in error_of(monkeypatch, capsys, *flags)


def test_stl10_pretrains_on_all_and_probes_with_what_has_labels(tiny_shapes, tmp_path):
    arrays = dict(np.load(tiny_shapes))
    np.savez(tmp_path / "part.npz", **arrays | {"train_labels": arrays["train_labels"][:64]})
    np.savez(tmp_path / "less.npz", **{k: v[:64] if k[:5] == "train" else v for k, v in arrays.items()})
    part, less = (small_run(tmp_path / f"{name}.npz", tmp_path / name, "--epochs", 1) for name in ("part", "less"))
    assert part["untrained"] == less["untrained"] and part["history"][0]["loss"] != less["history"][0]["loss"]
    for summary, steps in ((part, 3), (less, 2)):
        assert round(summary["images_per_second"] * summary["history"][0]["seconds"] / 32) == steps


# ----------------------------------------------------------------------------------------------------------------------
# Figures
# ----------------------------------------------------------------------------------------------------------------------


def sheets_of(monkeypatch):
    sheets = []
    monkeypatch.setattr(simclr, "save_sheet", lambda _, blocks: sheets.append(blocks))
    return sheets


def test_views_are_rows_of_pairs(tiny_shapes, tmp_path, monkeypatch):
    images, args = common.load_dataset(str(tiny_shapes)).train_images[:8], simclr.parse_args([])
    simclr.save_views(tmp_path / "views.png", images, args)
    with Image.open(tmp_path / "views.png") as sheet:
        width, height = sheet.size
    assert 9 * 64 < width < 9 * 64 + 200 and 8 * 64 < height < 8 * 64 + 100
    sheets = sheets_of(monkeypatch)
    simclr.save_views(tmp_path / "views.png", images, args)
    image, *pairs = sheets[0].values()
    assert torch.equal(image[:, 0], images / 255) and list(sheets[0]) == ["image", *(f"pair {i}" for i in range(1, 5))]
    for pair in pairs:
        assert pair.shape == (8, 2, 3, 32, 32)
        assert not torch.equal(pair[:, 0], pair[:, 1]) and not torch.equal(pair, pairs[0][:, [1, 0]])


def test_neighbors_are_the_nearest_and_framed_by_class(tmp_path, monkeypatch):
    images = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).expand(40, 3, 4, 4) * 6
    labels = torch.arange(40) // 20
    data = common.Dataset(images, labels, images[[5, 30]], torch.tensor([0, 1]), ["a", "b"])
    angle = torch.linspace(0, 3, 40)
    h = torch.stack([angle.cos(), angle.sin()], dim=1)
    shuffled = h[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    sheets = sheets_of(monkeypatch)

    def numbers(block):
        return (block[:, :, 0, 4, 4] * 255 / 6).round().long()

    simclr.save_neighbors(tmp_path / "n.png", data, (shuffled, h[[5, 30]]), (h, h[[5, 30]]))
    query, before, after = sheets[0].values()
    assert [set(row[:3]) for row in numbers(after).tolist()] == [{4, 5, 6}, {29, 30, 31}] and after.shape[1] == 6
    assert numbers(query)[:, 0].tolist() == [5, 30]
    same = labels[numbers(before)] == torch.tensor([[0], [1]])
    assert not same.all() and torch.equal(before[:, :, 1, 0, 0] > before[:, :, 0, 0, 0], same)  # green or red

    data = common.Dataset(images, labels[:0], images[[5, 30]], torch.arange(2), [])  # without classes
    simclr.save_neighbors(tmp_path / "n.png", data, (shuffled, h[[5, 30]]), (h, h[[5, 30]]))
    query, _, after = sheets[1].values()
    assert [set(row[:3]) for row in numbers(after).tolist()] == [{4, 5, 6}, {29, 30, 31}] and (
        after[..., 0, 0] == 1
    ).all()


# ----------------------------------------------------------------------------------------------------------------------
# Resume
# ----------------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What no code catches."""


def kill_in_an_epoch(monkeypatch, step):
    calls, loss = [], simclr.nt_xent

    def nt_xent(*args):
        calls.append(1)
        if len(calls) == step:
            raise Killed
        return loss(*args)

    monkeypatch.setattr(simclr, "nt_xent", nt_xent)


def kill_while_saving(monkeypatch, file):
    save, calls = Path.replace, []

    def killed(path, target):
        calls.append(target.name)
        if calls.count(file) == 2:
            path.write_bytes(path.read_bytes()[:1000])
            raise Killed
        return save(path, target)

    monkeypatch.setattr(Path, "replace", killed)


def lines_without_times(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


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
def unbroken(tiny_shapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    small_run(tiny_shapes, folder)
    return folder


KILLS = [(kill_in_an_epoch, 5)]  # of 3 steps an epoch
KILLS += [(kill_while_saving, name) for name in ("metrics.jsonl", "checkpoint.pt")]


@pytest.mark.parametrize(("kill", "when"), KILLS)
def test_a_resumed_run_ends_where_an_unbroken_one_does(tiny_shapes, unbroken, tmp_path, kill, when):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill(patch, when)
        small_run(tiny_shapes, tmp_path / "run")
    assert not (tmp_path / "run/summary.json").exists()
    resumed(tmp_path / "run")
    assert lines_without_times(tmp_path / "run") == lines_without_times(unbroken)
    states = [torch.load(f / "checkpoint.pt", weights_only=True) for f in (tmp_path / "run", unbroken)]
    for name in ("model", "optimizer", "schedule", "images"):
        assert_same(*(state[name] for state in states))
    assert (tmp_path / "run/encoder.pt").read_bytes() == (unbroken / "encoder.pt").read_bytes()
    assert files(tmp_path / "run") == files(unbroken)


def test_a_finished_run_is_measured_again_and_asked_for_more(unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path / "run")
    before = json.loads((unbroken / "summary.json").read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simclr, "fine_tune", lambda *_: 0.5)
        summary = resumed(tmp_path / "run", "--labels", "0.2", "2")
        shutil.copytree(tmp_path / "run", tmp_path / "longer")
        assert len(resumed(tmp_path / "longer", "--epochs", 3)["history"]) == 3  # what is typed overrides
    assert summary["trained"] == before["trained"] and summary["history"] == before["history"]
    assert [row["labels"] for row in summary["semi_supervised"]] == [18, 20]
    assert summary["command"] == before["command"] + f" --resume {tmp_path}/run --labels 0.2 2"
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == (unbroken / "checkpoint.pt").read_bytes()


def test_what_cannot_be_resumed(tiny_shapes, unbroken, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    arrays = dict(np.load(tiny_shapes))
    np.savez(
        tmp_path / "more.npz", **arrays | {k: np.concatenate([v, v[:9]]) for k, v in arrays.items() if "train" in k}
    )
    np.savez(tmp_path / "other.npz", **arrays | {"train_images": arrays["train_images"][::-1]})
    for name in ("more", "other"):
        line = error_of(monkeypatch, capsys, "--resume", run, "--dataset", tmp_path / f"{name}.npz")
        assert "is not what it was when the run began" in line
    line = error_of(monkeypatch, capsys, "--resume", run, "--projection", "linear")
    assert "checkpoint.pt: is not a checkpoint of this run with these flags" in line
    assert (run / "args.json").read_bytes() == (unbroken / "args.json").read_bytes()  # nothing is lost by it
    assert "--out: a resumed run stays in its folder" in error_of(
        monkeypatch, capsys, "--resume", run, "--out", "other"
    )
    whole = (run / "checkpoint.pt").read_bytes()
    for content in (whole[:5000], b"", b"text"):
        (run / "checkpoint.pt").write_bytes(content)
        assert "checkpoint.pt: is not a checkpoint" in error_of(monkeypatch, capsys, "--resume", run)
    other = tmp_path / "moco"
    other.mkdir()
    (other / "args.json").write_text(json.dumps(dataclasses.asdict(moco.parse_args([]))))
    assert "there is no run of simclr.py in this folder" in error_of(monkeypatch, capsys, "--resume", other)
    (run / "args.json").write_text("nothing")
    assert "there is no run of simclr.py in this folder" in error_of(monkeypatch, capsys, "--resume", run)


@pytest.mark.parametrize("end", [KeyboardInterrupt, BrokenPipeError])  # Ctrl-C, `| head`
def test_a_run_that_is_stopped_says_how_to_go_on(tiny_shapes, tmp_path, monkeypatch, end):
    def interrupted(*_):
        raise end

    monkeypatch.setattr(common, "batches", interrupted)
    flags = "--dataset", tiny_shapes, "--encoder", "small", "--batch-size", 32, "--out", tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["simclr.py", *map(str, flags)])
    with pytest.raises(SystemExit, match="stopped; --resume with the run folder goes on"):
        runpy.run_path(str(ROOT / "simclr.py"), run_name="__main__")


# ----------------------------------------------------------------------------------------------------------------------
# Several processes
# ----------------------------------------------------------------------------------------------------------------------


def test_two_processes_do_what_one_does(two_processes):
    folder, printed = two_processes
    for name in ("loss", "gradient"):
        for rank in range(2):
            assert float((folder / f"simclr-{name}-{rank}.txt").read_text()) < 1e-10
    assert_same(*(torch.load(folder / f"simclr-{rank}.pt", weights_only=True) for rank in range(2)))
    out = printed[0][: printed[0].index("moco on")]
    assert [out.count(f"epoch {epoch}/") for epoch in (1, 2, 3)] == [1, 1, 1] and "epoch 3/3" in out  # it was resumed
    assert printed[1] == "" and {"summary.json", "encoder.pt", "views.png"} < files(folder / "simclr")
    summary = json.loads((folder / "simclr/summary.json").read_text())
    assert summary["command"].startswith("torchrun --nproc-per-node 2 simclr.py --dataset")


def test_a_batch_is_a_multiple_of_the_processes(tiny_shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(simclr, "WORLD", 3)
    monkeypatch.setattr(simclr, "pick_device", lambda _: torch.device("cpu"))
    with pytest.raises(common.UserError, match="--batch-size 32: at most .* images, in equal parts for 3 processes"):
        small_run(tiny_shapes, tmp_path / "run")
