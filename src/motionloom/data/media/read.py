"""Clips in: a video file, animated image, still or frame folder at the rate, length and size asked for."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from motionloom.data.media.info import (
    DEFAULT_FPS,
    IMAGE_SUFFIXES,
    MAX_CLIP_PIXELS,
    VIDEO_SUFFIXES,
    Kind,
    MediaError,
    MediaInfo,
    Shown,
)
from motionloom.data.media.pictures import folder_frames, folder_info, picture_frames, picture_info
from motionloom.data.media.pixels import CENTER, Color, Offset, flatten, resize_cover_crop
from motionloom.data.media.video import video_frames, video_info

Short = Literal["refuse", "hold", "loop", "trim"]
WHITE: Color = (255, 255, 255)
# Files round times (webm to 1 ms, gif to 10 ms), so a frame due at 41.7 ms may be stamped 42. It counts as
# there if it comes within this part of a frame's length. An odd number, so that no common pair of rates falls
# on the edge.
_EARLY = 0.15


@dataclass(frozen=True)
class Clip:
    """Pixels (F, H, W, 3) uint8 sRGB, one frame every 1 / fps seconds."""

    video_FHW3: NDArray[np.uint8]
    fps: float


def probe(path: str | os.PathLike[str], *, fps: float | None = None, count: bool = False) -> MediaInfo:
    """What a clip is, from its headers and its first frame (an animated image is decoded whole).

    ``fps`` is the rate of a frame folder, if known from elsewhere. ``count`` makes the number of frames exact
    for videos without an index too, and finds those that break off, by reading all packets. Raises
    `MediaError` naming what is wrong and what to do.
    """
    path = Path(path)
    kind = _kind_by_name(path)
    if kind == "video":
        return video_info(path, count=count)
    return folder_info(path, fps) if kind == "frames" else picture_info(path)


def read_clip(
    path: str | os.PathLike[str],
    *,
    start: float = 0.0,
    duration: float | None = None,
    frames: int | None = None,
    fps: float | None = None,
    size: tuple[int, int] | None = None,
    crop: Literal["center"] | Offset = "center",
    background: Color = WHITE,
    source_fps: float | None = None,
    short: Short = "refuse",
) -> Clip:
    """Read ``frames`` frames, or all there are, within ``duration`` seconds from ``start`` seconds on.

    At ``fps`` (default: the clip's own average rate) frame i is the picture on screen at start + i / fps, so
    sources of uneven rate keep their motion. ``size`` (h, w): scaled to cover and cropped at ``crop`` (see
    `resize_cover_crop`; `random_offset` draws one); None keeps the stored pixels. Alpha lies over
    ``background``. ``source_fps`` is the rate of a frame folder, if known from elsewhere.

    A clip with fewer than ``frames`` is an error with short="refuse"; "hold" repeats its last frame, "loop"
    starts again from the first, "trim" returns what is there. A still is a clip of one frame. Only one full-
    size frame is held at a time. Raises `MediaError` naming what is wrong and what to do.
    """
    path = Path(path)
    assert start >= 0
    assert frames is None or frames > 0
    assert duration is None or duration > 0
    kind = _kind_by_name(path)
    if fps is None:
        fps = probe(path, fps=source_fps).fps or DEFAULT_FPS
    assert fps > 0
    wanted = min(frames or math.inf, math.inf if duration is None else math.ceil(duration * fps - 1e-6))
    offset = CENTER if crop == "center" else crop
    taken: list[NDArray[np.uint8]] = []
    total = 0
    with contextlib.closing(_shown(path, kind, start, source_fps)) as shown:
        for picture, times in _on_screen(shown, start, fps, wanted):
            pixels = flatten(picture.pixels(), background)
            if size is not None:
                pixels = resize_cover_crop(pixels[None], size, offset, pixel_aspect=picture.pixel_aspect)[0]
            total += pixels.shape[0] * pixels.shape[1] * times
            if total > MAX_CLIP_PIXELS:
                what, fix = f"gives over {MAX_CLIP_PIXELS:,} pixels", "ask for fewer frames or a smaller size"
                raise MediaError(path, what, fix, "too large")
            taken.extend([pixels] * times)
    if not taken:
        what = f"has no frame at {start:g} s, its end comes before"
        raise MediaError(path, what, "choose an earlier start", "start after the end")
    if frames is not None and len(taken) < frames and short != "trim":
        taken = _lengthened(path, taken, frames, fps, short)
    return Clip(np.stack(taken), fps)


def _kind_by_name(path: Path) -> Kind:
    """video, image (still or animated) or frames, after the checks that need no decoder."""
    if not path.exists():
        raise MediaError(path, "does not exist", "correct the path or restore the file", "missing file")
    suffix = path.suffix.lower()
    if path.is_dir():
        return "frames"
    if suffix not in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
        what = f"is of no known kind ({suffix or 'no suffix'})"
        raise MediaError(path, what, "convert it to mp4, webm, gif, webp or png", "unknown kind")
    if path.stat().st_size == 0:
        raise MediaError(path, "is empty (0 bytes)", "fetch it again or delete it", "empty file")
    return "video" if suffix in VIDEO_SUFFIXES else "image"


def _shown(path: Path, kind: Kind, start: float, source_fps: float | None) -> Generator[Shown, None, None]:
    if kind == "video":
        yield from video_frames(path, start)
    elif kind == "frames":
        yield from folder_frames(path, source_fps)
    else:
        yield from picture_frames(path)


def _on_screen(
    shown: Iterable[Shown], start: float, fps: float, wanted: float
) -> Iterator[tuple[Shown, int]]:
    """Each picture that is on screen at one of the moments start + i / fps, and at how many of them.

    A still is on screen for ever and counts once.
    """
    taken = 0
    for picture in shown:
        if picture.until == math.inf:
            yield picture, 1
            return
        early = _EARLY * min(picture.until - picture.time, 1 / fps)
        times = 0
        while taken < wanted and start + taken / fps < picture.until - early:
            times, taken = times + 1, taken + 1
        if times:
            yield picture, times
        if taken >= wanted:
            return


def _lengthened(
    path: Path, taken: list[NDArray[np.uint8]], frames: int, fps: float, short: Short
) -> list[NDArray[np.uint8]]:
    if short == "refuse":
        what = f"is too short: {len(taken)} of {frames} frames at {fps:g} a second"
        raise MediaError(path, what, "ask for fewer frames, hold or loop it, or leave it out", "too short")
    missing = frames - len(taken)
    more = [taken[-1]] * missing if short == "hold" else [taken[i % len(taken)] for i in range(missing)]
    return taken + more
