"""Captions that are classes: each is one word, one-hot, and the empty caption is the class after the last.

For class-to-image models, whose table of classes has a row more than there are classes, for guidance.

Shapes: B batch, C = classes + 1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from motionloom.config.recipe import TextEncoderConfig
from motionloom.errors import UserError


class ClassEncoder:
    """Under the protocol of :class:`~motionloom.text.base.TextEncoder`; there is nothing to train.

    Args:
        classes: all different, none empty; the order is that of the table's rows.
    """

    trainable = False
    max_length = 1

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self.dim = len(self.classes) + 1
        self._row = {name: i for i, name in enumerate(self.classes)} | {"": len(self.classes)}

    def rows(self, captions: Sequence[str]) -> list[int]:
        """Where captions stand among the classes; the empty one behind them all.

        Raises:
            UserError: a caption is none of them.
        """
        for caption in captions:
            if caption not in self._row:
                close = get_close_matches(caption, self.classes, 1)
                meant = f"did you mean {close[0]!r}?" if close else "write one of them, or nothing"
                raise UserError(
                    f"caption {caption[:60]!r} is none of the {len(self.classes)} text_encoder.classes: "
                    f"{meant}"
                )
        return [self._row[caption] for caption in captions]

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions -> one-hot words (B, 1, C), all of them valid (B, 1). Raises UserError as :meth:`rows`."""
        rows_B = torch.tensor(self.rows(captions), dtype=torch.long)
        return F.one_hot(rows_B, self.dim).float()[:, None], torch.ones(len(captions), 1, dtype=torch.bool)

    def count_cut(self, captions: Sequence[str]) -> int:
        """None: a class is one word."""
        return 0

    def fingerprint(self) -> str:
        """Digest of the classes in their order."""
        return hashlib.sha256(json.dumps(self._settings()).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write ``text_encoder.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "text_encoder.json").write_text(json.dumps(self._settings(), indent=2) + "\n")

    def _settings(self) -> dict[str, Any]:
        return {"type": "classes", "classes": list(self.classes)}


def check(config: TextEncoderConfig) -> int:
    """Channels of a recipe's encoder, which can always be had."""
    return len(config.classes) + 1


def describe(config: TextEncoderConfig) -> dict[str, Any]:
    """What :meth:`ClassEncoder.save` writes."""
    return {"type": "classes", "classes": list(config.classes)}


def build(config: TextEncoderConfig, seed: int) -> ClassEncoder:
    """The encoder that a recipe names; ``seed`` decides nothing."""
    return ClassEncoder(config.classes)


def load(folder: Path, settings: dict[str, Any]) -> ClassEncoder:
    """The encoder that :meth:`ClassEncoder.save` wrote. Raises UserError where its classes are no list of
    texts."""
    classes = settings.get("classes")
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{folder / 'text_encoder.json'}: classes is no list of texts: copy the folder whole")
    return ClassEncoder(classes)
