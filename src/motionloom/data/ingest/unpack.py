"""Archives are strangers' writing: unpack a zip so that it can neither leave its folder nor fill the disk."""

from __future__ import annotations

import os
import shutil
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from motionloom.data.manifest import Problem, Problems
from motionloom.data.media import MediaError
from motionloom.durable import one_line_on_failure
from motionloom.errors import UserError

MAX_UNPACKED_BYTES = 2**38  # 256 GiB in all
MAX_RATIO = 200  # text shrinks 20-fold, pictures hardly; a bomb shrinks a thousandfold
_RATIO_COUNTS_FROM = 2**20


def unpack(archive: Path, into: Path, problems: Problems) -> Path:
    """Unpack a zip below ``into`` and return the folder; what an earlier call unpacked is not unpacked again.

    Members that would leave the folder, links, bombs and damaged members are left out and go to ``problems``.
    Raises `UserError` for what is no zip, or when the disk is full.
    """
    state = archive.stat()
    folder = into / f"{archive.stem}-{state.st_size:x}-{state.st_mtime_ns:x}"
    try:
        with one_line_on_failure(folder), zipfile.ZipFile(archive) as opened:
            folder.mkdir(parents=True, exist_ok=True)
            _unpack_members(opened, folder, archive.name, problems)
    except zipfile.BadZipFile as error:
        raise UserError(f"{archive}: is not a whole zip file ({error}); fetch it again") from error
    return folder


def _unpack_members(opened: zipfile.ZipFile, folder: Path, name: str, problems: Problems) -> None:
    left = MAX_UNPACKED_BYTES
    for member in opened.infolist():
        where = f"{name}/{member.filename}"
        if member.is_dir():
            continue
        try:
            target = _target(member, folder, where)
            _check_size(member, left, where)
            left -= member.file_size
            if not target.is_file():
                _copy(opened, member, target, where)
        except MediaError as error:
            problems.add(Problem.of(error))


def _target(member: zipfile.ZipInfo, folder: Path, where: str) -> Path:
    """Where a member goes. A name that points elsewhere is refused, not corrected."""
    name = member.filename
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "\\" in name or ":" in parts[0] or "\0" in name:
        raise MediaError(
            where, "would be unpacked outside its folder", "leave it out of the zip", "unsafe zip member"
        )
    if stat.S_ISLNK(member.external_attr >> 16):
        raise MediaError(where, "is a link", "put the file itself into the zip", "unsafe zip member")
    return folder.joinpath(*parts)


def _check_size(member: zipfile.ZipInfo, left: int, where: str) -> None:
    ratio = member.file_size / max(member.compress_size, 1)
    if member.file_size > _RATIO_COUNTS_FROM and ratio > MAX_RATIO:
        what = f"grows {ratio:.0f}-fold when unpacked, as a zip bomb does"
        raise MediaError(where, what, "leave it out of the zip", "zip bomb")
    if member.file_size > left:
        what = f"would take the whole over {MAX_UNPACKED_BYTES:,} bytes"
        raise MediaError(where, what, "unpack the zip by hand and ingest the folder", "zip bomb")


def _copy(opened: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path, where: str) -> None:
    """Write one member, whole or not at all; zipfile stops at the size that its header states."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name[:100]}.{os.getpid()}.part")
    try:
        with opened.open(member) as source, open(part, "wb") as file:
            shutil.copyfileobj(source, file)
        os.replace(part, target)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise MediaError(where, "is damaged in the zip", "pack it again", "damaged") from error
    except (RuntimeError, NotImplementedError) as error:
        what = f"cannot be unpacked ({error})"
        raise MediaError(where, what, "pack it without a password, with deflate", "damaged") from error
    finally:
        part.unlink(missing_ok=True)
