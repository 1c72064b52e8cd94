"""What ``train.objective`` asks for, said as a velocity loss: a path, a law of noise levels, and a weight.

Every objective here is a mean of weight(sigma) * ||v_hat - v||^2 on a path x = a clean + s noise. With W = a
s' - a' s, a velocity error d is a clean error of (s / W) d and a noise error of (a / W) d, both at the same
state x.

To that ``flow_matching.direction`` adds 1 - cos(v_hat, v) over the channels of each latent cell, by which
LightningDiT (2501.01423, section 4) learns faster.

``flow``      sigma from ``flow_matching.times``; weight from ``flow_matching.weighting``.
``ddpm_eps``  t ~ U{0 .. T-1}, and sigma_t the level with DDPM's signal-to-noise ratio (``flow/convert.py``:
              the state is DDPM's up to a known factor). DDPM's loss ||eps_hat - eps||^2 is then the weight
              (a / W)^2.
``ddpm_v``    the same draws. v of Salimans & Ho is (a noise - s clean) / n with n^2 = a^2 + s^2, so its error
              is (a^2 + s^2) / (n W) * d, and ||v_hat - v||^2 the weight n^2 / W^2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from motionloom.config.recipe import FlowMatchingConfig, Recipe
from motionloom.flow import LINEAR, PATHS, WEIGHTINGS, DiscreteSchedule, Path, TimeSampling
from motionloom.flow.convert import state_norm

MOST_GAIN = 20.0
"""How much a network's own error may be magnified on its way into the loss."""

Law = Callable[[tuple[int, int], torch.Generator], Tensor]
Weight = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Objective:
    """``draw((B, D), generator)`` -> sigmas on the generator's device; ``weight(sigma)`` of any shape."""

    path: Path
    draw: Law
    weight: Weight


def objective(recipe: Recipe, own: DiscreteSchedule | None = None) -> Objective:
    """The objective of a recipe.

    Args:
        own: the backbone's own schedule, which ``ddpm_*`` then draws from instead of the recipe's.
    """
    fm = recipe.flow_matching
    if recipe.train.objective == "flow":
        path = PATHS[fm.path]
        # Stratified: the same law for every sample, and each batch covers all of it.
        law = TimeSampling(fm.times, fm.mean, fm.std, fm.shift, fm.t_min, fm.t_max, stratified=True)
        return _steady(recipe, path, law.sample, _flow_weight(fm, path))
    schedule = own or DiscreteSchedule(**recipe.diffusion.schedule_terms)
    weight = WEIGHTINGS["noise_equivalent"] if recipe.train.objective == "ddpm_eps" else _v_equivalent
    return _steady(recipe, LINEAR, schedule.sample, weight)


def _flow_weight(fm: FlowMatchingConfig, path: Path) -> Weight:
    weights: dict[str, Weight] = {
        "uniform": WEIGHTINGS["uniform"],
        "min_snr": partial(WEIGHTINGS["min_snr"], gamma=fm.min_snr_gamma, path=path),
        "eps": partial(WEIGHTINGS["noise_equivalent"], path=path),
        "bell": partial(WEIGHTINGS["bell"], shift=fm.shift),
        "cosmap": WEIGHTINGS["cosmap"],
    }
    return weights[fm.weighting]


def _v_equivalent(sigma: Tensor) -> Tensor:
    return state_norm(sigma, LINEAR) ** 2


def _steady(recipe: Recipe, path: Path, law: Law, weight: Weight) -> Objective:
    """A network that predicts clean data has its error divided by s on the way to a velocity (noise: by a).

    Near that end a rounding error would outweigh the whole batch, so weight x gain^2 is held at
    ``MOST_GAIN``^2 (JiT, 2511.13720, does it by keeping s >= 0.05 in the division). Losses that are finite by
    themselves, such as eps with a noise prediction, are not touched.
    """
    if recipe.model.prediction == "velocity":
        return Objective(path, law, weight)
    inverse_gain_sq = WEIGHTINGS[
        "sigma_squared" if recipe.model.prediction == "clean" else "noise_equivalent"
    ]

    def steady(sigma: Tensor) -> Tensor:
        return torch.minimum(weight(sigma), MOST_GAIN**2 * inverse_gain_sq(sigma, path=path))

    return Objective(path, law, steady)
