"""The lecture's bound, I(x; y) >= log N - InfoNCE, where the mutual information I is known.

    python results/infonce.py --record results/infonce.json
    python results/figures.py --bound results/infonce.json -o infonce.png

x and y are Gaussian vectors, of which the components are correlated in pairs by r, so that
I = -d/2 log(1 - r^2) nats. Nothing is trained: the score is the best there is, p(y | x) / p(y), so
what is missing below I is the bound's own. It cannot exceed log N, the entropy of the question
which of N candidates belongs to x.
"""

import argparse
import json
import math
import shlex
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from results.ablation import commit_of_the_code

DIMENSIONS = 16
INFORMATION = (1, 2, 4, 6, 8)  # nats
CANDIDATES = [2**k for k in range(1, 13)]  # N, one positive and N - 1 negatives


def log_ratio(x, y, r):
    """x, y (N, d) -> log p(y_j | x_i) / p(y_j) for every pair (N, N): y given x is Gaussian with
    mean r x and variance 1 - r^2."""
    distance = torch.cdist(r * x, y, compute_mode="donot_use_mm_for_euclid_dist")
    given_x = -distance.square() / (2 * (1 - r * r)) - x.shape[1] / 2 * math.log(1 - r * r)
    return given_x + y.square().sum(1) / 2


def estimate(information, N, generator):
    """log N - InfoNCE in nats, the mean over batches of N pairs; of 4,096 pairs in all."""
    r = math.sqrt(1 - math.exp(-2 * information / DIMENSIONS))
    losses = []
    for _ in range(4096 // N):
        x, noise = torch.randn(2, N, DIMENSIONS, generator=generator)
        y = r * x + math.sqrt(1 - r * r) * noise  # y_i belongs to x_i
        losses.append(F.cross_entropy(log_ratio(x, y, r), torch.arange(N)).item())
    return math.log(N) - sum(losses) / len(losses)


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", type=Path, help="a JSON file to write")
    args = parser.parse_args(argv)
    if args.record and not args.record.parent.is_dir():
        parser.error(f"--record {args.record}: there is no such folder")
    generator = torch.Generator().manual_seed(0)
    rows = []
    for information in INFORMATION:
        for N in CANDIDATES:
            value = estimate(information, N, generator)
            rows.append({"information": information, "N": N, "bound": value})
            print(f"I = {information}  N = {N:4}  log N - InfoNCE = {value:.2f}", flush=True)
    content = {"command": shlex.join(["python", *sys.argv]), "commit": commit_of_the_code()}
    content |= {"date": time.strftime("%Y-%m-%d"), "device": "cpu", "torch": torch.__version__}
    content["rows"] = rows
    if args.record:
        args.record.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
