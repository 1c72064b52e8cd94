"""Where in the picture a token stands, added to the token itself.

Rotary positions only tell tokens apart from each other; within windows not even that reaches across the
picture. This is the global half. Time has none, so that a stream may go on for ever.

Shapes: B batch, N tokens, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from motionloom.nn.rope import SPACE

PER_AXIS = 16


class PlaceEmbedding(nn.Module):
    """Pixels from the top left corner -> D channels, through sines and cosines at the band of ``SPACE``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(4 * PER_AXIS, dim)

    def forward(self, pixels_BN2: Tensor) -> Tensor:
        """(B, N, 2) pixels down and right -> (B, N, D)."""
        angle_BNX = (pixels_BN2[..., None] * SPACE.frequencies(PER_AXIS).to(pixels_BN2.device)).flatten(-2)
        features_BNX = torch.cat([angle_BNX.cos(), angle_BNX.sin()], dim=-1)
        return self.project(features_BNX.to(self.project.weight.dtype))
