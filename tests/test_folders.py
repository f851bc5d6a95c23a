"""Folders of images: which of them are classes, how files are decoded, and tables of captions."""

import itertools
import os
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import spy
from PIL import Image, ImageOps

import common


def save_image(path, color=(90, 90, 90), size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def brightness(images):
    """Of gray images, each of one brightness."""
    return images[:, 0, 0, 0].tolist()


@pytest.fixture
def load(tmp_path):
    """A function: the dataset in tmp_path/mine, decoded at 8 x 8."""

    def load_folder():
        return common.load_dataset(str(tmp_path / "mine"), tmp_path / "cache", 8)

    return load_folder


@pytest.fixture
def make(tmp_path):
    """A function: writes images into tmp_path/mine, the i-th of these names of brightness i."""

    def make_folder(*names):
        for i, name in enumerate(names):
            save_image(tmp_path / "mine" / f"{name}.png", (i, i, i))

    return make_folder


@pytest.fixture
def pets(tmp_path):
    """In mine, train: 3 red cats, 2 blue dogs; val: a cat and a dog."""
    root = tmp_path / "mine"
    for name in ("train/cat/a.png", "train/cat/deeper/b.jpg", "train/cat/c.PNG", "val/cat/x.png"):
        save_image(root / name, (250, 0, 0), (40, 30))
    for name in ("train/dog/a.png", "train/dog/b.bmp", "val/dog/x.png"):
        save_image(root / name, (0, 0, 250), (40, 30))
    return root


# ==================================================================================================
# Classes and splits
# ==================================================================================================


def test_class_folders(pets, load, capsys):
    (pets / "train/cat/notes.txt").write_text("no image")
    data = load()
    assert data.classes == ["cat", "dog"]
    cats = ["train/cat/a.png", "train/cat/c.PNG", "train/cat/deeper/b.jpg"]
    dogs = ["train/dog/a.png", "train/dog/b.bmp"]
    files = {"train": cats + dogs, "test": ["val/cat/x.png", "val/dog/x.png"]}
    assert data.about() == {"image_size": 8, "classes": ["cat", "dog"], "files": files}
    assert data.train_images.shape == (5, 3, 8, 8)
    assert data.train_images.is_contiguous(memory_format=torch.channels_last)
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1]
    assert data.test_labels.tolist() == [0, 1]
    assert (data.train_images[:3, 0] > 240).all()
    assert (data.test_images[1, 2] > 240).all()
    found = "5 training, 2 test images, 2 classes (cat, dog)"
    said = f"mine: {found}; left out: 1 .txt; cropped to a square: 7\n"
    assert capsys.readouterr().out.endswith(said)


@pytest.mark.parametrize(
    ("train", "test", "left_out", "classes"),
    [
        ("Train/cat/a Train/dog/b", "TEST/cat/c TEST/dog/d", "", "cat dog"),
        ("training/cat/a training/dog/b", "Validation/dog/d", "", "cat dog"),
        ("train/cat/a train/dog/b", "test/cat/c", "val/dog/d e", "cat dog"),
        ("train_set/cat/a train_set/dog/b", "test_set/cat/c", "unlabeled/d", "cat dog"),
        ("train/cat/images/a train/dog/images/b", "val/cat/c", "test/d", "cat dog"),
        ("x/y/train/cat/a x/y/train/dog/b", "x/y/test/dog/c", "x/y/extra/d", "cat dog"),
        ("seg_train/seg_train/cat/a seg_train/seg_train/dog/b", "seg_test/seg_test/cat/c", "",
         "cat dog"),
        ("train/bus/a train/train/b", "test/train/c", "", "bus train"),
        ("train/a train/b", "test/c", "d", ""),
        ("train/images/a train/images/b", "test/images/c", "", ""),
        ("train2017/a train2017/b", "val2017/c", "annotations/d", ""),
        ("trainA/a trainB/b", "testA/c testB/d", "", ""),
    ],
)  # fmt: skip
def test_layouts_with_test_images(make, load, capsys, train, test, left_out, classes):
    train = train.split()
    test = test.split()
    left_out = left_out.split()
    make(*train, *test, *left_out)
    data = load()
    assert brightness(data.train_images) == list(range(len(train)))
    assert brightness(data.test_images) == list(range(len(train), len(train + test)))
    assert data.classes == classes.split()
    if classes:
        for names, labels in ((train, data.train_labels), (test, data.test_labels)):
            assert all(f"/{data.classes[k]}/" in n for n, k in zip(names, labels, strict=True))
    found = f"2 classes ({', '.join(data.classes)})" if classes else "no classes"
    found += f"; left out: {len(left_out)} images elsewhere" if left_out else ""
    assert capsys.readouterr().out.endswith(f"test images, {found}\n")


