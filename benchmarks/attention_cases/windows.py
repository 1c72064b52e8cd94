"""Spatial windows over all frames of a joint text-video sequence: by reshape against a dense mask.

    python benchmarks/attention_cases/windows.py --json

``speedup`` over SDPA with the prepared mask.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from _measure import clip, draw, inference, ratio, report, training, turns

from motionloom.nn.attention import CHOICES, Pattern, attend
from motionloom.nn.attention.choice import best
from motionloom.nn.memory import keep_freed_memory
from motionloom.plans import spatial_window
from motionloom.plans.lower import lower


def case(shift: int, dtype: torch.dtype) -> dict[str, Any]:
    """One row of figures."""
    a = clip((4,), 16, 24, 32)
    leaves = draw(1, 8, a.scene_BN.shape[1], 64, dtype)
    pattern = lower(spatial_window(8, shift), a, a)
    assert isinstance(pattern, Pattern)
    mask = pattern.plan.mask.to(dtype) if pattern.plan.mask.is_floating_point() else pattern.plan.mask
    row: dict[str, Any] = {
        "shift": shift,
        "dtype": str(dtype).removeprefix("torch."),
        "seen": round(pattern.plan.density, 3),
    }
    for what, run in (("forward", inference), ("training", training)):
        ours = run(lambda *qkv: attend(*qkv, pattern), leaves)
        ours()  # measures the ways
        masked = run(lambda *qkv: F.scaled_dot_product_attention(*qkv, attn_mask=mask), leaves)
        taken = turns({"mask": masked, "ours": ours}, 3)
        row[f"speedup_{what}"] = ratio(taken, "mask", "ours")
    row["ways"] = [best(seconds) for seconds in list(CHOICES.measurements().values())[-2:]]
    return row


def main() -> None:
    keep_freed_memory()
    rows = [case(shift, dtype) for dtype in (torch.float32, torch.bfloat16) for shift in (0, 4)]
    report(rows, __doc__)


if __name__ == "__main__":
    main()
