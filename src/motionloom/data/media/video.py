"""Video files through PyAV: what they hold, and their frames with honest times."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from motionloom.data.media.info import MAX_FRAME_PIXELS, MediaError, MediaInfo, Shown, check_frame_size

if TYPE_CHECKING:
    import av
    from av.container import InputContainer

# Without these lists a text file named .mp4 could be taken for a playlist, which opens other files and
# addresses.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,ogg,asf"
_ALPHA_DECODERS = {
    "vp9": "libvpx-vp9",
    "vp8": "libvpx",
}  # ffmpeg's own VP8 and VP9 decoders drop the alpha layer
_UNSPECIFIED_MATRIX = 2
_MIN_RATE, _MAX_RATE = 0.02, 1000.0
_SEEK_FROM = 1.0  # seconds; decoding a second is cheaper than a seek that lands in the wrong place


@contextlib.contextmanager
def open_container(path: Path, more_formats: str = "", what: str = "a video") -> Iterator[InputContainer]:
    """Open a media file for reading; what ffmpeg says of it in there becomes one line that names the file.

    Args:
        more_formats: ffmpeg's names, with commas, of those that are allowed beside videos'.
        what: it should be.
    """
    import av

    formats = f"{_FORMATS},{more_formats}" if more_formats else _FORMATS
    options = {"protocol_whitelist": "file", "format_whitelist": formats}
    try:
        with av.open("file:" + os.fspath(path), options=options) as container:
            yield container
    except av.FFmpegError as error:
        if _lacks_index(path):
            wrong = "truncated: the index (moov), which an mp4 may keep at its end, is missing"
            raise MediaError(path, wrong, "fetch or re-encode it again, or delete it", "truncated") from error
        wrong = f"is not {what} that can be read ({(error.strerror or str(error)).lower()})"
        raise MediaError(path, wrong, "re-encode it or delete it", f"not {what}") from error


def _lacks_index(path: Path) -> bool:
    """Whether this is an mp4 or mov, a row of boxes headed by size and name, without a ``moov`` box."""
    with open(path, "rb") as file:
        position, names = 0, []
        while len(header := file.read(8)) == 8:
            size, name = int.from_bytes(header[:4], "big"), header[4:]
            names.append(name)
            position += int.from_bytes(file.read(8), "big") if size == 1 else max(size, 8)
            file.seek(position)
    return names[:1] == [b"ftyp"] and b"moov" not in names


def video_info(path: Path, *, count: bool) -> MediaInfo:
    """What a video file holds. Decodes a frame; ``count`` also reads all packets if there is no index.

    Raises `MediaError` for what is no video, has no picture or no frame rate, is damaged or truncated.
    """
    with open_container(path) as container:
        stream = _video_stream(path, container)
        first = next(_decoded(path, container, stream), None)
        if first is None:
            raise MediaError(path, "holds no frame that decodes", "re-encode it or delete it", "damaged")
        if first.is_corrupt:
            raise _damaged(path, 0.0)
        turned = first.rotation % 180 != 0
        frames, exact, duration = _extent(path, container, stream, count=count)
        rate = _rate(path, stream, frames if exact else 0, duration)
        aspect = float(stream.sample_aspect_ratio or 1)
        width, height = (first.height, first.width) if turned else (first.width, first.height)
        return MediaInfo(
            kind="video",
            width=width,
            height=height,
            frames=frames or max(1, round(duration * rate)),
            frames_exact=exact,
            fps=rate,
            duration=round(duration or frames / rate, 6),
            has_sound=bool(container.streams.audio),
            has_alpha=_has_alpha(stream),
            pixel_aspect=1 / aspect if turned else aspect,
        )


def video_frames(path: Path, start: float = 0.0) -> Iterator[Shown]:
    """The frames on screen from ``start`` seconds on (and possibly some before), in order of time."""
    with open_container(path) as container:
        stream = _video_stream(path, container)
        time_base = cast(Fraction, stream.time_base)
        origin = stream.start_time or 0
        sought = start > _SEEK_FROM
        if sought:
            container.seek(origin + int(start / time_base), stream=stream, backward=True)
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        aspect = float(stream.sample_aspect_ratio or 1)
        held: av.VideoFrame | None = None
        held_time = 0.0
        for index, frame in enumerate(_decoded(path, container, stream)):
            time = float((frame.pts - origin) * time_base) if frame.pts is not None else index / rate
            if sought and held is None and time > start:
                break  # a faulty index led past the start: read from the beginning instead
            if frame.is_corrupt:
                # After a seek, frames that lean on what was jumped over come out broken.
                if sought and time < start:
                    continue
                raise _damaged(path, time)
            if held is not None:
                yield _shown(held, held_time, max(time, held_time), aspect)
            held, held_time = frame, time
        else:
            if held is not None:
                length = float(held.duration * time_base) if held.duration else 1 / rate
                yield _shown(held, held_time, held_time + length, aspect)
            return
    yield from video_frames(path)


def _damaged(path: Path, time: float) -> MediaError:
    what = f"the frame at {time:.2f} s is damaged"
    return MediaError(path, what, "re-encode it or delete it", "damaged")


def _shown(frame: av.VideoFrame, time: float, until: float, aspect: float) -> Shown:
    turned = frame.rotation % 180 != 0
    return Shown(time, until, functools.partial(_pixels, frame), 1 / aspect if turned else aspect)


def _video_stream(path: Path, container: InputContainer) -> av.VideoStream:
    stream = container.streams.best("video")
    if stream is None:
        raise MediaError(path, "holds no picture, only sound or data", "delete it", "not a video")
    stream = cast("av.VideoStream", stream)
    check_frame_size(path, stream.codec_context.width, stream.codec_context.height)
    stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
    stream.codec_context.thread_count = 1  # clips are many: cores are shared out over clips, not within one
    intact = _intact_frames(path, stream)
    if intact is not None:
        what = f"truncated after {intact} of {len(stream.index_entries)} frames"
        raise MediaError(path, what, "re-encode it or delete it", "truncated")
    return stream


def _intact_frames(path: Path, stream: av.VideoStream) -> int | None:
    """How many indexed frames lie wholly inside the file, or None when all do."""
    entries, end_of_file = stream.index_entries, path.stat().st_size
    if not len(entries) or entries[-1].pos + entries[-1].size <= end_of_file:
        return None
    return sum(entry.pos + entry.size <= end_of_file for entry in entries)


def _decoded(path: Path, container: InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """Decoded frames in order, the alpha layer of VP8 and VP9 included."""
    import av

    context: Any = stream.codec_context
    if _has_alpha(stream) and context.name in _ALPHA_DECODERS:
        context = av.CodecContext.create(_ALPHA_DECODERS[context.name], "r")
        context.options = dict(stream.codec_context.options)
        context.thread_count = 1
    count = 0
    try:
        for packet in container.demux(stream):
            for frame in context.decode(packet):
                yield frame
                count += 1
    except av.FFmpegError as error:
        what = f"cannot be decoded after {_plural(count)} ({error.strerror or error})"
        raise MediaError(path, what, "re-encode it or delete it", "damaged") from error


def _has_alpha(stream: av.VideoStream) -> bool:
    pixel_format = stream.codec_context.format
    inside = pixel_format is not None and any(part.is_alpha for part in pixel_format.components)
    return inside or stream.metadata.get("alpha_mode") == "1"


def _extent(
    path: Path, container: InputContainer, stream: av.VideoStream, *, count: bool
) -> tuple[int, bool, float]:
    """(frames, whether counted, duration in seconds); 0 where unknown."""
    time_base = cast(Fraction, stream.time_base)
    stated = float((stream.duration or 0) * time_base) or (container.duration or 0) / 1_000_000
    entries = stream.index_entries
    if stream.frames > 0 and stream.frames == len(entries):
        span = float((entries[-1].timestamp - entries[0].timestamp) * time_base)
        if stream.frames > 1:
            _check_rate(path, (stream.frames - 1) / max(span, 1e-6))
        return stream.frames, True, stated
    if not count:
        return stream.frames, False, stated
    return _counted(path, container, stream)


def _counted(path: Path, container: InputContainer, stream: av.VideoStream) -> tuple[int, bool, float]:
    """`_extent` by reading all packets; raises `MediaError` if they end before the header says."""
    container.seek(0)
    frames, start, end, end_of_any = 0, math.inf, 0.0, 0.0
    for packet in container.demux():
        if packet.pts is None or packet.time_base is None:
            continue
        time = float(packet.pts * packet.time_base)
        after = time + float((packet.duration or 0) * packet.time_base)
        end_of_any = max(end_of_any, after)
        if packet.stream.index == stream.index:
            frames, start, end = frames + 1, min(start, time), max(end, after)
    # A header's length may be that of the sound, and leaves out or rounds up the last packet's.
    if end_of_any < (container.duration or 0) / 1_000_000 - 0.1 or frames < stream.frames - 1:
        what = f"truncated after {_plural(frames)}, at {end_of_any:.2f} s"
        raise MediaError(path, what, "re-encode it or delete it", "truncated")
    return frames, True, max(end - start, 0.0)


def _plural(frames: int) -> str:
    return f"{frames} frame{'s' * (frames != 1)}"


def _rate(path: Path, stream: av.VideoStream, counted: int, duration: float) -> float:
    """Frames per second: the header's average, unless the frames that were counted say otherwise."""
    stated = float(stream.average_rate or stream.guessed_rate or 0)
    measured = counted / duration if counted > 1 and duration > 0 else stated
    return _check_rate(path, stated if abs(stated - measured) <= 0.02 * measured else measured)


def _check_rate(path: Path, rate: float) -> float:
    if not _MIN_RATE <= rate < _MAX_RATE:
        what = f"states {rate:.6g} frames a second"
        raise MediaError(path, what, "re-encode it at its true rate, or delete it", "bad frame rate")
    return rate


def _pixels(frame: av.VideoFrame) -> NDArray[np.uint8]:
    """(H, W, 3) or (H, W, 4) uint8, upright."""
    alpha = any(part.is_alpha for part in frame.format.components)
    # Untagged video follows its size: BT.709 from 720 lines on, BT.601 below (ffmpeg's own default).
    untagged = frame.colorspace == _UNSPECIFIED_MATRIX and not frame.format.is_rgb
    converted = frame.reformat(
        format="rgba" if alpha else "rgb24",
        src_colorspace="ITU709" if untagged and frame.height >= 720 else None,
        interpolation="BICUBIC",
        threads=1,
    )
    return np.ascontiguousarray(np.rot90(converted.to_ndarray(), round(frame.rotation / 90)))
