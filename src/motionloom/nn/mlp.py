"""The feed-forward layer.

Shapes: D channels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """Linear, squared ReLU, Linear.

    Squared ReLU is what the search of Primer (arXiv 2109.08668) put in GELU's place; it needs no exponential,
    which on a CPU is a twentieth of a whole training step.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.down(F.relu(self.up(x)).square())
