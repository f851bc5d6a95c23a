"""ibot.py: masks, losses, targets, what the student sees, and whole runs."""

import copy
import functools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    assert_ended_alike,
    assert_same_in_both,
    files,
    killed_at,
    load,
    spy,
    train_and_keep,
)
from test_dino import RESULTS, empty_maps, words
from torch import nn

import dino
from relatives import ibot

PARTS = {"Model": ibot.IBOT, "training_step": ibot.training_step}


def arguments(*flags):
    return dino.parse_args(list(map(str, flags)), ibot.Args, ibot.__doc__)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def small_model(*flags):
    torch.manual_seed(0)
    return ibot.IBOT(arguments("--encoder", "small", *flags))


# ==================================================================================================
# Parts of the loss
# ==================================================================================================


@pytest.mark.parametrize(("ratio", "count"), [(0.01, 1), (0.3, 5), (0.5, 8)])
def test_a_fraction_of_the_patches_of_each_image_is_masked(ratio, count):
    mask = ibot.random_mask(200, 16, ratio, generator(), "cpu")
    assert mask.sum(1).unique().tolist() == [count]
    assert mask.float().mean(0).sub(count / 16).abs().max() < 0.15  # none is preferred


def test_targets_are_centered_and_sharpened():
    logits = draw(4, 6)
    center = draw(6, seed=1)
    targets = ibot.make_targets(logits, center, 0.2, balanced=False)
    for n in range(4):
        e = [math.exp((logits[n, k] - center[k]) / 0.2) for k in range(6)]
        torch.testing.assert_close(targets[n].tolist(), [x / sum(e) for x in e])


@pytest.mark.parametrize("balanced", [False, True])
def test_targets_get_no_gradient(balanced):
    logits = draw(4, 6).requires_grad_()
    assert not ibot.make_targets(logits, torch.zeros(6), 0.2, balanced).requires_grad


def test_balanced_targets_use_all_logits_alike():
    logits = F.normalize(draw(12, 3), dim=1)
    targets = ibot.make_targets(logits, torch.zeros(3), 0.5, balanced=True)
    torch.testing.assert_close(targets.sum(1), torch.ones(12).double())
    assert targets.sum(0).sub(4).abs().max() < 0.2


def test_koleo_is_the_mean_log_distance_to_the_nearest():
    x = draw(7, 4)
    unit = [v / v.norm() for v in x]
    nearest = [min((unit[n] - unit[m]).norm().item() for m in range(7) if m != n) for n in range(7)]
    expected = -sum(map(math.log, nearest)) / 7
    assert ibot.koleo_loss(x).item() == pytest.approx(expected, rel=1e-6)


def test_koleo_equals_lightlys():
    losses = pytest.importorskip("lightly.loss")
    if not hasattr(losses, "KoLeoLoss"):
        pytest.skip("this version has none")
    x = draw(7, 4).float()
    torch.testing.assert_close(ibot.koleo_loss(x), losses.KoLeoLoss()(x), rtol=1e-4, atol=1e-5)


# ==================================================================================================
# Networks
# ==================================================================================================


def test_the_student_sees_no_pixel_of_masked_patches():
    model = small_model("--encoder", "small").eval()
    views = torch.rand(4, 3, 32, 32, generator=generator())
    mask = ibot.random_mask(4, 16, 0.5, generator(1), "cpu")
    patches = model.student.encoder.embed(views)
    changed = torch.where(mask[:, :, None], 7.0, patches)
    with pytest.MonkeyPatch.context() as patch:
        outputs = []
        for x in (patches, changed):
            patch.setattr(model.student.encoder, "embed", lambda _, x=x: x)
            tokens, student, teacher, student_patches, _ = model(mask, views)
            outputs.append((tokens, student, student_patches))
        for one, other in zip(*outputs, strict=True):
            assert torch.equal(one, other)
    assert tokens.shape == (4, 96)
    assert student.shape == teacher.shape == (4, 256)
    assert student_patches.shape == (32, 256)


def test_the_teacher_sees_all_patches():
    model = small_model().eval()
    views = torch.rand(4, 3, 32, 32, generator=generator())
    mask = ibot.random_mask(4, 16, 0.5, generator(1), "cpu")
    _, _, teacher, _, teacher_patches = model(mask, views)
    tokens = model.teacher.encoder.tokens(views)
    torch.testing.assert_close(teacher, model.teacher.head(tokens[:, 0]))
    torch.testing.assert_close(teacher_patches, model.teacher.head(tokens[:, 1:][mask]))


def test_both_networks_have_the_same_parameters():
    model = small_model()
    names = [dict(network.named_parameters()).keys() for network in (model.student, model.teacher)]
    assert names[0] == names[1]
    assert "mask_token" in names[0]
    assert model.student.mask_token.requires_grad and not model.teacher.mask_token.requires_grad
    assert "mask_token" not in model.teacher.encoder.state_dict()  # encoder.pt is DINO's


# ==================================================================================================
# Steps
# ==================================================================================================


