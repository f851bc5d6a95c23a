"""dino.py: the loss, the center, teacher and student, views, official names, figures, and whole runs on shapes."""

import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn

import common
import dino

ROOT = Path(__file__).parent.parent


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pixels(path):
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def logits(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


# --- Loss -----------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_a_loop_over_views():
    V, N, K = 5, 3, 7
    student, teacher, center = logits(V, N, K), logits(2, N, K, seed=1), logits(K, seed=2)
    total, pairs = 0.0, 0
    for i in range(2):
        for j in range(V):
            if i == j:
                continue
            pairs += 1
            for n in range(N):
                t = [math.exp((teacher[i, n, k] - center[k]) / 0.04) for k in range(K)]
                s = [math.exp(student[j, n, k] / 0.1) for k in range(K)]
                total -= sum(t[k] / sum(t) * math.log(s[k] / sum(s)) for k in range(K)) / N
    assert pairs == 2 * V - 2
    assert dino.dino_loss(student, teacher, center, 0.1, 0.04).item() == pytest.approx(total / pairs, rel=1e-4)


def test_two_views_are_the_lectures_algorithm():
    def H(t, s):
        s, t = torch.softmax(s / 0.1, dim=1), torch.softmax((t - C) / 0.04, dim=1)
        return -(t * torch.log(s)).sum(dim=1).mean()

    (s1, s2), (t1, t2), C = logits(2, 4, 6), logits(2, 4, 6, seed=1), logits(6, seed=2)
    loss = dino.dino_loss(torch.stack([s1, s2]), torch.stack([t1, t2]), C, 0.1, 0.04)
    assert loss.item() == pytest.approx((H(t1, s2) / 2 + H(t2, s1) / 2).item(), rel=1e-4)


def test_equal_logits_cost_log_K_and_no_gradient_goes_to_the_teacher():
    student, teacher = torch.zeros(4, 3, 8, requires_grad=True), torch.zeros(2, 3, 8, requires_grad=True)
    loss = dino.dino_loss(student, teacher * 1.0, torch.zeros(8), 0.1, 0.04)
    assert loss.item() == pytest.approx(math.log(8))
    student = logits(4, 3, 8).requires_grad_()
    dino.dino_loss(student, 2 * teacher + 1, torch.zeros(8), 0.1, 0.04).backward()
    assert teacher.grad is None and (student.grad.abs().sum((1, 2)) > 0).all()


def test_the_center_is_a_moving_mean_of_the_teachers_logits():
    teacher, center = logits(2, 5, 4), logits(4, seed=1)
    mean = (teacher[0].sum(0) + teacher[1].sum(0)) / 10
    assert torch.allclose(dino.update_center(center, teacher, 0.9), 0.9 * center + 0.1 * mean, atol=1e-6)
    assert torch.allclose(dino.update_center(center, teacher, 0.0), mean, atol=1e-6)
    assert torch.equal(dino.update_center(center, teacher, 1.0), center)


def test_entropies_tell_both_collapses_from_a_healthy_teacher():
    N, K = 8, 8
    center = torch.zeros(K)
    healthy = torch.eye(K).expand(2, N, K)  # every image another logit
    one_for_all = torch.eye(K)[0].expand(2, N, K)
    uniform = torch.zeros(2, N, K)
    for teacher, expected in ((healthy, (0, math.log(K))), (one_for_all, (0, 0)), (uniform, (math.log(K),) * 2)):
        entropies = dino.target_entropies(teacher, center, 0.01)
        assert entropies.tolist() == pytest.approx(expected, abs=1e-5)
    centered = dino.target_entropies(one_for_all, dino.update_center(center, one_for_all, 0.0), 0.01)
    assert centered.tolist() == pytest.approx((math.log(K),) * 2)  # centering trades one collapse for the other


# --- Teacher and student --------------------------------------------------------------------------------------------


def small_model(*flags):
    torch.manual_seed(0)
    args = dino.parse_args(["--encoder", "small", *flags])
    return dino.DINO(args), args


def test_student_and_teacher_start_equal_and_the_teacher_is_a_moving_average():
    model, _ = small_model()
    student, teacher = dict(model.student.named_parameters()), dict(model.teacher.named_parameters())
    assert student.keys() == teacher.keys() and all(torch.equal(p, teacher[name]) for name, p in student.items())
    assert not any(p.requires_grad for p in teacher.values())
    with torch.no_grad():
        for p in student.values():
            p += torch.randn(p.shape, generator=generator(1))
    before = {name: p.clone() for name, p in teacher.items()}
    dino.update_teacher(model.teacher, model.student, 0.9)
    for name, p in student.items():
        assert torch.allclose(teacher[name], 0.9 * before[name] + 0.1 * p, atol=1e-6)
    dino.update_teacher(model.teacher, model.student, 1.0)
    for name, p in student.items():
        assert torch.allclose(teacher[name], 0.9 * before[name] + 0.1 * p, atol=1e-6)


def test_logits_are_cosines():
    model, args = small_model()
    model.student.last_layer.weight.data *= 7
    logits = model.student.eval()(torch.rand(64, 3, 32, 32))
    assert logits.shape == (64, args.out_dim) and logits.abs().max() <= 1 + 1e-5
    directions = model.student.last_layer.weight
    assert torch.linalg.matrix_rank(directions) == 64 and (logits.std(1) > 0).all()


def test_schedules_and_decayed_parameters():
    assert dino.cosine(0.996, 1.0, 0.0) == pytest.approx(0.996) and dino.cosine(0.996, 1.0, 1.0) == pytest.approx(1.0)
    assert dino.cosine(0.04, 0.4, 0.5) == pytest.approx(0.22)
    args = dino.parse_args(["--batch-size", "512", "--warmup", "0.1", "--lr", "0.1"])
    network = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    optimizer, schedule = dino.make_optimizer(network, args, 100)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decay[id(p)] for p in network.parameters()] == [0.04, 0, 0, 0]
    rates = []
    for _ in range(102):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:11] == pytest.approx([0.2 * (step + 1) / 11 for step in range(11)])  # 0.1 for 256 images
    assert rates[55] == pytest.approx(0.1) and rates[100:] == pytest.approx([0, 0])


