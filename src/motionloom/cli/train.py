"""``motionloom train``: a recipe on a cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from motionloom.cli.console import INTERRUPTED, Out
from motionloom.errors import UserError

if TYPE_CHECKING:
    from motionloom.cli.assemble import Parts
    from motionloom.cli.tokenizer_run import TokenizerParts
    from motionloom.config import Recipe
    from motionloom.data.cache import Cache
    from motionloom.parallel import Ranks
    from motionloom.train.loop import OnSample, Outcome


def run(recipe_name: str, overrides: list[str], cache_path: Path | None, resume: bool, as_json: bool) -> None:
    """Train, alone or as one of torchrun's processes."""
    from motionloom.cli.training_view import TrainingView
    from motionloom.config import load_recipe_with_notes, write_provenance
    from motionloom.data.cache import open_cache
    from motionloom.parallel import start_ranks
    from motionloom.train import checkpoint

    console = Out(as_json)
    recipe, notes = load_recipe_with_notes(recipe_name, overrides)
    run_dir = Path(recipe.output_dir) / recipe.experiment_name
    if resume and checkpoint.latest(run_dir) is None:
        raise UserError(f"--resume: {run_dir} holds no checkpoint; to start that run, leave --resume out")
    with start_ranks() as ranks:
        cache = open_cache(cache_path or run_dir / "cache")
        cache.require(recipe)
        if resume:
            _refuse_other(run_dir, recipe, cache, ranks)
        else:
            checkpoint.refuse_held(run_dir)
        parts = _assemble(recipe, cache, ranks)
        if ranks.is_main:
            for note in notes:
                console.note(note)
            show_start(console, parts)
            write_provenance(run_dir, parts.recipe)
        with TrainingView(console) as view:
            previews = _previews(parts, run_dir) if recipe.train.sample_every_steps else None
            outcome = parts.trainer(run_dir, view, previews).fit(resume)
        if ranks.is_main:
            console.result(
                {
                    "run": str(run_dir),
                    "checkpoint": str(outcome.checkpoint),
                    "step": outcome.step,
                    "reason": outcome.reason,
                    "seconds": outcome.seconds,
                    "notes": notes,
                },
                [f"{outcome.step} steps ({outcome.reason}): {outcome.checkpoint}", *_how_to_go_on(outcome)],
            )
    if outcome.reason == "signal":
        raise SystemExit(INTERRUPTED)


def _how_to_go_on(outcome: Outcome) -> list[str]:
    stopped = outcome.reason == "signal"
    return ["stopped early: the same command with --resume goes on from there"] if stopped else []


def _assemble(recipe: Recipe, cache: Cache, ranks: Ranks) -> Parts | TokenizerParts:
    if recipe.trains_tokenizer:
        from motionloom.cli.tokenizer_run import assemble_tokenizer

        return assemble_tokenizer(recipe, cache, ranks)
    from motionloom.cli.assemble import assemble

    return assemble(recipe, cache, ranks)


def _previews(parts: Parts | TokenizerParts, run_dir: Path) -> OnSample:
    from motionloom.cli.previews import Previews
    from motionloom.cli.tokenizer_run import TokenizerParts, TokenizerPreviews

    return (
        TokenizerPreviews(parts, run_dir) if isinstance(parts, TokenizerParts) else Previews(parts, run_dir)
    )


def _refuse_other(run_dir: Path, recipe: Recipe, cache: Cache, ranks: Ranks) -> None:
    """What the trainer would refuse as well, but before a large base is read."""
    from motionloom.data.loader import Loader
    from motionloom.train import checkpoint
    from motionloom.train.state import Identity

    newest = checkpoint.latest(run_dir)
    if newest is None:
        return
    before = checkpoint.load(newest, verify=False).state["identity"]
    data = Loader(cache, recipe, ranks.rank, ranks.world).fingerprint()
    Identity.of(recipe, ranks.world, data).refuse_unless(before, str(newest), besides=("base",))


def show_start(console: Out, parts: Parts | TokenizerParts) -> None:
    """What becomes of every clip, and what else to know, before the first step."""
    from motionloom.cli.assemble import Parts

    for note in parts.notes:
        console.note(note)
    if isinstance(parts, Parts):
        _show_trained(console, parts)
    for row in parts.loader.report():
        console.note(
            f"bucket {row.shape}: {row.clips} clips, {row.batches:.4g} batches per epoch, "
            f"{row.dropped} dropped ({row.why})"
        )


def _show_trained(console: Out, parts: Parts) -> None:
    """Of adapters, and of parts that are trained alone: what they are."""
    from motionloom.train.patterns import table

    columns = ["pattern", "modules", "parameters"]
    if parts.adapted is not None:
        console.table("LoRA", columns, table(parts.adapted.targets))
    whole = parts.trained if parts.adapted is None else parts.adapted.parts
    if whole:
        console.table("parts that are trained whole", columns, table(whole))
