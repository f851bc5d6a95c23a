"""RotNet: to tell by how much a picture was turned, one must know what is in it and which way it stands.

Every picture of a batch is turned by 0, 90, 180 and 270 degrees, and a network says of each of the four which it is.
Nobody says what the pictures show: the turn is the label, and it is free. What a classifier reads afterwards are the
feature maps of an early block, since the last ones specialise in turns.

    Gidaris, Singh, Komodakis: Unsupervised Representation Learning by Predicting Image Rotations, ICLR 2018.
    The objective of its section 2; "predict rotations" in the lecture. g(x, y) is the picture x after y quarter turns:

    L = mean over pictures x of  1/4 sum_{y = 0..3} -log F^y(g(x, y))       F^y the predicted probability of turn y

    python rotnet.py                                       shapes drawn by code, on two CPU cores
    python rotnet.py --dataset cifar10                     the paper's Network in Network, on a GPU
    python rotnet.py --dataset cifar10 --encoder small     a small one, on two CPU cores
    python rotnet.py --dataset path/to/pictures            pictures of your own, see README.md
    python rotnet.py --labels 20 100 400                   the lecture's semi-supervised figure, as a table

Linear probe on test, untrained -> trained, on two CPU cores (2026-11-25, torch 2.14.1; records in results/):

    shapes, block 2     46.6 -> 99.1 %, 47.5 -> 98.8 %, 46.8 -> 98.8 % with seeds 0, 1, 2; 85 to 101 s
    cifar10, block 2    47.3 -> 57.3 % with the small encoder and seed 0; 15 min
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
from PIL import Image, ImageDraw
from torch import nn

import common
from common import UserError

METHOD = "rotnet"

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
    encoder: str = flag(
        "nin", "nin: the paper's; small: a third as wide, its stem with stride 2", choices=("small", "nin")
    )
    blocks: int = flag(4, "of three convolutions each; paper: 3, 4 or 5, and 4 is best", choices=(3, 4, 5))
    rotations: int = flag(4, "by 0, 90, 180, 270 degrees, or by 0, 180; paper: 4 is best", choices=(2, 4))
    epochs: int = flag(200, "passes over the training pictures; paper: 200", 1)
    batch_size: int = flag(128, "pictures N a step, each in all rotations; paper: 128", 2)
    lr: float = flag(0.1, "learning rate of SGD, a fifth of it after 30, 60 and 80 %% of the steps; paper: 0.1", 0)
    weight_decay: float = flag(5e-4, "of all parameters; paper: 5e-4", 0)
    padding: int = flag(4, "pixels that a picture may be shifted by before it is turned; paper: 4", 0, 64)
    classifier_epochs: int = flag(100, "training of a classifier, in passes over all labels; paper: 100", 1, free=True)
    labels: list = flag((), "semi-supervised table: shares of each class up to 1, or numbers a class", 0, free=True)
    fine_tune: bool = flag(False, "in this table, also train all blocks from the pretrained ones", free=True)
    eval_every: int = flag(10, "epochs between two kNN measurements on held-out training pictures", 1, free=True)
    seed: int = flag(0, "fixes initial weights, batches, crops and the choice of labels", 0, 2**31)
    device: str = flag("auto", "auto: cuda, else mps, else cpu", free=True)
    compile: bool = flag(None, "torch.compile for the network and the crops; without the flag on cuda alone", free=True)
    out: str = flag("auto", "run folder; auto: runs/<method>-<dataset>-seed<seed>", free=True)
    resume: str = flag("", "go on from the last checkpoint of --out, or of the run folder named here", free=True)


# What differs from the defaults above, by data set; the recipes for two CPU cores are chosen by one flag.
LARGE = dict(epochs=50, padding=12)
SMALL = dict(blocks=3, epochs=2, batch_size=64, classifier_epochs=1, eval_every=2)
RECIPES = {
    "shapes": dict(encoder="small", blocks=3, epochs=4, batch_size=32, padding=2, classifier_epochs=2, eval_every=2),
    "cifar10": dict(),
    "cifar10 --encoder small": SMALL,
    "cifar100": dict(),
    "cifar100 --encoder small": SMALL,
    "stl10": LARGE,
    "stl10 --encoder small": SMALL | dict(image_size=32),
    "path": LARGE,
    "path --encoder small": SMALL | dict(image_size=32, epochs=20, classifier_epochs=10),
}


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


def rotate_batch(images, rotations=4):
    """Every image turned counter-clockwise by every angle: (N, C, S, S) -> (rotations N, C, S, S), labels.

    First all images as they are, then all turned once, and so on; labels (rotations N,) count from 0. The angles are
    0, 90, 180 and 270 degrees, or 0 and 180. A turn by 90 degrees needs no interpolation and leaves no trace in
    the pixels that would give it away (paper, section 2.2).
    """
    turned = [images.rot90(turns, (2, 3)) for turns in range(0, 4, 4 // rotations)]
    labels = torch.arange(rotations, device=images.device).repeat_interleave(len(images))
    return torch.cat(turned), labels


def shifted(images, args, generator):
    """uint8 (N, 3, S, S) -> float in [0, 1], shifted and mirrored at random: what is done before turning."""
    return common.random_crop(images / 255, args.padding, generator)


def network_input(x):
    """Images in [0, 1] as an encoder takes them: normalised, and in the layout that convolutions like best."""
    return common.normalize(x).contiguous(memory_format=torch.channels_last)


# === Model ==========================================================================================================


def nin_block(channels, kernel_size, stride=1, pool=None):
    """A block of Network in Network: a convolution and two of 1x1, each with batch norm and ReLU, and a pool.

    channels: of the input and of the three outputs. The initialisation is that of the authors' code.
    """
    layers = []
    for c_in, c_out, k, s in zip(channels, channels[1:], (kernel_size, 1, 1), (stride, 1, 1), strict=False):
        layers += [nn.Conv2d(c_in, c_out, k, s, k // 2, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]
        nn.init.kaiming_normal_(layers[-3].weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(*layers, *([pool] if pool else []))


def build_nin(name, blocks=4):
    """The paper's Network in Network without its classifier, as nn.Sequential of blocks, and its channels D.

    nin: of 32 x 32 pixels block 1 makes (96, 16, 16), every later one (192, 8, 8). small: (64, 8, 8), (64, 4, 4).
    """
    D, second, third, stride = (64, 64, 64, 2) if name == "small" else (192, 160, 96, 1)
    first_pool, second_pool = nn.MaxPool2d(3, stride=2, padding=1), nn.AvgPool2d(3, stride=2, padding=1)
    encoder = nn.Sequential(
        nin_block((3, D, second, third), 5, stride, first_pool),
        nin_block((third, D, D, D), 5, pool=second_pool),
        *(nin_block((D, D, D, D), 3) for _ in range(blocks - 2)),
    )
    return encoder, D


class RotNet(nn.Module):
    """Blocks and a linear layer: (B, 3, S, S) -> logits of the rotations (B, rotations)."""

    def __init__(self, args):
        super().__init__()
        self.encoder, D = build_nin(args.encoder, args.blocks)
        self.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(D, args.rotations))

    def forward(self, x):
        return self.classifier(self.encoder(x))  # (B, rotations)


# === Pretrain =======================================================================================================


def autocast(device):
    """bfloat16 for the network on a GPU; losses and the state of the optimizer stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def sgd(model, args, steps):
    """The paper's optimizer for what can be trained in a model, and its learning rate: three times down to a fifth."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        parameters, args.lr, momentum=0.9, weight_decay=args.weight_decay, nesterov=True, fused=True
    )
    drops = [round(share * steps) for share in (0.3, 0.6, 0.8)]
    return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, drops, gamma=0.2)


def pretrain(model, images, args, run, monitor):
    """Learns to tell rotations of images, uint8 (M, 3, S, S). There are no labels here; monitor() -> metrics."""
    device, N = next(model.parameters()).device, args.batch_size
    steps = len(images) // N  # an epoch leaves out an incomplete last batch
    optimizer, schedule = sgd(model, args, args.epochs * steps)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    generator = torch.Generator(device)
    for epoch in range(run.restore(parts) + 1, args.epochs + 1):
        start = time.perf_counter()
        model.train()
        generator.manual_seed(args.seed * 100_000 + epoch)  # an epoch's draws depend on nothing before it
        order = torch.randperm(len(images), generator=generator, device=device)
        losses, right = torch.zeros(2, steps, device=device)
        for step, batch in enumerate(common.batches(images, order, N, device)):  # (N, 3, S, S)
            x, labels = rotate_batch(shifted(batch, args, generator), args.rotations)  # (4N, 3, S, S), (4N,)
            with autocast(device):
                logits = model(network_input(x))  # (4N, 4)
            loss = F.cross_entropy(logits.float(), labels)  # the mean over all turns of all pictures
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses[step] = loss.detach()
            right[step] = (logits.argmax(1) == labels).float().mean()
            run.foresee(step, losses)
        loss = run.mean_loss(losses, epoch)  # the one wait for the device in an epoch
        seconds = time.perf_counter() - start
        metrics = {"loss": loss, "rotation": right.mean().item(), "images_per_second": steps * N / seconds}
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


def pooled(blocks):
    """The features of the last of these blocks that kNN and linear probe read: the map's mean in each quarter."""
    return nn.Sequential(blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten())


