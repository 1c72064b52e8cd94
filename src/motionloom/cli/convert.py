"""``motionloom convert``: weights from one layout to another, or out of a checkpoint."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motionloom.cli import convert_tokenizer
from motionloom.cli.console import Out
from motionloom.errors import UserError

if TYPE_CHECKING:
    import torch

    from motionloom.backbones.families import Family, Sizes
    from motionloom.backbones.weights import Sink, Weights

LAYOUTS = ("diffusers", "original")
DTYPES = {"keep": None, "fp32": "float32", "bf16": "bfloat16"}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class Source:
    """What is to be written, under diffusers' names."""

    kind: str
    """``diffusers``, ``original`` or ``checkpoint``."""
    family: Family
    sizes: Sizes
    weights: Weights
    left_out: int = 0
    note: str = ""
    """What of a file was taken, and what was not."""


@dataclass(frozen=True)
class Wish:
    """What the command line asked for."""

    to: str
    dtype: str
    family: str
    preset: str
    shard_size: str
    raw: bool
    cache: Path | None = None


def run(source: Path, target: Path, wish: Wish, as_json: bool) -> None:
    """Convert; every name and shape is checked before a byte is written."""
    from motionloom.backbones.weights import DIFFUSERS_NAME, Sink, write_file, write_folder

    console = Out(as_json)
    _check(wish)
    check_target(target)
    shard_bytes = parse_bytes(wish.shard_size)
    if (trained := convert_tokenizer.tokenizer_checkpoint(source)) is not None:
        plain = Wish("diffusers", "keep", "", "", "5GB", wish.raw, wish.cache)
        if wish != plain or target.suffix == ".safetensors":
            raise UserError(
                f"{source} trained a tokenizer, which is a folder of one layout: leave out --to, "
                "--dtype, --family, --preset and --shard-size"
            )
        convert_tokenizer.run(trained, target, wish.cache, wish.raw, console)
        return
    if wish.cache is not None:
        raise UserError(f"--cache {wish.cache} is for runs that trained a tokenizer, and {source} is none")
    found = _open(source, wish)
    if (source / "transformer_2").is_dir() and not any(source.glob("*.safetensors")):
        console.note(
            f"{source} holds two networks: this is transformer; convert {source / 'transformer_2'} as well"
        )
    if found.note:
        console.note(found.note)
    if found.left_out:
        console.note(f"{found.left_out} tensors of {source} are no part of the network and are left out")
    sink = Sink.of(_laid_out(found, wish.to), _dtype(wish.dtype))
    config = found.sizes.to_diffusers()
    metadata = _metadata(found, config) if wish.to == "original" else {}
    with console.progress("tensors") as advance:
        if target.suffix == ".safetensors":
            write_file(target, sink, metadata=metadata, progress=advance)
            files = [target]
        elif wish.to == "original":
            files = write_folder(
                target, sink, None, name="model", shard_bytes=shard_bytes, metadata=metadata, progress=advance
            )
        else:
            files = write_folder(
                target, sink, config, name=DIFFUSERS_NAME, shard_bytes=shard_bytes, progress=advance
            )
    _tell(console, target, files, found, sink, wish)


def parse_bytes(text: str) -> int:
    """``5GB``, ``800MB``, ``1.5 GB`` or a plain number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * UNITS[(match[2] or "").upper()]) if match else 0
    if size < 1:
        raise UserError(f"--shard-size {text}: write a size, for instance 5GB or 800MB")
    return size


def _check(wish: Wish) -> None:
    from motionloom.backbones.families import FAMILIES

    choices = {
        "--to": (wish.to, LAYOUTS),
        "--dtype": (wish.dtype, tuple(DTYPES)),
        "--family": (wish.family or "wan", tuple(FAMILIES)),
    }
    for option, (value, possible) in choices.items():
        if value not in possible:
            raise UserError(f"{option} {value}: choose one of {', '.join(possible)}")
    if wish.preset and not wish.family:
        raise UserError(f"--preset {wish.preset}: {_whose(wish.preset)}")


def _whose(preset: str) -> str:
    """What to do about a preset without a family."""
    from difflib import get_close_matches

    from motionloom.backbones.families import FAMILIES

    homes: dict[str, list[str]] = {}
    for family in FAMILIES.values():
        for name in family.presets:
            homes.setdefault(name, []).append(family.name)
    if preset in homes:
        return f"say --family as well, which the preset is of: {' or '.join(homes[preset])}"
    near = [
        f"{name} ({' or '.join(homes[name])})" for name in get_close_matches(preset, homes, 3, cutoff=0.4)
    ]
    return f"no family has such a preset; near are {', '.join(near or homes)}"


def check_target(target: Path) -> None:
    """Raises UserError for a file of a kind that is not written, which would become a folder's name."""
    from motionloom.backbones.weights import PICKLES

    if target.suffix.lower() in PICKLES:
        raise UserError(f"{target}: {target.suffix} is not written: name a folder, or a .safetensors file")


