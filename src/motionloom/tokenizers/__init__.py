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
    try:
        settings = json.loads((folder / "tokenizer.json").read_text())
        kind = settings.pop("type")
        return TOKENIZERS[kind].load(folder, settings)
    except FileNotFoundError as error:
        raise UserError(
            f"{folder}: no tokenizer here ({error.filename} is missing): name a saved one"
        ) from None
    except Exception as error:
        raise UserError(f"{folder}: not a readable tokenizer ({error}): fit or copy it again") from None


__all__ = ["TOKENIZERS", "Tokenizer", "TokenizerSpec", "fit_tokenizer", "load_tokenizer"]
