"""RotNet: to predict how far an image was rotated, a network has to recognize what it shows and which way that stands.

Every image is rotated by 0, 90, 180 and 270 degrees, and the network classifies the four copies: labels come for free.
Multiples of 90 degrees need no interpolation, so only the content gives them away; what looks the same from all sides
has no rotation to predict. Downstream tasks use the feature maps of an early block, since the last ones specialize in
rotations. Unlike SimCLR's, these features keep the orientation.

    Gidaris, Singh, Komodakis: Unsupervised Representation Learning by Predicting Image Rotations, ICLR 2018.
    Equations 1 and 2 of the paper; "predict rotations" in the lecture. g(x | y) is image x after y quarter turns:

    L = mean over images x of  1/4 sum_{y = 0..3} -log F^y(g(x | y))       F^y the predicted probability of rotation y

    python rotnet.py                                       shapes drawn by code; a laptop CPU will do
    python rotnet.py --dataset cifar10 --compile           the paper's Network in Network, on a GPU
    python rotnet.py --dataset cifar10 --encoder small     a small one, on a CPU
    python rotnet.py --labels 5 20 100 400                 the lecture's semi-supervised figure: labels per class
    torchrun --nproc-per-node 8 rotnet.py --dataset path/to/images         your own images, on 8 GPUs

Linear probe on test of block 2, untrained -> trained, with seed 0 (record in results/): shapes 46.1 -> 99.2 %.
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
from collections import OrderedDict
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

METHOD = "rotnet"
SWITCH, RAW = argparse.BooleanOptionalAction, argparse.RawDescriptionHelpFormatter
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun: a process for each GPU


def flag(default, help, low=None, high=math.inf, **options):  # a field of Args; low to high is a number's range
    return dataclasses.field(default=default, metadata=dict(help=help, low=low, high=high, options=options))


@dataclasses.dataclass
class Args:  # defaults are the recipe for CIFAR-10 on a GPU, SHAPES and SMALL say what differs elsewhere
    dataset: str = flag("shapes", "shapes, cifar10, cifar100, stl10, or a path: an .npz file or a folder of images")
    data_dir: str = flag("data", "folder for downloads and decoded images")
    image_size: int = flag(96, "side in pixels to which the images of a folder, and larger ones, are resized", 8, 512)
    encoder: str = flag("nin", "nin: the paper's, of 4 blocks; small: 3, a third as wide", choices=("small", "nin"))
    epochs: int = flag(100, "passes over the training images; paper: 100, authors' code: 200", 1)
    batch_size: int = flag(128, "images N per step, each in four rotations, over all GPUs; paper: 128", 2)
    lr: float = flag(0.1, "learning rate, divided by 5 after 30, 60 and 80 %% of the steps; paper: 0.1", 0)
    weight_decay: float = flag(5e-4, "paper: 5e-4", 0)
    shift: float = flag(0.125, "largest shift before rotation, as a fraction of the side; authors' code: 0.125", 0, 0.5)
    classifier_epochs: int = flag(100, "passes over the labels for classifiers, twice that for --labels; paper: 100", 1)
    labels: list = flag((), "semi-supervised figure: 0.1 is a tenth of each class, 10 is ten per class", nargs="+")
    eval_every: int = flag(10, "epochs between two kNN measurements on held-out training labels", 1)
    seed: int = flag(0, "of weights, batches, views and choice of labels", 0, 2**31)
    device: str = flag("auto", "auto: cuda, else mps, else cpu")
    compile: bool = flag(False, "torch.compile network and augmentations, for long runs on a GPU", action=SWITCH)
    out: str = flag("", "run folder instead of runs/<method>-<dataset>-seed<seed>")
    resume: str = flag("", "run folder to continue, with the flags that it was started with")
    typed: list = ()  # names of the flags that were typed
    command: str = f"torchrun --nproc-per-node {WORLD} {METHOD}.py" if WORLD > 1 else f"python {METHOD}.py"


# === Views ============================================================================================================
def shifted(images, args, generator):
    """uint8 (N, 3, S, S) -> float in [0, 1], shifted and mirrored at random (authors' code)."""
    return common.random_crop(images / 255, round(args.shift * images.shape[3]), generator)


def rotate_batch(images):
    """Images, counter-clockwise by 0, 90, 180 and 270 degrees: (N, C, S, S) -> (4N, C, S, S), labels 0 to 3 (4N,). All
    copies of an image are in one batch, which trains better than one random rotation of each (paper, section 3.1)."""
    labels = torch.arange(4, device=images.device).repeat_interleave(len(images))
    return torch.cat([images.rot90(y, (2, 3)) for y in range(4)]), labels


# === Model ============================================================================================================
def nin_block(channels, kernel_size, stride=1, pool=None):
    """A block of Network in Network: a convolution and two of 1x1, each with batch norm and ReLU, then a pool; channels
    are those of the input and of the three outputs. The initialization is that of the authors' code."""
    layers = []
    for c_in, c_out, k, s in zip(channels, channels[1:], (kernel_size, 1, 1), (stride, 1, 1), strict=False):
        layers += [nn.Conv2d(c_in, c_out, k, s, k // 2, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]
        nn.init.kaiming_normal_(layers[-3].weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(*layers, *([pool] if pool else []))


def build_nin(name):
    """The paper's Network in Network without its classifier, an nn.Sequential of blocks, and its channels D. Of 32 x 32
    pixels block 1 makes (96, 16, 16), every later one (192, 8, 8); small: (64, 8, 8), (64, 4, 4)."""
    D, *narrow, stride, blocks = (64, 64, 64, 2, 3) if name == "small" else (192, 160, 96, 1, 4)
    first = nin_block((3, D, *narrow), 5, stride, nn.MaxPool2d(3, stride=2, padding=1))
    second = nin_block((narrow[1], D, D, D), 5, pool=nn.AvgPool2d(3, stride=2, padding=1))
    return nn.Sequential(first, second, *(nin_block((D, D, D, D), 3) for _ in range(blocks - 2))), D


def build_rotnet(args):
    """Encoder and linear classifier: (B, 3, S, S) -> logits of the rotations (B, 4)."""
    encoder, D = build_nin(args.encoder)
    classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(D, 4))
    return nn.Sequential(OrderedDict(encoder=encoder, classifier=classifier))


# === Loss =============================================================================================================
def training_step(network, images, args, generator):
    """Equations 1 and 2 for images, uint8 (N, 3, S, S) -> scalars: loss in nats, and fraction of rotations predicted
    correctly. Who guesses has a loss of log 4 = 1.39, and is right in 25 % of the cases."""
    x, labels = rotate_batch(shifted(images, args, generator))  # (4N, 3, S, S), (4N,)
    with autocast(x.device):
        logits = network(common.normalize(x)).float()  # (4N, 4)
    return {"loss": F.cross_entropy(logits, labels), "rotation": (logits.argmax(1) == labels).float().mean()}


# === Pretrain =========================================================================================================
def pretrain(model, images, args, monitor):
    """Learns to predict rotations of images, uint8 (M, 3, S, S); monitor() -> metrics. Returns those of all epochs."""
    device, N, steps = next(model.parameters()).device, args.batch_size // WORLD, len(images) // args.batch_size
    optimizer, schedule = make_optimizer(model, args, args.epochs * steps)
    scaler = torch.amp.GradScaler(device.type, enabled=autocast(device).fast_dtype == torch.float16)
    state = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    history = load_checkpoint(args, state, images)
    network = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    for epoch in range(len(history) + 1, args.epochs + 1):
        start, log = time.perf_counter(), []
        order, generator = draws(args, epoch, images, device)
        model.train()
        for step, batch in enumerate(common.batches(images, order, N, device)):  # (N, 3, S, S)
            terms = training_step(network, batch, args, generator)
            optimizer.zero_grad()
            scaler.scale(terms["loss"]).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            log.append(torch.stack(list(terms.values())).detach())  # reading it here would make the host wait
            show_progress(args, epoch, step, steps, start)
        metrics = dict(zip(terms, torch.stack(log).mean(0).tolist(), strict=True), seconds=time.perf_counter() - start)
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


def build_classifier(kind, C, H, W, classes):
    """The paper's classifiers of feature maps (C, H, W). conv: a third block and a linear layer on its mean. nonlinear:
    200-200-10 units for ten classes, on maps pooled to 8 x 8 at most, or it would have billions of weights."""
    if kind == "conv":
        return nn.Sequential(nin_block((C, C, C, C), 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, classes))
    size, hidden = (min(H, 8), min(W, 8)), min(20 * classes, 2048)
    layers = [nn.AdaptiveAvgPool2d(size), nn.Flatten()]
    for width in (C * math.prod(size), hidden):
        layers += [nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(hidden, classes))


def train_classifier(kind, blocks, data, rows, epochs, args, freeze=True):
    """Trains a classifier on blocks, frozen or in a copy trained as well, with the labels of some rows -> accuracy on
    test. Optimizer, shifts and number of images per step as in pretraining; as many steps as in `epochs` passes over
    the labels of all images, however few are used."""
    device, N = rows.device, min(4 * args.batch_size, len(rows))
    steps = epochs * math.ceil(len(data.train_labels) / (4 * args.batch_size))
    torch.manual_seed(args.seed)
    shape = *features(blocks, data.test_images[:1]).shape[1:], len(data.classes)  # C, H, W, classes
    model = nn.Sequential(copy.deepcopy(blocks).requires_grad_(not freeze), build_classifier(kind, *shape))
    optimizer, schedule = make_optimizer(model.to(device), args, steps)
    scaler = torch.amp.GradScaler(device.type, enabled=autocast(device).fast_dtype == torch.float16)
    generator = torch.Generator(device).manual_seed(args.seed)
    model[0].train(not freeze)  # frozen batch norm, too
    order = rows[torch.randint(len(rows), (steps * N,), generator=generator, device=device)]
    for index, batch in zip(order.split(N), common.batches(data.train_images, order, N, device), strict=True):
        with autocast(device):
            logits = model(common.normalize(shifted(batch, args, generator))).float()  # (N, classes)
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(logits, data.train_labels[index])).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
    return (features(model, data.test_images).argmax(1) == data.test_labels).float().mean().item()


def evaluate(encoder, data, args):
    """Every block, frozen -> a row of accuracies on test each, none without labels: kNN and linear probe of its feature
    map, pooled to 2 x 2, and the classifiers of the paper's tables 1 and 3."""
    y, test_y, table = data.train_labels, data.test_labels, []
    for number in range(1, len(encoder) + 1) if data.classes else ():
        blocks, rows = encoder[:number], torch.arange(len(y), device=y.device)
        pooled = nn.Sequential(blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        h, test_h = (features(pooled, x) for x in (data.train_images[: len(y)], data.test_images))
        row = {"knn": knn_accuracy(h, y, test_h, test_y), "linear_probe": linear_probe(h, y, test_h, test_y)}
        for kind in ("nonlinear", "conv") if number == 2 else ("nonlinear",):
            row[kind] = train_classifier(kind, blocks, data, rows, args.classifier_epochs, args)
        table.append(row)
    return table


def few_labels(untrained, encoder, data, rows, args):
    """A point of the lecture's figure, with the labels of some rows: a third block and a linear layer trained on two
    pretrained, frozen blocks, and the same network trained from scratch, both as long as authors train the latter."""
    frozen = train_classifier("conv", encoder[:2], data, rows, 2 * args.classifier_epochs, args)
    scratch = train_classifier("conv", untrained[:2], data, rows, 2 * args.classifier_epochs, args, freeze=False)
    return {"labels": len(rows), "frozen": frozen, "from_scratch": scratch}


@torch.no_grad()
def pretext_task(model, images, args):
    """training_step on images that were not trained on, uint8 (M, 3, S, S) -> its terms, means over batches of 500."""
    device = next(model.eval().parameters()).device
    generator = torch.Generator(device).manual_seed(args.seed)
    terms = [training_step(model, x.to(device), args, generator) for x in images.split(500)]
    return {name: torch.stack([line[name] for line in terms]).mean().item() for name in terms[0]}


# === Nothing below is about RotNet: optimizer, several GPUs, run folder, figures, command line ========================
def autocast(device):
    """bfloat16 where the GPU has it, else float16; float32 on other devices."""
    bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16 if bfloat16 else torch.float16, enabled=device.type == "cuda")


def make_optimizer(model, args, steps):
    """The paper's SGD, whose learning rate is divided by 5 three times."""
    options = dict(momentum=0.9, nesterov=True, weight_decay=args.weight_decay, fused=True)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, **options)
    return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [round(f * steps) for f in (0.3, 0.6, 0.8)], 0.2)


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


