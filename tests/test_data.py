"""The built-in shapes, and datasets from files: what they hold, and what is said about broken
ones."""

import dataclasses
import itertools
import shutil
import struct
import threading
import urllib.error

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageOps

import common

# ==================================================================================================
# Shapes
# ==================================================================================================


@pytest.fixture(scope="module")
def shapes():
    return common.load_dataset("shapes")


def scenes_of(count, **fixed):
    scenes = common.sample_shapes(count, torch.Generator().manual_seed(1))
    return scenes | fixed


def silhouettes(size=64):
    """Each of the ten, upright in the middle of the frame, white on black: (10, size, size) in [0,
    1]."""
    white, black = list(common.COLORS).index("white"), list(common.COLORS).index("black")
    scenes = scenes_of(
        10,
        label=torch.arange(10),
        half_width=torch.ones(10),
        center=torch.zeros(10, 2),
        tilt=torch.zeros(10),
        color=torch.full((10,), white),
        background=torch.full((10, 2), black),
    )
    return common.draw_shapes(scenes, torch.Generator().manual_seed(0), size)[:, 0] / 255


def test_no_silhouette_equals_itself_turned_or_another_one():
    images = silhouettes()
    for i, one in enumerate(images):
        for turns in (1, 2, 3):
            for turned in (one.rot90(turns), one.rot90(turns).flip(1)):
                assert (one - turned).abs().mean() > 0.05, (i, turns)
        for j, other in enumerate(images):
            assert i == j or (one - other).abs().mean() > 0.05, (i, j)


def test_silhouettes_fit_the_unit_disc():
    axis = torch.linspace(-1.5, 1.5, 301)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    for name, inside in common.SHAPES.items():
        radius = torch.hypot(x, y)[inside(x, y)].max()
        assert 0.9 < radius <= 1, name


def test_splits_are_balanced_and_differ(shapes):
    assert shapes.train_images.shape == (4096, 3, 32, 32) and shapes.test_images.shape == (
        2000,
        3,
        32,
        32,
    )
    assert shapes.train_images.dtype == torch.uint8
    assert shapes.train_labels.bincount().tolist() == [410] * 6 + [409] * 4
    assert shapes.test_labels.bincount().tolist() == [200] * 10
    assert shapes.classes == list(common.SHAPES)
    seen = {image.tobytes() for image in shapes.train_images.numpy()}
    assert not any(image.tobytes() in seen for image in shapes.test_images.numpy())


def test_nuisances_are_independent_of_the_class():
    N = 20_000
    scenes = scenes_of(N)
    own = F.one_hot(scenes["label"], 10).bool()  # (N, 10)
    numbers = [
        scenes["half_width"],
        scenes["tilt"],
        scenes["direction"],
        *scenes["center"].unbind(1),
    ]
    indicators = [
        F.one_hot(c, 10).float() for c in (scenes["color"], *scenes["background"].unbind(1))
    ]
    values = torch.cat([torch.stack(numbers, dim=1), *indicators], dim=1)  # (N, 35)
    values = (values - values.mean(0)) / values.std(0)
    means = (
        torch.stack([values[own[:, k]].mean(0) for k in range(10)]) * (N / 10) ** 0.5
    )  # standard normal, 350 of them
    assert means.abs().max() < 4.5
    assert 0.85 < means.std() < 1.15


def test_ranges_of_the_nuisances():
    scenes = scenes_of(20_000)
    half_width, center = scenes["half_width"], scenes["center"]
    assert (
        half_width.min() >= 0.60
        and half_width.max() <= 0.85
        and abs(half_width.mean() - 0.725) < 0.003
    )
    assert scenes["tilt"].abs().max() <= 0.25 and abs(scenes["tilt"].mean()) < 0.005
    assert (center.abs().amax(1) + half_width).max() <= 1  # nothing leaves the frame
    assert (scenes["color"].bincount() / 20_000 - 0.1).abs().max() < 0.01


def test_foreground_is_apart_from_every_mixture_of_the_background():
    scenes = scenes_of(2000)
    palette = torch.tensor(list(common.COLORS.values())) / 255
    one, two = palette[scenes["background"]].unbind(1)
    assert (scenes["background"][:, 0] != scenes["background"][:, 1]).all()
    mixtures = torch.lerp(
        one[:, None], two[:, None], torch.linspace(0, 1, 50)[None, :, None]
    )  # (N, 50, 3)
    assert (mixtures - palette[scenes["color"]][:, None]).norm(dim=2).min() > 0.35


def test_a_seed_fixes_the_images(shapes):
    draw = lambda seed: common.draw_shapes(scenes_of(20), torch.Generator().manual_seed(seed))  # noqa: E731
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    again = common.load_dataset("shapes")
    assert (
        torch.equal(shapes.train_images, again.train_images)
        and shapes.test_captions == again.test_captions
    )


def test_captions_name_what_is_drawn():
    scenes = scenes_of(500)
    captions = common.describe_shapes(scenes, torch.Generator().manual_seed(0))
    shapes, colors = list(common.SHAPES), list(common.COLORS)
    for i, texts in enumerate(captions):
        *brief, full = (text.replace(",", "").split() for text in texts)
        assert all(shapes[scenes["label"][i]] in words for words in (*brief, full))
        assert [colors[scenes["color"][i]] in words for words in (*brief, full)] == [
            False,
            False,
            True,
            True,
            True,
        ]
        assert all(colors[c] in full for c in scenes["background"][i])
        size = next(word for word in full if word in common.SIZES)
        low = 0.60 + 0.25 / 3 * common.SIZES.index(size)
        assert low - 1e-6 <= scenes["half_width"][i] <= low + 0.25 / 3 + 1e-6
        assert not any(f" a {vowel}" in f" {text}" for text in texts for vowel in "aeiou")
    assert len({texts[-1].split()[0] for texts in captions}) > 2  # varied wording


