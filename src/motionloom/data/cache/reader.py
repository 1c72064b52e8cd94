"""A cache, read: rows by number, text embeddings by caption, statistics and a check of everything.

Shapes: F latent frames, h x w latent cells, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from motionloom.config.recipe import Recipe
from motionloom.data.buckets import Bucket
from motionloom.data.cache.identity import Identity, mismatches
from motionloom.data.cache.tables import CLIPS, TEXT, Blobs, hold_open, open_table, read_table
from motionloom.data.cache.text import TextTable
from motionloom.errors import UserError
from motionloom.rng import numpy_rng
from motionloom.tokenizers import Tokenizer, load_tokenizer
from motionloom.tokenizers.scenes import decode_scenes

_COLUMNS = ("id", "clip", "crop", "bucket", "captions", "wordings", "scene_frames", "source", "stamp")
_ITEM = np.dtype(np.float16)


@dataclass(frozen=True)
class Row:
    """One cached crop of a clip."""

    id: str
    clip: str
    """The clip's own id: the same for all its crops."""
    crop: int
    bucket: Bucket
    captions: list[str]
    """Per scene."""
    wordings: list[str]
    """All captions of a clip of one scene, its own first; they say the same."""
    scene_frames: list[int]
    """Pixel frames of each scene."""
    source: str
    latents_FhwC: Tensor
    """Normalised latents, float32."""

    def decode(self, tokenizer: Tokenizer) -> Tensor:
        """Its pixels after ``tokenizer``, uint8 (P, H, W, 3); shots coded alone are decoded alone."""
        shots = self.bucket.shots or (self.bucket.frames,)
        return decode_scenes(tokenizer, self.latents_FhwC[None], shots)[0]


