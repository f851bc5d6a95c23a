"""What an encoder knows of an image, factor by factor: probes of all that shapes are drawn from.

    python results/factors.py runs/*-shapes-seed0 --record results/factors.json
    python results/factors.py runs/*-cifar10-seed0       of photographs, what their pixels show
    python results/figures.py --factors results/factors.json -o factors.png

The class is one question of many. Shapes are always the same images, drawn from known factors:
kind, color, background, size, place, tilt. So each can be asked for. A probe reads it from frozen
features, learned on training images and measured on test: accuracy by the scripts' linear probe
where there are classes, R2 by ridge regression where there are numbers (1 is perfect, 0 is the mean
of all). The last factors are none of the scene: the image was turned, made gray, or noise was
added, or not, and the probe has to see which. Photographs come without their scene, so they are
asked for their class, color and light.

A run has several rows: the features h and the projections z, or one for each block. The first run
with an encoder adds the untrained one, with the weights that the run began with. Nothing is trained
but the probes.
"""

import argparse
import copy
import json
import shlex
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import clip
import common
import dino
import mae
import moco
import rotnet
import simclr
from relatives import (
    colorization,
    ibot,
    inpainting,
    jigsaw,
    lejepa,
    relative_patch,
    siglip,
    slip,
    supcon,
)
from results.ablation import commit_of_the_code


