"""LoRA files: adapters out of a checkpoint, and in the layouts that diffusers and ComfyUI read.

``diffusers``  ``transformer.<layer>.lora_A.weight`` (A), ``.lora_B.weight`` (B), ``.lora_magnitude_vector``
               (DoRA); alpha stands in the header, under ``lora_adapter_metadata``, as peft's settings.
``comfyui``    ``diffusion_model.<layer as its authors call it>.lora_A.weight`` ...; alpha stands beside them
               as ``<layer>.alpha``. Readers of LTX-2 know no such tensor, or refuse the file for it: there B
               is written alpha / rank times, which every reader understands.

:func:`read_lora` knows both, kohya's ``lora_down``, ``lora_up`` and ``lora_unet_`` names, and peft's own.
Without any alpha in a file alpha is the rank, as everywhere. Parts that a run trained whole stand beside the
adapters, in either layout, as ``motionloom.<name>``: no other program reads those.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor

import motionloom
from motionloom.backbones.keys import KeyMap
from motionloom.backbones.weights import Sink, is_pickle, write_file
from motionloom.errors import UserError
from motionloom.train.lora import TRAINED, Adapter
from motionloom.train.parts import plain_name
from motionloom.train.tensors import TensorFile

Layout = Literal["diffusers", "comfyui"]
LAYOUTS: tuple[Layout, ...] = ("diffusers", "comfyui")

HEADER = "lora_adapter_metadata"
PART = "motionloom."
_PREFIXES = ("transformer.", "model.diffusion_model.", "diffusion_model.", "base_model.model.")
_PARTS = {
    "lora_A": "down",
    "lora_down": "down",
    "lora_B": "up",
    "lora_up": "up",
    "alpha": "alpha",
    "lora_magnitude_vector": "magnitude",
    "dora_scale": "magnitude",
}
_KEY = re.compile(rf"(.+)\.({'|'.join(_PARTS)})(?:\.{TRAINED})?(?:\.weight)?")


def checkpoint_adapters(tensors: Mapping[str, Tensor], alpha: float) -> dict[str, Adapter]:
    """The adapters in a checkpoint's weights (``backbone.<layer>.lora_A.default.weight``), by layer."""
    found = _collect({name.removeprefix("backbone."): t for name, t in tensors.items() if ".lora_" in name})
    return {layer: _adapter(layer, parts, alpha, "the checkpoint") for layer, parts in found.items()}


def checkpoint_parts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a LoRA's checkpoint holds besides adapters: parts that were trained whole, by plain name."""
    return {plain_name(name): tensors[name] for name in tensors if ".lora_" not in name}


