"""mae.py and simmim.py: masks, losses, what the encoder sees, official names, and whole runs."""

import functools
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
    assert_same_in_both,
    files,
    killed_at,
    load,
    save_shapes,
    spy,
    train_and_keep,
    train_and_resume,
)
from PIL import Image
from torch import nn

import common
import mae
from relatives import simmim

pytestmark = pytest.mark.usefixtures("shapes_once")
RESULTS = FILES | {"reconstruction.png"}
PARTS = {"build_model": simmim.build_simmim, "loss_of": simmim.l1_loss}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small_model():
    """Width 32, 2 blocks, 2 heads; decoder 32, 1, 1; 16 patches."""
    torch.manual_seed(0)
    return mae.MaskedAutoencoder(16, 4, 32, 2, 2, 32, 1, 1)


def words(data, out, *flags):
    """A run on a few shapes, in two short epochs of large patches."""
    small = ["--encoder", "small", "--epochs", "2", "--batch-size", "32"]
    small += ["--patch-size", "8", "--eval-every", "1"]
    return ["--dataset", str(data), *small, "--out", str(out), *map(str, flags)]


def small_run(data, out, *flags):
    return mae.main(mae.parse_args(words(data, out, *flags)))


def resumed(run, *flags):
    return mae.main(mae.parse_args(["--resume", str(run), *map(str, flags)]))


def simmim_args(*flags):
    return mae.parse_args(list(map(str, flags)), simmim.Args, simmim.__doc__, simmim.SHAPES)


