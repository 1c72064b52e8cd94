"""A batch of cached clips, as the loader hands it to a method.

Shapes: B batch, F latent frames, H x W latent cells, C channels, L text tokens, S scenes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from motionloom.plans.layout import Text


@dataclass(frozen=True)
class Batch:
    """Clips of one shape.

    ``text`` and ``empty_text`` are present when the cache holds embeddings; otherwise the method encodes
    ``captions`` with the text encoder that it trains.
    """

    ids: list[str]
    latents_BFHWC: Tensor
    """Normalised latents, float32."""
    seconds_BF: Tensor
    """Centre of each latent frame in seconds, float32."""
    scene_BF: Tensor
    """Shot of each latent frame, int64."""
    captions: list[list[str]]
    """Per sample, per scene."""
    text: Text | None = None
    empty_text: Text | None = None
    """The embedding of the empty caption, laid out for the same scenes, batch 1."""

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``."""

        def move(t: Tensor) -> Tensor:
            return t.to(device, non_blocking=True)

        def move_text(text: Text | None) -> Text | None:
            return None if text is None else Text(move(text.x_BLC), move(text.valid_BL), move(text.scene_BL))

        return Batch(
            self.ids,
            move(self.latents_BFHWC),
            move(self.seconds_BF),
            move(self.scene_BF),
            self.captions,
            move_text(self.text),
            move_text(self.empty_text),
        )
