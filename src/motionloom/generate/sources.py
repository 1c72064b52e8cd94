"""What a request brings, as tokens: every condition's clip, encoded where it stands.

A source need not be as long as the clip: it is laid where its condition gives something, and the frames
around it are filled with their nearest neighbour, so that a tokenizer which looks back sees a still start and
not nothing. Only tokens that are given are taken of what it makes.

Shapes: B batch, P pixel frames, H x W pixels, F token frames, S cells of a frame, C channels of a token; h x
w latent cells; Z sound channels, M samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from motionloom.config.conditions import Keyframes, Suffix
from motionloom.errors import UserError
from motionloom.nn.patching import patchify
from motionloom.plans import Conditions, Geometry, Kind, Sample, Values, region
from motionloom.plans.conditions import Draws
from motionloom.tokenizers import Tokenizer, encode_scenes
from motionloom.tokenizers.audio import AudioTokenizer


@dataclass(frozen=True)
class Source:
    """The clips that a condition brings, one per sample."""

    video_BPHW3: Tensor | None = None
    """uint8 pixels: of the part that is given, or of the whole clip. P = 1 is a picture, which stands still
    for as long as it is given; keyframes bring one picture per time."""
    sound_BZM: Tensor | None = None
    """float32 in [-1, 1], from the clip's start."""
    sample_rate: int = 0
    mask_BFhw: Tensor | None = None
    """bool, of a mask condition: the latent cells that are given."""


@dataclass(frozen=True)
class Coders:
    """How clips become tokens."""

    video: Tokenizer
    patch: tuple[int, int, int]
    audio: AudioTokenizer | None = None


def source_values(
    coders: Coders, conditions: Conditions, sources: Sequence[Source], sample: Sample, shots: Sequence[int]
) -> Values:
    """Clean tokens of all that is given, on the sample's device; zeros elsewhere.

    Where conditions overlap, the values are those of the one that holds there; of equal ones, of the later.

    Args:
        sources: one per condition.
        shots: pixel frames of each scene.

    Raises:
        UserError: a source of another size, too short, or without the modality that its condition gives.
    """
    device = sample.main.device
    clean = {m: _nothing(coders, geometry, m) for m, geometry in sample.tracks.items()}
    references: dict[str, list[Tensor]] = {}
    pairs = sorted(
        zip(conditions.all, sources, strict=True), key=lambda pair: Kind(pair[0].strength, 1 - pair[0].noise)
    )
    for condition, source in pairs:
        kind: str = condition.type
        for m in _brought(condition, source, sample):
            if kind == "reference":
                references.setdefault(m, []).append(encode_reference(coders, source, m).to(device))
                continue
            where_BFS = region(condition, sample, m, Draws(None, sample.batch, device))
            x_BFSC = _encode(coders, condition, source, sample.tracks[m], where_BFS, shots, m)
            clean[m] = torch.where(where_BFS[..., None], x_BFSC.to(device), clean[m])
    return Values(clean, {m: tuple(found) for m, found in references.items()})


def encode_reference(coders: Coders, source: Source, modality: str) -> Tensor:
    """(B, F, S, C): a reference, alone and at its own size."""
    if modality == "audio":
        return _sound_tokens(coders, source)
    assert source.video_BPHW3 is not None
    return patchify(coders.video.encode(source.video_BPHW3), coders.patch)


def _brought(condition: Any, source: Source, sample: Sample) -> list[str]:
    """The modalities that a condition gives; all of them must be there."""
    wanted = [m for m in (*sample.tracks,) if condition.modality in ("all", m)]
    has = {"video": source.video_BPHW3 is not None, "audio": source.sound_BZM is not None}
    for m in wanted:
        if condition.modality == m and not has[m]:
            what = "pixels" if m == "video" else "sound"
            raise UserError(f"{condition.type}: its source has no {what}: name one that has")
    return [m for m in wanted if has[m]]


