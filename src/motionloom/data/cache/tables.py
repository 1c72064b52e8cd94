"""The two Lance tables of a cache, and quick random reads of their blobs.

``clips.lance`` has one row per crop of a clip; ``text.lance`` one row per distinct caption, with what made
the embeddings in its schema, so that rows and maker change in one commit. Lance is not fork-safe: never fork
once it is imported; threads are fine.
"""

from __future__ import annotations

import fcntl
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from motionloom.config.recipe import Recipe
from motionloom.errors import UserError

CLIPS, TEXT = "clips.lance", "text.lance"

CLIP_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string()),  # of the crop; the clip's own when there is one crop
        pa.field("clip", pa.string()),
        pa.field("crop", pa.int32()),
        pa.field(
            "bucket", pa.string()
        ),  # WxHxF in pixels; with the tokenizer's spec, the shape of the latents
        pa.field("captions", pa.list_(pa.string())),  # per scene
        pa.field(
            "wordings", pa.list_(pa.string())
        ),  # of a clip of one scene: its caption and other ways to say it
        pa.field("scene_frames", pa.list_(pa.int32())),  # pixel frames per scene
        pa.field("source", pa.string()),
        pa.field("stamp", pa.string()),  # changes when the source or the part taken of it does
        pa.field("latents", pa.large_binary()),  # float16, row-major; empty for sound alone
    ]
)
SOUND_FIELDS = [
    pa.field("sound", pa.large_binary()),  # float16 (T, C), shots end to end; empty for a silent clip
    pa.field("sound_latents", pa.list_(pa.int32())),  # T of each shot
]
REFERENCE_FIELDS = [
    pa.field("reference", pa.large_binary()),  # float16, row-major; empty where there is none
    pa.field("reference_grid", pa.list_(pa.int32())),  # its latent frames, rows and columns
    pa.field("reference_caption", pa.string()),
]
REFERENCE_SOUND_FIELDS = [
    pa.field("reference_sound", pa.large_binary()),  # float16 (T, C)
    pa.field("reference_sound_latents", pa.int32()),  # T
]
MASK_FIELDS = [
    pa.field("mask", pa.large_binary()),  # a bit per latent cell, 1: given; empty: none
    pa.field("masked", pa.bool_()),  # whether there is one
]
STATE_FIELDS = [
    # float16 (K, F, h, w, C), row-major: where a teacher's walk stood at the levels of pairs.json; the
    # latents are where it ended
    pa.field("states", pa.large_binary()),
]
SOUND_STATE_FIELDS = [
    pa.field("sound_states", pa.large_binary()),  # float16 (K, T, C) likewise, of all shots
]
TEXT_SCHEMA = pa.schema(
    [
        pa.field("caption", pa.string()),
        pa.field("tokens", pa.int32()),  # valid ones; padding is not stored
        pa.field("embedding", pa.large_binary()),  # (tokens, dim) in the encoder's own dtype
    ]
)


def clip_schema(recipe: Recipe) -> pa.Schema:
    """The columns of a recipe's clips: those of every cache, and what it asks for besides."""
    fields = [*CLIP_SCHEMA]
    fields += SOUND_FIELDS if recipe.audio.enabled else []
    fields += REFERENCE_FIELDS if recipe.references.enabled else []
    fields += REFERENCE_SOUND_FIELDS if recipe.references.enabled and recipe.references.audio else []
    fields += MASK_FIELDS if recipe.masks.enabled else []
    return pa.schema(fields)


MEMORY_LIMIT = 2**30
"""Blobs of up to this many bytes in all are held in memory: a batch of 64 small clips then costs a tenth of a
millisecond to gather instead of one and a half."""

READERS = ".readers"
# Files of some tens of megabytes are quick to read at random and few enough to list.
_FILE_BYTES = 2**26
# A long run of small commits would list the same files thousands of times over.
_TIDY_COMMITS = 256


def open_table(path: Path) -> Any:
    """A Lance dataset at its present version, or None where there is none.

    Raises:
        UserError: it cannot be read.
    """
    import lance

    if not path.is_dir():
        return None
    try:
        return lance.dataset(str(path))
    except (OSError, ValueError, RuntimeError) as error:
        # A kill before the first commit leaves data files and no version: nothing was promised yet.
        if not any((path / "_versions").glob("*")):
            return None
        raise UserError(
            f"{path}: cannot be read ({_first_line(error)}); restore it or make it again"
        ) from error


def create_table(path: Path, schema: pa.Schema) -> None:
    """An empty table, so that several writers may append; what is there already stays.

    Raises:
        UserError: it cannot be written, or has other columns.
    """
    import lance

    there = open_table(path)
    if there is None:
        with _one_line(path):
            lance.write_dataset(schema.empty_table(), str(path), mode="create")
    elif there.schema.names != schema.names:
        raise UserError(
            f"{path}: has the columns {', '.join(there.schema.names)} and not {', '.join(schema.names)}: "
            "name a new folder"
        )


def copy_table(source: Path, target: Path) -> None:
    """All rows of a table in place of those of another, in one commit."""
    import lance

    mode = "create" if open_table(target) is None else "overwrite"
    with _one_line(target):
        lance.write_dataset(open_table(source), str(target), mode=mode)


