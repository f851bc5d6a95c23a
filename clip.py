"""CLIP: each image of a batch should be closest to its own caption, and each caption to its own
image.

An image encoder and a text encoder each end in a linear map to one space. The N x N cosines between
the images and the captions of a batch are the logits of 2N classifications, whose answers lie on
the diagonal. All other pairs are negatives, so a larger batch has more of them. Matching captions
is easier to learn than writing them word by word. After training, text defines a classifier: any
set of classes will do, once each of them is written as a caption.

    Radford et al.: Learning Transferable Visual Models From Natural Language Supervision, ICML
    2021. Figure 3 of the paper, InfoNCE in both directions, for images x and captions y; and
    zero-shot classification by captions y_c of the classes c:

    s(x, y) = exp(a) x . y / (|x| |y|)                  a is learned, exp(a) = 1 / temperature
    L = -1/(2N) sum_i [ log( exp s(x_i, y_i) / sum_j exp s(x_i, y_j) )
                      + log( exp s(x_i, y_i) / sum_j exp s(x_j, y_i) ) ]
    p(c | x) = exp s(x, y_c) / sum_d exp s(x, y_d)

    python clip.py                                          shapes; a laptop CPU will do
    python clip.py --dataset path/to/flickr8k --compile     a folder with captions.csv, on a GPU
    python clip.py --dataset path/to/flickr8k --encoder small --eval-every 5     the same on a CPU
    python clip.py --init runs/simclr-shapes-seed0/encoder.pt     begins with SimCLR's encoder
    python clip.py --resume RUN --query "a red star"        the test images closest to a sentence
    python clip.py --resume RUN --caption IMAGE             the test captions closest to an image
    python clip.py --resume RUN --zero-shot-classes star,moon     test images sorted by class names
    torchrun --nproc-per-node 8 clip.py --dataset path/to/images     on 8 GPUs

On test with seed 0 (records in results/): shapes, zero-shot 98.7 %, linear probe untrained ->
trained 36.4 -> 99.3 %; Flickr8k with the small encoder, text-to-image recall@10 over 1,000 images
19.5 %, where chance is 1 %.

Left out of the paper: attention pooling of the image encoder, subwords, prompt ensembles.
"""

import argparse
import contextlib
import copy
import dataclasses
import difflib
import io
import json
import math
import os
import re
import shlex
import statistics
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
from torchvision.transforms.functional import resize, to_pil_image

import common
from common import UserError

RANK = int(os.environ.get("RANK", 0))  # torchrun starts a process for each GPU, numbered from 0
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def flag(default, help, low=None, high=math.inf, choices=None, resume=False):
    """A field of Args that the command line can set. A number must be from low to high; only flags
    with resume=True, which change nothing about the training, go together with --resume."""
    metadata = {"help": help, "low": low, "high": high, "choices": choices, "resume": resume}
    return dataclasses.field(default=default, metadata=metadata)


ENCODERS = "small", "resnet18", "resnet34", "resnet50"
WIDTHS = 64, 128, 256, 512


@dataclasses.dataclass
class Args:
    """The values here are the recipe for Flickr8k on a GPU. SHAPES and SMALL, below, replace some
    of them, but never a flag that was typed."""

    script: str = "clip.py"  # relatives/ name their own
    # With --resume, questions may be about other images; training on other ones is refused.
    dataset: str = flag("shapes", "shapes, or an image folder with captions.csv", resume=True)
    data_dir: str = flag("data", "folder for downloads and decoded images", resume=True)
    image_size: int = flag(128, "side of a folder's images in pixels; paper: 224", 8, 512)
    encoder: str = flag("resnet18", "image encoder; paper: resnet50, ViT", choices=ENCODERS)
    init: str = flag("", "weights of the image encoder to begin with: simclr.py's, torchvision's")
    text_width: int = flag(256, "width of texts and common space; paper: 512", choices=WIDTHS)
    text_layers: int = flag(
        4, "blocks of the text encoder, a head for 32 of its width; paper: 12, a head for 64", 1
    )
    context: int = flag(32, "longest text in words, with its start and end; paper: 76 subwords", 3)
    epochs: int = flag(100, "passes over the images, each with one caption; paper: 32", 0)
    batch_size: int = flag(128, "pairs N per step, over all GPUs; paper: 32768", 2)
    lr: float = flag(1e-3, "peak learning rate of AdamW, for any batch size; paper: 5e-4", 0)
    weight_decay: float = flag(0.2, "weight decay, of matrices and kernels only; paper: 0.2", 0)
    warmup: float = flag(0.05, "fraction of steps with linear warmup; paper: 2000 steps", 0, 0.9)
    crop: float = flag(
        0.5, "smallest crop, as a fraction of an image's area; paper: a random square", 0.01, 1
    )
    eval_every: int = flag(10, "epochs between two recalls on validation images; the best stays", 1)
    query: str = flag("", "train nothing; find the test images closest to this text", resume=True)
    caption: str = flag("", "train nothing; find the test captions of an image file", resume=True)
    zero_shot_classes: str = flag(
        "", "train nothing; sort the test images into classes, such as cat,dog", resume=True
    )
    seed: int = flag(0, "seed of weights, batches, views and choice of labels", 0, 2**31)
    device: str = flag("auto", "cuda, mps, cpu, or auto: the first that is there", resume=True)
    compile: bool = flag(False, "compile network and views, for long runs on a GPU", resume=True)
    out: str = flag("", "run folder; by default runs/<method>-<dataset>-seed<seed>")
    resume: str = flag("", "run folder to continue, with the flags of its first start", resume=True)
    explicit: tuple = ()  # flags that were typed: recipes leave them alone
    command: str = ""


SHAPES = dict(
    encoder="small", text_width=128, text_layers=2, context=24, epochs=16, batch_size=64, crop=0.8,
    eval_every=4,
)  # fmt: skip
# With --encoder small, on other images: what two CPU cores train in ten minutes.
SMALL = dict(image_size=64, text_width=128, text_layers=2, epochs=30, batch_size=64)


# === Views ========================================================================================
def one_view(images, args, generator):
    """uint8 (N, 3, S, S) -> float (N, 3, S, S) in [0, 1], cropped and mirrored at random.

    Colors stay, as captions name them. Mirroring contradicts captions that say left or right, and
    writing: where images have those, set flip=0. The paper only crops: with 400 million pairs it
    does not overfit.
    """
    return common.random_resized_crop(
        images / 255, images.shape[3], generator, scale=(args.crop, 1.0)
    )


