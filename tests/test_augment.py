"""Each batched operator against torchvision's functional one, image by image, and its random parameters."""

import torch
import torchvision.transforms.v2.functional as TF

import common


def test_normalize():
    images = torch.rand(4, 3, 9, 9)
    torch.testing.assert_close(common.normalize(images), TF.normalize(images, common.MEAN, common.STD))
