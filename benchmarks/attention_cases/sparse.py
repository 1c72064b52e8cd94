"""Own scene dense and one summary frame of each other scene, against dense attention without any mask.

    python benchmarks/attention_cases/sparse.py --json

``speedup`` over SDPA on all pairs, the quickest dense attention there is; ``seen``: the share of pairs left.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from _measure import clip, draw, inference, ratio, report, training, turns

from motionloom.nn.attention import CHOICES, Pattern, attend
from motionloom.nn.attention.choice import best
from motionloom.nn.memory import keep_freed_memory
from motionloom.plans.lower import lower
from motionloom.plans.visibility import scene_summaries


def case(scenes: int, dtype: torch.dtype) -> dict[str, Any]:
    """One row of figures."""
    a = clip((13,) * scenes, 6, 6, 16)
    leaves = draw(1, 8, a.scene_BN.shape[1], 64, dtype)
    pattern = lower(scene_summaries, a, a)
    assert isinstance(pattern, Pattern)
    row: dict[str, Any] = {
        "scenes": scenes,
        "dtype": str(dtype).removeprefix("torch."),
        "seen": round(pattern.plan.density, 3),
    }
    for what, run in (("forward", inference), ("training", training)):
        ours = run(lambda *qkv: attend(*qkv, pattern), leaves)
        ours()  # measures the ways
        taken = turns({"dense": run(F.scaled_dot_product_attention, leaves), "ours": ours}, 3)
        row[f"speedup_{what}"] = ratio(taken, "dense", "ours")
    row["ways"] = [best(seconds) for seconds in list(CHOICES.measurements().values())[-2:]]
    return row


def main() -> None:
    keep_freed_memory()
    rows = [case(scenes, dtype) for dtype in (torch.float32, torch.bfloat16) for scenes in (3, 6)]
    report(rows, __doc__)


if __name__ == "__main__":
    main()
