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
    python simclr.py --dataset pictures.npz                pictures of your own, see README.md

Linear probe on test, untrained -> trained, on two CPU cores (2026-11-25, torch 2.14.1; records in results/):

    shapes                       41.4 -> 90.1 %, 38.2 -> 86.9 %, 39.6 -> 86.9 % with seeds 0, 1, 2; 78 to 97 s
    cifar10 --encoder small      44.2 -> 59.2 % with seed 0; 11 minutes
"""

import argparse
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
from torch import nn

import common
from common import UserError

METHOD = "simclr"

# ======================================================================================================
# Arguments
# ======================================================================================================


def flag(default, text, low=None, high=math.inf, choices=None):
    """A field of Args: its default, its help, and for a number its range, ends included."""
    bounds = "" if low is None else f"at least {low}" if high == math.inf else f"from {low} to {high}"
    metadata = {"text": text, "choices": choices, "low": low, "high": high, "bounds": bounds}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class Args:
    dataset: str = flag("shapes", "shapes, cifar10, or the path of an .npz file with MedMNIST's keys")
    data_dir: str = flag("data", "folder where downloads are kept")
    encoder: str = flag("resnet18", "paper: resnet50", choices=("small", "resnet18", "resnet34", "resnet50"))
    epochs: int = flag(200, "passes over the training pictures; paper: 100 to 1000", 1)
    batch_size: int = flag(512, "pictures N a step, each in two views; paper: 256 to 8192", 2)
    lr: float = flag(1e-3, "peak learning rate of AdamW; the paper's LARS is for batches of thousands", 0)
    weight_decay: float = flag(1e-2, "of weight matrices, neither of norms nor of biases", 0)
    warmup: float = flag(0.05, "share of the steps in which the learning rate rises; paper: 10 epochs", 0, 0.9)
    temperature: float = flag(0.5, "t; paper: 0.1 on ImageNet, 0.5 on CIFAR-10", 0.01)
    projection_dim: int = flag(128, "size of z; paper: 128", 1)
    crop: float = flag(0.08, "smallest share of a picture that a view shows; paper: 0.08", 0.01, 1)
    jitter: float = flag(0.5, "strength of the colour jitter; paper: 1 on ImageNet, 0.5 on CIFAR-10", 0, 2.5)
    gray: float = flag(0.2, "share of the views without colour; paper: 0.2", 0, 1)
    blur: float = flag(0.0, "share of the views that are blurred; paper: 0.5 on ImageNet, none on CIFAR-10", 0, 1)
    eval_every: int = flag(10, "epochs between two kNN measurements on held-out training pictures", 1)
    seed: int = flag(0, "fixes initial weights, batches and augmentations", 0, 2**31)
    device: str = flag("auto", "auto: cuda, else mps, else cpu")
    out: str = flag("auto", "run folder; auto: runs/<method>-<dataset>-seed<seed>")


# What differs from the defaults above, by data set; the recipes for two CPU cores are chosen by one flag.
RECIPES = {
    "shapes": dict(encoder="small", epochs=12, batch_size=64, weight_decay=0.05, temperature=0.1,
                   crop=0.8, jitter=1.0, gray=0.5, eval_every=4),
    "cifar10": dict(),
    "cifar10 --encoder small": dict(epochs=8, batch_size=128, temperature=0.1, crop=0.2, eval_every=2),
}  # fmt: skip


def parse_args(argv=None):
    """The command line over the recipe of its data set (that of cifar10 for pictures of one's own) -> Args.

    Raises UserError for an unknown flag and for a value that is out of its range.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False, allow_abbrev=False
    )

    def error(message):
        raise UserError(message)

    parser.error = error
    for field in dataclasses.fields(Args):
        text, choices, _, _, bounds = field.metadata.values()
        name, notes = "--" + field.name.replace("_", "-"), f"%(default)s, {bounds}" if bounds else "%(default)s"
        parser.add_argument(name, type=field.type, default=field.default, choices=choices, help=f"{text} ({notes})")
    given, _ = parser.parse_known_args(argv)
    recipe = given.dataset if given.dataset in RECIPES else "cifar10"
    if given.encoder == "small" and recipe != "shapes":
        recipe += " --encoder small"
    parser.set_defaults(**RECIPES[recipe])
    parser.add_argument("-h", "--help", action="help", help="show this help, with the recipe of --dataset in brackets")
    args = Args(**vars(parser.parse_args(argv)))
    for field in dataclasses.fields(Args):
        _, _, low, high, bounds = field.metadata.values()
        value = getattr(args, field.name)
        if bounds and not (low <= value <= high and math.isfinite(value)):
            raise UserError(f"--{field.name.replace('_', '-')} {value}: must be {bounds}")
    if args.out == "auto":
        args.out = f"runs/{METHOD}-{Path(args.dataset).stem}-seed{args.seed}"
    return args


