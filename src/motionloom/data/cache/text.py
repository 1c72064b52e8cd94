"""Caption embeddings of a frozen text encoder, one row per distinct caption; latents are left alone.

Shapes: L valid tokens of a caption, C channels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from motionloom.config.recipe import Recipe
from motionloom.data.cache.tables import TEXT, TEXT_SCHEMA, Blobs, Writer, open_table, read_table
from motionloom.text import TextEncoder

_MADE_BY = b"motionloom"
_BATCH = 64
# What one commit may hold; a kill loses no more than this.
_COMMIT_BYTES = 2**26


def is_trained(recipe: Recipe) -> bool:
    """Whether the recipe trains its text encoder, so that embeddings cannot be cached."""
    return recipe.text_encoder.type == "hash" and recipe.text_encoder.trainable


def text_settings(recipe: Recipe) -> dict[str, Any]:
    """The recipe keys that decide the embeddings of its frozen text encoder."""
    config = recipe.text_encoder
    names = {
        "hash": ("dim", "vocab_size"),
        "hf": ("name_or_path", "dtype", "padding"),
        "ltx2": ("name_or_path", "dtype", "connectors"),
        "classes": ("classes",),
    }[config.type]
    said = config.model_dump(mode="json")  # as the cache's note keeps it
    found = {f"text_encoder.{name}": said[name] for name in ("type", "max_length", *names)}
    return found | ({"seed": recipe.seed} if config.type == "hash" else {})


class TextTable:
    """The embeddings in a cache, by caption."""

    def __init__(self, dataset: Any) -> None:
        made_by = json.loads(dataset.schema.metadata[_MADE_BY])
        self.settings: dict[str, Any] = made_by["settings"]
        self.fingerprint: str = made_by["fingerprint"]
        self.dim: int = made_by["dim"]
        self.max_length: int = made_by["max_length"]
        self._dtype: torch.dtype = getattr(torch, made_by["dtype"])
        rows = read_table(dataset, ("caption", "tokens"))
        self._row = {caption: i for i, caption in enumerate(rows["caption"].to_pylist())}
        tokens = sum(rows["tokens"].to_pylist())
        self._blobs = Blobs(dataset, "embedding", tokens * self.dim * self._dtype.itemsize)

    def __len__(self) -> int:
        return len(self._row)

    def missing(self, captions: Iterable[str]) -> list[str]:
        """Those of the captions that have no embedding."""
        return sorted({caption for caption in captions if caption not in self._row})

    def embed(self, captions: Sequence[str]) -> list[Tensor]:
        """Valid tokens (L, C) of each caption, float32."""
        blobs = self._blobs.take([self._row[caption] for caption in captions])
        # torch wants a writable buffer to share; float() copies anyway, unless the dtype is float32 already.
        return [torch.frombuffer(bytearray(b), dtype=self._dtype).view(-1, self.dim).float() for b in blobs]

    def mismatches(self, recipe: Recipe) -> list[str]:
        """Where the recipe's encoder is not the one that made the embeddings, one phrase per key."""
        wanted = text_settings(recipe)
        return [
            f"{key} is {self.settings.get(key)} in the cache and {wanted.get(key)} in the recipe"
            for key in sorted(wanted.keys() | self.settings.keys())
            if wanted.get(key) != self.settings.get(key)
        ]

    def verify(self) -> list[str]:
        """One line per caption whose embedding is empty or not finite."""
        wrong = []
        for caption in sorted(self._row):
            x_LC = self.embed([caption])[0]
            if len(x_LC) == 0 or not x_LC.isfinite().all():
                wrong.append(f"caption {caption[:60]!r}: an embedding that is empty or not finite")
        return wrong


def cache_text(
    folder: Path,
    recipe: Recipe,
    encoder: TextEncoder,
    captions: Iterable[str],
    on_progress: Callable[[int, int], None],
) -> int:
    """Embed the captions without a row, the empty one included; all, if another encoder made the rows.

    Returns how many were embedded.
    """
    path = folder / TEXT
    note = _note(recipe, encoder)
    present = _present(path, note)
    writer = Writer(path, TEXT_SCHEMA.with_metadata({_MADE_BY: json.dumps(note)}), fresh=not present)
    # Captions of like length together: little padding is computed.
    todo = sorted({"", *captions} - present, key=lambda caption: (len(caption), caption))
    rows: list[dict[str, Any]] = []
    for begin in range(0, len(todo), _BATCH):
        rows += _embed(encoder, todo[begin : begin + _BATCH])
        done = min(begin + _BATCH, len(todo))
        if done == len(todo) or sum(len(row["embedding"]) for row in rows) > _COMMIT_BYTES:
            writer.append(rows)
            rows = []
        on_progress(done, len(todo))
    writer.tidy()
    return len(todo)


def _note(recipe: Recipe, encoder: TextEncoder) -> dict[str, Any]:
    """What made the embeddings, as the table's schema keeps it."""
    probe, _ = encoder.encode([""])
    return {
        "fingerprint": encoder.fingerprint(),
        "settings": text_settings(recipe),
        "dim": encoder.dim,
        "max_length": encoder.max_length,
        "dtype": str(probe.dtype).removeprefix("torch."),
    }


def _present(path: Path, note: dict[str, Any]) -> set[str]:
    """Captions that have an embedding by this very encoder."""
    had = open_table(path)
    if had is None:
        return set()
    old = json.loads(had.schema.metadata[_MADE_BY])
    if {**old, "settings": None} != {**note, "settings": None}:
        return set()
    if old != note:  # the same weights under another name
        had.replace_schema_metadata({_MADE_BY.decode(): json.dumps(note)})
    return set(read_table(had, ["caption"])["caption"].to_pylist())


@torch.no_grad()
def _embed(encoder: TextEncoder, captions: Sequence[str]) -> list[dict[str, Any]]:
    x_BLC, valid_BL = encoder.encode(captions)
    rows = []
    for caption, x_LC, valid_L in zip(captions, x_BLC.cpu(), valid_BL.cpu(), strict=True):
        tokens_LC = x_LC[valid_L].contiguous()
        embedding = tokens_LC.view(-1).view(torch.uint8).numpy().tobytes()
        rows.append({"caption": caption, "tokens": len(tokens_LC), "embedding": embedding})
    return rows
