"""MoCo: each query must pick out its key among thousands of negatives kept in a queue from earlier batches.

One view of an image is the query, another one its key. Were the negatives of the same batch, their number would be tied
to its size; were they kept in a memory bank of all images, they would come from as many old encoders. MoCo keeps the
keys of the last K / N steps in a queue, and has them made by an encoder that changes slowly, as a moving average of the
query encoder, so that old keys are still comparable with new ones. After pretraining key encoder, queue and head are
thrown away: downstream tasks use the query encoder's representation h.

    He, Fan, Wu, Xie, Girshick: Momentum Contrast for Unsupervised Visual Representation Learning, CVPR 2020.
    Chen, Fan, Girshick, He: Improved Baselines with Momentum Contrastive Learning, 2020 (v2: MLP head, aug+, cosine).
    Algorithm 1 of the paper and of the lecture, for a query q, its key k+ and the queue k_1 ... k_K, where k+ is not:

    L = -log( exp(q . k+ / t) / (exp(q . k+ / t) + sum_i exp(q . k_i / t)) )       t the temperature
    theta_k <- m theta_k + (1 - m) theta_q                                        m the momentum

    python moco.py                                       shapes drawn by code; a laptop CPU will do
    python moco.py --dataset cifar10 --compile           ResNet-18, on a GPU
    python moco.py --dataset cifar10 --encoder small     a small ResNet, on a CPU
    python moco.py --dataset path/to/images              your own images, see README.md
    python moco.py --no-mlp --no-aug-plus --no-cos       version 1; each is a column of the lecture's table 1
    torchrun --nproc-per-node 8 moco.py --dataset path/to/images
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
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import ImageDraw
from torch import nn

import common
from common import UserError

METHOD = "moco"


def flag(default, help, low=None, high=math.inf, choices=None):
    """A field of Args: its default, its help, and the values it may take, from low to high."""
    return dataclasses.field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


@dataclass
class Args:  # the defaults are the recipe for CIFAR-10 on a GPU; further down is what differs elsewhere
    dataset: str = flag("shapes", "shapes, cifar10, cifar100, stl10, or a path: an .npz file or a folder of images")
    data_dir: str = flag("data", "folder for downloads and decoded images")
    image_size: int = flag(96, "side in pixels to which the images of a folder, and larger ones, are resized", 8, 512)
    encoder: str = flag("resnet18", "paper: resnet50", choices=("small", "resnet18", "resnet34", "resnet50"))
    epochs: int = flag(200, "passes over the training images; paper: 200", 1)
    batch_size: int = flag(512, "images N per step, over all GPUs; paper: 256", 2)
    optimizer: str = flag("sgd", "sgd with momentum, or adamw; paper: sgd", choices=("sgd", "adamw"))
    lr: float = flag(0.03, "learning rate for a batch of 256; grows in proportion to --batch-size; paper: 0.03", 0)
    weight_decay: float = flag(5e-4, "paper: 1e-4", 0)
    warmup: float = flag(0.0, "fraction of the steps with linear warmup; paper: none", 0, 0.9)
    queue_size: int = flag(4096, "keys K in the queue; paper: 65536, authors' CIFAR-10 notebook 4096", 1)
    momentum: float = flag(
        0.99, "m: 0 makes keys inconsistent, 1 leaves them random; paper: 0.999, notebook 0.99", 0, 1
    )
    temperature: float = flag(0.1, "t; v1: 0.07, v2: 0.2, notebook 0.1", 0.01)
    mlp: bool = flag(True, "v2: a head of two layers; v1: a linear one")
    aug_plus: bool = flag(True, "v2: color jitter of 80 %% of the views, and blur; v1: of all, with four times the hue")
    cos: bool = flag(True, "v2: cosine schedule; v1: a tenth of the learning rate at 60 %% and again at 80 %%")
    bn_groups: int = flag(8, "parts of a batch with batch statistics of their own; paper: 8 GPUs", 1)
    projection_dim: int = flag(128, "size C of queries and keys; paper: 128", 1)
    crop: float = flag(0.2, "smallest crop, as a fraction of the image's area; paper: 0.2", 0.01, 1)
    jitter_strength: float = flag(0.5, "strength of the color jitter; paper: 0.5", 0, 2.5)
    gray: float = flag(0.2, "fraction of gray views; paper: 0.2", 0, 1)
    blur: float = flag(0.0, "fraction of blurred views in v2; paper: 0.5, notebook none", 0, 1)
    eval_every: int = flag(10, "epochs between two kNN measurements on held-out training labels", 1)
    seed: int = flag(0, "of weights, batches and views", 0, 2**31)
    device: str = flag("auto", "auto: cuda, else mps, else cpu")
    compile: bool = flag(False, "torch.compile network and augmentations: for long runs on a GPU")
    out: str = flag("auto", f"run folder; auto: runs/{METHOD}-<dataset>-seed<seed>")
    resume: str = flag("", "run folder to continue, with the flags that it was started with")
    typed: list = ()  # the words of the command line


# === Views ============================================================================================================


def two_views(images, args, generator):
    """uint8 (N, 3, S, S) -> float (2N, 3, S, S) in [0, 1]: the queries' views in rows 0 to N - 1, the keys' after them.

    v2 ("aug+") is SimCLR's augmentation; v1, as InstDisc's, takes the color first and jitters that of every view.
    """
    x, s = images.repeat(2, 1, 1, 1) / 255, args.jitter_strength
    x = common.random_resized_crop(x, x.shape[3], generator, scale=(args.crop, 1.0), flip=0.5)
    if not args.aug_plus:
        x = common.random_grayscale(x, generator, args.gray)
        return common.random_color_jitter(x, generator, 0.8 * s, 0.8 * s, 0.8 * s, hue=0.8 * s, p=1.0)
    x = common.random_color_jitter(x, generator, brightness=0.8 * s, contrast=0.8 * s, saturation=0.8 * s, hue=0.2 * s)
    x = common.random_grayscale(x, generator, args.gray)
    return common.random_gaussian_blur(x, generator, p=args.blur) if args.blur else x


# === Model ============================================================================================================


def build_encoder(name, image_size=32, norm_layer=nn.BatchNorm2d):
    """torchvision's ResNet without its classifier, (B, 3, S, S) -> (B, D), and D.

    Up to 64 pixels the stem is a 3x3 convolution without max pooling (SimCLR paper, appendix B.9): ImageNet's stem
    would leave 8 x 8 of 32 x 32 pixels. `small`, for CPUs, is fast by that stem and by one block in two stages alone.
    """
    if name == "small":
        encoder = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], norm_layer=norm_layer)
        encoder.layer3 = encoder.layer4 = encoder.fc = nn.Identity()
        return encoder, 128
    encoder = torchvision.models.get_model(name, norm_layer=norm_layer)
    D, encoder.fc = encoder.fc.in_features, nn.Identity()
    if image_size <= 64:
        encoder.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()
    return encoder, D


class SplitBatchNorm(nn.BatchNorm2d):
    """Batch norm that treats each of several groups of a batch by itself, as several GPUs would.

    Statistics shared by a batch would give the positive away: of all the keys, it alone was normalized together with
    the keys of this batch's other queries. So keys are shuffled before they are split into groups, and query and key
    are normalized with different sub-batches (paper, section 3.3, "shuffling BN").
    """

    def __init__(self, features, groups):
        super().__init__(features)
        self.groups = groups

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        y = x.unflatten(0, (self.groups, -1)).transpose(1, 2)  # (G, C, N / G, H, W): one instance for instance norm
        y = F.instance_norm(
            y, self.running_mean, self.running_var, self.weight, self.bias, True, self.momentum, self.eps
        )
        return torch.empty_like(x).copy_(y.transpose(1, 2).flatten(0, 1))  # in the layout of x


class Branch(nn.Module):
    """Encoder and head of queries, or of keys: (B, 3, S, S) -> unit vectors (B, C)."""

    def __init__(self, args, image_size=32):
        super().__init__()
        norm_layer = functools.partial(SplitBatchNorm, groups=args.bn_groups // world_size())
        self.encoder, D = build_encoder(args.encoder, image_size, norm_layer)
        hidden = [nn.Linear(D, D), nn.ReLU()] if args.mlp else []
        self.projector = nn.Sequential(*hidden, nn.Linear(D, args.projection_dim))

    def forward(self, x):
        return F.normalize(self.projector(self.encoder(x)).float(), dim=1)


class MoCo(nn.Module):
    """Query encoder, key encoder and queue (C, K), from the oldest key to the newest."""

    def __init__(self, args, image_size=32):
        super().__init__()
        self.query_encoder = Branch(args, image_size)
        self.key_encoder = copy.deepcopy(self.query_encoder).requires_grad_(False)  # f_k.params = f_q.params
        self.register_buffer("queue", torch.zeros(args.projection_dim, args.queue_size))

    @torch.no_grad()  # into a key that is steps old no gradient could flow: its graph is gone
    def keys(self, x, generator):
        """f_k of views (B, 3, S, S) in another order, so that batch norm groups them differently than the queries; of
        all processes, whose images are exchanged -> (world B, C)."""
        x = gather(x)
        order = torch.randperm(len(x), generator=generator, device=x.device)
        if world_size() > 1:
            dist.broadcast(order, src=0)
        key = gather(self.key_encoder(x[order.chunk(world_size())[rank()]]))
        return key[order.argsort()]

    @torch.no_grad()
    def enqueue(self, keys):
        """First in, first out: keys (B, C) enter, the B oldest ones leave."""
        self.queue = torch.cat([self.queue, keys.T], dim=1)[:, len(keys) :]


# === Loss =============================================================================================================


def info_nce(query, key, queue, temperature):
    """Equation 1 of the paper, in the lines of the lecture's algorithm 1.

    query, key (N, C) and queue (C, K), all of unit length -> scalar, in nats; log(K + 1) is chance.
    """
    positive = (query * key).sum(1, keepdim=True)  # (N, 1), l_pos
    negative = query @ queue  # (N, K), l_neg
    logits = torch.cat([positive, negative], dim=1) / temperature  # (N, 1 + K)
    labels = torch.zeros(len(query), dtype=torch.int64, device=query.device)  # the positive is class 0
    return F.cross_entropy(logits, labels)


# === Pretrain =========================================================================================================


@torch.no_grad()
def ema_update(key_encoder, query_encoder, momentum):
    """theta_k <- m theta_k + (1 - m) theta_q, equation 2 of the paper, in place. Parameters alone: the key encoder's
    batch norm keeps statistics of its own batches, as in the authors' code."""
    for k, q in zip(key_encoder.parameters(), query_encoder.parameters(), strict=True):
        k.lerp_(q, 1 - momentum)


