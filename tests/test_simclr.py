"""The loss against the paper's formula, the parts of the script, and the script as it is run."""

import dataclasses
import functools
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import (
    LBFGS,
    RESULTS,
    assert_a_step_of_both_is_one_of_all,
    assert_ended_alike,
    assert_resumed_in_both,
    assert_same,
    files,
    killed_at,
    load,
    records,
    spy,
    train_and_resume,
)
from PIL import Image
from torch import nn

import clip
import common
import dino
import mae
import moco
import rotnet
import simclr

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("shapes_once")


def words(data, out, *flags):
    """A run on a few shapes, in two short epochs."""
    small = ["--encoder", "small", "--epochs", "2", "--batch-size", "32"]
    return ["--dataset", str(data), *small, "--out", str(out), *map(str, flags)]


def small_run(data, out, *flags):
    return simclr.main(simclr.parse_args(words(data, out, *flags)))


def resumed(run, *flags):
    return simclr.main(simclr.parse_args(["--resume", str(run), *map(str, flags)]))


@pytest.fixture(scope="module")
def unbroken(tiny_shapes, tmp_path_factory):
    """The folder of a run that nothing has stopped. It is read only."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    small_run(tiny_shapes, folder)
    return folder


@pytest.fixture
def finished(unbroken, tmp_path):
    """A copy of it to work with."""
    return shutil.copytree(unbroken, tmp_path / "run")


# ==================================================================================================
# Loss
# ==================================================================================================


def algorithm_1(z1, z2, temperature):
    """Algorithm 1 of the paper, line by line; views 2k - 1 and 2k of image k lie side by side."""
    z = [view for pair in zip(z1, z2, strict=True) for view in pair]
    s = [[(a @ b / (a.norm() * b.norm())).item() for b in z] for a in z]

    def pair_loss(i, j):
        others = [math.exp(s[i][k] / temperature) for k in range(len(z)) if k != i]
        return -math.log(math.exp(s[i][j] / temperature) / sum(others))

    return sum(pair_loss(k, k + 1) + pair_loss(k + 1, k) for k in range(0, len(z), 2)) / len(z)


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("N", [2, 3, 13])
def test_nt_xent_is_the_papers_formula(N, temperature):
    z1, z2 = draw(2, N, 6, seed=N)
    expected = algorithm_1(z1, z2, temperature)
    assert simclr.nt_xent(z1, z2, temperature).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("N", [2, 16])
def test_nt_xent_of_identical_projections_is_chance(N):
    z = draw(1, 6).expand(N, 6)
    assert simclr.nt_xent(z, z, 0.1).item() == pytest.approx(math.log(2 * N - 1), abs=1e-9)


def test_nt_xent_has_the_gradient_of_the_formula():
    z1, z2 = draw(2, 4, 3)
    inputs = z1.requires_grad_(), z2.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: simclr.nt_xent(a, b, 0.3), inputs)


def test_spread_is_0_at_one_point_and_1_all_around():
    z = draw(1, 6).expand(50, 6)
    assert simclr.spread(z).item() == pytest.approx(0, abs=1e-6)
    assert simclr.spread(torch.cat([z, -3 * z])).item() == pytest.approx(1, abs=1e-6)


# ==================================================================================================
# Views, model, optimizer
# ==================================================================================================


def test_two_views_keep_the_order_of_the_images():
    values = torch.arange(0, 250, 10, dtype=torch.uint8)
    flat = values[:, None, None, None].expand(25, 3, 8, 8)
    args = simclr.parse_args(["--jitter-strength", "0", "--gray", "0", "--blur", "1"])
    views = simclr.two_views(flat, args, torch.Generator().manual_seed(0))
    torch.testing.assert_close(views, torch.cat([flat, flat]) / 255)


def test_two_views_differ_and_a_seed_fixes_them():
    images = common.load_dataset("shapes").train_images[:40]
    args = simclr.parse_args([])

    def views(seed):
        return simclr.two_views(images, args, torch.Generator().manual_seed(seed))

    first = views(0)
    assert first.shape == (80, 3, 32, 32)
    assert torch.equal(first, views(0))
    assert not torch.equal(first, views(1))
    assert ((first[:40] - first[40:]).abs().mean((1, 2, 3)) > 0.005).all()
    assert first.min() >= 0
    assert first.max() <= 1
    colorless = (first.amax(1) - first.amin(1)).amax((1, 2)) < 1e-6
    assert abs(colorless.float().mean() - args.gray) < 0.15


@pytest.mark.parametrize(("progress", "size"), [(0.0, 16), (0.89, 16), (0.9, 32), (1.0, 32)])
def test_views_are_half_as_large_until_then(progress, size):
    images = common.load_dataset("shapes").train_images[:2]
    args = simclr.parse_args(["--half-size-until", "0.9"])
    views = simclr.two_views(images, args, torch.Generator().manual_seed(0), progress)
    assert views.shape == (4, 3, size, size)


ENCODERS = [("small", 32), ("resnet18", 32), ("resnet18", 96), ("resnet50", 32)]


@pytest.mark.parametrize(("name", "size"), ENCODERS)
def test_encoders_are_torchvisions(name, size):
    encoder, D = simclr.build_encoder(name, size)
    assert encoder.eval()(torch.zeros(2, 3, size, size)).shape == (2, D)
    architecture = "resnet18" if name == "small" else name
    reference = torchvision.models.get_model(architecture).state_dict()
    if name != "small":
        assert {"fc.weight", "fc.bias"} == set(reference) ^ set(encoder.state_dict())
    imagenet_stem = name == "small" or size > 64
    for key, value in encoder.state_dict().items():
        same = value.shape == reference[key].shape
        assert same == (imagenet_stem or key != "conv1.weight")


@pytest.mark.parametrize(("projection", "layers"), [("none", 0), ("linear", 1), ("mlp", 4)])
def test_heads_have_their_layers(projection, layers):
    model = simclr.SimCLR(simclr.parse_args(["--projection", projection])).eval()
    assert len(model.projector) == layers
    x = torch.rand(4, 3, 32, 32)
    z = model(x)
    assert z.shape == (4, 128)
    assert torch.equal(z, model.encoder(x)) == (layers == 0)


def rates(flags, batch_size, steps):
    """The learning rate of each step, and of two beyond the last; and the optimizer."""
    args = simclr.parse_args(flags)
    optimizer, schedule = simclr.make_optimizer(nn.Linear(2, 2), args, batch_size, steps)
    seen = []
    for _ in range(steps + 2):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen, optimizer


def test_learning_rate_rises_falls_and_stays_down():
    rate, _ = rates(["--warmup", "0.1", "--lr", "1"], 256, 100)
    assert rate[:11] == pytest.approx([(step + 1) / 11 for step in range(11)])
    assert rate[10:] == sorted(rate[10:], reverse=True)
    assert rate[55] == pytest.approx(0.5)
    assert rate[100:] == pytest.approx([0, 0])
    without, _ = rates(["--warmup", "0", "--lr", "1"], 256, 9)
    assert without[0] == 1


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_optimizers_scale_the_learning_rate_with_the_batch(kind):
    name = kind.__name__.lower()
    flags = ["--optimizer", name, "--lr", "0.06", "--weight-decay", "0.3", "--warmup", "0"]
    for batch_size, expected in ((256, 0.06), (512, 0.12), (64, 0.015)):
        rate, optimizer = rates(flags, batch_size, 3)
        assert type(optimizer) is kind
        assert rate[0] == pytest.approx(expected)
    (group,) = optimizer.param_groups
    assert group["weight_decay"] == 0.3
    assert group.get("momentum", 0.9) == 0.9
    assert len(group["params"]) == 2


# ==================================================================================================
# Probes
# ==================================================================================================


def naive_knn(bank, bank_labels, queries, labels, k):
    correct = 0
    for query, label in zip(queries, labels, strict=True):
        s = F.cosine_similarity(query[None], bank)
        votes = [0.0] * int(bank_labels.max() + 1)
        for i in s.argsort(descending=True)[:k]:
            votes[bank_labels[i]] += math.exp(s[i] / 0.1)
        correct += votes.index(max(votes)) == label
    return correct / len(labels)


@pytest.mark.parametrize(("cap", "k"), [(7, 7), (200, 12)])  # 12 images are of the smallest class
def test_knn_is_the_weighted_vote(cap, k):
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(60, 5, generator=generator)
    queries = torch.randn(30, 5, generator=generator)
    bank_labels = torch.tensor(12 * [0] + 24 * [1] + 24 * [2])
    labels = torch.randint(3, (30,), generator=generator)
    expected = naive_knn(bank, bank_labels, queries, labels, k)
    assert simclr.knn_accuracy(bank, bank_labels, queries, labels, k=cap) == expected
    assert expected != naive_knn(bank, bank_labels, queries, labels, 60)


def test_a_rare_class_is_not_outvoted():
    angle = torch.cat([0.01 * torch.arange(12.0), 0.5 + 0.001 * torch.arange(200.0)])
    h = torch.stack([angle.cos(), angle.sin()], dim=1)
    labels = torch.tensor(12 * [0] + 200 * [1])
    assert naive_knn(h, labels, h[:12], labels[:12], 200) == 0
    assert simclr.knn_accuracy(h, labels, h[:12], labels[:12]) == 1


def test_at_least_ten_neighbors_vote_if_there_are_ten():
    angle = torch.linspace(0, 0.4, 40)
    bank = torch.stack([angle.cos(), angle.sin()], dim=1)
    labels = torch.tensor([0] + 39 * [1])  # one image of the smallest class
    query = bank[:1], torch.tensor([1])
    assert naive_knn(bank, labels, *query, 1) == 0
    assert simclr.knn_accuracy(bank, labels, *query) == 1
    assert simclr.knn_accuracy(bank[:3], labels[:3], *query) == 1  # of two against one


def test_features_come_from_a_frozen_encoder():
    images = common.load_dataset("shapes").test_images[:600]
    encoder = simclr.build_encoder("small")[0].train()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    features = simclr.features(encoder, images)
    assert features.shape == (600, 128)
    assert not features.requires_grad
    torch.testing.assert_close(features[590:591], simclr.features(encoder, images[590:591]))
    assert_same(dict(encoder.state_dict()), before)


def test_features_that_are_not_finite_are_refused():
    encoder, _ = simclr.build_encoder("small")
    encoder.bn1.weight.data[0] = math.nan
    with pytest.raises(common.UserError, match="the features are not finite"):
        simclr.features(encoder, common.load_dataset("shapes").test_images[:8])


def probe_data(noise):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (600,), generator=generator)
    x = F.one_hot(labels, 8).float() + noise * torch.randn(600, 8, generator=generator)
    return x[:400], labels[:400], x[400:], labels[400:]


@pytest.mark.usefixtures("whole_probes")
def test_linear_probe_is_as_good_as_can_be():
    assert simclr.linear_probe(*probe_data(0.1)) == 1
    assert 0.45 < simclr.linear_probe(*probe_data(1.0)) < 0.75  # 0.63 is the best possible


@pytest.mark.usefixtures("whole_probes")
def test_linear_probe_of_shuffled_labels_is_chance():
    x, y, test, test_y = probe_data(1.0)
    shuffled = y[torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    assert simclr.linear_probe(x, shuffled, test, test_y) < 0.45  # chance is 0.33


@pytest.mark.usefixtures("whole_probes")
def test_linear_probe_ignores_scale_and_shift():
    x, y, test, test_y = probe_data(1.0)
    scale = 10 ** torch.linspace(-2, 2, 8)
    shift = torch.randn(8, generator=torch.Generator().manual_seed(0))
    accuracy = simclr.linear_probe(x, y, test, test_y)
    moved = simclr.linear_probe(x * scale + shift, y, test * scale + shift, test_y)
    assert moved == pytest.approx(accuracy, abs=0.02)


@pytest.mark.usefixtures("whole_probes")
def test_linear_probe_takes_each_test_image_by_itself():
    x, y, test, test_y = probe_data(0.1)
    single = [simclr.linear_probe(x, y, test[i : i + 1], test_y[i : i + 1]) for i in range(12)]
    assert single == [1.0] * 12  # nothing is standardized by the test images
    assert len(test_y[:12].unique()) == 3


def test_linear_probe_of_one_label_and_a_constant_feature():
    x, y, test, test_y = probe_data(0.02)
    rows = torch.stack([(y == label).nonzero()[0, 0] for label in range(3)])
    x[:, 7] = 5.0
    test[:, 7] = 5.0
    assert simclr.linear_probe(x[rows], y[rows], test, test_y) > 0.5  # chance is 0.33


def weights_of_a_probe(monkeypatch, x, y):
    """Those that linear_probe ends with, and of the objective with scikit-learn's C = 1, in
    float64, the gradient there."""
    kept = []

    def lbfgs(parameters, **options):
        kept.extend(parameters)
        return LBFGS(parameters, **options)

    monkeypatch.setattr(torch.optim, "LBFGS", lbfgs)
    simclr.linear_probe(x, y, x, y)
    weight, bias = [part.detach().double().requires_grad_() for part in kept]
    x = (x - x.mean(0)) / (x.std(0, correction=0) + 1e-5)
    total = F.cross_entropy(F.linear(x.double(), weight, bias), y, reduction="sum")
    objective = (total + 0.5 * weight.square().sum()) / len(x)
    gradient = torch.autograd.grad(objective, [weight, bias])
    return weight, torch.cat([part.flatten() for part in gradient])


def test_linear_probe_converges_as_in_scikit_learn(monkeypatch):
    x, y, _, _ = probe_data(0.3)
    weight, gradient = weights_of_a_probe(monkeypatch, x, y)
    assert gradient.abs().max() < 2e-5
    assert weight.norm() > 1


def test_linear_probe_converges_on_an_untrained_encoder(monkeypatch):
    data = common.load_dataset("shapes")
    torch.manual_seed(0)
    encoder, _ = simclr.build_encoder("small")
    h = simclr.features(encoder, data.train_images)  # 100 steps would leave 3e-4
    _, gradient = weights_of_a_probe(monkeypatch, h, data.train_labels)
    assert gradient.abs().max() < 1e-4


def test_linear_probe_draws_no_random_number():
    state = torch.get_rng_state()
    accuracies = {simclr.linear_probe(*probe_data(1.0)) for _ in range(2)}
    assert torch.equal(torch.get_rng_state(), state)
    assert len(accuracies) == 1


def labelled(count, classes):
    images = common.load_dataset("shapes").train_images[:count]
    names = [str(label) for label in range(classes)]
    labels = torch.arange(count) % classes
    return common.Dataset(images, labels, images[:classes], labels[:classes], names)


def test_held_out_labels_are_a_fixed_tenth_of_all_classes(monkeypatch):
    calls = spy(monkeypatch, simclr, "knn_accuracy")
    simclr.monitor(simclr.build_encoder("small")[0], labelled(96, 10))
    ((_, bank_labels, _, held_out),) = calls
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))  # whatever --seed is
    assert torch.equal(held_out, order[:9] % 10)
    assert torch.equal(bank_labels, order[9:] % 10)
    assert len(held_out.unique()) > 3


def test_fewer_than_ten_labels_can_be_monitored():
    metrics = simclr.monitor(simclr.build_encoder("small")[0], labelled(4, 2))
    assert metrics["knn"] in (0, 1)  # of one image


def test_the_effective_rank_counts_directions():
    basis = torch.eye(8)[:5].repeat(3, 1)
    assert simclr.effective_rank(basis) == pytest.approx(5)
    assert simclr.effective_rank(7 * basis) == pytest.approx(5)
    assert simclr.effective_rank(basis[:1].repeat(9, 1)) == pytest.approx(1)
    assert simclr.effective_rank(torch.zeros(9, 8)) == 1
    lengths = torch.tensor([3.0, 1.0])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert simclr.effective_rank(torch.diag(lengths)) == pytest.approx(math.exp(entropy))


@pytest.mark.parametrize(("count", "labels", "step"), [(96, 96, 1), (96, 40, 1), (9000, 0, 3)])
def test_the_rank_is_monitored_with_and_without_labels(monkeypatch, count, labels, step):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (count, 3, 2, 2), generator=generator).byte()
    y = torch.arange(labels) % 2
    data = common.Dataset(x, y, x[:2], torch.arange(2), ["a", "b"] if labels else [])
    monkeypatch.setattr(simclr, "features", lambda encoder, images: images.flatten(1).float())
    monitored = simclr.monitor(None, data)
    used = x[:labels] if labels else x[::step]
    assert monitored["rank"] == pytest.approx(simclr.effective_rank(used.flatten(1).float()))
    assert ("knn" in monitored) == (labels > 0)


# ==================================================================================================
# The script
# ==================================================================================================

KEYS = "method command args date device threads torch parameters images_per_second"
KEYS += " most_frequent_class pretrain_seconds total_seconds history untrained trained"


def test_a_run_leaves_its_files(unbroken):
    assert files(unbroken) == RESULTS
    assert json.loads((unbroken / "args.json").read_text())["batch_size"] == 32
    about = {"image_size": 32, "classes": [str(k) for k in range(10)], "files": {}}
    assert json.loads((unbroken / "data.json").read_text()) == about


def test_a_summary_says_what_was_done(unbroken, tiny_shapes):
    summary = json.loads((unbroken / "summary.json").read_text())
    assert summary.keys() == {*KEYS.split(), "semi_supervised"}
    assert summary["method"] == "simclr"
    assert summary["total_seconds"] > summary["pretrain_seconds"] > 0
    start = f"python simclr.py --dataset {tiny_shapes} --encoder small --epochs 2"
    assert summary["command"].startswith(start)
    assert set(summary["untrained"]) == {"knn", "linear_probe"}
    assert set(summary["trained"]) == {"knn", "linear_probe", "knn_z", "linear_probe_z"}
    labels = np.load(tiny_shapes)["test_labels"]
    assert summary["most_frequent_class"] == np.bincount(labels).max() / 30


def test_the_log_has_a_line_for_each_epoch(unbroken):
    lines = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    assert lines == json.loads((unbroken / "summary.json").read_text())["history"]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert ["knn" in line for line in lines] == [False, True]
    for line in lines:
        assert line["bound"] == pytest.approx(math.log(63) - line["loss"], abs=1e-5)
        assert 0 < line["spread"] <= 1


def test_what_is_logged_is_the_mean_over_the_epoch(tiny_shapes, tmp_path, monkeypatch):
    spreads = iter(torch.arange(6.0))
    monkeypatch.setattr(simclr, "spread", lambda z: next(spreads))
    summary = small_run(tiny_shapes, tmp_path / "run")  # of three steps an epoch
    assert [line["spread"] for line in summary["history"]] == [1, 4]


def test_the_encoder_is_the_checkpoints_and_torchvisions(unbroken):
    encoder = load(unbroken / "encoder.pt")
    resnet = torchvision.models.resnet18()
    missing, unexpected = resnet.load_state_dict(encoder, strict=False)
    assert not unexpected
    assert all(k.startswith(("layer1.1", "layer2.1", "layer3", "layer4", "fc")) for k in missing)
    checkpoint = load(unbroken / "checkpoint.pt")
    assert checkpoint["data"][:2] == [96, 3]
    for key, value in encoder.items():
        assert torch.equal(checkpoint["model"]["encoder." + key], value)


def test_files_hold_tensors_of_main_memory():
    class OnDevice(torch.Tensor):
        def cpu(self):
            return torch.ones(2)

    x = torch.zeros(2).as_subclass(OnDevice)
    nest = {"a": [x, {"b": x}], "lr": 0.1}
    assert_same(simclr.on_cpu(nest), {"a": [torch.ones(2), {"b": torch.ones(2)}], "lr": 0.1})


@pytest.mark.parametrize(("epochs", "advised"), [(2, 334), (166, 334), (167, None)])
def test_few_steps_are_said_to_be_few(tiny_shapes, tmp_path, monkeypatch, capsys, epochs, advised):
    monkeypatch.setattr(simclr, "pretrain", lambda *_: [])
    small_run(tiny_shapes, tmp_path / "run", "--epochs", epochs)
    out = capsys.readouterr().out
    assert f"; {3 * epochs} steps; cpu; " in out
    hint = f"{3 * epochs} steps are few: --epochs {advised} would make a thousand"
    assert (hint in out) == (advised is not None)
    assert ("are few" in out) == (advised is not None)


def test_results_are_printed_beside_a_guess(tiny_shapes, tmp_path, capsys):
    summary = small_run(tiny_shapes, tmp_path / "run", "--epochs", 1)
    saved = json.loads((tmp_path / "run/summary.json").read_text())
    assert saved == json.loads(json.dumps(summary))
    out = capsys.readouterr().out
    before = summary["untrained"]["knn"]
    after = summary["trained"]["knn"]
    assert re.search(rf"\nknn +{before:.1%} +{after:.1%}\n", out)
    assert f"guessing the most frequent class: {summary['most_frequent_class']:.1%}" in out
    assert "min left" not in out  # there is no terminal


def test_on_a_terminal_it_says_how_long_it_takes(tiny_shapes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda _: True)
    small_run(tiny_shapes, tmp_path / "run", "--batch-size", 8)
    out = capsys.readouterr().out
    for epoch in (1, 2):
        found = re.findall(rf"epoch {epoch}/2 +(\d+)%, [\d.]+ min left \r", out)
        assert found == [f"{100 * step / 12:.0f}" for step in range(1, 13)]
    assert "min left" not in (tmp_path / "run/metrics.jsonl").read_text()


def test_a_seed_fixes_the_encoder_and_labels_do_not_matter(tiny_shapes, unbroken, tmp_path):
    arrays = dict(np.load(tiny_shapes))
    labels = np.random.default_rng(0).permutation(arrays["train_labels"])
    np.savez(tmp_path / "shuffled.npz", **arrays | {"train_labels": labels})
    small_run(tmp_path / "shuffled.npz", tmp_path / "shuffled")
    small_run(tiny_shapes, tmp_path / "other", "--seed", 1)
    first = load(unbroken / "encoder.pt")
    assert_same(first, load(tmp_path / "shuffled/encoder.pt"))
    other = load(tmp_path / "other/encoder.pt")
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def test_copied_with_common_it_learns(some_shapes, tmp_path):
    for path in (ROOT / "simclr.py", ROOT / "common.py", some_shapes):
        shutil.copy(path, tmp_path)
    recipe = [f"--{name.replace('_', '-')}={value}" for name, value in simclr.SHAPES.items()]
    flags = ["--epochs", "3", "--eval-every", "9", "--out", "run"]
    command = ["simclr.py", "--dataset", "some.npz", *recipe, *flags]
    python = [sys.executable, "-W", "error"]
    pipes = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 300}
    result = subprocess.run([*python, *command], **pipes)
    assert (result.returncode, result.stderr) == (0, "")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["command"] == " ".join(["python", *command])
    for probe in ("knn", "linear_probe"):
        assert summary["trained"][probe] > summary["untrained"][probe] + 0.03
    assert files(tmp_path) - {"__pycache__"} == {"simclr.py", "common.py", "some.npz", "run"}


def test_compiled_it_does_the_same(tiny_shapes, tmp_path, monkeypatch):
    """Graphs are traced and run as they are: generating their code takes a minute, and is
    PyTorch's business."""
    operators = ("resized_crop", "gaussian_blur", "color_jitter")
    plain = [getattr(common, name) for name in operators]
    flags = "--epochs", 1, "--lr", 0, "--blur", 0.5
    eager = small_run(tiny_shapes, tmp_path / "eager", *flags)
    compiling = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", compiling)
    calls = spy(monkeypatch, torch, "compile")
    compiled = small_run(tiny_shapes, tmp_path / "compiled", "--compile", *flags)
    assert len(calls) == 1 + len(plain)  # the network and the operators,
    assert [getattr(common, name) for name in operators] == plain  # which are as before afterwards
    loss = eager["history"][0]["loss"]
    assert compiled["history"][0]["loss"] == pytest.approx(loss, abs=1e-4)
    assert compiled["trained"]["knn"] == pytest.approx(eager["trained"]["knn"], abs=0.021)


