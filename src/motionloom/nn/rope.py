"""Rotary positions for real-valued coordinates: seconds and pixels instead of indices (arXiv 2104.09864).

Attention then depends on how far apart two tokens are in the world, not in the grid: clips of other frame
rates, sizes and tokenizers share one scale.

Shapes: B batch, N tokens, A axes, D channels of a head (D/2 rotated pairs).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """One coordinate and the band of frequencies that reads it."""

    fastest: float
    """Radians per unit of the quickest pair; about 1 radian between neighbouring tokens tells them apart."""
    slowest: float
    """Radians per unit of the slowest pair; its period bounds what stays unambiguous."""

    def frequencies(self, pairs: int) -> Tensor:
        """Geometric from fastest to slowest, (pairs,) float32."""
        return torch.logspace(math.log2(self.fastest), math.log2(self.slowest), pairs, base=2.0)


TIME = Axis(fastest=8.0, slowest=1 / 32)
"""Seconds: latent frames are 1/16 to 1/4 s apart, 0.5 to 2 radians; the slowest period is 200 s."""
SOUND = Axis(fastest=32.0, slowest=1 / 32)
"""Seconds of sound, and of what is heard with it: latents are 1/16 to 1/25 s apart, 1.3 to 2 radians."""
SPACE = Axis(fastest=1 / 8, slowest=1 / 1024)
"""Pixels: cells are 8 to 16 pixels apart, 1 to 2 radians; the slowest period is 6,400 pixels."""

Rotary = tuple[Tensor, Tensor]
"""(cos, sin) tables, (..., N, D) each; the sine carries the sign of its half."""


def rotary(position_BNA: Tensor, axes: tuple[Axis, ...], dim: int) -> Rotary:
    """Tables for :func:`rotate`. The pairs are dealt to the axes: the first axis takes what the others leave.

    With three axes the others take 3/8 each, so (time, down, right) split a head of 64 into 16, 24, 24.

    Args:
        position_BNA: float32 coordinates, one column per axis.
        dim: channels of a head, even.
    """
    pairs = dim // 2
    other = pairs * 3 // 8 if len(axes) > 2 else pairs // len(axes)
    shares = [pairs - other * (len(axes) - 1)] + [other] * (len(axes) - 1)
    angle = torch.cat(
        [
            position_BNA[..., i, None] * axis.frequencies(share).to(position_BNA.device)
            for i, (axis, share) in enumerate(zip(axes, shares, strict=True))
        ],
        dim=-1,
    )
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, tables: Rotary) -> Tensor:
    """Turn pairs (i, i + D/2) of the last dimension by the token's angles; tables broadcast over heads."""
    cos, sin = tables
    # Swapping halves by flip keeps the innermost loop contiguous, so that compiled code stays vectorised.
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return x * cos + swapped * sin


def index_rotary(index_BNA: Tensor, pairs: tuple[int, ...], theta: float = 1e4) -> Rotary:
    """Tables for :func:`rotate_pairs` from whole-numbered coordinates: RoPE over indices of a grid.

    Args:
        index_BNA: one column per axis; any number, there is no table to run out of.
        pairs: how many rotated pairs each axis gets, slower and slower from 1 radian per index to 1 / theta.

    Returns:
        float64 (float32 on devices without it): an index of thousands times a rounded frequency would be off.
    """
    dtype = torch.float32 if index_BNA.device.type == "mps" else torch.float64
    angle = torch.cat(
        [
            index_BNA[..., i, None] * theta ** -(torch.arange(n, dtype=dtype, device=index_BNA.device) / n)
            for i, n in enumerate(pairs)
        ],
        dim=-1,
    )
    return pair_tables(angle)


def pair_tables(angle: Tensor) -> Rotary:
    """Tables for :func:`rotate_pairs` from the angle of each pair, (..., D/2)."""
    cos, sin = angle.cos(), angle.sin()
    return cos.repeat_interleave(2, dim=-1), torch.stack([-sin, sin], dim=-1).flatten(-2)


def rotate_pairs(x: Tensor, tables: Rotary) -> Tensor:
    """Turn pairs (2i, 2i + 1) of the last dimension by the token's angles; tables broadcast over heads."""
    cos, sin = tables
    return x * cos + x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) * sin
