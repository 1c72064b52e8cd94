"""One stream of tensors read by several readers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from torch import Tensor


def fork(source: Iterator[Tensor], count: int) -> list[Iterator[Tensor]]:
    """``count`` iterators over the same pieces; a piece is held from its first reader to its last.

    So each of them must be read: for one that is not, everything is kept.
    ``itertools.tee`` does the same but lets go of pieces only in blocks of 57, which for frames is gigabytes.
    """
    waiting: list[deque[Tensor]] = [deque() for _ in range(count)]

    def read(own: deque[Tensor]) -> Iterator[Tensor]:
        while True:
            if not own:
                piece = next(source, None)
                if piece is None:
                    return
                for queue in waiting:
                    queue.append(piece)
                del piece
            yield own.popleft()

    return [read(own) for own in waiting]
