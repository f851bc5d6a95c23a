"""The built-in shapes, datasets in .npz files, and rows of a dataset: batches, few labels."""

import dataclasses
import urllib.error

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as TF

import common

# ==================================================================================================
# Shapes
# ==================================================================================================


@pytest.fixture(scope="module")
def shapes():
    return common.load_dataset("shapes")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def scenes_of(count, **fixed):
    return common.sample_shapes(count, seeded(1)) | fixed


def silhouettes(size=64):
    """Each of the ten, upright in the middle of the frame, white on black: (10, size, size) in [0,
    1]."""
    colors = list(common.COLORS)
    scenes = scenes_of(
        10,
        label=torch.arange(10),
        half_width=torch.ones(10),
        center=torch.zeros(10, 2),
        tilt=torch.zeros(10),
        color=torch.full((10,), colors.index("white")),
        background=torch.full((10, 2), colors.index("black")),
    )
    return common.draw_shapes(scenes, seeded(0), size)[:, 0] / 255


def test_no_silhouette_equals_itself_turned_or_another_one():
    images = silhouettes()
    for i, one in enumerate(images):
        for turns in (1, 2, 3):
            turned = one.rot90(turns)
            assert (one - turned).abs().mean() > 0.05, (i, turns)
            assert (one - turned.flip(1)).abs().mean() > 0.05, (i, turns)
        for j, other in enumerate(images):
            assert i == j or (one - other).abs().mean() > 0.05, (i, j)


def test_silhouettes_fit_the_unit_disc():
    axis = torch.linspace(-1.5, 1.5, 301)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    for name, inside in common.SILHOUETTES.items():
        radius = torch.hypot(x, y)[inside(x, y)].max()
        assert 0.9 < radius <= 1, name


def test_splits_are_balanced_and_differ(shapes):
    assert shapes.train_images.shape == (4096, 3, 32, 32)
    assert shapes.test_images.shape == (2000, 3, 32, 32)
    assert shapes.train_images.dtype == torch.uint8
    assert shapes.train_labels.bincount().tolist() == [410] * 6 + [409] * 4
    assert shapes.test_labels.bincount().tolist() == [200] * 10
    assert shapes.classes == list(common.SILHOUETTES)
    seen = {image.tobytes() for image in shapes.train_images.numpy()}
    assert not any(image.tobytes() in seen for image in shapes.test_images.numpy())


def test_nuisances_are_independent_of_the_class():
    N = 20_000
    scenes = scenes_of(N)
    columns = [scenes["half_width"], scenes["tilt"], scenes["direction"]]
    columns += scenes["center"].unbind(1)
    for color in (scenes["color"], *scenes["background"].unbind(1)):
        columns += F.one_hot(color, 10).float().unbind(1)
    values = torch.stack(columns, dim=1)  # (N, 35)
    values = (values - values.mean(0)) / values.std(0)
    own = F.one_hot(scenes["label"], 10).bool()  # (N, 10)
    means = torch.stack([values[own[:, k]].mean(0) for k in range(10)])
    means = means * (N / 10) ** 0.5  # 350 standard normal numbers
    assert means.abs().max() < 4.5
    assert 0.85 < means.std() < 1.15


def test_ranges_of_the_nuisances():
    scenes = scenes_of(20_000)
    half_width = scenes["half_width"]
    assert 0.60 <= half_width.min() and half_width.max() <= 0.85
    assert abs(half_width.mean() - 0.725) < 0.003
    assert scenes["tilt"].abs().max() <= 0.25
    assert abs(scenes["tilt"].mean()) < 0.005
    reach = scenes["center"].abs().amax(1) + half_width
    assert reach.max() <= 1  # nothing leaves the frame
    assert (scenes["color"].bincount() / 20_000 - 0.1).abs().max() < 0.01


