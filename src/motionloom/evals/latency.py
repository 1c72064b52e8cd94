"""What a stream costs while it is made: the wait for its first frame, frames per second, gaps, memory.

Protocol ``stream-latency-v1``. A piece counts as long as whoever asked for it had to wait, by the judge's own
clock; network and decoder by the stream's. A decoder may give the frames of a chunk in several pieces: rates
and shares are of whole chunks, and leave out those up to the first frame, which has a figure of its own, as
there weights are touched and kernels chosen for the first time. Gaps are between arrivals of frames. One
evaluation is a pass over as many tokens as the clip has: of a clip of five chunks, a pass over one is a
fifth. Figures of two machines, or of one that had other work, do not compare.

P pixel frames, H x W pixels.
"""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import groupby
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from motionloom.errors import UserError
from motionloom.evals.asked import Video
from motionloom.evals.figures import Report, Target, summarise
from motionloom.generate import Piece

PROTOCOL = "stream-latency-v1"
TARGETS = {
    "neither network nor decoding": Target(0.10, least=False),
    "memory growth": Target(1.05, least=False),
}
LEAST_CHUNKS = 8  # of fewer nobody can say whether memory keeps growing
PATIENCE = 64  # chunks without a frame after which a stream is given up
MB = 1e6


class Live(Protocol):
    """A stream, as judges see it: `generate.stream.Stream` is one."""

    @property
    def fps(self) -> float:
        """Frames per second of what it shows."""
        ...

    @property
    def seconds(self) -> float:
        """Length of all chunks that were made, whether they were decoded or not."""
        ...

    def next(self) -> Piece:
        """The next frames."""
        ...

    def say(self, prompt: str, *, recache: bool = False) -> None:
        """Other words from the next chunk on."""
        ...

    def memory(self) -> int:
        """Bytes of its cache."""
        ...


@dataclass
class Work:
    """How much a network was asked to do."""

    passes: int = 0
    """Clips that it answered for, over all its passes."""
    tokens: int = 0
    """Tokens that it answered for."""


@contextmanager
def counted(network: nn.Module) -> Iterator[Work]:
    """Counts what a backbone answers in the meantime: (B, N, C) by modality, pass by pass."""
    work = Work()

    def see(_: nn.Module, __: Any, answer: Mapping[str, Tensor]) -> None:
        work.passes += len(next(iter(answer.values())))
        work.tokens += sum(x_BNC.shape[0] * x_BNC.shape[1] for x_BNC in answer.values())

    hook = network.register_forward_hook(see)
    try:
        yield work
    finally:
        hook.remove()


@dataclass(frozen=True)
class Taken:
    """What a piece, or a chunk's pieces together, brought and took. ``wait_s``: until it was there."""

    chunk: int
    frames: int
    wait_s: float
    network_s: float
    decode_s: float
    border: int
    """Pixel frame at which the last chunk that was made ends."""
    memory: int
    """Bytes of the cache after it."""
    passes: int = 0
    tokens: int = 0

    def __add__(self, later: Taken) -> Taken:
        """Both, one after the other."""
        summed = {
            name: getattr(self, name) + getattr(later, name)
            for name in ("frames", "wait_s", "network_s", "decode_s", "passes", "tokens")
        }
        return replace(later, **summed)


@dataclass(frozen=True)
class Film:
    """A roll-out as it was made; a finished clip has no ``pieces``. ``open_s``: before the first piece."""

    name: str
    prompt: str
    video_PHW3: Video
    fps: float
    pieces: tuple[Taken, ...] = ()
    open_s: float = 0.0
    seed: int = 0
    switches: tuple[tuple[int, str], ...] = ()
    """Pixel frames from which other prompts held, and those."""

    @property
    def chunks(self) -> tuple[Taken, ...]:
        """The pieces of each chunk together."""
        groups = groupby(self.pieces, key=lambda piece: piece.chunk)
        return tuple(reduce(operator.add, pieces) for _, pieces in groups)

    @property
    def starts(self) -> tuple[int, ...]:
        """First frames of all chunks but the first that are in the picture."""
        frames = sum(piece.frames for piece in self.pieces)
        return tuple(chunk.border for chunk in self.chunks if chunk.border < frames)

    @property
    def whole_s(self) -> float:
        """Seconds that all of it took."""
        return self.open_s + sum(piece.wait_s for piece in self.pieces)


