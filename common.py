"""Datasets and batched augmentations for the scripts beside this file, and nothing else.

Images lie as one uint8 tensor on the training device; augmentations work there on whole batches of
float images in [0, 1], with one parameter per image, drawn from an explicit torch.Generator.
"""

import contextlib
import csv
import dataclasses
import hashlib
import json
import math
import os
import re
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageOps


class UserError(Exception):
    """An input that the person can mend: the message names the flag or the file and what to do."""


@dataclasses.dataclass
class Dataset:
    """Images uint8 (N, 3, S, S) in channels_last order, labels int64, class names, and captions, a
    list for each image.

    train_labels are those of the first training images: STL-10 has more images than labels. Without
    classes there are none, and test_labels are row numbers. Shapes have colors, numbers in COLORS.
    note: how a path was understood.
    """

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: list[str]
    train_captions: list[list[str]] | None = None
    test_captions: list[list[str]] | None = None
    val_images: torch.Tensor | None = None
    val_captions: list[list[str]] | None = None
    train_colors: torch.Tensor | None = None
    test_colors: torch.Tensor | None = None
    note: str = ""

    def to(self, device):
        """The same on the device; images that would fill more than half of its free memory stay
        where they are."""
        tensors, free = {name: x for name, x in vars(self).items() if torch.is_tensor(x)}, math.inf
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
        elif device.type == "mps":
            free = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        stay = sum(x.nbytes for x in tensors.values()) > free / 2
        if stay:
            tensors = {name: x for name, x in tensors.items() if not name.endswith("images")}
        moved = {name: x.to(device) for name, x in tensors.items()}
        return dataclasses.replace(self, **moved)

    def examples(self):
        """Row numbers of test images for a figure: one of each of ten classes, or without labels
        the first ten."""
        labels = self.test_labels
        if len(labels) == 0:  # images with captions
            return torch.arange(min(10, len(self.test_images)))
        return torch.stack([(labels == label).nonzero()[0, 0] for label in labels.unique()[:10]])


