"""The tables of the lecture: every row and seed is run once, and the record holds what was measured."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

import common
import mae
import moco

ABLATION = Path(__file__).parent.parent / "results/ablation.py"
PARTS = runpy.run_path(str(ABLATION))


def test_the_table_of_moco(tmp_path, monkeypatch, capsys):
    ran = []

    def main(args):
        ran.append((args.mlp, args.aug_plus, args.cos, args.seed))
        Path(args.out).mkdir(parents=True, exist_ok=True)
        score = (args.mlp + args.aug_plus + args.cos) / 10 + args.seed / 100
        summary = {"trained": {"linear_probe": score, "knn": score / 2}, "device": "cpu"}
        (Path(args.out) / "summary.json").write_text(json.dumps(summary))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(moco, "main", main)
    monkeypatch.setattr(sys, "argv", ["ablation.py", "moco", "--seeds", "0", "2", "--record", "table.json"])
    runpy.run_path(str(ABLATION), run_name="__main__")
    cases = [(False, False, False), (True, False, False), (False, True, False), (True, True, False), (True, True, True)]
    assert ran == [(*case, seed) for case in cases for seed in (0, 2)]
    out = capsys.readouterr().out
    assert "31.0% ± 1.4%" in out and "15.5% ± 0.7%" in out and "67.5%" in out
    rows = json.loads(Path("table.json").read_text())["rows"]
    assert rows[4]["linear_probe"] == [0.3, 0.32] and rows[0]["lecture"] == [0.606]
    runpy.run_path(str(ABLATION), run_name="__main__")
    assert len(ran) == 10  # nothing is run again
    begun = Path("runs/ablation-moco-no-mlp-no-aug-plus-no-cos-seed2")
    (begun / "summary.json").rename(begun / "checkpoint.pt")
    (begun / "args.json").write_text("{}")
    runpy.run_path(str(ABLATION), run_name="__main__")
    assert ran[10:] == [(False, False, False, 2)] and (begun / "summary.json").exists()


def test_a_table_of_mae(tmp_path, monkeypatch, capsys):
    ran = []

    def main(args):
        changed = mae.MaskedAutoencoder.__name__ == "EncodesMaskTokens"
        ran.append((args.fine_tune, changed, args.seed, args.command.split("/")[-1]))
        Path(args.out).mkdir(parents=True)
        score = 0.3 - changed / 10 + args.seed / 100
        trained = {"linear_probe": score, "knn": 0, "fine_tuned": score + 0.4, "from_scratch": 0.1}
        (Path(args.out) / "summary.json").write_text(json.dumps({"trained": trained, "device": "cpu"}))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mae, "main", main)
    monkeypatch.setattr(sys, "argv", ["ablation.py", "mae-mask-token", "--seeds", "0", "2"])
    runpy.run_path(str(ABLATION), run_name="__main__")
    command = "ablation.py mae-mask-token --seeds 0 2"
    assert ran == [(True, changed, seed, command) for changed in (True, False) for seed in (0, 2)]
    assert mae.MaskedAutoencoder.__name__ == "MaskedAutoencoder"
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.split("  ")[0] == "encoder w/o [M]" and "84.9% / 73.5%" in row
    assert row.index("71.0% ± 1.4%") < row.index("31.0% ± 1.4%")  # fine-tuned first, as in the lecture
    assert Path("runs/ablation-mae-encode-mask-tokens-seed2").exists() and Path("runs/ablation-mae-seed2").exists()


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
    assert (mask.sum(1) == round(64 * ratio)).all() and visible.shape == (50, 64 - round(64 * ratio), 8)
    assert all(torch.equal(a, b) for a, b in zip(
        PARTS[f"{sampling}_masking"](tokens, ratio, noise), (visible, mask, ids_restore), strict=True))  # fmt: skip


def test_a_grid_keeps_one_patch_of_every_four():
    _, mask, _ = PARTS["grid_masking"](torch.zeros(3, 64, 1), 0.75, torch.rand(3, 64))
    kept = 1 - mask.view(3, 4, 2, 4, 2)
    assert (kept.sum((2, 4)) == 1).all() and (kept[:, :, 0, :, 0] == 1).all()


def test_blocks_are_in_one_piece_where_random_masks_are_not():
    def borders(masking):  # the fraction of neighbors of which one is masked and the other is not
        noise = torch.rand(200, 64, generator=torch.Generator().manual_seed(0))
        mask = masking(torch.zeros(200, 64, 1), 0.5, noise)[1].view(200, 8, 8)
        return ((mask[:, 1:] != mask[:, :-1]).float().mean() + (mask[:, :, 1:] != mask[:, :, :-1]).float().mean()) / 2

    assert abs(borders(mae.random_masking) - 0.5) < 0.02 and borders(PARTS["block_masking"]) < 0.3


def test_augmentations_of_the_table():
    images, args = common.load_dataset("shapes").train_images[:64], mae.parse_args([])
    generator = torch.Generator().manual_seed(0)
    whole, moved, jittered = (
        PARTS[name](images, args, generator) for name in ("not_augmented", "shifted", "cropped_and_jittered")
    )
    assert torch.equal(whole, images / 255) and moved.shape == jittered.shape == images.shape
    unmoved = [(moved - x).abs().amax((1, 2, 3)) < 1e-6 for x in (images / 255, images.flip(3) / 255)]
    assert sum(unmoved).sum() < 5  # one of 81 places is the old one
    again = [f(images, args, torch.Generator().manual_seed(1)) for f in (mae.augmented, PARTS["cropped_and_jittered"])]
    assert not torch.equal(*again) and all(0 <= x.min() and x.max() <= 1 for x in (moved, *again))


def test_every_row_of_every_table_is_a_run():
    tables = PARTS["TABLES"]
    assert len(tables) == 8
    for table, rows in tables.items():
        for _, flags, _, *change in rows:
            (moco if table == "moco" else mae).parse_args(flags.split())
            assert "".join(change) in PARTS["CHANGES"]
