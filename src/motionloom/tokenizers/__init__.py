"""Tokenizers: pixels and sound to latents and back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import Tensor

from motionloom.config.recipe import AudioConfig, Recipe, TokenizerConfig
from motionloom.errors import UserError
from motionloom.tokenizers import diffusers_folder
from motionloom.tokenizers.absent import AbsentTokenizer
from motionloom.tokenizers.audio import AudioTokenizer, AudioTokenizerSpec
from motionloom.tokenizers.base import Tokenizer, TokenizerSpec
from motionloom.tokenizers.cogvideox_vae import COGVIDEOX_VAE
from motionloom.tokenizers.ltx2_audio import LTX2Audio
from motionloom.tokenizers.ltx2_vae import LTX2_VAE
from motionloom.tokenizers.patch import PatchTokenizer
from motionloom.tokenizers.pixels import PixelsTokenizer
from motionloom.tokenizers.scenes import (
    decode_scenes,
    encode_scenes,
    latent_scenes,
    scene_latents,
    scene_seconds,
    scene_sound,
    scene_spans,
)
from motionloom.tokenizers.shipped import NOTE, shipped_tokenizers, tokenizer_folder
from motionloom.tokenizers.spectral import SpectralAudio
from motionloom.tokenizers.vae import VaeKind, VaeSettings, VaeTokenizer
from motionloom.tokenizers.vtp import VTPConfig, VTPModel, VtpTokenizer
from motionloom.tokenizers.vtp.tokenizer import model_fingerprint
from motionloom.tokenizers.wan_vae import WAN_VAE

TOKENIZERS: dict[str, type[PatchTokenizer] | type[PixelsTokenizer]] = {
    "patch": PatchTokenizer,
    "pixels": PixelsTokenizer,
}
"""Tokenizers that need no weights, by recipe name."""

VAES: dict[str, VaeKind] = {kind.name: kind for kind in (WAN_VAE, COGVIDEOX_VAE, LTX2_VAE)}
"""Tokenizers that come with weights, by recipe name."""

AUDIO_TOKENIZERS: dict[str, type[SpectralAudio] | type[LTX2Audio]] = {
    "spectral": SpectralAudio,
    "ltx2_audio": LTX2Audio,
}
"""Tokenizers of sound, by recipe name."""

_AUDIO_NOTE = "audio_tokenizer.json"


def shots_alone(recipe: Recipe) -> bool:
    """Whether every shot of a clip is coded as a clip of its own.

    A VAE mixes what it has seen into what follows, and of stories no latent frame may lie across a cut.
    """
    return mixes_frames(recipe.tokenizer) or recipe.of_shots


def mixes_frames(config: TokenizerConfig) -> bool:
    """Whether a tokenizer's latent frames see others: shots are then always coded alone."""
    return config.type in VAES or config.type == "vtp"


def named_otherwise(config: TokenizerConfig, cached: str) -> str | None:
    """What the recipe's named tokenizer is, where it is not the one of a fingerprint; None: it is.

    Of a VTP whose latents nobody has measured all but its statistics is compared.
    """
    if needs_clips(config):
        model = VTPModel.from_pretrained(tokenizer_folder(config.name_or_path), config.rope or "bf16")
        own = model_fingerprint(model, config.precision)
        return None if cached.startswith(own) else own
    own = open_tokenizer(config).fingerprint()
    return None if cached == own else own


def needs_clips(config: TokenizerConfig) -> bool:
    """Whether a recipe's tokenizer is to be fitted: one without weights, or a VTP whose latents nobody has
    measured, as in the released folders. Pixels have nothing to fit.

    Raises:
        UserError: it is a VTP, and there is none.
    """
    if config.type == "pixels":
        return False
    if not config.name_or_path:
        return True
    if config.type != "vtp":
        return False
    folder = tokenizer_folder(config.name_or_path)
    if not folder.exists():
        raise _no_tokenizer(folder)
    return not (folder / NOTE).is_file()


