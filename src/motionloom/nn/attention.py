"""Exact softmax attention, by the quickest way on the device at hand.

Shapes: B batch, H heads, N queries, M keys, D channels of a head; ``...`` any leading dimensions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MATMUL_SCORES = 2**28
"""Above so many scores the CPU goes back to SDPA, which never holds them all."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v.

    Args:
        q, k, v: (..., H, N, D), (..., H, M, D), (..., H, M, D), of one dtype.
        mask: broadcastable to (..., H, N, M). Boolean, True where the query may look; or that mask after
            :func:`prepare_mask`. Every query must see at least one key.

    Returns:
        (..., H, N, D).
    """
    # SDPA's CPU kernels run at the speed of float32 vector code whatever the dtype, and lose their way in
    # many small problems (windows, single cells through time). Two matrix products and a softmax keep the
    # bf16 matrix unit busy: 3 to 8 times faster, forward and backward, at the price of storing the scores.
    if q.device.type == "cpu" and q.shape[:-1].numel() * k.shape[-2] <= MATMUL_SCORES:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(-1).to(v.dtype) @ v
    return _sdpa(q, k, v, mask)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Fused kernels want four dimensions, so all leading ones are folded into one."""
    if mask is not None:
        mask = mask.broadcast_to(*q.shape[:-3], *mask.shape[-3:]).flatten(0, -4)
        if mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
    out = F.scaled_dot_product_attention(*(t.flatten(0, -4) for t in (q, k, v)), attn_mask=mask)
    return out.unflatten(0, q.shape[:-3])


def prepare_mask(mask: Tensor | None) -> Tensor | None:
    """A boolean mask in the form that :func:`attend` reads fastest, for use in many layers.

    On CPU: 0 where the query may look and -inf elsewhere, since compiled loops read booleans slowly.
    """
    if mask is None or mask.device.type != "cpu":
        return mask
    return torch.zeros(mask.shape).masked_fill_(~mask, float("-inf"))


def split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(..., N, parts x H x D) -> ``parts`` tensors (..., N, H, D): queries, keys, values in token order."""
    return x.unflatten(-1, (parts, heads, -1)).unbind(-3)


def join_heads(x: Tensor) -> Tensor:
    """(..., H, N, D) -> (..., N, H x D)."""
    return x.transpose(-3, -2).flatten(-2)
