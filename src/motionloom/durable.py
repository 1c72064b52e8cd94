"""What was written stays written, whatever happens to the power."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from motionloom.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


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
            yield temporary
            flush(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        flush(path.parent)


def write_tensors(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Put tensors of the CPU at ``path`` as safetensors, whole or not at all, readable as any new file."""
    from safetensors.torch import save_file

    with whole_file(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(tensors, temporary, metadata)
        temporary.chmod(mode)  # it lets nobody else read what it writes


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
