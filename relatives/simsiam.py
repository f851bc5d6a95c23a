"""SimSiam is SimCLR without negatives: a predictor and a stop-gradient keep z from collapsing.

A small network, the predictor, predicts the z of one view from that of the other, and what is
predicted gets no gradient. Without either of them, the shortest way to a perfect prediction is a z
that is the same for all images. With both, the network chases a target that it cannot pull toward
itself. Unlike in BYOL there is no second network.

    Chen, He: Exploring Simple Siamese Representation Learning, CVPR 2021. Algorithm 1 of the paper,
    for projections z1, z2 of two views and their predictions p1 = h(z1), p2 = h(z2):

    D(p, z) = - p . z / (|p| |z|)                          no gradient to z
    L = D(p1, z2) / 2 + D(p2, z1) / 2                      from -1, where the views agree

    python relatives/simsiam.py --dataset cifar10 --compile       simclr.py's flags, and some more
    python relatives/simsiam.py --no-predictor                    collapses: `spread` falls
    python relatives/simsiam.py --no-stop-gradient                the same

The paper's projector has one layer more, and its predictor a constant learning rate.
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
    script: str = "relatives/simsiam.py"
    width: int = simclr.flag(512, "components of z; paper: 2048", 4)
    predictor: bool = simclr.flag(True, "p = h(z) with a bottleneck of a quarter of the width")
    stop_gradient: bool = simclr.flag(True, "no gradient to the z that is predicted")
    projection: ClassVar = "mlp"  # class variables are no flags: the head is always an MLP,
    temperature: ClassVar = None  # and there is no temperature


SHAPES = simclr.SHAPES | dict(lr=3e-3)  # half of SimCLR's


def mlp(D, hidden, out):
    """(B, D) -> (B, out)."""
    return nn.Sequential(
        nn.Linear(D, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out)
    )


class SimSiam(simclr.SimCLR):
    """SimCLR with a predictor: (B, 3, S, S) -> predictions p and projections z, (B, W) each."""

    def __init__(self, args, image_size=32):
        super().__init__(args, image_size)
        D = self.projector[0].in_features
        W = args.width
        self.projector = mlp(D, W, W).append(nn.BatchNorm1d(W, affine=False))
        self.predictor = mlp(W, W // 4, W) if args.predictor else nn.Identity()

    def forward(self, x):
        z = super().forward(x)
        return self.predictor(z), z


def simsiam_loss(p1, z1, p2, z2):
    """Algorithm 1: predictions and projections of the two views (N, W) each -> scalar."""
    return -(F.cosine_similarity(p1, z2).mean() + F.cosine_similarity(p2, z1).mean()) / 2


def training_step(network, images, args, generator, progress, update):
    """Uint8 images (N, 3, S, S); update(loss) trains the network. Returns what to log."""
    x = common.normalize(simclr.two_views(images, args, generator, progress))  # (2N, 3, size, size)
    with simclr.autocast(x.device):
        p, z = network(x)
    if args.stop_gradient:
        z = z.detach()
    p1, p2 = p.float().chunk(2)  # (N, W) each
    z1, z2 = z.float().chunk(2)
    loss = simsiam_loss(p1, z1, p2, z2)
    update(loss)
    return {"loss": loss, "spread": simclr.spread(z1)}


if __name__ == "__main__":
    simclr.run(Args, __doc__, SHAPES, Model=SimSiam, training_step=training_step)
