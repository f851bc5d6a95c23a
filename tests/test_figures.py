"""The curves, drawn from run folders and from records."""

import json
import math

import matplotlib.axes
import pytest

from results import figures, tables

HISTORY = [
    {"epoch": 1, "loss": 4.0, "bound": 1.0},
    {"epoch": 2, "loss": 2.0, "bound": 3.0, "knn": 0.2},
    {"epoch": 3, "loss": 1.5, "bound": 3.5},
    {"epoch": 4, "loss": 1.0, "bound": 4.0, "knn": 0.4},
    {"epoch": 5, "loss": 0.5, "bound": 4.5, "knn": 0.5, "val_recall": 0.7},
]


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """A function: what `figures.py` plots of such a summary, [(label, x, y)]."""
    lines = []
    plot = matplotlib.axes.Axes.plot

    def plotted(panel, x, y, **options):
        lines.append((options["label"], x, y))
        return plot(panel, x, y, **options)

    def lines_of(summary, *words):
        (tmp_path / "record.json").write_text(json.dumps(summary))
        figures.main([str(tmp_path / "record.json"), *words, "-o", str(tmp_path / "drawn.png")])
        assert (tmp_path / "drawn.png").read_bytes()[:4] == b"\x89PNG"
        assert "</svg>" in (tmp_path / "drawn.svg").read_text()
        return lines

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", plotted)
    return lines_of


def test_curves_of_a_record(drawn):
    loss, bound, knn = drawn({"history": HISTORY})
    assert loss == ("record", [1, 2, 3, 4, 5], [4.0, 2.0, 1.5, 1.0, 0.5])
    assert bound == ("record", [1, 2, 3, 4, 5], [1.0, 3.0, 3.5, 4.0, 4.5])
    assert knn == ("record", [2, 4, 5], [0.2, 0.4, 0.5])  # and no panel of one value


def test_the_bound_is_drawn_below_its_ceiling(tmp_path, monkeypatch):
    heights = []
    monkeypatch.setattr(matplotlib.axes.Axes, "axhline", lambda panel, y, **_: heights.append(y))
    (tmp_path / "record.json").write_text(json.dumps({"history": HISTORY}))
    figures.main([str(tmp_path / "record.json"), "-o", str(tmp_path / "drawn.png")])
    assert heights == [5.0]  # the loss of a guess


def test_a_folder_is_read_while_it_is_trained(tmp_path):
    lines = "".join(json.dumps(line) + "\n" for line in HISTORY[:2])
    (tmp_path / "metrics.jsonl").write_text(lines)
    assert figures.read(tmp_path) == HISTORY[:2]


def test_a_finished_folder_has_a_summary(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps({"trained": {}}))
    assert figures.read_summary(tmp_path) == {"trained": {}}


def test_the_semi_supervised_figure(drawn):
    many = {"labels": 100, "frozen": 0.7, "from_scratch": 0.5}
    few = {"labels": 10, "frozen": 0.6, "from_scratch": 0.2}
    frozen, scratch = drawn({"semi_supervised": [many, few]}, "--labels")
    assert frozen == ("frozen", [10, 100], [0.6, 0.7])
    assert scratch == ("from scratch", [10, 100], [0.2, 0.5])


def test_zero_shot_against_few_shot(drawn):
    clip = {"method": "clip", "few_shot": {"1": 0.1, "2": 0.2, "4": 0.4}, "zero_shot": 0.3}
    simclr = {"method": "simclr", "few_shot": {"1": 0.2, "2": 0.3, "4": 0.5}}
    ours, zero_shot, theirs = drawn({"rows": [clip, simclr]}, "--few-shot")
    assert ours == ("CLIP", [1, 2, 4], [0.1, 0.2, 0.4])
    assert zero_shot == ("CLIP, zero-shot", [1, 2, 4], [0.3, 0.3, 0.3])
    assert theirs == ("SimCLR", [1, 2, 4], [0.2, 0.3, 0.5])


def test_lines_of_two_runs_have_their_names(tmp_path, monkeypatch):
    labels = []
    monkeypatch.setattr(figures, "plot", lambda panel, rows, x, y, label: labels.append(label))
    monkeypatch.setattr(figures, "finish", lambda *_: None)
    rows = [{"labels": 10, "frozen": 0.6}]
    figures.draw_labels({"one": rows, "two": rows}, tmp_path / "drawn.png")
    assert labels == ["one, frozen", "two, frozen"]