class NotebookOutput(io.TextIOBase):
    """A notebook's stdout, which cannot be configured."""

    def write(self, text):
        return len(text)


@pytest.mark.parametrize("stdout", [NotebookOutput(), None])  # None: closed
def test_it_runs_without_a_usual_stdout(tiny_shapes, unbroken, tmp_path, monkeypatch, stdout):
    monkeypatch.setattr(sys, "stdout", stdout)
    for name in ("first", "second"):  # one after the other, as from a notebook
        monkeypatch.setattr(sys, "argv", ["simclr.py", *words(tiny_shapes, tmp_path / name)])
        simclr.run()
        assert files(tmp_path / name) == RESULTS
        assert sys.stdout is stdout
        assert_same(load(tmp_path / name / "encoder.pt"), load(unbroken / "encoder.pt"))


# ==================================================================================================
# Flags
# ==================================================================================================


def test_help_needs_neither_network_nor_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.socket", None)
    monkeypatch.setattr(sys, "argv", ["simclr.py", "--dataset", "cifar10", "--help"])
    with pytest.raises(SystemExit) as caught:
        simclr.run()
    out = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    assert "strength of color jitter; paper: 1, CIFAR-10 0.5 (0.5)" in out
    assert "The recipe of --dataset shapes: --encoder small --epochs 12" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", [simclr, moco, rotnet, mae, dino, clip])
