"""LeJEPA is SimCLR without negatives: z is the same in both views, and Gaussian over a batch.

Of all distributions the standard Gaussian leaves a probe the least risk, whatever it will be asked
(the paper's section 3), and no collapsed z has it. A distribution is the standard Gaussian if all
its projections onto a line are. So a batch is projected onto random directions, new ones in every
step, and a test of each projection, that of Epps and Pulley, is the loss. It compares the
characteristic function of the projections s_n with that of a Gaussian, and its gradient is bounded.
There is no teacher, stop-gradient, predictor or temperature, and one weight to choose.

    Balestriero, LeCun: LeJEPA: Provable and Scalable Self-Supervised Learning Without the
    Heuristics, 2025. With the constants of the authors' minimal example, for z, z' of N images:

    T(s) = N integral of |1/N sum_n exp(i t s_n) - exp(-t^2/2)|^2 exp(-t^2/2)  over t from -3 to 3
    SIGReg(z) = mean over directions a, |a| = 1, of T(z a)
    L = (1 - w) mean (z - (z + z')/2)^2 + w (SIGReg(z) + SIGReg(z')) / 2

    python relatives/lejepa.py --dataset cifar10 --compile          simclr.py's flags, and some more

The authors take more views, and Vision Transformers.
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
    script: str = "relatives/lejepa.py"
    width: int = simclr.flag(64, "components of z; authors: 16", 1)
    weight: float = simclr.flag(0.05, "w, the share of SIGReg in the loss; authors: 0.02", 0, 1)
    projection: ClassVar = "mlp"  # class variables are no flags: the head is always an MLP,
    temperature: ClassVar = None  # and there is no temperature


class LeJEPA(simclr.SimCLR):
    """SimCLR with a head of another width: (B, 3, S, S) -> z (B, W)."""

    def __init__(self, args, image_size=32):
        super().__init__(args, image_size)
        D = self.projector[0].in_features
        self.projector[-1] = nn.Linear(D, args.width)


def epps_pulley(s):
    """Projections s (N, K) of N images onto K directions -> T of each (K,), 0 if its characteristic
    function is a Gaussian's. The integral is twice that over 0 to 3, where it has 17 knots."""
    t = torch.linspace(0, 3, 17, dtype=s.dtype, device=s.device)
    gaussian = (-t.square() / 2).exp()
    ts = t * s[:, :, None]  # (N, K, 17)
    real = ts.cos().mean(0)
    imaginary = ts.sin().mean(0)
    error = (real - gaussian).square() + imaginary.square()  # (K, 17)
    return len(s) * 2 * torch.trapezoid(error * gaussian, t)


def lejepa_loss(z1, z2, directions, weight):
    """Projections of the two views of N images (N, W) each, not normalized; directions (W, K) of
    length 1 -> scalar."""
    distance = F.mse_loss(z1, z2) / 4  # of each to their mean
    sigreg = (epps_pulley(z1 @ directions).mean() + epps_pulley(z2 @ directions).mean()) / 2
    return (1 - weight) * distance + weight * sigreg


def training_step(network, images, args, generator, progress, update):
    """Uint8 images (N, 3, S, S); update(loss) trains the network. Returns what to log."""
    x = common.normalize(simclr.two_views(images, args, generator, progress))  # (2N, 3, size, size)
    with simclr.autocast(x.device):
        z = network(x)
    z1, z2 = z.float().chunk(2)  # (N, W) each
    same = torch.Generator(x.device).manual_seed(int(progress * 2**31))  # in all processes
    noise = torch.randn(z1.shape[1], 256, generator=same, device=x.device)
    directions = F.normalize(noise, dim=0)  # (W, 256)
    loss = lejepa_loss(simclr.gather(z1), simclr.gather(z2), directions, args.weight)
    update(loss)
    return {"loss": loss, "spread": simclr.spread(z1)}


if __name__ == "__main__":
    simclr.run(Args, __doc__, Model=LeJEPA, training_step=training_step)
