"""mae.py: patches, masks, the loss, what the encoder sees, official names, and whole runs on shapes."""

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
from PIL import Image

import common
import mae

ROOT = Path(__file__).parent.parent


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small_model(**options):
    torch.manual_seed(0)
    return mae.MaskedAutoencoder(
        16, 4, D=32, depth=2, heads=2, decoder_dim=32, decoder_depth=1, decoder_heads=1, **options
    )


# --- Patches and masks ----------------------------------------------------------------------------------------------


def test_unpatchify_is_the_inverse_of_patchify():
    images = torch.rand(2, 3, 12, 12)
    patches = mae.patchify(images, 4)
    assert patches.shape == (2, 9, 48)
    assert torch.equal(patches[0, 5].view(4, 4, 3), images[0, :, 4:8, 8:12].permute(1, 2, 0))  # row 1, column 2
    assert torch.equal(mae.unpatchify(patches, 4), images)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("sampling", ["random", "block", "grid"])
def test_exactly_the_asked_share_is_masked(sampling, ratio):
    tokens = torch.rand(50, 64, 8)
    noise = mae.mask_noise(sampling, 50, 8, ratio, generator())
    visible, mask, ids_restore = mae.random_masking(tokens, ratio, noise)
    assert (mask.sum(1) == round(64 * ratio)).all() and visible.shape == (50, 64 - round(64 * ratio), 8)
    order = ids_restore.argsort(1)  # visible tokens first
    assert torch.equal(visible, torch.stack([t[o][: visible.shape[1]] for t, o in zip(tokens, order, strict=True)]))
    removed = torch.zeros(50, 64 - visible.shape[1], 8)
    restored = torch.cat([visible, removed], 1).gather(1, ids_restore[:, :, None].expand(-1, -1, 8))
    assert torch.equal(restored, tokens * (1 - mask[:, :, None]))


def test_every_image_has_another_random_mask_and_every_patch_is_masked_as_often():
    noise = mae.mask_noise("random", 2000, 8, 0.75, generator())
    _, mask, _ = mae.random_masking(torch.zeros(2000, 64, 1), 0.75, noise)
    assert len(mask.unique(dim=0)) == 2000
    assert (mask.mean(0) - 0.75).abs().max() < 5 * math.sqrt(0.75 * 0.25 / 2000)


def test_a_grid_keeps_one_patch_of_every_four():
    noise = mae.mask_noise("grid", 3, 8, 0.75, generator())
    _, mask, _ = mae.random_masking(torch.zeros(3, 64, 1), 0.75, noise)
    kept = 1 - mask.view(3, 4, 2, 4, 2)
    assert (kept.sum((2, 4)) == 1).all() and (kept[:, :, 0, :, 0] == 1).all()


def test_blocks_are_in_one_piece_where_random_masks_are_not():
    def borders(sampling):  # the share of neighbours of which one is masked and the other is not
        noise = mae.mask_noise(sampling, 200, 8, 0.5, generator())
        mask = mae.random_masking(torch.zeros(200, 64, 1), 0.5, noise)[1].view(200, 8, 8)
        return ((mask[:, 1:] != mask[:, :-1]).float().mean() + (mask[:, :, 1:] != mask[:, :, :-1]).float().mean()) / 2

    assert abs(borders("random") - 0.5) < 0.02 and borders("block") < 0.3


