"""Speed of a stream: every figure of one run, student and teacher taking turns on one machine.

    python benchmarks/streaming.py --student runs/self_forcing --teacher runs/endless --json
    python benchmarks/streaming.py                        # untrained, of the sizes of the recipes
    python benchmarks/streaming.py --wan --compile        # Wan 1.3B's shape with random weights, for a GPU

A round is one clip of the trained length by either: the student's streamed chunk by chunk with its decoder,
the teacher's by all its guided steps at once. Ratios are of one round; told are their median and their ends.
Then the student goes on for --times trained lengths: does it slow down, does its memory grow. An evaluation
is a pass over as many tokens as the clip has, as in `motionloom judge stream`.

``--wan``: 832 x 480, 4 steps, chunks of 3 latent frames, the window of a trained clip (7 chunks), bf16;
frames per second with and without decoding, first frame, memory; beside it the same clip without a cache (all
frames under the causal mask in every pass) and all at once. ``--tiny`` is the same at toy widths, to try it.

P pixel frames.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import nn

from motionloom.backbones.prediction import Predictor
from motionloom.backbones.wan import PRESETS, Wan
from motionloom.cli.assemble import fresh_model, load_model, pick_device
from motionloom.config import Recipe, load_recipe
from motionloom.evals.latency import Film, Recorder, counted, first_frame, latency
from motionloom.generate import (
    Ask,
    ClipRequest,
    Model,
    Sampling,
    Stream,
    generate,
    recipe_sampling,
    rollout,
    task_of,
)
from motionloom.plans import Chunks, Plan, TextToVideo
from motionloom.rng import torch_generator
from motionloom.text import build_text_encoder

PROMPT = "a small red circle bounces on a dark background"
LEVELS = (1.0, 0.9375, 0.8333333333333334, 0.625)
"""Four even steps, shifted by 5."""
TARGETS = {
    "frames/s, of the teacher's": ("at least", 5.0),
    "times less time a clip": ("at least", 8.0),
    "times fewer evaluations a clip": ("at least", 10.0),
    "first frame, of the whole clip's time": ("at most", 1 / 6),
    "neither network nor decoding": ("at most", 0.10),
    "memory growth": ("at most", 1.05),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--student", type=Path, help="a run that streams; else untrained")
    parser.add_argument("--teacher", type=Path, help="a run to compare with; else untrained")
    parser.add_argument("--recipes", default="self_forcing,endless", help="sizes of untrained ones")
    parser.add_argument("--steps", type=int, default=50, help="of the teacher")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--times", type=float, default=10, help="trained lengths of the long roll-out")
    parser.add_argument("--wan", action="store_true", help="Wan 1.3B's shape instead")
    parser.add_argument("--tiny", action="store_true", help="toy widths")
    parser.add_argument("--compile", action="store_true", help="compile the blocks, with --wan")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    device = pick_device(args.device)
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
    }
    if args.wan:
        found["wan"] = wan(TOY if args.tiny else REAL, device, args.compile, args.rounds)
    else:
        student, teacher = (
            load_model(run, device=args.device) if run else untrained(name, args.tiny, device)
            for run, name in zip((args.student, args.teacher), args.recipes.split(","), strict=True)
        )
        found |= compared(student, teacher, args.steps, args.rounds, args.times)
    print(json.dumps(found) if args.json else json.dumps(found, indent=1))


def untrained(name: str, tiny: bool, device: torch.device) -> Model:
    """A model of a recipe's sizes; how long it takes does not depend on what it knows."""
    changes = ["tokenizer.name_or_path="]
    if tiny:
        changes += ["model.dim=16", "model.depth=1", "model.num_heads=2", "text_encoder.dim=8"]
    return fresh_model(load_recipe(name, changes), device)


# A student and its teacher


@dataclass(frozen=True)
class Whole:
    """One clip at once."""

    seconds: float
    evaluations: float


