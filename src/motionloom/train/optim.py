"""AdamW as it is used here: fused, with weight decay on matrices alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from motionloom.errors import UserError


def decays(owner: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix in the sense of weight decay: the ``weight`` of a linear or
    convolution.

    Biases, norms, embeddings and learned tables (a parameter that a module holds under a name of its own)
    keep their size: pulling them to 0 regularises nothing and forgets rare words.
    """
    # Attention as torch names it holds queries, keys and values in one matrix.
    named = name in ("weight", "in_proj_weight")
    return named and parameter.ndim >= 2 and not isinstance(owner, nn.Embedding | nn.EmbeddingBag)


def parameter_groups(modules: Iterable[nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in groups with and without decay; sharded and whole ones never share a group.

    (A fused step over a group takes either kind, not both.)
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    seen: set[int] = set()
    for module in modules:
        for owner in module.modules():
            for name, parameter in owner.named_parameters(recurse=False):
                if parameter.requires_grad and id(parameter) not in seen:
                    seen.add(id(parameter))
                    kind = decays(owner, name, parameter), isinstance(parameter, DTensor)
                    groups.setdefault(kind, []).append(parameter)
    return [
        {"params": params, "weight_decay": weight_decay if decay else 0.0}
        for (decay, _), params in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]


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
