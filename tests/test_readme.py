"""The code in README.md runs as it stands there."""

import re
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image

import dino
import mae
import simclr

README = (Path(__file__).parent.parent / "README.md").read_text()


def snippet(word):
    """The indented block with this word in it."""
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", README, re.MULTILINE)
    (block,) = [block for block in blocks if word in block]
    return re.sub("^    ", "", block, flags=re.MULTILINE)


def save_encoder(folder, encoder):
    """What a run leaves in its folder."""
    Path(folder).mkdir(parents=True)
    torch.save(encoder.state_dict(), Path(folder, "encoder.pt"))


def test_from_image_files_to_features(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    encoder, _ = simclr.build_encoder("small")
    save_encoder("runs/simclr-shapes-seed0", encoder)
    Path("path/to/images").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    for i in range(3):
        Image.fromarray(pixels[i]).save(f"path/to/images/{i}.jpg", quality=100, subsampling=0)
    exec(snippet("numpy.save"), {})
    expected = simclr.features(encoder, torch.tensor(pixels).permute(0, 3, 1, 2))
    found = torch.tensor(np.load("features.npy"))
    assert found.shape == (3, 128)
    assert torch.cosine_similarity(found, expected).min() > 0.99  # jpg is not exact


def test_in_torchvision_and_timm(tmp_path, monkeypatch):
    import timm

    monkeypatch.chdir(tmp_path)
    encoder, _ = simclr.build_encoder("resnet18", 96)
    save_encoder("runs/simclr-images-seed0", encoder)
    transformer = mae.VisionTransformer(32, 4, *mae.ENCODERS["vit_tiny"]).eval()
    save_encoder("runs/mae-cifar10-seed0", transformer)
    names = {"torch": torch, "torchvision": torchvision, "timm": timm}
    exec(snippet("timm.create_model"), names)
    x = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    assert torch.equal(names["resnet"].eval()(x), encoder.eval()(x))
    small = x[:, :, :32, :32]
    assert torch.allclose(names["vit"].eval()(small), transformer(small)[:, :192], atol=1e-4)


def test_official_weights(monkeypatch):
    # That names and shapes are the authors' is tested in test_mae.py and test_dino.py; with fewer
    # layers this takes no time.
    monkeypatch.setitem(mae.ENCODERS, "vit_base", (192, 2, 3))
    monkeypatch.setitem(dino.ENCODERS, "vit_small", (192, 2, 3))
    mae_weights = mae.VisionTransformer(224, 16, *mae.ENCODERS["vit_base"]).state_dict()
    dino_weights = dino.VisionTransformer(224, 16, *dino.ENCODERS["vit_small"]).state_dict()
    files = {
        "mae_pretrain_vit_base.pth": {"model": mae_weights},
        "dino_deitsmall16_pretrain.pth": dino_weights,
    }

    def downloaded(url, weights_only):
        return files[url.split("/")[-1]]

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", downloaded)
    names = {"torch": torch, "mae": mae, "dino": dino}
    exec(snippet("mae_vit"), names)
    for name, weights in (("mae_vit", mae_weights), ("dino_vit", dino_weights)):
        for key, value in names[name].state_dict().items():
            assert torch.equal(value, weights[key])
