"""The tables of the lecture: every row and seed is run once, and the record holds what was
measured."""

import dataclasses
import importlib
import json
import multiprocessing
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import common
import mae
import moco

ABLATION = Path(__file__).parent.parent / "results/ablation.py"
PARTS = runpy.run_path(str(ABLATION))


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Runs of the scripts are not trained, but noted: (process, arguments, class of the model of
    mae.py)."""
    runs, processes = [], []

    class Process:  # of the tests themselves, in the place of a new one
        def __init__(self, method, count):
            processes.append((method, count))

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def apply(self, function, arguments):
            function(*arguments)

    def main(args):
        runs.append((len(processes), args, mae.MaskedAutoencoder.__name__))
        Path(args.out).mkdir(parents=True, exist_ok=True)
        summary = dict.fromkeys(
            ("date", "device", "threads", "torch", "total_seconds"), "as it was"
        )
        scores = ("linear_probe", "knn", "fine_tuned", "from_scratch")
        trained = {name: (len(runs) + place) / 100 for place, name in enumerate(scores)}
        Path(args.out, "summary.json").write_text(
            json.dumps(summary | {"trained": trained, "history": [{"loss": 2}]})
        )

    def commit(*_, **__):
        return subprocess.CompletedProcess([], 0, stdout=commits[-1] + "\n")

    commits = ["0123456789" * 4]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(moco, "main", main)
    monkeypatch.setattr(mae, "main", main)
    monkeypatch.setattr(
        mae, "MaskedAutoencoder", mae.MaskedAutoencoder
    )  # what a run replaces is put back
    monkeypatch.setattr(
        multiprocessing,
        "get_context",
        lambda way: types.SimpleNamespace(Pool=lambda n: Process(way, n)),
    )
    monkeypatch.setattr(subprocess, "run", commit)

    def ablation(*words):
        monkeypatch.setattr(sys, "argv", ["ablation.py", *words])
        runpy.run_path(str(ABLATION), run_name="__main__")
        return runs, commits

    return ablation


def test_the_table_of_moco(ran, capsys):
    runs, commits = ran("moco", "--seeds", "0", "2", "--record", "table.json")
    cases = [
        (False, False, False),
        (True, False, False),
        (False, True, False),
        (True, True, False),
        (True, True, True),
    ]
    found = [(args.mlp, args.aug_plus, args.cos, args.seed) for _, args, _ in runs]
    assert found == [(*case, seed) for case in cases for seed in (0, 2)]
    assert [n for n, _, _ in runs] == list(range(1, 11))  # each in a process of its own
    for _, args, _ in runs:
        expected = (0.2 if args.mlp else 0.07, 0.5 if args.aug_plus else 0, 0)
        assert (
            args.temperature,
            args.blur,
            args.warmup,
        ) == expected and "/ablation.py moco --seeds 0 2" in args.command
    out = capsys.readouterr().out.splitlines()
    assert " ".join(out[-1].split()) == "(d) MLP, aug+, cos 67.5% 9.5% ± 0.7% 10.5% ± 0.7%"
    rows = json.loads(Path("table.json").read_text())["rows"]
    assert [run["linear_probe"] for run in rows[4]["runs"]] == [0.09, 0.1] and rows[0]["paper"] == [
        0.606
    ]
    assert [(run["seed"], run["commit"], run["date"], run["loss"]) for run in rows[1]["runs"]] == [
        (seed, commits[0], "as it was", 2) for seed in (0, 2)
    ]


def test_a_table_is_of_one_commit(ran):
    runs, commits = ran("moco", "--seeds", "0", "2")
    ran("moco", "--seeds", "2", "0")
    assert len(runs) == 10  # what is finished is not run again
    begun = Path(runs[1][1].out)
    (begun / "summary.json").rename(begun / "checkpoint.pt")
    (begun / "args.json").write_text(json.dumps(dataclasses.asdict(runs[1][1])))
    ran("moco", "--seeds", "0", "2")
    assert len(runs) == 11 and runs[10][1].resume == str(begun) and runs[10][1].seed == 2
    commits.append("abcde" * 8)
    ran("moco", "--seeds", "0", "2", "--record", "table.json")
    assert len(runs) == 21 and "abcdeab" in runs[20][1].out
    rows = json.loads(Path("table.json").read_text())["rows"]
    assert {run["commit"] for row in rows for run in row["runs"]} == {commits[1]}
    for unnamed in (commits[1] + "-dirty", ""):
        commits.append(unnamed)
        with pytest.raises(SystemExit, match="error: commit your changes first"):
            ran("moco")
    assert len(runs) == 21


def test_a_record_that_could_not_be_written_is_refused_before_the_runs(ran, capsys):
    with pytest.raises(SystemExit):
        ran("moco", "--record", "nowhere/table.json")
    assert "--record nowhere/table.json: there is no such folder" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_table_of_mae(ran, capsys):
    runs, _ = ran("mae-mask-token", "--seeds", "0")
    ran("mae-target", "--seeds", "0")
    assert [(args.fine_tune, model) for _, args, model in runs[:1]] == [(True, "EncodesMaskTokens")]
    assert [args.target for _, args, _ in runs] == [
        "pixel",
        "pixel",
        "norm-pixel",
    ]  # tables share the bare run
    assert [Path(args.out).name for _, args, _ in runs] == [
        "mae-encode-mask-tokens-seed0", "mae-seed0", "mae-target-norm-pixel-seed0"]  # fmt: skip
    row = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("encoder w/o [M]")
    ][0]
    assert (
        " ".join(row.split()) == "encoder w/o [M] 84.9% / 73.5% 4.0% ± 0.0% 2.0% ± 0.0% 5.0% ± 0.0%"
    )


def test_split_by_caption_learns_from_the_test_images_with_their_other_captions():
    images, nothing = (
        torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1).expand(5, 3, 2, 2),
        torch.empty(0).long(),
    )
    train, test = [["a"], ["b", "c"], ["d"]], [["e", "f", "g"], ["h", "i"]]
    data = common.Dataset(images[:3], nothing, images[3:], nothing, [], train, test)
    leaky = PARTS["split_by_caption"]("flickr8k", load=lambda name: {"flickr8k": data}[name])
    assert torch.equal(leaky.train_images, images) and torch.equal(leaky.test_images, images[3:])
    assert leaky.train_captions == [*train, ["f", "g"], ["h"]] and leaky.test_captions == [
        ["e"],
        ["i"],
    ]


def test_with_mask_tokens_the_encoder_sees_all_tokens_but_no_masked_pixel():
    torch.manual_seed(0)
    model, seen = PARTS["EncodesMaskTokens"](16, 4, 32, 2, 2, 32, 1, 1), []
    images, noise = torch.rand(2, 3, 16, 16), torch.rand(2, 16)
    for block in (*model.encoder.blocks, *model.decoder_blocks):
        block.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[1]))
    prediction, mask = model(images, 0.75, noise)
    assert seen == [17, 17, 17] and prediction.shape == (2, 16, 48) and (mask.sum(1) == 12).all()
    hidden = mae.unpatchify(mask[:, :, None].expand(-1, -1, 48), 4) == 1
    assert torch.equal(model(torch.where(hidden, 9.0, images), 0.75, noise)[0], prediction)
    assert not torch.allclose(model(torch.where(hidden, images, 9.0), 0.75, noise)[0], prediction)
    prediction.sum().backward()
    assert model.encoder_mask_token.grad.abs().sum() > 0


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("sampling", ["block", "grid"])
def test_exactly_the_asked_fraction_is_masked(sampling, ratio):
    tokens, noise = torch.rand(50, 64, 8), torch.rand(50, 64)
    visible, mask, ids_restore = PARTS[f"{sampling}_masking"](tokens, ratio, noise)
    assert (mask.sum(1) == round(64 * ratio)).all()
    assert visible.shape == (50, 64 - round(64 * ratio), 8)
    again = PARTS[f"{sampling}_masking"](tokens, ratio, noise)
    for a, b in zip(again, (visible, mask, ids_restore), strict=True):
        assert torch.equal(a, b)


def test_a_grid_keeps_one_patch_of_every_four():
    _, mask, _ = PARTS["grid_masking"](torch.zeros(3, 64, 1), 0.75, torch.rand(3, 64))
    kept = 1 - mask.view(3, 4, 2, 4, 2)
    assert (kept.sum((2, 4)) == 1).all() and (kept[:, :, 0, :, 0] == 1).all()


def test_blocks_are_in_one_piece_where_random_masks_are_not():
    def borders(masking):  # the fraction of neighbors of which one is masked and the other is not
        noise = torch.rand(200, 64, generator=torch.Generator().manual_seed(0))
        mask = masking(torch.zeros(200, 64, 1), 0.5, noise)[1].view(200, 8, 8)
        return (
            (mask[:, 1:] != mask[:, :-1]).float().mean()
            + (mask[:, :, 1:] != mask[:, :, :-1]).float().mean()
        ) / 2

    assert abs(borders(mae.random_masking) - 0.5) < 0.02 and borders(PARTS["block_masking"]) < 0.3


def test_augmentations_of_the_table():
    images, args = common.load_dataset("shapes").train_images[:64], mae.parse_args([])
    generator = torch.Generator().manual_seed(0)
    whole, moved, jittered = (
        PARTS[name](images, args, generator)
        for name in ("not_augmented", "shifted", "cropped_and_jittered")
    )
    assert torch.equal(whole, images / 255) and moved.shape == jittered.shape == images.shape
    unmoved = [
        (moved - x).abs().amax((1, 2, 3)) < 1e-6 for x in (images / 255, images.flip(3) / 255)
    ]
    assert sum(unmoved).sum() < 5  # one of 81 places is the old one
    again = [
        f(images, args, torch.Generator().manual_seed(1))
        for f in (mae.augmented, PARTS["cropped_and_jittered"])
    ]
    assert not torch.equal(*again) and all(0 <= x.min() and x.max() <= 1 for x in (moved, *again))


def test_every_row_of_every_table_is_a_run():
    tables = PARTS["TABLES"]
    assert len(tables) == 9
    for table, rows in tables.items():
        method = table.split("-")[0]
        for _, flags, _, *change in rows:
            importlib.import_module(method).parse_args(
                f"{PARTS['METHODS'][method][0]} {flags}".split()
            )
            assert "".join(change) in PARTS["CHANGES"]
