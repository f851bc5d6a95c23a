"""The loss, the tokenizer and the protocols of CLIP, and the script as a person runs it."""

import dataclasses
import json
import math
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clip
import common

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("shapes_once")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pairs(N, D=6, seed=0):
    return torch.randn(2, N, D, dtype=torch.float64, generator=generator(seed))


# ----------------------------------------------------------------------------------------------------------------------
# Loss
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("N", [2, 3, 11])
def test_the_loss_is_the_lectures_formula_in_both_directions(N):
    x, y = pairs(N, seed=N)

    def s(i, j):
        return 14 * (x[i] @ y[j] / (x[i].norm() * y[j].norm())).item()

    total = 0
    for i in range(N):
        total -= math.log(math.exp(s(i, i)) / sum(math.exp(s(i, j)) for j in range(N)))  # an image among captions
        total -= math.log(math.exp(s(i, i)) / sum(math.exp(s(j, i)) for j in range(N)))  # a caption among images
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


# ----------------------------------------------------------------------------------------------------------------------
# Texts
# ----------------------------------------------------------------------------------------------------------------------

CAPTIONS = [["A dog runs.", "a brown dog"], ["a cat, asleep"], ["The dog's cat"]]


def test_tokens_of_a_text():
    tokenizer = clip.Tokenizer(CAPTIONS, context=6)
    assert tokenizer.words == ["a", "dog", "cat"]  # by number, then by name; others are there once
    assert tokenizer(["A CAT", "a zebra runs", "the dog runs a dog a cat", ""]).tolist() == [
        [1, 4, 6, 2, 0, 0],
        [1, 4, 3, 3, 2, 0],
        [1, 3, 5, 3, 4, 2],  # too long: it loses words, not its end
        [1, 2, 0, 0, 0, 0],
    ]
    assert tokenizer.unknown("a Zebra_dog") == ["zebra"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("red_star, aquarium-fish", ["red", "star", "aquarium", "fish"]),
        ("Cafe\u0301 CAFÉ", ["café", "café"]),  # decomposed and composed
        ("हिन्दी में", ["हिन्दी", "में"]),  # signs that are no letters
        ("一只狗 runs", ["一", "只", "狗", "runs"]),
        ("개가 뛴다 2 dogs' toys", ["개가", "뛴다", "2", "dogs", "toys"]),
        ("?!", []),
    ],
)
def test_words_of_a_text(text, words):
    assert clip.Tokenizer([], 8).split(text) == words


def test_unknown_words_are_named_and_a_text_without_a_known_word_is_refused(capsys):
    tokenizer = clip.Tokenizer(CAPTIONS, context=6)
    tokenizer.check(["a dog"])
    assert capsys.readouterr().out == ""
    tokenizer.check(["a zebra", "dog, zebra, horse"])
    assert capsys.readouterr().out == "not in the vocabulary: zebra, horse\n"
    with pytest.raises(common.UserError, match="'zebra', 'green_horse': no word of the training captions"):
        tokenizer.check(["zebra", "a dog", "green_horse"])


def test_a_tokenizer_lives_in_the_checkpoint(tmp_path):
    tokenizer, other = clip.Tokenizer(CAPTIONS, context=6), clip.Tokenizer([], context=3)
    torch.save(tokenizer.state_dict(), tmp_path / "t.pt")
    other.load_state_dict(torch.load(tmp_path / "t.pt", weights_only=True))
    assert other.words == tokenizer.words and torch.equal(other(["a cat runs"]), tokenizer(["a cat runs"]))


def test_one_of_an_images_own_captions_is_drawn_each_as_often():
    tokenizer = clip.Tokenizer(CAPTIONS, context=6)
    table, own = clip.caption_table(tokenizer, CAPTIONS, torch.device("cpu")), [tokenizer(texts) for texts in CAPTIONS]
    drawn = clip.drawn_captions(table, torch.arange(3).repeat(500), generator()).view(500, 3, 6)
    assert (drawn[:, 1] == own[1][0]).all() and (drawn[:, 2] == own[2][0]).all()
    first = (drawn[:, 0] == own[0][0]).all(1)
    assert (first | (drawn[:, 0] == own[0][1]).all(1)).all() and 0.4 < first.float().mean() < 0.6


