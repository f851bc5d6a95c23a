"""Writes the tables of README.md and results/README.md from the records in this folder.

    python results/tables.py

A table stands between two comments, <!-- table: NAME --> and <!-- end -->, and NAME is a function
of this file, which yields its header and then its rows. All else on the pages is written by hand.
"""

import json
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "results/README.md")
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
RECORDS = {path.stem: json.loads(path.read_text()) for path in (ROOT / "results").glob("*.json")}


# === Cells ========================================================================================
TITLES = {
    "simclr": "SimCLR",
    "moco": "MoCo v2",
    "rotnet": "RotNet, block 2",
    "mae": "MAE, patch tokens",
    "dino": "DINO, all tokens",
    "clip": "CLIP",
}
PROBE = {"dino": "linear_probe_with_mean"}  # where it has another name
KNN = {"dino": "knn_with_mean", "clip": ""}  # clip.py measures none


def percent(*values):
    """Fractions -> "1.2 %", or "1.2 → 3.4 %"."""
    return " → ".join(f"{100 * value:.1f}" for value in values) + " %"


def spread(values):
    """Fractions -> their mean and standard deviation."""
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f} %"


def spread_of(row, key):
    """The same of a row of a record of ablation.py."""
    return spread([run[key] for run in row["runs"]])


def cell(factor, value):
    """A score of factors.py: an accuracy in percent, or an R2."""
    return f"{100 * value:.0f} %" if RECORDS["factors"]["chance"][factor] else f"{value:.2f}"


def change(key, *records):
    """Untrained → trained, the mean of the records; nothing without a key."""
    if not key:
        return ""
    untrained = statistics.mean(record["untrained"][key] for record in records)
    trained = statistics.mean(record["trained"][key] for record in records)
    return percent(untrained, trained)


def scores(method, *records):
    """Linear probe and kNN of a method, untrained → trained."""
    probe = PROBE.get(method, "linear_probe")
    knn = KNN.get(method, "knn")
    return change(probe, *records), change(knn, *records)


def seeds(method):
    return [RECORDS[f"{method}-shapes-seed{seed}"] for seed in range(3)]


def minutes(record):
    return f"{record['total_seconds'] / 60:.0f} min"


NETWORKS = {  # of results/factors.json: run and part, in the order of table and figure
    ("untrained ResNet", "h"): "untrained ResNet",
    ("simclr-shapes", "h"): "SimCLR h",
    ("simclr-shapes", "z"): "SimCLR z",
    ("simclr-projection-linear", "h"): "SimCLR h, linear head",
    ("simclr-projection-linear", "z"): "SimCLR z, linear head",
    ("simclr-projection-none", "h"): "SimCLR h, no head",
    ("simclr-jitter-strength-0-gray-0", "h"): "SimCLR h, crop and flip",
    ("moco-shapes", "h"): "MoCo h",
    ("moco-shapes", "z"): "MoCo z",
    ("simclr-jitter-strength-0-gray-0-projection-none-labels", "h"): "supervised on kind",
    ("clip-shapes", "h"): "CLIP h",
    ("clip-shapes", "common space"): "CLIP, common space",
    ("untrained NiN", "block 2"): "untrained NiN",
    ("rotnet-shapes", "block 1"): "RotNet, block 1",
    ("rotnet-shapes", "block 2"): "RotNet, block 2",
    ("rotnet-shapes", "block 3"): "RotNet, block 3",
    ("relative_patch-shapes", "block 2"): "relative patches",
    ("inpainting-shapes", "block 2"): "inpainting",
    ("untrained NiN, standardized images", "block 2"): "untrained, standardized",
    ("jigsaw-shapes", "block 2"): "jigsaw",
    ("untrained NiN, gray images", "block 2"): "untrained, gray",
    ("colorization-shapes", "block 2"): "colorization",
    ("untrained ViT", "patch tokens"): "untrained ViT",
    ("mae-shapes", "patch tokens"): "MAE",
    ("untrained ViT with a stem", "all tokens"): "untrained ViT, stem",
    ("dino-shapes", "all tokens"): "DINO",
}


def factor_scores(record, run, part, factor):
    """All seeds of a network in a record of factors.py."""
    rows = [row for row in record["rows"] if (row["run"], row["part"]) == (run, part)]
    return [row["scores"][factor] for row in rows]


