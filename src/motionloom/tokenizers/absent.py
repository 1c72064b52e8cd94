"""The tokenizer of models without a picture: it has a shape rule, and nothing to code.

Shapes: as in ``base.py``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from motionloom.config.entries import from_entries
from motionloom.errors import UserError
from motionloom.tokenizers.base import TokenizerSpec


@dataclass
class AbsentTokenizer:
    """What stands for pixels where a cache and its model hold sound alone."""

    spec: TokenizerSpec
    """As the recipe says: the backbone keeps its video half, untrained."""

    def encode(self, video_BPHW3: Tensor) -> Tensor:
        """Refused."""
        _refuse()

    def decode(self, latents_BFhwC: Tensor) -> Tensor:
        """Refused."""
        _refuse()

    def stream_decode(self, latents: Iterable[Tensor]) -> Iterator[Tensor]:
        """Refused."""
        _refuse()

    def resume_from(self, latent: int) -> int:
        """Refused."""
        _refuse()

    def fingerprint(self) -> str:
        """The same for all: there is nothing to differ."""
        return "absent"

    def save(self, folder: Path) -> None:
        """Write the shape rule."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(json.dumps({"type": "absent", **asdict(self.spec)}, indent=1))

    @staticmethod
    def load(folder: Path, settings: dict[str, Any]) -> AbsentTokenizer:
        """Read what :meth:`save` wrote; ``settings`` is the content of its json without ``type``."""
        where = str(folder / "tokenizer.json")
        return AbsentTokenizer(from_entries(TokenizerSpec, settings, where, "absent"))


def _refuse() -> NoReturn:
    raise UserError(
        "this model knows sound alone: train one with plan.modalities: [video, audio] for pictures"
    )
