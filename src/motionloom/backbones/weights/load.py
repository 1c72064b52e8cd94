"""Weights into a module, strictly: everything fits, or nothing is touched and all that does not is listed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from motionloom.backbones.weights.files import Region, Weights
from motionloom.errors import UserError

SHOWN = 3
"""How many names of a kind a message gives; it counts all."""

Part = Callable[[Tensor], tuple[Tensor, Region]]
"""Of a module's tensor: what of it is in this process, and which region of the whole that is."""


@dataclass(frozen=True)
class Loaded:
    """What was read."""

    tensors: int
    bytes: int
    converted: dict[str, int]
    """How many tensors changed their type on the way, by ``float32 -> bfloat16``."""

    def __str__(self) -> str:
        types = "".join(f", {count} from {kind}" for kind, count in self.converted.items())
        return f"{self.tensors} tensors read, {self.bytes / 1e9:.3g} GB{types.replace(' -> ', ' to ')}"


def whole_part(target: Tensor) -> tuple[Tensor, Region]:
    """All of a tensor that is in this process as a whole."""
    return target, tuple(slice(0, size) for size in target.shape)


@torch.no_grad()
def load_into(
    module: nn.Module,
    weights: Weights,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    besides: Collection[str] = (),
    part: Part = whole_part,
    progress: Callable[[int, int], None] | None = None,
) -> Loaded:
    """Fill every parameter and buffer of ``module``; beyond it at most one tensor is in memory.

    Args:
        module: on a device, or on ``meta``. Tensors on ``meta`` come to be on ``device``, as ``dtype`` if
            that is given; others keep place and type. A tensor whose type in the file differs is converted,
            and counted.
        dtype: of floating-point tensors that were on ``meta``; None: as the module was built.
        besides: names of the module's tensors that come from elsewhere, such as adapters; they must not be
            on ``meta`` and stay as they are.
        part: for modules of which this process holds a part (``parallel.load_weights``).
        progress: called with (tensors read, tensors in all).

    Raises:
        UserError: names or shapes differ; all that are missing, unexpected or of another shape are counted,
            and the module is as it was.
    """
    state = {name: t for name, t in module.state_dict(keep_vars=True).items() if name not in besides}
    if problem := mismatch({name: tuple(t.shape) for name, t in state.items()}, weights):
        raise UserError(f"{weights.where} does not fit: {problem}")
    converted: Counter[str] = Counter()
    read = 0
    for done, (name, target) in enumerate(state.items(), 1):
        if target.is_meta:
            target = _materialise(module, name, device, dtype)
        mine, region = part(target)
        value = weights.read(name, region)
        if value.dtype != mine.dtype:
            converted[f"{_short(value.dtype)} -> {_short(mine.dtype)}"] += 1
        mine.copy_(value)
        read += value.numel() * value.element_size()
        if progress is not None:
            progress(done, len(state))
    left = [name for name, t in (*module.named_parameters(), *module.named_buffers()) if t.is_meta]
    assert not left, f"{left[0]} is not in the state dict and cannot be loaded: build it on a device"
    return Loaded(len(state), read, dict(converted))


def mismatch(wanted: Mapping[str, tuple[int, ...]], weights: Weights) -> str:
    """What of ``weights`` is not as a module wants it, in words; empty if all fits.

    Args:
        wanted: shape by name.
    """
    missing = [name for name in wanted if name not in weights]
    unexpected = [name for name in weights if name not in wanted]
    shapes = [
        f"{name} is {list(weights.tensors[name].shape)}, the model's is {list(shape)}"
        for name, shape in wanted.items()
        if name in weights and weights.tensors[name].shape != tuple(shape)
    ]
    parts = [
        *_told(len(missing), "missing", missing),
        *_told(len(unexpected), "unexpected", unexpected),
        *_told(len(shapes), "of another shape", shapes),
    ]
    return "; ".join(parts) + (f" (of {len(wanted)} that the model has)" if parts else "")


def _told(count: int, kind: str, examples: list[str]) -> Iterator[str]:
    if count:
        more = f" and {count - SHOWN} more" if count > SHOWN else ""
        yield f"{count} {kind} ({', '.join(examples[:SHOWN])}{more})"


def _materialise(
    module: nn.Module, name: str, device: torch.device | str, dtype: torch.dtype | None
) -> Tensor:
    """Memory for a tensor that was on meta, put in its place in the module."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    old = getattr(owner, leaf)
    kind = dtype if dtype is not None and old.is_floating_point() else old.dtype
    fresh = torch.empty(old.shape, dtype=kind, device=device)
    if isinstance(old, nn.Parameter):
        setattr(owner, leaf, nn.Parameter(fresh, requires_grad=old.requires_grad))
    else:
        owner._buffers[leaf] = fresh
    return fresh


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