# ==================================================================================================
# Files
# ==================================================================================================


def arrays(count=6, **changed):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(count) % 3
    return {
        "train_images": images,
        "train_labels": labels,
        "test_images": images,
        "test_labels": labels,
    } | changed


def test_npz(tmp_path):
    expected = arrays()
    np.savez(tmp_path / "mine.npz", **expected)
    data = common.load_dataset(str(tmp_path / "mine.npz"))
    assert np.array_equal(data.train_images.permute(0, 2, 3, 1).numpy(), expected["train_images"])
    assert data.train_images.is_contiguous(memory_format=torch.channels_last)
    assert data.train_labels.tolist() == [0, 1, 2, 0, 1, 2] and data.classes == ["0", "1", "2"]


@pytest.mark.parametrize("channel", [(), (1,)])
def test_npz_as_medmnist_writes_it(tmp_path, channel):
    gray, column = (
        arrays()["train_images"][..., 0],
        arrays()["train_labels"].astype(np.uint8)[:, None],
    )
    written = arrays(
        train_images=gray.reshape(6, 8, 8, *channel), train_labels=column, val_images=gray
    )
    np.savez_compressed(tmp_path / "mine.npz", **written, val_labels=column)
    data = common.load_dataset(str(tmp_path / "mine.npz"))
    assert data.train_images.shape == (6, 3, 8, 8) and data.train_labels.shape == (6,)
    assert data.train_images.is_contiguous(memory_format=torch.channels_last)
    assert all(np.array_equal(data.train_images[:, c].numpy(), gray) for c in range(3))


def test_npz_whose_labels_are_dates(tmp_path, capsys):
    dates = np.array([20240102, 20240101, 20240102, 20240106, 20240101, 20240106])
    np.savez(
        tmp_path / "mine.npz",
        **arrays(train_labels=dates.astype(np.uint64), test_labels=dates[::-1]),
    )
    data = common.load_dataset(str(tmp_path / "mine.npz"))
    assert data.train_labels.tolist() == [1, 0, 1, 2, 0, 2] and data.test_labels.tolist() == [
        2,
        0,
        2,
        1,
        0,
        1,
    ]
    assert data.classes == ["20240101", "20240102", "20240106"]
    printed = "6 training, 6 test images, 3 classes, labels 20240101 to 20240106 numbered anew\n"
    assert capsys.readouterr().out == f"{tmp_path / 'mine.npz'}: {printed}"


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (np.array(["cat", "dog", "owl"]), ["cat", "dog", "owl"]),
        (np.array([b"cat", b"dog", b"owl"]), ["cat", "dog", "owl"]),
        (np.array([7, 8, 9]), ["7", "8", "9"]),
        (np.array(["cat"]), ["0", "1", "2"]),
    ],
)
def test_npz_with_class_names(tmp_path, names, classes):
    np.savez(tmp_path / "mine.npz", **arrays(), classes=names)
    assert common.load_dataset(str(tmp_path / "mine.npz")).classes == classes


def test_npz_with_a_name_for_a_class_that_is_not_there(tmp_path):
    labels = np.array([0, 3, 1, 0, 3, 1])
    names = np.array(["cat", "dog", "owl", "yak"])
    np.savez(
        tmp_path / "mine.npz", **arrays(train_labels=labels, test_labels=labels), classes=names
    )
    data = common.load_dataset(str(tmp_path / "mine.npz"))
    assert [data.classes[label] for label in data.train_labels] == [
        names[label] for label in labels
    ]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train_images": np.zeros((6, 8, 8, 3), np.float32)}, "train_images is float32"),
        ({"test_images": np.zeros((6, 8, 9, 3), np.uint8)}, "test_images is uint8"),
        ({"test_images": np.zeros((6, 8, 8, 2), np.uint8)}, "test_images is uint8"),
        ({"test_labels": np.full(6, 2**64 - 1, np.uint64)}, "not 6 class numbers from 0 on"),
        ({"test_images": np.zeros((6, 9, 9, 3), np.uint8)}, "differ in size"),
        (
            {"train_images": np.zeros((0, 8, 8, 3), np.uint8), "train_labels": np.zeros(0, int)},
            "train_images is uint8",
        ),
        ({"train_labels": np.zeros(7, int)}, "not 6 class numbers"),
        ({"train_labels": np.zeros(0, int)}, "not 6 class numbers"),
        ({"train_labels": np.array(3)}, "not 6 class numbers"),
        ({"test_labels": np.zeros(5, int)}, "not 6 class numbers"),
        ({"train_labels": np.zeros(6)}, "train_labels is float64"),
        ({"test_labels": np.full(6, -1)}, "not 6 class numbers from 0 on"),
        ({"test_labels": np.array([object()] * 6)}, "not a readable .npz file"),
    ],
)
def test_npz_with_a_bad_array(tmp_path, changed, message):
    np.savez(tmp_path / "mine.npz", **arrays(**changed))
    with pytest.raises(common.UserError, match=message) as caught:
        common.load_dataset(str(tmp_path / "mine.npz"))
    assert "\n" not in str(caught.value) and "mine.npz" in str(caught.value)


