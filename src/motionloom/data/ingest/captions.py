"""Where a clip's caption comes from: a captions.json, a table, a text file beside it, or its own name."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from motionloom.data.manifest import (
    CAPTION_KEYS,
    Problem,
    check_caption,
    parse_json,
    read_text,
)
from motionloom.data.media import MediaError

# In this order. All may name a clip with or without its suffix, relative to their own folder.
BOOK_NAMES = ("captions.json", "captions.csv", "metadata.csv", "metadata.jsonl")
_NAME_KEYS = ("file_name", "file", "path", "name", "id", "code", "video", "image")
_TEXT_KEYS = (*CAPTION_KEYS, "description")


@dataclass(frozen=True)
class Captioned:
    """A clip's caption, the name of what it was read from, and what else was said of the clip there."""

    caption: str
    source: str
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Note:
    where: str
    record: Mapping[str, Any]


class CaptionBook:
    """The captions that one file holds for the clips at and below its folder."""

    def __init__(self, path: Path) -> None:
        """Read ``path``. Raises `MediaError` if it cannot be read as a whole."""
        self.path = path
        text = read_text(path)
        read: Callable[[str, str], Iterable[_Note]] = {".json": _json_notes, ".csv": _csv_notes}.get(
            path.suffix, _jsonl_notes
        )
        self._notes: dict[str, _Note] = {}
        self._met: set[int] = set()
        for note in read(text, str(path)):
            for key in _NAME_KEYS:
                name = note.record.get(key)
                if isinstance(name, str | int) and not isinstance(name, bool):
                    self._notes.setdefault(str(name).removeprefix("./"), note)

    def note_of(self, clip: Path) -> _Note | None:
        """What stands here about a clip, if anything."""
        name = clip.relative_to(self.path.parent)
        note = self._notes.get(name.as_posix()) or self._notes.get(name.with_suffix("").as_posix())
        self._met.add(id(note))
        return note

    def captioned(self, note: _Note) -> Captioned:
        """A note as a caption. Raises `MediaError` if it holds none."""
        value = next((note.record[key] for key in _TEXT_KEYS if key in note.record), None)
        if value is None:
            raise MediaError(
                note.where, "has no caption", f'add "{_TEXT_KEYS[0]}": what is seen', "no caption"
            )
        known = (*_NAME_KEYS, *_TEXT_KEYS)
        attributes = {key: value for key, value in note.record.items() if key and key not in known}
        return Captioned(check_caption(value, note.where), self.path.name, attributes)

    def unused(self) -> Problem | None:
        """The clips that are captioned here and were not met, as one line."""
        missing = {id(note): name for name, note in self._notes.items() if id(note) not in self._met}
        if not missing:
            return None
        what = f"captions clips that are not there: {some(list(missing.values()))}"
        return Problem(
            self.path.name, what, "restore them or remove their lines", "missing file", len(missing)
        )


def load_books(folder: Path) -> tuple[list[CaptionBook], list[MediaError]]:
    """The caption files of a folder, the most trusted first, and what is wrong with the unreadable ones."""
    books, errors = [], []
    for name in BOOK_NAMES:
        if (folder / name).is_file():
            try:
                books.append(CaptionBook(folder / name))
            except MediaError as error:
                fix = f"{error.fix}; until then it captions nothing"
                errors.append(MediaError(error.where, error.what, fix, error.kind))
    return books, errors


def caption_of(clip: Path, books: Iterable[CaptionBook]) -> Captioned:
    """The caption of a file or frame folder, by the first source that has one. Raises `MediaError`."""
    notes = [(book, note) for book in books if (note := book.note_of(clip)) is not None]
    if notes:
        book, note = notes[0]
        return book.captioned(note)
    beside = clip.with_name(clip.name + ".txt") if clip.is_dir() else clip.with_suffix(".txt")
    if beside.is_file():
        return Captioned(check_caption(read_text(beside), str(beside)), "text file")
    return Captioned(readable_name(clip), "file name")


def readable_name(clip: Path) -> str:
    """``red-ball_bounces (2).mp4`` -> ``red ball bounces``. Raises `MediaError` if no word is left."""
    name = clip.name if clip.is_dir() else clip.stem
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    name = re.sub(r"[\W_]+", " ", name)
    name = re.sub(r"(\s*\d+)+$", "", name).strip()
    if not re.search(r"[^\W\d_]{2}|[^\W\d_a-zA-Z]", name):  # two letters, or a sign that is a word
        fix = f"write its caption into {clip.stem}.txt beside it"
        raise MediaError(clip, "has no caption, and its name is no word", fix, "no caption")
    return name


def some(names: Sequence[str]) -> str:
    """A few of many names: ``a, b, c and 9 more``."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _json_notes(text: str, where: str) -> Iterator[_Note]:
    """``[{"name": ..., "caption": ...}, ...]``, ``{name: caption}`` or ``{name: {"caption": ...}}``."""
    content = parse_json(text, where)
    if isinstance(content, Mapping):
        for name, value in content.items():
            record = value if isinstance(value, Mapping) else {"caption": value}
            yield _Note(f'{where} key "{name}"', {**record, "file_name": name})
    elif isinstance(content, list) and all(isinstance(item, Mapping) for item in content):
        for index, record in enumerate(content):
            yield _Note(f"{where} item {index}", record)
    else:
        fix = 'write {"clip.mp4": "its caption", ...}'
        raise MediaError(where, "is neither an object nor a list of objects", fix, "broken JSON")


def _jsonl_notes(text: str, where: str) -> Iterator[_Note]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            record = parse_json(line, f"{where} line {number}")
            if not isinstance(record, Mapping):
                raise MediaError(f"{where} line {number}", "is not an object", "correct it", "not an object")
            yield _Note(f"{where} line {number}", record)


def _csv_notes(text: str, where: str) -> Iterator[_Note]:
    try:
        rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        columns = rows.fieldnames or []
        if not set(columns) & set(_NAME_KEYS) or not set(columns) & set(_TEXT_KEYS):
            what = f"has the columns {', '.join(columns) or 'none'}"
            raise MediaError(where, what, "name two of them file_name and text", "bad table")
        for row in rows:
            yield _Note(f"{where} line {rows.line_num}", {key: value for key, value in row.items() if key})
    except csv.Error as error:
        raise MediaError(
            where, f"is not a table ({error})", "save it as CSV in UTF-8", "bad table"
        ) from error
