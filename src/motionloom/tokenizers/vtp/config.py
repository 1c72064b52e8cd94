"""What a VTP model is made of, in the words of its published ``config.json``.

The released layout is kept key by key, so that a folder written here is read there and the other way round.
``temporal_patch``, ``temporal_window`` and ``conv_kernel`` are ours; at their defaults they are not written.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from motionloom.errors import UserError
from motionloom.tokenizers.checks import fits, require_counts, require_factor, require_truths

CLIP_VOCAB = 49408
"""Words of CLIP's byte-pair vocabulary, the two marks for beginning and end included."""
LARGEST = 2**31 - 1
"""Of a config's whole numbers: what torch counts the sides of a tensor by."""
DEEPEST = 1024
"""Of a tower, in blocks: a slip is refused before they are made."""

_FOREIGN = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "tie_word_embeddings",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "use_cache",
}
"""What transformers writes into every ``config.json``; none of it says anything of the model."""


@dataclass(frozen=True)
class VTPConfig:
    """Sizes and switches; fields and defaults are those of the released ``config.json``.

    Raises:
        UserError: a value that no model can be made of, or an option that no release uses and we have not.
    """

    image_size: int = 256
    train_clip: bool = True
    train_reconstruction: bool = True
    vision_patch_size: int = 16
    vision_embed_dim: int = 768
    vision_depth: int = 12
    vision_num_heads: int = 12
    vision_mlp_ratio: float = 4.0
    vision_ffn_layer: str = "swiglu"
    vision_norm_layer: str = "rmsnorm"
    vision_init_values: float | None = None
    vision_use_qk_norm: bool = False
    vision_feature_bottleneck: int = 64
    vision_bottleneck_ae_only: bool = True
    vision_clip_feat: str = "cls"
    text_context_length: int = 77
    text_vocab_size: int = CLIP_VOCAB
    text_embed_dim: int = 768
    text_num_heads: int = 12
    text_depth: int = 12
    text_mlp_ratio: float = 4.0
    text_ls_init_value: float | None = None
    text_embed_cls: bool = False
    text_pad_id: int = 0
    text_no_causal_mask: bool = False
    text_pool_type: str = "argmax"
    text_proj_type: str = "linear"
    text_proj_bias: bool = False
    text_output_tokens: bool = False
    text_quick_gelu: bool = False
    decoder_embed_dim: int = 768
    decoder_num_heads: int = 12
    decoder_depth: int = 12
    decoder_ffn_layer: str = "swiglu"
    decoder_norm_layer: str = "layernorm"
    decoder_init_values: float | None = None
    decoder_use_qk_norm: bool = False
    init_logit_scale: float | None = None
    init_logit_bias: float | None = None
    nonscalar_logit_scale: bool = False
    temporal_patch: int = 1
    """Pixel frames of a latent frame behind the first, which stands alone. 1: every frame is an image."""
    temporal_window: int = 0
    """How many latent frames before its own a token sees, at its own place; 0: none."""
    conv_kernel: int = 0
    """Side of the square of patches that a convolution before each block mixes, odd; 0: none."""

    def __post_init__(self) -> None:
        try:
            self._check()
        except OverflowError:
            raise UserError("VTP config: a number is too large for any model: correct the config") from None
        except (TypeError, ValueError) as error:
            raise UserError(f"VTP config: {error}: correct the config") from None

    def _check(self) -> None:
        counts = (
            *("image_size", "vision_patch_size", "vision_embed_dim", "vision_depth", "vision_num_heads"),
            *("vision_feature_bottleneck", "text_context_length", "text_vocab_size", "text_embed_dim"),
            *("text_num_heads", "text_depth", "decoder_embed_dim", "decoder_num_heads", "decoder_depth"),
            "temporal_patch",
        )
        require_counts(**{name: getattr(self, name) for name in counts})
        for name in counts:
            if getattr(self, name) > LARGEST:
                raise ValueError(f"{name} is too large for any model")
        for name in ("vision_depth", "text_depth", "decoder_depth"):
            if getattr(self, name) > DEEPEST:
                raise ValueError(f"{name} is {getattr(self, name)}, more than {DEEPEST} blocks")
        require_truths(asdict(self), *(f.name for f in fields(self) if f.type == "bool"))
        for tower in ("vision", "decoder"):
            width, heads = getattr(self, f"{tower}_embed_dim"), getattr(self, f"{tower}_num_heads")
            if width % (4 * heads):
                raise ValueError(f"{tower}_embed_dim {width} is not {heads} heads of a multiple of 4")
        if self.text_embed_dim % self.text_num_heads:
            raise ValueError(
                f"text_embed_dim {self.text_embed_dim} does not divide into {self.text_num_heads} heads"
            )
        if self.temporal_patch not in (1, 2, 4):
            raise ValueError(f"temporal_patch is {self.temporal_patch!r}, none of 1, 2, 4")
        if type(self.temporal_window) is not int or not 0 <= self.temporal_window < LARGEST:
            raise ValueError(f"temporal_window is {self.temporal_window!r}, not a whole number from 0")
        if self.conv_kernel not in (0, 3, 5, 7):
            raise ValueError(f"conv_kernel is {self.conv_kernel!r}, none of 0, 3, 5, 7")
        for name, known in _KNOWN.items():
            if getattr(self, name) not in known:
                said = ", ".join(map(repr, known))
                raise ValueError(f"{name} is {getattr(self, name)!r}; this version has {said}")
        for name in ("vision_mlp_ratio", "text_mlp_ratio"):
            require_factor(getattr(self, name), name)
        if max(self.swiglu_hidden, int(self.text_embed_dim * self.text_mlp_ratio)) > LARGEST:
            raise ValueError("a feed-forward layer is too wide for any model: lower its mlp_ratio")
        if min(self.swiglu_hidden, int(self.text_embed_dim * self.text_mlp_ratio)) < 1:
            raise ValueError("a feed-forward layer has no inner width: raise its mlp_ratio")
        for name in ("vision_init_values", "decoder_init_values", "init_logit_scale", "init_logit_bias"):
            value = getattr(self, name)
            if value is not None and (type(value) not in (int, float) or not fits(value)):
                raise ValueError(f"{name} is {str(value)[:40]!r}, not a number that float32 holds")

    @property
    def swiglu_hidden(self) -> int:
        """Inner width of the encoder's feed-forward: 2/3 of the plain one's, rounded up to eights."""
        return swiglu_hidden(self.vision_embed_dim, self.vision_mlp_ratio)

    def to_json(self) -> str:
        """The text of a ``config.json``; of our own keys only those that are not at their defaults."""
        said: dict[str, Any] = {"model_type": "vtp", **asdict(self)}
        for name in ("temporal_patch", "temporal_window", "conv_kernel"):
            if said[name] == VTPConfig.__dataclass_fields__[name].default:
                del said[name]
        return json.dumps(said, indent=1, sort_keys=True) + "\n"

    @staticmethod
    def is_at(folder: Path) -> bool:
        """Whether a folder's ``config.json`` says that it is a VTP model's."""
        try:
            said = json.loads((folder / "config.json").read_text())
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(said, dict) and said.get("model_type") == "vtp"

    @staticmethod
    def read(file: Path) -> VTPConfig:
        """A ``config.json``.

        Raises:
            UserError: it is missing, damaged, of another model, or says something that is unknown here.
        """
        try:
            said = json.loads(file.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{file}: not readable ({error}): name a VTP folder, or copy it again") from None
        if not isinstance(said, dict) or said.get("model_type") != "vtp":
            kind = said.get("model_type") if isinstance(said, dict) else None
            raise UserError(f"{file}: model_type is {kind!r} and not 'vtp': name a VTP folder")
        own = {f.name for f in fields(VTPConfig)}
        unknown = sorted(set(said) - own - _FOREIGN)
        if unknown:
            raise UserError(f"{file}: {unknown[0]} is unknown here: this version reads no such model")
        try:
            return VTPConfig(**{key: value for key, value in said.items() if key in own})
        except UserError as error:
            raise UserError(f"{file}: {error}") from None


_KNOWN: dict[str, tuple[Any, ...]] = {
    "vision_bottleneck_ae_only": (True,),
    "text_pad_id": (0,),
    "vision_ffn_layer": ("swiglu",),
    "decoder_ffn_layer": ("swiglu",),
    "vision_norm_layer": ("rmsnorm", "layernorm"),
    "decoder_norm_layer": ("rmsnorm", "layernorm"),
    "vision_clip_feat": ("cls", "pooled"),
    "text_ls_init_value": (None,),
    "text_embed_cls": (False,),
    "text_no_causal_mask": (False,),
    "text_pool_type": ("argmax",),
    "text_proj_type": ("linear",),
    "text_proj_bias": (False,),
    "text_output_tokens": (False,),
    "text_quick_gelu": (False,),
    "nonscalar_logit_scale": (False,),
}
"""What each switch of the layout may say here; releases use the first of each."""


def swiglu_hidden(width: int, ratio: float = 4.0) -> int:
    """Inner width of a SwiGLU of the cost of a plain layer of ``ratio`` times the width, in eights."""
    return -(-int(int(width * ratio) * 2 / 3) // 8) * 8


def _preset(width: int, depth: int, heads: int) -> VTPConfig:
    return VTPConfig(
        vision_embed_dim=width,
        vision_depth=depth,
        vision_num_heads=heads,
        decoder_embed_dim=width,
        decoder_depth=depth,
        decoder_num_heads=heads,
    )


PRESETS: dict[str, VTPConfig] = {
    "S": _preset(384, 12, 6),
    "B": _preset(768, 12, 12),
    "L": _preset(1024, 24, 16),
}
"""The released sizes, by their letters."""
