"""From a batch of latents to the sample that plans speak of: where its tokens are, before any noise.

Shapes: B batch, F token frames, S cells of a frame; H x W latent cells.
"""

from __future__ import annotations

from collections.abc import Sequence

from motionloom.data.batch import Batch, Latents
from motionloom.errors import UserError
from motionloom.nn.patching import patchify_mask
from motionloom.plans.geometry import Geometry, Sample, token_geometry

ONE_CELL = (1, 1, 1)
"""Sound has no cells to join."""


def batch_sample(batch: Batch, patch: tuple[int, int, int], fps: float, modalities: Sequence[str]) -> Sample:
    """The sample of a batch.

    Args:
        patch: latent cells of the video per token.
        fps: pixel frames per second.
        modalities: those of the plan; what the batch holds besides is left out.

    Raises:
        UserError: the plan wants a modality that the batch has not.
    """
    scenes = max(map(len, batch.captions))
    for modality in modalities:
        if modality not in batch.latents:
            raise UserError(
                f"plan.modalities has {modality}, and the cache holds none: make it with "
                f"{'audio.enabled' if modality == 'audio' else 'videos'}, or take it out of plan.modalities"
            )
    tracks = {m: _geometry(batch.latents[m], _patch(m, patch), len(batch.ids), scenes) for m in modalities}
    references = {
        m: tuple(_geometry(one, _patch(m, patch), len(batch.ids), 1) for one in batch.references.get(m, ()))
        for m in modalities
    }
    masks = {m: patchify_mask(mask, _patch(m, patch)) for m, mask in batch.masks.items() if m in tracks}
    return Sample(tracks, references, masks, fps)


def _patch(modality: str, patch: tuple[int, int, int]) -> tuple[int, int, int]:
    return patch if modality == "video" else ONE_CELL


def _geometry(of: Latents, patch: tuple[int, int, int], batch: int, scenes: int) -> Geometry:
    _, frames, rows, columns, _ = of.x_BFHWC.shape
    return token_geometry(
        (frames, rows, columns),
        patch,
        of.seconds_BF,
        of.scene_BF,
        of.pixels,
        batch,
        span_BF2=of.span_BF2,
        scenes=scenes,
        present_B=of.present_B,
    )
