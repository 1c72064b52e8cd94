"""The published backbones at their real widths: use of the machine, and frames per second of a stream.

    python benchmarks/backbones.py --json           # real widths, for an accelerator
    python benchmarks/backbones.py --tiny --json    # the same code at toy widths: seconds on a CPU

Two parts, each with diffusers' own classes as the peer on the same weights, sizes and precision:

- ``train``: forward and backward of wan, cogvideox and ltx2 with random weights and ``--layers`` blocks, in
  bf16. Work is what torch's FlopCounterMode counts in the real passes; the machine's rate is that of large
  bf16 matrix products measured in the same run. ``mfu`` is their ratio.
- ``stream``: a clip of 21 latent frames made in causal chunks of 3, 4 steps and a pass that writes the cache,
  by a model of Wan 1.3B's shape at 832 x 480; frames per second without and with decoding, and peak memory.
  The peer makes the same frames all at once, as diffusers' WanPipeline does: 4 steps, then its decoder.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from motionloom.backbones.cogvideox import PRESETS as COGVIDEOX
from motionloom.backbones.cogvideox import CogVideoX
from motionloom.backbones.ltx2 import LTX2
from motionloom.backbones.ltx2 import PRESETS as LTX2_PRESETS
from motionloom.backbones.prediction import Predictor
from motionloom.backbones.wan import PRESETS as WAN
from motionloom.backbones.wan import Wan
from motionloom.flow import LINEAR
from motionloom.generate import Sampling, Task, rollout
from motionloom.plans import (
    NOTHING,
    Chunks,
    Geometry,
    Sample,
    Streams,
    Text,
    TextToVideo,
    Values,
    to_streams,
)
from motionloom.plans.geometry import token_geometry
from motionloom.rng import torch_generator

FAMILIES: dict[str, tuple[type[nn.Module], Any, Any, str]] = {
    "wan": (Wan, WAN["wan2.1-t2v-1.3b"], WAN["tiny"], "WanTransformer3DModel"),
    "cogvideox": (CogVideoX, COGVIDEOX["cogvideox-5b"], COGVIDEOX["tiny"], "CogVideoXTransformer3DModel"),
    "ltx2": (LTX2, LTX2_PRESETS["ltx2-19b"], LTX2_PRESETS["tiny"], "LTX2VideoTransformer3DModel"),
}
"""Class, real sizes, toy sizes, the peer's class."""


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    tiny: bool
    layers: int
    latent_grid: tuple[int, int, int]
    words: int
    rounds: int

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.tiny else torch.bfloat16


REAL = Scale(False, 4, (21, 60, 104), 512, 5)
TOY = Scale(True, 2, (6, 8, 8), 8, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--tiny", action="store_true", help="toy widths")
    parser.add_argument("--layers", type=int, help="blocks of the trained models")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--only", choices=("train", "stream"), help="one part")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    scale = TOY if args.tiny else REAL
    scale = replace(scale, layers=args.layers or scale.layers)
    device = torch.device(args.device)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "compiled": not args.eager,
    }
    if args.only != "stream":
        rate = product_rate(device, scale)
        result["product_tflops"] = round(rate / 1e12, 2)
        result["train"] = {name: train(name, scale, device, rate, not args.eager) for name in FAMILIES}
    if args.only != "train":
        result["stream"] = stream(scale, device, not args.eager)
    print(json.dumps(result) if args.json else json.dumps(result, indent=2))


