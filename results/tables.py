"""Writes the tables of README.md and results/README.md from the records in this folder.

    python results/tables.py

A table stands between two comments, <!-- table: NAME --> and <!-- end -->, and NAME is one of
TABLES, a function that yields its header and then its rows. All else on the pages is written by
hand.
"""

import functools
import json
import math
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
# Where they have other names; clip.py has no kNN.
PROBE = dict.fromkeys(("dino", "ibot"), "linear_probe_with_mean")
KNN = dict.fromkeys(("dino", "ibot"), "knn_with_mean") | {"clip": ""}


def percent(*values):
    """Fractions -> "1.2 %", or "1.2 → 3.4 %"."""
    return " → ".join(f"{100 * value:.1f}" for value in values) + " %"


def listed(values):
    """Fractions -> "1.2 %, 3.4 %"."""
    return ", ".join(percent(value) for value in values)


def mean(values):
    """Fractions -> their mean, as text."""
    return percent(statistics.mean(values))


def spread(values):
    """Fractions -> their mean and standard deviation; of one, nothing but itself."""
    if len(values) == 1:
        return percent(*values)
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f} %"


def spread_of(row, key):
    """The same of a row of a record of ablation.py; nothing if it was not measured."""
    values = [run[key] for run in row["runs"] if key in run]
    return spread(values) if values else ""


def gain_of(row):
    """Linear probe of a row of a record of ablation.py, untrained → trained, means of the seeds."""
    keys = "untrained_linear_probe", "linear_probe"
    return percent(*[statistics.mean([run[key] for run in row["runs"]]) for key in keys])


def cell(factor, value, record="factors"):
    """A score of factors.py: an accuracy in percent, or an R2."""
    return f"{100 * value:.0f} %" if RECORDS[record]["chance"][factor] else f"{value:.2f}"


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


