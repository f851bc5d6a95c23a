"""What it saves that the encoder sees no mask tokens: python tests/benchmark_masking.py

Training steps of mae.py on random images, with and without mask tokens in the encoder, which take
turns: table (c) of the lecture. Arithmetic is counted too. Other flags are those of mae.py, by
default of its CIFAR-10 recipe for this device. --record FILE writes what was measured.
"""

import sys
from pathlib import Path

import torch
from benchmark import describe, parse, report, take_turns
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402
import mae  # noqa: E402
from results.ablation import EncodesMaskTokens  # noqa: E402


def build(kind, args, S):
    heads = max(1, args.decoder_dim // 32)
    encoder = mae.ENCODERS[args.encoder]
    return kind(S, args.patch_size, *encoder, args.decoder_dim, args.decoder_depth, heads)


def trainer(kind, args, images):
    """A function that does one training step on images -> their number."""
    torch.manual_seed(0)
    N, _, S, _ = images.shape
    model = build(kind, args, S).to(images.device).train()
    if args.compile:
        model.compile()
    update, _ = mae.make_update(model, args, N, 1)
    generator = torch.Generator(images.device).manual_seed(0)

    def step():
        mae.training_step(model, images, args, generator, 0.0, update)
        return N

    return step


def arithmetic(kind, args, image):
    """Floating-point operations of a training step on one image; attention is spelled out, so that
    it is counted."""
    S = image.shape[3]
    model = build(kind, args, S)
    noise = torch.rand(1, (S // args.patch_size) ** 2)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        prediction, _ = model(common.normalize(image / 255), args.mask_ratio, noise)
        prediction.sum().backward()
    return counter.get_total_flops()


def main():
    args, file = parse(mae)
    device = mae.pick_device(args.device)
    images = torch.randint(256, (args.batch_size, 3, 32, 32), dtype=torch.uint8, device=device)
    cases = {"visible patches alone": mae.MaskedAutoencoder, "mask tokens too": EncodesMaskTokens}
    with common.compile_operators(args.compile):
        steps = {name: trainer(kind, args, images) for name, kind in cases.items()}
        rates = take_turns(steps, device, rounds=40)
    flops = {name: arithmetic(kind, args, images[:1].cpu()) for name, kind in cases.items()}
    fast, slow = rates.values()
    few, many = flops.values()
    record = describe(args, device) | {"mask_ratio": args.mask_ratio}
    record |= {"images_per_second": rates, "flop_per_image": flops}
    record |= {"time_ratio": fast / slow, "flop_ratio": many / few}
    lines = []
    for name in cases:
        speed = f"{rates[name]:8.0f} images/s"
        lines.append(f"{name:24}{speed}{flops[name] / 1e6:10.0f} MFLOP an image")
    times = f"{fast / slow:.2f} times the time, {many / few:.2f} times the arithmetic"
    report([*lines, f"with mask tokens {times}"], record, file)


if __name__ == "__main__":
    main()
