"""The Method protocol: what one training step optimises. One loop serves every method.

Shapes: B batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from motionloom.data.batch import Batch
from motionloom.rng import torch_generator


@dataclass(frozen=True)
class StepContext:
    """Where a step stands; all its randomness is drawn from ``generator`` and ``device_generator``."""

    seed: int
    step: int
    """Optimiser steps done before this one."""
    micro: int
    """Index of the micro-batch within the step's accumulation."""
    rank: int
    device: torch.device
    turn: str
    """Which optimiser is being stepped, one of ``Method.turns(step)``."""
    phase: Literal["train", "heldout"] = "train"
    """``heldout``: only measured, with the same draws every time, and no caption is dropped."""
    rehearsal: bool = False
    """Nothing of it may stay: what a method keeps besides weights and gradients must not move."""

    def generator(self, purpose: str) -> torch.Generator:
        """A CPU generator for one purpose of this very step: the same on every device and after a resume."""
        return torch_generator(*self._key(purpose))

    def device_generator(self, purpose: str) -> torch.Generator:
        """A generator on the device, for draws as large as the batch, which the CPU would hold up.

        The same after a resume; another kind of device draws other numbers.
        """
        return torch_generator(*self._key(purpose), device=self.device)

    def randn(self, like: Tensor, purpose: str) -> Tensor:
        """Standard normal noise of a tensor's shape, on the device."""
        return torch.randn(like.shape, generator=self.device_generator(purpose), device=like.device)

    def _key(self, purpose: str) -> tuple[int | str, ...]:
        return (self.seed, self.phase, self.step, self.micro, self.rank, self.turn, purpose)


@dataclass(frozen=True)
class Losses:
    """What a method found. All tensors stay on the device until the logging step."""

    loss_B: Tensor
    """Per sample; the loop takes the mean."""
    sigma_B: Tensor | None = None
    """Noise level to file each sample's loss under; negative: file it nowhere."""
    num_tokens: int = 0
    """How many video tokens the backbone worked on, for the rate."""
    logs: Mapping[str, Tensor] = field(default_factory=dict)
    """Scalars to average and log."""


class Method(Protocol):
    """One way to train. ``denoise`` has one turn; distillation alternates generator and critic."""

    def modules(self) -> dict[str, nn.Module]:
        """What is trained to be used, by name: its weights are averaged, and kept to generate with."""
        ...

    def beside(self) -> dict[str, nn.Module]:
        """What is trained only to train it, such as a critic: a checkpoint holds it for a resume."""
        ...

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """One optimiser per turn, by the turn's name."""
        ...

    def turns(self, step: int) -> tuple[str, ...]:
        """Which optimisers step now, in order."""
        ...

    def losses(self, batch: Batch, context: StepContext) -> Losses:
        """Per-sample losses for ``context.turn``."""
        ...


def all_modules(method: Method) -> dict[str, nn.Module]:
    """Whatever a method trains, by name."""
    return {**method.modules(), **method.beside()}


class Loader(Protocol):
    """The training data of one rank."""

    def batches(self, start: int) -> Iterator[Batch]:
        """Micro-batches from the ``start``-th on, without end.

        Their order is a pure function of the seed, so a run that stopped after ``start`` of them goes on
        here.
        """
        ...

    def examples(self) -> Mapping[str, Batch]:
        """A micro-batch of every shape that will come, by the shape's name; what a warm-up compiles for."""
        ...


class HeldOut(Protocol):
    """Clips that training never sees; one rank's part, equally many batches on every rank."""

    def __len__(self) -> int:
        """How many batches."""
        ...

    def batch(self, n: int) -> Batch:
        """The ``n``-th batch, always the same."""
        ...
