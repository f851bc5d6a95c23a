"""Each batched operator against torchvision's functional one, image by image, and the parameters it
draws."""

import itertools

import pytest
import torch
import torchvision.transforms.v2.functional as TF
from conftest import spy
from torchvision.transforms import RandomResizedCrop

import common

N = 24
S = 32


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def generator():
    return seeded(0)


@pytest.fixture
def images(generator):
    """Noise and flat color, grays and extremes among them."""
    images = torch.rand(N, 3, S, S, generator=generator)
    images[0] = 0
    images[1] = 1
    images[2] = 0.5
    images[3] = images[3].round()
    images[4] = images[4, :1]
    return images


def each(operator, images, *parameters):
    """operator(image, *parameters of that image) for every image: what the batched one must
    equal."""
    rows = zip(images, *parameters, strict=True)
    return torch.stack([operator(*row) for row in rows])


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def assert_same_distribution(a, b):
    """Two-sample Kolmogorov-Smirnov: equal distributions fail once in ten thousand times."""
    points = torch.cat([a, b]).sort().values
    below_a = torch.searchsorted(a.sort().values, points, right=True) / len(a)
    below_b = torch.searchsorted(b.sort().values, points, right=True) / len(b)
    critical = 2.23 * (1 / len(a) + 1 / len(b)) ** 0.5
    assert (below_a - below_b).abs().max() < critical


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

    assert_close(common.resized_crop(images, boxes, size, flip), each(one, images, boxes, flip))


def test_random_crop_shifts_and_mirrors_exactly(monkeypatch, generator):
    images = torch.rand(600, 3, 8, 8, generator=generator)
    calls = spy(monkeypatch, common, "resized_crop")
    moved = common.random_crop(images, 2, generator, flip=0.3)
    ((_, boxes, _, flip),) = calls

    def one(image, box, mirrored):
        window = TF.crop(TF.pad(image, 2), *box.int().tolist())
        return TF.horizontal_flip(window) if mirrored else window

    assert torch.equal(moved, each(one, images, boxes, flip))
    assert len(boxes.unique(dim=0)) == 25
    assert abs(flip.float().mean() - 0.3) < 0.06


def test_without_padding_and_flip_a_crop_is_the_image(images, generator):
    assert torch.equal(common.random_crop(images, 0, generator, flip=0), images)


def test_random_crop_is_of_squares(generator):
    with pytest.raises(ValueError, match="images of 8 x 6 are not square"):
        common.random_crop(torch.rand(4, 3, 8, 6), 2, generator)


@pytest.mark.parametrize("kernel_size", [3, 9, 23])
def test_gaussian_blur(images, generator, kernel_size):
    sigma = common.uniform(0.1, 3.0, (N,), generator)

    def one(image, sigma):
        return TF.gaussian_blur(image, kernel_size, sigma.item())

    assert_close(common.gaussian_blur(images, sigma, kernel_size), each(one, images, sigma))


def test_no_blur_is_exact(images, generator):
    assert torch.equal(common.random_gaussian_blur(images, generator, p=0.0), images)


def test_adjust_hue(images, generator):
    shift = common.uniform(-0.5, 0.5, (N,), generator)
    shift[5:8] = torch.tensor([-0.5, 0, 0.5])

    def one(image, shift):
        return TF.adjust_hue(image, shift.item())

    assert_close(common.adjust_hue(images, shift), each(one, images, shift))


def test_color_jitter(images, generator):
    factors = common.uniform(0, 2, (N, 3), generator)
    shift = common.uniform(-0.5, 0.5, (N, 1), generator)
    factors = torch.cat([factors, shift], dim=1)
    order = torch.tensor(list(itertools.permutations(range(4))))  # all 24
    operators = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)

    def one(image, factor, turns):
        for k in turns.tolist():
            image = operators[k](image, factor[k].item())
        return image

    assert_close(common.color_jitter(images, factors, order), each(one, images, factors, order))


def test_neutral_color_jitter_changes_nothing(images):
    factors = torch.tensor([1.0, 1, 1, 0]).expand(N, 4)
    order = torch.arange(4).expand(N, 4)
    found = common.color_jitter(images, factors, order)
    torch.testing.assert_close(found, images, rtol=0, atol=1e-6)  # the hue is turned by 0


