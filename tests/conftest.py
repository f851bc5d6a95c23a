"""What the tests of several scripts need."""

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import common

SHAPES = functools.cache(common.shapes_dataset)


def save_shapes(path, train, test):
    """An .npz file with some of the shapes."""
    data, arrays = SHAPES(), {}
    for split, count in (("train", train), ("test", test)):
        arrays[f"{split}_images"] = getattr(data, f"{split}_images")[:count].permute(0, 2, 3, 1).numpy()
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


SMALL = "--encoder", "small", "--device", "cpu", "--epochs", "2"


@pytest.fixture(scope="session")
def two_processes(tiny_shapes, tmp_path_factory):
    """The folder of two processes that have trained, and resumed, with the scripts; and what each printed."""
    folder, commands = tmp_path_factory.mktemp("processes"), {}
    own = {"simclr": [], "moco": ["--queue-size", "64", "--bn-groups", "2"], "rotnet": ["--classifier-epochs", "1"]}
    own["clip"] = ["--dataset", "shapes"]  # of which processes.py takes a few
    own |= {"dino": [], "mae": []}
    for name, flags in own.items():
        run = str(folder / name)
        words = ["--dataset", str(tiny_shapes), *SMALL, "--batch-size", "32", *flags, "--out", run]
        commands[name] = "", words, ["--resume", run, "--epochs", "3"]
    for name, parent in (("byol", "simclr"), ("swav", "simclr"), ("simmim", "mae"), ("jigsaw", "rotnet"),
                         ("inpainting", "rotnet")):  # fmt: skip
        words = ["--dataset", str(tiny_shapes), *SMALL[:4], "--epochs", "1", "--batch-size", "32", "--out"]
        commands[name] = parent, [*words, str(folder / name), *own["rotnet" if parent == "rotnet" else "simclr"]]
    (folder / "commands.json").write_text(json.dumps(commands))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(2):
        torchrun = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="localhost", MASTER_PORT=port)
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in torchrun.items()}
        command = [sys.executable, "-W", "error", Path(__file__).parent / "processes.py", folder]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(subprocess.Popen(command, env=environment, **pipes))
    printed = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], printed
    return folder, printed


@pytest.fixture
def shapes_once(monkeypatch):
    """Shapes are drawn once for all tests that ask for it, and not once a run."""
    monkeypatch.setattr(common, "shapes_dataset", SHAPES)