def test_foreground_is_apart_from_every_mixture_of_the_background():
    scenes = scenes_of(2000)
    palette = torch.tensor(list(common.COLORS.values())) / 255
    one, two = palette[scenes["background"]].unbind(1)
    assert (scenes["background"][:, 0] != scenes["background"][:, 1]).all()
    place = torch.linspace(0, 1, 50)[None, :, None]
    mixtures = torch.lerp(one[:, None], two[:, None], place)  # (N, 50, 3)
    distance = (mixtures - palette[scenes["color"]][:, None]).norm(dim=2)
    assert distance.min() > 0.35


def test_a_seed_fixes_the_images(shapes):
    images = common.draw_shapes(scenes_of(20), seeded(0))
    assert torch.equal(images, common.draw_shapes(scenes_of(20), seeded(0)))
    assert not torch.equal(images, common.draw_shapes(scenes_of(20), seeded(1)))
    again = common.load_dataset("shapes")
    assert torch.equal(shapes.train_images, again.train_images)
    assert shapes.test_captions == again.test_captions


def test_captions_name_what_is_drawn():
    scenes = scenes_of(500)
    captions = common.describe_shapes(scenes, seeded(0))
    shapes = list(common.SILHOUETTES)
    colors = list(common.COLORS)
    for i, texts in enumerate(captions):
        *brief, full = [text.replace(",", "").split() for text in texts]
        assert all(shapes[scenes["label"][i]] in words for words in (*brief, full))
        named = [colors[scenes["color"][i]] in words for words in (*brief, full)]
        assert named == [False, False, True, True, True]
        assert all(colors[c] in full for c in scenes["background"][i])
        size = next(word for word in full if word in common.SIZES)
        low = 0.60 + 0.25 / 3 * common.SIZES.index(size)
        assert low - 1e-6 <= scenes["half_width"][i] <= low + 0.25 / 3 + 1e-6
        assert not any(f" a {vowel}" in f" {text}" for text in texts for vowel in "aeiou")
    assert len({texts[-1].split()[0] for texts in captions}) > 2  # varied wording


# ==================================================================================================
# Arrays
# ==================================================================================================


