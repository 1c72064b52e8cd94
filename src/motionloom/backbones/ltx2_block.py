"""One block of LTX-2: video and audio side by side, each attending to itself, to the text and to the other.

Parameters are named and shaped as in diffusers' LTX2VideoTransformerBlock.

Shapes: B batch, N tokens of a stream, M tokens attended to, L text tokens, K noise levels, P modulation
parts, D width of a stream, H heads, X channels of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motionloom.backbones.ltx2_rope import turn_heads
from motionloom.backbones.ltx2_sizes import LTX2Sizes, Pairing
from motionloom.backbones.parts import modulate
from motionloom.nn.attention import Pattern, attend
from motionloom.nn.cache import Pair, Past, extend
from motionloom.nn.mlp import FeedForward
from motionloom.nn.modulation import at_levels
from motionloom.nn.norms import EPS, rms_norm
from motionloom.nn.rope import Rotary

Sight = Pattern | Tensor | None
"""What ``lower`` makes of a visibility."""


class Modulation(NamedTuple):
    """P vectors for each of a few noise levels, before a block adds its table; and each token's level."""

    parts_BKPD: Tensor
    level_BN: Tensor | None
    """None where there is one level."""

    def with_table(self, table_PD: Tensor, first: int = 0, last: int | None = None) -> tuple[Tensor, ...]:
        """(B, N or 1, D) for each part from ``first`` to before ``last``."""
        here = slice(first, last)
        return at_levels(self.parts_BKPD[:, :, here] + table_PD[here], self.level_BN)


class Cross(NamedTuple):
    """What a stream brings to the attention between the two."""

    modulation: Modulation
    rotary: Rotary
    pattern: Sight = None
    """The stream's tokens look at the other's."""
    answered_BN1: Tensor | None = None
    """0 for tokens that see none of the other's, 1 for the rest; None if all see some."""


class Side(NamedTuple):
    """What blocks share for one stream; all of them, where the visibility is the same in all."""

    modulation: Modulation
    rotary: Rotary
    text_BLD: Tensor | None
    """None where a cache holds its keys and values."""
    text_modulation: Modulation | None
    """None where the text is not modulated by its noise level."""
    cross: Cross | None
    """None without the other stream."""
    pattern: Sight = None
    text_pattern: Sight = None


class Before(NamedTuple):
    """What one layer reads of a stream's past, by use: keys, rotated, and values."""

    own: Past = ()
    text: Past = ()
    """Of all words; empty unless they need not be computed again."""
    offered: Past = ()
    """What this stream's tokens are to the other stream."""


class Fresh(NamedTuple):
    """What one layer computes of a stream's present, by the same uses: keys, not rotated, and values."""

    own: Past = ()
    text: Past = ()
    offered: Past = ()


