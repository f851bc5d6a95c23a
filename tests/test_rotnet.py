"""Rotations against NumPy's, the loss against the paper's, the classifiers, and the script as a person runs it."""

import json
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import common
import rotnet

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("shapes_once")
SMALL = "--encoder", "small", "--epochs", "2", "--batch-size", "32", "--classifier-epochs", "1"


def small_run(data, out, *flags):
    """main on a few shapes, in two short epochs."""
    return rotnet.main(rotnet.parse_args(["--dataset", str(data), "--out", str(out), *SMALL, *map(str, flags)]))


# ----------------------------------------------------------------------------------------------------------------------
# Rotations, model, loss, optimizer
# ----------------------------------------------------------------------------------------------------------------------


def test_rotations_are_numpys_counter_clockwise():
    images = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x, labels = rotnet.rotate_batch(images)
    assert x.shape == (20, 3, 8, 8) and x.dtype == torch.uint8 and len(x.unique(dim=0)) == 20
    assert labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5
    for i, (rotated, y) in enumerate(zip(x, labels.tolist(), strict=True)):
        image = images[i % 5].permute(1, 2, 0).numpy()
        assert np.array_equal(rotated.permute(1, 2, 0).numpy(), np.rot90(image, y))


@pytest.mark.parametrize(("side", "pixels"), [(32, 4), (96, 12)])
def test_images_are_shifted_by_a_fraction_of_their_side_and_mirrored(side, pixels):
    images = torch.zeros(400, 3, side, side, dtype=torch.uint8)
    images[:, :, side // 2, side // 2 + 1] = 255
    x = rotnet.shifted(images, rotnet.parse_args(["--dataset", "cifar10"]), torch.Generator().manual_seed(0))
    row, column = x[:, 0].flatten(1).argmax(1) // side - side // 2, x[:, 0].flatten(1).argmax(1) % side - side // 2
    assert (row.min(), row.max()) == (-pixels, pixels) and x.max() == 1
    assert (column.min(), column.max()) == (-pixels - 2, pixels + 1)  # the mirror image of 1 is -2


def test_every_block_has_the_shape_of_the_papers():
    encoder, D = rotnet.build_nin("nin")
    x, shapes = torch.zeros(2, 3, 32, 32), []
    for block in encoder:
        x = block(x)
        shapes.append(tuple(x.shape[1:]))
    assert D == 192 and shapes == [(96, 16, 16), (192, 8, 8), (192, 8, 8), (192, 8, 8)]
    kernels = [tuple(m.weight.shape) for m in encoder.modules() if isinstance(m, nn.Conv2d)]
    first = [(192, 3, 5, 5), (160, 192, 1, 1), (96, 160, 1, 1)]
    second = [(192, 96, 5, 5), (192, 192, 1, 1), (192, 192, 1, 1)]
    later = [(192, 192, 3, 3), (192, 192, 1, 1), (192, 192, 1, 1)]
    assert kernels == first + second + later * 2
    assert all(m.bias is None for m in encoder.modules() if isinstance(m, nn.Conv2d))
    kinds = [type(m) for m in encoder.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.ReLU)]
    assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 12


def test_the_small_encoder_has_the_shapes_it_says():
    encoder, D = rotnet.build_nin("small")
    assert D == 64 and len(encoder) == 3
    x = torch.zeros(2, 3, 32, 32)
    assert [encoder[:n](x).shape[1:] for n in (1, 2, 3)] == [(64, 8, 8), (64, 4, 4), (64, 4, 4)]


def test_rotation_loss_is_the_papers_formula():
    N, logits = 5, torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    images, args = torch.zeros(N, 3, 8, 8, dtype=torch.uint8), rotnet.parse_args([])
    loss = 0
    for i in range(N):
        for y in range(4):  # row y N + i is image i after y quarter turns
            e = logits[y * N + i].exp()
            loss -= math.log(e[y] / e.sum()) / 4 / N
    for scores, expected in ((logits, loss), (0 * logits, math.log(4))):  # the latter is chance
        terms = rotnet.training_step(lambda x, scores=scores: scores, images, args, torch.Generator())
        assert terms["loss"].item() == pytest.approx(expected)
    right = [logits[y * N + i].argmax().item() == y for i in range(N) for y in range(4)]
    terms = rotnet.training_step(lambda x: logits, images, args, torch.Generator())
    assert terms["rotation"].item() == pytest.approx(sum(right) / 20)


