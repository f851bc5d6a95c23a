"""Datasets and batched augmentations for the scripts beside this file, and nothing else.

Images lie as one uint8 tensor on the training device; augmentations work there on whole batches of
float images in [0, 1], with one parameter per image, drawn from an explicit torch.Generator.
"""

import contextlib
import csv
import dataclasses
import difflib
import hashlib
import io
import json
import math
import os
import re
import stat
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
    """An input that the user can mend: the message names it and says what is wrong."""


@dataclasses.dataclass
class Dataset:
    """Images, uint8 (N, 3, S, S) in channels_last order; labels, int64; names of the classes; and
    captions, a list for each image.

    train_labels may be fewer than train_images, and then belong to the first of them (STL-10).
    Without classes train_labels is empty, and test_labels are row numbers. shapes also has the
    color of each object, an index into COLORS. files: of a folder, the names of the training, test
    and validation images. note: how the files were understood.
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
    files: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    note: str = ""

    def to(self, device):
        """The same data on the device. Images that would fill more than half of its free memory
        stay in main memory, from which `batches` copies them."""
        free = math.inf
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
        elif device.type == "mps":
            free = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        tensors = {name: x for name, x in vars(self).items() if torch.is_tensor(x)}
        if sum(x.nbytes for x in tensors.values()) > free / 2:
            tensors = {name: x for name, x in tensors.items() if not name.endswith("images")}
        moved = {name: x.to(device) for name, x in tensors.items()}
        return dataclasses.replace(self, **moved)

    def examples(self, count=10, classes=10):
        """Row numbers of `count` test images for a figure: of the first classes as many each, give
        or take one, repeated where there are too few; without classes, the first images."""
        labels = self.test_labels
        if not self.classes:
            return torch.arange(min(count, len(self.test_images)))
        of_class = [(labels == label).nonzero()[:, 0] for label in labels.unique()[:classes]]
        shares = [len(share) for share in torch.arange(count).tensor_split(len(of_class))]
        parts = [rows.repeat(n)[:n] for rows, n in zip(of_class, shares, strict=True)]
        return torch.cat(parts)

    def about(self):
        """What a run keeps of its data: the side of the images, and the names of the classes and of
        the files."""
        S = self.train_images.shape[3]
        return {"image_size": S, "classes": self.classes, "files": self.files}

    def held_out_labels(self):
        """Row numbers of a tenth of the labelled training images, always the same ones, on which
        recipes are compared, and those of the others."""
        labels = self.train_labels
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        return order.to(labels.device).tensor_split([max(1, len(labels) // 10)])


def epoch_order(count, batch_size, seed, epoch, rank=0, world=1):
    """Shuffled row numbers of the images that one of `world` processes sees in an epoch, with an
    incomplete last batch left out; and a seed for the views of this process. Both depend on nothing
    else, so a resumed run repeats them."""
    seed = seed * 100_000 + epoch
    used = count // batch_size * batch_size
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:used]
    return order[rank::world], seed + 50_000 * (rank + 1)


def batches(images, order, size, device):
    """Rows `order` (n,) of images (M, 3, S, S), whole batches of them: yields (size, 3, S, S) on
    the device. Images in main memory are gathered here, and copied from pinned pages, which a GPU
    reads while it computes."""
    used = len(order) // size * size
    for index in order[:used].to(images.device).split(size):
        batch = images[index]
        if images.device != device and device.type == "cuda":
            batch = batch.pin_memory()
        yield batch.to(device, non_blocking=True)


def fingerprint(data):
    """Shape of the training images, sum of some 64 of them, and a number that depends on their
    labels, the class names and the captions: other data than a run began with has another
    fingerprint."""
    images = data.train_images
    some = images[:: len(images) // 64 + 1]
    words = [data.train_labels.tolist(), data.classes, data.train_captions, data.val_captions]
    return [*images.shape, int(some.sum()), text_hash(json.dumps(words)) % 10**12]


def labelled_rows(labels, amount, seed):
    """Row numbers of a class-balanced part of labels (L,), in random order, both drawn with seed.
    amount is a fraction of each class, but at least one image, if it is a float or a text such as
    "0.1", and a number of images per class if it is an int or a text such as "10". So 1.0 is all
    labels, and 1 is one per class. Raises UserError for anything else, or if a class has fewer."""
    try:
        number = int(amount) if str(amount).isdecimal() else float(amount)
    except ValueError:
        number = 0
    if not number > 0 or (number > 1 and number % 1):
        raise UserError(
            f"labels {amount}: must be a fraction up to 1.0, or a whole number of labels per class"
        )
    if len(labels) == 0:
        raise UserError(f"labels {amount}: the dataset has no labels")
    counts = labels.bincount()
    fewest = int(counts[counts > 0].min())
    if number > max(1, fewest):
        raise UserError(f"labels {number:g}: the smallest class has only {fewest} training images")
    if isinstance(number, float) and number <= 1:
        wanted = (counts * number).round().clamp(min=1).int()
    else:
        wanted = torch.full_like(counts, round(number))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order.to(labels.device)
    by_class = labels[order].argsort(stable=True).split(counts.tolist())  # places in the order
    parts = [places[:n] for places, n in zip(by_class, wanted.tolist(), strict=True)]
    return order[torch.cat(parts).sort().values]


# === Datasets in files ============================================================================
DATASETS = ("shapes", "cifar10", "cifar100", "stl10")


def load_dataset(name, data_dir="data", image_size=96):
    """One of DATASETS, or a path: of an .npz file, or of a folder of images -> Dataset. torchvision
    downloads CIFAR and STL-10 once; they are kept as <data_dir>/<name>.npz, which is all that later
    calls read. Images of a folder become image_size pixels square, larger ones in an .npz file
    shrink to that. Prints what was found. Raises UserError, in one line, for a dataset that is
    unknown, unreachable, broken or too small."""
    if name == "shapes":
        return shapes_dataset()
    try:
        path = find_dataset(name, data_dir)
        if path.suffix.lower() == ".npz":
            data = npz_dataset(path, image_size)
        else:
            data = folder_dataset(path, Path(data_dir), image_size)
    except OSError as error:  # such as a folder that may not be read
        raise UserError(f"{error.filename or name}: {error.strerror or error}") from None
    counts = f"{len(data.train_images)} training, {len(data.test_images)} test images"
    if min(len(data.train_images), len(data.test_images)) == 0:
        raise UserError(f"{name}: too few images: {counts}")
    print(f"{name}: {counts}, {data.note}", flush=True)
    return data


def find_dataset(name, data_dir):
    """The file or folder of a dataset; what torchvision knows is downloaded if it is not there."""
    if name in DATASETS:
        path = Path(data_dir, f"{name}.npz")
        if not path.exists():
            download(name, path)
        return path
    path = Path(name)
    if not name or not path.exists():
        raise UserError(unknown_dataset(name))
    if path.suffix.lower() != ".npz" and not path.is_dir():
        raise UserError(f"{name}: is neither an .npz file nor a folder of images")
    return path


def unknown_dataset(name):
    """What is wrong with a name that is neither a dataset nor a path, and what may be meant."""
    path = Path(name)
    names = f"{', '.join(DATASETS[:-1])} or {DATASETS[-1]}"
    if not name:
        return f"dataset '': must be {names}, or a path"
    there = os.listdir(path.parent) if path.parent.is_dir() else []
    near = [path.with_name(found) for found in difflib.get_close_matches(path.name, there, 1)]
    message = f"{name}: there is no such file or folder"
    if path.name == name and not path.suffix:
        near = difflib.get_close_matches(name.lower(), DATASETS, 1) or near
        message = f"dataset {name}: is not {names}, and there is no folder of that name"
    return f"{message}; did you mean {near[0]}?" if near else message


def download(name, path):
    """Fetches a dataset with torchvision and writes it to path, whole or not at all."""
    source = getattr(torchvision.datasets, name.upper())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            if name == "stl10":  # the 5,000 labelled training images come first
                train = source(folder, split="train+unlabeled", download=True)
                test = source(folder, split="test", download=True)
                arrays = {
                    "train_images": train.data.transpose(0, 2, 3, 1),
                    "train_labels": train.labels[train.labels >= 0],  # -1 is no label
                    "test_images": test.data.transpose(0, 2, 3, 1),
                    "test_labels": test.labels,
                }
            else:
                train = source(folder, train=True, download=True)
                test = source(folder, train=False, download=True)
                arrays = {
                    "train_images": train.data,
                    "train_labels": np.array(train.targets),
                    "test_images": test.data,
                    "test_labels": np.array(test.targets),
                }
            np.savez(Path(folder, path.name), **arrays, classes=np.array(train.classes))
            Path(folder, path.name).replace(path)
    except (OSError, RuntimeError) as error:  # no network, a broken archive, a read-only folder
        reason = f"{path} is not there and cannot be downloaded ({error})"
        raise UserError(f"dataset {name}: {reason}") from None


def npz_dataset(path, image_size):
    """{train,test}_images, uint8 (N, S, S), (N, S, S, 1) or (N, S, S, 3), and {train,test}_labels,
    integers (N,) or (N, 1), numbered anew unless they run from 0 to K - 1; maybe `classes`, their
    names. If there are fewer train_labels, the last train_images are unlabelled; if there are only
    train_images, there are no classes."""
    keys = ["train_images", "train_labels", "test_images", "test_labels"]
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {key: file[key] for key in keys if key in file}
            names = file["classes"].astype(str).ravel().tolist() if "classes" in file else []
            found = list(file)
    except Exception as error:  # NumPy, zipfile and zlib fail in many ways
        raise UserError(f"{path}: not a readable .npz file ({error})") from None

    only_images = list(arrays) == ["train_images"]
    for key in keys:
        if key not in arrays and not only_images:
            reason = f"has no array {key}; its arrays are {', '.join(found) or 'none'}"
            raise UserError(f"{path}: {reason}")
    left_out = [key for key in found if key not in (*keys, "classes")]
    remarks = [f"left out: {', '.join(left_out)}"] if left_out else []
    train_images = check_images(path, arrays, "train_images", image_size)
    if only_images:  # in random order, since that of an array may be by class
        order = torch.randperm(len(train_images), generator=torch.Generator().manual_seed(0))
        train, test = hold_out(train_images[order])
        nothing = torch.empty(0, dtype=torch.int64)
        note = "; ".join(["no classes", *remarks])
        return Dataset(train, nothing, test, torch.arange(len(test)), [], note=note)

    test_images = check_images(path, arrays, "test_images", image_size)
    if train_images.shape[1:] != test_images.shape[1:]:
        raise UserError(f"{path}: train_images and test_images differ in size")
    train_labels = check_labels(path, arrays, "train_labels", 1, len(train_images))
    test_labels = check_labels(path, arrays, "test_labels", len(test_images), len(test_images))
    unknown = sorted(set(test_labels.tolist()) - set(train_labels.tolist()))
    if unknown:
        raise UserError(f"{path}: test_labels has {unknown[0]}, which train_labels has not")
    numbers, labels = torch.cat([train_labels, test_labels]).unique(return_inverse=True)
    train_labels, test_labels = labels.tensor_split([len(train_labels)])
    classes = [names[n] if len(names) > numbers[-1] else str(n) for n in numbers.tolist()]
    if numbers[-1] >= len(classes):
        remarks.insert(0, f"labels {numbers[0]} to {numbers[-1]} numbered anew")
    note = "; ".join([list_classes(classes), *remarks])
    return Dataset(train_images, train_labels, test_images, test_labels, classes, note=note)


def check_images(path, arrays, key, image_size):
    """An array of an .npz file -> images, uint8 (N, 3, S, S), S at most image_size."""
    x = arrays[key]
    if x.ndim == 3:  # gray
        x = x[..., None]
    N, H, W, C = x.shape if x.ndim == 4 else (0, 0, 0, 0)
    if x.dtype != np.uint8 or N == 0 or H != W or C not in (1, 3):
        array = f"{key} is {arrays[key].dtype} {arrays[key].shape}"
        raise UserError(f"{path}: {array}, not uint8 (N, S, S) or (N, S, S, 3)")
    images = torch.from_numpy(x).permute(0, 3, 1, 2).expand(N, 3, H, W)
    images = images.contiguous(memory_format=torch.channels_last)
    if H > image_size:
        images = TF.resize(images, [image_size, image_size], antialias=True)
    return images


def check_labels(path, arrays, key, low, high):
    """An array of an .npz file -> labels, int64 (L,), from low to high of them."""
    x = arrays[key]
    L = len(x) if x.ndim else 0
    whole = x.dtype.kind in "iu" and x.shape in ((L,), (L, 1))
    if not whole or not low <= L <= high or x.astype(int).min() < 0:
        array = f"{key} is {x.dtype} {x.shape}"
        raise UserError(f"{path}: {array}, not {high} class numbers from 0 on")
    return torch.from_numpy(x.reshape(L).astype(int))


def hold_out(images):
    """Images without classes, in random order -> a training part, and a tenth of them, at most
    1,000, as test images."""
    held = min(math.ceil(len(images) / 10), 1000)
    return images[:-held], images[-held:]


def list_classes(classes):
    """How many classes there are, and the names of the first."""
    names = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
    return f"{len(classes)} classes ({names})"


# === Folders of images ============================================================================
# The folders train, test and val of a dataset, in any capitals, may also be called train_set,
# train2017, trainA, seg_train, training or validation; train_station is none of them.
SPLIT = re.compile(
    r"(?:\w+[_-])?(train|test|val)(?:ing|id|idation)?(?:[_-]?(?:set|images|\d+|[ab]))?"
)


def split_of(folder):
    """train, test or val, if the name of the folder is one of theirs, else None."""
    found = SPLIT.fullmatch(folder.lower())
    return found[1] if found else None


def folder_dataset(root, data_dir, image_size):
    """A folder with a table of captions, or with classes, as find_classes reads them, and with test
    images of theirs, or else split by split_by_hash; or with images without classes, of which those
    in test/ or val/, or else a tenth, are test images."""
    for name in ("captions.csv", "captions.txt"):
        if (root / name).exists():
            return captioned_dataset(root / name, data_dir, image_size)
    names, left_out = list_images(root)
    parts = find_classes(names)
    train = parts["train"]
    classes = sorted(set(train.values()), key=os.fsencode)
    remarks = []
    if "" in classes or len(classes) == 1:  # nothing to tell apart
        classes = []
        test = parts["test"] or parts["val"]
        if not test:
            train, test = hold_out(sorted(train, key=text_hash))
    else:
        test = find_test_images(root, parts)
        if not test:
            remarks.append("split 80 : 20 by a hash of the names")
            train, test = split_by_hash(train)
    left_out["images elsewhere"] = len(names) - len(train) - len(test)
    images, seen = decode(root, [list(train), list(test)], data_dir, image_size)
    train_labels = torch.empty(0, dtype=torch.int64)
    test_labels = torch.arange(len(test))
    if classes:
        number = {label: k for k, label in enumerate(classes)}
        train_labels = torch.tensor([number[label] for label in train.values()])
        test_labels = torch.tensor([number[label] for label in test.values()])
    classes = [os.fsencode(name).decode(errors="replace") for name in classes]  # can be printed
    found = list_classes(classes) if classes else "no classes"
    files = {"train": list(train), "test": list(test)}
    note = "; ".join([found, *remarks, *describe_left_out(left_out), *seen])
    return Dataset(images[0], train_labels, images[1], test_labels, classes, files=files, note=note)


def split_by_hash(images):
    """{name: class} -> training and test images, about 80 : 20. Which are which depends only on the
    names, so further images move none; a class with too few has training images only."""
    drawn = {name for name in images if text_hash(name) % 5 == 0}
    learned = {label for name, label in images.items() if name not in drawn}
    test = {name: label for name, label in images.items() if name in drawn and label in learned}
    train = {name: label for name, label in images.items() if name not in test}
    return train, test


def find_classes(names):
    """Image files, relative to their folder -> {"train": {name: class}, "test": ..., "val": ...},
    class "" for images in no folder of their own.

    The class of train/<class>/... is the first folder. Not counted are folders that hold
    everything, such as archive/train, and those that repeat a split, such as seg_train/seg_train.
    If other folders lie beside train, but neither test nor val, it is a class like them, and all
    images are in "train".
    """
    folders = {name: name.split(os.sep)[:-1] for name in names}
    around = len(os.path.commonprefix(list(folders.values())))  # of lists, too, the common start
    below = {name: path[around:] for name, path in folders.items()}
    firsts = {split_of(path[0]) for path in below.values() if path}
    if firsts != {"train"} and not ("train" in firsts and firsts & {"test", "val"}):
        labels = {name: path[0] if path else "" for name, path in below.items()}
        return {"train": labels, "test": {}, "val": {}}
    parts = {}
    for split in ("train", "test", "val"):
        inside = {n: path[1:] for n, path in below.items() if path and split_of(path[0]) == split}
        start = os.path.commonprefix(list(inside.values()))
        depth = 0
        while depth < len(start) and split_of(start[depth]) == split:
            depth += 1
        parts[split] = {n: path[depth] if path[depth:] else "" for n, path in inside.items()}
    return parts


def find_test_images(root, parts):
    """test/ or else val/ -> {name: class}; none if their images lie in no class of train/, and so
    have no labels. Raises UserError if only some do."""
    classes = set(parts["train"].values())
    for split in ("test", "val"):
        found = set(parts[split].values())
        unknown = found - classes
        if unknown and found & classes:
            where = min(unknown) or "no folder"
            raise UserError(f"{root}: test images lie in {where}, which is no class of train/")
        if found and not unknown:
            return parts[split]
    return {}


def list_images(root):
    """The same as walk_images. Raises UserError if there are none."""
    names, left_out = walk_images(root)
    if not names:
        raise UserError(f"{root}: there are no images in it, such as .jpg or .png files")
    return names, left_out


def walk_images(root):
    """The image files below root, sorted and relative to it, and a count of the files left out, by
    suffix. Hidden ones and those in the folder of a run do not count at all. Links are followed, to
    each folder once. Raises UserError for what may not be read."""
    names = []
    left_out = Counter()
    seen = set()

    def stop(error):  # os.walk would go on
        raise error

    try:
        for place, folders, files in os.walk(root, onerror=stop, followlinks=True):
            real = os.path.realpath(place)
            if real in seen or "args.json" in files:
                folders.clear()  # os.walk then goes no deeper
                continue
            seen.add(real)
            folders[:] = [name for name in folders if name[0] != "."]
            visible = [name for name in files if name[0] != "."]
            for path in [os.path.join(place, name) for name in visible]:
                kind = kind_of(path)
                if kind in torchvision.datasets.folder.IMG_EXTENSIONS:
                    names.append(os.path.relpath(path, root))
                else:
                    left_out[kind] += 1
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None
    return sorted(names, key=os.fsencode), left_out


def kind_of(path):
    """The suffix of a file, or why it has none."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "broken links"
    if not stat.S_ISREG(mode):
        return "special files"
    return os.path.splitext(path)[1].lower() or "without suffix"


