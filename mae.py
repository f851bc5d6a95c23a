"""MAE: an autoencoder reconstructs the masked patches of an image from the visible ones.

Three quarters of the patches are removed at random: of fewer, the neighbors would be enough to interpolate what is
missing. A Vision Transformer encodes the rest, and nothing but the rest, which makes a large encoder cheap; it never
meets a mask token, since real images have none. A light decoder gets its output, and one learned mask token for every
missing patch, and predicts the pixels. It may be light, as it is thrown away after pretraining, when the encoder sees
whole images. The encoder is made to be fine-tuned: its features are strong, but not linearly separable.

    He, Chen, Xie, Li, Dollar, Girshick: Masked Autoencoders Are Scalable Vision Learners, CVPR 2022.
    The lecture's reconstruction loss, over the set M of masked patches x_i and their reconstructions y_i:

    L = 1 / |M|  sum_{i in M} |x_i - y_i|^2        divided by the numbers in a patch, as in the authors' code

    python mae.py                                       shapes drawn by code; a laptop CPU will do
    python mae.py --fine-tune                           MAE's own measure: fine-tuned, against trained from scratch
    python mae.py --dataset cifar10 --compile           ViT-tiny with patches of 4 x 4 pixels, on a GPU
    python mae.py --dataset cifar10 --encoder small     a small ViT, on a CPU
    python results/ablation.py mae-mask-token           a column of the lecture's ablation table
    torchrun --nproc-per-node 8 mae.py --dataset path/to/images          your own images, on 8 GPUs

Linear probe on test, untrained -> trained encoder, on shapes with seed 0 (record in results/): 17.8 -> 52.2 %.
Left out of the paper: the PCA and dVAE targets of table 1 (d); mixup, cutmix, RandAugment and drop path in fine-tuning.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import os
import re
import shlex
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn

import common
from common import UserError

METHOD = "mae"
SWITCH, RAW = argparse.BooleanOptionalAction, argparse.RawDescriptionHelpFormatter
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun: a process for each GPU
# width D, blocks and heads
ENCODERS = {"small": (96, 4, 3), "vit_tiny": (192, 12, 3), "vit_small": (384, 12, 6), "vit_base": (768, 12, 12),
            "vit_large": (1024, 24, 16)}  # fmt: skip
DECODER_DIMS = 12, 24, 48, 64, 72, 96, 128, 192, 256, 512  # multiples of 4, for the positions, and of their heads


def flag(default, help, low=None, high=math.inf, **options):  # a field of Args; low to high is a number's range
    return dataclasses.field(default=default, metadata=dict(help=help, low=low, high=high, options=options))


@dataclasses.dataclass
class Args:  # defaults are the recipe for CIFAR-10 on a GPU, SHAPES, SMALL and LARGE_IMAGES say what differs elsewhere
    dataset: str = flag("shapes", "shapes, cifar10, cifar100, stl10, or a path: an .npz file or a folder of images")
    data_dir: str = flag("data", "folder for downloads and decoded images")
    image_size: int = flag(96, "side in pixels to which the images of a folder, and larger ones, are resized", 8, 512)
    encoder: str = flag("vit_tiny", "paper: vit_base, vit_large", choices=tuple(ENCODERS))
    patch_size: int = flag(4, "side of a patch in pixels; 2 would leave little in it to predict; paper: 16", 1, 64)
    mask_ratio: float = flag(0.75, "fraction of the patches that are masked; paper: 0.75", 0.01, 0.99)
    decoder_depth: int = flag(4, "blocks of the decoder; paper: 8", 1, 32)
    decoder_dim: int = flag(192, "of the decoder, a head for 32 of it; paper: 512", type=int, choices=DECODER_DIMS)
    target: str = flag("norm-pixel", "norm-: standardized in each patch; paper: both", choices=("pixel", "norm-pixel"))
    crop: float = flag(0.2, "smallest crop, as a fraction of the image's area; paper: 0.2", 0.01, 1)
    epochs: int = flag(250, "passes over the training images; paper: 800, 1600", 1)
    batch_size: int = flag(1024, "images N per step, over all GPUs; paper: 4096", 2)
    lr: float = flag(3e-4, "peak learning rate of AdamW for a batch of 256; grows with --batch-size; paper: 1.5e-4", 0)
    weight_decay: float = flag(0.05, "not applied to tokens, biases and norms; paper: 0.05", 0)
    warmup: float = flag(0.05, "fraction of the steps with linear warmup; paper: 40 epochs of 800", 0, 0.9)
    fine_tune: bool = flag(False, "fine-tune with all labels, and train the same network from scratch", action=SWITCH)
    fine_tune_epochs: int = flag(100, "passes over the labels in both; paper: 100 for ViT-B, 50 for ViT-L", 1)
    fine_tune_lr: float = flag(1e-3, "its learning rate for a batch of 256; paper: 1e-3", 0)
    layer_decay: float = flag(0.75, "factor on it from one block to the block below; paper: 0.75", 0.01, 1)
    eval_every: int = flag(10, "epochs between two kNN measurements on held-out training labels", 1)
    seed: int = flag(0, "of weights, batches, masks and crops", 0, 2**31)
    device: str = flag("auto", "auto: cuda, else mps, else cpu")
    compile: bool = flag(False, "torch.compile networks and augmentations, for long runs on a GPU", action=SWITCH)
    out: str = flag("", "run folder instead of runs/<method>-<dataset>-seed<seed>")
    resume: str = flag("", "run folder to continue, with the flags that it was started with")
    typed: list = ()  # names of the flags that were typed
    command: str = f"torchrun --nproc-per-node {WORLD} {METHOD}.py" if WORLD > 1 else f"python {METHOD}.py"


# === Views and masks ==================================================================================================
def augmented(images, args, generator):
    """uint8 (N, 3, S, S) -> float in [0, 1]: crop and flip are enough, as every mask makes a new task of an image."""
    return common.random_resized_crop(images / 255, images.shape[3], generator, scale=(args.crop, 1.0))


def random_masking(tokens, mask_ratio, noise):
    """Removes the fraction mask_ratio of tokens (B, L, D), those with the largest noise (B, L): the paper's section 3.

    -> visible (B, L - M, D), with M = mask_ratio L to the nearest whole number; mask (B, L), 1 for a removed token; and
    ids_restore (B, L), which puts visible tokens followed by M others back into their order.
    """
    keep = tokens.shape[1] - round(mask_ratio * tokens.shape[1])
    ids_shuffle = noise.argsort(dim=1)  # (B, L)
    ids_restore = ids_shuffle.argsort(dim=1)  # (B, L)
    visible = tokens.gather(1, ids_shuffle[:, :keep, None].expand(-1, -1, tokens.shape[2]))  # (B, keep, D)
    return visible, (ids_restore >= keep).to(tokens.dtype), ids_restore


def patchify(images, p):
    """Images (B, 3, S, S) -> patches (B, L, 3 p p), L = (S / p)^2, row by row; the color varies fastest."""
    x = images.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, 3, S / p, p, S / p, p)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches, p):
    """The inverse of patchify: (B, L, 3 p p) -> (B, 3, S, S)."""
    x = patches.unflatten(2, (p, p, 3)).unflatten(1, (math.isqrt(patches.shape[1]), -1))  # (B, S / p, S / p, p, p, 3)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


# === Model ============================================================================================================
class MaskedAutoencoder(nn.Module):
    """Encoder and decoder: images (B, 3, S, S), mask_ratio, noise (B, L) -> predicted patches (B, L, 3 p p), and mask
    (B, L). Parameters have the names of the authors' code, those of the encoder after `encoder.`."""

    def __init__(self, image_size, patch_size, D, depth, heads, decoder_dim=512, decoder_depth=8, decoder_heads=16):
        super().__init__()
        self.encoder = VisionTransformer(image_size, patch_size, D, depth, heads)
        self.decoder_embed = nn.Linear(D, decoder_dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, decoder_dim))
        positions = sincos_positions(image_size // patch_size, decoder_dim)
        self.decoder_pos_embed = nn.Parameter(positions, requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(decoder_dim, decoder_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, 3 * patch_size**2)
        for layer in self.modules():  # the authors' initialization
            if isinstance(layer, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight.flatten(1))
                nn.init.zeros_(layer.bias)

    def forward(self, images, mask_ratio, noise):
        tokens = self.encoder.embed(images)  # (B, L, D), with positions: a visible one must carry its own
        visible, mask, ids_restore = random_masking(tokens, mask_ratio, noise)
        x = self.decoder_embed(self.encoder.encode(visible))  # (B, 1 + visible, decoder_dim), the class token first
        missing = self.mask_token.to(x.dtype).expand(x.shape[0], ids_restore.shape[1] + 1 - x.shape[1], -1)
        patches = torch.cat([x[:, 1:], missing], dim=1)
        patches = patches.gather(1, ids_restore[:, :, None].expand_as(patches))  # (B, L, decoder_dim), in their order
        return self.decode(torch.cat([x[:, :1], patches], dim=1)), mask

    def decode(self, x):
        """Class token and L patches (B, 1 + L, decoder_dim) -> predicted patches (B, L, 3 p p)."""
        x = x + self.decoder_pos_embed  # again: mask tokens differ by nothing else
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]


# === Loss =============================================================================================================
def patch_targets(images, patch_size, target):
    """Normalized images (B, 3, S, S) -> patches to predict (B, L, 3 p p), table (d) of the lecture. norm-pixel: minus a
    patch's mean, over its standard deviation, so that high-contrast patches do not dominate the loss."""
    patches = patchify(images, patch_size)
    if target == "norm-pixel":
        patches = (patches - patches.mean(2, keepdim=True)) / (patches.var(2, keepdim=True) + 1e-6).sqrt()
    return patches


def reconstruction_loss(prediction, targets, mask):
    """Mean squared error on masked patches alone, of which copying is no solution: prediction, targets (B, L, P), mask
    (B, L) -> scalar."""
    error = (prediction - targets).square().mean(2)  # (B, L)
    return (error * mask).sum() / mask.sum()


# === Pretrain =========================================================================================================
def pretrain(model, images, args, monitor):
    """Learns to reconstruct images, uint8 (M, 3, S, S); monitor() -> metrics. Returns those of all epochs."""
    device, L = next(model.parameters()).device, (images.shape[3] // args.patch_size) ** 2
    N, steps = args.batch_size // WORLD, len(images) // args.batch_size  # an incomplete last batch is left out
    lr = args.lr * args.batch_size / 256  # less noisy gradients allow larger steps
    optimizer, schedule = make_optimizer(model, lr, (0.9, 0.95), args, args.epochs * steps)
    scaler = torch.amp.GradScaler(device.type, enabled=autocast(device).fast_dtype == torch.float16)
    state = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    history = load_checkpoint(args, state, images)
    network = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    for epoch in range(len(history) + 1, args.epochs + 1):
        start, losses = time.perf_counter(), torch.zeros(steps, device=device)
        order, generator = draws(args, epoch, images, device)
        model.train()
        for step, batch in enumerate(common.batches(images, order, N, device)):  # (N, 3, S, S)
            x = common.normalize(augmented(batch, args, generator))
            noise = common.uniform(0, 1, (N, L), generator)
            with autocast(device):
                prediction, mask = network(x, args.mask_ratio, noise)  # (N, L, 3 p p), (N, L)
            targets = patch_targets(x, args.patch_size, args.target)  # (N, L, 3 p p)
            loss = reconstruction_loss(prediction.float(), targets, mask.float())
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            losses[step] = loss.detach()  # reading it here would make the host wait for the GPU
            show_progress(args, epoch, step, steps, start)
        metrics = {"loss": losses.mean().item(), "seconds": time.perf_counter() - start}
        if epoch % args.eval_every == 0 or epoch == args.epochs:
            metrics |= monitor()
        history.append({"epoch": epoch, **metrics})
        save_epoch(args, state, images, history)
    return history


# === Vision Transformer ===============================================================================================
class Block(nn.Module):
    """A pre-norm block of the Vision Transformer (Dosovitskiy et al. 2021): (B, T, D) -> (B, T, D)."""

    def __init__(self, D, heads):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(D, eps=1e-6), nn.LayerNorm(D, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(D, 3 * D), "proj": nn.Linear(D, D)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(D, 4 * D), "fc2": nn.Linear(4 * D, D)})

    def qkv(self, x):  # queries, keys and values, (B, heads, T, D / heads) each
        return self.attn["qkv"](self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x):
        x = x + self.attn["proj"](F.scaled_dot_product_attention(*self.qkv(x)).transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


def sincos_positions(side, D):
    """Fixed embedding (1, 1 + side^2, D) of a grid: zeros for the class token, then row by row. A quarter of D
    each: sine and cosine of column and of row, at wavelengths 2 pi to 2 pi 10000 (Vaswani et al. 2017, in 2-D)."""
    angles = torch.arange(side)[:, None] * 10000 ** (-torch.arange(D // 4) / (D / 4))  # (side, D / 4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, D / 2)
    grid = torch.cat([line.repeat(side, 1), line.repeat_interleave(side, 0)], dim=1)  # (side^2, D)
    return torch.cat([torch.zeros(1, D), grid])[None]


class VisionTransformer(nn.Module):
    """Images (B, 3, S, S) -> class token and mean of the patch tokens, both after the last norm: (B, 2 D). S may be any
    multiple of patch_size. Parameters have the names of the authors' code and of timm, so their weights load."""

    def __init__(self, image_size, patch_size, D, depth, heads):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, D, patch_size, patch_size)})
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, D))
        self.pos_embed = nn.Parameter(sincos_positions(image_size // patch_size, D), requires_grad=False)
        self.blocks = nn.ModuleList(Block(D, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(D, eps=1e-6)

    def positions(self, T):
        """Embeddings (1, T, D) of class token and patches, interpolated for images of other sizes."""
        old, new = math.isqrt(self.pos_embed.shape[1]), math.isqrt(T)  # patches a side
        grid = self.pos_embed[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)  # (1, D, old, old)
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

    def forward(self, images):
        x = self.encode(self.embed(images))
        return torch.cat([x[:, 0], x[:, 1:].mean(1)], dim=1)


# === Evaluate =========================================================================================================
@torch.no_grad()
def features(network, images):
    """Images without augmentation, uint8 (M, 3, S, S), through a frozen network -> float32 (M, D)."""
    device = next(network.eval().parameters()).device
    with autocast(device):
        h = torch.cat([network(common.normalize(x.to(device) / 255)).float() for x in images.split(512)])
    if not h.isfinite().all():
        raise UserError("the features are not finite, so there is nothing to measure: try a smaller --lr")
    return h


def knn_accuracy(bank, bank_labels, queries, labels, k=200, temperature=0.1):
    """k nearest neighbors, features (M, D), (Q, D) -> accuracy in [0, 1]. Those of highest cosine s with a query vote
    for their class, each with exp(s / temperature) (Wu et al. 2018; k and temperature of MoCo's CIFAR-10 notebook)."""
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    classes, correct = int(bank_labels.max()) + 1, 0
    for query, label in zip(queries.split(1024), labels.split(1024), strict=True):
        s, nearest = (query @ bank.T).topk(min(k, len(bank)))  # (B, k)
        votes = torch.zeros(len(query), classes, device=bank.device)
        votes.scatter_add_(1, bank_labels[nearest], (s / temperature).exp())
        correct += (votes.argmax(1) == label).sum().item()
    return correct / len(labels)


def linear_probe(train, train_labels, test, test_labels):
    """Logistic regression on standardized frozen features (M, D), (Q, D), by L-BFGS and with C = 1, scikit-learn's
    defaults -> accuracy on test in [0, 1]."""
    mean, std = train.mean(0), train.std(0, correction=0) + 1e-5
    train, test = (train - mean) / std, (test - mean) / std
    layer = nn.Linear(train.shape[1], int(train_labels.max()) + 1, device=train.device)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(train), train_labels) + 0.5 / len(train) * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    return (layer(test).argmax(1) == test_labels).float().mean().item()


def evaluate(encoder, data):
    """kNN and linear probe of the mean of the patch tokens, and of the class token, which the paper's probe reads ->
    accuracies on test, none without labels."""
    if not data.classes:
        return {}
    y, test_y, results = data.train_labels, data.test_labels, {}
    h, test_h = features(encoder, data.train_images[: len(y)]), features(encoder, data.test_images)  # (M, 2 D)
    for name, i in (("", 1), ("_class_token", 0)):
        x, test_x = h.chunk(2, dim=1)[i], test_h.chunk(2, dim=1)[i]
        results[f"knn{name}"] = knn_accuracy(x, y, test_x, test_y)
        results[f"linear_probe{name}"] = linear_probe(x, y, test_x, test_y)
    return results


class Classifier(nn.Module):
    """A copy of an encoder, and a linear layer on the normalized mean of its patch tokens: images -> (B, classes)."""

    def __init__(self, encoder, classes):
        super().__init__()
        D = encoder.pos_embed.shape[2]
        self.encoder, self.fc_norm, self.head = copy.deepcopy(encoder), nn.LayerNorm(D, eps=1e-6), nn.Linear(D, classes)
        self.encoder.norm = nn.Identity()  # as in the authors' code, the norm comes after the mean
        self.encoder.pos_embed.requires_grad_()
        nn.init.trunc_normal_(self.head.weight, std=2e-5)

    def forward(self, images):
        return self.head(self.fc_norm(self.encoder(images).chunk(2, dim=1)[1]))


def layer_groups(model, lr, weight_decay, layer_decay):
    """Parameter groups: each block of the encoder has layer_decay times the learning rate of the one above it, as lower
    ones are more general (Bao et al. 2022, BEiT); weight decay is not for tokens, positions, norms and biases."""
    groups, depth = {}, len(model.encoder.blocks)
    for name, p in model.named_parameters():
        block = re.search(r"encoder\.blocks\.(\d+)", name)
        layer = int(block[1]) + 1 if block else 0 if re.search("patch|cls_token|pos_embed", name) else depth + 1
        decayed = p.ndim > 1 and not name.endswith(("_token", "pos_embed"))
        groups.setdefault((lr * layer_decay ** (depth + 1 - layer), weight_decay * decayed), []).append(p)
    return [{"params": p, "lr": lr, "weight_decay": decay} for (lr, decay), p in groups.items()]


def fine_tune(encoder, data, args, layer_decay):
    """MAE's own measure: trains a Classifier with all labels -> accuracy on test, and the Classifier. From an untrained
    encoder, with layer_decay 1, it is training from scratch by the same recipe; the paper's opponent has a longer one.
    Crops are those of pretraining, labels are smoothed by 0.1."""
    y, device, N = data.train_labels, data.train_labels.device, min(args.batch_size, 256, len(data.train_labels))
    torch.manual_seed(args.seed)
    model, lr, steps = Classifier(encoder, len(data.classes)).to(device), args.fine_tune_lr * N / 256, len(y) // N
    if args.compile:
        model.compile()
    optimizer, schedule = make_optimizer(model, lr, (0.9, 0.999), args, args.fine_tune_epochs * steps, layer_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=autocast(device).fast_dtype == torch.float16)
    generator = torch.Generator(device).manual_seed(args.seed)
    model.train()
    for _ in range(args.fine_tune_epochs):
        order = torch.randperm(len(y), generator=generator, device=device)
        for rows, batch in zip(order.split(N), common.batches(data.train_images, order, N, device), strict=False):
            with autocast(device):
                logits = model(common.normalize(augmented(batch, args, generator)))  # (N, classes)
            loss = F.cross_entropy(logits.float(), y[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
    return (features(model, data.test_images).argmax(1) == data.test_labels).float().mean().item(), model


@torch.no_grad()
def reconstruct(model, images, args):
    """Images, uint8 (R, 3, S, S), masked, completed, and as they are: float (R, 3, 3, S, S) in [0, 1]. Visible patches
    are pasted in; norm-pixel targets say nothing of a patch's mean and deviation, here they are the image's."""
    p, x, generator = args.patch_size, common.normalize(images / 255), torch.Generator(images.device)
    generator.manual_seed(args.seed)
    patches = patchify(x, p)  # (R, L, 3 p p)
    with autocast(images.device):
        prediction, mask = model.eval()(x, args.mask_ratio, common.uniform(0, 1, patches.shape[:2], generator))
    prediction, mask = prediction.float(), mask[:, :, None].expand_as(patches) == 1
    if args.target == "norm-pixel":
        prediction = prediction * (patches.var(2, keepdim=True) + 1e-6).sqrt() + patches.mean(2, keepdim=True)
    mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (common.MEAN, common.STD))
    completed = unpatchify(torch.where(mask, prediction, patches), p) * std + mean
    masked = torch.where(unpatchify(mask, p), 0.5, images / 255)
    return torch.stack([masked, completed.clamp(0, 1), images / 255], dim=1)


# === Nothing below is about MAE: optimizer, several GPUs, run folder, figures, command line ===========================
def autocast(device):
    """bfloat16 where the GPU has it, else float16; float32 on other devices."""
    bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16 if bfloat16 else torch.float16, enabled=device.type == "cuda")


def make_optimizer(model, lr, betas, args, steps, layer_decay=1.0):
    """AdamW; linear warmup, then half a cosine to 0."""
    groups, rise = layer_groups(model, lr, args.weight_decay, layer_decay), args.warmup * steps
    optimizer = torch.optim.AdamW(groups, betas=betas, fused=True)

    def factor(step):
        fall = (min(step, steps) - rise) / (steps - rise)
        return (step + 1) / (rise + 1) if step < rise else 0.5 + 0.5 * math.cos(math.pi * fall)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def draws(args, epoch, images, device):
    """An epoch's images of this process, in random order, and the generator of its views: the same in a resumed run."""
    seed, used = args.seed * 100_000 + epoch, len(images) // args.batch_size * args.batch_size
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:used].to(device)
    return order[RANK::WORLD], torch.Generator(device).manual_seed(seed + 50_000 * (RANK + 1))


def pick_device(name):
    """The device of that name, or the best there is for `auto`; one GPU for each process, and they meet here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        x = torch.zeros(1, device=f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and WORLD > 1 else name)
        x.item()  # devices that hold no numbers, such as `meta`, fail here
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not available ({str(error).splitlines()[0]})") from None
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if x.is_cuda else "gloo", timeout=timedelta(days=1))
        sys.stdout = sys.stdout if RANK == 0 else None  # print then does nothing
    return x.device


@contextlib.contextmanager
def run_folder(args):
    """Makes the folder of the run, and locks it until the run ends: two runs never write to one folder."""
    folder = Path(args.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "w") as lock:
            if os.name == "posix" and RANK == 0:
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (folder / "checkpoint.pt").exists() and not args.resume:
                raise UserError(f"--out {folder}: holds a run; go on with --resume {folder}, or name another folder")
            yield folder
    except BrokenPipeError:  # of a print
        raise
    except OSError as error:
        reason = "another run is writing there" if isinstance(error, BlockingIOError) else error.strerror
        raise UserError(f"--out {folder}: cannot be used ({reason})") from None


def save(path, content):
    """Text, or what torch.save takes, under a temporary name first: a killed run leaves no torn file."""
    if RANK == 0:
        partial = path.with_name(path.name + ".partial")
        try:
            with open(partial, "wb") as file:
                file.write(content.encode()) if isinstance(content, str) else torch.save(content, file)
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def show_progress(args, epoch, step, steps, start):
    """On a terminal, every tenth of an epoch: how far it is, and how long the rest of the run will take."""
    if RANK == 0 and sys.stdout.isatty() and (step + 1) % max(1, steps // 10) == 0:
        done = (step + 1) / steps
        left = (time.perf_counter() - start) / done * (args.epochs - epoch + 1 - done)
        print(f"epoch {epoch}/{args.epochs} {done:4.0%}, {left / 60:.1f} min left ", end="\r", flush=True)


def save_epoch(args, state, images, history):
    """Prints the last line of the history; writes all of it and the checkpoint, if loss and weights are finite."""
    epoch, loss = len(history), history[-1]["loss"]
    shown = "  ".join(f"{key} {value:.4g}" for key, value in history[-1].items() if isinstance(value, float))
    print(f"epoch {epoch}/{args.epochs}  {shown}", flush=True)
    if not (math.isfinite(loss) and nn.utils.get_total_norm(state["model"].parameters()).isfinite()):
        raise UserError(f"the loss is not finite in epoch {epoch}: try a smaller --lr; the last checkpoint is kept")
    save(Path(args.out, "metrics.jsonl"), "".join(json.dumps(line) + "\n" for line in history))
    content = {name: part.state_dict() for name, part in state.items()}
    save(Path(args.out, "checkpoint.pt"), content | {"images": common.fingerprint(images), "history": history})


def load_checkpoint(args, state, images):
    """Restores the run in args.out, if it has finished an epoch -> its history. The flags fit, and are kept."""
    path, history = Path(args.out, "checkpoint.pt"), []
    if path.exists():
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            for name, part in state.items():
                part.load_state_dict(content[name])
            history = content["history"]
        except Exception:  # a torn file, or a checkpoint of another model, fails in many ways
            raise UserError(f"{path}: is not a checkpoint of this run with these flags") from None
        if content["images"] != common.fingerprint(images):
            raise UserError(f"{path}: --dataset {args.dataset} is not what it was when the run began")
    save(Path(args.out, "args.json"), json.dumps(dataclasses.asdict(args), indent=2) + "\n")
    return history


SMALL = dict(image_size=32, decoder_depth=2, decoder_dim=64, target="pixel", epochs=5, batch_size=64, lr=6e-3,
             fine_tune_epochs=4, fine_tune_lr=4e-3, eval_every=5)  # with --encoder small  # fmt: skip
SHAPES = SMALL | dict(encoder="small", epochs=14, batch_size=32, lr=1.2e-2, crop=0.5, fine_tune_lr=8e-3, eval_every=14)
LARGE_IMAGES = dict(encoder="vit_small", patch_size=8, decoder_dim=256)


def parse_args(argv=None):
    """The command line, over the recipe of its dataset or over the flags of the run to resume -> Args."""
    argv = sys.argv[1:] if argv is None else list(argv)
    fields = [field for field in dataclasses.fields(Args) if field.metadata]
    parser = argparse.ArgumentParser(f"{METHOD}.py", argparse.SUPPRESS, __doc__, formatter_class=RAW, add_help=False)
    for field in fields:
        name, help = "--" + field.name.replace("_", "-"), field.metadata["help"] + " (%(default)s)"
        parser.add_argument(name, help=help, **field.metadata["options"] or {"type": field.type})
    given = parser.parse_known_args(argv)[0]  # None for what is not given
    args = Args(**SHAPES if given.dataset in (None, "shapes") else SMALL if given.encoder == "small" else {})
    if given.resume:
        try:
            args = Args(**json.loads(Path(given.resume, "args.json").read_text()))
        except (OSError, ValueError, TypeError):
            parser.error(f"--resume {given.resume}: there is no run of {METHOD}.py in this folder")
    parser.set_defaults(**vars(args))
    parser.add_argument("-h", "--help", action="help", help="show this help, with the recipe of --dataset in brackets")
    parser.parse_args(argv, args)
    for field in fields:
        low, value, high = field.metadata["low"], getattr(args, field.name), field.metadata["high"]
        if low is not None and not low <= value <= high:
            parser.error(f"--{field.name.replace('_', '-')} {value}: must be from {low} to {high}")
    if given.out and given.resume:
        parser.error("--out: a resumed run stays in its folder")
    args.typed = [*args.typed, *(field.name for field in fields if getattr(given, field.name) is not None)]
    args.command = shlex.join([*shlex.split(args.command), *argv])
    args.out = args.resume or args.out or f"runs/{METHOD}-{Path(args.dataset).resolve().stem}-seed{args.seed}"
    return args


def main(args):
    """Measures the untrained encoder, pretrains without labels, measures again -> the content of summary.json."""
    start, load = time.perf_counter(), [args.dataset, args.data_dir, args.image_size]
    data = common.load_dataset(*load) if RANK == 0 else None  # the others wait below while this downloads or decodes
    device = pick_device(args.device)
    data = (data or common.load_dataset(*load)).to(device)
    y, (M, _, S, _) = data.train_labels, data.train_images.shape
    recipe = {"batch_size": min(args.batch_size, M // WORLD * WORLD)}
    recipe |= LARGE_IMAGES if S > 64 and args.encoder != "small" else {}
    vars(args).update({name: value for name, value in recipe.items() if name not in args.typed})
    L = (S // args.patch_size) ** 2
    if args.batch_size > M or args.batch_size % WORLD:
        raise UserError(f"--batch-size {args.batch_size}: at most the {M} images, in equal parts for {WORLD} processes")
    if S % args.patch_size:
        raise UserError(f"--patch-size {args.patch_size}: must divide the images' side, {S}")
    if not 0 < round(args.mask_ratio * L) < L:
        raise UserError(f"--mask-ratio {args.mask_ratio}: must mask one of the {L} patches, and leave one")
    if args.fine_tune and not data.classes:
        raise UserError(f"--fine-tune: {args.dataset} has no labels")
    torch.manual_seed(args.seed)
    decoder = args.decoder_dim, args.decoder_depth, max(1, args.decoder_dim // 32)
    model = MaskedAutoencoder(S, args.patch_size, *ENCODERS[args.encoder], *decoder).to(device)
    encoder, initial = model.encoder, copy.deepcopy(model.encoder)
    if args.compile:
        model.compile()

    def monitor():  # kNN on a tenth of the training labels, from the others: what recipes are chosen by
        h, order = features(encoder, data.train_images[: len(y)]), torch.Generator().manual_seed(0)
        held, rest = torch.randperm(len(y), generator=order).to(device).tensor_split([len(y) // 10])
        h = h.chunk(2, dim=1)[1]  # means of the patch tokens
        return {"knn": knn_accuracy(h[rest], y[rest], h[held], y[held])}

    with common.compile_operators(args.compile), run_folder(args) as folder:
        print(f"{METHOD} on {args.dataset}: {M} images, {S} x {S}, {len(y)} labels; {device}; {folder}", flush=True)
        untrained = evaluate(initial, data)
        history = pretrain(model, data.train_images, args, monitor if data.classes else dict)
        print("measuring", flush=True)
        trained = evaluate(encoder, data)
        if args.fine_tune:
            print("fine-tuning, and training from scratch", flush=True)
            trained["fine_tuned"], classifier = fine_tune(encoder, data, args, args.layer_decay)
            trained["from_scratch"], _ = fine_tune(initial, data, args, 1.0)
            save(folder / "classifier.pt", classifier.state_dict())
        seconds = [line["seconds"] for line in history]
        summary = {
            "method": METHOD,
            "command": args.command,
            "args": dataclasses.asdict(args),
            "date": time.strftime("%Y-%m-%d"),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "parameters": sum(p.numel() for p in encoder.parameters()),
            "images_per_second": M // args.batch_size * args.batch_size / sorted(seconds)[len(seconds) // 2],
            "pretrain_seconds": sum(seconds),
            "total_seconds": time.perf_counter() - start,
            "untrained": untrained,
            "trained": trained,
            "history": history,
        }
        save(folder / "encoder.pt", encoder.state_dict())
        save(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        kinds = [(data.test_labels == label).nonzero()[0, 0] for label in data.test_labels.unique()[:10]]
        rows = torch.stack(kinds) if kinds else torch.arange(min(10, len(data.test_images)))
        images = data.test_images[rows.to(data.test_images.device)].to(device)
        triplets = F.interpolate(reconstruct(model, images, args).flatten(0, 1), scale_factor=max(1, round(96 / S)))
        if RANK == 0:
            torchvision.utils.save_image(triplets, folder / "reconstruction.png", nrow=6, padding=4, pad_value=1.0)
    for name in trained:
        print(f"{name:24}{trained[name]:6.1%}" + (f", untrained {untrained[name]:.1%}" if name in untrained else ""))
    print(f"{summary['total_seconds']:.0f} s in all; results are in {folder}")
    return summary


def run():  # the command line: bad input is one line and exit code 2
    sys.stdout.reconfigure(errors="replace")  # for consoles that cannot show every file name
    try:
        main(parse_args())
    except UserError as error:
        print(f"{METHOD}.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, BrokenPipeError):  # Ctrl-C, or a `| head` that has read enough
        sys.stdout = None
        sys.exit("stopped; --resume with the run folder goes on from the last whole epoch")


if __name__ == "__main__":
    run()
