"""CLIP: of all captions in a batch, a picture shall pick out its own, and a caption its own picture.

An image encoder and a text encoder each end in a linear map to one space. In a batch of N pictures with a caption
each, the N x N cosines between all pictures and all captions are the logits of 2N classifications, whose right answers
lie on the diagonal. Afterwards a caption is a classifier: any set of labels becomes one by writing it into prompts.

    Radford, Kim, Hallacy, Ramesh, Goh, Agarwal, Sastry, Askell, Mishkin, Clark, Krueger, Sutskever: Learning
    Transferable Visual Models From Natural Language Supervision, ICML 2021. The lecture's InfoNCE, both ways:

    s(i, j) = exp(a) x_i . y_j / (|x_i| |y_j|)       x pictures, y captions; a is learned, exp(a) = 1 / temperature
    L = -1/2N sum_i [ log( exp s(i, i) / sum_j exp s(i, j) ) + log( exp s(i, i) / sum_j exp s(j, i) ) ]

    python clip.py                                            shapes drawn by code, on two CPU cores
    python clip.py --dataset path/to/flickr8k                 pictures with captions.csv, see README.md; on a GPU
    python clip.py --dataset path/to/flickr8k --encoder small    the same on two CPU cores
    python clip.py --resume RUN --query "a red star"          the test pictures that fit a sentence best
    python clip.py --resume RUN --caption PICTURE             the captions that fit a picture of your own best
    python clip.py --resume --zero-shot-classes star,moon     pictures sorted into classes that are only named

Measured on test, on two CPU cores (2026-11-26, torch 2.14.1; records in results/):

    shapes      zero-shot 99.0, 98.7, 99.6 %, on pairs of kind and colour that training never shows 91.9, 93.1, 97.1 %;
                linear probe 38.8 -> 98.2 %, 37.6 -> 99.5 %, 39.4 -> 99.4 %, with seeds 0, 1, 2; 68 to 78 s
    Flickr8k    --encoder small, a caption finds its picture in 3.4 % first, in 18.9 % among ten of 1,000; 7 minutes
"""

import argparse
import copy
import dataclasses
import json
import math
import re
import shlex
import statistics
import sys
import textwrap
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw
from torch import nn

import common
from common import UserError

METHOD = "clip"

# === Arguments ======================================================================================================


def flag(default, text, low=None, high=math.inf, choices=None, free=False):
    """A field of Args: default, help, range of a number (ends included), and whether --resume may come with another."""
    bounds = "" if low is None else f"at least {low}" if high == math.inf else f"from {low} to {high}"
    metadata = dict(text=text, low=low, high=high, choices=choices, free=free, bounds=bounds)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class Args:
    dataset: str = flag("shapes", "shapes, or a path: a folder of pictures with captions.csv or captions.txt")
    data_dir: str = flag("data", "folder where downloads and decoded pictures are kept", free=True)
    image_size: int = flag(128, "pixels a side, of a folder's pictures; paper: 224", 8, 512)
    encoder: str = flag(
        "resnet18", "of images; paper: resnet50 and ViT", choices=("small", "resnet18", "resnet34", "resnet50")
    )
    text_width: int = flag(256, "of the text transformer, which has a head for 32 of it; paper: 512", 32)
    text_layers: int = flag(4, "blocks of the text transformer; paper: 12", 1)
    context: int = flag(32, "words of a caption that are read, start and end included; paper: 77 word pieces", 3)
    min_count: int = flag(2, "captions' words that are rarer in training are one and the same unknown word", 1)
    embed_dim: int = flag(256, "size of the space of images and texts; paper: 512 to 1024", 1)
    epochs: int = flag(100, "passes over the training pictures, each with one of its captions; paper: 32", 1)
    batch_size: int = flag(128, "pairs N a step; paper: 32768", 2)
    lr: float = flag(1e-3, "peak learning rate of AdamW; paper: 5e-4", 0)
    weight_decay: float = flag(0.2, "of weight matrices, neither of norms nor of biases; paper: 0.2", 0)
    warmup: float = flag(0.05, "share of the steps in which the learning rate rises; paper: 2000 steps", 0, 0.9)
    dropout: float = flag(0.1, "in the text transformer; paper: none", 0, 0.9)
    crop: float = flag(0.5, "smallest share of a picture that is shown; paper: a random square of it", 0.01, 1)
    zero_shot: str = flag(
        "", "labelled data to measure probes and zero-shot on, such as cifar10, in place of --dataset", free=True
    )
    zero_shot_classes: str = flag(
        "", "names with commas: sort the test pictures into these classes, too; names an .npz file's", free=True
    )
    query: str = flag("", "train nothing; save the test pictures of a run that fit this sentence best", free=True)
    caption: str = flag("", "train nothing; rank the test captions for this picture file", free=True)
    labels: list = flag((), "probe with few labels too: shares of each class up to 1, or numbers a class", 0, free=True)
    fine_tune: bool = flag(False, "with these labels, also fine-tune, and train from scratch", free=True)
    eval_every: int = flag(10, "epochs between two measurements on validation pictures", 1, free=True)
    seed: int = flag(0, "fixes initial weights, batches, augmentations and the choice of labels", 0, 2**31)
    device: str = flag("auto", "auto: cuda, else mps, else cpu", free=True)
    compile: bool = flag(None, "torch.compile for network and augmentations; without the flag on cuda alone", free=True)
    out: str = flag("auto", "run folder; auto: runs/<method>-<dataset>-seed<seed>", free=True)
    resume: str = flag("", "go on from the last checkpoint of --out, or of the run folder named here", free=True)


# What differs from the defaults above, by data set; the recipes for two CPU cores are chosen by one flag.
SMALL = dict(image_size=64, text_width=128, text_layers=2, embed_dim=128, batch_size=64, dropout=0.0, epochs=30)
RECIPES = {
    "shapes": SMALL | dict(encoder="small", context=24, min_count=1, epochs=16, crop=0.8, eval_every=4),
    "path": dict(),
    "path --encoder small": SMALL,
}  # fmt: skip


