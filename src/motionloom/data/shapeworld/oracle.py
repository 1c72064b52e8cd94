"""The oracle: reads a clip's attributes back from its pixels, so that obedience to a prompt is a number.

Pixels are read as mixtures ``background + alpha * (colour - background)``, which holds for blurred edges too.
Then colour is a vote over pixels, shape is template matching on patches that are normalised for place and
area (blur moves neither), and motion is what the track of centre, radius and angle does over the clip.

F frames, H height, W width, N objects, K templates, P points of a patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np

from motionloom.data.shapeworld.captions import Facts, facts
from motionloom.data.shapeworld.render import BACKDROPS, backdrop, coverage
from motionloom.data.shapeworld.spec import (
    COLORS,
    GROWTH,
    MOTIONS,
    RADIUS,
    SHAPES,
    SIZES,
    SYMMETRY,
    Attributes,
    ClipSpec,
    World,
    frame_times,
    valid,
)

NEAR = 45.0  # a pixel closer than this (RGB distance) to the backdrop belongs to it
LEAST_BACKDROP = 0.5  # share of the pixels that must look like the backdrop for it to count as right
LEAST_CORE = 0.004  # of the frame's shorter side squared: less of a colour than this is no object
LEAST_AREA = 0.003  # in the same unit: an object smaller than this is not seen in that frame
LEAST_TRAVEL = 0.14  # shorter paths count as staying in place
LEAST_GROWTH = 0.4  # relative change of radius over the clip; the world's own is 2 * (GROWTH - 1)
ANGLES = 60  # templates per full turn; divisible by the symmetries 2, 3, 4 and 5
PATCH, REACH = 25, 2.1  # points a side; half side in units of the radius of a disc of equal area
BLURS = (0.08, 0.16, 0.24, 0.34, 0.46)  # in the same unit: from crisp to a strongly compressed small object


@dataclass(frozen=True)
class ObjectReading:
    """One object as seen, and how sure the oracle is of each attribute (0..1, by attribute name)."""

    attributes: Attributes
    confidence: dict[str, float]
    track: Track


@dataclass(frozen=True)
class Reading:
    """What a clip shows: its objects (the one with most colour first; none if nothing stands out)."""

    objects: tuple[ObjectReading, ...]
    background: str
    background_confidence: float


@dataclass(frozen=True)
class Track:
    """Centre and radius (of a disc of equal area) per frame, in units of the frame's shorter side."""

    x_F: np.ndarray
    y_F: np.ndarray
    radius_F: np.ndarray


def oracle(video_FHW3: np.ndarray, world: World | None = None) -> Reading:
    """Read a clip of one scene. ``world`` narrows the candidates (default: everything that exists).

    Args:
        video_FHW3: pixels, uint8 or float in 0..255.
    """
    world = world or World.full()
    video = np.asarray(video_FHW3, np.float32)
    name, sureness, behind_HW3 = _background(video, world)
    difference = video - behind_HW3
    colors, shares, cores = _colors(difference, behind_HW3, world)
    alphas = _unmix(difference, behind_HW3, colors)
    objects = []
    for i, (color, share) in enumerate(zip(colors, shares, strict=True)):
        others = [alpha for j, alpha in enumerate(alphas) if j != i]
        seen = _read_object(alphas[i], cores[i], others, color, share, len(colors), world)
        if seen is not None:
            objects.append(seen)
    return Reading(tuple(objects), name, sureness)


def adherence(reading: Reading, wanted: ClipSpec | Facts) -> dict[str, bool]:
    """Which attributes the clip got right: {color, shape, motion, size, background}.

    With two objects, an attribute is right when it is right for both, under the pairing that agrees most. A
    missing object fails all four; an extra one fails ``color`` (a colour is there that nobody asked for).
    """
    what = wanted if isinstance(wanted, Facts) else facts(wanted)
    names = ("color", "shape", "motion", "size")
    right = dict.fromkeys(names, False)
    for order in permutations(reading.objects, min(len(reading.objects), len(what.objects))):
        if len(order) < len(what.objects):
            break
        agrees = {
            name: all(
                getattr(seen.attributes, name) == getattr(asked, name)
                for seen, asked in zip(order, what.objects, strict=True)
            )
            for name in names
        }
        right = max(right, agrees, key=lambda result: (sum(result.values()), result["color"]))
    if len(reading.objects) > len(what.objects):
        right["color"] = False
    background = reading.background == what.background and reading.background_confidence > LEAST_BACKDROP
    return {**right, "background": background}


