"""Stills, animated images and frame folders through Pillow, as upright 8-bit sRGB."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from motionloom.data.media.info import (
    DEFAULT_FPS,
    FRAME_FOLDER_NOTE,
    IMAGE_SUFFIXES,
    MediaError,
    MediaInfo,
    Shown,
    check_frame_size,
)

# Pillow warns of sizes that `check_frame_size` refuses right after; one line about it is enough.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_NUMBERED = re.compile(r"^(.*?)(\d+)$")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open a picture; a bomb, a foreign format or damage inside becomes one line that names the file."""
    try:
        with Image.open(path) as image:
            check_frame_size(path, *image.size)
            yield image
    except Image.DecompressionBombError as error:
        what = "states more pixels than any real picture holds"
        raise MediaError(path, what, "scale it down or delete it", "too large") from error
    except UnidentifiedImageError as error:
        raise MediaError(path, "is not a picture", "replace it or delete it", "not a picture") from error
    # Pillow reports damage as OSError, SyntaxError (png), EOFError, ValueError or IndexError, by plugin.
    except (OSError, SyntaxError, EOFError, ValueError, IndexError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "truncated" in reason or _is_cut_webp(path):
            raise MediaError(path, "truncated", "save it again or delete it", "truncated") from error
        what = f"cannot be decoded ({reason})"
        raise MediaError(path, what, "save it again or delete it", "damaged") from error


def _is_cut_webp(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(8)
    return head[:4] == b"RIFF" and int.from_bytes(head[4:], "little") + 8 > path.stat().st_size


def picture_info(path: Path) -> MediaInfo:
    """What a still or an animated image holds; decodes all frames, as only they tell how long they stay."""
    times = _times(path, path.stat().st_mtime_ns)
    with _opened(path) as image:
        image.load()
        alpha = _has_alpha(image)
        width, height = _upright(image).size
    if not times:
        return MediaInfo("image", width, height, 1, True, 0.0, 0.0, False, alpha)
    frames, total = sum(_equal_steps(times) or [1] * len(times)), sum(times)
    return MediaInfo(
        "animation", width, height, frames, True, 1000 * frames / total, total / 1000, False, alpha
    )


def picture_frames(path: Path) -> Iterator[Shown]:
    """The frames of an animated image, or the one frame of a still, which is shown for ever."""
    times = _times(path, path.stat().st_mtime_ns)
    # Where the steps are equal but for rounding, frames stand where they stood before they were rounded.
    lengths = _equal_steps(times) or times
    with _opened(path) as image:
        if not times:
            image.load()
            yield Shown(0.0, math.inf, functools.partial(_pixels, path, image))
            return
        second = 1000 * sum(lengths) / sum(times)
        time = 0
        for index in _each_frame(image):
            after = time + lengths[index]
            yield Shown(time / second, after / second, functools.partial(_pixels, path, image))
            time = after


@functools.lru_cache(maxsize=4096)
def _times(path: Path, changed_ns: int) -> tuple[int, ...]:
    """How many ms each frame of an animated image is shown; none for a still. ``changed_ns`` keys a cache."""
    with _opened(path) as image:
        _check_whole(path, image)
        return tuple(_milliseconds(image) for _ in _each_frame(image)) if _is_animated(image) else ()


def _is_animated(image: Image.Image) -> bool:
    # Other formats hold several pictures too, but those are pages (tiff) or views (stereo jpeg), not moments.
    return image.format in ("GIF", "WEBP", "PNG", "AVIF") and getattr(image, "n_frames", 1) > 1


def _each_frame(image: Image.Image) -> Iterator[int]:
    """Bring up the frames of an animated image one after the other, by number."""
    for index in range(getattr(image, "n_frames", 1)):
        image.seek(index)
        image.load()
        yield index


def folder_frames_of(folder: Path) -> list[Path]:
    """The pictures of a frame folder in the order of their numbers: 2.png before 10.png."""
    pictures = [entry for entry in folder.iterdir() if entry.suffix.lower() in IMAGE_SUFFIXES]
    return sorted(
        pictures, key=lambda entry: [int(part) if part.isdigit() else part for part in _split(entry)]
    )


def is_numbered(names: Sequence[str]) -> bool:
    """Whether file names (without suffix) count frames: one common start, then numbers with few gaps.

    The numbers of a folder of photographs (IMG_2031, IMG_2040, IMG_2102) leave most of their range out.
    """
    found = [_NUMBERED.match(name) for name in names]
    if len(names) < 2 or any(match is None for match in found):
        return False
    starts = {match.group(1) for match in found if match}
    numbers = sorted(int(match.group(2)) for match in found if match)
    steps = [after - before for before, after in itertools.pairwise(numbers)]
    return len(starts) == 1 and min(steps) > 0 and 2 * len(numbers) > (numbers[-1] - numbers[0]) // min(steps)


def folder_info(folder: Path, fps: float | None) -> MediaInfo:
    """What a frame folder holds; reads every picture's header. ``fps`` overrides the folder's own note.

    Raises `MediaError` if it is empty or its pictures differ in size.
    """
    paths = _frames_or_error(folder)
    sizes = {}
    alpha = False
    for path in paths:
        with _opened(path) as image:
            sizes[path] = _upright(image).size
            alpha = alpha or _has_alpha(image)
    width, height = sizes[paths[0]]
    for path, size in sizes.items():
        if size != (width, height):
            what = f"frame {path.name} is {size[0]}x{size[1]}, the first is {width}x{height}"
            raise MediaError(folder, what, "give all frames one size", "mixed sizes")
    rate = fps or folder_fps(folder)
    return MediaInfo("frames", width, height, len(paths), True, rate, len(paths) / rate, False, alpha)


def folder_frames(folder: Path, fps: float | None) -> Iterator[Shown]:
    """The frames of a folder at ``fps``, or else at the folder's own rate."""
    rate = fps or folder_fps(folder)
    size: tuple[int, ...] | None = None
    for index, path in enumerate(_frames_or_error(folder)):
        with _opened(path) as image:
            pixels = _pixels(path, image)
        if size is not None and pixels.shape[:2] != size:
            what = (
                f"frame {path.name} is {pixels.shape[1]}x{pixels.shape[0]}, the first is {size[1]}x{size[0]}"
            )
            raise MediaError(folder, what, "give all frames one size", "mixed sizes")
        size = pixels.shape[:2]
        yield Shown(index / rate, (index + 1) / rate, functools.partial(np.asarray, pixels))


def folder_fps(folder: Path) -> float:
    """The rate in the folder's ``frames.json``, as `write_video` leaves it there, else 16 frames a second."""
    note = folder / FRAME_FOLDER_NOTE
    if not note.is_file():
        return DEFAULT_FPS
    try:
        fps = json.loads(note.read_text(encoding="utf-8"))["fps"]
        valid = not isinstance(fps, bool) and 0 < float(fps) < math.inf
    except (ValueError, KeyError, TypeError):
        valid = False
    if not valid:
        what = f'{FRAME_FOLDER_NOTE} does not read {{"fps": number above 0}}'
        raise MediaError(folder, what, "correct it or delete it", "bad frame rate")
    return float(fps)


def _frames_or_error(folder: Path) -> list[Path]:
    paths = folder_frames_of(folder)
    if not paths:
        raise MediaError(
            folder, "is a folder without pictures in it", "add frames or delete it", "empty folder"
        )
    return paths


def _split(path: Path) -> list[str]:
    return re.split(r"(\d+)", path.stem)


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _milliseconds(image: Image.Image) -> int:
    """How long the current frame is shown. To every browser 0 and 10 ms mean 100 ms, so here too."""
    milliseconds = round(image.info.get("duration", 0) or 0)
    return milliseconds if milliseconds > 10 else 100


def _equal_steps(times: Sequence[int]) -> list[int] | None:
    """How many equal steps each duration in ms lasts, or None when they are truly uneven.

    Encoders merge equal frames into one long one and round times to 1 or 10 ms; both are undone here, so that
    a clip of 16 frames with a pause still counts 16 frames at its own rate.
    """
    if not times:
        return None
    step: float = min(times)
    for slack in (0.49, 0.5):  # at first a 30 is one step beside a 20: both are 25, rounded
        steps = [max(1, int(time / step + slack)) for time in times]
        step = sum(times) / sum(steps)
    even = all(abs(time - count * step) <= 11 for time, count in zip(times, steps, strict=True))
    return steps if even else None


def _check_whole(path: Path, image: Image.Image) -> None:
    """Pillow ends a cut GIF in silence, its last frames just missing: walk its blocks up to the trailer."""
    if image.format != "GIF":
        return
    data = path.read_bytes()
    position = 13 + _color_table(data[10])
    while position < len(data) and data[position] != 0x3B:
        if data[position] == 0x2C and position + 9 < len(data):  # a picture: its place, colours, code size
            position += 11 + _color_table(data[position + 9])
        else:  # an extension: its label
            position += 2
        while position < len(data) and data[position]:
            position += 1 + data[position]
        position += 1
    if position >= len(data):
        raise MediaError(
            path, "truncated: the GIF ends in mid-frame", "save it again or delete it", "truncated"
        )


def _color_table(flags: int) -> int:
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation says."""
    return ImageOps.exif_transpose(image) if image.getexif().get(ExifTags.Base.Orientation, 1) != 1 else image


def _pixels(path: Path, image: Image.Image) -> NDArray[np.uint8]:
    """The current frame as (H, W, 3) or (H, W, 4) uint8 sRGB, upright."""
    upright = _upright(image)
    if upright.mode.startswith("I"):
        # 16-bit grey. Its upper byte is what an 8-bit copy would hold.
        grey = np.asarray(upright, dtype=np.int64)
        eight_bit = (grey >> 8 if grey.max() > 255 or ";16" in upright.mode else grey).clip(0, 255)
        return np.repeat(eight_bit.astype(np.uint8)[..., None], 3, axis=2)
    if upright.mode == "F":
        raise MediaError(
            path, "holds floating-point pixels", "save it with 8 or 16 bits", "unsupported pixels"
        )
    alpha = _has_alpha(upright)
    profile = image.info.get("icc_profile")
    flat = _to_srgb(upright, profile) if profile and not alpha else upright
    return np.asarray(flat.convert("RGBA" if alpha else "RGB"))


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Follow an embedded colour profile (wide-gamut photographs, CMYK for print); ignore a broken one."""
    transform = _profile_transform(profile, "RGB" if image.mode == "P" else image.mode)
    if transform is None:
        return image
    source = image.convert("RGB") if image.mode == "P" else image
    return ImageCms.applyTransform(source, transform) or image


@functools.lru_cache(maxsize=16)
def _profile_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return None
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except ImageCms.PyCMSError:
        return None
