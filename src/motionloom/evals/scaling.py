"""Scaling: what a step of pre-training costs in operations, and how a figure falls with them.

Operations are counted where they happen and not estimated from sizes, so that losses which read a clip twice,
crops, teachers and shares of the batch all count as often as they are computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from motionloom.data.batch import Batch
from motionloom.train.method import Method, StepContext, all_modules

FEWEST = 3
"""Budgets that a power law is fitted to."""
APART = 1.1
"""The least ratio of two budgets."""


def step_operations(method: Method, batch: Batch, seed: int, device: torch.device) -> int:
    """Operations of one micro-batch of the first step, forward and backward, on this rank.

    Counted: matrix products, convolutions and attention (as the products that it is made of: of scores and of
    values, twice each on the way back), 2 for each multiply-add. What is computed without gradients (a
    teacher's pass) counts too. Not counted: whatever works on one element at a time (activations, norms,
    softmax, losses), look-ups, and the optimiser, which costs the same whatever the batch.

    The model must not be compiled, or its products could not be seen; the precision does not matter.
    Gradients are thrown away and nothing moves.
    """
    modules = list(all_modules(method).values())
    # Fused kernels are not known on every device to the counter, and compute some of it twice.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        for turn in method.turns(0):
            context = StepContext(seed, 0, 0, 0, device, turn, rehearsal=True)
            method.losses(batch, context).loss_B.mean().backward()
            for module in modules:
                module.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())


@dataclass(frozen=True)
class PowerLaw:
    """loss = a * operations ** b; ``points``: how many it was fitted to."""

    a: float
    b: float
    points: int

    def __call__(self, operations: float) -> float:
        """The loss that it says."""
        return self.a * operations**self.b


def power_law(operations: Sequence[float], losses: Sequence[float]) -> PowerLaw | None:
    """The power law nearest by least squares of log loss over log operations.

    Losses of 0 or less, and what is not finite, have no place on it and are left out. None where fewer than
    `FEWEST` numbers of operations remain that lie `APART`: those of seeds differ by a word of the vocabulary.
    """
    usable = [
        (math.log(x), math.log(y))
        for x, y in zip(operations, losses, strict=True)
        if x > 0 and y > 0 and math.isfinite(x) and math.isfinite(y)
    ]
    budgets: list[float] = []
    for x, _ in sorted(usable):
        if not budgets or x > budgets[-1] + math.log(APART):
            budgets.append(x)
    if len(budgets) < FEWEST:
        return None
    x_N, y_N = np.asarray(usable, np.float64).T
    away_N = x_N - x_N.mean()
    b = float((away_N * (y_N - y_N.mean())).sum() / np.square(away_N).sum())
    try:
        a = math.exp(float(y_N.mean()) - b * float(x_N.mean()))
    except OverflowError:
        return None
    return PowerLaw(a, b, len(usable))


def as_loss(figure: str, value: float) -> float:
    """A figure as what falls to 0 when all is well: rates and SSIM as what is lacking to 1, PSNR (dB) as the
    mean squared error of pixels in [0, 1]; distances and errors as they are."""
    if "psnr" in figure:
        return float(10 ** (-value / 10))
    return 1.0 - value if "oracle" in figure or "ssim" in figure else value


@dataclass(frozen=True)
class Spread:
    """A figure over seeds."""

    mean: float
    low: float
    high: float
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Mean, least and largest of one value or more."""
        return Spread(float(np.mean(values)), min(values), max(values), len(values))


def over_seeds(figures: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    """Each figure over the points that have it."""
    names = dict.fromkeys(name for one in figures for name in one)
    return {name: Spread.of([one[name] for one in figures if name in one]) for name in names}