def test_learning_rate_falls_three_times_to_a_fifth():
    args, model = rotnet.parse_args(["--lr", "0.1"]), nn.Linear(2, 2)
    optimizer, schedule = rotnet.make_optimizer(model, args, 200)
    rates = []
    for _ in range(202):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.1] * 60 + [0.02] * 60 + [0.004] * 40 + [0.0008] * 42)
    (group,) = optimizer.param_groups
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 5e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Classifiers and pretext accuracy
# ----------------------------------------------------------------------------------------------------------------------


def test_the_papers_classifiers():
    layers = [m for m in rotnet.build_classifier("nonlinear", 192, 8, 8, 10) if isinstance(m, nn.Linear)]
    assert [tuple(m.weight.shape) for m in layers] == [(200, 192 * 8 * 8), (200, 200), (10, 200)]
    conv = rotnet.build_classifier("conv", 192, 8, 8, 10)
    assert conv(torch.zeros(2, 192, 8, 8)).shape == (2, 10)
    assert [m.out_channels for m in conv.modules() if isinstance(m, nn.Conv2d)] == [192] * 3


def test_classifiers_of_large_images_fit_into_memory():
    for kind in ("nonlinear", "conv"):
        classifier = rotnet.build_classifier(kind, 96, 112, 112, 1000)  # the first block of 224 pixels
        assert sum(p.numel() for p in classifier.parameters()) < 20e6
        assert classifier(torch.zeros(2, 96, 112, 112)).shape == (2, 1000)


