"""A request: what to make and what is given of it, as a YAML file or as options of the command line say it.

The same strict tree for ``motionloom generate --request``, for its options and for the samples while
training. Conditions are those of ``config.conditions``, with files for what they bring.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from motionloom.config.conditions import (
    CONDITIONS,
    Base,
    Condition,
    Keyframes,
    Mask,
    Reference,
    Seconds,
    SpatialCrop,
)
from motionloom.config.guidance import ConditionScale, Interval, Scale
from motionloom.config.keys import expected, shown
from motionloom.config.section import BelowOne, Fraction, NotNegative, Positive, Section
from motionloom.config.yaml_text import read_yaml
from motionloom.errors import UserError

TRAINING = ("probability", "count", "masks", "area", "duration")
"""Keys of conditions that say how training draws them."""

ONCE = ("first_frame", "last_frame", "prefix", "suffix", "spatial_crop", "mask", "modality")
"""Conditions of which a modality has at most one."""


class SceneRequest(Section):
    """One shot."""

    caption: str = Field(default="", description="What it shows.")
    frames: Positive | None = Field(default=None, description="Pixel frames; none: as the model was trained.")
    seconds: Seconds | None = Field(default=None, description="Or its length in seconds.")
    role: Literal["generate", "given"] = "generate"
    source: str = Field(default="", description="role given: the film of it.")


class ExtendRequest(Section):
    """More rounds, each of which looks at the end (or the beginning) of what is there."""

    frames: Positive | None = Field(default=None, description="How many pixel frames are added.")
    rounds: Positive | None = Field(default=None, description="Or how many rounds.")
    direction: Literal["forwards", "backwards"] = "forwards"
    keep: Positive | None = Field(
        default=None, description="Latent frames that each round is given; none: half of what it can hold."
    )
    noise: BelowOne = Field(default=0.0, description="Noise level at which they are shown.")


class MemoryRequest(Section):
    """Scene after scene: what each of them is shown of those that are known."""

    policy: Literal["last", "first_last", "similar", "all"] = Field(
        default="last",
        description="The last ones; the first and the last ones; those with the nearest captions; all.",
    )
    keep: Positive = Field(default=1, description="How many; of first_last how many of the last.")
    noise: BelowOne = Field(default=0.0, description="Noise level at which they are shown.")


class GuidanceRequest(Section):
    """Scales in place of the recipe's; see its sections ``guidance`` and ``train`` (sample_cfg_*)."""

    text: Scale | None = Field(default=None, description="Of the text; 1 is none.")
    interval: Interval | None = None
    rescale: Fraction | None = None
    skip: Scale | None = Field(default=None, description="Away from self-attention left out; 0 is none.")
    skip_blocks: tuple[NotNegative, ...] = Field(default=(), description="Blocks that leave it out.")
    cross: Scale | None = Field(default=None, description="Sound and picture towards each other; 1 is none.")
    conditions: dict[str, Scale] = Field(default={}, description="By type of condition; 1 is none.")


class Request(Section):
    """What to make. What is left out is as in the model's recipe.

    Raises:
        pydantic.ValidationError: a wrong value, or values that do not fit together (:func:`parse_request`
            turns it into one line).
    """

    prompt: str | None = Field(default=None, description="Its caption; beside scenes, that of the whole.")
    prompts: tuple[str, ...] = Field(default=(), description="For several clips.")
    negative: str = Field(default="", description="What guidance pushes away from.")
    scenes: tuple[SceneRequest, ...] = ()
    memory: MemoryRequest | None = Field(default=None, description="Scene after scene; none: all at once.")
    conditions: tuple[Condition, ...] = ()
    extend: ExtendRequest | None = None
    frames: Positive | None = Field(default=None, description="Pixel frames of a clip of one scene.")
    seconds: Seconds | None = Field(default=None, description="Or its length in seconds.")
    size: tuple[Positive, Positive] | None = Field(default=None, description="Height and width in pixels.")
    fps: Annotated[float, Field(gt=0, le=240)] | None = None
    seed: NotNegative = 0
    steps: Positive | None = Field(default=None, description="Solver steps.")
    solver: Literal["euler", "heun", "dpmpp_2m", "ddim"] | None = None
    guidance: GuidanceRequest = GuidanceRequest()
    format: Literal["mp4", "webm", "webp", "gif", "png", "wav"] = Field(
        default="mp4", description="Of the files; wav: the sound alone."
    )

    @field_validator("size", mode="before")
    @classmethod
    def _size(cls, value: Any) -> Any:
        if isinstance(value, str):
            sides = value.split("x")
            if len(sides) > 2 or not all(side.isdecimal() for side in sides):
                raise ValueError(f"{value}: write one side or HEIGHTxWIDTH in pixels, for instance 64x96")
            value = [int(side) for side in sides]
        if isinstance(value, int):
            return (value, value)
        return value * 2 if isinstance(value, list) and len(value) == 1 else value

    @field_validator("guidance", mode="before")
    @classmethod
    def _guidance(cls, value: Any) -> Any:
        return {"text": value} if isinstance(value, int | float) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _fits_together(self) -> Request:
        if problem := next(_problems(self), None):
            raise ValueError(problem)
        return self

    @property
    def all_prompts(self) -> tuple[str, ...]:
        """One per clip."""
        return self.prompts or (self.prompt or "",)


