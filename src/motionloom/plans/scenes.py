"""Scenes: several shots in one sequence, each with its caption (Mask2DiT, arXiv 2503.19881).

Mask 1 binds text i to scene i while all video sees all video. Mask 2, the segment-conditional mask, gives
some scenes clean at noise level 0, their text included, and makes the others: with the last scene made this
is auto-regressive scene expansion.

Shapes: S scenes; the rest in ``layout.py``. Scenes may have any lengths; ``Geometry.scene_BF`` names them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from motionloom.plans.layout import Geometry, Layout, Text
from motionloom.plans.text_to_video import clip_layout
from motionloom.plans.visibility import Visibility, full, same_scene_or_both_video, scene_summaries

VISIBILITIES: dict[str, Visibility] = {
    "mask2dit": same_scene_or_both_video,
    "summary": scene_summaries,
    "full": full,
}
"""``mask2dit``: all video sees all video, and each caption its own scene. ``summary``: of other scenes only
the first frame is seen, which leaves a quarter of the work at six scenes. ``full``: no rule at all."""


@dataclass(frozen=True)
class Scenes:
    """``expand_probability``: how often in training all scenes but the last are given. ``visibility``: how
    scenes see each other, one of :data:`VISIBILITIES`."""

    expand_probability: float = 0.5
    visibility: Literal["mask2dit", "summary", "full"] = "mask2dit"
    knows_given = True

    def draw_given(self, geometry: Geometry, generator: torch.Generator) -> Tensor:
        draw_B = torch.rand(geometry.batch, generator=generator, device=generator.device)
        expand_B1 = (draw_B < self.expand_probability).to(geometry.device)[:, None]
        last_B1 = geometry.scene_BF.amax(dim=1, keepdim=True)
        return expand_B1 & (geometry.scene_BF < last_B1)

    def stages(self, geometry: Geometry) -> list[slice]:
        """All frames at once."""
        return [slice(0, geometry.grid[0])]

    def layout(self, geometry: Geometry, text: Text, given_BF: Tensor) -> Layout:
        layout = clip_layout(geometry, text, given_BF, VISIBILITIES[self.visibility])
        return replace(layout, text_level_BL=self._text_levels(geometry, text, given_BF))

    @staticmethod
    def _text_levels(geometry: Geometry, text: Text, given_BF: Tensor) -> Tensor:
        """Captions of wholly given scenes stand at level 0 (clean), the others at level 1."""
        batch = max(given_BF.shape[0], geometry.scene_BF.shape[0], text.scene_BL.shape[0])
        scene_BF = geometry.scene_BF.expand(batch, -1)
        scene_BL = text.scene_BL.expand(batch, -1)
        of_scene_BLF = scene_BL[:, :, None] == scene_BF[:, None, :]
        to_make_BLF = of_scene_BLF & ~given_BF.expand(batch, -1)[:, None, :]
        return to_make_BLF.any(dim=2).long()
