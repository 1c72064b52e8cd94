"""What a batch of cached pixels is to a tokenizer: frames, words, and parts of the batch.

Shapes: B clips, P pixel frames, H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from motionloom.data.batch import Batch
from motionloom.tokenizers.vtp import VTPConfig
from motionloom.tokenizers.vtp.tokenizer import normalise
from motionloom.train.method import StepContext


def unit_frames(batch: Batch) -> Tensor:
    """The clips of a cache of pixels, (B, P, 3, H, W) in [0, 1]."""
    return (batch.video.x_BFHWC.movedim(-1, 2).float() + 1.0) / 2.0


def frames(batch: Batch) -> Tensor:
    """The same as the encoder takes them."""
    return normalise(unit_frames(batch))


def latent_cells(batch: Batch, config: VTPConfig) -> int:
    """How many cells of latents the clips of a batch become."""
    clips, pixel_frames, height, width, _ = batch.video.x_BFHWC.shape
    latent_frames = 1 + (pixel_frames - 1) // config.temporal_patch
    return clips * latent_frames * (height * width // config.vision_patch_size**2)


def captions(batch: Batch) -> list[str]:
    """What is said of each clip: the captions of its scenes, one after the other."""
    return [" ".join(scenes) for scenes in batch.captions]


@dataclass(frozen=True)
class Share:
    """A part of the batch, for a loss that needs less than all of it (arXiv 2512.13687, 3.6)."""

    rows: Tensor
    """Indices in B, int64, in order."""
    batch: int

    @staticmethod
    def of(batch: Batch, share: float, context: StepContext, purpose: str) -> Share:
        """At least one clip, drawn anew in every step; held out, the first ones."""
        size = len(batch.ids)
        kept = min(size, max(1, round(size * share)))
        order = torch.arange(size)
        if context.phase == "train":
            order = torch.randperm(size, generator=context.generator(purpose))
        return Share(order[:kept].sort().values.to(batch.video.x_BFHWC.device), size)

    def spread(self, loss: Tensor) -> Tensor:
        """Losses of the part as losses of the batch, with the same mean."""
        whole = loss.new_zeros(self.batch)
        return whole.index_add(0, self.rows, loss * (self.batch / len(self.rows)))
