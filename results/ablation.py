"""A table of the lecture at the demo's budget: each row with several seeds, mean and standard
deviation.

    python results/ablation.py moco                  table 1 of MoCo v2: MLP head, aug+, cosine
    python results/ablation.py mae-mask-token        one of MAE's choices; TABLES has the others
    python results/ablation.py clip-split --seeds 0  Flickr8k split by image, and by caption: a leak
    python results/ablation.py moco --record results/moco-ablation.json

A run is a script with the flags of its row, in a process of its own, since all compiled models of
one process share a limit of recompilations. It stands in runs/ablation-<commit>/, so that no table
mixes versions: one that is finished is not run again, one that was stopped goes on. For rows that
no flag makes, CHANGES replaces a part of the script.
"""

import argparse
import dataclasses
import importlib
import json
import math
import multiprocessing
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import common
import mae


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


# The scripts' own, which the parts below build on when they stand in their place.
random_masking = mae.random_masking
augmented = mae.augmented
load_dataset = common.load_dataset


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


CHANGES = {  # what stands in which place
    "encode-mask-tokens": (mae, "MaskedAutoencoder", EncodesMaskTokens),
    "block": (mae, "random_masking", block_masking),
    "grid": (mae, "random_masking", grid_masking),
    "augment-none": (mae, "augmented", not_augmented),
    "crop-fixed": (mae, "augmented", shifted),
    "crop-color": (mae, "augmented", cropped_and_jittered),
    "split-by-caption": (common, "load_dataset", split_by_caption),
}

# method: flags of all its runs, and what the printed table shows of them
RECALLS = ("text_to_image_r1", "text_to_image_r5", "text_to_image_r10", "val_recall")
METHODS = {
    "moco": ("--warmup 0", ("linear_probe", "knn")),
    "mae": ("--fine-tune", ("fine_tuned", "linear_probe", "from_scratch")),
    "clip": ("--dataset data/flickr8k --encoder small --eval-every 5", RECALLS),
}

# table: rows of a name, flags, the paper's numbers in percent (ImageNet), and a change; tables of a
# method share the runs of equal rows. MoCo's have the temperature that is best for their head in
# the paper, and are linear probes; MAE's are fine-tuned and linear; of its table (d) the PCA and
# dVAE targets are left out.
TABLES = {
    "moco": [
        ("v1", "--no-mlp --no-aug-plus --no-cos --temperature 0.07", [60.6]),
        ("(a) MLP", "--mlp --no-aug-plus --no-cos --temperature 0.2", [66.2]),
        ("(b) aug+", "--no-mlp --aug-plus --blur 0.5 --no-cos --temperature 0.07", [63.4]),
        ("(c) MLP, aug+", "--mlp --aug-plus --blur 0.5 --no-cos --temperature 0.2", [67.3]),
        ("(d) MLP, aug+, cos", "--mlp --aug-plus --blur 0.5 --cos --temperature 0.2", [67.5]),
    ],
    "mae-mask-ratio": [
        ("25 %", "--mask-ratio 0.25", []),
        ("50 %", "--mask-ratio 0.5", []),
        ("75 %", "", [84.9, 73.5]),
        ("90 %", "--mask-ratio 0.9", []),
    ],
    "mae-decoder-depth": [
        ("1 block", "--decoder-depth 1", [84.8, 65.5]),
        ("2 blocks", "", [84.9, 70.0]),
        ("4 blocks", "--decoder-depth 4", [84.9, 71.9]),
        ("8 blocks", "--decoder-depth 8", [84.9, 73.5]),
        ("12 blocks", "--decoder-depth 12", [84.4, 73.3]),
    ],
    "mae-decoder-dim": [  # the paper's beside an encoder of 1024, ours beside 96
        ("128", "--decoder-dim 12", [84.9, 69.1]),
        ("256", "--decoder-dim 24", [84.8, 71.3]),
        ("512", "--decoder-dim 48", [84.9, 73.5]),
        ("768", "--decoder-dim 72", [84.4, 73.1]),
        ("1024", "--decoder-dim 96", [84.3, 73.1]),
    ],
    "mae-mask-token": [
        ("encoder w/ [M]", "", [84.2, 59.6], "encode-mask-tokens"),
        ("encoder w/o [M]", "", [84.9, 73.5]),
    ],
    "mae-target": [
        ("pixel (w/o norm)", "", [84.9, 73.5]),
        ("pixel (w/ norm)", "--target norm-pixel", [85.4, 73.9]),
    ],
    "mae-augment": [
        ("none", "", [84.0, 65.7], "augment-none"),
        ("crop, fixed size", "", [84.7, 73.1], "crop-fixed"),
        ("crop, rand size", "", [84.9, 73.5]),
        ("crop + color jit", "", [84.3, 71.9], "crop-color"),
    ],
    "mae-mask-sampling": [
        ("random 75", "", [84.9, 73.5]),
        ("block 50", "--mask-ratio 0.5", [83.9, 72.3], "block"),
        ("block 75", "", [82.8, 63.9], "block"),
        ("grid 75", "", [84.0, 66.0], "grid"),
    ],
    "clip-split": [
        ("by image", "", []),
        ("by caption", "", [], "split-by-caption"),
    ],
}  # fmt: skip


