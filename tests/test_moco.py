"""The loss against the lecture's, the queue, the moving average, and the script as a person runs it."""

import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import common
import moco

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("shapes_once")
SMALL = "--encoder", "small", "--epochs", "2", "--batch-size", "32", "--queue-size", "64", "--bn-groups", "2"


def small_run(data, out, *flags):
    """main on a few shapes, in two short epochs."""
    return moco.main(moco.parse_args(["--dataset", str(data), "--out", str(out), *SMALL, *map(str, flags)]))


def unit(*shape, dim=1, seed=0):
    return F.normalize(torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=dim)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return moco.MoCo(moco.parse_args(["--queue-size", "12", "--bn-groups", "2"]))


# ----------------------------------------------------------------------------------------------------------------------
# Loss
# ----------------------------------------------------------------------------------------------------------------------


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
    query, key = (F.normalize(h, dim=1) for h in (model.query_encoder(x), model.keys(x, generator)))
    moco.info_nce(query, key, model.queue, 0.2).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.query_encoder.parameters() if p.ndim > 1)
    assert all(p.grad is None and not p.requires_grad for p in model.key_encoder.parameters())
    assert not key.requires_grad and not model.queue.requires_grad and model.queue.grad is None


# ----------------------------------------------------------------------------------------------------------------------
# Queue, moving average, batch norm
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 5, 12, 20])  # keys of a step; the queue has room for 12
def test_the_queue_is_first_in_first_out(model, size):
    assert torch.allclose(model.queue.norm(dim=0), torch.ones(12)) and len(model.queue.T.unique(dim=0)) == 12
    remembered = model.queue[0].tolist()
    for number in range(1, 8):
        keys = torch.full((size, 128), 100.0 * number) + torch.arange(size)[:, None]
        model.enqueue(keys)
        remembered = (remembered + keys[:, 0].tolist())[-12:]
        assert model.queue[0].tolist() == remembered and (model.queue == model.queue[0]).all() == (number * size >= 12)


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