@pytest.mark.parametrize(
    ("folders", "classes", "elsewhere"),
    [
        ("cat dog", "cat, dog", ""),
        ("train/cat train/dog", "cat, dog", ""),
        ("bus car train", "bus, car, train", ""),  # classes of DomainNet
        ("train_station valley", "train_station, valley", ""),
        ("latest train_station test_tube", "latest, test_tube, train_station", ""),
        ("archive/cat archive/dog", "cat, dog", ""),
        ("train/n01/images train/n02/images val/images", "n01, n02", "20 images elsewhere"),
        ("train/cat train/dog test", "cat, dog", "20 images elsewhere"),
        ("a b c d e f", "a, b, c, d, e, ...", ""),
    ],
)
def test_classes_without_test_images_are_split(make, load, capsys, folders, classes, elsewhere):
    names = [f"{folder}/{i}" for folder in folders.split() for i in range(20)]
    make(*names)
    data = load()
    assert 0 < len(data.test_images) < len(data.train_images) / 2
    values = brightness(torch.cat([data.train_images, data.test_images]))
    assert [f"{names[value]}.png" for value in values] == data.files["train"] + data.files["test"]
    labels = torch.cat([data.train_labels, data.test_labels])
    for value, label in zip(values, labels, strict=True):
        assert data.classes[label] in names[value].split("/")
    said = f"classes ({classes}); split 80 : 20 by a hash of the names"
    said += f"; left out: {elsewhere}" if elsewhere else ""
    assert capsys.readouterr().out.endswith(f"{said}\n")


def test_further_images_move_none_between_the_splits(tmp_path, load):
    for i in range(200):
        save_image(tmp_path / f"mine/{('cat', 'dog')[i % 2]}/{i}.png", (i, i, i))
    before = load()
    tests = set(brightness(before.test_images))
    assert 25 < len(tests) < 55
    for i in range(200, 250):
        save_image(tmp_path / f"mine/cat/{i}.png", (i, i, i))
    after = brightness(load().test_images)
    assert {value for value in after if value < 200} == tests


def test_a_class_of_one_image_is_learned(make, load):
    names = [f"cat/{i}" for i in range(30)]
    drawn = [n for n in names if common.text_hash(f"{n.replace('cat', 'owl')}.png") % 5 == 0]
    make(*names, drawn[0].replace("cat", "owl"))
    data = load()
    assert data.train_labels.bincount()[1] == 1
    assert (data.test_labels == 0).all()


def test_test_images_of_another_class_are_named(pets, load):
    save_image(pets / "val/cow/x.png")
    with pytest.raises(common.UserError, match="mine: test images lie in cow, which is no class"):
        load()
    shutil.rmtree(pets / "val/cow")
    save_image(pets / "val/x.png")
    with pytest.raises(common.UserError, match="test images lie in no folder, which is no class"):
        load()


def test_plain_images_have_no_classes(make, load, capsys):
    make(*[f"{i:02}" for i in range(21)])
    data = load()
    assert data.train_images.shape == (18, 3, 8, 8)
    assert data.classes == [] and len(data.train_labels) == 0
    assert len(data.test_images) == len(data.test_labels) == 3  # held out
    values = brightness(torch.cat([data.test_images, data.train_images]))
    assert sorted(values) == list(range(21)) != values  # not the first by name
    assert capsys.readouterr().out.endswith("18 training, 3 test images, no classes\n")


