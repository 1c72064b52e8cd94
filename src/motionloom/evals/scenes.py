"""Clips of several scenes: is it the same character, does each scene do what its own caption says, do the
cuts fall where asked; for clips of any content by an encoder, for ShapeWorld's by the oracle.

Protocol ``scenes-v1``. A scene begins at the found cut that is paired with the asked one, so that what a
scene shows and when it begins are judged apart; where none was found, at the asked one. Consistency figures
never come without the cuts' beside them: a clip without any cut is perfectly consistent. The embedding of a
scene is the mean of its frames'.

S scenes, P frames, D numbers of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motionloom.data.shapeworld import COLORS, Attributes, Facts, World, adherence, oracle
from motionloom.data.shapeworld.spec import MIN_FRAMES
from motionloom.evals.asked import Sample, Video
from motionloom.evals.cuts import CutMatch, Detector, match_cuts
from motionloom.evals.encoders import Encoder, TextImageEncoder, Vectors, unit
from motionloom.evals.figures import Interval, Report, Target, bootstrap, summarise

PROTOCOL = "scenes-v1"
TARGETS = {
    "own caption": Target(0.80),
    "same character": Target(0.90),
    "cuts within 1 frame": Target(0.95),
}
CHARACTER = ("color", "shape", "size")
CUT_FIGURES = (
    "shot cut accuracy",
    "cuts within 1 frame",
    "transition deviation",
    "missed cuts",
    "extra cuts",
)
OBEYED = ("color", "shape", "motion", "background")
TRIMMED = 8  # scenes of so many frames lose one at each cut, where a smear would count as an object
BINS = 20  # of the histograms of the consistency gap


def scene_bounds(match: CutMatch, asked: Sequence[int], frames: int) -> list[tuple[int, int]]:
    """[first, end) of every asked scene, at the found cuts where these leave every scene frames enough."""
    partner = dict(match.pairs)
    bounds = list(pairwise([0, *(partner.get(cut, cut) for cut in asked), frames]))
    if all(end - first >= MIN_FRAMES for first, end in bounds):
        return bounds
    return list(pairwise([0, *asked, frames]))


def shots(video_PHW3: Video, bounds: Sequence[tuple[int, int]]) -> list[Video]:
    """The scenes' frames, long ones less the frames at their cuts."""
    parts = []
    for first, end in bounds:
        if end - first >= TRIMMED:
            first, end = first + (first > 0), end - (end < len(video_PHW3))
        parts.append(video_PHW3[first:end])
    return parts


# By an encoder


@dataclass(frozen=True)
class Consistency:
    """Cosines of a clip's scenes.

    Attributes:
        visual: mean over all pairs of scenes; ``consecutive`` over neighbours alone.
        semantic: mean of each scene with its own caption; None without a text encoder.
        intra: within scenes, of each frame with the one before and with the first (VBench, arXiv:2311.17982).
        inter: over pairs of scenes, of their first, middle and last frames.
        drift_S: each scene with the first.
    """

    visual: float
    consecutive: float
    semantic: float | None
    intra: float
    inter: float
    drift_S: tuple[float, ...]

    @property
    def sequence(self) -> float | None:
        """Mean of visual and semantic consistency, as Mask2DiT (arXiv:2503.19881) counts it."""
        return None if self.semantic is None else (self.visual + self.semantic) / 2


