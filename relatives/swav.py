"""SwAV is SimCLR with clusters: a view predicts the cluster of the other view, and not its z.

K learned vectors, the prototypes, are the centers of clusters. A code q assigns a view softly to
the prototypes, and the other view has to predict it. All views in one cluster would be a perfect
prediction, so the codes of a batch are made together, in such a way that every prototype gets an
equal share of it (Sinkhorn and Knopp). No two images are compared.

    Caron, Misra, Mairal, Goyal, Bojanowski, Joulin: Unsupervised Learning of Visual Features by
    Contrasting Cluster Assignments, NeurIPS 2020. Equations 1 to 5 of the paper; z and the
    prototypes c_k have unit length, t is the temperature, q1 and q2 are codes of the two views:

    p_k = exp(z . c_k / t) / sum_l exp(z . c_l / t)
    L = -1/2 mean over images of  sum_k (q2_k log p1_k + q1_k log p2_k)          no gradient to q

    python relatives/swav.py --dataset cifar10 --compile            simclr.py's flags, and one more

Left out of the paper: small views (multi-crop, as in dino.py), a queue of earlier z for the codes
of small batches, and prototypes that are frozen at first.
"""

import dataclasses
import sys
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import simclr


@dataclasses.dataclass
class Args(simclr.Args):
    script: str = "relatives/swav.py"
    prototypes: int = simclr.flag(64, "clusters K; paper: 3000", 2)
    temperature: float = simclr.flag(0.1, "t; paper: 0.1", 0.01)
    projection: ClassVar = "mlp"  # a class variable is no flag: the head is always an MLP


class SwAV(simclr.SimCLR):
    """SimCLR with prototypes: (B, 3, S, S) -> z (B, 128) and its cosines with them (B, K)."""

    def __init__(self, args, image_size=32):
        super().__init__(args, image_size)
        self.prototypes = nn.Parameter(torch.randn(args.prototypes, 128))

    def forward(self, x):
        z = super().forward(x)
        return z, F.normalize(z, dim=1) @ F.normalize(self.prototypes, dim=1).T


@torch.no_grad()
def sinkhorn(scores, epsilon=0.02, iterations=3):
    """Cosines of N views with K prototypes (N, K) -> codes q (N, K): a row sums to 1, a column to
    about N / K. A larger epsilon makes them softer; paper: 0.05."""
    q = ((scores - scores.max()) / epsilon).exp()
    for _ in range(iterations):
        q = q / q.sum(0) / q.shape[1]
        q = q / q.sum(1, keepdim=True)
    return q


def swav_loss(scores1, scores2, temperature):
    """Cosines of the two views of N images with K prototypes (N, K) each -> scalar, in nats; log K
    is chance."""
    loss1 = F.cross_entropy(scores1 / temperature, sinkhorn(scores2))
    loss2 = F.cross_entropy(scores2 / temperature, sinkhorn(scores1))
    return (loss1 + loss2) / 2


def training_step(network, images, args, generator, progress, update):
    """Uint8 images (N, 3, S, S); update(loss) trains the network. Returns what to log."""
    x = common.normalize(simclr.two_views(images, args, generator, progress))  # (2N, 3, size, size)
    with simclr.autocast(x.device):
        z, scores = network(x)
    scores1, scores2 = scores.float().chunk(2)  # (N, K) each
    scores1 = simclr.gather(scores1)  # the codes share the batch of all GPUs among the prototypes
    scores2 = simclr.gather(scores2)
    loss = swav_loss(scores1, scores2, args.temperature)
    update(loss)
    z1, _ = z.float().chunk(2)  # (N, 128)
    return {"loss": loss, "spread": simclr.spread(z1)}


if __name__ == "__main__":
    simclr.run(Args, __doc__, Model=SwAV, training_step=training_step)
