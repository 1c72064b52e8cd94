"""``motionloom judge stream``: roll-outs of a run, judged while they are made: drift, latency, likeness."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motionloom.cli.console import Out, finite, new_folder, skipped
from motionloom.cli.judge import JUDGED, PAGE, show, tables
from motionloom.errors import UserError

if TYPE_CHECKING:
    from motionloom.data.shapeworld import World
    from motionloom.evals.asked import Video
    from motionloom.evals.drift import Curve, Look
    from motionloom.evals.encoders import Encoder
    from motionloom.evals.figures import Report
    from motionloom.evals.latency import Film
    from motionloom.evals.likeness import Pair, Size
    from motionloom.evals.switch import Switched
    from motionloom.evals.vbench import Eyes
    from motionloom.generate import Model, Sampling, Stream
    from motionloom.studio.page import Chart, Page

FILMS, SHOWN, SHEET = "films", "shown", "sheet.png"
MOST_SHOWN = 24
SHOWN_FRAMES = 96  # of a film, on the page
STRIP = 12  # frames of a film, on the sheet
LONGER = 4  # times the trained length that a roll-out has, unless it is said


@dataclass(frozen=True)
class Wish:
    """What the command line asked for."""

    out: Path
    prompts: tuple[str, ...] = ()
    prompt_file: Path | None = None
    world: str = ""
    clips: int = 8
    seconds: float | None = None
    seeds: str = "0"
    window: int | None = None
    size: str | None = None
    fps: float | None = None
    negative: str = ""
    switch: float | None = None
    recache: bool = False
    steps: int | None = None
    guidance: float | None = None
    teacher: Path | None = None
    teacher_steps: int | None = None
    teacher_guidance: float | None = None
    encoder: str = "color-histogram"
    vbench: bool = False
    aesthetic: Path | None = None
    raw: bool = False
    device: str = "auto"


@dataclass
class Found:
    """What roll-outs gave, film by film; of a film's pixels only those that are shown are kept."""

    films: list[Film] = field(default_factory=list)
    """Without their pixels."""
    shown: list[tuple[Video, float]] = field(default_factory=list)
    """Frames from the first to the last, and their rate."""
    curves: list[Curve] = field(default_factory=list)
    switches: list[Switched] = field(default_factory=list)
    scored: list[tuple[str, str, Mapping[str, float | None]]] = field(default_factory=list)
    """Name, prompt and VBench-style dimensions of every window."""
    files: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def run(target: Path, wish: Wish, as_json: bool) -> None:
    """Make (or read) roll-outs, judge them, and write judged.json, a page, a sheet and the films."""
    console = Out(as_json)
    if (wish.out / JUDGED).exists():
        raise UserError(f"{wish.out}: holds judged roll-outs already; name another folder, or delete it")
    _check(wish)
    if (target / "clips.json").is_file():
        found, look, eyes = _of_clips(target, wish)
        reports: list[Report] = []
    else:
        found, look, eyes, reports = _of_run(target, wish, console)
    reports = [_drift(found, look), *reports]
    if found.scored:
        reports.append(_vbench(found, eyes))
    skipped(console, [*found.problems, f"{len(found.problems)} skipped"] if found.problems else [])
    _write(target, wish, found, reports, console)


# What is asked


def _check(wish: Wish) -> None:
    """What can be known to be wrong before a model is read."""
    finite("--seconds", wish.seconds)
    finite("--switch", wish.switch)
    if wish.recache and wish.switch is None:
        raise UserError("--recache says how --switch goes over: say --switch as well, or leave it out")
    if wish.teacher is None and (wish.teacher_steps, wish.teacher_guidance) != (None, None):
        raise UserError(
            "--teacher-steps and --teacher-guidance are of --teacher: name one, or leave them out"
        )


def read_seeds(text: str) -> list[int]:
    """``0,1,2``. Raises UserError."""
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words) or len(set(map(int, words))) < len(words):
        raise UserError(f"--seeds {text}: write different numbers from 0 on with commas, for instance 0,1,2")
    return [int(word) for word in words]


