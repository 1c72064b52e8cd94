"""Text to video, with or without the first frame given. Text to image is the same with one frame.

Shapes: see ``layout.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from motionloom.plans.layout import CLEAN, Geometry, Layout, Text
from motionloom.plans.visibility import Visibility, full


def clip_layout(geometry: Geometry, text: Text, given_BF: Tensor | None, visibility: Visibility) -> Layout:
    """One noise level for all that is not given; without given frames only that level exists."""
    frames = geometry.grid[0]
    frame_T = torch.arange(frames, device=geometry.device)
    nothing_T = torch.zeros_like(frame_T)
    if given_BF is None:
        draws: tuple[int, ...] = (0,)
        given_BF = nothing_T[None].bool()
        level_BT = nothing_T[None]
    else:
        draws = (CLEAN, 0)
        level_BT = (~given_BF).long()
    return Layout(
        geometry=geometry,
        visibility=visibility,
        draws=draws,
        frame_T=frame_T,
        context_T=nothing_T.bool(),
        given_BT=given_BF,
        level_BT=level_BT,
        chunk_T=nothing_T,
        text_level_BL=torch.full_like(text.scene_BL, len(draws) - 1),
    )


@dataclass(frozen=True)
class TextToVideo:
    """Every frame is made from the caption."""

    knows_given = False

    def draw_given(self, geometry: Geometry, generator: torch.Generator) -> Tensor:
        return torch.zeros(geometry.batch, geometry.grid[0], dtype=torch.bool, device=geometry.device)

    def stages(self, geometry: Geometry) -> list[slice]:
        """All frames at once."""
        return [slice(0, geometry.grid[0])]

    def layout(self, geometry: Geometry, text: Text, given_BF: Tensor) -> Layout:
        return clip_layout(geometry, text, None, full)


@dataclass(frozen=True)
class FirstFrame:
    """The first latent frame is given with ``probability`` in training; at noise level 0, bit-exact.

    Generating with nothing given is text to video, so one model serves both.
    """

    probability: float = 0.5
    knows_given = True

    def draw_given(self, geometry: Geometry, generator: torch.Generator) -> Tensor:
        draw_B = torch.rand(geometry.batch, generator=generator, device=generator.device)
        given_BF = torch.zeros(geometry.batch, geometry.grid[0], dtype=torch.bool, device=geometry.device)
        # A clip of one frame has nothing left to make once that frame is given.
        if geometry.grid[0] > 1:
            given_BF[:, 0] = (draw_B < self.probability).to(geometry.device)
        return given_BF

    def stages(self, geometry: Geometry) -> list[slice]:
        """All frames at once."""
        return [slice(0, geometry.grid[0])]

    def layout(self, geometry: Geometry, text: Text, given_BF: Tensor) -> Layout:
        return clip_layout(geometry, text, given_BF, full)
