"""What was written stays written, whatever happens to the power."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from motionloom.errors import UserError


def flush(path: Path) -> None:
    """Bring a file's content, or the names in a folder (a rename is one), to the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Put ``data`` at ``path``, whole or not at all: see :func:`whole_file`."""
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        file.write(data)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file to be written, which then stands at ``path``: fsync, rename, fsync of the folder.

    Raises `UserError` when the disk is full or the place cannot be written; the old file then still stands.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:100]}.{os.getpid()}.tmp")
    with one_line_on_failure(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            mode = _usual_mode(temporary)
            yield temporary
            temporary.chmod(mode)  # safetensors lets nobody else read what it writes
            flush(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        flush(path.parent)


def _usual_mode(path: Path) -> int:
    """What a new file there may be read and written by; ``path`` is made and removed for it."""
    path.touch()
    mode = path.stat().st_mode
    path.unlink()
    return mode


@contextlib.contextmanager
def one_line_on_failure(path: Path) -> Iterator[None]:
    """A full disk or a place that cannot be written becomes a `UserError` of one line that names ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{path}: the disk is full; free some space and run again (nothing was written)"
            ) from error
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"{path}: cannot be written ({reason}); choose another place") from error
