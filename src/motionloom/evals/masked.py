"""In- and outpainting: is the object completed to what it truly is.

Protocol ``masked-v1``: the oracle reads the whole completed clip and is held against the caption. Beside it
``unfilled``: what it reads when the part to be made is painted flat in the given pixels' median colour. A
rate that the flat fill reaches as well says nothing of the model.

P frames, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from motionloom.data.shapeworld import Facts, World, adherence, oracle
from motionloom.evals.adherence import JUDGED
from motionloom.evals.asked import Mask, Sample, Video
from motionloom.evals.exactness import pixel_error
from motionloom.evals.figures import Report, Target, summarise

PROTOCOL = "masked-v1"
TARGETS = {"all": Target(0.85)}


def flat_fill(video_PHW3: Video, given_PHW: Mask) -> Video:
    """The clip with what was not given in the given pixels' median colour."""
    filled = video_PHW3.copy()
    known = video_PHW3[given_PHW]
    filled[~given_PHW] = np.median(known, axis=0).astype(np.uint8) if len(known) else 128
    return filled


def reads_as(video_PHW3: Video, wanted: Facts, world: World) -> dict[str, bool]:
    """Which attributes the oracle reads as they should be; ``all`` is colour, shape and motion at once."""
    read = adherence(oracle(video_PHW3, world), wanted)
    return {**read, "all": all(read[name] for name in JUDGED)}


def judge_masked(samples: Sequence[Sample], world: World | None = None) -> Report:
    """Every clip of which a part of some frame was given and another part of it made.

    Args:
        world: where the clips are ShapeWorld's, for the oracle; of others only the error of the made part
            against the source is told, which a good completion need not match.
    """
    rows = [_row(sample, world) for sample in samples]
    encoders = {"": "oracle", "made part: psnr to source (dB)": "pixels", "made part of the clip": "pixels"}
    names, groups = zip(*((sample.name, sample.asked.words) for sample in samples), strict=True)
    return summarise("masked", PROTOCOL, names, rows, encoders, targets=TARGETS, groups=groups)


def _row(sample: Sample, world: World | None) -> Mapping[str, float | None]:
    given, video, facts = sample.given_PHW, sample.video_PHW3, sample.asked.facts
    share = given.mean(axis=(1, 2))
    if not ((share > 0) & (share < 1)).any():
        return {}
    row: dict[str, float | None] = {"made part of the clip": float(1 - given.mean())}
    if world is not None and facts is not None and len(facts) == 1:
        filled = reads_as(video, facts[0], world)
        flat = reads_as(flat_fill(video, given), facts[0], world)
        row |= {name: float(right) for name, right in filled.items()}
        row["unfilled: all"] = float(flat["all"])
    sources = [s.source_PHW3 for s in sample.asked.given if s.source_PHW3 is not None]
    if sources and len(sources[0]) == len(video):
        error = pixel_error(video, sources[0], ~given)
        row["made part: psnr to source (dB)"] = None if error is None else min(error.psnr, 100.0)
    return row
