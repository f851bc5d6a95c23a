"""mae.py: patches, masks, the loss, what the encoder sees, official names, and whole runs on shapes."""

import math
import runpy
import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from PIL import Image

import common
import mae

ROOT = Path(__file__).parent.parent


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small_model(kind=mae.MaskedAutoencoder):
    torch.manual_seed(0)
    return kind(16, 4, 32, 2, 2, 32, 1, 1)  # width 32, 2 blocks, 2 heads; decoder 32, 1, 1


# --- Patches and masks ----------------------------------------------------------------------------------------------


def test_unpatchify_is_the_inverse_of_patchify():
    images = torch.rand(2, 3, 12, 12)
    patches = mae.patchify(images, 4)
    assert patches.shape == (2, 9, 48)
    assert torch.equal(patches[0, 5].view(4, 4, 3), images[0, :, 4:8, 8:12].permute(1, 2, 0))  # row 1, column 2
    assert torch.equal(mae.unpatchify(patches, 4), images)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75, 0.9])
def test_exactly_the_asked_fraction_is_masked(ratio):
    tokens, noise = torch.rand(50, 64, 8), torch.rand(50, 64, generator=generator())
    visible, mask, ids_restore = mae.random_masking(tokens, ratio, noise)
    assert (mask.sum(1) == round(64 * ratio)).all() and visible.shape == (50, 64 - round(64 * ratio), 8)
    order = ids_restore.argsort(1)  # visible tokens first
    assert torch.equal(visible, torch.stack([t[o][: visible.shape[1]] for t, o in zip(tokens, order, strict=True)]))
    removed = torch.zeros(50, 64 - visible.shape[1], 8)
    restored = torch.cat([visible, removed], 1).gather(1, ids_restore[:, :, None].expand(-1, -1, 8))
    assert torch.equal(restored, tokens * (1 - mask[:, :, None]))


def test_every_image_has_another_random_mask_and_every_patch_is_masked_as_often():
    noise = torch.rand(2000, 64, generator=generator())
    _, mask, _ = mae.random_masking(torch.zeros(2000, 64, 1), 0.75, noise)
    assert len(mask.unique(dim=0)) == 2000
    assert (mask.mean(0) - 0.75).abs().max() < 5 * math.sqrt(0.75 * 0.25 / 2000)


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


def test_normalized_targets_have_mean_zero_and_deviation_one():
    images = torch.rand(2, 3, 8, 8, generator=generator())
    assert torch.equal(mae.patch_targets(images, 4, "pixel"), mae.patchify(images, 4))
    targets = mae.patch_targets(images, 4, "norm-pixel")
    assert targets.mean(2).abs().max() < 1e-5 and (targets.std(2) - 1).abs().max() < 1e-3
    assert torch.allclose(targets, mae.patch_targets(3 * images + 1, 4, "norm-pixel"), atol=1e-3)
    flat = mae.patch_targets(torch.ones(1, 3, 8, 8), 4, "norm-pixel")
    assert flat.abs().max() < 1e-3


# --- What the encoder sees ------------------------------------------------------------------------------------------


def test_the_encoder_never_sees_a_masked_patch():
    model, images, noise = small_model(), torch.rand(2, 3, 16, 16), torch.rand(2, 16, generator=generator())
    prediction, mask = model(images, 0.75, noise)
    hidden = mae.unpatchify(mask[:, :, None].expand(-1, -1, 48), 4) == 1
    assert torch.equal(model(torch.where(hidden, 9.0, images), 0.75, noise)[0], prediction)
    assert not torch.allclose(model(torch.where(hidden, images, 9.0), 0.75, noise)[0], prediction)


@pytest.mark.parametrize(("ratio", "tokens"), [(0.25, 13), (0.5, 9), (0.75, 5)])
def test_the_encoder_works_on_as_many_tokens_as_there_are_visible_patches(ratio, tokens):
    model, seen = small_model(), []
    for block in (*model.encoder.blocks, *model.decoder_blocks):
        block.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[1]))
    prediction, mask = model(torch.rand(2, 3, 16, 16), ratio, torch.rand(2, 16))
    assert seen == [tokens, tokens, 17]
    assert prediction.shape == (2, 16, 48) and (mask.sum(1) == 16 * ratio).all()


