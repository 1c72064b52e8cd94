"""Time of a training session, with and without its pauses."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Starts when it is made. A resumed run has ``first_step`` steps behind it, which took no time here;
    ``totals`` are the running totals that :meth:`rates` starts from."""

    def __init__(self, first_step: int = 0, **totals: int) -> None:
        self.first_step = first_step
        self._began = time.monotonic()
        self._paused = 0.0
        self._lap: tuple[float, dict[str, int]] = (0.0, totals)

    @property
    def wall(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    @property
    def training(self) -> float:
        """Seconds since the start, without finished pauses."""
        return self.wall - self._paused

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Around checkpoints, measurements and previews."""
        began = time.monotonic()
        yield
        self._paused += time.monotonic() - began

    def rates(self, **totals: int) -> dict[str, float]:
        """``<name>_per_second`` of running totals, since the last call."""
        seconds, before = self._lap
        self._lap = (self.training, dict(totals))
        passed = max(self._lap[0] - seconds, 1e-9)
        return {
            f"{name}_per_second": (total - before.get(name, 0)) / passed for name, total in totals.items()
        }

    def rate(self, step: int) -> float:
        """Steps per second of this session, pauses included."""
        return (step - self.first_step) / max(self.wall, 1e-9)

    def left(self, step: int, max_steps: int, max_seconds: float | None) -> float:
        """Seconds until either limit, by the rate so far; infinite before the first step."""
        rate = self.rate(step)
        left = (max_steps - step) / rate if rate else float("inf")
        return left if max_seconds is None else max(0.0, min(left, max_seconds - self.wall))
