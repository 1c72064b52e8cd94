"""Figures of a run: summed on the device, fetched at logging steps, written for people and TensorBoard."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from motionloom.errors import UserError
from motionloom.parallel import Ranks

NUM_BUCKETS = 10
"""Losses are filed under sigma in tenths."""


class Running:
    """Means since the last look. Nothing here makes the device wait until :meth:`take`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._clear()

    def _clear(self) -> None:
        self._sums, self._counts = {}, {}
        self._bucket_sum = torch.zeros(NUM_BUCKETS, device=self._device)
        self._bucket_count = torch.zeros(NUM_BUCKETS, device=self._device)

    def add(self, name: str, value: Tensor) -> None:
        """One more value of a scalar."""
        value = value.detach().float()
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = self._counts.get(name, 0) + 1

    def add_by_sigma(self, loss_B: Tensor, sigma_B: Tensor) -> None:
        """File losses under their noise level; a negative sigma is filed nowhere."""
        loss_B, counted_B = loss_B.detach().float(), (sigma_B >= 0).float()
        bucket_B = (sigma_B * NUM_BUCKETS).long().clamp(0, NUM_BUCKETS - 1)
        self._bucket_sum.index_add_(0, bucket_B, loss_B * counted_B)
        self._bucket_count.index_add_(0, bucket_B, counted_B)

    def take(self, ranks: Ranks) -> dict[str, float]:
        """The means over all ranks, in one exchange and one transfer; then start anew."""
        names = sorted(self._sums)
        parts = [self._sums[n].reshape(1) / self._counts[n] / ranks.world for n in names]
        packed = ranks.sum_(torch.cat([*parts, self._bucket_sum, self._bucket_count]))
        values = packed.tolist()
        self._clear()
        found = dict(zip(names, values, strict=False))
        sums, counts = values[len(names) : -NUM_BUCKETS], values[-NUM_BUCKETS:]
        for i, (total, count) in enumerate(zip(sums, counts, strict=True)):
            if count:
                found[f"loss_by_sigma/{i / NUM_BUCKETS:.1f}"] = total / count
        return found


class Writer:
    """``metrics.jsonl`` and TensorBoard's events, one record per logging step.

    Opening it at ``step`` forgets what a killed session wrote beyond that step, so no step stands twice.
    """

    def __init__(self, run_dir: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._run_dir = run_dir
        with self._disk():
            run_dir.mkdir(parents=True, exist_ok=True)
            _forget_after(run_dir / "metrics.jsonl", step)
            self._lines = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")
            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One record, on the disk when this returns."""
        # JSON has no NaN; a figure that is not finite is written as null.
        line = {"step": step, **{k: v if math.isfinite(v) else None for k, v in values.items()}}
        with self._disk():
            self._lines.write(json.dumps(line) + "\n")
            self._lines.flush()
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()

    def close(self) -> None:
        """Close both files."""
        with self._disk():
            self._lines.close()
            self._board.close()

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._run_dir}: figures cannot be written ({error.strerror or error}): make room or "
                "choose another output_dir, then go on with --resume"
            ) from error


def _forget_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # a line that the kill cut short
        if record["step"] <= step:
            kept.append(line + "\n")
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text("".join(kept), encoding="utf-8")
    os.replace(unfinished, path)


def peak_memory_gib(device: torch.device) -> float:
    """The most memory that this process has held: on the GPU if it trains there, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Linux counts in KiB, macOS in bytes.
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30
    )
