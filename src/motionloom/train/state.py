"""What a run is besides its weights: where it stands, and what must not change under it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from motionloom.config.recipe import Recipe
from motionloom.errors import UserError


@dataclass
class TrainState:
    """Where training stands. With weights, averages and optimisers this is everything that a resume needs."""

    step: int = 0
    """Optimiser steps done."""
    micro_batches: int = 0
    """The data cursor: micro-batches taken by each rank. The order of batches is a pure function of the seed,
    so this one number is the whole state of the data."""
    samples: int = 0
    """Seen by all ranks together."""
    seconds: float = 0.0
    """Spent training, over all sessions."""


@dataclass(frozen=True)
class Identity:
    """What decides the numbers of every step, beyond the recipe's free choices.

    A resume under another identity is refused. The order of the data would survive a change of ``world`` that
    keeps the product world x batch x accumulation, but each rank draws its own noise and sums of gradients
    round differently, so the run would not be the same run to the bit; that is what resuming promises.
    """

    seed: int
    world: int
    batch_size: int
    grad_accum_steps: int
    sharding: str
    data: str
    """Fingerprint of the cache and the split that training reads."""
    base: str = ""
    """Fingerprint of the frozen weights that adapters belong to; none: every weight is trained."""

    @staticmethod
    def of(recipe: Recipe, world: int, data: str = "", base: str = "") -> Identity:
        """The identity of ``recipe`` on ``world`` ranks."""
        c = recipe.train
        sharding = c.sharding if world > 1 else "none"
        return Identity(recipe.seed, world, c.batch_size, c.grad_accum_steps, sharding, data, base)

    def refuse_unless(
        self,
        saved: Mapping[str, Any],
        where: str,
        bases: tuple[str, str] = ("", ""),
        besides: Collection[str] = (),
    ) -> None:
        """Raises UserError naming what differs from the checkpoint's identity, and the way out.

        Args:
            bases: what the checkpoint's recipe and this one call their base (:func:`base_of`).
            besides: keys that are not known yet.
        """
        now, before = asdict(self), {"base": "", **saved}
        called = dict(zip(("was", "is"), bases, strict=True)) if any(bases) else {}
        differ = [
            f"{key} {_said('was', before.get(key), key, called)}, {_said('is', now[key], key, called)}"
            for key in now
            if key not in besides and before.get(key) != now[key]
        ]
        if differ:
            raise UserError(
                f"{where} cannot be resumed exactly: {'; '.join(differ)}. Start it as it was, "
                "or start a new run from its weights with train.init_from"
            )


def base_of(recipe: Recipe) -> str:
    """The key that names what adapters sit on, and what it says: ``lora.base runs/small``."""
    if recipe.train.method != "denoise" and recipe.distil.teacher:
        return f"distil.teacher {recipe.distil.teacher}"
    if not recipe.lora.enabled:
        return ""
    key = "lora.base" if recipe.lora.base else "model.name_or_path"
    return f"{key} {recipe.lora.base or recipe.model.name_or_path}"


def _said(verb: str, value: Any, key: str, called: Mapping[str, str]) -> str:
    if key == "base" and called.get(verb):
        return f"{verb} {called[verb]} (sha256 {str(value)[:12]})"
    return f"{verb} {value!r}"
