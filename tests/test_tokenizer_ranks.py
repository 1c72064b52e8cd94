"""Losses of tokenizer pre-training on two gloo processes: those of one process that has all their samples."""

from __future__ import annotations

import json
from pathlib import Path

from test_resume import finish, start
from toy_contrast import LOSSES


def test_losses_on_two_ranks_are_those_of_one_with_all_samples(tmp_path: Path) -> None:
    """Gradients of contrast, plain and in chunks; a teacher's targets; averages and weight of a judge."""
    out = tmp_path / "found.json"
    finish(start(2, str(out), program=Path(__file__).with_name("toy_contrast.py")), timeout=240)
    found = json.loads(out.read_text())
    assert found.pop("world") == 2
    assert all(found.pop(f"{name} size") > 0.1 for name in LOSSES)
    assert found.keys() == {
        *(f"{name} {way}" for name in LOSSES for way in ("plain", "chunks")),
        *("centre", "sinkhorn", "sinkhorn, none here", "lecam", "weight"),
    }
    assert all(difference < 1e-6 for difference in found.values()), found