def test_npz_that_is_missing_cut_short_or_something_else(tmp_path):
    path = tmp_path / "mine.npz"
    with pytest.raises(common.UserError, match="mine.npz: no such file"):
        common.load_dataset(str(path))
    np.savez(path, **arrays())
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"text", whole[:600] + b"torn" + whole[604:]):
        path.write_bytes(content)
        with pytest.raises(common.UserError, match="mine.npz: not a readable .npz file"):
            common.load_dataset(str(path))
    np.savez(path, x=np.zeros(1))
    with pytest.raises(common.UserError, match="has no array train_images"):
        common.load_dataset(str(path))
    np.savez(path, **{key: array for key, array in arrays().items() if key != "test_images"})
    with pytest.raises(common.UserError, match="has no array test_images"):
        common.load_dataset(str(path))


def test_npz_of_images_alone(tmp_path, capsys):
    np.savez(tmp_path / "mine.npz", train_images=arrays(25)["train_images"])
    data = common.load_dataset(str(tmp_path / "mine.npz"))
    assert (
        data.train_images.shape == (22, 3, 8, 8)
        and data.classes == []
        and len(data.train_labels) == 0
    )
    assert data.train_images.is_contiguous(memory_format=torch.channels_last)
    assert data.test_images.shape == (3, 3, 8, 8) and data.test_labels.tolist() == [
        0,
        1,
        2,
    ]  # held out
    assert capsys.readouterr().out.endswith("mine.npz: 22 training, 3 test images, no classes\n")
    both = torch.cat([data.train_images, data.test_images]).permute(0, 2, 3, 1)
    assert sorted(map(bytes, both.numpy())) == sorted(map(bytes, arrays(25)["train_images"]))


def test_unknown_name():
    with pytest.raises(common.UserError, match="--dataset cifar: not shapes, cifar10"):
        common.load_dataset("cifar")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_downloaded_once(tmp_path, monkeypatch, name):
    calls = []

    class Fake:
        classes = ["cat", "dog", "owl"]

        def __init__(self, root, train, download):
            calls.append(train)
            self.data, self.targets = (
                arrays(6 if train else 3)["train_images"],
                [0, 1, 2, 0, 1, 2][: 6 if train else 3],
            )

    monkeypatch.setattr(torchvision.datasets, name.upper(), Fake)
    first = common.load_dataset(name, tmp_path / "new")
    second = common.load_dataset(name, tmp_path / "new")
    assert calls == [True, False] and [p.name for p in (tmp_path / "new").iterdir()] == [
        f"{name}.npz"
    ]
    assert torch.equal(first.train_images, second.train_images) and len(first.test_labels) == 3
    assert second.classes == ["cat", "dog", "owl"]


def test_stl10_has_more_images_than_labels(tmp_path, monkeypatch):
    class Fake:
        classes = ["cat", "dog", "owl"]

        def __init__(self, root, split, download):
            count = {"train+unlabeled": 9, "test": 3}[split]
            self.data = arrays(count)["train_images"].transpose(0, 3, 1, 2)
            self.labels = np.array([0, 1, 2, -1, -1, -1, -1, -1, -1][:count])

    monkeypatch.setattr(torchvision.datasets, "STL10", Fake)
    data = common.load_dataset("stl10", tmp_path)
    assert np.array_equal(data.train_images.permute(0, 2, 3, 1), arrays(9)["train_images"])
    assert data.train_labels.tolist() == data.test_labels.tolist() == [0, 1, 2]
    assert data.train_images.is_contiguous(memory_format=torch.channels_last)


def test_larger_images_shrink(tmp_path):
    np.savez(tmp_path / "mine.npz", **arrays())
    data, small = (
        common.load_dataset(str(tmp_path / "mine.npz"), image_size=size) for size in (8, 4)
    )
    assert small.train_images.shape == (6, 3, 4, 4) and small.train_images.dtype == torch.uint8
    assert small.train_images.is_contiguous(memory_format=torch.channels_last)
    expected = TF.resize(data.train_images, [4, 4], antialias=True)
    assert (small.train_images.int() - expected.int()).abs().max() <= 1


def test_cifar10_without_network(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fail)
    with pytest.raises(common.UserError, match="--dataset cifar10: .* cannot be downloaded"):
        common.load_dataset("cifar10", tmp_path)
    assert list(tmp_path.iterdir()) == []


# ==================================================================================================
# Folders of images
# ==================================================================================================


def save_image(path, color=(90, 90, 90), size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


@pytest.fixture
def folder(tmp_path):
    """train: 3 red cats, 2 blue dogs; val: a cat and a dog."""
    for name in ("train/cat/a.png", "train/cat/deeper/b.jpg", "train/cat/c.PNG", "val/cat/x.png"):
        save_image(tmp_path / "pets" / name, (250, 0, 0))
    for name in ("train/dog/a.png", "train/dog/b.bmp", "val/dog/x.png"):
        save_image(tmp_path / "pets" / name, (0, 0, 250))
    (tmp_path / "pets/train/cat/notes.txt").write_text("no image")
    return tmp_path / "pets"


def test_class_folders(folder, tmp_path, capsys):
    data = common.load_dataset(str(folder), tmp_path / "cache", image_size=16)
    assert data.classes == ["cat", "dog"] and data.train_images.shape == (5, 3, 16, 16)
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1] and data.test_labels.tolist() == [0, 1]
    assert data.train_images.is_contiguous(memory_format=torch.channels_last)
    assert (data.train_images[data.train_labels == 0][:, 0] > 240).all()
    assert (data.test_images[1, 2] > 240).all()
    assert capsys.readouterr().out.endswith(
        "pets: 5 training, 2 test images, 2 classes; left out: 1 .txt\n"
    )


