"""The relatives on simclr.py: losses against the papers' formulas, and every file as it is run."""

import cmath
import functools
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    RESULTS,
    assert_a_step_of_both_is_one_of_all,
    assert_same,
    assert_same_in_both,
    files,
    killed_at,
    load,
    spy,
    train_and_keep,
)
from torch import nn

import simclr
from relatives import barlow_twins, byol, lejepa, simsiam, swav, vicreg

ROOT = Path(__file__).parent.parent
MODELS = {
    "barlow_twins": barlow_twins.BarlowTwins,
    "byol": byol.BYOL,
    "lejepa": lejepa.LeJEPA,
    "simsiam": simsiam.SimSiam,
    "swav": swav.SwAV,
    "vicreg": vicreg.VICReg,
}
RELATIVES = {
    "barlow_twins": barlow_twins,
    "byol": byol,
    "lejepa": lejepa,
    "simsiam": simsiam,
    "swav": swav,
    "vicreg": vicreg,
}
ON_OTHERS = {"simmim", "colorization", "inpainting", "jigsaw", "relative_patch", "patches"}
ON_OTHERS |= {"siglip", "slip", "ibot", "supcon"}
WIDTHS = {"swav": 128, "byol": 128, "lejepa": 64}  # of z, where it is not 512


def parts(name):
    """What a relative hands over."""
    return {"Model": MODELS[name], "training_step": RELATIVES[name].training_step}


def arguments(name, *flags):
    relative = RELATIVES[name]
    shapes = getattr(relative, "SHAPES", simclr.SHAPES)
    return simclr.parse_args(list(map(str, flags)), relative.Args, relative.__doc__, shapes)


def words(data, out, *flags):
    """A run on a few shapes, in two short epochs."""
    small = ["--encoder", "small", "--epochs", "2", "--batch-size", "32"]
    return ["--dataset", str(data), *small, "--out", str(out), *map(str, flags)]


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# ==================================================================================================
# Losses
# ==================================================================================================


def test_barlow_twins_loss_is_the_papers_sum():
    z1, z2 = draw(2, 6, 5)
    N, W = z1.shape
    total = 0.0
    for a, b in itertools.product(range(W), repeat=2):
        x = z1[:, a] - z1[:, a].mean()
        y = z2[:, b] - z2[:, b].mean()
        deviations = [math.sqrt((v**2).mean().item() + 1e-5) for v in (x, y)]
        C = sum((x[n] * y[n]).item() for n in range(N)) / N / math.prod(deviations)
        total += (1 - C) ** 2 if a == b else 0.005 * C**2
    assert barlow_twins.barlow_twins_loss(z1, z2).item() == pytest.approx(total, rel=1e-9)


def test_barlow_twins_loss_of_the_identity_and_of_collapses():
    z = draw(12, 4)
    z = 1e3 * torch.linalg.qr(z - z.mean(0)).Q  # four components that are not correlated
    assert barlow_twins.barlow_twins_loss(z, z).item() == pytest.approx(0, abs=1e-6)
    constant = torch.ones(6, 5)
    assert barlow_twins.barlow_twins_loss(constant, constant).item() == pytest.approx(5)
    same = z[:, :1].expand(-1, 4)  # every component repeats the first
    expected = 12 * 0.005
    assert barlow_twins.barlow_twins_loss(same, same).item() == pytest.approx(expected, rel=1e-4)


def test_vicreg_loss_is_the_papers_sum():
    z1, z2 = 0.7 * draw(2, 6, 5)
    N, W = z1.shape
    squares = [(z1[n, j] - z2[n, j]).item() ** 2 for n in range(N) for j in range(W)]
    total = 25 * sum(squares) / (N * W)
    for z in (z1, z2):
        x = [[(z[n, j] - z[:, j].mean()).item() for j in range(W)] for n in range(N)]
        C = [
            [sum(x[n][i] * x[n][j] for n in range(N)) / (N - 1) for j in range(W)] for i in range(W)
        ]
        v = sum(max(0, 1 - math.sqrt(C[j][j] + 1e-4)) for j in range(W)) / W
        assert v > 0
        c = sum(C[i][j] ** 2 for i in range(W) for j in range(W) if i != j) / W
        total += 25 / 2 * v + c
    assert vicreg.vicreg_loss(z1, z2).item() == pytest.approx(total, rel=1e-9)


