"""The guard before every optimiser step: nothing that is not finite on any rank ever reaches the weights.

The verdict stays on the device, where a fused optimiser obeys it; on CUDA the host reads it one step late, so
that neither waits for the other. The wish to stop (a signal, the time limit) takes the same way, so that all
ranks stop at the same step.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from motionloom.errors import UserError
from motionloom.parallel import Ranks

# Ordered: a bad loss on one rank is a bad gradient on all, and the largest of all ranks' verdicts is told.
FINITE, BAD_GRADIENT, BAD_LOSS = 0.0, 1.0, 2.0


class NotFinite(UserError):
    """The loss or the gradient is not finite; the weights are those of the step before."""


class Guard:
    """``late``: read the verdict of the step before (None: where CUDA can copy it meanwhile)."""

    def __init__(self, ranks: Ranks, late: bool | None = None) -> None:
        self._ranks = ranks
        self._lag = int(ranks.device.type == "cuda" if late is None else late)
        self._worst = torch.zeros((), device=ranks.device)
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()
        self._stop = 0

    def step(
        self, optimizer: torch.optim.Optimizer, step: int, loss: Tensor, norm: Tensor, stop: int = 0
    ) -> None:
        """Take the optimiser step if loss and gradient norm are finite on all ranks, else leave the weights
        alone.

        ``stop``: this rank's wish; the largest of all ranks' comes out of :meth:`stopping`.

        Raises:
            NotFinite: at once where the host may look, otherwise from :meth:`stopping` or :meth:`look`.
        """
        bad = torch.where(loss.isfinite(), FINITE, BAD_LOSS).where(
            norm.isfinite() | ~loss.isfinite(), BAD_GRADIENT
        )
        wish = torch.full_like(self._worst, float(stop))
        verdict = self._ranks.max_(torch.stack([bad.to(wish), wish]))
        # Sticky: after one bad step no later one may touch the weights before the host has noticed.
        self._worst = torch.maximum(self._worst, verdict[0])
        self._post(step, torch.stack([self._worst, verdict[1]]))
        if self._lag and getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = (self._worst > 0).float()  # type: ignore[attr-defined]
        else:
            self.look()
        optimizer.step()

    def stopping(self) -> int:
        """The largest wish to stop of any rank, as all ranks know it by now; 0 for none."""
        self._read(self._lag)
        return self._stop

    def look(self) -> None:
        """Wait for the verdict on all steps so far. Before anything is written, shown or measured."""
        self._read(0)

    def _post(self, step: int, flags: Tensor) -> None:
        if flags.device.type != "cuda":
            self._pending.append((step, flags, None))
            return
        host = torch.empty(flags.shape, pin_memory=True)
        host.copy_(flags, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((step, host, event))

    def _read(self, leave: int) -> None:
        while len(self._pending) > leave:
            step, flags, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            worst, stop = flags.tolist()
            self._stop = max(self._stop, int(stop))
            if worst != FINITE:
                what = "loss" if worst == BAD_LOSS else "gradient"
                raise NotFinite(
                    f"the {what} of step {step + 1} is not finite: training stopped before that step, "
                    "and nothing was saved after it"
                )
