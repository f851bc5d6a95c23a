"""What retrieval measures where captions, and not pictures, are split: one caption of each test picture is tested, and
the picture is learned from with its others. The pictures to search are those of the honest measurement.

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
    """The test pictures with all but their first caption go to the training ones as well -> Dataset.

    Raises UserError for data with classes, and where a test picture has one caption alone, or none.
    """
    if data.classes or any(len(texts) < 2 for texts in data.test_captions or [[]]):
        raise common.UserError("--dataset: must be a folder with two captions or more of each test picture")
    return dataclasses.replace(
        data,
        train_images=torch.cat([data.train_images, data.test_images]).contiguous(memory_format=torch.channels_last),
        train_captions=data.train_captions + [texts[1:] for texts in data.test_captions],
        test_captions=[texts[:1] for texts in data.test_captions],
    )


if __name__ == "__main__":
    load_dataset = common.load_dataset
    common.load_dataset = lambda *args: leak(load_dataset(*args))
    try:
        clip.main(clip.parse_args(["--out", "runs/leakage", *sys.argv[1:]]))
    except common.UserError as error:
        sys.exit(f"error: {error}")
