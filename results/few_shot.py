"""Zero-shot CLIP against linear probes with few labels, of its features and of other methods'.

    python results/few_shot.py runs/{clip,simclr,rotnet}-shapes-seed0 --record results/few-shot.json
    python results/figures.py --few-shot results/few-shot.json -o few-shot.png

The lecture's figure (CLIP, figure 6). All runs are asked with the same labels: a number of them for
each kind of thing, drawn three times, of which the mean is taken. Nothing is trained but the
probes.
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import common
import simclr
from results import factors
from results.ablation import commit_of_the_code

COUNTS = (1, 2, 4, 8, 16)
PARTS = {"clip": "h", "simclr": "h", "moco": "h", "rotnet": "block 2"}  # the features of a method


def few_shot(h, y, test_h, test_y):
    """Features and labels, training and test -> {labels per class: accuracy of a linear probe, the
    mean of three draws}."""
    result = {}
    for count in COUNTS:
        samples = [common.labelled_rows(y, count, seed) for seed in range(3)]
        accuracies = [simclr.linear_probe(h[rows], y[rows], test_h, test_y) for rows in samples]
        result[count] = sum(accuracies) / 3
    return result


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs on shapes")
    parser.add_argument("--record", type=Path, help="a JSON file to write")
    args = parser.parse_args(argv)
    factors.check(parser, args.runs, list(PARTS), args.record)
    (scenes, images), (test_scenes, test_images) = factors.draw()
    content = {"command": shlex.join(["python", *sys.argv]), "commit": commit_of_the_code()}
    content |= {"date": time.strftime("%Y-%m-%d"), "device": "cpu", "torch": torch.__version__}
    content["rows"] = []
    for folder in args.runs:
        summary, _, trained = factors.networks(folder)
        network = trained[PARTS[summary["method"]]]
        h = [simclr.features(network, x) for x in (images, test_images)]
        row = {"method": summary["method"], "seed": summary["args"]["seed"]}
        row["few_shot"] = few_shot(h[0], scenes["label"], h[1], test_scenes["label"])
        if "zero_shot" in summary["trained"]:
            row["zero_shot"] = summary["trained"]["zero_shot"]
        content["rows"].append(row)
        cells = "  ".join(f"{count}: {value:.1%}" for count, value in row["few_shot"].items())
        print(f"{folder.name:24}{cells}", flush=True)
    if args.record:
        args.record.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
