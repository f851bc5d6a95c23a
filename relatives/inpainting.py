"""Inpainting is RotNet with another question: what is missing from this image, where a square of it was cut out?

A decoder on top of the encoder paints the image, and is right where it equals what was cut out. To continue a thing
into the hole, the encoder has to know what it is. The mean squared error is least for the mean of all that could be
there, which is a blur. So a second network, the discriminator, learns to tell painted images from real ones, and the
first has to paint what it takes for real. Later MAE cuts out more, needs no adversary, and lets its encoder skip holes.

    Pathak, Krahenbuhl, Donahue, Darrell, Efros: Context Encoders: Feature Learning by Inpainting, CVPR 2016.
    The losses of the lecture: F is encoder and decoder, D(x) the probability that x is real, M the hole (1 inside it):

    L_reconstruction = |M * (x - F((1 - M) * x))|^2                        divided by the numbers in the hole
    L_adversarial = max_D E[log D(x) + log(1 - D(F((1 - M) * x)))]
    L = L_reconstruction + 0.001 L_adversarial

    python relatives/inpainting.py --dataset cifar10 --compile              the flags are rotnet.py's, and one more
    python relatives/inpainting.py --adversarial 0                          without an adversary
Unlike the paper: holes anywhere, which it found better than the center; feature maps, not vectors, in the middle.
"""

import dataclasses
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import rotnet


@dataclasses.dataclass
class Args(rotnet.Args):
    adversarial: float = rotnet.flag(1e-3, "weight of the adversarial loss; paper: 0.001", 0)
    command: str = rotnet.Args.command.replace("rotnet", "relatives/inpainting")


class Opposed(torch.autograd.Function):
    """The identity, whose gradient is multiplied by -weight: the discriminator on top minimizes what the painter below
    maximizes, in one step of one optimizer (Ganin and Lempitsky 2015)."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -ctx.weight * gradient, None


def conv(c_in, c_out, layer=nn.Conv2d):
    """Halves the side, or doubles it if the layer is transposed."""
    return nn.Sequential(layer(c_in, c_out, 4, 2, 1, bias=False), nn.BatchNorm2d(c_out), nn.LeakyReLU(0.2))


class ContextEncoder(nn.Module):
    """Images and masks of holes, (B, 3, S, S) and (B, 1, S, S) -> painted images (B, 3, S, S), and the discriminator's
    logits of real and of painted images (2 B, 1)."""

    def __init__(self, args):
        super().__init__()
        self.encoder, D = rotnet.build_nin(args.encoder)
        self.adversarial = args.adversarial
        up = [conv(D, D, nn.ConvTranspose2d) for _ in range(2 if args.encoder == "small" else 1)]
        self.decoder = nn.Sequential(*up, nn.ConvTranspose2d(D, 3, 4, 2, 1))
        layers = [conv(3, 32), conv(32, 64), conv(64, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 1)]
        self.discriminator = nn.Sequential(*layers)

    def forward(self, x, mask):
        painted = self.decoder(self.encoder((1 - mask) * x))[:, :, : x.shape[2], : x.shape[3]]
        return painted, self.discriminator(torch.cat([x, Opposed.apply(painted, self.adversarial)]))


def random_hole(images, generator):
    """Images (N, 3, S, S) -> masks (N, 1, S, S), 1 in a square of half the side, at a random place."""
    N, _, S, _ = images.shape
    side, line = S // 2, torch.arange(S, device=images.device)
    first = common.uniform(0, S - side + 1, (2, N, 1), generator).floor()  # of rows and columns
    rows, columns = (line >= first) & (line < first + side)  # (N, S) each
    return (rows[:, None, :, None] & columns[:, None, None, :]).float()


def training_step(network, images, args, generator):
    """Images, uint8 (N, 3, S, S) -> scalars: loss of both networks, the mean squared error in the hole, in normalized
    images, and the lecture's E[...], which the discriminator maximizes; it is -2 log 2 = -1.39 if it cannot tell."""
    x = common.normalize(rotnet.shifted(images, args, generator))
    mask = random_hole(x, generator)
    with rotnet.autocast(x.device):
        painted, logits = network(x, mask)
    reconstruction = (mask * (x - painted.float())).square().sum() / (3 * mask.sum())
    real, fake = logits.float().chunk(2)
    adversarial = (F.logsigmoid(real) + F.logsigmoid(-fake)).mean()
    return {"loss": reconstruction - adversarial, "reconstruction": reconstruction, "adversarial": adversarial}


@torch.no_grad()
def save_answers(folder, model, data, args):
    """painted.png: ten test images with a hole, with what the network painted there, and as they are."""
    device = next(model.eval().parameters()).device
    images, generator = data.test_images[:10].to(device) / 255, torch.Generator(device).manual_seed(args.seed)
    mask = random_hole(images, generator)
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (common.MEAN, common.STD))
    painted = model(common.normalize(images), mask)[0] * std + mean
    rows = [images.lerp(torch.full_like(images, 0.5), mask), images.lerp(painted.clamp(0, 1), mask), images]
    if rotnet.RANK == 0:
        sheet = F.interpolate(torch.cat(rows), scale_factor=max(1, round(96 / images.shape[3])))
        torchvision.utils.save_image(sheet, folder / "painted.png", nrow=len(images), padding=4, pad_value=1.0)


if __name__ == "__main__":  # rotnet.py, with these names in place of its own
    vars(rotnet).update(METHOD="inpainting", __doc__=__doc__, Args=Args, build_rotnet=ContextEncoder)
    vars(rotnet).update(training_step=training_step, save_answers=save_answers)
    rotnet.run()
