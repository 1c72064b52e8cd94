"""Sizes of the CogVideoX family, under the names that its published ``config.json`` uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from motionloom.config.entries import entry, from_entries, own_keys
from motionloom.errors import UserError
from motionloom.flow.discrete import DiscreteSchedule

V1_SCHEDULE = DiscreteSchedule(
    betas="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    zero_terminal_snr=True,
    spacing="trailing",
)
"""Of 5B and 1.5."""
SHIFTED_SCHEDULE = replace(V1_SCHEDULE, snr_shift=3.0)
"""Of 2B."""

DIFFUSERS_CLASS = "CogVideoXTransformer3DModel"
_ALWAYS = {
    "activation_fn": "gelu-approximate",
    "timestep_activation_fn": "silu",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "dropout": 0.0,
}
"""Keys of ``config.json`` that have one value in every published model, and only that one here."""


@dataclass(frozen=True)
class CogVideoXSizes:
    """A model of the family; names and defaults are those of diffusers' ``CogVideoXTransformer3DModel``."""

    num_attention_heads: int = 30
    attention_head_dim: int = 64
    in_channels: int = 16
    """Latent channels, and with image-to-video as many again for the given image."""
    out_channels: int = 16
    time_embed_dim: int = 512
    ofs_embed_dim: int | None = None
    """1.5 image-to-video: width of the embedding of a constant offset."""
    text_embed_dim: int = 4096
    num_layers: int = 30
    attention_bias: bool = True
    sample_width: int = 90
    """Latent columns, rows and pixel frames that the positions were trained at."""
    sample_height: int = 60
    sample_frames: int = 49
    patch_size: int = 2
    patch_size_t: int | None = None
    """1.5: latent frames of a token. None: one frame, and a convolution as patch embedding."""
    temporal_compression_ratio: int = 4
    max_text_seq_length: int = 226
    norm_elementwise_affine: bool = True
    norm_eps: float = 1e-5
    spatial_interpolation_scale: float = 1.875
    temporal_interpolation_scale: float = 1.0
    use_rotary_positional_embeddings: bool = False
    use_learned_positional_embeddings: bool = False
    patch_bias: bool = True
    schedule: DiscreteSchedule = SHIFTED_SCHEDULE
    """The noise levels that it was trained on; published beside it, in ``scheduler_config.json``."""

    @property
    def dim(self) -> int:
        """Width of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latent cells (frames, rows, columns) of a token."""
        return self.patch_size_t or 1, self.patch_size, self.patch_size

    @property
    def extra_channels(self) -> int:
        """Channels beside the noisy latents: the given image of image-to-video."""
        return self.in_channels - self.out_channels

    @property
    def reads_image(self) -> bool:
        """Image-to-video."""
        return self.extra_channels > 0

    @property
    def base_grid(self) -> tuple[int, int, int]:
        """Tokens (frames, rows, columns) of the size that the positions were trained at."""
        frames = (self.sample_frames - 1) // self.temporal_compression_ratio + 1
        return frames, self.sample_height // self.patch_size, self.sample_width // self.patch_size

    @classmethod
    def from_diffusers(
        cls, config: Mapping[str, Any], scheduler: Mapping[str, Any] | None = None
    ) -> CogVideoXSizes:
        """From a ``transformer/config.json`` and, where there is one, a ``scheduler/scheduler_config.json``.

        Without the latter the schedule is the published one: 2B's for models without rotary positions.

        Raises:
            UserError: a key that this backbone does not know, or a value that no published model has.
        """
        given = own_keys(config, DIFFUSERS_CLASS, "config.json", "cogvideox")
        for key, always in _ALWAYS.items():
            if given.pop(key, always) != always:
                raise UserError(f"config.json: {key} is {config[key]!r}, but cogvideox knows only {always!r}")
        if "schedule" in given:
            raise UserError("config.json: cogvideox does not know schedule: is it of another model?")
        sizes = from_entries(cls, given, "config.json", "cogvideox")
        sizes._check()
        if scheduler is not None:
            return replace(sizes, schedule=schedule_from_diffusers(scheduler))
        rotary = sizes.use_rotary_positional_embeddings
        return replace(sizes, schedule=V1_SCHEDULE if rotary else SHIFTED_SCHEDULE)

    def to_diffusers(self) -> dict[str, Any]:
        """The ``config.json`` that diffusers reads."""
        values = {key: value for key, value in asdict(self).items() if key != "schedule"}
        return {"_class_name": DIFFUSERS_CLASS, **_ALWAYS, **values}

    def _check(self) -> None:
        if self.attention_head_dim % 16 or self.extra_channels < 0:
            raise UserError(
                f"config.json: attention_head_dim {self.attention_head_dim} must be a multiple of 16, and "
                f"in_channels {self.in_channels} at least out_channels {self.out_channels}"
            )
        if self.ofs_embed_dim not in (None, self.time_embed_dim):
            raise UserError(
                f"config.json: ofs_embed_dim {self.ofs_embed_dim} is added to time_embed_dim "
                f"{self.time_embed_dim}: they must be equal"
            )
        if self.use_learned_positional_embeddings and not self.use_rotary_positional_embeddings:
            raise UserError(
                "config.json: use_learned_positional_embeddings without use_rotary_positional_embeddings, "
                "which no cogvideox has"
            )


def schedule_from_diffusers(config: Mapping[str, Any]) -> DiscreteSchedule:
    """From the ``scheduler_config.json`` of a CogVideoX scheduler; what it leaves out is as diffusers has it.

    Raises:
        UserError: it is not for v-prediction, or has betas or a spacing that are not known here.
    """
    where = "scheduler_config.json"
    if (kind := config.get("prediction_type", "epsilon")) != "v_prediction":
        raise UserError(f"{where}: prediction_type {kind!r}; a cogvideox predicts v_prediction")
    if config.get("trained_betas") is not None:
        raise UserError(f"{where}: trained_betas are not read; give beta_schedule and its ends")

    def read(key: str, kind: Any, default: Any) -> Any:
        return entry(config, key, kind, where, default)

    betas = read("beta_schedule", str, "scaled_linear")
    return DiscreteSchedule(
        betas="cosine" if betas == "squaredcos_cap_v2" else betas,
        steps=read("num_train_timesteps", int, 1000),
        beta_start=read("beta_start", float, 0.00085),
        beta_end=read("beta_end", float, 0.012),
        zero_terminal_snr=read("rescale_betas_zero_snr", bool, False),
        snr_shift=read("snr_shift_scale", float, 3.0),
        spacing=read("timestep_spacing", str, "leading"),
    )


_2B = CogVideoXSizes()
_5B = CogVideoXSizes(
    num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True, schedule=V1_SCHEDULE
)
_15 = replace(_5B, patch_size_t=2, patch_bias=False, sample_frames=81, sample_height=300, sample_width=300)

PRESETS: dict[str, CogVideoXSizes] = {
    "cogvideox-2b": _2B,
    "cogvideox-5b": _5B,
    "cogvideox-5b-i2v": replace(_5B, in_channels=32, use_learned_positional_embeddings=True),
    "cogvideox1.5-5b": _15,
    "cogvideox1.5-5b-i2v": replace(_15, in_channels=32, ofs_embed_dim=512),
    "tiny": replace(
        _5B,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        time_embed_dim=16,
        text_embed_dim=32,
        sample_height=8,
        sample_width=12,
        sample_frames=13,
        max_text_seq_length=8,
    ),
}
"""Published sizes, and one for tests."""
