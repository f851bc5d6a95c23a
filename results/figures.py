"""Draws the log of one or more runs over the epochs, or what a record holds (needs matplotlib).

    python results/figures.py runs/simclr-shapes-seed0 results/moco-shapes-seed0.json -o curves.png
    python results/figures.py --labels results/rotnet-shapes-labels.json -o labels.png
    python results/figures.py --few-shot results/few-shot.json -o few-shot.png
    python results/figures.py --factors results/factors.json -o factors.png
    python results/figures.py --bound results/infonce.json -o infonce.png
    python results/figures.py --circle results/circle.json -o circle.png
    python results/figures.py --gaussian results/lejepa-gaussian.json -o gaussian.png

A run is a folder, finished or not, or a record, a summary.json. --labels draws the lecture's
semi-supervised figure from finished runs with --labels. --few-shot, --factors, --bound, --circle
and --gaussian draw a record of few_shot.py, factors.py, infonce.py, circle.py and gaussian.py.
Beside the file -o lies the same as .svg.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "figures.py"  # the same figure is then the same file
from matplotlib import pyplot  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent))
from results.tables import TITLES, factor_means  # noqa: E402

LABELS = {
    "loss": "loss (nats)",
    "bound": "bound log(negatives + 1) - loss (nats),\ndotted: most it can be",
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
    "rank": "effective rank of h",
    "knn": "held-out kNN accuracy",
}


def read(path):
    """A run folder, finished or not, or a record -> its history, one dict an epoch."""
    if path.is_dir():
        return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return json.loads(path.read_text())["history"]


def read_summary(path):
    """A folder of a finished run, or a record -> summary.json."""
    return json.loads((path / "summary.json" if path.is_dir() else path).read_text())


def few_labels(summary):
    """A run with --labels -> rows of accuracies."""
    return summary["semi_supervised"]


def few_shot(record):
    """A record of few_shot.py -> rows of the accuracies of each method's probes, and zero-shot."""
    rows = []
    for count in record["rows"][0]["few_shot"]:
        row = {"labels per class": int(count)}
        for method in record["rows"]:
            row[TITLES[method["method"]]] = method["few_shot"][count]
            if "zero_shot" in method:
                row[f"{TITLES[method['method']]}, zero-shot"] = method["zero_shot"]
        rows.append(row)
    return rows


def plot(panel, rows, x, y, label, **style):
    """One column of rows over another, without the rows that lack it."""
    rows = [row for row in rows if row.get(y) is not None]
    panel.plot([row[x] for row in rows], [row[y] for row in rows], label=label, marker="o", **style)


def save(figure, out):
    """As the file `out`, and beside it as .svg, which slides can enlarge."""
    figure.savefig(out, dpi=120)
    figure.savefig(out.with_suffix(".svg"), metadata={"Date": None})


def finish(figure, panels, out):
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    save(figure, out)


def draw_curves(runs, out):
    """runs {name: history} -> a figure with a panel for each quantity that a run has more than
    twice, since two points are no curve."""
    keys = []
    for key in LABELS:
        points = [sum(key in line for line in history) for history in runs.values()]
        if max(points, default=0) > 2:
            keys.append(key)
    if not keys:
        raise ValueError("fewer than three epochs are logged")
    size = (4 * len(keys), 3.4)
    figure, panels = pyplot.subplots(
        1, len(keys), figsize=size, layout="constrained", squeeze=False
    )
    for panel, key in zip(panels[0], keys, strict=True):
        for name, history in runs.items():
            plot(panel, history, "epoch", key, name, markersize=3)
            if key == "bound" and key in history[-1]:
                ceiling = history[-1]["loss"] + history[-1]["bound"]  # log(negatives + 1)
                color = panel.get_lines()[-1].get_color()
                panel.axhline(ceiling, color=color, linestyle=":")
        panel.set(xlabel="epoch", title=LABELS[key])
    finish(figure, panels[0], out)


def draw_labels(runs, out):
    """runs {name: rows, of which the first column is a number of labels} -> accuracies on test over
    that number."""
    figure, panel = pyplot.subplots(figsize=(6, 4), layout="constrained")
    counts = set()
    for name, rows in runs.items():
        if not rows:
            raise ValueError(f"{name} has no accuracies with few labels")
        x, *keys = rows[0]
        rows = sorted(rows, key=lambda row: row[x])
        counts |= {row[x] for row in rows}
        for key in keys:
            title = key.replace("_", " ")
            plot(panel, rows, x, key, title if len(runs) == 1 else f"{name}, {title}")
    panel.set(xscale="log", xlabel=x, ylabel="accuracy on test", ylim=(0, 1.03))
    panel.set_title("What few labels are enough for", fontsize=11)
    panel.set_xticks(sorted(counts), [f"{count:,}" for count in sorted(counts)])
    panel.minorticks_off()
    finish(figure, [panel], out)


