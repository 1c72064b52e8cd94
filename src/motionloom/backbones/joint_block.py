"""The blocks of the joint backbone: words and the tokens of a stream in one attention.

With sound a block has two such halves, each with words of its own, and attention between their tokens. What
a token asks of the other stream and what it offers to it is modulated by its own noise level, so no token
needs to know of levels elsewhere: nothing of them leaks between chunks, and a cache holds what was offered.

Shapes: B batch, L words, N tokens of a stream, M of the other, J = L + N (with a cache one of them is 0),
K noise levels, P modulation parts or tokens of the past, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from motionloom.backbones.parts import modulate
from motionloom.config.recipe import ModelConfig
from motionloom.nn.attention import Pattern, attend, join_heads, split_heads
from motionloom.nn.cache import Pair, Past, extend
from motionloom.nn.init import fill
from motionloom.nn.mlp import MLP
from motionloom.nn.modulation import per_token
from motionloom.nn.norms import HeadNorm
from motionloom.nn.rope import Rotary, rotate

PARTS = 6
"""Shift, scale and gate of attention and of the feed-forward layer."""
ASKS, OFFERS = 3, 2
"""Between the streams: shift, scale and gate of who asks; shift and scale of who answers."""
Sight = Pattern | Tensor | None
"""What ``plans.lower`` makes of a visibility."""
Parts = tuple[Tensor, ...]
"""Every token's modulation, (B, N or 1, D) each."""


class Context(NamedTuple):
    """What all blocks share for one stream."""

    words: int
    """L: how many of the tokens are words; they stand first."""
    text_modulation_BKPD: Tensor
    own_modulation_BKPD: Tensor
    text_one_hot_BLK: Tensor | None
    own_one_hot_BNK: Tensor | None
    rotary: Rotary
    """(B or 1, J, 1, D/H)."""


class Given(NamedTuple):
    """What one block is given for one stream besides its tokens."""

    context: Context
    mask: Sight
    """Who sees whom, lowered: (B, H, J, J), or (B, H, N, L + P + N) with a cache."""
    keep: Tensor | None = None
    """Dropout of the feed-forward layer."""
    past: Past | None = None
    """Keys and values of earlier chunks; None where nothing is cached."""
    skip_self: bool = False
    """Tokens hand on their values instead of attending; words attend."""


class Cross(NamedTuple):
    """What one block is given for one stream to ask the other, and to answer it."""

    modulation_BKPD: Tensor
    """Of what is asked, then of what is offered."""
    one_hot_BNK: Tensor | None
    rotary: Rotary
    """By seconds alone, (B or 1, N, 1, D/H)."""
    mask: Sight
    """The stream's tokens look at the other's, (B, H, N, P + M)."""
    seeing_BN1: Tensor | None
    """False for tokens that see none of the other's; None if all see some."""
    offered: Past = ()
    """Keys and values that the other's earlier chunks offered."""


