"""How much of this machine's matrix-product peak a training step reaches.

    python benchmarks/train_step.py --json

One run does it all: counts the step's matrix products (torch's FlopCounterMode on the real forward and
backward pass, beside a count by hand), then takes turns between large matrix products and training steps, so
that whatever else the machine is doing falls on both. Each step's rate is divided by the rate of the products
just before and after it; the ratio printed is the median.

A step is what training does: noise, forward in bf16 autocast over float32 weights, loss, backward, gradient
clipping, fused AdamW. Nothing but matrix products counts as work; all else only costs time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

# Threads that spin while they wait take the cores from whoever else needs them; read once, on import.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from motionloom.backbones import build_backbone
from motionloom.config.recipe import ModelConfig
from motionloom.flow import LINEAR
from motionloom.nn.memory import keep_freed_memory
from motionloom.nn.windows import window_side
from motionloom.plans import NOTHING, Geometry, Sample, Text, TextToVideo, Values, read_clip, to_streams
from motionloom.rng import torch_generator

PRODUCT_SIZES = (1024, 2048, 3072, 4096)


@dataclass(frozen=True)
class Case:
    """What is trained."""

    type: str = "factorized"
    dim: int = 512
    depth: int = 8
    heads: int = 8
    window: int = 8
    grid: tuple[int, int, int] = (16, 16, 28)
    channels: int = 64
    words: int = 128
    text_dim: int = 512
    batch: int = 1


@dataclass(frozen=True)
class Result:
    """What was seen; rates in 10^9 operations per second."""

    ratio: float
    ratio_low: float
    ratio_high: float
    step_seconds: float
    step_rate: float
    product_rate: float
    product_size: int
    flops_per_step: int
    flops_by_hand: int
    parameters: int
    first_step_seconds: float
    threads: int
    device: str
    compiled: bool
    rounds: int


def make_step(case: Case, device: torch.device, compiled: bool) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A model and a function that trains it by one step on a batch of noise."""
    config = ModelConfig(
        type=case.type,  # type: ignore[arg-type]
        dim=case.dim,
        depth=case.depth,
        num_heads=case.heads,
        window_size=case.window,
    )
    model = build_backbone(config, case.channels, case.text_dim).to(device)
    if compiled:
        for block in model.blocks():
            block.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    generator = torch_generator("benchmark", device=device)
    frames, rows, columns = case.grid
    clean_BFSC = torch.randn(
        case.batch, frames, rows * columns, case.channels, generator=generator, device=device
    )
    text = Text(
        torch.randn(case.batch, case.words, case.text_dim, generator=generator, device=device),
        torch.arange(case.words, device=device)[None].expand(case.batch, -1) < case.words * 3 // 4,
        torch.zeros(1, case.words, dtype=torch.long, device=device),
    )
    geometry = Geometry(
        grid=case.grid,
        seconds_BF=torch.arange(frames, device=device)[None] / 16.0,
        pixels_per_cell=(16.0, 16.0),
        scene_BF=torch.zeros(1, frames, dtype=torch.long, device=device),
        batch=case.batch,
    )
    layout = TextToVideo().layout(Sample({"video": geometry}), text, NOTHING)
    track = layout.tracks["video"]

    def step() -> Tensor:
        noise_BFSC = torch.randn(clean_BFSC.shape, generator=generator, device=device)
        sigma_BD = torch.rand(case.batch, 1, generator=generator, device=device)
        clean, noise = Values({"video": clean_BFSC}), {"video": noise_BFSC}
        streams = to_streams(layout, clean, noise, {"video": track.sigmas(sigma_BD)}, text, LINEAR.mix)
        with torch.autocast(device.type, torch.bfloat16):
            out_BNC = model(streams, layout.visibility)["video"]
        error = read_clip(layout, "video", out_BNC).float() - (noise_BFSC - clean_BFSC)
        loss = error.square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return model, step


def flops_by_hand(case: Case) -> int:
    """Multiplications and additions of all matrix products in forward and backward of ``factorized``."""
    frames, rows, columns = case.grid
    d, n = case.dim, case.batch * frames * rows * columns
    words = case.batch * case.words
    tall, wide = (window_side(side, case.window) for side in (rows, columns))
    places = n * (-(-rows // tall) * tall) * (-(-columns // wide) * wide) // (rows * columns)
    linear = n * (4 + 4 + 2 + 8) * d * d + words * 2 * d * d
    attention = 2 * d * (places * tall * wide + n * frames + n * case.words)
    noise = case.batch * (256 * d + d * d + 14 * d * d)
    # Neither latents, words, noise levels nor places ask for a gradient: three products become two.
    leaves = n * case.channels * d + words * case.text_dim * d + rows * columns * frames * 64 * d
    leaves += case.batch * 256 * d
    inner = case.depth * (linear + attention) + n * d * case.channels + noise - case.batch * 256 * d
    return 2 * (3 * inner + 2 * leaves)


def count_flops(case: Case, device: torch.device) -> int:
    """Operations of one real training step, as torch counts them."""
    _, step = make_step(case, device, compiled=False)
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Time of one run, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def product_timer(device: torch.device) -> tuple[int, Callable[[], float]]:
    """The square size whose bf16 product runs fastest, and a function that measures operations per second."""
    rates = {}
    for size in PRODUCT_SIZES:
        a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
        rates[size] = size**3 / min(seconds(lambda a=a, b=b: a @ b, device) for _ in range(5))
    best = max(rates, key=rates.__getitem__)
    a, b = (torch.randn(best, best, device=device).bfloat16() for _ in range(2))
    repeats = max(1, round(0.3 * rates[best] / best**3))

    def products() -> None:
        for _ in range(repeats):
            a @ b

    return best, lambda: 2 * best**3 * repeats / seconds(products, device)


def measure(case: Case, device: torch.device, compiled: bool, rounds: int) -> Result:
    """Products, step, products, step, ...: see the top of this file."""
    flops = count_flops(case, device)
    model, step = make_step(case, device, compiled)
    first = seconds(step, device)
    step()
    size, product_rate = product_timer(device)
    product_rate()
    around, steps = [product_rate()], []
    for _ in range(rounds):
        steps.append(flops / seconds(step, device))
        around.append(product_rate())
    # Time, not rate, adds up: the mean of the two neighbours is harmonic.
    near = [statistics.harmonic_mean(pair) for pair in itertools.pairwise(around)]
    ratios = sorted(s / p for s, p in zip(steps, near, strict=True))
    return Result(
        ratio=round(statistics.median(ratios), 3),
        ratio_low=round(ratios[0], 3),
        ratio_high=round(ratios[-1], 3),
        step_seconds=round(flops / statistics.median(steps), 4),
        step_rate=round(statistics.median(steps) / 1e9, 1),
        product_rate=round(statistics.median(around) / 1e9, 1),
        product_size=size,
        flops_per_step=flops,
        flops_by_hand=flops_by_hand(case) if case.type == "factorized" else 0,
        parameters=sum(p.numel() for p in model.parameters()),
        first_step_seconds=round(first, 1),
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        compiled=compiled,
        rounds=rounds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=9, help="measured steps")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    case = Case()
    result = measure(case, torch.device(args.device), not args.eager, args.rounds)
    if args.json:
        print(json.dumps({"case": asdict(case), **asdict(result)}))
        return
    for name, value in asdict(result).items():
        print(f"{name:>20}  {value}")


if __name__ == "__main__":
    main()
