"""The manifest: one JSON line per captioned clip, and the list of what could not be used and why.

    {"id": "cats/jump", "path": "cats/jump.mp4", "caption": "a cat jumps", "start": 1.5, "end": 4.0}

``path`` is relative to the manifest's folder, or absolute; a sound file is a clip of sound alone. All times
are seconds on the file's own clock. Beside the clip may stand, named as ``path`` is:

    "audio"       its sound; without it that of the clip's own file
    "reference"   a clip or picture to be looked at (and "reference_caption", what is seen in it)
    "mask"        a clip or picture: white is given, black is to be made

They run on the clip's clock: ``start`` and ``end`` hold for them as well. The scenes of a story may come from
files of their own, each with a ``path``; their times are then on the clocks of those.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from motionloom.data.media import Clip, MediaError, read_clip
from motionloom.durable import write_atomic
from motionloom.errors import UserError

# What other tools call the same thing; the first is ours. ``frames_dir`` and ``image_path`` are mmdit's.
PATH_KEYS = ("path", "frames_dir", "image_path", "video_path", "file_name", "file", "video", "image")
CAPTION_KEYS = ("caption", "text", "prompt")
BESIDE = ("audio", "reference", "mask")
"""What may stand beside a clip: names of files."""
_DETAILS = ("fps", "frames", "width", "height", "start", "end", "scenes", "captions", "kind", "caption_from")
_OWN_KEYS = frozenset(
    (*PATH_KEYS, *CAPTION_KEYS, *_DETAILS, *BESIDE, "reference_caption", "id", "attributes")
)
_LARGEST = 1e8  # seconds, frames or pixels: three years of film
_MAX_ID_BYTES = 200  # leaves room for a suffix in the 255 bytes that file systems give a name
_WINDOWS_NAMES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
_UNSAFE_CHARACTERS = re.compile(r'[\x00-\x1f\x7f<>:"|?*\\]')


@dataclass(frozen=True)
class Scene:
    """A shot: from ``start`` until ``end`` in seconds, and what is seen in it.

    ``path`` is the shot's own file, and the clock its own, where it is not a part of the entry's.
    """

    start: float
    end: float
    caption: str
    path: Path | None = None


@dataclass(frozen=True)
class ManifestEntry:
    """One captioned clip. ``path`` is absolute here, whatever the manifest says.

    ``fps``, ``frames``, ``width`` and ``height`` describe the file (for a frame folder ``fps`` *is* its
    rate). ``start`` and ``end`` choose a part of it; ``captions`` are other wordings of ``caption``;
    ``attributes`` is anything else that is known (tags, group, ...). ``kind`` and ``caption_from`` are what
    ingest found. ``audio``, ``reference`` and ``mask`` are files beside it.
    """

    id: str
    path: Path
    caption: str
    fps: float | None = None
    frames: int | None = None
    width: int | None = None
    height: int | None = None
    start: float = 0.0
    end: float | None = None
    scenes: tuple[Scene, ...] = ()
    captions: tuple[str, ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    kind: str | None = None
    caption_from: str | None = None
    audio: Path | None = None
    reference: Path | None = None
    reference_caption: str | None = None
    mask: Path | None = None

    @property
    def of_several_files(self) -> bool:
        """Whether its scenes lie in files of their own."""
        return any(scene.path is not None for scene in self.scenes)

    def files(self, *beside: str) -> list[Path]:
        """All that it is read from: the clip or its scenes, and what is named of `BESIDE`."""
        scenes = list(dict.fromkeys(scene.path for scene in self.scenes if scene.path is not None))
        named = [path for name in beside if (path := getattr(self, name)) is not None]
        return [*(scenes or [self.path]), *named]


@dataclass(frozen=True)
class Problem:
    """One thing that could not be used: where, what is wrong, what to do.

    ``kind`` is what it is counted under, ``skipped`` how many clips it costs.
    """

    where: str
    what: str
    fix: str
    kind: str
    skipped: int = 1

    @classmethod
    def of(cls, error: MediaError, where: str | None = None) -> Problem:
        """From a raised error, under another name for the place if one is given."""
        return cls(where or error.where, error.what, error.fix, error.kind)

    def __str__(self) -> str:
        return " ".join(f"{self.where}: {self.what}; {self.fix}".split())


@dataclass
class Problems:
    """All that could not be used, in the order in which it was met; ``usable`` counts what could."""

    items: list[Problem] = field(default_factory=list)
    usable: int = 0

    def add(self, problem: Problem) -> None:
        """One more."""
        self.items.append(problem)

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Problem]:
        return iter(self.items)

    @property
    def skipped(self) -> int:
        """How many clips were left out."""
        return sum(problem.skipped for problem in self.items)

    def counts(self) -> dict[str, int]:
        """Clips by kind of problem, the most frequent first; a problem that left none out counts as one."""
        found: Counter[str] = Counter()
        for problem in self.items:
            found[problem.kind] += max(problem.skipped, 1)
        return dict(found.most_common())

    def lines(self) -> list[str]:
        """One line per problem, then the count: ``skipped 3 of 120 clips: 2 truncated, 1 empty caption``."""
        counts = ", ".join(f"{count} {kind}" for kind, count in self.counts().items())
        total = f"skipped {self.skipped} of {self.skipped + self.usable} clips"
        return [*map(str, self.items), f"{total}: {counts}" if counts else total]


def read_manifest(path: str | os.PathLike[str]) -> tuple[list[ManifestEntry], Problems]:
    """The usable lines of a manifest, and what is wrong with the others; a bad line never stops the rest.

    Raises `UserError` only when there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path}: is not a file; name a manifest.jsonl, or make one with `motionloom data ingest`"
        )
    entries: dict[str, ManifestEntry] = {}
    lines: dict[str, int] = {}
    problems = Problems()
    for number, raw in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            continue
        where = f"{path.name} line {number}"
        try:
            entry = entry_from_record(_record(raw, where), path.parent, where)
            if entry.id in entries:
                what = f'id "{entry.id}" is that of line {lines[entry.id]} already'
                raise MediaError(where, what, "give each clip its own id", "duplicate id")
            for file in entry.files(*BESIDE):
                if not file.exists():
                    what, fix = f"{file} does not exist", "correct the path or restore the file"
                    raise MediaError(where, what, fix, "missing file")
        except MediaError as error:
            problems.add(Problem.of(error))
        else:
            entries[entry.id], lines[entry.id] = entry, number
    problems.usable = len(entries)
    return list(entries.values()), problems