class Fixed(nn.Module):
    """A network whose outputs are given, for three images, three views and five masked patches."""

    def __init__(self):
        super().__init__()
        self.outputs = draw(9, 4), draw(9, 6, seed=1), draw(6, 6, seed=2)
        self.outputs += draw(5, 6, seed=3), draw(5, 6, seed=4)
        self.student = dino.Network(arguments("--encoder", "small"), 32)
        self.teacher = copy.deepcopy(self.student)
        self.center = draw(6, seed=5).float()
        self.patch_center = draw(6, seed=6).float()

    def forward(self, mask, *views):
        self.mask = mask
        return self.outputs


def stepped(*flags):
    network = Fixed()
    centers = network.center, network.patch_center
    images = torch.randint(256, (3, 3, 32, 32), generator=generator(), dtype=torch.uint8)
    args = arguments("--encoder", "small", "--teacher-temperature", 0.07, *flags)
    losses = []
    terms = ibot.training_step(
        network, images, args, generator(), 0.5, lambda loss, progress: losses.append(loss)
    )
    return network, centers, losses, terms


def test_a_step_adds_dinos_loss_and_that_of_patches():
    network, (center, patch_center), losses, terms = stepped()
    _, student, teacher, student_patches, teacher_patches = (x.float() for x in network.outputs)
    of_class = dino.dino_loss(
        student.unflatten(0, (3, 3)), teacher.unflatten(0, (2, 3)), center, 0.1, 0.07
    )
    torch.testing.assert_close(terms["class_loss"], of_class)
    P = ((teacher_patches - patch_center) / 0.07).softmax(1)
    of_patches = -(P * (student_patches / 0.1).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(terms["patch_loss"], of_patches)
    assert losses == [terms["loss"]]
    torch.testing.assert_close(losses[0], of_class + of_patches)
    entropies = dino.target_entropies(teacher.unflatten(0, (2, 3)), center, 0.07)
    torch.testing.assert_close((terms["entropy"], terms["entropy_of_mean"]), entropies)
    torch.testing.assert_close(network.center, 0.9 * center + 0.1 * teacher.mean(0))
    mean = teacher_patches.mean(0)
    torch.testing.assert_close(network.patch_center, 0.9 * patch_center + 0.1 * mean)


def test_koleo_is_of_both_global_views():
    network, _, losses, terms = stepped("--koleo", 0.5)
    first, second, _ = network.outputs[0].float().split(3)
    added = 0.5 * (ibot.koleo_loss(first) + ibot.koleo_loss(second))
    torch.testing.assert_close(losses[0], terms["class_loss"] + terms["patch_loss"] + added)


def test_sinkhorn_takes_the_place_of_the_centers(monkeypatch):
    calls = spy(monkeypatch, ibot, "sinkhorn")
    network, _, _, _ = stepped("--sinkhorn")
    teacher, patches = network.outputs[2].float(), network.outputs[4].float()
    assert [len(logits) for logits, _ in calls] == [6, 5]
    assert torch.equal(calls[0][0], teacher) and torch.equal(calls[1][0], patches)
    assert {temperature for _, temperature in calls} == {0.07}


# ==================================================================================================
# Runs
# ==================================================================================================


@pytest.fixture(scope="module")
def unbroken(tiny_shapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    with empty_maps():
        dino.main(arguments(*words(tiny_shapes, folder, "--koleo", 0.1)), **PARTS)
    return folder


def test_a_run_is_dinos(unbroken):
    assert files(unbroken) == RESULTS
    summary = json.loads((unbroken / "summary.json").read_text())
    assert summary["command"].startswith("python relatives/ibot.py --dataset ")
    assert {"class_loss", "patch_loss", "rank", "knn"} <= summary["history"][-1].keys()
    args = dino.parse_args(["--encoder", "small"])
    encoder = dino.Network(args, 32).encoder
    encoder.load_state_dict(load(unbroken / "encoder.pt"))  # so dino.py --show can draw it


def test_a_resumed_run_ends_as_an_unbroken_one(unbroken, tiny_shapes, tmp_path):
    run = tmp_path / "run"
    with empty_maps():
        with killed_at(ibot, "koleo_loss", 9):  # two in each of three steps an epoch
            dino.main(arguments(*words(tiny_shapes, run, "--koleo", 0.1)), **PARTS)
        dino.main(arguments("--resume", run), **PARTS)
    assert_ended_alike(run, unbroken, "trained")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--show", "x.png"], "unrecognized arguments: --show x.png"),
        (["--mask-ratio", "1"], "--mask-ratio 1.0: must be from 0.01 to 0.99"),
        (["--koleo", "-1"], "--koleo -1.0: must be at least 0"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, error_of, flags, message):
    monkeypatch.chdir(tmp_path)
    run = functools.partial(dino.run, ibot.Args, ibot.__doc__, **PARTS)
    assert message in error_of(run, *flags)


def both_train(data, folder):
    args = arguments(*words(data, f"{folder}/run", "--device", "cpu"))
    with empty_maps():
        train_and_keep(f"{folder}/kept", dino, args, **PARTS)


def test_two_processes_train_one_network(tiny_shapes, tmp_path, in_two_processes):
    in_two_processes(both_train, tiny_shapes, tmp_path)
    assert_same_in_both(tmp_path / "kept")
