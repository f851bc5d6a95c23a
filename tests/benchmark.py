"""How fast the views and the training step are, each compared within one run: python
tests/benchmark.py

    views   batched views against torchvision's transforms, image by image in a DataLoader
            with all cores
    step    a step with live augmentation against the same step on a fixed batch, which is the bound
    lightly where it is installed, its SimCLR (transform, loader, loss) with the same network,
            batch and optimizer

Flags are those of simclr.py, by default of its CIFAR-10 recipe for this device; images are random.
A line is the median over rounds in which the contestants take turns, so that what else the machine
does meets all of them alike.
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

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402
import simclr  # noqa: E402


class Images(torch.utils.data.Dataset):
    """numpy images (M, S, S, 3) -> what `transform` makes of one, as a PIL image, as datasets of
    torchvision do."""

    def __init__(self, images, transform):
        self.images, self.transform = images, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(v2.functional.to_pil_image(self.images[i]))


def torchvision_view(args, S):
    """The transform of the paper, on a PIL image, as published code has it: the same as two_views
    makes."""
    s = args.jitter_strength
    blur = (
        [v2.RandomApply([v2.GaussianBlur(max(3, S // 20 * 2 + 1), (0.1, 2.0))], args.blur)]
        if args.blur
        else []
    )
    steps = [
        v2.RandomResizedCrop(S, scale=(args.crop, 1.0)),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)], 0.8),
        v2.RandomGrayscale(args.gray),
        *blur,
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(common.MEAN, common.STD),
    ]
    return v2.Compose(steps)


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


def loader(images, transform, N):
    """A DataLoader as peers have it: a process for each core, pinned memory where it helps.

    Its processes stay, and are idle between two passes, so that they do not work during the turns
    of others.
    """
    data, pin = Images(images, transform), torch.cuda.is_available()
    return torch.utils.data.DataLoader(
        data,
        N,
        shuffle=True,
        drop_last=True,
        num_workers=os.cpu_count(),
        persistent_workers=True,
        pin_memory=pin,
    )


def measure(args, record_file):
    """All of it, printed and written to the file if there is one."""
    device, N, S, steps = simclr.pick_device(args.device), args.batch_size, 32, 16
    torch.manual_seed(0)
    arrays = np.random.default_rng(0).integers(0, 256, (steps * N, S, S, 3), dtype=np.uint8)
    images = torch.from_numpy(arrays).permute(0, 3, 1, 2).to(device)
    generator = torch.Generator(device).manual_seed(0)
    model = simclr.SimCLR(args, S).to(device, memory_format=torch.channels_last)
    if args.compile:
        model.compile()
    optimizer, schedule = simclr.make_optimizer(model, args, N, 10**6)

    def random_batch():
        return images[torch.randint(len(images), (N,), generator=generator, device=device)]

    def our_views():
        return common.normalize(simclr.two_views(random_batch(), args, generator))

    def train(x, loss_of=simclr.nt_xent, **options):
        with simclr.autocast(device):
            z = model(x)
        z1, z2 = z.float().chunk(2)
        loss = loss_of(z1, z2, **options)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        return loss.detach()

    def fed_by(next_views, steps):
        def work():
            for _ in range(steps):
                train(next_views(), temperature=args.temperature)
            return steps * N

        return work

    def batched_views():
        for _ in range(steps):
            our_views()
        return steps * 2 * N

    def loaded_views():
        return sum(len(x) for x in singles)

    singles, fixed = loader(arrays, torchvision_view(args, S), N), our_views()
    views = take_turns({"batched": batched_views, "DataLoader": loaded_views}, device, rounds=5)
    turn = (
        16 if device.type == "cuda" else 2
    )  # a GPU is fed ahead: what waiting for it at the end costs must not weigh
    images_per_second = take_turns(
        {"fixed batch": fed_by(lambda: fixed, turn), "live": fed_by(our_views, turn)},
        device,
        rounds=40,
    )
    share = images_per_second["live"] / images_per_second["fixed batch"]
    shares = {"live": share}
    try:
        from lightly.loss import NTXentLoss
        from lightly.transforms import SimCLRTransform

        transform = SimCLRTransform(
            input_size=S, cj_strength=args.jitter_strength,
            cj_bright=0.8, cj_contrast=0.8, cj_sat=0.8, cj_hue=0.2,
            min_scale=args.crop, random_gray_scale=args.gray, gaussian_blur=args.blur,
        )  # fmt: skip
        criterion = NTXentLoss(temperature=args.temperature)
        pairs = loader(arrays, transform, N)

        def lightly():
            for pair in pairs:
                x = torch.cat(pair).to(device, non_blocking=True)
                train(x.contiguous(memory_format=torch.channels_last), criterion)
            return steps * N

        rates = take_turns({"live": fed_by(our_views, steps), "lightly": lightly}, device, rounds=3)
        shares["lightly"] = share * rates["lightly"] / rates["live"]
    except ImportError:
        pass

    print(
        f"{args.encoder}, batch {N}, {'compiled' if args.compile else 'eager'}, "
        f"{device}, torch {torch.__version__}"
    )
    print(f"views/s       batched {views['batched']:.0f}, DataLoader {views['DataLoader']:.0f}: "
          f"{views['batched'] / views['DataLoader']:.1f} times")  # fmt: skip
    print(
        f"images/s      fixed batch {images_per_second['fixed batch']:.0f}, "
        f"live {images_per_second['live']:.0f}"
    )
    for name, share in shares.items():
        print(
            f"{name:14}{share:.2f} of the bound, which is the step on a fixed batch; "
            f"{1 / share:.3f} of its time"
        )
    if record_file:
        record = {
            "command": " ".join(["python", *sys.argv]),
            "date": time.strftime("%Y-%m-%d"),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "encoder": args.encoder,
            "batch_size": N,
            "compile": args.compile,
            "views_per_second": views,
            "images_per_second": images_per_second,
            "share_of_bound": shares,
        }
        if "lightly" in shares:
            record["lightly"] = importlib.metadata.version("lightly")
        record_file.write_text(json.dumps(record, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--record", type=Path, help="a JSON file to write")
    ours, flags = parser.parse_known_args()
    small = [] if torch.cuda.is_available() else ["--encoder", "small"]
    args = simclr.parse_args(["--dataset", "cifar10", *small, *flags])
    with common.compile_operators(args.compile):
        measure(args, ours.record)


if __name__ == "__main__":
    main()
