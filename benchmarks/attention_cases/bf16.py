"""bfloat16 attention without a mask on a CPU: matrix products where they win, against SDPA.

    python benchmarks/attention_cases/bf16.py --json

``speedup`` over SDPA by shape: (batch, heads, queries, keys, channels), from windows to long sequences.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from _measure import DEVICE, draw, inference, ratio, report, training, turns

from motionloom.nn.attention import attend
from motionloom.nn.memory import keep_freed_memory

SHAPES = (
    (256, 8, 64, 64, 64),
    (448, 8, 16, 16, 64),
    (16, 8, 256, 256, 64),
    (1, 8, 1024, 1024, 64),
    (1, 8, 4096, 128, 64),
    (1, 8, 2048, 512, 128),
    (1, 6, 2048, 2048, 64),
    (1, 6, 2048, 2048, 128),
    (1, 4, 4096, 4096, 64),
    (4, 8, 96, 1536, 64),
)


def case(shape: tuple[int, int, int, int, int]) -> dict[str, Any]:
    """One row of figures."""
    batch, heads, queries, keys, channels = shape
    leaves = draw(batch, heads, queries, channels, torch.bfloat16, keys)
    exact = F.scaled_dot_product_attention(*(t.detach().float() for t in leaves))
    row: dict[str, Any] = {"shape": shape}
    for name, attention in (("ours", attend), ("sdpa", F.scaled_dot_product_attention)):
        row[f"error_{name}"] = round((attention(*leaves).detach() - exact).abs().max().item(), 5)
    for what, run in (("forward", inference), ("training", training)):
        run(attend, leaves)()  # measures the ways
        taken = turns({"sdpa": run(F.scaled_dot_product_attention, leaves), "ours": run(attend, leaves)}, 5)
        row[f"speedup_{what}"] = ratio(taken, "sdpa", "ours")
    return row


def main() -> None:
    keep_freed_memory()
    report([case(shape) for shape in SHAPES] if DEVICE.type == "cpu" else [], __doc__)


if __name__ == "__main__":
    main()
