"""The loss against the paper's formula, queue, moving average, and the script as it is run."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import (
    RESULTS,
    assert_a_step_of_both_is_one_of_all,
    assert_resumed_in_both,
    assert_same,
    files,
    killed_at,
    load,
    records,
    spy,
    train_and_resume,
)
from torch import nn

import common
import moco

pytestmark = pytest.mark.usefixtures("shapes_once")
SMALL = ["--encoder", "small", "--epochs", "2", "--batch-size", "32"]
SMALL += ["--queue-size", "64", "--bn-groups", "2"]
VERSION_1 = ["--no-mlp", "--no-aug-plus", "--no-cos", "--temperature", "0.07", "--blur", "0"]


def words(data, out, *flags):
    """A run on a few shapes, in two short epochs."""
    return ["--dataset", str(data), "--out", str(out), *SMALL, *map(str, flags)]


def small_run(data, out, *flags):
    return moco.main(moco.parse_args(words(data, out, *flags)))


def unit(*shape, dim=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(shape, dtype=torch.float64, generator=generator), dim=dim)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return moco.MoCo(moco.parse_args(["--queue-size", "12", "--bn-groups", "2"]))


# ==================================================================================================
# Loss
# ==================================================================================================


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (3, 8), (8, 3)])
def test_info_nce_is_equation_1(N, K, temperature):
    query = unit(N, 6)
    key = unit(N, 6, seed=1)
    queue = unit(6, K, dim=0, seed=2)
    expected = 0
    for n in range(N):
        positive = math.exp((query[n] @ key[n]).item() / temperature)
        others = [math.exp((query[n] @ queue[:, i]).item() / temperature) for i in range(K)]
        expected -= math.log(positive / (positive + sum(others))) / N
    loss = moco.info_nce(query, key, queue, temperature)
    assert loss.item() == pytest.approx(expected, abs=1e-9)


def test_info_nce_of_identical_vectors_is_chance():
    x = unit(1, 6).expand(4, 6)
    queue = x[:1].T.expand(6, 31)
    assert moco.info_nce(x, x, queue, 0.1).item() == pytest.approx(math.log(32), abs=1e-9)


def test_gradient_reaches_the_query_encoder_only(model):
    x = torch.rand(8, 3, 32, 32)
    query, key = model(x, x, torch.Generator().manual_seed(0))
    query = F.normalize(query, dim=1)
    moco.info_nce(query, F.normalize(key, dim=1), model.queue, 0.2).backward()
    weights = [p for p in model.query_encoder.parameters() if p.ndim > 1]
    assert all(p.grad.abs().sum() > 0 for p in weights)
    assert all(p.grad is None and not p.requires_grad for p in model.key_encoder.parameters())
    assert not key.requires_grad
    assert not model.queue.requires_grad


def test_similarities_are_means_over_the_batch():
    query = unit(5, 6)
    key = 0.5 * query
    queue = unit(6, 8, dim=0, seed=2)
    queue[:, 3] = query[0]  # closer to the first query than its own key
    found = moco.similarities(query, key, queue)
    closest = [max((query[n] @ queue[:, i]).item() for i in range(8)) for n in range(5)]
    assert closest[0] > 0.5
    assert found["accuracy"].item() == pytest.approx(sum(s < 0.5 for s in closest) / 5)
    assert found["positive"].item() == pytest.approx(0.5)
    for quarter in range(4):
        pairs = [(n, i) for n in range(5) for i in (2 * quarter, 2 * quarter + 1)]
        expected = sum((query[n] @ queue[:, i]).item() for n, i in pairs) / 10
        assert found["queue"][quarter].item() == pytest.approx(expected)


# ==================================================================================================
# Queue, moving average, batch norm
# ==================================================================================================


@pytest.mark.parametrize("size", [4, 5, 12, 20])  # keys of a step; the queue has room for 12
def test_the_queue_is_first_in_first_out(model, size):
    assert torch.allclose(model.queue.norm(dim=0), torch.ones(12))
    assert len(model.queue.T.unique(dim=0)) == 12
    remembered = model.queue[0].tolist()
    for number in range(1, 8):
        keys = torch.full((size, 128), 100.0 * number) + torch.arange(size)[:, None]
        model.enqueue(keys)
        remembered = (remembered + keys[:, 0].tolist())[-12:]
        assert model.queue[0].tolist() == remembered
        assert (model.queue == model.queue[0]).all() == (number * size >= 12)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.99, 1.0])
def test_the_moving_average_is_equation_2(momentum):
    torch.manual_seed(0)
    key = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    query = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    before = [p.clone() for p in key.parameters()]
    buffers = [b.clone() for b in key.buffers()]
    moco.ema_update(key, query, momentum)
    for new, old, other in zip(key.parameters(), before, query.parameters(), strict=True):
        expected = momentum * old + (1 - momentum) * other
        torch.testing.assert_close(new, expected, rtol=1e-6, atol=1e-7)
        if momentum in (0, 1):
            assert torch.equal(new, old if momentum else other)
    assert_same(list(key.buffers()), buffers)


@pytest.fixture
def split():
    """Batch norm in two groups, and a batch."""
    torch.manual_seed(0)
    norm = moco.SplitBatchNorm(3, groups=2)
    norm.weight.data = torch.tensor([1.0, 2.0, 3.0])
    norm.bias.data = torch.tensor([0.0, 0.1, 0.2])
    x = torch.randn(8, 3, 4, 4) * 2 + 1
    return norm, x.contiguous(memory_format=torch.channels_last)


def test_batch_norm_treats_groups_by_themselves(split):
    norm, x = split
    y = norm(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    for group, part in zip(y.chunk(2), x.chunk(2), strict=True):
        reference = nn.BatchNorm2d(3)
        reference.load_state_dict(norm.state_dict())
        torch.testing.assert_close(group, reference(part))
    whole = nn.BatchNorm2d(3)
    whole.load_state_dict(norm.state_dict())
    assert not torch.allclose(y, whole(x), atol=1e-3)


def test_running_statistics_average_the_groups(split):
    norm, x = split
    for _ in range(200):
        norm(x)
    means = [part.mean((0, 2, 3)) for part in x.chunk(2)]
    variances = [part.var((0, 2, 3)) for part in x.chunk(2)]
    torch.testing.assert_close(norm.running_mean, sum(means) / 2, rtol=0, atol=0.03)
    torch.testing.assert_close(norm.running_var, sum(variances) / 2, rtol=0.03, atol=0)
    fresh = moco.SplitBatchNorm(3, groups=2)
    fresh(torch.ones(8, 3, 4, 4))
    step = torch.full((3,), 1 - 0.95**2)  # two groups, each with half of PyTorch's 0.1
    torch.testing.assert_close(fresh.running_mean, step)


def test_there_are_no_groups_at_test_time(split):
    norm, x = split
    norm(x)
    mean = norm.running_mean.view(3, 1, 1)
    deviation = (norm.running_var + norm.eps).sqrt().view(3, 1, 1)
    standardized = (x[:3] - mean) / deviation
    expected = standardized * norm.weight.view(3, 1, 1) + norm.bias.view(3, 1, 1)
    torch.testing.assert_close(norm.eval()(x[:3]), expected)


def test_keys_are_shuffled_and_come_back_in_order(model, monkeypatch):
    x = torch.rand(8, 3, 32, 32)
    seen = spy(monkeypatch, model.key_encoder, "forward")
    keys = model.eval().keys(x, torch.Generator().manual_seed(0))
    expected = model.key_encoder(x).detach()
    torch.testing.assert_close(keys, expected, rtol=1e-4, atol=1e-5)
    ((shuffled,), _) = seen
    assert not torch.equal(shuffled, x)
    sums = [batch.sum((1, 2, 3)).sort().values for batch in (shuffled, x)]
    assert torch.equal(*sums)


def test_shuffled_keys_meet_other_statistics(model):
    x = torch.rand(8, 3, 32, 32)
    model.train()
    first = model.keys(x, torch.Generator().manual_seed(1))
    second = model.keys(x, torch.Generator().manual_seed(2))
    assert not torch.allclose(first, second, atol=1e-4)


def test_no_query_meets_its_own_key_in_the_queue(tiny_shapes, tmp_path, monkeypatch):
    calls = spy(monkeypatch, moco, "info_nce")
    small_run(tiny_shapes, tmp_path / "run", "--epochs", 1)
    for (_, key, queue, _), (_, _, later, _) in zip(calls[:-1], calls[1:], strict=True):
        assert (key @ queue).amax() < 1 - 1e-6
        assert torch.equal(later[:, -32:], key.T)
        assert torch.equal(later[:, :-32], queue[:, 32:])


# ==================================================================================================
# Versions
# ==================================================================================================


def test_the_command_of_version_1_is_version_1():
    text = moco.__doc__
    assert f"python moco.py {' '.join(VERSION_1)}" in " ".join(text.split())
    args = moco.parse_args(["--dataset", "cifar10", *VERSION_1])
    assert (args.mlp, args.aug_plus, args.cos) == (False, False, False)
    assert (args.temperature, args.blur, args.warmup, args.optimizer) == (0.07, 0, 0, "sgd")
    moco.use_recipe(args, moco.LARGE_IMAGES)
    assert (args.temperature, args.blur) == (0.07, 0)


def test_heads_of_versions_1_and_2():
    heads = []
    for flags in (VERSION_1, []):
        encoder = moco.MoCo(moco.parse_args(flags)).query_encoder
        heads.append([type(module) for module in encoder[1:]])
    assert heads == [[nn.Linear], [nn.Linear, nn.ReLU, nn.Linear]]


@pytest.mark.parametrize("version", ["--no-aug-plus", "--aug-plus"])
def test_views_are_those_of_the_authors(monkeypatch, version):
    calls = []

    def noted(name):
        def operator(x, _, *values, **options):
            calls.append((name, *values, options))
            return x

        monkeypatch.setattr(common, name, operator)

    for name in ("random_color_jitter", "random_grayscale", "random_gaussian_blur"):
        noted(name)
    args = moco.parse_args(["--gray", "0.2", "--blur", "0.5", version])
    moco.two_views(torch.zeros(2, 3, 8, 8), args, torch.Generator())
    jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4}
    v1 = ("random_color_jitter", jitter | {"hue": 0.4, "p": 1.0})
    v2 = ("random_color_jitter", jitter | {"hue": 0.1, "p": 0.8})
    gray = ("random_grayscale", 0.2, {})
    blur = ("random_gaussian_blur", {"p": 0.5})
    assert calls == ([v2, gray, blur] if version == "--aug-plus" else [gray, v1, blur])


@pytest.mark.parametrize(("progress", "size"), [(0.0, 16), (0.49, 16), (0.5, 32), (1.0, 32)])
def test_views_are_half_as_large_until_then(progress, size):
    images = common.load_dataset("shapes").train_images[:2]
    args = moco.parse_args(["--half-size-until", "0.5"])
    views = moco.two_views(images, args, torch.Generator().manual_seed(0), progress)
    assert views.shape == (4, 3, size, size)


def rates(*flags):
    """The learning rate of each of 100 steps, and of two beyond the last."""
    args = moco.parse_args(["--warmup", "0.1", "--lr", "1", *flags])
    optimizer, schedule = moco.make_optimizer(nn.Linear(2, 2), args, 256, 100)
    seen = []
    for _ in range(102):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_version_2_falls_along_a_cosine():
    rate = rates("--cos")
    assert rate[:11] == pytest.approx([(step + 1) / 11 for step in range(11)])
    assert rate[55] == pytest.approx(0.5)
    assert rate[100:] == pytest.approx([0, 0])


def test_version_1_falls_in_two_steps():
    rate = rates("--no-cos")  # after 60 and 80 % of the 90 steps that follow the warmup
    assert rate[:11] == pytest.approx([(step + 1) / 11 for step in range(11)])
    assert rate[63:65] == pytest.approx([1, 0.1])
    assert rate[81:83] == pytest.approx([0.1, 0.01])
    assert rate[101] == pytest.approx(0.01)


# ==================================================================================================
# The script
# ==================================================================================================


def test_a_run_leaves_its_files(tiny_shapes, tmp_path):
    summary = small_run(tiny_shapes, tmp_path / "run")
    assert files(tmp_path / "run") == RESULTS
    assert summary["method"] == "moco"
    assert set(summary["trained"]) == {"knn", "linear_probe"}
    for line in summary["history"]:
        assert line["bound"] == pytest.approx(math.log(65) - line["loss"], abs=1e-5)
        assert len(line["queue"]) == 4
        assert 0 <= line["accuracy"] <= 1
        assert -1 <= line["positive"] <= 1
    encoder = load(tmp_path / "run/encoder.pt")
    moco.build_encoder("small")[0].load_state_dict(encoder)
    resnet = torchvision.models.resnet18()
    assert not resnet.load_state_dict(encoder, strict=False).unexpected_keys


@pytest.mark.parametrize("momentum", [0, 1])
def test_key_encoders_without_and_with_all_momentum(tiny_shapes, tmp_path, momentum):
    small_run(tiny_shapes, tmp_path / "run", "--ema-momentum", momentum, "--epochs", 1)
    state = load(tmp_path / "run/checkpoint.pt")["model"]
    torch.manual_seed(0)
    for name, untrained in moco.MoCo(moco.parse_args(SMALL)).key_encoder.named_parameters():
        key = state[f"key_encoder.{name}"]
        query = state[f"query_encoder.{name}"]
        assert torch.equal(key, untrained if momentum else query)
        assert untrained.ndim == 1 or not torch.equal(query, untrained)


def test_both_encoders_begin_with_the_weights_of_a_file(tiny_shapes, tmp_path):
    torch.manual_seed(5)
    weights = dict(moco.build_encoder("small")[0].state_dict())
    torch.save(weights, tmp_path / "weights.pt")
    args = moco.parse_args(words(tiny_shapes, tmp_path / "run", "--init", tmp_path / "weights.pt"))
    model = moco.MoCo(args)
    for encoder in (model.query_encoder[0], model.key_encoder[0]):
        assert_same(dict(encoder.state_dict()), weights)
    args.epochs = 0
    assert moco.main(args)["history"] == []
    assert_same(load(tmp_path / "run/encoder.pt"), weights)


@pytest.mark.usefixtures("whole_probes")
def test_it_learns(some_shapes, tmp_path):
    flags = ["--batch-size", 64, "--queue-size", 256, "--lr", 4e-3, "--weight-decay", 0.05]
    flags += ["--crop", 0.8, "--gray", 0.5, "--half-size-until", 0, "--epochs", 3]
    summary = small_run(some_shapes, tmp_path / "run", *flags, "--eval-every", 3)
    second, last = summary["history"][1:]  # the random vectors have left the queue
    assert last["bound"] > second["bound"] + 0.1
    assert last["positive"] > last["queue"][0] + 0.05
    trained = summary["trained"]["linear_probe"]
    assert trained > summary["untrained"]["linear_probe"] + 0.03


def test_a_resumed_run_ends_as_an_unbroken_one(tiny_shapes, tmp_path):
    small_run(tiny_shapes, tmp_path / "unbroken")
    with killed_at(moco, "info_nce", 5):  # of three an epoch: a checkpoint is there
        small_run(tiny_shapes, tmp_path / "run")
    moco.main(moco.parse_args(["--resume", str(tmp_path / "run")]))
    states = [load(tmp_path / name / "checkpoint.pt")["model"] for name in ("run", "unbroken")]
    assert "queue" in states[0]
    assert_same(*states)
    assert records(tmp_path / "run") == records(tmp_path / "unbroken")


BAD = [
    (["--queue-size", "4097"], "--queue-size 4097: must be at most the 4096 images; beyond that"),
    (
        ["--batch-size", "63"],
        "--batch-size 63: must be at most 4096, the number of images, and make",
    ),
    (
        ["--batch-size", "8", "--bn-groups", "8"],
        "the number of images, and make 8 --bn-groups of 2 or more",
    ),
    (["--batch-size", "4098"], "--batch-size 4098: must be at most 4096"),
    (["--ema-momentum", "1.1"], "--ema-momentum 1.1: must be from 0 to 1"),
    (["--momentum", "0.9"], "--momentum 0.9; did you mean --ema-momentum?"),
    (["--temperature", "0"], "--temperature 0.0: must be at least 0.01"),
    (["--labels", "10"], "unrecognized arguments: --labels 10"),
]


@pytest.mark.parametrize(("flags", "message"), BAD)
def test_bad_input_is_one_line(tmp_path, monkeypatch, error_of, flags, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(moco.run, *flags)
    assert list(tmp_path.iterdir()) == []


def test_groups_are_shared_equally(tiny_shapes, tmp_path, monkeypatch):
    data = common.load_dataset(str(tiny_shapes))
    monkeypatch.setattr(moco, "WORLD", 3)
    monkeypatch.setattr(moco, "load_data", lambda *_: data)
    with pytest.raises(common.UserError, match="--bn-groups 2: must be a multiple of 3, the num"):
        small_run(tiny_shapes, tmp_path / "run")


@pytest.mark.parametrize("flags", [[], ["cifar10"], ["cifar10", "--encoder", "small"]])
def test_recipes_make_whole_groups(flags):
    args = moco.parse_args(["--dataset", *flags] if flags else [])
    assert args.batch_size % args.bn_groups == 0
    assert args.batch_size >= 2 * args.bn_groups


def test_few_images_shrink_batch_and_queue(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (45, 80, 80, 3), dtype=np.uint8)
    arrays = {"train_images": images, "train_labels": np.arange(45) % 2}
    arrays |= {"test_images": images, "test_labels": np.arange(45) % 2}
    np.savez(tmp_path / "few.npz", **arrays)
    monkeypatch.setattr(moco, "pretrain", lambda *_: [])
    flags = ["--dataset", str(tmp_path / "few.npz"), "--out", str(tmp_path / "run")]
    args = moco.parse_args([*flags, "--encoder", "small", "--image-size", "96"])
    moco.main(args)
    assert (args.batch_size, args.queue_size) == (44, 11)
    assert (args.temperature, args.gray, args.blur) == (0.2, 0.2, 0.5)  # version 2


# ==================================================================================================
# Several processes
# ==================================================================================================


def both_compute_gradients():
    """Of half a batch in each process; batch norm in one has the groups of both."""
    args = moco.parse_args([*SMALL, "--queue-size", "20", "--batch-size", "8"])
    torch.manual_seed(0)
    model = moco.MoCo(args).double().train()
    torch.manual_seed(0)
    single = moco.MoCo(args).double().train()
    norms = [m for m in single.modules() if isinstance(m, moco.SplitBatchNorm)]
    assert {norm.groups for norm in norms} == {1}
    for norm in norms:
        norm.groups = 2

    generator = torch.Generator().manual_seed(1)
    x_q, x_k = torch.rand(2, 8, 3, 32, 32, generator=generator).double()
    mine = slice(4 * moco.RANK, 4 * moco.RANK + 4)
    network = nn.parallel.DistributedDataParallel(model)
    generator = torch.Generator().manual_seed(10 + moco.RANK)  # not the same in both
    query, keys = network(x_q[mine], x_k[mine], generator)
    key = F.normalize(keys[mine], dim=1)
    moco.info_nce(F.normalize(query, dim=1), key, model.queue, 0.2).backward()

    order = torch.randperm(8, generator=torch.Generator().manual_seed(10))  # process 0 decides
    key = single.key_encoder(x_k[order])[order.argsort()]
    torch.testing.assert_close(keys, key, rtol=1e-10, atol=1e-10)
    query = F.normalize(single.query_encoder(x_q), dim=1)
    moco.info_nce(query, F.normalize(key.detach(), dim=1), single.queue, 0.2).backward()
    pairs = zip(model.query_encoder.parameters(), single.query_encoder.parameters(), strict=True)
    for p, expected in pairs:
        torch.testing.assert_close(p.grad, expected.grad, rtol=1e-10, atol=1e-10)


def both_train(data, folder):
    both_compute_gradients()
    args = moco.parse_args(["--bn-groups", "2", "--queue-size", "20"])
    assert_a_step_of_both_is_one_of_all(moco, moco.training_step, moco.MoCo, args)
    train_and_resume(moco, words(data, folder), folder, "info_nce")


def test_two_processes_do_what_one_does(tiny_shapes, tmp_path, in_two_processes):
    printed = in_two_processes(both_train, tiny_shapes, tmp_path)
    assert_resumed_in_both(tmp_path, printed)
    assert "queue" in load(tmp_path / "unbroken-0.pt")
    assert json.loads((tmp_path / "run/summary.json").read_text())["method"] == "moco"
    assert (tmp_path / "run/encoder.pt").exists()
