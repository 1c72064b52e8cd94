"""From a clip's spec to pixels, masks, boxes and sound.

F frames, N objects, H height, W width, 3 sRGB channels. Edges are anti-aliased: a pixel's coverage is read
off the signed distance to the outline, measured in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from motionloom.data.shapeworld.sound import SAMPLE_RATE, synthesize
from motionloom.data.shapeworld.spec import COLORS, ClipSpec, ObjectSpec, frame_times, trajectory
from motionloom.data.shapeworld.story import StorySpec

# Top and bottom colour of each background; low in saturation, so that hue belongs to the objects.
BACKDROPS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "dark": ((24, 26, 36), (24, 26, 36)),
    "light": ((232, 234, 238), (232, 234, 238)),
    "gradient": ((46, 52, 74), (150, 156, 176)),
}


@dataclass(frozen=True)
class Rendered:
    """A clip and its ground truth.

    Masks are visible coverage in [0, 1]. A box is (x0, y0, x1, y1) in pixels, end exclusive, and all zero
    where the object is hidden. Sound is (1, samples). ``cuts``: first frames of all scenes but the first.
    """

    video_FHW3: np.ndarray
    masks_FNHW: np.ndarray
    boxes_FN4: np.ndarray
    sound: np.ndarray
    sample_rate: int
    cuts: tuple[int, ...]


def coverage(
    shape: str,
    x_F: np.ndarray,
    y_F: np.ndarray,
    radius_F: np.ndarray,
    angle_F: np.ndarray,
    height: int,
    width: int,
) -> np.ndarray:
    """Soft mask (F, H, W) in [0, 1] of a shape whose centre and radius are in pixels, angle in turns."""
    column = [np.asarray(v, np.float32)[:, None, None] for v in (x_F, y_F, radius_F, angle_F)]
    x, y, radius, angle = column
    px = (np.arange(width, dtype=np.float32) + 0.5)[None, None, :] - x
    py = (np.arange(height, dtype=np.float32) + 0.5)[None, :, None] - y
    if np.any(angle_F):
        cos, sin = np.cos(2 * math.pi * angle), np.sin(2 * math.pi * angle)
        px, py = px * cos + py * sin, py * cos - px * sin
    distance = DISTANCES[shape](np.abs(px / radius), py / radius) * radius
    return np.clip(0.5 - distance, 0.0, 1.0)


def object_masks(obj: ObjectSpec, spec: ClipSpec) -> np.ndarray:
    """Coverage (F, H, W) of one object of a clip, as if alone."""
    scale = min(spec.height, spec.width)
    x, y, radius, angle = trajectory(obj, frame_times(spec.frames))
    return coverage(obj.shape, x * scale, y * scale, radius * scale, angle, spec.height, spec.width)


@lru_cache(maxsize=64)
def backdrop(name: str, height: int, width: int) -> np.ndarray:
    """Background (H, W, 3) float32 in 0..255; read-only, as it is shared."""
    top, bottom = (np.asarray(color, np.float32) for color in BACKDROPS[name])
    ramp = ((np.arange(height, dtype=np.float32) + 0.5) / height)[:, None, None]
    image = np.broadcast_to(top + (bottom - top) * ramp, (height, width, 3)).copy()
    image.flags.writeable = False
    return image


def render(spec: ClipSpec | StorySpec, sample_rate: int = SAMPLE_RATE) -> Rendered:
    """A clip or a story with its masks, boxes, sound and cuts."""
    scenes, cuts = (spec.scenes, spec.cuts) if isinstance(spec, StorySpec) else ((spec,), ())
    parts = []
    for scene in scenes:
        whole = [object_masks(obj, scene) for obj in scene.objects]
        seen = list(whole)
        for i in range(len(seen)):
            for front in whole[i + 1 :]:
                seen[i] = seen[i] * (1 - front)
        parts.append((_composite(scene, whole), np.stack(seen, axis=1)))
    video, masks = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Rendered(video, masks, _boxes(masks), synthesize(scenes, sample_rate), sample_rate, cuts)


def render_video(spec: ClipSpec | StorySpec) -> np.ndarray:
    """Pixels alone: (F, H, W, 3) uint8. Later objects lie in front."""
    if isinstance(spec, StorySpec):
        return np.concatenate([render_video(scene) for scene in spec.scenes])
    return _composite(spec, [object_masks(obj, spec) for obj in spec.objects])


def _composite(spec: ClipSpec, masks: list[np.ndarray]) -> np.ndarray:
    video: np.ndarray = backdrop(spec.background, spec.height, spec.width)[None]
    for obj, mask in zip(spec.objects, masks, strict=True):
        video = video + mask[..., None] * (np.asarray(COLORS[obj.color], np.float32) - video)
    return (video + np.float32(0.5)).astype(np.uint8)


def _boxes(masks_FNHW: np.ndarray) -> np.ndarray:
    """Boxes (F, N, 4) float32 about the pixels that are at least half covered."""
    covered = masks_FNHW >= 0.5
    sides: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, axis in (("x", 2), ("y", 3)):
        line: np.ndarray = np.any(covered, axis=axis)
        seen: np.ndarray = np.any(line, axis=-1)
        first, last = line.argmax(axis=-1), line.shape[-1] - line[..., ::-1].argmax(axis=-1)
        sides[name] = first * seen, last * seen
    (x0, x1), (y0, y1) = sides["x"], sides["y"]
    return np.stack([x0, y0, x1, y1], axis=-1).astype(np.float32)


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(x * x + y * y) - np.float32(0.9)


def _box(x: np.ndarray, y: np.ndarray, half_x: float, half_y: float) -> np.ndarray:
    dx, dy = x - np.float32(half_x), np.abs(y) - np.float32(half_y)
    outside = np.sqrt(np.maximum(dx, 0) ** 2 + np.maximum(dy, 0) ** 2)
    return outside + np.minimum(np.maximum(dx, dy), 0)


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _box(x, y, 0.78, 0.78)


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.minimum(_box(x, y, 1.02, 0.34), _box(x, y, 0.34, 1.02))


def _segments(x: np.ndarray, y: np.ndarray, corners: list[tuple[float, float]]) -> np.ndarray:
    """Distance to the polygon whose right half (x >= 0, clockwise from the top) has these corners.

    The left half is the mirror image, so the distance of (|x|, y) to the right half is exact.
    """
    nearest: np.ndarray | None = None
    inside: np.ndarray | None = None
    for (ax, ay), (bx, by) in pairwise(corners):
        ex, ey = np.float32(bx - ax), np.float32(by - ay)
        wx, wy = x - np.float32(ax), y - np.float32(ay)
        t = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
        distance = (wx - ex * t) ** 2 + (wy - ey * t) ** 2
        nearest = distance if nearest is None else np.minimum(nearest, distance)
        # Even-odd rule with a ray to the right: does it cross this edge?
        crosses = ((wy >= 0) != (y >= np.float32(by))) & ((wx * ey < ex * wy) == (ey > 0))
        inside = crosses if inside is None else inside ^ crosses
    assert nearest is not None
    assert inside is not None
    root = np.sqrt(nearest)
    return np.where(inside, -root, root)


def _polar(radius: float, turns: float) -> tuple[float, float]:
    """Point at a distance, clockwise from straight up (y points down)."""
    return radius * math.sin(2 * math.pi * turns), -radius * math.cos(2 * math.pi * turns)


TRIANGLE = [_polar(1.12, turns) for turns in (0, 1 / 3, 1 / 2)]
TRIANGLE[2] = (0.0, TRIANGLE[1][1])
STAR = [_polar(1.12 if i % 2 == 0 else 0.5, i / 10) for i in range(6)]
HEART_RISE = 0.6565
DIAMOND = [(0.0, -1.12), (0.7, 0.0), (0.0, 1.12)]


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _segments(x, y, TRIANGLE)


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _segments(x, y, STAR)


def _diamond(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _segments(x, y, DIAMOND)


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Two quarter discs on a square that stands on its corner."""
    # In units of the square's diagonal: tip at 0, lobes above. The shift puts the centroid on the centre, so
    # that a spinning heart stays in its place.
    unit = np.float32(1.62)
    x, up = x / unit, np.float32(HEART_RISE) - y / unit
    arc = np.sqrt((x - np.float32(0.25)) ** 2 + (up - np.float32(0.75)) ** 2) - np.float32(math.sqrt(2) / 4)
    diagonal = np.maximum(x + up, 0) / 2
    body = np.sqrt(np.minimum(x * x + (up - 1) ** 2, (x - diagonal) ** 2 + (up - diagonal) ** 2))
    return np.where(x + up > 1, arc, body * np.sign(x - up)) * unit


DISTANCES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "diamond": _diamond,
    "heart": _heart,
}
