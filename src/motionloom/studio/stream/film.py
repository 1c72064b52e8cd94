"""What the player asks of whatever makes a film: an engine of `generate`, or a stand-in for tests.

P pixel frames of one piece, H x W pixels; Z sound channels, M samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from motionloom.generate import Piece


class Film(Protocol):
    """An endless clip, made chunk by chunk. One thread owns it."""

    @property
    def fps(self) -> float:
        """Frames per second."""

    @property
    def height(self) -> int:
        """In pixels."""

    @property
    def width(self) -> int:
        """In pixels."""

    @property
    def sample_rate(self) -> int:
        """Of the sound in Hz; 0: silent."""

    @property
    def chunk(self) -> int:
        """The number of the next chunk; `show` begins anew with 0."""

    @property
    def seconds(self) -> float:
        """Made since it began, or since `show`."""

    @property
    def frames_wanted(self) -> int:
        """Pixel frames of the next chunk."""

    def next(self) -> Piece:
        """What comes next. Raises FloatingPointError where the network answers with no numbers."""

    def finish(self) -> Piece:
        """What its decoder still holds, as if it ended here."""

    def say(self, prompt: str, *, recache: bool = False) -> None:
        """Another prompt, from the next chunk on."""

    def show(self, image_HW3: Tensor) -> None:
        """Go on from this picture (uint8, of the film's size): the past is forgotten."""

    def back(self, seconds: float) -> float:
        """To the last chunk border at or before so many seconds ago, or the oldest that is remembered;
        returns where that is, on the clock of ``seconds``."""

    def memory(self) -> int:
        """Bytes of the cache."""


Open = Callable[[str, int], Film]
"""A new film: (prompt, take). The take counts the films of a session, so that another one looks otherwise."""
