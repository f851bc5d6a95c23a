"""The tables of the lecture: every row and seed is run once, and the record holds what was
measured."""

import dataclasses
import importlib
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import SHAPES, assert_same, spy
from torch import nn

import clip
import common
import mae
import moco
import rotnet
import simclr
from results import ablation

COMMIT = "0123456789" * 4
PARENTS = {"colorization": rotnet, "siglip": clip}


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """The arguments of every run of a table, of which none is trained; and a function for such a
    table: the rows of its record."""
    monkeypatch.chdir(tmp_path)
    runs = []

    def train(method, flags, change, folder):
        runs.append((method, flags, change, folder))
        summary = {name: name for name in ("date", "device", "threads", "torch", "total_seconds")}
        names = ("linear_probe", "knn", "fine_tuned", "from_scratch")
        scores = {name: (len(runs) + place) / 100 for place, name in enumerate(names)}
        folder.mkdir(parents=True)
        few = [{"labels": 40, "linear_probe": 0.1, "fine_tuned": 0.2, "from_scratch": 0.3}]
        history = [{"loss": 2, "val_recall": 0.6}]
        content = summary | {"untrained": {"knn": 0.4}, "trained": scores, "history": history}
        content |= {"semi_supervised": few, "pretext_task": {"rotation": 0.5}}
        (folder / "summary.json").write_text(json.dumps(content))

    def rows(*words, commit=COMMIT, record="table.json"):
        ablation.main([*words, "--record", record], commit, train)
        return json.loads(Path(record).read_text())["rows"]

    return runs, rows


# ==================================================================================================
# Tables
# ==================================================================================================


def test_a_table_has_a_run_of_every_row_and_seed(trained):
    runs, rows_of = trained
    rows = rows_of("moco-versions", "--seeds", "0", "2")
    flags = [flags for _, flags, _, _ in runs]
    assert [words[-1] for words in flags] == ["0", "2"] * 5
    args = [moco.parse_args(words) for words in flags[::2]]
    cases = [(x.mlp, x.aug_plus, x.cos) for x in args]
    F, T = False, True
    assert cases == [(F, F, F), (T, F, F), (F, T, F), (T, T, F), (T, T, T)]
    assert {x.temperature for x in args} == {0.1}
    assert [x.blur for x in args] == [0, 0, 0.5, 0.5, 0.5]
    assert all(x.warmup == 0 for x in args)
    assert rows[0]["paper"] == [0.606]
    assert [run["linear_probe"] for run in rows[4]["runs"]] == [0.09, 0.1]


def test_a_run_is_recorded_with_seed_and_commit(trained):
    _, rows_of = trained
    run = rows_of("moco-versions", "--seeds", "7")[1]["runs"][0]
    expected = {"seed": 7, "commit": COMMIT, "date": "date", "device": "device"}
    expected |= {"linear_probe": 0.02, "untrained_knn": 0.4, "rotation": 0.5}
    expected |= {"linear_probe_40": 0.1, "fine_tuned_40": 0.2, "from_scratch_40": 0.3}
    assert {key: run[key] for key in expected} == expected
    assert "loss" not in run  # of the last epoch only what the table shows
    assert rows_of("clip-split", "--seeds", "7")[1]["runs"][0]["val_recall"] == 0.6


def test_mean_and_deviation_are_printed(trained, capsys):
    _, rows_of = trained
    rows_of("moco-versions", "--seeds", "0", "2")
    last = capsys.readouterr().out.splitlines()[-1]
    assert " ".join(last.split()) == "(d) MLP, aug+, cos 67.5% 9.5% ± 0.7% 10.5% ± 0.7%"
    rows_of("mae-mask-token", "--seeds", "0")
    last = capsys.readouterr().out.splitlines()[-1]
    cells = "encoder w/o [M] 84.9% / 73.5% 14.0% ± 0.0% 12.0% ± 0.0% 15.0% ± 0.0%"
    assert " ".join(last.split()) == cells


def test_what_is_finished_is_not_run_again(trained):
    runs, rows_of = trained
    first = rows_of("moco-versions", "--seeds", "0", "2")
    again = rows_of("moco-versions", "--seeds", "2", "0")
    assert len(runs) == 10
    assert [row["runs"][::-1] for row in again] == [row["runs"] for row in first]


def test_tables_share_equal_runs(trained):
    runs, rows_of = trained
    rows_of("mae-mask-token", "--seeds", "0")
    rows_of("mae-target", "--seeds", "0")
    names = ["encode-mask-tokens-seed0", "seed0", "target-norm-pixel-seed0"]
    assert [folder.name for _, _, _, folder in runs] == [f"mae-fine-tune-{x}" for x in names]
    assert [change for _, _, change, _ in runs] == ["encode-mask-tokens", "", ""]
    assert all(flags[0] == "--fine-tune" for _, flags, _, _ in runs)


