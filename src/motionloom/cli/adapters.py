"""LoRA in a run: adapters on a base whose weights are yet to be read, and the table of what they sit on."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from motionloom.backbones.growing import branches, lacking, with_first_values
from motionloom.backbones.keys import Piece
from motionloom.backbones.weights import Weights
from motionloom.config import Recipe, load_recipe
from motionloom.errors import UserError
from motionloom.parallel import Ranks
from motionloom.rng import torch_generator
from motionloom.tokenizers import Tokenizer, load_audio_tokenizer, load_tokenizer
from motionloom.tokenizers.audio import AudioTokenizer
from motionloom.train import checkpoint
from motionloom.train.checkpoint import Checkpoint
from motionloom.train.lora import adapter_names, add_lora, base_names, choose_modules, fingerprint
from motionloom.train.parts import beside_adapters, train_parts
from motionloom.train.patterns import Target


@dataclass(frozen=True)
class Adapted:
    """A backbone with adapters, before its frozen weights are read."""

    weights: Weights
    """The base's, by the names that the layers have now."""
    besides: frozenset[str]
    """Names of the adapters, which have their values."""
    base: str
    """Fingerprint of the base's weights."""
    targets: tuple[Target, ...]
    parts: tuple[Target, ...]
    """What is trained whole beside the adapters."""


def adapt(
    modules: Mapping[str, nn.Module],
    recipe: Recipe,
    weights: Weights,
    ranks: Ranks,
    base_dtype: torch.dtype | None = None,
) -> Adapted:
    """Freeze the backbone (on ``meta``), add the recipe's adapters, the same on every rank, and let its parts
    be trained.

    Args:
        modules: ``backbone``, and ``text_encoder`` where it may be trained.
        base_dtype: as in ``train.lora.add_lora``.

    Raises:
        UserError: as :func:`add_adapters`.
    """
    base = ranks.main_does(lambda: fingerprint(weights, weights.read))
    backbone = modules["backbone"]
    whole = with_first_values(backbone, weights, torch_generator(recipe.seed, "weights"))
    targets, parts = add_adapters(modules, recipe, weights, base_dtype)
    renamed = {now: (Piece(before),) for before, now in base_names(backbone).items() if before in whole}
    return Adapted(whole.under_names(renamed), adapter_names(backbone), base, targets, parts)


def add_adapters(
    modules: Mapping[str, nn.Module],
    recipe: Recipe,
    weights: Weights | None,
    base_dtype: torch.dtype | None = None,
) -> tuple[tuple[Target, ...], tuple[Target, ...]]:
    """The recipe's adapters and parts; a row of each pattern of ``lora.targets``, and of ``lora.parts``.

    What of the backbone the base lacks (``backbones.growing``) is trained whole in any case.

    Args:
        weights: the base's; None where they are not there to be looked at.

    Raises:
        UserError: as ``train.lora.add_lora`` and ``train.parts.beside_adapters``; or an adapter of what the
            base lacks.
    """
    config, backbone = recipe.lora, modules["backbone"]
    new = [name for name, module in modules.items() if name != "backbone" and _trains(module)]
    chosen = choose_modules(backbone, config.targets)
    adapted = [name for pattern, taken in chosen.items() if pattern[0] != "!" for name in taken]
    parts = beside_adapters(modules, config.parts, adapted)
    grown = _grown(backbone, weights, adapted)
    whole = {name.removeprefix("backbone.") for taken in (*parts.values(), *grown.values()) for name in taken}
    targets = add_lora(backbone, config, torch_generator(recipe.seed, "lora"), base_dtype, whole)
    rows = train_parts(modules, parts)
    rows += train_parts(modules, {**grown})
    named = {module for row in rows for module in row.modules}
    # A table of words that is new beside published weights is trained in any case.
    for name in new:
        owners = tuple(f"{name}.{owner}" for owner, _ in modules[name].named_children())
        if not named & set(owners):
            count = sum(p.numel() for p in modules[name].parameters())
            rows.append(Target(name, owners, count))
    return tuple(targets), tuple(rows)


