"""Causal chunks: the video is a row of chunks, each seeing itself and the past (CausVid, arXiv 2412.07772).

``forcing = "diffusion"``: every chunk has its own noise level and sees the noisy past (diffusion forcing,
arXiv 2407.01392). ``forcing = "teacher"``: the sequence is ``[clean | noisy]`` and a noisy chunk sees the
clean past, which is what generation from a cache of clean chunks computes.

Words are read by all chunks and stand at level 0, the clean one. To a backbone that modulates its words by
their noise (LTX-2.3) that is new: published weights saw words at the level of the video.

Shapes: see ``layout.py``; D chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from motionloom.plans.layout import CLEAN, Geometry, Layout, Text
from motionloom.plans.visibility import CausalChunks, TeacherForcing, Visibility, full


@dataclass(frozen=True)
class Chunks:
    """``frames``: latent frames of a chunk; ``first_alone``: chunk 0 is one frame (image to video);
    ``window`` and ``sinks`` in chunks, see :class:`~motionloom.plans.visibility.CausalChunks`."""

    frames: int = 3
    first_alone: bool = False
    window: int | None = None
    sinks: int = 0
    forcing: Literal["diffusion", "teacher"] = "diffusion"
    knows_given = True

    def chunk_of(self, frames: int, device: torch.device | None = None) -> Tensor:
        """The chunk of each latent frame, (frames,). The last chunk may be shorter."""
        index = torch.arange(frames, device=device)
        return (index + self.frames - 1) // self.frames if self.first_alone else index // self.frames

    def draw_given(self, geometry: Geometry, generator: torch.Generator) -> Tensor:
        return torch.zeros(geometry.batch, geometry.grid[0], dtype=torch.bool, device=geometry.device)

    def stages(self, geometry: Geometry) -> list[slice]:
        """Chunk after chunk, each from the clean past: what a stream does."""
        ends = [*range(int(self.first_alone) or self.frames, geometry.grid[0], self.frames), geometry.grid[0]]
        return [slice(begin, end) for begin, end in pairwise([0, *ends])]

    def stage_layout(self, geometry: Geometry, given_BF: Tensor | None) -> Layout:
        """One chunk alone. Whatever the forcing was in training, generation is the same: a noisy chunk and
        its clean past. Nothing is hidden, since the cache holds no chunk that this one may not see."""
        frame_F = torch.arange(geometry.grid[0], device=geometry.device)
        draws: tuple[int, ...] = (0,) if given_BF is None else (CLEAN, 0)
        if given_BF is None:
            given_BF = torch.zeros_like(frame_F[None], dtype=torch.bool)
        return Layout(
            geometry=geometry,
            visibility=full,
            draws=draws,
            frame_T=frame_F,
            context_T=torch.zeros_like(frame_F).bool(),
            given_BT=given_BF,
            level_BT=torch.where(given_BF, 0, len(draws) - 1),
            chunk_T=self.chunk_of(geometry.begin + geometry.grid[0], geometry.device)[geometry.begin :],
            text_level_BL=None,
        )

    def layout(self, geometry: Geometry, text: Text, given_BF: Tensor) -> Layout:
        frame_F = torch.arange(geometry.grid[0], device=geometry.device)
        chunk_F = self.chunk_of(geometry.grid[0], geometry.device)
        # Counted in Python: reading the tensor back would make the device wait.
        num_chunks = -(-(geometry.grid[0] - self.first_alone) // self.frames) + self.first_alone
        level_BF = torch.where(given_BF, 0, chunk_F[None] + 1)
        frame_T, chunk_T, given_BT, level_BT = frame_F, chunk_F, given_BF, level_BF
        context_T = torch.zeros_like(frame_F).bool()
        visibility: Visibility = CausalChunks(self.window, self.sinks)
        if self.forcing == "teacher":
            visibility = TeacherForcing(self.window, self.sinks)
            frame_T, chunk_T = frame_F.repeat(2), chunk_F.repeat(2)
            context_T = torch.cat([~context_T, context_T])
            given_BT = given_BF.repeat(1, 2)
            level_BT = torch.cat([torch.zeros_like(level_BF), level_BF], dim=1)
        return Layout(
            geometry=geometry,
            visibility=visibility,
            draws=(CLEAN, *range(num_chunks)),
            frame_T=frame_T,
            context_T=context_T,
            given_BT=given_BT,
            level_BT=level_BT,
            chunk_T=chunk_T,
            text_level_BL=torch.zeros_like(text.scene_BL),
        )
