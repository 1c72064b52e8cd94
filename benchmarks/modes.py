"""What a trained mode obeys on held-out combinations of ShapeWorld: real clips in, figures of judges out.

    python benchmarks/modes.py runs/conditions --cases first_frame,prefix,hole --clips 64

Prompts, sources and noise follow from --seed. Every figure names its judge (docs/judging.md); seams are
measured against real clips as the run's tokenizer gives them back, since all clips come out of it.

Shapes: B clips, P pixel frames, H x W pixels.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from motionloom.cli.assemble import load_model
from motionloom.cli.data import alternatives
from motionloom.cli.lora import into_weights
from motionloom.config.conditions import (
    Base,
    FirstFrame,
    Keyframes,
    LastFrame,
    Mask,
    Prefix,
    Reference,
    SpatialCrop,
    Suffix,
    Whole,
)
from motionloom.data.shapeworld import Facts, World, facts, prompt, render, sample_story, scene_captions
from motionloom.data.shapeworld.beside import reference_caption, reference_video
from motionloom.data.shapeworld.captions import word
from motionloom.evals.adherence import judge as obeyed
from motionloom.evals.asked import Asked, AskedScene, Given, Sample
from motionloom.evals.encoders import open_encoder
from motionloom.evals.judges import Tools, judge
from motionloom.generate import Clip, ClipRequest, Model, Sampling, Source, generate, recipe_sampling
from motionloom.generate.extend import Memory, expand_scenes

ROUND_TRIP = 64  # real clips that seams are measured against


@dataclass(frozen=True)
class Case:
    """One way of asking, for all clips of a batch."""

    request: ClipRequest
    asked: tuple[Asked, ...]
    wanted: tuple[Facts, ...] = ()
    """What the oracle should read where the caption does not say it."""
    run: Callable[..., Any] = generate
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """What cases are made from."""

    model: Model
    world: World
    clips: int
    seed: int

    def specs(self) -> list[Any]:
        """Held-out combinations."""
        return [self.world.sample(self.seed, i, "test") for i in range(self.clips)]

    def story(self, i: int, scenes: int, lengths: tuple[int, ...]) -> Any:
        """Story i of held-out combinations."""
        return sample_story(self.world, self.seed, i, "test", scenes=scenes, lengths=lengths)


def _real(specs: Sequence[Any]) -> torch.Tensor:
    return torch.from_numpy(np.stack([render(spec).video_FHW3 for spec in specs]))


def _given(setting: Setting, *parts: tuple[Base, Callable[[torch.Tensor], Source], Given | None]) -> Case:
    """Captions in full, and parts of the real clip."""
    specs = setting.specs()
    video_BPHW3 = _real(specs)
    request = ClipRequest(
        tuple(map(prompt, specs)),
        conditions=tuple(condition for condition, _, _ in parts),
        sources=tuple(source(video_BPHW3) for _, source, _ in parts),
        seed=setting.seed,
    )
    given = tuple(part for _, _, part in parts if part is not None)
    asked = tuple(Asked(prompt(spec), given=given, fps=spec.fps) for spec in specs)
    return Case(request, asked)


def _frames(kind: str, *given: tuple[int, int]) -> Given:
    return Given(kind, given)


def _masked(setting: Setting, rows: slice, columns: slice, frames: slice = slice(None)) -> Case:
    """A hole in latent cells; the rest is given."""
    spec = setting.model.tokenizer.spec
    grid = setting.model.latent_grid(*setting.model.clip_shape)
    cells_FHW = np.ones(grid, bool)
    cells_FHW[frames, rows, columns] = False
    lasts = [spec.pixel_frames(f + 1) - (spec.pixel_frames(f) if f else 0) for f in range(grid[0])]
    pixels = np.repeat(np.repeat(np.repeat(cells_FHW, lasts, 0), spec.spatial, 1), spec.spatial, 2)
    mask = torch.from_numpy(cells_FHW).expand(setting.clips, *grid)
    return _given(
        setting,
        (Mask(masks="data"), lambda v: Source(v, mask_BFhw=mask), Given("mask", mask_PHW=pixels)),
    )


def _first(setting: Setting) -> Case:
    return _given(setting, (FirstFrame(), lambda v: Source(v[:, :1]), _frames("first_frame", (0, 1))))


def _both_ends(setting: Setting) -> Case:
    return _given(
        setting,
        (FirstFrame(), lambda v: Source(v[:, :1]), _frames("first_frame", (0, 1))),
        (LastFrame(), lambda v: Source(v[:, -4:]), _frames("last_frame", (13, 17))),
    )


def _keyframes(setting: Setting) -> Case:
    return _given(
        setting,
        (
            Keyframes(times=(0.0, 1.2)),
            lambda v: Source(torch.stack([v[:, 0], v[:, 10]], 1)),
            _frames("keyframes", (0, 1), (9, 13)),
        ),
    )


def _swap(setting: Setting) -> Case:
    """The reference shows the clip in another colour: shape and motion are its, the colour the caption's."""
    return _referred(setting, setting.specs(), "swap")