DATA = {"shapes": "", "CIFAR-10": "-cifar10"}  # how names of records of ablation.py end
RUNS = {"": "shapes", "-cifar10": "cifar10-short"}  # what names of single runs contain

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
    ("supcon-shapes", "h"): "SupCon h, with labels",
    ("supcon-shapes", "z"): "SupCon z, with labels",
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
    has, with shapes or CIFAR-10 in their place."""
    runs = {}
    for row in record["rows"]:
        name = row["run"].replace(RUNS["-cifar10"], RUNS[""])
        runs[name, row["part"]] = row["run"]
    means = {}
    for (name, part), title in NETWORKS.items():
        if (name, part) in runs:
            run = runs[name, part]
            means[title] = {
                factor: statistics.mean(factor_scores(record, run, part, factor))
                for factor in record["chance"]
            }
    return means


# === README.md ====================================================================================
DKOBAK = "https://github.com/dkobak/simclr-cifar10"
NOTEBOOK = (
    "https://github.com/facebookresearch/moco/blob/colab-notebook/colab/moco_cifar10_demo.ipynb"
)
PUBLISHED = {  # on CIFAR-10, by others
    "simclr": f"[kNN 83.2 % in 100, 90.3 % in 500 epochs]({DKOBAK})",
    "moco": f"[kNN 82.6 %]({NOTEBOOK})",
    "rotnet": "[89.1 %, NiN in 200 epochs](https://arxiv.org/abs/1803.07728)",
    "mae": "[54.1 %, ViT-tiny in 150 epochs](https://github.com/jayenliao/MAE)",
    "patches": "[79.6 %, 4000 centroids](https://proceedings.mlr.press/v15/coates11a.html)",
    "dino": "[89.5 %, ResNet-18 in 1000 epochs](https://github.com/vturrisi/solo-learn)",
}


def results():
    yield "method", "command", "linear probe", "kNN", "published", "time", "device"
    for method in ("simclr", "moco"):
        record = RECORDS[f"{method}-cifar10-seed0"]
        command = f"`python {method}.py --dataset cifar10 --compile`"
        row = TITLES[method], command, *scores(method, record), PUBLISHED[method]
        yield *row, f"pretraining {record['pretrain_seconds']:.0f} s", "H200"
    for method, title in TITLES.items():
        records = seeds(method)
        seconds = statistics.mean(record["total_seconds"] for record in records)
        row = title, f"`python {method}.py`", *scores(method, *records), ""
        yield *row, f"{seconds:.0f} s", "2 CPU cores"
    for method in ("simclr", "moco", "rotnet", "mae", "dino"):
        record = RECORDS[f"{method}-cifar10-small-seed0"]
        command = f"`python {method}.py --dataset cifar10 --encoder small`"
        published = PUBLISHED[method] if method in ("rotnet", "mae", "dino") else "above"
        row = TITLES[method], command, *scores(method, record), published
        yield *row, minutes(record), "2 CPU cores"
    record = RECORDS["patches-cifar10-seed0"]
    command = "`python relatives/patches.py --dataset cifar10`"
    row = "no network: k-means on patches", command, *scores("patches", record)
    yield *row, PUBLISHED["patches"], minutes(record), "2 CPU cores"


# === results/README.md, the lecture's claims ======================================================
def runs_of(table, row, key):
    """All seeds of a row of a record of ablation.py."""
    return [run[key] for run in RECORDS[table]["rows"][row]["runs"]]


def factor(run, part, name, record="factors"):
    """The mean of the seeds of a network in results/factors.json, or another record."""
    return statistics.mean(factor_scores(RECORDS[record], run, part, name))


def of_case(table, case, key="linear_probe"):
    """All seeds of the row of a record of ablation.py that has this name."""
    (row,) = [row for row in RECORDS[table]["rows"] if row["case"] == case]
    return [run[key] for run in row["runs"]]


def row_means(table, key="linear_probe"):
    """What each row of a record of ablation.py comes to, the mean of its seeds."""
    rows = RECORDS[table]["rows"]
    return [statistics.mean(run[key] for run in row["runs"]) for row in rows]


def trained(name, key="linear_probe"):
    return RECORDS[name]["trained"][key]


def pair(name, key="linear_probe"):
    """Untrained → trained of a record."""
    return change(key, RECORDS[name])


def moco_run(row):
    """A row of a record of ablation.py -> its run, as ablation.py names it."""
    return "moco" + re.sub("[^a-z0-9.]+", "-", row["flags"])


FEW_LABELS = {"": {"1 %": 40, "10 %": 410}, "-cifar10": {"1 %": 500, "10 %": 5000}}  # rows
SMALL_BATCHES = {8: 0, 32: 1}  # N: its row; MoCo has two, of one batch-norm group and of two


def verdict(on_shapes, on_cifar10=None):
    """Whether a claim comes out: yes or no, and if the two differ, of both."""
    words = ["yes" if agrees else "no" for agrees in (on_shapes, on_cifar10) if agrees is not None]
    if len(set(words)) == 1:
        return words[0]
    return f"{words[0]}; CIFAR-10 {words[1]}"


def on_both(measure):
    """measure("") of shapes and measure("-cifar10"), each a cell and whether the claim comes out ->
    both cells and the verdict: on CIFAR-10 the condition is the same."""
    shapes, agrees = measure("")
    photographs, agrees_too = measure("-cifar10")
    return shapes, photographs, verdict(agrees, agrees_too)


def claims():
    yield "the lecture", "on shapes", "on CIFAR-10", "agrees", "remark"
    yield from claims_about_learning()
    yield from claims_about_pretext_tasks()
    yield from claims_about_contrast()
    yield from claims_about_distillation_and_masks()
    yield from claims_about_captions()


def claims_about_learning():
    def helps(record, key="linear_probe"):
        return record["trained"][key] > record["untrained"][key]

    every = [helps(r, PROBE.get(m, "linear_probe")) for m in TITLES for r in seeds(m)]
    yield (
        "pretraining without labels helps the task that follows",
        f"SimCLR, linear probe {change('linear_probe', *seeds('simclr'))}",
        pair("simclr-cifar10-seed0"),
        verdict(all(every), helps(RECORDS["simclr-cifar10-seed0"])),
        "each of the six scripts with each seed",
    )
    supervised = {
        "": ("supervised", "simclr-jitter-strength-0-gray-0-projection-none-labels"),
        "-cifar10": ("SupCon", "supcon-cifar10-short"),
    }

    def light(data):
        title, run = supervised[data]
        record = f"factors{data}"
        ours = factor(f"simclr-{RUNS[data]}", "h", "light, up-down", record)
        theirs = factor(run, "h", "light, up-down", record)
        kind = factor(run, "h", "kind of thing", record)
        scores = f"SimCLR {ours:.2f}, {title} {theirs:.2f} (kind {percent(kind)})"
        return f"direction of the light, R²: {scores}", ours > theirs

    yield (
        "a label holds few bits, and supervised features leave out the rest",
        *on_both(light),
        "what a label needs stays: size, place",
    )

    def color_and_kind(data):
        networks = {
            "MAE": (("untrained ViT", "patch tokens"), (f"mae-{RUNS[data]}", "patch tokens")),
            "SimCLR": (("untrained ResNet", "h"), (f"simclr-{RUNS[data]}", "h")),
        }
        record = f"factors{data}"
        name = "mean color" if data else "its color"
        color = {}
        kind = {}
        cells = []
        for title, pair in networks.items():
            color[title] = [factor(*network, name, record) for network in pair]
            kind[title] = [factor(*network, "kind of thing", record) for network in pair]
            before, after = color[title]
            colors = f"R² {before:.2f} → {after:.2f}" if data else percent(before, after)
            cells.append(f"{title}: color {colors}, kind {percent(*kind[title])}")
        kept = color["MAE"][1] > color["MAE"][0]
        lost = color["SimCLR"][1] < color["SimCLR"][0]
        return "; ".join(cells), kept and lost and kind["MAE"][1] < kind["SimCLR"][1]

    yield (
        "reconstruction does not favor what is shown",
        *on_both(color_and_kind),
        "to give pixels back, color is worth as much as kind; the encoders differ; an untrained "
        "ViT knows the mean color already, so on CIFAR-10 only the light can be read better",
    )


def claims_about_pretext_tasks():
    networks = {"rotnet": "block 2", "simclr": "h"}
    tilt = [factor(f"{method}-shapes", part, "tilt") for method, part in networks.items()]
    turned = [
        factor(f"{method}-cifar10-short", part, "turned by 0, 90, 180, 270", "factors-cifar10")
        for method, part in networks.items()
    ]
    yield (
        "the pretext task decides what is learned",
        f"tilt, R²: RotNet {tilt[0]:.2f}, SimCLR {tilt[1]:.2f}",
        f"turned by 0, 90, 180, 270: RotNet {percent(turned[0])}, SimCLR {percent(turned[1])}",
        verdict(tilt[0] > tilt[1], turned[0] > turned[1]),
        "see the table of factors",
    )

    def rotations(data):
        upright, turned = [runs_of(f"rotnet-any-angle{data}", row, "rotation") for row in (0, 1)]
        cell = f"rotations: upright {mean(upright)}, at any angle {mean(turned)}"
        return cell, min(upright) > 0.5 and max(turned) < 0.3  # by chance 0.25

    yield (
        "rotations can be predicted of things with an upright only",
        *on_both(rotations),
        "so one has to know one's images",
    )
    early = [record["trained"]["linear_probe"] for record in seeds("rotnet")]
    contrastive = [record["trained"]["linear_probe"] for record in seeds("simclr")]
    turned = [mean(runs_of(f"{m}-any-angle", 1, "linear_probe")) for m in ("rotnet", "simclr")]
    photographs = [trained("rotnet-cifar10-labels")], of_case("simclr-head-cifar10", "mlp")
    yield (
        "early pretext tasks are below contrastive methods",
        f"RotNet {mean(early)}, SimCLR {mean(contrastive)}",
        f"in about ten minutes of one core: {mean(photographs[0])}, {mean(photographs[1])}",
        verdict(max(early) < min(contrastive), max(photographs[0]) < min(photographs[1])),
        f"shapes stand upright; turned by any angle: {turned[0]}, {turned[1]}",
    )

    def puzzles(data):
        names = [f"{method}-{RUNS[data]}-seed0" for method in ("jigsaw", "relative_patch")]
        return ", ".join(map(pair, names)), trained(names[0]) > trained(names[1])

    yield (
        "jigsaw puzzles teach more than relative patches",
        *on_both(puzzles),
        "but over their own untrained encoders patches gain more; one seed",
    )
    by_kind = "untrained_linear_probe", "linear_probe"
    random, typical = [[runs_of("colorization-colors", row, k) for k in by_kind] for row in (0, 1)]
    means = [percent(*[statistics.mean(values) for values in case]) for case in (random, typical)]
    cifar10 = "colorization-cifar10-short-seed0"
    gain = RECORDS[cifar10]["untrained"]["linear_probe"] < trained(cifar10)
    yield (
        "colorization teaches more than random weights know",
        means[0],
        pair(cifar10),
        verdict(statistics.mean(random[0]) < statistics.mean(random[1]), gain),
        "colors of shapes are random; with the color of their kind in seven of ten: "
        f"{means[1]}; one seed",
    )
    gaps, none = "relative_patch-cifar10-short-seed0", "relative_patch-cifar10-short-shortcuts"
    found = [percent(RECORDS[name]["pretext_task"]["position"]) for name in (gaps, none)]
    yield (
        "shortcuts solve the task and teach nothing",
        "",
        f"without gaps: positions {found[0]} → {found[1]}, probe {pair(none)}",
        verdict(trained(none) < trained(gaps)),
        "shapes have few lines from patch to patch",
    )

    def sharpness(data):
        blurred, sharp = [
            RECORDS[f"inpainting-{RUNS[data]}-{name}"]["pretext_task"]["sharpness"]
            for name in ("no-adversary", "adversary-1")
        ]
        return f"sharpness {blurred:.2f} → {sharp:.2f}", sharp > blurred + 0.05

    yield (
        "an adversary sharpens what the mean squared error blurs",
        *on_both(sharpness),
        "at weight 1; at the paper's 0.001 nothing changes",
    )

    def few_and_many(data):
        lines = RECORDS[f"rotnet{data or '-shapes'}-labels"]["semi_supervised"]
        few, many = lines[0], lines[-1]
        cells = [
            f"{line['labels']:,} labels: {percent(line['frozen'])}, from scratch "
            f"{percent(line['from_scratch'])}"
            for line in (few, many)
        ]
        wins = few["frozen"] > few["from_scratch"] and many["frozen"] < many["from_scratch"]
        return "; ".join(cells), wins

    yield (
        "RotNet's frozen blocks win with few labels, and lose with many",
        *on_both(few_and_many),
        "",
    )


def claims_about_contrast():
    rows = RECORDS["infonce"]["rows"]
    small = next(row for row in rows if (row["information"], row["N"]) == (2, 1024))
    large = next(row for row in rows if (row["information"], row["N"]) == (8, 64))
    yield (
        "log N - InfoNCE bounds mutual information from below",
        f"I = 2 nats: {small['bound']:.2f} at N = 1,024; I = 8: {large['bound']:.2f} at N = 64, "
        f"where log N is {math.log(64):.2f}",
        "",
        verdict(all(row["bound"] < row["information"] + 0.1 for row in rows)),
        "Gaussians, of which the information is known",
    )

    def negatives(data):
        few, some, all_others = [
            runs_of(f"simclr-negatives{data}", row, "linear_probe") for row in (0, 2, 3)
        ]
        cell = f"of one batch: 1 {mean(few)}, 31 {mean(some)}, all {mean(all_others)}"
        return cell, min(all_others) > max(few)

    yield (
        "many negatives help",
        *on_both(negatives),
        "on shapes up to some thirty; there are ten kinds of thing only",
    )

    def color_distortion(data):
        plain, both = [of_case(f"simclr-views{data}", x) for x in ("crop and flip", "with both")]
        cell = f"crop and flip {mean(plain)}, with jitter and gray {mean(both)}"
        return cell, min(both) > max(plain)

    uncropped = of_case("simclr-views", "with both, without crops")
    yield (
        "crops need color distortion, or color alone tells images apart",
        *on_both(color_distortion),
        f"here color distortion does nearly all: without crops {mean(uncropped)}",
    )

    def sides(data):
        asked = "light" if data else "place"

        def known(part, way):
            return factor(f"simclr-{RUNS[data]}", part, f"{asked}, {way}", f"factors{data}")

        h = known("h", "left-right")
        z = known("z", "left-right")
        heights = f"{known('h', 'up-down'):.2f} and {known('z', 'up-down'):.2f}"
        cell = f"{asked}, R² in h and z: left-right, which flips destroy, {h:.2f} and {z:.2f}"
        return f"{cell}; up-down {heights}", h > z + 0.2

    yield (
        "z is invariant to what the views change, h keeps more of it",
        *on_both(sides),
        "color as well: see the table of factors",
    )

    def heads(data):
        head = [runs_of(f"simclr-head{data}", row, "linear_probe") for row in (0, 1, 2)]
        cell = f"none {mean(head[0])}, linear {mean(head[1])}, mlp {mean(head[2])}"
        return cell, statistics.mean(head[2]) > max(map(statistics.mean, head[:2]))

    color = [factor("simclr-projection-none", "h", "its color")]
    color.append(factor("simclr-shapes", "h", "its color"))
    yield (
        "a nonlinear head makes h better than a linear one, or none",
        *on_both(heads),
        "on CIFAR-10 both are better than none; of what views change h keeps more with a head: "
        f"color {percent(color[1])}, without {percent(color[0])}",
    )
    ours = seeds("simclr")
    h, z = [[record["trained"][key] for record in ours] for key in ("knn", "knn_z")]
    gpu = RECORDS["simclr-cifar10-seed0"]["trained"]
    yield (
        "h is better than z",
        f"kNN {mean(h)} and {mean(z)}; linear probes are equal",
        f"kNN {percent(gpu['knn'])} and {percent(gpu['knn_z'])}, linear probe "
        f"{percent(gpu['linear_probe'])} and {percent(gpu['linear_probe_z'])}",
        verdict(min(h) > max(z), gpu["knn"] > gpu["knn_z"]),
        "in z the kind is nearly all that is left",
    )

    def over_version_1(case):
        def measure(data):
            first, other = [of_case(f"moco-versions{data}", name) for name in ("v1", case)]
            return f"{mean(first)} → {mean(other)}", statistics.mean(other) > statistics.mean(first)

        return measure

    known = RECORDS["moco-versions-factors"]
    names = [moco_run(row) for row in RECORDS["moco-versions"]["rows"][:2]]
    colors = [statistics.mean(factor_scores(known, run, "h", "its color")) for run in names]
    yield (
        "MoCo: an MLP head is better",
        *on_both(over_version_1("(a) MLP")),
        f"kind is what views keep; of color, which they change, h keeps {percent(*colors)}",
    )
    yield (
        "MoCo: stronger augmentation is better",
        *on_both(over_version_1("(b) aug+")),
        "aug+ adds blur, and jitters the hue less",
    )

    def moco_and_simclr(data, row):
        queue = runs_of(f"moco-small-batches{data}", 2 * row, "linear_probe")  # with one group
        return queue, runs_of(f"simclr-small-batches{data}", row, "linear_probe")

    pairs = {N: moco_and_simclr("", row) for N, row in SMALL_BATCHES.items()}
    pairs[64] = [[r["trained"]["linear_probe"] for r in seeds(m)] for m in ("moco", "simclr")]
    photographs = {32: moco_and_simclr("-cifar10", 0)}
    photographs[128] = [[trained(f"{m}-cifar10-small-seed0")] for m in ("moco", "simclr")]
    cells = []
    verdicts = []
    for data in (pairs, photographs):
        cell = [f"N = {N}: {mean(a)}, SimCLR {mean(b)}" for N, (a, b) in data.items()]
        cells.append("; ".join(cell))
        wins = [f"N = {N} {verdict(min(a) > max(b))}" for N, (a, b) in data.items()]
        verdicts.append(", ".join(wins))
    yield (
        "MoCo v2 is better than SimCLR at the same small batch",
        *cells,
        "; CIFAR-10 ".join(verdicts),
        "the smaller the batch, the more a queue is worth",
    )
    memory = {}
    rate = {}
    for row in RECORDS["benchmark-memory-cpu"]["rows"]:
        if row["batch_size"] == 1024 and row.get("bn_groups", 1) == 1:
            memory[row["method"]] = row["gb"]
            rate[row["method"]] = row["images_per_second"]
    yield (
        "MoCo needs less memory",
        "",
        f"N = 1,024: {memory['moco']:.2f} GB, SimCLR {memory['simclr']:.2f} GB",
        verdict(memory["moco"] < memory["simclr"]),
        "half of the views need no graph",
    )
    gpus = [RECORDS[f"{method}-cifar10-seed0"] for method in ("moco", "simclr")]
    seconds = [record["pretrain_seconds"] for record in gpus]
    yield (
        "MoCo takes less time",
        "",
        f"CPU {rate['moco']:,.0f} images/s, SimCLR {rate['simclr']:,.0f}; H200 {seconds[0]:.0f} s, "
        f"{seconds[1]:.0f} s",
        f"CPU {verdict(rate['moco'] > rate['simclr'])}, H200 {verdict(seconds[0] < seconds[1])}",
        "less arithmetic; why it takes longer on a GPU is open",
    )

    def tuned(share, views):
        def measure(data):
            count = FEW_LABELS[data][share]
            run = f"simclr-labels{data}", f"{views}, four times as long"
            pretrained = statistics.mean(of_case(*run, f"fine_tuned_{count}"))
            scratch = statistics.mean(of_case(*run, f"from_scratch_{count}"))
            cell = f"{percent(pretrained)}, from scratch {percent(scratch)}"
            return cell, pretrained - scratch > 0.01  # with so few seeds, less is no difference

        return measure

    for share in ("1 %", "10 %"):
        by_views = tuned(share, "views of pretraining")
        yield (
            f"fine-tuned with {share} of the labels, pretraining wins",
            *on_both(tuned(share, "crops and flips")),
            "by crops and flips; by the views of pretraining, which carry what it teaches: "
            f"{by_views('')[0]}; CIFAR-10 {by_views('-cifar10')[0]}; on shapes one seed",
        )


def claims_about_distillation_and_masks():
    runs = RECORDS["dino-attention"]["runs"]
    before, after = [
        statistics.mean(run[key]["iou_of_the_chosen"] for run in runs)
        for key in ("untrained", "trained")
    ]
    mean_mask = RECORDS["dino-attention"]["guess"]["mean_mask"]
    yield (
        "DINO's heads segment objects",
        f"intersection over union: untrained {before:.2f}, trained {after:.2f}; the mean mask, "
        f"which sees no image, {mean_mask:.2f}",
        "",
        verdict(after > max(before, mean_mask)),
        "better than untrained with every seed, than a guess in the middle with one of three",
    )

    def without_parts(method, *parts):
        def measure(data):
            names = [f"{method}-{RUNS[data]}-{end}" for end in ("seed0", *parts)]
            whole, *less = [trained(name, PROBE.get(method, "linear_probe")) for name in names]
            return f"{percent(whole)}; without: {listed(less)}", max(less) < whole - 0.1

        return measure

    yield (
        "DINO collapses without centering, and without sharpening",
        *on_both(without_parts("dino", "no-centering", "no-sharpening")),
        "on CIFAR-10, after two epochs, the entropies show it, and probes less",
    )
    yield (
        "SimSiam needs its predictor and its stop-gradient",
        *on_both(without_parts("simsiam", "no-predictor", "no-stop-gradient")),
        "",
    )

    def mask_tokens(data):
        masked, spared = row_means(f"mae-mask-token{data}")
        return f"linear probe with {percent(masked)}, without {percent(spared)}", spared > masked

    yield (
        "MAE: no mask tokens in the encoder",
        *on_both(mask_tokens),
        "and less than half of the time",
    )
    tuned = [RECORDS[f"mae-shapes-fine-tune-32{end}"]["trained"] for end in ("", "-lr")]
    cells = [
        f"{percent(x['fine_tuned'])}, from scratch {percent(x['from_scratch'])}" for x in tuned
    ]
    keys = "fine_tuned", "from_scratch"
    pretrained, scratch = [statistics.mean(runs_of("mae-target-cifar10", 0, key)) for key in keys]
    yield (
        "MAE: pretrained and fine-tuned is better than from scratch",
        f"{cells[0]}; at a quarter of the learning rate {cells[1]}",
        f"{percent(pretrained)}, from scratch {percent(scratch)}",
        verdict(all(x["fine_tuned"] > x["from_scratch"] for x in tuned), pretrained > scratch),
        "on shapes, with one seed, a network from scratch does not learn at the recipe's rate",
    )

    def mask_ratios(data):
        ratios = row_means(f"mae-mask-ratio{data}")
        cell = "linear probe at 25, 50, 75, 90 %: " + listed(ratios)
        return cell, max(ratios) == ratios[2]

    yield (
        "MAE: masking 75 % is best",
        *on_both(mask_ratios),
        "on CIFAR-10 by less than a point, with both seeds",
    )

    mae, dino = [accuracy for _, accuracy, _ in fine_tuned_alike()]
    yield (
        "MAE: fine-tuned it is better than DINO",
        "",
        f"{percent(mae)}, DINO {percent(dino)}",
        verdict(mae > dino),
        "MAE's patches have a quarter of the area; one seed",
    )

    def targets(data):
        plain, normalized = row_means(f"mae-target{data}")
        tuned = row_means(f"mae-target{data}", "fine_tuned")
        cell = f"linear probe {percent(plain, normalized)}, fine-tuned {percent(*tuned)}"
        return cell, normalized > plain

    yield (
        "MAE: pixels normalized within a patch are better",
        *on_both(targets),
        "on shapes likely since their patches are flat or an outline, and the outline loses weight",
    )

    def depths(key):
        def measure(data):
            probes = row_means(f"mae-decoder-depth{data}", key)
            blocks = "1, 2, 4, 8" if data else "1, 2, 4, 8, 12"
            return f"with {blocks} blocks: {listed(probes)}", max(probes[2:]) > max(probes[:2])

        return measure

    yield (
        "MAE: a deep decoder can improve linear probing",
        *on_both(depths("linear_probe_class_token")),
        "of the class token, which the authors probe; one seed",
    )
    yield (
        "... and that of the patch tokens",
        *on_both(depths("linear_probe")),
        "one seed",
    )

    def widths(data):
        probes = row_means(f"mae-decoder-dim{data}")
        names = "an eighth, a quarter, a half, three quarters, all of the width"
        return f"linear probe at {names}: {listed(probes)}", max(probes[:4]) >= probes[4]

    yield (
        "MAE: the decoder can be narrower than the encoder",
        *on_both(widths),
        "one seed; on CIFAR-10 after three epochs",
    )

    def views(data):
        probes = row_means(f"mae-augment{data}")
        untrained = row_means(f"mae-augment{data}", "untrained_linear_probe")[0]
        cell = f"linear probe with none, shifts, crops, crops and jitter: {listed(probes)}"
        return cell, probes[0] - untrained > 0.5 * (probes[2] - untrained)

    yield "MAE works with little augmentation, or none", *on_both(views), "one seed"

    def masks(data):
        probes = row_means(f"mae-mask-sampling{data}")
        cell = f"linear probe with random, half in blocks, blocks, grid: {listed(probes)}"
        return cell, max(probes) == probes[0]

    yield (
        "MAE: random masks are best",
        *on_both(masks),
        "on shapes the grid is within the spread of seeds; on CIFAR-10 by less than a point; "
        "one seed",
    )


def claims_about_captions():
    few_shot = {row["method"]: row for row in RECORDS["few-shot"]["rows"]}
    zero_shot = few_shot["clip"]["zero_shot"]
    probes = {method: row["few_shot"]["16"] for method, row in few_shot.items()}
    yield (
        "zero-shot matches probes with few labels",
        f"{percent(zero_shot)}; 16 labels per class {percent(probes['clip'])}, of SimCLR's "
        f"features {percent(probes['simclr'])}, of RotNet's {percent(probes['rotnet'])}",
        "",
        verdict(zero_shot > few_shot["clip"]["few_shot"]["4"]),
        "captions name the kind, so the text is the label",
    )
    rows = row_means("clip-captions", "zero_shot")
    yield (
        "... and needs no labels",
        "captions that name the kind in 5, 20, 50, 100 %: " + listed(rows),
        "",
        verdict(rows[0] > 0.2),
        "no further ones: what no caption names cannot be asked for; one seed",
    )
    unseen = [record["trained"]["zero_shot_unseen"] for record in seeds("clip")]
    yield (
        "open vocabulary: categories that were never seen",
        f"pairs of kind and color never seen: {mean(unseen)}",
        "",
        verdict(min(unseen) > 0.5),
        "both words were seen, in other pairs",
    )


# === results/README.md ============================================================================
def demos():
    yield "method", "measure", "seed 0", "seed 1", "seed 2"
    for method, title in TITLES.items():
        rows = [scores(method, record) for record in seeds(method)]
        for name, cells in zip(("linear probe", "kNN"), zip(*rows, strict=True), strict=True):
            if any(cells):
                yield title, name, *cells


def factors(record):
    names = RECORDS[record]["chance"]
    yield "network", *names
    for title, scores in factor_means(RECORDS[record]).items():
        yield title, *[cell(factor, value, record) for factor, value in scores.items()]


def simclr_head():
    probes = "linear probe on h", "on z", "kNN on h", "on z"
    yield "data", "head", *probes, "color: linear probe on h", "on z"
    names = {"none": "projection-none", "linear": "projection-linear", "mlp": "shapes"}
    for title, data in DATA.items():
        for row in RECORDS[f"simclr-head{data}"]["rows"]:
            keys = ("linear_probe", "linear_probe_z", "knn", "knn_z")
            kinds = [spread_of(row, key) for key in keys]
            run = f"simclr-{names[row['case']]}"
            known = [factor_scores(RECORDS["factors"], run, part, "its color") for part in "hz"]
            colors = [spread(values) if values else "" for values in known]
            yield title, row["case"], *kinds, *(["", ""] if data else colors)


def simclr_views():
    yield "data", "views", "linear probe", "kNN", "color: linear probe"
    names = ("jitter-strength-0-gray-0", "gray-0", "jitter-strength-0", "shapes", "crop-1")
    for row, name in zip(RECORDS["simclr-views"]["rows"], names, strict=True):
        colors = factor_scores(RECORDS["factors"], f"simclr-{name}", "h", "its color")
        kinds = [spread_of(row, key) for key in ("linear_probe", "knn")]
        yield "shapes", row["case"], *kinds, spread(colors)
    for case, *kinds in ablation("simclr-views-cifar10", "linear_probe", "knn"):
        yield "CIFAR-10", case, *kinds, ""


def simclr_negatives():
    yield "data", "negatives", "linear probe", "kNN"
    for title, data in DATA.items():
        for cells in ablation(f"simclr-negatives{data}", "linear_probe", "knn"):
            yield title, *cells


def few_labels():
    yield "data", "views", "labels", "linear probe, frozen", "fine-tuned", "from scratch"
    keys = ("linear_probe", "fine_tuned", "from_scratch")
    for title, data in DATA.items():
        for row in RECORDS[f"simclr-labels{data}"]["rows"]:
            for count in FEW_LABELS[data].values():
                cells = [spread_of(row, f"{key}_{count}") for key in keys]
                yield title, row["case"], f"{count:,}", *cells


def rotnet_blocks():
    yield "data", "features of", "linear probe", "kNN", "three layers", "convolutional"
    keys = ("linear_probe", "knn", "nonlinear", "conv")
    for title, data in DATA.items():
        blocks = RECORDS[f"rotnet{data or '-shapes'}-labels"]["blocks"]
        pairs = zip(blocks["untrained"], blocks["trained"], strict=True)
        for number, (before, after) in enumerate(pairs, 1):
            cells = [percent(before[key], after[key]) if key in after else "" for key in keys]
            yield title, f"block {number}", *cells


def rotnet_rotations():
    yield "pretext task", "seed 0", "seed 1", "seed 2"
    yield "rotations", *[percent(r["pretext_task"]["rotation"]) for r in seeds("rotnet")]


def any_angle():
    yield "data", "images", "rotations predicted", "linear probe: RotNet", "SimCLR"
    for title, data in DATA.items():
        rotnet = RECORDS[f"rotnet-any-angle{data}"]["rows"]
        simclr = RECORDS[f"simclr-any-angle{data}"]["rows"]
        for row, other in zip(rotnet, simclr, strict=True):
            yield title, row["case"], spread_of(row, "rotation"), gain_of(row), gain_of(other)


def rotnet_labels():
    yield "data", "labels", "on pretrained, frozen blocks", "the same network from scratch"
    for title, data in DATA.items():
        for line in RECORDS[f"rotnet{data or '-shapes'}-labels"]["semi_supervised"]:
            cells = percent(line["frozen"]), percent(line["from_scratch"])
            yield title, f"{line['labels']:,}", *cells


def ablation(name, *keys):
    """The rows of a record of ablation.py: case, the paper's numbers, and these of ours."""
    rows = RECORDS[name]["rows"]
    columns = max(len(row["paper"]) for row in rows)
    for row in rows:
        paper = [percent(value) for value in row["paper"]] or [""] * columns
        ours = [spread_of(row, key) for key in keys]
        yield row["case"], *paper, *ours


