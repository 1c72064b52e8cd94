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
    forcing, references); ``cell_BN3`` is the token's (frame, row, column) in the clip; ``first_BN`` is True
    in the first frame of each scene; ``sample_BN`` tells samples that are packed into one row apart.
    """

    modality_BN: Tensor
    scene_BN: Tensor
    chunk_BN: Tensor
    context_BN: Tensor
    cell_BN3: Tensor
    first_BN: Tensor
    sample_BN: Tensor

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
    """(frames, rows, columns); N = their product, frame-major. Tokens that are no grid (text, packed samples,
    references of another size) are (1, 1, N); sound is (N, 1, 1)."""
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
    extra_BNC: Tensor | None = None
    """Channels that a backbone reads beside the latents, patchified like them: a mask and the latents of a
    given image, for instance. They are neither noised nor answered."""
    first_BN: Tensor | None = None
    """True in the first frame of each scene. None: found from ``grid``, in a stream of whole scenes."""
    sample_BN: Tensor | None = None
    """Which of the samples packed into one row it belongs to, see ``packing.py``. None: there is one."""
    jump_BN: Tensor | None = None
    """Frames by which a token stands later than its cell says, float32: what sets scenes apart for backbones
    that read indices; ``position_BN3`` holds it in seconds already. None: nowhere."""

    @property
    def sigma_BN(self) -> Tensor:
        """The noise level of each token, (B, N)."""
        level_BN = self.level_BN.expand(self.sigma_BK.shape[0], -1)
        return self.sigma_BK.gather(1, level_BN)

    @property
    def index_BN3(self) -> Tensor:
        """Where backbones that were trained on indices have a token: its cell, the frame later by the jump.
        (B or 1, N, 3); int64 where nothing jumps, else float32."""
        if self.jump_BN is None:
            return self.cell_BN3
        frame_BN = self.cell_BN3[..., 0] + self.jump_BN
        return torch.cat([frame_BN[..., None], self.cell_BN3[..., 1:].expand(len(frame_BN), -1, -1)], dim=-1)

    @property
    def attributes(self) -> Attributes:
        """What a visibility may ask, (B or 1, N) each."""
        nothing_1N = torch.zeros_like(self.scene_BN[:1])
        return Attributes(
            modality_BN=torch.full_like(nothing_1N, MODALITIES.index(self.modality)),
            scene_BN=self.scene_BN,
            chunk_BN=self.chunk_BN,
            context_BN=self.context_BN,
            cell_BN3=self.cell_BN3,
            first_BN=self._first() if self.first_BN is None else self.first_BN,
            sample_BN=nothing_1N if self.sample_BN is None else self.sample_BN,
        )

    def _first(self) -> Tensor:
        """(B or 1, N): whether no earlier frame of the token's scene is in the stream."""
        frames = self.grid[0]

        def per_frame(t_BN: Tensor) -> Tensor:
            return t_BN.unflatten(1, (frames, -1))[:, :, 0]

        scene_BT, frame_BT = per_frame(self.scene_BN), per_frame(self.cell_BN3[..., 0])
        earlier_BTT = (scene_BT[:, :, None] == scene_BT[:, None]) & (frame_BT[:, None] < frame_BT[:, :, None])
        return (~earlier_BTT.any(dim=2)).repeat_interleave(self.scene_BN.shape[1] // frames, dim=1)


Streams = Mapping[str, Stream]
"""Streams by modality name: ``text``, and at least one of ``video`` and ``audio``."""


def join_attributes(parts: list[Attributes]) -> Attributes:
    """Attributes of several streams laid end to end along N."""
    batch = max(t.shape[0] for part in parts for t in vars(part).values())

    def cat(name: str) -> Tensor:
        tensors = [getattr(part, name) for part in parts]
        return torch.cat([t.expand(batch, *t.shape[1:]) for t in tensors], dim=1)

    return Attributes(*(cat(name) for name in Attributes.__dataclass_fields__))
