"""SimCLR: two views of one image should be closer to each other than to views of any other image.

Every image of a batch is augmented twice. An encoder f maps each view to a representation h, and a
small head g maps h to a projection z. Each z must pick out its partner among the other 2N - 1
projections of the batch. The 2N - 2 views of other images are its negatives, so a larger batch
means more of them. As no labels are used, some of them show the same class: with ten balanced
classes a tenth of them, whatever N is. Training makes z ignore whatever the augmentations change,
color for instance, while h, before the head, keeps more of it. So g is thrown away after
pretraining, and downstream tasks use h.

    Chen, Kornblith, Norouzi, Hinton: A Simple Framework for Contrastive Learning of Visual
    Representations, ICML 2020. Algorithm 1 of the paper, for the views i and j of one image:

    s(i, j) = z_i . z_j / (|z_i| |z_j|)
    l(i, j) = -log( exp(s(i, j) / t) / sum_{k != i} exp(s(i, k) / t) )      k over all 2N views
    L = mean of l(i, j) over the 2N ordered pairs                           t the temperature

    python simclr.py                                     shapes drawn by code; a laptop CPU will do
    python simclr.py --dataset cifar10 --compile         ResNet-18, on a GPU
    python simclr.py --dataset cifar10 --encoder small   a small ResNet, on a CPU
    python simclr.py --labels 0.01 0.1                   fine-tuning with 1 % and 10 % of the labels
    python simclr.py --init encoder.pt --epochs 0        measures the weights in a file
    torchrun --nproc-per-node 8 simclr.py --dataset path/to/images       your own images, on 8 GPUs

Linear probe on test, untrained -> trained encoder, with seed 0 (records in results/): shapes
36.9 -> 90.8 %; CIFAR-10 43.7 -> 89.2 % (kNN 36.2 -> 88.1 %) with ResNet-18, in 200 epochs, 374 s of
pretraining on an H200.
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
import torchvision
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


ENCODERS = "small", "resnet18", "resnet34", "resnet50"


@dataclasses.dataclass
class Args:
    """The values here are the recipe for CIFAR-10 on a GPU. SHAPES, SMALL and LARGE_IMAGES, below,
    replace some of them, but never a flag that was typed."""

    script: str = "simclr.py"  # relatives/ name their own
    dataset: str = flag("shapes", "shapes, cifar10, cifar100, stl10, an .npz file, an image folder")
    data_dir: str = flag("data", "folder for downloads and decoded images", resume=True)
    image_size: int = flag(96, "side of a folder's images; largest side in an .npz file", 8, 512)
    encoder: str = flag("resnet18", "the encoder f; paper: resnet50", choices=ENCODERS)
    init: str = flag("", "weights to begin with: an encoder.pt, or torchvision's for --encoder")
    epochs: int = flag(200, "passes over the images, more for small batches; paper: 100 to 1000", 0)
    batch_size: int = flag(512, "images per step, over all GPUs; paper: 256 to 8192", 2)
    optimizer: str = flag("sgd", "sgd has momentum 0.9; paper: LARS", choices=("sgd", "adamw"))
    lr: float = flag(0.06, "peak learning rate for 256 images per step; paper: 0.3 with LARS", 0)
    weight_decay: float = flag(5e-4, "weight decay; paper: 1e-6", 0)
    warmup: float = flag(0.0, "fraction of the steps with linear warmup; paper: 10 epochs", 0, 0.9)
    temperature: float = flag(0.5, "temperature t; paper: 0.1, CIFAR-10 0.5", 0.01)
    projection: str = flag("mlp", "the head g; paper: mlp", choices=("none", "linear", "mlp"))
    crop: float = flag(0.2, "smallest crop, as a fraction of an image's area; paper: 0.08", 0.01, 1)
    jitter_strength: float = flag(0.5, "strength of color jitter; paper: 1, CIFAR-10 0.5", 0, 2.5)
    gray: float = flag(0.1, "fraction of gray views; paper: 0.2", 0, 1)
    blur: float = flag(0.0, "fraction of blurred views; paper: 0.5, CIFAR-10 none", 0, 1)
    half_size_until: float = flag(0.0, "fraction of steps, at first, with half-size views", 0, 1)
    labels: tuple = flag(
        (), "fine-tune with few labels: 0.1 is a tenth of each class, 10 are ten", resume=True
    )
    eval_every: int = flag(10, "epochs between two kNN measurements on held-out training labels", 1)
    seed: int = flag(0, "seed of weights, batches, views and choice of labels", 0, 2**31)
    device: str = flag("auto", "cuda, mps, cpu, or auto: the first that is there", resume=True)
    compile: bool = flag(False, "compile network and views, for long runs on a GPU", resume=True)
    out: str = flag("", "run folder; by default runs/<method>-<dataset>-seed<seed>")
    resume: str = flag("", "run folder to continue, with the flags of its first start", resume=True)
    explicit: tuple = ()  # flags that were typed: recipes leave them alone
    command: str = ""


# Color alone identifies most of the shapes, so most views are gray; crops keep whole outlines.
SHAPES = dict(
    encoder="small", epochs=12, batch_size=64, optimizer="adamw", lr=6e-3, weight_decay=0.05,
    warmup=0.05, temperature=0.1, crop=0.8, jitter_strength=1.0, gray=0.8, eval_every=4,
)  # fmt: skip
# With --encoder small, on other images: what two CPU cores train in a quarter of an hour.
SMALL = dict(
    image_size=32, epochs=40, batch_size=128, optimizer="adamw", lr=4e-3, weight_decay=1e-2,
    warmup=0.05, temperature=0.1, gray=0.2, half_size_until=0.9, eval_every=8,
)  # fmt: skip
# Above 64 pixels: the paper's views and temperature for ImageNet. For CIFAR-10 it halves the jitter
# and leaves out the blur (appendix B.9).
LARGE_IMAGES = dict(temperature=0.1, crop=0.08, jitter_strength=1.0, gray=0.2, blur=0.5)


# === Views ========================================================================================
def two_views(images, args, generator, progress=1.0):
    """uint8 (N, 3, S, S) -> float (2N, 3, size, size) in [0, 1]: first views, then second ones.

    Crop, flip, color jitter, gray, blur, as in the paper's appendix A. Crop and color belong
    together: without the jitter, two crops of an image can be matched by their color histograms
    alone (paper, section 3.1). progress, from 0 to 1, is how much of the training is done.
    """
    S = images.shape[3]
    size = S // 2 if progress < args.half_size_until else S  # half the side: a quarter of the cost
    s = args.jitter_strength
    x = images.repeat(2, 1, 1, 1) / 255
    x = common.random_resized_crop(x, size, generator, scale=(args.crop, 1.0), flip=0.5)
    x = common.random_color_jitter(
        x, generator, brightness=0.8 * s, contrast=0.8 * s, saturation=0.8 * s, hue=0.2 * s, p=0.8
    )
    x = common.random_grayscale(x, generator, args.gray)
    if args.blur:
        x = common.random_gaussian_blur(x, generator, p=args.blur)
    return x


# === Model ========================================================================================
def build_encoder(name, image_size=32, norm_layer=nn.BatchNorm2d):
    """torchvision's ResNet without its classifier, (B, 3, S, S) -> (B, D); and D.

    ImageNet's stem would shrink 32 x 32 pixels to 8 x 8 before the first block. So up to 64 pixels
    the stem is a 3x3 convolution without pooling (SimCLR paper, appendix B.9). `small`, for CPUs,
    keeps ImageNet's stem, to be fast, and has one block in each of the first two stages, no others.
    """
    architecture = "resnet18" if name == "small" else name
    encoder = torchvision.models.get_model(architecture, norm_layer=norm_layer)
    D = encoder.fc.in_features
    encoder.fc = nn.Identity()
    if name == "small":
        D = 128
        encoder.layer1 = encoder.layer1[:1]
        encoder.layer2 = encoder.layer2[:1]
        encoder.layer3 = nn.Identity()
        encoder.layer4 = nn.Identity()
    elif image_size <= 64:
        encoder.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()
    return encoder, D


class SimCLR(nn.Module):
    """Encoder f and head g: (B, 3, S, S) -> z (B, 128), or h (B, D) without a head.

    The paper's g has no batch norm. The authors' code has one after each layer, the last without
    a learned shift. Only the first is kept here: it helps short runs.
    """

    def __init__(self, args, image_size=32):
        super().__init__()
        encoder, D = build_encoder(args.encoder, image_size)
        load_weights(encoder, args)
        head = []
        if args.projection == "mlp":
            head += [nn.Linear(D, D, bias=False), nn.BatchNorm1d(D), nn.ReLU()]
        if args.projection != "none":
            head += [nn.Linear(D, 128)]
        self.encoder = encoder
        self.projector = nn.Sequential(*head)

    def forward(self, x):
        return self.projector(self.encoder(x))


# === Loss =========================================================================================
def nt_xent(z1, z2, temperature):
    """Normalized temperature-scaled cross-entropy, equation 1 of the paper.

    z1, z2 (N, D): projections of the two views of N images, normalized in here -> scalar, in nats.
    Its gradient pushes z_i away from z_k in proportion to softmax_k / t, so hard negatives weigh
    most, the more so the smaller t is. A triplet loss has to mine them (paper, section 5.1).
    """
    z = F.normalize(torch.cat([z1, z2]), dim=1)  # (2N, D)
    logits = z @ z.T / temperature  # (2N, 2N), s(i, k) / t
    logits.fill_diagonal_(-math.inf)  # k != i: every view is most similar to itself
    partner = torch.arange(len(z), device=z.device).roll(len(z1))  # (2N,), the image's other view
    return F.cross_entropy(logits, partner)


def gather(x):
    """Rows (B, D) of all processes -> (WORLD B, D), with a gradient to those of this process.

    Every process computes the loss of the whole batch, but its gradient for its own rows only.
    The parts have to be added, and DistributedDataParallel averages them: hence WORLD times.
    """
    if WORLD == 1:
        return x
    rows = [torch.empty_like(x) for _ in range(WORLD)]
    dist.all_gather(rows, x.detach())
    rows[RANK] = x.detach() + WORLD * (x - x.detach())  # the value of x, WORLD times its gradient
    return torch.cat(rows)


@torch.no_grad()
def spread(z):
    """How far the directions of z (N, D) differ: 0 if all are the same, 1 if they cancel out."""
    return F.normalize(z, dim=1).std(0, correction=0).norm()


# === Training =====================================================================================
def training_step(network, images, args, generator, progress, update):
    """Algorithm 1 for uint8 images (N, 3, S, S); update(loss) trains f and g. Returns what to log.

    bound, chance minus loss, estimates the mutual information of two views from below, in nats. It
    cannot exceed chance, log(2N - 1), so near it only bounds of the same batch size compare.
    """
    x = common.normalize(two_views(images, args, generator, progress))  # (2N, 3, size, size)
    with autocast(x.device):
        z = network(x)  # both views in one pass, and so with the same statistics of batch norm
    z1, z2 = z.float().chunk(2)  # (N, 128) each
    loss = nt_xent(gather(z1), gather(z2), args.temperature)  # images of all GPUs are negatives
    update(loss)
    chance = math.log(2 * args.batch_size - 1)
    return {"loss": loss, "bound": chance - loss, "spread": spread(z1)}


def make_optimizer(model, args, batch_size, steps):
    """SGD with momentum, or AdamW; linear warmup, then half a cosine to 0. args.lr is for batches
    of 256: the gradient of more images is less noisy, and allows larger steps."""
    options = {"lr": args.lr * batch_size / 256, "weight_decay": args.weight_decay, "fused": True}
    if args.optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, **options)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), **options)
    warmup = args.warmup * steps

    def factor(step):
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = (min(step, steps) - warmup) / (steps - warmup)
        return 0.5 + 0.5 * math.cos(math.pi * progress)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


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


def evaluate(encoder, data, projector=()):
    """kNN and linear probe of h and, given the head, of z -> accuracies on test, none without
    labels; and, for a figure, row numbers (R, 6) of the training images that are nearest in h to
    each of the test images data.examples()."""
    y = data.train_labels
    test_y = data.test_labels
    images = data.train_images[: len(y)] if len(y) else data.train_images  # STL-10 labels the first
    h = features(encoder, images)
    test_h = features(encoder, data.test_images)
    neighbors = nearest(h, test_h[data.examples()])
    if not data.classes:
        return {}, neighbors
    accuracies = {"knn": knn_accuracy(h, y, test_h, test_y)}
    accuracies["linear_probe"] = linear_probe(h, y, test_h, test_y)
    if projector:  # with layers
        projector.eval()
        with torch.no_grad():
            z = projector(h)
            test_z = projector(test_h)
        accuracies["knn_z"] = knn_accuracy(z, y, test_z, test_y)
        accuracies["linear_probe_z"] = linear_probe(z, y, test_z, test_y)
    return accuracies, neighbors


def fine_tune(encoder, D, data, rows, args, least_steps=500):
    """Trains a copy of the encoder and a linear classifier on it with the labels of some rows ->
    accuracy on test, and the two as a network. Views and optimizer are those of pretraining, where
    the paper crops and flips only (appendix B.5). It takes at least 30 passes over the rows, and at
    least least_steps."""
    device = rows.device
    N = min(args.batch_size, len(rows))
    steps = len(rows) // N  # in a pass
    passes = max(30, math.ceil(least_steps / steps))
    torch.manual_seed(args.seed)
    classifier = nn.Linear(D, len(data.classes), device=device)
    model = nn.Sequential(copy.deepcopy(encoder), classifier)
    update, _ = make_update(model, args, N, passes * steps)
    generator = torch.Generator(device).manual_seed(args.seed)
    model.train()
    for _ in range(passes):
        order = rows[torch.randperm(len(rows), generator=generator, device=device)][: steps * N]
        batches = common.batches(data.train_images, order, N, device)
        for batch, index in zip(batches, order.split(N), strict=True):
            x = common.normalize(two_views(batch, args, generator))
            with autocast(device):
                logits = model(x)  # (2N, classes)
            update(F.cross_entropy(logits.float(), data.train_labels[index].repeat(2)))
    predicted = features(model, data.test_images).argmax(1)
    return (predicted == data.test_labels).float().mean().item(), model


def semi_supervised(encoder, data, rows, args):
    """With the labels of some rows -> accuracies on test of a linear probe on the frozen encoder,
    of the encoder fine-tuned, and of the same network trained from scratch."""
    h = features(encoder, data.train_images[rows.to(data.train_images.device)])
    test_h = features(encoder, data.test_images)
    D = h.shape[1]
    row = {"labels": len(rows)}
    row["linear_probe"] = linear_probe(h, data.train_labels[rows], test_h, data.test_labels)
    row["fine_tuned"], _ = fine_tune(encoder, D, data, rows, args)
    torch.manual_seed(args.seed)
    random_encoder, _ = build_encoder(args.encoder, data.train_images.shape[3])
    scratch = copy.deepcopy(encoder)  # on its device and in its memory layout
    scratch.load_state_dict(random_encoder.state_dict())
    row["from_scratch"], _ = fine_tune(scratch, D, data, rows, args)
    return row


# === Figures ======================================================================================
def nearest(h, queries, k=6):
    """Row numbers (Q, k) of those h (M, D) that have the highest cosine with queries (Q, D)."""
    cosines = F.normalize(queries, dim=1) @ F.normalize(h, dim=1).T
    return cosines.topk(min(k, len(h))).indices.cpu()


def save_views(path, images, args):
    """Eight of the images, uint8 (M, 3, S, S), and four pairs of views of each, as in a training
    step. They are evenly spaced, since in a folder images are sorted by class."""
    images = images[torch.linspace(0, len(images) - 1, 8).long()]
    generator = torch.Generator(images.device).manual_seed(args.seed)
    blocks = {"training image": images[:, None] / 255}
    for i in range(1, 5):
        views = two_views(images, args, generator)
        blocks[f"pair {i}"] = views.unflatten(0, (2, -1)).transpose(0, 1)
    save_sheet(path, blocks)


def save_neighbors(path, data, before, after):
    """The test images data.examples(), and the training images nearest to each before and after
    training, row numbers (R, 6). Blue frames are of the same class, orange ones of another."""
    blue = torch.tensor([0.0, 0.45, 0.7])
    orange = torch.tensor([0.9, 0.5, 0.0])
    white = torch.ones(1, 1, 3)

    def framed(images, rows, color):  # (M, 3, S, S), (R, C), (R, C, 3) -> (R, C, 3, S + 4, S + 4)
        images = images[rows.to(images.device)].cpu() / 255
        tiles = F.pad(images, (2, 2, 2, 2), value=-1)
        return torch.where(tiles < 0, color[..., None, None], tiles)

    queries = data.examples().cpu()[:, None]
    blocks = {"test image": framed(data.test_images, queries, white)}
    for title, rows in {"nearest before training": before, "nearest after training": after}.items():
        color = white
        if data.classes:
            same = data.train_labels.cpu()[rows] == data.test_labels.cpu()[queries]
            color = torch.where(same[..., None], blue, orange)
            title += ": blue is the same class, orange another"
        blocks[title] = framed(data.train_images, rows, color)
    save_sheet(path, blocks)


# === The whole run ================================================================================
def fit_batch_size(args, M):
    """At most all M images, unless a number was typed; the same share for every process."""
    use_recipe(args, {"batch_size": min(args.batch_size, M // WORLD * WORLD)})
    N = args.batch_size
    if not 2 <= N <= M:
        raise UserError(f"--batch-size {N}: must be from 2 to {M}, the number of images")
    if N % WORLD:
        raise UserError(f"--batch-size {N}: must be a multiple of {WORLD}, the number of processes")


def main(args, Model=SimCLR, training_step=training_step, learn=None):
    """Measures the encoder, pretrains it without labels, measures it again. Returns the content of
    summary.json. learn stands in for pretrain."""
    start = time.perf_counter()
    device = pick_device(args.device)
    data = load_data(args, device)
    M, _, S, _ = data.train_images.shape
    if S > 64:
        use_recipe(args, LARGE_IMAGES)
    fit_batch_size(args, M)
    subsets = [common.labelled_rows(data.train_labels, amount, args.seed) for amount in args.labels]

    torch.manual_seed(args.seed)
    layout = torch.preserve_format if device.type == "mps" else torch.channels_last  # as normalize
    model = Model(args, S).to(device, memory_format=layout)
    if WORLD > 1 and device.type == "cuda":
        # The two views of an image are on one GPU. Batch statistics of that GPU would set them
        # apart from the images of other GPUs, and so give the partner away (paper, section 2.2).
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    encoder = model.encoder
    if args.compile:
        model.compile(dynamic=False)  # once for each size of views

    with run_folder(args) as folder:
        print_header(args, data, device)
        if not (folder / "checkpoint.pt").exists():
            save_views(folder / "views.png", data.train_images, args)
        untrained, before = once(folder / "untrained.pt", evaluate, encoder, data)
        watch = functools.partial(monitor, encoder, data)
        with common.compile_operators(args.compile):
            history = (learn or pretrain)(model, data, args, training_step, watch)
        save(folder / "encoder.pt", encoder.state_dict())
        print("measuring", flush=True)
        trained, after = evaluate(encoder, data, model.projector)
        few = [semi_supervised(encoder, data, rows, args) for rows in subsets]
        summary = describe(args, data, device, encoder, history, start)
        summary |= {"untrained": untrained, "trained": trained, "semi_supervised": few}
        summary["history"] = history
        save_json(folder / "summary.json", summary)
        for row in few:
            scores = "  ".join(f"{name} {round(value, 3)}" for name, value in row.items())
            print(f"on test images, with few labels:  {scores}")
        print_results(summary)
        save_neighbors(folder / "neighbors.png", data, before, after)
    return summary


# === Nothing below is about SimCLR: every script has it, word for word ============================
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
