"""The relatives on rotnet.py: their parts against the papers', and every file as it is run."""

import functools
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    FILES,
    assert_same,
    assert_same_in_both,
    files,
    killed_at,
    load,
    train_and_keep,
)
from PIL import Image
from torch import nn

import common
import rotnet
from relatives import colorization, inpainting, jigsaw, relative_patch

RELATIVES = {
    "colorization": colorization,
    "inpainting": inpainting,
    "jigsaw": jigsaw,
    "relative_patch": relative_patch,
}
PARTS = {
    "colorization": (colorization.Colorizer, colorization.color_loss, colorization.save_colors),
    "inpainting": (
        inpainting.ContextEncoder,
        inpainting.inpainting_loss,
        inpainting.save_painted,
    ),
    "jigsaw": (jigsaw.JigsawNetwork, jigsaw.permutation_loss, jigsaw.save_puzzles),
    "relative_patch": (
        relative_patch.PatchNetwork,
        relative_patch.position_loss,
        relative_patch.save_positions,
    ),
}
FIGURES = {
    "colorization": "colors.png",
    "inpainting": "painted.png",
    "jigsaw": "puzzles.png",
    "relative_patch": "positions.png",
}
TERMS = {
    "colorization": {"loss", "color"},
    "inpainting": {"loss", "reconstruction", "adversarial", "sharpness"},
    "jigsaw": {"loss", "permutation"},
    "relative_patch": {"loss", "position"},
}


@pytest.fixture(scope="module", autouse=True)
def permutations_once():
    """They are the same for every network, and take a second."""
    with pytest.MonkeyPatch.context() as patch:
        once = functools.cache(jigsaw.distant_permutations)
        patch.setattr(jigsaw, "distant_permutations", once)
        yield


def parts(name):
    """What a relative hands over."""
    names = "Model", "pretext_loss", "save_predictions"
    return dict(zip(names, PARTS[name], strict=True))


def shapes_of(name):
    return getattr(RELATIVES[name], "SHAPES", rotnet.SHAPES)


def arguments(name, *flags):
    relative = RELATIVES[name]
    flags = ["--encoder", "small", *flags] if "--resume" not in flags else flags
    return rotnet.parse_args(
        list(map(str, flags)), relative.Args, relative.__doc__, shapes_of(name)
    )


def words(data, out, *flags):
    """A run on a few shapes, in two short epochs."""
    small = ["--epochs", "2", "--batch-size", "32", "--classifier-epochs", "1"]
    return ["--dataset", str(data), *small, "--out", str(out), *map(str, flags)]


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def uint8_images(N, S, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (N, 3, S, S), generator=generator, dtype=torch.uint8)


def coordinates(N, S):
    """Images whose first two channels are the row and the column of each pixel."""
    line = torch.arange(S).float()
    row = line[:, None].expand(S, S)
    column = line.expand(S, S)
    return torch.stack([row, column, torch.zeros(S, S)]).expand(N, -1, -1, -1)


AROUND = [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]


