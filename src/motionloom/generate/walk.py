"""One stage from noise to data: what the network is shown, what it answers, and the solver's way.

Sound and picture walk together: a solver sees one long state.

Shapes: B batch, F token frames, S cells of a frame, C channels of a token, M numbers of a sample's state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from motionloom.backbones.prediction import Predictor
from motionloom.flow import PATHS, SOLVERS, Guidance, Pass
from motionloom.generate.task import Sampling, Task, Tokens, put
from motionloom.nn.cache import KVCache
from motionloom.plans import (
    Given,
    Layout,
    Plan,
    Stage,
    StreamedPlan,
    Text,
    keep_given,
    read_clip,
    speed,
    start,
    to_streams_at,
)
from motionloom.plans.tokens import Mix

Watch = Callable[[int, float, Tokens, Tokens], None]
"""Called in each step with (step, sigma, states, clean estimates), of the walked frames by modality."""


class Trained(NamedTuple):
    """How a stage is walked while a student is trained."""

    exit_step: int | None = None
    """After so many steps the network's clean estimate is the answer; None: at the end of the grid."""
    graph: bool = False
    """Whether that estimate has a graph; nothing before it ever has."""


SAMPLED = Trained()
"""All steps, and no graph."""


@dataclass(frozen=True)
class View:
    """What the network is shown: a stage alone in front of its caches, or all frames under a mask."""

    task: Task
    """Cut to what is shown."""
    passes: Mapping[str, Pass]
    layouts: Mapping[str, Layout]
    """By name of pass, like the caches."""
    caches: Mapping[str, KVCache]
    """Empty: no cache, all frames."""
    walked: Stage
    """The frames, of those that are shown, that a solver walks over."""

    @property
    def walks(self) -> bool:
        """Whether anything of the stage is left to make."""
        layout = self.layouts["cond"]
        if all(track.all_made for track in layout.tracks.values()):
            return True  # known without asking the device
        return any(bool((speed(layout, m)[:, frames] > 0).any()) for m, frames in self.walked.items())


def view_all(plan: Plan, task: Task, guidance: Guidance, stage: Stage) -> View:
    """All frames under the plan's mask, of which a stage is walked."""
    passes = {one.name: one for one in guidance.passes()}
    layouts = {
        name: plan.layout(task.sample, _text(task, one), _as_given(task, one)) for name, one in passes.items()
    }
    return View(task, passes, layouts, {}, stage)


def view_stage(plan: StreamedPlan, task: Task, guidance: Guidance, caches: Mapping[str, KVCache]) -> View:
    """A stage alone, in front of the caches of its past; ``task`` is cut to it."""
    passes = {one.name: one for one in guidance.passes()}
    layouts = {name: plan.stage_layout(task.sample, _as_given(task, one)) for name, one in passes.items()}
    walked = {m: slice(0, geometry.grid[0]) for m, geometry in task.sample.tracks.items()}
    return View(task, passes, layouts, caches, walked)


