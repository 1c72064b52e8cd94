"""Causal chunks: the video is a row of chunks, each seeing itself and the past (CausVid, arXiv 2412.07772).

``forcing = "diffusion"``: every chunk has its own noise level and sees the noisy past (diffusion forcing,
arXiv 2407.01392). ``forcing = "teacher"``: the sequence is ``[clean | noisy]`` and a noisy chunk sees the
clean past, which is what generation from a cache of clean chunks computes.

Words are read by all chunks and stand at level 0, the clean one. To a backbone that modulates its words by
their noise (LTX-2.3) that is new: published weights saw words at the level of the video.

Of several scenes none shares a chunk with the next: each begins with a chunk of its own, of one frame where
``first_alone`` says so, and its words are read by it alone. Their places in time are those of ``scenes``.

Shapes: see ``layout.py``; D chunks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from motionloom.plans.conditions import Conditions
from motionloom.plans.geometry import Geometry, Sample
from motionloom.plans.given import Given
from motionloom.plans.layout import Layout, Made, Stage, Text
from motionloom.plans.places import Positions, place
from motionloom.plans.text_to_video import rule, tracks
from motionloom.plans.visibility import (
    CausalChunks,
    TeacherForcing,
    Visibility,
    full,
    same_scene_or_both_video,
)


@dataclass(frozen=True)
class Chunks:
    """``frames``: latent frames of a chunk; ``first_alone``: chunk 0 is one frame (image to video);
    ``window`` and ``sinks`` in chunks, see :class:`~motionloom.plans.visibility.CausalChunks`.

    Sound belongs to the chunk of the video that sounds with it; sound alone is cut as video would be."""

    frames: int = 3
    first_alone: bool = False
    window: int | None = None
    sinks: int = 0
    rebase: bool = False
    """When old chunks leave the window, those that stay close up behind the sinks: a stream's time then never
    runs past what training showed. The masked forward has no such rule; it matters to roll-outs alone."""
    forcing: Literal["diffusion", "teacher"] = "diffusion"
    conditions: Conditions = field(default_factory=Conditions)
    positions: Positions = "continuous"
    """Where scenes stand in time, see ``places.py``. They cannot begin at 0 again: a chunk knows its past by
    its time."""
    jump: float = 0.5
    gap: float = 4.0
    audio_loss: float = 1.0

    def __post_init__(self) -> None:
        assert self.positions != "reset", "chunks of different scenes would stand at one time"

    def chunk_of(self, frames: int, device: torch.device | None = None) -> Tensor:
        """The chunk of each latent frame of one scene, (frames,). The last chunk may be shorter."""
        index = torch.arange(frames, device=device)
        return (index + self.frames - 1) // self.frames if self.first_alone else index // self.frames

    def _bounds(self, main: Geometry) -> list[tuple[int, int]]:
        """First frame and end of every chunk."""
        # Of one scene counted in Python: reading a tensor back would make the device wait.
        lengths = (
            [main.grid[0]]
            if main.scenes == 1
            else main.scene_BF[0].unique_consecutive(return_counts=True)[1].tolist()
        )
        bounds, begin = [], 0
        for length in lengths:
            ends = [*range(int(self.first_alone) or self.frames, length, self.frames), length]
            bounds += [(begin + a, begin + b) for a, b in pairwise([0, *ends])]
            begin += length
        return bounds

    def _chunk_numbers(self, main: Geometry) -> Tensor:
        """The chunk of each frame of the main modality, (F,); scenes are those of the first sample."""
        if main.scenes == 1:
            return self.chunk_of(main.grid[0], main.device)
        scene_F, index_F = main.scene_BF[0], torch.arange(main.grid[0], device=main.device)
        new_F = torch.cat([torch.ones_like(scene_F[:1], dtype=torch.bool), scene_F[1:] != scene_F[:-1]])
        within_F = index_F - torch.where(new_F, index_F, 0).cummax(dim=0).values
        head = int(self.first_alone)
        begins_F = (within_F == 0) | ((within_F >= head) & ((within_F - head) % self.frames == 0))
        return begins_F.cumsum(dim=0) - 1

    def _most_chunks(self, main: Geometry) -> int:
        """How many chunks there are at most, known without asking the device; of one scene, how many."""
        return (main.grid[0] + main.scenes * (self.frames - 1) * (1 + self.first_alone)) // self.frames

    def stages(self, sample: Sample) -> list[Stage]:
        """Chunk after chunk, each from the clean past: what a stream does."""
        bounds = self._bounds(sample.main)
        stages: list[Stage] = [{self._main(sample): slice(*bound)} for bound in bounds]
        if len(sample.tracks) > 1:
            counts = torch.bincount(self._chunks(sample, sample.tracks["audio"]).cpu(), minlength=len(bounds))
            edges = [0, *counts.cumsum(0).tolist()]
            stages = [{**stage, "audio": slice(*e)} for stage, e in zip(stages, pairwise(edges), strict=True)]
        return stages

    def stage_layout(self, sample: Sample, given: Given) -> Layout:
        """One chunk alone. Whatever the forcing was in training, generation is the same: a noisy chunk and
        its clean past. Nothing is hidden but other scenes' words, since the cache holds no chunk that this
        one may not see."""
        sample = place(sample, self.positions, self.jump, self.gap)
        main = sample.main
        chunk = self.chunk_of(main.begin + main.grid[0], main.device)[main.begin]

        def made(geometry: Geometry) -> Made:
            nothing_F = torch.zeros(geometry.grid[0], dtype=torch.long, device=geometry.device)
            return Made(1, nothing_F[None], nothing_F + chunk)

        words = full if main.scenes == 1 else same_scene_or_both_video
        return Layout(words, tracks(sample, given, self.audio_loss, made), None)

    def layout(self, sample: Sample, text: Text, given: Given) -> Layout:
        sample = place(sample, self.positions, self.jump, self.gap)
        num_chunks = self._most_chunks(sample.main)
        teacher = self.forcing == "teacher"

        def made(geometry: Geometry) -> Made:
            chunk_F = self._chunks(sample, geometry)
            return Made(num_chunks, chunk_F[None], chunk_F, clean_words=True, clean_copy=teacher)

        visibility: Visibility = CausalChunks(self.window, self.sinks)
        if teacher:
            visibility = TeacherForcing(self.window, self.sinks)
        if sample.main.scenes > 1:
            visibility = visibility & same_scene_or_both_video
        found = tracks(sample, given, self.audio_loss, made)
        return Layout(rule(visibility, text, found), found, torch.full_like(text.scene_BL, num_chunks))

    def _chunks(self, sample: Sample, geometry: Geometry) -> Tensor:
        """The chunk of each frame of any modality: for sound, that of the video frame in whose time it
        stands."""
        main = sample.main
        chunk_F = self._chunk_numbers(main)
        if geometry is main:
            return chunk_F
        assert main.span_BF2 is not None
        ends_F = main.span_BF2[0, :, 1].contiguous()
        frame_T = torch.searchsorted(ends_F, geometry.seconds_BF[0].contiguous(), right=True)
        return chunk_F[frame_T.clamp_max(main.grid[0] - 1)]

    @staticmethod
    def _main(sample: Sample) -> str:
        return "video" if "video" in sample.tracks else "audio"