# --- Views ----------------------------------------------------------------------------------------------------------


def test_multi_crop_makes_large_and_small_views():
    args = dino.parse_args(["--local-views", "3", "--dataset", "cifar10"])
    images = (255 * torch.rand(5, 3, 32, 32, generator=generator())).byte()
    large, small = dino.multi_crop(images, args, generator())
    assert large.shape == (10, 3, 32, 32) and small.shape == (15, 3, 16, 16)
    assert min(large.min(), small.min()) >= 0 and max(large.max(), small.max()) <= 1
    assert not torch.equal(large[:5], large[5:])
    assert not torch.equal(small[:5], small[5:10])
    args.local_views = 0
    assert len(dino.multi_crop(images, args, generator())) == 1


@pytest.mark.parametrize("S", [32, 96])
def test_global_and_local_views_have_their_own_crops_blur_and_solarization(monkeypatch, S):
    seen = []
    for name in ("random_resized_crop", "random_gaussian_blur", "random_solarize", "random_grayscale"):
        call = lambda x, *values, name=name, **more: seen.append((name, len(x), *values, *more.values())) or x  # noqa: E731
        monkeypatch.setattr(common, name, call)
    words = ["--crop", "0.5", "--local-crop", "0.1", "--local-views", "2", "--solarize", "0.2", "--gray", "0.3"]
    g = generator()
    dino.multi_crop(torch.zeros(4, 3, S, S, dtype=torch.uint8), dino.parse_args(words), g)
    crops = [(4, S, g, (0.5, 1.0)), (4, S, g, (0.5, 1.0)), (8, S // 2, g, (0.1, 0.5))]
    assert [values for name, *values in seen if name == "random_resized_crop"] == [list(crop) for crop in crops]
    blurs = [values for name, *values in seen if name == "random_gaussian_blur"]
    assert blurs == ([[4, g, 1.0], [4, g, 0.1], [8, g, 0.5]] if S == 96 else [])
    assert [values for name, *values in seen if name == "random_solarize"] == [[4, g, 0.2]]
    assert [values for name, *values in seen if name == "random_grayscale"] == [[n, g, 0.3] for n in (4, 4, 8)]


# --- Official names -------------------------------------------------------------------------------------------------


def official_block(D):
    """Names and shapes of a block of width D in the authors' code and in timm."""
    return {
        "norm1.weight": (D,), "norm1.bias": (D,),
        "attn.qkv.weight": (3 * D, D), "attn.qkv.bias": (3 * D,),
        "attn.proj.weight": (D, D), "attn.proj.bias": (D,),
        "norm2.weight": (D,), "norm2.bias": (D,),
        "mlp.fc1.weight": (4 * D, D), "mlp.fc1.bias": (4 * D,),
        "mlp.fc2.weight": (D, 4 * D), "mlp.fc2.bias": (D,),
    }  # fmt: skip


@pytest.mark.parametrize(("name", "patch", "D"), [("vit_small", 16, 384), ("vit_small", 8, 384), ("vit_base", 16, 768)])
def test_official_weights_load_strictly(name, patch, D):
    """dino_deitsmall16_pretrain.pth and its siblings."""
    official = {
        "cls_token": (1, 1, D), "pos_embed": (1, 1 + (224 // patch) ** 2, D),
        "patch_embed.proj.weight": (D, 3, patch, patch), "patch_embed.proj.bias": (D,),
        **{f"blocks.{i}.{name}": shape for i in range(12) for name, shape in official_block(D).items()},
        "norm.weight": (D,), "norm.bias": (D,),
    }  # fmt: skip
    with torch.device("meta"):
        model = dino.VisionTransformer(224, patch, *dino.ENCODERS[name])
        model.load_state_dict({key: torch.empty(s) for key, s in official.items()}, strict=True, assign=True)
    assert sorted(tuple(value.shape) for value in model.state_dict().values()) == sorted(official.values())


def tiny_vit(image_size=16):
    torch.manual_seed(0)
    encoder = dino.VisionTransformer(image_size, 4, D=32, depth=2, heads=2).eval()
    for p in encoder.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator())
    return encoder


def test_features_are_those_of_timm():
    encoder = tiny_vit()
    other = timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=0, global_pool=""
    ).eval()
    other.load_state_dict(encoder.state_dict(), strict=True)
    images = torch.rand(3, 3, 16, 16)
    tokens = other(images)  # (3, 17, 32)
    assert torch.allclose(encoder.tokens(images), tokens, atol=1e-5)
    assert torch.allclose(encoder(images), torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1), atol=1e-5)


def test_tokens_are_patches_with_positions_and_the_class_token_is_first():
    encoder, images = tiny_vit(), torch.rand(2, 3, 16, 16, generator=generator())
    patches = torch.nn.functional.unfold(images, 4, stride=4).mT  # (2, 16, 3 * 4 * 4)
    tokens = patches @ encoder.patch_embed["proj"].weight.flatten(1).T + encoder.patch_embed["proj"].bias
    x = torch.cat([encoder.cls_token.expand(2, -1, -1), tokens], 1) + encoder.pos_embed
    first, last = encoder.blocks
    assert torch.allclose(encoder.last_input(images), first(x), atol=1e-5)
    y = encoder.norm(last(first(x)))
    assert torch.allclose(encoder(images), torch.cat([y[:, 0], y[:, 1:].mean(1)], 1), atol=1e-5)


def test_attention_is_that_of_the_last_block():
    encoder, images = tiny_vit(), torch.rand(3, 3, 16, 16)
    maps = encoder.attention(images)
    assert maps.shape == (3, 2, 16)
    last, inputs = encoder.blocks[-1], []
    last.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    encoder(images)
    q, k, _ = last.attn["qkv"](last.norm1(inputs[0])).chunk(3, dim=2)
    for head, c in enumerate((slice(0, 16), slice(16, 32))):
        weights = (q[:, 0, None, c] @ k[:, :, c].mT / 4).softmax(2)  # (3, 1, 17)
        assert torch.allclose(maps[:, head], weights[:, 0, 1:], atol=1e-6)


def test_positions_are_interpolated_for_other_sizes():
    encoder = tiny_vit()
    assert torch.equal(encoder.positions(17), encoder.pos_embed)
    assert encoder.tokens(torch.rand(2, 3, 8, 8)).shape == (2, 5, 32)
    assert encoder.tokens(torch.rand(2, 3, 32, 32)).shape == (2, 65, 32)
    ramp = torch.arange(4.0).expand(4, 4)  # grows from column to column
    encoder.pos_embed.data[:, 1:] = ramp.reshape(1, 16, 1)
    small = encoder.positions(5)[0, 1:, 0].view(2, 2)
    assert torch.equal(encoder.positions(5)[:, 0], encoder.pos_embed[:, 0])
    assert torch.allclose(small[0], small[1]) and small[0, 0] < 1 < 2 < small[0, 1]  # rows alike, columns apart


@pytest.mark.parametrize(("encoder", "D"), [("small", 96), ("vit_tiny", 192)])
def test_every_encoder_takes_views_of_both_sizes(encoder, D):
    args = dino.parse_args(["--encoder", encoder, "--patch-size", "8", "--out-dim", "16"])
    model = dino.DINO(args)
    assert model.student(torch.rand(4, 3, 32, 32), torch.rand(6, 3, 16, 16)).shape == (10, 16)
    assert model.teacher.encoder(torch.rand(2, 3, 32, 32)).shape == (2, 2 * D)


def test_the_stem_sees_neither_brightness_nor_contrast():
    torch.manual_seed(0)
    stem, x = dino.ConvStem(8, 16).eval(), torch.rand(2, 3, 32, 32)
    assert stem(x).shape == (2, 16, 4, 4) and stem(torch.rand(2, 3, 16, 16)).shape == (2, 16, 2, 2)
    shift = torch.tensor([1.0, -2.0, 3.0])[:, None, None]
    assert torch.allclose(stem(x), stem(x + shift), atol=1e-4)
    assert torch.allclose(stem(10 * x), stem(20 * x), atol=0.05)
    left, right = stem(torch.cat([x[:, :, :, :16], 0.5 * torch.ones(2, 3, 32, 16)], 3)), stem(x)
    assert not torch.allclose(left, right, atol=0.05)


# --- Figures --------------------------------------------------------------------------------------------------------


def test_patches_of_a_background_are_black_and_the_same_parts_have_the_same_color():
    tokens = torch.zeros(3, 8, 8, 5) + 0.01 * logits(3, 8, 8, 5)
    tokens[:, 2:6, 2:6, 0] += 10  # a thing in the middle
    tokens[:, 2:4, 2:6, 1] += 2  # its upper part
    tokens[:, 2:6, 2:4, 2] += 1  # its left part
    colors = dino.pca_colors(tokens.flatten(1, 2)).view(3, 8, 8, 3)
    thing = torch.zeros(8, 8, dtype=torch.bool)
    thing[2:6, 2:6] = True
    assert ((colors == 0).all(3) == ~thing).float().mean() > 0.98
    upper, lower = colors[:, 2:4, 2:6].flatten(0, 2), colors[:, 4:6, 2:6].flatten(0, 2)
    assert ((upper[:, 0] - lower[:, 0].mean()).abs() > 0.8).all() and upper[:, 0].std() < 0.1  # in all images


def test_figures_of_constant_images_and_of_a_collapsed_encoder(tmp_path):
    assert torch.equal(dino.pca_colors(torch.ones(2, 64, 5)), torch.zeros(2, 64, 3))
    encoder = tiny_vit()
    for p in encoder.parameters():
        p.data.zero_()
    dino.save_figures(tmp_path, torch.zeros(2, 3, 3, 16, 16, dtype=torch.uint8), encoder, "-zero")
    dino.save_figures(tmp_path, torch.zeros(2, 3, 3, 16, 16, dtype=torch.uint8), tiny_vit())
    flat, attention, pca = (pixels(tmp_path / f"{name}.png") for name in ("attention-zero", "attention", "pca"))
    assert flat.shape == attention.shape == (3, 136, 6 * 132 + 4) and pca.shape == (3, 2 * 132 + 4, 6 * 132 + 4)
    assert flat[:, 4:132, 136:264].max() == 0 < attention[:, 4:132, 136:264].max()  # an image and two heads: no NaN


# --- Runs -----------------------------------------------------------------------------------------------------------


def tiny_run(data, out, *flags):
    """main on 96 shapes: two epochs of three steps, with two global and two local views."""
    flags = "--epochs", "2", "--batch-size", "32", "--eval-every", "1", "--local-views", "2", *flags
    return dino.main(dino.parse_args(["--dataset", str(data), "--encoder", "small", "--out", str(out), *flags]))


class Killed(BaseException):
    """What no code catches."""


@pytest.fixture(scope="module")
def unbroken(tiny_shapes, tmp_path_factory):
    return (folder := tmp_path_factory.mktemp("unbroken") / "run"), tiny_run(tiny_shapes, folder)


def test_a_resumed_run_ends_where_an_unbroken_one_does(tiny_shapes, unbroken, tmp_path):
    calls, loss = [], dino.dino_loss

    def dino_loss(*args):
        calls.append(1)
        if len(calls) == 5:  # of three an epoch: a checkpoint is there
            raise Killed
        return loss(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(dino, "dino_loss", dino_loss)
        tiny_run(tiny_shapes, tmp_path / "run")
    summary = dino.main(dino.parse_args(["--resume", str(tmp_path / "run")]))
    assert summary["trained"] == unbroken[1]["trained"]
    a, b = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (tmp_path / "run", unbroken[0]))
    assert set(a["model"]) == set(b["model"]) and a["model"]["center"].abs().max() > 0
    assert all(torch.equal(value, b["model"][key]) for key, value in a["model"].items())
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]