MAE_COLUMNS = ("lecture, fine-tuned", "lecture, linear", "fine-tuned", "linear probe")


def moco_versions():
    probes = "linear probe", "kNN"
    yield "data", "version", "lecture", *probes, "color", "light, left-right, R²"
    kinds = ablation("moco-versions", "linear_probe", "knn")
    known = RECORDS["moco-versions-factors"]
    for row, cells in zip(RECORDS["moco-versions"]["rows"], kinds, strict=True):
        color = factor_scores(known, moco_run(row), "h", "its color")
        light = statistics.mean(factor_scores(known, moco_run(row), "h", "light, left-right"))
        yield "shapes", *cells, spread(color), f"{light:.2f}"
    for cells in ablation("moco-versions-cifar10", "linear_probe", "knn"):
        yield "CIFAR-10", *cells, "", ""


def small_batches():
    yield "data", "batch N", "SimCLR", "MoCo v2, one batch-norm group", "two batch-norm groups"
    simclr = RECORDS["simclr-small-batches"]["rows"]
    moco = RECORDS["moco-small-batches"]["rows"]
    for N, number in SMALL_BATCHES.items():
        rows = simclr[number], moco[2 * number], moco[2 * number + 1]
        yield "shapes", f"{N}", *[spread_of(row, "linear_probe") for row in rows]
    names = "simclr-small-batches-cifar10", "moco-small-batches-cifar10"
    cells = [spread_of(RECORDS[name]["rows"][0], "linear_probe") for name in names]
    yield "CIFAR-10", "32", *cells, ""


