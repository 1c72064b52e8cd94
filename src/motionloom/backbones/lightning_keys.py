"""The authors' names of LightningDiT's weights, and the names here.

Their files also keep positions, which are computed here from where a token stands; what is written in their
layout holds none (they depend on the size of the picture), and is to be loaded with ``strict=False``.
"""

from __future__ import annotations

from motionloom.backbones.keys import KeyMap

ORIGINAL_KEYS = KeyMap(
    renamed={
        "x_embedder": "entry",
        "t_embedder.mlp.0": "time.linear_1",
        "t_embedder.mlp.2": "time.linear_2",
        "y_embedder.embedding_table": "told.table",
        "y_embedder": "told",
        "blocks": "layers",
        "blocks.*.adaLN_modulation.1": "layers.*.modulation",
        "final_layer.norm_final": "exit.norm",
        "final_layer.linear": "exit.out",
        "final_layer.adaLN_modulation.1": "exit.modulation",
    },
    dropped=("pos_embed", "feat_rope"),
    prefixes=("", "module.", "model."),
    marks=("x_embedder.proj.weight", "blocks.0.mlp.w12.weight", "final_layer.adaLN_modulation.1.weight"),
)
"""``y_embedder`` without its table is our form for text, which the authors do not have."""
