"""A student against its teacher, from the same noise under the same words: does it obey as well, does it make
the same clip, is it as varied, and what does it cost.

Protocol ``likeness-v1``. Both make every prompt with every seed; a clip's first noise is keyed by the seed
and the prompt's number, so it is the same for both where their tokenizers are. ``adherence gap``: the
teacher's share of stretches with colour, shape and motion as asked, less the student's. ``agree``: share of
stretches in which both show the same. Distances are root mean squares: of pixels in levels of 255, of latents
as a share of the teacher's own. What "near" means is told beside them: the teacher's clip of another seed.
An evaluation is a pass over as many tokens as the clip has. ``spread``: how far clips of one prompt lie
apart, over their seeds; of a student that always makes the same clip it is 0.

P pixel frames, H x W pixels; F, S, C token frames, cells and channels; N clips.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from torch import nn

from motionloom.data.shapeworld import Facts, parse
from motionloom.data.shapeworld.oracle import Reading
from motionloom.evals.asked import Video
from motionloom.evals.drift import ATTRIBUTES, Look, obeyed, ratio_of_means, readings
from motionloom.evals.encoders import unit
from motionloom.evals.figures import Figure, Report, Target, summarise
from motionloom.evals.latency import counted
from motionloom.generate import Clip, ClipRequest, Model, Sampling, generate

PROTOCOL = "likeness-v1"
TARGETS = {
    "adherence gap": Target(0.05, least=False),
    "times fewer evaluations": Target(10),
    "times less time": Target(8),
}
AGREED = ("color", "shape", "motion", "size", "background")
RATIOS = {
    "times fewer evaluations": ("teacher: evaluations", "student: evaluations", "calls"),
    "times less time": ("teacher: seconds", "student: seconds", "clock"),
    "pixel spread over teacher's": (
        "student: spread in pixels",
        "teacher: spread in pixels",
        "pixels",
    ),
    "encoder spread over teacher's": ("student: spread by encoder", "teacher: spread by encoder", ""),
}
"""Figures that are one mean over another: of what, over what, and who looked ("" is the encoder)."""


@dataclass(frozen=True, eq=False)
class Made:
    """A clip and what it cost. ``latents_FSC``: its video tokens; None: there are none to compare."""

    video_PHW3: Video
    latents_FSC: NDArray[np.float32] | None = None
    evaluations: float = 0.0
    """Passes over as many tokens as the clip has."""
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class Pair:
    """One prompt and seed, by both."""

    prompt: str
    seed: int
    student: Made
    teacher: Made

    @property
    def name(self) -> str:
        """For lists."""
        return f"{self.prompt} (seed {self.seed})"


@dataclass(frozen=True)
class Maker:
    """A model and how it samples."""

    model: Model
    sampling: Sampling


@dataclass(frozen=True)
class Size:
    """Of the clips that both make; None: as the student was trained."""

    frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    negative: str = ""
    """What guidance pushes both away from."""


def make_pairs(
    student: Maker,
    teacher: Maker,
    prompts: Sequence[str],
    seeds: Sequence[int],
    size: Size | None = None,
    *,
    batch_size: int = 8,
    clock: Callable[[], float] = time.perf_counter,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> list[Pair]:
    """Every prompt with every seed. The two take turns, so that other work on the machine falls on both.

    Args:
        tell: hears (batches done, batches in all).

    Raises:
        UserError: a size that one of the two cannot make.
    """
    size = _filled(size or Size(), student.model)
    starts = range(0, len(prompts), batch_size)
    compare = student.model.tokenizer.fingerprint() == teacher.model.tokenizer.fingerprint()
    pairs: list[Pair] = []
    for n, seed in enumerate(seeds):
        request = ClipRequest(
            tuple(prompts),
            frames=size.frames,
            height=size.height,
            width=size.width,
            fps=size.fps,
            negative=size.negative,
            seed=seed,
        )
        coming = [
            (maker.model, generate(maker.model, request, maker.sampling, batch_size=batch_size))
            for maker in (student, teacher)
        ]
        for k, begin in enumerate(starts):
            some = prompts[begin : begin + batch_size]
            both = [_take(model, clips, len(some), compare, clock) for model, clips in coming]
            pairs += [Pair(p, seed, s, t) for p, s, t in zip(some, *both, strict=True)]
            tell(n * len(starts) + k + 1, len(seeds) * len(starts))
    return pairs


def _filled(size: Size, model: Model) -> Size:
    frames, height, width = model.clip_shape
    return Size(
        size.frames or frames,
        size.height or height,
        size.width or width,
        size.fps or model.fps,
        size.negative,
    )


def _take(
    model: Model, clips: Iterator[Clip], count: int, compare: bool, clock: Callable[[], float]
) -> list[Made]:
    """The clips of one batch, which share its cost evenly; their latents only where they ``compare``."""
    network = model.predictor.backbone
    assert isinstance(network, nn.Module)
    with counted(network) as work:
        began = clock()
        batch = list(islice(clips, count))
        seconds = clock() - began
    made = []
    for clip in batch:
        assert clip.video_PHW3 is not None, "a model that makes a picture"
        latents = clip.tokens["video"].float().cpu().numpy() if compare else None
        tokens = sum(x_FSC.shape[0] * x_FSC.shape[1] for x_FSC in clip.tokens.values())
        made.append(Made(clip.video_PHW3.numpy(), latents, work.tokens / count / tokens, seconds / count))
    return made


def pixel_distance(a_PHW3: Video, b_PHW3: Video) -> float | None:
    """Root mean square in levels; None of clips of two sizes."""
    if a_PHW3.shape != b_PHW3.shape:
        return None
    return float(np.sqrt(np.mean((a_PHW3.astype(np.float32) - b_PHW3.astype(np.float32)) ** 2)))


def latent_distance(a: NDArray[np.float32] | None, b: NDArray[np.float32] | None) -> float | None:
    """Root mean square of a - b over that of ``b``; None where the two do not compare."""
    if a is None or b is None or a.shape != b.shape:
        return None
    return float(np.sqrt(np.mean((a - b) ** 2) / max(float(np.mean(b**2)), 1e-12)))


Row = dict[str, float | None]


def judge_likeness(pairs: Sequence[Pair], look: Look) -> Report:
    """All pairs; in a world the oracle is asked as well, and ``adherence gap`` told where prompts are of it.

    ``details``: ``seeds`` and ``prompts``, how many of each.
    """
    rows = [_costs(pair) | _distances(pair, pairs) for pair in pairs]
    if look.world is not None:
        for row, pair in zip(rows, pairs, strict=True):
            row |= _attributes(pair, look)
    for row, more in zip(rows, _spreads(pairs, look), strict=True):
        row |= more
    groups = [pair.prompt for pair in pairs]
    says = {name: "oracle" for row in rows for name in row if name.split(": ")[-1] in ATTRIBUTES}
    says |= {
        "": "pixels",
        "adherence gap": "oracle",
        "student: seconds": "clock",
        "teacher: seconds": "clock",
    }
    says |= {f"{who}: evaluations": "calls" for who in WHO}
    says |= {"latent distance": "latents", "latent distance, teacher of another seed": "latents"}
    if look.encoder is not None:
        says |= {f"{who}: spread by encoder": look.encoder.name for who in WHO}
    details = {"prompts": len(set(groups)), "seeds": len({pair.seed for pair in pairs})}
    report = summarise(
        "likeness",
        PROTOCOL,
        [pair.name for pair in pairs],
        rows,
        says,
        targets=TARGETS,
        groups=groups,
        details=details,
    )
    ratios = [figure for name in RATIOS if (figure := _ratio(name, rows, groups, look)) is not None]
    return replace(report, figures=(*ratios, *report.figures))


WHO = ("student", "teacher")


def _costs(pair: Pair) -> Row:
    row: Row = {}
    for who, made in zip(WHO, (pair.student, pair.teacher), strict=True):
        row |= {f"{who}: evaluations": made.evaluations or None, f"{who}: seconds": made.seconds or None}
    return row


def _distances(pair: Pair, pairs: Sequence[Pair]) -> Row:
    """To the teacher's clip, and the teacher's clip of the prompt's next seed to it."""
    same = [other for other in pairs if other.prompt == pair.prompt]
    other = same[(same.index(pair) + 1) % len(same)]
    row: Row = {
        "pixel distance": pixel_distance(pair.student.video_PHW3, pair.teacher.video_PHW3),
        "latent distance": latent_distance(pair.student.latents_FSC, pair.teacher.latents_FSC),
    }
    if other is not pair:
        again, own = other.teacher, pair.teacher
        row["pixel distance, teacher of another seed"] = pixel_distance(again.video_PHW3, own.video_PHW3)
        row["latent distance, teacher of another seed"] = latent_distance(again.latents_FSC, own.latents_FSC)
    return row


