"""A batch of cached clips, as the loader hands it to a method.

Shapes: B batch, F latent frames, H x W latent cells, C channels, L text tokens, S scenes, K levels.
Sound is latents of one cell: H = W = 1, and F counts its latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from motionloom.plans.layout import Text

_Held = TypeVar("_Held", "Latents", Text)


def move_tensors(held: _Held, move: Callable[[Tensor], Tensor]) -> _Held:
    """``move`` on every tensor of a dataclass."""
    values = {f.name: getattr(held, f.name) for f in fields(held)}
    moved: dict[str, Any] = {n: move(v) for n, v in values.items() if isinstance(v, Tensor)}
    return replace(held, **moved)


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
        return move_tensors(self, move)


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
    """What is said of a sample as a whole, beside the captions of its scenes; empty: nothing."""
    reference_captions: list[str | None] | None = None
    """What is seen in each sample's reference, where it is said."""

    states: Mapping[str, Tensor] = field(default_factory=dict)
    """By modality: where a teacher's walks to these clips stood at the K levels of its pairs, float32
    (B, K, F, H, W, C); empty for clips that no teacher made."""

    @property
    def video(self) -> Latents:
        """The video; a batch of sound alone has none."""
        return self.latents["video"]

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``."""

        def move(t: Tensor) -> Tensor:
            return t.to(device, non_blocking=True)

        def move_text(text: Text | None) -> Text | None:
            return None if text is None else move_tensors(text, move)

        return replace(
            self,
            latents={m: of.map(move) for m, of in self.latents.items()},
            text=move_text(self.text),
            empty_text=move_text(self.empty_text),
            references={m: tuple(of.map(move) for of in all_of) for m, all_of in self.references.items()},
            masks={m: move(mask) for m, mask in self.masks.items()},
            states={m: move(x) for m, x in self.states.items()},
        )


def dropped_captions(
    batch: Batch, drop: Sequence[bool]
) -> tuple[list[list[str]], list[str] | None, list[str | None] | None]:
    """Captions of the scenes, of the whole and of references, as ``text.encode_scenes`` takes them.

    Args:
        drop: for each sample: its scenes get the empty caption, and nothing else is said.
    """
    scenes = [[""] * len(said) if gone else said for said, gone in zip(batch.captions, drop, strict=True)]
    whole, references = batch.global_captions, batch.reference_captions
    return (
        scenes,
        None if whole is None else ["" if gone else w for w, gone in zip(whole, drop, strict=True)],
        None
        if references is None
        else [None if gone else r for r, gone in zip(references, drop, strict=True)],
    )