# --- Loss -----------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_lecture_and_ignores_visible_patches():
    prediction, targets = torch.randn(2, 3, 5, 12, generator=generator())
    mask = torch.tensor([[1.0, 0, 1, 1, 0], [0, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    naive, masked = 0.0, 0
    for b in range(3):
        for i in range(5):
            if mask[b, i]:
                naive += sum((x - y) ** 2 for x, y in zip(targets[b, i], prediction[b, i], strict=True)).item() / 12
                masked += 1
    loss = mae.reconstruction_loss(prediction, targets, mask)
    assert loss.item() == pytest.approx(naive / masked, rel=1e-5)
    changed = torch.where(mask[:, :, None] == 1, prediction, 100.0)
    assert mae.reconstruction_loss(changed, targets, mask) == loss
    prediction.requires_grad_()
    mae.reconstruction_loss(prediction, targets, mask).backward()
    assert torch.equal(prediction.grad.abs().sum(2) > 0, mask == 1)


def test_normalised_targets_have_mean_zero_and_deviation_one():
    images = torch.rand(2, 3, 8, 8, generator=generator())
    assert torch.equal(mae.patch_targets(images, 4, "pixel"), mae.patchify(images, 4))
    targets = mae.patch_targets(images, 4, "norm-pixel")
    assert targets.mean(2).abs().max() < 1e-5 and (targets.std(2) - 1).abs().max() < 1e-3
    assert torch.allclose(targets, mae.patch_targets(3 * images + 1, 4, "norm-pixel"), atol=1e-3)
    flat = mae.patch_targets(torch.ones(1, 3, 8, 8), 4, "norm-pixel")
    assert flat.abs().max() < 1e-3


# --- What the encoder sees ------------------------------------------------------------------------------------------


def test_the_encoder_never_sees_a_masked_patch():
    model, images = small_model(), torch.rand(2, 3, 16, 16)
    noise = mae.mask_noise("random", 2, 4, 0.75, generator())
    latent, mask, _ = model.encode(images, 0.75, noise)
    hidden = mae.unpatchify(mask[:, :, None].expand(-1, -1, 48), 4)
    assert torch.equal(model.encode(torch.where(hidden == 1, 9.0, images), 0.75, noise)[0], latent)
    assert not torch.allclose(model.encode(torch.where(hidden == 0, 9.0, images), 0.75, noise)[0], latent)


def test_with_mask_tokens_the_encoder_sees_no_masked_pixel_either():
    model, images = small_model(encode_mask_tokens=True), torch.rand(2, 3, 16, 16)
    noise = mae.mask_noise("random", 2, 4, 0.75, generator())
    latent, mask, _ = model.encode(images, 0.75, noise)
    assert latent.shape == (2, 17, 32)
    hidden = mae.unpatchify(mask[:, :, None].expand(-1, -1, 48), 4)
    assert torch.equal(model.encode(torch.where(hidden == 1, 9.0, images), 0.75, noise)[0], latent)


@pytest.mark.parametrize(("ratio", "tokens"), [(0.25, 13), (0.5, 9), (0.75, 5)])
def test_the_encoder_works_on_as_many_tokens_as_there_are_visible_patches(ratio, tokens):
    for mask_tokens, expected in ((False, tokens), (True, 17)):
        model, seen = small_model(encode_mask_tokens=mask_tokens), []
        for block in (*model.blocks, *model.decoder_blocks):
            block.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0].shape[1]))
        prediction, mask = model(torch.rand(2, 3, 16, 16), ratio, torch.rand(2, 16))
        assert seen == [expected, expected, 17]
        assert prediction.shape == (2, 16, 48) and (mask.sum(1) == 16 * ratio).all()


def test_mask_tokens_take_the_places_of_removed_patches():
    """Without blocks and positions, a decoder predicts each patch from its own token alone."""
    model, noise = small_model(), torch.rand(2, 16, generator=generator())
    model.decoder_blocks = torch.nn.ModuleList()
    model.decoder_pos_embed.data.zero_()
    prediction, mask = model(torch.rand(2, 3, 16, 16), 0.75, noise)
    assert (prediction[mask == 1] == prediction[mask == 1][0]).all()
    assert len(prediction[mask == 0].unique(dim=0)) == 8


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


OFFICIAL = {  # mae_visualize_vit_base.pth: patches of 16 of 224 pixels, 12 blocks and 8 in the decoder
    "cls_token": (1, 1, 768), "pos_embed": (1, 197, 768), "mask_token": (1, 1, 512),
    "patch_embed.proj.weight": (768, 3, 16, 16), "patch_embed.proj.bias": (768,),
    **{f"blocks.{i}.{name}": shape for i in range(12) for name, shape in official_block(768).items()},
    "norm.weight": (768,), "norm.bias": (768,),
    "decoder_embed.weight": (512, 768), "decoder_embed.bias": (512,), "decoder_pos_embed": (1, 197, 512),
    **{f"decoder_blocks.{i}.{name}": shape for i in range(8) for name, shape in official_block(512).items()},
    "decoder_norm.weight": (512,), "decoder_norm.bias": (512,),
    "decoder_pred.weight": (768, 512), "decoder_pred.bias": (768,),
}  # fmt: skip


