"""Data sets and batched augmentations for the self-supervised scripts beside this file, and nothing else.

Pictures lie as one uint8 tensor on the training device; augmentations work there on whole batches of float
images in [0, 1], with one parameter per image, drawn from an explicit torch.Generator.
"""

import torch

# ======================================================================================================
# Augmentations: float images (N, C, H, W) in [0, 1], one parameter per image
# ======================================================================================================

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as torchvision's weights expect


def normalize(images):
    """(N, 3, H, W) in [0, 1] -> mean 0 and deviation 1 of each channel over the pictures of ImageNet."""
    mean, std = torch.tensor([MEAN, STD], device=images.device)[..., None, None]  # (3, 1, 1) each
    return (images - mean) / std
