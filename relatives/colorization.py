"""Colorization is RotNet with another question: what color is each place of this image, of which you see the gray?

To know that grass is green and a sky is blue a network has to know grass and skies. Colors are classes, not numbers: of
an apple that may be red or green the mean squared error wants the mean, which is brown; a distribution keeps both. As
most of the world is grayish, rare colors weigh more in the loss, or everything would be answered with gray.

    Zhang, Isola, Efros: Colorful Image Colorization, ECCV 2016.
    Equations 2 and 4 of the paper, for places s of all images and their classes q_s out of Q:

    L = - sum_s w(q_s) log F_s^{q_s} / sum_s w(q_s)        F_s^q the predicted probability of class q at place s
    w(q) = 1 / ((1 - lambda) p(q) + lambda / Q)            p(q) how often class q is seen in the batch, lambda = 1/2

    python relatives/colorization.py --dataset cifar10 --compile                       the flags are rotnet.py's
Unlike the paper: chroma of YCbCr, not Lab; one class for a place, not the five nearest; p of the batch, not smoothed.
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

BINS = 9  # of each of the two chromas: Q = 81 classes, the one in the middle is gray


@dataclasses.dataclass
class Args(rotnet.Args):
    command: str = rotnet.Args.command.replace("rotnet", "relatives/colorization")


class Gray(nn.Module):
    """(B, 3, S, S) -> the same without color. It is part of the encoder, so that the probes are without color, too."""

    def forward(self, x):
        return common.luma(x).repeat(1, 3, 1, 1).contiguous(memory_format=torch.channels_last)


class Colorizer(nn.Module):
    """(B, 3, S, S) -> logits of the color classes (B, Q, H, W), H and W are S, or half of it for the small encoder."""

    def __init__(self, args):
        super().__init__()
        self.encoder, D = rotnet.build_nin(args.encoder)
        self.encoder[0].insert(0, Gray())
        self.classifier = nn.ConvTranspose2d(D, BINS**2, 4, stride=4)  # 4 x 4 places for each of the feature map

    def forward(self, x):
        return self.classifier(self.encoder(x))


def color_classes(images):
    """(N, 3, H, W) in [0, 1] -> classes (N, H, W), by Cb and Cr of YCbCr, blue and red minus luma, in BINS steps."""
    y = common.luma(images)[:, 0]
    blue, red = (images[:, 2] - y) / 1.772, (images[:, 0] - y) / 1.402  # -0.5 to 0.5
    return sum(((x + 0.5) * BINS).long().clamp(0, BINS - 1) * step for x, step in ((blue, BINS), (red, 1)))


def paint(gray, probabilities, temperature=0.38):
    """Luma (N, 1, H, W) and probabilities (N, Q, H, W) -> images in [0, 1]: the mean color of the distribution, after
    it is sharpened by the temperature, between its mean and its mode (the paper's annealed mean, equation 5)."""
    p = (probabilities.log() / temperature).softmax(1)
    steps = (torch.arange(BINS, device=p.device) + 0.5) / BINS - 0.5
    blue, red = torch.einsum("nqhw,qc->cnhw", p, torch.cartesian_prod(steps, steps))
    b, r = gray[:, 0] + 1.772 * blue, gray[:, 0] + 1.402 * red
    return torch.stack([r, (gray[:, 0] - 0.2989 * r - 0.114 * b) / 0.587, b], dim=1).clamp(0, 1)


def color_loss(logits, classes):
    """Logits (N, Q, H, W) and classes (N, H, W) -> scalar, in nats: equation 2 with the weights of equation 4."""
    Q = logits.shape[1]
    p = classes.flatten().bincount(minlength=Q) / classes.numel()
    return F.cross_entropy(logits, classes, weight=1 / (0.5 * p + 0.5 / Q))


def training_step(network, images, args, generator):
    """Images, uint8 (N, 3, S, S) -> scalars: loss, and fraction of the places whose class is predicted correctly."""
    x = rotnet.shifted(images, args, generator)
    with rotnet.autocast(x.device):
        logits = network(common.normalize(x)).float()  # (N, Q, H, W)
    classes = color_classes(F.adaptive_avg_pool2d(x, logits.shape[2:]))
    return {"loss": color_loss(logits, classes), "color": (logits.argmax(1) == classes).float().mean()}


@torch.no_grad()
def save_answers(folder, model, data, args):
    """colors.png: ten test images without color, with the network's colors, and with their own."""
    images = data.test_images[:10].to(next(model.eval().parameters()).device) / 255
    gray, p = common.luma(images), model(common.normalize(images)).softmax(1)
    painted = paint(gray, F.interpolate(p, images.shape[2:], mode="bilinear"))
    rows = torch.cat([gray.expand_as(images), painted, images])
    if rotnet.RANK == 0:
        sheet = F.interpolate(rows, scale_factor=max(1, round(96 / images.shape[3])))
        torchvision.utils.save_image(sheet, folder / "colors.png", nrow=len(images), padding=4, pad_value=1.0)


if __name__ == "__main__":  # rotnet.py, with these names in place of its own
    vars(rotnet).update(METHOD="colorization", __doc__=__doc__, Args=Args, build_rotnet=Colorizer)
    vars(rotnet).update(training_step=training_step, save_answers=save_answers)
    rotnet.run()
