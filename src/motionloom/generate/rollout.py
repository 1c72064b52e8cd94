"""The rollout engine: from noise to latents, under any plan, with any conditions, solver and guidance.

Training roll-outs, clips, scenes and streams all come through here, over the plan code that training used.
A plan of several stages runs from a cache where plan and backbone know one: each stage then costs its own
tokens, and one clean pass when it is done. Elsewhere all frames are computed under the plan's mask, which
gives the same clip: solvers walk, and draw noise for, the frames of the stage alone either way.

Sound and picture walk together: a solver sees one long state.

Shapes: B batch, F token frames, S cells of a frame, C channels of a token, M numbers of a sample's state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from motionloom.backbones.base import CachingBackbone
from motionloom.backbones.prediction import Predictor
from motionloom.errors import UserError
from motionloom.flow import PATHS, SOLVERS, DiscreteSchedule, Guidance, Pass, sigma_schedule
from motionloom.nn.cache import KVCache
from motionloom.plans import (
    EXACT,
    NOTHING,
    Given,
    Layout,
    Marks,
    Plan,
    Sample,
    Stage,
    StreamedPlan,
    Text,
    Values,
    keep_given,
    read_clip,
    speed,
    start,
    to_streams_at,
)
from motionloom.plans.tokens import Mix

Progress = Callable[[int, int], None]
"""Called with (solver steps done, solver steps in all)."""
Callback = Callable[[int, float, Tensor, Tensor], None]
"""A solver's: (step, sigma, x, clean estimate)."""
Tokens = dict[str, Tensor]
"""(B, F, S, C) by modality."""


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
class Task:
    """What is asked for, in tokens."""

    sample: Sample
    text: Text
    noise: Tokens
    """The start, standard normal, of every modality."""
    negative: Text | None = None
    """The text that guidance pushes away from; needed when guidance by text acts."""
    given: Given = NOTHING
    values: Values | None = None
    """Clean tokens of what is given; needed when anything is. References stand as they are to be shown."""
    without: Mapping[str, Given] = field(default_factory=dict)
    """By condition: what is given without it; needed when guidance leaves it out."""

    @property
    def clean(self) -> Values:
        """``values``, or zeros."""
        return self.values or Values({m: torch.zeros_like(x) for m, x in self.noise.items()})


