"""VICReg is SimCLR with a loss of three terms, none of which compares one image with another.

Invariance: z is the same in both views of an image. Variance: every component varies over a batch,
so that z cannot collapse to a point. Covariance: no two components vary together, so that z cannot
collapse to a line. There are no negatives. Unlike the loss of Barlow Twins, the last two terms take
each view by itself, so the views may have networks of their own, as text and images do.

    Bardes, Ponce, LeCun: VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised
    Learning, ICLR 2022. Equations 1 to 6 of the paper, for z, z' of N images and W components, with
    the factors of the authors' code:

    v(z) = 1/W sum_j max(0, 1 - sqrt(Var(z_j) + 1e-4))   s(z, z') = 1/(N W) sum_n |z_n - z'_n|^2
    c(z) = 1/W sum_{i != j} Cov(z_i, z_j)^2   L = 25 s(z, z') + 25 (v(z) + v(z')) / 2 + c(z) + c(z')

    python relatives/vicreg.py --dataset cifar10 --compile            simclr.py's flags, and a width

The paper's expander has one layer more, and its optimizer, LARS, treats biases apart.
"""

import dataclasses
import sys
from pathlib import Path
from typing import ClassVar

import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import simclr


@dataclasses.dataclass
class Args(simclr.Args):
    script: str = "relatives/vicreg.py"
    expander_width: int = simclr.flag(512, "components of z; paper: 8192", 2)
    projection: ClassVar = "mlp"  # class variables are no flags: the head is always an MLP,
    temperature: ClassVar = None  # and there is no temperature


class VICReg(simclr.SimCLR):
    """SimCLR with a wide head, the expander: (B, 3, S, S) -> z (B, W)."""

    def __init__(self, args, image_size=32):
        super().__init__(args, image_size)
        D = self.projector[0].in_features
        W = args.expander_width
        self.projector = nn.Sequential(
            nn.Linear(D, W, bias=False), nn.BatchNorm1d(W), nn.ReLU(), nn.Linear(W, W)
        )


def variance(z):
    """z (N, W) -> v(z), scalar: how far the components' standard deviations fall short of 1."""
    return F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()


def covariance(z):
    """z (N, W) -> c(z), scalar: squared covariances of different components, per component."""
    C = z.T.cov()  # (W, W)
    return (C.square().sum() - C.diagonal().square().sum()) / len(C)


def vicreg_loss(z1, z2):
    """Projections of the two views of N images, (N, W) each, not normalized -> scalar."""
    loss = 25 * F.mse_loss(z1, z2) + 25 * (variance(z1) + variance(z2)) / 2
    return loss + covariance(z1) + covariance(z2)


def training_step(network, images, args, generator, progress, update):
    """Uint8 images (N, 3, S, S); update(loss) trains the network. Returns what to log."""
    x = common.normalize(simclr.two_views(images, args, generator, progress))  # (2N, 3, size, size)
    with simclr.autocast(x.device):
        z = network(x)
    z1, z2 = z.float().chunk(2)  # (N, W) each
    loss = vicreg_loss(simclr.gather(z1), simclr.gather(z2))  # over the batch of all GPUs
    update(loss)
    return {"loss": loss, "spread": simclr.spread(z1)}


if __name__ == "__main__":
    simclr.run(Args, __doc__, Model=VICReg, training_step=training_step)
