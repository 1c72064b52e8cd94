"""Attention of several scenes (mask 1) against the two-call method that copies keys per scene.

    python benchmarks/attention_cases/scenes.py --json

``speedup``: of what ``attend`` does of its own accord, forward alone and with the backward pass;
``_best``: of each one's quickest round.
``key_copies``: the keys that it copies at one time, as a share of those that the baseline keeps copies of.
Rows of ``memory_of_scenes``: the most memory beyond the inputs, forward and backward, and per scene.
"""

from __future__ import annotations

from typing import Any

import torch
from _measure import (
    best_ratio,
    clip,
    copied_scene_attention,
    draw,
    inference,
    peak_bytes,
    ratio,
    report,
    training,
    turns,
)

from motionloom.nn.attention import CHOICES, Pattern, attend
from motionloom.nn.attention.choice import best
from motionloom.nn.memory import keep_freed_memory
from motionloom.plans.lower import lower
from motionloom.plans.visibility import same_scene_or_both_video

HEADS, CHANNELS, ROWS, COLUMNS, WORDS = 8, 64, 8, 12, 32
SCENES = {"3 equal": (4,) * 3, "3 unequal": (6, 2, 4), "6 equal": (3,) * 6, "6 unequal": (5, 1, 4, 2, 3, 3)}


def case(name: str, frames: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """One row of figures."""
    a = clip(frames, ROWS, COLUMNS, WORDS)
    leaves = draw(1, HEADS, a.scene_BN.shape[1], CHANNELS, dtype)
    pattern = lower(same_scene_or_both_video, a, a)
    assert isinstance(pattern, Pattern)
    baseline = copied_scene_attention([(WORDS, n * ROWS * COLUMNS) for n in frames])

    def ours(*qkv: torch.Tensor) -> torch.Tensor:
        return attend(*qkv, pattern)

    difference = (ours(*leaves) - baseline(*leaves)).abs().max().item()
    row: dict[str, Any] = {
        "scenes": name,
        "dtype": str(dtype).removeprefix("torch."),
        "difference": difference,
    }
    for what, run in (("forward", inference), ("training", training)):
        run(ours, leaves)()  # measures the ways
        taken = turns({"copies": run(baseline, leaves), "ours": run(ours, leaves)}, 9)
        row[f"speedup_{what}"] = ratio(taken, "copies", "ours")
        row[f"speedup_{what}_best"] = best_ratio(taken, "copies", "ours")
    row["ways"] = [best(seconds) for seconds in list(CHOICES.measurements().values())[-2:]]
    row["key_copies"] = round(copied(pattern, row["ways"][1]) / copied_by_baseline(frames), 4)
    return row


def copied(pattern: Pattern, way: str) -> int:
    """Most keys that one call gathers, by the plan."""
    if "/" not in way:
        return 0
    calls = pattern.plan.calls(way.split("/")[0])
    assert calls is not None
    return max(call.k.index_GN.size if call.k.start is None else 0 for _, some in calls for call in some)


def copied_by_baseline(frames: tuple[int, ...]) -> int:
    """Keys in the copies that it keeps for the backward pass: of the video call all scenes' video once per
    scene and each scene's text, of the text call each scene's own."""
    video = sum(frames) * ROWS * COLUMNS
    return len(frames) * (video + WORDS) + video + len(frames) * WORDS


def memory() -> list[dict[str, Any]]:
    """Most bytes beyond the inputs, forward and backward, by the number of equal scenes."""
    rows = []
    for scenes in (2, 4, 8):
        frames = (2,) * scenes
        a = clip(frames, ROWS, COLUMNS, WORDS)
        leaves = draw(1, HEADS, a.scene_BN.shape[1], CHANNELS, torch.float32)
        pattern = lower(same_scene_or_both_video, a, a)
        baseline = copied_scene_attention([(WORDS, 2 * ROWS * COLUMNS)] * scenes)
        training(lambda *qkv, p=pattern: attend(*qkv, p), leaves)()
        ours = peak_bytes(training(lambda *qkv, p=pattern: attend(*qkv, p), leaves))
        copies = peak_bytes(training(baseline, leaves))
        rows.append(
            {
                "memory_of_scenes": scenes,
                "ours_mb": round(ours / 1e6, 1),
                "ours_mb_per_scene": round(ours / 1e6 / scenes, 2),
                "copies_mb": round(copies / 1e6, 1),
                "copies_mb_per_scene": round(copies / 1e6 / scenes, 2),
            }
        )
    return rows


def main() -> None:
    rows = memory()
    keep_freed_memory()
    for dtype in (torch.float32, torch.bfloat16):
        rows += [case(name, frames, dtype) for name, frames in SCENES.items()]
    report(rows, __doc__)


if __name__ == "__main__":
    main()
