"""A batch of cached clips, as the loader hands it to a method.

Shapes: B batch, F latent frames, H x W latent cells, C channels, L text tokens, S scenes. Sound is latents of
one cell: H = W = 1, and F counts its latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from motionloom.plans.layout import Text


@dataclass(frozen=True)
class Latents:
    """Clips of one shape in one modality, whole: what is learned, or what is referred to."""

    x_BFHWC: Tensor
    """Normalised latents, float32; zeros for a sample that lacks them."""
    seconds_BF: Tensor
    """Centre of each latent frame in seconds, float32, (B or 1, F)."""
    span_BF2: Tensor
    """Beginning and end of each latent frame in seconds, float32, (B or 1, F, 2)."""
    scene_BF: Tensor
    """Shot of each latent frame, int64, (B or 1, F)."""
    pixels: int = 0
    """Pixels of the source in a latent cell, both ways; 0 for sound."""
    present_B: Tensor | None = None
    """False for samples that lack it: a silent clip, a clip without a reference. None: all have it."""

    def map(self, move: Callable[[Tensor], Tensor]) -> Latents:
        """``move`` on every tensor."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{n: move(v) for n, v in values.items() if isinstance(v, Tensor)})


@dataclass(frozen=True)
class Batch:
    """Clips of one shape.

    ``text`` and ``empty_text`` are present when the cache holds embeddings; otherwise the method encodes
    ``captions`` with the text encoder that it trains.
    """

    ids: list[str]
    latents: Mapping[str, Latents]
    """By modality: ``video``, ``audio`` or both."""
    captions: list[list[str]]
    """Per sample, per scene."""
    text: Text | None = None
    empty_text: Text | None = None
    """The embedding of the empty caption, laid out for the same scenes, batch 1."""
    references: Mapping[str, tuple[Latents, ...]] = field(default_factory=dict)
    """By modality: clips that stand beside, to be looked at (IC-LoRA)."""
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    """By modality: bool (B, F, H, W), True where the latents are given; a sample without a mask is False."""
    global_captions: list[str] | None = None
    """What is said of a sample as a whole, beside the captions of its scenes."""

    @property
    def video(self) -> Latents:
        """The video; a batch of sound alone has none."""
        return self.latents["video"]

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``."""

        def move(t: Tensor) -> Tensor:
            return t.to(device, non_blocking=True)

        def move_text(text: Text | None) -> Text | None:
            return None if text is None else Text(move(text.x_BLC), move(text.valid_BL), move(text.scene_BL))

        return replace(
            self,
            latents={m: of.map(move) for m, of in self.latents.items()},
            text=move_text(self.text),
            empty_text=move_text(self.empty_text),
            references={m: tuple(of.map(move) for of in all_of) for m, all_of in self.references.items()},
            masks={m: move(mask) for m, mask in self.masks.items()},
        )
