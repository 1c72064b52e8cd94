"""Sound out, without a picture: wav, flac or m4a."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from motionloom.data.media.mux import add_sound_stream, mux_sound
from motionloom.durable import write_atomic
from motionloom.errors import UserError

# Container and codec: the first two keep 16 bits of every sample.
_ENCODERS = {".wav": ("wav", "pcm_s16le"), ".flac": ("flac", "flac"), ".m4a": ("ipod", "aac")}


def write_sound(path: str | os.PathLike[str], sound: NDArray[np.float32], sample_rate: int) -> Path:
    """Write sound (1 or 2 channels, samples) in [-1, 1] in the format that the suffix of ``path`` names.

    ``.wav`` and ``.flac`` keep 16 bits of every sample, ``.m4a`` is AAC. Equal sounds give equal bytes.
    Returns the path. Raises `UserError` for another suffix, no samples, or a disk that is full.
    """
    import av

    path = Path(path)
    if path.suffix.lower() not in _ENCODERS:
        raise UserError(
            f"{path}: cannot write sound as {path.suffix or 'a folder'}; name it {', '.join(_ENCODERS)}"
        )
    if not np.size(sound):
        raise UserError(f"{path}: there is no sound to write; give at least one sample")
    container_name, codec = _ENCODERS[path.suffix.lower()]
    buffer = io.BytesIO()
    # Containers would otherwise stamp the library's version and the time.
    options = {"fflags": "+bitexact"}
    with av.open(buffer, "w", format=container_name, container_options=options) as container:
        track = add_sound_stream(container, codec, sound, sample_rate)
        mux_sound(container, track, sound, sample_rate)
    write_atomic(path, buffer.getvalue())
    return path
