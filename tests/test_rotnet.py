"""Rotations against NumPy's, the network against the paper's, and the script as a person runs it."""

import numpy as np
import pytest
import torch
from torch import nn

import common
import rotnet


def small_run(data, out, *flags):
    """main on a few shapes, in two short epochs."""
    flags = "--encoder", "small", "--epochs", "2", "--batch-size", "32", "--classifier-epochs", "1", *flags
    return rotnet.main(rotnet.parse_args(["--dataset", str(data), "--out", str(out), *flags]))


@pytest.fixture(scope="module")
def few_shapes(tmp_path_factory):
    """An .npz file with 200 training and 50 test pictures."""
    data, path = common.load_dataset("shapes"), tmp_path_factory.mktemp("data") / "few.npz"
    arrays = {}
    for split, count in (("train", 200), ("test", 50)):
        arrays[f"{split}_images"] = getattr(data, f"{split}_images")[:count].permute(0, 2, 3, 1).numpy()
        arrays[f"{split}_labels"] = getattr(data, f"{split}_labels")[:count].numpy()
    np.savez(path, **arrays)
    return path


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