def fill_queue(model, images, args):
    """Fills the queue with keys before the first step. The authors start from random vectors: while the queue holds
    these, the positive is the only real embedding, and a short run would spend much of its time on telling that."""
    device, N = model.queue.device, args.batch_size // world_size()
    order, generator = draws(args, 0, images, device)
    for batch in common.batches(images, order[: math.ceil(args.queue_size / args.batch_size) * N], N, device):
        _, x = common.normalize(two_views(batch, args, generator)).chunk(2)
        with autocast(device):
            model.enqueue(model.keys(x, generator))


def warmup_steps(steps, warmup):
    """Version 1's factor on the learning rate by step: a linear rise, then 1, 0.1 after 60 % and 0.01 after 80 %."""
    rise = warmup * steps
    return lambda step: min(1, (step + 1) / (rise + 1)) * 0.1 ** ((step >= 0.6 * steps) + (step >= 0.8 * steps))


def pretrain(model, images, args, monitor):
    """Algorithm 1 on images, uint8 (M, 3, S, S), without labels; monitor() -> metrics. Returns those of all epochs."""
    device, N, steps = model.queue.device, args.batch_size // world_size(), len(images) // args.batch_size
    optimizer, T = make_optimizer(model.query_encoder, args, args.batch_size), args.epochs * steps
    factor = warmup_cosine(T, args.warmup) if args.cos else warmup_steps(T, args.warmup)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    scaler = torch.amp.GradScaler(device.type, enabled=precision(device) == torch.float16)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    history = load_checkpoint(args, parts, images)
    query_encoder = distributed(model.query_encoder)
    if not history:
        fill_queue(model.train(), images, args)
    for epoch in range(len(history) + 1, args.epochs + 1):
        start, losses = time.perf_counter(), torch.zeros(steps, device=device)
        order, generator = draws(args, epoch, images, device)
        model.train()
        for step, batch in enumerate(common.batches(images, order, N, device)):  # (N, 3, S, S)
            x_q, x_k = common.normalize(two_views(batch, args, generator)).chunk(2)
            with autocast(device):
                query = query_encoder(x_q)  # (N, C)
                keys = model.keys(x_k, generator)  # (world N, C), no gradient
            key = keys.chunk(world_size())[rank()]  # (N, C)
            loss = info_nce(query, key, model.queue, args.temperature)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            ema_update(model.key_encoder, model.query_encoder, args.momentum)
            losses[step] = loss.detach()  # reading it here would make the host wait for the GPU
            if step + 1 == steps:  # of the last batch, before its keys enter
                positive, negative = (query * key).sum(1), query.detach() @ model.queue  # (N,), (N, K)
            model.enqueue(keys)  # and dequeue
            show_progress(args, epoch, step, steps, start)
        metrics = {"loss": losses.mean().item(), "seconds": time.perf_counter() - start}
        metrics["bound"] = math.log(args.queue_size + 1) - metrics["loss"]
        metrics["accuracy"] = (positive > negative.amax(1)).float().mean().item()  # queries that pick out their key
        metrics["positive"] = positive.mean().item()  # cosine of a query and its key
        metrics["queue"] = [part.mean().item() for part in negative.chunk(4, dim=1)]  # and of the queue, oldest first
        if epoch % args.eval_every == 0 or epoch == args.epochs:
            metrics |= monitor()
        history.append({"epoch": epoch, **metrics})
        save_epoch(args, parts, images, history)
    return history


