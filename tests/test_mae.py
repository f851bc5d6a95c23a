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
