"""MAE: from the few patches of a picture that are left, an autoencoder shall paint those that were taken away.

A picture is cut into patches and three quarters of them are removed at random. A Vision Transformer encodes the rest
and nothing but the rest, so that a large encoder is cheap; a light decoder gets its output, and one learned mask token
for every patch that is missing, and predicts the pixels. After pretraining the decoder is thrown away, and the encoder
sees whole pictures.

    He, Chen, Xie, Li, Dollar, Girshick: Masked Autoencoders Are Scalable Vision Learners, CVPR 2022.
    The lecture's reconstruction loss, over the set M of removed patches x_i and their reconstructions y_i:

    L = 1 / |M|  sum_{i in M} |x_i - y_i|^2        divided by the numbers in a patch, as in the authors' code

    python mae.py                                       shapes drawn by code, on two CPU cores
    python mae.py --dataset cifar10                     ViT-tiny with patches of 2 x 2 pixels, on a GPU
    python mae.py --dataset cifar10 --encoder small     a small ViT, on two CPU cores
    python mae.py --dataset path/to/pictures            pictures of your own, see README.md
    python mae.py --fine-tune                           MAE's own measure: fine-tuned, against trained from scratch
    python results/ablation.py mae-mask-ratio           a column of the lecture's ablation table

Linear probe on test of the mean of the patch tokens, untrained -> trained, on two CPU cores (2026-11-25, torch 2.14.1;
records in results/):

    shapes                       18.7 -> 46.6 %, 21.6 -> 45.9 %, 19.2 -> 41.9 % with seeds 0, 1, 2; 126 to 137 s
    cifar10 --encoder small      42.7 -> 50.3 % with seed 0; 12 minutes
"""

import argparse
import copy
import dataclasses
import json
import math
import re
import shlex
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw
from torch import nn

import common
from common import UserError

METHOD = "mae"

# === Arguments ======================================================================================================


def flag(default, text, low=None, high=math.inf, choices=None, free=False):
    """A field of Args: default, help, range of a number (ends included), and whether --resume may come with another."""
    bounds = "" if low is None else f"at least {low}" if high == math.inf else f"from {low} to {high}"
    metadata = dict(text=text, low=low, high=high, choices=choices, free=free, bounds=bounds)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class Args:
    dataset: str = flag("shapes", "shapes, cifar10, cifar100, stl10, or a path: an .npz file or a folder of pictures")
    data_dir: str = flag("data", "folder where downloads and decoded pictures are kept", free=True)
    image_size: int = flag(96, "pixels a side, of a folder's pictures and of larger ones elsewhere; paper: 224", 8, 512)
    encoder: str = flag(
        "vit_tiny", "paper: vit_large", choices=("small", "vit_tiny", "vit_small", "vit_base", "vit_large")
    )
    patch_size: int = flag(2, "pixels a side of a patch; paper: 16 of 224", 1, 64)
    mask_ratio: float = flag(0.75, "share of the patches that are removed; paper: 0.75", 0.01, 0.99)
    mask_sampling: str = flag("random", "paper: random is best", choices=("random", "block", "grid"))
    encode_mask_tokens: bool = flag(False, "let the encoder see mask tokens too; paper: costs 14 points and 3.3x")
    decoder_depth: int = flag(4, "blocks; paper: 8", 1, 32)
    decoder_dim: int = flag(192, "width; its attention heads are 32 wide; paper: 512", 4, 2048)
    target: str = flag("norm-pixel", "pixels, or each patch's by its mean and deviation; paper: norm-pixel is best",
                       choices=("pixel", "norm-pixel"))  # fmt: skip
    augment: str = flag("crop", "paper: crop; fixed is a shift", choices=("none", "crop-fixed", "crop", "crop-color"))
    crop: float = flag(0.2, "smallest share of a picture that a crop shows; paper: 0.2", 0.01, 1)
    epochs: int = flag(400, "passes over the training pictures; paper: 800 in the table, up to 1600", 1)
    batch_size: int = flag(512, "pictures N a step; paper: 4096", 2)
    lr: float = flag(1.5e-4, "peak learning rate of AdamW for 256 pictures a step, times N / 256; paper: 1.5e-4", 0)
    weight_decay: float = flag(0.05, "of weights and tokens, neither of norms nor of biases; paper: 0.05", 0)
    warmup: float = flag(0.05, "share of the steps in which the learning rate rises; paper: 40 epochs of 800", 0, 0.9)
    labels: list = flag((), "probe with few labels too: shares of each class up to 1, or numbers a class", 0, free=True)
    fine_tune: bool = flag(False, "with these labels, also fine-tune, and train from scratch", free=True)
    fine_tune_epochs: int = flag(100, "passes over all labels, from scratch too; paper: 100 or 50", 1, free=True)
    fine_tune_lr: float = flag(1e-3, "learning rate of both for 256 pictures, times N / 256; paper: 1e-3", 0, free=True)
    layer_decay: float = flag(0.75, "its factor from a block to the one below; paper: 0.75", 0.01, 1, free=True)
    eval_every: int = flag(10, "epochs between two kNN measurements on held-out training pictures", 1, free=True)
    seed: int = flag(0, "fixes initial weights, batches, masks, crops and the choice of labels", 0, 2**31)
    device: str = flag("auto", "auto: cuda, else mps, else cpu", free=True)
    compile: bool = flag(None, "torch.compile for the network and the crops; without the flag on cuda alone", free=True)
    out: str = flag("auto", "run folder; auto: runs/<method>-<dataset>-seed<seed>", free=True)
    resume: str = flag("", "go on from the last checkpoint of --out, or of the run folder named here", free=True)


