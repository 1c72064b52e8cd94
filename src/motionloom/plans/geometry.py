"""Where tokens stand before any noise: the grid, the seconds and the shots of each modality.

Shapes: B batch, F token frames, S cells of a frame, N = F x S tokens. Sound is a grid of one cell: S = 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """What a batch of clips of one modality looks like, in token cells."""

    grid: tuple[int, int, int]
    """(F, rows, columns) of tokens."""
    seconds_BF: Tensor
    """Centre of each token frame in seconds, float32, (B or 1, F): where the network places it."""
    pixels_per_cell: tuple[float, float]
    """Pixels (down, right) that a token covers; 0, 0 for sound."""
    scene_BF: Tensor
    """Shot of each token frame, int64, (B or 1, F)."""
    batch: int
    begin: int = 0
    """Index of the first frame in its stream: cells count on from here."""
    first_BF: Tensor | None = None
    """True in the first frame of each scene; None: the scenes are whole, so it can be seen from them."""
    span_BF2: Tensor | None = None
    """Beginning and end of each token frame in seconds; None: not known, and no condition may ask."""
    scenes: int = 1
    """How many shots there may be: scene_BF counts from 0 to scenes - 1."""
    jump_BF: Tensor | None = None
    """Frames by which a token stands later than its cell says, see ``Stream.jump_BN``."""
    present_B: Tensor | None = None
    """False for samples that lack this modality. None: all have it."""

    @property
    def cells(self) -> int:
        """S: cells of a frame."""
        return self.grid[1] * self.grid[2]

    @property
    def tokens(self) -> int:
        """N."""
        return self.grid[0] * self.cells

    @property
    def device(self) -> torch.device:
        """Where the tensors of the batch are."""
        return self.seconds_BF.device

    def firsts(self) -> Tensor:
        """(B or 1, F): whether no earlier frame is of the frame's scene."""
        if self.first_BF is not None:
            return self.first_BF
        same_BFF = self.scene_BF[:, :, None] == self.scene_BF[:, None]
        return ~same_BFF.tril(-1).any(dim=2)

    def part(self, frames: slice) -> Geometry:
        """Of some of the frames alone, where they stand."""
        begin, end, _ = frames.indices(self.grid[0])
        return replace(
            self,
            grid=(end - begin, *self.grid[1:]),
            seconds_BF=self.seconds_BF[:, frames],
            scene_BF=self.scene_BF[:, frames],
            begin=self.begin + begin,
            first_BF=self.firsts()[:, frames],
            span_BF2=None if self.span_BF2 is None else self.span_BF2[:, frames],
            jump_BF=None if self.jump_BF is None else self.jump_BF[:, frames],
        )

    def per_token(self, t_BF: Tensor) -> Tensor:
        """A fact of frames (B, F, ...) -> of tokens (B, N, ...)."""
        return t_BF.repeat_interleave(self.cells, dim=1)


@dataclass(frozen=True)
class Sample:
    """A batch of samples, before any noise: what is made or given, and what stands beside it."""

    tracks: Mapping[str, Geometry]
    """By modality."""
    references: Mapping[str, tuple[Geometry, ...]] = field(default_factory=dict)
    """By modality: clips that are only looked at."""
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    """By modality: bool (B or 1, F, S), True where the data, or a request, says that a token is given."""
    fps: float | None = None
    """Pixel frames per second, for lengths that are said in frames."""

    @property
    def main(self) -> Geometry:
        """The geometry of the video, or of the sound where there is no video."""
        return self.tracks["video"] if "video" in self.tracks else self.tracks["audio"]

    @property
    def batch(self) -> int:
        """How many samples."""
        return self.main.batch

    def part(self, frames: Mapping[str, slice]) -> Sample:
        """Of some frames of each modality alone; references stay whole, masks are cut."""
        return replace(
            self,
            tracks={m: geometry.part(frames[m]) for m, geometry in self.tracks.items()},
            masks={m: mask[:, frames[m]] for m, mask in self.masks.items()},
        )


def token_geometry(
    latent_grid: tuple[int, int, int],
    patch: tuple[int, int, int],
    seconds_BF: Tensor,
    scene_BF: Tensor,
    pixels_per_latent: int,
    batch: int,
    *,
    span_BF2: Tensor | None = None,
    scenes: int = 1,
    present_B: Tensor | None = None,
) -> Geometry:
    """The geometry of clips with latents (frames, rows, columns) under a backbone that takes ``patch`` per
    token.

    A token stands in the middle of its latent frames' times; a token that straddles a cut belongs to the shot
    that it begins in.
    """
    assert all(n % p == 0 for n, p in zip(latent_grid, patch, strict=True)), f"{latent_grid} by patch {patch}"
    frames, rows, columns = (n // p for n, p in zip(latent_grid, patch, strict=True))
    if span_BF2 is not None:
        groups = span_BF2.unflatten(1, (frames, patch[0]))
        span_BF2 = torch.stack([groups[:, :, 0, 0], groups[:, :, -1, 1]], dim=-1)
    return Geometry(
        grid=(frames, rows, columns),
        seconds_BF=seconds_BF.unflatten(1, (frames, patch[0])).mean(dim=2),
        pixels_per_cell=(float(pixels_per_latent * patch[1]), float(pixels_per_latent * patch[2])),
        scene_BF=scene_BF[:, :: patch[0]],
        batch=batch,
        span_BF2=span_BF2,
        scenes=scenes,
        present_B=present_B,
    )


def frame_seconds(geometry: Geometry) -> Tensor:
    """Length of a usual token frame in seconds, (B or 1,): the longest's, since those that open a shot may
    stand alone."""
    assert geometry.span_BF2 is not None
    return geometry.span_BF2.diff(dim=-1)[..., 0].amax(dim=1)


def beside(target: Geometry, reference: Geometry) -> Geometry:
    """A reference brought to the target's place: positions rescaled so that both cover the same frame.

    Pixels of a reference that is smaller count for more, which is IC-LoRA's rescaling. In time a reference
    stands at its own seconds; where its first frame stands alone and lasts longer than the target's (every
    T-th frame was kept) it is moved back by the difference, never before 0, so that the ends meet.
    """
    scale = [
        t * n / m for t, n, m in zip(target.pixels_per_cell, target.grid[1:], reference.grid[1:], strict=True)
    ]
    seconds_BF = reference.seconds_BF
    if target.span_BF2 is not None and reference.span_BF2 is not None:
        late_B1 = _late(reference, target)
        # By how much, since a plan may have set the scenes apart already.
        moved_BF2 = (reference.span_BF2 - late_B1[..., None]).clamp_min(0) - reference.span_BF2
        seconds_BF = torch.where(late_B1 == 0, seconds_BF, seconds_BF + moved_BF2.mean(dim=-1))
    return replace(reference, pixels_per_cell=(scale[0], scale[1]), seconds_BF=seconds_BF)


def _late(reference: Geometry, target: Geometry) -> Tensor:
    """(B or 1, 1): by how much a reference's first frame, standing alone, outlasts the target's."""
    assert reference.span_BF2 is not None
    assert target.span_BF2 is not None
    lengths_BF, target_B1 = reference.span_BF2.diff(dim=-1)[..., 0], target.span_BF2.diff(dim=-1)[:, :1, 0]
    alone_B1 = lengths_BF[:, :1] < lengths_BF[:, -1:]
    return torch.where(alone_B1, lengths_BF[:, :1] - target_B1, 0.0)
