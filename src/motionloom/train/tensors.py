"""Tensors of a checkpoint as mappings, read lazily."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from motionloom.backbones.weights import open_file


class TensorFile(Mapping[str, Tensor]):
    """A safetensors file as a mapping; a tensor is read when it is asked for.

    Raises:
        UserError: no such file, a pickle, or not whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._weights = open_file(path)

    def __getitem__(self, name: str) -> Tensor:
        return self._weights.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


class Renamed(Mapping[str, Tensor]):
    """Some tensors of a file, still read lazily. ``names``: new name -> name in the file."""

    def __init__(self, file: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self._file, self._names = file, names

    def __getitem__(self, name: str) -> Tensor:
        return self._file[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
