"""CLIP: each image of a batch should be closest to its own caption, and each caption to its own image.

An image encoder and a text encoder each end in a linear map to one space. The N x N cosines between the images and the
captions of a batch are the logits of 2N classifications, whose answers lie on the diagonal: the other pairs are the
negatives, so a larger batch means more of them. To match captions is cheaper to learn than to generate them word by
word. Afterwards text is a classifier: any classes will do, written as captions.

    Radford et al.: Learning Transferable Visual Models From Natural Language Supervision, ICML 2021.
    Figure 3 of the paper, the lecture's InfoNCE in both directions, for images x and captions y:

    s(i, j) = exp(a) x_i . y_j / (|x_i| |y_j|)                a is learned, exp(a) = 1 / temperature
    L = -1/2N sum_i [ log( exp s(i, i) / sum_j exp s(i, j) ) + log( exp s(i, i) / sum_j exp s(j, i) ) ]

    python clip.py                                            shapes drawn by code; a laptop CPU will do
    python clip.py --dataset path/to/flickr8k --compile       a folder of images with captions.csv, on a GPU
    python clip.py --dataset path/to/flickr8k --encoder small --eval-every 5         the same on a CPU
    python clip.py --resume RUN --query "a red star"          the test images that fit a sentence best
    python clip.py --resume RUN --caption IMAGE               the test captions that fit an image of your own best
    python clip.py --resume RUN --zero-shot-classes star,moon     the test images sorted into classes by their names
    torchrun --nproc-per-node 8 clip.py --dataset path/to/images  on 8 GPUs

On test with seed 0 (records in results/): shapes, zero-shot 98.8 %, linear probe untrained -> trained 36.3 -> 99.2 %;
Flickr8k with the small encoder, a caption finds its image, of 1,000, among ten in 19.5 % of the cases.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import os
import re
import shlex
import sys
import textwrap
import time
import unicodedata
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import ImageDraw
from torch import nn

import common
from common import UserError

METHOD = "clip"
SWITCH, RAW = argparse.BooleanOptionalAction, argparse.RawDescriptionHelpFormatter
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun: a process for each GPU


def flag(default, help, low=None, high=math.inf, **options):  # a field of Args; low to high is a number's range
    return dataclasses.field(default=default, metadata=dict(help=help, low=low, high=high, options=options))


@dataclasses.dataclass
class Args:  # defaults are the recipe for Flickr8k on a GPU, SHAPES and SMALL say what differs elsewhere
    dataset: str = flag("shapes", "shapes, or a path: a folder of images with captions.csv or captions.txt")
    data_dir: str = flag("data", "folder for downloads and decoded images")
    image_size: int = flag(128, "side in pixels to which the images of a folder are resized; paper: 224", 8, 512)
    encoder: str = flag("resnet18", "paper: resnet50, ViT", choices=("small", "resnet18", "resnet34", "resnet50"))
    text_width: int = flag(256, "of text encoder and common space; paper: 512", type=int, choices=(64, 128, 256, 512))
    text_layers: int = flag(4, "blocks of the text transformer, a head for 32 of its width; paper: 12, for 64", 1)
    context: int = flag(32, "longest text in words, start and end included; paper: 76, authors' code: 77, subwords", 3)
    epochs: int = flag(100, "passes over the training images, each with one of its captions; paper: 32", 1)
    batch_size: int = flag(128, "pairs N per step, over all GPUs; paper: 32768", 2)
    lr: float = flag(1e-3, "peak learning rate of AdamW; paper: 5e-4", 0)
    weight_decay: float = flag(0.2, "not applied to biases, norms and scale; paper: 0.2", 0)
    warmup: float = flag(0.05, "fraction of the steps with linear warmup; paper: 2000 steps", 0, 0.9)
    crop: float = flag(0.5, "smallest crop, as a fraction of the image's area; paper: a random square", 0.01, 1)
    zero_shot_classes: str = flag("", "such as cat,dog: train nothing; sort the test images of --resume into them")
    query: str = flag("", "train nothing; find the test images of --resume that fit this sentence best")
    caption: str = flag("", "train nothing; find the test captions of --resume that fit this image file best")
    eval_every: int = flag(10, "epochs between two measurements on validation images, the best of which is kept", 1)
    seed: int = flag(0, "of weights, batches, views and choice of labels", 0, 2**31)
    device: str = flag("auto", "auto: cuda, else mps, else cpu")
    compile: bool = flag(False, "torch.compile network and augmentations, for long runs on a GPU", action=SWITCH)
    out: str = flag("", "run folder instead of runs/<method>-<dataset>-seed<seed>")
    resume: str = flag("", "run folder to continue, with the flags that it was started with")
    typed: list = ()  # names of the flags that were typed
    command: str = f"torchrun --nproc-per-node {WORLD} {METHOD}.py" if WORLD > 1 else f"python {METHOD}.py"


# === Views ============================================================================================================
def one_view(images, args, generator):
    """uint8 (N, 3, S, S) -> float (N, 3, S, S) in [0, 1]: crop and flip; captions name colors, so these stay. The paper
    crops alone: a batch of thousands has enough variety."""
    return common.random_resized_crop(images / 255, images.shape[3], generator, scale=(args.crop, 1.0))


# === Text =============================================================================================================
class Tokenizer:
    """Words <-> numbers; the vocabulary is that of the training captions but for words that appear once, most frequent
    first. 0 is padding, 1 starts a text, 2 ends it, 3 is any other word; the paper's subwords need no such token."""

    PADDING, START, END, UNKNOWN = range(4)
    UNSPACED = "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])"  # Thai, Chinese

    def __init__(self, captions, context):  # captions: a list of them for each image
        counts = Counter(word for texts in captions for text in texts for word in self.split(text))
        words = sorted((w for w, count in counts.items() if count > 1), key=lambda w: (-counts[w], w))
        self.load_state_dict({"words": words, "context": context})

    def split(self, text):
        """Lower-cased runs of letters with their accents and of digits; characters, where no spaces separate words."""
        text = unicodedata.normalize("NFC", text.lower())  # one code for an accented letter
        text = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text)
        return re.sub(self.UNSPACED, r" \1 ", text).split()

    def __call__(self, texts):
        """Texts -> int64 (len(texts), context). A text that is too long loses its last words, not its end."""
        words = [[self.numbers.get(word, self.UNKNOWN) for word in self.split(text)] for text in texts]
        rows = [[self.START, *row[: self.context - 2], self.END] for row in words]
        return torch.tensor([row + [self.PADDING] * (self.context - len(row)) for row in rows])

    def unknown(self, text):
        return [word for word in self.split(text) if word not in self.numbers]

    def check(self, texts):
        """Prints the unknown words of texts. Raises UserError for a text without any known word."""
        if words := dict.fromkeys(self.unknown(" ".join(texts))):
            print(f"not in the vocabulary: {', '.join(words)}", flush=True)
        if empty := [text for text in texts if len(self.unknown(text)) == len(self.split(text))]:
            raise UserError(f"{', '.join(map(repr, empty))}: no word of the training captions to go by")

    def state_dict(self):
        return {"words": self.words, "context": self.context}

    def load_state_dict(self, state):
        self.words, self.context = state["words"], state["context"]
        self.numbers = {word: number for number, word in enumerate(self.words, 4)}


