"""Grids of clips to look at: a labelled PNG with a row of frames per clip, and an animated grid."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from motionloom.data.media import write_video
from motionloom.data.media.write import png
from motionloom.durable import write_atomic

Video = NDArray[np.uint8]
_INK, _PAPER, _GIVEN = (32, 33, 36), (255, 255, 255), (0, 158, 90)
_BAR = 5  # pixels, of the mark over frames that are given
_FONT_SIZE, _LINE = 13, 17
_GAP, _MARGIN = 3, 12
_MAX_LINES = 3
_MIN_COLUMN = 240  # room for a few words under a single frame


def contact_sheet(
    videos: Sequence[Video],
    captions: Sequence[str],
    path: str | os.PathLike[str],
    *,
    frames_per_clip: int = 8,
    columns: int = 1,
    cell: int = 96,
    given: Sequence[Sequence[float]] | None = None,
) -> Path:
    """Write a PNG with one labelled strip of frames per clip; returns its path.

    ``videos`` are (F, H, W, 3) uint8 of any sizes and lengths; ``frames_per_clip`` frames of each, spread
    evenly from its first to its last, are shown ``cell`` pixels high. A caption is wrapped to its column and,
    past three lines, shortened with an ellipsis. ``given`` says of each clip what part of each frame was
    handed in and not made: a green bar over as much of its width. Raises `UserError` when the disk is full.
    """
    assert len(videos) == len(captions)
    assert len(videos) > 0
    marks: Sequence[Sequence[float]] = [()] * len(videos) if given is None else given
    strips = [_strip(*both, frames_per_clip, cell) for both in zip(videos, marks, strict=True)]
    width = max(_MIN_COLUMN, *(strip.width for strip in strips))
    labels = [_wrapped(caption, width) for caption in captions]
    rows = [range(first, min(first + columns, len(strips))) for first in range(0, len(strips), columns)]
    heights = [cell + _LINE * max(len(labels[index]) for index in row) + 2 * _GAP + _MARGIN for row in rows]
    columns = min(columns, len(strips))
    sheet = Image.new("RGB", (columns * (width + _MARGIN) + _MARGIN, sum(heights) + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    top = _MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, index in enumerate(row):
            left = _MARGIN + column * (width + _MARGIN)
            sheet.paste(strips[index], (left, top))
            for number, line in enumerate(labels[index]):
                draw.text((left, top + cell + 2 * _GAP + number * _LINE), line, fill=_INK, font=_font())
        top += height
    write_atomic(path, png(np.asarray(sheet)))
    return Path(path)


def animated_sheet(
    videos: Sequence[Video],
    path: str | os.PathLike[str],
    *,
    fps: float = 8.0,
    columns: int | None = None,
    cell: int = 96,
    captions: Sequence[str] | None = None,
) -> Path:
    """Write one moving grid (.webp, .gif, .mp4 or .webm) in which every clip loops; returns its path.

    It lasts as long as the longest clip; shorter ones start again. With ``captions`` each cell is labelled.
    """
    assert len(videos) > 0
    columns = columns or math.ceil(math.sqrt(len(videos)))
    rows = math.ceil(len(videos) / columns)
    scaled = [[_scaled(frame, cell) for frame in video] for video in videos]
    width = max(frames[0].width for frames in scaled)
    labels = [_wrapped(caption, width) for caption in captions] if captions else [[] for _ in videos]
    height = cell + _LINE * max(map(len, labels))
    still = Image.new("RGB", (columns * (width + _GAP) + _GAP, rows * (height + _GAP) + _GAP), _PAPER)
    places = [
        (_GAP + index % columns * (width + _GAP), _GAP + index // columns * (height + _GAP))
        for index in range(len(videos))
    ]
    draw = ImageDraw.Draw(still)
    for (left, top), label in zip(places, labels, strict=True):
        for number, line in enumerate(label):
            draw.text((left, top + cell + number * _LINE), line, fill=_INK, font=_font())
    moving = np.repeat(np.asarray(still)[None], max(map(len, scaled)), axis=0)
    for time, picture in enumerate(moving):
        for (left, top), frames in zip(places, scaled, strict=True):
            frame = np.asarray(frames[time % len(frames)])
            picture[top : top + frame.shape[0], left : left + frame.shape[1]] = frame
    return write_video(path, moving, fps)


@functools.cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    # DejaVu knows most alphabets; where it is not installed, Pillow's own font knows the Latin ones.
    try:
        return ImageFont.truetype("DejaVuSans.ttf", _FONT_SIZE)
    except OSError:
        return ImageFont.load_default(_FONT_SIZE)


def _scaled(frame_HW3: Video, cell: int) -> Image.Image:
    """A frame ``cell`` pixels high. Small ones are enlarged without blur: each pixel can be judged."""
    height, width, _ = frame_HW3.shape
    resample = Image.Resampling.NEAREST if height <= cell else Image.Resampling.BICUBIC
    return Image.fromarray(frame_HW3).resize((max(1, round(width * cell / height)), cell), resample)


def _strip(video_FHW3: Video, given_F: Sequence[float], frames: int, cell: int) -> Image.Image:
    count = min(frames, len(video_FHW3))
    chosen = np.linspace(0, len(video_FHW3) - 1, count).round().astype(int)
    pictures = [_scaled(video_FHW3[index], cell) for index in chosen]
    width = pictures[0].width
    strip = Image.new("RGB", (count * (width + _GAP) - _GAP, cell), _PAPER)
    for index, picture in enumerate(pictures):
        left = index * (width + _GAP)
        strip.paste(picture, (left, 0))
        if len(given_F) and (bar := round(width * given_F[chosen[index]])):
            ImageDraw.Draw(strip).rectangle((left, 0, left + bar - 1, _BAR - 1), fill=_GIVEN)
    return strip


def _wrapped(text: str, width: int) -> list[str]:
    """A caption in lines of at most ``width`` pixels; what does not fit into three ends in an ellipsis."""
    lines: list[str] = []
    rest = text.split()
    while rest and len(lines) < _MAX_LINES:
        taken = 1
        while taken < len(rest) and _font().getlength(" ".join(rest[: taken + 1])) <= width:
            taken += 1
        last = len(lines) == _MAX_LINES - 1
        lines.append(_elided(" ".join(rest if last else rest[:taken]), width))
        rest = rest[taken:]
    return lines


def _elided(line: str, width: int) -> str:
    if _font().getlength(line) <= width:
        return line
    while line and _font().getlength(line + "…") > width:
        line = line[:-1]
    return line.rstrip() + "…"
