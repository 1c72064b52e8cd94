"""The report page: one HTML file that shows what a run made, with its clips beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup, escape


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
    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Chart:
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
    """Render to ``path``, whole or not at all."""
    environment = Environment(
        loader=PackageLoader("motionloom.studio"), autoescape=select_autoescape(), trim_blocks=True
    )
    html = environment.get_template("report.html").render(page=page)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(html, encoding="utf-8")
    os.replace(part, path)


def line_chart(
    lines: Mapping[str, Sequence[tuple[float, float]]], width: int = 720, height: int = 220
) -> Markup:
    """An inline SVG of (x, y) lines on common linear axes; non-finite points are left out."""
    points = {name: [(x, y) for x, y in line if abs(y) < float("inf")] for name, line in lines.items()}
    xs = [x for line in points.values() for x, _ in line] or [0.0, 1.0]
    ys = [y for line in points.values() for _, y in line] or [0.0, 1.0]
    left, bottom, top = 52.0, height - 24.0, 8.0
    x_span, y_low = (max(xs) - min(xs)) or 1.0, min(0.0, *ys)
    y_span = (max(ys) - y_low) or 1.0

    def place(x: float, y: float) -> str:
        across = left + (x - min(xs)) / x_span * (width - left - 90)
        return f"{across:.1f},{bottom - (y - y_low) / y_span * (bottom - top):.1f}"

    parts = [f'<svg viewBox="0 0 {width} {height}" width="100%" role="img">']
    for k in range(5):
        value = y_low + y_span * k / 4
        y = float(place(min(xs), value).split(",")[1])
        parts.append(f'<line class="axis" x1="{left}" x2="{width - 90}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="4" y="{y + 4}">{value:.3g}</text>')
    parts.append(f'<text x="{left}" y="{height - 6}">{min(xs):.4g}</text>')
    parts.append(f'<text x="{width - 130}" y="{height - 6}">{max(xs):.4g}</text>')
    colors = ("#2c62ee", "#e2322f", "#1a7f4b", "#b06a00")
    for (name, line), color in zip(points.items(), colors, strict=False):
        if not line:
            continue
        path = " ".join(place(x, y) for x, y in line)
        across, down = place(*line[-1]).split(",")
        parts.append(f'<polyline fill="none" stroke="{color}" stroke-width="2" points="{path}"/>')
        parts.append(f'<text x="{float(across) + 6}" y="{float(down) + 4}">{escape(name)}</text>')
    return Markup("".join([*parts, "</svg>"]))
