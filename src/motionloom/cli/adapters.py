"""LoRA in a run: adapters on a base whose weights are yet to be read, and the table of what they sit on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from motionloom.backbones.keys import Piece
from motionloom.backbones.weights import Weights
from motionloom.config import Recipe, load_recipe
from motionloom.errors import UserError
from motionloom.parallel import Ranks
from motionloom.rng import torch_generator
from motionloom.tokenizers import Tokenizer, load_tokenizer
from motionloom.train import checkpoint
from motionloom.train.checkpoint import Checkpoint
from motionloom.train.lora import Target, adapter_names, add_lora, base_names, fingerprint


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

    def table(self) -> list[list[str]]:
        """Pattern, modules, parameters: a row each, and their sum."""
        rows = [[t.pattern, str(len(t.modules)), f"{t.parameters:,}"] for t in self.targets]
        modules = sum(len(t.modules) for t in self.targets if t.parameters)
        return [*rows, ["together", str(modules), f"{sum(t.parameters for t in self.targets):,}"]]


def adapt(
    backbone: nn.Module, recipe: Recipe, weights: Weights, ranks: Ranks, base_dtype: torch.dtype | None = None
) -> Adapted:
    """Freeze ``backbone`` (on ``meta``) and add the recipe's adapters, the same on every rank.

    Args:
        base_dtype: as in ``train.lora.add_lora``.

    Raises:
        UserError: as ``train.lora.add_lora``.
    """
    base = ranks.main_does(lambda: fingerprint(weights, weights.read))
    targets = add_lora(backbone, recipe.lora, torch_generator(recipe.seed, "lora"), base_dtype)
    renamed = {now: (Piece(before),) for before, now in base_names(backbone).items() if before in weights}
    return Adapted(weights.under_names(renamed), adapter_names(backbone), base, tuple(targets))


def same_tokenizer(base: Checkpoint | None, tokenizer: Tokenizer) -> None:
    """Raises UserError for latents that the base, a checkpoint of this project, does not know."""
    if base is None or load_tokenizer(base.folder / "tokenizer").fingerprint() == tokenizer.fingerprint():
        return
    raise UserError(
        f"the cache was made with another tokenizer than lora.base knows: make it again with "
        f"tokenizer.name_or_path={base.folder / 'tokenizer'}"
    )


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
    if differ := [f"model.{key}={before[key]}" for key in now if now[key] != before[key]]:
        raise UserError(f"lora.base {recipe.lora.base} is of another model: set {' '.join(differ)}")
    return saved
