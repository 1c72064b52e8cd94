"""Weights to disk: safetensors, a tensor at a time, in shards if they are large, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from motionloom.backbones.weights.files import DTYPES, Weights
from motionloom.durable import flush
from motionloom.errors import UserError

SHARD_BYTES = 5_000_000_000
"""What diffusers splits at unless told otherwise is 10 GB; smaller shards move and fail in smaller pieces."""
DIFFUSERS_NAME = "diffusion_pytorch_model"

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Sink:
    """What is about to be written: tensors by name, produced one at a time when their turn comes."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    read: Callable[[str], Tensor]

    @staticmethod
    def of(weights: Weights, dtype: torch.dtype | None = None) -> Sink:
        """The tensors of opened files; floating-point ones as ``dtype`` (None: as they are)."""
        dtypes = {
            name: dtype if dtype is not None and stored.dtype.is_floating_point else stored.dtype
            for name, stored in weights.tensors.items()
        }
        return Sink(
            {name: stored.shape for name, stored in weights.tensors.items()},
            dtypes,
            lambda name: weights.read(name).to(dtypes[name]),
        )

    @staticmethod
    def of_tensors(tensors: Mapping[str, Tensor]) -> Sink:
        """Tensors in memory."""
        return Sink(
            {name: tuple(t.shape) for name, t in tensors.items()},
            {name: t.dtype for name, t in tensors.items()},
            lambda name: tensors[name].detach(),
        )

    def bytes(self, name: str) -> int:
        """Size of a tensor in the file."""
        return torch.Size(self.shapes[name]).numel() * self.dtypes[name].itemsize


def write_folder(
    folder: Path,
    sink: Sink,
    config: Mapping[str, Any] | None,
    *,
    name: str = DIFFUSERS_NAME,
    shard_bytes: int = SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """A folder of weights as diffusers writes it, there whole or not at all: ``config.json`` and one
    safetensors file, or shards and their index where all together are more than ``shard_bytes``.

    Args:
        config: what ``config.json`` says; None writes none.
        metadata: texts for the header of every file.
        progress: called with (tensors written, tensors in all).

    Returns:
        The files.

    Raises:
        UserError: the folder exists already, or cannot be written.
    """
    with _whole(folder) as unfinished:
        unfinished.mkdir()
        if config is not None:
            _write_json(unfinished / "config.json", config)
        shards = _shards(sink, shard_bytes)
        names = [f"{name}.safetensors"]
        if len(shards) > 1:
            names = [f"{name}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
            mapped = {tensor: file for file, shard in zip(names, shards, strict=True) for tensor in shard}
            size = {"total_size": sum(map(sink.bytes, sink.shapes))}
            _write_json(
                unfinished / f"{name}.safetensors.index.json",
                {"metadata": size, "weight_map": dict(sorted(mapped.items()))},
            )
        count = _Count(len(sink.shapes), progress)
        for file, shard in zip(names, shards, strict=True):
            _write_safetensors(unfinished / file, sink, shard, metadata or {}, count)
        flush(unfinished)
    return sorted(folder.iterdir())


def write_file(
    path: Path,
    sink: Sink,
    *,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """One safetensors file, there whole or not at all.

    Raises:
        UserError: the file exists already, or cannot be written.
    """
    with _whole(path) as unfinished:
        _write_safetensors(
            unfinished, sink, list(sink.shapes), metadata or {}, _Count(len(sink.shapes), progress)
        )


@contextmanager
def _whole(final: Path) -> Iterator[Path]:
    """A place to write to that becomes ``final`` at the end, or vanishes."""
    unfinished = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        if final.exists() or final.is_symlink():
            raise UserError(f"{final} is there already and is not overwritten: name another, or move it away")
        final.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        os.rename(unfinished, final)
        flush(final.parent)
    except OSError as error:
        raise UserError(
            f"{final} was not written ({error.strerror or error}): mend it and try again"
        ) from None
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
        elif unfinished.is_file():
            unfinished.unlink()


def _shards(sink: Sink, limit: int) -> list[list[str]]:
    """Names in order, cut where a file would become larger than ``limit``; a larger tensor has its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in sink.shapes:
        if shards[-1] and size + sink.bytes(name) > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += sink.bytes(name)
    return shards


class _Count:
    """Progress over several files."""

    def __init__(self, total: int, tell: Callable[[int, int], None] | None) -> None:
        self._done, self._total, self._tell = 0, total, tell

    def one(self) -> None:
        self._done += 1
        if self._tell is not None:
            self._tell(self._done, self._total)


def _write_safetensors(
    path: Path, sink: Sink, names: Iterable[str], metadata: Mapping[str, str], count: _Count
) -> None:
    """The format: length of the header (8 bytes, little-endian), header (JSON, padded to 8), numbers.

    Wide types come first, as the library writes them, so that every tensor is aligned.
    """
    order = sorted(names, key=lambda name: (-sink.dtypes[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    at = 0
    for name in order:
        end = at + sink.bytes(name)
        kind = _NAMES[sink.dtypes[name]]
        header[name] = {"dtype": kind, "shape": list(sink.shapes[name]), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name in order:
            value = sink.read(name).cpu().contiguous()
            assert (tuple(value.shape), value.dtype) == (tuple(sink.shapes[name]), sink.dtypes[name]), name
            file.write(value.reshape(-1).view(torch.uint8).numpy().data)
            count.one()
        file.flush()
        os.fsync(file.fileno())


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
