"""What a contrastive loss does, where it can be seen: SimCLR with z of two components, on a circle.

    python results/circle.py --record results/circle.json
    python results/figures.py --circle results/circle.json -o circle.png

Three encoders: untrained; trained, with temperature 0.5, since 0.1 does not spread z over a circle;
and trained without negatives, by the distance of two views only. Measured are the two things that
the loss asks for, on 1,000 test images of shapes:

    alignment = mean |z - z'|^2                   over images, for two views of each; 0 at best
    uniformity = log mean exp(-2 |z - w|^2)       over pairs of images; on a circle -1.58 at best

    Wang, Isola: Understanding Contrastive Representation Learning through Alignment and Uniformity
    on the Hypersphere, ICML 2020.
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import common
import simclr
from results.ablation import commit_of_the_code


class OnCircle(simclr.SimCLR):
    """SimCLR with two components of z."""

    def __init__(self, args, image_size=32):
        super().__init__(args, image_size)
        self.projector[-1] = nn.Linear(self.projector[-1].in_features, 2)


def without_negatives(network, images, args, generator, progress, update):
    """A step that only brings the two views of an image together."""
    x = common.normalize(simclr.two_views(images, args, generator, progress))
    z1, z2 = network(x).chunk(2)
    loss = -F.cosine_similarity(z1, z2).mean()
    update(loss)
    return {"loss": loss, "spread": simclr.spread(z1)}


STEPS = {
    "untrained": None,
    "trained": simclr.training_step,
    "trained without negatives": without_negatives,
}


def alignment(z1, z2):
    """Two views of N images (N, D) each, of length 1 -> the mean square of their distance."""
    return (z1 - z2).square().sum(1).mean().item()


def uniformity(z):
    """N images (N, D), of length 1 -> log of the mean of exp(-2 |z - w|^2) over all pairs; 0 if all
    are the same."""
    return F.pdist(z).square().mul(-2).exp().mean().log().item()


def encoder_of(step, epochs):
    """A run in a folder that is not kept -> its model."""
    args = simclr.parse_args(["--epochs", str(epochs), "--temperature", "0.5"])
    torch.manual_seed(args.seed)
    model = OnCircle(args)  # with the weights that the run begins with
    if step:
        with tempfile.TemporaryDirectory() as folder:
            args.out = folder
            simclr.main(args, OnCircle, step)
            content = torch.load(Path(folder, "checkpoint.pt"), weights_only=True)
        model.load_state_dict(content["model"])
    return model.eval()


@torch.no_grad()
def measure(model, images, args):
    """Uint8 images (N, 3, S, S) -> alignment and uniformity, and the angles of z in radians."""
    views = simclr.two_views(images, args, torch.Generator().manual_seed(0))
    z1, z2 = F.normalize(model(common.normalize(views)), dim=1).chunk(2)
    z = F.normalize(model(common.normalize(images / 255)), dim=1)
    angles = torch.atan2(z[:, 1], z[:, 0])
    row = {"alignment": alignment(z1, z2), "uniformity": uniformity(z)}
    return row | {"angles": [round(angle, 3) for angle in angles.tolist()]}


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=12, help="of each run")
    parser.add_argument("--record", type=Path, help="a JSON file to write")
    args = parser.parse_args(argv)
    if args.record and not args.record.parent.is_dir():
        parser.error(f"--record {args.record}: there is no such folder")
    data = common.shapes_dataset()
    images = data.test_images[:1000]
    content = {"command": shlex.join(["python", *sys.argv]), "commit": commit_of_the_code()}
    content |= {"date": time.strftime("%Y-%m-%d"), "device": "cpu", "torch": torch.__version__}
    content |= {"classes": data.classes, "labels": data.test_labels[:1000].tolist(), "rows": []}
    for name, step in STEPS.items():
        model = encoder_of(step, args.epochs)
        row = {"encoder": name} | measure(model, images, simclr.parse_args([]))
        content["rows"].append(row)
        print(f"{name:28}alignment {row['alignment']:.2f}  uniformity {row['uniformity']:.2f}")
    if args.record:
        args.record.write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