def test_mask_tokens_take_the_places_of_removed_patches():
    """Without blocks and positions, a decoder predicts each patch from its own token alone."""
    model, noise = small_model(), torch.rand(2, 16, generator=generator())
    model.decoder_blocks = torch.nn.ModuleList()
    prediction, mask = model(torch.rand(2, 3, 16, 16), 0.75, noise)
    assert len(prediction[0][mask[0] == 1].unique(dim=0)) == 12  # by their positions
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
    decoder = {"mask_token"} | {name for name in OFFICIAL if name.startswith("decoder")}
    prefixed = {name if name in decoder else f"encoder.{name}": shape for name, shape in OFFICIAL.items()}
    with torch.device("meta"):
        model = mae.MaskedAutoencoder(224, 16, *mae.ENCODERS["vit_base"])
        model.load_state_dict({name: torch.empty(shape) for name, shape in prefixed.items()}, strict=True, assign=True)
    assert set(model.encoder.state_dict()) == set(OFFICIAL) - decoder


def test_features_are_those_of_timm():
    encoder = small_model().encoder.eval()
    for p in encoder.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator())
    other = timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=0, global_pool=""
    ).eval()
    other.load_state_dict(encoder.state_dict(), strict=True)
    images = torch.rand(3, 3, 16, 16)
    tokens = other(images)  # (3, 17, 32)
    assert torch.allclose(encoder(images), torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1), atol=1e-5)


def test_a_block_is_that_of_the_formula():
    torch.manual_seed(0)
    block, x = mae.Block(8, 2), torch.randn(2, 5, 8)
    q, k, v = block.attn["qkv"](block.norm1(x)).chunk(3, dim=2)  # (2, 5, 8) each, four channels a head
    heads = []
    for c in (slice(0, 4), slice(4, 8)):
        weights = (q[:, :, c] @ k[:, :, c].mT / math.sqrt(4)).softmax(2)
        heads.append(weights @ v[:, :, c])
    y = x + block.attn["proj"](torch.cat(heads, 2))
    hidden = block.mlp["fc1"](block.norm2(y))
    expected = y + block.mlp["fc2"](hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2)
    assert torch.allclose(block(x), expected, atol=1e-6)


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


def test_tokens_are_patches_with_positions_and_the_class_token_is_first():
    encoder, images = small_model().encoder, torch.rand(2, 3, 16, 16, generator=generator())
    weight = encoder.patch_embed["proj"].weight.permute(0, 2, 3, 1).flatten(1)  # (32, 4 * 4 * 3)
    tokens = mae.patchify(images, 4) @ weight.T + encoder.patch_embed["proj"].bias + encoder.pos_embed[:, 1:]
    assert torch.allclose(encoder.embed(images), tokens, atol=1e-5)
    encoder.blocks = torch.nn.ModuleList()
    x = encoder.norm(torch.cat([encoder.cls_token.expand(2, -1, -1), tokens], 1))  # whose position is 0
    assert torch.allclose(encoder(images), torch.cat([x[:, 0], x[:, 1:].mean(1)], 1), atol=1e-5)


def test_the_encoder_takes_images_of_other_sizes():
    encoder = small_model().encoder
    assert encoder(torch.rand(2, 3, 16, 16)).shape == encoder(torch.rand(2, 3, 32, 32)).shape == (2, 64)
    ramp = torch.arange(4.0).expand(4, 4)  # grows from column to column
    encoder.pos_embed.data[:, 1:] = ramp.reshape(1, 16, 1)
    assert torch.equal(encoder.positions(17), encoder.pos_embed)
    small = encoder.positions(5)[0, 1:, 0].view(2, 2)
    assert torch.allclose(small[0], small[1]) and small[0, 0] < 1 < 2 < small[0, 1]  # rows alike, columns apart


