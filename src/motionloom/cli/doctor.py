"""``motionloom doctor``: is it alive?"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from motionloom.cli.console import FAILED, Out
from motionloom.errors import UserError

if TYPE_CHECKING:
    from motionloom.generate import Model


def run(what: str, overrides: list[str], cache_path: Path | None, as_json: bool) -> None:
    """Examine a recipe's fresh model, or a checkpoint's; exit with FAILED if anything is wrong."""
    from motionloom.cli.assemble import names_recipe
    from motionloom.data.cache import open_cache
    from motionloom.evals.doctor import Doctor

    console = Out(as_json)
    fresh = names_recipe(what)
    if overrides and not fresh:
        raise UserError(f"{overrides[0]}: a checkpoint has its own recipe; key=value is for recipes")
    model = _fresh(what, overrides) if fresh else _trained(what)
    cache = open_cache(cache_path) if cache_path else None
    findings = Doctor(model, cache, trained=not fresh).examine()
    count = Counter(finding.status for finding in findings)
    doubtful = f"{count['warning']} to look at, " if count["warning"] else ""
    verdict = f"{count['wrong']} wrong, {doubtful}{count['ok']} ok, {count['skipped']} skipped"
    console.result(
        {"ok": not count["wrong"], "findings": [asdict(finding) for finding in findings]},
        [*map(str, findings), verdict],
    )
    if count["wrong"]:
        raise SystemExit(FAILED)


def _fresh(name: str, overrides: list[str]) -> Model:
    """The model that a recipe would start from, woken."""
    import torch
    from torch import nn

    from motionloom.cli.assemble import fresh_model
    from motionloom.config import load_recipe
    from motionloom.evals.doctor import wake

    model = fresh_model(load_recipe(name, overrides), torch.device("cpu"))
    modules = [m for m in (model.predictor.backbone, model.text_encoder) if isinstance(m, nn.Module)]
    for module in modules:
        module.eval()
    wake(modules)
    return model


def _trained(path: str) -> Model:
    """A checkpoint's model, with gradients where training had them."""
    from torch import nn

    from motionloom.cli.assemble import load_model

    model = load_model(path, device="cpu")
    trained = [model.predictor.backbone, *([model.text_encoder] if model.text_encoder.trainable else [])]
    for module in trained:
        assert isinstance(module, nn.Module)
        module.requires_grad_(True)
    return model