# === Model ========================================================================================
def build_encoder(name, image_size=32, norm_layer=nn.BatchNorm2d):
    """torchvision's ResNet without its classifier, (B, 3, S, S) -> (B, D); and D.

    ImageNet's stem would shrink 32 x 32 pixels to 8 x 8 before the first block. So up to 64 pixels
    the stem is a 3x3 convolution without pooling (SimCLR paper, appendix B.9). `small`, for CPUs,
    keeps ImageNet's stem, to be fast, and has one block in each of the first two stages, no others.
    """
    architecture = "resnet18" if name == "small" else name
    encoder = torchvision.models.get_model(architecture, norm_layer=norm_layer)
    D = encoder.fc.in_features
    encoder.fc = nn.Identity()
    if name == "small":
        D = 128
        encoder.layer1 = encoder.layer1[:1]
        encoder.layer2 = encoder.layer2[:1]
        encoder.layer3 = nn.Identity()
        encoder.layer4 = nn.Identity()
    elif image_size <= 64:
        encoder.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()
    return encoder, D


class CLIP(nn.Module):
    """Image encoder and text encoder, each with a linear map to the common space, where the paper
    saw no gain from SimCLR's MLP; and a, the learned logarithm of the logits' scale."""

    def __init__(self, args, vocabulary, image_size=32):
        super().__init__()
        width = args.text_width
        encoder, D = build_encoder(args.encoder, image_size)
        load_weights(encoder, args)
        self.encoder = encoder
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.empty(args.context, width))
        options = {"dropout": 0.0, "activation": F.gelu, "batch_first": True, "norm_first": True}
        blocks = [
            nn.TransformerEncoderLayer(width, width // 32, 4 * width, **options)
            for _ in range(args.text_layers)
        ]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)  # as in the authors' code
        nn.init.normal_(self.positions, std=0.01)
        self.image_projection = nn.Linear(D, width, bias=False)
        self.text_projection = nn.Linear(width, width, bias=False)
        self.log_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))  # a, as in the paper
        causal_mask = nn.Transformer.generate_square_subsequent_mask(args.context)
        self.register_buffer("causal_mask", causal_mask, persistent=False)

    def encode_image(self, images):
        """(B, 3, S, S) -> (B, width), of any length."""
        return self.image_projection(self.encoder(images))

    def encode_text(self, tokens):
        """(B, T) -> (B, width), of any length: a transformer with causal attention, read at the end
        of the text. No word sees those after it, so the padding after the end does not matter."""
        x = self.token_embedding(tokens) + self.positions  # (B, T, width)
        for block in self.blocks:
            x = block(x, src_mask=self.causal_mask, is_causal=True)
        end = (tokens == Tokenizer.END).int().argmax(1)  # (B,)
        rows = torch.arange(x.shape[0], device=x.device)
        return self.text_projection(self.norm(x[rows, end]))

    def forward(self, images, tokens):
        return self.encode_image(images), self.encode_text(tokens), self.log_scale.exp()


# === Loss =========================================================================================
def clip_loss(image_features, text_features, logit_scale):
    """Symmetric InfoNCE over the N x N matrix of a batch, figure 3 of the paper.

    image_features, text_features (N, D): row i of both is a pair, normalized in here; logit_scale
    is exp(a) -> scalar, in nats; log N is chance. A row of the matrix ranks captions, a column
    images: what is added to all of a row cancels in its softmax, and only the columns forbid it.
    Captions of other images are negatives even if they are equal, as in the paper; of the captions
    of one image a batch has only one.
    """
    images = F.normalize(image_features, dim=1)
    texts = F.normalize(text_features, dim=1)
    logits = logit_scale * images @ texts.T  # (N, N)
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def gather(x):
    """Rows (B, D) of all processes -> (WORLD B, D), with a gradient to those of this process.

    Every process computes the loss of the whole batch, but its gradient for its own rows only.
    The parts have to be added, and DistributedDataParallel averages them: hence WORLD times.
    """
    if WORLD == 1:
        return x
    rows = [torch.empty_like(x) for _ in range(WORLD)]
    dist.all_gather(rows, x.detach())
    rows[RANK] = x.detach() + WORLD * (x - x.detach())  # the value of x, WORLD times its gradient
    return torch.cat(rows)


# === Training =====================================================================================
def training_step(network, images, tokens, args, generator, update):
    """Figure 3 of the paper for uint8 images (N, 3, S, S) and the tokens of a caption of each
    (N, T); update(loss) trains both encoders and a. Returns what to log.

    bound, log N minus loss, estimates the mutual information of images and captions from below, in
    nats (van den Oord et al. 2018).
    """
    model = getattr(network, "module", network)  # without DistributedDataParallel around it
    x = common.normalize(one_view(images, args, generator))  # (N, 3, S, S)
    with autocast(x.device):
        image_features, text_features, scale = network(x, tokens)  # (N, D) each
    image_features = gather(image_features.float())  # (WORLD N, D): of all processes
    text_features = gather(text_features.float())
    loss = clip_loss(image_features, text_features, scale)
    update(loss)
    model.log_scale.data.clamp_(max=math.log(100))  # larger scales make training unstable (paper)
    return {"loss": loss, "bound": math.log(args.batch_size) - loss, "logit_scale": scale[0]}


