"""One CLIP, many questions: zero-shot accuracy for everything that captions name.

    python results/zero_shot.py runs/clip-shapes-seed* --record results/clip-zero-shot.json

A label set is a list of prompts, and the answer to an image is the prompt nearest to it in the
common space. Nothing is trained. Where captions give a word in long sentences only, an open place
of the prompt is filled with all kinds and colors, and the mean of these texts is taken, as in the
paper's ensemble of prompts.
"""

import argparse
import itertools
import json
import re
import shlex
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import clip
import common
from results import factors
from results.ablation import commit_of_the_code

KINDS = list(common.SILHOUETTES)
COLORS = list(common.COLORS)


def questions(scenes):
    """Scenes of common.sample_shapes -> {question: (prompts, answers (N, K), which are right)}. In
    a prompt {kind} and {color} are open; there are two right answers to a color of the background.
    """
    size = ((scenes["half_width"] - 0.60) / 0.25 * 3).long().clamp(max=2)  # as in the captions
    pairs = [f"the {kind} is {color}" for kind in KINDS for color in COLORS]
    pair = len(COLORS) * scenes["label"] + scenes["color"]
    return {
        "kind": ([f"there is a {kind}" for kind in KINDS], scenes["label"][:, None]),
        "color": ([f"the {{kind}} is {color}" for color in COLORS], scenes["color"][:, None]),
        "kind and color": (pairs, pair[:, None]),
        "size": ([f"there is a {size} {{kind}}" for size in common.SIZES], size[:, None]),
        "size, in a whole sentence": (
            [f"on white and black stands a {size} {{color}} {{kind}}" for size in common.SIZES],
            size[:, None],
        ),
        "a color of the background": (
            [f"the background is {color}" for color in COLORS],
            scenes["background"],
        ),
        "a color of the background, in a whole sentence": (
            [f"a {{color}} {{kind}}, small, in front of {color} and white" for color in COLORS],
            scenes["background"],
        ),
    }


def filled(prompt):
    """A prompt -> the texts in which its open places are filled."""
    kinds = KINDS if "{kind}" in prompt else [""]
    colors = COLORS if "{color}" in prompt else [""]
    texts = [prompt.format(kind=k, color=c) for k, c in itertools.product(kinds, colors)]
    return [re.sub(r"\ba(?= [aeiou])", "an", text) for text in texts]


def accuracy(model, tokenizer, image_features, prompts, right):
    """Features (N, D) of length 1, prompts, answers (N, K) -> fraction with a right one."""
    texts = [clip.embed_texts(model, tokenizer, filled(prompt)).mean(0) for prompt in prompts]
    y = F.normalize(torch.stack(texts), dim=1)
    answer = (image_features @ y.T).argmax(1, keepdim=True)
    return (answer == right).any(1).float().mean().item()


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs of clip.py on shapes")
    parser.add_argument("--record", type=Path, help="a JSON file to write")
    args = parser.parse_args(argv)
    factors.check(parser, args.runs, ["clip"], args.record)
    _, (scenes, images) = factors.draw()
    content = {"command": shlex.join(["python", *sys.argv]), "commit": commit_of_the_code()}
    content |= {"date": time.strftime("%Y-%m-%d"), "device": "cpu", "torch": torch.__version__}
    asked = questions(scenes)
    content["chance"] = {}
    for name, (prompts, right) in asked.items():
        content["chance"][name] = right.shape[1] / len(prompts)
    content["runs"] = []
    for folder in args.runs:
        model, tokenizer, own = clip.load_run(folder)
        x = clip.embed_images(model, images)
        scores = {name: accuracy(model, tokenizer, x, *parts) for name, parts in asked.items()}
        content["runs"].append({"command": own.command, "seed": own.seed, "accuracy": scores})
        cells = "  ".join(f"{name} {value:.1%}" for name, value in scores.items())
        print(f"seed {own.seed}  {cells}", flush=True)
    if args.record:
        args.record.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
