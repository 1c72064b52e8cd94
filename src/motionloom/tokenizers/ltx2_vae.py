"""`ltx2_vae`: the video VAE of LTX-2 (32 x 32 pixels, 8 frames, 128 channels; clips of 1 + 8 k frames).

Its encoder looks back only; its decoder, as published, looks both ways, so that a frame is decided once the
frames that it looks ahead to are there. Neither keeps what it has seen. Here the network's own layers are run
as a pipeline of generators: each convolution over time holds the few frames that its kernel spans and passes
on what is decided. That equals the whole clip at once to rounding, repeats no work (as overlapping windows
would) and holds memory constant; a decoder that looks ahead lags by its receptive field, which no exact
stream can avoid (:func:`lookahead`; 22 latent frames for the published sizes), and catches up when the
latents end.

LTX-Video: arXiv 2501.00103, section 2.1. Shapes: B batch, C channels, T frames, H x W pixels or cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from motionloom.tokenizers.base import TokenizerSpec
from motionloom.tokenizers.checks import require_factor, require_truths
from motionloom.tokenizers.fork import fork
from motionloom.tokenizers.vae import VaeKind

Frames = Iterator[Tensor]
"""Pieces (B, C, T, H, W) of one clip in order, of any lengths T > 0."""


def _spec(vae: Any) -> TokenizerSpec:
    # Counted on the layers: the class's own ratios are wrong where a config leaves them out.
    spatial, temporal = vae.config.patch_size, vae.config.patch_size_t
    for block in vae.encoder.down_blocks:
        for layer in block.downsamplers or ():
            t, rows, _ = (layer if hasattr(layer, "group_size") else layer.conv).stride
            spatial, temporal = spatial * rows, temporal * t
    return TokenizerSpec(vae.config.latent_channels, spatial, temporal, first_alone=True)


def _statistics(vae: Any) -> tuple[Tensor, Tensor]:
    require_factor(vae.config.scaling_factor, "scaling_factor")
    return vae.latents_mean, vae.latents_std.float() / vae.config.scaling_factor


def _check(vae: Any) -> None:
    config = vae.config
    noise = config.decoder_inject_noise
    if config.timestep_conditioning or any(noise if isinstance(noise, list | tuple) else [noise]):
        raise ValueError("its decoder draws noise, and latents must decide")
    if config.patch_size_t != 1:
        raise ValueError(f"patch_size_t is {config.patch_size_t}, not 1")
    require_truths(config, "encoder_causal", "decoder_causal")


def _encode(vae: Any, pixels: Frames) -> Frames:
    """Pixel frames -> the posterior's mean (B, C, t, h, w)."""
    encoder = vae.encoder
    causal = encoder.is_causal
    x = _conv(encoder.conv_in, _each(lambda x: _fold_pixels(x, encoder.patch_size), pixels), causal)
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            x = _resnet(resnet, x, causal)
        for downsampler in block.downsamplers or ():
            x = _downsampler(downsampler, x, causal)
    for resnet in encoder.mid_block.resnets:
        x = _resnet(resnet, x, causal)
    x = _conv(encoder.conv_out, _each(lambda x: encoder.conv_act(encoder.norm_out(x)), x), causal)
    return _each(lambda moments: moments[:, : vae.config.latent_channels], x)


def _decode(vae: Any, latents: Frames) -> Frames:
    """Latent frames -> pixel frames (B, 3, T, H, W).

    A decoder that mirrors edges cannot mirror a single row or column. Such a one is decoded as two equal ones
    and the pixels of the second are dropped: to the decoder it goes on as it is.
    """
    mirrors = vae.decoder.conv_in.conv.padding_mode == "reflect"
    first = next(latents, None)
    if first is None:
        return
    lone = [axis for axis in (3, 4) if mirrors and first.shape[axis] == 1]
    wide = _each(lambda z: _doubled(z, lone), chain([first], latents))
    yield from _each(lambda x: _halved(x, lone), _decode_wide(vae, wide))