def describe_left_out(left_out):
    """{kind: count} -> no or one text."""
    counts = ", ".join(f"{count} {kind}" for kind, count in left_out.items() if count)
    return [f"left out: {counts}"] if counts else []


def load_images(root, run):
    """The image files of a folder and of those below it, for the encoder in the folder of a run ->
    their names, relative to root, and images, uint8 (M, 3, S, S), S as in the run. Prints what was
    found. Raises one UserError for all images that cannot be read."""
    try:
        size = json.loads(Path(run, "data.json").read_text())["image_size"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{run}: is not the folder of a run, which has a data.json") from None
    names, left_out = list_images(root)
    buffer = io.BytesIO()
    _, problems = write_images(Path(root), names, size, buffer)
    refuse(sorted(problems))
    content = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
    images, seen = unpack_images(content, len(names), size)
    note = "; ".join([f"{size} x {size}", *describe_left_out(left_out), *seen])
    print(f"{root}: {len(names)} images, {note}", flush=True)
    return names, images


def captioned_dataset(file, data_dir, image_size):
    """Rows image,caption or image,caption,split below such a header; images beside the file or in
    images/ there. Splits are train, val and test. Without that column a hash of its name puts an
    image into one of them, 8 in 10 into train, so that neither the order of the rows nor further
    rows move it."""
    root = file.parent
    rows, unused = read_captions(file)
    paths = {}  # by the name in a row
    splits = {}
    captions = {}
    problems = []
    for where, row in rows:
        name = os.fsdecode(row["image"].strip().encode())  # file names are bytes, here of UTF-8
        caption = row["caption"].strip()
        if name not in paths:
            paths[name] = find_image(root, name)
        path = paths[name]
        split = row["split"].strip().lower() if "split" in row else draw_split(path or name)
        if None in row:
            problem = "has more fields than the header; a caption with commas needs quotes"
        elif not name or not caption:
            problem = f"the {'caption' if name else 'image'} is empty"
        elif not any(character.isalnum() for character in caption):
            problem = f"the caption {caption!r} has no word"
        elif not path:
            problem = f"there is no image {name} in {root} or in images/ there"
        elif split not in ("train", "val", "test"):
            problem = f"split {split!r} is not train, val or test"
        elif splits.get(path, split) != split:
            problem = f"{name} is in {split} here, but in {splits[path]} above"
        else:
            splits[path] = split
            captions.setdefault(path, []).append(caption)
            continue
        problems.append(f"{where}: {problem}")
    refuse(problems)

    parts = {"train": [], "test": [], "val": []}
    for path in sorted(splits, key=os.fsencode):
        parts[splits[path]].append(path)
    train, test, val = parts.values()
    if not train or not test:
        reason = f"none of {len(splits)} images is in train, or none in test"
        raise UserError(f"{file}: {reason}; a column split can say so")
    captioned = {os.path.realpath(root / path) for path in splits}
    found, _ = walk_images(root)
    others = [path for path in found if os.path.realpath(root / path) not in captioned]
    left_out = describe_left_out({"images without caption": len(others)})
    if unused:
        left_out.append(f"columns of no use here: {', '.join(unused)}")
    images, seen = decode(root, [train, test, val], data_dir, image_size)
    nothing = torch.empty(0, dtype=torch.int64)
    counts = f"{len(val)} for validation, {len(rows)} captions"
    return Dataset(
        train_images=images[0],
        train_labels=nothing,
        test_images=images[1],
        test_labels=nothing,
        classes=[],
        train_captions=[captions[path] for path in train],
        test_captions=[captions[path] for path in test],
        val_images=images[2] if val else None,
        val_captions=[captions[path] for path in val] if val else None,
        files=parts,
        note="; ".join([counts, *left_out, *seen]),
    )


def read_captions(file):
    """A table with a header -> its rows, each as (place, {column: text}), and the columns of no use
    here."""
    rows = []
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, restval="", skipinitialspace=True, strict=True)
            columns = [name.strip().lower() for name in reader.fieldnames or ()]
            reader.fieldnames = columns
            for row in reader:
                rows.append((f"{file}, row {reader.line_num}", row))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = f"cannot be read as CSV in UTF-8 after {len(rows)} rows ({error})"
        raise UserError(f"{file}: {reason}") from None
    if not {"image", "caption"} <= set(columns) or len(set(columns)) < len(columns):
        reason = f"the header is {columns}, not image,caption or image,caption,split"
        raise UserError(f"{file}: {reason}")
    return rows, sorted(set(columns) - {"image", "caption", "split"})