def test_every_help_stands_by_itself(script):
    for name, field in simclr.flags_of(script.Args).items():
        phrase = field.metadata["help"].split(";")[0]
        assert not phrase.startswith(("of ", "from ", "to ", "paper"))
        assert len(phrase.split()) > 1, name


def test_what_is_typed_overrides_the_recipes():
    shapes = simclr.parse_args([])
    assert (shapes.batch_size, shapes.optimizer) == (64, "adamw")
    cifar10 = simclr.parse_args(["--dataset", "cifar10"])
    assert (cifar10.encoder, cifar10.optimizer, cifar10.lr) == ("resnet18", "sgd", 0.06)
    flags = ["--dataset", "mine.npz", "--encoder", "small", "--epochs", "3"]
    small = simclr.parse_args(flags)
    assert (small.epochs, small.batch_size, small.image_size) == (3, 128, 32)
    assert small.out == "runs/simclr-mine-seed0"
    assert small.explicit == ("dataset", "encoder", "epochs")


def test_flags_have_the_types_of_args():
    args = simclr.parse_args(["--compile", "--labels", "0.1", "10", "--lr", "1"])
    assert args.compile is True
    assert args.labels == ["0.1", "10"]
    assert type(args.lr) is float
    assert simclr.parse_args(["--no-compile"]).compile is False


