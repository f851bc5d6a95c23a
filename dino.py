"""DINO: a student learns to predict, from one view of an image, what its teacher says of another view.

The teacher is a moving average of the student. An image becomes two large global views and several small local ones;
the student sees all, the teacher the global ones alone, so that a part has to tell what the whole says. Both end in K
logits. There are no negatives, and one answer for all images would satisfy the loss. Two operations on the teacher
prevent it: sharpening by a low temperature, which alone would end in one-hot targets, the same for all images, and
centering, which alone would end in uniform ones; each undoes the collapse of the other. Downstream tasks use the
teacher's encoder, an average of many students and better than any of them; heads and student are thrown away.

    Caron, Touvron, Misra, Jegou, Mairal, Bojanowski, Joulin: Emerging Properties in Self-Supervised Vision
    Transformers, ICCV 2021. Algorithm 1 of the paper and of the lecture, for student logits s and teacher logits t:

    P_s = softmax(s / tau_s)     P_t = softmax((t - C) / tau_t)        C the center, a moving average of t
    H(t, s) = -sum_k P_t(k) log P_s(k)                                no gradient to the teacher
    L = mean of H(t_i, s_j) over the global views i and all views j other than i

    python dino.py                                       shapes drawn by code; a laptop CPU will do
    python dino.py --no-centering --out runs/one-hot     the first collapse; and the second, without sharpening:
    python dino.py --teacher-temperature 0.1 --teacher-temperature-start 0.1 --out runs/uniform
    python dino.py --dataset cifar10 --compile           ViT-tiny with patches of 4 x 4 pixels, on a GPU
    python dino.py --dataset cifar10 --encoder small     a small ViT, on a CPU
    python dino.py --resume RUN --show IMAGE             attention and parts of an image of your own
    torchrun --nproc-per-node 8 dino.py --dataset path/to/images         your own images, on 8 GPUs

Linear probe of class token with mean on test, shapes, seed 0 (record in results/): 37.5 -> 70.9 %.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import os
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

METHOD = "dino"
SWITCH, RAW = argparse.BooleanOptionalAction, argparse.RawDescriptionHelpFormatter
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun: a process for each GPU
ENCODERS = {"small": (96, 3, 3), "vit_tiny": (192, 12, 3), "vit_small": (384, 12, 6), "vit_base": (768, 12, 12)}


def flag(default, help, low=None, high=math.inf, **options):  # a field of Args; low to high is a number's range
    return dataclasses.field(default=default, metadata=dict(help=help, low=low, high=high, options=options))


@dataclasses.dataclass
class Args:  # defaults are the recipe for CIFAR-10 on a GPU, SHAPES, SMALL and LARGE_IMAGES say what differs elsewhere
    dataset: str = flag("shapes", "shapes, cifar10, cifar100, stl10, or a path: an .npz file or a folder of images")
    data_dir: str = flag("data", "folder for downloads and decoded images")
    image_size: int = flag(96, "side in pixels to which the images of a folder, and larger ones, are resized", 8, 512)
    encoder: str = flag("vit_tiny", "paper: vit_small, vit_base", choices=tuple(ENCODERS))
    patch_size: int = flag(4, "side of a patch in pixels; paper: 16 or 8, of 224", 1, 64)
    out_dim: int = flag(4096, "logits K; paper: 65536", 2)
    teacher_temperature: float = flag(0.07, "tau_t at last, below tau_s: sharpening; paper: 0.04 to 0.07", 0.001)
    teacher_temperature_start: float = flag(0.04, "from which it rises in 30 %% of the steps; paper: 0.04", 0.001)
    centering: bool = flag(True, "subtract the center from the teacher's logits", action=SWITCH)
    momentum: float = flag(0.998, "of the teacher, rises to 1; paper: 0.996, N = 1024; authors: 0.9995, N = 256", 0, 1)
    local_views: int = flag(4, "small views, for the student alone; paper: 8 or 10", 0)
    crop: float = flag(0.4, "smallest global and largest local crop, as a fraction of the area; paper: 0.4", 0.01, 1)
    local_crop: float = flag(0.1, "smallest local crop, as a fraction of the area; paper: 0.05", 0.01, 1)
    gray: float = flag(0.2, "fraction of gray views; paper: 0.2", 0, 1)
    solarize: float = flag(0.2, "fraction of the second global views that are solarized; paper: 0.2", 0, 1)
    epochs: int = flag(100, "passes over the training images; paper: 100 to 800", 1)
    batch_size: int = flag(512, "images N per step, over all GPUs; paper: 1024", 2)
    lr: float = flag(5e-4, "peak learning rate of AdamW for a batch of 256; grows with --batch-size; paper: 5e-4", 0)
    warmup: float = flag(0.1, "fraction of the steps with linear warmup; paper: 10 epochs", 0, 0.9)
    weight_decay: float = flag(0.04, "not applied to biases and norms; paper: 0.04", 0)
    weight_decay_end: float = flag(0.4, "to which it rises by a cosine; paper: 0.4", 0)
    eval_every: int = flag(10, "epochs between two kNN measurements on held-out training labels", 1)
    seed: int = flag(0, "of weights, batches and views", 0, 2**31)
    device: str = flag("auto", "auto: cuda, else mps, else cpu")
    compile: bool = flag(False, "torch.compile networks and augmentations, for long runs on a GPU", action=SWITCH)
    show: str = flag("", "train nothing; draw attention and parts of this image file by the run in --resume")
    out: str = flag("", "run folder instead of runs/<method>-<dataset>-seed<seed>")
    resume: str = flag("", "run folder to continue, with the flags that it was started with")
    typed: list = ()  # names of the flags that were typed
    command: str = f"torchrun --nproc-per-node {WORLD} {METHOD}.py" if WORLD > 1 else f"python {METHOD}.py"


# === Views ============================================================================================================
def multi_crop(images, args, generator):
    """uint8 (N, 3, S, S) -> [global views (2N, 3, S, S), first and second ones; local views (local_views N, 3, s, s) if
    any], in [0, 1]. The two global ones differ in blur, not for small images, and solarization, as in BYOL. Local ones
    have half the side, in whole patches (paper: 96 of 224 pixels): as much detail, of a part."""
    S, s, views = images.shape[3], max(1, images.shape[3] // 2 // args.patch_size) * args.patch_size, []
    for count, size, crop, blur, solarize in (
        (1, S, (args.crop, 1.0), 1.0, 0.0),
        (1, S, (args.crop, 1.0), 0.1, args.solarize),
        (args.local_views, s, (args.local_crop, args.crop), 0.5, 0.0),
    )[: 3 if args.local_views else 2]:
        x = common.random_resized_crop(images.repeat(count, 1, 1, 1) / 255, size, generator, scale=crop)
        x = common.random_color_jitter(x, generator, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
        x = common.random_grayscale(x, generator, args.gray)
        x = common.random_gaussian_blur(x, generator, p=blur) if S > 64 else x
        views.append(common.random_solarize(x, generator, p=solarize) if solarize else x)
    return [torch.cat(views[:2]), *views[2:]]


# === Model ============================================================================================================
class Network(nn.Module):
    """Encoder and head: views of one size or of several, (B, 3, S, S) each -> logits (sum of B, K) of class tokens: the
    cosines of a unit vector with K directions, whose scale temperatures set; the authors' vit_small learns it too."""

    def __init__(self, args, image_size):
        super().__init__()
        D, small = ENCODERS[args.encoder][0], args.encoder == "small"
        norm, H, out = (nn.BatchNorm1d, 256, 64) if small else (nn.Identity, 2048, 256)  # paper: without batch norm
        self.encoder = VisionTransformer(image_size, args.patch_size, *ENCODERS[args.encoder], small)
        hidden = [nn.Linear(D, H), norm(H), nn.GELU(), nn.Linear(H, H), norm(H), nn.GELU()]
        self.mlp = nn.Sequential(*hidden, nn.Linear(H, out))
        for module in self.modules():  # the authors' initialization
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last_layer = nn.Linear(out, args.out_dim, bias=False)

    def forward(self, *views):
        h = torch.cat([self.encoder(x).chunk(2, dim=1)[0] for x in views])  # (sum of B, D)
        return F.normalize(self.mlp(h), dim=1) @ F.normalize(self.last_layer.weight, dim=1).T


