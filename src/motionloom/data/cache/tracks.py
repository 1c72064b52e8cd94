"""What stands beside the frames of a clip: its sound, its reference, its mask, read in step with them.

Shapes: P pixel frames, H x W pixels; S sound channels, N samples; F latent frames, h x w latent cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from motionloom.config.recipe import Recipe
from motionloom.data.buckets import Bucket, cached_fps, whole_frames
from motionloom.data.cache.identity import asked_spec
from motionloom.data.cache.masks import latent_mask
from motionloom.data.manifest import ManifestEntry
from motionloom.data.media import (
    VIDEO_SUFFIXES,
    MediaError,
    MediaInfo,
    is_sound,
    probe,
    read_clip,
    read_sound,
)

_GIVEN = 127  # what is brighter is white: codecs and resampling leave neither quite black nor quite white


@dataclass(frozen=True)
class Shot:
    """Frames that are encoded as a clip of their own: a whole clip, or one shot of a story."""

    path: Path
    begin: float
    """Seconds on the file's own clock."""
    frames: int


@dataclass(frozen=True)
class Tracks:
    """All that a recipe asks for beside the frames; None where a clip has none."""

    sound: tuple[Tensor, ...] | None = None
    """(S, N) float32 of each shot, exactly as long as its frames."""
    sound_ends_early: bool = False
    """By more than a latent; silence follows."""
    reference_PHW3: Tensor | None = None
    reference_sound_SN: Tensor | None = None
    mask_Fhw: Tensor | None = None
    """Bool, True where a latent cell is given."""


NO_TRACKS = Tracks()


def tracks_of(recipe: Recipe) -> tuple[str, ...]:
    """Which files beside a clip the recipe reads, of `manifest.BESIDE`."""
    asked = {
        "audio": recipe.audio.enabled,
        "reference": recipe.references.enabled,
        "mask": recipe.masks.enabled,
    }
    return tuple(name for name, wanted in asked.items() if wanted)


def read_tracks(
    recipe: Recipe,
    entry: ManifestEntry,
    bucket: Bucket,
    shots: Sequence[Shot],
    offset: tuple[float, float] = (0.5, 0.5),
) -> Tracks:
    """The tracks of one crop of a clip.

    Args:
        offset: where the crop sits in the overhang: that of the frames.

    Raises:
        MediaError: a file beside the clip cannot be used; the clip is then skipped, not taken without it.
    """
    sound, early = _sound(recipe, entry, shots) if recipe.audio.enabled else (None, False)
    pixels = heard = mask = None
    if recipe.references.enabled and entry.reference is not None:
        pixels, heard = _reference(recipe, entry, entry.reference, bucket, shots, offset)
    if recipe.masks.enabled and entry.mask is not None and not bucket.is_sound:
        mask = _mask(recipe, entry, entry.mask, bucket, shots, offset)
    return Tracks(sound, early, pixels, heard, mask)


# Sound


def _sound(
    recipe: Recipe, entry: ManifestEntry, shots: Sequence[Shot]
) -> tuple[tuple[Tensor, ...] | None, bool]:
    """The sound of each shot, or None for a silent clip; and whether it ends before the picture."""
    found = [_sound_of(recipe, entry, shot) for shot in shots]
    if all(piece is None for piece in found):
        return None, False
    rate, pieces, early = recipe.audio.sample_rate, [], False
    for piece, shot in zip(found, shots, strict=True):
        heard = np.zeros((1, 0), np.float32) if piece is None else piece
        lacks = round(shot.frames / cached_fps(recipe) * rate) - heard.shape[1]
        early |= lacks > rate / recipe.audio.latents_per_second
        pieces.append(torch.from_numpy(np.pad(heard, ((0, 0), (0, lacks)))))
    return tuple(pieces), early


