"""The held-out loss: the same samples, noise and noise levels every time, so that only weights move it."""

from __future__ import annotations

import torch

from motionloom.parallel import Ranks
from motionloom.train.method import HeldOut, Method, StepContext

MOST_BATCHES = 64
"""Per rank. A larger held-out set is measured on so many, spread evenly over it."""


@torch.no_grad()
def heldout_loss(
    method: Method, heldout: HeldOut, ranks: Ranks, seed: int, autocast: torch.autocast
) -> float:
    """Mean loss per sample over the held-out clips of all ranks.

    Draws are keyed by (seed, batch, rank) and by nothing that training moves.
    """
    turn = method.turns(0)[0]
    total = torch.zeros(2, device=ranks.device)
    count = min(len(heldout), MOST_BATCHES)
    for n in range(count):
        index = n * len(heldout) // count
        batch = heldout.batch(index).to(ranks.device)
        context = StepContext(seed, 0, index, ranks.rank, ranks.device, turn, "heldout")
        with autocast:
            loss_B = method.losses(batch, context).loss_B
        total += torch.stack([loss_B.float().sum(), torch.full_like(total[0], len(batch.ids))])
    loss, samples = ranks.sum_(total).tolist()
    return float(loss / samples)
