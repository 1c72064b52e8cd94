"""Latents <-> tokens: one token is a box of latent cells.

Shapes: B batch, F latent frames, H x W latent cells, C channels; S token cells of a frame; patch (f, h, w).
"""

from __future__ import annotations

from torch import Tensor

Triple = tuple[int, int, int]


def patchify(latents_BFHWC: Tensor, patch: Triple) -> Tensor:
    """(B, F, H, W, C) -> (B, F/f, S = H/h x W/w, f x h x w x C). Every side must divide."""
    batch, *sides, channels = latents_BFHWC.shape
    assert not any(n % p for n, p in zip(sides, patch, strict=True)), f"{sides} by patch {patch}"
    frames, rows, columns = (n // p for n, p in zip(sides, patch, strict=True))
    f, h, w = patch
    boxes = latents_BFHWC.reshape(batch, frames, f, rows, h, columns, w, channels)
    return boxes.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4).flatten(2, 3)


def unpatchify(tokens_BFSC: Tensor, grid: Triple, patch: Triple) -> Tensor:
    """The inverse of :func:`patchify`; ``grid`` is the tokens' (frames, rows, columns)."""
    frames, rows, columns = grid
    boxes = tokens_BFSC.reshape(-1, frames, rows, columns, *patch, tokens_BFSC.shape[-1] // _volume(patch))
    return boxes.permute(0, 1, 4, 2, 5, 3, 6, 7).flatten(5, 6).flatten(3, 4).flatten(1, 2)


def _volume(patch: Triple) -> int:
    return patch[0] * patch[1] * patch[2]


def patchify_mask(mask_BFHW: Tensor, patch: Triple) -> Tensor:
    """bool latent cells -> tokens (B, F, S): True only for tokens all of whose cells are."""
    return patchify(mask_BFHW[..., None], patch).all(dim=-1)
