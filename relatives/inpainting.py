"""Inpainting is RotNet with another question: what was in this square that was cut from the image?

A decoder on top of the encoder fills the hole and is scored against what was cut out. To continue
a thing into the hole, the encoder has to know what it is. The mean squared error is least for the
mean of all that could be there, which is a blur. So a second network, the discriminator, learns to
tell filled images from real ones, and the first has to produce what the second accepts as real.
Later, MAE removes more, needs no adversary, and does not compute what is missing in its encoder.

    Pathak, Krahenbuhl, Donahue, Darrell, Efros: Context Encoders: Feature Learning by Inpainting,
    CVPR 2016. F is encoder and decoder, M the mask (1 in the hole), and x' the image with its hole
    filled, M * F((1 - M) * x) + (1 - M) * x; D(x) is the probability that x is real:

    L_reconstruction = |M * (x - F((1 - M) * x))|^2         divided by the number of values in it
    L_adversarial = max_D E[log D(x) + log(1 - D(x'))]
    L = L_reconstruction + 0.001 L_adversarial

As usual for GANs, F maximizes log D(x') where the formula has it minimize log(1 - D(x')): the goal
is the same, but the gradient does not vanish where D is sure (Goodfellow et al. 2014).

    python relatives/inpainting.py --dataset cifar10 --compile     rotnet.py's flags, and one more
    python relatives/inpainting.py --adversarial 0                 without an adversary

Unlike the paper: holes anywhere, which it found better than the center; feature maps, not vectors,
in the middle; one optimizer, with the same learning rate for F and D.
"""

import dataclasses
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import rotnet


@dataclasses.dataclass
class Args(rotnet.Args):
    script: str = "relatives/inpainting.py"
    adversarial: float = rotnet.flag(1e-3, "weight of the adversarial loss; paper: 0.001", 0)


def conv(c_in, c_out, layer=nn.Conv2d):
    """Halves the side, or doubles it if the layer is transposed."""
    conv = layer(c_in, c_out, kernel_size=4, stride=2, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.LeakyReLU(0.2))


class ContextEncoder(nn.Module):
    """Images (B, 3, S, S) and masks of holes (B, 1, S, S) -> images with the hole filled
    (B, 3, S, S), and the discriminator's logits (B, 1) each: of real images and of filled ones,
    with a gradient to the discriminator only, and of filled ones, with one to the painter only."""

    def __init__(self, args):
        super().__init__()
        encoder, D = rotnet.build_nin(args.encoder)
        rotnet.load_weights(encoder, args)
        self.encoder = encoder
        stages = 2 if args.encoder == "small" else 1
        up = [conv(D, D, nn.ConvTranspose2d) for _ in range(stages)]
        self.decoder = nn.Sequential(*up, nn.ConvTranspose2d(D, 3, 4, stride=2, padding=1))
        self.discriminator = nn.Sequential(
            conv(3, 32),
            conv(32, 64),
            conv(64, 128),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(128, 1),
        )

    def forward(self, x, mask):
        painted = self.decoder(self.encoder((1 - mask) * x))[:, :, : x.shape[2], : x.shape[3]]
        filled = mask * painted + (1 - mask) * x
        real, fake = self.discriminator(torch.cat([x, filled.detach()])).chunk(2)
        # The same once more, with the same statistics of batch norm, but frozen weights.
        frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        _, judged = functional_call(self.discriminator, frozen, torch.cat([x, filled])).chunk(2)
        return filled, real, fake, judged


def random_hole(images, generator):
    """Images (N, 3, S, S) -> masks (N, 1, S, S), 1 in a square of half the side, anywhere."""
    N, _, S, _ = images.shape
    side = S // 2
    line = torch.arange(S, device=images.device)
    first = common.uniform(0, S - side + 1, (2, N, 1), generator).floor()  # of rows and columns
    rows, columns = (line >= first) & (line < first + side)  # (N, S) each
    return (rows[:, None, :, None] & columns[:, None, None, :]).float()


def total_variation(images, mask):
    """Absolute differences of neighboring pixels that both lie in the mask, summed -> scalar."""
    down = images.diff(dim=2).abs() * mask[:, :, 1:] * mask[:, :, :-1]
    right = images.diff(dim=3).abs() * mask[..., 1:] * mask[..., :-1]
    return down.sum() + right.sum()


def inpainting_loss(network, images, args, generator):
    """Uint8 images (N, 3, S, S) -> scalars: the loss of both networks; the mean squared error in
    the hole, in normalized images; E[...] of the formula, -2 log 2 = -1.39 if the discriminator
    cannot tell; and sharpness, the total variation in the hole over that of the real image."""
    x = common.normalize(rotnet.shifted(images, args, generator))
    mask = random_hole(x, generator)
    with rotnet.autocast(x.device):
        filled, real, fake, judged = network(x, mask)
    filled = filled.float()
    reconstruction = (x - filled).square().sum() / (3 * mask.sum())  # outside it x - filled is 0
    adversarial = (F.logsigmoid(real.float()) + F.logsigmoid(-fake.float())).mean()
    fooled = F.logsigmoid(judged.float()).mean()
    return {
        "loss": reconstruction - args.adversarial * fooled - adversarial,
        "reconstruction": reconstruction,
        "adversarial": adversarial,
        "sharpness": total_variation(filled.detach(), mask) / total_variation(x, mask),
    }


def save_painted(folder, model, images, args):
    """painted.png: images with a hole, with the hole filled, and as they are."""
    generator = torch.Generator(images.device).manual_seed(args.seed)
    x = images / 255
    mask = random_hole(x, generator)
    filled = model(common.normalize(x), mask)[0]
    mean = torch.tensor(common.MEAN, device=x.device)[:, None, None]
    std = torch.tensor(common.STD, device=x.device)[:, None, None]
    hole = x.lerp(torch.full_like(x, 0.5), mask)
    title = "test images with a hole, with the hole filled, and as they are"
    sheet = torch.stack([hole, (filled * std + mean).clamp(0, 1), x])
    rotnet.save_sheet(folder / "painted.png", {title: sheet})


if __name__ == "__main__":
    parts = {"pretext_loss": inpainting_loss, "save_predictions": save_painted}
    rotnet.run(Args, __doc__, Model=ContextEncoder, **parts)
