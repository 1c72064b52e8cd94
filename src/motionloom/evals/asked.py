"""Clips to judge, and what was asked of each: read from ``clips.json``, a manifest or a request.

``clips.json`` lies beside generated clips and lists one object per clip:

    {"file": "000.mp4", "prompt": "...", "fps": 8, "seed": 0,
     "scenes": [{"caption": "...", "frames": 17, "role": "generate"}],
     "conditions": [{"type": "prefix", "given": [[0, 5]], "source": "given/000.webp"}]}

``scenes``: in order, role ``given`` for a shot that was handed in. ``conditions``: those of the request, in
the language of ``config.conditions``; hints (strength below 1), references and what is given of the sound say
nothing about pixels and are left out. ``given`` names the [first, end) pixel frames that really were given,
which depends on the tokenizer; without it the condition's own lengths hold. ``region`` is [top, left, bottom,
right] of the given pixels, ``mask`` a file whose bright pixels were given (a picture for all frames, or a
clip). ``source`` holds the pixels that were handed in: as many frames as the clip, or only the given ones.

P frames, H x W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from motionloom.data.manifest import ManifestEntry, Problem, Problems, read_manifest
from motionloom.data.media import VIDEO_SUFFIXES, MediaError, is_sound, read_clip, read_sound
from motionloom.data.shapeworld import Facts, parse
from motionloom.errors import UserError

CLIPS = "clips.json"
ROLES = ("generate", "given")

Video = NDArray[np.uint8]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class AskedScene:
    """One shot: what it should show, for how many pixel frames, and whether it was made or handed in."""

    caption: str
    frames: int
    role: str = "generate"


@dataclass(frozen=True)
class Given:
    """Pixels that were handed in: see this file's head. ``source_PHW3`` has as many frames as ``given`` or
    as the clip."""

    kind: str
    given: tuple[tuple[int, int], ...] | None = None
    region: tuple[int, int, int, int] | None = None
    mask_PHW: Mask | None = None
    source_PHW3: Video | None = None

    def where(self, frames: int, height: int, width: int) -> Mask:
        """(P, H, W) True where this condition gave the pixel."""
        shape = (frames, height, width)
        mask = np.zeros(shape, bool)
        for first, end in ((0, frames),) if self.given is None else self.given:
            mask[_frame(first, frames) : _frame(end, frames) or frames] = True
        if self.region is not None:
            top, left, bottom, right = self.region
            inside = np.zeros(shape, bool)
            inside[:, top:bottom, left:right] = True
            mask &= inside
        return mask if self.mask_PHW is None else mask & np.broadcast_to(self.mask_PHW, shape)

    def truth(self, frames: int, height: int, width: int) -> Video | None:
        """The source laid out on the clip's frames, (P, H, W, 3); None without a source."""
        if self.source_PHW3 is None or len(self.source_PHW3) == frames:
            return self.source_PHW3
        at = np.flatnonzero(self.where(frames, height, width).any(axis=(1, 2)))
        laid = np.zeros((frames, height, width, 3), np.uint8)
        laid[at] = self.source_PHW3[: len(at)]
        return laid


def _frame(index: int, frames: int) -> int:
    return index + frames if index < 0 else index


@dataclass(frozen=True)
class Asked:
    """What one clip should be."""

    prompt: str
    scenes: tuple[AskedScene, ...] = ()
    given: tuple[Given, ...] = ()
    fps: float = 8.0
    seed: int = 0

    @property
    def cuts(self) -> tuple[int, ...]:
        """First frames of all scenes but the first."""
        return tuple(accumulate(scene.frames for scene in self.scenes))[:-1]

    @property
    def captions(self) -> tuple[str, ...]:
        """One per scene; of a clip without scenes its prompt."""
        return tuple(scene.caption for scene in self.scenes) or (self.prompt,)

    @property
    def words(self) -> tuple[str, ...]:
        """All that was said: clips of the same words differ in their seeds alone."""
        return (self.prompt, *self.captions)

    @property
    def facts(self) -> tuple[Facts, ...] | None:
        """What the captions promise in ShapeWorld, scene by scene; None where one is of another world."""
        read = tuple(parse(caption) for caption in self.captions)
        known = tuple(facts for facts in read if facts is not None)
        return known if len(known) == len(read) else None