def test_split_batch_norm_treats_groups_by_themselves():
    torch.manual_seed(0)
    split, x = moco.SplitBatchNorm(3, groups=2), torch.randn(8, 3, 4, 4) * 2 + 1
    x = x.contiguous(memory_format=torch.channels_last)
    split.weight.data, split.bias.data = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 0.1, 0.2])
    y = split(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    means, variances = [], []
    for group, part in zip(y.chunk(2), x.chunk(2), strict=True):
        norm = nn.BatchNorm2d(3)
        norm.weight.data, norm.bias.data = split.weight.data, split.bias.data
        torch.testing.assert_close(group, norm(part))
        means.append(norm.running_mean)
        variances.append(norm.running_var)
    torch.testing.assert_close(split.running_mean, sum(means) / 2)
    torch.testing.assert_close(split.running_var, sum(variances) / 2)
    assert not torch.allclose(y, nn.BatchNorm2d(3)(x), atol=1e-3)
    shape = (3, 1, 1)
    expected = (x[:3] - split.running_mean.view(shape)) / (split.running_var.view(shape) + split.eps).sqrt()
    expected = expected * split.weight.view(shape) + split.bias.view(shape)
    torch.testing.assert_close(split.eval()(x[:3]), expected)  # no groups at test time


def test_keys_are_made_in_another_order_and_come_back_in_theirs(model, monkeypatch):
    x, seen, forward = torch.rand(8, 3, 32, 32), [], model.key_encoder.forward
    monkeypatch.setattr(model.key_encoder, "forward", lambda x: seen.append(x) or forward(x))
    keys = model.eval().keys(x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(keys, forward(x).detach(), rtol=1e-4, atol=1e-5)
    assert not torch.equal(seen[0], x) and torch.equal(seen[0].sum((1, 2, 3)).sort()[0], x.sum((1, 2, 3)).sort()[0])
    other = model.train().keys(x, torch.Generator().manual_seed(1))
    assert not torch.allclose(other, model.keys(x, torch.Generator().manual_seed(2)), atol=1e-4)  # in other groups


def test_no_query_meets_its_own_key_in_the_queue(tiny_shapes, tmp_path, monkeypatch):
    loss, seen = moco.info_nce, []

    def info_nce(query, key, queue, temperature):
        seen.append((key, queue))
        return loss(query, key, queue, temperature)

    monkeypatch.setattr(moco, "info_nce", info_nce)
    small_run(tiny_shapes, tmp_path / "run", "--epochs", 1)
    for (key, queue), (_, later) in zip(seen, seen[1:], strict=False):
        assert (key @ queue).amax() < 1 - 1e-6 and torch.equal(later[:, -32:], key.T)
        assert torch.equal(later[:, :-32], queue[:, 32:])


# ----------------------------------------------------------------------------------------------------------------------
# Versions
# ----------------------------------------------------------------------------------------------------------------------


def test_versions_1_and_2():
    v1, v2 = moco.parse_args(["--no-mlp", "--no-aug-plus", "--no-cos"]), moco.parse_args([])
    assert (v1.mlp, v1.aug_plus, v1.cos) == (False, False, False) and v2.mlp and v2.aug_plus and v2.cos
    assert [type(m) for m in moco.MoCo(v1).query_encoder[1:]] == [nn.Linear]
    assert [type(m) for m in moco.MoCo(v2).query_encoder[1:]] == [nn.Linear, nn.ReLU, nn.Linear]
    images = common.load_dataset("shapes").train_images[:64]
    views = [moco.two_views(images, args, torch.Generator().manual_seed(0)) for args in (v1, v2)]
    assert views[0].shape == views[1].shape == (128, 3, 32, 32) and not torch.equal(*views)


@pytest.mark.parametrize("version", ["--no-aug-plus", "--aug-plus"])
def test_views_are_those_of_the_authors(monkeypatch, version):
    calls = []

    def record(name):
        monkeypatch.setattr(common, name, lambda x, _, *values, **more: calls.append((name, *values, more)) or x)

    for name in ("random_color_jitter", "random_grayscale", "random_gaussian_blur"):
        record(name)
    moco.two_views(
        torch.zeros(2, 3, 8, 8), moco.parse_args(["--gray", "0.2", "--blur", "0.5", version]), torch.Generator()
    )
    jitter = dict(brightness=0.4, contrast=0.4, saturation=0.4)
    v1, v2 = (("random_color_jitter", jitter | more) for more in (dict(hue=0.4, p=1.0), dict(hue=0.1, p=0.8)))
    gray, blur = ("random_grayscale", 0.2, {}), ("random_gaussian_blur", dict(p=0.5))
    assert calls == ([v2, gray, blur] if version == "--aug-plus" else [gray, v1, blur])


@pytest.mark.parametrize("cos", [True, False])
def test_schedules(cos):
    words = ["--cos" if cos else "--no-cos", "--warmup", "0.1", "--lr", "1"]
    optimizer, schedule = moco.make_optimizer(nn.Linear(2, 2), moco.parse_args(words), 256, 100)
    rate = []
    for _ in range(102):
        rate.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rate[:11] == pytest.approx([(step + 1) / 11 for step in range(11)])
    if cos:
        assert rate[55] == pytest.approx(0.5) and rate[100:] == pytest.approx([0, 0])
    else:  # of the 90 steps after the warmup
        assert rate[63:65] == pytest.approx([1, 0.1]) and rate[81:83] == pytest.approx([0.1, 0.01])
        assert rate[101] == pytest.approx(0.01)


# ----------------------------------------------------------------------------------------------------------------------
# The script
# ----------------------------------------------------------------------------------------------------------------------


def test_files_of_a_run(tiny_shapes, tmp_path):
    summary = small_run(tiny_shapes, tmp_path / "run", "--momentum", 0)
    names = {"args.json", "metrics.jsonl", "summary.json", "checkpoint.pt", "encoder.pt", "views.png", "neighbors.png"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == names | {".lock"}
    assert summary["method"] == "moco" and set(summary["trained"]) == {"knn", "linear_probe"}
    for line in summary["history"]:
        assert line["bound"] == pytest.approx(math.log(65) - line["loss"]) and len(line["queue"]) == 4
        assert 0 <= line["accuracy"] <= 1 and -1 <= line["positive"] <= 1
    encoder = torch.load(tmp_path / "run/encoder.pt", weights_only=True)
    moco.build_encoder("small")[0].load_state_dict(encoder)
    assert not torchvision.models.resnet18().load_state_dict(encoder, strict=False).unexpected_keys
    state = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["model"]
    for key, value in encoder.items():
        assert torch.equal(state["query_encoder.0." + key], value)
        if "running" not in key:
            assert torch.equal(state["key_encoder.0." + key], value)  # momentum 0 copies


def test_the_first_epochs_have_views_of_half_the_side(tiny_shapes, tmp_path, monkeypatch):
    sides, two_views = [], moco.two_views
    monkeypatch.setattr(moco, "two_views", lambda *args: sides.append((x := two_views(*args)).shape[2:]) or x)
    small_run(tiny_shapes, tmp_path / "run", "--half-size", 0.5)
    assert sides == 4 * [(32, 32)] + 3 * [(16, 16)] + 3 * [(32, 32)]  # those of views.png come first


def test_with_momentum_1_the_key_encoder_stays_as_it_was(tiny_shapes, tmp_path):
    small_run(tiny_shapes, tmp_path / "run", "--momentum", 1, "--epochs", 1)
    state = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["model"]
    torch.manual_seed(0)
    for name, parameter in moco.MoCo(moco.parse_args(SMALL)).key_encoder.named_parameters():
        assert torch.equal(state[f"key_encoder.{name}"], parameter)
        assert parameter.ndim == 1 or not torch.equal(state[f"query_encoder.{name}"], parameter)


def test_it_learns(some_shapes, tmp_path):
    flags = "--batch-size", 64, "--queue-size", 256, "--lr", 4e-3, "--weight-decay", 0.05, "--crop", 0.8, "--gray", 0.5
    summary = small_run(some_shapes, tmp_path / "run", *flags, "--half-size", 0, "--epochs", 3, "--eval-every", 3)
    second, last = summary["history"][1], summary["history"][-1]  # the random vectors have left the queue
    assert last["bound"] > second["bound"] + 0.1 and last["positive"] > last["queue"][0] + 0.05
    assert summary["trained"]["linear_probe"] > summary["untrained"]["linear_probe"] + 0.03


class Killed(BaseException):
    """What no code catches."""


@pytest.fixture(scope="module")
def unbroken(tiny_shapes, tmp_path_factory):
    small_run(tiny_shapes, folder := tmp_path_factory.mktemp("unbroken") / "run")
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def test_a_resumed_run_ends_where_an_unbroken_one_does(tiny_shapes, unbroken, tmp_path):
    calls, loss = [], moco.info_nce

    def info_nce(*args):
        calls.append(1)
        if len(calls) == 5:  # of three an epoch: a checkpoint is there
            raise Killed
        return loss(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(moco, "info_nce", info_nce)
        small_run(tiny_shapes, tmp_path / "run")
    moco.main(moco.parse_args(["--resume", str(tmp_path / "run")]))
    state = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["model"]
    assert set(state) == set(unbroken) and "queue" in state
    assert all(torch.equal(value, unbroken[key]) for key, value in state.items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--queue-size", "4097"], "--queue-size 4097: at most the 4096 images, or each would be its own negative"),
        (["--batch-size", "63"], "--batch-size 63: of 4096 images, must make 2 --bn-groups of 2 or more"),
        (["--batch-size", "8", "--bn-groups", "8"], "--batch-size 8: of 4096 images, must make 8 --bn-groups of 2"),
        (["--batch-size", "4098"], "--batch-size 4098: of 4096 images"),
        (["--momentum", "1.1"], "--momentum 1.1: must be from 0 to 1"),
        (["--temperature", "0"], "--temperature 0.0: must be from 0.01 to inf"),
        (["--labels", "10"], "unrecognized arguments: --labels 10"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["moco.py", *words])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "moco.py"), run_name="__main__")
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and message in line and list(tmp_path.iterdir()) == []


def test_recipes_fit_themselves_and_few_images(tmp_path, monkeypatch):
    for words in ([], ["--dataset", "cifar10"], ["--dataset", "cifar10", "--encoder", "small"]):
        args = moco.parse_args(words)
        assert args.batch_size % args.bn_groups == 0 and args.batch_size >= 2 * args.bn_groups
    images, labels = np.random.default_rng(0).integers(0, 256, (45, 80, 80, 3), dtype=np.uint8), np.arange(45) % 2
    np.savez(tmp_path / "few.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    monkeypatch.setattr(moco, "pretrain", lambda *_: [{"epoch": 1, "seconds": 1.0}])
    words = ["--dataset", str(tmp_path / "few.npz"), "--out", str(tmp_path / "run"), "--encoder", "small"]
    args = moco.main(moco.parse_args([*words, "--image-size", "96"]))["args"]
    assert (args["batch_size"], args["queue_size"]) == (44, 11)
    assert (args["temperature"], args["gray"], args["blur"]) == (0.2, 0.2, 0.5)  # version 2


def test_two_processes_do_what_one_does(two_processes):
    folder, printed = two_processes
    for name in ("keys", "gradient"):
        for rank in range(2):
            assert float((folder / f"moco-{name}-{rank}.txt").read_text()) < 1e-10
    models = [torch.load(folder / f"moco-{rank}.pt", weights_only=True) for rank in range(2)]
    assert models[0].keys() == models[1].keys() >= {"queue"}
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
    out = printed[0][printed[0].index("moco on") : printed[0].index("rotnet on")]
    assert [out.count(f"epoch {epoch}/") for epoch in (1, 2, 3)] == [1, 1, 1] and "epoch 3/3" in out  # it was resumed
    assert printed[1] == "" and (folder / "moco/summary.json").exists()
