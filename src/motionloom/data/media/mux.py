"""Sound on its way into a container, with or without a picture beside it."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import av


def add_sound_stream(
    container: av.container.OutputContainer, codec: str, sound: NDArray[np.float32], sample_rate: int
) -> Any:
    """A stream for ``sound`` (1 or 2 channels, samples), at its own rate if the codec knows that one."""
    import av

    assert sound.ndim == 2, "sound is (channels, samples)"
    assert sound.shape[0] in (1, 2), "one or two channels"
    known = sorted(av.Codec(codec, "w").audio_rates or (sample_rate,))
    # Opus knows five rates only, of which 48 kHz is its own. Else the next one up loses nothing.
    rate = next((rate for rate in known if rate >= sample_rate), known[-1]) if codec != "libopus" else 48_000
    track: Any = container.add_stream(codec, rate=rate, layout=_layout(sound))
    if codec == "aac":
        # The usual search for quantisers, at the usual 128 kbit/s, loses pure tones: 20 dB above its noise
        # at 48 kHz, where this one stays 73 dB above (a ShapeWorld clip's sound).
        track.bit_rate, track.codec_context.options = 192_000, {"aac_coder": "fast"}
    return track


def mux_sound(
    container: av.container.OutputContainer, track: Any, sound: NDArray[np.float32], sample_rate: int
) -> None:
    """Encode all of it into its stream; what exceeds [-1, 1] is cut off."""
    import av

    samples = np.ascontiguousarray(np.clip(sound, -1, 1), dtype=np.float32)
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=_layout(sound))
    frame.sample_rate, frame.pts, frame.time_base = sample_rate, 0, Fraction(1, sample_rate)
    context = track.codec_context
    resampler = av.AudioResampler(
        context.format, _layout(sound), track.rate, frame_size=context.frame_size or None
    )
    for piece in (*resampler.resample(frame), *resampler.resample(None)):
        container.mux(track.encode(piece))
    container.mux(track.encode(None))


def _layout(sound: NDArray[np.float32]) -> str:
    return "mono" if len(sound) == 1 else "stereo"
