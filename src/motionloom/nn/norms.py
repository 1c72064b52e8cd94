"""Normalisation.

Shapes: D channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motionloom.nn.init import fill

EPS = 1e-6
"""Stated, because torch's default follows the input's dtype and is 0.008 in bfloat16."""


def rms_norm(x: Tensor) -> Tensor:
    """x over its root mean square along the last dimension (arXiv 1910.07467), without parameters."""
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


class HeadNorm(nn.Module):
    """RMS norm of the queries and keys of each head, with one gain per channel (arXiv 2010.04245).

    Bounds the logits, so that attention cannot collapse in low precision (arXiv 2302.05442). The gain stands
    on the queries alone: only its product with the keys' counts, and a second one would cost another sum over
    all tokens in the backward pass.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(head_dim))

    def init_weights(self) -> None:
        fill(1.0, self.gain)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """(..., D) each."""
        return rms_norm(q) * self.gain, rms_norm(k)
