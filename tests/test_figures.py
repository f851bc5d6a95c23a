"""The curves, drawn from run folders and from records."""

import json
import runpy
import sys
from pathlib import Path

import matplotlib.axes
import matplotlib.figure
import pytest

FIGURES = Path(__file__).parent.parent / "results/figures.py"
LINES = [
    {"epoch": n, "loss": 4 / n, "bound": 5 - 4 / n} | ({"knn": n / 10} if n % 2 == 0 else {})
    for n in (1, 2, 3, 4)
]


def watched(monkeypatch):
    """What is plotted from now on: [(label, x, y)]."""
    drawn, plot = [], matplotlib.axes.Axes.plot
    monkeypatch.setattr(
        matplotlib.axes.Axes,
        "plot",
        lambda panel, x, y, **k: drawn.append((k["label"], x, y)) or plot(panel, x, y, **k),
    )
    return drawn


def test_curves_show_what_is_in_folders_and_records(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    (tmp_path / "record.json").write_text(json.dumps({"history": LINES[:2]}))
    read, draw = (runpy.run_path(str(FIGURES))[name] for name in ("read", "draw"))
    assert (
        read(tmp_path / "run", "history") == LINES
        and read(tmp_path / "record.json", "history") == LINES[:2]
    )
    drawn = []
    monkeypatch.setattr(
        matplotlib.axes.Axes, "plot", lambda _, x, y, **__: drawn.append((list(x), list(y)))
    )
    monkeypatch.setattr(matplotlib.figure.Figure, "legend", lambda *_, **__: None)
    draw({"run": read(tmp_path / "run", "history")}, tmp_path / "curves.png")
    assert drawn == [
        ([1, 2, 3, 4], [4, 2, 4 / 3, 1]),
        ([1, 2, 3, 4], [1, 3, 5 - 4 / 3, 4]),
        ([2, 4], [0.2, 0.4]),
    ]
    drawn.clear()  # of a loss that bounds nothing
    draw({"run": [line | {"bound": None} for line in LINES]}, tmp_path / "curves.png")
    assert drawn == [([1, 2, 3, 4], [4, 2, 4 / 3, 1]), ([2, 4], [0.2, 0.4])]


def test_the_semi_supervised_figure(tmp_path, monkeypatch):
    rows = [
        {"labels": 100, "frozen": 0.7, "from_scratch": 0.5},
        {"labels": 10, "frozen": 0.6, "from_scratch": 0.2},
    ]
    (tmp_path / "record.json").write_text(json.dumps({"history": LINES, "semi_supervised": rows}))
    drawn = watched(monkeypatch)
    flags = "--labels", str(tmp_path / "record.json"), "-o", str(tmp_path / "labels.png")
    monkeypatch.setattr(sys, "argv", ["figures.py", *flags])
    runpy.run_path(str(FIGURES), run_name="__main__")
    assert drawn == [("frozen", (10, 100), (0.6, 0.7)), ("from scratch", (10, 100), (0.2, 0.5))]
    (tmp_path / "record.json").write_text(json.dumps({"semi_supervised": []}))
    with pytest.raises(SystemExit, match="record has no table of accuracies over labels"):
        runpy.run_path(str(FIGURES), run_name="__main__")


def test_zero_shot_against_few_shot(tmp_path, monkeypatch):
    trained = {f"linear_probe_{n}_per_class": n / 10 for n in (1, 2, 4)} | {
        "zero_shot": 0.3,
        "linear_probe": 0.9,
    }
    (tmp_path / "record.json").write_text(json.dumps({"history": LINES, "trained": trained}))
    drawn = watched(monkeypatch)
    flags = "--few-shot", str(tmp_path / "record.json"), "-o", str(tmp_path / "few-shot.png")
    monkeypatch.setattr(sys, "argv", ["figures.py", *flags])
    runpy.run_path(str(FIGURES), run_name="__main__")
    assert drawn == [
        ("linear probe", (1, 2, 4), (0.1, 0.2, 0.4)),
        ("zero shot", (1, 2, 4), (0.3, 0.3, 0.3)),
    ]


def test_figures_from_the_command_line(tmp_path, monkeypatch):
    (tmp_path / "record.json").write_text(json.dumps({"history": LINES}))
    for path, expected in (
        ("record.json", None),
        ("none.json", "error: not a run folder or a record"),
    ):
        monkeypatch.setattr(
            sys, "argv", ["figures.py", str(tmp_path / path), "-o", str(tmp_path / "curves.png")]
        )
        if expected:
            with pytest.raises(SystemExit, match=expected):
                runpy.run_path(str(FIGURES), run_name="__main__")
        else:
            runpy.run_path(str(FIGURES), run_name="__main__")
            assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
