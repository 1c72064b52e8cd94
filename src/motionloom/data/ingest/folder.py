"""Walk a folder, find every clip, caption it, look inside it; what cannot be used becomes one line each."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from motionloom.data.ingest.captions import CaptionBook, caption_of, load_books, some
from motionloom.data.ingest.tables import is_table, read_table
from motionloom.data.ingest.unpack import unpack
from motionloom.data.manifest import (
    ManifestEntry,
    Problem,
    Problems,
    check_times,
    read_manifest,
    safe_id,
)
from motionloom.data.media import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    MediaError,
    is_sound,
    probe,
    read_clip,
    sound_seconds,
)
from motionloom.data.media.pictures import is_numbered
from motionloom.errors import UserError

MANIFEST = "manifest.jsonl"
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_CLIP_SUFFIXES = VIDEO_SUFFIXES | IMAGE_SUFFIXES
# What lies about in a dataset's folder without being a clip. Anything else that is no clip is reported.
_TEXTS = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".md", ".rst", ".html", ".xml", ".yaml", ".yml", ".toml")
_COMPANIONS = frozenset(("", *_TEXTS, ".ini", ".log", ".py", ".sh", ".srt", ".vtt", ".wav", ".mp3", ".flac"))


@dataclass
class _Found:
    """What a walk has met: candidate clips (some already known from a manifest) and the caption books."""

    root: Path
    problems: Problems
    entries: list[ManifestEntry] = field(default_factory=list)
    books: list[CaptionBook] = field(default_factory=list)

    def name(self, path: Path) -> str:
        """A path as the user knows it: below the root."""
        return path.relative_to(self.root).as_posix() if path != self.root else path.name

    def problem(self, error: MediaError, skipped: int = 1) -> Problem:
        """An error as a problem, its place below the root."""
        where = error.where.removeprefix(f"{self.root}{os.sep}")
        return Problem(where, error.what, error.fix, error.kind, skipped)


def ingest(
    source: str | os.PathLike[str],
    *,
    keep: Mapping[str, str] | None = None,
    unpack_to: str | os.PathLike[str] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    workers: int | None = None,
) -> tuple[list[ManifestEntry], Problems]:
    """Every usable clip at or below a folder (or in a .zip, unpacked below ``unpack_to``), or in the list of
    another trainer's dataset (see `tables.py`), and every problem.

    Clips are video files, animated images, stills, and folders of numbered pictures. Where a folder has a
    manifest.jsonl, that alone says what its clips are. Otherwise the caption is taken from captions.json,
    captions.csv, metadata.csv or metadata.jsonl (in the clip's folder or one above), a text file beside the
    clip, or the clip's name. What else these say of a clip becomes its attributes.

    Each clip is looked into: videos are counted and their first frame is decoded, pictures are decoded whole,
    of a frame folder the sizes are compared and the first frame is decoded. ``keep`` keeps the clips whose
    attributes equal (or, for a list, contain) these values. ``on_progress(done, total)`` is called after
    every clip.

    Raises `UserError` if there is no such folder, no clip in it, or none that ``keep`` keeps.
    """
    root = Path(os.path.abspath(source))
    problems = Problems()
    if root.is_file() and root.suffix.lower() == ".zip":
        if unpack_to is None:
            raise UserError(
                f"{root}: is a zip; say where it may be unpacked, or unpack it and name the folder"
            )
        root = unpack(root, Path(unpack_to).absolute(), problems)
    listed = root if is_table(root) else None
    if not root.is_dir() and listed is None:
        raise UserError(
            f"{root}: is not a folder; name a folder of clips, a zip of them, or a dataset's csv or json"
        )
    found = _Found(root.parent if listed else root, problems)
    if listed:
        found.entries = read_table(listed, problems)
    else:
        _walk(root, (), found)
    for book in found.books:
        unused = book.unused()
        if unused is not None:
            problems.add(replace(unused, where=found.name(book.path)))
    candidates = _kept(_unique(found.entries, problems), keep, root)
    entries = []
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        for done, result in enumerate(pool.map(_looked_into, candidates), start=1):
            if isinstance(result, MediaError):
                problems.add(found.problem(result))
            else:
                entries.append(result)
            if on_progress is not None:
                on_progress(done, len(candidates))
    problems.usable = len(entries)
    if not entries and not problems.items:
        raise UserError(
            f"{root}: holds no clips; put videos, animated images, pictures or frame folders into it"
        )
    return entries, problems


def summary(entries: Sequence[ManifestEntry], problems: Problems) -> dict[str, Any]:
    """What an ingest came to, for a report: clips by kind, captions by source, problems by kind."""
    return {
        "clips": len(entries),
        "kinds": dict(Counter(entry.kind or "unknown" for entry in entries).most_common()),
        "captions": dict(Counter(entry.caption_from or "manifest" for entry in entries).most_common()),
        "skipped": problems.skipped,
        "problems": problems.counts(),
    }


def _walk(folder: Path, above: tuple[CaptionBook, ...], found: _Found) -> None:
    if (folder / MANIFEST).is_file():
        _take_manifest(folder, found)
        return
    children = _children(folder, found)
    own, unreadable = load_books(folder)
    for error in unreadable:
        found.problems.add(found.problem(error, skipped=0))
    found.books += own
    books = (*own, *above)
    if _is_frame_folder(children, own):
        _take(folder, folder.name, above, found)
        return
    if not any(folder.iterdir()):
        what = "is a folder with nothing in it"
        found.problems.add(Problem(found.name(folder), what, "fill it or delete it", "empty folder"))
    names = Counter(
        child.name if child.is_dir() else child.stem for child in children if _is_clip_name(child)
    )
    for child in children:
        if child.is_dir():
            _walk(child, books, found)
        elif _is_clip_name(child):
            _take(child, child.stem if names[child.stem] == 1 else child.name, books, found)
        elif child.suffix.lower() not in _COMPANIONS:
            what, fix = f"is of no known kind ({child.suffix})", "convert it to mp4, webm, gif, webp or png"
            found.problems.add(Problem(found.name(child), what, fix, "unknown kind"))


def _is_clip_name(path: Path) -> bool:
    return path.suffix.lower() in _CLIP_SUFFIXES or path.is_dir()


def _children(folder: Path, found: _Found) -> list[Path]:
    """What a folder holds, by name, without hidden things and without links that go round or lead out."""
    children = []
    for child in sorted(folder.iterdir()):
        if child.name.startswith((".", "__MACOSX")):
            continue
        problem = _link_problem(child, found) if child.is_symlink() else None
        if problem is not None:
            found.problems.add(problem)
        else:
            children.append(child)
    return children


def _link_problem(link: Path, found: _Found) -> Problem | None:
    where = found.name(link)
    try:
        target = link.resolve(strict=True)
    except (OSError, RuntimeError):  # a link to itself is a RuntimeError up to Python 3.12
        return Problem(where, "is a link that leads nowhere", "remove it or restore its target", "bad link")
    if target.is_dir():
        return Problem(where, "is a link to a folder", "name that folder, or copy it in", "bad link")
    if not target.is_relative_to(found.root.resolve()):
        return Problem(where, f"is a link out of the folder, to {target}", "copy the file in", "bad link")
    return None


def _is_frame_folder(children: Iterable[Path], books: Sequence[CaptionBook]) -> bool:
    """Whether a folder's pictures are the frames of one clip: numbered, still, and not captioned singly."""
    files = [child for child in children if child.is_file()]
    pictures = [child for child in files if child.suffix.lower() in IMAGE_SUFFIXES - {".gif"}]
    others = any(child.suffix.lower() in VIDEO_SUFFIXES | {".gif"} for child in files)
    if books or others or not is_numbered([picture.stem for picture in pictures]):
        return False
    if any(picture.with_suffix(".txt").is_file() for picture in pictures):
        return False
    try:
        with Image.open(pictures[0]) as first:
            return getattr(first, "n_frames", 1) == 1
    except (OSError, Image.DecompressionBombError):
        return True  # a damaged first frame is found, and named, when the clip is looked into


def _take(clip: Path, name: str, books: Sequence[CaptionBook], found: _Found) -> None:
    """Put a file or frame folder on the list, captioned; its id is its path below the root."""
    try:
        captioned = caption_of(clip, books)
    except MediaError as error:
        found.problems.add(found.problem(error))
        return
    below = "" if clip == found.root else clip.parent.relative_to(found.root).as_posix() + "/"
    found.entries.append(
        ManifestEntry(
            id=safe_id(below.removeprefix("./") + name),
            path=clip,
            caption=captioned.caption,
            attributes=captioned.attributes,
            caption_from=captioned.source,
        )
    )


def _take_manifest(folder: Path, found: _Found) -> None:
    """Take a manifest at its word, and say how many clips lie beside it unlisted."""
    entries, problems = read_manifest(folder / MANIFEST)
    prefix = "" if folder == found.root else found.name(folder) + "/"
    found.problems.items += [replace(problem, where=prefix + problem.where) for problem in problems]
    found.entries += [replace(entry, id=safe_id(prefix + entry.id)) for entry in entries]
    # Every text in the file counts as a mention, so that the clip of a faulty line is not reported twice.
    text = (folder / MANIFEST).read_bytes().decode(errors="replace")
    mentioned = {_unquoted(quoted) for quoted in _QUOTED.findall(text)}
    unlisted = []
    for place, _, names in os.walk(folder):
        for name in sorted(names):
            path = (Path(place) / name).relative_to(folder)
            known = {str(path), *map(str, path.parents)} & mentioned
            if Path(name).suffix.lower() in _CLIP_SUFFIXES and not name.startswith(".") and not known:
                unlisted.append(path)
    if unlisted:
        what = f"does not list clips that lie beside it: {some(list(map(str, unlisted)))}"
        fix = "add them, unless they are left out on purpose"
        found.problems.add(Problem(prefix + MANIFEST, what, fix, "unlisted clips", skipped=0))


def _unquoted(quoted: str) -> str:
    try:
        return str(json.loads(quoted)).removeprefix("./").rstrip("/")
    except ValueError:
        return quoted


def _unique(entries: Iterable[ManifestEntry], problems: Problems) -> list[ManifestEntry]:
    first: dict[str, ManifestEntry] = {}
    for entry in entries:
        if entry.id in first:
            what = f'has the id "{entry.id}", as has {first[entry.id].path}'
            problems.add(Problem(str(entry.path), what, "give each clip its own id", "duplicate id"))
        else:
            first[entry.id] = entry
    return list(first.values())


def _kept(entries: list[ManifestEntry], keep: Mapping[str, str] | None, root: Path) -> list[ManifestEntry]:
    """The entries whose attributes have these values. Raises `UserError` naming the choice, if none has."""
    for key, wanted in (keep or {}).items():
        values: Counter[str] = Counter()
        kept = []
        for entry in entries:
            value = entry.attributes.get(key)
            has = [str(item) for item in value] if isinstance(value, list) else [str(value)] if value else []
            values.update(has)
            if wanted in has:
                kept.append(entry)
        if not kept:
            choice = ", ".join(f"{value} ({count})" for value, count in values.most_common(12))
            raise UserError(
                f'{root}: no clip has {key} = "{wanted}"; there are: {choice or "no values at all"}'
            )
        entries = kept
    return entries


def _looked_into(entry: ManifestEntry) -> ManifestEntry | MediaError:
    """The entry with what its files really hold, or what is wrong with one of them."""
    try:
        _look_beside(entry)
        if is_sound(entry.path):
            check_times(entry, sound_seconds(entry.path), str(entry.path))
            return replace(entry, kind="sound")
        if entry.of_several_files:
            return _looked_into_scenes(entry)
        info = probe(entry.path, fps=entry.fps, count=True)
        if info.kind == "frames":
            read_clip(entry.path, frames=1, fps=info.fps, source_fps=info.fps)
        if info.kind != "image":
            check_times(entry, info.duration, str(entry.path))
    except MediaError as error:
        return error
    return replace(
        entry,
        kind=info.kind,
        fps=info.fps or None,
        frames=info.frames,
        width=info.width,
        height=info.height,
    )


def _look_beside(entry: ManifestEntry) -> None:
    """Raises `MediaError` for a sound, a reference or a mask that cannot be read."""
    if entry.audio is not None:
        sound_seconds(entry.audio)
    for path in (entry.reference, entry.mask):
        if path is not None:
            _ = sound_seconds(path) if path is entry.reference and is_sound(path) else probe(path)


def _looked_into_scenes(entry: ManifestEntry) -> ManifestEntry:
    """A story of several files: each is counted, and no shot lasts longer than its file."""
    scenes = []
    for number, scene in enumerate(entry.scenes):
        path = scene.path or entry.path
        info = probe(path, count=True)
        alone = replace(entry, start=scene.start, end=scene.end, scenes=())
        check_times(alone, info.duration, f"{path} (scene {number} of {entry.id})")
        scenes.append(replace(scene, end=min(scene.end, info.duration)))
    info = probe(entry.scenes[0].path or entry.path)
    return replace(entry, kind="video", scenes=tuple(scenes), width=info.width, height=info.height)
