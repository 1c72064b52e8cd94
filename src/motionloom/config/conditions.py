"""The condition language: what of a clip is given. The same in a recipe, a request and the held-out loss.

A condition names a part of one modality. In training the data has that part and ``probability`` says how
often it is given; a request says it of clips that it brings itself (``source``). Lengths are pixel frames or
seconds, regions are pixels; where training wants variety they are ranges ``[least, most]``.

``strength`` 1 gives the part exactly: it enters bit-identical, is never counted in the loss and comes back
bit-identical. Less makes it a hint: the part begins at noise level ``(1 - strength) sigma`` and is made anew
from there. ``noise`` shows a given part at that noise level (a history that is not trusted to the last
detail); in training the level is drawn up to it. Where conditions overlap, the one with the higher strength
holds, then the one with the lower noise.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from motionloom.config.section import BelowOne, Fraction, NotNegative, Positive, Section

Seconds = Annotated[float, Field(gt=0)]
Modality = Literal["video", "audio"]


def _ordered(value: Any) -> Any:
    if isinstance(value, tuple) and value[0] > value[1]:
        raise ValueError(f"a range is [least, most], not {list(value)}: turn it round")
    return value


def _some_scene(value: Any) -> Any:
    if value == ():
        raise ValueError("names no scene: list numbers that count from 0, or leave the condition out")
    return value


def _forwards(value: Any) -> Any:
    if wrong := [pair for pair in value if pair[0] >= pair[1]]:
        raise ValueError(f"{list(wrong[0])} ends before it begins: write [from, to]")
    return value


# Ranges are checked as wholes: within a union, pydantic would speak of the other way of reading them.
Count = Annotated[Positive | tuple[Positive, Positive], AfterValidator(_ordered)]
Frames = Annotated[Positive | tuple[Positive, Positive] | None, AfterValidator(_ordered)]
Length = Annotated[Seconds | tuple[Seconds, Seconds] | None, AfterValidator(_ordered)]
Part = Annotated[tuple[Fraction, Fraction], AfterValidator(_ordered)]


class Base(Section):
    """What every condition has."""

    type: str
    modality: str
    probability: Fraction = Field(default=1.0, description="Training: how often a sample has it.")
    strength: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="1: exact; less: a hint that is made anew from partial noise."
    )
    noise: BelowOne = Field(default=0.0, description="Noise level at which a given part is shown.")
    source: str = Field(default="", description="Requests: the file that brings it.")

    @model_validator(mode="after")
    def _one_softness(self) -> Base:
        if self.strength < 1 and self.noise > 0:
            raise ValueError("strength below 1 is made anew and noise is for what is given: set one of them")
        return self


class FirstFrame(Base):
    """The first frame of the clip: image to video."""

    type: Literal["first_frame"] = "first_frame"
    modality: Literal["video"] = "video"


class LastFrame(Base):
    """The last frame of the clip."""

    type: Literal["last_frame"] = "last_frame"
    modality: Literal["video"] = "video"


class Keyframes(Base):
    """Single frames at any times."""

    type: Literal["keyframes"] = "keyframes"
    modality: Literal["video"] = "video"
    times: tuple[Annotated[float, Field(ge=0)], ...] = Field(default=(), description="In seconds.")
    count: Count = Field(default=1, description="Training, without times: how many, anywhere.")

    @model_validator(mode="after")
    def _one_choice(self) -> Keyframes:
        if self.times and self.count != 1:
            raise ValueError("times says which keyframes are given, and count draws them: keep one")
        return self


class _Stretch(Base):
    modality: Modality = "video"
    frames: Frames = Field(default=None, description="Length in pixel frames; or a range.")
    seconds: Length = Field(default=None, description="Length in seconds; or a range.")

    @model_validator(mode="after")
    def _one_length(self) -> _Stretch:
        if self.frames is not None and self.seconds is not None:
            raise ValueError("frames and seconds both say how long it is: keep one")
        return self


class Prefix(_Stretch):
    """The beginning: extension forwards."""

    type: Literal["prefix"] = "prefix"


class Suffix(_Stretch):
    """The end: extension backwards."""

    type: Literal["suffix"] = "suffix"


class SpatialCrop(Base):
    """A rectangle in all frames: what lies outside is made (outpainting)."""

    type: Literal["spatial_crop"] = "spatial_crop"
    modality: Literal["video"] = "video"
    region: tuple[NotNegative, NotNegative, Positive, Positive] | None = Field(
        default=None, description="[top, left, bottom, right] in pixels, given inside."
    )
    area: Part = Field(
        default=(0.25, 0.75), description="Training, without region: the given part of the frame, drawn."
    )

    @model_validator(mode="after")
    def _one_choice(self) -> SpatialCrop:
        if self.region is not None and self.area != type(self).model_fields["area"].default:
            raise ValueError("region says what is given, and area draws it: keep one")
        return self


class Mask(Base):
    """Any part in space and time: white is given, black is made (inpainting)."""

    type: Literal["mask"] = "mask"
    modality: Modality = "video"
    masks: Literal["drawn", "data"] = Field(
        default="drawn", description="Training. data: those of the cache; drawn: boxes to be made."
    )
    area: Part = Field(default=(0.1, 0.5), description="Training, drawn: the part of a frame that is made.")
    duration: Part = Field(
        default=(0.5, 1.0), description="Training, drawn: the part of the clip that the box lasts."
    )
    mask: str = Field(default="", description="Requests: a file; what is white in it is given.")
    made: Annotated[tuple[tuple[Annotated[float, Field(ge=0)], Seconds], ...], AfterValidator(_forwards)] = (
        Field(default=(), description="Requests, in place of a file: [from, to] seconds that are made.")
    )

    @model_validator(mode="after")
    def _one_choice(self) -> Mask:
        if self.masks == "data":
            for key in ("area", "duration"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key} draws masks, and masks: data takes those of the data: keep one")
        return self


class Reference(Base):
    """A clip beside, to be looked at: IC-LoRA, video to video, upscaling. Its tokens are appended."""

    type: Literal["reference"] = "reference"
    modality: Modality = "video"
    caption: str = Field(default="", description="What it shows; only its own tokens read this.")

    @model_validator(mode="after")
    def _as_it_is(self) -> Reference:
        if self.strength < 1:
            raise ValueError("a reference is never made anew: leave strength out, or set noise")
        return self


class Scene(Base):
    """Whole scenes: given, and the others made."""

    type: Literal["scene"] = "scene"
    modality: Literal["video", "audio", "all"] = "all"
    scenes: Annotated[
        Literal["all_but_last", "all_but_one", "some"] | tuple[NotNegative, ...], AfterValidator(_some_scene)
    ] = Field(default="all_but_last", description="Which; some: any of them but never all, drawn.")


class Whole(Base):
    """The whole of one modality: a film for a sound, a sound for a film."""

    type: Literal["modality"] = "modality"
    modality: Modality = "audio"


def _type_of(value: Any) -> Any:
    """What tells conditions apart. pydantic's own refuses fields with a check of their input."""
    return value.get("type") if isinstance(value, dict) else getattr(value, "type", None)


Condition = Annotated[
    Annotated[FirstFrame, Tag("first_frame")]
    | Annotated[LastFrame, Tag("last_frame")]
    | Annotated[Keyframes, Tag("keyframes")]
    | Annotated[Prefix, Tag("prefix")]
    | Annotated[Suffix, Tag("suffix")]
    | Annotated[SpatialCrop, Tag("spatial_crop")]
    | Annotated[Mask, Tag("mask")]
    | Annotated[Reference, Tag("reference")]
    | Annotated[Scene, Tag("scene")]
    | Annotated[Whole, Tag("modality")],
    Discriminator(_type_of),
]
"""Any of them, told apart by ``type``."""

CONDITIONS: dict[str, type[Base]] = {
    "first_frame": FirstFrame,
    "last_frame": LastFrame,
    "keyframes": Keyframes,
    "prefix": Prefix,
    "suffix": Suffix,
    "spatial_crop": SpatialCrop,
    "mask": Mask,
    "reference": Reference,
    "scene": Scene,
    "modality": Whole,
}
"""Conditions by ``type``."""