def arrays(count=6, **changed):
    """What a valid file holds, count images of three classes, with some arrays changed."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(count) % 3
    content = {"train_images": images, "train_labels": labels}
    content |= {"test_images": images, "test_labels": labels}
    return content | changed


@pytest.fixture
def load_npz(tmp_path):
    """A function: the dataset of a file with these arrays."""

    def load(content, image_size=96):
        np.savez(tmp_path / "mine.npz", **content)
        return common.load_dataset(str(tmp_path / "mine.npz"), image_size=image_size)

    return load


def test_arrays_are_read_as_they_are(load_npz):
    data = load_npz(arrays())
    found = data.train_images.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(found, arrays()["train_images"])
    assert data.train_images.is_contiguous(memory_format=torch.channels_last)
    assert data.train_labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.classes == ["0", "1", "2"]


@pytest.mark.parametrize("channel", [(), (1,)])
def test_gray_arrays_as_medmnist_writes_them(load_npz, capsys, channel):
    gray = arrays()["train_images"][..., 0]
    column = arrays()["train_labels"].astype(np.uint8)[:, None]
    images = gray.reshape(6, 8, 8, *channel)
    content = arrays(train_images=images, train_labels=column, val_images=gray, val_labels=column)
    data = load_npz(content)
    assert data.train_images.shape == (6, 3, 8, 8)
    assert data.train_labels.shape == (6,)
    assert data.train_images.is_contiguous(memory_format=torch.channels_last)
    assert all(np.array_equal(data.train_images[:, c].numpy(), gray) for c in range(3))
    assert capsys.readouterr().out.endswith("(0, 1, 2); left out: val_images, val_labels\n")


def test_a_compressed_file_whose_suffix_is_in_capitals(tmp_path):
    np.savez_compressed(tmp_path / "mine.npz", **arrays())
    (tmp_path / "mine.npz").rename(tmp_path / "mine.NPZ")
    assert len(common.load_dataset(str(tmp_path / "mine.NPZ")).train_images) == 6


def test_labels_that_are_dates(load_npz, tmp_path, capsys):
    dates = np.array([20240102, 20240101, 20240102, 20240106, 20240101, 20240106])
    data = load_npz(arrays(train_labels=dates.astype(np.uint64), test_labels=dates[::-1]))
    assert data.train_labels.tolist() == [1, 0, 1, 2, 0, 2]
    assert data.test_labels.tolist() == [2, 0, 2, 1, 0, 1]
    assert data.classes == ["20240101", "20240102", "20240106"]
    found = "6 training, 6 test images, 3 classes (20240101, 20240102, 20240106)"
    anew = "labels 20240101 to 20240106 numbered anew"
    assert capsys.readouterr().out == f"{tmp_path / 'mine.npz'}: {found}; {anew}\n"


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (np.array(["cat", "dog", "owl"]), ["cat", "dog", "owl"]),
        (np.array([b"cat", b"dog", b"owl"]), ["cat", "dog", "owl"]),
        (np.array([7, 8, 9]), ["7", "8", "9"]),
        (np.array(["cat"]), ["0", "1", "2"]),
    ],
)
def test_names_of_classes(load_npz, names, classes):
    assert load_npz(arrays(classes=names)).classes == classes


def test_a_name_for_a_class_that_is_not_there(load_npz):
    labels = np.array([0, 3, 1, 0, 3, 1])
    names = np.array(["cat", "dog", "owl", "yak"])
    data = load_npz(arrays(train_labels=labels, test_labels=labels, classes=names))
    assert [data.classes[label] for label in data.train_labels] == names[labels].tolist()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train_images": np.zeros((6, 8, 8, 3), np.float32)}, "train_images is float32"),
        ({"test_images": np.zeros((6, 8, 9, 3), np.uint8)}, "test_images is uint8"),
        ({"test_images": np.zeros((6, 8, 8, 2), np.uint8)}, "test_images is uint8"),
        ({"test_labels": np.full(6, 2**64 - 1, np.uint64)}, "not 6 class numbers from 0 on"),
        ({"test_images": np.zeros((6, 9, 9, 3), np.uint8)}, "differ in size"),
        ({"train_images": np.zeros((0, 8, 8, 3), np.uint8)}, "train_images is uint8"),
        ({"train_labels": np.zeros(7, int)}, "not 6 class numbers"),
        ({"train_labels": np.zeros(0, int)}, "not 6 class numbers"),
        ({"train_labels": np.array(3)}, "not 6 class numbers"),
        ({"test_labels": np.zeros(5, int)}, "not 6 class numbers"),
        ({"train_labels": np.zeros(6)}, "train_labels is float64"),
        ({"train_labels": np.zeros((6, 14), int)}, "train_labels is int64"),
        ({"test_labels": np.full(6, -1)}, "not 6 class numbers from 0 on"),
        ({"test_labels": np.array([object()] * 6)}, "not a readable .npz file"),
        ({"test_labels": np.arange(6) % 5}, "test_labels has 3, which train_labels has not"),
    ],
)
def test_a_bad_array_is_named(load_npz, changed, message):
    with pytest.raises(common.UserError, match=message) as caught:
        load_npz(arrays(**changed))
    assert "mine.npz" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_cut_short_or_something_else(tmp_path):
    path = tmp_path / "mine.npz"
    np.savez(path, **arrays())
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"text", whole[:600] + b"torn" + whole[604:]):
        path.write_bytes(content)
        with pytest.raises(common.UserError, match="mine.npz: not a readable .npz file"):
            common.load_dataset(str(path))


@pytest.mark.parametrize("key", ["train_images", "train_labels", "test_images", "test_labels"])
def test_a_missing_array_is_named(load_npz, key):
    content = arrays()
    del content[key]
    with pytest.raises(common.UserError, match=f"has no array {key}; its arrays are t.*_"):
        load_npz(content)


def test_without_labels_some_images_are_held_out(load_npz, capsys):
    images = arrays(25)["train_images"]
    data = load_npz({"train_images": images})
    assert data.train_images.shape == (22, 3, 8, 8)
    assert data.train_images.is_contiguous(memory_format=torch.channels_last)
    assert data.test_images.shape == (3, 3, 8, 8)
    assert data.test_labels.tolist() == [0, 1, 2]
    assert data.classes == [] and len(data.train_labels) == 0
    assert capsys.readouterr().out.endswith("mine.npz: 22 training, 3 test images, no classes\n")
    both = torch.cat([data.train_images, data.test_images]).permute(0, 2, 3, 1)
    assert sorted(map(bytes, both.numpy())) == sorted(map(bytes, images))


def test_one_image_is_too_few(load_npz):
    with pytest.raises(common.UserError, match="mine.npz: too few images: 0 training, 1 test"):
        load_npz({"train_images": arrays(1)["train_images"]})


def test_larger_images_shrink(load_npz):
    data = load_npz(arrays(), image_size=8)
    small = load_npz(arrays(), image_size=4)
    assert small.train_images.shape == (6, 3, 4, 4)
    assert small.train_images.dtype == torch.uint8
    assert small.train_images.is_contiguous(memory_format=torch.channels_last)
    expected = TF.resize(data.train_images, [4, 4], antialias=True)
    assert (small.train_images.int() - expected.int()).abs().max() <= 1


# ==================================================================================================
# Names of datasets
# ==================================================================================================


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar-10", "dataset cifar-10: is not shapes, .* or stl10, .*; did you mean cifar10?"),
        ("CIFAR10", "dataset CIFAR10: is not shapes, .*; did you mean cifar10?"),
        ("photoz", "dataset photoz: .*, and there is no folder of that name; .* photos?"),
        ("imagenet", "there is no folder of that name$"),
        ("lab/photoz", "^lab/photoz: there is no such file or folder; did you mean lab/photos?"),
        ("mine.npy", "^mine.npy: there is no such file or folder; did you mean mine.npz?"),
        ("no/such/folder", "^no/such/folder: there is no such file or folder$"),
        ("notes.txt", "^notes.txt: is neither an .npz file nor a folder of images$"),
        ("", "dataset '': must be shapes, cifar10, cifar100 or stl10, or a path$"),
    ],
)
def test_an_unknown_name_gets_a_suggestion(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "lab/photos"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("mine.npz", "notes.txt"):
        (tmp_path / file).touch()
    with pytest.raises(common.UserError, match=message):
        common.load_dataset(name)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_downloaded_once(tmp_path, monkeypatch, name):
    calls = []

    class Fake:
        classes = ["cat", "dog", "owl"]

        def __init__(self, root, train, download):
            calls.append(train)
            count = 6 if train else 3
            self.data = arrays(count)["train_images"]
            self.targets = arrays(count)["train_labels"].tolist()

    monkeypatch.setattr(torchvision.datasets, name.upper(), Fake)
    first = common.load_dataset(name, tmp_path / "new")
    second = common.load_dataset(name, tmp_path / "new")
    assert calls == [True, False]
    assert [path.name for path in (tmp_path / "new").iterdir()] == [f"{name}.npz"]
    assert torch.equal(first.train_images, second.train_images)
    assert first.train_labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert first.test_labels.tolist() == [0, 1, 2]
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


def test_without_network_nothing_is_left_behind(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fail)
    with pytest.raises(common.UserError, match="dataset cifar10: .* cannot be downloaded"):
        common.load_dataset("cifar10", tmp_path)
    assert list(tmp_path.iterdir()) == []


# ==================================================================================================
# Rows: epochs, batches, examples
# ==================================================================================================


def test_an_epoch_is_shuffled_and_shared_by_the_processes():
    order, seed = common.epoch_order(50, 8, seed=3, epoch=2)
    again, _ = common.epoch_order(50, 8, seed=3, epoch=2)
    assert torch.equal(order, again)
    assert len(order) == len(order.unique()) == 48  # whole batches
    assert order.tolist() != sorted(order.tolist())
    parts = [common.epoch_order(50, 8, 3, 2, rank, 2) for rank in range(2)]
    assert torch.equal(torch.stack([rows for rows, _ in parts], dim=1).flatten(), order)
    others = [common.epoch_order(50, 8, s, e) for s, e in ((3, 3), (4, 2), (3, 50_002))]
    assert not any(torch.equal(rows, order) for rows, _ in others)
    seeds = [view_seed for _, view_seed in (*parts, *others[:2])]
    assert seeds[0] == seed
    assert len(set(seeds)) == 4


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_batches_follow_the_order_and_leave_out_the_rest(monkeypatch, kind):
    images = torch.arange(50).view(50, 1, 1, 1)
    order = torch.randperm(50)[:23]
    resident = list(common.batches(images, order, 5, torch.device("cpu")))
    assert len(resident) == 4
    assert torch.equal(torch.cat(resident).flatten(), order[:20])
    pinned = []
    moved = []

    def pin_memory(x):
        pinned.append(x)
        return x

    def to(x, device, non_blocking=False):
        moved.append((device.type, non_blocking))
        return x

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    streamed = list(common.batches(images, order, 5, torch.device(kind)))
    assert torch.equal(torch.cat(streamed), torch.cat(resident))
    assert len(pinned) == (4 if kind == "cuda" else 0)  # mps cannot
    assert moved.count((kind, True)) == 4


@pytest.mark.parametrize("free, fit", [(10**6, True), (10**4, False)])
@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_images_that_do_not_fit_stay_in_main_memory(monkeypatch, kind, free, fit):
    images = torch.zeros(9, 3, 8, 8)
    labels = torch.zeros(9)
    data = common.Dataset(images, labels, torch.zeros(1, 3, 8, 8), torch.zeros(1), ["0"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, free))
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: free + 5)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 5)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device: x + 1)
    moved = data.to(torch.device(kind))
    assert moved.train_labels.sum() == 9
    assert (moved.train_images.sum() > 0) == fit


def labelled(labels, **more):
    """A dataset with these labels, of training and of test images."""
    labels = torch.tensor(labels)
    images = torch.zeros(len(labels), 3, 2, 2, dtype=torch.uint8)
    classes = [str(k) for k in range(int(labels.max()) + 1)]
    data = common.Dataset(images, labels, images, labels, classes)
    return dataclasses.replace(data, **more)


def test_examples_are_of_all_classes():
    data = labelled([2, 0, 0, 1, 2, 1, 1])
    assert data.examples().tolist() == [1, 2, 1, 2, 3, 5, 6, 0, 4, 0]  # ten, of few with repeats
    assert data.examples(4, classes=2).tolist() == [1, 2, 3, 5]
    assert data.examples(3, classes=2).tolist() == [1, 2, 3]
    many = labelled(list(range(12)))
    assert many.examples().tolist() == list(range(10))


def test_without_classes_the_first_images_are_examples():
    data = labelled(list(range(30)), classes=[])
    assert data.examples().tolist() == list(range(10))
    assert data.examples(16, classes=4).tolist() == list(range(16))
    captioned = dataclasses.replace(data, test_labels=torch.empty(0), test_images=torch.zeros(3, 1))
    assert captioned.examples().tolist() == [0, 1, 2]


def test_a_tenth_of_the_labels_is_held_out():
    held_out, others = labelled([0, 1] * 25).held_out_labels()
    assert len(held_out) == 5
    assert sorted([*held_out.tolist(), *others.tolist()]) == list(range(50))
    assert held_out.tolist() != sorted(held_out.tolist())
    assert torch.equal(held_out, labelled([1, 0] * 25).held_out_labels()[0])  # always the same
    few, _ = labelled([0, 1, 1]).held_out_labels()
    assert len(few) == 1


# ==================================================================================================
# Few labels
# ==================================================================================================


@pytest.mark.parametrize(
    ("amount", "counts"),
    [
        (0.1, [10, 6, 0, 4]),
        (1.0, [100, 60, 0, 40]),
        (0.001, [1, 1, 0, 1]),
        ("1.0", [100, 60, 0, 40]),
        (1, [1, 1, 0, 1]),
        ("1", [1, 1, 0, 1]),
        (7.0, [7, 7, 0, 7]),
        ("7", [7, 7, 0, 7]),
    ],
)
def test_labelled_rows_are_balanced(amount, counts):
    labels = torch.tensor([0] * 100 + [1] * 60 + [3] * 40)
    labels = labels[torch.randperm(200, generator=seeded(0))]
    rows = common.labelled_rows(labels, amount, seed=0)
    assert labels[rows].bincount().tolist() == counts
    assert len(rows.unique()) == len(rows)


def test_labelled_rows_are_drawn_in_random_order():
    labels = torch.arange(200) // 70
    first = common.labelled_rows(labels, 20, seed=0)
    assert torch.equal(first, common.labelled_rows(labels, 20, seed=0))
    assert set(first.tolist()) != set(common.labelled_rows(labels, 20, seed=1).tolist())
    assert labels[first].tolist() != sorted(labels[first].tolist())


@pytest.mark.parametrize("amount", ["0", "-1", "1.5", "nan", "inf", "few", 0.0])
def test_what_is_no_amount_of_labels(amount):
    reason = "must be a fraction up to 1.0, or a whole number of labels per class"
    with pytest.raises(common.UserError, match=f"labels {amount}: {reason}"):
        common.labelled_rows(torch.arange(4) % 2, amount, seed=0)


def test_more_labels_than_there_are():
    labels = torch.tensor([0] * 100 + [1] * 40)
    with pytest.raises(common.UserError, match="labels 41: the smallest class has only 40"):
        common.labelled_rows(labels, 41, seed=0)
    with pytest.raises(common.UserError, match="labels 1: the dataset has no labels"):
        common.labelled_rows(labels[:0], "1", seed=0)


def test_labelled_rows_of_many_classes():
    labels = torch.randint(100, (10_000,), generator=seeded(0))
    order = torch.randperm(10_000, generator=seeded(7))
    seen = [0] * 100
    expected = []
    for row, label in zip(order.tolist(), labels[order].tolist(), strict=True):
        seen[label] += 1
        if seen[label] <= 5:  # the first five of each class, as they come
            expected.append(row)
    assert common.labelled_rows(labels, 5, seed=7).tolist() == expected


# ==================================================================================================
# Fingerprints
# ==================================================================================================


def test_other_data_has_another_fingerprint():
    images = torch.randint(256, (1000, 3, 4, 4), dtype=torch.uint8)
    labels = torch.arange(1000) % 2
    captions = [["one"], ["another"]]
    data = common.Dataset(
        images, labels, images, labels, ["a", "b"], captions, captions, None, captions
    )
    copied = dataclasses.replace(data, train_images=images.clone(), train_labels=labels.clone())
    assert common.fingerprint(copied) == common.fingerprint(data)
    changes = [
        {"train_images": images[1:]},
        {"train_images": images.flip(0)},
        {"train_images": images[..., :3]},
        {"train_labels": labels[:-2]},
        {"train_labels": 1 - labels},
        {"classes": ["a", "c"]},
        {"train_captions": captions[::-1]},
        {"val_captions": captions[::-1]},
    ]
    changed = [dataclasses.replace(data, **change) for change in [{}, *changes]]
    assert len({tuple(common.fingerprint(other)) for other in changed}) == len(changed)
