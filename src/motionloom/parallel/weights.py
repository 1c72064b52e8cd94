"""Files of weights straight into modules, sharded ones included: each rank reads what it holds."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from motionloom.backbones.weights import Loaded, Region, Weights, load_into
from motionloom.parallel.ranks import Ranks


def load_weights(
    module: nn.Module,
    weights: Weights,
    ranks: Ranks,
    *,
    besides: Collection[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Loaded:
    """Fill ``module`` on this rank's device; on ``meta``, whole, or cut by FSDP2, on ``meta`` or not.

    No rank ever holds more than its part of the module and one tensor, and none talks to another.

    Args:
        besides: names of tensors that come from elsewhere and have their values, such as adapters.

    Raises:
        UserError: as ``load_into``; on every rank alike, since all read the same headers.
    """
    device = ranks.device
    module._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    return load_into(module, weights, device=device, besides=besides, part=local_part, progress=progress)


def local_part(target: Tensor) -> tuple[Tensor, Region]:
    """What of a tensor is on this rank, sharing its memory, and which region of the whole that is."""
    bounds = [(0, size) for size in target.shape]
    if not isinstance(target, DTensor):
        return target, tuple(slice(*bound) for bound in bounds)
    coordinate = target.device_mesh.get_coordinate()
    assert coordinate is not None, "this rank takes no part in the tensor's mesh"
    for at, placement in enumerate(target.placements):
        if isinstance(placement, Shard) and type(placement) is Shard:
            start, stop = bounds[placement.dim]
            # As torch.chunk cuts: equal parts, rounded up, the last ones smaller or empty.
            step = -(-(stop - start) // target.device_mesh.size(at))
            begin = min(start + coordinate[at] * step, stop)
            bounds[placement.dim] = begin, min(begin + step, stop)
        else:
            assert isinstance(placement, Replicate), f"no region is known for {placement}"
    mine = target.to_local()
    assert list(mine.shape) == [stop - start for start, stop in bounds], "cut otherwise than torch.chunk"
    return mine, tuple(slice(*bound) for bound in bounds)
