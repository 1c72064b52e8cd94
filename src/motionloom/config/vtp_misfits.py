"""What a tokenizer cannot be trained with. One line each, with the fix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from motionloom.config.recipe import Recipe
    from motionloom.config.vtp import VtpConfig

JUDGED = 16
"""Fewest pixels of a side that the perceptual network takes."""
PRESET_SAYS = (
    *("patch", "channels", "width", "depth", "heads", "qk_norm", "decoder_width", "decoder_depth"),
    *("decoder_heads", "text_width", "text_depth", "text_heads", "vocab_size", "context"),
)
"""Keys of what a released size has already."""


def vtp_cautions(r: Recipe) -> Iterator[str]:
    """What can be trained and is seldom meant."""
    if r.train.method == "tokenizer" and r.vtp.ssl:
        sizes = r.bucketing.buckets if r.bucketing.enabled else ((r.video.width, r.video.height),)
        side = min(min(size) for size in sizes)
        for name in ("global_size", "local_size"):
            if (asked := getattr(r.vtp, name)) > side:
                yield (
                    f"vtp.{name} is {asked}, and frames have {side} pixels a side: crops are scaled up, at "
                    "more cost and with nothing more to see"
                )


def vtp_misfits(r: Recipe) -> Iterator[str]:
    """What in a recipe keeps its tokenizer from being trained."""
    if not r.trains_tokenizer:
        if r.tokenizer.type == "pixels":
            yield (
                "tokenizer.type pixels is for train.method tokenizer and decoder, not "
                f"{r.train.method}: cache with the tokenizer that was trained"
            )
        return
    c, method = r.vtp, r.train.method
    if r.tokenizer.type != "pixels":
        yield (
            f"train.method {method} learns from pixels: set tokenizer.type to pixels, latent_f and latent_t "
            "to 1, latent_d to 3"
        )
    if r.train.sharding != "ddp":
        yield f"train.method {method} keeps the model whole on every rank: set train.sharding to ddp"
    if r.lora.enabled:
        yield f"train.method {method} trains no adapters: set lora.enabled to false"
    if r.plan.modalities != ("video",):
        yield f"train.method {method} sees pictures alone: set plan.modalities to [video]"
    yield from _sizes(r)
    if r.train.parts:
        yield f"train.method {method} trains what its losses reach: leave train.parts out"
    if method == "decoder":
        yield from _judge(r)
        if not r.train.init_from:
            yield "train.method decoder goes on from a trained tokenizer: name its run in train.init_from"
        if not (c.l1 or c.l2 or c.perceptual):
            yield "train.method decoder rebuilds clips: give vtp.l1, vtp.l2 or vtp.perceptual a weight"
        return
    if not (c.rec or c.clip or c.ssl):
        yield "vtp.rec, vtp.clip and vtp.ssl are all 0, so there is nothing to learn: raise one"
    if c.rec and c.rec_start and not (c.clip or c.ssl):
        yield "vtp.rec_start gives the first steps nothing to learn (vtp.clip and vtp.ssl are 0): set it to 0"
    if c.rec and not (c.l1 or c.l2 or c.perceptual):
        yield "vtp.rec has no part with a weight: raise vtp.l1, vtp.l2 or vtp.perceptual"
    if not c.rec and r.train.sample_every_steps:
        yield "train.sample_every_steps shows what is rebuilt, and vtp.rec is 0: set it to 0 as well"
    if not c.clip and (c.words or c.clip_near):
        name = "words" if c.words else "clip_near"
        yield f"vtp.{name} takes captions as vtp.clip reads them, which is 0: set vtp.{name} to 0 as well"
    if c.ssl:
        yield from _distilled(c)
    if c.rec and not c.rec_share:
        yield "vtp.rec_share is 0, and vtp.rec is not: raise it, or set vtp.rec to 0"
    if c.clip and not c.preset and c.vocab_size < 258:
        yield f"vtp.vocab_size {c.vocab_size} has no room for 256 bytes and two marks: use 512 or so"
    if c.clip and r.train.batch_size < 2:
        yield "vtp.clip tells a clip from others of its batch: set train.batch_size to 2 or more, or it to 0"
    if c.clip and c.context < 3:
        yield f"vtp.context {c.context} leaves a caption no word between its marks: set it to 3 or more"


def _distilled(c: VtpConfig) -> Iterator[str]:
    if c.prototypes < 2:
        yield f"vtp.prototypes {c.prototypes} leaves nothing to sort by: set it to 2 or more, or vtp.ssl to 0"
    if not c.ssl_share:
        yield "vtp.ssl_share is 0, and vtp.ssl is not: raise it, or set vtp.ssl to 0"
    for name in ("global_scale", "local_scale", "mask_ratio"):
        low, high = getattr(c, name)
        if low > high:
            yield f"vtp.{name} goes from {low:g} down to {high:g}: put the smaller one first"


def _judge(r: Recipe) -> Iterator[str]:
    """Each layer of the judge halves the frames."""
    least, layers = 3 * 2**r.vtp.gan_layers, r.vtp.gan_layers
    sizes = r.bucketing.buckets if r.bucketing.enabled else ((r.video.width, r.video.height),)
    if (side := min(min(size) for size in sizes)) < least:
        yield f"vtp.gan_layers {layers} needs {least} pixels a side, and there are {side}: use fewer"


def _sizes(r: Recipe) -> Iterator[str]:
    c, patch = r.vtp, 16 if r.vtp.preset else r.vtp.patch
    sizes = r.bucketing.buckets if r.bucketing.enabled else ((r.video.width, r.video.height),)
    for width, height in sizes:
        for name, pixels in (("width", width), ("height", height)):
            if pixels % patch:
                yield f"video.{name} {pixels} is no multiple of vtp.patch {patch}: use {_near(pixels, patch)}"
            if c.perceptual and pixels < JUDGED:
                yield (
                    f"vtp.perceptual looks at {JUDGED} pixels and more, and video.{name} is {pixels}: set "
                    "vtp.perceptual to 0"
                )
    lengths = r.bucketing.frames if r.bucketing.enabled and r.bucketing.frames else (r.video.num_frames,)
    groups = c.temporal_patch
    for frames in lengths:
        if (frames - 1) % groups:
            below = (frames - 1) // groups * groups + 1
            yield (
                f"video.num_frames {frames} is not one frame and groups of vtp.temporal_patch {groups}: use "
                f"{below} or {below + groups}"
            )
    if r.train.method == "tokenizer" and c.ssl:
        for name in ("global_size", "local_size"):
            if (size := getattr(c, name)) % patch:
                yield f"vtp.{name} {size} is no multiple of vtp.patch {patch}: use {_near(size, patch)}"
        if c.ssl_frames and (c.ssl_frames - 1) % groups:
            yield f"vtp.ssl_frames {c.ssl_frames} is not one frame and groups of {groups}: use {1 + groups}"
    if c.preset:
        yield from _beside_preset(c)
    else:
        yield from _widths(c)


def _beside_preset(c: VtpConfig) -> Iterator[str]:
    fields = type(c).model_fields
    said = [f"vtp.{name}" for name in PRESET_SAYS if getattr(c, name) != fields[name].default]
    if said:
        yield (
            f"vtp.preset {c.preset} has sizes of its own, so {', '.join(said)} would not be read: leave "
            f"{'it' if len(said) == 1 else 'them'} out, or the preset"
        )


def _widths(c: VtpConfig) -> Iterator[str]:
    """Rotary angles take heads of a multiple of 4 numbers; the text tower has none."""
    for name, wide, many, unit in (
        ("width", c.width, c.heads, 4),
        ("decoder_width", c.decoder_width or c.width, c.decoder_heads or c.heads, 4),
        ("text_width", c.text_width, c.text_heads, 1),
    ):
        if wide % (many * unit):
            yield f"vtp.{name} {wide} is no multiple of {many * unit}: use {_near(wide, many * unit)}"


def _near(value: int, step: int) -> str:
    below = max(value // step, 1) * step
    return f"{below} or {below + step}"