def parse_args(argv=None):
    """The command line over the recipe of its data set -> Args.

    Raises UserError for an unknown flag and for a value that is out of its range.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False, allow_abbrev=False
    )

    def error(message):
        raise UserError(message)

    parser.error = error
    for field in dataclasses.fields(Args):
        text, bounds = field.metadata["text"], field.metadata["bounds"]
        if field.type is bool:
            options = {"action": argparse.BooleanOptionalAction, "help": text}
        else:
            options = {"nargs": "+", "type": float} if field.type is list else {"type": field.type}
            default = f" (%(default)s{bounds and ', '}{bounds})" if field.default != "" else ""
            options |= {"choices": field.metadata["choices"], "help": text + default}
        if field.name == "resume":
            options |= {"nargs": "?", "const": "auto", "metavar": "RUN"}
        parser.add_argument("--" + field.name.replace("_", "-"), default=field.default, **options)
    given, _ = parser.parse_known_args(argv)
    recipe = given.dataset if given.dataset in RECIPES else "path"
    if given.encoder == "small" and recipe != "shapes":
        recipe += " --encoder small"
    parser.set_defaults(**RECIPES[recipe])
    parser.add_argument("-h", "--help", action="help", help="show this help, with the recipe of --dataset in brackets")
    args = Args(**vars(parser.parse_args(argv)))
    for field in dataclasses.fields(Args):
        value, bounds = getattr(args, field.name), field.metadata["bounds"]
        for number in (value if field.type is list else [value]) if bounds else ():
            if not (field.metadata["low"] <= number <= field.metadata["high"] and math.isfinite(number)):
                raise UserError(f"--{field.name.replace('_', '-')} {number}: must be {bounds}")
    if args.resume not in ("", "auto"):
        args.out = args.resume
    if args.out == "auto":
        args.out = f"runs/{METHOD}-{Path(args.dataset).resolve().stem}-seed{args.seed}"
    return args


# === Views ==========================================================================================================


def one_view(images, args, generator):
    """uint8 (N, 3, S, S) -> float (N, 3, S, S) in [0, 1]: a random crop and a flip, and no change of colours, which
    captions name. The paper has the crop alone."""
    return common.random_resized_crop(images / 255, images.shape[3], generator, scale=(args.crop, 1.0))


def two_views(images, args, generator):
    """uint8 (N, 3, S, S) -> float (2N, 3, S, S): for fine-tuning, one view of each picture and then another one."""
    return one_view(images.repeat(2, 1, 1, 1), args, generator)


def network_input(x):
    """Images in [0, 1] as an encoder takes them: normalised, and in the layout that convolutions like best."""
    return common.normalize(x).contiguous(memory_format=torch.channels_last)


def drawn_captions(tokens, counts, generator):
    """Of the captions of each of N pictures, (N, C, T) of which the first counts (N,) are there, one: (N, T)."""
    draw = (common.uniform(0, 1, counts.shape, generator) * counts).long()
    return tokens[torch.arange(len(tokens), device=tokens.device), draw]


# === Model ==========================================================================================================


class Tokenizer:
    """Lower-cased words <-> numbers; the vocabulary is that of the training captions, the most frequent words first.

    0 is padding, 1 starts a text, 2 ends it, and 3 is every word that is not in the vocabulary. The paper has 49,152
    pieces of words, which need no unknown one.
    """

    PADDING, START, END, UNKNOWN = range(4)

    def __init__(self, captions, context, min_count=1):
        """captions: a list of them for each picture."""
        counts = Counter(word for texts in captions for text in texts for word in self.split(text))
        words = sorted((w for w, count in counts.items() if count >= min_count), key=lambda w: (-counts[w], w))
        self.load_state_dict({"words": words, "context": context})

    def split(self, text):
        return re.findall(r"\w+", text.lower())

    def __len__(self):
        return 4 + len(self.words)

    def __call__(self, texts):
        """Texts -> int64 (N, context). What is too long loses its last words, but not its end."""
        tokens = torch.full((len(texts), self.context), self.PADDING)
        for row, text in zip(tokens, texts, strict=True):
            words = [self.numbers.get(word, self.UNKNOWN) for word in self.split(text)][: self.context - 2]
            row[: len(words) + 2] = torch.tensor([self.START, *words, self.END])
        return tokens

    def state_dict(self):
        return {"words": self.words, "context": self.context}

    def load_state_dict(self, state):
        self.words, self.context = state["words"], state["context"]
        self.numbers = {word: number for number, word in enumerate(self.words, 4)}


def build_encoder(name, image_size=32, norm_layer=nn.BatchNorm2d):
    """torchvision's ResNet without its classifier, (B, 3, S, S) -> (B, D), and D.

    small: one basic block in each of the first two stages, D = 128. For pictures of up to 64 pixels the others have a
    3x3 convolution for a stem and no max pool (SimCLR, appendix B.9), since ResNet's own leaves 8 x 8 of 32 x 32
    pixels; D = 512, or 2048 for resnet50.
    """
    if name == "small":
        encoder = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], norm_layer=norm_layer)
        encoder.layer3 = encoder.layer4 = nn.Identity()
        D = 128
    else:
        encoder = getattr(torchvision.models, name)(norm_layer=norm_layer)
        D = encoder.fc.in_features
        if image_size <= 64:
            encoder.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
            nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
            encoder.maxpool = nn.Identity()
    encoder.fc = nn.Identity()
    return encoder, D


class TextEncoder(nn.Module):
    """A transformer with causal attention, read at the end of the text: tokens (B, T) -> (B, width).

    Through the mask a word sees none that follow, so that padding, which is behind the end, cannot matter.
    """

    def __init__(self, vocabulary, context, width, layers, dropout):
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.empty(context, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, width // 32, 4 * width, dropout, F.gelu, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context), persistent=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)  # as in the authors' code
        nn.init.normal_(self.positions, std=0.01)

    def forward(self, tokens):
        x = self.token_embedding(tokens) + self.positions  # (B, T, width)
        for block in self.blocks:
            x = block(x, src_mask=self.mask, is_causal=True)
        end = (tokens == Tokenizer.END).int().argmax(1)  # (B,)
        return self.norm(x[torch.arange(len(x), device=x.device), end])


class CLIP(nn.Module):
    """Image and text encoder, each with a linear map to the common space, and the learned scale of the logits.

    The image encoder is torchvision's ResNet with its average pool; the paper's pools by attention.
    """

    def __init__(self, args, vocabulary, image_size=32):
        super().__init__()
        self.encoder, D = build_encoder(args.encoder, image_size)
        self.text_encoder = TextEncoder(vocabulary, args.context, args.text_width, args.text_layers, args.dropout)
        self.image_projection = nn.Linear(D, args.embed_dim, bias=False)
        self.text_projection = nn.Linear(args.text_width, args.embed_dim, bias=False)
        self.log_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))  # a of the formula above

    def forward(self, images, tokens):
        """(B, 3, S, S), (B, T) -> image and text features (B, embed_dim) of any length."""
        return self.image_projection(self.encoder(images)), self.text_projection(self.text_encoder(tokens))


# === Loss ===========================================================================================================


def clip_loss(image_features, text_features, logit_scale):
    """Symmetric InfoNCE: the lecture's loss over the N x N matrix of a batch, figure 3 of the paper.

    image_features, text_features (N, D), of any length: row i of both is a pair. logit_scale: exp(a), the factor on the
    cosines itself -> scalar, in nats; log N where all pairs look the same.

    Every other caption of the batch is a negative, one with the same words too, as in the paper. Of a picture with
    several captions a batch holds one, so that none of its own is ever among its negatives.
    """
    images, texts = F.normalize(image_features, dim=1), F.normalize(text_features, dim=1)
    logits = logit_scale * images @ texts.T  # (N, N)
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


# === Pretrain =======================================================================================================


def autocast(device):
    """bfloat16 for the network on a GPU; losses and the state of the optimizer stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def warmup_cosine(step, steps, warmup):
    """The factor on the learning rate: a linear rise over the share `warmup` of the steps, then half a cosine to 0."""
    rise = warmup * steps
    return (step + 1) / (rise + 1) if step < rise else 0.5 + 0.5 * math.cos(math.pi * (step - rise) / (steps - rise))


