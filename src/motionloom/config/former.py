"""Recipes written by earlier versions: keys that are called otherwise now, so that old runs stay readable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_FORMER = ("plan.probability", "plan.expand_probability")


def from_former(flat: Mapping[str, Any], label: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Dotted keys of today, and a line for what was said otherwise.

    Until conditions had a list of their own, ``first_frame`` was a plan with a ``probability`` and the scenes
    that are given hung on ``expand_probability``. A whole recipe, as runs keep it, names both even where its
    plan reads neither.
    """
    kind = flat.get("plan.type")
    if kind != "first_frame" and not any(key in flat for key in _FORMER):
        return dict(flat), ()
    values = {key: value for key, value in flat.items() if key not in _FORMER}
    conditions: list[dict[str, Any]] = []
    if kind == "first_frame":
        values["plan.type"] = "text_to_video"
        conditions = [{"type": "first_frame", "probability": flat.get("plan.probability", 0.5)}]
    elif kind == "scenes" or ("plan.expand_probability" in flat and kind is None):
        probability = flat.get("plan.expand_probability", 0.5)
        conditions = [{"type": "scene", "scenes": "all_but_last", "probability": probability}]
    if not any(one["probability"] for one in conditions):
        return values, ()
    values["plan.conditions"] = conditions
    return values, (f"{label}: was written for an earlier version; its plan.conditions are now {conditions}",)
