"""Loss weights as functions of sigma.

Each weight multiplies the squared error of the VELOCITY, ||v_hat - v||^2, one per token or sample. On a path
with x = a clean + s noise and W = a s' - a' s, a velocity error is a clean error times W / s and a noise
error times W / a. So a loss on clean data is a velocity loss of weight (s / W)^2, one on noise of (a / W)^2,
and a paper's factor that is infinite at one end is finite here: nothing divides by sigma.

Every function maps sigma (a float tensor of any shape, in [0, 1]) to weights of that shape, float32 at least.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from motionloom.flow.paths import LINEAR, Path, widen
from motionloom.flow.times import shift_sigma


def uniform(sigma: Tensor) -> Tensor:
    """1: the plain velocity loss of flow matching (Lipman et al. 2022, 2210.02747)."""
    return torch.ones_like(widen(sigma))


def sigma_squared(sigma: Tensor, path: Path = LINEAR) -> Tensor:
    """(s / W)^2, on the linear path sigma^2: the loss becomes the squared error of the clean data."""
    return (path.coefficients(widen(sigma)).s / path.wronskian) ** 2


def noise_equivalent(sigma: Tensor, path: Path = LINEAR) -> Tensor:
    """(a / W)^2: the loss becomes the epsilon loss of DDPM (Ho et al. 2020, 2006.11239, eq. 14)."""
    return (path.coefficients(widen(sigma)).a / path.wronskian) ** 2


def min_snr(sigma: Tensor, gamma: float = 5.0, path: Path = LINEAR) -> Tensor:
    """min(SNR, gamma) on the clean-data loss, SNR = (a / s)^2 (Hang et al. 2023, 2303.09556, sec. 3.4).

    As a velocity weight: (s / W)^2 min((a / s)^2, gamma) = min(a^2, gamma s^2) / W^2.
    """
    a, s, _, _ = path.coefficients(widen(sigma))
    return torch.minimum(a**2, gamma * s**2) / path.wronskian**2


def logit_normal(sigma: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """The density of sigmoid(N(mean, std^2)) (Esser et al. 2024, 2403.03206, sec. 3.1); 0 at both ends.

    Under uniform sigmas this has the same expected loss as drawing sigma from the law itself.
    """
    sigma = widen(sigma)
    eps = torch.finfo(sigma.dtype).eps
    inner = sigma.clamp(eps, 1 - eps)
    z = (torch.logit(inner) - mean) / std
    density = torch.exp(-0.5 * z**2) / (std * math.sqrt(2 * math.pi) * inner * (1 - inner))
    return torch.where((sigma <= 0) | (sigma >= 1), 0.0, density)


def cosmap(sigma: Tensor) -> Tensor:
    """2 / (pi (1 - 2 sigma + 2 sigma^2)): the sigmas of a cosine schedule (Esser et al. 2024, sec. 3.1)."""
    sigma = widen(sigma)
    return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))


def bell(sigma: Tensor, shift: float = 1.0) -> Tensor:
    """A bell around sigma = 1/2 that is 0 at sigma = 1 and has mean 1 over the training grid.

    exp(-2 (sigma - 1/2)^2), less its least value on the grid of 1000 shifted sigmas and divided by its mean
    there: the training weight of the flow-matching scheduler that the Wan family's public trainers
    (DiffSynth-Studio, CausVid, Self-Forcing) share. ``shift`` is the shift that training draws its sigmas
    with.
    """
    low, mean = _bell_grid(shift)
    return ((_raw_bell(widen(sigma)) - low) / mean).clamp_min(0)


def _raw_bell(sigma: Tensor) -> Tensor:
    return torch.exp(-2 * (sigma - 0.5) ** 2)


@lru_cache(maxsize=16)
def _bell_grid(shift: float) -> tuple[float, float]:
    grid = shift_sigma(1 - torch.arange(1000, dtype=torch.float64) / 1000, shift)
    raw = _raw_bell(grid)
    low = float(raw.min())
    return low, float(raw.mean()) - low


WEIGHTINGS: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform,
    "sigma_squared": sigma_squared,
    "noise_equivalent": noise_equivalent,
    "min_snr": min_snr,
    "logit_normal": logit_normal,
    "cosmap": cosmap,
    "bell": bell,
}
