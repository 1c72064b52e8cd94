"""A film into a file or a pipe, as far as it is wanted.

P pixel frames of one piece, H x W pixels; Z sound channels, M samples.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from motionloom.studio.stream.figures import Figures, Playout, quantile
from motionloom.studio.stream.film import Film, Piece


class Reel(Protocol):
    """What takes frames and sound: a file that grows, fragments for a pipe, raw frames."""

    def add(self, frames_PHW3: NDArray[np.uint8] | None, sound_ZM: NDArray[np.float32] | None = None) -> None:
        """The next frames (uint8 sRGB, may be none) and their sound (in [-1, 1])."""


class Pipe:
    """The bytes of a file descriptor, whole and at once. Raises BrokenPipeError when the reader is gone."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, data: bytes, /) -> int:
        """Take all of ``data``."""
        view = memoryview(data)
        while view:
            view = view[os.write(self._descriptor, view) :]
        return len(data)


class RawFrames:
    """rgb24, frame after frame; sound is left out."""

    def __init__(self, sink: Pipe) -> None:
        self._sink = sink

    def add(self, frames_PHW3: NDArray[np.uint8] | None, sound_ZM: NDArray[np.float32] | None = None) -> None:
        """As `Reel.add`."""
        if frames_PHW3 is not None and len(frames_PHW3):
            self._sink.write(np.ascontiguousarray(frames_PHW3).tobytes())


@dataclass(frozen=True)
class Told:
    """A chunk, as its line says it."""

    chunk: int
    frames: int
    seconds: float
    """Length of the film, with it."""
    prompt: str
    network_s: float
    decode_s: float
    whole_s: float
    memory_bytes: int


@dataclass(frozen=True)
class Summary:
    """What was made. Seconds of time but for ``seconds``, which is the film's length; nan: not known."""

    ended: str
    """done, interrupted, the reader left, or the source ended."""
    chunks: int
    frames: int
    seconds: float
    took_s: float
    first_frame_s: float
    made_per_second: float
    """Frames per second of making, writing not counted."""
    gap_p95_s: float
    network_share: float
    decode_share: float
    memory_bytes: int

    def plain(self) -> dict[str, Any]:
        """For JSON: what is not known is None."""
        return {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()
        }


Make = Callable[[Film], Piece | None]
"""The next piece of a film; None: there is nothing to make one of."""


def record(
    film: Film,
    reel: Reel,
    *,
    seconds: float | None = None,
    stop: Callable[[], bool] = lambda: False,
    each: Callable[[Told], object] = lambda told: None,
    make: Make = lambda film: film.next(),
    clock: Callable[[], float] = time.perf_counter,
) -> Summary:
    """Make chunks until the film is ``seconds`` long, ``stop`` says so, or the reader of a pipe is gone.

    Raises:
        FloatingPointError: from the film.
        UserError: from the reel.
    """
    begun, figures, playout = clock(), Figures(), Playout(film.fps)
    most = math.inf if seconds is None else max(1, round(seconds * film.fps))
    frames = samples = chunks = memory = 0
    ended = "done"
    while frames < most:
        if stop():
            ended = "interrupted"
            break
        piece = make(film)
        over = piece is None
        if piece is None:
            ended, piece = "the source ended", film.finish()
        pixels, sound = _cut(film, piece, most - frames, samples)
        now = clock()
        frames, samples = frames + len(pixels), samples + (0 if sound is None else sound.shape[1])
        if frames and math.isnan(figures.first_frame_s):
            figures.first_frame_s = now - begun
        playout.arrive(len(pixels), now)
        whole = 0 if piece.video_PHW3 is None else len(piece.video_PHW3)
        figures.made(whole, piece.network_s, piece.decode_s, piece.whole_s)
        chunks, memory = chunks + 1, film.memory()
        try:
            reel.add(pixels, sound)
        except BrokenPipeError:
            ended = "the reader left"
            break
        length = frames / film.fps
        times = (piece.network_s, piece.decode_s, piece.whole_s)
        each(Told(piece.chunk, len(pixels), length, piece.prompt, *times, memory))
        if over:
            break
    speeds = figures.values()
    return Summary(
        ended=ended,
        chunks=chunks,
        frames=frames,
        seconds=frames / film.fps,
        took_s=clock() - begun,
        first_frame_s=figures.first_frame_s,
        made_per_second=speeds["made_per_second"],
        gap_p95_s=quantile(list(playout.gaps), 0.95),
        network_share=speeds["network_share"],
        decode_share=speeds["decode_share"],
        memory_bytes=memory,
    )


def _cut(
    film: Film, piece: Piece, most: float, samples: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32] | None]:
    """The frames of a piece, ``most`` at most, and of the sound what belongs to a film of that length."""
    if piece.video_PHW3 is None:
        pixels = np.zeros((0, film.height, film.width, 3), np.uint8)
    else:
        pixels = piece.video_PHW3.cpu().numpy()
    sound = None if piece.sound_ZM is None else piece.sound_ZM.float().cpu().numpy()
    if len(pixels) > most:
        pixels = pixels[: int(most)]
        if sound is not None:
            sound = sound[:, : round(most / film.fps * film.sample_rate)]
    return pixels, sound


def pieces_of(
    push: Callable[[Any, float], Piece], frames: Iterator[NDArray[np.uint8]], strength: float
) -> Make:
    """Of a film that is redrawn: each chunk from the frames of a source, while there are any.

    Args:
        push: the film's (frames (P, H, W, 3) uint8 tensor, strength).
        frames: chunks of what is redrawn, as many frames each as the film wants.
    """
    import torch

    def make(film: Film) -> Piece | None:
        taken = next(frames, None)
        return None if taken is None else push(torch.from_numpy(taken), strength)

    return make