@dataclass(frozen=True)
class Recorder:
    """How roll-outs are recorded.

    ``network``: what is counted; None: nothing. ``tell`` hears (frames made, frames wanted) after each piece.
    ``recache``: of prompts that are said on the way, see `generate.stream.Stream.say`.
    """

    seconds: float
    network: nn.Module | None = None
    clock: Callable[[], float] = time.perf_counter
    recache: bool = False
    tell: Callable[[int, int], None] = field(default=lambda done, wanted: None)

    def record(
        self,
        open_stream: Callable[[], Live],
        name: str,
        prompt: str,
        seed: int = 0,
        then: Sequence[tuple[float, str]] = (),
    ) -> Film:
        """One roll-out, from opening the stream to the piece that makes it long enough.

        Args:
            then: prompts to go over to, and the seconds of film at which they are said.

        Raises:
            UserError: piece after piece brings no frame.
            FloatingPointError: as the stream raises it.
        """
        with counted(self.network if self.network is not None else nn.Identity()) as work:
            began = self.clock()
            stream = open_stream()
            opened = self.clock() - began
            videos, pieces, said = self._pieces(stream, work, then)
        film = Film(name, prompt, np.concatenate(videos), stream.fps, tuple(pieces), opened, seed)
        return replace(film, switches=tuple(said))

    def _pieces(
        self, stream: Live, work: Work, then: Sequence[tuple[float, str]]
    ) -> tuple[list[Video], list[Taken], list[tuple[int, str]]]:
        wanted = max(1, math.ceil(self.seconds * stream.fps - 1e-6))
        videos: list[Video] = []
        pieces: list[Taken] = []
        said: list[tuple[int, str]] = []
        done = 0
        while done < wanted:
            before, begin = (work.passes, work.tokens), self.clock()
            for _, prompt in [one for one in then[len(said) :] if stream.seconds >= one[0] - 1e-6]:
                stream.say(prompt, recache=self.recache)
                said.append((round(stream.seconds * stream.fps), prompt))
            piece = stream.next()
            waited = self.clock() - begin
            frames = 0 if piece.video_PHW3 is None else len(piece.video_PHW3)
            if piece.video_PHW3 is not None and frames:
                videos.append(piece.video_PHW3.cpu().numpy())
            done += frames
            pieces.append(
                Taken(
                    chunk=piece.chunk,
                    frames=frames,
                    wait_s=waited,
                    network_s=piece.network_s,
                    decode_s=piece.decode_s,
                    border=round(stream.seconds * stream.fps),
                    memory=stream.memory(),
                    passes=work.passes - before[0],
                    tokens=work.tokens - before[1],
                )
            )
            if not done and len(pieces) >= PATIENCE:
                raise UserError(f"{PATIENCE} chunks brought no frame: this model shows no picture to judge")
            self.tell(min(done, wanted), wanted)
        return videos, pieces, said


def first_frame(film: Film) -> float:
    """Seconds from the wish to the first frame: opening, and every piece up to the first that has one."""
    return film.open_s + sum(piece.wait_s for piece in film.pieces[: _first(film.pieces) + 1])


def _first(parts: Sequence[Taken]) -> int:
    return next(n for n, part in enumerate(parts) if part.frames)


def gaps(film: Film) -> list[float]:
    """Seconds between one arrival of frames and the next."""
    found, since = [], 0.0
    for piece in film.pieces[_first(film.pieces) + 1 :]:
        since += piece.wait_s
        if piece.frames:
            found.append(since)
            since = 0.0
    return found


def stall(film: Film) -> float:
    """Seconds for which a player that starts with the first frame stands still in all."""
    at = _first(film.pieces)
    late, clock, shown = 0.0, 0.0, film.pieces[at].frames
    for piece in film.pieces[at + 1 :]:
        clock += piece.wait_s
        if piece.frames:
            late = max(late, clock - shown / film.fps)
            shown += piece.frames
    return late