def adamw(model, args, steps):
    """AdamW that decays matrices and kernels alone, norms and biases having one dimension; and its learning rate."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, args.lr, weight_decay=args.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, steps, args.warmup))
    return optimizer, schedule


def tokenize(tokenizer, captions, device):
    """Captions, a list of texts for each of M pictures -> tokens (M, C, T), of which counts (M,) are there."""
    counts = torch.tensor([len(texts) for texts in captions], device=device)
    tokens = torch.zeros(len(captions), int(counts.max()), tokenizer.context, dtype=torch.int64, device=device)
    there = torch.arange(tokens.shape[1], device=device) < counts[:, None]  # (M, C)
    tokens[there] = tokenizer([text for texts in captions for text in texts]).to(device)
    return tokens, counts


def pretrain(model, tokenizer, images, captions, args, run, monitor):
    """On pairs: images uint8 (M, 3, S, S), captions a list of texts for each. monitor() -> metrics."""
    device, N = next(model.parameters()).device, args.batch_size
    tokens, counts = tokenize(tokenizer, captions, device)  # (M, C, T), (M,)
    steps = len(images) // N  # an epoch leaves out an incomplete last batch
    optimizer, schedule = adamw(model, args, args.epochs * steps)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "tokenizer": tokenizer}
    generator = torch.Generator(device)
    for epoch in range(run.restore(parts) + 1, args.epochs + 1):
        start = time.perf_counter()
        model.train()
        torch.manual_seed(args.seed * 100_000 + epoch)  # of dropout
        generator.manual_seed(args.seed * 100_000 + epoch)  # an epoch's draws depend on nothing before it
        order = torch.randperm(len(images), generator=generator, device=device)
        losses = torch.zeros(steps, device=device)
        for step, batch in enumerate(common.batches(images, order, N, device)):  # (N, 3, S, S)
            rows = order[step * N : (step + 1) * N]
            text = drawn_captions(tokens[rows], counts[rows], generator)  # (N, T)
            x = network_input(one_view(batch, args, generator))  # (N, 3, S, S)
            with autocast(device):
                image_features, text_features = model(x, text)  # (N, embed_dim) each
            loss = clip_loss(image_features.float(), text_features.float(), model.log_scale.exp())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.log_scale.clamp_(max=math.log(100))  # paper, section 2.5: against instability
            losses[step] = loss.detach()
            run.foresee(step, losses)
        loss = run.mean_loss(losses, epoch)  # the one wait for the device in an epoch
        seconds = time.perf_counter() - start
        metrics = {"loss": loss, "bound": math.log(N) - loss, "logit_scale": model.log_scale.exp().item()}
        metrics |= {"images_per_second": steps * N / seconds}
        if epoch % args.eval_every == 0 or epoch == args.epochs:
            metrics |= monitor()
        run.log(epoch, metrics | {"seconds": seconds})
        run.save(epoch, parts)


class Run:
    """The folder of a run: args.json, metrics.jsonl, checkpoint.pt and summary.json; and progress on the screen."""

    def __init__(self, args):
        """Reads the checkpoint to go on from, if any. Raises UserError where it does not fit, or would be lost."""
        self.args, self.folder, self.history, self.ticks, self.state = args, Path(args.out), [], [], None
        path = self.folder / "checkpoint.pt"
        if path.exists() and not args.resume:
            raise UserError(f"--out {self.folder}: holds a run already; go on with --resume, or name another folder")
        if path.exists():
            try:
                self.state = torch.load(path, map_location="cpu", weights_only=True)
                method, before, self.history = (self.state[key] for key in ("method", "args", "history"))
            except Exception:  # a file that is torn or something else fails in many ways
                raise UserError(f"{path}: not a checkpoint that can be read") from None
            if method != METHOD:
                raise UserError(f"{path}: is of {method}, not of {METHOD}")
            for field in dataclasses.fields(args):
                was, now = before.get(field.name), getattr(args, field.name)
                if was != now and not field.metadata["free"]:
                    raise UserError(f"{path}: was made with --{field.name.replace('_', '-')} {was}, not {now}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.write("args.json", json.dumps(dataclasses.asdict(args), indent=2) + "\n")
            self.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.history))
        except OSError as error:
            raise UserError(f"--out {self.folder}: cannot be written ({error.strerror})") from None

    def write(self, name, content):
        """Text, or what torch.save takes; under a temporary name first, so that no file is ever half there."""
        temporary = self.folder / f"{name}.partial"
        temporary.write_text(content) if isinstance(content, str) else torch.save(content, temporary)
        temporary.replace(self.folder / name)

    def restore(self, parts):
        """Puts the checkpoint into the parts -> the epochs it has behind it. Without one, the start becomes one."""
        if self.state is None:
            self.save(0, parts)
            return 0
        for name, part in parts.items():
            part.load_state_dict(self.state[name])
        return self.state["epoch"]

    def save(self, epoch, parts):
        """The checkpoint: tensors and plain values only, so that it loads with weights_only=True."""
        state = {"method": METHOD, "args": dataclasses.asdict(self.args), "epoch": epoch, "history": self.history}
        self.write("checkpoint.pt", state | {name: part.state_dict() for name, part in parts.items()})

    def foresee(self, step, losses):
        """Says early how long pretraining will take, from the ten steps between two of the first ones."""
        if step in (10, 20) and len(self.ticks) < 2:
            losses[step].item()  # waits for the device
            self.ticks.append(time.perf_counter())
            if step == 20:
                epochs = self.args.epochs - len(self.history)
                minutes = (self.ticks[1] - self.ticks[0]) / 10 * len(losses) * epochs / 60
                print(f"pretraining will take about {minutes:.1f} minutes", flush=True)

    def mean_loss(self, losses, epoch):
        """losses (steps,) of an epoch -> their mean. Raises UserError if one of them is not finite."""
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            step = (epoch - 1) * len(losses) + bad[0].item() + 1
            raise UserError(
                f"the loss is not finite at step {step}, in epoch {epoch}: try a smaller --lr in another --out; "
                f"{self.folder / 'checkpoint.pt'} is that of epoch {epoch - 1}"
            )
        return losses.mean().item()

    def log(self, epoch, metrics):
        """A line of metrics.jsonl, and a shorter one on the screen."""
        self.history.append({"epoch": epoch} | metrics)
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(self.history[-1]) + "\n")
        left = sum(line["seconds"] for line in self.history) / epoch * (self.args.epochs - epoch)
        minutes, seconds = divmod(round(left), 60)
        shown = {k: v for k, v in metrics.items() if isinstance(v, float) and k != "seconds"}
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        print(f"epoch {epoch}/{self.args.epochs}  {minutes}:{seconds:02} left  {numbers}", flush=True)

    def finish(self, start, device, encoder, results):
        """summary.json from results = {name: numbers or rows of them} and what every run has to say -> its content."""
        summary = {
            "method": METHOD,
            "command": shlex.join(["python", *sys.argv]),
            "date": time.strftime("%Y-%m-%d"),
            "dataset": self.args.dataset,
            "seed": self.args.seed,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "epochs": self.args.epochs,
            "resumed_at_epoch": self.state["epoch"] if self.state else 0,
            "parameters": sum(p.numel() for p in encoder.parameters()),
            "images_per_second": statistics.median(line["images_per_second"] for line in self.history),
            "peak_memory_gb": peak_memory_gb(device),
            "pretrain_seconds": sum(line["seconds"] for line in self.history),
            "total_seconds": time.perf_counter() - start,
            **results,
            "history": self.history,
        }
        self.write("encoder.pt", encoder.state_dict())
        self.write("summary.json", json.dumps(summary, indent=2) + "\n")
        print(f"{summary['total_seconds']:.0f} s in all; summary.json, encoder.pt and pictures are in {self.folder}")
        return summary


# === Evaluate =======================================================================================================


@torch.no_grad()
def features(encoder, images):
    """Whole pictures through the frozen encoder: uint8 (M, 3, S, S) -> float32 (M, D)."""
    device = next(encoder.eval().parameters()).device
    with autocast(device):
        return torch.cat([encoder(network_input(x.to(device) / 255)).float() for x in images.split(512)])


def knn_accuracy(bank, bank_labels, queries, labels, k=200, temperature=0.1):
    """Weighted nearest neighbours (Wu et al. 2018, InstDisc): features (M, D), (Q, D) -> accuracy in [0, 1].

    The k pictures of the bank of highest cosine s with a query vote for their class, each with exp(s / temperature).
    """
    bank, queries, correct = F.normalize(bank, dim=1), F.normalize(queries, dim=1), 0
    classes = int(bank_labels.max()) + 1
    for query, label in zip(queries.split(1024), labels.split(1024), strict=True):
        s, nearest = (query @ bank.T).topk(min(k, len(bank)))  # (B, k)
        votes = torch.zeros(len(query), classes, device=bank.device)
        votes.scatter_add_(1, bank_labels[nearest], (s / temperature).exp())
        correct += (votes.argmax(1) == label).sum().item()
    return correct / len(labels)


def linear_probe(train, train_labels, test, test_labels):
    """Logistic regression on frozen features (M, D), as in CLIP's appendix A.3 -> accuracy on test in [0, 1].

    Features are standardised; of six L2 strengths the one counts that is best on a tenth of the training labels,
    held out; then all of them are fitted.
    """
    mean, std = train.mean(0), train.std(0)
    train, test = ((x - mean) / (std + 1e-5) for x in (train, test))
    classes = int(train_labels.max()) + 1

    def fit(layer, x, y, l2):
        """Minimises cross-entropy + l2 |weights|^2 from where the layer stands; the problem is convex."""
        optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=300, line_search_fn="strong_wolfe")

        def objective():
            optimizer.zero_grad()
            loss = F.cross_entropy(layer(x), y) + l2 * layer.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(objective)

    def accuracy(layer, x, y):
        return (layer(x).argmax(1) == y).sum().item() / len(y)

    held = torch.arange(len(train), device=train.device) % 10 == 0
    layer, best, strength = nn.Linear(train.shape[1], classes, device=train.device), -1.0, None
    nn.init.zeros_(layer.weight)
    for l2 in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6):  # from strong to weak, each from the solution of the one before
        fit(layer, train[~held], train_labels[~held], l2)
        score = accuracy(layer, train[held], train_labels[held])
        if score > best:
            best, strength = score, l2
    fit(layer, train, train_labels, strength)
    return accuracy(layer, test, test_labels)


def probes(train, train_labels, test, test_labels):
    """Features (M, D), (Q, D) and labels -> accuracies on test."""
    return {
        "knn": knn_accuracy(train, train_labels, test, test_labels),
        "linear_probe": linear_probe(train, train_labels, test, test_labels),
    }


PROMPT = "a photo of a {}"  # the lecture's
ENSEMBLE = (
    PROMPT,
    "a photo of the {}",
    "a {}",
    "the {}",
    "there is a {}",
    "a large {}",
    "a small {}",
    "a {} in the background",
)


@torch.no_grad()
def encode_images(model, images):
    """uint8 (M, 3, S, S) -> h (M, D) of the encoder, and features (M, embed_dim) of length 1."""
    h = features(model.encoder, images)
    return h, F.normalize(model.image_projection(h), dim=1)


@torch.no_grad()
def encode_texts(model, tokenizer, texts):
    """Texts -> features (K, embed_dim) of length 1."""
    device = model.log_scale.device
    encoder = model.text_encoder.eval()
    with autocast(device):
        y = [model.text_projection(encoder(tokens.to(device))).float() for tokens in tokenizer(texts).split(1024)]
    return F.normalize(torch.cat(y), dim=1)


def class_features(model, tokenizer, names, prompts):
    """A classifier from names: the mean over the prompts of the features of each, (K, embed_dim) of length 1."""
    y = encode_texts(model, tokenizer, [prompt.format(name) for name in names for prompt in prompts])
    return F.normalize(y.view(len(names), len(prompts), -1).mean(1), dim=1)


def recall(scores, relevant):
    """scores, relevant (Q, K) of K candidates for Q queries -> the share of queries that have one of their relevant
    candidates among the best 1, 5 and 10.

    Of candidates with equal scores the wrong ones count as the better, so that a model that tells nothing apart gets
    nothing.
    """
    best = scores.masked_fill(~relevant, -math.inf).amax(1, keepdim=True)
    ahead = ((scores >= best) & ~relevant).sum(1)  # (Q,), of the first relevant candidate
    return {k: (ahead < k).sum().item() / len(ahead) for k in (1, 5, 10)}


def retrieval(model, tokenizer, images, captions):
    """Both ways between pictures, uint8 (M, 3, S, S), and all their captions, a list for each -> recalls.

    The protocol of Hodosh et al. 2013 and all since: a picture has found a caption if it is one of its own, about
    five; a caption has one picture to find.
    """
    _, x = encode_images(model, images)
    y = encode_texts(model, tokenizer, [text for texts in captions for text in texts])
    owner = torch.tensor([i for i, texts in enumerate(captions) for _ in texts], device=x.device)  # (K,)
    scores, relevant = x @ y.T, torch.arange(len(x), device=x.device)[:, None] == owner  # (M, K)
    both = {"text_to_image": recall(scores.T, relevant.T), "image_to_text": recall(scores, relevant)}
    return {f"{way}_r{k}": value for way, recalls in both.items() for k, value in recalls.items()}


def few_shot(h, data, zero_shot, seed):
    """Figure 6 of the paper, the lecture's: probes with 1 to 16 labels of each class, mean of three draws of them,
    against zero-shot accuracy. h: features of train and test, (M, D) and (Q, D) -> rows of a table."""
    y, table = data.train_labels, []
    fewest = min(count for count in y.bincount().tolist() if count)
    for n in (1, 2, 4, 8, 16):
        if n <= fewest:
            draws = [common.labelled_rows(y, n, seed + draw) for draw in range(3)]
            accuracies = [linear_probe(h[0][rows], y[rows], h[1], data.test_labels) for rows in draws]
            table.append({"labels_per_class": n, "linear_probe": statistics.mean(accuracies), "zero_shot": zero_shot})
    return table


def unseen_pairs(labels, colors):
    """Of the shapes, those in a colour that their kind never has in training: arrows in red, bowls in orange, ..."""
    return labels == colors


def hold_out(data):
    """Shapes -> the same with the pairs that stay unseen moved from the training to the validation pictures."""
    unseen = unseen_pairs(data.train_labels, data.train_colors)
    seen, unseen = (~unseen).nonzero()[:, 0], unseen.nonzero()[:, 0]
    return dataclasses.replace(
        data,
        train_images=data.train_images[seen],
        train_labels=data.train_labels[seen],
        train_captions=[data.train_captions[i] for i in seen.tolist()],
        val_images=data.train_images[unseen],
        val_captions=[data.train_captions[i] for i in unseen.tolist()],
        train_colors=data.train_colors[seen],
    )


def resized(data, S):
    """Labelled data with pictures of S x S, the size that a model was trained at."""

    def resize(images):
        parts = (F.interpolate(x.float(), S, mode="bicubic", antialias=True) for x in images.split(1000))
        return torch.cat([x.round().clamp(0, 255).byte() for x in parts])

    sizes = {"train_images": resize(data.train_images), "test_images": resize(data.test_images)}
    return dataclasses.replace(data, **sizes, test_colors=None)  # no pair of shapes is unseen by another data set


def evaluate(model, tokenizer, data):
    """Probes of the image encoder and zero-shot on labelled data -> accuracies on test; h of train and test."""
    y, test_y = data.train_labels, data.test_labels
    h = features(model.encoder, data.train_images[: len(y)])
    test_h, x = encode_images(model, data.test_images)
    accuracies = probes(h, y, test_h, test_y)
    for name, prompts in (("zero_shot", [PROMPT]), ("zero_shot_ensemble", ENSEMBLE)):
        right = (x @ class_features(model, tokenizer, data.classes, prompts).T).argmax(1) == test_y
        accuracies[name] = right.sum().item() / len(right)
        if data.test_colors is not None:
            right = right[unseen_pairs(test_y, data.test_colors)]
            accuracies[f"{name}_unseen"] = right.sum().item() / len(right)
    return accuracies, (h, test_h)


def fine_tune(encoder, D, data, rows, args):
    """Trains a copy of the encoder, and a linear classifier on it, with the labels of some rows -> accuracy on test.

    Views and optimizer are those of pretraining (paper, appendix B.5: crops and flips alone, SGD); 30 passes, or 500
    steps where these are more. From an untrained encoder this is supervised learning from scratch.
    """
    device, N = data.train_labels.device, min(args.batch_size, len(rows))
    passes = max(30, math.ceil(500 / (len(rows) // N)))
    torch.manual_seed(args.seed)
    model = nn.Sequential(copy.deepcopy(encoder), nn.Linear(D, len(data.classes), device=device)).train()
    optimizer, schedule = adamw(model, args, passes * (len(rows) // N))
    generator = torch.Generator(device).manual_seed(args.seed)
    for _ in range(passes):
        order = rows[torch.randperm(len(rows), generator=generator, device=device)]
        for index, batch in zip(order.split(N), common.batches(data.train_images, order, N, device), strict=False):
            x = network_input(two_views(batch, args, generator))  # (2N, 3, S, S)
            with autocast(device):
                logits = model(x)  # (2N, classes)
            loss = F.cross_entropy(logits.float(), data.train_labels[index].repeat(2))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return (features(model, data.test_images).argmax(1) == data.test_labels).sum().item() / len(data.test_labels)


def semi_supervised(scratch, encoder, data, h, rows, args):
    """A line of the lecture's semi-supervised table: the frozen encoder with the labels of some rows and, for
    --fine-tune, all of it trained with them, against the same network from scratch. h: features of train and test."""
    accuracies = {"labels": len(rows)} | probes(h[0][rows], data.train_labels[rows], h[1], data.test_labels)
    if args.fine_tune:
        print(f"fine-tuning on {len(rows)} labels, and training from scratch", flush=True)
        accuracies["fine_tuned"] = fine_tune(encoder, h[0].shape[1], data, rows, args)
        accuracies["from_scratch"] = fine_tune(scratch, h[0].shape[1], data, rows, args)
    return accuracies


# === Pictures =======================================================================================================


def save_sheet(path, blocks):
    """Blocks of images, float (rows, columns, 3, S, S) in [0, 1], side by side, each under its title."""
    S, tiles = blocks[0][1].shape[4], []
    zoom = max(1, round(64 / S))
    for _, images in blocks:
        grid = torchvision.utils.make_grid(images.flatten(0, 1).cpu(), images.shape[1], padding=1, pad_value=1.0)
        tile = Image.fromarray((255 * grid).round().byte().permute(1, 2, 0).numpy())
        tiles.append(tile.resize((zoom * tile.width, zoom * tile.height), Image.Resampling.NEAREST))
    gap, head = 16, 24
    page = Image.new("RGB", (sum(tile.width + gap for tile in tiles) + gap, tiles[0].height + head + gap), "white")
    left = gap
    for (title, _), tile in zip(blocks, tiles, strict=True):
        ImageDraw.Draw(page).text((left + zoom, 6), title, fill="black", font_size=13)
        page.paste(tile, (left, head))
        left += tile.width + gap
    page.save(path)


def save_neighbours(path, data, before, after, count=6):
    """neighbours.png: a test picture of each of ten classes, and the training pictures nearest to it in h.

    before, after: h of the train and the test pictures. Green frames are of the same class, red ones are not.
    """
    queries = torch.stack([(data.test_labels == k).nonzero()[0, 0] for k in data.test_labels.unique()[:10]])
    frames = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.7, 0.2], [1.0, 1.0, 1.0]])  # red, green, white

    def framed(images, rows, frame):  # rows and numbers of frames (R, C) -> (R, C, 3, S + 4, S + 4)
        x = F.pad(images[rows.flatten().to(images.device)].cpu() / 255, (2, 2, 2, 2), value=-1)
        return torch.where(x < 0, frames[frame.flatten().cpu()][:, :, None, None], x).unflatten(0, rows.shape)

    blocks = [("test picture", framed(data.test_images, queries[:, None], torch.full_like(queries, 2)))]
    for title, (train, test) in (("nearest before training", before), ("nearest after training", after)):
        s = F.normalize(test[queries], dim=1) @ F.normalize(train, dim=1).T  # (10, M)
        nearest = s.topk(min(count, len(train))).indices  # (10, count)
        same = data.train_labels[nearest] == data.test_labels[queries, None]
        blocks.append((title, framed(data.train_images, nearest, same.long())))
    save_sheet(path, blocks)


def tile(image, size=64):
    """float (3, S, S) in [0, 1] -> a PIL picture of size x size."""
    picture = Image.fromarray((255 * image.cpu()).round().byte().permute(1, 2, 0).numpy())
    return picture.resize((size, size), Image.Resampling.LANCZOS if image.shape[2] > size else Image.Resampling.NEAREST)


def save_similarity(path, images, captions, cosines):
    """similarity.png, the lecture's matrix: pictures float (n, 3, S, S), a caption of each, cosines (n, n)."""
    n, cell, left, head = len(images), 64, 420, 84
    page = Image.new("RGB", (left + n * cell + 16, head + n * cell + 16), "white")
    draw, low, high = ImageDraw.Draw(page), cosines.min(), cosines.max()
    for i in range(n):
        page.paste(tile(images[i]), (left + i * cell, 12))
        text = "\n".join(textwrap.wrap(captions[i], 56)[:3])
        draw.text((left - 8, head + (i + 0.5) * cell), text, "black", anchor="rm", align="right", font_size=14)
        for j in range(n):  # caption i, picture j
            x, y, s = left + j * cell, head + i * cell, ((cosines[j, i] - low) / (high - low).clamp(min=1e-6)).item()
            color = tuple(round(255 + s * (c - 255)) for c in (33, 102, 172))
            frame = "black" if i == j else color
            draw.rectangle((x + 1, y + 1, x + cell - 2, y + cell - 2), fill=color, outline=frame, width=2)
            draw.text((x + cell / 2, y + cell / 2), f"{cosines[j, i]:.2f}", "white" if s > 0.6 else "black",
                      anchor="mm", font_size=14)  # fmt: skip
    page.save(path)


