"""Rotations against NumPy's, the loss against the paper's, the classifiers, and the script."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import (
    FILES,
    assert_ended_alike,
    assert_resumed_in_both,
    assert_same,
    files,
    killed_at,
    load,
    spy,
    train_and_resume,
)
from PIL import Image
from torch import nn

import common
import rotnet

pytestmark = pytest.mark.usefixtures("shapes_once")
RESULTS = FILES | {"rotations.png"}


def words(data, out, *flags):
    """A run on a few shapes, in two short epochs."""
    small = ["--encoder", "small", "--epochs", "2", "--batch-size", "32"]
    small += ["--classifier-epochs", "1"]
    return ["--dataset", str(data), *small, "--out", str(out), *map(str, flags)]


def small_run(data, out, *flags):
    return rotnet.main(rotnet.parse_args(words(data, out, *flags)))


def resumed(run, *flags):
    return rotnet.main(rotnet.parse_args(["--resume", str(run), *map(str, flags)]))


@pytest.fixture(scope="module")
def unbroken(tiny_shapes, tmp_path_factory):
    """The folder of a run that nothing has stopped. It is read only."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    small_run(tiny_shapes, folder, "--labels", 0.5)
    return folder


# ==================================================================================================
# Views and model
# ==================================================================================================


def test_rotations_are_numpys_counter_clockwise():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8, generator=generator)
    x, labels = rotnet.rotate_batch(images)
    assert x.shape == (20, 3, 8, 8)
    assert x.dtype == torch.uint8
    assert len(x.unique(dim=0)) == 20
    assert labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5
    for i, (rotated, y) in enumerate(zip(x, labels.tolist(), strict=True)):
        expected = np.rot90(images[i % 5].permute(1, 2, 0).numpy(), y)
        assert np.array_equal(rotated.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize(("side", "pixels"), [(32, 4), (96, 12)])
def test_images_are_shifted_and_mirrored_left_to_right(side, pixels):
    images = torch.zeros(400, 3, side, side, dtype=torch.uint8)
    images[:, :, side // 2, side // 2 + 1] = 255
    args = rotnet.parse_args(["--dataset", "cifar10"])
    x = rotnet.shifted(images, args, torch.Generator().manual_seed(0))
    place = x[:, 0].flatten(1).argmax(1)
    row = place // side - side // 2
    column = place % side - side // 2
    assert x.max() == 1
    assert (row.min(), row.max()) == (-pixels, pixels)
    assert (column.min(), column.max()) == (-pixels - 2, pixels + 1)  # the mirror image of 1 is -2


def outputs_of_blocks(name):
    encoder, D = rotnet.build_nin(name)
    x = torch.zeros(2, 3, 32, 32)
    shapes = []
    for block in encoder:
        x = block(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes[-1][0] == D
    return shapes


def test_every_block_has_the_shape_of_the_papers():
    assert outputs_of_blocks("nin") == [(96, 16, 16), (192, 8, 8), (192, 8, 8), (192, 8, 8)]
    encoder, _ = rotnet.build_nin("nin")
    convolutions = [m for m in encoder.modules() if isinstance(m, nn.Conv2d)]
    first = [(192, 3, 5, 5), (160, 192, 1, 1), (96, 160, 1, 1)]
    second = [(192, 96, 5, 5), (192, 192, 1, 1), (192, 192, 1, 1)]
    later = [(192, 192, 3, 3), (192, 192, 1, 1), (192, 192, 1, 1)]
    assert [tuple(m.weight.shape) for m in convolutions] == first + second + later * 2
    assert all(m.bias is None for m in convolutions)
    layers = nn.Conv2d, nn.BatchNorm2d, nn.ReLU
    kinds = [type(m) for m in encoder.modules() if isinstance(m, layers)]
    assert kinds == [*layers] * 12


def test_the_small_encoder_has_the_shapes_it_says():
    assert outputs_of_blocks("small") == [(64, 8, 8), (64, 4, 4), (64, 4, 4)]


# ==================================================================================================
# Loss and optimizer
# ==================================================================================================


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def test_rotation_loss_is_the_papers_formula():
    N = 5
    logits = draw(4 * N, 4)
    images = torch.zeros(N, 3, 8, 8, dtype=torch.uint8)
    args = rotnet.parse_args([])
    expected = 0
    right = 0
    for i in range(N):
        for y in range(4):  # row y N + i is image i after y quarter turns
            e = logits[y * N + i].exp()
            expected -= math.log(e[y] / e.sum()) / 4 / N
            right += e.argmax().item() == y
    terms = rotnet.rotation_loss(lambda _: logits, images, args, torch.Generator())
    assert terms["loss"].item() == pytest.approx(expected)
    assert terms["rotation"].item() == pytest.approx(right / 20)
    chance = rotnet.rotation_loss(lambda _: 0 * logits, images, args, torch.Generator())
    assert chance["loss"].item() == pytest.approx(math.log(4))


def test_a_step_updates_once_and_logs_what_the_loss_says():
    terms = {"loss": torch.tensor(2.0), "term": torch.tensor(3.0)}
    calls = []
    asked = []

    def pretext_loss(*inputs):
        asked.append(inputs)
        return terms

    logged = rotnet.training_step("net", "images", "args", "g", 0.5, calls.append, pretext_loss)
    assert asked == [("net", "images", "args", "g")]
    assert calls == [terms["loss"]]
    assert logged == terms


def test_learning_rate_falls_three_times_to_a_fifth():
    args = rotnet.parse_args(["--lr", "0.1"])
    optimizer, schedule = rotnet.make_optimizer(nn.Linear(2, 2), args, 128, 200)
    rates = []
    for _ in range(202):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.1] * 60 + [0.02] * 60 + [0.004] * 40 + [0.0008] * 42)
    (group,) = optimizer.param_groups
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 5e-4)