@pytest.fixture(scope="module")
def unbroken(tiny_shapes, tmp_path_factory):
    """The folder of a run that nothing has stopped. It is read only."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    small_run(tiny_shapes, folder)
    return folder


# ==================================================================================================
# Patches and masks
# ==================================================================================================


def test_unpatchify_is_the_inverse_of_patchify():
    images = torch.rand(2, 3, 12, 12)
    patches = mae.patchify(images, 4)
    assert patches.shape == (2, 9, 48)
    expected = images[0, :, 4:8, 8:12].permute(1, 2, 0)  # row 1, column 2
    assert torch.equal(patches[0, 5].view(4, 4, 3), expected)
    assert torch.equal(mae.unpatchify(patches, 4), images)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75, 0.9])
def test_exactly_the_asked_fraction_is_masked(ratio):
    tokens = torch.rand(50, 64, 8)
    noise = torch.rand(50, 64, generator=generator())
    visible, mask, ids_restore = mae.random_masking(tokens, ratio, noise)
    keep = 64 - round(64 * ratio)
    assert visible.shape == (50, keep, 8)
    assert (mask.sum(1) == 64 - keep).all()
    order = ids_restore.argsort(1)  # visible tokens first
    for i in range(50):
        assert torch.equal(visible[i], tokens[i, order[i, :keep]])
    padded = torch.cat([visible, torch.zeros(50, 64 - keep, 8)], dim=1)
    restored = padded.gather(1, ids_restore[:, :, None].expand(-1, -1, 8))
    assert torch.equal(restored, tokens * (1 - mask[:, :, None]))


def test_every_image_has_a_mask_of_its_own():
    noise = torch.rand(2000, 64, generator=generator())
    _, mask, _ = mae.random_masking(torch.zeros(2000, 64, 1), 0.75, noise)
    assert len(mask.unique(dim=0)) == 2000
    assert (mask.mean(0) - 0.75).abs().max() < 5 * math.sqrt(0.75 * 0.25 / 2000)


# ==================================================================================================
# Loss
# ==================================================================================================


def naive_loss(prediction, targets, mask, error):
    """Over all masked patches: the mean error of a value."""
    errors = []
    for b, i in mask.nonzero().tolist():
        pairs = zip(targets[b, i].tolist(), prediction[b, i].tolist(), strict=True)
        errors += [error(x - y) for x, y in pairs]
    return sum(errors) / len(errors)


LOSSES = [(mae, "reconstruction_loss", lambda x: x * x), (simmim, "l1_loss", abs)]


@pytest.mark.parametrize(("script", "name", "error"), LOSSES)
def test_the_loss_is_the_papers_and_ignores_visible_patches(script, name, error):
    loss_of = getattr(script, name)
    prediction, targets = torch.randn(2, 3, 5, 12, generator=generator())
    mask = torch.tensor([[1.0, 0, 1, 1, 0], [0, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    loss = loss_of(prediction, targets, mask)
    assert loss.item() == pytest.approx(naive_loss(prediction, targets, mask, error), rel=1e-5)
    changed = torch.where(mask[:, :, None] == 1, prediction, 100.0)
    assert loss_of(changed, targets, mask) == loss
    prediction.requires_grad_()
    loss_of(prediction, targets, mask).backward()
    assert torch.equal(prediction.grad.abs().sum(2) > 0, mask == 1)


def test_normalized_targets_have_mean_zero_and_deviation_one():
    images = torch.rand(2, 3, 8, 8, generator=generator())
    assert torch.equal(mae.patch_targets(images, 4, "pixel"), mae.patchify(images, 4))
    targets = mae.patch_targets(images, 4, "norm-pixel")
    assert targets.mean(2).abs().max() < 1e-5
    assert (targets.std(2) - 1).abs().max() < 1e-3
    scaled = mae.patch_targets(3 * images + 1, 4, "norm-pixel")
    torch.testing.assert_close(targets, scaled, atol=1e-3, rtol=0)
    flat = mae.patch_targets(torch.ones(1, 3, 8, 8), 4, "norm-pixel")
    assert flat.abs().max() < 1e-3


def test_predicting_means_scores_the_variance():
    images = torch.rand(2, 3, 16, 16, generator=generator())
    mask = torch.ones(2, 16)
    targets = mae.patch_targets(images, 4, "norm-pixel")
    chance = mae.reconstruction_loss(torch.zeros_like(targets), targets, mask)
    assert chance.item() == pytest.approx(1, abs=0.05)
    targets = mae.patch_targets(images, 4, "pixel")
    means = targets.mean(2, keepdim=True).expand_as(targets)
    variance = targets.var(2, correction=0).mean().item()
    assert mae.reconstruction_loss(means, targets, mask).item() == pytest.approx(variance)


def test_a_step_masks_predicts_and_compares():
    images = torch.randint(256, (6, 3, 32, 32), generator=generator(), dtype=torch.uint8)
    args = mae.parse_args(["--patch-size", "8", "--mask-ratio", "0.5", "--crop", "1"])
    seen = {}

    def network(x, mask_ratio, noise):
        seen.update(x=x, noise=noise, ratio=mask_ratio)
        _, mask, _ = mae.random_masking(torch.zeros(6, 16, 1), mask_ratio, noise)
        return torch.zeros(6, 16, 192, requires_grad=True), mask

    losses = []
    terms = mae.training_step(network, images, args, generator(), 0.0, losses.append)
    assert seen["ratio"] == 0.5
    assert seen["noise"].shape == (6, 16)
    _, mask, _ = mae.random_masking(torch.zeros(6, 16, 1), 0.5, seen["noise"])
    targets = mae.patch_targets(seen["x"], 8, "pixel")
    expected = mae.reconstruction_loss(torch.zeros(6, 16, 192), targets, mask)
    assert losses == [terms["loss"]]
    assert terms["loss"].item() == pytest.approx(expected.item())


# ==================================================================================================
# What the encoder sees
# ==================================================================================================


def test_the_encoder_never_sees_a_masked_patch():
    model = small_model()
    images = torch.rand(2, 3, 16, 16)
    noise = torch.rand(2, 16, generator=generator())
    prediction, mask = model(images, 0.75, noise)
    hidden = mae.unpatchify(mask[:, :, None].expand(-1, -1, 48), 4) == 1
    assert torch.equal(model(torch.where(hidden, 9.0, images), 0.75, noise)[0], prediction)
    assert not torch.allclose(model(torch.where(hidden, images, 9.0), 0.75, noise)[0], prediction)


@pytest.mark.parametrize(("ratio", "tokens"), [(0.25, 13), (0.5, 9), (0.75, 5)])
def test_the_encoder_computes_visible_patches_only(ratio, tokens):
    model = small_model()
    seen = []
    for block in (*model.encoder.blocks, *model.decoder_blocks):
        block.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[1]))
    prediction, mask = model(torch.rand(2, 3, 16, 16), ratio, torch.rand(2, 16))
    assert seen == [tokens, tokens, 17]
    assert prediction.shape == (2, 16, 48)
    assert (mask.sum(1) == 16 * ratio).all()


def test_mask_tokens_take_the_places_of_removed_patches():
    """Without blocks and positions, a decoder predicts each patch from its own token only."""
    model = small_model()
    noise = torch.rand(2, 16, generator=generator())
    model.decoder_blocks = nn.ModuleList()
    prediction, mask = model(torch.rand(2, 3, 16, 16), 0.75, noise)
    assert len(prediction[0][mask[0] == 1].unique(dim=0)) == 12  # by their positions
    model.decoder_pos_embed.data.zero_()
    prediction, mask = model(torch.rand(2, 3, 16, 16), 0.75, noise)
    assert (prediction[mask == 1] == prediction[mask == 1][0]).all()
    assert len(prediction[mask == 0].unique(dim=0)) == 8


# ==================================================================================================
# SimMIM
# ==================================================================================================


@pytest.mark.parametrize(("side", "ratio"), [(8, 0.6), (8, 0.5), (7, 0.6)])
def test_simmim_masks_whole_blocks(side, ratio):
    noise = torch.rand(5, side**2, generator=generator())
    mask = simmim.block_masking(noise, ratio).unflatten(1, (side, side))
    blocks = mask[:, ::2, ::2]
    grown = blocks.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(mask, grown[:, :side, :side])
    assert (blocks.flatten(1).sum(1) == math.ceil(ratio * blocks[0].numel())).all()
    assert not torch.equal(mask[0], mask[1])


def test_simmim_sees_nothing_of_masked_patches():
    torch.manual_seed(0)
    model = simmim.SimMIM(16, 4, 24, 2, 3)
    noise = torch.rand(2, 16)
    x = torch.rand(2, 3, 16, 16)
    prediction, mask = model(x, 0.5, noise)
    hidden = mae.unpatchify(mask[:, :, None].expand(-1, -1, 48), 4)
    assert torch.equal(prediction, model(torch.where(hidden, 7.0, x), 0.5, noise)[0])
    assert not torch.equal(prediction, model(torch.where(hidden, x, 7.0), 0.5, noise)[0])


@pytest.mark.parametrize(
    ("size", "patch", "ratio", "blocks"),
    [(32, 16, 0.6, 1), (32, 8, 0.8, 4), (32, 8, 0.76, 4), (32, 4, 0.95, 16)],
)
def test_simmim_never_masks_all(size, patch, ratio, blocks):
    args = simmim_args("--patch-size", patch, "--mask-ratio", ratio)
    message = f"--mask-ratio {ratio}: leaves no block of 2 x 2 patches visible, of {blocks};"
    with pytest.raises(common.UserError, match=message):
        simmim.build_simmim(args, size)


def test_simmim_leaves_a_block_where_it_can():
    args = simmim_args("--patch-size", 8, "--mask-ratio", 0.75)
    simmim.build_simmim(args, 32)
    mask = simmim.block_masking(torch.rand(5, 16), 0.75)
    assert (mask.sum(1) == 12).all()


# ==================================================================================================
# Official names
# ==================================================================================================


def official_block(prefix, D):
    """Names and shapes of a block of width D in the authors' code and in timm."""
    shapes = {
        "norm1.weight": (D,), "norm1.bias": (D,),
        "attn.qkv.weight": (3 * D, D), "attn.qkv.bias": (3 * D,),
        "attn.proj.weight": (D, D), "attn.proj.bias": (D,),
        "norm2.weight": (D,), "norm2.bias": (D,),
        "mlp.fc1.weight": (4 * D, D), "mlp.fc1.bias": (4 * D,),
        "mlp.fc2.weight": (D, 4 * D), "mlp.fc2.bias": (D,),
    }  # fmt: skip
    return {prefix + name: shape for name, shape in shapes.items()}


