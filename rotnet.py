"""RotNet: to predict how far an image was rotated, a network has to recognize the object in it and
to know which way up that belongs.

Every image is rotated by 0, 90, 180 and 270 degrees, and the network classifies the four copies:
labels come for free. Multiples of 90 degrees need no interpolation, which would leave traces, so
only the content reveals the rotation. Images without an upright, from microscopes or satellites for
example, have no rotation to predict: accuracy stays near 25 %, and little is learned. Contrastive
views teach a network to ignore what the augmentations change; here it has to keep what the
transformation changes. Downstream tasks use the feature maps of an early block, since the last ones
specialize in rotations.

    Gidaris, Singh, Komodakis: Unsupervised Representation Learning by Predicting Image Rotations,
    ICLR 2018. Equations 1 and 2 of the paper; g(x | y) is image x after y quarter turns, and F^y
    the predicted probability of y:

    L = mean over images x of  1/4 sum_{y = 0..3} -log F^y(g(x | y))

    python rotnet.py                                     shapes drawn by code; a laptop CPU will do
    python rotnet.py --dataset cifar10 --compile         the paper's Network in Network, on a GPU
    python rotnet.py --dataset cifar10 --encoder small   a small one, on a CPU
    python rotnet.py --labels 5 20 100 400               with few labels: 5, 20, ... per class
    python rotnet.py --init encoder.pt --epochs 0        measures the weights in a file
    torchrun --nproc-per-node 8 rotnet.py --dataset path/to/images       your own images, on 8 GPUs

Linear probe of block 2 on test, untrained -> trained, with seed 0 (record in results/): shapes
46.1 -> 99.2 %.
"""

import argparse
import contextlib
import copy
import dataclasses
import difflib
import functools
import io
import json
import math
import os
import shlex
import statistics
import sys
import textwrap
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import ImageDraw
from torch import nn
from torchvision.transforms.functional import to_pil_image, to_tensor

import common
from common import UserError

RANK = int(os.environ.get("RANK", 0))  # torchrun starts a process for each GPU, numbered from 0
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def flag(default, help, low=None, high=math.inf, choices=None, resume=False):
    """A field of Args that the command line can set. A number must be from low to high; only flags
    with resume=True, which change nothing about the training, go together with --resume."""
    metadata = {"help": help, "low": low, "high": high, "choices": choices, "resume": resume}
    return dataclasses.field(default=default, metadata=metadata)


ENCODERS = "small", "nin"


@dataclasses.dataclass
class Args:
    """The values here are the recipe for CIFAR-10 on a GPU. SHAPES and SMALL, below, replace some
    of them, but never a flag that was typed."""

    script: str = "rotnet.py"  # relatives/ name their own
    dataset: str = flag("shapes", "shapes, cifar10, cifar100, stl10, an .npz file, an image folder")
    data_dir: str = flag("data", "folder for downloads and decoded images", resume=True)
    image_size: int = flag(96, "side of a folder's images; largest side in an .npz file", 8, 512)
    encoder: str = flag("nin", "nin: the paper's four blocks; small: three", choices=ENCODERS)
    init: str = flag("", "weights to begin with: an encoder.pt of the same --encoder")
    epochs: int = flag(100, "passes over the images; paper: 100, authors' code: 200", 0)
    batch_size: int = flag(128, "images per step, each in four rotations; paper: 128", 2)
    lr: float = flag(0.1, "learning rate, the same for any batch size; paper: 0.1", 0)
    weight_decay: float = flag(5e-4, "weight decay; paper: 5e-4", 0)
    shift: float = flag(0.125, "largest shift, in sides of the image; authors' code: 0.125", 0, 0.5)
    classifier_epochs: int = flag(100, "passes over the labels for a classifier; paper: 100", 1)
    labels: tuple = flag(
        (), "train with few labels: 0.1 is a tenth of each class, 10 are ten", resume=True
    )
    eval_every: int = flag(10, "epochs between two kNN measurements on held-out training labels", 1)
    seed: int = flag(0, "seed of weights, batches, views and choice of labels", 0, 2**31)
    device: str = flag("auto", "cuda, mps, cpu, or auto: the first that is there", resume=True)
    compile: bool = flag(False, "compile network and views, for long runs on a GPU", resume=True)
    out: str = flag("", "run folder; by default runs/<method>-<dataset>-seed<seed>")
    resume: str = flag("", "run folder to continue, with the flags of its first start", resume=True)
    explicit: tuple = ()  # flags that were typed: recipes leave them alone
    command: str = ""


