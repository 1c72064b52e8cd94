"""Tokenizers: pixels to latents and back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from motionloom.config.recipe import TokenizerConfig
from motionloom.errors import UserError
from motionloom.tokenizers.base import Tokenizer, TokenizerSpec
from motionloom.tokenizers.patch import PatchTokenizer

TOKENIZERS = {"patch": PatchTokenizer}
"""Tokenizers by recipe name."""


def fit_tokenizer(config: TokenizerConfig, clips: Sequence[Tensor]) -> Tokenizer:
    """A new tokenizer from uint8 clips (P, H, W, 3)."""
    return TOKENIZERS[config.type].fit(config, clips)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Read a tokenizer folder.

    Raises:
        UserError: the folder is missing or is not a tokenizer.
    """
    folder = Path(folder)
    note = folder / "tokenizer.json"
    if not note.is_file():
        raise UserError(f"{folder}: no tokenizer here ({note.name} is missing): name a saved one")
    try:
        settings = json.loads(note.read_text())
        kind = settings.pop("type")
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{note}: not a tokenizer's ({error}): fit or copy it again") from None
    if kind not in TOKENIZERS:
        raise UserError(f"{note}: type {kind!r} is unknown: this version has {', '.join(TOKENIZERS)}")
    return TOKENIZERS[kind].load(folder, settings)


__all__ = ["TOKENIZERS", "Tokenizer", "TokenizerSpec", "fit_tokenizer", "load_tokenizer"]
