"""Several samples in one row: streams of different sizes laid end to end, so that nothing is padded.

Who sees whom is unchanged but for one thing: samples do not see each other. Noise levels are laid end to end
too, and each token's index counts on. The packed grid says only how many tokens there are; a backbone that
reads positions or cells of each token, as joint ones do, computes for a packed row what it computes for the
samples one by one.

Shapes: N tokens of a stream, C channels, K noise levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from motionloom.plans.stream import Stream, Streams
from motionloom.plans.visibility import Both, SameSample, Visibility


class Packed(NamedTuple):
    """What a backbone is called with, and how its answer comes apart."""

    streams: dict[str, Stream]
    """One row of each modality."""
    visibility: Visibility
    """That of the samples, and same sample."""
    lengths: dict[str, tuple[int, ...]]
    """Tokens of each sample, by modality."""

    def unpack(self, out: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Answers (1, N, C) by modality -> those of each sample, (1, n, C) by modality."""
        parts = {modality: t.split(self.lengths[modality], dim=1) for modality, t in out.items()}
        samples = len(next(iter(self.lengths.values())))
        return [{modality: part[i] for modality, part in parts.items()} for i in range(samples)]


def pack(samples: Sequence[Streams], visibility: Visibility) -> Packed:
    """Streams of batch 1 with the same modalities, each of any size, and the visibility of them all."""
    assert samples, "nothing to pack"
    names = list(samples[0])
    assert all(list(sample) == names for sample in samples), "samples of one row have the same modalities"
    lengths = {name: tuple(sample[name].x_BNC.shape[1] for sample in samples) for name in names}
    streams = {name: _end_to_end([sample[name] for sample in samples]) for name in names}
    return Packed(streams, Both(visibility, SameSample()), lengths)


def _end_to_end(parts: list[Stream]) -> Stream:
    length = sum(part.x_BNC.shape[1] for part in parts)
    offsets = torch.tensor([0, *(part.sigma_BK.shape[1] for part in parts)]).cumsum(0).tolist()
    cells = all(part.grid[1:] == parts[0].grid[1:] for part in parts)
    grid = (sum(part.grid[0] for part in parts), *parts[0].grid[1:]) if cells else (1, 1, length)
    return Stream(
        modality=parts[0].modality,
        grid=grid,
        x_BNC=_cat([part.x_BNC for part in parts]),
        sigma_BK=_cat([part.sigma_BK for part in parts]),
        level_BN=_cat([part.level_BN + at for part, at in zip(parts, offsets, strict=False)]),
        position_BN3=_cat([part.position_BN3 for part in parts]),
        cell_BN3=_cat([part.cell_BN3 for part in parts]),
        scene_BN=_cat([part.scene_BN for part in parts]),
        chunk_BN=_cat([part.chunk_BN for part in parts]),
        context_BN=_cat([part.context_BN for part in parts]),
        loss_BN=_cat([part.loss_BN for part in parts]),
        valid_BN=_optional([part.valid_BN for part in parts], parts),
        extra_BNC=None if parts[0].extra_BNC is None else _cat([_given(part.extra_BNC) for part in parts]),
        first_BN=_cat([part.attributes.first_BN for part in parts]),
        jump_BN=_jumps(parts),
        sample_BN=_cat([torch.full_like(part.scene_BN[:1], i) for i, part in enumerate(parts)]),
    )


def _cat(tensors: list[Tensor]) -> Tensor:
    assert all(t.shape[0] == 1 for t in tensors), "a packed row is a batch of one: give each sample alone"
    return torch.cat(tensors, dim=1)


def _given(t: Tensor | None) -> Tensor:
    assert t is not None, "either all samples of a row have extra channels or none"
    return t


def _jumps(parts: list[Stream]) -> Tensor | None:
    if all(part.jump_BN is None for part in parts):
        return None
    still = [torch.zeros_like(part.scene_BN, dtype=torch.float32) for part in parts]
    return _cat([t if part.jump_BN is None else part.jump_BN for t, part in zip(still, parts, strict=True)])


def _optional(valid: list[Tensor | None], parts: list[Stream]) -> Tensor | None:
    """Padding inside samples stays padding."""
    if all(t is None for t in valid):
        return None
    every = [torch.ones_like(part.scene_BN, dtype=torch.bool) for part in parts]
    return _cat([whole if t is None else t for t, whole in zip(valid, every, strict=True)])
