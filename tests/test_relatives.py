"""The relatives on rotnet.py and mae.py: their parts against the papers', and every file as it is run."""

import itertools
import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import rotnet
from relatives import colorization, inpainting, jigsaw, relative_patch, simmim

ROOT = Path(__file__).parent.parent
PARENTS = {
    "mae": ["simmim"],
    "rotnet": ["colorization", "inpainting", "jigsaw", "relative_patch"],
}
PARENT = {name: parent for parent, names in PARENTS.items() for name in names}
FIGURES = dict(colorization="colors", inpainting="painted", jigsaw="puzzles", relative_patch="positions")
FIGURES = {name: {f"{figure}.png"} for name, figure in FIGURES.items()} | {"simmim": {"reconstruction.png"}}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uint8_images(N, S, seed=0):
    return torch.randint(256, (N, 3, S, S), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def arguments(relative, *words):
    """Args of a relative, whose parser is its parent's."""
    with pytest.MonkeyPatch.context() as patch:
        parent = sys.modules[relative.Args.__mro__[1].__module__]
        patch.setattr(parent, "Args", relative.Args)
        return parent.parse_args(["--encoder", "small", *words])


# ----------------------------------------------------------------------------------------------------------------------
# On mae.py
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "ratio"), [(8, 0.6), (8, 0.5), (7, 0.6)])
def test_simmim_masks_whole_blocks(side, ratio):
    noise = torch.rand(5, side**2, generator=torch.Generator().manual_seed(0))
    mask = simmim.block_masking(noise, ratio).unflatten(1, (side, side))
    blocks = mask[:, ::2, ::2]
    assert torch.equal(mask, blocks.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :side, :side])
    assert (blocks.flatten(1).sum(1) == math.ceil(ratio * blocks[0].numel())).all()
    assert not torch.equal(mask[0], mask[1])


def test_simmim_sees_nothing_of_masked_patches_and_is_measured_on_them_alone():
    torch.manual_seed(0)
    model, noise = simmim.SimMIM(16, 4, 24, 2, 3), torch.rand(2, 16)
    x = torch.rand(2, 3, 16, 16)
    prediction, mask = model(x, 0.5, noise)
    hidden = mask.unflatten(1, (4, 4)).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    assert torch.equal(prediction, model(torch.where(hidden, 7.0, x), 0.5, noise)[0])
    assert not torch.equal(prediction, model(torch.where(hidden, x, 7.0), 0.5, noise)[0])
    targets, mask = draw(2, 16, 48), mask.double()
    errors = [(targets[i, j] - 1).abs().mean().item() for i in range(2) for j in range(16) if mask[i, j]]
    assert simmim.l1_loss(torch.ones(2, 16, 48), targets, mask).item() == pytest.approx(sum(errors) / len(errors))


# ----------------------------------------------------------------------------------------------------------------------
# On rotnet.py: other questions about one image
# ----------------------------------------------------------------------------------------------------------------------


def coordinates(N, S):
    """Images whose first two channels are the row and the column of each pixel."""
    line = torch.arange(S).float()
    return torch.stack([line[:, None].expand(S, S), line.expand(S, S), torch.zeros(S, S)]).expand(N, -1, -1, -1)


@pytest.mark.parametrize(("gap", "jitter"), [(0.0625, 0.03125), (0, 0)])
def test_patches_lie_where_their_number_says(gap, jitter):
    args = arguments(relative_patch, "--gap", str(gap), "--jitter", str(jitter))
    x = relative_patch.cut_patches(coordinates(50, 32), args, torch.Generator().manual_seed(0))
    assert x.shape == (450, 3, 8, 8)
    top, left = x.unflatten(0, (50, 9))[:, :, :2, 0, 0].unbind(2)  # (50, 9)
    assert x.unflatten(0, (50, 9))[:, :, :2].min() >= 0 and x[:, :2].max() <= 31  # within the image
    expected = [(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1) if (r, c) != (0, 0)]
    step, most = 8 + 32 * gap, 2 * 32 * jitter
    for y, (r, c) in enumerate(expected, 1):
        down, right = top[:, y] - top[:, 0], left[:, y] - left[:, 0]
        assert (down - r * step).abs().max() == most and (right - c * step).abs().max() == most
    assert len(top[:, 0].unique()) > 1  # the grid moves