def caption_table(tokenizer, captions, device):
    """Captions, a list for each of M images -> tokens of all (K, T), and each image's first row and number of rows."""
    counts = torch.tensor([len(texts) for texts in captions])
    tokens = tokenizer([text for texts in captions for text in texts])
    return [x.to(device) for x in (tokens, counts.cumsum(0) - counts, counts)]


def drawn_captions(table, rows, generator):
    """One caption of each of some images, rows (N,) of the table -> tokens (N, T)."""
    tokens, first, counts = table
    return tokens[first[rows] + (common.uniform(0, 1, rows.shape, generator) * counts[rows]).long()]


# === Model ============================================================================================================
def build_encoder(name, image_size=32, norm_layer=nn.BatchNorm2d):
    """torchvision's ResNet without its classifier, (B, 3, S, S) -> (B, D), and D.

    Up to 64 pixels the stem is a 3x3 convolution without max pooling (SimCLR paper, appendix B.9): ImageNet's would
    leave 8 x 8 of 32 x 32 pixels. `small`, for CPUs, has ImageNet's, and one block in each of the first two stages.
    """
    encoder = torchvision.models.get_model("resnet18" if name == "small" else name, norm_layer=norm_layer)
    D, encoder.fc = encoder.fc.in_features, nn.Identity()
    if name == "small":
        D, encoder.layer1, encoder.layer2 = 128, encoder.layer1[:1], encoder.layer2[:1]
        encoder.layer3 = encoder.layer4 = nn.Identity()
    elif image_size <= 64:
        encoder.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()
    return encoder, D


