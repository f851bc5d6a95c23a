"""What each of several processes does: python tests/processes.py METHOD RUN, started twice by the tests.

Each compares the gradients of two processes with those of one on the whole batch, in double precision, and then
trains with the command line that stands in RUN/words.json, to be looked at by the tests.
"""

import copy
import importlib
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
method, run = sys.argv[1], Path(sys.argv[2])
script = importlib.import_module(method)
RANK, WORLD = script.RANK, script.WORLD


def parameters_after_a_step(network, loss):
    """Gradients of all parameters, as one vector."""
    network.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in network.parameters()])


def compare(name, one, several):
    error = (one - several).abs().max().item() / one.abs().max().item()
    (run / f"{name}-{RANK}.txt").write_text(str(error))


def simclr_gradients():
    x = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(0)).double()  # two views of twelve images
    torch.manual_seed(RANK)  # DistributedDataParallel makes the networks equal
    network = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double())
    alone = copy.deepcopy(network.module)
    mine = x[:, RANK::WORLD].flatten(0, 1)
    z1, z2 = network(mine).chunk(2)
    loss = script.nt_xent(script.gather(z1), script.gather(z2), 0.3)
    order = torch.cat([torch.arange(12)[rank::WORLD] for rank in range(WORLD)])
    whole = script.nt_xent(*(alone(view) for view in x[:, order]), 0.3)
    compare("loss", whole.detach()[None], loss.detach()[None])
    compare("gradient", parameters_after_a_step(alone, whole), parameters_after_a_step(network, loss))


def moco_gradients():
    words = ["--encoder", "small", "--queue-size", "20", "--batch-size", "8", "--bn-groups", "2"]
    args = script.parse_args(words)
    torch.manual_seed(0)
    model = script.MoCo(args).double().train()
    for module in model.modules():  # in one process the groups of a batch are those of both
        assert not isinstance(module, script.SplitBatchNorm) or module.groups == 1
    alone = copy.deepcopy(model)
    for module in alone.modules():
        if isinstance(module, script.SplitBatchNorm):
            module.groups = WORLD
    x_q, x_k = torch.rand(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    query_encoder = nn.parallel.DistributedDataParallel(model.query_encoder)
    query = F.normalize(query_encoder(x_q.chunk(WORLD)[RANK]), dim=1)
    keys = model.keys(x_k.chunk(WORLD)[RANK], torch.Generator().manual_seed(10 + RANK))  # of different generators
    loss = script.info_nce(query, F.normalize(keys.chunk(WORLD)[RANK], dim=1), model.queue, 0.2)

    order = torch.randperm(8, generator=torch.Generator().manual_seed(10))  # process 0 decides
    key = alone.key_encoder(x_k[order])[order.argsort()]
    compare("keys", key, keys)
    whole = script.info_nce(F.normalize(alone.query_encoder(x_q), dim=1), F.normalize(key, dim=1), alone.queue, 0.2)
    gradients = parameters_after_a_step(query_encoder, loss)
    compare("gradient", parameters_after_a_step(alone.query_encoder, whole), gradients)


if __name__ == "__main__":
    args = script.parse_args(json.loads((run / "words.json").read_text()))
    script.pick_device("cpu")  # the processes meet
    {"simclr": simclr_gradients, "moco": moco_gradients}[method]()
    models, pretrain = [], script.pretrain

    def remembered(model, *rest):
        models.append(model)
        return pretrain(model, *rest)

    script.pretrain = remembered
    summary = script.main(args)
    state = {k: v for k, v in models[0].state_dict().items() if "running" not in k and "num_batches" not in k}
    torch.save(state, run / f"model-{RANK}.pt")
    (run / f"summary-{RANK}.json").write_text(json.dumps(summary))
    dist.destroy_process_group()
