"""Relative patches is RotNet with another question: where does one patch lie, seen from another?

Nine patches are cut from a 3 x 3 grid. The network gets the one in the middle and one of the others, and says at which
of the eight positions the latter lies: that an ear is above an eye takes knowing both. The features of a patch are
computed without the other patch. Two shortcuts have to be closed: an edge that runs on from one patch into the next
gives the direction away, so there are gaps; and it could be extended across a gap, so each patch is moved at random.

    Doersch, Gupta, Efros: Unsupervised Visual Representation Learning by Context Prediction, ICCV 2015.
    "Predict relative patch locations" in the lecture. p_0 is the patch in the middle, p_y the one at position y:

    L = mean over images of  1/8 sum_{y = 1..8} -log F^y(p_0, p_y)        F^y the predicted probability of position y

    python relatives/relative_patch.py --dataset cifar10 --compile            the flags are rotnet.py's, and two more
    python relatives/relative_patch.py --gap 0 --jitter 0                   with the shortcuts
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

GRID = torch.tensor([(1, 1), (0, 0), (0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (2, 2)])  # row and column


@dataclasses.dataclass
class Args(rotnet.Args):
    gap: float = rotnet.flag(0.0625, "between patches, in sides of the image; paper: half a patch", 0, 0.0625)
    jitter: float = rotnet.flag(0.03125, "largest move of a patch, likewise; paper: 7 pixels of 96", 0, 0.0625)
    command: str = rotnet.Args.command.replace("rotnet", "relatives/relative_patch")


def cut_patches(images, args, generator):
    """Images (N, 3, S, S) -> patches (9 N, 3, S / 4, S / 4), those of an image together, first the middle one."""
    N, _, S, _ = images.shape
    p, gap, jitter = S // 4, int(args.gap * S), int(args.jitter * S)
    free = S - 3 * p - 2 * gap - 2 * jitter  # pixels by which the whole grid can move
    corner = jitter + common.uniform(0, free + 1, (N, 1, 2), generator).floor()
    moved = common.uniform(-jitter, jitter + 1, (N, 9, 2), generator).floor()
    corners = (corner + (p + gap) * GRID.to(images.device) + moved).flatten(0, 1)  # (9 N, 2), top and left
    boxes = torch.cat([corners, torch.full_like(corners, p)], dim=1)
    plain = torch.zeros(9 * N, dtype=torch.bool, device=images.device)
    return common.resized_crop(images.repeat_interleave(9, dim=0), boxes, p, plain)


class PatchNetwork(nn.Module):
    """Patches (9 N, 3, p, p) -> logits of the positions of eight of them, seen from the first (8 N, 8)."""

    def __init__(self, args):
        super().__init__()
        self.encoder, D = rotnet.build_nin(args.encoder)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Sequential(nn.Linear(2 * D, D, bias=False), nn.BatchNorm1d(D), nn.ReLU(), nn.Linear(D, 8))

    def forward(self, x):
        h = self.pool(self.encoder(x)).unflatten(0, (-1, 9))  # (N, 9, D)
        pairs = torch.cat([h[:, :1].expand(-1, 8, -1), h[:, 1:]], dim=2)  # (N, 8, 2 D)
        return self.classifier(pairs.flatten(0, 1))


def training_step(network, images, args, generator):
    """Images, uint8 (N, 3, S, S) -> scalars: loss, and fraction of positions predicted correctly; log 8 is chance."""
    x = common.random_crop(images / 255, 0, generator)  # mirrored, not shifted: a black margin would tell positions
    labels = torch.arange(8, device=x.device).repeat(len(x))
    with rotnet.autocast(x.device):
        logits = network(common.normalize(cut_patches(x, args, generator))).float()  # (8 N, 8)
    return {"loss": F.cross_entropy(logits, labels), "position": (logits.argmax(1) == labels).float().mean()}


@torch.no_grad()
def save_answers(folder, model, data, args):
    """positions.png: ten test images, and below each three patches, put around the one in the middle where the network
    says that they lie; wrong ones are reddish."""
    device = next(model.eval().parameters()).device
    images, generator = data.test_images[:10].to(device) / 255, torch.Generator(device).manual_seed(args.seed)
    patches = cut_patches(images, args, generator)
    answers = model(common.normalize(patches)).argmax(1).view(-1, 8).cpu()
    red, zoom = torch.tensor([0.9, 0.1, 0.1])[:, None, None], max(1, round(96 / images.shape[3]))
    rows = [[], [], []]
    for cut, answer in zip(patches.cpu().split(9), answers, strict=True):
        for row, y in zip(rows, (1, 4, 7), strict=True):
            tiles = torch.ones(3, 3, *cut.shape[1:])
            tiles[1, 1] = cut[0]
            tiles[tuple(GRID[1 + answer[y]])] = cut[1 + y] if answer[y] == y else cut[1 + y].lerp(red, 0.5)
            row.append(torchvision.utils.make_grid(tiles.flatten(0, 1), 3, 1, pad_value=1.0))
    sheet = torch.stack([*F.interpolate(images.cpu(), rows[0][0].shape[1:]), *sum(rows, [])])
    if rotnet.RANK == 0:
        sheet = F.interpolate(sheet, scale_factor=zoom)
        torchvision.utils.save_image(sheet, folder / "positions.png", nrow=len(images), padding=8, pad_value=1.0)


if __name__ == "__main__":  # rotnet.py, with these names in place of its own
    vars(rotnet).update(METHOD="relative_patch", __doc__=__doc__, Args=Args, build_rotnet=PatchNetwork)
    vars(rotnet).update(training_step=training_step, save_answers=save_answers)
    rotnet.SHAPES.update(epochs=12, eval_every=4)  # which take less than RotNet's four
    rotnet.run()
