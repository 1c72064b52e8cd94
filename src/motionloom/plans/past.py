"""What a chunk sees when its past comes from a cache: facts of [past, present] tokens, and where they stand.

Shapes: B batch, N tokens of a stream, P of its past, K of all keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from motionloom.nn.cache import Fields, KVCache
from motionloom.plans.stream import Attributes, Stream, join_attributes

_NAMES = {name: name.rsplit("_", 1)[0] for name in Attributes.__dataclass_fields__}


def facts(stream: Stream) -> dict[str, Tensor]:
    """A stream's fields as a cache holds them; always absolute."""
    attributes = stream.attributes
    fields = {short: getattr(attributes, name) for name, short in _NAMES.items()}
    fields |= {"position": stream.position_BN3, "index": stream.index_BN3}
    if stream.valid_BN is not None:
        fields["valid"] = stream.valid_BN
    return fields


def past_facts(cache: KVCache, *modalities: str) -> list[Fields]:
    """The fields of those modalities that have a past, in the order of ``cache.past(modalities, ...)``."""
    return [cache.fields(m) for m in modalities if m in cache]


def held_words(cache: KVCache, words: Stream) -> tuple[Attributes, Tensor | None]:
    """:func:`join_facts` of the words that a cache holds, which are read in place of ``words``."""
    held, given = cache.fields(words.modality)["scene"].shape[1], words.scene_BN.shape[1]
    assert held == given, f"{held} tokens of {words.modality} are held and {given} given: drop the old first"
    return join_facts(past_facts(cache, words.modality))


def join_facts(parts: list[Fields]) -> tuple[Attributes, Tensor | None]:
    """What :func:`~motionloom.plans.lower.lower` asks about keys that lie end to end: their attributes, and
    which are valid, (B, K), None when nothing is padded."""
    attributes = join_attributes(
        [Attributes(**{name: fields[short] for name, short in _NAMES.items()}) for fields in parts]
    )
    if not any("valid" in fields for fields in parts):
        return attributes, None
    valid = [fields.get("valid", torch.ones_like(fields["scene"], dtype=torch.bool)) for fields in parts]
    batch = max(t.shape[0] for t in valid)
    return attributes, torch.cat([t.expand(batch, -1) for t in valid], dim=1)


@dataclass(frozen=True)
class Place:
    """Where tokens stand for rotary tables, re-based as the cache's policy says."""

    position_BN3: Tensor
    index_BN3: Tensor
    """As ``Stream.index_BN3``."""


def places(stream: Stream, cache: KVCache, clock: Stream | None = None) -> tuple[Place | None, Place]:
    """Of the past and of the present. The first is None where there is no past.

    Args:
        clock: the stream that seconds are re-based by, so that sound and picture move together; by default
            the stream itself.
    """
    clock = clock or stream
    seconds = cache.shift(clock.modality, "position", clock.position_BN3)
    frames = cache.shift(stream.modality, "index", stream.index_BN3)
    present = Place(_moved(stream.position_BN3, seconds), _moved(stream.index_BN3, frames))
    if stream.modality not in cache:
        return None, present
    held, still = cache.fields(stream.modality), cache.sink_tokens(stream.modality)
    return Place(_moved(held["position"], seconds, still), _moved(held["index"], frames, still)), present


def _moved(field_BN3: Tensor, shift_B1: Tensor | None, still: int = 0) -> Tensor:
    """The first column moved back, save for the first ``still`` tokens."""
    if shift_B1 is None:
        return field_BN3
    moved_BN = field_BN3[..., 0] - shift_B1
    moved_BN = torch.cat([field_BN3[..., 0].expand_as(moved_BN)[:, :still], moved_BN[:, still:]], dim=1)
    return torch.cat([moved_BN[..., None], field_BN3[..., 1:].expand(moved_BN.shape[0], -1, -1)], dim=-1)
