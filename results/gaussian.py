"""What LeJEPA makes of z: the distribution of its projections onto lines, untrained and trained.

    python results/gaussian.py runs/lejepa-shapes-seed0 --record results/lejepa-gaussian.json
    python results/figures.py --gaussian results/lejepa-gaussian.json -o gaussian.png

Of the test images, and three directions drawn at random, which are not those of the training.
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import common
from relatives import lejepa
from results.ablation import commit_of_the_code

BINS = 40  # from -4 to 4


@torch.no_grad()
def densities(model, images, directions):
    """Uint8 images (N, 3, S, S), directions (W, K) of length 1 -> for each direction the density of
    z in BINS bins, whose sum is 1 / their width where no z is outside."""
    z = model.eval()(common.normalize(images / 255))  # (N, W)
    counts = [torch.histc(s, BINS, -4, 4) for s in (z @ directions).T]
    return [(count / len(z) * BINS / 8).tolist() for count in counts]


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a finished run of lejepa.py")
    parser.add_argument("--record", type=Path, help="a JSON file to write")
    args = parser.parse_args(argv)
    if args.record and not args.record.parent.is_dir():
        parser.error(f"--record {args.record}: there is no such folder")
    try:
        trained = lejepa.Args(**json.loads((args.run / "args.json").read_text()))
        weights = torch.load(args.run / "checkpoint.pt", weights_only=True)["model"]
    except (OSError, TypeError, ValueError) as error:
        sys.exit(f"error: {args.run}: not a finished run of lejepa.py ({error})")
    data = common.load_dataset(trained.dataset, trained.data_dir, trained.image_size)
    noise = torch.randn(trained.width, 3, generator=torch.Generator().manual_seed(0))
    directions = F.normalize(noise, dim=0)
    torch.manual_seed(trained.seed)
    model = lejepa.LeJEPA(trained, data.test_images.shape[3])  # with the weights it began with
    content = {"command": shlex.join(["python", *sys.argv]), "commit": commit_of_the_code()}
    content |= {"date": time.strftime("%Y-%m-%d"), "device": "cpu", "torch": torch.__version__}
    content["untrained"] = densities(model, data.test_images, directions)
    model.load_state_dict(weights)
    content["trained"] = densities(model, data.test_images, directions)
    if args.record:
        args.record.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
