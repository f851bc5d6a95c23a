"""Colorization is RotNet with another question: what color is each place of this gray image?

To know that grass is green and a sky is blue, a network has to recognize grass and skies. Colors
are classes, not numbers: for an apple that may be red or green, the mean squared error asks for the
mean, which is brown, while a distribution keeps both. As most of the world is grayish, rare colors
weigh more in the loss, or gray would be the best prediction everywhere.

    Zhang, Isola, Efros: Colorful Image Colorization, ECCV 2016. Equations 2 and 4 of the paper, for
    places s of all images and their classes q_s out of Q; F_s^q is the predicted probability of
    class q at place s, p(q) how often class q occurs in the batch, and lambda = 1/2:

    L = - sum_s w(q_s) log F_s^{q_s} / sum_s w(q_s)
    w(q) = 1 / ((1 - lambda) p(q) + lambda / Q)

    python relatives/colorization.py --dataset cifar10 --compile        rotnet.py's flags

Unlike the paper: chroma of YCbCr, not Lab; one class for a place, not the five nearest; p of the
batch, not smoothed; one transposed convolution on RotNet's small feature map.
"""

import dataclasses
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import rotnet

BINS = 9  # of each of the two chromas: Q = 81 classes, the one in the middle is gray


@dataclasses.dataclass
class Args(rotnet.Args):
    script: str = "relatives/colorization.py"


class Gray(nn.Module):
    """(B, 3, S, S) -> the same without color. It is part of the encoder, so that the probes are
    without color, too."""

    def forward(self, x):
        gray = common.luma(x).repeat(1, 3, 1, 1)
        return gray.contiguous(memory_format=torch.channels_last)


class Colorizer(nn.Module):
    """(B, 3, S, S) -> logits of the color classes (B, Q, H, W); H and W are S, or half of it for
    the small encoder."""

    def __init__(self, args):
        super().__init__()
        encoder, D = rotnet.build_nin(args.encoder)
        encoder[0].insert(0, Gray())
        rotnet.load_weights(encoder, args)
        self.encoder = encoder
        self.classifier = nn.ConvTranspose2d(D, BINS**2, 4, stride=4)  # 4 x 4 places for each

    def forward(self, x):
        return self.classifier(self.encoder(x))


def color_classes(images):
    """(N, 3, H, W) in [0, 1] -> classes (N, H, W), by Cb and Cr of YCbCr, blue and red minus luma,
    in BINS steps."""
    luma = common.luma(images)[:, 0]
    blue = (images[:, 2] - luma) / 1.772  # -0.5 to 0.5
    red = (images[:, 0] - luma) / 1.402
    blue_bin = ((blue + 0.5) * BINS).long().clamp(0, BINS - 1)
    red_bin = ((red + 0.5) * BINS).long().clamp(0, BINS - 1)
    return blue_bin * BINS + red_bin


def paint(gray, probabilities, temperature=0.38):
    """Luma (N, 1, H, W) and probabilities (N, Q, H, W) -> images in [0, 1]: the mean color of the
    distribution, after the temperature has sharpened it, between its mean and its mode (the paper's
    annealed mean, equation 5)."""
    p = (probabilities.log() / temperature).softmax(1)
    steps = (torch.arange(BINS, device=p.device) + 0.5) / BINS - 0.5
    chroma = torch.cartesian_prod(steps, steps)  # (Q, 2), blue and red
    blue, red = torch.einsum("nqhw,qc->cnhw", p, chroma)
    luma = gray[:, 0]
    b = luma + 1.772 * blue
    r = luma + 1.402 * red
    g = (luma - 0.2989 * r - 0.114 * b) / 0.587
    return torch.stack([r, g, b], dim=1).clamp(0, 1)


def weighted_cross_entropy(logits, classes):
    """Logits (N, Q, H, W) and classes (N, H, W) -> scalar, in nats: equation 2 with the weights of
    equation 4."""
    Q = logits.shape[1]
    p = classes.flatten().bincount(minlength=Q) / classes.numel()
    return F.cross_entropy(logits, classes, weight=1 / (0.5 * p + 0.5 / Q))


def color_loss(network, images, args, generator):
    """Uint8 images (N, 3, S, S) -> scalars: the loss in nats, and the fraction of places whose
    class is predicted correctly."""
    x = rotnet.shifted(images, args, generator)
    with rotnet.autocast(x.device):
        logits = network(common.normalize(x))  # (N, Q, H, W)
    classes = color_classes(F.adaptive_avg_pool2d(x, logits.shape[2:]))
    loss = weighted_cross_entropy(logits.float(), classes)
    correct = logits.argmax(1) == classes
    return {"loss": loss, "color": correct.float().mean()}


def save_colors(folder, model, images, args):
    """colors.png: images without color, in predicted colors, and in their own."""
    x = images / 255
    gray = common.luma(x)
    probabilities = model(common.normalize(x)).softmax(1)
    painted = paint(gray, F.interpolate(probabilities, x.shape[2:], mode="bilinear"))
    title = "test images without color, in predicted colors, and in their own"
    sheet = torch.stack([gray.expand_as(x), painted, x])
    rotnet.save_sheet(folder / "colors.png", {title: sheet})


if __name__ == "__main__":
    parts = {"pretext_loss": color_loss, "save_predictions": save_colors}
    rotnet.run(Args, __doc__, Model=Colorizer, **parts)