@pytest.mark.parametrize(
    ("train", "test", "left_out", "classes"),
    [
        ("Train/cat/a Train/dog/b", "TEST/cat/c TEST/dog/d", "", "cat dog"),
        ("training/cat/a training/dog/b", "Validation/dog/d", "", "cat dog"),
        ("train/cat/a train/dog/b", "test/cat/c", "val/dog/d e", "cat dog"),
        ("train/a train/b", "test/c", "d", ""),
        ("train/images/a train/images/b", "test/images/c", "", ""),
        ("train2017/a train2017/b", "val2017/c", "", ""),
    ],
)
def test_layouts(tmp_path, capsys, train, test, left_out, classes):
    train, test, left_out, classes = (words.split() for words in (train, test, left_out, classes))
    for i, name in enumerate(train + test + left_out):
        save_image(tmp_path / "mine" / f"{name}.png", (i, i, i))
    data = common.load_dataset(str(tmp_path / "mine"), tmp_path / "cache", 8)
    assert data.train_images[:, 0, 0, 0].tolist() == list(range(len(train)))
    assert data.test_images[:, 0, 0, 0].tolist() == list(range(len(train), len(train + test)))
    assert data.classes == classes
    for names, labels in ((train, data.train_labels), (test, data.test_labels)) if classes else ():
        assert [name.split("/")[1] for name in names] == [classes[label] for label in labels]
    said = f"; left out: {len(left_out)} images elsewhere" if left_out else ""
    assert capsys.readouterr().out.endswith(f"test images, {len(classes) or 'no'} classes{said}\n")


@pytest.mark.parametrize("above", ["", "train/"])
def test_class_folders_alone_are_split_by_the_names(tmp_path, capsys, above):
    for i in range(200):
        save_image(tmp_path / f"mine/{above}{('cat', 'dog')[i % 2]}/{i}.png", (i, i, i), (8, 8))
    data = common.load_dataset(str(tmp_path / "mine"), tmp_path / "cache", 8)
    assert data.classes == ["cat", "dog"] and 25 < len(data.test_images) < 55
    assert (
        "test images, 2 classes, split 80 : 20 by a hash of the names\n" in capsys.readouterr().out
    )
    tests = set(data.test_images[:, 0, 0, 0].tolist())
    assert (
        tests.isdisjoint(data.train_images[:, 0, 0, 0].tolist())
        and len(data.train_images) + len(tests) == 200
    )
    for images, labels in (
        (data.train_images, data.train_labels),
        (data.test_images, data.test_labels),
    ):
        assert torch.equal(images[:, 0, 0, 0] % 2, labels)
    for i in range(200, 250):  # further images move none
        save_image(tmp_path / f"mine/{above}cat/{i}.png", (i, i, i), (8, 8))
    more = common.load_dataset(str(tmp_path / "mine"), tmp_path / "cache", 8).test_images[
        :, 0, 0, 0
    ]
    assert {value for value in more.tolist() if value < 200} == tests


def test_plain_images_have_no_classes(tmp_path, capsys):
    for i in range(21):
        Image.new("L", (8, 8), i).save(tmp_path / f"{i:02}.png")
    data = common.load_dataset(str(tmp_path), tmp_path / "cache", 8)
    assert (
        data.train_images.shape == (18, 3, 8, 8)
        and data.classes == []
        and len(data.train_labels) == 0
    )
    assert len(data.test_images) == len(data.test_labels) == 3  # held out
    values = torch.cat([data.test_images, data.train_images])[:, 0, 0, 0].tolist()
    assert sorted(values) == list(range(21)) != values  # not the first by name
    assert "18 training, 3 test images, no classes\n" in capsys.readouterr().out


def test_what_is_hidden_or_of_a_run_does_not_count_and_what_is_left_out_does(tmp_path, capsys):
    for name in (
        "cat/a.png",
        "dog/b.png",
        "cat/._a.png",
        ".ipynb_checkpoints/a.png",
        "__MACOSX/cat/._a.png",
        "run/views.png",
    ):
        save_image(tmp_path / "mine/train" / name)
        save_image(tmp_path / "mine/test" / name)
    for name in (
        "train/run/args.json",
        "test/run/args.json",
        "a.GIF",
        "train/cat/b.gif",
        "train/c.heic",
        "README",
        ".hidden",
    ):
        (tmp_path / "mine" / name).write_text("no image")
    (tmp_path / "mine/train/cat/d.png").symlink_to("nowhere.png")
    (tmp_path / "mine/train/cat/e.jpg").symlink_to("nowhere.jpg")
    data = common.load_dataset(str(tmp_path / "mine"), tmp_path / "cache", 8)
    assert len(data.train_images) == len(data.test_images) == 2 and data.classes == ["cat", "dog"]
    said = capsys.readouterr().out.split("left out: ")[1].strip().split(", ")
    assert sorted(said) == ["1 .heic", "1 without suffix", "2 .gif", "2 broken links"]


