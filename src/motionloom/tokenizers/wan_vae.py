"""`wan_vae`: the causal VAE of Wan 2.1 (8 x 8 pixels, 4 frames, 16 channels) and of Wan 2.2 5B (16 x 16, 48).

The first frame is a latent frame of its own, then every four (clips of 1 + 4 k frames). All convolutions over
time look back only; what they look back on is a list of features, one entry per convolution, which belongs to
one stream and lives as long as it. So a clip is coded latent frame by latent frame, exactly, in constant
memory.

Wan 2.1: arXiv 2503.20314, section 4.1. Shapes: B batch, C channels, T frames, H x W pixels or cells.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from motionloom.tokenizers.base import TokenizerSpec
from motionloom.tokenizers.checks import require_counts, require_numbers
from motionloom.tokenizers.vae import VaeKind


def _spec(vae: Any) -> TokenizerSpec:
    config = vae.config
    spatial = 2 ** (len(config.dim_mult) - 1) * (config.patch_size or 1)
    return TokenizerSpec(config.z_dim, spatial, 2 ** sum(config.temperal_downsample), first_alone=True)


def _check(vae: Any) -> None:
    config = vae.config
    square = config.patch_size or 1
    require_counts(patch_size=square)
    if config.in_channels != 3 * square**2:
        raise ValueError(
            f"in_channels is {config.in_channels}, not the 3 x {square} x {square} of patch_size"
        )
    halves = config.temperal_downsample
    if len(halves) != len(config.dim_mult) - 1 or not all(isinstance(half, bool) for half in halves):
        raise ValueError(f"temperal_downsample is {halves!r}, not a truth between each two of dim_mult")


def _statistics(vae: Any) -> tuple[Tensor, Tensor]:
    mean, std = vae.config.latents_mean, vae.config.latents_std
    require_numbers(mean, "latents_mean")
    require_numbers(std, "latents_std")
    return torch.tensor(mean), torch.tensor(std)


def _empty_features(network: nn.Module) -> list[Any]:
    """Room for what every causal convolution of one stream has seen; more than enough of it."""
    return [None] * sum(isinstance(module, nn.Conv3d) for module in network.modules())


def _encode(vae: Any, pixels: Iterator[Tensor]) -> Iterator[Tensor]:
    """The first frame, then groups of frames, (B, 3, T, H, W) -> the posterior's mean (B, C, 1, h, w)."""
    features = _empty_features(vae.encoder)
    for group in pixels:
        x = _fold(group, vae.config.patch_size or 1)
        moments = vae.quant_conv(vae.encoder(x, feat_cache=features, feat_idx=[0]))
        yield moments[:, : vae.config.z_dim]


def _decode(vae: Any, latents: Iterator[Tensor]) -> Iterator[Tensor]:
    """Latent frames (B, C, 1, h, w) -> their pixel frames (B, 3, 1 or 4, H, W)."""
    features = _empty_features(vae.decoder)
    for n, z in enumerate(latents):
        x = vae.decoder(vae.post_quant_conv(z), feat_cache=features, feat_idx=[0], first_chunk=n == 0)
        yield _unfold(x, vae.config.patch_size or 1)


def _resume_from(vae: Any, latent: int) -> int:
    return max(0, latent - lookback(vae))


def lookback(vae: Any) -> int:
    """Latent frames before its own that a latent's pixels depend on.

    Walked from the last layer to the first: every convolution looks two frames back, and before an upsampler
    of time there are half as many.
    """
    decoder = vae.decoder
    frames = 2
    for block in reversed(decoder.up_blocks):
        # Wan 2.1 has a list of one, Wan 2.2 the layer itself.
        upsamplers = getattr(block, "upsamplers", None) or [getattr(block, "upsampler", None)]
        if any(layer is not None and layer.mode == "upsample3d" for layer in upsamplers):
            frames = -(-frames // 2) + 2
        frames += 4 * len(block.resnets)
    return frames + 4 * len(decoder.mid_block.resnets) + 2


def _fold(x: Tensor, p: int) -> Tensor:
    """Squares of p x p pixels into channels (colour, column, row); Wan 2.2 only."""
    if p == 1:
        return x
    x = x.unflatten(4, (-1, p)).unflatten(3, (-1, p))  # B 3 T H p W p
    return x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def _unfold(x: Tensor, p: int) -> Tensor:
    if p == 1:
        return x
    x = x.unflatten(1, (-1, p, p))  # B 3 (column) (row) T H W
    return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)


WAN_VAE = VaeKind(
    name="wan_vae",
    vae_class="AutoencoderKLWan",
    spec=_spec,
    statistics=_statistics,
    encode=_encode,
    decode=_decode,
    resume_from=_resume_from,
    check=_check,
)
