"""The built-in shapes, and data sets from files: what they hold, and what is said about broken ones."""

import shutil
import urllib.error

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as TF
from PIL import Image

import common

# ------------------------------------------------------------------------------------------------------
# Shapes
# ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes():
    return common.load_dataset("shapes")


def scenes_of(count, **fixed):
    scenes = common.sample_shapes(count, torch.Generator().manual_seed(1))
    return scenes | fixed


def silhouettes(size=64):
    """Each of the ten, upright in the middle of the frame, white on black: (10, size, size) in [0, 1]."""
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
    pictures = silhouettes()
    for i, one in enumerate(pictures):
        for turns in (1, 2, 3):
            for turned in (one.rot90(turns), one.rot90(turns).flip(1)):
                assert (one - turned).abs().mean() > 0.05, (i, turns)
        for j, other in enumerate(pictures):
            assert i == j or (one - other).abs().mean() > 0.05, (i, j)


def test_silhouettes_fit_the_unit_disc():
    axis = torch.linspace(-1.5, 1.5, 301)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    for name, inside in common.SHAPES.items():
        radius = torch.hypot(x, y)[inside(x, y)].max()
        assert 0.9 < radius <= 1, name


def test_splits_are_balanced_and_differ(shapes):
    assert shapes.train_images.shape == (4096, 3, 32, 32) and shapes.test_images.shape == (2000, 3, 32, 32)
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
    numbers = [scenes["half_width"], scenes["tilt"], scenes["direction"], *scenes["center"].unbind(1)]
    indicators = [F.one_hot(c, 10).float() for c in (scenes["color"], *scenes["background"].unbind(1))]
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
    assert half_width.min() >= 0.60 and half_width.max() <= 0.85 and abs(half_width.mean() - 0.725) < 0.003
    assert scenes["tilt"].abs().max() <= 0.25 and abs(scenes["tilt"].mean()) < 0.005
    assert (center.abs().amax(1) + half_width).max() <= 1  # nothing leaves the frame
    assert (scenes["color"].bincount() / 20_000 - 0.1).abs().max() < 0.01


def test_foreground_is_apart_from_every_mixture_of_the_background():
    scenes = scenes_of(2000)
    palette = torch.tensor(list(common.COLORS.values())) / 255
    one, two = palette[scenes["background"]].unbind(1)
    assert (scenes["background"][:, 0] != scenes["background"][:, 1]).all()
    mixtures = torch.lerp(one[:, None], two[:, None], torch.linspace(0, 1, 50)[None, :, None])  # (N, 50, 3)
    assert (mixtures - palette[scenes["color"]][:, None]).norm(dim=2).min() > 0.35


def test_a_seed_fixes_the_pictures(shapes):
    draw = lambda seed: common.draw_shapes(scenes_of(20), torch.Generator().manual_seed(seed))  # noqa: E731
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    again = common.load_dataset("shapes")
    assert torch.equal(shapes.train_images, again.train_images) and shapes.test_captions == again.test_captions


def test_captions_name_what_is_drawn():
    scenes = scenes_of(500)
    captions = common.describe_shapes(scenes, torch.Generator().manual_seed(0))
    shapes, colors = list(common.SHAPES), list(common.COLORS)
    for i, texts in enumerate(captions):
        *brief, full = (text.replace(",", "").split() for text in texts)
        assert all(shapes[scenes["label"][i]] in words for words in (*brief, full))
        assert [colors[scenes["color"][i]] in words for words in (*brief, full)] == [False, False, True, True, True]
        assert all(colors[c] in full for c in scenes["background"][i])
        size = next(word for word in full if word in common.SIZES)
        low = 0.60 + 0.25 / 3 * common.SIZES.index(size)
        assert low - 1e-6 <= scenes["half_width"][i] <= low + 0.25 / 3 + 1e-6
        assert not any(f" a {vowel}" in f" {text}" for text in texts for vowel in "aeiou")
    assert len({texts[-1].split()[0] for texts in captions}) > 2  # varied wording


