"""The lists of other trainers' datasets: rows of them in the manifest's own words.

    Mask2DiT     pretrain.csv   fps, width, height, caption, path, num_frame: a clip of one shot each
                 sft.json       [{"prefix": id, "values": [{"url", "duration", "caption", ...}, ...]}, ...]:
                                a story each, whose shots lie in files of their own
    VideoX-Fun   metadata.json  [{"file_path", "text", "type", "control_file_path", "audio_path", ...}, ...],
                 or metadata.csv with the same columns

A file may be named relative to the list, to its parent folder, or to where one stands.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from motionloom.data.manifest import (
    ManifestEntry,
    Problem,
    Problems,
    entry_from_record,
    parse_json,
    read_text,
    safe_id,
)
from motionloom.data.media import MediaError, probe
from motionloom.errors import UserError

_MASK2DIT_COLUMNS = {"path", "caption"}
_VIDEOX_COLUMNS = {"file_path", "text"}

Row = Mapping[str, Any]
Find = Callable[[str], Path]
"""A name in the list -> the file. Raises `MediaError` if there is none."""


def is_table(path: Path) -> bool:
    """Whether the name is that of a list."""
    return path.is_file() and path.suffix.lower() in (".csv", ".json")


def read_table(path: Path, problems: Problems) -> list[ManifestEntry]:
    """The clips and stories of a list; rows that cannot be used are added to ``problems``.

    Raises:
        UserError: the list cannot be read, or is none of these.
    """
    try:
        rows = _csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path)
    except MediaError as error:
        raise UserError(str(error)) from error
    entries: list[ManifestEntry] = []
    for where, row, convert in rows:
        try:
            record = convert(row, lambda name: _find(name, path, where))  # noqa: B023 - called at once
            entries.append(entry_from_record(record, path.parent, where))
            if left := _left_out(row):
                what = f"object_file_path names {left} pictures that are left out"
                fix = "a clip takes one reference: name it in control_file_path"
                problems.add(Problem(where, what, fix, "references left out", skipped=0))
        except MediaError as error:
            problems.add(Problem.of(error))
    return entries


def _csv_rows(path: Path) -> Iterator[tuple[str, Row, Callable[[Row, Find], dict[str, Any]]]]:
    table = csv.DictReader(io.StringIO(read_text(path), newline=""))
    columns = set(table.fieldnames or ())
    if columns >= _VIDEOX_COLUMNS:
        convert = _videox
    elif columns >= _MASK2DIT_COLUMNS:
        convert = _mask2dit_clip
    else:
        known = "path and caption (Mask2DiT), or file_path and text (VideoX-Fun)"
        raise MediaError(
            path, f"has the columns {', '.join(sorted(columns)) or 'none'}", f"it needs {known}", "bad table"
        )
    return ((f"{path.name} row {number}", row, convert) for number, row in enumerate(table, start=1))


def _json_rows(path: Path) -> Iterator[tuple[str, Row, Callable[[Row, Find], dict[str, Any]]]]:
    content = parse_json(read_text(path), str(path))
    if not isinstance(content, list) or not all(isinstance(row, Mapping) for row in content):
        fix = 'it needs [{"prefix", "values"}, ...] (Mask2DiT) or [{"file_path", "text"}, ...] (VideoX-Fun)'
        raise MediaError(path, "is not a list of objects", fix, "bad table")
    return (
        (f"{path.name} item {number}", row, _mask2dit_story if "values" in row else _videox)
        for number, row in enumerate(content)
    )


def _mask2dit_clip(row: Row, find: Find) -> dict[str, Any]:
    name = _name(row, "path")
    known = {"fps", "width", "height", "num_frame", "path", "caption"}
    return {
        "id": safe_id(str(Path(name).with_suffix(""))),
        "path": str(find(name)),
        "caption": row.get("caption"),
        "attributes": {key: value for key, value in row.items() if key and key not in known and value},
    }


def _mask2dit_story(row: Row, find: Find) -> dict[str, Any]:
    shots = row["values"]
    if not isinstance(shots, list) or not shots or not all(isinstance(shot, Mapping) for shot in shots):
        raise MediaError(str(row.get("prefix")), "has no shots in values", "list them", "bad scenes")
    scenes = []
    for shot in shots:
        path = find(_name(shot, "url"))
        length = shot.get("duration")
        scenes.append(
            {
                "path": str(path),
                "start": 0.0,
                "end": probe(path).duration if length is None else length,
                "caption": shot.get("caption"),
            }
        )
    prefix = row.get("prefix")
    named = prefix if isinstance(prefix, str) and prefix.strip() else scenes[0]["path"]
    return {"id": safe_id(named), "scenes": scenes}


def _videox(row: Row, find: Find) -> dict[str, Any]:
    name = _name(row, "file_path")
    record: dict[str, Any] = {
        "id": safe_id(str(Path(name).with_suffix(""))),
        "path": str(find(name)),
        "caption": row.get("text"),
    }
    if row.get("control_file_path"):
        record["reference"] = str(find(_name(row, "control_file_path")))
    elif len(objects := _objects(row)) == 1:
        record["reference"] = str(find(objects[0]))
    if row.get("audio_path"):
        record["audio"] = str(find(_name(row, "audio_path")))
    return record


def _objects(row: Row) -> list[str]:
    """Pictures of subjects that VideoX-Fun lets a clip refer to."""
    named = row.get("object_file_path") or []
    return [named] if isinstance(named, str) else [name for name in named if isinstance(name, str)]


def _left_out(row: Row) -> int:
    """How many of them have no place."""
    count = len(_objects(row))
    return count if row.get("control_file_path") or count > 1 else 0


def _name(row: Row, key: str) -> str:
    name = row.get(key)
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise MediaError(str(row.get("prefix") or key), f"has no {key}", f"give {key} a file", "no path")
    return name


def _find(name: str, table: Path, where: str) -> Path:
    for folder in (table.parent, table.parent.parent, Path.cwd()):
        if (folder / name).exists():
            return (folder / name).absolute()
    what = f"{name} does not exist beside {table.name}, nor one folder up, nor here"
    raise MediaError(where, what, "correct the path or restore the file", "missing file")
