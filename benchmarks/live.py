"""What a stream obeys while it plays, on held-out combinations of ShapeWorld.

    python benchmarks/live.py runs/self_forcing --world endless --clips 64 --seed 1

Cases (--cases):
  image    the film begins with the first frame of a real clip, and its caption.
  neutral  the same with a caption that says neither colour nor shape: what the oracle reads there can only
           come from the picture.
  redraw   a real clip, pushed in chunk by chunk with its caption in another colour, at each of --strengths.
  still    the same with its own caption: what redrawing costs.

Prompts that change: ``motionloom judge stream RUN --world endless --switch 3``.

A figure is the share of films in which the oracle reads an attribute as the prompt (image: the clip) has it;
``all``: colour, shape and motion at once. Prompts, clips and noise follow from --seed.

P pixel frames.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from motionloom.cli.assemble import load_model
from motionloom.data.shapeworld import ClipSpec, World, adherence, oracle, prompt, render_video
from motionloom.data.shapeworld.beside import swapped
from motionloom.generate import Ask, Model, Piece, Stream

JUDGED = ("color", "shape", "motion", "background")


@dataclass(frozen=True)
class Stage:
    """Where films are made and read."""

    model: Model
    world: World
    frames: int
    """Pixel frames of a clip of training."""
    reading: int
    """Frames that the oracle is shown."""

    def spec(self, seed: int, n: int) -> ClipSpec:
        """A held-out clip as long as the model's."""
        height, width = self.model.clip_shape[1:]
        drawn = self.world.sample(seed, n, "test")
        return replace(drawn, frames=self.frames, height=height, width=width)

    def film(self, words: str, seed: int) -> Stream:
        """One that has not begun."""
        return Stream(self.model, Ask(words, seed=seed))

    def read(self, video_PHW3: Tensor, wanted: ClipSpec) -> dict[str, bool]:
        """What the oracle finds right in the last frames."""
        right = adherence(oracle(video_PHW3[-self.reading :].numpy(), self.world), wanted)
        return {name: right[name] for name in JUDGED} | {
            "all": all(right[n] for n in ("color", "shape", "motion"))
        }


def chunks_for(film: Stream, frames: int) -> Tensor:
    """As many chunks as hold so many frames."""
    parts: list[Tensor] = []
    while sum(map(len, parts)) < frames:
        parts.append(seen(film.next()))
    return torch.cat(parts)


def seen(piece: Piece) -> Tensor:
    """A piece's frames."""
    assert piece.video_PHW3 is not None, "a model of sound alone"
    return piece.video_PHW3


def image(stage: Stage, seed: int, n: int, *, neutral: bool = False) -> dict[str, bool]:
    """A picture, and what becomes of it over a clip's length."""
    spec = stage.spec(seed, n)
    words = prompt(spec)
    if neutral:
        (thing,) = spec.objects
        words = words.replace(f"{thing.color} {thing.shape}", "shape")
    film = stage.film(words, n)
    film.show(torch.from_numpy(render_video(spec)[0].copy()))
    return stage.read(chunks_for(film, stage.frames)[: stage.frames], spec)


def redraw(stage: Stage, seed: int, n: int, *, strength: float, recolour: bool = True) -> dict[str, bool]:
    """A clip of which every chunk is redrawn."""
    spec = stage.spec(seed, n)
    wanted = swapped(spec, stage.world) if recolour else spec
    film, pushed, parts = stage.film(prompt(wanted), n), torch.from_numpy(render_video(spec).copy()), []
    while len(pushed) >= film.frames_wanted:
        now, pushed = pushed[: film.frames_wanted], pushed[film.frames_wanted :]
        parts.append(seen(film.push(now, strength)))
    parts.append(seen(film.finish()))
    return stage.read(torch.cat(parts), wanted)


def cases(names: list[str], strengths: list[float]) -> Iterator[tuple[str, Callable[..., dict[str, bool]]]]:
    """What is asked for, by a name for its row."""
    simple: dict[str, Callable[..., dict[str, bool]]] = {
        "image": image,
        "neutral": lambda *a: image(*a, neutral=True),
    }
    for name in names:
        if name not in (*simple, "redraw", "still"):
            raise SystemExit(f"--cases {name}: choose image, neutral, redraw, still")
        if name in simple:
            yield name, simple[name]
        else:
            for s in strengths:
                yield (
                    f"{name} {s:g}",
                    lambda *a, s=s, own=name == "still": redraw(*a, strength=s, recolour=not own),
                )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--cases", default="image,neutral,redraw,still")
    parser.add_argument("--strengths", default="0.8,0.9")
    parser.add_argument("--world", default="endless", choices=["endless", "modes"])
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    ask = parser.parse_args()
    model, world = load_model(Path(ask.run)), getattr(World, ask.world)()
    stage = Stage(model, world, model.clip_shape[0], min(17, model.clip_shape[0]))
    report, begin = {}, time.perf_counter()
    for name, run in cases(ask.cases.split(","), [float(s) for s in ask.strengths.split(",")]):
        count: Counter[str] = Counter()
        for n in range(ask.clips):
            count.update({key: int(right) for key, right in run(stage, ask.seed, n).items()})
        report[name] = {key: round(count[key] / ask.clips, 3) for key in (*JUDGED, "all")}
        if not ask.json:
            print(f"{name:12s}", *(f"{key} {value:.3f}" for key, value in report[name].items()), flush=True)
    if ask.json:
        row = {"run": ask.run, "clips": ask.clips, "seed": ask.seed, "seconds": time.perf_counter() - begin}
        print(json.dumps(row | {"cases": report}))


if __name__ == "__main__":
    main()
