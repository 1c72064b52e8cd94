"""Solvers: walk a state from noise to data along dx/dsigma = v(x, sigma).

Every solver is a pure function ``(velocity_fn, x, sigmas, *, path, callback) -> x``:
  velocity_fn  (x, sigma) -> v at the state x, in the dtype of the x given; sigma is a Python float
  x            the state at sigmas[0], any shape
  sigmas       strictly falling floats or a tensor (``sigma_schedule``), as a rule from 1 to exactly 0
  callback     called in each step with (step, sigma, x, clean estimate): previews, trajectories, progress
Between steps the state is float32 (float64 if x is), whatever the network computes in; the result has the
dtype of x. Gradients flow if the caller lets them. Guidance, conditions and caches belong in velocity_fn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from motionloom.flow.paths import LINEAR, Path, widen

VelocityFn = Callable[[Tensor, float], Tensor]
Callback = Callable[[int, float, Tensor, Tensor], None]


def euler(
    velocity_fn: VelocityFn,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    path: Path = LINEAR,
    callback: Callback | None = None,
) -> Tensor:
    """x' = x + (sigma' - sigma) v. First order, one evaluation per step (Liu et al. 2022, 2209.03003)."""
    state, grid = widen(x), _grid(sigmas)
    for i, sigma in enumerate(grid[:-1]):
        v = _velocity(velocity_fn, state, sigma, x.dtype)
        _report(callback, i, sigma, state, v, path)
        state = state + (grid[i + 1] - sigma) * v
    return state.to(x.dtype)


def heun(
    velocity_fn: VelocityFn,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    path: Path = LINEAR,
    callback: Callback | None = None,
) -> Tensor:
    """The trapezoidal rule on an Euler guess. Second order, two evaluations per step.

    Karras et al. 2022 (2206.00364, alg. 1) end with an Euler step because their slope is 0 / 0 at sigma = 0.
    A flow's velocity is finite there: the last step is a true Heun step, which asks the network at exactly 0.
    """
    state, grid = widen(x), _grid(sigmas)
    for i, sigma in enumerate(grid[:-1]):
        step = grid[i + 1] - sigma
        v = _velocity(velocity_fn, state, sigma, x.dtype)
        _report(callback, i, sigma, state, v, path)
        v_next = _velocity(velocity_fn, state + step * v, grid[i + 1], x.dtype)
        state = state + step * (v + v_next) / 2
    return state.to(x.dtype)


def dpmpp_2m(
    velocity_fn: VelocityFn,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    path: Path = LINEAR,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2M): second order with one evaluation per step (Lu et al. 2022, 2211.01095, alg. 2).

    In lambda = log(a / s) the flow reads x' / s' = x / s + integral of e^lambda clean dlambda, so that
    x' = (s' / s) x + a' (1 - e^-h) D; h = lambda' - lambda and D extrapolates the clean estimate by h / 2.
    lambda is infinite at sigma 1 and 0. A step that touches an end is first order (D = clean), as is the one
    after a start at 1, whose h_prev is infinite. Beside an end h does not shrink with the grid: from 1 to 0
    the error falls as step^2 log(1 / step), between inner sigmas as step^2.
    """
    state, grid = widen(x), _grid(sigmas)
    a, s = _coefficients(path, grid)
    log_snr = [_log_ratio(*pair) for pair in zip(a, s, strict=True)]
    clean_prev, h_prev = None, math.inf
    for i, sigma in enumerate(grid[:-1]):
        v = _velocity(velocity_fn, state, sigma, x.dtype)
        _report(callback, i, sigma, state, v, path)
        clean = path.to_clean(state, v, sigma)
        h = log_snr[i + 1] - log_snr[i]
        estimate = clean
        if clean_prev is not None and h < math.inf:
            estimate = clean + h / (2 * h_prev) * (clean - clean_prev)
        state = s[i + 1] / s[i] * state - a[i + 1] * math.expm1(-h) * estimate
        clean_prev, h_prev = clean, h
    return state.to(x.dtype)