def fit_tokenizer(config: TokenizerConfig, clips: Sequence[Tensor]) -> Tokenizer:
    """A new tokenizer from uint8 clips (P, H, W, 3).

    Raises:
        UserError: the recipe's tokenizer is one that comes with weights, or its files are not in order.
    """
    if config.type == "vtp":
        folder = tokenizer_folder(config.name_or_path)
        model = VTPModel.from_pretrained(folder, config.rope or "bf16")
        tokenizer = VtpTokenizer.measured(model, clips, precision=config.precision, words=folder)
        _require_shape(tokenizer.spec, config)
        return tokenizer
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
    if config.type == "pixels" and not config.name_or_path:
        _require_shape(PixelsTokenizer.spec, config)
        return PixelsTokenizer()
    folder = tokenizer_folder(config.name_or_path)
    kind = _saved_kind(folder)
    if kind and kind != config.type:
        raise UserError(
            f"{folder}: is a {kind} tokenizer and tokenizer.type is {config.type}: set the type to {kind}, "
            "or another tokenizer.name_or_path (nothing behind its =: none)"
        )
    if config.type in VAES:
        tokenizer: Tokenizer = VaeTokenizer.open(VAES[config.type], folder, VaeSettings.of(config))
    elif config.type == "vtp":
        tokenizer = VtpTokenizer.load(folder, _settings(folder, config))
    else:
        tokenizer = load_tokenizer(folder)
    _require_shape(tokenizer.spec, config)
    return tokenizer


def _settings(folder: Path, config: TokenizerConfig) -> dict[str, Any]:
    """A measured VTP's own, to be run as the recipe says."""
    if needs_clips(config):
        raise _unmeasured(folder)
    settings = _noted(folder / NOTE) | {"precision": config.precision}
    if config.rope is not None:
        settings["rope"] = config.rope
    del settings["type"]
    return settings


def _unmeasured(folder: Path) -> UserError:
    return UserError(
        f"{folder}: the latents of this VTP model have not been measured: cache clips with "
        f"tokenizer.type=vtp tokenizer.name_or_path={folder}, and name the tokenizer/ folder of that cache"
    )


