"""``motionloom quickstart``: the main job whole, from clips to a page, in one call.

Every stage is a command of its own (data, cache, train, generate); here they run one after the other with
figures taken. A second call with the same --out goes on where the first was stopped.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motionloom.cli.console import Out, duration, new_folder, skipped
from motionloom.durable import write_atomic
from motionloom.errors import UserError

if TYPE_CHECKING:
    from motionloom.cli.assemble import Parts
    from motionloom.config import Recipe
    from motionloom.data.manifest import ManifestEntry

SHOWN = 24
CALIBRATION_STEPS = 12
# Of the minutes, the part that is planned with: measurements, checkpoints and a machine that slows down want
# some as well. Where that is not enough the clock ends the training, PATIENCE later than promised at most.
PLANNED = 0.92
PATIENCE = 1.05
# Compiling takes about half a minute, which a shorter training never gets back.
MINUTES_TO_COMPILE = 2.0
# Of the run whose figures the README has; and below how many it is said that there are fewer.
README_STEPS, FEW_STEPS = 740, 550


@dataclass(frozen=True)
class Sizes:
    """How much of everything: minutes of training, clips of the world, prompts that are judged."""

    minutes: float
    clips: int
    prompts: int


@dataclass
class Diary:
    """Figures of the run, and how long each stage took, over all calls that worked on it."""

    console: Out
    folder: Path
    seconds: dict[str, float] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self._file.exists():
            self.seconds = json.loads(self._file.read_text())

    @property
    def _file(self) -> Path:
        return self.folder / "seconds.json"

    @contextmanager
    def stage(self, name: str, says: str) -> Iterator[None]:
        """Time a stage and announce it. One that fails or is interrupted took its time as well."""
        self.console.note(f"[{name}] {says}")
        began = time.monotonic()
        try:
            yield
        finally:
            took = self.seconds.get(name, 0.0) + time.monotonic() - began
            self.seconds[name] = round(took, 1)
            write_atomic(self._file, json.dumps(self.seconds).encode())


@dataclass(frozen=True)
class Wish:
    """A packaged recipe and what is changed in it."""

    name: str
    overrides: tuple[str, ...]

    def but(self, **changes: object) -> Wish:
        """With more overrides; ``train__lr`` means train.lr."""
        more = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
        return Wish(self.name, (*self.overrides, *more))

    def recipe(self) -> Recipe:
        """The recipe with these overrides."""
        from motionloom.config import load_recipe

        return load_recipe(self.name, self.overrides)


def run(
    data: Path | None,
    sizes: Sizes,
    out: Path,
    seed: int,
    keep: list[str],
    overrides: list[str],
    open_page: bool,
    as_json: bool,
) -> None:
    """Everything; writes report.json and index.html into ``out``."""
    from motionloom.cli.assemble import recipe_spec
    from motionloom.cli.quickstart_report import finish
    from motionloom.data.cache import build_cache, open_cache
    from motionloom.parallel import start_ranks
    from motionloom.train import checkpoint

    name = "quickstart_vtp" if data is None else "clips"
    # As JSON, so that YAML does not read a folder named 7 as a number.
    folder, run_name = json.dumps(str(out.parent)), json.dumps(out.name)
    compiles = () if sizes.minutes >= MINUTES_TO_COMPILE else ("train.compile=false",)
    wish = Wish(
        name, (*compiles, *overrides, f"output_dir={folder}", f"experiment_name={run_name}", f"seed={seed}")
    )
    recipe_spec(wish.recipe())  # what is wrong with it is said before anything is made
    diary = Diary(Out(as_json), new_folder(out))
    note, whose = out / "clips.txt", "ShapeWorld" if data is None else str(data.resolve())
    _refuse_others(note, whose)
    if begun := checkpoint.latest(out):
        diary.console.note(f"going on from {begun.name}, with the recipe and the steps that it began with")
        if overrides:
            diary.console.note(f"not applied: {' '.join(overrides)}; they need a run of their own (--out)")
        wish = Wish(str(begun / "recipe.yaml"), ())
    if data is None:
        with diary.stage("world", f"{sizes.clips} captioned clips of ShapeWorld"):
            entries = _world(wish.recipe(), sizes.clips, out, diary)
    else:
        with diary.stage("ingest", f"clips in {data}"):
            wish, entries = _own_clips(data, wish, out, keep, diary, fit=not begun)
    write_atomic(note, whose.encode())  # not before there are any: a path may be a slip
    recipe = wish.recipe()
    with diary.stage("cache", "pixels to latents"), diary.console.stages() as advance:
        made = build_cache(recipe, entries, out / "cache", on_progress=advance)
        diary.report["clips"] = {"cached": len(open_cache(out / "cache")), "skipped": made.skipped.skipped}
        skipped(diary.console, made.skipped.lines() if len(made.skipped) else [])
    with start_ranks() as ranks:
        recipe = wish.recipe() if begun else _with_steps(wish, sizes.minutes, out, ranks, diary)
        if data is None and recipe.train.max_steps < FEW_STEPS:
            diary.console.note(
                f"the README's figures took {README_STEPS} steps: for such clips give more --minutes"
            )
        parts = _train(recipe, out, ranks, diary)
        page = finish(parts, out, data is None, sizes.prompts, SHOWN, diary)
    diary.console.result({**diary.report, "page": str(page)}, [*_summary(diary.report), f"the page: {page}"])
    if open_page and not as_json and sys.stdout.isatty():
        import webbrowser

        webbrowser.open(page.resolve().as_uri())


def _refuse_others(note: Path, whose: str) -> None:
    """Raises UserError where a run folder's note says that it holds a run on other clips."""
    theirs = note.read_text() if note.is_file() else whose
    if theirs != whose:
        raise UserError(
            f"{note.parent}: holds a run on {theirs}, not on {whose}: name a folder of its own with --out "
            "(of make: OUT=...)"
        )


