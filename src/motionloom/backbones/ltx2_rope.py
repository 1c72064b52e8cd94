"""LTX-2's rotary positions: seconds and pixels as fractions of a base size, frequencies over all heads.

The frequencies of a token run over the whole width of the stream before it is cut into heads, so heads see
different ones: each coordinate p becomes f = p / extent, and the angles are (2 f - 1) pi/2 theta^e with e
from 0 to 1, coordinates alternating within each frequency. Pairs that are left over stand first, unturned.

Shapes: B batch, N tokens, A coordinates, H heads, D channels of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from motionloom.backbones.ltx2_sizes import LTX2Sizes, Pairing
from motionloom.nn.rope import Rotary


def own_tables(sizes: LTX2Sizes, modality: str, position_BN3: Tensor) -> Rotary:
    """For self-attention: video by seconds and pixels, audio by seconds."""
    axes, heads, head_dim = 1, sizes.audio_num_attention_heads, sizes.audio_attention_head_dim
    extent: tuple[float, ...] = (sizes.audio_pos_embed_max_pos,)
    if modality == "video":
        axes, heads, head_dim = 3, sizes.num_attention_heads, sizes.attention_head_dim
        extent = (sizes.pos_embed_max_pos, sizes.base_height, sizes.base_width)
    theta, double = sizes.rope_theta, sizes.rope_double_precision
    return tables(position_BN3[..., :axes], extent, heads, head_dim, theta, double)


def shared_tables(sizes: LTX2Sizes, position_BN3: Tensor) -> Rotary:
    """For attention between video and audio: by seconds, in the heads of the audio."""
    extent = (max(sizes.pos_embed_max_pos, sizes.audio_pos_embed_max_pos),)
    heads, head_dim = sizes.audio_num_attention_heads, sizes.audio_attention_head_dim
    return tables(
        position_BN3[..., :1], extent, heads, head_dim, sizes.rope_theta, sizes.rope_double_precision
    )


def tables(
    position_BNA: Tensor, extent: tuple[float, ...], heads: int, head_dim: int, theta: float, double: bool
) -> Rotary:
    """(cos, sin) of every pair's angle, (B, N, H, D/2) float32 each.

    Args:
        position_BNA: float32, one column for each entry of ``extent``.
        extent: what counts as 1 along each coordinate.
        double: compute the grid of frequencies in float64, as the published models do.
    """
    pairs = heads * head_dim // 2
    count = pairs // len(extent)
    # On the CPU, since not every accelerator has float64.
    exponent = torch.linspace(0, 1, count, dtype=torch.float64 if double else torch.float32, device="cpu")
    frequency = (torch.pow(theta, exponent) * math.pi / 2).float().to(position_BNA.device)
    scale = torch.tensor(extent, dtype=torch.float32, device="cpu").to(position_BNA.device)
    fraction_BNA = position_BNA / scale
    angle_BNP = ((fraction_BNA * 2 - 1)[..., None, :] * frequency[:, None]).flatten(2)
    still = angle_BNP.new_zeros(*angle_BNP.shape[:2], pairs - angle_BNP.shape[2])
    angle_BNHP = torch.cat([still, angle_BNP], dim=2).unflatten(2, (heads, -1))
    return angle_BNHP.cos(), angle_BNHP.sin()


def turn_heads(x_BNHD: Tensor, rotary: Rotary, pairing: Pairing) -> Tensor:
    """Turn the pairs of each head by its token's angles, in float32."""
    cos, sin = rotary
    pair = -1 if pairing == "interleaved" else -2
    shape = (-1, 2) if pairing == "interleaved" else (2, -1)
    first, second = x_BNHD.float().unflatten(-1, shape).unbind(pair)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.stack(turned, dim=pair).flatten(-2)