def pretrain(model, best, tokenizer, data, args, training_step):
    """Trains on data.train_images, uint8 (M, 3, S, S), each with one of its captions, from the
    checkpoint in args.out if there is one. Leaves in `best`, at first a copy of the model, that of
    the epoch with the highest recall on validation images. Returns the history, a record of each
    epoch."""
    images = data.train_images
    device = next(model.parameters()).device
    table = caption_table(tokenizer, data.train_captions, device)
    N = args.batch_size // WORLD  # images of this process in a step
    M = len(images)
    steps = M // args.batch_size  # in an epoch; an incomplete last batch is left out
    update, state = make_update(model, args, args.batch_size, max(1, args.epochs * steps))
    state |= {"model": model, "best": best, "tokenizer": tokenizer}
    history = load_checkpoint(args, state, data)
    network = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    for epoch in range(len(history) + 1, args.epochs + 1):
        start = time.perf_counter()
        order, seed = common.epoch_order(M, args.batch_size, args.seed, epoch, RANK, WORLD)
        order = order.to(device)  # where the captions are
        generator = torch.Generator(device).manual_seed(seed)  # of views and captions
        log = []
        model.train()
        batches = zip(common.batches(images, order, N, device), order.split(N), strict=True)
        for step, (batch, rows) in enumerate(batches):  # (N, 3, S, S), (N,)
            tokens = drawn_captions(table, rows, generator)  # (N, T)
            terms = training_step(network, batch, tokens, args, generator, update)
            log.append({name: x.detach() for name, x in terms.items()})  # .item() waits for the GPU
            show_progress(args, epoch, step, steps, start)
        record = {"epoch": epoch} | epoch_means(log)
        record["seconds"] = time.perf_counter() - start
        if epoch % args.eval_every == 0 or epoch == args.epochs:
            record |= validate(model, tokenizer, data)
            recall = record.get("val_recall", 1.0)  # without validation images the last one stays
            if recall >= max([earlier.get("val_recall", 0.0) for earlier in history], default=0.0):
                best.load_state_dict(model.state_dict())
        history.append(record)
        save_epoch(args, state, data, history)
    return history


