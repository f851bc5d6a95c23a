"""Data sets and batched augmentations for the self-supervised scripts beside this file, and nothing else.

Pictures lie as one uint8 tensor on the training device; augmentations work there on whole batches of float
images in [0, 1], with one parameter per image, drawn from an explicit torch.Generator.
"""

import csv
import hashlib
import io
import math
import os
import re
import tempfile
import zipfile
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps


class UserError(Exception):
    """An input that the person can mend: the message names the flag or the file and what to do."""


# === Data sets ======================================================================================================


@dataclass
class Dataset:
    """Images uint8 (N, 3, S, S) in channels_last order, labels int64, the class names, and captions if any.

    train_labels are those of the first len(train_labels) training images: STL-10 has more images than labels. A folder
    of plain images has no labels and no classes; a tenth of it is held out as test images. Captions are a list for each
    image. A captioned folder has validation images, and shapes have colours: the numbers in COLORS.
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

    def to(self, device):
        """The same on the device; images that would fill more than half of a GPU's free memory stay where they are."""
        parts = dict(vars(self))
        size = sum(v.nbytes for v in parts.values() if torch.is_tensor(v))
        stay = device.type == "cuda" and size > torch.cuda.mem_get_info(device)[0] / 2
        for name, value in parts.items():
            if torch.is_tensor(value) and not (stay and name.endswith("images")):
                parts[name] = value.to(device)
        return Dataset(**parts)


