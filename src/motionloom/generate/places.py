"""Where the tokens of a clip without end stand.

The plan lays out a clip of training first, and then ever longer ones, a stretch at a time: a chunk's place
does not depend on how much comes after it.

Shapes: B batch, F token frames.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from motionloom.generate.model import Model
from motionloom.plans import Geometry, Sample, Stage

AHEAD = 64
"""Token frames that are laid out at a time."""


class Places:
    """See the top of this file.

    Raises:
        UserError: the tokenizer or the patch cannot make the size.
    """

    def __init__(self, model: Model, height: int, width: int, fps: float) -> None:
        self._model, self._size = model, (height, width, fps)
        self._pixels = model.clip_shape[0]
        self._lay_out()
        self.trained = len(self._stages)
        """Chunks of a clip of training."""

    def stage(self, chunk: int) -> Stage:
        """Frames of a chunk, by modality."""
        # The last chunk of a layout may be cut short, or lack sound that rounding gave to the next.
        while chunk >= len(self._stages) - 1:
            self._pixels += AHEAD * self._model.patch[0] * self._model.tokenizer.spec.temporal
            self._lay_out()
        return self._stages[chunk]

    def part(self, chunk: int) -> Sample:
        """A chunk's tokens where they stand."""
        stage = self.stage(chunk)
        return self._sample.part(stage)

    def latents(self, chunk: int) -> int:
        """Latent frames of the video before a chunk."""
        return self.stage(chunk)["video"].start * self._model.patch[0]

    def frames(self, chunk: int) -> int:
        """Pixel frames before a chunk."""
        latents = self.latents(chunk)
        return self._model.tokenizer.spec.pixel_frames(latents) if latents else 0

    def begin(self, chunk: int) -> float:
        """When a chunk begins, in seconds."""
        if "video" in self._model.modalities:
            return self.frames(chunk) / self._size[2]
        span_BF2 = self.part(chunk).main.span_BF2
        assert span_BF2 is not None
        return float(span_BF2[0, 0, 0])

    def _lay_out(self) -> None:
        sample = self._model.sample((self._pixels,), *self._size, 1)
        tracks = {m: _with_first(geometry) for m, geometry in sample.tracks.items()}
        self._sample = replace(sample, tracks=tracks)
        self._stages = self._model.plan.stages(self._sample)


def _with_first(geometry: Geometry) -> Geometry:
    """One scene has one first frame: said here, so that no part looks for it among all frames."""
    first_F = torch.arange(geometry.grid[0], device=geometry.device) == 0
    return replace(geometry, first_BF=first_F[None])
