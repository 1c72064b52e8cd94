"""Clips of any length to one length: long ones cut into windows, and the rate at which short ones fill it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from motionloom.data.manifest import ManifestEntry


def cut_into_windows(entries: Iterable[ManifestEntry], seconds: float) -> list[ManifestEntry]:
    """Each clip that holds two windows or more becomes as many entries, ``id__w00`` and on; others stay.

    What does not fill a window at the end is left out. Stories with scenes are never cut.
    """
    cut: list[ManifestEntry] = []
    for entry in entries:
        length = duration(entry)
        count = int(length / seconds + 1e-6) if length is not None and not entry.scenes else 1
        if count < 2:
            cut.append(entry)
            continue
        cut += [
            replace(
                entry,
                id=f"{entry.id}__w{n:02d}",
                start=entry.start + n * seconds,
                end=entry.start + (n + 1) * seconds,
            )
            for n in range(count)
        ]
    return cut


def duration(entry: ManifestEntry) -> float | None:
    """Seconds of the chosen part, or None when the manifest does not say; a still has 0."""
    if entry.end is not None:
        return entry.end - entry.start
    if entry.frames is None or entry.fps is None:
        return None
    return entry.frames / entry.fps - entry.start if entry.frames > 1 else 0.0


def fitting_fps(entries: Iterable[ManifestEntry], frames: int, usual: float) -> float:
    """The usual rate, or a higher one at which all but the shortest tenth of moving clips fill ``frames``."""
    lengths = sorted(length for entry in entries if (length := duration(entry)))
    if not lengths:
        return usual
    short = lengths[len(lengths) // 10]
    rate = usual if short * usual >= frames else frames / short
    # Rounded up, so that rounding never makes the clip longer than its source.
    return min(240.0, math.ceil(rate * 1000) / 1000)
