"""LTX-2's text encoder: Gemma 3, all of its layers, and the connectors behind it.

A caption becomes two contexts, for the video and for the audio stream, side by side along the channels. Every
token is valid: learned registers stand where padding was.

Shapes: B batch, L tokens of a caption, G channels of the language model, Y its hidden states, C channels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from motionloom.config.entries import entry
from motionloom.config.recipe import TextEncoderConfig
from motionloom.errors import UserError
from motionloom.text.connectors import ConnectorSizes, load_connectors, read_sizes
from motionloom.text.hf import DType, HFEncoder, digest_weights, model_folder, open_model, whole_path

GROUP_TOKENS = 2048
"""How many tokens are embedded at a time: all their layers are held at once, 0.4 MB each for Gemma 3 12B."""


class LTX2Encoder:
    """Frozen. Embeddings are (B, ``max_length``, video's + audio's channels), all valid.

    Args:
        name_or_path: of the language model, as for :class:`~motionloom.text.hf.HFEncoder`.
        connectors: a diffusers folder; empty: ``connectors`` beside the model's folder.
        dtype: of weights and embeddings; int8 of the language model's alone.

    Raises:
        UserError: as `HFEncoder`; or the connectors cannot be read, are of another language model, or do not
            divide ``max_length`` by their registers.
    """

    trainable = False

    def __init__(self, name_or_path: str, connectors: str, max_length: int, dtype: torch.dtype) -> None:
        self.max_length = max_length
        self._fingerprint = ""
        self.words = HFEncoder(name_or_path, max_length, dtype)
        self.dtype = self.words.dtype
        _require_gemma(name_or_path, self.words.model.config)
        self.folder = connectors_folder(name_or_path, connectors)
        self.connectors = load_connectors(self.folder, self.dtype)
        self.to(next(self.words.model.parameters()).device)
        sizes = self.connectors.sizes
        self.dim = sizes.width("video") + sizes.width("audio")
        _require_fit(name_or_path, self.words.model.config, self.folder, sizes, max_length)

    def to(self, device: torch.device | str) -> LTX2Encoder:
        """Move both parts; embeddings then come on that device."""
        self.words.to(device)
        self.connectors.to(next(self.words.model.parameters()).device)
        return self

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions -> contexts (B, L, C) and validity (B, L), all True; L = ``max_length``."""
        captions = [caption.strip() for caption in captions]
        size = max(1, GROUP_TOKENS // self.max_length)
        x_BLC = torch.cat(
            [self._embed(captions[start : start + size]) for start in range(0, len(captions), size)]
        )
        return x_BLC, torch.ones(x_BLC.shape[:2], dtype=torch.bool, device=x_BLC.device)

    def _embed(self, captions: Sequence[str]) -> Tensor:
        ids_BL, valid_BL = self.words.token_ids(captions)
        # The original pads on the left, so its words end at the last place. Rotary positions only count how
        # far words are apart, but in low precision they are rounded where they stand.
        first_B1 = self.max_length - valid_BL.sum(dim=1, keepdim=True)
        place_BL = (first_B1 + torch.arange(ids_BL.shape[1], device=ids_BL.device)).clamp(
            max=self.max_length - 1
        )
        out = self.words.model(
            input_ids=ids_BL,
            attention_mask=valid_BL.long(),
            position_ids=place_BL,
            output_hidden_states=True,
        )
        hidden_BLGY = torch.stack(out.hidden_states, dim=-1)
        after = self.max_length - ids_BL.shape[1]
        video, audio = (F.pad(x, (0, 0, 0, after)) for x in self.connectors.features(hidden_BLGY, valid_BL))
        return self.connectors.contexts(video, audio, F.pad(valid_BL, (0, after))).to(self.dtype)

    def count_cut(self, captions: Sequence[str]) -> int:
        """How many captions are longer than ``max_length`` tokens and lose their end."""
        return self.words.count_cut([caption.strip() for caption in captions])

    def fingerprint(self) -> str:
        """SHA-256 over the language model's and the connectors' weights and settings, taken once."""
        self._fingerprint = self._fingerprint or self._digest()
        return self._fingerprint

    def _digest(self) -> str:
        digest = hashlib.sha256(self.words.fingerprint().encode())
        digest.update(repr(self.connectors.sizes).encode())
        digest_weights(digest, self.connectors.state_dict())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write ``text_encoder.json``: which models, and their fingerprint. Weights stay where they are."""
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "type": "ltx2",
            "name_or_path": whole_path(self.words.name_or_path),
            "connectors": whole_path(str(self.folder)),
            "max_length": self.max_length,
            "dtype": str(self.words.weight_dtype).removeprefix("torch."),
            "fingerprint": self.fingerprint(),
        }
        (folder / "text_encoder.json").write_text(json.dumps(settings, indent=2) + "\n")


def connectors_folder(name_or_path: str, connectors: str) -> Path:
    """The folder that is named, else the one beside the language model."""
    return Path(connectors) if connectors else Path(model_folder(name_or_path)).parent / "connectors"


def _require_gemma(name_or_path: str, config: Any) -> None:
    if "gemma" not in config.model_type:
        raise UserError(
            f"text_encoder.name_or_path {name_or_path}: is a {config.model_type}, and LTX-2 reads Gemma 3: "
            "name one"
        )


def _require_fit(
    name_or_path: str, config: Any, folder: Path, sizes: ConnectorSizes, max_length: int
) -> None:
    """The connectors are those of the language model, whose text part has this ``config``."""
    layers = config.num_hidden_layers
    if (config.hidden_size, layers + 1) != (sizes.caption_channels, sizes.text_proj_in_factor):
        raise UserError(
            f"text_encoder.connectors {folder}: made for a language model of "
            f"{sizes.caption_channels} channels and {sizes.text_proj_in_factor - 1} layers; "
            f"{name_or_path} has {config.hidden_size} and {layers}: name the one that they came with"
        )
    for modality in ("video", "audio"):
        if max_length % (registers := getattr(sizes, f"{modality}_connector_num_learnable_registers")):
            raise UserError(
                f"text_encoder.max_length {max_length} is no multiple of the connectors' {registers} "
                f"registers: set text_encoder.max_length={-(-max_length // registers) * registers}"
            )


def check(config: TextEncoderConfig) -> int:
    """Channels of the encoder that a recipe names, without reading its weights; raises what `build` would, as
    far as can be told so."""
    opened = open_model(model_folder(config.name_or_path), config.max_length, getattr(torch, config.dtype))
    _require_gemma(config.name_or_path, opened.config)
    folder = connectors_folder(config.name_or_path, config.connectors)
    sizes = read_sizes(folder)
    text = opened.config.get_text_config()
    _require_fit(config.name_or_path, text, folder, sizes, config.max_length)
    return sizes.width("video") + sizes.width("audio")


def describe(config: TextEncoderConfig) -> dict[str, Any]:
    """What `LTX2Encoder.save` writes of the encoder that a recipe names, but for its fingerprint."""
    return {
        "type": "ltx2",
        "name_or_path": whole_path(model_folder(config.name_or_path)),
        "connectors": whole_path(str(connectors_folder(config.name_or_path, config.connectors))),
        "max_length": config.max_length,
        "dtype": config.dtype,
    }


def build(config: TextEncoderConfig, seed: int) -> LTX2Encoder:
    """The encoder that a recipe names; frozen, so ``seed`` decides nothing."""
    return LTX2Encoder(
        config.name_or_path, config.connectors, config.max_length, getattr(torch, config.dtype)
    )


def load(folder: Path, settings: dict[str, Any]) -> LTX2Encoder:
    """The encoder that `LTX2Encoder.save` named.

    Raises:
        UserError: an entry is missing or wrong, a model is gone, or is no longer the one that was saved.
    """
    note = str(folder / "text_encoder.json")
    name, connectors = (entry(settings, key, str, note) for key in ("name_or_path", "connectors"))
    length = entry(settings, "max_length", int, note)
    dtype = getattr(torch, entry(settings, "dtype", DType, note))
    fingerprint = entry(settings, "fingerprint", str, note)
    encoder = LTX2Encoder(name, connectors, length, dtype)
    if encoder.fingerprint() != fingerprint:
        raise UserError(
            f"{name} and {connectors} are not the text encoder that {note} was saved with: put the former "
            "back, or correct the paths there"
        )
    return encoder
