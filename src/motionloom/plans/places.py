"""Where the scenes of a clip stand in time, for plans that set them apart.

Shapes: B batch, F token frames, N tokens of a modality, Z scenes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from motionloom.plans.geometry import Geometry, Sample, frame_seconds

Positions = Literal["continuous", "reset", "jump", "gap"]
"""The next scene goes on (Mask2DiT), begins at 0 again, or stands later at every cut: by token frames
(MultiShotMaster, arXiv 2512.03041) or by seconds."""


def place(sample: Sample, positions: Positions, jump: float, gap: float) -> Sample:
    """Every modality moved alike, so that sound and references stay with their picture.

    Args:
        jump: token frames of the main modality that each cut adds.
        gap: seconds likewise.
    """
    main = sample.main
    if positions == "continuous" or main.scenes == 1:
        return sample
    frame_B1 = frame_seconds(main)[:, None]

    def moved(geometry: Geometry, beside: Geometry) -> Geometry:
        if positions == "reset":
            return _from_its_scene(geometry, beside, main)
        later_B1 = jump * frame_B1 if positions == "jump" else torch.full_like(frame_B1, gap)
        later_BF = geometry.scene_BF * later_B1
        jump_BF = later_BF / frame_seconds(beside)[:, None]
        return replace(geometry, seconds_BF=geometry.seconds_BF + later_BF, jump_BF=jump_BF)

    return replace(
        sample,
        tracks={m: moved(geometry, geometry) for m, geometry in sample.tracks.items()},
        references={
            m: tuple(moved(one, sample.tracks[m]) for one in all_of) if m in sample.tracks else all_of
            for m, all_of in sample.references.items()
        },
    )


def _from_its_scene(geometry: Geometry, beside: Geometry, main: Geometry) -> Geometry:
    """Args: ``beside``: the track whose frames it counts its own by: itself, or a reference's target."""
    begin_BF = _at_scene(main, _spans(main)[..., 0], geometry.scene_BF)
    index_BF = _at_scene(beside, _frame_numbers(beside), geometry.scene_BF)
    return replace(geometry, seconds_BF=geometry.seconds_BF - begin_BF, jump_BF=-index_BF)


def _at_scene(of: Geometry, value_BF: Tensor, scene_BN: Tensor) -> Tensor:
    """(B or 1, N): the value of the first frame of ``of`` in each of these scenes."""
    batch = max(len(of.scene_BF), len(value_BF), len(scene_BN))
    scene_BF, value_BF = of.scene_BF.expand(batch, -1), value_BF.expand(batch, -1)
    far = torch.full((batch, of.scenes), torch.finfo(torch.float32).max, device=of.device)
    first_BZ = far.scatter_reduce(1, scene_BF, value_BF, "amin")
    return first_BZ.gather(1, scene_BN.expand(batch, -1))


def _spans(geometry: Geometry) -> Tensor:
    assert geometry.span_BF2 is not None, "scenes are set apart by when their frames begin"
    return geometry.span_BF2


def _frame_numbers(geometry: Geometry) -> Tensor:
    return torch.arange(geometry.grid[0], device=geometry.device, dtype=torch.float32)[None] + geometry.begin
