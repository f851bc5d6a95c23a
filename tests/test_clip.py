"""clip.py: the loss, the tokenizer, retrieval and zero-shot, questions to a run, and whole runs."""

import copy
import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    FILES,
    SHAPES,
    assert_ended_alike,
    assert_resumed_in_both,
    assert_same,
    files,
    killed_at,
    load,
    train_and_resume,
)
from PIL import Image
from torch import nn

import clip
import common
import simclr

pytestmark = pytest.mark.usefixtures("shapes_once")
RESULTS = FILES | {"similarity.png", "retrieval.png"}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def features(N, D=6, seed=0):
    """Of N images and of N texts."""
    return torch.randn(2, N, D, dtype=torch.float64, generator=generator(seed))


# ==================================================================================================
# Loss
# ==================================================================================================


@pytest.mark.parametrize("N", [2, 3, 11])
def test_the_loss_is_the_formula_in_both_directions(N):
    x, y = features(N, seed=N)

    def s(i, j):
        return 14 * (x[i] @ y[j] / (x[i].norm() * y[j].norm())).item()

    total = 0
    for i in range(N):
        captions = sum(math.exp(s(i, j)) for j in range(N))
        images = sum(math.exp(s(j, i)) for j in range(N))
        total -= math.log(math.exp(s(i, i)) / captions)
        total -= math.log(math.exp(s(i, i)) / images)
    assert clip.clip_loss(x, y, 14).item() == pytest.approx(total / (2 * N), abs=1e-9)


def test_the_loss_is_symmetric():
    x, y = features(7)
    cosines = F.cosine_similarity(x[:, None], y[None], dim=2)
    rows = F.cross_entropy(20 * cosines, torch.arange(7)).item()
    columns = F.cross_entropy(20 * cosines.T, torch.arange(7)).item()
    assert abs(rows - columns) > 1e-3
    assert clip.clip_loss(x, y, 20).item() == pytest.approx((rows + columns) / 2)
    assert clip.clip_loss(y, x, 20).item() == pytest.approx((rows + columns) / 2)


@pytest.mark.parametrize("N", [2, 16])
def test_identical_features_cost_log_N(N):
    x = torch.ones(N, 6, dtype=torch.float64)
    assert clip.clip_loss(x, 3 * x, 100).item() == pytest.approx(math.log(N), abs=1e-9)


def test_gradients_of_the_loss_reach_features_and_scale():
    x, y = features(4, 3)
    scale = torch.tensor([2.0], dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, y, scale)]
    assert torch.autograd.gradcheck(clip.clip_loss, inputs)


# ==================================================================================================
# Texts
# ==================================================================================================

CAPTIONS = [["A dog runs.", "a brown dog"], ["a cat, asleep"], ["The dog's cat"]]


def test_tokens_of_a_text():
    tokenizer = clip.Tokenizer(CAPTIONS, context=6)
    assert tokenizer.words == ["a", "dog", "cat"]  # by frequency; the others occur once
    assert tokenizer(["A CAT", "a zebra runs", "the dog runs a dog a cat", ""]).tolist() == [
        [1, 4, 6, 2, 0, 0],
        [1, 4, 3, 3, 2, 0],
        [1, 3, 5, 3, 4, 2],  # too long: it loses words, not its end
        [1, 2, 0, 0, 0, 0],
    ]
    assert tokenizer.unknown("a Zebra_dog") == ["zebra"]


def test_words_of_one_frequency_are_in_the_order_of_the_alphabet():
    tokenizer = clip.Tokenizer([["b a d c", "c a b d", "d"]], context=6)
    assert tokenizer.words == ["d", "a", "b", "c"]


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


def test_unknown_words_are_named(capsys):
    tokenizer = clip.Tokenizer(CAPTIONS, context=6)
    tokenizer.check(["a dog"])
    assert capsys.readouterr().out == ""
    tokenizer.check(["a zebra", "dog, zebra, horse"])
    assert capsys.readouterr().out == "not in the vocabulary: zebra, horse\n"


def test_a_text_without_any_known_word_is_refused():
    tokenizer = clip.Tokenizer(CAPTIONS, context=6)
    message = "'zebra', 'green_horse': no word of the training captions"
    with pytest.raises(common.UserError, match=message):
        tokenizer.check(["zebra", "a dog", "green_horse"])


def test_a_tokenizer_is_kept_in_the_checkpoint(tmp_path):
    tokenizer = clip.Tokenizer(CAPTIONS, context=6)
    torch.save(tokenizer.state_dict(), tmp_path / "t.pt")
    other = clip.Tokenizer([], context=3)
    other.load_state_dict(load(tmp_path / "t.pt"))
    assert torch.equal(other(["a cat runs"]), tokenizer(["a cat runs"]))