# === Evaluate =========================================================================================================


@torch.no_grad()
def features(network, images):
    """Images without augmentation, uint8 (M, 3, S, S), through a frozen network -> float32 (M, D)."""
    device = device_of(network.eval())
    with autocast(device):
        h = torch.cat([network(common.normalize(x.to(device) / 255)).float() for x in images.split(512)])
    if not h.isfinite().all():
        raise UserError("features are not finite, so there is nothing to measure: try a smaller --lr")
    return h


def knn_accuracy(bank, bank_labels, queries, labels, k=200, temperature=0.1):
    """Weighted k nearest neighbors (Wu et al. 2018; k and temperature of MoCo's CIFAR-10 notebook): features (M, D),
    (Q, D) -> accuracy in [0, 1].

    The k images of the bank most similar to a query, by cosine s, vote for their class, each with exp(s / temperature).
    """
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    classes, correct = int(bank_labels.max()) + 1, 0
    for query, label in zip(queries.split(1024), labels.split(1024), strict=True):
        s, nearest = (query @ bank.T).topk(min(k, len(bank)))  # (B, k)
        votes = torch.zeros(len(query), classes, device=bank.device)
        votes.scatter_add_(1, bank_labels[nearest], (s / temperature).exp())
        correct += (votes.argmax(1) == label).sum().item()
    return correct / len(labels)


