"""What a judge hands back: means with bootstrap intervals, and the protocol and encoder behind each.

N clips; R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from motionloom.rng import numpy_rng

RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean, the ends of its 95 % interval, and over how many clips."""

    mean: float
    low: float
    high: float
    count: int


def bootstrap(
    values: Sequence[float | None], *key: int | str, groups: Sequence[Hashable] | None = None
) -> Interval | None:
    """Mean of what is known, and its percentile bootstrap interval; None where nothing is known.

    Args:
        values: one number per clip; None or NaN is "cannot be said of this clip" and is left out.
        key: names the draws, so that equal figures come with equal intervals.
        groups: clips of one group (the seeds of one prompt) are drawn together, as they are not independent;
            where there is but one, by themselves.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), 13.3; by groups: Davison & Hinkley,
    Bootstrap Methods and their Application (1997), 3.8.
    """
    known = [i for i, value in enumerate(values) if value is not None and not math.isnan(value)]
    if not known:
        return None
    number_N = np.asarray([values[i] for i in known], np.float64)
    names: list[Hashable] = list(range(len(known)))
    if groups is not None and len({groups[i] for i in known}) > 1:
        names = [groups[i] for i in known]
    place = {name: n for n, name in enumerate(dict.fromkeys(names))}
    group_N = np.asarray([place[name] for name in names])
    total, size = np.bincount(group_N, number_N), np.bincount(group_N)
    drawn_RG = numpy_rng("bootstrap", *key).integers(len(total), size=(RESAMPLES, len(total)))
    means_R = total[drawn_RG].sum(1) / size[drawn_RG].sum(1)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means_R, [tail, 1 - tail])
    return Interval(float(number_N.mean()), float(low), float(high), len(known))


@dataclass(frozen=True)
class Target:
    """What a figure should reach: at least, or (``least`` False) at most, ``value``.

    ``floor``: what one that is bounded above may not fall below, where too little is as wrong as too much.
    """

    value: float
    least: bool = True
    floor: float | None = None

    def met(self, mean: float) -> bool:
        """Whether a mean reaches it."""
        if self.least:
            return mean >= self.value
        return mean <= self.value and (self.floor is None or mean >= self.floor)

    def __str__(self) -> str:
        if self.floor is not None:
            return f"{self.floor:g} .. {self.value:g}"
        return f"{'≥' if self.least else '≤'} {self.value:g}"


@dataclass(frozen=True)
class Figure:
    """One number of a report, with all that it depends on.

    ``encoder`` names what looked at the pixels (with its weights' hash), ``protocol`` how it was counted.
    """

    name: str
    interval: Interval
    protocol: str
    encoder: str
    target: Target | None = None

    @property
    def passed(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        return None if self.target is None else self.target.met(self.interval.mean)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        target = None if self.target is None else str(self.target)
        return {
            "name": self.name,
            **asdict(self.interval),
            "protocol": self.protocol,
            "encoder": self.encoder,
            "target": target,
            "passed": self.passed,
        }


@dataclass(frozen=True)
class Report:
    """What one judge says of a set of clips.

    ``names`` and ``clips``: each clip's name and numbers. ``details``: anything that is no mean, such as a
    figure per expansion step.
    """

    kind: str
    figures: tuple[Figure, ...]
    names: tuple[str, ...]
    clips: tuple[Mapping[str, float | None], ...]
    details: Mapping[str, Any] = field(default_factory=dict)

    def value(self, name: str) -> float:
        """The mean called so. Raises KeyError where there is none."""
        return {figure.name: figure.interval.mean for figure in self.figures}[name]

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "kind": self.kind,
            "figures": [figure.record() for figure in self.figures],
            "clips": [{"clip": name, **clip} for name, clip in zip(self.names, self.clips, strict=True)],
            **self.details,
        }


def summarise(
    kind: str,
    protocol: str,
    names: Sequence[str],
    clips: Sequence[Mapping[str, float | None]],
    encoders: Mapping[str, str],
    *,
    targets: Mapping[str, Target] | None = None,
    groups: Sequence[Hashable] | None = None,
    details: Mapping[str, Any] | None = None,
) -> Report:
    """Means over clips of every number that they carry.

    Args:
        names: of the clips.
        encoders: what looked, by the name of the number; "" is the rest's.
        groups: which clips belong together, see `bootstrap`.
    """
    figures = []
    for name in dict.fromkeys(name for clip in clips for name in clip):
        interval = bootstrap([clip.get(name) for clip in clips], protocol, name, groups=groups)
        if interval is not None:
            encoder = encoders.get(name, encoders.get("", "pixels"))
            figures.append(Figure(name, interval, protocol, encoder, (targets or {}).get(name)))
    return Report(kind, tuple(figures), tuple(names), tuple(clips), details or {})
