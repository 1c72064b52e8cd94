"""Scenes: several shots in one sequence, each with its caption (Mask2DiT, arXiv 2503.19881).

Mask 1 binds text i to scene i while all video sees all video. Mask 2, the segment-conditional mask, is a
``scene`` condition: some scenes are given at noise level 0, their text included, and the others are made;
with the last scene made this is auto-regressive scene expansion.

Shapes: Z scenes; the rest in ``layout.py``. Scenes may have any lengths; ``Geometry.scene_BF`` names them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from motionloom.plans.conditions import Conditions
from motionloom.plans.geometry import Geometry, Sample
from motionloom.plans.given import Given
from motionloom.plans.layout import Layout, Made, Stage, Text, nothing_moves
from motionloom.plans.places import Positions, place
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
    positions: Positions = "continuous"
    jump: float = 0.5
    gap: float = 4.0
    noise: Literal["shared", "own"] = "shared"
    audio_loss: float = 1.0

    def stages(self, sample: Sample) -> list[Stage]:
        """All at once."""
        return nothing_moves(sample)

    def layout(self, sample: Sample, text: Text, given: Given) -> Layout:
        placed = place(sample, self.positions, self.jump, self.gap)
        found = tracks(placed, given, self.audio_loss, self._made)
        levels_BL = word_levels(text, found["video" if "video" in found else "audio"])
        return Layout(rule(VISIBILITIES[self.visibility], text, found), found, levels_BL)

    def _made(self, geometry: Geometry) -> Made:
        if self.noise == "shared":
            return at_once(geometry)
        return replace(at_once(geometry), draws=geometry.scenes, draw_BF=geometry.scene_BF)
