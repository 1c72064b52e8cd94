"""LTX-2 (arXiv 2601.03233): video and sound denoised together, two streams that listen to each other.

LTX-2, 2.3 and what diffusers knows of 2.5, with parameters named as in its ``LTX2VideoTransformer3DModel``. A
stream that is absent leaves out its half and the attention between the two; one that is given clean (noise
level 0) still takes part in it, which is how sound is made for a film and a film for a sound.

Where the original has one noise level per sample, there is one per token here:

- Attention between the streams is modulated by the level of the other stream: the highest among its tokens
  of the same chunk, context copies apart from the rest, and 0 if it has none there. Where the visibility
  does not go by chunks it is the highest of the sample. So no chunk learns of the noise of
  a later one, and a chunk made from a cache is modulated as it is in one masked forward.
- Keys and values of the text are modulated by the text token's own level (``text.level_BN``).

With equal levels in all tokens, the text's among them, that is the original's answer. Plans of causal chunks
put the text at level 0, since it may not hear of any chunk's noise: prompt AdaLN (2.3) then says "clean"
whatever the level of the video, which is not what the original would answer.

Shapes: B batch, N tokens of a stream, M of the other, L text tokens, K noise levels, P modulation parts,
D width of a stream, H heads, C channels of a token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from motionloom.backbones.base import Perturbation
from motionloom.backbones.ltx2_block import Attention, Block, Cross, Modulation, Side
from motionloom.backbones.ltx2_keys import ORIGINAL_KEYS
from motionloom.backbones.ltx2_reach import (
    Left,
    Pasts,
    Reach,
    cross_levels,
)
from motionloom.backbones.ltx2_rope import own_tables, shared_tables
from motionloom.backbones.ltx2_sizes import PRESETS, LTX2Sizes
from motionloom.errors import UserError
from motionloom.nn.cache import KVCache
from motionloom.nn.init import fill, init_linears
from motionloom.nn.mlp import Embedder
from motionloom.nn.modulation import FEATURES, TimestepEmbedding
from motionloom.nn.norms import EPS
from motionloom.plans.lower import per_block
from motionloom.plans.stream import Stream, Streams
from motionloom.plans.visibility import Visibility

__all__ = ["LTX2", "ORIGINAL_KEYS", "PRESETS", "LTX2Sizes"]

Sides = tuple[Side | None, Side | None]
"""Of (video, audio)."""
START = 0.02
"""How large gates and predictions are at first."""


class AdaLN(nn.Module):
    """Noise levels -> an embedding, and P vectors made from it."""

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.emb = nn.ModuleDict({"timestep_embedder": TimestepEmbedding(FEATURES, dim)})
        self.linear = nn.Linear(dim, parts * dim)

    def forward(self, timestep_BK: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K) -> (B, K, P, D) and the embedding (B, K, 1, D), in the dtype of the weights."""
        dtype = self.linear.weight.dtype
        embedded_BKD = self.emb["timestep_embedder"](timestep_BK)
        parts_BKPD = self.linear(F.silu(embedded_BKD)).unflatten(-1, (self.parts, -1))
        return parts_BKPD.to(dtype), embedded_BKD[:, :, None].to(dtype)


class Ends(NamedTuple):
    """The layers before and after the blocks that belong to one stream."""

    proj_in: nn.Linear
    caption_projection: Embedder | None
    time_embed: AdaLN
    prompt_adaln: AdaLN | None
    cross_adaln: AdaLN
    cross_gate: AdaLN
    table_2D: Tensor
    proj_out: nn.Linear


