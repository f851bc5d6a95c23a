"""A table of the lecture at the demo's budget: every row with several seeds, mean and deviation.

    python results/ablation.py moco                  table 1 of MoCo v2: MLP head, aug+, cosine schedule
    python results/ablation.py mae-mask-token        a column of MAE's design choices; the others are listed below
    python results/ablation.py mae-mask-token --record results/mae-mask-token.json

Each run is that of the bare script with the flags of its row, in runs/ablation-<script>-<flags>-seed<seed>; what is
finished there is not run again. Some of MAE's rows change a part of mae.py, see CHANGES. Of its table (d) the PCA and
dVAE targets are left out.
"""

import argparse
import contextlib
import importlib
import json
import math
import re
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import common
import mae


class EncodesMaskTokens(mae.MaskedAutoencoder):
    """The lecture's table (c): the encoder gets a mask token in the place of every masked patch, as in BERT."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.encoder_mask_token = nn.Parameter(0.02 * torch.randn_like(self.encoder.cls_token))

    def forward(self, images, mask_ratio, noise):
        tokens = self.encoder.embed(images)  # (B, L, D)
        _, mask, _ = mae.random_masking(tokens, mask_ratio, noise)
        hidden = self.encoder_mask_token + self.encoder.pos_embed[:, 1:]
        latent = self.encoder.encode(torch.where(mask[:, :, None] == 1, hidden, tokens))  # (B, 1 + L, D)
        return self.decode(self.decoder_embed(latent)), mask


def grid_masking(tokens, mask_ratio, noise, masking=mae.random_masking):
    """The lecture's table (f): keeps one patch of every 2 x 2 first."""
    odd = torch.arange(math.isqrt(tokens.shape[1]), device=noise.device) % 2 == 1
    return masking(tokens, mask_ratio, noise + (odd[:, None] | odd).flatten())


def block_masking(tokens, mask_ratio, noise, masking=mae.random_masking, count=16):
    """The lecture's table (f): removes rectangles, as BEiT does, each of at least 8 % of the image, one after the other
    until enough is gone, and of the last one a part. The noise draws them as well, so that a run can be resumed."""
    B, side, areas = len(noise), math.isqrt(tokens.shape[1]), (0.08, max(0.08, mask_ratio))
    generator = torch.Generator(noise.device).manual_seed(int(noise.double().sum() * 1e6))
    boxes = common.random_boxes(B * count, side, side, areas, (0.3, 1 / 0.3), generator)
    top, left, height, width = boxes[:, :, None].unbind(1)  # (B * count, 1)
    line = torch.arange(side, device=noise.device)
    rows, columns = (line >= top) & (line < top + height), (line >= left) & (line < left + width)
    inside = (rows[:, :, None] & columns[:, None, :]).view(B, count, -1)
    rank = torch.arange(count, 0, -1, device=noise.device)[:, None]  # the first rectangle has the highest
    return masking(tokens, mask_ratio, noise + (inside * rank).amax(1))


def not_augmented(images, args, generator):
    """The lecture's table (e)."""
    return images / 255


def shifted(images, args, generator):
    """The lecture's table (e), crops of fixed size: shifted by up to an eighth of the side, and flipped."""
    return common.random_crop(images / 255, images.shape[3] // 8, generator)


def cropped_and_jittered(images, args, generator, cropped=mae.augmented):
    """The lecture's table (e)."""
    return common.random_color_jitter(cropped(images, args, generator), generator, 0.4, 0.4, 0.4, 0.1)


CHANGES = {  # of mae.py, for rows that no flag makes
    "": {},
    "encode-mask-tokens": {"MaskedAutoencoder": EncodesMaskTokens},
    "block": {"random_masking": block_masking},
    "grid": {"random_masking": grid_masking},
    "augment-none": {"augmented": not_augmented},
    "crop-fixed": {"augmented": shifted},
    "crop-color": {"augmented": cropped_and_jittered},
}

# script: flags of all runs, and what is measured
SCRIPTS = {
    "moco": ("", ("linear_probe", "knn")),
    "mae": ("--fine-tune", ("fine_tuned", "linear_probe", "from_scratch")),
}

# script and table: rows of a name, flags, the lecture's numbers in percent, for mae fine-tuned and linear, and a change
# of CHANGES; a row without flags and change is the bare script, so that tables share its runs
TABLES = {
    "moco": [
        ("v1", "--no-mlp --no-aug-plus --no-cos", [60.6]),
        ("(a) MLP", "--mlp --no-aug-plus --no-cos", [66.2]),
        ("(b) aug+", "--no-mlp --aug-plus --no-cos", [63.4]),
        ("(c) MLP, aug+", "--mlp --aug-plus --no-cos", [67.3]),
        ("(d) MLP, aug+, cos", "--mlp --aug-plus --cos", [67.5]),
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
    "mae-decoder-dim": [  # the lecture's beside an encoder of 1024, ours beside 96
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
}  # fmt: skip


@contextlib.contextmanager
def changed(script, parts):
    """Some functions and classes of a script are others for a while."""
    before = {name: getattr(script, name) for name in parts}
    vars(script).update(parts)
    try:
        yield
    finally:
        vars(script).update(before)


def run(script, flags, change, out):
    """The summary of a run: of the one that lies there finished, or of a new one."""
    if not (out / "summary.json").exists():
        begun = (out / "checkpoint.pt").exists()
        args = script.parse_args([*flags, "--resume" if begun else "--out", str(out)])
        args.command = shlex.join(["python", *sys.argv])
        with changed(script, CHANGES[change]):
            script.main(args)
    return json.loads((out / "summary.json").read_text())


def spread(values):
    """Fractions of all seeds -> their mean and standard deviation, as text."""
    return f"{statistics.mean(values):.1%} ± {statistics.stdev(values) if len(values) > 1 else 0:.1%}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--record", type=Path, help="a JSON file to write")
    args = parser.parse_args()
    name = args.table.split("-")[0]
    (all_flags, keys), script, rows = SCRIPTS[name], importlib.import_module(name), []
    for case, flags, lecture, *change in TABLES[args.table]:
        change = "".join(change)
        row = {"case": case, "flags": flags, "change": change, "lecture": [number / 100 for number in lecture]}
        slug = "-".join(filter(None, (name + re.sub("[^a-z0-9.]+", "-", flags), change)))
        folders = [Path(f"runs/ablation-{slug}-seed{seed}") for seed in args.seeds]
        try:
            runs = [
                run(script, [*f"{all_flags} {flags}".split(), "--seed", str(seed)], change, folder)
                for seed, folder in zip(args.seeds, folders, strict=True)
            ]
        except script.UserError as error:
            sys.exit(f"error: {error}")
        for key in keys:
            row[key] = [summary["trained"][key] for summary in runs]
        rows.append(row)
    print(f"\n{'':24}{'lecture':>16}" + "".join(f"{key:>18}" for key in keys))
    for row in rows:
        lecture = " / ".join(f"{number:.1%}" for number in row["lecture"])
        print(f"{row['case']:24}{lecture:>16}" + "".join(f"{spread(row[key]):>18}" for key in keys))
    if args.record:
        record = {
            "command": " ".join(["python", *sys.argv]),
            "date": time.strftime("%Y-%m-%d"),
            "device": runs[0]["device"],
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "seeds": args.seeds,
            "rows": rows,
        }
        args.record.write_text(json.dumps(record, indent=2) + "\n")