def test_the_variance_of_vicreg_pulls_a_collapse_apart():
    z = draw(6, 5)
    z[:, 0] *= 1e-3
    z.requires_grad_()
    vicreg.variance(z).backward()
    centered = z[:, 0] - z[:, 0].mean()
    assert (z.grad[:, 0] * centered < 0).all()  # a step downhill leads away from the mean


def epps_pulley(s):
    """Numbers -> T of the docstring, with complex exponentials and the rule of trapezoids."""
    values = []
    for k in range(17):
        t = 3 * k / 16
        phi = sum(cmath.exp(1j * t * x) for x in s) / len(s)
        error = abs(phi - math.exp(-(t**2) / 2)) ** 2
        values.append(error * math.exp(-(t**2) / 2))
    half = sum((a + b) / 2 * 3 / 16 for a, b in itertools.pairwise(values))
    return len(s) * 2 * half


def test_lejepa_loss_is_the_papers_sum():
    z1, z2 = draw(2, 6, 5)
    directions = F.normalize(draw(5, 3, seed=1), dim=0)
    sigreg = [epps_pulley((z @ a).tolist()) for z in (z1, z2) for a in directions.T]
    pairs = list(zip(z1.flatten().tolist(), z2.flatten().tolist(), strict=True))
    distances = [(x - (a + b) / 2) ** 2 for a, b in pairs for x in (a, b)]
    expected = 0.9 * sum(distances) / len(distances) + 0.1 * sum(sigreg) / len(sigreg)
    assert lejepa.lejepa_loss(z1, z2, directions, 0.1).item() == pytest.approx(expected)


def test_the_test_of_lejepa_knows_a_gaussian():
    normal = draw(1000, 1)
    others = {"wider": 1.3 * normal, "aside": normal + 0.3, "two points": normal.sign()}
    others["collapsed"] = torch.zeros(1000, 1)
    (least,) = lejepa.epps_pulley(normal).tolist()
    assert all(lejepa.epps_pulley(s).item() > 10 * least for s in others.values())


def test_directions_of_lejepa_are_new_in_every_step(monkeypatch):
    args = arguments("lejepa")
    calls = spy(monkeypatch, lejepa, "lejepa_loss")
    model = lejepa.LeJEPA(args)
    for progress in (0.5, 0.5, 0.51):
        lejepa.training_step(model, images(8), args, torch.Generator(), progress, lambda loss: None)
    one, again, other = [directions for _, _, directions, _ in calls]
    assert torch.equal(one, again)  # in another process, whose views differ
    assert not torch.equal(one, other)
    torch.testing.assert_close(one.norm(dim=0), torch.ones(256))


def test_codes_of_swav_are_those_of_the_papers_iteration():
    scores = F.normalize(draw(12, 7), dim=1) @ F.normalize(draw(4, 7, seed=1), dim=1).T
    Q = (scores.T / 0.05).exp()  # (K, B), as in the paper's appendix A.1
    Q /= Q.sum()
    for _ in range(3):
        for k in range(4):
            Q[k] /= Q[k].sum() * 4
        for b in range(12):
            Q[:, b] /= Q[:, b].sum() * 12
    torch.testing.assert_close(swav.sinkhorn(scores, 0.05), 12 * Q.T)


def test_codes_of_swav_share_the_prototypes_equally():
    scores = F.normalize(draw(12, 7), dim=1) @ F.normalize(draw(4, 7, seed=1), dim=1).T
    q = swav.sinkhorn(scores, 0.05, iterations=100)
    torch.testing.assert_close(q.sum(1), torch.ones(12).double())
    torch.testing.assert_close(q.sum(0), torch.full((4,), 3.0).double())


def test_swav_loss_is_the_papers_sum():
    one, two = 0.3 * draw(2, 8, 3)
    total = 0.0
    for scores, other in ((one, two), (two, one)):
        q = swav.sinkhorn(other)
        for n in range(8):
            e = (scores[n] / 0.1).exp()
            total -= sum((q[n, k] * (e[k] / e.sum()).log()).item() for k in range(3)) / 8 / 2
    assert swav.swav_loss(one, two, 0.1).item() == pytest.approx(total)
    same = torch.ones(8, 3)
    assert swav.swav_loss(same, same, 0.1).item() == pytest.approx(math.log(3))


def test_codes_of_swav_get_no_gradient():
    one, two = (0.3 * draw(2, 8, 3)).requires_grad_()
    (gradient,) = torch.autograd.grad(swav.swav_loss(one, two, 0.1), two, retain_graph=True)
    expected = ((two / 0.1).softmax(1) - swav.sinkhorn(one)) / 0.1 / 8 / 2  # the cross-entropy's
    torch.testing.assert_close(gradient, expected)


