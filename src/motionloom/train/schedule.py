"""The learning rate as a pure function of the optimiser step: never of ranks, accumulation or epochs."""

from __future__ import annotations

import math
from typing import Literal


def lr_ratio(
    step: int,
    kind: Literal["constant", "cosine", "linear"],
    warmup_steps: int,
    max_steps: int,
    min_ratio: float = 0.0,
) -> float:
    """The part of the base rate with which optimiser step ``step`` (from 0) is taken.

    Warm-up rises linearly from 1 / warmup_steps. After it, ``cosine`` and ``linear`` fall towards
    ``min_ratio``, which step ``max_steps`` would have; so no step is lost at a rate of 0, first or last.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if kind == "constant":
        return 1.0
    done = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    fall = done if kind == "linear" else 0.5 * (1 - math.cos(math.pi * done))
    return 1.0 - (1.0 - min_ratio) * fall
