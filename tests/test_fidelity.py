"""Fidelity of reconstructions against closed forms and the formulas written out pixel by pixel."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from motionloom.errors import UserError
from motionloom.evals.fidelity import MOST_PSNR, flicker, lpips, psnr, ssim, to_pixels
from motionloom.rng import numpy_rng


def noise(*shape: int, key: int = 0) -> np.ndarray:
    return numpy_rng("fidelity tests", key).integers(0, 256, shape, "uint8")


def flat(level: int, frames: int = 1, side: int = 12) -> np.ndarray:
    return np.full((frames, side, side, 3), level, np.uint8)


def test_psnr_of_an_offset_is_its_closed_form() -> None:
    assert psnr(flat(110), flat(100)) == pytest.approx(20 * math.log10(255 / 10))
    # In uint8 0 - 255 would be 1.
    assert psnr(flat(0), flat(255)) == pytest.approx(0)


def test_psnr_is_a_mean_of_frames_and_not_of_errors() -> None:
    made = np.concatenate([flat(101), flat(120)])
    expected = (20 * math.log10(255 / 1) + 20 * math.log10(255 / 20)) / 2
    assert psnr(made, flat(100, frames=2)) == pytest.approx(expected)


def test_exact_frames_have_a_psnr_with_a_mean() -> None:
    assert psnr(flat(7), flat(7)) == MOST_PSNR


def test_floats_are_rounded_and_never_truncated() -> None:
    made = np.array([-3.0, 0.49, 0.51, 99.7, 254.6, 400.0])
    assert to_pixels(made).tolist() == [0, 0, 1, 100, 255, 255]
    almost = flat(100).astype(np.float64) - 0.3
    assert psnr(almost, flat(100)) == MOST_PSNR


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_pixels_that_are_no_numbers_are_refused(bad: float) -> None:
    made = flat(100).astype(np.float32)
    made[0, 3, 4, 1] = bad
    for measure in (psnr, ssim, flicker):
        with pytest.raises(UserError, match="1 values are NaN or infinite"):
            measure(made, flat(100))


def test_clips_of_two_shapes_do_not_compare() -> None:
    with pytest.raises(UserError, match="one shape"):
        psnr(flat(1), flat(1, frames=2))


def written_out_ssim(a_HW: np.ndarray, b_HW: np.ndarray) -> float:
    """Wang et al. 2004 place by place, with the whole 11 x 11 window."""
    place = np.arange(11) - 5
    weight = np.exp(-(place[:, None] ** 2 + place[None, :] ** 2) / (2 * 1.5**2))
    weight /= weight.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    found = []
    for top in range(a_HW.shape[0] - 10):
        for left in range(a_HW.shape[1] - 10):
            a, b = (x[top : top + 11, left : left + 11].astype(float) for x in (a_HW, b_HW))
            ma, mb = (weight * a).sum(), (weight * b).sum()
            va, vb = (weight * (a - ma) ** 2).sum(), (weight * (b - mb) ** 2).sum()
            both = (weight * (a - ma) * (b - mb)).sum()
            found.append((2 * ma * mb + c1) * (2 * both + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return float(np.mean(found))


def test_ssim_is_its_formula_written_out() -> None:
    real = noise(2, 14, 17, 3)
    made = np.clip(real.astype(int) + noise(2, 14, 17, 3, key=1) // 4 - 30, 0, 255).astype(np.uint8)
    expected = np.mean(
        [written_out_ssim(made[t, ..., c], real[t, ..., c]) for t in range(2) for c in range(3)]
    )
    assert ssim(made, real) == pytest.approx(expected, abs=1e-12)
    assert 0.2 < expected < 0.98


def test_ssim_of_flat_frames_is_its_light_alone_and_of_equal_ones_is_1() -> None:
    a, b, c1 = 60.0, 200.0, (0.01 * 255) ** 2
    assert ssim(flat(60), flat(200)) == pytest.approx((2 * a * b + c1) / (a**2 + b**2 + c1))
    assert ssim(noise(1, 20, 20, 3), noise(1, 20, 20, 3)) == pytest.approx(1)


def test_ssim_names_the_size_that_it_needs() -> None:
    with pytest.raises(UserError, match="frames of 12x10; its window needs 11"):
        ssim(noise(1, 10, 12, 3), noise(1, 10, 12, 3))


def test_an_error_that_stands_still_does_not_flicker() -> None:
    real = np.clip(noise(5, 12, 12, 3), 20, 235)
    tint = real + np.arange(0, 12, dtype=np.uint8)[:, None, None]
    assert flicker(tint, real) == 0
    turns = real.astype(int) + 6 * (-1) ** np.arange(5)[:, None, None, None]
    assert flicker(turns.astype(np.uint8), real) == pytest.approx(12)
    assert flicker(real[:1], real[:1]) is None


def test_flicker_does_not_see_what_really_moves() -> None:
    real = noise(4, 12, 12, 3)
    assert flicker(real, real) == 0


def test_the_perceptual_distance_is_given_unit_pixels_frame_by_frame() -> None:
    seen = []

    def perceive(made: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        seen.append((tuple(made.shape), float(made.max())))
        return (made - real).abs().mean(dim=(1, 2, 3))

    made = np.concatenate([flat(255), flat(51)])
    assert lpips(made, flat(0, frames=2), perceive) == pytest.approx((1.0 + 0.2) / 2)
    assert seen == [((1, 3, 12, 12), 1.0), ((1, 3, 12, 12), pytest.approx(0.2))]