def nonlinear_classifier(shape, classes):
    """The paper's three layers on the whole feature map, shape (C, H, W): 200-200-10 for ten classes."""
    hidden = min(20 * classes, 2048)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(shape), hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True),
        nn.Linear(hidden, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True),
        nn.Linear(hidden, classes),
    )  # fmt: skip


def conv_classifier(shape, classes):
    """The paper's convolutional classifier of feature maps (C, H, W): one more block, and a linear layer."""
    C = shape[0]
    return nn.Sequential(nin_block((C, C, C, C), 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, classes))


def train_classifier(blocks, classifier, data, rows, args, freeze=True):
    """Trains one of these classifiers on blocks with the labels of some rows -> accuracy on test.

    The blocks are frozen or, in a copy, trained as well. Shifts and flips, and the optimizer, are those of
    pretraining; the steps are as many for few labels as for all: classifier_epochs times the pictures with labels.
    """
    device, N = data.train_labels.device, min(args.batch_size, len(rows))
    steps = args.classifier_epochs * max(1, len(data.train_labels) // args.batch_size)
    torch.manual_seed(args.seed)
    shape = features(blocks, data.test_images[:1]).shape[1:]  # (C, H, W)
    model = nn.Sequential(copy.deepcopy(blocks), classifier(shape, len(data.classes)).to(device)).train()
    if freeze:
        model[0].eval().requires_grad_(False)
    optimizer, schedule = sgd(model, args, steps)
    generator, whole, order = torch.Generator(device).manual_seed(args.seed), len(rows) // N * N, []
    while len(order) * whole < steps * N:
        order.append(rows[torch.randperm(len(rows), generator=generator, device=device)[:whole]])
    order = torch.cat(order)[: steps * N]
    for index, batch in zip(order.split(N), common.batches(data.train_images, order, N, device), strict=True):
        x = network_input(shifted(batch, args, generator))  # (N, 3, S, S)
        with autocast(device):
            logits = model(x)  # (N, classes)
        loss = F.cross_entropy(logits.float(), data.train_labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return (features(model, data.test_images).argmax(1) == data.test_labels).sum().item() / len(data.test_labels)


def evaluate(model, data, args):
    """Frozen probes and classifiers of every block -> rows of accuracies on test, the first for block 1."""
    y, test_y, table = data.train_labels, data.test_labels, []
    everything = torch.arange(len(y), device=y.device)
    for number in range(1, args.blocks + 1):
        blocks = model.encoder[:number]
        h, test_h = (features(pooled(blocks), images) for images in (data.train_images[: len(y)], data.test_images))
        row = {"block": number} | probes(h, y, test_h, test_y)
        row["nonlinear"] = train_classifier(blocks, nonlinear_classifier, data, everything, args)
        if number == 2:
            row["conv"] = train_classifier(blocks, conv_classifier, data, everything, args)
        table.append(row)
    return table


def rotation_accuracy(model, images, rotations):
    """The pretext task on pictures that were not trained on, turned but not shifted -> accuracy in [0, 1]."""
    device, right = next(model.parameters()).device, 0
    for batch in images.split(512):
        x, labels = rotate_batch(batch.to(device), rotations)
        right += (features(model, x).argmax(1) == labels).sum().item()
    return right / (rotations * len(images))


def few_labels(scratch, model, data, rows, args):
    """A point of the lecture's semi-supervised figure, for the labels of some rows -> accuracies on test.

    The third block and the linear layer are trained on the first two blocks, pretrained and frozen; and the same
    network is trained from scratch. Both have the same number of steps.
    """
    print(f"training on {len(rows)} labels, on frozen blocks and from scratch", flush=True)

    def accuracy(encoder, freeze):
        return train_classifier(encoder[:2], conv_classifier, data, rows, args, freeze)

    row = {
        "labels": len(rows),
        "frozen": accuracy(model.encoder, True),
        "from_scratch": accuracy(scratch.encoder, False),
    }
    return row | ({"fine_tuned": accuracy(model.encoder, False)} if args.fine_tune else {})


# === Pictures =======================================================================================================


def save_rotations(path, model, images, args):
    """rotations.png: pictures, uint8 (R, 3, S, S), a row each, turned by every angle, and under each what the model
    takes it for and with which probability; green where it is right."""
    x, labels = rotate_batch(images, args.rotations)
    p = features(model, x).softmax(1).cpu()  # (4R, 4)
    size, gap, foot, step = 96, 12, 18, 360 // args.rotations
    page = Image.new("RGB", (args.rotations * (size + gap) + gap, len(images) * (size + foot + gap) + gap), "white")
    draw = ImageDraw.Draw(page)
    for i, (image, label) in enumerate(zip(x.cpu(), labels.tolist(), strict=True)):
        left, top = gap + label * (size + gap), gap + i % len(images) * (size + foot + gap)
        tile = Image.fromarray(image.permute(1, 2, 0).numpy())
        page.paste(tile.resize((size, size), Image.Resampling.NEAREST), (left, top))
        guess = p[i].argmax().item()
        text = f"{guess * step}°  {p[i, guess]:.0%}"
        draw.text((left, top + size + 2), text, fill="green" if guess == label else "red", font_size=13)
    page.save(path)


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
    """Loads, measures the untrained encoder, pretrains, measures again -> the content of summary.json."""
    start = time.perf_counter()
    device = pick_device(args.device)
    data = common.load_dataset(args.dataset, args.data_dir, args.image_size).to(device)
    M, _, S, _ = data.train_images.shape
    if args.batch_size > M:
        raise UserError(f"--batch-size {args.batch_size}: {args.dataset} has only {M} training pictures")
    amounts = args.labels or [1.0] * args.fine_tune
    if amounts and not data.classes:
        raise UserError(f"--labels and --fine-tune: {args.dataset} has no classes, no folders train/<class>")
    subsets = [common.labelled_rows(data.train_labels, amount, args.seed) for amount in amounts]
    run = Run(args)
    print(f"{METHOD} on {args.dataset}: {M} pictures, {S} x {S}, {len(data.train_labels)} of them with labels; "
          f"{device}; results go to {run.folder}", flush=True)  # fmt: skip
    if not data.classes:
        print("there are no train/<class> folders, so the probes are skipped")
    if device.type == "cpu" and args.encoder != "small":
        print(f"{args.encoder} is made for a GPU; the recipe for a CPU is --encoder small")

    torch.manual_seed(args.seed)
    model = RotNet(args).to(device, memory_format=torch.channels_last)
    scratch = copy.deepcopy(model)
    if args.compile or (args.compile is None and device.type == "cuda"):
        model.compile()
        common.compile_operators()
    untrained = evaluate(scratch, data, args) if data.classes else []

    def monitor():
        """kNN on block 2 of a tenth of the training pictures among the rest: what recipes are chosen by."""
        if not data.classes:
            return {}
        labels, held = data.train_labels, torch.arange(len(data.train_labels), device=device) % 10 == 0
        h = features(pooled(model.encoder[:2]), data.train_images[: len(labels)])
        return {"knn": knn_accuracy(h[~held], labels[~held], h[held], labels[held])}

    pretrain(model, data.train_images, args, run, monitor)
    trained = evaluate(model, data, args) if data.classes else []
    few = [few_labels(scratch, model, data, rows, args) for rows in subsets]
    shown = data.train_images[:8]
    if data.classes:  # a test picture of each class
        first = [(data.test_labels == label).nonzero()[0, 0].item() for label in data.test_labels.unique()[:10]]
        shown = data.test_images[first]
    save_rotations(run.folder / "rotations.png", model, shown.to(device), args)
    results = {"untrained": {}, "trained": {}, "semi_supervised": few}
    if data.classes:
        rotation = rotation_accuracy(model, data.test_images, args.rotations)
        blocks = {"untrained": untrained, "trained": trained}
        results |= {"untrained": untrained[1], "trained": trained[1] | {"rotation": rotation}, "blocks": blocks}
        blank = dict.fromkeys(("encoder", *trained[1]), "")
        print_table([blank | {"encoder": name} | row for name, rows in blocks.items() for row in rows])
        print(f"rotations of test pictures told right: {rotation:.1%}")
    if few:
        print_table(few)
    return run.finish(start, device, model.encoder, results)


if __name__ == "__main__":
    try:
        main(parse_args())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command with --resume goes on from the last whole epoch", file=sys.stderr)
        sys.exit(130)
