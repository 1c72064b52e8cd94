"""What the tokens of one forward of the joint backbone may look at, in the present and in a cache's past, and
where they all stand.

A cache holds each stream's own pairs and, where both are there, what each offered to the other, which are
other projections of the same tokens. Each stream has words of its own, which are held once.

Shapes: B batch, L words, N tokens of a stream, M of the other, P tokens of the past, H heads, D channels of a
head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from motionloom.backbones.joint_block import OFFERED, Sight
from motionloom.backbones.parts import sees_any
from motionloom.nn.cache import KVCache, Pair, Past
from motionloom.nn.rope import SOUND, SPACE, TIME, Rotary, rotary, rotate
from motionloom.plans.lower import lower, per_block
from motionloom.plans.past import facts, held_words, join_facts, past_facts, places
from motionloom.plans.stream import Attributes, Stream
from motionloom.plans.visibility import Visibility

WORDS = ("text", "text for audio")
"""What a cache calls the words of the first stream, and of the second."""


@dataclass(frozen=True)
class Reach:
    """One forward's streams, and the past behind them."""

    streams: tuple[Stream, ...]
    """Video, audio or both, in this order; seconds are re-based by the first."""
    text: Stream
    visibility: Visibility
    cache: KVCache | None
    layers: int
    head_dim: Mapping[str, int]
    """By modality."""

    # --- words ---

    def words_name(self, stream: Stream) -> str:
        """What the cache calls the words that ``stream`` reads."""
        return WORDS[self.streams.index(stream)]

    def holds_words(self) -> bool:
        """Whether the cache has the words of these streams."""
        return self.cache is not None and self.cache.parts("text") == self._modalities

    def hold_words(self, left: Sequence[Mapping[str, Pair]]) -> None:
        """Give the cache what the words left in each layer."""
        assert self.cache is not None
        for stream in self.streams:
            pairs = [layer[stream.modality] for layer in left]
            self.cache.hold(self.words_name(stream), facts(self.text), pairs, parts=self._modalities)

    def word_masks(self) -> list[Sight]:
        """Words alone, by layer."""
        a, valid = self.text.attributes, self.text.valid_BN
        return per_block(self.visibility, self.layers, lambda rule: lower(rule, a, a, valid))

    def word_tables(self, modality: str) -> Rotary:
        """Words are not turned, (1, L, 1, D)."""
        device, words = self.text.x_BNC.device, self.text.x_BNC.shape[1]
        cos = torch.ones(1, words, 1, self.head_dim[modality], device=device)
        return cos, torch.zeros_like(cos)

    # --- a stream and its words ---

    def masks(self, stream: Stream) -> list[Sight]:
        """Of words and tokens, by layer; with a cache of tokens alone, who look at the past as well."""
        if self.cache is None:
            keys, valid = join_facts([facts(self.text), facts(stream)])
            asks = keys
        else:
            held_words(self.cache, self.text)
            past = past_facts(self.cache, self.words_name(stream), stream.modality)
            keys, valid = join_facts([*past, facts(stream)])
            asks = stream.attributes
        return per_block(self.visibility, self.layers, lambda rule: lower(rule, asks, keys, valid))

    def tables(self, stream: Stream) -> Rotary:
        """Where words, which are not turned, and tokens stand; with a cache tokens alone."""
        tables = standing(stream.modality, self._position(stream), self.head_dim[stream.modality])
        if self.cache is not None:
            return tables
        cos, sin = (
            torch.cat([a.expand(b.shape[0], *a.shape[1:]), b], dim=1)
            for a, b in zip(self.word_tables(stream.modality), tables, strict=True)
        )
        return cos, sin

    def past(self, stream: Stream) -> Sequence[Past | None]:
        """Words and earlier chunks, for each layer; None without a cache."""
        if self.cache is None:
            return [None] * self.layers
        return self.cache.past((self.words_name(stream), stream.modality), self._turn)

    # --- between the streams ---

    def sights(self, stream: Stream, other: Stream) -> list[tuple[Sight, Tensor | None]]:
        """Who of ``stream`` sees whom of ``other``, and who sees any at all, (B, N or 1, 1); by layer."""
        keys, valid = self._offered_facts(other)
        asks = stream.attributes

        def sight(rule: Visibility) -> tuple[Sight, Tensor | None]:
            return lower(rule, asks, keys, valid), sees_any(rule, asks, keys, valid)

        return per_block(self.visibility, self.layers, sight)

    def seconds(self, stream: Stream) -> Rotary:
        """Where tokens stand for the other stream."""
        return _by_seconds(self._position(stream), self.head_dim["audio"])

    def offered(self, other: Stream) -> Sequence[Past]:
        """What ``other`` offered in earlier chunks, for each layer."""
        if self.cache is None:
            return [()] * self.layers
        return self.cache.past((OFFERED[other.modality],), self._turn)

    def check_past(self, crossing: bool) -> None:
        """Chunks must all bring the same streams: what one misses, its future would not hear of.

        Args:
            crossing: there is attention between the streams.
        """
        assert self.cache is not None
        chunks = {name: self.cache.chunks(name) for m in OFFERED for name in (m, OFFERED[m])}
        needed = {n for m in self._modalities for n in (m, OFFERED[m]) if crossing or n in OFFERED}
        before = max(chunks.values(), key=len)
        unlike = [name for name in OFFERED if chunks[name] and name not in needed]
        unlike += [name for name in sorted(needed) if chunks[name] != before]
        assert not unlike, (
            f"this chunk has {' and '.join(self._modalities)}, and those before it had otherwise of "
            f"{unlike[0]}: give all chunks the same streams"
        )

    def offer(self, left: Sequence[Mapping[str, Pair]]) -> None:
        """Give the cache what the present chunk left in each layer."""
        assert self.cache is not None
        for stream in self.streams:
            for name in (stream.modality, OFFERED[stream.modality]):
                if name in left[0]:
                    self.cache.offer(name, facts(stream), [layer[name] for layer in left])

    @property
    def _modalities(self) -> tuple[str, ...]:
        return tuple(stream.modality for stream in self.streams)

    def _offered_facts(self, other: Stream) -> tuple[Attributes, Tensor | None]:
        past = [] if self.cache is None else past_facts(self.cache, OFFERED[other.modality])
        return join_facts([*past, facts(other)])

    def _position(self, stream: Stream) -> Tensor:
        """Where the present stands, (B or 1, N, 3), re-based as the cache's policy says."""
        if self.cache is None:
            return stream.position_BN3
        return places(stream, self.cache, self.streams[0])[1].position_BN3

    def _turn(self, name: str, k_BPHD: Tensor) -> Tensor:
        """Keys of the past to where they stand now."""
        if name in WORDS:
            return k_BPHD
        assert self.cache is not None
        stream = next(s for s in self.streams if name in (s.modality, OFFERED[s.modality]))

        def tables() -> Rotary:
            before, _ = places(stream, self.cache, self.streams[0])  # type: ignore[arg-type]
            assert before is not None
            if name == stream.modality:
                return standing(name, before.position_BN3, self.head_dim[name])
            return _by_seconds(before.position_BN3, self.head_dim["audio"])

        return rotate(k_BPHD, self.cache.remember(("past tables", name), tables)).to(k_BPHD.dtype)


def standing(modality: str, position_BN3: Tensor, head_dim: int) -> Rotary:
    """Tables of tokens among their own: video at its seconds and pixels, sound at its seconds,
    (B or 1, N, 1, D)."""
    if modality == "audio":
        return _by_seconds(position_BN3, head_dim)
    cos, sin = rotary(position_BN3, (TIME, SPACE, SPACE), head_dim)
    return cos[:, :, None], sin[:, :, None]


def _by_seconds(position_BN3: Tensor, head_dim: int) -> Rotary:
    cos, sin = rotary(position_BN3[..., :1], (SOUND,), head_dim)
    return cos[:, :, None], sin[:, :, None]
