"""Every number in README.md and results/README.md is what a record says."""

import json
import math
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RECORDS = {
    path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "results").glob("*.json"))
}
PAGES = {  # each paragraph in one line
    name: re.sub(r"(?<=[^\n|])\n(?=[^\n|])", " ", (ROOT / name).read_text())
    for name in ("README.md", "results/README.md")
}
KEYS = {"clip": ("linear_probe", None), "dino": ("linear_probe_with_mean", "knn_with_mean")}
TITLES = {
    "simclr": "SimCLR", "moco": "MoCo v2", "rotnet": "RotNet, block 2", "mae": "MAE, patch tokens",
    "dino": "DINO, all tokens", "clip": "CLIP",
}  # fmt: skip


def percent(*values):
    return " → ".join(f"{100 * value:.1f}" for value in values) + " %"


def spread(values):
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f} %"


def row(*cells):
    return "| " + " | ".join(cells) + " |"


def seeds(method):
    return [RECORDS[f"{method}-shapes-seed{seed}"] for seed in (0, 1, 2)]


def change(records, key):
    """Untrained → trained, the mean of the records."""
    if key is None:
        return ""
    return percent(
        *(
            statistics.mean(record[part][key] for record in records)
            for part in ("untrained", "trained")
        )
    )


def main_table():
    for method in ("simclr", "moco"):
        record = RECORDS[f"{method}-cifar10-seed0"]
        assert record["command"].startswith(
            command := f"python {method}.py --dataset cifar10 --compile"
        )
        values = [change([record], key) for key in ("linear_probe", "knn")]
        seconds = f"pretraining {record['pretrain_seconds']:.0f} s"
        yield row(TITLES[method], f"`{command}`", *values, seconds, "H200")
    for method, title in TITLES.items():
        records = seeds(method)
        values = [change(records, key) for key in KEYS.get(method, ("linear_probe", "knn"))]
        seconds = f"{statistics.mean(record['total_seconds'] for record in records):.0f} s"
        yield row(title, f"`python {method}.py`", *values, seconds, "2 CPU cores")
    for method in ("simclr", "moco", "rotnet", "mae", "dino"):
        record = RECORDS[f"{method}-cifar10-small-seed0"]
        assert record["command"].startswith(
            command := f"python {method}.py --dataset cifar10 --encoder small"
        )
        values = [change([record], key) for key in KEYS.get(method, ("linear_probe", "knn"))]
        yield row(
            TITLES[method],
            f"`{command}`",
            *values,
            f"{record['total_seconds'] / 60:.0f} min",
            "2 CPU cores",
        )


def flickr_row():
    record = RECORDS["clip-flickr8k-small-seed0"]
    recall = change([record], "text_to_image_r10")
    minutes = f"{record['total_seconds'] / 60:.0f} min"
    yield row("CLIP, recall@10", f"`{record['command']}`", recall, "", minutes, "2 CPU cores")


def seed_table():
    for method, title in TITLES.items():
        for key in filter(None, KEYS.get(method, ("linear_probe", "knn"))):
            values = [change([record], key) for record in seeds(method)]
            yield row(title, "kNN" if "knn" in key else "linear probe", *values)


def projection_table():
    for head, name in (
        ("none", "projection-none"),
        ("linear", "projection-linear"),
        ("mlp", "seed0"),
    ):
        trained = RECORDS[f"simclr-shapes-{name}"]["trained"]
        keys = ("linear_probe", "linear_probe_z", "knn", "knn_z")
        yield row(head, *(percent(trained[key]) if key in trained else "" for key in keys))


def label_tables():
    for name, title in (
        ("simclr-shapes-labels", "shapes"),
        ("simclr-cifar10-small-labels", "CIFAR-10 †"),
    ):
        for line in RECORDS[name]["semi_supervised"]:
            keys = ("linear_probe", "fine_tuned", "from_scratch")
            yield row(title, f"{line['labels']:,}", *(percent(line[key]) for key in keys))
    for line in RECORDS["rotnet-shapes-labels"]["semi_supervised"]:
        yield row(f"{line['labels']:,}", percent(line["frozen"]), percent(line["from_scratch"]))


