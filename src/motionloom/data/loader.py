"""Batches from a cache, in an order that restarts exactly: the state is the number of batches taken."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from motionloom.config.recipe import Recipe
from motionloom.data.batch import Batch
from motionloom.data.buckets import Bucket
from motionloom.data.cache import Cache
from motionloom.data.captions import Captions
from motionloom.data.collate import Collate
from motionloom.data.samples import (
    BucketReport,
    Groups,
    Joined,
    Lines,
    Sample,
    Samples,
    joined_in_order,
    one_pass,
    windows,
)
from motionloom.errors import UserError
from motionloom.rng import key_to_seed

Split = Literal["train", "heldout"]


class Loader:
    """Batches of one split for one rank.

    Training runs for ever: every batch is of one shape, the ranks take disjoint parts of it, and no sample is
    dropped (see `Order`); a recipe may ask for windows of stories, or for joined clips (`samples.py`). The
    held-out split is one pass in order of id: rank r takes every
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
        self._told: list[BucketReport] = []
        self._rows = self._of_split(self._usable())
        self._captions = Captions(cache, recipe, self.row_numbers())
        self._collate = Collate(cache, recipe, self._captions.scene_frames)
        size = recipe.train.batch_size
        if split == "train":
            self._samples = self._training(size * world)
        else:
            groups = self._heldout()
            self._in_pass = {name: len(samples) for name, samples in groups.items()}
            self._passes = list(one_pass(groups, size, rank, world))

    def _usable(self) -> dict[Bucket, NDArray[np.int64]]:
        """Rows by bucket that have what the plan needs: a picture, or for a plan of sound alone, sound."""
        modalities = self._recipe.plan.modalities
        found: dict[Bucket, NDArray[np.int64]] = {}
        for bucket, every in self._cache.buckets.items():
            if "video" in modalities:
                lacks = np.full(len(every), bucket.is_sound)
                why = "sound alone, and plan.modalities has video"
            else:
                lacks = np.array(self._cache.silent(every))
                why = "silent, and plan.modalities has no video"
            if lost := int(lacks.sum()):
                self._told.append(BucketReport(str(bucket), lost, 0.0, lost, why))
            if not lacks.all():
                found[bucket] = every[~lacks]
        if not found:
            raise UserError(
                f"{self._cache.path}: no clip can be used: all are {self._told[0].why}; "
                "change plan.modalities, or make a cache of other clips"
            )
        return found

    def _of_split(self, rows_of: dict[Bucket, NDArray[np.int64]]) -> dict[Bucket, NDArray[np.int64]]:
        """Those of the split, which is drawn among what can be used: no side loses its last clip."""
        clips = self._cache.clips
        usable = [clips[row] for rows in rows_of.values() for row in rows]
        heldout = heldout_clips(usable, self._recipe.train.heldout_fraction)
        wanted = np.array([(clip in heldout) == (self._split == "heldout") for clip in clips])
        found = {bucket: rows[wanted[rows]] for bucket, rows in rows_of.items()}
        return {bucket: rows for bucket, rows in found.items() if len(rows)}

    def _training(self, batch: int) -> Samples:
        stories, spec, seed = self._recipe.stories, self._cache.identity.spec, self._recipe.seed
        if stories.join[1]:
            return Joined(self._rows, self._shots(), stories, spec, batch, seed)
        groups, told = windows(self._rows, stories, spec)
        if not groups:
            raise UserError(f"{self._cache.path}: no clip fits stories.max_latent_frames: raise it")
        return Lines(groups, batch, seed, told)

    def _heldout(self) -> Groups:
        stories, spec = self._recipe.stories, self._cache.identity.spec
        if stories.join[1]:
            return joined_in_order(self._rows, self._shots(), stories, spec)
        groups, told = windows(self._rows, stories, spec)
        self._told += told
        return groups

    def _shots(self) -> dict[int, int]:
        """How many shots each row has."""
        return {row: len(self._captions.scene_frames(row)) for row in self.row_numbers()}

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
        """Digest of all that decides which clips batch n holds, and of the files that what stands beside them
        was made of; a resumed run must find it unchanged."""
        facts: list[Any] = [self._recipe.seed, self._recipe.train.batch_size * self._world, self._split]
        stories = self._recipe.stories
        # Recipes that have none of it keep the fingerprint that they had before there was such a thing.
        facts += [stories.model_dump()] if stories != type(stories)() else []
        beside = (self._recipe.audio, self._recipe.references, self._recipe.masks)
        facts += [section.model_dump() for section in beside if section.enabled]
        if any(section.enabled for section in beside):
            numbers = self.row_numbers()
            facts.append(self._cache.stamps(numbers))
            facts += [self._cache.reference_captions(numbers)] if self._recipe.references.enabled else []
        facts += [self._cache.pairs.fingerprint] if self._cache.has_states else []
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
        shape, samples = self._members(n)
        said = self._captions.of(samples, n if self._split == "train" else None)
        recipe, ids = self._recipe, self._cache.ids
        return Batch(
            ids=["+".join(ids[piece.row] for piece in sample) for sample in samples],
            latents=self._collate.latents(shape, samples),
            captions=said.captions,
            text=self._captions.embed(said),
            empty_text=self._captions.empty(max(map(len, said.captions))),
            references=self._collate.references(samples) if recipe.references.enabled else {},
            masks=self._collate.masks(shape, samples) if recipe.masks.enabled else {},
            states=self._collate.states(shape, samples),
            global_captions=said.global_captions,
            reference_captions=said.reference_captions,
        )

    def examples(self) -> dict[str, Batch]:
        """A training batch of every shape, by its name; where there are very many, of the first ones."""
        assert self._split == "train"
        return {name: self.batch(n) for name, n in self._samples.examples().items()}

    def report(self) -> list[BucketReport]:
        """What becomes of every clip, bucket by bucket; to be shown before the first step."""
        if self._split == "train":
            return [*self._told, *self._samples.report()]
        batches = [name for name, _ in self._passes]
        why = "each once, in order"
        return [
            *self._told,
            *(BucketReport(name, n, batches.count(name), 0, why) for name, n in self._in_pass.items()),
        ]

    def _members(self, n: int) -> tuple[str, list[Sample]]:
        """Shape and samples of this rank's ``n``-th batch."""
        if self._split == "heldout":
            return self._passes[n]
        name, samples = self._samples.batch(n)
        size = self._recipe.train.batch_size
        return name, samples[self._rank * size : (self._rank + 1) * size]


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
