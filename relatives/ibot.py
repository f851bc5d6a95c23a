"""iBOT is DINO that predicts patches as well: the student sees a part of them as mask tokens.

The teacher sees all patches. Its output on a masked one, a distribution over K logits as for the
class token, is what the student has to predict there from the patches around it. So iBOT is masked
modeling as in BERT, whose vocabulary is learned on the way. DINOv2 and v3 are built on this loss,
with two more parts that can be tried here: KoLeo, which drives the class tokens of a batch apart,
and targets that are balanced by Sinkhorn and Knopp's algorithm, as in swav.py, and not by a center.

    Zhou, Wei, Wang, Shen, Xie, Yuille, Kong: iBOT: Image BERT Pre-Training with Online Tokenizer,
    ICLR 2022. Equation 2 of the paper, over the set M of masked patches of both global views, for
    the teacher's P_t of the whole view and the student's P_s of the masked one:

    L = L_DINO - 1/|M| sum_{i in M} sum_k P_t(i)_k log P_s(i)_k
    KoLeo(x) = - mean over n of log min_{m != n} |x_n - x_m|          |x_n| = 1 (DINOv2)

    python relatives/ibot.py --dataset cifar10                        dino.py's flags, and some more
    python relatives/ibot.py --koleo 0.1 --sinkhorn                   as in DINOv2

In the paper only half of the views are masked, in blocks of varying size.
"""

import dataclasses
import sys
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import dino
from relatives.swav import sinkhorn


@dataclasses.dataclass
class Args(dino.Args):
    script: str = "relatives/ibot.py"
    mask_ratio: float = dino.flag(0.3, "fraction of masked patches; paper: 0.1 to 0.5", 0.01, 0.99)
    koleo: float = dino.flag(0.0, "weight of KoLeo; DINOv2: 0.1", 0)
    sinkhorn: bool = dino.flag(False, "balance the targets of a batch, instead of centering them")
    show: ClassVar = ()  # class variables are no flags: dino.py --show --init encoder.pt draws,
    compile: ClassVar = False  # and networks are called part by part


class IBOT(dino.DINO):
    """DINO with a mask token in both networks, of which the teacher's is not used, and with a
    center for patches."""

    def __init__(self, args, image_size=32):
        super().__init__(args, image_size)
        D = self.student.encoder.pos_embed.shape[2]
        self.student.mask_token = nn.Parameter(torch.zeros(D))
        self.teacher.mask_token = nn.Parameter(torch.zeros(D), requires_grad=False)
        self.register_buffer("patch_center", torch.zeros(args.out_dim))

    def forward(self, mask, views, *local_views):
        """Global views (2N, 3, S, S), of which the student sees no patch in mask (2N, L), maybe
        local ones -> the student's class tokens of all V views of N images (V N, D); and logits, of
        student and teacher: of class tokens (V N, K), (2N, K), of masked patches (M, K) each."""
        patches = self.student.encoder.embed(views)  # (2N, L, D)
        patches = torch.where(mask[:, :, None], self.student.mask_token, patches)
        tokens = self.student.encoder.encode(patches)  # (2N, 1 + L, D)
        small = [self.student.encoder.tokens(x)[:, 0] for x in local_views]
        class_tokens = torch.cat([tokens[:, 0], *small])
        whole = self.teacher.encoder.tokens(views)
        return (
            class_tokens,
            self.student.head(class_tokens),
            self.teacher.head(whole[:, 0]),
            self.student.head(tokens[:, 1:][mask]),
            self.teacher.head(whole[:, 1:][mask]),
        )


def random_mask(B, L, mask_ratio, generator, device):
    """True for the fraction mask_ratio of L patches, but at least one: (B, L)."""
    noise = torch.rand(B, L, generator=generator, device=device)
    return noise.argsort(1).argsort(1) < max(1, round(mask_ratio * L))


def make_targets(logits, center, temperature, balanced):
    """The teacher's logits (B, K) -> P_t (B, K), centered and sharpened, or balanced over the batch
    of this process."""
    if balanced:
        return sinkhorn(logits.detach(), temperature)
    return ((logits.detach() - center) / temperature).softmax(1)


def koleo_loss(x):
    """Class tokens of one view of N images (N, D), normalized in here -> scalar."""
    x = F.normalize(x, dim=1)
    cosines = (x @ x.T).fill_diagonal_(-1)
    nearest = x[cosines.argmax(1)]
    return -((x - nearest).norm(dim=1) + 1e-8).log().mean()


def training_step(network, images, args, generator, progress, update):
    """Uint8 images (N, 3, S, S); update(loss, progress) trains the student. Returns what to log."""
    model = getattr(network, "module", network)  # without DistributedDataParallel around it
    N = len(images)
    tau_s = 0.1
    warm = min(1.0, progress / 0.3)
    tau_t = (1 - warm) * args.teacher_temperature_start + warm * args.teacher_temperature
    views = [common.normalize(x) for x in dino.multi_crop(images, args, generator)]
    L = model.student.encoder.pos_embed.shape[1] - 1
    mask = random_mask(2 * N, L, args.mask_ratio, generator, images.device)
    with dino.autocast(images.device):
        class_tokens, *logits = network(mask, *views)
    student, teacher, student_patches, teacher_patches = [x.float() for x in logits]

    targets = make_targets(teacher, model.center, tau_t, args.sinkhorn).chunk(2)  # (N, K) each
    predictions = (student / tau_s).split(N)
    pairs = [(p, t) for i, t in enumerate(targets) for j, p in enumerate(predictions) if i != j]
    class_loss = sum(F.cross_entropy(p, t) for p, t in pairs) / len(pairs)  # as dino_loss
    patch_targets = make_targets(teacher_patches, model.patch_center, tau_t, args.sinkhorn)
    patch_loss = F.cross_entropy(student_patches / tau_s, patch_targets)
    loss = class_loss + patch_loss
    if args.koleo:
        first, second = class_tokens[: 2 * N].float().chunk(2)
        loss = loss + args.koleo * (koleo_loss(first) + koleo_loss(second))
    update(loss, progress)

    momentum = dino.cosine(args.ema_momentum, 1.0, progress)
    dino.update_teacher(model.teacher, model.student, momentum)
    if args.centering:
        model.center = dino.update_center(model.center, teacher[None], 0.9)
        model.patch_center = dino.update_center(model.patch_center, teacher_patches[None], 0.9)
    P = torch.cat(targets)
    terms = {"loss": loss, "class_loss": class_loss, "patch_loss": patch_loss}
    terms["entropy"] = torch.special.entr(P).sum(1).mean()
    terms["entropy_of_mean"] = torch.special.entr(P.mean(0)).sum()
    return terms


if __name__ == "__main__":
    dino.run(Args, __doc__, dino.SHAPES, Model=IBOT, training_step=training_step)
