"""MAE: an autoencoder reconstructs the masked patches of an image from the visible ones.

Three quarters of the patches are removed at random: if fewer were missing, their neighbors would be
enough to interpolate them. A Vision Transformer encodes the visible patches only, which makes a
large encoder cheap, and spares it mask tokens, which real images do not have. A light decoder gets
the encoder's output and, in place of each missing patch, the same learned mask token, and predicts
the pixels. It can be light, since it is thrown away after pretraining; the encoder then sees whole
images. The encoder is made to be fine-tuned: its features are strong, but not linearly separable.
Training one of its blocks lifts ViT-L from 73.5 to 81.0 % (paper, section 4.3).

    He, Chen, Xie, Li, Dollar, Girshick: Masked Autoencoders Are Scalable Vision Learners, CVPR
    2022. Over the set M of masked patches x_i and their reconstructions y_i, averaged over the
    3 p p values of a patch:

    L = 1 / |M|  sum_{i in M} |x_i - y_i|^2 / (3 p p)

    python mae.py                                       shapes drawn by code; a laptop CPU will do
    python mae.py --fine-tune                           MAE's own measure, against from scratch
    python mae.py --dataset cifar10 --compile           ViT-tiny, patches of 4 x 4, on a GPU
    python mae.py --dataset cifar10 --encoder small     a small ViT, on a CPU
    python mae.py --init encoder.pt --epochs 0          measures the weights in a file
    torchrun --nproc-per-node 8 mae.py --dataset path/to/images          your own images, on 8 GPUs

Accuracy on test of shapes, with seed 0 (records in results/): linear probe 18.6 -> 51.5 % from the
untrained to the trained encoder; fine-tuned 70.5 %, from scratch by the same recipe 10.4 %.

Left out of the paper: targets of a PCA and a dVAE in table 1 (d); mixup, cutmix, RandAugment and
drop path in fine-tuning.
"""

import argparse
import contextlib
import copy
import dataclasses
import difflib
import functools
import io
import json
import math
import os
import re
import shlex
import statistics
import sys
import textwrap
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import ImageDraw
from torch import nn
from torchvision.transforms.functional import to_pil_image

import common
from common import UserError

RANK = int(os.environ.get("RANK", 0))  # torchrun starts a process for each GPU, numbered from 0
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def flag(default, help, low=None, high=math.inf, choices=None, resume=False):
    """A field of Args that the command line can set. A number must be from low to high; only flags
    with resume=True, which change nothing about the training, go together with --resume."""
    metadata = {"help": help, "low": low, "high": high, "choices": choices, "resume": resume}
    return dataclasses.field(default=default, metadata=metadata)


ENCODERS = {  # width D, blocks and attention heads
    "small": (96, 4, 3),
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 24, 16),
}
TARGETS = "pixel", "norm-pixel"


@dataclasses.dataclass
class Args:
    """The values here are the recipe for CIFAR-10 on a GPU. SHAPES, SMALL and LARGE_IMAGES, below,
    replace some of them, but never a flag that was typed."""

    script: str = "mae.py"  # relatives/ name their own
    dataset: str = flag("shapes", "shapes, cifar10, cifar100, stl10, an .npz file, an image folder")
    data_dir: str = flag("data", "folder for downloads and decoded images", resume=True)
    image_size: int = flag(96, "side of a folder's images; largest side in an .npz file", 8, 512)
    encoder: str = flag("vit_tiny", "the encoder; paper: vit_base, vit_large", choices=ENCODERS)
    init: str = flag("", "weights to begin with: an encoder.pt, or the authors' for --encoder")
    patch_size: int = flag(4, "side of a patch; 2 leaves little in it to predict; paper: 16", 1, 64)
    mask_ratio: float = flag(0.75, "fraction of masked patches; paper: 0.75", 0.01, 0.99)
    decoder_depth: int = flag(4, "blocks of the decoder; paper: 8", 1, 32)
    decoder_dim: int = flag(192, "width of the decoder, a head for every 32; paper: 512", 4, 4096)
    target: str = flag("norm-pixel", "pixels, or these standardized per patch", choices=TARGETS)
    crop: float = flag(0.2, "smallest crop, as a fraction of an image's area; paper: 0.2", 0.01, 1)
    epochs: int = flag(250, "passes over the images; paper: 800 and 1600", 0)
    batch_size: int = flag(1024, "images per step, over all GPUs; paper: 4096", 2)
    lr: float = flag(3e-4, "peak learning rate for 256 images per step; paper: 1.5e-4", 0)
    weight_decay: float = flag(0.05, "weight decay, but of matrices only; paper: 0.05", 0)
    warmup: float = flag(0.05, "fraction of the steps with linear warmup; paper: 0.05", 0, 0.9)
    fine_tune: bool = flag(False, "fine-tune with all labels; and from scratch", resume=True)
    fine_tune_epochs: int = flag(100, "passes over the labels in both; paper: 100", 1, resume=True)
    fine_tune_lr: float = flag(1e-3, "learning rate in both; paper: 1e-3", 0, resume=True)
    layer_decay: float = flag(
        0.75, "fine-tuning: a block's rate over the next one's; paper: 0.75", 0.01, 1, resume=True
    )
    eval_every: int = flag(10, "epochs between two kNN measurements on held-out training labels", 1)
    seed: int = flag(0, "seed of weights, batches, masks and crops", 0, 2**31)
    device: str = flag("auto", "cuda, mps, cpu, or auto: the first that is there", resume=True)
    compile: bool = flag(False, "compile network and views, for long runs on a GPU", resume=True)
    out: str = flag("", "run folder; by default runs/<method>-<dataset>-seed<seed>")
    resume: str = flag("", "run folder to continue, with the flags of its first start", resume=True)
    explicit: tuple = ()  # flags that were typed: recipes leave them alone
    command: str = ""


