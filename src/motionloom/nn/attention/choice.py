"""Which way to compute an attention: measured once for each kind of problem, and remembered.

Small problems go by a fixed rule, so that tests and tiny runs are the same everywhere. What a clock says is
never the same twice, so a run keeps its choices in a file (:meth:`Choices.keep_in`): each is on disk before
it is used, and a resume goes the same ways.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from motionloom.errors import UserError

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
        self._file: Path | None = None

    @contextmanager
    def keep_in(self, file: Path, *, resume: bool) -> Iterator[None]:
        """Inside, every choice is written to ``file`` as soon as it is made.

        Args:
            resume: begin with the choices that are there, if any.

        Raises:
            UserError: the file is damaged.
        """
        if resume and file.is_file():
            try:
                self._seconds |= {
                    key: {way: float(t) for way, t in seconds.items()}
                    for key, seconds in json.loads(file.read_text()).items()
                }
            except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
                raise UserError(
                    f"{file} is damaged ({error}): remove it; attention is then measured anew, and the "
                    "resume is exact but for rounding"
                ) from None
        if not resume:
            file.unlink(missing_ok=True)
        before, self._file = self._file, file
        self._write()
        try:
            yield
        finally:
            self._file = before

    def _write(self) -> None:
        if self._file is None or not self._seconds:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._file.with_name(f"{self._file.name}.tmp")
        unfinished.write_text(json.dumps(self._seconds, indent=1) + "\n")
        os.replace(unfinished, self._file)

    def pick(self, key: str, ways: Sequence[str], run: Callable[[str], object], device: torch.device) -> str:
        """Measure all ``ways`` for problems named ``key``, remember, and give the quickest; ``run`` computes
        the problem by one of them."""
        self._seconds[key] = seconds = _measured(ways, run, device)
        self._write()
        return best(seconds)

    def known(self, key: str) -> str | None:
        """The way that was chosen for problems named ``key``, None if none was met."""
        seconds = self._seconds.get(key)
        return best(seconds) if seconds else None

    def measurements(self) -> dict[str, dict[str, float]]:
        """Seconds by problem and way, in the order in which they were met."""
        return {key: dict(seconds) for key, seconds in self._seconds.items()}

    def measured(self, key: str) -> dict[str, float] | None:
        """Seconds by way, None if the problem has not been met."""
        return self._seconds.get(key)


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
