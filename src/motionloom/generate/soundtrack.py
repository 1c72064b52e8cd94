"""The sound of a stream, decoded chunk by chunk.

A chunk's latents are decoded behind those before it, whose sound leads into theirs. A decoder may choose its
phases anew, so that the last moments are held back and crossfaded into what the next chunk makes of them.
Where a decoder hears no further than ``CONTEXT`` back and nothing ahead, that is the sound of all latents at
once.

Shapes: T latents, C channels of a latent, Z channels of sound, M samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from motionloom.tokenizers.audio import AudioTokenizer

CONTEXT = 0.5
"""Seconds of the past that are decoded again before a chunk."""
FADE = 0.01
"""Seconds that are held back."""


@dataclass(frozen=True)
class Heard:
    """What the next chunk's sound goes on from. Nobody writes to it, so an older one can be gone back to."""

    latents_TC: Tensor
    """The last ones."""
    tail_ZM: Tensor
    """Held back."""


class Soundtrack:
    """See the top of this file."""

    def __init__(self, tokenizer: AudioTokenizer, device: torch.device) -> None:
        self._tokenizer, self._spec = tokenizer, tokenizer.spec
        silent_TC = torch.zeros(0, self._spec.channels, device=device)
        some_BZM, self.rate = tokenizer.decode(torch.zeros(1, 2, self._spec.channels, device=device))
        self.heard = Heard(silent_TC, torch.zeros(some_BZM.shape[1], 0))
        """So far. Put back to go back."""

    def add(self, latents_TC: Tensor) -> Tensor:
        """A chunk's latents -> the sound that is decided now, (Z, M) float32 on the CPU."""
        before_TC, tail_ZM = self.heard.latents_TC, self.heard.tail_ZM
        if not len(latents_TC):
            return tail_ZM[:, :0]
        whole_TC = torch.cat([before_TC, latents_TC])
        sound_BZM, _ = self._tokenizer.decode(whole_TC[None])
        begin, end = self._samples(len(before_TC)), self._samples(len(whole_TC))
        new_ZM = sound_BZM[0, :, begin - tail_ZM.shape[1] : end].float().cpu()
        new_ZM = _crossfaded(tail_ZM, new_ZM)
        held = min(round(FADE * self.rate), end - self._samples(len(whole_TC) - 1))
        keep = max(1, round(CONTEXT * self._spec.latents_per_second))
        self.heard = Heard(whole_TC[-keep:], new_ZM[:, new_ZM.shape[1] - held :])
        return new_ZM[:, : new_ZM.shape[1] - held]

    def _samples(self, latents: int) -> int:
        """Samples of so many latents."""
        if not latents:
            return 0
        return round(self._spec.frames(latents) * self._spec.hop * self.rate / self._spec.sample_rate)


def _crossfaded(tail_ZM: Tensor, new_ZM: Tensor) -> Tensor:
    """The second, into which the first leads."""
    length = tail_ZM.shape[1]
    mixed_ZM = torch.lerp(tail_ZM, new_ZM[:, :length], torch.linspace(0, 1, length))
    return torch.cat([mixed_ZM, new_ZM[:, length:]], dim=1)