def rotnet():
    blocks = RECORDS["rotnet-shapes-labels"]["blocks"]
    for number, (before, after) in enumerate(
        zip(blocks["untrained"], blocks["trained"], strict=True), 1
    ):
        cells = (
            percent(before[k], after[k]) if k in after else ""
            for k in ("linear_probe", "knn", "nonlinear", "conv")
        )
        yield row(f"block {number}", *cells)
    yield row(
        "rotations", *(percent(record["pretext_task"]["rotation"]) for record in seeds("rotnet"))
    )


def ablations():
    columns = {
        "moco-ablation": ("linear_probe", "knn"),
        "mae-mask-token": ("fine_tuned", "linear_probe", "from_scratch"),
        "mae-mask-ratio": ("fine_tuned", "linear_probe"),
        "mae-target": ("fine_tuned", "linear_probe"),
    }
    for name, keys in columns.items():
        papers = 1 if name == "moco-ablation" else 2
        for line in RECORDS[name]["rows"]:
            paper = [percent(value) for value in line["paper"]] or [""] * papers
            yield row(
                line["case"], *paper, *(spread([run[key] for run in line["runs"]]) for key in keys)
            )
    for line in RECORDS["clip-split"]["rows"]:
        keys = ("text_to_image_r1", "text_to_image_r5", "text_to_image_r10", "val_recall")
        yield row(line["case"], *(percent(line["runs"][0][key]) for key in keys))


def mae():
    for name, key in (
        ("mean of the patch tokens", "linear_probe"),
        ("class token", "linear_probe_class_token"),
    ):
        yield row(name, *(change([record], key) for record in seeds("mae")))
    trained = RECORDS["mae-shapes-fine-tune"]["trained"]
    yield row(percent(trained["fine_tuned"]), percent(trained["from_scratch"]))
    record = RECORDS["mae-masking-cpu"]
    for name, rate in record["images_per_second"].items():
        yield row(name, f"{rate:.0f} images/s", f"{record['flop_per_image'][name] / 1e6:.0f} MFLOP")


def dino():
    for title, name in (
        ("centered and sharpened", "seed0"),
        ("not centered", "no-centering"),
        ("not sharpened", "no-sharpening"),
    ):
        record = RECORDS[f"dino-shapes-{name}"]
        last = record["history"][-1]
        scores = (change([record], key) for key in ("linear_probe_with_mean", "knn_with_mean"))
        yield row(
            title, *(f"{last[key]:.2f}" for key in ("entropy", "entropy_of_mean", "kl")), *scores
        )
    features = (
        ("class token, linear probe", "linear_probe"),
        ("class token, kNN of the paper", "knn_20"),
    )
    for name, key in features:
        yield row(name, *(change([record], key) for record in seeds("dino")))


def clip():
    for seed, record in enumerate(seeds("clip")):
        yield row(f"{seed}", *(change([record], key) for key in ("zero_shot", "zero_shot_unseen")))
    trained = RECORDS["clip-shapes-seed0"]["trained"]
    shots = (percent(trained[f"linear_probe_{n}_per_class"]) for n in (1, 2, 4, 8, 16))
    yield row("accuracy", *shots, percent(trained["zero_shot"]))
    record = RECORDS["clip-flickr8k-small-seed0"]
    for name, way in (
        ("a caption finds its image", "text_to_image"),
        ("an image finds a caption", "image_to_text"),
    ):
        yield row(name, *(change([record], f"{way}_r{k}") for k in (1, 5, 10)))
    yield f"zero-shot, {percent(RECORDS['clip-flickr8k-small-zero-shot-cifar10']['zero_shot'])}"
    yield f"{percent(record['unknown_words'])} of the words"