def write_manifest(path: str | os.PathLike[str], entries: Iterable[ManifestEntry]) -> None:
    """Write the manifest, whole or not at all. Clips below its folder are named relative to it."""
    folder = Path(os.path.abspath(path)).parent
    lines, seen = [], set()
    for entry in entries:
        assert entry.id not in seen, f"duplicate id {entry.id}"
        seen.add(entry.id)
        lines.append(json.dumps(_record_of(entry, folder), ensure_ascii=False) + "\n")
    write_atomic(path, "".join(lines).encode())


def read_entry(
    entry: ManifestEntry,
    *,
    frames: int | None = None,
    fps: float | None = None,
    size: tuple[int, int] | None = None,
    **options: Any,
) -> Clip:
    """The pixels of an entry of one file: `read_clip` on the part from its ``start`` to its ``end``."""
    duration = None if entry.end is None else entry.end - entry.start
    return read_clip(
        entry.path,
        start=entry.start,
        duration=duration,
        frames=frames,
        fps=fps,
        size=size,
        source_fps=entry.fps,
        **options,
    )


def check_id(id: object, where: str) -> str:
    """An id that can name a file everywhere; a ``/`` makes a subfolder. Raises `MediaError` otherwise."""
    fix = "use letters, digits, '-', '_' and '/'"
    if not isinstance(id, str):
        raise MediaError(where, f"id is {_type_name(id)}, not text", fix, "unsafe id")
    wrong = None
    parts = id.split("/")
    if not id.strip():
        wrong = "id is empty"
    elif len(id.encode(errors="replace")) > _MAX_ID_BYTES:
        wrong = f'id "{id[:20]}..." is longer than {_MAX_ID_BYTES} bytes'
    elif any(part in ("", ".", "..") for part in parts):
        wrong = f'id "{id}" would leave its folder'
    elif _UNSAFE_CHARACTERS.search(id) or not _encodes(id):
        wrong = f"id {id!r} holds a character that file names cannot"
    elif any(_WINDOWS_NAMES.fullmatch(part) or part[-1] in ". " for part in parts):
        wrong = f'id "{id}" is a name that Windows keeps for itself'
    if wrong:
        raise MediaError(where, wrong, fix, "unsafe id")
    return id


