"""``motionloom cache``: pixels to latents."""

from __future__ import annotations

from pathlib import Path

from motionloom.cli.console import Out, skipped


def run(recipe_name: str, manifest: Path, out: Path, overrides: list[str], as_json: bool) -> None:
    """Build or continue a cache."""
    from motionloom.config import load_recipe_with_notes
    from motionloom.data.cache import build_cache, open_cache
    from motionloom.data.manifest import read_manifest

    console = Out(as_json)
    recipe, notes = load_recipe_with_notes(recipe_name, overrides)
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
            "problems": [*problems.lines()[:-1], *report.skipped.lines()[:-1]],
            "seconds": report.seconds,
            "notes": notes,
        },
        [f"{len(cache)} clips cached, {problems.skipped + report.skipped.skipped} skipped: {out}"],
    )
