"""Large frames in overlapping tiles: memory follows the tile, not the frame.

Every tile is coded by itself, and where tiles overlap their results are averaged with weights that fall
linearly towards a tile's edge (a linear feather). Three things hold: a constant stays a constant, since the
weights are divided by their sum; cells that lie in one tile only are that tile's result, untouched; and the
blend has no step of its own: from a cell to the next a tile's share changes by at most 1 / (overlap + 1),
as long as no cell lies in three tiles of an axis (an overlap of a third of a tile, or less).

A tile cannot see beyond its edge, so the result differs from coding the whole frame wherever the network's
receptive field (or its attention) reaches further than the overlap.

Shapes: B batch, C channels, T frames, H x W cells; h x w cells of one tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise

import torch
from torch import Tensor

from motionloom.tokenizers.fork import fork

Code = Callable[[Iterator[Tensor]], Iterator[Tensor]]
"""One direction of a codec: pieces (B, C, T, H, W) in time order -> its results, in order."""


@dataclass(frozen=True)
class Span:
    """Cells ``begin <= i < end`` of one axis, and what they share with their neighbours."""

    begin: int
    end: int
    shared_before: int
    shared_after: int

    def scaled(self, factor: float) -> Span:
        """The same stretch on an axis with ``factor`` times the cells."""
        ends = (self.begin, self.end, self.shared_before, self.shared_after)
        return Span(*(round(end * factor) for end in ends))

    def weights(self) -> Tensor:
        """(cells,) float32: 1 inside, falling linearly over what is shared."""
        i = torch.arange(self.end - self.begin, dtype=torch.float32)
        rise = (i + 1) / (self.shared_before + 1)
        fall = (self.end - self.begin - i) / (self.shared_after + 1)
        return torch.minimum(rise, fall).clamp(max=1.0)


def spans(size: int, tile: int, overlap: int) -> list[Span]:
    """Tiles of one size, at most ``tile`` cells, over an axis; neighbours share at least ``overlap`` cells.

    As few tiles as that takes, as small as that lets them be.
    """
    assert 0 <= overlap < tile
    if size <= tile:
        return [Span(0, size, 0, 0)]
    count = -(-(size - overlap) // (tile - overlap))
    tile = -(-(size + (count - 1) * overlap) // count)
    begins = [i * (size - tile) // (count - 1) for i in range(count)]
    shared = [0, *(a + tile - b for a, b in pairwise(begins)), 0]
    return [Span(begin, begin + tile, *shared[n : n + 2]) for n, begin in enumerate(begins)]


def tiled(code: Code, tile: int, overlap: int, unit: int = 1) -> Code:
    """``code`` over tiles of at most ``tile`` x ``tile`` input cells that share at least ``overlap`` cells.

    Tiles begin and end at multiples of ``unit`` cells, as do ``tile`` and ``overlap``. All tiles go through
    time side by side, so a stream stays a stream. ``code`` must scale space by one factor and hand out
    results after equally many pieces for every tile.
    """

    def run(pieces: Iterator[Tensor]) -> Iterator[Tensor]:
        first = next(pieces, None)
        if first is None:
            return
        size = (int(first.shape[3]), int(first.shape[4]))
        rows, columns = (
            [span.scaled(unit) for span in spans(axis // unit, tile // unit, overlap // unit)]
            for axis in size
        )
        windows = [(row, column) for row in rows for column in columns]
        sources = fork(chain([first], pieces), len(windows))
        streams = [code(_crop(source, *w)) for source, w in zip(sources, windows, strict=True)]
        for results in zip(*streams, strict=True):
            yield _blend(results, windows, size)

    return run


def _crop(pieces: Iterator[Tensor], rows: Span, columns: Span) -> Iterator[Tensor]:
    for piece in pieces:
        yield piece[..., rows.begin : rows.end, columns.begin : columns.end]


def _blend(results: tuple[Tensor, ...], windows: list[tuple[Span, Span]], size: tuple[int, int]) -> Tensor:
    """The weighted mean of the tiles' results (B, C, T, h, w) on the whole frame."""
    factor = results[0].shape[-1] / (windows[0][1].end - windows[0][1].begin)
    height, width = (round(axis * factor) for axis in size)
    total = results[0].new_zeros((*results[0].shape[:-2], height, width), dtype=torch.float32)
    weight_HW = total.new_zeros(height, width)
    for result, (rows, columns) in zip(results, windows, strict=True):
        rows, columns = rows.scaled(factor), columns.scaled(factor)
        own_hw = torch.outer(rows.weights(), columns.weights()).to(total.device)
        place = (..., slice(rows.begin, rows.end), slice(columns.begin, columns.end))
        total[place] += result.float() * own_hw
        weight_HW[place] += own_hw
    return (total / weight_HW).to(results[0].dtype)
