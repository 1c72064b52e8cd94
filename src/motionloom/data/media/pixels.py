"""Pure maths on pixels: flatten alpha over a background, scale to cover a size and crop. No files here.

F frames, H and W the source's height and width; (h, w) is the size asked for.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from motionloom.rng import Key, numpy_rng

Color = tuple[int, int, int]
Offset = tuple[float, float]
CENTER: Offset = (0.5, 0.5)


def flatten(pixels: NDArray[np.uint8], background: Color) -> NDArray[np.uint8]:
    """(H, W, 3) or straight-alpha (H, W, 4) -> (H, W, 3), alpha laid over ``background`` (sRGB values)."""
    if pixels.shape[2] == 3:
        return pixels
    if pixels[..., 3].min() == 255:
        return np.ascontiguousarray(pixels[..., :3])
    color, alpha = pixels[..., :3].astype(np.uint16), pixels[..., 3:].astype(np.uint16)
    mixed = color * alpha + np.asarray(background, np.uint16) * (255 - alpha)
    return ((mixed + 127) // 255).astype(np.uint8)


def random_offset(*key: Key) -> Offset:
    """A crop offset (down, right) in [0, 1), drawn from this key: equal keys give equal crops."""
    down, right = numpy_rng("crop", *key).random(2)
    return float(down), float(right)


def resize_cover_crop(
    frames_FHW3: NDArray[np.uint8],
    size: tuple[int, int],
    offset: Offset = CENTER,
    *,
    pixel_aspect: float = 1.0,
) -> NDArray[np.uint8]:
    """Scale frames until they cover ``size`` (h, w), keeping the shapes in them, and crop the overhang.

    ``offset`` (down, right) in [0, 1] says where in the overhang the crop sits: (0, 0) keeps the top left,
    (0.5, 0.5) the centre. Scale and crop are one bicubic resampling with antialiasing, so the crop is exact
    to a fraction of a pixel and the same everywhere. Returns (F, h, w, 3) uint8.
    """
    count, height, width, _ = frames_FHW3.shape
    box = _cover_box(height, width, size, offset, pixel_aspect)
    if (height, width) == size and box == (0.0, 0.0, width, height):
        return frames_FHW3
    resized = np.empty((count, *size, 3), np.uint8)
    for index, frame in enumerate(frames_FHW3):
        picture = Image.fromarray(frame).resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)
        resized[index] = np.asarray(picture)
    return resized


def _cover_box(
    height: int, width: int, size: tuple[int, int], offset: Offset, pixel_aspect: float
) -> tuple[float, float, float, float]:
    """The part (left, top, right, bottom) of the source, in source pixels, that fills ``size`` exactly."""
    assert all(0 <= part <= 1 for part in offset), "a crop offset is (down, right), each in [0, 1]"
    scale = max(size[0] / height, size[1] / (width * pixel_aspect))
    box_height = min(size[0] / scale, height)
    box_width = min(size[1] / scale / pixel_aspect, width)
    top, left = offset[0] * (height - box_height), offset[1] * (width - box_width)
    return left, top, min(left + box_width, width), min(top + box_height, height)
