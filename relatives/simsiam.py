"""SimSiam is SimCLR without negatives: a predictor and a stop-gradient keep z from collapsing.

A small network, the predictor, predicts the z of one view from that of the other, and what is predicted gets no
gradient. Without either of them, the shortest way to a perfect prediction is a z that is the same for all images. With
both, the network has to run after a target that it cannot draw to itself. Unlike in BYOL there is no second network.

    Chen, He: Exploring Simple Siamese Representation Learning, CVPR 2021.
    Algorithm 1 of the paper, for projections z1, z2 of two views and their predictions p1 = h(z1), p2 = h(z2):

    D(p, z) = - p . z / (|p| |z|)                          no gradient to z
    L = D(p1, z2) / 2 + D(p2, z1) / 2                      from -1, where the views agree

    python relatives/simsiam.py --dataset cifar10 --compile       the flags are simclr.py's, but for the head
    python relatives/simsiam.py --no-predictor                    collapses: `spread` falls, z says nothing of an image
    python relatives/simsiam.py --no-stop-gradient                the same
"""

import dataclasses
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import simclr


@dataclasses.dataclass
class Args(simclr.Args):
    width: int = simclr.flag(512, "components of z; paper: 2048", 4)
    predictor: bool = simclr.flag(True, "p = h(z) with a bottleneck of a quarter of the width", action=simclr.SWITCH)
    stop_gradient: bool = simclr.flag(True, "no gradient to the z that is predicted", action=simclr.SWITCH)
    projection: str = "mlp"  # this and temperature are no flags here
    temperature: float = 0.0
    command: str = simclr.Args.command.replace("simclr", "relatives/simsiam")


def mlp(D, hidden, out):
    """(B, D) -> (B, out)."""
    return nn.Sequential(nn.Linear(D, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out))


class SimSiam(simclr.SimCLR):
    """SimCLR with a predictor: (B, 3, S, S) -> predictions and projections, side by side (B, 2 W)."""

    def __init__(self, args, image_size=32):
        super().__init__(args, image_size)
        D, W, self.stop_gradient = self.projector[0].in_features, args.width, args.stop_gradient
        self.projector = mlp(D, W, W).append(nn.BatchNorm1d(W, affine=False))  # paper: one layer more
        self.predictor = mlp(W, W // 4, W) if args.predictor else nn.Identity()

    def forward(self, x):
        z = super().forward(x)
        return torch.cat([self.predictor(z), z.detach() if self.stop_gradient else z], dim=1)


def simsiam_loss(p1, z1, p2, z2):
    """Algorithm 1: predictions and projections of the two views (N, W) each -> scalar."""
    return -(F.cosine_similarity(p1, z2).mean() + F.cosine_similarity(p2, z1).mean()) / 2


if __name__ == "__main__":  # simclr.py, with these names in place of its own
    vars(simclr).update(METHOD="simsiam", __doc__=__doc__, Args=Args, SimCLR=SimSiam, bound=lambda *_: None)
    vars(simclr).update(nt_xent=lambda one, two, _: simsiam_loss(*one.chunk(2, dim=1), *two.chunk(2, dim=1)))
    simclr.SHAPES.update(lr=3e-3)  # half of SimCLR's
    simclr.run()
