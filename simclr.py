"""SimCLR: two random views of a picture shall lie closer to each other than to any other picture.

Every picture of a batch is augmented twice. An encoder f turns each view into a representation h, a small head g
turns h into a projection z, and of the 2N - 1 other projections of the batch each must pick out its partner. After
pretraining g is thrown away: what a classifier reads is h.

    Chen, Kornblith, Norouzi, Hinton: A Simple Framework for Contrastive Learning of Visual Representations,
    ICML 2020. Algorithm 1 of the paper and of the lecture, for the views i and j of one picture:

    s(i, j) = z_i . z_j / (|z_i| |z_j|)
    l(i, j) = -log( exp(s(i, j) / t) / sum_{k != i} exp(s(i, k) / t) )       k over all 2N views, t the temperature
    L = mean of l(i, j) over the 2N ordered pairs

    python simclr.py                                       shapes drawn by code, on two CPU cores
    python simclr.py --dataset cifar10                     ResNet-18, on a GPU
    python simclr.py --dataset cifar10 --encoder small     a small ResNet, on two CPU cores
    python simclr.py --dataset path/to/pictures            pictures of your own, see README.md
    python simclr.py --labels 0.01 0.1 --fine-tune         the lecture's semi-supervised table

Linear probe on test, untrained -> trained, on two CPU cores (2026-11-25, torch 2.14.1; records in results/):

    shapes                       41.4 -> 90.2 %, 38.2 -> 88.8 %, 39.6 -> 85.1 % with seeds 0, 1, 2; 100 to 110 s
    cifar10 --encoder small      44.2 -> 59.2 % with seed 0; 13 minutes of pretraining
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

import common
from common import UserError

METHOD = "simclr"

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
    encoder: str = flag("resnet18", "paper: resnet50", choices=("small", "resnet18", "resnet34", "resnet50"))
    epochs: int = flag(200, "passes over the training pictures; paper: 100 to 1000", 1)
    batch_size: int = flag(512, "pictures N a step, each in two views; paper: 256 to 8192", 2)
    lr: float = flag(1e-3, "peak learning rate of AdamW; the paper's LARS is for batches of thousands", 0)
    weight_decay: float = flag(1e-2, "of weight matrices, neither of norms nor of biases", 0)
    warmup: float = flag(0.05, "share of the steps in which the learning rate rises; paper: 10 epochs", 0, 0.9)
    temperature: float = flag(0.5, "t; paper: 0.1 on ImageNet, 0.5 on CIFAR-10", 0.01)
    projection: str = flag("mlp", "the head g; paper: mlp", choices=("none", "linear", "mlp"))
    projection_dim: int = flag(128, "size of z; paper: 128", 1)
    crop: float = flag(0.08, "smallest share of a picture that a view shows; paper: 0.08", 0.01, 1)
    jitter_strength: float = flag(0.5, "of colour jitter; paper: 1 on ImageNet, 0.5 on CIFAR-10", 0, 2.5)
    gray: float = flag(0.2, "share of the views without colour; paper: 0.2", 0, 1)
    blur: float = flag(0.0, "share of the views that are blurred; paper: 0.5 on ImageNet, none on CIFAR-10", 0, 1)
    labels: list = flag((), "probe with few labels too: shares of each class up to 1, or numbers a class", 0, free=True)
    fine_tune: bool = flag(False, "with these labels, also fine-tune, and train from scratch", free=True)
    eval_every: int = flag(10, "epochs between two kNN measurements on held-out training pictures", 1, free=True)
    seed: int = flag(0, "fixes initial weights, batches, augmentations and the choice of labels", 0, 2**31)
    device: str = flag("auto", "auto: cuda, else mps, else cpu", free=True)
    compile: bool = flag(None, "torch.compile for network and augmentations; without the flag on cuda alone", free=True)
    out: str = flag("auto", "run folder; auto: runs/<method>-<dataset>-seed<seed>", free=True)
    resume: str = flag("", "go on from the last checkpoint of --out, or of the run folder named here", free=True)


# What differs from the defaults above, by data set; the recipes for two CPU cores are chosen by one flag.
IMAGENET = dict(batch_size=256, epochs=100, temperature=0.1, jitter_strength=1.0, blur=0.5)
SMALL = dict(batch_size=128, epochs=8, temperature=0.1, crop=0.2, eval_every=2)
RECIPES = {
    "shapes": dict(encoder="small", epochs=12, batch_size=64, weight_decay=0.05, temperature=0.1,
                   crop=0.8, jitter_strength=1.0, gray=0.5, eval_every=4),
    "cifar10": dict(),
    "cifar10 --encoder small": SMALL,
    "cifar100": dict(),
    "cifar100 --encoder small": SMALL,
    "stl10": IMAGENET,
    "stl10 --encoder small": SMALL | dict(image_size=32, epochs=4, eval_every=1),
    "path": IMAGENET,
    "path --encoder small": SMALL | dict(image_size=32, epochs=20, batch_size=64),
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


def two_views(images, args, generator):
    """uint8 (N, 3, S, S) -> float (2N, 3, S, S) in [0, 1]: first views of all pictures, then second ones.

    Crop, flip, colour jitter, grey and blur, in the order of the paper's appendix A.
    """
    x, s = images.repeat(2, 1, 1, 1) / 255, args.jitter_strength
    x = common.random_resized_crop(x, x.shape[3], generator, scale=(args.crop, 1.0))
    x = common.random_color_jitter(x, generator, 0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)
    x = common.random_grayscale(x, generator, args.gray)
    return common.random_gaussian_blur(x, generator, p=args.blur) if args.blur else x


def network_input(x):
    """Images in [0, 1] as an encoder takes them: normalised, and in the layout that convolutions like best."""
    return common.normalize(x).contiguous(memory_format=torch.channels_last)


# === Model ==========================================================================================================


def build_encoder(name, image_size=32, norm_layer=nn.BatchNorm2d):
    """torchvision's ResNet without its classifier, (B, 3, S, S) -> (B, D), and D.

    small: one basic block in each of the first two stages, D = 128. For pictures of up to 64 pixels the others have a
    3x3 convolution for a stem and no max pool (SimCLR, appendix B.9), since ResNet's own leaves 8 x 8 of 32 x 32
    pixels; D = 512, or 2048 for resnet50.
    """
    if name == "small":
        encoder = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], norm_layer=norm_layer)
        encoder.layer3 = encoder.layer4 = nn.Identity()
        D = 128
    else:
        encoder = getattr(torchvision.models, name)(norm_layer=norm_layer)
        D = encoder.fc.in_features
        if image_size <= 64:
            encoder.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
            nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
            encoder.maxpool = nn.Identity()
    encoder.fc = nn.Identity()
    return encoder, D


class SimCLR(nn.Module):
    """Encoder f and projection head g: (B, 3, S, S) -> z (B, projection_dim), or h (B, D) without a head."""

    def __init__(self, args, image_size=32):
        super().__init__()
        self.encoder, D = build_encoder(args.encoder, image_size)
        if args.projection == "none":
            self.projector = nn.Identity()
        elif args.projection == "linear":
            self.projector = nn.Linear(D, args.projection_dim)
        else:
            self.projector = nn.Sequential(
                nn.Linear(D, D, bias=False),
                nn.BatchNorm1d(D),
                nn.ReLU(inplace=True),
                nn.Linear(D, args.projection_dim),
            )

    def forward(self, x):
        h = self.encoder(x)  # (B, D)
        return self.projector(h)  # (B, projection_dim)


# === Loss ===========================================================================================================


def nt_xent(z1, z2, temperature):
    """Normalised temperature-scaled cross-entropy: equation 1 of the paper, the lecture's algorithm 1.

    z1, z2 (N, D): projections of the two views of N pictures, of any length -> scalar, in nats. This is InfoNCE with
    2N - 2 negatives, so log(2N - 1) - loss is a lower bound of the mutual information between two views.
    """
    z = F.normalize(torch.cat([z1, z2]), dim=1)  # (2N, D)
    logits = z @ z.T / temperature  # (2N, 2N), s(i, k) / t
    logits.fill_diagonal_(-math.inf)  # k != i
    partner = torch.arange(len(z), device=z.device).roll(len(z1))  # (2N,), the j of each i
    return F.cross_entropy(logits, partner)


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


def pretrain(model, images, args, run, monitor):
    """The lecture's algorithm 1 on images, uint8 (M, 3, S, S). There are no labels here; monitor() -> metrics."""
    device, N = next(model.parameters()).device, args.batch_size
    steps = len(images) // N  # an epoch leaves out an incomplete last batch
    optimizer, schedule = adamw(model, args, args.epochs * steps)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    generator = torch.Generator(device)
    for epoch in range(run.restore(parts) + 1, args.epochs + 1):
        start = time.perf_counter()
        model.train()
        generator.manual_seed(args.seed * 100_000 + epoch)  # an epoch's draws depend on nothing before it
        order = torch.randperm(len(images), generator=generator, device=device)
        losses = torch.zeros(steps, device=device)
        for step, batch in enumerate(common.batches(images, order, N, device)):  # (N, 3, S, S)
            x = network_input(two_views(batch, args, generator))  # (2N, 3, S, S)
            with autocast(device):
                z = model(x)  # (2N, projection_dim)
            z1, z2 = z.float().chunk(2)
            loss = nt_xent(z1, z2, args.temperature)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses[step] = loss.detach()
            run.foresee(step, losses)
        loss = run.mean_loss(losses, epoch)  # the one wait for the device in an epoch
        seconds = time.perf_counter() - start
        metrics = {"loss": loss, "bound": math.log(2 * N - 1) - loss, "images_per_second": steps * N / seconds}
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


