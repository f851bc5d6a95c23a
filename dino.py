"""DINO: a student learns to say of one view of a picture what its teacher, its own moving average, says of another.

A picture is cut into two large global views and several small local ones. The student, an encoder with a head that
ends in K logits, sees all of them, the teacher the global ones alone; both turn logits into probabilities, and the
student is trained towards the teacher's on every other view of the picture. Nothing is negative: what keeps both from
giving one answer to every picture is that the teacher's logits are centered, and its probabilities sharpened.

    Caron, Touvron, Misra, Jegou, Mairal, Bojanowski, Joulin: Emerging Properties in Self-Supervised Vision
    Transformers, ICCV 2021. Algorithm 1 of the paper and of the lecture, for student logits s, teacher logits t:

    P_s = softmax(s / t_s)    P_t = softmax((t - C) / t_t)       C the center, t_s and t_t the temperatures
    H(t, s) = -sum_k P_t(k) log P_s(k)                           no gradient to the teacher
    L = mean of H(t, s) over a global view for the teacher and another view, of either kind, for the student

    python dino.py                                       shapes drawn by code, on two CPU cores
    python dino.py --dataset cifar10                     ViT-tiny with patches of 4 x 4 pixels, on a GPU
    python dino.py --dataset cifar10 --encoder small     a small ViT, on two CPU cores
    python dino.py --dataset path/to/pictures            pictures of your own, see README.md
    python dino.py --no-centering --out runs/collapse    one of the two collapses

Linear probe on test of class token and mean of the patch tokens, untrained -> trained, on two CPU cores (2026-11-25,
torch 2.14.1; records in results/):

    shapes                       40.2 -> 67.5 %, 40.8 -> 65.4 %, 39.1 -> 64.2 % with seeds 0, 1, 2; 100 to 110 s
    cifar10 --encoder small      38.5 -> 54.6 % with seed 0; 14 minutes

The paper's drop path is left out.
"""

import argparse
import copy
import dataclasses
import json
import math
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
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.swa_utils import get_ema_multi_avg_fn

import common
from common import UserError

