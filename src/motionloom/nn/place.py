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


def grid_sines(cell_BN2: Tensor, dim: int, theta: float = 1e4) -> Tensor:
    """Fixed positions of cells (row, column): sines and cosines of the column, then those of the row, a
    quarter of the channels each (MAE, arXiv 2111.06377; DiT, arXiv 2212.09748).

    Returns:
        (B, N, D), float64 (float32 on devices without it); channels that do not divide by four are 0.
    """
    dtype = torch.float32 if cell_BN2.device.type == "mps" else torch.float64
    quarter = dim // 4
    rates = theta ** -(torch.arange(quarter, dtype=dtype, device=cell_BN2.device) / quarter)
    row_BNX, column_BNX = (cell_BN2[..., None] * rates).unbind(-2)
    waves = [column_BNX.sin(), column_BNX.cos(), row_BNX.sin(), row_BNX.cos()]
    return torch.nn.functional.pad(torch.cat(waves, dim=-1), (0, dim - 4 * quarter))
