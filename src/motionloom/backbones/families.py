"""The published families of backbones: their class, sizes by name, and how their weights are recognised.

A member is one line in :data:`FAMILIES`. Modules are imported when a family is asked for.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from motionloom.backbones.keys import KeyMap
from motionloom.backbones.weights import Weights, mismatch, read_json
from motionloom.config.entries import from_entries
from motionloom.errors import UserError
from motionloom.flow import DiscreteSchedule

NOTE = "backbone.json"
CONFIG_NOTE = "diffusers_config"
"""Key of a file's metadata under which ``convert --to original`` keeps the sizes."""


class Sizes(Protocol):
    """Sizes of one member of a family, as a frozen dataclass."""

    @property
    def reads_image(self) -> bool:
        """It cannot do without a given image, beside the noisy latents or as tokens."""
        ...

    def to_diffusers(self) -> dict[str, Any]:
        """What diffusers' ``config.json`` says of it."""
        ...


@dataclass(frozen=True)
class Family:
    """What is known of a family without building it."""

    name: str
    """``model.type``."""
    module: str
    backbone: str
    """Class in ``module``."""
    sizes: str
    diffusers: str
    """``_class_name`` of diffusers' ``config.json``."""
    marks: tuple[str, ...]
    """Names that only this family has in diffusers' layout."""
    scheduled: bool = False
    """Trained on a discrete schedule of noise levels, which is a part of its sizes."""

    def _get(self, name: str) -> Any:
        return getattr(importlib.import_module(f"motionloom.backbones.{self.module}"), name)

    @property
    def presets(self) -> Mapping[str, Any]:
        """Published sizes by name."""
        presets: Mapping[str, Any] = self._get("PRESETS")
        return presets

    def measured(self, weights: Weights, preset: Sizes | None) -> Sizes | None:
        """Sizes told from weights in the authors' layout, and from the preset that they are said to be of;
        None for families that come in their presets alone.

        Raises:
            UserError: the weights contradict themselves, or do not tell.
        """
        measure = getattr(self._get(self.sizes), "from_weights", None)
        sizes: Sizes | None = None if measure is None else measure(weights, preset)
        return sizes

    @property
    def original_keys(self) -> KeyMap:
        """How the authors' names correspond to diffusers'."""
        keys: KeyMap = importlib.import_module(f"motionloom.backbones.{self.module}_keys").ORIGINAL_KEYS
        return keys

    def from_diffusers(self, config: Mapping[str, Any], scheduler: Mapping[str, Any] | None = None) -> Sizes:
        """Sizes from diffusers' ``config.json``, and for a family that was trained on certain noise levels
        those of its ``scheduler_config.json``.

        Raises:
            UserError: of another class, or with entries that are not known.
        """
        kind = self._get(self.sizes)
        given = (dict(config), scheduler) if self.scheduled else (dict(config),)
        sizes: Sizes = kind.from_diffusers(*given)
        return sizes

    def preset(self, name: str, key: str = "model.preset") -> Sizes:
        """Published sizes. Raises UserError naming the nearest when there is no such name."""
        if name not in self.presets:
            close = get_close_matches(name, self.presets, 1, cutoff=0.4)
            meant = f"did you mean {close[0]}? " if close else ""
            raise UserError(
                f"{key} {name} is not one of {self.name}: {meant}There are {', '.join(self.presets)}"
            )
        sizes: Sizes = self.presets[name]
        return sizes

    def on_meta(self, sizes: Sizes, *, checkpoint_blocks: bool = False) -> nn.Module:
        """The backbone without numbers: shapes alone, in no memory."""
        with torch.device("meta"):
            module: nn.Module = self._get(self.backbone)(sizes, checkpoint_blocks=checkpoint_blocks)
        return module

    def shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """Shape of every weight by name."""
        return {name: tuple(t.shape) for name, t in self.on_meta(sizes).state_dict().items()}


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "wan",
            "wan",
            "Wan",
            "WanSizes",
            "WanTransformer3DModel",
            ("condition_embedder.time_proj.weight", "blocks.0.attn1.to_q.weight"),
        ),
        Family(
            "cogvideox",
            "cogvideox",
            "CogVideoX",
            "CogVideoXSizes",
            "CogVideoXTransformer3DModel",
            ("patch_embed.text_proj.weight", "transformer_blocks.0.norm1.linear.weight"),
            scheduled=True,
        ),
        Family(
            "ltx2",
            "ltx2",
            "LTX2",
            "LTX2Sizes",
            "LTX2VideoTransformer3DModel",
            ("audio_proj_in.weight", "transformer_blocks.0.audio_attn1.to_q.weight"),
        ),
        Family(
            "lightning",
            "lightning",
            "Lightning",
            "LightningSizes",
            "LightningDiT",
            ("entry.proj.weight", "layers.0.mlp.w12.weight", "exit.modulation.weight"),
        ),
    )
}
"""By ``model.type``."""