def test_hidden_files_and_runs_do_not_count(tmp_path, load):
    names = ["cat/a.png", "dog/b.png", "cat/._a.png", ".ipynb_checkpoints/a.png"]
    names += ["__MACOSX/cat/._a.png", "run/views.png"]
    for split in ("train", "test"):
        for name in names:
            save_image(tmp_path / "mine" / split / name)
        (tmp_path / "mine" / split / "run/args.json").touch()
    data = load()
    assert len(data.train_images) == len(data.test_images) == 2
    assert data.classes == ["cat", "dog"]


def test_files_that_are_left_out_are_counted(pets, load, capsys):
    for name in ("a.GIF", "train/cat/b.gif", "train/c.heic", "README", ".hidden"):
        (pets / name).write_text("no image")
    (pets / "train/cat/d.png").symlink_to("nowhere.png")
    (pets / "train/cat/e.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(pets / "pipe.png")
    load()
    said = capsys.readouterr().out.split("left out: ")[1].split("; ")[0].split(", ")
    expected = ["1 .heic", "1 special files", "1 without suffix", "2 .gif", "2 broken links"]
    assert sorted(said) == expected


def test_linked_folders_are_followed_once(tmp_path, load):
    names = ["mine/train/cat/a.png", "elsewhere/b.png", "elsewhere/deeper/c.png"]
    names += ["mine/test/cat/d.png", "mine/test/dog/e.png"]
    for name in names:
        save_image(tmp_path / name)
    (tmp_path / "mine/train/dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "mine/train/cat/all").symlink_to(tmp_path / "mine")
    data = load()
    assert data.train_labels.tolist() == [0, 1, 1]
    assert data.test_labels.tolist() == [0, 1]


@pytest.mark.parametrize("name", ["scandir", "stat"])
def test_what_may_not_be_read_is_an_error(pets, load, monkeypatch, name):
    locked = str(pets / "train/dog") if name == "scandir" else str(pets / "train/dog/a.png")
    original = getattr(os, name)

    def refuse(path, *args, **options):
        if str(path) == locked:
            raise PermissionError(13, "Permission denied", locked)
        return original(path, *args, **options)

    monkeypatch.setattr(os, name, refuse)
    with pytest.raises(common.UserError, match=f"^{locked}: Permission denied$"):
        load()


def test_folders_with_too_few_images(tmp_path, make, load):
    (tmp_path / "mine").mkdir()
    with pytest.raises(common.UserError, match="mine: there are no images in it"):
        load()
    make("one")
    with pytest.raises(common.UserError, match="mine: too few images: 0 training, 1 test"):
        load()
    (tmp_path / "mine/one.png").unlink()
    make("cat/a", "dog/c")  # whose hashes are not among the fifth
    with pytest.raises(common.UserError, match="mine: too few images: 2 training, 0 test"):
        load()


def save_names_of_any_bytes(folder):
    """Two classes, of which one is not UTF-8, in a folder that is not, either -> its path."""
    save_image(folder / "image.png")
    root = os.fsencode(folder) + b"/m\xffne"
    for split, name in itertools.product((b"train", b"test"), (b"caf\xc3\xa9", b"caf\xe9")):
        os.makedirs(os.path.join(root, split, name))
        shutil.copy(folder / "image.png", os.path.join(root, split, name, b"\xfe\xf0.png"))
    return os.fsdecode(root)


def test_names_of_any_bytes(tmp_path, capsys):
    root = save_names_of_any_bytes(tmp_path)
    os.rename(root, tmp_path / "mine")  # pytest's stream can show no other name
    data = common.load_dataset(str(tmp_path / "mine"), tmp_path / "cache", 8)
    assert data.train_labels.tolist() == data.test_labels.tolist() == [0, 1]
    assert data.classes == ["caf\u00e9", "caf\ufffd"]
    assert "2 classes (caf\u00e9, caf\ufffd)" in capsys.readouterr().out


def test_names_of_any_bytes_in_another_locale(tmp_path):
    root = save_names_of_any_bytes(tmp_path)
    for name in ("\u00e9.png", "b.png"):
        save_image(tmp_path / "captioned" / name)
    table = "image,caption,split\n\u00e9.png,ein Ding,train\nb.png,noch eins,test\n"
    (tmp_path / "captioned/captions.csv").write_text(table, encoding="utf-8")
    variables = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    variables |= {"PYTHONPATH": str(Path(common.__file__).parent), "PYTHONIOENCODING": ":replace"}
    code = "import sys, common\nfor path in sys.argv[2:]: common.load_dataset(path, sys.argv[1], 8)"
    paths = [tmp_path / "cache", root, tmp_path / "captioned"]
    command = [sys.executable, "-c", code, *paths]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert b"2 training, 2 test images, 2 classes (caf" in done.stdout
    assert b"1 training, 1 test images, 0 for validation, 2 captions" in done.stdout


# ==================================================================================================
# Decoding one image
# ==================================================================================================


def test_the_middle_square_upright(tmp_path):
    image = Image.new("RGB", (60, 20), (0, 0, 0))
    image.paste((255, 255, 255), (20, 0, 40, 10))  # white above black in the middle
    exif = image.getexif()
    exif[0x0112] = 3  # shot upside down
    image.rotate(180).save(tmp_path / "a.png", exif=exif)
    expected = np.zeros((20, 20, 3), np.uint8)
    expected[:10] = 255
    assert np.array_equal(common.decode_image(tmp_path / "a.png", 20), expected)


RAMP = np.linspace(0, 1, 64).reshape(8, 8)
BLACK_ON_CLEAR = [0 * RAMP, 0 * RAMP, 0 * RAMP, 255 * RAMP]


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("a.png", (65535 * RAMP).astype(np.uint16), 255 * RAMP),
        ("a.tif", (65535 * RAMP).astype(np.uint16), 255 * RAMP),
        ("a.tif", (65535 * RAMP).astype(np.int32), 255 * RAMP),
        ("a.pgm", (65535 * RAMP).astype(np.uint16), 255 * RAMP),
        ("a.tif", RAMP.astype(np.float32), 255 * RAMP),
        ("a.png", RAMP > 0.5, 255 * (RAMP > 0.5)),
        ("a.png", np.stack(BLACK_ON_CLEAR, axis=2).astype(np.uint8), 255 - 255 * RAMP),
        ("a.png", np.stack(BLACK_ON_CLEAR[2:], axis=2).astype(np.uint8), 255 - 255 * RAMP),
    ],
)
def test_other_modes_become_what_one_sees(tmp_path, name, image, expected):
    Image.fromarray(image).save(tmp_path / name)
    decoded = common.decode_image(tmp_path / name, 8)
    assert decoded.dtype == np.uint8
    assert np.abs(decoded - expected[..., None]).max() <= 1.01