def save_matches(path, texts, pictures, right=None):
    """Each text above a row of pictures, float (R, C, 3, S, S); right (R, C): those to be framed in green."""
    R, C, size, head = *pictures.shape[:2], 96, 24
    page = Image.new("RGB", (C * (size + 8) + 8, R * (size + head + 12) + 8), "white")
    for i in range(R):
        top = i * (size + head + 12) + 8
        ImageDraw.Draw(page).text((8, top), textwrap.shorten(texts[i], C * 15), "black", font_size=13)
        for j in range(C):
            x, y = 8 + j * (size + 8), top + head
            if right is not None and right[i, j]:
                page.paste((26, 160, 60), (x - 3, y - 3, x + size + 3, y + size + 3))
            page.paste(tile(pictures[i, j], size), (x, y))
    page.save(path)


def save_examples(folder, model, tokenizer, images, captions):
    """similarity.png and retrieval.png of test pictures, uint8 (M, 3, S, S), with a list of captions each."""
    rows = torch.linspace(0, len(images) - 1, min(8, len(images))).long()  # spread over the split
    texts = [max(captions[i], key=len) for i in rows]  # the most detailed one
    _, x = encode_images(model, images)
    y = encode_texts(model, tokenizer, texts)
    chosen = images[rows.to(images.device)] / 255
    save_similarity(folder / "similarity.png", chosen, texts, x[rows.to(x.device)] @ y.T)
    nearest = (y @ x.T).topk(min(8, len(x))).indices.cpu()  # (8, 8)
    save_matches(folder / "retrieval.png", texts, images[nearest.to(images.device)] / 255, nearest == rows[:, None])


