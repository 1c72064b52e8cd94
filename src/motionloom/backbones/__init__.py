"""Backbones: one file per family, single-device maths over token streams.

``factorized`` and ``joint`` are the project's own, of any size; the published families (``families.py``) come
in the sizes that their weights have. ``lightning`` is both: a plain transformer of any size, and published.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias, cast

import torch

from motionloom.backbones.base import Backbone
from motionloom.backbones.factorized import Factorized
from motionloom.backbones.families import FAMILIES, Sizes, recognise
from motionloom.backbones.joint import Joint
from motionloom.backbones.lightning import Lightning, LightningSizes
from motionloom.backbones.weights import open_weights
from motionloom.config.recipe import ModelConfig
from motionloom.errors import UserError
from motionloom.rng import torch_generator

if TYPE_CHECKING:
    from motionloom.backbones.cogvideox import CogVideoX
    from motionloom.backbones.ltx2 import LTX2
    from motionloom.backbones.wan import Wan

BACKBONES: dict[str, Callable[..., Factorized | Joint | Lightning]] = {
    "factorized": Factorized,
    "joint": Joint,
    "lightning": Lightning.from_recipe,
}
"""Those whose sizes a recipe may choose, by ``model.type``; published ones are in ``families.FAMILIES``."""

Asks: TypeAlias = dict[str, tuple[tuple[str, ...], tuple[str, ...]]]
"""Attentions by name: the modalities that ask, and those that answer."""

JOINED: Asks = {"text and video": (("text", "video"), ("text", "video"))}
CROSSED: Asks = {"self": (("video",), ("video",)), "text": (("video",), ("text",))}
ATTENTIONS: dict[str, Asks] = {
    "factorized": {"text": CROSSED["text"]},
    "joint": JOINED,
    "cogvideox": JOINED,
    "wan": CROSSED,
    "ltx2": CROSSED,
    "lightning": {"self": CROSSED["self"]},
}
"""What goes through ``plans.lower`` where video and text are all there is, by ``model.type``. ``factorized``
attends in space and time in small groups besides, always by reshape."""

BackboneModule: TypeAlias = "Factorized | Joint | Lightning | Wan | CogVideoX | LTX2"
"""What :func:`build_backbone` builds: a module that is a :class:`Backbone`."""

__all__ = [
    "ATTENTIONS",
    "BACKBONES",
    "FAMILIES",
    "Backbone",
    "BackboneModule",
    "Factorized",
    "Joint",
    "Lightning",
    "backbone_sizes",
    "build_backbone",
]


def build_backbone(
    config: ModelConfig,
    latent_channels: int,
    text_dim: int,
    *,
    audio_channels: int = 0,
    sizes: Sizes | None = None,
    device: torch.device | str = "cpu",
) -> BackboneModule:
    """The backbone that a recipe names, with weights that are the same every time.

    A run draws its own with ``init_weights(generator)`` before it moves the model to a device, or loads them.

    Args:
        latent_channels: of the tokenizer; a token holds them once for each latent cell of ``config.patch``.
        text_dim: channels of a text embedding.
        audio_channels: of a latent of sound; 0: there is no sound.
        sizes: of a published backbone; None: those that ``config`` names.
        device: where; ``meta`` is shapes alone, in no memory and without values.

    Raises:
        UserError: sizes that cannot be had, or that do not go with the plans or with the recipe's patch,
            tokenizer or text.
    """
    if config.imported:
        model = _published(config, latent_channels, text_dim, audio_channels, sizes)
    else:
        if config.audio_dim and not audio_channels:
            raise UserError(
                f"model.audio_dim is {config.audio_dim}, but there is no sound to read: set "
                "audio.enabled: true, or model.audio_dim: 0"
            )
        sound = {"audio_channels": audio_channels} if config.audio_dim else {}
        # Layers draw initial weights from the global generator; on the meta device they draw nothing.
        with torch.device("meta"):
            model = BACKBONES[config.type](config, latent_channels, text_dim, **sound)
    if torch.device(device).type != "meta":
        model.to_empty(device="cpu")
        model.init_weights(torch_generator("backbone weights"))
        model.to(device)
    return model


def backbone_sizes(config: ModelConfig) -> Sizes:
    """The sizes of a published backbone: those of ``model.preset``, else those of ``model.name_or_path``.

    Raises:
        UserError: no such preset, or weights that cannot be opened or are of another family.
    """
    if config.preset:
        return FAMILIES[config.type].preset(config.preset)
    return recognise(open_weights(config.name_or_path), config.type).sizes


def _published(
    config: ModelConfig, latent_channels: int, text_dim: int, audio_channels: int, sizes: Sizes | None
) -> BackboneModule:
    family = FAMILIES[config.type]
    sizes = sizes or backbone_sizes(config)
    named = f"{config.type} ({config.preset or config.name_or_path})"
    if isinstance(sizes, LightningSizes):
        sizes = _with_ends(sizes, config, latent_channels, text_dim, named)
    model = cast("Wan", family.on_meta(sizes, checkpoint_blocks=config.checkpoint_blocks))
    if sizes.reads_image:
        raise UserError(
            f"{named} reads a given image beside the noisy video, and no plan.type brings one: take the "
            "text-to-video model of its family; with plan.type: first_frame that learns to begin with a frame"
        )
    if tuple(config.patch) != tuple(model.patch):
        raise UserError(
            f"model.patch is {list(config.patch)}, but {named} was made for another: write model.patch: "
            f"{list(model.patch)}"
        )
    if latent_channels != model.latent_channels:
        raise UserError(
            f"the tokenizer's latents have {latent_channels} channels, but {named} takes "
            f"{model.latent_channels}: use the tokenizer that it was trained with, or set "
            f"tokenizer.latent_d: {model.latent_channels} to train anew on another"
        )
    if audio_channels and audio_channels != getattr(model, "audio_channels", audio_channels):
        raise UserError(
            f"the latents of sound have {audio_channels} channels, but {named} takes "
            f"{getattr(model, 'audio_channels', 0)}: use the sound tokenizer that it was trained with"
        )
    if text_dim != model.text_dim:
        raise UserError(
            f"text embeddings have {text_dim} channels, but {named} takes {model.text_dim}: use the text "
            f"encoder that it was trained with, or text_encoder.dim: {model.text_dim} to train on another"
        )
    return model


def _with_ends(
    sizes: LightningSizes, config: ModelConfig, latent_channels: int, text_dim: int, named: str
) -> LightningSizes:
    """A named trunk between the ends that the recipe asks for; weights keep theirs, which it must name."""
    if not config.name_or_path:
        return sizes.fitted(config, latent_channels, text_dim)
    for key in ("condition", "qk_norm"):
        given, theirs = getattr(config, key), getattr(sizes, key)
        if given != theirs:
            raise UserError(
                f"model.{key} is {str(given).lower()}, but {named} was made for another: write model.{key}: "
                f"{str(theirs).lower()}"
            )
    return sizes
