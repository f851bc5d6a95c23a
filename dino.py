"""DINO: from one view of an image, a student network learns to predict what its teacher outputs for
another view.

The teacher is a moving average of the student. An image becomes two large global views and several
small local ones. The student sees all of them, the teacher only the global ones, so that a part of
the image has to predict the teacher's output for the whole. Both networks end in logits of K
classes that have no names: training decides what falls into each of them. There are no negatives,
and one output for all images would satisfy the loss. Two operations on the teacher prevent that.
Sharpening by a low temperature, if used without the other, ends in one-hot targets, the same for
all images; centering ends in uniform ones. Each undoes the collapse of the other. Downstream tasks
use the teacher's encoder, an average of many students that is better than any of them; heads and
student are thrown away.

    Caron, Touvron, Misra, Jegou, Mairal, Bojanowski, Joulin: Emerging Properties in Self-Supervised
    Vision Transformers, ICCV 2021. Algorithm 1 of the paper, for student logits s and teacher
    logits t:

    P_s = softmax(s / tau_s)     P_t = softmax((t - C) / tau_t)    C the center, a moving mean of t
    H(t, s) = -sum_k P_t(k) log P_s(k)                             no gradient to the teacher
    L = mean of H(t_i, s_j) over the global views i and all views j other than i

    python dino.py                                      shapes drawn by code; a laptop CPU will do
    python dino.py --no-centering --out runs/one-hot    one collapse; without sharpening, the other:
    python dino.py --teacher-temperature 0.1 --teacher-temperature-start 0.1 --out runs/uniform
    python dino.py --dataset cifar10 --compile          ViT-tiny, patches of 4 x 4, on a GPU
    python dino.py --dataset cifar10 --encoder small    a small ViT, on a CPU
    python dino.py --init encoder.pt --epochs 0         measures the weights in a file
    python dino.py --resume RUN --show IMAGES           attention and parts of your own images
    python dino.py --init FILE --encoder vit_small --patch-size 16 --show IMAGES   authors' weights
    torchrun --nproc-per-node 8 dino.py --dataset path/to/images         your own images, on 8 GPUs

Linear probe on test of shapes, of class token and mean of the patch tokens together, with seed 0
(record in results/): 38.3 -> 72.5 %.

The recipes for CPUs are far from the paper: convolutions in place of a linear map of patches,
standardized images, a small head with batch norm, no local views, and a hundredth of the steps;
results/README.md says why. Left out of the paper: drop path.
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
    "small": (96, 3, 3),
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
}


@dataclasses.dataclass
class Args:
    """The values here are the recipe for CIFAR-10 on a GPU. SHAPES, SMALL and LARGE_IMAGES, below,
    replace some of them, but never a flag that was typed."""

    script: str = "dino.py"  # relatives/ name their own
    dataset: str = flag("shapes", "shapes, cifar10, cifar100, stl10, an .npz file, an image folder")
    data_dir: str = flag("data", "folder for downloads and decoded images", resume=True)
    image_size: int = flag(96, "side of a folder's images; largest side in an .npz file", 8, 512)
    encoder: str = flag("vit_tiny", "the encoder; paper: vit_small, vit_base", choices=ENCODERS)
    init: str = flag("", "weights to begin with: an encoder.pt, or the authors' for --encoder")
    patch_size: int = flag(4, "side of a patch in pixels; paper: 16 or 8, of 224", 1, 64)
    out_dim: int = flag(4096, "number K of logits; paper: 65536", 2)
    teacher_temperature: float = flag(
        0.07, "final tau_t, below tau_s = 0.1, which sharpens; paper: 0.04 to 0.07", 0.001
    )
    teacher_temperature_start: float = flag(
        0.04, "initial tau_t, which rises for 30 % of the steps; paper: 0.04", 0.001
    )
    centering: bool = flag(True, "subtract the center from the teacher's logits")
    ema_momentum: float = flag(0.998, "momentum l of the teacher, rises to 1; paper: 0.996", 0, 1)
    local_views: int = flag(4, "number of small views, for the student only; paper: 8 or 10", 0)
    crop: float = flag(
        0.4, "smallest global and largest local crop, fractions of the area; paper: 0.4", 0.01, 1
    )
    local_crop: float = flag(
        0.1, "smallest local crop, as a fraction of the area; paper: 0.05", 0.01, 1
    )
    gray: float = flag(0.2, "fraction of gray views; paper: 0.2", 0, 1)
    solarize: float = flag(0.2, "fraction of solarized second global views; paper: 0.2", 0, 1)
    epochs: int = flag(100, "passes over the training images; paper: 100 to 800", 0)
    batch_size: int = flag(512, "images N per step, over all GPUs; paper: 1024", 2)
    lr: float = flag(5e-4, "peak learning rate for 256 images per step; paper: 5e-4", 0)
    warmup: float = flag(0.1, "fraction of the steps with linear warmup; paper: 10 epochs", 0, 0.9)
    weight_decay: float = flag(0.04, "initial weight decay, of matrices only; paper: 0.04", 0)
    weight_decay_end: float = flag(
        0.4, "final weight decay: more at the end helps ViTs (authors' code); paper: 0.4", 0
    )
    eval_every: int = flag(10, "epochs between two kNN measurements on held-out training labels", 1)
    show: tuple = flag(
        (), "train nothing; draw attention and parts of images, or of a folder's", resume=True
    )
    seed: int = flag(0, "seed of weights, batches and views", 0, 2**31)
    device: str = flag("auto", "cuda, mps, cpu, or auto: the first that is there", resume=True)
    compile: bool = flag(False, "compile networks and views, for long runs on a GPU", resume=True)
    out: str = flag("", "run folder; by default runs/<method>-<dataset>-seed<seed>")
    resume: str = flag("", "run folder to continue, with the flags of its first start", resume=True)
    explicit: tuple = ()  # flags that were typed: recipes leave them alone
    command: str = ""


# With --encoder small: what two CPU cores train in a quarter of an hour. Half of 32 pixels would be
# only two patches a side, so there are no local views.
SMALL = dict(
    image_size=32, patch_size=8, out_dim=256, teacher_temperature=0.04,
    teacher_temperature_start=0.02, ema_momentum=0.98, local_views=0, gray=0.5, solarize=0.5,
    epochs=8, batch_size=64, lr=6e-3, warmup=0.05, eval_every=2,
)  # fmt: skip
# Large crops show whole outlines: a part of a silhouette is another silhouette.
SHAPES = SMALL | dict(encoder="small", crop=0.9, epochs=14, eval_every=7)
# Above 64 pixels, without --encoder small.
LARGE_IMAGES = dict(
    encoder="vit_small", patch_size=8, out_dim=65536, local_views=8, local_crop=0.05
)


# === Views ========================================================================================
def multi_crop(images, args, generator):
    """uint8 (N, 3, S, S) -> [global views (2N, 3, S, S), the first ones and then the second ones]
    and, if there are any, local views (local_views N, 3, s, s), in [0, 1].

    As in BYOL, the two global views differ in solarization and, above 64 pixels, in blur. Local
    ones have half the side, in whole patches (paper: 96 of 224 pixels), which shows a part in the
    same detail.
    """
    S = images.shape[3]
    p = args.patch_size
    half = max(1, S // 2 // p) * p

    def views(count, size, scale, blur, solarize):
        x = images.repeat(count, 1, 1, 1) / 255
        x = common.random_resized_crop(x, size, generator, scale=scale)
        x = common.random_color_jitter(
            x, generator, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1
        )
        x = common.random_grayscale(x, generator, args.gray)
        if S > 64:
            x = common.random_gaussian_blur(x, generator, p=blur)
        if solarize:
            x = common.random_solarize(x, generator, p=solarize)
        return x

    large = (args.crop, 1.0)
    first = views(count=1, size=S, scale=large, blur=1.0, solarize=0.0)
    second = views(count=1, size=S, scale=large, blur=0.1, solarize=args.solarize)
    crops = [torch.cat([first, second])]
    if args.local_views:
        small = (args.local_crop, args.crop)
        crops.append(views(args.local_views, half, scale=small, blur=0.5, solarize=0.0))
    return crops


# === Model ========================================================================================
class Network(nn.Module):
    """Encoder and head: views of one size or of several, (B, 3, S, S) each -> logits (sum of B, K).

    Logits are cosines of a unit vector with K learned directions. Without that norm a head of three
    layers does not train (paper, appendix C). Their scale is left to the temperatures; the authors'
    vit_small learns one for each direction, too.
    """

    def __init__(self, args, image_size):
        super().__init__()
        small = args.encoder == "small"
        D, depth, heads = ENCODERS[args.encoder]
        self.encoder = VisionTransformer(image_size, args.patch_size, D, depth, heads, stem=small)
        norm = nn.BatchNorm1d if small else nn.Identity  # paper: none
        hidden = 256 if small else 2048
        bottleneck = 64 if small else 256
        layers = [nn.Linear(D, hidden), norm(hidden), nn.GELU()]
        layers += [nn.Linear(hidden, hidden), norm(hidden), nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        for layer in self.modules():  # the authors' initialization
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = nn.Linear(bottleneck, args.out_dim, bias=False)

    def forward(self, *views):
        return self.head(torch.cat([self.encoder.tokens(x)[:, 0] for x in views]))

    def head(self, tokens):
        """Tokens (B, D) -> logits (B, K)."""
        z = F.normalize(self.mlp(tokens), dim=1)  # (B, bottleneck)
        directions = F.normalize(self.last_layer.weight, dim=1)  # (K, bottleneck)
        return z @ directions.T


class DINO(nn.Module):
    """Student, teacher and center (K,)."""

    def __init__(self, args, image_size=32):
        super().__init__()
        self.student = Network(args, image_size)
        load_weights(self.student.encoder, args)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)  # begins equal
        self.register_buffer("center", torch.zeros(args.out_dim))

    def forward(self, *views):
        """Global views (2N, 3, S, S), maybe local ones -> the student's logits of all V views of N
        images (V N, K), the teacher's of the global ones (2N, K)."""
        return self.student(*views), self.teacher(views[0])


