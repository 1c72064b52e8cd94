"""A polite ear for SIGTERM and SIGINT: note the wish, finish the step, save, leave."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopWish:
    """``name`` of the signal that came, or empty."""

    name = ""

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C means now
        self.name = signal.Signals(number).name


@contextmanager
def listening() -> Iterator[StopWish]:
    """Signals become wishes inside; only in the main thread, where Python delivers them."""
    wish = StopWish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    before = {number: signal.signal(number, wish._hear) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
