"""A protocol in the style of VBench, of the parts that need nothing from a hub. It is NOT the official score:
other networks look, on other prompts; figures compare with those of this protocol and encoder alone.

Protocol ``vbench-style-v1``. Names, ranges, weights and the rules of a dimension are VBench's (Huang et al.,
arXiv:2311.17982; ranges and weights as its ``scripts/constant.py`` has them in 2025); what looks differs:

- subject and background consistency: mean over frames of the cosine (not below 0) with the frame before and
  with the first one. VBench: DINO, CLIP. Here: the encoder that is named, and the same one for both unless
  two are given.
- temporal flickering: 1 - mean change from frame to frame, as a share of 255; of clips that stand still.
- motion smoothness: every second frame is left out and made again from its neighbours; 1 - mean error.
  VBench: AMT. Here: half the way that `evals.seam.block_motion` finds, from either side.
- dynamic degree: at 8 frames a second, whether the fastest 5 % of the frame go more than 6 pixels (of 256 on
  the shorter side) in a quarter of the steps. VBench: RAFT. Here: blocks.
- object class, color, scene: in ShapeWorld, by its oracle.
- aesthetic quality, overall consistency: with CLIP weights in a folder of yours.

A dimension that cannot be computed is named with the reason. Sums are over those that were, and say so.

P pixel frames, H x W pixels; D numbers of an embedding; R x C blocks.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motionloom.data.shapeworld import World
from motionloom.errors import UserError
from motionloom.evals.asked import Sample, Video
from motionloom.evals.drift import Look, obeyed, readings
from motionloom.evals.encoders import Encoder, TextImageEncoder, Vectors
from motionloom.evals.figures import Report, summarise
from motionloom.evals.seam import BLOCK, SIDE, block_motion, frame_differences

PROTOCOL = "vbench-style-v1"
BLOCKS = "block-matching-v1"
RATE = 8.0  # frames per second at which motion is looked for
FASTEST = 0.05  # share of the frame that must move
PIXELS = 6 / 256  # of the shorter side, in one step
STEPS = 4 / 16  # share of the steps
TRUST = 0.5  # of a block's change that its shift must explain to count as motion


@dataclass(frozen=True)
class Dimension:
    """One of the sixteen: the range that stands for 0 and 1, its weight, and what VBench looks with."""

    low: float
    high: float
    weight: float
    needs: str


QUALITY: dict[str, Dimension] = {
    "subject consistency": Dimension(0.1462, 1.0, 1.0, "DINO"),
    "background consistency": Dimension(0.2615, 1.0, 1.0, "CLIP"),
    "temporal flickering": Dimension(0.6293, 1.0, 1.0, "clips that stand still"),
    "motion smoothness": Dimension(0.706, 0.9975, 1.0, "AMT"),
    "dynamic degree": Dimension(0.0, 1.0, 0.5, "RAFT"),
    "aesthetic quality": Dimension(0.0, 1.0, 1.0, "CLIP ViT-L/14 and LAION's linear head (--aesthetic)"),
    "imaging quality": Dimension(0.0, 1.0, 1.0, "MUSIQ"),
}
SEMANTIC: dict[str, Dimension] = {
    "object class": Dimension(0.0, 1.0, 1.0, "GRiT, or captions of ShapeWorld"),
    "multiple objects": Dimension(0.0, 1.0, 1.0, "GRiT, or captions of ShapeWorld with two objects"),
    "human action": Dimension(0.0, 1.0, 1.0, "UMT"),
    "color": Dimension(0.0, 1.0, 1.0, "GRiT, or captions of ShapeWorld"),
    "spatial relationship": Dimension(0.0, 1.0, 1.0, "GRiT"),
    "scene": Dimension(0.0, 0.8222, 1.0, "Tag2Text, or captions of ShapeWorld"),
    "appearance style": Dimension(0.0009, 0.2855, 1.0, "CLIP and VBench's own prompts, which name the style"),
    "temporal style": Dimension(0.0, 0.364, 1.0, "ViCLIP and VBench's own prompts"),
    "overall consistency": Dimension(0.0, 0.364, 1.0, "ViCLIP, or CLIP in a folder of yours (clip:FOLDER)"),
}
DIMENSIONS = QUALITY | SEMANTIC
WEIGHTS = {"quality": 4.0, "semantic": 1.0}


class Aesthetic:
    """A linear head on CLIP's image vectors, on a scale of 10: LAION's ``sa_0_4_vit_l_14_linear`` as
    safetensors, with ``weight`` (1, D) and ``bias`` (1,).

    Raises:
        UserError: the file cannot be read, or is of other vectors than ``encoder`` gives.
    """

    def __init__(self, file: Path, encoder: Encoder) -> None:
        from safetensors.numpy import load_file

        from motionloom.evals.encoders import fingerprint

        try:
            held = load_file(file)
            self._weight_D, self._bias = (
                held["weight"].reshape(-1).astype(np.float32),
                float(held["bias"].item()),
            )
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UserError(
                f"--aesthetic {file}: cannot be read ({error}); name safetensors with weight and bias"
            ) from None
        except Exception as error:  # safetensors' own has no public base
            if type(error).__module__.split(".")[0] not in ("safetensors", "safetensors_rust"):
                raise
            raise UserError(
                f"--aesthetic {file}: is no safetensors file ({error}); name one with weight and bias"
            ) from None
        self._encoder, self._file = encoder, file
        self.name = f"{encoder.name} + {file.name}@{fingerprint(file)}"

    def score(self, vectors_PD: Vectors) -> float:
        """Mean over frames, in 0..1 as a rule."""
        if vectors_PD.shape[1] != len(self._weight_D):
            raise UserError(
                f"--aesthetic {self._file}: is for {len(self._weight_D)} numbers a frame, "
                f"{self._encoder.name} gives {vectors_PD.shape[1]}; name the weights that it was made for"
            )
        return float((vectors_PD @ self._weight_D + self._bias).mean()) / 10


@dataclass(frozen=True)
class Eyes:
    """What looks. ``subject`` and ``background`` may be one encoder; ``world``: where the oracle can say."""

    subject: Encoder
    background: Encoder
    world: World | None = None
    aesthetic: Aesthetic | None = None

    @property
    def words(self) -> TextImageEncoder | None:
        """The background's, where it knows words."""
        return self.background if isinstance(self.background, TextImageEncoder) else None