def factor_means(record):
    """A record of factors.py -> {network: {factor: mean of the seeds}}, of those NETWORKS that it
    has."""
    means = {}
    for (run, part), title in NETWORKS.items():
        if any((row["run"], row["part"]) == (run, part) for row in record["rows"]):
            means[title] = {
                factor: statistics.mean(factor_scores(record, run, part, factor))
                for factor in record["chance"]
            }
    return means


# === README.md ====================================================================================
def results():
    yield "method", "command", "linear probe", "kNN", "time", "device"
    for method in ("simclr", "moco"):
        record = RECORDS[f"{method}-cifar10-seed0"]
        command = f"`python {method}.py --dataset cifar10 --compile`"
        time = f"pretraining {record['pretrain_seconds']:.0f} s"
        yield TITLES[method], command, *scores(method, record), time, "H200"
    for method, title in TITLES.items():
        records = seeds(method)
        seconds = statistics.mean(record["total_seconds"] for record in records)
        row = title, f"`python {method}.py`", *scores(method, *records)
        yield *row, f"{seconds:.0f} s", "2 CPU cores"
    for method in ("simclr", "moco", "rotnet", "mae", "dino"):
        record = RECORDS[f"{method}-cifar10-small-seed0"]
        command = f"`python {method}.py --dataset cifar10 --encoder small`"
        yield TITLES[method], command, *scores(method, record), minutes(record), "2 CPU cores"
    record = RECORDS["clip-flickr8k-small-seed0"]
    recall = change("text_to_image_r10", record)
    yield "CLIP, recall@10", f"`{record['command']}`", recall, "", minutes(record), "2 CPU cores"


# === results/README.md ============================================================================
def demos():
    yield "method", "measure", "seed 0", "seed 1", "seed 2"
    for method, title in TITLES.items():
        rows = [scores(method, record) for record in seeds(method)]
        for name, cells in zip(("linear probe", "kNN"), zip(*rows, strict=True), strict=True):
            if any(cells):
                yield title, name, *cells


def projection_head():
    yield "head", "linear probe on h", "on z", "kNN on h", "on z"
    names = {"none": "projection-none", "linear": "projection-linear", "mlp": "seed0"}
    for head, name in names.items():
        trained = RECORDS[f"simclr-shapes-{name}"]["trained"]
        keys = ("linear_probe", "linear_probe_z", "knn", "knn_z")
        yield head, *[percent(trained[key]) if key in trained else "" for key in keys]


def few_labels():
    yield "data", "labels", "linear probe, frozen", "fine-tuned", "from scratch"
    names = {"shapes": "simclr-shapes-labels", "CIFAR-10 †": "simclr-cifar10-small-labels"}
    for data, name in names.items():
        for line in RECORDS[name]["semi_supervised"]:
            keys = ("linear_probe", "fine_tuned", "from_scratch")
            yield data, f"{line['labels']:,}", *[percent(line[key]) for key in keys]


def rotnet_blocks():
    yield "features of", "linear probe", "kNN", "three layers", "convolutional"
    blocks = RECORDS["rotnet-shapes-labels"]["blocks"]
    pairs = zip(blocks["untrained"], blocks["trained"], strict=True)
    for number, (before, after) in enumerate(pairs, 1):
        keys = ("linear_probe", "knn", "nonlinear", "conv")
        cells = [percent(before[key], after[key]) if key in after else "" for key in keys]
        yield f"block {number}", *cells


def rotnet_rotations():
    yield "pretext task", "seed 0", "seed 1", "seed 2"
    yield "rotations", *[percent(r["pretext_task"]["rotation"]) for r in seeds("rotnet")]


def rotnet_labels():
    yield "labels", "on pretrained, frozen blocks", "the same network from scratch"
    for line in RECORDS["rotnet-shapes-labels"]["semi_supervised"]:
        yield f"{line['labels']:,}", percent(line["frozen"]), percent(line["from_scratch"])


def ablation(name, *keys):
    """The rows of a record of ablation.py: case, the paper's numbers, and these of ours."""
    rows = RECORDS[name]["rows"]
    columns = max(len(row["paper"]) for row in rows)
    for row in rows:
        paper = [percent(value) for value in row["paper"]] or [""] * columns
        ours = [spread([run[key] for run in row["runs"]]) for key in keys]
        yield row["case"], *paper, *ours