def test_official_weights_load_strictly():
    with torch.device("meta"):
        model = mae.MaskedAutoencoder(224, 16, *mae.ENCODERS["vit_base"])
        model.load_state_dict({name: torch.empty(shape) for name, shape in OFFICIAL.items()}, strict=True, assign=True)
        encoder = mae.VisionTransformer(224, 16, *mae.ENCODERS["vit_base"])
    decoder = {"mask_token"} | {name for name in OFFICIAL if name.startswith("decoder")}
    assert set(encoder.state_dict()) == set(OFFICIAL) - decoder


def test_features_are_those_of_timm():
    timm = pytest.importorskip("timm")
    encoder = small_model().encoder().eval()
    for p in encoder.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator())
    other = timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=0, global_pool=""
    ).eval()
    other.load_state_dict(encoder.state_dict(), strict=True)
    images = torch.rand(3, 3, 16, 16)
    tokens = other(images)  # (3, 17, 32)
    assert torch.allclose(encoder(images), torch.stack([tokens[:, 0], tokens[:, 1:].mean(1)], 1), atol=1e-5)


def test_attention_is_that_of_the_formula():
    torch.manual_seed(0)
    attention, x = mae.Attention(8, 2), torch.randn(2, 5, 8)
    q, k, v = attention.qkv(x).chunk(3, dim=2)  # (2, 5, 8) each, four channels a head
    heads = []
    for c in (slice(0, 4), slice(4, 8)):
        weights = (q[:, :, c] @ k[:, :, c].mT / math.sqrt(4)).softmax(2)
        heads.append(weights @ v[:, :, c])
    assert torch.allclose(attention(x), attention.proj(torch.cat(heads, 2)), atol=1e-6)