def test_losses_of_simsiam_and_byol_are_the_papers():
    p1, z1, p2, z2 = draw(4, 5, 6)

    def cosine(a, b):
        return sum((a[n] @ b[n] / a[n].norm() / b[n].norm()).item() for n in range(5)) / 5

    def distance(p, z):
        difference = F.normalize(p, dim=1) - F.normalize(z, dim=1)
        return difference.square().sum(1).mean().item()

    expected = -cosine(p1, z2) / 2 - cosine(p2, z1) / 2
    assert simsiam.simsiam_loss(p1, z1, p2, z2).item() == pytest.approx(expected)
    expected = distance(p1, z2) + distance(p2, z1)
    assert byol.byol_loss(p1, z1, p2, z2).item() == pytest.approx(expected)


def test_the_losses_equal_lightlys():
    lightly = pytest.importorskip("lightly.loss", exc_type=ImportError)
    z1, z2 = draw(2, 16, 8).float()
    p1, p2 = draw(2, 16, 8, seed=1).float()
    one = F.normalize(z1, dim=1)
    two = F.normalize(z2, dim=1)
    D = lightly.NegativeCosineSimilarity()
    pairs = [
        (barlow_twins.barlow_twins_loss(z1, z2), lightly.BarlowTwinsLoss()(z1, z2)),
        (vicreg.vicreg_loss(z1, z2), lightly.VICRegLoss()(z1, z2)),
        (swav.swav_loss(one, two, 0.1), lightly.SwaVLoss(sinkhorn_epsilon=0.02)([one, two], [])),
        (simsiam.simsiam_loss(p1, z1, p2, z2), (D(p1, z2) + D(p2, z1)) / 2),
        (byol.byol_loss(p1, z1, p2, z2), 4 + 2 * D(p1, z2) + 2 * D(p2, z1)),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs.squeeze())


def test_the_test_of_lejepa_equals_lightlys():
    lightly = pytest.importorskip("lightly.loss.lejepa_loss", exc_type=ImportError)
    z = draw(2, 16, 8).float()
    torch.manual_seed(0)
    theirs = lightly.SIGReg(num_vectors=64)(z)
    torch.manual_seed(0)
    directions = F.normalize(torch.randn(8, 64), dim=0)
    ours = torch.stack([lejepa.epps_pulley(view @ directions) for view in z]).mean()
    torch.testing.assert_close(ours, theirs)


# ==================================================================================================
# Training steps
# ==================================================================================================


def images(N, S=16):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (N, 3, S, S), generator=generator, dtype=torch.uint8)


def step(name, model, args, update):
    generator = torch.Generator().manual_seed(0)
    return RELATIVES[name].training_step(model, images(8), args, generator, 0.5, update)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_logs_its_loss_and_the_spread_of_z(name, monkeypatch):
    args = arguments(name)
    torch.manual_seed(0)
    model = MODELS[name](args).train()
    calls = spy(monkeypatch, simclr, "spread")
    losses = []
    terms = step(name, model, args, losses.append)
    assert terms.keys() == {"loss", "spread"}
    assert losses == [terms["loss"]]
    assert losses[0].requires_grad
    ((z,),) = calls
    assert z.shape == (8, WIDTHS.get(name, 512))  # of the first views