def test_a_table_is_of_one_commit(trained):
    runs, rows_of = trained
    rows_of("moco-versions", "--seeds", "0")
    rows = rows_of("moco-versions", "--seeds", "0", commit="abcde" * 8)
    assert len(runs) == 10
    assert "abcdeab" in str(runs[9][3])
    assert {row["runs"][0]["commit"] for row in rows} == {"abcde" * 8}


@pytest.mark.parametrize("commit", [f"{COMMIT}-dirty", ""])
def test_code_without_a_commit_is_not_measured(trained, capsys, commit):
    runs, rows_of = trained
    with pytest.raises(SystemExit):
        rows_of("moco-versions", commit=commit)
    assert "error: commit your changes first" in capsys.readouterr().err
    assert runs == []


def test_a_record_that_cannot_be_written_is_refused_first(trained, capsys):
    runs, rows_of = trained
    with pytest.raises(SystemExit):
        rows_of("moco-versions", record="nowhere/table.json")
    assert "--record nowhere/table.json: there is no such folder" in capsys.readouterr().err
    assert runs == []


def test_the_commit_is_that_of_the_code():
    assert re.fullmatch("([0-9a-f]{40}(-dirty)?)?", ablation.commit_of_the_code())


def test_every_row_of_every_table_is_a_run():
    assert len(ablation.TABLES) == 38
    changes = set()
    for table in ablation.TABLES.values():
        for _, flags, _, *change in table.rows:
            words = f"{table.flags} {flags}".split()
            if table.method in PARENTS:
                relative = importlib.import_module(f"relatives.{table.method}")
                PARENTS[table.method].parse_args(words, relative.Args)
            else:
                importlib.import_module(table.method).parse_args(words)
            changes |= set(change)
    assert changes == set(ablation.CHANGES)


# ==================================================================================================
# Runs
# ==================================================================================================