def _attributes(pair: Pair, look: Look) -> Row:
    """What the oracle reads in both."""
    seen = [readings(made.video_PHW3, look) for made in (pair.student, pair.teacher)]
    row: Row = {}
    if (wanted := parse(pair.prompt)) is not None:
        row |= _adherence(seen, wanted)
    shown = [[_shown(reading) for reading in one] for one in seen]
    for name in AGREED:
        both = zip(*shown, strict=True) if len(shown[0]) == len(shown[1]) else ()
        agree = [a.get(name) is not None and a.get(name) == b.get(name) for a, b in both]
        row[f"agree: {name}"] = float(np.mean(agree)) if agree else None
    return row


def _adherence(seen: Sequence[Sequence[Reading]], wanted: Facts) -> Row:
    student, teacher = (obeyed(one, wanted) for one in seen)
    row: Row = {"adherence gap": teacher["all"] - student["all"]}
    for name in ATTRIBUTES:
        row |= {f"student: {name}": student[name], f"teacher: {name}": teacher[name]}
    return row


def _shown(reading: Reading) -> dict[str, str]:
    """Attributes of the foremost object, and the background."""
    found = {"background": reading.background}
    if reading.objects:
        a = reading.objects[0].attributes
        found |= {"color": a.color, "shape": a.shape, "motion": a.motion, "size": a.size}
    return found


