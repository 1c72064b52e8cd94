"""What ``inspect`` says of attention: sizes, the share of pairs that is seen, work, ways and their times."""

from __future__ import annotations

import pytest
from torch import nn

from motionloom.backbones import FAMILIES
from motionloom.config import Recipe, load_recipe
from motionloom.evals.attention import attention_rows
from motionloom.plans import Chunks, Plan, Scenes, TextToVideo


def rows(plan: Plan, grid: tuple[int, int, int], *overrides: str) -> list[dict]:
    recipe = load_recipe("quickstart", ["model.dim=64", "model.num_heads=2", *overrides])
    return attention_rows(recipe, plan, grid, nn.Module())


def test_scenes_in_a_joint_backbone_are_measured_way_by_way():
    [row] = rows(Scenes(), (6, 10, 12), "model.type=joint", "plan.type=scenes")
    words, video = 3 * 16, 6 * 10 * 12
    assert (row["attention"], row["queries"], row["keys"]) == ("text and video", words + video, words + video)
    seen = (video**2 + 3 * 16**2 + 2 * 3 * 16 * video // 3) / (words + video) ** 2
    assert row["seen"] == pytest.approx(seen, abs=1e-4)
    assert row["gflop"] == pytest.approx(4 * seen * (words + video) ** 2 * 64 / 1e9, abs=1e-3)
    assert row["heads_measured"] == 2
    assert {"dense"} < set(row["milliseconds"])
    assert row["way"] in row["milliseconds"]


def test_what_is_too_large_to_try_is_only_counted():
    [row] = rows(Chunks(), (21, 30, 52), "model.type=joint", "plan.type=chunks")
    assert row["way"].startswith("measured at the first step")
    assert row["milliseconds"] == {}
    # Block-causal: a little more than half of the video's pairs.
    assert 0.5 < row["seen"] < 0.6


def test_a_large_clip_is_measured_on_one_head():
    wide = ("model.dim=2048", "model.num_heads=8", "train.precision=fp32")
    [row] = rows(Scenes(), (6, 21, 22), "model.type=joint", "plan.type=scenes", *wide)
    assert row["gflop"] / 8 > 4, "more than what several heads may take"
    assert row["heads_measured"] == 1
    assert row["way"] in row["milliseconds"]


def test_one_chunk_hides_nothing_from_itself():
    wan = FAMILIES["wan"]
    model = {"type": "wan", "preset": "tiny", "patch": [1, 2, 2]}
    recipe = Recipe.model_validate({"model": model, "plan": {"type": "chunks"}})
    backbone = wan.on_meta(wan.preset("tiny"))
    whole, halves = (
        attention_rows(recipe, Chunks(frames=frames), (8, 16, 16), backbone)[0] for frames in (8, 4)
    )
    assert (whole["attention"], halves["seen"]) == ("self", 0.75)
    assert (whole["way"], whole["seen"], whole["milliseconds"]) == ("no mask", 1.0, {})
    assert halves["way"] in halves["milliseconds"]


def test_nothing_hidden_is_no_mask_and_small_ones_are_dense():
    [row] = rows(TextToVideo(), (4, 8, 8), "model.type=joint")
    assert (row["way"], row["seen"], row["heads_measured"]) == ("no mask", 1.0, 0)
    [row] = rows(Scenes(), (3, 2, 2), "model.type=factorized", "plan.type=scenes")
    assert (row["attention"], row["keys"]) == ("text", 48)
    assert row["way"].startswith("dense")
    assert row["seen"] == pytest.approx(1 / 3, abs=1e-4)
