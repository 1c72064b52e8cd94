"""Pictures of viewers: frames on their way out, and what they hand in.

H x W pixels of the film.
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from motionloom.data.media.info import MediaError
from motionloom.data.media.pictures import picture_frames
from motionloom.data.media.pixels import flatten, resize_cover_crop
from motionloom.studio.stream.messages import Refused

MOST_BYTES = 20_000_000
MOST_SIDE = 8192
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_WHITE = (255, 255, 255)
_LOSSLESS = 2**15
"""Pixels up to which a frame is sent without loss: toy sizes, which a page shows much enlarged."""
_JPEG_QUALITY = 92


def frame_bytes(pixels_HW3: NDArray[np.uint8]) -> bytes:
    """A frame as every browser decodes it: PNG while that is small, else JPEG with full colour."""
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels_HW3)
    if pixels_HW3.shape[0] * pixels_HW3.shape[1] <= _LOSSLESS:
        picture.save(buffer, "PNG", compress_level=1)
    else:
        picture.save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def given_picture(data: bytes, height: int, width: int) -> Tensor:
    """A picture that a viewer sent as (H, W, 3) uint8: upright, sRGB, scaled to cover the film and cropped.

    Raises:
        Refused: no picture of a known format, too many bytes or pixels, damaged.
    """
    if len(data) > MOST_BYTES:
        raise Refused(f"the image has more than {MOST_BYTES // 10**6} MB: scale it down")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
            wide, high = picture.size
    except Image.DecompressionBombError:
        raise Refused(f"the image states more pixels than {MOST_SIDE} a side: scale it down") from None
    except (UnidentifiedImageError, OSError, SyntaxError, EOFError, ValueError, IndexError):
        raise Refused(f"this is no image: send {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]}") from None
    if max(wide, high) > MOST_SIDE:
        raise Refused(f"the image has {wide} x {high} pixels, more than {MOST_SIDE} a side: scale it down")
    # The house's reader knows files only. It turns pictures upright and into sRGB, and finds cut ones.
    with tempfile.TemporaryDirectory(prefix="motionloom-image-") as folder:
        path = Path(folder) / "image"
        path.write_bytes(data)
        try:
            pixels = next(iter(picture_frames(path))).pixels()
        except MediaError as error:
            raise Refused(f"the image: {error.what}; {error.fix}") from None
    fitted = resize_cover_crop(flatten(pixels, _WHITE)[None], (height, width))[0]
    return torch.from_numpy(np.array(fitted))