def ddim(
    velocity_fn: VelocityFn,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    path: Path = LINEAR,
    callback: Callback | None = None,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """x' = a' clean + sqrt(s'^2 - tau^2) noise + tau z (Song et al. 2020, 2010.02502, eq. 12).

    One evaluation per step. Their tau, carried from x_vp to x, is eta s' sqrt(1 - (a s' / a' s)^2): eta = 0
    is deterministic and on the linear path Euler itself, eta = 1 is DDPM's ancestral sampler. eta > 0 needs
    ``generator``, on x's device.
    """
    assert eta == 0 or generator is not None, "ddim with eta > 0 draws noise and needs a generator"
    state, grid = widen(x), _grid(sigmas)
    a, s = _coefficients(path, grid)
    for i, sigma in enumerate(grid[:-1]):
        v = _velocity(velocity_fn, state, sigma, x.dtype)
        _report(callback, i, sigma, state, v, path)
        clean, noise = path.to_clean(state, v, sigma), path.to_noise(state, v, sigma)
        tau = eta * s[i + 1] * math.sqrt(1 - (a[i] * s[i + 1] / (a[i + 1] * s[i])) ** 2)
        state = a[i + 1] * clean + math.sqrt(max(s[i + 1] ** 2 - tau**2, 0.0)) * noise
        if tau > 0:
            state = state + tau * _noise_like(state, generator)
    return state.to(x.dtype)


def consistency(
    velocity_fn: VelocityFn,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    path: Path = LINEAR,
    callback: Callback | None = None,
    generator: torch.Generator,
) -> Tensor:
    """Jump to the clean estimate, noise it afresh to the next sigma, repeat (Song et al. 2023, 2303.01469).

    For few-step distilled networks, whose clean estimate is a sample; on an undistilled network it does not
    converge to the data. ``generator`` is on x's device.
    """
    state, grid = widen(x), _grid(sigmas)
    for i, sigma in enumerate(grid[:-1]):
        v = _velocity(velocity_fn, state, sigma, x.dtype)
        _report(callback, i, sigma, state, v, path)
        state = path.to_clean(state, v, sigma)
        if grid[i + 1] > 0:
            state = path.mix(state, _noise_like(state, generator), grid[i + 1])
    return state.to(x.dtype)


def _grid(sigmas: Tensor | Sequence[float]) -> list[float]:
    grid = [float(s) for s in (sigmas.tolist() if isinstance(sigmas, Tensor) else sigmas)]
    assert len(grid) >= 2, f"a solver needs at least two sigmas, got {grid}"
    assert all(now > after for now, after in pairwise(grid)), f"sigmas must fall strictly, got {grid}"
    assert all(0 <= sigma <= 1 for sigma in grid), f"sigmas must lie in [0, 1], got {grid}"
    return grid


def _coefficients(path: Path, grid: list[float]) -> tuple[list[float], list[float]]:
    a, s, _, _ = path.coefficients(torch.tensor(grid, dtype=torch.float64))
    return a.tolist(), s.tolist()


def _log_ratio(a: float, s: float) -> float:
    if a == 0:
        return -math.inf
    return math.log(a / s) if s > 0 else math.inf


def _velocity(velocity_fn: VelocityFn, state: Tensor, sigma: float, dtype: torch.dtype) -> Tensor:
    return velocity_fn(state.to(dtype), sigma).to(state.dtype)


def _noise_like(state: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(state.shape, generator=generator, device=state.device, dtype=state.dtype)


def _report(callback: Callback | None, step: int, sigma: float, state: Tensor, v: Tensor, path: Path) -> None:
    if callback is not None:
        callback(step, sigma, state, path.to_clean(state, v, sigma))


class Solver(NamedTuple):
    """A solver, its network evaluations per step, and whether it takes a ``generator`` (bind it first)."""

    run: Callable[..., Tensor]
    evaluations: int
    stochastic: bool


SOLVERS: dict[str, Solver] = {
    "euler": Solver(euler, 1, stochastic=False),
    "heun": Solver(heun, 2, stochastic=False),
    "dpmpp_2m": Solver(dpmpp_2m, 1, stochastic=False),
    "ddim": Solver(ddim, 1, stochastic=True),
    "consistency": Solver(consistency, 1, stochastic=True),
}