def batches(images, order, size, device):
    """Rows `order` (n,) of images (M, 3, S, S), whole batches of them: yields (size, 3, S, S) on
    the device. Images in main memory are gathered here, and copied from pinned pages, which a GPU
    reads while it computes."""
    for index in order[: len(order) // size * size].to(images.device).split(size):
        batch = images[index]
        if images.device != device and device.type == "cuda":
            batch = batch.pin_memory()
        yield batch.to(device, non_blocking=True)


def fingerprint(data):
    """Shape of the training images, sum of some 64 of them, and a number that depends on their
    labels, the class names and the captions: other data than a run began with has another
    fingerprint."""
    images = data.train_images
    words = [data.train_labels.tolist(), data.classes, data.train_captions, data.val_captions]
    some = images[:: len(images) // 64 + 1]
    return [*images.shape, int(some.sum()), text_hash(json.dumps(words)) % 10**12]


def labelled_rows(labels, amount, seed):
    """A class-balanced part of labels (L,), drawn with seed -> row numbers in random order. amount:
    "0.1" or 0.1 is a fraction of each class, at least one image of it; "10" or 10 a number of
    images per class. So "1.0" is all, "1" one per class. Raises UserError for anything else, and
    where there are too few."""
    try:
        number = int(amount) if str(amount).isdecimal() else float(amount)
    except ValueError:
        number = 0
    if not number > 0 or (number > 1 and number % 1):
        raise UserError(
            f"--labels {amount}: must be a fraction up to 1.0, "
            "or a whole number of labels per class"
        )
    if len(labels) == 0:
        raise UserError(f"--labels {amount}: the dataset has no labels")
    counts = labels.bincount()
    fewest = int(counts[counts > 0].min())
    if number > max(1, fewest):
        raise UserError(
            f"--labels {number:g}: the smallest class has only {fewest} training images"
        )
    fraction = isinstance(number, float) and number <= 1
    wanted = torch.full_like(counts, round(number))
    if fraction:
        wanted = (counts * number).round().clamp(min=1)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order.to(labels.device)
    by_class = labels[order].argsort(stable=True).split(counts.tolist())
    rows = torch.cat([part[:n] for part, n in zip(by_class, wanted.int().tolist(), strict=True)])
    return order[rows.sort().values]


def load_dataset(name, data_dir="data", image_size=96):
    """`shapes`, `cifar10`, `cifar100`, `stl10`, or a path: of an .npz file, or of a folder of
    images -> Dataset. The second to fourth are downloaded once by torchvision and kept as
    <data_dir>/<name>.npz, which is all that later calls read. Images of a folder become image_size
    pixels square, larger ones in an .npz file shrink to that. Prints what was found. Raises
    UserError, in one line, for a dataset that is unknown, unreachable, broken or too small."""
    if name == "shapes":
        return shapes_dataset()
    known = name in ("cifar10", "cifar100", "stl10")
    path = Path(data_dir, f"{name}.npz") if known else Path(name)
    if known and not path.exists():
        download(name, path)
    if path.suffix != ".npz" and not path.is_dir():
        raise UserError(
            f"--dataset {name}: not shapes, cifar10, cifar100, stl10, "
            "an .npz file or a folder of images"
        )
    if path.suffix == ".npz":
        data = npz_dataset(path, image_size)
    else:
        data = folder_dataset(path, Path(data_dir), image_size)
    counts = f"{len(data.train_images)} training, {len(data.test_images)} test images"
    print(f"{name}: {counts}, {data.note}", flush=True)
    return data


def npz_dataset(path, image_size):
    """{train,test}_images, uint8 (N, S, S), (N, S, S, 1) or (N, S, S, 3), and {train,test}_labels,
    integers (N,) or (N, 1), numbered anew unless they run from 0 to K - 1; maybe `classes`, their
    names. Without train_labels for them, the last train_images are unlabelled; with train_images
    alone there are no classes."""
    keys = ["train_images", "train_labels", "test_images", "test_labels"]
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {key: file[key] for key in keys if key in file}
            found = ", ".join(file) or "none"
            names = file["classes"].astype(str).ravel().tolist() if "classes" in file else []
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # NumPy, zipfile and zlib fail in many ways
        raise UserError(f"{path}: not a readable .npz file ({error})") from None

    tensors = []
    for key in keys if any(key in arrays for key in keys[1:]) else keys[:1]:
        if key not in arrays:
            raise UserError(f"{path}: has no array {key}; its arrays are {found}")
        x = arrays[key]
        array = f"{path}: {key} is {x.dtype} {x.shape}"
        if key.endswith("images"):
            x = x[..., None] if x.ndim == 3 else x  # gray
            N, H, W, C = x.shape if x.ndim == 4 else (0, 0, 0, 0)
            if x.dtype != np.uint8 or N == 0 or H != W or C not in (1, 3):
                raise UserError(f"{array}, not uint8 (N, S, S) or (N, S, S, 3)")
            x = torch.from_numpy(x).permute(0, 3, 1, 2).expand(N, 3, H, W)
            x = x.contiguous(memory_format=torch.channels_last)
            if H > image_size:
                x = TF.resize(x, [image_size, image_size], antialias=True)
            tensors.append(x)
        else:
            L = len(x) if x.ndim and key == "train_labels" else N
            if (
                x.dtype.kind not in "iu"
                or x.shape not in ((L,), (L, 1))
                or not 0 < L <= N
                or x.astype(int).min() < 0
            ):
                raise UserError(f"{array}, not {N} class numbers from 0 on")
            tensors.append(torch.from_numpy(x.reshape(L).astype(int)))
    if len(tensors) == 1:  # in random order, since that of an array may be by class
        order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
        train, test = hold_out(tensors[0][order])
        nothing = torch.empty(0, dtype=torch.int64)
        return Dataset(train, nothing, test, torch.arange(len(test)), [], note="no classes")
    train_images, train_labels, test_images, test_labels = tensors
    if train_images.shape[1:] != test_images.shape[1:]:
        raise UserError(f"{path}: train_images and test_images differ in size")
    numbers, labels = torch.cat([train_labels, test_labels]).unique(return_inverse=True)
    train_labels, test_labels = labels.tensor_split([len(train_labels)])
    classes = [names[n] if len(names) > numbers[-1] else str(n) for n in numbers.tolist()]
    note = f"{len(classes)} classes"
    if numbers[-1] >= len(classes):
        note += f", labels {numbers[0]} to {numbers[-1]} numbered anew"
    return Dataset(train_images, train_labels, test_images, test_labels, classes, note=note)


def hold_out(images):
    """Images without classes, in random order -> those to learn from, and a tenth, at most 1,000,
    to measure on."""
    held = min(math.ceil(len(images) / 10), 1000)
    return images[:-held], images[-held:]


def download(name, path):
    """Fetches a dataset with torchvision and writes it to `path`, whole or not at all."""
    source, stl10 = getattr(torchvision.datasets, name.upper()), name == "stl10"
    splits = {"train": {"train": True}, "test": {"train": False}}
    if stl10:  # the 5,000 labelled training images come first
        splits = {"train": {"split": "train+unlabeled"}, "test": {"split": "test"}}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            arrays = {}
            for split, where in splits.items():
                part = source(folder, download=True, **where)
                images, labels = part.data, np.array(part.labels if stl10 else part.targets)
                arrays[f"{split}_images"] = images.transpose(0, 2, 3, 1) if stl10 else images
                labelled = labels >= 0  # torchvision labels the others -1
                arrays[f"{split}_labels"] = labels[labelled]
            np.savez(Path(folder, path.name), **arrays, classes=np.array(part.classes))
            Path(folder, path.name).replace(path)
    except (OSError, RuntimeError) as error:  # no network, a broken archive, a read-only folder
        raise UserError(
            f"--dataset {name}: {path} is not there and cannot be downloaded ({error})"
        ) from None


# --- Folders of images ---


def folder_dataset(root, data_dir, image_size):
    """captions.csv; or train/<class>/* with test/<class>/* or val/<class>/*; or train/<class>/* or
    <class>/* alone, of which a hash of its name makes one image in five a test image; or images
    without classes: those of train/ if it is there, and for a test those of test/ or else a tenth.
    Capitals do not matter, and train2017 is train too."""
    for name in ("captions.csv", "captions.txt"):
        if (root / name).exists():
            return captioned_dataset(root / name, data_dir, image_size)
    names, left_out = list_images(root)
    below = {name: name.split(os.sep)[:-1] for name in names}  # the folders it lies in
    train, test, val = (
        [n for n in names if below[n] and n.lower().startswith(s)] for s in ("train", "test", "val")
    )
    test, depth, how = test or val, 1, ""
    if not train:
        train, test, depth = names, [], 0
    left_out["images elsewhere"] = len(names) - len(train) - len(test)
    label = {name: (below[name][depth:] + [""])[0] for name in train + test}
    classes = sorted({label[name] for name in train})
    if "" in classes or len(classes) == 1:  # nothing to tell apart
        train, test = (train, test) if test else hold_out(sorted(train, key=text_hash))
        classes = []
        train_labels = torch.empty(0, dtype=torch.int64)
        test_labels = torch.arange(len(test))
    else:
        if not test:
            how = ", split 80 : 20 by a hash of the names"
            test = [name for name in train if text_hash(name) % 5 == 0]
            train = [name for name in train if text_hash(name) % 5]
        if unknown := {label[name] for name in test} - set(classes):
            raise UserError(
                f"{root}: test images lie in {min(unknown) or 'no folder'}, "
                "which is no class of train/"
            )
        number = {name: k for k, name in enumerate(classes)}
        train_labels, test_labels = (
            torch.tensor([number[label[n]] for n in part]) for part in (train, test)
        )
    if not train or not test:
        raise UserError(f"{root}: too few images, {len(names)}, to hold some out as test images")
    train_images, test_images = decode(root, [train, test], data_dir, image_size)
    skipped = ", ".join(f"{count} {kind}" for kind, count in left_out.items() if count)
    note = f"{len(classes) or 'no'} classes{how}" + (f"; left out: {skipped}" if skipped else "")
    return Dataset(train_images, train_labels, test_images, test_labels, classes, note=note)


def captioned_dataset(file, data_dir, image_size):
    """Rows image,caption or image,caption,split below such a header; images beside the file or in
    images/ there. Splits are train, val and test. Without that column a hash of its name puts an
    image into one of them, 8 in 10 into train, so that neither the order of the rows nor further
    rows move it."""
    root, rows, found, splits, captions, problems = file.parent, [], {}, {}, {}, []
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, restval="", skipinitialspace=True, strict=True)
            reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
            rows.extend((f"{file}, row {reader.line_num}", row) for row in reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{file}: cannot be read as CSV in UTF-8 after {len(rows)} rows ({error})"
        ) from None
    if not {"image", "caption"} <= set(reader.fieldnames):
        raise UserError(
            f"{file}: the header is {reader.fieldnames}, not image,caption or image,caption,split"
        )
    for where, row in rows:
        name, caption = row["image"].strip(), row["caption"].strip()
        if name not in found:  # one path for one file, however it is named
            places = (root / name, root / "images" / name, root / "Images" / name)
            path = next((place.resolve() for place in places if place.is_file()), None)
            found[name] = path and os.path.relpath(path, root.resolve())
        tenth = text_hash(os.path.basename(found[name] or name)) % 10
        split = row.get("split", ("test", "val", *["train"] * 8)[tenth]).strip().lower()
        if None in row:
            problems.append(
                f"{where}: has more fields than the header; a caption with commas needs quotes"
            )
        elif not name or not caption:
            problems.append(f"{where}: the {'caption' if name else 'image'} is empty")
        elif not found[name]:
            problems.append(f"{where}: there is no image {name} in {root} or in images/ there")
        elif split not in ("train", "val", "test"):
            problems.append(f"{where}: split {split!r} is not train, val or test")
        elif splits.setdefault(found[name], split) != split:
            problems.append(
                f"{where}: {name} is in {split} here, but in {splits[found[name]]} above"
            )
        captions.setdefault(found[name], []).append(caption)
    refuse(problems)
    groups = [
        sorted(name for name in splits if splits[name] == split)
        for split in ("train", "test", "val")
    ]
    if not groups[0] or not groups[1]:
        raise UserError(
            f"{file}: none of {len(splits)} images is in train, or none in test; "
            "a column split can say so"
        )
    images = decode(root, groups, data_dir, image_size)
    texts = [[captions[n] for n in group] for group in groups]
    nothing = torch.empty(0, dtype=torch.int64)
    note = f"{len(groups[2])} for validation, {len(rows)} captions"
    val = (images[2], texts[2]) if groups[2] else (None, None)
    return Dataset(images[0], nothing, images[1], nothing, [], texts[0], texts[1], *val, note=note)


def text_hash(text):
    """A number that depends on the text alone, unlike Python's hash, which changes from process to
    process."""
    return int(hashlib.sha256(os.fsencode(text)).hexdigest(), 16)


def refuse(problems):
    """Raises UserError of the first ten problems and how many more there are, if there are any."""
    if problems:
        more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise UserError("; ".join([*problems[:10], *more, "mend them or take them out"]))


def list_images(root):
    """The image files below root, sorted and relative to it, and a count of the files left out, by
    suffix. Hidden ones and those in the folder of a run do not count at all. Links are followed, to
    each folder once."""
    names, left_out, seen = [], Counter(), set()
    for place, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "."]
        if (real := os.path.realpath(place)) in seen or "args.json" in files:
            folders[:] = files = []
        seen.add(real)
        for path in (os.path.join(place, name) for name in files if name[0] != "."):
            suffix = os.path.splitext(path)[1].lower()
            if os.path.isfile(path) and suffix in torchvision.datasets.folder.IMG_EXTENSIONS:
                names.append(os.path.relpath(path, root))
            else:
                kind = suffix or "without suffix"
                left_out[kind if os.path.isfile(path) else "broken links"] += 1
    if not names:
        raise UserError(f"{root}: there are no images in it, such as .jpg or .png files")
    return sorted(names), left_out