def safe_id(text: str) -> str:
    """An id made from any text, such as a file's path; what has to change is kept apart by a short hash."""
    try:
        return check_id(text, text)
    except MediaError:
        digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=4).hexdigest()
        return re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")[: _MAX_ID_BYTES - 10] + "-" + digest


def entry_from_record(record: Mapping[str, Any], folder: Path, where: str) -> ManifestEntry:
    """A checked entry from one line; ``folder`` is what relative paths start from. Raises `MediaError`."""
    name = _first(record, PATH_KEYS)
    if name is None and isinstance(record.get("scenes"), list):
        # A story whose scenes bring their own files is named after the first of them.
        scenes_files = (item.get("path") for item in record["scenes"] if isinstance(item, Mapping))
        name = next((file for file in scenes_files if file is not None), None)
    if name is None:
        raise MediaError(
            where, "has no path", 'add "path": the clip\'s file, relative to the manifest', "no path"
        )
    path = _file(name, "path", folder, where)
    if "id" in record:
        id = check_id(record["id"], where)
    else:
        id = safe_id(PurePosixPath(name).with_suffix("").as_posix())
    where = f"{where} (id {id})"
    start, end = _number(record, "start", where, minimum=0.0), _number(record, "end", where, minimum=0.0)
    if end is not None and end <= (start or 0.0):
        what = f"end {end:g} s is not after start {start or 0:g} s"
        raise MediaError(where, what, "swap or correct them", "bad times")
    scenes = _scenes(record.get("scenes"), start or 0.0, end, folder, where)
    beside = {key: _file(record[key], key, folder, where) for key in BESIDE if record.get(key) is not None}
    if any(scene.path for scene in scenes) and (lost := beside.keys() & {"audio", "mask"}):
        what = f"{min(lost)} cannot run beside scenes of several files"
        raise MediaError(where, what, "leave it out, or join the scenes to one file", "bad scenes")
    captions = _captions(record.get("captions"), where)
    attributes = record.get("attributes", {})
    if not isinstance(attributes, Mapping):
        raise MediaError(
            where, f"attributes is {_type_name(attributes)}", "make it an object", "bad attributes"
        )
    fps = _number(record, "fps", where, minimum=0.0, above=True)
    return ManifestEntry(
        id=id,
        path=path,
        caption=_caption(record, captions, scenes, where),
        fps=fps,
        frames=_whole(record, "frames", where),
        width=_whole(record, "width", where),
        height=_whole(record, "height", where),
        start=start or 0.0,
        end=end,
        scenes=scenes,
        captions=captions,
        attributes={**{k: v for k, v in record.items() if k not in _OWN_KEYS}, **attributes},
        kind=_text_or_none(record.get("kind")),
        caption_from=_text_or_none(record.get("caption_from")),
        reference_caption=_reference_caption(record, beside, where),
        **beside,
    )


def check_caption(value: object, where: str) -> str:
    """A caption that says something, with its blanks tidied. Raises `MediaError` otherwise."""
    if not isinstance(value, str):
        raise MediaError(
            where, f"the caption is {_type_name(value)}, not text", "put it in quotes", "bad caption"
        )
    if not _encodes(value):
        raise MediaError(where, "the caption holds half a Unicode character", "correct it", "bad caption")
    caption = " ".join(value.replace("\0", " ").split())
    if not caption:
        raise MediaError(where, "the caption is empty", "write one, or leave the clip out", "empty caption")
    return caption


