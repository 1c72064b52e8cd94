"""Tensors on disk: safetensors only, read lazily, with every damage said in one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from motionloom.errors import UserError

PICKLES = {".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle"}


class TensorFile(Mapping[str, Tensor]):
    """A safetensors file as a mapping; a tensor is read when it is asked for.

    Raises:
        UserError: no such file, a pickle, or not whole.
    """

    def __init__(self, path: Path) -> None:
        refuse_pickle(path)
        self.path = path
        try:
            self._file = safe_open(str(path), framework="pt")
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path} is not a whole safetensors file ({error}): copy it again or remove it"
            ) from None
        self._names = set(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)


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


def refuse_pickle(path: Path) -> None:
    """Raises UserError for files of pickled objects, whatever they are called."""
    pickled = path.suffix.lower() in PICKLES
    if not pickled and path.is_file():
        with path.open("rb") as file:
            head = file.read(4)
        # A pickle of protocol 2 or later, or torch.save's zip. A safetensors file starts with its header's
        # length.
        pickled = head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") or head == b"PK\x03\x04"
    if pickled:
        raise UserError(
            f"{path} is a pickle and is not opened, because loading one can run any code: "
            "convert its weights to safetensors where you trust it"
        )