def _doubled(x: Tensor, axes: list[int]) -> Tensor:
    for axis in axes:
        x = torch.cat([x, x], dim=axis)
    return x


def _halved(x: Tensor, axes: list[int]) -> Tensor:
    for axis in axes:
        x = x.narrow(axis, 0, x.shape[axis] // 2)
    return x


def _decode_wide(vae: Any, latents: Frames) -> Frames:
    decoder = vae.decoder
    causal = decoder.is_causal
    x = _conv(decoder.conv_in, latents, causal)
    for resnet in decoder.mid_block.resnets:
        x = _resnet(resnet, x, causal)
    for block in decoder.up_blocks:
        if block.conv_in is not None:
            x = _resnet(block.conv_in, x, causal)
        for upsampler in block.upsamplers or ():
            x = _upsampler(upsampler, x, causal)
        for resnet in block.resnets:
            x = _resnet(resnet, x, causal)
    x = _conv(decoder.conv_out, _each(lambda x: decoder.conv_act(decoder.norm_out(x)), x), causal)
    return _each(lambda x: _unfold_pixels(x, decoder.patch_size), x)


def lookahead(vae: Any) -> int:
    """Latent frames after its own that a latent's pixels depend on; 0 for a causal decoder.

    Walked from the last layer to the first: which frame does the last pixel frame of latent 0, frame 0, need?
    """
    return 0 if vae.decoder.is_causal else _sight(vae, 1)


def _resume_from(vae: Any, latent: int) -> int:
    # The kernel of a causal layer lies behind its frame, that of another on both sides. One more, for the
    # frames of a first latent that upsamplers drop.
    return max(0, latent - _sight(vae, 2 if vae.decoder.is_causal else 1) - 1)


def _sight(vae: Any, each: int) -> int:
    """Latent frames that the decoder sees in one direction, where each convolution sees so many frames."""
    decoder = vae.decoder
    frame = each
    for block in reversed(decoder.up_blocks):
        frame += 2 * each * len(block.resnets)
        for upsampler in block.upsamplers or ():
            frame = -(-frame // upsampler.stride[0]) + each
        frame += 2 * each * (block.conv_in is not None)
    return frame + 2 * each * len(decoder.mid_block.resnets) + each


def _resnet(block: Any, frames: Frames, causal: bool) -> Frames:
    main, skip = fork(frames, 2)
    x = _conv(block.conv1, _each(lambda x: block.nonlinearity(block.norm1(x)), main), causal)
    x = _conv(block.conv2, _each(lambda x: block.nonlinearity(block.norm2(x)), x), causal)
    if block.norm3 is not None:
        skip = _each(lambda x: block.norm3(x.movedim(1, -1)).movedim(-1, 1), skip)
    if block.conv_shortcut is not None:
        skip = _each(block.conv_shortcut, skip)
    return _add(x, skip)


def _downsampler(layer: Any, frames: Frames, causal: bool) -> Frames:
    if not hasattr(layer, "group_size"):  # a convolution with a stride
        return _conv(layer, frames, causal)
    t = layer.stride[0]
    main, skip = fork(_doubled_first(frames, t - 1), 2)
    x = _each(lambda x: _fold_box(x, layer.stride), _in_groups(_conv(layer.conv, main, causal), t))
    skip = _each(
        lambda x: _fold_box(x, layer.stride).unflatten(1, (-1, layer.group_size)).mean(dim=2),
        _in_groups(skip, t),
    )
    return _add(x, skip)


def _upsampler(layer: Any, frames: Frames, causal: bool) -> Frames:
    t = layer.stride[0]

    def larger(x: Tensor) -> Tensor:
        return _unfold_box(x, layer.stride)

    if not layer.residual:
        return _without_first(_each(larger, _conv(layer.conv, frames, causal)), t - 1)
    main, skip = fork(frames, 2)
    repeats = math.prod(layer.stride) // layer.upscale_factor
    x = _without_first(_each(larger, _conv(layer.conv, main, causal)), t - 1)
    return _add(x, _without_first(_each(lambda x: larger(x).repeat(1, repeats, 1, 1, 1), skip), t - 1))


# Streams


def _each(change: Callable[[Tensor], Tensor], frames: Frames) -> Frames:
    """A layer that treats every frame by itself."""
    return map(change, frames)


def _conv(layer: Any, frames: Frames, causal: bool) -> Frames:
    """A convolution over time, edges repeated: behind only if causal, else on both sides."""
    kernel, stride = layer.kernel_size[0], layer.conv.stride[0]
    ahead = 0 if causal else (kernel - 1) // 2
    held: Tensor | None = None
    for x in frames:
        if held is None:
            held = x[:, :, :1].expand(-1, -1, (kernel - 1) if causal else ahead, -1, -1)
        last = x[:, :, -1:]
        held = torch.cat([held, x], dim=2)
        if held.shape[2] >= kernel:
            y, held = _valid(layer.conv, held, kernel, stride)
            yield y
    if held is not None and ahead:
        held = torch.cat([held, last.expand(-1, -1, ahead, -1, -1)], dim=2)
        if held.shape[2] >= kernel:
            yield _valid(layer.conv, held, kernel, stride)[0]


def _valid(conv: Any, held: Tensor, kernel: int, stride: int) -> tuple[Tensor, Tensor]:
    """What the kernel yields where it fits, and the frames that it still needs."""
    count = (held.shape[2] - kernel) // stride + 1
    # Cloned, so that the frames before them are let go.
    return conv(held[:, :, : (count - 1) * stride + kernel]), held[:, :, count * stride :].clone()


def _add(main: Frames, skip: Frames) -> Frames:
    """Sums of two streams of equal length, cut as the first is; the second must never lag behind it."""
    rest: Tensor | None = None
    for x in main:
        while rest is None or rest.shape[2] < x.shape[2]:
            more = next(skip)
            rest = more if rest is None else torch.cat([rest, more], dim=2)
        yield x + rest[:, :, : x.shape[2]]
        rest = rest[:, :, x.shape[2] :].clone()


def _in_groups(frames: Frames, count: int) -> Frames:
    """The same frames in pieces of multiples of ``count``."""
    rest: Tensor | None = None
    for x in frames:
        x = x if rest is None else torch.cat([rest, x], dim=2)
        whole = x.shape[2] // count * count
        rest = x[:, :, whole:].clone()
        if whole:
            yield x[:, :, :whole]
    assert rest is None or not rest.shape[2], "the spec lets only whole groups in"


def _doubled_first(frames: Frames, times: int) -> Frames:
    for x in frames:
        yield torch.cat([x[:, :, :1].expand(-1, -1, times, -1, -1), x], dim=2)
        yield from frames


def _without_first(frames: Frames, count: int) -> Frames:
    for x in frames:
        if x.shape[2] > count:
            yield x[:, :, count:]
        count = max(0, count - x.shape[2])


# Layouts


def _fold_box(x: Tensor, box: tuple[int, int, int]) -> Tensor:
    """Boxes of t x h x w cells into channels (channel, t, h, w)."""
    x = x.unflatten(4, (-1, box[2])).unflatten(3, (-1, box[1])).unflatten(2, (-1, box[0]))
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def _unfold_box(x: Tensor, box: tuple[int, int, int]) -> Tensor:
    x = x.unflatten(1, (-1, *box))  # B C t h w T H W
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def _fold_pixels(x: Tensor, p: int) -> Tensor:
    """Squares of p x p pixels into channels (colour, column, row)."""
    return _fold_box(x.transpose(3, 4), (1, p, p)).transpose(3, 4)


def _unfold_pixels(x: Tensor, p: int) -> Tensor:
    return _unfold_box(x.transpose(3, 4), (1, p, p)).transpose(3, 4)


LTX2_VAE = VaeKind(
    name="ltx2_vae",
    vae_class="AutoencoderKLLTX2Video",
    spec=_spec,
    statistics=_statistics,
    encode=_encode,
    decode=_decode,
    resume_from=_resume_from,
    check=_check,
)
