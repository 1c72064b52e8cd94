"""Rows of the LMDBs that CausVid and Self-Forcing train on: latents, or states of a teacher's walks.

Keys: ``latents_{i}_data`` (float16, row-major), ``prompts_{i}_data`` (UTF-8), ``latents_shape`` ("N d1 d2
...") and ``prompts_shape``. A row is (F, C, h, w), or (K + 1, F, C, h, w) whose last entry is clean; nothing
says at which noise levels the others stand. The shape is that of whatever was written last, "N" alone if that
was nothing, and no writer checks a row against it: every row is checked here.

Shapes: K levels, F latent frames, h x w latent cells, C channels.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motionloom.errors import UserError

_DATA = "data.mdb"
_KEY = re.compile(rb"(latents|prompts)_(\d{1,12})_data")
_HALF = np.dtype("<f2")


@dataclass(frozen=True)
class LmdbRow:
    """A clip."""

    prompt: str
    x_KFhwC: NDArray[np.float16]
    """The last entry is clean; a row of latents has no other."""


@dataclass(frozen=True)
class LmdbFault:
    """Why a row cannot be used."""

    what: str
    kind: str


@dataclass(frozen=True)
class Rows:
    """What is in one LMDB, by its own account and by its keys."""

    folder: Path
    name: str
    """Of the rows in a cache, before their number."""
    numbers: tuple[int, ...]
    """Of rows that have latents, a prompt or both."""
    missing: int
    """Rows that the LMDB counts and does not have."""
    shape: tuple[int, ...]
    """Of a row, as the LMDB says; empty if it does not."""
    row_bytes: int
    """Of the latents of most rows."""
    stamp: tuple[int, int]
    """Bytes of its file, and when it was last written."""


def find_lmdbs(folder: Path) -> list[Rows]:
    """The LMDB in a folder, or those in its folders: shards.

    Raises:
        UserError: there is none, or one cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: is not a folder; name the LMDB's folder, which holds {_DATA}")
    shards = [folder] if (folder / _DATA).is_file() else sorted(f.parent for f in folder.glob(f"*/{_DATA}"))
    if not shards:
        raise UserError(f"{folder}: holds no LMDB ({_DATA} is missing); name the folder that it is in")
    name = folder.resolve().name
    return [_rows_of(shard, name if shard == folder else f"{name}/{shard.name}") for shard in shards]


def read_rows(
    rows: Rows, states: int, latent_shape: tuple[int, int, int, int]
) -> Iterator[tuple[int, LmdbRow | LmdbFault]]:
    """Every row with its number, or what is wrong with it.

    Args:
        states: entries of a row, the clean one among them; 1 for latents.
        latent_shape: (F, h, w, C) of a clip.
    """
    frames, height, width, channels = latent_shape
    shape = (states, frames, channels, height, width)
    needed = int(np.prod(shape)) * _HALF.itemsize
    with _reading(rows.folder) as transaction:
        for number in rows.numbers:
            blob, prompt = (
                transaction.get(f"{what}_{number}_data".encode()) for what in ("latents", "prompts")
            )
            yield number, _row(number, blob, prompt, shape, needed)


def _row(number: int, blob: Any, prompt: Any, shape: tuple[int, ...], needed: int) -> LmdbRow | LmdbFault:
    for what, value in (("latents", blob), ("prompts", prompt)):
        if value is None:
            return LmdbFault(f"{what}_{number}_data is missing", "missing key")
    if len(blob) != needed:
        what = "truncated" if len(blob) < needed else "too long"
        told = "x".join(map(str, shape if shape[0] > 1 else shape[1:]))
        return LmdbFault(f"{len(blob)} bytes of latents are {what}: {told} float16 takes {needed}", what)
    try:
        caption = bytes(prompt).decode("utf-8")
    except UnicodeDecodeError:
        return LmdbFault("its prompt is not UTF-8", "unreadable prompt")
    x_KFChw = np.frombuffer(blob, _HALF).reshape(shape)
    if not np.isfinite(x_KFChw).all():
        return LmdbFault("latents that are not finite", "NaN latents")
    return LmdbRow(caption, x_KFChw.transpose(0, 1, 3, 4, 2).copy())


def _rows_of(folder: Path, name: str) -> Rows:
    found: set[int] = set()
    sizes: Counter[int] = Counter()
    with _reading(folder) as transaction:
        for key, value in transaction.cursor():
            if (match := _KEY.fullmatch(key)) is not None:
                found.add(int(match[2]))
                sizes[len(value)] += match[1] == b"latents"
        counted, *shape = _numbers(folder, transaction.get(b"latents_shape"))
    if not found:
        raise UserError(
            f"{folder}: holds no row (keys latents_0_data and prompts_0_data); name an LMDB of CausVid or "
            "Self-Forcing"
        )
    about = (folder / _DATA).stat()
    return Rows(
        folder,
        name,
        tuple(sorted(found)),
        max(0, counted - len(found)),
        tuple(shape),
        max(sizes, key=lambda size: (sizes[size], size)),
        (about.st_size, about.st_mtime_ns),
    )


def _numbers(folder: Path, value: Any) -> list[int]:
    """``N d1 d2 ...``; only 0 for an LMDB that does not say."""
    if value is None:
        return [0]
    text = bytes(value).decode("latin-1").split()
    if not text or not all(re.fullmatch(r"\d{1,12}", word) for word in text):
        raise UserError(
            f"{folder}: latents_shape is {bytes(value)[:60]!r} and not numbers; it is damaged, or no LMDB of "
            "CausVid"
        )
    return list(map(int, text))


@contextmanager
def _reading(folder: Path) -> Iterator[Any]:
    """A read-only transaction. The library is imported late, and may not be here."""
    try:
        import lmdb
    except ImportError as error:
        raise UserError("LMDBs need lmdb, which is not installed: pip install 'motionloom[lmdb]'") from error
    try:
        with lmdb.open(str(folder), readonly=True, lock=False, readahead=False) as environment:
            # It is mapped into memory: to look beyond the end of the file would end the process.
            needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
            if (has := (folder / _DATA).stat().st_size) < needed:
                raise UserError(
                    f"{folder / _DATA}: is cut short ({has} of {needed} bytes); copy it again, whole"
                )
            with environment.begin(buffers=True) as transaction:
                yield transaction
    except lmdb.Error as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{folder}: cannot be read as an LMDB ({reason}); restore it or name another"
        ) from error
