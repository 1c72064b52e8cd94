"""What the tokens of one LTX-2 forward may look at: in the present, and in what a cache holds of the past.

A cache of LTX-2 has four kinds of entries for each chunk: both streams' own pairs, and what each offered to
the other, which are other projections of the same tokens. Words are held once, those for the video and those
for the audio side by side in each head.

Shapes: B batch, N tokens of a stream, M of the other, L text tokens, K keys or noise levels, H heads,
X channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from motionloom.backbones.ltx2_block import Before, Fresh, Side
from motionloom.backbones.ltx2_rope import own_tables, shared_tables, turn_heads
from motionloom.backbones.ltx2_sizes import LTX2Sizes
from motionloom.backbones.parts import sees_any
from motionloom.nn.cache import KVCache, Past
from motionloom.plans.lower import lower
from motionloom.plans.past import facts, held_words, join_facts, past_facts, places
from motionloom.plans.stream import Attributes, Stream
from motionloom.plans.visibility import Visibility

OFFERED = {"video": "video for audio", "audio": "audio for video"}
"""Under which name a cache holds what a stream offers to the other."""
Pasts = list[tuple[Before, Before]]
Left = list[tuple[Fresh, Fresh]]
"""For each layer: of the video, of the audio."""


@dataclass(frozen=True)
class Reach:
    """One forward's streams, and the past behind them."""

    sizes: LTX2Sizes
    streams: tuple[Stream, ...]
    """Video, audio or both, in this order; seconds are re-based by the first."""
    attributes: Mapping[str, Attributes]
    """Of the streams, by modality."""
    text: Stream
    cache: KVCache | None

    def keys(self, stream: Stream, name: str) -> tuple[Attributes, Tensor | None]:
        """Attributes and validity of the [past, present] keys that are held under ``name``."""
        past = [] if self.cache is None else past_facts(self.cache, name)
        if not past:
            return self.attributes[stream.modality], stream.valid_BN
        return join_facts([*past, facts(stream)])

    def position(self, stream: Stream) -> Tensor:
        """Where the present stands, (B or 1, N, 3), re-based as the cache's policy says."""
        if self.cache is None:
            return stream.position_BN3
        return places(stream, self.cache, self.streams[0])[1].position_BN3

    def seen(self, modality: str, side: Side, rule: Visibility) -> Side:
        """The side of this stream as blocks with this rule have it."""
        stream = next(s for s in self.streams if s.modality == modality)
        mine, cross = self.attributes[modality], side.cross
        if cross is not None:
            other = next(s for s in self.streams if s.modality != modality)
            keys, valid = self.keys(other, OFFERED[other.modality])
            answered = sees_any(rule, mine, keys, valid)
            cross = cross._replace(
                pattern=lower(rule, mine, keys, valid),
                answered_BN1=None if answered is None else answered.to(cross.modulation.parts_BKPD.dtype),
            )
        return side._replace(
            pattern=lower(rule, mine, *self.keys(stream, modality)),
            text_pattern=lower(rule, mine, *self.words()),
            cross=cross,
        )

    def words(self) -> tuple[Attributes, Tensor | None]:
        """Attributes and validity of the words: of those that are held, if they are."""
        if self.cache is not None and self.holds_words():
            return held_words(self.cache, self.text)
        return self.text.attributes, self.text.valid_BN

    def past(self, crossing: bool) -> Pasts:
        """What each layer reads of the past, keys turned to where they stand now.

        Args:
            crossing: there is attention between the streams.
        """
        assert self.cache is not None
        self._check_past(crossing)
        nothing: list[Past] = [()] * self.sizes.num_layers
        own, offered, text = ({"video": nothing, "audio": nothing} for _ in range(3))
        for stream in self.streams:
            name = stream.modality
            own[name] = list(self.cache.past((name,), self._turn))
            offered[name] = list(self.cache.past((OFFERED[name],), self._turn))
            if self.holds_words():
                text[name] = [self._words_of(name, pair) for pair in self.cache.past(("text",), _as_is)]
        video, audio = (
            [Before(*p) for p in zip(own[m], text[m], offered[m], strict=True)] for m in ("video", "audio")
        )
        return list(zip(video, audio, strict=True))

    def holds_words(self) -> bool:
        """Whether the cache has the words that these streams read."""
        return self.cache is not None and self.cache.parts("text") == self._modalities

    def offer(self, left: Left, hold_words: bool) -> None:
        """Give the cache what a forward left, and the words if they may be held."""
        assert self.cache is not None
        at = {"video": 0, "audio": 1}
        for stream in self.streams:
            fresh = [layer[at[stream.modality]] for layer in left]
            known = facts(stream)
            self.cache.offer(stream.modality, known, [f.own for f in fresh if f.own])
            if fresh[0].offered:
                self.cache.offer(OFFERED[stream.modality], known, [f.offered for f in fresh if f.offered])
        if hold_words:
            words = [[layer[at[s.modality]].text for s in self.streams] for layer in left]
            pairs = [
                (_beside(p[0] for p in layer if p), _beside(p[1] for p in layer if p)) for layer in words
            ]
            self.cache.hold("text", facts(self.text), pairs, parts=self._modalities)

    def _check_past(self, crossing: bool) -> None:
        """Chunks must all bring the same streams: what one misses, its past and future would not hear of."""
        assert self.cache is not None
        for modality, offered in OFFERED.items():
            before = self.cache.chunks(modality)
            assert not before or modality in self._modalities, (
                f"earlier chunks have {modality} and this one has none: give all chunks the same streams"
            )
            assert not crossing or self.cache.chunks(offered) == before, (
                f"chunks before this one have no {offered}: give all chunks the same streams"
            )

    def _turn(self, name: str, k_BPHX: Tensor) -> Tensor:
        assert self.cache is not None
        stream = next(s for s in self.streams if name in (s.modality, OFFERED[s.modality]))
        before, _ = places(stream, self.cache, self.streams[0])
        assert before is not None
        if name == stream.modality:
            turns = own_tables(self.sizes, name, before.position_BN3)
        else:
            turns = shared_tables(self.sizes, before.position_BN3)
        return turn_heads(k_BPHX, turns, self.sizes.rope_type).to(k_BPHX.dtype)

    @property
    def _modalities(self) -> tuple[str, ...]:
        return tuple(stream.modality for stream in self.streams)

    def _head_dim(self, modality: str) -> int:
        sizes = self.sizes
        return sizes.attention_head_dim if modality == "video" else sizes.audio_attention_head_dim

    def _words_of(self, modality: str, pair: Past) -> Past:
        """One stream's part of the words: the first in each head is the first stream's."""
        if not pair:
            return ()
        width = self._head_dim(modality)
        here = slice(None, width) if modality == self.streams[0].modality else slice(-width, None)
        return pair[0][..., here], pair[1][..., here]


