"""Other words in the middle of a film: how soon are they obeyed?

Protocol ``switch-v1``. A film goes on under a new prompt from a chunk's border on. Of the stretch that begins
0, 1 or 2 chunks behind that border the oracle says which attributes are those of the new prompt; ``all``:
colour, shape and motion at once. ``before``: the same of the old prompt, in the stretch that ends at the
border. An attribute that old and new prompt have in common is left out, as it says nothing. The oracle says
what most of a stretch shows: its beginning may still be of the old prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from motionloom.data.shapeworld import Facts, parse
from motionloom.evals.adherence import JUDGED
from motionloom.evals.drift import Look, obeyed, readings
from motionloom.evals.figures import Report, Target, summarise
from motionloom.evals.latency import Film

PROTOCOL = "switch-v1"
CHUNKS = 2
TARGETS = {f"all, {CHUNKS} chunks on": Target(0.85)}
ATTRIBUTES = (*JUDGED, "background")


@dataclass(frozen=True)
class Switched:
    """What one switch gave; those between the same ``words`` are no independent draws."""

    name: str
    words: tuple[str, str]
    numbers: Mapping[str, float | None]


def switched(film: Film, look: Look) -> list[Switched]:
    """One for every switch of a film whose prompts before and after it the world knows.

    Figures that would need frames beyond the film's end, or before its beginning, are None.
    """
    said = [(0, film.prompt), *film.switches]
    found = []
    for n, (at, prompt) in enumerate(film.switches):
        old, new = parse(said[n][1]), parse(prompt)
        if old is None or new is None:
            continue
        end = said[n + 2][0] if n + 2 < len(said) else len(film.video_PHW3)
        row = _stretch(film, at - look.reading, at, look, old, "before")
        borders = [at, *(start for start in film.starts if start > at)]
        for k in range(CHUNKS + 1):
            first = borders[k] if k < len(borders) else end
            row |= _stretch(film, first, end, look, new, f"{k} chunks on", old)
        found.append(Switched(f"{film.name}.{n}", (said[n][1], prompt), row))
    return found


def _stretch(
    film: Film, first: int, end: int, look: Look, wanted: Facts, when: str, old: Facts | None = None
) -> dict[str, float | None]:
    """What the oracle reads in the ``look.reading`` frames from ``first`` on."""
    names = [name for name in ATTRIBUTES if old is None or _of(old, name) != _of(wanted, name)]
    row: dict[str, float | None] = {f"{name}, {when}": None for name in (*names, "all")}
    if first < 0 or first + look.reading > end:
        return row
    right = obeyed(readings(film.video_PHW3[first : first + look.reading], look), wanted)
    return {f"{name}, {when}": right[name] for name in (*names, "all")}


def _of(facts: Facts, name: str) -> object:
    if name == "background":
        return facts.background
    return [getattr(thing, name) for thing in facts.objects]


def judge_switches(found: Sequence[Switched], look: Look) -> Report:
    """All of them."""
    return summarise(
        "switch",
        PROTOCOL,
        [one.name for one in found],
        [one.numbers for one in found],
        {"": "oracle"},
        targets=TARGETS,
        groups=[one.words for one in found],
        details={"reading": look.reading},
    )
