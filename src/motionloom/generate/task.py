"""What a roll-out is asked for, and how it walks.

Shapes: B batch, F token frames, S cells of a frame, C channels of a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from motionloom.flow import DiscreteSchedule, Guidance, sigma_schedule
from motionloom.plans import NOTHING, Given, Sample, Stage, Text, Values

Tokens = dict[str, Tensor]
"""(B, F, S, C) by modality."""


@dataclass(frozen=True)
class Sampling:
    """How a rollout walks from noise to data."""

    solver: str = "euler"
    steps: int = 50
    shift: float = 1.0
    path: str = "linear"
    eta: float = 0.0
    guidance: Guidance = field(default_factory=Guidance)
    schedule: DiscreteSchedule | None = None
    """Of a network trained by DDPM: only its own noise levels are visited, and ``shift`` does not apply. A
    backbone that has a schedule of its own keeps to that one."""
    sigmas: tuple[float, ...] = ()
    """The noise levels themselves, the last 0 left out, in place of ``steps`` and ``shift``: of a student."""
    context: float = 0.0
    """Noise level at which a finished chunk is remembered; 0: clean."""
    write_through: bool = False
    """Remember a chunk as its last step saw it, noisy, and save the clean pass (diffusion forcing)."""

    @property
    def grid(self) -> tuple[float, ...]:
        """The noise levels of a walk, from 1 to 0, where no DDPM schedule says others."""
        if self.sigmas:
            return (*self.sigmas, 0.0)
        return tuple(sigma_schedule(self.steps, shift=self.shift).tolist())

    @property
    def walk_steps(self) -> int:
        """Solver steps of a stage."""
        return len(self.sigmas) or self.steps


@dataclass(frozen=True)
class Task:
    """What is asked for, in tokens."""

    sample: Sample
    text: Text
    noise: Tokens
    """The start, standard normal, of every modality."""
    negative: Text | None = None
    """The text that guidance pushes away from; needed when guidance by text acts."""
    given: Given = NOTHING
    values: Values | None = None
    """Clean tokens of what is given; needed when anything is. References stand as they are to be shown."""
    without: Mapping[str, Given] = field(default_factory=dict)
    """By condition: what is given without it; needed when guidance leaves it out."""
    later: Mapping[int, Text] = field(default_factory=dict)
    """By stage: other words from there on. What was made before was made under those before."""

    @property
    def clean(self) -> Values:
        """``values``, or zeros."""
        return self.values or Values({m: torch.zeros_like(x) for m, x in self.noise.items()})

    def part(self, stage: Stage) -> Task:
        """What is asked of one stage alone."""
        cells = {m: geometry.cells for m, geometry in self.sample.tracks.items()}
        tokens = {m: slice(s.start * cells[m], s.stop * cells[m]) for m, s in stage.items()}
        return replace(
            self,
            sample=self.sample.part(stage),
            noise={m: self.noise[m][:, s] for m, s in stage.items()},
            given=self.given.part(tokens),
            values=self.clean.part(stage),
            without={name: given.part(tokens) for name, given in self.without.items()},
        )

    def with_clean(self, clean: Mapping[str, Tensor]) -> Task:
        """With other clean tokens."""
        return replace(self, values=replace(self.clean, clean=clean))


def put(t_BF: Tensor, frames: slice, part: Tensor) -> Tensor:
    """A copy with some frames in exchange."""
    return torch.cat([t_BF[:, : frames.start], part, t_BF[:, frames.stop :]], dim=1)
