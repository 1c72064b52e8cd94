"""The sound of a stream, decoded chunk by chunk.

A chunk's latents are decoded behind those before it, whose sound leads into theirs. A decoder may choose its
phases anew, so that the last moments are held back and crossfaded into what the next chunk makes of them.

Shapes: T latents, C channels of a latent, Z channels of sound, M samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from motionloom.generate.model import Model
from motionloom.plans import Geometry
from motionloom.tokenizers.audio import AudioTokenizer

CONTEXT = 0.5
"""Seconds of the past that are decoded again before a chunk."""
FADE = 0.01
"""Seconds that are held back."""


@dataclass
class Soundtrack:
    """See the top of this file."""

    tokenizer: AudioTokenizer
    rate: int
    _latents_TC: Tensor | None = None
    """What was decoded last."""
    _tail_ZM: Tensor | None = None
    """Held back."""
    _ready: list[Tensor] = field(default_factory=list)

    @staticmethod
    def of(model: Model, fps: float) -> Soundtrack | None:
        """Of a model that makes sound; None of another."""
        if "audio" not in model.modalities:
            return None
        assert model.audio_tokenizer is not None
        spec = model.audio_tokenizer.spec
        _, rate = model.audio_tokenizer.decode(torch.zeros(1, 2, spec.channels, device=model.device))
        return Soundtrack(model.audio_tokenizer, rate)

    def add(self, tokens_BFSC: Tensor, geometry: Geometry) -> None:
        """A chunk's sound."""
        latents_TC = tokens_BFSC[0].flatten(0, 1)
        if not len(latents_TC):
            return
        before = self._latents_TC
        known = 0 if before is None else len(before)
        whole_TC = latents_TC if before is None else torch.cat([before, latents_TC])
        sound_BZM, rate = self.tokenizer.decode(whole_TC[None])
        sound_ZM = sound_BZM[0].float().cpu()
        per_latent = sound_ZM.shape[1] / len(whole_TC)
        fade = min(round(FADE * rate), round(per_latent))
        begin = max(0, round(known * per_latent) - (0 if self._tail_ZM is None else self._tail_ZM.shape[1]))
        new_ZM = sound_ZM[:, begin:]
        if self._tail_ZM is not None:
            length = min(self._tail_ZM.shape[1], new_ZM.shape[1])
            rise = torch.linspace(0, 1, length)
            mixed = self._tail_ZM[:, :length] * (1 - rise) + new_ZM[:, :length] * rise
            new_ZM = torch.cat([mixed, new_ZM[:, length:]], dim=1)
        self._ready.append(new_ZM[:, : new_ZM.shape[1] - fade])
        self._tail_ZM = new_ZM[:, new_ZM.shape[1] - fade :]
        keep = max(1, round(CONTEXT * self.tokenizer.spec.latents_per_second))
        self._latents_TC = whole_TC[-keep:]

    def take(self) -> Tensor | None:
        """What is ready; empty where nothing is."""
        if not self._ready:
            return torch.zeros(1 if self._tail_ZM is None else len(self._tail_ZM), 0)
        taken = torch.cat(self._ready, dim=1)
        self._ready.clear()
        return taken

    def begin_again(self, kept: Sequence[tuple[Tensor, Geometry]]) -> None:
        """Behind other chunks than before; of theirs nothing is given out again but what is held back."""
        self._latents_TC = self._tail_ZM = None
        for tokens, geometry in kept:
            self.add(tokens, geometry)
        self._ready.clear()
