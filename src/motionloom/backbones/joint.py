"""Joint text-video transformer: words and video tokens in one attention, 3D rotary positions on the video.

One stream with weights shared by both modalities, as in CogVideoX (arXiv 2408.06072); each modality has its
own adaLN-Zero modulation, which is what its "expert" layer norm amounts to. Any visibility is exact.

With a cache the words run once, alone, and chunks of video run without them: words then see words only, as
every causal visibility says, and stand at one noise level that must not change.

Video is turned by its seconds and words are not turned, so what video asks of the words depends on absolute
time: a short clip knows its beginning by it, a long stream would leave the seconds that training showed. A
cache with relative positions keeps to them.

Shapes: B batch, L text tokens, N video tokens, J = L + N (with a cache one of them is 0), K noise levels,
P modulation parts or tokens of the past, D width, H heads, C channels of a token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from motionloom.backbones.parts import Dropout, Entry, Exit, modulate, run_blocks, run_cached
from motionloom.config.recipe import ModelConfig
from motionloom.nn.attention import Pattern, attend, join_heads, split_heads
from motionloom.nn.cache import KVCache, Pair, Past, extend
from motionloom.nn.init import fill, init_linears
from motionloom.nn.mlp import MLP
from motionloom.nn.modulation import NoiseModulation, one_hot_levels, per_token
from motionloom.nn.norms import HeadNorm
from motionloom.nn.rope import SPACE, TIME, Rotary, rotary, rotate
from motionloom.plans.lower import lower
from motionloom.plans.past import facts, held_words, join_facts, past_facts, places
from motionloom.plans.stream import Stream, Streams
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
    mask: Pattern | Tensor | None
    """Who sees whom, lowered: (B, H, J, J), or (B, H, N, L + P + N) with a cache."""


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

    def forward(
        self, x_BJD: Tensor, words: int, context: Context, keep: Tensor | None, past: Past | None = None
    ) -> Tensor | tuple[Tensor, Pair]:
        """``x``; and beside it this layer's own keys, unrotated, and values, if ``past`` is not None."""
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

        mixed_BJD, own = self.attention(adapted(x_BJD, 0), context, past or ())
        x_BJD = gated(x_BJD, mixed_BJD, 2)
        y_BJD = self.mlp(adapted(x_BJD, 3))
        x_BJD = gated(x_BJD, y_BJD if keep is None else y_BJD * keep, 5)
        return x_BJD if past is None else (x_BJD, own)

    def attention(self, x_BJD: Tensor, context: Context, past: Past) -> tuple[Tensor, Pair]:
        """Everyone with everyone, and with the past, that the mask allows."""
        q, k, v = split_heads(self.qkv(x_BJD), 3, self.heads)
        q, k = self.norm(q, k)
        own = k.to(v.dtype), v
        q, k = (rotate(t, context.rotary).to(v.dtype) for t in (q, k))
        k, v = extend(past, k, v)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return self.out(join_heads(attend(q, k, v, context.mask))), own


