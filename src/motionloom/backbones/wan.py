"""Wan (arXiv 2503.20314): video tokens with 3D RoPE over grid indices, words by cross-attention.

Wan 2.1 text to video and image to video, first-and-last-frame to video, and Wan 2.2. Weights are named as in
diffusers' ``WanTransformer3DModel``. With one noise level the answer is the original's; every token may also
have its own, which is how Wan 2.2 5B gives a first frame and how causal students roll chunks.

Modulation, norms and rotation are computed in float32 at least, whatever the weights are, as in the original.

Shapes: B batch, N video tokens, M tokens of a source of cross-attention or keys, K noise levels, P parts of
the modulation or tokens of the past, D width, H heads, d = D/H, C channels of a token.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from motionloom.backbones.base import Perturbation
from motionloom.backbones.wan_keys import ORIGINAL_KEYS
from motionloom.backbones.wan_sizes import PRESETS, WanSizes
from motionloom.errors import UserError
from motionloom.nn.attention import Pattern, attend, join_heads
from motionloom.nn.cache import KVCache, Pair, Past, extend
from motionloom.nn.init import fill, init_linears
from motionloom.nn.mlp import Embedder, FeedForward
from motionloom.nn.modulation import TimestepEmbedding, at_levels
from motionloom.nn.rope import Rotary, index_rotary, rotate_pairs
from motionloom.plans.lower import lower, per_block
from motionloom.plans.past import facts, held_words, join_facts, past_facts, places
from motionloom.plans.stream import Attributes, Stream, Streams
from motionloom.plans.visibility import Visibility

__all__ = ["ORIGINAL_KEYS", "PRESETS", "Wan", "WanSizes"]

PARTS = 6
"""Shift, scale and gate of self-attention and of the feed-forward layer."""
Held = tuple[Past, ...]
"""A layer's keys and values of every source, (B, M, H, d) each, where a cache has them."""


class Source(NamedTuple):
    """What a cross-attention asks, and how video sees it."""

    x_BMD: Tensor | None
    """None where a cache holds the keys and values."""
    mask: Pattern | Tensor | None


class Context(NamedTuple):
    """What blocks share; all of them, where the visibility is the same in all."""

    modulation_BKPD: Tensor
    level_BN: Tensor | None
    """None where there is one noise level."""
    rotary: Rotary
    """(B or 1, N, 1, d)."""
    mask: Pattern | Tensor | None
    """How video sees video, from ``lower``."""
    told: tuple[Source, ...]
    """The words, and the image tokens where the weights ask for them."""
    skip_self: bool = False
    """Self-attention hands on its values."""


class RMSNorm(nn.Module):
    """Over all heads together, float32 at least."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(wide(x), self.weight.shape, wide(self.weight), self.eps)


class LayerNorm(nn.LayerNorm):
    """With gain and bias, float32 at least."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(wide(x), self.normalized_shape, wide(self.weight), wide(self.bias), self.eps)


class Attention(nn.Module):
    """Projections; queries and keys are normalised before they are split into heads."""

    def __init__(self, sizes: WanSizes) -> None:
        super().__init__()
        dim = sizes.dim
        self.heads = sizes.num_attention_heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q = RMSNorm(dim, sizes.eps)
        self.norm_k = RMSNorm(dim, sizes.eps)

    def split(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, H, d)."""
        return x.unflatten(-1, (self.heads, -1))

    def queries(self, x_BND: Tensor) -> Tensor:
        """(B, N, H, d), float32 at least."""
        return self.split(self.norm_q(self.to_q(x_BND)))

    def keys_values(self, x_BND: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, H, d) each; keys float32 at least."""
        return self.split(self.norm_k(self.to_k(x_BND))), self.split(self.to_v(x_BND))