# ------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------


def arrays(count=6, **changed):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(count) % 3
    return {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels} | changed


def test_npz(tmp_path):
    expected = arrays()
    np.savez(tmp_path / "mine.npz", **expected)
    data = common.load_dataset(str(tmp_path / "mine.npz"))
    assert np.array_equal(data.train_images.permute(0, 2, 3, 1).numpy(), expected["train_images"])
    assert data.train_images.is_contiguous(memory_format=torch.channels_last)
    assert data.train_labels.tolist() == [0, 1, 2, 0, 1, 2] and data.classes == ["0", "1", "2"]


def test_npz_as_medmnist_writes_it(tmp_path):
    grey, column = arrays()["train_images"][..., 0], arrays()["train_labels"].astype(np.uint8)[:, None]
    np.savez_compressed(
        tmp_path / "mine.npz", **arrays(train_images=grey, train_labels=column, val_images=grey, val_labels=column)
    )
    data = common.load_dataset(str(tmp_path / "mine.npz"))
    assert data.train_images.shape == (6, 3, 8, 8) and data.train_labels.shape == (6,)
    assert all(np.array_equal(data.train_images[:, c].numpy(), grey) for c in range(3))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train_images": np.zeros((6, 8, 8, 3), np.float32)}, "train_images is float32"),
        ({"test_images": np.zeros((6, 8, 9, 3), np.uint8)}, "test_images is uint8"),
        ({"test_images": np.zeros((6, 9, 9, 3), np.uint8)}, "differ in size"),
        ({"train_images": np.zeros((0, 8, 8, 3), np.uint8), "train_labels": np.zeros(0, int)}, "train_images is uint8"),
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


def test_npz_of_images_alone(tmp_path):
    np.savez(tmp_path / "mine.npz", train_images=arrays(25)["train_images"])
    data = common.load_dataset(str(tmp_path / "mine.npz"))
    assert data.train_images.shape == (22, 3, 8, 8) and data.classes == [] and len(data.train_labels) == 0
    assert data.train_images.is_contiguous(memory_format=torch.channels_last)
    assert data.test_images.shape == (3, 3, 8, 8) and data.test_labels.tolist() == [0, 1, 2]  # held out
    both = torch.cat([data.train_images, data.test_images]).permute(0, 2, 3, 1)
    assert sorted(map(bytes, both.numpy())) == sorted(map(bytes, arrays(25)["train_images"]))


def test_unknown_name():
    with pytest.raises(common.UserError, match="--dataset cifar: is not shapes, cifar10"):
        common.load_dataset("cifar")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_downloaded_once(tmp_path, monkeypatch, name):
    calls = []

    class Fake:
        classes = ["cat", "dog", "owl"]

        def __init__(self, root, train, download):
            calls.append(train)
            self.data, self.targets = arrays(6 if train else 3)["train_images"], [0, 1, 2, 0, 1, 2][: 6 if train else 3]

    monkeypatch.setattr(torchvision.datasets, name.upper(), Fake)
    first = common.load_dataset(name, tmp_path / "new")
    second = common.load_dataset(name, tmp_path / "new")
    assert calls == [True, False] and [p.name for p in (tmp_path / "new").iterdir()] == [f"{name}.npz"]
    assert torch.equal(first.train_images, second.train_images) and len(first.test_labels) == 3
    assert second.classes == ["cat", "dog", "owl"]


def test_stl10_has_more_pictures_than_labels(tmp_path, monkeypatch):
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


def test_larger_pictures_shrink(tmp_path):
    np.savez(tmp_path / "mine.npz", **arrays())
    data, small = (common.load_dataset(str(tmp_path / "mine.npz"), image_size=size) for size in (8, 4))
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


# ------------------------------------------------------------------------------------------------------
# Folders of pictures
# ------------------------------------------------------------------------------------------------------