def memory():
    yield "method", "batch N", "queue K", "batch-norm groups", "memory", "speed"
    for row in RECORDS["benchmark-memory-cpu"]["rows"]:
        queue = f"{row['queue_size']:,}" if "queue_size" in row else ""
        sizes = f"{row['batch_size']:,}", queue, f"{row.get('bn_groups', '')}"
        rate = f"{row['images_per_second']:,.0f} images/s"
        yield TITLES[row["method"]], *sizes, f"{row['gb']:.2f} GB", rate


def mae_probes():
    yield "features", "seed 0", "seed 1", "seed 2"
    names = {
        "mean of the patch tokens": "linear_probe",
        "class token": "linear_probe_class_token",
    }
    for title, key in names.items():
        yield title, *[change(key, record) for record in seeds("mae")]


def mae_fine_tuned():
    yield "passes over the labels", "learning rate", "pretrained", "from scratch"
    for name in ("fine-tune", "fine-tune-32", "fine-tune-32-lr"):
        record = RECORDS[f"mae-shapes-{name}"]
        recipe = f"{record['args']['fine_tune_epochs']}", f"{record['args']['fine_tune_lr']:g}"
        keys = "fine_tuned", "from_scratch"
        yield *recipe, *[percent(record["trained"][key]) for key in keys]


