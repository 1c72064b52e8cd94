"""The audio tokenizer protocol: sound in, normalised latents out, and back.

Shapes: B batch, S sound channels, N samples, T latents, C channels of a latent.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class AudioTokenizerSpec:
    """The shape rule of an audio tokenizer, and the only place where its latents become seconds."""

    channels: int
    """Numbers in one latent."""
    sample_rate: int
    """Hz at which sound is looked at."""
    hop: int
    """Samples from one spectrogram frame to the next."""
    temporal: int
    """Spectrogram frames in a latent; the first latent holds one."""

    @property
    def latents_per_second(self) -> float:
        """25 for LTX-2."""
        return self.sample_rate / (self.hop * self.temporal)

    def latents(self, seconds: float) -> int:
        """How many latents stand for so much sound; at least one."""
        return max(1, round(seconds * self.latents_per_second))

    def frames(self, latents: int) -> int:
        """Spectrogram frames that so many latents hold."""
        return self.temporal * (latents - 1) + 1

    def seconds(self, latents: int) -> Tensor:
        """Centre of each latent in seconds from the sound's start, (T,) float32.

        Rounded once, from float64. diffusers reckons the same centres in float32 step by step and is further
        off (over five minutes 2.4e-5 s, here 1.5e-5 s), which LTX-2's fast rotary frequencies show: for a
        minute of sound a tiny random model's audio differs by 3e-5 from diffusers', and by 3e-7 from
        diffusers' given these centres.
        """
        end = 1 + self.temporal * torch.arange(latents, dtype=torch.float64)
        begin = (end - self.temporal).clamp_min(0)
        return ((begin + end) / 2 * self.hop / self.sample_rate).float()


class AudioTokenizer(Protocol):
    """Sound <-> latents. Implementations are deterministic: equal sounds give equal latents."""

    spec: AudioTokenizerSpec

    def encode(self, sound_BSN: Tensor, sample_rate: int) -> Tensor:
        """Sound (B, 1 or 2, N) in [-1, 1] -> float32 (B, T, C), per channel mean 0 and deviation 1."""
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