def test_one_image_of_many_captions_costs_what_they_cost():
    captions = [["a dog"] * 2000] + [["a cat"]] * 999
    tokens, first, counts = clip.caption_table(clip.Tokenizer(captions, 6), captions, torch.device("cpu"))
    assert tokens.shape == (2999, 6) and first[:3].tolist() == [0, 2000, 2001] and counts[:2].tolist() == [2000, 1]


def tiny_model():
    torch.manual_seed(0)
    return clip.CLIP(clip.parse_args(["--text-width", "64", "--context", "8"]), vocabulary=20)


def test_a_text_is_read_up_to_its_end_and_no_further():
    model, text = tiny_model(), torch.tensor([[1, 5, 6, 7, 2, 0, 0, 0]])
    behind, within = text.clone(), text.clone()
    behind[0, 5:], within[0, 1] = 9, 9
    assert torch.allclose(model.encode_text(behind), model.encode_text(text), atol=1e-6)
    assert not torch.allclose(model.encode_text(within), model.encode_text(text), atol=1e-2)
    with torch.no_grad():  # without gradients torch takes another path through its layer
        assert torch.allclose(model.eval().encode_text(text), model.train().encode_text(text), atol=1e-5)


def test_attention_is_causal():
    model, text = tiny_model(), torch.tensor([[1, 5, 6, 7, 8, 9, 10, 2]])
    states = []
    model.blocks[-1].register_forward_hook(lambda module, inputs, output: states.append(output))
    changed = text.clone()
    changed[0, 4] = 11
    model.encode_text(text), model.encode_text(changed)
    differs = (states[0] - states[1]).abs().amax(2)[0] > 1e-5
    assert differs.tolist() == [False] * 4 + [True] * 4


def test_layers_start_different_and_every_parameter_is_trained():
    args = clip.parse_args(["--text-width", "64"])
    model = clip.CLIP(args, vocabulary=20)
    first, second = (block.linear1.weight for block in model.blocks)
    assert not torch.equal(first, second)
    assert model.log_scale.exp().item() == pytest.approx(1 / 0.07)
    optimizer, _ = clip.make_optimizer(model, args, steps=10)
    decayed, others = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    assert decayed | others == {id(p) for p in model.parameters()} and not decayed & others
    assert all((id(p) in decayed) == (p.ndim > 1) for p in model.parameters()) and id(model.log_scale) in others
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]


def test_learning_rate_rises_and_falls_to_zero():
    optimizer, schedule = clip.make_optimizer(torch.nn.Linear(2, 2), clip.parse_args(["--lr", "1"]), 100)
    rates = []
    for _ in range(102):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:6] == pytest.approx([(step + 1) / 6 for step in range(6)])
    assert rates[5:] == sorted(rates[5:], reverse=True) and rates[100:] == pytest.approx([0, 0])


# ----------------------------------------------------------------------------------------------------------------------
# Protocols
# ----------------------------------------------------------------------------------------------------------------------


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
    found = clip.recall(torch.eye(5), scores.T, torch.tensor([0, 1, 2, 6, 5]), torch.arange(7))
    assert found == pytest.approx({1: 1 / 5, 5: 4 / 5, 10: 1})


def test_equal_scores_and_what_is_no_number_recall_nothing():
    image = torch.arange(20)
    for value in (0.0, math.nan):
        assert clip.recall(torch.full((20, 3), value), torch.ones(20, 3), image, image) == {1: 0, 5: 0, 10: 0}