def decode(root, groups, data_dir, size):
    """Groups of image files below root -> for each uint8 (n, 3, size, size), mapped from a file
    made on first use.

    It appears in data_dir when it is complete. Its name holds a hash of the names, sizes and times
    of the images: a folder that has changed is decoded anew, and its former file removed. Raises
    one UserError for all images that cannot be read, and keeps the others for the time when these
    are taken out.
    """
    names = [name for group in groups for name in group]
    stamps = [(name, (stat := os.stat(root / name)).st_size, stat.st_mtime_ns) for name in names]
    # Two folders may have one name.
    start = f"{root.resolve().name}-{text_hash(root.resolve()) % 10**6}-{size}-"
    path, good, problems = data_dir / f"{start}{text_hash(repr(stamps)) % 10**12}.uint8", [], []
    if not path.exists():
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            with (
                tempfile.TemporaryDirectory(dir=data_dir) as folder,
                ThreadPoolExecutor(os.cpu_count()) as pool,
            ):
                with open(Path(folder, "images"), "wb") as file:
                    for i in range(0, len(names), 256):  # or they would pile up behind a slow one
                        some = names[i : i + 256]
                        futures = [pool.submit(decode_image, root / name, size) for name in some]
                        for stamp, future in zip(stamps[i:], futures, strict=False):
                            try:
                                file.write(future.result())
                                good.append(stamp)
                            except UserError as error:
                                problems.append(str(error))
                        done = f"{i + len(futures)} of {len(names)} images"
                        print(f"\rdecoding {root}: {done}", end="", flush=True)
                print()
                path = Path(folder, "images").replace(
                    data_dir / f"{start}{text_hash(repr(good)) % 10**12}.uint8"
                )
            for former in data_dir.iterdir():
                if former.name.startswith(start) and former != path:
                    former.unlink()
        except OSError as error:
            raise UserError(
                f"--data-dir {data_dir}: cannot be written ({error.strerror})"
            ) from None
    refuse(sorted(problems))
    images = torch.from_file(str(path), False, len(names) * size * size * 3, dtype=torch.uint8)
    images = images.view(-1, size, size, 3).permute(0, 3, 1, 2)
    return images.split([len(group) for group in groups])


