"""Samples while training: one sheet per due step, from the raw and from the averaged weights."""

from __future__ import annotations

from pathlib import Path

from motionloom.cli.assemble import Parts
from motionloom.data.sheets import contact_sheet
from motionloom.generate import ClipRequest, generate_clips, recipe_sampling
from motionloom.train.loop import Weights


class Previews:
    """An ``on_sample`` for the trainer. Its noise has keys of its own, so it cannot change the training."""

    def __init__(self, parts: Parts, run_dir: Path) -> None:
        self._parts, self._folder = parts, run_dir / "samples"
        recipe = parts.recipe
        prompts = recipe.train.sample_prompts or tuple(
            caption for batch in [parts.heldout.batch(0)] for caption, *_ in batch.captions
        )
        self._prompts = prompts[: recipe.train.sample_num_images]

    def __call__(self, step: int, raw: Weights, ema: Weights | None) -> None:
        weights = {"raw": raw}
        if ema is not None and self._parts.recipe.ema.use_for_sampling:
            weights["ema"] = ema
        model = self._parts.model()
        height, width, frames = self._size()
        request = ClipRequest(
            tuple(self._prompts), frames, height, width, seed=self._parts.recipe.train.sample_seed
        )
        for name, applied in weights.items():
            with applied():
                clips = list(generate_clips(model, request, recipe_sampling(self._parts.recipe)))
            if self._parts.ranks.is_main:
                self._folder.mkdir(parents=True, exist_ok=True)
                contact_sheet(
                    [clip.numpy() for clip in clips],
                    list(self._prompts),
                    self._folder / f"step_{step:08d}_{name}.png",
                )

    def _size(self) -> tuple[int, int, int]:
        """The recipe's clip, or its first bucket."""
        recipe = self._parts.recipe
        width, height = recipe.video.width, recipe.video.height
        if recipe.bucketing.enabled:
            width, height = recipe.bucketing.buckets[0]
        return height, width, recipe.video.num_frames