def find_image(root, name):
    """The path of an image from root, one for each file, however it is named; None without it."""
    for place in (root / name, root / "images" / name, root / "Images" / name):
        if place.is_file():
            return os.path.relpath(place.resolve(), root.resolve())
    return None


def draw_split(path):
    """The split of an image with captions, by a hash of its name."""
    tenth = text_hash(os.path.basename(path)) % 10
    return {0: "test", 1: "val"}.get(tenth, "train")


def text_hash(text):
    """A number that depends only on the text, unlike Python's hash, which changes from process to
    process."""
    return int(hashlib.sha256(os.fsencode(text)).hexdigest(), 16)


def refuse(problems):
    """Raises UserError of the first ten problems and how many more there are, if there are any."""
    if problems:
        more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise UserError("; ".join([*problems[:10], *more, "mend them or take them out"]))


def decode(root, groups, data_dir, size):
    """Groups of image files below root -> for each uint8 (n, 3, size, size), mapped from a file
    made on first use; and remarks on what the images do not show of their files.

    The file appears in data_dir when it is complete. Its name holds a hash of the names, sizes and
    times of the images: a folder that has changed is decoded anew, and its former file removed.
    Raises one UserError for all images that cannot be read; the others are kept decoded until these
    are taken out.
    """
    names = [name for group in groups for name in group]
    stamps = {}
    for name in names:
        status = os.stat(root / name)
        stamps[name] = (name, status.st_size, status.st_mtime_ns)
    folder = root.resolve()
    start = f"{folder.name}-{text_hash(folder) % 10**6}-{size}-"  # two folders may have one name

    def path_of(decoded):
        number = text_hash(repr([stamps[name] for name in decoded])) % 10**12
        return data_dir / f"{start}{number}.uint8"

    path = path_of(names)
    length = len(names) * (size * size * 3 + 1)
    problems = []
    if not path.exists() or path.stat().st_size != length:  # not there, or cut off by a crash
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=data_dir) as temporary:
                partial = Path(temporary, "images")
                with open(partial, "wb") as file:
                    good, problems = write_images(root, names, size, file)
                    file.flush()
                    os.fsync(file.fileno())  # on the disk before its name is
                path = partial.replace(path_of(good))
            for former in data_dir.iterdir():
                if former.name.startswith(start) and former != path:
                    former.unlink()
        except OSError as error:
            raise UserError(f"{data_dir}: cannot be written ({error.strerror})") from None
    refuse(sorted(problems))
    content = torch.from_numpy(np.memmap(path, np.uint8, "c"))  # a private copy of what is written
    images, remarks = unpack_images(content, len(names), size)
    return images.split([len(group) for group in groups]), remarks


