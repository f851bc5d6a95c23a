"""SimMIM is MAE with mask tokens in the encoder and without a decoder: a linear layer predicts the
pixels.

The encoder sees every patch, the masked ones as a learned token. So it can be any network on a grid
of patches, not only a Vision Transformer, and it has to do the decoder's work, too; the price is
that it computes all patches, where MAE's computes a quarter. Larger blocks are masked, or a patch
could be copied from its neighbors. The error is absolute, which forgives what cannot be known.

    Xie, Zhang, Cao, Lin, Bao, Yao, Dai, Hu: SimMIM: A Simple Framework for Masked Image Modeling,
    CVPR 2022. Section 3.4 of the paper, over the set M of masked patches x_i and their
    reconstructions y_i, averaged over the 3 p p values of a patch:

    L = 1 / |M|  sum_{i in M} |x_i - y_i|_1 / (3 p p)

    python relatives/simmim.py --dataset cifar10 --compile    mae.py's flags but for the decoder's

Unlike the paper: fixed positions, not a shared relative bias; crops, betas and schedule of mae.py.
"""

import dataclasses
import math
import sys
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import mae
from common import UserError


@dataclasses.dataclass
class Args(mae.Args):
    script: str = "relatives/simmim.py"
    mask_ratio: float = mae.flag(0.6, "fraction of masked blocks; paper: 0.6", 0.01, 0.99)
    target: str = mae.flag("pixel", "pixels, or these standardized per patch", choices=mae.TARGETS)
    decoder_depth: ClassVar = None  # class variables are no flags: there is no decoder
    decoder_dim: ClassVar = None


SHAPES = mae.SHAPES | dict(epochs=9)  # which take as long as MAE's 14


def masked_blocks(count, mask_ratio):
    """How many of `count` blocks are masked (authors' code)."""
    return math.ceil(mask_ratio * count)


def block_masking(noise, mask_ratio, size=2):
    """Noise (B, L) -> mask (B, L), True in the fraction mask_ratio of all blocks of size x size
    patches; the paper's have 2 x 2 of 16 pixels. The noise of its first patch decides about a
    block."""
    side = math.isqrt(noise.shape[1])
    blocks = noise.unflatten(1, (side, side))[:, ::size, ::size]  # (B, blocks a side, the same)
    rank = blocks.flatten(1).argsort(1).argsort(1).view_as(blocks)
    masked = rank < masked_blocks(blocks[0].numel(), mask_ratio)
    block = torch.arange(side, device=noise.device) // size  # of a row or column of patches
    return masked[:, block[:, None], block].flatten(1)


class SimMIM(nn.Module):
    """Images (B, 3, S, S), mask_ratio and noise (B, L) -> predicted patches (B, L, 3 p p), and mask
    (B, L)."""

    def __init__(self, image_size, patch_size, D, depth, heads):
        super().__init__()
        self.encoder = mae.VisionTransformer(image_size, patch_size, D, depth, heads)
        self.mask_token = nn.Parameter(0.02 * torch.randn(D))
        self.head = nn.Linear(D, 3 * patch_size**2)
        mae.initialize(self)

    def forward(self, images, mask_ratio, noise):
        mask = block_masking(noise, mask_ratio)  # (B, L)
        tokens = self.encoder.embed(images)  # (B, L, D)
        hidden = self.mask_token + self.encoder.pos_embed[:, 1:]  # (1, L, D): where, not what
        x = self.encoder.encode(torch.where(mask[:, :, None], hidden, tokens))  # (B, 1 + L, D)
        return self.head(x[:, 1:]), mask


def build_simmim(args, image_size):
    """The model of a run, for images of this size."""
    count = math.ceil(image_size // args.patch_size / 2) ** 2
    if masked_blocks(count, args.mask_ratio) == count:
        reason = f"leaves no block of 2 x 2 patches visible, of {count}"
        raise UserError(f"--mask-ratio {args.mask_ratio}: {reason}; try a smaller --patch-size")
    model = SimMIM(image_size, args.patch_size, *mae.ENCODERS[args.encoder])
    mae.load_weights(model.encoder, args)
    return model


def l1_loss(prediction, targets, mask):
    """Mean absolute error on the masked patches only: prediction, targets (B, L, P), mask (B, L)
    -> scalar."""
    error = (prediction - targets).abs().mean(2)  # (B, L)
    return (error * mask).sum() / mask.sum()


if __name__ == "__main__":
    mae.run(Args, __doc__, SHAPES, build_model=build_simmim, loss_of=l1_loss)
