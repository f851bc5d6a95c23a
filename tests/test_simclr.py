"""The loss against the lecture's formula, and the script from the command line to its files."""

import math

import pytest
import torch

import simclr


def lecture_loss(z1, z2, temperature):
    """Algorithm 1 of the lecture, line by line; the views 2k - 1 and 2k of picture k lie side by side."""
    z = [view for pair in zip(z1, z2, strict=True) for view in pair]
    s = [[(a @ b / (a.norm() * b.norm())).item() for b in z] for a in z]

    def pair_loss(i, j):
        return -math.log(
            math.exp(s[i][j] / temperature) / sum(math.exp(s[i][k] / temperature) for k in range(len(z)) if k != i)
        )

    return sum(pair_loss(k, k + 1) + pair_loss(k + 1, k) for k in range(0, len(z), 2)) / len(z)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("N", [1, 2, 13])
def test_nt_xent_is_the_lectures_formula(N, temperature):
    z1, z2 = torch.randn(2, N, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(N))
    expected = lecture_loss(z1, z2, temperature)
    assert simclr.nt_xent(z1, z2, temperature).item() == pytest.approx(expected, abs=1e-6)


def test_nt_xent_of_identical_projections_is_chance():
    z = torch.randn(1, 6).expand(16, 6)
    assert simclr.nt_xent(z, z, 0.1).item() == pytest.approx(math.log(31), abs=1e-5)
