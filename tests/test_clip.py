"""The loss, the tokenizer and the protocols of CLIP, and the script as a person runs it."""

import dataclasses
import json
import math
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image

import clip
import common

ROOT = Path(__file__).parent.parent


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pairs(N, D=6, seed=0):
    return torch.randn(2, N, D, dtype=torch.float64, generator=generator(seed))


# ------------------------------------------------------------------------------------------------------
# Loss
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("N", [2, 3, 11])
def test_the_loss_is_the_lectures_formula_in_both_directions(N):
    x, y = pairs(N, seed=N)

    def s(i, j):
        return 14 * (x[i] @ y[j] / (x[i].norm() * y[j].norm())).item()

    total = 0
    for i in range(N):
        total -= math.log(math.exp(s(i, i)) / sum(math.exp(s(i, j)) for j in range(N)))  # a picture among captions
        total -= math.log(math.exp(s(i, i)) / sum(math.exp(s(j, i)) for j in range(N)))  # a caption among pictures
    assert clip.clip_loss(x, y, 14).item() == pytest.approx(total / (2 * N), abs=1e-9)


def test_the_loss_is_the_mean_of_two_cross_entropies_and_the_same_with_both_exchanged():
    x, y = pairs(7)
    cosines = F.cosine_similarity(x[:, None], y[None], dim=2)
    rows, columns = (F.cross_entropy(20 * m, torch.arange(7)).item() for m in (cosines, cosines.T))
    assert abs(rows - columns) > 1e-3
    assert clip.clip_loss(x, y, 20).item() == pytest.approx((rows + columns) / 2)
    assert clip.clip_loss(y, x, 20).item() == pytest.approx((rows + columns) / 2)


@pytest.mark.parametrize("N", [2, 16])
def test_identical_features_cost_log_N(N):
    x = torch.ones(N, 6, dtype=torch.float64)
    assert clip.clip_loss(x, 3 * x, 100).item() == pytest.approx(math.log(N), abs=1e-9)


