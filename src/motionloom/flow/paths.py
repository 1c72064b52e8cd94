"""Paths: how clean data turns into noise, x = a(sigma) * clean + s(sigma) * noise.

sigma is in [0, 1]: 0 is clean, 1 is pure noise. The velocity is v = dx/dsigma = a' * clean + s' * noise.
On both paths the determinant W = a s' - a' s is a constant, so (x, v) holds the pair (clean, noise) at every
sigma, the two ends included: clean = (s' x - s v) / W and noise = (a v - a' x) / W. Nothing divides by sigma.

Shapes: sigma is a float, (B,), (B, N) or anything else that lines up with the LEADING dims of x (B, N, C).
Arithmetic is float32 (float64 if a tensor is); a result has the dtype of the first tensor argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

Sigma = Tensor | float


class Coefficients(NamedTuple):
    """The path's two coefficients and their derivatives by sigma, each of sigma's shape."""

    a: Tensor
    s: Tensor
    da: Tensor
    ds: Tensor


def widen(x: Tensor) -> Tensor:
    """x in the dtype that sampling and noising are computed in: at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def broadcast_sigma(sigma: Sigma, x: Tensor) -> Tensor:
    """sigma on x's device, at least float32, with trailing dims of size 1 so that it broadcasts against x.

    (B,) or (B, N) against x (B, N, C) becomes (B, 1, 1) or (B, N, 1); a float becomes a 0-d tensor, filled on
    the device so that the host does not wait for it.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if not isinstance(sigma, Tensor):
        return torch.full((), sigma, dtype=dtype, device=x.device)
    assert sigma.ndim <= x.ndim, f"sigma {tuple(sigma.shape)} has more dims than x {tuple(x.shape)}"
    leading = zip(sigma.shape, x.shape, strict=False)
    assert all(n in (1, m) for n, m in leading), f"sigma {tuple(sigma.shape)} against x {tuple(x.shape)}"
    sigma = sigma.reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim))
    return sigma.to(device=x.device, dtype=torch.promote_types(dtype, sigma.dtype))


@dataclass(frozen=True)
class Path:
    """One way from data to noise. Use the members of ``PATHS``.

    ``coefficients`` maps sigma to (a, s, a', s'); ``sigma_of`` maps a ratio a : s (both >= 0, of any common
    scale) to the sigma that has it, exact at 0 and 1; ``wronskian`` is the constant a s' - a' s.
    """

    name: str
    coefficients: Callable[[Tensor], Coefficients] = field(repr=False)
    sigma_of: Callable[[Tensor, Tensor], Tensor] = field(repr=False)
    wronskian: float = field(repr=False)

    def mix(self, clean: Tensor, noise: Tensor, sigma: Sigma) -> Tensor:
        """x = a * clean + s * noise. Bit-identical to clean where sigma is 0 and to noise where it is 1."""
        sigma = broadcast_sigma(sigma, clean)
        a, s, _, _ = self.coefficients(sigma)
        x = (a * widen(clean) + s * widen(noise)).to(clean.dtype)
        # Adding 0 * noise would turn -0.0 into 0.0 and let a NaN through: the ends are taken, not computed.
        return torch.where(sigma == 0, clean, torch.where(sigma == 1, noise.to(clean.dtype), x))

    def velocity(self, clean: Tensor, noise: Tensor, sigma: Sigma) -> Tensor:
        """v = dx/dsigma = a' * clean + s' * noise: the regression target of flow matching."""
        _, _, da, ds = self.coefficients(broadcast_sigma(sigma, clean))
        return (da * widen(clean) + ds * widen(noise)).to(clean.dtype)

    def to_clean(self, x: Tensor, v: Tensor, sigma: Sigma) -> Tensor:
        """The clean data that (x, v) stands for. Bit-identical to ``x`` where sigma is 0."""
        sigma = broadcast_sigma(sigma, x)
        _, s, _, ds = self.coefficients(sigma)
        clean = ((ds * widen(x) - s * widen(v)) / self.wronskian).to(x.dtype)
        return torch.where(sigma == 0, x, clean)

    def to_noise(self, x: Tensor, v: Tensor, sigma: Sigma) -> Tensor:
        """The noise that (x, v) stands for. Bit-identical to ``x`` where sigma is 1."""
        sigma = broadcast_sigma(sigma, x)
        a, _, da, _ = self.coefficients(sigma)
        noise = ((a * widen(v) - da * widen(x)) / self.wronskian).to(x.dtype)
        return torch.where(sigma == 1, x, noise)


def _linear(sigma: Tensor) -> Coefficients:
    one = torch.ones_like(sigma)
    return Coefficients(1 - sigma, sigma, -one, one)


def _cosine(sigma: Tensor) -> Coefficients:
    half_pi = math.pi / 2
    # a = cos(pi/2 sigma), written as a sine because cos(pi/2) is not 0 in floating point and sin(0) is.
    a, s = torch.sin(half_pi * (1 - sigma)), torch.sin(half_pi * sigma)
    return Coefficients(a, s, -half_pi * s, half_pi * a)


def _linear_sigma(a: Tensor, s: Tensor) -> Tensor:
    return s / (a + s)


def _cosine_sigma(a: Tensor, s: Tensor) -> Tensor:
    return torch.atan2(s, a) / (math.pi / 2)


# Rectified flow: Liu et al. 2022 (2209.03003), Lipman et al. 2022 (2210.02747). v = noise - clean.
LINEAR = Path(
    name="linear",
    coefficients=_linear,
    sigma_of=_linear_sigma,
    wronskian=1.0,
)
# Variance preserving: the trigonometric interpolant of Albergo & Vanden-Eijnden 2022 (2209.15571).
COSINE = Path(
    name="cosine",
    coefficients=_cosine,
    sigma_of=_cosine_sigma,
    wronskian=math.pi / 2,
)
PATHS = {path.name: path for path in (LINEAR, COSINE)}
