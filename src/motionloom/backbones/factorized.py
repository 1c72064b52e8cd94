"""Factorized video transformer: windows in space, cells through time, text by cross-attention.

Cost grows with the number of tokens and not with its square, so long clips fit. Windows shift by half in
every other block (Swin, arXiv 2103.14030); a plan's visibility acts on time and text, where it is cheap.

Shapes: B batch, T frames, S cells of a frame, N = T x S tokens, W windows of M places, L text tokens,
K noise levels, P modulation parts, D width, H heads, C channels of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from motionloom.backbones.base import Perturbation
from motionloom.backbones.parts import Dropout, Entry, Exit, modulate, run_blocks
from motionloom.config.recipe import ModelConfig
from motionloom.errors import UserError
from motionloom.nn.attention import Pattern, attend, join_heads, prepare_mask, split_heads
from motionloom.nn.init import fill, init_linears
from motionloom.nn.mlp import MLP
from motionloom.nn.modulation import NoiseModulation, one_hot_levels, per_token
from motionloom.nn.norms import HeadNorm
from motionloom.nn.rope import SPACE, TIME, Rotary, rotary, rotate
from motionloom.nn.windows import Windows, windows
from motionloom.plans.lower import lower, per_block
from motionloom.plans.stream import Attributes, Stream, Streams
from motionloom.plans.visibility import Visibility, dense_mask

PARTS = 12
"""Shift, scale and gate of four layers: space, time, text, feed-forward."""


class Space(NamedTuple):
    """How frames fall into windows in one kind of block."""

    windows: Windows
    rotary: Rotary
    """(B or 1, 1, S, 1, D/H)."""
    mask: Tensor | None
    """Broadcastable to (B, T, W, H, M, M), prepared."""


class Context(NamedTuple):
    """What blocks share; all of them, where the visibility is the same in all."""

    text_BLD: Tensor
    modulation_BKPD: Tensor
    one_hot_BNK: Tensor | None
    time_rotary: Rotary
    """(B or 1, T, 1, 1, D/H)."""
    time_mask: Tensor | None
    """Broadcastable to (B, S, H, T, T), prepared."""
    text_mask: Pattern | Tensor | None
    """Who sees which words, lowered: (B, H, N, L)."""
    skip_self: bool = False
    """Attention in space and through time hands on its values."""


class SelfAttention(nn.Module):
    """Projections of one self-attention; the block groups its tokens."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.norm = HeadNorm(dim // heads)
        self.out = nn.Linear(dim, dim, bias=False)

    def project(self, x_BTSD: Tensor, tables: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, T, S, H, D/H). Turned before they are grouped, so that compiled code
        writes them once, in their final order."""
        q, k, v = split_heads(self.qkv(x_BTSD), 3, self.heads)
        q, k = (rotate(t, tables).to(v.dtype) for t in self.norm(q, k))
        return q, k, v

    def hand_on(self, x_BTSD: Tensor) -> Tensor:
        """What comes out if every token sees only itself, (B, N, D)."""
        _, _, v = split_heads(self.qkv(x_BTSD), 3, self.heads)
        return self.out(v.flatten(3).flatten(1, 2))


class CrossAttention(nn.Module):
    """Video asks, text answers."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        self.norm = HeadNorm(dim // heads)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x_BND: Tensor, text_BLD: Tensor, mask: Pattern | Tensor | None) -> Tensor:
        (q,) = split_heads(self.q(x_BND), 1, self.heads)
        k, v = split_heads(self.kv(text_BLD), 2, self.heads)
        q, k = (t.to(v.dtype) for t in self.norm(q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return self.out(join_heads(attend(q, k, v, mask)))


class Block(nn.Module):
    """Space, time, text, feed-forward, each behind adaLN-Zero."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, heads = config.dim, config.num_heads
        self.space = SelfAttention(dim, heads)
        self.time = SelfAttention(dim, heads)
        self.text = CrossAttention(dim, heads)
        self.mlp = MLP(dim, int(config.mlp_ratio * dim))
        self.table_PD = nn.Parameter(torch.zeros(PARTS, dim))

    def forward(self, x_BND: Tensor, space: Space, context: Context, keep: Tensor | None) -> Tensor:
        modulation_BKPD = context.modulation_BKPD + self.table_PD

        def parts(layer: int) -> tuple[Tensor, ...]:
            return per_token(modulation_BKPD[:, :, 3 * layer : 3 * layer + 3], context.one_hot_BNK)

        shift, scale, gate = parts(0)
        x_BND = x_BND + gate * self.across_space(modulate(x_BND, shift, scale), space, context)
        shift, scale, gate = parts(1)
        x_BND = x_BND + gate * self.through_time(modulate(x_BND, shift, scale), context)
        shift, scale, gate = parts(2)
        told_BND = self.text(modulate(x_BND, shift, scale), context.text_BLD, context.text_mask)
        x_BND = x_BND + gate * told_BND
        shift, scale, gate = parts(3)
        thought_BND = self.mlp(modulate(x_BND, shift, scale))
        return x_BND + gate * (thought_BND if keep is None else thought_BND * keep)

    def across_space(self, x_BND: Tensor, space: Space, context: Context) -> Tensor:
        """Attention among the cells of each window of each frame."""
        layout = space.windows
        x_BTSD = x_BND.unflatten(1, (context.time_rotary[0].shape[1], -1))
        if context.skip_self:
            return self.space.hand_on(x_BTSD)
        batch, frames = x_BTSD.shape[:2]

        def grouped(t_BTSHd: Tensor) -> Tensor:
            """(B, T, S, H, d) -> (B, T, W, H, M, d)."""
            places = layout.gather(t_BTSHd.flatten(3).flatten(0, 1))
            return places.view(batch, frames, layout.count, -1, *t_BTSHd.shape[3:]).transpose(-3, -2)

        q, k, v = (grouped(t) for t in self.space.project(x_BTSD, space.rotary))
        mixed_BTWMD = join_heads(attend(q, k, v, space.mask))
        mixed = layout.scatter(mixed_BTWMD.flatten(2, 3).flatten(0, 1))
        return self.space.out(mixed.view(x_BND.shape))

    def through_time(self, x_BND: Tensor, context: Context) -> Tensor:
        """Attention among the frames at each cell."""
        x_BTSD = x_BND.unflatten(1, (context.time_rotary[0].shape[1], -1))
        if context.skip_self:
            return self.time.hand_on(x_BTSD)
        q, k, v = (t.permute(0, 2, 3, 1, 4) for t in self.time.project(x_BTSD, context.time_rotary))
        mixed_BSTD = join_heads(attend(q, k, v, context.time_mask))
        return self.time.out(mixed_BSTD.transpose(1, 2).flatten(1, 2))


class Factorized(nn.Module):
    """See the top of this file. ``forward`` as in :class:`~motionloom.backbones.base.Backbone`.

    A frame's tokens share their seconds, and a cell keeps its pixels over all frames: references are whole
    frames of the clip's size. What is not valid are whole frames, too.
    """

    modalities: tuple[str, ...] = ("video",)
    latent_layers = ("entry.video", "exit.out")

    def __init__(self, config: ModelConfig, latent_channels: int, text_dim: int) -> None:
        super().__init__()
        self.config = config
        self.patch = config.patch
        token_channels = latent_channels * config.patch[0] * config.patch[1] * config.patch[2]
        self.entry = Entry(token_channels, text_dim, config.dim)
        self.noise = NoiseModulation(config.dim, PARTS + 2)
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
            fill(0.0, block.table_PD)
            for layer in (block.space, block.time, block.text):
                layer.norm.init_weights()

    def forward(
        self, streams: Streams, visibility: Visibility, *, perturb: Perturbation | None = None
    ) -> dict[str, Tensor]:
        """The prediction for the video, in the dtype of its latents.

        Raises:
            UserError: the video is no grid, or parts of frames are hidden.
        """
        video, text = streams["video"], streams["text"]
        _check_frames(video)
        x_BND, text_BLD = self.entry(video, text)
        modulation_BKPD = self.noise(video.sigma_BK)
        one_hot_BNK = one_hot_levels(video.level_BN, video.sigma_BK.shape[1], x_BND.dtype)
        head_dim = self.config.dim // self.config.num_heads
        time_rotary = _time_rotary(video, head_dim)

        def seen(rule: Visibility) -> tuple[Context, list[Space]]:
            context = Context(
                text_BLD=text_BLD,
                modulation_BKPD=modulation_BKPD[:, :, :PARTS],
                one_hot_BNK=one_hot_BNK,
                time_rotary=time_rotary,
                time_mask=prepare_mask(_time_mask(video, rule)),
                text_mask=lower(rule, video.attributes, text.attributes, text.valid_BN),
            )
            return context, [self._space(video, rule, shifted, head_dim) for shifted in (False, True)]

        inputs = []
        for i, (context, spaces) in enumerate(per_block(visibility, len(self.layers), seen)):
            context = context._replace(skip_self=perturb is not None and i in perturb.skip_self)
            inputs.append((spaces[i % 2], context, self.dropout.draw(x_BND, self.training)))
        x_BND = run_blocks(self.blocks(), x_BND, inputs, self.config)
        out_BNC = self.exit(x_BND, modulation_BKPD[:, :, PARTS:], one_hot_BNK)
        return {"video": out_BNC.to(video.x_BNC.dtype)}

    def _space(self, video: Stream, visibility: Visibility, shifted: bool, head_dim: int) -> Space:
        frames, rows, columns = video.grid
        layout = windows(rows, columns, self.config.window_size, shifted, video.x_BNC.device)

        def grouped(t_BN: Tensor) -> Tensor:
            """(B, N, ...) -> (B, T, W, M, ...)."""
            cells_BTI = t_BN.unflatten(1, (frames, -1))[:, :, layout.cell_I]
            return cells_BTI.unflatten(2, (layout.count, -1))

        allowed = None if visibility.whole_frames else _grouped_mask(video, visibility, grouped)
        mask = layout.mask(allowed)
        mask = None if mask is None else mask[..., None, :, :]
        return Space(layout, _space_rotary(video, head_dim), prepare_mask(mask))


def _check_frames(video: Stream) -> None:
    """Refuse what cannot be taken apart into frames of one size."""
    frame_row_BN2 = video.cell_BN3[..., :2]
    if video.grid[:2] == (1, 1) and (frame_row_BN2 != frame_row_BN2[:, :1]).any():
        raise UserError(
            "model.type factorized reads whole frames of one size and is given tokens of several: make the "
            "references as large as the video, or take model.type joint"
        )
    if video.valid_BN is not None:
        valid_BTS = video.valid_BN.unflatten(1, (video.grid[0], -1))
        if (valid_BTS != valid_BTS[:, :, :1]).any():
            raise UserError(
                "model.type factorized cannot hide a part of a frame: give or lack whole frames, or take "
                "model.type joint"
            )


def _space_rotary(video: Stream, head_dim: int) -> Rotary:
    # Frame 0 speaks for all: cells keep their place.
    pixels_BS2 = video.position_BN3.unflatten(1, (video.grid[0], -1))[:, 0, :, 1:]
    cos, sin = rotary(pixels_BS2, (SPACE, SPACE), head_dim)
    return cos[:, None, :, None], sin[:, None, :, None]


def _time_rotary(video: Stream, head_dim: int) -> Rotary:
    seconds_BT1 = video.position_BN3.unflatten(1, (video.grid[0], -1))[:, :, 0, :1]
    cos, sin = rotary(seconds_BT1, (TIME,), head_dim)
    return cos[:, :, None, None], sin[:, :, None, None]


def _time_mask(video: Stream, visibility: Visibility) -> Tensor | None:
    """(B or 1, S or 1, 1, T or 1, T). Where a frame is seen as a whole, one cell of it is asked."""
    if visibility.unrestricted and video.valid_BN is None:
        return None

    def grouped(t_BN: Tensor) -> Tensor:
        """(B, N, ...) -> (B, S, T, ...)."""
        cells_BST = t_BN.unflatten(1, (video.grid[0], -1)).transpose(1, 2)
        return cells_BST[:, :1] if visibility.whole_frames else cells_BST

    return _grouped_mask(video, visibility, grouped, video.valid_BN)[:, :, None]


def _grouped_mask(
    video: Stream, visibility: Visibility, grouped: Callable[[Tensor], Tensor], valid_BN: Tensor | None = None
) -> Tensor:
    """The visibility within groups of G tokens, (..., G, G) for ``grouped: (B, N) -> (..., G)``."""
    a = video.attributes
    batch = max(1 if valid_BN is None else len(valid_BN), *(t.shape[0] for t in vars(a).values()))
    groups = {name: grouped(t.expand(batch, *t.shape[1:])) for name, t in vars(a).items()}
    lead = groups["scene_BN"].shape[:-1]
    flat = Attributes(**{name: t.flatten(0, len(lead) - 1) for name, t in groups.items()})
    valid = None if valid_BN is None else grouped(valid_BN.expand(batch, -1)).flatten(0, len(lead) - 1)
    mask = dense_mask(visibility, flat, flat, valid)
    assert mask is not None
    return mask.unflatten(0, lead)
