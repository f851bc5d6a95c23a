"""dino.py: the loss, the center, teacher and student, views, official names, pictures, and whole runs on shapes."""

import json
import math
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

import common
import dino

ROOT = Path(__file__).parent.parent


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


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
    healthy = torch.eye(K).expand(2, N, K)  # every picture another logit
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
    assert torch.allclose(teacher["head.mlp.0.weight"], 0.9 * before["head.mlp.0.weight"]
                          + 0.1 * student["head.mlp.0.weight"], atol=1e-6)  # fmt: skip


def test_every_logit_has_a_direction_of_length_one():
    model, args = small_model()
    head = model.student.head
    assert torch.allclose(head.last_layer.weight.norm(dim=1), torch.ones(args.out_dim), atol=1e-6)
    assert not head.last_layer.parametrizations.weight.original0.requires_grad
    assert head.eval()(10 * logits(64, 96)).abs().max() <= 1 + 1e-5  # cosines


def test_schedules_run_from_start_to_end():
    assert dino.cosine(0.996, 1.0, 0.0) == pytest.approx(0.996) and dino.cosine(0.996, 1.0, 1.0) == pytest.approx(1.0)
    assert dino.cosine(0.04, 0.4, 0.5) == pytest.approx(0.22)


# --- Views ----------------------------------------------------------------------------------------------------------


def test_multi_crop_makes_large_and_small_views():
    args = dino.parse_args(["--local-views", "3", "--dataset", "cifar10"])
    images = (255 * torch.rand(5, 3, 32, 32, generator=generator())).byte()
    large, small = dino.multi_crop(images, args, generator())
    assert large.shape == (10, 3, 32, 32) and small.shape == (15, 3, 16, 16)
    assert min(large.min(), small.min()) >= 0 and max(large.max(), small.max()) <= 1
    assert torch.equal(large, dino.two_views(images, args, generator()))
    assert not torch.equal(small[:5], small[5:10])
    args.local_views = 0
    assert len(dino.multi_crop(images, args, generator())) == 1


def test_global_and_local_views_show_their_share_and_have_their_own_blur_and_solarisation(monkeypatch):
    seen = []
    monkeypatch.setattr(dino, "view", lambda x, *rest: seen.append((len(x), *rest[:4])) or x)
    args = dino.parse_args(["--crop", "0.5", "--local-crop", "0.1", "--local-views", "2", "--solarize", "0.2"])
    dino.multi_crop(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), args, generator())
    assert seen == [(4, 32, (0.5, 1.0), 1.0, 0.0), (4, 32, (0.5, 1.0), 0.1, 0.2), (8, 16, (0.1, 0.5), 0.5, 0.0)]


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
    """dino_deitsmall16_pretrain.pth and its siblings, and the head of a full checkpoint."""
    official = {
        "cls_token": (1, 1, D), "pos_embed": (1, 1 + (224 // patch) ** 2, D),
        "patch_embed.proj.weight": (D, 3, patch, patch), "patch_embed.proj.bias": (D,),
        **{f"blocks.{i}.{name}": shape for i in range(12) for name, shape in official_block(D).items()},
        "norm.weight": (D,), "norm.bias": (D,),
    }  # fmt: skip
    head = {
        "mlp.0.weight": (2048, D), "mlp.0.bias": (2048,), "mlp.2.weight": (2048, 2048), "mlp.2.bias": (2048,),
        "mlp.4.weight": (256, 2048), "mlp.4.bias": (256,),
        "last_layer.weight_g": (65536, 1), "last_layer.weight_v": (65536, 256),
    }  # fmt: skip
    args = dino.parse_args(["--dataset", "cifar10", "--out-dim", "65536"])
    with torch.device("meta"):
        for model, names in (
            (dino.VisionTransformer(224, patch, *dino.ENCODERS[name]), official),
            (dino.Head(D, args), head),
        ):
            model.load_state_dict({key: torch.empty(s) for key, s in names.items()}, strict=True, assign=True)
            shapes = sorted(tuple(value.shape) for value in model.state_dict().values())
            assert shapes == sorted(names.values())


def tiny_vit(image_size=16):
    torch.manual_seed(0)
    encoder = dino.VisionTransformer(image_size, 4, D=32, depth=2, heads=2).eval()
    for p in encoder.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator())
    return encoder


def test_features_are_those_of_timm():
    timm = pytest.importorskip("timm")
    encoder = tiny_vit()
    other = timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=0, global_pool=""
    ).eval()
    other.load_state_dict(encoder.state_dict(), strict=True)
    images = torch.rand(3, 3, 16, 16)
    tokens = other(images)  # (3, 17, 32)
    assert torch.allclose(encoder.tokens(images), tokens, atol=1e-5)
    assert torch.allclose(encoder(images), torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1), atol=1e-5)


