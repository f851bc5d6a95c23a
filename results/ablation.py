"""A table of the lecture at the demo's budget: every row with several seeds, mean and deviation.

    python results/ablation.py moco                  table 1 of MoCo v2: MLP head, aug+, cosine schedule
    python results/ablation.py mae-mask-token        a column of MAE's design choices; the others are listed below
    python results/ablation.py mae-mask-token --record results/mae-mask-token.json

Each run is that of the bare script with the flags of its row, in runs/ablation-<script>-<flags>-seed<seed>; what is
finished there is not run again.
"""

import argparse
import importlib
import json
import re
import statistics
import sys
import time
from collections import ChainMap
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

# script: flags of all runs, and what is measured; with all labels, for mae
SCRIPTS = {
    "moco": ("", ("linear_probe", "knn")),
    "mae": ("--fine-tune", ("fine_tuned", "linear_probe", "from_scratch")),
}

# script and table: rows of a name, flags, and the lecture's numbers in percent, for mae fine-tuned and linear; a row
# without flags is the bare script, so that tables share its runs
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
        ("encoder w/ [M]", "--encode-mask-tokens", [84.2, 59.6]),
        ("encoder w/o [M]", "", [84.9, 73.5]),
    ],
    "mae-target": [
        ("pixel (w/o norm)", "", [84.9, 73.5]),
        ("pixel (w/ norm)", "--target norm-pixel", [85.4, 73.9]),
    ],
    "mae-augment": [
        ("none", "--augment none", [84.0, 65.7]),
        ("crop, fixed size", "--augment crop-fixed", [84.7, 73.1]),
        ("crop, rand size", "", [84.9, 73.5]),
        ("crop + color jit", "--augment crop-color", [84.3, 71.9]),
    ],
    "mae-mask-sampling": [
        ("random 75", "", [84.9, 73.5]),
        ("block 50", "--mask-sampling block --mask-ratio 0.5", [83.9, 72.3]),
        ("block 75", "--mask-sampling block", [82.8, 63.9]),
        ("grid 75", "--mask-sampling grid", [84.0, 66.0]),
    ],
}  # fmt: skip


def run(script, flags, out):
    """The summary of a run: of the one that lies there finished, or of a new one."""
    if not (out / "summary.json").exists():
        begun = (out / "checkpoint.pt").exists()
        script.main(script.parse_args([*flags, "--resume" if begun else "--out", str(out)]))
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
    for case, flags, lecture in TABLES[args.table]:
        row = {"case": case, "flags": flags, "lecture": [number / 100 for number in lecture]}
        slug = re.sub("[^a-z0-9.]+", "-", flags)
        folders = [Path(f"runs/ablation-{name}{slug}-seed{seed}") for seed in args.seeds]
        try:
            runs = [
                run(script, [*f"{all_flags} {flags}".split(), "--seed", str(seed)], f)
                for seed, f in zip(args.seeds, folders, strict=True)
            ]
        except script.UserError as error:
            sys.exit(f"error: {error}")
        for key in keys:
            row[key] = [ChainMap(summary["trained"], *summary.get("semi_supervised", []))[key] for summary in runs]
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
