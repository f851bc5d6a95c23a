"""siglip.py and slip.py: losses against the papers' formulas, steps, and whole runs."""

import copy
import functools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    FILES,
    SHAPES,
    assert_ended_alike,
    assert_same_in_both,
    files,
    killed_at,
    spy,
    train_and_keep,
)
from test_clip import part_of
from torch import nn

import clip
import common
import simclr
from relatives import siglip, slip

RESULTS = FILES | {"similarity.png", "retrieval.png"}
RELATIVES = {"siglip": siglip, "slip": slip}
PARTS = {
    "siglip": {"Model": siglip.SigLIP, "training_step": siglip.training_step},
    "slip": {"Model": slip.SLIP, "training_step": slip.training_step},
}


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """shapes are 240 training and 60 test images only."""
    data = part_of(SHAPES(), 240, 60)
    monkeypatch.setattr(common, "shapes_dataset", lambda: data)


def arguments(name, *flags):
    relative = RELATIVES[name]
    return clip.parse_args(list(map(str, flags)), relative.Args, relative.__doc__)


def words(out, *flags):
    """Two epochs."""
    small = ["--epochs", "2", "--batch-size", "32", "--eval-every", "1", "--text-width", "64"]
    return [*small, "--out", str(out), *map(str, flags)]


def small_model(name, *flags):
    torch.manual_seed(0)
    return PARTS[name]["Model"](arguments(name, "--text-width", 64, "--context", 8, *flags), 20)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pairs(N, S=32):
    """Images of N pairs, and tokens of their captions."""
    images = torch.randint(256, (N, 3, S, S), generator=generator(), dtype=torch.uint8)
    tokens = torch.randint(4, 20, (N, 8), generator=generator(1))
    tokens[:, 0] = 1
    tokens[:, 7] = 2
    return images, tokens


# ==================================================================================================
# SigLIP's loss
# ==================================================================================================


def test_siglip_loss_is_the_papers_sum():
    x, y = torch.randn(2, 5, 6, generator=generator(), dtype=torch.float64)
    total = 0
    for i in range(5):
        for j in range(5):
            logit = 7 * F.cosine_similarity(x[i], y[j], dim=0).item() - 3
            c = 1 if i == j else -1
            total -= math.log(1 / (1 + math.exp(-c * logit)))
    assert siglip.siglip_loss(x, y, 7, -3).item() == pytest.approx(total / 5)


def test_siglip_loss_equals_open_clips():
    losses = pytest.importorskip("open_clip.loss")
    x, y = F.normalize(torch.randn(2, 5, 6, generator=generator()), dim=2)
    scale = torch.tensor([9.0])
    bias = torch.tensor([-4.0])
    theirs = losses.SigLipLoss()(x, y, scale, bias)
    torch.testing.assert_close(siglip.siglip_loss(x, y, scale, bias), theirs)


def test_gradients_of_siglip_reach_features_scale_and_bias():
    x, y = torch.randn(2, 4, 3, generator=generator(), dtype=torch.float64)
    inputs = [x, y, torch.tensor([2.0]).double(), torch.tensor([-1.0]).double()]
    assert torch.autograd.gradcheck(siglip.siglip_loss, [t.requires_grad_() for t in inputs])


def test_siglip_begins_with_no_for_an_answer():
    model = small_model("siglip")
    images, tokens = pairs(6)
    x, y, scale, bias = model(images / 255, tokens)
    assert (scale.item(), bias.item()) == (pytest.approx(10), -10)
    only_pairs = siglip.siglip_loss(x, y, 0, bias)  # each at its no: ten nats for each image
    assert only_pairs.item() == pytest.approx(10 + 6 * math.log1p(math.exp(-10)), rel=1e-4)


# ==================================================================================================
# Steps
# ==================================================================================================


def stepped(name, *flags):
    """The losses that a step hands to update, and what it logs."""
    model = small_model(name, *flags)
    images, tokens = pairs(6)
    losses = []
    args = arguments(name, "--batch-size", 6, *flags)
    terms = RELATIVES[name].training_step(model, images, tokens, args, generator(2), losses.append)
    return losses, terms


def test_a_step_of_siglip_logs_loss_scale_and_bias():
    (loss,), terms = stepped("siglip")
    assert terms.keys() == {"loss", "logit_scale", "bias"}
    assert loss == terms["loss"]
    assert terms["bias"] == -10


