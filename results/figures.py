"""Draws loss, bound and held-out kNN over the epochs of one or more runs (needs matplotlib).

    python results/figures.py runs/simclr-shapes-seed0 results/simclr-shapes-seed1.json -o curves.png

A run is a folder with metrics.jsonl, finished or not, or a record, a summary.json.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

LABELS = {"loss": "loss (nats)", "bound": "bound log(2N - 1) - loss (nats)", "knn": "held-out kNN accuracy"}


def read(path):
    """A run folder or a record -> its lines, one dict an epoch."""
    if path.is_dir():
        return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return json.loads(path.read_text())["history"]


def draw(runs, out):
    """runs {name: lines} -> a picture with a panel for each quantity."""
    figure, panels = pyplot.subplots(1, len(LABELS), figsize=(12, 3.4), layout="constrained")
    for panel, (key, label) in zip(panels, LABELS.items(), strict=True):
        for name, lines in runs.items():
            points = [(line["epoch"], line[key]) for line in lines if key in line]
            panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        panel.set(xlabel="epoch", title=label)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("-o", "--out", type=Path, default=Path("curves.png"))
    args = parser.parse_args()
    try:
        draw({path.stem: read(path) for path in args.runs}, args.out)
    except (OSError, KeyError, ValueError) as error:
        sys.exit(f"error: not a run folder or a record ({error})")
