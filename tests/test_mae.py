"""mae.py: patches, masks, the loss, what the encoder sees, official names, and whole runs on shapes."""

import math

import pytest
import torch

import mae


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
    """A decoder without blocks: a prediction is a function of its own token, and of its position, which we take away."""
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


OFFICIAL = {  # mae_pretrain_vit_base_full.pth: patches of 16 of 224 pixels, 12 blocks and 8 in the decoder
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


def test_learning_rates_scale_with_the_batch_and_fall_from_block_to_block():
    args = mae.parse_args(["--batch-size", "512"])
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
        assert rates[id(p)] == pytest.approx((2e-3 * scale, decay))
    assert id(encoder.pos_embed) not in rates
    optimizer, _ = mae.layerwise_adamw(small_model(), 1.5e-4, 100, args, (0.9, 0.95))
    assert {g["initial_lr"] for g in optimizer.param_groups} == {3e-4} and len(optimizer.param_groups) == 2
