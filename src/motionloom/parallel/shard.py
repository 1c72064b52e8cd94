"""From a single-device module to one that trains on many: a plan applied from outside, in a fixed order.

build -> activation checkpointing (the module's own) -> compile per block -> shard. A module says what its
repeated parts are with ``blocks()``; nothing in it knows of ranks.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Literal

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from motionloom.backbones.weights import Loaded, Weights
from motionloom.parallel.ranks import Ranks
from motionloom.parallel.weights import load_weights


def why_not_compile(device: torch.device) -> str:
    """Empty if ``torch.compile`` can work on ``device``, else the reason: a CPU needs a C++ compiler."""
    if device.type != "cpu":
        return ""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return "no C++ compiler was found (g++ or clang++); blocks run as they are, which is slower"
    return ""


def parallelize(
    modules: Mapping[str, nn.Module],
    ranks: Ranks,
    sharding: Literal["ddp", "fsdp"],
    compile: bool = False,
    weights: Mapping[str, Weights] = MappingProxyType({}),
    besides: Collection[str] = (),
) -> dict[str, Loaded]:
    """Put modules on this rank's device, all ranks with the main rank's values, compiled and sharded in
    place.

    A module that is named in ``weights`` may be on ``meta``: it gets its values from there once it has been
    cut, so that no rank ever holds more than its own part. Those of its tensors that are named in ``besides``
    (adapters) keep the values that they have, which must be the same on every rank.

    ``fsdp`` cuts the parameters of modules with ``blocks()`` over the ranks, block by block (FSDP2). The
    rest, and everything under ``ddp``, stays whole on each rank;
    :class:`~motionloom.parallel.gradients.Gradients` averages their gradients. Optimisers must be made after
    this call: sharding replaces the parameters.

    Returns:
        What this rank read for each module in ``weights``.
    """
    loaded: dict[str, Loaded] = {}
    for name, module in modules.items():
        if name not in weights:
            module.to(ranks.device)
            _share_values(module, ranks)
        blocks = _blocks(module)
        if compile:
            for block in blocks:
                block.compile()
        if sharding == "fsdp" and blocks and ranks.mesh is not None:
            # The root is freed after its forward like every block. FSDP2 would keep it gathered, and a change
            # of weights between two forwards without a backward (EMA weights for a preview) would go unseen.
            # FSDP2 also remarks on outputs that are views, as a linear layer's is; none is changed in place.
            warnings.filterwarnings("ignore", message=".*returned a view tensor.*")
            for part in (*blocks, module):
                fully_shard(part, mesh=ranks.mesh, reshard_after_forward=True)
        if name in weights:
            loaded[name] = load_weights(module, weights[name], ranks, besides=besides)
    return loaded


def is_compiled(module: nn.Module) -> bool:
    """Whether :func:`parallelize` had any block of ``module`` compiled."""
    return any(block._compiled_call_impl is not None for block in module.modules())


def _blocks(module: nn.Module) -> list[nn.Module]:
    blocks = getattr(module, "blocks", None)
    if isinstance(blocks, nn.ModuleList):
        return list(blocks)
    return list(blocks()) if callable(blocks) and not isinstance(blocks, nn.Module) else []


@torch.no_grad()
def _share_values(module: nn.Module, ranks: Ranks) -> None:
    for tensor in (*module.parameters(), *module.buffers()):
        ranks.from_main_(tensor)