def unpack_images(content, count, size):
    """Bytes as of write_images -> images, uint8 (count, 3, size, size), and remarks on them."""
    pixels, flags = content.tensor_split([len(content) - count])
    images = pixels.view(-1, size, size, 3).permute(0, 3, 1, 2)
    several = int((flags & SEVERAL_PAGES > 0).sum())
    oblong = int((flags & NOT_SQUARE > 0).sum())
    remarks = [f"cropped to a square: {oblong}"] if oblong else []
    if several:
        remarks.append(f"first page or frame only: {several}")
    return images, remarks


def write_images(root, names, size, file):
    """Decodes images into an open file, one after the other, and a byte of remarks on each below
    them -> the names of those that it could read, and what is wrong with the others."""
    good = []
    flags = []
    problems = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i in range(0, len(names), 256):  # or they would pile up behind a slow one
            some = names[i : i + 256]
            futures = [pool.submit(read_image, root / name, size) for name in some]
            for name, future in zip(some, futures, strict=True):
                try:
                    pixels, flag = future.result()
                except UserError as error:
                    problems.append(str(error))
                else:
                    file.write(pixels)
                    flags.append(flag)
                    good.append(name)
            done = f"{i + len(some)} of {len(names)} images"
            print(f"\rdecoding {root}: {done}", end="", flush=True)
    print()
    file.write(bytes(flags))
    return good, problems


