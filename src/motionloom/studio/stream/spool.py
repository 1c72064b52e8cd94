"""What was made of the film, kept to be saved: in memory, a small film for each piece, the oldest dropped
first.

P pixel frames of a piece, H x W pixels; Z sound channels, M samples.
"""

from __future__ import annotations

import errno
import threading
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from motionloom.data.media.film import film_bytes, join_films
from motionloom.studio.stream.messages import Refused

MOST_BYTES = 256 * 2**20
_FULL_SCALE = 32767


@dataclass(frozen=True)
class _Piece:
    first: int
    """Number of its first frame in the film."""
    frames: int
    film: bytes
    sound_ZM: NDArray[np.int16] | None

    @property
    def size(self) -> int:
        return len(self.film) + (0 if self.sound_ZM is None else self.sound_ZM.nbytes)


class Spool:
    """The last ``most_bytes`` of a film. Safe to use from several threads."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most, self._lock = most_bytes, threading.Lock()
        self._pieces: deque[_Piece] = deque()
        self._fps, self._sample_rate = 1.0, 0

    def begin(self, fps: float, sample_rate: int) -> None:
        """A new film: what was kept of another is forgotten."""
        with self._lock:
            self._pieces.clear()
            self._fps, self._sample_rate = fps, sample_rate

    def add(self, first: int, frames_PHW3: NDArray[np.uint8], sound_ZM: NDArray[np.float32] | None) -> None:
        """Frames (uint8) from number ``first`` on, and their sound (in [-1, 1])."""
        sound = None
        if sound_ZM is not None:
            sound = np.round(np.clip(sound_ZM, -1, 1) * _FULL_SCALE).astype(np.int16)
        film = film_bytes(frames_PHW3, self._fps) if len(frames_PHW3) else b""
        piece = _Piece(first, len(frames_PHW3), film, sound)
        with self._lock:
            self._pieces.append(piece)
            while len(self._pieces) > 1 and sum(p.size for p in self._pieces) > self._most:
                self._pieces.popleft()

    def cut(self, frames: int) -> None:
        """The film went back, to so many frames: what came after them never was."""
        with self._lock:
            while self._pieces and self._pieces[-1].first >= frames:
                self._pieces.pop()
            if self._pieces and self._pieces[-1].first + self._pieces[-1].frames > frames:
                last = self._pieces.pop()
                kept = frames - last.first
                sound = last.sound_ZM
                if sound is not None:
                    sound = sound[:, : round(kept / self._fps * self._sample_rate)]
                self._pieces.append(replace(last, frames=kept, sound_ZM=sound))

    @property
    def seconds(self) -> float:
        """How much of the film is kept."""
        with self._lock:
            return sum(piece.frames for piece in self._pieces) / self._fps

    def save(self, path: Path) -> float:
        """Write what is kept as an mp4; returns its length in seconds.

        Raises:
            Refused: nothing is kept yet, or the disk is full.
        """
        with self._lock:
            pieces, fps, rate = list(self._pieces), self._fps, self._sample_rate
        if not any(piece.frames for piece in pieces):
            raise Refused("nothing was made yet: play first, then save")
        sounds = [piece.sound_ZM for piece in pieces if piece.sound_ZM is not None]
        sound = (np.concatenate(sounds, axis=1) / _FULL_SCALE).astype(np.float32) if sounds else None
        try:
            join_films([(p.film, p.frames) for p in pieces if p.frames], path, sound=sound, sample_rate=rate)
        except OSError as error:
            path.unlink(missing_ok=True)
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            reason = "the disk is full" if full else (error.strerror or str(error)).lower()
            raise Refused(
                f"the film cannot be saved: {reason}; make room in {path.parent}, then save again"
            ) from error
        return sum(piece.frames for piece in pieces) / fps
