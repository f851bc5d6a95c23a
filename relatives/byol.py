"""BYOL is SimCLR with MoCo's moving average in place of negatives, and with a predictor.

The online network predicts, from one view, what the target network makes of the other. The target
is a moving average of the online network, and gets no gradient: it is a target that is always
slightly better than the online network. MoCo's queue is gone. Without the predictor both would end
in a z that is the same for all images.

    Grill et al.: Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning, NeurIPS
    2020. Equation 2 of the paper, for both orders of two views; p is the online network's
    prediction, z' the target's projection:

    L = |p1/|p1| - z'2/|z'2||^2 + |p2/|p2| - z'1/|z'1||^2 = 4 - 2 cos(p1, z'2) - 2 cos(p2, z'1)
    target <- m target + (1 - m) online                                          m the momentum

    python relatives/byol.py --dataset cifar10 --compile       simclr.py's flags, and some more
    python relatives/byol.py --no-predictor                    collapses: `spread` falls to 0

The paper's momentum rises to 1, its z has 256 components, its second views are blurred less and
solarized, and its optimizer, LARS, treats biases apart.
"""

import copy
import dataclasses
import sys
from pathlib import Path
from typing import ClassVar

import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import moco
import simclr


@dataclasses.dataclass
class Args(simclr.Args):
    script: str = "relatives/byol.py"
    width: int = simclr.flag(512, "hidden units of projector and predictor; paper: 4096", 2)
    ema_momentum: float = simclr.flag(0.99, "m of the target; paper: 0.996, rising to 1", 0, 1)
    predictor: bool = simclr.flag(True, "predict the target's z, instead of comparing with it")
    projection: ClassVar = "mlp"  # class variables are no flags: the head is always an MLP,
    temperature: ClassVar = None  # and there is no temperature


SHAPES = simclr.SHAPES | dict(lr=3e-3, ema_momentum=0.98)  # a memory of 50 steps, in a run of 768


def mlp(D, hidden, out):
    """(B, D) -> (B, out)."""
    return nn.Sequential(
        nn.Linear(D, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out)
    )


class BYOL(simclr.SimCLR):
    """Online and target network: (B, 3, S, S) -> predictions of the one, projections of the other,
    (B, 128) each."""

    def __init__(self, args, image_size=32):
        super().__init__(args, image_size)
        self.projector = mlp(self.projector[0].in_features, args.width, 128)
        self.predictor = mlp(128, args.width, 128) if args.predictor else nn.Identity()
        self.target = copy.deepcopy(nn.Sequential(self.encoder, self.projector))
        self.target.requires_grad_(False)

    def forward(self, x):
        return self.predictor(super().forward(x)), self.target(x)


def byol_loss(p1, z1, p2, z2):
    """Equation 2: predictions p of the online network and projections z of the target, (N, 128)
    each -> scalar, 0 to 8."""
    return 4 - 2 * F.cosine_similarity(p1, z2).mean() - 2 * F.cosine_similarity(p2, z1).mean()


def training_step(network, images, args, generator, progress, update):
    """Uint8 images (N, 3, S, S); update(loss) trains the network. Returns what to log."""
    model = getattr(network, "module", network)  # without DistributedDataParallel around it
    x = common.normalize(simclr.two_views(images, args, generator, progress))  # (2N, 3, size, size)
    with simclr.autocast(x.device):
        p, z = network(x)
    p1, p2 = p.float().chunk(2)  # (N, 128) each
    z1, z2 = z.float().chunk(2)
    loss = byol_loss(p1, z1, p2, z2)
    update(loss)  # of the online network
    moco.ema_update(model.target[0], model.encoder, args.ema_momentum)
    moco.ema_update(model.target[1], model.projector, args.ema_momentum)
    return {"loss": loss, "spread": simclr.spread(z1)}


if __name__ == "__main__":
    simclr.run(Args, __doc__, SHAPES, Model=BYOL, training_step=training_step)