def memory_growth(film: Film) -> float | None:
    """The most that the cache held in the last quarter of the roll-out over that in its third: 1 is flat, 4/3
    a cache that never lets go. None where the roll-out is too short to say."""
    held = [chunk.memory for chunk in film.chunks]
    if len(held) < LEAST_CHUNKS:
        return None
    quarter = len(held) // 4
    before = max(held[-2 * quarter : -quarter])
    return max(held[-quarter:]) / before if before else None


def steady(film: Film) -> tuple[Taken, ...]:
    """Whole chunks behind the one that brought the first frame; all there is where there are none."""
    chunks = film.chunks
    later = chunks[_first(chunks) + 1 :]
    # The recorder may have stopped within the last chunk, whose work is done but not all shown.
    if len(later) > 1 and later[-1].frames < later[-2].frames:
        later = later[:-1]
    return later if any(chunk.frames for chunk in later) else chunks


def latency(film: Film, clip_frames: int | None = None) -> dict[str, float | None]:
    """The numbers of one roll-out.

    Args:
        clip_frames: pixel frames of a clip, for figures "a clip"; None leaves them out.
    """
    chunks = steady(film)
    frames = sum(chunk.frames for chunk in chunks)
    waited, network, decoding = (
        sum(getattr(chunk, name) for chunk in chunks) for name in ("wait_s", "network_s", "decode_s")
    )
    between = gaps(film)
    rate = frames / waited if waited > 0 else None
    undecoded = frames / (waited - decoding) if waited > decoding else None
    row: dict[str, float | None] = {
        "first frame, s": first_frame(film),
        "frames/s": rate,
        "frames/s without decoding": undecoded,
        "times real time": None if rate is None else rate / film.fps,
        "gap p50, s": float(np.quantile(between, 0.5)) if between else None,
        "gap p95, s": float(np.quantile(between, 0.95)) if between else None,
        "stall, s": stall(film),
        "outside the network": max(0.0, 1 - network / waited) if waited > 0 else None,
        "neither network nor decoding": max(0.0, 1 - (network + decoding) / waited) if waited > 0 else None,
        "most memory, MB": max(chunk.memory for chunk in film.chunks) / MB,
        "memory growth": memory_growth(film),
    }
    return row | (_work(film, clip_frames) if clip_frames is not None else {})


def _work(film: Film, clip_frames: int) -> dict[str, float | None]:
    """What the network was asked for, a clip: passes of any size, and in passes over all of the clip."""
    worked = [chunk for chunk in film.chunks if chunk.passes]
    made = film.pieces[-1].border
    if not worked or not made:
        return {}
    # A pass over a chunk is over all of its tokens.
    tokens = sum(chunk.tokens / chunk.passes for chunk in worked)
    return {
        "evaluations a clip": sum(chunk.tokens for chunk in worked) / tokens,
        "passes a clip": sum(chunk.passes for chunk in worked) * clip_frames / made,
    }


def judge_latency(films: Sequence[Film], clip_frames: int | None = None) -> Report:
    """Every roll-out that was recorded chunk by chunk.

    ``details``: ``chunks``, what the n-th chunk of the roll-outs takes and holds in the mean.
    """
    assert all(film.pieces for film in films), "recorded roll-outs"
    taken = [film.chunks for film in films]
    longest = max(map(len, taken))
    by_chunk = [
        {
            "chunk": n,
            "wait_s": float(np.mean([c.wait_s for c in at])),
            "network_s": float(np.mean([c.network_s for c in at])),
            "decode_s": float(np.mean([c.decode_s for c in at])),
            "memory": float(np.mean([c.memory for c in at])),
            "frames": float(np.mean([c.frames for c in at])),
        }
        for n in range(longest)
        if (at := [chunks[n] for chunks in taken if n < len(chunks)])
    ]
    return summarise(
        "latency",
        PROTOCOL,
        [film.name for film in films],
        [latency(film, clip_frames) for film in films],
        {"": "clock", "most memory, MB": "cache", "memory growth": "cache", **dict.fromkeys(COUNTS, "calls")},
        targets=TARGETS,
        groups=[film.prompt for film in films],
        details={"chunks": by_chunk},
    )


COUNTS = ("evaluations a clip", "passes a clip")
