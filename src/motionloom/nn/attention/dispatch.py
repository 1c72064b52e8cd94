"""The call that backbones make: eager, or as one operator that compiled code does not look into.

Shapes: B batch, H heads, N queries, M keys, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from motionloom.nn.attention import dense, flex, merge
from motionloom.nn.attention.choice import CHOICES, SMALL_FLOPS, matching
from motionloom.nn.attention.kernels import Kernel, kernels_for, wide
from motionloom.nn.attention.pattern import Pattern, Plan, plan_of
from motionloom.nn.attention.regions import Rule

MOST_STORED = 2**24
"""More scores than these are not stored for the backward pass, but computed twice."""
MOST_MASK = 2**26
"""A dense mask of more pairs is no way at all, where there is another."""


def attend(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern | Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the keys that each query may see.

    Args:
        q, k, v: (..., H, N, D), (..., H, M, D), (..., H, M, D), of one dtype.
        pattern: from ``plans.lower``; then there is one leading dimension. Or a mask, broadcastable to
            (..., H, N, M), boolean or prepared by ``prepare_mask``. None: every query sees every key.

    Returns:
        (..., H, N, D).
    """
    if not isinstance(pattern, Pattern) and not (pattern is None and _worth_a_choice(q, k)):
        return dense.attend(q, k, v, pattern)
    handle = EVERYTHING if pattern is None else pattern.handle
    needs_gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if torch.compiler.is_compiling():
        out: Tensor = torch.ops.motionloom.attend(q, k, v, handle, needs_gradient)[0]
        return out
    plan = pattern.plan if pattern else everything(q.shape[2], k.shape[2])
    q, k, v = _rows(q), _rows(k), _rows(v)
    return run(plan, chosen(plan, q, k, v, needs_gradient), q, k, v)


def _worth_a_choice(q: Tensor, k: Tensor) -> bool:
    """Without a pattern SDPA is the best there is, but for many bfloat16 scores on a CPU."""
    many = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] > MOST_STORED or k.shape[2] > dense.MATMUL_KEYS
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.ndim == 4 and many


EVERYTHING = torch.tensor([-1])
"""The handle of no pattern: every query sees every key."""


@lru_cache(maxsize=256)
def everything(queries: int, keys: int) -> Plan:
    """The plan in which nothing is hidden."""
    one = np.ones((1, 1), dtype=bool)
    rule = Rule(np.zeros(queries, np.int64), np.zeros(keys, np.int64), one, np.ones(keys, dtype=bool))
    return Plan([rule], torch.device("cpu"))


def _plan(handle: Tensor, q: Tensor, k: Tensor) -> Plan:
    number = int(handle.item())
    return everything(q.shape[2], k.shape[2]) if number < 0 else plan_of(number)


def ways(plan: Plan, q: Tensor, needs_gradient: bool) -> list[str]:
    """The ways that apply to such queries, the surest first."""
    names = []
    for way in ("segments", "merge"):
        if plan.calls(way) is not None:
            names += [f"{way}/{kernel.name}" for kernel in kernels_for(q, needs_gradient)]
    # On a CPU rectangles are always quicker than FlexAttention, and nobody waits for a compiler.
    if (q.device.type == "cuda" or not names) and flex.applies(plan, q, needs_gradient):
        names.append("flex")
    if not names or plan.batch * plan.queries * plan.keys <= MOST_MASK:
        names.insert(0, "dense")
    return names


