"""Each batched operator against torchvision's functional one, image by image, and the parameters it
draws."""

import itertools

import pytest
import torch
import torchvision.transforms.v2.functional as TF
from torchvision.transforms import RandomResizedCrop

import common

N, S = 24, 32


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def images(generator):
    """Noise and flat color, grays and extremes among them."""
    images = torch.rand(N, 3, S, S, generator=generator)
    images[0], images[1], images[2] = 0, 1, 0.5
    images[3] = images[3].round()
    images[4] = images[4, :1]
    return images


def each(operator, images, *parameters):
    """operator(image, *parameters of that image) for every image: what the batched one must
    equal."""
    return torch.stack(
        [operator(image, *row) for image, *row in zip(images, *parameters, strict=True)]
    )


def record(monkeypatch, name):
    """The arguments with which random_... calls the operator `name`, which still does its work."""
    calls, operator = [], getattr(common, name)
    monkeypatch.setattr(common, name, lambda *args: calls.append(args) or operator(*args))
    return calls


def assert_same_distribution(a, b):
    """Two-sample Kolmogorov-Smirnov: equal distributions pass but once in ten thousand."""
    points = torch.cat([a, b]).sort().values
    distance = (torch.searchsorted(a.sort().values, points, right=True) / len(a)).sub(
        torch.searchsorted(b.sort().values, points, right=True) / len(b)
    )
    assert distance.abs().max() < 2.23 * ((len(a) + len(b)) / (len(a) * len(b))) ** 0.5


# ==================================================================================================
# Operators
# ==================================================================================================


@pytest.mark.parametrize("size", [8, 31, 32, 80])  # down and up
@pytest.mark.parametrize("shape", [(32, 32), (40, 25)])
def test_resized_crop(generator, shape, size):
    images = torch.rand(N, 3, *shape, generator=generator)
    boxes = common.random_boxes(N, *shape, (0.05, 1.0), (0.5, 2.0), generator)
    boxes[0] = torch.tensor([0, 0, *shape])
    boxes[1] = torch.tensor([5, 6, 1, 1])
    flip = torch.rand(N, generator=generator) < 0.5

    def one(image, box, mirrored):
        image = TF.resized_crop(image, *box.int().tolist(), [size, size], antialias=True)
        return TF.horizontal_flip(image) if mirrored else image

    expected = each(one, images, boxes, flip)
    torch.testing.assert_close(
        common.resized_crop(images, boxes, size, flip), expected, rtol=0, atol=1e-5
    )


def test_random_crop_shifts_and_mirrors_exactly(monkeypatch, generator):
    images, calls = (
        torch.rand(600, 3, 8, 8, generator=generator),
        record(monkeypatch, "resized_crop"),
    )
    shifted = common.random_crop(images, 2, generator, flip=0.3)
    (_, boxes, _, flip), *_ = calls
    for image, moved, box, mirrored in zip(
        images, shifted, boxes.int().tolist(), flip, strict=True
    ):
        window = TF.crop(TF.pad(image, 2), *box)
        assert torch.equal(moved, TF.horizontal_flip(window) if mirrored else window)
    assert len(boxes.unique(dim=0)) == 25 and abs(flip.float().mean() - 0.3) < 0.06
    assert torch.equal(common.random_crop(images, 0, generator, flip=0), images)


def test_random_crop_is_of_squares(generator):
    with pytest.raises(ValueError, match="images of 8 x 6 are not square"):
        common.random_crop(torch.rand(4, 3, 8, 6), 2, generator)


@pytest.mark.parametrize("kernel_size", [3, 9, 23])
def test_gaussian_blur(images, generator, kernel_size):
    sigma = common.uniform(0.1, 3.0, (N,), generator)
    expected = each(lambda x, s: TF.gaussian_blur(x, kernel_size, s.item()), images, sigma)
    torch.testing.assert_close(
        common.gaussian_blur(images, sigma, kernel_size), expected, rtol=0, atol=1e-5
    )


def test_no_blur_is_exact(images, generator):
    assert torch.equal(common.random_gaussian_blur(images, generator, p=0.0), images)


def test_adjust_hue(images, generator):
    shift = common.uniform(-0.5, 0.5, (N,), generator)
    shift[5], shift[6], shift[7] = -0.5, 0, 0.5
    expected = each(lambda x, s: TF.adjust_hue(x, s.item()), images, shift)
    torch.testing.assert_close(common.adjust_hue(images, shift), expected, rtol=0, atol=1e-5)


def test_color_jitter(images, generator):
    factors = torch.cat(
        [common.uniform(0, 2, (N, 3), generator), common.uniform(-0.5, 0.5, (N, 1), generator)],
        dim=1,
    )
    order = torch.tensor(list(itertools.permutations(range(4))))  # all 24
    operators = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue

    def one(image, factor, turns):
        for k in turns.tolist():
            image = operators[k](image, factor[k].item())
        return image

    expected = each(one, images, factors, order)
    torch.testing.assert_close(
        common.color_jitter(images, factors, order), expected, rtol=0, atol=1e-5
    )


def test_neutral_color_jitter_is_exact_but_for_the_hue(images):
    factors, order = torch.tensor([1.0, 1, 1, 0]).expand(N, 4), torch.arange(4).expand(N, 4)
    torch.testing.assert_close(
        common.color_jitter(images, factors, order), images, rtol=0, atol=1e-6
    )


def test_random_grayscale(images):
    chosen = torch.rand(N, generator=torch.Generator().manual_seed(1)) < 0.5
    expected = each(lambda x, c: TF.rgb_to_grayscale(x, 3) if c else x, images, chosen)
    torch.testing.assert_close(
        common.random_grayscale(images, torch.Generator().manual_seed(1), p=0.5), expected
    )