def cross_levels(stream: Stream, other: Stream, one_chunk: bool) -> tuple[Tensor, Tensor | None]:
    """The noise of ``other`` as tokens of ``stream`` meet it: levels (B, K), and each token's index (B, N).

    It is the highest level among the other's tokens of the same sample and chunk that are context copies if
    the token is one, and not if it is not; 0 where the other has none.

    Args:
        one_chunk: the whole sample counts as one chunk; the index is None then, unless samples are packed.
    """
    if one_chunk and stream.sample_BN is None:
        sigma_BM = other.sigma_BN
        if other.valid_BN is not None:
            sigma_BM = sigma_BM.masked_fill(~other.valid_BN, 0)
        return sigma_BM.amax(dim=1, keepdim=True), None
    sigma_BK, order_BK = other.sigma_BK.sort(dim=1)
    levels = sigma_BK.shape[1]
    rank_BM = order_BK.argsort(dim=1).gather(1, other.level_BN.expand(len(order_BK), -1))
    # One number sorts the other's tokens by group and then by level: the last one of a group is its highest.
    group_BN, group_BM = _groups(stream, other, one_chunk)
    number_BM = group_BM * levels + rank_BM
    if other.valid_BN is not None:
        number_BM = number_BM.masked_fill(~other.valid_BN, -1)
    number_BM = number_BM.sort(dim=1).values
    batch = max(len(number_BM), len(group_BN))
    number_BM = number_BM.expand(batch, -1).contiguous()
    group_BN = group_BN.expand(batch, -1).contiguous()
    behind_BN = torch.searchsorted(number_BM, (group_BN + 1) * levels)
    highest_BN = number_BM.gather(1, (behind_BN - 1).clamp(min=0))
    found_BN = highest_BN.div(levels, rounding_mode="floor") == group_BN
    level_BN = torch.where(found_BN, highest_BN % levels, levels)
    return torch.cat([sigma_BK, torch.zeros_like(sigma_BK[:, :1])], dim=1), level_BN


def _groups(stream: Stream, other: Stream, one_chunk: bool) -> tuple[Tensor, Tensor]:
    """For the tokens of both: in each sample one number for a chunk's context copies, and one for the rest of
    it; one for the sample if that counts as one chunk."""
    # Left on the device: reading it would make the device wait.
    chunks = torch.maximum(stream.chunk_BN.amax(), other.chunk_BN.amax()) + 1

    def group(s: Stream) -> Tensor:
        sample_BN = torch.zeros_like(s.chunk_BN) if s.sample_BN is None else s.sample_BN
        return sample_BN if one_chunk else (sample_BN * chunks + s.chunk_BN) * 2 + s.context_BN

    return group(stream), group(other)


def _as_is(name: str, k_BPHX: Tensor) -> Tensor:
    return k_BPHX


def _beside(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat(list(parts), dim=-1)
