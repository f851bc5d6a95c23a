"""relatives/patches.py against naive loops, and a whole run."""

import json

import pytest
import torch
from conftest import files

import common
import simclr
from relatives import patches


def seeded():
    return torch.Generator().manual_seed(0)


def naive_code(x, centroids):
    """Of one whitened patch: the formula of the docstring."""
    distances = [(x - c).norm() for c in centroids]
    mean = sum(distances) / len(distances)
    return torch.stack([(mean - d).clamp(min=0) for d in distances])


def test_the_code_is_the_papers_triangle():
    x = torch.randn(7, 12, generator=seeded())
    centroids = torch.randn(5, 12, generator=seeded())
    expected = torch.stack([naive_code(row, centroids) for row in x])
    torch.testing.assert_close(patches.triangle(x, centroids), expected)
    assert (expected == 0).any()


def test_a_centroid_moves_to_the_mean_of_what_is_near():
    x = torch.randn(5000, 3, generator=seeded())  # more than are compared at once
    centroids = torch.cat([x[:4], torch.full((1, 3), 100.0)])
    owner = [min(range(5), key=lambda k: (row - centroids[k]).norm()) for row in x]
    moved = patches.k_means(x, centroids)
    for k in range(4):
        rows = [row for row, own in zip(x, owner, strict=True) if own == k]
        torch.testing.assert_close(moved[k], torch.stack(rows).mean(0))
    assert torch.equal(moved[4], centroids[4])  # nothing is near


def test_whitened_columns_do_not_correlate():
    x = torch.randn(4000, 6, generator=seeded()) @ torch.randn(6, 6, generator=seeded())
    W = patches.whitening(30 * x)  # the constant is small beside such variances
    torch.testing.assert_close(torch.cov((30 * x @ W).T), torch.eye(6), atol=0.01, rtol=0)
    torch.testing.assert_close(W, W.T)


def test_patches_are_standardized_where_they_have_contrast():
    x = 3 + 5 * torch.randn(50, 108, generator=seeded())
    rows = patches.standardize(x)
    assert rows.mean(1).abs().max() < 1e-5
    torch.testing.assert_close(rows.var(1), torch.ones(50), atol=1e-3, rtol=0)
    flat = 3 + 0.01 * torch.randn(50, 108, generator=seeded())
    assert patches.standardize(flat).var(1).max() < 0.1


def test_random_patches_are_parts_of_the_images():
    images = torch.randint(256, (2, 3, 8, 8), generator=seeded()).byte()
    found = patches.random_patches(images, 200, seeded())
    x = common.normalize(images / 255)
    windows = x.unfold(2, 6, 1).unfold(3, 6, 1)  # (2, 3, 3, 3, 6, 6)
    windows = windows.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)  # (18, 108)
    distance = (found[:, None] - windows).abs().amax(2)
    assert distance.amin(1).max() < 1e-6
    assert len(distance.argmin(1).unique()) == 18  # all places


def test_an_image_is_the_sums_of_its_quadrants():
    images = torch.randn(11, 3, 9, 9, generator=seeded())  # more than are encoded at once
    W = torch.randn(108, 108, generator=seeded())
    centroids = torch.randn(5, 108, generator=seeded())
    found = patches.Patches(W, centroids)(images)
    assert found.shape == (11, 20)
    expected = torch.zeros(2, 2, 5)
    for top in range(4):
        for left in range(4):
            patch = images[10, :, top : top + 6, left : left + 6].flatten()
            x = patches.standardize(patch[None]) @ W
            expected[top // 2, left // 2] += naive_code(x[0], centroids)
    torch.testing.assert_close(found[10], expected.flatten(), rtol=1e-4, atol=1e-3)


def test_a_run_measures_random_patches_and_centroids(few_shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(patches, "PATCHES", 2000)
    flags = ["--dataset", str(few_shapes), "--centroids", "16", "--out", str(tmp_path / "run")]
    args = simclr.parse_args(flags, patches.Args, patches.__doc__, {})
    summary = patches.main(args)
    assert files(tmp_path / "run") == {"encoder.pt", "neighbors.png", "summary.json"}
    assert json.loads((tmp_path / "run/summary.json").read_text())["trained"] == summary["trained"]
    assert set(summary["untrained"]) == set(summary["trained"]) == {"knn", "linear_probe"}
    assert summary["untrained"] != summary["trained"]
    assert "linear_probe" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--centroids", "1"], "--centroids 1: must be from 2 to 100000"),
        (["--epochs", "3"], "unrecognized arguments: --epochs"),
        (["--dataset", "nothing"], "dataset nothing: is not shapes"),
    ],
)
def test_bad_input_is_one_line(flags, message, error_of):
    def run():
        simclr.run(patches.Args, patches.__doc__, {}, main=patches.main)

    assert message in error_of(run, *flags)
