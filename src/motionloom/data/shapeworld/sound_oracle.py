"""The oracle for sound: does what is heard go with what is seen? Heights and bounces from pixels on one hand,
pitch and clicks from sound on the other; nothing else is known about the clip.

F frames, H height, W width, T frames at which both can be read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from motionloom.data.shapeworld.oracle import Track, oracle
from motionloom.data.shapeworld.sound import hear
from motionloom.data.shapeworld.spec import World

LEAST_SPREAD = 0.04  # deviation of the height, in frame heights: less is standing still
LEAST_FALL = 0.06  # in frame heights: how much higher the object is before and after a bounce
LEAST_SECONDS = 0.064  # of sound: one window of `hear`


@dataclass(frozen=True)
class SoundAgreement:
    """How sound and picture of one clip go together.

    ``seen_T``, ``heard_T``: height of the object by eye and by ear, 0 at the bottom of the frame and 1 at the
    top, at the frames at which both can be read. ``bounces``: seen ones; ``clicks``: heard ones; ``matched``:
    pairs within one frame of each other. What happens within a frame of the clip's ends is not counted unless
    it matches: whether a fall ends there cannot be seen.
    """

    seen_T: np.ndarray
    heard_T: np.ndarray
    bounces: int
    clicks: int
    matched: int

    @property
    def correlation(self) -> float | None:
        """Of height by eye and by ear, 0 where the pitch stands still; None where the object does not move
        up or down, or not even three frames can be compared."""
        if len(self.seen_T) < 3 or self.seen_T.std() < LEAST_SPREAD:
            return None
        if self.heard_T.std() < 1e-6:
            return 0.0
        return float(np.corrcoef(self.seen_T, self.heard_T)[0, 1])

    @property
    def error(self) -> float | None:
        """Mean distance of height by eye and by ear, in frame heights; None where either cannot be read."""
        return float(np.abs(self.seen_T - self.heard_T).mean()) if len(self.seen_T) else None

    @property
    def clicks_right(self) -> bool:
        """Whether every bounce clicks and every click has its bounce; true where there are none."""
        return self.bounces == self.clicks == self.matched


def sound_agrees(
    video_FHW3: np.ndarray, sound: np.ndarray, sample_rate: int, fps: float, world: World | None = None
) -> SoundAgreement:
    """Hold the sound (channels, samples) of a clip of one scene against its pixels, uint8 or 0..255.

    Of several objects the one with most colour counts. Where no object is seen, or the sound is shorter than
    ``LEAST_SECONDS``, there is nothing to compare, and every bounce or click that is left is a mismatch.
    ``world`` narrows what the oracle looks for.
    """
    objects = oracle(video_FHW3, world).objects
    height = video_FHW3.shape[1] / min(video_FHW3.shape[1:3])
    track = objects[0].track if objects else None
    touches = bounces(track) / fps if track else np.zeros(0)
    if sound.shape[-1] < round(LEAST_SECONDS * sample_rate):
        counted = _inside(touches, len(video_FHW3), fps)
        return SoundAgreement(np.zeros(0), np.zeros(0), int(counted.sum()), 0, 0)
    heard = hear(sound, sample_rate)
    seen_T = heard_T = np.zeros(0)
    if track:
        at_F = np.arange(len(track.y_F)) / fps
        both = (track.radius_F > 0) & (at_F >= heard.seconds_T[0]) & (at_F <= heard.seconds_T[-1])
        seen_T = 1 - track.y_F[both] / height
        heard_T = np.interp(at_F[both], heard.seconds_T, heard.height_T)
    return SoundAgreement(seen_T, heard_T, *_matched(touches, heard.clicks, len(video_FHW3), fps))


def bounces(track: Track) -> np.ndarray:
    """Frames, with a fraction, at which the object turns from falling to rising; those that can be seen.

    A fall ends in a corner and not in a curve: straight lines of equal steepness through the lowest point and
    its neighbours meet where it was.
    """
    present = np.flatnonzero(track.radius_F > 0)
    y = track.y_F[present]  # grows downwards
    found = []
    for i in range(1, len(y) - 1):
        before, after = y[i - 1], y[i + 1]
        lowest = y[i] > before and y[i] >= after
        if lowest and min(y[i] - _highest(y[i::-1]), y[i] - _highest(y[i:])) > LEAST_FALL:
            found.append(present[i] + (after - before) / (2 * (y[i] - min(before, after))))
    return np.asarray(found, float)


def _highest(y: np.ndarray) -> float:
    """The top of the rise that starts at the first value, y growing downwards."""
    rising = np.flatnonzero(np.diff(y) > 0)
    return float(y[: rising[0] + 1 if len(rising) else len(y)].min())


def _matched(touches: np.ndarray, clicks: np.ndarray, frames: int, fps: float) -> tuple[int, int, int]:
    """(bounces, clicks, pairs), each bounce with the nearest click that is within a frame and still free."""
    pairs: list[tuple[int, int]] = []
    distance = np.abs(touches[:, None] - clicks[None])
    for index in np.argsort(distance, axis=None, kind="stable"):
        bounce, click = divmod(int(index), len(clicks))
        if distance[bounce, click] > 1 / fps:
            break
        if all(bounce != b and click != c for b, c in pairs):
            pairs.append((bounce, click))
    counted = []
    for times, taken in ((touches, {b for b, _ in pairs}), (clicks, {c for _, c in pairs})):
        inside = _inside(times, frames, fps)
        counted.append(sum(inside[i] or i in taken for i in range(len(times))))
    return int(counted[0]), int(counted[1]), len(pairs)


def _inside(times: np.ndarray, frames: int, fps: float) -> np.ndarray:
    """Which times are a frame or more from the first and the last picture."""
    return (times >= 1 / fps) & (times <= (frames - 2) / fps)