def linear_probe(train, train_labels, test, test_labels):
    """Logistic regression on standardized frozen features (M, D), (Q, D), by L-BFGS and with C = 1, the defaults of
    scikit-learn -> accuracy on test in [0, 1]."""
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


def evaluate(network, data, head=True):
    """kNN and linear probe of h and, if head, of z -> accuracies on test, none without labels; h of train and test."""
    y, test_y = data.train_labels, data.test_labels
    h, test_h = (
        features(network.encoder, data.train_images[: len(y) or None]),
        features(network.encoder, data.test_images),
    )
    if not data.classes:
        return {}, (h, test_h)
    accuracies = {"knn": knn_accuracy(h, y, test_h, test_y), "linear_probe": linear_probe(h, y, test_h, test_y)}
    if head:
        with torch.no_grad():
            z, test_z = (network.projector.eval()(x) for x in (h, test_h))
        accuracies["knn_z"] = knn_accuracy(z, y, test_z, test_y)
        accuracies["linear_probe_z"] = linear_probe(z, y, test_z, test_y)
    return accuracies, (h, test_h)


# === Nothing below is about SimCLR: optimizer, several GPUs, run folder, figures, command line ========================


def device_of(model):
    return next(model.parameters()).device


def precision(device):
    """bfloat16 where the GPU has it, else float16; float32 on other devices."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def autocast(device):
    return torch.autocast(device.type, precision(device), enabled=device.type == "cuda")


def make_optimizer(model, args, batch_size):
    """SGD with momentum, decaying all parameters, or AdamW, sparing biases and norms, as published recipes have them.
    args.lr is for 256 images: a gradient averaged over more of them is less noisy, and allows larger steps."""
    options = dict(lr=args.lr * batch_size / 256, weight_decay=args.weight_decay, fused=True)
    if args.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=0.9, **options)
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == wide] for wide in (True, False))
    return torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], **options)


def warmup_cosine(steps, warmup):
    """The factor on the learning rate by step: a linear rise over the fraction `warmup` of the steps, then half a
    cosine to 0, where it stays."""
    rise = warmup * steps

    def factor(step):
        fall = (min(step, steps) - rise) / (steps - rise)
        return (step + 1) / (rise + 1) if step < rise else 0.5 + 0.5 * math.cos(math.pi * fall)

    return factor


# --- Several GPUs: torchrun starts a process for each, which has its part of every batch ------------------------------


def rank():
    """The number of this process; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def distributed(model):
    """The model, or one that averages its gradients over all processes."""
    return nn.parallel.DistributedDataParallel(model) if world_size() > 1 else model