MAE_COLUMNS = ("lecture, fine-tuned", "lecture, linear", "fine-tuned", "linear probe")


def moco_versions():
    yield "version", "lecture", "linear probe", "kNN"
    yield from ablation("moco-ablation", "linear_probe", "knn")


def moco_queue():
    yield "queue size K", "memory"
    for size, peak in RECORDS["benchmark-queue-cpu"]["peak_memory_gb"].items():
        yield f"{int(size):,}", f"{peak:.2f} GB"


def mae_probes():
    yield "features", "seed 0", "seed 1", "seed 2"
    names = {
        "mean of the patch tokens": "linear_probe",
        "class token": "linear_probe_class_token",
    }
    for title, key in names.items():
        yield title, *[change(key, record) for record in seeds("mae")]


def mae_fine_tuned():
    yield "pretrained", "from scratch, same recipe"
    trained = RECORDS["mae-shapes-fine-tune"]["trained"]
    yield percent(trained["fine_tuned"]), percent(trained["from_scratch"])


def mae_mask_token():
    yield "encoder", *MAE_COLUMNS, "from scratch"
    yield from ablation("mae-mask-token", "fine_tuned", "linear_probe", "from_scratch")


def mae_speed():
    yield "encoder sees", "speed", "arithmetic of an image"
    record = RECORDS["mae-masking-cpu"]
    for name, rate in record["images_per_second"].items():
        yield name, f"{rate:.0f} images/s", f"{record['flop_per_image'][name] / 1e6:.0f} MFLOP"


def mae_mask_ratio():
    yield "masked", *MAE_COLUMNS
    yield from ablation("mae-mask-ratio", "fine_tuned", "linear_probe")


def mae_target():
    yield "target", *MAE_COLUMNS
    yield from ablation("mae-target", "fine_tuned", "linear_probe")


def dino_collapse():
    yield "teacher's logits", "entropy of a target", "of their mean", "KL", "linear probe", "kNN"
    names = {
        "centered and sharpened": "seed0",
        "not centered": "no-centering",
        "not sharpened": "no-sharpening",
    }
    for title, name in names.items():
        record = RECORDS[f"dino-shapes-{name}"]
        last = record["history"][-1]
        terms = [f"{last[key]:.2f}" for key in ("entropy", "entropy_of_mean", "kl")]
        yield title, *terms, *scores("dino", record)


def dino_class_token():
    yield "measure", "seed 0", "seed 1", "seed 2"
    names = {"class token, linear probe": "linear_probe", "class token, kNN of the paper": "knn_20"}
    for title, key in names.items():
        yield title, *[change(key, record) for record in seeds("dino")]


def clip_zero_shot():
    yield "seed", "all test images", "unseen pairs"
    for seed, record in enumerate(seeds("clip")):
        yield f"{seed}", change("zero_shot", record), change("zero_shot_unseen", record)


def clip_few_shot():
    counts = (1, 2, 4, 8, 16)
    yield "labels per class", *[f"{n}" for n in counts], "zero-shot"
    trained = RECORDS["clip-shapes-seed0"]["trained"]
    probes = [percent(trained[f"linear_probe_{n}_per_class"]) for n in counts]
    yield "accuracy", *probes, percent(trained["zero_shot"])


def clip_flickr8k():
    yield "recall", "@1", "@5", "@10"
    record = RECORDS["clip-flickr8k-small-seed0"]
    names = {
        "a caption finds its image": "text_to_image",
        "an image finds a caption": "image_to_text",
    }
    for title, way in names.items():
        yield title, *[change(f"{way}_r{k}", record) for k in (1, 5, 10)]


def clip_split():
    yield "split", "R@1", "R@5", "R@10", "validation R@10"
    for row in RECORDS["clip-split"]["rows"]:
        keys = ("text_to_image_r1", "text_to_image_r5", "text_to_image_r10", "val_recall")
        yield row["case"], *[percent(row["runs"][0][key]) for key in keys]


