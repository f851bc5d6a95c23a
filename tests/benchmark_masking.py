"""What it saves that the encoder sees no mask tokens: python tests/benchmark_masking.py

Training steps of mae.py on random pictures, with and without --encode-mask-tokens, which take turns: table (c) of the
lecture. Other flags are those of mae.py, by default of its CIFAR-10 recipe for this device. Arithmetic is counted too.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from benchmark import take_turns
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402
import mae  # noqa: E402


def trainer(args, images, device):
    """A function that does one training step on images -> their number."""
    torch.manual_seed(0)
    N, S = len(images), images.shape[3]
    model = mae.build_model(args, S).to(device).train()
    if args.compile or (args.compile is None and device.type == "cuda"):
        model.compile()
    optimizer, _ = mae.layerwise_adamw(model, args.lr * N / 256, 1, args, betas=(0.9, 0.95))
    generator = torch.Generator(device).manual_seed(0)

    def step():
        x = mae.network_input(mae.augmented(images, args, generator))
        noise = mae.mask_noise(args.mask_sampling, N, S // args.patch_size, args.mask_ratio, generator)
        with mae.autocast(device):
            prediction, mask = model(x, args.mask_ratio, noise)
        targets = mae.patch_targets(x, args.patch_size, args.target)
        loss = mae.reconstruction_loss(prediction.float(), targets, mask.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return N

    return step


def arithmetic(args, image):
    """Floating-point operations of a training step on one picture; attention spelled out, so that it is counted."""
    model, S = mae.build_model(args, image.shape[3]), image.shape[3]
    noise = torch.rand(1, (S // args.patch_size) ** 2)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        prediction, _ = model(mae.network_input(image / 255), args.mask_ratio, noise)
        prediction.sum().backward()
    return counter.get_total_flops()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--record", type=Path, help="a JSON file to write")
    ours, flags = parser.parse_known_args()
    flags = ["--dataset", "cifar10", *([] if torch.cuda.is_available() else ["--encoder", "small"]), *flags]
    cases = {"visible patches alone": "--no-encode-mask-tokens", "mask tokens too": "--encode-mask-tokens"}
    cases = {name: mae.parse_args([*flags, flag]) for name, flag in cases.items()}
    args = cases["mask tokens too"]
    device = mae.pick_device(args.device)
    if args.compile or (args.compile is None and device.type == "cuda"):
        common.compile_operators()
    images = torch.randint(256, (args.batch_size, 3, 32, 32), dtype=torch.uint8, device=device)
    rates = take_turns({name: trainer(a, images, device) for name, a in cases.items()}, device, rounds=40)
    flops = {name: arithmetic(a, images[:1].cpu()) for name, a in cases.items()}
    (fast, slow), (few, many) = rates.values(), flops.values()
    print(f"{args.encoder}, batch {args.batch_size}, {args.mask_ratio:.0%} masked, {device}, torch {torch.__version__}")
    for name in cases:
        print(f"{name:24}{rates[name]:8.0f} images/s{flops[name] / 1e6:10.0f} MFLOP an image")
    print(f"with mask tokens {fast / slow:.2f} times the time, {many / few:.2f} times the arithmetic")
    if ours.record:
        record = {
            "command": " ".join(["python", *sys.argv]),
            "date": time.strftime("%Y-%m-%d"),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "encoder": args.encoder,
            "batch_size": args.batch_size,
            "mask_ratio": args.mask_ratio,
            "images_per_second": rates,
            "flop_per_image": flops,
            "time_ratio": fast / slow,
            "flop_ratio": many / few,
        }
        ours.record.write_text(json.dumps(record, indent=2) + "\n")
