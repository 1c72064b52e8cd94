"""Sizes of the published Wan models, and diffusers' config.json that says them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from motionloom.config.entries import from_entries, own_keys
from motionloom.errors import UserError

DIFFUSERS_CLASS = "WanTransformer3DModel"
FIXED = {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024}
"""Entries of diffusers' config.json that are the same for every published model, and built in here."""


@dataclass(frozen=True)
class WanSizes:
    """What tells the published models apart, by the names of diffusers' config.json."""

    num_attention_heads: int = 40
    attention_head_dim: int = 128
    num_layers: int = 40
    ffn_dim: int = 13824
    in_channels: int = 16
    """Latents, and beside them what ``Stream.extra_BNC`` brings: 4 of mask and 16 of image latents."""
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    text_dim: int = 4096
    freq_dim: int = 256
    """Sines and cosines that a noise level is embedded with."""
    eps: float = 1e-6
    image_dim: int | None = None
    """Channels of CLIP's image tokens; None: the model has no eyes for them."""
    pos_embed_seq_len: int | None = None
    """How many image tokens a learned position tells apart (two pictures); None: none are."""

    @property
    def dim(self) -> int:
        """Width D."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def extra_channels(self) -> int:
        """Channels of a latent cell that ``Stream.extra_BNC`` must bring."""
        return self.in_channels - self.out_channels

    @property
    def reads_image(self) -> bool:
        """Image-to-video: channels beside the latents, or CLIP's tokens."""
        return self.extra_channels > 0 or self.image_dim is not None

    @classmethod
    def from_diffusers(cls, config: dict[str, Any]) -> WanSizes:
        """From the entries of config.json; what is missing has diffusers' default.

        Raises:
            UserError: it is of another class, or holds an entry or a value that this backbone does not know.
        """
        given = own_keys(config, DIFFUSERS_CLASS, "config.json", "wan")
        for key, value in FIXED.items():
            if given.pop(key, value) != value:
                raise UserError(f"config.json: {key} is {config[key]}, but wan knows only {value}")
        image_width = given.pop("added_kv_proj_dim", None)
        if given.get("out_channels", 0) is None:
            given["out_channels"] = given.get("in_channels", cls.in_channels)
        sizes = from_entries(cls, given, "config.json", "wan")
        sizes._check()
        if image_width != sizes._image_width:
            raise UserError(
                f"config.json: added_kv_proj_dim is {image_width}, but with image_dim {sizes.image_dim} and "
                f"width {sizes.dim} wan knows only {sizes._image_width}"
            )
        return sizes

    def to_diffusers(self) -> dict[str, Any]:
        """All entries of diffusers' config.json."""
        return {
            "_class_name": DIFFUSERS_CLASS,
            **asdict(self),
            "patch_size": list(self.patch_size),
            "added_kv_proj_dim": self._image_width,
            **FIXED,
        }

    @property
    def _image_width(self) -> int | None:
        return None if self.image_dim is None else self.dim

    def _check(self) -> None:
        if self.attention_head_dim % 2 or self.freq_dim % 2 or self.extra_channels < 0:
            raise UserError(
                f"config.json: attention_head_dim {self.attention_head_dim} and freq_dim {self.freq_dim} "
                f"must be even, and in_channels {self.in_channels} at least out_channels {self.out_channels}"
            )


_T2V_14B = WanSizes()
_I2V_14B = replace(_T2V_14B, in_channels=36, image_dim=1280)
PRESETS: dict[str, WanSizes] = {
    "wan2.1-t2v-1.3b": WanSizes(num_attention_heads=12, num_layers=30, ffn_dim=8960),
    "wan2.1-t2v-14b": _T2V_14B,
    "wan2.1-i2v-14b": _I2V_14B,
    "wan2.1-flf2v-14b": replace(_I2V_14B, pos_embed_seq_len=2 * 257),
    "wan2.2-t2v-a14b": _T2V_14B,
    "wan2.2-i2v-a14b": replace(_T2V_14B, in_channels=36),
    "wan2.2-ti2v-5b": WanSizes(
        num_attention_heads=24, num_layers=30, ffn_dim=14336, in_channels=48, out_channels=48
    ),
    "tiny": WanSizes(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, ffn_dim=64, text_dim=32, freq_dim=32
    ),
}
"""Published sizes by name. A model of Wan 2.2 A14B is two such networks, one for high and one for low noise;
480p and 720p of one model have the same sizes."""
