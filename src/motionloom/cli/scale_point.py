"""A point of a study: its two recipes, its folder, and the stages by which it comes to its figures."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motionloom.cli.console import INTERRUPTED, Out
from motionloom.cli.scale_files import ANEW, digest, read_json, write_json, write_share
from motionloom.durable import write_atomic
from motionloom.errors import UserError

if TYPE_CHECKING:
    from motionloom.config import Recipe
    from motionloom.config.study import Point, Study

SETTINGS, STAGES, TRACEBACK = "settings.json", "stages.json", "failed.txt"
OPERATIONS, OUTCOME = "operations.json", "outcome.json"
JUDGED = ("reconstruction", "generation")
"""Stages that give figures; each a folder of that name."""
DECIDE_NOTHING = (
    *("output_dir", "experiment_name", "num_workers", "tokenizer.name_or_path"),
    *("train.save_every_steps", "train.keep_checkpoints", "train.log_every_steps"),
)
"""Keys of recipes that may change under a point."""


@dataclass(frozen=True)
class Outcome:
    """What came of a point."""

    point: Point
    operations: int | None = None
    """Of all of its tokenizer's training."""
    steps: int | None = None
    seconds: float = 0.0
    """Of all stages, over all calls."""
    figures: dict[str, float] = field(default_factory=dict)
    failed: str = ""
    """Why it has no figures, in one line."""


@dataclass(frozen=True)
class Stage:
    """One command of a point, done where what it makes is needed and not ``made``, or not to its end."""

    name: str
    says: str
    work: Callable[[], None]
    made: Callable[[], bool]
    needs: tuple[str, ...] = ()