def train(method, flags, change, folder):
    """A run of METHOD.py in this folder, begun or continued, with a part of it replaced."""
    if change:
        module, name, part = CHANGES[change]
        setattr(module, name, part)
    script = importlib.import_module(method)
    begun = (folder / "checkpoint.pt").exists()
    args = script.parse_args(["--resume", str(folder)] if begun else [*flags, "--out", str(folder)])
    args.command = shlex.join(["python", *sys.argv])
    script.main(args)


def train_in_a_process(*inputs):
    """The same, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as process:
        process.apply(train, inputs)


def measure(method, flags, change, seed, commit, train):
    """The run of a row with a seed, trained if it is not there -> its record."""
    slug = method + re.sub("[^a-z0-9.]+", "-", flags)
    if change:
        slug += f"-{change}"
    folder = Path(f"runs/ablation-{commit[:7]}/{slug}-seed{seed}")
    if not (folder / "summary.json").exists():
        every_flag = [*f"{METHODS[method][0]} {flags}".split(), "--seed", str(seed)]
        train(method, every_flag, change, folder)
    summary = json.loads((folder / "summary.json").read_text())
    about = {key: summary[key] for key in ("date", "device", "threads", "torch", "total_seconds")}
    return {"seed": seed, "commit": commit} | about | summary["history"][-1] | summary["trained"]


def rows_of(table, seeds, commit, train=train_in_a_process):
    """The rows of a table, each with a run of every seed."""
    method = table.split("-")[0]
    rows = []
    for case, flags, paper, *change in TABLES[table]:
        change = "".join(change)
        row = {"case": case, "flags": f"{METHODS[method][0]} {flags}".strip(), "change": change}
        row["paper"] = [number / 100 for number in paper]
        row["runs"] = [measure(method, flags, change, seed, commit, train) for seed in seeds]
        rows.append(row)
    return rows


def spread(values):
    """Fractions of all seeds -> their mean and standard deviation, as text."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0
    return f"{statistics.mean(values):.1%} ± {deviation:.1%}"


def print_table(table, rows):
    """Mean and standard deviation of the columns of the method, beside the paper's numbers."""
    _, columns = METHODS[table.split("-")[0]]
    print(f"\n{'':20}{'paper':>16}" + "".join(f"{column:>19}" for column in columns))
    for row in rows:
        paper = " / ".join(f"{number:.1%}" for number in row["paper"])
        cells = [spread([run[column] for run in row["runs"]]) for column in columns]
        print(f"{row['case']:20}{paper:>16}" + "".join(f"{cell:>19}" for cell in cells))


def commit_of_the_code():
    """Its 40 digits, or another text if some changes are in no commit."""
    git = "git describe --always --dirty --exclude '*' --abbrev=40"
    root = Path(__file__).parent
    done = subprocess.run(git, shell=True, cwd=root, capture_output=True, text=True)
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
    try:
        rows = rows_of(args.table, args.seeds, commit, train)
    except common.UserError as error:
        sys.exit(f"error: {error}")
    print_table(args.table, rows)
    if args.record:
        content = {"command": shlex.join(["python", *sys.argv]), "rows": rows}
        args.record.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