def test_each_caption_of_an_image_is_drawn_as_often():
    tokenizer = clip.Tokenizer(CAPTIONS, context=6)
    table = clip.caption_table(tokenizer, CAPTIONS, torch.device("cpu"))
    rows = torch.arange(3).repeat(500)
    drawn = clip.drawn_captions(table, rows, generator()).view(500, 3, 6)
    first, second = tokenizer(CAPTIONS[0])
    assert (drawn[:, 1] == tokenizer(CAPTIONS[1])).all()
    assert (drawn[:, 2] == tokenizer(CAPTIONS[2])).all()
    is_first = (drawn[:, 0] == first).all(1)
    is_second = (drawn[:, 0] == second).all(1)
    assert (is_first | is_second).all()
    assert 0.4 < is_first.float().mean() < 0.6


def test_many_captions_of_one_image_cost_what_they_cost():
    captions = [["a dog"] * 2000] + [["a cat"]] * 999
    tokenizer = clip.Tokenizer(captions, 6)
    tokens, first, counts = clip.caption_table(tokenizer, captions, torch.device("cpu"))
    assert tokens.shape == (2999, 6)
    assert first[:3].tolist() == [0, 2000, 2001]
    assert counts[:2].tolist() == [2000, 1]


# ==================================================================================================
# Model
# ==================================================================================================


def small_args(*flags):
    return clip.parse_args(["--text-width", "64", "--context", "8", *flags])


def small_model(*flags):
    torch.manual_seed(0)
    return clip.CLIP(small_args(*flags), vocabulary=20)


def test_what_is_behind_the_end_of_a_text_does_not_matter():
    model = small_model()
    text = torch.tensor([[1, 5, 6, 7, 2, 0, 0, 0]])
    behind = text.clone()
    behind[0, 5:] = 9
    within = text.clone()
    within[0, 1] = 9
    y = model.encode_text(text)
    torch.testing.assert_close(model.encode_text(behind), y, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(model.encode_text(within), y, atol=1e-2)


def test_texts_are_encoded_alike_in_training_and_after_it():
    """Without gradients torch takes another path through its layer."""
    model = small_model()
    text = torch.tensor([[1, 5, 6, 7, 2, 0, 0, 0]])
    y = model.encode_text(text)
    with torch.no_grad():
        torch.testing.assert_close(model.eval().encode_text(text), y, atol=1e-5, rtol=1e-5)


def test_attention_is_causal():
    model = small_model()
    text = torch.tensor([[1, 5, 6, 7, 8, 9, 10, 2]])
    changed = text.clone()
    changed[0, 4] = 11
    states = []
    model.blocks[-1].register_forward_hook(lambda module, inputs, output: states.append(output))
    model.encode_text(text)
    model.encode_text(changed)
    differs = (states[0] - states[1]).abs().amax(2)[0] > 1e-5
    assert differs.tolist() == [False] * 4 + [True] * 4


def test_layers_begin_different_and_the_scale_as_in_the_paper():
    model = small_model()
    first, second = (block.linear1.weight for block in model.blocks)
    assert not torch.equal(first, second)
    assert model.log_scale.exp().item() == pytest.approx(1 / 0.07)


def test_every_parameter_is_trained_and_matrices_decay():
    model = small_model()
    optimizer, _ = clip.make_optimizer(model, small_args(), 64, 10)
    decay = {}
    for group in optimizer.param_groups:
        decay |= dict.fromkeys(group["params"], group["weight_decay"])
    assert decay == {p: 0.2 if p.ndim > 1 else 0.0 for p in model.parameters()}
    assert decay[model.log_scale] == 0.0


def test_the_learning_rate_rises_and_falls_to_zero():
    args = clip.parse_args(["--lr", "1", "--warmup", "0.05"])
    optimizer, schedule = clip.make_optimizer(nn.Linear(2, 2), args, 64, 100)
    rates = []
    for _ in range(102):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:6] == pytest.approx([(step + 1) / 6 for step in range(6)])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[100:] == pytest.approx([0, 0])


# ==================================================================================================
# A training step
# ==================================================================================================


def stepped(log_scale, update):
    """A model with this scale after a training step, and what the step logs."""
    model = small_model()
    model.log_scale.data.fill_(log_scale)
    images = torch.randint(256, (6, 3, 32, 32), generator=generator(), dtype=torch.uint8)
    tokens = torch.randint(4, 20, (6, 8), generator=generator(1))
    tokens[:, 0] = 1
    tokens[:, 7] = 2
    args = small_args("--batch-size", "6")
    terms = clip.training_step(model, images, tokens, args, generator(2), update)
    return model, {name: x.item() for name, x in terms.items()}