def _spreads(pairs: Sequence[Pair], look: Look) -> list[Row]:
    """Of each clip to those of the other seeds of its prompt, by each maker."""
    rows: list[Row] = [{} for _ in pairs]
    for who in WHO:
        clips = [getattr(pair, who).video_PHW3 for pair in pairs]
        vectors_ND = None
        if look.encoder is not None:
            vectors_ND = unit(np.stack([look.encoder.embed(clip).mean(0) for clip in clips]))
        for n, pair in enumerate(pairs):
            others = [m for m, other in enumerate(pairs) if other.prompt == pair.prompt and m != n]
            if not others:
                continue
            apart = [d for m in others if (d := pixel_distance(clips[n], clips[m])) is not None]
            rows[n][f"{who}: spread in pixels"] = float(np.mean(apart)) if apart else None
            if vectors_ND is not None:
                rows[n][f"{who}: spread by encoder"] = float(1 - (vectors_ND[others] @ vectors_ND[n]).mean())
    return rows


def _ratio(
    name: str, rows: Sequence[Mapping[str, float | None]], groups: Sequence[str], look: Look
) -> Figure | None:
    above, below, looked = RATIOS[name]
    known = [
        (a, b, group)
        for row, group in zip(rows, groups, strict=True)
        if (a := row.get(above)) is not None and (b := row.get(below)) is not None
    ]
    if not known:
        return None
    above_N, below_N, kept = zip(*known, strict=True)
    interval = ratio_of_means(np.array(above_N), np.array(below_N), PROTOCOL, name, groups=kept)
    if interval is None:
        return None
    seen_by = looked or (look.encoder.name if look.encoder is not None else "")
    return Figure(name, interval, PROTOCOL, seen_by, TARGETS.get(name))
