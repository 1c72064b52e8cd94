"""Conversions: what a network predicts, and which clock it reads, against the project's convention.

What it predicts ("kind"), for x = a clean + s noise on a path and n = sqrt(a^2 + s^2):
  velocity  a' clean + s' noise                 the project's own
  clean     the data itself                     "x0" or "sample" elsewhere
  noise     the unit normal                     "epsilon" of DDPM (Ho et al. 2020, 2006.11239)
  v         (a noise - s clean) / n             "v" of Salimans & Ho 2022 (2202.00512), app. D

Which clock it reads: a DDPM network knows x_vp = alpha clean + sqrt(1 - alpha^2) noise at an integer t. Only
the ratio signal : noise tells two states apart, so the sigma with a : s = alpha : sqrt(1 - alpha^2) holds the
same state up to the factor n:  x_vp = x / n,  alpha = a / n.  On the linear path sigma = sqrt(1 - abar) /
(sqrt(abar) + sqrt(1 - abar)); on the cosine path n is 1 and sigma is an angle.

Networks that read t = 1 - sigma and predict clean - noise ("t = 1 is data") need ``flip_time`` and a minus.
Shapes: as in ``paths``; sigma is a float or lines up with the leading dims of x.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from motionloom.flow.paths import LINEAR, Path, Sigma, broadcast_sigma, widen
from motionloom.flow.times import FloatOrTensor

Kind = Literal["velocity", "clean", "noise", "v"]


def flip_time(t: FloatOrTensor) -> FloatOrTensor:
    """Between sigma and a clock on which 1 is data. Its own inverse; the velocity changes sign."""
    return 1 - t


def from_pair(kind: Kind, clean: Tensor, noise: Tensor, sigma: Sigma, path: Path = LINEAR) -> Tensor:
    """The quantity ``kind`` of a (clean, noise) pair at sigma: a training target, in the dtype of clean."""
    if kind == "clean":
        return clean
    if kind == "noise":
        return noise.to(clean.dtype)
    if kind == "velocity":
        return path.velocity(clean, noise, sigma)
    a, s, _, _ = path.coefficients(broadcast_sigma(sigma, clean))
    return ((a * widen(noise) - s * widen(clean)) / torch.hypot(a, s)).to(clean.dtype)


def to_pair(
    kind: Kind, output: Tensor, x: Tensor, sigma: Sigma, path: Path = LINEAR
) -> tuple[Tensor, Tensor]:
    """The (clean, noise) that a prediction ``output`` of ``kind`` stands for at state x. Dtype of ``x``.

    Exact for velocity and v at every sigma. At sigma = 1 a noise prediction says nothing about the data, at
    sigma = 0 a clean prediction nothing about the noise; the missing half is then 0, which for the noise is
    its true expectation and for the data that of centred latents. Just beside those ends the division
    magnifies the network's error: prefer v or velocity where a schedule reaches them.
    """
    wide_sigma = broadcast_sigma(sigma, x)
    a, s, _, _ = path.coefficients(wide_sigma)
    wide_x, wide = widen(x), widen(output)
    if kind == "velocity":
        return path.to_clean(x, output, sigma), path.to_noise(x, output, sigma)
    if kind == "v":
        n = torch.hypot(a, s)
        clean, noise = (a * wide_x / n - s * wide) / n, (s * wide_x / n + a * wide) / n
    elif kind == "clean":
        clean, noise = wide, _divide(wide_x - a * wide, s)
    else:
        clean, noise = _divide(wide_x - s * wide, a), wide
    return clean.to(x.dtype), noise.to(x.dtype)


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    # The inner where keeps 0 / 0 out of the gradient, which the outer one alone would not.
    empty = denominator == 0
    return torch.where(empty, 0.0, numerator / torch.where(empty, 1.0, denominator))


def convert(
    output: Tensor, x: Tensor, sigma: Sigma, source: Kind, target: Kind, path: Path = LINEAR
) -> Tensor:
    """A prediction of kind ``source`` at state x, said as kind ``target``. Dtype of ``x``.

    There and back is the identity for velocity and v at every sigma, for clean above 0, for noise below 1.
    """
    if source == target:
        return output.to(x.dtype)
    # Widened here so that the pair is not rounded to x's dtype half way.
    clean, noise = to_pair(source, widen(output), widen(x), sigma, path)
    return from_pair(target, clean, noise, sigma, path).to(x.dtype)


def alpha_bar_to_sigma(alpha_bar: Tensor, path: Path = LINEAR) -> Tensor:
    """The sigma with the signal-to-noise ratio of DDPM's abar = alpha^2. Exact: 1 gives 0, 0 gives 1."""
    alpha_bar = widen(alpha_bar)
    return path.sigma_of(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())


def sigma_to_alpha_bar(sigma: Tensor, path: Path = LINEAR) -> Tensor:
    """DDPM's abar at sigma: a^2 / (a^2 + s^2)."""
    a, s, _, _ = path.coefficients(widen(sigma))
    return a**2 / (a**2 + s**2)


def state_norm(sigma: Tensor, path: Path = LINEAR) -> Tensor:
    """n = sqrt(a^2 + s^2), so that x_vp = x / n. It is 1 at both ends and on all of the cosine path."""
    a, s, _, _ = path.coefficients(widen(sigma))
    return torch.hypot(a, s)
