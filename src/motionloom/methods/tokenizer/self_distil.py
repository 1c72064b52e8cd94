"""Self-distillation: a student predicts, of parts of a picture, what its own average sees of the whole.

DINO (arXiv 2104.14294) on crops, iBOT (arXiv 2111.07832) on masked patches, put together as in DINOv2 (arXiv
2304.07193), whose numbers are the defaults here.

Shapes: G global and L local crops, B pictures, M tokens, K prototypes, D width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motionloom.nn.init import fill
from motionloom.parallel import Ranks, local

ALONE = Ranks()
STUDENT_TEMPERATURE = 0.1


class Prototypes(nn.Module):
    """Cosines to K directions, each with a gain: a linear layer without bias whose weight is kept as
    ``weight_g`` times the direction of ``weight_v`` (arXiv 1602.07868)."""

    def __init__(self, inputs: int, prototypes: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1))
        self.weight_v = nn.Parameter(torch.zeros(prototypes, inputs))

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., K)."""
        return F.linear(x, self.weight_g * F.normalize(self.weight_v, dim=1))


class DinoHead(nn.Module):
    """What turns tokens into logits over prototypes; the same for CLS tokens and masked patches.

    The names of its weights are those of the published training class: ``mlp.0``, ``mlp.2``, ..., and
    ``last_layer.weight_g`` and ``weight_v``.

    Args:
        width: of the tokens.
        prototypes: K; DINOv2 takes 65,536.
        layers: of the MLP before the prototypes.
    """

    def __init__(
        self, width: int, prototypes: int, hidden: int = 2048, bottleneck: int = 256, layers: int = 3
    ) -> None:
        super().__init__()
        assert layers >= 1
        widths = [width, *[hidden] * (layers - 1), bottleneck]
        parts: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            parts += [nn.Linear(inputs, outputs), nn.GELU()]
        self.mlp = nn.Sequential(*parts[:-1]) if layers > 1 else parts[0]
        self.last_layer = Prototypes(bottleneck, prototypes)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Every weight anew: deviation 0.02, directions of prototypes even over the sphere, gains 1."""
        for part in self.mlp.modules():
            if isinstance(part, nn.Linear):
                part.weight.normal_(std=0.02, generator=generator)
                fill(0.0, part.bias)
        self.last_layer.weight_v.normal_(std=0.02, generator=generator)
        fill(1.0, self.last_layer.weight_g)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> logits (..., K)."""
        x = self.mlp(x)
        return self.last_layer(F.normalize(x, dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12))


class Centre(nn.Module):
    """Keeps all pictures from falling onto one prototype: the running mean of the teacher's logits is taken
    off them (DINO, eq. 4). The mean is state: a buffer, saved with a checkpoint."""

    centre_K: Tensor

    def __init__(self, prototypes: int, momentum: float = 0.9) -> None:
        super().__init__()
        self._momentum = momentum
        self.register_buffer("centre_K", torch.zeros(prototypes))

    @torch.no_grad()
    def targets(self, logits: Tensor, temperature: float) -> Tensor:
        """Teacher's logits (..., K) to probabilities, float32."""
        return ((logits.float() - self.centre_K) / temperature).softmax(dim=-1)

    @torch.no_grad()
    def update(self, logits: Tensor, ranks: Ranks = ALONE) -> None:
        """Move towards the mean of (..., K) over all tokens of all ranks, however many each has."""
        logits_MK = logits.float().flatten(end_dim=-2)
        total = ranks.sum_(torch.cat([logits_MK.sum(dim=0), logits_MK.new_full((1,), len(logits_MK))]))
        mean_K = total[:-1] / total[-1].clamp_min(1)
        # Where no rank has a token there is nothing to move towards.
        self.centre_K.lerp_(torch.where(total[-1] > 0, mean_K, self.centre_K), 1 - self._momentum)


@torch.no_grad()
def sinkhorn(logits: Tensor, temperature: float, ranks: Ranks = ALONE, steps: int = 3) -> Tensor:
    """Teacher's logits (..., K) to probabilities that use all prototypes evenly (SwAV, arXiv 2006.09882).

    Alternately every prototype gets equal mass over the tokens of all ranks, and every token mass 1; in
    logarithms, where no temperature underflows. Float32, of the shape of ``logits``.
    """
    log_MK = logits.float().flatten(end_dim=-2) / temperature
    for _ in range(steps):
        here_K = log_MK.logsumexp(dim=0)
        most_K = ranks.max_(here_K.clone())
        log_MK = log_MK - most_K - ranks.sum_((here_K - most_K).exp()).log()
        log_MK = log_MK.log_softmax(dim=1)
    return log_MK.exp().view(logits.shape)