def fine_tuned_alike():
    """MAE and DINO by the same recipe: title, fine-tuned and from scratch."""
    mae = RECORDS["mae-target-cifar10"]["rows"][0]["runs"][0]
    (dino,) = RECORDS["fine-tuned-cifar10"]["rows"]
    for title, scores in {"MAE": mae, "DINO": dino}.items():
        yield title, scores["fine_tuned"], scores["from_scratch"]


def fine_tuned():
    yield "encoder", "fine-tuned", "from scratch"
    for title, *scores in fine_tuned_alike():
        yield title, *map(percent, scores)


def mae_ablation(first, record, *further):
    """The same on shapes and on CIFAR-10, and further columns."""
    titles = {
        "from_scratch": "from scratch",
        "linear_probe_class_token": "linear probe, class token",
    }
    yield "data", first, *MAE_COLUMNS, *[titles[key] for key in further]
    for title, data in DATA.items():
        for cells in ablation(f"{record}{data}", "fine_tuned", "linear_probe", *further):
            yield title, *cells


def mae_speed():
    yield "encoder sees", "speed", "arithmetic of an image"
    record = RECORDS["mae-masking-cpu"]
    for name, rate in record["images_per_second"].items():
        yield name, f"{rate:.0f} images/s", f"{record['flop_per_image'][name] / 1e6:.0f} MFLOP"