@torch.no_grad()
def rollout(
    predictor: Predictor,
    plan: Plan,
    task: Task,
    sampling: Sampling,
    *,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Tokens:
    """Tokens float32 of every modality that follow the task; what is given comes back bit-identical.

    Args:
        generator: the noise of stochastic solvers, on the device of the noise.

    Raises:
        UserError: a hint (strength below 1) with a path or a solver that knows none.
    """
    _check_hints(task.given, sampling, predictor)
    stages = plan.stages(task.sample)
    streamed = len(stages) > 1 and not any(task.given.references.values())
    caches = _caches(predictor, plan, sampling.guidance) if streamed else {}
    given, clean = _marked(task), dict(task.clean.clean)
    for n, stage in enumerate(stages):
        for cache in caches.values():
            cache.begin(n)
        now = replace(task, given=given, values=replace(task.clean, clean=clean))
        view = _view(plan, now, sampling.guidance, caches, stage)
        if _walks(view):
            report = _reporter(progress, n * sampling.steps, len(stages) * sampling.steps)
            made = _solve(predictor, view, sampling, generator, report)
            clean = {m: _put(clean[m], stage[m], made[m]) for m in clean}
        given = _given_now(task.sample, given, stage)
        without = {name: _given_now(task.sample, one, stage) for name, one in task.without.items()}
        task = replace(task, without=without)
        if caches and n + 1 < len(stages):
            # A clean pass, so that later chunks look at what was made and not at its noise.
            done = replace(task, given=given, values=replace(task.clean, clean=clean))
            _remember(predictor, _view(plan, _plainly(done), sampling.guidance, caches, stage))
    return clean


def _walks(view: _View) -> bool:
    """Whether anything of the stage is left to make."""
    layout = view.layouts["cond"]
    return any(bool((speed(layout, m)[:, frames] > 0).any()) for m, frames in view.walked.items())


def _plainly(task: Task) -> Task:
    """A task whose stages are done: where all is clean, one noise level says so for all tokens."""

    def plain(given: Given) -> Given:
        noisy = any(marks.noise_BG is not None for marks in given.marks.values())
        return given if noisy else replace(given, marks={})

    without = {name: plain(given) for name, given in task.without.items()}
    return replace(task, given=plain(task.given), without=without)


@dataclass(frozen=True)
class _View:
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


def _view(plan: Plan, task: Task, guidance: Guidance, caches: Mapping[str, KVCache], stage: Stage) -> _View:
    passes = {one.name: one for one in guidance.passes()}
    if caches:
        assert isinstance(plan, StreamedPlan)
        task, walked = _cut(task, stage), {m: slice(0, s.stop - s.start) for m, s in stage.items()}
        layouts = {name: plan.stage_layout(task.sample, _as_given(task, one)) for name, one in passes.items()}
        return _View(task, passes, layouts, caches, walked)
    layouts = {
        name: plan.layout(task.sample, _text(task, one), _as_given(task, one)) for name, one in passes.items()
    }
    return _View(task, passes, layouts, caches, stage)


def _text(task: Task, one: Pass) -> Text:
    if not one.negative:
        return task.text
    assert task.negative is not None, "guidance needs a negative text; the empty caption will do"
    return task.negative


def _as_given(task: Task, one: Pass) -> Given:
    return task.given if one.without is None else task.without[one.without]


def _caches(predictor: Predictor, plan: Plan, guidance: Guidance) -> dict[str, KVCache]:
    """One for each pass, since its words and what it leaves out reach the keys of the video; none where the
    plan or the backbone knows no cache."""
    backbone = predictor.backbone
    if not isinstance(plan, StreamedPlan) or not isinstance(backbone, CachingBackbone):
        return {}
    return {one.name: backbone.new_cache(window=plan.window, sinks=plan.sinks) for one in guidance.passes()}


def _solve(
    predictor: Predictor,
    view: _View,
    sampling: Sampling,
    generator: torch.Generator | None,
    callback: Callback | None,
) -> Tokens:
    """One stage, from noise to data; what is given of it stays."""
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
        x = {m: _put(begin[m], view.walked[m], walked[m]) for m in modalities}
        found = {
            one.name: _velocity(predictor, view, one, x, sigma) for one in sampling.guidance.passes(sigma)
        }
        return join({m: _guided(sampling.guidance, layout, m, found, sigma, view.walked) for m in modalities})

    solver = SOLVERS[sampling.solver]
    options: dict[str, object] = {"generator": generator} if solver.stochastic else {}
    if sampling.solver == "ddim":
        options["eta"] = sampling.eta
    # A network that only ever saw certain noise levels is not asked at others, whatever the recipe says.
    schedule = predictor.schedule or sampling.schedule
    x_BM = join({m: begin[m][:, view.walked[m]] for m in modalities})
    if schedule is None:
        sigmas = sigma_schedule(sampling.steps, shift=sampling.shift)
    else:
        x_BM, sigmas = schedule.start(x_BM, path), schedule.grid(sampling.steps, path)
    made = split(solver.run(velocity, x_BM, sigmas, path=path, callback=callback, **options))
    whole = {m: _put(begin[m], view.walked[m], made[m]) for m in modalities}
    return {m: keep_given(layout, m, clean[m], whole[m])[:, view.walked[m]] for m in modalities}


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


def _velocity(predictor: Predictor, view: _View, one: Pass, x: Tokens, sigma: float) -> Tokens:
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


def _unknown(view: _View, one: Pass, modality: str, x_BFSC: Tensor, sigma: float, mix: Mix) -> Tensor:
    """What a pass is not given, or less of, it sees as it would see any token that is made: noisy."""
    known, less = (speed(view.layouts[name], modality) for name in ("cond", one.name))
    clean_BFSC, noise_BFSC = view.task.clean.clean[modality], view.task.noise[modality]
    return torch.where(known == less, x_BFSC, mix(clean_BFSC, noise_BFSC, (sigma * less)[..., 0]))


def _remember(predictor: Predictor, view: _View) -> None:
    """The keys and values of a finished stage into the caches."""
    for name, one in view.passes.items():
        _velocity(predictor, view, replace(one, without=None), dict(view.task.clean.clean), 0.0)
        view.caches[name].commit()


def _marked(task: Task) -> Given:
    """What is given, with no marks on a modality of which nothing is."""
    marks = {m: marks for m, marks in task.given.marks.items() if bool((marks.kind_BN > 0).any())}
    return replace(task.given, marks=marks)


def _given_now(sample: Sample, given: Given, stage: Stage) -> Given:
    """And all of a stage that was made; what was given before it stays as it was given."""
    marks = dict(given.marks)
    for modality, frames in stage.items():
        geometry = sample.tracks[modality]
        done_F = torch.zeros(geometry.grid[0], dtype=torch.bool, device=geometry.device)
        done_F[frames] = True
        nothing = Marks((), torch.zeros(1, geometry.tokens, dtype=torch.long, device=geometry.device))
        before = marks.get(modality, nothing)
        marks[modality] = before.and_given(before.made_BN & geometry.per_token(done_F[None]), EXACT)
    return replace(given, marks=marks)


def _cut(task: Task, stage: Stage) -> Task:
    """A task's part in one stage."""
    cells = {m: geometry.cells for m, geometry in task.sample.tracks.items()}
    tokens = {m: slice(s.start * cells[m], s.stop * cells[m]) for m, s in stage.items()}
    return replace(
        task,
        sample=task.sample.part(stage),
        noise={m: task.noise[m][:, s] for m, s in stage.items()},
        given=task.given.part(tokens),
        values=task.clean.part(stage),
        without={name: given.part(tokens) for name, given in task.without.items()},
    )


def _put(t_BF: Tensor, frames: slice, part: Tensor) -> Tensor:
    """A copy with some frames in exchange."""
    return torch.cat([t_BF[:, : frames.start], part, t_BF[:, frames.stop :]], dim=1)


def _check_hints(given: Given, sampling: Sampling, predictor: Predictor) -> None:
    hints = any(kind.strength < 1 for marks in given.marks.values() for kind in marks.kinds)
    if not hints:
        return
    if sampling.path != "linear" or (predictor.schedule or sampling.schedule) is not None:
        raise UserError("strength below 1 needs a network on the linear flow path; give it at strength 1")
    if sampling.solver == "consistency" or (sampling.solver == "ddim" and sampling.eta > 0):
        raise UserError(f"strength below 1 does not go with the fresh noise of {sampling.solver}: take euler")


def _reporter(progress: Progress | None, done: int, total: int) -> Callback | None:
    if progress is None:
        return None
    return lambda step, sigma, x, clean: progress(done + step + 1, total)