def _summary(report: dict[str, Any]) -> list[str]:
    """What came of it, for people; report.json has the rest."""
    lines = []
    if adherence := report.get("prompt_adherence"):
        rates = ", ".join(f"{name} {rate:.0%}" for name, rate in adherence.items())
        lines.append(f"as asked: {rates} ({report['protocol']})")
        if "all" in (new := report.get("unseen_by_the_tokenizer_too", {})):
            lines.append(f"new to the tokenizer too: {new['prompts']} of the prompts, all {new['all']:.0%}")
    if losses := report["heldout_loss"]:
        lines.append(f"held-out loss {losses['first']:.3f} -> {losses['last']:.3f}")
    stages = ", ".join(f"{name} {duration(seconds)}" for name, seconds in report["seconds"].items())
    return [*lines, f"{report['train']['steps']} steps; {stages}"]


def _world(recipe: Recipe, clips: int, out: Path, diary: Diary) -> list[ManifestEntry]:
    from motionloom.data.manifest import read_manifest
    from motionloom.data.shapeworld import World, write_dataset

    world = World.quickstart(recipe.video.width, recipe.video.num_frames, recipe.video.fps)
    with diary.console.progress("clips") as advance:
        manifest = write_dataset(out / "world", world, clips, recipe.seed, "train", on_progress=advance)
    return read_manifest(manifest)[0]


def _own_clips(
    data: Path, wish: Wish, out: Path, keep: list[str], diary: Diary, *, fit: bool
) -> tuple[Wish, list[ManifestEntry]]:
    """The clips, cut into windows, and the wish at a rate that fits them: its own unless ``fit``."""
    from motionloom.cli.data import attribute_filter
    from motionloom.data.ingest import ingest
    from motionloom.data.manifest import write_manifest
    from motionloom.data.windows import cut_into_windows, fitting_fps

    with diary.console.progress("clips looked into") as advance:
        entries, problems = ingest(
            data, keep=attribute_filter(keep), unpack_to=out / "unpacked", on_progress=advance
        )
    skipped(diary.console, problems.lines() if len(problems) else [])
    if not entries:
        raise UserError(f"{data}: no clip of it can be used; the lines above say why")
    diary.report["ingest"] = {"clips": len(entries), "skipped": problems.skipped}
    video = wish.recipe().video
    fps = fitting_fps(entries, video.num_frames, video.fps) if fit else video.fps
    entries = cut_into_windows(entries, video.num_frames / fps)
    write_manifest(out / "manifest.jsonl", entries)
    return wish.but(video__fps=fps), entries


def _with_steps(wish: Wish, minutes: float, out: Path, ranks: Any, diary: Diary) -> Recipe:
    """Count how many steps fit into ``minutes`` on this machine."""
    recipe = wish.recipe()
    first = "compiling, then some real steps" if recipe.train.compile else "some real steps"
    with diary.stage("calibrate", f"{first}, to count how many fit"):
        rate = _steps_per_second(recipe, out, ranks)
    steps = max(1, min(recipe.train.max_steps, int(rate * minutes * 60 * PLANNED)))
    every = max(1, steps // 8)
    diary.console.note(f"{rate:.2f} steps/s: {steps} steps in {minutes:g} minutes")
    return wish.but(
        train__max_steps=steps,
        train__warmup_steps=min(recipe.train.warmup_steps, steps // 10),
        train__max_minutes=minutes * PATIENCE,
        train__heldout_every_steps=every,
        train__save_every_steps=every,
        train__log_every_steps=max(1, min(recipe.train.log_every_steps, steps // 20)),
    ).recipe()


def _steps_per_second(recipe: Recipe, out: Path, ranks: Any) -> float:
    """Of real steps on the real cache, with weights that are then thrown away."""
    from motionloom.cli.assemble import assemble
    from motionloom.data.cache import open_cache
    from motionloom.train.probe import steps_per_second

    parts = assemble(recipe, open_cache(out / "cache"), ranks)
    return steps_per_second(parts.method, parts.loader, recipe, ranks, CALIBRATION_STEPS)


def _train(recipe: Recipe, out: Path, ranks: Any, diary: Diary) -> Parts:
    from motionloom.cli.assemble import assemble
    from motionloom.cli.train import show_start
    from motionloom.cli.training_view import TrainingView
    from motionloom.config import write_provenance
    from motionloom.data.cache import open_cache
    from motionloom.train import checkpoint

    parts = assemble(recipe, open_cache(out / "cache"), ranks)
    show_start(diary.console, parts)
    write_provenance(out, recipe)
    with diary.stage("train", f"{recipe.train.max_steps} steps"), TrainingView(diary.console) as view:
        outcome = parts.trainer(out, view).fit(resume=checkpoint.latest(out) is not None)
    if outcome.reason == "signal":
        raise KeyboardInterrupt
    diary.report["train"] = {
        "steps": outcome.step,
        "reason": outcome.reason,
        "seconds": round(diary.seconds["train"], 1),
        "checkpoint": str(outcome.checkpoint),
    }
    return parts