def consistency(scenes: Sequence[Video], captions: Sequence[str], encoder: Encoder) -> Consistency:
    """Of two or more scenes, (P, H, W, 3) each."""
    assert len(scenes) == len(captions) > 1
    frames = [encoder.embed(scene) for scene in scenes]
    scene_SD = unit(np.stack([vectors.mean(0) for vectors in frames]))
    alike_SS = scene_SD @ scene_SD.T
    pairs = list(combinations(range(len(scenes)), 2))
    semantic = None
    if isinstance(encoder, TextImageEncoder):
        semantic = float((scene_SD * encoder.embed_text(captions)).sum(1).mean())
    keys = [vectors[[0, len(vectors) // 2, -1]] for vectors in frames]
    return Consistency(
        visual=float(np.mean([alike_SS[i, j] for i, j in pairs])),
        consecutive=float(np.mean([alike_SS[i, i + 1] for i in range(len(scenes) - 1)])),
        semantic=semantic,
        intra=float(np.mean([_intra(vectors) for vectors in frames])),
        inter=float(np.mean([(keys[i] @ keys[j].T).mean() for i, j in pairs])),
        drift_S=tuple(float(x) for x in alike_SS[0]),
    )


def _intra(vectors_PD: Vectors) -> float:
    if len(vectors_PD) < 2:
        return 1.0
    later = vectors_PD[1:]
    return float(((later * vectors_PD[:-1]).sum(1) + later @ vectors_PD[0]).mean() / 2)


def consistency_gap(scores: Sequence[float], reference: Sequence[float]) -> float:
    """Jensen-Shannon distance (base 2, so 0..1) of two sets of cosines, as histograms of 20 bins over -1..1.

    0: as consistent as the reference is, neither less nor more. Source: CineTrans (arXiv:2508.11484).
    """
    first, second = (
        np.histogram(np.clip(values, -1, 1), BINS, (-1, 1))[0] / len(values) for values in (scores, reference)
    )
    middle = (first + second) / 2

    def divergence(part: NDArray[np.float64]) -> float:
        seen = part > 0
        return float((part[seen] * np.log2(part[seen] / middle[seen])).sum())

    return float(np.sqrt(max(0.0, (divergence(first) + divergence(second)) / 2)))


# By the oracle


@dataclass(frozen=True)
class SceneReading:
    """One scene as the oracle sees it.

    ``color_error``: how far (RGB, of 255 levels a channel) the middle of the object is from its asked colour,
    None where there is no object.
    """

    seen: Attributes | None
    obeyed: dict[str, bool]
    color_error: float | None

    def same(self, other: Attributes | None) -> bool:
        """Whether this is the other scene's character."""
        if self.seen is None or other is None:
            return False
        return all(getattr(self.seen, name) == getattr(other, name) for name in CHARACTER)


def read_scene(video_PHW3: Video, wanted: Facts, world: World) -> SceneReading:
    """The foremost object of a scene, against what its caption promises."""
    reading = oracle(video_PHW3, world)
    obeyed = adherence(reading, wanted)
    if not reading.objects:
        return SceneReading(None, obeyed, None)
    first, scale = reading.objects[0], min(video_PHW3.shape[1:3])
    middles = [
        frame[int(y * scale), int(x * scale)]
        for frame, x, y, radius in zip(
            video_PHW3, first.track.x_F, first.track.y_F, first.track.radius_F, strict=True
        )
        if radius > 0
    ]
    gap = np.median(np.asarray(middles, float), axis=0) - COLORS[wanted.objects[0].color]
    return SceneReading(first.attributes, obeyed, float(np.linalg.norm(gap)))


# Reports


def judge_scenes(
    samples: Sequence[Sample],
    encoder: Encoder,
    detector: Detector,
    world: World | None = None,
    reference: Sequence[Sample] = (),
) -> Report:
    """Every clip of two or more scenes.

    Args:
        world: where the clips are ShapeWorld's, for the oracle.
        reference: real clips with scenes, for the consistency gap.
    """
    judged = [_judge_one(sample, encoder, detector, world) for sample in samples]
    rows = [row for row, _ in judged]
    steps = [drift for _, drift in judged if drift]
    by_oracle = ("own caption", "same character", "same as asked", "color error")
    encoders = {"": encoder.name} | dict.fromkeys(CUT_FIGURES, detector.name)
    encoders |= dict.fromkeys((*by_oracle, *(f"scene: {name}" for name in (*OBEYED, "size"))), "oracle")
    details: dict[str, Any] = {"drift": [step.record() for step in _drift(steps, encoder.name)]}
    if reference:
        real = [_judge_one(sample, encoder, detector, None)[0] for sample in reference]
        gap = consistency_gap(*(_known(part, "visual consistency") for part in (rows, real)))
        details["consistency_gap"] = {"value": gap, "clips": len(real), "encoder": encoder.name}
    names, groups = zip(*((sample.name, sample.asked.words) for sample in samples), strict=True)
    return summarise(
        "scenes", PROTOCOL, names, rows, encoders, targets=TARGETS, groups=groups, details=details
    )


def _known(rows: Sequence[Mapping[str, float | None]], name: str) -> list[float]:
    return [value for row in rows if (value := row.get(name)) is not None]


Row = dict[str, float | None]
Drift = list[Row]  # one per scene


def _judge_one(
    sample: Sample, encoder: Encoder, detector: Detector, world: World | None
) -> tuple[Row, Drift]:
    """The numbers of one clip, and those of each of its scenes."""
    asked, video = sample.asked, sample.video_PHW3
    if len(asked.scenes) < 2:
        return {}, []
    match = match_cuts(asked.cuts, detector.find(video, sample.fps), len(video))
    parts = shots(video, scene_bounds(match, asked.cuts, len(video)))
    cosines = consistency(parts, asked.captions, encoder)
    row: Row = {
        "shot cut accuracy": match.accuracy,
        "cuts within 1 frame": match.within(),
        "transition deviation": match.deviation,
        "missed cuts": match.missed,
        "extra cuts": match.extra,
        "visual consistency": cosines.visual,
        "visual consistency, neighbours": cosines.consecutive,
        "semantic consistency": cosines.semantic,
        "sequence consistency": cosines.sequence,
        "identity within scenes": cosines.intra,
        "identity across scenes": cosines.inter,
    }
    drift = [_colors(part, parts[0]) | {"cosine": c} for part, c in zip(parts, cosines.drift_S, strict=True)]
    if world is not None and asked.facts is not None:
        readings = [read_scene(part, facts, world) for part, facts in zip(parts, asked.facts, strict=True)]
        row |= _oracle_row(readings, asked.facts, [scene.role == "generate" for scene in asked.scenes])
        for step, reading in zip(drift, readings, strict=True):
            step["same character"] = float(reading.same(readings[0].seen))
            step["own caption"] = float(_obeyed(reading))
            step["color error"] = reading.color_error
    return row, drift


def _oracle_row(readings: Sequence[SceneReading], facts: Sequence[Facts], made: Sequence[bool]) -> Row:
    """Of one clip: captions over the made scenes, the character over all."""
    own = [reading for reading, is_made in zip(readings, made, strict=True) if is_made] or readings
    errors = [reading.color_error for reading in readings if reading.color_error is not None]

    def share(of: Callable[[SceneReading], bool]) -> float:
        return float(np.mean([of(reading) for reading in own]))

    row: Row = {
        "own caption": share(_obeyed),
        "same character": float(all(reading.same(readings[0].seen) for reading in readings)),
        "same as asked": float(all(r.same(what.objects[0]) for r, what in zip(readings, facts, strict=True))),
        "color error": float(np.mean(errors)) if errors else None,
    }
    for name in (*OBEYED, "size"):
        row[f"scene: {name}"] = float(np.mean([reading.obeyed[name] for reading in own]))
    return row


def _obeyed(reading: SceneReading) -> bool:
    return all(reading.obeyed[name] for name in OBEYED)


def _colors(video_PHW3: Video, first_PHW3: Video) -> Row:
    """How far a scene's brightness and contrast (mean and deviation of all values) are from the first's."""
    return {
        "brightness change": float(video_PHW3.mean() - first_PHW3.mean()),
        "contrast change": float(video_PHW3.std() - first_PHW3.std()),
    }


@dataclass(frozen=True)
class Step:
    """A number of all scenes of one index."""

    scene: int
    name: str
    interval: Interval
    encoder: str

    def record(self) -> dict[str, Any]:
        """For JSON."""
        mean = self.interval.mean
        return {
            "scene": self.scene,
            "name": self.name,
            "mean": mean,
            "low": self.interval.low,
            "high": self.interval.high,
            "count": self.interval.count,
            "encoder": self.encoder,
        }


def _drift(clips: Sequence[Drift], encoder: str) -> list[Step]:
    """Means over clips, scene by scene against scene 0: what a roll-out loses with every step."""
    seen_by = {"cosine": encoder, "brightness change": "pixels", "contrast change": "pixels"}
    steps = []
    for scene in range(max(map(len, clips), default=0)):
        rows = [clip[scene] for clip in clips if len(clip) > scene]
        for name in dict.fromkeys(name for row in rows for name in row):
            interval = bootstrap([row.get(name) for row in rows], PROTOCOL, "drift", name, scene)
            if interval is not None:
                steps.append(Step(scene, name, interval, seen_by.get(name, "oracle")))
    return steps