def _sound_of(recipe: Recipe, entry: ManifestEntry, shot: Shot) -> np.ndarray | None:
    """What there is of a shot's sound; None where the file has no track."""
    path = entry.audio or shot.path
    if entry.audio is None and not (is_sound(path) or path.suffix.lower() in VIDEO_SUFFIXES):
        return None
    seconds = shot.frames / cached_fps(recipe)
    try:
        return read_sound(path, recipe.audio.sample_rate, start=shot.begin, seconds=seconds)
    except MediaError as error:
        if error.kind == "no sound" and entry.audio is None:
            return None
        raise


# References


def _reference(
    recipe: Recipe,
    entry: ManifestEntry,
    path: Path,
    bucket: Bucket,
    shots: Sequence[Shot],
    offset: tuple[float, float],
) -> tuple[Tensor | None, Tensor | None]:
    """(pixels, sound) of a reference: of a sound file the one, of a silent clip the other."""
    if is_sound(path):
        if not recipe.references.audio:
            what, fix = f"its reference {path} is a sound", "set references.audio to true"
            raise MediaError(entry.id, what, fix, "bad reference")
        return None, _reference_sound(recipe, entry, path, shots)
    if bucket.is_sound:
        what, fix = f"is sound, and its reference {path} is not", "name a sound file as its reference"
        raise MediaError(entry.id, what, fix, "bad reference")
    heard = None
    if recipe.references.audio and path.suffix.lower() in VIDEO_SUFFIXES:
        heard = _reference_sound(recipe, entry, path, shots)
    return _reference_pixels(recipe, entry, path, bucket, shots, offset), heard


def _begins(entry: ManifestEntry, shots: Sequence[Shot]) -> list[float]:
    """Where each shot begins on the clock of the reference: that of the clip's file, and of scenes of several
    files their own, end to end."""
    if not entry.of_several_files:
        return [shot.begin for shot in shots]
    lasts = [scene.end - scene.start for scene in entry.scenes]
    return [sum(lasts[:number]) for number in range(len(shots))]