def compared(student: Model, teacher: Model, steps: int, rounds: int, times: float) -> dict[str, Any]:
    """All figures of a student and a teacher at the student's size."""
    streamed(student, 1.0)
    at_once(teacher, student, 1)
    films, clips = [], []
    for _ in range(rounds):
        films.append(streamed(student, 1.0))
        clips.append(at_once(teacher, student, steps))
    rows = [latency(film, student.clip_shape[0]) for film in films]
    spent = [film.whole_s for film in films]
    made = [len(film.video_PHW3) for film in films]
    frames = student.clip_shape[0]
    long = streamed(student, times)
    lasting = latency(long)
    ratios: dict[str, Sequence[float | None]] = {
        "frames/s, of the teacher's": [
            _times(row["frames/s"], whole.seconds / frames) for row, whole in zip(rows, clips, strict=True)
        ],
        "times less time a clip": [
            whole.seconds / s * n / frames for whole, s, n in zip(clips, spent, made, strict=True)
        ],
        "times fewer evaluations a clip": [
            _over(whole.evaluations, row["evaluations a clip"])
            for whole, row in zip(clips, rows, strict=True)
        ],
        "first frame, of the whole clip's time": [
            first_frame(film) / s for film, s in zip(films, spent, strict=True)
        ],
        "first frame, of the teacher's clip's time": [
            first_frame(film) / whole.seconds for film, whole in zip(films, clips, strict=True)
        ],
        "neither network nor decoding": [row["neither network nor decoding"] for row in rows],
        "outside the network": [row["outside the network"] for row in rows],
        "memory growth": [lasting["memory growth"]],
    }
    return {
        "clip": f"{student.clip_shape[2]}x{student.clip_shape[1]}, {frames} frames",
        "teacher_steps": steps,
        "rounds": rounds,
        "ratios": {name: verdict(name, values) for name, values in ratios.items()},
        "student": _seconds(rows),
        "teacher": {
            "frames/s": round(frames / statistics.median(whole.seconds for whole in clips), 3),
            "evaluations a clip": clips[0].evaluations,
        },
        "long": {
            "times the trained length": times,
            "chunks": len(long.chunks),
            "most memory, MB": lasting["most memory, MB"],
            "frames/s of the last quarter over the second's": _kept_rate(long),
        },
    }


def streamed(model: Model, times: float) -> Film:
    """A roll-out of so many trained lengths, decoded as it is made."""
    network = model.predictor.backbone
    assert isinstance(network, nn.Module)
    seconds = times * model.clip_shape[0] / model.fps
    return Recorder(seconds, network).record(lambda: Stream(model, Ask(PROMPT, history=0)), "", PROMPT)


def at_once(model: Model, like: Model, steps: int) -> Whole:
    """A whole clip of the other model's size, guided as the recipe says."""
    network = model.predictor.backbone
    assert isinstance(network, nn.Module)
    frames, height, width = like.clip_shape
    request = ClipRequest((PROMPT,), frames=frames, height=height, width=width, fps=like.fps)
    with counted(network) as work:
        began = time.perf_counter()
        (clip,) = generate(model, request, recipe_sampling(model.recipe, steps=steps))
        seconds = time.perf_counter() - began
    return Whole(seconds, work.tokens / sum(math.prod(x_FSC.shape[:2]) for x_FSC in clip.tokens.values()))


def verdict(name: str, values: Sequence[float | None]) -> dict[str, Any]:
    """Median and ends of what is known, and whether the median meets its target."""
    known = [value for value in values if value is not None]
    if not known:
        return {"median": None}
    middle = statistics.median(known)
    row: dict[str, Any] = {"median": _short(middle), "low": _short(min(known)), "high": _short(max(known))}
    if name in TARGETS:
        side, bound = TARGETS[name]
        met = middle >= bound if side == "at least" else middle <= bound
        row |= {"target": f"{side} {bound:.3g}", "met": met}
    return row


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _times(rate: float | None, seconds: float) -> float | None:
    return None if rate is None else rate * seconds


def _over(above: float, below: float | None) -> float | None:
    return above / below if below else None


def _seconds(rows: Sequence[dict[str, float | None]]) -> dict[str, float]:
    """Medians of all that is known of the roll-outs."""
    return {
        name: _short(statistics.median(known))
        for name in rows[0]
        if (known := [value for row in rows if (value := row[name]) is not None])
    }