def _edges(setting: Setting) -> Case:
    return _referred(setting, setting.specs(), "edges")


def _referred(setting: Setting, specs: Sequence[Any], kind: Any) -> Case:
    references = torch.from_numpy(np.stack([reference_video(s, kind, setting.world) for s in specs]))
    prompts = tuple(reference_caption(spec, kind) for spec in specs)
    request = ClipRequest(
        prompts, conditions=(Reference(),), sources=(Source(references),), seed=setting.seed
    )
    wanted = tuple(map(facts, specs))
    return Case(request, tuple(Asked(word(one, 0), fps=setting.world.fps) for one in wanted), wanted)


def _scenes(setting: Setting, scenes: int, lengths: tuple[int, ...], **how: Any) -> Case:
    """Stories of held-out combinations, all with the lengths of the first."""
    stories: list[Any] = []
    i = 0
    while len(stories) < setting.clips:
        story = setting.story(i, scenes, lengths)
        i += 1
        if not stories or [s.frames for s in story.scenes] == [s.frames for s in stories[0].scenes]:
            stories.append(story)
    shots = tuple(scene.frames for scene in stories[0].scenes)
    captions = tuple(tuple(scene_captions(story)) for story in stories)
    request = ClipRequest(("",) * len(stories), scenes=captions, shots=shots, seed=setting.seed)
    asked = tuple(
        Asked("", tuple(AskedScene(c, n) for c, n in zip(one, shots, strict=True)), fps=setting.world.fps)
        for one in captions
    )
    return Case(request, asked, **how)


def _with_sound(setting: Setting, modality: Literal["video", "audio"]) -> Case:
    specs = setting.specs()
    made = [render(spec) for spec in specs]
    source = Source(
        torch.from_numpy(np.stack([one.video_FHW3 for one in made])) if modality == "video" else None,
        torch.from_numpy(np.stack([one.sound for one in made])) if modality == "audio" else None,
        made[0].sample_rate,
    )
    request = ClipRequest(
        tuple(map(prompt, specs)),
        conditions=(Whole(modality=modality),),
        sources=(source,),
        seed=setting.seed,
    )
    return Case(request, tuple(Asked(prompt(spec), fps=spec.fps) for spec in specs))


CASES: dict[str, Callable[[Setting], Case]] = {
    "text": lambda s: _given(s),
    "first_frame": _first,
    "first_last": _both_ends,
    "keyframes": _keyframes,
    "prefix": lambda s: _given(s, (Prefix(frames=9), lambda v: Source(v[:, :9]), _frames("prefix", (0, 9)))),
    "suffix": lambda s: _given(
        s, (Suffix(frames=8), lambda v: Source(v[:, -8:]), _frames("suffix", (9, 17)))
    ),
    "outpaint": lambda s: _given(
        s, (SpatialCrop(region=(0, 16, 32, 32)), Source, Given("spatial_crop", region=(0, 16, 32, 32)))
    ),
    "inpaint": lambda s: _masked(s, slice(1, 3), slice(1, 3)),
    "gap": lambda s: _masked(s, slice(None), slice(None), slice(2, 4)),
    "swap": _swap,
    "edges": _edges,
    "scenes": lambda s: _scenes(s, 3, (13,)),
    "scenes_unequal": lambda s: _scenes(s, 3, (9, 13)),
    "scenes_5": lambda s: _scenes(s, 5, (13,)),
    "expand": lambda s: _scenes(s, 7, (13,), run=expand_scenes, more={"how": Memory("first_last", 1)}),
    "expand_last": lambda s: _scenes(s, 7, (13,), run=expand_scenes, more={"how": Memory("last", 2)}),
    "t2av": lambda s: _given(s),
    "v2a": lambda s: _with_sound(s, "video"),
    "a2v": lambda s: _with_sound(s, "audio"),
}
"""Ways of asking by name."""


