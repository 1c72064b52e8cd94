"""What becomes of a roll-out as it goes on: colours, exposure, motion, seams at chunk borders; and in a world
whose truth is known, whether the last stretch still shows what was asked.

Protocol ``drift-v1``. A film is cut into windows of one length (the trained clip's), spread evenly so that
the first begins with the film and the last ends with it. Every statistic is taken in each window; ``slope``
is its least-squares slope over the windows' middles, a minute of film. ``visual drift``: by how much
brightness, saturation, contrast and sharpness of the last window differ from those of the first, as a share
of it, in the mean of the four. ``kept``: the share of films that show an attribute at the last window over
that at the first, a ratio of two means. Where motions have a pace the oracle reads stretches of one period
and a frame; of a window it says the share of those that are right.

VBench prefers what is bright and coloured (Self-Forcing++, arXiv:2510.02283), so exposure has figures here.

P pixel frames, H x W pixels; W windows, N films.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from motionloom.data.shapeworld import Facts, Reading, World, adherence, oracle
from motionloom.data.shapeworld.spec import MIN_FRAMES
from motionloom.evals.adherence import JUDGED
from motionloom.evals.asked import Video
from motionloom.evals.encoders import Encoder, unit
from motionloom.evals.figures import LEVEL, RESAMPLES, Figure, Interval, Report, Target, summarise
from motionloom.evals.latency import Film
from motionloom.evals.seam import frame_differences, seam_ratio
from motionloom.rng import numpy_rng

PROTOCOL = "drift-v1"
TARGETS = {"kept: all": Target(0.90)}
LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)  # Rec. 709
NEAR = 5  # levels from white or black within which a pixel shows nothing any more
STILL = 0.1  # share of the pixels that are taken for what should stand still
LEAST = 0.02  # of what a change is a share of: below it everything changes by much
LOOKS = ("brightness", "saturation", "contrast", "sharpness")
COSINE = "cosine with the first window"
ENDS = ("first", "last")
ATTRIBUTES = ("color", "shape", "motion", "size", "background", "all")


@dataclass(frozen=True)
class Look:
    """How films are looked at. ``window``: pixel frames. ``world``: what its oracle expects; None: no oracle.
    ``encoder``: None leaves the cosine with the first window out."""

    window: int
    world: World | None = None
    encoder: Encoder | None = None

    @property
    def reading(self) -> int:
        """Pixel frames that the oracle reads at once."""
        if self.world is None or self.world.pace is None:
            return self.window
        return max(MIN_FRAMES, min(self.window, round(self.world.pace * self.world.fps) + 1))


def spans(frames: int, length: int) -> list[slice]:
    """Windows of ``length``, evenly spread from the first frame to the last; one of what is shorter."""
    length = min(frames, length)
    count = max(1, round(frames / length))
    return [slice(s, s + length) for s in np.linspace(0, frames - length, count).round().astype(int).tolist()]


def appearance(video_PHW3: Video) -> dict[str, float | None]:
    """Colours, exposure and motion of a stretch; shares and colours in 0..1, changes in levels of 255.

    ``contrast``: deviation of brightness within a frame; ``deviation``: of all numbers of the stretch.
    ``near white``, ``near black``: share of pixels within 5 levels of it in all colours. ``sharpness``: mean
    step of brightness between neighbours. ``dynamic degree``: mean change from frame to frame. ``flicker``:
    mean second difference of the frames' brightness; ``shimmer``: of a pixel's, at the upper end of the
    stillest tenth, where objects do not come.
    """
    pixels = video_PHW3.astype(np.float32) / 255
    luma_PHW = pixels @ LUMA
    most, least = pixels.max(-1), pixels.min(-1)
    down, right = (np.abs(np.diff(luma_PHW, axis=axis)).mean() for axis in (1, 2))
    red, green, blue = pixels.mean((0, 1, 2)).tolist()
    found: dict[str, float | None] = {
        "brightness": float(luma_PHW.mean()),
        "red": red,
        "green": green,
        "blue": blue,
        "deviation": float(pixels.std((0, 1, 2)).mean()),
        "saturation": float(((most - least) / np.maximum(most, 1e-6)).mean()),
        "contrast": float(luma_PHW.std((1, 2)).mean()),
        "sharpness": float(down + right),
        "near white": float((video_PHW3.min(-1) >= 255 - NEAR).mean()),
        "near black": float((video_PHW3.max(-1) <= NEAR).mean()),
        "dynamic degree": float(frame_differences(video_PHW3).mean()) if len(video_PHW3) > 1 else None,
    }
    if len(video_PHW3) > 2:
        found["flicker"] = 255 * float(np.abs(np.diff(luma_PHW.mean((1, 2)), 2)).mean())
        found["shimmer"] = 255 * float(np.quantile(np.abs(np.diff(luma_PHW, 2, axis=0)).mean(0), STILL))
    return found


def borders(span: slice, starts: Sequence[int]) -> list[int]:
    """Chunk borders inside a window, counted from its first frame."""
    return [start - span.start for start in starts if span.start < start < span.stop]


def readings(video_PHW3: Video, look: Look) -> list[Reading]:
    """What the oracle sees in each stretch of a video."""
    assert look.world is not None
    return [oracle(video_PHW3[span], look.world) for span in spans(len(video_PHW3), look.reading)]


def obeyed(seen: Sequence[Reading], wanted: Facts) -> dict[str, float]:
    """Share of the stretches that show each attribute as it was asked; ``all``: colour, shape and motion at
    once."""
    read = [adherence(one, wanted) for one in seen]
    right = [{**one, "all": all(one[name] for name in JUDGED)} for one in read]
    return {name: float(np.mean([one[name] for one in right])) for name in ATTRIBUTES}


@dataclass(frozen=True)
class Curve:
    """What the windows of one film give: by name one number for each, None where it cannot be said."""

    name: str
    group: Hashable
    """Films of one prompt are no independent draws."""
    seconds_W: tuple[float, ...]
    """Middle of each window."""
    values: Mapping[str, tuple[float | None, ...]]


def follow(film: Film, look: Look, wanted: Facts | None = None) -> Curve:
    """A film window by window.

    Args:
        wanted: what its prompt promises; the oracle is asked where ``look`` has a world as well.
    """
    cut = spans(len(film.video_PHW3), look.window)
    rows = []
    for span in cut:
        video, at = film.video_PHW3[span], borders(span, film.starts)
        row = appearance(video)
        # Where every step crosses a border, as with chunks of one frame, there is nothing to compare with.
        row["seam ratio"] = seam_ratio(video, at) if at and len(at) < len(video) - 1 else None
        if look.world is not None and wanted is not None:
            row |= obeyed(readings(video, look), wanted)
        rows.append(row)
    values = {name: tuple(row.get(name) for row in rows) for name in rows[0]}
    if look.encoder is not None:
        values[COSINE] = _alike([film.video_PHW3[span] for span in cut], look.encoder)
    middles = tuple((span.start + span.stop) / 2 / film.fps for span in cut)
    return Curve(film.name, film.prompt, middles, values)


def _alike(parts: Sequence[Video], encoder: Encoder) -> tuple[float | None, ...]:
    """Cosine of each window's mean embedding with the first one's."""
    mean_WD = unit(np.stack([encoder.embed(part).mean(0) for part in parts]))
    return tuple(float(x) for x in mean_WD @ mean_WD[0])


def slope(seconds_W: Sequence[float], values_W: Sequence[float | None]) -> float | None:
    """Least-squares slope a minute; None of fewer than two windows."""
    known = [(s, v) for s, v in zip(seconds_W, values_W, strict=True) if v is not None]
    if len(known) < 2:
        return None
    seconds, values = np.asarray(known, np.float64).T
    away = seconds - seconds.mean()
    return 60 * float(away @ values / (away @ away))


def visual_drift(curve: Curve) -> float:
    """See this file's head."""
    changes = []
    for name in LOOKS:
        first, last = curve.values[name][0], curve.values[name][-1]
        assert first is not None
        assert last is not None, "every window has an appearance"
        changes.append(abs(last - first) / max(abs(first), LEAST))
    return float(np.mean(changes))


