"""The pictures of ShapeWorld in this folder, drawn anew.

    python docs/media/make.py [FOLDER]

Writes ``shapeworld.webp`` (a clip of every motion, with its caption) and ``stories.png`` (stories of three
scenes, one row of frames each). FOLDER is this one unless another is named.
"""

import sys
from itertools import count
from pathlib import Path

from motionloom.data.shapeworld import (
    ClipSpec,
    World,
    caption,
    render_video,
    sample_story,
    scene_captions,
)
from motionloom.data.sheets import animated_sheet, contact_sheet

SEED = 16
SIDE, COLUMNS = 160, 5
LONGEST_CAPTION = 56  # letters that a cell has room for
STORIES, SCENES = 4, 3


def one_of_each_motion(world: World) -> list[ClipSpec]:
    """The first clip of every motion whose caption is short enough, no two of one shape and colour."""
    found: dict[str, ClipSpec] = {}
    looks: set[tuple[str, str]] = set()
    for index in count():
        spec = world.sample(SEED, index)
        shown = spec.objects[0]
        look = (shown.shape, shown.color)
        if shown.motion not in found and look not in looks and len(caption(spec)) <= LONGEST_CAPTION:
            found[shown.motion] = spec
            looks.add(look)
        if len(found) == len(world.motions):
            break
    return list(found.values())


def clips(folder: Path) -> Path:
    """A grid of clips, each with the caption that training would read."""
    world = World(objects=(1,), frames=24, height=SIDE, width=SIDE, fps=12.0)
    specs = one_of_each_motion(world)
    videos, captions = [render_video(spec) for spec in specs], [caption(spec) for spec in specs]
    path = folder / "shapeworld.webp"
    return animated_sheet(videos, path, fps=world.fps, columns=COLUMNS, cell=SIDE, captions=captions)


def stories(folder: Path) -> Path:
    """A row of frames for each story; a caption belongs to every scene, parted by ``|``."""
    world = World.full(size=SIDE, frames=16, fps=8.0)
    specs = [sample_story(world, SEED, index, scenes=SCENES) for index in range(STORIES)]
    videos = [render_video(story) for story in specs]
    captions = [" | ".join(scene_captions(story)) for story in specs]
    return contact_sheet(videos, captions, folder / "stories.png", frames_per_clip=9)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for made in (clips(target), stories(target)):
        print(f"{made}: {made.stat().st_size / 1000:.0f} kB")
