"""Who sees whom as a few calls of unmasked attention: planning, on the host, once for a pattern.

Tokens fall into classes; a boolean table says which class of queries sees which class of keys. Two ways to
turn that into rectangles without holes:

- segments: queries that see the same keys form a group, and a group attends to just these keys. A softmax is
  never split, but keys that many groups see are read many times, and copied where they do not lie together.
- merge: the table as a disjoint union of the largest rectangles; the parts of a softmax that was split are
  merged by their log-sum-exp. Keys are read where they lie.

Groups of equal shape are batched into one call: attention in windows is then a reordering and no mask.

Shapes: N queries, M keys, G groups in a call.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

MOST_CALLS = 128
MOST_GROUPS = 2048
MOST_CLASSES = 96
"""Beyond so many kinds of rows the search for rectangles is not worth its time."""
MOST_APART = 32
LONG_RUN = 128
"""Runs of so many queries are worth a call of their own, so that they need not be gathered."""


@dataclass(frozen=True, eq=False)
class Take:
    """Which tokens take part: G groups of equal length."""

    index_GN: Ints
    """Positions, group by group."""
    common: int = 0
    """So many leading positions are the same in every group; all others are in one group only."""

    @property
    def start(self) -> int | None:
        """Where the tokens begin if they lie together, group after group; else None."""
        flat = self.index_GN.reshape(-1)
        together = len(flat) > 0 and bool((np.diff(flat) == 1).all())
        return int(flat[0]) if together else None


@dataclass(frozen=True, eq=False)
class Call:
    """One call of unmasked attention."""

    q: Take
    k: Take
    merges: bool = False
    """Whether these queries have been answered in part by an earlier call."""

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it computes."""
        groups, n = self.q.index_GN.shape
        return groups * n * self.k.index_GN.shape[1]


@dataclass(frozen=True, eq=False)
class Rule:
    """Who sees whom: classes of queries and keys, and the table between them. No row is empty."""

    q_class_N: Ints
    k_class_M: Ints
    table_QK: Bools
    k_valid_M: Bools

    def queries(self, rows: Bools) -> Ints:
        """Positions of the queries whose class is marked."""
        return np.flatnonzero(rows[self.q_class_N])

    def keys(self, columns: Bools) -> Ints:
        """Positions of the valid keys whose class is marked."""
        return np.flatnonzero(columns[self.k_class_M] & self.k_valid_M)

    @property
    def pairs(self) -> int:
        """Pairs that are allowed."""
        q_count, k_count = self.counts()
        return int(q_count @ self.table_QK.astype(np.int64) @ k_count)

    def counts(self) -> tuple[Ints, Ints]:
        """Queries and valid keys of each class."""
        rows, columns = self.table_QK.shape
        q_count = np.bincount(self.q_class_N, minlength=rows)
        return q_count, np.bincount(self.k_class_M[self.k_valid_M], minlength=columns)


def reduce_rule(rule: Rule) -> Rule:
    """The same rule with as few classes as possible; rows that were empty see every valid key."""
    q_count, k_count = rule.counts()
    table_QK = rule.table_QK & (k_count > 0)
    table_QK = np.where(table_QK.any(1, keepdims=True), table_QK, k_count > 0)
    table_QK[q_count == 0] = False
    rows_QK, q_new = np.unique(table_QK, axis=0, return_inverse=True)
    columns_QK, k_new = np.unique(rows_QK, axis=1, return_inverse=True)
    return Rule(
        q_new.reshape(-1)[rule.q_class_N], k_new.reshape(-1)[rule.k_class_M], columns_QK, rule.k_valid_M
    )


def segments(rule: Rule) -> list[Call] | None:
    """A reduced rule as one call for each group of queries with equal keys. None if that is too many."""
    rows = len(rule.table_QK)
    if rows > MOST_GROUPS:
        return None
    found = []
    for row in np.unique(rule.q_class_N):
        queries = rule.queries(np.arange(rows) == row)
        found.append((queries, rule.keys(rule.table_QK[row])))
    calls = _batched(found, len(rule.q_class_N))
    return calls if len(calls) <= MOST_CALLS else None