FAMILIES = {
    "ResNet": ("simclr", "moco", "barlow_twins", "vicreg", "swav", "simsiam", "byol", "clip"),
    "NiN": ("rotnet", "relative_patch", "jigsaw", "colorization", "inpainting"),
    "ViT": ("mae", "simmim", "dino"),
}
RELATIVES = {
    "barlow_twins": "Barlow Twins", "vicreg": "VICReg", "swav": "SwAV",
    "simsiam": "SimSiam", "byol": "BYOL",
    "relative_patch": "relative patches",
    "jigsaw": "jigsaw puzzles", "colorization": "colorization",
    "inpainting": "inpainting", "simmim": "SimMIM",
}  # fmt: skip


def scores(record, method=""):
    return [change([record], key) for key in KEYS.get(method, ("linear_probe", "knn"))]


def relatives():
    for encoder, methods in FAMILIES.items():
        for method in methods:
            record = RECORDS[f"{method}-shapes-seed0"]
            assert method not in RELATIVES or record["command"] == f"python relatives/{method}.py"
            name = RELATIVES.get(method) or TITLES[method].split(",")[0]
            yield row(encoder, name, *scores(record, method), f"{record['total_seconds']:.0f} s")
    for name, title in (
        ("simsiam-shapes-seed0", "SimSiam"),
        ("simsiam-shapes-no-predictor", "SimSiam, no predictor"),
        ("simsiam-shapes-no-stop-gradient", "SimSiam, gradients to both sides"),
        ("byol-shapes-seed0", "BYOL"),
        ("byol-shapes-no-predictor", "BYOL, no predictor"),
    ):
        yield row(title, f"{RECORDS[name]['history'][-1]['spread']:.2f}", *scores(RECORDS[name]))
    for title, data in (("shapes", "shapes"), ("CIFAR-10", "cifar10-small")):
        for name, patches in (("seed0", "with gaps, moved at random"), ("shortcuts", "without")):
            record = RECORDS[f"relative_patch-{data}-{name}"]
            yield row(title, patches, percent(record["pretext_task"]["position"]), *scores(record))
    solved = RECORDS["jigsaw-shapes-seed0"]["pretext_task"]["permutation"]
    yield f"{percent(solved)} of the permutations"
    for title, name in (
        ("shapes", "colorization-shapes-seed0"),
        ("CIFAR-10", "colorization-cifar10-small-seed0"),
    ):
        yield row(title, *scores(RECORDS[name]))
    for name, title in (("no-adversary", "0"), ("seed0", "0.001"), ("adversary-1", "1")):
        record = RECORDS[f"inpainting-shapes-{name}"]
        terms = [
            f"{record['pretext_task'][key]:.2f}"
            for key in ("reconstruction", "adversarial", "sharpness")
        ]
        yield row(title, *terms, *scores(record))
    tuned = RECORDS["simmim-shapes-fine-tune"]["trained"]
    yield f"{percent(tuned['fine_tuned'])} against {percent(tuned['from_scratch'])} from scratch"


def speed():
    for name, title in (
        ("cpu", "CPU"),
        ("cpu-compiled", "CPU, compiled"),
        ("h200", "H200, compiled †"),
    ):
        record = RECORDS[f"benchmark-{name}"]
        views, images, share = (
            record[key] for key in ("views_per_second", "images_per_second", "share_of_bound")
        )
        rates = (*views.values(), *images.values())
        yield row(
            title,
            *(f"{rate:,.0f}" for rate in rates),
            *(f"{share[key]:.2f}" for key in ("live", "lightly")),
        )
    for size, peak in RECORDS["benchmark-queue-cpu"]["peak_memory_gb"].items():
        yield row(f"{int(size):,}", f"{peak:.2f} GB")