# What differs from the defaults above, by data set; the recipes for two CPU cores are chosen by one flag.
LARGE = dict(encoder="vit_small", patch_size=8, decoder_dim=256, epochs=200, batch_size=256)
SMALL = dict(patch_size=4, decoder_depth=2, decoder_dim=64, target="pixel", epochs=5, batch_size=64, lr=6e-3,
             fine_tune_epochs=4, fine_tune_lr=4e-3, eval_every=5)  # fmt: skip
RECIPES = {
    "shapes": SMALL | dict(encoder="small", epochs=11, batch_size=32, lr=1.2e-2, crop=0.5, fine_tune_lr=8e-3,
                           eval_every=11),
    "cifar10": dict(),
    "cifar10 --encoder small": SMALL,
    "cifar100": dict(),
    "cifar100 --encoder small": SMALL,
    "stl10": LARGE,
    "stl10 --encoder small": SMALL | dict(image_size=32, epochs=2),
    "path": LARGE,
    "path --encoder small": SMALL | dict(image_size=32, epochs=20),
}  # fmt: skip


def parse_args(argv=None):
    """The command line over the recipe of its data set -> Args.

    Raises UserError for an unknown flag and for a value that is out of its range.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False, allow_abbrev=False
    )

    def error(message):
        raise UserError(message)

    parser.error = error
    for field in dataclasses.fields(Args):
        text, bounds = field.metadata["text"], field.metadata["bounds"]
        if field.type is bool:
            options = {"action": argparse.BooleanOptionalAction, "help": text}
        else:
            options = {"nargs": "+", "type": float} if field.type is list else {"type": field.type}
            default = f" (%(default)s{bounds and ', '}{bounds})" if field.default != "" else ""
            options |= {"choices": field.metadata["choices"], "help": text + default}
        if field.name == "resume":
            options |= {"nargs": "?", "const": "auto", "metavar": "RUN"}
        parser.add_argument("--" + field.name.replace("_", "-"), default=field.default, **options)
    given, _ = parser.parse_known_args(argv)
    recipe = given.dataset if given.dataset in RECIPES else "path"
    if given.encoder == "small" and recipe != "shapes":
        recipe += " --encoder small"
    parser.set_defaults(**RECIPES[recipe])
    parser.add_argument("-h", "--help", action="help", help="show this help, with the recipe of --dataset in brackets")
    args = Args(**vars(parser.parse_args(argv)))
    for field in dataclasses.fields(Args):
        value, bounds = getattr(args, field.name), field.metadata["bounds"]
        for number in (value if field.type is list else [value]) if bounds else ():
            if not (field.metadata["low"] <= number <= field.metadata["high"] and math.isfinite(number)):
                raise UserError(f"--{field.name.replace('_', '-')} {number}: must be {bounds}")
    if args.resume not in ("", "auto"):
        args.out = args.resume
    if args.out == "auto":
        args.out = f"runs/{METHOD}-{Path(args.dataset).resolve().stem}-seed{args.seed}"
    return args


# === Views ==========================================================================================================


def augmented(images, args, generator):
    """uint8 (N, 3, S, S) -> float in [0, 1]: the lecture's table (e). All but `none` mirror half of the pictures."""
    x, S = images / 255, images.shape[3]
    if args.augment == "none":
        return x
    if args.augment == "crop-fixed":  # shifted by up to an eighth of the picture
        return common.random_crop(x, S // 8, generator)
    x = common.random_resized_crop(x, S, generator, scale=(args.crop, 1.0))
    return common.random_color_jitter(x, generator, 0.4, 0.4, 0.4, 0.1) if args.augment == "crop-color" else x


def network_input(x):
    """Images in [0, 1] as an encoder takes them: normalised, and in the layout that convolutions like best."""
    return common.normalize(x).contiguous(memory_format=torch.channels_last)


def mask_noise(sampling, count, side, mask_ratio, generator):
    """Noise (count, side * side), of which random_masking removes the patches with the largest: the lecture's (f).

    random: uniform. grid: keeps one patch of every 2 x 2 first. block: removes rectangles, as BEiT does, each of at
    least 8 % of the picture, one after the other until enough is gone, and of the last one a part.
    """
    noise = common.uniform(0, 1, (count, side * side), generator)
    if sampling == "grid":
        odd = torch.arange(side, device=noise.device) % 2 == 1
        noise = noise + (odd[:, None] | odd).flatten()
    elif sampling == "block":
        rectangles, areas = 16, (0.08, max(0.08, mask_ratio))
        boxes = common.random_boxes(count * rectangles, side, side, areas, (0.3, 1 / 0.3), generator)
        top, left, height, width = boxes[:, :, None].unbind(1)  # (count * rectangles, 1)
        line = torch.arange(side, device=noise.device)
        rows, columns = (line >= top) & (line < top + height), (line >= left) & (line < left + width)
        inside = (rows[:, :, None] & columns[:, None, :]).view(count, rectangles, -1)
        rank = torch.arange(rectangles, 0, -1, device=noise.device)[:, None]  # the first rectangle has the highest
        noise = noise + (inside * rank).amax(1)
    return noise


# === Model ==========================================================================================================


def patchify(images, p):
    """Images (B, 3, S, S) -> patches (B, L, 3 p p), L = (S / p)^2, row by row; the colour varies fastest."""
    B, C, S, _ = images.shape
    x = images.reshape(B, C, S // p, p, S // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, p * p * C)


def unpatchify(patches, p):
    """The inverse of patchify: (B, L, 3 p p) -> (B, 3, S, S)."""
    B, L, _ = patches.shape
    side = math.isqrt(L)
    return patches.reshape(B, side, side, p, p, 3).permute(0, 5, 1, 3, 2, 4).reshape(B, 3, side * p, side * p)


def sincos_positions(side, D):
    """Fixed embedding (1, 1 + side^2, D) of positions on a grid: zeros for the class token, then row by row.

    A quarter of D each: sine and cosine of the column, sine and cosine of the row, at wavelengths from 2 pi up to
    2 pi 10000 (Vaswani et al. 2017, in two dimensions).
    """
    frequency = 10000 ** (-torch.arange(D // 4) / (D / 4))
    angles = torch.arange(side)[:, None] * frequency  # (side, D / 4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, D / 2)
    grid = torch.cat([line.repeat(side, 1), line.repeat_interleave(side, 0)], dim=1)  # (side^2, D)
    return torch.cat([torch.zeros(1, D), grid])[None]


class Attention(nn.Module):
    """Multi-head self-attention: (B, T, D) -> (B, T, D)."""

    def __init__(self, D, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(D, 3 * D)
        self.proj = nn.Linear(D, D)

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (B, heads, T, D / heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, T, D))


class Mlp(nn.Module):
    """Two layers, the hidden one four times as wide: (B, T, D) -> (B, T, D)."""

    def __init__(self, D):
        super().__init__()
        self.fc1 = nn.Linear(D, 4 * D)
        self.fc2 = nn.Linear(4 * D, D)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A block of the Vision Transformer (Dosovitskiy et al. 2021), pre-norm: (B, T, D) -> (B, T, D)."""

    def __init__(self, D, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(D, eps=1e-6)
        self.attn = Attention(D, heads)
        self.norm2 = nn.LayerNorm(D, eps=1e-6)
        self.mlp = Mlp(D)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """A linear map of each patch: (B, 3, S, S) -> (B, L, D), row by row."""

    def __init__(self, patch_size, D):
        super().__init__()
        self.proj = nn.Conv2d(3, D, patch_size, patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


def init_weights(module):
    """The authors' initialisation: Xavier for every matrix, the one of the patches included, and biases of zero."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        nn.init.zeros_(module.bias)


class VisionTransformer(nn.Module):
    """The encoder: images (B, 3, S, S) -> class token and mean of the patch tokens (B, 2, D), both after the last norm.

    Parameters have the names of the authors' code and of timm.
    """

    def __init__(self, image_size, patch_size, D, depth, heads):
        super().__init__()
        self.sizes = (image_size, patch_size, D, depth, heads)
        side = image_size // patch_size
        self.patch_embed = PatchEmbed(patch_size, D)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, D))
        self.pos_embed = nn.Parameter(sincos_positions(side, D), requires_grad=False)
        self.blocks = nn.ModuleList(Block(D, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.apply(init_weights)

    def encode_tokens(self, x):
        """Patches with their positions, all or some of them (B, T, D) -> (B, 1 + T, D), the class token first."""
        cls_token = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + T, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, images):
        x = self.encode_tokens(self.patch_embed(images) + self.pos_embed[:, 1:])  # (B, 1 + L, D)
        return torch.stack([x[:, 0], x[:, 1:].mean(1)], dim=1)  # (B, 2, D)


def random_masking(tokens, mask_ratio, noise):
    """Removes the share mask_ratio of tokens (B, L, D), those with the largest noise (B, L): the paper's section 3.

    -> visible (B, L - M, D), with M = mask_ratio L to the nearest whole number; mask (B, L), 1 for a removed token; and
    ids_restore (B, L), which puts visible tokens followed by mask tokens back into their order.
    """
    B, L, D = tokens.shape
    keep = L - round(mask_ratio * L)
    ids_shuffle = noise.argsort(dim=1)  # (B, L)
    ids_restore = ids_shuffle.argsort(dim=1)  # (B, L)
    visible = tokens.gather(1, ids_shuffle[:, :keep, None].expand(-1, -1, D))  # (B, keep, D)
    return visible, (ids_restore >= keep).to(tokens.dtype), ids_restore


class MaskedAutoencoder(VisionTransformer):
    """Encoder and decoder: images (B, 3, S, S), ratio, noise (B, L) -> predicted patches (B, L, 3 p p), mask (B, L).

    With encode_mask_tokens the encoder gets a mask token in the place of every removed patch, as in BERT: the lecture's
    table (c). Otherwise it gets the visible patches alone, and mask tokens come in before the decoder.
    """

    def __init__(self, image_size, patch_size, D, depth, heads, decoder_dim=512, decoder_depth=8, decoder_heads=16,
                 encode_mask_tokens=False):  # fmt: skip
        super().__init__(image_size, patch_size, D, depth, heads)
        self.encode_mask_tokens = encode_mask_tokens
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, D if encode_mask_tokens else decoder_dim))
        positions = sincos_positions(image_size // patch_size, decoder_dim)
        self.decoder_embed = nn.Linear(D, decoder_dim)
        self.decoder_pos_embed = nn.Parameter(positions, requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(decoder_dim, decoder_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, 3 * patch_size**2)
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            part.apply(init_weights)

    def encode(self, images, mask_ratio, noise):
        """-> latent (B, 1 + L - M, D), or (B, 1 + L, D) with mask tokens; mask and ids_restore (B, L)."""
        tokens = self.patch_embed(images)  # (B, L, D)
        visible, mask, ids_restore = random_masking(tokens + self.pos_embed[:, 1:], mask_ratio, noise)
        if self.encode_mask_tokens:
            visible = torch.where(mask[:, :, None] == 1, self.mask_token, tokens) + self.pos_embed[:, 1:]
        return self.encode_tokens(visible), mask, ids_restore

    def decode(self, latent, ids_restore):
        """-> predicted patches (B, L, 3 p p)."""
        x = self.decoder_embed(latent)
        if not self.encode_mask_tokens:
            B, L = ids_restore.shape
            missing = self.mask_token.to(x.dtype).expand(B, L + 1 - x.shape[1], -1)
            patches = torch.cat([x[:, 1:], missing], dim=1)  # (B, L, decoder_dim), visible ones first
            patches = patches.gather(1, ids_restore[:, :, None].expand_as(patches))
            x = torch.cat([x[:, :1], patches], dim=1)  # (B, 1 + L, decoder_dim)
        x = x + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def forward(self, images, mask_ratio, noise):
        latent, mask, ids_restore = self.encode(images, mask_ratio, noise)
        return self.decode(latent, ids_restore), mask

    def encoder(self):
        """What is left after pretraining: a VisionTransformer with a copy of the encoder's weights."""
        encoder, weights = VisionTransformer(*self.sizes).to(self.pos_embed.device), self.state_dict()
        encoder.load_state_dict({name: weights[name] for name in encoder.state_dict()})
        return encoder


ENCODERS = {  # width D, blocks, heads
    "small": (96, 4, 3),
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 24, 16),
}


def build_model(args, image_size):
    """The autoencoder of these arguments. Raises UserError where its sizes do not fit together."""
    L = (image_size // args.patch_size) ** 2
    if image_size % args.patch_size:
        raise UserError(f"--patch-size {args.patch_size}: does not divide pictures of {image_size} x {image_size}")
    if not 0 < round(args.mask_ratio * L) < L:
        raise UserError(f"--mask-ratio {args.mask_ratio}: must remove one of the {L} patches, and leave one")
    heads = max(1, args.decoder_dim // 32)
    if args.decoder_dim % 4 or args.decoder_dim % heads:
        raise UserError(f"--decoder-dim {args.decoder_dim}: must be a multiple of 4 and of its {heads} attention heads")
    return MaskedAutoencoder(image_size, args.patch_size, *ENCODERS[args.encoder], args.decoder_dim,
                             args.decoder_depth, heads, args.encode_mask_tokens)  # fmt: skip


# === Loss ===========================================================================================================


def patch_targets(images, patch_size, target):
    """Normalised images (B, 3, S, S) -> the patches to predict (B, L, 3 p p); the lecture's table (d).

    norm-pixel: each patch minus its mean and over its deviation, so that no patch counts for its contrast.
    """
    patches = patchify(images, patch_size)
    if target == "norm-pixel":
        mean, variance = patches.mean(2, keepdim=True), patches.var(2, keepdim=True)
        patches = (patches - mean) / (variance + 1e-6).sqrt()
    return patches


def reconstruction_loss(prediction, targets, mask):
    """Mean squared error on masked patches alone: prediction, targets (B, L, P), mask (B, L) -> scalar."""
    error = (prediction - targets).square().mean(2)  # (B, L)
    return (error * mask).sum() / mask.sum()


# === Pretrain =======================================================================================================


def autocast(device):
    """bfloat16 for the network on a GPU; losses and the state of the optimizer stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def warmup_cosine(step, steps, warmup):
    """The factor on the learning rate: a linear rise over the share `warmup` of the steps, then half a cosine to 0."""
    rise = warmup * steps
    return (step + 1) / (rise + 1) if step < rise else 0.5 + 0.5 * math.cos(math.pi * (step - rise) / (steps - rise))


def layerwise_adamw(model, lr, steps, args, betas, layer_decay=1.0):
    """AdamW that decays all but norms and biases, which have one dimension; and its learning rate, lr at its peak.

    With layer_decay each block has that share of the learning rate of the one above it, from the head down to the
    patches (paper, table 9; Bao et al. 2022, BEiT).
    """
    groups, depth = {}, len(model.encoder.blocks) if layer_decay < 1 else 0
    for name, p in model.named_parameters():
        block = re.search(r"blocks\.(\d+)", name)
        layer = int(block[1]) + 1 if block else 0 if re.search("embed|token", name) else depth + 1
        scale = layer_decay ** (depth + 1 - layer)
        if p.requires_grad:
            groups.setdefault((scale, p.ndim > 1), []).append(p)
    optimizer = torch.optim.AdamW(
        [
            {"params": parameters, "lr": lr * scale, "weight_decay": args.weight_decay * decays}
            for (scale, decays), parameters in groups.items()
        ],
        betas=betas,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, steps, args.warmup))
    return optimizer, schedule


def pretrain(model, images, args, run, monitor):
    """Learns to reconstruct images, uint8 (M, 3, S, S). There are no labels here; monitor(epoch) -> metrics."""
    device, N, S = next(model.parameters()).device, args.batch_size, images.shape[3]
    steps = len(images) // N  # an epoch leaves out an incomplete last batch
    optimizer, schedule = layerwise_adamw(model, args.lr * N / 256, args.epochs * steps, args, betas=(0.9, 0.95))
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    generator = torch.Generator(device)
    for epoch in range(run.restore(parts) + 1, args.epochs + 1):
        start = time.perf_counter()
        model.train()
        generator.manual_seed(args.seed * 100_000 + epoch)  # an epoch's draws depend on nothing before it
        order = torch.randperm(len(images), generator=generator, device=device)
        losses = torch.zeros(steps, device=device)
        for step, batch in enumerate(common.batches(images, order, N, device)):  # (N, 3, S, S)
            x = network_input(augmented(batch, args, generator))
            noise = mask_noise(args.mask_sampling, N, S // args.patch_size, args.mask_ratio, generator)  # (N, L)
            with autocast(device):
                prediction, mask = model(x, args.mask_ratio, noise)  # (N, L, 3 p p), (N, L)
            targets = patch_targets(x, args.patch_size, args.target)  # (N, L, 3 p p)
            loss = reconstruction_loss(prediction.float(), targets, mask.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses[step] = loss.detach()
            run.foresee(step, losses)
        loss = run.mean_loss(losses, epoch)  # the one wait for the device in an epoch
        seconds = time.perf_counter() - start
        metrics = {"loss": loss, "images_per_second": steps * N / seconds}
        run.log(epoch, metrics | monitor(epoch) | {"seconds": seconds})
        run.save(epoch, parts)


class Run:
    """The folder of a run: args.json, metrics.jsonl, checkpoint.pt and summary.json; and progress on the screen."""

    def __init__(self, args):
        """Reads the checkpoint to go on from, if any. Raises UserError where it does not fit, or would be lost."""
        self.args, self.folder, self.history, self.ticks, self.state = args, Path(args.out), [], [], None
        path = self.folder / "checkpoint.pt"
        if path.exists() and not args.resume:
            raise UserError(f"--out {self.folder}: holds a run already; go on with --resume, or name another folder")
        if path.exists():
            try:
                self.state = torch.load(path, map_location="cpu", weights_only=True)
                method, before, self.history = (self.state[key] for key in ("method", "args", "history"))
            except Exception:  # a file that is torn or something else fails in many ways
                raise UserError(f"{path}: not a checkpoint that can be read") from None
            if method != METHOD:
                raise UserError(f"{path}: is of {method}, not of {METHOD}")
            for field in dataclasses.fields(args):
                was, now = before.get(field.name), getattr(args, field.name)
                if was != now and not field.metadata["free"]:
                    raise UserError(f"{path}: was made with --{field.name.replace('_', '-')} {was}, not {now}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.write("args.json", json.dumps(dataclasses.asdict(args), indent=2) + "\n")
            self.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.history))
        except OSError as error:
            raise UserError(f"--out {self.folder}: cannot be written ({error.strerror})") from None

    def write(self, name, content):
        """Text, or what torch.save takes; under a temporary name first, so that no file is ever half there."""
        temporary = self.folder / f"{name}.partial"
        temporary.write_text(content) if isinstance(content, str) else torch.save(content, temporary)
        temporary.replace(self.folder / name)

    def restore(self, parts):
        """Puts the checkpoint into the parts -> the epochs it has behind it. Without one, the start becomes one."""
        if self.state is None:
            self.save(0, parts)
            return 0
        for name, part in parts.items():
            part.load_state_dict(self.state[name])
        return self.state["epoch"]

    def save(self, epoch, parts):
        """The checkpoint: tensors and plain values only, so that it loads with weights_only=True."""
        state = {"method": METHOD, "args": dataclasses.asdict(self.args), "epoch": epoch, "history": self.history}
        self.write("checkpoint.pt", state | {name: part.state_dict() for name, part in parts.items()})

    def foresee(self, step, losses):
        """Says early how long pretraining will take, from the ten steps between two of the first ones."""
        if step in (10, 20) and len(self.ticks) < 2:
            losses[step].item()  # waits for the device
            self.ticks.append(time.perf_counter())
            if step == 20:
                epochs = self.args.epochs - len(self.history)
                minutes = (self.ticks[1] - self.ticks[0]) / 10 * len(losses) * epochs / 60
                print(f"pretraining will take about {minutes:.1f} minutes", flush=True)

    def mean_loss(self, losses, epoch):
        """losses (steps,) of an epoch -> their mean. Raises UserError if one of them is not finite."""
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            step = (epoch - 1) * len(losses) + bad[0].item() + 1
            raise UserError(
                f"the loss is not finite at step {step}, in epoch {epoch}: try a smaller --lr in another --out; "
                f"{self.folder / 'checkpoint.pt'} is that of epoch {epoch - 1}"
            )
        return losses.mean().item()

    def log(self, epoch, metrics):
        """A line of metrics.jsonl, and a shorter one on the screen."""
        self.history.append({"epoch": epoch} | metrics)
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(self.history[-1]) + "\n")
        left = sum(line["seconds"] for line in self.history) / epoch * (self.args.epochs - epoch)
        minutes, seconds = divmod(round(left), 60)
        shown = {k: v for k, v in metrics.items() if isinstance(v, float) and k != "seconds"}
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        print(f"epoch {epoch}/{self.args.epochs}  {minutes}:{seconds:02} left  {numbers}", flush=True)

    def finish(self, start, device, encoder, results):
        """summary.json from results = {name: numbers or rows of them} and what every run has to say -> its content."""
        summary = {
            "method": METHOD,
            "command": shlex.join(["python", *sys.argv]),
            "date": time.strftime("%Y-%m-%d"),
            "dataset": self.args.dataset,
            "seed": self.args.seed,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "epochs": self.args.epochs,
            "resumed_at_epoch": self.state["epoch"] if self.state else 0,
            "parameters": sum(p.numel() for p in encoder.parameters()),
            "images_per_second": statistics.median(line["images_per_second"] for line in self.history),
            "peak_memory_gb": peak_memory_gb(device),
            "pretrain_seconds": sum(line["seconds"] for line in self.history),
            "total_seconds": time.perf_counter() - start,
            **results,
            "history": self.history,
        }
        self.write("encoder.pt", encoder.state_dict())
        self.write("summary.json", json.dumps(summary, indent=2) + "\n")
        print(f"{summary['total_seconds']:.0f} s in all; summary.json, encoder.pt and pictures are in {self.folder}")
        return summary


# === Evaluate =======================================================================================================


@torch.no_grad()
def features(encoder, images):
    """Whole pictures through the frozen encoder: uint8 (M, 3, S, S) -> float32 (M, D)."""
    device = next(encoder.eval().parameters()).device
    with autocast(device):
        return torch.cat([encoder(network_input(x.to(device) / 255)).float() for x in images.split(512)])


def knn_accuracy(bank, bank_labels, queries, labels, k=200, temperature=0.1):
    """Weighted nearest neighbours (Wu et al. 2018, InstDisc): features (M, D), (Q, D) -> accuracy in [0, 1].

    The k pictures of the bank of highest cosine s with a query vote for their class, each with exp(s / temperature).
    """
    bank, queries, correct = F.normalize(bank, dim=1), F.normalize(queries, dim=1), 0
    classes = int(bank_labels.max()) + 1
    for query, label in zip(queries.split(1024), labels.split(1024), strict=True):
        s, nearest = (query @ bank.T).topk(min(k, len(bank)))  # (B, k)
        votes = torch.zeros(len(query), classes, device=bank.device)
        votes.scatter_add_(1, bank_labels[nearest], (s / temperature).exp())
        correct += (votes.argmax(1) == label).sum().item()
    return correct / len(labels)


def linear_probe(train, train_labels, test, test_labels):
    """Logistic regression on frozen features (M, D), as in CLIP's appendix A.3 -> accuracy on test in [0, 1].

    Features are standardised; of six L2 strengths the one counts that is best on a tenth of the training labels,
    held out; then all of them are fitted.
    """
    mean, std = train.mean(0), train.std(0)
    train, test = ((x - mean) / (std + 1e-5) for x in (train, test))
    classes = int(train_labels.max()) + 1

    def fit(layer, x, y, l2):
        """Minimises cross-entropy + l2 |weights|^2 from where the layer stands; the problem is convex."""
        optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=300, line_search_fn="strong_wolfe")

        def objective():
            optimizer.zero_grad()
            loss = F.cross_entropy(layer(x), y) + l2 * layer.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(objective)

    def accuracy(layer, x, y):
        return (layer(x).argmax(1) == y).sum().item() / len(y)

    held = torch.arange(len(train), device=train.device) % 10 == 0
    layer, best, strength = nn.Linear(train.shape[1], classes, device=train.device), -1.0, None
    nn.init.zeros_(layer.weight)
    for l2 in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6):  # from strong to weak, each from the solution of the one before
        fit(layer, train[~held], train_labels[~held], l2)
        score = accuracy(layer, train[held], train_labels[held])
        if score > best:
            best, strength = score, l2
    fit(layer, train, train_labels, strength)
    return accuracy(layer, test, test_labels)


def probes(train, train_labels, test, test_labels):
    """Features (M, D), (Q, D) and labels -> accuracies on test."""
    return {
        "knn": knn_accuracy(train, train_labels, test, test_labels),
        "linear_probe": linear_probe(train, train_labels, test, test_labels),
    }


def evaluate(encoder, data):
    """Frozen probes of the mean of the patch tokens and of the class token -> accuracies on test, and the former's
    features of train and test. `knn` and `linear_probe` are those of the mean."""
    if not data.classes:
        return {}, None
    y, test_y = data.train_labels, data.test_labels
    h, test_h = features(encoder, data.train_images[: len(y)]), features(encoder, data.test_images)  # (M, 2, D)
    accuracies = probes(h[:, 1], y, test_h[:, 1], test_y)
    of_class_token = probes(h[:, 0], y, test_h[:, 0], test_y)
    accuracies |= {f"{name}_class_token": value for name, value in of_class_token.items()}
    return accuracies, (h[:, 1], test_h[:, 1])


class Classifier(nn.Module):
    """A copy of the encoder, and a linear layer on the normalised mean of its patch tokens: images -> (B, classes)."""

    def __init__(self, encoder, classes):
        super().__init__()
        D = encoder.pos_embed.shape[2]
        self.encoder = copy.deepcopy(encoder)
        self.encoder.norm = nn.Identity()  # as in the authors' code, the norm comes after the mean
        self.fc_norm = nn.LayerNorm(D, eps=1e-6)
        self.head = nn.Linear(D, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)

    def forward(self, images):
        return self.head(self.fc_norm(self.encoder(images)[:, 1]))


def train_end_to_end(encoder, data, rows, args, layer_decay):
    """Trains all of an encoder with the labels of some rows, MAE's own measure -> accuracy on test.

    Steps are as many for few labels as for all: fine_tune_epochs times the pictures with labels. Crops are those of
    pretraining, labels are smoothed by 0.1; the paper's mixup, cutmix, RandAugment and drop path are left out.
    """
    device, N = data.train_labels.device, min(args.batch_size, len(rows))
    steps = args.fine_tune_epochs * max(1, len(data.train_labels) // args.batch_size)
    passes = math.ceil(steps / (len(rows) // N))
    torch.manual_seed(args.seed)
    model = Classifier(encoder, len(data.classes)).to(device).train()
    lr, steps = args.fine_tune_lr * N / 256, passes * (len(rows) // N)
    optimizer, schedule = layerwise_adamw(model, lr, steps, args, (0.9, 0.999), layer_decay)
    generator = torch.Generator(device).manual_seed(args.seed)
    for _ in range(passes):
        order = rows[torch.randperm(len(rows), generator=generator, device=device)]
        for index, batch in zip(order.split(N), common.batches(data.train_images, order, N, device), strict=False):
            x = network_input(augmented(batch, args, generator))
            with autocast(device):
                logits = model(x)  # (N, classes)
            loss = F.cross_entropy(logits.float(), data.train_labels[index], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return (features(model, data.test_images).argmax(1) == data.test_labels).sum().item() / len(data.test_labels)


def supervised(scratch, encoder, data, h, rows, args):
    """The frozen encoder with the labels of some rows and, for --fine-tune, all of it trained with them, against the
    same network from scratch, whose layers all have the full learning rate. h: features of train and test."""
    accuracies = {"labels": len(rows)} | probes(h[0][rows], data.train_labels[rows], h[1], data.test_labels)
    if args.fine_tune:
        print(f"fine-tuning on {len(rows)} labels, and training from scratch", flush=True)
        accuracies["fine_tuned"] = train_end_to_end(encoder, data, rows, args, args.layer_decay)
        accuracies["from_scratch"] = train_end_to_end(scratch, data, rows, args, 1.0)
    return accuracies


# === Pictures =======================================================================================================


def save_sheet(path, blocks):
    """Blocks of images, float (rows, columns, 3, S, S) in [0, 1], side by side, each under its title."""
    S, tiles = blocks[0][1].shape[4], []
    zoom = max(1, round(64 / S))
    for _, images in blocks:
        grid = torchvision.utils.make_grid(images.flatten(0, 1).cpu(), images.shape[1], padding=1, pad_value=1.0)
        tile = Image.fromarray((255 * grid).round().byte().permute(1, 2, 0).numpy())
        tiles.append(tile.resize((zoom * tile.width, zoom * tile.height), Image.Resampling.NEAREST))
    gap, head = 16, 24
    page = Image.new("RGB", (sum(tile.width + gap for tile in tiles) + gap, tiles[0].height + head + gap), "white")
    left = gap
    for (title, _), tile in zip(blocks, tiles, strict=True):
        ImageDraw.Draw(page).text((left + zoom, 6), title, fill="black", font_size=13)
        page.paste(tile, (left, head))
        left += tile.width + gap
    page.save(path)


@torch.no_grad()
def reconstruct(model, images, args):
    """Some pictures, uint8 (R, 3, S, S), masked and as the model completes them: both float (R, 3, S, S) in [0, 1].

    The visible patches are those of the picture. A normalised target says nothing of a patch's mean and deviation, so
    these are taken from the picture, for the eye alone.
    """
    p, (R, _, S, _) = args.patch_size, images.shape
    generator = torch.Generator(images.device).manual_seed(args.seed)
    noise = mask_noise(args.mask_sampling, R, S // p, args.mask_ratio, generator)
    x = network_input(images / 255)
    with autocast(images.device):
        prediction, mask = model.eval()(x, args.mask_ratio, noise)
    prediction, patches, mask = prediction.float(), patchify(x, p), mask[:, :, None].float()
    if args.target == "norm-pixel":
        prediction = prediction * (patches.var(2, keepdim=True) + 1e-6).sqrt() + patches.mean(2, keepdim=True)
    mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (common.MEAN, common.STD))
    pasted = unpatchify(torch.where(mask == 1, prediction, patches), p) * std + mean
    hidden = unpatchify(mask.expand_as(patches), p) == 1
    return torch.where(hidden, 0.5, images / 255), pasted.clamp(0, 1)


def save_reconstruction(run, epoch, model, images, args):
    """reconstruction.png: pictures masked, completed after this and earlier epochs, and as they are.

    The earlier ones are kept in reconstruction.pt, so that a resumed run shows them too.
    """
    masked, completed = reconstruct(model, images, args)
    path = run.folder / "reconstruction.pt"
    before = torch.load(path, weights_only=True) if path.exists() else {}
    drawn = {e: x for e, x in before.items() if e < epoch} | {epoch: completed.cpu()}
    run.write(path.name, drawn)
    blocks = [("masked", masked)] + [(f"epoch {e}", x) for e, x in drawn.items()] + [("picture", images / 255)]
    save_sheet(run.folder / "reconstruction.png", [(title, x[:, None]) for title, x in blocks])


# === Main ===========================================================================================================


def pick_device(name):
    """The device of that name, or the best there is for `auto`. Raises UserError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not available ({str(error).splitlines()[0]})") from None


def peak_memory_gb(device):
    """Of the device, or of the whole process on a CPU; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def print_table(rows):
    """Rows, dicts with the same keys: floats are accuracies."""
    print()
    for row in ({key: key for key in rows[0]}, *rows):
        cells = (f"{v:.1%}" if isinstance(v, float) else str(v) for v in row.values())
        print("".join(f"{cell:>{max(14, len(key) + 2)}}" for cell, key in zip(cells, row, strict=True)))


def main(args):
    """Loads, measures the untrained encoder, pretrains, measures again -> the content of summary.json."""
    start = time.perf_counter()
    device = pick_device(args.device)
    data = common.load_dataset(args.dataset, args.data_dir, args.image_size).to(device)
    M, _, S, _ = data.train_images.shape
    if args.batch_size > M:
        raise UserError(f"--batch-size {args.batch_size}: {args.dataset} has only {M} training pictures")
    amounts = args.labels or [1.0] * args.fine_tune
    if amounts and not data.classes:
        raise UserError(f"--labels and --fine-tune: {args.dataset} has no classes, no folders train/<class>")
    subsets = [common.labelled_rows(data.train_labels, amount, args.seed) for amount in amounts]
    torch.manual_seed(args.seed)
    model = build_model(args, S).to(device)
    run = Run(args)
    print(f"{METHOD} on {args.dataset}: {M} pictures, {S} x {S}, {len(data.train_labels)} of them with labels; "
          f"{device}; results go to {run.folder}", flush=True)  # fmt: skip
    if not data.classes:
        print("there are no train/<class> folders, so the probes are skipped")
    if device.type == "cpu" and args.encoder != "small":
        print(f"{args.encoder} is made for a GPU; the recipe for a CPU is --encoder small")

    scratch = model.encoder()
    if args.compile or (args.compile is None and device.type == "cuda"):
        model.compile()
        common.compile_operators()
    untrained, _ = evaluate(scratch, data)
    shown = data.train_images[:8].to(device)
    if data.classes:  # a test picture of each class
        first = [(data.test_labels == label).nonzero()[0, 0].item() for label in data.test_labels.unique()[:10]]
        shown = data.test_images[first].to(device)

    def monitor(epoch):
        """reconstruction.png after epochs 1, 2, 4, 8 and so on; at times the kNN of a tenth of the training pictures
        among the rest, which recipes are chosen by."""
        if epoch & (epoch - 1) == 0 or epoch == args.epochs:
            save_reconstruction(run, epoch, model, shown, args)
        if not data.classes or (epoch % args.eval_every and epoch < args.epochs):
            return {}
        labels, held = data.train_labels, torch.arange(len(data.train_labels), device=device) % 10 == 0
        h = features(model.encoder(), data.train_images[: len(labels)])[:, 1]
        return {"knn": knn_accuracy(h[~held], labels[~held], h[held], labels[held])}

    pretrain(model, data.train_images, args, run, monitor)
    trained, after = evaluate(model.encoder(), data)
    few = [supervised(scratch, model.encoder(), data, after, rows, args) for rows in subsets]
    if data.classes:
        print_table([{"on test": name, "untrained": untrained[name], "trained": trained[name]} for name in trained])
    if few:
        print_table(few)
    return run.finish(
        start, device, model.encoder(), {"untrained": untrained, "trained": trained, "semi_supervised": few}
    )


if __name__ == "__main__":
    try:
        main(parse_args())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command with --resume goes on from the last whole epoch", file=sys.stderr)
        sys.exit(130)
