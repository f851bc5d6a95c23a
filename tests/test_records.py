"""Every number in README.md, results/README.md and the docstrings is what a record says."""

import ast
import math
import re
import statistics
from pathlib import Path

import pytest

from results import tables
from results.tables import change, percent

ROOT = Path(__file__).parent.parent
SCRIPTS = ("simclr.py", "moco.py", "rotnet.py", "mae.py", "dino.py", "clip.py")


def one_line(text):
    """Each paragraph in one line, tables as they are."""
    return re.sub(r"(?<=[^\n|])\n(?=[^\n|])", " ", text)


# ==================================================================================================
# Tables
# ==================================================================================================


@pytest.mark.parametrize("page", tables.PAGES)
def test_the_tables_are_up_to_date(page):
    text = (ROOT / page).read_text()
    assert tables.with_tables(text) == text, "run python results/tables.py"


def test_every_table_is_on_one_page():
    text = "".join((ROOT / page).read_text() for page in tables.PAGES)
    names = [name for _, name, _ in tables.TABLE.findall(text)]
    assert sorted(names) == sorted(tables.TABLES)
    assert text.count("<!--") == 2 * len(names)  # no marker that is misspelt


def test_a_table_that_is_out_of_date_is_made_anew():
    text = "Before.\n\n<!-- table: mae_speed -->\n| 1 image/s |\n<!-- end -->\n\nAfter.\n"
    record = tables.RECORDS["mae-masking-cpu"]
    rows = ["| encoder sees | speed | arithmetic of an image |", "|---|---|---|"]
    for name, rate in record["images_per_second"].items():
        arithmetic = f"{record['flop_per_image'][name] / 1e6:.0f} MFLOP"
        rows.append(f"| {name} | {rate:.0f} images/s | {arithmetic} |")
    table = "\n".join(["<!-- table: mae_speed -->", *rows, "<!-- end -->"])
    assert tables.with_tables(text) == f"Before.\n\n{table}\n\nAfter.\n"


def test_cells():
    assert percent(0.12345) == "12.3 %"
    assert percent(0.1, 0.987) == "10.0 → 98.7 %"
    assert tables.spread([0.1, 0.2, 0.3]) == "20.0 ± 10.0 %"
    assert tables.spread([0.1]) == "10.0 %"
    assert tables.listed([0.1, 0.2]) == "10.0 %, 20.0 %"
    records = [{"untrained": {"x": 0.1}, "trained": {"x": y}} for y in (0.5, 0.7)]
    assert change("x", *records) == "10.0 → 60.0 %"
    assert change("", *records) == ""
    assert tables.mean([0.1, 0.2, 0.3]) == "20.0 %"
    assert tables.verdict(True) == "yes"
    assert tables.verdict(False) == tables.verdict(False, False) == "no"
    assert tables.verdict(False, True) == "no; CIFAR-10 yes"
    assert tables.markdown([("a", "b"), ("1", "")]) == "| a | b |\n|---|---|\n| 1 |  |\n"


# ==================================================================================================
# Numbers in sentences
# ==================================================================================================


SMALL = "simclr", "moco", "rotnet", "mae", "dino"


def scores_of(method, name):
    """Linear probe and kNN of the trained encoder."""
    trained = tables.RECORDS[name]["trained"]
    keys = tables.PROBE.get(method, "linear_probe"), tables.KNN.get(method, "knn")
    return [trained[key] for key in keys]


