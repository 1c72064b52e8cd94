"""Exact softmax attention, by the quickest way on the device at hand.

Shapes: H heads, N queries, M keys, D channels of a head; ``...`` any leading dimensions, batch first.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

MATMUL_KEYS = 1024
"""Beyond so many keys the CPU goes back to SDPA, which never holds all scores."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v.

    Args:
        q, k, v: (..., H, N, D), (..., H, M, D), (..., H, M, D), of one dtype.
        mask: broadcastable to (..., H, N, M). Boolean, True where the query may look; or such a mask after
            :func:`prepare_mask`; or what is added to the scores, which may be learned. Every query must see
            at least one key.

    Returns:
        (..., H, N, D).
    """
    few_keys = k.shape[-2] <= MATMUL_KEYS
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and few_keys:
        return matmul_attention(q, k, v, mask)
    return fused_attention(q, k, v, mask)


def prepare_mask(mask: Tensor | None) -> Tensor | None:
    """A boolean mask in the form that :func:`attend` reads fastest, for use in many layers.

    On CPU: 0 where the query may look and -inf elsewhere, since compiled loops read booleans slowly.
    """
    if mask is None or mask.device.type != "cpu":
        return mask
    return torch.zeros(mask.shape).masked_fill_(~mask, float("-inf"))


def matmul_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """:func:`attend` as two matrix products with a softmax between them.

    For bfloat16 on CPU: SDPA's kernels there run at the speed of float32 vector code, and 3 to 8 times slower
    than this, forward and backward, on many small problems (windows, single cells through time). The price is
    that the scores are stored.
    """
    out: Tensor = _Matmul.apply(q * q.shape[-1] ** -0.5, k, v, mask)
    return out


class _Matmul(torch.autograd.Function):
    """Attention as matrix products. The gradient is written out so that those of queries, keys and values all
    come in the order of their tokens: autograd would leave the keys' transposed, which is slow to read."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = q @ k.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        p = scores.softmax(-1).to(v.dtype)
        ctx.save_for_backward(q, k, v, p)
        ctx.bias = None if mask is None else (mask.dtype, mask.shape)
        return p @ v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        q, k, v, p = ctx.saved_tensors
        grad = grad.to(v.dtype)
        # dL/dscores = p (dL/dp - sum(p dL/dp)), softmax's own backward.
        grad_scores = torch._softmax_backward_data(grad @ v.transpose(-1, -2), p, -1, p.dtype)
        bias = None
        if ctx.needs_input_grad[3]:  # what is added to the scores is learned
            dtype, shape = ctx.bias
            bias = grad_scores.to(dtype).sum_to_size(shape)
        return grad_scores @ k, grad_scores.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad, bias


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """:func:`attend` by torch's SDPA. Its fused kernels want four dimensions, so all leading ones are folded
    into one."""
    lead = q.shape[:-3]
    if mask is not None:
        mask = mask if mask.ndim > 2 else mask[None]
        mask = mask.broadcast_to(*lead, *mask.shape[-3:]).flatten(0, -4)
        if mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
    q, k, v = (t.flatten(0, -4) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).unflatten(0, lead)


def split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(..., N, parts x H x D) -> ``parts`` tensors (..., N, H, D): queries, keys, values in token order."""
    return x.unflatten(-1, (parts, heads, -1)).unbind(-3)


def join_heads(x: Tensor) -> Tensor:
    """(..., H, N, D) -> (..., N, H x D)."""
    return x.transpose(-3, -2).flatten(-2)