def test_attention_is_that_of_the_last_block():
    encoder, images = tiny_vit(), torch.rand(3, 3, 16, 16)
    maps = encoder.attention(images)
    assert maps.shape == (3, 2, 16)
    last, inputs = encoder.blocks[-1].attn, []
    last.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    encoder(images)
    q, k, _ = last.qkv(inputs[0]).chunk(3, dim=2)
    for head, c in enumerate((slice(0, 16), slice(16, 32))):
        weights = (q[:, 0, None, c] @ k[:, :, c].mT / 4).softmax(2)  # (3, 1, 17)
        assert torch.allclose(maps[:, head], weights[:, 0, 1:], atol=1e-6)


def test_positions_are_interpolated_for_other_sizes():
    encoder = tiny_vit()
    assert encoder.positions(16) is encoder.pos_embed
    assert encoder.tokens(torch.rand(2, 3, 8, 8)).shape == (2, 5, 32)
    assert encoder.tokens(torch.rand(2, 3, 32, 32)).shape == (2, 65, 32)
    ramp = torch.arange(4.0).expand(4, 4)  # grows from column to column
    encoder.pos_embed.data[:, 1:] = ramp.reshape(1, 16, 1)
    small = encoder.positions(4)[0, 1:, 0].view(2, 2)
    assert torch.equal(encoder.positions(4)[:, 0], encoder.pos_embed[:, 0])
    assert torch.allclose(small[0], small[1]) and small[0, 0] < 1 < 2 < small[0, 1]  # rows alike, columns apart


@pytest.mark.parametrize(
    ("encoder", "D", "outputs"), [("small", 96, 192), ("vit_tiny", 192, 384), ("resnet18", 512, 512)]
)
def test_every_encoder_takes_views_of_both_sizes(encoder, D, outputs):
    args = dino.parse_args(["--encoder", encoder, "--patch-size", "8", "--head-bn", "--out-dim", "16"])
    model = dino.DINO(args)
    assert model.student(torch.rand(4, 3, 32, 32), torch.rand(6, 3, 16, 16)).shape == (10, 16)
    assert model.teacher.D == D and model.teacher.encoder(torch.rand(2, 3, 32, 32)).shape == (2, outputs)


def test_the_stem_needs_a_power_of_two():
    args = dino.parse_args(["--encoder", "small", "--patch-size", "6"])
    with pytest.raises(common.UserError, match="--patch-size 6: must be a power of two with --encoder small"):
        dino.build_backbone(args, 24)


def test_the_stem_sees_neither_brightness_nor_contrast():
    torch.manual_seed(0)
    stem, x = dino.ConvStem(8, 16).eval(), torch.rand(2, 3, 32, 32)
    assert stem(x).shape == (2, 16, 16) and stem(torch.rand(2, 3, 16, 16)).shape == (2, 4, 16)
    shift = torch.tensor([1.0, -2.0, 3.0])[:, None, None]
    assert torch.allclose(stem(x), stem(x + shift), atol=1e-4)
    assert torch.allclose(stem(10 * x), stem(20 * x), atol=0.05)
    left, right = stem(torch.cat([x[:, :, :, :16], 0.5 * torch.ones(2, 3, 32, 16)], 3)), stem(x)
    assert not torch.allclose(left, right, atol=0.05)


# --- Pictures -------------------------------------------------------------------------------------------------------