def test_files_of_a_run(unbroken):
    run, summary = unbroken
    names = {"args.json", "metrics.jsonl", "summary.json", "checkpoint.pt", "encoder.pt", ".lock"}
    figures = {"views.png", "attention.png", "attention-untrained.png", "pca.png", "pca-untrained.png"}
    assert {path.name for path in run.iterdir()} == names | figures
    accuracies = {"knn", "knn_20", "linear_probe", "knn_with_mean", "linear_probe_with_mean"}
    assert set(summary["trained"]) == set(summary["untrained"]) == accuracies and summary["method"] == "dino"
    for line in summary["history"]:
        assert line["loss"] == pytest.approx(line["entropy"] + line["kl"]) and line["kl"] > 0
        assert 0 <= line["entropy"] <= line["entropy_of_mean"] <= math.log(256)
    encoder = dino.VisionTransformer(32, 8, *dino.ENCODERS["small"], stem=True)
    encoder.load_state_dict(torch.load(run / "encoder.pt", weights_only=True))
    teacher = torch.load(run / "checkpoint.pt", weights_only=True)["model"]
    assert all(torch.equal(value, teacher[f"teacher.encoder.{key}"]) for key, value in encoder.state_dict().items())


def test_an_image_of_ones_own_is_shown(unbroken, tmp_path):
    run, before = unbroken[0], (unbroken[0] / "args.json").read_text()
    torchvision.utils.save_image(torch.rand(3, 50, 70), tmp_path / "own.png")
    dino.main(dino.parse_args(["--resume", str(run), "--show", str(tmp_path / "own.png")]))
    assert pixels(run / "attention-show.png").shape == (3, 136, 4 * 132 + 4)  # the image, and three heads
    assert pixels(run / "pca-show.png").shape == (3, 136, 2 * 132 + 4) and (run / "args.json").read_text() == before
    (tmp_path / "none.png").write_text("no image")
    with pytest.raises(common.UserError, match="none.png"):
        dino.main(dino.parse_args(["--resume", str(run), "--show", str(tmp_path / "none.png")]))


