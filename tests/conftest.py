"""What the tests of several scripts need."""

import numpy as np
import pytest

import common


@pytest.fixture(scope="session")
def few_shapes(tmp_path_factory):
    """An .npz file with 200 training and 50 test pictures."""
    data, path = common.load_dataset("shapes"), tmp_path_factory.mktemp("data") / "few.npz"
    arrays = {}
    for split, count in (("train", 200), ("test", 50)):
        arrays[f"{split}_images"] = getattr(data, f"{split}_images")[:count].permute(0, 2, 3, 1).numpy()
        arrays[f"{split}_labels"] = getattr(data, f"{split}_labels")[:count].numpy()
    np.savez(path, **arrays)
    return path
