"""The code in README.md runs as it stands there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import dino
import mae
import simclr

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RUN = "runs/simclr-shapes-seed0"


def snippet(word):
    """The indented block with this word in it."""
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", README, re.MULTILINE)
    (block,) = [block for block in blocks if word in block]
    return re.sub("^    ", "", block, flags=re.MULTILINE)


def words_of(word):
    """The command line with this word in it, without `python` and the script."""
    return shlex.split(snippet(word).split("#")[0])[2:]


def save_encoder(folder, encoder):
    """What a run on images of 32 x 32 leaves in its folder."""
    Path(folder).mkdir(parents=True)
    torch.save(encoder.state_dict(), Path(folder, "encoder.pt"))
    Path(folder, "data.json").write_text('{"image_size": 32}')


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """A folder with the demo's run, and with images; its encoder, and the images as uint8."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    encoder, _ = simclr.build_encoder("small")
    save_encoder(RUN, encoder)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    for name, image in zip(("a.bmp", "b c.png", "d.tif", "deeper/e.webp"), pixels, strict=True):
        path = Path("path/to/images", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path, lossless=True)
    return encoder, torch.tensor(pixels).permute(0, 3, 1, 2)


@pytest.fixture
def classes(demo):
    """Beside them, a folder for each of two classes."""
    shades = {"black": 0, "white": 200}
    for name, low in shades.items():
        Path("path/to/classes", name).mkdir(parents=True)
        for i in range(20):
            Image.new("L", (80, 80), low + i).save(f"path/to/classes/{name}/{i}.png")
    return demo


def test_from_image_files_to_features(demo):
    encoder, images = demo
    names = {}
    exec(snippet("numpy.savez"), names)
    expected = simclr.features(encoder, images)
    saved = np.load("features.npz")
    assert saved["names"].tolist() == ["a.bmp", "b c.png", "d.tif", "deeper/e.webp"]
    assert torch.equal(torch.tensor(saved["features"]), expected)
    cosines = torch.cosine_similarity(expected[:, None], expected[None], dim=2)
    assert torch.equal(names["similar"], cosines.topk(4).indices)
    assert names["similar"][:, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.usefixtures("classes")
def test_few_labels_of_ones_own(monkeypatch):
    monkeypatch.setattr(simclr.fine_tune, "__defaults__", (1,))  # least_steps
    names = {}
    exec(snippet("fine_tune("), names)
    assert names["accuracy"] == 1
    assert names["data"].classes == ["black", "white"]
    assert names["rows"].shape == (20,)
    assert names["predicted"].shape == (4,)


def test_official_weights_and_few_labels(classes, monkeypatch):
    official = torchvision.models.resnet18()
    torch.save(official.state_dict(), "resnet18.pt")
    tuned = []

    def fine_tune(encoder, D, data, rows, args):
        tuned.append((encoder.state_dict(), rows))
        return 0.5, None

    monkeypatch.setattr(simclr, "fine_tune", fine_tune)
    summary = simclr.main(simclr.parse_args(words_of("resnet18.pt --epochs 0")))
    (weights, rows), (scratch, _) = tuned
    assert len(rows) == 20
    assert torch.equal(weights["conv1.weight"], official.conv1.weight)
    assert not torch.equal(scratch["conv1.weight"], official.conv1.weight)
    assert summary["semi_supervised"][0]["fine_tuned"] == 0.5
    assert re.search(
        r"`torch\.save\((torchvision\.\S+)\.state_dict\(\), \"resnet18\.pt\"\)`", README
    )


def test_in_torchvision_and_timm():
    import timm

    encoder, _ = simclr.build_encoder("resnet18", 96)
    resnet = torchvision.models.resnet18()
    resnet.fc = torch.nn.Identity()
    resnet.load_state_dict(encoder.state_dict())
    transformer = mae.VisionTransformer(32, 4, *mae.ENCODERS["vit_tiny"]).eval()
    (call,) = re.findall(r"`(timm\.create_model\(\"vit.*?\))`", " ".join(README.split()))
    vit = eval(call, {"timm": timm})
    vit.load_state_dict(transformer.state_dict())
    x = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resnet.eval()(x), encoder.eval()(x))
    small = x[:, :, :32, :32]
    assert torch.allclose(vit.eval()(small), transformer(small)[:, :192], atol=1e-4)


def test_official_weights_of_dino(tmp_path, monkeypatch):
    # That names and shapes are the authors' is tested in test_dino.py; with fewer layers this takes
    # no time.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(dino.ENCODERS, "vit_small", (48, 2, 3))
    encoder = dino.VisionTransformer(224, 16, *dino.ENCODERS["vit_small"])
    torch.save(encoder.state_dict(), "dino_deitsmall16_pretrain.pth")
    Path("photos").mkdir()
    Image.new("RGB", (300, 200), "red").save("photos/one.jpg")
    figure = dino.main(dino.parse_args(words_of("dino_deitsmall16_pretrain.pth")))
    assert figure == Path("runs/dino-show/show-photos.png")
    assert figure.exists()


def test_a_changed_script(tmp_path, few_shapes):
    source = (ROOT / "simclr.py").read_text()
    start = source.index("def build_encoder(")
    end = source.index("\n\n\n", start)
    source = source[:start] + snippet("timm.create_model(") + source[end:]
    lines = "".join(f"    {line}\n" for line in snippet("random_quarter_turn").splitlines())
    assert source.count("    return x\n\n\n# === Model") == 1
    source = source.replace(
        "    return x\n\n\n# === Model", f"{lines}    return x\n\n\n# === Model"
    )
    source = source.replace("\nimport torch\n", "\nimport timm\nimport torch\n", 1)
    (tmp_path / "simclr.py").write_text(source)
    (tmp_path / "common.py").write_text((ROOT / "common.py").read_text())
    words = ["--dataset", few_shapes, "--epochs", "1", "--out", "run"]
    command = [sys.executable, "simclr.py", *map(str, words)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    weights = torch.load(tmp_path / "run/encoder.pt", weights_only=True)
    assert weights["conv_stem.weight"].shape == (32, 3, 3, 3)  # EfficientNet's