class SelfAttention(Attention):
    """Video sees video."""

    def forward(self, x_BND: Tensor, context: Context, past: Past) -> tuple[Tensor, Pair]:
        """(B, N, D), and this layer's own keys, unrotated, and values."""
        k, v = self.keys_values(x_BND)
        own = k.to(v.dtype), v
        if context.skip_self:
            return self.to_out[0](v.flatten(2)), own
        q = self.queries(x_BND)
        q, k = (rotate_pairs(t, context.rotary).to(v.dtype) for t in (q, k))
        k, v = extend(past, k, v)
        return self.to_out[0](_mix(q, k, v, context.mask)), own


class CrossAttention(Attention):
    """Video asks the words, and image tokens by projections of their own; the answers are added."""

    def __init__(self, sizes: WanSizes) -> None:
        super().__init__(sizes)
        if sizes.image_dim is not None:
            self.add_k_proj = nn.Linear(sizes.dim, sizes.dim)
            self.add_v_proj = nn.Linear(sizes.dim, sizes.dim)
            self.norm_added_k = RMSNorm(sizes.dim, sizes.eps)

    def forward(self, x_BND: Tensor, told: tuple[Source, ...], held: Held) -> tuple[Tensor, tuple[Pair, ...]]:
        """(B, N, D), and the keys and values of all sources, computed where they are not held."""
        pairs = tuple(
            pair or self.of_source(i, source)
            for i, (source, pair) in enumerate(zip(told, held or ((),) * len(told), strict=True))
        )
        q = self.queries(x_BND)
        answers = [_mix(q.to(v.dtype), k, v, s.mask) for s, (k, v) in zip(told, pairs, strict=True)]
        return self.to_out[0](sum(answers[1:], answers[0])), pairs

    def of_source(self, index: int, source: Source) -> Pair:
        """Keys and values (B, M, H, d) of the words (0) or the image tokens (1)."""
        assert source.x_BMD is not None
        if index == 0:
            k, v = self.keys_values(source.x_BMD)
        else:
            k = self.split(self.norm_added_k(self.add_k_proj(source.x_BMD)))
            v = self.split(self.add_v_proj(source.x_BMD))
        return k.to(v.dtype), v


def _mix(q_BNHd: Tensor, k_BMHd: Tensor, v_BMHd: Tensor, mask: Pattern | Tensor | None) -> Tensor:
    """Attention, (B, N, D)."""
    q, k, v = (t.transpose(1, 2) for t in (q_BNHd, k_BMHd, v_BMHd))
    return join_heads(attend(q, k, v, mask))


class Block(nn.Module):
    """Self-attention and feed-forward behind adaLN, cross-attention behind a plain norm."""

    def __init__(self, sizes: WanSizes) -> None:
        super().__init__()
        self.eps = sizes.eps
        self.attn1 = SelfAttention(sizes)
        self.attn2 = CrossAttention(sizes)
        self.norm2 = LayerNorm(sizes.dim, sizes.eps)
        self.ffn = FeedForward(sizes.dim, sizes.ffn_dim, sizes.dim)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, PARTS, sizes.dim))

    def forward(
        self, x_BND: Tensor, context: Context, past: Past | None = None, held: Held = ()
    ) -> Tensor | tuple[Tensor, tuple[Pair, tuple[Pair, ...]]]:
        """``x``; and if ``past`` is not None, beside it what a cache takes of this layer: the video's own
        keys, unrotated, and values, and those of the sources."""
        table_BKPD = context.modulation_BKPD + wide(self.scale_shift_table)
        shift, scale, gate = at_levels(table_BKPD[:, :, :3], context.level_BN)
        mixed_BND, own = self.attn1(modulate(x_BND, shift, scale, self.eps), context, past or ())
        x_BND = (x_BND + mixed_BND * gate).to(x_BND.dtype)
        heard_BND, pairs = self.attn2(self.norm2(x_BND).to(x_BND.dtype), context.told, held)
        x_BND = x_BND + heard_BND
        shift, scale, gate = at_levels(table_BKPD[:, :, 3:], context.level_BN)
        thought_BND = self.ffn(modulate(x_BND, shift, scale, self.eps))
        x_BND = (x_BND + thought_BND * gate).to(x_BND.dtype)
        return x_BND if past is None else (x_BND, (own, pairs))


