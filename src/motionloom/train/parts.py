"""Chosen parts of networks: the parameters that patterns name are trained, whole; the rest stays frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from motionloom.errors import UserError
from motionloom.train.patterns import Target, choose


def choose_parts(
    modules: Mapping[str, nn.Module], patterns: Sequence[str], key: str
) -> dict[str, tuple[str, ...]]:
    """Which parameters each pattern takes, as ``backbone.path.of.parameter``, by pattern.

    Raises:
        UserError: as :func:`~motionloom.train.patterns.choose`.
    """
    names = list(_parameters(modules))
    near = dict.fromkeys(owner for name in names for owner in (_owner(name), name.partition(".")[0]))
    return choose(names, patterns, key, "parameter", tuple(near))


def train_parts(modules: Mapping[str, nn.Module], chosen: Mapping[str, Sequence[str]]) -> list[Target]:
    """Let what :func:`choose_parts` found be trained; the rest is left as it is. A row for each pattern."""
    parameters = _parameters(modules)
    rows = []
    for pattern, names in chosen.items():
        keep = not pattern.startswith("!")
        for name in names if keep else ():
            parameters[name].requires_grad_(True)
        count = sum(parameters[name].numel() for name in names) if keep else 0
        rows.append(Target(pattern, tuple(dict.fromkeys(map(_owner, names))), count))
    return rows


def train_only(modules: Mapping[str, nn.Module], patterns: Sequence[str]) -> list[Target]:
    """``train.parts``: freeze all but what the patterns take. Checkpoints still hold every weight.

    Returns:
        A row for each pattern, in order.

    Raises:
        UserError: as :func:`choose_parts`.
    """
    chosen = choose_parts(modules, patterns, "train.parts")
    for module in modules.values():
        module.requires_grad_(False)
        module.saved_whole = True  # type: ignore[assignment]
    return train_parts(modules, chosen)


def beside_adapters(
    modules: Mapping[str, nn.Module], patterns: Sequence[str], adapted: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """``lora.parts``: as :func:`choose_parts`, before there are adapters.

    Args:
        adapted: the layers of the backbone that are to get them.

    Raises:
        UserError: as there; or a part is the weight of such a layer, which stays frozen under its adapter.
    """
    if not patterns:
        return {}
    chosen = choose_parts(modules, patterns, "lora.parts")
    frozen = {f"backbone.{name}.weight": name for name in adapted}
    for pattern, names in chosen.items():
        if both := next((frozen[n] for n in names if n in frozen and pattern[0] != "!"), None):
            raise UserError(
                f"lora.parts: {pattern} takes {both}, which lora.targets adapts: put !{both} first in one of "
                "the two"
            )
    return chosen


def plain_name(name: str) -> str:
    """What a parameter is called without adapters."""
    return name.replace(".base_layer.", ".")


@torch.no_grad()
def put_parts(modules: Mapping[str, nn.Module], files: Sequence[tuple[Mapping[str, Tensor], float]]) -> None:
    """Trained parts into weights for good, each going ``strength`` of the way from the base to the part; 0
    leaves the weights as they are, to the bit.

    Args:
        files: whole tensors by plain name, which the modules have, in their shapes; and strengths.
    """
    parameters = _parameters(modules)
    for name in dict.fromkeys(name for parts, strength in files if strength for name in parts):
        weight = parameters[name]
        base, given = weight.float(), [(parts[name], s) for parts, s in files if s and name in parts]
        moved = [torch.lerp(base, part.to(base), strength) for part, strength in given]
        weight.copy_(moved[0] if len(moved) == 1 else base + sum((m - base for m in moved), 0.0))


def check_parts(parts: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raises UserError for a part that ``shapes``, by plain name, lacks or has otherwise."""
    for name, part in parts.items():
        if name not in shapes:
            raise UserError(
                f"{where} holds {name} as it was trained, which this model does not have: it is of another "
                "model"
            )
        if tuple(part.shape) != tuple(shapes[name]):
            raise UserError(
                f"{where}: its {name} has shape {list(part.shape)}, this model's {list(shapes[name])}: it is "
                "of another size"
            )


def part_shapes(modules: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """Shapes of all that may be trained whole, by plain name."""
    return {name: tuple(p.shape) for name, p in _parameters(modules).items()}


def _parameters(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """By plain name, without those of adapters."""
    return {
        f"{top}.{plain_name(name)}": p
        for top, module in modules.items()
        for name, p in module.named_parameters()
        if ".lora_" not in name
    }


def _owner(name: str) -> str:
    return name.rpartition(".")[0]
