"""``motionloom cache``: pixels to latents."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from motionloom.cli.console import Out, skipped

if TYPE_CHECKING:
    from motionloom.config import Recipe


def run(recipe_name: str, manifest: Path, out: Path, overrides: list[str], as_json: bool) -> None:
    """Build or continue a cache."""
    from motionloom.config import load_recipe_with_notes
    from motionloom.data.cache import build_cache, open_cache
    from motionloom.data.manifest import read_manifest

    console = Out(as_json)
    recipe, notes = load_recipe_with_notes(recipe_name, overrides)
    notes += _missing_weights(recipe)
    for note in notes:
        console.note(note)
    entries, problems = read_manifest(manifest)
    if len(problems):
        skipped(console, problems.lines())
    with console.stages() as advance:
        report = build_cache(recipe, entries, out, on_progress=advance)
    for line in report.lines():
        console.note(line)
    cache = open_cache(out)
    console.result(
        {
            "cache": str(out),
            "clips": len(cache),
            "encoded": report.encoded,
            "kept": report.kept,
            "skipped": problems.skipped + report.skipped.skipped,
            "holds": list(report.holds),
            "problems": [*problems.lines()[:-1], *report.skipped.lines()[:-1]],
            "seconds": report.seconds,
            "notes": notes,
        },
        [f"{len(cache)} clips cached, {problems.skipped + report.skipped.skipped} skipped: {out}"],
    )


def _missing_weights(recipe: Recipe) -> list[str]:
    """A cache needs no backbone, but the training that follows will."""
    if not recipe.model.name_or_path or Path(recipe.model.name_or_path).expanduser().exists():
        return []
    return [
        f"model.name_or_path {recipe.model.name_or_path}: no such file or folder; "
        "the cache does not need it, training will"
    ]