class Job:
    """A point with its recipes and folders."""

    def __init__(self, study: Study, point: Point, out: Path, console: Out) -> None:
        self.study, self.point, self.console = study, point, console
        self.folder, self._out = out / "points" / point.name, out
        self.tokenizer_run, self.generator_run = self.folder / "tokenizer_run", self.folder / "generator_run"
        self._head = ""

    # Recipes

    @property
    def tokenizer_overrides(self) -> list[str]:
        """Of the command line, for the tokenizer's recipe."""
        return [*self.point.tokenizer, *self._placed(self.tokenizer_run)]

    @property
    def generator_overrides(self) -> list[str]:
        """Of the command line, for the generator's recipe: it takes the point's tokenizer."""
        return [*self.point.generator, *self._tokenizer_keys(), *self._placed(self.generator_run)]

    def _placed(self, run_dir: Path) -> list[str]:
        # As JSON, so that YAML does not read a folder named 7 as a number.
        folder, name = json.dumps(str(run_dir.parent)), json.dumps(run_dir.name)
        return [f"output_dir={folder}", f"experiment_name={name}"]

    def _tokenizer_keys(self) -> list[str]:
        from motionloom.methods.tokenizer.sizes import model_config

        config = model_config(self.tokenizer.vtp, 1, 1, rebuilt=True)
        first_alone = "true" if config.temporal_patch > 1 else "false"
        return [
            "tokenizer.type=vtp",
            f"tokenizer.name_or_path={json.dumps(str(self.folder / 'tokenizer'))}",
            f"tokenizer.latent_f={config.vision_patch_size}",
            f"tokenizer.latent_t={config.temporal_patch}",
            f"tokenizer.latent_d={config.vision_feature_bottleneck}",
            f"tokenizer.first_alone={first_alone}",
        ]

    @cached_property
    def tokenizer(self) -> Recipe:
        """The tokenizer's recipe."""
        from motionloom.config import load_recipe

        return load_recipe(self.study.tokenizer, self.tokenizer_overrides)

    @cached_property
    def generator(self) -> Recipe:
        """The generator's recipe."""
        from motionloom.config import load_recipe

        return load_recipe(self.study.generator, self.generator_overrides)

    def check(self) -> None:
        """Raises UserError, naming the point, for recipes that are wrong or do not go together."""
        try:
            if self.tokenizer.train.method != "tokenizer":
                raise UserError(
                    f"tokenizer {self.study.tokenizer}: trains none; name a recipe that does: vtp_shapeworld"
                )
            if not self.tokenizer.vtp.rec:
                raise UserError(
                    "vtp.rec is 0: a tokenizer that rebuilds nothing has no pixels to show; raise it"
                )
            if self.generator.trains_tokenizer:
                raise UserError(
                    f"generator {self.study.generator}: trains a tokenizer; name a backbone's: lightning"
                )
        except UserError as error:
            raise UserError(f"point {self.point}: {error}") from None

    # Stages

    def outcome(self, head: str) -> Outcome:
        """Do what is left to do; what goes wrong is told and handed back."""
        self._head = head
        try:
            self._refuse_changed()
            found = self._carried_out()
        except UserError as error:
            return self._failed(str(error))
        except SystemExit as stop:
            if stop.code == INTERRUPTED:
                raise KeyboardInterrupt from None
            raise
        except Exception as error:  # one defect must not cost the points behind it
            write_atomic(self.folder / TRACEBACK, traceback.format_exc().encode())
            first = (str(error).splitlines() or [""])[0]
            return self._failed(f"{type(error).__name__}: {first} ({self.folder / TRACEBACK} tells where)")
        (self.folder / TRACEBACK).unlink(missing_ok=True)
        return found

    def _failed(self, reason: str) -> Outcome:
        self.console.note(f"{self._head} failed: {reason}")
        try:
            seconds = self._seconds()
        except UserError:  # the diary itself may be what is damaged
            seconds = 0.0
        return Outcome(self.point, seconds=seconds, failed=reason)

    def _carried_out(self) -> Outcome:
        """All stages that are left, and what came of all of them, which is kept."""
        kept = self._kept()
        ahead = self._ahead() if kept is None else self._judged_again()
        if kept is not None and not ahead:
            return kept
        for stage in ahead:
            self._do(stage)
        found = self._read(kept)
        told = ("operations", "steps", "seconds", "figures")
        write_json(self.folder / OUTCOME, {name: getattr(found, name) for name in told})
        return found

    def _ahead(self) -> list[Stage]:
        """What was not done or is gone, as far as figures that are not there yet need it."""
        done, ahead = self._diary()["done"], set()

        def need(name: str) -> None:
            if name not in ahead and not (name in done and self._stages[name].made()):
                ahead.add(name)
                for other in self._stages[name].needs:
                    need(other)

        for name in ("operations", *JUDGED):
            need(name)
        return [stage for stage in self._stages.values() if stage.name in ahead]

    def _judged_again(self) -> list[Stage]:
        """Of a point that has come to its end: judgements that are gone, where what they look at is not."""
        gone = (self._stages[name] for name in JUDGED if not self._stages[name].made())
        return [stage for stage in gone if all(self._stages[name].made() for name in stage.needs)]

    @cached_property
    def _stages(self) -> dict[str, Stage]:
        """By name, in order."""
        latents, tokenizer = self.folder / "latents", self.folder / "tokenizer"
        stages = (
            Stage("pixels", "caching pixels", self._cache_pixels, self._has_pixels),
            Stage(
                "operations",
                "counting operations",
                self._count,
                (self.folder / OPERATIONS).exists,
                ("pixels",),
            ),
            Stage(
                "tokenizer",
                "training the tokenizer",
                self._train_tokenizer,
                lambda: _newest(self.tokenizer_run) is not None,
                ("pixels",),
            ),
            Stage(
                "convert", "measuring its latents", self._convert, tokenizer.is_dir, ("pixels", "tokenizer")
            ),
            Stage("latents", "caching latents", self._cache_latents, latents.is_dir, ("convert",)),
            Stage(
                "generator",
                "training the generator",
                self._train_generator,
                lambda: _newest(self.generator_run) is not None,
                ("convert", "latents"),
            ),
            Stage(
                "reconstruction",
                "judging reconstructions",
                self._judge_rebuilt,
                lambda: self._is_judged("reconstruction"),
                ("convert",),
            ),
            Stage(
                "generation",
                "judging generated clips",
                self._judge_generated,
                lambda: self._is_judged("generation"),
                ("generator",),
            ),
        )
        return {stage.name: stage for stage in stages}

    def _do(self, stage: Stage) -> None:
        """Announce, do and write down. Answers of commands are no part of this one's, which is on stdout."""
        diary = self._diary()
        self.console.note(f"{self._head}: {stage.says}")
        began = time.monotonic()
        try:
            with redirect_stdout(sys.stderr):
                stage.work()
            diary["done"] = [*(name for name in diary["done"] if name != stage.name), stage.name]
        finally:
            took = diary["seconds"].get(stage.name, 0.0) + time.monotonic() - began
            diary["seconds"][stage.name] = round(took, 1)
            write_json(self.folder / STAGES, diary)

    def _diary(self) -> dict[str, Any]:
        """The stages that were done to their end, and the seconds of each. Raises UserError if damaged."""
        diary: dict[str, Any] = {"done": [], "seconds": {}, **read_json(self.folder / STAGES)}
        if not (isinstance(diary["done"], list) and isinstance(diary["seconds"], dict)):
            raise UserError(f"{self.folder / STAGES}: is no list of stages; {ANEW}")
        return diary

    def _seconds(self) -> float:
        """Spent on it, over all calls."""
        return round(sum(self._diary()["seconds"].values()), 1)

    @cached_property
    def pixels(self) -> Path:
        """The cache of pixels, shared with the points whose tokenizers see the same clips in the same way."""
        from motionloom.data.cache.identity import decisive_keys

        keys = [decisive_keys(self.tokenizer), self.point.data, digest(self.study.train)]
        name = hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:8]
        return self._out / "caches" / f"pixels_{self.point.data:g}_{name}"

    @property
    def _pixels_whole(self) -> Path:
        return self.pixels.with_name(f"{self.pixels.name}.whole")

    def _has_pixels(self) -> bool:
        return self._pixels_whole.exists() and self.pixels.is_dir()

    def _cache_pixels(self) -> None:
        from motionloom.cli import cache

        if self._has_pixels():
            return
        manifest = Path(self.study.train)
        if self.point.data < 1:
            manifest = self.pixels.with_name(f"{self.pixels.name}.jsonl")
            write_share(Path(self.study.train), self.point.data, manifest)
        cache.run(self.study.tokenizer, manifest, self.pixels, self.tokenizer_overrides, False)
        write_atomic(self._pixels_whole, b"")

    def _count(self) -> None:
        from motionloom.cli.scale_operations import operations_per_step
        from motionloom.data.cache import open_cache

        counted = operations_per_step(self.tokenizer, open_cache(self.pixels))
        write_json(self.folder / OPERATIONS, {"per_step": counted})

    def _train_tokenizer(self) -> None:
        _train(self.study.tokenizer, self.tokenizer_overrides, self.tokenizer, self.pixels)

    def _cache_latents(self) -> None:
        from motionloom.cli import cache

        study, latents = self.study, self.folder / "latents"
        cache.run(study.generator, Path(study.train), latents, self.generator_overrides, False)

    def _train_generator(self) -> None:
        _train(self.study.generator, self.generator_overrides, self.generator, self.folder / "latents")

    def _convert(self) -> None:
        from motionloom.cli import convert

        part, whole = self.folder / "tokenizer.part", self.folder / "tokenizer"
        if whole.is_dir():
            return
        shutil.rmtree(part, ignore_errors=True)
        wish = convert.Wish("diffusers", "keep", "", "", "5GB", False, self.pixels)
        convert.run(self.tokenizer_run, part, wish, False)
        part.rename(whole)

    def _is_judged(self, kind: str) -> bool:
        from motionloom.cli import eval as command

        return all((self.folder / kind / name).exists() for name in (command.EVALUATED, command.PAGE))

    def _judge_rebuilt(self) -> None:
        from motionloom.cli import eval as command

        video, study, out = self.tokenizer.video, self.study, self.folder / "reconstruction"
        if self._is_judged("reconstruction"):
            return
        shutil.rmtree(out, ignore_errors=True)
        size = f"{video.height}x{video.width}"
        reading = command.Reading(study.clips, video.num_frames, size, video.fps)
        command.reconstruction(
            self.folder / "tokenizer",
            Path(study.test),
            out,
            reading,
            study.extractor,
            study.lpips,
            study.world,
            False,
        )

    def _judge_generated(self) -> None:
        from motionloom.cli import eval as command

        study, out = self.study, self.folder / "generation"
        if self._is_judged("generation"):
            return
        shutil.rmtree(out, ignore_errors=True)
        command.generation(
            self.generator_run,
            Path(study.test),
            out,
            command.Reading(study.clips),
            command.Sampled(seed=self.point.seed),
            study.extractor,
            study.world,
            False,
        )

    # What is kept

    def settings(self) -> dict[str, Any]:
        """All that decides a point's figures, by dotted key."""
        from motionloom.config.keys import flatten

        found: dict[str, Any] = {"data": self.point.data}
        found |= {key: getattr(self.study, key) for key in ("clips", "world", "extractor", "lpips")}
        for key in ("train", "test"):
            found |= {f"{key} (its content)": digest(getattr(self.study, key))}
        for name, recipe in (("tokenizer", self.tokenizer), ("generator", self.generator)):
            flat = flatten(recipe.model_dump(mode="json"))
            found |= {f"{name}: {key}": value for key, value in flat.items() if key not in DECIDE_NOTHING}
        return found

    def _refuse_changed(self) -> None:
        """Raises UserError where the point was begun otherwise; keys that are newer do not count."""
        path, now = self.folder / SETTINGS, json.loads(json.dumps(self.settings()))
        if not path.exists():
            write_json(path, now)
            return
        before = read_json(path)
        if changed := [key for key, value in now.items() if key in before and before[key] != value]:
            key, more = changed[0], f" (and {len(changed) - 1} keys more)" if len(changed) > 1 else ""
            raise UserError(
                f"{self.folder} was begun with {key} {json.dumps(before[key])} and the study now says "
                f"{json.dumps(now[key])}{more}: give the old value back, name another --out, or delete that "
                "folder"
            )

    def _kept(self) -> Outcome | None:
        """What came of it, of a point that has come to its end. Raises UserError if that is damaged."""
        path = self.folder / OUTCOME
        if not (kept := read_json(path)):
            return None
        try:
            numbers = int(kept["operations"]), int(kept["steps"]), float(kept["seconds"])
            return Outcome(
                self.point, *numbers, {name: float(value) for name, value in kept["figures"].items()}
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"{path}: does not say what came of the point; {ANEW}") from None

    def _read(self, kept: Outcome | None) -> Outcome:
        """What the stages left behind, before what was kept of them."""
        if kept is not None:
            figures = {**kept.figures, **self._figures()}
            return Outcome(self.point, kept.operations, kept.steps, self._seconds(), figures)
        path, steps = self.folder / OPERATIONS, self._steps()
        per_step = read_json(path).get("per_step")
        if not isinstance(per_step, int):
            raise UserError(f"{path}: says no operations per_step; {ANEW}")
        return Outcome(self.point, per_step * steps, steps, self._seconds(), self._figures())

    def _steps(self) -> int:
        """Of the tokenizer's training, by its last checkpoint; by its recipe where that was deleted since."""
        from motionloom.train import checkpoint

        train = self.tokenizer.train
        if _newest(self.tokenizer_run) is None and train.max_minutes is None:
            return train.max_steps
        return checkpoint.load(self.tokenizer_run, verify=False).step

    def _figures(self) -> dict[str, float]:
        """Of the judgements that are there."""
        found: dict[str, float] = {}
        for kind in reversed(JUDGED):
            if not self._is_judged(kind):
                continue
            report = self._report(kind)
            found |= {f"{kind}/{one['name']}": float(one["mean"]) for one in report["figures"]}
            apart: list[dict[str, Any]] = report.get("distances") or []
            for one, which in zip(apart[:1] + apart[1:][-1:], ("", ", floor"), strict=False):
                found |= {f"{kind}/FID{which}": one["fid"], f"{kind}/KID{which}": one["kid"]["mean"]}
        return found

    def _report(self, kind: str) -> dict[str, Any]:
        from motionloom.cli.eval import EVALUATED

        path = self.folder / kind / EVALUATED
        reports = read_json(path).get("reports")
        if not (isinstance(reports, list) and len(reports) == 1 and isinstance(reports[0], dict)):
            raise UserError(f"{path}: holds no report; {ANEW}")
        report: dict[str, Any] = reports[0]
        return report


# Trainings


def _train(recipe_name: str, overrides: list[str], recipe: Recipe, cache: Path) -> None:
    """Begin it, or go on from its last checkpoint; one that has come to its end stays as it is."""
    from motionloom.cli import train
    from motionloom.train import checkpoint

    newest = _newest(Path(recipe.output_dir) / recipe.experiment_name)
    if newest is not None and checkpoint.load(newest, verify=False).step >= recipe.train.max_steps:
        return
    train.run(recipe_name, overrides, cache, newest is not None, False)


def _newest(run_dir: Path) -> Path | None:
    from motionloom.train import checkpoint

    return checkpoint.latest(run_dir)
