"""Speed of a tokenizer: its encoder through `motionloom cache` against the bare one, its decoder over films.

    python benchmarks/tokenizer.py --json               # an untrained VTP-S on pictures of 256 x 256
    python benchmarks/tokenizer.py --tokenizer my_tokenizer --size 32 --frames 17 --clips 256 --json

Encoding: a round codes the same clips twice, bare (frames lie decoded in memory, the encoder alone runs) and
by ``build_cache`` (files are opened, scaled, coded and written to disk; once for a cache the tokenizer is
copied into it: .3 s, a tenth of the time of 32 pictures). A ratio is of a round; told are the median and the
ends; wanted is .90.
Decoding: a film of --latents latent frames is decoded as a stream, one frame at a time. What the stream holds
between two frames is counted in bytes, and the process's memory is read: both must not grow.

N clips, P pixel frames.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from motionloom.config import Recipe
from motionloom.data.cache import build_cache
from motionloom.data.manifest import ManifestEntry
from motionloom.data.media import write_video
from motionloom.data.shapeworld import World, render_video
from motionloom.rng import torch_generator
from motionloom.tokenizers import load_tokenizer
from motionloom.tokenizers.vtp import PRESETS, VTPModel, VtpTokenizer
from motionloom.tokenizers.vtp.towers import DecoderMemory

WANTED = 0.90
FPS = 8.0
TOGETHER = 32
"""Clips that the bare encoder is given at once; it divides them as it does a cache's."""


def untrained(letter: str, layers: int | None) -> VtpTokenizer:
    """A released size with first weights."""
    config = replace(PRESETS[letter], train_clip=False)
    if layers is not None:
        config = replace(config, vision_depth=layers, decoder_depth=layers)
    model = VTPModel(config)
    model.init_weights(0)
    one, zero = [1.0] * config.vision_feature_bottleneck, [0.0] * config.vision_feature_bottleneck
    return VtpTokenizer(model, [zero], [one])


def make_clips(folder: Path, count: int, frames: int, size: int) -> list[ManifestEntry]:
    """Files of ShapeWorld, a PNG sheet's worth each where they are pictures."""
    world, entries = World(), []
    for n in range(count):
        spec = replace(world.sample(0, n, "train"), frames=frames, height=size, width=size)
        name = folder / f"clip{n:04d}.{'webp' if frames > 1 else 'png'}"
        write_video(name, render_video(spec), FPS)
        entries.append(ManifestEntry(f"clip{n:04d}", name, "a shape"))
    return entries


def recipe_for(tokenizer: Any, frames: int, size: int) -> Recipe:
    """What caches such clips with such a tokenizer."""
    spec = tokenizer.spec
    return Recipe.model_validate(
        {
            "video": {"width": size, "height": size, "num_frames": frames, "fps": FPS},
            "tokenizer": {
                "type": "vtp",
                "name_or_path": "given",
                "latent_f": spec.spatial,
                "latent_t": spec.temporal,
                "latent_d": spec.channels,
                "first_alone": spec.first_alone,
            },
            "text_encoder": {"trainable": True},
        }
    )


def encoding(tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Frames per second both ways, round by round."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        entries = make_clips(folder, args.clips, args.frames, args.size)
        recipe = recipe_for(tokenizer, args.frames, args.size)
        clips_NPHW3 = torch.stack([torch.from_numpy(render(entry)) for entry in entries])
        tokenizer.encode(clips_NPHW3[:1])  # whatever is done once
        for n in range(args.rounds):
            begin = time.perf_counter()
            for some_BPHW3 in clips_NPHW3.split(TOGETHER):
                tokenizer.encode(some_BPHW3)
            bare = time.perf_counter() - begin
            begin = time.perf_counter()
            report = build_cache(recipe, entries, folder / f"cache{n}", tokenizer=tokenizer)
            cached = time.perf_counter() - begin
            assert report.encoded == len(entries), report
            frames = len(entries) * args.frames
            rows.append(
                {"bare frames/s": frames / bare, "cached frames/s": frames / cached, "ratio": bare / cached}
            )
    ratios = sorted(row["ratio"] for row in rows)
    median = statistics.median(ratios)
    return {
        "rounds": rows,
        "ratio": median,
        "lowest": ratios[0],
        "highest": ratios[-1],
        "met": median >= WANTED,
    }


def render(entry: ManifestEntry) -> np.ndarray:
    """A clip's frames from its file."""
    from motionloom.data.media import read_clip

    return np.ascontiguousarray(read_clip(entry.path).video_FHW3)


def held(memory: DecoderMemory) -> int:
    """Bytes that a stream keeps between two frames."""
    return sum(k.nbytes + v.nbytes for k, v in memory.past or ())


def decoding(tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """A film as a stream: its rate, and what it holds after a quarter and at the end."""
    spec, cells = tokenizer.spec, args.size // tokenizer.spec.spatial
    generator = torch_generator("film")

    def latents() -> Any:
        for _ in range(args.latents):
            yield torch.randn(1, 1, cells, cells, spec.channels, generator=generator)

    memory, frames, kept, resident, begin = DecoderMemory(), 0, [], [], time.perf_counter()
    for z in latents():
        pixels: Tensor = decode_one(tokenizer, z, memory)
        frames += pixels.shape[1]
        kept.append(held(memory))
        resident.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    seconds, quarter = time.perf_counter() - begin, max(1, len(kept) // 4)
    return {
        "frames/s": frames / seconds,
        "latent frames": len(kept),
        "kept bytes, after a quarter": kept[quarter - 1],
        "kept bytes, at the end": kept[-1],
        "most resident MB, after a quarter": resident[quarter - 1],
        "most resident MB, at the end": resident[-1],
        "constant": kept[-1] == kept[quarter - 1],
    }


@torch.no_grad()
def decode_one(tokenizer: VtpTokenizer, z: Tensor, memory: DecoderMemory) -> Tensor:
    """As ``stream_decode`` does, with its memory in sight."""
    return tokenizer.model.pixel_decoder.go_on(z, memory)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", default="", help="a VTP tokenizer's folder; else an untrained one")
    parser.add_argument("--preset", default="S", choices=sorted(PRESETS))
    parser.add_argument("--layers", type=int, help="of an untrained one, to try this")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--frames", type=int, default=1)
    parser.add_argument("--clips", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--latents", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else untrained(args.preset, args.layers)
    found = {
        "what": vars(args),
        "threads": torch.get_num_threads(),
        "encoding": encoding(tokenizer, args),
        "decoding": decoding(tokenizer, args),
    }
    if args.json:
        print(json.dumps(found))
        return
    e, d = found["encoding"], found["decoding"]
    ends = f"{e['lowest']:.3f} to {e['highest']:.3f}"
    print(f"encoding through the cache: {e['ratio']:.3f} of the bare encoder ({ends})")
    print(f"decoding: {d['frames/s']:.1f} frames/s, constant memory: {d['constant']}")


if __name__ == "__main__":
    main()