def test_positions_are_sines_and_cosines_of_column_and_row():
    D, side = 8, 3
    positions = mae.sincos_positions(side, D)
    assert positions.shape == (1, 10, D) and (positions[0, 0] == 0).all()
    for row in range(side):
        for column in range(side):
            expected = []
            for place in (column, row):
                angles = [place / 10000 ** (i / (D / 4)) for i in range(D // 4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            assert torch.allclose(positions[0, 1 + row * side + column], torch.tensor(expected), atol=1e-6)


# --- Optimizer ------------------------------------------------------------------------------------------------------


def test_learning_rates_fall_from_block_to_block():
    args = mae.parse_args([])
    classifier = mae.Classifier(small_model().encoder(), 10)
    optimizer, _ = mae.layerwise_adamw(classifier, 1e-3, 100, args, (0.9, 0.999), layer_decay=0.5)
    rates = {id(p): (g["initial_lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    encoder = classifier.encoder
    for p, scale, decay in (
        (classifier.head.weight, 1, 0.05),
        (classifier.head.bias, 1, 0),
        (classifier.fc_norm.weight, 1, 0),
        (encoder.blocks[1].attn.qkv.weight, 0.5, 0.05),
        (encoder.blocks[0].mlp.fc1.weight, 0.25, 0.05),
        (encoder.blocks[0].norm1.bias, 0.25, 0),
        (encoder.patch_embed.proj.weight, 0.125, 0.05),
        (encoder.cls_token, 0.125, 0.05),
    ):
        assert rates[id(p)] == pytest.approx((1e-3 * scale, decay))
    assert id(encoder.pos_embed) not in rates
    optimizer, _ = mae.layerwise_adamw(small_model(), 1.5e-4, 100, args, (0.9, 0.95))
    assert {g["initial_lr"] for g in optimizer.param_groups} == {1.5e-4} and len(optimizer.param_groups) == 2


# --- Runs -----------------------------------------------------------------------------------------------------------


def tiny_run(data, out, *flags):
    """main on a few shapes, in two short epochs of large patches."""
    flags = "--eval-every", "1", "--patch-size", "8", "--epochs", "2", "--batch-size", "32", *flags
    return mae.main(mae.parse_args(["--dataset", str(data), "--encoder", "small", "--out", str(out), *flags]))


def test_files_of_a_run_and_resume(few_shapes, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    save = mae.Run.save

    def killed(run, epoch, parts):
        if epoch == 2:
            raise Killed
        save(run, epoch, parts)

    unbroken = tiny_run(few_shapes, tmp_path / "unbroken")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(mae.Run, "save", killed)
        tiny_run(few_shapes, tmp_path / "run")
    summary = tiny_run(few_shapes, tmp_path / "run", "--resume")
    assert summary["resumed_at_epoch"] == 1 and summary["method"] == "mae"
    names = {"args.json", "metrics.jsonl", "summary.json", "checkpoint.pt", "encoder.pt"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == names | {"reconstruction.png", "reconstruction.pt"}
    a, b = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True)["model"] for n in ("run", "unbroken"))
    assert all(torch.equal(value, b[key]) for key, value in a.items())
    assert summary["trained"] == unbroken["trained"] and summary["untrained"] == unbroken["untrained"]
    accuracies = {"knn", "linear_probe", "knn_class_token", "linear_probe_class_token"}
    assert set(summary["trained"]) == set(summary["untrained"]) == accuracies
    assert "knn" in summary["history"][0] and summary["history"][0]["loss"] > 0
    sheets = [(tmp_path / n / "reconstruction.png").read_bytes() for n in ("run", "unbroken")]
    assert sheets[0] == sheets[1]  # the resumed run shows the first epoch too
    encoder = mae.VisionTransformer(32, 8, *mae.ENCODERS["small"])
    encoder.load_state_dict(torch.load(tmp_path / "run/encoder.pt", weights_only=True))
    assert encoder.state_dict().keys() < a.keys()


def test_fine_tuned_against_trained_from_scratch(few_shapes, tmp_path, monkeypatch):
    calls = []

    def train_end_to_end(encoder, data, rows, args, layer_decay):
        calls.append((encoder.state_dict(), len(rows), layer_decay))
        return len(calls) / 100

    monkeypatch.setattr(mae, "train_end_to_end", train_end_to_end)
    summary = tiny_run(few_shapes, tmp_path / "run", "--labels", "3", "1.0", "--fine-tune", "--epochs", "1")
    assert [(rows, layer_decay) for _, rows, layer_decay in calls] == [(30, 0.75), (30, 1.0), (200, 0.75), (200, 1.0)]
    trained = torch.load(tmp_path / "run/encoder.pt", weights_only=True)
    torch.manual_seed(0)
    scratch = mae.build_model(mae.parse_args(["--patch-size", "8"]), 32).encoder().state_dict()
    for (weights, *_), expected in zip(calls, (trained, scratch) * 2, strict=True):
        assert all(torch.equal(value, expected[name]) for name, value in weights.items())
    row = summary["semi_supervised"][1]
    assert row["labels"] == 200 and row["fine_tuned"] == 0.03 and row["from_scratch"] == 0.04
    assert {"knn", "linear_probe"} < set(row)


def test_fine_tuning_learns_from_its_rows_alone_and_leaves_the_encoder_as_it_was():
    data = common.load_dataset("shapes")
    rows = torch.arange(64)
    data.train_labels[:] = 3
    data.train_labels[rows] = torch.arange(64) % 2
    data.test_images, data.test_labels = data.train_images[rows], data.train_labels[rows]
    args = mae.parse_args(["--patch-size", "8", "--fine-tune-epochs", "2", "--batch-size", "64", "--augment", "none"])
    torch.manual_seed(0)
    encoder = mae.build_model(args, 32).encoder()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    assert mae.train_end_to_end(encoder, data, rows, args, 1.0) > 0.9  # by heart
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_augmentations_of_the_table():
    images = common.load_dataset("shapes").train_images[:64]
    views = {
        name: mae.augmented(images, mae.parse_args(["--augment", name]), generator())
        for name in ("none", "crop-fixed", "crop", "crop-color")
    }
    assert torch.equal(views["none"], images / 255)
    assert all(x.shape == images.shape and 0 <= x.min() and x.max() <= 1 for x in views.values())
    unmoved = [(views["crop-fixed"] - x).abs().amax((1, 2, 3)) < 1e-6 for x in (images / 255, images.flip(3) / 255)]
    assert sum(unmoved).sum() < 5  # one of 81 places is the old one
    assert torch.equal(views["crop"], common.random_resized_crop(images / 255, 32, generator(), (0.5, 1.0)))
    assert not torch.equal(views["crop-color"], views["crop"])


def test_a_reconstruction_shows_the_visible_patches_and_the_models_own_others():
    images = common.load_dataset("shapes").train_images[:4]
    for target in ("pixel", "norm-pixel"):
        args = mae.parse_args(["--target", target])
        model = mae.build_model(args, 32)
        masked, completed = mae.reconstruct(model, images, args)
        hidden = (mae.patchify(masked, 4) == 0.5).all(2)  # (4, 64)
        assert (hidden.sum(1) == 48).all()
        patches, original = mae.patchify(completed, 4), mae.patchify(images / 255, 4)
        assert torch.allclose(patches[~hidden], original[~hidden], atol=1e-6)
        model.decoder_pred.weight.data.zero_()  # predicts 0: the mean of the data, or of each patch
        patches = mae.patchify(mae.reconstruct(model, images, args)[1], 4)
        if target == "pixel":
            assert torch.allclose(patches[hidden].view(-1, 16, 3), torch.tensor(common.MEAN), atol=1e-6)
        else:  # one value in normalised pixels
            x = common.normalize(mae.unpatchify(patches, 4))
            mean = mae.patchify(common.normalize(images / 255), 4).mean(2, keepdim=True)
            assert torch.allclose(mae.patchify(x, 4)[hidden], mean.expand(-1, -1, 48)[hidden], atol=1e-4)


def test_plain_pictures_are_pretrained_on(tmp_path):
    (tmp_path / "album").mkdir()
    for i, image in enumerate(common.load_dataset("shapes").train_images[:40]):
        torchvision.utils.save_image(image / 255, tmp_path / f"album/{i}.png")
    summary = tiny_run(tmp_path / "album", tmp_path / "run", "--data-dir", str(tmp_path / "cache"), "--epochs", "1")
    assert summary["trained"] == summary["untrained"] == {}
    with Image.open(tmp_path / "run/reconstruction.png") as sheet:
        assert sheet.width > 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--patch-size", "5"], "--patch-size 5: does not divide pictures of 32 x 32"),
        (["--mask-ratio", "1"], "--mask-ratio 1.0: must be from 0.01 to 0.99"),
        (["--mask-ratio", "0.01", "--patch-size", "16"], "--mask-ratio 0.01: must remove one of the 4 patches"),
        (["--decoder-dim", "100"], "--decoder-dim 100: must be a multiple of 4 and of its 3 attention heads"),
        (["--target", "dvae"], "--target: invalid choice: 'dvae'"),
        (["--layer-decay", "0"], "--layer-decay 0.0: must be from 0.01 to 1"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mae.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "mae.py"), run_name="__main__")
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and message in line and list(tmp_path.iterdir()) == []


def test_recipes_and_help(capsys):
    for recipe in mae.RECIPES:
        mae.parse_args(["--dataset", *recipe.split()])  # every value in its range
    with pytest.raises(SystemExit):
        mae.parse_args(["--help"])
    assert "--mask-ratio" in capsys.readouterr().out


def test_copied_with_common_alone_it_learns_on_shapes(tmp_path):
    for name in ("mae.py", "common.py"):
        shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, "-W", "error", "mae.py", "--epochs", "4", "--out", "run"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0 and result.stderr == ""
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["trained"]["linear_probe"] > summary["untrained"]["linear_probe"] + 0.03
    losses = [line["loss"] for line in summary["history"]]
    assert losses[3] < losses[2] < losses[1] < losses[0]
