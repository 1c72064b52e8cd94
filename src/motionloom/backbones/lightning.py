"""LightningDiT (arXiv 2501.01423): the plain diffusion transformer that tokenizers are judged by.

A DiT (arXiv 2212.09748) with RMS norms that have a gain, SwiGLU, rotary positions over the grid beside fixed
sines, and optionally normalised queries and keys. What it is told enters by modulation alone: every token is
shifted, scaled and gated by c = t + y, of its noise level and of its words. Inside, t = 1 is data and the
answer points from noise to data; both are turned round here, so that sigma and velocity are the house's.

Two forms of y. ``class`` is the authors': a table with a row for each class and one for none. ``text`` is
ours: the mean of the words that a token sees, through an MLP; scenes hear their own captions by it. Where all
tokens see the same words y is one vector; else there is one for each token, which costs a block half as much
again.

Rows and columns are those of the grid, as in the authors' code. Time is ours: the seconds of a token turn the
same pairs of channels, quickly those that space turns slowly. One frame alone answers as the original does,
and time is relative, so that a stream may go on for ever.

First weights are those of the own backbones (variance 1 / inputs), not the authors' Xavier.

Shapes: B batch, N video tokens, L words, K noise levels, M = K or N, P = 6 parts of the modulation, D width,
H heads, d = D/H, C channels of a token, T channels of a word.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from motionloom.backbones.base import Perturbation
from motionloom.backbones.lightning_keys import ORIGINAL_KEYS
from motionloom.backbones.lightning_sizes import PRESETS, LightningSizes, head_pairs
from motionloom.backbones.parts import Dropout
from motionloom.config.recipe import ModelConfig
from motionloom.nn.attention import Pattern, attend, join_heads, split_heads
from motionloom.nn.init import fill, init_linears
from motionloom.nn.mlp import Embedder
from motionloom.nn.modulation import FEATURES, TimestepEmbedding, at_levels, one_hot_levels, per_token
from motionloom.nn.norms import EPS, rms_norm
from motionloom.nn.place import grid_sines
from motionloom.nn.rope import TIME, Rotary, pair_tables, rotate_pairs
from motionloom.plans.lower import lower, per_block
from motionloom.plans.stream import Stream, Streams
from motionloom.plans.visibility import Visibility, dense_mask

__all__ = ["ORIGINAL_KEYS", "PRESETS", "Lightning", "LightningSizes"]

PARTS = 6
"""Shift, scale and gate of attention and of the feed-forward layer."""
ROW_STD = 0.5
"""Of a class's first embedding: about as strong as that of a noise level."""
THETA = 1e4


class Told(NamedTuple):
    """What tokens are modulated by."""

    c_BMD: Tensor
    """Of every level (M = K), or of every token (M = N)."""
    one_hot_BNK: Tensor | None
    """Each token's level; None where there is one, or where ``c`` is the token's own."""


class Context(NamedTuple):
    """What blocks share; all of them, where the visibility is the same in all."""

    told: Told
    rotary: Rotary
    """(B or 1, N, 1, d)."""
    mask: Pattern | Tensor | None
    """How video sees video, from ``lower``."""
    skip_self: bool = False
    """Attention hands on its values."""


class RMSNorm(nn.Module):
    """With a gain per channel (arXiv 1910.07467)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, EPS)


class Attention(nn.Module):
    """Video sees video."""

    def __init__(self, sizes: LightningSizes) -> None:
        super().__init__()
        self.heads = sizes.num_attention_heads
        self.qkv = nn.Linear(sizes.dim, 3 * sizes.dim)
        self.proj = nn.Linear(sizes.dim, sizes.dim)
        self.q_norm = RMSNorm(sizes.attention_head_dim) if sizes.qk_norm else None
        self.k_norm = RMSNorm(sizes.attention_head_dim) if sizes.qk_norm else None

    def forward(self, x_BND: Tensor, context: Context) -> Tensor:
        q, k, v = split_heads(self.qkv(x_BND), 3, self.heads)
        if context.skip_self:
            return self.proj(v.flatten(-2))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rotate_pairs(t, context.rotary).to(v.dtype) for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return self.proj(join_heads(attend(q, k, v, context.mask)))


class SwiGLU(nn.Module):
    """Linear, gated by the SiLU of another (arXiv 2002.05202); the two are one matrix, the gate first."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    """Attention and feed-forward layer behind adaLN-Zero."""

    def __init__(self, sizes: LightningSizes) -> None:
        super().__init__()
        self.norm1 = RMSNorm(sizes.dim)
        self.attn = Attention(sizes)
        self.norm2 = RMSNorm(sizes.dim)
        self.mlp = SwiGLU(sizes.dim, sizes.hidden)
        self.modulation = nn.Linear(sizes.dim, PARTS * sizes.dim)

    def forward(self, x_BND: Tensor, context: Context, keep: Tensor | None) -> Tensor:
        parts = _modulation(self.modulation, context.told, PARTS)
        shift, scale, gate = parts[:3]
        x_BND = x_BND + gate * self.attn(self.norm1(x_BND) * (1 + scale) + shift, context)
        shift, scale, gate = parts[3:]
        thought_BND = self.mlp(self.norm2(x_BND) * (1 + scale) + shift)
        return x_BND + gate * (thought_BND if keep is None else thought_BND * keep)


def _modulation(layer: nn.Linear, told: Told, parts: int) -> tuple[Tensor, ...]:
    """Every token's vectors, (B, N or 1, D) each."""
    parts_BMPD = layer(F.silu(told.c_BMD)).unflatten(-1, (parts, -1))
    return per_token(parts_BMPD, told.one_hot_BNK)


