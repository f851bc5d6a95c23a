"""A table of the lecture at the demo's budget: every row with several seeds, mean and deviation.

    python results/ablation.py moco                  table 1 of MoCo v2: MLP head, aug+, cosine schedule
    python results/ablation.py moco --record results/moco-ablation.json

Each run is that of the bare script with the flags of its row, in runs/ablation-<table>-<row>-seed<seed>; what is
finished there is not run again.
"""

import argparse
import importlib
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

# table: script, and its rows: name, flags, and what the lecture's table has for it, in percent
TABLES = {
    "moco": ("moco", [
        ("v1", "--no-mlp --no-aug-plus --no-cos", 60.6),
        ("(a) MLP", "--mlp --no-aug-plus --no-cos", 66.2),
        ("(b) aug+", "--no-mlp --aug-plus --no-cos", 63.4),
        ("(c) MLP, aug+", "--mlp --aug-plus --no-cos", 67.3),
        ("(d) MLP, aug+, cos", "--mlp --aug-plus --cos", 67.5),
    ]),
}  # fmt: skip


def run(script, flags, out):
    """The summary of a run: of the one that lies there finished, or of a new one."""
    if not (out / "summary.json").exists():
        script.main(script.parse_args([*flags, "--resume", "--out", str(out)]))
    return json.loads((out / "summary.json").read_text())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--record", type=Path, help="a JSON file to write")
    args = parser.parse_args()
    name, cases = TABLES[args.table]
    script, rows = importlib.import_module(name), []
    for number, (case, flags, lecture) in enumerate(cases):
        row = {"case": case, "flags": flags, "lecture": lecture / 100}
        folders = [Path(f"runs/ablation-{args.table}-{number}-seed{seed}") for seed in args.seeds]
        try:
            runs = [
                run(script, [*flags.split(), "--seed", str(seed)], f)
                for seed, f in zip(args.seeds, folders, strict=True)
            ]
        except script.UserError as error:
            sys.exit(f"error: {error}")
        for key in ("linear_probe", "knn"):
            row[key] = [summary["trained"][key] for summary in runs]
        rows.append(row)
    print(f"\n{'':24}{'lecture':>10}{'linear probe':>18}{'kNN':>18}")
    for row in rows:
        cells = (
            f"{statistics.mean(v):.1%} ± {statistics.stdev(v) if len(v) > 1 else 0:.1%}"
            for v in (row["linear_probe"], row["knn"])
        )
        print(f"{row['case']:24}{row['lecture']:>10.1%}" + "".join(f"{cell:>18}" for cell in cells))
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
