"""Weights on disk: safetensors in one file or in shards, opened without reading the numbers.

Every tensor is known by name, shape and dtype from the headers; its numbers are read when they are asked for,
whole or a region of them, out of memory-mapped files. A view under other names (:meth:`Weights.under_names`)
costs nothing either.
"""

from __future__ import annotations

import json
import math
import mmap
import re
import shlex
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from motionloom.backbones.keys import Origin
from motionloom.errors import UserError

PICKLES = {".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle"}
"""Of several files in a folder, the one that is meant; others are variants of it."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By the name that a safetensors header uses."""

Region = tuple[slice, ...]
"""A part of a tensor, a slice with start and stop for each dimension."""


@dataclass(frozen=True)
class Rows:
    """Rows ``start`` to ``stop`` of a tensor in a file; a scalar has the one row."""

    file: Path
    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Stored:
    """A tensor that has not been read: rows of tensors in files, one after the other."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: tuple[Rows, ...]

    @property
    def bytes(self) -> int:
        """Size of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Weights:
    """Named tensors in one or several files, read lazily.

    A mapping's ``in``, ``len`` and iteration over names; :meth:`read` gives the numbers.
    """

    where: str
    """What messages call it: the file or folder."""
    tensors: Mapping[str, Stored]
    config: dict[str, Any] | None = None
    """What the ``config.json`` beside it says."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """The texts in the (first) file's header."""
    _files: dict[Path, Any] = field(default_factory=dict, repr=False, compare=False)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @staticmethod
    def of_tensors(where: str, tensors: Mapping[str, Tensor]) -> Weights:
        """Tensors that are in memory already."""
        place = Path(where)
        stored = {
            name: Stored(tuple(t.shape), t.dtype, (Rows(place, name, 0, t.shape[0] if t.ndim else 1),))
            for name, t in tensors.items()
        }
        return Weights(where, stored, None, {}, {place: _InMemory(tensors)})

    @property
    def bytes(self) -> int:
        """Size of all numbers."""
        return sum(stored.bytes for stored in self.tensors.values())

    def read(self, name: str, region: Region | None = None) -> Tensor:
        """The numbers of a tensor, or of a region of it, in the file's dtype, on the CPU."""
        stored = self.tensors[name]
        if not stored.shape:
            return self._files[stored.rows[0].file].read(stored.rows[0].name, ())
        region = region or tuple(slice(0, size) for size in stored.shape)
        wanted, at, parts = region[0], 0, []
        for rows in stored.rows:
            begin = max(wanted.start, at) - at + rows.start
            end = min(wanted.stop, at + rows.stop - rows.start) - at + rows.start
            if begin < end:
                part = (slice(begin, end), *region[1:])
                parts.append(self._files[rows.file].read(rows.name, part))
            at += rows.stop - rows.start
        if not parts:
            return torch.empty([max(s.stop - s.start, 0) for s in region], dtype=stored.dtype)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def under(self, prefix: str) -> Weights:
        """Those tensors whose names begin with ``prefix``, without it."""
        found = {name[len(prefix) :]: t for name, t in self.tensors.items() if name.startswith(prefix)}
        return replace(self, tensors=found)

    def only(self, names: Collection[str]) -> Weights:
        """Those tensors that ``names`` names."""
        return replace(self, tensors={name: t for name, t in self.tensors.items() if name in names})

    def beside(self, tensors: Mapping[str, Tensor]) -> Weights:
        """These, and further tensors that are in memory."""
        more = Weights.of_tensors(f"{self.where} (new)", tensors)
        return replace(self, tensors={**self.tensors, **more.tensors}, _files={**self._files, **more._files})

    def under_names(self, names: Mapping[str, Origin]) -> Weights:
        """The same numbers under other names: new name -> the rows of these tensors that make it.

        Raises:
            UserError: a tensor's rows do not divide as a map of names asks.
        """
        return replace(self, tensors={name: self._joined(origin) for name, origin in names.items()})

    def _joined(self, origin: Origin) -> Stored:
        rows: list[Rows] = []
        first = self.tensors[origin[0].name]
        if len(origin) == 1 and origin[0].of == 1:
            return first
        for piece in origin:
            stored = self.tensors[piece.name]
            if not stored.shape or stored.shape[0] % piece.of or stored.shape[1:] != first.shape[1:]:
                raise UserError(
                    f"{self.where}: {piece.name} of shape {list(stored.shape)} does not divide into "
                    f"{piece.of} parts: it is not of the family that its name says"
                )
            height = stored.shape[0] // piece.of
            rows += _cut(stored, piece.index * height, (piece.index + 1) * height)
        count = sum(part.stop - part.start for part in rows)
        return Stored((count, *first.shape[1:]), first.dtype, tuple(rows))