# ==================================================================================================
# Classifiers and pretext accuracy
# ==================================================================================================


def test_the_papers_classifiers():
    nonlinear = rotnet.build_classifier("nonlinear", 192, 8, 8, 10)
    layers = [m for m in nonlinear.modules() if isinstance(m, nn.Linear)]
    assert [tuple(m.weight.shape) for m in layers] == [(200, 192 * 8 * 8), (200, 200), (10, 200)]
    conv = rotnet.build_classifier("conv", 192, 8, 8, 10)
    assert conv(torch.zeros(2, 192, 8, 8)).shape == (2, 10)
    assert [m.out_channels for m in conv.modules() if isinstance(m, nn.Conv2d)] == [192] * 3


@pytest.mark.parametrize("kind", ["nonlinear", "conv"])
def test_classifiers_of_large_images_fit_into_memory(kind):
    classifier = rotnet.build_classifier(kind, 96, 112, 112, 1000)  # block 1 of 224 pixels
    assert sum(p.numel() for p in classifier.parameters()) < 20e6
    assert classifier(torch.zeros(2, 96, 112, 112)).shape == (2, 1000)


@pytest.fixture
def colors():
    """Images that are red, green or blue, and nothing else."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    images = torch.randint(60, (60, 3, 16, 16), generator=generator, dtype=torch.uint8)
    images[torch.arange(60), labels] += 150
    return common.Dataset(images[:40], labels[:40], images[40:], labels[40:], ["r", "g", "b"])


def two_blocks():
    return rotnet.build_nin("small")[0][:2]


@pytest.mark.parametrize("kind", ["nonlinear", "conv"])
@pytest.mark.parametrize("freeze", [True, False])
def test_a_classifier_learns_and_leaves_the_blocks_alone(colors, kind, freeze):
    args = rotnet.parse_args(["--batch-size", "6", "--shift", "0.0625"])
    blocks = two_blocks()
    before = {key: value.clone() for key, value in blocks.state_dict().items()}
    rows = torch.arange(10, 22)
    assert rotnet.train_classifier(kind, blocks, colors, rows, 40, args, freeze) > 0.9
    assert_same(dict(blocks.state_dict()), before)
    assert all(p.requires_grad for p in blocks.parameters())


def test_a_classifier_learns_from_its_rows_only(colors):
    rows = torch.arange(10, 22)
    colors.train_labels[rows] = (colors.train_labels[rows] + 1) % 3  # a rule of their own
    colors.train_images[:10] = 0
    colors.train_images[22:] = 0
    args = rotnet.parse_args(["--batch-size", "6", "--shift", "0.0625"])
    assert rotnet.train_classifier("conv", two_blocks(), colors, rows, 40, args) < 0.1


@pytest.mark.parametrize("freeze", [True, False])
def test_frozen_blocks_stay_and_others_are_trained(colors, monkeypatch, freeze):
    args = rotnet.parse_args(["--batch-size", "2"])
    blocks = two_blocks()
    calls = spy(monkeypatch, rotnet, "features")
    rotnet.train_classifier("conv", blocks, colors, torch.arange(24), 1, args, freeze)
    model, images = calls[-1]
    assert images is colors.test_images
    after = model[0].state_dict()
    same = [torch.equal(value, after[key]) for key, value in blocks.state_dict().items()]
    assert set(same) == {freeze}  # statistics of batch norm, too


@pytest.mark.parametrize(("labels", "N"), [(40, 8), (3, 3), (1, 2)])
def test_few_labels_take_as_many_steps_as_all(colors, monkeypatch, labels, N):
    args = rotnet.parse_args(["--batch-size", "2"])
    calls = spy(monkeypatch, common, "batches")
    rows = torch.arange(labels)
    rotnet.train_classifier("nonlinear", two_blocks(), colors, rows, 2, args)
    ((_, order, size, _),) = calls
    assert (len(order), size) == (2 * 5 * N, N)
    assert order.max() < labels


class Clock(nn.Module):
    """Reads the rotation from a white dot at the top, to which it adds `error` quarter turns."""

    def __init__(self, error):
        super().__init__()
        self.error = nn.Parameter(torch.tensor(float(error)))

    def forward(self, x):
        edges = [x[:, 0, 0, 2], x[:, 0, 2, 0], x[:, 0, 4, 2], x[:, 0, 2, 4]]
        return torch.stack(edges, dim=1).roll(int(self.error), 1)


@pytest.mark.parametrize(
    ("error", "upright", "accuracy"),
    [(0, 1000, 1), (1, 1000, 0), (0, 500, (500 * 4 + 500) / 4000), (1, 0, 0.25)],
)
def test_the_pretext_task_is_measured_on_all_rotations(error, upright, accuracy):
    images = torch.zeros(1000, 3, 5, 5, dtype=torch.uint8)
    images[:upright, :, 0, 2] = 255
    args = rotnet.parse_args(["--shift", "0"])
    task = rotnet.pretext_task(Clock(error), images, args, rotnet.rotation_loss)
    assert task["rotation"] == pytest.approx(accuracy)


def test_few_labels_on_frozen_blocks_and_from_scratch(monkeypatch):
    scores = iter([0.01, 0.02])
    calls = []

    def train_classifier(*inputs, freeze=True):
        calls.append((*inputs, freeze))
        return next(scores)

    monkeypatch.setattr(rotnet, "train_classifier", train_classifier)
    scratch = two_blocks()
    encoder = two_blocks()
    args = rotnet.parse_args(["--classifier-epochs", "7"])
    row = rotnet.few_labels(scratch, encoder, "data", torch.arange(30), args)
    assert row == {"labels": 30, "frozen": 0.01, "from_scratch": 0.02}
    for call, expected, frozen in zip(calls, (encoder, scratch), (True, False), strict=True):
        kind, blocks, data, rows, epochs, _, freeze = call
        assert (kind, data, len(rows), epochs, freeze) == ("conv", "data", 30, 14, frozen)
        assert [id(block) for block in blocks] == [id(block) for block in expected]


# ==================================================================================================
# The script
# ==================================================================================================


def test_a_run_leaves_its_files(unbroken):
    assert files(unbroken) == RESULTS
    summary = json.loads((unbroken / "summary.json").read_text())
    assert summary["method"] == "rotnet"
    assert [line["epoch"] for line in summary["history"]] == [1, 2]
    assert summary["history"][1].keys() >= {"loss", "rotation", "knn"}
    rotnet.build_nin("small")[0].load_state_dict(load(unbroken / "encoder.pt"))
    with Image.open(unbroken / "rotations.png") as sheet:
        assert sheet.width > 9 * 96  # a column for each class of the test images


def test_a_summary_has_a_row_for_every_block(unbroken):
    summary = json.loads((unbroken / "summary.json").read_text())
    for name in ("untrained", "trained"):
        rows = summary["blocks"][name]
        assert len(rows) == 3
        assert summary[name] == rows[1]
        assert all({"knn", "linear_probe", "nonlinear"} <= row.keys() for row in rows)
        assert ["conv" in row for row in rows] == [False, True, False]
    assert 0 <= summary["pretext_task"]["rotation"] <= 1
    assert summary["pretext_task"]["loss"] > 0
    (few,) = summary["semi_supervised"]
    assert few["labels"] == 48
    assert set(few) == {"labels", "frozen", "from_scratch"}


def test_held_out_labels_are_predicted_from_block_2(unbroken, tiny_shapes):
    data = common.load_dataset(str(tiny_shapes))
    encoder, _ = rotnet.build_nin("small")
    encoder.load_state_dict(load(unbroken / "encoder.pt"))
    history = json.loads((unbroken / "summary.json").read_text())["history"]
    found = [rotnet.monitor(rotnet.pooled(encoder, n), data)["knn"] for n in (1, 2, 3)]
    assert history[-1]["knn"] == found[1]
    assert len(set(found)) > 1


def test_it_learns_to_predict_rotations(some_shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rotnet, "train_classifier", lambda *_: 0.5)  # tested above
    flags = "--epochs", 3, "--batch-size", 16, "--shift", 0.0625
    summary = small_run(some_shapes, tmp_path / "run", *flags)
    assert summary["pretext_task"]["rotation"] > 0.35
    assert summary["history"][-1]["rotation"] > 0.35
    assert summary["history"][-1]["loss"] < 1.25
    before = summary["untrained"]
    after = summary["trained"]
    assert after["linear_probe"] > before["linear_probe"] + 0.2
    assert after["knn"] > before["knn"] + 0.15
    out = capsys.readouterr().out
    assert f"rotation {summary['pretext_task']['rotation']:.4g}" in out
    assert f"block 2:  knn {before['knn']:.1%} -> {after['knn']:.1%}" in out


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [(rotnet, "training_step", 5), (Path, "replace", 6)],
)
def test_a_resumed_run_ends_as_an_unbroken_one(tiny_shapes, unbroken, tmp_path, module, name, call):
    run = tmp_path / "run"
    with killed_at(module, name, call):  # of three steps an epoch
        small_run(tiny_shapes, run, "--labels", 0.5)
    assert not (run / "summary.json").exists()
    resumed(run)
    keys = "blocks", "semi_supervised", "trained", "pretext_task"
    assert_ended_alike(run, unbroken, *keys)


def test_a_finished_run_can_be_asked_about_few_labels(unbroken, tmp_path, monkeypatch):
    run = shutil.copytree(unbroken, tmp_path / "run")
    monkeypatch.setattr(rotnet, "train_classifier", lambda *_, **options: 0.5)
    calls = spy(monkeypatch, rotnet, "few_labels")
    summary = resumed(run, "--labels", 2)
    assert [row["labels"] for row in summary["semi_supervised"]] == [20]
    scratch, encoder = calls[0][:2]
    torch.manual_seed(0)
    assert_same(dict(scratch.state_dict()), dict(rotnet.build_nin("small")[0].state_dict()))
    assert_same(dict(encoder.state_dict()), load(unbroken / "encoder.pt"))


def test_a_run_begins_with_the_weights_of_another(unbroken, tiny_shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(rotnet, "train_classifier", lambda *_, **options: 0.5)
    calls = spy(monkeypatch, rotnet, "few_labels")
    first = json.loads((unbroken / "summary.json").read_text())
    flags = "--init", unbroken / "encoder.pt", "--epochs", 0, "--labels", 1
    summary = small_run(tiny_shapes, tmp_path / "run", *flags)
    for key in ("untrained", "trained"):
        assert summary[key]["knn"] == first["trained"]["knn"]
    assert summary["history"] == []
    scratch = calls[0][0].state_dict()
    assert not torch.equal(scratch["0.0.weight"], load(unbroken / "encoder.pt")["0.0.weight"])


TRAINING_FLAGS = {"dataset", "image_size", "encoder", "init", "epochs", "batch_size", "lr"}
TRAINING_FLAGS |= {"weight_decay", "shift", "classifier_epochs", "eval_every", "seed", "out"}


def test_only_flags_that_do_not_train_go_with_resume():
    flags = rotnet.flags_of(rotnet.Args)
    assert {name for name in flags if not flags[name].metadata["resume"]} == TRAINING_FLAGS


def test_plain_images_are_measured_by_their_rotations(tmp_path, capsys):
    (tmp_path / "album").mkdir()
    for i in range(40):  # noise has no upright
        noise = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(i))
        torchvision.utils.save_image(noise, tmp_path / f"album/{i}.png")
    flags = "--data-dir", tmp_path / "cache", "--epochs", 1, "--image-size", 16
    summary = small_run(tmp_path / "album", tmp_path / "run", *flags)
    assert summary["untrained"] == summary["trained"] == {}
    assert summary["pretext_task"].keys() == {"loss", "rotation"}
    assert "36 images, 16 x 16, 0 labels" in capsys.readouterr().out
    assert files(tmp_path / "run") == RESULTS


def test_one_labelled_image_is_enough(tiny_shapes, tmp_path):
    arrays = dict(np.load(tiny_shapes))
    one = {"train_labels": arrays["train_labels"][:1]}
    one["test_labels"] = np.full(30, one["train_labels"][0])
    np.savez(tmp_path / "one.npz", **arrays | one)
    summary = small_run(tmp_path / "one.npz", tmp_path / "run", "--epochs", 1, "--labels", 1.0)
    assert "knn" not in summary["history"][0]
    assert 0 <= summary["trained"]["linear_probe"] <= 1
    assert summary["semi_supervised"][0]["labels"] == 1


BAD = [
    (["--shift", "-1"], "--shift -1.0: must be from 0 to 0.5"),
    (["--labels", "500"], "error: labels 500: the smallest class has only 409 training images"),
    (["--encoder", "resnet18"], "--encoder: invalid choice: 'resnet18'"),
    (["--batch-size", "5000"], "--batch-size 5000: must be from 2 to 4096, the number of images"),
    (["--classifier-epochs", "0"], "--classifier-epochs 0: must be at least 1"),
    (["--classifierepochs", "9"], "did you mean --classifier-epochs?"),
    (["--init", "none.pt"], "--init none.pt: does not fit --encoder small"),
    (["--resume", "nothing"], "--resume nothing: there is no run of rotnet.py in this folder"),
]


@pytest.mark.parametrize(("flags", "message"), BAD)
def test_bad_input_is_one_line(tmp_path, monkeypatch, error_of, flags, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(rotnet.run, *flags)
    assert list(tmp_path.iterdir()) == []


def test_flags_that_train_are_refused_with_resume(unbroken, error_of):
    line = error_of(rotnet.run, "--resume", unbroken, "--classifier-epochs", 2)
    assert "--classifier-epochs: a resumed run keeps the flags it was started with" in line


# ==================================================================================================
# Several processes
# ==================================================================================================


def both_compute_gradients():
    torch.manual_seed(0)
    model = rotnet.RotNet(rotnet.parse_args([])).double().eval()  # batch norm would differ
    network = nn.parallel.DistributedDataParallel(model)
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    x, labels = rotnet.rotate_batch(images)
    whole = F.cross_entropy(model(x), labels)
    expected = torch.autograd.grad(whole, list(model.parameters()))
    x, labels = rotnet.rotate_batch(images[rotnet.RANK :: 2])
    F.cross_entropy(network(x), labels).backward()
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-10, atol=1e-10)


def both_train(data, folder):
    both_compute_gradients()
    train_and_resume(rotnet, words(data, folder), folder, "training_step")


def test_two_processes_do_what_one_does(tiny_shapes, tmp_path, in_two_processes):
    printed = in_two_processes(both_train, tiny_shapes, tmp_path)
    assert_resumed_in_both(tmp_path, printed)
    assert files(tmp_path / "run") == RESULTS
