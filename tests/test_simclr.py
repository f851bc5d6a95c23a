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
    assert len(model.projector) == layers
    x = torch.rand(4, 3, 32, 32)
    z, h = model.eval()(x), model.encoder(x)
    assert z.shape == (4, 16 if layers else 128) and torch.equal(z, h) == (layers == 0)


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
    names |= {"views.png", "neighbors.png"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == names
    assert json.loads((tmp_path / "run/args.json").read_text())["batch_size"] == 32
    assert json.loads((tmp_path / "run/summary.json").read_text()) == json.loads(json.dumps(summary))
    expected = "method command args date device threads torch parameters images_per_second"
    expected += " untrained trained history"
    assert set(expected.split()) <= set(summary) and summary["total_seconds"] > summary["pretrain_seconds"] > 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert summary["history"] == lines and set(summary["untrained"]) == {"knn", "linear_probe"}
    assert [line["epoch"] for line in lines] == [1, 2] and ["knn" in line for line in lines] == [False, True]
    assert all(line["bound"] == pytest.approx(math.log(63) - line["loss"]) for line in lines)

    encoder = torch.load(tmp_path / "run/encoder.pt", weights_only=True)
    missing, unexpected = torchvision.models.resnet18().load_state_dict(encoder, strict=False)
    assert not unexpected and all(key.startswith(("layer1.1", "layer2.1", "layer3", "layer4", "fc")) for key in missing)
    checkpoint = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert checkpoint["method"] == "simclr" and len(checkpoint["history"]) == 2
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "cifar"], "--dataset cifar: is not shapes"),
        (["--dataset", "none.npz"], "none.npz: no such file"),
        (["--batch-size", "4097"], "--batch-size 4097: shapes has only 4096 training images"),
        (["--batch-size", "1"], "1: must be at least 2"),
        (["--lr", "-1"], "-1: must be at least 0"),
        (["--lr", "nan"], "nan: must be at least 0"),
        (["--crop", "2"], "2: must be from 0.01 to 1"),
        (["--eval-every", "0"], "0: must be at least 1"),
        (["--epochs", "many"], "--epochs: invalid int value: 'many'"),
        (["--encoder", "vgg"], "--encoder: invalid choice: 'vgg'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--device", "abacus"], "--device abacus: not available"),
        (["--dataset"], "--dataset: expected one argument"),
        (["--labels", "500"], "--labels 500: the smallest class has only 409 training pictures"),
        (["--labels", "0.1", "-2"], "-2: must be a fraction"),
        (["--projection", "cubic"], "--projection: invalid choice: 'cubic'"),
        (["--image-size", "4"], "4: must be from 8 to 512"),
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


# ------------------------------------------------------------------------------------------------------
# Few labels, no labels, no head
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("projection", "z"), [("none", set()), ("linear", {"knn_z", "linear_probe_z"})])
def test_probes_with_and_without_a_head(few_shapes, tmp_path, projection, z):
    summary = small_run(few_shapes, tmp_path / "run", "--epochs", "1", "--projection", projection)
    assert set(summary["trained"]) == {"knn", "linear_probe"} | z


def test_the_head_is_probed_as_it_is_at_test_time(few_shapes):
    data = common.load_dataset(str(few_shapes))
    model = simclr.SimCLR(simclr.parse_args([])).train()
    model(common.normalize(data.train_images[:100] / 255))  # moves the statistics of batch norm
    accuracies, (h, test_h) = simclr.evaluate(model.train(), data, head=True)
    with torch.no_grad():
        z, test_z = (model.eval()(common.normalize(x / 255)) for x in (data.train_images, data.test_images))
    assert accuracies["knn_z"] == simclr.knn_accuracy(z, data.train_labels, test_z, data.test_labels)
    assert accuracies["knn"] == simclr.knn_accuracy(h, data.train_labels, test_h, data.test_labels)
    torch.testing.assert_close(test_h, model.encoder(common.normalize(data.test_images / 255)).detach())


# ------------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------------


# ------------------------------------------------------------------------------------------------------
# Resume
# ------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What no code catches."""
