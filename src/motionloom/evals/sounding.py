"""Sound against picture and against the caption, in ShapeWorld: does the pitch follow the height, does the
click fall on the bounce.

Protocol ``sound-v2``. Clips are judged scene by scene and counted with the mean of their scenes. ``pitch
follows height`` is the correlation of the object's height by eye and by ear, over scenes in which it moves up
or down, should as captioned, or is heard to: where it then stands still, or is not to be seen, the scene
counts 0. ``clicks within 1 frame`` is the share of bounces and clicks that are each other's, over scenes that
have any, but for objects that circle, whose lowest point looks like a bounce. ``motion heard`` needs no
picture: what the sound alone says of the motion, against the caption.

T times at which sound is heard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from motionloom.data.shapeworld import Heard, World, hear
from motionloom.data.shapeworld.sound_oracle import LEAST_SECONDS, LEAST_SPREAD, sound_agrees
from motionloom.evals.asked import Sample, Video
from motionloom.evals.figures import Report, Target, summarise

PROTOCOL = "sound-v2"
TARGETS = {"pitch follows height": Target(0.9), "clicks within 1 frame": Target(0.85)}
SOUNDS_LIKE = {"up": "rise", "down": "fall", "bounce": "bounce", "circle": "wave"}  # all others: level
LEAST_RISE = 0.14  # in frame heights, over the scene
LEAST_WAVE = 0.04  # deviation in frame heights


def heard_motion(heard: Heard) -> str:
    """rise, fall, bounce, wave or level, by ear alone; silence where there is no tone."""
    tone_T = heard.pitch_T > 0
    if tone_T.sum() < 3:
        return "silence"
    if len(heard.clicks):
        return "bounce"
    time_T, height_T = heard.seconds_T[tone_T], heard.height_T[tone_T]
    line = np.polyfit(time_T, height_T, 1)
    rise = float(line[0] * (time_T[-1] - time_T[0]))
    bent = float((height_T - np.polyval(line, time_T)).std())
    if abs(rise) > LEAST_RISE and bent < abs(rise) / 4:
        return "rise" if rise > 0 else "fall"
    return "wave" if bent > LEAST_WAVE else "level"


def judge_sound(samples: Sequence[Sample], world: World) -> Report:
    """Every clip with sound whose captions are ShapeWorld's; those without a picture by the caption alone."""
    rows = [_row(sample, world) for sample in samples]
    names, groups = zip(*((sample.name, sample.asked.words) for sample in samples), strict=True)
    encoders = {"": "oracle", "motion heard": "ear"}
    return summarise("sound", PROTOCOL, names, rows, encoders, targets=TARGETS, groups=groups)


def _row(sample: Sample, world: World) -> dict[str, float | None]:
    found: dict[str, list[float | None]] = {}
    facts = sample.asked.facts
    assert facts is not None
    for (video, sound), what in zip(_scenes(sample), facts, strict=True):
        wanted = SOUNDS_LIKE.get(what.objects[0].motion, "level")
        enough = sound.shape[1] >= LEAST_SECONDS * sample.rate + 1
        tones = hear(sound, sample.rate) if enough else None
        heard = heard_motion(tones) if tones else "silence"
        row: dict[str, float | None] = {"motion heard": float(heard == wanted)}
        if len(video):
            both = sound_agrees(video, sound, sample.rate, sample.fps, world)
            either = both.bounces + both.clicks - both.matched
            moves = wanted != "level" or (tones is not None and _heard_to_move(tones))
            unseen = 0.0 if moves and _comparable(len(video), sample.fps) else None
            row["pitch follows height"] = unseen if both.correlation is None else both.correlation
            row["height error"] = both.error if heard != "silence" else None
            if wanted != "wave":
                row["clicks within 1 frame"] = both.matched / either if either else None
                row["clicks all right"] = float(both.clicks_right)
        for name, value in row.items():
            found.setdefault(name, []).append(value)
    means: dict[str, float | None] = {}
    for name, values in found.items():
        known = [value for value in values if value is not None]
        means[name] = sum(known) / len(known) if known else None
    return means


def _heard_to_move(tones: Heard) -> bool:
    height_T = tones.height_T[tones.pitch_T > 0]
    return len(height_T) >= 3 and float(height_T.std()) >= LEAST_SPREAD


def _comparable(frames: int, fps: float) -> bool:
    """Whether three frames fall where sound of the scene's own length can be heard."""
    at_F = np.arange(frames) / fps
    inside = (at_F >= LEAST_SECONDS / 2) & (at_F <= frames / fps - LEAST_SECONDS / 2)
    return int(inside.sum()) >= 3


def _scenes(sample: Sample) -> Iterator[tuple[Video, NDArray[np.float32]]]:
    """Frames and sound of every asked scene; of a sound alone, no frames."""
    assert sample.sound is not None
    scenes = sample.asked.scenes
    if len(scenes) < 2:
        yield sample.video_PHW3, sample.sound
        return
    ends = [*sample.asked.cuts, sum(scene.frames for scene in scenes)]
    for first, end in pairwise([0, *ends]):
        start, stop = (round(frame / sample.fps * sample.rate) for frame in (first, end))
        yield sample.video_PHW3[first:end], sample.sound[:, start:stop]