METHOD = "dino"

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
    encoder: str = flag("vit_tiny", "paper: vit_small, vit_base, resnet50",
                        choices=("small", "vit_tiny", "vit_small", "vit_base", "resnet18", "resnet50"))  # fmt: skip
    patch_size: int = flag(4, "pixels a side of a ViT's patch; paper: 16 or 8 of 224", 1, 64)
    out_dim: int = flag(4096, "logits K; paper: 65536", 2)
    hidden_dim: int = flag(2048, "width of the head's two hidden layers; paper: 2048", 1)
    bottleneck_dim: int = flag(256, "size of the unit vector that logits are made from; paper: 256", 1)
    head_bn: bool = flag(False, "batch norm in the head; paper: none, so that a ViT has no batch norm at all")
    student_temperature: float = flag(0.1, "paper: 0.1", 0.001)
    teacher_temperature: float = flag(0.04, "below the student's: sharpening; paper: 0.04 to 0.07", 0.001)
    teacher_temperature_start: float = flag(0.04, "what it rises from; paper: 0.04", 0.001)
    teacher_warmup: float = flag(0.3, "share of the steps in which it rises; paper: 30 epochs of 100 to 800", 0, 1)
    centering: bool = flag(True, "subtract the center from the teacher's logits; without, one of them takes all")
    center_momentum: float = flag(0.9, "of the center; paper: 0.9", 0, 1)
    momentum: float = flag(0.996, "of the teacher, rising to 1; paper: 0.996 for 1024 pictures a step", 0, 1)
    local_views: int = flag(4, "small views, for the student alone; paper: 8 to 10", 0)
    crop: float = flag(0.4, "smallest share of a picture in a global view, largest in a local one; paper: 0.4", 0.01, 1)
    local_crop: float = flag(0.1, "smallest share in a local view; paper: 0.05", 0.01, 1)
    jitter_strength: float = flag(1.0, "of colour jitter, times .4 .4 .2 .1; paper: 1", 0, 2.5)
    gray: float = flag(0.2, "share of the views without colour; paper: 0.2", 0, 1)
    blur: bool = flag(False, "blur all first global views, a tenth of the second, half of the local ones; paper: on")
    solarize: float = flag(0.2, "share of the second global views that are solarized; paper: 0.2", 0, 1)
    epochs: int = flag(200, "passes over the training pictures; paper: 100 to 800", 1)
    batch_size: int = flag(256, "pictures N a step, each in all its views; paper: 1024", 2)
    lr: float = flag(5e-4, "peak learning rate of AdamW; paper: 5e-4 for 256 pictures, times N / 256", 0)
    weight_decay: float = flag(0.04, "of weight matrices, neither of norms nor of biases; paper: 0.04", 0)
    weight_decay_end: float = flag(0.4, "what it rises to, by a cosine; paper: 0.4", 0)
    warmup: float = flag(0.05, "share of the steps in which the learning rate rises; paper: 10 epochs", 0, 0.9)
    freeze_last_layer: int = flag(1, "epochs in which the head's last layer stays as it is; paper: 1", 0)
    clip: float = flag(3.0, "largest norm of the gradient; paper's code: 3, of each parameter's", 0.001)
    labels: list = flag((), "probe with few labels too: shares of each class up to 1, or numbers a class", 0, free=True)
    fine_tune: bool = flag(False, "with these labels, also fine-tune, and train from scratch", free=True)
    eval_every: int = flag(10, "epochs between two kNN measurements on held-out training pictures", 1, free=True)
    seed: int = flag(0, "fixes initial weights, batches, views and the choice of labels", 0, 2**31)
    device: str = flag("auto", "auto: cuda, else mps, else cpu", free=True)
    compile: bool = flag(None, "torch.compile for network and augmentations; without the flag on cuda alone", free=True)
    out: str = flag("auto", "run folder; auto: runs/<method>-<dataset>-seed<seed>", free=True)
    resume: str = flag("", "go on from the last checkpoint of --out, or of the run folder named here", free=True)


# What differs from the defaults above, by data set; the recipes for two CPU cores are chosen by one flag.
IMAGENET = dict(encoder="vit_small", patch_size=8, out_dim=65536, local_views=8, local_crop=0.05, blur=True, epochs=100)
SMALL = dict(patch_size=8, out_dim=256, hidden_dim=256, bottleneck_dim=64, head_bn=True, momentum=0.98, local_views=0,
             gray=0.5, solarize=0.5, epochs=8, batch_size=64, lr=1.5e-3, eval_every=2)  # fmt: skip
