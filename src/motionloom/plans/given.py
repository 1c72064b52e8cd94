"""What is given, token by token: the answer of a condition list, and what layouts are made from.

Shapes: B batch, N tokens of a modality, G kinds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True, order=True)
class Kind:
    """One way of being given. Kinds are ordered: where two meet, the greater holds."""

    strength: float
    """1: exact. Less: a hint, made anew from noise level (1 - strength) sigma."""
    clean: float
    """1 - the highest noise level at which it is shown."""

    @property
    def noise(self) -> float:
        """The highest noise level at which it is shown."""
        return 1.0 - self.clean


EXACT = Kind(1.0, 1.0)
"""Given to the bit, and shown so."""


@dataclass(frozen=True)
class Marks:
    """What of one modality is given."""

    kinds: tuple[Kind, ...]
    """The same for all samples, whatever was drawn."""
    kind_BN: Tensor
    """int64 (B or 1, N): 0 is made, i > 0 is given as ``kinds[i - 1]``."""
    noise_BG: Tensor | None = None
    """Noise level of each kind in each sample, (B or 1, G); None: all are clean."""

    @property
    def made_BN(self) -> Tensor:
        """True for tokens that are made, hints among them."""
        made_BN = torch.ones_like(self.kind_BN, dtype=torch.bool)
        for i, kind in enumerate(self.kinds):
            if kind.strength == 1:
                made_BN = made_BN & (self.kind_BN != i + 1)
        return made_BN

    def part(self, tokens: slice) -> Marks:
        """Of some of the tokens."""
        return Marks(self.kinds, self.kind_BN[:, tokens], self.noise_BG)

    def and_given(self, given_BN: Tensor, kind: Kind) -> Marks:
        """And these as ``kind``, whatever else they were given as."""
        if kind in self.kinds:
            index = self.kinds.index(kind) + 1
            return Marks(self.kinds, torch.where(given_BN, index, self.kind_BN), self.noise_BG)
        noise_BG = self.noise_BG
        if noise_BG is not None or kind.noise > 0:
            if noise_BG is None:
                noise_BG = torch.zeros(1, len(self.kinds), device=self.kind_BN.device)
            more_B1 = torch.full((len(noise_BG), 1), kind.noise, device=noise_BG.device)
            noise_BG = torch.cat([noise_BG, more_B1], dim=1)
        return Marks((*self.kinds, kind), self.kind_BN, noise_BG).and_given(given_BN, kind)


@dataclass(frozen=True)
class Beside:
    """How a reference stands there."""

    present_B: Tensor | None = None
    """False for samples that go without; None: all have it."""
    noise_B: Tensor | None = None
    """The noise level that it is shown at, (B,) or (1,); None: clean."""
    number: int = 0
    """Which of the sample's references it is; of several sizes among a batch all are the same one."""


@dataclass(frozen=True)
class Given:
    """What of a batch of samples is given. A modality that is not named is made whole."""

    marks: Mapping[str, Marks] = field(default_factory=dict)
    references: Mapping[str, tuple[Beside, ...]] = field(default_factory=dict)
    """Only as many as are laid out."""
    freed_B: Tensor | None = None
    """Samples that the draw gave whole, and that are made whole instead. None: none of them could be."""

    def part(self, tokens: Mapping[str, slice]) -> Given:
        """Of some tokens of each modality; a modality of which nothing is given there is not named."""
        parts = {m: marks.part(tokens[m]) for m, marks in self.marks.items()}
        return replace(self, marks={m: p for m, p in parts.items() if bool((p.kind_BN > 0).any())})


NOTHING = Given()
"""All is made."""


def exactly(given_BN: Tensor) -> Marks:
    """Marks of tokens that are given to the bit, and nothing else."""
    return Marks((EXACT,), given_BN.long())