# --- Optimizer ------------------------------------------------------------------------------------------------------


def test_learning_rates_fall_from_block_to_block():
    args = mae.parse_args(["--warmup", "0"])
    classifier = mae.Classifier(small_model().encoder, 10)
    optimizer, _ = mae.make_optimizer(classifier, 1e-3, (0.9, 0.999), args, 100, layer_decay=0.5)
    rates = {id(p): (g["initial_lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
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
        assert rates[id(p)] == pytest.approx((1e-3 * scale, decay))
    model = small_model()
    optimizer, schedule = mae.make_optimizer(model, 1.5e-4, (0.9, 0.95), args, 100)
    assert {g["initial_lr"] for g in optimizer.param_groups} == {1.5e-4} and len(optimizer.param_groups) == 2
    rates = []
    for _ in range(102):
        rates.append(optimizer.param_groups[0]["lr"] / 1.5e-4)
        optimizer.step()
        schedule.step()
    assert rates[0] == 1 and rates[50] == pytest.approx(0.5) and rates[100:] == pytest.approx([0, 0])


# --- Runs -----------------------------------------------------------------------------------------------------------


def tiny_run(data, out, *flags):
    """main on a few shapes, in two short epochs of large patches."""
    flags = "--eval-every", "1", "--patch-size", "8", "--epochs", "2", "--batch-size", "32", *flags
    return mae.main(mae.parse_args(["--dataset", str(data), "--encoder", "small", "--out", str(out), *flags]))


class Killed(BaseException):
    """What no code catches."""


@pytest.fixture(scope="module")
def unbroken(tiny_shapes, tmp_path_factory):
    return (folder := tmp_path_factory.mktemp("unbroken") / "run"), tiny_run(tiny_shapes, folder)


def test_a_resumed_run_ends_where_an_unbroken_one_does(tiny_shapes, unbroken, tmp_path):
    calls, loss = [], mae.reconstruction_loss

    def reconstruction_loss(*args):
        calls.append(1)
        if len(calls) == 5:  # of three an epoch: a checkpoint is there
            raise Killed
        return loss(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(mae, "reconstruction_loss", reconstruction_loss)
        tiny_run(tiny_shapes, tmp_path / "run")
    summary = mae.main(mae.parse_args(["--resume", str(tmp_path / "run")]))
    assert summary["trained"] == unbroken[1]["trained"] and summary["untrained"] == unbroken[1]["untrained"]
    a, b = (torch.load(run / "checkpoint.pt", weights_only=True)["model"] for run in (tmp_path / "run", unbroken[0]))
    assert set(a) == set(b) and all(torch.equal(value, b[key]) for key, value in a.items())


def test_files_of_a_run(unbroken):
    run, summary = unbroken
    names = {"args.json", "metrics.jsonl", "summary.json", "checkpoint.pt", "encoder.pt", ".lock"}
    assert {path.name for path in run.iterdir()} == names | {"reconstruction.png"} and summary["method"] == "mae"
    accuracies = {"knn", "linear_probe", "knn_class_token", "linear_probe_class_token"}
    assert set(summary["trained"]) == set(summary["untrained"]) == accuracies
    encoder = mae.VisionTransformer(32, 8, *mae.ENCODERS["small"])
    encoder.load_state_dict(torch.load(run / "encoder.pt", weights_only=True))
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)["model"]
    assert all(torch.equal(value, checkpoint[f"encoder.{name}"]) for name, value in encoder.state_dict().items())
    with Image.open(run / "reconstruction.png") as sheet:  # ten triplets in five rows, 96 pixels a side
        assert sheet.size == (6 * 100 + 4, 5 * 100 + 4)


def test_it_learns(some_shapes, tmp_path):
    summary = tiny_run(some_shapes, tmp_path / "run", "--epochs", "6", "--lr", "0.012", "--eval-every", "6")
    losses = [line["loss"] for line in summary["history"]]
    assert losses[5] < losses[2] < losses[0] and losses[5] < 0.8 * losses[0]


def test_fine_tuned_against_trained_from_scratch(tiny_shapes, tmp_path, monkeypatch):
    calls, fine_tune = [], mae.fine_tune

    def recorded(encoder, data, args, layer_decay):
        calls.append(({name: value.clone() for name, value in encoder.state_dict().items()}, layer_decay))
        return fine_tune(encoder, data, args, layer_decay)

    monkeypatch.setattr(mae, "fine_tune", recorded)
    flags = "--fine-tune", "--fine-tune-epochs", "1", "--epochs", "1"
    summary = tiny_run(tiny_shapes, tmp_path / "run", *flags)
    assert 0 <= min(summary["trained"]["fine_tuned"], summary["trained"]["from_scratch"])
    trained = torch.load(tmp_path / "run/encoder.pt", weights_only=True)
    torch.manual_seed(0)
    scratch = mae.MaskedAutoencoder(32, 8, *mae.ENCODERS["small"], 64, 2, 2).encoder.state_dict()
    for (weights, layer_decay), expected, decay in zip(calls, (trained, scratch), (0.75, 1.0), strict=True):
        assert layer_decay == decay and all(torch.equal(value, expected[name]) for name, value in weights.items())
    classifier = mae.Classifier(mae.VisionTransformer(32, 8, *mae.ENCODERS["small"]), 10)
    classifier.load_state_dict(torch.load(tmp_path / "run/classifier.pt", weights_only=True))
    assert not any(name.startswith("encoder.norm") for name in classifier.state_dict())  # it comes after the mean
    positions = classifier.encoder.pos_embed
    assert not torch.equal(positions, trained["pos_embed"])  # they are trained, too


def test_fine_tuning_learns_and_leaves_the_encoder_as_it_was():
    data = common.load_dataset("shapes")
    rows = torch.arange(64)
    images, labels = data.train_images[rows], rows % 2
    data = common.Dataset(images, labels, images, labels, ["a", "b"])
    flags = "--fine-tune-epochs", "60", "--batch-size", "64", "--crop", "1", "--fine-tune-lr", "0.02"
    args = mae.parse_args(["--patch-size", "8", *flags])
    torch.manual_seed(0)
    encoder = mae.VisionTransformer(32, 8, *mae.ENCODERS["small"])
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    accuracy, _ = mae.fine_tune(encoder, data, args, 1.0)
    assert accuracy > 0.9  # by heart
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert not encoder.pos_embed.requires_grad


def test_fewer_labels_than_a_batch_are_learned_from():
    images, labels = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8) % 2
    data = common.Dataset(images, labels, images, labels, ["a", "b"])
    args = mae.parse_args(["--patch-size", "8", "--fine-tune-epochs", "2"])
    encoder = mae.VisionTransformer(32, 8, *mae.ENCODERS["small"])
    _, classifier = mae.fine_tune(encoder, data, args, 1.0)
    assert not torch.equal(classifier.encoder.cls_token, encoder.cls_token)


@pytest.mark.parametrize("target", ["pixel", "norm-pixel"])
def test_a_reconstruction_shows_the_visible_patches_and_the_models_own_others(target):
    images = common.load_dataset("shapes").train_images[:4]
    args = mae.parse_args(["--target", target])
    torch.manual_seed(0)
    model = mae.MaskedAutoencoder(32, 4, *mae.ENCODERS["small"], 64, 2, 2)
    masked, completed, original = mae.reconstruct(model, images, args).unbind(1)
    assert torch.equal(original, images / 255)
    hidden = (mae.patchify(masked, 4) == 0.5).all(2)  # (4, 64)
    assert (hidden.sum(1) == 48).all()
    patches, original = mae.patchify(completed, 4), mae.patchify(original, 4)
    assert torch.allclose(patches[~hidden], original[~hidden], atol=1e-6)
    model.decoder_pred.weight.data.zero_()  # predicts 0: the mean of the data, or of each patch
    patches = mae.patchify(mae.reconstruct(model, images, args)[:, 1], 4)
    if target == "pixel":
        assert torch.allclose(patches[hidden].view(-1, 16, 3), torch.tensor(common.MEAN), atol=1e-6)
    else:  # one value in normalized pixels
        x = common.normalize(mae.unpatchify(patches, 4))
        mean = mae.patchify(common.normalize(images / 255), 4).mean(2, keepdim=True)
        assert torch.allclose(mae.patchify(x, 4)[hidden], mean.expand(-1, -1, 48)[hidden], atol=1e-4)


def test_plain_images_are_pretrained_on(tmp_path):
    (tmp_path / "album").mkdir()
    for i, image in enumerate(common.load_dataset("shapes").train_images[:40]):
        torchvision.utils.save_image(image / 255, tmp_path / f"album/{i}.png")
    flags = "--data-dir", str(tmp_path / "cache"), "--epochs", "1"
    summary = tiny_run(tmp_path / "album", tmp_path / "run", *flags)
    assert summary["trained"] == summary["untrained"] == {} and (tmp_path / "run/reconstruction.png").exists()
    with pytest.raises(common.UserError, match="--fine-tune: .* has no labels"):
        tiny_run(tmp_path / "album", tmp_path / "other", *flags, "--fine-tune")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--patch-size", "5"], "--patch-size 5: must divide the images' side, 32"),
        (["--mask-ratio", "1"], "--mask-ratio 1.0: must be from 0.01 to 0.99"),
        (["--mask-ratio", "0.01", "--patch-size", "16"], "--mask-ratio 0.01: must mask one of the 4 patches"),
        (["--decoder-dim", "100"], "--decoder-dim: invalid choice: 100"),
        (["--target", "dvae"], "--target: invalid choice: 'dvae'"),
        (["--layer-decay", "0"], "--layer-decay 0.0: must be from 0.01 to 1"),
        (["--batch-size", "5000"], "--batch-size 5000: at most the 4096 images"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mae.py", *words])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "mae.py"), run_name="__main__")
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and message in line and list(tmp_path.iterdir()) == []


def test_recipes_fit_the_data(tmp_path, monkeypatch):
    for words in ([], ["--dataset", "cifar10"], ["--dataset", "cifar10", "--encoder", "small"]):
        assert 32 % mae.parse_args(words).patch_size == 0
    both = torch.randint(256, (45, 3, 96, 96), dtype=torch.uint8), torch.arange(45) % 2
    monkeypatch.setattr(common, "load_dataset", lambda *_: common.Dataset(*both, *both, ["a", "b"]))
    monkeypatch.setattr(mae, "pretrain", lambda *_: [{"epoch": 1, "seconds": 1.0}])
    monkeypatch.setattr(mae, "evaluate", lambda *_: {})
    words = ["--dataset", "large", "--decoder-depth", "1", "--out", str(tmp_path / "run")]
    args = mae.main(mae.parse_args(words))["args"]
    assert (args["batch_size"], args["encoder"], args["patch_size"], args["decoder_depth"]) == (45, "vit_small", 8, 1)


def test_two_processes_do_what_one_does(two_processes):
    folder, printed = two_processes
    for rank in range(2):
        assert float((folder / f"mae-gradient-{rank}.txt").read_text()) < 1e-10
    models = [torch.load(folder / f"mae-{rank}.pt", weights_only=True) for rank in range(2)]
    assert models[0].keys() == models[1].keys() >= {"mask_token", "encoder.cls_token"}
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
    out = printed[0][printed[0].index("mae on") : printed[0].index("simmim on")]
    assert [out.count(f"epoch {epoch}/") for epoch in (1, 2, 3)] == [1, 1, 1] and "epoch 3/3" in out  # it was resumed
    assert printed[1] == "" and (folder / "mae/summary.json").exists()