def test_principal_components_have_the_largest_variance_and_no_correlation():
    x = logits(500, 6) * torch.tensor([1.0, 5, 2, 0.1, 3, 0.5]) + 7
    components = dino.principal_components(x, 3)
    assert components.shape == (500, 3) and components.mean(0).abs().max() < 1e-4
    covariance = components.T.cov()
    variances = covariance.diagonal()
    assert torch.allclose(variances, torch.linalg.eigvalsh(x.T.cov()).flip(0)[:3], rtol=1e-4)
    assert (covariance - variances.diag()).abs().max() < 1e-3


def test_patches_of_a_background_are_black_and_the_same_parts_have_the_same_colour():
    tokens = torch.zeros(3, 8, 8, 5) + 0.01 * logits(3, 8, 8, 5)
    tokens[:, 2:6, 2:6, 0] += 10  # a thing in the middle
    tokens[:, 2:4, 2:6, 1] += 2  # its upper part
    tokens[:, 2:6, 2:4, 2] += 1  # its left part
    colors = dino.pca_colors(tokens.flatten(1, 2)).view(3, 8, 8, 3)
    thing = torch.zeros(8, 8, dtype=torch.bool)
    thing[2:6, 2:6] = True
    assert ((colors == 0).all(3) == ~thing).float().mean() > 0.98
    upper, lower = colors[:, 2:4, 2:6].flatten(0, 2), colors[:, 4:6, 2:6].flatten(0, 2)
    assert ((upper[:, 0] - lower[:, 0].mean()).abs() > 0.8).all() and upper[:, 0].std() < 0.1  # in all pictures


# --- Runs -----------------------------------------------------------------------------------------------------------


def tiny_run(data, out, *flags):
    """main on 200 shapes: two epochs of six steps, with two global and two local views."""
    flags = "--epochs", "2", "--batch-size", "32", "--eval-every", "1", "--local-views", "2", *flags
    return dino.main(dino.parse_args(["--dataset", str(data), "--encoder", "small", "--out", str(out), *flags]))


class Killed(BaseException):
    """What no code catches."""


@pytest.mark.parametrize("step", [3, 9])  # of six an epoch: before and after the first checkpoint of an epoch
def test_a_resumed_run_ends_where_an_unbroken_one_does(few_shapes, tmp_path, step):
    calls, loss = [], dino.dino_loss

    def dino_loss(*args):
        calls.append(1)
        if len(calls) == step:
            raise Killed
        return loss(*args)

    flags = "--teacher-temperature-start", "0.02", "--center-momentum", "0.5"
    unbroken = tiny_run(few_shapes, tmp_path / "unbroken", *flags)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(dino, "dino_loss", dino_loss)
        tiny_run(few_shapes, tmp_path / "run", *flags)
    summary = tiny_run(few_shapes, tmp_path / "run", "--resume", *flags)
    assert summary["resumed_at_epoch"] == int(step == 9) and summary["trained"] == unbroken["trained"]
    a, b = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True) for n in ("run", "unbroken"))
    assert set(a["model"]) == set(b["model"]) and a["model"]["center"].abs().max() > 0
    assert all(torch.equal(value, b["model"][key]) for key, value in a["model"].items())
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]


