"""From latents to streams and back: the one place where noise, given tokens and token order meet.

A plan answers two questions and nothing else: which frames are given (`draw_given`, in training), and how the
tokens are laid out (`layout`). Trainer, sampler and streaming engine then call the same three functions here:
`to_streams`, `read_video`, `keep_given`.

Shapes: B batch, F token frames of the clip, T token frames in the sequence (F, or more when a plan repeats
frames as context), N = T x rows x columns tokens, C channels of a token, K noise levels, L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from motionloom.plans.stream import Stream, Streams
from motionloom.plans.visibility import Visibility

CLEAN = -1
"""In ``Layout.draws``: this level is always sigma = 0."""


@dataclass(frozen=True)
class Geometry:
    """What a batch of clips looks like before any noise, in token cells."""

    grid: tuple[int, int, int]
    """(F, rows, columns) of tokens."""
    seconds_BF: Tensor
    """Centre of each token frame in seconds, float32, (B or 1, F)."""
    pixels_per_cell: tuple[float, float]
    """Pixels (down, right) that a token covers."""
    scene_BF: Tensor
    """Shot of each token frame, int64, (B or 1, F)."""
    batch: int
    begin: int = 0
    """Index of the first frame in its stream: cells count on from here."""
    first_BF: Tensor | None = None
    """True in the first frame of each scene; None: the scenes are whole, so it can be seen from them."""

    def part(self, frames: slice) -> Geometry:
        """Of some of the frames alone, where they stand."""
        begin, end, _ = frames.indices(self.grid[0])
        first_BF = self.first_BF
        if first_BF is None:
            same_BFF = self.scene_BF[:, :, None] == self.scene_BF[:, None]
            first_BF = ~same_BFF.tril(-1).any(dim=2)
        return replace(
            self,
            grid=(end - begin, *self.grid[1:]),
            seconds_BF=self.seconds_BF[:, frames],
            scene_BF=self.scene_BF[:, frames],
            begin=self.begin + begin,
            first_BF=first_BF[:, frames],
        )

    @property
    def device(self) -> torch.device:
        """Where the tensors of the batch are."""
        return self.seconds_BF.device


@dataclass(frozen=True)
class Text:
    """Encoded captions of a batch; one caption per scene, laid end to end."""

    x_BLC: Tensor
    valid_BL: Tensor
    scene_BL: Tensor


@dataclass(frozen=True)
class Layout:
    """Where every token stands. Built by a plan; values and noise come later."""

    geometry: Geometry
    visibility: Visibility
    draws: tuple[int, ...]
    """For each of the K levels: ``CLEAN``, or the index of the independent draw of sigma it takes."""
    frame_T: Tensor
    """Frame of the clip that each frame of the sequence shows."""
    context_T: Tensor
    """True for frames repeated as context."""
    given_BT: Tensor
    """True where the clean latents go in and nothing is learned."""
    level_BT: Tensor
    chunk_T: Tensor
    text_level_BL: Tensor | None
    """Noise level that modulates each text token. None: text has a level of its own, which is clean."""

    @property
    def num_draws(self) -> int:
        """How many independent noise levels a sample needs."""
        return max(self.draws) + 1

    def levels(self, sigma_BD: Tensor) -> Tensor:
        """Independent draws (B, D) -> the K levels (B, K), with 0 at the clean ones."""
        clean = torch.zeros_like(sigma_BD[:, 0])
        return torch.stack([clean if d == CLEAN else sigma_BD[:, d] for d in self.draws], dim=1)


class Plan(Protocol):
    """What each token is."""

    @property
    def knows_given(self) -> bool:
        """Whether frames may be given. A plan that does not know them ignores ``given_BF``."""
        ...

    def draw_given(self, geometry: Geometry, generator: torch.Generator) -> Tensor:
        """Training: which frames are given, (B, F) bool, by this plan's own probabilities."""
        ...

    def stages(self, geometry: Geometry) -> list[slice]:
        """Generation: which frames are made together, in order; what is made is given to the next stage."""
        ...

    def layout(self, geometry: Geometry, text: Text, given_BF: Tensor) -> Layout:
        """Where every token stands when the frames ``given_BF`` are given."""
        ...


@runtime_checkable
class StreamedPlan(Plan, Protocol):
    """A plan whose stages can be made one at a time, their past in a cache (``nn.cache.KVCache``)."""

    @property
    def window(self) -> int | None:
        """How many stages are visible, the present one included; None: all."""
        ...

    @property
    def sinks(self) -> int:
        """How many of the first stages stay visible."""
        ...

    def stage_layout(self, geometry: Geometry, given_BF: Tensor | None) -> Layout:
        """Where the tokens of one stage stand; its past, and no more than it may see, comes from a cache.

        Args:
            geometry: the stage's part of the clip's.
            given_BF: which of the stage's frames are given; None: none of them, so all share one noise level.
        """
        ...