def evaluate(model, data, head):
    """Frozen probes of h, and of z if asked for a head that is there -> accuracies on test; h of train and test."""
    if not data.classes:
        return {}, None
    y, test_y = data.train_labels, data.test_labels
    h, test_h = features(model.encoder, data.train_images[: len(y)]), features(model.encoder, data.test_images)
    accuracies = probes(h, y, test_h, test_y)
    if head and not isinstance(model.projector, nn.Identity):
        with torch.no_grad():
            z, test_z = (model.projector.eval()(x) for x in (h, test_h))
        accuracies |= {f"{name}_z": value for name, value in probes(z, y, test_z, test_y).items()}
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
    save_views(run.folder / "views.png", data.train_images[:8].to(device), args)

    torch.manual_seed(args.seed)
    model = SimCLR(args, S).to(device, memory_format=torch.channels_last)
    scratch = copy.deepcopy(model)
    if args.compile or (args.compile is None and device.type == "cuda"):
        model.compile()
        common.compile_operators()
    untrained, before = evaluate(scratch, data, head=False)

    def monitor():
        """kNN of a tenth of the training pictures among the rest: what recipes are chosen by."""
        if not data.classes:
            return {}
        labels, held = data.train_labels, torch.arange(len(data.train_labels), device=device) % 10 == 0
        h = features(model.encoder, data.train_images[: len(labels)])
        return {"knn": knn_accuracy(h[~held], labels[~held], h[held], labels[held])}

    pretrain(model, data.train_images, args, run, monitor)
    trained, after = evaluate(model, data, head=True)
    few = [semi_supervised(scratch.encoder, model.encoder, data, after, rows, args) for rows in subsets]
    if data.classes:
        save_neighbours(run.folder / "neighbours.png", data, before, after)
        print_table(
            [{"on test": name, "untrained": untrained.get(name, ""), "trained": trained[name]} for name in trained]
        )
    if few:
        print_table(few)
    return run.finish(
        start, device, model.encoder, {"untrained": untrained, "trained": trained, "semi_supervised": few}
    )


if __name__ == "__main__":
    try:
        main(parse_args())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command with --resume goes on from the last whole epoch", file=sys.stderr)
        sys.exit(130)
