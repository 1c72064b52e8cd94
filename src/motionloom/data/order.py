"""Which samples stand in the n-th batch: a pure function of (seed, n). The data's state is one integer, n.

Each bucket is an endless line of its samples: one random order of all of them, then the next, and so on.
Batches are cut from the line without a gap, so what is left of an epoch opens the next one: nothing is
dropped, nothing is favoured, and a bucket smaller than a batch fills it with repeats. An epoch is one pass
over every line; the batches that end within it come in a random order, buckets mixed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from motionloom.rng import numpy_rng


class Order:
    """The order of training batches.

    Args:
        counts: samples per bucket, by the bucket's name; at least one in all.
        batch: samples of one batch over all ranks. Runs that share it share the order, whatever their world.
    """

    def __init__(self, counts: Mapping[str, int], batch: int, seed: int) -> None:
        self._counts = {name: count for name, count in sorted(counts.items()) if count}
        assert self._counts, "an order of nothing"
        self._batch, self._seed = batch, seed
        # Neighbouring batches share their epoch; two epochs meet at its edge, and threads read ahead.
        self._epoch = lru_cache(maxsize=4)(self._draw_epoch)
        self._pass = lru_cache(maxsize=4 * len(self._counts))(self._draw_pass)

    def batches_through(self, epochs: int) -> int:
        """How many batches end within the first ``epochs`` passes."""
        return sum(epochs * count // self._batch for count in self._counts.values())

    def epoch_of(self, n: int) -> int:
        """The epoch that holds batch ``n``."""
        slowest = (n + 1) * self._batch // max(self._counts.values()) + 1
        return bisect_right(range(slowest + 1), n, key=self.batches_through) - 1

    def batch(self, n: int) -> tuple[str, NDArray[np.int64]]:
        """Bucket and sample numbers within it of batch ``n``, all ranks."""
        epoch = self.epoch_of(n)
        name, index = self._epoch(epoch)[n - self.batches_through(epoch)]
        count = self._counts[name]
        places = np.arange(index * self._batch, (index + 1) * self._batch)
        passes = [self._pass(name, which) for which in range(places[0] // count, places[-1] // count + 1)]
        return name, np.concatenate(passes)[places - places[0] // count * count]

    def _draw_epoch(self, epoch: int) -> list[tuple[str, int]]:
        """The (bucket, index of its batch) that end within an epoch: buckets mixed, each line in order."""
        lines = {
            name: range(epoch * count // self._batch, (epoch + 1) * count // self._batch)
            for name, count in self._counts.items()
        }
        names = [name for name, line in lines.items() for _ in line]
        next_of = {name: iter(line) for name, line in lines.items()}
        shuffled = numpy_rng(self._seed, "batches", epoch).permutation(len(names))
        return [(names[i], next(next_of[names[i]])) for i in shuffled]

    def _draw_pass(self, name: str, which: int) -> NDArray[np.int64]:
        """One random order of all samples of a bucket."""
        return numpy_rng(self._seed, "samples", name, which).permutation(self._counts[name])
