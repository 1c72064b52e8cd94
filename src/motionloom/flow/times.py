"""Noise levels: how training draws sigma and which grid of sigmas a solver walks.

sigma is in [0, 1], 1 is pure noise. A *shift* s > 1 moves mass towards the noise (Esser et al. 2024,
2403.03206, eq. 23):  sigma' = s sigma / (1 + (s - 1) sigma).  To translate a foreign recipe:
- shifting by s adds log(s) to logit(sigma): it moves the mean of a logit-normal and nothing else;
- where t = 1 is DATA, a shift of t by s is a shift of sigma by 1 / s, and a logit-normal's mean changes sign.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from motionloom.errors import UserError

FloatOrTensor = TypeVar("FloatOrTensor", float, Tensor)


def shift_sigma(sigma: FloatOrTensor, shift: float) -> FloatOrTensor:
    """sigma' = shift * sigma / (1 + (shift - 1) * sigma). 0 and 1 stay; ``1 / shift`` undoes it."""
    return shift * sigma / (1 + (shift - 1) * sigma)


@dataclass(frozen=True)
class TimeSampling:
    """The law that training sigmas follow.

    ``uniform``: U(0, 1). ``logit_normal``: sigmoid(N(mean, std^2)), Esser et al. 2024, sec. 3.1. The shift
    follows. ``limits`` says how the result is kept in [min, max]: ``truncate`` conditions the law on that
    interval, so no sigma is favoured; ``clamp`` moves what falls outside onto the nearer end, as distillation
    codebases do. ``stratified`` splits the law into as many equal parts as the batch is long and draws once
    from each, in random order: the same law for every sample, a quieter loss.

    Raises UserError for a law that cannot be drawn from.
    """

    distribution: Literal["uniform", "logit_normal"] = "uniform"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    min: float = 0.0
    max: float = 1.0
    limits: Literal["truncate", "clamp"] = "truncate"
    stratified: bool = False

    def __post_init__(self) -> None:
        if self.distribution not in ("uniform", "logit_normal"):
            raise UserError(
                f"time sampling: distribution {self.distribution!r} is unknown; use uniform or logit_normal"
            )
        if self.limits not in ("truncate", "clamp"):
            raise UserError(f"time sampling: limits {self.limits!r} is unknown; use truncate or clamp")
        if not (self.std > 0 and self.shift > 0):
            raise UserError(
                f"time sampling: std ({self.std}) and shift ({self.shift}) must be above 0; 1 means no shift"
            )
        if not 0 <= self.min < self.max <= 1:
            raise UserError(
                f"time sampling: min ({self.min}) and max ({self.max}) must obey 0 <= min < max <= 1"
            )
        if self.cdf(self.max) - self.cdf(self.min) < 1e-4:
            raise UserError(
                f"time sampling: almost no mass lies between min ({self.min}) and max ({self.max}); "
                "widen them or change mean, std or shift"
            )

    def cdf(self, sigma: float) -> float:
        """Probability that a draw, before the limits, is at most ``sigma``."""
        u = shift_sigma(sigma, 1 / self.shift)
        if self.distribution == "uniform" or u <= 0 or u >= 1:
            return u
        z = (math.log(u / (1 - u)) - self.mean) / self.std
        return 0.5 * (1 + math.erf(z / math.sqrt(2)))

    def sample(self, shape: int | Sequence[int], generator: torch.Generator) -> Tensor:
        """Draws sigmas, float32, on the generator's device.

        ``shape`` is (B,) for one per sample or (B, N) for one per chunk or token; the batch is dim 0, and
        each column is stratified by itself.
        """
        u = self._unit_draws((shape,) if isinstance(shape, int) else tuple(shape), generator)
        if self.limits == "truncate":
            low, high = self.cdf(self.min), self.cdf(self.max)
            u = low + u * (high - low)
        if self.distribution == "logit_normal":
            u = torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))
        # With truncate this clamp only mends rounding at the two ends.
        return shift_sigma(u, self.shift).clamp(self.min, self.max)

    def _unit_draws(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        u = torch.rand(shape, generator=generator, device=generator.device)
        if not self.stratified:
            return u
        part = torch.rand(shape, generator=generator, device=generator.device).argsort(0)
        return (part + u) / shape[0]


def sigma_schedule(
    steps: int,
    shift: float = 1.0,
    min: float = 0.0,
    max: float = 1.0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The grid of a solver: steps + 1 float32 sigmas, strictly falling from ``max`` to exactly 0.

    The grid is even before the shift. With ``min`` above 0 the last sigma before 0 is ``min``, for a network
    that was not trained below it. Raises UserError unless steps >= 1, shift > 0 and 0 <= min < max <= 1.
    """
    if steps < 1:
        raise UserError(f"sampling steps must be at least 1, got {steps}")
    if shift <= 0:
        raise UserError(f"the sampling shift must be above 0, got {shift}; 1 means no shift")
    if not 0 <= min < max <= 1:
        raise UserError(f"sampling sigmas must obey 0 <= min < max <= 1, got min {min} and max {max}")
    start, end = shift_sigma(max, 1 / shift), shift_sigma(min, 1 / shift)
    if min == 0:
        grid = torch.linspace(start, 0.0, steps + 1, dtype=torch.float64)
    else:
        grid = torch.cat([torch.linspace(start, end, steps, dtype=torch.float64), torch.zeros(1)])
    # Shifting there and back may be one float64 rounding off; float32 hides it, so that the ends are exact.
    return shift_sigma(grid, shift).to(device=device, dtype=torch.float32)


def warped_steps(steps: Sequence[float], shift: float, train_steps: int = 1000) -> tuple[float, ...]:
    """Few-step lists as distilled models name them: each L becomes shift_sigma(L / train_steps, shift).

    (1000, 750, 500, 250) at shift 5 gives (1, 0.9375, 0.8333, 0.625): CausVid's and Self-Forcing's warped
    list, divided by 1000.
    """
    assert all(0 <= step <= train_steps for step in steps), f"steps {tuple(steps)} exceed {train_steps}"
    return tuple(shift_sigma(step / train_steps, shift) for step in steps)
