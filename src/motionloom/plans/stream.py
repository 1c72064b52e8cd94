"""Streams: what a backbone is fed. One stream is all tokens of one modality, with everything known of each.

Shapes: B batch, N tokens of the stream, C channels of a token, K distinct noise levels of a sample,
T token frames. A field of batch size 1 holds for the whole batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

MODALITIES = ("text", "video", "audio", "image")
"""Modality names; the index is the value of ``Attributes.modality_BN``."""


@dataclass(frozen=True)
class Attributes:
    """All that a visibility may ask about a token. Each field has shape (B or 1, N).

    ``context_BN`` marks copies that stand in the sequence only to be looked at (the clean half of teacher
    forcing, references); ``cell_BN3`` is the token's (frame, row, column) in the clip.
    """

    modality_BN: Tensor
    scene_BN: Tensor
    chunk_BN: Tensor
    context_BN: Tensor
    cell_BN3: Tensor

    def queries(self) -> Attributes:
        """The same attributes shaped (B, N, 1), to stand against keys."""
        return self._map(lambda t: t.unsqueeze(2))

    def keys(self) -> Attributes:
        """The same attributes shaped (B, 1, N)."""
        return self._map(lambda t: t.unsqueeze(1))

    def _map(self, f) -> Attributes:  # type: ignore[no-untyped-def]
        return Attributes(*(f(getattr(self, name)) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Stream:
    """One modality, ready for a backbone.

    Noise is kept as the few distinct levels of a sample, ``sigma_BK``, and each token's index into them,
    ``level_BN``: a backbone embeds K levels and gathers, instead of embedding N equal numbers.
    """

    modality: str
    grid: tuple[int, int, int]
    """(frames, rows, columns); N = their product, frame-major. Text is (1, 1, N)."""
    x_BNC: Tensor
    """Latents: noisy where sigma > 0, exactly the clean latents where sigma == 0. Text: embeddings."""
    sigma_BK: Tensor
    """Distinct noise levels in [0, 1]."""
    level_BN: Tensor
    """Index of each token's level."""
    position_BN3: Tensor
    """(seconds, pixels down, pixels right) of the token's centre, float32. Sound: seconds only, then 0, 0."""
    cell_BN3: Tensor
    """(frame, row, column) in the clip's grid of tokens, int64: copies of a frame share its cells, and the
    chunks of a stream count on. Backbones that were trained on indices read these, the others positions."""
    scene_BN: Tensor
    """Shot that the token belongs to."""
    chunk_BN: Tensor
    """Causal chunk that the token belongs to."""
    context_BN: Tensor
    """True for copies that only serve to be looked at; their output is not read."""
    loss_BN: Tensor
    """Weight in the loss; 0 for context and given tokens."""
    valid_BN: Tensor | None = None
    """False for padding; None when nothing is padded."""

    @property
    def sigma_BN(self) -> Tensor:
        """The noise level of each token, (B, N)."""
        level_BN = self.level_BN.expand(self.sigma_BK.shape[0], -1)
        return self.sigma_BK.gather(1, level_BN)

    @property
    def attributes(self) -> Attributes:
        """What a visibility may ask, (B or 1, N) each."""
        modality = torch.full_like(self.scene_BN[:1], MODALITIES.index(self.modality))
        return Attributes(modality, self.scene_BN, self.chunk_BN, self.context_BN, self.cell_BN3)


Streams = Mapping[str, Stream]
"""Streams by modality name: ``text``, and at least one of ``video`` and ``audio``."""


def join_attributes(parts: list[Attributes]) -> Attributes:
    """Attributes of several streams laid end to end along N."""
    batch = max(t.shape[0] for part in parts for t in vars(part).values())

    def cat(name: str) -> Tensor:
        tensors = [getattr(part, name) for part in parts]
        return torch.cat([t.expand(batch, *t.shape[1:]) for t in tensors], dim=1)

    return Attributes(*(cat(name) for name in Attributes.__dataclass_fields__))
