"""Conditions of a recipe that could never hold for its clips, or say what training does not read.

Refused is only what holds for no clip that the recipe may see: of several buckets, one that fits is enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from motionloom.config.conditions import (
    Base,
    Keyframes,
    Mask,
    Prefix,
    Reference,
    Scene,
    SpatialCrop,
    Suffix,
    Whole,
)
from motionloom.config.recipe import Recipe

_SLACK = 1e-3
"""Pixel frames by which a length may be off and still fit: seconds are rounded."""


class _Clips(NamedTuple):
    """What is known of the clips before there is data."""

    longest: int | None
    """Pixel frames; None: stories make them as long as they like."""
    tokens: int | None
    """Token frames of the longest; None: not known."""
    fps: float
    first: int
    """Pixel frames of the first token."""
    last: int
    """Pixel frames of the last token, at least."""
    latent_of_sound: float
    """Its length in pixel frames; 0: not known."""
    sizes: tuple[tuple[int, int], ...]
    """(width, height) in pixels."""
    cell: tuple[int, int]
    """Pixels of a token, (width, height)."""
    scenes: int | None
    """Most scenes of a clip; None: any number."""
    held: tuple[str, ...]
    """Modalities of the plan."""

    @property
    def seconds(self) -> float:
        """Of the longest clip."""
        assert self.longest is not None
        return self.longest / self.fps

    def of(self) -> str:
        """How long the longest clip is, for a message."""
        return f"{self.longest} frames ({self.seconds:g} s)"


def given_misfits(r: Recipe) -> Iterator[str]:
    """Each with its key and mend."""
    clips = _clips(r)
    for i, c in enumerate(r.plan.conditions):
        for problem in (*_unread(c), *_never(c, clips)):
            yield f"plan.conditions[{i}].{problem}"
    always = [c for c in r.plan.conditions if isinstance(c, Whole) and c.probability == c.strength == 1]
    if len(clips.held) > 1 and {c.modality for c in always} == set(clips.held):
        yield (
            "plan.conditions give all of the sound and all of the picture, always, so nothing is left to "
            "make: lower a probability"
        )


def _clips(r: Recipe) -> _Clips:
    stories, tokenizer = r.stories, r.tokenizer
    several = r.bucketing.enabled and r.bucketing.frames
    frames = max(r.bucketing.frames) if several else r.video.num_frames
    head, (depth, rows, columns) = int(tokenizer.first_alone), r.model.patch
    latents = head + (frames - head) // tokenizer.latent_t
    # Shots that are cut or joined on their own are together as long as there are shots.
    free, by_scenes = stories.frames is not None or stories.join[1] > 0, r.of_shots
    most = [n for n in (None if stories.frames else latents, stories.shots) if n is not None]
    scenes = max(min(most), stories.join[1]) if most else None
    first = tokenizer.latent_t * depth - (tokenizer.latent_t - 1) * head
    fps = r.video.fps / r.video.frame_stride
    return _Clips(
        None if free else frames,
        # Each shot of a plan of scenes has a first frame of its own, and so may have more tokens.
        None if by_scenes else latents // depth,
        fps,
        first,
        first if by_scenes else tokenizer.latent_t * depth,
        fps / r.audio.latents_per_second if r.audio.type == "spectral" else 0.0,
        r.bucketing.buckets if r.bucketing.enabled else ((r.video.width, r.video.height),),
        (tokenizer.latent_f * columns, tokenizer.latent_f * rows),
        scenes,
        r.plan.modalities,
    )


def _unread(c: Base) -> Iterator[str]:
    """What only requests say."""
    if c.source:
        yield "source is a request's, and training takes what is given from the data: leave it out"
    if isinstance(c, Mask) and (c.mask or c.made):
        yield (
            f"{'mask' if c.mask else 'made'} is a request's, and training draws masks or takes those of the "
            "data: leave it out, or set masks: data"
        )
    if isinstance(c, Reference) and c.caption:
        yield "caption is a request's, and training has none for references: leave it out"


def _never(c: Base, clips: _Clips) -> Iterator[str]:
    """Why it could not hold."""
    if c.probability == 0:
        yield "probability is 0, so it never holds: raise it, or leave the condition out"
    alone = c.strength == 1 and clips.held == (c.modality,)
    if isinstance(c, Prefix | Suffix):
        yield from _stretch(c, clips, alone)
    elif isinstance(c, Keyframes):
        yield from _keyframes(c, clips, alone)
    elif isinstance(c, SpatialCrop):
        if c.region is not None:
            found = [_region(c.region, size, clips.cell, alone) for size in clips.sizes]
            yield from found[:1] if all(found) else ()
    elif isinstance(c, Mask):
        if c.masks == "drawn" and c.modality == "audio" and c.duration[0] == 1:
            yield "duration [1.0, 1.0] makes all of the sound, so nothing is given: lower the first number"
    elif isinstance(c, Scene):
        yield from _scene(c, clips)
    elif isinstance(c, Whole) and alone:
        yield (
            f"modality {c.modality} is all that plan.modalities has, so nothing is left to make: add another "
            "there, or leave the condition out"
        )
    elif c.type in ("first_frame", "last_frame") and alone and clips.tokens == 1 and clips.longest:
        yield f"type {c.type} gives all of a clip of one token frame: use a longer clip, or leave it out"


def _stretch(c: Prefix | Suffix, clips: _Clips, alone: bool) -> Iterator[str]:
    key = "frames" if c.frames is not None else "seconds"
    said = getattr(c, key)
    if said is None:
        return
    least, most = said if isinstance(said, tuple) else (said, said)
    rate, shown = (1.0 if key == "frames" else clips.fps), list(said) if isinstance(said, tuple) else said
    if c.modality == "audio":
        smallest, name = clips.latent_of_sound, "latent of the sound"
    else:
        smallest, name = float(clips.first if isinstance(c, Prefix) else clips.last), "token"
    if most * rate < smallest - _SLACK:
        yield (
            f"{key} {shown} is less than a {name}, {smallest:g} frames, so nothing is given: use "
            f"{smallest / rate:g} or more"
        )
    if clips.longest is None:
        return
    room = clips.longest - (1 if alone else 0)
    if most * rate > clips.longest + _SLACK:
        yield f"{key} {shown} is longer than the clip, {clips.of()}: use at most {room / rate:g}"
    elif alone and least * rate >= clips.longest - _SLACK:
        yield (
            f"{key} {shown} gives all of the clip, {clips.of()}, so nothing is left to make: use at most "
            f"{room / rate:g}"
        )


def _keyframes(c: Keyframes, clips: _Clips, alone: bool) -> Iterator[str]:
    if clips.longest is None:
        return
    if late := [t for t in c.times if t * clips.fps >= clips.longest - _SLACK]:
        yield f"times has {late[0]:g}, which is not before the clip's end, {clips.seconds:g} s: use less"
    if c.times or clips.tokens is None:
        return
    least, most = c.count if isinstance(c.count, tuple) else (c.count, c.count)
    shown = list(c.count) if isinstance(c.count, tuple) else c.count
    if most > clips.tokens or (alone and least == clips.tokens):
        room = clips.tokens - (1 if alone else 0)
        mend = f"use at most {room}" if room else "use a longer clip, or leave the condition out"
        yield f"count {shown} is too many for a clip of {clips.tokens} token frames: {mend}"


def _region(
    region: tuple[int, int, int, int], size: tuple[int, int], cell: tuple[int, int], alone: bool
) -> str:
    """What is wrong with it in a frame of this size; empty if nothing is."""
    (top, left, bottom, right), (width, height), (wide, high) = region, size, cell
    if top >= bottom or left >= right:
        return f"region {list(region)} is not [top, left, bottom, right]: nothing is inside"
    if bottom > height or right > width:
        return (
            f"region {list(region)} leaves the frame of {width}x{height} pixels: use [top, left, bottom, "
            f"right] up to {height} and {width}"
        )
    if bottom // high <= -(-top // high) or right // wide <= -(-left // wide):
        return (
            f"region {list(region)} holds no whole token of {wide}x{high} pixels, so nothing is given: use "
            f"multiples of {wide} across and {high} down"
        )
    if alone and (top, left, bottom, right) == (0, 0, height, width):
        return f"region {list(region)} is the whole frame, so nothing is left to make: use less"
    return ""


def _scene(c: Scene, clips: _Clips) -> Iterator[str]:
    if clips.scenes is None:
        return
    if clips.scenes == 1:
        yield f"scenes {c.scenes} needs clips of several scenes, and these have one: leave the condition out"
    elif isinstance(c.scenes, tuple) and max(c.scenes) >= clips.scenes:
        yield (
            f"scenes {list(c.scenes)} names scene {max(c.scenes)}, and a clip has at most {clips.scenes}, "
            f"which count from 0: use 0 to {clips.scenes - 1}"
        )
