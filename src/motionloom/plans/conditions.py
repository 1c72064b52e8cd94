"""From conditions to tokens: which tokens of a sample each condition gives.

The language itself is ``config.conditions``; here is its one meaning, for training steps, held-out steps and
requests alike. A token is given only if all of it is: all its pixels, for all of its frames' time.

Shapes: B batch, F token frames, S = rows x columns cells of a frame, N = F x S tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from motionloom.config import conditions as language
from motionloom.errors import UserError
from motionloom.plans.geometry import Geometry, Sample
from motionloom.plans.given import Beside, Given, Kind, Marks

SLACK = 1e-4
"""Seconds by which a frame may end later and still count as inside: times are rounded."""


@dataclass
class Draws:
    """Numbers for conditions that leave something open; a request leaves nothing open."""

    generator: torch.Generator | None
    batch: int
    device: torch.device

    def uniform(self) -> Tensor:
        """(B,) in [0, 1).

        Raises:
            UserError: there is nothing to draw with.
        """
        if self.generator is None:
            raise UserError("a request must say lengths, times and regions; ranges are for training")
        draw_B = torch.rand(self.batch, generator=self.generator, device=self.generator.device)
        return draw_B.to(self.device)

    def between(self, least: float, most: float) -> Tensor:
        """(B,) in [least, most]; equal ends draw nothing."""
        if least == most:
            return torch.full((self.batch,), float(least), device=self.device)
        return least + (most - least) * self.uniform()

    def whole(self, least: int, most: int) -> Tensor:
        """(B,) whole numbers from least to most, int64."""
        return self.between(least, most + 1 if most > least else most).floor().long().clamp(least, most)


Region = Callable[[language.Base, Sample, str, Draws], Tensor]
"""(condition, sample, modality, draws) -> bool (B or 1, F, S)."""


def _whole_frames(geometry: Geometry, frame_BF: Tensor) -> Tensor:
    return frame_BF[..., None].expand(-1, -1, geometry.cells)


def _first_frame(c: language.FirstFrame, sample: Sample, modality: str, draws: Draws) -> Tensor:
    geometry = sample.tracks[modality]
    index_F = torch.arange(geometry.grid[0], device=geometry.device)
    return _whole_frames(geometry, (index_F == 0)[None])


def _last_frame(c: language.LastFrame, sample: Sample, modality: str, draws: Draws) -> Tensor:
    geometry = sample.tracks[modality]
    index_F = torch.arange(geometry.grid[0], device=geometry.device)
    return _whole_frames(geometry, (index_F == geometry.grid[0] - 1)[None])


def _keyframes(c: language.Keyframes, sample: Sample, modality: str, draws: Draws) -> Tensor:
    geometry = sample.tracks[modality]
    if c.times:
        found = [frame_at(geometry, t) for t in c.times]
        if draws.generator is None:
            late = [t for t, frame_BF in zip(c.times, found, strict=True) if not bool(frame_BF.any())]
            if late:
                raise UserError(
                    f"keyframes: {late[0]:g} s is not before the clip's end: take an earlier time"
                )
        return _whole_frames(geometry, torch.stack(found).any(dim=0))
    frames = geometry.grid[0]
    least, most = c.count if isinstance(c.count, tuple) else (c.count, c.count)
    count_B = draws.whole(min(least, frames), min(most, frames))
    # The frames with the lowest numbers out of F draws: any set of that size is as likely as any other.
    score_BF = torch.stack([draws.uniform() for _ in range(frames)], dim=1)
    rank_BF = score_BF.argsort(dim=1).argsort(dim=1)
    return _whole_frames(geometry, rank_BF < count_B[:, None])


def frame_at(geometry: Geometry, seconds: float) -> Tensor:
    """bool (B or 1, F): the token frame that is on at this time; none after the end."""
    span_BF2 = _spans(geometry)
    return (span_BF2[..., 0] <= seconds + SLACK) & (seconds + SLACK < span_BF2[..., 1])


def _length(c: language.Prefix | language.Suffix, sample: Sample, draws: Draws) -> Tensor:
    """Seconds, (B,).

    Raises:
        UserError: a request's is longer than the clip.
    """
    end_B = _spans(sample.main)[..., 1].amax(dim=1)
    if c.seconds is not None:
        least, most = c.seconds if isinstance(c.seconds, tuple) else (c.seconds, c.seconds)
        length_B, said = draws.between(least, most), f"{most:g} seconds"
    elif c.frames is not None:
        low, high = c.frames if isinstance(c.frames, tuple) else (c.frames, c.frames)
        length_B, said = draws.whole(low, high) / _fps(sample), f"{high} frames"
    else:
        return draws.between(0.0, 1.0) * end_B
    if draws.generator is None and bool((length_B > end_B + SLACK).any()):
        raise UserError(f"{c.type}: {said} are more than the clip has ({float(end_B.max()):g} s): give less")
    return length_B


def _prefix(c: language.Prefix, sample: Sample, modality: str, draws: Draws) -> Tensor:
    geometry = sample.tracks[modality]
    length_B1 = _length(c, sample, draws)[:, None]
    return _whole_frames(geometry, _spans(geometry)[..., 1] <= length_B1 + SLACK)


def _suffix(c: language.Suffix, sample: Sample, modality: str, draws: Draws) -> Tensor:
    geometry = sample.tracks[modality]
    span_BF2 = _spans(geometry)
    begin_B1 = span_BF2[:, -1:, 1] - _length(c, sample, draws)[:, None]
    return _whole_frames(geometry, span_BF2[..., 0] >= begin_B1 - SLACK)


def _spatial_crop(c: language.SpatialCrop, sample: Sample, modality: str, draws: Draws) -> Tensor:
    geometry = sample.tracks[modality]
    _, rows, columns = geometry.grid
    down, right = geometry.pixels_per_cell
    if c.region is not None:
        top, left, bottom, bound = c.region
        if draws.generator is None:  # while training, buckets may differ in size
            _inside(c.region, rows * down, columns * right)
        row_R = torch.arange(rows, device=geometry.device)
        column_C = torch.arange(columns, device=geometry.device)
        row_ok = (row_R * down >= top) & ((row_R + 1) * down <= bottom)
        column_ok = (column_C * right >= left) & ((column_C + 1) * right <= bound)
        cells = (row_ok[:, None] & column_ok[None]).flatten()
        return cells[None, None].expand(1, geometry.grid[0], -1)
    inside_BS = _box(geometry, c.area, draws, all_of_it=False)
    return inside_BS[:, None].expand(-1, geometry.grid[0], -1)


def _mask(c: language.Mask, sample: Sample, modality: str, draws: Draws) -> Tensor:
    geometry = sample.tracks[modality]
    if c.masks == "data" or draws.generator is None:
        if modality not in sample.masks:
            if draws.generator is None:
                raise UserError("mask: a request brings the mask itself: give its source one")
            raise UserError(
                "a mask condition finds no masks in the data: name them in the manifest and cache them "
                "(masks.enabled), or set masks: drawn"
            )
        return sample.masks[modality]
    frames = geometry.grid[0]
    length_B = (draws.between(*c.duration) * frames).round().clamp(1, frames)
    begin_B = (draws.uniform() * (frames - length_B + 1)).floor()
    index_F = torch.arange(frames, device=geometry.device)
    when_BF = (index_F >= begin_B[:, None]) & (index_F < (begin_B + length_B)[:, None])
    if geometry.cells == 1:
        return ~when_BF[..., None]
    return ~(when_BF[..., None] & _box(geometry, c.area, draws)[:, None])


def _box(geometry: Geometry, area: tuple[float, float], draws: Draws, *, all_of_it: bool = True) -> Tensor:
    """(B, S): a rectangle of about that part of the frame, anywhere; at least one cell.

    Args:
        all_of_it: whether it may be the whole frame.
    """
    _, rows, columns = geometry.grid
    area_B = draws.between(*area)
    # Its sides share the area unevenly, by up to a factor of two.
    tall_B = area_B.sqrt() * 2 ** draws.between(-0.5, 0.5)
    high_B = (tall_B * rows).round().clamp(1, rows)
    wide_B = (area_B / tall_B.clamp_min(1e-6) * columns).round().clamp(1, columns)
    if not all_of_it:
        whole_B = (high_B == rows) & (wide_B == columns)
        high_B = high_B - (whole_B & (rows >= columns) & (rows > 1)).float()
        wide_B = wide_B - (whole_B & (rows < columns)).float()
    sides = []
    for count, length_B in ((rows, high_B), (columns, wide_B)):
        begin_B = (draws.uniform() * (count - length_B + 1)).floor()
        index = torch.arange(count, device=geometry.device)
        sides.append((index >= begin_B[:, None]) & (index < (begin_B + length_B)[:, None]))
    return (sides[0][:, :, None] & sides[1][:, None]).flatten(1)


def _scene(c: language.Scene, sample: Sample, modality: str, draws: Draws) -> Tensor:
    geometry = sample.tracks[modality]
    scene_BF = geometry.scene_BF
    count_B = scene_BF.amax(dim=1) + 1
    if isinstance(c.scenes, tuple):
        wanted = torch.tensor(c.scenes, device=geometry.device)
        return _whole_frames(geometry, (scene_BF[..., None] == wanted).any(dim=-1))
    if c.scenes == "all_but_last":
        return _whole_frames(geometry, scene_BF < count_B[:, None] - 1)
    if c.scenes == "all_but_one":
        left_out_B = (draws.uniform() * count_B).floor().long()
        return _whole_frames(geometry, scene_BF != left_out_B[:, None])
    # Any subset but all of them: the scene with the highest number is always made.
    score_BZ = torch.stack([draws.uniform() for _ in range(geometry.scenes)], dim=1)
    exists_BZ = torch.arange(geometry.scenes, device=geometry.device) < count_B[:, None]
    best_B1 = score_BZ.masked_fill(~exists_BZ, -1.0).argmax(dim=1, keepdim=True)
    given_BZ = (score_BZ < draws.uniform()[:, None]).scatter(1, best_B1, False)
    return _whole_frames(geometry, given_BZ.gather(1, scene_BF.expand(len(given_BZ), -1)))


def _whole(c: language.Whole, sample: Sample, modality: str, draws: Draws) -> Tensor:
    geometry = sample.tracks[modality]
    return torch.ones(1, geometry.grid[0], geometry.cells, dtype=torch.bool, device=geometry.device)


REGIONS: dict[str, Callable[..., Tensor]] = {
    "first_frame": _first_frame,
    "last_frame": _last_frame,
    "keyframes": _keyframes,
    "prefix": _prefix,
    "suffix": _suffix,
    "spatial_crop": _spatial_crop,
    "mask": _mask,
    "scene": _scene,
    "modality": _whole,
}
"""What each type of condition gives; a reference gives nothing of the clip itself."""


def region(condition: language.Base, sample: Sample, modality: str, draws: Draws) -> Tensor:
    """bool (B or 1, F, S): the tokens of ``modality`` that a condition gives."""
    return REGIONS[condition.type](condition, sample, modality, draws)


@dataclass(frozen=True)
class Conditions:
    """A list of conditions. ``choose`` "any": each is drawn by itself, and what several give is joined;
    "one": at most one of them per sample, their probabilities being shares."""

    all: tuple[language.Base, ...] = ()
    choose: Literal["any", "one"] = "any"

    def draw(self, sample: Sample, generator: torch.Generator) -> Given:
        """Training: what of each sample is given, by the conditions' own probabilities.

        Which kinds of giving there may be depends on the list alone, so that shapes do not change from step
        to step.
        """
        draws = Draws(generator, sample.batch, sample.main.device)
        return _free_what_is_whole(sample, self._given(sample, draws, self._taken(draws)))

    def fixed(self, sample: Sample) -> Given:
        """A request: all of them hold, and nothing is drawn.

        Raises:
            UserError: a condition leaves its length, times or region open, gives nothing, or nothing is left
                to make.
        """
        draws = Draws(None, sample.batch, sample.main.device)
        for c in self.all:
            _speaks_of_something(c, sample, draws)
        given = self._given(sample, draws, [None] * len(self.all))
        if not bool(_left(sample, given).all()):
            raise UserError("the conditions give all of the clip, so nothing is left to make: give less")
        return given

    def without(self, name: str) -> Conditions:
        """The list less the conditions of one type, for guidance by them."""
        return replace(self, all=tuple(c for c in self.all if c.type != name))

    def _taken(self, draws: Draws) -> list[Tensor | None]:
        """Per condition, which samples have it, (B,); None: all."""
        if self.choose == "one":
            draw_B, begin, taken = draws.uniform(), 0.0, []
            for c in self.all:
                taken.append((draw_B >= begin) & (draw_B < begin + c.probability))
                begin += c.probability
            return list(taken)
        return [None if c.probability == 1.0 else draws.uniform() < c.probability for c in self.all]

    def _given(self, sample: Sample, draws: Draws, taken: Sequence[Tensor | None]) -> Given:
        parts: dict[str, list[tuple[Kind, Tensor]]] = {}
        beside: dict[str, list[Beside]] = {}
        for c, taken_B in zip(self.all, taken, strict=True):
            kind = Kind(c.strength, 1.0 - c.noise)
            for modality in _modalities(c, sample):
                if c.type == "reference":
                    self._stand_beside(beside.setdefault(modality, []), c, sample, taken_B, draws)
                    continue
                where_BFS = region(c, sample, modality, draws)
                if taken_B is not None:
                    where_BFS = where_BFS & taken_B[:, None, None]
                parts.setdefault(modality, []).append((kind, where_BFS.flatten(1)))
        marks = {modality: _join(found, draws) for modality, found in parts.items()}
        return Given(marks, {modality: tuple(found) for modality, found in beside.items()})

    def _stand_beside(
        self,
        found: list[Beside],
        c: language.Base,
        sample: Sample,
        taken_B: Tensor | None,
        draws: Draws,
    ) -> None:
        """A reference. One condition alone speaks of all that the sample has: a batch lists its references
        by their size."""
        alone = sum(other.type == c.type and other.modality == c.modality for other in self.all) == 1
        noise_B = _noise(c.noise, draws) if c.noise > 0 else None
        number = 0 if alone else len(found)
        found += [Beside(taken_B, noise_B, number)] * (len(sample.references[c.modality]) if alone else 1)


def _left(sample: Sample, given: Given) -> Tensor:
    """(B,): whether anything is left to make."""
    left_B = torch.zeros(sample.batch, dtype=torch.bool, device=sample.main.device)
    for modality, geometry in sample.tracks.items():
        marks = given.marks.get(modality)
        made_B = torch.ones_like(left_B) if marks is None else marks.made_BN.any(dim=1).expand(len(left_B))
        left_B = left_B | (made_B if geometry.present_B is None else made_B & geometry.present_B)
    return left_B


def _free_what_is_whole(sample: Sample, given: Given) -> Given:
    """Samples that would be given whole have nothing to teach: all of each is made instead, and told."""
    if not given.marks:
        return given
    left_B = _left(sample, given)
    # A sample without sound is not given its sound: it lacks it.
    some_B = torch.stack([(k.kind_BN > 0).any(dim=1).expand(len(left_B)) for k in given.marks.values()]).any(
        dim=0
    )
    marks = {
        m: replace(k, kind_BN=torch.where(left_B[:, None], k.kind_BN, 0)) for m, k in given.marks.items()
    }
    return replace(given, marks=marks, freed_B=~left_B & some_B)


def _speaks_of_something(c: language.Base, sample: Sample, draws: Draws) -> None:
    """Refuses, of a request, a condition that would give nothing."""
    modalities = _modalities(c, sample)
    if not modalities:
        what = "brings none" if c.modality in sample.tracks else f"is one of {' and '.join(sample.tracks)}"
        raise UserError(f"{c.type}: its modality is {c.modality}, and the request {what}: leave it out")
    if c.type == "reference":
        return
    for modality in modalities:
        if not bool(region(c, sample, modality, draws).any()):
            raise UserError(
                f"{c.type}: no token of the {modality} lies wholly in what it gives: give more of the clip"
            )


def _modalities(c: language.Base, sample: Sample) -> list[str]:
    """Those of the sample that a condition speaks of."""
    wanted: str = c.modality
    if c.type == "reference":
        return [wanted] if sample.references.get(wanted) else []
    return [m for m in sample.tracks if wanted in ("all", m)]


def _join(found: list[tuple[Kind, Tensor]], draws: Draws) -> Marks:
    """The union; where several overlap the strongest holds."""
    kinds = tuple(sorted({kind for kind, _ in found}))
    kind_BN = torch.zeros(1, found[0][1].shape[1], dtype=torch.long, device=draws.device)
    for kind, where_BN in found:
        kind_BN = torch.maximum(kind_BN, torch.where(where_BN, kinds.index(kind) + 1, 0))
    noise_BG = None
    if any(kind.noise > 0 for kind in kinds):
        noise_BG = torch.stack([_noise(kind.noise, draws) for kind in kinds], dim=1)
    return Marks(kinds, kind_BN, noise_BG)


def _noise(most: float, draws: Draws) -> Tensor:
    """(B,): up to ``most`` in training, ``most`` in a request."""
    if most == 0 or draws.generator is None:
        return torch.full((draws.batch,), most, device=draws.device)
    return draws.uniform() * most


def _spans(geometry: Geometry) -> Tensor:
    assert geometry.span_BF2 is not None, "conditions in time need to know when frames begin and end"
    return geometry.span_BF2


def _fps(sample: Sample) -> float:
    """Pixel frames per second."""
    assert sample.fps is not None, "lengths in frames need a frame rate"
    return sample.fps


def _inside(region_px: Sequence[int], height: float, width: float) -> None:
    top, left, bottom, right = region_px
    if not (top < bottom <= height and left < right <= width):
        raise UserError(
            f"spatial_crop: region {list(region_px)} is not [top, left, bottom, right] inside "
            f"{width:g}x{height:g} pixels"
        )
