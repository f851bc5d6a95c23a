"""Patches learns without a network: k-means on small patches, the floor that networks have to pass.

Patches of images are whitened and clustered. The centroids are blobs, edges and colors, much like
the first filters of a convolutional network. A patch is described by how near it is to each of
them, an image by sums over the patches of its quadrants: no label, no gradient, no second layer.

    Coates, Lee, Ng: An Analysis of Single-Layer Networks in Unsupervised Feature Learning, AISTATS
    2011. The "triangle" code of a whitened patch x, given centroids c_1 to c_K:

    f_k(x) = max(0, mean_j |x - c_j| - |x - c_k|)

    python relatives/patches.py --dataset cifar10 --centroids 4000     79.6 % in the paper

Measured as untrained: patches drawn at random in the place of centroids. The paper's probe is a
linear SVM, whose penalty is chosen by cross-validation.
"""

import dataclasses
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import simclr

SIDE = 6  # of a patch, in pixels
PATCHES = 100_000  # that are clustered; authors' code: 400,000
ITERATIONS = 20  # of k-means; authors' code: 50


@dataclasses.dataclass
class Args:
    script: str = "relatives/patches.py"
    dataset: str = simclr.flag("shapes", "shapes, cifar10, cifar100, stl10, an .npz file, a folder")
    data_dir: str = simclr.flag("data", "folder for downloads and decoded images")
    centroids: int = simclr.flag(800, "number K of centroids; paper: up to 4000", 2, PATCHES)
    seed: int = simclr.flag(0, "seed of the patches", 0, 2**31)
    device: str = simclr.flag("auto", "cuda, mps, cpu, or auto: the first that is there")
    out: str = simclr.flag("", "run folder; by default runs/<method>-<dataset>-seed<seed>")
    image_size: int = 32  # no flag: larger images shrink to the paper's size
    encoder: str = "patches"
    resume: str = ""
    explicit: tuple = ()
    command: str = ""


def random_patches(images, count, generator):
    """Images, uint8 (M, 3, S, S) -> patches from random places, rows (count, 3 p p)."""
    M, _, S, _ = images.shape
    row = torch.randint(M, (count, 1, 1), generator=generator)
    top, left = torch.randint(S - SIDE + 1, (2, count, 1, 1), generator=generator)
    along = torch.arange(SIDE)
    x = images.cpu()[row, :, top + along[:, None], left + along]  # (count, p, p, 3)
    return common.normalize(x.permute(0, 3, 1, 2) / 255).flatten(1)


def standardize(x):
    """Patches, rows (P, D) -> of mean 0 and variance 1, less where there is hardly any contrast."""
    x = x - x.mean(1, keepdim=True)
    return x / (x.var(1, keepdim=True) + 3e-3).sqrt()  # the authors' constant, in our units


def whitening(x):
    """Rows (P, D) -> the matrix W (D, D) for which columns of x W do not correlate (ZCA)."""
    values, vectors = torch.linalg.eigh(torch.cov(x.T))
    return vectors / (values + 0.1).sqrt() @ vectors.T  # 0.1 is the authors'


def distances(x, centroids):
    """Rows (P, D), (K, D) -> (P, K)."""
    squares = x.square().sum(1, keepdim=True) + centroids.square().sum(1)
    return torch.addmm(squares, x, centroids.T, alpha=-2).clamp_(min=0).sqrt_()


def triangle(x, centroids):
    """The code of rows (P, D): (P, K)."""
    d = distances(x, centroids)
    return (d.mean(1, keepdim=True) - d).clamp_(min=0)


def k_means(x, centroids):
    """An iteration: each centroid (K, D) moves to the mean of the rows (P, D) nearest to it."""
    owner = torch.cat([distances(part, centroids).argmin(1) for part in x.split(4096)])
    count = owner.bincount(minlength=len(centroids))[:, None]
    means = torch.zeros_like(centroids).index_add_(0, owner, x) / count.clamp(min=1)
    return torch.where(count > 0, means, centroids)  # one without rows stays


class Patches(nn.Module):
    """Images (B, 3, S, S) -> (B, 4K): the sums of the codes of all patches of each quadrant."""

    def __init__(self, W, centroids):
        super().__init__()
        self.W = nn.Parameter(W, requires_grad=False)
        self.centroids = nn.Parameter(centroids, requires_grad=False)

    def encode(self, images):
        side = images.shape[3] - SIDE + 1
        patches = F.unfold(images, SIDE).mT.flatten(0, 1)  # (B side side, 3 p p)
        code = triangle(standardize(patches) @ self.W, self.centroids)
        halves = code.view(len(images), side, side, -1).tensor_split(2, dim=1)
        quadrants = [part for half in halves for part in half.tensor_split(2, dim=2)]
        return torch.cat([part.sum((1, 2)) for part in quadrants], dim=1)

    def forward(self, images):
        return torch.cat([self.encode(x) for x in images.split(8)])  # codes are large


def main(args):
    """Measures random patches, then centroids. Returns the content of summary.json."""
    start = time.perf_counter()
    device = simclr.pick_device(args.device)
    data = simclr.load_data(args, device)
    generator = torch.Generator().manual_seed(args.seed)
    x = standardize(random_patches(data.train_images, PATCHES, generator)).to(device)
    W = whitening(x)
    x = x @ W
    encoder = Patches(W, x[: args.centroids].clone())
    with simclr.run_folder(args) as folder:
        untrained, before = simclr.evaluate(encoder, data)
        for _ in range(ITERATIONS):
            encoder.centroids.data = k_means(x, encoder.centroids)
        simclr.save(folder / "encoder.pt", encoder.state_dict())
        trained, after = simclr.evaluate(encoder, data)
        summary = simclr.describe(args, data, device, encoder, [], start)
        summary |= {"untrained": untrained, "trained": trained, "history": []}
        simclr.save_json(folder / "summary.json", summary)
        simclr.print_results(summary)
        simclr.save_neighbors(folder / "neighbors.png", data, before, after)
    return summary


if __name__ == "__main__":
    simclr.run(Args, __doc__, {}, main=main)