def walk(
    predictor: Predictor,
    view: View,
    sampling: Sampling,
    generator: torch.Generator | None,
    watch: Watch | None = None,
    trained: Trained = SAMPLED,
) -> Tokens:
    """The walked frames, made; what is given of them stays."""
    task, path, layout = view.task, PATHS[sampling.path], view.layouts["cond"]
    clean, noise = task.clean.clean, task.noise
    modalities = list(view.walked)
    begin = {m: start(layout, m, clean[m], noise[m], path.mix) for m in modalities}
    shapes = {m: begin[m][:, view.walked[m]].shape[1:] for m in modalities}

    def join(tokens: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([tokens[m].flatten(1) for m in modalities], dim=1)

    def split(x_BM: Tensor) -> Tokens:
        parts = x_BM.split([shapes[m].numel() for m in modalities], dim=1)
        return {m: part.unflatten(1, shapes[m]) for m, part in zip(modalities, parts, strict=True)}

    def velocity(x_BM: Tensor, sigma: float) -> Tensor:
        walked = split(x_BM)
        x = {m: put(begin[m], view.walked[m], walked[m]) for m in modalities}
        with torch.set_grad_enabled(trained.graph and sigma == last):
            if torch.is_grad_enabled():
                # Words that a pass without gradients left there would not learn.
                for cache in view.caches.values():
                    cache.drop("text")
            found = {
                one.name: evaluate(predictor, view, one, x, sigma) for one in sampling.guidance.passes(sigma)
            }
            return join(
                {m: _guided(sampling.guidance, layout, m, found, sigma, view.walked) for m in modalities}
            )

    def tell(step: int, sigma: float, x_BM: Tensor, clean_BM: Tensor) -> None:
        assert watch is not None
        watch(step, sigma, split(x_BM), split(clean_BM))

    solver = SOLVERS[sampling.solver]
    options: dict[str, object] = {"generator": generator} if solver.stochastic else {}
    if sampling.solver == "ddim":
        options["eta"] = sampling.eta
    # A network that only ever saw certain noise levels is not asked at others, whatever the recipe says; a
    # student of few steps saw its own.
    schedule = predictor.schedule or sampling.schedule
    x_BM = join({m: begin[m][:, view.walked[m]] for m in modalities})
    if schedule is not None:
        x_BM = schedule.start(x_BM, path)
    if schedule is None or sampling.sigmas:
        sigmas = list(sampling.grid)
    else:
        sigmas = schedule.grid(sampling.walk_steps, path).tolist()
    if trained.exit_step is not None:
        sigmas = [*sigmas[: trained.exit_step + 1], 0.0]
    last = sigmas[-2]
    with torch.set_grad_enabled(trained.graph):
        made = split(
            solver.run(velocity, x_BM, sigmas, path=path, callback=tell if watch else None, **options)
        )
        return _with_given(view, clean, begin, made)


def _with_given(view: View, clean: Mapping[str, Tensor], begin: Tokens, made: Tokens) -> Tokens:
    layout, modalities = view.layouts["cond"], list(view.walked)
    whole = {m: put(begin[m], view.walked[m], made[m]) for m in modalities}
    return {m: keep_given(layout, m, clean[m], whole[m])[:, view.walked[m]] for m in modalities}


def evaluate(predictor: Predictor, view: View, one: Pass, x: Mapping[str, Tensor], sigma: float) -> Tokens:
    """The network's velocity for the walked frames in one pass at one noise level."""
    layout, task = view.layouts[one.name], view.task
    mix = predictor.path.mix
    if one.without is not None:
        x = {m: _unknown(view, one, m, x_BFSC, sigma, mix) for m, x_BFSC in x.items()}
    levels = {
        m: track.sigmas(torch.full((len(x[m]), track.num_draws), sigma, device=x[m].device))
        for m, track in layout.tracks.items()
    }
    streams = to_streams_at(layout, task.clean, x, task.noise, levels, _text(task, one), mix)
    cache = view.caches.get(one.name)
    out = predictor.velocity(streams, layout.visibility, cache, perturb=one.perturb)
    return {m: read_clip(layout, m, out[m])[:, view.walked[m]] for m in layout.tracks}


def _text(task: Task, one: Pass) -> Text:
    if not one.negative:
        return task.text
    assert task.negative is not None, "guidance needs a negative text; the empty caption will do"
    return task.negative


def _as_given(task: Task, one: Pass) -> Given:
    return task.given if one.without is None else task.without[one.without]


def _guided(
    guidance: Guidance,
    layout: Layout,
    modality: str,
    found: Mapping[str, Tokens],
    sigma: float,
    walked: Stage,
) -> Tensor:
    """The guided velocity of one modality's walked frames: 0 for what is given, less for hints."""
    predictions = {name: tokens[modality] for name, tokens in found.items()}
    if layout.tracks[modality].all_made:
        return guidance.combine(predictions, sigma, None, modality)
    share = speed(layout, modality)[:, walked[modality]]
    made_BFS = (share[..., 0] > 0).expand(predictions["cond"].shape[:3])
    v = guidance.combine(predictions, sigma, made_BFS, modality)
    return torch.where(share == 0, 0.0, v * share)


def _unknown(view: View, one: Pass, modality: str, x_BFSC: Tensor, sigma: float, mix: Mix) -> Tensor:
    """What a pass is not given, or less of, it sees as it would see any token that is made: noisy."""
    known, less = (speed(view.layouts[name], modality) for name in ("cond", one.name))
    clean_BFSC, noise_BFSC = view.task.clean.clean[modality], view.task.noise[modality]
    return torch.where(known == less, x_BFSC, mix(clean_BFSC, noise_BFSC, (sigma * less)[..., 0]))