class CLIP(nn.Module):
    """Image and text encoder, each with a linear map to the common space, and the learned scale of the logits. ResNet
    keeps its average pool; the paper's pools by attention. Embeddings of text start as in the authors' code."""

    def __init__(self, args, vocabulary, image_size=32):
        super().__init__()
        width, options = args.text_width, dict(dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True)
        self.encoder, D = build_encoder(args.encoder, image_size)
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.empty(args.context, width))
        block = [nn.TransformerEncoderLayer(width, width // 32, 4 * width, **options) for _ in range(args.text_layers)]
        self.blocks, self.norm = nn.ModuleList(block), nn.LayerNorm(width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        self.image_projection = nn.Linear(D, width, bias=False)
        self.text_projection = nn.Linear(width, width, bias=False)
        self.log_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))  # a: its exponential is always positive
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(args.context), persistent=False)

    def encode_image(self, images):
        """(B, 3, S, S) -> (B, width), of any length."""
        return self.image_projection(self.encoder(images))

    def encode_text(self, tokens):
        """(B, T) -> (B, width), of any length: a transformer with causal attention, read at the end of the text. A word
        does not see those behind it, so padding, after the end, cannot matter. The authors' GELU is approximate."""
        x = self.token_embedding(tokens) + self.positions  # (B, T, width)
        for block in self.blocks:
            x = block(x, src_mask=self.mask, is_causal=True)
        end = (tokens == Tokenizer.END).int().argmax(1)  # (B,)
        return self.text_projection(self.norm(x[torch.arange(x.shape[0], device=x.device), end]))

    def forward(self, images, tokens):
        return self.encode_image(images), self.encode_text(tokens), self.log_scale.exp()


# === Loss =============================================================================================================
def clip_loss(image_features, text_features, logit_scale):
    """Symmetric InfoNCE over the N x N matrix of a batch: figure 3 of the paper, the lecture's loss.

    image_features, text_features (N, D): row i of both is a pair, normalized in here. logit_scale: exp(a) -> scalar, in
    nats; log N is chance, and where training starts. Captions of other images are negatives even if they say the same,
    as in the paper; of the captions of one image a batch holds a single one.
    """
    images, texts = F.normalize(image_features, dim=1), F.normalize(text_features, dim=1)
    logits = logit_scale * images @ texts.T  # (N, N)
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


# === Zero-shot classification and retrieval ===========================================================================
PROMPT = "a photo of a {}"  # the lecture's; training texts are sentences, so a bare class name would be a rare one


@torch.no_grad()
def embed_images(model, images):
    """uint8 (M, 3, S, S) -> h of the encoder, and features (M, D) of length 1."""
    h = features(model.encoder, images)
    return h, F.normalize(model.image_projection(h), dim=1)


@torch.no_grad()
def embed_texts(model, tokenizer, texts):
    """Texts -> features (K, D) of length 1."""
    device = model.eval().log_scale.device
    with autocast(device):
        y = [model.encode_text(tokens.to(device)).float() for tokens in tokenizer(texts).split(1024)]
    return F.normalize(torch.cat(y), dim=1)


def recall(queries, candidates, query_image, candidate_image):
    """Features of length 1 (Q, D), (K, D), and the image that each belongs to (Q,), (K,) -> fraction of queries with a
    candidate of their image among the best 1, 5 and 10. Ties, and NaN, count against the model."""
    ahead = []
    for query, image in zip(queries.split(1024), query_image.split(1024), strict=True):
        scores, own = query @ candidates.T, image[:, None] == candidate_image  # (B, K)
        best = scores.masked_fill(~own, -math.inf).amax(1, keepdim=True)  # of a candidate that is to be found
        ahead.append((~(scores < best) & ~own).sum(1))
    return {k: (torch.cat(ahead) < k).float().mean().item() for k in (1, 5, 10)}


def retrieval(model, tokenizer, images, captions):
    """Both ways between images, uint8 (M, 3, S, S), and all their captions, a list for each -> recalls. An image has to
    find one of its captions, mostly five, and a caption its one image (protocol of Hodosh et al. 2013)."""
    _, x = embed_images(model, images)
    y = embed_texts(model, tokenizer, [text for texts in captions for text in texts])
    image = torch.arange(len(x), device=x.device)
    owner = image.repeat_interleave(torch.tensor([len(texts) for texts in captions], device=x.device))  # (K,)
    both = {"text_to_image": recall(y, x, owner, image), "image_to_text": recall(x, y, image, owner)}
    return {f"{way}_r{k}": value for way, recalls in both.items() for k, value in recalls.items()}


