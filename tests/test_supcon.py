"""supcon.py: the loss, that each image comes with its label, and whole runs."""

import functools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    RESULTS,
    assert_ended_alike,
    assert_same_in_both,
    files,
    killed_at,
    train_and_keep,
)
from PIL import Image

import simclr
from relatives import supcon

PARTS = {"training_step": supcon.training_step, "learn": supcon.learn}
RUN = functools.partial(simclr.run, supcon.Args, supcon.__doc__, **PARTS)


def arguments(*flags):
    return simclr.parse_args(list(map(str, flags)), supcon.Args, supcon.__doc__)


def words(data, out, *flags):
    """A run on a few shapes, in two short epochs."""
    small = ["--encoder", "small", "--epochs", "2", "--batch-size", "32"]
    return ["--dataset", str(data), *small, "--out", str(out), *map(str, flags)]


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_loss_is_the_papers_sum():
    z1, z2 = draw(2, 5, 4)
    labels = [0, 1, 0, 2, 1]
    z = [*z1, *z2]
    y = [*labels, *labels]

    def s(i, k):
        return math.exp(F.cosine_similarity(z[i], z[k], dim=0).item() / 0.3)

    total = 0
    for i in range(10):
        positives = [p for p in range(10) if p != i and y[p] == y[i]]
        others = sum(s(i, a) for a in range(10) if a != i)
        total -= sum(math.log(s(i, p) / others) for p in positives) / len(positives)
    loss = supcon.supcon_loss(z1, z2, torch.tensor(labels), 0.3)
    assert loss.item() == pytest.approx(total / 10)


def test_with_labels_that_all_differ_it_is_simclrs_loss():
    z1, z2 = draw(2, 6, 4).requires_grad_()
    ours = supcon.supcon_loss(z1, z2, torch.arange(6), 0.2)
    theirs = simclr.nt_xent(z1, z2, 0.2)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        *[torch.autograd.grad(x, z1, retain_graph=True) for x in (ours, theirs)]
    )


def test_the_loss_equals_the_authors_where_pytorch_metric_learning_is():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    z1, z2 = draw(2, 6, 4)
    labels = torch.tensor([0, 1, 0, 2, 1, 1])
    theirs = losses.SupConLoss(0.2)(torch.cat([z1, z2]), labels.repeat(2))
    torch.testing.assert_close(supcon.supcon_loss(z1, z2, labels, 0.2), theirs)


def colors(path, count):
    """Images of which all pixels are the number of the image; its label is that, modulo 5."""
    number = np.arange(count, dtype=np.uint8)
    images = np.broadcast_to(number[:, None, None, None], (count, 16, 16, 3))
    labels = number % 5
    np.savez(path, train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    return path


@pytest.mark.parametrize("batch_size", [8, 12])  # of 30 images: an incomplete last batch, or two
def test_each_image_comes_with_its_label(tmp_path, batch_size):
    seen = []

    def step(network, images, labels, args, generator, progress, update):
        assert torch.equal(images[:, 0, 0, 0] % 5, labels)
        seen.append(images[:, 0, 0, 0])
        update(sum(p.sum() for p in network.parameters()))
        return {"loss": torch.zeros(())}

    data = colors(tmp_path / "colors.npz", 30)
    flags = words(data, tmp_path / "run", "--batch-size", batch_size, "--epochs", 3)
    simclr.main(arguments(*flags), training_step=step, learn=supcon.learn)
    assert len(seen) == 3 * (30 // batch_size)
    assert not torch.equal(seen[0], seen[-1])


@pytest.fixture(scope="module")
def unbroken(tiny_shapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    simclr.main(arguments(*words(tiny_shapes, folder)), **PARTS)
    return folder


def test_a_run_is_simclrs(unbroken):
    assert files(unbroken) == RESULTS
    summary = json.loads((unbroken / "summary.json").read_text())
    assert summary["command"].startswith("python relatives/supcon.py --dataset ")
    assert {"knn", "linear_probe", "linear_probe_z"} <= summary["trained"].keys()


def test_a_resumed_run_ends_as_an_unbroken_one(unbroken, tiny_shapes, tmp_path):
    run = tmp_path / "run"
    with killed_at(simclr, "spread", 5):  # of three steps an epoch: a checkpoint is there
        simclr.main(arguments(*words(tiny_shapes, run)), **PARTS)
    simclr.main(arguments("--resume", run), **PARTS)
    assert_ended_alike(run, unbroken, "trained")


def test_images_without_labels_are_refused(tmp_path, error_of):
    for number in range(12):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / f"{number}.png")
    flags = words(tmp_path, tmp_path / "run", "--batch-size", 4, "--data-dir", tmp_path / "data")
    line = error_of(RUN, *flags)
    assert "every training image needs a label" in line


def both_train(data, folder):
    args = arguments(*words(data, f"{folder}/run", "--device", "cpu", "--epochs", 1))
    train_and_keep(f"{folder}/kept", simclr, args, **PARTS)


def test_two_processes_train_one_network(tiny_shapes, tmp_path, in_two_processes):
    in_two_processes(both_train, tiny_shapes, tmp_path)
    assert_same_in_both(tmp_path / "kept")
