"""VTP's encoder (trunk) and pixel decoder.

Shapes: B clips, P pixel frames, H x W pixels; F latent frames, h x w grid, N = h * w tokens; D width, C
latent channels. An image is a clip of one frame.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motionloom.errors import UserError
from motionloom.nn.init import fill
from motionloom.tokenizers.vtp.config import VTPConfig
from motionloom.tokenizers.vtp.layers import (
    NORMS,
    Block,
    Drop,
    Neighbours,
    Rope,
    RopePrecision,
    Start,
    Tables,
    init_layers,
)
from motionloom.tokenizers.vtp.temporal import LookBack, Past, groups, ungroup


@dataclass(frozen=True)
class Features:
    """What the encoder finds, behind its last norm and before the bottleneck."""

    cls_BFD: Tensor
    """One vector for each latent frame."""
    patches_BFND: Tensor
    grid: tuple[int, int]

    @property
    def clip_BD(self) -> Tensor:
        """One vector for a clip: the mean over its latent frames."""
        return self.cls_BFD.mean(dim=1)

    def of(self, rows: Tensor) -> Features:
        """Those of some of the clips."""
        return Features(self.cls_BFD[rows], self.patches_BFND[rows], self.grid)


class PatchEmbed(nn.Module):
    """Patches of the first frame, and of the groups behind it by weights of their own."""

    def __init__(self, config: VTPConfig) -> None:
        super().__init__()
        self.side, self.frames = config.vision_patch_size, config.temporal_patch
        width = config.vision_embed_dim
        self.proj = nn.Conv2d(3, width, self.side, stride=self.side)
        self.later = nn.Linear(3 * self.frames * self.side**2, width) if self.frames > 1 else None

    def forward(self, x_BP3HW: Tensor) -> Tensor:
        """(B, P, 3, H, W) -> (B, F, h, w, D).

        Raises:
            UserError: sides or frames that do not divide, naming the nearest that do.
        """
        self._require(*x_BP3HW.shape[1:2], *x_BP3HW.shape[3:])
        if self.later is None:
            x = self.proj(x_BP3HW.flatten(0, 1)).unflatten(0, x_BP3HW.shape[:2])
            return x.movedim(2, -1)
        first, later = groups(x_BP3HW, self.frames, self.side)
        parts = [F.linear(first, self.proj.weight.flatten(1), self.proj.bias)]
        if later is not None:
            parts.append(self.later(later))
        return torch.cat(parts, dim=1)

    def _require(self, frames: int, height: int, width: int) -> None:
        for name, pixels in (("height", height), ("width", width)):
            if pixels < self.side or pixels % self.side:
                below = max(1, pixels // self.side) * self.side
                near = " or ".join(str(n) for n in sorted({below, below + self.side}))
                raise UserError(f"{name} {pixels} is no multiple of VTP's patch of {self.side}: use {near}")
        if self.frames > 1 and (frames - 1) % self.frames:
            below = (frames - 1) // self.frames * self.frames + 1
            near = f"{below} or {below + self.frames}"
            raise UserError(f"{frames} frames are not one and groups of {self.frames}: use {near}")


class Stack(nn.Module):
    """Blocks over each latent frame; before each a look back and a mixing of neighbours, where there are any.

    Subclasses name ``blocks``, ``look_back`` and ``neighbours``, so that the names of weights are the
    released ones.
    """

    blocks: nn.ModuleList
    look_back: nn.ModuleList | None
    neighbours: nn.ModuleList | None
    rope_embed: Rope

    def _walk(
        self, x_BFND: Tensor, grid: tuple[int, int], drop: Drop | None = None, past: list[Past] | None = None
    ) -> tuple[list[Tensor], list[Past]]:
        """The tokens behind each block, and what to go on from with the frames that follow."""
        tables = self.rope_embed.tables(*grid, x_BFND.device)
        frames = x_BFND.shape[1]
        behind, memory = [], []
        for n, block in enumerate(self.blocks):
            if self.look_back is not None:
                added, seen = self.look_back[n](x_BFND, None if past is None else past[n])
                memory.append(seen)
                x_BFND = x_BFND + added
            if self.neighbours is not None:
                x_BFND = x_BFND + self.neighbours[n](x_BFND, grid)
            x_BFND = self._in_frames(block, x_BFND, tables, drop).unflatten(0, (-1, frames))
            behind.append(x_BFND)
        return behind, memory

    @staticmethod
    def _in_frames(block: nn.Module, x_BFND: Tensor, tables: Tables, drop: Drop | None) -> Tensor:
        return block(x_BFND.flatten(0, 1), tables, drop)


def _look_back(config: VTPConfig, width: int, heads: int, depth: int, norm: str) -> nn.ModuleList | None:
    if not config.temporal_window:
        return None
    return nn.ModuleList(LookBack(width, heads, config.temporal_window, norm) for _ in range(depth))


def _neighbours(config: VTPConfig, width: int, depth: int) -> nn.ModuleList | None:
    if not config.conv_kernel:
        return None
    return nn.ModuleList(Neighbours(width, config.conv_kernel) for _ in range(depth))


def _init_options(*options: nn.ModuleList | None) -> None:
    """What no release has adds nothing at the start."""
    for layers in options:
        for layer in layers if layers is not None else ():
            assert isinstance(layer, LookBack | Neighbours)
            layer.init_start()


class Trunk(Stack):
    """The encoder: a ViT with a class token (arXiv 2512.13687, 3), and the bottleneck to the latent."""

    def __init__(self, config: VTPConfig, rope: RopePrecision = "bf16") -> None:
        super().__init__()
        width, heads, norm = config.vision_embed_dim, config.vision_num_heads, config.vision_norm_layer
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))
        self.patch_embed = PatchEmbed(config)
        self.rope_embed = Rope(width // heads, rope)
        self.blocks = nn.ModuleList(
            Block(
                width,
                heads,
                config.vision_mlp_ratio,
                norm,
                config.vision_init_values,
                config.vision_use_qk_norm,
            )
            for _ in range(config.vision_depth)
        )
        self.look_back = _look_back(config, width, heads, config.vision_depth, norm)
        self.neighbours = _neighbours(config, width, config.vision_depth)
        self.norm = NORMS[norm](width)
        self.feature_bottleneck = nn.Linear(width, config.vision_feature_bottleneck, bias=False)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator, start: Start) -> None:
        """As for a training from the start: see :func:`init_layers`; patches uniform as a convolution's."""
        init_layers(self, generator, start, len(self.blocks))
        bound = (3 * self.patch_embed.side**2) ** -0.5
        self.patch_embed.proj.weight.uniform_(-bound, bound, generator=generator)
        if self.patch_embed.later is not None:
            bound /= self.patch_embed.frames**0.5
            self.patch_embed.later.weight.uniform_(-bound, bound, generator=generator)
        self.cls_token.normal_(std=0.02, generator=generator)
        fill(0.0, self.mask_token)
        _init_options(self.look_back, self.neighbours)

    def forward(self, x_BP3HW: Tensor, mask_BFN: Tensor | None = None, drop: Drop | None = None) -> Features:
        """Features of clips in normalised pixels.

        Args:
            mask_BFN: True where a patch is hidden from the encoder.
            drop: stochastic depth, in training.

        Raises:
            UserError: sides or frames that do not divide.
        """
        tokens_BFMD, grid = self._tokens(x_BP3HW, mask_BFN)
        x = self.norm(self._walk(tokens_BFMD, grid, drop)[0][-1])
        return Features(x[:, :, 0], x[:, :, 1:], grid)

    def intermediate(self, x_BP3HW: Tensor, last: int, norm: bool) -> list[Features]:
        """Features behind each of the last blocks, the last one last."""
        tokens_BFMD, grid = self._tokens(x_BP3HW, None)
        behind = self._walk(tokens_BFMD, grid)[0][-last:]
        found = [self.norm(x) for x in behind] if norm else behind
        return [Features(x[:, :, 0], x[:, :, 1:], grid) for x in found]

    def _tokens(self, x_BP3HW: Tensor, mask_BFN: Tensor | None) -> tuple[Tensor, tuple[int, int]]:
        x_BFhwD = self.patch_embed(x_BP3HW)
        x_BFND = x_BFhwD.flatten(2, 3)
        front = self.cls_token.to(x_BFND.dtype)
        if mask_BFN is not None:
            x_BFND = torch.where(mask_BFN[..., None], self.mask_token.to(x_BFND.dtype), x_BFND)
        else:
            # It has a gradient, of 0, where nothing is hidden: data parallelism waits for one.
            front = front + 0 * self.mask_token
        front_BF1D = front[None].expand(*x_BFND.shape[:2], 1, -1)
        return torch.cat([front_BF1D, x_BFND], dim=2), (x_BFhwD.shape[2], x_BFhwD.shape[3])


