"""How long the network takes, without making a device wait for the answer at every pass.

Shapes: see ``backbones/prediction.py``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from motionloom.backbones.prediction import Predictor


class Stopwatch:
    """Sums the time between starts and stops: the device's where it has events, else the clock's."""

    def __init__(self, device: torch.device) -> None:
        self._events = device.type in ("cuda", "xpu")
        self._device = device
        self._open: list[tuple[Any, Any]] = []
        self._seconds = 0.0

    def now(self) -> Any:
        """A moment."""
        if not self._events:
            return time.perf_counter()
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event

    def add(self, start: Any, end: Any) -> None:
        """What lies between two moments."""
        if self._events:
            self._open.append((start, end))
        else:
            self._seconds += end - start

    @property
    def seconds(self) -> float:
        """In all. Waits for a device to get so far."""
        for start, end in self._open:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1e3
        self._open.clear()
        return self._seconds


@dataclass(frozen=True)
class TimedPredictor(Predictor):
    """A predictor that says what it took."""

    watch: Stopwatch = field(default_factory=lambda: Stopwatch(torch.device("cpu")))

    def velocity(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """As :meth:`~motionloom.backbones.prediction.Predictor.velocity`."""
        start = self.watch.now()
        found = super().velocity(*args, **kwargs)
        self.watch.add(start, self.watch.now())
        return found
