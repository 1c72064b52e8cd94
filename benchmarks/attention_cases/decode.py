"""Decoding a stream of latents: peak memory is constant in its length; decoding at once grows with it.

    python benchmarks/attention_cases/decode.py --json

Small VAEs of the real classes with random weights. Streamed: latent frames are made one by one, go through
``stream_decode``, and pixel frames are dropped as they come. Whole: the class's own ``decode`` of the clip.
What is counted is the bytes of all tensors alive at once (on a GPU the allocator's peak), beyond the weights;
buffers that a convolution's kernel takes for itself are not seen on a CPU.
"""

from __future__ import annotations

import argparse
import json
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from motionloom.rng import torch_generator
from motionloom.tokenizers import VAES, VaeSettings, VaeTokenizer

MODELS: dict[str, dict[str, Any]] = {
    "wan_vae": {
        "base_dim": 8,
        "z_dim": 4,
        "num_res_blocks": 1,
        "latents_mean": [0.0] * 4,
        "latents_std": [1.0] * 4,
    },
    "cogvideox_vae": {
        "block_out_channels": [8, 8, 8, 16],
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 2,
    },
    "ltx2_vae": {
        "latent_channels": 8,
        "block_out_channels": [8, 8, 16, 16],
        "decoder_block_out_channels": [8, 16, 32],
        "layers_per_block": [1] * 5,
        "decoder_layers_per_block": [1] * 4,
        "decoder_causal": False,
    },
}
CELLS = (3, 4)
LENGTHS = (17, 34, 136)
"""Latent frames: once, twice and eight times a length that every decoder's sight fits into."""


@dataclass(frozen=True)
class Result:
    """Peak bytes beyond the weights, per length."""

    tokenizer: str
    latent_frames: tuple[int, ...]
    streamed_bytes: tuple[int, ...]
    whole_bytes: tuple[int, ...]

    @property
    def streamed_growth(self) -> float:
        """Of the longest against the shortest; 1 is constant."""
        return self.streamed_bytes[-1] / self.streamed_bytes[0]

    @property
    def whole_growth(self) -> float:
        return self.whole_bytes[-1] / self.whole_bytes[0]


class AliveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that tensors made inside it keep alive."""

    def __init__(self) -> None:
        super().__init__()
        self._users: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        return tree_map_only(Tensor, self._see, made)

    def _see(self, tensor: Tensor) -> Tensor:
        if hasattr(tensor, "_counted"):  # what works in place hands the same tensor back
            return tensor
        tensor._counted = True  # type: ignore[attr-defined]
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += self._sizes[key]
            self.peak = max(self.peak, self.now)
        self._users[key] = self._users.get(key, 0) + 1
        weakref.finalize(tensor, self._drop, key)
        return tensor

    def _drop(self, key: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self.now -= self._sizes.pop(key)


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors that ``work`` had at once."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with AliveBytes() as alive:
        work()
    return alive.peak


def random_vae(name: str) -> Any:
    """The VAE of the class behind a tokenizer, small, random weights."""
    import diffusers

    vae = getattr(diffusers, VAES[name].vae_class)(**MODELS[name]).eval().requires_grad_(False)
    generator = torch_generator("decode benchmark", name)
    for parameter in vae.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return vae


def measure(name: str, device: torch.device, lengths: tuple[int, ...] = LENGTHS) -> Result:
    """Both ways, all lengths."""
    vae = random_vae(name).to(device)
    tokens = VaeTokenizer(VAES[name], vae, VaeSettings())
    channels = tokens.spec.channels

    def latents(frames: int) -> Iterator[Tensor]:
        for n in range(frames):
            generator = torch_generator("decode benchmark", n)
            yield torch.randn(1, 1, *CELLS, channels, generator=generator).to(device)

    def streamed(frames: int) -> None:
        for piece in tokens.stream_decode(latents(frames)):
            del piece

    def whole(frames: int) -> None:
        with torch.no_grad():
            vae.decode(torch.cat(list(latents(frames)), dim=1).movedim(-1, 1))

    streamed(3)  # what is made once and kept is no part of any length
    peaks = [
        tuple(peak_bytes(lambda n=n, way=way: way(n), device) for n in lengths)  # type: ignore[misc]
        for way in (streamed, whole)
    ]
    return Result(name, lengths, *peaks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = [measure(name, torch.device(arguments.device)) for name in MODELS]
    if arguments.json:
        growths = ("streamed_growth", "whole_growth")
        print(json.dumps([asdict(r) | {g: round(getattr(r, g), 3) for g in growths} for r in results]))
        return
    for r in results:
        print(f"{r.tokenizer}: peak MB at {', '.join(map(str, r.latent_frames))} latent frames")
        for way, peaks, growth in (
            ("streamed", r.streamed_bytes, r.streamed_growth),
            ("whole", r.whole_bytes, r.whole_growth),
        ):
            print(f"  {way:9}{'  '.join(f'{b / 1e6:8.2f}' for b in peaks)}   x {growth:.2f}")


if __name__ == "__main__":
    main()
