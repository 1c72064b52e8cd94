"""Chunks from a cache against recomputing the prefix: how many times faster a clip is generated.

    python benchmarks/attention_cases/chunks.py --json

A small model of Wan's shape, random weights, 21 latent frames, 4 Euler steps per chunk. Cached: four passes
over the chunk and a clean one that writes its keys. Recomputed: every step runs the clean past and the chunk
through the network again, under the causal mask. Both come out of ``generate.rollout``; ``difference`` is the
largest between the two clips, relative to the largest latent.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from _measure import DEVICE, ratio, report, turns
from torch import Tensor, nn

from motionloom.backbones.base import Backbone
from motionloom.backbones.prediction import Predictor
from motionloom.backbones.wan import Wan, WanSizes
from motionloom.generate import Sampling, rollout
from motionloom.nn.memory import keep_freed_memory
from motionloom.plans import Chunks, Geometry, Given, Streams, Text, Visibility
from motionloom.rng import torch_generator

FRAMES, ROWS, COLUMNS = 21, 8, 8
WORDS, STEPS, ROUNDS = 64, 4, 3
SIZES = WanSizes(
    num_attention_heads=4, attention_head_dim=64, num_layers=3, ffn_dim=1024, text_dim=128, freq_dim=256
)


class WithoutCache(nn.Module):
    """The same backbone, to a rollout that does not know that it could cache."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone, self.patch = backbone, backbone.patch

    def forward(self, streams: Streams, visibility: Visibility) -> dict[str, Tensor]:
        return self.backbone(streams, visibility)

    def blocks(self) -> list[nn.Module]:
        return self.backbone.blocks()


def make_backbone() -> Wan:
    """Random weights that answer neither zero nor the same to everything."""
    backbone = Wan(SIZES)
    generator = torch_generator("benchmark")
    backbone.init_weights(generator)
    for parameter in backbone.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return backbone.eval().to(DEVICE)


def make_runs(chunk: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """(cached, recomputed): each generates the clip, (1, F, S, C)."""
    backbone = make_backbone()
    generator = torch_generator("benchmark clip", device=DEVICE)
    text = Text(
        torch.randn(1, WORDS, SIZES.text_dim, generator=generator, device=DEVICE),
        torch.ones(1, WORDS, dtype=torch.bool, device=DEVICE),
        torch.zeros(1, WORDS, dtype=torch.long, device=DEVICE),
    )
    geometry = Geometry(
        grid=(FRAMES, ROWS, COLUMNS),
        seconds_BF=torch.arange(FRAMES, device=DEVICE)[None] / 4.0,
        pixels_per_cell=(16.0, 16.0),
        scene_BF=torch.zeros(1, FRAMES, dtype=torch.long, device=DEVICE),
        batch=1,
    )
    shape = (1, FRAMES, ROWS * COLUMNS, 4 * SIZES.out_channels)
    noise_BFSC = torch.randn(shape, generator=generator, device=DEVICE)
    plan, sampling = Chunks(chunk), Sampling(steps=STEPS, shift=5.0)

    def cached() -> Tensor:
        return rollout(Predictor(backbone), plan, geometry, text, noise_BFSC, sampling)

    def recomputed() -> Tensor:
        predictor = Predictor(WithoutCache(backbone))
        made_BFSC = noise_BFSC[:, :0]
        for frames in plan.stages(geometry):
            prefix = slice(0, frames.stop)
            given_BF = torch.arange(frames.stop, device=DEVICE)[None] < frames.start
            given = Given(torch.cat([made_BFSC, noise_BFSC[:, frames]], dim=1), given_BF)
            noise = noise_BFSC[:, prefix]
            made_BFSC = rollout(predictor, plan, geometry.part(prefix), text, noise, sampling, given=given)
        return made_BFSC

    return cached, recomputed


def case(chunk: int) -> dict[str, Any]:
    """One row of figures."""
    cached, recomputed = make_runs(chunk)
    a, b = cached(), recomputed()
    difference = (a - b).abs().max() / b.abs().max()
    taken = turns({"cached": cached, "recomputed": recomputed}, ROUNDS)
    return {
        "backbone": "wan",
        "frames_of_a_chunk": chunk,
        "speedup": ratio(taken, "recomputed", "cached"),
        "cached_s": round(statistics.median(taken["cached"]), 3),
        "recomputed_s": round(statistics.median(taken["recomputed"]), 3),
        "difference": float(f"{difference.item():.1e}"),
    }


def main() -> None:
    keep_freed_memory()
    report([case(chunk) for chunk in (3, 1)], __doc__)


if __name__ == "__main__":
    main()
