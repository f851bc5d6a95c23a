"""Relative patches is RotNet with another question: where does one patch lie relative to another?

Nine patches are cut from a 3 x 3 grid. The network gets the one in the middle and one of the
others, and predicts at which of the eight positions the latter lies: knowing that the ear is above
the eye means recognizing both. The features of a patch are computed without the other patch.
Shortcuts have to be closed. An edge that runs on into the next patch gives the direction away, so
there are gaps; and as it could be extended across a gap, each patch is moved at random. A third,
chromatic aberration, is left open: a lens shifts colors apart toward the border of a photograph,
which reveals where a patch was. Drawn shapes have none, and images of 32 x 32 are too small to show
it; for large photographs the paper drops two of the three color channels at random.

    Doersch, Gupta, Efros: Unsupervised Visual Representation Learning by Context Prediction, ICCV
    2015. p_0 is the patch in the middle, p_y the one at position y, and F^y the predicted
    probability of y:

    L = mean over images of  1/8 sum_{y = 1..8} -log F^y(p_0, p_y)

    python relatives/relative_patch.py --dataset cifar10 --compile     rotnet.py's flags, and two
    python relatives/relative_patch.py --gap 0 --jitter 0              with the first two shortcuts

Unlike the paper: a patch is described by the mean of its feature map, not by a layer that sees
where in the patch things are.
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

# Row and column of each patch, from the one in the middle on.
GRID = torch.tensor([(1, 1), (0, 0), (0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (2, 2)])


@dataclasses.dataclass
class Args(rotnet.Args):
    script: str = "relatives/relative_patch.py"
    gap: float = rotnet.flag(0.0625, "gap, in sides of the image; paper: half a patch", 0, 0.0625)
    jitter: float = rotnet.flag(0.03125, "largest move, likewise; paper: 7 of 96 pixels", 0, 0.0625)


SHAPES = rotnet.SHAPES | dict(epochs=12, eval_every=4)  # 12 take less time than RotNet's 4


class PatchNetwork(nn.Module):
    """Patches (9N, 3, p, p) -> logits of the positions of eight of them, relative to the first
    (8N, 8)."""

    def __init__(self, args):
        super().__init__()
        encoder, D = rotnet.build_nin(args.encoder)
        rotnet.load_weights(encoder, args)
        self.encoder = encoder
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Sequential(
            nn.Linear(2 * D, D, bias=False), nn.BatchNorm1d(D), nn.ReLU(), nn.Linear(D, 8)
        )

    def forward(self, x):
        h = self.pool(self.encoder(x)).unflatten(0, (-1, 9))  # (N, 9, D)
        middle = h[:, :1].expand(-1, 8, -1)
        pairs = torch.cat([middle, h[:, 1:]], dim=2)  # (N, 8, 2D)
        return self.classifier(pairs.flatten(0, 1))


def cut(images, corners, size):
    """Images (N, 3, S, S) and nine corners in each (N, 9, 2), top and left, in pixels -> squares
    (9N, 3, size, size)."""
    boxes = torch.cat([corners, torch.full_like(corners, size)], dim=2).flatten(0, 1)
    flip = torch.zeros(len(boxes), dtype=torch.bool, device=images.device)
    return common.resized_crop(images.repeat_interleave(9, dim=0), boxes, size, flip)


def cut_patches(images, args, generator):
    """Images (N, 3, S, S) -> patches (9N, 3, S / 4, S / 4), those of an image together, in the
    order of GRID."""
    N, _, S, _ = images.shape
    p = S // 4
    gap = int(args.gap * S)
    jitter = int(args.jitter * S)
    free = S - 3 * p - 2 * gap - 2 * jitter  # pixels by which the whole grid can move
    corner = jitter + common.uniform(0, free + 1, (N, 1, 2), generator).floor()
    moved = common.uniform(-jitter, jitter + 1, (N, 9, 2), generator).floor()
    return cut(images, corner + (p + gap) * GRID.to(images.device) + moved, p)


def position_loss(network, images, args, generator):
    """Uint8 images (N, 3, S, S) -> scalars: the loss in nats, and the fraction of positions that
    are predicted correctly. Chance is log 8 = 2.08, and 1 in 8."""
    x = common.random_crop(images / 255, 0, generator)  # no shift: its margin would tell positions
    labels = torch.arange(8, device=x.device).repeat(len(x))
    with rotnet.autocast(x.device):
        logits = network(common.normalize(cut_patches(x, args, generator)))  # (8N, 8)
    loss = F.cross_entropy(logits.float(), labels)
    correct = logits.argmax(1) == labels
    return {"loss": loss, "position": correct.float().mean()}


def framed(tiles, colors):
    """Tiles (R, 9, 3, t, t), each in a frame of its color (R, 9, 3): (R, 9, 3, t + 2, t + 2)."""
    tiles = F.pad(tiles, (1, 1, 1, 1), value=-1)
    return torch.where(tiles < 0, colors[..., None, None], tiles)


def assemble(tiles):
    """Nine tiles each (R, 9, 3, t, t), row by row -> (R, 3, 3t + 12, 3t + 12), with white lines
    between the tiles, and wider ones around all nine."""
    tiles = F.pad(tiles, (1, 1, 1, 1), value=1.0).unflatten(1, (3, 3))
    squares = tiles.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    return F.pad(squares, (3, 3, 3, 3), value=1.0)


def save_positions(folder, model, images, args):
    """positions.png: images, and below the nine patches of each. A patch has a blue frame if the
    network, which sees it beside the one in the middle, finds its position, else an orange one."""
    generator = torch.Generator(images.device).manual_seed(args.seed)
    patches = cut_patches(images / 255, args, generator)
    positions = 1 + model(common.normalize(patches)).argmax(1).view(-1, 8).cpu()
    correct = positions == torch.arange(1, 9)  # (R, 8)
    patches = patches.cpu().unflatten(0, (-1, 9))  # (R, 9, 3, p, p), the one in the middle first
    frames = torch.tensor([[0.9, 0.5, 0.0], [0.0, 0.45, 0.7]])[correct.long()]  # (R, 8, 3)
    frames = torch.cat([torch.ones(len(patches), 1, 3), frames], dim=1)
    row_by_row = (3 * GRID[:, 0] + GRID[:, 1]).argsort()
    squares = assemble(framed(patches, frames)[:, row_by_row])
    whole = F.interpolate(images.cpu() / 255, squares.shape[2:])
    title = "test images, and their patches: blue where the network finds the position, else orange"
    rotnet.save_sheet(folder / "positions.png", {title: torch.stack([whole, squares])})


if __name__ == "__main__":
    parts = {"pretext_loss": position_loss, "save_predictions": save_positions}
    rotnet.run(Args, __doc__, SHAPES, Model=PatchNetwork, **parts)