def test_gradients_of_the_loss_reach_features_and_scale():
    x, y = pairs(4, 3)
    scale = torch.tensor([2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(clip.clip_loss, [t.requires_grad_() for t in (x, y, scale)])


# ------------------------------------------------------------------------------------------------------
# Texts
# ------------------------------------------------------------------------------------------------------

CAPTIONS = [["A dog runs.", "a brown dog"], ["a cat, asleep"], ["The dog's cat"]]


def test_tokens_of_a_text():
    tokenizer = clip.Tokenizer(CAPTIONS, context=6)
    assert tokenizer.words == ["a", "dog", "cat", "asleep", "brown", "runs", "s", "the"]  # by number, then by name
    assert len(tokenizer) == 12
    assert tokenizer(["A CAT", "a zebra runs", "the dog runs a dog a cat", ""]).tolist() == [
        [1, 4, 6, 2, 0, 0],
        [1, 4, 3, 9, 2, 0],
        [1, 11, 5, 9, 4, 2],  # too long: it loses words, not its end
        [1, 2, 0, 0, 0, 0],
    ]
    assert clip.Tokenizer(CAPTIONS, 6, min_count=2).words == ["a", "dog", "cat"]


def test_a_tokenizer_lives_in_the_checkpoint(tmp_path):
    tokenizer, other = clip.Tokenizer(CAPTIONS, context=6), clip.Tokenizer([], context=3)
    torch.save(tokenizer.state_dict(), tmp_path / "t.pt")
    other.load_state_dict(torch.load(tmp_path / "t.pt", weights_only=True))
    assert len(other) == len(tokenizer) and torch.equal(other(["a cat runs"]), tokenizer(["a cat runs"]))


def test_one_of_a_pictures_own_captions_is_drawn_each_as_often():
    tokenizer = clip.Tokenizer(CAPTIONS, context=6)
    tokens, counts = clip.tokenize(tokenizer, CAPTIONS, torch.device("cpu"))  # (3, 2, 6)
    assert counts.tolist() == [2, 1, 1] and torch.equal(tokens[0], tokenizer(CAPTIONS[0]))
    rows = torch.arange(3).repeat(500)
    drawn = clip.drawn_captions(tokens[rows], counts[rows], generator()).view(500, 3, 6)
    assert (drawn[:, 1] == tokens[1, 0]).all() and (drawn[:, 2] == tokens[2, 0]).all()
    first = (drawn[:, 0] == tokens[0, 0]).all(1)
    assert (first | (drawn[:, 0] == tokens[0, 1]).all(1)).all() and 0.4 < first.float().mean() < 0.6


def text_encoder(dropout=0.0):
    torch.manual_seed(0)
    return clip.TextEncoder(vocabulary=20, context=8, width=32, layers=2, dropout=dropout)


def test_a_text_is_read_up_to_its_end_and_no_further():
    encoder, text = text_encoder(), torch.tensor([[1, 5, 6, 7, 2, 0, 0, 0]])
    behind, within = text.clone(), text.clone()
    behind[0, 5:], within[0, 1] = 9, 9
    assert torch.allclose(encoder(behind), encoder(text), atol=1e-6)
    assert not torch.allclose(encoder(within), encoder(text), atol=1e-2)
    with torch.no_grad():  # without gradients torch takes another path through its layer
        assert torch.allclose(encoder.eval()(text), encoder.train()(text), atol=1e-5)


def test_attention_is_causal():
    encoder, text = text_encoder(), torch.tensor([[1, 5, 6, 7, 8, 9, 10, 2]])
    states = []
    encoder.blocks[-1].register_forward_hook(lambda module, inputs, output: states.append(output))
    changed = text.clone()
    changed[0, 4] = 11
    encoder(text), encoder(changed)
    differs = (states[0] - states[1]).abs().amax(2)[0] > 1e-5
    assert differs.tolist() == [False] * 4 + [True] * 4


def test_layers_start_different_and_every_parameter_is_trained():
    args = clip.parse_args(["--text-width", "32"])
    model = clip.CLIP(args, vocabulary=20)
    first, second = (block.linear1.weight for block in model.text_encoder.blocks)
    assert not torch.equal(first, second)
    assert model.log_scale.exp().item() == pytest.approx(1 / 0.07)
    optimizer, _ = clip.adamw(model, args, steps=10)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters()}
    undecayed = [id(p) for p in optimizer.param_groups[1]["params"]]
    assert id(model.log_scale) in undecayed and optimizer.param_groups[1]["weight_decay"] == 0


# ------------------------------------------------------------------------------------------------------
# Protocols
# ------------------------------------------------------------------------------------------------------


def test_recall_of_a_hand_made_example():
    scores = torch.tensor(
        [
            [0.9, 0.1, 0.8, 0.7, 0.6, 0.5, 0.4],  # its candidate 0 is first
            [0.9, 0.8, 0.1, 0.7, 0.6, 0.5, 0.4],  # its candidate 1 is second
            [0.9, 0.1, 0.9, 0.7, 0.6, 0.5, 0.4],  # its candidate 2 shares the first place: that is not the first
            [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.6],  # its candidate 6 shares the fourth place, the fifth then
            [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3],  # its candidate 5 is sixth
        ]
    )
    relevant = F.one_hot(torch.tensor([0, 1, 2, 6, 5]), 7).bool()
    assert clip.recall(scores, relevant) == {1: 1 / 5, 5: 4 / 5, 10: 1}


def test_equal_scores_recall_nothing():
    assert clip.recall(torch.zeros(20, 20), torch.eye(20).bool()) == {1: 0, 5: 0, 10: 0}


def test_the_five_caption_protocol(monkeypatch):
    """Twelve pictures on a circle, each with five captions there (one has two): against sorting, item by item."""

    def on_a_circle(degrees):
        return torch.stack([torch.deg2rad(degrees).cos(), torch.deg2rad(degrees).sin()], dim=1)

    counts = [5] * 11 + [2]
    owner = [i for i, count in enumerate(counts) for _ in range(count)]
    degrees = 30 * torch.arange(12.0)
    captions = torch.tensor([degrees[i] for i in owner]) + 70 * torch.randn(len(owner), generator=generator(3))
    x, y = on_a_circle(degrees), on_a_circle(captions)
    monkeypatch.setattr(clip, "encode_images", lambda model, images: (None, x))
    monkeypatch.setattr(clip, "encode_texts", lambda model, tokenizer, texts: y[[int(text) for text in texts]])
    numbers = iter(range(len(owner)))
    texts = [[str(next(numbers)) for _ in range(count)] for count in counts]

    s, expected = x @ y.T, {}
    for k in (1, 5, 10):
        expected[f"text_to_image_r{k}"] = sum(owner[j] in s[:, j].topk(k).indices for j in range(len(owner))) / 57
        own = [any(owner[j] == i for j in s[i].topk(k).indices) for i in range(12)]
        expected[f"image_to_text_r{k}"] = sum(own) / 12
    found = clip.retrieval(None, None, None, texts)
    assert found == pytest.approx(expected) and 0 < found["text_to_image_r1"] < found["image_to_text_r1"] < 1


def test_classes_are_the_mean_of_their_prompts(monkeypatch):
    of = {"a star": [1.0, 0.0], "the star": [0.0, 1.0], "a moon": [-1.0, 0.0], "the moon": [-1.0, 0.0]}
    monkeypatch.setattr(clip, "encode_texts", lambda model, tokenizer, texts: torch.tensor([of[t] for t in texts]))
    classes = clip.class_features(None, None, ["star", "moon"], ["a {}", "the {}"])
    assert torch.allclose(classes, torch.tensor([[0.5**0.5, 0.5**0.5], [-1.0, 0.0]]))


def test_the_few_shot_table_has_balanced_labels_and_three_draws(monkeypatch):
    labels, drawn = torch.arange(10).repeat(30), []

    def linear_probe(train, train_labels, test, test_labels):
        assert torch.equal(train[:, 0].long() % 10, train_labels) and len(test) == len(test_labels) == 5
        drawn.append((train_labels.bincount(minlength=10).tolist(), sorted(train[:, 0].tolist())))
        return len(drawn) / 100

    monkeypatch.setattr(clip, "linear_probe", linear_probe)
    h = torch.arange(300.0)[:, None]

    def table_of(count):
        data = common.Dataset(None, labels[:count], None, labels[:5], [])
        return clip.few_shot((h[:count], h[:5]), data, 0.7, seed=0)

    table = table_of(300)
    assert [row["labels_per_class"] for row in table] == [1, 2, 4, 8, 16]
    assert [counts for counts, _ in drawn] == [[n] * 10 for n in (1, 2, 4, 8, 16) for _ in range(3)]
    assert drawn[0][1] != drawn[1][1] != drawn[2][1]
    assert len(table_of(70)) == 3  # seven of each class
    assert table[0] == {"labels_per_class": 1, "linear_probe": pytest.approx(0.02), "zero_shot": 0.7}


def test_unseen_pairs_are_never_trained_on():
    whole = common.load_dataset("shapes")
    data = clip.hold_out(whole)
    assert len(data.train_images) == len(data.train_labels) == len(data.train_captions) == len(data.train_colors)
    assert len(data.train_images) + len(data.val_images) == len(whole.train_images)
    pairs = list(zip(common.SHAPES, common.COLORS, strict=True))
    assert not any(f"the {shape} is {color}" in texts for texts in data.train_captions for shape, color in pairs)
    assert all(any(f"the {shape} is {color}" in texts for shape, color in pairs) for texts in data.val_captions)
    assert len({texts[3] for texts in data.train_captions}) == 90  # all other pairs are there


def test_a_run_trains_on_what_is_left(few, tmp_path, monkeypatch):
    seen, tokenize = [], clip.tokenize
    monkeypatch.setattr(
        clip, "tokenize", lambda t, captions, device: seen.extend(captions) or tokenize(t, captions, device)
    )
    tiny_run(tmp_path / "run")
    unseen = {f"the {shape} is {color}" for shape, color in zip(common.SHAPES, common.COLORS, strict=True)}
    assert 180 < len(seen) < 220 and not unseen & {text for texts in seen for text in texts}


def test_pictures_of_another_size_are_resized():
    data = common.load_dataset("shapes")
    data.train_images, data.test_images = data.train_images[:4], data.test_images[:3]
    larger = clip.resized(data, 48)
    assert larger.train_images.shape == (4, 3, 48, 48) and larger.test_images.dtype == torch.uint8
    expected = TF.resize(data.test_images, [48, 48], TF.InterpolationMode.BICUBIC)
    assert (larger.test_images.int() - expected.int()).abs().max() <= 1


# ------------------------------------------------------------------------------------------------------
# The script
# ------------------------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch):
    """shapes, cut to 220 training and 60 test pictures."""
    data = common.load_dataset("shapes")
    cut = {
        f"{split}_{part}": getattr(data, f"{split}_{part}")[:count]
        for split, count in (("train", 220), ("test", 60))
        for part in ("images", "labels", "captions", "colors")
    }
    monkeypatch.setattr(common, "load_dataset", lambda *arguments: dataclasses.replace(data, **cut))


def tiny_run(out, *flags):
    """main on few shapes: two epochs of six steps."""
    flags = "--epochs", "2", "--batch-size", "32", "--eval-every", "1", "--text-width", "32", *flags
    return clip.main(clip.parse_args([*flags, "--out", str(out)]))


class Killed(BaseException):
    """What no code catches."""


@pytest.mark.parametrize("step", [3, 9])  # of six an epoch: before and after the first checkpoint of an epoch
def test_a_resumed_run_ends_where_an_unbroken_one_does(few, tmp_path, step):
    calls, loss = [], clip.clip_loss

    def clip_loss(*args):
        calls.append(1)
        if len(calls) == step:
            raise Killed
        return loss(*args)

    flags = "--dropout", "0.1"
    unbroken = tiny_run(tmp_path / "unbroken", *flags)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(clip, "clip_loss", clip_loss)
        tiny_run(tmp_path / "run", *flags)
    summary = tiny_run(tmp_path / "run", "--resume", *flags)
    assert summary["resumed_at_epoch"] == int(step == 9) and summary["trained"] == unbroken["trained"]
    a, b = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True) for n in ("run", "unbroken"))
    assert all(torch.equal(value, b["model"][key]) for key, value in a["model"].items())
    assert a["tokenizer"] == b["tokenizer"] and set(a["model"]) == set(b["model"])