def run(plan: Plan, way: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """:func:`attend` by one way; differentiable."""
    if way == "dense":
        return dense.attend(q, k, v, None if plan.nothing_hidden else plan.mask)
    if way == "flex":
        return flex.attend(plan, q, k, v)
    out: Tensor = _Rectangles.apply(q, k, v, plan, way)
    return out


def problem(plan: Plan, q: Tensor, needs_gradient: bool) -> str:
    """The name under which a choice is remembered."""
    batch, heads, _, channels = q.shape
    kind = (
        f"{q.device.type} {str(q.dtype).removeprefix('torch.')}{' with gradient' if needs_gradient else ''}"
    )
    size = f"B{batch} H{heads} N{plan.queries} M{plan.keys} D{channels}"
    return f"{plan.signature} {size} {kind}"


def flops(plan: Plan, q: Tensor) -> int:
    """Multiplications and additions of the forward pass on the allowed pairs."""
    batch, heads, _, channels = q.shape
    return 4 * plan.pairs * (batch // plan.batch) * heads * channels


def chosen(plan: Plan, q: Tensor, k: Tensor, v: Tensor, needs_gradient: bool) -> str:
    """The way to take: the pinned one, the sure one where little is to be done, else the quickest."""
    key, names = problem(plan, q, needs_gradient), ways(plan, q, needs_gradient)
    known = None if CHOICES.pinned else CHOICES.known(key)
    if known is not None and known in names:
        return known
    wanted = CHOICES.pinned and matching(CHOICES.pinned, names)
    if wanted:
        return wanted
    if len(names) == 1 or flops(plan, q) < SMALL_FLOPS:
        return names[0]
    way = CHOICES.pick(key, names, lambda way: trial(plan, way, q, k, v, needs_gradient), q.device)
    plan.forget_mask()
    return way


def trial(plan: Plan, way: str, q: Tensor, k: Tensor, v: Tensor, needs_gradient: bool) -> None:
    """One run for the clock, with the backward pass if there will be one."""
    with torch.set_grad_enabled(needs_gradient):
        leaves = [t.detach().requires_grad_(needs_gradient) for t in (q, k, v)]
        out = run(plan, way, *leaves)
        if needs_gradient:
            torch.autograd.grad(out, leaves, torch.ones_like(out))


class _Rectangles(torch.autograd.Function):
    """``segments`` and ``merge``: see ``merge.py``."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, way: str) -> Tensor:
        kind, kernel = _kernel(way, q)
        out, lse = merge.forward(plan, kind, kernel, q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.way = plan, way
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        kind, kernel = _kernel(ctx.way, q)
        return *merge.backward(ctx.plan, kind, kernel, _rows(grad), q, k, v, out, lse), None, None


def _kernel(way: str, q: Tensor) -> tuple[str, Kernel]:
    kind, name = way.split("/")
    return kind, next(kernel for kernel in kernels_for(q, True) if kernel.name == name)


def _rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


# --- compiled code ------------------------------------------------------------------------------------------

_KERNELS = ("flash", "products", "products+flash")
_WAYS = ("dense", "flex", *(f"{kind}/{kernel}" for kind in ("segments", "merge") for kernel in _KERNELS))


@torch.library.custom_op("motionloom::attend", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, handle: Tensor, needs_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The answers, the log-sum-exps, and the way taken as a number, for the backward pass."""
    plan = _plan(handle, q, k)
    q, k, v = _rows(q), _rows(k), _rows(v)
    with _graphs():
        way = chosen(plan, q, k, v, needs_gradient)
    out, lse = _empty(q, v)
    if "/" in way:
        kind, kernel = _kernel(way, q)
        out, lse = merge.forward(plan, kind, kernel, q, k, v)
        out, lse = _in_row(out), _in_row(lse)  # a single run of keys is handed back as its kernel lays it out
    else:
        out.copy_(run(plan, way, q, k, v))
    return out, lse, torch.tensor(_WAYS.index(way))


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, handle: Tensor, needs_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    return *_empty(q, v), torch.empty((), dtype=torch.int64)


@torch.library.custom_op("motionloom::attend_backward", mutates_args=())
def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, handle: Tensor, way: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    plan, name = _plan(handle, q, k), _WAYS[int(way)]
    grad, q, k, v = _rows(grad), _rows(q), _rows(k), _rows(v)
    if "/" in name:
        kind, kernel = _kernel(name, q)
        return _in_rows(*merge.backward(plan, kind, kernel, grad, q, k, v, out, lse))
    # Neither SDPA nor FlexAttention lets go of what its backward pass needs: once more, with a graph.
    with _graphs(), torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        return _in_rows(*torch.autograd.grad(run(plan, name, *leaves), leaves, grad))


@_attend_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, handle: Tensor, way: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(t.transpose(1, 2).contiguous()).transpose(1, 2) for t in (q, k, v))  # type: ignore[return-value]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, handle, _ = inputs
    ctx.save_for_backward(q, k, v, *output, handle)


def _back(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, way, handle = ctx.saved_tensors
    return *torch.ops.motionloom.attend_backward(grad, q, k, v, out, lse, handle, way), None, None


_attend.register_autograd(_back, setup_context=_keep)


@contextmanager
def _graphs() -> Iterator[None]:
    """An operator runs below autograd; inside, graphs are recorded all the same."""
    hidden = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
        hidden = hidden.remove(getattr(torch._C.DispatchKey, key))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), hidden):
        yield


def _empty(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Room for answers and log-sum-exps, laid out as ``merge.forward`` lays them out."""
    batch, heads, queries, _ = q.shape
    out = q.new_empty(batch, queries, heads, v.shape[-1]).transpose(1, 2)
    return out, q.new_empty(batch, queries, heads, dtype=wide(q.dtype)).transpose(1, 2)


def _in_rows(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (_in_row(t) for t in tensors)
    return dq, dk, dv


def _in_row(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2)


@register_flop_formula(torch.ops.motionloom.attend, get_raw=True)
def _flops(q: Tensor, k: Tensor, v: Tensor, handle: Tensor, *_: Any, **__: Any) -> int:
    return flops(_plan(handle, q, k), q)


@register_flop_formula(torch.ops.motionloom.attend_backward, get_raw=True)
def _backward_flops(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    handle: Tensor,
    *_: Any,
    **__: Any,
) -> int:
    return flops(_plan(handle, q, k), q) * 5 // 2
