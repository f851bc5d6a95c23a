"""SupCon is SimCLR with labels: every other view of the same class is a positive.

SimCLR's positives are two views of one image, and images of the same class are negatives. Here the
labels correct that, and the rest stays. So it is no self-supervised method, but the ceiling for
those that are: how far this loss, these views and this encoder would come if the positives were
known. With labels that are all different it is SimCLR, to the last digit.

    Khosla, Teterwak, Wang, Sarna, Tian, Isola, Maschinot, Liu, Krishnan: Supervised Contrastive
    Learning, NeurIPS 2020. Equation 2 of the paper, L_out, for the set P(i) of all other views with
    the label of view i; z have unit length, t is the temperature:

    L = - mean over i of  1/|P(i)| sum_{p in P(i)} log p_ip
    p_ip = exp(z_i . z_p / t) / sum_{a != i} exp(z_i . z_a / t)

    python relatives/supcon.py --dataset cifar10 --compile                      simclr.py's flags
"""

import dataclasses
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import simclr


@dataclasses.dataclass
class Args(simclr.Args):
    script: str = "relatives/supcon.py"


def supcon_loss(z1, z2, labels, temperature):
    """Projections of the two views of N images (N, D) each, normalized in here, and labels (N,) ->
    scalar, in nats."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)  # (2N, D)
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)  # a != i
    log_p = logits.log_softmax(1)  # (2N, 2N)
    labels = labels.repeat(2)
    positive = (labels[:, None] == labels).fill_diagonal_(False)  # P(i), a row for each i
    return -(log_p.masked_fill(~positive, 0).sum(1) / positive.sum(1)).mean()


def training_step(network, images, labels, args, generator, progress, update):
    """Uint8 images (N, 3, S, S) and labels (N,); update(loss) trains the network. Returns what to
    log."""
    x = common.normalize(simclr.two_views(images, args, generator, progress))  # (2N, 3, size, size)
    with simclr.autocast(x.device):
        z = network(x)
    z1, z2 = map(simclr.gather, z.float().chunk(2))  # (WORLD N, D) each: of all processes
    loss = supcon_loss(z1, z2, simclr.gather(labels), args.temperature)
    update(loss)
    return {"loss": loss, "spread": simclr.spread(z1)}


def learn(model, data, args, training_step, monitor):
    """simclr.pretrain, whose steps get labels as well. Which images a step has follows from the
    number of steps before it."""
    M = len(data.train_images)
    if len(data.train_labels) < M or not data.classes:
        raise common.UserError(f"--dataset {args.dataset}: every training image needs a label")
    N = args.batch_size // simclr.WORLD
    steps = M // args.batch_size

    def step(network, images, args, generator, progress, update):
        epoch, done = divmod(round(progress * args.epochs * steps), steps)
        world = simclr.RANK, simclr.WORLD
        order, _ = common.epoch_order(M, args.batch_size, args.seed, 1 + epoch, *world)
        rows = order[done * N : (done + 1) * N].to(data.train_labels.device)
        labels = data.train_labels[rows]
        return training_step(network, images, labels, args, generator, progress, update)

    return simclr.pretrain(model, data, args, step, monitor)


if __name__ == "__main__":
    simclr.run(Args, __doc__, training_step=training_step, learn=learn)
