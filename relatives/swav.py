"""SwAV is SimCLR with clusters: a view predicts not the z of the other view, but the cluster that it belongs to.

K prototypes, learned vectors, are the centers of clusters. A code q says how much of each prototype a view is, and the
other view has to predict it. All views in one cluster would be a perfect prediction, so codes are made for a batch
together, in such a way that every prototype gets an equal share of it (Sinkhorn and Knopp). No two images are compared.

    Caron, Misra, Mairal, Goyal, Bojanowski, Joulin: Unsupervised Learning of Visual Features by Contrasting Cluster
    Assignments, NeurIPS 2020. Equations 1 to 5 of the paper; z and the prototypes c_k have unit length, t is the
    temperature, q1 and q2 are codes of the two views:

    p_k = exp(z . c_k / t) / sum_l exp(z . c_l / t)
    L = -1/2 mean over images of  sum_k (q2_k log p1_k + q1_k log p2_k)                 no gradient to q

    python relatives/swav.py --dataset cifar10 --compile           the flags are simclr.py's, and one more
Left out of the paper: small views (multi-crop, as in dino.py), and a queue of earlier z for codes of small batches.
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
    prototypes: int = simclr.flag(64, "clusters K; paper: 3000", 2)
    temperature: float = simclr.flag(0.1, "t; paper: 0.1", 0.01)
    command: str = simclr.Args.command.replace("simclr", "relatives/swav")


class SwAV(simclr.SimCLR):
    """SimCLR with prototypes: (B, 3, S, S) -> cosines of z with them (B, K)."""

    def __init__(self, args, image_size=32):
        super().__init__(args, image_size)
        self.prototypes = nn.Parameter(torch.randn(args.prototypes, 128))

    def forward(self, x):
        return F.normalize(super().forward(x), dim=1) @ F.normalize(self.prototypes, dim=1).T


@torch.no_grad()
def sinkhorn(scores, epsilon=0.02, iterations=3):
    """Cosines of N views with K prototypes (N, K) -> codes q (N, K): a row sums to 1, a column to about N / K. epsilon
    makes them soft; paper: 0.05."""
    q = ((scores - scores.max()) / epsilon).exp()
    for _ in range(iterations):
        q = q / q.sum(0) / q.shape[1]
        q = q / q.sum(1, keepdim=True)
    return q


def swav_loss(scores1, scores2, temperature):
    """Cosines of the two views of N images with K prototypes (N, K) each -> scalar, in nats; log K is chance."""
    pairs = (scores1, scores2), (scores2, scores1)
    return sum(F.cross_entropy(scores / temperature, sinkhorn(other)) for scores, other in pairs) / 2


if __name__ == "__main__":  # simclr.py, with these names in place of its own
    vars(simclr).update(METHOD="swav", __doc__=__doc__, Args=Args, SimCLR=SwAV, bound=lambda *_: None)
    vars(simclr).update(nt_xent=swav_loss)
    simclr.run()
