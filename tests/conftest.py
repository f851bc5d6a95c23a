"""What the tests of several scripts need."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import common


def save_shapes(path, train, test):
    """An .npz file with some of the shapes."""
    data, arrays = common.load_dataset("shapes"), {}
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
def some_shapes(tmp_path_factory):
    """Enough to learn something from."""
    return save_shapes(tmp_path_factory.mktemp("data") / "some.npz", 1024, 1000)


@pytest.fixture
def two_processes(tmp_path):
    """Runs tests/processes.py twice, as torchrun would -> its folder and what both have printed."""

    def run(method, words):
        (tmp_path / "words.json").write_text(json.dumps([str(word) for word in words]))
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        started = []
        for rank in range(2):
            torchrun = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": 2,
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": port,
            }
            environment = os.environ | {"OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in torchrun.items()}
            command = [sys.executable, "-W", "error", Path(__file__).parent / "processes.py", method, tmp_path]
            pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            started.append(subprocess.Popen(command, env=environment, **pipes))
        printed = [process.communicate(timeout=120)[0] for process in started]
        assert [process.returncode for process in started] == [0, 0], printed
        return tmp_path, printed

    return run