def official_encoder(D, blocks, patch_size, tokens):
    shapes = {
        "cls_token": (1, 1, D), "pos_embed": (1, tokens, D),
        "patch_embed.proj.weight": (D, 3, patch_size, patch_size), "patch_embed.proj.bias": (D,),
        "norm.weight": (D,), "norm.bias": (D,),
    }  # fmt: skip
    for i in range(blocks):
        shapes |= official_block(f"blocks.{i}.", D)
    return shapes


def official_decoder(D, blocks, width, patch_size, tokens):
    shapes = {
        "mask_token": (1, 1, D), "decoder_pos_embed": (1, tokens, D),
        "decoder_embed.weight": (D, width), "decoder_embed.bias": (D,),
        "decoder_norm.weight": (D,), "decoder_norm.bias": (D,),
        "decoder_pred.weight": (3 * patch_size**2, D), "decoder_pred.bias": (3 * patch_size**2,),
    }  # fmt: skip
    for i in range(blocks):
        shapes |= official_block(f"decoder_blocks.{i}.", D)
    return shapes


def test_official_weights_load_strictly():
    """Names and shapes are those of mae_visualize_vit_base.pth."""
    encoder = official_encoder(768, 12, 16, 197)
    shapes = official_decoder(512, 8, 768, 16, 197)
    shapes |= {f"encoder.{name}": shape for name, shape in encoder.items()}
    with torch.device("meta"):
        model = mae.MaskedAutoencoder(224, 16, *mae.ENCODERS["vit_base"])
        weights = {name: torch.empty(shape) for name, shape in shapes.items()}
        model.load_state_dict(weights, strict=True, assign=True)
    assert set(model.encoder.state_dict()) == set(encoder)


