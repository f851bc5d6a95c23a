"""MoCo: each query must pick out its key among thousands of negatives kept from earlier batches.

One view of an image is the query, another one its key. If the batch supplies the negatives, as in
SimCLR, their number is bound to its size. If a memory bank of all images does, each of them was
encoded by a different old encoder. MoCo keeps the keys of the last K / N steps in a queue, and an
encoder that changes slowly, a moving average of the query encoder, keeps old keys comparable with
new ones. Gradients pass through the query only, where SimCLR's pass through both views. After
pretraining, downstream tasks use the query encoder's h, the features before its head. All else is
thrown away.

    He, Fan, Wu, Xie, Girshick: Momentum Contrast for Unsupervised Visual Representation Learning,
    CVPR 2020. Chen, Fan, Girshick, He: Improved Baselines with Momentum Contrastive Learning, 2020
    (v2: MLP head, aug+, cosine). Version 3, not shown here, replaces the queue by large batches.
    Algorithm 1 of the paper, for a query q, its key k+ and the queue k_1 ... k_K, without k+:

    L = -log( exp(q . k+ / t) / (exp(q . k+ / t) + sum_i exp(q . k_i / t)) )     t the temperature
    theta_k <- m theta_k + (1 - m) theta_q                                       m the momentum

    python moco.py                                     shapes drawn by code; a laptop CPU will do
    python moco.py --dataset cifar10 --compile         ResNet-18, on a GPU
    python moco.py --dataset cifar10 --encoder small   a small ResNet, on a CPU
    python moco.py --no-mlp --no-aug-plus --no-cos --temperature 0.07 --blur 0     version 1
    python moco.py --init encoder.pt --epochs 0        measures the weights in a file
    torchrun --nproc-per-node 8 moco.py --dataset path/to/images       your own images, on 8 GPUs

Linear probe on test, untrained -> trained encoder, with seed 0 (records in results/): shapes
36.9 -> 89.3 %; CIFAR-10 43.7 -> 83.6 % (kNN 36.2 -> 80.5 %) with ResNet-18, in 200 epochs.
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
    replace some of them, but never a flag that was typed. "notebook" is the authors' for CIFAR-10.
    """

    script: str = "moco.py"  # relatives/ name their own
    dataset: str = flag("shapes", "shapes, cifar10, cifar100, stl10, an .npz file, an image folder")
    data_dir: str = flag("data", "folder for downloads and decoded images", resume=True)
    image_size: int = flag(96, "side of a folder's images; largest side in an .npz file", 8, 512)
    encoder: str = flag("resnet18", "encoders f_q and f_k; paper: resnet50", choices=ENCODERS)
    init: str = flag("", "weights to begin with: an encoder.pt, or torchvision's for --encoder")
    epochs: int = flag(200, "passes over the training images; paper: 200", 0)
    batch_size: int = flag(512, "images per step, over all GPUs; paper: 256", 2)
    optimizer: str = flag("sgd", "sgd has momentum 0.9; paper: sgd", choices=("sgd", "adamw"))
    lr: float = flag(0.03, "peak learning rate for 256 images per step; paper: 0.03", 0)
    weight_decay: float = flag(5e-4, "weight decay; paper: 1e-4", 0)
    warmup: float = flag(0.0, "fraction of the steps with linear warmup; paper: none", 0, 0.9)
    queue_size: int = flag(4096, "keys K in the queue; paper: 65536, notebook: 4096", 1)
    ema_momentum: float = flag(0.99, "m of the key encoder; paper: 0.999, notebook: 0.99", 0, 1)
    temperature: float = flag(0.1, "temperature t; v1: 0.07, v2: 0.2, notebook: 0.1", 0.01)
    mlp: bool = flag(True, "v2: a head of two layers; v1: of one")
    aug_plus: bool = flag(True, "v2: color jitter for 80 % of the views; v1: for all, more hue")
    cos: bool = flag(True, "v2: cosine schedule; v1: lr / 10 after 60 and 80 % of the steps")
    bn_groups: int = flag(8, "parts of a batch with batch norm of their own; paper: 8, its GPUs", 1)
    crop: float = flag(0.2, "smallest crop, as a fraction of an image's area; paper: 0.2", 0.01, 1)
    gray: float = flag(0.1, "fraction of gray views; paper: 0.2", 0, 1)
    blur: float = flag(0.0, "fraction of blurred views; v1: none, v2: 0.5, notebook: none", 0, 1)
    half_size_until: float = flag(0.0, "fraction of steps, at first, with half-size views", 0, 1)
    eval_every: int = flag(10, "epochs between two kNN measurements on held-out training labels", 1)
    seed: int = flag(0, "seed of weights, batches and views", 0, 2**31)
    device: str = flag("auto", "cuda, mps, cpu, or auto: the first that is there", resume=True)
    compile: bool = flag(False, "compile network and views, for long runs on a GPU", resume=True)
    out: str = flag("", "run folder; by default runs/<method>-<dataset>-seed<seed>")
    resume: str = flag("", "run folder to continue, with the flags of its first start", resume=True)
    explicit: tuple = ()  # flags that were typed: recipes leave them alone
    command: str = ""


