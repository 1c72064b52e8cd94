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
        # A cache of one clip holds none out.
        unseen = parts.heldout if len(parts.heldout) else parts.loader
        prompts = recipe.train.sample_prompts or tuple(" ".join(c) for c in unseen.batch(0).captions)
        self._prompts = prompts[: recipe.train.sample_num_images]

    def __call__(self, step: int, raw: Weights, ema: Weights | None) -> None:
        weights = {"raw": raw}
        if ema is not None and self._parts.recipe.ema.use_for_sampling:
            weights["ema"] = ema
        model = self._parts.model()
        request = ClipRequest(self._prompts, seed=self._parts.recipe.train.sample_seed)
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