@pytest.mark.parametrize(
    ("size", "typed", "temperature", "blur"),
    [(28, [], 0.1, 0), (80, [], 0.1, 0.5), (80, [0.3], 0.3, 0.5)],
)
def test_large_images_have_the_recipe_of_imagenet(
    tmp_path, monkeypatch, size, typed, temperature, blur
):
    images = np.random.default_rng(0).integers(0, 256, (20, size, size, 3), dtype=np.uint8)
    arrays = {"train_images": images, "train_labels": np.arange(20) % 2}
    arrays |= {"test_images": images, "test_labels": np.arange(20) % 2}
    np.savez(tmp_path / "few.npz", **arrays)
    monkeypatch.setattr(simclr, "pretrain", lambda *_: [])
    flags = ["--dataset", str(tmp_path / "few.npz"), "--out", str(tmp_path / "run")]
    flags += ["--encoder", "small", "--image-size", "96"]
    if typed:
        flags += ["--temperature", str(typed[0])]
    args = simclr.main(simclr.parse_args(flags))["args"]
    assert args["batch_size"] == 20  # no more than there are images
    assert (args["temperature"], args["blur"]) == (temperature, blur)
    assert args["jitter_strength"] == (1.0 if size > 64 else 0.5)


BAD = [
    (["--dataset", "cifar"], "dataset cifar: is not shapes, cifar10, cifar100 or stl10, and there"),
    (["--dataset", "none.npz"], "none.npz: there is no such file or folder"),
    (["--dataset", ""], "--dataset: is empty"),
    (["--batch-size", "4097"], "--batch-size 4097: must be from 2 to 4096, the number of images"),
    (["--batch-size", "1"], "--batch-size 1: must be at least 2"),
    (["--lr", "-1"], "--lr -1.0: must be at least 0"),
    (["--lr", "nan"], "--lr nan: must be at least 0"),
    (["--crop", "2"], "--crop 2.0: must be from 0.01 to 1"),
    (["--half-size-until", "1.5"], "--half-size-until 1.5: must be from 0 to 1"),
    (["--eval-every", "0"], "--eval-every 0: must be at least 1"),
    (["--epochs", "-1"], "--epochs -1: must be at least 0"),
    (["--epochs", "many"], "--epochs: invalid int value: 'many'"),
    (["--encoder", "vgg"], "--encoder: invalid choice: 'vgg'"),
    (["--optimizer", "lars"], "--optimizer: invalid choice: 'lars'"),
    (["--projection", "cubic"], "--projection: invalid choice: 'cubic'"),
    (["--nonsense"], "unrecognized arguments: --nonsense"),
    (["--batchsize", "32"], "arguments: --batchsize 32; did you mean --batch-size?"),
    (["--epoch=3"], "arguments: --epoch=3; did you mean --epochs?"),
    (["--device", "abacus"], "--device abacus: not available"),
    (["--device", "meta"], "--device meta: not available"),
    (["--dataset"], "--dataset: expected one argument"),
    (["--labels", "500"], "error: labels 500: the smallest class has only 409 training images"),
    (["--labels", "0.1", "-2"], "error: labels -2: must be a fraction up to 1.0, or a whole"),
    (["--labels", "1.5"], "error: labels 1.5: must be a fraction"),
    (["--labels", "0"], "error: labels 0: must be a fraction"),
    (["--labels", "few"], "error: labels few: must be a fraction"),
    (["--image-size", "4"], "--image-size 4: must be from 8 to 512"),
    (["--init", "none.pt"], "--init none.pt: does not fit --encoder small: [Errno 2] No such file"),
    (["--resume", "nothing"], "--resume nothing: there is no run of simclr.py in this folder"),
    (["--resume", ""], "--resume: is empty"),
]


