"""How a recipe says that samples are guided."""

from __future__ import annotations

import math
from dataclasses import replace

from motionloom.config.recipe import Recipe
from motionloom.flow import FirstChannels, Guidance, Scales, Term


def recipe_guidance(recipe: Recipe, scale: float | None = None) -> Guidance:
    """The guidance of ``train.sample_cfg_*`` and ``guidance``.

    Args:
        scale: of the text, of sound as well as of video, where the user wants another.
    """
    train, more = recipe.train, recipe.guidance
    text = Term(train.sample_cfg_scale if scale is None else scale, train.sample_cfg_interval)
    skip, cross = Term(more.skip_scale, more.skip_interval), Term(more.cross_scale, more.cross_interval)
    conditions: dict[str, Term] = {one.condition: Term(one.scale, one.interval) for one in more.conditions}
    own = (more.audio_scale, more.audio_skip_scale, more.audio_cross_scale, more.audio_rescale)
    sound = Scales(
        text=_at(text, more.audio_scale if scale is None else None),
        skip=_at(skip, more.audio_skip_scale),
        cross=_at(cross, more.audio_cross_scale),
        conditions=conditions,
        rescale=train.sample_cfg_rescale if more.audio_rescale is None else more.audio_rescale,
    )
    channels = more.text_channels
    return Guidance(
        text.scale,
        train.sample_cfg_rescale,
        text.interval,
        skip=skip,
        skip_blocks=more.skip_blocks,
        cross=cross,
        conditions=conditions,
        audio=None if own == (None,) * 4 else sound,
        channels=None if channels is None else FirstChannels(channels, math.prod(recipe.model.patch)),
    )


def _at(term: Term, scale: float | None) -> Term:
    return term if scale is None else replace(term, scale=scale)