@dataclass(frozen=True)
class Recognised:
    """Weights that were opened, under diffusers' names, and what they are."""

    family: Family
    layout: str
    """``diffusers`` or ``original``."""
    weights: Weights
    sizes: Sizes
    left_out: int
    """Tensors of the file that are no part of the network: other models, tables that can be computed."""


def recognise(
    weights: Weights, family: str = "", preset: str = "", keys: tuple[str, str] = ("type", "model.preset")
) -> Recognised:
    """What family and layout weights are of, told by their names, and their sizes.

    The sizes come from ``preset`` if it is given, else from the ``config.json`` beside the weights or the
    note that :data:`CONFIG_NOTE` names, else they are those of the first preset whose weights have the same
    names and shapes. A family whose presets name the trunk alone tells the ends from the weights.

    Args:
        family: name of the family that it must be; empty: any.
        keys: what the user sets family and preset by, for messages.

    Raises:
        UserError: of no known family or not of ``family``; the sizes cannot be told, or are others.
    """
    found, layout = _family(weights, family, keys[0])
    named, left_out = _as_diffusers(weights, found, layout)
    sizes = _sizes(weights, named, found, layout, found.preset(preset, keys[1]) if preset else None)
    if problem := mismatch(found.shapes(sizes), named):
        source = f"{keys[1]} {preset}" if preset else "its config.json"
        raise UserError(f"{weights.where} is not what {source} says: {problem}")
    return Recognised(found, layout, named, sizes, left_out)