# === Factors ======================================================================================
def draw():
    """Scenes and images of `shapes`, training and test: [(scenes, uint8 (N, 3, 32, 32))]."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for count in (4096, 2000):  # as common.shapes_dataset does
        scenes = common.sample_shapes(count, generator)
        images = common.draw_shapes(scenes, generator)
        common.describe_shapes(scenes, generator)  # draws numbers, too
        parts.append((scenes, images))
    return parts


def known_factors(scenes):
    """Scenes of common.sample_shapes -> {factor: classes (N,) int64, or numbers (N, d)}."""
    palette = torch.tensor(list(common.COLORS.values())) / 255
    thing = palette[scenes["color"]]  # (N, 3)
    first, second = palette[scenes["background"]].unbind(1)
    luma = torch.tensor([0.2989, 0.587, 0.114])
    brighter = thing @ luma > (first + second) @ luma / 2
    rise = (second - first) @ luma  # along the gradient of the background
    x, y = scenes["center"].unbind(1)
    return {
        "kind of thing": scenes["label"],
        "its color": scenes["color"],
        "color of the background": (first + second) / 2,
        "brighter than the background": brighter.long(),
        "size": scenes["half_width"][:, None],
        "place, left-right": x[:, None],
        "place, up-down": y[:, None],
        "tilt": scenes["tilt"][:, None],
        "light, left-right": (rise * scenes["direction"].cos())[:, None],
        "light, up-down": (rise * scenes["direction"].sin())[:, None],
    }


def measured_factors(images, labels):
    """The same of photographs, uint8 (N, 3, S, S), as far as pixels show them: the light is the
    mean luma of one half minus that of the other."""
    luma = common.luma(images / 255)
    left, right = luma.mean((1, 2)).chunk(2, dim=1)  # (N, S / 2) each
    top, bottom = luma.mean((1, 3)).chunk(2, dim=1)
    return {
        "kind of thing": labels,
        "mean color": (images / 255).mean((2, 3)),
        "light, left-right": right.mean(1, keepdim=True) - left.mean(1, keepdim=True),
        "light, up-down": bottom.mean(1, keepdim=True) - top.mean(1, keepdim=True),
    }


def changed(images, generator):
    """Uint8 (N, 3, S, S) -> {factor: (what the images became, what was done to each (N,))}."""
    N = len(images)
    turns = torch.randint(4, (N,), generator=generator)
    gray = torch.randint(2, (N,), generator=generator)
    noise = torch.randint(2, (N,), generator=generator)
    pairs = zip(images, turns.tolist(), strict=True)
    turned = torch.stack([image.rot90(k, (1, 2)) for image, k in pairs])
    grayed = torch.where(gray[:, None, None, None] == 1, common.luma(images.float()), images)
    added = 25 * noise[:, None, None, None] * torch.randn(images.shape, generator=generator)
    return {
        "turned by 0, 90, 180, 270": (turned, turns),
        "made gray": (grayed.round().byte(), gray),
        "noise added": ((images + added).round().clamp(0, 255).byte(), noise),
    }


def probe(train, y, test, test_y):
    """Features (M, D), (Q, D) and a factor -> accuracy of the scripts' linear probe for classes, R2
    of ridge regression for numbers (M, d), the mean over d; on test."""
    if y.dtype == torch.int64:
        return simclr.linear_probe(train, y, test, test_y)
    mean = train.mean(0)
    std = train.std(0, correction=0) + 1e-5
    x = ((train - mean) / std).double()
    test_x = ((test - mean) / std).double()
    center = y.mean(0)
    weights = torch.linalg.solve(x.T @ x + torch.eye(x.shape[1]), x.T @ (y - center).double())
    error = (test_x @ weights + center - test_y).square().sum(0)
    return (1 - error / (test_y - test_y.mean(0)).square().sum(0)).mean().item()


def chance(y):
    """What a probe of no features scores: the share of the most frequent class, R2 = 0."""
    return y.bincount().max().item() / len(y) if y.dtype == torch.int64 else 0.0


# === Networks =====================================================================================
MODELS = {  # method: its module, and the class of its model
    "simclr": (simclr, simclr.SimCLR),
    "supcon": (supcon, simclr.SimCLR),
    "lejepa": (lejepa, lejepa.LeJEPA),
    "moco": (moco, moco.MoCo),
    "rotnet": (rotnet, rotnet.RotNet),
    "relative_patch": (relative_patch, relative_patch.PatchNetwork),
    "jigsaw": (jigsaw, jigsaw.JigsawNetwork),
    "colorization": (colorization, colorization.Colorizer),
    "inpainting": (inpainting, inpainting.ContextEncoder),
    "mae": (mae, mae.build_mae),
    "dino": (dino, dino.DINO),
    "ibot": (ibot, ibot.IBOT),
}
WITH_CAPTIONS = {
    "clip": (clip, clip.CLIP),
    "siglip": (siglip, siglip.SigLIP),
    "slip": (slip, slip.SLIP),
}
UNTRAINED = {  # which encoder a method begins with
    "simclr": "ResNet",
    "rotnet": "NiN",
    "jigsaw": "NiN, standardized images",
    "colorization": "NiN, gray images",
    "mae": "ViT",
    "dino": "ViT with a stem",
}


def parts_of(method, model):
    """A model -> {part: network from normalized images (B, 3, 32, 32) to features (B, D)}."""
    if method in ("simclr", "supcon", "lejepa"):
        return {"h": model.encoder, "z": model} if len(model.projector) else {"h": model.encoder}
    if method == "moco":
        return {"h": model.query_encoder[0], "z": model.query_encoder}
    if method == "mae":
        return {"patch tokens": mae.PatchMean(model.encoder)}
    if method in ("dino", "ibot"):
        return {"all tokens": model.teacher.encoder}
    if method in WITH_CAPTIONS:
        space = nn.Sequential(model.encoder, model.image_projection)
        return {"h": model.encoder, "common space": space}
    blocks = (1, 2, 3) if method == "rotnet" else (2,)
    return {f"block {number}": rotnet.pooled(model.encoder, number) for number in blocks}


def models(folder):
    """A finished run without captions -> its summary, its Args, and its model before training and
    after it."""
    summary = json.loads((folder / "summary.json").read_text())
    module, Model = MODELS[summary["method"]]
    args = module.Args(**summary["args"])
    torch.manual_seed(args.seed)
    model = Model(args, 32) if Model is mae.build_mae else Model(args)
    model = model.to(memory_format=torch.channels_last).eval()
    before = copy.deepcopy(model)
    if (folder / "checkpoint.pt").exists():
        content = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
        model.load_state_dict(content["model"])
    else:  # of simclr.py, with labels in the place of pretraining
        model.encoder.load_state_dict(torch.load(folder / "encoder.pt", weights_only=True))
    return summary, args, before, model


def model_with_captions(folder, summary):
    """A finished run with captions, and its summary -> the model of its best epoch."""
    module, Model = WITH_CAPTIONS[summary["method"]]
    args = module.Args(**summary["args"])
    content = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    weights = content["best"]
    model = Model(args, len(weights["token_embedding.weight"]), 32)
    model.load_state_dict(weights)
    return model.eval()


def networks(folder):
    """A finished run -> its summary, {part: network} before training, and the same after it."""
    summary = json.loads((folder / "summary.json").read_text())
    method = summary["method"]
    if method in WITH_CAPTIONS:
        return summary, {}, parts_of(method, model_with_captions(folder, summary))
    _, _, before, after = models(folder)
    return summary, parts_of(method, before), parts_of(method, after)


# === Table ========================================================================================
def questions(dataset, data_dir):
    """[(factor, training images, their answers, test images, theirs)] of shapes or photographs."""
    if dataset == "shapes":
        (scenes, images), (test_scenes, test_images) = draw()
        factors = known_factors(scenes)
        test_factors = known_factors(test_scenes)
    else:
        data = common.load_dataset(dataset, data_dir)
        images = data.train_images[:10_000]  # enough for probes of a few hundred features
        test_images = data.test_images
        factors = measured_factors(images, data.train_labels[:10_000])
        test_factors = measured_factors(test_images, data.test_labels)
    rows = [(name, images, y, test_images, test_factors[name]) for name, y in factors.items()]
    generator = torch.Generator().manual_seed(1)
    train = changed(images, generator)
    test = changed(test_images, generator)
    return rows + [(name, *train[name], *test[name]) for name in train]


def scores(network, rows):
    """A network and the questions -> {factor: score}."""
    h = {}  # of each set of images, once
    result = {}
    for name, train, y, test, test_y in rows:
        for images in (train, test):
            if id(images) not in h:
                h[id(images)] = simclr.features(network, images)
        result[name] = probe(h[id(train)], y, h[id(test)], test_y)
    return result


def measure(folders, dataset, data_dir):
    """Run folders, all of one dataset -> the content of the record."""
    rows = questions(dataset, data_dir)
    seen = set()
    table = []

    def add(name, summary, part, network):
        line = {"run": name, "part": part, "seed": summary["args"]["seed"]}
        line |= {"command": summary["command"], "trained_on": summary["date"]}
        line["scores"] = scores(network, rows)
        table.append(line)
        cells = "  ".join(f"{value:.2f}" for value in line["scores"].values())
        print(f"{name:30}{part:14}{line['seed']}   {cells}", flush=True)

    for folder in folders:
        summary, before, after = networks(folder)
        encoder = UNTRAINED.get(summary["method"])
        key = encoder, summary["args"]["seed"]
        if encoder and key not in seen:
            seen.add(key)
            for part, network in before.items():
                if part != "z":
                    add(f"untrained {encoder}", summary, part, network)
        for part, network in after.items():
            add(folder.name.rsplit("-seed", 1)[0], summary, part, network)
    return {"chance": {name: chance(test_y) for name, _, _, _, test_y in rows}, "rows": table}


def check(parser, folders, methods, record=None):
    """Ends with one line if a folder has no finished run of these methods, or a record no place."""
    for folder in folders:
        path = folder / "summary.json"
        if not path.is_file():
            parser.error(f"{folder}: is not the folder of a finished run")
        method = json.loads(path.read_text())["method"]
        if method not in methods:
            parser.error(f"{folder}: is a run of {method}.py, not of {', '.join(methods)}")
    if record and not record.parent.is_dir():
        parser.error(f"--record {record}: there is no such folder")


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    parser.add_argument("--record", type=Path, help="a JSON file to write")
    args = parser.parse_args(argv)
    check(parser, args.runs, [*MODELS, *WITH_CAPTIONS], args.record)
    runs = [json.loads((folder / "summary.json").read_text())["args"] for folder in args.runs]
    datasets = {run["dataset"] for run in runs}
    if datasets not in ({"shapes"}, {"cifar10"}):
        found = ", ".join(sorted(datasets))
        parser.error(f"the runs are on {found}: all must be on shapes, or all on cifar10")
    about = {"command": shlex.join(["python", *sys.argv]), "commit": commit_of_the_code()}
    about |= {"date": time.strftime("%Y-%m-%d"), "device": "cpu"}
    about |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    content = about | measure(args.runs, runs[0]["dataset"], runs[0]["data_dir"])
    if args.record:
        args.record.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
