"""What a ShapeWorld clip is: its attributes, the world they are drawn from, and the train/test split.

Lengths are in units of the shorter side of the frame, so a small square looks the same at 32x32 and at 64x96;
x points right, y points down, and clip time ``s`` runs from 0 at the first frame to 1 at the last.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any, Literal

import numpy as np

from motionloom.errors import UserError
from motionloom.rng import key_to_seed, numpy_rng

Split = Literal["train", "test", "all"]
Combination = tuple[str, str, str]  # (shape, colour, motion)

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "heart")
SIZES = ("small", "large")
MOTIONS = ("left", "right", "up", "down", "bounce", "circle", "spin", "grow", "shrink", "still")
BACKGROUNDS = ("dark", "light", "gradient")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (226, 50, 48),
    "orange": (248, 138, 22),
    "yellow": (250, 220, 56),
    "green": (48, 176, 84),
    "cyan": (48, 206, 222),
    "blue": (44, 98, 238),
    "purple": (142, 68, 212),
    "pink": (246, 116, 186),
}

# Nominal radius of an object, by how many share the frame.
RADIUS = {1: {"small": 0.18, "large": 0.28}, 2: {"small": 0.145, "large": 0.21}}
ORBIT = {1: 0.28, 2: 0.2}  # widest orbit
EXTENT = 1.12  # no point of any shape lies further than this many radii from its centre
GROWTH = 1.4  # "grow" goes from radius * (2 - GROWTH) to radius * GROWTH
# Rotations (in turns) after which a shape looks the same: a spin must step by clearly less per frame.
SYMMETRY = {"square": 1 / 4, "triangle": 1 / 3, "star": 1 / 5, "cross": 1 / 4, "diamond": 1 / 2, "heart": 1.0}

# Attributes by the field of World that lists them; the first three make up the split.
_FIELDS = {
    "shape": "shapes",
    "color": "colors",
    "motion": "motions",
    "size": "sizes",
    "background": "backgrounds",
}
_SPLIT_BY = ("shape", "color", "motion")

HELD_OUT = 1 / 6  # share of the combinations that only the test split holds
PLACEMENTS = 64  # tries at finding two paths that do not cross
MIN_PIXELS = 20  # below this the oracle misses small objects on real clips
MIN_FRAMES = 4  # below this a bounce cannot be told from a drift


@dataclass(frozen=True)
class Attributes:
    """What a caption says about one object."""

    shape: str
    color: str
    size: str
    motion: str

    @property
    def combination(self) -> Combination:
        """(shape, colour, motion): what the train/test split is made of."""
        return (self.shape, self.color, self.motion)


@dataclass(frozen=True)
class ObjectSpec:
    """One object with everything that rendering needs.

    ``x, y``: centre of its path. ``travel``: length of a drift, height of a bounce or radius of an orbit.
    ``phase``: where a periodic motion starts, in periods. ``turns``: signed periods over the clip.
    """

    shape: str
    color: str
    size: str
    motion: str
    radius: float
    x: float
    y: float
    travel: float = 0.0
    phase: float = 0.0
    turns: float = 0.0

    @property
    def attributes(self) -> Attributes:
        """What a caption says about it."""
        return Attributes(self.shape, self.color, self.size, self.motion)


@dataclass(frozen=True)
class ClipSpec:
    """One clip, complete: equal specs render to equal bytes. ``wording`` picks the caption's template."""

    objects: tuple[ObjectSpec, ...]
    background: str
    frames: int
    height: int
    width: int
    fps: float
    wording: int = 0

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.frames / self.fps