def _open(path: Path, wish: Wish) -> Source:
    from motionloom.backbones.families import recognise
    from motionloom.backbones.weights import is_pickle, only_pickle, open_weights
    from motionloom.cli.assemble import is_checkpoint

    if is_checkpoint(path):
        return _checkpoint(path, wish)
    pickle, note = only_pickle(path) if path.is_dir() else path, ""
    if pickle is not None and pickle.is_file() and is_pickle(pickle):
        opened, note = _pickled(pickle, wish.raw)
    elif wish.raw:
        raise UserError(f"--raw: {path} is no checkpoint of motionloom, so none are averaged: leave it out")
    else:
        opened = open_weights(path)
    found = recognise(opened, wish.family, wish.preset, ("--family", "--preset"))
    return Source(found.layout, found.family, found.sizes, found.weights, found.left_out, note)


def _pickled(path: Path, raw: bool) -> tuple[Weights, str]:
    """Weights that others pickled, and which of the file's they are."""
    from motionloom.backbones.weights.pickles import TRAINED, read_pickle

    found = read_pickle(path, raw)
    if not found.taken or not found.left:
        return found.weights, ""
    last = TRAINED.get(found.taken)
    other = f" ({last}: --raw)" if last in found.left else ""
    return found.weights, f"{path}: {found.taken} is taken, not {', '.join(found.left[:6])}{other}"


def _checkpoint(path: Path, wish: Wish) -> Source:
    from motionloom.backbones.families import SizesNote
    from motionloom.backbones.weights import mismatch
    from motionloom.cli.assemble import checkpoint_weights
    from motionloom.config import load_recipe
    from motionloom.train import checkpoint

    saved = checkpoint.load(path)
    recipe = load_recipe(saved.folder / "recipe.yaml")
    if recipe.lora.enabled:
        raise UserError(
            f"{saved.folder} holds adapters alone: write them with `motionloom lora export {path} FILE`"
        )
    if not recipe.model.imported:
        raise UserError(
            f"{saved.folder} holds a {recipe.model.type}, which diffusers does not know: only wan, "
            f"cogvideox, ltx2 and lightning of a preset can be converted; use it as it is, by its folder"
        )
    note = SizesNote.load(saved.folder / "backbone")
    if wish.family and wish.family != note.family.name:
        raise UserError(f"--family {wish.family}: {saved.folder} holds a {note.family.name}: leave it out")
    weights = checkpoint_weights(saved, ema=not wish.raw)
    if problem := mismatch(note.family.shapes(note.sizes), weights):
        raise UserError(
            f"{saved.folder} does not hold a whole {note.family.name}: {problem}: name another checkpoint"
        )
    return Source("checkpoint", note.family, note.sizes, weights)


def _laid_out(found: Source, layout: str) -> Weights:
    from motionloom.backbones.families import as_original

    return as_original(found.weights, found.family) if layout == "original" else found.weights


def _metadata(found: Source, config: dict[str, Any]) -> dict[str, str]:
    from motionloom.backbones.families import CONFIG_NOTE

    return {**found.weights.metadata, CONFIG_NOTE: json.dumps(config)}


def _dtype(name: str) -> torch.dtype | None:
    import torch

    wanted = DTYPES[name]
    return None if wanted is None else getattr(torch, wanted)


def _tell(console: Out, target: Path, files: list[Path], found: Source, sink: Sink, wish: Wish) -> None:
    size = sum(file.stat().st_size for file in files)
    value = {
        "folder" if target.is_dir() else "file": str(target),
        "files": [file.name for file in files],
        "from": found.kind,
        "to": wish.to,
        "family": found.family.name,
        "tensors": len(sink.shapes),
        "left_out": found.left_out,
        "parameters": sum(map(math.prod, sink.shapes.values())),
        "bytes": size,
    }
    line = (
        f"{found.family.name}, {len(sink.shapes)} tensors, {size / 1e9:.3g} GB, {len(files)} files: {target}"
    )
    console.result(value, [line])
