"""Draws the log of one or more runs over the epochs, or accuracy over the number of labels (needs
matplotlib).

    python results/figures.py runs/simclr-shapes-seed0 results/moco-shapes-seed0.json -o curves.png
    python results/figures.py --labels results/rotnet-shapes-labels.json -o labels.png
    python results/figures.py --few-shot results/clip-shapes-seed0.json -o few-shot.png

A run is a folder, finished or not, or a record, a summary.json. --labels draws the lecture's
semi-supervised figure from runs with --labels, --few-shot the lecture's zero-shot CLIP against
few-shot probes; these must be finished.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

LABELS = {
    "loss": "loss (nats)",
    "bound": "bound log(negatives + 1) - loss (nats)",
    "rotation": "rotations predicted correctly, training",
    "position": "positions of patches predicted correctly",
    "permutation": "permutations of tiles predicted correctly",
    "color": "classes of color predicted correctly",
    "reconstruction": "mean squared error in the hole",
    "adversarial": "E[log D(x) + log(1 - D(F))], -1.39 if D guesses",
    "accuracy": "queries that find their key",
    "entropy": "entropy of a teacher's target (nats)",
    "entropy_of_mean": "entropy of a batch's mean target (nats)",
    "kl": "KL divergence, teacher to student (nats)",
    "logit_scale": "scale of the logits, 1 / temperature",
    "val_recall": "validation recall@10, mean of both directions",
    "spread": "spread of projections z, 0 if they collapse",
    "knn": "held-out kNN accuracy",
}


def read(path, key):
    """A run folder or a record -> its history, one dict an epoch, or another table of the
    summary."""
    if path.is_dir() and key == "history":
        return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((path / "summary.json" if path.is_dir() else path).read_text())
    if key == "few_shot":
        found = [
            (n, summary["trained"].get(f"linear_probe_{n}_per_class")) for n in (1, 2, 4, 8, 16)
        ]
        zero_shot = summary["trained"].get("zero_shot")
        return [
            {"labels_per_class": n, "linear_probe": y, "zero_shot": zero_shot}
            for n, y in found
            if y is not None
        ]
    return summary[key]


def curve(rows, x, y):
    return zip(*((row[x], row[y]) for row in rows if row.get(y) is not None), strict=True)


def finish(figure, panels, out):
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False
    )
    figure.savefig(out, dpi=120)


def draw(runs, out):
    """runs {name: lines} -> a figure with a panel for each quantity that they have."""
    keys = [
        key
        for key in LABELS
        if any(line.get(key) is not None for lines in runs.values() for line in lines)
    ]
    if not keys:
        raise ValueError("no epoch is logged yet")
    figure, panels = pyplot.subplots(
        1, len(keys), figsize=(4 * len(keys), 3.4), layout="constrained", squeeze=False
    )
    for panel, key in zip(panels[0], keys, strict=True):
        for name, lines in runs.items():
            if any(line.get(key) is not None for line in lines):
                panel.plot(*curve(lines, "epoch", key), marker="o", markersize=3, label=name)
        panel.set(xlabel="epoch", title=LABELS[key])
    finish(figure, panels[0], out)


def draw_labels(runs, out, x="labels"):
    """runs {name: rows of a table with a number of labels in the column x} -> accuracy on test over
    that number."""
    figure, panel = pyplot.subplots(figsize=(5, 3.6), layout="constrained")
    for name, rows in runs.items():
        if not rows:
            raise ValueError(f"{name} has no table of accuracies over {x.replace('_', ' ')}")
        for key in rows[0]:
            if key != x:
                label = (
                    key.replace("_", " ") if len(runs) == 1 else f"{name}, {key.replace('_', ' ')}"
                )
                panel.plot(
                    *curve(sorted(rows, key=lambda row: row[x]), x, key), marker="o", label=label
                )
    counts = sorted({row[x] for rows in runs.values() for row in rows})
    panel.set(xscale="log", xlabel=x.replace("_", " "), ylabel="accuracy on test", ylim=(0, 1.03))
    panel.set_xticks(counts, [f"{count:,}" for count in counts])
    panel.minorticks_off()
    finish(figure, [panel], out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--labels", dest="table", action="store_const", const="semi_supervised")
    parser.add_argument("--few-shot", dest="table", action="store_const", const="few_shot")
    parser.add_argument("-o", "--out", type=Path, default=Path("curves.png"))
    args = parser.parse_args()
    try:
        runs = {path.stem: read(path, args.table or "history") for path in args.runs}
        if args.table:
            draw_labels(
                runs,
                args.out,
                x="labels" if args.table == "semi_supervised" else "labels_per_class",
            )
        else:
            draw(runs, args.out)
    except (OSError, KeyError, ValueError) as error:
        sys.exit(f"error: not a run folder or a record ({error})")
