"""How the attention of a recipe will be computed: the ways, how long each takes here, and what is left to do.

One clip of the recipe's largest size is laid out by its plan, as training would. Shapes as in
``plans/layout.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from motionloom.backbones import ATTENTIONS
from motionloom.config.recipe import Recipe
from motionloom.nn.attention import CHOICES, Pattern
from motionloom.nn.attention.choice import best
from motionloom.nn.attention.dispatch import problem, trial, ways
from motionloom.plans import NOTHING, Geometry, Plan, Sample, Text, Values, join_attributes, to_streams
from motionloom.plans.lower import lower

SCENES = 3
"""Scenes of the clip, where a plan has scenes."""
AFFORDABLE_FLOPS = 4e9
"""A forward pass of more is measured on fewer heads, ..."""
MOST_FLOPS = 1.2e10
"""... or, if one head alone needs more than this, not at all."""


def attention_rows(
    recipe: Recipe, plan: Plan, grid: tuple[int, int, int], backbone: nn.Module
) -> list[dict[str, Any]]:
    """One row for each kind of attention of the backbone.

    Args:
        grid: (frames, rows, columns) of tokens.

    Returns:
        ``queries``, ``keys``, the share of pairs ``seen``, ``gflop`` of the forward pass over the seen pairs
        with all heads and one sample, the ``way`` taken, and ``milliseconds`` of each way with
        ``heads_measured`` heads, the backward pass included.
    """
    with torch.random.fork_rng(devices=[]):
        streams, visibility = _clip(recipe, plan, grid)
    rows = []
    for name, sides in ATTENTIONS[recipe.model.type].items():
        q, k = (join_attributes([streams[modality].attributes for modality in side]) for side in sides)
        row: dict[str, Any] = {"attention": name, "queries": q.scene_BN.shape[1], "keys": k.scene_BN.shape[1]}
        rows.append(row | _row(lower(visibility, q, k), row["queries"] * row["keys"], recipe, backbone))
    return rows


def _clip(recipe: Recipe, plan: Plan, grid: tuple[int, int, int]) -> tuple[Mapping[str, Any], Any]:
    frames, tokens = grid[0], grid[1] * grid[2]
    scenes = min(SCENES, frames) if recipe.of_shots else 1
    scene_F = torch.arange(frames) * scenes // frames
    times_F = torch.arange(frames + 1.0)
    geometry = Geometry(
        grid,
        torch.zeros(1, frames),
        (1.0, 1.0),
        scene_F[None],
        1,
        span_BF2=torch.stack([times_F[:-1], times_F[1:]], dim=1)[None],
        scenes=scenes,
    )
    words = scenes * recipe.text_encoder.max_length
    scene_L = torch.arange(words) * scenes // words
    text = Text(torch.zeros(1, words, 1), torch.ones(1, words, dtype=torch.bool), scene_L[None])
    layout = plan.layout(Sample({"video": geometry}), text, NOTHING)
    track, nothing = layout.tracks["video"], {"video": torch.zeros(1, frames, tokens, 1)}
    levels = {"video": track.sigmas(torch.zeros(1, track.num_draws))}
    return to_streams(layout, Values(nothing), nothing, levels, text, lambda x, *_: x), layout.visibility


def _row(
    pattern: Pattern | torch.Tensor | None, pairs: int, recipe: Recipe, backbone: nn.Module
) -> dict[str, Any]:
    heads, channels = _heads(recipe, backbone)
    seen, way, times, measured = 1.0, "no mask", {}, 0
    if isinstance(pattern, torch.Tensor):
        seen = float((pattern == 0 if pattern.is_floating_point() else pattern).float().mean())
        way = "dense: too small to choose" if seen < 1 else "no mask"
    elif pattern is not None and not pattern.plan.nothing_hidden:
        seen = pattern.plan.density
        of_head = 4 * seen * pairs * channels
        measured = min(heads, max(int(AFFORDABLE_FLOPS / of_head), int(of_head <= MOST_FLOPS)))
        way = "measured at the first step: too large to try here"
        if measured:
            times = _times(pattern, measured, channels, recipe)
            way = best(times)
    return {
        "seen": round(seen, 4),
        "gflop": round(4 * seen * pairs * heads * channels / 1e9, 3),
        "way": way,
        "milliseconds": {name: round(1e3 * t, 2) for name, t in times.items()},
        "heads_measured": measured,
    }


def _times(pattern: Pattern, heads: int, channels: int, recipe: Recipe) -> dict[str, float]:
    plan, dtype = pattern.plan, torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    q, k, v = (
        torch.zeros(1, n, heads, channels, dtype=dtype).transpose(1, 2)
        for n in (plan.queries, plan.keys, plan.keys)
    )
    key = problem(plan, q, True)
    CHOICES.pick(key, ways(plan, q, True), lambda way: trial(plan, way, q, k, v, True), q.device)
    times = CHOICES.measured(key)
    assert times is not None
    return times


def _heads(recipe: Recipe, backbone: Any) -> tuple[int, int]:
    """(heads, channels of a head)."""
    if recipe.model.imported:
        return int(backbone.sizes.num_attention_heads), int(backbone.sizes.attention_head_dim)
    return recipe.model.num_heads, recipe.model.dim // recipe.model.num_heads
