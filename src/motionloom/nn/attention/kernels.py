"""Attention without a mask that returns its log-sum-exp, and the backward pass for a *given* log-sum-exp.

Ring attention (arXiv 2310.01889) rests on this pair: parts of one softmax computed apart are merged by their
log-sum-exp, and the backward pass of each part needs nothing but the merged output and the merged
log-sum-exp, since p = exp(q k^T / sqrt(D) - lse) is then the true weight.

Shapes: B batch, H heads, N queries, M keys, D channels of a head. Tensors may have any strides but the last
one's; outputs lie in memory as (B, N, H, D).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

Gradients = tuple[Tensor, Tensor, Tensor]

SCORES = 6_500_000
"""Scores that the matrix-product kernel holds at once: what stays in the caches of a CPU."""

_aten = torch.ops.aten


class Kernel(Protocol):
    """One implementation of unmasked attention."""

    name: str
    keeps_lse: bool
    """Whether the backward pass needs the log-sum-exp even of a softmax that is not split."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, need_lse: bool) -> tuple[Tensor, Tensor | None]:
        """(B, H, N, D) and the log-sum-exp (B, H, N), float32 or float64; the latter may be None where it is
        not needed."""
        ...

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None
    ) -> Gradients:
        """Gradients of q, k, v. ``out`` and ``lse`` may be those of a softmax over more keys than ``k``; then
        the gradients are this part's share. ``lse`` is None if it is this part's own and was not kept."""
        ...


class FlashCPU:
    """torch's fused kernel on CPU: near the peak of float32, below half of what bfloat16 products reach."""

    name = "flash"
    keeps_lse = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, need_lse: bool) -> tuple[Tensor, Tensor | None]:
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None
    ) -> Gradients:
        gradients: Gradients = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, False
        )
        return gradients


class FlashCUDA:
    """FlashAttention-2 as torch ships it, for half precision."""

    name = "flash"
    keeps_lse = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, need_lse: bool) -> tuple[Tensor, Tensor | None]:
        out, lse, *_ = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False)
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None
    ) -> Gradients:
        assert lse is not None
        # Without dropout the kernel never reads the generator's state.
        unused = torch.zeros(2, dtype=torch.uint64, device=q.device)
        gradients: Gradients = _aten._scaled_dot_product_flash_attention_backward(
            grad,
            q,
            k,
            v,
            out,
            lse.contiguous(),
            None,
            None,
            q.shape[2],
            k.shape[2],
            0.0,
            False,
            unused,
            unused,
        )
        return gradients


class Products:
    """Matrix products with a softmax between them, in blocks of queries so that few scores exist at once.

    For bfloat16 on CPU, and for what no fused kernel knows. The backward pass computes the scores anew.
    """

    name = "products"
    keeps_lse = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, need_lse: bool) -> tuple[Tensor, Tensor | None]:
        out = _empty_like_tokens(q, v.shape[-1])
        lse = torch.empty(q.shape[:-1], dtype=wide(q.dtype), device=q.device) if need_lse else None
        keys = k.transpose(-1, -2)
        q = q * q.shape[-1] ** -0.5
        for rows in _blocks(q, k):
            scores = q[:, :, rows] @ keys
            p = scores.softmax(-1)
            if lse is not None:
                # The largest weight is exp(largest score - lse): no second pass of exponentials is needed.
                lse[:, :, rows] = scores.amax(-1) - p.amax(-1).to(lse.dtype).log()
            out[:, :, rows] = p @ v
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None
    ) -> Gradients:
        scale = q.shape[-1] ** -0.5
        dq = _empty_like_tokens(q, q.shape[-1])
        dk = dv = None
        keys, values = k.transpose(-1, -2), v.transpose(-1, -2)
        for rows in _blocks(q, k):
            q_rows, grad_rows = q[:, :, rows] * scale, grad[:, :, rows]
            scores, dp = q_rows @ keys, grad_rows @ values
            if lse is None:
                p = scores.softmax(-1)
                ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            else:
                p = scores.sub_(lse[:, :, rows, None]).exp_()
                delta = (grad_rows * out[:, :, rows]).sum(-1, keepdim=True)
                ds = dp.sub_(delta).mul_(p)
            dq[:, :, rows] = (ds @ k).mul_(scale)
            dk_rows, dv_rows = ds.transpose(-1, -2) @ q_rows, p.transpose(-1, -2) @ grad_rows
            dk = dk_rows if dk is None else dk.add_(dk_rows)
            dv = dv_rows if dv is None else dv.add_(dv_rows)
        assert dk is not None
        assert dv is not None
        return dq, dk, dv


class ProductsThenFlash:
    """Forward by products, backward by the fused kernel: in bfloat16 on a CPU that is its better half."""

    name = "products+flash"
    keeps_lse = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, need_lse: bool) -> tuple[Tensor, Tensor | None]:
        return Products().forward(q, k, v, need_lse)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None
    ) -> Gradients:
        return FlashCPU().backward(grad, q, k, v, out, lse)


def kernels_for(q: Tensor, needs_gradient: bool) -> list[Kernel]:
    """The kernels that know the device and type of ``q``, the usually best one first."""
    if q.device.type == "cpu":
        if q.dtype != torch.bfloat16:
            return [FlashCPU()]
        return [Products(), *([ProductsThenFlash()] if needs_gradient else []), FlashCPU()]
    return [FlashCUDA()] if _flash_on_gpu(q) else [Products()]


def _flash_on_gpu(q: Tensor) -> bool:
    half = q.dtype in (torch.bfloat16, torch.float16)
    fits = q.device.type == "cuda" and half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return fits and torch.cuda.get_device_capability(q.device) >= (8, 0)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of a log-sum-exp, and of sums of gradients."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _empty_like_tokens(q: Tensor, channels: int) -> Tensor:
    batch, heads, tokens, _ = q.shape
    return q.new_empty(batch, tokens, heads, channels).transpose(1, 2)


def _blocks(q: Tensor, k: Tensor) -> Iterator[slice]:
    batch, heads, queries, _ = q.shape
    count = -(-batch * heads * queries * k.shape[2] // SCORES)
    size = max(16, -(-queries // count))
    for start in range(0, queries, size):
        yield slice(start, start + size)
