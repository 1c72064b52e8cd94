"""The files of a request's conditions, read as the clip needs them: at its size and rate, no longer than what
is given.

Of a film that is longer, a prefix takes the end and everything else the beginning: what comes before a clip
ends where the clip goes on.

Shapes: P pixel frames, H x W pixels, F token frames, T latents of sound, h x w latent cells; Z sound
channels, M samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from motionloom.config.conditions import Base, Keyframes, Mask, Prefix, Scene, Suffix
from motionloom.data.buckets import whole_frames
from motionloom.data.cache.masks import latent_mask
from motionloom.data.media import (
    IMAGE_SUFFIXES,
    MediaError,
    is_sound,
    probe,
    read_clip,
    read_sound,
    sound_seconds,
)
from motionloom.errors import UserError
from motionloom.generate import Clip, Model, Source
from motionloom.generate.clip import with_sources
from motionloom.generate.sources import pixel_ends
from motionloom.plans import Conditions, Sample, region
from motionloom.plans.conditions import Draws

_WHITE = 127  # codecs and resampling leave neither quite black nor quite white
_BLACK = (0, 0, 0)
_ALIKE = 1e-2
"""Full scale 1: sound that is read from another place of a file may be resampled a little otherwise."""


@dataclass(frozen=True)
class Given:
    """A condition with all that its file brings."""

    condition: Base
    """With its length said."""
    where_PHW: NDArray[np.bool_]
    """The pixels of the clip that it gives; none for sound and references."""
    video_PHW3: Tensor | None = None
    """As ``Source.video_BPHW3``, once."""
    sound_ZM: Tensor | None = None
    sample_rate: int = 0
    mask_Fhw: Tensor | None = None
    heard_T2: Tensor | None = None
    """Beginning and end in seconds of the latents of sound that it gives."""
    notes: tuple[str, ...] = field(default=())

    @property
    def exact_pixels(self) -> bool:
        """Whether pixels of the clip itself are given to the bit."""
        return self.condition.strength == 1 and bool(self.where_PHW.any())

    def source(self, batch: int) -> Source:
        """The same for every clip of a batch."""

        def each(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[None].expand(batch, *t.shape)

        return Source(each(self.video_PHW3), each(self.sound_ZM), self.sample_rate, each(self.mask_Fhw))

    def frame_at(self, index: int) -> Tensor:
        """(H, W, 3): what it shows in a pixel frame of the clip, one of those in ``where_PHW``."""
        assert self.video_PHW3 is not None
        if len(self.video_PHW3) == len(self.where_PHW):
            return self.video_PHW3[index]
        before = int(self.where_PHW[:index].any(axis=(1, 2)).sum())
        return self.video_PHW3[min(before, len(self.video_PHW3) - 1)]

    def put_back(self, clip: Clip) -> Clip:
        """A clip with what this gives of it whole, as it was handed in: coding it would only cost quality."""
        c = self.condition
        if c.type != "modality" or c.strength < 1:
            return clip
        if c.modality == "audio":
            return replace(clip, sound_ZM=self.sound_ZM, sample_rate=self.sample_rate)
        assert self.video_PHW3 is not None
        return replace(clip, video_PHW3=self.video_PHW3.expand(len(self.where_PHW), -1, -1, -1))


@dataclass(frozen=True)
class Reader:
    """Reads the files of conditions for clips of one shape."""

    model: Model
    shots: tuple[int, ...]
    """Pixel frames of each scene."""
    height: int
    width: int
    fps: float

    @property
    def frames(self) -> int:
        """Pixel frames of the clip."""
        return sum(self.shots)

    @property
    def seconds(self) -> float:
        """Length of the clip."""
        return self.frames / self.fps

    @property
    def sample(self) -> Sample:
        """Where the clip's tokens are."""
        return self.model.sample(self.shots, self.height, self.width, self.fps, 1)

    def condition(self, c: Base, at: str) -> Given:
        """A condition of a request.

        Args:
            at: what messages call it.

        Raises:
            UserError: its file is missing, cannot be read, is of another kind, or is too short; or it gives
                nothing of the clip.
        """
        try:
            if c.type == "reference":
                return self._reference(c)
            if isinstance(c, Scene):
                c = self._with_modality(c)
            if isinstance(c, Prefix | Suffix) and c.frames is None and c.seconds is None:
                c = self._as_long_as_its_file(c)
            if isinstance(c, Mask):
                return self._mask(c)
            return self._part(c)
        except UserError as error:
            raise UserError(f"{at}: {error}") from None

    def scene(self, number: int, source: str) -> Given:
        """A scene that is given."""
        return self.condition(Scene(scenes=(number,), source=source), f"scenes[{number}]")

    # What is given of the clip itself

    def _part(self, c: Base) -> Given:
        """Pixels, sound or both."""
        given = Given(c, self._pixels_where(c, self.sample))
        if self._speaks_of(c, "video"):
            given = self._with_pixels(given)
        if self._speaks_of(c, "audio"):
            given = self._with_sound(given)
        return given

    def _speaks_of(self, c: Base, modality: str) -> bool:
        return c.modality in ("all", modality) and modality in self.model.modalities

    def _pixels_where(self, c: Base, sample: Sample) -> NDArray[np.bool_]:
        """(P, H, W): tokens brought to pixels."""
        if not self._speaks_of(c, "video"):
            return np.zeros((self.frames, 0, 0), bool)
        geometry = sample.tracks["video"]
        where_FRC = self._where(c, sample, "video").unflatten(1, geometry.grid[1:])
        down, right = (int(p) for p in geometry.pixels_per_cell)
        where_FHW = where_FRC.repeat_interleave(down, dim=1).repeat_interleave(right, dim=2)
        coded = self.shots if self.model.shots_alone(len(self.shots)) else (self.frames,)
        ends = pixel_ends(self.model.coders, coded)
        lengths = torch.tensor([end - begin for begin, end in pairwise([0, *ends])])
        return where_FHW.repeat_interleave(lengths, dim=0).numpy()

    def _where(self, c: Base, sample: Sample, modality: str) -> Tensor:
        """(F, S): the tokens that a condition gives. Refuses one that gives none."""
        where_FS = region(c, sample, modality, Draws(None, 1, self.model.device))[0].cpu()
        if not where_FS.any():
            raise UserError(f"gives nothing: {self._smallest(c, modality)}")
        return where_FS

    def _smallest(self, c: Base, modality: str) -> str:
        """What would be given at least."""
        if modality == "audio":
            assert self.model.audio_tokenizer is not None
            latents = self.model.audio_tokenizer.spec.latents_per_second
            return f"a latent of the sound lasts {1 / latents:g} s: give more"
        spec, patch = self.model.tokenizer.spec, self.model.patch
        if isinstance(c, Keyframes):
            return f"{c.times[0]:g} s is not before the clip's end, {self.seconds:g} s: take an earlier time"
        if isinstance(c, Scene):
            return f"it names no scene of {len(self.shots)}, which count from 0"
        cell = f"{spec.spatial * patch[1]}x{spec.spatial * patch[2]} pixels"
        begin, end = spec.pixel_frames(patch[0]), spec.temporal * patch[0]
        length = end if isinstance(c, Suffix) else begin
        return (
            f"a token is {cell} of {length} frame{'s' if length > 1 else ''}, given whole or not: give more"
        )

    def _with_pixels(self, given: Given) -> Given:
        c, whole = given.condition, (given.where_PHW.any(axis=(1, 2))).sum()
        if c.type in ("spatial_crop", "mask", "modality"):
            return replace(given, video_PHW3=self._film(c.source, self.frames, "first"))
        if isinstance(c, Keyframes):
            return replace(given, video_PHW3=self._at_times(c))
        frames = int(whole)
        end = "last" if isinstance(c, Prefix) or c.type == "last_frame" else "first"
        video_PHW3 = self._film(c.source, frames, end)
        at = np.flatnonzero(given.where_PHW.any(axis=(1, 2)))
        note = f"{c.type}: {end} {frames} frames of {c.source}, at frames {at[0]} to {at[-1]} of the clip"
        return replace(given, video_PHW3=video_PHW3, notes=(note,) if len(video_PHW3) > 1 else ())

    def _film(self, path: str, frames: int, end: str, **how: Any) -> Tensor:
        """So many frames, (P, H, W, 3), from the film's beginning or end; of a picture its one."""
        _require_pixels(path)
        how = {
            "fps": self.fps,
            "size": (self.height, self.width),
            "background": self.model.recipe.preprocess.background,
            **how,
        }
        info, start = probe(path), 0.0
        if info.kind == "image":
            return torch.from_numpy(read_clip(path, **how).video_FHW3)
        if end == "last":
            has = math.floor(info.duration * how["fps"] + 0.1)
            start = max(0, has - frames) / how["fps"]
        found = read_clip(path, start=start, frames=frames, short="trim", **how).video_FHW3
        if len(found) < frames:
            raise UserError(
                f"{path} has {len(found)} frames at {how['fps']:g} a second, and {frames} are given of the "
                "clip: name a longer one, or give less"
            )
        return torch.from_numpy(found)

    def _at_times(self, c: Keyframes) -> Tensor:
        """A picture, which stands still at its times; or a film, whose own moments they are."""
        last = int(max(c.times) * self.fps + 1e-3) + 1
        _require_pixels(c.source)
        if probe(c.source).kind == "image":
            return self._film(c.source, 1, "first")
        has = self._film(c.source, last, "first")
        more = read_clip(
            c.source,
            frames=self.frames,
            fps=self.fps,
            size=(self.height, self.width),
            background=self.model.recipe.preprocess.background,
            short="hold",
        ).video_FHW3
        return torch.cat([has, torch.from_numpy(more[last:])])

    def _as_long_as_its_file(self, c: Prefix | Suffix) -> Prefix | Suffix:
        """All of it, if that leaves something to make."""
        if c.modality == "audio":
            _require_sound(c.source)
            seconds = sound_seconds(c.source)
        else:
            _require_pixels(c.source)
            info = probe(c.source)
            frames = 1 if info.kind == "image" else math.floor(info.duration * self.fps + 0.1)
            # A picture is given as it would be alone: for as long as the smallest part lasts.
            spec, patch = self.model.tokenizer.spec, self.model.patch[0]
            least = spec.pixel_frames(patch) if isinstance(c, Prefix) else spec.temporal * patch
            seconds = max(frames, least if frames == 1 else 1) / self.fps
        if seconds >= self.seconds - 1e-6:
            option = f"--{c.type} {c.source}:{max(1, self.frames // 2)}"
            raise UserError(
                f"{c.source} lasts {seconds:g} s and the clip {self.seconds:g} s: say how much of it is "
                f"given, for instance frames: {max(1, self.frames // 2)} ({option})"
            )
        return c.model_copy(update={"seconds": seconds})

    # Sound

    def _with_sound(self, given: Given) -> Given:
        """Laid where it is given, silence elsewhere."""
        c, sample = given.condition, self.sample
        span_T2 = sample.tracks["audio"].span_BF2
        assert span_T2 is not None
        span_N2 = span_T2[0].cpu()[self._where(c, sample, "audio").any(dim=1)]
        begin, end = float(span_N2[:, 0].min()), float(span_N2[:, 1].max())
        if c.type in ("mask", "modality"):
            begin, end = 0.0, self.seconds
        sound_ZM, rate = self._sound(c.source, min(end, self.seconds) - begin, isinstance(c, Prefix))
        before = round(begin * rate)
        after = max(0, round(self.seconds * rate) - before - sound_ZM.shape[1])
        laid_ZM = torch.nn.functional.pad(sound_ZM, (before, after))
        return replace(given, sound_ZM=laid_ZM, sample_rate=rate, heard_T2=span_N2)

    def _sound(self, path: str, seconds: float, from_end: bool) -> tuple[Tensor, int]:
        """So many seconds of a file's sound, (Z, M), and its rate."""
        _require_sound(path)
        spec = self.model.audio_tokenizer.spec if self.model.audio_tokenizer is not None else None
        assert spec is not None
        rate = spec.sample_rate
        start = max(0.0, sound_seconds(path) - seconds) if from_end else 0.0
        sound = read_sound(path, rate, start=start, seconds=seconds)
        lacks = round(seconds * rate) - sound.shape[1]
        if lacks > rate / spec.latents_per_second:
            raise UserError(
                f"{path} has {sound.shape[1] / rate:g} s of sound, and {seconds:g} s are given of the clip: "
                "name a longer one, or give less"
            )
        return torch.from_numpy(np.pad(sound, ((0, 0), (0, max(0, lacks))))), rate

    def _with_modality(self, c: Scene) -> Scene:
        """Of a file without sound (or without pixels), the one modality that it has."""
        if c.modality != "all" or self.model.modalities == ("video",):
            return c
        if self.model.modalities == ("audio",) or is_sound(Path(c.source)):
            return c.model_copy(update={"modality": "audio"})
        _require_pixels(c.source)
        return c if probe(c.source).has_sound else c.model_copy(update={"modality": "video"})

    # Masks

    def _mask(self, c: Mask) -> Given:
        sample = self.sample
        if late := [pair for pair in c.made if pair[0] >= self.seconds]:
            raise UserError(
                f"made {list(late[0])} begins after the clip's end, {self.seconds:g} s: take earlier seconds"
            )
        span_BT2 = sample.tracks[c.modality].span_BF2
        if c.modality == "audio":
            assert span_BT2 is not None
            given_T = ~_overlaps(span_BT2[0].cpu(), c.made)
            mask_Fhw = given_T[:, None, None]
        else:
            spec = self.model.tokenizer.spec
            alone = self.model.shots_alone(len(self.shots))
            white_PHW = self._white(c)
            mask_Fhw = latent_mask(white_PHW, spec, self.shots if alone else (self.frames,))
        if not mask_Fhw.any():
            raise UserError(
                f"{c.mask or 'made'} gives nothing: what is white is given, and a latent cell is given only "
                "if all of it is; give more"
            )
        masked = with_sources(self.model, sample, Conditions((c,)), (Source(mask_BFhw=mask_Fhw[None]),))
        given = Given(c, self._pixels_where(c, masked), mask_Fhw=mask_Fhw)
        if c.modality == "video":
            return self._with_pixels(given)
        sound_ZM, rate = self._sound(c.source, self.seconds, from_end=False)
        assert span_BT2 is not None
        heard_T2 = span_BT2[0].cpu()[mask_Fhw[:, 0, 0]]
        return replace(given, sound_ZM=sound_ZM, sample_rate=rate, heard_T2=heard_T2)

    def _white(self, c: Mask) -> Tensor:
        """(P, H, W): what is given, in pixels."""
        if c.made:
            begin_P = torch.arange(self.frames) / self.fps
            given_P = ~_overlaps(torch.stack([begin_P, begin_P + 1 / self.fps], dim=1), c.made)
            return given_P[:, None, None].expand(-1, self.height, self.width)
        _require_pixels(c.source)
        _require_pixels(c.mask)
        _require_one_shape(c.mask, c.source)
        video_PHW3 = self._film(c.mask, self.frames, "first", background=_BLACK)
        return (video_PHW3.float().mean(dim=3) > _WHITE).expand(self.frames, -1, -1)

    # References

    def _reference(self, c: Base) -> Given:
        """A clip beside, as training has them: every ``frame_stride``-th moment, at its own size."""
        nowhere = np.zeros((self.frames, 0, 0), bool)
        if c.modality == "audio":
            _require_sound(c.source)
            seconds = min(self.seconds, sound_seconds(c.source))
            sound_ZM, rate = self._sound(c.source, seconds, from_end=False)
            return Given(c, nowhere, sound_ZM=sound_ZM, sample_rate=rate)
        _require_pixels(c.source)
        config, spec, patch = self.model.recipe.references, self.model.tokenizer.spec, self.model.patch[0]
        pixels = torch.from_numpy(
            read_clip(
                c.source,
                frames=math.ceil(self.frames / config.frame_stride),
                fps=self.fps / config.frame_stride,
                size=(self.height // config.downscale, self.width // config.downscale),
                background=self.model.recipe.preprocess.background,
                short="trim",
            ).video_FHW3
        )
        needs = spec.pixel_frames(patch)
        if len(pixels) == 1:
            return Given(c, nowhere, pixels.expand(needs, -1, -1, -1))
        whole = whole_frames(spec, len(pixels), patch)
        if not whole:
            raise UserError(
                f"{c.source} has {len(pixels)} frames at {self.fps / config.frame_stride:g} a second, and a "
                f"reference needs {needs}: name a longer one, or a picture"
            )
        return Given(c, nowhere, pixels[:whole])


def disagreement(one: Given, other: Given) -> str:
    """Where two files, given with equal strength and noise, say different things; empty if nowhere.

    Only one of them could stand there, and nothing says which.
    """
    a, b = one.condition, other.condition
    if a.source == b.source:
        return ""
    if (a.strength, a.noise) != (b.strength, b.noise) or "reference" in (a.type, b.type):
        return ""
    if one.video_PHW3 is not None and other.video_PHW3 is not None:
        both_PHW = one.where_PHW & other.where_PHW
        differ = [
            p
            for p in np.flatnonzero(both_PHW.any(axis=(1, 2))).tolist()
            if bool((one.frame_at(p) != other.frame_at(p)).any(dim=2).numpy()[both_PHW[p]].any())
        ]
        if differ:
            return f"frames {differ[0]} to {differ[-1]}" if len(differ) > 1 else f"frame {differ[0]}"
    return _unlike_sound(one, other)


def _unlike_sound(one: Given, other: Given) -> str:
    if one.heard_T2 is None or other.heard_T2 is None:
        return ""
    assert one.sound_ZM is not None
    assert other.sound_ZM is not None
    twice = (one.heard_T2[:, None] == other.heard_T2[None]).all(dim=2).any(dim=1)
    for begin, end in one.heard_T2[twice].tolist():
        part = slice(round(begin * one.sample_rate), round(end * one.sample_rate))
        a_ZM, b_ZM = (sound.float().mean(dim=0)[part] for sound in (one.sound_ZM, other.sound_ZM))
        shared = min(len(a_ZM), len(b_ZM))
        if not torch.allclose(a_ZM[:shared], b_ZM[:shared], atol=_ALIKE):
            return f"the sound from {begin:g} s"
    return ""


def _overlaps(span_N2: Tensor, made: tuple[tuple[float, float], ...]) -> Tensor:
    """(N,): whether a stretch of time meets any of those that are made."""
    found = [(span_N2[:, 0] < end - 1e-4) & (span_N2[:, 1] > begin + 1e-4) for begin, end in made]
    return torch.stack(found).any(dim=0)


def _require_pixels(path: str) -> None:
    if is_sound(Path(path)):
        raise UserError(
            f"{path} is a sound, and pixels are asked for: name a film or a picture, or say modality: audio"
        )


def _require_sound(path: str) -> None:
    if Path(path).suffix.lower() in IMAGE_SUFFIXES or Path(path).is_dir():
        raise UserError(f"{path} is a picture, which has no sound: name a sound, or a film that has one")


def _require_one_shape(mask: str, source: str) -> None:
    """A mask has the pixels of its film; a picture of the film's shape covers it at any scale."""
    of, over = probe(mask), probe(source)
    off = abs(of.width * of.pixel_aspect / of.height * over.height - over.width * over.pixel_aspect)
    if off >= 1 if of.kind == "image" else (of.width, of.height) != (over.width, over.height):
        raise MediaError(
            mask,
            f"has {of.width}x{of.height} pixels, and {source} has {over.width}x{over.height}",
            "scale the mask to its film's size",
            "bad mask",
        )
