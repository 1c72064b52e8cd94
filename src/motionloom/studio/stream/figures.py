"""The figures that the page shows live, and the clock of playback that they rest on.

Frames come in bursts, a chunk at a time, and are shown one after the other: `Playout` says when, if each is
shown in its turn as soon as it is there. A gap is the time from one frame to the next on such a screen.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

_REMEMBERED = 600  # frames whose gaps count
_CHUNKS = 16  # over which speed is taken


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that so many of all do not exceed (nearest rank); nan of none."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


class Playout:
    """When frames are shown. Times are seconds of one clock."""

    def __init__(self, fps: float) -> None:
        self._step, self._next, self._last = 1 / fps, -math.inf, math.nan
        self._frozen: float | None = None
        self.gaps: deque[float] = deque(maxlen=_REMEMBERED)

    def arrive(self, frames: int, now: float) -> None:
        """So many frames are there."""
        if self._frozen is not None:
            # Nobody looks: they are shown when somebody does again.
            self._frozen += frames * self._step
            return
        for _ in range(frames):
            shown = max(now, self._next)
            if not math.isnan(self._last):
                self.gaps.append(shown - self._last)
            self._last, self._next = shown, shown + self._step

    def ahead(self, now: float) -> float:
        """Seconds of film that are made and not yet shown."""
        return self._frozen if self._frozen is not None else max(0.0, self._next - now)

    def freeze(self, now: float) -> None:
        """Nobody looks any more."""
        if self._frozen is None:
            self._frozen = self.ahead(now)

    def thaw(self, now: float) -> None:
        """Somebody looks again, and sees what was left."""
        if self._frozen is not None:
            self._next, self._last, self._frozen = now + self._frozen, math.nan, None

    def skip(self) -> None:
        """What was to be shown is not: the film went back, or begins anew."""
        self._next, self._last = -math.inf, math.nan
        self._frozen = None if self._frozen is None else 0.0


class Figures:
    """Of one film: how fast it comes, and where the time goes."""

    def __init__(self) -> None:
        self.first_frame_s = self.prompt_s = math.nan
        """From the wish to the first frame; the same for the last change of the prompt."""
        self._chunks: deque[tuple[int, float, float, float]] = deque(maxlen=_CHUNKS)

    def made(self, frames: int, network_s: float, decode_s: float, whole_s: float) -> None:
        """A chunk."""
        self._chunks.append((frames, network_s, decode_s, whole_s))

    def values(self) -> dict[str, float]:
        """``made_per_second`` (frames, while one is being made) and the shares of the time spent."""
        frames = sum(chunk[0] for chunk in self._chunks)
        network, decode, whole = (sum(chunk[i] for chunk in self._chunks) for i in (1, 2, 3))
        known = bool(self._chunks) and whole > 0
        return {
            "first_frame_s": self.first_frame_s,
            "prompt_s": self.prompt_s,
            "made_per_second": frames / whole if known else math.nan,
            "network_share": network / whole if known else math.nan,
            "decode_share": decode / whole if known else math.nan,
        }
