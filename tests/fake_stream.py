"""A stream whose every second and frame is known, for the tests of its judges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


class Clock:
    """Shows what it was told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class FakePiece:
    """As `generate.stream.Piece`."""

    chunk: int
    video_PHW3: Tensor | None
    network_s: float
    decode_s: float


@dataclass(frozen=True)
class Step:
    """A chunk to come."""

    frames: int = 4
    wait: float = 1.0
    network: float = 0.6
    decode: float = 0.3
    memory: int = 1_000_000
    made: int | None = None
    """Frames of the chunk that this step makes; none: as many as it shows. 0: it shows more of the last."""
    breaks: bool = False


class FakeStream:
    """Shows a film from its beginning, chunk by chunk; of the last step it never tires."""

    def __init__(self, clock: Clock, steps: Sequence[Step], film: np.ndarray | None = None, fps: float = 8.0):
        self.clock, self.steps, self.fps = clock, list(steps), fps
        self.said: list[tuple[int, str, bool]] = []
        self.film = np.zeros((10_000, 2, 2, 3), np.uint8) if film is None else film
        self.chunk = self._asked = self._shown = self._made = self._held = 0

    def next(self) -> FakePiece:
        step = self.steps[min(self._asked, len(self.steps) - 1)]
        if step.breaks:
            raise FloatingPointError(f"chunk {self.chunk} is not finite: lower the guidance")
        self.clock.now += step.wait
        self._asked += 1
        self.chunk += step.made != 0
        self._made += step.frames if step.made is None else step.made
        part = self.film[self._shown : self._shown + step.frames]
        self._shown += step.frames
        self._held = step.memory
        video = torch.from_numpy(part.copy()) if step.frames else None
        return FakePiece(self.chunk - 1, video, step.network, step.decode)

    @property
    def seconds(self) -> float:
        return self._made / self.fps

    def say(self, prompt: str, *, recache: bool = False) -> None:
        self.said.append((self.chunk, prompt, recache))

    def memory(self) -> int:
        return self._held
