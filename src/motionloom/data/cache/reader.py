"""A cache, read: rows by number, text embeddings by caption, statistics and a check of everything.

Shapes: F latent frames, h x w latent cells, C channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from motionloom.config.recipe import Recipe
from motionloom.data.buckets import Bucket
from motionloom.data.cache.identity import Identity, mismatches
from motionloom.data.cache.makers import cached_audio_tokenizer, cached_tokenizer
from motionloom.data.cache.pairs_note import PairsNote
from motionloom.data.cache.tables import CLIPS, TEXT, Blobs, hold_open, open_table, read_table
from motionloom.data.cache.text import TextTable
from motionloom.errors import UserError
from motionloom.rng import numpy_rng
from motionloom.tokenizers import AudioTokenizer, Tokenizer
from motionloom.tokenizers.scenes import decode_scenes

_COLUMNS = ("id", "clip", "crop", "bucket", "captions", "wordings", "scene_frames", "source", "stamp")
# In the tables that have them.
_BESIDE = ("sound_latents", "reference_grid", "reference_caption", "reference_sound_latents", "masked")
_ITEM = np.dtype(np.float16)
PIXELS_AT_ONCE = 2**20
"""How many are decoded together: of small clips a call costs more than the work."""


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
    """All captions of the clip as a whole, its own first; they say the same."""
    scene_frames: list[int]
    """Pixel frames of each scene."""
    source: str
    latents_FhwC: Tensor
    """Normalised latents, float32."""

    def decode(self, tokenizer: Tokenizer) -> Tensor:
        """Its pixels after ``tokenizer``, uint8 (P, H, W, 3); shots coded alone are decoded alone."""
        return decode_scenes(tokenizer, self.latents_FhwC[None], self.bucket.alone)[0]


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
        self._lists: dict[str, list[Any]] = {}
        self._has = frozenset(self._dataset.schema.names)
        rows = read_table(self._dataset, [*_COLUMNS, *(name for name in _BESIDE if name in self._has)])
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

    def bucket_of(self, number: int) -> Bucket:
        """The bucket of a row."""
        return self._parsed[str(self._names[number])]

    @cached_property
    def _parsed(self) -> dict[str, Bucket]:
        return {str(bucket): bucket for bucket in self.buckets}

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

    def decoded(self, numbers: Iterable[int], tokenizer: Tokenizer) -> Iterator[Tensor]:
        """What :meth:`Row.decode` gives, for each of these rows in order; neighbours alike go together.

        Equal to it but for the order of sums. Rows of sound alone have no pixels.
        """
        for bucket, alike in itertools.groupby(numbers, key=self.bucket_of):
            assert not bucket.is_sound, bucket
            at_once = max(1, PIXELS_AT_ONCE // (bucket.frames * bucket.height * bucket.width))
            while some := self.rows(itertools.islice(alike, at_once)):
                latents_BFhwC = torch.stack([row.latents_FhwC for row in some])
                yield from decode_scenes(tokenizer, latents_BFhwC, bucket.alone)

    def metadata(self, numbers: Iterable[int]) -> list[dict]:
        """All but the latents of these rows, as plain values; the fields are those of `Row`."""
        told = self._rows.select(_COLUMNS[:-1])
        return told.take(pa.array(list(numbers), pa.int64())).to_pylist()

    def _values(self, column: str) -> list[Any]:
        """A small column as plain values, by row number."""
        if column not in self._lists:
            self._lists[column] = self._rows[column].to_pylist()
        return self._lists[column]

    def latents(self, numbers: Iterable[int]) -> list[NDArray[np.float16]]:
        """Latents (F, h, w, C) of these rows as stored."""
        numbers = [int(n) for n in numbers]
        blobs = self._latents.take([int(self._place[n]) for n in numbers])
        shapes = [self._shapes[self._names[n]] for n in numbers]
        return [blob.view(_ITEM).reshape(shape) for blob, shape in zip(blobs, shapes, strict=True)]

    # What stands beside the frames. A cache of before there was such a thing has none of it.

    @property
    def has_video(self) -> bool:
        """False for a cache of sound alone, which has no tokenizer of pixels either."""
        return bool(self.identity.tokenizer)

    @property
    def has_sound(self) -> bool:
        """Whether the sound of its clips was cached; single ones may be silent."""
        return "sound" in self._has

    @property
    def has_references(self) -> bool:
        """Whether references were cached; single clips may have none."""
        return "reference" in self._has

    @property
    def has_masks(self) -> bool:
        """Whether masks were cached; single clips may have none."""
        return "mask" in self._has

    @cached_property
    def has_stories(self) -> bool:
        """Whether a clip has more than one shot."""
        return any(len(frames) > 1 for frames in self._values("scene_frames"))

    def stamps(self, numbers: Iterable[int]) -> list[str]:
        """What changes with the files that each row was made of, those beside it as well."""
        return [self._values("stamp")[n] for n in numbers]

    def silent(self, numbers: Iterable[int]) -> list[bool]:
        """Of each row whether it has no sound."""
        return [not (self.has_sound and self._values("sound_latents")[n]) for n in numbers]

    def sounds(self, numbers: Sequence[int]) -> list[list[NDArray[np.float16]] | None]:
        """Sound latents (T, C) of each part that was encoded alone (the shots, or the clip as a whole); None
        for a silent clip."""
        counts = self._values("sound_latents")
        found: list[list[NDArray[np.float16]] | None] = []
        for number, blob in zip(numbers, self._blobs["sound"].take(self._places(numbers)), strict=True):
            x_TC = blob.view(_ITEM).reshape(-1, self._sound_channels)
            cuts = list(itertools.accumulate(counts[number]))
            parts = [x_TC[begin:end] for begin, end in itertools.pairwise([0, *cuts])]
            found.append(parts or None)
        return found

    def references(self, numbers: Sequence[int]) -> list[NDArray[np.float16] | None]:
        """Latents (F, h, w, C) of each row's reference; None where there is none."""
        blobs = self._blobs["reference"].take(self._places(numbers))
        grids = [self._values("reference_grid")[n] for n in numbers]
        channels = self.identity.spec.channels
        return [
            blob.view(_ITEM).reshape(*grid, channels) if grid else None
            for blob, grid in zip(blobs, grids, strict=True)
        ]

    def reference_sounds(self, numbers: Sequence[int]) -> list[NDArray[np.float16] | None]:
        """Sound latents (T, C) of each row's reference; None where there are none."""
        if "reference_sound" not in self._has:
            return [None] * len(numbers)
        blobs = self._blobs["reference_sound"].take(self._places(numbers))
        return [blob.view(_ITEM).reshape(-1, self._sound_channels) if len(blob) else None for blob in blobs]

    def reference_captions(self, numbers: Sequence[int]) -> list[str | None]:
        """What is seen in each row's reference, where the manifest says it."""
        return [self._values("reference_caption")[n] for n in numbers]

    def masks(self, numbers: Sequence[int]) -> list[NDArray[np.bool_] | None]:
        """Bool (F, h, w) of each row, True where a latent cell is given; None for a clip without a mask."""
        blobs = self._blobs["mask"].take(self._places(numbers))
        shapes = [self._shapes[self._names[n]][:3] for n in numbers]
        return [
            np.unpackbits(blob, count=prod(shape)).astype(bool).reshape(shape) if len(blob) else None
            for blob, shape in zip(blobs, shapes, strict=True)
        ]

    # What a teacher's walks left in a cache of pairs.

    @property
    def has_states(self) -> bool:
        """Whether its clips are where a teacher's walks ended, with states on the way."""
        return bool(self._has & {"states", "sound_states"})

    @cached_property
    def pairs(self) -> PairsNote:
        """How the states came about. Raises `UserError` if that cannot be read."""
        assert self.has_states, "a cache without states"
        return PairsNote.read(self.path)

    def states(self, numbers: Sequence[int]) -> list[NDArray[np.float16]]:
        """States (K, F, h, w, C) of each row at the K levels of :attr:`pairs`."""
        blobs = self._blobs["states"].take(self._places(numbers))
        shapes = [(len(self.pairs.levels), *self._shapes[self._names[n]]) for n in numbers]
        return [blob.view(_ITEM).reshape(shape) for blob, shape in zip(blobs, shapes, strict=True)]

    def sound_states(self, numbers: Sequence[int]) -> list[list[NDArray[np.float16]]]:
        """States (K, T, C) of each row's sound, of each part that was encoded alone."""
        counts, levels = self._values("sound_latents"), len(self.pairs.levels)
        blobs = self._blobs["sound_states"].take(self._places(numbers))
        found = []
        for number, blob in zip(numbers, blobs, strict=True):
            x_KTC = blob.view(_ITEM).reshape(levels, -1, self._sound_channels)
            cuts = list(itertools.accumulate(counts[number]))
            found.append([x_KTC[:, begin:end] for begin, end in itertools.pairwise([0, *cuts])])
        return found

    def audio_tokenizer(self) -> AudioTokenizer:
        """The tokenizer that made the sound's latents. Raises `UserError` as :meth:`tokenizer`."""
        if self.identity.audio_spec is None:
            raise UserError(f"{self.path}: holds no sound; make it again with audio.enabled=true")
        return cached_audio_tokenizer(self.path, self.identity)

    @property
    def _sound_channels(self) -> int:
        assert self.identity.audio_spec is not None, "a cache without sound"
        return self.identity.audio_spec.channels

    def _places(self, numbers: Sequence[int]) -> list[int]:
        return [int(self._place[n]) for n in numbers]

    @cached_property
    def text(self) -> TextTable | None:
        """Embeddings of the captions; None when the cache was made without."""
        dataset = open_table(self.path / TEXT)
        return None if dataset is None else TextTable(dataset)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the latents.

        Raises `UserError` in a cache of sound alone, or where another tokenizer has come in its place.
        """
        if not self.has_video:
            raise UserError(f"{self.path}: holds sound alone, and no tokenizer of pixels")
        return cached_tokenizer(self.path, self.identity)

    def mismatches(self, recipe: Recipe) -> list[str]:
        """Where the recipe would make another cache, one phrase per key; empty when this is its cache.

        A cache may hold more than the recipe asks for, such as sound.
        """
        return mismatches(self.identity, recipe, reading=True, stories=self.has_stories)

    def require(self, recipe: Recipe) -> None:
        """Raises `UserError` unless this is the cache that ``recipe`` makes."""
        if wrong := self.mismatches(recipe):
            raise UserError(
                f"{self.path}: is not the cache of this recipe: {'; '.join(wrong)}; "
                "give the recipe the cache's values, or make its own: motionloom cache RECIPE --manifest M "
                "--out DIR"
            )

    def statistics(self, sample: int = 512) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each channel, (C,) each, over a fixed draw of at most ``sample`` rows; of the
        sound where there is nothing else."""
        drawn = numpy_rng("cache statistics", len(self)).permutation(len(self))[:sample]
        if self.has_video:
            values_NC = np.concatenate([x.reshape(-1, x.shape[-1]) for x in self.latents(drawn)])
        else:
            sounds = self.sounds(drawn.tolist())
            values_NC = np.concatenate([part for parts in sounds for part in parts or ()])
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
        yield from self._verify_beside(number, id_)
        frames, captions = row["scene_frames"], row["captions"]
        if sum(frames) != bucket.frames or len(captions) != len(frames):
            yield f"{id_}: scenes of {frames} frames and {len(captions)} captions in {bucket}"

    def _verify_beside(self, number: int, id_: str) -> Iterator[str]:
        place = int(self._place[number])
        bucket = Bucket.parse(str(self._names[number]))
        needed = {
            "sound": sum(self._values("sound_latents")[number]) if self.has_sound else 0,
            "reference": prod(self._values("reference_grid")[number]) if self.has_references else 0,
        }
        channels = {"sound": self.identity.audio_spec, "reference": self.identity.spec}
        for column in self._has & {"sound", "reference"}:
            blob, spec = self._blobs[column].take([place])[0], channels[column]
            # The product of no numbers is 1: a clip without a reference has no grid.
            asked = needed[column] * spec.channels * _ITEM.itemsize if spec is not None and len(blob) else 0
            if blob.nbytes != asked:
                yield f"{id_}: {blob.nbytes} bytes of {column} where {asked} are needed"
            elif not np.isfinite(blob.view(_ITEM)).all():
                yield f"{id_}: {column} that is not finite"
        yield from self._verify_states(number, id_)
        if self.has_masks:
            blob = self._blobs["mask"].take([place])[0]
            asked = -(-prod(self.latent_shape(bucket)[:3]) // 8)
            if len(blob) not in (0, asked):
                yield f"{id_}: {len(blob)} bytes of mask where {bucket} needs {asked}"

    def _verify_states(self, number: int, id_: str) -> Iterator[str]:
        place, bucket = int(self._place[number]), Bucket.parse(str(self._names[number]))
        values = {"states": prod(self.latent_shape(bucket)), "sound_states": 0}
        if "sound_states" in self._has:
            values["sound_states"] = sum(self._values("sound_latents")[number]) * self._sound_channels
        for column in sorted(self._has & values.keys()):
            blob = self._blobs[column].take([place])[0]
            needed = len(self.pairs.levels) * values[column] * _ITEM.itemsize
            if blob.nbytes != needed:
                yield f"{id_}: {blob.nbytes} bytes of {column} where {needed} are needed"
            elif not np.isfinite(blob.view(_ITEM)).all():
                yield f"{id_}: {column} that are not finite"

    @cached_property
    def _latents(self) -> Blobs:
        return Blobs(self._dataset, "latents", self._latent_bytes)

    @cached_property
    def _latent_bytes(self) -> int:
        return sum(self._bytes_of(bucket) * len(rows) for bucket, rows in self.buckets.items())

    def _bytes_of(self, bucket: Bucket) -> int:
        return prod(self.latent_shape(bucket)) * _ITEM.itemsize

    @cached_property
    def _blobs(self) -> dict[str, Blobs]:
        """The columns beside the latents."""
        sizes = {"sound": 0, "reference": 0, "reference_sound": 0, "mask": 0}
        if self.has_sound:
            sizes["sound"] = (
                sum(map(sum, self._values("sound_latents"))) * self._sound_channels * _ITEM.itemsize
            )
        if self.has_references:
            cells = sum(prod(grid) for grid in self._values("reference_grid") if grid)
            sizes["reference"] = cells * self.identity.spec.channels * _ITEM.itemsize
        if "reference_sound" in self._has:
            heard = sum(self._values("reference_sound_latents"))
            sizes["reference_sound"] = heard * self._sound_channels * _ITEM.itemsize
        if self.has_states:
            levels = len(self.pairs.levels)
            sizes |= {"states": levels * self._latent_bytes, "sound_states": levels * sizes["sound"]}
        return {n: Blobs(self._dataset, n, size) for n, size in sizes.items() if n in self._has}


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