def save_answers(folder, model, data, args):
    """rotations.png: a column of rotations for a test image of each of ten classes, and under each of them the answer
    and its probability, green if it is right."""
    some = [(data.test_labels == label).nonzero()[0, 0] for label in data.test_labels.unique()[:10]]
    x, labels = rotate_batch(torch.stack([data.test_images[i] for i in some]))
    tiles = F.pad(F.interpolate(x.cpu() / 255, scale_factor=max(1, round(96 / x.shape[3]))), (8, 8, 8, 24), value=1.0)
    sheet = torchvision.transforms.functional.to_pil_image(torchvision.utils.make_grid(tiles, len(some), padding=0))
    for i, p in enumerate(features(model, x).softmax(1)):
        place = i % len(some) * tiles.shape[3] + 8, (i // len(some) + 1) * tiles.shape[2] - 22
        color = "green" if p.argmax() == labels[i] else "red"
        ImageDraw.Draw(sheet).text(place, f"{90 * p.argmax()}°  {p.max():.0%}", fill=color, font_size=14)
    if RANK == 0:
        sheet.save(folder / "rotations.png")


SHAPES = dict(encoder="small", epochs=4, batch_size=32, shift=0.0625, classifier_epochs=5, eval_every=2)
SMALL = dict(image_size=32, epochs=2, batch_size=64, classifier_epochs=2, eval_every=1)


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
    args.batch_size = args.batch_size if "batch_size" in args.typed else min(args.batch_size, M // WORLD * WORLD)
    if args.batch_size > M or args.batch_size % WORLD:
        raise UserError(f"--batch-size {args.batch_size}: at most the {M} images, in equal parts for {WORLD} processes")
    subsets = [common.labelled_rows(y, amount, args.seed) for amount in args.labels]
    torch.manual_seed(args.seed)
    layout = torch.preserve_format if device.type == "mps" else torch.channels_last  # as of common.normalize
    model = build_rotnet(args).to(device, memory_format=layout)
    if WORLD > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    initial = copy.deepcopy(model)
    if args.compile:
        model.compile()

    def monitor():  # kNN of block 2 on a tenth of the training labels, from the others: what recipes are chosen by
        blocks, order = nn.Sequential(model.encoder[:2], nn.AdaptiveAvgPool2d(2)), torch.Generator().manual_seed(0)
        h = features(blocks, data.train_images[: len(y)]).flatten(1)
        held, rest = torch.randperm(len(y), generator=order).to(device).tensor_split([len(y) // 10])
        return {"knn": knn_accuracy(h[rest], y[rest], h[held], y[held])}

    with common.compile_operators(args.compile), run_folder(args) as folder:
        print(f"{METHOD} on {args.dataset}: {M} images, {S} x {S}, {len(y)} labels; {device}; {folder}", flush=True)
        untrained = evaluate(initial.encoder, data, args)
        history = pretrain(model, data.train_images, args, monitor if data.classes else dict)
        print("measuring", flush=True)
        trained, task = evaluate(model.encoder, data, args), pretext_task(model, data.test_images, args)
        few = [few_labels(initial.encoder, model.encoder, data, rows, args) for rows in subsets]
        seconds = [line["seconds"] for line in history]
        summary = {
            "method": METHOD,
            "command": args.command,
            "args": dataclasses.asdict(args),
            "date": time.strftime("%Y-%m-%d"),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "parameters": sum(p.numel() for p in model.encoder.parameters()),
            "images_per_second": M // args.batch_size * args.batch_size / sorted(seconds)[len(seconds) // 2],
            "pretrain_seconds": sum(seconds),
            "total_seconds": time.perf_counter() - start,
            "untrained": untrained[1] if untrained else {},  # block 2
            "trained": trained[1] if trained else {},
            "pretext_task": task,
            "blocks": {"untrained": untrained, "trained": trained},
            "semi_supervised": few,
            "history": history,
        }
        save(folder / "encoder.pt", model.encoder.state_dict())
        save(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        save_answers(folder, model, data, args)
    for number, (before, after) in enumerate(zip(untrained, trained, strict=True), 1):
        print(f"block {number}  " + "  ".join(f"{name} {before[name]:.1%} -> {after[name]:.1%}" for name in before))
    print("pretext task on test images: " + "  ".join(f"{name} {value:.4g}" for name, value in task.items()))
    for row in few:
        print("  ".join(f"{name} {value:{'' if name == 'labels' else '.1%'}}" for name, value in row.items()))
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
