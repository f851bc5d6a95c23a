"""Jigsaw puzzles are RotNet with another question: in which order are the tiles of this image?

An image is cut into nine tiles, which are shuffled by one of 100 permutations, and the network
predicts which. It has to know which part of a thing a tile shows: the features of each tile are
computed by themselves, and only a classifier on top sees all nine. Of all 9! permutations those are
used that differ in most places: where two differ in two tiles only, no other tile tells them apart.
Against shortcuts, tiles do not touch, and lose their own mean and deviation. The encoder does the
latter itself, so that it sees images in the same way when it is probed.

    Noroozi, Favaro: Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles, ECCV
    2016. x_1 ... x_9 are the tiles in reading order, pi_k is permutation k of 100, and F^k its
    predicted probability:

    L = mean over images and k of  -log F^k(x_{pi_k(1)}, ..., x_{pi_k(9)})

    python relatives/jigsaw.py --dataset cifar10 --compile              rotnet.py's flags

Unlike the paper: a tile is described by the mean of its feature map, and there are no gray images.
"""

import dataclasses
import itertools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import rotnet
from relatives import relative_patch


@dataclasses.dataclass
class Args(rotnet.Args):
    script: str = "relatives/jigsaw.py"


SHAPES = rotnet.SHAPES | dict(epochs=12, eval_every=4)  # 12 take less time than RotNet's 4


class Standardize(nn.Module):
    """Each channel of each image (B, 3, H, W) to mean 0 and deviation 1: neighbors cannot be found
    by their color alone."""

    def forward(self, x):
        std, mean = torch.std_mean(x, (2, 3), keepdim=True)
        return ((x - mean) / (std + 0.01)).contiguous(memory_format=torch.channels_last)


def distant_permutations(count):
    """Permutations of nine tiles (count, 9), from the reading order on, each in as many places as
    possible different from all before it. The paper's algorithm 1 maximizes the mean distance, and
    gets pairs that differ in two places."""
    every = torch.tensor(list(itertools.permutations(range(9))), dtype=torch.uint8)  # (9!, 9)
    chosen = [0]
    distance = torch.full((len(every),), 9)  # to the nearest of the chosen
    while len(chosen) < count:
        distance = distance.minimum((every != every[chosen[-1]]).sum(1))
        chosen.append(distance.argmax().item())
    return every[chosen].long()


class JigsawNetwork(nn.Module):
    """Tiles (9N, 3, t, t), and Q permutations for each image, by number (N, Q) -> logits of all
    permutations (N Q, 100)."""

    def __init__(self, args):
        super().__init__()
        encoder, D = rotnet.build_nin(args.encoder)
        encoder[0].insert(0, Standardize())
        rotnet.load_weights(encoder, args)
        self.encoder = encoder
        self.register_buffer("permutations", distant_permutations(100))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        hidden = [nn.Linear(9 * D, 4 * D, bias=False), nn.BatchNorm1d(4 * D), nn.ReLU()]
        self.classifier = nn.Sequential(*hidden, nn.Linear(4 * D, 100))

    def forward(self, tiles, numbers):
        h = self.pool(self.encoder(tiles)).unflatten(0, (-1, 9))  # (N, 9, D), once for all Q
        order = self.permutations[numbers].flatten(1)  # (N, 9Q)
        shuffled = h.gather(1, order[:, :, None].expand(-1, -1, h.shape[2]))  # (N, 9Q, D)
        return self.classifier(shuffled.unflatten(1, (-1, 9)).flatten(2).flatten(0, 1))


def cut_tiles(images, generator):
    """Images (N, 3, S, S) -> nine tiles of each in reading order, anywhere in their cells
    (9N, 3, S / 4, S / 4)."""
    N, _, S, _ = images.shape
    cell = S // 3  # in the paper 75 pixels,
    t = S // 4  # and 64
    inside = common.uniform(0, cell - t + 1, (N, 9, 2), generator).floor()
    grid = cell * torch.cartesian_prod(torch.arange(3), torch.arange(3)).to(images.device)
    corner = common.uniform(0, S - 3 * cell + 1, (N, 1, 2), generator).floor()
    return relative_patch.cut(images, corner + grid + inside, t)


def permutation_loss(network, images, args, generator):
    """Four permutations of each of the uint8 images (N, 3, S, S) -> scalars: the loss in nats, and
    the fraction of permutations that are predicted correctly. Chance is log 100 = 4.61, and 1 %."""
    x = common.random_crop(images / 255, 0, generator)  # no shift: its margin would tell places
    tiles = cut_tiles(x, generator)  # not normalized, since the encoder standardizes them
    labels = common.uniform(0, 100, (len(images), 4), generator).long()
    with rotnet.autocast(x.device):
        logits = network(tiles, labels)  # (4N, 100)
    labels = labels.flatten()
    loss = F.cross_entropy(logits.float(), labels)
    correct = logits.argmax(1) == labels
    return {"loss": loss, "permutation": correct.float().mean()}


def save_puzzles(folder, model, images, args):
    """puzzles.png: images in shuffled tiles, and in the order in which the network puts them, with
    a blue frame around a tile in its place, and an orange one around any other."""
    generator = torch.Generator(images.device).manual_seed(args.seed)
    tiles = cut_tiles(images / 255, generator)
    numbers = torch.arange(1, len(images) + 1, device=images.device)
    predicted = model(tiles, numbers[:, None]).argmax(1)
    order = model.permutations[numbers].cpu()  # (R, 9), the tile in each place
    places = model.permutations[predicted].cpu().argsort(1)  # (R, 9), from where each is taken
    tiles = tiles.cpu().unflatten(0, (-1, 9))
    shuffled = torch.stack([cut[row] for cut, row in zip(tiles, order, strict=True)])
    solved = torch.stack([cut[row] for cut, row in zip(shuffled, places, strict=True)])
    right = order.gather(1, places) == torch.arange(9)  # (R, 9)
    colors = torch.tensor([[0.9, 0.5, 0.0], [0.0, 0.45, 0.7]])[right.long()]  # (R, 9, 3)
    shuffled = relative_patch.framed(shuffled, torch.ones_like(colors))
    solved = relative_patch.framed(solved, colors)
    sheet = torch.stack([relative_patch.assemble(shuffled), relative_patch.assemble(solved)])
    title = "test images, shuffled; below, as the network orders them: blue is right, orange wrong"
    rotnet.save_sheet(folder / "puzzles.png", {title: sheet})


if __name__ == "__main__":
    parts = {"pretext_loss": permutation_loss, "save_predictions": save_puzzles}
    rotnet.run(Args, __doc__, SHAPES, Model=JigsawNetwork, **parts)
