"""Model folders in diffusers' layout: ``config.json`` and safetensors; read strictly, written in one file."""

from __future__ import annotations

import hashlib
import importlib
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from motionloom.durable import write_atomic, write_tensors
from motionloom.errors import UserError
from motionloom.tokenizers.checks import DAMAGE, one_line

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


def class_named_in(folder: Path) -> str | None:
    """``_class_name`` of the folder's config; None where there is no config.

    Raises:
        UserError: the config is damaged.
    """
    file = folder / CONFIG
    if not file.is_file():
        return None
    try:
        return str(json.loads(file.read_text())["_class_name"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: not a diffusers config ({error!r}): copy the folder again") from None


def load(folder: Path, names: Mapping[str, str], dtype: torch.dtype) -> nn.Module:
    """The model of a folder, frozen and in eval mode.

    Args:
        names: the classes that will do, and the diffusers module that each is in.

    Raises:
        UserError: there is no such folder, it holds another class, its config has values that the class
            cannot use, or its weights are missing, damaged or not those that the config describes.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; check the path")
    found = class_named_in(folder)
    if found is None:
        raise UserError(f"{folder}: no diffusers model here ({CONFIG} is missing): name the model's folder")
    if found not in names:
        raise UserError(f"{folder / CONFIG}: holds {found}, not {' or '.join(names)}: name the right folder")
    kind = _class(names[found], found)
    try:
        with _quiet():
            # Not by way of the meta device: buffers that are not saved would be lost on it.
            model, report = kind.from_pretrained(
                folder,
                torch_dtype=dtype,
                use_safetensors=True,
                low_cpu_mem_usage=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except DAMAGE as error:
        raise UserError(f"{folder}: cannot be loaded as {found} ({one_line(error)}): copy it again") from None
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names_ := sorted(map(str, report[what])):
            more = f" and {len(names_) - 1} more" if len(names_) > 1 else ""
            what = what.replace("_", " ")
            raise UserError(f"{folder}: weights do not fit {CONFIG}: {what} {names_[0]}{more}: copy it again")
    return model.eval().requires_grad_(False)


def save(model: Any, folder: Path) -> None:
    """Write a model so that diffusers and :func:`load` read it; equal models give equal bytes.

    Both files are new ones, whatever stood there: nothing that shares a file with the folder changes with it.

    Raises:
        UserError: the place cannot be written.
    """
    config = {"_class_name": type(model).__name__, **_plain_config(model)}
    write_atomic(folder / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    tensors = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})


def digest(*models: Any, extra: Mapping[str, Any]) -> str:
    """Hex digest of configs and weights as they are in memory, on whatever device, and of ``extra``."""
    found = hashlib.sha256(json.dumps(extra, sort_keys=True).encode())
    for model in models:
        found.update(json.dumps([type(model).__name__, _plain_config(model)], sort_keys=True).encode())
        for part in tensor_bytes(model.state_dict()):
            found.update(part)
    return found.hexdigest()


def tensor_bytes(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """All that there is to know of some tensors, in order of their names, for a digest."""
    for name, tensor in sorted(tensors.items()):
        yield f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode()
        yield _bytes(tensor)


def _bytes(tensor: Tensor) -> memoryview:
    # numpy knows no bfloat16, so the bits are read as bytes.
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _plain_config(model: Any) -> dict[str, Any]:
    """The config without where it came from; tuples as the lists that JSON makes of them."""
    own = {key: value for key, value in dict(model.config).items() if not key.startswith("_")}
    plain: dict[str, Any] = json.loads(json.dumps(own))
    return plain


def _class(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(f"diffusers.{module}"), name)
    except ImportError as error:
        raise UserError(
            f"{name} needs diffusers ({error}): install it with pip install 'motionloom[hf]'"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' and numpy's own warnings on what :func:`load` reports as an error."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    finally:
        logging.set_verbosity(before)
