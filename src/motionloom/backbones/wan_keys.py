"""Names of Wan's weights as its authors ship them, and as diffusers and this project call them.

The authors' ``norm3`` stands before the cross-attention and is diffusers' ``norm2``; the norms before
self-attention and feed-forward have no weights. All tensors keep their shapes.
"""

from __future__ import annotations

from motionloom.backbones.keys import KeyMap

_EMBEDDINGS = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
}

_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}

_BLOCK = {
    **{f"self_attn.{theirs}": f"attn1.{ours}" for theirs, ours in _ATTENTION.items()},
    "self_attn": "attn1",
    **{f"cross_attn.{theirs}": f"attn2.{ours}" for theirs, ours in _ATTENTION.items()},
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "cross_attn": "attn2",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}

ORIGINAL_KEYS = KeyMap(
    renamed={
        **_EMBEDDINGS,
        **{f"blocks.*.{theirs}": f"blocks.*.{ours}" for theirs, ours in _BLOCK.items()},
        "head.modulation": "scale_shift_table",
        "head.head": "proj_out",
    },
    prefixes=("", "model.diffusion_model.", "model."),  # the last: CausVid's and Self-Forcing's
    marks=("head.modulation", "blocks.0.self_attn.q.weight"),
)
"""Wan 2.1 and 2.2, all sizes; ``patch_embedding`` has one name in both layouts."""
