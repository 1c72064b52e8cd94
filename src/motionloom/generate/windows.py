"""A part of a long clip as a clip of its own, for networks that only ever saw short ones.

Shapes: B batch, F token frames.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from motionloom.generate.model import Model
from motionloom.plans import Geometry, Sample


@dataclass(frozen=True)
class Window:
    """The end of a long clip as a clip of its own."""

    sample: Sample
    frames: dict[str, Tensor]
    """Those of the long clip that are in it, by modality."""
    first: int
    """The first of them, of the main modality."""


def last_window(sample: Sample, usual: int, head: bool) -> Window:
    """The last frames of a clip, as many as a usual one holds; of a longer clip without its head.

    Args:
        usual: token frames of a usual clip.
        head: whether the first token frame of a clip is of another kind than the others.
    """
    total = sample.main.grid[0]
    first = 0 if total <= usual else total - (usual - head)
    part, frames = window(sample, slice(first, total), int(head))
    return Window(part, frames, first)


def longer_sample(model: Model, sample: Sample, frames: int) -> Sample:
    """A sample of so many token frames in the size of another."""
    spec, main = model.tokenizer.spec, sample.main
    rows, columns = (round(n * p) for n, p in zip(main.grid[1:], main.pixels_per_cell, strict=True))
    pixel_frames = spec.pixel_frames(frames * model.patch[0])
    return model.sample((pixel_frames,), rows, columns, sample.fps or model.fps, sample.batch)


def head_alone(model: Model) -> bool:
    """Whether the first token frame of a clip is of another kind than the others."""
    if "video" in model.modalities:
        return model.tokenizer.spec.first_alone
    assert model.audio_tokenizer is not None
    return model.audio_tokenizer.spec.first_alone


def window(sample: Sample, part: slice, head: int) -> tuple[Sample, dict[str, Tensor]]:
    """The part of a long clip as a clip of its own, which begins where clips begin, or behind their head;
    and the frames of the long clip in it."""
    main = sample.main
    assert main.span_BF2 is not None
    span_F2 = main.span_BF2[0]
    slot = head if part.start else 0
    moved = float(span_F2[part.start, 0] - span_F2[slot, 0])
    begin = -float("inf") if part.start == 0 else float(span_F2[part.start, 0])
    end = float("inf") if part.stop == main.grid[0] else float(span_F2[part.stop - 1, 1])
    tracks, frames = {}, {}
    for m, geometry in sample.tracks.items():
        inside = part if geometry is main else _between(geometry, begin, end)
        tracks[m] = _earlier(geometry.part(inside), moved, slot if geometry is main else None)
        frames[m] = torch.arange(inside.start, inside.stop, device=geometry.device)
    return replace(sample, tracks=tracks, masks={}), frames


def _between(geometry: Geometry, begin: float, end: float) -> slice:
    """The frames whose middle lies between two times."""
    assert geometry.span_BF2 is not None
    centre_F = geometry.span_BF2[0].mean(dim=1)
    index_W = ((centre_F >= begin) & (centre_F < end)).nonzero().flatten()
    return slice(int(index_W[0]), int(index_W[-1]) + 1)


def _earlier(geometry: Geometry, seconds: float, slot: int | None) -> Geometry:
    """Moved in time; its first frame is then frame ``slot`` of a clip (None: what fits its seconds)."""
    assert geometry.span_BF2 is not None
    span_BF2 = geometry.span_BF2 - seconds
    if slot is None:
        slot = max(0, round(float(span_BF2[0, 0, 0] / (span_BF2[0, -1, 1] - span_BF2[0, -1, 0]))))
    return replace(geometry, seconds_BF=geometry.seconds_BF - seconds, span_BF2=span_BF2, begin=slot)