def test_random_solarize(images):
    chosen = torch.rand(N, generator=torch.Generator().manual_seed(1)) < 0.5
    expected = each(lambda x, c: TF.solarize(x, 0.4) if c else x, images, chosen)
    torch.testing.assert_close(
        common.random_solarize(images, torch.Generator().manual_seed(1), 0.4, p=0.5), expected
    )


def test_within_autocast_they_stay_exact(images):
    def views():
        generator = torch.Generator().manual_seed(1)
        x = common.random_resized_crop(images, S, generator)
        x = common.random_color_jitter(x, generator, 0.4, 0.4, 0.4, 0.1)
        x = common.random_gaussian_blur(common.random_grayscale(x, generator), generator)
        return common.normalize(
            common.random_solarize(common.random_crop(x, 4, generator), generator)
        )

    expected = views()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(views(), expected)


def test_operators_are_compiled_for_a_while(images, monkeypatch):
    plain, compiled = common.gaussian_blur, []
    monkeypatch.setattr(
        torch, "compile", lambda operator: compiled.append(operator) or (lambda *_: images + 1)
    )
    with pytest.raises(KeyboardInterrupt), common.compile_operators(True):
        assert torch.equal(common.random_gaussian_blur(images, torch.Generator()), images + 1)
        raise KeyboardInterrupt
    assert plain in compiled and common.gaussian_blur is plain
    with common.compile_operators(False):
        assert common.gaussian_blur is plain


def test_normalize(images):
    x = common.normalize(images)
    torch.testing.assert_close(x, TF.normalize(images, common.MEAN, common.STD))
    assert x.is_contiguous(memory_format=torch.channels_last)


# ==================================================================================================
# Parameters
# ==================================================================================================

MANY = 20_000


def small(count=MANY):
    return torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(1))


def test_boxes_are_drawn_as_torchvision_draws_them(generator):
    scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    ours = common.random_boxes(MANY, S, S, scale, ratio, generator)
    torch.manual_seed(0)
    image = torch.empty(3, S, S)
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(image, scale, ratio) for _ in range(MANY)]
    ).float()
    assert torch.equal(ours, ours.round()) and ours.min() >= 0
    assert (ours[:, :2] + ours[:, 2:]).max() <= S
    for measure in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
        lambda b: b[:, 0],
        lambda b: b[:, 1],
    ):
        assert_same_distribution(measure(ours), measure(theirs))


def test_a_box_that_never_fits_is_the_whole_image(generator):
    boxes = common.random_boxes(50, S, S, (1.0, 1.0), (2.0, 3.0), generator)
    assert torch.equal(boxes, torch.tensor([0.0, 0, S, S]).expand(50, 4))


def test_random_resized_crop_draws_per_image_and_flips(monkeypatch, generator):
    calls = record(monkeypatch, "resized_crop")
    common.random_resized_crop(small(2000), 2, generator, scale=(0.2, 1.0), flip=0.3)
    (_, boxes, size, flip), *_ = calls
    assert size == 2 and len(boxes.unique(dim=0)) > 1
    assert abs(flip.float().mean() - 0.3) < 0.05


def test_color_jitter_draws_as_torchvision_does(monkeypatch, generator):
    calls = record(monkeypatch, "color_jitter")
    common.random_color_jitter(small(), generator, 0.4, 1.2, 0.8, 0.2, p=0.75)
    (_, factors, order), *_ = calls
    neutral = (factors == torch.tensor([1.0, 1, 1, 0])).all(1)
    assert abs(neutral.float().mean() - 0.25) < 0.02
    for drawn, low, high in zip(
        factors[~neutral].T, (0.6, 0, 0.2, -0.2), (1.4, 2.2, 1.8, 0.2), strict=True
    ):
        assert low <= drawn.min() and drawn.max() <= high
        assert_same_distribution(drawn, torch.linspace(low, high, 5000))
    assert abs(torch.corrcoef(factors[~neutral].T) - torch.eye(4)).max() < 0.05
    permutations, counts = order.unique(dim=0, return_counts=True)
    assert len(permutations) == 24 and (counts / MANY - 1 / 24).abs().max() < 0.01


def test_probabilities(generator):
    images = small() + torch.arange(3).view(3, 1, 1)  # neither gray nor dark
    for random in (common.random_grayscale, common.random_solarize):
        changed = (random(images, generator, p=0.3) != images).flatten(1).any(1)
        assert abs(changed.float().mean() - 0.3) < 0.02


def test_blur_draws_sigma_uniformly(monkeypatch, generator):
    calls = record(monkeypatch, "gaussian_blur")
    common.random_gaussian_blur(torch.rand(5000, 3, 4, 4), generator, p=0.4)
    (_, sigma, kernel_size), *_ = calls
    blurred = sigma[sigma > 0.01]
    assert abs(len(blurred) / 5000 - 0.4) < 0.03 and kernel_size == 3
    assert_same_distribution(blurred, torch.linspace(0.1, 2.0, 5000))


def test_a_seed_fixes_every_operator():
    images = small(8)
    for draw in (
        lambda g: common.random_resized_crop(images, 2, g),
        lambda g: common.random_color_jitter(images, g, 0.4, 0.4, 0.4, 0.1),
        lambda g: common.random_grayscale(images, g, p=0.5),
        lambda g: common.random_gaussian_blur(torch.rand(8, 3, 9, 9, generator=g), g),
        lambda g: common.random_solarize(images, g, p=0.5),
    ):
        first, again, other = (draw(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
        assert torch.equal(first, again) and not torch.equal(first, other)
