"""What every token backbone begins and ends with: embedding, noise, blocks in a row, prediction.

Shapes: B batch, N tokens, M tokens looked at, L text tokens, K noise levels, P parts of the modulation,
D width, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from motionloom.config.recipe import ModelConfig
from motionloom.nn.init import fill
from motionloom.nn.modulation import per_token
from motionloom.nn.norms import rms_norm
from motionloom.nn.place import PlaceEmbedding
from motionloom.plans.stream import Attributes, Stream
from motionloom.plans.visibility import Visibility

T = TypeVar("T")


class Entry(nn.Module):
    """Latents and words -> tokens of width D and scale 1."""

    def __init__(self, token_channels: int, text_dim: int, dim: int) -> None:
        super().__init__()
        self.video = nn.Linear(token_channels, dim)
        self.place = PlaceEmbedding(dim)
        self.text = nn.Linear(text_dim, dim)

    def forward(self, video: Stream, text: Stream) -> tuple[Tensor, Tensor]:
        """(B, N, D) and (B, L, D), in the dtype of the weights, which under autocast is the residual's."""
        batch = max(video.x_BNC.shape[0], text.x_BNC.shape[0], video.sigma_BK.shape[0])
        return self.pictures(video, batch), self.words(text, batch)

    def pictures(self, video: Stream, batch: int) -> Tensor:
        """The video alone, (B, N, D)."""
        dtype = self.video.weight.dtype
        x_BND = self.video(video.x_BNC.to(dtype)) + self.place(video.position_BN3[..., 1:])
        return x_BND.to(dtype).expand(batch, -1, -1)

    def words(self, text: Stream, batch: int) -> Tensor:
        """The text alone, (B, L, D)."""
        dtype = self.video.weight.dtype
        # Text encoders differ in scale by orders of magnitude.
        return self.text(rms_norm(text.x_BNC.to(dtype))).to(dtype).expand(batch, -1, -1)


class Exit(nn.Module):
    """Tokens -> the prediction; zero at the start."""

    def __init__(self, dim: int, token_channels: int) -> None:
        super().__init__()
        self.out = nn.Linear(dim, token_channels)

    def init_weights(self) -> None:
        fill(0.0, self.out.weight, self.out.bias)

    def forward(self, x_BND: Tensor, modulation_BK2D: Tensor, one_hot_BNK: Tensor | None) -> Tensor:
        """(B, N, D) -> (B, N, C), shifted and scaled by each token's noise level."""
        shift, scale = per_token(modulation_BK2D, one_hot_BNK)
        return self.out(modulate(x_BND, shift, scale))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalised, scaled and shifted: adaLN."""
    return rms_norm(x) * (1 + scale) + shift


class Dropout:
    """Masks for the feed-forward branch of each block, drawn from a generator that training sets.

    Handed to the block as a tensor: nothing draws from a global generator, and recomputed or compiled blocks
    see the same mask.
    """

    def __init__(self, p: float) -> None:
        self.p = p
        self.generator: torch.Generator | None = None
        """Set before each training step of a model with dropout."""

    def draw(self, x: Tensor, training: bool) -> Tensor | None:
        """0 or 1 / (1 - p) for each element of ``x``; None when nothing is dropped."""
        if not training or self.p == 0:
            return None
        assert self.generator is not None, "training with dropout: set backbone.dropout.generator first"
        mask = torch.empty(x.shape, device=self.generator.device)
        return mask.bernoulli_(1 - self.p, generator=self.generator).div_(1 - self.p).to(x.device)


def sees_any(
    visibility: Visibility, queries: Attributes, keys: Attributes, valid_BM: Tensor | None
) -> Tensor | None:
    """Whether a query sees any key at all, (B, N or 1, 1); None if all of them do.

    Attention must look somewhere: a query that may see nothing is shown everything, and its answer is to be
    left out.
    """
    if visibility.unrestricted:
        return None if valid_BM is None else valid_BM.any(dim=1)[:, None, None]
    seen_BNM = visibility.allows(queries.queries(), keys.keys())
    if valid_BM is not None:
        seen_BNM = seen_BNM & valid_BM[:, None, :]
    return seen_BNM.any(dim=2, keepdim=True)


def run_blocks(
    blocks: Sequence[nn.Module], x: T, inputs: Iterable[tuple[Any, ...]], config: ModelConfig
) -> T:
    """``x`` through all blocks, each with its own further inputs; recomputed in the backward pass if the
    config says so."""
    for block, extra in zip(blocks, inputs, strict=True):
        if config.checkpoint_blocks and torch.is_grad_enabled():
            x = checkpoint(block, x, *extra, use_reentrant=False, preserve_rng_state=False)
        else:
            x = block(x, *extra)
    return x


def run_cached(
    blocks: Sequence[nn.Module], x: T, inputs: Iterable[tuple[Any, ...]], recompute: bool
) -> tuple[T, list[Any]]:
    """:func:`run_blocks` for blocks that are given their past and answer (x, what is to be kept of them)."""
    kept = []
    for block, extra in zip(blocks, inputs, strict=True):
        if recompute and torch.is_grad_enabled():
            x, own = checkpoint(block, x, *extra, use_reentrant=False, preserve_rng_state=False)
        else:
            x, own = block(x, *extra)
        kept.append(own)
    return x, kept