SEVERAL_PAGES = 1  # remarks on an image, which add up
NOT_SQUARE = 2


def decode_image(file, size):
    """The largest square in the middle, at size x size, as uint8 (size, size, 3). What is
    transparent lies on white; 16 bits, and floats in [0, 1], are scaled to 8 bits; of several pages
    or frames it is the first. Raises UserError naming a bad file."""
    return read_image(file, size)[0]


def read_image(file, size):
    """An image as of decode_image, and the sum of the remarks on it."""
    try:
        with Image.open(file) as image:
            remarks = SEVERAL_PAGES if getattr(image, "n_frames", 1) > 1 else 0
            remarks += NOT_SQUARE if image.width != image.height else 0
            image.draft("RGB", (2 * size, 2 * size))  # a JPEG need not be decoded any larger
            image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # which convert("RGB") would cut off at 255
            image = to_8_bits(image)
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
        return np.asarray(image), remarks
    except Exception as error:  # decoders fail in many ways
        raise UserError(f"{file}: not a readable image ({error})") from None


def to_8_bits(image):
    """An image of integers up to 65535, or of floats up to 1, in 8 bits."""
    white = 1 if image.mode == "F" else 65535
    x = np.asarray(image)
    low = x.min()
    high = x.max()
    if not (low >= 0 and white / 16 <= high <= white):  # 12 bits in 16 would be all but black
        mend = "multiply all by one factor, which for 12 bits is 16"
        if white == 1:
            mend = "divide all by one number"
        raise ValueError(f"its values run from {low:g} to {high:g}, where white is {white}; {mend}")
    return Image.fromarray((255 * (x / white)).round().astype(np.uint8))