def check_times(entry: ManifestEntry, duration: float, where: str) -> None:
    """Hold an entry's times against the true length of its file in seconds. Raises `MediaError`."""
    fix = "correct it to a time within the clip"
    slack = 0.05 + 0.01 * duration  # lengths in headers are rounded
    if entry.start >= duration:
        what = f"start {entry.start:g} s is after the end of the clip ({duration:g} s)"
        raise MediaError(where, what, fix, "bad times")
    if entry.end is not None and entry.end > duration + slack:
        raise MediaError(
            where, f"end {entry.end:g} s is after the end of the clip ({duration:g} s)", fix, "bad times"
        )
    if entry.scenes and not entry.of_several_files and entry.scenes[-1].end > duration + slack:
        what = f"a scene ends at {entry.scenes[-1].end:g} s, after the end of the clip ({duration:g} s)"
        raise MediaError(where, what, fix, "bad scenes")


def parse_json(text: str, where: str) -> Any:
    """JSON, or a `MediaError` that says where it breaks."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} " if error.lineno > 1 else ""
        what = f"is not JSON ({error.msg.lower()} at {place}column {error.colno})"
        raise MediaError(where, what, "correct it or delete it", "broken JSON") from error
    except (ValueError, RecursionError) as error:
        raise MediaError(
            where, f"is not usable JSON ({error})", "correct it or delete it", "broken JSON"
        ) from error


def decode_text(raw: bytes, where: str) -> str:
    """UTF-8 text, or a `MediaError` that says where it breaks."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 (byte 0x{raw[error.start]:02x} at {error.start})"
        raise MediaError(where, what, "save it as UTF-8", "not UTF-8") from error


def read_text(path: Path) -> str:
    """A whole text file as UTF-8, or a `MediaError`."""
    try:
        return decode_text(path.read_bytes(), str(path))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise MediaError(path, f"cannot be read ({reason})", "make it readable", "unreadable") from error


def _record(raw: bytes, where: str) -> Mapping[str, Any]:
    record = parse_json(decode_text(raw, where), where)
    if not isinstance(record, Mapping):
        what = f"is {_type_name(record)}, not an object"
        raise MediaError(where, what, 'write {"id": ..., "path": ..., "caption": ...}', "not an object")
    return record


