"""Layouts: where every token of a sample stands, and how noisy it may be; and the protocol of plans.

A plan answers three questions and nothing else: what is given (its conditions, in training), what is made
together (`stages`), and how the tokens are laid out (`layout`). Trainer, sampler and streaming engine then
call the same functions of ``tokens.py`` on the layout.

Shapes: B batch, F token frames of the clip, T token frames in the sequence (F, or more when a plan repeats
frames as context), S cells of a frame, N = T x S tokens, C channels of a token, K noise levels, D draws, L
text tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from motionloom.plans.geometry import Geometry, Sample
from motionloom.plans.given import Given
from motionloom.plans.visibility import Visibility


@dataclass(frozen=True)
class Text:
    """Encoded captions of a batch, laid end to end: one per scene, and what else is said."""

    x_BLC: Tensor
    valid_BL: Tensor
    scene_BL: Tensor
    """The scene that a token speaks of; ``visibility.GLOBAL``: the whole."""
    context_BL: Tensor | None = None
    """True for captions of references. None: there are none."""


@dataclass(frozen=True)
class Level:
    """One noise level that tokens may stand at: ``scale`` times a draw, or one that is fixed."""

    draw: int | None = None
    """Which independent draw of sigma it follows; None: none."""
    scale: float = 1.0
    """1: made; between 0 and 1: a hint, made from partial noise."""


GIVEN = Level(None, 0.0)
"""Not made: at a fixed level, which is 0 unless the layout says otherwise."""


@dataclass(frozen=True)
class Track:
    """Where the tokens of one modality stand."""

    geometry: Geometry
    levels: tuple[Level, ...]
    level_BN: Tensor
    """int64 (B or 1, T x S): index into ``levels``, in the sequence's order."""
    frame_T: Tensor
    """Frame of the clip that each frame of the sequence shows."""
    context_T: Tensor
    """True for frames repeated as context."""
    chunk_T: Tensor
    fixed_BK: Tensor | None = None
    """Noise levels of what is given, (B or 1, K), 0 elsewhere; None: all clean."""
    references: tuple[Geometry, ...] = ()
    """What stands in front, brought to this track's place; at the levels ``reference_levels``."""
    reference_levels: tuple[int, ...] = ()
    reference_numbers: tuple[int, ...] = ()
    """Which of the sample's references each is: those of one number are of one scene."""
    loss: float = 1.0
    """Weight of this modality's loss."""
    facts: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What ``tokens.py`` found out of it: the same at every step of a solver. Changed copies begin empty."""

    @property
    def num_draws(self) -> int:
        """How many independent noise levels a sample needs; at least one, so that shapes hold."""
        return max((level.draw for level in self.levels if level.draw is not None), default=0) + 1

    def sigmas(self, sigma_BD: Tensor) -> Tensor:
        """Independent draws (B, D) -> the K levels (B, K)."""
        still = torch.zeros_like(sigma_BD[:, 0])
        columns = [
            still if level.draw is None else sigma_BD[:, level.draw] * level.scale for level in self.levels
        ]
        sigma_BK = torch.stack(columns, dim=1)
        return sigma_BK if self.fixed_BK is None else sigma_BK + self.fixed_BK

    @cached_property
    def speed_BN(self) -> Tensor:
        """How much of the solver's step each token of the clip takes, (B or 1, F x S): 1 made, 0 given."""
        level_BN = self.target(self.level_BN)
        # Level by level, since a table of them would be a copy to the device, which waits for it.
        speed_BN = torch.ones_like(level_BN, dtype=torch.float32)
        for i, level in enumerate(self.levels):
            scale = 0.0 if level.draw is None else level.scale
            if scale != 1.0:
                speed_BN = torch.where(level_BN == i, scale, speed_BN)
        return speed_BN

    def target(self, t_BN: Tensor) -> Tensor:
        """The clip's part of a fact of the sequence's tokens: context always stands before it."""
        return t_BN[:, t_BN.shape[1] - self.geometry.tokens :]

    @property
    def all_made(self) -> bool:
        """Whether no token can be given: known without asking the device."""
        return all(level.draw is not None and level.scale == 1.0 for level in self.levels)


@dataclass(frozen=True)
class Layout:
    """Where every token stands. Built by a plan; values and noise come later."""

    visibility: Visibility
    tracks: Mapping[str, Track]
    """By modality."""
    text_level_BL: Tensor | None
    """Level that modulates each text token, of the main track. None: text has a level of its own, which is
    clean."""

    @property
    def main(self) -> str:
        """The modality whose noise levels the text shares: video, or sound where there is no video."""
        return "video" if "video" in self.tracks else "audio"


class Conditioned(Protocol):
    """What draws what is given: :class:`~motionloom.plans.conditions.Conditions`."""

    def draw(self, sample: Sample, generator: torch.Generator) -> Given:
        """Training: what of each sample is given, by the conditions' own probabilities."""
        ...


