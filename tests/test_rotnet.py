"""Rotations against NumPy's, the network against the paper's, and the script as a person runs it."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import common
import rotnet

ROOT = Path(__file__).parent.parent


def small_run(data, out, *flags):
    """main on a few shapes, in two short epochs."""
    flags = "--encoder", "small", "--epochs", "2", "--batch-size", "32", "--classifier-epochs", "1", *flags
    return rotnet.main(rotnet.parse_args(["--dataset", str(data), "--out", str(out), *flags]))


def test_rotations_are_numpys_counter_clockwise():
    images = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x, labels = rotnet.rotate_batch(images)
    assert x.shape == (20, 3, 8, 8) and x.dtype == torch.uint8 and len(x.unique(dim=0)) == 20
    assert labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5
    for i, (turned, turns) in enumerate(zip(x, labels.tolist(), strict=True)):
        picture = images[i % 5].permute(1, 2, 0).numpy()
        assert np.array_equal(turned.permute(1, 2, 0).numpy(), np.rot90(picture, turns))


def test_two_rotations_are_upright_and_upside_down():
    images = torch.rand(3, 3, 4, 4)
    x, labels = rotnet.rotate_batch(images, 2)
    assert torch.equal(x, torch.cat([images, images.flip(2, 3)])) and labels.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("blocks", [3, 4, 5])
def test_every_block_has_the_shape_of_the_papers(blocks):
    encoder, D = rotnet.build_nin("nin", blocks)
    x, shapes = torch.zeros(2, 3, 32, 32), []
    for block in encoder:
        x = block(x)
        shapes.append(tuple(x.shape[1:]))
    assert D == 192 and shapes == [(96, 16, 16), (192, 8, 8)] + [(192, 8, 8)] * (blocks - 2)
    kernels = [tuple(m.weight.shape) for m in encoder.modules() if isinstance(m, nn.Conv2d)]
    first = [(192, 3, 5, 5), (160, 192, 1, 1), (96, 160, 1, 1)]
    second = [(192, 96, 5, 5), (192, 192, 1, 1), (192, 192, 1, 1)]
    later = [(192, 192, 3, 3), (192, 192, 1, 1), (192, 192, 1, 1)]
    assert kernels == first + second + later * (blocks - 2)
    assert all(m.bias is None for m in encoder.modules() if isinstance(m, nn.Conv2d))
    kinds = [type(m) for m in encoder.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.ReLU)]
    assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 3 * blocks


def test_the_papers_classifiers():
    layers = [m for m in rotnet.nonlinear_classifier((192, 8, 8), 10) if isinstance(m, nn.Linear)]
    assert [tuple(m.weight.shape) for m in layers] == [(200, 192 * 8 * 8), (200, 200), (10, 200)]
    conv = rotnet.conv_classifier((192, 8, 8), 10)
    assert conv(torch.zeros(2, 192, 8, 8)).shape == (2, 10)
    assert [m.out_channels for m in conv.modules() if isinstance(m, nn.Conv2d)] == [192] * 3


def test_learning_rate_falls_three_times_to_a_fifth():
    args, model = rotnet.parse_args(["--lr", "0.1"]), nn.Linear(2, 2)
    optimizer, schedule = rotnet.sgd(model, args, 200)
    rates = []
    for _ in range(200):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    expected = [0.1] * 60 + [0.02] * 60 + [0.004] * 40 + [0.0008] * 40
    assert rates == pytest.approx(expected)


def test_blocks_and_classifiers_are_measured(few_shapes, tmp_path, capsys):
    summary = small_run(few_shapes, tmp_path / "run")
    assert "nonlinear" in capsys.readouterr().out
    for name in ("untrained", "trained"):
        rows = summary["blocks"][name]
        assert [row["block"] for row in rows] == [1, 2, 3] and rows[1].items() <= summary[name].items()
        assert all({"knn", "linear_probe", "nonlinear"} <= set(row) for row in rows)
        assert ["conv" in row for row in rows] == [False, True, False]
    assert 0 <= summary["trained"]["rotation"] <= 1 and "rotation" not in summary["untrained"]


def test_few_labels_on_frozen_blocks_and_from_scratch(few_shapes, tmp_path, monkeypatch):
    calls = []

    def train_classifier(blocks, classifier, data, rows, args, freeze=True):
        calls.append((blocks, classifier, len(rows), freeze))
        return len(calls) / 100

    monkeypatch.setattr(rotnet, "train_classifier", train_classifier)
    summary = small_run(few_shapes, tmp_path / "run", "--labels", "3", "5", "--fine-tune", "--epochs", "1")
    assert [row["labels"] for row in summary["semi_supervised"]] == [30, 50]
    assert all(set(row) == {"labels", "frozen", "from_scratch", "fine_tuned"} for row in summary["semi_supervised"])
    trained = torch.load(tmp_path / "run/encoder.pt", weights_only=True)
    torch.manual_seed(0)
    scratch = rotnet.RotNet(rotnet.parse_args([])).encoder.state_dict()
    points = calls[8:]  # two encoders, three blocks, and the convolutional classifier on one of them
    assert len(points) == 6 and all(c[1] is rotnet.conv_classifier and len(c[0]) == 2 for c in points)
    assert [(n, freeze) for _, _, n, freeze in points] == [(n, f) for n in (30, 50) for f in (True, False, False)]
    for (blocks, *_), expected in zip(points, (trained, scratch, trained) * 2, strict=True):
        assert all(torch.equal(value, expected[key]) for key, value in blocks.state_dict().items())


def test_a_classifier_learns_from_its_rows_alone_and_leaves_the_blocks_as_they_were():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    images = torch.randint(60, (60, 3, 16, 16), generator=generator, dtype=torch.uint8)
    images[torch.arange(60), labels] += 150  # red, green or blue
    data = common.Dataset(images[:40], labels[:40], images[40:], labels[40:], ["r", "g", "b"])
    args = rotnet.parse_args(["--batch-size", "6", "--classifier-epochs", "20", "--padding", "1"])
    rows, blocks = torch.arange(10, 22), rotnet.build_nin("small")[0][:2]
    before = {key: value.clone() for key, value in blocks.state_dict().items()}
    for classifier in (rotnet.nonlinear_classifier, rotnet.conv_classifier):
        for freeze in (True, False):
            assert rotnet.train_classifier(blocks, classifier, data, rows, args, freeze) > 0.9
    assert all(torch.equal(value, before[key]) for key, value in blocks.state_dict().items())
    assert all(p.requires_grad for p in blocks.parameters())
    data.train_labels[rows] = (data.train_labels[rows] + 1) % 3  # taught wrongly
    data.train_images[:10], data.train_images[22:] = 0, 0
    assert rotnet.train_classifier(blocks, rotnet.conv_classifier, data, rows, args) < 0.1


def test_frozen_blocks_stay_and_others_are_trained(monkeypatch):
    images, labels = torch.randint(255, (24, 3, 16, 16), dtype=torch.uint8), torch.arange(24) % 2
    data = common.Dataset(images, labels, images, labels, ["a", "b"])
    args = rotnet.parse_args(["--batch-size", "8", "--classifier-epochs", "1"])
    blocks, models, features = rotnet.build_nin("small")[0][:2], [], rotnet.features
    monkeypatch.setattr(rotnet, "features", lambda model, x: models.append(model) or features(model, x))
    for freeze in (True, False):
        rotnet.train_classifier(blocks, rotnet.conv_classifier, data, torch.arange(24), args, freeze)
        after = models[-1][0].state_dict()
        same = [torch.equal(value, after[key]) for key, value in blocks.state_dict().items()]
        assert all(same) if freeze else not any(same)


def test_files_of_a_run_and_resume(few_shapes, tmp_path, monkeypatch):
    class Killed(BaseException):
        """What no code catches."""

    save = rotnet.Run.save

    def killed(run, epoch, parts):
        if epoch == 2:
            raise Killed
        save(run, epoch, parts)

    small_run(few_shapes, tmp_path / "unbroken")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(rotnet.Run, "save", killed)
        small_run(few_shapes, tmp_path / "run")
    summary = small_run(few_shapes, tmp_path / "run", "--resume")
    assert summary["resumed_at_epoch"] == 1 and summary["method"] == "rotnet"
    names = {"args.json", "metrics.jsonl", "summary.json", "checkpoint.pt", "encoder.pt", "rotations.png"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == names
    a, b = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True)["model"] for n in ("run", "unbroken"))
    assert all(torch.equal(value, b[key]) for key, value in a.items())
    assert summary["blocks"] == json.loads((tmp_path / "unbroken/summary.json").read_text())["blocks"]
    rotnet.build_nin("small", 3)[0].load_state_dict(torch.load(tmp_path / "run/encoder.pt", weights_only=True))


def test_plain_pictures_are_pretrained_on(tmp_path):
    (tmp_path / "album").mkdir()
    for i, image in enumerate(common.load_dataset("shapes").train_images[:40]):
        torchvision.utils.save_image(image / 255, tmp_path / f"album/{i}.png")
    summary = small_run(tmp_path / "album", tmp_path / "run", "--data-dir", str(tmp_path / "cache"), "--epochs", "1")
    assert summary["trained"] == summary["untrained"] == {} and (tmp_path / "run/rotations.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rotations", "3"], "--rotations: invalid choice: 3"),
        (["--blocks", "2"], "--blocks: invalid choice: 2"),
        (["--padding", "-1"], "--padding -1: must be from 0 to 64"),
        (["--labels", "500"], "--labels 500: the smallest class has only 409 training images"),
        (["--encoder", "resnet18"], "--encoder: invalid choice: 'resnet18'"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rotnet.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "rotnet.py"), run_name="__main__")
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and message in line and list(tmp_path.iterdir()) == []


def test_recipes_and_help(capsys):
    for recipe in rotnet.RECIPES:
        rotnet.parse_args(["--dataset", *recipe.split()])  # every value in its range
    with pytest.raises(SystemExit):
        rotnet.parse_args(["--help"])
    assert "--classifier-epochs" in capsys.readouterr().out


def test_copied_with_common_alone_it_learns_to_tell_rotations(tmp_path):
    for name in ("rotnet.py", "common.py"):
        shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, "-W", "error", "rotnet.py", "--classifier-epochs", "1", "--eval-every", "4"]
    result = subprocess.run([*command, "--out", "run"], cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0 and result.stderr == ""
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["trained"]["rotation"] > 0.9
    assert summary["trained"]["linear_probe"] > summary["untrained"]["linear_probe"] + 0.4
