"""The audio tokenizer protocol: sound in, normalised latents out, and back.

Shapes: B batch, S sound channels, N samples, T latents, C channels of a latent.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from motionloom.config.recipe import AudioConfig

_LTX2_FRAMES = 4
"""Spectrogram frames in a latent of LTX-2's audio VAE (arXiv 2601.03233)."""


@dataclass(frozen=True)
class AudioTokenizerSpec:
    """The shape rule of an audio tokenizer, and the only place where its latents become seconds.

    Latents stand side by side, each for ``hop x temporal`` samples. With ``first_alone`` the first holds one
    spectrogram frame only, and the others follow on it (LTX-2, whose encoder looks back only).
    """

    channels: int
    """Numbers in one latent."""
    sample_rate: int
    """Hz at which sound is looked at."""
    hop: int
    """Samples from one spectrogram frame to the next."""
    temporal: int
    """Spectrogram frames in a latent."""
    first_alone: bool = True
    """Whether the first latent holds one frame instead of ``temporal``."""

    @staticmethod
    def of(config: AudioConfig) -> AudioTokenizerSpec:
        """The spec of the tokenizer that a recipe describes, before there is one."""
        samples = config.sample_rate / config.latents_per_second
        if config.type == "ltx2_audio":
            return AudioTokenizerSpec(
                config.channels, config.sample_rate, round(samples / _LTX2_FRAMES), _LTX2_FRAMES
            )
        return AudioTokenizerSpec(config.channels, config.sample_rate, round(samples), 1, first_alone=False)

    @property
    def latents_per_second(self) -> float:
        """25 for LTX-2."""
        return self.sample_rate / (self.hop * self.temporal)

    def latents(self, seconds: float) -> int:
        """How many latents stand for so much sound; at least one."""
        return max(1, round(seconds * self.latents_per_second))

    def frames(self, latents: int) -> int:
        """Spectrogram frames that so many latents hold."""
        return self.temporal * (latents - 1) + (1 if self.first_alone else self.temporal)

    def spans(self, latents: int) -> Tensor:
        """Beginning and end of each latent in seconds from the sound's start, (T, 2) float32."""
        return self._spans(latents).float()

    def seconds(self, latents: int) -> Tensor:
        """Centre of each latent in seconds from the sound's start, (T,) float32.

        Rounded once, from float64. diffusers reckons the same centres in float32 step by step and is further
        off (over five minutes 2.4e-5 s, here 1.5e-5 s), which LTX-2's fast rotary frequencies show: for a
        minute of sound a tiny random model's audio differs by 3e-5 from diffusers', and by 3e-7 from
        diffusers' given these centres.
        """
        return self._spans(latents).mean(dim=1).float()

    def _spans(self, latents: int) -> Tensor:
        """:meth:`spans` in float64."""
        end = self.frames(1) + self.temporal * torch.arange(latents, dtype=torch.float64)
        begin = (end - self.temporal).clamp_min(0)
        return torch.stack([begin, end], dim=1) * self.hop / self.sample_rate


class AudioTokenizer(Protocol):
    """Sound <-> latents. Implementations are deterministic: equal sounds give equal latents."""

    spec: AudioTokenizerSpec

    def encode(self, sound_BSN: Tensor, sample_rate: int) -> Tensor:
        """Sound (B, 1 or 2, N) in [-1, 1] -> float32 (B, T, C), T = ``spec.latents`` of its length."""
        ...

    def decode(self, latents_BTC: Tensor) -> tuple[Tensor, int]:
        """Latents -> sound (B, S, N) float32 in [-1, 1], and its samples per second."""
        ...

    def fingerprint(self) -> str:
        """Hex digest of all that decides latents and sound: weights, statistics, settings."""
        ...

    def save(self, folder: Path) -> None:
        """Write everything that ``load_audio_tokenizer`` needs."""
        ...