# With --encoder small: what two CPU cores train in ten minutes.
SMALL = dict(
    image_size=32, decoder_depth=2, decoder_dim=64, target="pixel", epochs=5, batch_size=64,
    lr=6e-3, fine_tune_epochs=4, fine_tune_lr=4e-3, eval_every=5,
)  # fmt: skip
SHAPES = SMALL | dict(
    encoder="small", epochs=14, batch_size=32, lr=1.2e-2, crop=0.5, fine_tune_lr=8e-3, eval_every=14
)
# Above 64 pixels, without --encoder small.
LARGE_IMAGES = dict(encoder="vit_small", patch_size=8, decoder_dim=256)


# === Views and masks ==============================================================================
def augmented(images, args, generator):
    """uint8 (N, 3, S, S) -> float in [0, 1]: crop and flip are enough, as every mask makes a new
    task of an image. Color jitter makes it worse (paper, table 1 (e))."""
    return common.random_resized_crop(
        images / 255, images.shape[3], generator, scale=(args.crop, 1.0)
    )


def random_masking(tokens, mask_ratio, noise):
    """Removes the fraction mask_ratio of tokens (B, L, D), those with the largest noise (B, L): the
    paper's section 3.

    -> visible (B, L - M, D), with M = mask_ratio L to the nearest whole number; mask (B, L), 1 for
    a removed token; and ids_restore (B, L), which puts visible tokens followed by M others back
    into their order.
    """
    L = tokens.shape[1]
    keep = L - round(mask_ratio * L)
    ids_shuffle = noise.argsort(dim=1)  # (B, L)
    ids_restore = ids_shuffle.argsort(dim=1)  # (B, L), as this inverts a permutation
    ids_keep = ids_shuffle[:, :keep, None].expand(-1, -1, tokens.shape[2])
    visible = tokens.gather(1, ids_keep)  # (B, keep, D)
    mask = (ids_restore >= keep).to(tokens.dtype)
    return visible, mask, ids_restore


def patchify(images, p):
    """Images (B, 3, S, S) -> patches (B, L, 3 p p), L = (S / p)^2, row by row; the color varies
    fastest."""
    x = images.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, 3, S / p, p, S / p, p)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches, p):
    """The inverse of patchify: (B, L, 3 p p) -> (B, 3, S, S)."""
    side = math.isqrt(patches.shape[1])
    x = patches.unflatten(2, (p, p, 3)).unflatten(1, (side, side))  # (B, S / p, S / p, p, p, 3)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


# === Model ========================================================================================
class MaskedAutoencoder(nn.Module):
    """Encoder and decoder: images (B, 3, S, S), mask_ratio, noise (B, L) -> predicted patches
    (B, L, 3 p p), and mask (B, L). The noise decides what is masked; it is drawn outside, by the
    run's generator, so that runs repeat. Parameters have the names of the authors' code, those of
    the encoder after `encoder.`."""

    def __init__(
        self,
        image_size,
        patch_size,
        D,
        depth,
        heads,
        decoder_dim=512,
        decoder_depth=8,
        decoder_heads=16,
    ):
        super().__init__()
        self.encoder = VisionTransformer(image_size, patch_size, D, depth, heads)
        self.decoder_embed = nn.Linear(D, decoder_dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, decoder_dim))
        positions = sincos_positions(image_size // patch_size, decoder_dim)
        self.decoder_pos_embed = nn.Parameter(positions, requires_grad=False)
        blocks = [Block(decoder_dim, decoder_heads) for _ in range(decoder_depth)]
        self.decoder_blocks = nn.ModuleList(blocks)
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, 3 * patch_size**2)
        initialize(self)

    def forward(self, images, mask_ratio, noise):
        tokens = self.encoder.embed(images)  # (B, L, D), with positions: visible ones need theirs
        visible, mask, ids_restore = random_masking(tokens, mask_ratio, noise)
        latent = self.encoder.encode(visible)  # (B, 1 + L - M, D), the class token first
        x = self.decoder_embed(latent)  # (B, 1 + L - M, decoder_dim)
        B, L, _ = tokens.shape
        missing = L - visible.shape[1]
        mask_tokens = self.mask_token.to(x.dtype).expand(B, missing, -1)
        patches = torch.cat([x[:, 1:], mask_tokens], dim=1)
        patches = patches.gather(1, ids_restore[:, :, None].expand_as(patches))  # in their order
        return self.decode(torch.cat([x[:, :1], patches], dim=1)), mask

    def decode(self, x):
        """Class token and L patches (B, 1 + L, decoder_dim) -> predicted patches (B, L, 3 p p). No
        loss reads the class token: only attention trains it."""
        x = x + self.decoder_pos_embed  # again: mask tokens differ by nothing else
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]