def gather(x):
    """The rows x (B, D) of all processes -> (world B, D)."""
    return Gather.apply(x) if world_size() > 1 else x


class Gather(torch.autograd.Function):
    """The gradient of a row is the sum of what all processes send back for it; DistributedDataParallel's average over
    processes then is the gradient of the loss of the whole batch."""

    @staticmethod
    def forward(ctx, x):
        rows = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[rank()]


def draws(args, epoch, images, device):
    """The images of this process in an epoch, in random order, and the generator of its views. They depend on nothing
    before the epoch, so that a resumed run draws what an unbroken one would."""
    seed, M = (
        args.seed * 100_000 + epoch,
        len(images) // args.batch_size * args.batch_size,
    )  # an incomplete batch is left out
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:M].to(device)
    return order[rank() :: world_size()], torch.Generator(device).manual_seed(seed + 50_000 * rank())


def pick_device(name):
    """The device of that name, or the best there is for `auto`; under torchrun the GPU of this process, which meets the
    others here. Raises UserError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.zeros(1, device=name).device
        if device.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("cuda, mps or cpu")
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not available ({str(error).splitlines()[0]})") from None
    if "RANK" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        timeout = timedelta(days=1)  # decoding many images takes longer than the ten minutes of the default
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
        if rank() > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return device


# --- Run folder -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def run_folder(args):
    """The folder of the run, which belongs to this process until it ends: no other run writes there meanwhile."""
    folder, lock = Path(args.out), None
    if rank() > 0:
        yield folder
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(ImportError):  # Windows has no fcntl
            import fcntl

            lock = os.open(folder, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if (folder / "checkpoint.pt").exists() and not args.resume:
            raise UserError(
                f"--out {folder}: holds a run already; go on with --resume {folder}, or name another folder"
            )
        save(folder / "args.json", json.dumps(dataclasses.asdict(args), indent=2) + "\n")
        yield folder
    except BrokenPipeError:
        raise
    except BlockingIOError:
        raise UserError(f"--out {folder}: another run is writing there; name another folder") from None
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror})") from None
    finally:
        if lock is not None:
            os.close(lock)


def save(path, content):
    """Text, or what torch.save takes, under a temporary name first: a run that is killed leaves no torn file."""
    if rank() == 0:
        partial, file = path.with_name(path.name + ".partial"), io.BytesIO()
        file.write(content.encode()) if isinstance(content, str) else torch.save(content, file)
        try:
            partial.write_bytes(file.getbuffer())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def show_progress(args, epoch, step, steps, start):
    """On a terminal, every tenth of an epoch: how far it is, and how long the rest of the run will take."""
    if sys.stdout.isatty() and (step + 1) % max(1, steps // 10) == 0:
        done = (step + 1) / steps
        left = (time.perf_counter() - start) / done * (args.epochs - epoch + 1 - done)
        print(f"\repoch {epoch}/{args.epochs} {done:4.0%}, {left / 60:.1f} min left ", end="", flush=True)


def fingerprint(images):
    """Numbers that tell whether a run that goes on has the images that it began with."""
    return [*images.shape, int(images[:: len(images) // 64 + 1].sum())]


def save_epoch(args, parts, images, history):
    """Prints the last line of the history; writes all of it and the checkpoint, if loss and weights are finite."""
    shown = "  ".join(f"{k} {v:.4g}" for k, v in history[-1].items() if isinstance(v, float))
    print(f"\repoch {len(history)}/{args.epochs}  {shown}", flush=True)
    norm = nn.utils.get_total_norm(parts["model"].parameters())
    if not math.isfinite(history[-1]["loss"]) or not norm.isfinite():
        kept = (
            f"the checkpoint is that of epoch {len(history) - 1}" if len(history) > 1 else "there is no checkpoint yet"
        )
        raise UserError(f"the loss is not finite in epoch {len(history)}: try a smaller --lr; {kept}")
    save(Path(args.out, "metrics.jsonl"), "".join(json.dumps(line) + "\n" for line in history))
    state = {"method": METHOD, "images": fingerprint(images), "history": history}
    save(Path(args.out, "checkpoint.pt"), state | {name: part.state_dict() for name, part in parts.items()})


def load_checkpoint(args, parts, images):
    """Restores the parts of the run in args.out, if it has got that far -> its history."""
    path = Path(args.out, "checkpoint.pt")
    if not path.exists():
        return []
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["method"] != METHOD:
            raise UserError(f"{path}: is of {state['method']}, not of {METHOD}")
        if state["images"] != fingerprint(images):
            raise UserError(f"{path}: --dataset {args.dataset} has not the images that the run began with")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return state["history"]
    except UserError:
        raise
    except Exception:  # a torn file, or one of another model, fails in many ways
        raise UserError(f"{path}: not a checkpoint of this run with these flags") from None


# --- Figures ----------------------------------------------------------------------------------------------------------


def save_sheet(path, blocks):
    """Blocks {title: images, float (R, C, 3, S, S) in [0, 1]} side by side, in tiles of about 64 pixels."""
    sheets = []
    for images in blocks.values():
        grid = torchvision.utils.make_grid(images.flatten(0, 1).cpu(), images.shape[1], padding=1, pad_value=1.0)
        zoom = max(1, round(64 / images.shape[4]))
        grid = grid.repeat_interleave(zoom, dim=1).repeat_interleave(zoom, dim=2)
        sheets.append(F.pad(grid, (16, 0, 24, 16), value=1.0))
    page = torchvision.transforms.functional.to_pil_image(F.pad(torch.cat(sheets, dim=2), (0, 16), value=1.0))
    for i, title in enumerate(blocks):
        left = 16 + zoom + sum(sheet.shape[2] for sheet in sheets[:i])
        ImageDraw.Draw(page).text((left, 6), title, fill="black", font_size=13)
    page.save(path)


def save_views(path, images, args):
    """Some images, uint8 (R, 3, S, S), and four pairs of views of each, as a training step sees them."""
    generator, blocks = torch.Generator(images.device).manual_seed(args.seed), {"image": images[:, None] / 255}
    for pair in range(1, 5):
        blocks[f"pair {pair}"] = two_views(images, args, generator).unflatten(0, (2, -1)).transpose(0, 1)
    save_sheet(path, blocks)


def save_neighbors(path, data, before, after):
    """Test images, one of each of ten classes, and the training images nearest to them in h, before and after training:
    green frames are of the same class, red ones are not. before, after: h of the training and the test images."""
    S, frames = data.test_images.shape[3] + 4, torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.7, 0.2], [1.0, 1.0, 1.0]])
    first = [(data.test_labels == k).nonzero()[0, 0] for k in data.test_labels.unique()[:10]]
    queries = torch.stack(first) if data.classes else torch.arange(len(data.test_images), device=before[0].device)

    def framed(images, rows, frame):  # rows and numbers of frames (R, C) -> (R, C, 3, S, S)
        tiles = frames[frame.cpu()][..., None, None].repeat(1, 1, 1, S, S)
        tiles[..., 2:-2, 2:-2] = images[rows.to(images.device)].cpu() / 255
        return tiles

    white = torch.full_like(queries[:, None], 2)
    blocks = {"test image" if data.classes else "image": framed(data.test_images, queries[:, None], white)}
    for title, (train, test) in {"nearest before training": before, "nearest after training": after}.items():
        s = F.normalize(test[queries], dim=1) @ F.normalize(train, dim=1).T  # (R, M)
        nearest = s.topk(min(7, len(train))).indices
        if data.classes:
            nearest = nearest[:, :6]
            frame = (data.train_labels[nearest] == data.test_labels[queries, None]).long()
        else:  # the first is the image itself, and nobody knows its class
            nearest = nearest[:, 1:]
            frame = torch.full_like(nearest, 2)
        blocks[title] = framed(data.train_images, nearest, frame)
    save_sheet(path, blocks)


# --- Command line -----------------------------------------------------------------------------------------------------

SHAPES = dict(encoder="small", epochs=16, batch_size=64, optimizer="adamw", lr=4e-3, weight_decay=0.05, warmup=0.05,
              queue_size=1024, momentum=0.995, bn_groups=2, crop=0.8, gray=0.5, eval_every=4)  # fmt: skip
SMALL = dict(image_size=32, epochs=10, batch_size=128, optimizer="adamw", lr=2e-3, weight_decay=1e-2, warmup=0.05,
             bn_groups=4, eval_every=2)  # with --encoder small  # fmt: skip
LARGE_IMAGES = dict(temperature=0.2, blur=0.5)  # paper, on ImageNet


def fit_recipe(args, M, S):
    """Sets, of the flags that were not typed, those that depend on the number M and the size S of the images."""
    group = 2 * args.bn_groups
    recipe = {"batch_size": min(args.batch_size, M) // group * group, "queue_size": min(args.queue_size, M // 4)}
    for name, value in (recipe | (LARGE_IMAGES if S > 64 else {})).items():
        if not was_typed(args, name):
            setattr(args, name, value)


def was_typed(args, name):
    name = name.replace("_", "-")
    return any(word.split("=")[0] in (f"--{name}", f"--no-{name}") for word in args.typed)


def label_amount(text):
    """0.1 is a fraction of each class, 10 a number of labels per class."""
    value = int(text) if text.isdecimal() else float(text)
    if not 0 < value or (isinstance(value, float) and not value <= 1):
        raise argparse.ArgumentTypeError(f"{text}: must be a fraction up to 1.0, or a whole number of labels per class")
    return value


def parse_args(argv=None):
    """The command line, over the recipe of its dataset or over the flags of the run to resume -> Args.

    Raises UserError for an unknown flag and for a value out of its range.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False, allow_abbrev=False
    )
    flags = [field for field in dataclasses.fields(Args) if field.metadata]

    def error(message):
        unknown = re.search(r"unrecognized arguments: --(\S+)", message)
        close = difflib.get_close_matches(unknown[1].replace("-", "_"), [f.name for f in flags]) if unknown else []
        raise UserError(message + (f"; is --{close[0].replace('_', '-')} meant?" if close else ""))

    def in_range(kind, low, high):
        def parse(text):
            value = kind(text)
            if low is not None and not low <= value <= high:
                raise argparse.ArgumentTypeError(
                    f"{text}: must be " + (f"at least {low}" if high == math.inf else f"from {low} to {high}")
                )
            return value

        parse.__name__ = kind.__name__  # for argparse's messages
        return parse

    parser.error = error
    for field in flags:
        options = {"help": f"{field.metadata['help']} (%(default)s)", "default": field.default}
        if field.type is bool:
            options |= {"action": argparse.BooleanOptionalAction}
        elif field.type is list:
            options |= {"type": label_amount, "nargs": "+"}
        else:
            options |= {"type": in_range(field.type, field.metadata["low"], field.metadata["high"])}
            options |= {"choices": field.metadata["choices"]}
        parser.add_argument("--" + field.name.replace("_", "-"), **options)
    given, _ = parser.parse_known_args(argv)
    parser.set_defaults(**SHAPES if given.dataset == "shapes" else SMALL if given.encoder == "small" else {})
    if given.resume:
        try:
            before = json.loads(Path(given.resume, "args.json").read_text())
            parser.set_defaults(**before | {"out": given.resume})
            argv = before["typed"] + argv
        except (OSError, ValueError, TypeError):
            raise UserError(f"--resume {given.resume}: there is no run in this folder") from None
    parser.add_argument("-h", "--help", action="help", help="show this help, with the recipe of --dataset in brackets")
    args = Args(**vars(parser.parse_args(argv)) | {"typed": argv})
    if args.out == "auto":
        args.out = f"runs/{METHOD}-{Path(args.dataset).resolve().stem}-seed{args.seed}"
    return args