def save_picture(path, color, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


@pytest.fixture
def folder(tmp_path):
    """train: 3 red cats, 2 blue dogs; val: a cat and a dog."""
    for name in ("train/cat/a.png", "train/cat/deeper/b.jpg", "train/cat/c.PNG", "val/cat/x.png"):
        save_picture(tmp_path / "pets" / name, (250, 0, 0))
    for name in ("train/dog/a.png", "train/dog/b.bmp", "val/dog/x.png"):
        save_picture(tmp_path / "pets" / name, (0, 0, 250))
    (tmp_path / "pets/train/cat/notes.txt").write_text("no picture")
    return tmp_path / "pets"


def test_class_folders(folder, tmp_path):
    data = common.load_dataset(str(folder), tmp_path / "cache", image_size=16)
    assert data.classes == ["cat", "dog"] and data.train_images.shape == (5, 3, 16, 16)
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1] and data.test_labels.tolist() == [0, 1]
    assert data.train_images.is_contiguous(memory_format=torch.channels_last)
    assert (data.train_images[data.train_labels == 0][:, 0] > 240).all()
    assert (data.test_images[1, 2] > 240).all()


def test_plain_pictures_have_no_classes(tmp_path):
    for i in range(21):
        Image.new("L", (8, 8), i).save(tmp_path / f"{i:02}.png")
    data = common.load_dataset(str(tmp_path), tmp_path / "cache", 8)
    assert data.train_images.shape == (18, 3, 8, 8) and data.classes == [] and len(data.train_labels) == 0
    assert len(data.test_images) == len(data.test_labels) == 3  # held out
    values = torch.cat([data.test_images, data.train_images])[:, 0, 0, 0].tolist()
    assert sorted(values) == list(range(21)) != values  # not the first by name


def test_the_middle_square_upright(tmp_path):
    picture = Image.new("RGB", (60, 20), (0, 0, 0))
    picture.paste((255, 255, 255), (20, 0, 40, 10))  # white above black in the middle
    exif = picture.getexif()
    exif[0x0112] = 3  # shot upside down
    picture.rotate(180).save(tmp_path / "a.png", exif=exif)
    expected = np.repeat(np.array([255, 0], np.uint8), 10)[:, None, None].repeat(20, 1).repeat(3, 2)
    assert np.array_equal(common.decode_picture(tmp_path / "a.png", 20), expected)


def test_a_folder_is_decoded_once_and_again_when_it_has_changed(folder, tmp_path, monkeypatch, capsys):
    decoded, decode_picture = [], common.decode_picture
    monkeypatch.setattr(common, "decode_picture", lambda file, size: decoded.append(file) or decode_picture(file, size))
    first = common.load_dataset(str(folder), tmp_path / "cache", 16)
    assert "5 of 5 pictures" in capsys.readouterr().out
    again = common.load_dataset(str(folder), tmp_path / "cache", 16)
    assert len(decoded) == 7 and torch.equal(first.train_images, again.train_images)
    assert capsys.readouterr().out == ""
    save_picture(folder / "train/dog/c.png", (0, 0, 250))
    changed = common.load_dataset(str(folder), tmp_path / "cache", 16)
    assert len(decoded) == 13 and len(changed.train_images) == 6  # the test pictures are as they were


def test_an_interrupted_cache_is_rebuilt(folder, tmp_path, monkeypatch):
    decode_picture, calls = common.decode_picture, []

    def interrupted(file, size):
        calls.append(file)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return decode_picture(file, size)

    monkeypatch.setattr(common, "decode_picture", interrupted)
    with pytest.raises(KeyboardInterrupt):
        common.load_dataset(str(folder), tmp_path / "cache", 16)
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr(common, "decode_picture", decode_picture)
    assert (common.load_dataset(str(folder), tmp_path / "cache", 16).train_images[:, ::2].amax(1) > 240).all()


