"""The judge of a GAN loss: tells real clips from made ones by what the critic's blocks see of them.

Self-Forcing's third loss (2506.08009, sec. 3.3) after R3GAN (2501.05441): the critic is the trunk, and each
tapped block has a head, a learned question that looks at all of its tokens once.

Shapes: B batch, N tokens, D width of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from motionloom.backbones.base import Backbone
from motionloom.nn.init import fill, init_linears
from motionloom.nn.norms import rms_norm


class Head(nn.Module):
    """One question to a block's tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.question = nn.Parameter(torch.zeros(width))
        self.value = nn.Linear(width, width)
        self.word = nn.Linear(width, 1)

    def forward(self, x_BND: Tensor) -> Tensor:
        """(B,) how real."""
        x_BND = rms_norm(x_BND.float())
        share_BN = torch.softmax(x_BND @ self.question, dim=1)
        pooled_BD = (share_BN[..., None] * self.value(x_BND)).sum(dim=1)
        return self.word(nn.functional.silu(pooled_BD))[:, 0]


class Judge(nn.Module):
    """Heads on some blocks of a trunk.

    Args:
        width: of the trunk's tokens.
        blocks: indices of the tapped blocks; empty: at a half, at three quarters, and the last.
        depth: how many blocks the trunk has.
    """

    def __init__(self, width: int, depth: int, blocks: Sequence[int] = ()) -> None:
        super().__init__()
        self.blocks = tuple(blocks) or default_blocks(depth)
        self.heads = nn.ModuleList(Head(width) for _ in self.blocks)

    def init_weights(self, generator: torch.Generator) -> None:
        """Every weight anew."""
        init_linears(self, generator)
        fill(0.0, *(head.question for head in self.heads if isinstance(head, Head)))

    def forward(self, features: Mapping[int, Tensor]) -> Tensor:
        """(B,) the mean of the heads' words; features by block."""
        words = [head(features[i]) for i, head in zip(self.blocks, self.heads, strict=True)]
        return torch.stack(words).mean(dim=0)


def default_blocks(depth: int) -> tuple[int, ...]:
    """A half, three quarters and the last, as Self-Forcing taps 13, 21 and 29 of 30."""
    return tuple(sorted({max(0, depth // 2 - 1), max(0, 3 * depth // 4 - 1), depth - 1}))


@contextmanager
def tapped(trunk: Backbone, blocks: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """What the blocks of a trunk leave in the forward passes inside, (B, N, D) by block."""
    found: dict[int, Tensor] = {}

    def keep(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[index] = _tokens(output)

        return hook

    parts = trunk.blocks()
    handles = [parts[i].register_forward_hook(keep(i)) for i in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _tokens(output: Any) -> Tensor:
    """The tokens among what a block gives: of several streams the one with most numbers."""
    if isinstance(output, Tensor):
        return output
    parts = list(output.values()) if isinstance(output, Mapping) else list(output)
    kinds = Tensor | Mapping | tuple | list
    streams = [_tokens(part) for part in parts if isinstance(part, kinds) and len(part)]
    assert streams, "a block that gives no tokens cannot be tapped"
    return max(streams, key=Tensor.numel)
