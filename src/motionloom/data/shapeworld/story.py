"""Stories: several scenes, cut hard, in which one character keeps its shape, colour and size.

Motion, place and background change from scene to scene; neighbours never share a background, so cuts show.
"""

from __future__ import annotations

from dataclasses import dataclass

from motionloom.data.shapeworld.captions import VERB, article, caption, noun
from motionloom.data.shapeworld.spec import MIN_FRAMES, Attributes, ClipSpec, Split, World
from motionloom.errors import UserError
from motionloom.rng import numpy_rng

MAX_SCENES = 64


@dataclass(frozen=True)
class StorySpec:
    """Scenes of one character, in order; all have the same frame size and rate."""

    scenes: tuple[ClipSpec, ...]

    @property
    def frames(self) -> int:
        """Of all scenes together."""
        return sum(scene.frames for scene in self.scenes)

    @property
    def fps(self) -> float:
        """Frames per second, the same in every scene."""
        return self.scenes[0].fps

    @property
    def starts(self) -> tuple[int, ...]:
        """First frame of every scene, 0 included."""
        starts = [0]
        for scene in self.scenes[:-1]:
            starts.append(starts[-1] + scene.frames)
        return tuple(starts)

    @property
    def cuts(self) -> tuple[int, ...]:
        """First frames of all scenes but the first."""
        return self.starts[1:]


def sample_story(
    world: World,
    seed: int,
    index: int,
    split: Split = "train",
    *,
    scenes: int = 3,
    lengths: tuple[int, ...] | None = None,
) -> StorySpec:
    """Story ``index`` of a split: a pure function of its arguments.

    Args:
        lengths: frame counts that a scene may have (default: the world's own and half of it).

    Raises:
        UserError: too few scenes, frames, or backgrounds to show a cut.
    """
    lengths = lengths or tuple(sorted({world.frames, max(MIN_FRAMES, world.frames // 2)}))
    if not 2 <= scenes <= MAX_SCENES:
        raise UserError(f"ShapeWorld: scenes={scenes}: a story has 2 to {MAX_SCENES} scenes")
    if len(world.backgrounds) < 2:
        raise UserError("ShapeWorld: backgrounds: a story needs at least two, or its cuts would not show")
    if min(lengths) < MIN_FRAMES:
        raise UserError(f"ShapeWorld: lengths={list(lengths)}: a scene needs at least {MIN_FRAMES} frames")
    rng = numpy_rng("shapeworld story", seed, index, split, scenes)
    triples = world.choice(split)
    shape, color, _ = triples[rng.integers(len(triples))]
    motions = [motion for s, c, motion in triples if (s, c) == (shape, color)]
    size = str(rng.choice(world.sizes))
    clips: list[ClipSpec] = []
    for _ in range(scenes):
        last = clips[-1] if clips else None
        fresh = [m for m in motions if last is None or m != last.objects[0].motion] or motions
        places = [b for b in world.backgrounds if last is None or b != last.background]
        clips.append(
            world.stage(
                [Attributes(shape, color, size, str(rng.choice(fresh)))],
                str(rng.choice(places)),
                rng,
                wording=int(rng.integers(1 << 16)),
                frames=int(rng.choice(lengths)),
            )
        )
    return StorySpec(tuple(clips))


def story_caption(story: StorySpec) -> str:
    """The global caption: who it is, once, then what happens, scene by scene."""
    acts = [
        f"{VERB[scene.objects[0].motion][0]} on a {scene.background} background" for scene in story.scenes
    ]
    return f"{article(noun(story.scenes[0].objects[0].attributes))} {', then '.join(acts)}"


def scene_captions(story: StorySpec) -> tuple[str, ...]:
    """One complete caption per scene: each says who it is again, so a scene can be generated alone."""
    return tuple(caption(scene) for scene in story.scenes)