# ======================================================================================================
# Views
# ======================================================================================================


def two_views(images, args, generator):
    """uint8 (N, 3, S, S) -> float (2N, 3, S, S) in [0, 1]: first views of all pictures, then second ones.

    Crop, flip, colour jitter, grey and blur, in the order of the paper's appendix A.
    """
    x, s = images.repeat(2, 1, 1, 1) / 255, args.jitter
    x = common.random_resized_crop(x, x.shape[3], generator, scale=(args.crop, 1.0))
    x = common.random_color_jitter(x, generator, 0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)
    x = common.random_grayscale(x, generator, args.gray)
    return common.random_gaussian_blur(x, generator, p=args.blur) if args.blur else x


def network_input(x):
    """Images in [0, 1] as an encoder takes them: normalised, and in the layout that convolutions like best."""
    return common.normalize(x).contiguous(memory_format=torch.channels_last)


# ======================================================================================================
# Model
# ======================================================================================================


def build_encoder(name):
    """torchvision's ResNet without its classifier, (B, 3, S, S) -> (B, D), and D.

    small: one basic block in each of the first two stages, D = 128, with ResNet's own stem. The others have a stem
    for small pictures, a 3x3 convolution and no max pool (SimCLR, appendix B.9), since 7x7 and pool leave 8 x 8 of
    32 x 32 pixels; D = 512, or 2048 for resnet50.
    """
    if name == "small":
        encoder = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
        encoder.layer3 = encoder.layer4 = nn.Identity()
        D = 128
    else:
        encoder = getattr(torchvision.models, name)()
        encoder.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()
        D = encoder.fc.in_features
    encoder.fc = nn.Identity()
    return encoder, D


class SimCLR(nn.Module):
    """Encoder f and projection head g: (B, 3, S, S) -> z (B, projection_dim)."""

    def __init__(self, args):
        super().__init__()
        self.encoder, D = build_encoder(args.encoder)
        self.projector = nn.Sequential(
            nn.Linear(D, D, bias=False),
            nn.BatchNorm1d(D),
            nn.ReLU(inplace=True),
            nn.Linear(D, args.projection_dim),
        )

    def forward(self, x):
        h = self.encoder(x)  # (B, D)
        return self.projector(h)  # (B, projection_dim)


# ======================================================================================================
# Loss
# ======================================================================================================


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


# ======================================================================================================
# Pretrain
# ======================================================================================================


def autocast(device):
    """bfloat16 for the network on a GPU; losses and the state of the optimizer stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def warmup_cosine(step, steps, warmup):
    """The factor on the learning rate: a linear rise over the share `warmup` of the steps, then half a cosine to 0."""
    rise = warmup * steps
    return (step + 1) / (rise + 1) if step < rise else 0.5 + 0.5 * math.cos(math.pi * (step - rise) / (steps - rise))


def adamw(model, args):
    """AdamW that decays matrices and kernels only: norms and biases are the parameters of one dimension."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, args.lr, weight_decay=args.weight_decay, fused=True)


