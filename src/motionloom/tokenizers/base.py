"""The tokenizer protocol: pixels in, normalised latents out, and back.

Shapes: B batch, P pixel frames, H x W pixels; F latent frames, h x w latent cells, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from motionloom.errors import UserError


@dataclass(frozen=True)
class TokenizerSpec:
    """The shape rule of a tokenizer, and the only place where frames become seconds."""

    channels: int
    spatial: int
    """Pixels per latent cell, both ways."""
    temporal: int
    """Pixel frames per latent frame."""
    first_alone: bool = False
    """The first pixel frame is a latent frame of its own: clips of 1 + temporal x k frames."""

    def latent_grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(F, h, w) of a clip.

        Raises:
            UserError: the size does not divide; names the nearest sizes that do.
        """
        for name, pixels in (("height", height), ("width", width)):
            if pixels < self.spatial or pixels % self.spatial:
                below = max(self.spatial, pixels // self.spatial * self.spatial)
                near = sorted({below, below + self.spatial})
                raise UserError(
                    f"{name} {pixels} does not divide by the tokenizer's {self.spatial} pixels per cell: "
                    f"use {' or '.join(map(str, near))}"
                )
        head = int(self.first_alone)
        if frames < 1 or (frames - head) % self.temporal or (frames < self.temporal and not head):
            below = max(0, (frames - head) // self.temporal) * self.temporal + head
            near = sorted({max(below, head or self.temporal), below + self.temporal})
            raise UserError(
                f"{frames} frames do not divide into the tokenizer's groups of {self.temporal}"
                f"{' after a first frame alone' if head else ''}: use {' or '.join(map(str, near))}"
            )
        return head + (frames - head) // self.temporal, height // self.spatial, width // self.spatial

    def pixel_frames(self, latent_frames: int) -> int:
        """How many pixel frames so many latent frames decode to."""
        if self.first_alone:
            return 1 + (latent_frames - 1) * self.temporal
        return latent_frames * self.temporal

    def latent_of(self, pixel_frame: int) -> int:
        """The latent frame that holds a pixel frame."""
        if self.first_alone:
            return (pixel_frame + self.temporal - 1) // self.temporal
        return pixel_frame // self.temporal

    def seconds(self, latent_frames: int, fps: float) -> Tensor:
        """Centre of each latent frame in seconds from the clip's start, (F,) float32."""
        index = torch.arange(latent_frames, dtype=torch.float32)
        if not self.first_alone:
            return (index + 0.5) * self.temporal / fps
        later = 1 + (index - 0.5) * self.temporal
        return torch.where(index == 0, 0.5, later) / fps

    def spans(self, latent_frames: int, fps: float) -> Tensor:
        """Beginning and end of each latent frame in seconds from the clip's start, (F, 2) float32."""
        ends = torch.tensor([self.pixel_frames(n) for n in range(1, latent_frames + 1)], dtype=torch.float32)
        begins = torch.cat([torch.zeros(1), ends[:-1]])
        return torch.stack([begins, ends], dim=1) / fps


class Tokenizer(Protocol):
    """Pixels <-> latents. Implementations are deterministic: equal clips give equal latents."""

    spec: TokenizerSpec

    def encode(self, video_BPHW3: Tensor) -> Tensor:
        """uint8 sRGB (B, P, H, W, 3) -> float32 (B, F, h, w, C), per channel mean 0 and deviation 1."""
        ...

    def decode(self, latents_BFhwC: Tensor) -> Tensor:
        """Latents -> uint8 sRGB (B, P, H, W, 3)."""
        ...

    def stream_decode(self, latents: Iterable[Tensor]) -> Iterator[Tensor]:
        """Latent chunks (B, f, h, w, C) in order -> their pixel frames as soon as they are decided.

        The concatenation equals ``decode`` of the concatenation.
        """
        ...

    def resume_from(self, latent: int) -> int:
        """The latent frame at which another ``stream_decode`` may begin, so that its pixels of frame
        ``latent`` and of those that follow are those of the whole clip, to the bit."""
        ...

    def fingerprint(self) -> str:
        """Hex digest of all that decides the latents: weights, statistics, settings."""
        ...

    def save(self, folder: Path) -> None:
        """Write everything that ``load_tokenizer`` needs."""
        ...