def consistency(vectors_PD: Vectors) -> float | None:
    """Mean cosine, not below 0, of each frame with the one before and with the first; None of one frame."""
    if len(vectors_PD) < 2:
        return None
    later = vectors_PD[1:]
    before, first = (later * vectors_PD[:-1]).sum(1), later @ vectors_PD[0]
    return float((np.maximum(before, 0) + np.maximum(first, 0)).mean() / 2)


def flickering(video_PHW3: Video) -> float:
    """1 - mean change from frame to frame, as a share of 255; 1 is a picture."""
    return float(1 - frame_differences(video_PHW3).mean() / 255)


def between(first_HW3: Video, last_HW3: Video) -> NDArray[np.float32]:
    """The frame half way between two: each block goes half of its way from either side, and where the two
    sides' blocks leave a gap, the plain mean shows."""
    mean = (first_HW3.astype(np.float32) + last_HW3) / 2
    height, width = mean.shape[:2]
    side = BLOCK * max(1.0, max(height, width) / SIDE)
    total, weight = mean * 1e-3, np.full((height, width, 1), 1e-3, np.float32)
    for here, there in ((first_HW3, last_HW3), (last_HW3, first_HW3)):
        blocks = block_motion(here, there)
        rows, columns = blocks.move_RC2.shape[:2]
        row_H = np.minimum((np.arange(height) / side).astype(int), rows - 1)
        column_W = np.minimum((np.arange(width) / side).astype(int), columns - 1)
        move_HW2 = blocks.move_RC2[row_H[:, None], column_W] / 2
        moves = blocks.trust_RC[row_H[:, None], column_W] > TRUST
        down, right = np.indices((height, width))
        y = np.clip(np.rint(down + move_HW2[..., 1] * moves).astype(int), 0, height - 1)
        x = np.clip(np.rint(right + move_HW2[..., 0] * moves).astype(int), 0, width - 1)
        np.add.at(total, (y, x), here.astype(np.float32))
        np.add.at(weight, (y, x), 1.0)
    return np.asarray(total / weight, np.float32)


def smoothness(video_PHW3: Video) -> float | None:
    """1 - mean error, as a share of 255, of every second frame made again from its neighbours; None of fewer
    than three frames."""
    errors = [
        np.abs(between(video_PHW3[n - 1], video_PHW3[n + 1]) - video_PHW3[n]).mean()
        for n in range(1, len(video_PHW3) - 1, 2)
    ]
    return 1 - float(np.mean(errors)) / 255 if errors else None


def moves(video_PHW3: Video, fps: float) -> bool | None:
    """Whether a clip moves: see ``dynamic degree`` in this file's head. None of fewer than two frames."""
    frames = video_PHW3[:: max(1, round(fps / RATE))]
    if len(frames) < 2:
        return None
    least = max(1.0, RATE / fps) * PIXELS * min(frames.shape[1:3])
    quick = sum(_fastest(a, b) > least for a, b in pairwise(frames))
    return quick >= max(1, round(STEPS * len(frames)))


