"""A learned linear basis: what the fitted tokenizers of picture and sound stand on.

PCA in closed form, with whitening (Hotelling 1933). Shapes: D numbers of a patch, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# Directions with less deviation than this (in units of half the black-to-white range) are rounding noise of
# 8-bit pixels; whitening would blow them up, so they are scaled as if they had this much.
MIN_DEVIATION = 0.5 / 255


class Moments:
    """Mean and covariance of patches that come in parts, so that no more than one clip is held at a time."""

    def __init__(self) -> None:
        self.count = 0
        self._sum_D: Tensor | float = 0.0
        self._products_DD: Tensor | float = 0.0

    def add(self, patches: Tensor) -> None:
        """Patches (..., D)."""
        x_ND = patches.flatten(0, -2).double()
        self.count += len(x_ND)
        self._sum_D += x_ND.sum(dim=0)
        self._products_DD += x_ND.T @ x_ND

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """(D,) and (D, D) in float64, whose 1e-16 leaves room below MIN_DEVIATION squared."""
        mean_D = torch.as_tensor(self._sum_D) / self.count
        scatter_DD = torch.as_tensor(self._products_DD) - self.count * mean_D[:, None] * mean_D
        return mean_D, scatter_DD / max(1, self.count - 1)


@dataclass(frozen=True)
class Basis:
    """One whitened principal basis: ``(patch - mean_D) @ encode_DC``, and back ``z @ decode_CD + mean_D``."""

    mean_D: Tensor
    encode_DC: Tensor
    decode_CD: Tensor
    std_C: Tensor
    """Deviation of each component before whitening, in units of the patches: what an error in it costs."""

    @staticmethod
    def of(moments: Moments, channels: int, whiten: float) -> Basis:
        """PCA in float64; signs fixed so that equal data gives an equal basis."""
        mean_D, covariance_DD = moments.mean_and_covariance()
        variance_D, vectors_DD = torch.linalg.eigh(covariance_DD)
        # eigh sorts by rising variance.
        variance_C, vectors_DC = variance_D.flip(0)[:channels], vectors_DD.flip(1)[:, :channels]
        vectors_DC = torch.where(vectors_DC.sum(dim=0) < 0, -vectors_DC, vectors_DC)
        std_C = variance_C.clamp_min(0).sqrt().clamp_min(MIN_DEVIATION)
        left_C = std_C ** (1 - whiten)
        scale_C = std_C**whiten * left_C.square().mean().sqrt()
        parts = mean_D, vectors_DC / scale_C, (vectors_DC * scale_C).T, std_C
        # Contiguous, as they come back from a file: the layout decides the rounding of a matrix product.
        return Basis(*(part.float().contiguous() for part in parts))

    @staticmethod
    def named(tensors: Mapping[str, Tensor], name: str, numbers: int, channels: int) -> Basis:
        """The basis of that name among a file's tensors, for patches of so many numbers.

        Raises KeyError and ValueError for one that is missing or of another shape.
        """
        basis = Basis(**{field: tensors[f"{name}.{field}"] for field in Basis.__dataclass_fields__})
        has = tuple(basis.encode_DC.shape)
        if has != (numbers, channels):
            raise ValueError(f"{name} has shape {has} instead of {(numbers, channels)}")
        return basis

    def tensors(self, name: str) -> dict[str, Tensor]:
        """What :meth:`named` reads."""
        return {f"{name}.{field}": getattr(self, field) for field in Basis.__dataclass_fields__}

    def to_latent(self, patches: Tensor) -> Tensor:
        """Patches (..., D) -> latents (..., C)."""
        return (patches - self.mean_D) @ self.encode_DC

    def to_patches(self, latents: Tensor) -> Tensor:
        """Latents (..., C) -> the patches (..., D) that they stand for."""
        return latents @ self.decode_CD + self.mean_D