@pytest.mark.parametrize(("flags", "message"), BAD)
def test_bad_input_is_one_line(tmp_path, monkeypatch, error_of, flags, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(simclr.run, *flags)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_npz_is_one_line(tmp_path, error_of):
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 and no more")
    line = error_of(simclr.run, "--dataset", tmp_path / "broken.npz", "--out", tmp_path / "run")
    assert "broken.npz: not a readable .npz file" in line
    assert not (tmp_path / "run").exists()


# ==================================================================================================
# The run folder
# ==================================================================================================


def test_a_file_in_the_place_of_the_folder_is_one_line(tiny_shapes, tmp_path, error_of):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file/run"):
        line = error_of(simclr.run, *words(tiny_shapes, out))
        assert f"--out {out}: cannot be used" in line
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")
@pytest.mark.parametrize("name", ["views.png", "untrained.pt", "checkpoint.pt", "encoder.pt"])
def test_a_full_disk_is_one_line(tiny_shapes, tmp_path, error_of, name):
    run = tmp_path / "run"
    run.mkdir()
    (run / f"{name}.partial").symlink_to("/dev/full")
    line = error_of(simclr.run, *words(tiny_shapes, run))
    assert f"{run / name}: cannot be written (No space left on device)" in line
    assert not [file for file in files(run) if file.endswith("partial")]


@pytest.mark.skipif(os.name != "posix", reason="there are no such limits")
def test_a_disk_that_fills_up_leaves_the_last_checkpoint(tiny_shapes, tmp_path, error_of):
    import resource

    run = tmp_path / "run"
    with killed_at(simclr, "nt_xent", 5):  # of 3 steps an epoch
        small_run(tiny_shapes, run)
    before = {path: path.read_bytes() for path in run.iterdir() if path.suffix != ".lock"}
    size = (run / "checkpoint.pt").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        line = error_of(simclr.run, "--resume", run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{run}/checkpoint.pt: cannot be written (File too large)" in line
    after = {path: path.read_bytes() for path in run.iterdir() if path.suffix != ".lock"}
    assert after.keys() == before.keys()  # nothing partial
    assert after[run / "checkpoint.pt"] == before[run / "checkpoint.pt"]
    resumed(run)


def test_a_fault_within_a_run_is_not_blamed_on_its_folder(tiny_shapes, tmp_path, monkeypatch):
    def fault(*_):
        raise OSError("a font is missing")

    monkeypatch.setattr(simclr, "save_neighbors", fault)
    with pytest.raises(OSError, match="a font is missing"):
        small_run(tiny_shapes, tmp_path / "run")
    assert files(tmp_path / "run") == RESULTS - {"neighbors.png"}  # all else is there


def test_an_evaluation_that_fails_leaves_the_encoder(tiny_shapes, tmp_path):
    with killed_at(simclr, "evaluate", 2):
        small_run(tiny_shapes, tmp_path / "run")
    assert "encoder.pt" in files(tmp_path / "run")


def test_a_run_is_not_overwritten(tiny_shapes, finished, error_of):
    before = {path: path.read_bytes() for path in finished.iterdir()}
    line = error_of(simclr.run, *words(tiny_shapes, finished))
    assert f"--out {finished}: holds a run; go on with --resume {finished}" in line
    assert before == {path: path.read_bytes() for path in finished.iterdir()}


@pytest.mark.skipif(os.name != "posix", reason="there are no such locks")
def test_two_runs_never_write_to_one_folder(tiny_shapes, finished, error_of):
    flags = words(tiny_shapes, finished)
    with simclr.run_folder(simclr.parse_args(["--resume", str(finished)])):
        assert "another run is writing there" in error_of(simclr.run, *flags)
        assert "another run is writing there" in error_of(simclr.run, "--resume", finished)
    resumed(finished)


def nan_loss(patch):
    """In the second of the epochs of 3 steps."""
    calls = []
    loss = simclr.nt_xent

    def nt_xent(*args):
        calls.append(args)
        return loss(*args) * (math.nan if len(calls) == 5 else 1)

    patch.setattr(simclr, "nt_xent", nt_xent)


def infinite_weights(patch):
    """After the last step of the second epoch, behind the last loss."""
    calls = []
    step = torch.optim.AdamW.step

    def broken(optimizer, closure=None):
        step(optimizer)
        calls.append(optimizer)
        if len(calls) == 6:
            optimizer.param_groups[0]["params"][0].data.fill_(math.inf)

    patch.setattr(torch.optim.AdamW, "step", broken)


@pytest.mark.parametrize("fault", [nan_loss, infinite_weights])
def test_a_loss_that_is_not_finite_stops_the_run(tiny_shapes, tmp_path, monkeypatch, fault):
    fault(monkeypatch)
    with pytest.raises(common.UserError, match="loss is not finite in epoch 2"):
        small_run(tiny_shapes, tmp_path / "run", "--epochs", 3, "--eval-every", 3)
    kept = load(tmp_path / "run/checkpoint.pt")
    assert len(kept["history"]) == 1
    assert all(value.isfinite().all() for value in kept["model"].values())


# ==================================================================================================
# Few labels, no labels, no head
# ==================================================================================================


def test_rows_of_few_labels(tiny_shapes, tmp_path, monkeypatch, capsys):
    scores = iter([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    monkeypatch.setattr(simclr, "fine_tune", lambda *_: (next(scores), None))
    calls = spy(monkeypatch, simclr, "fine_tune")
    summary = small_run(tiny_shapes, tmp_path / "run", "--epochs", 1, "--labels", 0.1, 1, 3)
    some, one, few = summary["semi_supervised"]
    assert 9 <= some["labels"] <= 11
    assert (one["labels"], few["labels"]) == (10, 30)
    assert (some["fine_tuned"], some["from_scratch"]) == (0.1, 0.2)
    assert (one["fine_tuned"], one["from_scratch"]) == (0.3, 0.4)
    assert "labels 10  linear_probe" in capsys.readouterr().out
    trained = load(tmp_path / "run/encoder.pt")
    torch.manual_seed(0)
    untrained = dict(simclr.SimCLR(simclr.parse_args([])).encoder.state_dict())
    for (encoder, D, _, rows, _), expected in zip(calls, 3 * [trained, untrained], strict=True):
        assert D == 128
        assert len(rows) in (some["labels"], 10, 30)
        assert_same(dict(encoder.state_dict()), expected)


def test_fine_tuning_learns_from_its_rows_only():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    images = torch.randint(60, (60, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images[torch.arange(60), labels] += 150  # red, green or blue
    data = common.Dataset(images[:40], labels[:40], images[40:], labels[40:], ["r", "g", "b"])
    flags = ["--batch-size", "6", "--crop", "0.5", "--lr", "0.04", "--jitter-strength", "0"]
    args = simclr.parse_args([*flags, "--gray", "0"])
    rows = torch.arange(10, 22)
    encoder, D = simclr.build_encoder("small")
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    data.train_images[:10] = 0
    data.train_images[22:] = 0
    data.train_labels[rows] = (data.train_labels[rows] + 1) % 3  # a rule of their own
    data.test_labels = (data.test_labels + 1) % 3
    accuracy, model = simclr.fine_tune(encoder, D, data, rows, args)
    assert accuracy > 0.9
    assert_same(dict(encoder.state_dict()), before)
    predicted = simclr.features(model, data.test_images).argmax(1)
    assert (predicted == data.test_labels).float().mean() == pytest.approx(accuracy)


def test_without_a_head_there_is_one_probe(tiny_shapes, tmp_path):
    summary = small_run(tiny_shapes, tmp_path / "run", "--epochs", 1, "--projection", "none")
    assert set(summary["trained"]) == {"knn", "linear_probe"}


def test_the_head_is_probed_as_it_is_at_test_time(tiny_shapes):
    data = common.load_dataset(str(tiny_shapes))
    x = common.normalize(data.train_images / 255)
    test_x = common.normalize(data.test_images / 255)
    model = simclr.SimCLR(simclr.parse_args([])).train()
    model(x)  # moves the statistics of batch norm
    accuracies, neighbors = simclr.evaluate(model.encoder, data, model.projector)
    model.eval()
    labels = data.train_labels, data.test_labels
    with torch.no_grad():
        h = model.encoder(x)
        test_h = model.encoder(test_x)
        z = model(x)
        test_z = model(test_x)
    assert accuracies["knn"] == simclr.knn_accuracy(h, labels[0], test_h, labels[1])
    assert accuracies["knn_z"] == simclr.knn_accuracy(z, labels[0], test_z, labels[1])
    assert torch.equal(neighbors, simclr.nearest(h, test_h[data.examples()]))


def save_album(folder, count, captions=False):
    """A folder of images without classes."""
    folder.mkdir(parents=True)
    images = common.load_dataset("shapes").train_images[:count]
    for i, image in enumerate(images):
        torchvision.utils.save_image(image / 255, folder / f"{i:02}.png")
    if captions:
        lines = [f"{i:02}.png,a shape,{'test' if i % 5 == 0 else 'train'}" for i in range(count)]
        (folder / "captions.csv").write_text("\n".join(["image,caption,split", *lines]))


def test_plain_images_are_pretrained_on(tmp_path, capsys, error_of):
    album = tmp_path / "album"
    save_album(album, 70)
    flags = "--epochs", 1, "--data-dir", tmp_path / "cache"
    summary = small_run(album, album / "run", *flags)
    assert summary["trained"] == summary["untrained"] == {}
    assert "most_frequent_class" not in summary
    assert "knn" not in summary["history"][0]
    assert files(album / "run") == RESULTS
    small_run(album, album / "again", *flags)  # the figures are not learned from
    out = capsys.readouterr().out
    assert out.count(": 63 images, 32 x 32, 0 labels") == 2
    line = error_of(simclr.run, *words(album, album / "labels", *flags), "--labels", "0.1")
    assert "error: labels 0.1: the dataset has no labels" in line


@pytest.mark.parametrize("kind", ["ten images", "one class", "captions"])
def test_small_folders_end_well(tmp_path, kind):
    album = tmp_path / "album"
    folder = album / "train/cats" if kind == "one class" else album
    save_album(folder, 10, captions=kind == "captions")
    flags = ["--dataset", str(album), "--encoder", "small", "--data-dir", str(tmp_path / "data")]
    args = simclr.parse_args([*flags, "--epochs", "1", "--out", str(tmp_path / "run")])
    assert simclr.main(args)["trained"] == {}
    assert files(tmp_path / "run") == RESULTS


def test_a_test_set_of_one_class_ends_well(tiny_shapes, tmp_path):
    arrays = dict(np.load(tiny_shapes))
    arrays |= {"test_images": arrays["test_images"][:1], "test_labels": arrays["test_labels"][:1]}
    np.savez(tmp_path / "one.npz", **arrays)
    summary = small_run(tmp_path / "one.npz", tmp_path / "run", "--epochs", 1)
    assert summary["most_frequent_class"] == 1
    assert files(tmp_path / "run") == RESULTS


def test_stl10_pretrains_on_all_and_probes_with_its_labels(tiny_shapes, tmp_path):
    arrays = dict(np.load(tiny_shapes))
    np.savez(tmp_path / "part.npz", **arrays | {"train_labels": arrays["train_labels"][:64]})
    less = {k: v[:64] if k.startswith("train") else v for k, v in arrays.items()}
    np.savez(tmp_path / "less.npz", **less)
    part = small_run(tmp_path / "part.npz", tmp_path / "part", "--epochs", 1)
    less = small_run(tmp_path / "less.npz", tmp_path / "less", "--epochs", 1)
    assert part["untrained"] == less["untrained"]
    assert part["history"][0]["loss"] != less["history"][0]["loss"]
    for summary, steps in ((part, 3), (less, 2)):
        images = summary["images_per_second"] * summary["history"][0]["seconds"]
        assert round(images / 32) == steps


# ==================================================================================================
# Figures
# ==================================================================================================


@pytest.fixture
def sheets(monkeypatch):
    """What would be drawn: {title: images} of every sheet."""
    drawn = []
    monkeypatch.setattr(simclr, "save_sheet", lambda _, blocks: drawn.append(blocks))
    return drawn


@pytest.mark.parametrize("rows", [1, 8])
def test_sheets_have_a_tile_for_each_image(tmp_path, rows):
    blocks = {"one": torch.rand(rows, 1, 3, 32, 32), "three": torch.rand(rows, 3, 3, 32, 32)}
    simclr.save_sheet(tmp_path / "sheet.png", blocks)
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = torchvision.transforms.functional.to_tensor(sheet)
    zoom = 4  # pixels of a sheet for one of an image, and between tiles
    tile = zoom * 32
    assert pixels.shape[1] == 28 + rows * (tile + zoom) + zoom + 16
    assert pixels.shape[2] == 2 * 16 + 4 * (tile + zoom) + 2 * zoom
    last = blocks["three"][-1, -1].repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    bottom = -16 - zoom
    right = -8 - zoom
    found = pixels[:, bottom - tile : bottom, right - tile : right]
    torch.testing.assert_close(found, last, atol=0.51 / 255, rtol=0)
    second = 16 + tile + 2 * zoom  # where the second block begins
    titles = [pixels[:, :28, :second], pixels[:, :28, second:]]
    assert all(title.min() < 0.2 for title in titles)


def test_views_are_rows_of_pairs(tiny_shapes, tmp_path, sheets):
    images = common.load_dataset(str(tiny_shapes)).train_images[:71]
    simclr.save_views(tmp_path / "views.png", images, simclr.parse_args([]))
    ((first, *pairs),) = [list(blocks.values()) for blocks in sheets]
    assert list(sheets[0]) == ["training image", "pair 1", "pair 2", "pair 3", "pair 4"]
    assert torch.equal(first[:, 0], images[::10] / 255)  # of all parts of a sorted folder
    for pair in pairs:
        assert pair.shape == (8, 2, 3, 32, 32)
        assert not torch.equal(pair[:, 0], pair[:, 1])
        assert not torch.equal(pair, pairs[0][:, [1, 0]])


def numbered(block):
    """The numbers of images whose pixels are 6 times their number."""
    return (block[:, :, 0, 4, 4] * 255 / 6).round().long()


@pytest.fixture
def forty():
    """Images that show their number, of two classes, and their angles as features."""
    images = 6 * torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).expand(40, 3, 4, 4)
    angle = torch.linspace(0, 3, 40)
    return images, torch.arange(40) // 20, torch.stack([angle.cos(), angle.sin()], dim=1)


def test_neighbors_are_the_nearest_and_framed_by_class(forty, tmp_path, sheets):
    images, labels, h = forty
    data = common.Dataset(images, labels, images[[5, 30]], torch.tensor([0, 1]), ["a", "b"])
    shuffled = h[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    queries = h[[5] * 5 + [30] * 5]
    rows = [simclr.nearest(x, queries) for x in (shuffled, h)]
    simclr.save_neighbors(tmp_path / "n.png", data, *rows)
    query, before, after = sheets[0].values()
    assert numbered(query)[:, 0].tolist() == [5] * 5 + [30] * 5
    assert after.shape[:2] == (10, 6)
    assert [set(row[:3]) for row in numbered(after)[4:6].tolist()] == [{4, 5, 6}, {29, 30, 31}]
    same = labels[numbered(before)] == labels[numbered(query)]
    assert not same.all()
    blue = before[:, :, 2, 0, 0] > before[:, :, 0, 0, 0]
    assert torch.equal(blue, same)
    assert all(": blue is the same class" in title for title in list(sheets[0])[1:])


def test_neighbors_without_classes_have_no_colors(forty, tmp_path, sheets):
    images, _, h = forty
    nothing = torch.empty(0, dtype=torch.int64)
    data = common.Dataset(images, nothing, images[[5, 30]], torch.arange(2), [])
    rows = simclr.nearest(h, h[[5, 30]])
    simclr.save_neighbors(tmp_path / "n.png", data, rows, rows)
    _, _, after = sheets[0].values()
    assert [set(row[:3]) for row in numbered(after).tolist()] == [{4, 5, 6}, {29, 30, 31}]
    assert (after[..., 0, 0] == 1).all()
    assert list(sheets[0]) == ["test image", "nearest before training", "nearest after training"]


# ==================================================================================================
# Resume
# ==================================================================================================

KILLS = [
    (simclr, "nt_xent", 5),  # of 3 steps an epoch
    (simclr, "once", 1),
    (Path, "replace", 3),  # of views.png, untrained.pt, args.json, data.json, metrics.jsonl,
    (Path, "replace", 6),  # checkpoint.pt, metrics.jsonl
    (Path, "replace", 8),  # checkpoint.pt, encoder.pt ...
    (Path, "replace", 9),
]


@pytest.mark.parametrize(("module", "name", "call"), KILLS)
def test_a_resumed_run_ends_as_an_unbroken_one(tiny_shapes, unbroken, tmp_path, module, name, call):
    run = tmp_path / "run"
    with killed_at(module, name, call):
        small_run(tiny_shapes, run)
    assert not (run / "summary.json").exists()
    if (run / "args.json").exists():
        resumed(run)
    else:
        small_run(tiny_shapes, run)  # nothing to go on from
    assert_ended_alike(run, unbroken, "untrained", "trained")
    assert files(run) - {f for f in files(run) if f.endswith("partial")} == files(unbroken)


def test_a_torn_file_is_never_left_under_its_name(tiny_shapes, tmp_path):
    with killed_at(Path, "replace", 8):  # the second checkpoint is written, but not yet renamed
        small_run(tiny_shapes, tmp_path / "run")
    assert (tmp_path / "run/checkpoint.pt.partial").exists()
    assert len(load(tmp_path / "run/checkpoint.pt")["history"]) == 1


def test_the_untrained_encoder_is_measured_once(finished, monkeypatch):
    before = json.loads((finished / "summary.json").read_text())
    calls = spy(monkeypatch, simclr, "evaluate")
    views = (finished / "views.png").stat().st_mtime_ns
    summary = resumed(finished)
    assert len(calls) == 1
    assert summary["untrained"] == before["untrained"]
    assert summary["trained"] == before["trained"]
    assert (finished / "views.png").stat().st_mtime_ns == views


def test_later_probes_begin_as_in_a_run_that_was_not_stopped(tmp_path):
    path = tmp_path / "untrained.pt"
    torch.manual_seed(0)
    first = simclr.once(path, torch.rand, 3)
    other = simclr.once(path, torch.rand, 3)  # before the first checkpoint: a new run
    assert not torch.equal(first, other)
    following = torch.rand(3)
    (tmp_path / "checkpoint.pt").touch()
    torch.manual_seed(1)
    assert torch.equal(simclr.once(path, torch.rand, 3), other)
    assert torch.equal(torch.rand(3), following)


def test_a_finished_run_can_be_asked_about_few_labels(finished, unbroken, monkeypatch):
    monkeypatch.setattr(simclr, "fine_tune", lambda *_: (0.5, None))
    before = json.loads((unbroken / "summary.json").read_text())
    summary = resumed(finished, "--labels", "0.2", "2")
    assert summary["trained"] == before["trained"]
    assert summary["history"] == before["history"]
    assert [row["labels"] for row in summary["semi_supervised"]] == [18, 20]
    assert summary["command"] == before["command"] + f" --resume {finished} --labels 0.2 2"
    checkpoints = [folder / "checkpoint.pt" for folder in (finished, unbroken)]
    assert checkpoints[0].read_bytes() == checkpoints[1].read_bytes()


TRAINING_FLAGS = {
    "dataset": "shapes", "image_size": "64", "encoder": "small", "init": "encoder.pt",
    "epochs": "9", "batch_size": "16", "optimizer": "sgd", "lr": "0", "weight_decay": "1",
    "warmup": "0.2", "temperature": "1", "projection": "none", "crop": "0.5",
    "jitter_strength": "0", "gray": "1", "blur": "1", "half_size_until": "1", "eval_every": "1",
    "seed": "1", "out": "other",
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINING_FLAGS)
def test_a_resumed_run_takes_no_flag_that_trains(unbroken, error_of, name):
    before = {path: path.read_bytes() for path in unbroken.iterdir()}
    flag = simclr.option(name)
    line = error_of(simclr.run, "--resume", unbroken, flag, TRAINING_FLAGS[name])
    assert f"{flag}: a resumed run keeps the flags it was started with" in line
    assert f"--init {unbroken}/encoder.pt" in line
    assert before == {path: path.read_bytes() for path in unbroken.iterdir()}


def test_every_other_flag_goes_with_resume(finished):
    others = {"data_dir", "labels", "device", "compile", "resume"}
    assert simclr.flags_of(simclr.Args).keys() == TRAINING_FLAGS.keys() | others
    flags = ["--resume", str(finished), "--device", "cpu", "--data-dir", "x", "--no-compile"]
    args = simclr.parse_args(flags)
    assert (args.out, args.resume, args.data_dir) == (str(finished), str(finished), "x")


def test_images_that_changed_cannot_be_resumed(tiny_shapes, tmp_path, error_of):
    path = tmp_path / "mine.npz"
    shutil.copy(tiny_shapes, path)
    run = tmp_path / "run"
    small_run(path, run)
    before = {path: path.read_bytes() for path in run.iterdir()}
    arrays = dict(np.load(tiny_shapes))
    more = {k: np.concatenate([v, v[:9]]) for k, v in arrays.items() if "train" in k}
    for changed in (more, {"train_images": arrays["train_images"][::-1]}):
        np.savez(path, **arrays | changed)
        line = error_of(simclr.run, "--resume", run)
        assert f"checkpoint.pt: --dataset {path} has changed since the run began" in line
    assert before == {path: path.read_bytes() for path in run.iterdir()}


def test_a_torn_checkpoint_cannot_be_resumed(finished, error_of):
    whole = (finished / "checkpoint.pt").read_bytes()
    for content in (whole[:5000], b"", b"text"):
        (finished / "checkpoint.pt").write_bytes(content)
        line = error_of(simclr.run, "--resume", finished)
        assert "checkpoint.pt: is not a checkpoint of this run" in line


def test_a_run_of_another_script_cannot_be_resumed(finished, tmp_path, error_of):
    other = tmp_path / "moco"
    other.mkdir()
    for content in (dataclasses.asdict(moco.parse_args([])), {"no": "flags"}):
        (other / "args.json").write_text(json.dumps(content))
        line = error_of(simclr.run, "--resume", other)
        assert f"--resume {other}: there is no run of simclr.py in this folder" in line
    relative = dataclasses.asdict(simclr.parse_args([])) | {"script": "relatives/vicreg.py"}
    (other / "args.json").write_text(json.dumps(relative))
    assert "there is no run of simclr.py" in error_of(simclr.run, "--resume", other)
    (finished / "args.json").write_text("nothing")
    assert "there is no run of simclr.py" in error_of(simclr.run, "--resume", finished)


@pytest.mark.parametrize("end", [KeyboardInterrupt, BrokenPipeError])  # Ctrl-C, `| head`
def test_a_run_that_is_stopped_says_how_to_go_on(tiny_shapes, tmp_path, monkeypatch, end):
    def interrupted(*_):
        raise end

    monkeypatch.setattr(common, "batches", interrupted)
    monkeypatch.setattr(sys, "argv", ["simclr.py", *words(tiny_shapes, tmp_path / "run")])
    stdout = sys.stdout
    monkeypatch.setattr(sys, "stdout", stdout)  # puts it back
    with pytest.raises(SystemExit, match="stopped; --resume with the run folder goes on"):
        simclr.run()
    assert (sys.stdout is stdout) == (end is KeyboardInterrupt)  # a notebook goes on printing


# ==================================================================================================
# Weights to begin with
# ==================================================================================================


def test_a_run_begins_with_the_weights_of_another(unbroken, tiny_shapes, tmp_path):
    first = json.loads((unbroken / "summary.json").read_text())
    flags = "--init", unbroken / "encoder.pt"
    summary = small_run(tiny_shapes, tmp_path / "run", *flags)
    assert summary["untrained"]["knn"] == first["trained"]["knn"]
    assert summary["args"]["init"] == str(unbroken / "encoder.pt")
    assert records(tmp_path / "run") != records(unbroken)


def test_without_epochs_it_measures_only(unbroken, tiny_shapes, tmp_path):
    flags = "--init", unbroken / "encoder.pt", "--epochs", 0
    summary = small_run(tiny_shapes, tmp_path / "run", *flags)
    assert summary["history"] == []
    with pytest.raises(common.UserError, match="holds a run; go on with --resume"):
        small_run(tiny_shapes, tmp_path / "run")
    assert summary["trained"]["knn"] == summary["untrained"]["knn"]
    assert summary.keys() == {*KEYS.split(), "semi_supervised"} - {"images_per_second"}
    assert (tmp_path / "run/encoder.pt").read_bytes() == (unbroken / "encoder.pt").read_bytes()
    resumed(tmp_path / "run")


def test_from_scratch_is_from_scratch_with_init_too(unbroken, tiny_shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(simclr, "fine_tune", lambda *_: (0.5, None))
    calls = spy(monkeypatch, simclr, "fine_tune")
    flags = "--init", unbroken / "encoder.pt", "--epochs", 0, "--labels", 1
    small_run(tiny_shapes, tmp_path / "run", *flags)
    tuned, scratch = [encoder for encoder, *_ in calls]
    torch.manual_seed(0)
    untrained, _ = simclr.build_encoder("small")
    assert_same(dict(scratch.state_dict()), dict(untrained.state_dict()))
    assert_same(dict(tuned.state_dict()), load(unbroken / "encoder.pt"))


def save_large(path):
    """Images of 96 x 96, for which the encoder has torchvision's stem."""
    data = common.load_dataset("shapes")
    arrays = {}
    for split in ("train", "test"):
        images = getattr(data, f"{split}_images")[:20]
        large = images.repeat_interleave(3, 2).repeat_interleave(3, 3)
        arrays[f"{split}_images"] = large.permute(0, 2, 3, 1).numpy()
        arrays[f"{split}_labels"] = np.arange(20) % 10
    np.savez(path, **arrays)


def test_a_run_begins_with_torchvisions_weights(tmp_path):
    save_large(tmp_path / "large.npz")
    resnet = torchvision.models.resnet18()
    torch.save(resnet.state_dict(), tmp_path / "resnet18.pth")
    flags = ["--dataset", str(tmp_path / "large.npz"), "--init", str(tmp_path / "resnet18.pth")]
    args = simclr.parse_args([*flags, "--epochs", "0", "--out", str(tmp_path / "run")])
    simclr.main(args)
    resnet.fc = nn.Identity()
    assert_same(load(tmp_path / "run/encoder.pt"), dict(resnet.state_dict()))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("classifier", "does not fit --encoder small: Error(s) in loading state_dict for ResNet"),
        ("resnet18", 'Unexpected key(s) in state_dict: "layer1.1.conv1.weight"'),
        ("stem", "size mismatch for conv1.weight: copying a param with shape torch.Size([64, 3, 3"),
        ("list", "does not fit --encoder small: 'list' object has no attribute 'get'"),
        ("text", "does not fit --encoder small: "),
    ],
)
def test_weights_that_do_not_fit_are_named(tiny_shapes, tmp_path, error_of, content, message):
    small = simclr.build_encoder("small")[0].state_dict()
    contents = {
        "classifier": {"fc.weight": torch.zeros(2, 2)},
        "resnet18": torchvision.models.resnet18().state_dict(),
        "stem": small | {"conv1.weight": torch.zeros(64, 3, 3, 3)},
        "list": [1, 2],
    }
    path = tmp_path / "weights.pt"
    if content == "text":
        path.write_text("no weights")
    else:
        torch.save(contents[content], path)
    line = error_of(simclr.run, *words(tiny_shapes, tmp_path / "run", "--init", path))
    assert f"--init {path}: " in line
    assert message in line
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_does_not_need_the_file_any_more(unbroken, tiny_shapes, tmp_path):
    shutil.copy(unbroken / "encoder.pt", tmp_path / "weights.pt")
    small_run(tiny_shapes, tmp_path / "run", "--init", tmp_path / "weights.pt")
    (tmp_path / "weights.pt").unlink()
    resumed(tmp_path / "run")


# ==================================================================================================
# Several processes
# ==================================================================================================


def both_compute_gradients():
    """The gradient of the loss of half a batch in each process, averaged, is that of the batch."""
    x = draw(2, 12, 5)  # two views of twelve images
    torch.manual_seed(simclr.RANK)  # DistributedDataParallel makes the networks equal
    network = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double()
    network = nn.parallel.DistributedDataParallel(network)
    z1, z2 = network(x[:, simclr.RANK :: 2].flatten(0, 1)).chunk(2)
    loss = simclr.nt_xent(simclr.gather(z1), simclr.gather(z2), 0.3)
    part = torch.autograd.grad(loss, list(network.module.parameters()), retain_graph=True)
    loss.backward()
    order = [*range(0, 12, 2), *range(1, 12, 2)]  # as gather puts them together
    z1, z2 = network.module(x[:, order].flatten(0, 1)).chunk(2)
    whole = simclr.nt_xent(z1, z2, 0.3)
    assert loss.item() == pytest.approx(whole.item(), rel=1e-10)
    expected = torch.autograd.grad(whole, list(network.module.parameters()))
    for p, mine, gradient in zip(network.parameters(), part, expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-10, atol=1e-10)
        assert not torch.allclose(mine, gradient)


def both_train(data, folder):
    both_compute_gradients()
    args = simclr.parse_args([])
    assert_a_step_of_both_is_one_of_all(simclr, simclr.training_step, simclr.SimCLR, args)
    train_and_resume(simclr, words(data, folder, "--eval-every", 1), folder, "nt_xent")


def test_two_processes_do_what_one_does(tiny_shapes, tmp_path, in_two_processes):
    printed = in_two_processes(both_train, tiny_shapes, tmp_path)
    assert_resumed_in_both(tmp_path, printed)
    assert files(tmp_path / "run") == RESULTS
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["command"].startswith("torchrun --nproc-per-node 2 simclr.py --dataset")


def test_a_batch_is_shared_equally(tiny_shapes, tmp_path, monkeypatch):
    data = common.load_dataset(str(tiny_shapes))
    monkeypatch.setattr(simclr, "WORLD", 3)
    monkeypatch.setattr(simclr, "load_data", lambda *_: data)
    with pytest.raises(common.UserError, match="must be a multiple of 3, the number of processes"):
        small_run(tiny_shapes, tmp_path / "run")