def find_cuts(video_FHW3: np.ndarray) -> tuple[int, ...]:
    """First frames of all scenes but the first: where the backdrop changes for two frames or more."""
    video = np.asarray(video_FHW3, np.float32)
    labels = np.argmax([_inliers(video, name).mean(axis=(1, 2)) for name in BACKDROPS], axis=0)
    cuts: list[int] = []
    current = labels[min(1, len(labels) - 1)]
    for frame in range(1, len(labels) - 1):
        # A single odd frame is a smeared cut, not a scene.
        if labels[frame] != current and labels[frame + 1] == labels[frame]:
            cuts.append(frame)
            current = labels[frame]
    return tuple(cuts)


def _inliers(video: np.ndarray, name: str) -> np.ndarray:
    """(F, H, W) pixels that look like this backdrop."""
    difference = video - backdrop(name, *video.shape[1:3])
    return np.einsum("fhwc,fhwc->fhw", difference, difference) < NEAR**2


def _background(video: np.ndarray, world: World) -> tuple[str, float, np.ndarray]:
    """(name, share of frame pixels that agree, backdrop as seen (H, W, 3)); a shift of colour is absorbed."""
    inliers = {name: _inliers(video, name) for name in world.backgrounds}
    shares = {name: float(mask.mean()) for name, mask in inliers.items()}
    name = max(shares, key=lambda key: shares[key])
    ideal = backdrop(name, *video.shape[1:3])
    count = inliers[name].sum()
    if count == 0:
        return name, 0.0, ideal
    shift = ((video - ideal) * inliers[name][..., None]).sum(axis=(0, 1, 2)) / count
    return name, shares[name], ideal + shift.astype(np.float32)


def _colors(
    difference: np.ndarray, behind: np.ndarray, world: World
) -> tuple[list[str], list[float], list[np.ndarray]]:
    """Colours of the objects, most pixels first; each one's lead over colours that are not there; its core.

    A core (F, H, W) holds the pixels that are surely of this colour, all four neighbours agreeing: the rim of
    an object can take on another colour, by coarse chroma in a file or by ringing in a decoder.
    """
    square = np.einsum("fhwc,fhwc->fhw", difference, difference)
    where = np.nonzero(square > NEAR**2)
    pixels, base = difference[where], behind[where[1:]]
    names = list(world.colors)
    alpha, misfit = np.empty((2, len(names), len(pixels)), np.float32)
    for i, name in enumerate(names):
        axis = np.asarray(COLORS[name], np.float32) - base
        alpha[i] = np.clip((pixels * axis).sum(-1) / (axis * axis).sum(-1), 0.0, 1.1)
        misfit[i] = ((pixels - alpha[i][:, None] * axis) ** 2).sum(-1)
    best = misfit.argmin(0)
    labels = np.full(square.shape, -1, np.int8)
    labels[where] = np.where(alpha[best, np.arange(len(best))] > 0.5, best, -1)
    padded = np.pad(labels, ((0, 0), (1, 1), (1, 1)), mode="edge")
    agree = labels >= 0
    for neighbour in (padded[:, :-2, 1:-1], padded[:, 2:, 1:-1], padded[:, 1:-1, :-2], padded[:, 1:-1, 2:]):
        agree &= neighbour == labels
    unit = len(labels) * min(labels.shape[1:]) ** 2
    votes = np.bincount(labels[agree], minlength=len(names)) / unit
    ranked = [int(i) for i in np.argsort(-votes, kind="stable")]
    chosen = [i for i in ranked[: max(world.objects)] if votes[i] > LEAST_CORE]
    rival = max((float(votes[i]) for i in ranked if i not in chosen), default=0.0)
    return (
        [names[i] for i in chosen],
        [1 - rival / (rival + float(votes[i])) for i in chosen],
        [agree & (labels == i) for i in chosen],
    )


def _unmix(difference: np.ndarray, behind: np.ndarray, colors: list[str]) -> list[np.ndarray]:
    """Coverage (F, H, W) of each colour: non-negative least squares of the pixel's difference, per pixel."""
    axes = [np.asarray(COLORS[name], np.float32) - behind for name in colors]
    dots = [np.einsum("fhwc,hwc->fhw", difference, axis) for axis in axes]
    norms = [np.einsum("hwc,hwc->hw", axis, axis) for axis in axes]
    alone = [np.maximum(dot / norm, 0.0) for dot, norm in zip(dots, norms, strict=True)]
    if len(colors) < 2:
        return [_clean(alpha) for alpha in alone]
    cross = np.einsum("hwc,hwc->hw", *axes)
    determinant = np.maximum(norms[0] * norms[1] - cross**2, 1e-3)
    both = [
        (norms[1 - i] * dots[i] - cross * dots[1 - i]) / determinant for i in range(2)
    ]  # unconstrained; where one is negative, the other one explains the pixel alone
    return [
        _clean(np.where(both[1 - i] < 0, alone[i], np.where(both[i] < 0, 0.0, both[i]))) for i in range(2)
    ]


