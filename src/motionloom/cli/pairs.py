"""``motionloom pairs``: a teacher's walks into a cache."""

from __future__ import annotations

from pathlib import Path

from motionloom.cli.console import Out
from motionloom.errors import UserError


def run(
    recipe_name: str,
    cache: Path,
    out: Path,
    overrides: list[str],
    clips: int | None,
    seed: int,
    worker: str,
    device: str,
    as_json: bool,
) -> None:
    """Make or continue a store of pairs, or one worker's share of it."""
    from motionloom.cli.assemble import open_model
    from motionloom.config import load_recipe_with_notes
    from motionloom.data.cache import open_cache
    from motionloom.data.cache.pairs import make_pairs
    from motionloom.data.cache.trajectories import Teacher, levels_on_grid
    from motionloom.data.cache.workers import Share

    console = Out(as_json)
    share = Share.parse(worker)
    recipe, notes = load_recipe_with_notes(recipe_name, overrides)
    for note in notes:
        console.note(note)
    if not recipe.distil.teacher:
        raise UserError(
            "distil.teacher is empty: name a run, a checkpoint or a recipe of published weights, for "
            "instance distil.teacher=runs/mine"
        )
    levels_on_grid(recipe.distil)  # before a large teacher is read
    source = open_cache(cache)
    source.require(recipe)
    model = open_model(Path(recipe.distil.teacher).expanduser(), device=device, tell=console.note)
    teacher = Teacher(model, recipe.distil.teacher)
    with console.stages() as advance:
        report = make_pairs(
            recipe, teacher, source, out, clips=clips, seed=seed, share=share, on_progress=advance
        )
    for line in report.lines():
        console.note(line)
    console.result(
        {
            "cache": str(out),
            "clips": report.clips,
            "made": report.made,
            "kept": report.kept,
            "skipped": report.skipped.skipped,
            "problems": report.skipped.lines()[:-1],
            "levels": list(report.levels),
            "worker": str(share),
            "seconds": report.seconds,
            "notes": notes,
        },
        [f"{report.clips} clips of {recipe.distil.teacher}, {report.skipped.skipped} skipped: {out}"],
    )
