"""What is said of the samples of a batch, and for a frozen text encoder the embeddings of it.

Shapes: B batch, S captions laid end to end, L text tokens of a caption, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from motionloom.config.recipe import Recipe
from motionloom.data.buckets import Bucket
from motionloom.data.cache import Cache, TextTable, is_trained
from motionloom.data.samples import Piece, Sample
from motionloom.errors import UserError
from motionloom.plans.layout import Text
from motionloom.rng import key_to_seed
from motionloom.text.base import Blocks


@dataclass(frozen=True)
class Said:
    """Captions of the samples of a batch."""

    captions: list[list[str]]
    """Per sample, per scene."""
    global_captions: list[str] | None
    """Of the whole; empty: nothing. None: the recipe wants none."""
    reference_captions: list[str | None] | None
    """None: no reference of the cache has a caption."""


class Captions:
    """The captions of the rows of a split.

    Args:
        rows: all that may be asked for.

    Raises:
        UserError: the recipe wants something that the cache lacks: embeddings, or captions of the whole.
    """

    def __init__(self, cache: Cache, recipe: Recipe, rows: Sequence[int]) -> None:
        self._seed, self._ids = recipe.seed, cache.ids
        self._of_row: dict[int, dict[str, Any]] = dict(zip(rows, cache.metadata(rows), strict=True))
        self._wants_global = recipe.stories.global_caption
        self._of_reference: dict[int, str | None] = {}
        if recipe.references.enabled:
            self._of_reference = dict(zip(rows, cache.reference_captions(rows), strict=True))
        self._has_references = any(self._of_reference.values())
        if self._wants_global and (lost := [row for row in rows if self._lacks_global(row)]):
            raise UserError(
                f"{cache.path}: {self._ids[lost[0]]} has no caption of the whole, which "
                "stories.global_caption wants; run motionloom cache on it again (latents are kept)"
            )
        self._table = None if is_trained(recipe) else _embeddings(cache, recipe, self._all())
        self.empty = lru_cache(maxsize=None)(self._empty)
        """The empty caption in so many scenes, batch 1."""

    def scene_frames(self, row: int) -> tuple[int, ...]:
        """Pixel frames of each scene of a row."""
        return tuple(self._of_row[row]["scene_frames"])

    def of(self, samples: Sequence[Sample], n: int | None) -> Said:
        """What is said of these samples. Batch number ``n`` draws among a clip's wordings; without one the
        clip's own caption is taken."""
        references = [self._of_reference.get(sample[0].row) for sample in samples]
        return Said(
            [[caption for piece in sample for caption in self._piece(piece, n)] for sample in samples],
            [self._whole(sample, n) for sample in samples] if self._wants_global else None,
            references if self._has_references else None,
        )

    def embed(self, said: Said) -> Text | None:
        """Embeddings laid end to end, each padded to full length; None for a trained encoder."""
        return self._lay(Blocks.of(said.captions, said.global_captions, said.reference_captions))

    def _empty(self, scenes: int) -> Text | None:
        whole, references = [""] * self._wants_global or None, [""] * self._has_references or None
        return self._lay(Blocks.of([[""] * scenes], whole, references))

    def _lay(self, blocks: Blocks) -> Text | None:
        table = self._table
        if table is None:
            return None
        size = (len(blocks.captions), len(blocks.scenes), table.max_length)
        x_BSLC, valid_BSL = torch.zeros(*size, table.dim), torch.zeros(size, dtype=torch.bool)
        for b, sample in enumerate(blocks.captions):
            places = [s for s, caption in enumerate(sample) if caption is not None]
            found = table.embed([caption for caption in sample if caption is not None])
            for s, x_LC in zip(places, found, strict=True):
                x_BSLC[b, s, : len(x_LC)] = x_LC
                valid_BSL[b, s, : len(x_LC)] = True
        return blocks.lay(x_BSLC, valid_BSL)

    def _piece(self, piece: Piece, n: int | None) -> list[str]:
        told = self._of_row[piece.row]
        captions: list[str] = told["captions"]
        if len(captions) == 1:
            return [self._wording(piece.row, n, captions[0])]
        # A clip that was encoded as a whole has one part, whatever its scenes.
        apart = bool(Bucket.parse(told["bucket"]).shots)
        return captions[piece.first : piece.first + piece.count] if apart else captions

    def _whole(self, sample: Sample, n: int | None) -> str:
        """Of a story; unrelated clips have nothing in common to be told."""
        told = self._of_row[sample[0].row]
        if len(sample) > 1 or len(told["captions"]) == 1:
            return ""
        return self._wording(sample[0].row, n, told["wordings"][0])

    def _wording(self, row: int, n: int | None, own: str) -> str:
        wordings: list[str] = self._of_row[row]["wordings"]
        if n is None or len(wordings) < 2:
            return own
        return wordings[key_to_seed(self._seed, "wording", n, self._ids[row]) % len(wordings)]

    def _lacks_global(self, row: int) -> bool:
        return len(self._of_row[row]["captions"]) > 1 and not self._of_row[row]["wordings"]

    def _all(self) -> set[str]:
        """Every caption that may be asked for."""
        found = {caption for told in self._of_row.values() for caption in told["captions"]}
        for told in self._of_row.values():
            if len(told["captions"]) == 1 or self._wants_global:
                found |= set(told["wordings"])
        return found | {caption for caption in self._of_reference.values() if caption}


def _embeddings(cache: Cache, recipe: Recipe, captions: Iterable[str]) -> TextTable:
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
