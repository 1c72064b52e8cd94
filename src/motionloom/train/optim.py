"""Optimisers by what a recipe says: AdamW, fused, with weight decay on matrices alone; or Muon beside it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from motionloom.config.recipe import TrainConfig
from motionloom.errors import UserError
from motionloom.train.groups import parameter_groups
from motionloom.train.muon import muon


def make_optimizer(
    modules: Mapping[str, nn.Module],
    t: TrainConfig,
    lr: float | None = None,
    betas: tuple[float, float] | None = None,
) -> torch.optim.Optimizer:
    """What a recipe's ``train`` says, over everything trainable in ``modules``; ``lr`` and ``betas`` in the
    place of its own where given. ``rest_lr`` keeps its ratio to ``lr``.

    Raises:
        UserError: nothing is trainable, or Muon finds no matrices of blocks.
    """
    lr, betas = lr or t.lr, betas or t.betas
    if t.optimizer == "muon":
        rest_lr = None if t.rest_lr is None else t.rest_lr * lr / t.lr
        return muon(modules, lr, betas, t.weight_decay, rest_lr)
    return adamw(modules, lr, betas, t.weight_decay)


def adamw(
    modules: Mapping[str, nn.Module], lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, 1711.05101) over everything trainable in ``modules``, fused where
    torch can.

    ``lr`` is the base rate; the loop multiplies it by the schedule's ratio before each step.

    Raises:
        UserError: nothing is trainable.
    """
    groups = parameter_groups(modules.values(), weight_decay)
    if not groups:
        raise UserError(f"nothing to train: every parameter of {', '.join(modules)} is frozen")
    fused = all(p.device.type in ("cpu", "cuda", "mps", "xpu") for group in groups for p in group["params"])
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, ratio: float) -> float:
    """Every group's rate = its base rate x ``ratio``; returns the first group's."""
    for group in optimizer.param_groups:
        group.setdefault("base_lr", group["lr"])
        group["lr"] = group["base_lr"] * ratio
    return float(optimizer.param_groups[0]["lr"])