def test_a_bad_picture_is_named(folder, tmp_path):
    jpeg = (folder / "train/cat/deeper/b.jpg").read_bytes()
    for content in (jpeg[: len(jpeg) // 2], b"", b"text"):
        (folder / "train/cat/deeper/b.jpg").write_bytes(content)
        with pytest.raises(common.UserError, match=r"deeper.b\.jpg: not a readable picture") as caught:
            common.load_dataset(str(folder), tmp_path / "cache")
        assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_bad_folders(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(common.UserError, match="empty: there are no pictures in it"):
        common.load_dataset(str(tmp_path / "empty"), tmp_path / "cache")
    (tmp_path / "file").write_text("")
    with pytest.raises(common.UserError, match="--data-dir .*file: cannot be written"):
        common.load_dataset(str(folder), tmp_path / "file")
    save_picture(folder / "val/cow/x.png", (0, 250, 0))
    with pytest.raises(common.UserError, match="cow: there is no class of that name in"):
        common.load_dataset(str(folder), tmp_path / "cache")
    shutil.rmtree(folder / "val")
    save_picture(folder / "val/x.png", (0, 250, 0))
    with pytest.raises(common.UserError, match="val: has no <class> folders, of which .*train has 2"):
        common.load_dataset(str(folder), tmp_path / "cache")
    shutil.rmtree(folder / "val")
    with pytest.raises(common.UserError, match="pets: has train/<class> folders, but no test/<class> or val/<class>"):
        common.load_dataset(str(folder), tmp_path / "cache")


# ------------------------------------------------------------------------------------------------------
# Captions
# ------------------------------------------------------------------------------------------------------


@pytest.fixture
def captioned(tmp_path):
    """Thirty grey pictures in images/, the i-th of brightness i, and a function that writes rows and loads them."""
    root = tmp_path / "captioned"
    for i in range(30):
        save_picture(root / "images" / f"{i:02}.png", (i, i, i))

    def load(rows, name="captions.csv", encoding="utf-8"):
        (root / name).write_bytes("".join(row + "\n" for row in rows).encode(encoding))
        return common.load_dataset(str(root), tmp_path / "data", 8)

    return load


def contents(data):
    """{split: {brightness of a picture: its captions}}"""
    parts = {
        "train": (data.train_images, data.train_captions),
        "val": (data.val_images, data.val_captions),
        "test": (data.test_images, data.test_captions),
    }
    return {
        split: {int(image[0, 0, 0]): captions for image, captions in zip(images, texts, strict=True)}
        for split, (images, texts) in parts.items()
    }


@pytest.mark.parametrize("name", ["captions.csv", "captions.txt"])
def test_pictures_without_a_split_are_split_by_name_whatever_the_order(captioned, name):
    rows = [f'{i:02}.png,"picture {i}, caption {j}"' for i in range(30) for j in range(3)]
    straight = contents(captioned(["image,caption", *rows], name))
    mixed = contents(captioned(["image,caption", *(rows[k * 7 % 90] for k in range(90))], name))
    assert {s: {i: sorted(c) for i, c in part.items()} for s, part in mixed.items()} == straight
    assert sorted(i for part in straight.values() for i in part) == list(range(30))
    assert len(straight["train"]) > 15
    for part in straight.values():
        assert all(texts == [f"picture {i}, caption {j}" for j in range(3)] for i, texts in part.items())


def test_captions_with_splits(captioned):
    splits = ["train", "test", "val"]
    rows = [f"images/{i:02}.png,{splits[i % 3]},number {i}" for i in range(30)]
    parts = contents(captioned(["image,split,caption", *reversed(rows)], encoding="utf-8-sig"))
    assert parts == {s: {i: [f"number {i}"] for i in range(k, 30, 3)} for k, s in enumerate(splits)}


def test_pictures_may_lie_elsewhere(captioned, tmp_path):
    save_picture(tmp_path / "elsewhere.png", (200, 200, 200))
    (tmp_path / "captioned/linked.png").symlink_to(tmp_path / "elsewhere.png")
    parts = contents(captioned([HEADER, *GOOD, "linked.png,grey,val", f"{tmp_path}/elsewhere.png,bright,val"]))
    assert parts["val"] == {200: ["grey", "bright"]}


HEADER = "image,caption,split"
GOOD = ["00.png,a thing,train", "01.png,a thing,test"]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "row 1: the header"),
        (["name,text", *GOOD], "row 1: the header"),
        ([HEADER, *GOOD, "99.png,a thing,train"], "row 4: there is no picture 99.png"),
        ([HEADER, GOOD[0], "01.png, ,test"], "row 3: the caption is empty"),
        ([HEADER, ",a thing,test", *GOOD], "row 2: the image is empty"),
        ([HEADER, GOOD[0], "01.png,a thing, a comma,test"], "row 3: has not as many fields"),
        ([HEADER, *GOOD, "02.png"], "row 4: has not as many fields"),
        ([HEADER, *GOOD, "02.png,a thing,dev"], "row 4: split 'dev'"),
        ([HEADER, *GOOD, "images/00.png,another caption,test"], "row 4: images/00.png is in test here, but in train"),
        ([HEADER, *GOOD, "images/../images/00.png,a thing,test"], "row 4: images/../images/00.png is in test here"),
        ([HEADER, *GOOD, '02.png,"a "thing"",train'], "row 4: not a line of a CSV file"),
        ([HEADER, GOOD[0]], "has no picture in the split test"),
    ],
)
def test_bad_captions_are_named_by_file_and_row(captioned, rows, message):
    with pytest.raises(common.UserError, match="captions.csv") as caught:
        captioned(rows)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_captions_in_another_encoding(captioned):
    with pytest.raises(common.UserError, match="captions.csv, row 3: is not in UTF-8"):
        captioned([HEADER, GOOD[0], "01.png,une pomme dorée,test"], encoding="latin-1")


