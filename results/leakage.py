"""What retrieval measures where captions, and not images, are split: one caption of each test image is tested, and the
image is trained on with its others. The images to search are those of the honest measurement.

    python results/leakage.py --dataset data/flickr8k --encoder small    any flags of clip.py
"""

import dataclasses
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import clip
import common


def leak(data):
    """The test images go to the training ones as well, with all captions but one, which stays in test -> Dataset.

    It is the first of the first image, the second of the next one, and so on: where a file sorts the captions of an
    image, first ones are not like others. Raises UserError for data with classes, and where a test image has one
    caption alone, or none.
    """
    if data.classes or any(len(texts) < 2 for texts in data.test_captions or [[]]):
        raise common.UserError("--dataset: must be a folder with two captions or more of each test image")
    tested = [(i % len(texts), texts) for i, texts in enumerate(data.test_captions)]
    return dataclasses.replace(
        data,
        train_images=torch.cat([data.train_images, data.test_images]).contiguous(memory_format=torch.channels_last),
        train_captions=data.train_captions + [texts[:i] + texts[i + 1 :] for i, texts in tested],
        test_captions=[[texts[i]] for i, texts in tested],
    )


if __name__ == "__main__":
    load_dataset = common.load_dataset
    try:
        args = clip.parse_args(["--out", "runs/leakage", *sys.argv[1:]])
        leaky = leak(load_dataset(args.dataset, args.data_dir, args.image_size))
        common.load_dataset = lambda name, *rest: leaky if name == args.dataset else load_dataset(name, *rest)
        args.command = args.command.replace("clip.py --out runs/leakage", "results/leakage.py")
        clip.main(args)
    except common.UserError as error:
        sys.exit(f"error: {error}")
