"""A pattern as rectangles: each computed without a mask, in place, and merged by log-sum-exp.

Neither keys nor queries are copied where they lie together. Where they do not, one call's share is gathered,
used, and gathered again in the backward pass instead of being kept.

Shapes: B batch, H heads, N queries, M keys, D channels of a head, G groups of a call of n tokens each. Inside
this file tensors are (B, N, H, D), rows of tokens; kernels take (B, H, N, D).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from motionloom.nn.attention.kernels import Gradients, Kernel, wide
from motionloom.nn.attention.pattern import Plan
from motionloom.nn.attention.regions import Take


@dataclass(frozen=True)
class Tokens:
    """A :class:`Take` on the device."""

    start: int | None
    """Where the tokens begin, if they lie together."""
    index: Tensor | None
    """Else their positions, group by group."""
    groups: int
    length: int
    common: int
    fresh: bool
    """Whether no earlier step has these tokens, so that writing does for adding."""

    def read(self, x_BNHD: Tensor) -> Tensor:
        """(B, N, H, D) -> (B x G, H, n, D); a view where the tokens lie together."""
        if self.index is None:
            assert self.start is not None
            x_BNHD = x_BNHD[:, self.start : self.start + self.groups * self.length]
        else:
            x_BNHD = x_BNHD.index_select(1, self.index)
        if self.groups > 1:
            x_BNHD = x_BNHD.unflatten(1, (self.groups, -1)).flatten(0, 1)
        return x_BNHD.transpose(1, 2)

    def write(self, x_BNHD: Tensor, values: Tensor) -> None:
        """Put (B x G, H, n, D) in its place. Each token may occur once."""
        rows = self._rows(values)
        if self.index is None:
            assert self.start is not None
            x_BNHD[:, self.start : self.start + rows.shape[1]] = rows
        else:
            x_BNHD.index_copy_(1, self.index, rows.to(x_BNHD.dtype))

    def add(self, x_BNHD: Tensor, values: Tensor) -> None:
        """Add (B x G, H, n, D) to what is in its place, or put it there if nothing is."""
        if self.fresh:
            self.write(x_BNHD, values)
        elif self.index is None:
            assert self.start is not None
            rows = self._rows(values)
            x_BNHD[:, self.start : self.start + rows.shape[1]] += rows
        else:
            rows = values.transpose(1, 2).unflatten(0, (-1, self.groups)).to(x_BNHD.dtype)
            places_GN = self.index.view(self.groups, self.length)
            x_BNHD.index_add_(
                1, places_GN[:, self.common :].flatten(), rows[:, :, self.common :].flatten(1, 2)
            )
            if self.common:
                x_BNHD.index_add_(1, places_GN[0, : self.common], rows[:, :, : self.common].sum(1))

    def _rows(self, values: Tensor) -> Tensor:
        rows = values.transpose(1, 2)
        return rows if self.groups == 1 else rows.unflatten(0, (-1, self.groups)).flatten(1, 2)


@dataclass(frozen=True)
class Step:
    """One call of the kernel."""

    samples: slice
    q: Tokens
    k: Tokens
    merges: bool


@dataclass(frozen=True)
class Program:
    """All calls of a pattern, and what their order means for sums."""

    steps: list[Step]
    splits: bool
    """Whether some softmax is split, so that log-sum-exps are needed."""
    shared: tuple[bool, bool]
    """Whether gradients of (queries, keys) are sums over several steps."""
    whole: bool
    """Whether it is one call for everything."""
    gaps: tuple[bool, bool]
    """Whether some (query, key) is in no step, or first in one that adds: its gradient starts at zero."""


def program(plan: Plan, way: str) -> Program:
    """The calls of ``segments`` or ``merge``, made once for a plan."""
    if way not in plan.made:
        plan.made[way] = _program(plan, way)
    made: Program = plan.made[way]
    return made


def _program(plan: Plan, way: str) -> Program:
    calls = plan.calls(way)
    assert calls is not None
    steps, shared, gaps = [], [False, False], [False, False]
    sent: dict[int, Tensor] = {}
    for samples, some in calls:
        seen = [np.zeros(n, dtype=bool) for n in (plan.queries, plan.keys)]
        begun = [np.zeros(n, dtype=bool) for n in (plan.queries, plan.keys)]
        for call in some:
            sides = []
            for side, take in enumerate((call.q, call.k)):
                places = take.index_GN.reshape(-1)
                again = bool(seen[side][places].any())
                fresh = not again and not take.common
                shared[side] |= not fresh
                begun[side][places] |= fresh
                gaps[side] |= not fresh and not begun[side][places].all()
                seen[side][places] = True
                sides.append(_tokens(take, fresh, plan.device, sent))
            steps.append(Step(samples, sides[0], sides[1], call.merges))
        for side in range(2):
            gaps[side] |= not seen[side].all()
    splits = any(step.merges for step in steps)
    whole = len(steps) == 1 and all(
        (side.start, side.groups, side.length) == (0, 1, n)
        for side, n in ((steps[0].q, plan.queries), (steps[0].k, plan.keys))
    )
    return Program(steps, splits, (shared[0], shared[1]), whole, (gaps[0], gaps[1]))


def _tokens(take: Take, fresh: bool, device: torch.device, sent: dict[int, Tensor]) -> Tokens:
    groups, length = take.index_GN.shape
    start, index = take.start, None
    if start is None:
        # Samples of equal rule share their positions.
        if id(take) not in sent:
            sent[id(take)] = torch.from_numpy(np.ascontiguousarray(take.index_GN.reshape(-1))).to(device)
        index = sent[id(take)]
    return Tokens(start, index, groups, length, take.common, fresh)


def forward(plan: Plan, way: str, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, N, D) each -> the answers and the log-sum-exps (B, H, N); the latter hold where some
    softmax is split or the kernel wants them back."""
    todo = program(plan, way)
    q_BNHD, k_BMHD, v_BMHD = (t.transpose(1, 2) for t in (q, k, v))
    out_BNHD = q.new_empty(*q_BNHD.shape[:3], v.shape[-1])
    lse_BNH1 = q.new_empty(*q_BNHD.shape[:3], 1, dtype=wide(q.dtype))
    wanted = todo.splits or kernel.keeps_lse
    if todo.whole and wanted:
        return kernel.forward(q, k, v, True)  # type: ignore[return-value]
    for step in todo.steps:
        at = slice(None) if plan.batch == 1 else step.samples
        part, lse = kernel.forward(
            step.q.read(q_BNHD[at]), step.k.read(k_BMHD[at]), step.k.read(v_BMHD[at]), wanted
        )
        if step.merges:
            assert lse is not None
            _merge(step.q, out_BNHD[at], lse_BNH1[at], part, lse[..., None])
            continue
        step.q.write(out_BNHD[at], part)
        if wanted:
            assert lse is not None
            step.q.write(lse_BNH1[at], lse[..., None])
    return out_BNHD.transpose(1, 2), lse_BNH1[..., 0].transpose(1, 2)


