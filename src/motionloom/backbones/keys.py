"""Names of the same weights in two layouts, as data that reads in both directions.

A family ships as its authors wrote it (the original layout) and as diffusers wrote it again, which is also
how the backbones here name their parameters. A :class:`KeyMap` says once how the two correspond.

Names are matched from the front, segment by segment; ``*`` stands for a block's number. What follows the
matched part (``.weight``, ``.bias``) is kept. Of several rules the one with the most segments wins, and a
name that no rule knows is the same in both layouts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from motionloom.errors import UserError


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor: the ``index``-th of ``of`` equal parts along its first dimension."""

    name: str
    index: int = 0
    of: int = 1


Origin = tuple[Piece, ...]
"""A tensor of one layout as rows of tensors of the other, one after the other."""


@dataclass(frozen=True)
class Fused:
    """A tensor that only the original has; its rows are cut into ``of`` equal pieces.

    ``parts`` names what diffusers has instead, and which of the pieces each takes, in its own order. A fused
    query, key, value is ``Fused("a.*.qkv", 3, {"b.*.q": (0,), "b.*.k": (1,), "b.*.v": (2,)})``.
    """

    original: str
    of: int
    parts: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        taken = sorted(index for pieces in self.parts.values() for index in pieces)
        assert taken == list(range(self.of)), f"{self.original}: every piece belongs to exactly one part"


@dataclass(frozen=True)
class KeyMap:
    """How a family's original names and diffusers' names correspond."""

    renamed: Mapping[str, str]
    """Original prefix -> diffusers prefix."""
    fused: tuple[Fused, ...] = ()
    dropped: tuple[str, ...] = ()
    """Original prefixes of tensors that are no weights of the network, such as tables of frequencies."""
    prefixes: tuple[str, ...] = ()
    """What may stand before every original name, such as ``model.diffusion_model.``; the first is what
    files are written with (put ``""`` first for none)."""
    marks: tuple[str, ...] = field(default=())
    """Original names by which a file is known to be of this family and layout: all must be there."""

    def to_diffusers(self, names: Iterable[str]) -> dict[str, Origin]:
        """Every diffusers name, and the rows of original tensors that make it.

        Raises:
            UserError: two originals want the same name.
        """
        found: dict[str, Origin] = {}
        for name in names:
            bare = self.without_prefix(name)
            if any(_match(rule, bare) for rule in self.dropped):
                continue
            for target, origin in self._from_original(name, bare).items():
                _put(found, target, origin)
        return found

    def to_original(self, names: Iterable[str]) -> dict[str, Origin]:
        """Every original name, and the rows of diffusers tensors that make it: undoes :meth:`to_diffusers`.

        Raises:
            UserError: parts of a fused tensor are missing, or two names want the same original.
        """
        prefix = self.prefixes[0] if self.prefixes else ""
        present = list(names)
        found: dict[str, Origin] = {}
        joined: dict[str, dict[int, Piece]] = {}
        for name in present:
            fused = self._part_of(name)
            if fused is None:
                _put(found, prefix + _renamed(name, self._backwards()), (Piece(name),))
                continue
            rule, target, pieces = fused
            for at, index in enumerate(pieces):
                joined.setdefault(prefix + target, {})[index] = Piece(name, at, len(pieces))
            if len(joined[prefix + target]) == rule.of:
                whole = joined.pop(prefix + target)
                _put(found, prefix + target, tuple(whole[index] for index in range(rule.of)))
        if joined:
            raise UserError(f"{next(iter(joined))}: some of its parts are missing: the weights are not whole")
        return found

    def without_prefix(self, name: str) -> str:
        """An original name without what may stand before it."""
        return next((name[len(p) :] for p in self.prefixes if p and name.startswith(p)), name)

    def _from_original(self, name: str, bare: str) -> dict[str, Origin]:
        for rule in self.fused:
            if (match := _match(rule.original, bare)) is not None:
                return {
                    _filled(part, match): tuple(Piece(name, index, rule.of) for index in pieces)
                    for part, pieces in rule.parts.items()
                }
        return {_renamed(bare, self.renamed): (Piece(name),)}

    def _part_of(self, name: str) -> tuple[Fused, str, tuple[int, ...]] | None:
        for rule in self.fused:
            for part, pieces in rule.parts.items():
                if (match := _match(part, name)) is not None:
                    return rule, _filled(rule.original, match), pieces
        return None

    def _backwards(self) -> dict[str, str]:
        backwards = {theirs: ours for ours, theirs in self.renamed.items()}
        assert len(backwards) == len(self.renamed), "two originals share a diffusers name"
        return backwards


@dataclass(frozen=True)
class _Match:
    numbers: tuple[str, ...]
    tail: str


def _match(pattern: str, name: str) -> _Match | None:
    """What the stars of ``pattern`` stand for if it is the front of ``name``, and what follows."""
    numbers, segments = [], name.split(".")
    wanted = pattern.split(".")
    if len(wanted) > len(segments):
        return None
    for want, have in zip(wanted, segments, strict=False):
        if want == "*" and re.fullmatch(r"\d+", have):
            numbers.append(have)
        elif want != have:
            return None
    return _Match(tuple(numbers), "".join(f".{segment}" for segment in segments[len(wanted) :]))


def _filled(pattern: str, match: _Match) -> str:
    numbers = iter(match.numbers)
    return ".".join(next(numbers) if part == "*" else part for part in pattern.split(".")) + match.tail


def _renamed(name: str, rules: Mapping[str, str]) -> str:
    best = max(
        ((pattern, match) for pattern in rules if (match := _match(pattern, name)) is not None),
        key=lambda found: found[0].count("."),
        default=None,
    )
    return name if best is None else _filled(rules[best[0]], best[1])


def _put(found: dict[str, Origin], name: str, origin: Origin) -> None:
    if name in found:
        raise UserError(f"{origin[0].name} and {found[name][0].name} both stand for {name}: keep one of them")
    found[name] = origin
