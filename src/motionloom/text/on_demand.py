"""A frozen text encoder whose embeddings are cached already: its model is read when there is something new to
encode, such as the prompts of a preview, and not at all by training alone."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from torch import Tensor

from motionloom.config.recipe import TextEncoderConfig
from motionloom.errors import UserError
from motionloom.text.base import TextEncoder


class OnDemand:
    """Under the protocol of :class:`~motionloom.text.base.TextEncoder`.

    Args:
        module: of the encoder; it offers ``build(config, seed)`` and ``describe(config)``.
        dim: channels of its embeddings.
        fingerprint: of the encoder that made them.
    """

    trainable = False

    def __init__(self, module: str, config: TextEncoderConfig, dim: int, fingerprint: str) -> None:
        self._module, self._config, self._fingerprint = module, config, fingerprint
        self.dim, self.max_length = dim, config.max_length

    @cached_property
    def _encoder(self) -> TextEncoder:
        encoder: TextEncoder = importlib.import_module(self._module).build(self._config, 0)
        if encoder.fingerprint() != self._fingerprint:
            raise UserError(
                f"text_encoder.name_or_path {self._config.name_or_path}: is not the text encoder that made "
                "the cache's embeddings (its weights or tokenizer changed): put the former back, or cache "
                "again"
            )
        return encoder

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """As the encoder itself.

        Raises:
            UserError: it cannot be had, or is no longer the one that made the embeddings.
        """
        return self._encoder.encode(captions)

    def count_cut(self, captions: Sequence[str]) -> int:
        """As the encoder itself."""
        return self._encoder.count_cut(captions)

    def fingerprint(self) -> str:
        """Of the encoder that made the embeddings."""
        return self._fingerprint

    def save(self, folder: Path) -> None:
        """Write what the encoder itself would: which model, and its fingerprint."""
        folder.mkdir(parents=True, exist_ok=True)
        settings = importlib.import_module(self._module).describe(self._config)
        settings["fingerprint"] = self._fingerprint
        (folder / "text_encoder.json").write_text(json.dumps(settings, indent=2) + "\n")
