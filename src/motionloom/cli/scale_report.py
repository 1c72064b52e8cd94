"""What came of a study: a table of its points, means over seeds, power laws, a page and a plot."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motionloom.cli.console import Out, duration
from motionloom.durable import write_atomic

if TYPE_CHECKING:
    from motionloom.cli.scale_point import Job, Outcome
    from motionloom.config.study import Point, Study
    from motionloom.evals.scaling import Spread
    from motionloom.studio.page import Chart

SCALED, PAGE, PLOT = "scaled.json", "scaled.html", "scaled.svg"
ADHERENCE = "generation/oracle: all"
DISTANCES = ("generation/FID", "generation/KID")
Rows = tuple[str, tuple[str, ...], list[tuple[str, ...]]]
"""A table: title, heads, rows."""


def listed(console: Out, jobs: Sequence[Job], operations: Sequence[int]) -> None:
    """The points of a study and what their tokenizers' training costs."""
    rows, values = [], []
    for job, count in zip(jobs, operations, strict=True):
        point, steps = job.point, job.tokenizer.train.max_steps
        rows.append(
            (point.variant, point.budget, str(point.seed), f"{point.data:g}", str(steps), f"{count:.3g}")
        )
        values.append({**_named(point), "steps": steps, "operations": count})
    heads = ("variant", "budget", "seed", "data", "steps", "operations")
    console.table("points", heads, rows)
    console.result({"points": values})


def write_report(study: Study, outcomes: Sequence[Outcome], out: Path) -> tuple[dict[str, Any], list[Rows]]:
    """Write all three files; hands back what they say, and its tables."""
    measure = _measured(study, outcomes)
    groups = _groups(outcomes)
    laws = _laws(groups, measure)
    tables = [_points_table(outcomes, measure), _means_table(groups, measure)]
    if laws:
        tables.append(_laws_table(laws))
    answer = {
        "study": study.model_dump(mode="json"),
        "measure": list(measure),
        "points": [_record(one) for one in outcomes],
        "means": [_mean_record(group) for group in groups],
        "power_laws": laws,
        "command": shlex.join(["motionloom", *sys.argv[1:]]),
    }
    write_atomic(out / SCALED, json.dumps(answer, indent=1).encode())
    _write_page(groups, measure, tables, out, str(answer["command"]))
    files = {"scaled": str(out / SCALED), "page": str(out / PAGE), "plot": str(out / PLOT)}
    return {**answer, **files}, tables


