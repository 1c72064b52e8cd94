"""Tensors out of files that others pickled, for ``motionloom convert`` and nothing else.

torch's restricted unpickler builds tensors, containers and numbers and refuses every other object, so no code
of the file's is run. It is the one place that unpickles: everything else asks for safetensors.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from motionloom.backbones.weights.files import Weights, with_config
from motionloom.errors import UserError

TRAINED = {"generator_ema": "generator", "ema": "model"}
"""Averaged weights, and those that they are the average of."""
INSIDE = ("generator_ema", "generator", "ema", "state_dict", "model", "module")
"""Where training scripts keep a network's weights in a larger dictionary, the first choice first."""
REFUSED = torch.serialization.pickle.UnpicklingError
WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
OUTER = ("module.", "model.")
"""What a trainer's class may put before every name, the outer one first."""


@dataclass(frozen=True)
class Pickled:
    """What was taken out of a file, and what was left in it."""

    weights: Weights
    taken: str
    """Key of the file's dictionary under which they stood; empty: the dictionary itself."""
    left: tuple[str, ...]
    """Its other keys."""


def open_pickle(path: Path) -> Weights:
    """The tensors of a ``.pt``, ``.pth``, ``.ckpt`` or ``.bin`` file, mapped where the file allows it.

    Raises:
        UserError: as :func:`read_pickle`.
    """
    return read_pickle(path).weights


def read_pickle(path: Path, raw: bool = False) -> Pickled:
    """:func:`open_pickle`, and where in the file the tensors stood.

    Args:
        raw: the last weights and not the averaged ones, of a file that has both (CausVid's and
            Self-Forcing's students: ``generator`` and ``generator_ema``; LightningDiT: ``model``, ``ema``).

    Raises:
        UserError: it is no such file, holds other objects than tensors, no weights, weights that were saved
            in parts, or two of one name; or ``raw`` and no averaged ones.
    """
    content = _load(path)
    taken, left, value = _chosen(path, content, raw)
    while isinstance(value, Mapping) and (deeper := next(_inside(value), None)):
        value = value[deeper]
    tensors = (
        {str(key): t for key, t in value.items() if isinstance(t, Tensor)}
        if isinstance(value, Mapping)
        else {}
    )
    if not tensors:
        named = [*([taken] if taken else []), *left]
        held = f" (it has {', '.join(named[:6])})" if named else ""
        raise UserError(
            f"{path} holds no dictionary of tensors{held}: name the file with the network's weights"
        )
    if taken and (other := [key for key in value if str(key) not in tensors]):
        kinds = ", ".join(map(str, other[:3]))
        raise UserError(f"{path}: {taken} holds more than tensors ({kinds}): save its state dict alone")
    weights = Weights.of_tensors(str(path), _bare(path, tensors))
    return Pickled(with_config(weights, path.parent), taken, left)


def _inside(value: Mapping[Any, Any]) -> Iterator[str]:
    return (key for key in INSIDE if isinstance(value.get(key), Mapping))


def _chosen(path: Path, content: Any, raw: bool) -> tuple[str, tuple[str, ...], Any]:
    """(key, other keys, what stands there)."""
    found = list(_inside(content)) if isinstance(content, Mapping) else []
    if raw:
        last = [trained for averaged, trained in TRAINED.items() if {averaged, trained} <= set(found)]
        if not last:
            raise UserError(f"--raw: {path} holds no averaged weights beside others: leave it out")
        found = last
    if not found:
        keys = content if isinstance(content, Mapping) else ()
        return "", tuple(str(key) for key in keys if not isinstance(content[key], Tensor)), content
    return found[0], tuple(str(key) for key in content if key != found[0]), content[found[0]]


def _bare(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what FSDP, recomputation, compilation and classes around the network add to its names."""
    if flat := next((name for name in tensors if "_flat_param" in name), None):
        raise UserError(
            f"{path}: {flat} is a part of weights that FSDP has cut: save them whole (FULL_STATE_DICT)"
        )
    bare: dict[str, Tensor] = {}
    for name, t in tensors.items():
        if (short := WRAPPERS.sub("", name)) in bare:
            raise UserError(f"{path} holds {short} twice, once as {name}: keep one of them")
        bare[short] = t
    for prefix in OUTER:
        if all(name.startswith(prefix) for name in bare):
            bare = {name.removeprefix(prefix): t for name, t in bare.items()}
    return bare


def _load(path: Path) -> Any:
    for mapped in (True, False):  # files of the time before torch 1.6 cannot be mapped
        try:
            with warnings.catch_warnings():  # of unusual forms, which are read or refused all the same
                warnings.simplefilter("ignore")
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except REFUSED:
            raise UserError(
                f"{path} is no file of torch.save, or holds more than tensors, which is not built, since "
                "that could run any code: save its state dict alone, where you trust it"
            ) from None
        except (RuntimeError, OSError, ValueError, EOFError) as error:
            problem = str(error).splitlines()[0]
    raise UserError(f"{path} cannot be read ({problem}): copy it again, it may have been cut short")