def test_linked_folders_are_followed_once(tmp_path, capsys):
    for name in (
        "mine/train/cat/a.png",
        "elsewhere/b.png",
        "elsewhere/deeper/c.png",
        "mine/test/cat/d.png",
        "mine/test/dog/e.png",
    ):
        save_image(tmp_path / name)
    (tmp_path / "mine/train/dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "mine/train/cat/all").symlink_to(tmp_path / "mine")
    data = common.load_dataset(str(tmp_path / "mine"), tmp_path / "cache", 8)
    assert data.train_labels.tolist() == [0, 1, 1] and data.test_labels.tolist() == [0, 1]


def test_the_middle_square_upright(tmp_path):
    image = Image.new("RGB", (60, 20), (0, 0, 0))
    image.paste((255, 255, 255), (20, 0, 40, 10))  # white above black in the middle
    exif = image.getexif()
    exif[0x0112] = 3  # shot upside down
    image.rotate(180).save(tmp_path / "a.png", exif=exif)
    expected = np.repeat(np.array([255, 0], np.uint8), 10)[:, None, None].repeat(20, 1).repeat(3, 2)
    assert np.array_equal(common.decode_image(tmp_path / "a.png", 20), expected)


RAMP = np.linspace(0, 1, 64).reshape(8, 8)


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("a.png", (65535 * RAMP).astype(np.uint16), 255 * RAMP),
        ("a.tif", (65535 * RAMP).astype(np.uint16), 255 * RAMP),
        ("a.tif", (65535 * RAMP).astype(np.int32), 255 * RAMP),
        ("a.pgm", (65535 * RAMP).astype(np.uint16), 255 * RAMP),
        ("a.tif", RAMP.astype(np.float32), 255 * RAMP),
        ("a.png", RAMP > 0.5, 255 * (RAMP > 0.5)),
        (
            "a.png",
            np.stack([0 * RAMP] * 3 + [255 * RAMP], axis=2).astype(np.uint8),
            255 - 255 * RAMP,
        ),  # black on clear
        ("a.png", np.stack([0 * RAMP] + [255 * RAMP], axis=2).astype(np.uint8), 255 - 255 * RAMP),
    ],
)
def test_other_modes_become_what_one_sees(tmp_path, name, image, expected):
    Image.fromarray(image).save(tmp_path / name)
    decoded = common.decode_image(tmp_path / name, 8)
    assert decoded.dtype == np.uint8 and np.abs(decoded - expected[..., None]).max() <= 1.01


