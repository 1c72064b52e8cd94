"""What a request brings, as tokens: every condition's clip, encoded where it stands.

A source need not be as long as the clip: it is laid where its condition gives something, and the frames
around it are filled with their nearest neighbour, so that a tokenizer which looks back sees a still start and
not nothing. Only tokens that are given are taken of what it makes.

Shapes: B batch, P pixel frames, H x W pixels, F token frames, S cells of a frame, C channels of a token; h x
w latent cells; Z sound channels, M samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from motionloom.config.conditions import Keyframes, Suffix
from motionloom.errors import UserError
from motionloom.nn.patching import patchify
from motionloom.plans import Conditions, Geometry, Kind, Sample, Values, region
from motionloom.plans.conditions import SLACK, Draws, frame_at
from motionloom.tokenizers import Tokenizer, encode_scenes, scene_sound
from motionloom.tokenizers.audio import AudioTokenizer

_NO_SOUND = "sound is given, and this model has no audio tokenizer: train with audio.enabled"


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
    pairs = list(zip(conditions.all, sources, strict=True))
    for condition, source in pairs:
        if condition.type == "reference":
            for m in _brought(condition, source, sample):
                references.setdefault(m, []).append(encode_reference(coders, source, m).to(device))
    # What holds is written last.
    for condition, source in sorted(pairs, key=lambda pair: Kind(pair[0].strength, 1 - pair[0].noise)):
        for m in _brought(condition, source, sample) if condition.type != "reference" else ():
            where_BFS = region(condition, sample, m, Draws(None, sample.batch, device))
            x_BFSC = _encode(coders, condition, source, sample, where_BFS, shots, m)
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
    wanted = [m for m in sample.tracks if condition.modality in ("all", m)]
    has = {"video": source.video_BPHW3 is not None, "audio": source.sound_BZM is not None}
    for m in wanted:
        if not has[m]:
            what = "pixels" if m == "video" else "sound"
            other = next((other for other in wanted if has[other]), "")
            less = f", or set its modality to {other}" if condition.modality == "all" and other else ""
            raise UserError(f"{condition.type}: its source has no {what}: name one that has{less}")
    return wanted


def _encode(
    coders: Coders,
    condition: Any,
    source: Source,
    sample: Sample,
    where_BFS: Tensor,
    shots: Sequence[int],
    modality: str,
) -> Tensor:
    """(B, F, S, C): the source in its place; anything elsewhere."""
    geometry = sample.tracks[modality]
    if modality == "audio":
        return _sound_in_place(coders, condition, source, sample, where_BFS, shots)
    pixels_BPHW3 = source.video_BPHW3
    assert pixels_BPHW3 is not None
    _check_size(condition.type, pixels_BPHW3, geometry)
    total = sum(shots)
    if pixels_BPHW3.shape[1] != total:
        ends = pixel_ends(coders, shots)
        frames = [range(*ends_of) for ends_of in pairwise([0, *ends])]
        given = [part for part, given in zip(frames, where_BFS.any(dim=2).any(dim=0), strict=True) if given]
        brought = pixels_BPHW3.shape[1]
        if isinstance(condition, Keyframes) and brought > 1:
            at = _pictures(condition, brought, geometry, frames)
        else:
            at = _in_a_row(condition, brought, given)
        pixels_BPHW3 = pixels_BPHW3[:, _laid_out(at, total)]
    return patchify(encode_scenes(coders.video, pixels_BPHW3, shots), coders.patch)


def pixel_ends(coders: Coders, shots: Sequence[int]) -> list[int]:
    """The pixel frame at which each token frame ends."""
    spec, step = coders.video.spec, coders.patch[0]
    ends, begin = [], 0
    for shot in shots:
        latents = spec.latent_grid(shot, spec.spatial, spec.spatial)[0]
        ends += [begin + spec.pixel_frames(n) for n in range(1, latents + 1)]
        begin += shot
    return ends[step - 1 :: step]


def _in_a_row(condition: Any, brought: int, given: list[range]) -> dict[int, int]:
    """The frame of the source that stands at each given pixel frame: they follow each other."""
    places = [frame for part in given for frame in part]
    if brought == 1:
        return dict.fromkeys(places, 0)
    if brought < len(places):
        raise UserError(
            f"{condition.type}: its source has {brought} frames and {len(places)} are given of the clip: "
            "bring more, or give less"
        )
    first = brought - len(places) if isinstance(condition, Suffix) else 0
    return {place: first + i for i, place in enumerate(places)}


def _pictures(condition: Keyframes, brought: int, geometry: Geometry, frames: list[range]) -> dict[int, int]:
    """As :func:`_in_a_row`, of pictures that stand still in the token frames of their times."""
    if brought != len(condition.times):
        raise UserError(f"keyframes: {len(condition.times)} times and {brought} pictures: give one for each")
    at: dict[int, int] = {}
    for picture, time in enumerate(condition.times):
        (frame,) = frame_at(geometry, time)[0].nonzero().flatten().tolist()
        if frames[frame][0] in at:
            raise UserError(f"keyframes: {time:g} s is in the same token frame as another: keep one of them")
        at |= dict.fromkeys(frames[frame], picture)
    return at


def _laid_out(at: Mapping[int, int], total: int) -> Tensor:
    """For each pixel frame of the clip, the frame of the source that stands there or nearest, (P,)."""
    if not at:
        return torch.zeros(total, dtype=torch.long)
    places = torch.tensor(sorted(at))
    nearest = (torch.arange(total)[:, None] - places).abs().argmin(dim=1)
    return torch.tensor([at[place] for place in places.tolist()])[nearest]


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
        raise UserError(_NO_SOUND)
    assert source.sound_BZM is not None
    return coders.audio.encode(source.sound_BZM, source.sample_rate)[:, :, None]


def _sound_in_place(
    coders: Coders, condition: Any, source: Source, sample: Sample, where_BFS: Tensor, shots: Sequence[int]
) -> Tensor:
    """(B, T, 1, C): the sound of each shot, coded alone and begun with its frames, as training had it."""
    if coders.audio is None:
        raise UserError(_NO_SOUND)
    assert source.sound_BZM is not None
    assert sample.fps is not None
    per_frame, length = source.sample_rate / sample.fps, source.sound_BZM.shape[-1]
    ends = [round(sum(shots[: n + 1]) * per_frame) for n in range(len(shots))]
    # A suffix may bring its end alone; all else begins with the clip.
    begin = max(ends[-1] - length, 0) if isinstance(condition, Suffix) else 0
    _check_length(condition.type, source, sample, where_BFS, begin)
    sound_BZM = as_long(torch.nn.functional.pad(source.sound_BZM, (begin, 0)), ends[-1])
    parts = [
        _sound_tokens(coders, replace(source, sound_BZM=sound_BZM[..., slice(*bounds)]))
        for bounds in pairwise([0, *ends])
    ]
    counts, _, _ = scene_sound(coders.audio.spec, shots, sample.fps)
    return torch.cat([_resized(part, n) for part, n in zip(parts, counts, strict=True)], dim=1)


def _check_length(kind: str, source: Source, sample: Sample, where_BFS: Tensor, begin: int) -> None:
    """Refuses sound that is shorter than what is given of it; half a latent may be missing."""
    assert source.sound_BZM is not None
    span_BT2 = sample.tracks["audio"].span_BF2
    assert span_BT2 is not None
    span_T2 = span_BT2[0][where_BFS.any(dim=2).any(dim=0)].cpu()
    first, last = float(span_T2[:, 0].min()), float(span_T2[:, 1].max())
    slack, seconds = 0.5 * float(span_T2.diff(dim=1).max()) + SLACK, source.sound_BZM.shape[-1]
    if (begin + seconds) / source.sample_rate < last - slack or first < begin / source.sample_rate - slack:
        raise UserError(
            f"{kind}: its source has {seconds / source.sample_rate:g} s of sound, which do not fill what is "
            f"given, {first:g} to {last:g} s of the clip: bring more, or give less"
        )


def as_long(sound_BZM: Tensor, samples: int) -> Tensor:
    """Cut at the end, or silence put there."""
    return torch.nn.functional.pad(sound_BZM, (0, samples - sound_BZM.shape[-1]))


def _resized(x_BFSC: Tensor, frames: int) -> Tensor:
    """Cut, or filled with its last frame."""
    index_F = torch.arange(frames, device=x_BFSC.device).clamp_max(x_BFSC.shape[1] - 1)
    return x_BFSC[:, index_F]


def _nothing(coders: Coders, geometry: Geometry, modality: str) -> Tensor:
    if modality == "audio":
        assert coders.audio is not None
        channels = coders.audio.spec.channels
    else:
        channels = coders.video.spec.channels * coders.patch[0] * coders.patch[1] * coders.patch[2]
    return torch.zeros(geometry.batch, geometry.grid[0], geometry.cells, channels, device=geometry.device)
