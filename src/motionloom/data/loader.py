"""Batches from a cache, in an order that restarts exactly: the state is the number of batches already taken.

Shapes: B batch, F latent frames, h x w latent cells, S scenes, L text tokens of a caption, C channels.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from motionloom.config.recipe import Recipe
from motionloom.data.batch import Batch, Latents
from motionloom.data.buckets import Bucket
from motionloom.data.cache import Cache, TextTable, is_trained
from motionloom.data.order import Order
from motionloom.errors import UserError
from motionloom.plans.layout import Text
from motionloom.rng import key_to_seed
from motionloom.text import lay_scenes
from motionloom.tokenizers import scene_seconds, scene_spans

Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class BucketReport:
    """What becomes of the clips of one shape."""

    shape: str
    """Pixels: width x height x frames."""
    clips: int
    batches: float
    """Per epoch and rank. Training: clips / batch, since what is left opens the next epoch."""
    dropped: int
    why: str


class Loader:
    """Batches of one split for one rank.

    Training runs for ever: every batch comes from one bucket, the ranks take disjoint parts of it, and no
    sample is dropped (see `Order`). The held-out split is one pass in order of id: rank r takes every
    ``world``-th clip from the r-th on, the last batch of a bucket may be smaller, and a bucket that does not
    divide by the ranks repeats its first clips (``Batch.ids`` tells), so that all ranks see as many batches.

    Args:
        rank, world: of data parallelism.

    Raises:
        UserError: the cache is not the recipe's, or lacks the embeddings that the recipe needs.
    """

    def __init__(
        self, cache: Cache, recipe: Recipe, rank: int = 0, world: int = 1, *, split: Split = "train"
    ) -> None:
        assert 0 <= rank < world
        cache.require(recipe)
        self._cache, self._recipe, self._split = cache, recipe, split
        self._rank, self._world = rank, world
        heldout = heldout_clips(cache.clips, recipe.train.heldout_fraction)
        wanted = np.array([(clip in heldout) == (split == "heldout") for clip in cache.clips])
        self._rows = {
            bucket: rows[wanted[rows]] for bucket, rows in cache.buckets.items() if wanted[rows].any()
        }
        self._captions = _Captions(cache, recipe, self._rows)
        if split == "train":
            counts = {str(bucket): len(rows) for bucket, rows in self._rows.items()}
            self._order = Order(counts, recipe.train.batch_size * world, recipe.seed)
        else:
            self._passes = list(_one_pass(self._rows, recipe.train.batch_size, rank, world))

    def __len__(self) -> int:
        """Batches of the held-out pass, per rank; training has no end."""
        return sys.maxsize if self._split == "train" else len(self._passes)

    @property
    def clips(self) -> int:
        """Rows of the split, all ranks."""
        return sum(len(rows) for rows in self._rows.values())

    def row_numbers(self) -> list[int]:
        """Rows of the cache that belong to the split, all ranks."""
        return sorted(int(row) for rows in self._rows.values() for row in rows)

    def fingerprint(self) -> str:
        """Digest of all that decides which clips batch n holds; a resumed run must find it unchanged."""
        facts: list[Any] = [self._recipe.seed, self._recipe.train.batch_size * self._world, self._split]
        digest = hashlib.sha256(repr([*facts, self._cache.identity.fingerprint]).encode())
        for bucket, rows in self._rows.items():
            digest.update(str(bucket).encode())
            for row in self._cache.metadata(rows):
                digest.update(
                    repr([row[key] for key in ("id", "captions", "wordings", "scene_frames")]).encode()
                )
        return digest.hexdigest()

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Batches ``start``, ``start`` + 1, ...: the same ones, wherever a run was stopped."""
        import absl.logging  # noqa: F401 - makes the logger that Grain warns through, so that it can be filtered

        logging.getLogger("absl").addFilter(_not_about_jax)
        import grain.python as grain

        threads = self._recipe.num_workers
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        if start >= len(self):
            return
        dataset = grain.MapDataset.source(_ByNumber(self)).slice(slice(start, None))
        iterator = iter(dataset.to_iter_dataset(options))
        try:
            yield from iterator
        finally:
            iterator.close()

    def batch(self, n: int) -> Batch:
        """The ``n``-th batch of this rank."""
        rows = self._members(n)
        spec = self._cache.identity.spec
        latents_BFhwC = torch.from_numpy(np.stack(self._cache.latents(rows))).float()
        bucket = Bucket.parse(self._cache.metadata(rows[:1])[0]["bucket"])
        shots = bucket.shots or (bucket.frames,)
        captions, scene_frames = self._captions.of(rows, n if self._split == "train" else None)
        scene_BF = torch.tensor([bucket.latent_shots(spec, frames) for frames in scene_frames])
        video = Latents(
            latents_BFhwC,
            scene_seconds(spec, shots, self._cache.fps).repeat(len(rows), 1),
            scene_spans(spec, shots, self._cache.fps).repeat(len(rows), 1, 1),
            scene_BF,
            spec.spatial,
        )
        return Batch(
            ids=[self._cache.ids[row] for row in rows],
            latents={"video": video},
            captions=captions,
            text=self._captions.embed(captions),
            empty_text=self._captions.empty(max(map(len, captions))),
        )

    def examples(self) -> dict[str, Batch]:
        """A training batch of every bucket, by the bucket's name."""
        assert self._split == "train"
        found: dict[str, Batch] = {}
        for n in itertools.count():
            name, _ = self._order.batch(n)
            if name not in found:
                found[name] = self.batch(n)
            if len(found) == len(self._rows):
                return found
        raise AssertionError("every bucket has its turn")

    def report(self) -> list[BucketReport]:
        """What becomes of every clip, bucket by bucket; to be shown before the first step."""
        batch = self._recipe.train.batch_size * self._world
        return [self._report(str(bucket), len(rows), batch) for bucket, rows in self._rows.items()]

    def _report(self, shape: str, clips: int, batch: int) -> BucketReport:
        if self._split == "heldout":
            batches = sum(str(bucket) == shape for bucket, _ in self._passes)
            return BucketReport(shape, clips, batches, 0, "each once, in order")
        why = "each once per epoch"
        if clips % batch:
            why = f"each once per epoch; {clips % batch} left over open the next"
        if clips < batch:
            why = f"fewer than a batch of {batch} over all ranks: clips repeat within it"
        return BucketReport(shape, clips, clips / batch, 0, why)

    def _members(self, n: int) -> NDArray[np.int64]:
        """Cache rows of this rank's ``n``-th batch, all of one bucket."""
        if self._split == "heldout":
            return self._passes[n][1]
        name, samples = self._order.batch(n)
        size = self._recipe.train.batch_size
        return self._rows[Bucket.parse(name)][samples[self._rank * size : (self._rank + 1) * size]]