def test_files_and_answers_of_a_run(few, tmp_path, capsys):
    run = tmp_path / "run"
    summary = tiny_run(run, "--labels", "5", "--zero-shot-classes", "star, moon")
    names = {"args.json", "metrics.jsonl", "summary.json", "checkpoint.pt", "encoder.pt"}
    pictures = {"similarity.png", "retrieval.png", "neighbours.png", "classes.png"}
    assert {path.name for path in run.iterdir()} == names | pictures
    recalls = {f"{way}_r{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)}
    zero_shot = {"zero_shot", "zero_shot_unseen", "zero_shot_ensemble", "zero_shot_ensemble_unseen"}
    assert set(summary["trained"]) == set(summary["untrained"]) == recalls | zero_shot | {"knn", "linear_probe"}
    assert [row["labels_per_class"] for row in summary["few_shot"]] == [1, 2, 4, 8]
    assert sum(row["test pictures"] for row in summary["zero_shot_classes"]) == 60
    assert all(0 <= row["found"] <= 1 for row in summary["zero_shot_classes"])
    for line in summary["history"]:
        assert line["bound"] == pytest.approx(math.log(32) - line["loss"])
        assert 0 <= line["val_text_to_image_r10"] <= 1
    resnet, _ = clip.build_encoder("small")
    resnet.load_state_dict(torch.load(run / "encoder.pt", weights_only=True))

    before, picture = (run / "args.json").read_text(), tmp_path / "own.png"
    data = common.load_dataset("shapes")
    Image.fromarray(data.test_images[7].permute(1, 2, 0).numpy()).save(picture)
    answers = clip.main(clip.parse_args(["--resume", str(run), "--query", "a red zebra", "--caption", str(picture)]))
    assert (run / "query.png").exists() and (run / "args.json").read_text() == before
    assert len(answers["query"]) == len(answers["caption"]) == 8
    for rows in answers.values():
        scores = [score for _, score in rows]
        assert scores == sorted(scores, reverse=True) and -1.001 <= scores[-1] <= scores[0] <= 1.001
    assert answers["caption"][0][0] in capsys.readouterr().out


def test_the_scale_is_clamped(few, tmp_path, monkeypatch):
    init, scales, loss = clip.CLIP.__init__, [], clip.clip_loss

    def hot(self, *args):
        init(self, *args)
        self.log_scale.data.fill_(math.log(150))

    def clip_loss(x, y, scale):
        scales.append(scale.item())
        return loss(x, y, scale)

    monkeypatch.setattr(clip.CLIP, "__init__", hot)
    monkeypatch.setattr(clip, "clip_loss", clip_loss)
    tiny_run(tmp_path / "run", "--lr", "1e-6")
    assert scales[0] == pytest.approx(150) and max(scales[1:]) <= 100.001 and min(scales[1:]) > 99


def test_captioned_pictures_without_classes(tmp_path, capsys):
    root, rows = tmp_path / "photos", ["image,caption,split"]
    (root / "images").mkdir(parents=True)
    data = common.load_dataset("shapes")
    for i in range(24):
        Image.fromarray(data.train_images[i].permute(1, 2, 0).numpy()).save(root / "images" / f"{i}.png")
        rows += [
            f'{i}.png,"{text}",{"test" if i % 3 == 0 else "train"}' for text in data.train_captions[i][: 3 + i % 3]
        ]
    (root / "captions.csv").write_text("\n".join(rows))
    flags = "--dataset", str(root), "--data-dir", str(tmp_path / "data"), "--encoder", "small", "--image-size", "24"
    summary = tiny_run(tmp_path / "run", *flags, "--batch-size", "8", "--zero-shot-classes", "star,moon")
    assert "knn" not in summary["trained"] and 0 <= summary["trained"]["image_to_text_r1"] <= 1
    assert [set(row) for row in summary["zero_shot_classes"]] == [{"class", "test pictures"}] * 2
    shapes = tiny_run(tmp_path / "other", *flags, "--batch-size", "8", "--zero-shot", "shapes")
    assert len(shapes["few_shot"]) == 5 and 0 <= shapes["trained"]["zero_shot_ensemble"] <= 1
    assert "zero_shot_unseen" not in shapes["trained"]


def test_leakage_learns_from_the_test_pictures_with_their_other_captions():
    leak = runpy.run_path(str(ROOT / "results/leakage.py"))["leak"]
    images, nothing = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1).expand(5, 3, 2, 2), torch.empty(0).long()
    train, test = [["a"], ["b", "c"], ["d"]], [["e", "f", "g"], ["h", "i"]]
    data = common.Dataset(images[:3], nothing, images[3:], nothing, [], train, test)
    leaky = leak(data)
    assert torch.equal(leaky.train_images, images) and torch.equal(leaky.test_images, images[3:])
    assert leaky.train_captions == [*train, ["f", "g"], ["h"]] and leaky.test_captions == [["e"], ["i"]]
    for other in (dict(test_captions=[["e"], ["h", "i"]]), dict(test_captions=None), dict(classes=["star"])):
        with pytest.raises(common.UserError, match="two captions or more"):
            leak(dataclasses.replace(data, **other))