def test_a_step_of_slip_adds_both_losses(monkeypatch):
    calls = spy(monkeypatch, simclr, "nt_xent")
    (loss,), terms = stepped("slip", "--ssl-weight", 0.5, "--temperature", 0.2)
    assert terms.keys() == {"loss", "clip", "ssl"}
    torch.testing.assert_close(loss, terms["clip"] + 0.5 * terms["ssl"])
    ((z1, z2, temperature),) = calls
    assert z1.shape == z2.shape == (6, 128)
    assert temperature == 0.2
    torch.testing.assert_close(terms["ssl"], simclr.nt_xent(z1, z2, 0.2))


def test_the_scale_of_slip_is_clamped():
    model = small_model("slip")
    model.log_scale.data.fill_(math.log(150))
    args = arguments("slip", "--batch-size", 6)
    slip.training_step(model, *pairs(6), args, generator(2), lambda loss: None)
    assert model.log_scale.exp().item() == pytest.approx(100)


@pytest.mark.parametrize("name", RELATIVES)
def test_every_parameter_gets_a_gradient(name):
    model = small_model(name)
    args = arguments(name, "--batch-size", 6)
    step = RELATIVES[name].training_step
    step(model, *pairs(6), args, generator(2), lambda loss: loss.backward())
    assert all(p.grad is not None for p in model.parameters())


# ==================================================================================================
# Runs
# ==================================================================================================


def test_a_run_is_clips_and_resumes(tmp_path):
    for name in RELATIVES:
        folder = tmp_path / name
        clip.main(arguments(name, *words(folder)), **PARTS[name])
        assert files(folder) == RESULTS
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["command"].startswith(f"python relatives/{name}.py --epochs 2")
        assert "text_to_image_r10" in summary["trained"]
        run = tmp_path / f"{name}-again"
        with killed_at(clip, "one_view", 9):  # of six steps an epoch
            clip.main(arguments(name, *words(run)), **PARTS[name])
        clip.main(arguments(name, "--resume", run), **PARTS[name])
        assert_ended_alike(run, folder, "trained", "best_epoch")


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("siglip", ["--query", "a star"], "unrecognized arguments: --query a star"),
        ("slip", ["--blur", "0.5"], "unrecognized arguments: --blur 0.5"),
        ("slip", ["--temperature", "0"], "--temperature 0.0: must be at least 0.01"),
        ("slip", ["--dataset", "nothing"], "relatives/slip.py: error: dataset nothing"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, error_of, name, flags, message):
    monkeypatch.chdir(tmp_path)
    relative = RELATIVES[name]
    run = functools.partial(clip.run, relative.Args, relative.__doc__, **PARTS[name])
    assert message in error_of(run, *flags)


# ==================================================================================================
# Two processes
# ==================================================================================================


def losses_of(name, outputs):
    """Of what a network returns for the pairs of this process."""
    x, y, scale, last = outputs
    x, y = clip.gather(x), clip.gather(y)
    if name == "siglip":
        return siglip.siglip_loss(x, y, scale, last)
    z1, z2 = map(clip.gather, last.chunk(2))
    return clip.clip_loss(x, y, scale) + simclr.nt_xent(z1, z2, 0.1)


def both_compute_gradients(name):
    model = small_model(name).double().eval()  # batch norm is not synchronized on CPUs
    whole = copy.deepcopy(model)
    network = nn.parallel.DistributedDataParallel(model)
    images, tokens = pairs(6)
    views = torch.rand(2, 6, 3, 32, 32, generator=generator(3)).double()
    order = [0, 2, 4, 1, 3, 5]  # as gather puts them together

    def outputs(network, rows):
        more = [views[:, rows].flatten(0, 1)] if name == "slip" else []
        return network(images[rows].double() / 255, tokens[rows], *more)

    losses_of(name, outputs(network, order[3 * clip.RANK :][:3])).backward()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip, "WORLD", 1)
        losses_of(name, outputs(whole, order)).backward()
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-10)


def both_train(folder):
    data = part_of(SHAPES(), 130, 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "shapes_dataset", lambda: data)
        for name in RELATIVES:
            both_compute_gradients(name)
            args = arguments(name, *words(f"{folder}/run-{name}", "--device", "cpu"))
            train_and_keep(f"{folder}/{name}", clip, args, **PARTS[name])


def test_two_processes_do_what_one_does(tmp_path, in_two_processes):
    in_two_processes(both_train, tmp_path)
    for name in RELATIVES:
        assert_same_in_both(tmp_path / name)
