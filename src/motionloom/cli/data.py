"""``motionloom data``: clips and manifests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast, get_args

from motionloom.cli.console import Out, new_file, skipped
from motionloom.errors import UserError


def attribute_filter(keep: list[str]) -> dict[str, str]:
    """``["group=animals"]`` -> {"group": "animals"}."""
    pairs = [item.partition("=") for item in keep]
    for item, (key, equals, _) in zip(keep, pairs, strict=True):
        if not key or not equals:
            raise UserError(f"--keep {item}: write attribute=value, for instance group=animals")
    return {key: value for key, _, value in pairs}


def alternatives(only: list[str]) -> dict[str, list[str]]:
    """``["shape=heart", "color=red", "color=blue"]`` -> {"shape": ["heart"], "color": ["red", "blue"]}."""
    found: dict[str, list[str]] = {}
    for item in only:
        key, equals, value = item.partition("=")
        if not key or not equals:
            raise UserError(f"--only {item}: write attribute=value, for instance shape=heart")
        found.setdefault(key, []).append(value)
    return found


def _lengths(scene_frames: str | None, scenes: int) -> tuple[int, ...] | None:
    """``"9,13"`` -> (9, 13)."""
    if scene_frames is None:
        return None
    parts = scene_frames.split(",")
    if scenes < 2 or not all(part.strip().isdigit() for part in parts):
        raise UserError(
            f"--scene-frames {scene_frames}: write lengths such as 9,13, and --scenes 2 or more beside them"
        )
    return tuple(map(int, parts))


def shapeworld(
    out: Path,
    clips: int,
    frames: int,
    size: int,
    seed: int,
    fps: float,
    world: str,
    split: str,
    scenes: int,
    scene_frames: str | None,
    sound: bool,
    references: str | None,
    masks: bool,
    only: list[str],
    as_json: bool,
) -> None:
    """Write a ShapeWorld dataset."""
    from motionloom.data.shapeworld import REFERENCES, write_dataset
    from motionloom.data.shapeworld.beside import ReferenceKind
    from motionloom.data.shapeworld.spec import PRESETS, Split

    if world not in PRESETS:
        raise UserError(f"--world {world}: choose {', '.join(PRESETS)}")
    if split not in get_args(Split):
        raise UserError(f"--split {split}: choose train, test or all")
    if references is not None and references not in REFERENCES:
        raise UserError(f"--references {references}: choose {', '.join(REFERENCES)}")
    console = Out(as_json)
    made = replace(PRESETS[world](), frames=frames, height=size, width=size, fps=fps)
    if only:
        made = made.narrowed(alternatives(only))
    with console.progress("clips") as advance:
        manifest = write_dataset(
            out,
            made,
            clips,
            seed,
            cast(Split, split),
            scenes=scenes,
            lengths=_lengths(scene_frames, scenes),
            sound=sound,
            references=cast(ReferenceKind | None, references),
            masks=masks,
            on_progress=advance,
        )
    console.result({"manifest": str(manifest), "clips": clips}, [f"{clips} clips: {manifest}"])


def ingest(source: Path, out: Path, keep: list[str], windows: float | None, as_json: bool) -> None:
    """Write a manifest of the clips in a folder."""
    from motionloom.data.ingest import ingest as find_clips
    from motionloom.data.ingest import summary
    from motionloom.data.manifest import write_manifest
    from motionloom.data.windows import cut_into_windows

    new_file(out)
    console = Out(as_json)
    unpack_to = out.parent / f"{source.stem}_unpacked"
    with console.progress("clips looked into") as advance:
        entries, problems = find_clips(
            source, keep=attribute_filter(keep), unpack_to=unpack_to, on_progress=advance
        )
    if not entries:
        skipped(console, problems.lines())
        raise UserError(f"{source}: no clip of it can be used; the lines above say why")
    if windows is not None:
        entries = cut_into_windows(entries, windows)
    write_manifest(out, entries)
    if len(problems):
        skipped(console, problems.lines())
    counts = summary(entries, problems)
    console.result(
        {"manifest": str(out), **counts, "skipped_clips": problems.lines()[:-1]},
        [f"{len(entries)} clips, {problems.skipped} skipped: {out}"],
    )


def join(manifests: list[str], out: Path, as_json: bool) -> None:
    """Write one manifest of several, each ``FILE`` or ``FILE:TIMES``."""
    from motionloom.data.join import join as joined
    from motionloom.data.manifest import write_manifest

    new_file(out)
    console = Out(as_json)
    paths, times = zip(*map(_repeated, manifests), strict=True)
    entries, problems = joined(paths, times)
    if len(problems):
        skipped(console, problems.lines())
    if not entries:
        raise UserError(f"{manifests[0]}: no clip can be used; the lines above say why")
    write_manifest(out, entries)
    console.result(
        {"manifest": str(out), "clips": len(entries), "skipped_clips": problems.lines()[:-1]},
        [f"{len(entries)} clips, {problems.skipped} skipped: {out}"],
    )


def _repeated(manifest: str) -> tuple[Path, int]:
    """``"a.jsonl:6"`` -> a.jsonl, 6."""
    path, colon, times = manifest.rpartition(":")
    if not colon or not times.isdigit():
        return Path(manifest), 1
    if not int(times):
        raise UserError(f"{manifest}: a manifest that is listed no time is left out: write 1 or more")
    return Path(path), int(times)
