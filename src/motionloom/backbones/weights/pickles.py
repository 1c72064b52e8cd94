"""Tensors out of files that others pickled, for ``motionloom convert`` and nothing else.

torch's restricted unpickler builds tensors, containers and numbers and refuses every other object, so no code
of the file's is run. It is the one place that unpickles: everything else asks for safetensors.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from motionloom.backbones.weights.files import Weights, with_config
from motionloom.errors import UserError

INSIDE = ("generator_ema", "generator", "ema", "state_dict", "model", "module")
"""Where training scripts keep a network's weights in a larger dictionary, the first choice first."""
REFUSED = torch.serialization.pickle.UnpicklingError
WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")


def open_pickle(path: Path) -> Weights:
    """The tensors of a ``.pt``, ``.pth``, ``.ckpt`` or ``.bin`` file, mapped where the file allows it.

    Raises:
        UserError: it is no such file, holds other objects than tensors, or no weights.
    """
    tensors = _weights(_load(path))
    if not tensors:
        raise UserError(f"{path} holds no dictionary of tensors: name the file with the network's weights")
    bare = {WRAPPERS.sub("", name): t for name, t in tensors.items()}
    if all(name.startswith("model.") for name in bare):
        bare = {name.removeprefix("model."): t for name, t in bare.items()}
    return with_config(Weights.of_tensors(str(path), bare), path.parent)


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


def _weights(value: Any) -> dict[str, Tensor]:
    if not isinstance(value, Mapping):
        return {}
    for key in INSIDE:
        if isinstance(value.get(key), Mapping):
            return _weights(value[key])
    return {str(name): t for name, t in value.items() if isinstance(t, Tensor)}
