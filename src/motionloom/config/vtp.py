"""The recipe's section for tokenizers that are trained here (see docs/tokenizers.md).

What VTP's paper (arXiv 2512.13687) does not say is chosen after DINOv2 and OpenCLIP, which it follows: the
weights of the three losses and the shares of the batch alone are VTP's own figures.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from motionloom.config.section import BelowOne, Fraction, NotNegative, Positive, Section

Above = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]


class VtpConfig(Section):
    """What `train.method` tokenizer (its pre-training) and decoder (its second stage) train."""

    # The model
    preset: Literal["S", "B", "L"] | None = Field(
        default=None,
        description="A released size; the keys from `patch` to `context` then stay at their defaults.",
    )
    patch: Positive = Field(default=16, description="Pixels of a latent cell, both ways.")
    channels: Positive = Field(default=64, description="Of the latent.")
    width: Positive = 192
    depth: Positive = 6
    heads: Positive = 3
    qk_norm: bool = False
    decoder_width: Positive | None = Field(default=None, description="None: as the encoder; so the next two.")
    decoder_depth: Positive | None = None
    decoder_heads: Positive | None = None
    text_width: Positive = 128
    text_depth: Positive = 4
    text_heads: Positive = 2
    vocab_size: Positive = Field(
        default=1024, description="49408: CLIP's words; else as many learned from the cache's captions."
    )
    context: Positive = Field(default=32, description="Most tokens of a caption, both marks included.")
    temporal_patch: Literal[1, 2, 4] = Field(
        default=1, description="Frames of a latent frame behind the first one."
    )
    temporal_window: NotNegative = Field(
        default=0, description="How many latent frames back a token sees its own place."
    )
    conv_kernel: Literal[0, 3, 5, 7] = Field(
        default=0, description="Side of the patches that a convolution mixes before each block; 0: none."
    )
    init: Literal["released", "fan_in"] = Field(
        default="released",
        description="How weights begin: all of deviation .02, or by their inputs, for narrow models.",
    )
    rope: Literal["bf16", "fp32"] = Field(default="fp32", description="bf16: as the released models.")

    # The three losses
    rec: Weight = Field(default=0.1, description="Weight of reconstruction.")
    rec_start: BelowOne = Field(
        default=0.0,
        description="Share of the steps before which nothing is rebuilt: what captions say is learned first.",
    )
    l1: Weight = Field(default=1.0, description="Within it: of the mean absolute error of normalised pixels.")
    l2: Weight = Field(default=0.0, description="Within it: of the mean squared error.")
    perceptual: Weight = Field(default=1.0, description="Within it: of the distance that a network sees.")
    perceptual_net: Literal["vgg", "alex"] = "vgg"
    ssl: Weight = Field(default=1.0, description="Weight of self-distillation: DINO and iBOT.")
    ibot: Weight = Field(default=1.0, description="Within it: of the masked patches.")
    koleo: Weight = Field(default=0.1, description="Within it: of the spread of global crops.")
    clip: Weight = Field(default=1.0, description="Weight of contrast with captions.")
    clip_loss: Literal["infonce", "sigmoid"] = "infonce"
    clip_chunk: NotNegative = Field(
        default=0, description="Contrast in parts of so many clips, in the memory of one; 0: at once."
    )
    clip_near: NotNegative = Field(
        default=0,
        description="Captions of other clips, each near to its own, that a clip is told apart from besides.",
    )
    words: Weight = Field(
        default=0.0, description="Weight of telling which words a caption has, with no text tower between."
    )
    rec_share: Fraction = Field(default=0.125, description="Part of the batch that is rebuilt.")
    ssl_share: Fraction = Field(default=0.25, description="Part of the batch that is distilled.")
    rec_drop: BelowOne = Field(default=0.0, description="Stochastic depth of the encoder, for this loss.")
    ssl_drop: BelowOne = 0.0
    clip_drop: BelowOne = 0.0

    # Self-distillation
    prototypes: Positive = 4096
    head_hidden: Positive = 512
    head_bottleneck: Positive = 128
    head_layers: Positive = 3
    centring: Literal["sinkhorn", "mean"] = "sinkhorn"
    momentum: Fraction = Field(default=0.992, description="Of the teacher at first; it rises to 1.")
    teacher_temperature: tuple[Above, Above] = (0.04, 0.07)
    teacher_warmup_steps: NotNegative = Field(
        default=1000, description="From the first of these to the second."
    )
    global_size: Positive = 224
    local_size: Positive = 96
    local_crops: NotNegative = 8
    global_scale: tuple[Fraction, Fraction] = (0.32, 1.0)
    local_scale: tuple[Fraction, Fraction] = (0.05, 0.32)
    ssl_frames: NotNegative = Field(default=0, description="Frames of a clip that crops show; 0: all.")
    flips: bool = Field(default=True, description="Off where captions tell left from right.")
    colours: bool = Field(default=True, description="Off where captions tell colours.")
    blur: bool = True
    mask_share: Fraction = Field(default=0.5, description="Global crops with hidden patches.")
    mask_ratio: tuple[Fraction, Fraction] = (0.1, 0.5)

    # The second stage: the encoder is frozen, a judge of patches looks at what the decoder makes
    gan: Weight = Field(default=0.5, description="decoder: weight of the judge's word.")
    gan_adaptive: bool = Field(default=True, description="Times the ratio of gradients at the last layer.")
    gan_start: NotNegative = Field(default=0, description="Steps before which it does not count.")
    gan_lr: Above | None = Field(default=None, description="Of the judge; none: `train.lr`.")
    gan_layers: Positive = 3
    gan_width: Positive = 64
    gan_temporal: bool = Field(default=False, description="The judge sees the frames beside each frame.")
    gan_r1: Weight = Field(default=0.0, description="Half its weight on the judge's slope at real clips.")
    gan_lecam: Weight = Field(default=0.0, description="Weight of LeCam's regularisation.")
