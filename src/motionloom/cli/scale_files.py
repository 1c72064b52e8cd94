"""The files of a study: its lock, the JSON beside a point, and shares of a manifest."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from motionloom.durable import write_atomic
from motionloom.errors import UserError

LOCK = ".lock"


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Be the only call that works in a folder that is there; the lock goes with the process, however it ends.

    Raises:
        UserError: another one does, or the folder cannot be written.
    """
    try:
        handle = open(out / LOCK, "a+")  # noqa: SIM115 - closed by the with below
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); name another --out") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            who = handle.read().strip() or "another process"
            raise UserError(
                f"{out}: {who} is at work on this study; wait for it to end, or name another --out"
            ) from None
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()} (since {time.strftime('%F %H:%M')})")
        handle.flush()
        yield


def read_json(path: Path) -> dict[str, Any]:
    """What a file of this study says; nothing where there is none. Raises UserError where it is damaged."""
    try:
        found = json.loads(path.read_text("utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) else "it was cut short, or is no JSON"
        raise UserError(f"{path}: cannot be read ({what}); {ANEW}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: is no JSON object; {ANEW}")
    return found


ANEW = "delete it, and the same command makes it anew"


def write_json(path: Path, value: dict[str, Any]) -> None:
    """The same, whole or not at all."""
    write_atomic(path, json.dumps(value, indent=1).encode())


def write_share(source: Path, share: float, target: Path) -> None:
    """A part of a manifest's clips in order of a hash, so that less is a part of more."""
    from motionloom.data.manifest import read_manifest, write_manifest
    from motionloom.rng import key_to_seed

    entries, _ = read_manifest(source)
    ordered = sorted(entries, key=lambda entry: key_to_seed("share of clips", entry.id))
    kept = {entry.id for entry in ordered[: max(1, round(share * len(ordered)))]}
    write_manifest(target, [entry for entry in entries if entry.id in kept])


def digest(path: str) -> str:
    """Short, of a file's content."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