def _record_of(entry: ManifestEntry, folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = {"id": entry.id, "path": _named(entry.path, folder), "caption": entry.caption}
    for key in ("kind", "caption_from", "fps", "frames", "width", "height", "end", "reference_caption"):
        if getattr(entry, key) is not None:
            record[key] = getattr(entry, key)
    for key in BESIDE:
        if (path := getattr(entry, key)) is not None:
            record[key] = _named(path, folder)
    if entry.start:
        record["start"] = entry.start
    if entry.scenes:
        record["scenes"] = [_scene_record(scene, folder) for scene in entry.scenes]
    if entry.captions:
        record["captions"] = list(entry.captions)
    if entry.attributes:
        record["attributes"] = dict(entry.attributes)
    return record


def _named(path: Path, folder: Path) -> str:
    """A file as the manifest names it: relative if it lies below the manifest's folder."""
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def _scene_record(scene: Scene, folder: Path) -> dict[str, Any]:
    record = {"start": scene.start, "end": scene.end, "caption": scene.caption}
    return record if scene.path is None else {**record, "path": _named(scene.path, folder)}


def _file(name: object, key: str, folder: Path, where: str) -> Path:
    """The file that ``key`` names. Raises `MediaError` if that is no name of a file."""
    if not isinstance(name, str) or not name or "\0" in name or not _encodes(name):
        what = f"{key} is {_type_name(name)}, not a file's name"
        raise MediaError(where, what, f"give {key} a file, relative to the manifest", "no path")
    return folder.absolute() / name


def _reference_caption(record: Mapping[str, Any], beside: Mapping[str, Path], where: str) -> str | None:
    value = record.get("reference_caption")
    if value is None:
        return None
    if "reference" not in beside:
        what = "has a reference_caption and no reference"
        raise MediaError(where, what, 'add "reference", or leave it out', "bad caption")
    return check_caption(value, where)


def _caption(
    record: Mapping[str, Any], captions: tuple[str, ...], scenes: tuple[Scene, ...], where: str
) -> str:
    """The clip's caption; failing that its first other wording, or its scenes', one after the other."""
    value = _first(record, CAPTION_KEYS)
    if value is None and captions:
        return captions[0]
    if value is None and scenes:
        return " ".join(scene.caption for scene in scenes)
    if value is None:
        raise MediaError(where, "has no caption", 'add "caption": what is seen', "no caption")
    return check_caption(value, where)


def _captions(value: object, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise MediaError(
            where, f"captions is {_type_name(value)}, not a list", "make it a list of texts", "bad caption"
        )
    return tuple(check_caption(caption, where) for caption in value)


def _scenes(value: object, start: float, end: float | None, folder: Path, where: str) -> tuple[Scene, ...]:
    """Scenes in order of time, checked: within the entry's part, none overlapping. Those of several files
    stay in the order in which they stand."""
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        fix = 'write [{"start": 0, "end": 2, "caption": "..."}, ...]'
        raise MediaError(where, "scenes is not a list of objects", fix, "bad scenes")
    scenes, alone = [], [isinstance(item.get("path"), str) for item in value]
    if any(alone) and not all(alone):
        what = f"scene {alone.index(False)} has no path, others have"
        raise MediaError(where, what, "give all scenes a file of their own, or none", "bad scenes")
    for index, item in enumerate(value):
        here = f"{where} scene {index}"
        first, last = _number(item, "start", here, minimum=0.0), _number(item, "end", here, minimum=0.0)
        if first is None or last is None or last <= first:
            raise MediaError(
                here, "does not run from a start to a later end", "give both in seconds", "bad scenes"
            )
        path = _file(item["path"], "path", folder, here) if alone[index] else None
        if path is None and (first < start or (end is not None and last > end)):
            what = f"({first:g} to {last:g} s) reaches out of the clip's start and end"
            raise MediaError(here, what, "cut it to fit", "bad scenes")
        scenes.append(Scene(first, last, check_caption(_first(item, CAPTION_KEYS) or "", here), path))
    if any(alone):
        return tuple(scenes)
    scenes.sort(key=lambda scene: scene.start)
    for before, after in itertools.pairwise(scenes):
        if after.start < before.end:
            what = f"the scenes at {before.start:g} s and {after.start:g} s overlap"
            raise MediaError(where, what, "let one end where the next begins", "bad scenes")
    return tuple(scenes)


def _number(
    record: Mapping[str, Any], key: str, where: str, *, minimum: float, above: bool = False
) -> float | None:
    value = record.get(key)
    if value is None:
        return None
    fix = f"give a number {'above' if above else 'of at least'} {minimum:g}, or leave it out"
    if isinstance(value, int | float) and abs(value) > _LARGEST:
        raise MediaError(where, f"{key} is {value}", "correct it, or leave it out", f"bad {key}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MediaError(where, f"{key} is {_type_name(value)}, not a number", fix, f"bad {key}")
    if not math.isfinite(value) or value < minimum or (above and value == minimum):
        raise MediaError(where, f"{key} is {value}", fix, f"bad {key}")
    return float(value)


def _whole(record: Mapping[str, Any], key: str, where: str) -> int | None:
    value = _number(record, key, where, minimum=1)
    if value is not None and value != int(value):
        raise MediaError(where, f"{key} is {value}", "give a whole number, or leave it out", f"bad {key}")
    return None if value is None else int(value)


def _first(record: Mapping[str, Any], keys: Iterable[str]) -> Any:
    return next((record[key] for key in keys if record.get(key) is not None), None)


def _text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _encodes(text: str) -> bool:
    """JSON can smuggle in halves of surrogate pairs, which no file name and no tokenizer can take."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _type_name(value: object) -> str:
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return "null" if value is None else names.get(type(value), "an object")