def test_a_step_logs_loss_bound_and_scale():
    losses = []
    _, terms = stepped(0.0, losses.append)
    assert terms.keys() == {"loss", "bound", "logit_scale"}
    assert [loss.item() for loss in losses] == [terms["loss"]]
    assert terms["bound"] == pytest.approx(math.log(6) - terms["loss"], abs=1e-6)
    assert terms["logit_scale"] == 1


@pytest.mark.parametrize(("before", "after"), [(math.log(150), math.log(100)), (2.0, 2.0)])
def test_the_scale_is_clamped(before, after):
    model, _ = stepped(before, lambda loss: None)
    assert model.log_scale.item() == pytest.approx(after)


# ==================================================================================================
# Retrieval and zero-shot
# ==================================================================================================


def test_recall_of_a_hand_made_example():
    scores = torch.tensor(
        [
            [0.9, 0.1, 0.8, 0.7, 0.6, 0.5, 0.4],  # its candidate 0 is first
            [0.9, 0.8, 0.1, 0.7, 0.6, 0.5, 0.4],  # its candidate 1 is second
            [0.9, 0.1, 0.9, 0.7, 0.6, 0.5, 0.4],  # its candidate 2 shares the first place: no first
            [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.6],  # its candidate 6 shares the fourth: it is fifth
            [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3],  # its candidate 5 is sixth
        ]
    )
    owner = torch.tensor([0, 1, 2, 6, 5])
    found = clip.recall(torch.eye(5), scores.T, owner, torch.arange(7))
    assert found == pytest.approx({1: 1 / 5, 5: 4 / 5, 10: 1})


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_equal_scores_and_nan_recall_nothing(value):
    image = torch.arange(20)
    found = clip.recall(torch.full((20, 3), value), torch.ones(20, 3), image, image)
    assert found == {1: 0, 5: 0, 10: 0}


def test_recall_in_pieces_is_that_of_the_whole_matrix():
    x, y = features(1500, D=32)
    y = F.normalize(y, dim=1)
    x = F.normalize(F.normalize(x, dim=1) + y, dim=1)
    s = x @ y.T
    image = torch.arange(1500)
    ahead = (s > s.diagonal()[:, None]).sum(1)
    found = clip.recall(x, y, image, image)
    assert found == pytest.approx({k: (ahead < k).float().mean().item() for k in (1, 5, 10)})
    assert 0.2 < found[1] < 1


def on_a_circle(degrees):
    return torch.stack([torch.deg2rad(degrees).cos(), torch.deg2rad(degrees).sin()], dim=1)


def test_retrieval_follows_the_protocol_of_five_captions(monkeypatch):
    """Twelve images on a circle, each with five captions there, one with two: against sorting."""
    counts = [5] * 11 + [2]
    owner = [i for i, count in enumerate(counts) for _ in range(count)]
    degrees = 30 * torch.arange(12.0)
    noise = 70 * torch.randn(len(owner), generator=generator(3))
    x = on_a_circle(degrees)
    y = on_a_circle(degrees[owner] + noise)
    texts = [[str(k) for k, i in enumerate(owner) if i == image] for image in range(12)]
    monkeypatch.setattr(clip, "embed_images", lambda model, images: x)
    monkeypatch.setattr(
        clip, "embed_texts", lambda model, tokenizer, texts: y[list(map(int, texts))]
    )
    s = x @ y.T
    expected = {}
    for k in (1, 5, 10):
        own = [owner[j] in s[:, j].topk(k).indices for j in range(len(owner))]
        expected[f"text_to_image_r{k}"] = sum(own) / len(owner)
        own = [any(owner[j] == i for j in s[i].topk(k).indices) for i in range(12)]
        expected[f"image_to_text_r{k}"] = sum(own) / 12
    found = clip.retrieval(None, None, None, texts)
    assert found == pytest.approx(expected)
    assert 0 < found["text_to_image_r1"] < found["image_to_text_r1"] < 1


def test_zero_shot_is_the_formula_of_the_docstring():
    model = small_model()
    tokenizer = clip.Tokenizer([["a photo of a dog cat star"] * 2], 8)
    x = F.normalize(torch.randn(5, 64, generator=generator()), dim=1)
    names = ["dog", "cat", "star"]
    logits = clip.zero_shot_logits(model, tokenizer, x, names)
    y = model.encode_text(tokenizer([f"a photo of a {name}" for name in names]))
    for i in range(5):
        for c in range(3):
            expected = x[i] @ y[c] / (x[i].norm() * y[c].norm()) / 0.07
            assert logits[i, c].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)