@pytest.mark.parametrize(("centering", "moves"), [("--centering", True), ("--no-centering", False)])
def test_in_training_local_views_never_reach_the_teacher_and_the_last_layer_waits(
    tiny_shapes, tmp_path, monkeypatch, centering, moves
):
    seen, last, decays, temperatures = {"student": [], "teacher": []}, [], [], []
    forward, save_epoch, step, loss = dino.Network.forward, dino.save_epoch, torch.optim.AdamW.step, dino.dino_loss

    def recorded(network, *views):
        seen["student" if next(network.parameters()).requires_grad else "teacher"].append([len(x) for x in views])
        return forward(network, *views)

    def saved(args, state, *rest):
        last.append(state["model"].student.last_layer.weight.detach().clone())
        assert bool(state["model"].center.abs().max() > 0) == moves
        save_epoch(args, state, *rest)

    def stepped(optimizer, *args, **kwargs):
        decays.append([group["weight_decay"] for group in optimizer.param_groups])
        return step(optimizer, *args, **kwargs)

    def dino_loss(*args):
        temperatures.append(args[4])
        return loss(*args)

    monkeypatch.setattr(dino.Network, "forward", recorded)
    monkeypatch.setattr(dino, "save_epoch", saved)
    monkeypatch.setattr(torch.optim.AdamW, "step", stepped)
    monkeypatch.setattr(dino, "dino_loss", dino_loss)
    flags = "--teacher-temperature-start", "0.02", "--teacher-temperature", "0.08", centering
    tiny_run(tiny_shapes, tmp_path / "run", *flags)
    assert seen["student"] == [[64, 64]] * 6  # two global views of 32 images, and two local ones
    assert seen["teacher"] == [[64]] * 6
    start = dino.DINO(dino.parse_args(["--resume", str(tmp_path / "run")])).student.last_layer.weight.shape
    assert last[0].shape == start and not torch.equal(last[0], last[1])
    torch.manual_seed(0)
    initial = dino.DINO(dino.parse_args(["--resume", str(tmp_path / "run")])).student.last_layer.weight
    assert torch.equal(last[0], initial)  # it waits an epoch
    matrices, others = zip(*decays, strict=True)
    assert matrices == pytest.approx([dino.cosine(0.04, 0.4, n / 6) for n in range(6)]) and set(others) == {0}
    assert temperatures == pytest.approx([0.02 + 0.06 * min(1, n / 6 / 0.3) for n in range(6)])