def pretrain(model, images, args, run, monitor):
    """The lecture's algorithm 1 on images, uint8 (M, 3, S, S). There are no labels here; monitor() -> metrics."""
    device, N = images.device, args.batch_size
    steps = len(images) // N  # an epoch leaves out an incomplete last batch
    optimizer = adamw(model, args)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, args.epochs * steps, args.warmup)
    )
    generator = torch.Generator(device)
    for epoch in range(1, args.epochs + 1):
        start = time.perf_counter()
        model.train()
        generator.manual_seed(args.seed * 100_000 + epoch)  # an epoch's draws depend on nothing before it
        order = torch.randperm(len(images), generator=generator, device=device)
        losses = torch.zeros(steps, device=device)
        for step in range(steps):
            batch = images[order[step * N : (step + 1) * N]]  # (N, 3, S, S)
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
            if epoch == 1:
                run.foresee(step, losses)
        loss = run.mean_loss(losses, epoch)  # the one wait for the device in an epoch
        seconds = time.perf_counter() - start
        metrics = {"loss": loss, "bound": math.log(2 * N - 1) - loss, "images_per_second": steps * N / seconds}
        if epoch % args.eval_every == 0 or epoch == args.epochs:
            metrics |= monitor()
        run.log(epoch, metrics | {"seconds": seconds})
        run.save(epoch, {"model": model, "optimizer": optimizer, "schedule": schedule})


class Run:
    """The folder of a run, with args.json, metrics.jsonl and checkpoint.pt, and its progress on the screen."""

    def __init__(self, args):
        """Raises UserError where the folder cannot be written, or holds a run that would be lost."""
        self.args, self.folder, self.history, self.ticks = args, Path(args.out), [], []
        if (self.folder / "checkpoint.pt").exists():
            raise UserError(f"--out {self.folder}: holds a run already; name another folder, or remove this one")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "metrics.jsonl").write_text("")
            self.write("args.json", json.dumps(dataclasses.asdict(args), indent=2))
        except OSError as error:
            raise UserError(f"--out {self.folder}: cannot be written ({error.strerror})") from None

    def write(self, name, content):
        """Text, or what torch.save takes; under a temporary name first, so that no file is ever half there."""
        temporary = self.folder / f"{name}.partial"
        temporary.write_text(content + "\n") if isinstance(content, str) else torch.save(content, temporary)
        temporary.replace(self.folder / name)

    def foresee(self, step, losses):
        """Says early in the first epoch how long pretraining will take, from the ten steps between two of its steps."""
        if step in (10, 20):
            losses[step].item()  # waits for the device
            self.ticks.append(time.perf_counter())
        if step == 20:
            minutes = (self.ticks[1] - self.ticks[0]) / 10 * len(losses) * self.args.epochs / 60
            print(f"pretraining will take about {minutes:.1f} minutes", flush=True)

    def mean_loss(self, losses, epoch):
        """losses (steps,) of an epoch -> their mean. Raises UserError if one of them is not finite."""
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            step = (epoch - 1) * len(losses) + bad[0].item() + 1
            raise UserError(f"the loss is not finite at step {step}, in epoch {epoch}: try a smaller --lr")
        return losses.mean().item()

    def log(self, epoch, metrics):
        """A line of metrics.jsonl, and a shorter one on the screen."""
        self.history.append({"epoch": epoch} | metrics)
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(self.history[-1]) + "\n")
        left = sum(line["seconds"] for line in self.history) / epoch * (self.args.epochs - epoch)
        minutes, seconds = divmod(round(left), 60)
        knn = f"  kNN {metrics['knn']:6.1%}" if "knn" in metrics else ""
        print(
            f"epoch {epoch:{len(str(self.args.epochs))}}/{self.args.epochs}  loss {metrics['loss']:.3f}"
            f"  {metrics['images_per_second']:.0f} images/s  {minutes}:{seconds:02} left{knn}",
            flush=True,
        )

    def save(self, epoch, parts):
        """The checkpoint: tensors and plain values only, so that it loads with weights_only=True."""
        state = {name: part.state_dict() for name, part in parts.items()}
        self.write("checkpoint.pt", {"method": METHOD, "args": dataclasses.asdict(self.args), "epoch": epoch} | state)