def dino_collapse():
    entropies = "entropy of a target", "of their mean", "KL"
    yield "data", "teacher's logits", *entropies, "linear probe", "kNN"
    names = {
        "centered and sharpened": "seed0",
        "not centered": "no-centering",
        "not sharpened": "no-sharpening",
    }
    for title, data in DATA.items():
        for logits, name in names.items():
            record = RECORDS[f"dino-{RUNS[data]}-{name}"]
            last = record["history"][-1]
            terms = [f"{last[key]:.2f}" for key in ("entropy", "entropy_of_mean", "kl")]
            yield title, logits, *terms, *scores("dino", record)


def dino_attention():
    yield "intersection over union", "seed 0", "seed 1", "seed 2"
    record = RECORDS["dino-attention"]
    for key in ("untrained", "trained"):
        for head in range(3):
            cells = []
            for run in record["runs"]:
                same = run[key]["iou_of_heads"][head]
                opposite = run[key]["iou_of_their_opposites"][head]
                cells.append(f"{same:.2f}, {opposite:.2f}")
            yield f"{key}, head {1 + head}, and its opposite", *cells
        yield (
            f"{key}, the chosen one",
            *[f"{r[key]['iou_of_the_chosen']:.2f}" for r in record["runs"]],
        )
    guess = record["guess"]
    yield "the mean mask", *[f"{guess['mean_mask']:.2f}"] * 3
    yield "all of the image", *[f"{guess['all_of_the_image']:.2f}"] * 3