RECIPES = {
    "shapes": SMALL | dict(encoder="small", crop=0.8, epochs=12, eval_every=4),
    "cifar10": dict(),
    "cifar10 --encoder small": SMALL,
    "cifar100": dict(),
    "cifar100 --encoder small": SMALL,
    "stl10": IMAGENET,
    "stl10 --encoder small": SMALL | dict(image_size=32, epochs=4, eval_every=1),
    "path": IMAGENET,
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


def view(images, size, scale, blur, solarize, args, generator):
    """A view (N, 3, size, size) of each image (N, 3, S, S) in [0, 1], in the order of the authors' code."""
    s = args.jitter_strength
    x = common.random_resized_crop(images, size, generator, scale=scale)
    x = common.random_color_jitter(x, generator, 0.4 * s, 0.4 * s, 0.2 * s, 0.1 * s)
    x = common.random_grayscale(x, generator, args.gray)
    x = common.random_gaussian_blur(x, generator, p=blur) if args.blur else x
    return common.random_solarize(x, generator, p=solarize) if solarize else x


def two_views(images, args, generator):
    """The global views: uint8 (N, 3, S, S) -> float (2N, 3, S, S) in [0, 1], first ones of all pictures, then second.

    They are not alike: the paper, after BYOL, blurs all first ones and a tenth of the second, and solarizes a
    fifth of the second.
    """
    x, S = images / 255, images.shape[3]
    first = view(x, S, (args.crop, 1.0), 1.0, 0.0, args, generator)
    return torch.cat([first, view(x, S, (args.crop, 1.0), 0.1, args.solarize, args, generator)])


def multi_crop(images, args, generator):
    """All views of uint8 (N, 3, S, S): global ones (2N, 3, S, S) and, if any, local ones (local_views N, 3, s, s).

    Local views have half the side, in whole patches (paper: 96 of 224 pixels).
    """
    views = [two_views(images, args, generator)]
    if args.local_views:
        x = (images / 255).repeat(args.local_views, 1, 1, 1)
        size = max(1, images.shape[3] // 2 // args.patch_size) * args.patch_size
        views.append(view(x, size, (args.local_crop, args.crop), 0.5, 0.0, args, generator))
    return views


def network_input(x):
    """Images in [0, 1] as an encoder takes them: normalised, and in the layout that convolutions like best."""
    return common.normalize(x).contiguous(memory_format=torch.channels_last)


# === Model ==========================================================================================================


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


class ConvStem(nn.Module):
    """Convolutions of stride 2 in the place of PatchEmbed: (B, 3, S, S) -> (B, L, D), row by row.

    One for each factor of two in patch_size, of 32 channels, 64 and so on: they learn in few steps what a linear map
    of patches needs long for (Xiao et al. 2021). Each picture is standardised first: colours that all of it has and
    its contrast would else be the first thing that student and teacher agree about.
    """

    def __init__(self, patch_size, D):
        super().__init__()
        layers, channels = [], 3
        for i in range(patch_size.bit_length() - 1):
            layers += [nn.Conv2d(channels, 32 << i, 3, 2, 1, bias=False), nn.BatchNorm2d(32 << i), nn.ReLU()]
            channels = 32 << i
        self.proj = nn.Sequential(*layers, nn.Conv2d(channels, D, 1))

    def forward(self, x):
        x = x - x.mean((2, 3), keepdim=True)
        x = x / (x.square().mean((1, 2, 3), keepdim=True).sqrt() + 0.1)
        return self.proj(x).flatten(2).transpose(1, 2)


def init_truncated(module):
    """The authors' initialisation of linear layers: a normal distribution of deviation 0.02, and biases of zero."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class VisionTransformer(nn.Module):
    """Images (B, 3, S, S) -> class token, then mean of the patch tokens, both after the last norm: (B, 2 D).

    Sides S may be any multiple of patch_size: positions are interpolated. Parameters have the names of the authors'
    code and of timm.
    """

    def __init__(self, image_size, patch_size, D, depth, heads, stem=PatchEmbed):
        super().__init__()
        self.patch_embed = stem(patch_size, D)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch_size) ** 2, D))
        self.blocks = nn.ModuleList(Block(D, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(D, eps=1e-6)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_truncated)

    def positions(self, L):
        """The embedding of class token and L patches in a square (1, 1 + L, D): interpolated where L is not its own."""
        cls_token, grid = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        if L == grid.shape[1]:
            return self.pos_embed
        grid = grid.unflatten(1, (math.isqrt(grid.shape[1]), -1)).permute(0, 3, 1, 2)  # (1, D, side, side)
        grid = F.interpolate(grid, (math.isqrt(L), math.isqrt(L)), mode="bicubic")
        return torch.cat([cls_token, grid.flatten(2).transpose(1, 2)], dim=1)

    def embed(self, images):
        """What the first block gets: (B, 3, S, S) -> (B, 1 + L, D), the class token first."""
        x = self.patch_embed(images)  # (B, L, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        return x + self.positions(x.shape[1] - 1)

    def tokens(self, images):
        """(B, 3, S, S) -> (B, 1 + L, D), after the last norm."""
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def attention(self, images):
        """From the class token to each patch in the last block, by head: (B, 3, S, S) -> (B, heads, L), the lecture's
        figure. With that to itself it sums to one."""
        x, (*blocks, last) = self.embed(images), self.blocks
        for block in blocks:
            x = block(x)
        q, k, _ = last.attn.qkv(last.norm1(x)).unflatten(2, (3, last.attn.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q[:, :, :1] @ k.mT / math.sqrt(q.shape[3])).softmax(3)  # (B, heads, 1, 1 + L)
        return weights[:, :, 0, 1:]

    def forward(self, images):
        x = self.tokens(images)
        return torch.cat([x[:, 0], x[:, 1:].mean(1)], dim=1)


ENCODERS = {  # width D, blocks, heads, and what makes tokens of pixels
    "small": (96, 3, 3, ConvStem),
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
}


def build_backbone(args, image_size):
    """The encoder of these arguments, (B, 3, S, S) -> (B, D) or, a ViT, (B, 2 D); and D, what of it the head reads.

    A ResNet is torchvision's without its classifier; for pictures of up to 64 pixels it has a 3x3 convolution for a
    stem and no max pool. Raises UserError where a ViT's patches do not fit.
    """
    if args.encoder.startswith("resnet"):
        encoder = getattr(torchvision.models, args.encoder)()
        D, encoder.fc = encoder.fc.in_features, nn.Identity()
        if image_size <= 64:
            encoder.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
            nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
            encoder.maxpool = nn.Identity()
        return encoder, D
    if image_size % args.patch_size:
        raise UserError(f"--patch-size {args.patch_size}: does not divide pictures of {image_size} x {image_size}")
    if args.encoder == "small" and args.patch_size & (args.patch_size - 1):
        raise UserError(f"--patch-size {args.patch_size}: must be a power of two with --encoder small")
    return VisionTransformer(image_size, args.patch_size, *ENCODERS[args.encoder]), ENCODERS[args.encoder][0]


class Head(nn.Module):
    """Three layers, a unit vector, and its cosine with each of K directions: (B, D) -> logits (B, out_dim).

    The last layer's weights have norm one for every logit, so that no logit is large for every picture.
    """

    def __init__(self, D, args):
        super().__init__()
        sizes, layers = (D, args.hidden_dim, args.hidden_dim), []
        for size, hidden in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(size, hidden), *[nn.BatchNorm1d(hidden)] * args.head_bn, nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(args.hidden_dim, args.bottleneck_dim))
        self.apply(init_truncated)
        self.last_layer = weight_norm(nn.Linear(args.bottleneck_dim, args.out_dim, bias=False))
        norms = self.last_layer.parametrizations.weight.original0  # (K, 1)
        nn.init.ones_(norms).requires_grad_(False)

    def forward(self, h):
        return self.last_layer(F.normalize(self.mlp(h), dim=1))


class Network(nn.Module):
    """Encoder and head of student or teacher: views of one size or of several, each (B, 3, S, S) -> (sum of B, K)."""

    def __init__(self, args, image_size=32):
        super().__init__()
        self.encoder, self.D = build_backbone(args, image_size)
        self.head = Head(self.D, args)

    def forward(self, *views):
        return self.head(torch.cat([self.encoder(x)[:, : self.D] for x in views]))


class DINO(nn.Module):
    """Student, teacher and center."""

    def __init__(self, args, image_size=32):
        super().__init__()
        self.student = Network(args, image_size)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)  # gt.params = gs.params
        self.register_buffer("center", torch.zeros(args.out_dim))


# === Loss ===========================================================================================================


def dino_loss(student, teacher, center, student_temperature, teacher_temperature):
    """H(t, s) of the lecture's algorithm, mean over the pairs of a global and another view (equation 3 of the paper).

    student (V, N, K): logits of V views of N pictures, the global ones first; teacher (2, N, K): of the global ones;
    center (K,) -> scalar, in nats. No gradient goes to the teacher.
    """
    t = ((teacher.detach() - center) / teacher_temperature).softmax(2)  # center + sharpen
    s = (student / student_temperature).log_softmax(2)
    cross_entropy = -(t.flatten(1) @ s.flatten(1).T) / student.shape[1]  # (2, V)
    return (cross_entropy.sum() - cross_entropy.trace()) / (cross_entropy.numel() - 2)


def update_center(center, teacher, momentum):
    """C <- m C + (1 - m) mean of the teacher's logits (2, N, K): (K,), equation 4 of the paper."""
    return torch.lerp(teacher.mean((0, 1)), center, momentum)


def target_entropies(teacher, center, teacher_temperature):
    """The entropy of a target, and that of the mean of all targets of a batch: (2,), in nats, at most log K.

    Their difference is what a target tells of its picture. It vanishes in both collapses: without centering both go to
    0, one logit taking all, without sharpening both go to log K.
    """
    t = ((teacher - center) / teacher_temperature).softmax(2)
    mean = t.mean((0, 1))
    return torch.stack([torch.special.entr(t).sum(2).mean(), torch.special.entr(mean).sum()])


# === Pretrain =======================================================================================================


def autocast(device):
    """bfloat16 for the network on a GPU; losses and the state of the optimizer stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def warmup_cosine(step, steps, warmup):
    """The factor on the learning rate: a linear rise over the share `warmup` of the steps, then half a cosine to 0."""
    rise = warmup * steps
    return (step + 1) / (rise + 1) if step < rise else 0.5 + 0.5 * math.cos(math.pi * (step - rise) / (steps - rise))


def adamw(model, args, steps):
    """AdamW that decays matrices and kernels alone, norms and biases having one dimension; and its learning rate."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, args.lr, weight_decay=args.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, steps, args.warmup))
    return optimizer, schedule


def cosine(start, end, share):
    """From start to end by half a cosine, at a share of the way from 0 to 1."""
    return end + (start - end) * (0.5 + 0.5 * math.cos(math.pi * share))


@torch.no_grad()
def update_teacher(teacher, student, momentum):
    """theta_t <- m theta_t + (1 - m) theta_s, in place: parameters alone.

    The teacher's batch norm, if any, keeps the running statistics of its own batches, as in the authors' code.
    """
    get_ema_multi_avg_fn(momentum)(list(teacher.parameters()), list(student.parameters()), None)


def pretrain(model, images, args, run, monitor):
    """The lecture's algorithm 1, with local views, on images, uint8 (M, 3, S, S). No labels; monitor() -> metrics."""
    device, N = model.center.device, args.batch_size
    steps = len(images) // N  # an epoch leaves out an incomplete last batch
    optimizer, schedule = adamw(model.student, args, args.epochs * steps)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    generator = torch.Generator(device)
    for epoch in range(run.restore(parts) + 1, args.epochs + 1):
        start = time.perf_counter()
        model.train()
        generator.manual_seed(args.seed * 100_000 + epoch)  # an epoch's draws depend on nothing before it
        order = torch.randperm(len(images), generator=generator, device=device)
        losses, entropies = torch.zeros(steps, device=device), torch.zeros(steps, 2, device=device)
        for step, batch in enumerate(common.batches(images, order, N, device)):  # (N, 3, S, S)
            share = (epoch - 1 + step / steps) / args.epochs  # of the training that is done
            warm = min(1.0, share / args.teacher_warmup) if args.teacher_warmup else 1.0
            temperature = (1 - warm) * args.teacher_temperature_start + warm * args.teacher_temperature
            views = [network_input(x) for x in multi_crop(batch, args, generator)]
            with autocast(device):
                s = model.student(*views)  # (V N, K)
                with torch.no_grad():
                    t = model.teacher(views[0])  # (2N, K), global views only
            s, t = s.float().unflatten(0, (-1, N)), t.float().unflatten(0, (2, N))  # (V, N, K), (2, N, K)
            loss = dino_loss(s, t, model.center, args.student_temperature, temperature)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.student.parameters(), args.clip)
            if epoch <= args.freeze_last_layer:
                model.student.head.last_layer.parametrizations.weight.original1.grad = None
            optimizer.param_groups[0]["weight_decay"] = cosine(args.weight_decay, args.weight_decay_end, share)
            optimizer.step()
            schedule.step()
            update_teacher(model.teacher, model.student, cosine(args.momentum, 1.0, share))
            losses[step], entropies[step] = loss.detach(), target_entropies(t, model.center, temperature)
            if args.centering:
                model.center.copy_(update_center(model.center, t, args.center_momentum))
            run.foresee(step, losses)
        loss = run.mean_loss(losses, epoch)  # the one wait for the device in an epoch
        seconds = time.perf_counter() - start
        entropy, entropy_of_mean = entropies.mean(0).tolist()
        metrics = {
            "loss": loss,  # cross-entropy is entropy and KL divergence
            "entropy": entropy,
            "kl": loss - entropy,
            "entropy_of_mean": entropy_of_mean,
            "images_per_second": steps * N / seconds,
        }
        if epoch % args.eval_every == 0 or epoch == args.epochs:
            metrics |= monitor()
        run.log(epoch, metrics | {"seconds": seconds})
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


def evaluate(network, data):
    """Frozen probes of the class token with the mean of the patch tokens, and of the class token alone, which is what
    the paper's kNN reads -> accuracies on test; the former's features of train and test. A ResNet has one kind."""
    if not data.classes:
        return {}, None
    y, test_y = data.train_labels, data.test_labels
    h, test_h = features(network.encoder, data.train_images[: len(y)]), features(network.encoder, data.test_images)
    accuracies = probes(h, y, test_h, test_y)
    if h.shape[1] > network.D:
        of_class_token = probes(h[:, : network.D], y, test_h[:, : network.D], test_y)
        accuracies |= {f"{name}_class_token": value for name, value in of_class_token.items()}
    return accuracies, (h, test_h)


def fine_tune(encoder, D, data, rows, args):
    """Trains a copy of the encoder, and a linear classifier on it, with the labels of some rows -> accuracy on test.

    Views and optimizer are those of pretraining (paper, appendix B.5: crops and flips alone, SGD); 30 passes, or 500
    steps where these are more. From an untrained encoder this is supervised learning from scratch.
    """
    device, N = data.train_labels.device, min(args.batch_size, len(rows))
    passes = max(30, math.ceil(500 / (len(rows) // N)))
    torch.manual_seed(args.seed)
    model = nn.Sequential(copy.deepcopy(encoder), nn.Linear(D, len(data.classes), device=device)).train()
    optimizer, schedule = adamw(model, args, passes * (len(rows) // N))
    generator = torch.Generator(device).manual_seed(args.seed)
    for _ in range(passes):
        order = rows[torch.randperm(len(rows), generator=generator, device=device)]
        for index, batch in zip(order.split(N), common.batches(data.train_images, order, N, device), strict=False):
            x = network_input(two_views(batch, args, generator))  # (2N, 3, S, S)
            with autocast(device):
                logits = model(x)  # (2N, classes)
            loss = F.cross_entropy(logits.float(), data.train_labels[index].repeat(2))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return (features(model, data.test_images).argmax(1) == data.test_labels).sum().item() / len(data.test_labels)


def semi_supervised(scratch, encoder, data, h, rows, args):
    """A line of the lecture's semi-supervised table: the frozen encoder with the labels of some rows and, for
    --fine-tune, all of it trained with them, against the same network from scratch. h: features of train and test."""
    accuracies = {"labels": len(rows)} | probes(h[0][rows], data.train_labels[rows], h[1], data.test_labels)
    if args.fine_tune:
        print(f"fine-tuning on {len(rows)} labels, and training from scratch", flush=True)
        accuracies["fine_tuned"] = fine_tune(encoder, h[0].shape[1], data, rows, args)
        accuracies["from_scratch"] = fine_tune(scratch, h[0].shape[1], data, rows, args)
    return accuracies


# === Pictures =======================================================================================================


def enlarged(images, times):
    """uint8 (R, 3, S, S) -> what an encoder takes, of times as many patches a side: a finer look than in training."""
    return network_input(F.interpolate(images / 255, scale_factor=times, mode="bicubic").clamp(0, 1))


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


def save_views(path, images, args):
    """views.png: some pictures, uint8 (M, 3, S, S), and pairs of views of each as a training step sees them."""
    images = images[:8]
    generator = torch.Generator(images.device).manual_seed(args.seed)
    blocks = [("picture", images[:, None] / 255)]
    for pair in range(1, 5):
        views = two_views(images, args, generator).chunk(2)
        blocks.append((f"pair {pair}", torch.stack(views, dim=1)))  # (8, 2, 3, S, S)
    save_sheet(path, blocks)


def save_neighbours(path, data, before, after, count=6):
    """neighbours.png: a test picture of each of ten classes, and the training pictures nearest to it in h.

    before, after: h of the train and the test pictures. Green frames are of the same class, red ones are not.
    """
    queries = torch.stack([(data.test_labels == k).nonzero()[0, 0] for k in data.test_labels.unique()[:10]])
    frames = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.7, 0.2], [1.0, 1.0, 1.0]])  # red, green, white

    def framed(images, rows, frame):  # rows and numbers of frames (R, C) -> (R, C, 3, S + 4, S + 4)
        x = F.pad(images[rows.flatten().to(images.device)].cpu() / 255, (2, 2, 2, 2), value=-1)
        return torch.where(x < 0, frames[frame.flatten().cpu()][:, :, None, None], x).unflatten(0, rows.shape)

    blocks = [("test picture", framed(data.test_images, queries[:, None], torch.full_like(queries, 2)))]
    for title, (train, test) in (("nearest before training", before), ("nearest after training", after)):
        s = F.normalize(test[queries], dim=1) @ F.normalize(train, dim=1).T  # (10, M)
        nearest = s.topk(min(count, len(train))).indices  # (10, count)
        same = data.train_labels[nearest] == data.test_labels[queries, None]
        blocks.append((title, framed(data.train_images, nearest, same.long())))
    save_sheet(path, blocks)


@torch.no_grad()
def save_attention(path, images, before, after):
    """attention.png: pictures, uint8 (R, 3, S, S), and where the class token of each encoder looks in its last block.

    Each map from black to white, where it is least and largest: the lecture's figure 1 of DINO.
    """
    S, blocks = images.shape[3], [("picture", images[:, None] / 255)]
    for title, encoder in (("before training", before), ("after training", after)):
        maps = encoder.eval().attention(enlarged(images, 4))  # (R, heads, L)
        side = math.isqrt(maps.shape[2])
        low, high = maps.amin(2, keepdim=True), maps.amax(2, keepdim=True)
        maps = F.interpolate(((maps - low) / (high - low)).unflatten(2, (side, side)), (S, S))  # (R, heads, S, S)
        blocks.append((title, maps[:, :, None].expand(-1, -1, 3, -1, -1)))
    save_sheet(path, blocks)


def principal_components(x, count):
    """x (M, D) -> its first principal components (M, count), the largest first."""
    x = x - x.mean(0)
    return x @ torch.linalg.svd(x, full_matrices=False).Vh[:count].T


def pca_colors(tokens):
    """Patch tokens (R, L, D) of some pictures -> colours (R, L, 3) in [0, 1], black where the background is.

    The first component of all patches tells the thing from its background: its side with fewer of the patches along
    the pictures' edges is the thing. The first three components of the things' patches are red, green and blue, the
    same ones in all pictures (Oquab et al. 2023, DINOv2, figure 1).
    """
    R, L, _ = tokens.shape
    side = math.isqrt(L)
    edge = torch.ones(side, side, dtype=torch.bool, device=tokens.device)
    edge[1:-1, 1:-1] = False
    thing = principal_components(tokens.flatten(0, 1), 1).view(R, L) > 0
    thing ^= thing[:, edge.flatten()].float().mean() > 0.5
    x = principal_components(tokens[thing], 3)  # (M, 3)
    low, high = x.quantile(0.02, dim=0), x.quantile(0.98, dim=0)
    colors = torch.zeros(R, L, 3, device=tokens.device)
    colors[thing] = ((x - low) / (high - low)).clamp(0, 1)
    return colors


@torch.no_grad()
def save_pca(path, images, before, after):
    """pca.png: pictures, uint8 (R, 3, S, S), and the principal components of their patches before and after."""
    S, blocks = images.shape[3], [("picture", images[:, None] / 255)]
    for title, encoder in (("before", before), ("after", after)):
        colors = pca_colors(encoder.eval().tokens(enlarged(images, 2))[:, 1:])  # (R, L, 3)
        side = math.isqrt(colors.shape[1])
        blocks.append((title, F.interpolate(colors.mT.unflatten(2, (side, side)), (S, S))[:, None]))
    save_sheet(path, blocks)


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
    """Loads, measures the untrained encoder, pretrains, measures the teacher's -> the content of summary.json."""
    start = time.perf_counter()
    device = pick_device(args.device)
    data = common.load_dataset(args.dataset, args.data_dir, args.image_size).to(device)
    M, _, S, _ = data.train_images.shape
    if args.batch_size > M:
        raise UserError(f"--batch-size {args.batch_size}: {args.dataset} has only {M} training pictures")
    if args.local_views and args.local_crop > args.crop:
        raise UserError(f"--local-crop {args.local_crop}: must not be above --crop {args.crop}")
    amounts = args.labels or [1.0] * args.fine_tune
    if amounts and not data.classes:
        raise UserError(f"--labels and --fine-tune: {args.dataset} has no classes, no folders train/<class>")
    subsets = [common.labelled_rows(data.train_labels, amount, args.seed) for amount in amounts]
    torch.manual_seed(args.seed)
    model = DINO(args, S).to(device, memory_format=torch.channels_last)
    run = Run(args)
    print(f"{METHOD} on {args.dataset}: {M} pictures, {S} x {S}, {len(data.train_labels)} of them with labels; "
          f"{device}; results go to {run.folder}", flush=True)  # fmt: skip
    if not data.classes:
        print("there are no train/<class> folders, so the probes are skipped")
    if device.type == "cpu" and args.encoder != "small":
        print(f"{args.encoder} is made for a GPU; the recipe for a CPU is --encoder small")
    save_views(run.folder / "views.png", data.train_images[:8].to(device), args)

    scratch = copy.deepcopy(model.teacher)
    if args.compile or (args.compile is None and device.type == "cuda"):
        model.student.compile()
        model.teacher.compile()
        common.compile_operators()
    untrained, before = evaluate(scratch, data)

    def monitor():
        """kNN of a tenth of the training pictures among the rest: what recipes are chosen by."""
        if not data.classes:
            return {}
        labels, held = data.train_labels, torch.arange(len(data.train_labels), device=device) % 10 == 0
        h = features(model.teacher.encoder, data.train_images[: len(labels)])
        return {"knn": knn_accuracy(h[~held], labels[~held], h[held], labels[held])}

    pretrain(model, data.train_images, args, run, monitor)
    encoder = model.teacher.encoder  # the teacher is the better of the two
    trained, after = evaluate(model.teacher, data)
    few = [semi_supervised(scratch.encoder, encoder, data, after, rows, args) for rows in subsets]
    if isinstance(encoder, VisionTransformer):
        shown = data.train_images[:10].to(device)
        if data.classes:  # a test picture of each class
            first = [(data.test_labels == label).nonzero()[0, 0].item() for label in data.test_labels.unique()[:10]]
            shown = data.test_images[first].to(device)
        save_attention(run.folder / "attention.png", shown, scratch.encoder, encoder)
        save_pca(run.folder / "pca.png", shown, scratch.encoder, encoder)
    if data.classes:
        save_neighbours(run.folder / "neighbours.png", data, before, after)
        print_table([{"on test": name, "untrained": untrained[name], "trained": trained[name]} for name in trained])
    if few:
        print_table(few)
    return run.finish(start, device, encoder, {"untrained": untrained, "trained": trained, "semi_supervised": few})


if __name__ == "__main__":
    try:
        main(parse_args())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command with --resume goes on from the last whole epoch", file=sys.stderr)
        sys.exit(130)