SHAPES = dict(
    encoder="small", epochs=4, batch_size=32, shift=0.0625, classifier_epochs=5, eval_every=2
)
# With --encoder small, on other images: what two CPU cores train in ten minutes.
SMALL = dict(image_size=32, epochs=2, batch_size=64, classifier_epochs=2, eval_every=1)


# === Views ========================================================================================
def shifted(images, args, generator):
    """uint8 (N, 3, S, S) -> float in [0, 1], shifted and mirrored at random (authors' code).

    Left is exchanged with right only: an image turned upside down would be a rotated one with the
    wrong label. The zeros that move in are there before the rotation, on any side alike, so that a
    black border does not reveal it.
    """
    return common.random_crop(images / 255, round(args.shift * images.shape[3]), generator)


def rotate_batch(images):
    """Images, counter-clockwise by 0, 90, 180 and 270 degrees: (N, C, S, S) -> (4N, C, S, S), and
    labels 0 to 3 (4N,). All four copies of an image are in one batch, which trains better than one
    random rotation of each (paper, section 3.1)."""
    rotated = [images.rot90(y, (2, 3)) for y in range(4)]
    labels = torch.arange(4, device=images.device).repeat_interleave(len(images))
    return torch.cat(rotated), labels


# === Model ========================================================================================
def conv_layers(c_in, c_out, kernel_size, stride=1):
    """A convolution, initialized as in the authors' code, batch norm and ReLU, in a list."""
    conv = nn.Conv2d(c_in, c_out, kernel_size, stride, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return [conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]


def nin_block(c_in, widths, kernel_size, stride=1, pool=None):
    """A block of Network in Network: one convolution of this kernel size and stride, two of 1x1,
    and maybe a pool. widths: the channels of the three outputs."""
    w1, w2, w3 = widths
    layers = conv_layers(c_in, w1, kernel_size, stride)
    layers += conv_layers(w1, w2, 1)
    layers += conv_layers(w2, w3, 1)
    if pool:
        layers.append(pool)
    return nn.Sequential(*layers)


def build_nin(name):
    """The paper's Network in Network without its classifier: an nn.Sequential of blocks; and D, the
    channels of its output.

    For 32 x 32 pixels block 1 returns (96, 16, 16), every later one (192, 8, 8). `small`, for CPUs,
    is a third as wide and has a block less: (64, 8, 8), then (64, 4, 4).
    """
    D = 192
    first = (192, 160, 96)
    stride = 1
    later = 2
    if name == "small":
        D = 64
        first = (64, 64, 64)
        stride = 2
        later = 1
    blocks = [
        nin_block(3, first, 5, stride, nn.MaxPool2d(3, stride=2, padding=1)),
        nin_block(first[-1], (D, D, D), 5, pool=nn.AvgPool2d(3, stride=2, padding=1)),
    ]
    for _ in range(later):
        blocks.append(nin_block(D, (D, D, D), 3))
    return nn.Sequential(*blocks), D


class RotNet(nn.Module):
    """Encoder and linear classifier: (B, 3, S, S) -> logits of the rotations (B, 4)."""

    def __init__(self, args):
        super().__init__()
        encoder, D = build_nin(args.encoder)
        load_weights(encoder, args)
        self.encoder = encoder
        self.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(D, 4))

    def forward(self, x):
        return self.classifier(self.encoder(x))


# === Loss =========================================================================================
def rotation_loss(network, images, args, generator):
    """Equations 1 and 2 of the paper for uint8 images (N, 3, S, S) -> scalars: the loss in nats,
    and the fraction of rotations predicted correctly. Chance is log 4 = 1.39, and 25 %."""
    x, labels = rotate_batch(shifted(images, args, generator))  # (4N, 3, S, S), (4N,)
    with autocast(x.device):
        logits = network(common.normalize(x))  # (4N, 4)
    loss = F.cross_entropy(logits.float(), labels)
    correct = logits.argmax(1) == labels
    return {"loss": loss, "rotation": correct.float().mean()}


# === Training =====================================================================================
def training_step(network, images, args, generator, progress, update, pretext_loss=rotation_loss):
    """A pretext task for uint8 images (N, 3, S, S); update(loss) trains the network. Returns what
    to log. Relatives ask another question: pretext_loss is what they replace."""
    terms = pretext_loss(network, images, args, generator)
    update(terms["loss"])
    return terms