class Pair(nn.Module):
    """A network whose predictions and projections, of eight images, are parameters."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(draw(16, 6).float())
        self.z = nn.Parameter(draw(16, 6, seed=1).float())
        self.encoder = nn.Identity()
        self.projector = nn.Identity()
        self.target = [nn.Identity(), nn.Identity()]

    def forward(self, x):
        return self.p, self.z


@pytest.mark.parametrize("name", ["simsiam", "byol"])
def test_what_is_predicted_is_the_other_view(name):
    network = Pair()
    losses = []
    step(name, network, arguments(name), losses.append)
    cosines = [F.cosine_similarity(network.p[i], network.z[(i + 8) % 16], dim=0) for i in range(16)]
    mean = sum(cosines) / 16
    expected = -mean if name == "simsiam" else 4 - 4 * mean
    torch.testing.assert_close(losses[0], expected)


@pytest.mark.parametrize("flags", [["--stop-gradient"], ["--no-stop-gradient"]])
def test_simsiam_has_no_gradient_to_what_it_predicts(flags):
    args = arguments("simsiam", *flags)
    network = Pair()
    step("simsiam", network, args, lambda loss: loss.backward())
    assert network.p.grad.any()
    assert (network.z.grad is None) == args.stop_gradient


@pytest.mark.parametrize("name", ["simsiam", "byol"])
def test_without_a_predictor_the_prediction_is_z(name):
    model = MODELS[name](arguments(name, "--no-predictor"))
    p, z = model(torch.rand(4, 3, 16, 16))
    assert torch.equal(p, z)


def test_the_target_of_byol_follows_after_the_step():
    args = arguments("byol", "--ema-momentum", "0.75")
    model = byol.BYOL(args)
    online = [*model.encoder.parameters(), *model.projector.parameters()]
    target = list(model.target.parameters())
    assert_same([p.data for p in online], [p.data for p in target])
    before = [p.clone() for p in target]

    def update(loss):
        loss.backward()
        with torch.no_grad():
            for p in online:
                p += 1

    step("byol", model, args, update)
    for new, old in zip(target, before, strict=True):
        torch.testing.assert_close(new, old + 0.25)
    assert all(p.grad is None for p in target)
    assert online[0].grad.any()


def test_measuring_moves_no_target():
    model = byol.BYOL(arguments("byol")).eval()
    with torch.no_grad():
        model.encoder.conv1.weight += 1
    before = [p.clone() for p in model.target.parameters()]
    model(torch.rand(4, 3, 16, 16))
    assert_same([p.data for p in model.target.parameters()], before)


# ==================================================================================================
# The files
# ==================================================================================================


def test_every_relative_is_named_in_the_readme():
    texts = {path.stem: path.read_text() for path in (ROOT / "relatives").glob("*.py")}
    assert texts.keys() == MODELS.keys() | ON_OTHERS
    readme = (ROOT / "README.md").read_text()
    for name, text in texts.items():
        assert 40 <= len(text.splitlines()) <= 140
        assert f"`{name}.py`" in readme
        assert f"python relatives/{name}.py" in text.split('"""')[1]