def test_a_run_begins_with_the_authors_weights(tiny_shapes, tmp_path):
    """Their files wrap the encoder; timm's have a classifier."""
    shapes = official_encoder(96, 4, 8, 17)
    weights = {name: torch.rand(shape, generator=generator()) for name, shape in shapes.items()}
    head = {"head.weight": torch.zeros(2, 96), "head.bias": torch.zeros(2)}
    contents = {"authors": {"model": weights}, "timm": weights | head}
    for name, content in contents.items():
        torch.save(content, tmp_path / f"{name}.pth")
        flags = "--init", tmp_path / f"{name}.pth", "--epochs", 0
        summary = small_run(tiny_shapes, tmp_path / name, *flags)
        assert summary["untrained"].keys() == summary["trained"].keys()
        assert_same(load(tmp_path / name / "encoder.pt"), weights)


def test_features_are_those_of_timm():
    encoder = small_model().encoder.eval()
    for p in encoder.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator())
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    other = timm.models.VisionTransformer(**sizes, num_classes=0, global_pool="").eval()
    other.load_state_dict(encoder.state_dict(), strict=True)
    images = torch.rand(3, 3, 16, 16)
    tokens = other(images)  # (3, 17, 32)
    torch.testing.assert_close(encoder.tokens(images), tokens, atol=1e-5, rtol=1e-5)
    expected = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)
    torch.testing.assert_close(encoder(images), expected, atol=1e-5, rtol=1e-5)
    patch_mean = mae.PatchMean(encoder)(images)
    torch.testing.assert_close(patch_mean, expected[:, 32:], atol=1e-5, rtol=1e-5)


def test_a_block_is_that_of_the_formula():
    torch.manual_seed(0)
    block = mae.Block(8, 2)
    x = torch.randn(2, 5, 8)
    q, k, v = block.attn["qkv"](block.norm1(x)).chunk(3, dim=2)  # (2, 5, 8) each, 4 a head
    heads = []
    for c in (slice(0, 4), slice(4, 8)):
        weights = (q[:, :, c] @ k[:, :, c].mT / math.sqrt(4)).softmax(2)
        heads.append(weights @ v[:, :, c])
    y = x + block.attn["proj"](torch.cat(heads, 2))
    hidden = block.mlp["fc1"](block.norm2(y))
    expected = y + block.mlp["fc2"](hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2)
    torch.testing.assert_close(block(x), expected, atol=1e-6, rtol=1e-5)


def test_positions_are_sines_and_cosines_of_column_and_row():
    D = 8
    side = 3
    positions = mae.sincos_positions(side, D)
    assert positions.shape == (1, 10, D)
    assert (positions[0, 0] == 0).all()
    for row in range(side):
        for column in range(side):
            expected = []
            for place in (column, row):
                angles = [place / 10000 ** (i / (D / 4)) for i in range(D // 4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            found = positions[0, 1 + row * side + column]
            torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=0)


def test_tokens_are_patches_with_positions_after_the_class_token():
    encoder = small_model().encoder
    images = torch.rand(2, 3, 16, 16, generator=generator())
    weight = encoder.patch_embed["proj"].weight.permute(0, 2, 3, 1).flatten(1)  # (32, 4 * 4 * 3)
    tokens = mae.patchify(images, 4) @ weight.T + encoder.patch_embed["proj"].bias
    tokens = tokens + encoder.pos_embed[:, 1:]
    torch.testing.assert_close(encoder.embed(images), tokens, atol=1e-5, rtol=0)
    encoder.blocks = nn.ModuleList()
    class_token = encoder.cls_token.expand(2, -1, -1)  # whose position is 0
    x = encoder.norm(torch.cat([class_token, tokens], dim=1))
    torch.testing.assert_close(encoder.tokens(images), x, atol=1e-5, rtol=0)


def test_the_encoder_takes_images_of_other_sizes():
    encoder = small_model().encoder
    for size in (16, 32):
        assert encoder(torch.rand(2, 3, size, size)).shape == (2, 64)
    ramp = torch.arange(4.0).expand(4, 4)  # grows from column to column
    encoder.pos_embed.data[:, 1:] = ramp.reshape(1, 16, 1)
    assert torch.equal(encoder.positions(17), encoder.pos_embed)
    small = encoder.positions(5)[0, 1:, 0].view(2, 2)
    assert torch.allclose(small[0], small[1])  # rows alike,
    assert small[0, 0] < 1 < 2 < small[0, 1]  # columns apart


# ==================================================================================================
# Optimizer
# ==================================================================================================


def test_learning_rates_fall_from_block_to_block():
    args = mae.parse_args(["--warmup", "0", "--fine-tune-lr", "1e-3"])
    classifier = mae.Classifier(small_model().encoder, 10, layer_decay=0.5)
    optimizer, _ = mae.make_optimizer(classifier, args, 512, 100)
    found = {}
    for group in optimizer.param_groups:
        assert group["betas"] == (0.9, 0.999)
        for p in group["params"]:
            found[p] = group["initial_lr"], group["weight_decay"]
    assert found.keys() == set(classifier.parameters())
    encoder = classifier.encoder
    for p, scale, decay in (
        (classifier.head.weight, 1, 0.05),
        (classifier.head.bias, 1, 0),
        (classifier.fc_norm.weight, 1, 0),
        (encoder.blocks[1].attn["qkv"].weight, 0.5, 0.05),
        (encoder.blocks[0].mlp["fc1"].weight, 0.25, 0.05),
        (encoder.blocks[0].norm1.bias, 0.25, 0),
        (encoder.patch_embed["proj"].weight, 0.125, 0.05),
        (encoder.cls_token, 0.125, 0),
        (encoder.pos_embed, 0.125, 0),
    ):
        assert found[p] == pytest.approx((2e-3 * scale, decay))  # for twice 256 images


def test_pretraining_has_one_rate_that_falls_to_zero():
    args = mae.parse_args(["--warmup", "0.1", "--lr", "1.5e-4"])
    optimizer, schedule = mae.make_optimizer(small_model(), args, 256, 100)
    assert {group["initial_lr"] for group in optimizer.param_groups} == {1.5e-4}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}
    assert len(optimizer.param_groups) == 2
    rates = []
    for _ in range(102):
        rates.append(optimizer.param_groups[0]["lr"] / 1.5e-4)
        optimizer.step()
        schedule.step()
    assert rates[:2] == pytest.approx([1 / 11, 2 / 11])
    assert rates[10] == 1
    assert rates[55] == pytest.approx(0.5)
    assert rates[100:] == pytest.approx([0, 0])


