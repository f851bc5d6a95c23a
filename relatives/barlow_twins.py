"""Barlow Twins is SimCLR with a loss that compares the components of z instead of the images.

Each component of z should be the same in both views of an image, and carry information that no
other component carries. So the cross-correlation of the components over a batch should be the
identity matrix. A collapse is far from it: a component that is the same for all images correlates
with nothing, and one that repeats another is correlated off the diagonal. There are no negatives
and no temperature.

    Zbontar, Jing, Misra, LeCun, Deny: Barlow Twins: Self-Supervised Learning via Redundancy
    Reduction, ICML 2021. Equations 1 and 2 of the paper, for components a, b of the projections of
    the two views, each standardized over a batch:

    C_ab = 1/N sum_n z1_na z2_nb
    L = sum_a (1 - C_aa)^2 + lambda sum_a sum_{b != a} C_ab^2                    lambda = 0.005

    python relatives/barlow_twins.py --dataset cifar10 --compile      simclr.py's flags, and a width

The paper's projector has one layer more, its second views are blurred less and solarized, and its
optimizer, LARS, treats biases apart.
"""

import dataclasses
import sys
from pathlib import Path
from typing import ClassVar

from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import simclr


@dataclasses.dataclass
class Args(simclr.Args):
    script: str = "relatives/barlow_twins.py"
    projector_width: int = simclr.flag(512, "components of z; paper: 8192", 2)
    projection: ClassVar = "mlp"  # class variables are no flags: the head is always an MLP,
    temperature: ClassVar = None  # and there is no temperature


class BarlowTwins(simclr.SimCLR):
    """SimCLR with a wide projector: (B, 3, S, S) -> z (B, W)."""

    def __init__(self, args, image_size=32):
        super().__init__(args, image_size)
        D = self.projector[0].in_features
        W = args.projector_width
        self.projector = nn.Sequential(
            nn.Linear(D, W, bias=False), nn.BatchNorm1d(W), nn.ReLU(), nn.Linear(W, W)
        )


def cross_correlation(z1, z2):
    """Projections of the two views (N, W) each -> correlations of their components (W, W)."""
    z1 = (z1 - z1.mean(0)) / (z1.var(0, correction=0) + 1e-5).sqrt()
    z2 = (z2 - z2.mean(0)) / (z2.var(0, correction=0) + 1e-5).sqrt()
    return z1.T @ z2 / len(z1)


def barlow_twins_loss(z1, z2, lambd=0.005):
    """Equation 1: (N, W) each -> scalar; 0 if C is the identity, W if z has collapsed."""
    C = cross_correlation(z1, z2)
    diagonal = C.diagonal()
    redundancy = C.square().sum() - diagonal.square().sum()
    return (1 - diagonal).square().sum() + lambd * redundancy


def training_step(network, images, args, generator, progress, update):
    """Uint8 images (N, 3, S, S); update(loss) trains the network. Returns what to log."""
    x = common.normalize(simclr.two_views(images, args, generator, progress))  # (2N, 3, size, size)
    with simclr.autocast(x.device):
        z = network(x)
    z1, z2 = z.float().chunk(2)  # (N, W) each
    loss = barlow_twins_loss(simclr.gather(z1), simclr.gather(z2))  # over the batch of all GPUs
    update(loss)
    return {"loss": loss, "spread": simclr.spread(z1)}


if __name__ == "__main__":
    simclr.run(Args, __doc__, Model=BarlowTwins, training_step=training_step)
