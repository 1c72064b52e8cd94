"""A model that starts from the weights of a smaller one: what these lack, and where it comes from."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable

import torch
from torch import nn

from motionloom.backbones.base import Growing
from motionloom.backbones.weights import Weights


def lacking(module: nn.Module, names: Collection[str]) -> frozenset[str]:
    """Tensors of ``module`` that weights of these names lack and may lack: all of those that the module has
    grown by, or none."""
    grown = module.grown() if isinstance(module, Growing) else frozenset()
    return frozenset() if any(name in names for name in grown) else grown


def with_first_values(module: nn.Module, weights: Weights, generator: torch.Generator) -> Weights:
    """``weights``, and the first values of what they lack.

    Args:
        module: may be on ``meta``; it is left as it is.
        generator: as for ``init_weights``; equal ones give equal values.
    """
    lacks = lacking(module, weights)
    if not lacks:
        return weights
    twin = copy.deepcopy(module).to_empty(device="cpu")
    assert isinstance(twin, Growing)
    twin.init_weights(generator)
    return weights.beside({name: t for name, t in twin.state_dict().items() if name in lacks})


def branches(some: Collection[str], names: Iterable[str]) -> list[str]:
    """The shortest beginnings of names under which ``names`` has nothing but ``some``; numbers as ``*``."""
    others = {part for name in names if name not in some for part in _beginnings(name)}
    found = (next(part for part in _beginnings(name) if part not in others) for name in sorted(some))
    numbered = (".".join("*" if p.isdigit() else p for p in part.split(".")) for part in found)
    return list(dict.fromkeys(numbered))


def _beginnings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
