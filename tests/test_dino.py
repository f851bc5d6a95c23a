"""dino.py: loss, center, teacher and student, views, official names, figures, and whole runs."""

import contextlib
import copy
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from conftest import (
    FILES,
    assert_ended_alike,
    assert_resumed_in_both,
    assert_same,
    files,
    killed_at,
    load,
    records,
    spy,
    train_and_resume,
)
from PIL import Image
from torch import nn

import common
import dino

pytestmark = pytest.mark.usefixtures("shapes_once")
FIGURES = {"views.png", "attention.png", "attention-untrained.png", "pca.png", "pca-untrained.png"}
RESULTS = FILES | FIGURES


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def logits(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def words(data, out, *flags):
    """A run on a few shapes: two epochs, two global and two local views."""
    small = ["--encoder", "small", "--epochs", "2", "--batch-size", "32", "--eval-every", "1"]
    small += ["--local-views", "2", "--local-crop", "0.2"]
    return ["--dataset", str(data), *small, "--out", str(out), *map(str, flags)]


def small_run(data, out, *flags):
    return dino.main(dino.parse_args(words(data, out, *flags)))


@contextlib.contextmanager
def empty_maps():
    """Within it attention and parts are not computed, which takes longer than a short run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            dino, "attention_maps", lambda _, images: torch.zeros(3, len(images), 3, 128, 128)
        )
        patch.setattr(dino, "part_maps", lambda _, images: torch.zeros(len(images), 3, 128, 128))
        yield


@pytest.fixture
def without_maps():
    with empty_maps():
        yield


def resumed(run, *flags):
    return dino.main(dino.parse_args(["--resume", str(run), *map(str, flags)]))


@pytest.fixture(scope="module")
def unbroken(tiny_shapes, tmp_path_factory):
    """The folder of a run that nothing has stopped. It is read only."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    small_run(tiny_shapes, folder)
    return folder


# ==================================================================================================
# Loss
# ==================================================================================================


def test_the_loss_is_that_of_a_loop_over_views():
    V, N, K = 5, 3, 7
    student = logits(V, N, K)
    teacher = logits(2, N, K, seed=1)
    center = logits(K, seed=2)
    total = 0.0
    pairs = 0
    for i in range(2):
        for j in range(V):
            if i == j:
                continue
            pairs += 1
            for n in range(N):
                t = [math.exp((teacher[i, n, k] - center[k]) / 0.04) for k in range(K)]
                s = [math.exp(student[j, n, k] / 0.1) for k in range(K)]
                for k in range(K):
                    total -= t[k] / sum(t) * math.log(s[k] / sum(s)) / N
    assert pairs == 2 * V - 2
    loss = dino.dino_loss(student, teacher, center, 0.1, 0.04)
    assert loss.item() == pytest.approx(total / pairs, rel=1e-4)


def test_for_two_views_the_loss_is_the_papers_pseudocode():
    s1, s2 = logits(2, 4, 6)
    t1, t2 = logits(2, 4, 6, seed=1)
    C = logits(6, seed=2)

    def H(t, s):
        s = torch.softmax(s / 0.1, dim=1)
        t = torch.softmax((t - C) / 0.04, dim=1)
        return -(t * torch.log(s)).sum(dim=1).mean()

    loss = dino.dino_loss(torch.stack([s1, s2]), torch.stack([t1, t2]), C, 0.1, 0.04)
    assert loss.item() == pytest.approx((H(t1, s2) / 2 + H(t2, s1) / 2).item(), rel=1e-4)


def test_equal_logits_cost_log_K():
    loss = dino.dino_loss(torch.zeros(4, 3, 8), torch.zeros(2, 3, 8), torch.zeros(8), 0.1, 0.04)
    assert loss.item() == pytest.approx(math.log(8))


def test_gradients_reach_every_students_view_and_no_teacher():
    student = logits(4, 3, 8).requires_grad_()
    teacher = logits(2, 3, 8, seed=1).requires_grad_()
    dino.dino_loss(student, teacher, torch.zeros(8), 0.1, 0.04).backward()
    assert teacher.grad is None
    assert (student.grad.abs().sum((1, 2)) > 0).all()


def one_hot(N, K):
    return torch.eye(K)[0].expand(2, N, K)


@pytest.mark.parametrize(
    ("teacher", "loss", "entropy", "entropy_of_mean"),
    [
        (torch.eye(8).expand(2, 8, 8), 0, 0, math.log(8)),  # healthy: another class for each image
        (one_hot(8, 8), 0, 0, 0),
        (torch.zeros(2, 8, 8), math.log(8), math.log(8), math.log(8)),
    ],
)
def test_loss_and_entropies_of_collapses(teacher, loss, entropy, entropy_of_mean):
    """Of a student that agrees: the loss is low in one collapse only, the difference in both."""
    center = torch.zeros(8)
    entropies = dino.target_entropies(teacher, center, 0.01)
    assert [x.item() for x in entropies] == pytest.approx((entropy, entropy_of_mean), abs=1e-5)
    found = dino.dino_loss(teacher, teacher, center, 0.01, 0.01)
    assert found.item() == pytest.approx(loss, abs=1e-5)


def test_centering_makes_equal_one_hot_targets_uniform():
    teacher = one_hot(8, 8)
    center = dino.update_center(torch.zeros(8), teacher, 0.0)
    entropies = dino.target_entropies(teacher, center, 0.01)
    assert [x.item() for x in entropies] == pytest.approx([math.log(8)] * 2)


# ==================================================================================================
# Teacher and student
# ==================================================================================================


def small_model():
    torch.manual_seed(0)
    return dino.DINO(dino.parse_args(["--encoder", "small"]))


def test_the_center_is_a_moving_mean_of_the_teachers_logits():
    teacher = logits(2, 5, 4)
    center = logits(4, seed=1)
    mean = (teacher[0].sum(0) + teacher[1].sum(0)) / 10
    for momentum in (0.9, 0.0):
        expected = momentum * center + (1 - momentum) * mean
        torch.testing.assert_close(dino.update_center(center, teacher, momentum), expected)
    assert torch.equal(dino.update_center(center, teacher, 1.0), center)


def test_student_and_teacher_begin_equal():
    model = small_model()
    assert_same(dict(model.student.state_dict()), dict(model.teacher.state_dict()))
    assert not any(p.requires_grad for p in model.teacher.parameters())


def test_the_teacher_is_a_moving_average_of_the_student():
    model = small_model()
    with torch.no_grad():
        for p in model.student.parameters():
            p += torch.randn(p.shape, generator=generator(1))
    before = [p.clone() for p in model.teacher.parameters()]
    dino.update_teacher(model.teacher, model.student, 0.9)
    students = model.student.parameters()
    for old, t, s in zip(before, model.teacher.parameters(), students, strict=True):
        torch.testing.assert_close(t, 0.9 * old + 0.1 * s, atol=1e-6, rtol=1e-5)


def test_logits_are_cosines_with_directions():
    student = small_model().student.eval()
    images = torch.rand(64, 3, 32, 32)
    before = student(images)
    student.last_layer.weight.data *= 7
    student.mlp[-1].weight.data *= 3
    assert before.shape == (64, 256)
    assert before.abs().max() <= 1 + 1e-5
    torch.testing.assert_close(student(images), before, atol=1e-5, rtol=1e-5)


def test_the_head_reads_the_class_token():
    student = small_model().student.eval()
    images = torch.rand(5, 3, 32, 32)
    z = student.mlp(student.encoder(images)[:, :96])
    directions = student.last_layer.weight
    expected = nn.functional.cosine_similarity(z[:, None], directions[None], dim=2)
    torch.testing.assert_close(student(images), expected, atol=1e-5, rtol=1e-5)


def test_the_student_sees_all_views_the_teacher_global_ones():
    model = small_model().eval()
    large = torch.rand(4, 3, 32, 32)
    local = torch.rand(6, 3, 16, 16)
    student_logits, teacher_logits = model(large, local)
    expected = torch.cat([model.student(large), model.student(local)])
    torch.testing.assert_close(student_logits, expected)
    torch.testing.assert_close(teacher_logits, model.teacher(large))


def test_a_cosine_leads_from_start_to_end():
    assert dino.cosine(0.996, 1.0, 0.0) == pytest.approx(0.996)
    assert dino.cosine(0.996, 1.0, 1.0) == pytest.approx(1.0)
    assert dino.cosine(0.04, 0.4, 0.5) == pytest.approx(0.22)
    assert dino.cosine(0.04, 0.4, 0.25) < 0.13


def test_only_the_students_matrices_decay():
    model = small_model()
    args = dino.parse_args(["--lr", "0.1"])
    optimizer, _ = dino.make_optimizer(model, args, 512, 100)
    decay = {}
    for group in optimizer.param_groups:
        decay |= dict.fromkeys(group["params"], group["weight_decay"])
    assert decay == {p: 0.04 if p.ndim > 1 else 0.0 for p in model.student.parameters()}


def test_the_learning_rate_rises_and_falls_to_zero():
    args = dino.parse_args(["--warmup", "0.1", "--lr", "0.1"])
    optimizer, schedule = dino.make_optimizer(small_model(), args, 512, 100)
    rates = []
    for _ in range(102):
        rates.append(optimizer.param_groups[1]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:11] == pytest.approx([0.2 * (n + 1) / 11 for n in range(11)])  # for 2 x 256
    assert rates[55] == pytest.approx(0.1)
    assert rates[100:] == pytest.approx([0, 0])


# ==================================================================================================
# A training step
# ==================================================================================================


def updated(progress, scale=1.0):
    """A model of four epochs after one update, and its student's weights before it."""
    args = dino.parse_args(["--encoder", "small", "--epochs", "4"])
    model = small_model()
    before = copy.deepcopy(model.student.state_dict())
    update, state = dino.make_update(model, args, 64, 40)
    student_logits = model.student(torch.rand(8, 3, 32, 32, generator=generator()))
    update(scale * student_logits.square().mean(), progress)
    return model, before, state["optimizer"]


@pytest.mark.parametrize(("progress", "moves"), [(0.0, False), (0.24, False), (0.25, True)])
def test_the_last_layer_waits_for_an_epoch(progress, moves):
    model, before, _ = updated(progress)
    student = model.student.state_dict()
    assert torch.equal(student["last_layer.weight"], before["last_layer.weight"]) != moves
    assert not torch.equal(student["mlp.0.weight"], before["mlp.0.weight"])
    assert not torch.equal(student["encoder.cls_token"], before["encoder.cls_token"])


def test_the_norm_of_the_gradient_is_clipped():
    def norm(model):
        return nn.utils.get_total_norm([p.grad for p in model.student.parameters()])

    free, _, _ = updated(0.5, scale=1.0)
    assert norm(free) < 3
    clipped, _, _ = updated(0.5, scale=1e4)
    assert norm(clipped).item() == pytest.approx(3, rel=1e-3)


@pytest.mark.parametrize("progress", [0.0, 0.5, 0.9])
def test_weight_decay_follows_the_progress(progress):
    _, _, optimizer = updated(progress)
    expected = dino.cosine(0.04, 0.4, progress)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [expected, 0.0]


def stepped(*flags, progress=0.5):
    """What a training step logs and, in the order of their calls, what it has handed on."""
    torch.manual_seed(0)
    args = dino.parse_args(["--encoder", "small", *flags])
    model = dino.DINO(args)
    images = torch.randint(256, (6, 3, 32, 32), generator=generator(), dtype=torch.uint8)
    updates = []
    with pytest.MonkeyPatch.context() as patch:
        losses = spy(patch, dino, "dino_loss")
        teachers = spy(patch, dino, "update_teacher")
        terms = dino.training_step(
            model, images, args, generator(), progress, lambda *values: updates.append(values)
        )
    return model, terms, losses, teachers, updates


def test_a_step_compares_all_views_with_the_teachers_two():
    model, terms, ((student_logits, teacher_logits, *_),), _, updates = stepped(
        "--local-views", "3", "--local-crop", "0.2"
    )
    assert student_logits.shape == (5, 6, 256)
    assert teacher_logits.shape == (2, 6, 256)
    assert not teacher_logits.requires_grad
    assert updates == [(terms["loss"], 0.5)]
    expected = dino.update_center(torch.zeros(256), teacher_logits, 0.9)
    assert torch.equal(model.center, expected)


def test_a_step_logs_loss_entropies_and_divergence():
    _, terms, _, _, _ = stepped()
    assert terms.keys() == {"loss", "entropy", "entropy_of_mean", "kl"}
    assert terms["loss"].item() == pytest.approx(terms["entropy"].item() + terms["kl"].item())
    assert terms["kl"] > 0
    assert 0 <= terms["entropy"] <= terms["entropy_of_mean"] <= math.log(256)


@pytest.mark.parametrize(("progress", "tau_t"), [(0.0, 0.02), (0.15, 0.05), (0.3, 0.08), (1, 0.08)])
def test_the_teachers_temperature_rises(progress, tau_t):
    flags = "--teacher-temperature-start", "0.02", "--teacher-temperature", "0.08"
    _, _, ((*_, tau_s, found),), _, _ = stepped(*flags, progress=progress)
    assert tau_s == 0.1
    assert found == pytest.approx(tau_t)


@pytest.mark.parametrize("progress", [0.0, 0.4])
def test_the_teachers_momentum_rises(progress):
    _, _, _, ((_, _, momentum),), _ = stepped("--ema-momentum", "0.9", progress=progress)
    assert momentum == pytest.approx(dino.cosine(0.9, 1.0, progress))


def test_without_centering_the_center_stays_zero():
    model, _, _, _, _ = stepped("--no-centering")
    assert (model.center == 0).all()


# ==================================================================================================
# Views
# ==================================================================================================


def test_multi_crop_makes_large_and_small_views():
    args = dino.parse_args(["--local-views", "3", "--dataset", "cifar10"])
    images = (255 * torch.rand(5, 3, 32, 32, generator=generator())).byte()
    large, small = dino.multi_crop(images, args, generator())
    assert large.shape == (10, 3, 32, 32)
    assert small.shape == (15, 3, 16, 16)
    for x in (large, small):
        assert 0 <= x.min() < x.max() <= 1
    assert not torch.equal(large[:5], large[5:])
    assert not torch.equal(small[:5], small[5:10])
    args.local_views = 0
    assert len(dino.multi_crop(images, args, generator())) == 1


@pytest.mark.parametrize(("S", "p", "half"), [(32, 4, 16), (36, 4, 16), (96, 8, 48), (32, 32, 32)])
def test_local_views_are_whole_patches(S, p, half):
    args = dino.parse_args(["--local-views", "1", "--patch-size", str(p)])
    images = torch.zeros(2, 3, S, S, dtype=torch.uint8)
    _, small = dino.multi_crop(images, args, generator())
    assert small.shape == (2, 3, half, half)


def drawn(monkeypatch, S):
    """Calls of the augmentations of four images, by name: the number of images, and the rest."""
    seen = {}
    for name in ("resized_crop", "gaussian_blur", "solarize", "grayscale"):
        calls = seen[name] = []

        def record(x, *values, calls=calls, **options):
            calls.append((len(x), *values[:1], *options.values(), *values[2:]))
            return x

        def record_last(x, *values, calls=calls, **options):
            calls.append((len(x), *values[1:], *options.values()))
            return x

        spied = record if name == "resized_crop" else record_last
        monkeypatch.setattr(common, f"random_{name}", spied)
    flags = ["--crop", "0.5", "--local-crop", "0.1", "--local-views", "2"]
    args = dino.parse_args([*flags, "--solarize", "0.2", "--gray", "0.3"])
    dino.multi_crop(torch.zeros(4, 3, S, S, dtype=torch.uint8), args, generator())
    return seen


@pytest.mark.parametrize("S", [32, 96])
def test_every_kind_of_view_has_its_augmentations(monkeypatch, S):
    seen = drawn(monkeypatch, S)
    large = (4, S, (0.5, 1.0))
    assert seen["resized_crop"] == [large, large, (8, S // 2, (0.1, 0.5))]
    assert seen["grayscale"] == [(4, 0.3), (4, 0.3), (8, 0.3)]
    assert seen["solarize"] == [(4, 0.2)]
    assert seen["gaussian_blur"] == ([(4, 1.0), (4, 0.1), (8, 0.5)] if S > 64 else [])


# ==================================================================================================
# Official names
# ==================================================================================================


def official_block(name, D):
    """Names and shapes of a block of width D in the authors' code and in timm."""
    shapes = {
        "norm1.weight": (D,), "norm1.bias": (D,),
        "attn.qkv.weight": (3 * D, D), "attn.qkv.bias": (3 * D,),
        "attn.proj.weight": (D, D), "attn.proj.bias": (D,),
        "norm2.weight": (D,), "norm2.bias": (D,),
        "mlp.fc1.weight": (4 * D, D), "mlp.fc1.bias": (4 * D,),
        "mlp.fc2.weight": (D, 4 * D), "mlp.fc2.bias": (D,),
    }  # fmt: skip
    return {f"{name}.{inner}": shape for inner, shape in shapes.items()}


def official(D, blocks, patch, tokens):
    """dino_deitsmall16_pretrain.pth and its siblings."""
    shapes = {
        "cls_token": (1, 1, D), "pos_embed": (1, tokens, D),
        "patch_embed.proj.weight": (D, 3, patch, patch), "patch_embed.proj.bias": (D,),
        "norm.weight": (D,), "norm.bias": (D,),
    }  # fmt: skip
    for i in range(blocks):
        shapes |= official_block(f"blocks.{i}", D)
    return shapes


@pytest.mark.parametrize(
    ("name", "patch", "D"), [("vit_small", 16, 384), ("vit_small", 8, 384), ("vit_base", 16, 768)]
)
def test_official_weights_load_strictly(name, patch, D):
    shapes = official(D, 12, patch, 1 + (224 // patch) ** 2)
    with torch.device("meta"):
        model = dino.VisionTransformer(224, patch, *dino.ENCODERS[name])
        weights = {name: torch.empty(shape) for name, shape in shapes.items()}
        model.load_state_dict(weights, strict=True, assign=True)
    found = [tuple(value.shape) for value in model.state_dict().values()]
    assert sorted(found) == sorted(shapes.values())


@pytest.fixture
def authors_file(tmp_path, monkeypatch):
    """Such a file, and an encoder that it fits, which is small."""
    monkeypatch.setitem(dino.ENCODERS, "vit_tiny", (32, 2, 2))
    shapes = official(32, 2, 8, 17)
    weights = {name: logits(*shape) for name, shape in shapes.items()}
    torch.save(weights, tmp_path / "authors.pth")
    return tmp_path / "authors.pth"


FITTING = "--encoder", "vit_tiny", "--patch-size", "8"


@pytest.mark.usefixtures("without_maps")
def test_a_run_begins_with_the_authors_weights(tiny_shapes, authors_file, tmp_path):
    run = tmp_path / "run"
    small_run(tiny_shapes, run, "--init", authors_file, *FITTING, "--epochs", 0)
    assert_same(load(run / "encoder.pt"), load(authors_file))


def tiny_vit(image_size=16):
    torch.manual_seed(0)
    encoder = dino.VisionTransformer(image_size, 4, D=32, depth=2, heads=2).eval()
    for p in encoder.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator())
    return encoder


def test_features_are_those_of_timm():
    encoder = tiny_vit()
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    other = timm.models.VisionTransformer(**sizes, num_classes=0, global_pool="").eval()
    other.load_state_dict(encoder.state_dict(), strict=True)
    images = torch.rand(3, 3, 16, 16)
    tokens = other(images)  # (3, 17, 32)
    torch.testing.assert_close(encoder.tokens(images), tokens, atol=1e-5, rtol=1e-5)
    expected = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)
    torch.testing.assert_close(encoder(images), expected, atol=1e-5, rtol=1e-5)
    class_token = dino.ClassToken(encoder)(images)
    torch.testing.assert_close(class_token, tokens[:, 0], atol=1e-5, rtol=1e-5)


def test_tokens_are_patches_with_positions_after_the_class_token():
    encoder = tiny_vit()
    images = torch.rand(2, 3, 16, 16, generator=generator())
    patches = nn.functional.unfold(images, 4, stride=4).mT  # (2, 16, 3 * 4 * 4)
    embed = encoder.patch_embed["proj"]
    tokens = patches @ embed.weight.flatten(1).T + embed.bias
    x = torch.cat([encoder.cls_token.expand(2, -1, -1), tokens], dim=1) + encoder.pos_embed
    first, last = encoder.blocks
    torch.testing.assert_close(
        encoder.last_input(encoder.embed(images)), first(x), atol=1e-5, rtol=1e-5
    )
    y = encoder.norm(last(first(x)))
    torch.testing.assert_close(encoder.tokens(images), y, atol=1e-5, rtol=1e-5)


def test_attention_is_that_of_the_last_block():
    encoder = tiny_vit()
    images = torch.rand(3, 3, 16, 16)
    maps = encoder.attention(images)
    assert maps.shape == (3, 2, 16)
    last = encoder.blocks[-1]
    x = last.norm1(encoder.last_input(encoder.embed(images)))
    q, k, _ = last.attn["qkv"](x).chunk(3, dim=2)
    for head, c in enumerate((slice(0, 16), slice(16, 32))):
        weights = (q[:, 0, None, c] @ k[:, :, c].mT / 4).softmax(2)  # (3, 1, 17)
        torch.testing.assert_close(maps[:, head], weights[:, 0, 1:], atol=1e-6, rtol=1e-5)


def test_positions_are_interpolated_for_other_sizes():
    encoder = tiny_vit()
    assert torch.equal(encoder.positions(17), encoder.pos_embed)
    assert encoder.tokens(torch.rand(2, 3, 8, 8)).shape == (2, 5, 32)
    assert encoder.tokens(torch.rand(2, 3, 32, 32)).shape == (2, 65, 32)
    ramp = torch.arange(4.0).expand(4, 4)  # grows from column to column
    encoder.pos_embed.data[:, 1:] = ramp.reshape(1, 16, 1)
    small = encoder.positions(5)[0, 1:, 0].view(2, 2)
    assert torch.equal(encoder.positions(5)[:, 0], encoder.pos_embed[:, 0])
    assert torch.allclose(small[0], small[1])  # rows alike,
    assert small[0, 0] < 1 < 2 < small[0, 1]  # columns apart


@pytest.mark.parametrize(("encoder", "D"), [("small", 96), ("vit_tiny", 192)])
def test_every_encoder_takes_views_of_both_sizes(encoder, D):
    flags = ["--encoder", encoder, "--patch-size", "8", "--out-dim", "16"]
    model = dino.DINO(dino.parse_args(flags))
    large = torch.rand(4, 3, 32, 32)
    assert model.student(large, torch.rand(6, 3, 16, 16)).shape == (10, 16)
    assert model.teacher.encoder(large).shape == (4, 2 * D)


def test_the_stem_sees_neither_brightness_nor_contrast():
    torch.manual_seed(0)
    stem = dino.ConvStem(8, 16).eval()
    x = torch.rand(2, 3, 32, 32)
    assert stem(x).shape == (2, 16, 4, 4)
    shift = torch.tensor([1.0, -2.0, 3.0])[:, None, None]
    torch.testing.assert_close(stem(x), stem(x + shift), atol=1e-4, rtol=0)
    torch.testing.assert_close(stem(10 * x), stem(20 * x), atol=0.05, rtol=0)
    half = torch.cat([x[:, :, :, :16], 0.5 * torch.ones(2, 3, 32, 16)], dim=3)
    assert not torch.allclose(stem(half), stem(x), atol=0.05)


# ==================================================================================================
# Figures
# ==================================================================================================


@pytest.fixture(scope="module", params=[1, -1])
def part_colors(request):
    """Colors of three images with a thing in the middle, which has an upper and a left part; with
    components of either sign, as it means nothing."""
    tokens = 0.01 * logits(3, 8, 8, 5)
    tokens[:, 2:6, 2:6, 0] += 10
    tokens[:, 2:4, 2:6, 1] += 2
    tokens[:, 2:6, 2:4, 2] += 1
    components = dino.principal_components
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dino, "principal_components", lambda x: request.param * components(x))
        return dino.pca_colors(tokens.flatten(1, 2)).view(3, 8, 8, 3)


def test_the_background_is_black(part_colors):
    thing = torch.zeros(8, 8, dtype=torch.bool)
    thing[2:6, 2:6] = True
    assert ((part_colors == 0).all(3) == ~thing).float().mean() > 0.98


def test_like_parts_of_all_images_have_like_colors(part_colors):
    upper = part_colors[:, 2:4, 2:6].flatten(0, 2)
    lower = part_colors[:, 4:6, 2:6].flatten(0, 2)
    assert ((upper[:, 0] - lower[:, 0].mean()).abs() > 0.8).all()
    assert upper[:, 0].std() < 0.1


def test_equal_patches_are_all_background():
    assert torch.equal(dino.pca_colors(torch.ones(2, 64, 5)), torch.zeros(2, 64, 3))


def test_attention_maps_run_from_black_to_white():
    images = torch.randint(256, (3, 3, 16, 16), generator=generator(), dtype=torch.uint8)
    maps = dino.attention_maps(tiny_vit(), images)
    assert maps.shape == (2, 3, 3, 128, 128)
    assert (maps.amin((2, 3, 4)) == 0).all()
    assert (maps.amax((2, 3, 4)) == 1).all()
    weights = tiny_vit().attention(dino.as_patches(images, 4))[1, 0].view(32, 32)
    brightest = maps[0, 1, 0, ::4, ::4].flatten().argmax()
    assert brightest == weights.flatten().argmax()


def test_maps_of_a_collapsed_encoder_are_black():
    encoder = tiny_vit()
    for p in encoder.parameters():
        p.data.zero_()
    images = torch.zeros(3, 3, 16, 16, dtype=torch.uint8)
    assert (dino.attention_maps(encoder, images) == 0).all()
    assert (dino.part_maps(encoder, images) == 0).all()


# ==================================================================================================
# Runs
# ==================================================================================================


def size_of(path):
    with Image.open(path) as image:
        return image.size


def test_a_run_leaves_its_files(unbroken):
    assert files(unbroken) == RESULTS
    summary = json.loads((unbroken / "summary.json").read_text())
    assert summary["method"] == "dino"
    accuracies = {"knn", "knn_20", "linear_probe", "knn_with_mean", "linear_probe_with_mean"}
    assert set(summary["trained"]) == set(summary["untrained"]) == accuracies
    terms = {"loss", "entropy", "entropy_of_mean", "kl"}
    assert summary["history"][0].keys() == terms | {"epoch", "knn", "rank", "seconds"}
    encoder = dino.VisionTransformer(32, 8, *dino.ENCODERS["small"], stem=True)
    encoder.load_state_dict(load(unbroken / "encoder.pt"))
    checkpoint = load(unbroken / "checkpoint.pt")["model"]
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, checkpoint[f"teacher.encoder.{name}"])


def test_figures_have_the_size_of_a_slide(unbroken):
    for name in FIGURES:
        width, height = size_of(unbroken / name)
        assert width > 900
        assert height > 500


def test_the_probes_read_class_token_and_patch_mean(unbroken, tiny_shapes):
    data = common.load_dataset(str(tiny_shapes))
    encoder = dino.VisionTransformer(32, 8, *dino.ENCODERS["small"], stem=True)
    encoder.load_state_dict(load(unbroken / "encoder.pt"))
    trained = json.loads((unbroken / "summary.json").read_text())["trained"]
    x = dino.features(encoder, data.train_images)
    test_x = dino.features(encoder, data.test_images)
    y = data.train_labels
    test_y = data.test_labels
    expected = {
        "knn": dino.knn_accuracy(x[:, :96], y, test_x[:, :96], test_y),
        "knn_with_mean": dino.knn_accuracy(x, y, test_x, test_y),
    }
    assert trained | expected == trained


def test_knn_20_has_the_k_and_the_temperature_of_the_paper(tiny_shapes, monkeypatch):
    calls = []

    def knn_accuracy(bank, bank_labels, queries, labels, k=200, temperature=0.1):
        calls.append((bank.shape[1], k, temperature))
        return len(calls) / 10

    monkeypatch.setattr(dino, "knn_accuracy", knn_accuracy)
    monkeypatch.setattr(dino, "linear_probe", lambda *_: 0)
    accuracies = dino.evaluate(small_model().teacher.encoder, common.load_dataset(str(tiny_shapes)))
    assert calls == [(96, 200, 0.1), (192, 200, 0.1), (96, 20, 0.07)]
    found = [accuracies[name] for name in ("knn", "knn_with_mean", "knn_20")]
    assert found == [0.1, 0.2, 0.3]


@pytest.mark.usefixtures("without_maps")
def test_held_out_labels_are_predicted_from_the_class_token(tiny_shapes, tmp_path, monkeypatch):
    calls = spy(monkeypatch, dino, "monitor")
    small_run(tiny_shapes, tmp_path / "run", "--epochs", 1)
    ((network, _),) = calls
    assert type(network) is dino.ClassToken
    assert_same(dict(network.encoder.state_dict()), load(tmp_path / "run/encoder.pt"))


@pytest.mark.usefixtures("without_maps")
@pytest.mark.parametrize(
    ("module", "name", "call"),
    [(dino, "dino_loss", 5), (Path, "replace", 10)],
)
def test_a_resumed_run_ends_as_an_unbroken_one(tiny_shapes, unbroken, tmp_path, module, name, call):
    run = tmp_path / "run"
    with killed_at(module, name, call):  # of three steps an epoch
        small_run(tiny_shapes, run)
    assert not (run / "summary.json").exists()
    resumed(run)
    assert_ended_alike(run, unbroken, "untrained", "trained")
    assert files(run) == RESULTS


def test_figures_of_the_untrained_encoder_are_drawn_once(unbroken, tmp_path):
    """A resumed run has no untrained encoder: one of --init is not read again."""
    run = shutil.copytree(unbroken, tmp_path / "run")
    names = [name for name in FIGURES if "untrained" in name or name == "views.png"]
    for name in names:
        (run / name).write_text("as it was")
    resumed(run)
    assert_ended_alike(run, unbroken, "untrained", "trained")
    for name in names:
        assert (run / name).read_text() == "as it was"
    assert (run / "attention.png").stat().st_size > 1000


@pytest.mark.usefixtures("without_maps")
def test_a_new_run_begins_with_an_encoder(unbroken, tiny_shapes, tmp_path):
    run = tmp_path / "run"
    small_run(tiny_shapes, run, "--init", unbroken / "encoder.pt", "--epochs", 1, "--lr", 0)
    assert_same(load(run / "encoder.pt"), load(unbroken / "encoder.pt") | running_means(run))
    first = load(run / "checkpoint.pt")["model"]
    weights = load(unbroken / "encoder.pt")
    assert torch.equal(first["student.encoder.cls_token"], weights["cls_token"])


def running_means(run):
    """Of batch norm in the stem, which are of the views and not learned."""
    weights = load(run / "encoder.pt")
    return {k: x for k, x in weights.items() if "running" in k or "num_batches" in k}


@pytest.mark.usefixtures("without_maps")
def test_it_learns(some_shapes, tmp_path):
    flags = "--epochs", "4", "--lr", "0.012", "--local-views", "0", "--eval-every", "4"
    history = small_run(some_shapes, tmp_path / "run", *flags)["history"]
    # What the student knows of a target beyond the mean target, which a collapse excludes.
    known = [line["entropy_of_mean"] - line["entropy"] - line["kl"] for line in history]
    assert known[0] < 0 < known[-1]


def album(folder, count):
    """A folder of plain images."""
    folder.mkdir()
    for i, image in enumerate(common.load_dataset("shapes").train_images[:count]):
        torchvision.utils.save_image(image / 255, folder / f"{i:02}.png")
    return folder


@pytest.mark.parametrize("count", [12, 60])
def test_plain_images_are_pretrained_on(tmp_path, count):
    flags = "--data-dir", tmp_path / "cache", "--epochs", 1, "--batch-size", 8
    summary = small_run(album(tmp_path / "album", count), tmp_path / "run", *flags)
    assert summary["trained"] == summary["untrained"] == {}
    assert files(tmp_path / "run") == RESULTS


BAD = [
    (["--patch-size", "5"], "--patch-size 5: must divide the images' side, 32"),
    (["--patch-size", "32", "--image-size", "32", "--encoder", "resnet18"], "invalid choice"),
    (["--local-views", "2", "--local-crop", "0.95"], "--local-crop 0.95: must be at most --crop"),
    (["--teacher-temperature", "0"], "--teacher-temperature 0.0: must be at least 0.001"),
    (["--ema-momentum", "1.1"], "--ema-momentum 1.1: must be from 0 to 1"),
    (["--momentum", "0.9"], "unrecognized arguments: --momentum 0.9; did you mean --ema-momentum?"),
    (["--batch-size", "5000"], "--batch-size 5000: must be from 2 to 4096, the number of images"),
    (["--init", "none.pt"], "--init none.pt: does not fit --encoder small"),
    (["--resume", "nothing"], "--resume nothing: there is no run of dino.py in this folder"),
    (["--show", "a.png"], "--show: needs --resume with a finished run, or --init with weights"),
    (["--show", "a.png", "--init", "none.pt"], "none.pt: holds no weights of --encoder small"),
]


@pytest.mark.parametrize(("flags", "message"), BAD)
def test_bad_input_is_one_line(tmp_path, monkeypatch, error_of, flags, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(dino.run, *flags)
    assert list(tmp_path.iterdir()) == []


def test_the_stems_patches_are_powers_of_two(tmp_path, error_of):
    images = np.zeros((40, 36, 36, 3), dtype=np.uint8)
    labels = np.arange(40) % 2
    names = "train_images", "train_labels", "test_images", "test_labels"
    path = tmp_path / "36.npz"
    np.savez(path, **dict(zip(names, (images, labels) * 2, strict=True)))
    flags = "--dataset", path, "--encoder", "small", "--image-size", 36, "--patch-size", 6
    line = error_of(dino.run, *flags, "--out", tmp_path / "run")
    assert "--patch-size 6: must be a power of 2" in line


TRAINING_FLAGS = {"dataset", "image_size", "encoder", "init", "patch_size", "out_dim"}
TRAINING_FLAGS |= {"teacher_temperature", "teacher_temperature_start", "centering"}
TRAINING_FLAGS |= {"ema_momentum", "local_views", "crop", "local_crop", "gray", "solarize"}
TRAINING_FLAGS |= {"epochs", "batch_size", "lr", "warmup", "weight_decay", "weight_decay_end"}
TRAINING_FLAGS |= {"eval_every", "seed", "out"}


def test_only_flags_that_do_not_train_go_with_resume(unbroken, error_of):
    flags = dino.flags_of(dino.Args)
    assert {name for name in flags if not flags[name].metadata["resume"]} == TRAINING_FLAGS
    line = error_of(dino.run, "--resume", unbroken, "--epochs", 3)
    assert "--epochs: a resumed run keeps the flags it was started with" in line


@pytest.mark.parametrize("flags", [[], ["cifar10"], ["cifar10", "--encoder", "small"]])
def test_recipes_fit_the_data(flags):
    args = dino.parse_args(["--dataset", *flags] if flags else [])
    assert 32 % args.patch_size == 0
    assert args.teacher_temperature_start <= args.teacher_temperature < 0.1


def test_large_images_have_a_recipe_of_their_own(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (45, 96, 96, 3), dtype=np.uint8)
    labels = np.arange(45) % 2
    arrays = {"train_images": images, "train_labels": labels}
    arrays |= {"test_images": images, "test_labels": labels}
    np.savez(tmp_path / "large.npz", **arrays)
    for name in ("pretrain", "save_attention", "save_parts"):
        monkeypatch.setattr(dino, name, lambda *_: [])
    monkeypatch.setattr(dino, "evaluate", lambda *_: {})
    flags = ["--dataset", str(tmp_path / "large.npz"), "--out", str(tmp_path / "run")]
    flags += ["--out-dim", "16", "--local-views", "3"]
    args = dino.main(dino.parse_args(flags))["args"]
    assert (args["batch_size"], args["encoder"], args["patch_size"]) == (45, "vit_small", 8)
    assert (args["out_dim"], args["local_views"]) == (16, 3)  # what was typed stays


# ==================================================================================================
# Images of one's own
# ==================================================================================================


def test_an_image_is_shown_by_a_run(unbroken, tmp_path):
    run = shutil.copytree(unbroken, tmp_path / "run")
    torchvision.utils.save_image(torch.rand(3, 50, 70), tmp_path / "a photo.png")
    before = (run / "args.json").read_text()
    figure = resumed(run, "--show", tmp_path / "a photo.png")
    assert figure == run / "show-a photo.png"
    width, height = size_of(figure)
    assert width > 5 * 128  # the image, three heads, its parts
    assert height > 128
    assert (run / "args.json").read_text() == before


def test_images_of_a_folder_share_their_components(unbroken, tmp_path, monkeypatch):
    run = shutil.copytree(unbroken, tmp_path / "run")
    folder = album(tmp_path / "album", 5)
    calls = spy(monkeypatch, dino, "pca_colors")
    figure = resumed(run, "--show", folder, folder / "00.png")
    ((tokens,),) = calls
    assert tokens.shape == (6, 32 * 32, 96)
    assert figure == run / "show-album.png"
    assert size_of(figure)[1] > 6 * 128


def test_of_many_images_sixteen_are_shown(unbroken, tmp_path, capsys):
    run = shutil.copytree(unbroken, tmp_path / "run")
    figure = resumed(run, "--show", album(tmp_path / "album", 18))
    assert "--show: the first 16 of 18 images" in capsys.readouterr().out
    assert 16 * 128 < size_of(figure)[1] < 18 * 128


def test_images_are_shown_by_the_authors_weights(authors_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = spy(monkeypatch, dino, "attention_maps")
    images = album(tmp_path / "album", 2)
    flags = ["--init", str(authors_file), *FITTING, "--show", str(images)]
    figure = dino.main(dino.parse_args(flags))
    ((encoder, shown),) = calls
    assert_same(dict(encoder.state_dict()), load(authors_file))
    assert shown.shape == (2, 3, 256, 256)  # 32 patches a side
    assert figure == Path("runs/dino-show/show-album.png")
    assert figure.exists()


def test_what_cannot_be_shown_is_named(unbroken, tmp_path, error_of):
    run = shutil.copytree(unbroken, tmp_path / "run")
    (tmp_path / "none.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("none.png", "none.png: not a readable image"),
        ("missing.png", "missing.png: not a readable image"),
        ("empty", "empty: there are no images in it"),
    ):
        assert message in error_of(dino.run, "--resume", run, "--show", tmp_path / name)
    (run / "encoder.pt").unlink()
    line = error_of(dino.run, "--resume", run, "--show", tmp_path / "none.png")
    assert "encoder.pt: holds no weights of --encoder small --patch-size 8" in line
    assert files(run) == RESULTS - {"encoder.pt"}


# ==================================================================================================
# Two processes
# ==================================================================================================


def both_compute_center_and_gradients():
    torch.manual_seed(0)
    args = dino.parse_args(["--encoder", "small"])
    model = dino.DINO(args).double().eval()  # batch norm is not synchronized on CPUs
    whole = copy.deepcopy(model)
    network = nn.parallel.DistributedDataParallel(model)
    large = torch.rand(2, 6, 3, 32, 32, generator=generator(1)).double()  # views of six images
    small = torch.rand(3, 6, 3, 16, 16, generator=generator(2)).double()

    def loss_of(network, rows):
        views = large[:, rows].flatten(0, 1), small[:, rows].flatten(0, 1)
        student_logits, teacher_logits = network(*views)
        student_logits = student_logits.unflatten(0, (5, -1))
        teacher_logits = teacher_logits.unflatten(0, (2, -1))
        loss = dino.dino_loss(student_logits, teacher_logits, model.center, 0.1, 0.04)
        return loss, teacher_logits

    loss, all_logits = loss_of(whole, torch.arange(6))
    loss.backward()
    loss, own_logits = loss_of(network, torch.arange(6)[dino.RANK :: 2])
    loss.backward()
    for p, q in zip(model.student.parameters(), whole.student.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-10)
    center = dino.update_center(model.center, own_logits, 0.9)
    torch.testing.assert_close(center, 0.1 * all_logits.mean((0, 1)), rtol=1e-10, atol=1e-10)


def both_train(data, folder):
    both_compute_center_and_gradients()
    with empty_maps():
        train_and_resume(dino, words(data, folder), folder, "dino_loss")


def test_two_processes_do_what_one_does(tiny_shapes, tmp_path, in_two_processes):
    printed = in_two_processes(both_train, tiny_shapes, tmp_path)
    assert_resumed_in_both(tmp_path, printed)
    assert load(tmp_path / "unbroken-0.pt").keys() >= {"center", "teacher.last_layer.weight"}
    assert records(tmp_path / "run")[0]["entropy"] > 0