# ==================================================================================================
# Runs
# ==================================================================================================


def test_a_run_leaves_its_files(unbroken):
    assert files(unbroken) == RESULTS
    summary = json.loads((unbroken / "summary.json").read_text())
    assert summary["method"] == "mae"
    accuracies = {"knn", "linear_probe", "knn_class_token", "linear_probe_class_token"}
    assert set(summary["trained"]) == set(summary["untrained"]) == accuracies
    assert summary["history"][0].keys() == {"epoch", "loss", "knn", "rank", "seconds"}
    encoder = mae.VisionTransformer(32, 8, *mae.ENCODERS["small"])
    encoder.load_state_dict(load(unbroken / "encoder.pt"))
    checkpoint = load(unbroken / "checkpoint.pt")["model"]
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, checkpoint[f"encoder.{name}"])
    with Image.open(unbroken / "reconstruction.png") as sheet:
        assert sheet.width > 9 * 64  # a column for each class of the test images
        assert sheet.height > 3 * 64


def test_the_probes_read_class_token_and_patch_mean(unbroken, tiny_shapes):
    data = common.load_dataset(str(tiny_shapes))
    encoder = mae.VisionTransformer(32, 8, *mae.ENCODERS["small"])
    encoder.load_state_dict(load(unbroken / "encoder.pt"))
    trained = json.loads((unbroken / "summary.json").read_text())["trained"]
    with torch.no_grad():
        x = encoder.tokens(common.normalize(data.train_images / 255))
        test_x = encoder.tokens(common.normalize(data.test_images / 255))
    y = data.train_labels
    test_y = data.test_labels
    assert trained["knn"] == mae.knn_accuracy(x[:, 1:].mean(1), y, test_x[:, 1:].mean(1), test_y)
    assert trained["knn_class_token"] == mae.knn_accuracy(x[:, 0], y, test_x[:, 0], test_y)


def test_held_out_labels_are_predicted_from_the_patch_mean(tiny_shapes, tmp_path, monkeypatch):
    calls = spy(monkeypatch, mae, "monitor")
    small_run(tiny_shapes, tmp_path / "run", "--epochs", 1)
    ((network, _),) = calls
    assert type(network) is mae.PatchMean
    assert_same(dict(network.encoder.state_dict()), load(tmp_path / "run/encoder.pt"))


def test_it_learns(tmp_path):
    shapes = save_shapes(tmp_path / "shapes.npz", 512, 100)
    flags = "--epochs", "4", "--lr", "0.012", "--eval-every", "4"
    summary = small_run(shapes, tmp_path / "run", *flags)
    losses = [line["loss"] for line in summary["history"]]
    assert losses[3] < losses[1] < losses[0]
    assert losses[3] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [(mae, "training_step", 5), (Path, "replace", 6)],
)
def test_a_resumed_run_ends_as_an_unbroken_one(tiny_shapes, unbroken, tmp_path, module, name, call):
    run = tmp_path / "run"
    with killed_at(module, name, call):  # of three steps an epoch
        small_run(tiny_shapes, run)
    assert not (run / "summary.json").exists()
    resumed(run)
    assert_ended_alike(run, unbroken, "untrained", "trained")