def read_tree(path: Path) -> dict[str, Any]:
    """A request file as a plain tree, its paths made to mean the same from every folder.

    Raises:
        UserError: it cannot be read, is broken YAML, or is no mapping.
    """
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file (UTF-8): name a YAML file") from error
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}): name a YAML file with a request"
        ) from error
    tree = read_yaml(text, str(path))
    if not isinstance(tree, Mapping):
        raise UserError(f"{path}: a request is `key: value` lines, such as prompt: a red circle moves right")
    return _beside(dict(tree), path.parent)


def read_request(path: Path) -> Request:
    """A request file.

    Raises:
        UserError: as :func:`read_tree` and :func:`parse_request`.
    """
    return parse_request(read_tree(path), str(path))


def parse_request(tree: Mapping[str, Any], label: str = "") -> Request:
    """A request from a plain tree.

    Args:
        label: where it comes from; the message starts with it.

    Raises:
        UserError: unknown keys (the nearest is named), wrong values, or values that do not fit together.
    """
    if problem := request_problem(tree):
        raise UserError(f"{label}: {problem}" if label else problem)
    return Request.model_validate(tree)


def request_problem(tree: Mapping[str, Any]) -> str:
    """What is wrong with a tree as a request, in one line; empty if nothing is."""
    try:
        Request.model_validate(tree)
    except ValidationError as error:
        return error_line(error.errors()[0])
    return ""


