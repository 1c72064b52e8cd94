"""``pairs.json``: how the states of a teacher's walks came about, so that nobody learns from others unawares.

A state is what a solver stands on at a noise level; the levels are points of the grid of its walk. States
that were read from elsewhere have levels that somebody states, and no more is known of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from motionloom.durable import write_atomic
from motionloom.errors import UserError

PAIRS_FILE = "pairs.json"
FORMAT = 1
SAME = 1e-6
"""Noise levels that differ by no more are one: float32 rounds sigmas by less."""

WALKED, STATED = "the teacher's walk", "stated by the recipe"


@dataclass(frozen=True)
class PairsNote:
    """What decides the states of a cache. ``None``: whoever made them does not say."""

    sigmas: tuple[float, ...]
    """The whole grid of the walk, from 1 to 0; of states without a grid their levels and 0."""
    kept: tuple[int, ...]
    """Which of them have a state in the cache; the latents are the state at the last one, 0."""
    levels_from: str
    """``WALKED`` or ``STATED``."""
    modalities: tuple[str, ...]
    path: str
    tokenizer: str
    """Fingerprint; empty for sound alone."""
    audio_tokenizer: str = ""
    solver: str | None = None
    shift: float | None = None
    guidance: Mapping[str, Any] | None = None
    """``said`` and ``form`` as the recipe has them, ``scale`` as u + scale (c - u), and all terms."""
    negative: str | None = None
    seed: int | None = None
    """Of the noise; that of a row is keyed by it and the row's id."""
    teacher: Mapping[str, Any] | None = None
    """``where`` it was, ``weights``: their fingerprint, and its ``recipe``."""

    @property
    def levels(self) -> tuple[float, ...]:
        """The noise levels of the states, falling from 1."""
        return tuple(self.sigmas[i] for i in self.kept)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what decides the states; where the teacher was is no part of it."""
        return hashlib.sha256(json.dumps(self._decisive(), sort_keys=True).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Write ``pairs.json``, whole or not at all."""
        content = {"format": FORMAT, "levels": self.levels, **asdict(self)}
        write_atomic(folder / PAIRS_FILE, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())

    @staticmethod
    def read(folder: Path) -> PairsNote:
        """Read ``pairs.json``.

        Raises:
            UserError: it is missing, damaged, or of another format.
        """
        file = folder / PAIRS_FILE
        try:
            content = json.loads(file.read_text("utf-8"))
            if (found := content.pop("format")) != FORMAT:
                raise UserError(f"{file}: is of format {found}, this version reads {FORMAT}; make pairs anew")
            content.pop("levels")
            content |= {name: tuple(content[name]) for name in ("sigmas", "kept", "modalities")}
            note = PairsNote(**content)
            assert all(0 <= a < b for a, b in zip(note.levels[1:], note.levels, strict=False))
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            IndexError,
            AssertionError,
        ) as error:
            reason = getattr(error, "strerror", None) or f"{type(error).__name__} {error}".strip()
            raise UserError(f"{file}: cannot be read ({reason}); restore it or make the pairs anew") from None
        return note

    def differences(self, other: PairsNote) -> list[str]:
        """What decides the states and is not the same in the other, which is the wish; a phrase each."""
        mine, theirs = self._decisive(), other._decisive()
        return [
            f"{name} is {_shown(mine[name])} there and {_shown(theirs[name])} here"
            for name in mine
            if mine[name] != theirs[name]
        ]

    def _decisive(self) -> dict[str, Any]:
        """By the name that a person knows it by."""
        teacher = self.teacher or {}
        recipe = teacher.get("recipe", {})
        # Said as a scale or as a delta, guidance is what acts.
        acting = {k: v for k, v in (self.guidance or {}).items() if k not in ("said", "form")}
        scale = acting.pop("scale", None)
        return {
            "the teacher (its weights)": str(teacher.get("weights"))[:16],
            "the teacher's plan": recipe.get("plan"),
            "the teacher's precision": recipe.get("train", {}).get("precision"),
            "distil.grid_steps": len(self.sigmas) - 1,
            "distil.shift": self.shift,
            "distil.grid_solver": self.solver,
            "the levels (distil)": list(self.levels),
            "guidance, as u + scale (c - u)": scale,
            "the terms of guidance": json.loads(json.dumps(acting)),
            "distil.negative": self.negative,
            "the path": self.path,
            "the tokenizer": self.tokenizer[:12],
            "the audio tokenizer": self.audio_tokenizer[:12],
            "what is made": list(self.modalities),
            "--seed": self.seed,
        }


def shown(levels: Sequence[float]) -> str:
    """Levels as a recipe has them, to be copied into ``distil.sigmas``."""
    return f"[{','.join(f'{level:.8g}' for level in levels)}]"


def _shown(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(one, float) for one in value):
        return shown(value)
    text = f"{value:g}" if isinstance(value, float) else repr(value) if value == "" else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