def _row(curve: Curve) -> dict[str, float | None]:
    """The numbers of one film; what compares two windows is None where there is one."""
    several = len(curve.seconds_W) > 1
    row: dict[str, float | None] = {"visual drift": visual_drift(curve) if several else None}
    if COSINE in curve.values:
        row["last " + COSINE] = curve.values[COSINE][-1] if several else None
    seams = [ratio for ratio in curve.values["seam ratio"] if ratio is not None]
    row["seam ratio"] = float(np.mean(seams)) if seams else None
    for name in ATTRIBUTES:
        if name in curve.values:
            first, last = curve.values[name][0], curve.values[name][-1]
            assert first is not None
            assert last is not None, "the oracle answers for every window"
            row |= {
                f"first window: {name}": first,
                f"last window: {name}": last if several else None,
                f"drift: {name}": first - last if several else None,
            }
    stats = [name for name in curve.values if name not in (*ATTRIBUTES, COSINE)]
    return row | {f"{name}, slope": slope(curve.seconds_W, curve.values[name]) for name in stats}


def judge_drift(curves: Sequence[Curve], look: Look) -> Report:
    """All films.

    ``details``: ``curves``, the mean of everything by window, with the second in its middle and over how many
    films; ``window`` and ``reading``, the pixel frames that were looked at at once.
    """
    names, groups = [curve.name for curve in curves], [curve.group for curve in curves]
    rows = [_row(curve) for curve in curves]
    oracle_says = [name for row in rows for name in row if ":" in name]
    encoders = {"": "pixels", **dict.fromkeys(oracle_says, "oracle")}
    if look.encoder is not None:
        encoders["last " + COSINE] = look.encoder.name
    details = {"curves": _curves(curves), "window": look.window, "reading": look.reading}
    report = summarise(
        "drift", PROTOCOL, names, rows, encoders, targets=TARGETS, groups=groups, details=details
    )
    kept = [figure for name in ATTRIBUTES if (figure := _kept(name, rows, groups)) is not None]
    return replace(report, figures=(*kept, *report.figures))


