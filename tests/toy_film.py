"""A stand-in for the engine of streams: a ball of the prompt's colour that goes round, and a tone."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

COLORS = {"red": (226, 50, 48), "green": (40, 170, 90), "blue": (60, 90, 240), "white": (245, 245, 245)}
CHUNK = 4


@dataclass(frozen=True)
class ToyPiece:
    """As the engine's."""

    chunk: int
    video_PHW3: Tensor | None
    sound_ZM: Tensor | None
    prompt: str
    network_s: float = 0.006
    decode_s: float = 0.003
    whole_s: float = 0.01


class ToyFilm:
    """Chunks of 4 frames. ``before`` is called before each; what it raises is the network's fault."""

    sample_rate = 0

    def __init__(
        self,
        prompt: str,
        *,
        fps: float = 8.0,
        size: tuple[int, int] = (16, 24),
        sample_rate: int = 0,
        before: Callable[[ToyFilm], object] = lambda film: None,
    ) -> None:
        self.prompt, self.fps, (self.height, self.width) = prompt, fps, size
        self.sample_rate, self._before = sample_rate, before
        self.chunk, self.shown, self.owner = 0, [(0, None)], threading.get_ident()
        self.frames_wanted = CHUNK
        self.recached: list[bool] = []
        self.strengths: list[float] = []

    @property
    def seconds(self) -> float:
        return self.chunk * CHUNK / self.fps

    def next(self) -> ToyPiece:
        assert threading.get_ident() == self.owner, "one thread owns a film"
        self._before(self)
        frames = torch.stack([self._frame(self.chunk * CHUNK + n) for n in range(CHUNK)])
        return self._made(frames)

    def finish(self) -> ToyPiece:
        nothing = torch.zeros(0, self.height, self.width, 3, dtype=torch.uint8)
        return ToyPiece(self.chunk - 1, nothing, None, self.prompt)

    def push(self, video_PHW3: Tensor, strength: float) -> ToyPiece:
        assert video_PHW3.shape == (CHUNK, self.height, self.width, 3)
        self.strengths.append(strength)
        return self._made(255 - video_PHW3)

    def _made(self, frames: Tensor) -> ToyPiece:
        sound = None
        if self.sample_rate:
            per = round(CHUNK / self.fps * self.sample_rate)
            at = torch.arange(self.chunk * per, (self.chunk + 1) * per) / self.sample_rate
            sound = 0.4 * torch.sin(2 * math.pi * 440 * at)[None]
        self.chunk += 1
        return ToyPiece(self.chunk - 1, frames, sound, self.prompt)

    def _frame(self, n: int) -> Tensor:
        y, x = torch.meshgrid(torch.arange(self.height), torch.arange(self.width), indexing="ij")
        turn = 2 * math.pi * n / 24
        low = min(self.height, self.width)
        dy = y - self.height / 2 - 0.27 * low * math.sin(turn)
        dx = x - self.width / 2 - 0.5 * self.width / low * 0.5 * low * math.cos(turn)
        inside = (dy**2 + dx**2).sqrt() < 0.17 * low
        ground = self.shown[-1][1]
        frame = ground.clone() if ground is not None else torch.full((self.height, self.width, 3), 24)
        color = next((rgb for name, rgb in COLORS.items() if name in self.prompt), COLORS["white"])
        frame[inside] = torch.tensor(color, dtype=frame.dtype)
        return frame.to(torch.uint8)

    def say(self, prompt: str, *, recache: bool = False) -> None:
        assert threading.get_ident() == self.owner
        self.prompt = prompt
        self.recached.append(recache)

    def show(self, image_HW3: Tensor) -> None:
        assert threading.get_ident() == self.owner
        assert image_HW3.shape == (self.height, self.width, 3)
        self.shown.append((self.chunk, image_HW3))

    def back(self, seconds: float) -> float:
        assert threading.get_ident() == self.owner
        self.chunk = max(0, math.floor((self.seconds - seconds) * self.fps / CHUNK + 1e-6))
        return self.seconds

    def memory(self) -> int:
        return 1_000_000


def slow(seconds: float) -> Callable[[ToyFilm], object]:
    """A network that takes its time."""
    return lambda film: time.sleep(seconds)
