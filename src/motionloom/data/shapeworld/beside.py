"""What stands beside a clip: a reference to be looked at, and a mask of what is given.

References show what the caption of their clip leaves out: ``swap`` the same clip in another colour, ``edges``
its outlines in white on black, ``small`` the clip at half its size (whose caption is complete).

F frames, H height, W width, N objects.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from motionloom.data.shapeworld.captions import caption
from motionloom.data.shapeworld.render import object_masks, render_video
from motionloom.data.shapeworld.spec import ClipSpec, World
from motionloom.errors import UserError
from motionloom.rng import numpy_rng

ReferenceKind = Literal["swap", "edges", "small"]
REFERENCES: tuple[ReferenceKind, ...] = get_args(ReferenceKind)

# Neither shape nor motion, size or place: that is for the reference to say.
_SWAPPED = ("the same in {colors}", "{colors}, else as in the reference", "the reference, but in {colors}")
_FILLED = (
    "{colors} on a {background} background",
    "in {colors}, {background} background",
    "{background} background: {colors}",
)


def reference_caption(spec: ClipSpec, kind: ReferenceKind) -> str:
    """What is said of the clip where its reference stands beside it, in the wording that was drawn for it."""
    if kind == "small":
        return caption(spec)
    templates = _SWAPPED if kind == "swap" else _FILLED
    colors = " and ".join(obj.color for obj in spec.objects)
    return templates[spec.wording % len(templates)].format(colors=colors, background=spec.background)


def reference_video(spec: ClipSpec, kind: ReferenceKind, world: World) -> np.ndarray:
    """The reference's pixels, (F, H, W, 3) uint8; half of H and W for ``small``.

    Raises:
        UserError: ``small`` of an odd height or width, ``swap`` in a world without a colour to swap.
    """
    if kind == "swap":
        return render_video(swapped(spec, world))
    if kind == "edges":
        return _outlines(spec)
    if spec.height % 2 or spec.width % 2:
        raise UserError(f"ShapeWorld: {spec.height}x{spec.width} has no half: use even sides")
    video = render_video(spec).astype(np.float32)
    halves = video.reshape(spec.frames, spec.height // 2, 2, spec.width // 2, 2, 3).mean(axis=(2, 4))
    return (halves + np.float32(0.5)).astype(np.uint8)


def swapped(spec: ClipSpec, world: World) -> ClipSpec:
    """The same clip with every object in a colour that none of its objects has.

    Where there are any, in one that training knows of this shape and motion: no held-out combination is shown
    by a reference of the train split. Raises `UserError` in a world without another colour.
    """
    known = world.unlimited.combinations("train")
    taken = {obj.color for obj in spec.objects}
    rng = numpy_rng("shapeworld swap", repr(spec))
    objects = []
    for obj in spec.objects:
        free = [color for color in world.colors if color not in taken]
        if not free:
            raise UserError(
                "ShapeWorld: a swap needs a colour that no object of the clip has: use more colors"
            )
        seen = [color for color in free if (obj.shape, color, obj.motion) in known]
        color = str(rng.choice(seen or free))
        taken.add(color)
        objects.append(replace(obj, color=color))
    return replace(spec, objects=tuple(objects))


def _outlines(spec: ClipSpec) -> np.ndarray:
    """White lines of two pixels about what is seen of every object, on black."""
    lines = np.zeros((spec.frames, spec.height, spec.width), np.float32)
    for obj in spec.objects:
        mask = object_masks(obj, spec)
        padded = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
        about = [padded[:, 1:-1, :-2], padded[:, 1:-1, 2:], padded[:, :-2, 1:-1], padded[:, 2:, 1:-1], mask]
        line = np.max(about, axis=0) - np.min(about, axis=0)
        lines = np.maximum(lines * (1 - mask), line)  # later objects lie in front
    return np.repeat((lines * 255 + 0.5).astype(np.uint8)[..., None], 3, axis=-1)


def random_mask(frames: int, height: int, width: int, *key: int | str) -> np.ndarray:
    """A mask clip (F, H, W, 3) uint8 drawn by ``key``: white is given, black is to be made.

    A box of a third to three quarters of either side, for the whole clip or for a part of its time, is either
    what is given or what is to be made.
    """
    rng = numpy_rng("shapeworld mask", *key)
    box = np.zeros((frames, height, width), bool)
    sides = []
    for side in (height, width):
        length = int(rng.integers(side // 3, side * 3 // 4 + 1))
        first = int(rng.integers(0, side - length + 1))
        sides.append(slice(first, first + length))
    whole, length = rng.random() < 0.5, int(rng.integers(max(1, frames // 3), frames + 1))
    first = int(rng.integers(0, frames - length + 1))
    box[slice(None) if whole else slice(first, first + length), sides[0], sides[1]] = True
    given = box if rng.random() < 0.5 else ~box
    return np.repeat((given * np.uint8(255))[..., None], 3, axis=-1)
