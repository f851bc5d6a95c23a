"""The loss against the lecture's, the queue, the moving average, and the script as a person runs it."""

import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import moco

ROOT = Path(__file__).parent.parent
SMALL = "--encoder", "small", "--epochs", "2", "--batch-size", "32", "--queue-size", "96", "--bn-groups", "2"


def small_run(data, out, *flags):
    """main on a few shapes, in two short epochs."""
    return moco.main(moco.parse_args(["--dataset", str(data), "--out", str(out), *SMALL, *flags]))


def unit(*shape, dim=1, seed=0):
    return F.normalize(torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=dim)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return moco.MoCo(moco.parse_args(["--queue-size", "12", "--projection-dim", "5", "--bn-groups", "2"]))


# ------------------------------------------------------------------------------------------------------
# Loss
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (3, 8), (8, 3)])
def test_info_nce_is_equation_1(N, K, temperature):
    query, key, queue = unit(N, 6), unit(N, 6, seed=1), unit(6, K, dim=0, seed=2)
    expected = 0
    for n in range(N):
        positive = math.exp((query[n] @ key[n]).item() / temperature)
        negatives = sum(math.exp((query[n] @ queue[:, i]).item() / temperature) for i in range(K))
        expected -= math.log(positive / (positive + negatives)) / N
    loss = moco.info_nce(query, key, queue, temperature)
    assert loss.item() == pytest.approx(expected, abs=1e-9)
    logits = torch.cat([torch.einsum("nc,nc->n", query, key)[:, None], query @ queue], dim=1) / temperature
    assert loss.item() == pytest.approx(F.cross_entropy(logits, torch.zeros(N, dtype=torch.int64)).item(), abs=1e-12)


def test_info_nce_of_identical_vectors_is_chance():
    x = unit(1, 6).expand(4, 6)
    assert moco.info_nce(x, x, x[:1].T.expand(6, 31), 0.1).item() == pytest.approx(math.log(32), abs=1e-9)


def test_gradient_reaches_the_query_encoder_alone(model):
    x, generator = torch.rand(8, 3, 32, 32), torch.Generator().manual_seed(0)
    model.enqueue(F.normalize(torch.randn(12, 5), dim=1))
    query, key = model.query_encoder(x), model.keys(x, generator)
    moco.info_nce(query, key, model.queue, 0.2).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.query_encoder.parameters() if p.ndim > 1)
    assert all(p.grad is None and not p.requires_grad for p in model.key_encoder.parameters())
    assert not key.requires_grad and not model.queue.requires_grad and model.queue.grad is None


# ------------------------------------------------------------------------------------------------------
# Queue, moving average, batch norm
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.99, 1.0])
def test_moving_average(momentum):
    torch.manual_seed(0)
    key, query = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)) for _ in range(2))
    before, buffers = [p.clone() for p in key.parameters()], [b.clone() for b in key.buffers()]
    moco.ema_update(key, query, momentum)
    for new, old, other in zip(key.parameters(), before, query.parameters(), strict=True):
        torch.testing.assert_close(new, momentum * old + (1 - momentum) * other, rtol=1e-6, atol=1e-7)
        if momentum in (0, 1):
            assert torch.equal(new, old if momentum else other)
    assert all(torch.equal(a, b) for a, b in zip(key.buffers(), buffers, strict=True))


def test_encoders_start_equal_and_momentum_0_copies_in_a_run(few_shapes, tmp_path):
    for momentum in ("0", "1"):
        small_run(few_shapes, tmp_path / momentum, "--momentum", momentum, "--epochs", "1")
    state, frozen = (torch.load(tmp_path / m / "checkpoint.pt", weights_only=True)["model"] for m in ("0", "1"))
    torch.manual_seed(0)
    start = moco.MoCo(moco.parse_args(SMALL)).key_encoder
    for name, parameter in start.named_parameters():
        assert torch.equal(state[f"key_encoder.{name}"], state[f"query_encoder.{name}"])
        assert torch.equal(frozen[f"key_encoder.{name}"], parameter)
        assert parameter.ndim == 1 or not torch.equal(frozen[f"query_encoder.{name}"], parameter)