def merge(rule: Rule) -> list[Call] | None:
    """A reduced rule as disjoint rectangles, largest first. None if there are too many of them, or if no
    softmax is split, so that it would be :func:`segments` again."""
    if max(rule.table_QK.shape) > MOST_CLASSES:
        return None
    found: list[tuple[Ints, Ints]] = []
    for rows, columns in _rectangles(rule):
        found += _cut(rule, rows, columns, found)
        if len(found) > 16 * MOST_CALLS:
            return None
    calls = _batched(found, len(rule.q_class_N))
    if len(calls) > MOST_CALLS:
        return None
    return calls if any(call.merges for call in calls) else None


def _rectangles(rule: Rule) -> Iterable[tuple[Bools, Bools]]:
    """Greedily: rows and columns of the largest rectangle of what is left, again and again."""
    left = rule.table_QK.copy()
    q_count, k_count = rule.counts()
    while left.any():
        rows = np.unique(left[left.any(1)], axis=0)
        pairs = (rows[:, None] & rows[None]).reshape(-1, left.shape[1])
        sets = np.unique(pairs[pairs.any(1)], axis=0)
        # A row may use a set if it sees all of it.
        fits = (~left).astype(np.float32) @ sets.T.astype(np.float32) == 0
        area = (q_count @ fits) * (sets @ k_count)
        # Among equals the fewest keys: queries are cheaper to split than keys.
        best = max(range(len(sets)), key=lambda s: (area[s], -(sets[s] @ k_count)))
        yield fits[:, best], sets[best]
        left[np.ix_(fits[:, best], sets[best])] = False


def _cut(
    rule: Rule, rows: Bools, columns: Bools, found: list[tuple[Ints, Ints]]
) -> Iterable[tuple[Ints, Ints]]:
    """One rectangle as calls whose queries lie together, and whose keys do where merging costs less than
    copying them. Queries that were answered in part before are kept apart from the others."""
    queries, keys = rule.queries(rows), rule.keys(columns)
    if not len(queries) or not len(keys):
        return
    touched = np.zeros(len(rule.q_class_N), dtype=bool)
    for earlier, _ in found:
        touched[earlier] = True
    for part in (queries[~touched[queries]], queries[touched[queries]]):
        for n in _runs(part, LONG_RUN):
            key_runs = _runs(keys, 1)
            # A merge reads and writes outputs about three times, a copy the keys and values once each.
            apart = len(key_runs) <= 4 and 3 * len(n) * (len(key_runs) - 1) < 2 * len(keys)
            for m in key_runs if apart else [keys]:
                yield n, m


def _runs(index: Ints, shortest: int) -> list[Ints]:
    """``index`` cut into runs of neighbours, or left whole if one of them would be shorter than wished."""
    if not len(index):
        return []
    runs = np.split(index, np.flatnonzero(np.diff(index) != 1) + 1)
    return runs if min(map(len, runs)) >= shortest else [index]


def _batched(found: list[tuple[Ints, Ints]], queries: int) -> list[Call]:
    """Groups of equal shape in one call, unless they are few and each is long enough to fill a machine alone
    and can be read where it lies. What answers a query first comes before what merges into it."""
    kinds: dict[tuple[int, int, int], list[tuple[Ints, Ints]]] = {}
    answers = np.zeros(queries, dtype=np.int64)
    for q, k in found:
        turn = int(answers[q].max())
        answers[q] = turn + 1
        kinds.setdefault((turn, len(q), len(k)), []).append((q, k))
    calls = []
    for turn, length, keys in sorted(kinds, key=lambda kind: kind[0]):
        groups = sorted(kinds[turn, length, keys], key=lambda group: int(group[0][0]))
        lie_together = all(Take(q[None]).start is not None for q, _ in groups)
        apart = lie_together and length >= LONG_RUN and len(groups) <= MOST_APART
        batch = None if apart or len(groups) == 1 else _batch(groups)
        some = [Call(Take(q[None]), Take(k[None])) for q, k in groups] if batch is None else [batch]
        calls += [replace(call, merges=turn > 0) for call in some]
    return calls


def _batch(groups: list[tuple[Ints, Ints]]) -> Call | None:
    """One call for all groups; None if their keys overlap in another way than a part that all have."""
    common = groups[0][1]
    for _, keys in groups[1:]:
        common = np.intersect1d(common, keys, assume_unique=True)
    own = [np.setdiff1d(keys, common, assume_unique=True) for _, keys in groups]
    together = np.concatenate(own)
    if len(np.unique(together)) < len(together):
        return None
    k_GM = np.stack([np.concatenate([common, keys]) for keys in own])
    return Call(Take(np.stack([queries for queries, _ in groups])), Take(k_GM, len(common)))
