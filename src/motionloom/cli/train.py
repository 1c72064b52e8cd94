"""``motionloom train``: a recipe on a cache."""

from __future__ import annotations

from pathlib import Path

from motionloom.cli.console import Out


def run(recipe_name: str, overrides: list[str], cache_path: Path | None, resume: bool, as_json: bool) -> None:
    """Train, alone or as one of torchrun's processes."""
    from motionloom.cli.assemble import assemble
    from motionloom.cli.previews import Previews
    from motionloom.cli.training_view import TrainingView
    from motionloom.config import load_recipe_with_notes, write_provenance
    from motionloom.data.cache import open_cache
    from motionloom.parallel import start_ranks

    console = Out(as_json)
    recipe, notes = load_recipe_with_notes(recipe_name, overrides)
    run_dir = Path(recipe.output_dir) / recipe.experiment_name
    with start_ranks() as ranks:
        cache = open_cache(cache_path or run_dir / "cache")
        parts = assemble(recipe, cache, ranks)
        if ranks.is_main:
            for note in notes:
                console.note(note)
            show_buckets(console, parts.loader)
        with TrainingView(console) as view:
            previews = Previews(parts, run_dir) if recipe.train.sample_every_steps else None
            trainer = parts.trainer(run_dir, view, previews)
            outcome = trainer.fit(resume)
        if ranks.is_main:
            write_provenance(run_dir, recipe)
            console.result(
                {
                    "run": str(run_dir),
                    "checkpoint": str(outcome.checkpoint),
                    "step": outcome.step,
                    "reason": outcome.reason,
                    "seconds": outcome.seconds,
                },
                [f"{outcome.step} steps ({outcome.reason}): {outcome.checkpoint}"],
            )


def show_buckets(console: Out, loader) -> None:  # type: ignore[no-untyped-def]
    """What becomes of every clip, before the first step."""
    for row in loader.report():
        console.note(
            f"bucket {row.shape}: {row.clips} clips, {row.batches:.4g} batches per epoch, "
            f"{row.dropped} dropped ({row.why})"
        )
