"""One film and its two threads: the maker, which alone owns the film, and behind it the publisher, which
turns what was made into what is sent and kept, so that a network never waits for an encoder.

Commands of viewers reach the maker through a queue and act from the next chunk on. It makes no frames where
nobody wants any, where all queues are full, or where more than ``lead`` seconds wait to be shown.
"""

from __future__ import annotations

import math
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from motionloom.errors import UserError
from motionloom.studio.stream.figures import Figures, Playout, quantile
from motionloom.studio.stream.film import Film, Open, Piece
from motionloom.studio.stream.hub import Hub, Viewer
from motionloom.studio.stream.messages import (
    PICTURE,
    SOUND,
    Back,
    Block,
    Pause,
    Play,
    Refused,
    Restart,
    Say,
    Seen,
    news,
)
from motionloom.studio.stream.pictures import frame_bytes
from motionloom.studio.stream.spool import Spool

MOST_COMMANDS = 16
_BREATH = 0.5
"""Seconds between two showings of the figures."""
_CHUNKS_QUEUED = 4
"""Chunks that a viewer's queue holds at least."""
_NO_FILM = "there is no film yet: say a prompt first"


@dataclass(frozen=True)
class Show:
    """The film goes on from a picture; it comes in over HTTP, not as a message."""

    image_HW3: Tensor


Wish = Say | Restart | Back | Show
Step = Callable[[], None]


@dataclass(frozen=True)
class _Facts:
    """What viewers must know of a film to show it."""

    epoch: int = 0
    fps: float = 0.0
    height: int = 0
    width: int = 0
    sample_rate: int = 0