def test_recall_in_pieces_is_that_of_the_whole_matrix():
    x, y = (F.normalize(features, dim=1) for features in pairs(1500, D=32))
    x = F.normalize(x + y, dim=1)
    s, n = x @ y.T, torch.arange(1500)
    ahead = (s > s.diagonal()[:, None]).sum(1)
    found = clip.recall(x, y, n, n)
    assert found == pytest.approx({k: (ahead < k).float().mean().item() for k in (1, 5, 10)}) and 0.2 < found[1] < 1


def test_the_five_caption_protocol(monkeypatch):
    """Twelve images on a circle, each with five captions there (one has two): against sorting, item by item."""

    def on_a_circle(degrees):
        return torch.stack([torch.deg2rad(degrees).cos(), torch.deg2rad(degrees).sin()], dim=1)

    counts = [5] * 11 + [2]
    owner = [i for i, count in enumerate(counts) for _ in range(count)]
    degrees = 30 * torch.arange(12.0)
    captions = torch.tensor([degrees[i] for i in owner]) + 70 * torch.randn(len(owner), generator=generator(3))
    x, y = on_a_circle(degrees), on_a_circle(captions)
    monkeypatch.setattr(clip, "embed_images", lambda model, images: (None, x))
    monkeypatch.setattr(clip, "embed_texts", lambda model, tokenizer, texts: y[[int(text) for text in texts]])
    numbers = iter(range(len(owner)))
    texts = [[str(next(numbers)) for _ in range(count)] for count in counts]

    s, expected = x @ y.T, {}
    for k in (1, 5, 10):
        expected[f"text_to_image_r{k}"] = sum(owner[j] in s[:, j].topk(k).indices for j in range(len(owner))) / 57
        own = [any(owner[j] == i for j in s[i].topk(k).indices) for i in range(12)]
        expected[f"image_to_text_r{k}"] = sum(own) / 12
    found = clip.retrieval(None, None, None, texts)
    assert found == pytest.approx(expected) and 0 < found["text_to_image_r1"] < found["image_to_text_r1"] < 1


def test_few_shot_probes_have_balanced_labels_and_three_draws(few, tmp_path, monkeypatch):
    drawn = []

    def linear_probe(train, train_labels, test, test_labels):
        drawn.append((train_labels.bincount(minlength=10).tolist(), train.sum().item()))
        return len(drawn) / 1000

    monkeypatch.setattr(clip, "linear_probe", linear_probe)
    data = clip.hold_out(common.load_dataset("shapes"))
    counts, fewest = data.train_labels.bincount().tolist(), data.train_labels.bincount().min()
    args = clip.parse_args([])
    tokenizer = clip.Tokenizer(data.train_captions, args.context)
    results = clip.evaluate(clip.CLIP(args, 4 + len(tokenizer.words)), tokenizer, data)
    numbers = [n for n in (1, 2, 4, 8, 16) if n <= fewest]
    assert len(numbers) >= 3 and [c for c, _ in drawn] == [counts] + [[n] * 10 for n in numbers for _ in range(3)]
    assert len({total for _, total in drawn[1:4]}) == 3  # three draws
    probes = {name: value for name, value in results.items() if name.startswith("linear_probe_")}
    assert list(probes) == [f"linear_probe_{n}_per_class" for n in numbers]
    assert probes["linear_probe_1_per_class"] == pytest.approx(0.003)


def test_unseen_pairs_are_in_neither_training_nor_validation():
    whole = common.load_dataset("shapes")
    data = clip.hold_out(whole)
    assert len(data.train_images) == len(data.train_labels) == len(data.train_captions)
    assert len(data.val_images) == len(data.val_captions) == (len(data.train_images) + len(data.val_images)) // 10
    pairs = list(zip(common.SHAPES, common.COLORS, strict=True))
    for captions in (data.train_captions, data.val_captions):
        assert not any(f"the {shape} is {color}" in texts for texts in captions for shape, color in pairs)
    assert len({texts[3] for texts in data.train_captions}) == 90  # all other pairs are there
    images = {bytes(image): (texts, y) for image, texts, y in zip(
        whole.train_images.numpy(), whole.train_captions, whole.train_labels.tolist(), strict=True)}  # fmt: skip
    for image, texts, y in zip(data.train_images.numpy(), data.train_captions, data.train_labels.tolist(), strict=True):
        assert images.pop(bytes(image)) == (texts, y)
    assert all(bytes(image) in images for image in data.val_images.numpy())  # not among the training ones


