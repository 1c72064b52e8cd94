"""A tiny model of every backbone and plan, for the tests of generation and doctor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from motionloom.cli.assemble import fresh_model
from motionloom.config import Recipe
from motionloom.generate import Model
from motionloom.plans import Streams, Visibility
from motionloom.rng import torch_generator

BACKBONES = ("joint", "factorized", "lightning")
PLANS: dict[str, dict[str, Any]] = {
    "text_to_video": {"type": "text_to_video"},
    "first_frame": {"conditions": [{"type": "first_frame", "probability": 0.5}]},
    "scenes": {"type": "scenes", "conditions": [{"type": "scene", "probability": 0.5}]},
    "chunks": {"type": "chunks", "frames": 1, "window": 2, "sinks": 1},
    "teacher": {"type": "chunks", "frames": 2, "forcing": "teacher"},
}
"""Plan sections by a name for tests; ``teacher`` is ``chunks`` with the clean past in front."""


def toy_recipe(
    backbone: str = "joint", plan: str | dict[str, Any] = "text_to_video", **sections: dict[str, Any]
) -> Recipe:
    """8 frames of 16 x 24 pixels at 8 a second: 4 x 4 x 6 tokens of 6 channels."""
    base: dict[str, dict[str, Any]] = {
        "video": {"height": 16, "width": 24, "num_frames": 8, "fps": 8.0},
        "tokenizer": {"latent_f": 4, "latent_t": 2, "latent_d": 6},
        "text_encoder": {"dim": 12, "vocab_size": 256, "max_length": 12},
        "model": {"type": backbone, "dim": 24, "depth": 2, "num_heads": 2, "window_size": 3},
        "plan": PLANS[plan] if isinstance(plan, str) else plan,
        "train": {"precision": "fp32", "sample_num_steps": 3, "sample_cfg_scale": 3.0},
    }
    return Recipe.model_validate({k: {**base.get(k, {}), **sections.get(k, {})} for k in base | sections})


def toy_model(
    backbone: str = "joint",
    plan: str | dict[str, Any] = "text_to_video",
    *,
    awake: bool = True,
    **sections: dict[str, Any],
) -> Model:
    """The model that the toy recipe starts from; unless ``awake`` its answer is 0 everywhere."""
    model = fresh_model(toy_recipe(backbone, plan, **sections), torch.device("cpu"))
    backbone_module = model.predictor.backbone
    assert isinstance(backbone_module, nn.Module)
    generator = torch_generator("toy model")
    for parameter in backbone_module.eval().parameters():
        if awake and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


Change = Callable[[Streams, Visibility], tuple[Streams, Visibility]]


class Altered(nn.Module):
    """A backbone that is fed something else than it was given, or is only listened to."""

    def __init__(self, backbone: Any, change: Change) -> None:
        super().__init__()
        self.backbone, self.change, self.patch = backbone, change, backbone.patch
        self.modalities = backbone.modalities
        self.words_first = getattr(backbone, "words_first", False)

    def forward(self, streams: Streams, visibility: Visibility) -> dict[str, Tensor]:
        return self.backbone(*self.change(streams, visibility))

    def blocks(self) -> list[nn.Module]:
        return self.backbone.blocks()


def altered(model: Model, change: Change) -> Model:
    """The model with a change in front of its backbone."""
    backbone = Altered(model.predictor.backbone, change).eval()
    return replace(model, predictor=replace(model.predictor, backbone=backbone))
