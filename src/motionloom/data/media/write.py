"""Clips out: mp4, webm, animated webp, gif, a PNG sheet of frames, or a folder of PNG frames.

Everything is encoded in memory and reaches the disk through one door, `write_atomic`, so a full disk or a
kill never leaves half a file under the final name.
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from motionloom.data.media.info import FRAME_FOLDER_NOTE
from motionloom.data.media.mux import add_sound_stream, mux_sound
from motionloom.durable import flush, one_line_on_failure, write_atomic
from motionloom.errors import UserError

if TYPE_CHECKING:
    import av


@dataclass(frozen=True)
class _Encoder:
    """How one suffix is encoded. ``quality`` is linear from worst (at 0) to best (at 100)."""

    container: str
    codec: str
    pixel_format: str
    quality_key: str
    worst: float
    best: float
    sound_codec: str | None = None
    options: dict[str, str] = field(default_factory=dict)
    container_options: dict[str, str] = field(default_factory=dict)


_ENCODERS = {
    # Without mbtree, whose AVX-512 form gives other bytes from one call to the next.
    ".mp4": _Encoder("mp4", "libx264", "yuv420p", "crf", 40, 12, "aac", {"preset": "medium", "mbtree": "0"}),
    ".webm": _Encoder(
        "webm", "libvpx-vp9", "yuv420p", "crf", 55, 15, "libopus", {"deadline": "good", "cpu-used": "4"}
    ),
    # The plain encoder, not libwebp_anim: that one merges equal frames, and a still clip would lose its
    # length.
    ".webp": _Encoder("webp", "libwebp", "bgra", "quality", 30, 100, container_options={"loop": "0"}),
    ".gif": _Encoder("gif", "gif", "pal8", "", 0, 0, container_options={"loop": "0"}),
}
SUFFIXES = (*_ENCODERS, ".png")


def write_video(
    path: str | os.PathLike[str],
    frames_FHW3: NDArray[np.uint8],
    fps: float | Fraction,
    *,
    sound: NDArray[np.float32] | None = None,
    sample_rate: int | None = None,
    quality: int = 80,
) -> Path:
    """Write a clip in the format that the suffix of ``path`` names; no suffix means a folder of PNG frames.

    ``frames_FHW3`` is (F, H, W, 3) uint8 sRGB. ``sound`` is (channels, samples) float32 in [-1, 1] at
    ``sample_rate`` Hz; mp4 and webm hold it. ``quality`` goes from 0 to 100 (best; lossless for .webp).

    * ``.mp4``: H.264, yuv420p, which every player and browser shows. It needs even sides: an odd height or
      width is padded by repeating the last row or column, so a 33 x 35 clip comes back as 34 x 36.
    * ``.webm``: VP9. ``.webp``: one full picture per frame. ``.gif``: 256 colours, times rounded to 1/100 s.
    * ``.png``: the frames side by side, eight to a row. Folder: ``00000.png``, ... and the rate in
      ``frames.json``.

    Returns the path. Raises `UserError` for an unknown suffix, sound where none fits, or a disk that is full.
    """
    path = Path(path)
    frames = np.ascontiguousarray(frames_FHW3)
    assert frames.ndim == 4, "frames are (F, H, W, 3)"
    assert frames.shape[3] == 3
    assert frames.dtype == np.uint8
    assert len(frames) > 0
    assert fps > 0
    assert 0 <= quality <= 100
    assert (sound is None) == (sample_rate is None), "sound and sample_rate come together"
    suffix = path.suffix.lower()
    if suffix and suffix not in SUFFIXES:
        raise UserError(
            f"{path}: cannot write {suffix}; name it {', '.join(SUFFIXES)}, or a folder for PNG frames"
        )
    if suffix == ".gif" and fps > 50:
        raise UserError(f"{path}: a GIF shows at most 50 frames a second, not {float(fps):g}; name it .webp")
    if sound is not None and (suffix not in _ENCODERS or _ENCODERS[suffix].sound_codec is None):
        raise UserError(f"{path}: {suffix or 'a frame folder'} holds no sound; name the file .mp4 or .webm")
    if not suffix:
        _write_folder(path, frames, float(fps))
    elif suffix == ".png":
        write_atomic(path, png(_sheet(frames)))
    else:
        write_atomic(path, _encode(_ENCODERS[suffix], frames, Fraction(fps), sound, sample_rate, quality))
    return path


def _encode(
    encoder: _Encoder,
    frames: NDArray[np.uint8],
    fps: Fraction,
    sound: NDArray[np.float32] | None,
    sample_rate: int | None,
    quality: int,
) -> bytes:
    import av

    if encoder.codec == "libx264":
        frames = np.pad(
            frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge"
        )
    buffer = io.BytesIO()
    # mp4 and webm would otherwise stamp the library's version and (mp4) the time; equal clips give equal
    # bytes.
    options = {"fflags": "+bitexact", **encoder.container_options}
    with av.open(buffer, "w", format=encoder.container, container_options=options) as container:
        stream = cast("av.VideoStream", container.add_stream(encoder.codec, fps.limit_denominator(1001 * 64)))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = encoder.pixel_format
        stream.codec_context.options = {**encoder.options, **_quality_options(encoder, quality)}
        if encoder.pixel_format.startswith("yuv"):
            tag_bt709(stream.codec_context)
        stream.codec_context.thread_count = 1  # the bytes depend on the number of threads otherwise
        track = None
        if sound is not None and sample_rate is not None and encoder.sound_codec is not None:
            track = add_sound_stream(container, encoder.sound_codec, sound, sample_rate)
        for index, frame in enumerate(_video_frames(encoder, frames)):
            frame.pts, frame.time_base = index, 1 / stream.codec_context.framerate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if track is not None and sound is not None and sample_rate is not None:
            mux_sound(container, track, sound, sample_rate)
    return buffer.getvalue()


def _quality_options(encoder: _Encoder, quality: int) -> dict[str, str]:
    if encoder.codec == "libwebp" and quality == 100:
        return {"lossless": "1"}
    if not encoder.quality_key:
        return {}
    value = encoder.worst + (encoder.best - encoder.worst) * quality / 100
    # libvpx reads crf as constant quality only when the bit rate is said to be unlimited.
    unlimited = {"b": "0"} if encoder.codec == "libvpx-vp9" else {}
    return {encoder.quality_key: str(round(value)), **unlimited}


def tag_bt709(context: av.VideoCodecContext) -> None:
    """Say which matrix made the yuv; untagged, players guess it from the size and small clips change hue."""
    context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709 in all three tables
    context.color_range = 1  # studio range, 16..235


def _video_frames(encoder: _Encoder, frames: NDArray[np.uint8]) -> Iterator[av.VideoFrame]:
    """The frames in the encoder's pixel format; yuv is BT.709, said so in the file."""
    import av

    if encoder.codec == "gif":
        yield from _paletted(frames)
        return
    yuv = encoder.pixel_format.startswith("yuv")
    for pixels in frames:
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        yield frame.reformat(
            format=encoder.pixel_format,
            dst_colorspace="ITU709" if yuv else None,
            interpolation="BICUBIC",
            threads=1,
        )