def decode_image(file, size):
    """The largest square in the middle, at size x size, as uint8 (size, size, 3). What is
    transparent lies on white; 16 bits, and floats in [0, 1], are scaled to 8 bits. Raises UserError
    naming a bad file."""
    try:
        with Image.open(file) as image:
            image.draft("RGB", (2 * size, 2 * size))  # a JPEG need not be decoded any larger
            image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # which convert("RGB") would cut off at 255
            x = np.asarray(image) / (1 if image.mode == "F" else 65535)
            low = x.min()
            high = x.max()
            if not (low >= 0 and 1 / 16 <= high <= 1):  # 12 bits in 16 would be all but black
                raise ValueError(f"its values run from {low:.3g} to {high:.3g}, where white is 1")
            image = Image.fromarray((255 * x).round().astype(np.uint8))
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
        return np.asarray(image)
    except Exception as error:  # decoders fail in many ways
        raise UserError(f"{file}: not a readable image ({error})") from None


# --- Shapes: small images drawn by code ---
# A silhouette is a function of points x, y, with y upwards, that is true inside; it fits the unit
# disc. None equals itself after a turn by 90 or 180 degrees, mirrored or not, so that rotation can
# be told from one image.


def bar(x, y, half_width, low, high):
    return (x.abs() < half_width) & (low < y) & (y < high)