def _measured(study: Study, outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    """The figures of the chart: those that the study names, or that tell most of those there are."""
    if study.measure:
        return study.measure
    return (ADHERENCE,) if any(ADHERENCE in one.figures for one in outcomes) else DISTANCES


class _Group:
    """The points of one variant and budget that came to an end."""

    def __init__(self, variant: str, budget: str, outcomes: Sequence[Outcome]) -> None:
        from motionloom.evals.scaling import over_seeds

        self.variant, self.budget, self.outcomes = variant, budget, outcomes
        self.operations = sum(one.operations or 0 for one in outcomes) / len(outcomes)
        self.figures: dict[str, Spread] = over_seeds([one.figures for one in outcomes])


def _groups(outcomes: Sequence[Outcome]) -> list[_Group]:
    whole = [one for one in outcomes if not one.failed]
    names = dict.fromkeys((one.point.variant, one.point.budget) for one in whole)
    return [
        _Group(*name, [one for one in whole if (one.point.variant, one.point.budget) == name])
        for name in names
    ]


def _laws(groups: Sequence[_Group], measure: Sequence[str]) -> list[dict[str, Any]]:
    """Of every variant and figure that has budgets enough; each seed's point counts."""
    from motionloom.evals.scaling import as_loss, power_law

    found = []
    for variant in dict.fromkeys(group.variant for group in groups):
        points = [one for group in groups if group.variant == variant for one in group.outcomes]
        for figure in measure:
            pairs = [
                (float(one.operations or 0), as_loss(figure, one.figures[figure]))
                for one in points
                if figure in one.figures
            ]
            law = power_law([x for x, _ in pairs], [y for _, y in pairs])
            if law is not None:
                found.append({"variant": variant, "figure": figure, **asdict(law)})
    return found


# Tables


def _points_table(outcomes: Sequence[Outcome], measure: Sequence[str]) -> Rows:
    heads = ("variant", "budget", "seed", "steps", "operations", "time", *measure, "failed")
    rows = []
    for one in outcomes:
        operations = "" if one.operations is None else f"{one.operations:.3g}"
        figures = (f"{one.figures[name]:.4g}" if name in one.figures else "" for name in measure)
        steps = "" if one.steps is None else str(one.steps)
        point = (one.point.variant, one.point.budget, str(one.point.seed))
        rows.append((*point, steps, operations, duration(one.seconds), *figures, one.failed))
    return "points", heads, rows


def _means_table(groups: Sequence[_Group], measure: Sequence[str]) -> Rows:
    rows = []
    for group in groups:
        told = (_told(group.figures.get(name)) for name in measure)
        counted = str(len(group.outcomes))
        rows.append((group.variant, group.budget, f"{group.operations:.3g}", counted, *told))
    heads = ("variant", "budget", "operations", "seeds", *measure)
    return "means, and least .. largest of the seeds", heads, rows


def _told(spread: Spread | None) -> str:
    return "" if spread is None else f"{spread.mean:.4g} ({spread.low:.4g} .. {spread.high:.4g})"


def _laws_table(laws: Sequence[dict[str, Any]]) -> Rows:
    rows: list[tuple[str, ...]] = [
        (law["variant"], law["figure"], f"{law['b']:.3f}", f"{law['a']:.3g}", str(law["points"]))
        for law in laws
    ]
    title = "loss = a * operations^b (of rates: what they lack to 1)"
    return title, ("variant", "figure", "b", "a", "points"), rows


# Files


def _named(point: Point) -> dict[str, Any]:
    return {
        "name": point.name,
        "variant": point.variant,
        "budget": point.budget,
        "seed": point.seed,
        "data": point.data,
    }


def _record(one: Outcome) -> dict[str, Any]:
    return {
        **_named(one.point),
        "state": "failed" if one.failed else "done",
        "reason": one.failed,
        "operations": one.operations,
        "steps": one.steps,
        "seconds": one.seconds,
        "figures": one.figures,
    }


def _mean_record(group: _Group) -> dict[str, Any]:
    return {
        "variant": group.variant,
        "budget": group.budget,
        "operations": group.operations,
        "figures": {name: asdict(spread) for name, spread in group.figures.items()},
    }


def _charts(groups: Sequence[_Group], measure: Sequence[str]) -> list[Chart]:
    from motionloom.studio.page import Chart, line_chart

    found = []
    for figure in measure:
        lines: dict[str, list[tuple[float, float]]] = {}
        dots: dict[str, list[tuple[float, float]]] = {}
        for group in sorted(groups, key=lambda group: group.operations):
            if figure not in group.figures:
                continue
            lines.setdefault(group.variant, []).append((group.operations, group.figures[figure].mean))
            dots.setdefault(group.variant, []).extend(
                (float(one.operations or 0), one.figures[figure])
                for one in group.outcomes
                if figure in one.figures
            )
        note = f"{figure} against operations of pre-training; lines are means, dots are seeds."
        found.append(Chart(figure, note, line_chart(lines, "operations", log_x=True, dots=dots)))
    return found


def _write_page(
    groups: Sequence[_Group], measure: Sequence[str], tables: Sequence[Rows], out: Path, command: str
) -> None:
    from motionloom.studio.page import Page, Table, alone, write_page

    charts = _charts(groups, measure)
    page = Page(
        title="MotionLoom: quality against pre-training",
        subtitle=f"{sum(len(group.outcomes) for group in groups)} points in {out}.",
        tiles=[],
        samples=[],
        samples_title="",
        samples_note="",
        charts=charts,
        tables=[Table(*rows) for rows in tables],
        commands=command,
    )
    write_page(page, out / PAGE)
    write_atomic(out / PLOT, alone(charts[0].svg).encode())
