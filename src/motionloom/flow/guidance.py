"""Guidance: pushing a conditional prediction away from an unconditional one.

Scale convention: guided = uncond + scale * (cond - uncond), so 1 is no guidance and 0 is unconditional.
Whoever writes cond + w * (cond - uncond), CausVid and Self-Forcing among them, means scale = 1 + w.

Shapes: predictions are (B, ...), as a rule (B, N, C). Arithmetic is at least float32, results as cond.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from motionloom.errors import UserError
from motionloom.flow.paths import widen


def delta_to_scale(w: float) -> float:
    """The scale of a codebase that writes cond + w * (cond - uncond): w = 3.5 there is 4.5 here."""
    return 1.0 + w


def classifier_free(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """uncond + scale * (cond - uncond) (Ho & Salimans 2022, 2207.12598, with scale = 1 + their w)."""
    wide = widen(uncond)
    return (wide + scale * (widen(cond) - wide)).to(cond.dtype)


def rescale(guided: Tensor, cond: Tensor, phi: float, mask: Tensor | None = None) -> Tensor:
    """Takes back the gain in contrast that a high scale brings (Lin et al. 2023, 2305.08891, sec. 3.4).

    phi = 1 gives ``guided`` the standard deviation of ``cond``, phi = 0 leaves it; between them a blend. The
    deviation is taken per sample over all other dims, in the parametrisation that the predictions come in.
    ``mask`` (leading dims of cond, such as (B, N); True counts) leaves out tokens that are not generated:
    padding and context would otherwise set the contrast of the rest.
    """
    wide, wide_cond = widen(guided), widen(cond)
    if mask is None:
        keep = torch.ones_like(wide, dtype=torch.bool)
    else:
        keep = mask.reshape(mask.shape + (1,) * (wide.ndim - mask.ndim)).expand_as(wide)
    std, std_cond = _std(wide, keep), _std(wide_cond, keep)
    ratio = torch.where(std > 0, std_cond / std, 1.0)
    return (wide * (phi * ratio + (1 - phi))).to(guided.dtype)


def _std(x: Tensor, keep: Tensor) -> Tensor:
    dims = tuple(range(1, x.ndim))
    count = keep.sum(dims, keepdim=True).clamp_min(1)
    mean = torch.where(keep, x, 0.0).sum(dims, keepdim=True) / count
    # where, not a product: a masked token may hold NaN.
    return (torch.where(keep, x - mean, 0.0).square().sum(dims, keepdim=True) / count).sqrt()


@dataclass(frozen=True)
class Guidance:
    """How one generation is guided: scale, rescale (phi) and the sigmas between which it acts.

    ``interval`` (low, high): guidance acts for low <= sigma <= high (Kynkäänniemi et al. 2024, 2404.07724).
    Outside, the conditional prediction stands and the other need not be computed: ask ``active`` first.
    Raises UserError for numbers out of range.
    """

    scale: float = 1.0
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.scale < 0:
            raise UserError(f"guidance scale must be 0 or more (1 means no guidance), got {self.scale}")
        if not 0 <= self.rescale <= 1:
            raise UserError(f"guidance rescale must be between 0 and 1, got {self.rescale}")
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise UserError(f"guidance interval must obey 0 <= low <= high <= 1, got {low}, {high}")

    def active(self, sigma: float) -> bool:
        """Whether the unconditional prediction is needed at sigma, a Python float: no device is asked."""
        low, high = self.interval
        return self.scale != 1.0 and low <= sigma <= high

    def combine(
        self, cond: Tensor, uncond: Tensor | None, sigma: float, mask: Tensor | None = None
    ) -> Tensor:
        """The guided prediction; where guidance is not active ``cond`` itself, and ``uncond`` may be None."""
        if not self.active(sigma):
            return cond
        assert uncond is not None, f"guidance is active at sigma {sigma} but no unconditional prediction came"
        guided = classifier_free(cond, uncond, self.scale)
        return rescale(guided, cond, self.rescale, mask) if self.rescale else guided
