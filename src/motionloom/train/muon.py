"""Muon for the matrices of a backbone's blocks, AdamW for everything else, as one optimiser.

Muon (Jordan et al. 2024; scaled as in Liu et al. 2025, 2502.16982, so that AdamW's learning rate and decay
carry over) steps along the nearest orthogonal matrix to the momentum: every direction of a layer learns
equally fast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from motionloom.errors import UserError
from motionloom.train.groups import decays, parameter_groups


class MuonAdamW(torch.optim.Optimizer):
    """Groups with ``muon: True`` go to ``torch.optim.Muon``, the others to fused ``torch.optim.AdamW``.

    Both keep their state in this optimiser's ``state``, so checkpoints see one optimiser.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        matrices = [group for group in groups if group["muon"]]
        others = [group for group in groups if not group["muon"]]
        self._inner: list[tuple[torch.optim.Optimizer, bool]] = [
            (torch.optim.Muon(matrices, lr=lr, adjust_lr_fn="match_rms_adamw"), True)
        ]
        if others:  # adapters inside blocks leave nothing
            self._inner.append((torch.optim.AdamW(others, lr=lr, betas=betas, fused=True), False))
        super().__init__([group for inner, _ in self._inner for group in inner.param_groups], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "losses are computed by the method"
        for inner, is_muon in self._inner:
            # Linked at every step: loading a checkpoint replaces both.
            inner.state = self.state
            inner.param_groups = [group for group in self.param_groups if group["muon"] is is_muon]
            inner.step()


def muon(
    modules: Mapping[str, nn.Module],
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    rest_lr: float | None = None,
) -> MuonAdamW:
    """:class:`MuonAdamW` over everything trainable in ``modules``.

    ``rest_lr``: base rate of what AdamW takes; None: ``lr`` too.

    Raises:
        UserError: no module has blocks with trainable matrices, so there is nothing for Muon.
    """
    matrices = {
        id(parameter)
        for module in modules.values()
        for block in _blocks(module)
        for owner in block.modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if decays(owner, name, parameter) and parameter.ndim == 2
    }
    groups = []
    for group in parameter_groups(modules.values(), weight_decay):
        for is_muon in (True, False):
            params = [p for p in group["params"] if (id(p) in matrices) is is_muon]
            if params:
                rate = lr if is_muon or rest_lr is None else rest_lr
                groups.append({**group, "params": params, "muon": is_muon, "lr": rate})
    if not any(group["muon"] for group in groups):
        raise UserError("train.optimizer muon finds no trainable block matrices: use adamw")
    return MuonAdamW(groups, lr, betas)


def _blocks(module: nn.Module) -> list[nn.Module]:
    blocks = getattr(module, "blocks", None)
    if isinstance(blocks, nn.ModuleList):
        return list(blocks)
    return list(blocks()) if callable(blocks) and not isinstance(blocks, nn.Module) else []