class DINO(nn.Module):
    """Student, teacher and center (K,)."""

    def __init__(self, args, image_size=32):
        super().__init__()
        self.student = Network(args, image_size)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)  # gt.params = gs.params
        self.register_buffer("center", torch.zeros(args.out_dim))


# === Loss =============================================================================================================
def dino_loss(student, teacher, center, student_temperature, teacher_temperature):
    """H(t, s) of the lecture's algorithm, mean over all pairs of different views (equation 3 of the paper).
    student (V, N, K): logits of V views of N images, the global ones first; teacher (2, N, K): of the global ones;
    center (K,) -> scalar, in nats: entropy of the targets plus KL divergence to them. A collapse makes it low as well.
    """
    t = ((teacher.detach() - center) / teacher_temperature).softmax(2)  # center and sharpen; targets are constants
    log_s = (student / student_temperature).log_softmax(2)
    pairs = [(i, j) for i in range(2) for j in range(len(student)) if i != j]  # the same view would tell nothing new
    return sum(-(t[i] * log_s[j]).sum(1).mean() for i, j in pairs) / len(pairs)


@torch.no_grad()
def update_center(center, teacher, momentum):
    """C <- m C + (1 - m) mean of the teacher's logits (2, N, K), of all processes: (K,), equation 4 of the paper."""
    mean = teacher.mean((0, 1)) / WORLD
    if WORLD > 1:
        dist.all_reduce(mean)
    return torch.lerp(mean, center, momentum)