def test_keys_are_made_in_another_order_and_come_back_in_theirs(model, monkeypatch):
    x, seen, forward = torch.rand(8, 3, 32, 32), [], model.key_encoder.forward
    monkeypatch.setattr(model.key_encoder, "forward", lambda x: seen.append(x) or forward(x))
    keys = model.eval().keys(x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(keys, forward(x).detach(), rtol=1e-4, atol=1e-5)
    assert not torch.equal(seen[0], x) and torch.equal(seen[0].sum((1, 2, 3)).sort()[0], x.sum((1, 2, 3)).sort()[0])


# ------------------------------------------------------------------------------------------------------
# Versions
# ------------------------------------------------------------------------------------------------------


def test_versions_1_and_2():
    v1, v2 = moco.parse_args(["--no-mlp", "--no-aug-plus", "--no-cos"]), moco.parse_args([])
    assert (v1.mlp, v1.aug_plus, v1.cos) == (False, False, False) and v2.mlp and v2.aug_plus and v2.cos
    assert [type(m) for m in moco.Branch(v1).projector] == [nn.Linear]
    assert [type(m) for m in moco.Branch(v2).projector] == [nn.Linear, nn.ReLU, nn.Linear]
    images = common.load_dataset("shapes").train_images[:64]
    views = [moco.two_views(images, args, torch.Generator().manual_seed(0)) for args in (v1, v2)]
    assert views[0].shape == views[1].shape == (128, 3, 32, 32) and not torch.equal(*views)


@pytest.mark.parametrize(
    ("flags", "jitter"),
    [
        (["--no-aug-plus", "--blur", "0.5"], ("random_color_jitter", 0.4, 0.4, 0.4, 0.4, 1.0)),
        (["--aug-plus", "--blur", "0.5"], ("random_color_jitter", 0.4, 0.4, 0.4, 0.1, 0.8)),
    ],
)
def test_views_are_those_of_the_authors(monkeypatch, flags, jitter):
    calls = []
    for name in ("random_color_jitter", "random_grayscale", "random_gaussian_blur"):

        def recorded(x, generator, *values, p=0.8, name=name, **spread):
            calls.append((name, *values, *spread.values(), p))
            return x

        monkeypatch.setattr(common, name, recorded)
    args = moco.parse_args(["--jitter-strength", "0.5", "--gray", "0.2", *flags])
    moco.two_views(torch.zeros(2, 3, 8, 8), args, torch.Generator())
    gray = ("random_grayscale", 0.2, 0.8)
    v2 = "--aug-plus" in flags
    assert calls == ([jitter, gray, ("random_gaussian_blur", 0.5)] if v2 else [gray, jitter])


# ------------------------------------------------------------------------------------------------------
# The script
# ------------------------------------------------------------------------------------------------------


def test_files_of_a_run(few_shapes, tmp_path):
    summary = small_run(few_shapes, tmp_path / "run", "--queue-size", "128")
    names = {"args.json", "metrics.jsonl", "summary.json", "checkpoint.pt", "encoder.pt"}
    assert {p.name for p in (tmp_path / "run").iterdir()} == names | {"views.png", "neighbors.png"}
    assert summary["method"] == "moco" and set(summary["trained"]) == {"knn", "linear_probe", "knn_z", "linear_probe_z"}
    for line in summary["history"]:
        assert line["bound"] == pytest.approx(math.log(129) - line["loss"]) and len(line["queue"]) == 4
        assert 0 <= line["accuracy"] <= 1 and -1 <= line["positive"] <= 1
    encoder = torch.load(tmp_path / "run/encoder.pt", weights_only=True)
    moco.build_encoder("small")[0].load_state_dict(encoder)


class Killed(BaseException):
    """What no code catches."""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--queue-size", "4097"], "--queue-size 4097: with 4096 images each would be among its own negatives"),
        (["--batch-size", "63"], "--bn-groups 2: must split --batch-size 63 into groups of 2 or more"),
        (["--batch-size", "8", "--bn-groups", "8"], "into groups of 2 or more"),
        (["--momentum", "1.1"], "1.1: must be from 0 to 1"),
        (["--temperature", "0"], "0: must be at least 0.01"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["moco.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "moco.py"), run_name="__main__")
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and message in line and list(tmp_path.iterdir()) == []
