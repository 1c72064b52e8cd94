"""ShapeWorld on disk: a folder of clips and a manifest, as any other dataset has."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from motionloom.data.manifest import ManifestEntry, Scene, write_manifest
from motionloom.data.media import write_video
from motionloom.data.shapeworld.beside import (
    REFERENCES,
    ReferenceKind,
    random_mask,
    reference_caption,
    reference_video,
)
from motionloom.data.shapeworld.captions import caption, facts, prompt
from motionloom.data.shapeworld.render import render_video
from motionloom.data.shapeworld.sound import SAMPLE_RATE, synthesize
from motionloom.data.shapeworld.spec import ClipSpec, Split, World
from motionloom.data.shapeworld.story import StorySpec, sample_story, scene_captions, story_caption
from motionloom.durable import write_atomic
from motionloom.errors import UserError

MANIFEST, CLIPS, BESIDE = "manifest.jsonl", "clips", {"reference": "references", "mask": "masks"}
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
    references: ReferenceKind | None = None,
    masks: bool = False,
    quality: int = 100,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write clips (or stories, for ``scenes`` > 1) and their manifest; returns the manifest's path.

    Clip ``i`` is ``world.sample(seed, i, split)``. A clip that is there already is kept: an interrupted run
    goes on where it stopped and a larger ``clips`` adds to the folder. The manifest comes last.

    Args:
        lengths: scene lengths of stories, see `sample_story`.
        sound: whether the files carry the sound track, those of references as well.
        references: what stands beside every clip, see `beside`; captions then leave to it what it shows.
        masks: whether a mask of what is given stands beside every clip.
        quality: 0..100 of `write_video`.
        on_progress: called with (clips done, clips in all) after each clip.

    Raises:
        UserError: the folder holds another world's clips, or cannot be written; references of stories.
    """
    if references is not None and (scenes > 1 or references not in REFERENCES):
        raise UserError(f"ShapeWorld: references={references}: use {', '.join(REFERENCES)}, with one scene")
    out = Path(out_dir)
    # What is off is left out, so that folders from before there was a choice are still known.
    chosen = {"references": references, "masks": masks}
    origin = {
        "world": {key: value for key, value in asdict(world).items() if key not in ("only", "pace") or value},
        "seed": seed,
        "split": split,
        "scenes": scenes,
        "lengths": lengths,
        "sound": sound,
        "quality": quality,
        **{key: value for key, value in chosen.items() if value},
    }
    _claim(out, json.dumps(origin, indent=1) + "\n")
    maker = _Maker(out.absolute(), world, sound, references, masks, quality)
    entries: list[ManifestEntry] = []
    for index in range(clips):
        spec = (
            world.sample(seed, index, split)
            if scenes == 1
            else sample_story(world, seed, index, split, scenes=scenes, lengths=lengths)
        )
        entries.append(maker.make(spec, f"{split}-{index:06d}", (seed, index, split)))
        if on_progress is not None:
            on_progress(index + 1, clips)
    write_manifest(out / MANIFEST, entries)
    return out / MANIFEST


@dataclass(frozen=True)
class _Maker:
    """Writes clips and what stands beside them."""

    out: Path
    world: World
    sound: bool
    references: ReferenceKind | None
    masks: bool
    quality: int

    def make(self, spec: ClipSpec | StorySpec, name: str, key: tuple[int | str, ...]) -> ManifestEntry:
        """Write what is not there yet of one clip; its entry."""
        path = self.out / CLIPS / f"{name}.mp4"
        made = entry(spec, path)
        if not path.exists():
            self._write(path, render_video(spec), spec)
        if self.references is not None:
            assert isinstance(spec, ClipSpec)
            beside = self.out / BESIDE["reference"] / path.name
            if not beside.exists():
                self._write(beside, reference_video(spec, self.references, self.world), spec)
            words = reference_caption(spec, self.references)
            # Other wordings would say what the reference is there for.
            told = made.captions if words == made.caption else ()
            made = replace(made, caption=words, captions=told, reference=beside)
        if self.masks:
            mask = self.out / BESIDE["mask"] / f"{name}.webp"
            if not mask.exists():
                video = random_mask(spec.frames, made.height or 0, made.width or 0, *key)
                write_video(mask, video, spec.fps, quality=100)
            made = replace(made, mask=mask)
        return made

    def _write(self, path: Path, video_FHW3: np.ndarray, spec: ClipSpec | StorySpec) -> None:
        scenes = spec.scenes if isinstance(spec, StorySpec) else (spec,)
        write_video(
            path,
            video_FHW3,
            spec.fps,
            sound=synthesize(scenes) if self.sound else None,
            sample_rate=SAMPLE_RATE if self.sound else None,
            quality=self.quality,
        )


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
