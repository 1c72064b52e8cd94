"""The joint between what was given and what was made: does the picture jump, does the motion go on, is it
still the same thing.

A joint is the index of the first frame on its far side. P frames, H x W pixels.

Protocol ``seam-v2``: a frame difference is the mean absolute change of all values; the seam's ratio is the
difference across the joint over the mean difference elsewhere in the clip (``seam ratio``) or in real clips
(``seam ratio to real``); a clip of several joints counts with their mean. A ratio near 1 is a clip without a
seam; 1.5 and 0.5 are the bounds, as one near 0 is a clip that stops there. A clip in which nothing is asked
to move counts at least 1. ``motion goes on`` where the oracle reads the asked motion and the made part goes
more than half of the way that the slowest real objects go there (`progress`). Beside both ``frozen``: what
the same clip gives when every made frame repeats the nearest given one, the least that anything has to beat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np
from numpy.typing import NDArray

from motionloom.data.shapeworld import Attributes, Facts, Track, World, adherence, oracle
from motionloom.evals.asked import Mask, Sample, Video
from motionloom.evals.encoders import Encoder, unit
from motionloom.evals.figures import Report, Target, summarise
from motionloom.evals.progress import progress

PROTOCOL = "seam-v2"
TARGETS = {
    "seam ratio": Target(1.5, least=False, floor=0.5),
    "seam ratio to real": Target(1.5, least=False, floor=0.5),
    "keeps color": Target(0.95),
    "keeps shape": Target(0.95),
    "motion goes on": Target(0.85),
}
STILL = 0.1  # levels: the least usual difference, so that a seam in a still clip counts
READABLE = 2 / 3  # of the clip must have been made for its motion to be read from that part alone
OWN_WAY = 0.5  # of the shortest real way: a made part that goes no further does not move by itself
SPAN = 4  # frames on either side from which a velocity is taken
STRAIGHT = ("left", "right", "up", "down", "still")  # motions whose velocity never changes
IDENTITY = ("color", "shape", "size")


def joints(given_P: Mask) -> tuple[int, ...]:
    """Where given frames (True) meet made ones."""
    return tuple(int(at) + 1 for at in np.flatnonzero(np.diff(given_P.astype(np.int8))))


def seams(sample: Sample) -> tuple[int, ...]:
    """The joints that should not be seen: a cut that was asked for is none."""
    return tuple(at for at in joints(sample.given_P) if at not in sample.asked.cuts)


def frame_differences(video_PHW3: Video) -> NDArray[np.float64]:
    """(P - 1,) mean absolute change from each frame to the next, in levels of 255."""
    video = video_PHW3.astype(np.int16)
    return np.abs(np.diff(video, axis=0)).mean(axis=(1, 2, 3))


def typical_difference(videos: Sequence[Video]) -> float:
    """Of real clips: mean over clips of their mean frame difference."""
    return float(np.mean([frame_differences(video).mean() for video in videos]))


def seam_ratio(video_PHW3: Video, at: Sequence[int], typical: float | None = None) -> float:
    """Mean frame difference across the joints ``at``, over the ``typical`` one.

    Args:
        typical: in levels; None takes the clip's own mean over all other steps.
    """
    change = frame_differences(video_PHW3)
    steps = [joint - 1 for joint in at]
    if typical is None:
        others = np.delete(change, steps)
        typical = float(others.mean()) if len(others) else 0.0
    return float(change[steps].mean() / max(typical, STILL))


def velocity_change(track: Track, joint: int, span: int = SPAN) -> float | None:
    """|after - before| / max(|before|, |after|) of an object's velocity: 0 goes on, 1 stops or starts, 2
    turns back. None where either side has fewer than three frames, or nothing moves.
    """
    speeds = []
    for part in (slice(max(0, joint - span), joint), slice(joint, joint + span)):
        seen = track.radius_F[part] > 0
        if seen.sum() < 3:
            return None
        time = np.flatnonzero(seen)
        path = np.stack([track.x_F[part][seen], track.y_F[part][seen]], 1)
        speeds.append(np.polyfit(time, path, 1)[0])
    before, after = speeds
    largest = max(float(np.hypot(*before)), float(np.hypot(*after)))
    return float(np.hypot(*(after - before))) / largest if largest > LEAST_SPEED else None


LEAST_SPEED = 0.004  # of the frame's shorter side, per frame: slower is standing still
BLOCK, REACH, SIDE = 8, 6, 96  # of block matching, in pixels of the scaled picture


@dataclass(frozen=True)
class Blocks:
    """Where each block of a frame lies in another one; R x C blocks.

    ``move_RC2``: right and down in pixels. ``weight_RC``: texture times change, as flat blocks and those that
    stay as they are say little. ``trust_RC``: how much of the change the shift explains, 0..1.
    """

    move_RC2: NDArray[np.float64]
    weight_RC: NDArray[np.float64]
    trust_RC: NDArray[np.float64]


def block_motion(anchor_HW3: Video, other_HW3: Video) -> Blocks:
    """Match blocks of 8 x 8 pixels by their absolute difference.

    No network: for clips whose objects no oracle knows. Displacements beyond 6 / 96 of the longer side are
    not found. The best shift is refined by a parabola through its neighbours' costs.
    """
    scale = max(1.0, max(anchor_HW3.shape[:2]) / SIDE)
    first, second = (_grey(frame, scale) for frame in (anchor_HW3, other_HW3))
    rows, columns = first.shape[0] // BLOCK, first.shape[1] // BLOCK
    first, second = (part[: rows * BLOCK, : columns * BLOCK] for part in (first, second))
    padded = np.pad(second, REACH, mode="edge")
    width = 2 * REACH + 1
    cost = np.empty((width, width, rows, columns))
    for down, right in np.ndindex(width, width):
        shifted = padded[down : down + first.shape[0], right : right + first.shape[1]]
        cost[down, right] = _by_block(np.abs(shifted - first), rows, columns)
    moves = np.array([[_best(cost[:, :, i, j]) for j in range(columns)] for i in range(rows)])
    change = cost[REACH, REACH]
    trust = np.where(change > 1e-9, 1 - cost.min(axis=(0, 1)) / np.maximum(change, 1e-9), 1.0)
    return Blocks(scale * moves, _by_block(_gradient(first), rows, columns) * change, trust)


def _grey(frame_HW3: Video, scale: float) -> NDArray[np.float64]:
    from PIL import Image

    size = (max(BLOCK, round(frame_HW3.shape[1] / scale)), max(BLOCK, round(frame_HW3.shape[0] / scale)))
    picture = Image.fromarray(frame_HW3).resize(size, Image.Resampling.BOX)
    return np.asarray(picture, np.float64).mean(-1)


def _gradient(image_HW: NDArray[np.float64]) -> NDArray[np.float64]:
    down, right = np.gradient(image_HW)
    return np.asarray(down**2 + right**2)


def _by_block(image_HW: NDArray[np.float64], rows: int, columns: int) -> NDArray[np.float64]:
    return image_HW.reshape(rows, BLOCK, columns, BLOCK).mean(axis=(1, 3))


def _best(cost_DR: NDArray[np.float64]) -> tuple[float, float]:
    """(right, down) of least cost, ties to the smallest shift."""
    center = cost_DR[REACH, REACH]
    if center <= cost_DR.min() + 1e-9:
        return 0.0, 0.0
    down, right = np.unravel_index(int(cost_DR.argmin()), cost_DR.shape)
    return (
        right - REACH + _parabola(cost_DR[down], int(right)),
        down - REACH + _parabola(cost_DR[:, right], int(down)),
    )


def _parabola(cost: NDArray[np.float64], at: int) -> float:
    if not 0 < at < len(cost) - 1:
        return 0.0
    before, here, after = cost[at - 1 : at + 2]
    bend = before - 2 * here + after
    return float(np.clip(0.5 * (before - after) / bend, -0.5, 0.5)) if bend > 1e-9 else 0.0


def flow_change(video_PHW3: Video, joint: int, span: int = 3) -> float | None:
    """As `velocity_change`, of a clip of any content, block by block: what a block of the joint's frames did
    before against what it does after, weighted; near 0 for steady motion, 1 where it stops, towards 2 where
    it turns back. Film is never quite steady: read it beside a real clip's own.

    None where either side has no two frames, or nothing moves by a tenth of a pixel.
    """
    first, last = max(0, joint - 1 - span), min(len(video_PHW3) - 1, joint + span)
    if first == joint - 1 or last == joint:
        return None
    back = block_motion(video_PHW3[joint - 1], video_PHW3[first])
    ahead = block_motion(video_PHW3[joint], video_PHW3[last])
    before, after = -back.move_RC2 / (joint - 1 - first), ahead.move_RC2 / (last - joint)
    weight = np.maximum(back.weight_RC, ahead.weight_RC) * back.trust_RC * ahead.trust_RC
    largest = np.maximum(np.hypot(*np.moveaxis(before, -1, 0)), np.hypot(*np.moveaxis(after, -1, 0)))
    gap = np.hypot(*np.moveaxis(after - before, -1, 0))
    moving = float((weight * largest).sum())
    return float((weight * gap).sum()) / moving if moving > LEAST_FLOW * weight.sum() else None


LEAST_FLOW = 0.1  # pixels a frame, of what counts


def identity_cosine(video_PHW3: Video, given_P: Mask, encoder: Encoder) -> float:
    """Cosine of the given frames' mean embedding with the made frames'."""
    vectors = encoder.embed(video_PHW3)
    sides = unit(np.stack([vectors[given_P].mean(0), vectors[~given_P].mean(0)]))
    return float(sides[0] @ sides[1])


@dataclass(frozen=True)
class ObjectSeam:
    """What the oracle says of a joint: attributes that stayed, and whether the asked motion goes on."""

    keeps: dict[str, bool]
    motion: bool
    velocity_change: float | None
    """Mean over joints; None for motions that turn by themselves."""


def object_seam(video_PHW3: Video, given_P: Mask, wanted: Facts, world: World) -> ObjectSeam:
    """Oracle on either side of the joints, for a clip of one scene with one object.

    An attribute is kept when the made frames show what the given ones show; where the given ones show nothing
    readable, what was asked. The motion is read from the made frames, or from all when they are few; either
    way the made ones must move by themselves.
    """
    asked = wanted.objects[0]
    before = _seen(video_PHW3[given_P], world) or asked
    after = _seen(video_PHW3[~given_P], world)
    keeps = {name: after is not None and getattr(after, name) == getattr(before, name) for name in IDENTITY}
    whole = oracle(video_PHW3, world)
    straight = asked.motion in STRAIGHT and whole.objects
    changes = (
        [velocity_change(whole.objects[0].track, joint) for joint in joints(given_P)] if straight else []
    )
    return ObjectSeam(keeps, goes_on(video_PHW3, given_P, wanted, world), _mean(changes))


def goes_on(video_PHW3: Video, given_P: Mask, wanted: Facts, world: World) -> bool:
    """Whether the made part moves as asked: so the oracle reads it, and it goes a way of its own."""
    made = ~given_P
    enough = made.mean() >= READABLE and len(joints(given_P)) == 1
    reading = oracle(video_PHW3[made] if enough else video_PHW3, world)
    return adherence(reading, wanted)["motion"] and progress(video_PHW3, given_P, wanted, world) > OWN_WAY


def frozen(video_PHW3: Video, given_P: Mask) -> Video:
    """The clip with every made frame replaced by the nearest given one."""
    given = np.flatnonzero(given_P)
    at = np.arange(len(given_P))
    return video_PHW3[given[np.abs(at[:, None] - given).argmin(1)]]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _seen(video_PHW3: Video, world: World) -> Attributes | None:
    """The foremost object; a few frames are shown twice, as the oracle asks for more than one."""
    if len(video_PHW3) < 2:
        video_PHW3 = np.repeat(video_PHW3, 2, axis=0)
    objects = oracle(video_PHW3, world).objects
    return objects[0].attributes if objects else None


def judge_seams(
    samples: Sequence[Sample],
    encoder: Encoder,
    world: World | None = None,
    real: Sequence[Video] = (),
) -> Report:
    """Every clip in which whole frames were given and whole frames were made.

    Args:
        world: where the clips are ShapeWorld's, for the oracle.
        real: clips whose frame difference is the measure. What they give at the same places is told in
            ``details``: the figures of a perfect model.
    """
    typical = typical_difference(real) if real else None
    rows = [_row(sample, encoder, world, typical) for sample in samples]
    oracle_names = (*TARGETS, "keeps size", "velocity change", "frozen: motion goes on")
    encoders = {"": "pixels", "identity cosine": encoder.name, "flow change": "block-matching-v1"}
    encoders |= {name: "oracle" for name in oracle_names if not name.startswith("seam")}
    names, groups = zip(*((sample.name, sample.asked.words) for sample in samples), strict=True)
    details = {"real": _real_joints(samples, real)} if real else {}
    return summarise("seam", PROTOCOL, names, rows, encoders, targets=TARGETS, groups=groups, details=details)


def _real_joints(samples: Sequence[Sample], real: Sequence[Video]) -> dict[str, float | None]:
    """What real clips give where the samples have their joints, though nothing was made there."""
    found = []
    for sample, video in zip(samples, cycle(real), strict=False):
        at = [joint for joint in seams(sample) if joint < len(video)]
        if at:
            found.append((seam_ratio(video, at), _mean([flow_change(video, joint) for joint in at])))
    return {
        "seam ratio": _mean([ratio for ratio, _ in found]),
        "flow change": _mean([change for _, change in found]),
    }


def _stands(video_PHW3: Video, facts: Sequence[Facts] | None) -> bool:
    """Whether a clip need not move: nothing is asked to, or, of no known world, nothing in it does."""
    if facts is None:
        return bool(frame_differences(video_PHW3).mean() < STILL)
    return all(thing.motion == "still" for scene in facts for thing in scene.objects)


def _row(
    sample: Sample, encoder: Encoder, world: World | None, typical: float | None
) -> dict[str, float | None]:
    given = sample.given_P
    at = seams(sample)
    if not at:
        return {}
    video = sample.video_PHW3
    held = frozen(video, given)
    known = sample.asked.facts if world is not None else None
    still = _stands(video, known)
    row: dict[str, float | None] = {}
    if len(at) < len(video) - 1:  # else no step of the clip's own is left to compare with
        row["seam ratio"] = max(seam_ratio(video, at), float(still))
        row["frozen: seam ratio"] = max(seam_ratio(held, at), float(still))
    if typical is not None:
        asked_still = known is not None and still
        row["seam ratio to real"] = max(seam_ratio(video, at, typical), float(asked_still))
    facts = sample.asked.facts
    if world is not None and facts is not None and len(facts) == 1:
        row["frozen: motion goes on"] = float(goes_on(held, given, facts[0], world))
        seam = object_seam(video, given, facts[0], world)
        row |= {f"keeps {name}": float(kept) for name, kept in seam.keeps.items()}
        row |= {"motion goes on": float(seam.motion), "velocity change": seam.velocity_change}
    return row | {
        "flow change": _mean([flow_change(video, joint) for joint in at]),
        "identity cosine": identity_cosine(video, given, encoder),
    }