def _beside(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Paths that are relative are so to ``folder``."""
    for section in ("conditions", "scenes"):
        if isinstance(parts := tree.get(section), list):
            tree[section] = [_paths(part, folder) if isinstance(part, dict) else part for part in parts]
    return tree


def _paths(part: dict[str, Any], folder: Path) -> dict[str, Any]:
    named = {k: v for k in ("source", "mask") if isinstance(v := part.get(k), str) and v}
    return part | {key: str(folder / Path(value).expanduser()) for key, value in named.items()}


# What does not fit together


def _problems(r: Request) -> Iterator[str]:
    """Each with its mend."""
    if r.prompt is None and not r.prompts and not r.scenes:
        yield "nothing to make: give a prompt (--prompt), prompts, or scenes (--scene)"
    if r.prompt is not None and r.prompts:
        yield "prompt and prompts both say what to show: keep one"
    if r.frames is not None and r.seconds is not None:
        yield "frames and seconds both say how long the clip is: keep one"
    yield from _scene_problems(r)
    yield from _condition_problems(r)
    yield from _extend_problems(r)
    held = {c.type for c in r.conditions} | {"scene" for s in r.scenes if s.role == "given"}
    for name in r.guidance.conditions:
        known = ConditionScale.model_json_schema()["properties"]["condition"]["enum"]
        if name not in known:
            yield f"guidance.conditions: {name} is no condition; choose one of {', '.join(known)}"
        if name not in held:
            yield f"guidance.conditions names {name}, and the request gives none: give it, or leave it out"
    if r.guidance.interval is not None and r.guidance.interval[0] >= r.guidance.interval[1]:
        yield "guidance.interval must be [low, high] with low < high"


def _scene_problems(r: Request) -> Iterator[str]:
    for i, scene in enumerate(r.scenes):
        if not scene.caption.strip():
            yield f"scenes[{i}] has no caption: say what it shows"
        if scene.frames is not None and scene.seconds is not None:
            yield f"scenes[{i}]: frames and seconds both say how long it is: keep one"
        if scene.role == "given" and not scene.source:
            yield f"scenes[{i}] is given and has no source: name its film"
        if scene.role == "generate" and scene.source:
            yield f"scenes[{i}] has a source and is to be made: say role: given, or leave the source out"
    if r.scenes and (r.frames is not None or r.seconds is not None):
        yield "frames and seconds are for a clip of one scene: say those of each scene"
    if r.scenes and all(scene.role == "given" for scene in r.scenes):
        yield "all scenes are given, so nothing is left to make: let one of them have role: generate"
    if r.memory is not None and not r.scenes:
        yield "memory is for scenes (--scene), and there are none: list scenes, or leave it out"


def _extend_problems(r: Request) -> Iterator[str]:
    if r.extend is None:
        return
    if (r.extend.frames is None) == (r.extend.rounds is None):
        yield "extend: say either frames or rounds"
    if r.scenes:
        yield "extend goes on with one scene: list more scenes instead, or leave it out"
    if any(isinstance(c, Reference) for c in r.conditions):
        yield "extend does not go with a reference, which stands beside one clip: ask for a longer clip"


def _condition_problems(r: Request) -> Iterator[str]:
    seen: set[tuple[str, str]] = set()
    times: set[float] = set()
    for i, c in enumerate(r.conditions):
        at = f"conditions[{i}] ({c.type})"
        if training := [key for key in TRAINING if key in c.model_fields_set]:
            yield f"{at}: {training[0]} is for training: leave it out"
        if not c.source:
            yield f"{at} has no source: name the file that brings it"
        key = (c.type, c.modality)
        if c.type in ONCE and key in seen:
            yield f"{at} stands twice for {c.modality}, with two sources for one part: keep one"
        seen.add(key)
        if isinstance(c, Keyframes):
            if again := times & set(c.times):
                yield f"{at}: {min(again):g} s is given twice: keep one"
            times |= set(c.times)
        if problem := _open(c):
            yield f"{at}: {problem}"


def _open(c: Base) -> str:
    """What a request must say and training may leave open."""
    length = getattr(c, "frames", None), getattr(c, "seconds", None)
    if any(isinstance(one, tuple) for one in length):
        return "a range is for training: say one length"
    if isinstance(c, Keyframes) and not c.times:
        return "times is empty: say the seconds at which the picture stands"
    if isinstance(c, SpatialCrop):
        if c.region is None:
            return "region is missing: say [top, left, bottom, right] in pixels"
        if not (c.region[0] < c.region[2] and c.region[1] < c.region[3]):
            return f"region {list(c.region)} is not [top, left, bottom, right]: nothing is inside"
    if isinstance(c, Mask):
        if bool(c.mask) == bool(c.made):
            return "say either mask, a file, or made, the [from, to] seconds that are made"
        if c.modality == "audio" and c.mask:
            return "sound has no pixels: say made, the [from, to] seconds that are made"
    if c.type == "scene" and isinstance(getattr(c, "scenes", None), str):
        return "scenes must be a list of numbers, such as [0]"
    return ""


# Messages


def error_line(error: Any) -> str:
    """One pydantic error of a request as a line: key, what it is, what was expected."""
    place, kind = list(error["loc"]), error["type"]
    if place[:1] == ["conditions"] and len(place) > 2:
        del place[2]  # the type, which the keys of its condition do not stand under
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return f"{_dotted(place)}: {_no_type(error)}"
    within = _class_at(list(error["loc"]))
    depth = _depth(place)
    name = str(place[depth]) if len(place) > depth else ""
    # Behind the key stand items, and names that pydantic gives to the ways of reading them.
    place = [*place[: depth + 1], *(part for part in place[depth + 1 :] if isinstance(part, int))]
    if kind == "extra_forbidden":
        close = get_close_matches(name, within.model_fields, 1)
        meant = f"did you mean {close[0]}?" if close else f"it may be {', '.join(within.model_fields)}"
        return f"{_dotted(place)} is not a key; {meant}"
    if kind == "value_error":
        return f"{_dotted(place)}: {error['ctx']['error']}" if place else str(error["ctx"]["error"])
    if not name:
        return f"{_dotted(place)} is {shown(error['input'])}; expected `key: value` lines"
    return f"{_dotted(place)} is {shown(error['input'])}; expected {expected(name, within)}"


def _dotted(place: list[Any]) -> str:
    """``("scenes", 1, "caption")`` -> ``scenes[1].caption``."""
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _no_type(error: Any) -> str:
    told = error["input"].get("type") if isinstance(error["input"], dict) else None
    close = get_close_matches(str(told), CONDITIONS, 1)
    meant = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(CONDITIONS)}"
    return f"type {told} is no condition; {meant}" if told else f"it has no type; {meant}"


_PARTS: dict[str, type[Section]] = {
    "extend": ExtendRequest,
    "memory": MemoryRequest,
    "guidance": GuidanceRequest,
}


def _class_at(loc: list[Any]) -> type[Section]:
    """Whose key an error speaks of."""
    if loc[:1] == ["scenes"] and len(loc) > 1:
        return SceneRequest
    if loc[:1] == ["conditions"] and len(loc) > 2:
        return CONDITIONS[loc[2]]
    return _PARTS.get(str(loc[0]), Request) if len(loc) > 1 else Request


def _depth(place: list[Any]) -> int:
    """Where, in an error's place, the key of :func:`_class_at` stands."""
    if place[:1] in (["scenes"], ["conditions"]) and len(place) > 1:
        return 2
    return 1 if len(place) > 1 and place[0] in _PARTS else 0
