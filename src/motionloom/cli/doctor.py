"""``motionloom doctor``: is it alive?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from motionloom.cli.console import FAILED, Out

if TYPE_CHECKING:
    from motionloom.generate import Model


def run(what: str, overrides: list[str], cache_path: Path | None, as_json: bool) -> None:
    """Examine a recipe's fresh model, or a checkpoint's."""
    from motionloom.cli.assemble import load_model
    from motionloom.data.cache import open_cache
    from motionloom.evals.doctor import Doctor

    console = Out(as_json)
    model = load_model(what, device="cpu") if Path(what).is_dir() else _fresh(what, overrides)
    for module in (model.predictor.backbone, model.text_encoder):
        if hasattr(module, "requires_grad_") and Path(what).is_dir():
            module.requires_grad_(True)
    findings = Doctor(model, open_cache(cache_path) if cache_path else None).examine()
    wrong = [finding for finding in findings if finding.status == "wrong"]
    verdict = f"{len(wrong)} of {len(findings)} checks found something wrong" if wrong else "all is well"
    console.result(
        {"ok": not wrong, "findings": [asdict(finding) for finding in findings]},
        [*map(str, findings), verdict],
    )
    if wrong:
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