def timed(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median seconds of a run, the device's queue included; one run before it warms up."""
    found = []
    for _ in range(rounds + 1):
        wait(device)
        began = time.perf_counter()
        run()
        wait(device)
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


def wait(device: torch.device) -> None:
    """Until the device's queue is empty."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def product_rate(device: torch.device, scale: Scale) -> float:
    """Operations per second of the fastest of some large bf16 products."""
    sizes = (512, 1024) if scale.tiny else (4096, 8192)
    rates = []
    for size in sizes:
        a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
        rates.append(2 * size**3 / timed(lambda a=a, b=b: a @ b, device, 10))
    return max(rates)


def make_text(dim: int, scale: Scale, device: torch.device) -> Text:
    """Words that say nothing."""
    x_BLC = torch.randn(1, scale.words, dim, generator=torch_generator("text", device=device), device=device)
    valid_BL = torch.ones(1, scale.words, dtype=torch.bool, device=device)
    return Text(x_BLC, valid_BL, torch.zeros(1, scale.words, dtype=torch.long, device=device))


def make_geometry(patch: tuple[int, int, int], scale: Scale, device: torch.device) -> Geometry:
    """A clip at 16 latent-frame quarters a second, cut to what the patch divides."""
    frames, rows, columns = (n - n % p for n, p in zip(scale.latent_grid, patch, strict=True))
    seconds_BF = torch.arange(frames, device=device)[None] / 4.0
    scene_BF = torch.zeros(1, frames, dtype=torch.long, device=device)
    return token_geometry((frames, rows, columns), patch, seconds_BF, scene_BF, 8, 1)


def build(name: str, scale: Scale, device: torch.device, layers: int, compiled: bool) -> Any:
    """A backbone with random weights, of so many blocks."""
    kind, real, toy, _ = FAMILIES[name]
    sizes = replace(toy if scale.tiny else real, num_layers=layers)
    with torch.device("meta"):
        model = kind(sizes)
    if device.type == "meta":
        return model
    model = model.to_empty(device="cpu")
    model.init_weights(torch_generator("benchmark"))
    model = model.to(device, scale.dtype)
    if compiled:
        for block in model.blocks():
            block.compile()
    return model


def train(name: str, scale: Scale, device: torch.device, rate: float, compiled: bool) -> dict[str, Any]:
    """Forward and backward of one family, ours and the peer's in turns."""
    model = build(name, scale, device, scale.layers, compiled)
    geometry = make_geometry(model.patch, scale, device)
    text = make_text(model.text_dim, scale, device)
    layout = TextToVideo().layout(Sample({"video": geometry}), text, NOTHING)
    shape = (1, geometry.grid[0], geometry.grid[1] * geometry.grid[2])
    channels = model.latent_channels * model.patch[0] * model.patch[1] * model.patch[2]
    clean = {"video": torch.randn(*shape, channels, device=device)}
    track = layout.tracks["video"]
    sigma = {"video": track.sigmas(torch.full((1, track.num_draws), 0.5, device=device))}

    def streams() -> Streams:
        return to_streams(layout, Values(clean), clean, sigma, text, LINEAR.mix)

    def step() -> None:
        model(streams(), layout.visibility)["video"].float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    plain = build(name, scale, device, scale.layers, False)
    with FlopCounterMode(display=False) as counter:
        plain(streams(), layout.visibility)["video"].float().square().mean().backward()
    flops = counter.get_total_flops()
    del plain
    peer = peer_step(name, model, scale, device, compiled)
    reset_peak(device)
    ours, theirs = [], []
    for _ in range(3):
        ours.append(timed(step, device, scale.rounds))
        theirs.append(timed(peer, device, scale.rounds))
    seconds, peer_seconds = statistics.median(ours), statistics.median(theirs)
    return {
        "layers": scale.layers,
        "tokens": shape[1] * shape[2],
        "parameters": sum(p.numel() for p in model.parameters()),
        "tflop_per_step": round(flops / 1e12, 4),
        "seconds": round(seconds, 5),
        "mfu": round(flops / seconds / rate, 3),
        "peer_seconds": round(peer_seconds, 5),
        "peer_over_ours": round(peer_seconds / seconds, 3),
        "peak_memory_gib": peak(device),
    }


def peer_step(
    name: str, model: Any, scale: Scale, device: torch.device, compiled: bool
) -> Callable[[], None]:
    """The same passes by diffusers' class of the same sizes."""
    import diffusers

    config = model.sizes.to_diffusers()
    peer = getattr(diffusers, FAMILIES[name][3]).from_config(config).to(device, scale.dtype).train()
    if compiled:
        peer.compile_repeated_blocks()
    frames, rows, columns = (n - n % p for n, p in zip(scale.latent_grid, model.patch, strict=True))
    text = make_text(model.text_dim, scale, device).x_BLC.to(scale.dtype)
    inputs = _peer_inputs(name, model, (frames, rows, columns), text, scale, device)

    def step() -> None:
        out = peer(**inputs, return_dict=False)[0]
        out.float().square().mean().backward()
        peer.zero_grad(set_to_none=True)

    return step


def _peer_inputs(
    name: str, model: Any, grid: tuple[int, int, int], text: Tensor, scale: Scale, device: torch.device
) -> dict[str, Any]:
    frames, rows, columns = grid
    channels, dtype = model.latent_channels, scale.dtype
    if name == "wan":
        x = torch.randn(1, channels, frames, rows, columns, device=device, dtype=dtype)
        time = torch.full((1,), 500, device=device)
        return {"hidden_states": x, "timestep": time, "encoder_hidden_states": text}
    if name == "cogvideox":
        from diffusers.models.embeddings import get_3d_rotary_pos_embed

        x = torch.randn(1, frames, channels, rows, columns, device=device, dtype=dtype)
        size = (rows // 2, columns // 2)
        tables = get_3d_rotary_pos_embed(
            model.sizes.attention_head_dim, ((0, 0), size), size, frames, device=device
        )
        time = torch.full((1,), 500, device=device)
        return {
            "hidden_states": x,
            "timestep": time,
            "encoder_hidden_states": text,
            "image_rotary_emb": tables if model.sizes.use_rotary_positional_embeddings else None,
        }
    sizes = model.sizes
    x = torch.randn(1, frames * rows * columns, channels, device=device, dtype=dtype)
    # The peer cannot leave sound out: one token of it, apart from the video.
    sound = torch.randn(1, 1, sizes.audio_in_channels, device=device, dtype=dtype)
    time = torch.full((1, x.shape[1]), 500.0, device=device)
    half = text.shape[-1] // 2
    return {
        "hidden_states": x,
        "audio_hidden_states": sound,
        "encoder_hidden_states": text[..., :half],
        "audio_encoder_hidden_states": text[..., half:],
        "timestep": time,
        "audio_timestep": time[:, :1],
        "sigma": time[:, 0],
        "audio_sigma": time[:, 0],
        "num_frames": frames,
        "height": rows,
        "width": columns,
        "audio_num_frames": 1,
        "isolate_modalities": True,
    }


Maker = Callable[[Scale, torch.device, bool], tuple[Callable[[], object], Callable[[], object]]]


@torch.no_grad()
def stream(scale: Scale, device: torch.device, compiled: bool) -> dict[str, Any]:
    """A causal model of Wan 1.3B's shape against the peer's way of making the same frames."""
    latent_frames = scale.latent_grid[0]
    frames = 1 + 4 * (latent_frames - 1)
    makers: dict[str, Maker] = {"ours": causal_stream, "diffusers": peer_clip}
    found: dict[str, Any] = {"latent_frames": latent_frames, "frames": frames}
    for name, maker in makers.items():
        # One after the other, so that neither's memory counts as the other's.
        run, decode = maker(scale, device, compiled)
        reset_peak(device)
        alone = timed(run, device, scale.rounds)
        memory = peak(device)
        decoding = timed(decode, device, 1)
        found[name] = {
            "fps": round(frames / alone, 3),
            "fps_with_decoding": round(frames / (alone + decoding), 3),
            "peak_memory_gib": memory,
            "peak_memory_with_decoding_gib": peak(device),
        }
        del run, decode
    return found


def causal_stream(
    scale: Scale, device: torch.device, compiled: bool
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Chunks of 3 through the cache, 4 steps each and a clean pass; and a decoder that streams."""
    from motionloom.tokenizers.vae import VaeSettings, VaeTokenizer
    from motionloom.tokenizers.wan_vae import WAN_VAE

    layers = FAMILIES["wan"][2 if scale.tiny else 1].num_layers
    model = build("wan", scale, device, layers, compiled).eval()
    geometry = make_geometry(model.patch, scale, device)
    text = make_text(model.text_dim, scale, device)
    cells = geometry.grid[1] * geometry.grid[2]
    noise_BFSC = torch.randn(1, geometry.grid[0], cells, model.latent_channels * 4, device=device)
    sampling = Sampling(solver="euler", steps=4, shift=8.0)
    settings = VaeSettings(precision="fp32" if scale.tiny else "bf16")
    tokenizer = VaeTokenizer(WAN_VAE, make_vae(scale, device), settings)
    chunks = latents(scale, device).permute(0, 2, 3, 4, 1).float().split(3, dim=1)

    task = Task(Sample({"video": geometry}), text, {"video": noise_BFSC})

    def run() -> Tensor:
        return rollout(Predictor(model), Chunks(3), task, sampling)["video"]

    return run, lambda: sum(part.shape[1] for part in tokenizer.stream_decode(chunks))


def peer_clip(
    scale: Scale, device: torch.device, compiled: bool
) -> tuple[Callable[[], object], Callable[[], object]]:
    """All frames at once, 4 steps; and the whole clip decoded."""
    import diffusers

    sizes = FAMILIES["wan"][2 if scale.tiny else 1]
    model = build("wan", scale, torch.device("meta"), sizes.num_layers, False)
    peer = diffusers.WanTransformer3DModel.from_config(sizes.to_diffusers())
    peer = peer.to(device, scale.dtype).eval()
    if compiled:
        peer.compile_repeated_blocks()
    text = make_text(sizes.text_dim, scale, device).x_BLC.to(scale.dtype)
    inputs = _peer_inputs("wan", model, scale.latent_grid, text, scale, device)
    vae, z = make_vae(scale, device), latents(scale, device)

    def run() -> None:
        for step in range(4):
            peer(**inputs | {"timestep": inputs["timestep"] - step}, return_dict=False)

    return run, lambda: vae.decode(z, return_dict=False)


def make_vae(scale: Scale, device: torch.device) -> Any:
    """Wan's, with random weights."""
    import diffusers

    sizes = {"base_dim": 16, "num_res_blocks": 1} if scale.tiny else {}
    return diffusers.AutoencoderKLWan(**sizes).to(device, scale.dtype).eval()


def latents(scale: Scale, device: torch.device) -> Tensor:
    """What there is to decode, (1, 16, F, h, w)."""
    return torch.randn(1, 16, *scale.latent_grid, device=device, dtype=scale.dtype)


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> float | None:
    """GiB that tensors held at most since ``reset_peak``; unknown on a CPU."""
    return round(torch.cuda.max_memory_allocated(device) / 2**30, 3) if device.type == "cuda" else None


if __name__ == "__main__":
    main()