# === Shapes: small images drawn by code ===========================================================
# A silhouette is a function of points x, y, with y upwards, that is true inside; it fits the unit
# disc. None equals itself after a turn by 90 or 180 degrees, mirrored or not, so that one image is
# enough to see how far it was rotated.


def bar(x, y, half_width, low, high):
    return (x.abs() < half_width) & (low < y) & (y < high)


def disc(x, y, radius, cx=0.0, cy=0.0):
    return (x - cx) ** 2 + (y - cy) ** 2 < radius**2


def peak(x, y, half_width, low, high):
    return (y > low) & (x.abs() < half_width * (high - y) / (high - low))


def star(x, y):
    angle = (torch.atan2(x, y) + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5
    angle = angle.abs()  # from the nearest of five tips
    r = torch.hypot(x, y)
    notch_x = 0.45 * math.cos(math.pi / 5)
    notch_y = 0.45 * math.sin(math.pi / 5)
    # On the inner side of the line from tip to notch.
    return (notch_x - 1) * r * angle.sin() > notch_y * (r * angle.cos() - 1)


SILHOUETTES = {
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
    """Ten kinds of objects, 32 x 32, with captions: 4,096 training and 2,000 test images, always
    the same ones."""
    generator = torch.Generator().manual_seed(0)
    content = {"classes": list(SILHOUETTES)}
    for split, count in (("train", 4096), ("test", 2000)):
        scenes = sample_shapes(count, generator)
        content[f"{split}_images"] = draw_shapes(scenes, generator)
        content[f"{split}_labels"] = scenes["label"]
        content[f"{split}_captions"] = describe_shapes(scenes, generator)
        content[f"{split}_colors"] = scenes["color"]
    return Dataset(**content)


def sample_shapes(count, generator):
    """What `count` images show: balanced labels, and nuisances that are independent of them."""
    label = torch.randperm(count, generator=generator) % len(SILHOUETTES)
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
    x = axis[None]
    y = -axis[:, None]  # upwards
    cover = torch.empty(len(scenes["label"]), size, size)
    for label, inside in enumerate(SILHOUETTES.values()):
        own = scenes["label"] == label
        half_width = scenes["half_width"][own]
        tilt = scenes["tilt"][own]
        center = scenes["center"][own]
        dx = x - center[:, 0, None, None]  # (n, fine, fine)
        dy = y - center[:, 1, None, None]
        cos = (tilt.cos() / half_width)[:, None, None]
        sin = (tilt.sin() / half_width)[:, None, None]
        covered = inside(cos * dx + sin * dy, cos * dy - sin * dx).float()
        cover[own] = F.avg_pool2d(covered, supersampling)

    x = F.avg_pool1d(x, supersampling)  # pixels, (1, size)
    y = F.avg_pool1d(y.T, supersampling).T  # (size, 1)
    cos = scenes["direction"].cos()[:, None, None]
    sin = scenes["direction"].sin()[:, None, None]
    place = 0.5 + (cos * x + sin * y) / 2**1.5  # (N, size, size), 0 to 1
    palette = torch.tensor(list(COLORS.values())) / 255
    foreground = palette[scenes["color"]][..., None, None]  # (N, 3, 1, 1)
    first, second = palette[scenes["background"]][..., None, None].unbind(1)
    background = torch.lerp(first, second, place[:, None])
    images = torch.lerp(background, foreground, cover[:, None])
    images += 0.02 * torch.randn(images.shape, generator=generator)
    images = (255 * images).round().clamp(0, 255).byte()
    return images.contiguous(memory_format=torch.channels_last)


def describe_shapes(scenes, generator):
    """Scenes of sample_shapes -> five captions each, as people write them: what it is, its color,
    and one with everything."""
    shapes = list(SILHOUETTES)
    colors = list(COLORS)
    sizes = ((scenes["half_width"] - 0.60) / 0.25 * 3).long().clamp(max=2)
    sentences = torch.randint(len(FULL), sizes.shape, generator=generator)
    captions = []
    for i, sentence in enumerate(sentences.tolist()):
        first, second = scenes["background"][i].tolist()
        words = {
            "size": SIZES[sizes[i]],
            "color": colors[scenes["color"][i]],
            "shape": shapes[scenes["label"][i]],
            "one": colors[first],
            "two": colors[second],
        }
        texts = [text.format(**words) for text in (*BRIEF, FULL[sentence])]
        captions.append([re.sub(r"\ba(?= [aeiou])", "an", text) for text in texts])
    return captions


# === Augmentations: float images (N, C, H, W) in [0, 1] ===========================================
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
    start = start[:, None, None]
    length = length[:, None, None]
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
    start = torch.where(flip, left + width, left)  # the right end of a mirrored line
    length = torch.where(flip, -width, width)
    rows = resize_weights(top, height, images.shape[2], size)
    columns = resize_weights(start, length, images.shape[3], size)
    return separable(images, rows, columns)


def random_boxes(count, H, W, scale, ratio, generator):
    """Boxes (count, 4) as in Inception: a fraction of the area from `scale`, an aspect log-uniform
    in `ratio`. Of ten tries the first that fits an H x W image counts; without one it is the whole
    image, as torchvision's RandomResizedCrop has it for square images."""
    area = H * W * uniform(*scale, (count, 10), generator)
    low = math.log(ratio[0])
    high = math.log(ratio[1])
    aspect = uniform(low, high, (count, 10), generator).exp()  # width over height
    height = (area / aspect).sqrt().round()  # (count, 10)
    width = (area * aspect).sqrt().round()
    fits = (height > 0) & (height <= H) & (width > 0) & (width <= W)
    any_fits = fits.any(1)
    first = fits.int().argmax(1, keepdim=True)
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


def random_vertical_flip(images, generator, p=0.5):
    """Turns an image upside down with probability p; equal to torchvision's vertical_flip."""
    chosen = uniform(0, 1, (len(images), 1, 1, 1), generator) < p
    return torch.where(chosen, images.flip(2), images)


def random_quarter_turn(images, generator):
    """Turns each square image by 0, 90, 180 or 270 degrees; equal to torch.rot90. With a flip these
    are all ways to lay down an image that has no upright, such as one from a microscope."""
    quarters = uniform(0, 4, (len(images), 1, 1, 1), generator).floor()
    x = torch.where(quarters >= 2, images.flip(2, 3), images)  # by 180 degrees
    return torch.where(quarters % 2 == 1, x.rot90(1, (2, 3)), x)


def blur_weights(sigma, size, radius):
    """Matrices (N, size, size) that blur a line by a Gaussian of sigma (N,) pixels, mirrored beyond
    its ends."""
    pixel = torch.arange(size, device=sigma.device)
    i = pixel[:, None]
    j = pixel[None]

    def gaussian(distance):
        density = torch.exp(-0.5 * (distance / sigma[:, None, None]) ** 2)
        return density * (distance.abs() <= radius)

    mirrored = gaussian(i + j) * (j > 0) + gaussian(2 * (size - 1) - i - j) * (j < size - 1)
    weights = gaussian(i - j) + mirrored
    return weights / weights.sum(2, keepdim=True)


def gaussian_blur(images, sigma, kernel_size):
    """Blurs by sigma (N,) pixels, cut to an odd kernel_size; equal to torchvision's
    gaussian_blur."""
    H, W = images.shape[2:]
    rows = blur_weights(sigma, H, kernel_size // 2)
    columns = blur_weights(sigma, W, kernel_size // 2)
    return separable(images, rows, columns)


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
    """Removes the color of an image with probability p; equal to torchvision's rgb_to_grayscale."""
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
    b in sixths, of channels stretched to [0, 1], and the sign of g - b is the side. In place where
    it can be, since memory traffic is what this costs."""
    r, g, b = images.split(1, dim=1)
    low = images.amin(1, keepdim=True)
    high = images.amax(1, keepdim=True)
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
    which = which[..., None, None]
    eye = torch.eye(3, device=images.device)
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
    factors = []
    for width in (brightness, contrast, saturation):
        factor = uniform(max(0, 1 - width), 1 + width, (N,), generator)
        factors.append(torch.where(chosen, factor, 1.0))
    shift = uniform(-hue, hue, (N,), generator)
    factors.append(torch.where(chosen, shift, 0.0))
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
    global resized_crop, gaussian_blur, color_jitter
    plain = resized_crop, gaussian_blur, color_jitter
    if wanted:
        resized_crop = torch.compile(resized_crop)
        gaussian_blur = torch.compile(gaussian_blur)
        color_jitter = torch.compile(color_jitter)
    try:
        yield
    finally:
        resized_crop, gaussian_blur, color_jitter = plain
