"""Which parameters are pulled to 0 by weight decay, and which may be stepped together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor


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
