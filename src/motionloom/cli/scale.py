"""``motionloom scale``: the same two recipes over variants, budgets and seeds, point by point.

Every stage of a point is a command of its own (cache, train, convert, eval); here they run one after the
other. What was finished is written down, so a second call with the same --out goes on where the first was
stopped.

    out/caches/     pixels for tokenizers, shared by the points that read the same
    out/points/     a folder each: both runs, the tokenizer, its latents, what was judged, and its settings;
                    in outcome.json what came of it, which outlives the rest
    out/scaled.*    the answer, written anew after every point
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from motionloom.cli.console import FAILED, Out, new_folder
from motionloom.cli.scale_files import alone
from motionloom.errors import UserError

if TYPE_CHECKING:
    from motionloom.cli.scale_point import Outcome
    from motionloom.config.study import Study


def run(study_name: str, out: Path, dry_run: bool, as_json: bool) -> None:
    """Every point of a study; exit code 1 where one has failed.

    Raises:
        UserError: the study, one of its recipes or a file that it names is wrong; nothing was made then.
    """
    from motionloom.cli.scale_operations import operations_ahead
    from motionloom.cli.scale_point import Job
    from motionloom.cli.scale_report import listed, write_report
    from motionloom.config.study import load_study, packaged_studies

    console = Out(as_json)
    study = load_study(study_name)
    _check(study, packaged_studies().get(study_name))
    jobs = [Job(study, point, out, console) for point in study.points()]
    for job in jobs:
        job.check()
    if dry_run:
        listed(console, jobs, operations_ahead(jobs, console))
        return
    outcomes: list[Outcome] = []
    with alone(new_folder(out)):
        for number, job in enumerate(jobs, 1):
            outcomes.append(job.outcome(f"point {number} of {len(jobs)} ({job.point})"))
            answer, tables = write_report(study, outcomes, out)
    for table in tables:
        console.table(*table)
    known = sorted({name for one in outcomes for name in one.figures})
    for name in answer["measure"]:
        if known and name not in known:
            console.note(f"measure {name}: no point has it; there are {', '.join(known)}")
    failed = sum(bool(one.failed) for one in outcomes)
    lines = [f"{failed} of {len(jobs)} points failed: the same command tries them again"] if failed else []
    console.result(answer, [*lines, answer["scaled"], answer["page"], answer["plot"]])
    if failed:
        raise SystemExit(FAILED)


def _check(study: Study, packaged: Path | None) -> None:
    """What would otherwise be found out after the first training."""
    from motionloom.cli import eval as command
    from motionloom.data.shapeworld import PRESETS
    from motionloom.evals.encoders import open_encoder

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("motionloom scale trains in one process: run it without torchrun")
    for key in ("train", "test"):
        if not Path(getattr(study, key)).is_file():
            fix = f"the first lines of {packaged} say how it is made" if packaged else "name a manifest.jsonl"
            raise UserError(f"{key} {getattr(study, key)}: no such manifest; {fix}")
    if study.world and study.world not in PRESETS:
        raise UserError(f"world {study.world}: choose {', '.join(PRESETS)}")
    if study.extractor not in ("auto", "none"):
        open_encoder(study.extractor)
    if study.lpips not in (command.AUTO, command.NONE, *command.LPIPS):
        known = ", ".join(command.LPIPS)
        raise UserError(f"lpips {study.lpips}: choose {known}, {command.AUTO} or {command.NONE}")
    if study.lpips in command.LPIPS:
        command.open_perceptual(study.lpips)
