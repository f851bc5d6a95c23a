"""Probes of what shapes are drawn from: the factors, the probes, and runs of every method."""

import dataclasses
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import SHAPES, assert_same
from torch.testing import assert_close

import clip
import common
import dino
import simclr
from results import factors

KNOWN = ["kind of thing", "its color", "color of the background", "brighter than the background"]
KNOWN += ["size", "place, left-right", "place, up-down", "tilt"]
KNOWN += ["light, left-right", "light, up-down"]
MEASURED = ["kind of thing", "mean color", "light, left-right", "light, up-down"]
CHANGED = ["turned by 0, 90, 180, 270", "made gray", "noise added"]


@pytest.fixture(scope="module")
def drawn():
    return factors.draw()


# ==================================================================================================
# Factors
# ==================================================================================================


def test_the_scenes_are_those_of_the_images_of_shapes(drawn):
    (scenes, images), (test_scenes, test_images) = drawn
    data = SHAPES()
    assert torch.equal(images, data.train_images)
    assert torch.equal(test_images, data.test_images)
    assert torch.equal(scenes["color"], data.train_colors)
    assert torch.equal(test_scenes["label"], data.test_labels)


def test_a_gradient_of_light_is_seen_in_the_images(drawn):
    scenes, images = drawn[1]
    known = factors.known_factors(scenes)
    assert list(known) == KNOWN
    luma = common.luma(images / 255)[:, 0]
    right = luma[:, :, -2:].mean((1, 2)) - luma[:, :, :2].mean((1, 2))
    up = luma[:, :2].mean((1, 2)) - luma[:, -2:].mean((1, 2))
    for name, slope in {"light, left-right": right, "light, up-down": up}.items():
        assert torch.corrcoef(torch.stack([known[name][:, 0], slope]))[0, 1] > 0.9


def test_brightness_and_background_are_those_of_the_colors():
    colors = list(common.COLORS)
    white, black, red = (colors.index(name) for name in ("white", "black", "red"))
    scenes = common.sample_shapes(2, torch.Generator().manual_seed(0))
    scenes["color"] = torch.tensor([white, black])
    scenes["background"] = torch.tensor([[red, black], [red, white]])
    known = factors.known_factors(scenes)
    assert known["brighter than the background"].tolist() == [1, 0]
    mean = (torch.tensor(common.COLORS["red"]) + torch.tensor(common.COLORS["black"])) / 510
    assert torch.allclose(known["color of the background"][0], mean)


def test_color_and_light_of_photographs_are_measured():
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    images[0, 0, :, 4:] = 255  # red on the right
    images[1, :, 4:] = 255  # white at the bottom
    measured = factors.measured_factors(images, torch.tensor([3, 5]))
    assert list(measured) == MEASURED
    assert measured["kind of thing"].tolist() == [3, 5]
    assert measured["mean color"].tolist() == [[0.5, 0, 0], [0.5, 0.5, 0.5]]
    red = 0.2989  # its part of luma
    assert_close(measured["light, left-right"], torch.tensor([[red], [0]]))
    assert_close(measured["light, up-down"], torch.tensor([[0], [1.0]]), atol=1e-3, rtol=0)


def test_what_was_done_to_an_image_is_done_to_it():
    images = SHAPES().test_images[:200]
    generator = torch.Generator().manual_seed(0)
    content = factors.changed(images, generator)
    assert list(content) == CHANGED
    turned, k = content["turned by 0, 90, 180, 270"]
    assert k.bincount(minlength=4).min() > 30
    for image, original, quarters in zip(turned, images, k.tolist(), strict=True):
        assert torch.equal(image, original.rot90(quarters, (1, 2)))
    gray, done = content["made gray"]
    assert torch.equal((gray == gray[:, :1]).all((1, 2, 3)), done == 1)
    assert torch.equal(gray[done == 0], images[done == 0])
    noisy, done = content["noise added"]
    difference = (noisy.float() - images).std((1, 2, 3))
    assert difference[done == 1].min() > 10
    assert difference[done == 0].max() == 0


# ==================================================================================================
# Probes
# ==================================================================================================


