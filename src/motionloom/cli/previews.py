"""Samples while training: one sheet per due step, from the raw and from the averaged weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from motionloom.cli.assemble import Parts
from motionloom.config.request import Request, parse_request, read_request
from motionloom.data.sheets import contact_sheet
from motionloom.generate import Clip, Model
from motionloom.requests import Prepared, prepare, written
from motionloom.train.loop import Weights


class Previews:
    """An ``on_sample`` for the trainer. Its noise has keys of its own, so it cannot change the training.

    Raises UserError, before the first step, for a request of ``train.sample_requests`` that cannot be made.
    """

    def __init__(self, parts: Parts, run_dir: Path) -> None:
        self._parts, self._folder = parts, run_dir / "samples"
        model = parts.model()
        self._requests = [(wish, prepare(model, wish)) for wish in self._wishes(model)]

    def _wishes(self, model: Model) -> list[Request]:
        """Prompts, and what the recipe asks for besides; with neither, captions that are held out."""
        parts, train = self._parts, self._parts.recipe.train
        prompts = train.sample_prompts
        if not prompts and not train.sample_requests:
            # A cache of one clip holds none out.
            unseen = parts.heldout if len(parts.heldout) else parts.loader
            prompts = tuple(" ".join(captions) for captions in unseen.batch(0).captions)
        sound = {} if "video" in model.modalities else {"format": "wav"}
        wishes = []
        if prompts:
            plain = {"prompts": prompts[: train.sample_num_images], "seed": train.sample_seed}
            wishes.append(parse_request({**plain, **sound}))
        for i, said in enumerate(train.sample_requests):
            # With sound alone there is one format, which need not be said.
            label = f"train.sample_requests[{i}]"
            wishes.append(
                read_request(Path(said)) if isinstance(said, str) else parse_request({**sound, **said}, label)
            )
        return wishes

    def __call__(self, step: int, raw: Weights, ema: Weights | None) -> None:
        weights = {"raw": raw}
        if ema is not None and self._parts.recipe.ema.use_for_sampling:
            weights["ema"] = ema
        model = self._parts.model()
        for name, applied in weights.items():
            with applied():
                made = [list(prepared.run(model)) for _, prepared in self._requests]
            if self._parts.ranks.is_main:
                self._write(f"step_{step:08d}_{name}", made, model)

    def _write(self, name: str, made: Sequence[Sequence[Clip]], model: Model) -> None:
        """A sheet of what is seen, and files of what is heard."""
        self._folder.mkdir(parents=True, exist_ok=True)
        rows: list[tuple[Clip, str, Prepared]] = []
        for (wish, prepared), clips in zip(self._requests, made, strict=True):
            titles = written.titles(wish, prepared)
            rows += [(clip, title, prepared) for clip, title in zip(clips, titles, strict=True)]
        if "video" in model.modalities:
            contact_sheet(
                [clip.video_PHW3.numpy() for clip, _, _ in rows if clip.video_PHW3 is not None],
                [title for _, title, _ in rows],
                self._folder / f"{name}.png",
                given=[prepared.given_share() for _, _, prepared in rows],
            )
        for n, (clip, _, prepared) in enumerate(rows):
            if clip.sound_ZM is not None:
                suffix = ".wav" if clip.video_PHW3 is None else ".mp4"
                file = self._folder / f"{name}_{n:02d}{suffix}"
                written.write_clip(file, clip, prepared.clips.fps or model.fps)
