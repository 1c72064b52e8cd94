"""From a mask in pixels to one in latent cells: a cell is given only if all of it is.

Shapes: P pixel frames, H x W pixels; F latent frames, h x w latent cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from motionloom.tokenizers import TokenizerSpec, scene_latents


def latent_mask(given_PHW: Tensor, spec: TokenizerSpec, shots: Sequence[int]) -> Tensor:
    """Bool (P, H, W) -> bool (F, h, w): True where every pixel of every frame behind a latent cell is given.

    Frames are grouped as the tokenizer groups them: with ``first_alone`` {0}, {1..4}, {5..8}, ..., anew in
    each shot, so that a frame that is not given never hides in the group of its neighbours.

    Args:
        shots: pixel frames of each shot that is encoded alone; their sum is P.

    Raises:
        UserError: a length or size that the tokenizer cannot make.
    """
    _, height, width = given_PHW.shape
    spec.latent_grid(shots[0], height, width)
    cells_PhwK = given_PHW.unflatten(2, (-1, spec.spatial)).unflatten(1, (-1, spec.spatial))
    whole_Phw = cells_PhwK.all(dim=4).all(dim=2)
    groups = [group for shot in shots for group in _groups(spec, shot)]
    return torch.stack([frames_phw.all(dim=0) for frames_phw in whole_Phw.split(groups)])


def _groups(spec: TokenizerSpec, frames: int) -> list[int]:
    """Pixel frames of each latent frame of a shot."""
    (latents,) = scene_latents(spec, [frames])
    ends = [spec.pixel_frames(n) for n in range(1, latents + 1)]
    return [end - begin for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def pack_mask(mask_Fhw: Tensor) -> bytes:
    """A bit per cell, row-major."""
    import numpy as np

    return np.packbits(mask_Fhw.numpy()).tobytes()
