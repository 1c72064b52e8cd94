"""Viewers and their queues: everyone sees the same film, and nobody waits for the slowest.

A queue is bounded, and so is what is on its way to a viewer that says what it has seen: networks hold seconds
of small frames, which would hide for long that it is slow. Where a queue is full its oldest frames are
dropped, counted, and the viewer is told. Where the queues of all who watch are full there is nobody to make
frames for: the maker waits.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from motionloom.studio.stream.messages import PICTURE, Block, Refused

MOST_VIEWERS = 32
_MOST_NEWS = 64


@dataclass(eq=False)
class Viewer:
    """One who watches. Its fields are the hub's; `Hub.take` empties it."""

    number: int
    wake: Callable[[], None]
    """Called from any thread when there is something to take."""
    playing: bool = True
    dropped: int = 0
    sent: int = 0
    """Frames that were taken for it."""
    seen: int | None = None
    """Of them those that it says it has; None: it does not say."""
    news: deque[str] = field(default_factory=lambda: deque(maxlen=_MOST_NEWS))
    blocks: deque[Block] = field(default_factory=deque)
    figures: Mapping[str, Any] | None = None
    """The newest only."""

    @property
    def waiting(self) -> int:
        """Frames in the queue."""
        return sum(block.kind == PICTURE for block in self.blocks)


class Hub:
    """All viewers. Safe to use from several threads.

    Args:
        frames: how many may wait for one viewer.
    """

    def __init__(self, frames: int = 48, most_viewers: int = MOST_VIEWERS) -> None:
        self.changed = threading.Condition()
        """Notified when a viewer comes, goes, wants frames or took one."""
        self.frames, self._most_viewers = frames, most_viewers
        self._viewers: list[Viewer] = []
        self._joined = self._dropped = 0
        self._last: Block | None = None

    def fit(self, frames: int) -> None:
        """Queues hold at least so many frames: some chunks."""
        with self.changed:
            self.frames = max(self.frames, frames)

    def join(self, wake: Callable[[], None]) -> Viewer:
        """Another viewer, who is shown the newest frame at once. Raises `Refused`: there are too many."""
        with self.changed:
            if len(self._viewers) >= self._most_viewers:
                raise Refused(f"{self._most_viewers} watch already: close another page and reload this one")
            self._joined += 1
            viewer = Viewer(self._joined, wake)
            if self._last is not None:
                viewer.blocks.append(self._last)
            self._viewers.append(viewer)
            self.changed.notify_all()
        return viewer

    def leave(self, viewer: Viewer) -> None:
        """A viewer that is gone, whatever was on its way."""
        with self.changed:
            if viewer in self._viewers:
                self._viewers.remove(viewer)
            self.changed.notify_all()

    def play(self, viewer: Viewer, playing: bool) -> None:
        """Whether a viewer wants frames."""
        with self.changed:
            viewer.playing = playing
            self.changed.notify_all()

    def seen(self, viewer: Viewer, frames: int) -> None:
        """So many frames have reached a viewer."""
        with self.changed:
            viewer.seen = min(frames, viewer.sent)

    def publish(self, blocks: Iterable[Block]) -> None:
        """Frames and sound for all who play. They pass by a viewer who paused while others go on; where all
        have paused, what was being made waits for them."""
        with self.changed:
            some = [viewer for viewer in self._viewers if viewer.playing]
            for viewer in self._viewers:
                if some and not viewer.playing:
                    viewer.blocks.clear()
            for block in blocks:
                self._last = block if block.kind == PICTURE else self._last
                for viewer in some or self._viewers:
                    viewer.blocks.append(block)
            for viewer in some or self._viewers:
                self._shorten(viewer)
                viewer.wake()

    def _shorten(self, viewer: Viewer) -> None:
        """Drop the oldest frames that are too many, and the sound that was to come with them."""
        too_many = viewer.waiting - self.frames
        while too_many > 0:
            block = viewer.blocks.popleft()
            if block.kind == PICTURE:
                too_many, viewer.dropped, self._dropped = too_many - 1, viewer.dropped + 1, self._dropped + 1

    def cut(self) -> None:
        """What waits is out of date: the film went back, or another begins."""
        with self.changed:
            self._last = None
            for viewer in self._viewers:
                viewer.blocks.clear()
            self.changed.notify_all()

    def tell(self, text: str, viewer: Viewer | None = None) -> None:
        """News for one viewer, or for all."""
        with self.changed:
            for one in self._viewers if viewer is None else [viewer]:
                one.news.append(text)
                one.wake()

    def show(self, figures: Mapping[str, Any]) -> None:
        """The newest figures, for all; each is told of its own dropped frames besides."""
        with self.changed:
            for viewer in self._viewers:
                viewer.figures = figures
                viewer.wake()

    def take(self, viewer: Viewer) -> str | bytes | None:
        """What is to be sent to a viewer next; None: nothing."""
        with self.changed:
            if viewer.news:
                return viewer.news.popleft()
            if viewer.figures is not None:
                figures, viewer.figures = viewer.figures, None
                return json.dumps({**figures, "dropped_here": viewer.dropped})
            under_way = 0 if viewer.seen is None else viewer.sent - viewer.seen
            if viewer.blocks and viewer.playing and under_way < max(1, self.frames // 2):
                block = viewer.blocks.popleft()
                viewer.sent += block.kind == PICTURE
                self.changed.notify_all()
                return block.packed()
        return None

    def wanted(self) -> bool:
        """Whether anybody wants frames."""
        with self.changed:
            return any(viewer.playing for viewer in self._viewers)

    def room(self, frames: int) -> bool:
        """Whether so many frames fit into the queue of anybody who wants them. A chunk longer than a queue
        needs an empty one."""
        with self.changed:
            most = max(0, self.frames - frames)
            return any(viewer.playing and viewer.waiting <= most for viewer in self._viewers)

    @property
    def viewers(self) -> int:
        """How many are there."""
        with self.changed:
            return len(self._viewers)

    @property
    def dropped(self) -> int:
        """Frames that were dropped, of all viewers together."""
        with self.changed:
            return self._dropped
