"""``motionloom judge``: clips against what was asked of them."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motionloom.cli.console import Out, skipped
from motionloom.errors import UserError

if TYPE_CHECKING:
    from motionloom.evals.asked import Sample
    from motionloom.evals.figures import Figure, Report
    from motionloom.evals.judges import Tools
    from motionloom.studio.page import Chart, Table

JUDGED, PAGE, SHOWN = "judged.json", "judged.html", "judged"
MOST_SHOWN = 24


@dataclass(frozen=True)
class Wish:
    """What the command line asked for."""

    manifest: Path | None
    request: Path | None
    kinds: tuple[str, ...]
    world: str
    encoder: str
    cuts: str
    real: Path | None
    aesthetic: Path | None = None


def run(folder: Path, wish: Wish, as_json: bool) -> None:
    """Judge every clip, print the figures, write judged.json and judged.html into the folder."""
    from motionloom.durable import write_atomic
    from motionloom.evals.asked import read_samples
    from motionloom.evals.judges import judge

    console = Out(as_json)
    if wish.manifest is not None and wish.request is not None:
        raise UserError("--manifest and --request both say what was asked: keep one")
    tools = _tools(wish)
    found = read_samples(folder, wish.manifest, wish.request)
    reports = judge(found.items, tools, wish.kinds)
    if len(found.problems):
        skipped(console, found.problems.lines())
    answer = {
        "clips": len(found.items),
        "skipped_clips": [str(problem) for problem in found.problems],
        "world": wish.world,
        "reports": [report.record() for report in reports],
        "command": shlex.join(["motionloom", *sys.argv[1:]]),
    }
    write_atomic(folder / JUDGED, json.dumps(answer, indent=1).encode())
    _page(folder, found.items, reports, str(answer["command"]))
    for report in reports:
        show(console, report)
    console.result(
        {**answer, "judged": str(folder / JUDGED), "page": str(folder / PAGE)},
        [str(folder / JUDGED), str(folder / PAGE)],
    )


def _tools(wish: Wish) -> Tools:
    from motionloom.data.shapeworld import PRESETS
    from motionloom.evals.asked import read_real
    from motionloom.evals.cuts import open_detector
    from motionloom.evals.encoders import open_encoder
    from motionloom.evals.judges import Tools

    if wish.world not in PRESETS:
        raise UserError(f"--world {wish.world}: choose {', '.join(PRESETS)}")
    detector = None if wish.cuts == "auto" else open_detector(wish.cuts)
    real = () if wish.real is None else tuple(read_real(wish.real).items)
    return Tools(open_encoder(wish.encoder), PRESETS[wish.world](), detector, real, wish.aesthetic)


HEADS = ("figure", "mean", "95 % interval", "clips", "target", "seen by")


def table_line(figure: Figure) -> tuple[str, ...]:
    """A figure as a row under `HEADS`."""
    at = figure.interval
    verdict = {None: "", True: " met", False: " MISSED"}[figure.passed]
    return (
        figure.name,
        f"{at.mean:.3f}",
        f"{at.low:.3f} .. {at.high:.3f}",
        str(at.count),
        f"{figure.target}{verdict}" if figure.target else "",
        figure.encoder,
    )


def title(report: Report) -> str:
    """Kind and protocol."""
    return f"{report.kind} ({report.figures[0].protocol})" if report.figures else report.kind


def show(console: Out, report: Report) -> None:
    """Its tables, on the terminal."""
    console.table(title(report), HEADS, [table_line(figure) for figure in report.figures])
    for more in sums(report):
        console.table(*more)
    if "real" in report.details:
        rows = [(name, f"{value:.3f}") for name, value in report.details["real"].items() if value is not None]
        console.table("real clips at the same places", ("figure", "mean"), rows)
    if "consistency_gap" in report.details:
        gap = report.details["consistency_gap"]
        console.table(
            "consistency gap",
            ("distance", "real clips", "seen by"),
            [(f"{gap['value']:.3f}", str(gap["clips"]), gap["encoder"])],
        )


def tables(reports: Sequence[Report]) -> list[Table]:
    """All figures, for a page."""
    from motionloom.studio.page import Table

    figures = [Table(title(r), HEADS, [table_line(figure) for figure in r.figures]) for r in reports]
    return figures + [Table(*rows) for report in reports for rows in sums(report)]


Rows = tuple[str, tuple[str, ...], list[tuple[str, ...]]]
"""A table: title, heads, rows."""


def sums(report: Report) -> list[Rows]:
    """Of a VBench-style report: its sums, and what was left out and why."""
    if "scores" not in report.details:
        return []
    told = [
        (name, f"{one['value']:.3f}", f"{len(one['dimensions'])} of {one['of']}")
        for name, one in report.details["scores"].items()
    ]
    left = list(report.details["left_out"].items())
    return [
        (f"sums {report.details['note']}", ("sum", "value", "dimensions"), told),
        ("left out", ("dimension", "why"), left),
    ]


def _page(folder: Path, samples: Sequence[Sample], reports: Sequence[Report], command: str) -> None:
    """The figures as a page, the first clips beside them with what each judge says of them."""
    from motionloom.data.media import write_video
    from motionloom.studio.page import Page, Tile, write_page
    from motionloom.studio.page import Sample as Shown

    shown = []
    seen = [sample for sample in samples if len(sample.video_PHW3)]
    for n, sample in enumerate(seen[:MOST_SHOWN]):
        file = f"{SHOWN}/{n:03d}.webp"
        write_video(folder / file, sample.video_PHW3, sample.fps, quality=100)
        marks, note = _marks(sample.name, reports)
        shown.append(Shown(" | ".join(sample.asked.captions), file, note=note, marks=marks))
    targets = [figure for report in reports for figure in report.figures if figure.target is not None]
    page = Page(
        title="MotionLoom: judged clips",
        subtitle=f"{len(samples)} clips of {folder}, against what was asked of them.",
        tiles=[
            Tile(f"{f.name} ({f.target})", f"{f.interval.mean:.3g} of {f.interval.count} clips")
            for f in targets
        ],
        samples=shown,
        samples_title="Clips",
        samples_note=f"The first {len(shown)}; what is yes or no of a clip is marked.",
        charts=[chart for report in reports if (chart := _drift(report)) is not None],
        tables=tables(reports),
        commands=command,
    )
    write_page(page, folder / PAGE)


def _marks(name: str, reports: Sequence[Report]) -> tuple[dict[str, bool], str]:
    """What is yes or no of a clip, and its other numbers in words."""
    marks: dict[str, bool] = {}
    notes = []
    for report in reports:
        if name not in report.names:
            continue
        row = report.clips[report.names.index(name)]
        yes_or_no = {n for n in row if all(clip.get(n) in (0, 1, None) for clip in report.clips)}
        marks |= {n: bool(row[n]) for n in row if n in yes_or_no and row[n] is not None}
        notes += [f"{n} {v:.2f}" for n, v in row.items() if n not in yes_or_no and v is not None]
    return marks, ", ".join(notes[:4])


def _drift(report: Report) -> Chart | None:
    """Figures by scene, for clips of several scenes."""
    from motionloom.studio.page import Chart, line_chart

    steps: list[dict[str, Any]] = report.details.get("drift") or []
    lines = {
        name: [(float(step["scene"]), step["mean"]) for step in steps if step["name"] == name]
        for name in ("same character", "own caption", "cosine")
    }
    if not steps:
        return None
    note = "Each scene against scene 0: what a roll-out keeps, step by step."
    return Chart("Drift", note, line_chart(lines, "scene"))