@torch.no_grad()
def update_teacher(teacher, student, momentum):
    """theta_t <- m theta_t + (1 - m) theta_s, in place: for parameters, not the running means of batch norm."""
    for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
        t.lerp_(s, 1 - momentum)


def target_entropies(teacher, center, teacher_temperature):
    """Entropy of a target, and of the mean of a batch's targets: (2,), in nats, at most log K. Their difference is what
    targets tell of their images, and 0 in both collapses: one-hot, both entropies are 0; uniform, both are log K."""
    t = ((teacher - center) / teacher_temperature).softmax(2)  # (2, N, K)
    return torch.stack([torch.special.entr(t).sum(2).mean(), torch.special.entr(t.mean((0, 1))).sum()])


# === Pretrain =========================================================================================================
def cosine(start, end, progress):
    """From start to end by half a cosine, for progress from 0 to 1."""
    return end + (start - end) * (0.5 + 0.5 * math.cos(math.pi * progress))


def pretrain(model, images, args, monitor):
    """Algorithm 1 on images, uint8 (M, 3, S, S), without labels; monitor() -> metrics. Returns those of all epochs."""
    device, N, steps = model.center.device, args.batch_size // WORLD, len(images) // args.batch_size
    optimizer, schedule = make_optimizer(model.student, args, args.epochs * steps)
    scaler = torch.amp.GradScaler(device.type, enabled=autocast(device).fast_dtype == torch.float16)
    state = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    history = load_checkpoint(args, state, images)
    student = nn.parallel.DistributedDataParallel(model.student) if WORLD > 1 else model.student
    for epoch in range(len(history) + 1, args.epochs + 1):
        start, losses, entropies = time.perf_counter(), torch.zeros(steps, device=device), []
        order, generator = draws(args, epoch, images, device)
        model.train()
        for step, batch in enumerate(common.batches(images, order, N, device)):  # (N, 3, S, S)
            progress = (epoch - 1 + step / steps) / args.epochs
            warm = min(1.0, progress / 0.3)  # a high temperature would be unstable at first
            tau_t = (1 - warm) * args.teacher_temperature_start + warm * args.teacher_temperature
            views = [common.normalize(x) for x in multi_crop(batch, args, generator)]
            with autocast(device):
                s, t = student(*views), model.teacher(views[0])  # (V N, K), (2N, K): global views alone
            s, t = s.float().unflatten(0, (-1, N)), t.float().unflatten(0, (2, N))  # (V, N, K), (2, N, K)
            loss = dino_loss(s, t, model.center, 0.1, tau_t)  # tau_s = 0.1, as in the paper
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.student.parameters(), 3.0)  # authors' code: for each parameter by itself
            if epoch == 1:  # targets are still noise, which the head's K directions should not follow
                model.student.last_layer.zero_grad()
            optimizer.param_groups[0]["weight_decay"] = cosine(args.weight_decay, args.weight_decay_end, progress)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            update_teacher(model.teacher, model.student, cosine(args.momentum, 1.0, progress))
            losses[step] = loss.detach()  # reading it here would make the host wait for the GPU
            entropies.append(target_entropies(t, model.center, tau_t))
            if args.centering:
                model.center = update_center(model.center, t, 0.9)  # paper: 0.9
            show_progress(args, epoch, step, steps, start)
        metrics = {"loss": losses.mean().item(), "seconds": time.perf_counter() - start}
        metrics["entropy"], metrics["entropy_of_mean"] = torch.stack(entropies).mean(0).tolist()
        metrics["kl"] = metrics["loss"] - metrics["entropy"]
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


