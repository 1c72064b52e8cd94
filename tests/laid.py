"""Clips of one modality, the video, laid out by a plan: what most tests of backbones and plans want."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from motionloom.config.conditions import FirstFrame, Scene
from motionloom.flow import LINEAR
from motionloom.plans import (
    NOTHING,
    Conditions,
    Geometry,
    Given,
    Layout,
    Plan,
    Sample,
    Streams,
    Text,
    TextToVideo,
    Track,
    Values,
    exactly,
    read_clip,
    to_streams,
    to_streams_at,
)
from motionloom.rng import torch_generator

# Toys gain nothing from threads, and lose much when other programs keep the cores busy.
torch.set_num_threads(1)

FIRST_FRAME = TextToVideo(Conditions((FirstFrame(),)))
"""Every clip has its first frame given."""
EXPAND = Conditions((Scene(),))
"""All scenes but the last are given."""


def frames_given(geometry: Geometry, given_BF: Tensor) -> Given:
    """Whole frames (B or 1, F) of the video, to the bit."""
    return Given({"video": exactly(geometry.per_token(given_BF))}) if given_BF.any() else NOTHING


def lay(plan: Plan, geometry: Geometry, text: Text, given: Given | Tensor | None = None) -> Layout:
    """Of the video alone; ``given``: None draws it, a tensor (B, F) names whole frames."""
    sample = Sample({"video": geometry}, fps=8.0)
    if given is None:
        given = plan.conditions.draw(sample, torch_generator("given"))
    if isinstance(given, Tensor):
        given = frames_given(geometry, given)
    return plan.layout(sample, text, given)


def stages(plan: Plan, geometry: Geometry) -> list[slice]:
    """The plan's, of the video alone."""
    return [stage["video"] for stage in plan.stages(Sample({"video": geometry}))]


def video(layout: Layout) -> Track:
    return layout.tracks["video"]


def levels_of(layout: Layout, sigma_BD: Tensor) -> Tensor:
    """The K noise levels of the video, of as many of these draws as it takes."""
    return video(layout).sigmas(sigma_BD[:, : video(layout).num_draws])


def noised(
    layout: Layout, clean_BFSC: Tensor, noise_BFSC: Tensor, sigma_BD: Tensor, text: Text
) -> dict[str, Any]:
    """The streams of a training step, from as many of these draws of sigma as the plan takes."""
    values, noise = Values({"video": clean_BFSC}), {"video": noise_BFSC}
    sigma = {"video": levels_of(layout, sigma_BD)}
    return dict(to_streams(layout, values, noise, sigma, text, LINEAR.mix))


def sampled(layout: Layout, clean_BFSC: Tensor, x_BFSC: Tensor, sigma_BK: Tensor, text: Text) -> Streams:
    """The streams of a sampler at the state ``x``."""
    x, sigma = {"video": x_BFSC}, {"video": sigma_BK}
    return to_streams_at(layout, Values({"video": clean_BFSC}), x, x, sigma, text, LINEAR.mix)


def read_video(layout: Layout, out: Tensor | Mapping[str, Tensor]) -> Tensor:
    """The clip (B, F, S, C) of a backbone's answer."""
    return read_clip(layout, "video", out if isinstance(out, Tensor) else out["video"])
