"""The rollout engine: from noise to latents, under any plan, with any solver and guidance.

Training roll-outs, clips, scenes and streams all come through here, over the plan code that training used.

Shapes: B batch, F token frames, S cells of a frame, C channels of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from motionloom.backbones.prediction import Predictor
from motionloom.flow import PATHS, SOLVERS, DiscreteSchedule, Guidance, sigma_schedule
from motionloom.plans import Geometry, Layout, Plan, Text, keep_given, read_video, to_streams_at

Progress = Callable[[int, int], None]
"""Called with (solver steps done, solver steps in all)."""
Callback = Callable[[int, float, Tensor, Tensor], None]
"""A solver's: (step, sigma, x, clean estimate)."""


@dataclass(frozen=True)
class Sampling:
    """How a rollout walks from noise to data."""

    solver: str = "euler"
    steps: int = 50
    shift: float = 1.0
    path: str = "linear"
    eta: float = 0.0
    guidance: Guidance = field(default_factory=Guidance)
    schedule: DiscreteSchedule | None = None
    """Of a network trained by DDPM: only its own noise levels are visited, and ``shift`` does not apply."""


@dataclass(frozen=True)
class Given:
    """Given frames: their clean tokens (B, F, S, C), anything elsewhere, and which they are (B, F)."""

    clean_BFSC: Tensor
    given_BF: Tensor


@torch.no_grad()
def rollout(
    predictor: Predictor,
    plan: Plan,
    geometry: Geometry,
    text: Text,
    noise_BFSC: Tensor,
    sampling: Sampling,
    *,
    negative: Text | None = None,
    given: Given | None = None,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Tokens (B, F, S, C) float32 that follow ``text``; given frames come back bit-identical.

    Args:
        noise_BFSC: the start, standard normal.
        negative: the text that guidance pushes away from; needed when guidance is active.
        generator: the noise of stochastic solvers, on the device of ``noise_BFSC``.
    """
    given = given or _nothing_given(geometry, noise_BFSC)
    stages = plan.stages(geometry)
    for n, frames in enumerate(stages):
        if bool(given.given_BF[:, frames].all()):
            continue
        report = _reporter(progress, n * sampling.steps, len(stages) * sampling.steps)
        made_BFSC = _solve(
            predictor, plan, geometry, text, noise_BFSC, sampling, negative, given, generator, report
        )
        now_F = torch.zeros_like(given.given_BF[0])
        now_F[frames] = True
        new_BF = now_F & ~given.given_BF
        clean_BFSC = torch.where(new_BF[..., None, None], made_BFSC, given.clean_BFSC)
        given = Given(clean_BFSC, given.given_BF | new_BF)
    return given.clean_BFSC


def _solve(
    predictor: Predictor,
    plan: Plan,
    geometry: Geometry,
    text: Text,
    noise_BFSC: Tensor,
    sampling: Sampling,
    negative: Text | None,
    given: Given,
    generator: torch.Generator | None,
    callback: Callback | None,
) -> Tensor:
    """One stage: every frame that is not given, from noise to data."""
    layout = plan.layout(geometry, text, given.given_BF)
    negative_layout = plan.layout(geometry, negative, given.given_BF) if negative is not None else None

    def velocity(x_BFSC: Tensor, sigma: float) -> Tensor:
        v = _velocity(predictor, layout, text, given.clean_BFSC, x_BFSC, sigma)
        if not sampling.guidance.active(sigma):
            return v
        assert negative is not None, "guidance needs a negative text; the empty caption will do"
        assert negative_layout is not None
        away = _velocity(predictor, negative_layout, negative, given.clean_BFSC, x_BFSC, sigma)
        made_BFS = (~given.given_BF)[..., None].expand(v.shape[:3])
        return sampling.guidance.combine(v, away, sigma, made_BFS)

    solver = SOLVERS[sampling.solver]
    options: dict[str, object] = {"generator": generator} if solver.stochastic else {}
    if sampling.solver == "ddim":
        options["eta"] = sampling.eta
    path = PATHS[sampling.path]
    if sampling.schedule is None:
        start_BFSC, sigmas = noise_BFSC, sigma_schedule(sampling.steps, shift=sampling.shift)
    else:
        start_BFSC = sampling.schedule.start(noise_BFSC, path)
        sigmas = sampling.schedule.grid(sampling.steps, path)
    x_BFSC = solver.run(velocity, start_BFSC, sigmas, path=path, callback=callback, **options)
    return keep_given(layout, given.clean_BFSC, x_BFSC)


def _nothing_given(geometry: Geometry, like_BFSC: Tensor) -> Given:
    given_BF = torch.zeros(geometry.batch, geometry.grid[0], dtype=torch.bool, device=geometry.device)
    return Given(torch.zeros_like(like_BFSC), given_BF)


def _velocity(
    predictor: Predictor, layout: Layout, text: Text, clean_BFSC: Tensor, x_BFSC: Tensor, sigma: float
) -> Tensor:
    """The network's velocity for the clip at one noise level; 0 for frames that are given."""
    sigma_BD = torch.full((x_BFSC.shape[0], layout.num_draws), sigma, device=x_BFSC.device)
    streams = to_streams_at(layout, clean_BFSC, x_BFSC, layout.levels(sigma_BD), text)
    v_BFSC = read_video(layout, predictor.velocity(streams, layout.visibility)["video"])
    return keep_given(layout, torch.zeros_like(v_BFSC), v_BFSC)


def _reporter(progress: Progress | None, done: int, total: int) -> Callback | None:
    if progress is None:
        return None
    return lambda step, sigma, x, clean: progress(done + step + 1, total)