@dataclass(frozen=True)
class Sample:
    """A clip, uint8 (P, H, W, 3), its sound (channels, samples) if it has one, and what was asked of it.

    A file of sound alone has a picture of no frames.
    """

    name: str
    video_PHW3: Video
    fps: float
    asked: Asked
    sound: NDArray[np.float32] | None = None
    rate: int = 0
    file: Path | None = None

    @property
    def given_PHW(self) -> Mask:
        """All pixels that were handed in."""
        shape = self.video_PHW3.shape[:3]
        mask = np.zeros(shape, bool)
        for given in self.asked.given:
            mask |= given.where(*shape)
        return mask

    @property
    def given_P(self) -> Mask:
        """Frames of which every pixel was handed in."""
        return np.asarray(self.given_PHW.all(axis=(1, 2)))


@dataclass
class Samples:
    """Clips that could be read, and what was wrong with the others."""

    items: list[Sample] = field(default_factory=list)
    problems: Problems = field(default_factory=Problems)


def read_samples(folder: Path, manifest: Path | None = None, request: Path | None = None) -> Samples:
    """The clips of a folder with what was asked of them; a clip that cannot be read never stops the rest.

    Args:
        folder: holds the clips, and ``clips.json`` unless one of the others says what was asked.
        manifest: a clip is asked for what the entry with its file's name says.
        request: YAML of one such object as ``clips.json`` lists (for every clip), or of a list (in the order
            of the files' names).

    Raises:
        UserError: there is no such folder, nothing says what was asked, or no clip can be judged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the folder of clips that generate wrote")
    found = Samples()
    if manifest is not None:
        wanted = _of_manifest(folder, manifest, found.problems)
    elif request is not None:
        wanted = _of_request(folder, request)
    else:
        wanted = _of_list(folder / CLIPS)
    _read(wanted, found)
    if not found.items:
        raise UserError(f"{folder}: no clip of it can be judged; {next(iter(found.problems))}")
    return found


Record = Mapping[str, Any]
Wanted = Iterator[tuple[str, Record, Path]]  # where it is said, what is asked, and what its files lie below


def _read(wanted: Wanted, into: Samples) -> None:
    """Open what is asked for; a clip that cannot be read is listed and never stops the rest."""
    for where, record, files in wanted:
        try:
            into.items.append(_sample(where, record, files))
        except MediaError as error:
            into.problems.add(Problem.of(error))
        except UserError as error:
            what, _, fix = str(error).partition("; ")
            into.problems.add(Problem(where, what.removeprefix(f"{where}: "), fix, "wrong entry"))
    into.problems.usable = len(into.items)


def _of_list(path: Path) -> Wanted:
    """The entries of clips.json."""
    if not path.is_file():
        raise UserError(f"{path}: missing; say what was asked with --manifest or --request")
    try:
        records = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}); generate writes it beside its clips") from None
    if not isinstance(records, list) or not records:
        raise UserError(f"{path}: holds no list of clips; generate writes one beside its clips")
    return ((f"{path} entry {n}", record, path.parent) for n, record in enumerate(records))


def _of_request(folder: Path, path: Path) -> Wanted:
    """One request for all clips, or one each."""
    try:
        said = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problem = str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be read ({problem}); write prompt, scenes and conditions") from None
    files = _clip_files(folder)
    if isinstance(said, Mapping):
        said = [said] * len(files)
    if not isinstance(said, list) or len(said) != len(files):
        count = len(said) if isinstance(said, list) else 0
        raise UserError(
            f"{path}: asks for {count} clips, {folder} holds {len(files)}; write one request each"
        )
    return (
        (f"{path} entry {n}", {**record, "file": str(file.absolute())}, path.parent)
        for n, (record, file) in enumerate(zip(said, files, strict=True))
    )


def read_real(manifest: Path, most: int = 100) -> Samples:
    """Clips of a manifest itself, evenly spread over it: the measure that made ones are held against.

    Raises UserError where there is no such manifest, or no clip of it can be read.
    """
    entries, problems = read_manifest(manifest)
    found = Samples(problems=problems)
    chosen = np.linspace(0, len(entries) - 1, min(most, len(entries))).round().astype(int)
    _read(((entries[n].id, _record_of(entries[n], entries[n].path), manifest.parent) for n in chosen), found)
    if not found.items:
        raise UserError(f"{manifest}: no clip of it can be read; name a manifest of real clips")
    return found


def _of_manifest(folder: Path, path: Path, problems: Problems) -> Wanted:
    """Entries whose file's name is in the folder."""
    entries, unusable = read_manifest(path)
    for problem in unusable:
        problems.add(problem)
    here = {file.stem: file for file in _clip_files(folder)}
    matched = [(entry, here[entry.path.stem]) for entry in entries if entry.path.stem in here]
    if not matched:
        raise UserError(f"{path}: names no clip that is in {folder}; file names must agree")
    return ((entry.id, _record_of(entry, file), folder) for entry, file in matched)