# Color alone identifies most of the shapes, so most views are gray; crops keep whole outlines.
SHAPES = dict(
    encoder="small", epochs=12, batch_size=64, optimizer="adamw", lr=4e-3, weight_decay=0.05,
    warmup=0.05, queue_size=1024, bn_groups=2, crop=0.8, gray=0.8, eval_every=4,
)  # fmt: skip
# With --encoder small, on other images: what two CPU cores train in a quarter of an hour.
SMALL = dict(
    image_size=32, epochs=40, batch_size=128, optimizer="adamw", lr=4e-3, weight_decay=1e-2,
    warmup=0.05, bn_groups=4, half_size_until=0.9, eval_every=8,
)  # fmt: skip
# Above 64 pixels: version 2.
LARGE_IMAGES = dict(temperature=0.2, gray=0.2, blur=0.5)


# === Views ========================================================================================
def two_views(images, args, generator, progress=1.0):
    """uint8 (N, 3, S, S) -> float (2N, 3, size, size) in [0, 1]: queries' views, then keys'.

    v2 ("aug+") has SimCLR's augmentation; v1's, from InstDisc, makes views gray before it jitters
    their colors. progress, from 0 to 1, is how much of the training is done.
    """
    S = images.shape[3]
    size = S // 2 if progress < args.half_size_until else S  # half the side: a quarter of the cost
    jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4}
    x = images.repeat(2, 1, 1, 1) / 255
    x = common.random_resized_crop(x, size, generator, scale=(args.crop, 1.0), flip=0.5)
    if args.aug_plus:
        x = common.random_color_jitter(x, generator, **jitter, hue=0.1, p=0.8)
        x = common.random_grayscale(x, generator, args.gray)
    else:
        x = common.random_grayscale(x, generator, args.gray)
        x = common.random_color_jitter(x, generator, **jitter, hue=0.4, p=1.0)
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


class SplitBatchNorm(nn.BatchNorm2d):
    """Batch norm of each of several groups of a batch by itself, as on several GPUs.

    If a batch shared its statistics, the positive would give itself away: of all keys, only that
    one carries the statistics of this batch, and those in the queue carry earlier ones. So keys
    are shuffled before they are split, and meet other statistics than their queries (paper, 3.3).
    """

    def __init__(self, num_features, groups):
        super().__init__(num_features, momentum=0.1 / groups)  # torch's 0.1, shared by the groups
        self.groups = groups

    def forward(self, x):
        norm = super().forward
        if not self.training:
            return norm(x)
        return torch.cat([norm(group) for group in x.chunk(self.groups)])


@torch.no_grad()
def gather(x):
    """Images or keys (B, ...) of all processes -> (WORLD B, ...)."""
    if WORLD == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(WORLD)]
    dist.all_gather(parts, x)
    return torch.cat(parts)


