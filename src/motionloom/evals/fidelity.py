"""How near a reconstruction is to its original: PSNR, SSIM, LPIPS, and how much the error flickers.

Everything is reckoned in levels of 0..255 on the pixels that a file would hold: floats are rounded, never
truncated, which would darken every frame by half a level.

Protocol ``reconstruction-v1``: each figure is a mean over a clip's frames, then over clips.

P frames, H x W pixels; h x w places of a window that lies whole within the frame.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from motionloom.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

PROTOCOL = "reconstruction-v1"
PEAK = 255.0
MOST_PSNR = 100.0
"""dB of a frame in which nothing differs, so that exact frames have a mean."""
WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03

Pixels = NDArray[np.uint8]
Perceive = Callable[["Tensor", "Tensor"], "Tensor"]
"""Two (N, 3, H, W) in [0, 1] to (N,) distances."""


def to_pixels(video: NDArray[Any], what: str = "frames") -> Pixels:
    """uint8 as it is; floats in 0..255 rounded to the nearest level and clipped.

    Args:
        what: names the frames in messages.

    Raises:
        UserError: a pixel that is not finite.
    """
    if video.dtype == np.uint8:
        return video
    bad = ~np.isfinite(video)
    if bad.any():
        raise UserError(f"{what}: {int(bad.sum())} values are NaN or infinite; mend what made them")
    return np.clip(np.rint(video), 0, PEAK).astype(np.uint8)


def psnr(made_PHW3: NDArray[Any], real_PHW3: NDArray[Any]) -> float:
    """Peak signal-to-noise ratio in dB, frame by frame in float64, mean over frames."""
    square_P = np.square(_gap(made_PHW3, real_PHW3)).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return float(np.minimum(10 * np.log10(PEAK**2 / square_P), MOST_PSNR).mean())


def ssim(made_PHW3: NDArray[Any], real_PHW3: NDArray[Any]) -> float:
    """Structural similarity, mean over frames, colours and the places of a Gaussian window.

    Window of 11 x 11 with deviation 1.5 that lies whole within the frame, variances divided by the window's
    weight (not by one less), data range 255. Source: Wang et al., Image Quality Assessment (2004), eq. 13.

    Raises:
        UserError: frames smaller than the window.
    """
    made, real = to_pixels(made_PHW3), to_pixels(real_PHW3)
    _same(made, real)
    height, width = made.shape[1:3]
    if min(height, width) < WINDOW:
        raise UserError(f"SSIM: frames of {width}x{height}; its window needs {WINDOW} pixels a side")
    # Frame by frame: of a clip at once the moments would take many times its memory.
    return float(np.mean([_ssim(a, b) for a, b in zip(made, real, strict=True)]))


def _ssim(made_HW3: Pixels, real_HW3: Pixels) -> float:
    made, real = made_HW3.astype(np.float64), real_HW3.astype(np.float64)
    mean_a, mean_b = _windowed(made), _windowed(real)
    var_a = _windowed(made * made) - mean_a**2
    var_b = _windowed(real * real) - mean_b**2
    both = _windowed(made * real) - mean_a * mean_b
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    above = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    return float((above / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean())


def flicker(made_PHW3: NDArray[Any], real_PHW3: NDArray[Any]) -> float | None:
    """Temporal flicker: mean absolute change of the error from one frame to the next, in levels of 0..255.

    The error of frame t is e_t = made_t - real_t; this is the mean over pixels, colours and t of
    |e_(t+1) - e_t|. An error that stands still (a tint, a lost texture of a still picture) does not flicker;
    the same error with another sign in every frame does. None of a picture of one frame.
    """
    error = _gap(made_PHW3, real_PHW3)
    return float(np.abs(np.diff(error, axis=0)).mean()) if len(error) > 1 else None


def lpips(made_PHW3: NDArray[Any], real_PHW3: NDArray[Any], perceive: Perceive) -> float:
    """Mean over frames of a learned perceptual distance (Zhang et al., arXiv:1801.03924)."""
    import torch

    def unit(video: NDArray[Any]) -> Tensor:
        return torch.from_numpy(to_pixels(video)).permute(0, 3, 1, 2).float() / PEAK

    made, real = unit(made_PHW3), unit(real_PHW3)
    with torch.no_grad():
        # Frame by frame: a clip at once would hold all layers of all frames.
        return float(torch.cat([perceive(a[None], b[None]) for a, b in zip(made, real, strict=True)]).mean())


def _gap(made_PHW3: NDArray[Any], real_PHW3: NDArray[Any]) -> NDArray[np.float64]:
    made, real = to_pixels(made_PHW3), to_pixels(real_PHW3)
    _same(made, real)
    return made.astype(np.float64) - real


def _same(made: NDArray[Any], real: NDArray[Any]) -> None:
    if made.shape != real.shape:
        raise UserError(f"a clip of {made.shape} against one of {real.shape}: compare clips of one shape")


def _windowed(frame_HW3: NDArray[np.float64]) -> NDArray[np.float64]:
    """(h, w, 3) means under the Gaussian window, which is a product of two: down first, then across."""
    place = np.arange(WINDOW) - WINDOW // 2
    weight = np.exp(-(place**2) / (2 * SIGMA**2))
    weight /= weight.sum()
    h, w = (side - WINDOW + 1 for side in frame_HW3.shape[:2])
    down = sum((weight[k] * frame_HW3[k : k + h] for k in range(WINDOW)), start=np.zeros(()))
    return sum((weight[k] * down[:, k : k + w] for k in range(WINDOW)), start=np.zeros(()))
