"""`pixels`: no tokenizer at all. Clips are cached as they are, for the training of one that is.

Shapes: B batch, P pixel frames, H x W pixels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from motionloom.config.recipe import TokenizerConfig
from motionloom.tokenizers.base import TokenizerSpec


class PixelsTokenizer:
    """Latents are pixels in [-1, 1], which half precision holds exactly enough to give each level back."""

    spec = TokenizerSpec(channels=3, spatial=1, temporal=1)

    @staticmethod
    def fit(config: TokenizerConfig, clips: Sequence[Tensor]) -> PixelsTokenizer:
        """There is nothing to fit."""
        return PixelsTokenizer()

    def encode(self, video_BPHW3: Tensor) -> Tensor:
        """uint8 (B, P, H, W, 3) -> float32 of the same shape, in [-1, 1]."""
        return video_BPHW3.float() / 127.5 - 1.0

    def decode(self, latents_BFhwC: Tensor) -> Tensor:
        """float (B, P, H, W, 3) -> uint8."""
        return ((latents_BFhwC + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def stream_decode(self, latents: Iterable[Tensor]) -> Iterator[Tensor]:
        """Chunk by chunk."""
        for chunk in latents:
            yield self.decode(chunk)

    def resume_from(self, latent: int) -> int:
        """Frames stand alone."""
        return latent

    def fingerprint(self) -> str:
        return hashlib.sha256(b"pixels").hexdigest()

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(json.dumps({"type": "pixels"}))

    @staticmethod
    def load(folder: Path, settings: dict[str, Any]) -> PixelsTokenizer:
        """There is nothing to read."""
        return PixelsTokenizer()