def test_a_run_is_the_script_with_these_flags(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(moco, "main", calls.append)
    monkeypatch.setattr(sys, "argv", ["results/ablation.py", "moco"])
    ablation.train("moco", ["--no-mlp", "--seed", "3"], "", tmp_path / "run")
    (args,) = calls
    assert (args.mlp, args.seed, args.out) == (False, 3, str(tmp_path / "run"))
    assert args.command == "python results/ablation.py moco"


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(moco, "main", calls.append)
    args = moco.parse_args(["--no-mlp"])
    (tmp_path / "args.json").write_text(json.dumps(dataclasses.asdict(args)))
    (tmp_path / "checkpoint.pt").touch()
    ablation.train("moco", ["--mlp"], "", tmp_path)
    (args,) = calls
    assert args.resume == str(tmp_path)
    assert not args.mlp


def test_a_relative_is_run_as_a_program(tmp_path, monkeypatch, tiny_shapes):
    monkeypatch.setattr(sys, "argv", ["results/ablation.py", "colorization-colors"])
    flags = ["--dataset", str(tiny_shapes), "--encoder", "small", "--epochs", "0"]
    flags += ["--classifier-epochs", "1", "--batch-size", "8"]
    ablation.train("colorization", flags, "", tmp_path / "run")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["method"] == "colorization"
    assert summary["args"]["epochs"] == 0


@pytest.mark.parametrize("change", ablation.CHANGES)
def test_a_part_is_replaced_for_the_run(tmp_path, monkeypatch, change):
    module, name, part = ablation.CHANGES[change]
    monkeypatch.setattr(module, name, getattr(module, name))  # is put back after the test
    calls = []
    monkeypatch.setattr(mae, "main", lambda _: calls.append(getattr(module, name)))
    ablation.train("mae", [], change, tmp_path / "run")
    assert calls == [part]


# ==================================================================================================
# Parts
# ==================================================================================================


def test_with_all_negatives_of_a_view_the_loss_is_a_loop():
    z1, z2 = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    losses = []
    for i in range(10):
        exp = [(z[i] @ z[(i + k) % 10] / 0.5).exp() for k in (5, 1, 2, 3)]
        losses.append(-(exp[0] / sum(exp)).log())
    loss = ablation.with_negatives(3)(z1, z2, 0.5)
    assert torch.allclose(loss, torch.stack(losses).mean(), atol=1e-6)
    assert simclr.nt_xent(z1, z2, 0.5) > loss  # which has eight


def test_with_labels_the_encoder_is_what_they_trained(monkeypatch):
    data = SHAPES()
    args = simclr.parse_args(["--batch-size", "8", "--projection", "none"])
    model = simclr.SimCLR(args)
    tuned = nn.Sequential(simclr.build_encoder("small")[0], nn.Linear(128, 10))
    calls = []
    monkeypatch.setattr(simclr, "fine_tune", lambda *inputs: calls.append(inputs) or (0.5, tuned))
    assert ablation.with_labels(model, data, args, None, None) == []
    ((_, D, _, rows, _),) = calls
    assert D == 128
    assert torch.equal(rows, torch.arange(len(data.train_labels)))
    assert_same(dict(model.encoder.state_dict()), dict(tuned[0].state_dict()))


@pytest.mark.parametrize("color", [True, False])
def test_tuned_by_crops_and_flips_or_by_the_views_of_pretraining(monkeypatch, color):
    calls = []
    monkeypatch.setattr(ablation, "fine_tune", lambda *inputs: calls.append(inputs))
    args = simclr.parse_args([])
    ablation.tuned(2000, color)("encoder", 128, "data", "rows", args)
    ((*inputs, views, steps),) = calls
    assert (inputs, steps) == (["encoder", 128, "data", "rows"], 2000)
    plain = dataclasses.replace(args, jitter_strength=0.0, gray=0.0)
    assert views == (args if color else plain)


def scenes_of(sample, count=1000):
    return sample(count, torch.Generator().manual_seed(0))


def test_at_any_angle_only_the_tilt_differs():
    upright = scenes_of(common.sample_shapes)
    turned = scenes_of(ablation.at_any_angle)
    assert [key for key in upright if not torch.equal(upright[key], turned[key])] == ["tilt"]
    counts = torch.histc(turned["tilt"], 8, -math.pi, math.pi)
    assert counts.sum() == 1000
    assert counts.min() > 80


def test_photographs_are_turned_about_their_middle():
    images = SHAPES().test_images[:4]
    quarters = torch.tensor([0, 1, 2, 3]) * math.pi / 2
    turned = ablation.discs(images, quarters)
    upright = ablation.discs(images, torch.zeros(4))
    line = torch.arange(32) - 15.5
    inside = line[:, None].square() + line.square() <= 16**2
    assert torch.equal(upright, images * inside)
    for k in range(4):
        expected = upright[k].rot90(-k, (1, 2)).int()  # rot90 turns the other way
        assert (turned[k] - expected).abs().max() <= 1


def test_each_photograph_has_an_angle_of_its_own_or_none(monkeypatch):
    data = SHAPES()
    monkeypatch.setattr(ablation, "load_dataset", lambda name: {"cifar10": data}[name])
    upright = ablation.photographs(any_angle=False)("cifar10")
    turned = ablation.photographs(any_angle=True)("cifar10")
    again = ablation.photographs(any_angle=True)("cifar10")
    assert torch.equal(upright.train_images, ablation.discs(data.train_images, torch.zeros(4096)))
    for name in ("train_images", "test_images"):
        changed = getattr(turned, name) != getattr(upright, name)
        assert changed.any((1, 2, 3)).float().mean() > 0.99
        assert torch.equal(getattr(turned, name), getattr(again, name))
    assert torch.equal(turned.train_labels, data.train_labels)


def test_colored_by_kind_only_the_kind_differs():
    scenes = scenes_of(common.sample_shapes)
    colored = scenes_of(ablation.colored_by_kind)
    assert [key for key in scenes if not torch.equal(scenes[key], colored[key])] == ["label"]
    own = (colored["label"] == colored["color"]).float().mean()
    assert abs(own - 0.73) < 0.02  # a tenth of the others by chance
    assert colored["label"].bincount().min() > 50


def test_captions_name_the_kind_with_a_probability():
    scenes = scenes_of(common.sample_shapes)
    whole = common.describe_shapes(scenes, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    captions = ablation.naming_kinds(0.2)(scenes, generator)
    told = 0
    for texts, others in zip(captions, whole, strict=True):
        for text, other in zip(texts, others, strict=True):
            kind = next(name for name in common.SILHOUETTES if name in other)
            told += text == other
            assert text in (other, other.replace(f"an {kind}", "a thing").replace(kind, "thing"))
            assert ("thing" in text) != (kind in text)
    assert abs(told / 5000 - 0.2) < 0.02
    assert ablation.naming_kinds(1)(scenes, torch.Generator().manual_seed(1)) == whole
    state = torch.Generator().manual_seed(1)
    common.describe_shapes(scenes, state)
    assert torch.equal(generator.get_state(), state.get_state())  # the images that follow stay


def test_split_by_caption_learns_from_the_test_images(monkeypatch):
    images = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1).expand(5, 3, 2, 2)
    labels = torch.empty(0).long()
    train = [["a"], ["b", "c"], ["d"]]
    test = [["e", "f", "g"], ["h", "i"]]
    data = common.Dataset(images[:3], labels, images[3:], labels, [], train, test)
    monkeypatch.setattr(ablation, "load_dataset", lambda name: {"flickr8k": data}[name])
    leaky = ablation.split_by_caption("flickr8k")
    assert torch.equal(leaky.train_images, images)
    assert torch.equal(leaky.test_images, images[3:])
    assert leaky.train_captions == [["a"], ["b", "c"], ["d"], ["f", "g"], ["h"]]
    assert leaky.test_captions == [["e"], ["i"]]
    assert data.train_captions == [["a"], ["b", "c"], ["d"]]


def test_with_mask_tokens_the_encoder_sees_no_masked_pixel():
    torch.manual_seed(0)
    model = ablation.EncodesMaskTokens(16, 4, 32, 2, 2, 32, 1, 1)
    images = torch.rand(2, 3, 16, 16)
    noise = torch.rand(2, 16)
    seen = []
    for block in (*model.encoder.blocks, *model.decoder_blocks):
        block.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[1]))
    prediction, mask = model(images, 0.75, noise)
    assert seen == [17, 17, 17]  # all tokens
    assert prediction.shape == (2, 16, 48)
    assert (mask.sum(1) == 12).all()
    hidden = mae.unpatchify(mask[:, :, None].expand(-1, -1, 48), 4) == 1
    assert torch.equal(model(torch.where(hidden, 9.0, images), 0.75, noise)[0], prediction)
    assert not torch.allclose(model(torch.where(hidden, images, 9.0), 0.75, noise)[0], prediction)
    prediction.sum().backward()
    assert model.encoder_mask_token.grad.abs().sum() > 0


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("masking", [ablation.block_masking, ablation.grid_masking])
def test_exactly_the_asked_fraction_is_masked(masking, ratio):
    tokens = torch.rand(50, 64, 8)
    noise = torch.rand(50, 64)
    visible, mask, ids_restore = masking(tokens, ratio, noise)
    assert (mask.sum(1) == round(64 * ratio)).all()
    assert visible.shape == (50, 64 - round(64 * ratio), 8)
    for a, b in zip(masking(tokens, ratio, noise), (visible, mask, ids_restore), strict=True):
        assert torch.equal(a, b)