def part_of(data, train, test):
    """The first shapes."""
    part = {}
    for split, count in (("train", train), ("test", test)):
        for name in ("images", "labels", "captions", "colors"):
            part[f"{split}_{name}"] = getattr(data, f"{split}_{name}")[:count]
    return dataclasses.replace(data, **part)


@pytest.fixture
def few(monkeypatch):
    """shapes are 240 training and 60 test images only."""
    data = part_of(SHAPES(), 240, 60)
    monkeypatch.setattr(common, "shapes_dataset", lambda: data)
    return data


def test_few_shot_probes_have_balanced_labels_and_three_draws(few, monkeypatch):
    drawn = []

    def linear_probe(train, train_labels, test, test_labels):
        drawn.append((train_labels.bincount(minlength=10).tolist(), train.sum().item()))
        return len(drawn) / 1000

    monkeypatch.setattr(clip, "linear_probe", linear_probe)
    data = clip.hold_out_pairs(few)
    counts = data.train_labels.bincount().tolist()
    tokenizer = clip.Tokenizer(data.train_captions, 8)
    model = clip.CLIP(small_args(), 4 + len(tokenizer.words))
    results = clip.evaluate(model, tokenizer, data)
    numbers = [n for n in (1, 2, 4, 8, 16) if n <= min(counts)]
    assert len(numbers) >= 3
    assert [c for c, _ in drawn] == [counts] + [[n] * 10 for n in numbers for _ in range(3)]
    assert len({total for _, total in drawn[1:4]}) == 3  # three draws
    probes = [name for name in results if name.startswith("linear_probe_")]
    assert probes == [f"linear_probe_{n}_per_class" for n in numbers]
    assert results["linear_probe_1_per_class"] == pytest.approx(0.003)


def test_unseen_pairs_have_an_accuracy_of_their_own(few, monkeypatch):
    unseen = few.test_labels == few.test_colors

    def right_where_unseen(*_):
        wrong = (few.test_labels + 1) % 10
        return F.one_hot(torch.where(unseen, few.test_labels, wrong), 10)

    monkeypatch.setattr(clip, "zero_shot_logits", right_where_unseen)
    data = clip.hold_out_pairs(few)
    tokenizer = clip.Tokenizer(data.train_captions, 8)
    model = clip.CLIP(small_args(), 4 + len(tokenizer.words))
    results = clip.evaluate(model, tokenizer, data)
    assert results["zero_shot_unseen"] == 1
    assert results["zero_shot"] == pytest.approx(unseen.float().mean().item())


def test_validation_is_recall_at_10_in_both_directions(few, monkeypatch):
    recalls = {"text_to_image_r10": 0.2, "image_to_text_r10": 0.4, "text_to_image_r1": 0.9}
    calls = []

    def retrieval(model, tokenizer, images, captions):
        calls.append((images, captions))
        return recalls

    monkeypatch.setattr(clip, "retrieval", retrieval)
    monkeypatch.setattr(clip, "features", lambda encoder, images: images.flatten(1)[:, :5].float())
    data = clip.hold_out_pairs(few)
    model = clip.CLIP(small_args(), 9)
    validated = clip.validate(model, None, data)
    assert validated["val_recall"] == pytest.approx(0.3)
    used = data.train_images.flatten(1)[:, :5].float()
    assert validated["rank"] == pytest.approx(clip.effective_rank(used))
    ((images, captions),) = calls
    assert images is data.val_images
    assert captions is data.val_captions
    without = clip.validate(model, None, dataclasses.replace(data, val_images=None))
    assert without == {"rank": validated["rank"]}


def test_unseen_pairs_are_in_neither_training_nor_validation():
    data = clip.hold_out_pairs(SHAPES())
    pairs = list(zip(common.SILHOUETTES, common.COLORS, strict=True))
    for captions in (data.train_captions, data.val_captions):
        for shape, color in pairs:
            assert not any(f"the {shape} is {color}" in texts for texts in captions)
    assert len({texts[3] for texts in data.train_captions}) == 90  # all other pairs are there


def test_what_is_left_keeps_its_captions_and_labels():
    whole = SHAPES()
    data = clip.hold_out_pairs(whole)
    M = len(data.train_images)
    assert M == len(data.train_labels) == len(data.train_captions)
    assert len(data.val_images) == len(data.val_captions) == (M + len(data.val_images)) // 10
    labels = whole.train_labels.tolist()
    images = map(bytes, whole.train_images.numpy())
    known = dict(zip(images, zip(whole.train_captions, labels, strict=True), strict=True))
    train = zip(data.train_images.numpy(), data.train_captions, data.train_labels, strict=True)
    for image, texts, label in train:
        assert known.pop(bytes(image)) == (texts, label)
    for image, texts in zip(data.val_images.numpy(), data.val_captions, strict=True):
        assert known[bytes(image)][0] == texts  # and not among the training images


