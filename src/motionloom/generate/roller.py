"""Chunk after chunk from a cache: the part of the engine that clips, streams and training roll-outs share.

Shapes: B batch, F token frames of a chunk, S cells of a frame, C channels of a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from motionloom.backbones.base import CachingBackbone
from motionloom.backbones.prediction import Predictor
from motionloom.flow import PATHS
from motionloom.generate.task import Sampling, Task, Tokens
from motionloom.generate.walk import SAMPLED, Trained, View, Watch, evaluate, view_stage, walk
from motionloom.nn.cache import KVCache, Snapshot, nbytes
from motionloom.plans import Given, Plan, StreamedPlan


def can_stream(predictor: Predictor, plan: Plan) -> bool:
    """Whether plan and backbone know how to make a clip from a cache."""
    return isinstance(plan, StreamedPlan) and isinstance(predictor.backbone, CachingBackbone)


class Roller:
    """Makes chunks and remembers them.

    There is one cache for each pass of guidance, since its words and what it leaves out reach the keys of
    the video.

    Args:
        options: of the caches, see :class:`~motionloom.nn.cache.KVCache`; window, sinks and
            positions are the plan's unless they are named.
    """

    def __init__(self, predictor: Predictor, plan: StreamedPlan, sampling: Sampling, **options: Any) -> None:
        backbone = predictor.backbone
        assert isinstance(backbone, CachingBackbone), "see can_stream"
        self.predictor, self.plan, self.sampling = predictor, plan, sampling
        usual = {"window": plan.window, "sinks": plan.sinks}
        options = {**usual, "positions": "relative" if plan.rebase else "absolute", **options}
        self.caches: dict[str, KVCache] = {
            one.name: backbone.new_cache(**options) for one in sampling.guidance.passes()
        }
        self._walked = False
        self._seen: View | None = None

    def make(
        self,
        chunk: int,
        task: Task,
        generator: torch.Generator | None = None,
        watch: Watch | None = None,
        trained: Trained = SAMPLED,
        sampling: Sampling | None = None,
    ) -> Tokens:
        """A chunk, from the past that is remembered. Arguments as :func:`~motionloom.generate.walk.walk`.

        Args:
            task: cut to the chunk.
            sampling: another way to walk this chunk, under the same guidance.
        """
        for cache in self.caches.values():
            cache.begin(chunk)
        view = self._view(task)
        self._walked = view.walks
        if not view.walks:
            return dict(task.clean.clean)
        return walk(self.predictor, view, sampling or self.sampling, generator, watch, trained)

    @torch.no_grad()
    def remember(self, task: Task, made: Mapping[str, Tensor]) -> None:
        """Keep the present chunk for those to come: as its last step saw it, or by a pass over ``made``.

        Args:
            task: as for :meth:`make`.
        """
        if not (self.sampling.write_through and self._walked and self._all_saw_the_last_step()):
            done = task.with_clean({m: x.detach() for m, x in made.items()})
            level = self.sampling.context
            view = self._view(_plainly(done) if level == 0 else done)
            x = _at(view, level, self.sampling)
            for one in view.passes.values():
                evaluate(self.predictor, view, replace(one, without=None), x, level)
        for cache in self.caches.values():
            cache.commit()

    def _view(self, task: Task) -> View:
        seen = self._seen
        if seen is not None and _laid_out_alike(seen.task, task):
            return replace(seen, task=task)
        self._seen = view_stage(self.plan, task, self.sampling.guidance, self.caches)
        return self._seen

    def _all_saw_the_last_step(self) -> bool:
        """Guidance may act in an interval: a pass that it left out then saw an earlier state, or none."""
        last = self.sampling.grid[-2]
        return {one.name for one in self.sampling.guidance.passes(last)} == self.caches.keys()

    # --- between chunks ---

    def forget_words(self) -> None:
        """The next pass reads the words anew: after a change of prompt."""
        for cache in self.caches.values():
            cache.drop("text")

    def renew(self) -> list[int]:
        """Forget what was computed of the chunks that are held, and return their numbers in order: each is
        to be made and remembered again, given (``KVCache.renew``)."""
        self.forget_words()
        held = [cache.renew() for cache in self.caches.values()]
        return held[0]

    def memory(self, snapshots: Iterable[Mapping[str, Snapshot]] = ()) -> int:
        """Bytes of all caches, and of what snapshots of them keep alive besides."""
        shared = {id(e): e for one in snapshots for snapshot in one.values() for e in snapshot.entries()}
        held = (cache.tensors() for cache in self.caches.values())
        return nbytes(chain(*held, *(entry.tensors() for entry in shared.values())))

    def finite(self) -> bool:
        """Whether all that is remembered are numbers."""
        return all(bool(torch.isfinite(t).all()) for cache in self.caches.values() for t in cache.tensors())

    def snapshot(self) -> dict[str, Snapshot]:
        """The state now; cheap."""
        return {name: cache.snapshot() for name, cache in self.caches.items()}

    def restore(self, snapshot: Mapping[str, Snapshot]) -> None:
        """Back to a snapshot, as often as wanted."""
        for name, cache in self.caches.items():
            cache.restore(snapshot[name])


def _laid_out_alike(a: Task, b: Task) -> bool:
    """Whether two tasks are one stage of which the same is given, whatever values it has."""
    return a.sample is b.sample and a.given is b.given and not a.without and not b.without


def _at(view: View, level: float, sampling: Sampling) -> Tokens:
    """The clean tokens at the level at which they are remembered."""
    clean, noise = view.task.clean.clean, view.task.noise
    if level == 0:
        return dict(clean)
    mix = PATHS[sampling.path].mix
    return {m: mix(x, noise[m], torch.full(x.shape[:3], level, device=x.device)) for m, x in clean.items()}


def _plainly(task: Task) -> Task:
    """A task whose stages are done: where all is clean, one noise level says so for all tokens."""

    def plain(given: Given) -> Given:
        noisy = any(marks.noise_BG is not None for marks in given.marks.values())
        return given if noisy or not given.marks else replace(given, marks={})

    without = {name: plain(given) for name, given in task.without.items()}
    return replace(task, given=plain(task.given), without=without)
