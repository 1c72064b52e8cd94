"""Time in a VTP model, which the released ones do not have: groups of frames, and a look back.

The first frame of a clip stands alone and is coded as an image is. Behind it, ``temporal_patch`` frames are a
latent frame. With ``temporal_window`` w a token also sees the tokens at its own place of the w latent frames
before its own, and none behind: a clip can be coded and decoded while it arrives, from a memory of w frames.

Shapes: B clips, F latent frames, T frames of a group, N tokens of a latent frame, D width, H heads, E numbers
of a head; p side of a patch, h x w grid, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from motionloom.nn.attention import attend
from motionloom.nn.init import fill
from motionloom.tokenizers.vtp.layers import NORMS

Past = tuple[Tensor, Tensor]
"""Keys and values of the latent frames before, (B * N, H, w, E) each."""


def groups(x_BP3HW: Tensor, frames: int, side: int) -> tuple[Tensor, Tensor | None]:
    """Patches of the first frame (B, 1, h, w, 3 p p) and of the groups (B, F - 1, h, w, T 3 p p); the latter
    None for an image."""
    cut = x_BP3HW.unflatten(4, (-1, side)).unflatten(3, (-1, side)).permute(0, 1, 3, 5, 2, 4, 6)
    first = cut[:, :1].flatten(4)  # B P h w 3 p p
    if cut.shape[1] == 1:
        return first, None
    later = cut[:, 1:].unflatten(1, (-1, frames)).permute(0, 1, 3, 4, 2, 5, 6, 7)
    return first, later.flatten(4)


def ungroup(patches_BFhwD: Tensor, frames: int, side: int) -> Tensor:
    """(B, F, h, w, T 3 p p) -> (B, F * T, 3, H, W)."""
    x = patches_BFhwD.unflatten(4, (frames, 3, side, side)).permute(0, 1, 4, 5, 2, 6, 3, 7)
    return x.flatten(6, 7).flatten(4, 5).flatten(1, 2)


class LookBack(nn.Module):
    """Attention of every token to its own place in the latent frames before; adds nothing at the start.

    How far back a key lies is told by a bias per head and distance (as T5, arXiv 1910.10683), so that no
    number grows with the film.
    """

    def __init__(self, width: int, heads: int, window: int, norm: str) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.norm = NORMS[norm](width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.distance = nn.Parameter(torch.zeros(heads, window + 1))

    def init_start(self) -> None:
        """What it adds is 0, so that a model starts as the one without it."""
        fill(0.0, self.proj.weight, self.proj.bias, self.distance)

    def forward(self, x_BFND: Tensor, past: Past | None = None) -> tuple[Tensor, Past]:
        """What it adds, (B, F, N, D), and what to hand it with the frames that follow.

        Args:
            past: of the frames before these; none: these are the first.
        """
        b, f, n = x_BFND.shape[:3]
        qkv = self.qkv(self.norm(x_BFND)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(3, 0, 2, 4, 1, 5).flatten(1, 2)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        bias_HFK = self._bias(f, k.shape[2] - f)
        mixed = attend(q, k, v, bias_HFK)
        added = self.proj(mixed.unflatten(0, (b, n)).permute(0, 3, 1, 2, 4).flatten(3))
        return added, (k[:, :, -self.window :], v[:, :, -self.window :])

    def _bias(self, frames: int, before: int) -> Tensor:
        """(H, F, before + F): by how many frames a key lies back; -inf where it is out of reach."""
        device = self.distance.device
        query = torch.arange(before, before + frames, device=device)[:, None]
        back = query - torch.arange(before + frames, device=device)
        seen = (back >= 0) & (back <= self.window)
        bias_HFK = self.distance[:, back.clamp(0, self.window)]
        return torch.where(seen, bias_HFK, float("-inf"))