# === Pretrain =========================================================================================================
def pretrain(model, best, tokenizer, data, args):
    """Learns from images, uint8 (M, 3, S, S), and a list of captions for each. Leaves in `best`, at first a copy, the
    model of the highest recall@10 on validation images, mean of both directions. Returns the metrics of all epochs."""
    device, images = next(model.parameters()).device, data.train_images
    table = caption_table(tokenizer, data.train_captions, device)
    N, steps = args.batch_size // WORLD, len(images) // args.batch_size  # an incomplete last batch is left out
    optimizer, schedule = make_optimizer(model, args, args.epochs * steps)
    scaler = torch.amp.GradScaler(device.type, enabled=autocast(device).fast_dtype == torch.float16)
    state = {"model": model, "best": best, "tokenizer": tokenizer}
    state |= {"optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    history = load_checkpoint(args, state, data)
    network = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    for epoch in range(len(history) + 1, args.epochs + 1):
        start, losses = time.perf_counter(), torch.zeros(steps, device=device)
        order, generator = draws(args, epoch, images, device)
        model.train()
        for step, batch in enumerate(common.batches(images, order, N, device)):  # (N, 3, S, S)
            text = drawn_captions(table, order[step * N : (step + 1) * N], generator)  # (N, T)
            x = common.normalize(one_view(batch, args, generator))  # (N, 3, S, S)
            with autocast(device):
                image_features, text_features, scale = network(x, text)  # (N, D) each
            pairs = gather(image_features.float()), gather(text_features.float())  # of all GPUs
            loss = clip_loss(*pairs, scale)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            model.log_scale.data.clamp_(max=math.log(100))  # larger ones make training unstable (paper)
            losses[step] = loss.detach()  # reading it here would make the host wait for the GPU
            show_progress(args, epoch, step, steps, start)
        metrics = {"loss": losses.mean().item(), "seconds": time.perf_counter() - start}
        metrics |= {"bound": math.log(args.batch_size) - metrics["loss"], "logit_scale": model.log_scale.exp().item()}
        if epoch % args.eval_every == 0 or epoch == args.epochs:
            if data.val_images is not None:
                recalls = retrieval(model, tokenizer, data.val_images, data.val_captions)
                metrics["val_recall"] = (recalls["text_to_image_r10"] + recalls["image_to_text_r10"]) / 2
            if metrics.get("val_recall", 1.0) >= max((line.get("val_recall", 0.0) for line in history), default=0.0):
                best.load_state_dict(model.state_dict())
        history.append({"epoch": epoch, **metrics})
        save_epoch(args, state, data, history)
    return history


# === Evaluate =========================================================================================================
@torch.no_grad()
def features(network, images):
    """Images without augmentation, uint8 (M, 3, S, S), through a frozen network -> float32 (M, D)."""
    device = next(network.eval().parameters()).device
    with autocast(device):
        h = torch.cat([network(common.normalize(x.to(device) / 255)).float() for x in images.split(512)])
    if not h.isfinite().all():
        raise UserError("the features are not finite, so there is nothing to measure: try a smaller --lr")
    return h


def linear_probe(train, train_labels, test, test_labels):
    """Logistic regression on standardized frozen features (M, D), (Q, D), by L-BFGS and with C = 1, scikit-learn's
    defaults -> accuracy on test in [0, 1]."""
    mean, std = train.mean(0), train.std(0, correction=0) + 1e-5
    train, test = (train - mean) / std, (test - mean) / std
    layer = nn.Linear(train.shape[1], int(train_labels.max()) + 1, device=train.device)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(train), train_labels) + 0.5 / len(train) * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    return (layer(test).argmax(1) == test_labels).float().mean().item()


def evaluate(model, tokenizer, data):
    """-> recalls on the test images and, for data with classes, accuracies of zero-shot and of linear probes, with all
    labels and with 1 to 16 per class, the mean of three draws of them: figure 6 of the paper, the lecture's."""
    results = retrieval(model, tokenizer, data.test_images, data.test_captions)
    if not data.classes:
        return results
    y, test_y, names = data.train_labels, data.test_labels, [PROMPT.format(name) for name in data.classes]
    h, (test_h, x) = features(model.encoder, data.train_images), embed_images(model, data.test_images)
    correct = ((x @ embed_texts(model, tokenizer, names).T).argmax(1) == test_y).float()
    results |= {"linear_probe": linear_probe(h, y, test_h, test_y), "zero_shot": correct.mean().item()}
    results["zero_shot_unseen"] = correct[test_y == data.test_colors].mean().item()  # pairs that hold_out leaves out
    for n in (n for n in (1, 2, 4, 8, 16) if n <= y.bincount().min()):
        draws = [common.labelled_rows(y, n, seed) for seed in range(3)]
        results[f"linear_probe_{n}_per_class"] = sum(linear_probe(h[i], y[i], test_h, test_y) for i in draws) / 3
    return results


