"""What it saves that the encoder sees no mask tokens: python tests/benchmark_masking.py

Training steps of mae.py on random images, with and without mask tokens in the encoder, which take
turns: table (c) of the lecture. Other flags are those of mae.py, by default of its CIFAR-10 recipe
for this device. Arithmetic is counted too.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from benchmark import take_turns
from torch.utils.flop_counter import FlopCounterMode

sys.path[:0] = [str(Path(__file__).parent.parent / folder) for folder in ("", "results")]
from ablation import EncodesMaskTokens  # noqa: E402

import common  # noqa: E402
import mae  # noqa: E402


def build(kind, args, S):
    sizes = args.decoder_dim, args.decoder_depth, max(1, args.decoder_dim // 32)
    return kind(S, args.patch_size, *mae.ENCODERS[args.encoder], *sizes)


def trainer(kind, args, images, device):
    """A function that does one training step on images -> their number."""
    torch.manual_seed(0)
    N, S = len(images), images.shape[3]
    model = build(kind, args, S).to(device).train()
    if args.compile:
        model.compile()
    update, _ = mae.make_update(model, args, N, 1)
    generator = torch.Generator(device).manual_seed(0)

    def step():
        mae.training_step(model, images, args, generator, 0.0, update)
        return N

    return step


def arithmetic(kind, args, image):
    """Floating-point operations of a training step on one image; attention spelled out, so that it
    is counted."""
    model, S = build(kind, args, image.shape[3]), image.shape[3]
    noise = torch.rand(1, (S // args.patch_size) ** 2)
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        prediction, _ = model(common.normalize(image / 255), args.mask_ratio, noise)
        prediction.sum().backward()
    return counter.get_total_flops()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--record", type=Path, help="a JSON file to write")
    ours, flags = parser.parse_known_args()
    flags = [
        "--dataset",
        "cifar10",
        *([] if torch.cuda.is_available() else ["--encoder", "small"]),
        *flags,
    ]
    cases = {"visible patches alone": mae.MaskedAutoencoder, "mask tokens too": EncodesMaskTokens}
    args = mae.parse_args(flags)
    device = mae.pick_device(args.device)
    images = torch.randint(256, (args.batch_size, 3, 32, 32), dtype=torch.uint8, device=device)
    with common.compile_operators(args.compile):
        steps = {name: trainer(kind, args, images, device) for name, kind in cases.items()}
        rates = take_turns(steps, device, rounds=40)
    flops = {name: arithmetic(kind, args, images[:1].cpu()) for name, kind in cases.items()}
    (fast, slow), (few, many) = rates.values(), flops.values()
    print(
        f"{args.encoder}, batch {args.batch_size}, {args.mask_ratio:.0%} masked, {device}, "
        f"torch {torch.__version__}"
    )
    for name in cases:
        print(f"{name:24}{rates[name]:8.0f} images/s{flops[name] / 1e6:10.0f} MFLOP an image")
    print(
        f"with mask tokens {fast / slow:.2f} times the time, {many / few:.2f} times the arithmetic"
    )
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
