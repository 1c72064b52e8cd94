"""Gradients that agree on every rank: averaging, accumulation, norm, clipping; whole or sharded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from motionloom.parallel.ranks import Ranks


class Gradients:
    """A loss function whose backward leaves rank-averaged gradients on ``parameters``.

    DDP wraps the loss function rather than a network, and holds exactly the parameters that one optimiser
    steps: a trained text encoder called by another name than ``forward``, or a critic beside a generator,
    need nothing special. FSDP2's sharded parameters average themselves and are left out.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        parameters: Iterable[nn.Parameter],
        modules: Iterable[nn.Module],
        ranks: Ranks,
    ) -> None:
        self._run = run
        self._sharded = [m for m in modules if isinstance(m, FSDPModule)]
        whole = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
        self._ddp = _ddp(run, whole) if ranks.world > 1 and whole else None

    def __call__(self, *args: Any) -> Any:
        """The loss function's own result; its gradients are averaged in the backward."""
        return self._run(*args) if self._ddp is None else self._ddp(*args)

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Around the forward and backward of one micro-batch: ranks only talk on the last of a step."""
        for module in self._sharded:
            module.set_requires_gradient_sync(last)
        if self._ddp is None or last:
            yield
        else:
            with self._ddp.no_sync():
                yield


class _Shell(nn.Module):
    def __init__(self, run: Callable[..., Any], parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.held = nn.ParameterList(parameters)
        self._run = run

    def forward(self, *args: Any) -> Any:
        return self._run(*args)


def _ddp(run: Callable[..., Any], parameters: list[nn.Parameter]) -> DistributedDataParallel:
    # A clip of one frame leaves temporal attention unused, and a dropped caption a text table: both are
    # legal, so DDP must look for unused parameters, and need not remark when there were none.
    warnings.filterwarnings("ignore", message=".*find_unused_parameters=True was specified.*")
    return DistributedDataParallel(
        _Shell(run, parameters),
        find_unused_parameters=True,
        gradient_as_bucket_view=True,
    )


def grad_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """L2 norm of all gradients, other ranks' shards included: a device scalar, equal on all ranks."""
    norms = []
    for grads in _by_kind(parameters):
        norm = get_total_norm(grads)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def clip_(parameters: Iterable[nn.Parameter], max_norm: float, norm: Tensor) -> None:
    """Scale gradients in place so that their norm, which is ``norm`` now, is at most ``max_norm``."""
    parameters = list(parameters)
    for kind in (True, False):
        clip_grads_with_norm_([p for p in parameters if isinstance(p, DTensor) is kind], max_norm, norm)


def _by_kind(parameters: Iterable[nn.Parameter]) -> list[list[Tensor]]:
    grads: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
    kinds = [[g for g in grads if isinstance(g, DTensor) is sharded] for sharded in (True, False)]
    return [kind for kind in kinds if kind]
