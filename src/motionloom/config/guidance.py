"""The recipe's section for guidance beside the text's own, which is ``train.sample_cfg_*``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from motionloom.config.section import Fraction, NotNegative, Positive, Section

Scale = Annotated[float, Field(ge=0)]
Interval = tuple[Fraction, Fraction]


class ConditionScale(Section):
    """Guidance on one condition: away from the clip that would be made without it."""

    condition: Literal[
        "first_frame",
        "last_frame",
        "keyframes",
        "prefix",
        "suffix",
        "spatial_crop",
        "mask",
        "reference",
        "scene",
        "modality",
    ]
    scale: Scale = Field(description="1 is none.")
    interval: Interval = Field(default=(0.0, 1.0), description="Noise levels between which it acts.")


class GuidanceConfig(Section):
    """More directions of guidance for samples. Each costs one more forward per step where it acts."""

    skip_scale: Scale = Field(default=0.0, description="Away from self-attention left out; 0 is none.")
    skip_blocks: tuple[NotNegative, ...] = Field(default=(), description="Blocks that leave it out, from 0.")
    skip_interval: Interval = (0.0, 1.0)
    cross_scale: Scale = Field(default=1.0, description="Sound and picture towards each other; 1 is none.")
    cross_interval: Interval = (0.0, 1.0)
    conditions: tuple[ConditionScale, ...] = Field(default=(), description="Guidance on conditions.")
    audio_scale: Scale | None = Field(default=None, description="Of the text for sound; none: the video's.")
    audio_skip_scale: Scale | None = None
    audio_cross_scale: Scale | None = None
    audio_rescale: Fraction | None = None
    text_channels: Positive | None = Field(
        default=None,
        description="Guidance of the text acts on so many channels of a latent, the first; none: on all.",
    )
