"""What VTP's encoder and decoder are both made of. Parameter names are those of the released files.

Shapes: B batch (clips x latent frames), N tokens, D width, H heads, E numbers of a head, h x w grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motionloom.nn.attention import attend, join_heads
from motionloom.nn.init import fill
from motionloom.tokenizers.vtp.config import swiglu_hidden

RopePrecision = Literal["bf16", "fp32"]
Tables = tuple[Tensor, Tensor]
"""Sine and cosine, (h * w, E) each."""


class RMSNorm(nn.Module):
    """x over its root mean square (arXiv 1910.07467), in float32, rounded to x's dtype before the gain."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "rmsnorm": RMSNorm,
    "layernorm": lambda width: nn.LayerNorm(width, eps=1e-6),
}
"""Norms by the config's names."""


class Rope(nn.Module):
    """Axial rotary angles (arXiv 2104.09864) over a grid whose sides are [-1, 1] whatever its size.

    Half of the pairs turn with the row, half with the column; periods are 100^(2i / (E / 2)). The released
    models reckon periods, places, angles and the turned queries and keys in bfloat16, which fp32 does not
    (it differs from what they were trained with by up to .016 in a sine).
    """

    periods: Tensor

    def __init__(self, head_width: int, precision: RopePrecision, base: float = 100.0) -> None:
        super().__init__()
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        pairs = head_width // 4
        exponent = 2 * torch.arange(pairs, dtype=self.dtype) / (head_width // 2)
        self._exact = base ** (2 * torch.arange(pairs) / (head_width // 2))
        self.register_buffer("periods", (base**exponent).to(torch.bfloat16))

    def tables(self, h: int, w: int, device: torch.device) -> Tables:
        """For a grid of h x w tokens, row by row."""
        periods = (self.periods if self.dtype == torch.bfloat16 else self._exact).to(device, self.dtype)
        rows, columns = (torch.arange(0.5, n, dtype=self.dtype, device=device) / n for n in (h, w))
        place_hw2 = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
        place_N2 = 2.0 * place_hw2.flatten(0, 1) - 1.0
        angle = (2 * math.pi * place_N2[:, :, None] / periods).flatten(1)
        angle = torch.cat([angle, angle], dim=-1)
        return angle.sin(), angle.cos()


def turn(x_BHNE: Tensor, tables: Tables) -> Tensor:
    """Rotate the last h * w tokens; those in front stand nowhere. Halves are the pairs.

    All of them pass through the dtype of the tables, as in the released models.
    """
    sin, cos = tables
    front = x_BHNE.shape[2] - sin.shape[0]
    rounded = x_BHNE.to(sin.dtype)
    grid = rounded[:, :, front:]
    low, high = grid.chunk(2, dim=-1)
    turned = grid * cos + torch.cat([-high, low], dim=-1) * sin
    return torch.cat([rounded[:, :, :front], turned], dim=2).to(x_BHNE.dtype)


class Attention(nn.Module):
    """Every token of a latent frame sees all of it."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.q_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()

    def forward(self, x_BND: Tensor, tables: Tables) -> Tensor:
        q, k, v = self.qkv(x_BND).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = turn(self.q_norm(q), tables), turn(self.k_norm(k), tables)
        return self.proj(join_heads(attend(q.to(v.dtype), k.to(v.dtype), v)))


class SwiGLU(nn.Module):
    """w3(silu(w1 x) * w2 x) (arXiv 2002.05202)."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        hidden = swiglu_hidden(width, ratio)
        self.w1, self.w2 = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class LayerScale(nn.Module):
    """A gain per channel on what a layer adds (arXiv 2103.17239)."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.start = start
        self.gamma = nn.Parameter(torch.full((width,), float(start)))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return x * self.gamma


class Drop:
    """Stochastic depth: each layer works on a random part of the batch, and counts for more there.

    As DINOv2 (arXiv 2304.07193, 5): so many samples fewer are computed, not computed and thrown away.

    Args:
        rate: share of the batch that a layer leaves out.
    """

    def __init__(self, rate: float, generator: torch.Generator) -> None:
        assert 0.0 <= rate < 1.0
        self._rate, self._generator = rate, generator

    def add(self, x: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
        """x + layer(x), the layer on a part of the first dimension alone."""
        whole = x.shape[0]
        kept = max(1, round(whole * (1 - self._rate)))
        if kept == whole:
            return x + layer(x)
        order = torch.randperm(whole, generator=self._generator, device=self._generator.device)
        rows = order[:kept].to(x.device)
        change = layer(x[rows]) * (whole / kept)
        return x.index_add(0, rows, change.to(x.dtype))


class Neighbours(nn.Module):
    """What a patch takes from those around it: a depthwise convolution (CPVT, arXiv 2102.10882).

    Attention has to learn from clips alone that patches side by side make an edge. The class token takes no
    part. Adds nothing at the start.
    """

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, side, padding=side // 2, groups=width)

    def init_start(self) -> None:
        """What it adds is 0, so that a model starts as the one without it."""
        fill(0.0, *self.conv.parameters())

    def forward(self, x_BFND: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, F, N, D) -> what it adds; the last h w tokens of N are the patches of ``grid``."""
        front = x_BFND.shape[2] - grid[0] * grid[1]
        x_bDhw = x_BFND[:, :, front:].flatten(0, 1).transpose(1, 2).unflatten(2, grid)
        added_BFND = self.conv(x_bDhw).flatten(2).transpose(1, 2).unflatten(0, x_BFND.shape[:2])
        return F.pad(added_BFND, (0, 0, front, 0))


def no_drop(x: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
    """x + layer(x)."""
    return x + layer(x)


class Block(nn.Module):
    """Norm, attention, norm, SwiGLU, each beside what it changes."""

    def __init__(
        self, width: int, heads: int, ratio: float, norm: str, scale: float | None, qk_norm: bool
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = NORMS[norm](width), NORMS[norm](width)
        self.attn, self.mlp = Attention(width, heads, qk_norm), SwiGLU(width, ratio)
        self.ls1 = nn.Identity() if scale is None else LayerScale(width, scale)
        self.ls2 = nn.Identity() if scale is None else LayerScale(width, scale)

    def ends(self) -> tuple[nn.Linear, nn.Linear]:
        """Of what is added back, the last layers."""
        return self.attn.proj, self.mlp.w3

    def forward(self, x_BND: Tensor, tables: Tables, drop: Drop | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        add = no_drop if drop is None else drop.add
        x_BND = add(x_BND, lambda x: self.ls1(self.attn(self.norm1(x), tables)))
        return add(x_BND, lambda x: self.ls2(self.mlp(self.norm2(x))))


Start = Literal["released", "fan_in"]
"""How weights are drawn for a training from the start."""


@torch.no_grad()
def init_layers(module: nn.Module, generator: torch.Generator, start: Start, depth: int) -> None:
    """Weights of everything in this file as for a training from the start; biases 0, norms 1.

    ``released``: linear layers and convolutions of deviation .02 (which the released code cuts at 100
    deviations). ``fan_in``: of one over the root of their inputs, and what is added back of (2 depth)^-1/2 of
    that, as GPT-2's: the same at the released widths, nearly, and five times as much at a width of 96.
    """
    back = {id(layer) for block in module.modules() if isinstance(block, Block) for layer in block.ends()}
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            std = 0.02
            if start == "fan_in":
                std = part.weight[0].numel() ** -0.5 * ((2 * depth) ** -0.5 if id(part) in back else 1.0)
            part.weight.normal_(std=std, generator=generator)
            if part.bias is not None:
                part.bias.zero_()
        elif isinstance(part, RMSNorm):
            fill(1.0, part.weight)
        elif isinstance(part, nn.LayerNorm):
            fill(1.0, part.weight)
            fill(0.0, part.bias)
        elif isinstance(part, LayerScale):
            fill(part.start, part.gamma)
