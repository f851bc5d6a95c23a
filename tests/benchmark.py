"""How fast the views and the training step are: python tests/benchmark.py

    views   batched views against torchvision's transforms, image by image in a DataLoader with all
            cores
    step    a step with live augmentation against the same step on a fixed batch, which is the bound
    lightly where it is installed, its SimCLR (transform, loader, loss) with the same network, batch
            and optimizer

Flags are those of simclr.py, by default of its CIFAR-10 recipe for this device; images are random.
A number is the median over rounds in which the contestants take turns, so that whatever else the
machine does meets all of them alike. --record FILE writes what was measured.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms import v2

try:
    from lightly.loss import NTXentLoss
    from lightly.transforms import SimCLRTransform
except ImportError:  # it is no part of requirements-dev.txt
    SimCLRTransform = None

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402
import simclr  # noqa: E402

# === What all benchmarks need =====================================================================


def parse(script):
    """The command line of a benchmark -> flags of the script, with its CIFAR-10 recipe, and the
    file for a record, or None."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--record", type=Path)
    ours, flags = parser.parse_known_args()
    if not torch.cuda.is_available():
        flags = ["--encoder", "small", *flags]
    return script.parse_args(["--dataset", "cifar10", *flags]), ours.record


def take_turns(contestants, device, rounds):
    """contestants {name: function that works through some images and returns their number} ->
    {name: images/s}."""
    rates = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, work in contestants.items():
            start = time.perf_counter()
            count = work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first is for warming up
                rates[name].append(count / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def describe(args, device):
    """What every record of a benchmark begins with."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "encoder": args.encoder,
        "batch_size": args.batch_size,
    }


def report(lines, record, file):
    """Prints lines below a header, and writes the record if there is a file for it."""
    device = f"{record['device']}, torch {record['torch']}"
    print(f"{record['encoder']}, batch {record['batch_size']}, {device}", *lines, sep="\n")
    if file:
        file.write_text(json.dumps(record, indent=2) + "\n")


# === Contestants ==================================================================================
class Images(torch.utils.data.Dataset):
    """numpy images (M, S, S, 3) -> what `transform` makes of one, as a PIL image, as datasets of
    torchvision do."""

    def __init__(self, images, transform):
        self.images = images
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(v2.functional.to_pil_image(self.images[i]))


def loader(images, transform, N):
    """A DataLoader as peers have it: a process for each core, pinned memory where it helps. Its
    processes stay, but are idle between two passes, so that they do not work during the turns of
    others."""
    return torch.utils.data.DataLoader(
        Images(images, transform),
        N,
        shuffle=True,
        drop_last=True,
        num_workers=os.cpu_count(),
        persistent_workers=True,
        pin_memory=torch.cuda.is_available(),
    )


def torchvision_view(args, S):
    """The transform of the paper, on a PIL image, as published code has it: the same as two_views
    makes."""
    strength = 0.8 * args.jitter_strength
    jitter = v2.ColorJitter(strength, strength, strength, 0.2 * args.jitter_strength)
    steps = [
        v2.RandomResizedCrop(S, scale=(args.crop, 1.0)),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([jitter], 0.8),
        v2.RandomGrayscale(args.gray),
    ]
    if args.blur:
        blur = v2.GaussianBlur(max(3, S // 20 * 2 + 1), (0.1, 2.0))
        steps.append(v2.RandomApply([blur], args.blur))
    steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    steps.append(v2.Normalize(common.MEAN, common.STD))
    return v2.Compose(steps)


def lightly_transform(args, S):
    return SimCLRTransform(
        input_size=S,
        cj_strength=args.jitter_strength,
        cj_bright=0.8,
        cj_contrast=0.8,
        cj_sat=0.8,
        cj_hue=0.2,
        min_scale=args.crop,
        random_gray_scale=args.gray,
        gaussian_blur=args.blur,
    )


# === Measurements =================================================================================
def measure(args, device):
    """{name: images/s} of views, {name: images/s} of steps, and the share of the bound of each step
    with live augmentation."""
    N = args.batch_size
    S = 32
    steps = 16  # in a pass over the images
    arrays = np.random.default_rng(0).integers(0, 256, (steps * N, S, S, 3), dtype=np.uint8)
    images = torch.from_numpy(arrays).permute(0, 3, 1, 2).to(device)
    generator = torch.Generator(device).manual_seed(0)
    torch.manual_seed(0)
    model = simclr.SimCLR(args, S).to(device, memory_format=torch.channels_last)
    if args.compile:
        model.compile()
    update, _ = simclr.make_update(model, args, N, 10**6)

    def our_views():
        rows = torch.randint(len(images), (N,), generator=generator, device=device)
        return common.normalize(simclr.two_views(images[rows], args, generator))

    def train(x, loss_of):
        with simclr.autocast(device):
            z = model(x)
        z1, z2 = z.float().chunk(2)
        update(loss_of(z1, z2))

    def our_loss(z1, z2):
        return simclr.nt_xent(z1, z2, args.temperature)

    fixed = our_views()
    turn = 16 if device.type == "cuda" else 2  # on a GPU long enough not to weigh its last wait

    def train_on_a_fixed_batch():
        for _ in range(turn):
            train(fixed, our_loss)
        return turn * N

    def train_live():
        for _ in range(turn):
            train(our_views(), our_loss)
        return turn * N

    def batched_views():
        for _ in range(steps):
            our_views()
        return steps * 2 * N

    single_views = loader(arrays, torchvision_view(args, S), N)

    def loaded_views():
        return sum(len(x) for x in single_views)

    views = take_turns({"batched": batched_views, "DataLoader": loaded_views}, device, rounds=5)
    contestants = {"fixed batch": train_on_a_fixed_batch, "live": train_live}
    rates = take_turns(contestants, device, rounds=40)
    shares = {"live": rates["live"] / rates["fixed batch"]}
    if SimCLRTransform:
        pairs = loader(arrays, lightly_transform(args, S), N)
        criterion = NTXentLoss(temperature=args.temperature)

        def lightly():
            for pair in pairs:
                x = torch.cat(pair).to(device, non_blocking=True)
                train(x.contiguous(memory_format=torch.channels_last), criterion)
            return steps * N

        theirs = take_turns({"live": train_live, "lightly": lightly}, device, rounds=3)
        shares["lightly"] = shares["live"] * theirs["lightly"] / theirs["live"]
    return views, rates, shares


def main():
    args, file = parse(simclr)
    device = simclr.pick_device(args.device)
    with common.compile_operators(args.compile):
        views, rates, shares = measure(args, device)
    record = describe(args, device) | {"compile": args.compile}
    record |= {"views_per_second": views, "images_per_second": rates, "share_of_bound": shares}
    if "lightly" in shares:
        record["lightly"] = importlib.metadata.version("lightly")
    times = views["batched"] / views["DataLoader"]
    lines = [
        f"views/s       batched {views['batched']:.0f}, {times:.1f} times those of a DataLoader",
        f"images/s      fixed batch {rates['fixed batch']:.0f}, live {rates['live']:.0f}",
    ]
    for name, share in shares.items():
        lines.append(f"{name:14}{share:.2f} of the bound, {1 / share:.3f} of its time")
    report(lines, record, file)


if __name__ == "__main__":
    main()