def test_it_learns(some_shapes, tmp_path):
    summary = tiny_run(some_shapes, tmp_path / "run", "--epochs", "5", "--lr", "0.012", "--local-views", "0")
    first, *_, last = (line["entropy_of_mean"] - line["entropy"] - line["kl"] for line in summary["history"])
    assert first < 0 < last  # it knows more of a target than the mean of all targets tells, which a collapse excludes


def test_plain_images_are_pretrained_on(tmp_path):
    (tmp_path / "album").mkdir()
    for i, image in enumerate(common.load_dataset("shapes").train_images[:40]):
        torchvision.utils.save_image(image / 255, tmp_path / f"album/{i}.png")
    flags = "--data-dir", str(tmp_path / "cache"), "--epochs", "1"
    summary = tiny_run(tmp_path / "album", tmp_path / "run", *flags)
    assert summary["trained"] == summary["untrained"] == {} and (tmp_path / "run/pca.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--patch-size", "5"], "--patch-size 5: must divide the side, 32"),
        (
            ["--patch-size", "6", "--encoder", "small"],
            "--patch-size 6: must divide the side, 32, and be a power of 2",
        ),
        (["--local-views", "2", "--local-crop", "0.95"], "--local-crop 0.95: must not be above --crop 0.9"),
        (["--teacher-temperature", "0"], "--teacher-temperature 0.0: must be from 0.001 to inf"),
        (["--momentum", "1.1"], "--momentum 1.1: must be from 0 to 1"),
        (["--encoder", "resnet18"], "--encoder: invalid choice: 'resnet18'"),
        (["--batch-size", "5000"], "--batch-size 5000: at most the 4096 images"),
        (["--show", "image.png"], "--resume RUN: must be the folder of a finished run of dino.py"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dino.py", *words])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "dino.py"), run_name="__main__")
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and message in line and list(tmp_path.iterdir()) == []


def test_recipes_fit_the_data(tmp_path, monkeypatch):
    for words in ([], ["--dataset", "cifar10"], ["--dataset", "cifar10", "--encoder", "small"]):
        args = dino.parse_args(words)
        assert 32 % args.patch_size == 0 and args.teacher_temperature_start <= args.teacher_temperature < 0.1
    common_data = torch.randint(256, (45, 3, 96, 96), dtype=torch.uint8), torch.arange(45) % 2
    data = common.Dataset(*common_data, *common_data, ["a", "b"])
    monkeypatch.setattr(common, "load_dataset", lambda *_: data)
    monkeypatch.setattr(dino, "pretrain", lambda *_: [{"epoch": 1, "seconds": 1.0}])
    monkeypatch.setattr(dino, "evaluate", lambda *_: {})
    monkeypatch.setattr(dino, "save_figures", lambda *_: None)
    words = ["--dataset", "large", "--out-dim", "16", "--local-views", "3", "--out", str(tmp_path / "run")]
    args = dino.main(dino.parse_args(words))["args"]
    assert (args["batch_size"], args["encoder"], args["patch_size"]) == (45, "vit_small", 8)
    assert (args["out_dim"], args["local_views"]) == (16, 3)  # what was typed stays


def test_two_processes_do_what_one_does(two_processes):
    folder, printed = two_processes
    for name in ("center", "gradient"):
        for rank in range(2):
            assert float((folder / f"dino-{name}-{rank}.txt").read_text()) < 1e-10
    models = [torch.load(folder / f"dino-{rank}.pt", weights_only=True) for rank in range(2)]
    assert models[0].keys() == models[1].keys() >= {"center", "teacher.last_layer.weight"}
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
    out = printed[0][printed[0].index("dino on") :]
    assert [out.count(f"epoch {epoch}/") for epoch in (1, 2, 3)] == [1, 1, 1] and "epoch 3/3" in out  # it was resumed
    assert printed[1] == "" and (folder / "dino/summary.json").exists()
