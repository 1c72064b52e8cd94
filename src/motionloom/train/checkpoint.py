"""Checkpoints: a folder that is either whole or absent.

``<run>/checkpoints/step_00000060/`` holds

    manifest.json          written last: format, and the size and SHA-256 of every other file
    recipe.yaml            the resolved recipe
    state.json             where the run stands, and what must not change under it
    model.safetensors      weights of every module, ``module.path.of.tensor``
    ema.safetensors        the same names with averaged weights (when EMA is on)
    optimizer.safetensors  ``turn/parameter/key``
    tokenizer/ ...         whatever the objects that made the latents and the text need to come back

It is written to a ``.tmp`` sibling, flushed to the disk, and renamed. Tensors are whole, so a checkpoint
knows nothing of the number of ranks.
"""

from __future__ import annotations

import errno
import filecmp
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from motionloom.backbones.weights import Sink, refuse_pickle, write_file
from motionloom.durable import flush
from motionloom.errors import UserError
from motionloom.train.tensors import TensorFile

FORMAT = 1
MANIFEST = "manifest.json"
UNFINISHED = ".tmp"


class Saveable(Protocol):
    """A tokenizer or text encoder."""

    def save(self, folder: Path) -> None:
        """Write everything that bringing it back needs."""
        ...


@dataclass(frozen=True)
class Contents:
    """What goes into a checkpoint."""

    step: int
    state: Mapping[str, Any]
    recipe: str
    tensors: Mapping[str, Mapping[str, Tensor]]
    """By file, without ``.safetensors``."""
    folders: Mapping[str, Saveable]


def name_of(step: int) -> str:
    """``step_00000060``."""
    return f"step_{step:08d}"


