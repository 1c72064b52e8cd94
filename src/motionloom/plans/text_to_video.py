"""Clips from captions, with whatever is given of them. Text to image is the same with one frame.

Shapes: see ``layout.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from motionloom.plans.conditions import Conditions
from motionloom.plans.geometry import Geometry, Sample, beside
from motionloom.plans.given import Given
from motionloom.plans.layout import Layout, Made, Stage, Text, Track, nothing_moves, track
from motionloom.plans.visibility import Visibility, full, reference_captions, separate_references


def at_once(geometry: Geometry) -> Made:
    """One noise level for all frames."""
    nothing_F = torch.zeros(geometry.grid[0], dtype=torch.long, device=geometry.device)
    return Made(1, nothing_F[None], nothing_F)


def tracks(
    sample: Sample, given: Given, audio_loss: float, made: Callable[[Geometry], Made] = at_once
) -> dict[str, Track]:
    """The tracks of all modalities; references are laid out where they are among what is given."""
    found = {}
    for modality, geometry in sample.tracks.items():
        hows = given.references.get(modality, ())
        attached = sample.references.get(modality, ())[: len(hows)]
        stands = [
            replace(beside(geometry, clip), present_B=_both(clip.present_B, how.present_B))
            for clip, how in zip(attached, hows, strict=True)
        ]
        loss = audio_loss if modality == "audio" and len(sample.tracks) > 1 else 1.0
        found[modality] = track(geometry, made(geometry), given, modality, tuple(stands), loss)
    return found


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a & b


def rule(visibility: Visibility, text: Text, tracks_of: dict[str, Track]) -> Visibility:
    """``visibility``, and what references ask for besides: they do not see each other, and their captions
    are read by them alone."""
    if max((len(one.references) for one in tracks_of.values()), default=0) > 1:
        visibility = visibility & separate_references
    return visibility if text.context_BL is None else visibility & reference_captions


def word_levels(text: Text, main: Track) -> Tensor:
    """(B or 1, L): words share the noise level of what they speak of: that of the first token made in their
    scene, and the cleanest there is where their scene is wholly given (Mask2DiT's second mask). Words of the
    whole follow the first token made anywhere."""
    level_BN, made_BN = main.target(main.level_BN), main.speed_BN > 0
    scene_BN = main.geometry.per_token(main.geometry.scene_BF)
    batch = max(len(level_BN), len(scene_BN), len(text.scene_BL))
    level_BN, made_BN, scene_BN = (t.expand(batch, -1) for t in (level_BN, made_BN, scene_BN))
    scene_BL = text.scene_BL.expand(batch, -1)
    spoken_BLN = ((scene_BL[:, :, None] == scene_BN[:, None]) | (scene_BL[:, :, None] < 0)) & made_BN[:, None]
    first_BL = spoken_BLN.to(torch.uint8).argmax(dim=2)
    none = len(main.levels) - 1 - len(main.references)
    return torch.where(spoken_BLN.any(dim=2), level_BN.gather(1, first_BL), none)


@dataclass(frozen=True)
class TextToVideo:
    """Every frame that is not given is made from the caption, all at once."""

    conditions: Conditions = field(default_factory=Conditions)
    audio_loss: float = 1.0

    def stages(self, sample: Sample) -> list[Stage]:
        """All at once."""
        return nothing_moves(sample)

    def layout(self, sample: Sample, text: Text, given: Given) -> Layout:
        found = tracks(sample, given, self.audio_loss)
        # One scene: its words are at the level of what is made, whatever else is given.
        return Layout(rule(full, text, found), found, torch.zeros_like(text.scene_BL))