class Cache:
    """An open cache at the version that it had when it was opened. Rows are sorted by id.

    Safe for threads; not for fork.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.identity = Identity.read(path)
        self._held = hold_open(path)
        self._dataset = open_table(path / CLIPS)
        if self._dataset is None or self._dataset.count_rows() == 0:
            raise UserError(
                f"{path}: holds no clip yet; fill it: motionloom cache RECIPE --manifest M --out {path}"
            )
        rows = read_table(self._dataset, _COLUMNS)
        self.ids: list[str] = rows["id"].to_pylist()
        order = sorted(range(len(self.ids)), key=self.ids.__getitem__)
        self.ids = [self.ids[i] for i in order]
        self._place = np.array(order)
        self._rows: pa.Table = rows.take(pa.array(order)).combine_chunks()

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def clips(self) -> list[str]:
        """The clip's own id, per row."""
        return self._rows["clip"].to_pylist()

    @cached_property
    def buckets(self) -> dict[Bucket, NDArray[np.int64]]:
        """Row numbers of each bucket, in order of id."""
        names = self._names
        found = {Bucket.parse(str(name)): np.flatnonzero(names == name) for name in np.unique(names)}
        return dict(sorted(found.items()))

    @cached_property
    def _names(self) -> NDArray[np.str_]:
        return np.array(self._rows["bucket"].to_pylist())

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, int, int, int]]:
        return {str(bucket): self.latent_shape(bucket) for bucket in self.buckets}

    @property
    def fps(self) -> float:
        """Pixel frames per second of every clip."""
        made_with = self.identity.made_with
        return made_with["video.fps"] / made_with["video.frame_stride"]

    def latent_shape(self, bucket: Bucket) -> tuple[int, int, int, int]:
        """(F, h, w, C) of a bucket's clips."""
        spec = self.identity.spec
        return *bucket.latent_grid(spec), spec.channels

    def row(self, i: int) -> Row:
        """Row number ``i``."""
        return self.rows([i])[0]

    def rows(self, numbers: Iterable[int]) -> list[Row]:
        """Rows by number, in this order."""
        numbers = list(numbers)
        told = [{**row, "bucket": Bucket.parse(row["bucket"])} for row in self.metadata(numbers)]
        latents = [torch.from_numpy(x.astype(np.float32)) for x in self.latents(numbers)]
        return [Row(**row, latents_FhwC=x_FhwC) for row, x_FhwC in zip(told, latents, strict=True)]

    def metadata(self, numbers: Iterable[int]) -> list[dict]:
        """All but the latents of these rows, as plain values; the fields are those of `Row`."""
        return self._rows.take(pa.array(list(numbers), pa.int64())).drop_columns(["stamp"]).to_pylist()

    def latents(self, numbers: Iterable[int]) -> list[NDArray[np.float16]]:
        """Latents (F, h, w, C) of these rows as stored."""
        numbers = [int(n) for n in numbers]
        blobs = self._latents.take([int(self._place[n]) for n in numbers])
        shapes = [self._shapes[self._names[n]] for n in numbers]
        return [blob.view(_ITEM).reshape(shape) for blob, shape in zip(blobs, shapes, strict=True)]

    @cached_property
    def text(self) -> TextTable | None:
        """Embeddings of the captions; None when the cache was made without."""
        dataset = open_table(self.path / TEXT)
        return None if dataset is None else TextTable(dataset)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the latents."""
        return load_tokenizer(self.path / "tokenizer")

    def mismatches(self, recipe: Recipe) -> list[str]:
        """Where the recipe would make another cache, one phrase per key; empty when this is its cache."""
        return mismatches(self.identity, recipe)

    def require(self, recipe: Recipe) -> None:
        """Raises `UserError` unless this is the cache that ``recipe`` makes."""
        if wrong := self.mismatches(recipe):
            raise UserError(
                f"{self.path}: is not the cache of this recipe: {'; '.join(wrong)}; "
                "give the recipe the cache's values, or make its own: motionloom cache RECIPE --manifest M "
                "--out DIR"
            )

    def statistics(self, sample: int = 512) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each channel, (C,) each, over a fixed draw of at most ``sample`` rows."""
        drawn = numpy_rng("cache statistics", len(self)).permutation(len(self))[:sample]
        values_NC = np.concatenate([x.reshape(-1, x.shape[-1]) for x in self.latents(drawn)])
        x_NC = torch.from_numpy(values_NC.astype(np.float32))
        return x_NC.mean(dim=0), x_NC.std(dim=0, correction=0)

    def verify(self) -> list[str]:
        """Read everything; one line per thing that is wrong, empty when all is well."""
        repeated = sorted({a for a, b in zip(self.ids, self.ids[1:], strict=False) if a == b})
        wrong = [f"{i}: stands more than once" for i in repeated]
        for number, id_ in enumerate(self.ids):
            wrong += self._verify_row(number, id_)
        if self.text is not None:
            wrong += self.text.verify()
        return wrong

    def _verify_row(self, number: int, id_: str) -> Iterator[str]:
        blob = self._latents.take([int(self._place[number])])[0]
        row = self.metadata([number])[0]
        bucket = Bucket.parse(row["bucket"])
        shape = self.latent_shape(bucket)
        if blob.nbytes != prod(shape) * _ITEM.itemsize:
            yield f"{id_}: {blob.nbytes} bytes of latents where {bucket} needs {prod(shape) * _ITEM.itemsize}"
        elif not np.isfinite(blob.view(_ITEM)).all():
            yield f"{id_}: latents that are not finite"
        frames, captions = row["scene_frames"], row["captions"]
        if sum(frames) != bucket.frames or len(captions) != len(frames):
            yield f"{id_}: scenes of {frames} frames and {len(captions)} captions in {bucket}"

    @cached_property
    def _latents(self) -> Blobs:
        total = sum(len(rows) * prod(self.latent_shape(b)) for b, rows in self.buckets.items())
        return Blobs(self._dataset, "latents", total * _ITEM.itemsize)


def open_cache(path: str | Path) -> Cache:
    """Open a cache.

    Raises:
        UserError: nothing is there, it is no cache, it is empty or damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(
            f"{path}: no such folder; make a cache: motionloom cache RECIPE --manifest M --out {path}"
        )
    return Cache(path)
