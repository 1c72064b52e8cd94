"""A table of vectors by clip, for search or clustering elsewhere: parquet, Lance or JSON lines.

Columns: ``id``, ``caption``, ``vector`` (float32, all of one length D). What made them stands in the metadata
of parquet and Lance.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motionloom.durable import flush, one_line_on_failure, write_atomic
from motionloom.errors import UserError

SUFFIXES = (".parquet", ".lance", ".jsonl")


def check_name(path: Path) -> None:
    """Raises UserError for a suffix that is none of ``SUFFIXES``, and for what is there already."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: cannot write {path.suffix or 'no suffix'}; name it {', '.join(SUFFIXES)}")
    if path.exists():
        raise UserError(f"{path}: is there already; name another one, or delete it")


def write_table(
    path: Path,
    ids: Sequence[str],
    captions: Sequence[str],
    vectors_ND: NDArray[np.float32],
    made_by: Mapping[str, str],
) -> None:
    """Write the table, whole or not at all, in the format that the suffix names.

    Raises:
        UserError: as :func:`check_name`, or the place cannot be written.
    """
    check_name(path)
    if path.suffix == ".jsonl":
        rows = zip(ids, captions, vectors_ND.tolist(), strict=True)
        lines = [json.dumps({"id": i, "caption": c, "vector": v}, ensure_ascii=False) for i, c, v in rows]
        write_atomic(path, ("\n".join(lines) + "\n").encode())
        return
    table = _arrow(ids, captions, vectors_ND, made_by)
    if path.suffix == ".lance":
        _write_lance(path, table)
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_atomic(path, sink.getvalue().to_pybytes())


def _arrow(
    ids: Sequence[str], captions: Sequence[str], vectors_ND: NDArray[np.float32], made_by: Mapping[str, str]
) -> Any:
    import pyarrow as pa

    flat = pa.array(np.ascontiguousarray(vectors_ND, np.float32).ravel())
    vectors = pa.FixedSizeListArray.from_arrays(flat, vectors_ND.shape[1])
    columns = {
        "id": pa.array(ids, pa.string()),
        "caption": pa.array(captions, pa.string()),
        "vector": vectors,
    }
    return pa.table(columns).replace_schema_metadata(dict(made_by))


def _write_lance(path: Path, table: Any) -> None:
    import lance

    temporary = path.with_name(f".{path.name[:100]}.{os.getpid()}.tmp")
    with one_line_on_failure(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lance.write_dataset(table, str(temporary))
            os.replace(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        flush(path.parent)