# === Loss =========================================================================================
def dino_loss(student_logits, teacher_logits, center, student_temperature, teacher_temperature):
    """H(t, s) of algorithm 1, mean over all pairs of different views (equation 3 of the paper).

    student_logits (V, N, K): of V views of N images, the global ones first; teacher_logits
    (2, N, K): of the global ones; center (K,) -> scalar, in nats. It is the targets' entropy plus
    the KL divergence of the student's predictions from them. It does not show a collapse by itself:
    it is log K for uniform targets, and falls to 0 for one-hot ones. The divergence is 0 in both.
    """
    targets = ((teacher_logits.detach() - center) / teacher_temperature).softmax(2)  # P_t
    log_predictions = (student_logits / student_temperature).log_softmax(2)  # log P_s
    terms = []
    for i in range(2):
        for j in range(len(student_logits)):
            if i != j:  # the same view would be no prediction: both networks see the same pixels
                terms.append(-(targets[i] * log_predictions[j]).sum(1).mean())
    return sum(terms) / len(terms)


def target_entropies(teacher_logits, center, teacher_temperature):
    """Entropy of a target, and of the mean target of a batch (2, N, K): two scalars, in nats, at
    most log K. Their difference is what a target reveals of its image. It is 0 in both collapses:
    for one-hot targets both entropies are 0, for uniform ones both are log K."""
    targets = ((teacher_logits - center) / teacher_temperature).softmax(2)
    entropy = torch.special.entr(targets).sum(2).mean()
    entropy_of_mean = torch.special.entr(targets.mean((0, 1))).sum()
    return entropy, entropy_of_mean


