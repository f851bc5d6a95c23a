"""Losses of relatives/ against loops from the papers' formulas and against lightly's, and every file as it is run."""

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
from relatives import (
    barlow_twins,
    byol,
    colorization,
    inpainting,
    jigsaw,
    relative_patch,
    simmim,
    simsiam,
    swav,
    vicreg,
)

ROOT = Path(__file__).parent.parent
PARENTS = {
    "simclr": ["barlow_twins", "byol", "simsiam", "swav", "vicreg"],
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


def lightly_loss(name):
    return getattr(pytest.importorskip("lightly.loss", exc_type=ImportError), name)


# ----------------------------------------------------------------------------------------------------------------------
# On simclr.py: other losses over the same two views
# ----------------------------------------------------------------------------------------------------------------------


def test_barlow_twins_loss_is_the_papers_sum():
    z1, z2 = draw(2, 6, 5)
    N, W = z1.shape
    total = 0.0
    for a, b in itertools.product(range(W), repeat=2):
        x, y = z1[:, a] - z1[:, a].mean(), z2[:, b] - z2[:, b].mean()
        deviations = [math.sqrt((v**2).mean().item() + 1e-5) for v in (x, y)]
        C = sum((x[n] * y[n]).item() for n in range(N)) / N / math.prod(deviations)
        total += (1 - C) ** 2 if a == b else 0.005 * C**2
    assert barlow_twins.barlow_twins_loss(z1, z2).item() == pytest.approx(total, rel=1e-9)


def test_barlow_twins_loss_of_the_identity_and_of_a_collapse():
    z = draw(12, 4)
    z = 1e3 * torch.linalg.qr(z - z.mean(0)).Q  # four components that are not correlated
    assert barlow_twins.barlow_twins_loss(z, z).item() == pytest.approx(0, abs=1e-6)
    assert barlow_twins.barlow_twins_loss(torch.ones(6, 5), torch.ones(6, 5)).item() == pytest.approx(5)
    same = z[:, :1].expand(-1, 4)  # every component says the same
    assert barlow_twins.barlow_twins_loss(same, same).item() == pytest.approx(12 * 0.005, rel=1e-4)


def test_vicreg_loss_is_the_papers_sum():
    z1, z2 = 0.7 * draw(2, 6, 5)
    N, W = z1.shape
    total = 25 * sum((z1[n, j] - z2[n, j]).item() ** 2 for n in range(N) for j in range(W)) / (N * W)
    for z in (z1, z2):
        x = [[(z[n, j] - z[:, j].mean()).item() for j in range(W)] for n in range(N)]
        C = [[sum(x[n][i] * x[n][j] for n in range(N)) / (N - 1) for j in range(W)] for i in range(W)]
        v = sum(max(0, 1 - math.sqrt(C[j][j] + 1e-4)) for j in range(W)) / W
        assert v > 0
        total += 25 / 2 * v + sum(C[i][j] ** 2 for i in range(W) for j in range(W) if i != j) / W
    assert vicreg.vicreg_loss(z1, z2).item() == pytest.approx(total, rel=1e-9)


def test_the_variance_of_vicreg_pulls_apart_what_has_collapsed():
    z = draw(6, 5)
    z[:, 0] *= 1e-3
    z.requires_grad_()
    vicreg.variance(z).backward()
    assert (z.grad[:, 0] * (z[:, 0] - z[:, 0].mean()) < 0).all()  # a step against the gradient goes away from the mean


def test_codes_of_swav_are_those_of_the_papers_iteration_and_share_the_prototypes_equally():
    scores = F.normalize(draw(12, 7), dim=1) @ F.normalize(draw(4, 7, seed=1), dim=1).T
    Q = (scores.T / 0.05).exp()  # (K, B), as in the paper's appendix A.1
    Q /= Q.sum()
    for _ in range(3):
        for k in range(4):
            Q[k] /= Q[k].sum() * 4
        for b in range(12):
            Q[:, b] /= Q[:, b].sum() * 12
    assert torch.allclose(swav.sinkhorn(scores, 0.05), 12 * Q.T)
    q = swav.sinkhorn(scores, 0.05, iterations=100)
    assert torch.allclose(q.sum(1), torch.ones(12).double()) and torch.allclose(
        q.sum(0), torch.full((4,), 3.0).double()
    )


def test_swav_loss_is_the_papers_and_codes_get_no_gradient():
    one, two = (0.3 * draw(2, 8, 3)).requires_grad_()
    total = 0.0
    for scores, other in ((one, two), (two, one)):
        q = swav.sinkhorn(other)
        for n in range(8):
            e = (scores[n] / 0.1).exp()
            total -= sum((q[n, k] * (e[k] / e.sum()).log()).item() for k in range(3)) / 8 / 2
    assert swav.swav_loss(one, two, 0.1).item() == pytest.approx(total)
    assert swav.swav_loss(torch.ones(8, 3), torch.ones(8, 3), 0.1).item() == pytest.approx(math.log(3))
    loss, q = swav.swav_loss(one, two, 0.1), swav.sinkhorn(one)
    (gradient,) = torch.autograd.grad(loss, two, retain_graph=True)
    assert torch.allclose(gradient, ((two / 0.1).softmax(1) - q) / 0.1 / 8 / 2)  # of the cross-entropy alone


def test_losses_of_simsiam_and_byol_are_the_papers():
    p1, z1, p2, z2 = draw(4, 5, 6)

    def cosine(a, b):
        return sum((a[n] @ b[n] / a[n].norm() / b[n].norm()).item() for n in range(5)) / 5

    expected = -cosine(p1, z2) / 2 - cosine(p2, z1) / 2
    assert simsiam.simsiam_loss(p1, z1, p2, z2).item() == pytest.approx(expected)
    distances = [
        (F.normalize(p, dim=1) - F.normalize(z, dim=1)).square().sum(1).mean() for p, z in ((p1, z2), (p2, z1))
    ]
    assert byol.byol_loss(p1, z1, p2, z2).item() == pytest.approx(sum(distances).item())


def test_the_losses_equal_lightlys():
    z1, z2 = draw(2, 16, 8).float()
    assert torch.allclose(barlow_twins.barlow_twins_loss(z1, z2), lightly_loss("BarlowTwinsLoss")()(z1, z2))
    assert torch.allclose(vicreg.vicreg_loss(z1, z2), lightly_loss("VICRegLoss")()(z1, z2))
    one, two = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    theirs = lightly_loss("SwaVLoss")(sinkhorn_epsilon=0.02)([one, two], [])
    assert torch.allclose(swav.swav_loss(one, two, 0.1), theirs)
    p1, p2 = draw(2, 16, 8, seed=1).float()
    D = lightly_loss("NegativeCosineSimilarity")()
    assert torch.allclose(simsiam.simsiam_loss(p1, z1, p2, z2), (D(p1, z2) + D(p2, z1)) / 2)
    assert torch.allclose(byol.byol_loss(p1, z1, p2, z2), 4 + 2 * D(p1, z2) + 2 * D(p2, z1))


def arguments(relative, *words):
    """Args of a relative, whose parser is its parent's."""
    with pytest.MonkeyPatch.context() as patch:
        parent = sys.modules[relative.Args.__mro__[1].__module__]
        patch.setattr(parent, "Args", relative.Args)
        return parent.parse_args(["--encoder", "small", *words])


def test_no_gradient_flows_into_what_simsiam_predicts():
    x = torch.rand(4, 3, 16, 16)
    for words, flows in (([], False), (["--no-stop-gradient"], True)):
        model = simsiam.SimSiam(arguments(simsiam, *words))
        p, z = model(x).chunk(2, dim=1)
        assert not torch.equal(p, z)
        weights = model.projector[0].weight
        gradient, of_target = (torch.autograd.grad(y[:, 0].norm(), weights, retain_graph=True)[0] for y in (p, z))
        assert gradient.any() and of_target.any() == flows
    p, z = simsiam.SimSiam(arguments(simsiam, "--no-predictor"))(x).chunk(2, dim=1)
    assert torch.equal(p, z)


def test_the_target_of_byol_is_a_moving_average_without_gradients():
    model, x = byol.BYOL(arguments(byol, "--momentum", "0.75")), torch.rand(4, 3, 16, 16)
    online = list(model.encoder.parameters()) + list(model.projector.parameters())
    target = list(model.target.parameters())
    assert all(torch.equal(a, b) for a, b in zip(online, target, strict=True))
    before = [p.clone() for p in target]
    with torch.no_grad():
        for p in online:
            p += 1
    p, z = model(x).chunk(2, dim=1)
    assert not torch.autograd.grad(z[:, 0].norm(), online[0], retain_graph=True)[0].any()
    p[:, 0].norm().backward()
    assert all(torch.allclose(a, b + 0.25, atol=1e-6) for a, b in zip(target, before, strict=True))
    assert all(p.grad is None for p in target) and all(p.grad is not None for p in online) and online[0].grad.any()
    before = [p.clone() for p in target]
    model.eval()(x)  # measuring moves nothing
    assert all(torch.equal(a, b) for a, b in zip(target, before, strict=True))


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
        for parent in ("simclr", "moco", "mae", "rotnet"):
            patch.delitem(sys.modules, parent, raising=False)
        patch.setattr(sys, "argv", [f"relatives/{name}.py", *map(str, words)])
        runpy.run_path(str(ROOT / f"relatives/{name}.py"), run_name="__main__")


def test_there_are_ten_and_each_is_short_and_named_in_the_readme():
    files = {path.stem: path.read_text() for path in (ROOT / "relatives").glob("*.py")}
    assert set(files) == set(PARENT) and len(files) == 10
    readme = (ROOT / "README.md").read_text()
    for name, text in files.items():
        assert 40 <= len(text.splitlines()) <= 120 and f"`{name}.py`" in readme
        assert f"python relatives/{name}.py" in text.split('"""')[1]


@pytest.mark.parametrize("name", PARENT)
def test_a_run_leaves_what_its_parents_leaves_and_a_resumed_one_ends_where_an_unbroken_one_does(
    name, tiny_shapes, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    own = ["--classifier-epochs", 1] if PARENT[name] == "rotnet" else []
    words = ["--dataset", tiny_shapes, "--encoder", "small", "--batch-size", 32, *own]
    start(name, *words, "--epochs", 2)
    folder = tmp_path / f"runs/{name}-tiny-seed0"
    figures = FIGURES.get(name, {"views.png", "neighbors.png"})
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
        ("barlow_twins", ["--temperature", "0.1"], "barlow_twins.py: error: unrecognized arguments: --temperature 0.1"),
        ("vicreg", ["--projection", "none"], "vicreg.py: error: unrecognized arguments: --projection none"),
        ("swav", ["--prototypes", "1"], "--prototypes 1: must be from 2 to inf"),
        ("byol", ["--momentum", "2"], "--momentum 2.0: must be from 0 to 1"),
        ("simsiam", ["--dataset", "nothing"], "simsiam.py: error: --dataset nothing"),
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


def test_help_is_that_of_the_relative(capsys):
    with pytest.raises(SystemExit):
        start("byol", "--help")
    out = capsys.readouterr().out
    assert out.startswith("BYOL is SimCLR with") and "--momentum" in out and "--temperature" not in out


def test_importing_a_relative_changes_nothing_in_its_parent():
    import simclr

    assert simclr.METHOD == "simclr" and simclr.nt_xent.__module__ == "simclr" and simclr.Args.__module__ == "simclr"


@pytest.mark.parametrize("name", ["byol", "swav", "simmim", "jigsaw", "inpainting"])
def test_two_processes_train_one_network(two_processes, name):
    folder, printed = two_processes
    models = [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(value, models[1][key]) for key, value in models[0].items())
    assert printed[0].count(f"\n{name} on") == 1 and printed[1] == "" and (folder / name / "summary.json").exists()
