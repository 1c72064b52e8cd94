"""The rollout engine: from noise to latents, under any plan, with any solver and guidance.

Training roll-outs, clips, scenes and streams all come through here, over the plan code that training used.
A plan of several stages runs from a cache where plan and backbone know one: each stage then costs its own
tokens, and one clean pass when it is done. Elsewhere all frames are computed under the plan's mask, which
gives the same clip: solvers walk, and draw noise for, the frames of the stage alone either way.

Shapes: B batch, F token frames, S cells of a frame, C channels of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from motionloom.backbones.base import CachingBackbone
from motionloom.backbones.prediction import Predictor
from motionloom.flow import PATHS, SOLVERS, DiscreteSchedule, Guidance, sigma_schedule
from motionloom.nn.cache import KVCache
from motionloom.plans import (
    Geometry,
    Layout,
    Plan,
    StreamedPlan,
    Text,
    keep_given,
    read_video,
    to_streams_at,
)

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
    """Of a network trained by DDPM: only its own noise levels are visited, and ``shift`` does not apply. A
    backbone that has a schedule of its own keeps to that one."""


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
    prompts = [text] if negative is None or sampling.guidance.scale == 1.0 else [text, negative]
    given = given or _nothing_given(geometry, noise_BFSC)
    clean_BFSC, given_BF = given.clean_BFSC, given.given_BF
    stages = plan.stages(geometry)
    caches = _caches(predictor, plan, len(stages), len(prompts))
    for n, frames in enumerate(stages):
        for cache in caches:
            cache.begin(n)
        if not bool(given_BF[:, frames].all()):
            view = _view(plan, geometry, prompts, caches, noise_BFSC, clean_BFSC, given_BF, frames)
            report = _reporter(progress, n * sampling.steps, len(stages) * sampling.steps)
            made_BFSC = _solve(predictor, view, sampling, generator, report)
            clean_BFSC = _put(clean_BFSC, frames, made_BFSC)
            given_BF = _put(given_BF, frames, torch.ones_like(given_BF[:, frames]))
        if caches and n + 1 < len(stages):
            # A clean pass, so that later chunks look at what was made and not at its noise.
            nothing_BF = torch.zeros_like(given_BF)
            view = _view(plan, geometry, prompts, caches, noise_BFSC, clean_BFSC, nothing_BF, frames)
            for i, cache in enumerate(caches):
                _velocity(predictor, view, i, view.clean_BFSC, 0.0)
                cache.commit()
    return clean_BFSC


@dataclass(frozen=True)
class _View:
    """What the network is shown: a stage alone in front of its caches, or all frames under a mask."""

    prompts: list[Text]
    layouts: list[Layout]
    """One per prompt, like the caches."""
    caches: list[KVCache]
    """Empty: no cache, all frames."""
    noise_BFSC: Tensor
    """The start; frames of later stages, which this one does not see, stay at it."""
    clean_BFSC: Tensor
    given_BF: Tensor
    stage: slice
    """The frames that a solver walks over."""


def _view(
    plan: Plan,
    geometry: Geometry,
    prompts: list[Text],
    caches: list[KVCache],
    noise_BFSC: Tensor,
    clean_BFSC: Tensor,
    given_BF: Tensor,
    frames: slice,
) -> _View:
    if caches:
        assert isinstance(plan, StreamedPlan)
        noise_BFSC, clean_BFSC, given_BF = (t[:, frames] for t in (noise_BFSC, clean_BFSC, given_BF))
        layout = plan.stage_layout(geometry.part(frames), given_BF if bool(given_BF.any()) else None)
        layouts, frames = [layout] * len(prompts), slice(0, given_BF.shape[1])
    else:
        layouts = [plan.layout(geometry, text, given_BF) for text in prompts]
    return _View(prompts, layouts, caches, noise_BFSC, clean_BFSC, given_BF, frames)


def _caches(predictor: Predictor, plan: Plan, stages: int, prompts: int) -> list[KVCache]:
    """One for each prompt, since its words reach the keys of the video; none where there is one stage only,
    or the plan or the backbone knows no cache."""
    backbone = predictor.backbone
    if stages == 1 or not isinstance(plan, StreamedPlan) or not isinstance(backbone, CachingBackbone):
        return []
    return [backbone.new_cache(window=plan.window, sinks=plan.sinks) for _ in range(prompts)]


def _solve(
    predictor: Predictor,
    view: _View,
    sampling: Sampling,
    generator: torch.Generator | None,
    callback: Callback | None,
) -> Tensor:
    """One stage, from noise to data; its frames that are given stay."""
    made_BF1 = ~view.given_BF[:, view.stage, None]

    def velocity(x_BFSC: Tensor, sigma: float) -> Tensor:
        v = _velocity(predictor, view, 0, x_BFSC, sigma)
        if not sampling.guidance.active(sigma):
            return v
        assert len(view.prompts) == 2, "guidance needs a negative text; the empty caption will do"
        away = _velocity(predictor, view, 1, x_BFSC, sigma)
        return sampling.guidance.combine(v, away, sigma, made_BF1.expand(v.shape[:3]))

    solver = SOLVERS[sampling.solver]
    options: dict[str, object] = {"generator": generator} if solver.stochastic else {}
    if sampling.solver == "ddim":
        options["eta"] = sampling.eta
    path = PATHS[sampling.path]
    # A network that only ever saw certain noise levels is not asked at others, whatever the recipe says.
    schedule = predictor.schedule or sampling.schedule
    noise_BFSC = view.noise_BFSC[:, view.stage]
    if schedule is None:
        start_BFSC, sigmas = noise_BFSC, sigma_schedule(sampling.steps, shift=sampling.shift)
    else:
        start_BFSC, sigmas = schedule.start(noise_BFSC, path), schedule.grid(sampling.steps, path)
    x_BFSC = solver.run(velocity, start_BFSC, sigmas, path=path, callback=callback, **options)
    x_BFSC = _put(view.noise_BFSC, view.stage, x_BFSC)
    return keep_given(view.layouts[0], view.clean_BFSC, x_BFSC)[:, view.stage]


def _put(t_BF: Tensor, frames: slice, part: Tensor) -> Tensor:
    """A copy with some frames in exchange."""
    return torch.cat([t_BF[:, : frames.start], part, t_BF[:, frames.stop :]], dim=1)


def _nothing_given(geometry: Geometry, like_BFSC: Tensor) -> Given:
    given_BF = torch.zeros(geometry.batch, geometry.grid[0], dtype=torch.bool, device=geometry.device)
    return Given(torch.zeros_like(like_BFSC), given_BF)


def _velocity(predictor: Predictor, view: _View, prompt: int, x_BFSC: Tensor, sigma: float) -> Tensor:
    """The network's velocity for the stage at one noise level; 0 for frames that are given."""
    layout, text = view.layouts[prompt], view.prompts[prompt]
    x_BFSC = _put(view.noise_BFSC, view.stage, x_BFSC)
    sigma_BD = torch.full((x_BFSC.shape[0], layout.num_draws), sigma, device=x_BFSC.device)
    streams = to_streams_at(layout, view.clean_BFSC, x_BFSC, layout.levels(sigma_BD), text)
    cache = view.caches[prompt] if view.caches else None
    v_BFSC = read_video(layout, predictor.velocity(streams, layout.visibility, cache)["video"])
    return keep_given(layout, torch.zeros_like(v_BFSC), v_BFSC)[:, view.stage]


def _reporter(progress: Progress | None, done: int, total: int) -> Callback | None:
    if progress is None:
        return None
    return lambda step, sigma, x, clean: progress(done + step + 1, total)
