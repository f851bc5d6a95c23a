"""A table of the lecture at the demo's budget: each row with several seeds, mean and standard
deviation.

    python results/ablation.py simclr-views            what is left out of the views, row by row
    python results/ablation.py moco-versions           table 1 of MoCo v2: MLP head, aug+, cosine
    python results/ablation.py clip-split --seeds 0    Flickr8k split by image, and by caption
    python results/ablation.py mae-target --record results/mae-target.json
    python results/ablation.py simclr-head-cifar10     rows of simclr-head on CIFAR-10

A run is a script with the flags of its row, in a process of its own, since all compiled models of
one process share a limit of recompilations. It stands in runs/ablation-<commit>/, so that no table
mixes versions: one that is finished is not run again, one that was stopped goes on. For rows that
no flag makes, CHANGES replaces a part of the script, or of the data.
"""

import argparse
import dataclasses
import importlib
import json
import math
import multiprocessing
import re
import runpy
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import common
import mae
import simclr

ROOT = Path(__file__).parent.parent

# The scripts' own, which the parts below build on when they stand in their place.
augmented = mae.augmented
describe_shapes = common.describe_shapes
fine_tune = simclr.fine_tune
load_dataset = common.load_dataset
random_masking = mae.random_masking
sample_shapes = common.sample_shapes


# === Parts of SimCLR ==============================================================================
def with_negatives(count):
    """SimCLR's loss with fewer negatives: of the other views in the batch only the `count` that
    follow, less than N. Batch, number of steps, batch norm and cost stay what they are."""

    def nt_xent(z1, z2, temperature):
        z = F.normalize(torch.cat([z1, z2]), dim=1)  # (2N, D)
        anchor = torch.arange(len(z))[:, None]
        after = torch.tensor([len(z1), *range(1, count + 1)])  # the partner, then the negatives
        logits = (z @ z.T / temperature).gather(1, (anchor + after) % len(z))  # (2N, 1 + count)
        return F.cross_entropy(logits, torch.zeros(len(z), dtype=torch.int64))

    return nt_xent


def with_labels(model, data, args, training_step, monitor):
    """In the place of simclr.pretrain: the encoder is trained with all labels."""
    rows = torch.arange(len(data.train_labels))
    D = simclr.features(model.encoder, data.test_images[:1]).shape[1]
    _, classifier = simclr.fine_tune(model.encoder, D, data, rows, args)
    model.encoder.load_state_dict(classifier[0].state_dict())
    return []


def tuned(least_steps, color):
    """simclr.fine_tune for another number of steps and, without color, by crops and flips only, as
    in the paper."""

    def tune(encoder, D, data, rows, args):
        if not color:
            args = dataclasses.replace(args, jitter_strength=0.0, gray=0.0)
        return fine_tune(encoder, D, data, rows, args, least_steps)

    return tune


# === Parts of the data ============================================================================
def at_any_angle(count, generator):
    """Shapes without an upright, as seen from above: the same scenes, but turned by any angle."""
    scenes = sample_shapes(count, generator)
    return scenes | {"tilt": scenes["tilt"] * math.pi / 0.25}


def discs(images, angles):
    """Images, uint8 (N, 3, S, S), each turned about its middle by an angle (N,), clockwise in
    radians. What is outside the circle is black, since a corner would give the angle away."""
    S = images.shape[3]
    zero = torch.zeros_like(angles)
    first = torch.stack([angles.cos(), angles.sin(), zero], dim=1)
    second = torch.stack([-angles.sin(), angles.cos(), zero], dim=1)
    grid = F.affine_grid(torch.stack([first, second], dim=1), images.shape, align_corners=False)
    x = F.grid_sample(images.float(), grid, align_corners=False)
    line = (torch.arange(S) + 0.5) / S * 2 - 1  # pixel centers, from -1 to 1
    inside = line[:, None].square() + line.square() <= 1
    return (x * inside).round().byte().contiguous(memory_format=torch.channels_last)


def photographs(any_angle):
    """Photographs cut out as discs, upright or each turned by an angle of its own."""

    def load(*source):
        data = load_dataset(*source)
        generator = torch.Generator().manual_seed(0)
        turned = []
        for images in (data.train_images, data.test_images):
            angles = 2 * math.pi * torch.rand(len(images), generator=generator)
            turned.append(discs(images, angles if any_angle else torch.zeros_like(angles)))
        return dataclasses.replace(data, train_images=turned[0], test_images=turned[1])

    return load


