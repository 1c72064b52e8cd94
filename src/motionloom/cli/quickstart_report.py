"""What a quickstart made: clips for unseen prompts, judged and laid out on a page."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from motionloom.durable import write_atomic

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from motionloom.cli.assemble import Parts
    from motionloom.cli.quickstart import Diary
    from motionloom.data.shapeworld import Facts, World
    from motionloom.evals.adherence import Adherence
    from motionloom.generate import Model
    from motionloom.studio.page import Chart, Sample

OWN_PROMPTS = 16
KNOWS_SHAPEWORLD = "vtp_shapeworld"
"""The tokenizer that was trained on the full world's training split."""


@dataclass(frozen=True)
class Wishes:
    """What the finished model is asked for."""

    prompts: list[str]
    title: str
    """What kind of prompts they are."""
    frames: int
    """Of each clip."""
    world: World | None = None
    facts: list[Facts] = field(default_factory=list)
    """What the oracle must find, with a world."""


@dataclass(frozen=True)
class Made:
    """What it answered."""

    clips: list[np.ndarray]
    marks: list[dict[str, bool]]
    """What of each prompt its clip obeys; empty where no oracle can say."""
    near: list[Near]
    """For the clips that are shown."""


class Near(NamedTuple):
    """The training clip most like a sample."""

    pixels_PHW3: Tensor
    caption: str
    distance: float


def finish(parts: Parts, out: Path, is_world: bool, prompts: int, shown: int, diary: Diary) -> Path:
    """Generate, judge, and write clips, sheets, report.json and index.html; returns the page."""
    from motionloom.cli.assemble import load_model

    model = load_model(out)
    wishes = _world_wishes(parts, prompts) if is_world else _own_wishes(parts, prompts)
    with diary.stage("generate", f"{len(wishes.prompts)} {wishes.title.lower()}"):
        clips = _generate(model, wishes, diary)
    with diary.stage("judge", "reading the clips back, and looking for copies of training clips"):
        marks = _judge(model, wishes, clips, diary) if wishes.world else [{} for _ in clips]
        made = Made(clips, marks, _nearest(parts, model, clips[:shown]))
    with diary.stage("pictures", "clips and sheets to disk"):
        samples = _pictures(parts, out, wishes, made)
    losses, chart = _losses(out)
    diary.report["heldout_loss"] = losses
    diary.report["seconds"] = {**diary.seconds, "all": round(sum(diary.seconds.values()), 1)}
    diary.report |= _provenance(parts)
    write_atomic(out / "report.json", json.dumps(diary.report, indent=1, default=str).encode())
    _page(parts, out, wishes, samples, chart, diary)
    return out / "index.html"


def _world_wishes(parts: Parts, count: int) -> Wishes:
    """Prompts of held-out combinations of ShapeWorld."""
    from motionloom.data.shapeworld import World
    from motionloom.evals.adherence import held_out_prompts

    video = parts.recipe.video
    world = World.quickstart(video.width, video.num_frames, video.fps)
    pairs = held_out_prompts(world, count, parts.recipe.seed)
    title = "Clips for combinations that the model never saw"
    return Wishes([p for p, _ in pairs], title, video.num_frames, world, [what for _, what in pairs])


def _own_wishes(parts: Parts, count: int) -> Wishes:
    """Captions of held-out clips, or of training clips where there are too few to hold any out."""
    clips, title = parts.heldout, "Clips for the captions of held-out clips"
    if not len(clips):
        clips, title = parts.loader, "Clips for captions of the training"
    captions: dict[str, None] = {}
    for n in range(min(len(clips), OWN_PROMPTS)):
        captions |= dict.fromkeys(" ".join(scenes) for scenes in clips.batch(n).captions)
    # Images among videos are a start to learn from; what is wanted is the commonest kind.
    frames = Counter(bucket.frames for bucket, rows in parts.cache.buckets.items() for _ in rows)
    return Wishes(list(captions)[: min(count, OWN_PROMPTS)], title, frames.most_common(1)[0][0])