def measure(setting: Setting, case: Case, sampling: Sampling, encoder: str) -> dict[str, float]:
    """The figures of all judges that can say something, by ``judge: figure``."""
    clips: list[Clip] = list(case.run(setting.model, case.request, sampling, batch_size=64, **case.more))
    samples = [
        Sample(
            f"{i:03d}",
            clip.video_PHW3.numpy() if clip.video_PHW3 is not None else np.zeros((0, 1, 1, 3), np.uint8),
            setting.world.fps,
            asked,
            None if clip.sound_ZM is None else clip.sound_ZM.numpy(),
            clip.sample_rate,
        )
        for i, (clip, asked) in enumerate(zip(clips, case.asked, strict=True))
    ]
    specs = [setting.world.sample(setting.seed + 1, i, "test") for i in range(ROUND_TRIP)]
    tokenizer = setting.model.tokenizer
    rebuilt = tokenizer.decode(tokenizer.encode(_real(specs))).numpy()
    real = tuple(Sample(f"real {i}", v, setting.world.fps, Asked("")) for i, v in enumerate(rebuilt))
    found: dict[str, float] = {}
    if case.wanted:
        rates = obeyed([s.video_PHW3 for s in samples], case.wanted, setting.world).rates()
        found |= {f"as wanted: {name}": rate for name, rate in rates.items()}
    for report in judge(samples, Tools(open_encoder(encoder), setting.world, None, real)):
        found |= {f"{report.kind}: {one.name}": one.interval.mean for one in report.figures}
        steps = report.details.get("drift", ())
        last = max((step["scene"] for step in steps), default=0)
        found |= {f"at the last scene: {s['name']}": s["mean"] for s in steps if s["scene"] == last}
        seam = report.details.get("real")
        if isinstance(seam, dict):
            found |= {f"{report.kind}: {name} of real": v for name, v in seam.items() if v is not None}
    return found


def main() -> None:
    """Parse, run, print; one JSON object on the last line with --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="A run or a checkpoint.")
    parser.add_argument("--cases", default="text", help=f"Of {', '.join(CASES)}; with commas.")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--lora", action="append", default=[], help="FILE[:STRENGTH]; repeatable.")
    parser.add_argument("--only", action="append", default=[], help="As for `data shapeworld`: shape=heart.")
    parser.add_argument("--encoder", default="color-histogram")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    model = load_model(options.run)
    into_weights(model, options.lora)
    world = World.modes(model.recipe.video.width, model.recipe.video.num_frames, model.recipe.video.fps)
    if options.only:
        world = world.narrowed(alternatives(options.only))
    setting = Setting(model, world, options.clips, options.seed)
    sampling = recipe_sampling(model.recipe, steps=options.steps, guidance=options.guidance)
    found: dict[str, Any] = {"run": str(options.run), "clips": options.clips, "seed": options.seed}
    found |= {"steps": options.steps, "guidance": sampling.guidance.scale, "cases": {}}
    for name in options.cases.split(","):
        began = time.monotonic()
        figures = measure(setting, CASES[name](setting), sampling, options.encoder)
        found["cases"][name] = {key: round(value, 4) for key, value in figures.items()}
        if not options.json:
            print(f"{name} ({time.monotonic() - began:.0f} s)", flush=True)
            for key, value in figures.items():
                print(f"  {key}: {value:.3f}", flush=True)
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