def read_prompts(wish: Wish, seed: int) -> list[str]:
    """Those of the command line and of the file, else held-out ones of the world."""
    from motionloom.evals.adherence import held_out_prompts

    prompts = list(wish.prompts)
    if wish.prompt_file is not None:
        try:
            lines = wish.prompt_file.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{wish.prompt_file}: cannot be read ({error}); name a text file") from None
        prompts += [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise UserError(f"{wish.prompt_file}: holds no prompt; write one a line")
    world = open_world(wish.world)
    if not prompts and world is None:
        raise UserError("nothing to show: say --prompt, --prompts FILE, or --world for its held-out prompts")
    if not prompts and world is not None:
        prompts = [prompt for prompt, _ in held_out_prompts(world, wish.clips, seed)]
    return list(dict.fromkeys(prompts))


def open_world(name: str) -> World | None:
    """By name; empty: none. Raises UserError for an unknown one."""
    from motionloom.data.shapeworld import PRESETS

    if name and name not in PRESETS:
        raise UserError(f"--world {name}: choose {', '.join(PRESETS)}")
    return PRESETS[name]() if name else None


def _look(wish: Wish, encoder: Encoder, usual: int | None) -> Look:
    """How films are looked at; ``usual``: the trained clip's pixel frames."""
    from motionloom.evals.drift import Look

    world = open_world(wish.world)
    window = wish.window or usual
    if window is None:
        raise UserError("--window: say how many frames of these clips are looked at at once, for instance 16")
    return Look(window, world, encoder)


def _eyes(wish: Wish, look: Look) -> Eyes:
    from motionloom.evals.vbench import Aesthetic, Eyes

    assert look.encoder is not None
    head = None if wish.aesthetic is None else Aesthetic(wish.aesthetic, look.encoder)
    return Eyes(look.encoder, look.encoder, look.world, head)


# Roll-outs


def _of_clips(folder: Path, wish: Wish) -> tuple[Found, Look, Eyes]:
    """Finished clips: what can be said without having seen them made."""
    from motionloom.evals.asked import read_samples
    from motionloom.evals.encoders import open_encoder
    from motionloom.evals.latency import Film

    if wish.teacher is not None:
        raise UserError("--teacher: compares two runs; name the student's run and not its clips")
    look = _look(wish, open_encoder(wish.encoder), None)
    eyes = _eyes(wish, look)
    read = read_samples(folder)
    new_folder(new_folder(wish.out) / FILMS)
    found = Found(problems=[str(problem) for problem in read.problems])
    for sample in read.items:
        if len(sample.video_PHW3):
            prompt = " | ".join(sample.asked.captions)
            film = Film(sample.name, prompt, sample.video_PHW3, sample.fps, seed=sample.asked.seed)
            _take(film, found, look, eyes, wish)
    if not found.films:
        raise UserError(f"{folder}: no clip of it has a picture to judge; name a folder with films")
    return found, look, eyes


def _of_run(target: Path, wish: Wish, console: Out) -> tuple[Found, Look, Eyes, list[Report]]:
    """Roll-outs of a run, each prompt with each seed; and beside its teacher, where one is named."""
    from motionloom.cli.assemble import open_model
    from motionloom.evals.encoders import open_encoder
    from motionloom.evals.latency import judge_latency
    from motionloom.evals.switch import judge_switches

    seeds = read_seeds(wish.seeds)
    prompts = read_prompts(wish, seeds[0])
    encoder = open_encoder(wish.encoder)
    model = open_model(target, raw=wish.raw, device=wish.device, tell=console.note)
    look = _look(wish, encoder, model.clip_shape[0])
    eyes = _eyes(wish, look)
    open_stream(model, prompts[0], seeds[0], wish)  # what cannot stream is told before anything is written
    new_folder(new_folder(wish.out) / FILMS)
    found = Found()
    for film in _films(model, prompts, seeds, wish, found, console):
        _take(film, found, look, eyes, wish)
    if not found.films:
        raise UserError(f"{target}: no roll-out came to its end; {found.problems[0]}")
    reports = [judge_latency(found.films, model.clip_shape[0])]
    if found.switches:
        reports.append(judge_switches(found.switches, look))
    if wish.teacher is not None:
        reports.append(_likeness(model, prompts, seeds, look, wish, console))
    return found, look, eyes, reports


def open_stream(model: Model, prompt: str, seed: int, wish: Wish) -> Stream:
    """The stream of one roll-out."""
    from motionloom.generate import Ask, Stream

    size = _size(wish, prompt)
    ask = Ask(prompt, wish.negative, size.height, size.width, size.fps, seed, history=0)
    return Stream(model, ask, _sampling(model, wish))


def _size(wish: Wish, prompt: str) -> Size:
    from motionloom.config.request import parse_request
    from motionloom.evals.likeness import Size

    size = {"size": wish.size} if wish.size else {}
    height, width = parse_request({"prompt": prompt, **size}).size or (None, None)
    return Size(height=height, width=width, fps=wish.fps, negative=wish.negative)


def _sampling(model: Model, wish: Wish) -> Sampling:
    from motionloom.generate import recipe_sampling

    return recipe_sampling(model.recipe, steps=wish.steps, guidance=wish.guidance)


def _films(
    model: Model, prompts: Sequence[str], seeds: Sequence[int], wish: Wish, found: Found, console: Out
) -> Iterator[Film]:
    """One by one; a roll-out that turns to NaN is listed and never stops the rest."""
    from torch import nn

    from motionloom.evals.latency import Recorder

    network = model.predictor.backbone
    assert isinstance(network, nn.Module)
    seconds = wish.seconds or LONGER * model.clip_shape[0] / (wish.fps or model.fps)
    if wish.switch is not None and (len(prompts) < 2 or wish.switch >= seconds):
        raise UserError(
            f"--switch {wish.switch:g}: goes over to the next prompt within the film: give two prompts or "
            f"more, and less than its {seconds:g} seconds"
        )
    wanted = [(prompt, seed) for seed in seeds for prompt in prompts]
    with console.progress("frames, all roll-outs") as advance:
        for n, (prompt, seed) in enumerate(wanted):

            def tell(done: int, total: int, n: int = n) -> None:
                advance(n * total + done, len(wanted) * total)

            name = f"{n:03d}"
            after = prompts[(prompts.index(prompt) + 1) % len(prompts)]
            then = [] if wish.switch is None else [(wish.switch, after)]
            try:
                opener = partial(open_stream, model, prompt, seed, wish)
                recorder = Recorder(seconds, network, recache=wish.recache, tell=tell)
                film = recorder.record(opener, name, prompt, seed, then)
            except FloatingPointError as error:
                found.problems.append(f"{name} ({prompt}, seed {seed}): {error}")
                continue
            yield film


def _take(film: Film, found: Found, look: Look, eyes: Eyes, wish: Wish) -> None:
    """All that needs a film's pixels, so that they need not be held."""
    import numpy as np

    from motionloom.data.media import write_video
    from motionloom.data.shapeworld import parse
    from motionloom.evals.asked import Asked, Sample
    from motionloom.evals.drift import follow, spans
    from motionloom.evals.switch import switched
    from motionloom.evals.vbench import score

    # Under changing words no attribute is to be kept.
    found.curves.append(follow(film, look, None if film.switches else parse(film.prompt)))
    if look.world is not None:
        found.switches += switched(film, look)
    found.files.append(f"{film.name}.mp4")
    write_video(wish.out / FILMS / found.files[-1], film.video_PHW3, film.fps)
    if wish.vbench:
        for n, span in enumerate(spans(len(film.video_PHW3), look.window)):
            part = Sample(f"{film.name}.{n}", film.video_PHW3[span], film.fps, Asked(film.prompt))
            found.scored.append((part.name, film.prompt, score(part, eyes)))
    frames = len(film.video_PHW3)
    at = np.linspace(0, frames - 1, min(frames, SHOWN_FRAMES)).round().astype(int)
    found.shown.append((film.video_PHW3[at], film.fps * len(at) / frames))
    found.films.append(replace(film, video_PHW3=film.video_PHW3[:0]))


def _likeness(
    model: Model, prompts: Sequence[str], seeds: Sequence[int], look: Look, wish: Wish, console: Out
) -> Report:
    from motionloom.cli.assemble import open_model
    from motionloom.evals.likeness import Maker, judge_likeness, make_pairs
    from motionloom.generate import recipe_sampling

    assert wish.teacher is not None
    teacher = open_model(wish.teacher, raw=wish.raw, device=wish.device, tell=console.note)
    sampling = recipe_sampling(teacher.recipe, steps=wish.teacher_steps, guidance=wish.teacher_guidance)
    makers = Maker(model, _sampling(model, wish)), Maker(teacher, sampling)
    with console.progress("batches by student and teacher") as advance:
        pairs: list[Pair] = make_pairs(*makers, prompts, seeds, _size(wish, prompts[0]), tell=advance)
    return judge_likeness(pairs, look)


# What is told


def _drift(found: Found, look: Look) -> Report:
    from motionloom.evals.drift import judge_drift

    return judge_drift(found.curves, look)


def _vbench(found: Found, eyes: Eyes) -> Report:
    from motionloom.evals.vbench import summed

    names, groups, rows = zip(*found.scored, strict=True)
    return summed(names, groups, rows, eyes)


def _write(target: Path, wish: Wish, found: Found, reports: Sequence[Report], console: Out) -> None:
    from motionloom.data.sheets import contact_sheet
    from motionloom.durable import write_atomic
    from motionloom.studio.page import write_page

    out, command = wish.out, shlex.join(["motionloom", *sys.argv[1:]])
    answer = {
        "judged": str(target),
        "roll_outs": len(found.films),
        "skipped": found.problems,
        "world": wish.world,
        "reports": [report.record() for report in reports],
        "command": command,
    }
    said = [
        {"file": file, "prompt": film.prompt, "seed": film.seed, "switches": film.switches}
        for file, film in zip(found.files, found.films, strict=True)
    ]
    write_atomic(out / FILMS / "clips.json", json.dumps(said, indent=1).encode())
    videos = [video for video, _ in found.shown[:MOST_SHOWN]]
    captions = [_caption(film) for film in found.films[:MOST_SHOWN]]
    contact_sheet(videos, captions, out / SHEET, frames_per_clip=STRIP)
    write_page(_page(out, target, found, reports, command), out / PAGE)
    write_atomic(out / JUDGED, json.dumps(answer, indent=1).encode())
    for report in reports:
        show(console, replace(report, figures=tuple(f for f in report.figures if _told(f.name))))
    names = {"page": out / PAGE, "sheet": out / SHEET, "figures": out / JUDGED, "films": out / FILMS}
    paths = {key: str(path) for key, path in names.items()}
    console.result({**answer, **paths}, list(paths.values()))


def _told(name: str) -> bool:
    """Whether the terminal shows a figure; the page and the file have them all."""
    return not name.endswith(", slope") and not name.startswith("first window")


def _caption(film: Film) -> str:
    prompts = [film.prompt, *(prompt for _, prompt in film.switches)]
    return f"{', then '.join(prompts)} (seed {film.seed})"


def _page(out: Path, target: Path, found: Found, reports: Sequence[Report], command: str) -> Page:
    from motionloom.data.media import write_video
    from motionloom.studio.page import Page, Sample, Tile

    shown = []
    parts = zip(found.films, found.curves, found.shown, strict=True)
    for film, curve, (video, fps) in islice(parts, MOST_SHOWN):
        file = f"{SHOWN}/{film.name}.webp"
        write_video(out / file, video, fps, quality=90)
        last = {name: values[-1] for name, values in curve.values.items() if name in ATTRIBUTES}
        marks = {name: value == 1 for name, value in last.items() if value is not None}
        shown.append(Sample(_caption(film), file, note="at the end", marks=marks))
    figures = [f for report in reports for f in report.figures if f.target is not None or f.name in HEADLINES]
    return Page(
        title="MotionLoom: judged roll-outs",
        subtitle=f"{len(found.films)} roll-outs of {target}: what becomes of them as they go on.",
        tiles=[
            Tile(f.name + (f" ({f.target})" if f.target else ""), f"{f.interval.mean:.3g}") for f in figures
        ],
        samples=shown,
        samples_title="Roll-outs",
        samples_note="From the first frame to the last, thinned; marked is what the last window shows.",
        charts=[chart for report in reports for chart in charts(report)],
        tables=tables(reports),
        commands=command,
    )


HEADLINES = ("visual drift", "first frame, s", "frames/s")
ATTRIBUTES = ("color", "shape", "motion", "all")
CURVES = {
    "What the oracle reads": (ATTRIBUTES, "Share of stretches that show what was asked, window by window."),
    "Looks": (("brightness", "saturation", "contrast", "sharpness"), "Each over its first window's."),
    "Exposure": (("near white", "near black"), "Share of pixels that show nothing any more."),
    "Motion": (("dynamic degree", "flicker", "shimmer"), "Levels of 255 from frame to frame."),
    "Seams": (("seam ratio",), "Change across a chunk's border over the window's other changes; 1 is none."),
    "Likeness to the beginning": (("cosine with the first window",), "By the encoder."),
}


def charts(report: Report) -> list[Chart]:
    """Everything that goes on in time, as drawings."""
    from motionloom.studio.page import Chart, line_chart

    found = []
    steps: list[dict[str, Any]] = report.details.get("curves") or []
    for head, (names, note) in CURVES.items():
        lines = {n: [(s["second"], s["mean"]) for s in steps if s["name"] == n] for n in names}
        if head == "Looks":
            lines = {n: [(x, y / (line[0][1] or 1.0)) for x, y in line] for n, line in lines.items() if line}
        if any(lines.values()):
            found.append(Chart(head, note, line_chart(lines, "second")))
    chunks: list[dict[str, float]] = report.details.get("chunks") or []
    if chunks:
        spent = {n: [(c["chunk"], c[f"{n}_s"]) for c in chunks] for n in ("wait", "network", "decode")}
        note = "Seconds for which whoever watches waits, and where they go."
        found.append(Chart("Time of a chunk", note, line_chart(spent, "chunk")))
        held = {"MB": [(c["chunk"], c["memory"] / 1e6) for c in chunks]}
        found.append(Chart("Memory", "What the cache holds after each chunk.", line_chart(held, "chunk")))
    return found