Mix = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(clean, noise, sigma) -> noisy, for instance ``flow.linear.mix``."""


def to_streams(
    layout: Layout, clean_BFSC: Tensor, noise_BFSC: Tensor, sigma_BK: Tensor, text: Text, mix: Mix
) -> Streams:
    """Training: tokens at the noise of their level. ``S`` = rows x columns cells of a frame.

    Given tokens enter bit-identical: they are copied, never computed.
    """
    clean_BTSC = clean_BFSC[:, layout.frame_T]
    sigma_BT = sigma_BK.gather(1, layout.level_BT.expand(sigma_BK.shape[0], -1))
    noisy_BTSC = mix(clean_BTSC, noise_BFSC[:, layout.frame_T], sigma_BT[..., None, None])
    return _streams(layout, torch.where(_clean_BT11(layout), clean_BTSC, noisy_BTSC), sigma_BK, text)


def to_streams_at(
    layout: Layout, clean_BFSC: Tensor, x_BFSC: Tensor, sigma_BK: Tensor, text: Text
) -> Streams:
    """Sampling: tokens at the solver's present ``x``, given tokens exactly as given."""
    x_BTSC = torch.where(_clean_BT11(layout), clean_BFSC[:, layout.frame_T], x_BFSC[:, layout.frame_T])
    return _streams(layout, x_BTSC, sigma_BK, text)


def read_video(layout: Layout, out_BNC: Tensor) -> Tensor:
    """A backbone's answer for the sequence -> for the clip, (B, F, S, C); context copies are left out."""
    frames = layout.frame_T.shape[0]
    out_BTSC = out_BNC.unflatten(1, (frames, -1))
    clip_frames = layout.geometry.grid[0]
    # Context always stands before the frames it serves, so the clip is the tail.
    return out_BTSC[:, frames - clip_frames :]


def keep_given(layout: Layout, clean_BFSC: Tensor, x_BFSC: Tensor) -> Tensor:
    """Put the given frames back after a solver step, bit-identical."""
    clip_frames = layout.geometry.grid[0]
    given_BF = layout.given_BT[:, layout.frame_T.shape[0] - clip_frames :]
    return torch.where(given_BF[..., None, None], clean_BFSC, x_BFSC)


def _clean_BT11(layout: Layout) -> Tensor:
    return (layout.given_BT | layout.context_T)[..., None, None]


def _streams(layout: Layout, x_BTSC: Tensor, sigma_BK: Tensor, text: Text) -> Streams:
    geometry = layout.geometry
    frames, cells = x_BTSC.shape[1], x_BTSC.shape[2]

    def per_token(t_BT: Tensor) -> Tensor:
        return t_BT.repeat_interleave(cells, dim=1)

    silent = layout.given_BT | layout.context_T
    video = Stream(
        modality="video",
        grid=(frames, *geometry.grid[1:]),
        x_BNC=x_BTSC.flatten(1, 2),
        sigma_BK=sigma_BK,
        level_BN=per_token(layout.level_BT),
        position_BN3=_positions(layout),
        cell_BN3=_cells(layout),
        scene_BN=per_token(geometry.scene_BF[:, layout.frame_T]),
        chunk_BN=per_token(layout.chunk_T[None]),
        context_BN=per_token(layout.context_T[None]),
        loss_BN=per_token((~silent).float()),
        first_BN=None if geometry.first_BF is None else per_token(geometry.first_BF[:, layout.frame_T]),
    )
    length = text.x_BLC.shape[1]
    nothing_1L = torch.zeros(1, length, dtype=torch.long, device=x_BTSC.device)
    own_level = layout.text_level_BL is None
    words = Stream(
        modality="text",
        grid=(1, 1, length),
        x_BNC=text.x_BLC,
        sigma_BK=torch.zeros_like(sigma_BK[:, :1]) if own_level else sigma_BK,
        level_BN=nothing_1L if layout.text_level_BL is None else layout.text_level_BL,
        position_BN3=torch.zeros(1, length, 3, device=x_BTSC.device),
        cell_BN3=torch.zeros(1, length, 3, dtype=torch.long, device=x_BTSC.device),
        scene_BN=text.scene_BL,
        chunk_BN=nothing_1L,
        context_BN=nothing_1L.bool(),
        loss_BN=nothing_1L.float(),
        valid_BN=text.valid_BL,
    )
    return {"text": words, "video": video}


def _positions(layout: Layout) -> Tensor:
    """(B or 1, N, 3): seconds, pixels down, pixels right of each token's centre."""
    geometry = layout.geometry
    _, rows, columns = geometry.grid
    seconds_BT = geometry.seconds_BF[:, layout.frame_T]
    batch, frames = seconds_BT.shape
    down = (torch.arange(rows, device=geometry.device) + 0.5) * geometry.pixels_per_cell[0]
    right = (torch.arange(columns, device=geometry.device) + 0.5) * geometry.pixels_per_cell[1]
    shape = (batch, frames, rows, columns)
    position = torch.stack(
        [
            seconds_BT[:, :, None, None].expand(shape),
            down[None, None, :, None].expand(shape),
            right[None, None, None, :].expand(shape),
        ],
        dim=-1,
    )
    return position.flatten(1, 3).float()


def _cells(layout: Layout) -> Tensor:
    """(1, N, 3): (frame, row, column) of the clip that each token shows."""
    _, rows, columns = layout.geometry.grid
    device = layout.frame_T.device
    frame_T = layout.frame_T + layout.geometry.begin
    places = (frame_T, torch.arange(rows, device=device), torch.arange(columns, device=device))
    return torch.cartesian_prod(*places).view(1, -1, 3)
