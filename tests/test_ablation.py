"""The tables of the lecture: every row and seed is run once, and the record holds what was measured."""

import json
import runpy
import sys
from pathlib import Path

import moco

ABLATION = Path(__file__).parent.parent / "results/ablation.py"


def test_the_table_of_moco(tmp_path, monkeypatch, capsys):
    ran = []

    def main(args):
        ran.append((args.mlp, args.aug_plus, args.cos, args.seed))
        Path(args.out).mkdir(parents=True)
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
