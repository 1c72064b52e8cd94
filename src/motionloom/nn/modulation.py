"""How noise reaches the layers: adaLN-Zero with one shared projection and a small table per block.

The shared projection is PixArt's adaLN-single (arXiv 2310.00426, section 2.3): per-block projections as in
DiT (arXiv 2212.09748) hold a third of a model's weights and buy nothing.

Shapes: B batch, N tokens, K noise levels, D channels, P parts (shift, scale, gate of each layer).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motionloom.nn.init import fill
from motionloom.nn.mlp import Embedder

FEATURES = 256


def sinusoid(t: Tensor, features: int = FEATURES) -> Tensor:
    """(...) -> (..., features): cosines and sines of t at periods from 2 pi to 2 pi x 10^4."""
    half = features // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angle = t[..., None] * torch.exp(-math.log(1e4) * exponent)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TimestepEmbedding(Embedder):
    """Sines and cosines of a timestep through Linear, SiLU, Linear; diffusers' names of weights."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__(features, outputs, nn.SiLU())

    def forward(self, t: Tensor) -> Tensor:
        """(...) -> (..., outputs), in the dtype of the weights outside of autocast."""
        features = sinusoid(t.float(), self.linear_1.in_features)
        return super().forward(features.to(self.linear_1.weight.dtype))


class NoiseModulation(nn.Module):
    """Noise levels -> what every layer is shifted, scaled and gated by."""

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.embed = nn.Linear(FEATURES, dim)
        self.mix = nn.Linear(dim, dim)
        self.project = nn.Linear(dim, parts * dim)

    def init_weights(self) -> None:
        """adaLN-Zero: nothing is shifted, scaled or let through a gate at the start."""
        fill(0.0, self.project.weight, self.project.bias)

    def forward(self, sigma_BK: Tensor) -> Tensor:
        """(B, K) -> (B, K, P, D), in the dtype of the weights."""
        dtype = self.embed.weight.dtype
        hidden = self.mix(F.silu(self.embed(sinusoid(sigma_BK.float() * 1000).to(dtype))))
        return self.project(F.silu(hidden)).unflatten(-1, (self.parts, -1)).to(dtype)


def one_hot_levels(level_BN: Tensor, levels: int, dtype: torch.dtype) -> Tensor | None:
    """Which of K levels each token has, for :func:`per_token`; None if there is only one."""
    if levels == 1:
        return None
    return F.one_hot(level_BN, levels).to(dtype)


def per_token(modulation_BKPD: Tensor, one_hot_BNK: Tensor | None) -> tuple[Tensor, ...]:
    """Every token's P vectors, (B, N or 1, D) each.

    Looking up rows is written as a product with a one-hot matrix: exact, and its gradient is a matrix
    product as well instead of a scattered sum.
    """
    if one_hot_BNK is None:
        return modulation_BKPD.unbind(2)
    spread_BNX = one_hot_BNK @ modulation_BKPD.flatten(2)
    return spread_BNX.unflatten(-1, modulation_BKPD.shape[2:]).unbind(2)


def at_levels(table_BKPD: Tensor, level_BN: Tensor | None) -> tuple[Tensor, ...]:
    """Every token's P vectors, (B, N or 1, D) each, bit-equal to the rows of the table.

    What :func:`per_token` computes, where rounding must not happen: autocast would round its product.

    Args:
        level_BN: (B or 1, N); None where there is one level.
    """
    if level_BN is None:
        return table_BKPD.unbind(2)
    rows_BNX: Tensor = _Rows.apply(table_BKPD.flatten(2), level_BN)
    return rows_BNX.unflatten(-1, table_BKPD.shape[2:]).unbind(2)


class _Rows(torch.autograd.Function):
    """Rows (B, N, X) of tables (B, K, X). The gradient is a product with a one-hot matrix: autograd would
    have all tokens of a level wait for each other to add theirs, in an order that changes from run to run."""

    @staticmethod
    def forward(ctx: Any, table_BKX: Tensor, level_BN: Tensor) -> Tensor:
        ctx.save_for_backward(level_BN)
        ctx.shape = table_BKX.shape
        return table_BKX.take_along_dim(level_BN[..., None], dim=1)

    @staticmethod
    def backward(ctx: Any, grad_BNX: Tensor) -> tuple[Tensor, None]:
        (level_BN,) = ctx.saved_tensors
        one_hot_BNK = F.one_hot(level_BN, ctx.shape[1]).to(grad_BNX.dtype)
        return (one_hot_BNK.transpose(1, 2) @ grad_BNX).sum_to_size(ctx.shape), None
