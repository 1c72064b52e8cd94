"""Who am I among the processes of this run, and the few words that they exchange.

torchrun starts the processes and says so in the environment; without it there is one. This is the only place
that reads those variables.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from motionloom.errors import UserError
from motionloom.nn.memory import keep_freed_memory

T = TypeVar("T")
CPU = torch.device("cpu")
GLOO_FAREWELL = 0.1
"""Seconds."""


@dataclass(frozen=True)
class Ranks:
    """This process's place. With ``world`` 1 every collective below is a no-op."""

    rank: int = 0
    world: int = 1
    device: torch.device = CPU
    mesh: DeviceMesh | None = None
    """The data-parallel axis; None when there is one process."""

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files and talks to the user."""
        return self.rank == 0

    def sum_(self, t: Tensor) -> Tensor:
        """Sum over ranks, in place; stays on the device."""
        if self.world > 1:
            dist.all_reduce(t, dist.ReduceOp.SUM)
        return t

    def max_(self, t: Tensor) -> Tensor:
        """Largest over ranks, in place; stays on the device."""
        if self.world > 1:
            dist.all_reduce(t, dist.ReduceOp.MAX)
        return t

    def from_main_(self, t: Tensor) -> Tensor:
        """The main rank's values, in place."""
        if self.world > 1:
            dist.broadcast(t, src=0)
        return t

    def main_does(self, work: Callable[[], T]) -> T:
        """Run ``work`` in the main process alone; all get its (picklable) result once it is done.

        Raises:
            UserError: what ``work`` raised, in every process, so that none waits for one that has left.
        """
        if self.world == 1:
            return work()
        said: list[object] = [None, None]
        if self.is_main:
            try:
                said[0] = work()
            except UserError as error:
                said[1] = str(error)
        dist.broadcast_object_list(said, src=0)
        if said[1] is not None:
            raise UserError(str(said[1]))
        return said[0]  # type: ignore[return-value]


@contextmanager
def start_ranks(device: str | None = None) -> Iterator[Ranks]:
    """Join the processes that torchrun started (gloo on CPU, NCCL on GPUs), or be the only one; leave at the
    end.

    Args:
        device: ``cpu``, ``cuda``, ``mps``; None takes the accelerator if there is one.

    Raises:
        UserError: the device is not there, or more processes than GPUs were started on this machine.
    """
    rank, world = _from_environment("RANK", 0), _from_environment("WORLD_SIZE", 1)
    chosen = _device(device, _from_environment("LOCAL_RANK", 0))
    if chosen.type == "cpu":
        keep_freed_memory()
    if world == 1:
        yield Ranks(device=chosen)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        mesh = init_device_mesh(chosen.type, (world,), mesh_dim_names=("data",))
        yield Ranks(rank, world, chosen, mesh)
        # A process that leaves while another still listens to it can bring that one down.
        dist.barrier()
    finally:
        dist.destroy_process_group()
        # Gloo's thread frees the tensors of the last exchange a moment after it, for which it needs Python:
        # in an interpreter that is closing by then it aborts the process.
        time.sleep(GLOO_FAREWELL if chosen.type == "cpu" else 0)


def _from_environment(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    if not value:
        return default
    if not value.isdecimal():
        raise UserError(
            f"environment variable {name} is {value!r}, not a number: start with torchrun, or unset it"
        )
    return int(value)


def _device(name: str | None, local_rank: int) -> torch.device:
    if name is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        name = found.type if found else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise UserError(f"device {name!r} is unknown: use cpu, cuda or mps") from None
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise UserError("device cuda was asked for, but torch finds no GPU here: use device cpu")
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"torchrun started more processes than this machine's {torch.cuda.device_count()} GPUs: "
                f"use --nproc-per-node {torch.cuda.device_count()}"
            )
        return torch.device("cuda", local_rank)
    return torch.device(kind)