def dino_class_token():
    yield "measure", "seed 0", "seed 1", "seed 2"
    names = {"class token, linear probe": "linear_probe", "class token, kNN of the paper": "knn_20"}
    for title, key in names.items():
        yield title, *[change(key, record) for record in seeds("dino")]


def clip_zero_shot():
    yield "seed", "all test images", "unseen pairs"
    for seed, record in enumerate(seeds("clip")):
        yield f"{seed}", change("zero_shot", record), change("zero_shot_unseen", record)


def clip_questions():
    yield "question", "chance", "seed 0", "seed 1", "seed 2"
    record = RECORDS["clip-zero-shot"]
    for question, chance in record["chance"].items():
        cells = [percent(run["accuracy"][question]) for run in record["runs"]]
        yield question, percent(chance), *cells


def clip_captions():
    yield "captions that name the kind", "zero-shot", "linear probe"
    for row in RECORDS["clip-captions"]["rows"]:
        (run,) = row["runs"]
        yield row["case"], percent(run["zero_shot"]), percent(run["linear_probe"])


def clip_few_shot():
    rows = RECORDS["few-shot"]["rows"]
    yield "labels per class", *rows[0]["few_shot"], "zero-shot"
    for row in rows:
        probes = [percent(value) for value in row["few_shot"].values()]
        yield (
            TITLES[row["method"]],
            *probes,
            percent(row["zero_shot"]) if "zero_shot" in row else "",
        )


def clip_relatives():
    measures = "zero-shot", "unseen pairs", "caption finds image @10", "linear probe"
    yield "method", *measures, "16 labels per class"
    keys = "zero_shot", "zero_shot_unseen", "text_to_image_r10", "linear_probe"
    for method, title in {"clip": "CLIP", "siglip": "SigLIP", "slip": "SLIP"}.items():
        record = RECORDS[f"{method}-shapes-seed0"]
        yield title, *[change(key, record) for key in (*keys, "linear_probe_16_per_class")]


def clip_batches():
    columns = "zero-shot", "unseen pairs", "caption finds image @10", "linear probe"
    yield "method", "batch N", *columns
    keys = "zero_shot", "zero_shot_unseen", "text_to_image_r10", "linear_probe"
    for method, title in {"clip": "CLIP", "siglip": "SigLIP"}.items():
        for row in RECORDS[f"{method}-batches"]["rows"]:
            size = row["case"].removeprefix("N = ")
            yield title, size, *[spread_of(row, key) for key in keys]


def flickr8k_views():
    recalls = "caption finds image @1", "@5", "@10", "image finds caption @10"
    yield "image encoder learns from", "epochs", *recalls
    names = {
        "captions (CLIP)": ("clip-flickr8k-small-seed0",),
        "views (SimCLR), then captions": ("simclr-flickr8k-seed0", "clip-flickr8k-small-init"),
        "captions and views (SLIP)": ("slip-flickr8k-small-seed0",),
    }
    keys = "text_to_image_r1", "text_to_image_r5", "text_to_image_r10", "image_to_text_r10"
    for title, runs in names.items():
        epochs = ", then ".join(f"{RECORDS[name]['args']['epochs']}" for name in runs)
        yield title, epochs, *[change(key, RECORDS[runs[-1]]) for key in keys]


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


METHODS = {  # encoder: method: its title
    "ResNet": {
        "simclr": "SimCLR",
        "moco": "MoCo v2",
        "barlow_twins": "Barlow Twins",
        "vicreg": "VICReg",
        "lejepa": "LeJEPA",
        "swav": "SwAV",
        "simsiam": "SimSiam",
        "byol": "BYOL",
        "supcon": "SupCon, with labels",
        "clip": "CLIP",
    },
    "NiN": {
        "rotnet": "RotNet",
        "relative_patch": "relative patches",
        "jigsaw": "jigsaw puzzles",
        "colorization": "colorization",
        "inpainting": "inpainting",
    },
    "ViT": {"mae": "MAE", "simmim": "SimMIM", "dino": "DINO", "ibot": "iBOT"},
    "none": {"patches": "k-means on patches"},
}


