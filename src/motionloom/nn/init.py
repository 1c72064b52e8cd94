"""Initial weights from an explicit generator."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def init_linears(module: nn.Module, generator: torch.Generator) -> None:
    """Every linear layer below ``module``: weights of variance 1 / inputs, which keeps the scale of what goes
    through, and biases of zero. The generator's device must be the weights'."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.weight.normal_(std=part.in_features**-0.5, generator=generator)
            if part.bias is not None:
                part.bias.zero_()


@torch.no_grad()
def fill(value: float, *tensors: Tensor) -> None:
    """Set whole parameters to one value."""
    for tensor in tensors:
        tensor.fill_(value)
