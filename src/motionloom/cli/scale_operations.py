"""Operations of a study's trainings, counted and not timed."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from motionloom.cli.console import Out
    from motionloom.cli.scale_point import Job
    from motionloom.config import Recipe
    from motionloom.data.cache import Cache


def operations_per_step(recipe: Recipe, cache: Cache) -> int:
    """Operations of one optimiser step of a tokenizer's training, over its accumulation and all ranks; see
    `step_operations` for what is counted. In float32 and not compiled, as nothing else can be looked into.
    The mean over a training, where some steps rebuild nothing."""
    share = recipe.vtp.rec_start
    whole = _counted(recipe, cache, rec_start=0.0)
    return round((1 - share) * whole + share * _counted(recipe, cache, rec=0.0)) if share else whole


def _counted(recipe: Recipe, cache: Cache, **vtp: float) -> int:
    from motionloom.cli.tokenizer_run import assemble_tokenizer
    from motionloom.evals.scaling import step_operations
    from motionloom.parallel import start_ranks

    train = recipe.train.model_copy(update={"compile": False, "precision": "fp32"})
    with start_ranks() as ranks:
        changed = {"train": train, "vtp": recipe.vtp.model_copy(update=vtp)}
        parts = assemble_tokenizer(recipe.model_copy(update=changed), cache, ranks)
        batch = next(parts.loader.batches(0)).to(ranks.device)
        once = step_operations(parts.method, batch, recipe.seed, ranks.device)
        return once * recipe.train.grad_accum_steps * ranks.world


def operations_ahead(jobs: Sequence[Job], console: Out) -> list[int]:
    """Operations of every point's tokenizer, counted on a cache of a few clips that is then thrown away."""
    from motionloom.config import load_recipe

    known: dict[str, int] = {}
    answer = []
    with tempfile.TemporaryDirectory() as folder:
        for job in jobs:
            overrides = [*job.tokenizer_overrides, "train.heldout_fraction=0", "seed=0"]
            recipe = load_recipe(job.study.tokenizer, overrides)
            alike = {"train": recipe.train.model_copy(update={"max_steps": 1}), "experiment_name": "counted"}
            one_step = recipe.model_copy(update={**alike, "output_dir": folder})
            key = one_step.model_dump_json()
            if key not in known:
                console.note(f"counting operations of {job.point.variant}, {job.point.budget}")
                few = _few_clips(one_step, Path(job.study.train), Path(folder) / str(len(known)))
                known[key] = operations_per_step(one_step, few)
            answer.append(known[key] * recipe.train.max_steps)
    return answer


def _few_clips(recipe: Recipe, manifest: Path, out: Path) -> Cache:
    from motionloom.data.cache import build_cache, open_cache
    from motionloom.data.manifest import read_manifest

    build_cache(recipe, read_manifest(manifest)[0][: 2 * recipe.train.batch_size], out)
    return open_cache(out)
