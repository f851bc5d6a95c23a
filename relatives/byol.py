"""BYOL is SimCLR with MoCo's moving average in place of the negatives, and a predictor that keeps z from collapsing.

The online network predicts, from one view, what the target network makes of the other. The target is a moving average
of the online network, and gets no gradient: it gives the online network something to run after that is always a little
better. MoCo's queue is gone. Without the predictor both would end in a z that is the same for all images.

    Grill et al.: Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning, NeurIPS 2020.
    Equation 2 of the paper, for both orders of two views; p is the online network's prediction, z' the target's z:

    L = |p1/|p1| - z'2/|z'2||^2 + |p2/|p2| - z'1/|z'1||^2 = 4 - 2 cos(p1, z'2) - 2 cos(p2, z'1)
    target <- m target + (1 - m) online                                   m the momentum

    python relatives/byol.py --dataset cifar10 --compile       the flags are simclr.py's, but for the head
    python relatives/byol.py --no-predictor                    collapses: `spread` falls to 0
"""

import copy
import dataclasses
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import moco
import simclr


@dataclasses.dataclass
class Args(simclr.Args):
    width: int = simclr.flag(512, "hidden units of projector and predictor; paper: 4096", 2)
    momentum: float = simclr.flag(0.99, "m; paper: 0.996, rising to 1", 0, 1)
    predictor: bool = simclr.flag(True, "predict z', not compare with it", action=simclr.SWITCH)
    projection: str = "mlp"  # this and temperature are no flags here
    temperature: float = 0.0
    command: str = simclr.Args.command.replace("simclr", "relatives/byol")


def mlp(D, hidden, out):
    """(B, D) -> (B, out)."""
    return nn.Sequential(nn.Linear(D, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out))


class BYOL(simclr.SimCLR):
    """Online and target network: (B, 3, S, S) -> predictions of the one, projections of the other (B, 2 * 128)."""

    def __init__(self, args, image_size=32):
        super().__init__(args, image_size)
        self.projector = mlp(self.projector[0].in_features, args.width, 128)
        self.predictor = mlp(128, args.width, 128) if args.predictor else nn.Identity()
        self.target = copy.deepcopy(nn.Sequential(self.encoder, self.projector)).requires_grad_(False)
        self.momentum = args.momentum

    def forward(self, x):
        if self.training:  # before the next step, not after the last one
            for target, online in zip(self.target, (self.encoder, self.projector), strict=True):
                moco.ema_update(target, online, self.momentum)
        return torch.cat([self.predictor(super().forward(x)), self.target(x)], dim=1)


def byol_loss(p1, z1, p2, z2):
    """Equation 2: predictions of the online network and projections of the target (N, 128) each -> scalar, 0 to 8."""
    return 4 - 2 * F.cosine_similarity(p1, z2).mean() - 2 * F.cosine_similarity(p2, z1).mean()


if __name__ == "__main__":  # simclr.py, with these names in place of its own
    vars(simclr).update(METHOD="byol", __doc__=__doc__, Args=Args, SimCLR=BYOL, bound=lambda *_: None)
    vars(simclr).update(nt_xent=lambda one, two, _: byol_loss(*one.chunk(2, dim=1), *two.chunk(2, dim=1)))
    simclr.SHAPES.update(lr=3e-3, momentum=0.98)  # a memory of 50 steps, in a run of 768
    simclr.run()
