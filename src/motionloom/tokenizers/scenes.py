"""Clips of several shots, shot by shot: nothing of one shot reaches the latents or the pixels of another.

A causal VAE mixes the frames before a cut into those after it. So every shot is coded as a clip of its own,
with a first frame of its own, and the results are laid end to end (Mask²DiT, arXiv 2503.19881, section 3.1).

Shapes: B batch, P pixel frames of all shots, F latent frames of all shots.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from motionloom.tokenizers.audio import AudioTokenizerSpec
from motionloom.tokenizers.base import Tokenizer, TokenizerSpec


def scene_latents(spec: TokenizerSpec, scene_frames: Sequence[int]) -> list[int]:
    """Latent frames of each shot, from its pixel frames.

    Raises:
        UserError: a shot's length is none that the tokenizer can make; the nearest ones are named.
    """
    return [spec.latent_grid(frames, spec.spatial, spec.spatial)[0] for frames in scene_frames]


def scene_seconds(spec: TokenizerSpec, scene_frames: Sequence[int], fps: float) -> Tensor:
    """Centre of each latent frame in seconds from the clip's start, shots end to end, (F,) float32."""
    parts, begin = [], 0
    for frames, latents in zip(scene_frames, scene_latents(spec, scene_frames), strict=True):
        parts.append(spec.seconds(latents, fps) + begin / fps)
        begin += frames
    return torch.cat(parts)


def scene_spans(spec: TokenizerSpec, scene_frames: Sequence[int], fps: float) -> Tensor:
    """Beginning and end of each latent frame in seconds from the clip's start, (F, 2) float32."""
    parts, begin = [], 0
    for frames, latents in zip(scene_frames, scene_latents(spec, scene_frames), strict=True):
        parts.append(spec.spans(latents, fps) + begin / fps)
        begin += frames
    return torch.cat(parts)


def scene_sound(
    spec: AudioTokenizerSpec, scene_frames: Sequence[float], fps: float
) -> tuple[list[int], Tensor, Tensor]:
    """The sound of the same shots, each encoded alone as its frames are and begun with them.

    Returns latents per shot; the centre of each latent (T,) and its beginning and end (T, 2) in seconds from
    the clip's start, float32.
    """
    counts = [spec.latents(frames / fps) for frames in scene_frames]
    begins = [sum(scene_frames[:shot]) / fps for shot in range(len(scene_frames))]
    seconds = [spec.seconds(n) + begin for n, begin in zip(counts, begins, strict=True)]
    spans = [spec.spans(n) + begin for n, begin in zip(counts, begins, strict=True)]
    return counts, torch.cat(seconds), torch.cat(spans)


def encode_scenes(tokenizer: Tokenizer, video_BPHW3: Tensor, scene_frames: Sequence[int]) -> Tensor:
    """uint8 (B, P, H, W, 3) -> float32 (B, F, h, w, C), each shot alone.

    Args:
        scene_frames: pixel frames of each shot; their sum is P.

    Raises:
        UserError: as ``Tokenizer.encode``, for any shot.
    """
    shots = video_BPHW3.split(list(scene_frames), dim=1)
    return torch.cat([tokenizer.encode(shot) for shot in shots], dim=1)


def decode_scenes(tokenizer: Tokenizer, latents_BFhwC: Tensor, scene_frames: Sequence[int]) -> Tensor:
    """Latents of :func:`encode_scenes` -> uint8 (B, P, H, W, 3), each shot alone.

    Args:
        scene_frames: pixel frames of each shot, as for encoding.

    Raises:
        UserError: a shot's length is none that the tokenizer can make.
    """
    shots = latents_BFhwC.split(scene_latents(tokenizer.spec, scene_frames), dim=1)
    return torch.cat([tokenizer.decode(shot) for shot in shots], dim=1)


@lru_cache(maxsize=4096)
def latent_scenes(spec: TokenizerSpec, scene_frames: tuple[int, ...]) -> tuple[int, ...]:
    """The shot of each latent frame of a clip encoded as a whole: that of its middle pixel frame."""
    shot_of_pixel = [shot for shot, frames in enumerate(scene_frames) for _ in range(frames)]
    latent_frames = spec.latent_grid(len(shot_of_pixel), spec.spatial, spec.spatial)[0]
    ends = [spec.pixel_frames(f + 1) for f in range(latent_frames)]
    begins = [0, *ends[:-1]]
    return tuple(shot_of_pixel[(begin + end) // 2] for begin, end in zip(begins, ends, strict=True))