@pytest.fixture(scope="module", params=MODELS)
def unbroken(request, tiny_shapes, tmp_path_factory):
    """A relative, and the folder of a run of it that nothing has stopped. It is read only."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    name = request.param
    simclr.main(arguments(name, *words(tiny_shapes, folder)), **parts(name))
    return name, folder


def test_a_run_is_simclrs_with_what_is_handed_over(unbroken):
    name, run = unbroken
    assert files(run) == RESULTS
    summary = json.loads((run / "summary.json").read_text())
    assert summary["method"] == name
    assert summary["command"].startswith(f"python relatives/{name}.py --dataset ")
    assert {"knn", "linear_probe"} <= summary["untrained"].keys() & summary["trained"].keys()
    state = load(run / "checkpoint.pt")["model"]
    assert state.keys() == MODELS[name](arguments(name)).state_dict().keys()


def test_a_record_has_only_what_the_method_has(unbroken):
    name, run = unbroken
    text = (run / "summary.json").read_text()
    summary = json.loads(text)
    assert "null" not in text
    logged = [line.keys() - {"knn", "rank"} for line in summary["history"]]
    assert logged == 2 * [{"epoch", "seconds", "loss", "spread"}]
    assert "projection" not in summary["args"]
    assert ("temperature" in summary["args"]) == (name == "swav")


def test_a_resumed_run_ends_as_an_unbroken_one(unbroken, tiny_shapes, tmp_path, capsys):
    name, folder = unbroken
    run = tmp_path / "run"
    with killed_at(simclr, "spread", 5):  # of three steps an epoch: a checkpoint is there
        simclr.main(arguments(name, *words(tiny_shapes, run)), **parts(name))
    simclr.main(arguments(name, "--resume", run), **parts(name))
    states = [load(f / "checkpoint.pt")["model"] for f in (folder, run)]
    assert_same(*states)
    assert f"relatives/{name}.py on {tiny_shapes}: 96 images" in capsys.readouterr().out


def command_line(name):
    relative = RELATIVES[name]
    shapes = getattr(relative, "SHAPES", simclr.SHAPES)
    return functools.partial(simclr.run, relative.Args, relative.__doc__, shapes, **parts(name))


BAD = [
    ("barlow_twins", ["--temperature", "0.1"], "unrecognized arguments: --temperature 0.1"),
    ("vicreg", ["--projection", "none"], "unrecognized arguments: --projection none"),
    ("vicreg", ["--expanderwidth", "64"], "did you mean --expander-width?"),
    ("swav", ["--prototypes", "1"], "--prototypes 1: must be at least 2"),
    ("byol", ["--ema-momentum", "2"], "--ema-momentum 2.0: must be from 0 to 1"),
    ("simsiam", ["--dataset", "nothing"], "relatives/simsiam.py: error: dataset nothing"),
]


@pytest.mark.parametrize(("name", "flags", "message"), BAD)
def test_bad_input_is_one_line(tmp_path, monkeypatch, error_of, name, flags, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(command_line(name), *flags)


def test_a_run_of_its_parent_cannot_be_resumed(tiny_shapes, tmp_path, error_of):
    run = tmp_path / "run"
    simclr.main(simclr.parse_args(words(tiny_shapes, run, "--epochs", 1)))
    before = {path: path.read_bytes() for path in run.iterdir()}
    line = error_of(command_line("vicreg"), "--resume", run)
    assert "there is no run of relatives/vicreg.py in this folder" in line
    assert before == {path: path.read_bytes() for path in run.iterdir()}


def test_help_is_that_of_the_relative(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["byol.py", "--help"])
    with pytest.raises(SystemExit):
        command_line("byol")()
    out = capsys.readouterr().out
    assert out.startswith("BYOL is SimCLR with")
    assert "--ema-momentum" in out
    recipes = out[out.index("The recipe of") :]
    assert "--ema-momentum 0.98" in " ".join(recipes.split())
    assert "--temperature" not in out


def test_a_part_that_is_misnamed_is_an_error(tmp_path):
    with pytest.raises(TypeError, match="unexpected keyword argument 'trainingstep'"):
        simclr.main(arguments("byol"), trainingstep=byol.training_step)


# ==================================================================================================
# Several processes
# ==================================================================================================


LOSSES = {
    "barlow_twins": barlow_twins.barlow_twins_loss,
    "vicreg": vicreg.vicreg_loss,
    "swav": lambda z1, z2: swav.swav_loss(0.1 * z1, 0.1 * z2, 0.1),
    "simsiam": lambda z1, z2: simsiam.simsiam_loss(z1 + 1, z1, z2 + 1, z2),
    "lejepa": lambda z1, z2: lejepa.lejepa_loss(z1, z2, torch.eye(4).double(), 0.1),
    "byol": lambda z1, z2: byol.byol_loss(z1 + 1, z1.detach(), z2 + 1, z2.detach()),
}


def both_compute_losses():
    """In double precision: of gathered projections, or where a loss is a mean, of a process's."""
    x = draw(2, 12, 5)
    order = [*range(0, 12, 2), *range(1, 12, 2)]  # as gather puts them together
    for name, loss_of in LOSSES.items():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double()
        network = nn.parallel.DistributedDataParallel(network)
        z1, z2 = network(x[:, simclr.RANK :: 2].flatten(0, 1)).chunk(2)
        if name not in ("simsiam", "byol"):
            z1 = simclr.gather(z1)
            z2 = simclr.gather(z2)
        loss_of(z1, z2).backward()
        z1, z2 = network.module(x[:, order].flatten(0, 1)).chunk(2)
        expected = torch.autograd.grad(loss_of(z1, z2), list(network.module.parameters()))
        for p, gradient in zip(network.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, gradient, rtol=1e-10, atol=1e-10)


def both_train(data, folder):
    both_compute_losses()
    for name, Model in MODELS.items():
        step = RELATIVES[name].training_step
        assert_a_step_of_both_is_one_of_all(simclr, step, Model, arguments(name))
    for name in ("byol", "swav"):
        flags = words(data, f"{folder}/run-{name}", "--device", "cpu", "--epochs", 1)
        train_and_keep(f"{folder}/{name}", simclr, arguments(name, *flags), **parts(name))


def test_two_processes_do_what_one_does(tiny_shapes, tmp_path, in_two_processes):
    first, second = in_two_processes(both_train, tiny_shapes, tmp_path)
    assert second == ""
    for name in ("byol", "swav"):
        assert first.count(f"relatives/{name}.py on") == 1
        assert_same_in_both(tmp_path / name)
        summary = json.loads((tmp_path / f"run-{name}/summary.json").read_text())
        assert summary["command"].startswith(f"torchrun --nproc-per-node 2 relatives/{name}.py")