def build_mae(args, image_size):
    """The model of a run, for images of this size."""
    L = (image_size // args.patch_size) ** 2
    if not 0 < round(args.mask_ratio * L) < L:
        raise UserError(
            f"--mask-ratio {args.mask_ratio}: must mask one of the {L} patches, and leave one"
        )
    heads = max(1, args.decoder_dim // 32)
    if args.decoder_dim % 4 or args.decoder_dim % heads:
        raise UserError(
            f"--decoder-dim {args.decoder_dim}: must be a multiple of 4, and of its heads, {heads}"
        )
    decoder = args.decoder_dim, args.decoder_depth, heads
    model = MaskedAutoencoder(image_size, args.patch_size, *ENCODERS[args.encoder], *decoder)
    load_weights(model.encoder, args)
    return model


# === Loss =========================================================================================
def patch_targets(images, patch_size, target):
    """Normalized images (B, 3, S, S) -> patches to predict (B, L, 3 p p): the paper's table 1 (d).
    norm-pixel: minus a patch's mean, over its standard deviation, so that patches of high contrast
    do not dominate the loss."""
    patches = patchify(images, patch_size)
    if target == "norm-pixel":
        mean = patches.mean(2, keepdim=True)
        std = (patches.var(2, keepdim=True) + 1e-6).sqrt()
        patches = (patches - mean) / std
    return patches


def reconstruction_loss(prediction, targets, mask):
    """Mean squared error on the masked patches only, since visible ones could be copied:
    prediction, targets (B, L, P), mask (B, L) -> scalar. To predict the mean of every patch would
    score about 1 for norm-pixel, and for pixel the mean variance within a patch."""
    error = (prediction - targets).square().mean(2)  # (B, L)
    return (error * mask).sum() / mask.sum()


# === Training =====================================================================================
def training_step(network, images, args, generator, progress, update, loss_of=reconstruction_loss):
    """Masks, encodes, decodes and compares uint8 images (N, 3, S, S); update(loss) trains both
    networks. Returns what to log. relatives/simmim.py replaces loss_of."""
    x = common.normalize(augmented(images, args, generator))  # (N, 3, S, S)
    targets = patch_targets(x, args.patch_size, args.target)  # (N, L, 3 p p)
    noise = common.uniform(0, 1, targets.shape[:2], generator)  # (N, L): every image has its mask
    with autocast(x.device):
        prediction, mask = network(x, args.mask_ratio, noise)  # (N, L, 3 p p), (N, L)
    loss = loss_of(prediction.float(), targets, mask.float())
    update(loss)
    return {"loss": loss}


def layer_of(name, depth):
    """The layer of an encoder's parameter: 0 for the embedding, 1 to depth for the blocks, and
    depth + 1 for all above them."""
    block = re.search(r"encoder\.blocks\.(\d+)", name)
    if block:
        return int(block[1]) + 1
    if re.search("patch_embed|cls_token|pos_embed", name):
        return 0
    return depth + 1


def parameter_groups(model, lr, weight_decay, layer_decay):
    """Each block of the encoder has layer_decay times the learning rate of the one above it, as
    lower ones are more general (Bao et al. 2022, BEiT). Tokens, positions, norms and biases have no
    weight decay."""
    groups = {}
    depth = len(model.encoder.blocks)
    for name, p in model.named_parameters():
        matrix = p.ndim > 1 and not name.endswith(("_token", "pos_embed"))
        rate = lr * layer_decay ** (depth + 1 - layer_of(name, depth))
        decay = weight_decay if matrix else 0.0
        group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(p)
    return list(groups.values())


def make_optimizer(model, args, batch_size, steps):
    """AdamW; linear warmup, then half a cosine to 0. Learning rates are for batches of 256, and
    betas the paper's: tables 8 and 9 are its recipes for pretraining and for fine-tuning."""
    lr = args.lr
    betas = (0.9, 0.95)
    layer_decay = 1.0
    if isinstance(model, Classifier):
        lr = args.fine_tune_lr
        betas = (0.9, 0.999)
        layer_decay = model.layer_decay
    groups = parameter_groups(model, lr * batch_size / 256, args.weight_decay, layer_decay)
    optimizer = torch.optim.AdamW(groups, betas=betas, fused=True)
    warmup = args.warmup * steps

    def factor(step):
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = (min(step, steps) - warmup) / (steps - warmup)
        return 0.5 + 0.5 * math.cos(math.pi * progress)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


# === Vision Transformer ===========================================================================
class Block(nn.Module):
    """A pre-norm block of the Vision Transformer (Dosovitskiy et al. 2021): (B, T, D) ->
    (B, T, D)."""

    def __init__(self, D, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(D, eps=1e-6)
        self.norm2 = nn.LayerNorm(D, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(D, 3 * D), "proj": nn.Linear(D, D)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(D, 4 * D), "fc2": nn.Linear(4 * D, D)})

    def qkv(self, x):
        """Queries, keys and values (3, B, heads, T, D / heads)."""
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(2, (3, self.heads, -1))
        return qkv.permute(2, 0, 3, 1, 4)

    def forward(self, x):
        q, k, v = self.qkv(x)
        heads = F.scaled_dot_product_attention(q, k, v)  # (B, heads, T, D / heads)
        x = x + self.attn["proj"](heads.transpose(1, 2).flatten(2))
        hidden = F.gelu(self.mlp["fc1"](self.norm2(x)))
        return x + self.mlp["fc2"](hidden)


def initialize(model):
    """The authors' initialization of all linear layers and of the patch embedding."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight.flatten(1))
            nn.init.zeros_(layer.bias)


def sincos_positions(side, D):
    """Fixed embedding (1, 1 + side^2, D) of a grid: zeros for the class token, then row by row. A
    quarter of D each: sine and cosine of column and of row, at wavelengths 2 pi to 2 pi 10000
    (Vaswani et al. 2017, in 2-D)."""
    frequencies = 10000 ** (-torch.arange(D // 4) / (D / 4))
    angles = torch.arange(side)[:, None] * frequencies  # (side, D / 4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, D / 2)
    columns = line.repeat(side, 1)  # (side^2, D / 2)
    rows = line.repeat_interleave(side, 0)
    grid = torch.cat([columns, rows], dim=1)  # (side^2, D)
    return torch.cat([torch.zeros(1, D), grid])[None]


class VisionTransformer(nn.Module):
    """Images (B, 3, S, S) -> class token and mean of the patch tokens, both after the last norm:
    (B, 2 D). S may be any multiple of patch_size. Parameters have the names of the authors' code
    and of timm, so their weights load."""

    def __init__(self, image_size, patch_size, D, depth, heads):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, D, patch_size, patch_size)})
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, D))
        positions = sincos_positions(image_size // patch_size, D)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList([Block(D, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(D, eps=1e-6)

    def positions(self, T):
        """Embeddings (1, T, D) of class token and patches, interpolated for other image sizes."""
        old = math.isqrt(self.pos_embed.shape[1])  # patches a side
        new = math.isqrt(T)
        grid = self.pos_embed[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, (new, new), mode="bicubic").flatten(2).transpose(1, 2)
        return torch.cat([self.pos_embed[:, :1], grid], dim=1)

    def embed(self, images):
        """(B, 3, S, S) -> patch tokens with their positions (B, L, D), row by row."""
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        return x + self.positions(1 + x.shape[1])[:, 1:]

    def encode(self, x):
        """Patch tokens, all or some of them (B, T, D) -> (B, 1 + T, D), the class token first."""
        cls_token = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls_token.expand(x.shape[0], -1, -1), x], dim=1)  # (B, 1 + T, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def tokens(self, images):
        """(B, 3, S, S) -> class token and patch tokens (B, 1 + L, D)."""
        return self.encode(self.embed(images))

    def forward(self, images):
        x = self.tokens(images)
        class_token = x[:, 0]
        patch_mean = x[:, 1:].mean(1)
        return torch.cat([class_token, patch_mean], dim=1)


# === Evaluation ===================================================================================
@torch.no_grad()
def features(network, images):
    """Images without augmentation, uint8 (M, 3, S, S), through a frozen network -> float (M, D)."""
    network.eval()
    device = next(network.parameters()).device
    with autocast(device):
        h = [network(common.normalize(x.to(device) / 255)).float() for x in images.split(512)]
    h = torch.cat(h)
    if not h.isfinite().all():
        raise UserError("the features are not finite, so nothing is measured: try a smaller --lr")
    return h


def knn_accuracy(bank, bank_labels, queries, labels, k=200, temperature=0.1):
    """k nearest neighbors, features (M, D), (Q, D) -> accuracy in [0, 1]. Those of highest cosine s
    vote for their class, each with exp(s / temperature) (Wu et al. 2018; k and temperature are
    those of the CIFAR-10 notebook by MoCo's authors)."""
    counts = bank_labels.bincount()
    smallest = int(counts[counts > 0].min())
    k = min(k, max(10, smallest), len(bank))  # or the smallest class would always be outvoted
    bank = F.normalize(bank, dim=1)
    queries = F.normalize(queries, dim=1)
    correct = 0
    for query, label in zip(queries.split(1024), labels.split(1024), strict=True):
        s, nearest = (query @ bank.T).topk(k)  # (B, k)
        votes = torch.zeros(len(query), len(counts), device=bank.device)
        votes.scatter_add_(1, bank_labels[nearest], (s / temperature).exp())
        correct += (votes.argmax(1) == label).sum().item()
    return correct / len(labels)


def linear_probe(train, train_labels, test, test_labels):
    """Logistic regression on standardized frozen features (M, D), (Q, D) -> accuracy in [0, 1], on
    test. C is 1, scikit-learn's default. L-BFGS begins at zero and ends when it has converged."""
    mean = train.mean(0)
    std = train.std(0, correction=0) + 1e-5
    train = (train - mean) / std
    test = (test - mean) / std
    classes = int(train_labels.max()) + 1
    weight = train.new_zeros(classes, train.shape[1], requires_grad=True)
    bias = train.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=1000,
        tolerance_grad=1e-5,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def objective():
        optimizer.zero_grad()
        penalty = 0.5 / len(train) * weight.square().sum()
        loss = F.cross_entropy(F.linear(train, weight, bias), train_labels) + penalty
        loss.backward()
        return loss

    optimizer.step(objective)
    predicted = F.linear(test, weight, bias).argmax(1)
    return (predicted == test_labels).float().mean().item()


def effective_rank(h):
    """How many directions features (M, D) fill, from 1 to D: exp of the entropy of their singular
    values, normalized to sum to 1 (RankMe, Garrido et al. 2023). It needs no labels."""
    s = torch.linalg.svdvals(h)
    p = s / s.sum().clamp(min=1e-9)  # features that are all 0 have rank 1
    return torch.special.entr(p).sum().exp().item()


def monitor(encoder, data):
    """While training: the effective rank of h, of at most 4,096 images, and kNN on a tenth of the
    training labels, from the others. Recipes are chosen by kNN, since the test images are kept for
    the end."""
    images = data.train_images
    y = data.train_labels
    if len(y) < 2:
        some = images[:: len(images) // 4096 + 1]
        return {"rank": effective_rank(features(encoder, some))}
    h = features(encoder, images[: len(y)])
    held_out, others = data.held_out_labels()
    knn = knn_accuracy(h[others], y[others], h[held_out], y[held_out])
    return {"rank": effective_rank(h[:: len(h) // 4096 + 1]), "knn": knn}


class PatchMean(nn.Module):
    """An encoder from which the mean of the patch tokens is taken: (B, 3, S, S) -> (B, D)."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, images):
        return self.encoder.tokens(images)[:, 1:].mean(1)


def evaluate(encoder, data):
    """kNN and linear probe of the mean of the patch tokens, and of the class token, which the
    paper's probe reads -> accuracies on test, none without labels."""
    if not data.classes:
        return {}
    y = data.train_labels
    test_y = data.test_labels
    class_token, patch_mean = features(encoder, data.train_images[: len(y)]).chunk(2, dim=1)
    test_class_token, test_patch_mean = features(encoder, data.test_images).chunk(2, dim=1)
    accuracies = {"knn": knn_accuracy(patch_mean, y, test_patch_mean, test_y)}
    accuracies["linear_probe"] = linear_probe(patch_mean, y, test_patch_mean, test_y)
    accuracies["knn_class_token"] = knn_accuracy(class_token, y, test_class_token, test_y)
    accuracies["linear_probe_class_token"] = linear_probe(class_token, y, test_class_token, test_y)
    return accuracies


class Classifier(PatchMean):
    """A copy of an encoder, and a linear layer on the normalized mean of its patch tokens: images
    -> logits (B, classes). layer_decay: for make_optimizer."""

    def __init__(self, encoder, classes, layer_decay):
        super().__init__(copy.deepcopy(encoder))
        D = encoder.pos_embed.shape[2]
        self.fc_norm = nn.LayerNorm(D, eps=1e-6)
        self.head = nn.Linear(D, classes)
        self.layer_decay = layer_decay
        self.encoder.norm = nn.Identity()  # as in the authors' code, the norm comes after the mean
        self.encoder.requires_grad_()  # positions, too, and a teacher's weights
        nn.init.trunc_normal_(self.head.weight, std=2e-5)  # near zero, as in the authors' code

    def forward(self, images):
        return self.head(self.fc_norm(super().forward(images)))


def fine_tune(encoder, data, args, layer_decay):
    """MAE's own measure: trains a Classifier with all labels -> accuracy on test, and the
    Classifier. From an untrained encoder, with layer_decay 1, it is training from scratch by the
    same recipe; the paper's baseline has a longer one. Crops are those of pretraining, labels are
    smoothed by 0.1."""
    y = data.train_labels
    device = y.device
    N = min(args.batch_size, 256, len(y))
    steps = len(y) // N  # in a pass; an incomplete last batch is left out
    torch.manual_seed(args.seed)
    model = Classifier(encoder, len(data.classes), layer_decay).to(device)
    if args.compile:
        model.compile()
    update, _ = make_update(model, args, N, args.fine_tune_epochs * steps)
    generator = torch.Generator(device).manual_seed(args.seed)
    model.train()
    for _ in range(args.fine_tune_epochs):
        order = torch.randperm(len(y), generator=generator, device=device)[: steps * N]
        batches = common.batches(data.train_images, order, N, device)
        for batch, index in zip(batches, order.split(N), strict=True):
            x = common.normalize(augmented(batch, args, generator))
            with autocast(device):
                logits = model(x)  # (N, classes)
            update(F.cross_entropy(logits.float(), y[index], label_smoothing=0.1))
    predicted = features(model, data.test_images).argmax(1)
    return (predicted == data.test_labels).float().mean().item(), model


# === Figures ======================================================================================
@torch.no_grad()
def reconstruct(model, images, args):
    """Images, uint8 (R, 3, S, S), masked, completed, and as they are: float (3, R, 3, S, S) in
    [0, 1]. Visible patches are pasted in. A norm-pixel prediction lacks the mean and the deviation
    of its patch; here they are taken from the image."""
    p = args.patch_size
    x = common.normalize(images / 255)
    patches = patchify(x, p)  # (R, L, 3 p p)
    generator = torch.Generator(images.device).manual_seed(args.seed)
    noise = common.uniform(0, 1, patches.shape[:2], generator)
    model.eval()
    with autocast(images.device):
        prediction, mask = model(x, args.mask_ratio, noise)
    prediction = prediction.float()
    if args.target == "norm-pixel":
        patch_std = (patches.var(2, keepdim=True) + 1e-6).sqrt()
        prediction = prediction * patch_std + patches.mean(2, keepdim=True)
    mask = mask[:, :, None].expand_as(patches) == 1
    mean = torch.tensor(common.MEAN, device=x.device)[:, None, None]
    std = torch.tensor(common.STD, device=x.device)[:, None, None]
    completed = unpatchify(torch.where(mask, prediction, patches), p) * std + mean
    masked = torch.where(unpatchify(mask, p), 0.5, images / 255)
    return torch.stack([masked, completed.clamp(0, 1), images / 255])


# === The whole run ================================================================================
def fit_batch_size(args, M):
    """At most all M images, unless a number was typed; the same share for every process."""
    use_recipe(args, {"batch_size": min(args.batch_size, M // WORLD * WORLD)})
    N = args.batch_size
    if not 2 <= N <= M:
        raise UserError(f"--batch-size {N}: must be from 2 to {M}, the number of images")
    if N % WORLD:
        raise UserError(f"--batch-size {N}: must be a multiple of {WORLD}, the number of processes")


def main(args, build_model=build_mae, loss_of=reconstruction_loss):
    """Measures the encoder, pretrains it without labels, measures it again. Returns the content of
    summary.json."""
    start = time.perf_counter()
    device = pick_device(args.device)
    data = load_data(args, device)
    M, _, S, _ = data.train_images.shape
    if S > 64 and args.encoder != "small":
        use_recipe(args, LARGE_IMAGES)
    fit_batch_size(args, M)
    if S % args.patch_size:
        raise UserError(f"--patch-size {args.patch_size}: must divide the images' side, {S}")
    if args.fine_tune and not data.classes:
        raise UserError(f"--fine-tune: {args.dataset} has no labels")

    torch.manual_seed(args.seed)
    model = build_model(args, S).to(device)
    encoder = model.encoder
    if args.compile:
        model.compile()

    with run_folder(args) as folder:
        print_header(args, data, device)
        untrained = once(folder / "untrained.pt", evaluate, encoder, data)
        step = functools.partial(training_step, loss_of=loss_of)
        watch = functools.partial(monitor, PatchMean(encoder), data)
        with common.compile_operators(args.compile):
            history = pretrain(model, data, args, step, watch)
        save(folder / "encoder.pt", encoder.state_dict())
        print("measuring", flush=True)
        trained = evaluate(encoder, data)
        if args.fine_tune:
            print("fine-tuning, and training from scratch", flush=True)
            trained["fine_tuned"], classifier = fine_tune(encoder, data, args, args.layer_decay)
            save(folder / "classifier.pt", classifier.state_dict())
            torch.manual_seed(args.seed)
            scratch = build_model(dataclasses.replace(args, init=""), S).encoder.to(device)
            trained["from_scratch"], _ = fine_tune(scratch, data, args, 1.0)
        summary = describe(args, data, device, encoder, history, start)
        summary |= {"untrained": untrained, "trained": trained, "history": history}
        save_json(folder / "summary.json", summary)
        print_results(summary)
        examples = data.examples().to(data.test_images.device)
        sheet = reconstruct(model, data.test_images[examples].to(device), args)
        title = "test images: masked, completed, and as they are"
        save_sheet(folder / "reconstruction.png", {title: sheet})
    return summary


# === Nothing below is about MAE: every script has it, word for word ===============================
# But for two functions: clip.py has its own pretrain, since its images come with captions, and
# dino.py its own make_update, since it clips gradients.
def pretrain(model, data, args, training_step, monitor):
    """Trains on data.train_images, uint8 (M, 3, S, S), without labels, from the checkpoint in
    args.out if there is one. Returns the history, a record of each epoch: the means of what
    training_step returns and, every few epochs, what monitor() returns."""
    images = data.train_images
    device = next(model.parameters()).device
    N = args.batch_size // WORLD  # images of this process in a step
    M = len(images)
    steps = M // args.batch_size  # in an epoch; an incomplete last batch is left out
    update, state = make_update(model, args, args.batch_size, max(1, args.epochs * steps))
    state["model"] = model
    history = load_checkpoint(args, state, data)
    network = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    for epoch in range(len(history) + 1, args.epochs + 1):
        start = time.perf_counter()
        order, seed = common.epoch_order(M, args.batch_size, args.seed, epoch, RANK, WORLD)
        generator = torch.Generator(device).manual_seed(seed)  # of the views
        log = []
        model.train()
        for step, batch in enumerate(common.batches(images, order, N, device)):  # (N, 3, S, S)
            progress = (epoch - 1 + step / steps) / args.epochs
            terms = training_step(network, batch, args, generator, progress, update)
            log.append({name: x.detach() for name, x in terms.items()})  # .item() waits for the GPU
            show_progress(args, epoch, step, steps, start)
        record = {"epoch": epoch} | epoch_means(log)
        record["seconds"] = time.perf_counter() - start
        if epoch % args.eval_every == 0 or epoch == args.epochs:
            record |= monitor()
        history.append(record)
        save_epoch(args, state, data, history)
    return history


def epoch_means(log):
    """The mean of each term in the log of an epoch, over its steps and all processes."""
    means = {}
    for name in log[0]:
        mean = torch.stack([terms[name] for terms in log]).mean(0)
        if WORLD > 1:
            dist.all_reduce(mean)
        means[name] = (mean / WORLD).tolist()
    return means


def make_update(model, args, batch_size, steps):
    """The function update(loss), which makes one training step, and the state that it changes."""
    device = next(model.parameters()).device
    optimizer, schedule = make_optimizer(model, args, batch_size, steps)
    scaler = torch.amp.GradScaler(device.type, enabled=fast_dtype(device) == torch.float16)

    def update(loss):
        optimizer.zero_grad()
        scaler.scale(loss).backward()  # float16 would round small gradients to 0
        scaler.step(optimizer)
        scaler.update()
        schedule.step()

    return update, {"optimizer": optimizer, "schedule": schedule, "scaler": scaler}


def fast_dtype(device):
    """bfloat16 where the GPU has it, else float16; None on other devices, which stay at float32."""
    if device.type != "cuda":
        return None
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bfloat16 else torch.float16


def autocast(device):
    """Within it a GPU computes convolutions and matrix products in its fast_dtype."""
    return torch.autocast(device.type, fast_dtype(device), enabled=device.type == "cuda")


def pick_device(name):
    """The device of that name, for `auto` the best there is; a GPU for each process of torchrun."""
    if name == "auto":
        name = "cpu"
        if torch.backends.mps.is_available():
            name = "mps"
        if torch.cuda.is_available():
            name = "cuda"
    if name == "cuda" and WORLD > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        x = torch.zeros(1, device=name)
        x.item()  # devices that hold no numbers, such as `meta`, fail here
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: not available ({reason})") from None
    return x.device


def load_data(args, device):
    """The dataset, on the device. Under torchrun process 0 downloads or decodes it while the others
    wait for it to join them. They then read what it wrote, and leave all printing to it."""
    source = [args.dataset, args.data_dir, args.image_size]
    if RANK == 0:
        data = common.load_dataset(*source)
    if WORLD > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))
    if RANK > 0:
        sys.stdout = None  # print then does nothing
        data = common.load_dataset(*source)
    return data.to(device)


def load_weights(encoder, args):
    """Puts the weights of --init into the encoder. The classifiers of torchvision's files and of
    timm's are left out; any other name or shape has to fit."""
    begun = Path(args.out, "checkpoint.pt").exists()  # and holds the weights of a resumed run
    if begun or not args.init:
        return
    try:
        weights = torch.load(args.init, map_location="cpu", weights_only=True)
        weights = weights.get("model", weights)  # so the authors of MAE wrap theirs
        kept = {name: x for name, x in weights.items() if not name.startswith(("fc.", "head."))}
        encoder.load_state_dict(kept)
    except Exception as error:  # no such file, no weights, or those of another network
        reason = textwrap.shorten(str(error), 300, placeholder=" ...")
        message = f"--init {args.init}: does not fit --encoder {args.encoder}: {reason}"
        raise UserError(message) from None


@contextlib.contextmanager
def run_folder(args):
    """Makes the folder of the run, and locks it until the run ends: no two runs write to one."""
    folder = Path(args.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115, it is closed below
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be used ({error.strerror})") from None
    with lock:
        if os.name == "posix" and RANK == 0:
            import fcntl

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                busy = isinstance(error, BlockingIOError)
                reason = "another run is writing there" if busy else error.strerror
                raise UserError(f"--out {folder}: {reason}") from None
        names = "checkpoint.pt", "summary.json"  # --epochs 0 leaves the latter only
        if any((folder / name).exists() for name in names) and not args.resume:
            raise UserError(
                f"--out {folder}: holds a run; go on with --resume {folder}, or name another folder"
            )
        yield folder


def on_cpu(content):
    """A state dict, or any nest of dicts and lists, with its tensors in main memory."""
    if isinstance(content, dict):
        return {name: on_cpu(value) for name, value in content.items()}
    if isinstance(content, list):
        return [on_cpu(value) for value in content]
    return content.cpu() if torch.is_tensor(content) else content


def save(path, content):
    """Bytes, or what torch.save takes; under another name first, so that no torn file is left."""
    if RANK > 0:
        return
    content = on_cpu(content)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                torch.save(content, file)
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # of torch.save
        reason = getattr(cause, "strerror", error)
        raise UserError(f"{path}: cannot be written ({reason})") from None


def save_json(path, content):
    """A dict, as a text that people read, too."""
    save(path, (json.dumps(content, indent=2) + "\n").encode())


def once(path, measure, *inputs):
    """measure(*inputs), kept in path for a resumed run, with the random state after it: on a CPU,
    later probes then start from the same weights as in a run that was not stopped."""
    if path.with_name("checkpoint.pt").exists() and path.exists():
        content = torch.load(path, weights_only=True)
        torch.set_rng_state(content["random_state"])
    else:
        content = {"result": measure(*inputs), "random_state": torch.get_rng_state()}
        save(path, content)
    return content["result"]


def print_header(args, data, device):
    """What the run is about to do, and a hint if that is little."""
    M, _, S, _ = data.train_images.shape
    steps = M // args.batch_size  # in an epoch
    total = args.epochs * steps
    images = f"{M} images, {S} x {S}, {len(data.train_labels)} labels"
    where = f"{device}; {args.out}"
    print(f"{args.script} on {args.dataset}: {images}; {total} steps; {where}", flush=True)
    if 0 < total < 500 and not args.resume:
        print(f"{total} steps are few: --epochs {math.ceil(1000 / steps)} would make a thousand")


def show_progress(args, epoch, step, steps, start):
    """On a terminal, ten times an epoch: how far it is, and how long the rest of the run takes."""
    if sys.stdout and sys.stdout.isatty() and (step + 1) % max(1, steps // 10) == 0:
        done = (step + 1) / steps
        left = (time.perf_counter() - start) / done * (args.epochs - epoch + 1 - done)
        text = f"epoch {epoch}/{args.epochs} {done:4.0%}, {left / 60:.1f} min left "
        print(text, end="\r", flush=True)


def print_results(summary):
    """What was measured as a table, and what always guessing one class would reach."""
    untrained = summary["untrained"]
    if untrained:
        print(f"{'measured on test images':28}before   after")
    for name, value in summary["trained"].items():
        before = f"{untrained[name]:6.1%}" if name in untrained else ""
        print(f"{name:28}{before:6}  {value:6.1%}")
    if "most_frequent_class" in summary:
        print(f"guessing the most frequent class: {summary['most_frequent_class']:.1%}")
    print(f"{summary['total_seconds']:.0f} s in all; results are in {summary['args']['out']}")


def save_epoch(args, state, data, history):
    """Prints the last record of the history; writes all of them, and the checkpoint, if loss and
    weights are finite."""
    epoch = len(history)
    terms = {name: value for name, value in history[-1].items() if isinstance(value, float)}
    shown = "  ".join(f"{name} {value:.4g}" for name, value in terms.items())
    print(f"epoch {epoch}/{args.epochs}  {shown}", flush=True)
    norm = nn.utils.get_total_norm(state["model"].parameters())
    if not (math.isfinite(terms["loss"]) and norm.isfinite()):
        raise UserError(
            f"the loss is not finite in epoch {epoch}, which is not saved: try less --lr"
        )
    lines = [json.dumps(record) + "\n" for record in history]
    save(Path(args.out, "metrics.jsonl"), "".join(lines).encode())
    content = {name: part.state_dict() for name, part in state.items()}
    content |= {"data": common.fingerprint(data), "history": history}
    save(Path(args.out, "checkpoint.pt"), content)


def load_checkpoint(args, state, data):
    """Restores the run in args.out, if it has finished an epoch, and returns its history. Also
    writes args.json and data.json, once the checkpoint is known to fit."""
    path = Path(args.out, "checkpoint.pt")
    history = []
    if path.exists():
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            unchanged = content["data"] == common.fingerprint(data)
            if unchanged:
                for name, part in state.items():
                    part.load_state_dict(content[name])
            history = content["history"]
        except Exception:  # a torn file, or a checkpoint of another model, fails in many ways
            raise UserError(f"{path}: is not a checkpoint of this run") from None
        if not unchanged:
            raise UserError(f"{path}: --dataset {args.dataset} has changed since the run began")
    save_json(Path(args.out, "args.json"), dataclasses.asdict(args))
    save_json(Path(args.out, "data.json"), data.about())
    return history


def describe(args, data, device, encoder, history, start):
    """What summary.json says of a run, whatever its method."""
    content = {
        "method": Path(args.script).stem,
        "command": args.command,
        "args": dataclasses.asdict(args),
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in encoder.parameters()),
    }
    seconds = [record["seconds"] for record in history]
    if seconds:
        used = len(data.train_images) // args.batch_size * args.batch_size
        content["images_per_second"] = used / statistics.median(seconds)
    if data.classes:
        counts = data.test_labels.bincount()
        content["most_frequent_class"] = counts.max().item() / len(data.test_labels)
    content["pretrain_seconds"] = sum(seconds)
    content["total_seconds"] = time.perf_counter() - start
    return content


def save_sheet(path, blocks):
    """{title: images, float (R, C, 3, S, S) in [0, 1]}, side by side, in tiles of about 128."""
    grids = []
    for images in blocks.values():
        rows, columns, _, S, _ = images.shape
        zoom = max(1, round(128 / S))
        tiles = (255 * images.flatten(0, 1).cpu().clamp(0, 1)).round().byte()
        tiles = F.interpolate(tiles, scale_factor=zoom)
        tiles = F.pad(tiles, (zoom, 0, zoom, 0), value=255).unflatten(0, (rows, columns))
        grid = tiles.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)  # (3, height, width)
        grids.append(F.pad(grid, (8, 8 + zoom, 28, 16 + zoom), value=255))
    sheet = to_pil_image(torch.cat(grids, dim=2))
    left = 8
    for title, grid in zip(blocks, grids, strict=True):
        ImageDraw.Draw(sheet).text((left + zoom, 6), title, fill="black", font_size=16)
        left += grid.shape[2]
    file = io.BytesIO()
    sheet.save(file, "png", compress_level=3)  # half the time of 6, and hardly larger
    save(path, file.getvalue())


def use_recipe(args, recipe):
    """Sets the flags of a recipe, but none that was typed, and none that the method lacks."""
    names = {field.name for field in dataclasses.fields(args)} - set(args.explicit)
    for name, value in recipe.items():
        if name in names:
            setattr(args, name, value)


def option(name):
    """A field of Args as the command line spells it."""
    return "--" + name.replace("_", "-")


def flags_of(Args):
    """{name: field} of those fields that the command line can set."""
    return {field.name: field for field in dataclasses.fields(Args) if field.metadata}


def make_parser(Args, doc, shapes):
    """A parser that returns what was typed, and no more: SUPPRESS leaves out all other flags."""
    flags = flags_of(Args)
    recipes = []
    for title, recipe in {"--dataset shapes": shapes, "--encoder small otherwise": SMALL}.items():
        words = " ".join(f"{option(name)} {recipe[name]}" for name in recipe if name in flags)
        text = f"The recipe of {title}: {words}"
        if words:
            recipes.append(textwrap.fill(text, 100, break_on_hyphens=False))
    parser = argparse.ArgumentParser(
        Args.script,
        description=doc,
        epilog="\n".join(recipes),
        usage=argparse.SUPPRESS,  # errors are one line
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for name, field in flags.items():
        default = f" ({field.default})" if field.default not in ("", ()) else ""
        options = {"help": (field.metadata["help"] + default).replace("%", "%%")}
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif field.type is tuple:
            options["nargs"] = "+"
        else:
            options |= {"type": field.type, "choices": field.metadata["choices"]}
        parser.add_argument(option(name), **options)
    return parser


def parse_args(argv=None, Args=Args, doc=__doc__, shapes=SHAPES):
    """What is typed, over the recipe of the dataset or the flags of the run to resume -> Args."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = make_parser(Args, doc, shapes)
    flags = flags_of(Args)
    namespace, unknown = parser.parse_known_args(argv)
    typed = vars(namespace)
    if unknown:
        close = difflib.get_close_matches(unknown[0].split("=")[0], map(option, flags), 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    for name, value in typed.items():
        if value == "":  # of a shell variable that is not set
            parser.error(f"{option(name)}: is empty")

    if "resume" in typed:
        folder = typed["resume"]
        for name in typed:
            if not flags[name].metadata["resume"]:
                parser.error(
                    f"{option(name)}: a resumed run keeps the flags it was started with; a new run "
                    f"can begin with its weights, by --init {folder}/encoder.pt"
                )
        try:
            args = Args(**json.loads(Path(folder, "args.json").read_text()))
        except (OSError, ValueError, TypeError):
            args = Args(script="none")
        if args.script != Args.script:
            parser.error(f"--resume {folder}: there is no run of {Args.script} in this folder")
        args = dataclasses.replace(args, **typed, out=folder)
    else:
        args = Args(**typed, explicit=tuple(typed))
        if args.dataset == "shapes":
            use_recipe(args, shapes)
        elif args.encoder == "small":
            use_recipe(args, SMALL)
    for name, field in flags.items():
        value = getattr(args, name)
        low = field.metadata["low"]
        high = field.metadata["high"]
        if low is not None and not low <= value <= high:
            limits = f"from {low} to {high}" if math.isfinite(high) else f"at least {low}"
            parser.error(f"{option(name)} {value}: must be {limits}")
    if not args.out:
        dataset = Path(args.dataset).resolve().stem
        args.out = f"runs/{Path(args.script).stem}-{dataset}-seed{args.seed}"
    launcher = f"torchrun --nproc-per-node {WORLD}" if WORLD > 1 else "python"
    args.command = " ".join([args.command or f"{launcher} {args.script}", *map(shlex.quote, argv)])
    return args


def run(Args=Args, doc=__doc__, shapes=SHAPES, main=main, **parts):
    """The command line: bad input is one line, and exit code 2. A relative hands over what differs:
    parts such as Model and training_step, or a main of its own."""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has no encoding, a closed one is None
        sys.stdout.reconfigure(errors="replace")  # for consoles that cannot show every file name
    try:
        main(parse_args(None, Args, doc, shapes), **parts)
    except UserError as error:
        print(f"{Args.script}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, BrokenPipeError) as end:  # Ctrl-C, or a `| head` that is done
        if isinstance(end, BrokenPipeError):
            sys.stdout = None  # or Python complains of the closed pipe when it ends
        sys.exit("stopped; --resume with the run folder goes on from the last whole epoch")


if __name__ == "__main__":
    run()
