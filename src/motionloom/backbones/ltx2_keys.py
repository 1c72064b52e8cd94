"""Names of LTX-2's weights as its authors ship them, and as diffusers and this project call them.

The authors' single file holds the whole system: what is not the transformer (VAEs, vocoder, the connectors of
the text path) is left to those who load it. All tensors keep their shapes; block tables and feed-forward
layers keep their names.
"""

from __future__ import annotations

from motionloom.backbones.keys import KeyMap

_STREAMS = {
    "patchify_proj": "proj_in",
    "audio_patchify_proj": "audio_proj_in",
    "adaln_single": "time_embed",
    "audio_adaln_single": "audio_time_embed",
    "prompt_adaln_single": "prompt_adaln",
    "audio_prompt_adaln_single": "audio_prompt_adaln",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
}

_ATTENTIONS = ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")

_BLOCK = {
    "scale_shift_table_a2v_ca_video": "video_a2v_cross_attn_scale_shift_table",
    "scale_shift_table_a2v_ca_audio": "audio_a2v_cross_attn_scale_shift_table",
    **{f"{attention}.q_norm": f"{attention}.norm_q" for attention in _ATTENTIONS},
    **{f"{attention}.k_norm": f"{attention}.norm_k" for attention in _ATTENTIONS},
}

ORIGINAL_KEYS = KeyMap(
    renamed={
        **_STREAMS,
        **{
            f"transformer_blocks.*.{theirs}": f"transformer_blocks.*.{ours}"
            for theirs, ours in _BLOCK.items()
        },
    },
    dropped=(
        "video_embeddings_connector",
        "audio_embeddings_connector",
        "text_embedding_projection",
        "vae",
        "audio_vae",
        "vocoder",
    ),
    prefixes=("model.diffusion_model.", "diffusion_model.", ""),
    marks=("patchify_proj.weight", "av_ca_a2v_gate_adaln_single.linear.weight"),
)
"""LTX-2, 2.3 and 2.5."""
