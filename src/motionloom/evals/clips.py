"""Clips of a manifest as a judge of tokenizers reads them: in one shape, in batches, with labels and words.

A clip that cannot be read, or that is of another size than the tokenizer takes, is listed and counted; the
others are judged.

P frames, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from motionloom.data.manifest import ManifestEntry, Problem, Problems, read_entry, read_manifest
from motionloom.data.media import MediaError
from motionloom.data.shapeworld import Facts, parse
from motionloom.errors import UserError
from motionloom.rng import numpy_rng
from motionloom.tokenizers import TokenizerSpec

Video = NDArray[np.uint8]


@dataclass(frozen=True)
class Shape:
    """How clips are read: so many frames at a rate, scaled to cover a size and cropped. None: as they are."""

    frames: int | None = None
    size: tuple[int, int] | None = None
    """Height and width."""
    fps: float | None = None


@dataclass(frozen=True)
class Seen:
    """A clip that was read, uint8 (P, H, W, 3), and what the manifest says of it."""

    entry: ManifestEntry
    video_PHW3: Video
    fps: float

    @property
    def facts(self) -> Facts | None:
        """What it should show in ShapeWorld, by any of its wordings; None of other clips."""
        for words in (self.entry.caption, *self.entry.captions):
            if (found := parse(words)) is not None:
                return found
        return None


@dataclass
class Set:
    """Entries of a manifest that are to be judged, and what is wrong with the others."""

    path: Path
    entries: list[ManifestEntry]
    problems: Problems = field(default_factory=Problems)

    def refuse(self, clip: ManifestEntry, what: str, fix: str, kind: str) -> None:
        """One clip less."""
        self.problems.add(Problem(f"{self.path.name} {clip.id}", what, fix, kind))
        self.problems.usable -= 1

    def require(self, seen: Sequence[object]) -> None:
        """Raises UserError where nothing is left to be judged."""
        if not seen:
            first = next(iter(self.problems), "it is empty")
            raise UserError(f"{self.path}: no clip of it can be judged; {first}")


def open_set(manifest: Path, most: int | None = None) -> Set:
    """A manifest's entries, at most so many, evenly spread over it.

    Raises:
        UserError: there is no such manifest, or no usable line in it.
    """
    entries, problems = read_manifest(manifest)
    if most is not None and most < len(entries):
        entries = [entries[n] for n in np.linspace(0, len(entries) - 1, most).round().astype(int)]
    problems.usable = len(entries)
    found = Set(manifest, entries, problems)
    found.require(entries)
    return found


def read(clips: Set, shape: Shape, spec: TokenizerSpec | None = None) -> Iterator[Seen]:
    """Each clip in turn; one that cannot be read, or whose size ``spec`` does not take, is listed instead."""
    for entry in clips.entries:
        try:
            if entry.of_several_files:
                raise UserError("its scenes lie in files of their own; list each as a clip")
            clip = read_entry(entry, frames=shape.frames, size=shape.size, fps=shape.fps)
            if spec is not None:
                spec.latent_grid(*clip.video_FHW3.shape[:3])
        except MediaError as error:
            clips.refuse(entry, error.what, error.fix, error.kind)
        except UserError as error:
            fix = "or say --size and --frames, to which all clips are scaled and cut"
            clips.refuse(entry, str(error), fix, "wrong size")
        else:
            yield Seen(entry, clip.video_FHW3, clip.fps)


def batches(clips: Iterable[Seen], size: int) -> Iterator[list[Seen]]:
    """Clips that follow one another in one shape, at most so many together."""
    waiting: list[Seen] = []
    for clip in clips:
        if waiting and (len(waiting) == size or clip.video_PHW3.shape != waiting[0].video_PHW3.shape):
            yield waiting
            waiting = []
        waiting.append(clip)
    if waiting:
        yield waiting


def evenly(video_PHW3: Video, frames: int) -> Video:
    """So many frames from the first to the last, or all of a shorter clip."""
    count = min(frames, len(video_PHW3))
    return video_PHW3[np.linspace(0, len(video_PHW3) - 1, count).round().astype(int)]


def label_of(entry: ManifestEntry, name: str) -> Hashable:
    """What a manifest says of a clip under ``name``: one of its extra fields, with dots into lists and
    objects (``objects.0.color``).

    Raises:
        UserError: it has no such field, or one that is no word, number or truth.
    """
    at: object = entry.attributes
    for part in name.split("."):
        if isinstance(at, Mapping) and part in at:
            at = at[part]
        elif isinstance(at, list | tuple) and part.isdecimal() and int(part) < len(at):
            at = at[int(part)]
        else:
            known = ", ".join(map(str, entry.attributes)) or "none"
            raise UserError(f"has no field {name}; extra fields of it: {known}")
    if not isinstance(at, str | int | float | bool) or at == "":
        raise UserError(f"{name} is {at!r}; a label is one word, number or truth")
    return at


def labels(clips: Set, name: str) -> dict[str, Hashable]:
    """The label of each clip by its id; clips without one are listed and leave the set.

    Raises:
        UserError: none has it.
    """
    found: dict[str, Hashable] = {}
    for entry in clips.entries:
        try:
            found[entry.id] = label_of(entry, name)
        except UserError as error:
            what, _, fix = str(error).partition("; ")
            clips.refuse(entry, what, fix, "no label")
    clips.entries = [entry for entry in clips.entries if entry.id in found]
    clips.require(clips.entries)
    return found


def set_aside(clips: Set, share: float, seed: int) -> tuple[Set, Set]:
    """A set in two, drawn once: what is left to train on, and so large a share to test on.

    Raises:
        UserError: one of them would be empty.
    """
    order = numpy_rng("set aside", seed, len(clips.entries)).permutation(len(clips.entries))
    count = round(share * len(order))
    if not 0 < count < len(order):
        raise UserError(
            f"{clips.path}: of {len(order)} clips a share of {share:g} cannot be tested on; name --test, or "
            "give more clips"
        )
    aside = set(order[:count].tolist())
    train = [entry for n, entry in enumerate(clips.entries) if n not in aside]
    test = [entry for n, entry in enumerate(clips.entries) if n in aside]
    # What was wrong with the manifest is told once, with the first part.
    told = Problems(clips.problems.items, len(train))
    return Set(clips.path, train, told), Set(clips.path, test, Problems(usable=len(test)))