def _fastest(first_HW3: Video, last_HW3: Video) -> float:
    """Mean way of the fastest blocks, in pixels; blocks that a shift does not explain stand still."""
    blocks = block_motion(first_HW3, last_HW3)
    way = np.hypot(*np.moveaxis(blocks.move_RC2, -1, 0)) * (blocks.trust_RC > TRUST)
    most = max(1, round(FASTEST * way.size))
    return float(np.sort(way.ravel())[-most:].mean())


def judge_vbench(samples: Sequence[Sample], eyes: Eyes) -> Report:
    """Clips with their prompts; see :func:`summed`."""
    names, groups = zip(*((sample.name, sample.asked.words) for sample in samples), strict=True)
    return summed(names, groups, [score(sample, eyes) for sample in samples], eyes)


def summed(
    names: Sequence[str],
    groups: Sequence[Hashable],
    rows: Sequence[Mapping[str, float | None]],
    eyes: Eyes,
) -> Report:
    """What clips were given by :func:`score`, as a report.

    ``details``: ``scores`` (``quality``, ``semantic`` and, of both, ``weighted``: value, and which dimensions
    it is of), ``left_out`` (the others, each with the reason) and ``note``.

    Args:
        groups: clips of one prompt are no independent draws.
    """
    looked = {
        "": "pixels",
        "subject consistency": eyes.subject.name,
        "background consistency": eyes.background.name,
        "overall consistency": eyes.background.name,
        "motion smoothness": BLOCKS,
        "dynamic degree": BLOCKS,
        **dict.fromkeys(("object class", "multiple objects", "color", "scene"), "oracle"),
    }
    if eyes.aesthetic is not None:
        looked["aesthetic quality"] = eyes.aesthetic.name
    report = summarise("vbench-style", PROTOCOL, names, rows, looked, groups=groups)
    known = {figure.name: figure.interval.mean for figure in report.figures}
    details: dict[str, Any] = {
        "scores": scores(known),
        "left_out": {name: f"needs {d.needs}" for name, d in DIMENSIONS.items() if name not in known},
        "note": "in the style of VBench, with other networks and prompts: not its official score",
    }
    return replace(report, details=details)


def score(sample: Sample, eyes: Eyes) -> dict[str, float | None]:
    """The dimensions of one clip; None where one cannot be said of it."""
    video = sample.video_PHW3
    subject_PD = eyes.subject.embed(video)
    background_PD = subject_PD if eyes.background is eyes.subject else eyes.background.embed(video)
    moving = moves(video, sample.fps)
    row: dict[str, float | None] = {
        "subject consistency": consistency(subject_PD),
        "background consistency": consistency(background_PD),
        "temporal flickering": flickering(video) if moving is False else None,
        "motion smoothness": smoothness(video),
        "dynamic degree": None if moving is None else float(moving),
    }
    if eyes.aesthetic is not None:
        row["aesthetic quality"] = eyes.aesthetic.score(background_PD)
    return row | _semantic(sample, background_PD, eyes)


def _semantic(sample: Sample, frames_PD: Vectors, eyes: Eyes) -> dict[str, float | None]:
    row: dict[str, float | None] = {}
    if eyes.words is not None:
        row["overall consistency"] = float(
            (frames_PD @ eyes.words.embed_text([sample.asked.prompt])[0]).mean()
        )
    facts = sample.asked.facts
    if eyes.world is None or facts is None or len(facts) != 1:
        return row
    right = obeyed(readings(sample.video_PHW3, Look(len(sample.video_PHW3), eyes.world)), facts[0])
    name = "object class" if len(facts[0].objects) == 1 else "multiple objects"
    return row | {name: right["shape"], "color": right["color"], "scene": right["background"]}


def normalised(name: str, value: float) -> float:
    """Into its dimension's range, as VBench does it: beyond the ends it is not cut."""
    dimension = DIMENSIONS[name]
    return (value - dimension.low) / (dimension.high - dimension.low)


def scores(known: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Weighted means of the normalised dimensions that are known, of either kind; ``weighted``: 4 parts of
    quality and 1 of semantic, where both are known."""
    found: dict[str, dict[str, Any]] = {}
    for kind, group in (("quality", QUALITY), ("semantic", SEMANTIC)):
        names = [name for name in group if name in known]
        if names:
            weights = [group[name].weight for name in names]
            value = np.average([normalised(name, known[name]) for name in names], weights=weights)
            found[kind] = {"value": float(value), "dimensions": names, "of": len(group)}
    if len(found) == len(WEIGHTS):
        value = sum(WEIGHTS[kind] * found[kind]["value"] for kind in WEIGHTS) / sum(WEIGHTS.values())
        names = [name for kind in WEIGHTS for name in found[kind]["dimensions"]]
        found["weighted"] = {"value": value, "dimensions": names, "of": len(DIMENSIONS)}
    return found
