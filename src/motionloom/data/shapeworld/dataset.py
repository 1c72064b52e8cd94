"""ShapeWorld on disk: a folder of clips and a manifest, as any other dataset has."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

from motionloom.data.manifest import ManifestEntry, Scene, write_manifest
from motionloom.data.media import write_atomic, write_video
from motionloom.data.shapeworld.captions import caption, facts, prompt
from motionloom.data.shapeworld.render import render
from motionloom.data.shapeworld.spec import ClipSpec, Split, World
from motionloom.data.shapeworld.story import StorySpec, sample_story, scene_captions, story_caption
from motionloom.errors import UserError

MANIFEST, CLIPS = "manifest.jsonl", "clips"
ORIGIN = "shapeworld.json"  # what made the clips, so that a rerun never mixes two worlds


def write_dataset(
    out_dir: str | PathLike[str],
    world: World,
    clips: int,
    seed: int = 0,
    split: Split = "train",
    *,
    scenes: int = 1,
    lengths: tuple[int, ...] | None = None,
    sound: bool = False,
    quality: int = 100,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write clips (or stories, for ``scenes`` > 1) and their manifest; returns the manifest's path.

    Clip ``i`` is ``world.sample(seed, i, split)``. A clip that is there already is kept: an interrupted run
    goes on where it stopped and a larger ``clips`` adds to the folder. The manifest comes last.

    Args:
        lengths: scene lengths of stories, see `sample_story`.
        sound: whether the files carry the sound track.
        quality: 0..100 of `write_video`.
        on_progress: called with (clips done, clips in all) after each clip.

    Raises:
        UserError: the folder holds another world's clips, or cannot be written.
    """
    out = Path(out_dir)
    origin = {
        "world": asdict(world),
        "seed": seed,
        "split": split,
        "scenes": scenes,
        "lengths": lengths,
        "sound": sound,
        "quality": quality,
    }
    _claim(out, json.dumps(origin, indent=1) + "\n")
    entries: list[ManifestEntry] = []
    for index in range(clips):
        spec = (
            world.sample(seed, index, split)
            if scenes == 1
            else sample_story(world, seed, index, split, scenes=scenes, lengths=lengths)
        )
        path = out.absolute() / CLIPS / f"{split}-{index:06d}.mp4"
        if not path.exists():
            rendered = render(spec)
            write_video(
                path,
                rendered.video_FHW3,
                spec.fps,
                sound=rendered.sound if sound else None,
                sample_rate=rendered.sample_rate if sound else None,
                quality=quality,
            )
        entries.append(entry(spec, path))
        if on_progress is not None:
            on_progress(index + 1, clips)
    write_manifest(out / MANIFEST, entries)
    return out / MANIFEST


def entry(spec: ClipSpec | StorySpec, path: Path) -> ManifestEntry:
    """The manifest's line for a clip at ``path``: its captions, and its attributes to check against."""
    scenes = spec.scenes if isinstance(spec, StorySpec) else (spec,)
    parts: tuple[Scene, ...] = ()
    captions: tuple[str, ...] = ()
    attributes: dict[str, Any] = asdict(facts(scenes[0]))
    if isinstance(spec, StorySpec):
        words = story_caption(spec)
        parts = tuple(
            Scene(start / spec.fps, (start + scene.frames) / spec.fps, text)
            for start, scene, text in zip(spec.starts, scenes, scene_captions(spec), strict=True)
        )
        attributes = {"scenes": [asdict(facts(scene)) for scene in scenes], "cuts": list(spec.cuts)}
    else:
        words = caption(spec)
        captions = (prompt(spec),) if prompt(spec) != words else ()
    return ManifestEntry(
        id=path.stem,
        path=path,
        caption=words,
        fps=spec.fps,
        frames=spec.frames,
        width=scenes[0].width,
        height=scenes[0].height,
        scenes=parts,
        captions=captions,
        attributes=attributes,
    )


def _claim(out: Path, origin: str) -> None:
    """Mark the folder with what makes its clips, or refuse a folder that something else made."""
    mark = out / ORIGIN
    if not mark.exists():
        if (out / MANIFEST).exists() or (out / CLIPS).exists():
            raise UserError(f"{out}: holds clips that ShapeWorld did not make; choose a new folder")
        write_atomic(mark, origin.encode())
    elif mark.read_text() != origin:
        raise UserError(
            f"{mark}: the folder holds clips of another world, seed or quality; choose a new folder"
        )
