"""Every way of asking of ``benchmarks/modes.py`` is made and judged; untrained, the figures mean nothing."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from motionloom.data.shapeworld import World
from motionloom.generate import Sampling
from toy_model import toy_model

FILE = Path(__file__).parents[1] / "benchmarks" / "modes.py"
SECTIONS: dict[str, dict[str, Any]] = {
    "video": {"width": 32, "height": 32, "num_frames": 17},
    "tokenizer": {"latent_f": 8, "latent_t": 4, "latent_d": 48, "first_alone": True},
}
GIVEN = [
    "text",
    "first_frame",
    "first_last",
    "keyframes",
    "prefix",
    "suffix",
    "outpaint",
    "inpaint",
    "gap",
    "swap",
    "edges",
]
SCENES = ["scenes", "scenes_unequal", "scenes_5", "expand", "expand_last"]
SOUND = ["t2av", "v2a", "a2v"]
HEARD = {"audio": {"enabled": True}, "model": {"audio_dim": 12}}


@pytest.fixture(scope="module")
def modes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("modes", FILE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["modes"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def found(modes: ModuleType, name: str, plan: Any, **more: dict[str, Any]) -> dict[str, float]:
    sections = {**SECTIONS, **more}
    setting = modes.Setting(toy_model("joint", plan, **sections), World.modes(), 2, 1)
    figures = modes.measure(setting, modes.CASES[name](setting), Sampling(steps=2), "color-histogram")
    assert all(isinstance(value, float) for value in figures.values())
    return figures


def test_every_case_is_tried_below(modes: ModuleType) -> None:
    assert {*GIVEN, *SCENES, *SOUND} == set(modes.CASES)


@pytest.mark.parametrize("name", GIVEN)
def test_parts_and_references(modes: ModuleType, name: str) -> None:
    figures = found(modes, name, "text_to_video")
    assert 0 <= figures["adherence: all"] <= 1
    assert ("as wanted: shape" in figures) == (name in ("swap", "edges"))
    if name in ("prefix", "suffix", "first_frame"):
        assert figures["seam: seam ratio of real"] > 0


@pytest.mark.parametrize("name", SCENES)
def test_scenes(modes: ModuleType, name: str) -> None:
    figures = found(modes, name, {"type": "scenes", "positions": "gap"})
    assert 0 <= figures["scenes: cuts within 1 frame"] <= 1
    assert 0 <= figures["at the last scene: same character"] <= 1


@pytest.mark.parametrize("name", SOUND)
def test_sound(modes: ModuleType, name: str) -> None:
    figures = found(modes, name, {"modalities": ["video", "audio"]}, **HEARD)
    assert any(key.startswith("sound: ") for key in figures)
