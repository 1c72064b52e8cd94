"""``motionloom inspect``: what a recipe, a cache or a checkpoint amounts to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from motionloom.cli.console import Out


def run(what: str, overrides: list[str], sheet: Path | None, as_json: bool) -> None:
    """Find out what ``what`` is, and show it."""
    console = Out(as_json)
    path = Path(what)
    if (path / "cache.json").is_file():
        answer = _cache(path, sheet or path.parent / f"{path.name}_sheet.png")
    elif path.is_dir():
        answer = _checkpoint(path)
    else:
        answer = _recipe(what, overrides)
    console.result(answer, _lines(answer))


def _cache(path: Path, sheet: Path) -> dict[str, Any]:
    from motionloom.data.cache import open_cache
    from motionloom.data.sheets import contact_sheet
    from motionloom.evals.inspection import inspect_cache, sheet_clips

    cache = open_cache(path)
    contact_sheet(*sheet_clips(cache), sheet)
    return {**inspect_cache(cache), "sheet": str(sheet)}


def _checkpoint(path: Path) -> dict[str, Any]:
    from motionloom.cli.assemble import load_model
    from motionloom.evals.inspection import inspect_model
    from motionloom.train import checkpoint

    saved = checkpoint.load(path)
    return inspect_model(load_model(saved.folder, device="cpu"), saved.step, str(saved.folder))


def _recipe(name: str, overrides: list[str]) -> dict[str, Any]:
    from torch import nn

    from motionloom.cli.assemble import new_backbone, recipe_spec, text_encoder_for
    from motionloom.config import load_recipe_with_notes
    from motionloom.evals.inspection import inspect_recipe

    recipe, notes = load_recipe_with_notes(name, overrides)
    spec = recipe_spec(recipe)
    text_encoder = text_encoder_for(recipe)
    modules: dict[str, nn.Module] = {"backbone": new_backbone(recipe, spec, text_encoder.dim)}
    if isinstance(text_encoder, nn.Module):
        modules["text_encoder"] = text_encoder
    return {**inspect_recipe(recipe, spec, modules), "notes": notes}


def _lines(answer: dict[str, Any], indent: str = "") -> list[str]:
    """The answer as indented ``key: value`` lines."""
    lines = []
    for key, value in answer.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", *_lines(value, indent + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            lines.append(f"{indent}{key}:")
            for item in value:
                shown = ", ".join(f"{k} {_short(v)}" for k, v in item.items())
                lines.append(f"{indent}  {shown}")
        else:
            lines.append(f"{indent}{key}: {_short(value)}")
    return lines


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000:
        return f"{value:,}"
    return str(value)