def test_random_grayscale(images):
    chosen = torch.rand(N, generator=seeded(1)) < 0.5
    gray = TF.rgb_to_grayscale(images, 3)
    expected = torch.where(chosen[:, None, None, None], gray, images)
    torch.testing.assert_close(common.random_grayscale(images, seeded(1), p=0.5), expected)


def test_random_solarize(images):
    chosen = torch.rand(N, generator=seeded(1)) < 0.5
    expected = torch.where(chosen[:, None, None, None], TF.solarize(images, 0.4), images)
    found = common.random_solarize(images, seeded(1), 0.4, p=0.5)
    torch.testing.assert_close(found, expected)


def all_views(images):
    """All operators, one after the other."""
    generator = seeded(1)
    x = common.random_resized_crop(images, S, generator)
    x = common.random_color_jitter(x, generator, 0.4, 0.4, 0.4, 0.1)
    x = common.random_grayscale(x, generator)
    x = common.random_gaussian_blur(x, generator)
    x = common.random_crop(x, 4, generator)
    x = common.random_solarize(x, generator)
    return common.normalize(x)


def test_random_vertical_flip(images):
    half = common.random_vertical_flip(images, seeded(1))
    flipped = each(TF.vertical_flip, images)
    chosen = (half != images).flatten(1).any(1)
    assert 0 < chosen.sum() < N - 3  # three are of one color
    assert torch.equal(half, torch.where(chosen[:, None, None, None], flipped, images))
    assert torch.equal(common.random_vertical_flip(images, seeded(1), p=1.0), flipped)
    assert torch.equal(common.random_vertical_flip(images, seeded(1), p=0.0), images)


def test_random_quarter_turn(images):
    images = images[4:].repeat(10, 1, 1, 1)
    turned = common.random_quarter_turn(images, seeded(1))
    counts = []
    for k in range(4):
        expected = images.rot90(k, (2, 3))
        counts.append((turned == expected).flatten(1).all(1).sum().item())
    assert sum(counts) == len(images)
    assert min(counts) > len(images) / 6


def test_within_autocast_they_stay_exact(images):
    with torch.autocast("cpu", torch.bfloat16):
        found = all_views(images)
    assert torch.equal(found, all_views(images))


def test_operators_are_compiled_for_a_while(images, monkeypatch):
    plain = common.resized_crop, common.gaussian_blur, common.color_jitter
    compiled = []

    def compile_operator(operator):
        compiled.append(operator)
        return lambda *_: images + 1

    monkeypatch.setattr(torch, "compile", compile_operator)
    with pytest.raises(KeyboardInterrupt), common.compile_operators(True):
        assert torch.equal(common.random_gaussian_blur(images, seeded(0)), images + 1)
        assert torch.equal(common.random_crop(images, 2, seeded(0)), images + 1)
        raise KeyboardInterrupt
    assert compiled == list(plain)
    assert (common.resized_crop, common.gaussian_blur, common.color_jitter) == plain
    with common.compile_operators(False):
        assert (common.resized_crop, common.gaussian_blur, common.color_jitter) == plain


def test_normalize(images):
    x = common.normalize(images)
    torch.testing.assert_close(x, TF.normalize(images, common.MEAN, common.STD))
    assert x.is_contiguous(memory_format=torch.channels_last)


# ==================================================================================================
# Parameters
# ==================================================================================================

MANY = 20_000


def small(count):
    return torch.rand(count, 3, 2, 2, generator=seeded(1))


