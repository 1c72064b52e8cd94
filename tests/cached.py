"""A tiny world of clips on disk and recipes for it, shared by the tests of cache and loader."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from motionloom.config.recipe import Recipe
from motionloom.data.manifest import ManifestEntry
from motionloom.data.media import write_video
from motionloom.rng import numpy_rng

FPS = 8.0


def make_clip(path: Path, key: int, *, frames: int = 8, height: int = 32, width: int = 32) -> Path:
    """A moving gradient, different for every key."""
    phase, slope = numpy_rng("test clip", key).random(2)
    y, x = np.mgrid[:height, :width] / 32
    time = np.arange(frames)[:, None, None] / 8
    red = 0.5 + 0.5 * np.sin(6 * (x * slope + time + phase))
    green = np.broadcast_to(y % 1.0, red.shape)
    blue = 0.5 + 0.5 * np.cos(6 * (y + time * slope))
    pixels = np.stack([red, green, blue], axis=-1)
    return write_video(path, (pixels * 255).astype(np.uint8), FPS)


def make_world(folder: Path, count: int, **shape: int) -> list[ManifestEntry]:
    """``count`` clips with a caption each."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        ManifestEntry(
            f"clip{i:03d}", make_clip(folder / f"clip{i:03d}.mp4", i, **shape), f"a wave number {i}"
        )
        for i in range(count)
    ]


def recipe(**sections) -> Recipe:
    """8 frames of 32 x 32 at 8 frames a second; 2 x 4 x 4 latent cells of 12 channels."""
    base = {
        "seed": 7,
        "num_workers": 2,
        "video": {"width": 32, "height": 32, "fps": FPS, "num_frames": 8},
        "tokenizer": {"latent_f": 8, "latent_t": 4, "latent_d": 12, "fit_clips": 8},
        "text_encoder": {"dim": 16, "vocab_size": 256, "max_length": 6},
        "train": {"batch_size": 4, "heldout_fraction": 0.25},
    }
    merged = {
        name: {**base[name], **value} if name in base and isinstance(value, dict) else value
        for name, value in sections.items()
    }
    return Recipe.model_validate({**base, **merged})
