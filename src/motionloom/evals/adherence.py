"""Prompt adherence on ShapeWorld: what the oracle sees in a clip, against what its prompt asked for.

Protocol ``shapeworld-adherence-v1``: prompts of held-out (shape, colour, motion) combinations in the
canonical wording, one clip each; a clip obeys an attribute if the oracle reads that attribute from its
pixels; ``all`` is colour, shape and motion of the same clip.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from motionloom.data.shapeworld import Attributes, Facts, World, adherence, oracle, prompt
from motionloom.evals.asked import Sample
from motionloom.evals.figures import Report, summarise
from motionloom.rng import numpy_rng

PROTOCOL = "shapeworld-adherence-v1"
JUDGED = ("color", "shape", "motion")


@dataclass(frozen=True)
class Adherence:
    """Which attributes each clip obeys, in the prompts' order."""

    obeyed: tuple[dict[str, bool], ...]

    def rates(self) -> dict[str, float]:
        """Share of clips that obey each attribute; ``all`` is the three of ``JUDGED`` at once."""
        names = [name for name in self.obeyed[0] if name != "all"]
        rates = {name: float(np.mean([clip[name] for clip in self.obeyed])) for name in names}
        together = [all(clip[name] for name in JUDGED) for clip in self.obeyed]
        return {**rates, "all": float(np.mean(together))}

    def of(self, which: Sequence[bool]) -> Adherence:
        """The same of some of the clips."""
        return Adherence(tuple(clip for clip, wanted in zip(self.obeyed, which, strict=True) if wanted))


def held_out_prompts(world: World, count: int, seed: int) -> list[tuple[str, Facts]]:
    """Prompts of one object, of combinations that the training split never holds.

    Each combination comes as often as the next, and so do its sizes and backgrounds.
    """
    rng = numpy_rng("held-out prompts", seed)
    combinations = rng.permutation(world.combinations("test")).tolist()
    settings = rng.permutation(list(product(world.sizes, world.backgrounds))).tolist()
    chosen = []
    for n in range(count):
        turn, which = divmod(n, len(combinations))
        # Neighbours start at different settings, so that few prompts show all settings as well.
        size, background = settings[(turn + which) % len(settings)]
        shape, color, motion = combinations[which]
        chosen.append(Facts((Attributes(shape, color, size, motion),), background))
    return [(prompt(what), what) for what in chosen]


def judge(videos: Iterable[np.ndarray], wanted: Sequence[Facts], world: World) -> Adherence:
    """Read every clip, uint8 (F, H, W, 3), back and compare."""
    pairs = zip(videos, wanted, strict=True)
    return Adherence(tuple(adherence(oracle(video, world), what) for video, what in pairs))


def judge_adherence(samples: Sequence[Sample], world: World) -> Report:
    """Every clip of one scene whose prompt names ShapeWorld's attributes: which of them it obeys."""
    rows: list[dict[str, float | None]] = []
    for sample in samples:
        facts = sample.asked.facts
        assert facts is not None
        assert len(facts) == 1, "a clip of one scene"
        obeyed = adherence(oracle(sample.video_PHW3, world), facts[0])
        right = {**obeyed, "all": all(obeyed[name] for name in JUDGED)}
        rows.append({name: float(yes) for name, yes in right.items()})
    names, groups = zip(*((sample.name, sample.asked.words) for sample in samples), strict=True)
    return summarise("adherence", PROTOCOL, names, rows, {"": "oracle"}, groups=groups)
