"""What a run is besides its weights: where it stands, and what must not change under it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

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

    def refuse_unless(self, saved: dict[str, Any], where: str) -> None:
        """Raises UserError naming what differs from the checkpoint's identity, and the way out."""
        now, before = asdict(self), {"base": "", **saved}
        differ = [
            f"{key} was {before.get(key)!r}, is {now[key]!r}" for key in now if before.get(key) != now[key]
        ]
        if differ:
            raise UserError(
                f"{where} cannot be resumed exactly: {'; '.join(differ)}. Start it as it was, "
                "or start a new run from its weights with train.init_from"
            )
