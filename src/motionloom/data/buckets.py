"""Buckets: the few shapes that clips are brought to, so that clips of one shape can stand in one batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from motionloom.config.recipe import Recipe
from motionloom.tokenizers import TokenizerSpec, scene_latents


@dataclass(frozen=True, order=True)
class Bucket:
    """A clip's shape in pixels. Sound alone is 0 pixels wide and high; its frames say how long it lasts."""

    width: int
    height: int
    frames: int
    shots: tuple[int, ...] = ()
    """Frames of each shot where every one was encoded as a clip of its own; empty: the clip as a whole."""

    def __str__(self) -> str:
        frames = "+".join(map(str, self.shots)) or self.frames
        return f"sound-{frames}" if self.is_sound else f"{self.width}x{self.height}x{frames}"

    @staticmethod
    def parse(text: str) -> Bucket:
        """The bucket that ``str`` wrote."""
        if text.startswith("sound-"):
            return Bucket(0, 0, int(text.removeprefix("sound-")))
        width, height, frames = text.split("x")
        shots = tuple(map(int, frames.split("+")))
        return Bucket(int(width), int(height), sum(shots), shots if len(shots) > 1 else ())

    @property
    def is_sound(self) -> bool:
        """Whether its clips have no picture."""
        return not self.width

    @property
    def alone(self) -> tuple[int, ...]:
        """Frames of each part that is encoded by itself: the shots, or the clip as a whole."""
        return self.shots or (self.frames,)

    def latent_grid(self, spec: TokenizerSpec) -> tuple[int, int, int]:
        """(F, h, w) of its clips' latents. Raises UserError for a size that the tokenizer cannot make."""
        if self.is_sound:
            return 0, 0, 0
        frames, rows, columns = spec.latent_grid(self.alone[0], self.height, self.width)
        return sum(scene_latents(spec, self.shots)) if self.shots else frames, rows, columns


def bucket_sizes(recipe: Recipe) -> list[tuple[int, int]]:
    """(width, height) of the recipe's buckets; the one size of `video` when bucketing is off."""
    if recipe.bucketing.enabled:
        return sorted(set(recipe.bucketing.buckets))
    return [(recipe.video.width, recipe.video.height)]


def bucket_lengths(recipe: Recipe) -> list[int]:
    """Lengths in frames that clips are cut to, shortest first."""
    if recipe.bucketing.enabled and recipe.bucketing.frames:
        return sorted(set(recipe.bucketing.frames))
    return [recipe.video.num_frames]


def cached_fps(recipe: Recipe) -> float:
    """Frames per second of a cached clip: every `frame_stride`-th frame at `video.fps`."""
    return recipe.video.fps / recipe.video.frame_stride


def closest_size(width: float, height: float, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size that crops least: closest aspect ratio on a log scale, then closest area, then the first."""

    def distance(size: tuple[int, int]) -> tuple[float, float]:
        # Rounded, so that equal ratios written differently (2:1 and 4:2) tie and the area decides.
        ratio = round(abs(math.log(size[0] / size[1]) - math.log(width / height)), 9)
        return ratio, abs(math.log(size[0] * size[1]) - math.log(width * height))

    return min(sizes, key=distance)


def longest_fit(frames: int, lengths: Sequence[int]) -> int | None:
    """The longest length that so many frames fill; None when even the shortest is too long.

    Beside longer ones the length 1 is for stills: a moving clip is not silently cut down to a picture.
    """
    if frames > 1 and max(lengths) > 1:
        lengths = [length for length in lengths if length > 1]
    return max((length for length in lengths if length <= frames), default=None)


def whole_frames(spec: TokenizerSpec, frames: int, patch: int) -> int:
    """How many of so many frames fill latent frames in groups of ``patch``, those of one token."""
    head = int(spec.first_alone)
    latents = head + (frames - head) // spec.temporal if frames else 0
    latents -= latents % patch
    return spec.pixel_frames(latents) if latents else 0
