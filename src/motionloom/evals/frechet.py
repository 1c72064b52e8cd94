"""Distances between two sets of frames by their features: Frechet (FID) and kernel (KID) inception distances.

A figure depends on the extractor, on how many frames there were and on how they were prepared: all three are
told with it, and figures of other extractors or numbers, published ones above all, do not compare. What two
sets of real frames of the same number are apart is the floor: nothing below it means anything.

Protocol ``frames-v1``: frames evenly spread over each clip, features as the extractor gives them, moments and
kernels in float64.

N frames, D numbers of a feature, M frames of a subset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motionloom.errors import UserError
from motionloom.rng import numpy_rng

PROTOCOL = "frames-v1"
SUBSETS, SUBSET = 100, 1000

Features = NDArray[np.floating[Any]]
Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and covariance (D, D) of features."""

    mean_D: NDArray[np.float64]
    cov_DD: Matrix


def gaussian(features_ND: Features) -> Gaussian:
    """Sample moments, the covariance over N - 1.

    Raises:
        UserError: fewer than two frames, or a feature that is not finite.
    """
    x_ND = _checked(features_ND)
    return Gaussian(x_ND.mean(axis=0), np.atleast_2d(np.cov(x_ND, rowvar=False)))


def frechet(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), which is 0 or more.

    Both roots are those of symmetric matrices and come from eigenvalues, of which those that rounding made
    negative count as 0: no iteration that may fail, no complex remainder.

    Source: Dowson & Landau, The Frechet distance between multivariate normal distributions (1982), eq. 4;
    of features: Heusel et al. (arXiv:1706.08500), eq. 6.
    """
    root = _root(a.cov_DD)
    inner = np.linalg.eigvalsh(_symmetric(root @ b.cov_DD @ root))
    overlap = np.sqrt(np.clip(inner, 0, None)).sum()
    apart = np.square(a.mean_D - b.mean_D).sum()
    return float(max(0.0, apart + np.trace(a.cov_DD) + np.trace(b.cov_DD) - 2 * overlap))


def _root(cov_DD: Matrix) -> Matrix:
    """The symmetric square root of a covariance."""
    values, vectors = np.linalg.eigh(_symmetric(cov_DD))
    root: Matrix = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    return root


def _symmetric(matrix_DD: Matrix) -> Matrix:
    return (matrix_DD + matrix_DD.T) / 2


def fid(a_ND: Features, b_ND: Features) -> float:
    """Frechet distance of two sets. Of fewer than D + 1 frames the covariance is singular and the figure is
    too large by what was not seen; see :func:`rank_deficient`."""
    if max(len(a_ND), len(b_ND)) >= a_ND.shape[1]:
        return frechet(gaussian(a_ND), gaussian(b_ND))
    return _of_few(_checked(a_ND), _checked(b_ND))


def _of_few(a_ND: Matrix, b_ND: Matrix) -> float:
    """:func:`frechet` without covariances: with A = X'X and B = Y'Y of centred frames, A^1/2 B A^1/2 has the
    eigenvalues of (X Y')(X Y')', which is as large as there are frames and not as there are features."""
    mean_a, mean_b = a_ND.mean(axis=0), b_ND.mean(axis=0)
    x_ND = (a_ND - mean_a) / np.sqrt(len(a_ND) - 1)
    y_ND = (b_ND - mean_b) / np.sqrt(len(b_ND) - 1)
    between = x_ND @ y_ND.T
    inner = np.linalg.eigvalsh(_symmetric(between @ between.T))
    overlap = np.sqrt(np.clip(inner, 0, None)).sum()
    apart = np.square(mean_a - mean_b).sum()
    return float(max(0.0, apart + np.square(x_ND).sum() + np.square(y_ND).sum() - 2 * overlap))


def rank_deficient(a_ND: Features, b_ND: Features) -> bool:
    """Whether a covariance of D numbers comes from D frames or fewer."""
    return min(len(a_ND), len(b_ND)) <= a_ND.shape[1]


@dataclass(frozen=True)
class Kid:
    """Mean over subsets of the squared maximum mean discrepancy, and their deviation (0 of a single one)."""

    mean: float
    std: float
    subsets: int
    size: int


