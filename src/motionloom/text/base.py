"""The text encoder protocol, and captions of scenes laid end to end.

Shapes: B batch, L text tokens of one caption, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Blocks:
    """What is said of the samples of a batch, a caption after the other: of references, of the whole, of each
    scene. None stands where a sample says nothing; its tokens are padding."""

    captions: list[list[str | None]]
    """Per sample, per block."""
    scenes: tuple[int, ...]
    """The scene that a block speaks of; `GLOBAL`: the whole. A reference is a scene after the last."""
    context: tuple[bool, ...]
    """True for the caption of a reference."""

    @staticmethod
    def of(
        captions: Sequence[Sequence[str]],
        global_captions: Sequence[str] | None = None,
        reference_captions: Sequence[str | None] | None = None,
    ) -> Blocks:
        """In the order in which they are laid; the arguments are those of :func:`encode_scenes`."""
        count = max(map(len, captions))
        blocks: list[list[str | None]] = []
        for b, sample in enumerate(captions):
            said: list[str | None] = [reference_captions[b] or None] if reference_captions is not None else []
            said += [global_captions[b] or None] if global_captions is not None else []
            blocks.append([*said, *sample, *[None] * (count - len(sample))])
        scenes = (
            *([count] if reference_captions is not None else []),
            *([GLOBAL] if global_captions is not None else []),
            *range(count),
        )
        context = tuple(i == 0 and reference_captions is not None for i in range(len(scenes)))
        return Blocks(blocks, scenes, context)

    def lay(self, x_BSLC: Tensor, valid_BSL: Tensor) -> Text:
        """Their embeddings (B, blocks, L, C) as one row of tokens."""
        said_BS = torch.tensor([[caption is not None for caption in sample] for sample in self.captions])
        valid_BSL = valid_BSL & said_BS.to(valid_BSL.device)[..., None]
        return lay_scenes(x_BSLC, valid_BSL, self.scenes, self.context)


def lay_scenes(
    x_BSLC: Tensor,
    valid_BSL: Tensor,
    scenes: Sequence[int] | None = None,
    context: Sequence[bool] = (),
) -> Text:
    """(B, captions, L, C) -> one row of tokens that know their scene.

    Args:
        scenes: of each caption; none: they are counted from 0.
        context: True for captions of references.
    """
    count, length = valid_BSL.shape[1:]
    scene_S = torch.tensor(range(count) if scenes is None else scenes, device=x_BSLC.device)
    context_BL = None
    if any(context):
        context_BL = torch.tensor(context, device=x_BSLC.device).repeat_interleave(length)[None]
    scene_BL = scene_S.repeat_interleave(length)[None]
    return Text(x_BSLC.flatten(1, 2), valid_BSL.flatten(1, 2), scene_BL, context_BL)


def encode_scenes(
    encoder: TextEncoder,
    captions: Sequence[Sequence[str]],
    global_captions: Sequence[str] | None = None,
    reference_captions: Sequence[str | None] | None = None,
) -> Text:
    """Every caption encoded alone and laid end to end; what a sample does not say is padding.

    In front stand the captions of references, marked as context, and those of the whole, whose scene is
    `GLOBAL`.

    Args:
        captions: per sample, per scene.
        global_captions: per sample, of the whole; empty: nothing is said.
        reference_captions: per sample, of its reference; None or empty: nothing is said.
    """
    blocks = Blocks.of(captions, global_captions, reference_captions)
    x_NLC, valid_NL = encoder.encode([caption or "" for sample in blocks.captions for caption in sample])
    shape = (len(captions), len(blocks.scenes))
    return blocks.lay(x_NLC.unflatten(0, shape), valid_NL.unflatten(0, shape))


def drop_captions(text: Text, empty: Text, drop_B: Tensor) -> Text:
    """The empty caption in the place of all that the samples ``drop_B`` say of their scenes; what is said of
    the whole and of references falls silent.

    Args:
        empty: the empty caption laid out as ``text`` is, batch 1 (:attr:`Batch.empty_text`).
        drop_B: bool.
    """
    drop_B1 = drop_B.to(text.x_BLC.device)[:, None]
    # A scene that a sample lacks stays padding: it has no valid token in the text either.
    same_LL = text.scene_BL[0, :, None] == text.scene_BL[0]
    if text.context_BL is not None:
        same_LL &= text.context_BL[0, :, None] == text.context_BL[0]
    exists_BL = text.valid_BL.float() @ same_LL.float() > 0
    return replace(
        text,
        x_BLC=torch.where(drop_B1[..., None], empty.x_BLC.float(), text.x_BLC.float()),
        valid_BL=torch.where(drop_B1, empty.valid_BL & exists_BL, text.valid_BL),
    )
