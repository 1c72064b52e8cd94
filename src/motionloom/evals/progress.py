"""How far the made part of a ShapeWorld clip moves by itself, against what real objects do in its frames.

The given part is left out: a continuation that stands still after half a clip would else be read as moving,
as the whole clip does. P frames; S steps, each from one frame to the next; R real objects.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from motionloom.data.shapeworld import Facts, Track, World, oracle, render_video
from motionloom.data.shapeworld.spec import MIN_PIXELS, frame_times, trajectory
from motionloom.evals.asked import Mask, Video
from motionloom.rng import numpy_rng

REAL = 32  # real objects of the asked attributes, at places, phases and speeds of their own
TURNING = ("bounce", "circle")  # motions of which the path counts, as they come back
AXIS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # x points right, y down
Numbers = NDArray[np.float64]


def progress(video_PHW3: Video, given_P: Mask, wanted: Facts, world: World) -> float:
    """Way of the first object in the made frames, over the shortest that `REAL` such objects go there.

    The way is the displacement along the asked direction, the growth of the radius, the length of the path of
    what comes back, and of a spin the change of the pixels. No single step counts for more than a real one,
    so that a jump between two standing pictures is no motion. 1 or more is as real; 0 stands still, is gone,
    or moves elsewhere. Of an object that is asked to stand still always 1.
    """
    motion = wanted.objects[0].motion
    if motion == "still":
        return 1.0
    made_P = ~given_P
    real_RS = _real(video_PHW3.shape, made_P, wanted, world)
    if motion == "spin":
        steps_P1 = _changes(video_PHW3)
    else:
        track = _track(video_PHW3, made_P, world)
        steps_P1 = np.zeros(len(made_P) - 1) if track is None else _moves(track, motion)
    most_S = real_RS.max(0) if motion in TURNING else real_RS.min(0)
    way = np.clip(_own(steps_P1, made_P), -most_S, most_S).sum()
    return float(way / real_RS.sum(1).min())


def _own(steps_P1: Numbers, made_P: Mask) -> Numbers:
    """(S,) steps between two made frames. Where every made frame stands alone, the smaller of the steps that
    lead to it and from it: one that repeats its neighbour has made none.
    """
    inner = made_P[:-1] & made_P[1:]
    if inner.any():
        return steps_P1[inner]
    frames = np.flatnonzero(made_P).tolist()
    return np.asarray([steps_P1[max(0, at - 1) : at + 1].min() for at in frames])


def _track(video_PHW3: Video, made_P: Mask, world: World) -> Track | None:
    """The foremost object of the made frames, NaN at the others; of all where made frames stand alone."""
    use = made_P if (made_P[:-1] & made_P[1:]).any() else np.ones_like(made_P)
    objects = oracle(video_PHW3[use], world).objects
    if not objects:
        return None
    seen = objects[0].track
    laid = np.full((3, len(use)), np.nan)
    laid[:, use] = np.where(seen.radius_F > 0, (seen.x_F, seen.y_F, seen.radius_F), np.nan)
    return Track(*laid)


def _moves(track: Track, motion: str) -> Numbers:
    """(P - 1,) way from each frame to the next; 0 where the object is not seen in both."""
    if motion in ("grow", "shrink"):
        steps = np.diff(np.log(track.radius_F)) * (1 if motion == "grow" else -1)
    else:
        right, down = np.diff(track.x_F), np.diff(track.y_F)
        x, y = AXIS.get(motion, (0, 0))
        steps = np.hypot(right, down) if motion in TURNING else x * right + y * down
    return np.nan_to_num(np.asarray(steps, np.float64))


def _changes(video_PHW3: Video) -> Numbers:
    return np.asarray(np.abs(np.diff(video_PHW3.astype(np.int16), axis=0)).mean(axis=(1, 2, 3)))


def _real(shape: tuple[int, ...], made_P: Mask, wanted: Facts, world: World) -> Numbers:
    """(R, S) ways of real objects at the steps of the made part."""
    frames, height, width = shape[:3]
    world = replace(world, height=max(height, MIN_PIXELS), width=max(width, MIN_PIXELS))
    rng = numpy_rng("progress of real objects", *wanted.objects[0].combination, wanted.objects[0].size)
    rows = []
    for _ in range(REAL):
        spec = world.stage(wanted.objects[:1], wanted.background, rng, frames=frames)
        if wanted.objects[0].motion == "spin":
            steps_P1 = _changes(render_video(spec))
        else:
            x, y, radius, _angle = trajectory(spec.objects[0], frame_times(frames))
            steps_P1 = _moves(Track(x, y, radius), spec.objects[0].motion)
        rows.append(_own(steps_P1, made_P))
    return np.stack(rows)
