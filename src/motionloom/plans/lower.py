"""From a visibility to what attention computes with.

Shapes: B batch, N query tokens, M key tokens, Q and K classes of queries and keys.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from motionloom.nn.attention import CHOICES, Pattern, prepare_mask
from motionloom.nn.attention.pattern import Plan
from motionloom.nn.attention.regions import Rule
from motionloom.plans.stream import Attributes
from motionloom.plans.visibility import Visibility, dense_mask, some_valid

SMALL_PAIRS = 2**18
"""So few pairs are best masked, and compiled code can look into it."""
MOST_CLASSES = 2048
MOST_KEPT, MOST_MASKS = 64, 4
_kept: OrderedDict[object, Pattern | Tensor | None] = OrderedDict()
T = TypeVar("T")


def per_block(visibility: Visibility, count: int, make: Callable[[Visibility], T]) -> list[T]:
    """``make(rule)`` for each of ``count`` blocks by its own rule; called once for each distinct rule."""
    made: dict[Visibility, T] = {}
    rules = [visibility.in_layer(index, count) for index in range(count)]
    for rule in rules:
        if rule not in made:
            made[rule] = make(rule)
    return [made[rule] for rule in rules]


def lower(
    visibility: Visibility, q: Attributes, k: Attributes, k_valid_BK: Tensor | None = None
) -> Pattern | Tensor | None:
    """How queries with attributes ``q`` see keys with attributes ``k``, for ``nn.attention.attend``.

    Made once per forward and shared by all blocks; None when everything is seen, a prepared mask when there
    is little to see or no structure in it. The last few are remembered by what the attributes say: sampling
    asks the same at every step.
    """
    k_valid_BK = some_valid(k_valid_BK)
    if visibility.unrestricted and k_valid_BK is None:
        return None
    few = q.scene_BN.shape[1] * k.scene_BN.shape[1] <= SMALL_PAIRS
    if few and CHOICES.pinned is None:
        return _mask(visibility, q, k, k_valid_BK)
    q_BNL = _labels(visibility, q)
    k_BML = q_BNL if k is q else _labels(visibility, k)
    valid = None if k_valid_BK is None else k_valid_BK.cpu().numpy()
    key = (visibility, q.scene_BN.device, CHOICES.pinned is None, *map(_content, (q_BNL, k_BML, valid)))
    if key not in _kept:
        _kept[key] = _made(visibility, (q, k), (q_BNL, k_BML), k_valid_BK)
        if len(_kept) > MOST_KEPT:
            _kept.popitem(last=False)
        for older in list(_kept.values())[:-MOST_MASKS]:
            if isinstance(older, Pattern):
                older.plan.forget_mask()
    _kept.move_to_end(key)
    return _kept[key]


Labels = NDArray[np.int64]


def _made(
    visibility: Visibility,
    sides: tuple[Attributes, Attributes],
    labels: tuple[Labels, Labels],
    valid: Tensor | None,
) -> Pattern | Tensor | None:
    classes, firsts = zip(*map(_classes, labels), strict=True)
    if max(map(len, firsts)) > MOST_CLASSES:
        return _mask(visibility, *sides, valid)
    q, k = (_representatives(a, first) for a, first in zip(sides, firsts, strict=True))
    table_QK = visibility.allows(q.queries(), k.keys())[0].cpu().numpy()
    valid_BM = np.ones((1, classes[1].shape[1]), bool) if valid is None else valid.cpu().numpy()
    batch = max(len(classes[0]), len(classes[1]), len(valid_BM))
    q_BN, k_BM, valid_BM = (np.broadcast_to(t, (batch, t.shape[1])) for t in (*classes, valid_BM))
    if batch > 1 and all((t == t[:1]).all() for t in (q_BN, k_BM, valid_BM)):
        batch = 1
    rules = [Rule(q_BN[b], k_BM[b], table_QK, valid_BM[b]) for b in range(batch)]
    plan = Plan(rules, sides[0].scene_BN.device)
    return None if plan.nothing_hidden else Pattern(plan)


def _mask(visibility: Visibility, q: Attributes, k: Attributes, valid: Tensor | None) -> Tensor | None:
    mask_BNM = dense_mask(visibility, q, k, valid)
    return None if mask_BNM is None else prepare_mask(mask_BNM[:, None])


def _labels(visibility: Visibility, a: Attributes) -> Labels:
    """(B, N, L): what the visibility reads of each token."""
    labels = [t.long() for t in visibility.labels(a)]
    batch, tokens = max((t.shape[0] for t in labels), default=1), a.scene_BN.shape[1]
    if not labels:
        return np.zeros((1, tokens, 0), dtype=np.int64)
    stacked: Labels = torch.stack([t.expand(batch, tokens) for t in labels], dim=-1).cpu().numpy()
    return stacked


def _classes(labels_BNL: Labels) -> tuple[Labels, Labels]:
    """The class of each token, (B, N), and where in B x N each class is met first."""
    batch, tokens, kinds = labels_BNL.shape
    flat = np.ascontiguousarray(labels_BNL.reshape(batch * tokens, kinds))
    code = np.zeros(len(flat), dtype=np.int64)
    for column in flat.T:
        # One column after the other: far quicker than np.unique over rows.
        _, value = np.unique(column, return_inverse=True)
        _, code = np.unique(code * (value.max() + 1) + value, return_inverse=True)
    _, first, code = np.unique(code, return_index=True, return_inverse=True)
    return code.reshape(batch, tokens), first


def _representatives(a: Attributes, first: Labels) -> Attributes:
    """One token of each class, (1, classes)."""
    batch = max(t.shape[0] for t in vars(a).values())
    at = torch.from_numpy(first).to(a.scene_BN.device)

    def chosen(t: Tensor) -> Tensor:
        return t.expand(batch, a.scene_BN.shape[1], *t.shape[2:]).flatten(0, 1)[at][None]

    return Attributes(**{name: chosen(t) for name, t in vars(a).items()})


def _content(labels: NDArray[np.generic] | None) -> object:
    return None if labels is None else (labels.shape, labels.tobytes())
