"""SLIP is CLIP plus SimCLR: the image encoder learns from captions and from two views as well.

A caption says little about an image, and nothing of what its author did not care for. SimCLR asks
the same encoder, through a head of its own, to recognize an image in another view. The two losses
are added, so the texts shape the common space, and the views the features below it.

    Mu, Kirillov, Wagner, Xie: SLIP: Self-supervision Meets Language-Image Pre-training, ECCV 2022.
    Algorithm 1 of the paper, with a third view of each image for CLIP:

    L = L_CLIP + c L_SimCLR                                                    c = 1

    python relatives/slip.py --dataset data/flickr8k --compile       clip.py's flags, and some more

Each image is encoded three times, where CLIP does it once. The paper's SimCLR head has one layer
more.
"""

import dataclasses
import math
import sys
from pathlib import Path
from typing import ClassVar

from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import clip
import common
import simclr


@dataclasses.dataclass
class Args(clip.Args):
    script: str = "relatives/slip.py"
    ssl_weight: float = clip.flag(1.0, "weight c of SimCLR's loss; paper: 1", 0)
    temperature: float = clip.flag(0.1, "temperature of SimCLR's loss; paper: 0.1", 0.01)
    jitter_strength: float = clip.flag(0.5, "strength of color jitter, for SimCLR", 0, 2.5)
    gray: float = clip.flag(0.2, "fraction of gray views, for SimCLR; paper: 0.2", 0, 1)
    query: ClassVar = ""  # class variables are no flags: questions are left to clip.py,
    caption: ClassVar = ""
    zero_shot_classes: ClassVar = ""
    blur: ClassVar = 0.0  # and two of the flags of SimCLR's views are, too
    half_size_until: ClassVar = 0.0


class SLIP(clip.CLIP):
    """CLIP with SimCLR's head on the image encoder."""

    def __init__(self, args, vocabulary, image_size=32):
        super().__init__(args, vocabulary, image_size)
        D = self.image_projection.in_features
        self.projector = nn.Sequential(
            nn.Linear(D, D, bias=False), nn.BatchNorm1d(D), nn.ReLU(), nn.Linear(D, 128)
        )

    def forward(self, images, tokens, views):
        z = self.projector(self.encoder(views))
        return *super().forward(images, tokens), z


def training_step(network, images, tokens, args, generator, update):
    """Uint8 images (N, 3, S, S) and the tokens of a caption of each (N, T); update(loss) trains
    both encoders, head and scale. Returns what to log."""
    model = getattr(network, "module", network)  # without DistributedDataParallel around it
    x = common.normalize(clip.one_view(images, args, generator))  # (N, 3, S, S)
    views = common.normalize(simclr.two_views(images, args, generator))  # (2N, 3, S, S)
    with clip.autocast(x.device):
        image_features, text_features, scale, z = network(x, tokens, views)
    image_features = clip.gather(image_features.float())  # (WORLD N, D): of all processes
    text_features = clip.gather(text_features.float())
    z1, z2 = map(clip.gather, z.float().chunk(2))
    clip_loss = clip.clip_loss(image_features, text_features, scale)
    ssl_loss = simclr.nt_xent(z1, z2, args.temperature)
    loss = clip_loss + args.ssl_weight * ssl_loss
    update(loss)
    model.log_scale.data.clamp_(max=math.log(100))
    return {"loss": loss, "clip": clip_loss, "ssl": ssl_loss}


if __name__ == "__main__":
    clip.run(Args, __doc__, Model=SLIP, training_step=training_step)
