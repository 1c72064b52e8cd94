"""From latents to streams and back: the one place where noise, given tokens and token order meet.

Trainer, sampler and streaming engine call the same functions on the same layout, so they cannot drift apart.

Shapes: B batch, F token frames of the clip, T token frames in the sequence, S cells of a frame, N tokens of
a stream, R tokens of references, C channels of a token, K noise levels, L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from motionloom.plans.geometry import Geometry
from motionloom.plans.layout import Layout, Text, Track
from motionloom.plans.stream import Stream, Streams

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(clean, noise, sigma) -> noisy, for instance ``flow.linear.mix``."""
ByModality = Mapping[str, Tensor]
"""Tokens (B, F, S, C) of each modality."""


@dataclass(frozen=True)
class Values:
    """Clean tokens of a batch; anything where nothing is given, when a sampler asks."""

    clean: ByModality
    """(B, F, S, C) by modality."""
    references: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    """(B, F, S, C) of each reference, by modality."""

    def part(self, frames: Mapping[str, slice]) -> Values:
        """Of some frames of each modality."""
        return Values({m: x[:, frames[m]] for m, x in self.clean.items()}, self.references)


def to_streams(
    layout: Layout, values: Values, noise: ByModality, sigma: ByModality, text: Text, mix: Mix
) -> Streams:
    """Training: tokens at the noise of their level.

    Given tokens enter bit-identical: they are copied, never computed.

    Args:
        noise: standard normal, shaped like ``values.clean``.
        sigma: the K noise levels of each modality, (B, K).
    """
    x = {
        m: mix(values.clean[m], noise[m], clip_sigma(track, sigma[m], values.clean[m]))
        for m, track in layout.tracks.items()
    }
    return to_streams_at(layout, values, x, noise, sigma, text, mix)


def to_streams_at(
    layout: Layout, values: Values, x: ByModality, noise: ByModality, sigma: ByModality, text: Text, mix: Mix
) -> Streams:
    """Sampling: made tokens at the solver's present ``x``, given ones as given.

    Args:
        noise: what given tokens are mixed with where they are shown at a noise level; else unread.
    """
    streams = {m: _stream(m, layout, values, x[m], noise[m], sigma[m], mix) for m in layout.tracks}
    main = streams[layout.main]
    return {"text": _words(layout, text, main), **streams}


def read_clip(layout: Layout, modality: str, out_BNC: Tensor) -> Tensor:
    """A backbone's answer for a stream -> for the clip, (B, F, S, C); references and context are left out."""
    geometry = layout.tracks[modality].geometry
    clip_BNC = out_BNC[:, out_BNC.shape[1] - geometry.tokens :]
    return clip_BNC.unflatten(1, (geometry.grid[0], geometry.cells))


def speed(layout: Layout, modality: str) -> Tensor:
    """How much of a solver's step each token takes, (B or 1, F, S, 1): 1 made, 0 given, between: a hint.

    A hint walks from (1 - strength) of the noise, so its state moves by that part of its velocity.
    """
    track = layout.tracks[modality]
    grid = track.geometry.grid[0], track.geometry.cells
    return track.speed_BN.unflatten(1, grid)[..., None]


def keep_given(layout: Layout, modality: str, clean_BFSC: Tensor, x_BFSC: Tensor) -> Tensor:
    """Put what is given back after a solver step, bit-identical."""
    if layout.tracks[modality].all_made:
        return x_BFSC
    return torch.where(speed(layout, modality) == 0, clean_BFSC, x_BFSC)


def start(layout: Layout, modality: str, clean_BFSC: Tensor, noise_BFSC: Tensor, mix: Mix) -> Tensor:
    """Where a solver begins: noise, and for hints what partial noise leaves of them."""
    if layout.tracks[modality].all_made:
        return noise_BFSC
    share = speed(layout, modality)
    hint = (share > 0) & (share < 1)
    return torch.where(hint, mix(clean_BFSC, noise_BFSC, share[..., 0]), noise_BFSC)


def clip_sigma(track: Track, sigma_BK: Tensor, like_BFSC: Tensor) -> Tensor:
    """(B, F, S): the noise level of each token of the clip, to mix with."""
    level_BN = track.target(track.level_BN).expand(len(sigma_BK), -1)
    return sigma_BK.gather(1, level_BN).unflatten(1, like_BFSC.shape[1:3])


