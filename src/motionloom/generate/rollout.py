"""The rollout engine: from noise to latents, under any plan, with any conditions, solver and guidance.

Training roll-outs, clips, scenes and streams all come through here, over the plan code that training used.
A plan of several stages runs from a cache where plan and backbone know one: each stage then costs its own
tokens, and one clean pass when it is done. Elsewhere all frames are computed under the plan's mask, which
gives the same clip: solvers walk, and draw noise for, the frames of the stage alone either way.

Shapes: B batch, F token frames, S cells of a frame, C channels of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from motionloom.backbones.prediction import Predictor
from motionloom.errors import UserError
from motionloom.generate.roller import Roller, can_stream
from motionloom.generate.task import Sampling, Task, Tokens, put
from motionloom.generate.walk import Trained, Watch, view_all, walk
from motionloom.plans import EXACT, Given, Marks, Plan, Sample, Stage, StreamedPlan

Progress = Callable[[int, int], None]
"""Called with (solver steps done, solver steps in all)."""
WatchStage = Callable[[Stage, int, float, Tokens, Tokens], None]
"""Called in each step with (stage, step, sigma, states, clean estimates), of the stage's frames."""


def rollout(
    predictor: Predictor,
    plan: Plan,
    task: Task,
    sampling: Sampling,
    *,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
    watch: WatchStage | None = None,
    exits: Sequence[int] | None = None,
    graph_from: int = 0,
) -> Tokens:
    """Tokens float32 of every modality that follow the task; what is given comes back bit-identical.

    Args:
        generator: the noise of stochastic solvers, on the device of the noise.
        exits: training (Self-Forcing, arXiv 2506.08009, alg. 1). In stage n so many steps are taken before
            the network's clean estimate is what the stage made. Where gradients are on, that estimate has a
            graph, nothing before it, and no later stage's reaches it through the past.
        graph_from: training. The first stage whose estimate has one.

    Raises:
        UserError: a hint (strength below 1) with a path or a solver that knows none; words that change at
            stages that are not there, or where all is computed under the plan's mask.
    """
    _check_hints(task.given, sampling, predictor)
    stages = plan.stages(task.sample)
    streamed = len(stages) > 1 and not any(task.given.references.values()) and can_stream(predictor, plan)
    if task.later and not (streamed and all(0 < n < len(stages) for n in task.later)):
        raise UserError(
            f"words that change at stages {sorted(task.later)} want a model that makes chunks from a cache, "
            f"without references, and a clip of more of them than its {len(stages)}"
        )
    make = _from_caches if streamed else _under_mask
    watches = [
        _watching(n, stage, len(stages), sampling.walk_steps, progress, watch)
        for n, stage in enumerate(stages)
    ]
    graph = torch.is_grad_enabled() and exits is not None
    exit_steps = [None] * len(stages) if exits is None else exits
    trained = [Trained(exit_step, graph and n >= graph_from) for n, exit_step in enumerate(exit_steps)]
    with torch.no_grad():
        return make(predictor, plan, _marked(task), sampling, stages, generator, watches, trained)


def _from_caches(
    predictor: Predictor,
    plan: Plan,
    task: Task,
    sampling: Sampling,
    stages: Sequence[Stage],
    generator: torch.Generator | None,
    watches: Sequence[Watch | None],
    trained: Sequence[Trained],
) -> Tokens:
    assert isinstance(plan, StreamedPlan)
    roller = Roller(predictor, plan, sampling)
    parts: list[Tokens] = []
    for n, stage in enumerate(stages):
        if n in task.later:
            roller.forget_words()
            task = replace(task, text=task.later[n])
        part = task.part(stage)
        made = roller.make(n, part, generator, watches[n], trained[n])
        parts.append(made)
        if n + 1 < len(stages):
            # So that later chunks look at what was made and not at its noise.
            roller.remember(part, made)
    with torch.set_grad_enabled(any(one.graph for one in trained)):
        return {m: torch.cat([made[m] for made in parts], dim=1) for m in parts[0]}


def _under_mask(
    predictor: Predictor,
    plan: Plan,
    task: Task,
    sampling: Sampling,
    stages: Sequence[Stage],
    generator: torch.Generator | None,
    watches: Sequence[Watch | None],
    trained: Sequence[Trained],
) -> Tokens:
    clean = dict(task.clean.clean)
    for n, stage in enumerate(stages):
        # What was made is context to what comes: its graph ends there.
        now = task.with_clean({m: x.detach() for m, x in clean.items()})
        view = view_all(plan, now, sampling.guidance, stage)
        if view.walks:
            made = walk(predictor, view, sampling, generator, watches[n], trained[n])
            with torch.set_grad_enabled(any(one.graph for one in trained)):
                clean = {m: put(clean[m], stage[m], made[m]) for m in clean}
        given = _given_now(task.sample, task.given, stage)
        without = {name: _given_now(task.sample, one, stage) for name, one in task.without.items()}
        task = replace(task, given=given, without=without)
    return clean


def _marked(task: Task) -> Task:
    """With no marks on a modality of which nothing is given."""
    marks = {m: marks for m, marks in task.given.marks.items() if bool((marks.kind_BN > 0).any())}
    return replace(task, given=replace(task.given, marks=marks))


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


def _check_hints(given: Given, sampling: Sampling, predictor: Predictor) -> None:
    hints = any(kind.strength < 1 for marks in given.marks.values() for kind in marks.kinds)
    if not hints:
        return
    if sampling.path != "linear" or (predictor.schedule or sampling.schedule) is not None:
        raise UserError("strength below 1 needs a network on the linear flow path; give it at strength 1")
    if sampling.solver == "consistency" or (sampling.solver == "ddim" and sampling.eta > 0):
        raise UserError(f"strength below 1 does not go with the fresh noise of {sampling.solver}: take euler")


def _watching(
    n: int, stage: Stage, stages: int, steps: int, progress: Progress | None, watch: WatchStage | None
) -> Watch | None:
    """None where nobody looks: no clean estimate is computed then."""
    if progress is None and watch is None:
        return None

    def tell(step: int, sigma: float, x: Mapping[str, Tensor], clean: Mapping[str, Tensor]) -> None:
        if progress is not None:
            progress(n * steps + step + 1, stages * steps)
        if watch is not None:
            watch(stage, step, sigma, dict(x), dict(clean))

    return tell