# ----------------------------------------------------------------------------------------------------------------------
# The script
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch):
    """shapes, cut to 240 training and 60 test images."""
    data = common.shapes_dataset()
    cut = {
        f"{split}_{part}": getattr(data, f"{split}_{part}")[:count]
        for split, count in (("train", 240), ("test", 60))
        for part in ("images", "labels", "captions", "colors")
    }
    monkeypatch.setattr(common, "shapes_dataset", lambda: dataclasses.replace(data, **cut))


def tiny_run(out, *flags):
    """main on few shapes: two epochs of six steps."""
    words = "--epochs", "2", "--batch-size", "32", "--eval-every", "1", "--text-width", "64", "--out", str(out)
    return clip.main(clip.parse_args([*words, *map(str, flags)]))


def ask(run, *flags):
    return clip.main(clip.parse_args(["--resume", str(run), *map(str, flags)]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run on 1,000 shapes, and its summary: it learns colors, which come first."""
    data, folder = common.shapes_dataset(), tmp_path_factory.mktemp("trained") / "run"
    names = [f"train_{name}" for name in ("images", "labels", "captions", "colors")]
    part = {name: getattr(data, name)[:1000] for name in names}
    part |= {name.replace("train", "test"): getattr(data, name.replace("train", "test"))[:500] for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "shapes_dataset", lambda: dataclasses.replace(data, **part))
        words = "--epochs", "5", "--batch-size", "32", "--eval-every", "5", "--out", str(folder)
        return folder, clip.main(clip.parse_args(words))


def test_it_learns_to_read(trained):
    folder, summary = trained
    before, after = summary["untrained"], summary["trained"]
    assert after["image_to_text_r10"] > before["image_to_text_r10"] + 0.2
    assert after["text_to_image_r10"] > before["text_to_image_r10"] + 0.1
    assert summary["history"][-1]["bound"] > 0.5 and summary["history"][-1]["val_recall"] > 0.5


def test_files_of_a_run(trained):
    run, summary = trained
    names = {"args.json", "metrics.jsonl", "summary.json", "checkpoint.pt", "encoder.pt", ".lock"}
    assert {path.name for path in run.iterdir()} >= names | {"similarity.png", "retrieval.png"}
    recalls = {f"{way}_r{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)}
    probes = {"linear_probe", *(f"linear_probe_{n}_per_class" for n in (1, 2, 4, 8, 16))}
    assert set(summary["trained"]) == set(summary["untrained"]) == recalls | {"zero_shot", "zero_shot_unseen"} | probes
    assert summary == json.loads((run / "summary.json").read_text()) and summary["unknown_words"] == 0
    for line in summary["history"]:
        assert line["bound"] == pytest.approx(math.log(32) - line["loss"])
    assert ["val_recall" in line for line in summary["history"]] == [False] * 4 + [True] and summary["best_epoch"] == 5
    resnet, _ = clip.build_encoder("small")
    resnet.load_state_dict(torch.load(run / "encoder.pt", weights_only=True))


def test_questions_to_a_run(trained, tmp_path, capsys):
    run, before = trained[0], (trained[0] / "args.json").read_text()
    found = ask(run, "--query", "a red zebra")
    assert "not in the vocabulary: zebra\n" in (out := capsys.readouterr().out) and len(found) == 8
    scores = [score for _, score in found]
    assert scores == sorted(scores, reverse=True) and 1.001 > scores[0] > scores[-1] > -1 and found[0][0] in out
    assert (run / "query.png").exists() and (run / "args.json").read_text() == before

    model, tokenizer, args = clip.load_run(run)  # as README shows it
    data = common.load_dataset("shapes")
    with torch.no_grad():
        y = F.normalize(model.encode_text(tokenizer(["a red zebra"])), dim=1)
        x = F.normalize(model.encode_image(common.normalize(data.test_images / 255)), dim=1)
    assert args.image_size == 32 and scores == pytest.approx((x @ y[0]).topk(8).values.tolist(), abs=1e-4)

    counts = ask(run, "--zero-shot-classes", "star,moon,heart")
    assert [name for name, _ in counts] == ["star", "moon", "heart"] and sum(n for _, n in counts) == 2000
    assert (run / "classes.png").exists()
    with pytest.raises(common.UserError, match="'zebra', 'yak': no word of the training captions"):
        ask(run, "--zero-shot-classes", "star,zebra,yak")

    Image.fromarray(data.test_images[7].permute(1, 2, 0).numpy()).save(tmp_path / "own.png")
    own = ask(run, "--caption", tmp_path / "own.png")
    texts = {text for captions in data.test_captions for text in captions}
    assert len(own) == 8 and all(text in texts for text, _ in own) and own[0][1] >= own[7][1]
    *counts, (_, right) = ask(run, "--zero-shot-classes", ",".join(common.SHAPES))  # in the order of the labels
    y = clip.embed_texts(model, tokenizer, [f"a photo of a {name}" for name in common.SHAPES])
    assert right == ((x @ y.T).argmax(1) == data.test_labels).sum() and sum(n for _, n in counts) == 2000
    images = data.test_images[:5].permute(0, 2, 3, 1).numpy()  # data that has moved
    np.savez(tmp_path / "moved.npz", train_images=np.concatenate([images] * 2))
    (moved,) = ask(run, "--query", "a star", "--dataset", tmp_path / "moved.npz")
    assert moved[0] == "test image 0"
    (tmp_path / "bad.png").write_text("no image")
    for name in ("missing.png", "bad.png"):
        with pytest.raises(common.UserError, match=f"{name}: not a readable image"):
            ask(run, "--caption", tmp_path / name)


def test_what_is_no_run_to_ask(trained, tmp_path):
    shutil.copytree(trained[0], run := tmp_path / "run")
    (run / "checkpoint.pt").write_bytes(b"torn")
    for folder in (run, tmp_path / "nothing"):
        with pytest.raises(common.UserError, match="must be the folder of a trained run of clip.py"):
            clip.load_run(folder)


def test_the_epoch_of_the_best_validation_recall_is_kept(few, tmp_path, monkeypatch):
    recalls, states, save = iter([0.2, 0.5, 0.5, 0.1]), [], clip.save_epoch
    retrieval = clip.retrieval

    def fake(model, tokenizer, images, captions):
        if len(images) == 60:  # test
            return retrieval(model, tokenizer, images, captions)
        value = next(recalls)
        return {"text_to_image_r10": value - 0.1, "image_to_text_r10": value + 0.1}

    def spy(args, state, *rest):
        states.append({key: value.clone() for key, value in state["model"].encoder.state_dict().items()})
        save(args, state, *rest)

    monkeypatch.setattr(clip, "retrieval", fake)
    monkeypatch.setattr(clip, "save_epoch", spy)
    summary = tiny_run(tmp_path / "run", "--epochs", 4)
    assert [line["val_recall"] for line in summary["history"]] == pytest.approx([0.2, 0.5, 0.5, 0.1])
    assert summary["best_epoch"] == 3  # of equal ones the later
    kept, model = torch.load(tmp_path / "run/encoder.pt", weights_only=True), clip.load_run(tmp_path / "run")[0]
    for key, value in kept.items():
        assert torch.equal(value, states[2][key]) and torch.equal(value, model.encoder.state_dict()[key])
    assert not torch.equal(kept["conv1.weight"], states[3]["conv1.weight"])


class Killed(BaseException):
    """What no code catches."""


def test_a_resumed_run_ends_where_an_unbroken_one_does(few, tmp_path):
    calls, loss = [], clip.clip_loss

    def clip_loss(*args):
        calls.append(1)
        if len(calls) == 9:  # of six an epoch: a checkpoint is there
            raise Killed
        return loss(*args)

    unbroken = tiny_run(tmp_path / "unbroken")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(clip, "clip_loss", clip_loss)
        tiny_run(tmp_path / "run")
    summary = clip.main(clip.parse_args(["--resume", str(tmp_path / "run")]))
    assert summary["trained"] == unbroken["trained"] and len(summary["history"]) == 2
    a, b = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True) for n in ("run", "unbroken"))
    for part in ("model", "best"):
        assert all(torch.equal(value, b[part][key]) for key, value in a[part].items())
    assert a["tokenizer"] == b["tokenizer"]


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
    tiny_run(tmp_path / "run", "--lr", "1e-6", "--epochs", 1)
    assert scales[0] == pytest.approx(150) and max(scales[1:]) <= 100.001 and min(scales[1:]) > 99


def test_captioned_images_without_classes(few_shapes, tmp_path, capsys):
    root, rows = tmp_path / "photos", ["image,caption,split"]
    (root / "images").mkdir(parents=True)
    data = common.load_dataset("shapes")
    for i in range(24):
        Image.fromarray(data.train_images[i].permute(1, 2, 0).numpy()).save(root / "images" / f"{i}.png")
        texts = [text.replace("background", "ground") if i % 3 == 0 else text for text in data.train_captions[i]]
        rows += [f'{i}.png,"{text}",{"test" if i % 3 == 0 else "train"}' for text in texts[: 3 + i % 3]]
    (root / "captions.csv").write_text("\n".join(rows))
    flags = "--dataset", root, "--data-dir", tmp_path / "data", "--encoder", "small", "--image-size", 24
    flags = *flags, "--batch-size", 8, "--epochs", 1
    summary = tiny_run(tmp_path / "run", *flags)
    assert "zero_shot" not in summary["trained"] and 0 <= summary["trained"]["image_to_text_r1"] <= 1
    assert "val_recall" not in summary["history"][0] and summary["best_epoch"] == 1
    assert f"{summary['unknown_words']:.1%} of the words in test captions are not among" in capsys.readouterr().out
    assert 0 < summary["unknown_words"] < 0.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text-width", "100"], "--text-width: invalid choice: 100"),
        (["--context", "2"], "--context 2: must be from 3 to inf"),
        (["--batch-size", "5000"], "--batch-size 5000: at most the 3320 images"),
        (["--query", "a dog"], "--resume RUN: must be the folder of a trained run of clip.py"),
        (["--query", "a dog", "--caption", "a.png"], "--caption, --query and --zero-shot-classes: one at a time"),
        (["--dataset", "few.npz"], "--dataset few.npz: has no captions"),
        (["--resume", "nothing", "--query", "a dog"], "--resume nothing: there is no run of clip.py in this folder"),
    ],
)
def test_bad_input(few_shapes, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(few_shapes.parent if "few.npz" in words else tmp_path)
    monkeypatch.setattr(sys, "argv", ["clip.py", *words])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "clip.py"), run_name="__main__")
    line = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2 and message in line and list(tmp_path.iterdir()) == []


def test_two_processes_do_what_one_does(two_processes):
    folder, printed = two_processes
    for name in ("loss", "gradient", "scale-gradient"):
        for rank in range(2):
            assert float((folder / f"clip-{name}-{rank}.txt").read_text()) < 1e-10
    models = [torch.load(folder / f"clip-{rank}.pt", weights_only=True) for rank in range(2)]
    assert models[0].keys() == models[1].keys() >= {"log_scale"}
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
    out = printed[0][printed[0].index("clip on") :]
    assert [out.count(f"epoch {epoch}/") for epoch in (1, 2, 3)] == [1, 1, 1] and "epoch 3/3" in out  # it was resumed
    assert printed[1] == "" and (folder / "clip/summary.json").exists()