@dataclass(frozen=True)
class World:
    """Which clips exist. ``objects`` lists the possible numbers of objects per clip (1, 2 or both).

    ``only`` holds (attribute, value) pairs of shape, color or motion that clips must have, those of one
    attribute being alternatives; the split stays that of the world without them. See :meth:`narrowed`.

    ``pace``: seconds for which periodic motions draw how often they repeat; None: the clip, however long.

    Raises:
        UserError: an unknown attribute, fewer than two colours for two objects, or too few frames or pixels.
    """

    shapes: tuple[str, ...] = SHAPES
    colors: tuple[str, ...] = tuple(COLORS)
    sizes: tuple[str, ...] = SIZES
    motions: tuple[str, ...] = MOTIONS
    backgrounds: tuple[str, ...] = BACKGROUNDS
    objects: tuple[int, ...] = (1, 2)
    frames: int = 16
    height: int = 32
    width: int = 32
    fps: float = 8.0
    only: tuple[tuple[str, str], ...] = ()
    pace: float | None = None

    def __post_init__(self) -> None:
        known: dict[str, tuple[str, ...]] = {
            "shapes": SHAPES,
            "colors": tuple(COLORS),
            "sizes": SIZES,
            "motions": MOTIONS,
            "backgrounds": BACKGROUNDS,
        }
        for field, names in known.items():
            chosen = getattr(self, field)
            unknown = [name for name in chosen if name not in names]
            if unknown or not chosen:
                raise UserError(
                    f"ShapeWorld: {field}={list(chosen)}: choose one or more of {', '.join(names)}"
                )
        if not self.objects or not set(self.objects) <= {1, 2}:
            raise UserError(f"ShapeWorld: objects={list(self.objects)}: choose 1, 2 or both")
        if 2 in self.objects and len(self.colors) < 2:
            raise UserError("ShapeWorld: two objects need at least two colors")
        if self.frames < MIN_FRAMES:
            raise UserError(f"ShapeWorld: frames={self.frames}: motions need at least {MIN_FRAMES}")
        if min(self.height, self.width) < MIN_PIXELS:
            raise UserError(
                f"ShapeWorld: {self.height}x{self.width} is too small: use at least {MIN_PIXELS} a side"
            )
        if not self.fps > 0:
            raise UserError(f"ShapeWorld: fps={self.fps}: use a positive number")

    @classmethod
    def full(cls, size: int = 32, frames: int = 16, fps: float = 8.0) -> World:
        """Every attribute, one or two objects, square frames of ``size`` pixels."""
        return cls(frames=frames, height=size, width=size, fps=fps)

    @classmethod
    def quickstart(cls, size: int = 32, frames: int = 16, fps: float = 8.0) -> World:
        """One object; few enough words that one CPU core learns them in minutes."""
        return cls(
            shapes=("circle", "square", "triangle", "star"),
            colors=("red", "orange", "yellow", "green", "blue", "purple"),
            motions=("left", "right", "up", "down", "grow"),
            backgrounds=("dark", "light"),
            objects=(1,),
            frames=frames,
            height=size,
            width=size,
            fps=fps,
        )

    @classmethod
    def modes(cls, size: int = 32, frames: int = 17, fps: float = 8.0) -> World:
        """The quickstart's with a bounce, which can be heard: for conditions, scenes and sound."""
        return replace(cls.quickstart(size, frames, fps), motions=("left", "right", "up", "down", "bounce"))

    @classmethod
    def endless(cls, size: int = 32, frames: int = 49, fps: float = 8.0) -> World:
        """What can go on for ever at an even pace, of the quickstart's shapes and colours: for streaming."""
        motions = ("bounce", "circle", "still")
        return replace(cls.quickstart(size, frames, fps), motions=motions, pace=2.0)

    def narrowed(self, only: Mapping[str, Sequence[str]]) -> World:
        """The part of this world whose clips have one of the given values of each attribute.

        A value that this world lacks comes to it first: a new shape, for an adapter to learn.

        Raises:
            UserError: an unknown attribute or value.
        """
        if unknown := sorted(only.keys() - _FIELDS.keys()):
            raise UserError(f"ShapeWorld: {unknown[0]}: narrow by one of {', '.join(_FIELDS)}")
        wider: dict[str, Any] = {}
        for name, values in only.items():
            has = getattr(self, _FIELDS[name])
            split = name in _SPLIT_BY
            wider[_FIELDS[name]] = tuple(dict.fromkeys((*has, *values) if split else values))
        pairs = tuple((name, value) for name in _SPLIT_BY for value in only.get(name, ()))
        return replace(self, **wider, only=pairs)

    @property
    def unlimited(self) -> World:
        """This world without its ``only``."""
        return replace(self, only=())

    @property
    def extent(self) -> tuple[float, float]:
        """(width, height) of the frame in units of its shorter side."""
        shorter = min(self.height, self.width)
        return self.width / shorter, self.height / shorter

    def combinations(self, split: Split = "all") -> tuple[Combination, ...]:
        """The (shape, colour, motion) triples of a split; "all" is train and test together."""
        wanted = {name: {value for key, value in self.only if key == name} for name, _ in self.only}
        train, test = (
            tuple(t for t in part if all(t[_SPLIT_BY.index(name)] in wanted[name] for name in wanted))
            for part in _split(self.shapes, self.colors, self.motions)
        )
        if split == "all":
            return train + test
        assert split in ("train", "test"), split
        return train if split == "train" else test

    def choice(self, split: Split, objects: int = 1) -> tuple[Combination, ...]:
        """:meth:`combinations` to draw so many objects of different colours from.

        Raises:
            UserError: ``only`` leaves too few.
        """
        triples = self.combinations(split)
        if len({color for _, color, _ in triples}) < objects:
            raise UserError(
                f"ShapeWorld: too few combinations are left in the {split} split: narrow the world less, ask "
                f"for one object, or for the split all"
            )
        return triples

    def sample(self, seed: int, index: int, split: Split = "train") -> ClipSpec:
        """Clip ``index`` of a split: a pure function of (seed, index, split) and of this world.

        Raises:
            UserError: ``only`` leaves nothing of the split, or no two colours for two objects.
        """
        rng = numpy_rng("shapeworld", seed, index, split)
        count = int(rng.choice(self.objects))
        triples = self.choice(split, count)
        wanted: list[Attributes] = []
        while len(wanted) < count:
            shape, color, motion = triples[rng.integers(len(triples))]
            if all(color != other.color for other in wanted):
                wanted.append(Attributes(shape, color, str(rng.choice(self.sizes)), motion))
        return self.stage(wanted, str(rng.choice(self.backgrounds)), rng, wording=int(rng.integers(1 << 16)))

    def stage(
        self,
        wanted: list[Attributes] | tuple[Attributes, ...],
        background: str,
        rng: np.random.Generator,
        wording: int = 0,
        frames: int | None = None,
    ) -> ClipSpec:
        """A clip of exactly these attributes; ``rng`` draws only places, phases and speeds."""
        length = self.frames if frames is None else frames
        assert len(wanted) in RADIUS, "one or two objects"
        # Of one pace, a clip of twice the length holds twice the periods.
        paces = 1.0 if self.pace is None else (length - 1) / (self.fps * self.pace)
        objects = tuple(_place(a, len(wanted), length, self.extent, rng, paces) for a in wanted)
        if len(objects) == 2:
            # Objects may cross, but a clip in which one hides the other cannot be captioned honestly.
            for _ in range(PLACEMENTS):
                if _overlap(objects) <= 0.0:
                    break
                other = tuple(_place(a, len(wanted), length, self.extent, rng, paces) for a in wanted)
                objects = min(objects, other, key=_overlap)
        return ClipSpec(objects, background, length, self.height, self.width, self.fps, wording)

    def resized(self, *, size: int | None = None, frames: int | None = None) -> World:
        """The same world at another square size or length."""
        height, width = (self.height, self.width) if size is None else (size, size)
        return replace(self, height=height, width=width, frames=self.frames if frames is None else frames)