def disc(x, y, radius, cx=0.0, cy=0.0):
    return (x - cx) ** 2 + (y - cy) ** 2 < radius**2


def peak(x, y, half_width, low, high):
    return (y > low) & (x.abs() < half_width * (high - y) / (high - low))


def star(x, y):
    angle = (torch.atan2(x, y) + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5
    angle = angle.abs()  # from the nearest of five tips
    r, notch = torch.hypot(x, y), (0.45 * math.cos(math.pi / 5), 0.45 * math.sin(math.pi / 5))
    # On the inner side of the line from tip to notch.
    return (notch[0] - 1) * r * angle.sin() > notch[1] * (r * angle.cos() - 1)


SHAPES = {
    "arrow": lambda x, y: peak(x, y, 0.75, 0.1, 1) | bar(x, y, 0.25, -0.95, 0.15),
    "bowl": lambda x, y: (disc(x, y, 0.9, 0, 0.35) & (y < 0.35)) | bar(x, y, 0.4, -0.75, -0.4),
    "cross": lambda x, y: bar(x, y, 0.19, -0.98, 0.98) | bar(x, y, 0.75, 0.2, 0.58),
    "drop": lambda x, y: disc(x, y, 0.6, 0, -0.35) | peak(x, y, 0.54, -0.08, 1),
    "heart": lambda x, y: (
        ((1.42 * x) ** 2 + (1.32 * y + 0.1) ** 2 - 1) ** 3 < (1.42 * x) ** 2 * (1.32 * y + 0.1) ** 3
    ),
    "house": lambda x, y: (
        peak(x, y, 0.9, 0.05, 0.95) | (bar(x, y, 0.6, -0.78, 0.1) & ~bar(x, y, 0.17, -0.8, -0.2))
    ),
    "moon": lambda x, y: disc(x, y, 0.95) & ~disc(x, y, 0.78, 0.46, 0.19),
    "mushroom": lambda x, y: (disc(x, y, 0.95) & (y > 0)) | bar(x, y, 0.27, -0.9, 0.05),
    "star": star,
    "triangle": lambda x, y: peak(x, y, 0.8, -0.59, 1),
}
COLORS = {
    "red": (214, 48, 49), "orange": (240, 140, 40), "yellow": (246, 214, 72),
    "green": (46, 150, 80), "blue": (52, 110, 214), "purple": (136, 70, 184),
    "pink": (244, 150, 186), "brown": (122, 78, 46),
    "white": (242, 242, 238), "black": (36, 36, 42),
}  # fmt: skip
SIZES = ("small", "medium-sized", "large")
BRIEF = ("a {shape}", "there is a {shape}", "a {color} {shape}", "the {shape} is {color}")
FULL = (
    "a {size} {color} {shape} on a {one} and {two} background",
    "a {color} {shape}, {size}, in front of {one} and {two}",
    "there is a {size} {shape} in {color} and behind it {one} turns into {two}",
    "on {one} and {two} stands a {size} {color} {shape}",
    "the {shape} is {color} and {size}, the background {one} and {two}",
)


def shapes_dataset():
    """Ten kinds of things, 32 x 32, with captions: 4,096 training and 2,000 test images, always the
    same ones."""
    generator, splits, captions, colors = torch.Generator().manual_seed(0), [], [], []
    for count in (4096, 2000):
        scenes = sample_shapes(count, generator)
        splits += [draw_shapes(scenes, generator), scenes["label"]]
        captions.append(describe_shapes(scenes, generator))
        colors.append(scenes["color"])
    return Dataset(*splits, list(SHAPES), *captions, train_colors=colors[0], test_colors=colors[1])


def sample_shapes(count, generator):
    """What `count` images show: balanced labels, and nuisances that are drawn without looking at
    them."""
    label = torch.arange(count)[torch.randperm(count, generator=generator)] % len(SHAPES)
    half_width = uniform(0.60, 0.85, (count,), generator)  # of the frame's
    color = torch.randint(len(COLORS), (count,), generator=generator)

    # The background runs from one color to another. The foreground is apart from every mixture of
    # the two: its distance from the straight line between them, in RGB, is more than 0.35.
    palette = torch.tensor(list(COLORS.values())) / 255  # (K, 3)
    line = palette[None] - palette[:, None]  # (K, K, 3), from the first color to the second
    offset = palette[:, None, None] - palette[None, :, None]  # (K, K, 1, 3), to the foreground
    mixture = (offset * line).sum(3) / line.square().sum(2).clamp(min=1e-9)
    nearest = mixture.clamp(0, 1)  # (K, K, K)
    distance = (offset - nearest[..., None] * line).norm(dim=3)
    apart = (distance > 0.35) & ~torch.eye(len(COLORS), dtype=torch.bool)
    pair = torch.multinomial(apart.flatten(1)[color].float(), 1, generator=generator)[:, 0]
    return {
        "label": label,  # (N,)
        "half_width": half_width,
        "center": uniform(-1, 1, (count, 2), generator) * (1 - half_width)[:, None],  # (N, 2)
        "tilt": uniform(-0.25, 0.25, (count,), generator),  # radians, counter-clockwise
        "color": color,
        "background": torch.stack([pair // len(COLORS), pair % len(COLORS)], dim=1),  # (N, 2)
        "direction": uniform(0, 2 * math.pi, (count,), generator),  # of the gradient
    }


def draw_shapes(scenes, generator, size=32, supersampling=3):
    """Scenes of sample_shapes -> uint8 (N, 3, size, size); the generator draws the noise of the
    pixels."""
    fine = size * supersampling
    axis = (torch.arange(fine) + 0.5) / fine * 2 - 1  # -1 to 1
    y, x = -axis[:, None], axis[None]  # y upwards
    cover = torch.empty(len(scenes["label"]), size, size)
    for label, inside in enumerate(SHAPES.values()):
        of = scenes["label"] == label
        s, tilt, center = scenes["half_width"][of], scenes["tilt"][of], scenes["center"][of]
        dx, dy = x - center[:, 0, None, None], y - center[:, 1, None, None]  # (n, fine, fine)
        cos, sin = (tilt.cos() / s)[:, None, None], (tilt.sin() / s)[:, None, None]
        covered = inside(cos * dx + sin * dy, cos * dy - sin * dx).float()
        cover[of] = F.avg_pool2d(covered, supersampling)

    cos, sin = scenes["direction"].cos()[:, None, None], scenes["direction"].sin()[:, None, None]
    y = F.avg_pool1d(y.T, supersampling).T  # pixels, (size, 1)
    x = F.avg_pool1d(x, supersampling)  # (1, size)
    place = 0.5 + (cos * x + sin * y) / 2**1.5  # (N, size, size), 0 to 1
    colors = torch.stack([scenes["color"], *scenes["background"].unbind(1)])  # (3, N)
    palette = torch.tensor(list(COLORS.values())) / 255
    thing, one, two = palette[colors][..., None, None]  # (N, 3, 1, 1) each
    images = torch.lerp(torch.lerp(one, two, place[:, None]), thing, cover[:, None])
    images += 0.02 * torch.randn(images.shape, generator=generator)
    return (255 * images).round().clamp(0, 255).byte().contiguous(memory_format=torch.channels_last)


def describe_shapes(scenes, generator):
    """Scenes of sample_shapes -> five captions each, as people write them: what it is, its color,
    and one with all."""
    shapes, colors, captions = list(SHAPES), list(COLORS), []
    size = ((scenes["half_width"] - 0.60) / 0.25 * 3).long().clamp(max=2)
    sentence = torch.randint(len(FULL), size.shape, generator=generator)
    rows = zip(
        sentence,
        size,
        scenes["color"],
        scenes["label"],
        *scenes["background"].unbind(1),
        strict=True,
    )
    for w, s, c, k, a, b in rows:
        words = {
            "size": SIZES[s],
            "color": colors[c],
            "shape": shapes[k],
            "one": colors[a],
            "two": colors[b],
        }
        texts = (text.format(**words) for text in (*BRIEF, FULL[w]))
        captions.append([re.sub(r"\ba(?= [aeiou])", "an", text) for text in texts])
    return captions


# --- Augmentations: float images (N, C, H, W) in [0, 1] ---
# An operator takes a parameter per image and equals torchvision's functional one; `random_...`
# draws the parameters as torchvision's transform does. Nothing here waits for the device.


def uniform(low, high, shape, generator):
    """Uniform numbers in [low, high), on the generator's device."""
    return low + (high - low) * torch.rand(shape, generator=generator, device=generator.device)


def separable(images, rows, columns):
    """rows (N, H', H) and columns (N, W', W) applied to images (N, C, H, W) -> (N, C, H', W')."""
    N, C, H, W = images.shape
    with torch.autocast(images.device.type, enabled=False):  # bfloat16 would not be exact
        x = images.transpose(1, 2).reshape(N, H * C, W) @ columns.mT  # (N, H C, W')
        x = rows @ x.view(N, H, -1)  # (N, H', C W')
    return x.unflatten(2, (C, -1)).transpose(1, 2)  # (N, C, H', W')


def resize_weights(start, length, size_in, size_out):
    """Matrices (N, size_out, size_in) that cut pixels [start, start + length) (N,) out of a line
    and resize them. A row is a triangle around the center of its output pixel, as wide as that
    pixel where the line shrinks (antialiasing) and as an input pixel where it grows (bilinear). A
    negative length runs back from start: a mirror."""
    start, length = start[:, None, None], length[:, None, None]
    scale = length / size_out
    center = torch.arange(size_out, device=start.device) + 0.5
    center = center[:, None] * scale  # (N, size_out, 1), from start
    pixel = torch.arange(size_in, device=start.device) + 0.5 - start  # (N, 1, size_in), from start
    weights = (1 - (pixel - center).abs() / scale.abs().clamp(min=1)).clamp(min=0)
    in_crop = (pixel - length / 2).abs() < length.abs() / 2
    weights = weights * in_crop
    return weights / weights.sum(2, keepdim=True)


def resized_crop(images, boxes, size, flip):
    """Crops, resizes and mirrors -> (N, C, size, size), equal to torchvision's resized_crop with
    antialias=True, then horizontal_flip. boxes (N, 4): top, left, height and width in whole pixels;
    flip (N,): booleans."""
    top, left, height, width = boxes.unbind(1)
    left, width = torch.where(flip, left + width, left), torch.where(flip, -width, width)
    rows = resize_weights(top, height, images.shape[2], size)
    return separable(images, rows, resize_weights(left, width, images.shape[3], size))


def random_boxes(count, H, W, scale, ratio, generator):
    """Boxes (count, 4) as in Inception: a fraction of the area from `scale`, an aspect log-uniform
    in `ratio`. Of ten tries the first that fits an H x W image counts; without one it is the whole
    image, as torchvision's RandomResizedCrop has it for square images."""
    area = H * W * uniform(*scale, (count, 10), generator)
    limits = math.log(ratio[0]), math.log(ratio[1])
    aspect = uniform(*limits, (count, 10), generator).exp()  # width over height
    height, width = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()  # (count, 10)
    fits = (height > 0) & (height <= H) & (width > 0) & (width <= W)
    first, any_fits = fits.int().argmax(1, keepdim=True), fits.any(1)
    height = torch.where(any_fits, height.gather(1, first)[:, 0], H)
    width = torch.where(any_fits, width.gather(1, first)[:, 0], W)
    top = (uniform(0, 1, (count,), generator) * (H - height + 1)).floor()
    left = (uniform(0, 1, (count,), generator) * (W - width + 1)).floor()
    return torch.stack([top, left, height, width], dim=1)


def random_resized_crop(images, size, generator, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5):
    """A random box of each image at (size, size), mirrored with probability `flip`: (N, C, size,
    size)."""
    N, _, H, W = images.shape
    boxes = random_boxes(N, H, W, scale, ratio, generator)
    return resized_crop(images, boxes, size, uniform(0, 1, (N,), generator) < flip)


def random_crop(images, padding, generator, flip=0.5):
    """Shifts each square image by up to `padding` pixels, zeros moving in, and mirrors it with
    probability `flip`."""
    N, _, S, W = images.shape
    if S != W:
        raise ValueError(f"images of {S} x {W} are not square")
    corners = uniform(0, 2 * padding + 1, (N, 2), generator).floor()  # top and left
    boxes = torch.cat([corners, torch.full_like(corners, S)], dim=1)
    flipped = uniform(0, 1, (N,), generator) < flip
    return resized_crop(F.pad(images, [padding] * 4), boxes, S, flipped)


def blur_weights(sigma, size, radius):
    """Matrices (N, size, size) that blur a line by a Gaussian of sigma (N,) pixels, mirrored beyond
    its ends."""
    pixel = torch.arange(size, device=sigma.device)
    i, j, sigma = pixel[:, None], pixel, sigma[:, None, None]

    def gaussian(distance):
        return torch.exp(-0.5 * (distance / sigma) ** 2) * (distance.abs() <= radius)

    mirrored = gaussian(i + j) * (j > 0) + gaussian(2 * (size - 1) - i - j) * (j < size - 1)
    weights = gaussian(i - j) + mirrored
    return weights / weights.sum(2, keepdim=True)


def gaussian_blur(images, sigma, kernel_size):
    """Blurs by sigma (N,) pixels, cut to an odd kernel_size; equal to torchvision's
    gaussian_blur."""
    H, W = images.shape[2:]
    radius = kernel_size // 2
    return separable(images, blur_weights(sigma, H, radius), blur_weights(sigma, W, radius))


def random_gaussian_blur(images, generator, sigma=(0.1, 2.0), p=0.5):
    """With probability p; the kernel is a tenth of the image's side, at least 3 (SimCLR, appendix
    A)."""
    N, _, H, _ = images.shape
    strength = uniform(*sigma, (N,), generator)
    chosen = uniform(0, 1, (N,), generator) < p
    strength = torch.where(chosen, strength, 1e-3)  # a thousandth of a pixel: the image itself
    return gaussian_blur(images, strength, max(3, H // 20 * 2 + 1))


def luma(images):
    """(N, 3, H, W) -> (N, 1, H, W): brightness as the eye weighs it (ITU-R 601)."""
    r, g, b = images.split(1, dim=1)
    return 0.2989 * r + 0.587 * g + 0.114 * b


def random_grayscale(images, generator, p=0.2):
    """Takes the color from an image with probability p; equal to torchvision's rgb_to_grayscale."""
    chosen = uniform(0, 1, (len(images), 1, 1, 1), generator) < p
    return torch.where(chosen, luma(images), images)


def random_solarize(images, generator, threshold=0.5, p=0.2):
    """Inverts values from `threshold` on with probability p for each image; equal to torchvision's
    solarize."""
    chosen = uniform(0, 1, (len(images), 1, 1, 1), generator) < p
    return torch.where(chosen & (images >= threshold), 1 - images, images)


def adjust_hue(images, shift):
    """Turns hues by shift (N,), in whole circles from -0.5 to 0.5; HSV's value and saturation stay.
    On HSV's circle red lies at 0, green at 1/3 and blue at 2/3. A channel is full within 1/6 of its
    own hue, falls over the next 1/6 and is empty beyond. Distance from red is therefore 1 - r + g +
    b in sixths, of channels stretched to [0, 1], and g - b tells the side. In place where it can
    be: memory is what this costs."""
    r, g, b = images.split(1, dim=1)
    high, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    chroma = high - low
    hue = (g + b).sub_(r).sub_(low)
    hue = hue.div_((6 * chroma).clamp_(min=1e-9)).add_(1 / 6)  # gray has any hue
    hue = hue.copysign_(g - b).add_(shift[:, None, None, None])  # (N, 1, H, W)
    full = torch.arange(3, device=images.device).view(3, 1, 1) / 3
    distance = hue - full  # (N, 3, H, W), of r, g and b
    distance = distance.sub_(distance.round()).abs_().clamp_(1 / 6, 1 / 3)
    return torch.addcmul(high + chroma, chroma, distance, value=-6)


def color_jitter(images, factors, order):
    """Brightness, contrast, saturation and hue, in an order of its own for each image, as
    ColorJitter's.

    factors (N, 4): three factors around 1, and the shift of the hue around 0. order (N, 4): in each
    row a permutation of 0 brightness, 1 contrast, 2 saturation, 3 hue. The first three mix a color
    c with black, the mean gray of the image, or its own gray: M c + b, cut to [0, 1]. All images
    walk through three such steps before the hue is turned and three after it; with factor 1 those
    that are on the other side of an image's own turn leave it as it is. So the hue, which costs
    most, is turned once.
    """
    place = torch.arange(4, device=images.device)
    turn = (order == 3).int().argmax(1, keepdim=True)  # (N, 1)
    active = torch.cat([place[:3] < turn, place[1:] > turn], dim=1)  # (N, 6)
    which = torch.cat([order[:, :3], order[:, 1:]], dim=1)
    factor = torch.where(active, factors.gather(1, which), 1.0)[..., None, None]  # (N, 6, 1, 1)
    which, eye = which[..., None, None], torch.eye(3, device=images.device)
    gray = (1 - factor) * luma(eye[..., None, None]).flatten()  # (N, 6, 1, 3)
    of_image = gray * (which == 1)  # (N, 6, 1, 3)
    of_pixel = factor * eye + gray * (which == 2)  # (N, 6, 3, 3)

    x = images.flatten(2)  # (N, 3, H W)
    for step in range(6):
        if step == 3:
            x = adjust_hue(x.view(images.shape), factors[:, 3]).flatten(2)
        with torch.autocast(images.device.type, enabled=False):  # as in separable
            b = of_image[:, step] @ x.mean(2, keepdim=True)  # (N, 1, 1)
            x = torch.baddbmm(b, of_pixel[:, step], x).clamp_(0, 1)
    return x.view(images.shape)


def random_color_jitter(images, generator, brightness, contrast, saturation, hue, p=0.8):
    """ColorJitter(brightness, contrast, saturation, hue) with probability p for each image."""
    N = len(images)
    chosen = uniform(0, 1, (N,), generator) < p
    ranges = [
        (max(0, 1 - spread), 1 + spread, 1.0) for spread in (brightness, contrast, saturation)
    ]
    ranges.append((-hue, hue, 0.0))  # low, high and what changes nothing
    factors = [
        torch.where(chosen, uniform(low, high, (N,), generator), same) for low, high, same in ranges
    ]
    order = uniform(0, 1, (N, 4), generator).argsort(1)
    return color_jitter(images, torch.stack(factors, dim=1), order)


MEAN = (0.485, 0.456, 0.406)  # of ImageNet, as torchvision's weights expect
STD = (0.229, 0.224, 0.225)


def normalize(images):
    """(N, 3, H, W) in [0, 1] -> mean 0 and standard deviation 1 of each channel over ImageNet, in
    channels_last layout, which convolutions prefer; not on mps, where some torch versions get batch
    norm in that layout wrong."""
    channels = zip(images.unbind(1), MEAN, STD, strict=True)
    x = torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)
    return x if x.device.type == "mps" else x.contiguous(memory_format=torch.channels_last)


@contextlib.contextmanager
def compile_operators(wanted):
    """Within it the operators that work on whole images are compiled, if wanted: a few kernels in
    place of dozens."""
    plain = resized_crop, gaussian_blur, color_jitter
    globals().update({operator.__name__: torch.compile(operator) for operator in plain if wanted})
    try:
        yield
    finally:
        globals().update({operator.__name__: operator for operator in plain})