class Block(nn.Module):
    """Attention and feed-forward over words and the tokens of one stream together.

    Args:
        dim: width of the stream, which may be another than the config's.
        modality: name of the tokens that are no words.
    """

    def __init__(self, config: ModelConfig, dim: int, modality: str = "video") -> None:
        super().__init__()
        self.heads, self.own_table = config.num_heads, f"{modality}_table_PD"
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.norm = HeadNorm(dim // config.num_heads)
        self.out = nn.Linear(dim, dim, bias=False)
        self.mlp = MLP(dim, int(config.mlp_ratio * dim))
        self.text_table_PD = nn.Parameter(torch.zeros(PARTS, dim))
        self.register_parameter(self.own_table, nn.Parameter(torch.zeros(PARTS, dim)))

    def init_weights(self) -> None:
        """All that is no linear layer."""
        fill(0.0, self.text_table_PD, getattr(self, self.own_table))
        self.norm.init_weights()

    def forward(self, x_BJD: Tensor, given: Given) -> Tensor | tuple[Tensor, Pair]:
        """``x``; and beside it this layer's own keys, unrotated, and values, if there is a past."""
        text, own = self.spread(given.context)
        x_BJD, pair = self.mix(x_BJD, text, own, given)
        x_BJD = self.think(x_BJD, text, own, given)
        return x_BJD if given.past is None else (x_BJD, pair)

    def spread(self, context: Context) -> tuple[Parts, Parts]:
        """The modulation of words and of the stream's tokens."""
        text_BKPD = context.text_modulation_BKPD + self.text_table_PD
        own_BKPD = context.own_modulation_BKPD + getattr(self, self.own_table)
        return per_token(text_BKPD, context.text_one_hot_BLK), per_token(own_BKPD, context.own_one_hot_BNK)

    def mix(self, x_BJD: Tensor, text: Parts, own: Parts, given: Given) -> tuple[Tensor, Pair]:
        """Attention."""
        mixed_BJD, pair = self.attention(_adapted(x_BJD, text, own, given.context.words, 0), given)
        return _gated(x_BJD, mixed_BJD, text, own, given.context.words, 2), pair

    def think(self, x_BJD: Tensor, text: Parts, own: Parts, given: Given) -> Tensor:
        """Feed-forward."""
        y_BJD = self.mlp(_adapted(x_BJD, text, own, given.context.words, 3))
        y_BJD = y_BJD if given.keep is None else y_BJD * given.keep
        return _gated(x_BJD, y_BJD, text, own, given.context.words, 5)

    def attention(self, x_BJD: Tensor, given: Given) -> tuple[Tensor, Pair]:
        """Everyone with everyone, and with the past, that the mask allows."""
        q, k, v = split_heads(self.qkv(x_BJD), 3, self.heads)
        q, k = self.norm(q, k)
        own = k.to(v.dtype), v
        q, k = (rotate(t, given.context.rotary).to(v.dtype) for t in (q, k))
        k, values = extend(given.past or (), k, v)
        q, k, values = (t.transpose(1, 2) for t in (q, k, values))
        mixed_BJD = join_heads(attend(q, k, values, given.mask))
        if given.skip_self:
            words = given.context.words
            mixed_BJD = torch.cat([mixed_BJD[:, :words], v[:, words:].flatten(2)], dim=1)
        return self.out(mixed_BJD), own


class Crossing(nn.Module):
    """Tokens of one stream ask those of the other, in heads as wide as those of sound (LTX-2,
    arXiv 2601.03233, whose two directions stand side by side in a block as well)."""

    def __init__(self, config: ModelConfig, asks: int, answers: int) -> None:
        super().__init__()
        inner = config.audio_dim
        self.heads = config.num_heads
        self.q = nn.Linear(asks, inner, bias=False)
        self.kv = nn.Linear(answers, 2 * inner, bias=False)
        self.norm = HeadNorm(inner // config.num_heads)
        self.out = nn.Linear(inner, asks, bias=False)
        self.ask_table_PD = nn.Parameter(torch.zeros(ASKS, asks))
        self.offer_table_PD = nn.Parameter(torch.zeros(OFFERS, answers))

    def init_weights(self) -> None:
        """All that is no linear layer."""
        fill(0.0, self.ask_table_PD, self.offer_table_PD)
        self.norm.init_weights()

    def forward(self, x_BND: Tensor, other_BMD: Tensor, asker: Cross, answerer: Cross) -> tuple[Tensor, Pair]:
        """What the answers add to ``x``; beside it what was offered, keys unrotated, and values."""
        asked_BKPD = asker.modulation_BKPD[:, :, :ASKS] + self.ask_table_PD
        offered_BKPD = answerer.modulation_BKPD[:, :, ASKS:] + self.offer_table_PD
        shift, scale, gate = per_token(asked_BKPD, asker.one_hot_BNK)
        (q,) = split_heads(self.q(modulate(x_BND, shift, scale)), 1, self.heads)
        offered_BMD = modulate(other_BMD, *per_token(offered_BKPD, answerer.one_hot_BNK))
        k, v = split_heads(self.kv(offered_BMD), 2, self.heads)
        q, k = self.norm(q, k)
        own = k.to(v.dtype), v
        q, k = rotate(q, asker.rotary).to(v.dtype), rotate(k, answerer.rotary).to(v.dtype)
        k, v = extend(asker.offered, k, v)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y_BND = self.out(join_heads(attend(q, k, v, asker.mask)))
        # Tokens that see none of the other stream were shown all of it: attention must look somewhere.
        return gate * (y_BND if asker.seeing_BN1 is None else y_BND * asker.seeing_BN1), own


Streamed = dict[str, Tensor]
"""Words and tokens of each stream that is there, by modality."""
OFFERED = {"video": "video for audio", "audio": "audio for video"}
"""What a cache calls that which a stream offers to the other."""


class SoundBlock(Block):
    """A block for video beside one for sound, and attention between the two, both ways.

    The video's parameters are named as in :class:`Block`; all others have ``audio`` in their names.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, config.dim)
        self.audio_block = Block(config, config.audio_dim, "audio")
        self.audio_to_video = Crossing(config, config.dim, config.audio_dim)
        self.video_to_audio = Crossing(config, config.audio_dim, config.dim)

    def init_weights(self) -> None:
        """All that is no linear layer."""
        super().init_weights()
        for part in (self.audio_block, self.audio_to_video, self.video_to_audio):
            part.init_weights()

    def forward(  # type: ignore[override]
        self, x: Streamed, given: Mapping[str, Given], between: Mapping[str, Cross]
    ) -> Streamed | tuple[Streamed, dict[str, Pair]]:
        """``x``; and beside it what this layer leaves for a cache, by name, if there is a past.

        Args:
            between: of both streams; empty keeps them from each other.
        """
        blocks: dict[str, Block] = {"video": self, "audio": self.audio_block}
        spread = {m: blocks[m].spread(one.context) for m, one in given.items()}
        mixed = {m: blocks[m].mix(x[m], *spread[m], one) for m, one in given.items()}
        x = {m: x_BJD for m, (x_BJD, _) in mixed.items()}
        left = {m: pair for m, (_, pair) in mixed.items()}
        if between:
            x, offered = self.cross(x, given, between)
            left.update(offered)
        x = {m: blocks[m].think(x[m], *spread[m], one) for m, one in given.items()}
        return (x, left) if any(one.past is not None for one in given.values()) else x

    def cross(
        self, x: Streamed, given: Mapping[str, Given], between: Mapping[str, Cross]
    ) -> tuple[Streamed, dict[str, Pair]]:
        """Both ways at once, from the same state of the two; beside it what each offered."""
        video_BND, audio_BMD = (x[m][:, given[m].context.words :] for m in OFFERED)
        video, audio = between["video"], between["audio"]
        heard_BND, from_audio = self.audio_to_video(video_BND, audio_BMD, video, audio)
        seen_BMD, from_video = self.video_to_audio(audio_BMD, video_BND, audio, video)
        crossed = {"video": video_BND + heard_BND, "audio": audio_BMD + seen_BMD}
        whole = {m: torch.cat([x[m][:, : given[m].context.words], crossed[m]], dim=1) for m in OFFERED}
        return whole, {OFFERED["video"]: from_video, OFFERED["audio"]: from_audio}


def _adapted(x_BJD: Tensor, text: Parts, own: Parts, words: int, layer: int) -> Tensor:
    x_BLD, x_BND = x_BJD[:, :words], x_BJD[:, words:]
    return torch.cat(
        [modulate(x_BLD, text[layer], text[layer + 1]), modulate(x_BND, own[layer], own[layer + 1])], dim=1
    )


def _gated(x_BJD: Tensor, y_BJD: Tensor, text: Parts, own: Parts, words: int, layer: int) -> Tensor:
    y = [text[layer] * y_BJD[:, :words], own[layer] * y_BJD[:, words:]]
    return x_BJD + torch.cat(y, dim=1)
