"""Who may write a cache: one run alone, or several workers with a share each.

Locks go with the process that holds them, however it ends; a file that a killed one leaves means nothing.
"""

from __future__ import annotations

import fcntl
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from motionloom.errors import UserError

LOCK, _WORKER = ".lock", ".worker"


@contextmanager
def locked(out: Path, *, wait: bool = False) -> Iterator[None]:
    """Make the folder, and be the only one who writes there.

    Args:
        wait: for the other, rather than refuse.

    Raises:
        UserError: the folder cannot be written, or another run is writing.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = open(out / LOCK, "w")  # noqa: SIM115 - closed by the with below
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); name another folder") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            raise UserError(f"{out}: another run is writing this cache; wait for it to end") from error
        yield


@dataclass(frozen=True)
class Share:
    """The part of one of several workers."""

    number: int = 1
    of: int = 1

    @staticmethod
    def parse(text: str) -> Share:
        """``2/4`` is the second of four. Raises UserError for anything else."""
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
        share = Share(*map(int, found.groups())) if found else Share(0)
        if not 1 <= share.number <= share.of:
            raise UserError(f"--worker {text}: write I/N, the I-th of N workers, for instance 2/4")
        return share

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def has(self, item: int) -> bool:
        """Whether it is one of this worker's."""
        return item % self.of == self.number - 1


class Held:
    """A share of a folder, held until it is let go or the process ends. Take and release it while ``locked``.

    Raises:
        UserError: another process has this share, or others have divided the work otherwise.
    """

    def __init__(self, out: Path, share: Share) -> None:
        for number, of in _at_work(out):
            if of != share.of:
                raise UserError(
                    f"{out}: worker {number}/{of} is at work there, and {share} would divide the rows "
                    f"otherwise; take a share of {of}, or wait for it to end"
                )
            if number == share.number:
                raise UserError(
                    f"{out}: another run makes this share ({share}); wait for it to end, or take another "
                    "share with --worker I/N"
                )
        self._path = out / f"{_WORKER}-{share.number}-of-{share.of}"
        try:
            self._handle = open(self._path, "w")  # noqa: SIM115 - its life is the worker's
        except OSError as error:
            raise UserError(f"{out}: cannot be written ({error.strerror}); mend that") from error
        fcntl.flock(self._handle, fcntl.LOCK_EX)

    def release(self) -> bool:
        """Let go. Returns whether nobody else is at work."""
        self._path.unlink(missing_ok=True)
        self._handle.close()
        return not _at_work(self._path.parent)


def _at_work(out: Path) -> list[tuple[int, int]]:
    """The shares whose locks are held."""
    found = []
    for path in out.glob(f"{_WORKER}-*-of-*"):
        number, of = map(int, re.findall(r"\d+", path.name))
        with open(path) as handle:
            if not _free(handle):
                found.append((number, of))
    return sorted(found)


def _free(handle: IO[str]) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
