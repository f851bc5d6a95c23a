"""What two processes do that conftest.py starts: python tests/processes.py FOLDER

With each script that stands in FOLDER/commands.json they compare the gradients of both processes with those of one on
the whole batch, in double precision, and then train with its command lines, one after the other.
"""

import copy
import dataclasses
import io
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import clip  # noqa: E402
import common  # noqa: E402
from clip import RANK, WORLD  # noqa: E402

FOLDER = Path(sys.argv[1])


def parameters_after_a_step(network, loss):
    """Gradients of all parameters, as one vector."""
    network.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in network.parameters()])


def compare(name, one, several):
    error = (one - several).abs().max().item() / one.abs().max().item()
    (FOLDER / f"{name}-{RANK}.txt").write_text(str(error))


def clip_gradients():
    args = clip.parse_args(["--text-width", "64"])
    torch.manual_seed(0)
    model = clip.CLIP(args, vocabulary=9).double().eval()  # batch norm is not synchronized on CPUs
    alone, network = copy.deepcopy(model), nn.parallel.DistributedDataParallel(model)
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    tokens = torch.randint(4, 9, (6, args.context), generator=torch.Generator().manual_seed(2))
    tokens[:, 0], tokens[:, 5] = 1, 2
    x, y, scale = network(images[RANK::WORLD], tokens[RANK::WORLD])
    loss = clip.clip_loss(clip.gather(x), clip.gather(y), scale)
    whole = clip.clip_loss(*alone(images, tokens))
    compare("clip-loss", whole.detach()[None], loss.detach()[None])
    compare("clip-gradient", parameters_after_a_step(alone, whole), parameters_after_a_step(network, loss))
    compare("clip-scale-gradient", alone.log_scale.grad, model.log_scale.grad)


def train(script, run):
    """What run() trains with the script -> its model, but for what differs between processes: batch norm's running
    statistics."""
    models, pretrain = [], script.pretrain
    script.pretrain = lambda model, *rest: models.append(model) or pretrain(model, *rest)
    run()
    script.pretrain = pretrain
    return {k: v for k, v in models[0].state_dict().items() if "running" not in k and "num_batches" not in k}


if __name__ == "__main__":
    clip.pick_device("cpu")  # the processes meet
    clip_gradients()
    data, few = common.shapes_dataset(), {}
    for split, count in (("train", 120), ("test", 40)):
        for part in ("images", "labels", "captions", "colors"):
            few[f"{split}_{part}"] = getattr(data, f"{split}_{part}")[:count]
    common.shapes_dataset = lambda: dataclasses.replace(data, **few)
    scripts = {"clip": clip}
    sys.stdout = sys.stdout or io.TextIOWrapper(io.BytesIO())  # of process 1, which prints nothing
    for name, commands in json.loads((FOLDER / "commands.json").read_text()).items():
        for words in commands:
            state = train(scripts[name], lambda: scripts[name].main(scripts[name].parse_args(words)))  # noqa: B023
        torch.save(state, FOLDER / f"{name}-{RANK}.pt")
    dist.destroy_process_group()
