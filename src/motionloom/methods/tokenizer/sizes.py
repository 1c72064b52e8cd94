"""A recipe's `vtp` section as the config of a model."""

from __future__ import annotations

from dataclasses import replace

from motionloom.config.vtp import VtpConfig
from motionloom.methods.tokenizer.contrast import SIGMOID_BIAS, SIGMOID_SCALE
from motionloom.tokenizers.vtp import PRESETS, VTPConfig


def model_config(c: VtpConfig, side: int, words: int, *, rebuilt: bool) -> VTPConfig:
    """What is trained: of what no loss asks for nothing is made.

    Args:
        rebuilt: whether it has a pixel decoder.
        side: pixels of a clip's longer side, which the config tells and nothing reads.
        words: of the vocabulary, marks included.
    """
    sigmoid = c.clip_loss == "sigmoid"
    scale, bias = (SIGMOID_SCALE, SIGMOID_BIAS) if sigmoid else (None, None)
    if c.preset:
        return replace(
            PRESETS[c.preset],
            image_size=side,
            train_clip=c.clip > 0,
            train_reconstruction=rebuilt,
            text_vocab_size=words,
            temporal_patch=c.temporal_patch,
            temporal_window=c.temporal_window,
            conv_kernel=c.conv_kernel,
            init_logit_scale=scale,
            init_logit_bias=bias,
        )
    return VTPConfig(
        image_size=side,
        train_clip=c.clip > 0,
        train_reconstruction=rebuilt,
        vision_patch_size=c.patch,
        vision_embed_dim=c.width,
        vision_depth=c.depth,
        vision_num_heads=c.heads,
        vision_use_qk_norm=c.qk_norm,
        vision_feature_bottleneck=c.channels,
        text_context_length=c.context,
        text_vocab_size=words,
        text_embed_dim=c.text_width,
        text_num_heads=c.text_heads,
        text_depth=c.text_depth,
        decoder_embed_dim=c.decoder_width or c.width,
        decoder_depth=c.decoder_depth or c.depth,
        decoder_num_heads=c.decoder_heads or c.heads,
        decoder_use_qk_norm=c.qk_norm,
        temporal_patch=c.temporal_patch,
        temporal_window=c.temporal_window,
        conv_kernel=c.conv_kernel,
        init_logit_scale=scale,
        init_logit_bias=bias,
    )