def _clean(alpha: np.ndarray) -> np.ndarray:
    """Drop faint haze (noise and ringing), which would pull the centroid, and clip."""
    return np.where(alpha < 0.12, 0.0, np.minimum(alpha, 1.0)).astype(np.float32)


def _read_object(
    alpha: np.ndarray,
    core: np.ndarray,
    others: list[np.ndarray],
    color: str,
    share: float,
    count: int,
    world: World,
) -> ObjectReading | None:
    track, alpha = _track(alpha, core)
    present = track.radius_F > 0
    if present.sum() < 2:
        return None
    clear = present & ~_touches(track, others, alpha.shape)
    use = clear if clear.sum() >= 3 else present
    slope, middle = np.polyfit(frame_times(len(use))[use] - 0.5, track.radius_F[use], 1)
    middle = max(float(middle), 1e-3)
    shape, spinning, shape_sure, spin_sure = _shape(alpha[use], track, use, middle, count, world)
    size, size_sure = _size(middle / templates().disc[shape], count, world)
    motion, motion_sure = _motion(track, float(slope / middle), spinning, spin_sure)
    confidence = {"color": share, "shape": shape_sure, "size": size_sure, "motion": motion_sure}
    return ObjectReading(Attributes(shape, color, size, motion), confidence, track)


def _track(alpha: np.ndarray, core: np.ndarray) -> tuple[Track, np.ndarray]:
    """Follow one object: centroid and area per frame, after dropping coverage far from its core."""
    height, width = alpha.shape[1:]
    scale = min(height, width)
    row_H, column_W = np.arange(height) + 0.5, np.arange(width) + 0.5
    # Without a core (the object is tiny in this frame) the stronger half of the coverage has to do.
    body = np.where(core.any(axis=(1, 2), keepdims=True), core, np.where(alpha > 0.4, alpha, 0.0))
    for reach in (3.5, 2.2, None):
        area = np.maximum(body.sum((1, 2)), 1e-6)
        x, y = (body.sum(1) @ column_W) / area, (body.sum(2) @ row_H) / area
        radius = np.sqrt(area / np.pi)
        if reach is not None:
            body = np.where(_within(x, y, reach * radius + 1, height, width), alpha, 0.0)
    present = area > LEAST_AREA * scale**2
    return Track(x / scale, y / scale, np.where(present, radius, 0.0) / scale), body


def _within(x_F: np.ndarray, y_F: np.ndarray, reach_F: np.ndarray, height: int, width: int) -> np.ndarray:
    """(F, H, W) pixels that lie no further than ``reach`` from (x, y), all in pixels."""
    dx = np.arange(width) + 0.5 - x_F[:, None]
    dy = np.arange(height) + 0.5 - y_F[:, None]
    return dx[:, None, :] ** 2 + dy[:, :, None] ** 2 < (reach_F**2)[:, None, None]


