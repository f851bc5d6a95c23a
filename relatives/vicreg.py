"""VICReg is SimCLR with a loss of three terms, none of which compares one image with another: no negatives.

Invariance: z is the same in both views of an image. Variance: every component varies over a batch, so that z cannot
collapse to a point. Covariance: no two components vary together, so that z cannot collapse to a line. Unlike Barlow
Twins it asks the last two of each view by itself, so that the views may have networks of their own: text and images.

    Bardes, Ponce, LeCun: VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning, ICLR 2022.
    Equations 1 to 6 of the paper, for z, z' of N images and W components, with the factors of the authors' code:

    v(z) = 1/W sum_j max(0, 1 - sqrt(Var(z_j) + 1e-4))  s(z, z') = 1/(N W) sum_n |z_n - z'_n|^2
    c(z) = 1/W sum_{i != j} Cov(z_i, z_j)^2             L = 25 s(z, z') + 25 (v(z) + v(z')) / 2 + c(z) + c(z')

    python relatives/vicreg.py --dataset cifar10 --compile                 the flags are simclr.py's, but for the head
"""

import dataclasses
import sys
from pathlib import Path

import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import simclr


@dataclasses.dataclass
class Args(simclr.Args):
    expander_width: int = simclr.flag(512, "components of z; paper: 8192", 2)
    projection: str = "mlp"  # this and temperature are no flags here
    temperature: float = 0.0
    command: str = simclr.Args.command.replace("simclr", "relatives/vicreg")


class VICReg(simclr.SimCLR):
    """SimCLR with a wide head, the expander: (B, 3, S, S) -> z (B, expander_width). The paper's has one layer more."""

    def __init__(self, args, image_size=32):
        super().__init__(args, image_size)
        D, W = self.projector[0].in_features, args.expander_width
        self.projector = nn.Sequential(nn.Linear(D, W, bias=False), nn.BatchNorm1d(W), nn.ReLU(), nn.Linear(W, W))


def variance(z):
    """z (N, W) -> v(z), scalar: how much the components' standard deviations fall short of 1."""
    return F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()


def covariance(z):
    """z (N, W) -> c(z), scalar: squared covariances of different components, per component."""
    C = z.T.cov()  # (W, W)
    return (C.square().sum() - C.diagonal().square().sum()) / len(C)


def vicreg_loss(z1, z2):
    """Projections of the two views of N images, (N, W) each, not normalized -> scalar."""
    return 25 * F.mse_loss(z1, z2) + 25 * (variance(z1) + variance(z2)) / 2 + covariance(z1) + covariance(z2)


if __name__ == "__main__":  # simclr.py, with these names in place of its own
    vars(simclr).update(METHOD="vicreg", __doc__=__doc__, Args=Args, SimCLR=VICReg, bound=lambda *_: None)
    vars(simclr).update(nt_xent=lambda z1, z2, _: vicreg_loss(z1, z2))
    simclr.run()