# ======================================================================================================
# Evaluate
# ======================================================================================================


@torch.no_grad()
def features(encoder, images):
    """Whole pictures through the frozen encoder: uint8 (M, 3, S, S) -> float32 (M, D)."""
    encoder.eval()
    with autocast(images.device):
        return torch.cat([encoder(network_input(x.float() / 255)).float() for x in images.split(512)])


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


def evaluate(encoder, data):
    """Frozen probes: trained on the training pictures and their labels, measured on test."""
    train, test = features(encoder, data.train_images), features(encoder, data.test_images)
    return {
        "knn": knn_accuracy(train, data.train_labels, test, data.test_labels),
        "linear_probe": linear_probe(train, data.train_labels, test, data.test_labels),
    }


# ======================================================================================================
# Pictures
# ======================================================================================================


def save_views(path, images, args):
    """A row of pictures from uint8 (M, 3, S, S), and below it the two views of each that a step may see."""
    images = images[:12]
    views = two_views(images, args, torch.Generator(images.device).manual_seed(args.seed))
    sheet = torch.cat([images / 255, views]).cpu()  # (36, 3, S, S)
    sheet = F.interpolate(sheet, scale_factor=max(1, round(96 / sheet.shape[3])), mode="nearest")
    torchvision.utils.save_image(sheet, path, nrow=len(images), padding=4, pad_value=1.0)


# ======================================================================================================
# Main
# ======================================================================================================


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


def main(args):
    """Loads, measures the untrained encoder, pretrains, measures again -> the content of summary.json."""
    start = time.perf_counter()
    device = pick_device(args.device)
    data = common.load_dataset(args.dataset, args.data_dir).to(device)
    M, _, S, _ = data.train_images.shape
    if args.batch_size > M:
        raise UserError(f"--batch-size {args.batch_size}: {args.dataset} has only {M} training pictures")
    run = Run(args)
    print(f"{METHOD} on {args.dataset}: {M} pictures, {S} x {S}; {device}; results go to {run.folder}", flush=True)
    if device.type == "cpu" and args.encoder != "small":
        print(f"{args.encoder} is made for a GPU; the recipe for a CPU is --encoder small", flush=True)
    save_views(run.folder / "views.png", data.train_images, args)

    torch.manual_seed(args.seed)
    model = SimCLR(args).to(device, memory_format=torch.channels_last)
    untrained = evaluate(model.encoder, data)

    def monitor():
        """kNN of a tenth of the training pictures among the rest: what recipes are chosen by."""
        train, held = features(model.encoder, data.train_images), torch.arange(M, device=device) % 10 == 0
        labels = data.train_labels
        return {"knn": knn_accuracy(train[~held], labels[~held], train[held], labels[held])}

    pretrain(model, data.train_images, args, run, monitor)
    run.write("encoder.pt", model.encoder.state_dict())
    trained = evaluate(model.encoder, data)

    summary = {
        "method": METHOD,
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "dataset": args.dataset,
        "seed": args.seed,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "epochs": args.epochs,
        "parameters": sum(p.numel() for p in model.encoder.parameters()),
        "images_per_second": statistics.median(line["images_per_second"] for line in run.history),
        "peak_memory_gb": peak_memory_gb(device),
        "pretrain_seconds": sum(line["seconds"] for line in run.history),
        "total_seconds": time.perf_counter() - start,
        "untrained": untrained,
        "trained": trained,
    }
    run.write("summary.json", json.dumps(summary, indent=2))
    print(f"\n{'':14}{'untrained':>10}{'trained':>10}")
    for name in trained:
        print(f"{name:14}{untrained[name]:10.1%}{trained[name]:10.1%}")
    print(f"{summary['total_seconds']:.0f} s in all; summary.json, encoder.pt and views.png are in {run.folder}")
    return summary


if __name__ == "__main__":
    try:
        main(parse_args())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