class Entry(nn.Module):
    """Patches of latents -> tokens: a convolution's weights, on patches that are cut already."""

    def __init__(self, sizes: LightningSizes) -> None:
        super().__init__()
        frames, rows, columns = sizes.patch_size
        self.frames = frames
        self.proj = nn.Conv2d(frames * sizes.in_channels, sizes.dim, (rows, columns))

    def forward(self, x_BNC: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, D). A token's channels are the cells of its patch, each with all of its own."""
        weight_DFChw = self.proj.weight.unflatten(1, (self.frames, -1))
        return F.linear(x_BNC, weight_DFChw.permute(0, 1, 3, 4, 2).flatten(1), self.proj.bias)


class Exit(nn.Module):
    """Tokens -> the answer; zero at the start."""

    def __init__(self, sizes: LightningSizes) -> None:
        super().__init__()
        self.norm = RMSNorm(sizes.dim)
        self.out = nn.Linear(sizes.dim, math.prod(sizes.patch_size) * sizes.in_channels)
        self.modulation = nn.Linear(sizes.dim, 2 * sizes.dim)

    def forward(self, x_BND: Tensor, told: Told) -> Tensor:
        shift, scale = _modulation(self.modulation, told, 2)
        return self.out(self.norm(x_BND) * (1 + scale) + shift)


class Classes(nn.Module):
    """One-hot words -> their rows."""

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(classes, dim)

    def forward(self, share_BMT: Tensor) -> Tensor:
        """(B, M, T) -> (B, M, D)."""
        return share_BMT @ self.table.weight


class Words(Embedder):
    """The mean of words -> width D."""

    def __init__(self, text_dim: int, dim: int) -> None:
        super().__init__(text_dim, dim, nn.SiLU())

    def forward(self, mean_BMT: Tensor) -> Tensor:
        """(B, M, T) -> (B, M, D)."""
        return super().forward(rms_norm(mean_BMT))