def test_a_transparent_color_of_a_palette_is_white(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([200, 0, 0, 0, 200, 0])
    image.paste(0, (0, 0, 4, 8))
    image.save(tmp_path / "a.png", transparency=1)
    decoded = common.decode_image(tmp_path / "a.png", 8)
    assert (decoded[:, :4] == [200, 0, 0]).all()
    assert (decoded[:, 4:] == 255).all()


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ((4095 * RAMP).astype(np.uint16), "0 to 4095, where white is 65535; multiply all by one"),
        ((65535 * RAMP - 500).astype(np.int32), "-500 to 65035, where white is 65535"),
        ((10**6 * RAMP).astype(np.int32), "0 to 1e.06, where white is 65535"),
        ((255 * RAMP).astype(np.float32), "0 to 255, where white is 1; divide all by one number"),
        (np.full((8, 8), np.nan, np.float32), "nan to nan, where white is 1"),
        (np.where(RAMP > 0.5, np.inf, 0).astype(np.float32), "0 to inf, where white is 1"),
    ],
)
def test_all_but_white_or_black_images_are_refused(tmp_path, image, reason):
    Image.fromarray(image).save(tmp_path / "a.tif")
    message = f"a.tif: not a readable image .its values run from {reason}"
    with pytest.raises(common.UserError, match=message):
        common.decode_image(tmp_path / "a.tif", 8)


