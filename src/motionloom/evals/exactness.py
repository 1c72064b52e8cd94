"""Whether what was given came back: latents to the bit, pixels to the last level.

Protocol ``given-v1``: over all values of the given region, clip by clip and condition by condition. Pixels
that were made from latents carry the tokenizer's error, and those read from files their codec's (webp at
quality 100 has none).

P frames, H x W pixels; latents (F, h, w, C).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from motionloom.evals.asked import Mask, Sample, Video
from motionloom.evals.figures import Report, summarise

PROTOCOL = "given-v1"


@dataclass(frozen=True)
class PixelError:
    """Error of a region: ``psnr`` in dB (infinite where nothing differs), ``most`` in levels of 255."""

    psnr: float
    most: int


def pixel_error(made_PHW3: Video, source_PHW3: Video, mask_PHW: Mask) -> PixelError | None:
    """Of the pixels that ``mask_PHW`` names; None where it names none."""
    if not mask_PHW.any():
        return None
    gap: NDArray[np.int16] = made_PHW3[mask_PHW].astype(np.int16) - source_PHW3[mask_PHW]
    square = float(np.square(gap.astype(np.float64)).mean())
    return PixelError(10 * math.log10(255**2 / square) if square else math.inf, int(np.abs(gap).max()))


def judge_conditions(samples: Sequence[Sample]) -> Report:
    """PSNR, largest error and share of exact clips, per type of condition; conditions with a source alone.

    PSNR is capped at 100 dB, so that exact clips have a mean.
    """
    rows: list[dict[str, float | None]] = []
    for sample in samples:
        row: dict[str, float | None] = {}
        shape = sample.video_PHW3.shape[:3]
        for given in sample.asked.given:
            truth = given.truth(*shape)
            error = None if truth is None else pixel_error(sample.video_PHW3, truth, given.where(*shape))
            if error is not None:
                kind = given.kind or "given"
                row[f"{kind}: psnr (dB)"] = min(error.psnr, 100.0)
                row[f"{kind}: largest error"] = error.most
                row[f"{kind}: exact"] = float(error.most == 0)
        rows.append(row)
    names = [sample.name for sample in samples]
    return summarise("conditions", PROTOCOL, names, rows, {"": "pixels"})