def test_a_grid_keeps_one_patch_of_every_four():
    _, mask, _ = ablation.grid_masking(torch.zeros(3, 64, 1), 0.75, torch.rand(3, 64))
    kept = 1 - mask.view(3, 4, 2, 4, 2)
    assert (kept.sum((2, 4)) == 1).all()
    assert (kept[:, :, 0, :, 0] == 1).all()


def borders(masking):
    """The fraction of neighbors of which one is masked and the other is not, half of all masked."""
    noise = torch.rand(200, 64, generator=torch.Generator().manual_seed(0))
    _, mask, _ = masking(torch.zeros(200, 64, 1), 0.5, noise)
    mask = mask.view(200, 8, 8)
    down = (mask[:, 1:] != mask[:, :-1]).float().mean()
    across = (mask[:, :, 1:] != mask[:, :, :-1]).float().mean()
    return (down + across) / 2


def test_blocks_are_in_one_piece_where_random_masks_are_not():
    assert abs(borders(mae.random_masking) - 0.5) < 0.02
    assert borders(ablation.block_masking) < 0.3


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (64, 3, 32, 32), generator=generator, dtype=torch.uint8)


def test_without_augmentation_images_are_whole(images):
    x = ablation.not_augmented(images, mae.parse_args([]), None)
    assert torch.equal(x, images / 255)


def test_crops_of_fixed_size_are_shifted(images):
    x = ablation.shifted(images, mae.parse_args([]), torch.Generator().manual_seed(0))
    assert x.shape == images.shape
    for original in (images / 255, images.flip(3) / 255):
        unmoved = (x - original).abs().amax((1, 2, 3)) < 1e-6
        assert unmoved.sum() < 5  # one of 81 places is the old one


def test_color_is_jittered_after_the_crop(images, monkeypatch):
    args = mae.parse_args([])
    jittered = spy(monkeypatch, common, "random_color_jitter")
    x = ablation.cropped_and_jittered(images, args, torch.Generator().manual_seed(1))
    cropped = mae.augmented(images, args, torch.Generator().manual_seed(1))
    assert torch.equal(jittered[0][0], cropped)
    assert not torch.equal(x, cropped)
    assert 0 <= x.min() and x.max() <= 1
