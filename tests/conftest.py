"""What the tests of several scripts need."""

import contextlib
import copy
import functools
import importlib
import io
import json
import multiprocessing
import socket
import sys
import traceback
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import clip
import common
import moco
import simclr

SHAPES = functools.cache(common.shapes_dataset)


# ==================================================================================================
# Data
# ==================================================================================================


def save_shapes(path, train, test):
    """An .npz file with some of the shapes."""
    data = SHAPES()
    arrays = {}
    for split, count in (("train", train), ("test", test)):
        arrays[f"{split}_images"] = (
            getattr(data, f"{split}_images")[:count].permute(0, 2, 3, 1).numpy()
        )
        arrays[f"{split}_labels"] = getattr(data, f"{split}_labels")[:count].numpy()
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="session")
def few_shapes(tmp_path_factory):
    """Enough to run on."""
    return save_shapes(tmp_path_factory.mktemp("data") / "few.npz", 200, 50)


@pytest.fixture(scope="session")
def tiny_shapes(tmp_path_factory):
    """Three batches of 32."""
    return save_shapes(tmp_path_factory.mktemp("data") / "tiny.npz", 96, 30)


@pytest.fixture(scope="session")
def some_shapes(tmp_path_factory):
    """Enough to learn something from."""
    return save_shapes(tmp_path_factory.mktemp("data") / "some.npz", 1024, 1000)


@pytest.fixture
def shapes_once(monkeypatch):
    """Shapes are drawn once for all tests that ask for it, and not once a run."""
    monkeypatch.setattr(common, "shapes_dataset", SHAPES)


# ==================================================================================================
# Runs
# ==================================================================================================


def kept_by_random_state(build):
    """build_encoder of a script, whose small encoder is initialized once for each random state:
    that of the ResNet-18 it is cut out of takes as long as a few steps of training."""
    kept = {}

    def build_encoder(name, *options):
        if name != "small":
            return build(name, *options)
        key = str(options), bytes(torch.get_rng_state())
        if key not in kept:
            encoder, D = build(name, *options)
            kept[key] = copy.deepcopy(encoder), D, torch.get_rng_state()
        encoder, D, random_state = kept[key]
        torch.set_rng_state(random_state)
        return copy.deepcopy(encoder), D

    return build_encoder


@pytest.fixture(scope="session", autouse=True)
def encoders_once():
    with pytest.MonkeyPatch.context() as patch:
        for script in (simclr, moco, clip):
            patch.setattr(script, "build_encoder", kept_by_random_state(script.build_encoder))
        yield


LBFGS = torch.optim.LBFGS


def short_lbfgs(parameters, max_iter, **options):
    return LBFGS(parameters, max_iter=min(5, max_iter), **options)


@pytest.fixture(scope="session", autouse=True)
def short_probes():
    """Linear probes end after five iterations, since most tests only compare them. In all tests
    they would take more time than the training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "LBFGS", short_lbfgs)
        yield


@pytest.fixture
def whole_probes(monkeypatch):
    """Linear probes as they are, for tests of what they find."""
    monkeypatch.setattr(torch.optim, "LBFGS", LBFGS)


@pytest.fixture
def error_of(monkeypatch, capsys):
    """A function: the one line of the command line `run` about bad input; the exit code is 2."""

    def error(run, *words):
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            run()
        assert caught.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert ".py: error: " in line
        return line

    return error


# What a run leaves, but for figures; and one of simclr.py, of moco.py or of a relative of theirs.
FILES = {"args.json", "metrics.jsonl", "summary.json", "checkpoint.pt", "encoder.pt"}
FILES |= {"data.json", "untrained.pt"}
RESULTS = FILES | {"views.png", "neighbors.png"}


def load(path):
    return torch.load(path, weights_only=True)


def files(folder):
    return {path.name for path in folder.iterdir()} - {".lock"}


def records(folder):
    """metrics.jsonl, but for what differs from run to run."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def assert_same(a, b):
    """Equal trees of dicts and lists, tensors in them bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        for left, right in zip(a, b, strict=True):
            assert_same(left, right)
    elif torch.is_tensor(a):
        assert torch.equal(a, b)
    else:
        assert a == b


def spy(monkeypatch, module, name):
    """The arguments of every call of module.name from now on; the calls are made."""
    calls = []
    original = getattr(module, name)

    def recorded(*args, **options):
        calls.append(args)
        return original(*args, **options)

    monkeypatch.setattr(module, name, recorded)
    return calls


class Killed(BaseException):
    """What no code catches."""


@contextlib.contextmanager
def killed_at(module, name, call):
    """Within it, the call of module.name with this number kills the run; numbers begin at 1."""
    calls = []
    original = getattr(module, name)

    def counted(*args, **options):
        calls.append(args)
        if len(calls) == call:
            raise Killed
        return original(*args, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, name, counted)
        yield


def assert_ended_alike(run, unbroken, *keys):
    """Two runs have the same log and weights, and the same under these keys of the summary."""
    assert records(run) == records(unbroken)
    assert_same(*[load(folder / "checkpoint.pt")["model"] for folder in (run, unbroken)])
    assert_same(*[load(folder / "encoder.pt") for folder in (run, unbroken)])
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (run, unbroken)]
    for key in keys:
        assert summaries[0][key] == summaries[1][key]


# ==================================================================================================
# Two processes
# ==================================================================================================


@pytest.fixture(scope="session")
def in_two_processes():
    """A function: calls a function of a test file with some words in two processes, as torchrun
    would -> what each printed. They are started once, since importing PyTorch takes seconds."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    connections = []
    processes = []
    context = multiprocessing.get_context("spawn")
    for rank in range(2):
        ours, theirs = context.Pipe()
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "OMP_NUM_THREADS": 1}
        variables |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, str(value))
            process = context.Process(target=work, args=(theirs,), daemon=True)
            process.start()
        connections.append(ours)
        processes.append(process)

    def call(function, *words):
        for connection in connections:
            connection.send((function.__module__, function.__name__, list(map(str, words))))
        ended = []
        for connection in connections:
            assert connection.poll(timeout=120), "the two wait for each other"
            ended.append(connection.recv())
        errors = [error for _, error in ended if error]
        assert not errors, "\n".join(errors)
        return [printed for printed, _ in ended]

    yield call
    for process in processes:
        process.terminate()