def name_classes(run, model, tokenizer, data, names):
    """classes.png: for each class that is only named, the test pictures that are most surely of it -> a table of how
    many are, with the share of its own pictures that are found where all names are classes of the data."""
    _, x = encode_images(model, data.test_images)
    scores = model.log_scale.exp() * x @ class_features(model, tokenizer, names, ENSEMBLE).T
    shares = scores.softmax(1).detach()  # (M, K)
    surest = shares.T.topk(min(8, len(x))).indices  # (K, 8)
    pictures = data.test_images[surest.to(data.test_images.device)] / 255
    save_matches(run.folder / "classes.png", names, pictures)
    answer = shares.argmax(1)
    rows = [{"class": name, "test pictures": (answer == i).sum().item()} for i, name in enumerate(names)]
    if set(names) <= set(data.classes):
        for i, row in enumerate(rows):
            right = answer[data.test_labels == data.classes.index(row["class"])] == i
            row["found"] = right.sum().item() / max(1, len(right))
    print_table(rows)
    return rows


# === Main ===========================================================================================================


def pick_device(name):
    """The device of that name, or the best there is for `auto`. Raises UserError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not available ({str(error).splitlines()[0]})") from None


def peak_memory_gb(device):
    """Of the device, or of the whole process on a CPU; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def print_table(rows):
    """Rows, dicts with the same keys: floats are accuracies."""
    print()
    for row in ({key: key for key in rows[0]}, *rows):
        cells = (f"{v:.1%}" if isinstance(v, float) else str(v) for v in row.values())
        print("".join(f"{cell:>{max(14, len(key) + 2)}}" for cell, key in zip(cells, row, strict=True)))


