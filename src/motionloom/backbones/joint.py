"""Joint text-video transformer: words and video tokens in one attention, 3D rotary positions on the video.

One stream with weights shared by both modalities, as in CogVideoX (arXiv 2408.06072); each modality has its
own adaLN-Zero modulation, which is what its "expert" layer norm amounts to. Any visibility is exact.

Shapes: B batch, L text tokens, N video tokens, J = L + N, K noise levels, P modulation parts, D width,
H heads, C channels of a token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from motionloom.backbones.parts import Dropout, Entry, Exit, modulate, run_blocks
from motionloom.config.recipe import ModelConfig
from motionloom.nn.attention import attend, join_heads, split_heads
from motionloom.nn.init import fill, init_linears
from motionloom.nn.mlp import MLP
from motionloom.nn.modulation import NoiseModulation, one_hot_levels, per_token
from motionloom.nn.norms import HeadNorm
from motionloom.nn.rope import SPACE, TIME, Rotary, no_rotation, rotary, rotate
from motionloom.plans.lower import lower
from motionloom.plans.stream import Stream, Streams, join_attributes
from motionloom.plans.visibility import Visibility

PARTS = 6
"""Shift, scale and gate of attention and of the feed-forward layer."""


class Context(NamedTuple):
    """What all blocks share."""

    text_modulation_BKPD: Tensor
    video_modulation_BKPD: Tensor
    text_one_hot_BLK: Tensor | None
    video_one_hot_BNK: Tensor | None
    rotary: Rotary
    """(B or 1, J, 1, D/H)."""
    mask: Tensor | None
    """Broadcastable to (B, H, J, J), prepared."""


class Block(nn.Module):
    """Attention and feed-forward over words and video together."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.norm = HeadNorm(dim // config.num_heads)
        self.out = nn.Linear(dim, dim, bias=False)
        self.mlp = MLP(dim, int(config.mlp_ratio * dim))
        self.text_table_PD = nn.Parameter(torch.zeros(PARTS, dim))
        self.video_table_PD = nn.Parameter(torch.zeros(PARTS, dim))

    def forward(self, x_BJD: Tensor, words: int, context: Context, keep: Tensor | None) -> Tensor:
        text_BKPD = context.text_modulation_BKPD + self.text_table_PD
        video_BKPD = context.video_modulation_BKPD + self.video_table_PD
        text = per_token(text_BKPD, context.text_one_hot_BLK)
        video = per_token(video_BKPD, context.video_one_hot_BNK)

        def adapted(x_BJD: Tensor, layer: int) -> Tensor:
            x_BLD, x_BND = x_BJD[:, :words], x_BJD[:, words:]
            return torch.cat(
                [
                    modulate(x_BLD, text[layer], text[layer + 1]),
                    modulate(x_BND, video[layer], video[layer + 1]),
                ],
                dim=1,
            )

        def gated(x_BJD: Tensor, y_BJD: Tensor, layer: int) -> Tensor:
            y = [text[layer] * y_BJD[:, :words], video[layer] * y_BJD[:, words:]]
            return x_BJD + torch.cat(y, dim=1)

        x_BJD = gated(x_BJD, self.attention(adapted(x_BJD, 0), context), 2)
        y_BJD = self.mlp(adapted(x_BJD, 3))
        return gated(x_BJD, y_BJD if keep is None else y_BJD * keep, 5)

    def attention(self, x_BJD: Tensor, context: Context) -> Tensor:
        """Everyone with everyone that the mask allows."""
        q, k, v = split_heads(self.qkv(x_BJD), 3, self.heads)
        q, k = (rotate(t, context.rotary).to(v.dtype) for t in self.norm(q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return self.out(join_heads(attend(q, k, v, context.mask)))


class Joint(nn.Module):
    """See the top of this file. ``forward`` as in :class:`~motionloom.backbones.base.Backbone`."""

    def __init__(self, config: ModelConfig, latent_channels: int, text_dim: int) -> None:
        super().__init__()
        self.config = config
        self.patch = config.patch
        token_channels = latent_channels * config.patch[0] * config.patch[1] * config.patch[2]
        self.entry = Entry(token_channels, text_dim, config.dim)
        self.noise = NoiseModulation(config.dim, 2 * PARTS + 2)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.exit = Exit(config.dim, token_channels)
        self.dropout = Dropout(config.dropout)

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks in order."""
        return list(self.layers)

    def init_weights(self, generator: torch.Generator) -> None:
        """Every weight anew; adaLN-Zero makes each block the identity and the prediction zero."""
        init_linears(self, generator)
        self.noise.init_weights()
        self.exit.init_weights()
        for block in self.layers:
            assert isinstance(block, Block)
            fill(0.0, block.text_table_PD, block.video_table_PD)
            block.norm.init_weights()

    def forward(self, streams: Streams, visibility: Visibility) -> dict[str, Tensor]:
        """The prediction for the video, in the dtype of its latents."""
        video, text = streams["video"], streams["text"]
        x_BND, text_BLD = self.entry(video, text)
        words = text_BLD.shape[1]
        levels = video.sigma_BK.shape[1]
        text_BKPD, video_BKPD, exit_BKPD = self.noise(video.sigma_BK).split([PARTS, PARTS, 2], dim=2)
        video_one_hot_BNK = one_hot_levels(video.level_BN, levels, x_BND.dtype)
        attributes = join_attributes([text.attributes, video.attributes])
        context = Context(
            text_modulation_BKPD=text_BKPD,
            video_modulation_BKPD=video_BKPD,
            text_one_hot_BLK=one_hot_levels(text.level_BN, levels, x_BND.dtype),
            video_one_hot_BNK=video_one_hot_BNK,
            rotary=_rotary(video, words, self.config.dim // self.config.num_heads),
            mask=lower(visibility, attributes, attributes, _valid(text, video)),
        )
        x_BJD = torch.cat([text_BLD, x_BND], dim=1)
        inputs = [(words, context, self.dropout.draw(x_BJD, self.training)) for _ in self.layers]
        x_BJD = run_blocks(self.blocks(), x_BJD, inputs, self.config)
        out_BNC = self.exit(x_BJD[:, words:], exit_BKPD, video_one_hot_BNK)
        return {"video": out_BNC.to(video.x_BNC.dtype)}


def _rotary(video: Stream, words: int, head_dim: int) -> Rotary:
    """Words stand nowhere; video tokens at their seconds and pixels."""
    tables = rotary(video.position_BN3, (TIME, SPACE, SPACE), head_dim)
    cos, sin = (
        torch.cat([still, moved], dim=-2)[:, :, None]
        for still, moved in zip(no_rotation(tables, words), tables, strict=True)
    )
    return cos, sin


def _valid(text: Stream, video: Stream) -> Tensor | None:
    if text.valid_BN is None and video.valid_BN is None:
        return None
    parts = [
        torch.ones_like(s.scene_BN, dtype=torch.bool) if s.valid_BN is None else s.valid_BN
        for s in (text, video)
    ]
    batch = max(part.shape[0] for part in parts)
    return torch.cat([part.expand(batch, -1) for part in parts], dim=1)