def _reference_pixels(
    recipe: Recipe,
    entry: ManifestEntry,
    path: Path,
    bucket: Bucket,
    shots: Sequence[Shot],
    offset: tuple[float, float],
) -> Tensor:
    """Every ``frame_stride``-th moment of the clip, as far as the reference goes; a still is held.

    Shots lose what fills no latent frame: the reference loses it with them.
    """
    down, stride = recipe.references.downscale, recipe.references.frame_stride
    fps = cached_fps(recipe)
    picture = probe(path, fps=entry.fps).kind == "image"
    seen: list[Tensor] = []
    before = 0
    for shot, begin in zip(shots, _begins(entry, shots), strict=True):
        late = -before % stride  # frames from the shot's first to the first moment that is taken
        before += shot.frames
        if (count := math.ceil((shot.frames - late) / stride)) <= 0:
            continue
        try:
            read = read_clip(
                path,
                start=begin + late / fps,
                frames=count,
                fps=fps / stride,
                size=(bucket.height // down, bucket.width // down),
                crop=offset,
                background=recipe.preprocess.background,
                source_fps=entry.fps,
                short="trim",
            )
        except MediaError as error:
            if seen and error.kind == "start after the end":
                break
            raise
        seen.append(torch.from_numpy(read.video_FHW3))
        if picture or len(read.video_FHW3) < count:
            break
    return _filling(recipe, entry, path, torch.cat(seen))


def _filling(recipe: Recipe, entry: ManifestEntry, path: Path, pixels_PHW3: Tensor) -> Tensor:
    """As many frames of a reference as fill latent frames."""
    spec, patch = asked_spec(recipe), recipe.model.patch[0]
    has, needs = len(pixels_PHW3), spec.pixel_frames(patch)
    if has == 1 and needs > 1:
        return pixels_PHW3.repeat(needs, 1, 1, 1)
    whole = whole_frames(spec, has, patch)
    if not whole:
        rate = cached_fps(recipe) / recipe.references.frame_stride
        what = f"its reference {path} is too short: {has} of {needs} frames at {rate:g} a second"
        raise MediaError(entry.id, what, "name a longer one, or a picture", "bad reference")
    return pixels_PHW3[:whole]


def _reference_sound(
    recipe: Recipe, entry: ManifestEntry, path: Path, shots: Sequence[Shot]
) -> Tensor | None:
    """As much of a reference's sound as the clip lasts, in step with its shots; None for a silent one."""
    rate, fps = recipe.audio.sample_rate, cached_fps(recipe)
    parts: list[np.ndarray] = []
    for shot, begin in zip(shots, _begins(entry, shots), strict=True):
        try:
            part_SN = read_sound(path, rate, start=begin, seconds=shot.frames / fps)
        except MediaError as error:
            if error.kind == "no sound" and not is_sound(path):
                return None
            raise
        if part_SN.shape[1]:
            parts.append(part_SN)
        if part_SN.shape[1] < round(shot.frames / fps * rate):
            break
    sound = np.concatenate(parts, axis=1) if parts else np.zeros((1, 0), np.float32)
    if sound.shape[1] < rate / recipe.audio.latents_per_second:
        what = f"the sound of its reference {path} is shorter than a latent"
        raise MediaError(entry.id, what, "name a longer one", "bad reference")
    return torch.from_numpy(sound)


# Masks


def _mask(
    recipe: Recipe,
    entry: ManifestEntry,
    path: Path,
    bucket: Bucket,
    shots: Sequence[Shot],
    offset: tuple[float, float],
) -> Tensor:
    """The mask in latent cells, brought to the crop exactly as the frames were."""
    picture = _require_fit(entry, path)
    given: list[Tensor] = []
    for shot in shots:
        read = read_clip(
            path,
            start=shot.begin,
            frames=1 if picture else shot.frames,
            fps=cached_fps(recipe),
            size=(bucket.height, bucket.width),
            crop=offset,
            background=(0, 0, 0),
            source_fps=entry.fps,
            short="trim",
        )
        has = len(read.video_FHW3)
        if not picture and has < shot.frames:
            what = f"its mask {path} has {has} frames where the clip has {shot.frames}"
            raise MediaError(entry.id, what, "make both equally long, or give one picture", "bad mask")
        white_PHW = torch.from_numpy(read.video_FHW3).float().mean(dim=3) > _GIVEN
        given.append(white_PHW.expand(shot.frames, -1, -1))
    return latent_mask(torch.cat(given), asked_spec(recipe), [shot.frames for shot in shots])


def _require_fit(entry: ManifestEntry, path: Path) -> bool:
    """Whether the mask is a single picture. Raises `MediaError` for one that would have to be stretched."""
    mask, clip = probe(path, fps=entry.fps), probe(entry.path, fps=entry.fps)
    picture = mask.kind == "image"
    # A picture of the clip's shape covers it at any scale.
    off = abs(mask.width * mask.pixel_aspect / mask.height * clip.height - clip.width * clip.pixel_aspect)
    if off >= 1 if picture else (mask.width, mask.height) != (clip.width, clip.height):
        sizes = f"{mask.width}x{mask.height} and the clip {clip.width}x{clip.height}"
        fix = "scale the mask to the clip's size"
        raise MediaError(entry.id, f"its mask {path} has {sizes}", fix, "bad mask")
    if not picture and _lengths_differ(mask, clip):
        lengths = f"lasts {mask.duration:g} s ({mask.frames} frames)"
        what = f"its mask {path} {lengths} and the clip {clip.duration:g} s ({clip.frames})"
        raise MediaError(entry.id, what, "make both equally long, or give one picture", "bad mask")
    return picture


def _lengths_differ(mask: MediaInfo, clip: MediaInfo) -> bool:
    if mask.frames_exact and clip.frames_exact and math.isclose(mask.fps, clip.fps, rel_tol=1e-3):
        return mask.frames != clip.frames
    return abs(mask.duration - clip.duration) > 0.05 + 0.01 * clip.duration  # headers round