def test_a_network_that_sees_positions_answers_all_questions():
    args = arguments(relative_patch)
    images = (8 * coordinates(20, 32)).byte()

    def network(x):  # logits of the positions, from rows and columns
        rows, columns = x.unflatten(0, (-1, 9))[:, :, :2].unbind(2)  # (N, 9, p, p) each
        down, right = (y.mean((2, 3)) - y[:, :1].mean((2, 3)) for y in (rows, columns))  # of each patch, from the first
        right = right * (columns[..., -1] - columns[..., 0]).mean(2).sign()  # some images are mirrored
        step = torch.stack([down, right], 2)[:, 1:] / rows[0, 1:].sub(rows[0, :1]).mean((1, 2)).abs().max()
        places = torch.tensor([(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1) if (r, c) != (0, 0)])
        return -(step[:, :, None] - places).norm(dim=3).flatten(0, 1)

    terms = relative_patch.training_step(network, images, args, torch.Generator().manual_seed(0))
    assert terms["position"] == 1

    model, seen = relative_patch.PatchNetwork(args).eval(), []
    model.pool, model.encoder, model.classifier = nn.Flatten(), nn.Identity(), nn.Module()
    model.classifier.forward = lambda pairs: seen.append(pairs) or pairs
    model(torch.arange(18.0)[:, None, None, None])
    assert seen[0].tolist() == [[first, first + y] for first in (0, 9) for y in range(1, 9)]


def test_a_network_that_knows_permutations_answers_all_questions():
    network = lambda tiles, numbers: F.one_hot(numbers.flatten(), 100).float()  # noqa: E731
    terms = jigsaw.training_step(network, uint8_images(5, 32), arguments(jigsaw), torch.Generator().manual_seed(0))
    assert terms["permutation"] == 1 and terms["loss"].item() == pytest.approx(math.log(99 / math.e + 1))


def test_permutations_are_all_different_and_far_apart():
    chosen = jigsaw.far_apart(100)
    assert chosen[0].tolist() == list(range(9)) and (chosen.sort(1).values == torch.arange(9)).all()
    distances = torch.stack([(a != b).sum() for a, b in itertools.combinations(chosen, 2)])
    assert distances.min() >= 6 and distances.float().mean() > 7.9
    every = torch.tensor(list(itertools.permutations(range(9))))
    best = (every[:, None] != chosen[:15]).sum(2).amin(1).max()
    assert (chosen[15] != chosen[:15]).sum(1).min() == best