# ------------------------------------------------------------------------------------------------------
# Batches
# ------------------------------------------------------------------------------------------------------


def test_batches_follow_the_order_and_leave_out_the_rest(monkeypatch):
    images, order = torch.arange(50).view(50, 1, 1, 1), torch.randperm(50)[:23]
    resident = torch.cat([*common.batches(images, order, 5, torch.device("cpu"))])
    assert torch.equal(resident.flatten(), order[:20])
    copies = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: copies.append(x) or x)
    streamed = [*common.batches(images, order, 5, torch.device("meta"))]
    assert len(streamed) == 4 and all(x.device.type == "meta" and len(x) == 5 for x in streamed)
    assert torch.equal(torch.cat(copies), resident)


def test_images_that_do_not_fit_stay_in_main_memory(monkeypatch):
    data = common.Dataset(torch.zeros(9, 3, 8, 8), torch.zeros(9), torch.zeros(1, 3, 8, 8), torch.zeros(1), ["0"])
    for free, where in ((10**6, "cuda"), (10**4, "cpu")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, free))
        moved = {}
        monkeypatch.setattr(torch.Tensor, "to", lambda x, device, moved=moved: moved.setdefault(x.data_ptr(), x))
        data.to(torch.device("cuda"))
        assert (data.train_images.data_ptr() in moved) == (where == "cuda") and data.train_labels.data_ptr() in moved


# ------------------------------------------------------------------------------------------------------
# Few labels
# ------------------------------------------------------------------------------------------------------


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
            common.UserError, match="must be a fraction up to 1.0, or a whole number of labels per class"
        ):
            common.labelled_rows(labels, amount, seed=0)
    with pytest.raises(common.UserError, match="--labels 1: the data set has no labels"):
        common.labelled_rows(labels[:0], "1", seed=0)


def test_a_fingerprint_tells_images_apart():
    images = torch.randint(256, (1000, 3, 4, 4), dtype=torch.uint8)
    assert common.fingerprint(images) == common.fingerprint(images.clone())
    assert len({tuple(common.fingerprint(x)) for x in (images, images[1:], images.flip(0), images[..., :3])}) == 4