class RMSNorm(nn.RMSNorm):
    """Over all heads together."""

    def forward(self, x: Tensor) -> Tensor:
        # Fused kernels want one dtype, which under autocast is that of x.
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Queries of one sequence, keys and values of the same or another one; optionally a gate per head."""

    def __init__(
        self, dim: int, inner: int, heads: int, rope: Pairing, gated: bool, context_dim: int | None = None
    ) -> None:
        super().__init__()
        self.heads, self.rope = heads, rope
        self.norm_q = RMSNorm(inner, eps=EPS)
        self.norm_k = RMSNorm(inner, eps=EPS)
        self.to_q = nn.Linear(dim, inner)
        self.to_k = nn.Linear(context_dim or dim, inner)
        self.to_v = nn.Linear(context_dim or dim, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, dim)])
        self.to_gate_logits = nn.Linear(dim, heads) if gated else None

    def pair(self, context_BMD: Tensor) -> Pair:
        """Keys, normalised but not rotated, and values, (B, M, H, X) each."""
        v_BMHX = self._heads(self.to_v(context_BMD))
        return self._heads(self.norm_k(self.to_k(context_BMD))).to(v_BMHX.dtype), v_BMHX

    def forward(
        self,
        x_BND: Tensor,
        pair: Pair,
        pattern: Sight,
        rotary: Rotary | None = None,
        pair_rotary: Rotary | None = None,
        past: Past = (),
    ) -> Tensor:
        """(B, N, D) -> (B, N, D).

        Args:
            pair: of :meth:`pair`; turned by ``pair_rotary`` here.
            past: further keys, turned already, and values; they stand before ``pair`` in ``pattern``.
        """
        q_BNHX = self._heads(self.norm_q(self.to_q(x_BND)))
        k_BMHX, v_BMHX = pair
        if rotary is not None and pair_rotary is not None:
            q_BNHX = turn_heads(q_BNHX, rotary, self.rope)
            k_BMHX = turn_heads(k_BMHX, pair_rotary, self.rope).to(v_BMHX.dtype)
        k_BMHX, v_BMHX = extend(past, k_BMHX, v_BMHX)
        q, k, v = (t.to(v_BMHX.dtype).transpose(1, 2) for t in (q_BNHX, k_BMHX, v_BMHX))
        return self.leave(x_BND, attend(q, k, v, pattern).transpose(1, 2))

    def leave(self, x_BND: Tensor, y_BNHX: Tensor) -> Tensor:
        """What the heads found, gated by the tokens that asked, at the width of the stream."""
        if self.to_gate_logits is not None:
            # Twice the sigmoid: gates of zero weights let through exactly what came.
            y_BNHX = y_BNHX * (2 * self.to_gate_logits(x_BND).sigmoid())[..., None]
        return self.to_out[0](y_BNHX.flatten(2))

    def _heads(self, x_BNX: Tensor) -> Tensor:
        return x_BNX.unflatten(-1, (self.heads, -1))


class StreamLayers(NamedTuple):
    """The layers of a block that belong to one stream alone."""

    attn1: Attention
    attn2: Attention
    ff: FeedForward
    table_PD: Tensor
    """Shift, scale and gate: of self-attention, the feed-forward layer and, maybe, attention to the text."""
    text_table_PD: Tensor | None

    def attend(self, x_BND: Tensor, side: Side, past: Before, skip_self: bool) -> tuple[Tensor, Fresh]:
        """Self-attention, then attention to the text; beside it the pairs of both."""
        shift, scale, gate = side.modulation.with_table(self.table_PD, 0, 3)
        h_BND = modulate(x_BND, shift, scale)
        own = self.attn1.pair(h_BND)
        if skip_self:
            y_BND = self.attn1.leave(h_BND, own[1])
        else:
            y_BND = self.attn1(h_BND, own, side.pattern, side.rotary, side.rotary, past.own)
        x_BND = x_BND + gate * y_BND
        text = past.text or self.attn2.pair(self._text(side))
        if len(self.table_PD) == 9:
            shift, scale, gate = side.modulation.with_table(self.table_PD, 6, 9)
            x_BND = x_BND + gate * self.attn2(modulate(x_BND, shift, scale), text, side.text_pattern)
        else:
            x_BND = x_BND + self.attn2(rms_norm(x_BND), text, side.text_pattern)
        return x_BND, Fresh(own, text)

    def feed_forward(self, x_BND: Tensor, side: Side) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        shift, scale, gate = side.modulation.with_table(self.table_PD, 3, 6)
        return x_BND + gate * self.ff(modulate(x_BND, shift, scale))

    def _text(self, side: Side) -> Tensor:
        assert side.text_BLD is not None
        if self.text_table_PD is None:
            return side.text_BLD
        if side.text_modulation is None:
            shift, scale = self.text_table_PD
        else:
            shift, scale = side.text_modulation.with_table(self.text_table_PD)
        return side.text_BLD * (1 + scale) + shift


class Block(nn.Module):
    """Self-attention, attention to the text, attention between the streams, feed-forward."""

    def __init__(self, sizes: LTX2Sizes) -> None:
        super().__init__()
        heads, rope, dim, audio_dim = sizes.num_attention_heads, sizes.rope_type, sizes.dim, sizes.audio_dim
        gated, audio_gated = sizes.gated_attn, sizes.audio_gated_attn
        self.attn1 = Attention(dim, dim, heads, rope, gated)
        self.attn2 = Attention(dim, dim, heads, rope, gated)
        self.audio_attn1 = Attention(audio_dim, audio_dim, heads, rope, audio_gated)
        self.audio_attn2 = Attention(audio_dim, audio_dim, heads, rope, audio_gated)
        self.audio_to_video_attn = Attention(dim, audio_dim, heads, rope, gated, audio_dim)
        self.video_to_audio_attn = Attention(audio_dim, audio_dim, heads, rope, audio_gated, dim)
        self.ff = FeedForward(dim, 4 * dim, dim, bias=sizes.ff_bias)
        self.audio_ff = FeedForward(audio_dim, 4 * audio_dim, audio_dim, bias=sizes.audio_ff_bias)

        def table(parts: int, width: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(parts, width))

        self.scale_shift_table = table(9 if sizes.cross_attn_mod else 6, dim)
        self.audio_scale_shift_table = table(9 if sizes.audio_cross_attn_mod else 6, audio_dim)
        modulated = sizes.text_modulated
        self.prompt_scale_shift_table = table(2, dim) if modulated else None
        self.audio_prompt_scale_shift_table = table(2, audio_dim) if modulated else None
        # Scale and shift for audio to video, scale and shift for video to audio, gate of what comes in.
        self.video_a2v_cross_attn_scale_shift_table = table(5, dim)
        self.audio_a2v_cross_attn_scale_shift_table = table(5, audio_dim)

    def forward(
        self,
        x: tuple[Tensor | None, Tensor | None],
        sides: tuple[Side | None, Side | None],
        skip_self: bool = False,
        pasts: tuple[Before, Before] | None = None,
    ) -> tuple[tuple[Tensor | None, Tensor | None], tuple[Fresh, Fresh] | None]:
        """(video, audio) through the block; a stream that is None stays None.

        Args:
            skip_self: self-attention hands on its values instead, for spatio-temporal skip guidance
                (arXiv 2411.18664).
            pasts: what earlier chunks left in this layer for (video, audio). The answer holds what the
                present leaves, and None without ``pasts``, so that nothing is kept alive.
        """
        video_BND, audio_BND = x
        video, audio = sides
        video_past, audio_past = pasts or (Before(), Before())
        video_left, audio_left = Fresh(), Fresh()
        video_layers, audio_layers = self._video_layers(), self._audio_layers()
        if video_BND is not None and video is not None:
            video_BND, video_left = video_layers.attend(video_BND, video, video_past, skip_self)
        if audio_BND is not None and audio is not None:
            audio_BND, audio_left = audio_layers.attend(audio_BND, audio, audio_past, skip_self)
        if video is not None and audio is not None and video.cross is not None and audio.cross is not None:
            assert video_BND is not None
            assert audio_BND is not None
            crossing = self._between(video_BND, audio_BND, video.cross, audio.cross, video_past, audio_past)
            video_BND, audio_BND, from_video, from_audio = crossing
            video_left = video_left._replace(offered=from_video)
            audio_left = audio_left._replace(offered=from_audio)
        if video_BND is not None and video is not None:
            video_BND = video_layers.feed_forward(video_BND, video)
        if audio_BND is not None and audio is not None:
            audio_BND = audio_layers.feed_forward(audio_BND, audio)
        return (video_BND, audio_BND), None if pasts is None else (video_left, audio_left)

    def _video_layers(self) -> StreamLayers:
        return StreamLayers(
            self.attn1, self.attn2, self.ff, self.scale_shift_table, self.prompt_scale_shift_table
        )

    def _audio_layers(self) -> StreamLayers:
        return StreamLayers(
            self.audio_attn1,
            self.audio_attn2,
            self.audio_ff,
            self.audio_scale_shift_table,
            self.audio_prompt_scale_shift_table,
        )

    def _between(
        self,
        video_BND: Tensor,
        audio_BND: Tensor,
        video: Cross,
        audio: Cross,
        video_past: Before,
        audio_past: Before,
    ) -> tuple[Tensor, Tensor, Pair, Pair]:
        """Audio to video and video to audio, both from the same state of the two; then what each offered."""
        v = video.modulation.with_table(self.video_a2v_cross_attn_scale_shift_table)
        a = audio.modulation.with_table(self.audio_a2v_cross_attn_scale_shift_table)
        from_audio = self.audio_to_video_attn.pair(modulate(audio_BND, a[1], a[0]))
        from_video = self.video_to_audio_attn.pair(modulate(video_BND, v[3], v[2]))
        to_video = self.audio_to_video_attn(
            modulate(video_BND, v[1], v[0]),
            from_audio,
            video.pattern,
            video.rotary,
            audio.rotary,
            audio_past.offered,
        )
        to_audio = self.video_to_audio_attn(
            modulate(audio_BND, a[3], a[2]),
            from_video,
            audio.pattern,
            audio.rotary,
            video.rotary,
            video_past.offered,
        )
        if video.answered_BN1 is not None:
            to_video = to_video * video.answered_BN1
        if audio.answered_BN1 is not None:
            to_audio = to_audio * audio.answered_BN1
        return video_BND + v[4] * to_video, audio_BND + a[4] * to_audio, from_video, from_audio