def fine_tuned(monkeypatch):
    """Weights and layer decay of every encoder that is fine-tuned from now on."""
    calls = []
    original = mae.fine_tune

    def recorded(encoder, data, args, layer_decay):
        weights = {name: value.clone() for name, value in encoder.state_dict().items()}
        calls.append((weights, layer_decay))
        return original(encoder, data, args, layer_decay)

    monkeypatch.setattr(mae, "fine_tune", recorded)
    return calls


def test_a_finished_run_is_fine_tuned_and_one_from_scratch(unbroken, tmp_path, monkeypatch):
    run = shutil.copytree(unbroken, tmp_path / "run")
    calls = fine_tuned(monkeypatch)
    summary = resumed(run, "--fine-tune", "--fine-tune-epochs", 1)
    assert 0 <= min(summary["trained"]["fine_tuned"], summary["trained"]["from_scratch"])
    trained = load(unbroken / "encoder.pt")
    (first, first_decay), (second, second_decay) = calls
    assert (first_decay, second_decay) == (0.75, 1.0)
    assert_same(first, trained)
    torch.manual_seed(0)
    scratch = mae.build_mae(mae.parse_args(words("x", "y")), 32)
    assert_same(second, dict(scratch.encoder.state_dict()))
    classifier = mae.Classifier(mae.VisionTransformer(32, 8, *mae.ENCODERS["small"]), 10, 1.0)
    classifier.load_state_dict(load(run / "classifier.pt"))
    names = classifier.state_dict()
    assert not any(name.startswith("encoder.norm") for name in names)  # it comes after the mean
    assert not torch.equal(names["encoder.pos_embed"], trained["pos_embed"])  # trained, too


def test_from_scratch_is_from_scratch_with_init_too(unbroken, tiny_shapes, tmp_path, monkeypatch):
    calls = fine_tuned(monkeypatch)
    flags = "--init", unbroken / "encoder.pt", "--epochs", 0, "--fine-tune"
    small_run(tiny_shapes, tmp_path / "run", *flags, "--fine-tune-epochs", 1)
    (first, _), (second, _) = calls
    assert_same(first, load(unbroken / "encoder.pt"))
    assert not torch.equal(first["cls_token"], second["cls_token"])


def by_heart():
    """64 shapes with two labels that mean nothing."""
    shapes = common.load_dataset("shapes")
    rows = torch.arange(64)
    images = shapes.train_images[rows]
    return common.Dataset(images, rows % 2, images, rows % 2, ["a", "b"])


def test_fine_tuning_learns_and_leaves_the_encoder_as_it_was():
    flags = ["--fine-tune-epochs", "60", "--batch-size", "64", "--crop", "1"]
    args = mae.parse_args(["--patch-size", "8", *flags, "--fine-tune-lr", "0.02"])
    torch.manual_seed(0)
    encoder = mae.VisionTransformer(32, 8, *mae.ENCODERS["small"])
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    accuracy, _ = mae.fine_tune(encoder, by_heart(), args, 1.0)
    assert accuracy > 0.9
    assert_same(dict(encoder.state_dict()), before)
    assert not encoder.pos_embed.requires_grad


def test_of_a_frozen_encoder_every_weight_is_fine_tuned():
    args = mae.parse_args(["--patch-size", "8", "--fine-tune-epochs", "2"])
    encoder = mae.VisionTransformer(32, 8, *mae.ENCODERS["small"])
    encoder.requires_grad_(False)  # as DINO's teacher
    _, classifier = mae.fine_tune(encoder, by_heart(), args, 1.0)
    after = dict(classifier.encoder.named_parameters())
    before = dict(encoder.named_parameters())
    assert [name for name in after if torch.equal(after[name], before[name])] == []


def test_fewer_labels_than_a_batch_are_learned_from():
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(8) % 2
    data = common.Dataset(images, labels, images, labels, ["a", "b"])
    args = mae.parse_args(["--patch-size", "8", "--fine-tune-epochs", "2"])
    encoder = mae.VisionTransformer(32, 8, *mae.ENCODERS["small"])
    _, classifier = mae.fine_tune(encoder, data, args, 1.0)
    assert not torch.equal(classifier.encoder.cls_token, encoder.cls_token)