def as_shown(x_BFSC: Tensor, noise_BFSC: Tensor, sigma_B: Tensor | None, mix: Mix) -> Tensor:
    """A reference as the network is to see it: clean to the bit where sigma is 0."""
    if sigma_B is None:
        return x_BFSC
    sigma_BFS = sigma_B[:, None, None].expand(-1, *x_BFSC.shape[1:3])
    return torch.where(sigma_BFS[..., None] > 0, mix(x_BFSC, noise_BFSC, sigma_BFS), x_BFSC)


def _stream(
    modality: str,
    layout: Layout,
    values: Values,
    x_BFSC: Tensor,
    noise_BFSC: Tensor,
    sigma_BK: Tensor,
    mix: Mix,
) -> Stream:
    """[references | context copies | the clip]."""
    track, clean_BFSC = layout.tracks[modality], values.clean[modality]
    if track.fixed_BK is None:
        shown_BFSC = clean_BFSC
    else:
        sigma_BFS = clip_sigma(track, sigma_BK, clean_BFSC)
        shown_BFSC = torch.where(sigma_BFS[..., None] > 0, mix(clean_BFSC, noise_BFSC, sigma_BFS), clean_BFSC)
    tokens = [keep_given(layout, modality, shown_BFSC, x_BFSC).flatten(1, 2)]
    facts = [_clip_facts(track)]
    if len(track.context_T) > clean_BFSC.shape[1]:
        tokens.insert(0, keep_given(layout, modality, shown_BFSC, clean_BFSC).flatten(1, 2))
    for i in reversed(range(len(track.references))):
        tokens.insert(0, values.references[modality][i].flatten(1, 2))
        facts.insert(0, _reference_facts(track, i))
    length = sum(part.shape[1] for part in tokens)
    cells = track.geometry.grid[1:]
    gridded = all(reference.grid[1:] == cells for reference in track.references)
    return Stream(
        modality=modality,
        grid=(length // track.geometry.cells, *cells) if gridded else (1, 1, length),
        x_BNC=_end_to_end(tokens),
        sigma_BK=sigma_BK,
        **{name: _end_to_end([part[name] for part in facts]) for name in facts[0]},
        **_optional(facts, track),
    )


_Facts = dict[str, Tensor]
"""What is known of each token besides its value, by the names of ``Stream``'s fields."""


def _clip_facts(track: Track) -> _Facts:
    """Of the clip, and of its copies as context in front; worked out once."""
    if not track.facts:
        track.facts.update(_new_clip_facts(track))
    return track.facts


def _new_clip_facts(track: Track) -> _Facts:
    geometry = track.geometry
    context_BN = geometry.per_token(track.context_T[None])
    given_BN = track.speed_BN == 0
    copies_BN = torch.ones_like(given_BN[:, :1]).expand(-1, context_BN.shape[1] - given_BN.shape[1])
    silent_BN = torch.cat([copies_BN, given_BN], dim=1)
    if geometry.present_B is not None:
        silent_BN = silent_BN | ~geometry.present_B[:, None]
    return {
        "level_BN": track.level_BN,
        "position_BN3": _positions(geometry, geometry.seconds_BF[:, track.frame_T]),
        "cell_BN3": _cells(geometry, track.frame_T + geometry.begin),
        "scene_BN": geometry.per_token(geometry.scene_BF[:, track.frame_T]),
        "chunk_BN": geometry.per_token(track.chunk_T[None]),
        "context_BN": context_BN,
        "loss_BN": (~silent_BN).float(),
        "first_BN": geometry.per_token(geometry.firsts()[:, track.frame_T]),
    }


def _reference_facts(track: Track, index: int) -> _Facts:
    """Of a reference: in a scene and a chunk of its own, before all others, always seen."""
    reference, target = track.references[index], track.geometry
    frames = torch.arange(reference.grid[0], device=target.device)
    nothing_1N = torch.zeros(1, reference.tokens, dtype=torch.long, device=target.device)
    return {
        "level_BN": nothing_1N + track.reference_levels[index],
        "position_BN3": _positions(reference, reference.seconds_BF),
        "cell_BN3": _cells_beside(reference, target, frames),
        "scene_BN": nothing_1N + target.scenes + track.reference_numbers[index],
        "chunk_BN": nothing_1N - 1,
        "context_BN": nothing_1N == 0,
        "loss_BN": nothing_1N.float(),
        "first_BN": reference.per_token((frames == 0)[None]),
    }


def _optional(facts: list[_Facts], track: Track) -> _Facts:
    """Fields that most streams do without: what is missing, and what stands later than its cell says."""
    pieces = [*track.references, track.geometry]
    lengths = [part["chunk_BN"].shape[1] for part in facts]
    found: _Facts = {}
    if any(piece.present_B is not None for piece in pieces):
        found["valid_BN"] = _end_to_end(
            [_present(piece).expand(-1, length) for piece, length in zip(pieces, lengths, strict=True)]
        )
    jump_BF = track.geometry.jump_BF
    if jump_BF is not None:
        jumps = [_jump(reference) for reference in track.references]
        found["jump_BN"] = _end_to_end([*jumps, track.geometry.per_token(jump_BF[:, track.frame_T])])
    return found


def _jump(reference: Geometry) -> Tensor:
    """(B or 1, R) float32."""
    if reference.jump_BF is None:
        return torch.zeros(1, reference.tokens, device=reference.device)
    return reference.per_token(reference.jump_BF)


def _present(geometry: Geometry) -> Tensor:
    """(B or 1, 1) bool."""
    if geometry.present_B is None:
        return torch.ones(1, 1, dtype=torch.bool, device=geometry.device)
    return geometry.present_B[:, None]


def _end_to_end(parts: list[Tensor]) -> Tensor:
    """(B or 1, n, ...) each -> one along n."""
    if len(parts) == 1:
        return parts[0]
    batch = max(len(part) for part in parts)
    return torch.cat([part.expand(batch, *part.shape[1:]) for part in parts], dim=1)


def _words(layout: Layout, text: Text, main: Stream) -> Stream:
    length, device = text.x_BLC.shape[1], text.x_BLC.device
    nothing_1L = torch.zeros(1, length, dtype=torch.long, device=device)
    own_level = layout.text_level_BL is None
    return Stream(
        modality="text",
        grid=(1, 1, length),
        x_BNC=text.x_BLC,
        sigma_BK=torch.zeros_like(main.sigma_BK[:, :1]) if own_level else main.sigma_BK,
        level_BN=nothing_1L if layout.text_level_BL is None else layout.text_level_BL,
        position_BN3=torch.zeros(1, length, 3, device=device),
        cell_BN3=torch.zeros(1, length, 3, dtype=torch.long, device=device),
        scene_BN=text.scene_BL,
        chunk_BN=nothing_1L,
        context_BN=nothing_1L.bool() if text.context_BL is None else text.context_BL,
        loss_BN=nothing_1L.float(),
        valid_BN=text.valid_BL,
    )


def _positions(geometry: Geometry, seconds_BT: Tensor) -> Tensor:
    """(B or 1, N, 3): seconds, pixels down, pixels right of each token's centre."""
    _, rows, columns = geometry.grid
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


def _cells(geometry: Geometry, frame_T: Tensor) -> Tensor:
    """(1, N, 3): (frame, row, column) of the clip that each token shows."""
    _, rows, columns = geometry.grid
    device = frame_T.device
    places = (frame_T, torch.arange(rows, device=device), torch.arange(columns, device=device))
    return torch.cartesian_prod(*places).view(1, -1, 3)


def _cells_beside(reference: Geometry, target: Geometry, frame_R: Tensor) -> Tensor:
    """(1, R, 3): the target's cells where a reference's tokens begin, for backbones that read indices."""
    cell_1R3 = _cells(reference, frame_R)
    scale = [t / r for t, r in zip(target.grid[1:], reference.grid[1:], strict=True)]
    at_R = frame_R
    if target.span_BF2 is not None and reference.span_BF2 is not None:
        begins_F, begins_R = target.span_BF2[0, :, 0].contiguous(), reference.span_BF2[0, :, 0].contiguous()
        at_R = torch.searchsorted(begins_F, begins_R + 1e-4) - 1
    frames_1R = at_R.repeat_interleave(reference.cells)[None]
    rows, columns = ((cell_1R3[..., i + 1] * scale[i]).long() for i in (0, 1))
    return torch.stack([frames_1R, rows, columns], dim=-1)
