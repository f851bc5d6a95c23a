"""What a longer queue costs in memory: python tests/benchmark_queue.py

An epoch of moco.py on a few random images with K = 4096 and with K = 65536, each in a process of
its own, and the peak of its memory: on a GPU that of the tensors, on a CPU that of the process.
Other flags are those of moco.py, by default of its CIFAR-10 recipe for this device. --record FILE
writes what was measured.
"""

import dataclasses
import multiprocessing
import resource
import sys
import tempfile
from pathlib import Path

import torch
from benchmark import describe, parse, report

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402
import moco  # noqa: E402


def peak_memory(args):
    """moco.pretrain for eight steps -> GB."""
    device = moco.pick_device(args.device)
    torch.manual_seed(0)
    count = 8 * args.batch_size
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, device=device)
    labels = torch.zeros(count, dtype=torch.int64)
    data = common.Dataset(images, labels, images, labels, ["one"])
    model = moco.MoCo(args).to(device, memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as folder:
        args = dataclasses.replace(args, epochs=1, out=folder)
        moco.pretrain(model, data, args, moco.training_step, dict)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def main():
    args, file = parse(moco)
    peaks = {}
    for K in (4096, 65536):
        with multiprocessing.get_context("spawn").Pool(1) as process:
            peaks[K] = process.apply(peak_memory, [dataclasses.replace(args, queue_size=K)])
    keys = 65536 - 4096
    queue = keys * 128 * 4 / 1e9  # C values of 4 bytes for each key
    logits = keys * args.batch_size * 4 / 1e9
    record = describe(args, moco.pick_device(args.device)) | {"peak_memory_gb": peaks}
    record |= {"queue_grows_by_gb": queue, "logits_grow_by_gb": logits}
    lines = [f"K {K:6}: {peak:.3f} GB" for K, peak in peaks.items()]
    more = peaks[65536] - peaks[4096]
    grown = f"the queue itself has grown by {queue:.3f} GB, a batch's logits by {logits:.3f} GB"
    report([*lines, f"more by {more:.3f} GB; {grown}"], record, file)


if __name__ == "__main__":
    main()
