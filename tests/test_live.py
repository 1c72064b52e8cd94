"""What ``benchmarks/live.py`` says of films that are known; an untrained model only has to say something."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from motionloom.data.shapeworld import World
from toy_model import toy_model

FILE = Path(__file__).parents[1] / "benchmarks" / "live.py"


@pytest.fixture(scope="module")
def live() -> ModuleType:
    spec = importlib.util.spec_from_file_location("live", FILE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["live"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def stage(live: ModuleType) -> object:
    """A model that changes nothing, behind a tokenizer that keeps all."""
    model = toy_model(
        "joint",
        {"type": "chunks", "frames": 1, "first_alone": True},
        awake=False,
        video={"width": 32, "height": 32, "num_frames": 17},
        tokenizer={"latent_f": 4, "latent_t": 1, "latent_d": 48, "first_alone": True},
    )
    return live.Stage(model, World.endless(), 17, 17)


def test_a_clip_that_is_hardly_redrawn_is_what_it_was(live: ModuleType, stage: object) -> None:
    still = [live.redraw(stage, 1, n, strength=0.02, recolour=False) for n in range(3)]
    assert all(all(right.values()) for right in still), still


def test_a_clip_that_is_hardly_redrawn_has_no_other_colour(live: ModuleType, stage: object) -> None:
    right = live.redraw(stage, 1, 0, strength=0.02)
    assert not right["color"]
    assert not right["all"]
    assert right["shape"]


@pytest.mark.parametrize("neutral", [False, True])
def test_a_picture_is_gone_on_from(live: ModuleType, stage: object, neutral: bool) -> None:
    assert set(live.image(stage, 1, 0, neutral=neutral)) == {"color", "shape", "motion", "background", "all"}


def test_cases_are_named(live: ModuleType) -> None:
    rows = [name for name, _ in live.cases(["image", "redraw", "still"], [0.8, 0.9])]
    assert rows == ["image", "redraw 0.8", "redraw 0.9", "still 0.8", "still 0.9"]
    with pytest.raises(SystemExit, match="--cases film: choose image, neutral, redraw, still"):
        list(live.cases(["film"], []))