def make_optimizer(model, args, batch_size, steps):
    """The paper's SGD, whose learning rate is divided by 5 after 30, 60 and 80 % of the steps. It
    does not follow batch_size, unlike the other scripts'."""
    optimizer = torch.optim.SGD(
        model.parameters(),
        args.lr,
        momentum=0.9,
        nesterov=True,
        weight_decay=args.weight_decay,
        fused=True,
    )
    milestones = [round(fraction * steps) for fraction in (0.3, 0.6, 0.8)]
    return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, 0.2)


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


def knn_accuracy(bank, bank_labels, queries, labels, k=200, temperature=0.1):
    """k nearest neighbors, features (M, D), (Q, D) -> accuracy in [0, 1]. Those of highest cosine s
    vote for their class, each with exp(s / temperature) (Wu et al. 2018; k and temperature are
    those of the CIFAR-10 notebook by MoCo's authors)."""
    counts = bank_labels.bincount()
    smallest = int(counts[counts > 0].min())
    k = min(k, max(10, smallest), len(bank))  # or the smallest class would always be outvoted
    bank = F.normalize(bank, dim=1)
    queries = F.normalize(queries, dim=1)
    correct = 0
    for query, label in zip(queries.split(1024), labels.split(1024), strict=True):
        s, nearest = (query @ bank.T).topk(k)  # (B, k)
        votes = torch.zeros(len(query), len(counts), device=bank.device)
        votes.scatter_add_(1, bank_labels[nearest], (s / temperature).exp())
        correct += (votes.argmax(1) == label).sum().item()
    return correct / len(labels)


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


def effective_rank(h):
    """How many directions features (M, D) fill, from 1 to D: exp of the entropy of their singular
    values, normalized to sum to 1 (RankMe, Garrido et al. 2023). It needs no labels."""
    s = torch.linalg.svdvals(h)
    p = s / s.sum().clamp(min=1e-9)  # features that are all 0 have rank 1
    return torch.special.entr(p).sum().exp().item()