# --- Main -------------------------------------------------------------------------------------------------------------


def main(args):
    """Measures the untrained encoder, pretrains without labels, measures again -> the content of summary.json."""
    start, device = time.perf_counter(), pick_device(args.device)
    if rank() > 0:
        dist.barrier()  # until process 0 has downloaded and decoded the images
    data = common.load_dataset(args.dataset, args.data_dir, args.image_size).to(device)
    if rank() == 0 and world_size() > 1:
        dist.barrier()
    M, _, S, _ = data.train_images.shape
    fit_recipe(args, M, S)
    if args.batch_size > M:
        raise UserError(f"--batch-size {args.batch_size}: {args.dataset} has only {M} training images")
    if args.batch_size % args.bn_groups or args.batch_size < 2 * args.bn_groups:
        raise UserError(
            f"--bn-groups {args.bn_groups}: must split --batch-size {args.batch_size} into groups of 2 or more"
        )
    if args.bn_groups % world_size():
        raise UserError(f"--bn-groups {args.bn_groups}: must be a multiple of the {world_size()} processes")
    if args.queue_size > M // args.batch_size * args.batch_size:
        raise UserError(f"--queue-size {args.queue_size}: with {M} images each would be among its own negatives")
    if Path(args.dataset).resolve() in Path(args.out).resolve().parents:
        raise UserError(f"--out {args.out}: is inside --dataset {args.dataset}, and its figures would be learned from")
    if not data.classes:
        data.test_images = data.train_images[:10]  # for the figure of neighbors, which needs no labels

    torch.manual_seed(args.seed)
    model = MoCo(args, S).to(device)
    if device.type != "mps":  # see common.normalize
        model.to(memory_format=torch.channels_last)
    network = model.query_encoder
    untrained_network = copy.deepcopy(network)
    if args.compile:
        model.query_encoder.compile()
        model.key_encoder.compile()
        common.compile_operators()

    def monitor():
        """kNN accuracy on a tenth of the training labels, from the others: what recipes are chosen by."""
        y = data.train_labels
        h = features(network.encoder, data.train_images[: len(y)])
        held, rest = (
            torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).to(device).tensor_split([len(y) // 10])
        )
        return {"knn": knn_accuracy(h[rest], y[rest], h[held], y[held])}

    with run_folder(args) as folder:
        print(f"{METHOD} on {args.dataset}: {M} images, {S} x {S}, {len(data.train_labels)} labels; {device}; {folder}")
        save_views(folder / "views.png", data.train_images[:8].to(device), args)
        untrained, before = evaluate(untrained_network, data, head=False)
        history = pretrain(model, data.train_images, args, monitor if data.classes else dict)
        print("measuring", flush=True)
        trained, after = evaluate(network, data, head=True)
        steps = M // args.batch_size
        summary = {
            "method": METHOD,
            "command": shlex.join(["python", f"{METHOD}.py", *args.typed]),
            "args": dataclasses.asdict(args),
            "date": time.strftime("%Y-%m-%d"),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "processes": world_size(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "parameters": sum(p.numel() for p in network.encoder.parameters()),
            "images_per_second": steps * args.batch_size / statistics.median(line["seconds"] for line in history),
            "pretrain_seconds": sum(line["seconds"] for line in history),
            "total_seconds": time.perf_counter() - start,
            "untrained": untrained,
            "trained": trained,
            "history": history,
        }
        save(folder / "encoder.pt", network.encoder.state_dict())
        save(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        if rank() == 0:
            save_neighbors(folder / "neighbors.png", data, before, after)
    if trained:
        print(f"\n{'accuracy on test':20}{'untrained':>12}{'trained':>12}")
    for name, value in trained.items():
        print(f"{name:20}" + (f"{untrained[name]:12.1%}" if name in untrained else " " * 12) + f"{value:12.1%}")
    print(f"{summary['total_seconds']:.0f} s in all; results are in {folder}")
    return summary


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # where a console cannot show a name
    try:
        main(parse_args())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, BrokenPipeError):  # Ctrl-C, or `| head` has seen enough
        print("stopped; --resume with the run folder goes on from the last whole epoch", file=sys.stderr)
        os._exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()