def _encode(
    coders: Coders,
    condition: Any,
    source: Source,
    geometry: Geometry,
    where_BFS: Tensor,
    shots: Sequence[int],
    modality: str,
) -> Tensor:
    """(B, F, S, C): the source in its place; anything elsewhere."""
    if modality == "audio":
        return _resized(_sound_tokens(coders, source), geometry.grid[0])
    pixels_BPHW3 = source.video_BPHW3
    assert pixels_BPHW3 is not None
    _check_size(condition.type, pixels_BPHW3, geometry)
    total = sum(shots)
    if pixels_BPHW3.shape[1] != total:
        ends = _pixel_ends(coders, shots)
        given_F = where_BFS[0].any(dim=-1).tolist()
        begins = [0, *ends[:-1]]
        frames = [range(b, e) for b, e, given in zip(begins, ends, given_F, strict=True) if given]
        pixels_BPHW3 = pixels_BPHW3[:, _laid_out(condition, pixels_BPHW3.shape[1], frames, total)]
    return patchify(encode_scenes(coders.video, pixels_BPHW3, shots), coders.patch)


def _pixel_ends(coders: Coders, shots: Sequence[int]) -> list[int]:
    """The pixel frame at which each token frame ends."""
    spec, step = coders.video.spec, coders.patch[0]
    ends, begin = [], 0
    for shot in shots:
        latents = spec.latent_grid(shot, spec.spatial, spec.spatial)[0]
        ends += [begin + spec.pixel_frames(n) for n in range(1, latents + 1)]
        begin += shot
    return ends[step - 1 :: step]


def _laid_out(condition: Any, brought: int, given: list[range], total: int) -> Tensor:
    """For each pixel frame of the clip, the frame of the source that stands there, (P,)."""
    places = [frame for part in given for frame in part]
    if brought == 1:
        return torch.zeros(total, dtype=torch.long)
    if isinstance(condition, Keyframes):
        if brought != len(condition.times):
            raise UserError(
                f"keyframes: {len(condition.times)} times and {brought} pictures: give one for each"
            )
        at = [i for i, part in enumerate(given) for _ in part]
    elif brought < len(places):
        raise UserError(
            f"{condition.type}: its source has {brought} frames and {len(places)} are given of the clip: "
            "bring more, or give less"
        )
    else:
        first = brought - len(places) if isinstance(condition, Suffix) else 0
        at = list(range(first, first + len(places)))
    if not places:
        return torch.zeros(total, dtype=torch.long)
    nearest = (torch.arange(total)[:, None] - torch.tensor(places)).abs().argmin(dim=1)
    return torch.tensor(at)[nearest]


def _check_size(kind: str, pixels_BPHW3: Tensor, geometry: Geometry) -> None:
    needs = [round(p * n) for p, n in zip(geometry.pixels_per_cell, geometry.grid[1:], strict=True)]
    has = list(pixels_BPHW3.shape[2:4])
    if has != needs:
        raise UserError(
            f"{kind}: its source is {has[1]}x{has[0]} pixels, the clip {needs[1]}x{needs[0]}: resize it first"
        )


def _sound_tokens(coders: Coders, source: Source) -> Tensor:
    """(B, T, 1, C)."""
    if coders.audio is None:
        raise UserError("sound is given, and this model has no audio tokenizer: train with audio.enabled")
    assert source.sound_BZM is not None
    return coders.audio.encode(source.sound_BZM, source.sample_rate)[:, :, None]


def _resized(x_BFSC: Tensor, frames: int) -> Tensor:
    """Cut, or filled with its last frame; what lies beyond a source is never given."""
    index_F = torch.arange(frames, device=x_BFSC.device).clamp_max(x_BFSC.shape[1] - 1)
    return x_BFSC[:, index_F]


def _nothing(coders: Coders, geometry: Geometry, modality: str) -> Tensor:
    if modality == "audio":
        assert coders.audio is not None
        channels = coders.audio.spec.channels
    else:
        channels = coders.video.spec.channels * coders.patch[0] * coders.patch[1] * coders.patch[2]
    return torch.zeros(geometry.batch, geometry.grid[0], geometry.cells, channels, device=geometry.device)