def test_boxes_are_drawn_as_torchvision_draws_them(generator):
    scale = (0.08, 1.0)
    ratio = (3 / 4, 4 / 3)
    ours = common.random_boxes(MANY, S, S, scale, ratio, generator)
    torch.manual_seed(0)
    image = torch.empty(3, S, S)
    theirs = [RandomResizedCrop.get_params(image, scale, ratio) for _ in range(MANY // 4)]
    theirs = torch.tensor(theirs).float()
    assert torch.equal(ours, ours.round())
    assert ours.min() >= 0
    assert (ours[:, :2] + ours[:, 2:]).max() <= S
    top, left, height, width = ours.unbind(1)
    their_top, their_left, their_height, their_width = theirs.unbind(1)
    assert_same_distribution(height * width, their_height * their_width)
    assert_same_distribution(width / height, their_width / their_height)
    assert_same_distribution(top, their_top)
    assert_same_distribution(left, their_left)


def test_a_box_that_never_fits_is_the_whole_image(generator):
    boxes = common.random_boxes(50, S, S, (1.0, 1.0), (2.0, 3.0), generator)
    assert torch.equal(boxes, torch.tensor([0.0, 0, S, S]).expand(50, 4))


def test_every_image_has_a_crop_and_a_flip_of_its_own(monkeypatch, generator):
    calls = spy(monkeypatch, common, "resized_crop")
    common.random_resized_crop(small(2000), 2, generator, scale=(0.2, 1.0), flip=0.3)
    ((_, boxes, size, flip),) = calls
    assert size == 2
    assert len(boxes.unique(dim=0)) > 1
    assert abs(flip.float().mean() - 0.3) < 0.05


def test_color_jitter_draws_as_torchvision_does(monkeypatch, generator):
    calls = spy(monkeypatch, common, "color_jitter")
    common.random_color_jitter(small(MANY), generator, 0.4, 1.2, 0.8, 0.2, p=0.75)
    ((_, factors, order),) = calls
    neutral = (factors == torch.tensor([1.0, 1, 1, 0])).all(1)
    assert abs(neutral.float().mean() - 0.25) < 0.02
    ranges = [(0.6, 1.4), (0, 2.2), (0.2, 1.8), (-0.2, 0.2)]
    for drawn, (low, high) in zip(factors[~neutral].T, ranges, strict=True):
        assert low <= drawn.min() and drawn.max() <= high
        assert_same_distribution(drawn, torch.linspace(low, high, 5000))
    assert (torch.corrcoef(factors[~neutral].T) - torch.eye(4)).abs().max() < 0.05
    permutations, counts = order.unique(dim=0, return_counts=True)
    assert len(permutations) == 24
    assert (counts / MANY - 1 / 24).abs().max() < 0.01


@pytest.mark.parametrize("random", [common.random_grayscale, common.random_solarize])
def test_probabilities(generator, random):
    images = small(MANY) + torch.arange(3).view(3, 1, 1)  # neither gray nor dark
    changed = (random(images, generator, p=0.3) != images).flatten(1).any(1)
    assert abs(changed.float().mean() - 0.3) < 0.02


def test_blur_draws_sigma_uniformly(monkeypatch, generator):
    calls = spy(monkeypatch, common, "gaussian_blur")
    common.random_gaussian_blur(torch.rand(5000, 3, 4, 4), generator, p=0.4)
    ((_, sigma, kernel_size),) = calls
    blurred = sigma[sigma > 0.01]
    assert abs(len(blurred) / 5000 - 0.4) < 0.03
    assert kernel_size == 3
    assert_same_distribution(blurred, torch.linspace(0.1, 2.0, 5000))


@pytest.mark.parametrize("side, kernel_size", [(4, 3), (32, 3), (40, 5), (96, 9), (224, 23)])
def test_the_kernel_is_a_tenth_of_the_side(monkeypatch, generator, side, kernel_size):
    calls = spy(monkeypatch, common, "gaussian_blur")
    common.random_gaussian_blur(torch.rand(1, 3, side, side), generator)
    assert calls[0][2] == kernel_size


DRAWS = [
    lambda x, g: common.random_resized_crop(x, 9, g),
    lambda x, g: common.random_crop(x, 2, g),
    lambda x, g: common.random_color_jitter(x, g, 0.4, 0.4, 0.4, 0.1),
    lambda x, g: common.random_grayscale(x, g, p=0.5),
    lambda x, g: common.random_gaussian_blur(x, g),
    lambda x, g: common.random_solarize(x, g, p=0.5),
]


@pytest.mark.parametrize("draw", DRAWS)
def test_a_seed_fixes_every_operator(draw):
    images = torch.rand(8, 3, 9, 9, generator=seeded(1))
    first = draw(images, seeded(0))
    assert torch.equal(first, draw(images, seeded(0)))
    assert not torch.equal(first, draw(images, seeded(1)))