@dataclass(frozen=True)
class _InMemory:
    """Answers as an opened file does."""

    tensors: Mapping[str, Tensor]

    def read(self, name: str, region: Region) -> Tensor:
        return self.tensors[name].detach()[region]


def _cut(stored: Stored, start: int, stop: int) -> Iterator[Rows]:
    """Rows ``start`` to ``stop`` of a tensor, as rows of what it is made of."""
    at = 0
    for rows in stored.rows:
        begin, end = max(start, at), min(stop, at + rows.stop - rows.start)
        if begin < end:
            yield Rows(rows.file, rows.name, begin - at + rows.start, end - at + rows.start)
        at += rows.stop - rows.start


def open_weights(path: str | Path) -> Weights:
    """Weights by name, shape and dtype, without reading their numbers.

    Args:
        path: a ``.safetensors`` file; an ``.index.json`` of shards; a folder that holds either, with or
            without ``config.json`` beside it; or a folder of a whole diffusers pipeline, whose
            ``transformer`` is taken.

    Raises:
        UserError: nothing there, a pickle, a shard that is missing, an index that does not fit its shards, or
            a file that is cut short; says which.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder of weights")
    refuse_pickle(path)
    if path.name.endswith(".index.json"):
        return _open_shards(path)
    if re.search(r"-\d{5}-of-\d{5}\.safetensors$", path.name):
        raise UserError(f"{path} is one shard of several: name their folder, {path.parent}")
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is no .safetensors file: name one, or a folder that holds one")
    return with_config(open_file(path), path.parent)


def refuse_pickle(path: Path) -> None:
    """Raises UserError for files of pickled objects, whatever they are called."""
    if is_pickle(path):
        raise UserError(
            f"{path} is a pickle and is not opened, because loading one can run any code: "
            "take its tensors out once with "
            f"`motionloom convert {shlex.quote(str(path))} FOLDER`, and name that folder"
        )


def is_pickle(path: Path) -> bool:
    """Whether a file is one of pickled objects, by its name or how it begins."""
    if path.suffix.lower() in PICKLES:
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(9)
    # A pickle of protocol 2 or later, or torch.save's zip. A safetensors file starts with its header's
    # length, 8 bytes that may look like either, and then its header.
    known = head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04"))
    return known and head[8:] != b"{"


def only_pickle(folder: Path) -> Path | None:
    """The one file of pickled objects in a folder (of a pipeline: in its ``transformer``) without any
    safetensors."""
    if not any(folder.glob("*.safetensors")) and (folder / "transformer").is_dir():
        folder = folder / "transformer"
    pickles = [file for file in folder.iterdir() if file.suffix.lower() in PICKLES]
    return pickles[0] if len(pickles) == 1 and not any(folder.glob("*.safetensors")) else None


def _open_folder(folder: Path) -> Weights:
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    files = sorted(folder.glob("*.safetensors"))
    if not files and (folder / "transformer").is_dir():
        return _open_folder(folder / "transformer")
    if len(indexes) == 1:
        return _open_shards(indexes[0])
    usual = [
        file for file in files if file.name in ("diffusion_pytorch_model.safetensors", "model.safetensors")
    ]
    if len(files) == 1 or len(usual) == 1:
        return open_weights((usual or files)[0])
    if len(indexes) + len(files) > 1:
        names = ", ".join(file.name for file in (indexes or files)[:3])
        raise UserError(
            f"{folder} holds several sets of weights ({names} ...): name one of them, or its index"
        )
    pickles = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICKLES)
    if pickles:
        refuse_pickle(pickles[0])
    raise UserError(
        f"{folder} holds no .safetensors file: name the folder that does, such as .../transformer"
    )


def _open_shards(index: Path) -> Weights:
    mapped = read_json(index).get("weight_map")
    again = "copy the folder again"
    if not isinstance(mapped, dict) or not mapped or not all(isinstance(v, str) for v in mapped.values()):
        raise UserError(f"{index} is no index of shards (weight_map is missing or empty): {again}")
    names = sorted(set(mapped.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise UserError(f"{index} names {outside[0]}, which is not beside it: {again}")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise UserError(
            f"{index.parent / missing[0]} is missing ({len(missing)} of {len(names)} shards are): {again}"
        )
    shards = {name: open_file(index.parent / name) for name in names}
    tensors: dict[str, Stored] = {}
    for name, file in mapped.items():
        if name not in shards[file]:
            raise UserError(f"{index} says that {name} is in {file}, where it is not: {again}")
        tensors[name] = shards[file].tensors[name]
    extra = [name for shard in shards.values() for name in shard if name not in mapped]
    if extra:
        raise UserError(
            f"{index} does not know of {extra[0]} and {len(extra) - 1} more in its shards: {again}"
        )
    opened = {path: file for shard in shards.values() for path, file in shard._files.items()}
    first = shards[names[0]]
    return with_config(Weights(str(index.parent), tensors, None, first.metadata, opened), index.parent)


def open_file(path: Path) -> Weights:
    """One safetensors file, whatever it is called. Raises UserError as :func:`open_weights`."""
    file = _MappedFile.open(path)
    tensors = {}
    for name, place in sorted(file.places.items()):
        if place.kind not in DTYPES:
            raise UserError(
                f"{path}: {name} is of type {place.kind}, which is not read here: convert the file first"
            )
        rows = Rows(path, name, 0, place.shape[0] if place.shape else 1)
        tensors[name] = Stored(place.shape, DTYPES[place.kind], (rows,))
    return Weights(str(path), tensors, None, file.metadata, {path: file})


@dataclass(frozen=True)
class _Place:
    """Where a tensor stands in a file."""

    kind: str
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class _MappedFile:
    """A safetensors file in the address space, read-only.

    The library maps a file for writing, which Linux refuses where it is larger than the machine's memory, and
    LTX-2 is one file of 43 GB. So the library checks the file and this reads it.
    """

    places: Mapping[str, _Place]
    metadata: Mapping[str, str]
    content: mmap.mmap

    @staticmethod
    def open(path: Path) -> _MappedFile:
        """Raises UserError where it is not a whole safetensors file."""
        refuse_pickle(path)
        try:
            with safe_open(str(path), framework="numpy"):
                pass  # the header is sound, and the file is as long as it says
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(
                f"{path} is not a whole safetensors file ({error}): copy it again, it may have been cut short"
            ) from None
        metadata = header.pop("__metadata__", {})
        places = {
            name: _Place(entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
            for name, entry in header.items()
        }
        return _MappedFile(places, metadata, content)

    def read(self, name: str, region: Region) -> Tensor:
        """A copy of a region, in memory of its own."""
        place = self.places[name]
        dtype = DTYPES[place.kind]
        # numpy has no bfloat16: numbers of as many bytes stand for it.
        raw = np.frombuffer(
            self.content, f"u{dtype.itemsize}", count=math.prod(place.shape), offset=place.start
        )
        part = np.array(raw.reshape(place.shape)[region], order="C")
        return torch.from_numpy(part).view(dtype)


def with_config(weights: Weights, folder: Path) -> Weights:
    """With what the ``config.json`` in ``folder`` says, if there is one."""
    note = folder / "config.json"
    return replace(weights, config=read_json(note)) if note.is_file() else weights


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file. Raises UserError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): copy it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is no JSON object: copy it again")
    return value
