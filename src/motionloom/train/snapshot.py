"""A run into a checkpoint and back: what belongs in one, gathered from all ranks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import motionloom
from motionloom.backbones.base import LatentFacing
from motionloom.backbones.growing import branches, lacking
from motionloom.config.keys import flatten
from motionloom.config.load import dump_recipe, load_recipe
from motionloom.config.recipe import Recipe
from motionloom.config.yaml_text import read_yaml
from motionloom.parallel import Ranks, fill, load_optimizer_state, named_optimizer_state, named_state, whole
from motionloom.train import checkpoint
from motionloom.train.checkpoint import Checkpoint, Contents, Saveable
from motionloom.train.ema import Ema
from motionloom.train.method import Method, all_modules
from motionloom.train.state import Identity, TrainState, base_of
from motionloom.train.tensors import Renamed

WEIGHTS = ("model.name_or_path", "lora.base")
"""Keys that name weights to start from, by a path."""


@dataclass(frozen=True)
class Snapshots:
    """Saves and restores one run."""

    run_dir: Path
    recipe: Recipe
    method: Method
    ema: Ema | None
    ranks: Ranks
    identity: Identity
    folders: Mapping[str, Saveable]

    def save(self, state: TrainState) -> tuple[Path, list[str]]:
        """Write a checkpoint, then remove those beyond the newest K. All ranks must call it.

        Returns its folder, and a line for each old checkpoint that would not go.

        Raises:
            UserError: in every process, when it could not be written.
        """
        tensors = {"model": whole(named_state(self.method.modules()).items(), self.ranks)}
        if beside := self.method.beside():
            tensors["beside"] = whole(named_state(beside).items(), self.ranks)
        if self.ema is not None:
            tensors["ema"] = whole(self.ema.named_state().items(), self.ranks)
        tensors["optimizer"] = whole(self._optimizer_state(), self.ranks)
        contents = Contents(
            state.step, self._describe(state), dump_recipe(self.recipe), tensors, self.folders
        )

        def write() -> tuple[Path, list[str]]:
            folder = checkpoint.save(self.run_dir, contents)
            return folder, checkpoint.purge(self.run_dir, self.recipe.train.keep_checkpoints)

        return self.ranks.main_does(write)

    def restore(self, state: TrainState) -> tuple[Path, list[str]] | None:
        """Bring the newest checkpoint back into ``state``, weights, averages and optimisers.

        Returns its folder and the recipe keys that changed since; None when the run has no checkpoint yet.

        Raises:
            UserError: it is damaged, of another model, or of a run that cannot be continued exactly.
        """
        if (found := self.ranks.main_does(self._newest)) is None:
            return None
        saved = checkpoint.load(found, verify=False)  # verified by the main rank already
        before, bases = saved.state["identity"], ("", "")
        if self.identity.base != before.get("base", ""):
            bases = base_of(load_recipe(saved.folder / "recipe.yaml")), base_of(self.recipe)
        self.identity.refuse_unless(before, str(found), bases)
        fill(named_state(self.method.modules()), saved.tensors("model"), f"{found}/model.safetensors")
        if beside := self.method.beside():
            fill(named_state(beside), saved.tensors("beside"), f"{found}/beside.safetensors")
        if self.ema is not None:
            self._restore_ema(saved)
        for turn, optimizer in self.method.optimizers().items():
            file = saved.tensors("optimizer")
            part = {name.removeprefix(f"{turn}/"): name for name in file if name.startswith(f"{turn}/")}
            load_optimizer_state(
                optimizer, self._names(), Renamed(file, part), f"{found}/optimizer.safetensors"
            )
        for name, value in saved.state["train"].items():
            setattr(state, name, value)
        return found, self._changes(saved)

    def _newest(self) -> Path | None:
        newest = checkpoint.latest(self.run_dir)
        return None if newest is None else checkpoint.load(newest).folder

    def _restore_ema(self, saved: Checkpoint) -> None:
        assert self.ema is not None
        file = saved.weights(ema=True)
        averaged = Renamed(file, {name: name for name in self.ema.shadows if name in file})
        fill(self.ema.shadows, averaged, str(file.path))

    def _optimizer_state(self) -> list[tuple[str, Tensor]]:
        names = self._names()
        return [
            (f"{turn}/{name}", tensor)
            for turn, optimizer in self.method.optimizers().items()
            for name, tensor in named_optimizer_state(optimizer, names).items()
        ]

    def _names(self) -> dict[nn.Parameter, str]:
        return {
            p: f"{top}.{name}"
            for top, module in all_modules(self.method).items()
            for name, p in module.named_parameters()
        }

    def _describe(self, state: TrainState) -> dict[str, Any]:
        return {
            "step": state.step,
            "train": asdict(state),
            "identity": asdict(self.identity),
            "versions": {"motionloom": motionloom.__version__, "torch": torch.__version__},
        }

    def _changes(self, saved: Checkpoint) -> list[str]:
        before = flatten(read_yaml(saved.recipe, "recipe.yaml of the checkpoint"))
        now = flatten(read_yaml(dump_recipe(self.recipe), "recipe"))
        return [
            f"{key} {before.get(key)} -> {now.get(key)}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and not self._same_weights(key, before.get(key), now.get(key))
        ]

    def _same_weights(self, key: str, before: object, now: object) -> bool:
        """Whether two paths lead to the same weights: by their fingerprint, which was compared before."""
        if key not in WEIGHTS or not (before and now):
            return False
        return bool(self.identity.base) or os.path.abspath(str(before)) == os.path.abspath(str(now))


def start_from(path: Path, modules: Mapping[str, nn.Module], ranks: Ranks) -> str:
    """``train.init_from``: weights of a checkpoint (averaged ones if it has them) into modules; returns its
    step, and what of the modules keeps its first values: what the checkpoint lacks, and of the layers that
    latents go through what is of another shape there.

    Raises:
        UserError: as ``checkpoint.load``, or it is of another model.
    """
    saved = checkpoint.load(ranks.main_does(lambda: checkpoint.load(path).folder), verify=False)
    weights = saved.weights(ema=True)
    targets = named_state(modules)
    new = {
        f"{top}.{name}"
        for top, module in modules.items()
        for name in lacking(module, {n.removeprefix(f"{top}.") for n in weights if n.startswith(f"{top}.")})
    } & targets.keys()
    reshaped = _reshaped(modules, targets, weights)
    new |= reshaped
    usable = Renamed(weights, {name: name for name in weights if name not in reshaped})
    fill({name: t for name, t in targets.items() if name not in new}, usable, f"{saved.folder}")
    told = f"; {len(new)} tensors are new: {', '.join(branches(new, targets))}" if new else ""
    return f"step {saved.step}{told}"


def _reshaped(
    modules: Mapping[str, nn.Module], targets: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> set[str]:
    """Of the layers that latents go through, the tensors whose shape is another one in ``weights``."""
    facing = [
        f"{top}.{layer}."
        for top, module in modules.items()
        if isinstance(module, LatentFacing)
        for layer in module.latent_layers
    ]
    return {
        name
        for name in targets.keys() & weights.keys()
        if name.startswith(tuple(facing)) and weights[name].shape != targets[name].shape
    }
