"""The backbone protocol: token streams in, one answer per token out.

Shapes: B batch, N tokens of a stream, C channels of a token.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from motionloom.plans.stream import Streams
from motionloom.plans.visibility import Visibility


class Backbone(Protocol):
    """A network over streams. Single-device maths: no autocast, no environment, no mesh."""

    patch: tuple[int, int, int]
    """Latent cells (frames, rows, columns) that make one token."""

    def __call__(self, streams: Streams, visibility: Visibility) -> dict[str, Tensor]:
        """The prediction for every stream that is denoised, (B, N, C) by modality (text has none)."""
        ...

    def blocks(self) -> list[nn.Module]:
        """The repeated blocks in order: what a parallel plan shards, compiles and checkpoints."""
        ...
