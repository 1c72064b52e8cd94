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

from motionloom.backbones.ltx2_block import Pasts
from motionloom.backbones.ltx2_rope import own_tables, rotate, shared_tables
from motionloom.backbones.ltx2_sizes import LTX2Sizes
from motionloom.nn.cache import KVCache, Past
from motionloom.plans.past import facts, join_facts, past_facts, places
from motionloom.plans.stream import Attributes, Stream
from motionloom.plans.visibility import Visibility

OFFERED = {"video": "video for audio", "audio": "audio for video"}
"""Under which name a cache holds what a stream offers to the other."""
Layers = list[tuple[Pasts, Pasts]]
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
    visibility: Visibility
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

    def answered(self, queries: Attributes, keys: Attributes, valid_BK: Tensor | None) -> Tensor | None:
        """Whether a token sees any key at all, (B, N or 1, 1); None if all of them do.

        Attention must look somewhere: sound that starts in a later chunk would else reach the first frames.
        """
        if self.visibility.unrestricted:
            return None if valid_BK is None else valid_BK.any(dim=1)[:, None, None]
        seen_BNK = self.visibility.allows(queries.queries(), keys.keys())
        if valid_BK is not None:
            seen_BNK = seen_BNK & valid_BK[:, None, :]
        return seen_BNK.any(dim=2, keepdim=True)

    def past(self, held_words: bool) -> Layers:
        """What each layer reads of the past, keys turned to where they stand now."""
        assert self.cache is not None
        nothing: list[Past] = [()] * self.sizes.num_layers
        own, offered, text = ({"video": nothing, "audio": nothing} for _ in range(3))
        for stream in self.streams:
            name = stream.modality
            own[name] = list(self.cache.past((name,), self._turn))
            offered[name] = list(self.cache.past((OFFERED[name],), self._turn))
            if held_words:
                text[name] = [self._words_of(name, pair) for pair in self.cache.past(("text",), _as_is)]
        video, audio = (
            [Pasts(*p) for p in zip(own[m], text[m], offered[m], strict=True)] for m in ("video", "audio")
        )
        return list(zip(video, audio, strict=True))

    def holds_words(self) -> bool:
        """Whether the cache has the words that these streams read."""
        if self.cache is None or "text" not in self.cache:
            return False
        held = self.cache.past(("text",), _as_is)[0]
        if not held:
            return False
        return held[0].shape[-1] == sum(self._head_dim(s.modality) for s in self.streams)

    def offer(self, left: Layers, hold_words: bool) -> None:
        """Give the cache what a forward left, and the words if they may be held."""
        assert self.cache is not None
        at = {"video": 0, "audio": 1}
        for stream in self.streams:
            pasts = [layer[at[stream.modality]] for layer in left]
            known = facts(stream)
            self.cache.offer(stream.modality, known, [p.own for p in pasts if p.own])
            if pasts[0].offered:
                self.cache.offer(OFFERED[stream.modality], known, [p.offered for p in pasts if p.offered])
        if hold_words:
            words = [[layer[at[s.modality]].text for s in self.streams] for layer in left]
            pairs = [
                (_beside(p[0] for p in layer if p), _beside(p[1] for p in layer if p)) for layer in words
            ]
            self.cache.hold("text", facts(self.text), pairs)

    def _turn(self, name: str, k_BPHX: Tensor) -> Tensor:
        assert self.cache is not None
        stream = next(s for s in self.streams if name in (s.modality, OFFERED[s.modality]))
        before, _ = places(stream, self.cache, self.streams[0])
        assert before is not None
        if name == stream.modality:
            turns = own_tables(self.sizes, name, before.position_BN3)
        else:
            turns = shared_tables(self.sizes, before.position_BN3)
        return rotate(k_BPHX, turns, self.sizes.rope_type).to(k_BPHX.dtype)

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

    It is the highest level among the other's tokens of the same chunk that are context copies if the token is
    one, and not if it is not; 0 where the other has none.

    Args:
        one_chunk: the whole sample counts as one chunk; the index is then None.
    """
    if one_chunk:
        sigma_BM = other.sigma_BN
        if other.valid_BN is not None:
            sigma_BM = sigma_BM.masked_fill(~other.valid_BN, 0)
        return sigma_BM.amax(dim=1, keepdim=True), None
    sigma_BK, order_BK = other.sigma_BK.sort(dim=1)
    levels = sigma_BK.shape[1]
    rank_BM = order_BK.argsort(dim=1).gather(1, other.level_BN.expand(len(order_BK), -1))
    # One number sorts the other's tokens by group and then by level: the last one of a group is its highest.
    number_BM = _group(other) * levels + rank_BM
    if other.valid_BN is not None:
        number_BM = number_BM.masked_fill(~other.valid_BN, -1)
    number_BM = number_BM.sort(dim=1).values
    batch = max(len(number_BM), len(stream.chunk_BN), len(stream.context_BN))
    number_BM = number_BM.expand(batch, -1).contiguous()
    group_BN = _group(stream).expand(batch, -1).contiguous()
    behind_BN = torch.searchsorted(number_BM, (group_BN + 1) * levels)
    highest_BN = number_BM.gather(1, (behind_BN - 1).clamp(min=0))
    found_BN = highest_BN.div(levels, rounding_mode="floor") == group_BN
    level_BN = torch.where(found_BN, highest_BN % levels, levels)
    return torch.cat([sigma_BK, torch.zeros_like(sigma_BK[:, :1])], dim=1), level_BN


def _group(stream: Stream) -> Tensor:
    """One number for each chunk's context copies, and one for the rest of it."""
    return stream.chunk_BN * 2 + stream.context_BN


def some_valid(valid_BK: Tensor | None) -> Tensor | None:
    """Samples that have no valid key get all of them: a softmax over nothing is not finite."""
    return None if valid_BK is None else valid_BK | ~valid_BK.any(dim=1, keepdim=True)


def _as_is(name: str, k_BPHX: Tensor) -> Tensor:
    return k_BPHX


def _beside(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat(list(parts), dim=-1)
