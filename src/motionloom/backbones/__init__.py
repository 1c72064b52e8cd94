"""Backbones: one file per family, single-device maths over token streams."""

from __future__ import annotations

import torch

from motionloom.backbones.base import Backbone
from motionloom.backbones.factorized import Factorized
from motionloom.backbones.joint import Joint
from motionloom.config.recipe import ModelConfig
from motionloom.rng import torch_generator

BACKBONES: dict[str, type[Factorized] | type[Joint]] = {"factorized": Factorized, "joint": Joint}
"""Backbones by ``model.type``."""

__all__ = ["BACKBONES", "Backbone", "Factorized", "Joint", "build_backbone"]


def build_backbone(config: ModelConfig, latent_channels: int, text_dim: int) -> Factorized | Joint:
    """The backbone that a recipe names, on CPU, with weights that are the same every time.

    A run draws its own with ``init_weights(generator)``, before it moves the model to a device.

    Args:
        latent_channels: of the tokenizer; a token holds them once for each latent cell of ``config.patch``.
        text_dim: channels of a text embedding.
    """
    # Layers draw initial weights from the global generator; on the meta device they draw nothing.
    with torch.device("meta"):
        model = BACKBONES[config.type](config, latent_channels, text_dim)
    model = model.to_empty(device="cpu")
    model.init_weights(torch_generator("backbone weights"))
    return model
