"""Reading and writing VTP's folders: ``config.json`` and ``model.safetensors``, strictly."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from motionloom.durable import write_atomic, write_tensors
from motionloom.errors import UserError
from motionloom.tokenizers.vtp.config import VTPConfig

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def read_weights(model: nn.Module, file: Path) -> None:
    """Fill a model with a file's tensors, every one of them and no other.

    Raises:
        UserError: the file is missing or damaged, or a tensor is missing, too many, of another shape, or not
            finite; names the first.
    """
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: not readable ({error}): copy the folder again") from None
    wanted = model.state_dict()
    lost, strange = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
    for what, names in (("it lacks", lost), (f"{CONFIG} knows no", strange)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"{file}: {what} {min(names)}{more}: the two are not of one model; copy the folder again"
            )
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            found, asked = (" x ".join(map(str, t.shape)) or "single" for t in (tensor, wanted[name]))
            raise UserError(f"{file}: {name} is {found} and {CONFIG} says {asked}: copy the folder again")
        if not tensor.isfinite().all():
            raise UserError(f"{file}: {name} is not finite: the file is damaged; copy the folder again")
    model.load_state_dict(tensors)


def write_folder(model: nn.Module, config: VTPConfig, folder: Path) -> None:
    """Write both files, each whole or not at all; equal models give equal bytes.

    Raises:
        UserError: the place cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    write_atomic(folder / CONFIG, config.to_json().encode())