def read_table(dataset: Any, columns: Sequence[str]) -> pa.Table:
    """Columns of all live rows, in storage order: row i is the one that ``Blobs`` calls i."""
    return dataset.to_table(columns=list(columns))


class Blobs:
    """One blob column of a table by row number; thread-safe.

    Args:
        total_bytes: of the column, which decides whether it is held in memory.
    """

    def __init__(self, dataset: Any, column: str, total_bytes: int, limit: int = MEMORY_LIMIT) -> None:
        self._dataset, self._column = dataset, column
        self._offsets: NDArray[np.int64] | None = None
        if total_bytes <= limit and dataset is not None:
            self._offsets, self._bytes = _to_memory(dataset, column)

    @property
    def in_memory(self) -> bool:
        """Whether reads cost no input."""
        return self._offsets is not None

    def take(self, rows: Sequence[int]) -> list[NDArray[np.uint8]]:
        """The blobs of these rows, in this order, repeats allowed, as read-only bytes."""
        if self._offsets is not None:
            return [self._bytes[self._offsets[row] : self._offsets[row + 1]] for row in rows]
        column = self._dataset.take(list(rows), columns=[self._column])[self._column]
        return [np.frombuffer(blob.as_buffer(), np.uint8) for blob in column]


def _to_memory(dataset: Any, column: str) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Offsets (n + 1) and the bytes of a blob column, laid end to end."""
    parts, lengths = [], [np.zeros(1, np.int64)]
    for batch in dataset.to_batches(columns=[column]):
        blobs = batch.column(column)
        offsets = np.frombuffer(blobs.buffers()[1], np.int64)[blobs.offset : blobs.offset + len(blobs) + 1]
        if len(blobs):
            parts.append(np.frombuffer(blobs.buffers()[2], np.uint8)[offsets[0] : offsets[-1]])
            lengths.append(np.diff(offsets))
    joined = np.concatenate(parts) if parts else np.zeros(0, np.uint8)
    joined.flags.writeable = False
    return np.cumsum(np.concatenate(lengths)), joined


class Writer:
    """Changes the rows of one table in atomic commits: a kill leaves the last commit readable.

    Args:
        fresh: the first append takes the place of all rows that are there.
        shared: others append to it as well: nothing is tidied on the way.
    """

    def __init__(self, path: Path, schema: pa.Schema, *, fresh: bool = False, shared: bool = False) -> None:
        self._path, self._schema, self._fresh, self._shared = path, schema, fresh, shared
        self._commits = 0

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Commit new rows."""
        import lance

        there = open_table(self._path) is not None
        mode = "create" if not there else "overwrite" if self._fresh else "append"
        with _one_line(self._path):
            lance.write_dataset(self._table(rows), str(self._path), mode=mode)
        self._fresh = False
        self._commits += 1
        if self._commits % _TIDY_COMMITS == 0 and not self._shared:
            self.tidy()

    def replace(self, rows: Sequence[dict[str, Any]]) -> None:
        """Commit rows, each in the place of the one with its id; no moment is without them."""
        dataset = open_table(self._path)
        merge = dataset.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
        with _one_line(self._path):
            merge.execute(self._table(rows))

    def remove(self, ids: Iterable[str]) -> None:
        """Commit without these rows."""
        listed = ", ".join("'" + id_.replace("'", "''") + "'" for id_ in ids)
        with _one_line(self._path):
            open_table(self._path).delete(f"id IN ({listed})")

    def tidy(self) -> None:
        """Join the small files of many commits and forget former versions, which each list all files.

        Left for another time while someone reads the cache: a reader may stand on a former version.
        """
        dataset = open_table(self._path)
        with _nobody_reads(self._path.parent) as alone:
            if dataset is None or not alone or not dataset.count_rows():
                return
            size = sum(file.stat().st_size for file in (self._path / "data").iterdir())
            rows = max(1, _FILE_BYTES * dataset.count_rows() // max(1, size))
            with _one_line(self._path):
                dataset.optimize.compact_files(target_rows_per_fragment=rows)
                dataset.cleanup_old_versions(older_than=timedelta(0))

    def _table(self, rows: Sequence[dict[str, Any]]) -> pa.Table:
        return pa.Table.from_pylist(list(rows), schema=self._schema)


def hold_open(folder: Path) -> IO[str] | None:
    """Keep writers from tidying a cache away under its reader, until the handle is closed or forgotten."""
    try:
        handle = open(folder / READERS, "a")  # noqa: SIM115 - its life is the reader's
        fcntl.flock(handle, fcntl.LOCK_SH)
    except OSError:  # a cache on a read-only disk has no writers
        return None
    return handle


@contextmanager
def _nobody_reads(folder: Path) -> Iterator[bool]:
    with open(folder / READERS, "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """A write that the disk refuses becomes one clear line."""
    try:
        yield
    except OSError as error:
        text = _first_line(error)
        full = any(word in text.lower() for word in ("no space", "os error 28", "quota"))
        reason = "the disk is full; free some space" if full else f"cannot be written ({text}); mend that"
        raise UserError(f"{path}: {reason} and run again: it goes on where it stopped") from error


def _first_line(error: BaseException) -> str:
    """What Lance says, without the places in its source that it adds."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r",? \S+\.rs:\d+:\d+", "", line)