Stage = Mapping[str, slice]
"""Frames of each modality that are made together."""


class Plan(Protocol):
    """What each token is."""

    @property
    def conditions(self) -> Conditioned:
        """What may be given in training."""
        ...

    def stages(self, sample: Sample) -> list[Stage]:
        """Generation: what is made together, in order; what is made is given to the next stage."""
        ...

    def layout(self, sample: Sample, text: Text, given: Given) -> Layout:
        """Where every token stands when ``given`` is given."""
        ...


@runtime_checkable
class StreamedPlan(Plan, Protocol):
    """A plan whose stages can be made one at a time, their past in a cache (``nn.cache.KVCache``)."""

    @property
    def window(self) -> int | None:
        """How many stages are visible, the present one included; None: all."""
        ...

    @property
    def sinks(self) -> int:
        """How many of the first stages stay visible."""
        ...

    @property
    def rebase(self) -> bool:
        """Whether the visible stages close up behind the first ones as others leave."""
        ...

    def stage_layout(self, sample: Sample, given: Given) -> Layout:
        """Where the tokens of one stage stand; its past, and no more than it may see, comes from a cache.

        Args:
            sample: the stage's part of the clip's.
            given: which of the stage's tokens are given.
        """
        ...


def nothing_moves(sample: Sample) -> list[Stage]:
    """All of a sample as one stage."""
    return [{m: slice(0, geometry.grid[0]) for m, geometry in sample.tracks.items()}]


@dataclass(frozen=True)
class Made:
    """How the made tokens of one modality take their noise: the part of a track that a plan chooses."""

    draws: int
    draw_BF: Tensor
    """int64 (B or 1, F): the draw that each frame follows."""
    chunk_F: Tensor
    """Causal chunk of each frame."""
    clean_words: bool = False
    """Whether words stand at noise level 0, which is then level ``draws``, rather than at that of a draw."""
    clean_copy: bool = False
    """Whether all frames stand a second time in front, clean, to be looked at."""


def track(
    geometry: Geometry, made: Made, given: Given, modality: str, references: tuple[Geometry, ...], loss: float
) -> Track:
    """The track of one modality: its draws, then what is given from weak to strong, then references."""
    marks = given.marks.get(modality)
    beside = given.references.get(modality, ())
    levels = [Level(draw) for draw in range(made.draws)] + [GIVEN] * (made.clean_words or made.clean_copy)
    fixed: list[Tensor | None] = [None] * len(levels)
    draw_BN = level_BN = geometry.per_token(made.draw_BF)
    copy_BN = torch.full_like(level_BN, -1)
    for i, kind in enumerate(() if marks is None else marks.kinds):
        assert marks is not None
        hint = kind.strength < 1
        # A hint follows the draw of its frame; what is given follows none, and its copies show it alike.
        level_BN = torch.where(marks.kind_BN == i + 1, len(levels) + (draw_BN if hint else 0), level_BN)
        if made.clean_copy and not hint:
            copy_BN = torch.where(marks.kind_BN == i + 1, level_BN, copy_BN)
        more = [Level(draw, 1.0 - kind.strength) for draw in range(made.draws)] if hint else [GIVEN]
        levels += more
        fixed += [None if hint or marks.noise_BG is None else marks.noise_BG[:, i]] * len(more)
    frames = geometry.grid[0]
    frame_T = torch.arange(frames, device=geometry.device)
    context_T, chunk_T = torch.zeros_like(frame_T).bool(), made.chunk_F
    if made.clean_copy:
        copy_BN = torch.where(copy_BN < 0, made.draws, copy_BN).expand(len(level_BN), -1)
        level_BN = torch.cat([copy_BN, level_BN], dim=1)
        frame_T, chunk_T = frame_T.repeat(2), chunk_T.repeat(2)
        context_T = torch.cat([~context_T, context_T])
    reference_levels = tuple(range(len(levels), len(levels) + len(beside)))
    for one in beside:
        levels.append(GIVEN)
        fixed.append(one.noise_B)
    return Track(
        geometry=geometry,
        levels=tuple(levels),
        level_BN=level_BN,
        frame_T=frame_T,
        context_T=context_T,
        chunk_T=chunk_T,
        fixed_BK=_fixed(fixed, geometry.device),
        references=references,
        reference_levels=reference_levels,
        reference_numbers=tuple(one.number for one in beside),
        loss=loss,
    )


def _fixed(columns: list[Tensor | None], device: torch.device) -> Tensor | None:
    """(B or 1, K); None where all are clean."""
    batch = max((len(t) for t in columns if t is not None), default=0)
    if batch == 0:
        return None
    clean_B = torch.zeros(batch, device=device)
    return torch.stack([clean_B if t is None else t.expand(batch) for t in columns], dim=1)