def batches(images, order, size, device):
    """Rows `order` (n,) of images (M, 3, S, S), whole batches of them: yields (size, 3, S, S) on the device.

    Images that did not fit there are gathered by a thread, ahead of time, and copied from pinned memory.
    """
    indices = order[: len(order) // size * size].to(images.device).split(size)
    if images.device == device:
        yield from (images[index] for index in indices)
        return
    ahead = deque()
    with ThreadPoolExecutor(1) as pool:
        for index in indices:
            ahead.append(pool.submit(lambda i: images[i].pin_memory().to(device, non_blocking=True), index))
            if len(ahead) == 4:
                yield ahead.popleft().result()
        yield from (batch.result() for batch in ahead)


def fingerprint(images):
    """Shape, and sum of some 64 of the images (M, 3, S, S): tells other data from what a run began with."""
    return [*images.shape, int(images[:: len(images) // 64 + 1].sum())]


def labelled_rows(labels, amount, seed):
    """A class-balanced part of labels (L,), drawn with seed -> row numbers in random order.

    amount: "0.1" or 0.1 is a fraction of each class, at least one image of it; "10" or 10 a number of images per class.
    So "1.0" is all, "1" one per class. Raises UserError for anything else, and where there are too few.
    """
    try:
        number = int(amount) if str(amount).isdecimal() else float(amount)
    except ValueError:
        number = 0
    if not number > 0 or (number > 1 and number % 1):
        raise UserError(f"--labels {amount}: must be a fraction up to 1.0, or a whole number of labels per class")
    if len(labels) == 0:
        raise UserError(f"--labels {amount}: the data set has no labels")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    place = F.one_hot(labels[order]).cumsum(0).gather(1, labels[order, None])[:, 0]  # 1 for the first of its class
    counts = labels.bincount()
    fewest = int(counts[counts > 0].min())
    if number > max(1, fewest):
        raise UserError(f"--labels {number:g}: the smallest class has only {fewest} training images")
    share = isinstance(number, float) and number <= 1
    wanted = (counts * number).round().clamp(min=1) if share else torch.full_like(counts, round(number))
    return order[place <= wanted[labels[order]]]


def load_dataset(name, data_dir="data", image_size=96):
    """`shapes`, `cifar10`, `cifar100`, `stl10`, or a path: of an .npz file, or of a folder of pictures -> Dataset.

    The second to fourth are downloaded once by torchvision and kept as <data_dir>/<name>.npz, which is all that later
    calls read. Pictures of a folder become image_size pixels square, larger ones in an .npz file shrink to that.
    Raises UserError, in one line, for a data set that is unknown, unreachable, broken or badly laid out.
    """
    if name == "shapes":
        return shapes_dataset()
    if name in ("cifar10", "cifar100", "stl10"):
        path = Path(data_dir, f"{name}.npz")
        if not path.exists():
            download(name, path)
        return npz_dataset(path, image_size)
    if Path(name).suffix == ".npz":
        return npz_dataset(Path(name), image_size)
    if Path(name).is_dir():
        return folder_dataset(Path(name), Path(data_dir), image_size)
    raise UserError(f"--dataset {name}: is not shapes, cifar10, cifar100, stl10, an .npz file or a folder of pictures")


def npz_dataset(path, image_size):
    """{train,test}_images, uint8 (N, S, S) or (N, S, S, 3), and {train,test}_labels, integers (N,) or (N, 1).

    There may be fewer train_labels than train_images: the last images are then unlabelled. `classes`, their names,
    may be there too. With train_images alone there are no classes.
    """
    arrays, keys = {}, ["train_images", "train_labels", "test_images", "test_labels"]
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            for key in keys if any(key in file for key in keys[1:]) else keys[:1]:
                if key not in file:
                    raise UserError(f"{path}: has no array {key}; its arrays are {', '.join(file) or 'none'}")
                arrays[key] = file[key]
            names = file["classes"].tolist() if "classes" in file else []
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, EOFError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: not a readable .npz file ({error})") from None

    tensors = []
    for split in ("train", "test"):
        images = arrays[f"{split}_images"]
        if images.ndim == 3:  # grey: one channel stands for all three
            images = np.repeat(images[..., None], 3, axis=3)
        N, H, W, C = images.shape if images.ndim == 4 else (0, 0, 0, 0)
        if images.dtype != np.uint8 or N == 0 or H != W or C != 3:
            shape = arrays[f"{split}_images"].shape
            raise UserError(f"{path}: {split}_images is {images.dtype} {shape}, not uint8 (N, S, S) or (N, S, S, 3)")
        images = shrink(torch.from_numpy(images).permute(0, 3, 1, 2), image_size)  # (N, 3, S, S)
        if len(arrays) == 1:
            return unlabelled(images[torch.randperm(N, generator=torch.Generator().manual_seed(0))])
        labels = arrays[f"{split}_labels"]
        L = len(labels) if labels.ndim and split == "train" else N
        if labels.dtype.kind not in "iu" or labels.shape not in ((L,), (L, 1)) or not 0 < L <= N or labels.min() < 0:
            raise UserError(f"{path}: {split}_labels is {labels.dtype} {labels.shape}, not {N} class numbers from 0 on")
        tensors += [images, torch.from_numpy(labels.reshape(L).astype(np.int64))]
    if tensors[0].shape[1:] != tensors[2].shape[1:]:
        raise UserError(f"{path}: train_images and test_images differ in size")
    count = max(int(tensors[1].max()), int(tensors[3].max())) + 1
    return Dataset(*tensors, names if len(names) >= count else [str(label) for label in range(count)])


def unlabelled(images):
    """Images (N, 3, S, S) in random order, without classes -> Dataset. A tenth of them, at most 1,000, is held out as
    test images, to measure and to look at; in place of labels these are numbered."""
    held = min(math.ceil(len(images) / 10), 1000)
    return Dataset(images[held:], torch.empty(0, dtype=torch.int64), images[:held], torch.arange(held), [])


def shrink(images, size):
    """uint8 (N, 3, S, S) with S above `size` -> (N, 3, size, size), antialiased; others as they are."""
    if images.shape[3] <= size:
        return images
    parts = [F.interpolate(x.float(), size, mode="bilinear", antialias=True).round().byte() for x in images.split(1000)]
    return torch.cat(parts).contiguous(memory_format=torch.channels_last)


def download(name, path):
    """Fetches a data set with torchvision and writes it to `path`, whole or not at all."""
    source = getattr(torchvision.datasets, name.upper())
    if name == "stl10":  # the 5,000 labelled training pictures come first
        splits = {"train": {"split": "train+unlabeled"}, "test": {"split": "test"}}
    else:
        splits = {"train": {"train": True}, "test": {"train": False}}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            arrays = {}
            for split, where in splits.items():
                part = source(folder, download=True, **where)
                images, labels = part.data, np.array(part.labels if name == "stl10" else part.targets)
                arrays[f"{split}_images"] = images.transpose(0, 2, 3, 1) if name == "stl10" else images
                arrays[f"{split}_labels"] = labels[labels >= 0]  # torchvision labels the unlabelled -1
            np.savez(Path(folder, path.name), **arrays, classes=np.array(part.classes))
            Path(folder, path.name).replace(path)
    except (OSError, RuntimeError) as error:  # no network, a broken archive, a folder that cannot be written
        raise UserError(f"--dataset {name}: {path} is not there and cannot be downloaded ({error})") from None


# --- Folders of pictures --------------------------------------------------------------------------------------------


def folder_dataset(root, data_dir, image_size):
    """train/<class>/* and test/<class>/* or val/<class>/*; captions; or every picture below root, without classes."""
    for name in ("captions.csv", "captions.txt"):
        if (root / name).exists():
            return captioned_dataset(root / name, data_dir, image_size)
    train, test = root / "train", root / ("test" if (root / "test").is_dir() else "val")
    classes = sorted(folder.name for folder in train.iterdir() if folder.is_dir()) if train.is_dir() else []
    if not classes:
        files = sorted(list_pictures(root), key=lambda file: hashlib.sha256(file.name.encode()).digest())
        return unlabelled(decode(root, files, data_dir, image_size))
    if not test.is_dir():
        raise UserError(f"{root}: has train/<class> folders, but no test/<class> or val/<class> ones for the probes")
    parts = []
    for split in (train, test):
        for folder in split.iterdir():
            if folder.is_dir() and folder.name not in classes:
                raise UserError(f"{folder}: there is no class of that name in {train}")
        folders = [(label, split / name) for label, name in enumerate(classes) if (split / name).is_dir()]
        files = [(file, label) for label, folder in folders for file in list_pictures(folder)]
        if not files:
            raise UserError(f"{split}: has no <class> folders, of which {train} has {len(classes)}")
        parts.append(decode(root, [file for file, _ in files], data_dir, image_size))
        parts.append(torch.tensor([label for _, label in files]))
    return Dataset(*parts, classes)


def captioned_dataset(file, data_dir, image_size):
    """Rows image,caption or image,caption,split below such a header; pictures beside the file or in images/ there.

    A split is train, val or test. Without that column a hash of its name puts a picture into one of them, 8 in 10 into
    train, so that neither the order of the rows nor further rows move it.
    """
    splits, captions = {}, {}  # of each picture
    try:
        text = file.read_bytes().decode("utf-8-sig")
        rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        if not {"image", "caption"} <= set(rows.fieldnames or ()):
            raise UserError(f"{file}, row 1: the header is {rows.fieldnames}, not image,caption or image,caption,split")
        for row in rows:
            where = f"{file}, row {rows.line_num}"
            if None in row or None in row.values():
                raise UserError(f"{where}: has not as many fields as the header; a caption with commas needs quotes")
            name, caption = row["image"].strip(), row["caption"].strip()
            if not name or not caption:
                raise UserError(f"{where}: the {'caption' if name else 'image'} is empty")
            places = (file.parent / name, file.parent / "images" / name, file.parent / "Images" / name)
            picture = next((place.resolve() for place in places if place.is_file()), None)  # one path for one file
            if picture is None:
                raise UserError(f"{where}: there is no picture {name} in {file.parent} or in images/ there")
            split = row["split"].strip() if "split" in row else hashed_split(picture.name)
            if split not in ("train", "val", "test"):
                raise UserError(f"{where}: split {split!r} is not train, val or test")
            if splits.setdefault(picture, split) != split:
                raise UserError(f"{where}: {name} is in {split} here, but in {splits[picture]} above")
            captions.setdefault(picture, []).append(caption)
    except UnicodeDecodeError as error:
        row = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}, row {row}: is not in UTF-8; save the file in that encoding") from None
    except csv.Error as error:
        raise UserError(f"{file}, row {rows.reader.line_num}: not a line of a CSV file ({error})") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    images, texts = {}, {}
    for split in ("train", "val", "test"):
        files = sorted(picture for picture in splits if splits[picture] == split)
        if not files and split != "val":
            raise UserError(f"{file}: has no picture in the split {split}")
        images[split] = decode(file.parent.resolve(), files, data_dir, image_size) if files else None
        texts[split] = [captions[picture] for picture in files]
    nothing = torch.empty(0, dtype=torch.int64)
    return Dataset(
        images["train"],
        nothing,
        images["test"],
        nothing,
        [],
        texts["train"],
        texts["test"],
        images["val"],
        texts["val"],
    )


def hashed_split(name):
    """A split that depends on the name alone."""
    digit = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10
    return {0: "test", 1: "val"}.get(digit, "train")


def list_pictures(folder):
    """The image files below a folder, sorted, but for the figures of runs. Raises UserError if there are none."""
    suffixes, runs = torchvision.datasets.folder.IMG_EXTENSIONS, {file.parent for file in folder.rglob("args.json")}
    files = (p for p in folder.rglob("*") if p.suffix.lower() in suffixes and p.parent not in runs and p.is_file())
    if not (files := sorted(files)):
        raise UserError(f"{folder}: there are no pictures in it, such as .jpg or .png files")
    return files


def decode(root, files, data_dir, size):
    """Picture files -> uint8 (N, 3, size, size), mapped from an .npy file in data_dir that is made on first use.

    The file appears there when it is complete. Its name holds a hash of the names, sizes and times of the pictures,
    so that a folder that has changed is decoded anew.
    """
    stamps = [(os.path.relpath(file, root), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    name = f"{root.resolve().name}-{size}-{hashlib.sha256(repr(stamps).encode()).hexdigest()[:12]}.npy"
    try:
        if not (data_dir / name).exists():
            data_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=data_dir) as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
                with open(Path(folder, name), "wb") as file:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (len(files), size, size, 3)}
                    np.lib.format.write_array_header_1_0(file, header)
                    for i, picture in enumerate(pool.map(lambda path: decode_picture(path, size), files), 1):
                        file.write(picture.tobytes())
                        if i % 1000 == 0 or i == len(files):
                            print(f"\rdecoding {root}: {i} of {len(files)} pictures", end="", flush=True)
                print()
                Path(folder, name).replace(data_dir / name)
    except OSError as error:
        raise UserError(f"--data-dir {data_dir}: cannot be written ({error.strerror})") from None
    return torch.from_numpy(np.load(data_dir / name, mmap_mode="c")).permute(0, 3, 1, 2)


def decode_picture(file, size):
    """The largest square in the middle, at size x size: uint8 (size, size, 3). Raises UserError naming a bad file."""
    try:
        with Image.open(file) as picture:
            picture.draft("RGB", (2 * size, 2 * size))  # a JPEG need not be decoded any larger
            picture = ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{file}: not a readable picture ({error}); mend it or take it out") from None
    return np.asarray(ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC))


# --- Shapes: small pictures drawn by code ---------------------------------------------------------------------------
# A silhouette is a function of points x, y, with y upwards, that is true inside; it fits the unit disc. None equals
# itself after a turn by 90 or 180 degrees, mirrored or not, so that rotation can be told from one picture.


def bar(x, y, half_width, low, high):
    return (x.abs() < half_width) & (low < y) & (y < high)


def disc(x, y, radius, cx=0.0, cy=0.0):
    return (x - cx) ** 2 + (y - cy) ** 2 < radius**2


def peak(x, y, half_width, low, high):
    return (y > low) & (x.abs() < half_width * (high - y) / (high - low))


def star(x, y):
    angle = ((torch.atan2(x, y) + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5).abs()  # from the nearest of five tips
    r, notch = torch.hypot(x, y), (0.45 * math.cos(math.pi / 5), 0.45 * math.sin(math.pi / 5))
    return (notch[0] - 1) * r * angle.sin() > notch[1] * (r * angle.cos() - 1)  # on the inner side of tip to notch


SHAPES = {
    "arrow": lambda x, y: peak(x, y, 0.75, 0.1, 1) | bar(x, y, 0.25, -0.95, 0.15),
    "bowl": lambda x, y: (disc(x, y, 0.9, 0, 0.35) & (y < 0.35)) | bar(x, y, 0.4, -0.75, -0.4),
    "cross": lambda x, y: bar(x, y, 0.19, -0.98, 0.98) | bar(x, y, 0.75, 0.2, 0.58),
    "drop": lambda x, y: disc(x, y, 0.6, 0, -0.35) | peak(x, y, 0.54, -0.08, 1),
    "heart": lambda x, y: ((1.42 * x) ** 2 + (1.32 * y + 0.1) ** 2 - 1) ** 3 < (1.42 * x) ** 2 * (1.32 * y + 0.1) ** 3,
    "house": lambda x, y: peak(x, y, 0.9, 0.05, 0.95) | (bar(x, y, 0.6, -0.78, 0.1) & ~bar(x, y, 0.17, -0.8, -0.2)),
    "moon": lambda x, y: disc(x, y, 0.95) & ~disc(x, y, 0.78, 0.46, 0.19),
    "mushroom": lambda x, y: (disc(x, y, 0.95) & (y > 0)) | bar(x, y, 0.27, -0.9, 0.05),
    "star": star,
    "triangle": lambda x, y: peak(x, y, 0.8, -0.59, 1),
}
COLORS = {
    "red": (214, 48, 49),
    "orange": (240, 140, 40),
    "yellow": (246, 214, 72),
    "green": (46, 150, 80),
    "blue": (52, 110, 214),
    "purple": (136, 70, 184),
    "pink": (244, 150, 186),
    "brown": (122, 78, 46),
    "white": (242, 242, 238),
    "black": (36, 36, 42),
}
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
    """Ten kinds of things, 32 x 32, with captions: 4,096 training and 2,000 test pictures, always the same ones."""
    generator, splits, captions, colors = torch.Generator().manual_seed(0), [], [], []
    for count in (4096, 2000):
        scenes = sample_shapes(count, generator)
        splits += [draw_shapes(scenes, generator), scenes["label"]]
        captions.append(describe_shapes(scenes, generator))
        colors.append(scenes["color"])
    return Dataset(*splits, list(SHAPES), *captions, train_colors=colors[0], test_colors=colors[1])


def sample_shapes(count, generator):
    """What `count` pictures show: balanced labels, and nuisances that are drawn without looking at them."""
    label = torch.arange(count)[torch.randperm(count, generator=generator)] % len(SHAPES)
    half_width = uniform(0.60, 0.85, (count,), generator)  # of the frame's
    color = torch.randint(len(COLORS), (count,), generator=generator)

    # The background runs from one colour to another. The foreground is apart from every mixture of the two: its
    # distance from the straight line between them, in RGB, is more than 0.35.
    palette = torch.tensor(list(COLORS.values())) / 255  # (K, 3)
    line = palette[None] - palette[:, None]  # (K, K, 3), from the first colour to the second
    offset = palette[:, None, None] - palette[None, :, None]  # (K, K, 1, 3), from the first to the foreground
    share = ((offset * line).sum(3) / line.square().sum(2).clamp(min=1e-9)).clamp(0, 1)  # (K, K, K), nearest mixture
    apart = (offset - share[..., None] * line).norm(dim=3) > 0.35
    apart &= ~torch.eye(len(COLORS), dtype=torch.bool)  # two colours
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
    """Scenes of sample_shapes -> uint8 (N, 3, size, size); the generator draws the noise of the pixels."""
    fine = size * supersampling
    axis = (torch.arange(fine) + 0.5) / fine * 2 - 1  # -1 to 1
    y, x = -axis[:, None], axis[None]  # y upwards
    cover = torch.empty(len(scenes["label"]), size, size)
    for label, inside in enumerate(SHAPES.values()):
        of = scenes["label"] == label
        s, tilt, center = scenes["half_width"][of], scenes["tilt"][of], scenes["center"][of]
        dx, dy = x - center[:, 0, None, None], y - center[:, 1, None, None]  # (n, fine, fine)
        cos, sin = (tilt.cos() / s)[:, None, None], (tilt.sin() / s)[:, None, None]
        cover[of] = F.avg_pool2d(inside(cos * dx + sin * dy, cos * dy - sin * dx).float(), supersampling)

    cos, sin = scenes["direction"].cos()[:, None, None], scenes["direction"].sin()[:, None, None]
    y, x = F.avg_pool1d(y.T, supersampling).T, F.avg_pool1d(x, supersampling)  # pixels, (size, 1) and (1, size)
    share = 0.5 + (cos * x + sin * y) / 2**1.5  # (N, size, size), 0 to 1
    palette = torch.tensor(list(COLORS.values())) / 255
    thing, one, two = (
        palette[c][:, :, None, None] for c in (scenes["color"], *scenes["background"].unbind(1))
    )  # (N, 3, 1, 1) each
    images = torch.lerp(torch.lerp(one, two, share[:, None]), thing, cover[:, None])
    images += 0.02 * torch.randn(images.shape, generator=generator)
    return (255 * images).round().clamp(0, 255).byte().contiguous(memory_format=torch.channels_last)


def describe_shapes(scenes, generator):
    """Scenes of sample_shapes -> five captions each, as people write them: what it is, its colour, and one with all."""
    shapes, colors = list(SHAPES), list(COLORS)
    size = ((scenes["half_width"] - 0.60) / 0.25 * 3).long().clamp(max=2)
    sentence = torch.randint(len(FULL), size.shape, generator=generator)
    rows = zip(sentence, size, scenes["color"], scenes["label"], *scenes["background"].unbind(1), strict=True)

    def caption(text, s, c, k, a, b):
        text = text.format(size=SIZES[s], color=colors[c], shape=shapes[k], one=colors[a], two=colors[b])
        return re.sub(r"\ba(?= [aeiou])", "an", text)

    return [[caption(text, *row) for text in (*BRIEF, FULL[w])] for w, *row in rows]


# === Augmentations: float images (N, C, H, W) in [0, 1], one parameter per image ====================================
# Each comes as two functions: the operator, which takes a parameter per image and equals torchvision's functional
# one, and `random_...`, which draws the parameters as torchvision's transform does. Nothing here waits for the device.


def uniform(low, high, shape, generator):
    """Uniform numbers in [low, high), on the generator's device."""
    return low + (high - low) * torch.rand(shape, generator=generator, device=generator.device)


def coin(p, count, generator):
    """(count,) booleans, true with probability p."""
    return uniform(0, 1, (count,), generator) < p


def per_image(values):
    """(N,) -> (N, 1, 1, 1), to meet images (N, C, H, W)."""
    return values[:, None, None, None]


# --- Geometry and blur: linear maps of rows and columns, as batched matrix products ---------------------------------


def separable(images, rows, columns):
    """rows (N, H', H) and columns (N, W', W) applied to images (N, C, H, W) -> (N, C, H', W')."""
    N, C, H, W = images.shape
    x = images.transpose(1, 2).reshape(N, H * C, W) @ columns.mT  # (N, H C, W')
    x = rows @ x.view(N, H, -1)  # (N, H', C W')
    return x.unflatten(2, (C, -1)).transpose(1, 2)  # (N, C, H', W')


def resize_weights(start, length, size_in, size_out):
    """Matrices (N, size_out, size_in) that cut pixels [start, start + length) (N,) out of a line and resize them.

    A row is a triangle around the centre of its output pixel, as wide as that pixel where the line shrinks
    (antialiasing) and as an input pixel where it grows (bilinear). A negative length runs back from start: a mirror.
    """
    start, length = start[:, None, None], length[:, None, None]
    scale = length / size_out
    center = (torch.arange(size_out, device=start.device) + 0.5)[:, None] * scale  # (N, size_out, 1), from start
    pixel = torch.arange(size_in, device=start.device) + 0.5 - start  # (N, 1, size_in), from start
    weights = (1 - (pixel - center).abs() / scale.abs().clamp(min=1)).clamp(min=0)
    weights = weights * ((pixel - length / 2).abs() < length.abs() / 2)  # nothing from outside the crop
    return weights / weights.sum(2, keepdim=True)


def resized_crop(images, boxes, size, flip):
    """Crops, resizes and mirrors: boxes (N, 4) are top, left, height, width in whole pixels, flip (N,) booleans.

    -> (N, C, size, size), equal to torchvision's resized_crop with antialias=True, then horizontal_flip.
    """
    top, left, height, width = boxes.unbind(1)
    left, width = torch.where(flip, left + width, left), torch.where(flip, -width, width)
    rows = resize_weights(top, height, images.shape[2], size)
    return separable(images, rows, resize_weights(left, width, images.shape[3], size))


def random_boxes(count, H, W, scale, ratio, generator):
    """Boxes (count, 4) as in Inception: a share of the area from `scale`, an aspect log-uniform in `ratio`.

    Of ten tries the first that fits an H x W picture counts; without one it is the whole picture, which is what
    torchvision's RandomResizedCrop does with square pictures.
    """
    area = H * W * uniform(*scale, (count, 10), generator)
    aspect = uniform(math.log(ratio[0]), math.log(ratio[1]), (count, 10), generator).exp()  # width over height
    height, width = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()  # (count, 10)
    fits = (height > 0) & (height <= H) & (width > 0) & (width <= W)
    first, any_fits = fits.int().argmax(1, keepdim=True), fits.any(1)
    height = torch.where(any_fits, height.gather(1, first)[:, 0], H)
    width = torch.where(any_fits, width.gather(1, first)[:, 0], W)
    top = (uniform(0, 1, (count,), generator) * (H - height + 1)).floor()
    left = (uniform(0, 1, (count,), generator) * (W - width + 1)).floor()
    return torch.stack([top, left, height, width], dim=1)


def random_resized_crop(images, size, generator, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5):
    """A random box of each image at (size, size), mirrored with probability `flip`: (N, C, size, size)."""
    N, _, H, W = images.shape
    boxes = random_boxes(N, H, W, scale, ratio, generator)
    return resized_crop(images, boxes, size, coin(flip, N, generator))


def random_crop(images, padding, generator, flip=0.5):
    """Shifts each square image by up to `padding` pixels, zeros moving in, and mirrors it with probability `flip`."""
    N, _, _, S = images.shape
    corners = uniform(0, 2 * padding + 1, (N, 2), generator).floor()  # top and left
    boxes = torch.cat([corners, torch.full_like(corners, S)], dim=1)
    return resized_crop(F.pad(images, [padding] * 4), boxes, S, coin(flip, N, generator))


def blur_weights(sigma, size, radius):
    """Matrices (N, size, size) that blur a line by a Gaussian of sigma (N,) pixels, mirrored beyond its ends."""
    pixel = torch.arange(size, device=sigma.device)
    i, j, sigma = pixel[:, None], pixel, sigma[:, None, None]

    def gaussian(distance):
        return torch.exp(-0.5 * (distance / sigma) ** 2) * (distance.abs() <= radius)

    mirrored = gaussian(i + j) * (j > 0) + gaussian(2 * (size - 1) - i - j) * (j < size - 1)
    weights = gaussian(i - j) + mirrored
    return weights / weights.sum(2, keepdim=True)


def gaussian_blur(images, sigma, kernel_size):
    """Blurs by sigma (N,) pixels, cut to an odd kernel_size; equal to torchvision's gaussian_blur."""
    H, W = images.shape[2:]
    radius = kernel_size // 2
    return separable(images, blur_weights(sigma, H, radius), blur_weights(sigma, W, radius))


def random_gaussian_blur(images, generator, sigma=(0.1, 2.0), p=0.5):
    """With probability p; the kernel is a tenth of the picture's side, at least 3 (SimCLR, appendix A)."""
    N, _, H, _ = images.shape
    strength = uniform(*sigma, (N,), generator)
    strength = torch.where(coin(p, N, generator), strength, 1e-3)  # a thousandth of a pixel: the picture itself
    return gaussian_blur(images, strength, max(3, H // 20 * 2 + 1))


# --- Colour ---------------------------------------------------------------------------------------------------------


def luma(images):
    """(N, 3, H, W) -> (N, 1, H, W): brightness as the eye weighs it (ITU-R 601)."""
    r, g, b = images.split(1, dim=1)
    return 0.2989 * r + 0.587 * g + 0.114 * b


def grayscale(images, chosen):
    """Takes the colour from the images for which chosen (N,) is true."""
    return torch.where(per_image(chosen), luma(images), images)


def random_grayscale(images, generator, p=0.2):
    return grayscale(images, coin(p, len(images), generator))


def solarize(images, threshold, chosen):
    """Inverts values from `threshold` on in the images for which chosen (N,) is true."""
    return torch.where(per_image(chosen) & (images >= threshold), 1 - images, images)


def random_solarize(images, generator, threshold=0.5, p=0.2):
    return solarize(images, threshold, coin(p, len(images), generator))


def adjust_hue(images, shift):
    """Turns hues by shift (N,), in whole circles from -0.5 to 0.5; HSV's value and saturation stay.

    On HSV's circle red lies at 0, green at 1/3 and blue at 2/3. A channel is full within 1/6 of its own hue, falls
    over the next 1/6 and is empty beyond. Distance from red is therefore 1 - r + g + b in sixths, of channels
    stretched to [0, 1], and g - b tells the side. In place where it can be: memory is what this costs.
    """
    r, g, b = images.split(1, dim=1)
    high, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    chroma = high - low
    hue = (g + b).sub_(r).sub_(low).div_((6 * chroma).clamp_(min=1e-9)).add_(1 / 6)  # grey has any hue
    hue = hue.copysign_(g - b).add_(per_image(shift))  # (N, 1, H, W)
    distance = hue - torch.arange(3, device=images.device).view(3, 1, 1) / 3  # (N, 3, H, W), of r, g and b
    distance = distance.sub_(distance.round()).abs_().clamp_(1 / 6, 1 / 3)
    return torch.addcmul(high + chroma, chroma, distance, value=-6)


def color_jitter(images, factors, order):
    """Brightness, contrast, saturation and hue, in an order of its own for each image, as ColorJitter's.

    factors (N, 4): three factors around 1, and the shift of the hue around 0. order (N, 4): in each row a
    permutation of 0 brightness, 1 contrast, 2 saturation, 3 hue.

    The first three mix a colour c with black, the mean grey of the image, or its own grey: M c + b, cut to [0, 1].
    All images walk through three such steps before the hue is turned and three after it; with factor 1 those that
    are on the other side of an image's own turn leave it as it is. So the hue, which costs most, is turned once.
    """
    place = torch.arange(4, device=images.device)
    turn = (order == 3).int().argmax(1, keepdim=True)  # (N, 1)
    active = torch.cat([place[:3] < turn, place[1:] > turn], dim=1)  # (N, 6)
    which = torch.cat([order[:, :3], order[:, 1:]], dim=1)
    factor = torch.where(active, factors.gather(1, which), 1.0)[..., None, None]  # (N, 6, 1, 1)
    which, eye = which[..., None, None], torch.eye(3, device=images.device)
    gray = (1 - factor) * luma(eye[..., None, None]).flatten()  # (N, 6, 1, 3)
    of_image, of_pixel = gray * (which == 1), factor * eye + gray * (which == 2)  # (N, 6, 1, 3), (N, 6, 3, 3)

    x = images.flatten(2)  # (N, 3, H W)
    for step in range(6):
        if step == 3:
            x = adjust_hue(x.view(images.shape), factors[:, 3]).flatten(2)
        b = of_image[:, step] @ x.mean(2, keepdim=True)  # (N, 1, 1)
        x = torch.baddbmm(b, of_pixel[:, step], x).clamp_(0, 1)
    return x.view(images.shape)


def random_color_jitter(images, generator, brightness, contrast, saturation, hue, p=0.8):
    """ColorJitter(brightness, contrast, saturation, hue) with probability p for each image."""
    N, draw = len(images), coin(p, len(images), generator)
    factors = [
        torch.where(draw, uniform(max(0, 1 - spread), 1 + spread, (N,), generator), 1.0)
        for spread in (brightness, contrast, saturation)
    ]
    factors.append(torch.where(draw, uniform(-hue, hue, (N,), generator), 0.0))
    order = uniform(0, 1, (N, 4), generator).argsort(1)
    return color_jitter(images, torch.stack(factors, dim=1), order)


# --- Normalisation --------------------------------------------------------------------------------------------------

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as torchvision's weights expect


def normalize(images):
    """(N, 3, H, W) in [0, 1] -> mean 0 and standard deviation 1 of each channel over ImageNet, in channels_last layout,
    which convolutions prefer; not on mps, where some torch versions get batch norm in that layout wrong."""
    channels = zip(images.unbind(1), MEAN, STD, strict=True)
    x = torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)
    return x if x.device.type == "mps" else x.contiguous(memory_format=torch.channels_last)


def compile_operators():
    """Compiles the operators that work on whole images: some kernels in place of dozens. For a GPU."""
    for operator in (resized_crop, gaussian_blur, grayscale, solarize, color_jitter):
        globals()[operator.__name__] = torch.compile(operator)
