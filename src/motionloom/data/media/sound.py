"""The sound of a clip, in step with its picture."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from motionloom.data.media.info import MediaError
from motionloom.data.media.video import open_container

if TYPE_CHECKING:
    import av


def read_sound(
    path: str | os.PathLike[str], sample_rate: int | None = None, mono: bool = False
) -> NDArray[np.float32]:
    """The whole sound of a file, (channels, samples) float32 in [-1, 1], at ``sample_rate`` Hz (or its own).

    Sample 0 belongs to the picture's first frame: sound that starts later is led in by silence, sound before
    is cut. ``mono`` mixes down. AAC (mp4) fills its last 1024 samples with silence. Raises `MediaError` for a
    file without sound or one that cannot be read.
    """
    import av

    path = Path(path)
    if not path.is_file():
        raise MediaError(path, "does not exist", "correct the path or restore the file", "missing file")
    with open_container(path) as container:
        stream = container.streams.best("audio")
        if stream is None:
            raise MediaError(
                path, "has no sound", "choose a clip with sound, or train on the picture alone", "no sound"
            )
        stream = cast("av.AudioStream", stream)
        rate = sample_rate or stream.rate
        resampler = av.AudioResampler("fltp", "mono" if mono else stream.layout, rate)
        pieces: list[NDArray[np.float32]] = []
        first: float | None = None
        for frame in container.decode(stream):
            if first is None and frame.pts is not None:
                first = float(frame.pts * cast(Fraction, frame.time_base))
            pieces.extend(
                piece.to_ndarray().astype(np.float32, copy=False) for piece in resampler.resample(frame)
            )
        if not pieces:
            raise MediaError(path, "has a sound track that holds nothing", "re-encode it", "no sound")
        pieces.extend(piece.to_ndarray().astype(np.float32, copy=False) for piece in resampler.resample(None))
        lag = round(((first or 0.0) - _picture_start(container)) * rate)
    sound = np.concatenate(pieces, axis=1)
    return np.pad(sound, ((0, 0), (lag, 0))) if lag > 0 else sound[:, -lag:]


def _picture_start(container: av.container.InputContainer) -> float:
    """Seconds on the file's own clock at which the picture starts; 0 for sound alone."""
    stream = container.streams.best("video")
    if stream is None or stream.start_time is None or stream.time_base is None:
        return 0.0
    return float(stream.start_time * stream.time_base)