class Joint(nn.Module):
    """See the top of this file. ``forward`` as in :class:`~motionloom.backbones.base.Backbone`."""

    def __init__(self, config: ModelConfig, latent_channels: int, text_dim: int) -> None:
        super().__init__()
        self.config = config
        self.patch = config.patch
        self.head_dim = config.dim // config.num_heads
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

    def new_cache(self, **options: Any) -> KVCache:
        """A cache for :meth:`forward`; options as in :class:`~motionloom.nn.cache.KVCache`."""
        return KVCache(len(self.layers), **options)

    def forward(
        self, streams: Streams, visibility: Visibility, cache: KVCache | None = None
    ) -> dict[str, Tensor]:
        """The prediction for the video, in the dtype of its latents."""
        video, text = streams["video"], streams["text"]
        if cache is not None:
            return {"video": self._chunk(video, text, visibility, cache)}
        assert text.sigma_BK.shape == video.sigma_BK.shape, "words and video count the same noise levels"
        x_BND, text_BLD = self.entry(video, text)
        words = text_BLD.shape[1]
        attributes, valid = join_facts([facts(text), facts(video)])
        mask = lower(visibility, attributes, attributes, valid)
        tables = _end_to_end(
            _nowhere(words, self.head_dim, x_BND.device), _standing(video.position_BN3, self.head_dim)
        )
        context, leaving = self._context(video.sigma_BK, text.level_BN, video.level_BN, tables, mask)
        x_BJD = torch.cat([text_BLD, x_BND], dim=1)
        inputs = [(words, context, self.dropout.draw(x_BJD, self.training)) for _ in self.layers]
        x_BJD = run_blocks(self.blocks(), x_BJD, inputs, self.config)
        return {"video": self.exit(x_BJD[:, words:], *leaving).to(video.x_BNC.dtype)}

    def _chunk(self, video: Stream, text: Stream, visibility: Visibility, cache: KVCache) -> Tensor:
        """:meth:`forward` for the chunk that is the cache's present one."""
        batch = max(video.x_BNC.shape[0], text.x_BNC.shape[0], video.sigma_BK.shape[0])
        if "text" in cache:
            held_words(cache, text)
        else:
            self._hold_words(text, batch, visibility, cache)
        before, here = places(video, cache)

        def turn(modality: str, k_BPHD: Tensor) -> Tensor:
            if modality == "text":
                return k_BPHD
            assert before is not None
            place_BP3 = before.position_BN3
            past_tables = cache.remember("past tables", lambda: _standing(place_BP3, self.head_dim))
            return rotate(k_BPHD, past_tables).to(k_BPHD.dtype)

        keys, valid = join_facts([*past_facts(cache, "text", "video"), facts(video)])
        mask = lower(visibility, video.attributes, keys, valid)
        tables = _standing(here.position_BN3, self.head_dim)
        context, leaving = self._context(video.sigma_BK, text.level_BN[:, :0], video.level_BN, tables, mask)
        x_BND = self.entry.pictures(video, batch)
        past = cache.past(("text", "video"), turn)
        # One layer's past at a time: a lean cache makes it when asked.
        inputs = ((0, context, self.dropout.draw(x_BND, self.training), old) for old in past)
        x_BND, own = run_cached(self.blocks(), x_BND, inputs, self.config.checkpoint_blocks)
        cache.offer("video", facts(video), own)
        return self.exit(x_BND, *leaving).to(video.x_BNC.dtype)

    def _hold_words(self, text: Stream, batch: int, visibility: Visibility, cache: KVCache) -> None:
        """The words through all blocks on their own, into the cache."""
        mask = lower(visibility, text.attributes, text.attributes, text.valid_BN)
        tables = _nowhere(text.x_BNC.shape[1], self.head_dim, text.x_BNC.device)
        context, _ = self._context(text.sigma_BK, text.level_BN, text.level_BN[:, :0], tables, mask)
        x_BLD = self.entry.words(text, batch)
        words = x_BLD.shape[1]
        inputs = [(words, context, self.dropout.draw(x_BLD, self.training), ()) for _ in self.layers]
        _, own = run_cached(self.blocks(), x_BLD, inputs, self.config.checkpoint_blocks)
        cache.hold("text", facts(text), own)

    def _context(
        self,
        sigma_BK: Tensor,
        text_level_BL: Tensor,
        video_level_BN: Tensor,
        rotary: Rotary,
        mask: Pattern | Tensor | None,
    ) -> tuple[Context, tuple[Tensor, Tensor | None]]:
        """What the blocks share, and what the exit is modulated by."""
        levels, dtype = sigma_BK.shape[1], self.entry.video.weight.dtype
        text_BKPD, video_BKPD, exit_BK2D = self.noise(sigma_BK).split([PARTS, PARTS, 2], dim=2)
        video_one_hot_BNK = one_hot_levels(video_level_BN, levels, dtype)
        context = Context(
            text_modulation_BKPD=text_BKPD,
            video_modulation_BKPD=video_BKPD,
            text_one_hot_BLK=one_hot_levels(text_level_BL, levels, dtype),
            video_one_hot_BNK=video_one_hot_BNK,
            rotary=rotary,
            mask=mask,
        )
        return context, (exit_BK2D, video_one_hot_BNK)


def _standing(position_BN3: Tensor, head_dim: int) -> Rotary:
    """Tables of video tokens, at their seconds and pixels, (B or 1, N, 1, D/H)."""
    cos, sin = rotary(position_BN3, (TIME, SPACE, SPACE), head_dim)
    return cos[:, :, None], sin[:, :, None]


def _nowhere(words: int, head_dim: int, device: torch.device) -> Rotary:
    """Tables of words, which are not turned, (1, L, 1, D/H)."""
    cos = torch.ones(1, words, 1, head_dim, device=device)
    return cos, torch.zeros_like(cos)


def _end_to_end(a: Rotary, b: Rotary) -> Rotary:
    cos, sin = (torch.cat([x.expand(y.shape[0], *x.shape[1:]), y], dim=1) for x, y in zip(a, b, strict=True))
    return cos, sin