def _paletted(frames: NDArray[np.uint8]) -> Iterator[av.VideoFrame]:
    """One palette for the whole clip and ordered dithering, so that still parts do not shimmer."""
    import av

    graph = av.filter.Graph()
    height, width = frames.shape[1:3]
    source = graph.add_buffer(
        width=width, height=height, format=av.VideoFormat("rgb24"), time_base=Fraction(1, 1000)
    )
    split, palette = graph.add("split"), graph.add("palettegen", "stats_mode=full:reserve_transparent=0")
    use, sink = graph.add("paletteuse", "dither=bayer:bayer_scale=4"), graph.add("buffersink")
    source.link_to(split)
    split.link_to(use, 0, 0)
    split.link_to(palette, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    for index, pixels in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame.pts, frame.time_base = index, Fraction(1, 1000)
        source.push(frame)
    source.push(None)
    for _ in frames:
        yield cast("av.VideoFrame", sink.pull())


def _sheet(frames: NDArray[np.uint8], columns: int = 8) -> NDArray[np.uint8]:
    """Frames (F, H, W, 3) side by side on white, ``columns`` to a row, without gaps."""
    count, height, width, _ = frames.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for index, frame in enumerate(frames):
        y, x = index // columns * height, index % columns * width
        sheet[y : y + height, x : x + width] = frame
    return sheet


def png(pixels_HW3: NDArray[np.uint8]) -> bytes:
    """The bytes of a PNG of (H, W, 3) uint8 pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HW3).save(buffer, "PNG")
    return buffer.getvalue()


def _write_folder(folder: Path, frames: NDArray[np.uint8], fps: float) -> None:
    """A folder of PNG frames, whole or not at all; replaces an earlier folder only if it held just frames."""
    with one_line_on_failure(folder):
        if folder.exists() and not _is_frame_folder(folder):
            raise UserError(f"{folder}: exists and holds more than frames; choose another name for the clip")
        temporary = folder.with_name(f".{folder.name[:100]}.{os.getpid()}.tmp")
        try:
            temporary.mkdir(parents=True)
            for index, frame in enumerate(frames):
                write_atomic(temporary / f"{index:05d}.png", png(frame))
            write_atomic(temporary / FRAME_FOLDER_NOTE, json.dumps({"fps": fps}).encode())
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        flush(folder.parent)


def _is_frame_folder(folder: Path) -> bool:
    return folder.is_dir() and all(
        entry.name == FRAME_FOLDER_NOTE or (entry.suffix == ".png" and entry.stem.isdigit())
        for entry in folder.iterdir()
    )
