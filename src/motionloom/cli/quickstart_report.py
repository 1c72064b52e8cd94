"""What a quickstart made: clips for unseen prompts, judged and laid out on a page."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from motionloom.cli.assemble import Parts
    from motionloom.cli.quickstart import Diary
    from motionloom.data.shapeworld import Facts, World
    from motionloom.generate import Model
    from motionloom.studio.page import Chart

OWN_PROMPTS = 16


def finish(parts: Parts, out: Path, is_world: bool, prompts: int, shown: int, diary: Diary) -> Path:
    """Generate, judge, and write clips, sheet, report.json and index.html; returns the page."""
    from motionloom.cli.assemble import load_model

    model = load_model(out)
    world, wanted, captions = _wishes(parts, is_world, prompts)
    with diary.stage("generate", f"{len(captions)} clips for prompts that training never saw"):
        clips = _generate(model, captions, diary)
    marks: list[dict[str, bool]] = [{} for _ in captions]
    with diary.stage("judge", "reading the clips back, and looking for copies of training clips"):
        if world is not None:
            marks = _judge(model, world, clips, wanted, diary)
        near = _nearest(parts, model, clips[:shown])
    with diary.stage("page", "clips, sheet, report and page"):
        page = _write(parts, out, captions, clips, marks, near, shown, diary)
    return page


def _wishes(parts: Parts, is_world: bool, count: int) -> tuple[World | None, list[Facts], list[str]]:
    """Prompts of held-out combinations of ShapeWorld, or the captions of held-out clips."""
    video = parts.recipe.video
    if is_world:
        from motionloom.data.shapeworld import World
        from motionloom.evals.adherence import held_out_prompts

        world = World.quickstart(video.width, video.num_frames, video.fps)
        pairs = held_out_prompts(world, count, parts.recipe.seed)
        return world, [what for _, what in pairs], [prompt for prompt, _ in pairs]
    captions: dict[str, None] = {}
    for n in range(len(parts.heldout)):
        captions |= dict.fromkeys(" ".join(scenes) for scenes in parts.heldout.batch(n).captions)
    return None, [], list(captions)[:OWN_PROMPTS]


def _generate(model: Model, prompts: Sequence[str], diary: Diary) -> list[np.ndarray]:
    from motionloom.generate import ClipRequest, generate_clips, recipe_sampling

    request = ClipRequest(tuple(prompts), seed=model.recipe.train.sample_seed)
    with diary.console.progress("network passes") as advance:
        made = generate_clips(model, request, recipe_sampling(model.recipe), batch_size=64, progress=advance)
        return [clip.numpy() for clip in made]


def _judge(
    model: Model, world: World, clips: list[np.ndarray], wanted: list[Facts], diary: Diary
) -> list[dict[str, bool]]:
    """Adherence of the clips, and what the oracle still reads after the tokenizer alone."""
    import torch

    from motionloom.data.shapeworld import facts, render_video
    from motionloom.evals.adherence import PROTOCOL, judge

    result = judge(clips, wanted, world)
    rates = {name: round(rate, 4) for name, rate in result.rates().items()}
    diary.report["prompt_adherence"] = {k: rates[k] for k in ("color", "shape", "motion", "all")}
    diary.report["also_obeyed"] = {
        k: v for k, v in rates.items() if k not in diary.report["prompt_adherence"]
    }
    diary.report["protocol"] = f"{PROTOCOL}, {len(clips)} prompts of held-out combinations, EMA weights"
    specs = [world.sample(model.recipe.seed, n, "test") for n in range(len(clips))]
    real = torch.stack([torch.from_numpy(render_video(spec)) for spec in specs])
    rebuilt = model.tokenizer.decode(model.tokenizer.encode(real))
    ceiling = judge(rebuilt.numpy(), [facts(spec) for spec in specs], world).rates()
    diary.report["after_the_tokenizer_alone"] = {k: round(v, 4) for k, v in ceiling.items()}
    return [{name: clip[name] for name in ("color", "shape", "motion")} for clip in result.obeyed]


def _nearest(parts: Parts, model: Model, clips: list[np.ndarray]) -> list[tuple[Tensor, str, float]]:
    """For each sample the closest training clip: its pixels, caption and distance."""
    import torch

    from motionloom.evals.nearest import nearest_clips

    rows = parts.loader.row_numbers()

    def decoded(numbers: Sequence[int]) -> list[Tensor]:
        return [model.tokenizer.decode(row.latents_FhwC[None])[0] for row in parts.cache.rows(numbers)]

    def training() -> Any:
        for start in range(0, len(rows), 256):
            yield from decoded(rows[start : start + 256])

    found = nearest_clips([torch.from_numpy(clip) for clip in clips], training())
    best = decoded([rows[n.index] for n in found])
    names = [" | ".join(row["captions"]) for row in parts.cache.metadata([rows[n.index] for n in found])]
    return [(clip, name, n.distance) for clip, name, n in zip(best, names, found, strict=True)]


def _write(
    parts: Parts,
    out: Path,
    captions: list[str],
    clips: list[np.ndarray],
    marks: list[dict[str, bool]],
    near: list[tuple[Tensor, str, float]],
    shown: int,
    diary: Diary,
) -> Path:
    from motionloom.data.media import write_video
    from motionloom.data.sheets import animated_sheet, contact_sheet
    from motionloom.studio.page import Page, Sample, Table, Tile, write_page

    fps = parts.cache.fps
    for n, clip in enumerate(clips):
        write_video(out / "clips" / f"{n:03d}.webp", clip, fps, quality=100)
    samples = []
    for n, (pixels, name, distance) in enumerate(near):
        write_video(out / "clips" / f"{n:03d}_nearest.webp", pixels.numpy(), fps, quality=100)
        note = f"nearest training clip (right): “{name}”, {distance:.0f} levels away"
        samples.append(
            Sample(captions[n], f"clips/{n:03d}.webp", f"clips/{n:03d}_nearest.webp", note, marks[n])
        )
    contact_sheet(clips[:shown], captions[:shown], out / "sheet.png", columns=2)
    animated_sheet(clips[:shown], out / "sheet.webp", fps=fps, columns=6, captions=captions[:shown])
    losses, chart = _losses(out)
    diary.report["heldout_loss"] = losses
    diary.report["seconds"] = {**diary.seconds, "all": round(sum(diary.seconds.values()), 1)}
    diary.report |= _provenance(parts)
    adherence = diary.report.get("prompt_adherence", {})
    tiles = [Tile(name, f"{rate:.0%}") for name, rate in adherence.items()]
    tiles += [
        Tile("steps", str(diary.report["train"]["steps"])),
        Tile("parameters", f"{diary.report['parameters'] / 1e6:.1f} M"),
        Tile("minutes in all", f"{diary.report['seconds']['all'] / 60:.1f}"),
        Tile("held-out loss", f"{losses['first']:.3f} → {losses['last']:.3f}" if losses else "–"),
    ]
    write_page(
        Page(
            title=f"MotionLoom: {parts.recipe.experiment_name}",
            subtitle="A text-to-video model, trained from nothing on this machine.",
            tiles=tiles,
            samples=samples,
            samples_title="Clips for prompts that training never saw",
            samples_note="Left: generated. Right: the training clip that looks most like it.",
            charts=chart,
            tables=[
                Table(
                    "Seconds",
                    ("stage", "seconds"),
                    [(k, f"{v:g}") for k, v in diary.report["seconds"].items()],
                )
            ],
            commands=_commands(out, captions[0]),
        ),
        out / "index.html",
    )
    part = out / "report.json.part"
    part.write_text(json.dumps(diary.report, indent=1, default=str), encoding="utf-8")
    os.replace(part, out / "report.json")
    return out / "index.html"


def _losses(out: Path) -> tuple[dict[str, float], list[Chart]]:
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
        line_chart(curves),
    )
    held_out = [loss for _, loss in curves["held out"]]
    return ({"first": held_out[0], "last": held_out[-1]} if held_out else {}), [chart]


def _provenance(parts: Parts) -> dict[str, Any]:
    import torch

    count = sum(p.numel() for module in parts.method.modules().values() for p in module.parameters())
    return {
        "parameters": count,
        "tokens_per_clip": parts.tokens_per_clip(),
        "seed": parts.recipe.seed,
        "command": " ".join(["motionloom", *sys.argv[1:]]),
        "machine": {
            "device": str(parts.ranks.device),
            "threads": torch.get_num_threads(),
            "processor": platform.processor() or platform.machine(),
            "torch": torch.__version__,
        },
    }


def _commands(out: Path, prompt: str) -> str:
    return "\n".join(
        [
            f'motionloom generate {out} --prompt "{prompt}" --out more_clips',
            f"motionloom inspect {out / 'cache'}        # what the model was trained on, as a contact sheet",
            f"motionloom doctor {out} --cache {out / 'cache'}",
            f"tensorboard --logdir {out / 'tensorboard'}",
            "motionloom quickstart --data path/to/your/clips --out runs/mine",
        ]
    )
