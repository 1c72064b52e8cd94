"""All judges under one roof: which of them can say something of a clip, and what each needs.

`judge` is what ``motionloom judge`` calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from motionloom.data.shapeworld import World
from motionloom.errors import UserError
from motionloom.evals.adherence import judge_adherence
from motionloom.evals.asked import Sample
from motionloom.evals.cuts import Detector, open_detector
from motionloom.evals.encoders import Encoder
from motionloom.evals.exactness import judge_conditions
from motionloom.evals.figures import Report
from motionloom.evals.masked import judge_masked
from motionloom.evals.scenes import judge_scenes
from motionloom.evals.seam import judge_seams, seams
from motionloom.evals.sounding import judge_sound
from motionloom.evals.vbench import Aesthetic, Eyes, judge_vbench


@dataclass(frozen=True)
class Tools:
    """What judges look with. ``world`` narrows what the oracle expects; ``real`` are clips to compare with.

    ``detector`` None: ShapeWorld's own where all captions are of it, else the change of pixels.
    ``aesthetic``: a linear head on the encoder's vectors, see `evals.vbench.Aesthetic`.
    """

    encoder: Encoder
    world: World
    detector: Detector | None = None
    real: tuple[Sample, ...] = ()
    aesthetic: Path | None = None


@dataclass(frozen=True)
class Judge:
    """One kind. ``needs``: what a clip must have, in words for people. ``usual``: runs without a word."""

    needs: str
    can: Callable[[Sample], bool]
    run: Callable[[Sequence[Sample], Tools], Report]
    usual: bool = True


def _of_world(samples: Sequence[Sample]) -> bool:
    return all(sample.asked.facts is not None for sample in samples)


def _seen(sample: Sample) -> bool:
    return len(sample.video_PHW3) > 0


def _one_scene(sample: Sample) -> bool:
    return _seen(sample) and len(sample.asked.captions) == 1 and sample.asked.facts is not None


def _partly_given(sample: Sample) -> bool:
    share = sample.given_PHW.mean(axis=(1, 2))
    return bool(((share > 0) & (share < 1)).any())


def _seams(samples: Sequence[Sample], tools: Tools) -> Report:
    world = tools.world if _of_world(samples) else None
    return judge_seams(samples, tools.encoder, world, [clip.video_PHW3 for clip in tools.real])


def _scenes(samples: Sequence[Sample], tools: Tools) -> Report:
    known = _of_world(samples)
    detector = tools.detector or open_detector("shapeworld" if known else "pixels")
    reference = [clip for clip in tools.real if len(clip.asked.scenes) > 1]
    return judge_scenes(samples, tools.encoder, detector, tools.world if known else None, reference)


def _vbench(samples: Sequence[Sample], tools: Tools) -> Report:
    head = None if tools.aesthetic is None else Aesthetic(tools.aesthetic, tools.encoder)
    return judge_vbench(samples, Eyes(tools.encoder, tools.encoder, tools.world, head))


def _masked(samples: Sequence[Sample], tools: Tools) -> Report:
    return judge_masked(samples, tools.world if _of_world(samples) else None)


JUDGES: dict[str, Judge] = {
    "adherence": Judge(
        "one scene, and a caption that names colour, shape, size, motion and background of ShapeWorld",
        _one_scene,
        lambda samples, tools: judge_adherence(samples, tools.world),
    ),
    "conditions": Judge(
        "a condition with its source",
        lambda sample: _seen(sample) and any(given.source_PHW3 is not None for given in sample.asked.given),
        lambda samples, tools: judge_conditions(samples),
    ),
    "seam": Judge(
        "a condition that gives whole frames, but not all of them",
        lambda sample: bool(seams(sample)),
        _seams,
    ),
    "masked": Judge("a condition that gives a part of a frame", _partly_given, _masked),
    "scenes": Judge(
        "two or more scenes and a picture",
        lambda sample: _seen(sample) and len(sample.asked.scenes) > 1,
        _scenes,
    ),
    "sound": Judge(
        "a sound track, and captions of ShapeWorld",
        lambda sample: sample.sound is not None and sample.asked.facts is not None,
        lambda samples, tools: judge_sound(samples, tools.world),
    ),
    "vbench": Judge("a picture", _seen, _vbench, usual=False),
}


def judge(samples: Sequence[Sample], tools: Tools, kinds: Sequence[str] = ()) -> list[Report]:
    """The reports of ``kinds``, or of every usual kind that some clip allows; a judge skips what it cannot
    judge.

    Raises:
        UserError: an unknown kind, or one for which no clip has what it needs.
    """
    for kind in kinds:
        if kind not in JUDGES:
            raise UserError(f"--kind {kind}: choose {', '.join(JUDGES)}")
    reports = []
    for kind in kinds or [kind for kind, judge in JUDGES.items() if judge.usual]:
        fit = [sample for sample in samples if JUDGES[kind].can(sample)]
        if fit:
            reports.append(JUDGES[kind].run(fit, tools))
        elif kinds:
            raise UserError(f"--kind {kind}: no clip has {JUDGES[kind].needs}; see clips.json")
    if not reports:
        raise UserError(
            "nothing to judge: no captions of ShapeWorld, no scenes, no conditions; see clips.json"
        )
    return reports
