"""Text encoders: captions to token embeddings. A member is one file and one line in `ENCODERS`."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

from motionloom.config.recipe import TextEncoderConfig
from motionloom.errors import UserError
from motionloom.text.base import TextEncoder, encode_scenes, lay_scenes
from motionloom.text.on_demand import OnDemand

ENCODERS = {
    "hash": "motionloom.text.hash",
    "hf": "motionloom.text.hf",
    "ltx2": "motionloom.text.ltx2",
    "classes": "motionloom.text.classes",
}
"""Module of each ``text_encoder.type``; it offers ``build(config, seed)`` and ``load(folder, settings)``, and
``check(config)``: the channels, without reading weights."""

__all__ = [
    "ENCODERS",
    "TextEncoder",
    "build_text_encoder",
    "cached_text_encoder",
    "check_text_encoder",
    "encode_scenes",
    "lay_scenes",
    "load_text_encoder",
]


def build_text_encoder(config: TextEncoderConfig, seed: int) -> TextEncoder:
    """The text encoder of a recipe; a trained one starts as ``seed`` draws it, the same on every rank.

    Raises:
        UserError: the model cannot be had.
    """
    return importlib.import_module(ENCODERS[config.type]).build(config, seed)


def check_text_encoder(config: TextEncoderConfig) -> int:
    """Find out in seconds, without its weights, whether the text encoder that a recipe names can be had, and
    how many channels its embeddings have.

    Raises:
        UserError: it cannot.
    """
    channels: int = importlib.import_module(ENCODERS[config.type]).check(config)
    return channels


def cached_text_encoder(config: TextEncoderConfig, dim: int, fingerprint: str) -> TextEncoder:
    """The frozen encoder of a recipe whose embeddings are cached: read when it is asked for others.

    Args:
        dim: channels of the embeddings.
        fingerprint: of the encoder that made them.
    """
    return OnDemand(ENCODERS[config.type], config, dim, fingerprint)


def load_text_encoder(folder: Path) -> TextEncoder:
    """The text encoder that its ``save`` wrote into ``folder``.

    Raises:
        UserError: nothing readable is there, or the model that it names is gone or changed.
    """
    folder = Path(folder)
    note = folder / "text_encoder.json"
    try:
        settings = json.loads(note.read_text())
        module = ENCODERS[settings["type"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{note}: is missing or no text encoder's; name a folder that holds one") from error
    return importlib.import_module(module).load(folder, settings)