def test_files_of_a_run(few_shapes, tmp_path):
    summary = tiny_run(few_shapes, tmp_path / "run")
    names = {"args.json", "metrics.jsonl", "summary.json", "checkpoint.pt", "encoder.pt"}
    pictures = {"views.png", "attention.png", "pca.png", "neighbours.png"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == names | pictures
    accuracies = {"knn", "linear_probe", "knn_class_token", "linear_probe_class_token"}
    assert set(summary["trained"]) == set(summary["untrained"]) == accuracies and summary["method"] == "dino"
    for line in summary["history"]:
        assert line["loss"] == pytest.approx(line["entropy"] + line["kl"]) and line["kl"] > 0
        assert 0 <= line["entropy"] <= line["entropy_of_mean"] <= math.log(256)
    encoder = dino.VisionTransformer(32, 8, *dino.ENCODERS["small"])
    encoder.load_state_dict(torch.load(tmp_path / "run/encoder.pt", weights_only=True))
    teacher = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["model"]
    assert all(torch.equal(value, teacher[f"teacher.encoder.{key}"]) for key, value in encoder.state_dict().items())


def test_in_training_local_views_never_reach_the_teacher_and_the_last_layer_waits_an_epoch(few_shapes, tmp_path):
    seen, last, decays = {"student": [], "teacher": []}, [], []
    forward, save, step = dino.Network.forward, dino.Run.save, torch.optim.AdamW.step

    def recorded(network, *views):
        seen["student" if next(network.parameters()).requires_grad else "teacher"].append([len(x) for x in views])
        return forward(network, *views)

    def saved(run, epoch, parts):
        last.append(parts["model"].student.head.last_layer.parametrizations.weight.original1.detach().clone())
        save(run, epoch, parts)

    def stepped(optimizer, *args, **kwargs):
        decays.append([group["weight_decay"] for group in optimizer.param_groups])
        return step(optimizer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dino.Network, "forward", recorded)
        patch.setattr(dino.Run, "save", saved)
        patch.setattr(torch.optim.AdamW, "step", stepped)
        tiny_run(few_shapes, tmp_path / "run")
    assert seen["student"] == [[64, 64]] * 12  # two global views of 32 pictures, and two local ones
    assert seen["teacher"] == [[64]] * 12
    assert torch.equal(last[0], last[1]) and not torch.equal(last[1], last[2])
    matrices, others = zip(*decays, strict=True)
    assert matrices == pytest.approx([dino.cosine(0.04, 0.4, n / 12) for n in range(12)]) and set(others) == {0}


def test_plain_pictures_are_pretrained_on(tmp_path):
    (tmp_path / "album").mkdir()
    for i, image in enumerate(common.load_dataset("shapes").train_images[:40]):
        torchvision.utils.save_image(image / 255, tmp_path / f"album/{i}.png")
    summary = tiny_run(tmp_path / "album", tmp_path / "run", "--data-dir", str(tmp_path / "cache"), "--epochs", "1")
    assert summary["trained"] == summary["untrained"] == {} and (tmp_path / "run/attention.png").exists()


def test_a_resnet_has_one_kind_of_features_and_no_attention(few_shapes, tmp_path):
    flags = "--encoder", "resnet18", "--epochs", "1", "--image-size", "16", "--patch-size", "8"
    summary = tiny_run(few_shapes, tmp_path / "run", *flags)
    assert set(summary["trained"]) == {"knn", "linear_probe"} and not (tmp_path / "run/attention.png").exists()
    resnet = torchvision.models.resnet18()
    weights = torch.load(tmp_path / "run/encoder.pt", weights_only=True)
    weights.pop("conv1.weight")  # the stem for small pictures
    assert set(resnet.load_state_dict(weights, strict=False).missing_keys) == {"conv1.weight", "fc.weight", "fc.bias"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--patch-size", "5"], "--patch-size 5: does not divide pictures of 32 x 32"),
        (["--local-views", "2", "--local-crop", "0.9"], "--local-crop 0.9: must not be above --crop 0.8"),
        (["--teacher-temperature", "0"], "--teacher-temperature 0.0: must be at least 0.001"),
        (["--momentum", "1.1"], "--momentum 1.1: must be from 0 to 1"),
        (["--encoder", "vit_giant"], "--encoder: invalid choice: 'vit_giant'"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dino.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "dino.py"), run_name="__main__")
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and message in line and list(tmp_path.iterdir()) == []


def test_recipes_and_help(capsys):
    for recipe in dino.RECIPES:
        dino.parse_args(["--dataset", *recipe.split()])  # every value in its range
    with pytest.raises(SystemExit):
        dino.parse_args(["--help"])
    assert "--teacher-temperature" in capsys.readouterr().out


def test_copied_with_common_alone_it_learns_on_shapes(tmp_path):
    for name in ("dino.py", "common.py"):
        shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, "-W", "error", "dino.py", "--epochs", "4", "--eval-every", "4", "--out", "run"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and result.stderr == ""
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["trained"]["linear_probe"] > summary["untrained"]["linear_probe"] + 0.03
    last = summary["history"][-1]
    assert last["entropy_of_mean"] - last["entropy"] > 0.5  # 0 in a collapse
