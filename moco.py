"""MoCo: each query must pick out its key among thousands of negatives kept in a queue from earlier batches.

One view of an image is the query, another one its key. Negatives from the batch would tie their number to its size;
from a memory bank of all images, they would come from many old encoders. MoCo keeps the keys of the last K / N steps in
a queue, and an encoder that changes slowly, a moving average of the query encoder, keeps old keys comparable with new
ones. After pretraining, downstream tasks use the query encoder's h; its head, key encoder and queue are thrown away.

    He, Fan, Wu, Xie, Girshick: Momentum Contrast for Unsupervised Visual Representation Learning, CVPR 2020.
    Chen, Fan, Girshick, He: Improved Baselines with Momentum Contrastive Learning, 2020 (v2: MLP head, aug+, cosine).
    Algorithm 1 of the paper and of the lecture, for a query q, its key k+ and the queue k_1 ... k_K, without k+:

    L = -log( exp(q . k+ / t) / (exp(q . k+ / t) + sum_i exp(q . k_i / t)) )       t the temperature
    theta_k <- m theta_k + (1 - m) theta_q                                        m the momentum

    python moco.py                                       shapes drawn by code; a laptop CPU will do
    python moco.py --dataset cifar10 --compile           ResNet-18, on a GPU
    python moco.py --dataset cifar10 --encoder small     a small ResNet, on a CPU
    python moco.py --no-mlp --no-aug-plus --no-cos       version 1; each is a column of the lecture's table 1
    torchrun --nproc-per-node 8 moco.py --dataset path/to/images         your own images, on 8 GPUs

Linear probe on test, untrained -> trained encoder, on shapes with seed 0 (record in results/): 37.0 -> 87.2 %.
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
from PIL import ImageDraw
from torch import nn
from torchvision.transforms.functional import to_pil_image, to_tensor

import common
from common import UserError

METHOD = "moco"
SWITCH, RAW = argparse.BooleanOptionalAction, argparse.RawDescriptionHelpFormatter
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun: a process for each GPU


def flag(default, help, low=None, high=math.inf, **options):  # a field of Args; low to high is a number's range
    return dataclasses.field(default=default, metadata=dict(help=help, low=low, high=high, options=options))


@dataclasses.dataclass
class Args:  # defaults are the recipe for CIFAR-10 on a GPU, SHAPES, SMALL and LARGE_IMAGES say what differs elsewhere
    dataset: str = flag("shapes", "shapes, cifar10, cifar100, stl10, or a path: an .npz file or a folder of images")
    data_dir: str = flag("data", "folder for downloads and decoded images")
    image_size: int = flag(96, "side in pixels to which the images of a folder, and larger ones, are resized", 8, 512)
    encoder: str = flag("resnet18", "paper: resnet50", choices=("small", "resnet18", "resnet34", "resnet50"))
    epochs: int = flag(200, "passes over the training images; paper: 200", 1)
    batch_size: int = flag(512, "images N per step, over all GPUs; paper: 256", 2)
    optimizer: str = flag("sgd", "sgd with momentum; paper: the same", choices=("sgd", "adamw"))
    lr: float = flag(0.03, "peak learning rate for a batch of 256; grows in proportion to --batch-size; paper: 0.03", 0)
    weight_decay: float = flag(5e-4, "paper: 1e-4", 0)
    warmup: float = flag(0.0, "fraction of the steps with linear warmup; paper: none", 0, 0.9)
    queue_size: int = flag(4096, "keys K in the queue; paper: 65536, authors' CIFAR-10 notebook: 4096", 1)
    momentum: float = flag(0.99, "m: 0 makes keys inconsistent, 1 keeps them random; paper: 0.999, notebook 0.99", 0, 1)
    temperature: float = flag(0.1, "t; v1: 0.07, v2: 0.2, notebook: 0.1", 0.01)
    mlp: bool = flag(True, "v2: a head of two layers; v1: a linear one", action=SWITCH)
    aug_plus: bool = flag(True, "v2: color jitter for 80 %% of the views, blur; v1: for all, more hue", action=SWITCH)
    cos: bool = flag(True, "v2: cosine schedule; v1: lr / 10 after 60 %%, and again after 80 %%", action=SWITCH)
    bn_groups: int = flag(8, "groups of a batch with statistics of their own; paper: 8, one per GPU", 1)
    crop: float = flag(0.2, "smallest crop, as a fraction of the image's area; paper: 0.2", 0.01, 1)
    gray: float = flag(0.1, "fraction of gray views; paper: 0.2", 0, 1)
    blur: float = flag(0.0, "fraction of blurred views; v1: none, v2: 0.5, notebook: none", 0, 1)
    half_size: float = flag(0.0, "fraction of the epochs, at first, with views of half the side; paper: none", 0, 1)
    eval_every: int = flag(10, "epochs between two kNN measurements on held-out training labels", 1)
    seed: int = flag(0, "of weights, batches and views", 0, 2**31)
    device: str = flag("auto", "auto: cuda, else mps, else cpu")
    compile: bool = flag(False, "torch.compile network and augmentations, for long runs on a GPU", action=SWITCH)
    out: str = flag("", "run folder instead of runs/<method>-<dataset>-seed<seed>")
    resume: str = flag("", "run folder to continue, with the flags that it was started with")
    typed: list = ()  # names of the flags that were typed
    command: str = f"torchrun --nproc-per-node {WORLD} {METHOD}.py" if WORLD > 1 else f"python {METHOD}.py"


# === Views ============================================================================================================
def two_views(images, args, generator, size=None):
    """uint8 (N, 3, S, S) -> float (2N, 3, size, size) in [0, 1]: queries' views, then keys'; size is S by default.

    v2 ("aug+") is SimCLR's augmentation; v1's, from InstDisc, takes the color first and jitters that of all views.
    """
    x = images.repeat(2, 1, 1, 1) / 255
    x = common.random_resized_crop(x, size or x.shape[3], generator, scale=(args.crop, 1.0))
    if args.aug_plus:
        x = common.random_color_jitter(x, generator, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8)
        x = common.random_grayscale(x, generator, args.gray)
    else:
        x = common.random_grayscale(x, generator, args.gray)
        x = common.random_color_jitter(x, generator, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4, p=1.0)
    return common.random_gaussian_blur(x, generator, p=args.blur) if args.blur else x


# === Model ============================================================================================================
def build_encoder(name, image_size=32, norm_layer=nn.BatchNorm2d):
    """torchvision's ResNet without its classifier, (B, 3, S, S) -> (B, D), and D.

    Up to 64 pixels the stem is a 3x3 convolution without max pooling (SimCLR paper, appendix B.9): ImageNet's would
    leave 8 x 8 of 32 x 32 pixels. `small`, for CPUs, has ImageNet's, and one block in each of the first two stages.
    """
    encoder = torchvision.models.get_model("resnet18" if name == "small" else name, norm_layer=norm_layer)
    D, encoder.fc = encoder.fc.in_features, nn.Identity()
    if name == "small":
        D, encoder.layer1, encoder.layer2 = 128, encoder.layer1[:1], encoder.layer2[:1]
        encoder.layer3 = encoder.layer4 = nn.Identity()
    elif image_size <= 64:
        encoder.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()
    return encoder, D


class SplitBatchNorm(nn.BatchNorm2d):
    """Batch norm that treats each of several groups of a batch by itself, as several GPUs would. Statistics of a whole
    batch would give the positive away: of all the keys, it alone was normalized together with those of this batch. So
    keys are shuffled before they are split into groups, and query and key meet different statistics (paper, 3.3)."""

    def __init__(self, features, groups):
        super().__init__(features)
        self.groups = groups

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        y = x.unflatten(0, (self.groups, -1)).transpose(1, 2)  # (G, C, B / G, H, W): to instance norm, G instances
        statistics, affine = (self.running_mean, self.running_var), (self.weight, self.bias)
        y = F.instance_norm(y, *statistics, *affine, use_input_stats=True, momentum=self.momentum, eps=self.eps)
        return torch.empty_like(x).copy_(y.transpose(1, 2).flatten(0, 1))  # in the memory layout of x


class MoCo(nn.Module):
    """Query encoder, key encoder and queue (C, K), oldest key first. It begins as random vectors, which are so easy to
    tell from a key that the loss rises until keys have replaced them."""

    def __init__(self, args, image_size=32):
        super().__init__()
        encoder, D = build_encoder(args.encoder, image_size, lambda C: SplitBatchNorm(C, args.bn_groups // WORLD))
        hidden = [nn.Linear(D, D), nn.ReLU()] if args.mlp else []
        self.query_encoder = nn.Sequential(encoder, *hidden, nn.Linear(D, 128))  # (B, 3, S, S) -> (B, C)
        self.key_encoder = copy.deepcopy(self.query_encoder).requires_grad_(False)  # f_k.params = f_q.params
        self.register_buffer("queue", F.normalize(torch.randn(128, args.queue_size), dim=0))

    @torch.no_grad()  # the keys in the queue could not pass gradients on: their graphs are gone
    def keys(self, x, generator):
        """f_k of the views (B, 3, S, S) of all processes, shuffled among them for batch norm -> (WORLD B, C)."""
        x = gather(x)
        order = torch.randperm(len(x), generator=generator, device=x.device)
        if WORLD > 1:
            dist.broadcast(order, src=0)
        return gather(self.key_encoder(x[order.chunk(WORLD)[RANK]]))[order.argsort()]

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
    """theta_k <- m theta_k + (1 - m) theta_q, in place: equation 2 of the paper, for parameters, not running means."""
    for k, q in zip(key_encoder.parameters(), query_encoder.parameters(), strict=True):
        k.lerp_(q, 1 - momentum)


def pretrain(model, images, args, monitor):
    """Algorithm 1 on images, uint8 (M, 3, S, S), without labels; monitor() -> metrics. Returns those of all epochs."""
    device, N, steps = model.queue.device, args.batch_size // WORLD, len(images) // args.batch_size
    optimizer, schedule = make_optimizer(model.query_encoder, args, args.batch_size, args.epochs * steps)
    scaler = torch.amp.GradScaler(device.type, enabled=autocast(device).fast_dtype == torch.float16)
    state = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    history = load_checkpoint(args, state, images)
    query_encoder = nn.parallel.DistributedDataParallel(model.query_encoder) if WORLD > 1 else model.query_encoder
    for epoch in range(len(history) + 1, args.epochs + 1):
        start, losses = time.perf_counter(), torch.zeros(steps, device=device)
        order, generator = draws(args, epoch, images, device)
        size = images.shape[3] // (2 if epoch <= args.half_size * args.epochs else 1)  # half: a quarter of the cost
        model.train()
        for step, batch in enumerate(common.batches(images, order, N, device)):  # (N, 3, S, S)
            x_q, x_k = common.normalize(two_views(batch, args, generator, size)).chunk(2)  # (N, 3, size, size)
            with autocast(device):
                query, keys = query_encoder(x_q), model.keys(x_k, generator)  # no gradient to keys
            query, keys = (F.normalize(x.float(), dim=1) for x in (query, keys))  # (N, C), (WORLD N, C)
            key, queue = keys.chunk(WORLD)[RANK], model.queue  # (N, C), (C, K)
            loss = info_nce(query, key, queue, args.temperature)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            ema_update(model.key_encoder, model.query_encoder, args.momentum)
            model.enqueue(keys)  # and dequeue
            losses[step] = loss.detach()  # reading it here would make the host wait for the GPU
            show_progress(args, epoch, step, steps, start)
        metrics = {"loss": losses.mean().item(), "seconds": time.perf_counter() - start}
        metrics["bound"] = math.log(args.queue_size + 1) - metrics["loss"]
        positive, negative = (query * key).sum(1), query @ queue  # cosines of the last batch: (N,), (N, K)
        metrics |= {"accuracy": (positive > negative.amax(1)).float().mean().item(), "positive": positive.mean().item()}
        metrics["queue"] = [part.mean().item() for part in negative.chunk(4, dim=1)]  # by age, the oldest first
        if epoch % args.eval_every == 0 or epoch == args.epochs:
            metrics |= monitor()
        history.append({"epoch": epoch, **metrics})
        save_epoch(args, state, images, history)
    return history


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
    """kNN and linear probe of h -> accuracies on test, none without labels; h of train and test."""
    y, test_y = data.train_labels, data.test_labels
    h, test_h = (features(encoder, x) for x in (data.train_images[: len(y) or None], data.test_images))
    if not data.classes:
        return {}, (h, test_h)
    return {"knn": knn_accuracy(h, y, test_h, test_y), "linear_probe": linear_probe(h, y, test_h, test_y)}, (h, test_h)


# === Nothing below is about MoCo: optimizer, several GPUs, run folder, figures, command line ========================
def autocast(device):
    """bfloat16 where the GPU has it, else float16; float32 on other devices."""
    bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16 if bfloat16 else torch.float16, enabled=device.type == "cuda")


def make_optimizer(model, args, batch_size, steps):
    """SGD with momentum, or AdamW; linear warmup, then half a cosine to 0. args.lr is for 256 images: the gradient of
    more of them is less noisy, and allows larger steps."""
    kind, options = (torch.optim.SGD, {"momentum": 0.9}) if args.optimizer == "sgd" else (torch.optim.AdamW, {})
    lr, rise = args.lr * batch_size / 256, args.warmup * steps
    optimizer = kind(model.parameters(), lr, weight_decay=args.weight_decay, fused=True, **options)

    def factor(step):
        fall = (min(step, steps) - rise) / (steps - rise)
        after = 0.5 + 0.5 * math.cos(math.pi * fall) if args.cos else 0.1 ** ((fall >= 0.6) + (fall >= 0.8))
        return (step + 1) / (rise + 1) if step < rise else after

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def gather(x):
    """Rows (B, D) of all processes -> (WORLD B, D). Gradients flow to a process's own rows, WORLD times as large, since
    DistributedDataParallel averages over the processes what the gradient of the whole batch sums."""
    if WORLD == 1:
        return x
    rows = [torch.empty_like(x) for _ in range(WORLD)]
    dist.all_gather(rows, x.detach())
    rows[RANK] = x.detach() + WORLD * (x - x.detach())
    return torch.cat(rows)


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


def save_sheet(path, blocks):
    """Blocks {title: images, float (R, C, 3, S, S) in [0, 1]} side by side, in tiles of about 64 pixels."""
    sheets = []
    for title, images in blocks.items():
        zoom = max(1, round(64 / images.shape[4]))
        tiles = F.interpolate(images.flatten(0, 1).cpu(), scale_factor=zoom)
        grid = torchvision.utils.make_grid(tiles, images.shape[1], padding=zoom, pad_value=1.0)
        sheet = to_pil_image(F.pad(grid, (8, 8, 24, 16), value=1.0))
        ImageDraw.Draw(sheet).text((8 + zoom, 6), title, fill="black", font_size=13)
        sheets.append(to_tensor(sheet))
    if RANK == 0:
        torchvision.utils.save_image(torch.cat(sheets, dim=2), path)


def save_views(path, images, args):
    """Some images, uint8 (R, 3, S, S), and four pairs of views of each, as a training step sees them."""
    generator = torch.Generator(images.device).manual_seed(args.seed)
    pairs = [two_views(images, args, generator).unflatten(0, (2, -1)).transpose(0, 1) for _ in range(4)]
    save_sheet(path, {"image": images[:, None] / 255} | {f"pair {i}": pair for i, pair in enumerate(pairs, 1)})


def save_neighbors(path, data, before, after):
    """A test image of each of ten classes, and the training images nearest to it in h, before and after training; green
    frames are of the same class, red ones are not. before, after: h of the training and of the test images."""
    queries = torch.stack([(data.test_labels == label).nonzero()[0, 0] for label in data.test_labels.unique()[:10]])
    colors = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.7, 0.2], [1.0, 1.0, 1.0]])  # red, green, white

    def framed(images, rows, color):  # numbers of images and of colors (R, C) -> (R, C, 3, S + 4, S + 4)
        images = images[rows.to(images.device)].cpu() / 255
        tiles = F.pad(images, (2, 2, 2, 2), value=-1)
        return torch.where(tiles < 0, colors[color.cpu()][..., None, None], tiles)

    blocks = {"test image": framed(data.test_images, queries[:, None], torch.full_like(queries[:, None], 2))}
    for title, (train, test) in {"nearest before training": before, "nearest after training": after}.items():
        nearest = (F.normalize(test[queries], dim=1) @ F.normalize(train, dim=1).T).topk(min(6, len(train))).indices
        same = data.train_labels[nearest] == data.test_labels[queries, None] if data.classes else 2 + 0 * nearest
        blocks[title] = framed(data.train_images, nearest, same.long())
    save_sheet(path, blocks)


# On shapes most views are gray, since color alone tells most images apart; crops are large, to show whole outlines.
SHAPES = dict(encoder="small", epochs=12, batch_size=64, optimizer="adamw", lr=4e-3, weight_decay=0.05, warmup=0.05,
              queue_size=1024, bn_groups=2, crop=0.8, gray=0.8, eval_every=4)  # fmt: skip
SMALL = dict(image_size=32, epochs=40, batch_size=128, optimizer="adamw", lr=4e-3, weight_decay=1e-2, warmup=0.05,
             bn_groups=4, half_size=0.9, eval_every=8)  # with --encoder small  # fmt: skip
LARGE_IMAGES = dict(temperature=0.2, gray=0.2, blur=0.5)  # version 2


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
    batch_size, queue_size = min(args.batch_size, M) // args.bn_groups * args.bn_groups, min(args.queue_size, M // 4)
    recipe = dict(batch_size=batch_size, queue_size=queue_size) | (LARGE_IMAGES if S > 64 else {})
    vars(args).update({name: value for name, value in recipe.items() if name not in args.typed})
    N, G = args.batch_size, args.bn_groups
    if N > M or N < 2 * G or N % G or G % WORLD:
        raise UserError(f"--batch-size {N}: of {M} images, must make {G} --bn-groups of 2 or more on {WORLD} processes")
    if args.queue_size > M:
        raise UserError(f"--queue-size {args.queue_size}: at most the {M} images, or each would be its own negative")
    torch.manual_seed(args.seed)
    layout = torch.preserve_format if device.type == "mps" else torch.channels_last  # as of common.normalize
    model = MoCo(args, S).to(device, memory_format=layout)
    encoder, initial = model.query_encoder[0], copy.deepcopy(model.query_encoder[0])
    if args.compile:
        model.query_encoder.compile()
        model.key_encoder.compile()

    def monitor():  # kNN on a tenth of the training labels, from the others: what recipes are chosen by
        h, order = features(encoder, data.train_images[: len(y)]), torch.Generator().manual_seed(0)
        held, rest = torch.randperm(len(y), generator=order).to(device).tensor_split([len(y) // 10])
        return {"knn": knn_accuracy(h[rest], y[rest], h[held], y[held])}

    with common.compile_operators(args.compile), run_folder(args) as folder:
        print(f"{METHOD} on {args.dataset}: {M} images, {S} x {S}, {len(y)} labels; {device}; {folder}", flush=True)
        save_views(folder / "views.png", data.train_images[:8].to(device), args)
        untrained, before = evaluate(initial, data)
        history = pretrain(model, data.train_images, args, monitor if data.classes else dict)
        print("measuring", flush=True)
        trained, after = evaluate(encoder, data)
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
        save_neighbors(folder / "neighbors.png", data, before, after)
    for name in trained:
        print(f"{name:16}{trained[name]:6.1%}" + (f", untrained {untrained[name]:.1%}" if name in untrained else ""))
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