def test_the_heat_map_has_a_mean_of_the_seeds(tmp_path, monkeypatch):
    rows = []
    for seed, score in enumerate((0.2, 0.4)):
        for run, part in (("simclr-shapes", "z"), ("simclr-shapes", "h"), ("unknown", "h")):
            scores = {"kind": score, "size": -0.1, "turned": 0.9, "gray": 0.5, "noise": 0.8}
            rows.append({"run": run, "part": part, "seed": seed, "scores": scores})
    chance = {"kind": 0.1, "size": 0.0, "turned": 0.25, "gray": 0.5, "noise": 0.5}
    record = {"chance": chance, "rows": rows}
    texts = []
    monkeypatch.setattr(
        matplotlib.axes.Axes, "text", lambda _, x, y, text, **__: texts.append(text)
    )
    shades = []
    imshow = matplotlib.axes.Axes.imshow

    def shown(panel, values, **style):
        shades.extend(values)
        return imshow(panel, values, **style)

    monkeypatch.setattr(matplotlib.axes.Axes, "imshow", shown)
    figures.draw_factors(record, tmp_path / "factors.png")
    assert texts[::2] == texts[1::2] == ["30 %", "-0.10", "90 %", "50 %", "80 %"]  # h, then z
    assert [row[0] for row in shades] == pytest.approx([0.2 / 0.9, 0, 0.65 / 0.75, 0, 0.6])
    assert list(tables.factor_means(record)) == ["SimCLR h", "SimCLR z"]


def test_the_bound_is_drawn_over_the_candidates(tmp_path, drawn):
    rows = [{"information": i, "N": n, "bound": i / n} for i in (1, 2) for n in (2, 4)]
    lines = drawn({"rows": rows}, "--bound")
    assert lines[0] == ("I = 1", [2, 4], [0.5, 0.25])
    assert lines[1] == ("I = 2", [2, 4], [1.0, 0.5])
    assert lines[2] == ("log N", [2, 4], [math.log(2), math.log(4)])


def test_images_on_a_circle_are_stacked_class_by_class(tmp_path, monkeypatch):
    bars = []
    bar = matplotlib.axes.Axes.bar

    def drawn(panel, middles, heights, width, bottom, **options):
        bars.append((options["label"], heights, bottom))
        return bar(panel, middles, heights, width, bottom, **options)

    monkeypatch.setattr(matplotlib.axes.Axes, "bar", drawn)
    row = {"encoder": "trained", "alignment": 0.1, "uniformity": -1}
    row["angles"] = [0.01, 0.02, -0.01, 0.03, math.pi + 0.01]
    record = {"classes": ["a", "b"], "labels": [0, 1, 1, 1, 0], "rows": [row, row]}
    figures.draw_circle(record, tmp_path / "circle.png")
    (a, heights_a, bottom_a), (b, heights_b, bottom_b) = bars[:2]
    assert (a, b) == ("a", "b")
    seen = [heights_a[0], heights_a[24], heights_b[0], heights_b[47]]
    assert seen == pytest.approx([1 / 3, 1 / 3, 2 / 3, 1 / 3])  # three are in the first direction
    assert bottom_a == [1.0] * 48
    assert bottom_b == [1 + height for height in heights_a]


def test_densities_are_drawn_beside_the_gaussian(drawn):
    lines = drawn(
        {name: [[0.1, 0.2], [0.3, 0.4]] for name in ("untrained", "trained")}, "--gaussian"
    )
    assert [label for label, _, _ in lines] == 2 * ["standard Gaussian"]
    _, x, y = lines[0]
    assert (min(x), max(x), max(y)) == (-4, 4, pytest.approx(0.3989, abs=1e-4))


@pytest.mark.parametrize(
    ("summary", "words", "reason"),
    [
        ({"semi_supervised": []}, ["--labels"], "record has no accuracies with few labels"),
        ({}, ["--few-shot"], "'rows'"),
        ({"trained": {}}, ["--labels"], "'semi_supervised'"),
        ({"history": HISTORY[:2]}, [], "fewer than three epochs are logged"),
        ({}, [], "'history'"),
        ({}, ["--factors"], "'rows'"),
        ({}, ["--bound"], "'rows'"),
        ({}, ["--circle"], "'rows'"),
        ({}, ["--gaussian"], "'untrained'"),
    ],
)
def test_what_has_nothing_to_draw_is_one_line(drawn, summary, words, reason):
    with pytest.raises(SystemExit, match=f"^error: not a run folder or a record .{reason}.$"):
        drawn(summary, *words)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(SystemExit, match="error: not a run folder or a record .*No such file"):
        figures.main([str(tmp_path / "none.json")])