def test_numbers_are_read_by_ridge_regression():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 8, generator=generator)
    y = x[:, :2] @ torch.tensor([[1.0, -2.0], [0.5, 3.0]]) + 7
    train = x[:300], y[:300], x[300:], y[300:]
    assert factors.probe(*train) > 0.999
    unrelated = torch.randn(500, 2, generator=generator)
    assert -0.2 < factors.probe(x[:300], unrelated[:300], x[300:], unrelated[300:]) < 0.05
    half = torch.cat([y[:, :1], unrelated[:, :1]], dim=1)
    assert 0.4 < factors.probe(x[:300], half[:300], x[300:], half[300:]) < 0.52
    constant = torch.cat([x, torch.ones(500, 1)], dim=1)
    assert factors.probe(constant[:300], y[:300], constant[300:], y[300:]) > 0.999


@pytest.mark.usefixtures("whole_probes")
def test_classes_are_read_by_the_linear_probe_of_the_scripts():
    y = torch.arange(300) % 3
    x = F.one_hot(y, 5).float()
    assert factors.probe(x[:200], y[:200], x[200:], y[200:]) == 1


def test_chance_is_the_most_frequent_class_or_the_mean():
    assert factors.chance(torch.tensor([0, 1, 1, 2])) == 0.5
    assert factors.chance(torch.tensor([[0.0], [1.0]])) == 0


# ==================================================================================================
# Runs
# ==================================================================================================


@pytest.fixture
def run_of(tmp_path, monkeypatch, tiny_shapes):
    """A function: the folder of an untrained run of a method, with a checkpoint if it trains."""

    def run(method, *flags):
        folder = tmp_path / f"{method}-shapes-seed0"
        words = ["--dataset", tiny_shapes, "--encoder", "small", "--batch-size", 32, *flags]
        words = [str(word) for word in [*words, "--epochs", 1, "--out", folder]]
        module, Model = factors.MODELS[method]
        if method in ("simclr", "moco", "mae", "dino"):
            module.main(module.parse_args(words))
        elif method in PARENTS:
            names = [name for name in ("training_step", "learn") if hasattr(module, name)]
            parts = {name: getattr(module, name) for name in names}
            args = PARENTS[method].parse_args(words, module.Args)
            PARENTS[method].main(args, Model=Model, **parts)
        else:
            rotnet = factors.rotnet
            args = rotnet.parse_args([*words, "--classifier-epochs", "1"], module.Args)
            monkeypatch.setattr(rotnet, "evaluate", lambda *_: [])
            monkeypatch.setattr(rotnet, "pretrain", pretrain_without_training)
            rotnet.main(args, Model=Model, pretext_loss=no_loss, save_predictions=no_figure)
        return folder

    return run


def pretrain_without_training(model, data, args, *_):
    for x in model.encoder.parameters():
        x.data += 0.01
    torch.save({"model": model.state_dict()}, f"{args.out}/checkpoint.pt")
    return []


def no_loss(*_):
    return {"loss": torch.zeros(())}


def no_figure(*_):
    pass


PARENTS = {"supcon": simclr, "lejepa": simclr, "ibot": dino}
PARTS = dict.fromkeys(("simclr", "supcon", "lejepa", "moco"), ["h", "z"])
PARTS |= {"mae": ["patch tokens"], "dino": ["all tokens"], "ibot": ["all tokens"]}
PARTS |= {"rotnet": ["block 1", "block 2", "block 3"]}


@pytest.mark.parametrize("method", factors.MODELS)
def test_the_networks_of_a_run_are_its_own(run_of, method):
    folder = run_of(method)
    summary, before, after = factors.networks(folder)
    assert summary["method"] == method
    assert list(before) == list(after) == PARTS.get(method, ["block 2"])
    images = SHAPES().test_images[:4]
    encoder = torch.load(folder / "encoder.pt", weights_only=True)
    for part, network in after.items():
        h = simclr.features(network, images)
        assert h.ndim == 2
        assert not torch.allclose(h, simclr.features(before[part], images))
    network = after["block 2" if method == "rotnet" else list(after)[0]]
    if method == "mae":
        network = network.encoder
    elif "block 2" in after:
        network = network[0]  # of the blocks and a pooling
        encoder = {name: x for name, x in encoder.items() if name[0] in "01"}
    assert_same(dict(network.state_dict()), encoder)


def test_a_run_without_a_head_or_a_checkpoint_has_h_only(run_of):
    folder = run_of("simclr", "--projection", "none")
    (folder / "checkpoint.pt").unlink()
    _, _, after = factors.networks(folder)
    assert list(after) == ["h"]
    encoder = torch.load(folder / "encoder.pt", weights_only=True)
    assert_same(dict(after["h"].state_dict()), encoder)