def test_a_transparent_color_of_a_palette_is_white(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([200, 0, 0, 0, 200, 0])
    image.paste(0, (0, 0, 4, 8))
    image.save(tmp_path / "a.png", transparency=1)
    decoded = common.decode_image(tmp_path / "a.png", 8)
    assert (decoded[:, :4] == [200, 0, 0]).all() and (decoded[:, 4:] == 255).all()


@pytest.mark.parametrize(
    ("image", "values"),
    [
        ((4095 * RAMP).astype(np.uint16), "from 0 to 0.0625"),
        ((65535 * RAMP - 500).astype(np.int32), "from -0.00763"),
        ((10**6 * RAMP).astype(np.int32), "from 0 to 15.3"),
        ((255 * RAMP).astype(np.float32), "from 0 to 255"),
        (np.full((8, 8), np.nan, np.float32), "from nan to nan"),
        (np.where(RAMP > 0.5, np.inf, 0).astype(np.float32), "from 0 to inf"),
    ],
)
def test_what_would_be_all_white_or_all_black_is_refused(tmp_path, image, values):
    Image.fromarray(image).save(tmp_path / "a.tif")
    with pytest.raises(
        common.UserError, match=f"a.tif: not a readable image .its values run {values}"
    ):
        common.decode_image(tmp_path / "a.tif", 8)


def count_decoded(monkeypatch):
    decoded, decode_image = [], common.decode_image
    monkeypatch.setattr(
        common, "decode_image", lambda file, size: decoded.append(file) or decode_image(file, size)
    )
    return decoded


def test_a_folder_is_decoded_once_and_again_when_it_has_changed(
    folder, tmp_path, monkeypatch, capsys
):
    decoded = count_decoded(monkeypatch)
    first = common.load_dataset(str(folder), tmp_path / "cache", 16)
    assert "7 of 7 images" in capsys.readouterr().out
    again = common.load_dataset(str(folder), tmp_path / "cache", 16)
    assert len(decoded) == 7 and torch.equal(first.train_images, again.train_images)
    assert "decoding" not in capsys.readouterr().out
    save_image(folder / "train/dog/c.png", (0, 0, 250))
    changed = common.load_dataset(str(folder), tmp_path / "cache", 16)
    assert len(decoded) == 15 and len(changed.train_images) == 6
    assert (
        torch.equal(changed.test_images, first.test_images)
        and (first.train_images[0, 0] > 240).all()
    )


def test_former_decoded_images_of_a_folder_are_removed_and_no_others(folder, tmp_path):
    cache, same_name = tmp_path / "cache", tmp_path / "other/pets"
    shutil.copytree(folder, same_name)
    for path, size in ((folder, 16), (folder, 8), (same_name, 8)):
        common.load_dataset(str(path), cache, size)
    before = {file.name: file.stat().st_size for file in cache.iterdir()}
    assert sorted(before.values()) == [7 * 8 * 8 * 3] * 2 + [7 * 16 * 16 * 3]
    save_image(folder / "train/dog/c.png")
    common.load_dataset(str(folder), cache, 8)
    after = {file.name: file.stat().st_size for file in cache.iterdir()}
    assert (
        sorted(after.values()) == [7 * 8 * 8 * 3, 8 * 8 * 8 * 3, 7 * 16 * 16 * 3]
        and len(set(before) & set(after)) == 2
    )


def test_an_interrupted_cache_is_rebuilt(folder, tmp_path, monkeypatch):
    decode_image, calls = common.decode_image, []

    def interrupted(file, size):
        calls.append(file)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return decode_image(file, size)

    monkeypatch.setattr(common, "decode_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        common.load_dataset(str(folder), tmp_path / "cache", 16)
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr(common, "decode_image", decode_image)
    assert (
        common.load_dataset(str(folder), tmp_path / "cache", 16).train_images[:, ::2].amax(1) > 240
    ).all()


def test_images_do_not_pile_up_behind_a_slow_one(tmp_path, monkeypatch):
    for i in range(1000):
        (tmp_path / f"{i:04}.png").touch()
    started, rest = [], threading.Event()

    def slow_at_first(file, size):
        started.append(file)
        if len(started) == 1:
            rest.wait(0.5)  # the other threads would do all 1,000 meanwhile
            assert len(started) <= 256
        return np.zeros((size, size, 3), np.uint8)

    monkeypatch.setattr(common, "decode_image", slow_at_first)
    data = common.load_dataset(str(tmp_path), tmp_path / "cache", 2)
    assert len(data.train_images) + len(data.test_images) == len(started) == 1000


def test_a_bad_image_is_named(folder, tmp_path):
    jpeg = (folder / "train/cat/deeper/b.jpg").read_bytes()
    for content in (jpeg[: len(jpeg) // 2], b"", b"text"):
        (folder / "train/cat/deeper/b.jpg").write_bytes(content)
        with pytest.raises(
            common.UserError, match=r"deeper.b\.jpg: not a readable image"
        ) as caught:
            common.load_dataset(str(folder), tmp_path / "cache")
        assert "\n" not in str(caught.value)


def test_odd_metadata_end_in_no_traceback(tmp_path):
    entries = struct.pack("<HHLf", 0x0100, 11, 1, 8.5) + struct.pack(
        "<HHLHH", 0x0112, 3, 1, 6, 0
    )  # a float as width
    exif = b"Exif\0\0II*\0" + struct.pack("<LH", 8, 2) + entries + bytes(4)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=exif)
    with pytest.raises(struct.error):
        ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg"))
    with pytest.raises(common.UserError, match="a.jpg: not a readable image"):
        common.decode_image(tmp_path / "a.jpg", 8)


def test_the_good_ones_of_a_folder_without_classes_are_kept_too(tmp_path, monkeypatch):
    for i in range(30):
        save_image(tmp_path / f"mine/{i:02}.png", (i, i, i))
    for i in (3, 20):
        (tmp_path / f"mine/{i:02}.png").write_text("text")
    with pytest.raises(common.UserError, match="03.png: not a readable image.*20.png"):
        common.load_dataset(str(tmp_path / "mine"), tmp_path / "cache", 8)
    for i in (3, 20):
        (tmp_path / f"mine/{i:02}.png").unlink()
    decoded = count_decoded(monkeypatch)
    data = common.load_dataset(str(tmp_path / "mine"), tmp_path / "cache", 8)
    values = torch.cat([data.train_images, data.test_images])[:, 0, 0, 0].tolist()
    assert decoded == [] and sorted(values) == [i for i in range(30) if i not in (3, 20)]


def test_all_bad_images_are_named_at_once_and_the_others_are_kept(folder, tmp_path, monkeypatch):
    bad = [folder / f"train/cat/{i:02}.png" for i in range(12)]
    for file in bad:
        file.write_text("text")
    with pytest.raises(common.UserError) as caught:
        common.load_dataset(str(folder), tmp_path / "cache", 16)
    message = str(caught.value)
    assert (
        all(f"{file}: not a readable image" in message for file in bad[:10])
        and str(bad[10]) not in message
    )
    assert message.endswith("; and 2 more; mend them or take them out") and "\n" not in message
    for file in bad:
        file.unlink()
    decoded = count_decoded(monkeypatch)
    data = common.load_dataset(str(folder), tmp_path / "cache", 16)
    assert (
        decoded == []
        and (data.train_images[:, ::2].amax(1) > 240).all()
        and len(data.test_images) == 2
    )


def test_no_damaged_file_ends_in_a_traceback(tmp_path):
    generator, originals = np.random.default_rng(0), []
    pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for name, image in itertools.product(
        ("a.jpg", "a.png", "a.bmp", "a.ppm", "a.tif", "a.webp"),
        (Image.fromarray(pixels), Image.fromarray(pixels[..., 0])),
    ):
        image.save(tmp_path / name)
        originals.append((name, (tmp_path / name).read_bytes()))
    decoded = refused = 0
    for i in range(2000):
        name, content = originals[i % len(originals)]
        content = bytearray(content)
        for place in generator.integers(0, len(content), generator.integers(1, 8)):
            content[place] = generator.integers(256)
        (tmp_path / name).write_bytes(
            content[: generator.integers(len(content)) if i % 3 == 0 else None]
        )
        try:
            assert common.decode_image(tmp_path / name, 8).shape == (8, 8, 3)
            decoded += 1
        except common.UserError as error:
            assert name in str(error) and "\n" not in str(error)
            refused += 1
    assert decoded > 200 and refused > 200


def test_bad_folders(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(common.UserError, match="empty: there are no images in it"):
        common.load_dataset(str(tmp_path / "empty"), tmp_path / "cache")
    (tmp_path / "file").write_text("")
    with pytest.raises(common.UserError, match="--data-dir .*file: cannot be written"):
        common.load_dataset(str(folder), tmp_path / "file")
    save_image(folder / "val/cow/x.png", (0, 250, 0))
    with pytest.raises(
        common.UserError, match="pets: test images lie in cow, which is no class of train"
    ):
        common.load_dataset(str(folder), tmp_path / "cache")
    shutil.rmtree(folder / "val")
    save_image(folder / "val/x.png", (0, 250, 0))
    with pytest.raises(
        common.UserError, match="pets: test images lie in no folder, which is no class of train"
    ):
        common.load_dataset(str(folder), tmp_path / "cache")
    for name in ("cat/a.png", "dog/c.png"):  # whose hashes are not among the fifth
        save_image(tmp_path / "two" / name)
    with pytest.raises(
        common.UserError, match="two: too few images, 2, to hold some out as test images"
    ):
        common.load_dataset(str(tmp_path / "two"), tmp_path / "cache")
    save_image(tmp_path / "one/a.png")
    with pytest.raises(common.UserError, match="one: too few images, 1, to hold"):
        common.load_dataset(str(tmp_path / "one"), tmp_path / "cache")


# ==================================================================================================
# Captions
# ==================================================================================================


@pytest.fixture
def captioned(tmp_path):
    """Thirty gray images in images/, the i-th of brightness i, and a function that writes rows and
    loads them."""
    root = tmp_path / "captioned"
    for i in range(30):
        save_image(root / "images" / f"{i:02}.png", (i, i, i))

    def load(rows, name="captions.csv", encoding="utf-8"):
        (root / name).write_bytes("".join(row + "\n" for row in rows).encode(encoding))
        return common.load_dataset(str(root), tmp_path / "data", 8)

    return load


def contents(data):
    """{split: {brightness of an image: its captions}}"""
    parts = {
        "train": (data.train_images, data.train_captions),
        "val": (data.val_images if data.val_captions else [], data.val_captions or []),
        "test": (data.test_images, data.test_captions),
    }
    return {
        split: {
            int(image[0, 0, 0]): captions for image, captions in zip(images, texts, strict=True)
        }
        for split, (images, texts) in parts.items()
    }


@pytest.mark.parametrize("name", ["captions.csv", "captions.txt"])
def test_images_without_a_split_are_split_by_name_whatever_the_order(captioned, name):
    rows = [f'{i:02}.png,"image {i}, caption {j}"' for i in range(30) for j in range(3)]
    straight = contents(captioned(["image,caption", *rows], name))
    mixed = contents(captioned(["image,caption", *(rows[k * 7 % 90] for k in range(90))], name))
    assert {s: {i: sorted(c) for i, c in part.items()} for s, part in mixed.items()} == straight
    assert sorted(i for part in straight.values() for i in part) == list(range(30))
    assert len(straight["train"]) > 15
    for part in straight.values():
        assert all(
            texts == [f"image {i}, caption {j}" for j in range(3)] for i, texts in part.items()
        )


def test_captions_with_splits(captioned):
    splits = ["train", "test", "val"]
    rows = [f"images/{i:02}.png,{splits[i % 3]},number {i}" for i in range(30)]
    parts = contents(captioned(["image,split,caption", *reversed(rows)], encoding="utf-8-sig"))
    assert parts == {s: {i: [f"number {i}"] for i in range(k, 30, 3)} for k, s in enumerate(splits)}


def test_images_may_lie_elsewhere(captioned, tmp_path):
    save_image(tmp_path / "elsewhere.png", (200, 200, 200))
    (tmp_path / "captioned/linked.png").symlink_to(tmp_path / "elsewhere.png")
    parts = contents(
        captioned([HEADER, *GOOD, "linked.png,gray,val", f"{tmp_path}/elsewhere.png,bright,val"])
    )
    assert parts["val"] == {200: ["gray", "bright"]}


HEADER = "image,caption,split"
GOOD = ["00.png,a thing,train", "01.png,a thing,test"]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "the header is []"),
        (["name,text", *GOOD], "the header is ['name', 'text']"),
        ([HEADER, *GOOD, "99.png,a thing,train"], "row 4: there is no image 99.png"),
        ([HEADER, GOOD[0], "01.png, ,test"], "row 3: the caption is empty"),
        ([HEADER, ",a thing,test", *GOOD], "row 2: the image is empty"),
        (
            [HEADER, GOOD[0], "01.png,a thing, a comma,test"],
            "row 3: has more fields than the header",
        ),
        ([HEADER, *GOOD, "02.png"], "row 4: the caption is empty"),
        ([HEADER, *GOOD, "02.png,a thing,dev"], "row 4: split 'dev'"),
        (
            [HEADER, *GOOD, "images/00.png,another caption,test"],
            "row 4: images/00.png is in test here, but in train",
        ),
        (
            [HEADER, *GOOD, "images/../images/00.png,a thing,test"],
            "row 4: images/../images/00.png is in test here",
        ),
        (
            [HEADER, *GOOD, '02.png,"a "thing"",train'],
            "cannot be read as CSV in UTF-8 after 2 rows",
        ),
        (
            [HEADER, GOOD[0]],
            "none of 1 images is in train, or none in test; a column split can say so",
        ),
        (["image,caption", "00.png,a thing"], "none of 1 images is in train, or none in test"),
    ],
)
def test_bad_captions_are_named_by_file_and_row(captioned, rows, message):
    with pytest.raises(common.UserError, match="captions.csv") as caught:
        captioned(rows)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_header_with_spaces_and_capitals(captioned, capsys):
    parts = contents(
        captioned(
            ["Image, Caption , SPLIT", '00.png, "a thing, red", Train', "01.png ,another, test"]
        )
    )
    assert parts == {"train": {0: ["a thing, red"]}, "val": {}, "test": {1: ["another"]}}
    assert "1 training, 1 test images, 0 for validation, 2 captions\n" in capsys.readouterr().out


def test_all_bad_captions_are_named_at_once(captioned):
    with pytest.raises(common.UserError) as caught:
        captioned([HEADER, *GOOD, *(f"{i}.png,a thing,train" for i in range(900, 915))])
    message = str(caught.value)
    assert (
        "row 4: there is no image 900.png" in message
        and "row 13: there is no image 909.png" in message
    )
    assert "910.png" not in message and message.endswith("; and 5 more; mend them or take them out")


def test_captions_in_another_encoding(captioned):
    with pytest.raises(common.UserError, match="captions.csv: cannot be read as CSV in UTF-8"):
        captioned([HEADER, GOOD[0], "01.png,une pomme dorée,test"], encoding="latin-1")


# ==================================================================================================
# Batches
# ==================================================================================================


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_batches_follow_the_order_and_leave_out_the_rest(monkeypatch, kind):
    images, order = torch.arange(50).view(50, 1, 1, 1), torch.randperm(50)[:23]
    resident = [*common.batches(images, order, 5, torch.device("cpu"))]
    assert len(resident) == 4 and torch.equal(torch.cat(resident).flatten(), order[:20])
    pinned, moved = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    monkeypatch.setattr(
        torch.Tensor,
        "to",
        lambda x, device, **_: x if x is order else moved.append(device.type) or x,
    )
    streamed = [*common.batches(images, order, 5, torch.device(kind))]
    assert torch.equal(torch.cat(streamed), torch.cat(resident))
    assert len(pinned) == (4 if kind == "cuda" else 0) and moved.count(kind) == 4  # mps cannot pin


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_images_that_do_not_fit_stay_in_main_memory(monkeypatch, kind):
    data = common.Dataset(
        torch.zeros(9, 3, 8, 8), torch.zeros(9), torch.zeros(1, 3, 8, 8), torch.zeros(1), ["0"]
    )
    for free, fits in ((10**6, True), (10**4, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, free))
        monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda free=free: free + 5)
        monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 5)
        moved = {}
        monkeypatch.setattr(
            torch.Tensor, "to", lambda x, device, moved=moved: moved.setdefault(x.data_ptr(), x)
        )
        data.to(torch.device(kind))
        assert (
            data.train_images.data_ptr() in moved
        ) == fits and data.train_labels.data_ptr() in moved