class Recorded(nn.Module):
    """The identity, which keeps its inputs."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return x


# ==================================================================================================
# Relative patches
# ==================================================================================================


@pytest.mark.parametrize(("gap", "jitter"), [(0.0625, 0.03125), (0, 0)])
def test_patches_lie_where_their_number_says(gap, jitter):
    args = arguments("relative_patch", "--gap", gap, "--jitter", jitter)
    generator = torch.Generator().manual_seed(0)
    x = relative_patch.cut_patches(coordinates(50, 32), args, generator)
    assert x.shape == (450, 3, 8, 8)
    assert x[:, :2].min() >= 0
    assert x[:, :2].max() <= 31  # within the image
    top, left = x.unflatten(0, (50, 9))[:, :, :2, 0, 0].unbind(2)  # (50, 9)
    step = 8 + 32 * gap
    most = 2 * 32 * jitter
    for y, (row, column) in enumerate(AROUND, 1):
        down = top[:, y] - top[:, 0]
        right = left[:, y] - left[:, 0]
        assert (down - row * step).abs().max() == most
        assert (right - column * step).abs().max() == most
    assert len(top[:, 0].unique()) > 1  # the grid moves


def test_a_network_that_sees_places_predicts_all_positions():
    args = arguments("relative_patch")
    images = (8 * coordinates(20, 32)).byte()

    def network(x):  # logits of the positions, from rows and columns
        rows, columns = x.unflatten(0, (-1, 9))[:, :, :2].unbind(2)  # (N, 9, p, p) each
        down = rows.mean((2, 3)) - rows[:, :1].mean((2, 3))  # of each patch, from the first
        right = columns.mean((2, 3)) - columns[:, :1].mean((2, 3))
        mirrored = (columns[..., -1] - columns[..., 0]).mean(2).sign()
        scale = rows[0, 1:].sub(rows[0, :1]).mean((1, 2)).abs().max()
        step = torch.stack([down, right * mirrored], dim=2)[:, 1:] / scale
        return -(step[:, :, None] - torch.tensor(AROUND)).norm(dim=3).flatten(0, 1)

    generator = torch.Generator().manual_seed(0)
    terms = relative_patch.position_loss(network, images, args, generator)
    assert terms["position"] == 1


def test_every_patch_is_compared_with_the_middle_one():
    model = relative_patch.PatchNetwork(arguments("relative_patch")).eval()
    model.encoder = nn.Identity()
    model.pool = nn.Flatten()
    model.classifier = Recorded()
    model(torch.arange(18.0)[:, None, None, None])
    expected = [[first, first + y] for first in (0, 9) for y in range(1, 9)]
    assert model.classifier.seen[0].tolist() == expected


def test_a_patch_has_a_green_frame_if_its_position_is_found(tmp_path, monkeypatch):
    sheets = []
    monkeypatch.setattr(rotnet, "save_sheet", lambda _, blocks: sheets.append(blocks))
    args = arguments("relative_patch", "--gap", 0, "--jitter", 0)
    images = uint8_images(2, 32)
    patches = relative_patch.cut_patches(images / 255, args, torch.Generator().manual_seed(0))
    patches = patches.unflatten(0, (2, 9))
    predicted = torch.tensor([0, 2, 1, 3, 4, 5, 6, 7]).repeat(2)  # 2 and 3 are exchanged

    def model(_):
        return F.one_hot(predicted, 8).float()

    relative_patch.save_positions(tmp_path, model, images, args)
    ((whole, squares),) = sheets[0].values()
    assert torch.equal(whole[:, :, 0, 0], images[:, :, 0, 0] / 255)
    for square, cut in zip(squares, patches, strict=True):
        tiles = square[:, 3:-3, 3:-3].unfold(1, 12, 12).unfold(2, 12, 12)[..., 1:-1, 1:-1]
        for y, (row, column) in enumerate(relative_patch.GRID):
            tile = tiles[:, row, column]
            assert torch.equal(tile[:, 1:-1, 1:-1], cut[y])
            red, green, blue = tile[:, 0, 0].tolist()
            if y == 0:
                assert red == green == blue == 1
            else:
                assert (blue > red) == (y not in (2, 3))


def test_nine_tiles_make_an_image():
    tiles = torch.arange(18.0).view(2, 9, 1, 1, 1).expand(-1, -1, 3, 2, 2)
    sheet = relative_patch.assemble(tiles)
    assert sheet.shape == (2, 3, 18, 18)
    assert sheet[1, 0, 4:-4:4, 4:-4:4].tolist() == [[9, 10, 11], [12, 13, 14], [15, 16, 17]]
    assert (sheet[:, :, 0] == 1).all()


# ==================================================================================================
# Jigsaw puzzles
# ==================================================================================================


def test_a_network_that_knows_permutations_predicts_them_all():
    def network(tiles, numbers):
        return F.one_hot(numbers.flatten(), 100).float()

    generator = torch.Generator().manual_seed(0)
    images = uint8_images(5, 32)
    terms = jigsaw.permutation_loss(network, images, arguments("jigsaw"), generator)
    assert terms["permutation"] == 1
    assert terms["loss"].item() == pytest.approx(math.log(99 / math.e + 1))


def test_permutations_are_all_different_and_far_apart():
    chosen = jigsaw.distant_permutations(100)
    assert chosen[0].tolist() == list(range(9))
    assert (chosen.sort(1).values == torch.arange(9)).all()
    distances = torch.stack([(a != b).sum() for a, b in itertools.combinations(chosen, 2)])
    assert distances.min() >= 6
    assert distances.float().mean() > 7.9
    every = torch.tensor(list(itertools.permutations(range(9))))
    best = (every[:, None] != chosen[:15]).sum(2).amin(1).max()
    assert (chosen[15] != chosen[:15]).sum(1).min() == best


def test_tiles_are_in_reading_order_anywhere_in_their_cells():
    generator = torch.Generator().manual_seed(0)
    x = jigsaw.cut_tiles(coordinates(50, 32), generator).unflatten(0, (50, 9))
    cells = ((x[:, :, :2, 4, 4] - 1) // 10).clamp(0, 2)  # of pixels in the middle of a tile of 8
    line = torch.arange(3.0)
    assert torch.equal(cells.mean(0).round(), torch.cartesian_prod(line, line))
    assert x[:, :, :2].min() >= 0
    assert x[:, :, :2].max() <= 31
    assert len(x[:, 0, 0, 0, 0].unique()) > 1


def test_tiles_are_shuffled_as_the_permutation_says():
    model = jigsaw.JigsawNetwork(arguments("jigsaw")).eval()
    model.encoder = nn.Identity()
    model.pool = nn.Flatten()
    model.classifier = Recorded()
    tiles = torch.arange(18.0)[:, None, None, None]  # of two images, named by their number
    model(tiles, torch.tensor([[0, 3], [5, 0]]))
    order = model.permutations
    expected = torch.stack([order[0], order[3], 9 + order[5], 9 + order[0]])
    assert torch.equal(model.classifier.seen[0], expected.float())


def test_tiles_lose_their_color_and_contrast():
    standardize = jigsaw.Standardize()
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y = standardize(x)
    dim = standardize(0.2 * x + 0.3)
    assert dim.mean((2, 3)).abs().max() < 1e-5
    assert (dim - y).abs().max() < 0.2 * y.abs().max()
    assert standardize(torch.full((1, 3, 8, 8), 0.7)).abs().max() < 1e-3  # blows up no noise


def test_the_probes_of_jigsaw_standardize_too():
    torch.manual_seed(0)
    encoder = jigsaw.JigsawNetwork(arguments("jigsaw")).encoder
    images = uint8_images(4, 32)
    h = rotnet.features(rotnet.pooled(encoder, 1), images)
    dim = rotnet.features(rotnet.pooled(encoder, 1), 60 + images // 2)
    assert (h - dim).norm() < 0.1 * h.norm()
    plain, _ = rotnet.build_nin("small")
    h = rotnet.features(rotnet.pooled(plain, 1), images)
    dim = rotnet.features(rotnet.pooled(plain, 1), 60 + images // 2)
    assert (h - dim).norm() > 0.2 * h.norm()


def test_a_solved_puzzle_is_the_image_in_order(tmp_path, monkeypatch):
    sheets = []
    monkeypatch.setattr(rotnet, "save_sheet", lambda _, blocks: sheets.append(blocks))
    model = jigsaw.JigsawNetwork(arguments("jigsaw"))
    images = uint8_images(2, 32)
    tiles = jigsaw.cut_tiles(images / 255, torch.Generator().manual_seed(0)).unflatten(0, (2, 9))
    for error in (0, 1):  # puzzles 1 and 2, then taken for 2 and 3
        monkeypatch.setattr(
            model, "forward", lambda _, n, error=error: F.one_hot(n[:, 0] + error, 100).float()
        )
        jigsaw.save_puzzles(tmp_path, model, images, arguments("jigsaw"))
    ((shuffled, solved),), ((_, wrong),) = [sheet.values() for sheet in sheets]
    white = torch.ones(2, 9, 3)
    blue = torch.tensor([0.0, 0.45, 0.7]).expand(2, 9, 3)
    assert torch.equal(solved, relative_patch.assemble(relative_patch.framed(tiles, blue)))
    assert not torch.equal(shuffled, solved)
    order = [model.permutations[number] for number in (1, 2)]
    expected = torch.stack([cut[o] for cut, o in zip(tiles, order, strict=True)])
    assert torch.equal(shuffled, relative_patch.assemble(relative_patch.framed(expected, white)))
    orange = (wrong != solved).any(1)[:, 4:-4:12, 4:-4:12]  # the first pixel of each frame
    places = [model.permutations[n][model.permutations[n + 1].argsort()] for n in (1, 2)]
    for found, place in zip(orange, places, strict=True):
        assert torch.equal(found.flatten(), place != torch.arange(9))


# ==================================================================================================
# Colorization
# ==================================================================================================


def test_colors_are_found_again():
    colors = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    classes = colorization.color_classes(colors)
    p = F.one_hot(classes, colorization.BINS**2).permute(0, 3, 1, 2).float()
    painted = colorization.paint(common.luma(colors), p)
    inside = (painted > 0) & (painted < 1)
    assert inside.float().mean() > 0.8
    assert (painted - colors)[inside].abs().max() < 1.772 / colorization.BINS + 0.01


def test_gray_is_the_class_in_the_middle():
    gray = torch.full((1, 3, 2, 2), 0.4)
    assert (colorization.color_classes(gray) == 40).all()  # of 81
    p = torch.zeros(1, 81, 2, 2).index_fill(1, torch.tensor(40), 1)
    painted = colorization.paint(common.luma(gray), p)
    torch.testing.assert_close(painted, gray, atol=1e-3, rtol=0)


def test_color_loss_weighs_rare_colors_more():
    logits = draw(2, 3, 2, 2)
    classes = torch.tensor([[[0, 0], [0, 0]], [[0, 2], [2, 0]]])
    p = [6 / 8, 0, 2 / 8]
    w = [1 / (0.5 * p[q] + 0.5 / 3) for q in range(3)]
    loss = 0
    total = 0
    for n, i, j in itertools.product(range(2), repeat=3):
        q = classes[n, i, j]
        loss -= w[q] * logits[n, :, i, j].log_softmax(0)[q].item()
        total += w[q]
    found = colorization.weighted_cross_entropy(logits.float(), classes)
    assert found.item() == pytest.approx(loss / total, rel=1e-5)


def test_the_colorizer_sees_no_color():
    torch.manual_seed(0)
    model = colorization.Colorizer(arguments("colorization")).eval()
    x = torch.rand(2, 3, 16, 16)
    y = model(x)
    noise = (y - model(common.luma(x).expand(-1, 3, -1, -1))).abs().max()
    assert (y - model(x.flip(3))).abs().max() > 100 * noise


# ==================================================================================================
# Inpainting
# ==================================================================================================


def test_holes_are_squares_at_random_places():
    generator = torch.Generator().manual_seed(0)
    masks = inpainting.random_hole(torch.zeros(200, 3, 16, 16), generator)
    assert masks.shape == (200, 1, 16, 16)
    assert (masks.sum((1, 2, 3)) == 64).all()
    for lines in (masks.amax(3)[:, 0], masks.amax(2)[:, 0]):
        assert (lines.sum(1) == 8).all()
        assert len(lines.argmax(1).unique()) == 9  # all places


def test_only_the_hole_is_painted():
    torch.manual_seed(0)
    model = inpainting.ContextEncoder(arguments("inpainting")).eval()
    x = torch.rand(3, 3, 16, 16)
    mask = inpainting.random_hole(x, torch.Generator().manual_seed(0))
    filled, *_ = model(x, mask)
    hole = mask.expand_as(x) == 1
    assert torch.equal(filled[~hole], x[~hole])
    assert not torch.isclose(filled[hole], x[hole]).any()
    other = torch.where(hole, 7.0, x)
    assert torch.equal(model(other, mask)[0], filled)  # it has not seen what was there


def inpainting_gradients(model, terms):
    painters = [*model.encoder.parameters(), *model.decoder.parameters()]
    critics = list(model.discriminator.parameters())
    gradients = torch.autograd.grad(terms["loss"], painters + critics)
    return painters, critics, gradients


def test_inpainting_losses_are_the_papers():
    args = arguments("inpainting", "--adversarial", "0.5", "--shift", "0")
    torch.manual_seed(0)
    model = inpainting.ContextEncoder(args).eval()
    model.discriminator[-1].bias.data -= 2  # sure that all are fake
    images = uint8_images(3, 16)
    terms = inpainting.inpainting_loss(model, images, args, torch.Generator().manual_seed(1))
    painters, critics, gradients = inpainting_gradients(model, terms)

    generator = torch.Generator().manual_seed(1)
    x = common.normalize(rotnet.shifted(images, args, generator))
    mask = inpainting.random_hole(x, generator)
    painted = model.decoder(model.encoder((1 - mask) * x))
    filled = mask * painted + (1 - mask) * x
    reconstruction = ((mask * (x - painted)) ** 2).sum() / (3 * mask.sum())
    real = model.discriminator(x).sigmoid()
    fake = model.discriminator(filled).sigmoid()
    adversarial = (real.log() + (1 - fake).log()).mean()
    assert terms["reconstruction"].item() == pytest.approx(reconstruction.item(), rel=1e-5)
    assert terms["adversarial"].item() == pytest.approx(adversarial.item(), rel=1e-4)
    sharp = inpainting.total_variation(filled, mask) / inpainting.total_variation(x, mask)
    assert terms["sharpness"].item() == pytest.approx(sharp.item(), rel=1e-4)
    painter = reconstruction - 0.5 * fake.log().mean()
    expected = torch.autograd.grad(painter, painters, retain_graph=True)
    expected += torch.autograd.grad(-adversarial, critics)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_without_an_adversary_the_painter_only_reconstructs():
    torch.manual_seed(0)
    model = inpainting.ContextEncoder(arguments("inpainting")).eval()
    images = uint8_images(3, 16)
    found = []
    for weight in (0, 100):
        args = arguments("inpainting", "--adversarial", weight)
        terms = inpainting.inpainting_loss(model, images, args, torch.Generator().manual_seed(1))
        painters, _, gradients = inpainting_gradients(model, terms)
        found.append(gradients[: len(painters)])
        if weight == 0:
            terms = inpainting.inpainting_loss(
                model, images, args, torch.Generator().manual_seed(1)
            )
            expected = torch.autograd.grad(terms["reconstruction"], painters)
    assert_same(found[0], expected)
    assert not torch.allclose(found[1][0], expected[0])


def test_sharpness_is_that_of_the_image_relative_to_the_original():
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mask = inpainting.random_hole(x, torch.Generator().manual_seed(0))
    whole = inpainting.total_variation(x, mask)
    assert inpainting.total_variation(0.5 * x + 2, mask).item() == pytest.approx(whole.item() / 2)
    outside = torch.where(mask == 1, x, 7.0)
    assert inpainting.total_variation(outside, mask) == whole
    naive = 0
    for n in range(4):
        rows, columns = (mask[n, 0] == 1).nonzero().unbind(1)
        hole = x[n, :, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        naive += (hole[:, 1:] - hole[:, :-1]).abs().sum()
        naive += (hole[..., 1:] - hole[..., :-1]).abs().sum()
    assert whole.item() == pytest.approx(naive.item(), rel=1e-5)


# ==================================================================================================
# The files
# ==================================================================================================


@pytest.fixture(scope="module", params=RELATIVES)
def unbroken(request, tiny_shapes, tmp_path_factory):
    """A relative, and the folder of a run of it that nothing has stopped. It is read only."""
    name = request.param
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    rotnet.main(arguments(name, *words(tiny_shapes, folder)), **parts(name))
    return name, folder


def test_a_run_is_rotnets_with_what_is_handed_over(unbroken):
    name, run = unbroken
    assert files(run) == FILES | {FIGURES[name]}
    text = (run / "summary.json").read_text()
    summary = json.loads(text)
    assert summary["method"] == name
    assert summary["command"].startswith(f"python relatives/{name}.py --encoder small --dataset ")
    assert {"knn", "linear_probe"} <= summary["untrained"].keys() & summary["trained"].keys()
    assert "null" not in text
    assert summary["pretext_task"].keys() == TERMS[name]
    for line in summary["history"]:
        assert line.keys() - {"epoch", "seconds", "knn", "rank"} == TERMS[name]
    with Image.open(run / FIGURES[name]) as sheet:
        assert sheet.width > 10 * 50


def test_a_resumed_run_ends_as_an_unbroken_one(unbroken, tiny_shapes, tmp_path, capsys):
    name, folder = unbroken
    run = tmp_path / "run"
    with killed_at(rotnet, "save_epoch", 2):
        rotnet.main(arguments(name, *words(tiny_shapes, run)), **parts(name))
    rotnet.main(arguments(name, "--resume", run), **parts(name))
    assert_same(*[load(f / "checkpoint.pt")["model"] for f in (folder, run)])
    assert f"relatives/{name}.py on {tiny_shapes}: 96 images" in capsys.readouterr().out


def test_a_run_begins_with_the_weights_of_another(unbroken):
    name, run = unbroken
    model = PARTS[name][0](arguments(name, "--init", run / "encoder.pt"))
    assert_same(dict(model.encoder.state_dict()), load(run / "encoder.pt"))


def command_line(name):
    relative = RELATIVES[name]
    run = functools.partial(rotnet.run, relative.Args, relative.__doc__, shapes_of(name))
    return functools.partial(run, **parts(name))


BAD = [
    ("relative_patch", ["--gap", "0.1"], "--gap 0.1: must be from 0 to 0.0625"),
    ("jigsaw", ["--resume", "nothing"], "there is no run of relatives/jigsaw.py in this folder"),
    ("colorization", ["--batch-size", "5000"], "--batch-size 5000: must be from 2 to 4096"),
    ("inpainting", ["--adversarial", "-1"], "--adversarial -1.0: must be at least 0"),
    ("inpainting", ["--adversary", "1"], "did you mean --adversarial?"),
    ("jigsaw", ["--dataset", "nothing"], "relatives/jigsaw.py: error: dataset nothing"),
]


@pytest.mark.parametrize(("name", "flags", "message"), BAD)
def test_bad_input_is_one_line(tmp_path, monkeypatch, error_of, name, flags, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(command_line(name), *flags)
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_its_parent_cannot_be_resumed(unbroken, error_of):
    name, run = unbroken
    line = error_of(rotnet.run, "--resume", run)
    assert "there is no run of rotnet.py in this folder" in line


# ==================================================================================================
# Several processes
# ==================================================================================================


def both_train(data, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rotnet, "train_classifier", lambda *_: 0.5)  # each has its own
        for name in ("jigsaw", "inpainting"):
            flags = words(data, f"{folder}/run-{name}", "--device", "cpu", "--epochs", 1)
            train_and_keep(f"{folder}/{name}", rotnet, arguments(name, *flags), **parts(name))


def test_two_processes_train_one_network(tiny_shapes, tmp_path, in_two_processes):
    first, second = in_two_processes(both_train, tiny_shapes, tmp_path)
    assert second == ""
    for name in ("jigsaw", "inpainting"):
        assert first.count(f"relatives/{name}.py on") == 1
        assert_same_in_both(tmp_path / name)
        assert (tmp_path / f"run-{name}/{FIGURES[name]}").exists()