def _no_tokenizer(folder: Path) -> UserError:
    known = shipped_tokenizers()
    near = get_close_matches(str(folder), known, n=1)
    meant = f"did you mean {near[0]}?" if near else f"name a saved one, or one of {', '.join(known)}"
    if not folder.exists():
        return UserError(f"{folder}: no such tokenizer: {meant}")
    if (folder / "checkpoints").is_dir() or (folder / "manifest.json").is_file():
        meant = "of a run that trained one, `motionloom convert` makes it"
    return UserError(f"{folder}: no tokenizer here ({NOTE} is missing): {meant}")


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Read a tokenizer folder, or a VAE's folder in diffusers' layout with the usual settings; or what comes
    with MotionLoom under that name.

    Raises:
        UserError: the folder is missing or is not a tokenizer.
    """
    folder = tokenizer_folder(folder)
    note = folder / NOTE
    if not note.is_file():
        if VTPConfig.is_at(folder):
            raise _unmeasured(folder)
        named = diffusers_folder.class_named_in(folder)
        for vae in VAES.values():
            if vae.vae_class == named:
                return VaeTokenizer.open(vae, folder, VaeSettings())
        raise _no_tokenizer(folder)
    settings = _noted(note)
    kind = settings.pop("type")
    if kind in VAES:
        return VaeTokenizer.load(VAES[kind], folder, settings)
    if kind == "absent":
        return AbsentTokenizer.load(folder, settings)
    if kind == "vtp":
        return VtpTokenizer.load(folder, settings)
    if kind not in TOKENIZERS:
        raise UserError(
            f"{note}: type {kind!r} is unknown: this version has {', '.join([*TOKENIZERS, 'vtp', *VAES])}"
        )
    return TOKENIZERS[kind].load(folder, settings)


def with_decoder(tokenizer: Tokenizer, folder: str | Path) -> Tokenizer:
    """A tokenizer whose latents are decoded by what the second stage of training made of its decoder.

    Raises:
        UserError: there is no tokenizer, or one of other latents.
    """
    other = load_tokenizer(folder)
    if not (isinstance(tokenizer, VtpTokenizer) and isinstance(other, VtpTokenizer)):
        raise UserError(f"{folder}: only a VTP can be given the decoder of another VTP: leave it out")
    try:
        return tokenizer.decoded_by(other)
    except ValueError as error:
        raise UserError(
            f"{folder}: {error} than the model was trained on: name what `train vtp_decoder` made of its own "
            "tokenizer"
        ) from None


def fit_audio_tokenizer(config: AudioConfig, sounds: Sequence[Tensor], sample_rate: int) -> AudioTokenizer:
    """A new tokenizer from sounds (S, N) float32 in [-1, 1] of one rate.

    Raises:
        UserError: the recipe's tokenizer is one that comes with weights, or the sounds are too few or short.
    """
    if config.type != "spectral":
        raise UserError(
            f"audio.type {config.type} comes with weights and is not fitted: set audio.name_or_path to a "
            f"folder with audio_vae/ and vocoder/"
        )
    return SpectralAudio.fit(config, sounds, sample_rate)


def open_audio_tokenizer(config: AudioConfig) -> AudioTokenizer:
    """The tokenizer that a recipe names in `audio.name_or_path`.

    Raises:
        UserError: it is missing or damaged, of another type, or of another shape than the recipe says.
    """
    folder = Path(config.name_or_path)
    kind = _saved_audio_kind(folder)
    if kind != config.type:
        raise UserError(f"{folder}: is a {kind} tokenizer and audio.type is {config.type}: set it to {kind}")
    tokenizer = load_audio_tokenizer(folder)
    for key in ("sample_rate", "channels", "latents_per_second"):
        has, wants = getattr(tokenizer.spec, key), getattr(config, key)
        if has != wants:
            raise UserError(
                f"audio.{key} is {has:g} in the tokenizer and {wants:g} in the recipe: set the recipe's to "
                f"the tokenizer's, or name another audio.name_or_path than {folder}"
            )
    return tokenizer


def load_audio_tokenizer(folder: str | Path) -> AudioTokenizer:
    """Read an audio tokenizer's folder, or an LTX-2 pipeline's that has ``audio_vae/`` and ``vocoder/``.

    Raises:
        UserError: the folder is missing or is not an audio tokenizer.
    """
    folder = Path(folder)
    kind = _saved_audio_kind(folder)
    if kind not in AUDIO_TOKENIZERS:
        raise UserError(
            f"{folder / _AUDIO_NOTE}: type {kind!r} is unknown: this version has "
            f"{', '.join(AUDIO_TOKENIZERS)}"
        )
    return AUDIO_TOKENIZERS[kind].open(folder)


def _saved_audio_kind(folder: Path) -> str:
    """The type that a folder's note says; LTX-2's folders have none of their own."""
    note = folder / _AUDIO_NOTE
    return str(_noted(note)["type"]) if note.is_file() else "ltx2_audio"


def _saved_kind(folder: Path) -> str:
    """The type that a folder says it is; empty where it does not say."""
    note = folder / NOTE
    if note.is_file():
        return str(_noted(note)["type"])
    if VTPConfig.is_at(folder):
        return "vtp"
    named = diffusers_folder.class_named_in(folder)
    return next((name for name, vae in VAES.items() if vae.vae_class == named), "")


def _noted(note: Path) -> dict[str, Any]:
    """The content of a ``tokenizer.json``, an object with a word for its type."""
    try:
        settings = json.loads(note.read_text())
    except (OSError, ValueError, RecursionError) as error:
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
    wrong = {key: (has, wants) for key, (has, wants) in pairs.items() if has != wants}
    if wrong:
        told = ", ".join(
            f"tokenizer.{key} is {has} in the tokenizer and {wants} in the recipe"
            for key, (has, wants) in wrong.items()
        )
        right = " ".join(f"tokenizer.{key}={str(has).lower()}" for key, (has, _) in wrong.items())
        other = f", or name another tokenizer.name_or_path than {config.name_or_path}"
        raise UserError(f"{told}: set {right}{other if config.name_or_path else ''}")


__all__ = [
    "AUDIO_TOKENIZERS",
    "TOKENIZERS",
    "VAES",
    "AbsentTokenizer",
    "AudioTokenizer",
    "AudioTokenizerSpec",
    "PixelsTokenizer",
    "SpectralAudio",
    "Tokenizer",
    "TokenizerSpec",
    "VaeSettings",
    "VaeTokenizer",
    "VtpTokenizer",
    "decode_scenes",
    "encode_scenes",
    "fit_audio_tokenizer",
    "fit_tokenizer",
    "latent_scenes",
    "load_audio_tokenizer",
    "load_tokenizer",
    "mixes_frames",
    "named_otherwise",
    "needs_clips",
    "open_audio_tokenizer",
    "open_tokenizer",
    "scene_latents",
    "scene_seconds",
    "scene_sound",
    "scene_spans",
    "shipped_tokenizers",
    "shots_alone",
    "tokenizer_folder",
    "with_decoder",
]