def _grown(
    backbone: nn.Module, weights: Weights | None, adapted: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """What the base lacks, by branch. Raises UserError where ``adapted`` layers are among it."""
    names = list(backbone.state_dict())
    new = lacking(backbone, weights) if weights is not None else frozenset()
    found: dict[str, tuple[str, ...]] = {}
    for branch in branches(new, names):
        fits = re.compile(re.escape(branch).replace(r"\*", r"\d+") + r"(\.|$)").match
        found[f"{branch} (new)"] = tuple(f"backbone.{name}" for name in names if name in new and fits(name))
    if both := next((name for name in adapted if f"{name}.weight" in new), None):
        last = dict.fromkeys(branch.rsplit(".", 1)[-1] for branch in branches(new, names) if "*" in branch)
        raise UserError(
            f"lora.targets takes {both}, which the base lacks and which is trained whole: put "
            f"{', '.join(f'!{name}' for name in last)} first"
        )
    return found


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def same_tokenizer(base: Checkpoint | None, tokenizer: Tokenizer, audio: AudioTokenizer | None) -> None:
    """Raises UserError for latents that the base, a checkpoint of this project, does not know."""
    if base is None:
        return
    for name in other_tokenizers(base, tokenizer, audio):
        raise UserError(
            f"the cache was made with another tokenizer than lora.base knows: make it again with "
            f"{name}.name_or_path={base.folder / FOLDERS[name]}"
        )


FOLDERS = {"tokenizer": "tokenizer", "audio": "audio_tokenizer"}
"""Recipe sections of tokenizers, and the folders that checkpoints keep them in."""


def other_tokenizers(base: Checkpoint, tokenizer: Tokenizer, audio: AudioTokenizer | None) -> list[str]:
    """Recipe sections of those tokenizers that are not the checkpoint's; one that it lacks is not another."""
    found = []
    if load_tokenizer(base.folder / FOLDERS["tokenizer"]).fingerprint() != tokenizer.fingerprint():
        found.append("tokenizer")
    theirs = base.folder / FOLDERS["audio"]
    known = load_audio_tokenizer(theirs).fingerprint() if theirs.is_dir() else None
    if audio is not None and known not in (None, audio.fingerprint()):
        found.append("audio")
    return found


def with_whole_paths(recipe: Recipe) -> Recipe:
    """The recipe with paths to its base that mean the same from every folder: a LoRA's checkpoints need
    it."""
    model, lora = recipe.model, recipe.lora
    return recipe.model_copy(
        update={
            "model": model.model_copy(update={"name_or_path": _whole_path(model.name_or_path)}),
            "lora": lora.model_copy(update={"base": _whole_path(lora.base)}),
        }
    )


def _whole_path(path: str) -> str:
    # Links stay: a hub's cache keeps the names of its files in them.
    return os.path.abspath(Path(path).expanduser()) if path else ""


_FREE = {"checkpoint_blocks", "dropout"}
"""Keys of ``model`` that decide nothing about its weights."""


def adapted_checkpoint(recipe: Recipe) -> Checkpoint | None:
    """The checkpoint that ``lora.base`` names, or None.

    Raises:
        UserError: it cannot be opened, is of another kind of backbone, or is itself a LoRA.
    """
    if not (recipe.lora.enabled and recipe.lora.base):
        return None
    saved = checkpoint.load(Path(recipe.lora.base))
    theirs = load_recipe(saved.folder / "recipe.yaml")
    if theirs.lora.enabled:
        raise UserError(
            f"lora.base {recipe.lora.base} is a LoRA itself: name its own base "
            f"({theirs.lora.base or theirs.model.name_or_path}), and go on from it with train.init_from"
        )
    now, before = (r.model.model_dump(exclude=_FREE) for r in (recipe, theirs))
    if not before["audio_dim"]:  # a base without sound grows by it
        before["audio_dim"] = now["audio_dim"]
    if differ := [f"model.{key}={before[key]}" for key in now if now[key] != before[key]]:
        raise UserError(f"lora.base {recipe.lora.base} is of another model: set {' '.join(differ)}")
    return saved
