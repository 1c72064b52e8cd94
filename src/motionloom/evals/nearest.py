"""Memorisation check: the training clip that looks most like a sample.

Shapes: S samples, N training clips, P frames, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

SIDE, FRAMES = 16, 8


@dataclass(frozen=True)
class Nearest:
    """``index``: which training clip; ``distance``: root mean square difference in 0-255 levels."""

    index: int
    distance: float


def thumbnail(video_PHW3: Tensor) -> Tensor:
    """A clip, uint8 (P, H, W, 3), as 8 frames of 16 x 16 pixels in one row of floats."""
    frames = torch.linspace(0, video_PHW3.shape[0] - 1, FRAMES).round().long()
    small = torch.nn.functional.interpolate(
        video_PHW3[frames].permute(0, 3, 1, 2).float(), size=(SIDE, SIDE), mode="area"
    )
    return small.flatten()


def nearest_clips(samples: Iterable[Tensor], training: Iterable[Tensor]) -> list[Nearest]:
    """For every sample the closest training clip, compared as thumbnails. Clips are uint8 (P, H, W, 3)."""
    sample_SD = torch.stack([thumbnail(clip) for clip in samples])
    training_ND = torch.stack([thumbnail(clip) for clip in training])
    # Not by a matrix product, whose rounding gives a copy a distance.
    exact = "donot_use_mm_for_euclid_dist"
    distance_SN = torch.cdist(sample_SD, training_ND, compute_mode=exact) / sample_SD.shape[1] ** 0.5
    best = distance_SN.min(dim=1)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [Nearest(index, distance) for index, distance in pairs]