def test_12_bits_can_be_mended_as_the_message_says(tmp_path):
    Image.fromarray((4095 * RAMP).astype(np.uint16)).save(tmp_path / "a.tif")
    with pytest.raises(common.UserError, match="one factor, which for 12 bits is 16"):
        common.decode_image(tmp_path / "a.tif", 8)
    Image.fromarray(16 * (4095 * RAMP).astype(np.uint16)).save(tmp_path / "a.tif")
    decoded = common.decode_image(tmp_path / "a.tif", 8)
    assert np.abs(decoded - 255 * RAMP[..., None]).max() <= 1.01


def test_odd_metadata_end_in_no_traceback(tmp_path):
    float_width = struct.pack("<HHLf", 0x0100, 11, 1, 8.5)
    orientation = struct.pack("<HHLHH", 0x0112, 3, 1, 6, 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<LH", 8, 2) + float_width + orientation + bytes(4)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=exif)
    with pytest.raises(struct.error):
        ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg"))
    with pytest.raises(common.UserError, match="a.jpg: not a readable image"):
        common.decode_image(tmp_path / "a.jpg", 8)


def test_no_damaged_file_ends_in_a_traceback(tmp_path):
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    originals = []
    for suffix in ("jpg", "png", "bmp", "ppm", "tif", "webp"):
        for image in (Image.fromarray(pixels), Image.fromarray(pixels[..., 0])):
            path = tmp_path / f"{len(originals)}.{suffix}"
            image.save(path)
            originals.append((path, path.read_bytes()))
    pages = {"save_all": True, "append_images": [Image.fromarray(pixels[::-1])] * 2}
    for suffix in ("tif", "webp", "png"):
        path = tmp_path / f"pages.{suffix}"
        Image.fromarray(pixels).save(path, **pages)
        originals.append((path, path.read_bytes()))
    decoded = 0
    refused = 0
    for i in range(2000):
        path, content = originals[i % len(originals)]
        content = bytearray(content)
        for place in generator.integers(0, len(content), generator.integers(1, 8)):
            content[place] = generator.integers(256)
        if i % 3 == 0:
            content = content[: generator.integers(len(content))]
        path.write_bytes(content)
        try:
            assert common.decode_image(path, 8).shape == (8, 8, 3)
            decoded += 1
        except common.UserError as error:
            assert path.name in str(error)
            assert "\n" not in str(error)
            refused += 1
    assert decoded > 200
    assert refused > 200


# ==================================================================================================
# Decoding a folder
# ==================================================================================================


def test_pages_and_sides_that_are_lost_are_said(make, load, tmp_path, capsys):
    make(*[f"{i:02}" for i in range(9)])
    first, second = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for name in ("stack.tif", "film.webp", "film.png"):
        first.save(tmp_path / "mine" / name, save_all=True, append_images=[second])
    save_image(tmp_path / "mine/wide.jpg", size=(12, 8))
    for _ in range(2):  # decoded, and read again
        data = load()
        images = torch.cat([data.train_images, data.test_images])
        reds = images[:, 0].amin((1, 2)) > 200
        assert reds.sum() == 3
        said = "no classes; cropped to a square: 1; first page or frame only: 3\n"
        assert capsys.readouterr().out.endswith(said)


@pytest.fixture
def run(tmp_path):
    """The folder of a run on images of 8 x 8."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "data.json").write_text('{"image_size": 8}')
    return folder


def test_images_for_the_encoder_of_a_run(make, tmp_path, run, capsys):
    make("b", "deeper/a", "c d")
    save_image(tmp_path / "mine/wide.jpg", size=(12, 8))
    (tmp_path / "mine/notes.txt").touch()
    names, images = common.load_images(tmp_path / "mine", run)
    assert names == ["b.png", "c d.png", "deeper/a.png", "wide.jpg"]
    assert images.shape == (4, 3, 8, 8)
    assert images.dtype == torch.uint8
    assert brightness(images) == [0, 2, 1, 90]
    said = "mine: 4 images, 8 x 8; left out: 1 .txt; cropped to a square: 1\n"
    assert capsys.readouterr().out.endswith(said)


def test_all_bad_images_for_an_encoder_are_named(make, tmp_path, run):
    make("a", "b", "c")
    for name in "ab":
        (tmp_path / f"mine/{name}.png").write_bytes(b"no image")
    with pytest.raises(common.UserError, match=r"a\.png: not .*b\.png: not .*take them out$"):
        common.load_images(tmp_path / "mine", run)


def test_images_for_a_run_that_is_not_there(make, tmp_path):
    make("a")
    with pytest.raises(common.UserError, match="mine: is not the folder of a run"):
        common.load_images(tmp_path / "mine", tmp_path / "mine")


def test_a_folder_is_decoded_once_and_again_when_changed(pets, load, monkeypatch, capsys):
    decoded = spy(monkeypatch, common, "read_image")
    first = load()
    assert "7 of 7 images" in capsys.readouterr().out
    again = load()
    assert len(decoded) == 7
    assert torch.equal(first.train_images, again.train_images)
    assert "decoding" not in capsys.readouterr().out
    save_image(pets / "train/dog/c.png", (0, 0, 250))
    changed = load()
    assert len(decoded) == 15
    assert len(changed.train_images) == 6
    assert torch.equal(changed.test_images, first.test_images)
    assert (first.train_images[0, 0] > 240).all()  # of the file that is removed


@pytest.mark.parametrize("length", [0, 100, 7 * 8 * 8 * 3])
def test_a_file_that_was_cut_off_is_made_anew(pets, load, tmp_path, length):
    first = load().train_images.clone()
    (file,) = (tmp_path / "cache").iterdir()
    os.truncate(file, length)
    assert torch.equal(load().train_images, first)
    assert file.stat().st_size == 7 * (8 * 8 * 3 + 1)


def test_only_former_decoded_images_of_a_folder_are_removed(pets, tmp_path):
    cache = tmp_path / "cache"
    same_name = tmp_path / "other/mine"
    shutil.copytree(pets, same_name)
    for path, size in ((pets, 16), (pets, 8), (same_name, 8)):
        common.load_dataset(str(path), cache, size)
    before = {file.name: file.stat().st_size for file in cache.iterdir()}
    large = 7 * (16 * 16 * 3 + 1)
    small = 7 * (8 * 8 * 3 + 1)
    assert sorted(before.values()) == [small, small, large]
    save_image(pets / "train/dog/c.png")
    common.load_dataset(str(pets), cache, 8)
    after = {file.name: file.stat().st_size for file in cache.iterdir()}
    assert sorted(after.values()) == [small, 8 * (8 * 8 * 3 + 1), large]
    assert len(set(before) & set(after)) == 2


def test_an_interrupted_decoding_leaves_nothing(pets, load, tmp_path, monkeypatch):
    read_image = common.read_image
    calls = []

    def interrupted(file, size):
        calls.append(file)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return read_image(file, size)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common, "read_image", interrupted)
        load()
    assert list((tmp_path / "cache").iterdir()) == []
    assert (load().train_images[:, ::2].amax(1) > 240).all()


def test_images_do_not_pile_up_behind_a_slow_one(tmp_path, load, monkeypatch):
    (tmp_path / "mine").mkdir()
    for i in range(1000):
        (tmp_path / f"mine/{i:04}.png").touch()
    started = []
    rest = threading.Event()

    def slow_at_first(file, size):
        started.append(file)
        if len(started) == 1:
            rest.wait(0.5)  # the other threads would do all 1,000 meanwhile
            assert len(started) <= 256
        return np.zeros((size, size, 3), np.uint8), 0

    monkeypatch.setattr(common, "read_image", slow_at_first)
    data = load()
    assert len(data.train_images) + len(data.test_images) == len(started) == 1000


@pytest.mark.parametrize("part", [slice(300), slice(0), None])
def test_a_bad_image_is_named(pets, load, part):
    file = pets / "train/cat/deeper/b.jpg"
    file.write_bytes(file.read_bytes()[part] if part else b"text")
    with pytest.raises(common.UserError, match=r"deeper.b\.jpg: not a readable image") as caught:
        load()
    assert "\n" not in str(caught.value)


def test_the_good_ones_of_plain_images_are_kept(make, load, tmp_path, monkeypatch):
    make(*[f"{i:02}" for i in range(30)])
    for i in (3, 20):
        (tmp_path / f"mine/{i:02}.png").write_text("text")
    with pytest.raises(common.UserError, match="03.png: not a readable image.*20.png"):
        load()
    for i in (3, 20):
        (tmp_path / f"mine/{i:02}.png").unlink()
    decoded = spy(monkeypatch, common, "read_image")
    data = load()
    assert decoded == []
    values = brightness(torch.cat([data.train_images, data.test_images]))
    assert sorted(values) == [i for i in range(30) if i not in (3, 20)]


def test_all_bad_images_are_named_at_once(pets, load, monkeypatch):
    bad = [pets / f"train/cat/{i:02}.png" for i in range(12)]
    for file in bad:
        file.write_text("text")
    with pytest.raises(common.UserError) as caught:
        load()
    message = str(caught.value)
    assert all(f"{file}: not a readable image" in message for file in bad[:10])
    assert str(bad[10]) not in message
    assert message.endswith("; and 2 more; mend them or take them out")
    assert "\n" not in message
    for file in bad:
        file.unlink()
    decoded = spy(monkeypatch, common, "read_image")
    data = load()
    assert decoded == []  # the others were kept
    assert (data.train_images[:, ::2].amax(1) > 240).all()
    assert len(data.test_images) == 2


def test_a_data_folder_that_cannot_be_written(pets, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(common.UserError, match="file: cannot be written .File exists.$"):
        common.load_dataset(str(pets), tmp_path / "file")


# ==================================================================================================
# Captions
# ==================================================================================================


@pytest.fixture
def captioned(tmp_path, make, load):
    """Thirty gray images in images/, the i-th of brightness i, and a function that writes rows and
    loads them."""
    make(*[f"images/{i:02}" for i in range(30)])

    def load_rows(rows, name="captions.csv", encoding="utf-8"):
        text = "".join(row + "\n" for row in rows)
        (tmp_path / "mine" / name).write_bytes(text.encode(encoding))
        return load()

    return load_rows


def contents(data):
    """{split: {brightness of an image: its captions}}"""
    parts = {"train": (data.train_images, data.train_captions)}
    parts["val"] = (data.val_images, data.val_captions) if data.val_captions else (None, None)
    parts["test"] = (data.test_images, data.test_captions)
    found = {}
    for split, (images, texts) in parts.items():
        values = [] if images is None else brightness(images)
        found[split] = dict(zip(values, texts or [], strict=True))
    return found


@pytest.mark.parametrize("name", ["captions.csv", "captions.txt"])
def test_without_a_split_names_decide_and_order_does_not(captioned, name):
    rows = [f'{i:02}.png,"image {i}, caption {j}"' for i in range(30) for j in range(3)]
    straight = contents(captioned(["image,caption", *rows], name))
    mixed = contents(captioned(["image,caption", *[rows[k * 7 % 90] for k in range(90)]], name))
    for part in mixed.values():
        for texts in part.values():
            texts.sort()
    assert mixed == straight
    assert sorted(i for part in straight.values() for i in part) == list(range(30))
    assert len(straight["train"]) > 15
    for part in straight.values():
        for i, texts in part.items():
            assert texts == [f"image {i}, caption {j}" for j in range(3)]


def test_captions_with_splits(captioned):
    splits = ["train", "test", "val"]
    rows = [f"images/{i:02}.png,{splits[i % 3]},number {i}" for i in range(30)]
    found = contents(captioned(["image,split,caption", *reversed(rows)], encoding="utf-8-sig"))
    for k, split in enumerate(splits):
        assert found[split] == {i: [f"number {i}"] for i in range(k, 30, 3)}
    data = captioned(["image,split,caption", *rows])
    assert data.files["val"] == [f"images/{i:02}.png" for i in range(2, 30, 3)]


def test_images_may_lie_elsewhere(captioned, tmp_path):
    save_image(tmp_path / "elsewhere.png", (200, 200, 200))
    (tmp_path / "mine/linked.png").symlink_to(tmp_path / "elsewhere.png")
    rows = [HEADER, *GOOD, "linked.png,gray,val", f"{tmp_path}/elsewhere.png,bright,val"]
    assert contents(captioned(rows))["val"] == {200: ["gray", "bright"]}


HEADER = "image,caption,split"
GOOD = ["00.png,a thing,train", "01.png,a thing,test"]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "the header is []"),
        (["name,text", *GOOD], "the header is ['name', 'text']"),
        (["image,caption,Caption", *GOOD], "the header is ['image', 'caption', 'caption']"),
        ([HEADER, *GOOD, "99.png,a thing,train"], "row 4: there is no image 99.png"),
        ([HEADER, GOOD[0], "01.png, ,test"], "row 3: the caption is empty"),
        ([HEADER, GOOD[0], "01.png,?! ...,test"], "row 3: the caption '?! ...' has no word"),
        ([HEADER, ",a thing,test", *GOOD], "row 2: the image is empty"),
        ([HEADER, "00.png,a thing, a comma,test"], "row 2: has more fields than the header"),
        ([HEADER, *GOOD, "02.png"], "row 4: the caption is empty"),
        ([HEADER, *GOOD, "02.png,a thing,dev"], "row 4: split 'dev'"),
        ([HEADER, *GOOD, "images/00.png,more,test"], "images/00.png is in test here, but in train"),
        ([HEADER, *GOOD, "images/../images/00.png,more,test"], "row 4: images/../images/00.png is"),
        ([HEADER, *GOOD, '02.png,"a "thing"",train'], "cannot be read as CSV in UTF-8 after 2 row"),
        ([HEADER, GOOD[0]], "none of 1 images is in train, or none in test; a column split can"),
        (["image,caption", "00.png,a thing"], "none of 1 images is in train, or none in test"),
    ],
)
def test_bad_captions_are_named_by_file_and_row(captioned, rows, message):
    with pytest.raises(common.UserError, match="captions.csv") as caught:
        captioned(rows)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_header_with_spaces_and_capitals(captioned, capsys):
    rows = ["Image, Caption , SPLIT", '00.png, "a thing, red", Train', "01.png ,another, test"]
    found = contents(captioned(rows))
    assert found == {"train": {0: ["a thing, red"]}, "val": {}, "test": {1: ["another"]}}
    found = "1 training, 1 test images, 0 for validation, 2 captions"
    said = f"{found}; left out: 28 images without caption\n"
    assert capsys.readouterr().out.endswith(said)


def test_columns_of_no_use_are_named(captioned, capsys):
    rows = [f"{i},{i % 30:02}.png,thing {i},me" for i in range(60)]
    captioned(["number,image,caption,author", *rows])
    assert capsys.readouterr().out.endswith("60 captions; columns of no use here: author, number\n")


def test_all_bad_captions_are_named_at_once(captioned):
    with pytest.raises(common.UserError) as caught:
        captioned([HEADER, *GOOD, *[f"{i}.png,a thing,train" for i in range(900, 915)]])
    message = str(caught.value)
    assert "row 4: there is no image 900.png" in message
    assert "row 13: there is no image 909.png" in message
    assert "910.png" not in message
    assert message.endswith("; and 5 more; mend them or take them out")


def test_captions_in_another_encoding(captioned):
    with pytest.raises(common.UserError, match="captions.csv: cannot be read as CSV in UTF-8"):
        captioned([HEADER, GOOD[0], "01.png,une pomme dorée,test"], encoding="latin-1")
