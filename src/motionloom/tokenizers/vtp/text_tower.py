"""VTP's text tower: CLIP's transformer (arXiv 2103.00020), with OpenCLIP's names of weights.

Shapes: B texts, L places, D width, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motionloom.nn.attention import attend, join_heads
from motionloom.nn.init import fill
from motionloom.tokenizers.vtp.config import VTPConfig


class CausalAttention(nn.Module):
    """Every place sees itself and what stands before it. The mask is nowhere stored: it cannot go stale."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor, before_LL: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        qkv = F.linear(x_BLD, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out_proj(join_heads(attend(q, k, v, before_LL)))


class TextBlock(nn.Module):
    """Norm, attention, norm, a plain feed-forward layer, each beside what it changes."""

    def __init__(self, width: int, heads: int, ratio: float) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = CausalAttention(width, heads)
        hidden = int(width * ratio)
        self.mlp = PlainFeedForward(width, hidden)

    def forward(self, x_BLD: Tensor, before_LL: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        x_BLD = x_BLD + self.attn(self.ln_1(x_BLD), before_LL)
        return x_BLD + self.mlp(self.ln_2(x_BLD))


class PlainFeedForward(nn.Module):
    """Linear, the exact GELU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.c_proj(F.gelu(self.c_fc(x)))


class TextTransformer(nn.Module):
    """The blocks alone; what stands around them belongs to the model, as in the released files."""

    def __init__(self, config: VTPConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(
            TextBlock(config.text_embed_dim, config.text_num_heads, config.text_mlp_ratio)
            for _ in range(config.text_depth)
        )

    def forward(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        places = x_BLD.shape[1]
        before_LL = torch.ones(places, places, dtype=torch.bool, device=x_BLD.device).tril()
        for block in self.resblocks:
            x_BLD = block(x_BLD, before_LL)
        return x_BLD

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """OpenCLIP's: attention of deviation D^-1/2, what is added back (2 x depth)^-1/2 of that, the inner
        layer (2 D)^-1/2."""
        for block in self.resblocks:
            assert isinstance(block, TextBlock)
            width = block.ln_1.weight.shape[0]
            back = width**-0.5 * (2 * len(self.resblocks)) ** -0.5
            block.attn.in_proj_weight.normal_(std=width**-0.5, generator=generator)
            block.attn.out_proj.weight.normal_(std=back, generator=generator)
            block.mlp.c_fc.weight.normal_(std=(2 * width) ** -0.5, generator=generator)
            block.mlp.c_proj.weight.normal_(std=back, generator=generator)
            fill(0.0, block.attn.in_proj_bias, block.attn.out_proj.bias, block.mlp.c_fc.bias)
            fill(0.0, block.mlp.c_proj.bias, block.ln_1.bias, block.ln_2.bias)
            fill(1.0, block.ln_1.weight, block.ln_2.weight)