def write_lora(
    path: Path,
    adapters: Mapping[str, Adapter],
    layout: Layout,
    *,
    parts: Mapping[str, Tensor] = MappingProxyType({}),
    family: str = "",
    original: KeyMap | None = None,
    notes: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write adapters, by layer name, as one safetensors file.

    Args:
        family: ``model.type``.
        parts: trained whole, by plain name.
        original: how the family's authors call the layers; ``comfyui`` needs it.
        notes: further texts for the header.

    Raises:
        UserError: the layout does not exist for this family or for DoRA; the file is there already or cannot
            be written.
    """
    header = {"motionloom": motionloom.__version__, **(notes or {})}
    if layout == "diffusers":
        tensors = {f"transformer.{name}": t for name, t in _tensors(adapters, lengths=True).items()}
        settings = {f"transformer.{key}": value for key, value in _settings(adapters).items()}
        header[HEADER] = json.dumps(settings, sort_keys=True)
    else:
        tensors = _comfyui(adapters, family, original)
    tensors |= {f"{PART}{name}": tensor for name, tensor in parts.items()}
    write_file(path, Sink.of_tensors({name: t.to(dtype) for name, t in tensors.items()}), metadata=header)


def _tensors(adapters: Mapping[str, Adapter], *, lengths: bool) -> dict[str, Tensor]:
    tensors = {}
    for layer, one in adapters.items():
        tensors[f"{layer}.lora_A.weight"] = one.down_RI
        tensors[f"{layer}.lora_B.weight"] = one.up_OR
        if lengths and one.magnitude_O is not None:
            tensors[f"{layer}.lora_magnitude_vector"] = one.magnitude_O
    return tensors


def _settings(adapters: Mapping[str, Adapter]) -> dict[str, object]:
    """peft's settings; layers that differ from the most usual rank and alpha are named."""
    rank = Counter(one.rank for one in adapters.values()).most_common(1)[0][0]
    alpha = Counter(one.alpha for one in adapters.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{name}": one.rank for name, one in adapters.items() if one.rank != rank},
        "alpha_pattern": {f"^{name}": one.alpha for name, one in adapters.items() if one.alpha != alpha},
        "target_modules": sorted(adapters),
        "use_dora": any(one.magnitude_O is not None for one in adapters.values()),
        "lora_dropout": 0.0,
        "bias": "none",
    }


def _comfyui(adapters: Mapping[str, Adapter], family: str, original: KeyMap | None) -> dict[str, Tensor]:
    if original is None or family not in _ALPHA_BESIDE:
        raise UserError(
            f"the comfyui layout is for {', '.join(_ALPHA_BESIDE)}, and model.type is {family}: use diffusers"
        )
    if any(one.magnitude_O is not None for one in adapters.values()):
        raise UserError("DoRA is not written in the comfyui layout: use diffusers")
    beside = _ALPHA_BESIDE[family]
    tensors: dict[str, Tensor] = {}
    for name, origin in original.to_original([f"{layer}.weight" for layer in adapters]).items():
        assert len(origin) == 1, "an adapted layer is one tensor in either layout"
        one = adapters[origin[0].name.removesuffix(".weight")]
        theirs = f"diffusion_model.{original.without_prefix(name).removesuffix('.weight')}"
        tensors[f"{theirs}.lora_A.weight"] = one.down_RI
        tensors[f"{theirs}.lora_B.weight"] = one.up_OR if beside else one.up_OR * (one.alpha / one.rank)
        if beside:
            tensors[f"{theirs}.alpha"] = torch.tensor(one.alpha)
    return tensors


_ALPHA_BESIDE = {"wan": True, "ltx2": False}
"""Families that ComfyUI knows by their authors' names, and whether their readers take an alpha tensor."""


def read_lora(path: Path, layers: Collection[str], original: KeyMap | None = None) -> dict[str, Adapter]:
    """The adapters of a file by the names that ``layers`` (a model's linear layers) have.

    Raises:
        UserError: not a LoRA, not whole, or for layers that the model does not have; names the first.
    """
    if path.is_file() and is_pickle(path):
        raise UserError(
            f"{path} is a pickle and is not opened, because loading one can run any code: where it is "
            f"nothing but tensors, {_rewrite(path)} makes {path.stem}.safetensors of it, without running any"
        )
    file = TensorFile(path)
    with safe_open(str(path), framework="pt") as opened:
        settings = _own_settings(opened.metadata() or {}, path)
    found = _collect(file)
    if not found:
        raise UserError(
            f"{path} holds no LoRA: none of its tensors is a lora_A, lora_B, lora_down or lora_up"
        )
    known = _names(layers, original)
    adapters = {}
    for name, parts in found.items():
        bare = next((name[len(p) :] for p in _PREFIXES if name.startswith(p)), name)
        layer = known.get(_flat(bare.removeprefix("lora_unet_")))
        if layer is None:
            raise UserError(f"{path} adapts {bare}, which this model does not have: it is of another model")
        alpha = _said_alpha(settings, bare)
        if layer in adapters:
            raise UserError(f"{path} adapts {layer} twice, under two names: write it again")
        adapters[layer] = _adapter(layer, parts, alpha, str(path), bool(settings.get("use_rslora")))
    return adapters


def read_parts(path: Path) -> dict[str, Tensor]:
    """The parts of a LoRA file that were trained whole, by plain name; none in files of other programs."""
    file = TensorFile(path)
    return {name.removeprefix(PART): file[name] for name in file if name.startswith(PART)}


def unread(path: Path) -> list[str]:
    """Tensors of a LoRA file that are neither adapters nor parts: changes of biases and norms, for one."""
    return [name for name in TensorFile(path) if not name.startswith(PART) and not _KEY.fullmatch(name)]


@dataclass(frozen=True)
class Notes:
    """What a LoRA file says of itself; empty or None: it does not say."""

    base: str = ""
    """Name of the weights that it was trained on."""
    base_sha256: str = ""
    """Their fingerprint."""
    reference_downscale: int | None = None
    """How many times smaller, both ways, the references that it was trained with are."""
    reference_frame_stride: int | None = None
    """How many times fewer moments they have."""

    def header(self) -> dict[str, str]:
        """As texts for a file's header; factors of references under the names of the LTX trainer as well,
        which leaves out those that are 1."""
        said = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, theirs in _LTX_FACTORS.items():
            said |= dict.fromkeys(theirs, said[name] if (said[name] or 1) > 1 else None)
        return {name: str(value) for name, value in said.items() if value}


_LTX_FACTORS = {
    "reference_downscale": ("reference_downscale_factor", "reference_spatial_scale_factor"),
    "reference_frame_stride": ("reference_temporal_scale_factor",),
}


def read_notes(path: Path) -> Notes:
    """What the header of a file says, of ours or of the LTX trainer.

    Raises:
        UserError: a factor is no whole number above 0.
    """
    with safe_open(str(path), framework="pt") as opened:
        header = opened.metadata() or {}

    def factor(name: str) -> int | None:
        said = next((header[key] for key in (name, *_LTX_FACTORS[name]) if key in header), None)
        if said is None:
            return None
        try:
            number = float(said)
        except ValueError:
            number = 0.0
        if number < 1 or number != int(number):
            raise UserError(f"{path}: {name} in its header is {said!r}, not 1, 2, ...: write it again")
        return int(number)

    return Notes(
        header.get("base", ""),
        header.get("base_sha256", ""),
        factor("reference_downscale"),
        factor("reference_frame_stride"),
    )


def _rewrite(path: Path) -> str:
    """A command that writes the tensors of a pickle again."""
    code = (
        "import sys, torch; from safetensors.torch import save_file; "
        "save_file(torch.load(sys.argv[1], weights_only=True), sys.argv[2])"
    )
    return f"`{shlex.join(['python', '-c', code, str(path), str(path.with_suffix('.safetensors'))])}`"


def _collect(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors of adapters by layer, then by kind; other tensors of the file are no part of a LoRA."""
    found: dict[str, dict[str, Tensor]] = {}
    for name in tensors:
        if match := _KEY.fullmatch(name):
            found.setdefault(match[1], {})[_PARTS[match[2]]] = tensors[name]
    return found


def _adapter(
    layer: str, parts: Mapping[str, Tensor], alpha: float | None, where: str, rank_stable: bool = False
) -> Adapter:
    if missing := [kind for kind in ("down", "up") if kind not in parts]:
        raise UserError(f"{where}: the {missing[0]}-projection of {layer} is missing: copy it again")
    down_RI, up_OR = parts["down"], parts["up"]
    if down_RI.ndim != 2 or up_OR.ndim != 2 or down_RI.shape[0] != up_OR.shape[1]:
        raise UserError(
            f"{where}: the matrices of {layer} do not fit together "
            f"({tuple(down_RI.shape)} and {tuple(up_OR.shape)}): it is damaged, or not of linear layers"
        )
    rank, magnitude = down_RI.shape[0], parts.get("magnitude")
    said = parts.get("alpha")
    if not rank or (said is not None and said.numel() != 1):
        raise UserError(f"{where}: the rank or alpha of {layer} is no number above 0: copy it again")
    if magnitude is not None and magnitude.numel() != up_OR.shape[0]:
        raise UserError(
            f"{where}: {layer} has {up_OR.shape[0]} rows and lengths of {magnitude.numel()}: it is damaged"
        )
    alpha = float(said) if said is not None else alpha if alpha is not None else float(rank)
    if rank_stable:  # alpha / sqrt(rank) (2312.03732) said as alpha / rank
        alpha *= rank**0.5
    return Adapter(down_RI, up_OR, alpha, None if magnitude is None else magnitude.flatten())


def _own_settings(header: Mapping[str, str], path: Path) -> dict[str, object]:
    """peft's settings: in the header, or in the file that peft itself writes beside."""
    beside = path.with_name("adapter_config.json")
    try:
        if HEADER in header:
            settings = json.loads(header[HEADER])
        elif path.name == "adapter_model.safetensors" and beside.is_file():
            settings = json.loads(beside.read_text(encoding="utf-8"))
        else:
            return {}
        return {key.removeprefix("transformer."): value for key, value in settings.items()}
    except (OSError, ValueError, AttributeError) as error:
        where = f"{HEADER} in its header" if HEADER in header else f"{beside.name} beside it"
        raise UserError(f"{path}: {where} cannot be read ({error}): write it again") from None


def _said_alpha(settings: Mapping[str, object], layer: str) -> float | None:
    pattern = settings.get("alpha_pattern")
    for key, value in pattern.items() if isinstance(pattern, dict) else ():
        if re.match(rf"(.*\.)?({key})$", layer):
            return float(value)
    alpha = settings.get("lora_alpha")
    return float(alpha) if isinstance(alpha, int | float) else None


def _names(layers: Collection[str], original: KeyMap | None) -> dict[str, str]:
    """Every way of calling a layer, without dots and underscores, and the layer."""
    names = {_flat(layer): layer for layer in layers}
    if original is not None:
        for theirs, origin in original.to_original([f"{layer}.weight" for layer in layers]).items():
            if len(origin) == 1:
                name = original.without_prefix(theirs).removesuffix(".weight")
                names.setdefault(_flat(name), origin[0].name.removesuffix(".weight"))
    return names


def _flat(name: str) -> str:
    return re.sub(r"[._]", "", name)
