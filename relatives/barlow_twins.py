"""Barlow Twins is SimCLR with a loss that compares the components of z, not the images: no negatives, no temperature.

Each component of z should be the same in both views of an image, and should say what no other component says. So the
cross-correlation of the components over a batch should be the identity matrix. A collapse is far from it: a component
that is the same for all images correlates with nothing, and one that repeats another is correlated off the diagonal.

    Zbontar, Jing, Misra, LeCun, Deny: Barlow Twins: Self-Supervised Learning via Redundancy Reduction, ICML 2021.
    Equations 1 and 2 of the paper, for components a, b of the two views' projections, each standardized over a batch:

    C_ab = 1/N sum_n z1_na z2_nb
    L = sum_a (1 - C_aa)^2 + lambda sum_a sum_{b != a} C_ab^2                     lambda = 0.005

    python relatives/barlow_twins.py --dataset cifar10 --compile           the flags are simclr.py's, but for the head
"""

import dataclasses
import sys
from pathlib import Path

from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import simclr


@dataclasses.dataclass
class Args(simclr.Args):
    projector_width: int = simclr.flag(512, "components of z; paper: 8192", 2)
    projection: str = "mlp"  # this and temperature are no flags here
    temperature: float = 0.0
    command: str = simclr.Args.command.replace("simclr", "relatives/barlow_twins")


class BarlowTwins(simclr.SimCLR):
    """SimCLR with a wide projector: (B, 3, S, S) -> z (B, projector_width). The paper's has one layer more."""

    def __init__(self, args, image_size=32):
        super().__init__(args, image_size)
        D, W = self.projector[0].in_features, args.projector_width
        self.projector = nn.Sequential(nn.Linear(D, W, bias=False), nn.BatchNorm1d(W), nn.ReLU(), nn.Linear(W, W))


def cross_correlation(z1, z2):
    """Projections of the two views (N, W) each -> correlations of their components over the N images (W, W)."""
    z1, z2 = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (z1, z2))
    return z1.T @ z2 / len(z1)


def barlow_twins_loss(z1, z2, redundancy=0.005):
    """Equation 1: projections of the two views (N, W) each -> scalar; 0 if C is the identity, W if z has collapsed."""
    C = cross_correlation(z1, z2)
    diagonal = C.diagonal()
    return (1 - diagonal).square().sum() + redundancy * (C.square().sum() - diagonal.square().sum())


if __name__ == "__main__":  # simclr.py, with these names in place of its own
    vars(simclr).update(METHOD="barlow_twins", __doc__=__doc__, Args=Args, SimCLR=BarlowTwins, bound=lambda *_: None)
    vars(simclr).update(nt_xent=lambda z1, z2, _: barlow_twins_loss(z1, z2))
    simclr.run()