# === Training =====================================================================================
@torch.no_grad()
def update_center(center, teacher_logits, momentum):
    """C <- m C + (1 - m) mean of the teacher's logits (2, N, K) of all processes: (K,), equation 4
    of the paper. As a moving average, it hardly depends on the batch size (section 5.5)."""
    mean = teacher_logits.mean((0, 1)) / WORLD
    if WORLD > 1:
        dist.all_reduce(mean)
    return torch.lerp(mean, center, momentum)


@torch.no_grad()
def update_teacher(teacher, student, momentum):
    """theta_t <- l theta_t + (1 - l) theta_s, in place. For parameters: the running statistics of
    batch norm are each network's own. A copy of the student, l = 0, fails (paper, section 5.2)."""
    for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
        t.lerp_(s, 1 - momentum)


def cosine(start, end, progress):
    """From start to end by half a cosine, for progress from 0 to 1."""
    return end + (start - end) * (0.5 + 0.5 * math.cos(math.pi * progress))


def training_step(network, images, args, generator, progress, update):
    """Algorithm 1 for uint8 images (N, 3, S, S); update(loss, progress) trains the student. Returns
    what to log."""
    model = getattr(network, "module", network)  # without DistributedDataParallel around it
    N = len(images)
    tau_s = 0.1  # as in the paper
    warm = min(1.0, progress / 0.3)  # a high tau_t would be unstable at first
    tau_t = (1 - warm) * args.teacher_temperature_start + warm * args.teacher_temperature
    views = [common.normalize(x) for x in multi_crop(images, args, generator)]
    with autocast(images.device):
        student_logits, teacher_logits = network(*views)  # (V N, K), (2N, K)
    student_logits = student_logits.float().unflatten(0, (-1, N))  # (V, N, K)
    teacher_logits = teacher_logits.float().unflatten(0, (2, N))  # (2, N, K)
    loss = dino_loss(student_logits, teacher_logits, model.center, tau_s, tau_t)
    entropy, entropy_of_mean = target_entropies(teacher_logits, model.center, tau_t)
    update(loss, progress)  # theta_s, by gradient descent
    momentum = cosine(args.ema_momentum, 1.0, progress)  # the teacher comes to rest
    update_teacher(model.teacher, model.student, momentum)
    if args.centering:
        model.center = update_center(model.center, teacher_logits, 0.9)  # paper: 0.9
    terms = {"loss": loss, "entropy": entropy, "entropy_of_mean": entropy_of_mean}
    return terms | {"kl": loss - entropy}


