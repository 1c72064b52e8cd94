"""Ordered patterns over dotted names: which layers get adapters, which parameters are trained."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from motionloom.errors import UserError


@dataclass(frozen=True)
class Target:
    """What one pattern chose."""

    pattern: str
    modules: tuple[str, ...]
    parameters: int
    """Trained numbers; 0 for a pattern that leaves out."""


def table(targets: Sequence[Target]) -> list[list[str]]:
    """Pattern, modules, parameters: a row each, and their sum."""
    rows = [[t.pattern, str(len(t.modules)), f"{t.parameters:,}"] for t in targets]
    modules = sum(len(t.modules) for t in targets if t.parameters)
    return [*rows, ["together", str(modules), f"{sum(t.parameters for t in targets):,}"]]


def choose(
    names: Sequence[str], patterns: Sequence[str], key: str, kind: str, near: Sequence[str] = ()
) -> dict[str, tuple[str, ...]]:
    """Which of ``names`` each pattern takes, by pattern.

    A pattern is dotted parts of a name, in a row and anywhere in it; ``*`` stands for any letters within one
    part. ``attn1`` takes every name with a part that is called so, ``attn1.to_q`` one in each, and
    ``!blocks.0`` leaves out what it fits. The first pattern that fits a name decides.

    Args:
        key: of the recipe, for messages.
        kind: what the names are of: ``linear layer``.
        near: names to suggest parts of; none: ``names``.

    Raises:
        UserError: a pattern that fits nothing, or only what earlier patterns have decided; or all leave out.
    """
    chosen: dict[str, tuple[str, ...]] = {}
    left = names
    for pattern in patterns:
        fits = _matcher(pattern.removeprefix("!"))
        taken = tuple(name for name in left if fits(name))
        if not taken:
            raise UserError(f"{key}: {_why_nothing(pattern, any(map(fits, names)), kind, near or names)}")
        chosen[pattern] = taken
        left = [name for name in left if name not in set(taken)]
    if all(pattern.startswith("!") for pattern in patterns):
        raise UserError(f"{key} only leaves out: name what is to be trained as well")
    return chosen


def _matcher(pattern: str) -> Any:
    inner = re.escape(pattern).replace(r"\*", "[^.]*")
    return re.compile(rf"(?:^|\.){inner}(?:\.|$)").search


def _why_nothing(pattern: str, decided: bool, kind: str, near: Sequence[str]) -> str:
    if decided:
        return f"{pattern} only fits what patterns before it have decided: move it up or remove it"
    tails = sorted({tail for name in near for tail in _tails(name)})
    likely = get_close_matches(pattern.removeprefix("!"), tails, 3, cutoff=0.5)
    told = likely or sorted({next(_tails(name)) for name in near})
    return f"{pattern} fits no {kind} of this model; near are {', '.join(told)}"


def _tails(name: str) -> Iterator[str]:
    """What a pattern may say, without the numbers of blocks: ``blocks.0.attn.to_out.0`` -> to_out.0,
    attn.to_out.0."""
    parts = name.split(".")
    for start in range(len(parts) - 1, -1, -1):
        if parts[start].isdigit():
            if start < len(parts) - 1:
                return
            continue
        yield ".".join(parts[start:])