def _touches(track: Track, others: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """(F,) frames in which another object comes so near that it may hide a part of this one."""
    scale = min(shape[1:])
    near = _within(track.x_F * scale, track.y_F * scale, 1.35 * track.radius_F * scale, *shape[1:])
    touching = np.zeros(shape[0], bool)
    for alpha in others:
        touching |= (alpha * near).sum((1, 2)) > 1.0
    return touching


@dataclass(frozen=True)
class Templates:
    """Every shape at every angle that looks different and every blur, as normalised patches.

    ``patches_BKP``: blur, template, point. ``rows[shape]``: its templates, evenly spaced over its symmetry.
    ``disc[shape]``: radius of the disc of equal area, for nominal radius 1.
    """

    patches_BKP: np.ndarray
    rows: dict[str, slice]
    disc: dict[str, float]


@lru_cache(maxsize=1)
def templates() -> Templates:
    """Built once, from the renderer itself."""
    fine, pixels = 121, 40.0  # canvas side; pixels per nominal radius
    rows: dict[str, slice] = {}
    disc: dict[str, float] = {}
    patches: list[np.ndarray] = []
    for shape in SHAPES:
        count = round(ANGLES * SYMMETRY[shape]) if shape in SYMMETRY else 1
        rows[shape] = slice(len(patches), len(patches) + count)
        angles = np.arange(count) / ANGLES
        middle = np.full(count, fine / 2)
        masks = coverage(shape, middle, middle, np.full(count, pixels), angles, fine, fine)
        disc[shape] = float(np.sqrt(masks[0].sum() / np.pi) / pixels)
        patches += [_blurred(mask, disc[shape] * pixels) for mask in masks]
    return Templates(np.stack(patches, axis=1), rows, disc)


def _blurred(mask: np.ndarray, unit: float) -> np.ndarray:
    """(B, P): the mask under every blur, as a normalised patch."""
    frequency = np.fft.fftfreq(len(mask))
    squared = frequency[:, None] ** 2 + frequency[None, :] ** 2
    spectrum = np.fft.fft2(mask)
    blurred = np.stack(
        [np.fft.ifft2(spectrum * np.exp(-2 * (np.pi * blur * unit) ** 2 * squared)).real for blur in BLURS]
    ).astype(np.float32)
    area = mask.sum()
    middle = np.arange(len(mask), dtype=np.float32) + 0.5
    x, y = (mask.sum(0) @ middle) / area, (mask.sum(1) @ middle) / area
    same = np.ones(len(BLURS), np.float32)
    return _patches(blurred, x * same, y * same, unit * same)


def _patches(image_FHW: np.ndarray, x_F: np.ndarray, y_F: np.ndarray, unit_F: np.ndarray) -> np.ndarray:
    """(F, P): each frame sampled (bilinear) on a square grid about (x, y), REACH units to each side."""
    frames, height, width = image_FHW.shape
    steps = np.linspace(-REACH, REACH, PATCH, dtype=np.float32)
    low: list[np.ndarray] = []
    share: list[np.ndarray] = []
    for center, limit in ((x_F, width), (y_F, height)):
        # Pixel i has its centre at i + 0.5; outside the frame there is nothing of the object to see.
        at = center[:, None] + unit_F[:, None] * steps - 0.5
        at = np.clip(at, -1.0, limit) + 1.0
        floor = np.minimum(np.floor(at), limit).astype(np.intp)
        low.append(floor)
        share.append((at - floor).astype(np.float32))
    padded = np.pad(image_FHW, ((0, 0), (1, 1), (1, 1)))
    frame = np.arange(frames)[:, None, None]
    column, row = low[0][:, None, :], low[1][:, :, None]
    fx, fy = share[0][:, None, :], share[1][:, :, None]
    top = padded[frame, row, column] * (1 - fx) + padded[frame, row, column + 1] * fx
    bottom = padded[frame, row + 1, column] * (1 - fx) + padded[frame, row + 1, column + 1] * fx
    return (top * (1 - fy) + bottom * fy).reshape(frames, -1)


def _shape(
    alpha: np.ndarray, track: Track, use: np.ndarray, radius: float, count: int, world: World
) -> tuple[str, bool, float, float]:
    """(shape, whether it spins, sureness of either) by matching every frame in use."""
    scale = min(alpha.shape[1:])
    x, y, unit = (v[use] * scale for v in (track.x_F, track.y_F, track.radius_F))
    patches = _patches(alpha, x, y, unit)
    known = templates()
    flat = known.patches_BKP.reshape(-1, patches.shape[1])
    energy = (patches**2).sum(1)
    cost = energy[:, None] - 2 * patches @ flat.T + (flat**2).sum(1)
    cost_FBK = cost.reshape(len(patches), *known.patches_BKP.shape[:2])
    # Frames that look like no shape at all (smeared, half hidden) say little about which one it is.
    doubt = cost_FBK.min(axis=(1, 2)) / (energy + 1e-6)
    weight = 1 / (0.02 + doubt)
    cost_FBK = cost_FBK * (weight / weight.mean())[:, None, None]
    s = frame_times(len(use))[use]
    still, spun, odds = {}, {}, {}
    for shape in world.shapes:
        mine = cost_FBK[:, :, known.rows[shape]]
        # Objects stand upright unless they spin; a model may still tilt one, and that is not a spin.
        tilted = mine.sum(0).min(axis=0)
        still[shape] = float(min(tilted[0], 1.1 * tilted.min()))
        spun[shape] = _spin_cost(mine, s) if "spin" in world.motions and valid(shape, "spin") else np.inf
        odds[shape] = _radius_odds(radius / known.disc[shape], count, world)
    best = {shape: min(still[shape], spun[shape]) * odds[shape] + 1e-6 for shape in world.shapes}
    ranked = sorted(best, key=lambda key: best[key])
    shape = ranked[0]
    shape_sure = 1 - best[shape] / best[ranked[1]] if len(ranked) > 1 else 1.0
    # A free angle always fits a little better than none, so a spin has to earn its name.
    spinning = spun[shape] * 1.15 < still[shape]
    low, high = sorted((still[shape], min(spun[shape], 1e6)))
    return shape, spinning, shape_sure, 1 - low / (high + 1e-6)


def _radius_odds(radius: float, count: int, world: World) -> float:
    """How much dearer a shape gets when this area would make it a size that the world does not have.

    Gentle: it decides between blobs that fit about equally well, such as a blurred star and a small disc.
    """
    off = min(abs(float(np.log(radius / RADIUS[count][size]))) for size in world.sizes)
    return 1 + 0.5 * (off / 0.2) ** 2


def _spin_cost(cost_FBK: np.ndarray, s: np.ndarray) -> float:
    """Least total cost of turning at an even speed, over speeds and starting angles."""
    count = cost_FBK.shape[2]
    speeds = np.arange(0.2, 0.95, 0.05)
    turns = np.concatenate([speeds, -speeds]) * ANGLES
    steps = np.rint(turns[:, None] * s).astype(np.intp)  # (turns, F)
    index = (steps[:, None, :] + np.arange(count)[None, :, None]) % count  # (turns, start, F)
    per_blur = np.moveaxis(cost_FBK, 1, 0)[:, np.arange(len(s)), index]  # (B, turns, start, F)
    return float(per_blur.sum(-1).min())


def _size(radius: float, count: int, world: World) -> tuple[str, float]:
    """Size by the nearest nominal radius on a log scale."""
    distance = {size: abs(float(np.log(radius / RADIUS[count][size]))) for size in world.sizes}
    size = min(distance, key=lambda key: distance[key])
    gap = float(np.log(RADIUS[count][SIZES[1]] / RADIUS[count][SIZES[0]]))
    return size, float(np.clip(1 - distance[size] / gap, 0.0, 1.0))


def _motion(track: Track, growth: float, spinning: bool, spin_sure: float) -> tuple[str, float]:
    """Name what the track does. Drifts, bounces and orbits by the path; the rest by radius and angle."""
    present = track.radius_F > 0
    s = frame_times(len(present))[present]
    x, y = track.x_F[present], track.y_F[present]
    path = float(max(np.ptp(x), np.ptp(y)))
    name: str
    if path > LEAST_TRAVEL:
        name, sure = _path_motion(x, y, s)
        sure *= 1 - LEAST_TRAVEL / (path + LEAST_TRAVEL)
    else:
        if abs(growth) > LEAST_GROWTH:
            name, sure = ("grow" if growth > 0 else "shrink"), min(1.0, abs(growth) / (2 * (GROWTH - 1)))
        elif spinning:
            name, sure = "spin", spin_sure
        else:
            name, sure = "still", 1 - path / LEAST_TRAVEL
    assert name in MOTIONS
    return name, float(np.clip(sure, 0.0, 1.0))


def _path_motion(x: np.ndarray, y: np.ndarray, s: np.ndarray) -> tuple[str, float]:
    """left, right, up, down, bounce or circle, for a path that is long enough to be one of them."""
    design = np.stack([np.ones_like(s), s], 1)
    fit, *_ = np.linalg.lstsq(design, np.stack([x, y], 1), rcond=None)
    residual = np.stack([x, y], 1) - design @ fit
    bent = float(np.sqrt((residual**2).sum(1).mean()))
    drift_x, drift_y = fit[1]
    spread = float(np.sqrt(x.var() + y.var()))
    if bent < 0.45 * spread:
        straight = 1 - bent / spread
        if abs(drift_x) > abs(drift_y):
            return ("right" if drift_x > 0 else "left"), straight * (1 - abs(drift_y / drift_x))
        return ("down" if drift_y > 0 else "up"), straight * (1 - abs(drift_x / drift_y))
    ratio = float(np.ptp(x) / (np.ptp(y) + 1e-6))
    if ratio < 0.4:
        return "bounce", 1 - ratio / 0.4
    return "circle", 1 - 0.4 / ratio if ratio < 1 else 0.6