def test_tiles_are_in_reading_order_and_shuffled_as_the_permutation_says():
    args = arguments(jigsaw)
    x = jigsaw.cut_tiles(coordinates(50, 32), torch.Generator().manual_seed(0)).unflatten(0, (50, 9))
    cells = ((x[:, :, :2, 4, 4] - 1) // 10).clamp(0, 2)  # of pixels in the middle of a tile of 8
    assert torch.equal(cells.mean(0).round(), torch.cartesian_prod(torch.arange(3.0), torch.arange(3.0)))
    assert x[:, :, :2].min() >= 0 and x[:, :, :2].max() <= 31 and len(x[:, 0, 0, 0, 0].unique()) > 1

    model = jigsaw.JigsawNetwork(args).eval()
    seen = []
    model.pool, model.encoder = nn.Flatten(), nn.Identity()
    model.classifier = nn.Module()
    model.classifier.forward = lambda h: seen.append(h) or h
    tiles = torch.arange(18.0)[:, None, None, None]  # of two images, named by their number
    model(tiles, torch.tensor([[0, 3], [5, 0]]))
    order = model.permutations
    assert torch.equal(seen[0], torch.stack([order[0], order[3], 9 + order[5], 9 + order[0]]).float())


def test_tiles_lose_their_color_and_contrast():
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y, dim = jigsaw.standardize(x), jigsaw.standardize(0.2 * x + 0.3)
    assert dim.mean((2, 3)).abs().max() < 1e-5 and (dim - y).abs().max() < 0.2 * y.abs().max()
    assert jigsaw.standardize(torch.full((1, 3, 8, 8), 0.7)).abs().max() < 1e-3  # no noise is blown up


def test_colors_are_found_again():
    colors = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    classes = colorization.color_classes(colors)
    p = F.one_hot(classes, colorization.BINS**2).permute(0, 3, 1, 2).float()
    painted = colorization.paint(common.luma(colors), p)
    inside = (painted > 0) & (painted < 1)
    assert (painted - colors)[inside].abs().max() < 1.772 / colorization.BINS + 0.01 and inside.float().mean() > 0.8
    gray = torch.full((1, 3, 2, 2), 0.4)
    assert (colorization.color_classes(gray) == 40).all()  # the middle of 81
    p = torch.zeros(1, 81, 2, 2).index_fill(1, torch.tensor(40), 1)
    assert torch.allclose(colorization.paint(common.luma(gray), p), gray, atol=1e-3)


def test_color_loss_weighs_rare_colors_more():
    logits, classes = draw(2, 3, 2, 2), torch.tensor([[[0, 0], [0, 0]], [[0, 2], [2, 0]]])
    p = [6 / 8, 0, 2 / 8]
    w = [1 / (0.5 * p[q] + 0.5 / 3) for q in range(3)]
    places = [(n, i, j) for n in range(2) for i in range(2) for j in range(2)]
    total = sum(w[classes[s]] for s in places)
    expected = sum(
        -w[classes[n, i, j]] * logits[n, :, i, j].log_softmax(0)[classes[n, i, j]].item() for n, i, j in places
    )
    assert colorization.color_loss(logits.float(), classes).item() == pytest.approx(expected / total, rel=1e-5)


def test_the_colorizer_sees_no_color():
    torch.manual_seed(0)
    model, x = colorization.Colorizer(arguments(colorization)).eval(), torch.rand(2, 3, 16, 16)
    gray = common.luma(x).expand(-1, 3, -1, -1)
    y, noise = model(x), (model(x) - model(gray)).abs().max()
    assert (y - model(x.flip(3))).abs().max() > 100 * noise


def test_holes_are_squares_at_random_places():
    masks = inpainting.random_hole(torch.zeros(200, 3, 16, 16), torch.Generator().manual_seed(0))
    assert masks.shape == (200, 1, 16, 16) and (masks.sum((1, 2, 3)) == 64).all()
    rows, columns = masks.amax(3)[:, 0], masks.amax(2)[:, 0]
    assert (rows.sum(1) == 8).all() and (columns.sum(1) == 8).all()
    assert len(rows.argmax(1).unique()) == len(columns.argmax(1).unique()) == 9  # all places


def test_inpainting_losses_are_the_lectures_and_the_networks_are_opposed():
    args = arguments(inpainting, "--adversarial", "0.5", "--shift", "0")
    torch.manual_seed(0)
    model, images = inpainting.ContextEncoder(args).eval(), uint8_images(3, 16)
    painters = [*model.encoder.parameters(), *model.decoder.parameters()]
    critics = list(model.discriminator.parameters())
    terms = inpainting.training_step(model, images, args, torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(terms["loss"], painters + critics)

    generator = torch.Generator().manual_seed(1)
    x = common.normalize(rotnet.shifted(images, args, generator))
    mask = inpainting.random_hole(x, generator)
    painted = model.decoder(model.encoder((1 - mask) * x))
    reconstruction = ((mask * (x - painted)) ** 2).sum() / (3 * mask.sum())
    D = [model.discriminator(y).sigmoid() for y in (x, painted)]
    adversarial = torch.cat([D[0].log(), (1 - D[1]).log()]).sum() / 3
    assert terms["reconstruction"].item() == pytest.approx(reconstruction.item(), rel=1e-5)
    assert terms["adversarial"].item() == pytest.approx(adversarial.item(), rel=1e-4)
    lecture = (
        reconstruction + 0.5 * adversarial
    )  # the painter minimizes it, the discriminator maximizes its second term
    expected = torch.autograd.grad(lecture, painters, retain_graph=True) + torch.autograd.grad(-adversarial, critics)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# The files
# ----------------------------------------------------------------------------------------------------------------------


def start(name, *words):
    """A relative as a person starts it, with a parent of its own: what it replaces there ends with it."""
    with pytest.MonkeyPatch.context() as patch:
        for parent in ("mae", "rotnet"):
            patch.delitem(sys.modules, parent, raising=False)
        patch.setattr(sys, "argv", [f"relatives/{name}.py", *map(str, words)])
        runpy.run_path(str(ROOT / f"relatives/{name}.py"), run_name="__main__")


@pytest.mark.parametrize("name", PARENT)
def test_a_run_leaves_what_its_parents_leaves_and_a_resumed_one_ends_where_an_unbroken_one_does(
    name, tiny_shapes, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    own = ["--classifier-epochs", 1] if PARENT[name] == "rotnet" else []
    words = ["--dataset", tiny_shapes, "--encoder", "small", "--batch-size", 32, *own]
    start(name, *words, "--epochs", 2)
    folder = tmp_path / f"runs/{name}-tiny-seed0"
    figures = FIGURES[name]
    files = {"args.json", "metrics.jsonl", "summary.json", "checkpoint.pt", "encoder.pt", ".lock"}
    assert {path.name for path in folder.iterdir()} == files | figures
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["method"] == name and summary["command"].startswith(f"python relatives/{name}.py --dataset ")
    assert {"knn", "linear_probe"} <= summary["untrained"].keys() & summary["trained"].keys()
    assert [line["epoch"] for line in summary["history"]] == [1, 2]
    assert f"\n{name} on {tiny_shapes}: 96 images" in capsys.readouterr().out
    if PARENT[name] == "rotnet":
        assert summary["pretext_task"].keys() == summary["history"][0].keys() - {"epoch", "seconds", "knn"}

    class Killed(BaseException):
        pass

    save, calls = torch.save, []

    def save_once(*args):
        calls.append(args)
        if len(calls) == 2:  # the checkpoint of the second epoch
            raise Killed
        save(*args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(torch, "save", save_once)
        start(name, *words, "--epochs", 2, "--out", "broken")
    start(name, "--resume", "broken")
    states = [torch.load(f / "checkpoint.pt", weights_only=True)["model"] for f in (folder, tmp_path / "broken")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("simmim", ["--decoder-depth", "2"], "simmim.py: error: unrecognized arguments: --decoder-depth 2"),
        ("relative_patch", ["--gap", "0.1"], "--gap 0.1: must be from 0 to 0.0625"),
        ("jigsaw", ["--resume", "nothing"], "--resume nothing: there is no run of jigsaw.py in this folder"),
        ("colorization", ["--batch-size", "5000"], "--batch-size 5000: at most the 4096 images"),
        ("inpainting", ["--adversarial", "-1"], "--adversarial -1.0: must be from 0 to inf"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, capsys, name, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        start(name, *words)
    assert caught.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["simmim", "jigsaw", "inpainting"])
def test_two_processes_train_one_network(two_processes, name):
    folder, printed = two_processes
    models = [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(value, models[1][key]) for key, value in models[0].items())
    assert printed[0].count(f"\n{name} on") == 1 and printed[1] == "" and (folder / name / "summary.json").exists()
