"""Tokenizers: pixels to latents and back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from motionloom.config.recipe import TokenizerConfig
from motionloom.errors import UserError
from motionloom.tokenizers import diffusers_folder
from motionloom.tokenizers.base import Tokenizer, TokenizerSpec
from motionloom.tokenizers.cogvideox_vae import COGVIDEOX_VAE
from motionloom.tokenizers.ltx2_vae import LTX2_VAE
from motionloom.tokenizers.patch import PatchTokenizer
from motionloom.tokenizers.scenes import (
    decode_scenes,
    encode_scenes,
    scene_latents,
    scene_seconds,
    scene_spans,
)
from motionloom.tokenizers.vae import VaeKind, VaeSettings, VaeTokenizer
from motionloom.tokenizers.wan_vae import WAN_VAE

TOKENIZERS = {"patch": PatchTokenizer}
"""Tokenizers that are fitted, by recipe name."""

VAES: dict[str, VaeKind] = {kind.name: kind for kind in (WAN_VAE, COGVIDEOX_VAE, LTX2_VAE)}
"""Tokenizers that come with weights, by recipe name."""


def fit_tokenizer(config: TokenizerConfig, clips: Sequence[Tensor]) -> Tokenizer:
    """A new tokenizer from uint8 clips (P, H, W, 3).

    Raises:
        UserError: the recipe's tokenizer is one that comes with weights.
    """
    if config.type not in TOKENIZERS:
        raise UserError(
            f"tokenizer.type {config.type} comes with weights and is not fitted: set tokenizer.name_or_path "
            f"to a diffusers folder of {VAES[config.type].vae_class}"
        )
    return TOKENIZERS[config.type].fit(config, clips)


def open_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that a recipe names in `tokenizer.name_or_path`, run as the recipe says.

    Raises:
        UserError: it is missing or damaged, of another type, or of another shape than the recipe says.
    """
    folder = Path(config.name_or_path)
    kind = _saved_kind(folder)
    if kind and kind != config.type:
        raise UserError(
            f"{folder}: is a {kind} tokenizer and tokenizer.type is {config.type}: set the type to {kind}"
        )
    if config.type in VAES:
        tokenizer: Tokenizer = VaeTokenizer.open(VAES[config.type], folder, VaeSettings.of(config))
    else:
        tokenizer = load_tokenizer(folder)
    _require_shape(tokenizer.spec, config)
    return tokenizer


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Read a tokenizer folder, or a VAE's folder in diffusers' layout with the usual settings.

    Raises:
        UserError: the folder is missing or is not a tokenizer.
    """
    folder = Path(folder)
    note = folder / "tokenizer.json"
    if not note.is_file():
        named = diffusers_folder.class_named_in(folder)
        for vae in VAES.values():
            if vae.vae_class == named:
                return VaeTokenizer.open(vae, folder, VaeSettings())
        raise UserError(f"{folder}: no tokenizer here ({note.name} is missing): name a saved one")
    settings = _noted(note)
    kind = settings.pop("type")
    if kind in VAES:
        return VaeTokenizer.load(VAES[kind], folder, settings)
    if kind not in TOKENIZERS:
        raise UserError(
            f"{note}: type {kind!r} is unknown: this version has {', '.join([*TOKENIZERS, *VAES])}"
        )
    return TOKENIZERS[kind].load(folder, settings)


def _saved_kind(folder: Path) -> str:
    """The type that a folder says it is; empty where it does not say."""
    note = folder / "tokenizer.json"
    if note.is_file():
        return str(_noted(note)["type"])
    named = diffusers_folder.class_named_in(folder)
    return next((name for name, vae in VAES.items() if vae.vae_class == named), "")


def _noted(note: Path) -> dict[str, Any]:
    """The content of a ``tokenizer.json``, an object with a word for its type."""
    try:
        settings = json.loads(note.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{note}: not a tokenizer's ({error}): fit or copy it again") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("type"), str):
        raise UserError(f"{note}: not a tokenizer's (it has no type): fit or copy it again")
    return settings


def _require_shape(spec: TokenizerSpec, config: TokenizerConfig) -> None:
    pairs = {
        "latent_f": (spec.spatial, config.latent_f),
        "latent_t": (spec.temporal, config.latent_t),
        "latent_d": (spec.channels, config.latent_d),
        "first_alone": (spec.first_alone, config.first_alone),
    }
    for key, (has, wants) in pairs.items():
        if has != wants:
            raise UserError(
                f"tokenizer.{key} is {has} in the tokenizer and {wants} in the recipe: set the recipe's to "
                f"the tokenizer's, or name another tokenizer.name_or_path than {config.name_or_path}"
            )


__all__ = [
    "TOKENIZERS",
    "VAES",
    "Tokenizer",
    "TokenizerSpec",
    "VaeSettings",
    "VaeTokenizer",
    "decode_scenes",
    "encode_scenes",
    "fit_tokenizer",
    "load_tokenizer",
    "open_tokenizer",
    "scene_latents",
    "scene_seconds",
    "scene_spans",
]
