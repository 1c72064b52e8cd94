"""What pulls a student towards its teacher's distribution, as pure functions of clean estimates.

Every function takes the tokens of one modality and gives one number per sample: a mean over tokens that
count and over channels. ``made``, the student's clip; ``real`` and ``fake``, what teacher and critic take for
clean at a noised copy of it.

Shapes: B batch, F token frames, S cells of a frame, C channels.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

LEAST = 1e-6
"""Distances below this do not divide."""


def mean(values_BFSC: Tensor, weight_BFS: Tensor) -> Tensor:
    """(B,) weighted mean over tokens, and over channels; 0 where no token counts."""
    weight_BFS = weight_BFS.expand(values_BFSC.shape[:-1])
    total_B = weight_BFS.sum(dim=(1, 2)).clamp_min(LEAST)
    return (values_BFSC.float().mean(dim=-1) * weight_BFS).sum(dim=(1, 2)) / total_B


def distance(made_BFSC: Tensor, real_BFSC: Tensor, weight_BFS: Tensor) -> Tensor:
    """mean |made - real| of each sample, (B, 1, 1, 1): what DMD divides by (2311.18828, eq. 8)."""
    return mean((made_BFSC - real_BFSC).abs(), weight_BFS).clamp_min(LEAST)[:, None, None, None]


def dmd(
    made_BFSC: Tensor, real_BFSC: Tensor, fake_BFSC: Tensor, weight_BFS: Tensor, *, normalise: bool = True
) -> Tensor:
    """Distribution matching (2311.18828): a loss whose gradient by ``made`` is (fake - real) / distance.

    At one noise level the two clean estimates differ by the difference of the scores, times a positive
    factor. The gradient of the mean over samples of this is that over B x numbers that count.
    """
    made, real, fake = (t.float() for t in (made_BFSC, real_BFSC, fake_BFSC))
    with torch.no_grad():
        pull = fake - real
        if normalise:
            pull = pull / distance(made, real, weight_BFS)
    # The published (made - [made - pull])^2 / 2 in value and gradient, without its rounding.
    return mean((made - made.detach()) * pull + 0.5 * pull.square(), weight_BFS)


def sid(
    made_BFSC: Tensor,
    real_BFSC: Tensor,
    fake_BFSC: Tensor,
    weight_BFS: Tensor,
    *,
    alpha: float = 1.0,
    normalise: bool = True,
) -> Tensor:
    """Score identity distillation (Zhou et al., 2404.04057): (real - fake) ((real - made) - alpha (real -
    fake)), divided by the distance. Gradients flow through both estimates."""
    made, real, fake = (t.float() for t in (made_BFSC, real_BFSC, fake_BFSC))
    apart = real - fake
    value = apart * ((real - made) - alpha * apart)
    if normalise:
        with torch.no_grad():
            divide = distance(made, real, weight_BFS)
        value = value / divide
    return mean(value, weight_BFS)


GanForm = Literal["softplus", "relativistic"]


def gan_student(fake_B: Tensor, real_B: Tensor, form: GanForm) -> Tensor:
    """What a student loses by being told apart: non-saturating (Goodfellow et al., 1406.2661), or by pairs
    (Jolicoeur-Martineau, 1807.00734)."""
    return softplus(-fake_B) if form == "softplus" else softplus(real_B - fake_B)


def gan_judge(fake_B: Tensor, real_B: Tensor, form: GanForm) -> Tensor:
    """What a judge loses by not telling clips apart."""
    if form == "softplus":
        return softplus(fake_B) + softplus(-real_B)
    return softplus(fake_B - real_B)


def steepness(word_B: Tensor, moved_B: Tensor, step: float) -> Tensor:
    """(B,) squared slope of a judge, from its words on a clip and on the clip moved by ``step`` x a standard
    normal direction.

    The expectation is the squared norm of the gradient, R1 and R2's penalty, up to O(step); no second
    derivative is taken (APT, Lin et al., 2501.08316, sec. 3.3).
    """
    return ((moved_B - word_B) / step).square()