def heldout_clips(clips: Sequence[str], fraction: float) -> set[str]:
    """The clips kept out of training: those whose id hashes below ``fraction``, all crops together.

    A clip's side never depends on the other clips, but for two mends in small caches: with any fraction above
    0 and two clips or more, at least one is held out and at least one is left.
    """
    share = {clip: key_to_seed("heldout", clip) / 2**63 for clip in set(clips)}
    ranked = sorted(share, key=lambda clip: (share[clip], clip))
    if fraction <= 0 or len(ranked) < 2:
        return set()
    count = sum(share[clip] < fraction for clip in ranked)
    return set(ranked[: min(max(count, 1), len(ranked) - 1)])


def _one_pass(
    rows_of: dict[Bucket, NDArray[np.int64]], size: int, rank: int, world: int
) -> Iterator[tuple[Bucket, NDArray[np.int64]]]:
    for bucket, rows in rows_of.items():
        mine = np.resize(rows, -(-len(rows) // world) * world)[rank::world]
        for begin in range(0, len(mine), size):
            yield bucket, mine[begin : begin + size]


class _Captions:
    """Captions and, for a frozen encoder, their embeddings."""

    def __init__(self, cache: Cache, recipe: Recipe, rows_of: dict[Bucket, NDArray[np.int64]]) -> None:
        self._seed, self._ids = recipe.seed, cache.ids
        rows = np.concatenate([*rows_of.values(), np.zeros(0, np.int64)])
        self._of_row = {
            int(row): (told["captions"], told["wordings"], told["scene_frames"])
            for row, told in zip(rows, cache.metadata(rows), strict=True)
        }
        self._table = None if is_trained(recipe) else _embeddings(cache, recipe, self._all())
        self.empty = lru_cache(maxsize=None)(lambda scenes: self.embed([[""] * scenes]))
        """The empty caption in so many scenes, batch 1."""

    def of(self, rows: NDArray[np.int64], n: int | None) -> tuple[list[list[str]], list[list[int]]]:
        """Captions per sample and scene, and frames per scene.

        Batch number ``n`` draws among a clip's wordings; without one the clip's own caption is taken.
        """
        captions, frames = [], []
        for row in rows:
            own, wordings, scene_frames = self._of_row[int(row)]
            if n is not None and len(wordings) > 1:
                own = [wordings[key_to_seed(self._seed, "wording", n, self._ids[row]) % len(wordings)]]
            captions.append(own)
            frames.append(scene_frames)
        return captions, frames

    def embed(self, captions: Sequence[Sequence[str]]) -> Text | None:
        """Embeddings of scenes laid end to end, each padded to full length; None for a trained encoder."""
        table = self._table
        if table is None:
            return None
        scenes = max(map(len, captions))
        x_BSLC = torch.zeros(len(captions), scenes, table.max_length, table.dim)
        valid_BSL = torch.zeros(x_BSLC.shape[:3], dtype=torch.bool)
        found = iter(table.embed([caption for sample in captions for caption in sample]))
        for b, sample in enumerate(captions):
            for s in range(len(sample)):
                x_LC = next(found)
                x_BSLC[b, s, : len(x_LC)] = x_LC
                valid_BSL[b, s, : len(x_LC)] = True
        return lay_scenes(x_BSLC, valid_BSL)

    def _all(self) -> set[str]:
        return {caption for own, wordings, _ in self._of_row.values() for caption in (*own, *wordings)}


def _embeddings(cache: Cache, recipe: Recipe, captions: set[str]) -> TextTable:
    """The cache's embeddings, once they are known to be the recipe's and complete."""
    again = "run motionloom cache on it again (latents are kept)"
    table = cache.text
    if table is None:
        raise UserError(f"{cache.path}: holds no text embeddings for a frozen encoder; {again}")
    if wrong := table.mismatches(recipe):
        raise UserError(f"{cache.path}: has text embeddings of another encoder: {'; '.join(wrong)}; {again}")
    if missing := table.missing({"", *captions}):
        raise UserError(
            f"{cache.path}: {len(missing)} captions have no embedding (first: {missing[0][:60]!r}); {again}"
        )
    return table


class _ByNumber:
    """The loader as Grain's random-access source."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __getitem__(self, n: int) -> Batch:
        return self._loader.batch(int(n))


def _not_about_jax(record: logging.LogRecord) -> bool:
    """Grain warns that it cannot profile JAX, which nobody here has asked for."""
    return "jax profiler" not in record.getMessage()