def _generate(model: Model, wishes: Wishes, diary: Diary) -> list[np.ndarray]:
    from motionloom.generate import ClipRequest, generate_clips, recipe_sampling

    request = ClipRequest(tuple(wishes.prompts), wishes.frames, seed=model.recipe.train.sample_seed)
    with diary.console.progress("solver steps, all clips") as advance:
        made = generate_clips(model, request, recipe_sampling(model.recipe), batch_size=64, progress=advance)
        return [clip.numpy() for clip in made]


def _judge(model: Model, wishes: Wishes, clips: list[np.ndarray], diary: Diary) -> list[dict[str, bool]]:
    """Adherence of the clips, and what the oracle still reads after the tokenizer alone."""
    import torch

    from motionloom.data.shapeworld import facts, render_video
    from motionloom.evals.adherence import PROTOCOL, judge

    world = wishes.world
    assert world is not None
    result = judge(clips, wishes.facts, world)
    rates = {name: round(rate, 4) for name, rate in result.rates().items()}
    diary.report["prompt_adherence"] = {k: rates[k] for k in ("color", "shape", "motion", "all")}
    diary.report["also_obeyed"] = {
        k: v for k, v in rates.items() if k not in diary.report["prompt_adherence"]
    }
    diary.report["protocol"] = f"{PROTOCOL}, {len(clips)} prompts of held-out combinations, EMA weights"
    if model.recipe.tokenizer.name_or_path == KNOWS_SHAPEWORLD:
        diary.report["unseen_by_the_tokenizer_too"] = _new_to_the_tokenizer(result, wishes.facts)
    specs = [world.sample(model.recipe.seed, n, "test") for n in range(len(clips))]
    real = torch.stack([torch.from_numpy(render_video(spec)) for spec in specs])
    rebuilt = model.tokenizer.decode(model.tokenizer.encode(real))
    ceiling = judge(rebuilt.numpy(), [facts(spec) for spec in specs], world).rates()
    diary.report["after_the_tokenizer_alone"] = {k: round(v, 4) for k, v in ceiling.items()}
    return [{name: clip[name] for name in ("color", "shape", "motion")} for clip in result.obeyed]


def _new_to_the_tokenizer(result: Adherence, facts: list[Facts]) -> dict[str, float]:
    """Of the prompts whose combinations the full world holds out as well: it saw clips of the others."""
    from motionloom.data.shapeworld import World

    held_out = World.full().combinations("test")
    some = result.of([what.objects[0].combination in held_out for what in facts])
    rates = {"all": round(some.rates()["all"], 4)} if some.obeyed else {}
    return {"prompts": len(some.obeyed), **rates}


def _nearest(parts: Parts, model: Model, clips: list[np.ndarray]) -> list[Near]:
    """For each sample the closest training clip: its pixels, caption and distance."""
    import torch

    from motionloom.evals.nearest import nearest_clips

    rows = sorted(parts.loader.row_numbers(), key=parts.cache.bucket_of)
    samples = [torch.from_numpy(clip) for clip in clips]
    found = nearest_clips(samples, parts.cache.decoded(rows, model.tokenizer))
    best = list(parts.cache.decoded([rows[n.index] for n in found], model.tokenizer))
    names = [" | ".join(row["captions"]) for row in parts.cache.metadata([rows[n.index] for n in found])]
    return [Near(clip, name, n.distance) for clip, name, n in zip(best, names, found, strict=True)]


