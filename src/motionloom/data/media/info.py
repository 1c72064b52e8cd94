"""What is known about a clip before its pixels, what can be wrong with it, and how much is too much."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from motionloom.errors import UserError

Kind = Literal["video", "animation", "image", "frames"]

VIDEO_SUFFIXES = frozenset(
    (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv")
)
IMAGE_SUFFIXES = frozenset(
    (".png", ".apng", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm")
)
DEFAULT_FPS = 16.0  # of a frame folder that says nothing, and of a still held as a clip
FRAME_FOLDER_NOTE = "frames.json"  # the one thing a folder of pictures cannot say by itself: {"fps": 8.0}

# A few bytes of header can claim a picture that fills the memory. 8K video is 33 million pixels.
MAX_FRAME_PIXELS = 2**26
# What one call may return: 3 GiB of RGB.
MAX_CLIP_PIXELS = 2**30


class MediaError(UserError):
    """Something that cannot be used: where, what is wrong, what to do, and the kind it is counted under."""

    def __init__(self, where: str | os.PathLike[str], what: str, fix: str, kind: str) -> None:
        super().__init__(f"{os.fspath(where)}: {what}; {fix}")
        self.where, self.what, self.fix, self.kind = os.fspath(where), what, fix, kind


@dataclass(frozen=True)
class MediaInfo:
    """What a clip is.

    ``width`` and ``height`` are stored pixels after rotation; ``pixel_aspect`` is how wide a pixel is shown
    for a height of one. ``fps`` is frames over duration (0 for a still), ``duration`` is in seconds (0 for a
    still) and ``frames_exact`` says whether ``frames`` was counted or comes from a header that may round.
    """

    kind: Kind
    width: int
    height: int
    frames: int
    frames_exact: bool
    fps: float
    duration: float
    has_sound: bool
    has_alpha: bool
    pixel_aspect: float = 1.0


@dataclass(frozen=True)
class Shown:
    """One picture and when it is on screen: from ``time`` until ``until``, in seconds from the clip's start.

    ``pixels`` does the costly conversion to (H, W, 3) or (H, W, 4) uint8 sRGB, only for the frames that are
    kept; call it before the next frame is asked for.
    """

    time: float
    until: float
    pixels: Callable[[], NDArray[np.uint8]]
    pixel_aspect: float = 1.0


def check_frame_size(where: str | os.PathLike[str], width: int, height: int) -> None:
    """Refuse pictures of no size or of a size that only an attack or a broken header would claim."""
    if width < 1 or height < 1:
        raise MediaError(where, f"states a size of {width}x{height}", "re-encode it or delete it", "bad size")
    if width * height > MAX_FRAME_PIXELS:
        raise MediaError(
            where,
            f"states {width}x{height} pixels a frame, over the limit of {MAX_FRAME_PIXELS:,}",
            "scale it down or delete it",
            "too large",
        )
