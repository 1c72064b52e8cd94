"""What the loop tells whoever watches. The command line hands in an object that draws it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Progress:
    """After one optimiser step."""

    step: int
    max_steps: int
    steps_per_second: float
    """Of this session, pauses for checkpoints and previews included."""
    seconds_left: float
    """Until ``max_steps`` or ``max_minutes``, whichever comes first."""
    values: Mapping[str, float] = field(default_factory=dict)
    """The line of ``metrics.jsonl``, at steps that write one."""


class Reporter(Protocol):
    """Called in the main process only."""

    def step(self, progress: Progress) -> None:
        """After every optimiser step."""
        ...

    def note(self, message: str) -> None:
        """Something worth a line: where it resumed, that it is stopping."""
        ...


class Silent:
    """A reporter for scripts and tests."""

    def step(self, progress: Progress) -> None:
        """Says nothing."""

    def note(self, message: str) -> None:
        """Says nothing."""