class PatchEmbedding(nn.Conv3d):
    """A convolution whose stride is its kernel, on tokens that already are patches: one matrix product."""

    def forward(self, x_BNC: Tensor) -> Tensor:
        # A token's channels are the cells of its patch, each with all its channels.
        return F.linear(x_BNC, self.weight.permute(0, 2, 3, 4, 1).flatten(1), self.bias)


class ImageEmbedder(nn.Module):
    """CLIP's image tokens -> width D."""

    def __init__(self, image_dim: int, sizes: WanSizes) -> None:
        super().__init__()
        self.norm1 = LayerNorm(image_dim)
        self.ff = FeedForward(image_dim, image_dim, sizes.dim, approximate="none")
        self.norm2 = LayerNorm(sizes.dim)
        places = sizes.pos_embed_seq_len
        self.pos_embed = None if places is None else nn.Parameter(torch.zeros(1, places, image_dim))

    def forward(self, x_BMC: Tensor) -> Tensor:
        if self.pos_embed is not None:
            places, tokens = self.pos_embed.shape[1], x_BMC.shape[1]
            if tokens != places:
                raise UserError(
                    f"these Wan weights read {places} image tokens (two pictures) and got {tokens}"
                )
            x_BMC = x_BMC + self.pos_embed
        return self.norm2(self.ff(self.norm1(x_BMC).to(x_BMC.dtype))).to(x_BMC.dtype)