@pytest.mark.parametrize("method", factors.WITH_CAPTIONS)
def test_with_captions_there_is_a_common_space(tmp_path, method):
    module, Model = factors.WITH_CAPTIONS[method]
    args = clip.parse_args([], module.Args)
    model = Model(args, 10).eval()
    content = {"method": method, "args": dataclasses.asdict(args)}
    (tmp_path / "summary.json").write_text(json.dumps(content))
    torch.save({"best": model.state_dict()}, tmp_path / "checkpoint.pt")
    _, before, after = factors.networks(tmp_path)
    assert before == {}
    images = SHAPES().test_images[:4]
    space = simclr.features(after["common space"], images)
    x = common.normalize(images / 255)
    assert torch.allclose(space, model.encode_image(x), atol=1e-5)
    assert torch.allclose(simclr.features(after["h"], images), model.encoder(x), atol=1e-5)


def trained_on(folder, dataset):
    """Lets a run claim another dataset, as a test cannot train on the whole of it."""
    path = folder / "summary.json"
    summary = json.loads(path.read_text())
    summary["args"]["dataset"] = dataset
    path.write_text(json.dumps(summary))


def test_the_record_has_a_row_of_each_part_and_one_untrained(run_of, tmp_path, monkeypatch):
    folder = run_of("simclr")
    few = []
    for scenes, images in factors.draw():
        few.append(({key: value[:60] for key, value in scenes.items()}, images[:60]))
    monkeypatch.setattr(factors, "draw", lambda: few)
    monkeypatch.setattr(sys, "argv", ["results/factors.py", "runs/one"])
    other = folder.rename(tmp_path / "simclr-projection-mlp-seed0")
    trained_on(other, "shapes")
    factors.main([str(other), str(other), "--record", str(tmp_path / "factors.json")])
    record = json.loads((tmp_path / "factors.json").read_text())
    names = [(row["run"], row["part"], row["seed"]) for row in record["rows"]]
    run = "simclr-projection-mlp"
    assert names[0] == ("untrained ResNet", "h", 0)
    assert names[1:] == [(run, "h", 0), (run, "z", 0)] * 2
    for row in record["rows"]:
        assert list(row["scores"]) == list(record["chance"]) == KNOWN + CHANGED
        assert row["command"].startswith("python simclr.py --dataset")
    assert record["command"] == "python results/factors.py runs/one"
    assert 0.2 < record["chance"]["turned by 0, 90, 180, 270"] < 0.5
    assert record["chance"]["size"] == 0


def test_photographs_are_asked_for_what_their_pixels_show(run_of, tmp_path, monkeypatch):
    folder = run_of("moco")
    trained_on(folder, "cifar10")
    data = SHAPES()
    few = dataclasses.replace(
        data,
        train_images=data.train_images[:60],
        train_labels=data.train_labels[:60],
        test_images=data.test_images[:40],
        test_labels=data.test_labels[:40],
    )
    monkeypatch.setattr(common, "load_dataset", lambda name, data_dir: few)
    factors.main([str(folder), "--record", str(tmp_path / "factors.json")])
    record = json.loads((tmp_path / "factors.json").read_text())
    assert list(record["chance"]) == MEASURED + CHANGED
    assert [row["part"] for row in record["rows"]] == ["h", "z"]
    for row in record["rows"]:
        assert all(-9 < score <= 1 for score in row["scores"].values())


def test_runs_of_other_images_are_refused(tmp_path, capsys):
    folders = []
    for dataset in ("shapes", "cifar10", "mine.npz"):
        folder = tmp_path / dataset
        folder.mkdir()
        summary = {"method": "moco", "args": {"dataset": dataset, "data_dir": "data"}}
        (folder / "summary.json").write_text(json.dumps(summary))
        folders.append(str(folder))
    for some, found in {2: "cifar10, shapes", 3: "cifar10, mine.npz, shapes"}.items():
        with pytest.raises(SystemExit):
            factors.main(folders[:some])
        assert f"the runs are on {found}: all must be" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["nowhere"], "nowhere: is not the folder"),
        (["mine"], "mine: is a run of vicreg.py, not of simclr"),
        ([".", "--record", "no/x.json"], "no such folder"),
    ],
)
def test_what_cannot_be_measured_is_one_line(tmp_path, monkeypatch, capsys, words, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/summary.json").write_text('{"method": "vicreg"}')
    (tmp_path / "summary.json").write_text('{"method": "clip"}')
    with pytest.raises(SystemExit):
        factors.main(words)
    assert reason in capsys.readouterr().err.splitlines()[-1]
