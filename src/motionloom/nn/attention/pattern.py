"""A pattern: who sees whom, in every form that one of the ways computes with, each made when asked for.

Shapes: B batch, H heads, N queries, M keys, Q and K classes of queries and keys.
"""

from __future__ import annotations

import hashlib
import itertools
import weakref
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from motionloom.nn.attention.dense import prepare_mask
from motionloom.nn.attention.regions import Call, Rule, merge, reduce_rule, segments


class Cover:
    """A rule and the rectangles that cover it."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    @cached_property
    def segments(self) -> list[Call] | None:
        """See ``regions.py``."""
        return segments(self.rule)

    @cached_property
    def merge(self) -> list[Call] | None:
        """See ``regions.py``. A rule that needs no splitting is left whole."""
        calls = merge(self.rule)
        return self.segments if calls is None else calls


class Part(NamedTuple):
    """Neighbouring samples of a batch that have the same rule."""

    samples: slice
    cover: Cover


class Plan:
    """Forms of a pattern. Apart from :class:`Pattern` so that it may outlive it in a backward pass."""

    def __init__(self, rules: list[Rule], device: torch.device) -> None:
        self.batch = len(rules)
        """1 where all samples have one rule."""
        self.queries, self.keys = len(rules[0].q_class_N), len(rules[0].k_class_M)
        self.device = device
        marks = [_mark(rule) for rule in rules]
        covers = {
            mark: Cover(reduce_rule(rule)) for mark, rule in dict(zip(marks, rules, strict=True)).items()
        }
        self.parts: list[Part] = []
        for mark, same in itertools.groupby(range(self.batch), marks.__getitem__):
            samples = list(same)
            self.parts.append(Part(slice(samples[0], samples[-1] + 1), covers[mark]))
        self.made: dict[object, Any] = {}
        """What the ways keep here: every layer and every step asks again."""

    @property
    def pairs(self) -> int:
        """Allowed pairs of the whole batch, per head (of one sample, where ``batch`` is 1)."""
        return sum((p.samples.stop - p.samples.start) * p.cover.rule.pairs for p in self.parts)

    @property
    def density(self) -> float:
        """Allowed pairs among all pairs."""
        return self.pairs / (self.batch * self.queries * self.keys)

    @property
    def nothing_hidden(self) -> bool:
        """Whether every query sees every key."""
        return self.pairs == self.batch * self.queries * self.keys

    @property
    def signature(self) -> str:
        """Names the kind of structure, over processes too; patterns that differ a little, by the length of a
        caption for instance, have one name."""
        rows, columns = (max(cover.rule.table_QK.shape[i] for _, cover in self.parts) for i in range(2))
        return f"{rows}x{columns} classes, {round(32 * self.density)}/32 seen, {len(self.parts)} rules"

    def forget_mask(self) -> None:
        """Give the memory of the dense mask back; it is made again if it is asked for."""
        self.__dict__.pop("mask", None)

    def calls(self, way: str) -> list[tuple[slice, list[Call]]] | None:
        """``segments`` or ``merge`` for every sample, None where that does not apply."""
        if ("calls", way) not in self.made:
            self.made["calls", way] = self._calls(way)
        made: list[tuple[slice, list[Call]]] | None = self.made["calls", way]
        return made

    def _calls(self, way: str) -> list[tuple[slice, list[Call]]] | None:
        found = []
        for samples, cover in self.parts:
            calls: list[Call] | None = getattr(cover, way)
            if calls is None:
                return None
            found.append((samples, calls))
        merges = any(call.merges for _, calls in found for call in calls)
        return found if merges == (way == "merge") else None

    @cached_property
    def classes(self) -> tuple[Tensor, Tensor, Tensor]:
        """For block masks: class of each query (B, N), of each key (B, M) and the tables (B, Q, K) on the
        device. Invalid keys have a class of their own, which nobody sees."""
        rules = self._rules()
        most_q = max(len(rule.table_QK) for rule in rules)
        most_k = max(rule.table_QK.shape[1] for rule in rules) + 1
        tables = np.zeros((len(rules), most_q, most_k), dtype=bool)
        for table, rule in zip(tables, rules, strict=True):
            table[: rule.table_QK.shape[0], : rule.table_QK.shape[1]] = rule.table_QK
        q_BN = np.stack([rule.q_class_N for rule in rules])
        k_BM = np.stack([np.where(rule.k_valid_M, rule.k_class_M, most_k - 1) for rule in rules])
        q, k, table_BQK = (torch.from_numpy(t).to(self.device) for t in (q_BN, k_BM, tables))
        return q, k, table_BQK

    @cached_property
    def mask(self) -> Tensor:
        """(B, 1, N, M), prepared for ``dense.py``."""
        q_BN, k_BM, table_BQK = self.classes
        sample_B11 = torch.arange(len(q_BN), device=q_BN.device)[:, None, None]
        prepared = prepare_mask(table_BQK[sample_B11, q_BN[:, :, None], k_BM[:, None, :]][:, None])
        assert prepared is not None
        return prepared

    def _rules(self) -> list[Rule]:
        return [cover.rule for samples, cover in self.parts for _ in range(samples.start, samples.stop)]


_plans: dict[int, Plan] = {}
_numbers = itertools.count()


class Pattern:
    """What ``plans.lower`` gives and :func:`~motionloom.nn.attention.attend` takes.

    ``handle`` stands for it in compiled code: one number, always of the same shape and type, so that another
    pattern is no reason to compile again. The number's memory is a NumPy array that every alias of the tensor
    keeps alive, graphs of a backward pass included; when it goes, so does the plan.
    """

    def __init__(self, plan: Plan) -> None:
        number = np.array([next(_numbers)])
        _plans[int(number[0])] = plan
        weakref.finalize(number, _plans.pop, int(number[0]), None)
        self.plan = plan
        self.handle = torch.from_numpy(number)


def plan_of(number: int) -> Plan:
    """The plan whose handle holds this number."""
    return _plans[number]


def _mark(rule: Rule) -> bytes:
    arrays = (rule.q_class_N, rule.k_class_M, rule.table_QK, rule.k_valid_M)
    return hashlib.blake2b(b"".join(str(t.shape).encode() + t.tobytes() for t in arrays)).digest()