def _record_of(entry: ManifestEntry, file: Path) -> Record:
    """A manifest's entry as clips.json would say it."""
    fps = entry.fps or 0.0
    scenes = [
        {"caption": scene.caption, "frames": round((scene.end - scene.start) * fps)} for scene in entry.scenes
    ]
    return {"file": str(file.absolute()), "prompt": entry.caption, "scenes": scenes, "fps": fps}


def _clip_files(folder: Path) -> list[Path]:
    kinds = VIDEO_SUFFIXES | {".webp", ".gif"}
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in kinds or is_sound(p))


def _sample(where: str, record: Any, folder: Path) -> Sample:
    """One clip with its pixels. Raises UserError for an entry that is wrong, MediaError for a bad file."""
    if not isinstance(record, Mapping) or not isinstance(record.get("file"), str):
        raise UserError(f"{where}: has no file; name the clip it asks for")
    file = folder / record["file"]
    fps = float(record.get("fps") or 0.0)
    if is_sound(file):
        video = np.zeros((0, 1, 1, 3), np.uint8)
        asked = read_asked(record, where, folder, fps or SOUND_FPS)
    else:
        clip = read_clip(file)
        video, asked = clip.video_FHW3, read_asked(record, where, folder, fps or clip.fps)
    wanted = sum(scene.frames for scene in asked.scenes)
    if wanted and len(video) not in (0, wanted):
        raise UserError(f"{where}: scenes of {wanted} frames, the file holds {len(video)}; correct scenes")
    sound, rate = _sound(file)
    sample = Sample(file.stem, video, asked.fps, asked, sound, rate, file)
    if len(video):
        _check_given(where, sample)
    return sample


def _sound(file: Path) -> tuple[NDArray[np.float32] | None, int]:
    """A file's sound, mono at 16 kHz; None where it has none. Raises MediaError for one that is damaged."""
    if not is_sound(file) and file.suffix.lower() not in VIDEO_SUFFIXES:
        return None, 0
    try:
        return read_sound(file, SOUND_RATE, mono=True), SOUND_RATE
    except MediaError as error:
        if error.kind == "no sound":
            return None, 0
        raise


SOUND_RATE, SOUND_FPS = 16_000, 8.0  # the rate of scenes' frames, where a file has no picture to say it


def read_asked(record: Record, where: str, folder: Path, fps: float) -> Asked:
    """From an object of ``clips.json`` whose clip runs at ``fps``. Raises UserError naming what is wrong."""
    scenes = _list(record, "scenes", where)
    shots = tuple(_scene(scene, f"{where} scene {n}") for n, scene in enumerate(scenes))
    given = tuple(
        _given(condition, f"{where} condition {n}", folder, fps, [shot.frames for shot in shots])
        for n, condition in enumerate(_list(record, "conditions", where))
        if condition.get("modality", "video") in ("video", "all")
        and condition.get("type") != "reference"
        and condition.get("strength", 1) == 1
    )
    return Asked(str(record.get("prompt", "")), shots, given, fps, int(record.get("seed") or 0))


