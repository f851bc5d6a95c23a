"""What results/ asks of finished runs beside the factors: attention and masks, label sets, and the
bound on mutual information."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import SHAPES, assert_same, load, spy

import clip
import common
import dino
import mae
import rotnet
import simclr
from relatives import inpainting, lejepa
from results import (
    attention,
    circle,
    factors,
    few_shot,
    fine_tuned,
    gaussian,
    infonce,
    pictures,
    zero_shot,
)


@pytest.fixture(scope="module")
def few():
    """Scenes and images, training and test."""
    parts = []
    for scenes, images in factors.draw():
        parts.append(({key: x[:60] for key, x in scenes.items()}, images[:60]))
    return parts


# ==================================================================================================
# Mutual information
# ==================================================================================================
def test_the_score_is_the_ratio_of_two_gaussians():
    r = 0.6
    x, y = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    for i in range(3):
        for j in range(3):
            given_x = torch.distributions.Normal(r * x[i], math.sqrt(1 - r * r))
            alone = torch.distributions.Normal(0.0, 1.0)
            ratio = given_x.log_prob(y[j]).sum() - alone.log_prob(y[j]).sum()
            assert infonce.log_ratio(x, y, r)[i, j] == pytest.approx(ratio.item(), abs=1e-6)


def test_the_bound_reaches_a_small_information_and_log_n_below_a_large_one(tmp_path, monkeypatch):
    monkeypatch.setattr(infonce, "INFORMATION", (1, 8))
    monkeypatch.setattr(infonce, "CANDIDATES", [8, 128])
    infonce.main(["--record", str(tmp_path / "infonce.json")])
    record = json.loads((tmp_path / "infonce.json").read_text())
    bounds = {(row["information"], row["N"]): row["bound"] for row in record["rows"]}
    assert bounds[1, 128] == pytest.approx(1, abs=0.1)
    assert math.log(8) - 0.3 < bounds[8, 8] < math.log(8)
    assert math.log(128) - 0.5 < bounds[8, 128] < math.log(128)


# ==================================================================================================
# Projections
# ==================================================================================================
def test_alignment_and_uniformity_are_the_papers_means():
    z1, z2 = F.normalize(torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)), dim=2)
    distances = [(z1[n] - z2[n]).norm().item() ** 2 for n in range(5)]
    assert circle.alignment(z1, z2) == pytest.approx(sum(distances) / 5)
    pairs = [(m, n) for n in range(5) for m in range(n)]
    potentials = [math.exp(-2 * (z1[m] - z1[n]).norm().item() ** 2) for m, n in pairs]
    assert circle.uniformity(z1) == pytest.approx(math.log(sum(potentials) / len(pairs)))
    assert circle.uniformity(torch.ones(5, 2)) == 0


def test_the_best_uniformity_is_that_of_the_docstring():
    angles = torch.arange(2000) * 2 * math.pi / 2000
    best = circle.uniformity(torch.stack([angles.cos(), angles.sin()], dim=1))
    assert f"on a circle {best:.2f} at best" in circle.__doc__


def test_without_negatives_the_loss_is_the_distance_of_two_views():
    torch.manual_seed(0)
    args = simclr.parse_args([])
    model = circle.OnCircle(args)
    images = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8)
    losses = []
    generator = torch.Generator().manual_seed(0)
    terms = circle.without_negatives(model, images, args, generator, 0.5, losses.append)
    assert losses == [terms["loss"]]
    views = simclr.two_views(images, args, generator.manual_seed(0))
    z1, z2 = model(common.normalize(views)).chunk(2)
    assert z1.shape == (6, 2)
    cosines = [z1[n] @ z2[n] / z1[n].norm() / z2[n].norm() for n in range(6)]
    torch.testing.assert_close(losses[0], -sum(cosines) / 6)


def test_three_encoders_are_measured_on_the_same_images(tmp_path, monkeypatch):
    whole = SHAPES()
    part = {"train_captions": None, "test_captions": None}
    for split, count in (("train", 128), ("test", 50)):
        for name in ("images", "labels"):
            part[f"{split}_{name}"] = getattr(whole, f"{split}_{name}")[:count]
    monkeypatch.setattr(common, "shapes_dataset", lambda: dataclasses.replace(whole, **part))
    circle.main(["--epochs", "1", "--record", str(tmp_path / "circle.json")])
    record = json.loads((tmp_path / "circle.json").read_text())
    rows = {row["encoder"]: row for row in record["rows"]}
    assert rows.keys() == circle.STEPS.keys()
    assert len(record["labels"]) == len(rows["trained"]["angles"]) == 50
    assert len({row["alignment"] for row in rows.values()}) == 3  # none is another's


def test_densities_of_a_gaussian(monkeypatch):
    z = torch.randn(500_000, 2, generator=torch.Generator().manual_seed(0))
    model = torch.nn.Module()
    model.forward = lambda x: z
    ((density,)) = gaussian.densities(model, torch.zeros(1, 3, 4, 4), torch.tensor([[0.6], [0.8]]))
    for k, value in enumerate(density):
        s = -4 + 8 * (k + 0.5) / gaussian.BINS
        assert value == pytest.approx(math.exp(-s * s / 2) / math.sqrt(2 * math.pi), abs=0.01)


def test_a_run_of_lejepa_has_densities(tiny_shapes, tmp_path):
    run = tmp_path / "run"
    flags = ["--dataset", str(tiny_shapes), "--encoder", "small", "--epochs", "1"]
    args = simclr.parse_args([*flags, "--batch-size", "32", "--out", str(run)], lejepa.Args)
    simclr.main(args, lejepa.LeJEPA, lejepa.training_step)
    gaussian.main([str(run), "--record", str(tmp_path / "record.json")])
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["untrained"] != record["trained"]
    assert [len(density) for density in record["trained"]] == 3 * [gaussian.BINS]
    with pytest.raises(SystemExit, match="not a finished run of lejepa"):
        gaussian.main([str(tmp_path)])


# ==================================================================================================
# Fine-tuning
# ==================================================================================================
def test_both_are_fine_tuned_by_maes_recipe(tiny_shapes, tmp_path, monkeypatch):
    flags = ["--dataset", str(tiny_shapes), "--encoder", "small", "--epochs", "1"]
    flags += ["--batch-size", "32"]
    for figure in ("save_attention", "save_parts"):
        monkeypatch.setattr(dino, figure, lambda *_: None)
    runs = []
    for script in (mae, dino):
        runs.append(str(tmp_path / script.__name__))
        script.main(script.parse_args([*flags, "--out", runs[-1]]))
    calls = spy(monkeypatch, mae, "fine_tune")
    record = tmp_path / "record.json"
    fine_tuned.main([*runs, "--epochs", "1", "--record", str(record)])
    rows = json.loads(record.read_text())["rows"]
    assert [row["method"] for row in rows] == ["mae", "dino"]
    assert all(0 <= row[key] <= 1 for row in rows for key in ("fine_tuned", "from_scratch"))
    assert [layer_decay for *_, layer_decay in calls] == [0.75, 1.0] * 2
    for run, (trained, _, args, _), (scratch, *_) in zip(
        runs, calls[::2], calls[1::2], strict=True
    ):
        assert args.fine_tune_epochs == 1
        assert_same(dict(trained.state_dict()), load(Path(run) / "encoder.pt"))
        assert not torch.equal(trained.cls_token, scratch.cls_token)


# ==================================================================================================
# Attention
# ==================================================================================================
def test_a_mask_covers_what_differs_from_the_background():
    scenes = common.sample_shapes(20, torch.Generator().manual_seed(0))
    masks = attention.masks_of(scenes).unflatten(1, (32, 32))
    assert set(masks.unique().tolist()) == {0, 1}
    images = common.draw_shapes(scenes, torch.Generator().manual_seed(1)) / 255
    thing = (torch.tensor(list(common.COLORS.values())) / 255)[scenes["color"]]
    own = (images - thing[..., None, None]).norm(dim=1)
    assert own[masks == 1].median() < 0.1
    assert own[masks == 0].median() > 0.3


def test_overlap_by_hand():
    maps = torch.tensor([[[0.5, 0.3, 0.15, 0.05]]])
    assert attention.most(maps).tolist() == [[[1, 1, 0, 0]]]
    mask = torch.tensor([[1.0, 0, 1, 0]])
    assert attention.iou(attention.most(maps), mask).item() == pytest.approx(1 / 3)
    whole = attention.overlaps(torch.tensor([[[0.5, 0.0, 0.5, 0.0]]]), mask)
    assert whole.tolist() == [1, 0]  # the head, and its opposite
    assert attention.brighter_on_the_object(maps, mask).tolist() == [[1]]
    assert attention.brighter_on_the_object(maps, 1 - mask).tolist() == [[0]]


class Looks(torch.nn.Module):
    """Attention as if of two heads: to what is as white as the image, and to one place."""

    patch_size = 1

    def attention(self, x):
        light = F.adaptive_avg_pool2d(x.mean(1), 32).flatten(1)
        place = torch.zeros_like(light)
        place[:, 0] = 1
        return torch.stack([(light - light.amin(1, keepdim=True)) ** 4, place], dim=1)


def test_a_head_is_chosen_on_training_images_and_measured_on_test(monkeypatch):
    scenes = common.sample_shapes(20, torch.Generator().manual_seed(0))
    colors = list(common.COLORS)
    scenes["color"][:] = colors.index("white")
    scenes["background"][:] = colors.index("black")
    images = common.draw_shapes(scenes, torch.Generator().manual_seed(1))
    monkeypatch.setattr(dino, "as_patches", lambda x, _: x / 255)
    row = attention.measure(Looks(), (scenes, images), (scenes, 255 - images))
    assert row["chosen"] == {"head": 1, "opposite": False}
    assert row["iou_of_the_chosen"] == row["iou_of_heads"][0] < 0.1  # test images are negatives
    assert row["iou_of_their_opposites"][0] > 0.3
    row = attention.measure(Looks(), (scenes, images), (scenes, images))
    assert row["iou_of_the_chosen"] > 0.5
    assert row["looks_at_brighter_objects"][0] == 1


def test_the_mean_mask_is_a_guess_without_an_image(few):
    guesses = attention.guess(*few)
    share = attention.masks_of(few[1][0]).mean().item()
    assert guesses["all_of_the_image"] == pytest.approx(share, abs=1e-5)
    assert share + 0.1 < guesses["mean_mask"] < 0.6


def test_runs_before_and_after_training_are_in_the_record(few, tmp_path, monkeypatch):
    monkeypatch.setattr(factors, "draw", lambda: few)
    summary = {"command": "python dino.py", "args": {"seed": 3}}
    parts = {"all tokens": Looks()}
    monkeypatch.setattr(factors, "networks", lambda _: (summary, parts, parts))
    monkeypatch.setattr(factors, "check", lambda *_: None)
    attention.main(["run", "--record", str(tmp_path / "attention.json")])
    (run,) = json.loads((tmp_path / "attention.json").read_text())["runs"]
    assert (run["command"], run["seed"]) == ("python dino.py", 3)
    assert run["untrained"] == run["trained"]
    assert len(run["trained"]["iou_of_heads"]) == 2


# ==================================================================================================
# Zero-shot
# ==================================================================================================
def words_of(text):
    return set(re.findall(r"[a-z-]+", text))


def test_every_right_answer_is_what_the_captions_say(few):
    scenes, _ = few[1]
    sentences = [words_of(texts[-1]) for texts in SHAPES().test_captions[:60]]
    for prompts, right in zero_shot.questions(scenes).values():
        assert len(set(prompts)) == len(prompts)
        everywhere = set.intersection(*map(words_of, prompts))
        for sentence, answers in zip(sentences, right.tolist(), strict=True):
            for answer in answers:
                assert words_of(prompts[answer]) - everywhere <= sentence


def test_open_places_are_filled_with_all_that_fits():
    texts = zero_shot.filled("there is a {color} {kind}")
    assert len(texts) == 100
    assert {"there is an orange arrow", "there is a red star"} <= set(texts)
    assert zero_shot.filled("there is a arrow") == ["there is an arrow"]


def test_an_answer_is_the_nearest_prompt(monkeypatch):
    features = {"one": [1.0, 0.0], "two": [0.0, 1.0]}

    def embed_texts(model, tokenizer, texts):
        return torch.tensor([features[text] for text in texts])

    monkeypatch.setattr(clip, "embed_texts", embed_texts)
    x = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    right = torch.tensor([[0], [1], [1]])
    assert zero_shot.accuracy(None, None, x, ["one", "two"], right) == pytest.approx(2 / 3)
    both = torch.tensor([[0, 1]] * 3)
    assert zero_shot.accuracy(None, None, x, ["one", "two"], both) == 1


def test_a_run_is_asked_all_questions(few, tmp_path, monkeypatch):
    data = SHAPES()
    args = clip.parse_args([])
    tokenizer = clip.Tokenizer(data.train_captions, args.context)
    model = clip.CLIP(args, 4 + len(tokenizer.words)).eval()
    monkeypatch.setattr(factors, "draw", lambda: few)
    monkeypatch.setattr(clip, "load_run", lambda _: (model, tokenizer, args))
    monkeypatch.setattr(factors, "check", lambda *_: None)
    zero_shot.main(["run", "--record", str(tmp_path / "zero-shot.json")])
    record = json.loads((tmp_path / "zero-shot.json").read_text())
    (run,) = record["runs"]
    assert list(run["accuracy"]) == list(record["chance"])
    assert record["chance"]["kind and color"] == 0.01
    assert record["chance"]["a color of the background"] == 0.2
    assert all(0 <= value <= 1 for value in run["accuracy"].values())


@pytest.mark.parametrize("program", [attention, few_shot, zero_shot])
def test_a_folder_without_a_run_of_the_method_is_one_line(tmp_path, capsys, program):
    (tmp_path / "summary.json").write_text('{"method": "mae"}')
    with pytest.raises(SystemExit):
        program.main([str(tmp_path)])
    assert ": is a run of mae.py, not of " in capsys.readouterr().err


def test_a_record_without_a_place_is_one_line(capsys):
    with pytest.raises(SystemExit):
        infonce.main(["--record", "nowhere/infonce.json"])
    assert "--record nowhere/infonce.json: there is no such folder" in capsys.readouterr().err


# ==================================================================================================
# Few labels
# ==================================================================================================


def test_few_shot_is_the_mean_of_three_draws_for_each_count(monkeypatch):
    y = torch.arange(40) % 2
    h = torch.arange(40.0)[:, None]
    asked = []

    def probed(h, y, test_h, test_y):
        asked.append((h[:, 0].long(), y))
        return len(asked) / 100

    monkeypatch.setattr(simclr, "linear_probe", probed)
    result = few_shot.few_shot(h, y, h, y)
    assert result == pytest.approx({1: 0.02, 2: 0.05, 4: 0.08, 8: 0.11, 16: 0.14})
    for number, (rows, labels) in enumerate(asked):
        count, seed = few_shot.COUNTS[number // 3], number % 3
        assert rows.tolist() == common.labelled_rows(y, count, seed).tolist()
        assert labels.tolist() == (rows % 2).tolist()


def test_methods_are_asked_with_the_same_few_labels(few, tmp_path, monkeypatch):
    args = simclr.parse_args([])
    folder = tmp_path / "simclr"
    run_of(folder, simclr, simclr.SimCLR(args), args)
    content = json.loads((folder / "summary.json").read_text()) | {"trained": {"zero_shot": 0.9}}
    (folder / "summary.json").write_text(json.dumps(content))
    monkeypatch.setattr(factors, "draw", lambda: few)
    monkeypatch.setattr(few_shot, "COUNTS", (1, 2))
    few_shot.main([str(folder), "--record", str(tmp_path / "few-shot.json")])
    (row,) = json.loads((tmp_path / "few-shot.json").read_text())["rows"]
    _, _, trained = factors.networks(folder)
    (scenes, images), (test_scenes, test_images) = few
    h, test_h = [simclr.features(trained["h"], x) for x in (images, test_images)]
    scores = few_shot.few_shot(h, scenes["label"], test_h, test_scenes["label"])
    assert row["few_shot"] == {str(count): value for count, value in scores.items()}
    assert (row["method"], row["seed"], row["zero_shot"]) == ("simclr", 0, 0.9)


# ==================================================================================================
# Pictures
# ==================================================================================================
def run_of(folder, module, model, args):
    folder.mkdir()
    torch.save({"model": model.state_dict()}, folder / "checkpoint.pt")
    content = {"method": module.__name__.split(".")[-1], "args": dataclasses.asdict(args)}
    (folder / "summary.json").write_text(json.dumps(content))
    return str(folder)


@pytest.fixture
def sheet(tmp_path, monkeypatch):
    """A function: {title: images} that pictures.py draws of run folders."""
    sheets = []
    monkeypatch.setattr(rotnet, "save_sheet", lambda _, blocks: sheets.append(blocks))

    def drawn(*folders):
        pictures.main(list(folders))
        return sheets.pop()

    return drawn


def test_a_picture_has_the_reconstructions_of_every_ratio(sheet, tiny_shapes, tmp_path):
    folders = []
    for ratio in (0.25, 0.9):
        flags = ["--dataset", str(tiny_shapes), "--encoder", "small", "--patch-size", "4"]
        args = mae.parse_args([*flags, "--mask-ratio", str(ratio)])
        folders.append(run_of(tmp_path / f"{ratio}", mae, mae.build_mae(args, 32), args))
    blocks = sheet(*folders)
    assert list(blocks) == ["25 % masked", "90 % masked", "as it is"]
    few, many, (whole) = blocks.values()
    assert few.shape == many.shape == (5, 2, 3, 32, 32)
    assert whole.shape == (5, 1, 3, 32, 32)
    data = common.load_dataset(str(tiny_shapes))
    assert torch.equal(whole[:, 0], data.test_images[data.examples()[:5]] / 255)
    visible = [(images[:, 0] == whole[:, 0]).float().mean() for images in (few, many)]
    assert visible[0] == pytest.approx(0.75, abs=0.02)
    assert visible[1] == pytest.approx(0.1, abs=0.03)


def test_a_picture_has_the_same_holes_filled_by_every_run(sheet, tmp_path):
    folders = []
    for weight in ("0", "1"):
        args = rotnet.parse_args(["--adversarial", weight], inpainting.Args)
        model = inpainting.ContextEncoder(args)
        folders.append(run_of(tmp_path / weight, inpainting, model, args))
    blocks = sheet(*folders)
    assert list(blocks) == ["with a hole", "no adversary", "weight 1", "as it is"]
    hole, one, other, whole = blocks.values()
    outside = hole == whole
    assert outside.float().mean() == pytest.approx(0.75, abs=0.01)
    for filled in (one, other):
        assert torch.allclose(filled[outside], whole[outside], atol=1e-5)
        assert (filled - whole)[~outside].abs().mean() > 0.05


def test_pictures_of_different_runs_are_refused(sheet, tmp_path, capsys):
    args = mae.parse_args([])
    folder = run_of(tmp_path / "mae", mae, mae.build_mae(args, 32), args)
    own = rotnet.parse_args([], inpainting.Args)
    other = run_of(tmp_path / "inpainting", inpainting, inpainting.ContextEncoder(own), own)
    photographs = dataclasses.replace(args, dataset="cifar10")
    third = run_of(tmp_path / "cifar10", mae, mae.build_mae(photographs, 32), photographs)
    for folders, reason in (
        ([folder, other], "all runs must be of mae.py"),
        ([folder, third], "all runs must be on the same images"),
        ([str(tmp_path / "none")], "none: is not the folder of a finished run"),
    ):
        with pytest.raises(SystemExit):
            sheet(*folders)
        assert reason in capsys.readouterr().err