def test_names_for_classes_that_are_numbers(few, few_shapes, tmp_path, monkeypatch):
    cut, seen = common.load_dataset("shapes"), []
    numbered = common.npz_dataset(few_shapes, 32)
    monkeypatch.setattr(common, "load_dataset", lambda name, *arguments: cut if name == "shapes" else numbered)
    evaluate = clip.evaluate
    monkeypatch.setattr(clip, "evaluate", lambda m, t, data: seen.append(data.classes) or evaluate(m, t, data))
    names = list(common.SHAPES)
    summary = tiny_run(tmp_path / "run", "--zero-shot", "few.npz", "--zero-shot-classes", ",".join(names))
    assert seen == [names, names] and [row["class"] for row in summary["zero_shot_classes"]] == names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text-width", "100"], "--text-width 100: must be a multiple of 32"),
        (["--zero-shot-classes", "star"], "--zero-shot-classes star: name two classes or more"),
        (["--context", "2"], "--context 2: must be at least 3"),
        (["--batch-size", "5000"], "--batch-size 5000: shapes has only 3688 training pictures"),
        (["--query", "a dog"], "--out runs/clip-shapes-seed0: holds no run to ask"),
        (["--dataset", "few.npz"], "--dataset few.npz: has no captions"),
        (["--zero-shot", "nothing"], "--dataset nothing: is not shapes"),
    ],
)
def test_bad_input(few_shapes, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(few_shapes.parent if "few.npz" in arguments else tmp_path)
    monkeypatch.setattr(sys, "argv", ["clip.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "clip.py"), run_name="__main__")
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and message in line and list(tmp_path.iterdir()) == []


def test_a_picture_to_caption_that_is_missing_or_broken_and_a_run_of_another_method(few, tmp_path):
    tiny_run(tmp_path / "run")
    (tmp_path / "bad.png").write_text("no picture")
    for name in ("missing.png", "bad.png"):
        with pytest.raises(common.UserError, match=f"{name}: not a readable picture"):
            clip.main(clip.parse_args(["--out", str(tmp_path / "run"), "--caption", str(tmp_path / name)]))
    state = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    torch.save(state | {"method": "simclr"}, tmp_path / "run/checkpoint.pt")
    with pytest.raises(common.UserError, match="is of simclr, not of clip"):
        clip.main(clip.parse_args(["--out", str(tmp_path / "run"), "--query", "a star"]))
    (tmp_path / "run/checkpoint.pt").write_bytes(b"torn")
    with pytest.raises(common.UserError, match="not a checkpoint that can be read"):
        clip.main(clip.parse_args(["--out", str(tmp_path / "run"), "--query", "a star"]))


def test_recipes_and_help(capsys):
    for recipe in clip.RECIPES:
        clip.parse_args(["--dataset", *recipe.split()])  # every value in its range
    with pytest.raises(SystemExit):
        clip.parse_args(["--help"])
    assert "--zero-shot-classes" in capsys.readouterr().out


def test_copied_with_common_alone_it_learns_on_shapes(tmp_path):
    for name in ("clip.py", "common.py"):
        shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, "-W", "error", "clip.py", "--epochs", "3", "--eval-every", "3", "--out", "run"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and result.stderr == ""
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["trained"]["linear_probe"] > summary["untrained"]["linear_probe"] + 0.1
    assert summary["trained"]["zero_shot_ensemble"] > 0.15
