"""From a grid of latents to a grid of tokens: where a token's centre is when it covers several latent cells.

Shapes: B batch, F latent frames, T token frames.
"""

from __future__ import annotations

from torch import Tensor

from motionloom.plans.layout import Geometry


def token_geometry(
    latent_grid: tuple[int, int, int],
    patch: tuple[int, int, int],
    seconds_BF: Tensor,
    scene_BF: Tensor,
    pixels_per_latent: int,
    batch: int,
) -> Geometry:
    """The geometry of clips with latents (frames, rows, columns) under a backbone that takes ``patch`` per
    token.

    A token stands in the middle of its latent frames' times; a token that straddles a cut belongs to the shot
    that it begins in.
    """
    assert all(n % p == 0 for n, p in zip(latent_grid, patch, strict=True)), f"{latent_grid} by patch {patch}"
    frames, rows, columns = (n // p for n, p in zip(latent_grid, patch, strict=True))
    return Geometry(
        grid=(frames, rows, columns),
        seconds_BF=seconds_BF.unflatten(1, (frames, patch[0])).mean(dim=2),
        pixels_per_cell=(float(pixels_per_latent * patch[1]), float(pixels_per_latent * patch[2])),
        scene_BF=scene_BF[:, :: patch[0]],
        batch=batch,
    )
