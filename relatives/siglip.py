"""SigLIP is CLIP with a sigmoid for each pair: is this caption of this image, yes or no?

CLIP's softmax has to pick the caption of an image out of all captions of the batch, so each term of
its loss needs the whole batch. Here a pair of image and caption is a question by itself. Of N^2
questions only N have the answer yes, so a learned bias begins at -10: at first the answer is no,
and that much is right.

    Zhai, Mustafa, Kolesnikov, Beyer: Sigmoid Loss for Language Image Pre-Training, ICCV 2023.
    Equation 1 and algorithm 1 of the paper, for x_i and y_j of length 1, a learned scale t and bias
    b, and c_ij = 1 where image i and caption j are a pair, elsewhere -1:

    L = -1/N sum_ij log sigmoid(c_ij (t x_i . y_j + b))           a sum of N terms for each image

    python relatives/siglip.py --dataset data/flickr8k --compile                   clip.py's flags

Divided by N^2 instead, the loss would have hardly a gradient: most of its terms are right already.
"""

import dataclasses
import math
import sys
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import clip
import common


@dataclasses.dataclass
class Args(clip.Args):
    script: str = "relatives/siglip.py"
    query: ClassVar = ""  # class variables are no flags: questions are left to clip.py
    caption: ClassVar = ""
    zero_shot_classes: ClassVar = ""


class SigLIP(clip.CLIP):
    """CLIP with a bias b, and a scale that begins at 10."""

    def __init__(self, args, vocabulary, image_size=32):
        super().__init__(args, vocabulary, image_size)
        nn.init.constant_(self.log_scale, math.log(10))
        self.bias = nn.Parameter(torch.full((1,), -10.0))

    def forward(self, images, tokens):
        return *super().forward(images, tokens), self.bias


def siglip_loss(image_features, text_features, scale, bias):
    """image_features, text_features (N, D): row i of both is a pair, normalized in here; scale t
    and bias b (1,) -> scalar, in nats."""
    images = F.normalize(image_features, dim=1)
    texts = F.normalize(text_features, dim=1)
    logits = scale * images @ texts.T + bias  # (N, N)
    pair = 2 * torch.eye(len(logits), device=logits.device) - 1  # c
    return -F.logsigmoid(pair * logits).sum() / len(logits)


def training_step(network, images, tokens, args, generator, update):
    """Uint8 images (N, 3, S, S) and the tokens of a caption of each (N, T); update(loss) trains
    both encoders, t and b. Returns what to log."""
    x = common.normalize(clip.one_view(images, args, generator))  # (N, 3, S, S)
    with clip.autocast(x.device):
        image_features, text_features, scale, bias = network(x, tokens)
    image_features = clip.gather(image_features.float())  # (WORLD N, D): of all processes
    text_features = clip.gather(text_features.float())
    loss = siglip_loss(image_features, text_features, scale, bias)
    update(loss)
    return {"loss": loss, "logit_scale": scale[0], "bias": bias[0]}


if __name__ == "__main__":
    clip.run(Args, __doc__, Model=SigLIP, training_step=training_step)