def dino_loss(
    global_GBK: Tensor, local_LBK: Tensor, target_GBK: Tensor, temperature: float = STUDENT_TEMPERATURE
) -> Tensor:
    """Every crop of the student predicts what the teacher says of every *other* global crop (DINO, eq. 3).

    Args:
        global_GBK, local_LBK: student's logits; L may be 0.
        target_GBK: teacher's probabilities of the same global crops, in the same order.

    Returns:
        (B,) cross-entropy, the mean over all G (G - 1) + L G pairs of crops.
    """
    crops, locals_ = len(global_GBK), len(local_LBK)
    pairs = crops * (crops - 1) + locals_ * crops
    assert pairs > 0, "one crop has no other to predict"
    all_BK = target_GBK.sum(dim=0)
    cross_B = -(_log(global_GBK, temperature) * (all_BK - target_GBK)).sum(dim=(0, -1))
    if locals_:
        cross_B = cross_B - (_log(local_LBK, temperature).sum(dim=0) * all_BK).sum(dim=-1)
    return cross_B / pairs


def ibot_loss(
    student_MK: Tensor,
    target_MK: Tensor,
    image_M: Tensor,
    weight_B: Tensor,
    temperature: float = STUDENT_TEMPERATURE,
) -> Tensor:
    """Masked patches are predicted from the others (iBOT; the mean over each image is DINOv2's).

    Args:
        student_MK: student's logits at the masked patches of all images.
        target_MK: teacher's probabilities at the same patches of the whole images.
        image_M: index in B of each patch's image, int64.
        weight_B: one over the number of an image's masked patches (``crops.Masks.weight_B``).

    Returns:
        (B,) cross-entropy, 0 for an image without a mask.
    """
    cross_M = -(_log(student_MK, temperature) * target_MK).sum(dim=-1)
    return torch.zeros_like(weight_B).index_add(0, image_M, cross_M * weight_B[image_M])


def koleo(x_BD: Tensor, eps: float = 1e-8) -> Tensor:
    """Spreads embeddings: minus the logarithm of each one's distance to its nearest neighbour on the sphere
    (arXiv 1806.03198; as in DINOv2 within one rank, on the CLS tokens of one global crop).

    Returns:
        (B,), float32; 0 for a batch of one, which has no neighbour.
    """
    with torch.autocast(x_BD.device.type, enabled=False):
        x_BD = F.normalize(x_BD.float(), dim=-1, eps=eps)
        if len(x_BD) < 2:
            return 0 * x_BD.sum(dim=-1)
        with torch.no_grad():
            nearest_B = (x_BD @ x_BD.T).fill_diagonal_(-2).argmax(dim=1)
        # Within the root, for equal embeddings have a distance of 0, whose root has no slope.
        distance_B = ((x_BD - x_BD[nearest_B]).square().sum(dim=1) + eps**2).sqrt()
        return -(distance_B + eps).log()


def teacher_temperature(step: int, warmup_steps: int, begin: float = 0.04, end: float = 0.07) -> float:
    """From ``begin`` to ``end`` in a straight line over the warm-up (DINO), then constant."""
    return end if step >= warmup_steps else begin + (end - begin) * step / warmup_steps


def teacher_momentum(step: int, steps: int, begin: float = 0.992, end: float = 1.0) -> float:
    """Share that the teacher keeps of itself at a step of ``steps``: half a cosine from ``begin`` to ``end``
    (DINO, sec. 3.1)."""
    share = min(step / steps, 1.0)
    return end - (end - begin) * (1 + math.cos(math.pi * share)) / 2


class Teacher(nn.Module):
    """The student's average: a deep copy of its trunk and of its heads, which no gradient ever reaches.

    It begins as the student is when this is made. It is state of a run: give it to the trainer as a module of
    its own (``Method.beside``), and a checkpoint holds it whole. It has no drop-out: it never leaves
    evaluation.

    Args:
        trunk: the student's, called as it is.
        heads: of the student, by name.
    """

    saved_whole = True

    def __init__(self, trunk: nn.Module, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.trunk = copy.deepcopy(trunk)
        self.heads = nn.ModuleDict({name: copy.deepcopy(head) for name, head in heads.items()})
        # In a tuple, so that the student is no part of its teacher.
        self._pairs = (
            (self.trunk, trunk),
            *((copied, heads[name]) for name, copied in self.heads.items()),
        )
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation, whatever is asked for."""
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The trunk's answer, without a graph."""
        return self.trunk(*args, **kwargs)

    @torch.no_grad()
    def logits(self, head: str, x: Tensor) -> Tensor:
        """A head's answer to tokens (..., D), without a graph."""
        return self.heads[head](x)

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """Keep ``momentum`` of every weight and take the rest from the student; 0 makes them equal. Buffers
        are the student's."""
        for copied, student in self._pairs:
            weights = [local(p) for p in copied.parameters()]
            torch._foreach_lerp_(weights, [local(p) for p in student.parameters()], 1 - momentum)
            for mine, theirs in zip(copied.buffers(), student.buffers(), strict=True):
                mine.copy_(theirs)


def _log(logits: Tensor, temperature: float) -> Tensor:
    return (logits.float() / temperature).log_softmax(dim=-1)
