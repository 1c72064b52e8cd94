"""`cogvideox_vae`: the causal VAE of CogVideoX: 8 x 8 pixels, 4 frames, 16 channels; clips of 1 + 4 k.

Its group norms take their statistics over all frames of one call, so results depend on how a clip is cut into
calls. The cut is therefore part of the model, and it is the one that diffusers makes: pixels go in by eight
(the first call takes the rest as well), latents come out by two (the first call takes three). What the
convolutions look back on is handed from call to call; it belongs to one stream.

The decoder makes 1 + 4 k frames of 1 + k latents only if k is even, and it was trained so. For an odd k the
last latent is given twice and the frames of its double are dropped; the convolutions are causal, so nothing
of the double is seen but through the norm of that last call.

One scaling factor serves all channels (`scaling_factor`; a `shift_factor` if there is one is taken off
first): the channels' own means and deviations are not in the published model. `invert_scale_latents`
(CogVideoX 1.5) concerns only the conditioning image of the image-to-video model, not these latents.

CogVideoX: arXiv 2408.06072, section 2.1. Shapes: B batch, C channels, T frames, H x W pixels or cells.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from motionloom.tokenizers.base import TokenizerSpec
from motionloom.tokenizers.checks import require_factor, require_numbers
from motionloom.tokenizers.vae import VaeKind

_PIXELS_AT_ONCE, _LATENTS_AT_ONCE = 8, 2


def _spec(vae: Any) -> TokenizerSpec:
    config = vae.config
    spatial = 2 ** (len(config.block_out_channels) - 1)
    return TokenizerSpec(
        config.latent_channels, spatial, int(config.temporal_compression_ratio), first_alone=True
    )


def _check(vae: Any) -> None:
    ratio = vae.config.temporal_compression_ratio
    # The layers halve time so many times; another ratio would be rounded down to one.
    if ratio <= 0 or not math.log2(ratio).is_integer():
        raise ValueError(f"temporal_compression_ratio is {ratio!r}, not a power of 2")


def _statistics(vae: Any) -> tuple[Tensor, Tensor]:
    config = vae.config
    require_factor(config.scaling_factor, "scaling_factor")
    require_numbers([config.shift_factor or 0], "shift_factor")
    mean = torch.full((config.latent_channels,), float(config.shift_factor or 0))
    return mean, torch.full_like(mean, 1 / config.scaling_factor)


def _groups(frames: int, spec: TokenizerSpec) -> list[int]:
    rest = frames % _PIXELS_AT_ONCE
    if frames < _PIXELS_AT_ONCE:
        return [frames]
    return [_PIXELS_AT_ONCE + rest, *[_PIXELS_AT_ONCE] * (frames // _PIXELS_AT_ONCE - 1)]


def _encode(vae: Any, pixels: Iterator[Tensor]) -> Iterator[Tensor]:
    """Groups of pixel frames (B, 3, T, H, W) -> the posterior's mean (B, C, t, h, w)."""
    features = None
    for group in pixels:
        moments, features = vae.encoder(group, conv_cache=features)
        if vae.quant_conv is not None:
            moments = vae.quant_conv(moments)
        yield moments[:, : vae.config.latent_channels]


def _decode(vae: Any, latents: Iterator[Tensor]) -> Iterator[Tensor]:
    """Latent frames (B, C, 1, h, w) -> pixel frames (B, 3, T, H, W), three and then two latents at a time."""
    features = None
    temporal = int(vae.config.temporal_compression_ratio)
    wanted = _LATENTS_AT_ONCE + 1
    while group := list(islice(latents, wanted)):
        # One is missing at the end of an even number of latents; a single frame stays single.
        doubled = len(group) == wanted - 1
        z = torch.cat([*group, group[-1]] if doubled else group, dim=2)
        if vae.post_quant_conv is not None:
            z = vae.post_quant_conv(z)
        x, features = vae.decoder(z, conv_cache=features)
        yield x[:, :, : x.shape[2] - temporal] if doubled else x
        wanted = _LATENTS_AT_ONCE


def _resume_from(vae: Any, latent: int) -> int:
    """Every convolution over time looks into the call before, and calls must be cut as they were."""
    layers = sum(isinstance(m, nn.Conv3d) and m.kernel_size[0] > 1 for m in vae.decoder.modules())
    calls = layers + 1  # its own, and the first, which takes one latent more
    return max(0, (latent - _LATENTS_AT_ONCE * (calls + 1)) // _LATENTS_AT_ONCE * _LATENTS_AT_ONCE)


COGVIDEOX_VAE = VaeKind(
    name="cogvideox_vae",
    vae_class="AutoencoderKLCogVideoX",
    spec=_spec,
    statistics=_statistics,
    encode=_encode,
    decode=_decode,
    resume_from=_resume_from,
    groups=_groups,
    check=_check,
)