def ask(args):
    """Questions to a trained model: the test pictures for --query, the test captions for --caption; -> the answers."""
    folder, device = Path(args.out), pick_device(args.device)
    try:
        state = torch.load(folder / "checkpoint.pt", map_location=device, weights_only=True)
        method, before, words, weights = (state[key] for key in ("method", "args", "tokenizer", "model"))
    except FileNotFoundError:
        raise UserError(f"--out {folder}: holds no run to ask; train one first, without these questions") from None
    except Exception:  # a file that is torn or something else fails in many ways
        raise UserError(f"{folder / 'checkpoint.pt'}: not a checkpoint that can be read") from None
    if method != METHOD:
        raise UserError(f"{folder / 'checkpoint.pt'}: is of {method}, not of {METHOD}")
    trained = Args(**before)
    data = common.load_dataset(trained.dataset, args.data_dir, trained.image_size)
    S = data.test_images.shape[3]
    tokenizer = Tokenizer([], trained.context)
    tokenizer.load_state_dict(words)
    model = CLIP(trained, len(tokenizer), S).to(device, memory_format=torch.channels_last)
    model.load_state_dict(weights)
    answers = {}

    def answer(question, title, scores, texts):
        """Prints the best of the texts by their scores, and keeps them -> their numbers."""
        scores, best = scores.topk(min(8, len(texts)))
        answers[question] = [(texts[i], s) for i, s in zip(best.tolist(), scores.tolist(), strict=True)]
        print(title, *(f"{s:7.3f}  {text}" for text, s in answers[question]), sep="\n")
        return best.cpu()

    if args.query:
        _, x = encode_images(model, data.test_images)
        y, texts = encode_texts(model, tokenizer, [args.query]), [texts[0] for texts in data.test_captions]
        title = f"{folder / 'query.png'}: the test pictures that fit {args.query!r} best, by a caption of theirs"
        best = answer("query", title, x @ y[0], texts)
        save_matches(folder / "query.png", [args.query], data.test_images[best][None] / 255)
    if args.caption:
        picture = torch.tensor(common.decode_picture(Path(args.caption), S)).permute(2, 0, 1)[None]
        texts = list(dict.fromkeys(text for texts in data.test_captions for text in texts))
        _, x = encode_images(model, picture)
        scores = encode_texts(model, tokenizer, texts) @ x[0]
        answer("caption", f"the test captions that fit {args.caption} best", scores, texts)
    return answers


