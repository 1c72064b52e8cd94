"""Feed-forward layers: the own backbones', and those that published weights are named after.

Shapes: D channels.
"""

from __future__ import annotations

from collections import OrderedDict

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


class FeedForward(nn.Module):
    """Linear, GELU, Linear, with diffusers' names of weights: ``net.0.proj`` and ``net.2``."""

    def __init__(
        self, inputs: int, hidden: int, outputs: int, *, bias: bool = True, approximate: str = "tanh"
    ) -> None:
        super().__init__()
        up, down = GELULinear(inputs, hidden, bias, approximate), nn.Linear(hidden, outputs, bias=bias)
        # What diffusers has between the two is a dropout, without weights.
        self.net = nn.Sequential(OrderedDict({"0": up, "2": down}))

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        return self.net(x)


class GELULinear(nn.Module):
    """Linear, GELU."""

    def __init__(self, inputs: int, outputs: int, bias: bool, approximate: str) -> None:
        super().__init__()
        self.approximate = approximate
        self.proj = nn.Linear(inputs, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        return F.gelu(self.proj(x), approximate=self.approximate)


class Embedder(nn.Module):
    """Linear, an activation, Linear, with diffusers' names of weights: ``linear_1`` and ``linear_2``."""

    def __init__(self, inputs: int, outputs: int, activation: nn.Module) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inputs, outputs)
        self.activation = activation
        self.linear_2 = nn.Linear(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        return self.linear_2(self.activation(self.linear_1(x)))