class Session:
    """A film that is being made for viewers.

    Args:
        open_film: makes a new film; called in the maker's thread.
        prompt: of the first film; None: none is made before a viewer says one.
        lead: seconds of film that may wait to be shown.
        log: hears of defects, with their traceback.
        clock: seconds.
    """

    def __init__(
        self,
        open_film: Open,
        hub: Hub,
        spool: Spool,
        *,
        prompt: str | None = None,
        lead: float = 1.5,
        log: Callable[[str], object] = lambda line: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.hub, self.spool = hub, spool
        self._open_film, self._lead, self._log, self._clock = open_film, lead, log, clock
        self._wishes: deque[tuple[Wish, Viewer | None, float]] = deque()
        self._jobs: queue.Queue[Step | None] = queue.Queue(maxsize=2)
        self._film: Film | None = None
        self._state, self._prompt, self._take = "idle", prompt, 0
        self._problem = ""
        """Why the film stopped."""
        self._epoch = self._frames = self._samples = self._pending = self._memory = 0
        self._facts, self._figures, self._playout = _Facts(), Figures(), Playout(1.0)
        self._begun = self._asked = math.nan
        self._opening: float | None = None
        self._base = 0
        """Frames before the film last began anew, with a picture."""
        self._halted = False
        """No numbers came: the film can be gone back in, but not on."""
        self._closing = False
        if prompt is not None:
            self._wishes.append((Restart(prompt=prompt), None, clock()))
        self._threads = [
            threading.Thread(target=run, name=f"stream {name}", daemon=True)
            for name, run in (("maker", self._make_all), ("publisher", self._publish_all))
        ]

    def start(self) -> None:
        """Begin to make, as soon as somebody watches."""
        for thread in self._threads:
            thread.start()

    def close(self, patience: float = 10.0) -> None:
        """End both threads, after the chunk that is being made."""
        with self.hub.changed:
            self._closing = True
            self.hub.changed.notify_all()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(patience)

    def obey(self, command: Wish | Play | Pause | Seen, viewer: Viewer | None = None) -> None:
        """Take a viewer's command; it is told what comes of it. Raises `Refused`: too many wait."""
        if isinstance(command, Play | Pause | Seen):
            assert viewer is not None
            if isinstance(command, Seen):
                self.hub.seen(viewer, command.frames)
            else:
                self.hub.play(viewer, isinstance(command, Play))
            return
        with self.hub.changed:
            if len(self._wishes) >= MOST_COMMANDS:
                raise Refused(f"{MOST_COMMANDS} commands wait already: the next chunk is still being made")
            self._wishes.append((command, viewer, self._clock()))
            self.hub.changed.notify_all()

    @property
    def film_size(self) -> tuple[int, int]:
        """Height and width of the film. Raises `Refused` where there is none."""
        film = self._film
        if film is None:
            raise Refused(_NO_FILM)
        return film.height, film.width

    def hello(self) -> str:
        """What a viewer is told first."""
        return news("film", **vars(self._facts), prompt=self._prompt or "")

    def figures(self) -> dict[str, Any]:
        """All live figures; what is not known yet is None."""
        with self.hub.changed:
            gaps, ahead = list(self._playout.gaps), self._playout.ahead(self._clock())
            speeds = self._figures.values()
        values: dict[str, Any] = {
            "type": "figures",
            "state": self._state,
            "problem": self._problem if self._state == "stopped" else "",
            "prompt": self._prompt or "",
            "fps": self._facts.fps,
            "seconds": self._frames / self._facts.fps if self._facts.fps else 0.0,
            **speeds,
            "gap_p50_s": quantile(gaps, 0.5),
            "gap_p95_s": quantile(gaps, 0.95),
            "ahead_s": ahead,
            "memory_bytes": self._memory,
            "saved_s": self.spool.seconds,
            "viewers": self.hub.viewers,
            "dropped": self.hub.dropped,
        }
        return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in values.items()}

    # The maker

    def _make_all(self) -> None:
        while (step := self._next_step()) is not None:
            try:
                step()
            except Exception as error:
                # Behind what was made before, which is still on its way.
                self._put(partial(self.hub.tell, self._stopped_by(error)))
        self._put(None)

    def _next_step(self) -> Step | None:
        """What to do next, once there is something; None: end."""
        with self.hub.changed:
            while not self._closing:
                if self._wishes:
                    return partial(self._grant, *self._wishes.popleft())
                state, pause = self._why_not()
                if pause == 0:
                    return self._make
                self._state = state
                self.hub.changed.wait(pause)
        return None

    def _why_not(self) -> tuple[str, float | None]:
        """Why no chunk is made now, and for how long at most; 0: nothing is in the way."""
        film, now = self._film, self._clock()
        if film is None or self._halted:
            return ("stopped" if self._take else "idle"), None
        if not self.hub.wanted():
            self._playout.freeze(now)
            return "waiting", None
        self._playout.thaw(now)
        if not self.hub.room(self._pending + film.frames_wanted):
            return "full", None
        ahead = self._playout.ahead(now) + self._pending / film.fps
        return "ahead", max(0.0, ahead - self._lead)

    def _make(self) -> None:
        film = self._film
        assert film is not None
        self._state = "making"
        if self._opening is not None:
            # Time in which nobody wanted a frame is nobody's wait for the first.
            self._begun, self._opening = self._clock() - self._opening, None
        piece = film.next()
        self._memory = film.memory()
        frames = 0 if piece.video_PHW3 is None else len(piece.video_PHW3)
        with self.hub.changed:
            self._pending += frames
            self._figures.made(frames, piece.network_s, piece.decode_s, piece.whole_s)
        self._put(partial(self._publish, piece, self._epoch, self._frames, self._samples))
        self._frames += frames
        self._samples += 0 if piece.sound_ZM is None else piece.sound_ZM.shape[1]

    def _grant(self, wish: Wish, viewer: Viewer | None, asked: float) -> None:
        film = self._film
        try:
            over = film is None or self._halted
            if isinstance(wish, Restart) or (isinstance(wish, Say) and over):
                self._begin(self._prompt or "" if wish.prompt is None else wish.prompt, asked)
            elif film is None:
                raise Refused(_NO_FILM)
            elif isinstance(wish, Say):
                film.say(wish.prompt, recache=wish.recache)
                self._prompt, self._asked = wish.prompt, asked
                self.hub.tell(news("prompt", prompt=wish.prompt, at=self._frames / film.fps))
            elif isinstance(wish, Show):
                film.show(wish.image_HW3)
                self._base, self._halted = self._frames, False
                self.hub.tell(news("image", at=self._frames / film.fps))
            else:
                self._go_back(film, wish)
        except (UserError, Refused) as error:
            if self._film is None and not self._problem:
                self._problem = str(error)
            self.hub.tell(news("error", line=str(error)), viewer)

    def _begin(self, prompt: str, asked: float) -> None:
        """Another film from its first frame."""
        self._state = "opening"
        take, self._take = self._take, self._take + 1
        film = self._open_film(prompt, take)  # one that cannot begin leaves the one that plays
        self._prompt, self._halted, self._problem = prompt, False, ""
        self._film, self._begun, self._asked = film, math.nan, math.nan
        self._opening = self._clock() - asked
        self._epoch += 1
        self._frames = self._samples = self._base = 0
        self._figures = Figures()
        self.hub.fit(_CHUNKS_QUEUED * film.frames_wanted)
        facts = _Facts(self._epoch, film.fps, film.height, film.width, film.sample_rate)
        self._put(partial(self._publish_begin, facts))

    def _go_back(self, film: Film, wish: Back) -> None:
        made = self._frames / film.fps
        aim = (made if wish.at is None else min(wish.at, made)) - wish.seconds
        where = film.back(max(0.0, film.seconds - max(0.0, aim - self._base / film.fps)))
        self._halted = False
        self._epoch += 1
        self._frames = self._base + round(where * film.fps)
        self._samples = round(self._frames / film.fps * film.sample_rate)
        no_further = self._frames / film.fps > aim + 1e-6
        self._put(partial(self._publish_cut, self._epoch, self._frames, no_further))

    def _stopped_by(self, error: Exception) -> str:
        """The film is over, the session is not; returns the news of it."""
        self._halted, self._state = True, "stopped"
        line = str(error).split("\n", 1)[0][:300]
        if not isinstance(error, FloatingPointError | UserError):
            self._film = None
            self._log("".join(traceback.format_exception(error)))
            line = f"the film stopped: {type(error).__name__}: {line or 'no reason given'}"
        self._problem = f"{line.rstrip('.')}; another prompt begins a new film"
        return news("stopped", line=self._problem)

    def _put(self, job: Step | None) -> None:
        """Hand a job to the publisher, waiting while it is behind."""
        while True:
            try:
                self._jobs.put(job, timeout=_BREATH)
                return
            except queue.Full:
                if self._closing and not self._threads[1].is_alive():
                    return

    # The publisher

    def _publish_all(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=_BREATH)
                if job is None:
                    return
                job()
            except queue.Empty:
                pass
            except Exception as error:
                with self.hub.changed:
                    self._pending = 0
                self.hub.tell(self._stopped_by(error))
            self.hub.show(self.figures())

    def _publish_begin(self, facts: _Facts) -> None:
        self.spool.begin(facts.fps, facts.sample_rate)
        with self.hub.changed:
            self._playout = Playout(facts.fps)
            self._facts = facts
            self.hub.cut()
            self.hub.tell(self.hello())

    def _publish_cut(self, epoch: int, frames: int, no_further: bool) -> None:
        self.spool.cut(frames)
        with self.hub.changed:
            self._playout.skip()
            self._facts = replace(self._facts, epoch=epoch)
            self.hub.cut()
            at = frames / self._facts.fps
            self.hub.tell(news("cut", epoch=epoch, at=at, no_further=no_further))

    def _publish(self, piece: Piece, epoch: int, first: int, sample: int) -> None:
        facts = self._facts
        frames, sound = _pixels(piece, facts), _samples(piece)
        if epoch == self._epoch:  # else it went back meanwhile, and what was to be shown is out of date
            blocks = _blocks(facts, frames, sound, first, sample)
            note = {
                "chunk": piece.chunk,
                "at": first / facts.fps,
                "frames": len(frames),
                "prompt": piece.prompt,
            }
            with self.hub.changed:
                now = self._clock()
                self._playout.arrive(len(frames), now)
                self._measure(piece, len(frames), now)
                self.hub.tell(news("chunk", epoch=epoch, **note))
                self.hub.publish(blocks)
        with self.hub.changed:
            self._pending = max(0, self._pending - len(frames))
            self.hub.changed.notify_all()
        if len(frames) or sound is not None:
            self.spool.add(first, frames, sound)

    def _measure(self, piece: Piece, frames: int, now: float) -> None:
        if frames and not math.isnan(self._begun):
            self._figures.first_frame_s, self._begun = now - self._begun, math.nan
        if frames and not math.isnan(self._asked) and piece.prompt == self._prompt:
            self._figures.prompt_s, self._asked = now - self._asked, math.nan


def _pixels(piece: Piece, facts: _Facts) -> NDArray[np.uint8]:
    if piece.video_PHW3 is None:
        return np.zeros((0, facts.height, facts.width, 3), np.uint8)
    return np.ascontiguousarray(piece.video_PHW3.cpu().numpy())


def _samples(piece: Piece) -> NDArray[np.float32] | None:
    if piece.sound_ZM is None or not piece.sound_ZM.shape[1]:
        return None
    return np.ascontiguousarray(piece.sound_ZM.float().cpu().numpy())


def _blocks(
    facts: _Facts, frames: NDArray[np.uint8], sound: NDArray[np.float32] | None, first: int, sample: int
) -> list[Block]:
    """Sound in front of the frames that it goes with."""
    blocks = []
    if sound is not None and facts.sample_rate:
        body = np.clip(sound, -1, 1).astype("<f4").tobytes()
        at = sample / facts.sample_rate
        blocks.append(Block(SOUND, facts.epoch, sound.shape[1], at, body, len(sound)))
    for n, pixels in enumerate(frames, first):
        blocks.append(Block(PICTURE, facts.epoch, n, n / facts.fps, frame_bytes(pixels)))
    return blocks