def all_methods():
    yield "encoder", "method", "linear probe", "kNN", "time"
    for encoder, methods in METHODS.items():
        for method, title in methods.items():
            record = RECORDS[f"{method}-shapes-seed0"]
            yield encoder, title, *scores(method, record), f"{record['total_seconds']:.0f} s"


def three_times_as_long():
    yield "linear probe", "12 epochs", "36 epochs"
    for method in ("simclr", "barlow_twins", "byol"):
        names = [f"{method}-shapes-{name}" for name in ("seed0", "36-epochs")]
        yield METHODS["ResNet"][method], *map(pair, names)


def all_methods_cifar10():
    yield "encoder", "method", "linear probe", "kNN", "epochs", "pretraining"
    for encoder, methods in METHODS.items():
        for method, title in methods.items():
            name = f"{method}-cifar10-short-seed0"
            if method == "inpainting":
                name = "inpainting-cifar10-short-no-adversary"
                title = "inpainting, no adversary"
            if name in RECORDS:
                record = RECORDS[name]
                budget = f"{record['args']['epochs']}", f"{record['pretrain_seconds']:.0f} s"
                yield encoder, title, *scores(method, record), *budget


def factors_relatives():
    names = RECORDS["factors"]["chance"]
    yield "network", *names
    for title, record, *network in (
        ("SimCLR h", "factors", "simclr-shapes", "h"),
        ("SupCon h", "factors-relatives", "supcon-shapes", "h"),
        ("LeJEPA h", "factors-relatives", "lejepa-shapes", "h"),
        ("SimCLR z", "factors", "simclr-shapes", "z"),
        ("SupCon z", "factors-relatives", "supcon-shapes", "z"),
        ("LeJEPA z", "factors-relatives", "lejepa-shapes", "z"),
        ("CLIP h", "factors", "clip-shapes", "h"),
        ("SigLIP h", "factors-captions", "siglip-shapes", "h"),
        ("SLIP h", "factors-captions", "slip-shapes", "h"),
        ("DINO", "factors", "dino-shapes", "all tokens"),
        ("iBOT", "factors-relatives", "ibot-shapes", "all tokens"),
    ):
        scores = {name: factor_scores(RECORDS[record], *network, name)[0] for name in names}
        yield title, *[cell(name, score) for name, score in scores.items()]


def ibot_attention():
    yield "intersection over union of the chosen head", "untrained", "trained"
    for method, title in {"dino": "DINO", "ibot": "iBOT"}.items():
        run = RECORDS[f"{method}-attention"]["runs"][0]
        yield title, *[f"{run[key]['iou_of_the_chosen']:.2f}" for key in ("untrained", "trained")]


def without_negatives():
    yield "data", "method", "spread", "linear probe", "kNN"
    names = {
        "SimSiam": "seed0",
        "SimSiam, no predictor": "no-predictor",
        "SimSiam, gradients to both sides": "no-stop-gradient",
    }
    rows = [
        (title, method, f"simsiam-{RUNS[data]}-{name}")
        for title, data in DATA.items()
        for method, name in names.items()
    ]
    rows.append(("shapes", "BYOL", "byol-shapes-seed0"))
    rows.append(("shapes", "BYOL, no predictor", "byol-shapes-no-predictor"))
    for title, method, name in rows:
        record = RECORDS[name]
        yield title, method, f"{record['history'][-1]['spread']:.2f}", *scores("", record)


def relative_patches():
    yield "data", "patches", "positions", "linear probe", "kNN"
    for title, data in DATA.items():
        names = {"with gaps, moved at random": "seed0", "without": "shortcuts"}
        for patches, name in names.items():
            record = RECORDS[f"relative_patch-{RUNS[data]}-{name}"]
            positions = percent(record["pretext_task"]["position"])
            yield title, patches, positions, *scores("", record)


def colorization():
    yield "data", "linear probe"
    for row in RECORDS["colorization-colors"]["rows"]:
        yield f"shapes, {row['case']}", gain_of(row)
    yield "CIFAR-10", pair("colorization-cifar10-short-seed0")


def inpainting():
    weight = "weight of the adversarial loss"
    yield "data", weight, "error", "discriminator", "sharpness", "linear probe", "kNN"
    names = {"0": "no-adversary", "0.001": "seed0", "1": "adversary-1"}
    keys = "reconstruction", "adversarial", "sharpness"
    for title, data in DATA.items():
        for case, end in names.items():
            name = f"inpainting-{RUNS[data]}-{end}"
            if name not in RECORDS:  # 0.001 was not run on CIFAR-10
                continue
            record = RECORDS[name]
            terms = [f"{record['pretext_task'][key]:.2f}" for key in keys]
            yield title, case, *terms, *scores("", record)


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
        results, claims, demos, simclr_head, simclr_views, simclr_negatives, few_labels,
        rotnet_blocks, rotnet_rotations, any_angle, rotnet_labels, moco_versions, small_batches,
        memory, mae_probes, mae_fine_tuned, fine_tuned,
        mae_speed, dino_collapse, dino_attention, dino_class_token, clip_zero_shot, clip_questions,
        clip_captions, clip_few_shot, clip_flickr8k, clip_split, clip_relatives,
        clip_batches, flickr8k_views, all_methods,
        three_times_as_long, all_methods_cifar10, factors_relatives, ibot_attention,
        without_negatives, relative_patches, colorization, inpainting, speed,
    )
}  # fmt: skip
TABLES["factors"] = functools.partial(factors, "factors")
TABLES["factors_cifar10"] = functools.partial(factors, "factors-cifar10")
MAE_TABLES = {  # name: its first column, the record, further columns
    "mae_mask_sampling": ("masked", "mae-mask-sampling"),
    "mae_decoder_depth": ("decoder", "mae-decoder-depth", "linear_probe_class_token"),
    "mae_decoder_dim": ("width of the lecture's, beside 1024", "mae-decoder-dim"),
    "mae_augment": ("augmentation", "mae-augment"),
    "mae_mask_token": ("encoder", "mae-mask-token", "from_scratch"),
    "mae_mask_ratio": ("masked", "mae-mask-ratio"),
    "mae_target": ("target", "mae-target", "from_scratch"),
}
TABLES |= {name: functools.partial(mae_ablation, *about) for name, about in MAE_TABLES.items()}


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
