"""Shifted windows for frames of any size (Swin, arXiv 2103.14030), as one reordering of a frame's cells.

Windows take the size near the wished one that fits the side best, so that little or nothing is padded:
28 columns at size 8 become 4 windows of 7. Shifting wraps around like Swin's, and the mask keeps apart what
the wrap brought together, so that the windows at the border are simply smaller.

Shapes: S cells of a frame (row-major), W windows, M places in a window; B batch, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def window_side(side: int, size: int) -> int:
    """The window side for ``side`` cells: within a quarter of ``size``, fewest padded cells, then nearest,
    then larger.

    A side of at most 5/4 ``size`` is one window.
    """
    low, high = max(1, -(-3 * size // 4)), 5 * size // 4
    if side <= high:
        return side
    return min(range(low, high + 1), key=lambda w: (-side % w, abs(w - size), -w))


@dataclass(frozen=True)
class Windows:
    """How the S cells of a frame stand in W windows of M places."""

    count: int
    cell_I: Tensor
    """Cell in each of the I = W x M places, window by window; padded places repeat cell 0."""
    place_S: Tensor
    """Place of each cell: the inverse of ``cell_I``."""
    region_WM: Tensor | None
    """Places of different regions are kept apart, -1 is padding; None if every window is whole."""
    padded: bool

    def gather(self, x_BSC: Tensor) -> Tensor:
        """(B, S, C) -> (B, W x M, C). Compiled code fuses this into whatever reads it."""
        return _Reorder.apply(x_BSC, self.cell_I, self.place_S, None)

    def scatter(self, x_BIC: Tensor) -> Tensor:
        """(B, W x M, C) -> (B, S, C), padding dropped."""
        return _Reorder.apply(x_BIC, self.place_S, self.cell_I, self._real_I1())

    def mask(self, allowed: Tensor | None) -> Tensor | None:
        """Who may look at whom within the windows, (..., W, M, M), given what is ``allowed`` besides.

        Padding is seen by nobody but padding, which keeps its rows from being empty.
        """
        if self.region_WM is None:
            return allowed
        mask = self.region_WM[:, :, None] == self.region_WM[:, None, :]
        return mask if allowed is None else mask & allowed

    def _real_I1(self) -> Tensor | None:
        if not self.padded:
            return None
        assert self.region_WM is not None
        return (self.region_WM >= 0).view(-1, 1)


def windows(rows: int, columns: int, size: int, shifted: bool, device: torch.device) -> Windows:
    """Windows of about ``size`` x ``size``; ``shifted`` by half a window, in a side of two or more."""
    (tall, down_R, region_R, padded_rows), (wide, right_C, region_C, padded_columns) = (
        _along(side, size, shifted, device) for side in (rows, columns)
    )
    across = padded_columns // wide
    window_RC = (down_R // tall)[:, None] * across + right_C // wide
    place_RC = window_RC * tall * wide + (down_R % tall)[:, None] * wide + right_C % wide
    place_S = place_RC.flatten()
    places = padded_rows * padded_columns
    cell_I = torch.zeros(places, dtype=torch.long, device=device)
    cell_I[place_S] = torch.arange(rows * columns, device=device)
    count, padded = places // (tall * wide), places > rows * columns
    region_WM = None
    if (shifted and count > 1) or padded:
        region_I = torch.full((places,), -1, dtype=torch.long, device=device)
        region_I[place_S] = (region_R[:, None] * (columns + 1) + region_C).flatten()
        region_WM = region_I.view(count, -1)
    return Windows(count, cell_I, place_S, region_WM, padded)


def _along(side: int, size: int, shifted: bool, device: torch.device) -> tuple[int, Tensor, Tensor, int]:
    """One direction: window side, slot of each cell after the cyclic shift, region that it belongs to, and
    the padded length."""
    window = window_side(side, size)
    padded = side + -side % window
    shift = window // 2 if shifted and padded > window else 0
    moved = torch.arange(side, device=device) + shift
    return window, moved % padded, moved // window, padded


class _Reorder(torch.autograd.Function):
    """Take rows by index; the gradient takes them back by the inverse index instead of scattering sums.

    On the way in, padded places repeat cell 0, but their gradient is zero, since no real query looks at them
    and their output is dropped. On the way out, ``real`` gives the dropped ones that zero.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, real: Tensor | None) -> Tensor:
        ctx.save_for_backward(inverse, real)
        return x.index_select(1, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        inverse, real = ctx.saved_tensors
        grad = grad.index_select(1, inverse)
        return grad if real is None else grad * real, None, None, None