def hold_out(data):
    """Shapes -> training without those whose kind and color have the same number, such as red arrows, so that test can
    tell how these unseen pairs are read; and with a tenth of the other images set apart for validation."""
    y = data.train_labels
    rows = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).to(y.device)
    rows = rows[y[rows] != data.train_colors[rows]]
    parts = {"train_labels": y[rows[len(rows) // 10 :]]}
    for name, part in zip(("val", "train"), rows.tensor_split([len(rows) // 10]), strict=True):
        parts[f"{name}_images"] = data.train_images[part]
        parts[f"{name}_captions"] = [data.train_captions[i] for i in part.tolist()]
    return dataclasses.replace(data, **parts)


def load_run(folder, device="cpu"):
    """The run in a folder -> CLIP of its best epoch, Tokenizer, and Args with the image_size that it was trained at."""
    try:
        args = Args(**json.loads(Path(folder, "args.json").read_text()))
        content = torch.load(Path(folder, "checkpoint.pt"), map_location=device, weights_only=True)
        args.image_size, tokenizer = content["images"][3], Tokenizer([], args.context)
        tokenizer.load_state_dict(content["tokenizer"])
        model = CLIP(args, 4 + len(tokenizer.words), args.image_size).to(device)
        model.load_state_dict(content["best"])
    except Exception:  # no folder, no epoch yet, a torn file or another method's: these fail in many ways
        raise UserError(f"--resume {folder or 'RUN'}: must be the folder of a trained run of {METHOD}.py") from None
    return model.eval(), tokenizer, args


@torch.no_grad()
def ask(args):
    """Answers --caption, --query or --zero-shot-classes with the run in --resume and the test images of --dataset ->
    the best captions with their cosines, or the number of images in each class and, with labels, of the right ones."""
    if bool(args.caption) + bool(args.query) + bool(args.zero_shot_classes) > 1:
        raise UserError("--caption, --query and --zero-shot-classes: one at a time")
    model, tokenizer, trained = load_run(args.resume, pick_device(args.device))
    data, size = common.load_dataset(args.dataset, args.data_dir, trained.image_size), [trained.image_size] * 2
    captions = data.test_captions or [[f"test image {i}"] for i in range(len(data.test_images))]
    if args.caption:
        images = torch.tensor(common.decode_image(Path(args.caption), size[0])).permute(2, 0, 1)[None]
        texts = answers = list(dict.fromkeys(text for own in captions for text in own))
    else:
        images = torchvision.transforms.functional.resize(data.test_images, size)
        names, answers = [args.query] if args.query else args.zero_shot_classes.split(","), [own[0] for own in captions]
        tokenizer.check(names)
        texts = [args.query] if args.query else [PROMPT.format(name) for name in names]
    cosines = (embed_texts(model, tokenizer, texts) @ embed_images(model, images)[1].T).cpu()  # (K, M)
    if args.zero_shot_classes:
        p, nearest = (model.log_scale.exp().cpu() * cosines).softmax(0), cosines.argmax(0)
        answers = list(zip(names, nearest.bincount(minlength=len(names)).tolist(), strict=True))
        if len(names) == len(data.classes):
            answers.append(("right", (nearest == data.test_labels).sum().item()))
    else:
        p, (values, best) = cosines, cosines.flatten().topk(min(8, cosines.numel()))
        answers = [(answers[i], value) for i, value in zip(best.tolist(), values.tolist(), strict=True)]
    if not args.caption:
        best = p.topk(min(8, len(images))).indices  # (K, 8)
        save_rows(Path(args.resume, "query.png" if args.query else "classes.png"), names, images[best])
    print(*(f"{value:8.4g}  {text}" for text, value in answers), sep="\n")
    return answers


# === Nothing below is about CLIP: optimizer, several GPUs, run folder, figures, command line ==========================
def autocast(device):
    """bfloat16 where the GPU has it, else float16; float32 on other devices."""
    bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16 if bfloat16 else torch.float16, enabled=device.type == "cuda")


def make_optimizer(model, args, steps):
    """AdamW, with weight decay on matrices and kernels alone; linear warmup, then half a cosine to 0."""
    decayed, others = ([p for p in model.parameters() if (p.ndim > 1) == decay] for decay in (True, False))
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer, rise = torch.optim.AdamW(groups, args.lr, fused=True), args.warmup * steps

    def factor(step):
        fall = (min(step, steps) - rise) / (steps - rise)
        return (step + 1) / (rise + 1) if step < rise else 0.5 + 0.5 * math.cos(math.pi * fall)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def gather(x):
    """Rows (B, D) of all processes -> (WORLD B, D). Gradients flow to a process's own rows, WORLD times as large, since
    DistributedDataParallel averages over the processes what the gradient of the whole batch sums."""
    if WORLD == 1:
        return x
    rows = [torch.empty_like(x) for _ in range(WORLD)]
    dist.all_gather(rows, x.detach())
    rows[RANK] = x.detach() + WORLD * (x - x.detach())
    return torch.cat(rows)


def draws(args, epoch, images, device):
    """An epoch's images of this process, in random order, and the generator of its views: the same in a resumed run."""
    seed, used = args.seed * 100_000 + epoch, len(images) // args.batch_size * args.batch_size
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:used].to(device)
    return order[RANK::WORLD], torch.Generator(device).manual_seed(seed + 50_000 * (RANK + 1))


def pick_device(name):
    """The device of that name, or the best there is for `auto`; one GPU for each process, and they meet here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        x = torch.zeros(1, device=f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and WORLD > 1 else name)
        x.item()  # devices that hold no numbers, such as `meta`, fail here
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not available ({str(error).splitlines()[0]})") from None
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if x.is_cuda else "gloo", timeout=timedelta(days=1))
        sys.stdout = sys.stdout if RANK == 0 else None  # print then does nothing
    return x.device


@contextlib.contextmanager
def run_folder(args):
    """Makes the folder of the run, and locks it until the run ends: two runs never write to one folder."""
    folder = Path(args.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "w") as lock:
            if os.name == "posix" and RANK == 0:
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (folder / "checkpoint.pt").exists() and not args.resume:
                raise UserError(f"--out {folder}: holds a run; go on with --resume {folder}, or name another folder")
            yield folder
    except BrokenPipeError:  # of a print
        raise
    except OSError as error:
        reason = "another run is writing there" if isinstance(error, BlockingIOError) else error.strerror
        raise UserError(f"--out {folder}: cannot be used ({reason})") from None


def save(path, content):
    """Text, or what torch.save takes, under a temporary name first: a killed run leaves no torn file."""
    if RANK == 0:
        partial = path.with_name(path.name + ".partial")
        try:
            with open(partial, "wb") as file:
                file.write(content.encode()) if isinstance(content, str) else torch.save(content, file)
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def show_progress(args, epoch, step, steps, start):
    """On a terminal, every tenth of an epoch: how far it is, and how long the rest of the run will take."""
    if RANK == 0 and sys.stdout.isatty() and (step + 1) % max(1, steps // 10) == 0:
        done = (step + 1) / steps
        left = (time.perf_counter() - start) / done * (args.epochs - epoch + 1 - done)
        print(f"epoch {epoch}/{args.epochs} {done:4.0%}, {left / 60:.1f} min left ", end="\r", flush=True)


def save_epoch(args, state, data, history):
    """Prints the last line of the history; writes all of it and the checkpoint, if loss and weights are finite."""
    epoch, loss = len(history), history[-1]["loss"]
    shown = "  ".join(f"{key} {value:.4g}" for key, value in history[-1].items() if isinstance(value, float))
    print(f"epoch {epoch}/{args.epochs}  {shown}", flush=True)
    if not (math.isfinite(loss) and nn.utils.get_total_norm(state["model"].parameters()).isfinite()):
        raise UserError(f"the loss is not finite in epoch {epoch}: try a smaller --lr; the last checkpoint is kept")
    save(Path(args.out, "metrics.jsonl"), "".join(json.dumps(line) + "\n" for line in history))
    content = {name: part.state_dict() for name, part in state.items()}
    save(Path(args.out, "checkpoint.pt"), content | {"images": common.fingerprint(data), "history": history})


def load_checkpoint(args, state, data):
    """Restores the run in args.out, if it has finished an epoch -> its history. The flags fit, and are kept."""
    path, history = Path(args.out, "checkpoint.pt"), []
    if path.exists():
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            for name, part in state.items():
                part.load_state_dict(content[name])
            history = content["history"]
        except Exception:  # a torn file, or a checkpoint of another model, fails in many ways
            raise UserError(f"{path}: is not a checkpoint of this run with these flags") from None
        if content["images"] != common.fingerprint(data):
            raise UserError(f"{path}: --dataset {args.dataset} is not what it was when the run began")
    save(Path(args.out, "args.json"), json.dumps(dataclasses.asdict(args), indent=2) + "\n")
    return history


def save_rows(path, texts, cells, marks=()):
    """Rows of a text and cells, uint8 (R, C, 3, S, S); marks {(row, column): (text, frame color)} in some of them."""
    step, left, tiles = 68, 420, F.interpolate(cells.cpu().flatten(0, 1) / 255, 64, mode="area")  # (RC, 3, 64, 64)
    grid = torchvision.utils.make_grid(tiles, cells.shape[1], padding=4, pad_value=1.0)
    sheet = torchvision.transforms.functional.to_pil_image(F.pad(grid, (left, 8, 8, 8), value=1.0))
    draw = ImageDraw.Draw(sheet)
    for i, text in enumerate(texts):
        lines = "\n".join(textwrap.wrap(text, 54)[:3])
        draw.text((left - 8, 10 + (i + 0.5) * step), lines, "black", anchor="rm", align="right", font_size=14)
    for (i, j), (text, frame) in dict(marks).items():
        x, y, ink = left + 3 + j * step, 11 + i * step, "white" if cells[i, j].float().mean() < 150 else "black"
        draw.rectangle((x, y, x + step - 3, y + step - 3), outline=frame, width=3)
        draw.text((x + step / 2 - 1, y + step / 2 - 1), text, ink, anchor="mm", font_size=14)
    if RANK == 0:
        sheet.save(path)


def save_examples(folder, model, tokenizer, images, captions):
    """Eight test images with a caption each: similarity.png, the lecture's matrix of their cosines, and retrieval.png,
    for each caption the images nearest to it, the right one in a green frame."""
    rows = torch.linspace(0, len(images) - 1, min(8, len(images))).long()  # spread over the split
    texts = [max(captions[i], key=len) for i in rows]  # the most detailed one
    s = (embed_texts(model, tokenizer, texts) @ embed_images(model, images)[1].T).cpu()  # (8, M)
    cosines, blue = s[:, rows], torch.tensor([33, 102, 171])[:, None, None]  # (8, 8), caption i and image j
    strength = (cosines - cosines.min()) / (cosines.max() - cosines.min()).clamp(min=1e-6)
    cells = (255 - strength[..., None, None, None] * (255 - blue)).byte().expand(-1, -1, *images.shape[1:])
    marks = {(i + 1, j): (f"{c:.2f}", "black" if i == j else None)
             for i, row in enumerate(cosines.tolist()) for j, c in enumerate(row)}  # fmt: skip
    save_rows(folder / "similarity.png", ["", *texts], torch.cat([images[rows].cpu()[None], cells]), marks)
    nearest = s.topk(min(8, len(images))).indices  # (8, 8)
    marks = {(i, j): ("", "green") for i, j in (nearest == rows[:, None]).nonzero().tolist()}
    save_rows(folder / "retrieval.png", texts, images[nearest], marks)


SHAPES = dict(encoder="small", text_width=128, text_layers=2, context=24, epochs=16, batch_size=64, crop=0.8,
              eval_every=4)  # fmt: skip
SMALL = dict(image_size=64, text_width=128, text_layers=2, epochs=30, batch_size=64)


def parse_args(argv=None):
    """The command line, over the recipe of its dataset or over the flags of the run to resume -> Args."""
    argv = sys.argv[1:] if argv is None else list(argv)
    fields = [field for field in dataclasses.fields(Args) if field.metadata]
    parser = argparse.ArgumentParser(f"{METHOD}.py", argparse.SUPPRESS, __doc__, formatter_class=RAW, add_help=False)
    for field in fields:
        name, help = "--" + field.name.replace("_", "-"), field.metadata["help"] + " (%(default)s)"
        parser.add_argument(name, help=help, **field.metadata["options"] or {"type": field.type})
    given = parser.parse_known_args(argv)[0]  # None for what is not given
    args = Args(**SHAPES if given.dataset in (None, "shapes") else SMALL if given.encoder == "small" else {})
    if given.resume:
        try:
            args = Args(**json.loads(Path(given.resume, "args.json").read_text()))
        except (OSError, ValueError, TypeError):
            parser.error(f"--resume {given.resume}: there is no run of {METHOD}.py in this folder")
    parser.set_defaults(**vars(args))
    parser.add_argument("-h", "--help", action="help", help="show this help, with the recipe of --dataset in brackets")
    parser.parse_args(argv, args)
    for field in fields:
        low, value, high = field.metadata["low"], getattr(args, field.name), field.metadata["high"]
        if low is not None and not low <= value <= high:
            parser.error(f"--{field.name.replace('_', '-')} {value}: must be from {low} to {high}")
    if given.out and given.resume:
        parser.error("--out: a resumed run stays in its folder")
    args.typed = [*args.typed, *(field.name for field in fields if getattr(given, field.name) is not None)]
    args.command = shlex.join([*shlex.split(args.command), *argv])
    args.out = args.resume or args.out or f"runs/{METHOD}-{Path(args.dataset).resolve().stem}-seed{args.seed}"
    return args


def main(args):
    """Measures the untrained model, pretrains on captions, measures again -> the content of summary.json."""
    if args.query or args.caption or args.zero_shot_classes:
        return ask(args)
    start, load = time.perf_counter(), [args.dataset, args.data_dir, args.image_size]
    data = common.load_dataset(*load) if RANK == 0 else None  # the others wait below while this downloads or decodes
    device = pick_device(args.device)
    data = (data or common.load_dataset(*load)).to(device)
    if data.train_captions is None:
        raise UserError(f"--dataset {args.dataset}: has no captions; a folder of images needs a captions.csv")
    data = hold_out(data) if data.train_colors is not None else data
    M, _, S, _ = data.train_images.shape
    args.batch_size = args.batch_size if "batch_size" in args.typed else min(args.batch_size, M // WORLD * WORLD)
    if args.batch_size > M or args.batch_size % WORLD:
        raise UserError(f"--batch-size {args.batch_size}: at most the {M} images, in equal parts for {WORLD} processes")
    tokenizer = Tokenizer(data.train_captions, args.context)
    words = [word for texts in data.test_captions for text in texts for word in tokenizer.split(text)]
    unknown = len(tokenizer.unknown(" ".join(words))) / max(1, len(words))
    torch.manual_seed(args.seed)
    layout = torch.preserve_format if device.type == "mps" else torch.channels_last  # as of common.normalize
    model = CLIP(args, 4 + len(tokenizer.words), S).to(device, memory_format=layout)
    if WORLD > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    best = copy.deepcopy(model)  # now the untrained model, after pretraining that of the best epoch
    if args.compile:
        model.compile()
    with common.compile_operators(args.compile), run_folder(args) as folder:
        print(f"{METHOD} on {args.dataset}: {M} images, {S} x {S}, {len(tokenizer.words)} different words, which "
              f"{unknown:.1%} of the words in test captions are not among; {device}; {folder}", flush=True)  # fmt: skip
        untrained = evaluate(best, tokenizer, data)
        history = pretrain(model, best, tokenizer, data, args)
        print("measuring", flush=True)
        trained = evaluate(best, tokenizer, data)
        seconds = [line["seconds"] for line in history]
        summary = {
            "method": METHOD,
            "command": args.command,
            "args": dataclasses.asdict(args),
            "date": time.strftime("%Y-%m-%d"),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "parameters": sum(p.numel() for p in model.encoder.parameters()),
            "images_per_second": M // args.batch_size * args.batch_size / sorted(seconds)[len(seconds) // 2],
            "pretrain_seconds": sum(seconds),
            "total_seconds": time.perf_counter() - start,
            "unknown_words": unknown,
            "best_epoch": max(history, key=lambda line: (line.get("val_recall", 0.0), line["epoch"]))["epoch"],
            "untrained": untrained,
            "trained": trained,
            "history": history,
        }
        save(folder / "encoder.pt", best.encoder.state_dict())
        save(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        save_examples(folder, best, tokenizer, data.test_images, data.test_captions)
    for name in trained:
        print(f"{name:26}{trained[name]:6.1%}, untrained {untrained[name]:.1%}")
    print(f"{summary['total_seconds']:.0f} s in all; results are in {folder}")
    return summary


def run():  # the command line: bad input is one line and exit code 2
    sys.stdout.reconfigure(errors="replace")  # for consoles that cannot show every file name
    try:
        main(parse_args())
    except UserError as error:
        print(f"{METHOD}.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, BrokenPipeError):  # Ctrl-C, or a `| head` that has read enough
        sys.stdout = None
        sys.exit("stopped; --resume with the run folder goes on from the last whole epoch")


if __name__ == "__main__":
    run()