def main(args):
    """Loads, measures the untrained encoder, pretrains, measures again -> the content of summary.json."""
    if args.query or args.caption:
        return ask(args)
    start = time.perf_counter()
    device = pick_device(args.device)
    data = common.load_dataset(args.dataset, args.data_dir, args.image_size).to(device)
    if data.train_captions is None:
        raise UserError(f"--dataset {args.dataset}: has no captions; a folder of pictures needs a captions.csv")
    if data.train_colors is not None:
        data = hold_out(data)
    M, _, S, _ = data.train_images.shape
    if args.text_width % 32:
        raise UserError(f"--text-width {args.text_width}: must be a multiple of 32, the width of a head")
    if args.batch_size > M:
        raise UserError(f"--batch-size {args.batch_size}: {args.dataset} has only {M} training pictures")
    labelled = resized(common.load_dataset(args.zero_shot, args.data_dir, S).to(device), S) if args.zero_shot else data
    amounts = args.labels or [1.0] * args.fine_tune
    if (amounts or args.zero_shot) and not labelled.classes:
        raise UserError(f"--labels, --fine-tune and --zero-shot: {args.zero_shot or args.dataset} has no classes")
    names = [name.strip() for name in args.zero_shot_classes.split(",") if name.strip()]
    if args.zero_shot_classes and len(names) < 2:
        raise UserError(f"--zero-shot-classes {args.zero_shot_classes}: name two classes or more, with commas between")
    if len(names) == len(labelled.classes) and all(name.isdigit() for name in labelled.classes):
        labelled = dataclasses.replace(labelled, classes=names)  # an .npz file has mere numbers
    subsets = [common.labelled_rows(labelled.train_labels, amount, args.seed) for amount in amounts]
    run = Run(args)
    print(f"{METHOD} on {args.dataset}: {M} pictures with captions, {S} x {S}; {device}; results go to {run.folder}",
          flush=True)  # fmt: skip
    if not labelled.classes:
        print("there are no classes, so the probes are skipped; --zero-shot names data that has some")
    if device.type == "cpu" and args.encoder != "small":
        print(f"{args.encoder} is made for a GPU; the recipe for a CPU is --encoder small")

    torch.manual_seed(args.seed)
    tokenizer = Tokenizer(data.train_captions, args.context, args.min_count)
    model = CLIP(args, len(tokenizer), S).to(device, memory_format=torch.channels_last)
    scratch = copy.deepcopy(model)
    if args.compile or (args.compile is None and device.type == "cuda"):
        model.compile()
        common.compile_operators()

    def measure(model):
        """-> accuracies on the test pictures, and h of the labelled ones."""
        accuracies, h = evaluate(model, tokenizer, labelled) if labelled.classes else ({}, None)
        return accuracies | retrieval(model, tokenizer, data.test_images, data.test_captions), h

    def monitor():
        """Recall among the validation pictures, if there are any: what recipes are chosen by."""
        if data.val_images is None:
            return {}
        recalls = retrieval(model, tokenizer, data.val_images, data.val_captions)
        return {f"val_{way}": recalls[way] for way in ("text_to_image_r10", "image_to_text_r10")}

    untrained, before = measure(scratch)
    pretrain(model, tokenizer, data.train_images, data.train_captions, args, run, monitor)
    trained, after = measure(model)
    results = {"untrained": untrained, "trained": trained}
    few = [semi_supervised(scratch.encoder, model.encoder, labelled, after, rows, args) for rows in subsets]
    save_examples(run.folder, model, tokenizer, data.test_images, data.test_captions)
    column = "accuracy or recall on test"
    print_table([{column: name, "untrained": untrained[name], "trained": trained[name]} for name in trained])
    if labelled.classes:
        save_neighbours(run.folder / "neighbours.png", labelled, before, after)
        shots = few_shot(after, labelled, trained["zero_shot"], args.seed)
        print_table(shots)
        results["few_shot"] = shots
    if few:
        print_table(few)
    if names:
        results["zero_shot_classes"] = name_classes(run, model, tokenizer, labelled, names)
    return run.finish(start, device, model.encoder, results | {"semi_supervised": few})


if __name__ == "__main__":
    try:
        main(parse_args())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command with --resume goes on from the last whole epoch", file=sys.stderr)
        sys.exit(130)