@dataclass
class DecoderMemory:
    """Where a decoder of a film stands. ``begun``: the first frame, which stands alone, is behind it."""

    begun: bool = False
    past: list[Past] | None = field(default=None)


class PixelDecoder(Stack):
    """Latents to pixels: a ViT without a class token, and a linear layer per patch."""

    def __init__(self, config: VTPConfig, rope: RopePrecision = "bf16") -> None:
        super().__init__()
        width, heads, norm = config.decoder_embed_dim, config.decoder_num_heads, config.decoder_norm_layer
        self.side, self.frames = config.vision_patch_size, config.temporal_patch
        channels = config.vision_feature_bottleneck
        self.proj_in = nn.Conv2d(channels, width, 1)
        self.proj_in_later = nn.Linear(channels, width) if self.frames > 1 else None
        self.rope_embed = Rope(width // heads, rope)
        self.blocks = nn.ModuleList(
            Block(width, heads, 4.0, norm, config.decoder_init_values, config.decoder_use_qk_norm)
            for _ in range(config.decoder_depth)
        )
        self.look_back = _look_back(config, width, heads, config.decoder_depth, norm)
        self.neighbours = _neighbours(config, width, config.decoder_depth)
        self.norm = NORMS[norm](width)
        numbers = 3 * self.side**2
        self.proj_out = nn.Conv2d(width, numbers, 1)
        self.proj_out_later = nn.Linear(width, self.frames * numbers) if self.frames > 1 else None

    def init_weights(self, generator: torch.Generator, start: Start) -> None:
        """As for a training from the start: see :func:`init_layers`."""
        init_layers(self, generator, start, len(self.blocks))
        _init_options(self.look_back, self.neighbours)

    def forward(self, z_BFhwC: Tensor) -> Tensor:
        """Raw latents (B, F, h, w, C) -> normalised pixels (B, P, 3, H, W), not clamped."""
        return self.go_on(z_BFhwC, DecoderMemory())

    def go_on(self, z_BFhwC: Tensor, memory: DecoderMemory) -> Tensor:
        """The pixels of the latent frames that follow those of ``memory``, which is moved on."""
        grid = (z_BFhwC.shape[2], z_BFhwC.shape[3])
        alone = 0 if memory.begun or self.frames == 1 else 1
        x_BFhwD = self._in(z_BFhwC, alone)
        behind, past = self._walk(x_BFhwD.flatten(2, 3), grid, past=memory.past)
        x_BFhwD = self.norm(behind[-1]).unflatten(2, grid)
        memory.begun, memory.past = True, past if self.look_back is not None else None
        return self._out(x_BFhwD, alone)

    def _in(self, z: Tensor, alone: int) -> Tensor:
        first = F.linear(z, self.proj_in.weight.flatten(1), self.proj_in.bias)
        if self.proj_in_later is None:
            return first
        return torch.cat([first[:, :alone], self.proj_in_later(z[:, alone:])], dim=1)

    def _out(self, x: Tensor, alone: int) -> Tensor:
        if self.proj_out_later is None:
            return ungroup(F.linear(x, self.proj_out.weight.flatten(1), self.proj_out.bias), 1, self.side)
        parts = []
        if alone:
            first = F.linear(x[:, :1], self.proj_out.weight.flatten(1), self.proj_out.bias)
            parts.append(ungroup(first, 1, self.side))
        if x.shape[1] > alone:
            parts.append(ungroup(self.proj_out_later(x[:, alone:]), self.frames, self.side))
        return torch.cat(parts, dim=1)