def kid(a_ND: Features, b_ND: Features, *key: int | str, subsets: int = SUBSETS, size: int = SUBSET) -> Kid:
    """Unbiased squared MMD under k(x, y) = (x . y / D + 1)^3; it may come out below 0.

    Subsets are drawn without replacement from a generator of ``key``; where there are ``size`` frames or
    fewer, all of them make the only one.

    Source: Binkowski et al., Demystifying MMD GANs (arXiv:1801.01401), section 4.
    """
    a_ND, b_ND = _checked(a_ND), _checked(b_ND)
    fewest = min(len(a_ND), len(b_ND))
    if max(len(a_ND), len(b_ND)) <= size:
        return Kid(mmd(a_ND, b_ND), 0.0, 1, fewest)
    size = min(size, fewest)
    rng = numpy_rng("kid", *key)
    found = [
        mmd(
            a_ND[rng.choice(len(a_ND), size, replace=False)],
            b_ND[rng.choice(len(b_ND), size, replace=False)],
        )
        for _ in range(subsets)
    ]
    return Kid(float(np.mean(found)), float(np.std(found)), subsets, size)


def mmd(a_MD: Features, b_MD: Features) -> float:
    """Unbiased estimate of the squared MMD under the cubic kernel (Gretton et al. 2012, eq. 3)."""
    a_MD, b_MD = a_MD.astype(np.float64), b_MD.astype(np.float64)
    m, n = len(a_MD), len(b_MD)
    within_a, within_b, between = _kernel(a_MD, a_MD), _kernel(b_MD, b_MD), _kernel(a_MD, b_MD)
    np.fill_diagonal(within_a, 0.0)
    np.fill_diagonal(within_b, 0.0)
    return float(within_a.sum() / (m * (m - 1)) + within_b.sum() / (n * (n - 1)) - 2 * between.mean())


def _kernel(a_MD: Features, b_MD: Features) -> Matrix:
    kernel: Matrix = (a_MD @ b_MD.T / a_MD.shape[1] + 1.0) ** 3
    return kernel


def _checked(features_ND: Features) -> Matrix:
    if features_ND.ndim != 2 or len(features_ND) < 2:
        raise UserError("a distance of sets of frames needs 2 frames or more on each side: give more clips")
    if not np.isfinite(features_ND).all():
        bad = int((~np.isfinite(features_ND).all(axis=1)).sum())
        raise UserError(
            f"features of {bad} frames are NaN or infinite: look at the clips, then the extractor"
        )
    return features_ND.astype(np.float64)


# Sets of clips


@dataclass(frozen=True)
class Apart:
    """How far two sets are apart, and by how many clips and frames on each side that is said."""

    name: str
    clips: int
    frames: int
    fid: float
    kid: Kid
    rank_deficient: bool

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def apart(name: str, made: Sequence[Features], real: Sequence[Features]) -> Apart:
    """Of as many clips of each as there are of both, and of as many frames; one (N, D) per clip."""
    clips = min(len(made), len(real))
    a_ND, b_ND = (np.concatenate(side[:clips]) if clips else np.zeros((0, 1)) for side in (made, real))
    frames = min(len(a_ND), len(b_ND))
    a_ND, b_ND = a_ND[:frames], b_ND[:frames]
    found = kid(a_ND, b_ND, PROTOCOL, frames)
    return Apart(name, clips, frames, fid(a_ND, b_ND), found, rank_deficient(a_ND, b_ND))


def with_floor(made: Sequence[Features], real: Sequence[Features]) -> list[Apart]:
    """All that was made against real clips; and where real clips are too few for that number twice, the same
    of half of them; and as many real clips against others: the floor.

    Clips are taken in an order that is drawn once, so that both halves are alike; where ``made`` and ``real``
    go together clip by clip, they stay together. Fewer than 4 real clips have no floor.
    """
    order = numpy_rng("halves of clips", len(real)).permutation(len(real))
    paired = len(made) == len(real)
    real = [real[i] for i in order]
    made = [made[i] for i in order] if paired else list(made)
    answer = [apart("made and real", made, real)]
    half = min(len(made), len(real) // 2)
    if len(real) < 4 or half < 1:
        return answer
    if half < answer[0].clips:
        answer.append(apart("made and real, same number as the floor", made[:half], real[:half]))
    answer.append(apart("floor: real and other real", real[half : 2 * half], real[:half]))
    return answer


def warning(sets: Sequence[Apart]) -> str | None:
    """What must stand beside the figures where frames are fewer than features, in one line."""
    few = [one for one in sets if one.rank_deficient]
    if not few:
        return None
    fewest = min(one.frames for one in few)
    return (
        f"FID of {fewest} frames: no more than the features have numbers, so covariances are singular and "
        "the figure is biased upwards; read KID, or give more clips, and compare equal numbers of frames"
    )
