"""``motionloom lora``: adapters of a run as a file for other programs, and files on a model for sampling."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from motionloom.cli.console import Out
from motionloom.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from motionloom.backbones.keys import KeyMap
    from motionloom.cli.assemble import Opened
    from motionloom.config import Recipe
    from motionloom.train.checkpoint import Checkpoint
    from motionloom.train.lora import Adapter

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def export(run: Path, out: Path, layout: str, dtype: str, raw: bool, as_json: bool) -> None:
    """Write the adapters of a checkpoint. The base is not needed."""
    import torch

    from motionloom.config import load_recipe
    from motionloom.train import checkpoint
    from motionloom.train.lora_files import (
        LAYOUTS,
        checkpoint_adapters,
        checkpoint_parts,
        write_lora,
    )

    if layout not in LAYOUTS:
        raise UserError(f"--layout {layout}: choose one of {', '.join(LAYOUTS)}")
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
    if out.suffix != ".safetensors":
        raise UserError(f"{out}: name a file that ends in .safetensors")
    if out.exists():
        raise UserError(f"{out} is there already and is not overwritten: name another, or move it away")
    saved = checkpoint.load(run)
    recipe = load_recipe(saved.folder / "recipe.yaml")
    if not recipe.lora.enabled:
        way = "write those with motionloom convert" if recipe.model.imported else "use it by its folder"
        raise UserError(f"{saved.folder} holds no LoRA: its run trained every weight; {way}")
    adapters = checkpoint_adapters(saved.weights(ema=not raw), recipe.lora.alpha)
    parts = checkpoint_parts(saved.weights(ema=not raw))
    notes = _notes(recipe, saved)
    write_lora(
        out,
        adapters,
        layout,
        parts=parts,
        family=recipe.model.type,
        original=_original(recipe.model.type),
        notes=notes,
        dtype=getattr(torch, DTYPES[dtype]),
    )
    if parts:
        Out(as_json).note(
            f"{out} also holds what was trained whole ({', '.join(sorted(parts)[:3])}"
            f"{', ...' if len(parts) > 3 else ''}): motionloom alone reads that, other programs leave it out "
            "or refuse the file"
        )
    size, lora = out.stat().st_size, recipe.lora
    Out(as_json).result(
        {
            "file": str(out),
            "layout": layout,
            "layers": len(adapters),
            "parts": len(parts),
            "bytes": size,
            **notes,
        },
        [f"{out}: {len(adapters)} layers, rank {lora.rank}, alpha {lora.alpha:g}, {size:,} bytes"],
    )


def _notes(recipe: Recipe, saved: Checkpoint) -> dict[str, str]:
    from motionloom.train.lora_files import Notes

    references = recipe.references
    said = Notes(
        # Its own name and its folder's: what is above them is nobody else's business.
        "/".join(Path(recipe.lora.base or recipe.model.name_or_path).parts[-2:]),
        saved.state["identity"]["base"],
        references.downscale if references.enabled else None,
        references.frame_stride if references.enabled else None,
    )
    own = {"rank": str(recipe.lora.rank), "alpha": str(recipe.lora.alpha), "step": str(saved.step)}
    return {**said.header(), **own}


def merge(base: Path, out: Path, wishes: Sequence[str], as_json: bool) -> None:
    """Weights with LoRA files in them, as diffusers reads them; one tensor at a time is in memory."""
    from motionloom.backbones.families import CONFIG_NOTE, recognise
    from motionloom.backbones.weights import DIFFUSERS_NAME, Sink, open_weights, write_file, write_folder
    from motionloom.cli.convert import check_target
    from motionloom.train.lora import merged_together
    from motionloom.train.lora_files import read_parts

    check_target(out)
    _refuse_run(base)
    found = recognise(open_weights(base))
    shapes = {
        name.removesuffix(".weight"): stored.shape
        for name, stored in found.weights.tensors.items()
        if name.endswith(".weight") and len(stored.shape) == 2
    }
    files = [
        (read_fitting(path, shapes, found.family.name), strength)
        for path, strength in map(parse_file, wishes)
    ]
    plain = Sink.of(found.weights)
    console = Out(as_json)
    for path, _ in map(parse_file, wishes):
        if parts := read_parts(path):
            raise UserError(
                f"{path} also holds what was trained whole ({next(iter(parts))}), which merge does not "
                "write: give the file to generate with --lora"
            )
        for line in _left_out(path):
            console.note(line)

    def read(name: str) -> Tensor:
        weight = plain.read(name)
        dtype, layer = weight.dtype, name.removesuffix(".weight")
        if name.endswith(".weight"):
            here = [(adapters[layer], strength) for adapters, strength in files if layer in adapters]
            weight = merged_together(weight, here) if here else weight
        return weight.to(dtype)

    with console.progress("tensors") as advance:
        config = found.sizes.to_diffusers()
        sink = Sink(plain.shapes, plain.dtypes, read)
        if out.suffix == ".safetensors":
            write_file(out, sink, metadata={CONFIG_NOTE: json.dumps(config)}, progress=advance)
            written = [out]
        else:
            written = write_folder(out, sink, config, name=DIFFUSERS_NAME, progress=advance)
    changed = len({layer for adapters, _ in files for layer in adapters})
    console.result(
        {
            "folder" if out.is_dir() else "file": str(out),
            "files": [file.name for file in written],
            "layers": changed,
        },
        [f"{out}: {len(wishes)} LoRA in {changed} of {len(shapes)} layers of {base}"],
    )


def _refuse_run(base: Path) -> None:
    from motionloom.cli.assemble import is_checkpoint
    from motionloom.config import load_recipe
    from motionloom.train import checkpoint

    if not is_checkpoint(base):
        return
    recipe = load_recipe(checkpoint.load(base).folder / "recipe.yaml")
    if recipe.lora.enabled:
        way = (
            f"name its base, {recipe.lora.base or recipe.model.name_or_path}, and with --lora the file that "
            f"`motionloom lora export {base} FILE` writes"
        )
    elif recipe.model.imported:
        way = f"write its weights first with `motionloom convert {base} FOLDER`, and name that folder"
    else:
        way = f"a {recipe.model.type} is not known to diffusers: give the files to generate with --lora"
    raise UserError(f"{base} is a run, which merge does not take: {way}")


def read_fitting(path: Path, shapes: Mapping[str, tuple[int, ...]], kind: str) -> dict[str, Adapter]:
    """The adapters of a file for a model of ``kind`` (``model.type``) with such layers.

    Raises:
        UserError: it cannot be read, or is of another model or size.
    """
    from motionloom.train.lora import check_fits
    from motionloom.train.lora_files import read_lora

    adapters = read_lora(path, shapes, _original(kind))
    check_fits(adapters, shapes, str(path))
    return adapters


def into_weights(model: Opened, wishes: Sequence[str]) -> None:
    """The model's own adapters, if it has any, and those of ``wishes`` (``FILE`` or ``FILE:STRENGTH``) become
    part of its weights: they then cost nothing. Says so where a file seems to be meant for another model.

    Raises:
        UserError: as :func:`read_fitting`.
    """
    from torch import nn

    from motionloom.train.lora import layer_shapes, merge_into_base
    from motionloom.train.lora_files import read_parts
    from motionloom.train.parts import check_parts, part_shapes, put_parts

    backbone = model.predictor.backbone
    assert isinstance(backbone, nn.Module)
    modules = {"backbone": backbone, "text_encoder": model.text_encoder}
    networks = {name: part for name, part in modules.items() if isinstance(part, nn.Module)}
    shapes, whole = layer_shapes(backbone), part_shapes(networks)
    files, parts = [], []
    for path, strength in map(parse_file, wishes):
        files.append((path, read_fitting(path, shapes, model.recipe.model.type), strength))
        parts.append((read_parts(path), strength))
        check_parts(parts[-1][0], whole, str(path))
    for line in _doubts(model, backbone, {path: adapters for path, adapters, _ in files}):
        Out(False).note(line)
    merge_into_base(backbone, [(adapters, strength) for _, adapters, strength in files])
    put_parts(networks, parts)
    backbone.eval().requires_grad_(False)


def _doubts(model: Opened, backbone: nn.Module, files: Mapping[Path, Mapping[str, Adapter]]) -> Iterator[str]:
    from motionloom.train.lora import fingerprint, lora_layers, same_adapters
    from motionloom.train.lora_files import read_notes

    adapted, base = bool(lora_layers(backbone)), ""
    for path, adapters in files.items():
        notes = read_notes(path)
        if adapted and same_adapters(backbone, adapters):
            yield f"{path} holds the adapters of this run, which are in it already: they now count twice"
        if model.weights is not None and notes.base_sha256:
            base = base or fingerprint(model.weights, model.weights.read)
            if base != notes.base_sha256:
                yield f"{path} was trained on other weights than {model.weights.where}: it may do little here"
        for key in ("downscale", "frame_stride"):
            said = getattr(notes, f"reference_{key}")
            if said is not None and said != (here := getattr(model.recipe.references, key)):
                yield (
                    f"{path} was trained with references.{key} {said}, and here it is {here}: give "
                    "references as it knows them"
                )
        yield from _left_out(path)


def _left_out(path: Path) -> Iterator[str]:
    from motionloom.train.lora_files import unread

    if left := unread(path):
        yield (
            f"{path}: {len(left)} of its tensors are no adapters of linear layers and are left out "
            f"({left[0]}{', ...' if len(left) > 1 else ''})"
        )


def parse_file(wish: str) -> tuple[Path, float]:
    """``style.safetensors:0.8`` -> (path, strength); without a strength it is 1."""
    path, colon, strength = wish.rpartition(":")
    if not colon or "/" in strength or "\\" in strength or strength.endswith(".safetensors"):
        return Path(wish), 1.0
    try:
        number = float(strength)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"--lora {wish}: {strength!r} is no number: write FILE or FILE:0.8")
    return Path(path), number


def _original(kind: str) -> KeyMap | None:
    from motionloom.backbones import FAMILIES

    return FAMILIES[kind].original_keys if kind in FAMILIES else None
