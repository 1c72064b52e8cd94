"""State in and out of modules and optimisers as whole tensors, so that a file knows nothing of ranks.

Tensors are gathered one at a time: no rank ever holds a second copy of the model on its device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from motionloom.errors import UserError
from motionloom.parallel.ranks import Ranks


def local(t: Tensor) -> Tensor:
    """The part of ``t`` on this rank, sharing its memory; a whole tensor itself."""
    return t.to_local() if isinstance(t, DTensor) else t


def whole(named: Iterable[tuple[str, Tensor]], ranks: Ranks) -> dict[str, Tensor]:
    """Gathered copies on the CPU, in the main process; empty elsewhere. Every rank must call it alike."""
    kept: dict[str, Tensor] = {}
    for name, tensor in named:
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if ranks.is_main:
            kept[name] = full.detach().cpu().clone().contiguous()
    return kept


def named_state(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Parameters and buffers as they stand (sharded or not), as ``module.path.of.tensor``.

    A frozen parameter is no state of a run: it never changes, and is read again where it came from. Modules
    that say ``saved_whole`` (chosen parts of them are trained) have all of theirs.
    """
    cut = [module for module in modules.values() if not getattr(module, "saved_whole", False)]
    frozen = {id(p) for module in cut for p in module.parameters() if not p.requires_grad}
    return {
        f"{top}.{name}": t.detach()
        for top, module in modules.items()
        for name, t in module.state_dict(keep_vars=True).items()
        if id(t) not in frozen
    }


@torch.no_grad()
def fill(targets: Mapping[str, Tensor], source: Mapping[str, Tensor], what: str) -> None:
    """Copy whole tensors into parameters, buffers or shadows; each rank takes its own part.

    Raises:
        UserError: ``source`` lacks a tensor, holds one too many, or one of another shape; ``what`` names it.
    """
    if missing := sorted(targets.keys() - source.keys()):
        raise UserError(
            f"{what} lacks {_some(missing)}: it is of another model; use the recipe it was trained with"
        )
    if extra := sorted(source.keys() - targets.keys()):
        raise UserError(
            f"{what} also holds {_some(extra)}: it is of another model; use the recipe it was trained with"
        )
    for name, target in targets.items():
        value = source[name]
        if value.shape != target.shape:
            raise UserError(
                f"{what}: {name} has shape {tuple(value.shape)}, the recipe's model wants "
                f"{tuple(target.shape)}: use the recipe it was trained with"
            )
        local(target).copy_(local(_like(value, target)))


def named_optimizer_state(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]
) -> dict[str, Tensor]:
    """``parameter/key`` -> tensor, for every parameter that was stepped."""
    found = {}
    for parameter in _parameters(optimizer):
        for key, value in optimizer.state[parameter].items() if parameter in optimizer.state else ():
            assert isinstance(value, Tensor), f"optimiser state {key} is no tensor and would be lost"
            found[f"{names[parameter]}/{key}"] = value
    return found


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    names: Mapping[nn.Parameter, str],
    source: Mapping[str, Tensor],
    what: str,
) -> None:
    """Undo :func:`named_optimizer_state`: each rank takes its own part of whole tensors.

    Raises:
        UserError: ``source`` speaks of a parameter that this optimiser does not step.
    """
    index = {names[p]: (i, p) for i, p in enumerate(_parameters(optimizer))}
    state: dict[int, dict[str, Tensor]] = {}
    for full_name in source:
        name, key = full_name.rsplit("/", 1)
        if name not in index:
            raise UserError(
                f"{what} holds state of {name}, which this recipe does not train: resume with its own recipe"
            )
        i, parameter = index[name]
        value = source[full_name]
        state.setdefault(i, {})[key] = _like(value, parameter) if value.shape == parameter.shape else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _like(value: Tensor, target: Tensor) -> Tensor:
    """Whole ``value`` on the device of ``target``, cut as it is cut. No communication."""
    value = value.to(target.device)
    if not isinstance(target, DTensor):
        return value
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
