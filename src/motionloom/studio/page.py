"""The report page: one HTML file that shows what a run made, with its clips beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from math import isfinite, log10
from pathlib import Path

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup, escape

from motionloom.durable import write_atomic


@dataclass(frozen=True)
class Tile:
    """One figure in the page's head."""

    name: str
    value: str


@dataclass(frozen=True)
class Sample:
    """A generated clip; paths are relative to the page. ``marks``: what the oracle says of it."""

    prompt: str
    clip: str
    nearest: str = ""
    note: str = ""
    marks: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """Rows of text under their heads."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Chart:
    """An inline drawing and what it shows."""

    title: str
    note: str
    svg: Markup


@dataclass(frozen=True)
class Page:
    """All that the template shows."""

    title: str
    subtitle: str
    tiles: Sequence[Tile]
    samples: Sequence[Sample]
    samples_title: str
    samples_note: str
    charts: Sequence[Chart]
    tables: Sequence[Table]
    commands: str


def write_page(page: Page, path: Path) -> None:
    """Render to ``path``, whole or not at all. Raises UserError when it cannot be written."""
    environment = Environment(
        loader=PackageLoader("motionloom.studio"), autoescape=select_autoescape(), trim_blocks=True
    )
    write_atomic(path, environment.get_template("report.html").render(page=page).encode())


COLORS = ("#2c62ee", "#e2322f", "#1a7f4b", "#b06a00")
LEFT, RIGHT, TOP, BOTTOM = 52.0, 12.0, 26.0, 24.0
LEAST_FACTOR = 4.0
"""Margins of a chart: for the y axis, the end of the x axis, the legend and the x axis."""
Line = Sequence[tuple[float, float]]
"""Points (x, y)."""


def line_chart(
    lines: Mapping[str, Line],
    x_name: str,
    width: int = 720,
    height: int = 240,
    *,
    log_x: bool = False,
    dots: Mapping[str, Line] | None = None,
) -> Markup:
    """An inline SVG of (x, y) lines on common axes, y from 0; non-finite points are left out.

    Args:
        log_x: a logarithmic x axis, which spans a factor of 4 at least, so that equal efforts stand side by
            side; points at 0 or less are left out.
        dots: what is marked beside each line, by its name and in its colour.
    """
    points = {name: _shown(line, log_x) for name, line in lines.items()}
    points = {name: line for name, line in points.items() if line}
    marked = {name: _shown((dots or {}).get(name, ()), log_x) for name in points}
    every = [point for line in (*points.values(), *marked.values()) for point in line]
    scale = log10 if log_x else float
    xs, ys = [x for x, _ in every] or [1.0, 2.0], [y for _, y in every] or [1.0]
    left, end = min(xs), max(xs)
    if log_x and end < LEAST_FACTOR * left:
        middle = (left * end) ** 0.5
        left, end = middle / LEAST_FACTOR**0.5, middle * LEAST_FACTOR**0.5
    x_low, y_low = scale(left), min(0.0, *ys)
    x_span, y_span = (scale(end) - x_low) or 1.0, (max(ys) - y_low) or 1.0
    right, bottom = width - RIGHT, height - BOTTOM

    def across(x: float) -> float:
        return LEFT + (scale(x) - x_low) / x_span * (right - LEFT)

    def down(y: float) -> float:
        return bottom - (y - y_low) / y_span * (bottom - TOP)

    parts = [f'<svg viewBox="0 0 {width} {height}" width="100%" role="img">']
    for value in (y_low + y_span * k / 4 for k in range(5)):
        y = f"{down(value):.1f}"
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="4" y="{down(value) + 4:.1f}">{value:.3g}</text>')
    parts.append(f'<text x="{LEFT}" y="{height - 6}">{escape(x_name)} {left:.4g}</text>')
    how = " (logarithmic)" if log_x else ""
    parts.append(f'<text x="{right}" y="{height - 6}" text-anchor="end">{end:.4g}{how}</text>')
    legend = LEFT
    for (name, line), color in zip(points.items(), cycle(COLORS), strict=False):
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in line)
        parts.append(f'<polyline fill="none" stroke="{color}" stroke-width="2" points="{path}"/>')
        parts += [
            f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="3" fill="{color}"/>' for x, y in marked[name]
        ]
        parts.append(f'<rect x="{legend:.0f}" y="6" width="14" height="3" fill="{color}"/>')
        parts.append(f'<text x="{legend + 19:.0f}" y="11">{escape(name)}</text>')
        legend += 45 + 6.5 * len(name)
    return Markup("".join([*parts, "</svg>"]))


def _shown(line: Line, log_x: bool) -> Line:
    return [(x, y) for x, y in line if isfinite(y) and (x > 0 or not log_x)]


def alone(svg: Markup) -> str:
    """A chart of :func:`line_chart` as a file of its own, which brings the page's style for it."""
    style = "<style>text{fill:#667;font:11px system-ui,sans-serif}.axis{stroke:#dfe3ea}</style>"
    head, body = svg.split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg">{style}{body}'