class LTX2(nn.Module):
    """See the top of this file. ``forward`` as in :class:`~motionloom.backbones.base.Backbone`.

    Streams: ``video`` and ``audio``, or one of them; ``text``, whose channels are the video's context and the
    audio's side by side, as the text path's connectors make them.
    """

    patch = (1, 1, 1)
    modalities: tuple[str, ...] = ("video", "audio")

    def __init__(self, sizes: LTX2Sizes, *, checkpoint_blocks: bool = False) -> None:
        super().__init__()
        self.sizes, self.checkpoint_blocks = sizes, checkpoint_blocks
        self.latent_channels, self.audio_channels = sizes.in_channels, sizes.audio_in_channels
        self.text_dim = sum(sizes.text_channels)
        dim, audio_dim = sizes.dim, sizes.audio_dim
        self.proj_in = nn.Linear(sizes.in_channels, dim)
        self.audio_proj_in = nn.Linear(sizes.audio_in_channels, audio_dim)
        self.keyframes_abs_pos_embedding: nn.Parameter | None = None
        if sizes.use_keyframes_abs_pos_embedding:
            self.keyframes_abs_pos_embedding = nn.Parameter(torch.zeros(1, dim))
        self.caption_projection = self.audio_caption_projection = None
        if sizes.use_prompt_embeddings:
            self.caption_projection = Embedder(sizes.caption_channels, dim, nn.GELU("tanh"))
            self.audio_caption_projection = Embedder(
                sizes.caption_channels, audio_dim, nn.GELU(approximate="tanh")
            )
        self.time_embed = AdaLN(dim, 9 if sizes.cross_attn_mod else 6)
        self.audio_time_embed = AdaLN(audio_dim, 9 if sizes.audio_cross_attn_mod else 6)
        self.prompt_adaln = self.audio_prompt_adaln = None
        if sizes.text_modulated and sizes.use_prompt_adaln_single:
            self.prompt_adaln, self.audio_prompt_adaln = AdaLN(dim, 2), AdaLN(audio_dim, 2)
        self.av_cross_attn_video_scale_shift = AdaLN(dim, 4)
        self.av_cross_attn_audio_scale_shift = AdaLN(audio_dim, 4)
        self.av_cross_attn_video_a2v_gate = AdaLN(dim, 1)
        self.av_cross_attn_audio_v2a_gate = AdaLN(audio_dim, 1)
        self.transformer_blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.num_layers))
        self.scale_shift_table = nn.Parameter(torch.zeros(2, dim))
        self.audio_scale_shift_table = nn.Parameter(torch.zeros(2, audio_dim))
        self.proj_out = nn.Linear(dim, sizes.in_channels)
        self.audio_proj_out = nn.Linear(audio_dim, sizes.audio_in_channels)

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks in order."""
        return list(self.transformer_blocks)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Every weight anew. Blocks begin close to the identity and the prediction close to zero: small, not
        zero as in adaLN-Zero, so that every parameter learns from the first step on."""
        init_linears(self, generator)
        for name, parameter in self.named_parameters():
            if name.endswith("_table") or name == "keyframes_abs_pos_embedding":
                fill(0.0, parameter)
        for part in self.modules():
            if isinstance(part, nn.RMSNorm):
                fill(1.0, part.weight)
            elif isinstance(part, AdaLN):
                part.linear.weight.mul_(START)
            elif isinstance(part, Attention) and part.to_gate_logits is not None:
                fill(0.0, part.to_gate_logits.weight)
        for end in (self.proj_out, self.audio_proj_out):
            end.weight.mul_(START)

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
        """The velocity of video and audio, where they are present, in the dtype of their latents.

        Args:
            cache: of :meth:`new_cache`; the streams are then those of its present chunk, and all chunks bring
                the same modalities. Words are held in it where the weights do not modulate them by noise.

        Raises:
            UserError: the text's channels are not those of the two contexts.
        """
        perturb = perturb or Perturbation()
        text = streams["text"]
        present = tuple(streams[m] for m in ("video", "audio") if m in streams)
        batch = max(len(t) for s in (*present, text) for t in (s.x_BNC, s.sigma_BK))
        attributes = {s.modality: s.attributes for s in present}
        reach = Reach(self.sizes, present, attributes, text, cache)
        words_held = reach.holds_words()
        x: dict[str, Tensor] = {}
        blind: dict[str, Side] = {}
        embedded: dict[str, Modulation] = {}
        for stream in present:
            name = stream.modality
            others = [s for s in present if s is not stream and not perturb.isolate]
            x[name] = self._enter(stream, batch)
            words_BLD = None if words_held else self._words(name, text, batch)
            blind[name], embedded[name] = self._side(stream, others, words_BLD, reach, visibility.by_chunk)

        def seen(rule: Visibility) -> Sides:
            video, audio = (reach.seen(m, blind[m], rule) if m in blind else None for m in ("video", "audio"))
            return video, audio

        sides = per_block(visibility, len(self.transformer_blocks), seen)
        pasts = None if cache is None else reach.past(crossing=len(present) == 2 and not perturb.isolate)
        left = self._run(x, sides, perturb.skip_self, pasts)
        if cache is not None:
            reach.offer(left, hold_words=self.prompt_adaln is None and not words_held)
        return {s.modality: self._leave(s, x[s.modality], embedded[s.modality]) for s in present}

    def _run(
        self,
        x: dict[str, Tensor],
        sides: list[Sides],
        skip_self: tuple[int, ...],
        pasts: Pasts | None,
    ) -> Left:
        """``x`` through all blocks, in place; what each layer leaves for a cache."""
        both = (x.get("video"), x.get("audio"))
        left = []
        for index, block in enumerate(self.transformer_blocks):
            extra = (sides[index], index in skip_self, None if pasts is None else pasts[index])
            if self.checkpoint_blocks and torch.is_grad_enabled():
                both, leaves = checkpoint(block, both, *extra, use_reentrant=False, preserve_rng_state=False)
            else:
                both, leaves = block(both, *extra)
            left.append(leaves)
        x.update({m: t for m, t in zip(("video", "audio"), both, strict=True) if t is not None})
        return left

    def _ends(self, modality: str) -> Ends:
        if modality == "video":
            return Ends(
                self.proj_in,
                self.caption_projection,
                self.time_embed,
                self.prompt_adaln,
                self.av_cross_attn_video_scale_shift,
                self.av_cross_attn_video_a2v_gate,
                self.scale_shift_table,
                self.proj_out,
            )
        return Ends(
            self.audio_proj_in,
            self.audio_caption_projection,
            self.audio_time_embed,
            self.audio_prompt_adaln,
            self.av_cross_attn_audio_scale_shift,
            self.av_cross_attn_audio_v2a_gate,
            self.audio_scale_shift_table,
            self.audio_proj_out,
        )

    def _enter(self, stream: Stream, batch: int) -> Tensor:
        """Latents -> (B, N, D) in the dtype of the weights."""
        proj_in = self._ends(stream.modality).proj_in
        dtype = proj_in.weight.dtype
        x_BND = proj_in(stream.x_BNC.to(dtype)).to(dtype)
        if stream.modality == "video" and self.keyframes_abs_pos_embedding is not None:
            # The first latent frame holds a single pixel frame.
            first_BN1 = (stream.cell_BN3[..., :1] == 0).to(dtype)
            x_BND = x_BND + first_BN1 * self.keyframes_abs_pos_embedding
        return x_BND.expand(batch, -1, -1)

    def _leave(self, stream: Stream, x_BND: Tensor, embedded: Modulation) -> Tensor:
        """(B, N, D) -> (B, N, C), shifted and scaled by each token's noise level."""
        ends = self._ends(stream.modality)
        shift, scale = embedded.with_table(ends.table_2D)
        x_BND = F.layer_norm(x_BND, x_BND.shape[-1:], eps=EPS)
        return ends.proj_out(x_BND * (1 + scale) + shift).to(stream.x_BNC.dtype)

    def _words(self, modality: str, text: Stream, batch: int) -> Tensor:
        """A stream's part of the text, (B, L, D)."""
        sizes, ends = self.sizes, self._ends(modality)
        if text.x_BNC.shape[-1] != self.text_dim:
            raise UserError(
                f"LTX-2's text has {text.x_BNC.shape[-1]} channels, these weights read {self.text_dim}: "
                f"{sizes.text_channels[0]} for the video and {sizes.text_channels[1]} for the audio"
            )
        video_BLC, audio_BLC = text.x_BNC.split(sizes.text_channels, dim=-1)
        text_BLC = (video_BLC if modality == "video" else audio_BLC).to(ends.proj_in.weight.dtype)
        if ends.caption_projection is not None:
            text_BLC = ends.caption_projection(text_BLC)
        return text_BLC.expand(batch, -1, -1)

    def _side(
        self,
        stream: Stream,
        others: list[Stream],
        words_BLD: Tensor | None,
        reach: Reach,
        by_chunk: bool,
    ) -> tuple[Side, Modulation]:
        """What all blocks share for one stream, and the noise that :meth:`_leave` reads."""
        ends, text, levels = self._ends(stream.modality), reach.text, _levels(stream)
        parts, embedded = ends.time_embed(self._timestep(stream.sigma_BK))
        text_modulation = None
        if ends.prompt_adaln is not None:
            noise, _ = ends.prompt_adaln(self._timestep(text.sigma_BK))
            text_modulation = Modulation(noise, _levels(text))
        side = Side(
            modulation=Modulation(parts, levels),
            rotary=own_tables(self.sizes, stream.modality, reach.position(stream)),
            text_BLD=words_BLD,
            text_modulation=text_modulation,
            cross=self._cross(stream, others[0], reach, by_chunk) if others else None,
        )
        return side, Modulation(embedded, levels)

    def _cross(self, stream: Stream, other: Stream, reach: Reach, by_chunk: bool) -> Cross:
        """What ``stream`` brings to the attention between the two."""
        ends, scale = self._ends(stream.modality), self.sizes.cross_attn_timestep_scale_multiplier
        sigma_BK, level_BN = cross_levels(stream, other, one_chunk=not by_chunk)
        parts, _ = ends.cross_adaln(self._timestep(sigma_BK))
        gate, _ = ends.cross_gate(sigma_BK.float() * scale)
        return Cross(
            modulation=Modulation(torch.cat([parts, gate], dim=2), level_BN),
            rotary=shared_tables(self.sizes, reach.position(stream)),
        )

    def _timestep(self, sigma_BK: Tensor) -> Tensor:
        return sigma_BK.float() * self.sizes.timestep_scale_multiplier


def _levels(stream: Stream) -> Tensor | None:
    return None if stream.sigma_BK.shape[1] == 1 else stream.level_BN