def _list(record: Record, key: str, where: str) -> Sequence[Record]:
    value = record.get(key) or []
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise UserError(f"{where}: {key} is no list of objects; write [{{...}}, ...]")
    return value


def _scene(record: Record, where: str) -> AskedScene:
    frames, role = record.get("frames"), record.get("role", "generate")
    if not isinstance(frames, int) or frames < 1:
        raise UserError(f"{where}: frames={frames!r}; write how many pixel frames it has")
    if role not in ROLES:
        raise UserError(f"{where}: role={role!r}; write {' or '.join(ROLES)}")
    return AskedScene(str(record.get("caption", "")), frames, role)


def _given(record: Record, where: str, folder: Path, fps: float, lengths: Sequence[int]) -> Given:
    region, source, mask = record.get("region"), record.get("source"), record.get("mask")
    if region is not None and not _numbers(region, 4):
        raise UserError(f"{where}: region={region!r}; write [top, left, bottom, right] in pixels")
    return Given(
        str(record.get("type", "")),
        _ranges(record, where, fps, lengths),
        None if region is None else (int(region[0]), int(region[1]), int(region[2]), int(region[3])),
        None if not mask else read_clip(folder / mask).video_FHW3.mean(-1) > 127,
        None if not source else read_clip(folder / source).video_FHW3,
    )


def _numbers(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(isinstance(n, int | float) for n in value)


def _ranges(
    record: Record, where: str, fps: float, lengths: Sequence[int]
) -> tuple[tuple[int, int], ...] | None:
    """Which frames a condition gave: as ``given`` says, or as its type and length do; None is all."""
    said, kind = record.get("given"), record.get("type")
    if said is not None:
        if not isinstance(said, list) or not all(_numbers(pair, 2) for pair in said):
            raise UserError(f"{where}: given={said!r}; write [[first, end], ...] in pixel frames")
        return tuple((int(first), int(end)) for first, end in said)
    if kind in ("first_frame", "last_frame"):
        return ((0, 1),) if kind == "first_frame" else ((-1, 0),)
    if kind in ("prefix", "suffix"):
        length = record.get("frames") or round(float(record.get("seconds") or 0) * fps)
        if not isinstance(length, int) or length < 1:
            raise UserError(f"{where}: {kind} without a length; write given: [[first, end]]")
        return ((0, length),) if kind == "prefix" else ((-length, 0),)
    if kind == "keyframes":
        frames = [int(float(time) * fps + 1e-3) for time in record.get("times") or ()]
        return tuple((frame, frame + 1) for frame in frames)
    if kind in ("spatial_crop", "mask") and not record.get("region") and not record.get("mask"):
        return ()
    if kind == "scene":
        if not isinstance(record.get("scenes"), list):
            raise UserError(f"{where}: scene without their numbers; write given: [[first, end], ...]")
        ends = list(accumulate(lengths))
        return tuple((ends[n] - lengths[n], ends[n]) for n in record["scenes"] if n < len(ends))
    return None


def _check_given(where: str, sample: Sample) -> None:
    """Sources and masks must fit the clip."""
    frames, height, width = sample.video_PHW3.shape[:3]
    for given in sample.asked.given:
        for name, part in (("source", given.source_PHW3), ("mask", given.mask_PHW)):
            if part is not None and part.shape[1:3] != (height, width):
                size = f"{part.shape[2]}x{part.shape[1]}"
                raise UserError(f"{where}: {name} of {size} on a clip of {width}x{height}; use one size")
        mask = given.mask_PHW
        if mask is not None and len(mask) not in (1, frames):
            raise UserError(f"{where}: mask of {len(mask)} frames on a clip of {frames}; use 1 or {frames}")
        at = int(given.where(frames, height, width).any(axis=(1, 2)).sum())
        source = given.source_PHW3
        if source is not None and len(source) != frames and len(source) < at:
            raise UserError(f"{where}: source of {len(source)} frames, {at} were given; hand in all of them")