class ConvStem(nn.Sequential):
    """Convolutions in place of a linear map of patches, for `small`: they learn in fewer steps (Xiao et al. 2021). Each
    image is standardized first, or its colors and contrast would be the first that student and teacher agree on."""

    def __init__(self, patch_size, D):
        layers, channels = [], 3
        for i in range(patch_size.bit_length() - 1):  # one for each factor of two
            layers += [nn.Conv2d(channels, 32 << i, 3, 2, 1, bias=False), nn.BatchNorm2d(32 << i), nn.ReLU()]
            channels = 32 << i
        super().__init__(*layers, nn.Conv2d(channels, D, 1))

    def forward(self, x):
        x = x - x.mean((2, 3), keepdim=True)
        return super().forward(x / (x.square().mean((1, 2, 3), keepdim=True).sqrt() + 0.1))


class VisionTransformer(nn.Module):
    """Images (B, 3, S, S) -> class token and mean of the patch tokens, both after the last norm: (B, 2 D). S may be any
    multiple of patch_size. Names are those of the authors' code and of timm, so weights load. Drop path is left out."""

    def __init__(self, image_size, patch_size, D, depth, heads, stem=False):
        super().__init__()
        projection = ConvStem(patch_size, D) if stem else nn.Conv2d(3, D, patch_size, patch_size)
        self.patch_size, self.patch_embed = patch_size, nn.ModuleDict({"proj": projection})
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, D))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + (image_size // patch_size) ** 2, D))
        self.blocks = nn.ModuleList(Block(D, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(D, eps=1e-6)

    def positions(self, T):
        """Embeddings (1, T, D) of class token and patches, interpolated for local views and images of other sizes."""
        old, new = math.isqrt(self.pos_embed.shape[1]), math.isqrt(T)  # patches a side
        grid = self.pos_embed[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)  # (1, D, old, old)
        grid = F.interpolate(grid, (new, new), mode="bicubic").flatten(2).transpose(1, 2)
        return torch.cat([self.pos_embed[:, :1], grid], dim=1)

    def last_input(self, images):
        """Input of the last block: (B, 3, S, S) -> (B, 1 + L, D), the class token first."""
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)  # (B, L, D), row by row
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions(x.shape[1])
        for block in self.blocks[:-1]:
            x = block(x)
        return x

    def attention(self, images):
        """The lecture's figure: from the class token to each patch in the last block, (B, 3, S, S) -> (B, heads, L)."""
        q, k, _ = self.blocks[-1].qkv(self.last_input(images))
        return (q[:, :, :1] @ k.mT / math.sqrt(q.shape[3])).softmax(3)[:, :, 0, 1:]

    def tokens(self, images):
        """(B, 3, S, S) -> (B, 1 + L, D), after the last norm."""
        return self.norm(self.blocks[-1](self.last_input(images)))

    def forward(self, images):
        x = self.tokens(images)
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
    """kNN and linear probe of the class token, the paper's, knn_20 with its k and temperature, and of class token with
    mean of the patch tokens -> accuracies on test, none without labels."""
    if not data.classes:
        return {}
    y, test_y = data.train_labels, data.test_labels
    h, test_h = features(encoder, data.train_images[: len(y)]), features(encoder, data.test_images)  # (M, 2 D)
    results, D = {}, h.shape[1] // 2
    for name, x, test_x in (("", h[:, :D], test_h[:, :D]), ("_with_mean", h, test_h)):
        results[f"knn{name}"] = knn_accuracy(x, y, test_x, test_y)
        results[f"linear_probe{name}"] = linear_probe(x, y, test_x, test_y)
    return results | {"knn_20": knn_accuracy(h[:, :D], y, test_h[:, :D], test_y, k=20, temperature=0.07)}


def pca_colors(tokens):
    """Patch tokens (R, L, D) of R images -> colors (R, L, 3) in [0, 1], DINOv2's figure 1. The first principal
    component of all patches tells object from background: the side with most of the patches along the borders, black.
    Three components of the objects' patches, the same for all images, are red, green and blue: like parts match."""

    def components(x):  # (M, D) -> (M, 3)
        return (x - x.mean(0)) @ torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:3].T

    colors, inner = torch.zeros(*tokens.shape[:2], 3, device=tokens.device), math.isqrt(tokens.shape[1]) - 2
    border = F.pad(torch.zeros(inner, inner), (1, 1, 1, 1), value=1.0).bool().flatten()
    thing = components(tokens.flatten(0, 1))[:, 0].view(tokens.shape[:2]) > 0
    thing ^= thing[:, border].float().mean() > 0.5
    if thing.sum() > 3:
        x = components(tokens[thing])  # (M, 3)
        low, high = x.quantile(0.02, dim=0), x.quantile(0.98, dim=0)
        colors[thing] = ((x - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return colors


@torch.no_grad()
def save_figures(folder, groups, encoder, suffix=""):
    """R images of each of G kinds, uint8 (G, R, 3, S, S), as an encoder sees them in 32 x 32 patches, finer than in
    training. attention.png, the lecture's figure: an image, and for each head where the class token looks in the last
    block, white where most. pca.png: the images of four kinds, a row for each, and their pca_colors."""
    images, size = groups.flatten(0, 1) / 255, groups.shape[:2]
    x = F.interpolate(images, 32 * encoder.eval().patch_size, mode="bicubic").clamp(0, 1)
    x, images = (y.unflatten(0, size) for y in (common.normalize(x), F.interpolate(images, 128, mode="area")))
    maps = encoder.attention(x[:, 0]).unflatten(2, (32, 32))  # (G, heads, 32, 32)
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    maps = ((maps - low) / (high - low).clamp(min=1e-9))[:, :, None].expand(-1, -1, 3, -1, -1)
    colors = torch.stack([pca_colors(encoder.tokens(group)[:, 1:]).mT for group in x[:4]]).unflatten(3, (32, 32))
    for name, left, right in (("attention", images[:, :1], maps), ("pca", images[:4], colors)):
        rows = torch.cat([left, F.interpolate(right.flatten(0, 1), 128).unflatten(0, right.shape[:2])], dim=1)
        save_grid(folder / f"{name}{suffix}.png", rows)


def show(args):
    """Figures of the image file --show by the encoder of the run --resume: attention-show.png, pca-show.png in it."""
    path, p = Path(args.resume, "encoder.pt"), args.patch_size
    if not path.exists():
        raise UserError(f"--resume {args.resume or 'RUN'}: must be the folder of a finished run of {METHOD}.py")
    weights = torch.load(path, map_location="cpu", weights_only=True)
    S = math.isqrt(weights["pos_embed"].shape[1]) * p  # of the training images
    encoder = VisionTransformer(S, p, *ENCODERS[args.encoder], args.encoder == "small")
    encoder.load_state_dict(weights)
    image = torch.tensor(common.decode_image(Path(args.show), 32 * p)).permute(2, 0, 1)
    save_figures(path.parent, image[None, None], encoder, "-show")
    print(f"attention-show.png and pca-show.png are in {path.parent}")


# === Nothing below is about DINO: optimizer, several GPUs, run folder, figures, command line ==========================
def autocast(device):
    """bfloat16 where the GPU has it, else float16; float32 on other devices."""
    bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16 if bfloat16 else torch.float16, enabled=device.type == "cuda")


def make_optimizer(model, args, steps):
    """AdamW, with weight decay on matrices and kernels alone; linear warmup, then half a cosine to 0."""
    decayed, others = ([p for p in model.parameters() if (p.ndim > 1) == decay] for decay in (True, False))
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    lr, rise = args.lr * args.batch_size / 256, args.warmup * steps  # more images, less noise, larger steps
    optimizer = torch.optim.AdamW(groups, lr, fused=True)

    def factor(step):
        fall = (min(step, steps) - rise) / (steps - rise)
        return (step + 1) / (rise + 1) if step < rise else cosine(1.0, 0.0, fall)

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


def save_grid(path, rows):
    """Images, float (R, C, 3, S, S) in [0, 1], in rows of C, as many side by side as fit into eight."""
    if RANK == 0:
        columns = max(1, 8 // rows.shape[1]) * rows.shape[1]
        torchvision.utils.save_image(rows.flatten(0, 1), path, nrow=columns, padding=4, pad_value=1.0)


SMALL = dict(image_size=32, patch_size=8, out_dim=256, teacher_temperature=0.04, teacher_temperature_start=0.02,
             momentum=0.98, local_views=0, gray=0.5, solarize=0.5, epochs=8, batch_size=64, lr=6e-3, warmup=0.05,
             eval_every=2)  # with --encoder small  # fmt: skip
SHAPES = SMALL | dict(encoder="small", crop=0.9, epochs=14, eval_every=7)  # large crops show whole outlines
LARGE_IMAGES = dict(encoder="vit_small", patch_size=8, out_dim=65536, local_views=8, local_crop=0.05)


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
    if args.show:
        return show(args)
    start, load = time.perf_counter(), [args.dataset, args.data_dir, args.image_size]
    data = common.load_dataset(*load) if RANK == 0 else None  # the others wait below while this downloads or decodes
    device = pick_device(args.device)
    data = (data or common.load_dataset(*load)).to(device)
    y, (M, _, S, _) = data.train_labels, data.train_images.shape
    recipe = {"batch_size": min(args.batch_size, M // WORLD * WORLD)}
    recipe |= LARGE_IMAGES if S > 64 and args.encoder != "small" else {}
    vars(args).update({name: value for name, value in recipe.items() if name not in args.typed})
    if args.batch_size > M or args.batch_size % WORLD:
        raise UserError(f"--batch-size {args.batch_size}: at most the {M} images, in equal parts for {WORLD} processes")
    if S % args.patch_size or (args.encoder == "small" and args.patch_size.bit_count() > 1):
        raise UserError(f"--patch-size {args.patch_size}: must divide the side, {S}, and be a power of 2 for `small`")
    if args.local_views and args.local_crop > args.crop:
        raise UserError(f"--local-crop {args.local_crop}: must not be above --crop {args.crop}")
    torch.manual_seed(args.seed)
    layout = torch.preserve_format if device.type == "mps" else torch.channels_last  # as of common.normalize
    model = DINO(args, S).to(device, memory_format=layout)
    if WORLD > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    encoder, initial = model.teacher.encoder, copy.deepcopy(model.teacher.encoder)
    if args.compile:
        model.student.compile()
        model.teacher.compile()

    def monitor():  # kNN on a tenth of the training labels, from the others: what recipes are chosen by
        h, order = features(encoder, data.train_images[: len(y)]), torch.Generator().manual_seed(0)
        held, rest = torch.randperm(len(y), generator=order).to(device).tensor_split([len(y) // 10])
        h = h.chunk(2, dim=1)[0]  # class tokens
        return {"knn": knn_accuracy(h[rest], y[rest], h[held], y[held])}

    with common.compile_operators(args.compile), run_folder(args) as folder:
        print(f"{METHOD} on {args.dataset}: {M} images, {S} x {S}, {len(y)} labels; {device}; {folder}", flush=True)
        images = data.train_images[:8].to(device)  # views.png: each, its global views, and its local ones, enlarged
        views = [images / 255, *multi_crop(images, args, torch.Generator(device).manual_seed(args.seed))]
        views = [F.interpolate(x, 128).unflatten(0, (-1, len(images))) for x in views]
        save_grid(folder / "views.png", torch.cat(views).transpose(0, 1))
        untrained = evaluate(initial, data)
        history = pretrain(model, data.train_images, args, monitor if data.classes else dict)
        print("measuring", flush=True)
        trained = evaluate(encoder, data)
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
        kinds = [(data.test_labels == label).nonzero()[:, 0].repeat(4)[:4] for label in data.test_labels.unique()[:10]]
        rows = torch.stack(kinds or list(torch.arange(len(data.test_images))[:10, None]))  # without labels: alone
        groups = data.test_images[rows.to(data.test_images.device)].to(device)
        save_figures(folder, groups, initial, "-untrained")
        save_figures(folder, groups, encoder)
    for name in trained:
        print(f"{name:24}{trained[name]:6.1%}, untrained {untrained[name]:.1%}")
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
