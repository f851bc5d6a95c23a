"""What many negatives cost: python tests/benchmark_memory.py

SimCLR's negatives are the other images of the batch, MoCo's a queue of keys. Memory and time of
both are compared in table 3 of MoCo v2: here two epochs of eight steps on random images, each case
in a process of its own. Memory is the peak above what there was before the first step: of the
tensors on a GPU, of the process on a CPU. Flags are those that both scripts have, by default of
their CIFAR-10 recipe for this device. --record FILE writes what was measured.
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
import simclr  # noqa: E402


def peak(device):
    """GB that were used at most until now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def measure(method, args):
    """Two epochs of eight steps -> GB, and images/s of the second."""
    script = {"simclr": simclr, "moco": moco}[method]
    device = script.pick_device(args.device)
    torch.manual_seed(0)
    count = 8 * args.batch_size
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, device=device)
    labels = torch.zeros(count, dtype=torch.int64)
    data = common.Dataset(images, labels, images, labels, ["one"])
    model = simclr.SimCLR(args) if method == "simclr" else moco.MoCo(args)
    model = model.to(device, memory_format=torch.channels_last)
    before = peak(device)
    with tempfile.TemporaryDirectory() as folder:
        args = dataclasses.replace(args, epochs=2, half_size_until=0.0, out=folder)
        history = script.pretrain(model, data, args, script.training_step, dict)
    return peak(device) - before, count / history[-1]["seconds"]


def main():
    args, file = parse(simclr)
    moco_args, _ = parse(moco)
    cases = []
    for N in (64, 256, 1024):
        cases.append(("simclr", dataclasses.replace(args, batch_size=N)))
        for groups in (1, 8):
            case = dataclasses.replace(moco_args, batch_size=N, bn_groups=groups, queue_size=4096)
            cases.append(("moco", case))
    long = dataclasses.replace(moco_args, batch_size=64, bn_groups=1, queue_size=65536)
    cases.append(("moco", long))
    rows = []
    lines = []
    for method, case in cases:
        with multiprocessing.get_context("spawn").Pool(1) as process:
            memory, rate = process.apply(measure, [method, case])
        row = {"method": method, "batch_size": case.batch_size}
        if method == "moco":
            row |= {"queue_size": case.queue_size, "bn_groups": case.bn_groups}
        rows.append(row | {"gb": memory, "images_per_second": rate})
        name = "  ".join(f"{key} {value}" for key, value in row.items())
        lines.append(f"{name:58}  {memory:.2f} GB  {rate:6.0f} images/s")
    device = simclr.pick_device(args.device)
    report(lines, describe(args, device) | {"rows": rows}, file)


if __name__ == "__main__":
    main()
