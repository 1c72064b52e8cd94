"""Exact softmax attention, by the quickest way on the device at hand.

A backbone calls :func:`attend` with what ``plans.lower`` gave it and knows nothing else.

- ``dense.py``: SDPA and plain matrix products, with or without a mask.
- ``kernels.py``: unmasked attention that also returns its log-sum-exp, and its backward pass.
- ``regions.py``: which queries see which keys, as a few rectangles without holes.
- ``pattern.py``: the same rule in every form that one of the ways computes with.
- ``merge.py``: rectangles computed one by one and merged by their log-sum-exp.
- ``flex.py``: the rule as a FlexAttention block mask.
- ``choice.py``: the ways that apply, measured once and remembered.
- ``dispatch.py``: the call itself, eager or compiled.
"""

from motionloom.nn.attention.choice import CHOICES, Choices, pinned
from motionloom.nn.attention.dense import (
    fused_attention,
    join_heads,
    matmul_attention,
    prepare_mask,
    split_heads,
)
from motionloom.nn.attention.dispatch import attend
from motionloom.nn.attention.pattern import Pattern

__all__ = [
    "CHOICES",
    "Choices",
    "Pattern",
    "attend",
    "fused_attention",
    "join_heads",
    "matmul_attention",
    "pinned",
    "prepare_mask",
    "split_heads",
]