def readme():
    """What sentences and tables by hand in README.md say."""
    yield f"log(2N - 1): {math.log(127):.2f} for N = 64, {math.log(1023):.2f} for 512"
    yield f"log(K + 1): {math.log(1025):.2f} for K = 1024, {math.log(4097):.2f} for 4096"
    yield f"log K: {math.log(256):.2f} for K = 256, {math.log(4096):.2f} for 4096"
    yield f"log N: {math.log(64):.2f} for N = 64"
    yield f"log 4 = {math.log(4):.2f}"
    flickr8k = tables.RECORDS["clip-flickr8k-small-seed0"]
    recall = change("text_to_image_r10", flickr8k)
    yield f"recall@10 {recall} in {flickr8k['total_seconds'] / 60:.0f} minutes on two CPU cores"
    floor = scores_of("patches", "patches-cifar10-seed0")
    small = {method: scores_of(method, f"{method}-cifar10-small-seed0") for method in SMALL}
    assert all(probe < floor[0] for probe, _ in small.values())
    assert {method for method, (_, knn) in small.items() if knn < floor[1]} == {"mae", "dino"}
    for method in ("simclr", "moco"):
        probe, knn = scores_of(method, f"{method}-cifar10-seed0")
        assert probe > floor[0] and knn > floor[1]
    record = tables.RECORDS["simclr-cifar10-seed0"]
    epochs = record["args"]["epochs"]
    steps = epochs * (50_000 // record["args"]["batch_size"])
    yield f"{steps:,} for SimCLR on CIFAR-10"
    first = record["history"][0]["loss"]
    last = record["history"][-1]["loss"]
    yield f"{first:.2f} to {last:.2f} in {epochs} epochs"
    yield f"PyTorch with CUDA, {tables.RECORDS['install-linux']['gigabytes']:.1f} GB in all"
    few = tables.RECORDS["simclr-shapes-init-labels"]["semi_supervised"][0]
    frozen, tuned, scratch = [percent(value) for name, value in few.items() if name != "labels"]
    yield f"frozen probe of {frozen}, {tuned} fine-tuned, and {scratch} from scratch"

    def rank(name):
        return tables.RECORDS[name]["history"][-1]["rank"]

    yield f"ends at {rank('simclr-shapes-seed0'):.0f} in SimCLR's demo"
    yield f"at {rank('simsiam-shapes-seed0'):.0f} in SimSiam's"
    yield f"at {rank('simsiam-shapes-no-predictor'):.0f} without its predictor"
    dino = [rank(f"dino-shapes-{end}") for end in ("seed0", "no-centering", "no-sharpening")]
    yield "ends at {:.1f}, and at {:.1f} and {:.1f} in the collapses".format(*dino)
    rates = tables.RECORDS["wait-policy-cpu"]["images_per_second"]
    spinning = statistics.mean(rates["default"])
    waiting = statistics.mean(rates["PASSIVE"])
    assert 0.775 < waiting / spinning < 0.825
    yield f"a fifth of the speed ({spinning:,.0f} → {waiting:,.0f} images/s)"


def mean_of(name, row, key):
    return statistics.mean(run[key] for run in tables.RECORDS[name]["rows"][row]["runs"])


def findings():
    """What sentences in results/README.md say."""
    plain, both = [mean_of("simclr-views-cifar10", row, "linear_probe") for row in (0, 1)]
    assert round(100 * (both - plain)) == 9
    yield "cost nine points"
    for row in tables.RECORDS["simclr-labels-cifar10"]["rows"]:
        gain = {}
        for n in (500, 5000):
            gains = [100 * (r[f"fine_tuned_{n}"] - r[f"from_scratch_{n}"]) for r in row["runs"]]
            assert min(gains) > 0
            gain[n] = statistics.mean(gains)
        if row["case"].startswith("crops"):
            assert round(gain[500]) == 8
        if row["case"].endswith("as long"):
            assert gain[5000] > 1
    yield "with 500 labels by 8 points"
    assert min(tables.runs_of("simclr-supervised", 0, "linear_probe")) > 0.995  # perfectly
    known = tables.factor_means(tables.RECORDS["factors-cifar10"])
    side = {network: scores["light, left-right"] for network, scores in known.items()}
    height = {network: scores["light, up-down"] for network, scores in known.items()}
    color = {network: scores["mean color"] for network, scores in known.items()}
    turned = {network: scores["turned by 0, 90, 180, 270"] for network, scores in known.items()}
    random = "untrained ResNet"
    for h in ("SimCLR h", "MoCo h", "SupCon h, with labels"):
        z = h.replace(" h", " z")
        assert side[h] < 0.5 * side[random] and side[z] < 0.15 * side[random]
        assert color[h] < color[random] and height[h] < height[random]
    assert height["SimCLR h"] > 0.9 * height[random] and height["MoCo h"] > 0.89 * height[random]
    assert height["SimCLR z"] > 0.8 * height[random] and height["MoCo z"] > 0.7 * height[random]
    assert max(turned, key=turned.get) == "RotNet, block 2"
    assert all(0.47 < turned[name] < 0.51 for name in turned if name.startswith("untrained"))
    assert color["MAE"] > 0.99 and side["MAE"] > side["untrained ViT"] + 0.1
    assert height["MAE"] > height["untrained ViT"] + 0.05
    labels, ours = known["SupCon h, with labels"], known["SimCLR h"]
    assert labels["kind of thing"] == max(scores["kind of thing"] for scores in known.values())
    for name in ("mean color", "light, left-right", "light, up-down"):
        assert labels[name] < ours[name] < known[random][name]
    for data in ("", "-cifar10"):
        gains = {}
        for method in ("rotnet", "simclr"):
            rows = tables.RECORDS[f"{method}-any-angle{data}"]["rows"]
            gains[method] = [
                statistics.mean(
                    r["linear_probe"] - r["untrained_linear_probe"] for r in row["runs"]
                )
                for row in rows
            ]
        assert gains["rotnet"][1] < 0 < gains["simclr"][1] < gains["simclr"][0]
    rotnet = tables.RECORDS["rotnet-cifar10-labels"]
    gains = [line["frozen"] - line["from_scratch"] for line in rotnet["semi_supervised"]]
    assert gains[1] > 0 > gains[2]  # 1,000 labels, and 4,000
    blocks = rotnet["blocks"]["trained"]
    for key, best in {"linear_probe": 1, "knn": 1, "nonlinear": 0}.items():
        assert blocks[best][key] == max(block[key] for block in blocks)
    before, after, collapsed = tables.RECORDS["circle"]["rows"]
    yield f"from {before['uniformity']:.2f} to {after['uniformity']:.2f}"
    assert after["alignment"] < before["alignment"]
    assert collapsed["uniformity"] > -0.01
    middles = [(k + 0.5) / 5 - 4 for k in range(40)]
    normal = [math.exp(-s * s / 2) / math.sqrt(2 * math.pi) for s in middles]
    distance = {}
    for name in ("untrained", "trained"):
        for density in tables.RECORDS["lejepa-gaussian"][name]:
            errors = [abs(a - b) for a, b in zip(density, normal, strict=True)]
            distance.setdefault(name, []).append(statistics.mean(errors))
    assert max(distance["trained"]) < 0.5 * min(distance["untrained"])
    v1 = mean_of("moco-versions", 0, "linear_probe")
    with_head = mean_of("moco-versions", 1, "linear_probe")
    assert round(100 * (v1 - with_head)) == 7
    yield "costs seven points"
    with_blur = mean_of("moco-versions", 3, "linear_probe")
    assert round(100 * (with_head - with_blur)) == 4
    yield "blur on top of it four more"
    first, head, aug_plus, both, cosine = tables.row_means("moco-versions-cifar10")
    assert min(aug_plus - first, both - head) > 0.01
    assert round(100 * (first - head)) == round(100 * (aug_plus - both)) == 1
    yield "costs about a point"
    assert abs(cosine - both) < 0.002
    pixels = mean_of("mae-target", 0, "linear_probe")
    normalized = mean_of("mae-target", 1, "linear_probe")
    assert round(100 * (pixels - normalized)) == 7
    yield "loses seven points"
    for key in ("fine_tuned", "linear_probe"):
        pixels, normalized = [tables.runs_of("mae-target-cifar10", row, key) for row in (0, 1)]
        assert max(pixels) < min(normalized)
    scratch = tables.runs_of("mae-target-cifar10", 0, "from_scratch")
    assert max(scratch) < min(tables.runs_of("mae-target-cifar10", 0, "fine_tuned"))
    rows = tables.RECORDS["mae-mask-ratio-cifar10"]["rows"]
    ratios = tables.row_means("mae-mask-ratio-cifar10")
    for seed in (0, 1):
        probes = [row["runs"][seed]["linear_probe"] for row in rows]
        assert max(probes) == probes[2] < sorted(probes)[2] + 0.01
    yield f"within {100 * (max(ratios) - min(ratios)):.1f} points"
    for key in ("linear_probe", "knn", "linear_probe_class_token", "knn_class_token"):
        probes = tables.row_means("mae-mask-sampling-cifar10", key)
        assert max(probes) == probes[0]
        if key == "linear_probe":
            assert min(probes) > max(probes) - 0.01
        if key == "linear_probe_class_token":
            assert min(probes) == probes[2]
    none, shifts, *crops = tables.row_means("mae-augment-cifar10")
    assert max(none, *crops) < min(none, *crops) + 0.001
    assert round(100 * (min(none, *crops) - shifts)) == 2
    yield "only shifts are two points below"
    (_, *mae), (_, *dino) = tables.fine_tuned_alike()
    assert round(100 * (mae[0] - mae[1])) == 4
    yield "gains four points"
    assert dino[0] < dino[1] and dino[0] < mae[0]
    tuned = tables.RECORDS["mae-shapes-fine-tune-32-lr"]["trained"]
    yield f"{100 * (tuned['fine_tuned'] - tuned['from_scratch']):.0f} points behind"
    shallow, deep = [mean_of("mae-decoder-depth", n, "linear_probe_class_token") for n in (0, 4)]
    yield f"{percent(shallow)} with one block, {percent(deep)} with twelve"
    for key, best in {"linear_probe_class_token": 2, "linear_probe": 1}.items():
        probes = tables.row_means("mae-decoder-depth-cifar10", key)
        assert max(probes) == probes[best] < probes[0] + 0.02 and min(probes) == probes[0]
    widths = tables.row_means("mae-decoder-dim-cifar10")
    assert max(widths[:2]) < min(widths[2:]) and widths[4] > max(widths[:4]) + 0.01
    rows = tables.RECORDS["benchmark-memory-cpu"]["rows"]
    simclr, moco, _ = [row for row in rows if row["batch_size"] == 1024]
    assert 0.70 < moco["gb"] / simclr["gb"] < 0.80
    yield "a quarter less at N = 1,024"
    assert moco["images_per_second"] > 1.3 * simclr["images_per_second"]
    short, *_, long = [row for row in rows if row["method"] == "moco" and row["batch_size"] == 64]
    yield f"from {short['gb']:.2f} to {long['gb']:.2f} GB"
    assert 0.5 < long["images_per_second"] / short["images_per_second"] < 0.6
    yield "nearly half of the speed"
    flickr8k = tables.RECORDS["clip-flickr8k-small-seed0"]
    assert 18 < flickr8k["trained"]["text_to_image_r10"] / (10 / 1000) < 22  # ten of 1,000 images
    yield "about twenty times as much as chance"
    yield f"{percent(flickr8k['unknown_words'])} of the words"
    runs = [f"{name}-shapes-36-epochs" for name in ("simclr", "barlow_twins", "byol")]
    simclr, barlow_twins, byol = [scores_of("", run)[0] for run in runs]
    assert simclr - 0.02 < barlow_twins < simclr and byol < simclr - 0.2
    names = "simclr", "vicreg", "lejepa", "barlow_twins", "swav", "simsiam", "byol"
    floor = scores_of("patches", "patches-cifar10-seed0")
    short = {name: scores_of(name, f"{name}-cifar10-short-seed0") for name in (*names, "supcon")}
    probes = [short[name][0] for name in names]
    assert probes[0] > max(probes[1:]) and max(probes[-2:]) < min(probes[:-2])
    assert all(probe < floor[0] for probe, _ in short.values())
    assert {name for name, (_, knn) in short.items() if knn < floor[1]} == {"simsiam", "byol"}
    for name in ("rotnet", "colorization"):
        assert scores_of("", f"{name}-cifar10-short-seed0")[1] > floor[1]
    rotations = scores_of("", "rotnet-cifar10-short-seed0")[0]
    colors = scores_of("", "colorization-cifar10-short-seed0")[0]
    patches = scores_of("", "relative_patch-cifar10-short-seed0")[0]
    assert rotations > colors > patches + 0.02
    assert all(abs(rotations - short[name][0]) < 0.01 for name in ("vicreg", "swav"))
    gains = []
    for name in ("jigsaw", "relative_patch"):
        record = tables.RECORDS[f"{name}-cifar10-short-seed0"]
        gains.append(record["trained"]["linear_probe"] - record["untrained"]["linear_probe"])
        assert scores_of(name, f"{name}-cifar10-short-seed0")[1] < floor[1]
    assert abs(gains[0] - gains[1]) < 0.01
    record = tables.RECORDS["inpainting-cifar10-short-no-adversary"]
    assert record["trained"]["linear_probe"] - record["untrained"]["linear_probe"] < min(gains)
    assert record["trained"]["knn"] < floor[1]
    names = [f"clip-shapes-seed{seed}" for seed in range(3)] + ["slip-shapes-seed0"]
    *clip, slip = [tables.RECORDS[name]["trained"]["zero_shot_unseen"] for name in names]
    assert min(clip) < slip < max(clip)
    assert tables.RECORDS["siglip-shapes-seed0"]["trained"]["zero_shot_unseen"] < min(clip)
    for row in range(4):
        names = "clip-batches", "siglip-batches"
        softmax, sigmoid = [tables.runs_of(name, row, "text_to_image_r10") for name in names]
        assert all(a > b for a, b in zip(softmax, sigmoid, strict=True))
    names = [f"inpainting-cifar10-short-{name}" for name in ("no-adversary", "adversary-1")]
    blurred, sharp = [tables.RECORDS[name]["pretext_task"] for name in names]
    assert sharp["sharpness"] > blurred["sharpness"] + 0.2
    assert sharp["reconstruction"] > blurred["reconstruction"] + 0.1
    assert abs(scores_of("", names[0])[0] - scores_of("", names[1])[0]) < 0.005
    known = tables.RECORDS["factors-captions"]
    for factor in ("light, up-down", "place, up-down"):
        slip, siglip = [
            tables.factor_scores(known, f"{name}-shapes", "h", factor)[0]
            for name in ("slip", "siglip")
        ]
        seeds = tables.factor_scores(tables.RECORDS["factors"], "clip-shapes", "h", factor)
        assert slip > max(seeds) + 0.05 and siglip < max(seeds) + 0.05
    names = "slip-flickr8k-small-seed0", "clip-flickr8k-small-seed0", "clip-flickr8k-small-init"
    ordered = [tables.RECORDS[name] for name in names]
    for key in ("text_to_image_r10", "image_to_text_r10"):
        recalls = [record["trained"][key] for record in ordered]
        assert recalls == sorted(recalls)
    for epoch in range(5, 31, 5):
        recalls = [record["history"][epoch - 1]["val_recall"] for record in ordered]
        assert recalls == sorted(recalls)
    zero_shot = tables.RECORDS["clip-flickr8k-small-zero-shot-cifar10"]["zero_shot"]
    yield f"zero-shot, {percent(zero_shot)}"
    solved = tables.RECORDS["jigsaw-shapes-seed0"]["pretext_task"]["permutation"]
    yield f"{percent(solved)} of the permutations"
    tuned = tables.RECORDS["simmim-shapes-fine-tune"]["trained"]
    yield f"{percent(tuned['fine_tuned'])} against {percent(tuned['from_scratch'])} from scratch"
    names = [f"dino-shapes-seed{seed}" for seed in range(3)] + ["ibot-shapes-seed0"]
    *dino, ibot = [tables.RECORDS[name]["trained"]["linear_probe_with_mean"] for name in names]
    assert ibot < min(dino)
    K = tables.RECORDS["dino-shapes-seed0"]["args"]["out_dim"]
    yield f"log {K} = {math.log(K):.2f}"


@pytest.mark.parametrize(
    ("page", "phrases"), [("README.md", readme), ("results/README.md", findings)]
)
def test_numbers_in_sentences_have_their_record(page, phrases):
    text = tables.TABLE.sub("", (ROOT / page).read_text())
    text = one_line(text)
    for phrase in phrases():
        assert text.count(phrase) == 1, f"{page} does not say: {phrase}"
        text = text.replace(phrase, "")
    settings = r"75 %|60 %|10 %|1 %"  # asked for, or chance, not measured
    units = r"%|s|min|GB|points?|times|images/s"
    left = re.findall(rf"(?<![\d.,])(?!{settings})[\d.,]+ (?:{units})(?!\w)|[→±] \d.*", text)
    assert left == []


def docstring(script):
    """The paragraph about records."""
    text = ast.get_docstring(ast.parse((ROOT / script).read_text()))
    (paragraph,) = [part for part in text.split("\n\n") if "in results/)" in part]
    return one_line(paragraph)


def arrow(key, name):
    return change(key, tables.RECORDS[name]).replace("→", "->")


def docstrings():
    """What the docstrings say."""
    for method in ("simclr", "moco"):
        yield f"{method}.py", f"shapes {arrow('linear_probe', f'{method}-shapes-seed0')}"
        gpu = f"{method}-cifar10-seed0"
        knn = arrow("knn", gpu)
        yield f"{method}.py", f"CIFAR-10 {arrow('linear_probe', gpu)} (kNN {knn}) with ResNet-18"
    seconds = tables.RECORDS["simclr-cifar10-seed0"]["pretrain_seconds"]
    yield "simclr.py", f"{seconds:.0f} s of pretraining"
    yield "rotnet.py", f"shapes {arrow('linear_probe', 'rotnet-shapes-seed0')}"
    yield "mae.py", f"linear probe {arrow('linear_probe', 'mae-shapes-seed0')}"
    tuned = tables.RECORDS["mae-shapes-fine-tune"]["trained"]
    scratch = percent(tuned["from_scratch"])
    yield (
        "mae.py",
        f"fine-tuned {percent(tuned['fine_tuned'])}, from scratch by the same recipe {scratch}",
    )
    yield "dino.py", arrow("linear_probe_with_mean", "dino-shapes-seed0")
    clip = tables.RECORDS["clip-shapes-seed0"]["trained"]
    yield "clip.py", f"zero-shot {percent(clip['zero_shot'])}"
    yield "clip.py", f"trained {arrow('linear_probe', 'clip-shapes-seed0')}"
    flickr8k = tables.RECORDS["clip-flickr8k-small-seed0"]["trained"]
    yield "clip.py", f"over 1,000 images {percent(flickr8k['text_to_image_r10'])}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_numbers_in_docstrings_have_their_record(script):
    text = docstring(script)
    for name, phrase in docstrings():
        if name == script:
            assert text.count(phrase) == 1, f"{script} does not say: {phrase}"
            text = text.replace(phrase, "")
    assert re.findall(r"\d[\d.]* (?:%|->|s\b)", text.replace("chance is 1 %", "")) == []


# ==================================================================================================
# Records and figures
# ==================================================================================================


@pytest.mark.parametrize("name", tables.RECORDS)
def test_a_record_names_where_it_comes_from(name):
    record = tables.RECORDS[name]
    assert record["command"].startswith(("python ", "OMP_"))
    runs = [run for row in record.get("rows", []) for run in row.get("runs", [])]
    for run in runs or [record]:
        assert re.fullmatch("[0-9a-f]{7,40}", run["commit"])
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", run["date"])
        assert run["device"] and run["torch"]


def test_every_record_is_on_a_page(monkeypatch):
    asked = set()

    class Noted(dict):
        def __getitem__(self, name):
            asked.add(name)
            return super().__getitem__(name)

    monkeypatch.setattr(tables, "RECORDS", Noted(tables.RECORDS))
    for page in tables.PAGES:
        tables.with_tables((ROOT / page).read_text())
    for phrases in (readme, findings, docstrings):
        list(phrases())
    assert asked == set(tables.RECORDS)


def test_every_figure_is_shown():
    shown = set()
    for page in tables.PAGES:
        text = one_line((ROOT / page).read_text())
        paths = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
        shown |= {Path(path).name for path in paths}
    assert shown == {path.name for path in (ROOT / "results").glob("*.png")}
    vectors = {path.with_suffix(".png").name for path in (ROOT / "results").glob("*.svg")}
    assert vectors <= shown


@pytest.mark.parametrize("page", tables.PAGES)
def test_links_within_the_repository_lead_somewhere(page):
    text = one_line((ROOT / page).read_text())
    for path in re.findall(r"\]\(([^)#:]*)\)", text):
        assert ((ROOT / page).parent / path).exists(), path
