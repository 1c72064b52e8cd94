"""Generated clips against real ones: FID and KID of their frames with the floor, and the oracle's adherence.

Protocol ``generation-v1``: one clip for the caption of each real clip, frames evenly spread over every clip.

P frames, H x W pixels; D numbers of a feature.
"""

from __future__ import annotations

from collections.abc import Sequence

from motionloom.data.shapeworld import World
from motionloom.evals.clips import Seen, Video, evenly
from motionloom.evals.encoders import Extractor
from motionloom.evals.figures import Report, summarise
from motionloom.evals.tokenizer import FRAMES_PER_CLIP, Row, distances, read_back

PROTOCOL = "generation-v1"


def judge_generation(
    made: Sequence[Video],
    asked: Sequence[Seen],
    real: Sequence[Seen],
    extractor: Extractor | None = None,
    world: World | None = None,
    frames: int = FRAMES_PER_CLIP,
) -> Report:
    """Clips that were made, uint8 (P, H, W, 3), for the captions of ``asked``, against ``real`` ones.

    Args:
        real: twice as many, where there are; the floor is one half of them against the other.
        world: ask the oracle what each clip obeys of its caption, and what the real clip of it does.
        frames: at most so many of a clip.
    """
    rows: list[Row] = []
    for video_PHW3, seen in zip(made, asked, strict=True):
        row: Row = {}
        if world is not None and (facts := seen.facts) is not None:
            row |= read_back(video_PHW3, facts, world)
            row |= read_back(seen.video_PHW3, facts, world, ", real clips")
        rows.append(row)
    details = {}
    if extractor is not None:
        ours = [extractor.features(evenly(video, frames)) for video in made]
        theirs = [extractor.features(evenly(seen.video_PHW3, frames)) for seen in real]
        details = distances(extractor, ours, theirs, frames)
    names = [seen.entry.id for seen in asked]
    groups = [seen.entry.caption for seen in asked]
    return summarise("generation", PROTOCOL, names, rows, {"": "oracle"}, groups=groups, details=details)