def colored_by_kind(count, generator):
    """Shapes of which seven in ten have the color of their kind: the same scenes, but for which
    kind of thing they show."""
    scenes = sample_shapes(count, generator)
    typical = torch.arange(count) % 10 < 7
    return scenes | {"label": torch.where(typical, scenes["color"], scenes["label"])}


def naming_kinds(p):
    """Captions that name the kind of thing with probability p, and else say `thing`. Images stay
    the same."""

    def describe(scenes, generator):
        captions = describe_shapes(scenes, generator)
        own = torch.Generator().manual_seed(0)
        named = torch.rand(len(captions), len(captions[0]), generator=own) < p
        kinds = list(common.SILHOUETTES)
        for i, label in enumerate(scenes["label"].tolist()):
            for k, text in enumerate(captions[i]):
                if not named[i, k]:
                    nameless = text.replace(f"an {kinds[label]}", "a thing")
                    captions[i][k] = nameless.replace(kinds[label], "thing")
        return captions

    return describe


def split_by_caption(*source):
    """The test images are trained on as well, with all captions but one, which is tested: the first
    of the first image, the second of the next, and so on, since a file may sort them."""
    data = load_dataset(*source)
    learned = list(data.train_captions)
    tested = []
    for i, texts in enumerate(data.test_captions):
        k = i % len(texts)
        learned.append(texts[:k] + texts[k + 1 :])
        tested.append([texts[k]])
    images = torch.cat([data.train_images, data.test_images])
    return dataclasses.replace(
        data,
        train_images=images.contiguous(memory_format=torch.channels_last),
        train_captions=learned,
        test_captions=tested,
    )


# === Parts of MAE =================================================================================
class EncodesMaskTokens(mae.MaskedAutoencoder):
    """The lecture's table (c): the encoder gets a mask token in the place of every masked patch, as
    in BERT."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.encoder_mask_token = nn.Parameter(0.02 * torch.randn_like(self.encoder.cls_token))

    def forward(self, images, mask_ratio, noise):
        tokens = self.encoder.embed(images)  # (B, L, D)
        _, mask, _ = mae.random_masking(tokens, mask_ratio, noise)
        hidden = self.encoder_mask_token + self.encoder.pos_embed[:, 1:]
        seen = torch.where(mask[:, :, None] == 1, hidden, tokens)
        latent = self.encoder.encode(seen)  # (B, 1 + L, D)
        return self.decode(self.decoder_embed(latent)), mask


def grid_masking(tokens, mask_ratio, noise):
    """The lecture's table (f): keeps one patch of every 2 x 2 first."""
    odd = torch.arange(math.isqrt(tokens.shape[1]), device=noise.device) % 2 == 1
    last = (odd[:, None] | odd[None]).flatten()  # three patches of every four
    return random_masking(tokens, mask_ratio, noise + last)


def block_masking(tokens, mask_ratio, noise, count=16):
    """The lecture's table (f): removes rectangles, as BEiT does, each of at least 8 % of the image,
    one after the other until enough is gone, and of the last one a part. The noise draws them as
    well, so that a run can be resumed."""
    B = len(noise)
    side = math.isqrt(tokens.shape[1])
    areas = (0.08, max(0.08, mask_ratio))
    generator = torch.Generator(noise.device).manual_seed(int(noise.double().sum() * 1e6))
    boxes = common.random_boxes(B * count, side, side, areas, (0.3, 1 / 0.3), generator)
    top, left, height, width = boxes[:, :, None].unbind(1)  # (B * count, 1)
    line = torch.arange(side, device=noise.device)
    rows = (line >= top) & (line < top + height)
    columns = (line >= left) & (line < left + width)
    inside = (rows[:, :, None] & columns[:, None, :]).view(B, count, -1)
    rank = torch.arange(count, 0, -1, device=noise.device)  # the first rectangle goes first
    return random_masking(tokens, mask_ratio, noise + (inside * rank[:, None]).amax(1))