def draw_factors(record, out):
    """A record of factors.py -> a heat map, means over the seeds: a row for each factor, a column
    for each network. White is chance, dark blue is perfect."""
    means = factor_means(record)
    chance = record["chance"]
    size = (2.8 + 0.62 * len(means), 2.2 + 0.42 * len(chance))
    figure, panel = pyplot.subplots(figsize=size, layout="constrained")
    shades = []
    for row, (factor, floor) in enumerate(chance.items()):
        shades.append([])
        for column, scores in enumerate(means.values()):
            shade = max(0.0, (scores[factor] - floor) / (1 - floor))
            shades[row].append(shade)
            text = f"{100 * scores[factor]:.0f} %" if floor else f"{scores[factor]:.2f}"
            style = {"ha": "center", "va": "center", "fontsize": 8}
            panel.text(column, row, text, color="white" if shade > 0.6 else "black", **style)
    panel.imshow(shades, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    panel.set_xticks(range(len(means)), means, rotation=40, ha="left", fontsize=9)
    names = [f"{name} ({'accuracy' if floor else 'R²'})" for name, floor in chance.items()]
    panel.set_yticks(range(len(names)), names, fontsize=9)
    panel.tick_params(length=0, labelbottom=False, labeltop=True)
    panel.spines[:].set_visible(False)
    panel.axhline(len(names) - 3.5, color="black", linewidth=0.8)  # below: what was done to images
    figure.suptitle("What a linear probe reads from frozen features", fontsize=11)
    save(figure, out)


def draw_bound(record, out):
    """A record of infonce.py -> the bound over the number of candidates, a line for each mutual
    information, which is dotted."""
    figure, panel = pyplot.subplots(figsize=(5, 4), layout="constrained")
    rows = record["rows"]
    sizes = sorted({row["N"] for row in rows})
    for information in sorted({row["information"] for row in rows}):
        own = [row for row in rows if row["information"] == information]
        x = [row["N"] for row in own]
        y = [row["bound"] for row in own]
        (line,) = panel.plot(x, y, label=f"I = {information}", marker="o", markersize=3)
        panel.axhline(information, color=line.get_color(), linewidth=0.8, linestyle=":")
    panel.plot(sizes, [math.log(N) for N in sizes], color="black", label="log N")
    panel.set(xscale="log", xlabel="candidates N", ylabel="log N - InfoNCE (nats)", ylim=(0, 9))
    panel.set_xticks(sizes[1::2], [f"{N:,}" for N in sizes[1::2]])
    panel.minorticks_off()
    panel.set_title("InfoNCE bounds mutual information from below", fontsize=11)
    finish(figure, [panel], out)


def draw_circle(record, out):
    """A record of circle.py -> a circle for each encoder: how many images of which class have z in
    each of 48 directions, scaled to the highest bar."""
    rows = record["rows"]
    size = (4 * len(rows), 5)
    figure, panels = pyplot.subplots(
        1, len(rows), figsize=size, layout="constrained", subplot_kw={"projection": "polar"}
    )
    figure.get_layout_engine().set(h_pad=0.15)  # or the titles would be cut off
    bins = 48
    width = 2 * math.pi / bins
    for panel, row in zip(panels, rows, strict=True):
        counts = [[0] * bins for _ in record["classes"]]
        for angle, label in zip(row["angles"], record["labels"], strict=True):
            counts[label][int(angle % (2 * math.pi) / width) % bins] += 1
        highest = max(map(sum, zip(*counts, strict=True)))
        bottom = [1.0] * bins
        for name, own in zip(record["classes"], counts, strict=True):
            heights = [count / highest for count in own]
            middles = [(k + 0.5) * width for k in range(bins)]
            panel.bar(middles, heights, width, bottom, label=name)
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
        terms = [f"{key} {round(row[key], 2) + 0:.2f}" for key in ("alignment", "uniformity")]
        panel.set_title(f"{row['encoder']}\n{', '.join(terms)}", fontsize=11)  # + 0: none is -0.00
        panel.set(ylim=(0, 2), xticks=[], yticks=[1.0], yticklabels=[])
        panel.spines[:].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    save(figure, out)


def draw_gaussian(record, out):
    """A record of gaussian.py -> two panels of densities, a line for each direction, beside that of
    the standard Gaussian."""
    figure, panels = pyplot.subplots(1, 2, figsize=(8, 3.6), layout="constrained", sharey=True)
    for panel, name in zip(panels, ("untrained", "trained"), strict=True):
        for number, density in enumerate(record[name], 1):
            edges = [-4 + 8 * k / len(density) for k in range(len(density) + 1)]
            panel.stairs(density, edges, label=f"direction {number}")
        x = [k / 20 for k in range(-80, 81)]
        y = [math.exp(-t * t / 2) / math.sqrt(2 * math.pi) for t in x]
        panel.plot(x, y, color="black", label="standard Gaussian")
        panel.set(xlabel="z, projected", title=name, ylim=(0, 1.2))
    panels[0].set_ylabel("density")
    finish(figure, panels, out)


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--labels", dest="table", action="store_const", const=few_labels)
    parser.add_argument("--few-shot", dest="table", action="store_const", const=few_shot)
    parser.add_argument("--factors", dest="draw", action="store_const", const=draw_factors)
    parser.add_argument("--bound", dest="draw", action="store_const", const=draw_bound)
    parser.add_argument("--circle", dest="draw", action="store_const", const=draw_circle)
    parser.add_argument("--gaussian", dest="draw", action="store_const", const=draw_gaussian)
    parser.add_argument("-o", "--out", type=Path, default=Path("curves.png"))
    args = parser.parse_args(argv)
    try:
        if args.draw:
            (path,) = args.runs
            args.draw(read_summary(path), args.out)
        elif args.table:
            runs = {path.stem: args.table(read_summary(path)) for path in args.runs}
            draw_labels(runs, args.out)
        else:
            runs = {path.stem: read(path) for path in args.runs}
            draw_curves(runs, args.out)
    except (OSError, KeyError, ValueError) as error:
        sys.exit(f"error: not a run folder or a record ({error})")


if __name__ == "__main__":
    main()