class Lightning(nn.Module):
    """See the top of this file. ``forward`` as in :class:`~motionloom.backbones.base.Backbone`."""

    modalities: tuple[str, ...] = ("video",)
    words_first = True
    """Words are in the tokens before they look at each other: one block carries them a step further."""
    latent_layers = ("entry.proj", "exit.out")

    def __init__(
        self, sizes: LightningSizes, *, checkpoint_blocks: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.sizes = sizes
        self.checkpoint_blocks = checkpoint_blocks
        self.patch = sizes.patch_size
        self.latent_channels, self.text_dim = sizes.in_channels, sizes.text_dim
        self.entry = Entry(sizes)
        self.time = TimestepEmbedding(FEATURES, sizes.dim)
        self.by_class = sizes.condition == "class"
        self.told = (Classes if self.by_class else Words)(sizes.text_dim, sizes.dim)
        self.layers = nn.ModuleList(Block(sizes) for _ in range(sizes.num_layers))
        self.exit = Exit(sizes)
        self.dropout = Dropout(dropout)

    @classmethod
    def from_recipe(cls, config: ModelConfig, latent_channels: int, text_dim: int) -> Lightning:
        """Of sizes that a recipe chooses."""
        sizes = LightningSizes.from_recipe(config, latent_channels, text_dim)
        return cls(sizes, checkpoint_blocks=config.checkpoint_blocks, dropout=config.dropout)

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks in order."""
        return list(self.layers)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Every weight anew; adaLN-Zero makes each block the identity and the prediction zero."""
        init_linears(self, generator)
        inputs = self.entry.proj.weight[0].numel()
        self.entry.proj.weight.normal_(std=inputs**-0.5, generator=generator)
        assert self.entry.proj.bias is not None
        fill(0.0, self.entry.proj.bias, self.exit.out.weight)
        for part in self.modules():
            if isinstance(part, RMSNorm):
                fill(1.0, part.weight)
            elif isinstance(part, Block | Exit):
                fill(0.0, part.modulation.weight)
            elif isinstance(part, Classes):
                part.table.weight.normal_(std=ROW_STD, generator=generator)

    def forward(
        self, streams: Streams, visibility: Visibility, *, perturb: Perturbation | None = None
    ) -> dict[str, Tensor]:
        """The velocity of the video, in the dtype of its latents."""
        video, text = streams["video"], streams["text"]
        dtype = self.entry.proj.weight.dtype
        place_BND = grid_sines(video.cell_BN3[..., 1:], self.sizes.dim).to(dtype)
        x_BND = (self.entry(video.x_BNC.to(dtype)) + place_BND).to(dtype)
        batch = max(len(t) for s in (video, text) for t in (s.x_BNC, s.sigma_BK))
        x_BND = x_BND.expand(batch, -1, -1)
        level_BKD = self.time(1 - video.sigma_BK.float()).to(dtype)
        rotary = self._rotary(video)

        def seen(rule: Visibility) -> Context:
            mask = lower(rule, video.attributes, video.attributes, video.valid_BN)
            return Context(self._told(level_BKD, video, text, rule), rotary, mask)

        contexts = per_block(visibility, len(self.layers), seen)
        if perturb is not None:
            contexts = [c._replace(skip_self=i in perturb.skip_self) for i, c in enumerate(contexts)]
        for block, context in zip(self.layers, contexts, strict=True):
            x_BND = self._through(block, x_BND, context, self.dropout.draw(x_BND, self.training))
        # The authors' velocity points to the data.
        return {"video": -self.exit(x_BND, contexts[-1].told).to(video.x_BNC.dtype)}

    def _through(self, block: nn.Module, x_BND: Tensor, context: Context, keep: Tensor | None) -> Tensor:
        if self.checkpoint_blocks and torch.is_grad_enabled():
            return checkpoint(block, x_BND, context, keep, use_reentrant=False, preserve_rng_state=False)
        return block(x_BND, context, keep)

    def _told(self, level_BKD: Tensor, video: Stream, text: Stream, rule: Visibility) -> Told:
        """Noise level and words, as tokens under a rule are told."""
        mean_BMT, own = _mean_seen(video, text, rule, level_BKD.dtype, normalised=not self.by_class)
        y_BMD = self.told(mean_BMT).to(level_BKD.dtype)
        levels = level_BKD.shape[1]
        if not own:
            return Told(level_BKD + y_BMD, one_hot_levels(video.level_BN, levels, level_BKD.dtype))
        (level_BMD,) = at_levels(level_BKD[:, :, None], video.level_BN if levels > 1 else None)
        return Told(level_BMD + y_BMD, None)

    def _rotary(self, video: Stream) -> Rotary:
        """Tables (B or 1, N, 1, d): half of a head's pairs go by the row, half by the column, all by time."""
        wide = torch.float32 if video.cell_BN3.device.type == "mps" else torch.float64
        seconds_BN1 = video.position_BN3[..., :1].to(wide)
        angles = []
        for axis, pairs in enumerate(head_pairs(self.sizes.attention_head_dim), 1):
            place = torch.arange(pairs, dtype=wide, device=seconds_BN1.device) / pairs
            by_time = TIME.frequencies(pairs).flip(0).to(seconds_BN1)
            angles.append(video.cell_BN3[..., axis, None] * THETA**-place + seconds_BN1 * by_time)
        cos, sin = pair_tables(torch.cat(angles, dim=-1))
        dtype = torch.promote_types(self.entry.proj.weight.dtype, torch.float32)
        return cos.to(dtype)[:, :, None], sin.to(dtype)[:, :, None]


def _mean_seen(
    video: Stream, text: Stream, rule: Visibility, dtype: torch.dtype, *, normalised: bool
) -> tuple[Tensor, bool]:
    """The mean of the words that tokens see, (B, N, T), or (B, 1, T) where all see the same; and which it is.

    ``normalised``: each word has scale 1, since text encoders differ in scale by orders of magnitude.
    """
    words_BLT = text.x_BNC.to(dtype)
    if normalised:
        words_BLT = rms_norm(words_BLT)
    mask_BML = dense_mask(rule, video.attributes, text.attributes, text.valid_BN)
    if mask_BML is None:
        return words_BLT.mean(dim=1, keepdim=True), False
    share_BML = mask_BML.to(dtype)
    share_BML = share_BML / share_BML.sum(dim=-1, keepdim=True)
    # Hidden words may hold anything: zero times NaN is NaN.
    if text.valid_BN is not None:
        words_BLT = torch.where(text.valid_BN[..., None], words_BLT, 0.0)
    return share_BML @ words_BLT, not rule.unrestricted
