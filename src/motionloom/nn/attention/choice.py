"""Which way to compute an attention: measured once for each kind of problem, and remembered.

Small problems go by a fixed rule, so that tests and tiny runs are the same everywhere. A run that stores
``CHOICES.state_dict()`` in its checkpoints goes the same ways when it is resumed, on any machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

SMALL_FLOPS = 2**28
"""Forward passes of fewer operations are not worth measuring."""
REPEATS = 3
MARGINS = {"merge": 1.0, "segments": 0.92, "flex": 0.92, "dense": 0.75}
"""Kinds of ways from the leanest: share of a leaner way's time under which one is taken instead."""
CLEAR = 1.5
"""What is so many times slower than the quickest is not measured again."""


class Choices:
    """The ways that were chosen, with what was measured."""

    def __init__(self) -> None:
        self._seconds: dict[str, dict[str, float]] = {}
        self.pinned: str | None = None

    def pick(self, key: str, ways: Sequence[str], run: Callable[[str], object], device: torch.device) -> str:
        """Measure all ``ways`` for problems named ``key``, remember, and give the quickest; ``run`` computes
        the problem by one of them."""
        self._seconds[key] = seconds = _measured(ways, run, device)
        return best(seconds)

    def known(self, key: str) -> str | None:
        """The way that was chosen for problems named ``key``, None if none was met."""
        seconds = self._seconds.get(key)
        return best(seconds) if seconds else None

    def measured(self, key: str) -> dict[str, float] | None:
        """Seconds by way, None if the problem has not been met."""
        return self._seconds.get(key)

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Seconds by problem and way; plain numbers and names."""
        return {key: dict(seconds) for key, seconds in self._seconds.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Know what another process measured; its choices replace one's own."""
        self._seconds |= {key: dict(seconds) for key, seconds in state.items()}


CHOICES = Choices()
"""Those of this process."""


@contextmanager
def pinned(way: str) -> Iterator[None]:
    """Inside, every pattern goes this way wherever it applies, whatever its size: for tests and benchmarks.

    A way is ``dense``, ``flex``, or ``segments`` or ``merge`` with or without ``/`` and a kernel's name.
    """
    before, CHOICES.pinned = CHOICES.pinned, way
    try:
        yield
    finally:
        CHOICES.pinned = before


def best(seconds: Mapping[str, float]) -> str:
    """The quickest, but for ways that need more memory (copies of keys, a mask of all pairs) only if they are
    clearly quicker: clocks are not exact, least of all on a busy machine."""
    kinds: dict[str, str] = {}
    for way in sorted(seconds, key=seconds.__getitem__):
        kinds.setdefault(way.split("/")[0], way)
    chosen = ""
    for kind, margin in MARGINS.items():
        if kind in kinds and (not chosen or seconds[kinds[kind]] < margin * seconds[chosen]):
            chosen = kinds[kind]
    return chosen


def matching(way: str, ways: Sequence[str]) -> str | None:
    """The first of ``ways`` that is ``way``, or ``way`` with some kernel."""
    return next((name for name in ways if name == way or name.split("/")[0] == way), None)


def _measured(ways: Sequence[str], run: Callable[[str], Any], device: torch.device) -> dict[str, float]:
    """Seconds of each: a run to warm up, one that counts, more for those that may yet be the quickest."""
    for way in ways:
        run(way)
    seconds = {way: _seconds(run, way, device) for way in ways}
    for _ in range(REPEATS - 1):
        for way in [way for way in ways if seconds[way] < CLEAR * min(seconds.values())]:
            seconds[way] = min(seconds[way], _seconds(run, way, device))
    return seconds


def _seconds(run: Callable[[str], Any], way: str, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run(way)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