def _kept(name: str, rows: Sequence[Mapping[str, float | None]], groups: Sequence[Hashable]) -> Figure | None:
    """Of one attribute; None where it was not read, a film has one window, or no first one shows it."""
    if any(row.get(f"last window: {name}") is None for row in rows):
        return None
    first_N, last_N = (np.array([row[f"{end} window: {name}"] for row in rows], float) for end in ENDS)
    interval = ratio_of_means(last_N, first_N, PROTOCOL, f"kept: {name}", groups=groups)
    if interval is None:
        return None
    return Figure(f"kept: {name}", interval, PROTOCOL, "oracle", TARGETS.get(f"kept: {name}"))


def ratio_of_means(
    above_N: NDArray[np.float64],
    below_N: NDArray[np.float64],
    *key: int | str,
    groups: Sequence[Hashable],
) -> Interval | None:
    """Mean over mean, with the interval of drawing whole groups again, as `evals.figures.bootstrap`; None
    where the lower one is 0. A draw whose lower mean is 0 says nothing and is left out."""
    if not below_N.sum() > 0:
        return None
    names = list(groups) if len(set(groups)) > 1 else list(range(len(below_N)))
    place = {name: n for n, name in enumerate(dict.fromkeys(names))}
    group_N = np.asarray([place[name] for name in names])
    above_G, below_G = np.bincount(group_N, above_N), np.bincount(group_N, below_N)
    drawn_RG = numpy_rng("bootstrap", *key).integers(len(above_G), size=(RESAMPLES, len(above_G)))
    above_R, below_R = above_G[drawn_RG].sum(1), below_G[drawn_RG].sum(1)
    ratios = above_R[below_R > 0] / below_R[below_R > 0]
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Interval(float(above_N.sum() / below_N.sum()), float(low), float(high), len(below_N))


def _curves(curves: Sequence[Curve]) -> list[dict[str, float | int | str]]:
    """Means over the films by name and window."""
    rows: list[dict[str, float | int | str]] = []
    for name in dict.fromkeys(name for curve in curves for name in curve.values):
        for n in range(max(len(curve.seconds_W) for curve in curves)):
            at = [c for c in curves if n < len(c.seconds_W) and name in c.values]
            known = [(c.seconds_W[n], v) for c in at if (v := c.values[name][n]) is not None]
            if known:
                second, value = np.mean(known, axis=0).tolist()
                rows.append({"name": name, "window": n, "second": second, "mean": value, "films": len(known)})
    return rows
