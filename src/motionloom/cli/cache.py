"""``motionloom cache``: pixels to latents, or latents of others into a cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from motionloom.cli.console import Out, skipped
from motionloom.errors import UserError

if TYPE_CHECKING:
    from motionloom.config import Recipe


def run(
    recipe_name: str,
    manifest: Path | None,
    out: Path,
    overrides: list[str],
    as_json: bool,
    lmdb: Path | None = None,
) -> None:
    """Build or continue a cache, of a manifest's clips or of the latents of an LMDB."""
    from motionloom.config import load_recipe_with_notes

    if (manifest is None) == (lmdb is None):
        raise UserError("name either --manifest, for clips, or --lmdb, for latents of CausVid")
    console = Out(as_json)
    recipe, notes = load_recipe_with_notes(recipe_name, overrides)
    notes += _missing_weights(recipe)
    for note in notes:
        console.note(note)
    if manifest is not None:
        _of_clips(console, recipe, manifest, out, notes)
    elif lmdb is not None:
        _of_lmdb(console, recipe, lmdb, out, notes)


def _of_clips(console: Out, recipe: Recipe, manifest: Path, out: Path, notes: list[str]) -> None:
    from motionloom.data.cache import build_cache, open_cache
    from motionloom.data.manifest import read_manifest

    entries, problems = read_manifest(manifest)
    if len(problems):
        skipped(console, problems.lines())
    if not entries:
        why = "what is listed above is wrong with it" if len(problems) else "it is empty"
        raise UserError(f"{manifest}: names no usable clip; {why}: mend it, or name another manifest")
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


def _of_lmdb(console: Out, recipe: Recipe, lmdb: Path, out: Path, notes: list[str]) -> None:
    from motionloom.data.cache import open_cache
    from motionloom.data.cache.lmdb_import import import_lmdb

    with console.stages() as advance:
        report = import_lmdb(recipe, lmdb, out, on_progress=advance)
    for line in report.lines():
        console.note(line)
    cache = open_cache(out)
    console.result(
        {
            "cache": str(out),
            "clips": len(cache),
            "read": report.read,
            "kept": report.kept,
            "skipped": report.skipped.skipped,
            "problems": report.skipped.lines()[:-1],
            "levels": list(report.levels),
            "seconds": report.seconds,
            "notes": notes,
        },
        [f"{len(cache)} clips cached, {report.skipped.skipped} skipped: {out}"],
    )


def _missing_weights(recipe: Recipe) -> list[str]:
    """A cache needs no backbone, but the training that follows will."""
    if not recipe.model.name_or_path or Path(recipe.model.name_or_path).expanduser().exists():
        return []
    return [
        f"model.name_or_path {recipe.model.name_or_path}: no such file or folder; "
        "the cache does not need it, training will"
    ]
