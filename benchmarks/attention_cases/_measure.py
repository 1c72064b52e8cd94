"""Taking turns, and the most memory that a piece of work has had: what the attention cases share."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# Threads that spin while they wait take the cores from whoever else needs them; read once, on import.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from torch import Tensor

from motionloom.plans.stream import MODALITIES, Attributes
from motionloom.rng import torch_generator

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Run = Callable[[], object]


def turns(runs: Mapping[str, Run], rounds: int = 7) -> dict[str, list[float]]:
    """Seconds of each, one after the other in every round, after one round that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            _wait()
            start = time.perf_counter()
            run()
            _wait()
            if turn:
                taken[name].append(time.perf_counter() - start)
    return taken


def ratio(taken: Mapping[str, list[float]], slow: str, quick: str) -> float:
    """How many times quicker, the median over the rounds."""
    return round(statistics.median(a / b for a, b in zip(taken[slow], taken[quick], strict=True)), 2)


def best_ratio(taken: Mapping[str, list[float]], slow: str, quick: str) -> float:
    """The same of each one's quickest round: what is left when nobody else uses the machine."""
    return round(min(taken[slow]) / min(taken[quick]), 2)


def training(attention: Callable[..., Tensor], leaves: list[Tensor]) -> Run:
    """A forward and a backward pass of ``attention(q, k, v)``."""
    grad = torch.randn_like(leaves[0])
    return lambda: torch.autograd.grad(attention(*leaves), leaves, grad)


def inference(attention: Callable[..., Tensor], leaves: list[Tensor]) -> Run:
    """A forward pass alone."""

    def run() -> None:
        with torch.no_grad():
            attention(*leaves)

    return run


def draw(
    batch: int, heads: int, tokens: int, channels: int, dtype: torch.dtype, keys: int = 0
) -> list[Tensor]:
    """q, k, v (B, H, N, D), in memory as (B, N, H, D), the way projections leave them."""
    generator = torch_generator("attention", device=DEVICE)
    return [
        torch.randn(batch, n, heads, channels, generator=generator, device=DEVICE)
        .to(dtype)
        .transpose(1, 2)
        .requires_grad_()
        for n in (tokens, keys or tokens, keys or tokens)
    ]


def clip(frames: tuple[int, ...], rows: int, columns: int, words: int) -> Attributes:
    """[text of every scene | video of scenes with so many latent frames]."""
    scene_F = torch.arange(len(frames)).repeat_interleave(torch.tensor(frames))
    cell = torch.cartesian_prod(torch.arange(len(scene_F)), torch.arange(rows), torch.arange(columns))
    begins = torch.tensor([0, *frames[:-1]]).cumsum(0)
    nothing = torch.zeros(len(frames) * words, dtype=torch.long)
    fields = {
        "modality_BN": torch.cat(
            [nothing + MODALITIES.index("text"), cell[:, 0] * 0 + MODALITIES.index("video")]
        ),
        "scene_BN": torch.cat([torch.arange(len(frames)).repeat_interleave(words), scene_F[cell[:, 0]]]),
        "chunk_BN": torch.cat([nothing, cell[:, 0]]),
        "context_BN": torch.zeros(len(nothing) + len(cell), dtype=torch.bool),
        "cell_BN3": torch.cat([nothing[:, None].expand(-1, 3), cell]),
        "first_BN": torch.cat([nothing.bool(), begins[scene_F[cell[:, 0]]] == cell[:, 0]]),
        "sample_BN": torch.zeros(len(nothing) + len(cell), dtype=torch.long),
    }
    return Attributes(**{name: t[None].to(DEVICE) for name, t in fields.items()})


def peak_bytes(run: Run) -> int:
    """The most memory beyond what was held before: of the process, kernels' own buffers included, or of the
    GPU's allocator."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def copied_scene_attention(lengths: list[tuple[int, int]]) -> Callable[..., Tensor]:
    """Mask 1 of Mask2DiT by two calls, as its authors compute it: scenes folded into the batch, every scene
    with a copy of all keys and values. Unequal scenes cannot be folded and take turns; their copies remain.

    ``lengths``: (words, video tokens) of each scene; tokens stand as [text of every scene | video].
    """
    scenes = len(lengths)
    words, tokens = ([n[i] for n in lengths] for i in range(2))
    equal = len(set(lengths)) == 1

    def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        text, video = (
            [t.unflatten(2, (scenes, -1)).transpose(1, 2) for t in part]
            for part in zip(*(t.split([sum(words), sum(tokens)], dim=2) for t in (q, k, v)), strict=True)
        )
        own = [torch.cat(pair, dim=3).flatten(0, 1) for pair in zip(text[1:], video[1:], strict=True)]
        every = [
            torch.cat([t, x.transpose(1, 2).flatten(2, 3)[:, None].expand(-1, scenes, -1, -1, -1)], dim=3)
            for t, x in zip(text[1:], video[1:], strict=True)
        ]
        answers = (
            F.scaled_dot_product_attention(text[0].flatten(0, 1), *own),
            F.scaled_dot_product_attention(video[0].flatten(0, 1), *(t.flatten(0, 1) for t in every)),
        )
        return torch.cat([a.unflatten(0, (-1, scenes)).transpose(1, 2).flatten(2, 3) for a in answers], dim=2)

    def in_turn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [t.split([*words, *tokens], dim=2) for t in (q, k, v)]
        texts, videos = [], []
        for i in range(scenes):
            own = [torch.cat([p[i], p[scenes + i]], dim=2) for p in parts[1:]]
            every = [torch.cat([p[i], *p[scenes:]], dim=2) for p in parts[1:]]
            texts.append(F.scaled_dot_product_attention(parts[0][i], *own))
            videos.append(F.scaled_dot_product_attention(parts[0][scenes + i], *every))
        return torch.cat([*texts, *videos], dim=2)

    return folded if equal else in_turn


def report(rows: list[dict[str, Any]], title: str) -> None:
    """The command line of a case: a table, or JSON."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--json", action="store_true", help="print one JSON value")
    if parser.parse_args().json:
        print(json.dumps(rows))
        return
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])
