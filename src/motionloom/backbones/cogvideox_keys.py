"""CogVideoX as its authors published it (SwissArmyTransformer checkpoints), and diffusers' names for it.

Queries, keys and values are one matrix there. The twelve parts of a block's modulation are six for the video
(shift, scale, gate of attention, then of the feed-forward layer) and six for the text; diffusers sorts them
by layer instead: ``norm1`` has the video's three of attention and the text's three, ``norm2`` those of the
feed-forward layer.
"""

from __future__ import annotations

from motionloom.backbones.keys import Fused, KeyMap

_BLOCK, _LAYER, _MIXINS = "transformer_blocks.*", "transformer.layers.*", "mixins.adaln_layer"

ORIGINAL_KEYS = KeyMap(
    prefixes=("model.diffusion_model.",),
    marks=("mixins.patch_embed.proj.weight", "transformer.layers.0.attention.query_key_value.weight"),
    renamed={
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "ofs_embed.0": "ofs_embedding.linear_1",
        "ofs_embed.2": "ofs_embedding.linear_2",
        "mixins.patch_embed": "patch_embed",
        "mixins.pos_embed.pos_embedding": "patch_embed.pos_embedding",
        f"{_LAYER}.input_layernorm": f"{_BLOCK}.norm1.norm",
        f"{_LAYER}.post_attention_layernorm": f"{_BLOCK}.norm2.norm",
        f"{_LAYER}.attention.dense": f"{_BLOCK}.attn1.to_out.0",
        f"{_MIXINS}.query_layernorm_list.*": f"{_BLOCK}.attn1.norm_q",
        f"{_MIXINS}.key_layernorm_list.*": f"{_BLOCK}.attn1.norm_k",
        f"{_LAYER}.mlp.dense_h_to_4h": f"{_BLOCK}.ff.net.0.proj",
        f"{_LAYER}.mlp.dense_4h_to_h": f"{_BLOCK}.ff.net.2",
        "transformer.final_layernorm": "norm_final",
        "mixins.final_layer.norm_final": "norm_out.norm",
        "mixins.final_layer.adaLN_modulation.1": "norm_out.linear",
        "mixins.final_layer.linear": "proj_out",
    },
    fused=(
        Fused(
            f"{_LAYER}.attention.query_key_value",
            3,
            {f"{_BLOCK}.attn1.to_q": (0,), f"{_BLOCK}.attn1.to_k": (1,), f"{_BLOCK}.attn1.to_v": (2,)},
        ),
        Fused(
            f"{_MIXINS}.adaLN_modulations.*.1",
            12,
            {
                f"{_BLOCK}.norm1.linear": (0, 1, 2, 6, 7, 8),
                f"{_BLOCK}.norm2.linear": (3, 4, 5, 9, 10, 11),
            },
        ),
    ),
    dropped=(
        "transformer.word_embeddings",
        "transformer.position_embeddings",
        "mixins.patch_embed.embed_tokens",
        "mixins.pos_embed.freqs_sin",
        "mixins.pos_embed.freqs_cos",
    ),
)