def make_update(model, args, batch_size, steps):
    """The function update(loss, progress), which makes one training step of the student, and the
    state that it changes. DINO's own is what happens between backward and step: gradients are
    clipped, the last layer is frozen at first, and weight decay follows its schedule."""
    device = next(model.parameters()).device
    optimizer, schedule = make_optimizer(model, args, batch_size, steps)
    scaler = torch.amp.GradScaler(device.type, enabled=fast_dtype(device) == torch.float16)

    def update(loss, progress):
        optimizer.zero_grad()
        scaler.scale(loss).backward()  # float16 would round small gradients to 0
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.student.parameters(), 3.0)  # authors: for each parameter
        if progress < 1 / args.epochs:  # in the first epoch, when targets are still noise
            model.student.last_layer.zero_grad()  # AdamW leaves what has no gradient as it is
        decay = cosine(args.weight_decay, args.weight_decay_end, progress)
        optimizer.param_groups[0]["weight_decay"] = decay  # of the matrices
        scaler.step(optimizer)
        scaler.update()
        schedule.step()

    return update, {"optimizer": optimizer, "schedule": schedule, "scaler": scaler}


def make_optimizer(model, args, batch_size, steps):
    """AdamW of the student, with weight decay of its matrices and kernels only; linear warmup, then
    half a cosine to 0. args.lr is for batches of 256: the gradient of more images is less noisy,
    and allows larger steps."""
    parameters = list(model.student.parameters())
    decayed = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}]
    groups.append({"params": others, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, args.lr * batch_size / 256, fused=True)
    warmup = args.warmup * steps

    def factor(step):
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return cosine(1.0, 0.0, (min(step, steps) - warmup) / (steps - warmup))

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


class ConvStem(nn.Sequential):
    """In place of a linear map of patches, for `small`: convolutions, which learn in fewer steps
    (Xiao et al. 2021). (B, 3, S, S) -> (B, D, S / patch_size, S / patch_size).

    Each image is standardized first. Its colors and its contrast would otherwise be the first thing
    that student and teacher agree on.
    """

    def __init__(self, patch_size, D):
        layers = []
        channels = 3
        for i in range(patch_size.bit_length() - 1):  # one for each factor of two
            width = 32 * 2**i
            convolution = nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        super().__init__(*layers, nn.Conv2d(channels, D, 1))

    def forward(self, x):
        x = x - x.mean((2, 3), keepdim=True)
        contrast = x.square().mean((1, 2, 3), keepdim=True).sqrt()
        return super().forward(x / (contrast + 0.1))


class VisionTransformer(nn.Module):
    """Images (B, 3, S, S) -> class token and mean of the patch tokens, both after the last norm:
    (B, 2 D). S may be any multiple of patch_size. Parameters have the names of the authors' code
    and of timm, so their weights load."""

    def __init__(self, image_size, patch_size, D, depth, heads, stem=False):
        super().__init__()
        self.patch_size = patch_size
        projection = ConvStem(patch_size, D) if stem else nn.Conv2d(3, D, patch_size, patch_size)
        self.patch_embed = nn.ModuleDict({"proj": projection})
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, D))
        L = (image_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + L, D))
        self.blocks = nn.ModuleList([Block(D, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(D, eps=1e-6)

    def positions(self, T):
        """Embeddings (1, T, D) of class token and patches, interpolated for local views and images
        of other sizes."""
        old = math.isqrt(self.pos_embed.shape[1])  # patches a side
        new = math.isqrt(T)
        grid = self.pos_embed[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, (new, new), mode="bicubic").flatten(2).transpose(1, 2)
        return torch.cat([self.pos_embed[:, :1], grid], dim=1)

    def embed(self, images):
        """Patches without their positions, row by row: (B, 3, S, S) -> (B, L, D)."""
        return self.patch_embed["proj"](images).flatten(2).transpose(1, 2)

    def last_input(self, patches):
        """Input of the last block: (B, L, D) -> (B, 1 + L, D), the class token first."""
        x = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        x = x + self.positions(x.shape[1])
        for block in self.blocks[:-1]:
            x = block(x)
        return x

    def attention(self, images):
        """Of the class token to each patch in the last block, figure 1 of the paper:
        (B, 3, S, S) -> (B, heads, L)."""
        q, k, _ = self.blocks[-1].qkv(self.last_input(self.embed(images)))
        weights = (q[:, :, :1] @ k.mT / math.sqrt(q.shape[3])).softmax(3)  # (B, heads, 1, 1 + L)
        return weights[:, :, 0, 1:]

    def encode(self, patches):
        """(B, L, D) -> class token and patch tokens (B, 1 + L, D), after the last norm."""
        return self.norm(self.blocks[-1](self.last_input(patches)))

    def tokens(self, images):
        """The same of images (B, 3, S, S)."""
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


class ClassToken(nn.Module):
    """An encoder from which the class token is taken, as the paper does: (B, 3, S, S) -> (B, D)."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, images):
        return self.encoder.tokens(images)[:, 0]


def evaluate(encoder, data):
    """kNN and linear probe of the class token, and of class token and mean of the patch tokens
    together; knn_20 is of the class token, with the paper's k and temperature -> accuracies on
    test, none without labels."""
    if not data.classes:
        return {}
    y = data.train_labels
    test_y = data.test_labels
    tokens = features(encoder, data.train_images[: len(y)])  # (M, 2 D)
    test_tokens = features(encoder, data.test_images)
    class_token, _ = tokens.chunk(2, dim=1)
    test_class_token, _ = test_tokens.chunk(2, dim=1)
    accuracies = {"knn": knn_accuracy(class_token, y, test_class_token, test_y)}
    accuracies["linear_probe"] = linear_probe(class_token, y, test_class_token, test_y)
    accuracies["knn_with_mean"] = knn_accuracy(tokens, y, test_tokens, test_y)
    accuracies["linear_probe_with_mean"] = linear_probe(tokens, y, test_tokens, test_y)
    accuracies["knn_20"] = knn_accuracy(
        class_token, y, test_class_token, test_y, k=20, temperature=0.07
    )
    return accuracies


# === Figures ======================================================================================
def tiles(images):
    """Images, or maps of their patches, float (B, 3, S, S) -> (B, 3, 128, 128), for a figure."""
    return F.interpolate(images, 128, mode="area")


def save_crops(path, images, args):
    """Eight of the images, uint8 (M, 3, S, S), and the views of each in a few training steps. They
    are evenly spaced, since in a folder images are sorted by class."""
    images = images[torch.linspace(0, len(images) - 1, 8).long()]
    generator = torch.Generator(images.device).manual_seed(args.seed)
    blocks = {"training image": tiles(images / 255)[:, None]}
    for step in range(1, 1 + max(1, 8 // (2 + args.local_views))):
        views = multi_crop(images, args, generator)
        for name, x in zip(("global", "local"), views, strict=False):
            x = tiles(x).unflatten(0, (-1, len(images))).transpose(0, 1)  # (R, V, 3, 128, 128)
            blocks[f"{name} views, step {step}"] = x
    save_sheet(path, blocks)


def as_patches(images, patch_size):
    """uint8 (B, 3, S, S) -> normalized (B, 3, 32 p, 32 p): in 32 x 32 patches, finer than in
    training."""
    x = F.interpolate(images / 255, 32 * patch_size, mode="bicubic")
    return common.normalize(x.clamp(0, 1))


@torch.no_grad()
def attention_maps(encoder, images):
    """uint8 (R, 3, S, S) -> float (heads, R, 3, 128, 128): where the class token looks in the last
    block, figure 1 of the paper. Each map runs from black, least attention, to white, most."""
    encoder.eval()
    maps = encoder.attention(as_patches(images, encoder.patch_size))  # (R, heads, 32 * 32)
    low = maps.amin(2, keepdim=True)
    high = maps.amax(2, keepdim=True)
    maps = (maps - low) / (high - low).clamp(min=1e-9)
    maps = maps.transpose(0, 1).unflatten(2, (1, 32, 32))  # (heads, R, 1, 32, 32)
    shades = tiles(maps.flatten(0, 1)).expand(-1, 3, -1, -1)
    return shades.unflatten(0, maps.shape[:2])


def principal_components(x):
    """The first three of features (M, D): (M, 3)."""
    x = x - x.mean(0)
    return x @ torch.linalg.svd(x, full_matrices=False).Vh[:3].T


def pca_colors(tokens):
    """Patch tokens (R, L, D) of R images -> colors (R, L, 3) in [0, 1], figure 1 of DINOv2.

    The first principal component of all patches separates foreground from background, which is
    drawn black: the side where most of the patches along the borders are. Three components of the
    foreground, the same ones for all images, are red, green and blue, so that like parts of
    different images have like colors.
    """
    side = math.isqrt(tokens.shape[1])
    border = F.pad(torch.zeros(side - 2, side - 2), (1, 1, 1, 1), value=1.0).bool().flatten()
    first = principal_components(tokens.flatten(0, 1))[:, 0]
    foreground = first.view(tokens.shape[:2]) > 0  # (R, L)
    if foreground[:, border].float().mean() > 0.5:
        foreground = ~foreground
    colors = torch.zeros(*tokens.shape[:2], 3, device=tokens.device)
    if foreground.sum() > 3:
        x = principal_components(tokens[foreground])
        low = x.quantile(0.02, dim=0)
        high = x.quantile(0.98, dim=0)
        colors[foreground] = ((x - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return colors


@torch.no_grad()
def part_maps(encoder, images):
    """uint8 (R, 3, S, S) -> pca_colors of their patches, float (R, 3, 128, 128)."""
    encoder.eval()
    tokens = encoder.tokens(as_patches(images, encoder.patch_size))[:, 1:]  # (R, 32 * 32, D)
    return tiles(pca_colors(tokens).mT.unflatten(2, (32, 32)))


def save_attention(path, data, encoder):
    """The test images data.examples(), and below each the attention maps of all heads."""
    device = next(encoder.parameters()).device
    examples = data.examples().to(data.test_images.device)
    images = data.test_images[examples].to(device)
    rows = torch.cat([tiles(images / 255)[None], attention_maps(encoder, images)])
    title = "test images, and where the class token looks: a row for each head, white is most"
    save_sheet(path, {title: rows})


def save_parts(path, data, encoder):
    """Rows of four test images, of a class if there are classes, and their parts, whose colors are
    those of a row."""
    device = next(encoder.parameters()).device
    classes = min(4, len(data.classes) or 4)
    rows = data.examples(4 * classes, classes).split(4)
    images = [data.test_images[row.to(data.test_images.device)].to(device) for row in rows]
    images = [x for x in images if len(x) == len(images[0])]
    originals = torch.stack([tiles(x / 255) for x in images])
    parts = torch.stack([part_maps(encoder, x) for x in images])
    left = "test images, a class a row" if data.classes else "test images"
    right = "patches: like features, like colors; background black"
    save_sheet(path, {left: originals, right: parts})


def show(args):
    """Draws images of one's own, --show, with attention and parts by the encoder of the run
    --resume or of the file --init. Returns the path of the figure."""
    if not (args.resume or args.init):
        raise UserError("--show: needs --resume with a finished run, or --init with weights")
    file = Path(args.resume, "encoder.pt") if args.resume else Path(args.init)
    p = args.patch_size
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
        S = math.isqrt(weights["pos_embed"].shape[1]) * p  # of the training images
        encoder = VisionTransformer(S, p, *ENCODERS[args.encoder], stem=args.encoder == "small")
        encoder.load_state_dict(weights)
    except Exception as error:  # no such file, no weights, or those of another network
        reason = textwrap.shorten(str(error), 300, placeholder=" ...")
        flags = f"--encoder {args.encoder} --patch-size {p}"
        raise UserError(f"{file}: holds no weights of {flags}: {reason}") from None
    files = []
    for path in map(Path, args.show):
        if path.is_dir():
            names, _ = common.list_images(path)
            files += [path / name for name in names]
        else:
            files.append(path)
    if len(files) > 16:
        print(f"--show: the first 16 of {len(files)} images")
    squares = [torch.tensor(common.decode_image(file, 32 * p)) for file in files[:16]]
    images = torch.stack(squares).permute(0, 3, 1, 2)
    maps = attention_maps(encoder, images).transpose(0, 1)  # (R, heads, 3, 128, 128)
    blocks = {"image": tiles(images / 255)[:, None]}
    blocks["where the class token looks, head by head: white is most"] = maps
    blocks["parts by PCA"] = part_maps(encoder, images)[:, None]
    if not args.resume and "out" not in args.explicit:
        args.out = "runs/dino-show"
    with run_folder(args) as folder:
        path = folder / f"show-{Path(args.show[0]).resolve().stem}.png"
        save_sheet(path, blocks)
    print(f"the figure is {path}")
    return path


# === The whole run ================================================================================
def fit_batch_size(args, M):
    """At most all M images, unless a number was typed; the same share for every process."""
    use_recipe(args, {"batch_size": min(args.batch_size, M // WORLD * WORLD)})
    N = args.batch_size
    if not 2 <= N <= M:
        raise UserError(f"--batch-size {N}: must be from 2 to {M}, the number of images")
    if N % WORLD:
        raise UserError(f"--batch-size {N}: must be a multiple of {WORLD}, the number of processes")


def main(args, Model=DINO, training_step=training_step):
    """Measures the teacher's encoder, pretrains without labels, measures it again. Returns the
    content of summary.json; with --show, the path of a figure."""
    if args.show:
        return show(args)
    start = time.perf_counter()
    device = pick_device(args.device)
    data = load_data(args, device)
    M, _, S, _ = data.train_images.shape
    if S > 64 and args.encoder != "small":
        use_recipe(args, LARGE_IMAGES)
    fit_batch_size(args, M)
    p = args.patch_size
    if S % p:
        raise UserError(f"--patch-size {p}: must divide the images' side, {S}")
    if args.encoder == "small" and p.bit_count() > 1:
        raise UserError(f"--patch-size {p}: must be a power of 2, as --encoder small halves sides")
    if args.local_views and args.local_crop > args.crop:
        raise UserError(f"--local-crop {args.local_crop}: must be at most --crop {args.crop}")

    torch.manual_seed(args.seed)
    layout = torch.preserve_format if device.type == "mps" else torch.channels_last  # as normalize
    model = Model(args, S).to(device, memory_format=layout)
    if WORLD > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    encoder = model.teacher.encoder
    if args.compile:
        model.student.compile()
        model.teacher.compile()

    with run_folder(args) as folder:
        print_header(args, data, device)
        if not (folder / "checkpoint.pt").exists():
            save_crops(folder / "views.png", data.train_images, args)
            save_attention(folder / "attention-untrained.png", data, encoder)
            save_parts(folder / "pca-untrained.png", data, encoder)
        untrained = once(folder / "untrained.pt", evaluate, encoder, data)
        watch = functools.partial(monitor, ClassToken(encoder), data)
        with common.compile_operators(args.compile):
            history = pretrain(model, data, args, training_step, watch)
        save(folder / "encoder.pt", encoder.state_dict())
        print("measuring", flush=True)
        trained = evaluate(encoder, data)
        summary = describe(args, data, device, encoder, history, start)
        summary |= {"untrained": untrained, "trained": trained, "history": history}
        save_json(folder / "summary.json", summary)
        print_results(summary)
        save_attention(folder / "attention.png", data, encoder)
        save_parts(folder / "pca.png", data, encoder)
    return summary


# === Nothing below is about DINO: every script has it, word for word ==============================
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