def _kept_rate(film: Film) -> float | None:
    """1: as quick at the end as near the beginning."""
    quarter = len(film.chunks) // 4
    if not quarter:
        return None
    early, late = film.chunks[quarter : 2 * quarter], film.chunks[-quarter:]
    rates = [sum(c.frames for c in part) / sum(c.wait_s for c in part) for part in (early, late)]
    return _short(rates[1] / rates[0]) if rates[0] else None


# Wan 1.3B's shape


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    preset: str
    size: tuple[int, int, int]
    """Frames, height, width."""
    words: int
    precision: str
    vae: dict[str, Any]

    @property
    def dtype(self) -> torch.dtype:
        """Of weights."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


REAL = Scale("wan2.1-t2v-1.3b", (81, 480, 832), 512, "bf16", {})
TOY = Scale("tiny", (33, 32, 48), 8, "fp32", {"base_dim": 8, "num_res_blocks": 1})
CHUNK = 3


class Uncached(nn.Module):
    """A backbone that knows no cache, so that the engine computes all frames in every pass."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone, self.patch, self.modalities = backbone, backbone.patch, backbone.modalities

    def forward(self, streams: Any, visibility: Any, **more: Any) -> Any:
        """As the backbone."""
        return self.backbone(streams, visibility, **more)

    def blocks(self) -> list[nn.Module]:
        """Its own."""
        return self.backbone.blocks()


def wan_model(scale: Scale, device: torch.device, compiled: bool) -> Model:
    """A causal model of that shape, random weights throughout."""
    import diffusers

    from motionloom.tokenizers.vae import VaeSettings, VaeTokenizer
    from motionloom.tokenizers.wan_vae import WAN_VAE

    frames, height, width = scale.size
    sizes = PRESETS[scale.preset]
    recipe = Recipe.model_validate(
        {
            "video": {"width": width, "height": height, "fps": 16, "num_frames": frames},
            "tokenizer": {
                "type": "wan_vae",
                "latent_f": 8,
                "latent_t": 4,
                "latent_d": 16,
                "first_alone": True,
                "name_or_path": "random",
            },
            "text_encoder": {"dim": sizes.text_dim, "vocab_size": 1024, "max_length": scale.words},
            "model": {"type": "wan", "preset": scale.preset, "patch": [1, 2, 2]},
            "plan": {"type": "chunks", "frames": CHUNK},
            "train": {"precision": scale.precision},
        }
    )
    with torch.device("meta"):
        backbone = Wan(sizes)
    backbone = backbone.to_empty(device="cpu")
    backbone.init_weights(torch_generator("streaming benchmark"))
    backbone = backbone.to(device, scale.dtype).eval().requires_grad_(False)
    if compiled:
        for block in backbone.blocks():
            block.compile()
    vae = diffusers.AutoencoderKLWan(**scale.vae).to(device, scale.dtype).eval().requires_grad_(False)
    tokenizer = VaeTokenizer(WAN_VAE, vae, VaeSettings(precision=scale.precision))
    text = build_text_encoder(recipe.text_encoder, 0)
    if isinstance(text, nn.Module):
        text.requires_grad_(False)
    return Model(recipe, tokenizer, text, Predictor(backbone), Chunks(CHUNK), device)


