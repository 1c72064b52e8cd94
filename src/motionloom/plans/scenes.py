"""Scenes: several shots in one sequence, each with its caption (Mask2DiT, arXiv 2503.19881).

Mask 1 binds text i to scene i while all video sees all video. Mask 2, the segment-conditional mask, is a
``scene`` condition: some scenes are given at noise level 0, their text included, and the others are made;
with the last scene made this is auto-regressive scene expansion.

Shapes: Z scenes; the rest in ``layout.py``. Scenes may have any lengths; ``Geometry.scene_BF`` names them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from motionloom.plans.conditions import Conditions
from motionloom.plans.geometry import Geometry, Sample, frame_seconds
from motionloom.plans.given import Given
from motionloom.plans.layout import Layout, Made, Stage, Text, nothing_moves
from motionloom.plans.text_to_video import at_once, rule, tracks, word_levels
from motionloom.plans.visibility import (
    Visibility,
    cinetrans,
    full,
    same_scene_or_both_video,
    scene_summaries,
)

VISIBILITIES: dict[str, Visibility] = {
    "mask2dit": same_scene_or_both_video,
    "summary": scene_summaries,
    "cinetrans": cinetrans,
    "full": full,
}
"""``mask2dit``: all video sees all video, and each caption its own scene. ``summary``: of other scenes only
the first frame is seen, which leaves a quarter of the work at six scenes (HoloCine). ``cinetrans``: scenes
apart in the middle layers. ``full``: no rule at all."""


@dataclass(frozen=True)
class Scenes:
    """``visibility``: how scenes see each other, one of :data:`VISIBILITIES`. ``positions``: where the next
    scene stands in time: it goes on (Mask2DiT), begins at 0 again, or stands ``jump`` token frames
    (MultiShotMaster, arXiv 2512.03041) or ``gap`` seconds later, at every cut. ``noise``: one level for all
    scenes or one for each (LCT, arXiv 2503.10589)."""

    conditions: Conditions = field(default_factory=Conditions)
    visibility: Literal["mask2dit", "summary", "cinetrans", "full"] = "mask2dit"
    positions: Literal["continuous", "reset", "jump", "gap"] = "continuous"
    jump: float = 0.5
    gap: float = 4.0
    noise: Literal["shared", "own"] = "shared"
    audio_loss: float = 1.0

    def stages(self, sample: Sample) -> list[Stage]:
        """All at once."""
        return nothing_moves(sample)

    def layout(self, sample: Sample, text: Text, given: Given) -> Layout:
        placed = self._placed(sample)
        found = tracks(placed, given, self.audio_loss, self._made)
        levels_BL = word_levels(text, found["video" if "video" in found else "audio"])
        return Layout(rule(VISIBILITIES[self.visibility], text, found), found, levels_BL)

    def _made(self, geometry: Geometry) -> Made:
        if self.noise == "shared":
            return at_once(geometry)
        return replace(at_once(geometry), draws=geometry.scenes, draw_BF=geometry.scene_BF)

    def _placed(self, sample: Sample) -> Sample:
        """Every modality moved alike, so that sound and references stay with their picture."""
        main = sample.main
        if self.positions == "continuous" or main.scenes == 1:
            return sample
        frame_B1 = frame_seconds(main)[:, None]

        def moved(geometry: Geometry, beside: Geometry) -> Geometry:
            return self._moved(geometry, beside, main, frame_B1)

        return replace(
            sample,
            tracks={m: moved(geometry, geometry) for m, geometry in sample.tracks.items()},
            references={
                m: tuple(moved(one, sample.tracks[m]) for one in all_of) if m in sample.tracks else all_of
                for m, all_of in sample.references.items()
            },
        )

    def _moved(self, geometry: Geometry, beside: Geometry, main: Geometry, frame_B1: Tensor) -> Geometry:
        """Args: ``beside``: the track whose frames it counts its own by: itself, or a reference's target."""
        if self.positions == "reset":
            begin_BF = _at_scene(main, _spans(main)[..., 0], geometry.scene_BF)
            index_BF = _at_scene(beside, _frame_numbers(beside), geometry.scene_BF)
            return replace(geometry, seconds_BF=geometry.seconds_BF - begin_BF, jump_BF=-index_BF)
        later_B1 = self.jump * frame_B1 if self.positions == "jump" else torch.full_like(frame_B1, self.gap)
        later_BF = geometry.scene_BF * later_B1
        jump_BF = later_BF / frame_seconds(beside)[:, None]
        return replace(geometry, seconds_BF=geometry.seconds_BF + later_BF, jump_BF=jump_BF)


def _at_scene(of: Geometry, value_BF: Tensor, scene_BN: Tensor) -> Tensor:
    """(B or 1, N): the value of the first frame of ``of`` in each of these scenes."""
    batch = max(len(of.scene_BF), len(value_BF), len(scene_BN))
    scene_BF, value_BF = of.scene_BF.expand(batch, -1), value_BF.expand(batch, -1)
    far = torch.full((batch, of.scenes), torch.finfo(torch.float32).max, device=of.device)
    first_BZ = far.scatter_reduce(1, scene_BF, value_BF, "amin")
    return first_BZ.gather(1, scene_BN.expand(batch, -1))


def _spans(geometry: Geometry) -> Tensor:
    assert geometry.span_BF2 is not None, "scenes are set apart by when their frames begin"
    return geometry.span_BF2


def _frame_numbers(geometry: Geometry) -> Tensor:
    return torch.arange(geometry.grid[0], device=geometry.device, dtype=torch.float32)[None] + geometry.begin