def checkpoints(run_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(folder.parent for folder in (run_dir / "checkpoints").glob(f"step_*[0-9]/{MANIFEST}"))


def latest(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    return next(reversed(checkpoints(run_dir)), None)


def refuse_held(run_dir: Path) -> None:
    """Raises UserError where a run has checkpoints already: a new one must not begin there."""
    if (newest := latest(run_dir)) is not None:
        raise UserError(
            f"{run_dir} already holds a run ({newest.name}): go on with --resume, "
            "or start another with experiment_name=..."
        )


def clean(run_dir: Path) -> None:
    """Remove what a killed process left half-written. At the start of a run only, before any save."""
    for leftover in (run_dir / "checkpoints").glob(f"*{UNFINISHED}"):
        shutil.rmtree(leftover, ignore_errors=True)


def save(run_dir: Path, contents: Contents) -> Path:
    """Write a checkpoint; afterwards it is there whole.

    Raises:
        UserError: it could not be written (a full disk, no permission, a folder in the way). Nothing of it
            remains, and older checkpoints are untouched.
    """
    final = run_dir / "checkpoints" / name_of(contents.step)
    unfinished = final.with_name(final.name + UNFINISHED)
    try:
        if final.exists():
            raise FileExistsError(errno.EEXIST, "it is there already: move it away")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        _write(unfinished, contents, checkpoints(run_dir))
        os.rename(unfinished, final)
        flush(final.parent)
    except (OSError, UserError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(_why_not(final, error)) from error
    return final


def purge(run_dir: Path, keep: int) -> list[str]:
    """Remove all but the newest ``keep`` (at least 1); returns a line for each that would not go."""
    complaints = []
    for old in checkpoints(run_dir)[: -max(keep, 1)]:
        doomed = old.with_name(old.name + UNFINISHED)
        try:
            # Renamed first: a removal that is cut short must not leave a part under a checkpoint's name.
            os.rename(old, doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            complaints.append(f"the old checkpoint {old} could not be removed: {error.strerror or error}")
    return complaints


def _write(folder: Path, contents: Contents, older: list[Path]) -> None:
    (folder / "recipe.yaml").write_text(contents.recipe, encoding="utf-8")
    (folder / "state.json").write_text(json.dumps(contents.state, indent=1) + "\n", encoding="utf-8")
    for name, tensors in contents.tensors.items():
        write_file(folder / f"{name}.safetensors", Sink.of_tensors(tensors))
    for name, thing in contents.folders.items():
        (folder / name).mkdir()
        thing.save(folder / name)
        for file in sorted(p for p in (folder / name).rglob("*") if p.is_file()):
            _share(file, [one / file.relative_to(folder) for one in older])
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        flush(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    manifest = folder / MANIFEST
    manifest.write_text(
        json.dumps({"format": FORMAT, "step": contents.step, "files": files}, indent=1) + "\n"
    )
    flush(manifest)
    for directory in (*(p for p in folder.rglob("*") if p.is_dir()), folder):
        flush(directory)


def _share(file: Path, older: list[Path]) -> None:
    """Let ``file`` be the one that older checkpoints of the run have, where it says the same: a tokenizer's
    weights take room once.

    Never where it has a name outside of them: what a run saved must not change with anybody else's folder.
    """
    older = [one for one in older if one.is_file()]
    if not older:
        return
    names = sum(one.samefile(older[-1]) for one in older)
    if older[-1].stat().st_nlink != names or not filecmp.cmp(older[-1], file, shallow=False):
        return
    link = file.with_name(f".{file.name}.link")
    try:
        os.link(older[-1], link)
    except OSError:
        return  # a disk without links
    os.replace(link, file)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _why_not(final: Path, error: Exception) -> str:
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(
        word in str(error) for word in ("No space left", "StorageFull", "quota", "File too large")
    )
    fix = "free some space or lower train.keep_checkpoints" if full else "mend it"
    older = latest(final.parent.parent)
    return (
        f"checkpoint {final} was not written: {'the disk is full' if full else error}; {fix}, then resume. "
        f"{f'{older.name} is untouched' if older else 'There is no older checkpoint'}"
    )


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was opened and found whole."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return int(self.state["step"])

    @property
    def recipe(self) -> str:
        """The resolved recipe, YAML."""
        return (self.folder / "recipe.yaml").read_text(encoding="utf-8")

    @property
    def has_ema(self) -> bool:
        """Whether averaged weights are in it."""
        return (self.folder / "ema.safetensors").exists()

    def tensors(self, name: str) -> TensorFile:
        """``model``, ``ema``, ``optimizer`` or ``beside`` (a critic), read lazily."""
        return TensorFile(self.folder / f"{name}.safetensors")

    def weights(self, ema: bool) -> TensorFile:
        """Averaged weights if asked for and there, else the raw ones."""
        return self.tensors("ema" if ema and self.has_ema else "model")


def load(path: Path, verify: bool = True) -> Checkpoint:
    """Open a checkpoint folder, or the newest one of a run folder.

    Args:
        verify: compare every file's SHA-256; otherwise its size alone.

    Raises:
        UserError: nothing there, not a checkpoint, a pickle, or a file that is missing, cut short or changed;
            names the file and the way out.
    """
    folder = _find(path)
    manifest = _read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT or not isinstance(manifest.get("files"), dict):
        raise UserError(
            f"{folder / MANIFEST} is of format {manifest.get('format')!r}, this version reads {FORMAT}: "
            "use the version of motionloom that wrote it"
        )
    for name, expected in manifest["files"].items():
        _check(folder, name, expected, verify)
    return Checkpoint(folder, _read_json(folder / "state.json"))


def _find(path: Path) -> Path:
    if path.is_file():
        refuse_pickle(path)
        raise UserError(f"{path} is a file: name the checkpoint's folder, step_..., or the run's")
    if not path.is_dir():
        raise UserError(
            f"{path}: no such checkpoint; name a folder step_... or a run folder that has checkpoints/"
        )
    if (path / MANIFEST).is_file():
        return path
    newest = latest(path)
    if newest is None:
        raise UserError(
            f"{path} holds no whole checkpoint (no {MANIFEST}): name a folder step_... or a run folder"
        )
    return newest


def _check(folder: Path, name: str, expected: Any, verify: bool) -> None:
    path = folder / name
    way_out = f"copy {folder.name} again, or remove it to fall back on an older checkpoint"
    inside = path.resolve().is_relative_to(folder.resolve())
    if not (inside and isinstance(expected, dict) and "bytes" in expected and "sha256" in expected):
        raise UserError(f"{folder / MANIFEST} is damaged at {name!r}: {way_out}")
    if not path.is_file():
        raise UserError(f"{path} is missing: {way_out}")
    if (size := path.stat().st_size) != expected["bytes"]:
        raise UserError(f"{path} has {size} bytes instead of {expected['bytes']}: {way_out}")
    if verify and _sha256(path) != expected["sha256"]:
        raise UserError(f"{path} was changed after it was written (SHA-256 differs): {way_out}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy the checkpoint again or remove it") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is no JSON object: copy the checkpoint again or remove it")
    return value