def monitor(encoder, data):
    """While training: the effective rank of h, of at most 4,096 images, and kNN on a tenth of the
    training labels, from the others. Recipes are chosen by kNN, since the test images are kept for
    the end."""
    images = data.train_images
    y = data.train_labels
    if len(y) < 2:
        some = images[:: len(images) // 4096 + 1]
        return {"rank": effective_rank(features(encoder, some))}
    h = features(encoder, images[: len(y)])
    held_out, others = data.held_out_labels()
    knn = knn_accuracy(h[others], y[others], h[held_out], y[held_out])
    return {"rank": effective_rank(h[:: len(h) // 4096 + 1]), "knn": knn}


@torch.no_grad()
def pretext_task(model, images, args, pretext_loss):
    """The same question about images that were not trained on, uint8 (M, 3, S, S) -> the terms of
    pretext_loss, means over batches of 500. In the paper features improve with this accuracy while
    training (section 3.1); it does not choose between blocks."""
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(args.seed)
    log = [pretext_loss(model, x.to(device), args, generator) for x in images.split(500)]
    return {name: torch.stack([terms[name] for terms in log]).mean().item() for name in log[0]}


def pooled(encoder, number):
    """The first blocks of an encoder, and their feature map pooled to 2 x 2: images -> (B, 4C)."""
    return nn.Sequential(encoder[:number], nn.AdaptiveAvgPool2d(2), nn.Flatten())


def build_classifier(kind, C, H, W, classes):
    """The paper's classifiers of feature maps (C, H, W). conv: a third block and a linear layer on
    its mean. nonlinear: two hidden layers of 200 units for ten classes, on maps pooled to 8 x 8 at
    most, since those of large images would need billions of weights."""
    if kind == "conv":
        block = nin_block(C, (C, C, C), 3)
        return nn.Sequential(block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, classes))
    size = min(H, 8), min(W, 8)
    hidden = min(20 * classes, 2048)
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(size),
        nn.Flatten(),
        nn.Linear(C * math.prod(size), hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, classes),
    )


def train_classifier(kind, blocks, data, rows, epochs, args, freeze=True):
    """Trains a classifier on top of some blocks with the labels of some rows -> accuracy on test.

    The blocks are frozen or, with freeze=False, trained as well, in a copy. Optimizer, shifts and
    images per step, 4N, are those of pretraining. However few labels are used, there are as many
    steps as in `epochs` passes over all of them.
    """
    device = rows.device
    N = min(4 * args.batch_size, max(2, len(rows)))  # batch norm needs two, maybe twice the same
    steps = epochs * math.ceil(len(data.train_labels) / (4 * args.batch_size))
    torch.manual_seed(args.seed)
    _, C, H, W = features(blocks, data.test_images[:1]).shape
    classifier = build_classifier(kind, C, H, W, len(data.classes))
    model = nn.Sequential(copy.deepcopy(blocks), classifier).to(device)
    model[0].requires_grad_(not freeze)
    update, _ = make_update(model, args, N, steps)
    generator = torch.Generator(device).manual_seed(args.seed)
    order = rows[torch.randint(len(rows), (steps * N,), generator=generator, device=device)]
    model.train()
    if freeze:
        model[0].eval()  # the statistics of its batch norm are frozen, too
    batches = common.batches(data.train_images, order, N, device)
    for batch, index in zip(batches, order.split(N), strict=True):
        with autocast(device):
            logits = model(common.normalize(shifted(batch, args, generator)))  # (N, classes)
        update(F.cross_entropy(logits.float(), data.train_labels[index]))
    predicted = features(model, data.test_images).argmax(1)
    return (predicted == data.test_labels).float().mean().item()


def evaluate(encoder, data, args):
    """Every block, frozen -> a row of accuracies on test each, none without labels: kNN and linear
    probe of its feature map, pooled to 2 x 2, and the classifiers of the paper's tables 1 and 3."""
    if not data.classes:
        return []
    y = data.train_labels
    test_y = data.test_labels
    rows = torch.arange(len(y), device=y.device)
    epochs = args.classifier_epochs
    table = []
    for number in range(1, len(encoder) + 1):
        h = features(pooled(encoder, number), data.train_images[: len(y)])
        test_h = features(pooled(encoder, number), data.test_images)
        accuracies = {"knn": knn_accuracy(h, y, test_h, test_y)}
        accuracies["linear_probe"] = linear_probe(h, y, test_h, test_y)
        kinds = ["nonlinear", "conv"] if number == 2 else ["nonlinear"]
        for kind in kinds:
            accuracies[kind] = train_classifier(kind, encoder[:number], data, rows, epochs, args)
        table.append(accuracies)
    return table


def few_labels(scratch, encoder, data, rows, args):
    """With the labels of some rows -> accuracies on test of a third block and a linear layer on two
    pretrained, frozen blocks, and of the same network trained from scratch. Both are trained for as
    long as the authors train the supervised one, twice --classifier-epochs."""
    epochs = 2 * args.classifier_epochs
    row = {"labels": len(rows)}
    row["frozen"] = train_classifier("conv", encoder[:2], data, rows, epochs, args)
    row["from_scratch"] = train_classifier(
        "conv", scratch[:2], data, rows, epochs, args, freeze=False
    )
    return row


# === Figures ======================================================================================
def save_rotations(folder, model, images, args):
    """rotations.png: images, uint8 (R, 3, S, S), in four rotations; under each the predicted
    rotation and its probability, blue if it is right, and else orange."""
    x, labels = rotate_batch(images)
    probabilities = features(model, x).softmax(1).cpu()
    zoom = max(1, round(96 / x.shape[3]))
    tiles = F.interpolate(x.cpu() / 255, scale_factor=zoom)
    tiles = F.pad(tiles, (4, 4, 0, 24), value=1.0)
    captioned = []
    for tile, p, label in zip(tiles, probabilities, labels.tolist(), strict=True):
        predicted = p.argmax().item()
        color = "#0073b3" if predicted == label else "#d06000"
        image = to_pil_image(tile)
        place = (4, image.height - 22)
        text = f"{90 * predicted}°  {p[predicted]:.0%}"
        ImageDraw.Draw(image).text(place, text, fill=color, font_size=14)
        captioned.append(to_tensor(image))
    title = "test images, the predicted rotation and its probability: blue is right, orange wrong"
    grid = torch.stack(captioned).unflatten(0, (4, -1))
    save_sheet(folder / "rotations.png", {title: grid})


# === The whole run ================================================================================
def fit_batch_size(args, M):
    """At most all M images, unless a number was typed; the same share for every process."""
    use_recipe(args, {"batch_size": min(args.batch_size, M // WORLD * WORLD)})
    N = args.batch_size
    if not 2 <= N <= M:
        raise UserError(f"--batch-size {N}: must be from 2 to {M}, the number of images")
    if N % WORLD:
        raise UserError(f"--batch-size {N}: must be a multiple of {WORLD}, the number of processes")


def print_tasks(summary):
    """The accuracies with few labels, in the pretext task, and of each block."""
    for row in summary["semi_supervised"]:
        scores = "  ".join(f"{name} {round(value, 3)}" for name, value in row.items())
        print(f"on test images, with few labels:  {scores}")
    terms = [f"{name} {value:.4g}" for name, value in summary["pretext_task"].items()]
    print("on test images, pretext task:  " + "  ".join(terms))
    untrained = summary["blocks"]["untrained"]
    trained = summary["blocks"]["trained"]
    for number, (before, after) in enumerate(zip(untrained, trained, strict=True), 1):
        changes = [f"{name} {before[name]:.1%} -> {after[name]:.1%}" for name in before]
        print(f"on test images, block {number}:  " + "  ".join(changes))


def main(args, Model=RotNet, pretext_loss=rotation_loss, save_predictions=save_rotations):
    """Measures the encoder, pretrains it without labels, measures it again. Returns the content of
    summary.json."""
    start = time.perf_counter()
    device = pick_device(args.device)
    data = load_data(args, device)
    fit_batch_size(args, len(data.train_images))
    subsets = [common.labelled_rows(data.train_labels, amount, args.seed) for amount in args.labels]

    torch.manual_seed(args.seed)
    layout = torch.preserve_format if device.type == "mps" else torch.channels_last  # as normalize
    model = Model(args).to(device, memory_format=layout)
    if WORLD > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # as if all images were on one GPU
    encoder = model.encoder
    if args.compile:
        model.compile()

    with run_folder(args) as folder:
        print_header(args, data, device)
        untrained = once(folder / "untrained.pt", evaluate, encoder, data, args)
        step = functools.partial(training_step, pretext_loss=pretext_loss)
        watch = functools.partial(monitor, pooled(encoder, 2), data)
        with common.compile_operators(args.compile):
            history = pretrain(model, data, args, step, watch)
        save(folder / "encoder.pt", encoder.state_dict())
        print("measuring", flush=True)
        trained = evaluate(encoder, data, args)
        task = pretext_task(model, data.test_images, args, pretext_loss)
        few = []
        if subsets:
            torch.manual_seed(args.seed)
            random_model = Model(dataclasses.replace(args, init=""))
            scratch = copy.deepcopy(encoder)  # on its device and in its memory layout
            scratch.load_state_dict(random_model.encoder.state_dict())
            few = [few_labels(scratch, encoder, data, rows, args) for rows in subsets]
        summary = describe(args, data, device, encoder, history, start)
        summary["untrained"] = untrained[1] if untrained else {}  # block 2
        summary["trained"] = trained[1] if trained else {}
        summary["pretext_task"] = task
        summary["blocks"] = {"untrained": untrained, "trained": trained}
        summary["semi_supervised"] = few
        summary["history"] = history
        save_json(folder / "summary.json", summary)
        print_tasks(summary)
        print_results(summary)  # of block 2
        examples = data.examples().to(data.test_images.device)
        with torch.no_grad():
            save_predictions(folder, model.eval(), data.test_images[examples].to(device), args)
    return summary


# === Nothing below is about RotNet: every script has it, word for word ============================
# But for two functions: clip.py has its own pretrain, since its images come with captions, and
# dino.py its own make_update, since it clips gradients.
def pretrain(model, data, args, training_step, monitor):
    """Trains on data.train_images, uint8 (M, 3, S, S), without labels, from the checkpoint in
    args.out if there is one. Returns the history, a record of each epoch: the means of what
    training_step returns and, every few epochs, what monitor() returns."""
    images = data.train_images
    device = next(model.parameters()).device
    N = args.batch_size // WORLD  # images of this process in a step
    M = len(images)
    steps = M // args.batch_size  # in an epoch; an incomplete last batch is left out
    update, state = make_update(model, args, args.batch_size, max(1, args.epochs * steps))
    state["model"] = model
    history = load_checkpoint(args, state, data)
    network = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    for epoch in range(len(history) + 1, args.epochs + 1):
        start = time.perf_counter()
        order, seed = common.epoch_order(M, args.batch_size, args.seed, epoch, RANK, WORLD)
        generator = torch.Generator(device).manual_seed(seed)  # of the views
        log = []
        model.train()
        for step, batch in enumerate(common.batches(images, order, N, device)):  # (N, 3, S, S)
            progress = (epoch - 1 + step / steps) / args.epochs
            terms = training_step(network, batch, args, generator, progress, update)
            log.append({name: x.detach() for name, x in terms.items()})  # .item() waits for the GPU
            show_progress(args, epoch, step, steps, start)
        record = {"epoch": epoch} | epoch_means(log)
        record["seconds"] = time.perf_counter() - start
        if epoch % args.eval_every == 0 or epoch == args.epochs:
            record |= monitor()
        history.append(record)
        save_epoch(args, state, data, history)
    return history


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
