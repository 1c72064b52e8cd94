"""What samples are made of, and which of them stand in the n-th batch.

A sample is one cached clip, a window of a story's shots, or several unrelated clips laid end to end. Samples
of one shape stand in one batch; the shape is written as a bucket's name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from motionloom.config.recipe import StoriesConfig
from motionloom.data.buckets import Bucket
from motionloom.data.order import Order
from motionloom.errors import UserError
from motionloom.rng import numpy_rng
from motionloom.tokenizers import TokenizerSpec, scene_latents

_EXAMPLES = 64  # batches of joined clips that are looked through for shapes


@dataclass(frozen=True)
class Piece:
    """Shots of a cached row: ``count`` of those parts that were encoded alone, from ``first`` on."""

    row: int
    first: int
    count: int


Sample = tuple[Piece, ...]
Groups = dict[str, list[Sample]]
"""Samples by their shape."""
Rows = Mapping[Bucket, NDArray[np.int64]]
"""Rows of a split by their bucket."""


@dataclass(frozen=True)
class BucketReport:
    """What becomes of the clips of one shape."""

    shape: str
    """Pixels: width x height x frames; or sound and its length in frames."""
    clips: int
    batches: float
    """Per epoch and rank. Training: clips / batch, since what is left opens the next epoch."""
    dropped: int
    why: str


class Samples(Protocol):
    """The samples of training, all ranks."""

    def batch(self, n: int) -> tuple[str, list[Sample]]:
        """The shape and the samples of batch ``n``: a pure function of it."""
        ...

    def examples(self) -> dict[str, int]:
        """A batch number for every shape; where there are very many, for those of the first batches."""
        ...

    def report(self) -> list[BucketReport]:
        """What becomes of every clip."""
        ...


def windows(rows_of: Rows, stories: StoriesConfig, spec: TokenizerSpec) -> tuple[Groups, list[BucketReport]]:
    """Stories of more shots or latent frames than the recipe allows become windows of consecutive shots.

    Every shot is in a window. Returns the samples, and a line for each bucket whose clips are not whole.
    """
    groups: defaultdict[str, list[Sample]] = defaultdict(list)
    told: list[BucketReport] = []
    for bucket, rows in rows_of.items():
        spans = _windows_of(bucket, stories, spec)
        for row in rows:
            for first, count in spans:
                shots = bucket.alone[first : first + count]
                piece = Piece(int(row), first, count)
                groups[shape_of(bucket.width, bucket.height, shots)].append((piece,))
        if spans != [(0, len(bucket.alone))]:
            told.append(_of_windows(bucket, len(rows), spans, stories))
    return dict(groups), told


def _of_windows(
    bucket: Bucket, clips: int, spans: Sequence[tuple[int, int]], stories: StoriesConfig
) -> BucketReport:
    seen = {shot for first, count in spans for shot in range(first, first + count)}
    lost = len(bucket.alone) - len(seen)
    limit = f"stories.max_latent_frames {stories.max_latent_frames}"
    if not seen:
        return BucketReport(str(bucket), clips, 0.0, clips, f"no shot fits {limit}")
    longest = max(count for _, count in spans)
    why = f"used by {len(spans)} windows each, of at most {longest} shots"
    if lost:
        why += f"; {lost} shots of each do not fit {limit} and are left out"
    return BucketReport(str(bucket), clips, 0.0, 0, why)


def shape_of(width: int, height: int, shots: Sequence[int]) -> str:
    """The name of the shape of shots laid end to end."""
    return str(Bucket(width, height, sum(shots), tuple(shots) if len(shots) > 1 else ()))


def _windows_of(bucket: Bucket, stories: StoriesConfig, spec: TokenizerSpec) -> list[tuple[int, int]]:
    """(first shot, shots) of each window: all that fit from each shot on, but none that lies in another."""
    latents = scene_latents(spec, bucket.alone)
    most, budget = stories.shots or len(latents), stories.max_latent_frames or sum(latents)
    spans: list[tuple[int, int]] = []
    end = 0
    for first in range(len(latents)):
        fitting = np.cumsum(latents[first : first + most]) <= budget
        count = int(fitting.sum())
        if count and first + count > end:
            end = first + count
            spans.append((first, count))
    return spans


class Lines:
    """Every sample once per epoch, see `Order`.

    Args:
        batch: samples of one batch over all ranks.
        told: of clips that are not samples as they are.
    """

    def __init__(self, groups: Groups, batch: int, seed: int, told: Sequence[BucketReport] = ()) -> None:
        self._groups, self._batch, self._told = groups, batch, list(told)
        self._order = Order({name: len(samples) for name, samples in groups.items()}, batch, seed)

    def batch(self, n: int) -> tuple[str, list[Sample]]:
        name, numbers = self._order.batch(n)
        return name, [self._groups[name][number] for number in numbers]

    def examples(self) -> dict[str, int]:
        found: dict[str, int] = {}
        n = 0
        while len(found) < len(self._groups):  # every bucket has its turn
            found.setdefault(self._order.batch(n)[0], n)
            n += 1
        return found

    def report(self) -> list[BucketReport]:
        return [*self._told, *(self._line(name, len(samples)) for name, samples in self._groups.items())]

    def _line(self, shape: str, samples: int) -> BucketReport:
        why = "each once per epoch"
        if samples % self._batch:
            why = f"each once per epoch; {samples % self._batch} left over open the next"
        if samples < self._batch:
            why = f"fewer than a batch of {self._batch} over all ranks: clips repeat within it"
        return BucketReport(shape, samples, samples / self._batch, 0, why)


class Joined:
    """Unrelated clips of one shot and one size, laid end to end: each batch draws how many, and how long.

    How many, their lengths and the clips are drawn from (seed, n): nothing to remember, so that a restart
    finds the same batch. Every clip is as likely as any other of its size.

    Args:
        shots: of each row.

    Raises:
        UserError: no clip can be joined.
    """

    def __init__(
        self,
        rows_of: Rows,
        shots: Mapping[int, int],
        stories: StoriesConfig,
        spec: TokenizerSpec,
        batch: int,
        seed: int,
    ) -> None:
        self._least, self._most = stories.join
        self._budget, self._batch, self._seed = stories.max_latent_frames, batch, seed
        self._told: list[BucketReport] = []
        self._latents: dict[Bucket, int] = {}
        self._sizes: defaultdict[tuple[int, int], dict[Bucket, NDArray[np.int64]]] = defaultdict(dict)
        for bucket, rows in rows_of.items():
            single = np.array([row for row in rows if shots[int(row)] == 1], np.int64)
            self._latents[bucket] = sum(scene_latents(spec, bucket.alone))
            fits = self._budget is None or self._latents[bucket] * self._least <= self._budget
            if len(single) and fits:
                self._sizes[bucket.width, bucket.height][bucket] = single
            self._tell(bucket, len(rows), len(single), fits)
        if not self._sizes:
            raise UserError(
                f"stories.join {list(stories.join)}: no clip can be joined: it takes clips of one shot, "
                f"{self._least} of which fit stories.max_latent_frames; mend one of them"
            )

    def batch(self, n: int) -> tuple[str, list[Sample]]:
        rng = numpy_rng(self._seed, "join", n)
        sizes = list(self._sizes)
        clips = [sum(map(len, self._sizes[size].values())) for size in sizes]
        width, height = size = sizes[_draw(rng, clips)]
        slots = self._slots(rng, self._sizes[size])
        samples = [self._sample(rng, self._sizes[size], slots) for _ in range(self._batch)]
        return shape_of(width, height, [bucket.frames for bucket in slots]), samples

    def examples(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for n in range(_EXAMPLES):
            found.setdefault(self.batch(n)[0], n)
        return found

    def report(self) -> list[BucketReport]:
        return self._told

    def _slots(self, rng: np.random.Generator, buckets: Mapping[Bucket, NDArray[np.int64]]) -> list[Bucket]:
        """The lengths of the clips of this batch, within the budget."""
        shortest = min(self._latents[bucket] for bucket in buckets)
        count = int(rng.integers(self._least, self._most + 1))
        left = self._budget or self._most * max(self._latents[bucket] for bucket in buckets)
        count = min(count, left // max(shortest, 1))
        slots: list[Bucket] = []
        for after in reversed(range(count)):
            room = left - after * shortest
            fitting = [bucket for bucket in buckets if self._latents[bucket] <= room]
            slots.append(fitting[_draw(rng, [len(buckets[bucket]) for bucket in fitting])])
            left -= self._latents[slots[-1]]
        return slots

    def _sample(
        self,
        rng: np.random.Generator,
        buckets: Mapping[Bucket, NDArray[np.int64]],
        slots: Sequence[Bucket],
    ) -> Sample:
        """A clip for each slot, none twice where there are enough."""
        drawn: dict[Bucket, Iterator[np.int64]] = {}
        for bucket in dict.fromkeys(slots):
            rows, needed = buckets[bucket], slots.count(bucket)
            drawn[bucket] = iter(rng.choice(rows, needed, replace=needed > len(rows)))
        return tuple(Piece(int(next(drawn[bucket])), 0, 1) for bucket in slots)

    def _tell(self, bucket: Bucket, clips: int, single: int, fits: bool) -> None:
        if single and fits:
            why = f"drawn at random, {self._least} to {self._most} of them joined"
            self._told.append(BucketReport(str(bucket), single, single / self._batch, 0, why))
        elif single:
            why = f"{self._least} of them exceed stories.max_latent_frames {self._budget}"
            self._told.append(BucketReport(str(bucket), single, 0.0, single, why))
        if rest := clips - single:
            why = "have several shots, and stories.join takes clips of one"
            self._told.append(BucketReport(str(bucket), rest, 0.0, rest, why))


def joined_in_order(
    rows_of: Rows, shots: Mapping[int, int], stories: StoriesConfig, spec: TokenizerSpec
) -> Groups:
    """For the held-out pass: clips of one length, in order of id, as many end to end as may be.

    The last sample of a length takes its first clips again to be full.
    """
    groups: Groups = {}
    for bucket, rows in rows_of.items():
        single = [int(row) for row in rows if shots[int(row)] == 1]
        latents = sum(scene_latents(spec, bucket.alone))
        count = stories.join[1]
        if stories.max_latent_frames is not None:
            count = min(count, stories.max_latent_frames // max(latents, 1))
        if not single or count < stories.join[0]:
            continue
        full = [single[i % len(single)] for i in range(-(-len(single) // count) * count)]
        groups[shape_of(bucket.width, bucket.height, [bucket.frames] * count)] = [
            tuple(Piece(row, 0, 1) for row in full[begin : begin + count])
            for begin in range(0, len(full), count)
        ]
    return groups


def one_pass(groups: Groups, size: int, rank: int, world: int) -> Iterator[tuple[str, list[Sample]]]:
    """Batches of each sample once, in order; ranks take turns, and short of one repeat the first samples."""
    for name, samples in groups.items():
        turns = -(-len(samples) // world) * world
        mine = [samples[i % len(samples)] for i in range(rank, turns, world)]
        for begin in range(0, len(mine), size):
            yield name, mine[begin : begin + size]


def _draw(rng: np.random.Generator, weights: Sequence[int]) -> int:
    """A place, as likely as its weight."""
    return int(rng.choice(len(weights), p=np.array(weights) / sum(weights)))
