"""Scenes: several shots in one sequence, each with its caption (Mask2DiT, arXiv 2503.19881).

Mask 1 binds text i to scene i while all video sees all video. Mask 2, the segment-conditional mask, is a
``scene`` condition: some scenes are given at noise level 0, their text included, and the others are made;
with the last scene made this is auto-regressive scene expansion.

Shapes: Z scenes; the rest in ``layout.py``. Scenes may have any lengths; ``Geometry.scene_BF`` names them.
"""

from __future__ import annotations

from collections.abc import Mapping
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
        placed = replace(sample, tracks=self._placed(sample.tracks))
        found = tracks(placed, given, self.audio_loss, self._made)
        levels_BL = word_levels(text, found["video" if "video" in found else "audio"])
        return Layout(rule(VISIBILITIES[self.visibility], text, found), found, levels_BL)

    def _made(self, geometry: Geometry) -> Made:
        if self.noise == "shared":
            return at_once(geometry)
        return replace(at_once(geometry), draws=geometry.scenes, draw_BF=geometry.scene_BF)

    def _placed(self, all_of: Mapping[str, Geometry]) -> dict[str, Geometry]:
        """Every modality moved alike, so that sound stays with its picture."""
        if self.positions == "continuous" or all(g.scenes == 1 for g in all_of.values()):
            return dict(all_of)
        main = all_of["video" if "video" in all_of else "audio"]
        frame_B1 = frame_seconds(main)[:, None]
        return {m: self._moved(geometry, main, frame_B1) for m, geometry in all_of.items()}

    def _moved(self, geometry: Geometry, main: Geometry, frame_B1: Tensor) -> Geometry:
        if self.positions == "reset":
            begin_BF, index_BF = _scene_begins(geometry, main)
            return replace(geometry, seconds_BF=geometry.seconds_BF - begin_BF, jump_BF=-index_BF)
        later_B1 = self.jump * frame_B1 if self.positions == "jump" else torch.full_like(frame_B1, self.gap)
        later_BF = geometry.scene_BF * later_B1
        jump_BF = later_BF / frame_seconds(geometry)[:, None]
        return replace(geometry, seconds_BF=geometry.seconds_BF + later_BF, jump_BF=jump_BF)


def _scene_begins(geometry: Geometry, main: Geometry) -> tuple[Tensor, Tensor]:
    """Seconds, by the main modality, and index, by its own, at which the scene of each frame begins."""
    assert main.span_BF2 is not None
    begins = []
    for of, values in ((main, main.span_BF2[..., 0]), (geometry, _frame_numbers(geometry))):
        later = torch.finfo(torch.float32).max
        batch = max(len(of.scene_BF), len(values))
        scene_BF, values = of.scene_BF.expand(batch, -1), values.expand(batch, -1)
        first_BZ = torch.full((batch, geometry.scenes), later, device=geometry.device)
        begins.append(first_BZ.scatter_reduce(1, scene_BF, values, "amin"))
    seconds_BZ, index_BZ = begins
    batch = max(len(seconds_BZ), len(index_BZ), len(geometry.scene_BF))
    scene_BF = geometry.scene_BF.expand(batch, -1)
    return tuple(t.expand(batch, -1).gather(1, scene_BF) for t in (seconds_BZ, index_BZ))  # type: ignore[return-value]


def _frame_numbers(geometry: Geometry) -> Tensor:
    return torch.arange(geometry.grid[0], device=geometry.device, dtype=torch.float32)[None] + geometry.begin
