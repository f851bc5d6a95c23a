"""MAE and DINO fine-tuned beside each other, by one recipe, each against its network from scratch.

    python results/fine_tuned.py runs/mae-cifar10-seed0 runs/dino-cifar10-seed0 --epochs 2 \\
        --record results/fine-tuned-cifar10.json

The recipe is mae.py's: with all labels, the mean of the patch tokens into a linear layer, crops,
less learning rate for lower blocks, but from scratch. Small encoders of both have the same blocks.
DINO's has a stem of convolutions before them, and patches of four times the area.
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
import mae
from results import factors
from results.ablation import commit_of_the_code


def encoder_of(method, model):
    """A model of mae.py, or of dino.py -> its encoder."""
    return model.teacher.encoder if method == "dino" else model.encoder


def measure(folder, data, args):
    """A finished run -> its row of the record."""
    start = time.perf_counter()
    summary, trained, before, after = factors.models(folder)
    method = summary["method"]
    row = {"method": method, "run": folder.name, "seed": trained.seed}
    row["fine_tuned"], _ = mae.fine_tune(encoder_of(method, after), data, args, args.layer_decay)
    row["from_scratch"], _ = mae.fine_tune(encoder_of(method, before), data, args, 1.0)
    row["seconds"] = time.perf_counter() - start
    return row


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="folders of mae.py and of dino.py")
    parser.add_argument("--epochs", type=int, default=4, help="passes over the labels")
    parser.add_argument("--record", type=Path, help="a JSON file to write")
    args = parser.parse_args(argv)
    factors.check(parser, args.runs, ["mae", "dino"], args.record)
    content = {"command": shlex.join(["python", *sys.argv]), "commit": commit_of_the_code()}
    content |= {"date": time.strftime("%Y-%m-%d"), "device": "cpu", "torch": torch.__version__}
    content |= {"threads": torch.get_num_threads(), "rows": []}
    for folder in args.runs:
        dataset = json.loads((folder / "args.json").read_text())["dataset"]
        words = ["--dataset", dataset, "--encoder", "small", "--fine-tune-epochs", args.epochs]
        recipe = mae.parse_args(list(map(str, words)))
        data = common.load_dataset(dataset, recipe.data_dir, recipe.image_size)
        row = measure(folder, data, recipe)
        content["rows"].append(row)
        scores = f"fine-tuned {row['fine_tuned']:.1%}  from scratch {row['from_scratch']:.1%}"
        print(f"{folder.name:28}{scores}", flush=True)
    if args.record:
        args.record.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
