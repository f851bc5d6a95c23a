"""How well the heads of DINO find objects: intersection over union with the mask, which is known.

    python results/attention.py runs/dino-shapes-seed* --record results/dino-attention.json

As in the paper, a map keeps those patches that hold 60 % of the attention of the class token. A
head may as well look at all but the object, so the map's opposite is measured, too. Head and sign
are chosen on training images and measured on test images. Beside them stands the mean mask, a guess
that never looks at the image.
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import common
import dino
from results import factors
from results.ablation import commit_of_the_code

COUNT = 200  # images to choose by, and to measure


def masks_of(scenes, size=32):
    """Scenes of common.sample_shapes -> (N, size * size), 1 where the object covers the pixel: the
    scenes are drawn once more, white on black."""
    colors = list(common.COLORS)
    plain = {
        "color": torch.full_like(scenes["color"], colors.index("white")),
        "background": torch.full_like(scenes["background"], colors.index("black")),
    }
    images = common.draw_shapes(scenes | plain, torch.Generator().manual_seed(0), size)
    return (common.luma(images / 255) > 0.5).float().flatten(1)


def most(maps, mass=0.6):
    """Maps (N, heads, L), not negative -> 1 in the places that hold 60 % of each, highest first."""
    values, order = maps.sort(2, descending=True)
    before = (values.cumsum(2) - values) / values.sum(2, keepdim=True)
    return torch.zeros_like(maps).scatter(2, order, (before < mass).float())


def iou(guess, mask):
    """Guesses (N, heads, L) and masks (N, L), 0 or 1 -> intersection over union (N, heads)."""
    mask = mask[:, None]
    both = (guess * mask).sum(2)
    return both / (guess.sum(2) + mask.sum(2) - both)


@torch.no_grad()
def attention(encoder, images):
    """Uint8 (N, 3, 32, 32) -> (N, heads, 32 * 32): as in attention.png, where images are enlarged
    until each pixel is a patch."""
    encoder.eval()
    parts = [dino.as_patches(x, encoder.patch_size) for x in images.split(20)]
    return torch.cat([encoder.attention(x) for x in parts])


def overlaps(maps, mask):
    """-> (2 heads,): mean IoU of what each head looks at, then of what it does not look at."""
    opposite = maps.amax(2, keepdim=True) - maps
    guesses = torch.cat([most(maps), most(opposite)], dim=1)
    return iou(guesses, mask).mean(0)


def brighter_on_the_object(maps, mask):
    """-> (N, heads), 1 where a head looks more at a patch of the object than at one beside it."""
    mask = mask[:, None]
    on = (maps * mask).sum(2) / mask.sum(2)
    off = (maps * (1 - mask)).sum(2) / (1 - mask).sum(2)
    return (on > off).float()


def measure(encoder, train, test):
    """An encoder, and scenes and images of training and test -> what the record says of it."""
    (scenes, images), (test_scenes, test_images) = train, test
    choice = overlaps(attention(encoder, images), masks_of(scenes)).argmax()
    maps = attention(encoder, test_images)
    mask = masks_of(test_scenes)
    scores = overlaps(maps, mask)
    on = brighter_on_the_object(maps, mask)
    lighter = factors.known_factors(test_scenes)["brighter than the background"] == 1
    heads = maps.shape[1]
    return {
        "iou_of_heads": scores[:heads].tolist(),
        "iou_of_their_opposites": scores[heads:].tolist(),
        "chosen": {"head": 1 + choice.item() % heads, "opposite": choice.item() >= heads},
        "iou_of_the_chosen": scores[choice].item(),
        "looks_at_brighter_objects": on[lighter].mean(0).tolist(),
        "looks_at_darker_objects": on[~lighter].mean(0).tolist(),
    }


def guess(train, test):
    """IoU of the mean mask of the training images, at its best threshold there; and of all of the
    image."""
    mean = masks_of(train[0]).mean(0)
    mask = masks_of(train[0])
    levels = torch.linspace(0, 0.9, 19)
    scores = [iou((mean > level).float().expand(len(mask), 1, -1), mask).mean() for level in levels]
    level = levels[torch.stack(scores).argmax()]
    mask = masks_of(test[0])
    same = (mean > level).float().expand(len(mask), 1, -1)
    return {
        "mean_mask": iou(same, mask).mean().item(),
        "all_of_the_image": iou(torch.ones_like(same), mask).mean().item(),
    }


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="runs of dino.py or ibot.py on shapes")
    parser.add_argument("--record", type=Path, help="a JSON file to write")
    args = parser.parse_args(argv)
    factors.check(parser, args.runs, ["dino", "ibot"], args.record)
    few = []
    for scenes, images in factors.draw():
        few.append(({key: value[:COUNT] for key, value in scenes.items()}, images[:COUNT]))
    content = {"command": shlex.join(["python", *sys.argv]), "commit": commit_of_the_code()}
    content |= {"date": time.strftime("%Y-%m-%d"), "device": "cpu", "torch": torch.__version__}
    content["guess"] = guess(*few)
    print(content["guess"])
    content["runs"] = []
    for folder in args.runs:
        summary, before, after = factors.networks(folder)
        line = {"command": summary["command"], "seed": summary["args"]["seed"]}
        line["untrained"] = measure(before["all tokens"], *few)
        line["trained"] = measure(after["all tokens"], *few)
        content["runs"].append(line)
        print(json.dumps(line, indent=2), flush=True)
    if args.record:
        args.record.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