@pytest.mark.parametrize("target", ["pixel", "norm-pixel"])
def test_a_reconstruction_pastes_the_visible_patches_in(target):
    images = common.load_dataset("shapes").train_images[:4]
    args = mae.parse_args(["--target", target])
    torch.manual_seed(0)
    model = mae.MaskedAutoencoder(32, 4, *mae.ENCODERS["small"], 64, 2, 2)
    masked, completed, original = mae.reconstruct(model, images, args)
    assert torch.equal(original, images / 255)
    hidden = (mae.patchify(masked, 4) == 0.5).all(2)  # (4, 64)
    assert (hidden.sum(1) == 48).all()
    patches = mae.patchify(completed, 4)
    torch.testing.assert_close(patches[~hidden], mae.patchify(original, 4)[~hidden])
    model.decoder_pred.weight.data.zero_()  # predicts 0: the mean of the data, or of each patch
    patches = mae.patchify(mae.reconstruct(model, images, args)[1], 4)
    if target == "pixel":
        expected = torch.tensor(common.MEAN).expand(192, 16, 3)
        torch.testing.assert_close(patches[hidden].view(-1, 16, 3), expected)
    else:  # one value in normalized pixels
        x = common.normalize(mae.unpatchify(patches, 4))
        mean = mae.patchify(common.normalize(images / 255), 4).mean(2, keepdim=True)
        expected = mean.expand(-1, -1, 48)[hidden]
        torch.testing.assert_close(mae.patchify(x, 4)[hidden], expected, atol=1e-4, rtol=0)


def test_plain_images_are_pretrained_on(tmp_path):
    (tmp_path / "album").mkdir()
    for i, image in enumerate(common.load_dataset("shapes").train_images[:40]):
        torchvision.utils.save_image(image / 255, tmp_path / f"album/{i}.png")
    flags = "--data-dir", tmp_path / "cache", "--epochs", 1
    summary = small_run(tmp_path / "album", tmp_path / "run", *flags)
    assert summary["trained"] == summary["untrained"] == {}
    assert files(tmp_path / "run") == RESULTS
    with pytest.raises(common.UserError, match="--fine-tune: .* has no labels"):
        small_run(tmp_path / "album", tmp_path / "other", *flags, "--fine-tune")


BAD = [
    (["--patch-size", "5"], "--patch-size 5: must divide the images' side, 32"),
    (["--mask-ratio", "1"], "--mask-ratio 1.0: must be from 0.01 to 0.99"),
    (["--mask-ratio", "0.01", "--patch-size", "16"], "--mask-ratio 0.01: must mask one of the 4 p"),
    (["--decoder-dim", "98"], "--decoder-dim 98: must be a multiple of 4, and of its heads, 3"),
    (["--decoder-dim", "100"], "--decoder-dim 100: must be a multiple of 4, and of its heads, 3"),
    (["--decoder-dim", "0"], "--decoder-dim 0: must be from 4 to 4096"),
    (["--target", "dvae"], "--target: invalid choice: 'dvae'"),
    (["--layer-decay", "0"], "--layer-decay 0.0: must be from 0.01 to 1"),
    (["--batch-size", "5000"], "--batch-size 5000: must be from 2 to 4096, the number of images"),
    (["--maskratio", "0.5"], "did you mean --mask-ratio?"),
    (["--init", "none.pt"], "--init none.pt: does not fit --encoder small"),
    (["--resume", "nothing"], "--resume nothing: there is no run of mae.py in this folder"),
]


