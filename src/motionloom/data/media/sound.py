"""The sound of a clip, in step with its picture, or a file of sound alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from motionloom.data.media.info import MediaError
from motionloom.data.media.video import open_container

if TYPE_CHECKING:
    import av
    from av.container import InputContainer

SOUND_SUFFIXES = frozenset((".wav", ".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac", ".aiff", ".aif"))
"""Files of sound alone."""

_FORMATS = "wav,mp3,flac,aac,aiff"
_SEEK_FROM = 2.0  # seconds; decoding that much is cheaper than a seek that lands in the wrong place
_LEAD = 0.5  # seconds decoded before the part that is wanted: codecs need a run-up


def is_sound(path: Path) -> bool:
    """Whether the name is that of a file of sound alone."""
    return path.suffix.lower() in SOUND_SUFFIXES


def sound_seconds(path: str | os.PathLike[str]) -> float:
    """How long a file of sound alone is. Raises `MediaError` for one that cannot be read."""
    path = Path(path)
    with _opened(path) as container:
        stream = _stream(path, container)
        if stream.duration is not None and stream.time_base is not None:
            return float(stream.duration * stream.time_base)
        return (container.duration or 0) / 1_000_000


def read_sound(
    path: str | os.PathLike[str],
    sample_rate: int | None = None,
    mono: bool = False,
    *,
    start: float = 0.0,
    seconds: float | None = None,
) -> NDArray[np.float32]:
    """The sound of a file, (channels, samples) float32 in [-1, 1], at ``sample_rate`` Hz (or its own).

    Time 0 is the picture's first frame: sound that starts later is led in by silence, sound before is cut.
    Of ``seconds`` from ``start`` on, what there is: nothing where the sound has ended. ``mono`` mixes down,
    and more than two channels become two. AAC (mp4) fills its last 1024 samples with silence.

    Raises:
        MediaError: the file is without sound (kind ``no sound``) or cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise MediaError(path, "does not exist", "correct the path or restore the file", "missing file")
    with _opened(path) as container:
        stream = _stream(path, container)
        rate = sample_rate or stream.rate
        wanted = None if seconds is None else round(seconds * rate)
        origin = _picture_start(container)
        if start > _SEEK_FROM and stream.time_base is not None:
            container.seek(int((start + origin - _LEAD) / stream.time_base), stream=stream, backward=True)
        pieces: list[NDArray[np.float32]] = []
        lag = have = 0
        for piece, began in _resampled(container, stream, rate, mono):
            if not pieces:
                lag = round((began - origin - start) * rate)
                have = lag
            pieces.append(piece)
            have += piece.shape[1]
            if wanted is not None and have >= wanted:
                break
        if not pieces and start == 0:
            raise MediaError(path, "has a sound track that holds nothing", "re-encode it", "no sound")
    sound = np.concatenate(pieces, axis=1) if pieces else np.zeros((1, 0), np.float32)
    sound = np.pad(sound, ((0, 0), (lag, 0))) if lag > 0 else sound[:, -lag:]
    return sound[:, :wanted]


def _opened(path: Path) -> AbstractContextManager[InputContainer]:
    return open_container(path, _FORMATS, "a sound") if is_sound(path) else open_container(path)


def _stream(path: Path, container: InputContainer) -> av.AudioStream:
    stream = container.streams.best("audio")
    if stream is None:
        fix = "choose a clip with sound, or train on the picture alone"
        raise MediaError(path, "has no sound", fix, "no sound")
    return cast("av.AudioStream", stream)


def _resampled(
    container: InputContainer, stream: av.AudioStream, rate: int, mono: bool
) -> Iterator[tuple[NDArray[np.float32], float]]:
    """Pieces (channels, samples), and the time on the file's clock at which the first of them begins."""
    import av

    layout = "mono" if mono else "stereo" if stream.layout.nb_channels > 2 else stream.layout
    resampler = av.AudioResampler("fltp", layout, rate)
    began: float | None = None
    for frame in container.decode(stream):
        if began is None:
            began = float(frame.pts * cast(Fraction, frame.time_base)) if frame.pts is not None else 0.0
        for piece in resampler.resample(frame):
            yield piece.to_ndarray().astype(np.float32, copy=False), began
    if began is not None:
        for piece in resampler.resample(None):
            yield piece.to_ndarray().astype(np.float32, copy=False), began


def _picture_start(container: InputContainer) -> float:
    """Seconds on the file's own clock at which the picture starts; 0 for sound alone."""
    stream = container.streams.best("video")
    if stream is None or stream.start_time is None or stream.time_base is None:
        return 0.0
    return float(stream.start_time * stream.time_base)