def _merge(at: Tokens, out_BNHD: Tensor, lse_BNH1: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """out <- the softmax over the keys of both, given each one's log-sum-exp."""
    lse = at.read(lse_BNH1)
    weight = torch.sigmoid(part_lse - lse)
    merged = at.read(out_BNHD).lerp_(part, weight.to(part.dtype))
    merged_lse = torch.logaddexp(lse, part_lse, out=lse)
    if merged.untyped_storage().data_ptr() != out_BNHD.untyped_storage().data_ptr():
        # They were gathered. Else what was read was a view, and all is in its place.
        at.write(out_BNHD, merged)
        at.write(lse_BNH1, merged_lse)


def backward(
    plan: Plan,
    way: str,
    kernel: Kernel,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
) -> Gradients:
    """Gradients of q, k and v. Every step works with the merged output and log-sum-exp."""
    todo = program(plan, way)
    inputs = [t.transpose(1, 2) for t in (grad, q, k, v, out)]
    lse_BNH1 = lse.transpose(1, 2)[..., None]
    sums = [
        _sums(t.transpose(1, 2), todo.shared[side], todo.gaps[side]) for t, side in ((q, 0), (k, 1), (v, 1))
    ]
    for step in todo.steps:
        at = slice(None) if plan.batch == 1 else step.samples
        grad_, q_, k_, v_, out_ = (
            side.read(t[at]) for t, side in zip(inputs, (step.q, step.q, step.k, step.k, step.q), strict=True)
        )
        step_lse = step.q.read(lse_BNH1[at])[..., 0] if todo.splits or kernel.keeps_lse else None
        dq, dk, dv = kernel.backward(grad_, q_, k_, v_, out_, step_lse)
        for into, side, values in zip(sums, (step.q, step.k, step.k), (dq, dk, dv), strict=True):
            side.add(into[at], values)
    dq, dk, dv = (t.to(q.dtype).transpose(1, 2) for t in sums)
    return dq, dk, dv


def _sums(like: Tensor, shared: bool, gaps: bool) -> Tensor:
    # Many small terms in half precision would lose what float32 keeps.
    dtype = wide(like.dtype) if shared else like.dtype
    make = torch.zeros if gaps else torch.empty
    return make(like.shape, dtype=dtype, device=like.device)