@pytest.mark.parametrize(("flags", "message"), BAD)
def test_bad_input_is_one_line(tmp_path, monkeypatch, error_of, flags, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(mae.run, *flags)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dim", [12, 24, 48, 64, 72, 96, 128, 192, 256, 512])
def test_widths_of_the_decoder_have_whole_heads(dim):
    args = mae.parse_args(["--decoder-dim", str(dim), "--decoder-depth", "1"])
    (block,) = mae.build_mae(args, 32).decoder_blocks
    assert block.heads == max(1, dim // 32)


TRAINING_FLAGS = {"dataset", "image_size", "encoder", "init", "patch_size", "mask_ratio"}
TRAINING_FLAGS |= {"decoder_depth", "decoder_dim", "target", "crop", "epochs", "batch_size", "lr"}
TRAINING_FLAGS |= {"weight_decay", "warmup", "eval_every", "seed", "out"}


def test_only_flags_that_do_not_train_go_with_resume(unbroken, error_of):
    flags = mae.flags_of(mae.Args)
    assert {name for name in flags if not flags[name].metadata["resume"]} == TRAINING_FLAGS
    line = error_of(mae.run, "--resume", unbroken, "--mask-ratio", 0.5)
    assert "--mask-ratio: a resumed run keeps the flags it was started with" in line


@pytest.mark.parametrize("flags", [[], ["cifar10"], ["cifar10", "--encoder", "small"]])
def test_patches_of_the_recipes_divide_their_images(flags):
    args = mae.parse_args(["--dataset", *flags] if flags else [])
    assert 32 % args.patch_size == 0


def test_large_images_have_a_recipe_of_their_own(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (45, 96, 96, 3), dtype=np.uint8)
    labels = np.arange(45) % 2
    arrays = {"train_images": images, "train_labels": labels}
    arrays |= {"test_images": images, "test_labels": labels}
    np.savez(tmp_path / "large.npz", **arrays)
    monkeypatch.setattr(mae, "pretrain", lambda *_: [])
    monkeypatch.setattr(mae, "evaluate", lambda *_: {})
    flags = ["--dataset", str(tmp_path / "large.npz"), "--out", str(tmp_path / "run")]
    args = mae.main(mae.parse_args([*flags, "--decoder-depth", "1"]))["args"]
    assert (args["batch_size"], args["encoder"], args["patch_size"]) == (45, "vit_small", 8)
    assert args["decoder_depth"] == 1


# ==================================================================================================
# Runs of SimMIM
# ==================================================================================================


@pytest.fixture(scope="module")
def unbroken_simmim(tiny_shapes, tmp_path_factory):
    """The folder of a run of simmim.py that nothing has stopped. It is read only."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    mae.main(simmim_args(*words(tiny_shapes, folder)), **PARTS)
    return folder


def test_a_run_of_simmim_is_maes_without_a_decoder(unbroken_simmim):
    assert files(unbroken_simmim) == RESULTS
    text = (unbroken_simmim / "summary.json").read_text()
    summary = json.loads(text)
    assert summary["method"] == "simmim"
    assert summary["command"].startswith("python relatives/simmim.py --dataset ")
    assert "null" not in text
    assert not {"decoder_depth", "decoder_dim"} & summary["args"].keys()
    assert not any("decoder" in name for name in load(unbroken_simmim / "checkpoint.pt")["model"])


def test_the_loss_that_is_handed_over_is_minimized(tiny_shapes, tmp_path):
    calls = []

    def loss_of(*inputs):
        calls.append(inputs)
        return 0 * simmim.l1_loss(*inputs) + 7

    args = simmim_args(*words(tiny_shapes, tmp_path / "run", "--epochs", 1))
    summary = mae.main(args, build_model=simmim.build_simmim, loss_of=loss_of)
    assert len(calls) == 3  # steps
    assert summary["history"][0]["loss"] == 7


def test_simmim_resumes(unbroken_simmim, tiny_shapes, tmp_path, capsys):
    run = tmp_path / "run"
    with killed_at(simmim, "block_masking", 5):
        mae.main(simmim_args(*words(tiny_shapes, run)), **PARTS)
    mae.main(simmim_args("--resume", run), **PARTS)
    states = [load(folder / "checkpoint.pt")["model"] for folder in (unbroken_simmim, run)]
    assert_same(*states)
    assert f"relatives/simmim.py on {tiny_shapes}: 96 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--decoder-depth", "2"], "unrecognized arguments: --decoder-depth 2"),
        (["--mask-ratio", "0.99"], "--mask-ratio 0.99: leaves no block"),
        (["--patch-size", "32"], "--mask-ratio 0.6: leaves no block"),
        (["--resume", "nothing"], "there is no run of relatives/simmim.py in this folder"),
    ],
)
def test_bad_input_of_simmim_is_one_line(tmp_path, monkeypatch, error_of, flags, message):
    monkeypatch.chdir(tmp_path)
    run = functools.partial(mae.run, simmim.Args, simmim.__doc__, simmim.SHAPES, **PARTS)
    assert message in error_of(run, *flags)
    assert list(tmp_path.iterdir()) == []


# ==================================================================================================
# Several processes
# ==================================================================================================


def both_compute_gradients():
    torch.manual_seed(0)
    model = mae.MaskedAutoencoder(16, 4, 32, 2, 2, 32, 1, 1).double()
    network = nn.parallel.DistributedDataParallel(model)
    images = torch.rand(6, 3, 16, 16, generator=generator(1)).double()
    noise = torch.rand(6, 16, generator=generator(2))

    def loss(network, rows):
        prediction, mask = network(images[rows], 0.75, noise[rows])
        targets = mae.patch_targets(images[rows], 4, "norm-pixel")
        return mae.reconstruction_loss(prediction, targets, mask)

    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(loss(model, torch.arange(6)), parameters)
    loss(network, torch.arange(6)[mae.RANK :: 2]).backward()
    for p, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-10, atol=1e-10)


def both_train(data, folder):
    both_compute_gradients()
    train_and_resume(mae, words(data, folder), folder, "training_step")
    flags = words(data, f"{folder}/run-simmim", "--device", "cpu", "--epochs", 1)
    train_and_keep(f"{folder}/simmim", mae, simmim_args(*flags), **PARTS)


def test_two_processes_do_what_one_does(tiny_shapes, tmp_path, in_two_processes):
    printed = in_two_processes(both_train, tiny_shapes, tmp_path)
    assert_resumed_in_both(tmp_path, printed)
    assert load(tmp_path / "unbroken-0.pt").keys() >= {"mask_token", "encoder.cls_token"}
    assert_same_in_both(tmp_path / "simmim")
    assert printed[0].count("relatives/simmim.py on") == 1
