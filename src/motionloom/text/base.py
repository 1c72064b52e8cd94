"""The text encoder protocol, and captions of scenes laid end to end.

Shapes: B batch, L text tokens of one caption, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from motionloom.plans.layout import Text
from motionloom.plans.visibility import GLOBAL


class TextEncoder(Protocol):
    """Captions -> token embeddings."""

    dim: int
    max_length: int
    trainable: bool
    """Trained with the backbone and saved with it; its embeddings are then never cached."""

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions -> embeddings (B, L, C) and their validity (B, L), padded to ``max_length``.

        The empty caption gives at least one valid token: it is the unconditional prompt.
        """
        ...

    def count_cut(self, captions: Sequence[str]) -> int:
        """How many captions are longer than ``max_length`` tokens and lose their end."""
        ...

    def fingerprint(self) -> str:
        """Hex digest of all that decides the embeddings (of an untrained encoder: its initial state)."""
        ...

    def save(self, folder: Path) -> None:
        """Write everything that ``load_text_encoder`` needs."""
        ...


def encode_scenes(
    encoder: TextEncoder, captions: Sequence[Sequence[str]], global_captions: Sequence[str] | None = None
) -> Text:
    """Every scene's caption encoded alone and laid end to end; missing scenes are padding.

    Args:
        captions: per sample, per scene.
        global_captions: what is said of each sample as a whole; it stands in front.
    """
    scenes, front = max(len(sample) for sample in captions), int(global_captions is not None)
    padded = [[*sample, *[""] * (scenes - len(sample))] for sample in captions]
    if global_captions is not None:
        padded = [[whole, *sample] for whole, sample in zip(global_captions, padded, strict=True)]
    x_NLC, valid_NL = encoder.encode([caption for sample in padded for caption in sample])
    exists = torch.tensor([[i < len(sample) + front for i in range(scenes + front)] for sample in captions])
    return lay_scenes(
        x_NLC.unflatten(0, (len(captions), scenes + front)),
        valid_NL.unflatten(0, (len(captions), scenes + front)) & exists.to(valid_NL.device)[..., None],
        first=GLOBAL if front else 0,
    )


def lay_scenes(x_BSLC: Tensor, valid_BSL: Tensor, first: int = 0) -> Text:
    """(B, captions, L, C) -> one row of tokens that know their scene.

    Args:
        first: scene of the first caption; ``GLOBAL`` where that speaks of the whole.
    """
    scenes, length = valid_BSL.shape[1:]
    scene_SL = first + torch.arange(scenes, device=x_BSLC.device)[:, None].expand(scenes, length)
    return Text(x_BSLC.flatten(1, 2), valid_BSL.flatten(1, 2), scene_SL.reshape(1, -1))
