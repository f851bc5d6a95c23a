"""SimMIM is MAE with the mask tokens in the encoder and no decoder: one linear layer predicts the pixels.

The encoder sees every patch, the masked ones as a learned token. So it can be any network on a grid of patches, not
only a Vision Transformer, and it has to do the decoder's work, too; the price is that it computes all patches, where
MAE's computes a quarter. Larger blocks are masked, or a patch could be copied from its neighbors. The error is
absolute, which forgives what cannot be known.

    Xie, Zhang, Cao, Lin, Bao, Yao, Dai, Hu: SimMIM: A Simple Framework for Masked Image Modeling, CVPR 2022.
    The paper's loss, section 3.4, over the set M of masked patches x_i and their reconstructions y_i:

    L = 1 / |M|  sum_{i in M} |x_i - y_i|_1                                divided by the numbers in a patch

    python relatives/simmim.py --dataset cifar10 --compile                 the flags are mae.py's, but for the decoder's
"""

import dataclasses
import math
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import mae


@dataclasses.dataclass
class Args(mae.Args):
    mask_ratio: float = mae.flag(0.6, "fraction of the blocks that are masked; paper: 0.6", 0.01, 0.9)
    target: str = mae.flag("pixel", "norm-: standardized in each patch; paper: pixel", choices=("pixel", "norm-pixel"))
    decoder_depth: int = 0  # this and decoder_dim are no flags here
    decoder_dim: int = 0
    command: str = mae.Args.command.replace("mae", "relatives/simmim")


def block_masking(noise, mask_ratio, size=2):
    """Noise (B, L) -> mask (B, L), True in the fraction mask_ratio of all blocks of size x size patches; in the paper a
    block has 2 x 2 of 16 pixels. The noise of its first patch decides about a block."""
    line = torch.arange(math.isqrt(noise.shape[1]), device=noise.device)
    blocks = noise.unflatten(1, (len(line), -1))[:, ::size, ::size]  # (B, blocks a side, blocks a side)
    rank = blocks.flatten(1).argsort(1).argsort(1).view_as(blocks)
    masked = rank < math.ceil(mask_ratio * blocks[0].numel())
    return masked[:, line[:, None] // size, line // size].flatten(1)


class SimMIM(nn.Module):
    """Images (B, 3, S, S), mask_ratio and noise (B, L) -> predicted patches (B, L, 3 p p) and mask (B, L)."""

    def __init__(self, image_size, patch_size, D, depth, heads, *decoder):
        super().__init__()
        self.encoder = mae.VisionTransformer(image_size, patch_size, D, depth, heads)
        self.mask_token = nn.Parameter(0.02 * torch.randn(D))
        self.head = nn.Linear(D, 3 * patch_size**2)
        for layer in self.modules():  # as in mae.py
            if isinstance(layer, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight.flatten(1))
                nn.init.zeros_(layer.bias)

    def forward(self, images, mask_ratio, noise):
        mask, tokens = block_masking(noise, mask_ratio), self.encoder.embed(images)  # (B, L), (B, L, D)
        hidden = self.mask_token + self.encoder.pos_embed[:, 1:]  # (1, L, D): where, not what
        x = self.encoder.encode(torch.where(mask[:, :, None], hidden, tokens))  # (B, 1 + L, D)
        return self.head(x[:, 1:]), mask


def l1_loss(prediction, targets, mask):
    """Mean absolute error on masked patches alone: prediction, targets (B, L, P), mask (B, L) -> scalar."""
    error = (prediction - targets).abs().mean(2)  # (B, L)
    return (error * mask).sum() / mask.sum()


if __name__ == "__main__":  # mae.py, with these names in place of its own
    vars(mae).update(METHOD="simmim", __doc__=__doc__, Args=Args, MaskedAutoencoder=SimMIM, reconstruction_loss=l1_loss)
    mae.SHAPES.update(epochs=9)  # which take as long as MAE's 14
    mae.run()