class ConditionEmbedder(nn.Module):
    """Noise levels, words and image tokens -> width D."""

    def __init__(self, sizes: WanSizes) -> None:
        super().__init__()
        self.time_embedder = TimestepEmbedding(sizes.freq_dim, sizes.dim)
        self.time_proj = nn.Linear(sizes.dim, PARTS * sizes.dim)
        self.text_embedder = Embedder(sizes.text_dim, sizes.dim, nn.GELU(approximate="tanh"))
        self.image_embedder = None if sizes.image_dim is None else ImageEmbedder(sizes.image_dim, sizes)

    def forward(self, sigma_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Noise levels -> (B, K, 1, D) for the end and (B, K, P, D) for the blocks, float32 at least."""
        level_BKD = self.time_embedder(sigma_BK.float() * 1000)
        parts_BKPD = self.time_proj(F.silu(level_BKD)).unflatten(-1, (PARTS, -1))
        return wide(level_BKD)[:, :, None], wide(parts_BKPD)


class Blocks(nn.ModuleList):
    """The transformer blocks in order. A module that can be called, since the weights are named
    ``blocks.0...`` and the protocol of backbones asks for ``blocks()``."""

    def forward(self) -> list[nn.Module]:
        return list(self)


class Wan(nn.Module):
    """See the top of this file. ``forward`` as in :class:`~motionloom.backbones.base.Backbone`.

    Streams: ``video``; ``text`` with raw UMT5 embeddings; ``image`` with raw CLIP tokens where
    ``sizes.image_dim`` asks for them, which a visibility treats as it treats words.
    """

    modalities: tuple[str, ...] = ("video",)

    def __init__(self, sizes: WanSizes, *, checkpoint_blocks: bool = False) -> None:
        super().__init__()
        self.sizes = sizes
        self.checkpoint_blocks = checkpoint_blocks
        self.patch = sizes.patch_size
        self.latent_channels = sizes.out_channels
        self.text_dim = sizes.text_dim
        self._sources = ("text",) if sizes.image_dim is None else ("text", "image")
        cells = math.prod(sizes.patch_size)
        self.patch_embedding = PatchEmbedding(
            sizes.in_channels, sizes.dim, sizes.patch_size, stride=sizes.patch_size
        )
        self.condition_embedder = ConditionEmbedder(sizes)
        self.blocks = Blocks(Block(sizes) for _ in range(sizes.num_layers))
        self.proj_out = nn.Linear(sizes.dim, sizes.out_channels * cells)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 2, sizes.dim))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Every weight anew. Blocks begin close to the identity, with gates as small as the tables of the
        original's start, and the prediction is zero."""
        init_linears(self, generator)
        cells = self.patch_embedding.weight[0].numel()
        self.patch_embedding.weight.normal_(std=cells**-0.5, generator=generator)
        assert self.patch_embedding.bias is not None
        fill(0.0, self.patch_embedding.bias, self.proj_out.weight, self.proj_out.bias)
        fill(0.0, self.condition_embedder.time_proj.weight)
        for part in self.modules():
            if isinstance(part, (RMSNorm, LayerNorm)):
                fill(1.0, part.weight)
            if isinstance(part, LayerNorm):
                fill(0.0, part.bias)
            if isinstance(part, ImageEmbedder) and part.pos_embed is not None:
                fill(0.0, part.pos_embed)
            if isinstance(part, (Block, Wan)):
                part.scale_shift_table.normal_(std=self.sizes.dim**-0.5, generator=generator)

    def new_cache(self, **options: Any) -> KVCache:
        """A cache for :meth:`forward`; options as in :class:`~motionloom.nn.cache.KVCache`."""
        return KVCache(self.sizes.num_layers, **options)

    def forward(
        self,
        streams: Streams,
        visibility: Visibility,
        cache: KVCache | None = None,
        *,
        perturb: Perturbation | None = None,
    ) -> dict[str, Tensor]:
        """The velocity of the video, in the dtype of its latents.

        Raises:
            UserError: the streams lack the image tokens or the extra channels that the weights ask for.
        """
        video = streams["video"]
        level_BKD, modulation_BKPD = self.condition_embedder(video.sigma_BK)
        x_BND = self._enter(video)
        batch = max(len(x_BND), len(level_BKD), *(len(s.x_BNC) for s in streams.values()))
        x_BND = x_BND.expand(batch, -1, -1)
        attributes = video.attributes
        keys, valid, index_BN3 = attributes, video.valid_BN, video.index_BN3
        if cache is not None:
            keys, valid = join_facts([*past_facts(cache, "video"), facts(video)])
            index_BN3 = places(video, cache)[1].index_BN3
        rotary = self._rotary(index_BN3)
        level_BN = video.level_BN if video.sigma_BK.shape[1] > 1 else None
        sources = self._sources_of(streams, batch, cache)

        def seen(rule: Visibility) -> Context:
            told = tuple(
                Source(x, lower(rule, attributes, words, words_valid)) for x, words, words_valid in sources
            )
            mask = lower(rule, attributes, keys, valid)
            return Context(modulation_BKPD, level_BN, rotary, mask, told)

        contexts = per_block(visibility, len(self.blocks), seen)
        if perturb is not None:
            contexts = [c._replace(skip_self=i in perturb.skip_self) for i, c in enumerate(contexts)]
        if cache is None:
            for block, of_block in zip(self.blocks(), contexts, strict=True):
                x_BND = self._through(block, x_BND, of_block)
        else:
            x_BND = self._chunk(x_BND, contexts, streams, cache)
        shift, scale = at_levels(level_BKD + wide(self.scale_shift_table), level_BN)
        out_BNC = self.proj_out(modulate(x_BND, shift, scale, self.sizes.eps))
        return {"video": out_BNC.to(video.x_BNC.dtype)}

    def _enter(self, video: Stream) -> Tensor:
        """Latents, and the channels beside them -> (B, N, D) in the dtype of the weights."""
        cells = math.prod(self.patch)
        extra = 0 if video.extra_BNC is None else video.extra_BNC.shape[-1] // cells
        if extra != self.sizes.extra_channels:
            raise UserError(
                f"these Wan weights read {self.sizes.extra_channels} channels beside the latents (a mask and "
                f"image latents) and got {extra}: use a plan that brings them, or weights that fit the plan"
            )
        x_BNC = video.x_BNC
        if video.extra_BNC is not None:
            parts = [t.unflatten(-1, (cells, -1)) for t in (x_BNC, video.extra_BNC.to(x_BNC.dtype))]
            x_BNC = torch.cat(parts, dim=-1).flatten(-2)
        dtype = self.patch_embedding.weight.dtype
        return self.patch_embedding(x_BNC.to(dtype)).to(dtype)

    def _sources_of(
        self, streams: Streams, batch: int, cache: KVCache | None
    ) -> list[tuple[Tensor | None, Attributes, Tensor | None]]:
        """The sources of cross-attention: tokens (B, M, D), their attributes, which are valid. Without the
        tokens where the cache has what is needed of them."""
        embed, wanted = self.condition_embedder, self.condition_embedder.image_embedder is not None
        if ("image" in streams) != wanted:
            raise UserError(
                f"these Wan weights read {'' if wanted else 'no '}CLIP image tokens and the plan brings "
                f"{'none' if wanted else 'some'}: use weights that fit the plan"
            )
        sources = []
        for modality in self._sources:
            stream = _as_words(streams[modality])
            keys, valid, x_BMD = stream.attributes, stream.valid_BN, None
            if cache is not None and modality in cache:
                keys, valid = held_words(cache, streams[modality])
            else:
                embedder = embed.text_embedder if modality == "text" else embed.image_embedder
                assert embedder is not None
                x_BMD = embedder(stream.x_BNC.to(self.proj_out.weight.dtype)).expand(batch, -1, -1)
            sources.append((x_BMD, keys, valid))
        return sources

    def _chunk(self, x_BND: Tensor, contexts: list[Context], streams: Streams, cache: KVCache) -> Tensor:
        """Through all blocks with the past of the cache, which is handed what they computed."""
        video = streams["video"]
        before, _ = places(video, cache)

        def turn(modality: str, k_BPHd: Tensor) -> Tensor:
            if before is None or modality != "video":
                return k_BPHd
            tables = cache.remember("tables of the past", lambda: self._rotary(before.index_BN3))
            return rotate_pairs(k_BPHd, tables).to(k_BPHd.dtype)

        pasts = cache.past(("video",), turn)
        unheard: list[Past] = [()] * len(pasts)
        held = [cache.past((m,), turn) if m in cache else unheard for m in self._sources]
        own, heard = [], []
        for block, context, past, *pairs in zip(self.blocks(), contexts, pasts, *held, strict=True):
            x_BND, (own_pair, heard_pairs) = self._through(block, x_BND, context, past, tuple(pairs))
            own.append(own_pair)
            heard.append(heard_pairs)
        cache.offer("video", facts(video), own)
        for modality, layers in zip(self._sources, zip(*heard, strict=True), strict=True):
            if modality not in cache:
                cache.hold(modality, facts(_as_words(streams[modality])), layers)
        return x_BND

    def _through(self, block: nn.Module, *inputs: Any) -> Any:
        if self.checkpoint_blocks and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)

    def _rotary(self, index_BN3: Tensor) -> Rotary:
        """Tables (B or 1, N, 1, d): rows and columns get a third of the pairs each, rounded down."""
        pairs = self.sizes.attention_head_dim // 2
        side = pairs // 3
        cos, sin = index_rotary(index_BN3, (pairs - 2 * side, side, side))
        dtype = torch.promote_types(self.proj_out.weight.dtype, torch.float32)
        return cos.to(dtype)[:, :, None], sin.to(dtype)[:, :, None]


def _as_words(stream: Stream) -> Stream:
    """A source as visibilities see it: a picture that is shown is outside of the video's time, like words."""
    return replace(stream, modality="text")


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Normalised, scaled and shifted in float32 at least, then in the dtype of ``x``."""
    return (F.layer_norm(wide(x), x.shape[-1:], eps=eps) * (1 + scale) + shift).to(x.dtype)


def wide(x: Tensor) -> Tensor:
    """``x`` in float32, or in what it is if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