PRESETS: dict[str, Callable[..., World]] = {
    "full": World.full,
    "quickstart": World.quickstart,
    "modes": World.modes,
    "endless": World.endless,
}


def valid(shape: str, motion: str) -> bool:
    """Whether the motion shows on the shape: a circle that spins looks still."""
    return motion != "spin" or shape in SYMMETRY


def trajectory(obj: ObjectSpec, s: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Path of an object at clip times ``s``: centre x, centre y, radius, angle in turns, all like s."""
    x, y = np.full_like(s, obj.x), np.full_like(s, obj.y)
    radius, angle = np.full_like(s, obj.radius), np.zeros_like(s)
    if obj.motion in ("left", "right"):
        x += obj.travel * (s - 0.5) * (1 if obj.motion == "right" else -1)
    elif obj.motion in ("up", "down"):
        y += obj.travel * (s - 0.5) * (1 if obj.motion == "down" else -1)
    elif obj.motion == "bounce":
        # Free fall: a parabola per period, touching the ground (y + travel / 2) at every integer.
        u = np.mod(obj.phase + obj.turns * s, 1.0)
        y += obj.travel * (0.5 - 4 * u * (1 - u))
    elif obj.motion == "circle":
        theta = 2 * math.pi * (obj.phase + obj.turns * s)
        x, y = x + obj.travel * np.cos(theta), y + obj.travel * np.sin(theta)
    elif obj.motion == "spin":
        angle = obj.phase + obj.turns * s
    elif obj.motion in ("grow", "shrink"):
        radius = obj.radius * (1 + (GROWTH - 1) * (2 * s - 1) * (1 if obj.motion == "grow" else -1))
    else:
        assert obj.motion == "still", obj.motion
    return x, y, radius, angle


def frame_times(frames: int) -> np.ndarray:
    """Clip time of every frame: (F,) from 0 to 1."""
    return np.linspace(0.0, 1.0, frames)


def bounce_times(obj: ObjectSpec) -> np.ndarray:
    """Clip times in [0, 1] at which a bouncing object touches the ground; empty for other motions."""
    if obj.motion != "bounce":
        return np.zeros(0)
    touches = np.arange(math.ceil(obj.phase), math.floor(obj.phase + obj.turns) + 1)
    return (touches - obj.phase) / obj.turns


@lru_cache(maxsize=32)
def _split(
    shapes: tuple[str, ...], colors: tuple[str, ...], motions: tuple[str, ...]
) -> tuple[tuple[Combination, ...], tuple[Combination, ...]]:
    """(train, test) triples. Test takes evenly from all shapes, colours and motions; train keeps every pair.

    Ties fall by a hash of the names, so the choice looks random and is the same on every machine.
    """
    triples = [t for t in product(shapes, colors, motions) if valid(t[0], t[2])]
    left = Counter(pair for triple in triples for pair in _pairs(triple))
    whole = Counter(part for triple in triples for part in enumerate(triple))
    taken: Counter[tuple[int, str]] = Counter()
    order = sorted(triples, key=lambda t: key_to_seed("shapeworld split", *t))
    held: set[Combination] = set()
    while len(held) < round(HELD_OUT * len(triples)):
        free = [t for t in order if t not in held and all(left[pair] > 1 for pair in _pairs(t))]
        if not free:
            break
        triple = min(free, key=lambda t: sum(taken[part] / whole[part] for part in enumerate(t)))
        held.add(triple)
        taken.update(enumerate(triple))
        left.subtract(_pairs(triple))
    return tuple(t for t in triples if t not in held), tuple(t for t in triples if t in held)


def _pairs(triple: Combination) -> tuple[tuple[str | None, ...], ...]:
    shape, color, motion = triple
    return (shape, color, None), (shape, None, motion), (None, color, motion)


def _place(
    wanted: Attributes,
    count: int,
    frames: int,
    extent: tuple[float, float],
    rng: np.random.Generator,
    paces: float,
) -> ObjectSpec:
    """Draw where and how fast, so that the whole path stays inside the frame; periods times ``paces``."""
    radius = RADIUS[count][wanted.size]
    motion = wanted.motion
    margin = EXTENT * radius * (GROWTH if motion in ("grow", "shrink") else 1.0)
    reach_x = reach_y = travel = phase = turns = 0.0
    room_x, room_y = extent[0] - 2 * margin, extent[1] - 2 * margin
    few = frames < 8  # few frames sample a periodic motion coarsely: fix the phase that shows it best
    if motion in ("left", "right"):
        travel = room_x * rng.uniform(0.7, 1.0)
        reach_x = travel / 2
    elif motion in ("up", "down"):
        travel = room_y * rng.uniform(0.7, 1.0)
        reach_y = travel / 2
    elif motion == "bounce":
        travel = room_y * rng.uniform(0.75, 1.0)
        reach_y = room_y - travel / 2  # pins the ground to the lower edge, see y below
        turns, phase = (1.5, 0.5) if few else (rng.uniform(1.7, 2.3), rng.uniform(0.0, 1.0))
    elif motion == "circle":
        travel = min(ORBIT[count], room_x / 2, room_y / 2) * rng.uniform(0.85, 1.0)
        reach_x = reach_y = travel
        turns = (0.75 if few else rng.uniform(0.85, 1.1)) * rng.choice((-1.0, 1.0))
        phase = rng.uniform(0.0, 1.0)
    elif motion == "spin":
        fastest = 0.4 * SYMMETRY[wanted.shape] * (frames - 1)
        turns = min(rng.uniform(0.5, 0.75), fastest) * rng.choice((-1.0, 1.0))
        phase = rng.uniform(0.0, 1.0)
    x = rng.uniform(margin + reach_x, extent[0] - margin - reach_x)
    y = (
        rng.uniform(margin + reach_y, extent[1] - margin - reach_y)
        if motion != "bounce"
        else margin + reach_y
    )
    return ObjectSpec(
        wanted.shape,
        wanted.color,
        wanted.size,
        motion,
        radius,
        *(round(float(v), 6) for v in (x, y, travel, phase, turns * paces)),
    )


def _overlap(objects: tuple[ObjectSpec, ...]) -> float:
    """How deep two objects get into each other, averaged over the clip; 0 when they never touch."""
    s = frame_times(9)
    (x0, y0, r0, _), (x1, y1, r1, _) = (trajectory(obj, s) for obj in objects)
    return float(np.maximum(0.0, r0 + r1 - np.hypot(x0 - x1, y0 - y1)).mean())
