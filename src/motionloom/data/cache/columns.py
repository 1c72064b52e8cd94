"""What stands beside the frames, encoded: the columns of sound, references and masks.

Shapes: S sound channels, N samples, T latents; P pixel frames; F latent frames, h x w latent cells.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from motionloom.config.recipe import Recipe
from motionloom.data.cache.decode import Decoded
from motionloom.data.cache.makers import Makers
from motionloom.data.cache.masks import pack_mask


def track_columns(clips: Sequence[Decoded], makers: Makers, recipe: Recipe) -> list[dict[str, Any]]:
    """The columns of clips of one bucket; sounds and references of one shape are encoded together.

    What a clip lacks is an empty blob. Latents that are not finite in half precision make a column's value
    None: the clip is then no good.
    """
    rows: list[dict[str, Any]] = [{} for _ in clips]
    if recipe.audio.enabled:
        _put_sound(clips, rows, makers, recipe)
    if recipe.references.enabled:
        _put_references(clips, rows, makers)
    if recipe.references.enabled and recipe.references.audio:
        heard = [clip.tracks.reference_sound_SN for clip in clips]
        for row, latents in zip(rows, _encode_sounds(heard, makers, recipe), strict=True):
            row["reference_sound"] = b"" if latents is None else as_half(latents)
            row["reference_sound_latents"] = 0 if latents is None else len(latents)
    if recipe.masks.enabled:
        for row, clip in zip(rows, clips, strict=True):
            mask_Fhw = clip.tracks.mask_Fhw
            row |= {"mask": b"" if mask_Fhw is None else pack_mask(mask_Fhw), "masked": mask_Fhw is not None}
    return rows


def as_half(latents: Tensor) -> bytes | None:
    """Float16, row-major; None for latents that are not finite in it."""
    half = latents.to("cpu", torch.float16)
    return half.contiguous().numpy().tobytes() if half.isfinite().all() else None


def _put_sound(clips: Sequence[Decoded], rows: list[dict[str, Any]], makers: Makers, recipe: Recipe) -> None:
    """Each shot's sound is encoded alone, as its frames are."""
    shots = len(clips[0].bucket.alone)
    parts: list[list[Tensor | None]] = []
    for shot in range(shots):
        heard = [None if clip.tracks.sound is None else clip.tracks.sound[shot] for clip in clips]
        parts.append(_encode_sounds(heard, makers, recipe))
    for row, latents in zip(rows, zip(*parts, strict=True), strict=True):
        found = [part for part in latents if part is not None]
        row["sound"] = as_half(torch.cat(found)) if found else b""
        row["sound_latents"] = [len(part) for part in found]


def _encode_sounds(sounds: Sequence[Tensor | None], makers: Makers, recipe: Recipe) -> list[Tensor | None]:
    """(T, C) of each; None of none."""
    assert makers.audio is not None
    latents: list[Tensor | None] = [None] * len(sounds)
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, sound_SN in enumerate(sounds):
        if sound_SN is not None:
            groups[tuple(sound_SN.shape)].append(i)
    for members in groups.values():
        sound_BSN = torch.stack([sound for i in members if (sound := sounds[i]) is not None])
        found_BTC = makers.audio.encode(sound_BSN, recipe.audio.sample_rate)
        for i, found_TC in zip(members, found_BTC, strict=True):
            latents[i] = found_TC
    return latents


def _put_references(clips: Sequence[Decoded], rows: list[dict[str, Any]], makers: Makers) -> None:
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, (row, clip) in enumerate(zip(rows, clips, strict=True)):
        row |= {"reference": b"", "reference_grid": []}
        if clip.tracks.reference_PHW3 is not None:
            groups[tuple(clip.tracks.reference_PHW3.shape)].append(i)
    for members in groups.values():
        assert makers.tokenizer is not None
        pixels = [video for i in members if (video := clips[i].tracks.reference_PHW3) is not None]
        found_BFhwC = makers.tokenizer.encode(torch.stack(pixels))
        for i, found_FhwC in zip(members, found_BFhwC, strict=True):
            rows[i] |= {"reference": as_half(found_FhwC), "reference_grid": list(found_FhwC.shape[:3])}
