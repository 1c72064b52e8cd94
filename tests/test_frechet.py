"""FID and KID against closed forms of known Gaussians and sums written out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from motionloom.errors import UserError
from motionloom.evals.frechet import (
    Gaussian,
    apart,
    fid,
    frechet,
    gaussian,
    kid,
    mmd,
    rank_deficient,
    warning,
    with_floor,
)
from motionloom.rng import numpy_rng


def draw(count: int, width: int, key: int = 0, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    return shift + scale * numpy_rng("frechet tests", key).standard_normal((count, width))


# FID


def test_gaussians_with_diagonal_covariances() -> None:
    rng = numpy_rng("frechet tests, diagonal")
    mean_a, mean_b, std_a, std_b = rng.random((4, 6)) * 3
    a, b = Gaussian(mean_a, np.diag(std_a**2)), Gaussian(mean_b, np.diag(std_b**2))
    expected = ((mean_a - mean_b) ** 2).sum() + ((std_a - std_b) ** 2).sum()
    assert frechet(a, b) == pytest.approx(expected, rel=1e-12)
    # The same in another basis, where covariances are full.
    turn, _ = np.linalg.qr(rng.standard_normal((6, 6)))
    turned = [Gaussian(turn @ one.mean_D, turn @ one.cov_DD @ turn.T) for one in (a, b)]
    assert frechet(*turned) == pytest.approx(expected, rel=1e-12)


def test_gaussians_whose_covariances_do_not_commute() -> None:
    # tr M^1/2 = (tr M + 2 sqrt(det M))^1/2 for 2 x 2.
    a, b = np.array([[2.0, 0.9], [0.9, 1.0]]), np.array([[1.0, -0.4], [-0.4, 3.0]])
    assert not np.allclose(a @ b, b @ a)
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    expected = np.trace(a) + np.trace(b) - 2 * root + 25.0
    found = frechet(Gaussian(np.zeros(2), a), Gaussian(np.array([3.0, 4.0]), b))
    assert found == pytest.approx(expected, rel=1e-12)


def test_fewer_frames_than_features_are_exact_too_and_said_to_be_few() -> None:
    """The overlap of two samples is the sum of the singular values of their centred product."""
    a_ND, b_ND = draw(20, 50), draw(30, 50, key=1, shift=0.3)
    centred = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a_ND, b_ND)]
    overlap = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    apart_by = ((a_ND.mean(0) - b_ND.mean(0)) ** 2).sum()
    expected = apart_by + sum((x**2).sum() for x in centred) - 2 * overlap
    assert fid(a_ND, b_ND) == pytest.approx(expected, rel=1e-9)
    assert frechet(gaussian(a_ND), gaussian(b_ND)) == pytest.approx(expected, rel=1e-6)
    assert rank_deficient(a_ND, b_ND)
    assert rank_deficient(draw(50, 50), draw(90, 50))
    assert not rank_deficient(draw(51, 50), draw(51, 50))


def test_samples_of_known_gaussians_come_near_their_distance() -> None:
    found = fid(draw(20_000, 3), draw(20_000, 3, key=1, shift=1.0, scale=2.0))
    assert found == pytest.approx(3 * 1.0 + 3 * (2 - 1) ** 2, rel=0.03)


def test_a_set_is_no_way_from_itself_and_nothing_comes_out_below_0() -> None:
    x_ND = draw(40, 60).astype(np.float32)
    assert 0 <= fid(x_ND, x_ND) < 1e-5
    assert gaussian(draw(9, 1)).cov_DD.shape == (1, 1)


@pytest.mark.parametrize("distance", [fid, kid])
def test_features_that_are_no_numbers_and_single_frames_are_refused(distance) -> None:
    bad = draw(10, 4)
    bad[3, 2] = np.nan
    with pytest.raises(UserError, match="features of 1 frames are NaN"):
        distance(bad, draw(10, 4))
    with pytest.raises(UserError, match="2 frames or more"):
        distance(draw(1, 4), draw(10, 4))


# KID


def test_the_squared_mmd_is_its_sums_written_out() -> None:
    x, y = draw(5, 3), draw(7, 3, key=1, shift=0.5)

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 3 + 1) ** 3)

    within_x = sum(k(x[i], x[j]) for i in range(5) for j in range(5) if i != j) / (5 * 4)
    within_y = sum(k(y[i], y[j]) for i in range(7) for j in range(7) if i != j) / (7 * 6)
    between = sum(k(a, b) for a in x for b in y) / 35
    assert mmd(x, y) == pytest.approx(within_x + within_y - 2 * between, rel=1e-12)


def test_it_is_unbiased() -> None:
    """Of two sets of one distribution it is 0 in the mean, on either side of it."""
    found = [mmd(draw(12, 4, key=2 * n), draw(12, 4, key=2 * n + 1)) for n in range(400)]
    assert abs(np.mean(found)) < 4 * np.std(found) / 20
    assert min(found) < 0 < max(found)


def test_subsets_are_seeded_and_few_frames_make_one() -> None:
    a, b = draw(60, 4), draw(60, 4, key=1, shift=1.0)
    first = kid(a, b, "x", subsets=20, size=15)
    assert (first.subsets, first.size) == (20, 15)
    assert first == kid(a, b, "x", subsets=20, size=15)
    assert first != kid(a, b, "y", subsets=20, size=15)
    assert first.std > 0
    # Subsets are fair draws: in the mean they say what all frames together do.
    many = kid(a, b, "x", subsets=1000, size=15)
    assert many.mean == pytest.approx(mmd(a, b), abs=4 * many.std / 1000**0.5)
    whole = kid(a, b, "x")
    assert (whole.mean, whole.std, whole.subsets, whole.size) == (mmd(a, b), 0.0, 1, 60)


# Sets of clips


def per_clip(clips: int, key: int, shift: float = 0.0, frames: int = 3) -> list[np.ndarray]:
    return list(draw(clips * frames, 5, key=key, shift=shift).reshape(clips, frames, 5))


def test_a_floor_of_the_same_number_stands_beside_the_figure() -> None:
    real = per_clip(40, 3)
    near, same, floor = with_floor([one + 0.01 for one in real], real)
    assert (near.clips, near.frames) == (40, 120)
    assert (same.clips, same.frames) == (floor.clips, floor.frames) == (20, 60)
    # Clip by clip the same up to a step: far below what other clips are apart.
    assert near.fid == pytest.approx(5 * 0.01**2, rel=1e-3)
    assert same.fid == pytest.approx(5 * 0.01**2, rel=1e-3)
    assert floor.fid > 100 * same.fid
    assert warning([near, same, floor]) is None


def test_twice_as_many_real_clips_give_the_floor_of_the_whole_number() -> None:
    whole, floor = with_floor(per_clip(15, 4, shift=2.0), per_clip(30, 5))
    assert (whole.clips, floor.clips) == (15, 15)
    assert whole.frames == floor.frames == 45
    assert whole.fid > 4 * floor.fid
    assert whole.kid.mean > floor.kid.mean


def test_the_floor_does_not_depend_on_how_the_manifest_is_sorted() -> None:
    """Halves of a sorted list would be two different worlds."""
    real = [one + (10 if n >= 20 else 0) for n, one in enumerate(per_clip(40, 6))]
    *_, floor = with_floor(real, real)
    assert floor.fid < 60  # two halves as they stand: 5 * 10**2


def test_few_clips_have_no_floor_and_clips_of_other_lengths_are_cut_to_as_many_frames() -> None:
    assert len(with_floor(per_clip(3, 7), per_clip(3, 8))) == 1
    one = apart("x", per_clip(4, 9, frames=2), per_clip(4, 10, frames=3))
    assert (one.clips, one.frames) == (4, 8)


def test_too_few_frames_are_warned_of_with_their_number() -> None:
    one = apart("x", per_clip(2, 11), per_clip(2, 12))
    assert not one.rank_deficient
    said = warning([one, replace(one, rank_deficient=True, frames=4)])
    assert said is not None
    assert said.startswith("FID of 4 frames")
    assert "\n" not in said
