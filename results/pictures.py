"""One figure of several runs, on the same test images.

    python results/pictures.py RUN RUN ... -o mae-reconstruction-ratios.png
    python results/pictures.py RUN RUN ... -o inpainting-painted.png

Runs of mae.py, such as those of `ablation.py mae-mask-ratio`: images with as much masked as in each
run, and completed by it. Runs of relatives/inpainting.py: the same holes, filled by each run.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import common
import mae
import rotnet
from relatives import inpainting
from results import factors


def reconstructions(runs, images):
    """Runs of mae.py and uint8 images (R, 3, S, S) -> {title: images (R, C, 3, S, S)}."""
    blocks = {}
    for args, model in runs:
        masked, completed, _ = mae.reconstruct(model, images, args)
        blocks[f"{100 * args.mask_ratio:.0f} % masked"] = torch.stack([masked, completed], dim=1)
    return blocks | {"as it is": images[:, None] / 255}


def filled_holes(runs, images):
    """Runs of inpainting.py and uint8 images (R, 3, S, S) -> {title: images (R, 1, 3, S, S)}."""
    x = images / 255
    mask = inpainting.random_hole(x, torch.Generator().manual_seed(0))
    mean = torch.tensor(common.MEAN)[:, None, None]
    std = torch.tensor(common.STD)[:, None, None]
    blocks = {"with a hole": x.lerp(torch.full_like(x, 0.5), mask)}
    for args, model in runs:
        filled, *_ = model(common.normalize(x), mask)
        title = f"weight {args.adversarial:g}" if args.adversarial else "no adversary"
        blocks[title] = (filled * std + mean).clamp(0, 1)
    blocks["as it is"] = x
    return {title: images[:, None] for title, images in blocks.items()}


FIGURES = {"mae": reconstructions, "inpainting": filled_holes}


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    parser.add_argument("-o", "--out", type=Path, default=Path("pictures.png"))
    args = parser.parse_args(argv)
    factors.check(parser, args.runs, list(FIGURES))
    runs = []
    methods = set()
    datasets = set()
    for folder in args.runs:
        summary, own, _, model = factors.models(folder)
        methods.add(summary["method"])
        datasets.add(own.dataset)
        runs.append((own, model))
    if len(methods) > 1:
        parser.error("all runs must be of mae.py, or all of relatives/inpainting.py")
    if len(datasets) > 1:
        parser.error("all runs must be on the same images")
    data = common.load_dataset(own.dataset, own.data_dir, own.image_size)
    with torch.no_grad():
        blocks = FIGURES[methods.pop()](runs, data.test_images[data.examples()[:5]])
    rotnet.save_sheet(args.out, blocks)


if __name__ == "__main__":
    main()