def _pictures(parts: Parts, out: Path, wishes: Wishes, made: Made) -> list[Sample]:
    """Every clip as a file, the shown ones with the training clip that is most like them, and the sheets."""
    from motionloom.data.media import write_video
    from motionloom.data.sheets import animated_sheet, contact_sheet
    from motionloom.studio.page import Sample

    fps, shown = parts.cache.fps, len(made.near)
    for n, clip in enumerate(made.clips):
        write_video(out / "clips" / f"{n:03d}.webp", clip, fps, quality=100)
    samples = []
    for n, near in enumerate(made.near):
        write_video(out / "clips" / f"{n:03d}_nearest.webp", near.pixels_PHW3.numpy(), fps, quality=100)
        note = f"nearest: “{near.caption}”, {near.distance:.0f} levels away"
        files = f"clips/{n:03d}.webp", f"clips/{n:03d}_nearest.webp"
        samples.append(Sample(wishes.prompts[n], *files, note, made.marks[n]))
    contact_sheet(made.clips[:shown], wishes.prompts[:shown], out / "sheet.png", columns=2)
    animated_sheet(
        made.clips[:shown], out / "sheet.webp", fps=fps, columns=6, captions=wishes.prompts[:shown]
    )
    return samples


def _page(parts: Parts, out: Path, wishes: Wishes, samples: list[Sample], chart: Chart, diary: Diary) -> None:
    from motionloom.studio.page import Page, Table, Tile, write_page

    report, losses = diary.report, diary.report["heldout_loss"]
    tiles = [Tile(f"{k} as asked", f"{rate:.0%}") for k, rate in report.get("prompt_adherence", {}).items()]
    tiles += [
        Tile("steps", str(report["train"]["steps"])),
        Tile("parameters", f"{report['parameters'] / 1e6:.1f} M"),
        Tile("minutes in all", f"{report['seconds']['all'] / 60:.1f}"),
        Tile("held-out loss", f"{losses['first']:.3f} → {losses['last']:.3f}" if losses else "–"),
    ]
    page = Page(
        title=f"MotionLoom: {parts.recipe.experiment_name}",
        subtitle="A text-to-video model, trained on this machine.",
        tiles=tiles,
        samples=samples,
        samples_title=wishes.title,
        samples_note="Left: generated. Right: the training clip that looks most like it, and how far its "
        "pixels are away, of 255 levels.",
        charts=[chart],
        tables=[Table("Time", ("stage", "seconds"), [(k, f"{v:g}") for k, v in report["seconds"].items()])],
        commands=_commands(out, wishes.prompts[0]),
    )
    write_page(page, out / "index.html")


def _losses(out: Path) -> tuple[dict[str, float], Chart]:
    """First and last held-out loss, and the curves."""
    from motionloom.studio.page import Chart, line_chart

    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    def curve(key: str) -> list[tuple[float, float]]:
        return [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]

    curves = {
        "train": curve("loss"),
        "held out": curve("heldout_loss"),
        "held out, EMA": curve("heldout_loss_ema"),
    }
    chart = Chart(
        "Loss",
        "Velocity error by optimiser step; the held-out clips are never trained on.",
        line_chart(curves, "step"),
    )
    held_out = [loss for _, loss in curves["held out"]]
    if not held_out:
        return {}, chart
    return {"first": held_out[0], "lowest": min(held_out), "last": held_out[-1]}, chart


def _provenance(parts: Parts) -> dict[str, Any]:
    import torch

    count = sum(p.numel() for module in parts.method.modules().values() for p in module.parameters())
    return {
        "parameters": count,
        "tokens_per_clip": parts.tokens_per_clip(),
        "seed": parts.recipe.seed,
        "command": shlex.join(["motionloom", *sys.argv[1:]]),
        "machine": {
            "device": str(parts.ranks.device),
            "threads": torch.get_num_threads(),
            "processor": platform.processor() or platform.machine(),
            "torch": torch.__version__,
        },
    }


def _commands(out: Path, prompt: str) -> str:
    run, cache = shlex.quote(str(out)), shlex.quote(str(out / "cache"))
    return "\n".join(
        [
            f"motionloom generate {run} --prompt {shlex.quote(prompt)} --out more_clips",
            f"motionloom inspect {cache}    # what the model was trained on, as a contact sheet",
            f"motionloom doctor {run} --cache {cache}",
            f"tensorboard --logdir {shlex.quote(str(out / 'tensorboard'))}",
            "motionloom quickstart --data path/to/your/clips --out runs/mine",
        ]
    )