def in_words():
    """What the findings say in words."""

    def mean(name, case, key):
        return statistics.mean(run[key] for run in RECORDS[name]["rows"][case]["runs"])

    words = {7: "seven", 12: "twelve"}
    head = mean("moco-ablation", 0, "linear_probe") - mean("moco-ablation", 1, "linear_probe")
    yield f"costs {words[round(100 * head)]} points"
    normalized = mean("mae-target", 0, "linear_probe") - mean("mae-target", 1, "linear_probe")
    yield f"loses {words[round(100 * normalized)]} points"
    recall = RECORDS["clip-flickr8k-small-seed0"]["trained"]["text_to_image_r10"]
    assert 18 < recall / (10 / 1000) < 22  # ten of 1,000 images
    yield "about twenty times as much as chance"
    record = RECORDS["benchmark-queue-cpu"]
    few, many = record["peak_memory_gb"].values()
    assert 0.09 < many - few < 0.12 and 0.25 < record["queue_grows_by_gb"] / (many - few) < 0.4
    yield "cost a tenth of a gigabyte, a third of it the queue itself"


def losses():
    yield f"log(2N - 1): {math.log(127):.2f} for N = 64, {math.log(1023):.2f} for 512"
    yield f"log(K + 1): {math.log(1025):.2f} for K = 1024, {math.log(4097):.2f} for 4096"
    yield f"log K: {math.log(256):.2f} for K = 256, {math.log(4096):.2f} for 4096"
    yield f"log N: {math.log(64):.2f} for N = 64"
    yield f"log 4 = {math.log(4):.2f}"
    record = RECORDS["simclr-cifar10-seed0"]
    steps = record["args"]["epochs"] * (50_000 // record["args"]["batch_size"])
    yield f"{steps:,} for SimCLR on CIFAR-10"
    first, last = (record["history"][i]["loss"] for i in (0, -1))
    yield f"{first:.2f} to {last:.2f} in {record['args']['epochs']} epochs"


def size():
    yield f"PyTorch with CUDA, {RECORDS['install-linux']['gigabytes']:.1f} GB in all"


def waiting():
    rates = RECORDS["wait-policy-cpu"]["images_per_second"]
    before, after = (statistics.mean(rates[policy]) for policy in ("default", "PASSIVE"))
    assert 0.775 < after / before < 0.825
    yield f"a fifth of the speed ({before:,.0f} → {after:,.0f} images/s)"


SAID = {
    "README.md": [main_table, flickr_row, losses, size, waiting],
    "results/README.md": [
        seed_table, projection_table, label_tables, rotnet, ablations, mae, dino, clip,
        relatives, speed, in_words,
    ],
}  # fmt: skip
SETTINGS = r"75 %|10 %|1 %"  # fractions that are asked for, not measured


@pytest.mark.parametrize("page", PAGES)
def test_every_number_has_its_record(page):
    text = PAGES[page]
    for source in SAID[page]:
        for said in source():
            assert text.count(said) == 1, f"{page} does not say: {said}"
            text = text.replace(said, "")
    assert (
        re.findall(
            rf"(?<![\d.,])(?!{SETTINGS})[\d.,]+ (?:%|s|min|GB|points?|times|images/s)(?!\w)"
            r"|[→±] \d.*",
            text,
        )
        == []
    )


def test_every_record_names_its_command_commit_device_version_and_date():
    for name, record in RECORDS.items():
        for run in [run for line in record.get("rows", []) for run in line["runs"]] or [record]:
            assert re.fullmatch("[0-9a-f]{7,40}", run["commit"]) and re.fullmatch(
                r"20\d\d-\d\d-\d\d", run["date"]
            ), name
            assert (
                run["device"] and run["torch"] and record["command"].startswith(("python ", "OMP_"))
            ), name


def test_every_figure_is_shown():
    shown = {
        Path(path).name
        for text in PAGES.values()
        for path in re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    }
    assert shown == {path.name for path in (ROOT / "results").glob("*.png")}


def test_every_link_within_the_repository_leads_somewhere():
    for page, text in PAGES.items():
        for path in re.findall(r"\]\(([^)#:]*)\)", text):
            assert ((ROOT / page).parent / path).exists(), path
