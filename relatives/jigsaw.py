"""Jigsaw puzzles are RotNet with another question: in which order are the tiles of this image?

An image is cut into nine tiles, which are shuffled by one of 100 permutations, and the network says by which. It has to
know which part of a thing a tile shows: the features of each tile are computed by themselves, and only a classifier on
top sees all nine. Of all 9! permutations those are used that differ in most places: where two differ in two tiles only,
no other tile tells them apart. Against shortcuts, tiles do not touch, and lose their own mean and deviation.

    Noroozi, Favaro: Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles, ECCV 2016.
    "Solving jigsaw puzzles" in the lecture. x_1 ... x_9 are the tiles in reading order, pi_k is permutation k of 100:

    L = mean over images and k of  -log F^k(x_{pi_k(1)}, ..., x_{pi_k(9)})     F^k the predicted probability of pi_k

    python relatives/jigsaw.py --dataset cifar10 --compile                          the flags are rotnet.py's
"""

import dataclasses
import itertools
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
    command: str = rotnet.Args.command.replace("rotnet", "relatives/jigsaw")


def far_apart(count):
    """Permutations of nine tiles (count, 9), from the reading order on, each in as many places as possible different
    from all before it. The paper's algorithm 1 wants that on average, and gets pairs that differ in two places."""
    every = torch.tensor(list(itertools.permutations(range(9))), dtype=torch.uint8)  # (9!, 9)
    chosen, distance = [0], torch.full((len(every),), 9)  # to the nearest of the chosen
    while len(chosen) < count:
        distance = distance.minimum((every != every[chosen[-1]]).sum(1))
        chosen.append(distance.argmax().item())
    return every[chosen].long()


def cut_tiles(images, generator):
    """Images (N, 3, S, S) -> nine tiles of each in reading order, anywhere in their cells (9 N, 3, S / 4, S / 4)."""
    N, _, S, _ = images.shape
    cell, t = S // 3, S // 4  # in the paper 75 and 64 pixels
    inside = common.uniform(0, cell - t + 1, (N, 9, 2), generator).floor()
    grid = cell * torch.cartesian_prod(torch.arange(3), torch.arange(3)).to(images.device)
    corners = (common.uniform(0, S - 3 * cell + 1, (N, 1, 2), generator).floor() + grid + inside).flatten(0, 1)
    boxes = torch.cat([corners, torch.full_like(corners, t)], dim=1)
    plain = torch.zeros(9 * N, dtype=torch.bool, device=images.device)
    return common.resized_crop(images.repeat_interleave(9, dim=0), boxes, t, plain)


def standardize(tiles):
    """Each channel of each tile to mean 0 and deviation 1: neighbors cannot be found by their color alone."""
    std, mean = torch.std_mean(tiles, (2, 3), keepdim=True)
    return ((tiles - mean) / (std + 0.01)).contiguous(memory_format=torch.channels_last)


class JigsawNetwork(nn.Module):
    """Tiles (9 N, 3, t, t), and Q permutations for each image (N, Q), by number -> logits of all of them (N Q, 100)."""

    def __init__(self, args):
        super().__init__()
        self.encoder, D = rotnet.build_nin(args.encoder)
        self.register_buffer("permutations", far_apart(100))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        hidden = [nn.Linear(9 * D, 4 * D, bias=False), nn.BatchNorm1d(4 * D), nn.ReLU()]
        self.classifier = nn.Sequential(*hidden, nn.Linear(4 * D, 100))

    def forward(self, tiles, numbers):
        h = self.pool(self.encoder(tiles)).unflatten(0, (-1, 9))  # (N, 9, D), computed once for all Q
        order = self.permutations[numbers].flatten(1)  # (N, Q 9)
        shuffled = h.gather(1, order[:, :, None].expand(-1, -1, h.shape[2]))  # (N, Q 9, D)
        return self.classifier(shuffled.unflatten(1, (-1, 9)).flatten(2).flatten(0, 1))


def training_step(network, images, args, generator):
    """Images, uint8 (N, 3, S, S), four permutations of each -> scalars: loss, and fraction of permutations predicted
    correctly; log 100 = 4.61 is chance."""
    images = common.random_crop(images / 255, 0, generator)  # mirrored, not shifted: a black margin would tell places
    tiles = standardize(cut_tiles(images, generator))
    labels = common.uniform(0, 100, (len(images), 4), generator).long()
    with rotnet.autocast(tiles.device):
        logits = network(tiles, labels).float()  # (4 N, 100)
    labels = labels.flatten()
    return {"loss": F.cross_entropy(logits, labels), "permutation": (logits.argmax(1) == labels).float().mean()}


@torch.no_grad()
def save_answers(folder, model, data, args):
    """puzzles.png: ten test images, cut and shuffled, and put back as the network says; wrong tiles are reddish."""
    device, sheet = next(model.eval().parameters()).device, []
    images, generator = data.test_images[:10].to(device) / 255, torch.Generator(device).manual_seed(args.seed)
    tiles, numbers = cut_tiles(images, generator), torch.arange(1, len(images) + 1, device=device)
    answers = model(standardize(tiles), numbers[:, None]).argmax(1)
    red = torch.tensor([0.9, 0.1, 0.1], device=device)[:, None, None]
    for cut, order, answer in zip(tiles.split(9), *model.permutations[torch.stack([numbers, answers])], strict=True):
        tile = order[answer.argsort()]  # which one the network puts in each place
        wrong = (tile != torch.arange(9, device=device))[:, None, None, None]
        sheet += [cut[order], torch.where(wrong, cut[tile].lerp(red, 0.5), cut[tile])]
    grids = [torchvision.utils.make_grid(tiles.cpu(), 3, 1, pad_value=1.0) for tiles in sheet]  # (3, 3 t + 4, 3 t + 4)
    if rotnet.RANK == 0:
        grids = F.interpolate(torch.stack(grids), scale_factor=max(1, round(96 / images.shape[3])))
        torchvision.utils.save_image(grids, folder / "puzzles.png", nrow=10, padding=8, pad_value=1.0)


if __name__ == "__main__":  # rotnet.py, with these names in place of its own
    vars(rotnet).update(METHOD="jigsaw", __doc__=__doc__, Args=Args, build_rotnet=JigsawNetwork)
    vars(rotnet).update(training_step=training_step, save_answers=save_answers)
    rotnet.SHAPES.update(epochs=12, eval_every=4)  # which take less than RotNet's four
    rotnet.run()
