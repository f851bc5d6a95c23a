"""The tables of the lecture: every row and seed is run once, and the record holds what was measured."""

import json
import runpy
import sys
from pathlib import Path

import mae
import moco

ABLATION = Path(__file__).parent.parent / "results/ablation.py"


def test_the_table_of_moco(tmp_path, monkeypatch, capsys):
    ran = []

    def main(args):
        ran.append((args.mlp, args.aug_plus, args.cos, args.seed))
        Path(args.out).mkdir(parents=True, exist_ok=True)
        score = (args.mlp + args.aug_plus + args.cos) / 10 + args.seed / 100
        summary = {"trained": {"linear_probe": score, "knn": score / 2}, "semi_supervised": [], "device": "cpu"}
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
        ran.append((args.fine_tune, args.encode_mask_tokens, args.seed))
        Path(args.out).mkdir(parents=True)
        score = 0.3 - args.encode_mask_tokens / 10 + args.seed / 100
        few = {"labels": 9, "linear_probe": 0, "fine_tuned": score + 0.4, "from_scratch": 0.1}
        summary = {"trained": {"linear_probe": score, "knn": 0}, "semi_supervised": [few], "device": "cpu"}
        (Path(args.out) / "summary.json").write_text(json.dumps(summary))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mae, "main", main)
    monkeypatch.setattr(sys, "argv", ["ablation.py", "mae-mask-token", "--seeds", "0", "2"])
    runpy.run_path(str(ABLATION), run_name="__main__")
    assert ran == [(True, True, 0), (True, True, 2), (True, False, 0), (True, False, 2)]
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.split("  ")[0] == "encoder w/o [M]" and "84.9% / 73.5%" in row
    assert row.index("71.0% ± 1.4%") < row.index("31.0% ± 1.4%")  # fine-tuned first, as in the lecture


def test_every_row_of_every_table_is_a_run():
    tables = runpy.run_path(str(ABLATION))["TABLES"]
    assert len(tables) == 8
    for table, rows in tables.items():
        for _, flags, _ in rows:
            if table == "moco":
                moco.parse_args(flags.split())
            else:
                mae.build_model(mae.parse_args(flags.split()), 32)