@pytest.fixture(scope="module")
def colors():
    """Images that are red, green or blue, and nothing else."""
    labels = torch.arange(60) % 3
    images = torch.randint(60, (60, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images[torch.arange(60), labels] += 150
    return common.Dataset(images[:40], labels[:40], images[40:], labels[40:], ["r", "g", "b"])


def test_a_classifier_learns_from_its_rows_alone_and_leaves_the_blocks_as_they_were(colors):
    args = rotnet.parse_args(["--batch-size", "6", "--shift", "0.0625"])
    rows, blocks = torch.arange(10, 22), rotnet.build_nin("small")[0][:2]
    before = {key: value.clone() for key, value in blocks.state_dict().items()}
    for kind in ("nonlinear", "conv"):
        for freeze in (True, False):
            assert rotnet.train_classifier(kind, blocks, colors, rows, 40, args, freeze) > 0.9
    assert all(torch.equal(value, before[key]) for key, value in blocks.state_dict().items())
    assert all(p.requires_grad for p in blocks.parameters())
    images, labels = colors.train_images.clone(), colors.train_labels.clone()
    labels[rows] = (labels[rows] + 1) % 3  # taught wrongly
    images[:10], images[22:] = 0, 0
    wrong = common.Dataset(images, labels, colors.test_images, colors.test_labels, colors.classes)
    assert rotnet.train_classifier("conv", blocks, wrong, rows, 40, args) < 0.1


def test_frozen_blocks_stay_and_others_are_trained(colors, monkeypatch):
    args = rotnet.parse_args(["--batch-size", "2"])
    blocks, models, features = rotnet.build_nin("small")[0][:2], [], rotnet.features
    monkeypatch.setattr(rotnet, "features", lambda model, x: models.append(model) or features(model, x))
    for freeze in (True, False):
        rotnet.train_classifier("conv", blocks, colors, torch.arange(24), 1, args, freeze)
        after = models[-1][0].state_dict()
        same = [torch.equal(value, after[key]) for key, value in blocks.state_dict().items()]
        assert all(same) if freeze else not any(same)


def test_few_labels_take_as_many_steps_as_all(colors, monkeypatch):
    args, sizes, batches = rotnet.parse_args(["--batch-size", "2"]), [], common.batches
    spy = lambda images, order, N, device: sizes.append((len(order), N)) or batches(images, order, N, device)  # noqa: E731
    monkeypatch.setattr(common, "batches", spy)
    for count in (40, 3):
        rotnet.train_classifier("conv", rotnet.build_nin("small")[0][:2], colors, torch.arange(count), 2, args)
    assert sizes == [(2 * 5 * 8, 8), (2 * 5 * 3, 3)]


def test_the_pretext_task_is_measured_on_all_rotations():
    class Clock(nn.Module):
        """Reads the rotation from a white dot at the top, to which it adds `error` quarter turns."""

        def __init__(self, error):
            super().__init__()
            self.error = nn.Parameter(torch.tensor(float(error)))

        def forward(self, x):
            edges = torch.stack([x[:, 0, 0, 2], x[:, 0, 2, 0], x[:, 0, 4, 2], x[:, 0, 2, 4]], dim=1)
            return edges.roll(int(self.error), 1)

    images, args = torch.zeros(1000, 3, 5, 5, dtype=torch.uint8), rotnet.parse_args(["--shift", "0"])
    images[:, :, 0, 2] = 255
    for clock, upright, accuracy in ((0, 1000, 1), (1, 1000, 0), (0, 500, (500 * 4 + 500) / 4000), (1, 0, 0.25)):
        images[upright:] = 0
        assert rotnet.pretext_task(Clock(clock), images, args)["rotation"] == pytest.approx(accuracy)


def test_the_semi_supervised_figure_compares_frozen_blocks_with_the_same_network_from_scratch(monkeypatch):
    calls = []
    monkeypatch.setattr(rotnet, "train_classifier", lambda *a, **k: calls.append((a, k)) or len(calls) / 100)
    untrained, encoder = (rotnet.build_nin("small")[0] for _ in range(2))
    args = rotnet.parse_args(["--classifier-epochs", "7"])
    row = rotnet.few_labels(untrained, encoder, "data", torch.arange(30), args)
    assert row == {"labels": 30, "frozen": 0.01, "from_scratch": 0.02}
    for (given, options), expected, freeze in zip(calls, (encoder, untrained), (True, False), strict=True):
        kind, blocks, data, rows, epochs, _ = given
        assert (kind, data, len(rows), epochs) == ("conv", "data", 30, 14) and options.get("freeze", True) == freeze
        assert [id(block) for block in blocks] == [id(block) for block in expected[:2]]


# ----------------------------------------------------------------------------------------------------------------------
# The script
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(tiny_shapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    return folder, small_run(tiny_shapes, folder, "--labels", 0.5)


def test_files_of_a_run(unbroken):
    folder, summary = unbroken
    names = {"args.json", "metrics.jsonl", "summary.json", "checkpoint.pt", "encoder.pt", "rotations.png", ".lock"}
    assert {path.name for path in folder.iterdir()} == names
    assert summary["method"] == "rotnet" and summary == json.loads((folder / "summary.json").read_text())
    for name in ("untrained", "trained"):
        rows = summary["blocks"][name]
        assert len(rows) == 3 and rows[1].items() <= summary[name].items()
        assert all({"knn", "linear_probe", "nonlinear"} <= set(row) for row in rows)
        assert ["conv" in row for row in rows] == [False, True, False]
    assert 0 <= summary["pretext_task"]["rotation"] <= 1 and summary["pretext_task"]["loss"] > 0
    assert [line["epoch"] for line in summary["history"]] == [1, 2] and "knn" in summary["history"][1]
    (few,) = summary["semi_supervised"]
    assert few["labels"] == 48 and set(few) == {"labels", "frozen", "from_scratch"}
    rotnet.build_nin("small")[0].load_state_dict(torch.load(folder / "encoder.pt", weights_only=True))


def test_it_learns_to_predict_rotations(some_shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rotnet, "train_classifier", lambda *_: 0.5)  # tested above
    summary = small_run(some_shapes, tmp_path / "run", "--epochs", 3, "--batch-size", 16, "--shift", 0.0625)
    assert summary["pretext_task"]["rotation"] > 0.35
    assert f"rotation {summary['pretext_task']['rotation']:.4g}" in capsys.readouterr().out
    assert summary["history"][-1]["rotation"] > 0.35 and summary["history"][-1]["loss"] < 1.25
    assert summary["trained"]["linear_probe"] > summary["untrained"]["linear_probe"] + 0.2
    assert summary["trained"]["knn"] > summary["untrained"]["knn"] + 0.15


class Killed(BaseException):
    """What no code catches."""


def test_a_resumed_run_ends_where_an_unbroken_one_does(tiny_shapes, unbroken, tmp_path):
    calls, training_step = [], rotnet.training_step

    def step(*args):
        calls.append(1)
        if len(calls) == 5:  # of three an epoch: a checkpoint is there
            raise Killed
        return training_step(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(rotnet, "training_step", step)
        small_run(tiny_shapes, tmp_path / "run", "--labels", 0.5)
    summary = rotnet.main(rotnet.parse_args(["--resume", str(tmp_path / "run")]))
    for key in ("blocks", "semi_supervised", "trained", "pretext_task"):
        assert summary[key] == unbroken[1][key]
    states = [torch.load(f / "checkpoint.pt", weights_only=True) for f in (tmp_path / "run", unbroken[0])]
    for key, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][key])


def test_rotations_of_plain_images_are_measured_on_held_out_ones(tmp_path, capsys):
    (tmp_path / "album").mkdir()
    for i in range(40):  # noise has no upright
        noise = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(i))
        torchvision.utils.save_image(noise, tmp_path / f"album/{i}.png")
    flags = "--data-dir", tmp_path / "cache", "--epochs", 1, "--image-size", 16
    summary = small_run(tmp_path / "album", tmp_path / "run", *flags)
    assert summary["untrained"] == summary["trained"] == {} and summary["pretext_task"].keys() == {"loss", "rotation"}
    assert "36 images, 16 x 16, 0 labels" in capsys.readouterr().out
    with Image.open(tmp_path / "run/rotations.png") as sheet:
        assert sheet.size == (4 * (96 + 16), 4 * (96 + 32))  # four held-out images in four rotations


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shift", "-1"], "--shift -1.0: must be from 0 to 0.5"),
        (["--labels", "500"], "--labels 500: the smallest class has only 409 training images"),
        (["--encoder", "resnet18"], "--encoder: invalid choice: 'resnet18'"),
        (["--batch-size", "5000"], "--batch-size 5000: at most the 4096 images"),
        (["--resume", "nothing"], "--resume nothing: there is no run of rotnet.py in this folder"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rotnet.py", *words])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "rotnet.py"), run_name="__main__")
    line = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2 and message in line and list(tmp_path.iterdir()) == []


def test_a_batch_of_few_images_is_all_of_them(tmp_path, monkeypatch):
    images, labels = np.random.default_rng(0).integers(0, 256, (45, 8, 8, 3), dtype=np.uint8), np.arange(45) % 2
    np.savez(tmp_path / "few.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    monkeypatch.setattr(rotnet, "pretrain", lambda *_: [{"epoch": 1, "seconds": 1.0}])
    monkeypatch.setattr(rotnet, "evaluate", lambda *_: [{"knn": 0.5}] * 3)
    words = ["--dataset", str(tmp_path / "few.npz"), "--out", str(tmp_path / "run"), "--encoder", "small"]
    assert rotnet.main(rotnet.parse_args(words))["args"]["batch_size"] == 45


def test_two_processes_do_what_one_does(two_processes):
    folder, printed = two_processes
    for rank in range(2):
        assert float((folder / f"rotnet-gradient-{rank}.txt").read_text()) < 1e-10
    models = [torch.load(folder / f"rotnet-{rank}.pt", weights_only=True) for rank in range(2)]
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
    out = printed[0][printed[0].index("rotnet on") : printed[0].index("clip on")]
    assert [out.count(f"epoch {epoch}/") for epoch in (1, 2, 3)] == [1, 1, 1] and "epoch 3/3" in out  # it was resumed
    assert printed[1] == "" and (folder / "rotnet/summary.json").exists()