# ==================================================================================================
# Runs
# ==================================================================================================


def words(out, *flags):
    """A run on the shapes there are: two epochs."""
    small = ["--epochs", "2", "--batch-size", "32", "--eval-every", "1", "--text-width", "64"]
    return [*small, "--out", str(out), *map(str, flags)]


def small_run(out, *flags):
    return clip.main(clip.parse_args(words(out, *flags)))


def resumed(run, *flags):
    return clip.main(clip.parse_args(["--resume", str(run), *map(str, flags)]))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The folder of a run on few shapes that nothing has stopped. It is read only."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    data = part_of(SHAPES(), 240, 60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "shapes_dataset", lambda: data)
        small_run(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run on 1,000 shapes, which learns colors, as they come first; and its
    summary. It is read only."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    data = part_of(SHAPES(), 1000, 500)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "shapes_dataset", lambda: data)
        flags = "--epochs", "4", "--batch-size", "32", "--eval-every", "4", "--out", str(folder)
        return folder, clip.main(clip.parse_args(flags))


def test_it_learns_to_read(trained):
    _, summary = trained
    before = summary["untrained"]
    after = summary["trained"]
    assert after["image_to_text_r10"] > before["image_to_text_r10"] + 0.2
    assert after["text_to_image_r10"] > before["text_to_image_r10"] + 0.1
    assert summary["history"][-1]["bound"] > 0.5
    assert summary["history"][-1]["val_recall"] > 0.5


def test_a_run_leaves_its_files(trained):
    run, summary = trained
    assert files(run) >= RESULTS
    written = json.loads((run / "summary.json").read_text())
    assert written["history"] == summary["history"]
    assert written["trained"] == summary["trained"]
    assert summary["method"] == "clip"
    results = {f"{way}_r{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)}
    results |= {f"linear_probe_{n}_per_class" for n in (1, 2, 4, 8, 16)}
    results |= {"linear_probe", "zero_shot", "zero_shot_unseen"}
    assert set(summary["trained"]) == set(summary["untrained"]) == results
    assert summary["unknown_words"] == 0
    resnet, _ = clip.build_encoder("small")
    resnet.load_state_dict(load(run / "encoder.pt"))


def test_only_some_epochs_are_validated(trained):
    _, summary = trained
    terms = {"epoch", "loss", "bound", "logit_scale", "seconds"}
    validated = [line.keys() - terms for line in summary["history"]]
    assert validated == [set()] * 3 + [{"rank", "val_recall"}]
    assert summary["best_epoch"] == 4


def test_figures_have_the_size_of_a_slide(trained):
    run, _ = trained
    for name in ("similarity.png", "retrieval.png"):
        with Image.open(run / name) as sheet:
            assert sheet.width > 1000
            assert sheet.height > 800


def test_the_highest_cosine_is_the_bluest(tmp_path):
    cosines = torch.tensor([[0.1, 0.9], [0.5, -0.3]])
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    clip.save_similarity(tmp_path / "s.png", images, ["one", "two"], cosines)
    with Image.open(tmp_path / "s.png") as sheet:
        corners = {}
        for i in range(2):
            for j in range(2):
                place = (424 + 100 * j + 12, 134 + 100 * i + 12)
                corners[i, j] = sheet.getpixel(place)
    order = sorted(corners, key=lambda place: corners[place][0])  # by red: white has most
    assert order == [(0, 1), (1, 0), (0, 0), (1, 1)]
    assert corners[1, 1] == (255, 255, 255)


def test_the_epoch_of_the_best_validation_recall_is_kept(few, tmp_path, monkeypatch):
    recalls = [0.2, 0.5, 0.5, 0.1]
    states = []

    def validate(model, tokenizer, data):
        states.append(copy.deepcopy(model.encoder.state_dict()))
        return {"val_recall": recalls[len(states) - 1]}

    monkeypatch.setattr(clip, "validate", validate)
    run = tmp_path / "run"
    summary = small_run(run, "--epochs", 4)
    assert [line["val_recall"] for line in summary["history"]] == recalls
    assert summary["best_epoch"] == 3  # of equal ones the later
    assert_same(load(run / "encoder.pt"), dict(states[2]))
    assert_same(dict(clip.load_run(run)[0].encoder.state_dict()), dict(states[2]))
    assert not torch.equal(states[2]["conv1.weight"], states[3]["conv1.weight"])


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [(clip, "clip_loss", 9), (Path, "replace", 6)],
)
def test_a_resumed_run_ends_as_an_unbroken_one(few, unbroken, tmp_path, module, name, call):
    run = tmp_path / "run"
    with killed_at(module, name, call):  # of six steps an epoch
        small_run(run)
    assert not (run / "summary.json").exists()
    resumed(run)
    assert_ended_alike(run, unbroken, "untrained", "trained", "best_epoch")
    a, b = (load(folder / "checkpoint.pt") for folder in (run, unbroken))
    assert_same(a["best"], b["best"])
    assert_same(a["tokenizer"], b["tokenizer"])


def changed(data):
    """Shapes with another class name, label, image, caption, or word."""
    captions = [*data.train_captions[1:], data.train_captions[0]]
    new_word = [["a new zebra", "a new zebra"], *data.train_captions[1:]]
    return {
        "a class": {"classes": [*data.classes[:-1], "pyramid"]},
        "a label": {"train_labels": data.train_labels.roll(1)},
        "an image": {"train_images": 255 - data.train_images},
        "captions": {"train_captions": captions},
        "a word": {"train_captions": new_word},
    }


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The folder of a run on few shapes that was killed in its second epoch. It is read only."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    data = part_of(SHAPES(), 240, 60)
    with pytest.MonkeyPatch.context() as patch, killed_at(clip, "clip_loss", 9):
        patch.setattr(common, "shapes_dataset", lambda: data)
        small_run(folder)
    return folder


@pytest.mark.parametrize("what", ["a class", "a label", "an image", "captions", "a word"])
def test_a_run_is_not_resumed_on_changed_data(few, begun, monkeypatch, error_of, what):
    before = {path.name: path.read_bytes() for path in begun.iterdir()}
    other = dataclasses.replace(few, **changed(few)[what])
    monkeypatch.setattr(common, "shapes_dataset", lambda: other)
    line = error_of(clip.run, "--resume", begun)
    assert "--dataset shapes has changed since the run began" in line
    assert {path.name: path.read_bytes() for path in begun.iterdir()} == before


def test_a_run_begins_with_an_encoder_of_simclr(few, tmp_path):
    torch.manual_seed(1)
    encoder, _ = simclr.build_encoder("small")
    torch.save(encoder.state_dict(), tmp_path / "encoder.pt")
    run = tmp_path / "run"
    summary = small_run(run, "--init", tmp_path / "encoder.pt", "--epochs", 0)
    assert_same(load(run / "encoder.pt"), dict(encoder.state_dict()))
    assert summary["trained"].keys() == summary["untrained"].keys()
    assert "best_epoch" not in summary
    trained = small_run(tmp_path / "trained", "--init", tmp_path / "encoder.pt", "--epochs", 1)
    assert trained["untrained"]["linear_probe"] == summary["untrained"]["linear_probe"]


def captioned(root, count):
    """A folder of shapes with captions.csv; words of test captions differ."""
    data = SHAPES()
    (root / "images").mkdir(parents=True)
    rows = ["image,caption,split"]
    for i in range(count):
        image = data.train_images[i].permute(1, 2, 0).numpy()
        Image.fromarray(image).save(root / "images" / f"{i}.png")
        split = "test" if i % 3 == 0 else "train"
        for text in data.train_captions[i][: 3 + i % 3]:
            if split == "test":
                text = text.replace("background", "ground")
            rows.append(f'{i}.png,"{text}",{split}')
    (root / "captions.csv").write_text("\n".join(rows))


def test_captioned_images_without_classes(tmp_path, capsys):
    captioned(tmp_path / "photos", 24)
    flags = ["--dataset", tmp_path / "photos", "--data-dir", tmp_path / "data"]
    flags += ["--encoder", "small", "--image-size", 24, "--batch-size", 8, "--epochs", 1]
    summary = small_run(tmp_path / "run", *flags)
    assert "zero_shot" not in summary["trained"]
    assert 0 <= summary["trained"]["image_to_text_r1"] <= 1
    assert "val_recall" not in summary["history"][0]
    assert summary["best_epoch"] == 1
    last = load(tmp_path / "run/checkpoint.pt")["model"]
    assert torch.equal(
        load(tmp_path / "run/encoder.pt")["conv1.weight"], last["encoder.conv1.weight"]
    )
    assert 0 < summary["unknown_words"] < 0.5
    out = capsys.readouterr().out
    assert f"lacks {summary['unknown_words']:.1%} of the words in test captions" in out
    assert "guessing" not in out
    assert files(tmp_path / "run") == RESULTS


BAD = [
    (["--text-width", "100"], "--text-width: invalid choice: 100"),
    (["--context", "2"], "--context 2: must be at least 3"),
    (["--batch-size", "5000"], "--batch-size 5000: must be from 2 to 3320, the number of images"),
    (["--batchsize", "50"], "did you mean --batch-size?"),
    (["--init", "none.pt"], "--init none.pt: does not fit --encoder small"),
    (["--query", "a dog"], "--resume RUN: must be the folder of a trained run of clip.py"),
    (["--query", "a", "--caption", "b"], "--query, --caption and --zero-shot-classes: one at a"),
    (["--resume", "nothing", "--query", "a"], "--resume nothing: there is no run of clip.py in"),
]


@pytest.mark.parametrize(("flags", "message"), BAD)
def test_bad_input_is_one_line(tmp_path, monkeypatch, error_of, flags, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(clip.run, *flags)
    assert list(tmp_path.iterdir()) == []


def test_images_without_captions_are_refused(few_shapes, tmp_path, error_of):
    line = error_of(clip.run, "--dataset", few_shapes, "--out", tmp_path / "run")
    assert f"--dataset {few_shapes}: has no captions" in line


TRAINING_FLAGS = {"image_size", "encoder", "init", "text_width", "text_layers", "context"}
TRAINING_FLAGS |= {"epochs", "batch_size", "lr", "weight_decay", "warmup", "crop"}
TRAINING_FLAGS |= {"eval_every", "seed", "out"}


def test_only_flags_that_do_not_train_go_with_resume(trained, error_of):
    flags = clip.flags_of(clip.Args)
    assert {name for name in flags if not flags[name].metadata["resume"]} == TRAINING_FLAGS
    line = error_of(clip.run, "--resume", trained[0], "--lr", 0.1)
    assert "--lr: a resumed run keeps the flags it was started with" in line


def test_training_does_not_go_on_with_other_images(trained, few, tmp_path, error_of):
    run = shutil.copytree(trained[0], tmp_path / "run")
    captioned(tmp_path / "photos", 60)
    flags = "--dataset", tmp_path / "photos", "--data-dir", tmp_path / "data"
    line = error_of(clip.run, "--resume", run, *flags)
    assert "photos has changed since the run began" in line
    assert json.loads((run / "args.json").read_text())["dataset"] == "shapes"


# ==================================================================================================
# Questions to a run
# ==================================================================================================


@pytest.fixture
def asked(trained, tmp_path):
    """A copy of the trained run, which may be asked."""
    return shutil.copytree(trained[0], tmp_path / "run")


def test_a_query_finds_the_closest_images(asked, capsys):
    before = (asked / "args.json").read_text()
    found = resumed(asked, "--query", "a red zebra")
    out = capsys.readouterr().out
    assert "not in the vocabulary: zebra\n" in out
    assert found[0][1] in out
    assert (asked / "args.json").read_text() == before
    with Image.open(asked / "query.png") as sheet:
        assert sheet.width > 8 * 128
    model, tokenizer, args = clip.load_run(asked)  # as README shows it
    assert args.image_size == 32
    data = SHAPES()
    with torch.no_grad():
        y = F.normalize(model.encode_text(tokenizer(["a red zebra"])), dim=1)
        x = model.encode_image(common.normalize(data.test_images / 255))
    best = (F.normalize(x, dim=1) @ y[0]).topk(8)
    assert [score for score, _ in found] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert [text for _, text in found] == [data.test_captions[row][0] for row in best.indices]


def test_images_without_captions_have_numbers(asked, tmp_path):
    images = SHAPES().test_images[:5].permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "other.npz", train_images=np.concatenate([images] * 2))
    flags = "--dataset", tmp_path / "other.npz"
    ((_, text),) = resumed(asked, "--query", "a star", *flags)
    assert text == "test image 0"
    with pytest.raises(common.UserError, match="--caption: --dataset .*other.npz has no captions"):
        resumed(asked, "--caption", "any.png", *flags)


def test_an_image_finds_the_closest_captions(asked, tmp_path):
    data = SHAPES()
    Image.fromarray(data.test_images[7].permute(1, 2, 0).numpy()).save(tmp_path / "own.png")
    found = resumed(asked, "--caption", tmp_path / "own.png")
    model, tokenizer, _ = clip.load_run(asked)
    texts = sorted({text for captions in data.test_captions for text in captions})
    x = clip.embed_images(model, data.test_images[7:8])
    cosines = (clip.embed_texts(model, tokenizer, texts) @ x[0]).tolist()
    assert len(found) == 8
    for score, text in found:
        assert score == pytest.approx(cosines[texts.index(text)], abs=1e-4)
    scores = [score for score, _ in found]
    assert scores == pytest.approx(sorted(cosines, reverse=True)[:8], abs=1e-4)


@pytest.mark.parametrize("name", ["missing.png", "bad.png"])
def test_what_is_no_image_has_no_captions(asked, tmp_path, error_of, name):
    (tmp_path / "bad.png").write_text("no image")
    line = error_of(clip.run, "--resume", asked, "--caption", tmp_path / name)
    assert f"{name}: not a readable image" in line


def test_images_are_sorted_into_classes(asked, capsys):
    counts, accuracy = resumed(asked, "--zero-shot-classes", "star, moon,heart,star")
    assert [name for _, name in counts] == ["star", "moon", "heart"]
    assert sum(count for count, _ in counts) == 2000
    assert accuracy is None
    assert "accuracy" not in capsys.readouterr().out
    with Image.open(asked / "classes.png") as sheet:
        assert sheet.width > 3 * 128
        assert sheet.height > 8 * 128
    with pytest.raises(common.UserError, match="'zebra', 'yak': no word of the training captions"):
        resumed(asked, "--zero-shot-classes", "star,zebra,yak")


def test_classes_are_matched_by_name(asked):
    """In whatever order and capitals, beside other words or not."""
    names = list(common.SILHOUETTES)
    exchanged = [names[9], *names[1:9], names[0]]
    counts, accuracy = resumed(asked, "--zero-shot-classes", ",".join(names))
    other_counts, other_accuracy = resumed(
        asked, "--zero-shot-classes", ",".join(exchanged).upper()
    )
    assert accuracy == other_accuracy
    assert sorted(count for count, _ in counts) == sorted(count for count, _ in other_counts)
    model, tokenizer, _ = clip.load_run(asked)
    data = SHAPES()
    y = clip.embed_texts(model, tokenizer, [f"a photo of a {name}" for name in names])
    predicted = (clip.embed_images(model, data.test_images) @ y.T).argmax(1)
    assert accuracy == pytest.approx((predicted == data.test_labels).float().mean().item())
    _, more = resumed(asked, "--zero-shot-classes", ",".join([*exchanged, "red"]))
    assert more <= accuracy


@pytest.mark.parametrize(
    ("names", "rows", "said"),
    [
        (["cat", "dog", "car"], [2, 1, 0], "'car' is taken for the class 'automobile'\n"),
        (["Dog", "automobile", "CAT"], [1, 0, 2], ""),
        (["dog", "cat"], [-1, 0, 1], ""),
        (["dog", "cat", "x", "automobile"], [3, 0, 1], ""),
    ],
)
def test_a_name_that_is_left_is_taken_for_the_class_that_is(capsys, names, rows, said):
    tokenizer = clip.Tokenizer([], 8)
    found = clip.match_classes(names, ["automobile", "dog", "cat"], tokenizer)
    assert found.tolist() == rows
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("what", ["torn", "moved", "nothing"])
def test_only_a_trained_run_is_asked(asked, tmp_path, what):
    if what == "moved":
        moved = asked.rename(tmp_path / "elsewhere")
        model, _, args = clip.load_run(moved)
        assert args.out == str(moved)
        assert_same(dict(model.encoder.state_dict()), load(moved / "encoder.pt"))
        return
    (asked / "checkpoint.pt").write_bytes(b"torn")
    folder = asked if what == "torn" else tmp_path / "nothing"
    with pytest.raises(common.UserError, match="must be the folder of a trained run of clip.py"):
        clip.load_run(folder)


# ==================================================================================================
# Two processes
# ==================================================================================================


def both_compute_loss_and_gradients():
    torch.manual_seed(0)
    model = clip.CLIP(small_args(), vocabulary=9).double().eval()  # batch norm is not synchronized
    whole = copy.deepcopy(model)
    network = nn.parallel.DistributedDataParallel(model)
    images = torch.rand(6, 3, 32, 32, generator=generator(1)).double()
    tokens = torch.randint(4, 9, (6, 8), generator=generator(2))
    tokens[:, 0] = 1
    tokens[:, 5] = 2
    own = torch.arange(6)[clip.RANK :: 2]
    x, y, scale = network(images[own], tokens[own])
    loss = clip.clip_loss(clip.gather(x), clip.gather(y), scale)
    loss.backward()
    expected = clip.clip_loss(*whole(images, tokens))
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-10)


def both_train(folder):
    both_compute_loss_and_gradients()
    data = part_of(SHAPES(), 130, 40)  # of which three batches are trained on
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "shapes_dataset", lambda: data)
        train_and_resume(clip, words(folder), folder, "clip_loss")


def test_two_processes_do_what_one_does(tmp_path, in_two_processes):
    printed = in_two_processes(both_train, tmp_path)
    assert_resumed_in_both(tmp_path, printed)
    assert load(tmp_path / "unbroken-0.pt").keys() >= {"log_scale", "text_projection.weight"}
