"""A batch over all ranks, through which gradients find back to the rank that made each sample.

Shapes: B samples of one rank, W ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from motionloom.parallel.ranks import Ranks


def gather(x_B: Tensor, ranks: Ranks) -> Tensor:
    """(B, ...) of every rank in the order of ranks, (W * B, ...); itself where there is one process.

    The gradient of a sample is the sum over ranks of what their losses say of it. With losses that are means
    over each rank's own samples, and gradients that are averaged over ranks, that makes the gradient of one
    process with the joined batch. All ranks must call it alike, with equally many samples.
    """
    if ranks.world == 1:
        return x_B
    gathered: Tensor = _Gather.apply(x_B, ranks)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_B: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks, ctx.samples = ranks, len(x_B)
        parts = [torch.empty_like(x_B, memory_format=torch.contiguous_format) for _ in range(ranks.world)]
        dist.all_gather(parts, x_B.contiguous())
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # Gloo scatters no sums, and embeddings are small beside what made them: all ranks get all sums.
        summed = ctx.ranks.sum_(grads[0].clone(memory_format=torch.contiguous_format))
        begin = ctx.ranks.rank * ctx.samples
        return summed[begin : begin + ctx.samples], None