def all_methods():
    yield "encoder", "method", "linear probe", "kNN", "time"
    families = {
        "ResNet": {
            "simclr": "SimCLR",
            "moco": "MoCo v2",
            "barlow_twins": "Barlow Twins",
            "vicreg": "VICReg",
            "swav": "SwAV",
            "simsiam": "SimSiam",
            "byol": "BYOL",
            "clip": "CLIP",
        },
        "NiN": {
            "rotnet": "RotNet",
            "relative_patch": "relative patches",
            "jigsaw": "jigsaw puzzles",
            "colorization": "colorization",
            "inpainting": "inpainting",
        },
        "ViT": {"mae": "MAE", "simmim": "SimMIM", "dino": "DINO"},
    }
    for encoder, methods in families.items():
        for method, title in methods.items():
            record = RECORDS[f"{method}-shapes-seed0"]
            yield encoder, title, *scores(method, record), f"{record['total_seconds']:.0f} s"


def without_negatives():
    yield "method", "spread", "linear probe", "kNN"
    names = {
        "SimSiam": "simsiam-shapes-seed0",
        "SimSiam, no predictor": "simsiam-shapes-no-predictor",
        "SimSiam, gradients to both sides": "simsiam-shapes-no-stop-gradient",
        "BYOL": "byol-shapes-seed0",
        "BYOL, no predictor": "byol-shapes-no-predictor",
    }
    for title, name in names.items():
        record = RECORDS[name]
        yield title, f"{record['history'][-1]['spread']:.2f}", *scores("", record)


def relative_patches():
    yield "data", "patches", "positions", "linear probe", "kNN"
    for title, data in {"shapes": "shapes", "CIFAR-10": "cifar10-small"}.items():
        names = {"with gaps, moved at random": "seed0", "without": "shortcuts"}
        for patches, name in names.items():
            record = RECORDS[f"relative_patch-{data}-{name}"]
            positions = percent(record["pretext_task"]["position"])
            yield title, patches, positions, *scores("", record)


def colorization():
    yield "data", "linear probe", "kNN"
    yield "shapes", *scores("", RECORDS["colorization-shapes-seed0"])
    yield "CIFAR-10", *scores("", RECORDS["colorization-cifar10-small-seed0"])


def inpainting():
    weight = "weight of the adversarial loss"
    yield weight, "error", "discriminator", "sharpness", "linear probe", "kNN"
    names = {"0": "no-adversary", "0.001": "seed0", "1": "adversary-1"}
    for title, name in names.items():
        record = RECORDS[f"inpainting-shapes-{name}"]
        keys = ("reconstruction", "adversarial", "sharpness")
        terms = [f"{record['pretext_task'][key]:.2f}" for key in keys]
        yield title, *terms, *scores("", record)


def speed():
    bound = ("images/s, the bound", "with live augmentation")
    yield "device", "views/s in batches", "in a DataLoader", *bound, "fraction", "lightly: fraction"
    names = {"CPU": "cpu", "CPU, compiled": "cpu-compiled", "H200, compiled †": "h200"}
    for title, name in names.items():
        record = RECORDS[f"benchmark-{name}"]
        rates = [*record["views_per_second"].values(), *record["images_per_second"].values()]
        share = record["share_of_bound"]
        fractions = [f"{share[key]:.2f}" for key in ("live", "lightly")]
        yield title, *[f"{rate:,.0f}" for rate in rates], *fractions


TABLES = {
    function.__name__: function
    for function in (
        results, demos, projection_head, few_labels, rotnet_blocks, rotnet_rotations,
        rotnet_labels, moco_versions, moco_queue, mae_probes, mae_fine_tuned, mae_mask_token,
        mae_speed, mae_mask_ratio, mae_target, dino_collapse, dino_class_token, clip_zero_shot,
        clip_few_shot, clip_flickr8k, clip_split, all_methods, without_negatives,
        relative_patches, colorization, inpainting, speed,
    )
}  # fmt: skip


# === Pages ========================================================================================
def markdown(rows):
    """Rows of texts, the header first -> a table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    columns = lines[0].count("|") - 1
    lines.insert(1, "|" + "---|" * columns)
    return "".join(f"{line}\n" for line in lines)


def with_tables(text):
    """A page -> the same with every table made anew."""

    def made_anew(found):
        start, name, end = found.groups()
        return start + markdown(TABLES[name]()) + end

    return TABLE.sub(made_anew, text)


if __name__ == "__main__":
    for page in PAGES:
        path = ROOT / page
        path.write_text(with_tables(path.read_text()))
