"""What a longer queue costs in memory: python tests/benchmark_queue.py

An epoch of moco.py on a few random images with K = 4096 and with K = 65536, each in a process of
its own, and the peak of its memory: on a GPU that of the tensors, on a CPU that of the process.
Other flags are those of moco.py, by default of its CIFAR-10 recipe for this device.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402
import moco  # noqa: E402


def peak_memory(flags):
    """moco.pretrain for eight steps -> GB, and the device."""
    with tempfile.TemporaryDirectory() as folder:
        args = moco.parse_args(["--dataset", "cifar10", *flags, "--epochs", "1", "--out", folder])
        device = moco.pick_device(args.device)
        torch.manual_seed(0)
        images = torch.randint(
            256, (8 * args.batch_size, 3, 32, 32), dtype=torch.uint8, device=device
        )
        labels = torch.zeros(len(images), dtype=torch.int64)
        data = common.Dataset(images, labels, images, labels, ["one"])
        model = moco.MoCo(args).to(device, memory_format=torch.channels_last)
        moco.pretrain(model, data, args, moco.training_step, dict)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9, str(device)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, str(device)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--record", type=Path, help="a JSON file to write")
    ours, flags = parser.parse_known_args()
    flags = [*([] if torch.cuda.is_available() else ["--encoder", "small"]), *flags]
    args = moco.parse_args(["--dataset", "cifar10", *flags])
    peaks = {}
    for K in (4096, 65536):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peaks[K], device = pool.apply(peak_memory, ([*flags, "--queue-size", str(K)],))
    queue, logits = (rows * (65536 - 4096) * 4 / 1e9 for rows in (128, args.batch_size))
    print(f"{args.encoder}, batch {args.batch_size}, {device}, torch {torch.__version__}")
    for K, peak in peaks.items():
        print(f"K {K:6}: {peak:.3f} GB")
    more = peaks[65536] - peaks[4096]
    grown = f"the queue itself has grown by {queue:.3f} GB, a batch's logits by {logits:.3f} GB"
    print(f"more by {more:.3f} GB; {grown}")
    if ours.record:
        record = {
            "command": " ".join(["python", *sys.argv]),
            "date": time.strftime("%Y-%m-%d"),
            "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
            "torch": torch.__version__,
            "encoder": args.encoder,
            "batch_size": args.batch_size,
            "peak_memory_gb": peaks,
            "queue_grows_by_gb": queue,
            "logits_grow_by_gb": logits,
        }
        ours.record.write_text(json.dumps(record, indent=2) + "\n")