def make_optimizer(model, args, batch_size, steps):
    """AdamW, with weight decay of matrices and kernels only; linear warmup, then half a cosine to
    0."""
    parameters = list(model.parameters())
    decayed = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}]
    groups.append({"params": others, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, args.lr, fused=True)
    warmup = args.warmup * steps

    def factor(step):
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = (min(step, steps) - warmup) / (steps - warmup)
        return 0.5 + 0.5 * math.cos(math.pi * progress)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


# === Text =========================================================================================
class Tokenizer:
    """Texts -> numbers of their words. The vocabulary is every word that occurs at least twice in
    the training captions, the most frequent first; captions: a list of them for each image. 0 is
    padding, 1 starts a text, 2 ends it, 3 is any other word; the paper's subwords need no such."""

    PADDING, START, END, UNKNOWN = range(4)
    # Thai, Lao, Burmese, Khmer, Japanese and Chinese have no spaces: each character is a word.
    UNSPACED = "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"

    def __init__(self, captions, context):
        counts = Counter(word for texts in captions for text in texts for word in self.split(text))
        words = sorted(word for word, count in counts.items() if count > 1)
        words.sort(key=counts.get, reverse=True)  # words of one frequency stay in order
        self.load_state_dict({"words": words, "context": context})

    def split(self, text):
        """Lower-cased words: runs of digits and of letters with their accents."""
        text = unicodedata.normalize("NFC", text.lower())  # one code for an accented letter
        kept = [c if unicodedata.category(c)[0] in "LMN" else " " for c in text]
        return re.sub(f"({self.UNSPACED})", r" \1 ", "".join(kept)).split()

    def __call__(self, texts):
        """Texts -> int64 (len(texts), context). Of one that is too long the last words are lost."""
        rows = []
        for text in texts:
            words = [self.numbers.get(word, self.UNKNOWN) for word in self.split(text)]
            row = [self.START, *words[: self.context - 2], self.END]
            rows.append(row + [self.PADDING] * (self.context - len(row)))
        return torch.tensor(rows)

    def unknown(self, text):
        return [word for word in self.split(text) if word not in self.numbers]

    def check(self, texts):
        """Prints the unknown words of texts. Raises UserError for a text without any known word."""
        unknown = dict.fromkeys(self.unknown(" ".join(texts)))
        if unknown:
            print(f"not in the vocabulary: {', '.join(unknown)}", flush=True)
        empty = [text for text in texts if len(self.unknown(text)) == len(self.split(text))]
        if empty:
            names = ", ".join(map(repr, empty))
            raise UserError(f"{names}: no word of the training captions to go by")

    def state_dict(self):
        return {"words": self.words, "context": self.context}

    def load_state_dict(self, state):
        self.words = state["words"]
        self.context = state["context"]
        self.numbers = {word: number for number, word in enumerate(self.words, 4)}


def caption_table(tokenizer, captions, device):
    """Captions, a list for each of M images -> tokens of all (K, T), and each image's first row
    there (M,) and number of rows (M,)."""
    counts = torch.tensor([len(texts) for texts in captions])
    tokens = tokenizer([text for texts in captions for text in texts])
    first = counts.cumsum(0) - counts
    return tokens.to(device), first.to(device), counts.to(device)


def drawn_captions(table, rows, generator):
    """One caption of each of some images, rows (N,) of the table -> tokens (N, T)."""
    tokens, first, counts = table
    drawn = common.uniform(0, 1, rows.shape, generator) * counts[rows]  # which of its captions
    return tokens[first[rows] + drawn.long()]


# === Evaluation ===================================================================================
@torch.no_grad()
def features(network, images):
    """Images without augmentation, uint8 (M, 3, S, S), through a frozen network -> float (M, D)."""
    network.eval()
    device = next(network.parameters()).device
    with autocast(device):
        h = [network(common.normalize(x.to(device) / 255)).float() for x in images.split(512)]
    h = torch.cat(h)
    if not h.isfinite().all():
        raise UserError("the features are not finite, so nothing is measured: try a smaller --lr")
    return h


def linear_probe(train, train_labels, test, test_labels):
    """Logistic regression on standardized frozen features (M, D), (Q, D) -> accuracy in [0, 1], on
    test. C is 1, scikit-learn's default. L-BFGS begins at zero and ends when it has converged."""
    mean = train.mean(0)
    std = train.std(0, correction=0) + 1e-5
    train = (train - mean) / std
    test = (test - mean) / std
    classes = int(train_labels.max()) + 1
    weight = train.new_zeros(classes, train.shape[1], requires_grad=True)
    bias = train.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=1000,
        tolerance_grad=1e-5,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def objective():
        optimizer.zero_grad()
        penalty = 0.5 / len(train) * weight.square().sum()
        loss = F.cross_entropy(F.linear(train, weight, bias), train_labels) + penalty
        loss.backward()
        return loss

    optimizer.step(objective)
    predicted = F.linear(test, weight, bias).argmax(1)
    return (predicted == test_labels).float().mean().item()


@torch.no_grad()
def embed_images(model, images):
    """uint8 (M, 3, S, S) -> features (M, D) of length 1 in the common space."""
    return F.normalize(model.image_projection(features(model.encoder, images)), dim=1)


@torch.no_grad()
def embed_texts(model, tokenizer, texts):
    """Texts -> features (K, D) of length 1 in the common space."""
    model.eval()
    device = model.log_scale.device
    parts = tokenizer(texts).split(1024)
    with autocast(device):
        y = [model.encode_text(tokens.to(device)).float() for tokens in parts]
    return F.normalize(torch.cat(y), dim=1)


# One prompt. The paper averages the embeddings of 80, which gains 3.5 % on ImageNet. Training texts
# are sentences, so a bare class name would be unlike all of them.
PROMPT = "a photo of a {}"


@torch.no_grad()
def zero_shot_logits(model, tokenizer, image_features, names):
    """Features (M, D) of length 1, names of C classes -> s(x, y_c), (M, C), whose softmax over the
    classes is p(c | x). Whatever the classifier knows of a class, it knows from captions."""
    y = embed_texts(model, tokenizer, [PROMPT.format(name) for name in names])
    return model.log_scale.exp() * (image_features @ y.T)


def recall(queries, candidates, query_image, candidate_image):
    """Features of length 1 (Q, D), (K, D), and the image that each belongs to (Q,), (K,) ->
    fraction of queries with a candidate of their image among the best 1, 5 and 10."""
    ahead = []  # of the best candidate of a query's image: the number of other candidates
    for query, image in zip(queries.split(1024), query_image.split(1024), strict=True):
        scores = query @ candidates.T  # (B, K)
        own = image[:, None] == candidate_image
        best = scores.masked_fill(~own, -math.inf).amax(1, keepdim=True)
        behind = scores < best  # ties, and NaN, count as ahead
        ahead.append((~behind & ~own).sum(1))
    ahead = torch.cat(ahead)
    return {k: (ahead < k).float().mean().item() for k in (1, 5, 10)}


def retrieval(model, tokenizer, images, captions):
    """Recalls between images, uint8 (M, 3, S, S), and all their captions, a list for each. An image
    has to find one of its captions, mostly five, and a caption its one image (protocol of Hodosh et
    al. 2013)."""
    x = embed_images(model, images)
    y = embed_texts(model, tokenizer, [text for texts in captions for text in texts])
    image = torch.arange(len(x), device=x.device)
    counts = torch.tensor([len(texts) for texts in captions], device=x.device)
    owner = image.repeat_interleave(counts)  # (K,)
    recalls = {f"text_to_image_r{k}": r for k, r in recall(y, x, owner, image).items()}
    return recalls | {f"image_to_text_r{k}": r for k, r in recall(x, y, image, owner).items()}


def effective_rank(h):
    """How many directions features (M, D) fill, from 1 to D: exp of the entropy of their singular
    values, normalized to sum to 1 (RankMe, Garrido et al. 2023). It needs no labels."""
    s = torch.linalg.svdvals(h)
    p = s / s.sum().clamp(min=1e-9)  # features that are all 0 have rank 1
    return torch.special.entr(p).sum().exp().item()


def validate(model, tokenizer, data):
    """While training: the effective rank of h, of at most 4,096 images, and val_recall, recall@10
    on validation images if there are any, mean of both directions."""
    some = data.train_images[:: len(data.train_images) // 4096 + 1]
    logged = {"rank": effective_rank(features(model.encoder, some))}
    if data.val_images is not None:
        recalls = retrieval(model, tokenizer, data.val_images, data.val_captions)
        both = recalls["text_to_image_r10"], recalls["image_to_text_r10"]
        logged["val_recall"] = sum(both) / 2
    return logged


def evaluate(model, tokenizer, data):
    """Recalls on the test images and, for data with classes, accuracies of zero-shot and of linear
    probes, with all labels and, figure 6 of the paper, with 1 to 16 per class, the mean of three
    draws of them."""
    results = retrieval(model, tokenizer, data.test_images, data.test_captions)
    if not data.classes:
        return results
    y = data.train_labels
    test_y = data.test_labels
    h = features(model.encoder, data.train_images)
    test_h = features(model.encoder, data.test_images)
    results["linear_probe"] = linear_probe(h, y, test_h, test_y)
    x = embed_images(model, data.test_images)
    predicted = zero_shot_logits(model, tokenizer, x, data.classes).argmax(1)
    correct = (predicted == test_y).float()
    results["zero_shot"] = correct.mean().item()
    unseen = test_y == data.test_colors  # kind k in color k: hold_out_pairs has left these out
    results["zero_shot_unseen"] = correct[unseen].mean().item()
    for n in (1, 2, 4, 8, 16):
        if n > y.bincount().min():
            break
        samples = [common.labelled_rows(y, n, seed) for seed in range(3)]
        accuracies = [linear_probe(h[rows], y[rows], test_h, test_y) for rows in samples]
        results[f"linear_probe_{n}_per_class"] = sum(accuracies) / 3
    return results


def hold_out_pairs(data):
    """Shapes -> training images without those whose kind and color have the same number, such as
    red arrows, so that test shows how these unseen pairs are read; and with a tenth of the others
    set apart for validation."""
    y = data.train_labels
    rows = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).to(y.device)
    rows = rows[y[rows] != data.train_colors[rows]]
    val, train = rows.tensor_split([len(rows) // 10])
    return dataclasses.replace(
        data,
        train_images=data.train_images[train],
        train_labels=y[train],
        train_captions=[data.train_captions[row] for row in train.tolist()],
        val_images=data.train_images[val],
        val_captions=[data.train_captions[row] for row in val.tolist()],
    )


# === Questions to a run ===========================================================================
def load_run(folder, device="cpu"):
    """The run in a folder -> CLIP of its best epoch, its Tokenizer, and its Args, with the side of
    its images as image_size."""
    try:
        args = Args(**json.loads(Path(folder, "args.json").read_text()))
        content = torch.load(Path(folder, "checkpoint.pt"), map_location=device, weights_only=True)
        args.out = str(folder)  # which may have been moved
        args.image_size = content["data"][3]
        tokenizer = Tokenizer([], args.context)
        tokenizer.load_state_dict(content["tokenizer"])
        model = CLIP(args, 4 + len(tokenizer.words), args.image_size).to(device)
        model.load_state_dict(content["best"])
    except Exception:  # no folder, no epoch yet, a torn file or another method's
        message = f"--resume {folder or 'RUN'}: must be the folder of a trained run of clip.py"
        raise UserError(message) from None
    return model.eval(), tokenizer, args


def print_answers(scores, texts):
    """Scores (n,) and n texts, a line for each -> a list of both."""
    answers = list(zip(scores.tolist(), texts, strict=True))
    for score, text in answers:
        print(f"{round(score, 3):8}  {text}")
    return answers


def find_images(model, tokenizer, data, folder, query):
    """The eight test images closest to the query, in query.png. Returns their cosines, and a
    caption of each."""
    tokenizer.check([query])
    y = embed_texts(model, tokenizer, [query])[0]
    cosines = (embed_images(model, data.test_images) @ y).cpu()
    best = cosines.topk(min(8, len(cosines)))
    title = f'closest to "{query}", best first'
    save_sheet(folder / "query.png", {title: data.test_images[best.indices][None] / 255})
    names = [f"test image {row}" for row in best.indices.tolist()]
    if data.test_captions:
        names = [data.test_captions[row][0] for row in best.indices.tolist()]
    return print_answers(best.values, names)


def find_captions(model, tokenizer, data, image):
    """The eight test captions closest to an image, uint8 (3, S, S). Returns cosines, captions."""
    texts = list(dict.fromkeys(text for own in data.test_captions for text in own))
    x = embed_images(model, image[None])[0]
    cosines = (embed_texts(model, tokenizer, texts) @ x).cpu()
    best = cosines.topk(min(8, len(cosines)))
    return print_answers(best.values, [texts[row] for row in best.indices.tolist()])


def match_classes(names, classes, tokenizer):
    """The row in names of each class (C,), matched by their words. With as many names as classes,
    those left over are matched in order, which is printed; else a class without a name has -1."""
    split_names = [tokenizer.split(name) for name in names]
    split_classes = [tokenizer.split(name) for name in classes]
    rows = [split_names.index(words) if words in split_names else -1 for words in split_classes]
    left = [row for row in range(len(names)) if row not in rows]
    if len(names) == len(classes):
        for k, name in enumerate(classes):
            if rows[k] < 0:
                rows[k] = left.pop(0)
                print(f"{names[rows[k]]!r} is taken for the class {name!r}")
    return torch.tensor(rows)


def sort_images(model, tokenizer, data, folder, names):
    """Zero-shot classification of the test images; classes.png has the eight likeliest of each
    class. Returns how many are sorted into each class and, if all classes of the data are among
    them, the accuracy."""
    tokenizer.check(names)
    x = embed_images(model, data.test_images)
    logits = zero_shot_logits(model, tokenizer, x, names).cpu()  # (M, C)
    best = logits.softmax(1).topk(min(8, len(logits)), dim=0).indices  # (8, C)
    columns = {name: data.test_images[best[:, c]][:, None] / 255 for c, name in enumerate(names)}
    save_sheet(folder / "classes.png", columns)
    predicted = logits.argmax(1)
    answers = print_answers(predicted.bincount(minlength=len(names)), names)
    accuracy = None
    rows = match_classes(names, data.classes, tokenizer)
    if data.classes and rows.min() >= 0:
        accuracy = (predicted == rows[data.test_labels]).float().mean().item()
        print(f"accuracy: {accuracy:.1%}")
    return answers, accuracy


def ask(args):
    """Answers --query, --caption or --zero-shot-classes by the run in --resume, on the test images
    of --dataset."""
    if bool(args.query) + bool(args.caption) + bool(args.zero_shot_classes) > 1:
        raise UserError("--query, --caption and --zero-shot-classes: one at a time")
    model, tokenizer, trained = load_run(args.resume, pick_device(args.device))
    S = trained.image_size
    data = common.load_dataset(args.dataset, args.data_dir, S)
    data = dataclasses.replace(data, test_images=resize(data.test_images, [S, S]))
    folder = Path(args.resume)
    if args.query:
        return find_images(model, tokenizer, data, folder, args.query)
    if args.caption:
        if not data.test_captions:
            raise UserError(f"--caption: --dataset {args.dataset} has no captions")
        image = torch.tensor(common.decode_image(Path(args.caption), S)).permute(2, 0, 1)
        return find_captions(model, tokenizer, data, image)
    names = [name.strip() for name in args.zero_shot_classes.split(",")]
    return sort_images(model, tokenizer, data, folder, list(dict.fromkeys(names)))


# === Figures ======================================================================================
def save_rows(path, title, texts, cells, labels, frames):
    """Below a title, rows of a text and of cells, float (R, C, 3, S, S) in [0, 1], in tiles of 96
    pixels. (row, column) -> text, in labels; (row, column) -> color, in frames."""
    step = 100
    left = 420
    top = 30
    tiles = F.interpolate(cells.flatten(0, 1).cpu(), 96, mode="area")
    tiles = F.pad(tiles, (4, 0, 4, 0), value=1.0).unflatten(0, cells.shape[:2])
    grid = tiles.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)  # (3, R step, C step)
    sheet = to_pil_image(F.pad(grid, (left, 12, top, 12), value=1.0))
    draw = ImageDraw.Draw(sheet)
    draw.text((12, 8), title, "black", font_size=16)
    for i, text in enumerate(texts):
        lines = "\n".join(textwrap.wrap(text, 50)[:4])
        place = (left - 8, top + 2 + (i + 0.5) * step)
        draw.text(place, lines, "black", anchor="rm", align="right", font_size=15)
    for (i, j), text in labels.items():
        ink = "white" if cells[i, j].mean() < 0.6 else "black"
        place = (left + 2 + (j + 0.5) * step, top + 2 + (i + 0.5) * step)
        draw.text(place, text, ink, anchor="mm", font_size=18)
    for (i, j), color in frames.items():
        x = left + j * step
        y = top + i * step
        draw.rectangle((x + 1, y + 1, x + step + 2, y + step + 2), outline=color, width=4)
    file = io.BytesIO()
    sheet.save(file, format="png")
    save(path, file.getvalue())


def save_similarity(path, images, texts, cosines):
    """Figure 1 of the paper for uint8 images (R, 3, S, S) and a text of each: their cosines (R, R),
    text i and image j, as shades of blue."""
    strength = (cosines - cosines.min()) / (cosines.max() - cosines.min()).clamp(min=1e-6)
    blue = torch.tensor([0.13, 0.4, 0.67])
    shades = 1 - strength[:, :, None] * (1 - blue)  # (R, R, 3)
    S = images.shape[3]
    cells = shades[..., None, None].expand(-1, -1, -1, S, S)
    cells = torch.cat([images[None] / 255, cells])  # (1 + R, R, 3, S, S)
    labels = {}
    frames = {}
    for i in range(len(texts)):
        frames[1 + i, i] = "black"
        for j in range(len(texts)):
            labels[1 + i, j] = f"{cosines[i, j]:.2f}"
    title = "cosines of test images and captions: the higher, the bluer; frames: the true pairs"
    save_rows(path, title, ["", *texts], cells, labels, frames)


def save_examples(folder, model, tokenizer, images, captions):
    """similarity.png of eight test images, uint8 (M, 3, S, S), with the longest caption of each;
    and retrieval.png, the images closest to these captions."""
    rows = torch.linspace(0, len(images) - 1, min(8, len(images))).long()  # spread over the split
    texts = [max(captions[row], key=len) for row in rows]
    x = embed_images(model, images)
    cosines = (embed_texts(model, tokenizer, texts) @ x.T).cpu()  # (8, M)
    images = images.cpu()
    save_similarity(folder / "similarity.png", images[rows], texts, cosines[:, rows])
    nearest = cosines.topk(min(8, len(images))).indices  # (8, 8)
    own = (nearest == rows[:, None]).nonzero().tolist()
    frames = {(i, j): "#0073b3" for i, j in own}
    title = "the test images closest to each caption, best first: blue is the caption's own image"
    save_rows(folder / "retrieval.png", title, texts, images[nearest] / 255, {}, frames)


# === The whole run ================================================================================
def fit_batch_size(args, M):
    """At most all M images, unless a number was typed; the same share for every process."""
    use_recipe(args, {"batch_size": min(args.batch_size, M // WORLD * WORLD)})
    N = args.batch_size
    if not 2 <= N <= M:
        raise UserError(f"--batch-size {N}: must be from 2 to {M}, the number of images")
    if N % WORLD:
        raise UserError(f"--batch-size {N}: must be a multiple of {WORLD}, the number of processes")


def main(args, Model=CLIP, training_step=training_step):
    """Measures the model, pretrains it on captions, measures it again. Returns the content of
    summary.json; with a question, the answer."""
    if args.query or args.caption or args.zero_shot_classes:
        return ask(args)
    start = time.perf_counter()
    device = pick_device(args.device)
    data = load_data(args, device)
    if data.train_captions is None:
        raise UserError(f"--dataset {args.dataset}: has no captions; a folder needs captions.csv")
    if data.train_colors is not None:
        data = hold_out_pairs(data)
    M, _, S, _ = data.train_images.shape
    fit_batch_size(args, M)
    tokenizer = Tokenizer(data.train_captions, args.context)
    test_text = " ".join(text for texts in data.test_captions for text in texts)
    unknown_words = len(tokenizer.unknown(test_text)) / max(1, len(tokenizer.split(test_text)))

    torch.manual_seed(args.seed)
    layout = torch.preserve_format if device.type == "mps" else torch.channels_last  # as normalize
    model = Model(args, 4 + len(tokenizer.words), S).to(device, memory_format=layout)
    if WORLD > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    best = copy.deepcopy(model)
    if args.compile:
        model.compile()

    with run_folder(args) as folder:
        print_header(args, data, device)
        lacks = f"lacks {unknown_words:.1%} of the words in test captions"
        print(f"a vocabulary of {len(tokenizer.words)} words, which {lacks}", flush=True)
        untrained = once(folder / "untrained.pt", evaluate, best, tokenizer, data)
        with common.compile_operators(args.compile):
            history = pretrain(model, best, tokenizer, data, args, training_step)
        save(folder / "encoder.pt", best.encoder.state_dict())
        print("measuring", flush=True)
        trained = evaluate(best, tokenizer, data)
        summary = describe(args, data, device, best.encoder, history, start)
        summary["unknown_words"] = unknown_words
        if history:
            recalls = [(record.get("val_recall", 0.0), record["epoch"]) for record in history]
            _, best_epoch = max(recalls)  # of equal ones the later
            summary["best_epoch"] = best_epoch
        summary |= {"untrained": untrained, "trained": trained, "history": history}
        save_json(folder / "summary.json", summary)
        print_results(summary)
        save_examples(folder, best, tokenizer, data.test_images, data.test_captions)
    return summary


# === Nothing below is about CLIP: every script has it, word for word ==============================
# But for two functions: clip.py has its own pretrain, since its images come with captions, and
# dino.py its own make_update, since it clips gradients.
def epoch_means(log):
    """The mean of each term in the log of an epoch, over its steps and all processes."""
    means = {}
    for name in log[0]:
        mean = torch.stack([terms[name] for terms in log]).mean(0)
        if WORLD > 1:
            dist.all_reduce(mean)
        means[name] = (mean / WORLD).tolist()
    return means


def make_update(model, args, batch_size, steps):
    """The function update(loss), which makes one training step, and the state that it changes."""
    device = next(model.parameters()).device
    optimizer, schedule = make_optimizer(model, args, batch_size, steps)
    scaler = torch.amp.GradScaler(device.type, enabled=fast_dtype(device) == torch.float16)

    def update(loss):
        optimizer.zero_grad()
        scaler.scale(loss).backward()  # float16 would round small gradients to 0
        scaler.step(optimizer)
        scaler.update()
        schedule.step()

    return update, {"optimizer": optimizer, "schedule": schedule, "scaler": scaler}


def fast_dtype(device):
    """bfloat16 where the GPU has it, else float16; None on other devices, which stay at float32."""
    if device.type != "cuda":
        return None
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bfloat16 else torch.float16


def autocast(device):
    """Within it a GPU computes convolutions and matrix products in its fast_dtype."""
    return torch.autocast(device.type, fast_dtype(device), enabled=device.type == "cuda")


def pick_device(name):
    """The device of that name, for `auto` the best there is; a GPU for each process of torchrun."""
    if name == "auto":
        name = "cpu"
        if torch.backends.mps.is_available():
            name = "mps"
        if torch.cuda.is_available():
            name = "cuda"
    if name == "cuda" and WORLD > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        x = torch.zeros(1, device=name)
        x.item()  # devices that hold no numbers, such as `meta`, fail here
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: not available ({reason})") from None
    return x.device


def load_data(args, device):
    """The dataset, on the device. Under torchrun process 0 downloads or decodes it while the others
    wait for it to join them. They then read what it wrote, and leave all printing to it."""
    source = [args.dataset, args.data_dir, args.image_size]
    if RANK == 0:
        data = common.load_dataset(*source)
    if WORLD > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))
    if RANK > 0:
        sys.stdout = None  # print then does nothing
        data = common.load_dataset(*source)
    return data.to(device)


def load_weights(encoder, args):
    """Puts the weights of --init into the encoder. The classifiers of torchvision's files and of
    timm's are left out; any other name or shape has to fit."""
    begun = Path(args.out, "checkpoint.pt").exists()  # and holds the weights of a resumed run
    if begun or not args.init:
        return
    try:
        weights = torch.load(args.init, map_location="cpu", weights_only=True)
        weights = weights.get("model", weights)  # so the authors of MAE wrap theirs
        kept = {name: x for name, x in weights.items() if not name.startswith(("fc.", "head."))}
        encoder.load_state_dict(kept)
    except Exception as error:  # no such file, no weights, or those of another network
        reason = textwrap.shorten(str(error), 300, placeholder=" ...")
        message = f"--init {args.init}: does not fit --encoder {args.encoder}: {reason}"
        raise UserError(message) from None


@contextlib.contextmanager
def run_folder(args):
    """Makes the folder of the run, and locks it until the run ends: no two runs write to one."""
    folder = Path(args.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115, it is closed below
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be used ({error.strerror})") from None
    with lock:
        if os.name == "posix" and RANK == 0:
            import fcntl

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                busy = isinstance(error, BlockingIOError)
                reason = "another run is writing there" if busy else error.strerror
                raise UserError(f"--out {folder}: {reason}") from None
        names = "checkpoint.pt", "summary.json"  # --epochs 0 leaves the latter only
        if any((folder / name).exists() for name in names) and not args.resume:
            raise UserError(
                f"--out {folder}: holds a run; go on with --resume {folder}, or name another folder"
            )
        yield folder


def on_cpu(content):
    """A state dict, or any nest of dicts and lists, with its tensors in main memory."""
    if isinstance(content, dict):
        return {name: on_cpu(value) for name, value in content.items()}
    if isinstance(content, list):
        return [on_cpu(value) for value in content]
    return content.cpu() if torch.is_tensor(content) else content


def save(path, content):
    """Bytes, or what torch.save takes; under another name first, so that no torn file is left."""
    if RANK > 0:
        return
    content = on_cpu(content)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                torch.save(content, file)
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # of torch.save
        reason = getattr(cause, "strerror", error)
        raise UserError(f"{path}: cannot be written ({reason})") from None


def save_json(path, content):
    """A dict, as a text that people read, too."""
    save(path, (json.dumps(content, indent=2) + "\n").encode())


def once(path, measure, *inputs):
    """measure(*inputs), kept in path for a resumed run, with the random state after it: on a CPU,
    later probes then start from the same weights as in a run that was not stopped."""
    if path.with_name("checkpoint.pt").exists() and path.exists():
        content = torch.load(path, weights_only=True)
        torch.set_rng_state(content["random_state"])
    else:
        content = {"result": measure(*inputs), "random_state": torch.get_rng_state()}
        save(path, content)
    return content["result"]


def print_header(args, data, device):
    """What the run is about to do, and a hint if that is little."""
    M, _, S, _ = data.train_images.shape
    steps = M // args.batch_size  # in an epoch
    total = args.epochs * steps
    images = f"{M} images, {S} x {S}, {len(data.train_labels)} labels"
    where = f"{device}; {args.out}"
    print(f"{args.script} on {args.dataset}: {images}; {total} steps; {where}", flush=True)
    if 0 < total < 500 and not args.resume:
        print(f"{total} steps are few: --epochs {math.ceil(1000 / steps)} would make a thousand")


def show_progress(args, epoch, step, steps, start):
    """On a terminal, ten times an epoch: how far it is, and how long the rest of the run takes."""
    if sys.stdout and sys.stdout.isatty() and (step + 1) % max(1, steps // 10) == 0:
        done = (step + 1) / steps
        left = (time.perf_counter() - start) / done * (args.epochs - epoch + 1 - done)
        text = f"epoch {epoch}/{args.epochs} {done:4.0%}, {left / 60:.1f} min left "
        print(text, end="\r", flush=True)


def print_results(summary):
    """What was measured as a table, and what always guessing one class would reach."""
    untrained = summary["untrained"]
    if untrained:
        print(f"{'measured on test images':28}before   after")
    for name, value in summary["trained"].items():
        before = f"{untrained[name]:6.1%}" if name in untrained else ""
        print(f"{name:28}{before:6}  {value:6.1%}")
    if "most_frequent_class" in summary:
        print(f"guessing the most frequent class: {summary['most_frequent_class']:.1%}")
    print(f"{summary['total_seconds']:.0f} s in all; results are in {summary['args']['out']}")


def save_epoch(args, state, data, history):
    """Prints the last record of the history; writes all of them, and the checkpoint, if loss and
    weights are finite."""
    epoch = len(history)
    terms = {name: value for name, value in history[-1].items() if isinstance(value, float)}
    shown = "  ".join(f"{name} {value:.4g}" for name, value in terms.items())
    print(f"epoch {epoch}/{args.epochs}  {shown}", flush=True)
    norm = nn.utils.get_total_norm(state["model"].parameters())
    if not (math.isfinite(terms["loss"]) and norm.isfinite()):
        raise UserError(
            f"the loss is not finite in epoch {epoch}, which is not saved: try less --lr"
        )
    lines = [json.dumps(record) + "\n" for record in history]
    save(Path(args.out, "metrics.jsonl"), "".join(lines).encode())
    content = {name: part.state_dict() for name, part in state.items()}
    content |= {"data": common.fingerprint(data), "history": history}
    save(Path(args.out, "checkpoint.pt"), content)


def load_checkpoint(args, state, data):
    """Restores the run in args.out, if it has finished an epoch, and returns its history. Also
    writes args.json and data.json, once the checkpoint is known to fit."""
    path = Path(args.out, "checkpoint.pt")
    history = []
    if path.exists():
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            unchanged = content["data"] == common.fingerprint(data)
            if unchanged:
                for name, part in state.items():
                    part.load_state_dict(content[name])
            history = content["history"]
        except Exception:  # a torn file, or a checkpoint of another model, fails in many ways
            raise UserError(f"{path}: is not a checkpoint of this run") from None
        if not unchanged:
            raise UserError(f"{path}: --dataset {args.dataset} has changed since the run began")
    save_json(Path(args.out, "args.json"), dataclasses.asdict(args))
    save_json(Path(args.out, "data.json"), data.about())
    return history


def describe(args, data, device, encoder, history, start):
    """What summary.json says of a run, whatever its method."""
    content = {
        "method": Path(args.script).stem,
        "command": args.command,
        "args": dataclasses.asdict(args),
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in encoder.parameters()),
    }
    seconds = [record["seconds"] for record in history]
    if seconds:
        used = len(data.train_images) // args.batch_size * args.batch_size
        content["images_per_second"] = used / statistics.median(seconds)
    if data.classes:
        counts = data.test_labels.bincount()
        content["most_frequent_class"] = counts.max().item() / len(data.test_labels)
    content["pretrain_seconds"] = sum(seconds)
    content["total_seconds"] = time.perf_counter() - start
    return content


def save_sheet(path, blocks):
    """{title: images, float (R, C, 3, S, S) in [0, 1]}, side by side, in tiles of about 128."""
    grids = []
    for images in blocks.values():
        rows, columns, _, S, _ = images.shape
        zoom = max(1, round(128 / S))
        tiles = (255 * images.flatten(0, 1).cpu().clamp(0, 1)).round().byte()
        tiles = F.interpolate(tiles, scale_factor=zoom)
        tiles = F.pad(tiles, (zoom, 0, zoom, 0), value=255).unflatten(0, (rows, columns))
        grid = tiles.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)  # (3, height, width)
        grids.append(F.pad(grid, (8, 8 + zoom, 28, 16 + zoom), value=255))
    sheet = to_pil_image(torch.cat(grids, dim=2))
    left = 8
    for title, grid in zip(blocks, grids, strict=True):
        ImageDraw.Draw(sheet).text((left + zoom, 6), title, fill="black", font_size=16)
        left += grid.shape[2]
    file = io.BytesIO()
    sheet.save(file, "png", compress_level=3)  # half the time of 6, and hardly larger
    save(path, file.getvalue())


def use_recipe(args, recipe):
    """Sets the flags of a recipe, but none that was typed, and none that the method lacks."""
    names = {field.name for field in dataclasses.fields(args)} - set(args.explicit)
    for name, value in recipe.items():
        if name in names:
            setattr(args, name, value)


def option(name):
    """A field of Args as the command line spells it."""
    return "--" + name.replace("_", "-")


def flags_of(Args):
    """{name: field} of those fields that the command line can set."""
    return {field.name: field for field in dataclasses.fields(Args) if field.metadata}


def make_parser(Args, doc, shapes):
    """A parser that returns what was typed, and no more: SUPPRESS leaves out all other flags."""
    flags = flags_of(Args)
    recipes = []
    for title, recipe in {"--dataset shapes": shapes, "--encoder small otherwise": SMALL}.items():
        words = " ".join(f"{option(name)} {recipe[name]}" for name in recipe if name in flags)
        text = f"The recipe of {title}: {words}"
        if words:
            recipes.append(textwrap.fill(text, 100, break_on_hyphens=False))
    parser = argparse.ArgumentParser(
        Args.script,
        description=doc,
        epilog="\n".join(recipes),
        usage=argparse.SUPPRESS,  # errors are one line
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for name, field in flags.items():
        default = f" ({field.default})" if field.default not in ("", ()) else ""
        options = {"help": (field.metadata["help"] + default).replace("%", "%%")}
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif field.type is tuple:
            options["nargs"] = "+"
        else:
            options |= {"type": field.type, "choices": field.metadata["choices"]}
        parser.add_argument(option(name), **options)
    return parser


def parse_args(argv=None, Args=Args, doc=__doc__, shapes=SHAPES):
    """What is typed, over the recipe of the dataset or the flags of the run to resume -> Args."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = make_parser(Args, doc, shapes)
    flags = flags_of(Args)
    namespace, unknown = parser.parse_known_args(argv)
    typed = vars(namespace)
    if unknown:
        close = difflib.get_close_matches(unknown[0].split("=")[0], map(option, flags), 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    for name, value in typed.items():
        if value == "":  # of a shell variable that is not set
            parser.error(f"{option(name)}: is empty")

    if "resume" in typed:
        folder = typed["resume"]
        for name in typed:
            if not flags[name].metadata["resume"]:
                parser.error(
                    f"{option(name)}: a resumed run keeps the flags it was started with; a new run "
                    f"can begin with its weights, by --init {folder}/encoder.pt"
                )
        try:
            args = Args(**json.loads(Path(folder, "args.json").read_text()))
        except (OSError, ValueError, TypeError):
            args = Args(script="none")
        if args.script != Args.script:
            parser.error(f"--resume {folder}: there is no run of {Args.script} in this folder")
        args = dataclasses.replace(args, **typed, out=folder)
    else:
        args = Args(**typed, explicit=tuple(typed))
        if args.dataset == "shapes":
            use_recipe(args, shapes)
        elif args.encoder == "small":
            use_recipe(args, SMALL)
    for name, field in flags.items():
        value = getattr(args, name)
        low = field.metadata["low"]
        high = field.metadata["high"]
        if low is not None and not low <= value <= high:
            limits = f"from {low} to {high}" if math.isfinite(high) else f"at least {low}"
            parser.error(f"{option(name)} {value}: must be {limits}")
    if not args.out:
        dataset = Path(args.dataset).resolve().stem
        args.out = f"runs/{Path(args.script).stem}-{dataset}-seed{args.seed}"
    launcher = f"torchrun --nproc-per-node {WORLD}" if WORLD > 1 else "python"
    args.command = " ".join([args.command or f"{launcher} {args.script}", *map(shlex.quote, argv)])
    return args


def run(Args=Args, doc=__doc__, shapes=SHAPES, main=main, **parts):
    """The command line: bad input is one line, and exit code 2. A relative hands over what differs:
    parts such as Model and training_step, or a main of its own."""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has no encoding, a closed one is None
        sys.stdout.reconfigure(errors="replace")  # for consoles that cannot show every file name
    try:
        main(parse_args(None, Args, doc, shapes), **parts)
    except UserError as error:
        print(f"{Args.script}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, BrokenPipeError) as end:  # Ctrl-C, or a `| head` that is done
        if isinstance(end, BrokenPipeError):
            sys.stdout = None  # or Python complains of the closed pipe when it ends
        sys.exit("stopped; --resume with the run folder goes on from the last whole epoch")


if __name__ == "__main__":
    run()