@dataclass(frozen=True)
class SizesNote:
    """Sizes of a published backbone as a file, so that a checkpoint needs nothing else to be opened."""

    family: Family
    sizes: Sizes

    def save(self, folder: Path) -> None:
        """Write ``backbone.json``."""
        schedule = getattr(self.sizes, "schedule", None)
        levels = {} if schedule is None else {"schedule": asdict(schedule)}
        note = {"type": self.family.name, "config": self.sizes.to_diffusers(), **levels}
        (folder / NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> SizesNote:
        """Undo :meth:`save`. Raises UserError where the file is missing or not of this version."""
        note = read_json(folder / NOTE)
        if note.get("type") not in FAMILIES or not isinstance(note.get("config"), dict):
            raise UserError(f"{folder / NOTE} is of no backbone known here: use the version that wrote it")
        family = FAMILIES[note["type"]]
        sizes: Any = family.from_diffusers(note["config"])
        if "schedule" in note:
            where = f"{folder / NOTE}: schedule"
            if not isinstance(note["schedule"], dict):
                raise UserError(f"{where} is {note['schedule']!r}: use the version that wrote it")
            schedule = from_entries(DiscreteSchedule, note["schedule"], where, family.name)
            sizes = replace(sizes, schedule=schedule)
        return SizesNote(family, sizes)


def as_original(weights: Weights, family: Family) -> Weights:
    """Weights of diffusers' names under the authors' names."""
    return weights.under_names(family.original_keys.to_original(weights))


def _family(weights: Weights, wanted: str, key: str) -> tuple[Family, str]:
    found = None
    for family in FAMILIES.values():
        if all(mark in weights for mark in family.marks):
            found = family, "diffusers"
        elif _is_original(weights, family):
            found = family, "original"
    if found is None:
        examples = ", ".join(list(weights)[:3]) or "no tensors at all"
        raise UserError(
            f"{weights.where} is of none of the families {', '.join(FAMILIES)} (it holds {examples} ...): "
            f"name the transformer's weights"
        )
    if wanted and found[0].name != wanted:
        raise UserError(
            f"{weights.where} holds weights of {found[0].name}, not of {wanted}: use {key} {found[0].name}"
        )
    return found


def _is_original(weights: Weights, family: Family) -> bool:
    keys = family.original_keys
    return any(all(prefix + mark in weights for mark in keys.marks) for prefix in (*keys.prefixes, ""))


def _as_diffusers(weights: Weights, family: Family, layout: str) -> tuple[Weights, int]:
    if layout == "diffusers":
        return weights, 0
    keys, prefix = family.original_keys, _prefix(weights, family)
    mine = [name for name in weights if name.startswith(prefix)]
    names = keys.to_diffusers(mine)
    used = {piece.name for origin in names.values() for piece in origin}
    return weights.under_names(names), len(weights) - len(used)


def _prefix(weights: Weights, family: Family) -> str:
    """A file of a whole system keeps its network under one of the prefixes, and everything else elsewhere."""
    keys = family.original_keys
    return next(p for p in (*keys.prefixes, "") if all(p + mark in weights for mark in keys.marks))


def _sizes(weights: Weights, named: Weights, family: Family, layout: str, preset: Sizes | None) -> Sizes:
    between: Callable[[Sizes], Sizes] | None = getattr(preset, "between", None)
    if preset is not None and between is None:
        return preset
    known = _described(weights, family)
    if known is None and layout == "original":
        known = family.measured(weights.under(_prefix(weights, family)), preset)
    if between is None:
        return known or _fitting(named, family)
    return between(known or _fitting(named, family))


def _described(weights: Weights, family: Family) -> Sizes | None:
    """Sizes that stand beside the weights, in diffusers' words."""
    note = weights.metadata.get(CONFIG_NOTE)
    config = weights.config if note is None else json.loads(note)
    if config is None or config.get("_class_name") != family.diffusers:
        return None
    place = Path(weights.where)
    folder = place if place.is_dir() else place.parent
    beside = folder.parent / "scheduler" / "scheduler_config.json"
    return family.from_diffusers(config, read_json(beside) if family.scheduled and beside.is_file() else None)


def _fitting(weights: Weights, family: Family) -> Sizes:
    for name in family.presets:
        if not mismatch(_preset_shapes(family.name, name), weights):
            return family.preset(name)
    raise UserError(
        f"{weights.where} has no config.json of diffusers beside it, and its shapes are those of no preset "
        f"of {family.name} ({', '.join(family.presets)}{_nearly(weights, family)}): put the config.json "
        "beside it"
    )


def _nearly(weights: Weights, family: Family) -> str:
    """The preset that weights miss by little, and what: a file that is not whole."""
    held = {(name, stored.shape) for name, stored in weights.tensors.items()}

    def shared(name: str) -> float:
        shapes = set(_preset_shapes(family.name, name).items())
        return len(shapes & held) / len(shapes | held)

    best = max(family.presets, key=shared)
    problem = mismatch(_preset_shapes(family.name, best), weights)
    return f"; of {best} {problem}" if shared(best) > 0.9 else ""


@cache
def _preset_shapes(family: str, preset: str) -> dict[str, tuple[int, ...]]:
    return FAMILIES[family].shapes(FAMILIES[family].preset(preset))