def work(connection):
    """What each of the two does until the tests end: it calls what it is sent, and sends back what
    was printed, and the traceback if there is one."""
    warnings.simplefilter("error")
    torch.optim.LBFGS = short_lbfgs
    dist.init_process_group("gloo")
    while True:
        module, function, words = connection.recv()
        error = ""
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            try:
                getattr(importlib.import_module(module), function)(*words)
            except Exception:
                error = traceback.format_exc()
        connection.send((printed.getvalue(), error))


def train_and_keep(path, script, args, **parts):
    """A run in each of two processes -> summary.json of the run. Keeps the model in path-<rank>.pt,
    but for what may differ between them: batch norm's running statistics."""
    with pytest.MonkeyPatch.context() as patch:
        calls = spy(patch, script, "pretrain")
        orders = spy(patch, common, "epoch_order")
        summary = script.main(args, **parts)
    assert all(order[-2:] == (dist.get_rank(), 2) for order in orders)  # each has its own images
    state = calls[0][0].state_dict()
    kept = {k: x for k, x in state.items() if "running" not in k and "num_batches" not in k}
    torch.save(kept, f"{path}-{dist.get_rank()}.pt")
    return summary


def step_gradient(script, training_step, model, args, images):
    """Of a training step with images (N, 3, S, S), whose views are not random: all parameters', as
    one vector. Of both processes if the model is in DistributedDataParallel, else of this one."""
    single = not isinstance(model, nn.parallel.DistributedDataParallel)

    def views(x, *_):
        return torch.cat([x, x.flip(3)]) / 255

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "two_views", views)
        if single:
            patch.setattr(script, "WORLD", 1)
            patch.setattr(script, "RANK", 0)
        training_step(model, images, args, None, 0.5, lambda loss: loss.backward())
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def assert_a_step_of_both_is_one_of_all(script, training_step, Model, args):
    """Half of the images in each process, against all of them in one. Batch norm is as at test
    time, since it would have statistics of half of the images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (12, 3, 16, 16), generator=generator, dtype=torch.uint8)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = Model(args).eval()
        models.append(model.to(memory_format=torch.channels_last))
    network = nn.parallel.DistributedDataParallel(models[0])
    part = step_gradient(script, training_step, network, args, images[dist.get_rank() :: 2])
    whole = step_gradient(script, training_step, models[1], args, images)
    assert (part - whole).norm() < 1e-4 * whole.norm()


def train_and_resume(script, flags, folder, name):
    """In each of two processes: a run of two epochs of three steps; and the same once more, killed
    in the second epoch, at the fifth call of script.name, and resumed."""
    args = script.parse_args([*flags, "--device", "cpu", "--out", f"{folder}/run"])
    train_and_keep(f"{folder}/unbroken", script, args)
    args = script.parse_args([*flags, "--device", "cpu", "--out", f"{folder}/broken"])
    with killed_at(script, name, 5):
        script.main(args)
    args = script.parse_args(["--resume", f"{folder}/broken"])
    train_and_keep(f"{folder}/resumed", script, args)


def assert_same_in_both(path):
    """What train_and_keep has kept is equal in both processes."""
    assert_same(*[load(f"{path}-{rank}.pt") for rank in range(2)])


def assert_resumed_in_both(folder, printed):
    """What train_and_resume has left in the folder, and what the two processes have printed."""
    first, second = printed
    assert second == ""
    assert [first.count(f"epoch {epoch}/2") for epoch in (1, 2)] == [2, 2]
    for name in ("unbroken", "resumed"):
        assert_same_in_both(folder / name)
    assert_same(load(folder / "unbroken-0.pt"), load(folder / "resumed-0.pt"))
    assert records(folder / "run") == records(folder / "broken")