# ==================================================================================================
# Few labels
# ==================================================================================================


def test_labelled_rows_are_balanced_and_drawn():
    labels = torch.tensor([0] * 100 + [1] * 60 + [3] * 40)[torch.randperm(200)]
    for amount, counts in (
        (0.1, [10, 6, 0, 4]),
        (1.0, [100, 60, 0, 40]),
        (0.001, [1, 1, 0, 1]),
        ("1.0", [100, 60, 0, 40]),
        (1, [1, 1, 0, 1]),
        ("1", [1, 1, 0, 1]),
        (7.0, [7, 7, 0, 7]),
        ("7", [7, 7, 0, 7]),
    ):
        rows = common.labelled_rows(labels, amount, seed=0)
        assert labels[rows].bincount().tolist() == counts and len(rows.unique()) == len(rows)
    first, again, other = (common.labelled_rows(labels, 20, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and set(first.tolist()) != set(other.tolist())
    assert labels[first].tolist() != sorted(labels[first].tolist())  # in random order
    with pytest.raises(common.UserError, match="--labels 41: the smallest class has only 40"):
        common.labelled_rows(labels, 41, seed=0)
    for amount in ("0", "-1", "1.5", "nan", "inf", "few", 0.0):
        with pytest.raises(
            common.UserError,
            match="must be a fraction up to 1.0, or a whole number of labels per class",
        ):
            common.labelled_rows(labels, amount, seed=0)
    with pytest.raises(common.UserError, match="--labels 1: the dataset has no labels"):
        common.labelled_rows(labels[:0], "1", seed=0)


def test_labelled_rows_of_many_classes():
    labels = torch.randint(1000, (100_000,), generator=torch.Generator().manual_seed(0))
    order = torch.randperm(100_000, generator=torch.Generator().manual_seed(7))
    seen, expected = torch.zeros(1000, dtype=torch.int64), []
    for row in order.tolist():  # the first five of each class, as they come
        seen[labels[row]] += 1
        if seen[labels[row]] <= 5:
            expected.append(row)
    assert common.labelled_rows(labels, 5, seed=7).tolist() == expected


def test_other_images_labels_classes_or_captions_have_another_fingerprint():
    images = torch.randint(256, (1000, 3, 4, 4), dtype=torch.uint8)
    labels = torch.arange(1000) % 2
    captions = [["one"], ["another"]]
    data = common.Dataset(
        images, labels, images, labels, ["a", "b"], captions, captions, None, captions
    )
    copied = dataclasses.replace(data, train_images=images.clone(), train_labels=labels.clone())
    assert common.fingerprint(copied) == common.fingerprint(data)
    changes = [{"train_images": x} for x in (images[1:], images.flip(0), images[..., :3])]
    changes += [
        {"train_labels": labels[:-2]},
        {"train_labels": 1 - labels},
        {"classes": ["a", "c"]},
    ]
    changes += [{name: captions[::-1]} for name in ("train_captions", "val_captions")]
    changed = [dataclasses.replace(data, **change) for change in [{}, *changes]]
    assert len({tuple(common.fingerprint(x)) for x in changed}) == len(changed)