def wan(scale: Scale, device: torch.device, compiled: bool, rounds: int) -> dict[str, Any]:
    """A stream of two windows, so that the ring has turned, and one clip each of the other ways."""
    model = wan_model(scale, device, compiled)
    sampling = Sampling("consistency", sigmas=LEVELS)
    latents = model.latent_grid(*scale.size)[0]
    chunks = latents // CHUNK
    found: dict[str, Any] = {
        "size": f"{scale.size[2]}x{scale.size[1]}",
        "steps": len(LEVELS),
        "chunk": CHUNK,
        "window": chunks,
        "compiled": compiled,
        "parameters": sum(p.numel() for p in model.predictor.backbone.parameters()),
    }
    for name, decode in (("without decoding", False), ("with decoding", True)):
        wan_stream(model, sampling, 2 * chunks, decode)  # kernels are chosen, blocks compiled
        peak = Peak(device)
        runs = [wan_stream(model, sampling, 2 * chunks, decode) for _ in range(rounds)]
        found[name] = {
            "frames/s": _short(statistics.median(run.rate(chunks) for run in runs)),
            "frames/s while the window fills": _short(statistics.median(run.rate(1, chunks) for run in runs)),
            "first frame, s": _short(statistics.median(run.first for run in runs)),
            "chunk p95, s": _short(
                statistics.quantiles([w for run in runs for w in run.waits[1:]], n=20)[-1]
            ),
            "neither network nor decoding": _short(statistics.median(run.overhead for run in runs)),
            "cache, GB": _short(runs[-1].memory / 1e9),
            "peak memory, GiB": peak.gib(),
        }
    whole: dict[str, tuple[Any, Plan]] = {
        "without a cache": (Uncached(model.predictor.backbone), Chunks(CHUNK)),
        "all at once": (model.predictor.backbone, TextToVideo()),
    }
    for name, (network, plan) in whole.items():
        peak = Peak(device)
        seconds = wan_clip(replace(model, predictor=Predictor(network), plan=plan), sampling, rounds, device)
        found[name] = {"frames/s": _short(scale.size[0] / seconds), "peak memory, GiB": peak.gib()}
    cached = found["without decoding"]["frames/s while the window fills"]
    found["times the frames/s without a cache"] = _short(cached / found["without a cache"]["frames/s"])
    return found


@dataclass(frozen=True)
class Run:
    """Chunks of a stream: seconds and frames of each."""

    first: float
    """Seconds to the first frame."""
    waits: list[float]
    frames: list[float]
    network: list[float]
    decoding: list[float]
    memory: int

    def rate(self, first: int, end: int | None = None) -> float:
        """Frames per second of some of the chunks."""
        return sum(self.frames[first:end]) / sum(self.waits[first:end])

    @property
    def overhead(self) -> float:
        """Share of the time, behind the first chunk, that is neither network nor decoder."""
        return max(0.0, 1 - (sum(self.network[1:]) + sum(self.decoding[1:])) / sum(self.waits[1:]))


def wan_stream(model: Model, sampling: Sampling, chunks: int, decode: bool) -> Run:
    """So many chunks from nothing, each with all of its pieces."""
    waits, frames, network, decoding = ([0.0] * chunks for _ in range(4))
    spec = model.tokenizer.spec
    began = time.perf_counter()
    stream = Stream(model, Ask(PROMPT, history=0, decode=decode), sampling)
    shown, first = 0, 0.0
    while shown < spec.pixel_frames(chunks * CHUNK):
        wanted = stream.frames_wanted
        piece = stream.next()
        now = time.perf_counter()
        first = first or now - began
        new = wanted if piece.video_PHW3 is None else len(piece.video_PHW3)
        for column, value in (
            (waits, now - began),
            (frames, new),
            (network, piece.network_s),
            (decoding, piece.decode_s if decode else 0.0),
        ):
            column[piece.chunk] += value
        began = now
        shown += new
    return Run(first, waits, frames, network, decoding, stream.memory())


def wan_clip(model: Model, sampling: Sampling, rounds: int, device: torch.device) -> float:
    """Median seconds of one clip's latents; the first round does not count."""
    task, _ = task_of(model, ClipRequest((PROMPT,)), sampling)
    taken = []
    for _ in range(rounds + 1):
        wait(device)
        began = time.perf_counter()
        with model.autocast():
            generator = torch_generator("streaming benchmark", device=device)
            rollout(model.predictor, model.plan, task, sampling, generator=generator)
        wait(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


class Peak:
    """The most that tensors held on the device since it was made; unknown on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(device)

    def gib(self) -> float | None:
        """GiB."""
        return round(torch.cuda.max_memory_allocated() / 2**30, 3) if self._cuda else None


def wait(device: torch.device) -> None:
    """Until the device's queue is empty."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