class MoCo(nn.Module):
    """Query encoder, key encoder and queue (C, K), the oldest key first.

    The queue begins as random vectors. They are so unlike any key that the loss rises at first,
    until keys have replaced them.
    """

    def __init__(self, args, image_size=32):
        super().__init__()

        def norm_layer(channels):
            return SplitBatchNorm(channels, args.bn_groups // WORLD)

        encoder, D = build_encoder(args.encoder, image_size, norm_layer)
        load_weights(encoder, args)
        head = [nn.Linear(D, D), nn.ReLU()] if args.mlp else []
        self.query_encoder = nn.Sequential(encoder, *head, nn.Linear(D, 128))  # -> (B, C)
        self.key_encoder = copy.deepcopy(self.query_encoder).requires_grad_(False)  # begins equal
        self.register_buffer("queue", F.normalize(torch.randn(128, args.queue_size), dim=0))

    def forward(self, x_q, x_k, generator):
        """Views (B, 3, S, S) each -> queries (B, C), and the keys of all processes (WORLD B, C)."""
        return self.query_encoder(x_q), self.keys(x_k, generator)

    @torch.no_grad()  # the keys in the queue could not pass gradients on: their graphs are gone
    def keys(self, x, generator):
        """f_k of the views (B, 3, S, S) of all processes, shuffled for batch norm: (WORLD B, C)."""
        x = gather(x)
        order = torch.randperm(len(x), generator=generator, device=x.device)
        if WORLD > 1:
            dist.broadcast(order, src=0)
        shuffled = order.chunk(WORLD)[RANK]  # those that this process encodes
        k = gather(self.key_encoder(x[shuffled]))
        return k[order.argsort()]  # the inverse permutation

    @torch.no_grad()
    def enqueue(self, keys):
        """First in, first out: keys (B, C) enter, the B oldest ones leave."""
        self.queue = torch.cat([self.queue, keys.T], dim=1)[:, len(keys) :]


# === Loss =========================================================================================
def info_nce(query, key, queue, temperature):
    """Equation 1 of the paper, in the lines of its algorithm 1.

    query, key (N, C) and queue (C, K), all of unit length -> scalar, in nats; log(K + 1) is chance.
    """
    positive = (query * key).sum(1, keepdim=True)  # (N, 1), l_pos
    negative = query @ queue  # (N, K), l_neg
    logits = torch.cat([positive, negative], dim=1) / temperature  # (N, 1 + K)
    labels = torch.zeros(len(query), dtype=torch.int64, device=query.device)  # class 0: l_pos
    return F.cross_entropy(logits, labels)


@torch.no_grad()
def similarities(query, key, queue):
    """accuracy: the fraction of queries that are closer to their key than to the whole queue;
    positive: cosines of queries with their keys; queue: with the queue by age, the oldest quarter
    first (4,). Means over the batch."""
    positive = (query * key).sum(1)  # (N,)
    negative = query @ queue  # (N, K)
    accuracy = (positive > negative.amax(1)).float().mean()
    by_age = torch.stack([quarter.mean() for quarter in negative.chunk(4, dim=1)])
    return {"accuracy": accuracy, "positive": positive.mean(), "queue": by_age}


# === Training =====================================================================================
@torch.no_grad()
def ema_update(key_encoder, query_encoder, momentum):
    """theta_k <- m theta_k + (1 - m) theta_q, in place: equation 2 of the paper. For parameters:
    the running statistics of batch norm are each network's own."""
    for k, q in zip(key_encoder.parameters(), query_encoder.parameters(), strict=True):
        k.lerp_(q, 1 - momentum)


def training_step(network, images, args, generator, progress, update):
    """Algorithm 1 for uint8 images (N, 3, S, S); update(loss) trains f_q. Returns what to log.

    bound, chance minus loss, estimates the mutual information of query and key from below, in nats.
    """
    model = getattr(network, "module", network)  # without DistributedDataParallel around it
    views = common.normalize(two_views(images, args, generator, progress))
    x_q, x_k = views.chunk(2)  # (N, 3, size, size) each
    with autocast(views.device):
        query, all_keys = network(x_q, x_k, generator)  # (N, C), (WORLD N, C): of all processes
    query = F.normalize(query.float(), dim=1)
    all_keys = F.normalize(all_keys.float(), dim=1)
    key = all_keys.chunk(WORLD)[RANK]  # (N, C), those of this process
    loss = info_nce(query, key, model.queue, args.temperature)
    terms = similarities(query, key, model.queue)
    update(loss)  # theta_q, by gradient descent
    ema_update(model.key_encoder, model.query_encoder, args.ema_momentum)
    model.enqueue(all_keys)  # after the loss, since before it the positives would be negatives, too
    return {"loss": loss, "bound": math.log(args.queue_size + 1) - loss, **terms}


def make_optimizer(model, args, batch_size, steps):
    """SGD with momentum, or AdamW; linear warmup, then half a cosine to 0, or in v1 two steps.
    args.lr is for batches of 256: the gradient of more images is less noisy, and allows larger
    steps. The key encoder has no gradient, and is left alone."""
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
        if args.cos:
            return 0.5 + 0.5 * math.cos(math.pi * progress)
        return 0.1 ** ((progress >= 0.6) + (progress >= 0.8))

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


def evaluate(encoder, data):
    """kNN and linear probe of h -> accuracies on test, none without labels; and, for a figure, row
    numbers (R, 6) of the training images that are nearest in h to each of the test images
    data.examples()."""
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
    return accuracies, neighbors


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
def main(args, Model=MoCo, training_step=training_step):
    """Measures the encoder, pretrains it without labels, measures it again. Returns the content of
    summary.json."""
    start = time.perf_counter()
    device = pick_device(args.device)
    data = load_data(args, device)
    M, _, S, _ = data.train_images.shape
    if S > 64:
        use_recipe(args, LARGE_IMAGES)
    G = args.bn_groups
    use_recipe(args, {"batch_size": min(args.batch_size, M) // G * G})  # at most all images
    # With K = M / 4, an older key of its own image is among the negatives of one query in 32.
    use_recipe(args, {"queue_size": min(args.queue_size, max(1, M // 4))})
    N = args.batch_size
    K = args.queue_size
    if not 2 * G <= N <= M or N % G:
        limits = f"at most {M}, the number of images, and make {G} --bn-groups of 2 or more"
        raise UserError(f"--batch-size {N}: must be {limits}")
    if G % WORLD:
        raise UserError(f"--bn-groups {G}: must be a multiple of {WORLD}, the number of processes")
    if K > M:
        reason = "beyond that, most queries meet an older key of their own image"
        raise UserError(f"--queue-size {K}: must be at most the {M} images; {reason}")

    torch.manual_seed(args.seed)
    layout = torch.preserve_format if device.type == "mps" else torch.channels_last  # as normalize
    model = Model(args, S).to(device, memory_format=layout)
    encoder = model.query_encoder[0]
    if args.compile:
        model.query_encoder.compile(dynamic=False)  # once for each size of views
        model.key_encoder.compile(dynamic=False)

    with run_folder(args) as folder:
        print_header(args, data, device)
        if not (folder / "checkpoint.pt").exists():
            save_views(folder / "views.png", data.train_images, args)
        untrained, before = once(folder / "untrained.pt", evaluate, encoder, data)
        watch = functools.partial(monitor, encoder, data)
        with common.compile_operators(args.compile):
            history = pretrain(model, data, args, training_step, watch)
        save(folder / "encoder.pt", encoder.state_dict())
        print("measuring", flush=True)
        trained, after = evaluate(encoder, data)
        summary = describe(args, data, device, encoder, history, start)
        summary |= {"untrained": untrained, "trained": trained, "history": history}
        save_json(folder / "summary.json", summary)
        print_results(summary)
        save_neighbors(folder / "neighbors.png", data, before, after)
    return summary


# === Nothing below is about MoCo: every script has it, word for word ==============================
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