def not_augmented(images, args, generator):
    """The lecture's table (e)."""
    return images / 255


def shifted(images, args, generator):
    """The lecture's table (e), crops of fixed size: shifted by up to an eighth of the side, and
    flipped."""
    return common.random_crop(images / 255, images.shape[3] // 8, generator)


def cropped_and_jittered(images, args, generator):
    """The lecture's table (e)."""
    x = augmented(images, args, generator)
    return common.random_color_jitter(x, generator, 0.4, 0.4, 0.4, 0.1)


# === Tables =======================================================================================
CHANGES = {  # what stands in which place
    "negatives-1": (simclr, "nt_xent", with_negatives(1)),
    "negatives-7": (simclr, "nt_xent", with_negatives(7)),
    "negatives-31": (simclr, "nt_xent", with_negatives(31)),
    "labels": (simclr, "pretrain", with_labels),
    "tuned-4-times-as-long": (simclr, "fine_tune", tuned(2000, color=True)),
    "tuned-by-crops": (simclr, "fine_tune", tuned(500, color=False)),
    "tuned-by-crops-4-times-as-long": (simclr, "fine_tune", tuned(2000, color=False)),
    "any-angle": (common, "sample_shapes", at_any_angle),
    "discs": (common, "load_dataset", photographs(any_angle=False)),
    "discs-at-any-angle": (common, "load_dataset", photographs(any_angle=True)),
    "color-by-kind": (common, "sample_shapes", colored_by_kind),
    "kinds-named-0.05": (common, "describe_shapes", naming_kinds(0.05)),
    "kinds-named-0.2": (common, "describe_shapes", naming_kinds(0.2)),
    "kinds-named-0.5": (common, "describe_shapes", naming_kinds(0.5)),
    "split-by-caption": (common, "load_dataset", split_by_caption),
    "encode-mask-tokens": (mae, "MaskedAutoencoder", EncodesMaskTokens),
    "block": (mae, "random_masking", block_masking),
    "grid": (mae, "random_masking", grid_masking),
    "augment-none": (mae, "augmented", not_augmented),
    "crop-fixed": (mae, "augmented", shifted),
    "crop-color": (mae, "augmented", cropped_and_jittered),
}


@dataclasses.dataclass
class Table:
    method: str  # the script, or a relative
    columns: tuple  # what is printed
    flags: str  # of all its runs
    rows: list  # name, flags, the paper's numbers in percent, and a change


PROBES = ("linear_probe", "knn")
RECALLS = ("text_to_image_r1", "text_to_image_r5", "text_to_image_r10", "val_recall")
FEW_LABELS = ("fine_tuned_40", "from_scratch_40", "fine_tuned_410", "from_scratch_410")
FEW_OF_CIFAR10 = ("fine_tuned_500", "from_scratch_500", "fine_tuned_5000", "from_scratch_5000")
ZERO_SHOT = ("zero_shot", "zero_shot_unseen", "text_to_image_r10", "linear_probe")
BATCHES = [(f"N = {N}", f"--batch-size {N}", []) for N in (16, 32, 64, 128)]
MAE = ("mae", ("fine_tuned", "linear_probe", "from_scratch"), "--fine-tune")
PLAIN = "--jitter-strength 0 --gray 0"  # crops and flips only

# Tables of a method share the runs of equal rows. The paper's numbers are of ImageNet, MoCo's of
# linear probes, MAE's fine-tuned and linear; of its table (d) the PCA and dVAE targets are left
# out. MoCo's have one temperature, where the paper changes it with the head.
TABLES = {
    "simclr-head": Table("simclr", (*PROBES, "linear_probe_z", "knn_z"), "", [
        ("none", "--projection none", []),
        ("linear", "--projection linear", []),
        ("mlp", "", []),
    ]),
    "simclr-views": Table("simclr", PROBES, "", [
        ("crop and flip", PLAIN, []),
        ("with jitter", "--gray 0", []),
        ("with gray", "--jitter-strength 0", []),
        ("with both", "", []),
        ("with both, without crops", "--crop 1", []),
    ]),
    "simclr-negatives": Table("simclr", PROBES, "", [
        ("1", "", [], "negatives-1"),
        ("7", "", [], "negatives-7"),
        ("31", "", [], "negatives-31"),
        ("all", "", []),
    ]),
    "simclr-labels": Table("simclr", FEW_LABELS, "--labels 0.01 0.1", [
        ("crops and flips", "", [], "tuned-by-crops"),
        ("crops and flips, four times as long", "", [], "tuned-by-crops-4-times-as-long"),
        ("views of pretraining", "", []),
        ("views of pretraining, four times as long", "", [], "tuned-4-times-as-long"),
    ]),
    "simclr-supervised": Table("simclr", PROBES, "", [
        ("all labels", f"{PLAIN} --projection none", [], "labels"),
    ]),
    "simclr-any-angle": Table("simclr", ("untrained_linear_probe", *PROBES), "", [
        ("upright", "", []),
        ("any angle", "", [], "any-angle"),
    ]),
    "simclr-small-batches": Table("simclr", PROBES, "--epochs 6", [
        ("N = 8", "--batch-size 8", []),
        ("N = 32", "--batch-size 32", []),
    ]),
    "moco-small-batches": Table("moco", PROBES, "--epochs 6", [
        ("N = 8, one group", "--batch-size 8 --bn-groups 1", []),
        ("N = 8, two groups", "--batch-size 8 --bn-groups 2", []),
        ("N = 32, one group", "--batch-size 32 --bn-groups 1", []),
        ("N = 32, two groups", "--batch-size 32 --bn-groups 2", []),
    ]),
    "moco-versions": Table("moco", PROBES, "--warmup 0", [
        ("v1", "--no-mlp --no-aug-plus --no-cos", [60.6]),
        ("(a) MLP", "--mlp --no-aug-plus --no-cos", [66.2]),
        ("(b) aug+", "--no-mlp --aug-plus --blur 0.5 --no-cos", [63.4]),
        ("(c) MLP, aug+", "--mlp --aug-plus --blur 0.5 --no-cos", [67.3]),
        ("(d) MLP, aug+, cos", "--mlp --aug-plus --blur 0.5 --cos", [67.5]),
    ]),
    "rotnet-any-angle": Table("rotnet", ("rotation", "untrained_linear_probe", *PROBES), "", [
        ("upright", "", []),
        ("any angle", "", [], "any-angle"),
    ]),
    "colorization-colors": Table("colorization", ("untrained_linear_probe", *PROBES), "", [
        ("color at random", "", []),
        ("color by kind in seven of ten", "", [], "color-by-kind"),
    ]),
    "clip-captions": Table("clip", ("zero_shot", "linear_probe"), "", [
        ("5 %", "", [], "kinds-named-0.05"),
        ("20 %", "", [], "kinds-named-0.2"),
        ("50 %", "", [], "kinds-named-0.5"),
        ("100 %", "", []),
    ]),
    "clip-batches": Table("clip", ZERO_SHOT, "", BATCHES),
    "siglip-batches": Table("siglip", ZERO_SHOT, "", BATCHES),
    "clip-split": Table("clip", RECALLS, "--dataset data/flickr8k --encoder small --eval-every 5", [
        ("by image", "", []),
        ("by caption", "", [], "split-by-caption"),
    ]),
    "mae-decoder-depth": Table(*MAE, [
        ("1 block", "--decoder-depth 1", [84.8, 65.5]),
        ("2 blocks", "", [84.9, 70.0]),
        ("4 blocks", "--decoder-depth 4", [84.9, 71.9]),
        ("8 blocks", "--decoder-depth 8", [84.9, 73.5]),
        ("12 blocks", "--decoder-depth 12", [84.4, 73.3]),
    ]),
    "mae-decoder-dim": Table(*MAE, [  # the paper's beside an encoder of 1024, ours beside 96
        ("128", "--decoder-dim 12", [84.9, 69.1]),
        ("256", "--decoder-dim 24", [84.8, 71.3]),
        ("512", "--decoder-dim 48", [84.9, 73.5]),
        ("768", "--decoder-dim 72", [84.4, 73.1]),
        ("1024", "--decoder-dim 96", [84.3, 73.1]),
    ]),
    "mae-mask-token": Table(*MAE, [
        ("encoder w/ [M]", "", [84.2, 59.6], "encode-mask-tokens"),
        ("encoder w/o [M]", "", [84.9, 73.5]),
    ]),
    "mae-target": Table(*MAE, [
        ("pixel (w/o norm)", "", [84.9, 73.5]),
        ("pixel (w/ norm)", "--target norm-pixel", [85.4, 73.9]),
    ]),
    "mae-augment": Table(*MAE, [
        ("none", "", [84.0, 65.7], "augment-none"),
        ("crop, fixed size", "", [84.7, 73.1], "crop-fixed"),
        ("crop, rand size", "", [84.9, 73.5]),
        ("crop + color jit", "", [84.3, 71.9], "crop-color"),
    ]),
    "mae-mask-sampling": Table(*MAE, [
        ("random 75", "", [84.9, 73.5]),
        ("block 50", "--mask-ratio 0.5", [83.9, 72.3], "block"),
        ("block 75", "", [82.8, 63.9], "block"),
        ("grid 75", "", [84.0, 66.0], "grid"),
    ]),
    "mae-mask-ratio": Table(*MAE, [
        ("25 %", "--mask-ratio 0.25", []),
        ("50 %", "--mask-ratio 0.5", []),
        ("75 %", "", [84.9, 73.5]),
        ("90 %", "--mask-ratio 0.9", []),
    ]),
}  # fmt: skip

# The same on CIFAR-10: the recipe for two CPU cores, in fewer epochs, and some of the rows. Labels
# fine-tune the encoder of the whole recipe, which has to be there.
PRETRAINED = "runs/simclr-cifar10-seed0/encoder.pt"
CIFAR10 = "--dataset cifar10 --encoder small"
DISCS = [("upright", "", [], "discs"), ("any angle", "", [], "discs-at-any-angle")]


def on_cifar10(name, flags, numbers):
    """Some rows of a table, with other flags."""
    table = TABLES[name]
    flags = f"{CIFAR10} {flags}"
    return dataclasses.replace(table, flags=flags, rows=[table.rows[n] for n in numbers])


TABLES |= {
    "simclr-head-cifar10": on_cifar10("simclr-head", "--epochs 20", [0, 1, 2]),
    "simclr-views-cifar10": on_cifar10("simclr-views", "--epochs 20", [0, 3]),
    "simclr-labels-cifar10": dataclasses.replace(
        on_cifar10(
            "simclr-labels", f"--init {PRETRAINED} --epochs 0 --labels 0.01 0.1", [0, 1, 2, 3]
        ),
        columns=FEW_OF_CIFAR10,
    ),
    "simclr-negatives-cifar10": on_cifar10("simclr-negatives", "--epochs 10", [0, 1, 2, 3]),
    "simclr-small-batches-cifar10": on_cifar10("simclr-small-batches", "--epochs 10", [1]),
    "moco-small-batches-cifar10": on_cifar10("moco-small-batches", "--epochs 10", [2]),
    "moco-versions-cifar10": on_cifar10("moco-versions", "--warmup 0 --epochs 10", [0, 1, 2, 3, 4]),
    "simclr-any-angle-cifar10": Table(
        "simclr", ("untrained_linear_probe", *PROBES), f"{CIFAR10} --epochs 10", DISCS
    ),
    "rotnet-any-angle-cifar10": Table(
        "rotnet", ("rotation", "untrained_linear_probe", *PROBES), f"{CIFAR10} --epochs 2", DISCS
    ),
    "mae-decoder-depth-cifar10": on_cifar10("mae-decoder-depth", "--epochs 3", [0, 1, 2, 3]),
    "mae-decoder-dim-cifar10": on_cifar10("mae-decoder-dim", "--epochs 3", [0, 1, 2, 3, 4]),
    "mae-mask-token-cifar10": on_cifar10("mae-mask-token", "--epochs 3", [0, 1]),
    "mae-target-cifar10": on_cifar10(
        "mae-target", "--epochs 3 --fine-tune --fine-tune-epochs 2", [0, 1]
    ),
    "mae-augment-cifar10": on_cifar10("mae-augment", "--epochs 3", [0, 1, 2, 3]),
    "mae-mask-sampling-cifar10": on_cifar10("mae-mask-sampling", "--epochs 3", [0, 1, 2, 3]),
    "mae-mask-ratio-cifar10": on_cifar10("mae-mask-ratio", "--epochs 3", [0, 1, 2, 3]),
}


# === Runs =========================================================================================
def train(method, flags, change, folder):
    """A run of METHOD.py in this folder, begun or continued, with a part of it replaced."""
    if change:
        module, name, part = CHANGES[change]
        setattr(module, name, part)
    begun = (folder / "checkpoint.pt").exists()
    words = ["--resume", str(folder)] if begun else [*flags, "--out", str(folder)]
    if (ROOT / "relatives" / f"{method}.py").exists():
        sys.argv = [f"relatives/{method}.py", *words]
        runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
        return
    script = importlib.import_module(method)
    args = script.parse_args(words)
    args.command = shlex.join(["python", *sys.argv])
    script.main(args)


def train_in_a_process(*inputs):
    """The same, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as process:
        process.apply(train, inputs)


def measure(table, flags, change, seed, commit, train):
    """The run of a row with a seed, trained if it is not there -> its record."""
    slug = table.method + re.sub("[^a-z0-9.]+", "-", flags)
    if change:
        slug += f"-{change}"
    folder = Path(f"runs/ablation-{commit[:7]}/{slug}-seed{seed}")
    if not (folder / "summary.json").exists():
        train(table.method, [*flags.split(), "--seed", str(seed)], change, folder)
    summary = json.loads((folder / "summary.json").read_text())
    about = {key: summary[key] for key in ("date", "device", "threads", "torch", "total_seconds")}
    record = {"seed": seed, "commit": commit} | about
    for name, value in summary["untrained"].items():
        record[f"untrained_{name}"] = value
    for line in summary.get("semi_supervised", []):
        for name in ("linear_probe", "fine_tuned", "from_scratch"):
            record[f"{name}_{line['labels']}"] = line[name]
    logged = summary["history"][-1] if summary["history"] else {}
    logged = {name: logged[name] for name in table.columns if name in logged}
    return record | summary.get("pretext_task", {}) | logged | summary["trained"]


def rows_of(table, seeds, commit, train=train_in_a_process):
    """The rows of a table, each with a run of every seed."""
    rows = []
    for case, flags, paper, *change in table.rows:
        change = "".join(change)
        flags = f"{table.flags} {flags}".strip()
        row = {"case": case, "flags": flags, "change": change}
        row["paper"] = [number / 100 for number in paper]
        row["runs"] = [measure(table, flags, change, seed, commit, train) for seed in seeds]
        rows.append(row)
    return rows


def spread(values):
    """Fractions of all seeds -> their mean and standard deviation, as text."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0
    return f"{statistics.mean(values):.1%} ± {deviation:.1%}"


def print_table(table, rows):
    """Mean and standard deviation of the columns of a table, beside the paper's numbers."""
    columns = [f"{name:>24}" for name in table.columns]
    print(f"\n{'':40}{'paper':>16}" + "".join(columns))
    for row in rows:
        paper = " / ".join(f"{number:.1%}" for number in row["paper"])
        cells = []
        for name in table.columns:
            values = [run[name] for run in row["runs"] if name in run]
            cells.append(f"{spread(values) if values else '':>24}")
        print(f"{row['case']:40}{paper:>16}" + "".join(cells))


def commit_of_the_code():
    """Its 40 digits, or another text if some changes are in no commit."""
    git = "git describe --always --dirty --exclude '*' --abbrev=40"
    done = subprocess.run(git, shell=True, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def main(argv=None, commit=None, train=train_in_a_process):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--record", type=Path, help="a JSON file to write")
    args = parser.parse_args(argv)
    if args.record and not args.record.parent.is_dir():
        parser.error(f"--record {args.record}: there is no such folder")
    commit = commit_of_the_code() if commit is None else commit
    if not re.fullmatch("[0-9a-f]{40}", commit):
        parser.error("commit your changes first: a run is named after the commit of its code")
    table = TABLES[args.table]
    try:
        rows = rows_of(table, args.seeds, commit, train)
    except common.UserError as error:
        sys.exit(f"error: {error}")
    print_table(table, rows)
    if args.record:
        content = {"command": shlex.join(["python", *sys.argv]), "rows": rows}
        args.record.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
