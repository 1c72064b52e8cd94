"""Sizes of the LTX-2 family, and diffusers' ``config.json`` for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from motionloom.config.entries import from_entries, own_keys
from motionloom.errors import UserError

DIFFUSERS_CLASS = "LTX2VideoTransformer3DModel"
Pairing = Literal["interleaved", "split"]
"""Which channels of a head turn together: (2i, 2i + 1) interleaved, (i, i + D/2) split."""

FIXED: dict[str, Any] = {
    "activation_fn": "gelu-approximate",
    "qk_norm": "rms_norm_across_heads",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "attention_bias": True,
    "attention_out_bias": True,
    "patch_size": 1,
    "patch_size_t": 1,
    "audio_patch_size": 1,
    "audio_patch_size_t": 1,
}
"""Keys of ``config.json`` that have one value in every published model, and that the network has no other
code for."""


@dataclass(frozen=True)
class LTX2Sizes:
    """A member of the family. Fields and defaults are those of diffusers' config.

    ``vae_scale_factors`` and what follows does not change the network, since positions come with the streams,
    in seconds and pixels. Other programs compute positions from them.
    """

    in_channels: int = 128
    """Channels of a video token, in and out."""
    num_attention_heads: int = 32
    attention_head_dim: int = 128
    audio_in_channels: int = 128
    """Channels of an audio token, in and out."""
    audio_num_attention_heads: int = 32
    audio_attention_head_dim: int = 64
    num_layers: int = 48
    caption_channels: int = 3840
    """Channels of each of the two text contexts where ``use_prompt_embeddings``."""
    use_prompt_embeddings: bool = True
    """LTX-2: the network projects the text. Since 2.3 the text comes at the width of its stream."""
    gated_attn: bool = False
    """2.3: every attention into the video has a gate per head."""
    audio_gated_attn: bool = False
    cross_attn_mod: bool = False
    """2.3: attention from the video to the text is modulated as well."""
    audio_cross_attn_mod: bool = False
    use_prompt_adaln_single: bool = True
    """The text is modulated by its noise level; without, by a table alone. Read if either ``*_attn_mod``."""
    ff_bias: bool = True
    """False in 2.5."""
    audio_ff_bias: bool = True
    use_keyframes_abs_pos_embedding: bool = False
    """2.5: tokens of the first latent frame, which holds a single pixel frame, are marked."""
    rope_type: Pairing = "interleaved"
    rope_theta: float = 10000.0
    rope_double_precision: bool = True
    """The grid of frequencies is computed in float64."""
    pos_embed_max_pos: int = 20
    """Seconds that the video's lowest frequency spans."""
    base_height: int = 2048
    base_width: int = 2048
    audio_pos_embed_max_pos: int = 20
    timestep_scale_multiplier: int = 1000
    cross_attn_timestep_scale_multiplier: int = 1000
    """The same for the gates of the attention between video and audio."""
    perturbed_attn: bool = False
    """diffusers builds attention that can be skipped only where this is set; here it always can."""
    vae_scale_factors: tuple[int, int, int] = (8, 32, 32)
    audio_scale_factor: int = 4
    audio_sampling_rate: int = 16000
    audio_hop_length: int = 160
    causal_offset: int = 1

    @property
    def dim(self) -> int:
        """Width of the video stream."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def audio_dim(self) -> int:
        """Width of the audio stream, and of all attention between the two."""
        return self.audio_num_attention_heads * self.audio_attention_head_dim

    @property
    def text_channels(self) -> tuple[int, int]:
        """Channels of the text context for (video, audio)."""
        if self.use_prompt_embeddings:
            return self.caption_channels, self.caption_channels
        return self.dim, self.audio_dim

    @property
    def text_modulated(self) -> bool:
        """Keys and values of the text are scaled and shifted: in both streams as soon as one asks for it."""
        return self.cross_attn_mod or self.audio_cross_attn_mod

    @property
    def reads_image(self) -> bool:
        """A given frame of an image-to-video clip is a clean token among the others."""
        return False

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> LTX2Sizes:
        """From the content of ``transformer/config.json``.

        Raises:
            UserError: another class, an unknown key, or a value that no published model has and that is not
                built here.
        """
        where = "config.json of LTX-2"
        given = own_keys(config, DIFFUSERS_CLASS, where, "ltx2")
        for key, built in FIXED.items():
            if given.pop(key, built) != built:
                raise UserError(f"{where}: {key} is {config[key]!r}; only {built!r} is built")
        derived = {key: given.pop(key, None) for key in _derived(cls())}
        sizes = from_entries(cls, given, where, "ltx2", zero=("causal_offset",))
        if sizes.num_attention_heads != sizes.audio_num_attention_heads:
            # Queries and keys of the attention between the two would turn by different frequencies.
            raise UserError(
                f"{where}: num_attention_heads is {sizes.num_attention_heads} and audio_num_attention_heads "
                f"{sizes.audio_num_attention_heads}: make them equal"
            )
        for key, value in _derived(sizes).items():
            if derived[key] not in (None, value):
                raise UserError(f"{where}: {key} is {derived[key]!r}; the other sizes make it {value}")
        return sizes

    def to_diffusers(self) -> dict[str, Any]:
        """The content of ``transformer/config.json``."""
        sizes = asdict(self)
        sizes["vae_scale_factors"] = list(self.vae_scale_factors)
        return {"_class_name": DIFFUSERS_CLASS, **sizes, **FIXED, **_derived(self)}


def _derived(sizes: LTX2Sizes) -> dict[str, int]:
    """Keys that follow from the others: a velocity has the channels of its latents, text has the width of its
    stream, and so has what the audio stream offers to others."""
    return {
        "out_channels": sizes.in_channels,
        "audio_out_channels": sizes.audio_in_channels,
        "cross_attention_dim": sizes.dim,
        "audio_cross_attention_dim": sizes.audio_dim,
    }


_LTX2_19B = LTX2Sizes(rope_type="split")
_2_3 = {
    "gated_attn": True,
    "audio_gated_attn": True,
    "cross_attn_mod": True,
    "audio_cross_attn_mod": True,
    "use_prompt_embeddings": False,
    "perturbed_attn": True,
}
_TINY = replace(
    _LTX2_19B,
    in_channels=16,
    audio_in_channels=32,
    num_attention_heads=2,
    attention_head_dim=16,
    audio_num_attention_heads=2,
    audio_attention_head_dim=8,
    num_layers=2,
    caption_channels=12,
)

PRESETS: dict[str, LTX2Sizes] = {
    "ltx2-19b": _LTX2_19B,
    "ltx2.3-22b": replace(_LTX2_19B, **_2_3),  # type: ignore[arg-type]
    "tiny": _TINY,
    "tiny2.3": replace(_TINY, **_2_3),  # type: ignore[arg-type]
}
"""Sizes by name, as diffusers' conversion script states them: 18,876,174,592 parameters for LTX-2 and
18,988,838,144 for 2.3, whose name adds the 3.17 B of its text connectors. Those two differ in parameters; a
file with interleaved pairs or other extents of the positions would not, and tells by its config only."""
