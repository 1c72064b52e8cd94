"""Keys and values of finished chunks, so that a stream pays for its past once (CausVid, arXiv 2412.07772).

A pass over chunk c reads the pairs of the chunks that it may see and offers its own; ``commit`` takes the
offer in::

    cache.begin(c)
    for sigma in sigmas:
        backbone(noisy streams, visibility, cache)     # offers, and the next pass's offer replaces it
    backbone(clean streams, visibility, cache)
    cache.commit()

Everything is functional: pairs go in and come out as tensors that nobody writes to again, so autograd and
compiled code meet no write in place, a snapshot is a copy of lists, and eviction drops tensors whole.

Keys are held UNROTATED (normalised, before RoPE) beside each token's facts, so positions can be re-based:
with ``positions="relative"`` the window counts on from the sinks as the ring turns, and the network never
meets a later time than it was trained on. Memory: 2 x layers x width numbers for each token held, and as much
again for what attention reads at the moment (rotated, end to end), unless ``lean``.

Shapes: B batch, N tokens of a chunk, P tokens of the past, H heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""Keys and values of one layer, (B, N, H, D) each: in the order of tokens, so that laying them end to end
copies whole rows."""
Past = Pair | tuple[()]
"""What a block is given: the keys and values before its own, rotated, or nothing yet."""
Fields = Mapping[str, Tensor]
"""Facts of each token by name, (B or 1, N, ...); the first column of ``position`` and ``index`` is time."""
Turn = Callable[[str, Tensor], Tensor]
"""(modality, keys (B, P, H, D)) -> the keys as attention wants them: rotated to where the past stands."""
Positions = Literal["absolute", "relative"]
ALWAYS = -1
"""In place of a chunk: tokens that stand outside of time (text) and that every chunk sees."""
T = TypeVar("T")


@dataclass(frozen=True)
class Tokens:
    """The tokens of one modality in one chunk."""

    fields: Fields
    pairs: tuple[Pair, ...]
    """One per layer."""
    parts: tuple[str, ...] = ()
    """See :meth:`KVCache.hold`."""

    def tensors(self) -> Iterator[Tensor]:
        """Keys and values of all layers."""
        return chain.from_iterable(self.pairs)


@dataclass(frozen=True)
class Snapshot:
    """What :meth:`KVCache.restore` goes back to. Holds references, no copies."""

    held: dict[str, dict[int, Tokens]]
    begins: dict[tuple[str, str], Tensor]
    evicted: range
    chunk: int

    def entries(self) -> Iterator[Tokens]:
        """What it keeps alive; it shares most with its neighbours."""
        return (tokens for chunks in self.held.values() for tokens in chunks.values())


class KVCache:
    """See the top of this file.

    Args:
        layers: blocks of the backbone.
        window: how many chunks are visible, the present one included; None: all. Older ones are evicted.
        sinks: how many of the first chunks stay whatever the window (StreamingLLM, arXiv 2309.17453).
        positions: ``relative`` closes the gap that eviction leaves behind the sinks: see :meth:`shift`.
        lean: make what attention reads when a layer asks for it, and keep none of it: half the memory, and
            the past is rotated anew in every pass.
    """

    def __init__(
        self,
        layers: int,
        *,
        window: int | None = None,
        sinks: int = 0,
        positions: Positions = "absolute",
        lean: bool = False,
    ) -> None:
        assert window is None or window >= 1, "a chunk always sees itself"
        self.layers, self.window, self.sinks = layers, window, sinks
        self.positions, self.lean = positions, lean
        self.chunk = 0
        """The present chunk."""
        self._held: dict[str, dict[int, Tokens]] = {}
        self._begins: dict[tuple[str, str], Tensor] = {}
        """Where the first chunk after the sinks began, (B or 1, 1), by (modality, field)."""
        self._evicted = range(0)
        """From the first chunk that was evicted to the last one."""
        self._offers: dict[str, Tokens] = {}
        self._memory: dict[object, object] = {}

    def begin(self, chunk: int) -> None:
        """Make ``chunk`` the present one: what it cannot see any more is evicted.

        A chunk that was committed before is made anew: it does not see its old self, nor what came after it.
        What it does see must still be held: behind an eviction one goes back by :meth:`restore`.
        """
        assert chunk >= 0
        self.chunk = chunk
        self._offers = {}
        self._forget()
        held = {c for chunks in self._held.values() for c in chunks}
        near = range(chunk if self.window is None else chunk - self.window + 1, chunk)
        gone = [c for c in near if c in self._evicted and c not in held]
        assert not gone, (
            f"chunk {chunk} sees chunk {gone[0]}, which was evicted: restore a snapshot that has it"
        )
        old = {c for c in held if c != ALWAYS and c < chunk and not self._visible(c)}
        if old:
            ends = [*old, *self._evicted[:1], *self._evicted[-1:]]
            self._evicted = range(min(ends), max(ends) + 1)
        for chunks in self._held.values():
            for c in old & chunks.keys():
                del chunks[c]

    def _visible(self, chunk: int) -> bool:
        """Whether the present chunk sees that one: the rule of ``plans.visibility.CausalChunks``."""
        if chunk == ALWAYS:
            return True
        near = self.window is None or chunk > self.chunk - self.window or chunk < self.sinks
        return chunk < self.chunk and near

    def chunks(self, modality: str) -> list[int]:
        """The chunks of the past that are held and seen, in order."""
        return sorted(c for c in self._held.get(modality, {}) if self._visible(c))

    def __contains__(self, modality: str) -> bool:
        """Whether the past has anything of this modality."""
        return bool(self.chunks(modality))

    # --- writing ---

    def offer(self, modality: str, fields: Fields, pairs: Sequence[Pair]) -> None:
        """What a pass over the present chunk computed. Replaced by the next pass; kept by :meth:`commit`."""
        assert len(pairs) == self.layers
        self._offers[modality] = Tokens(dict(fields), tuple(pairs))

    def commit(self, *, detach: bool = True) -> None:
        """Take the offer in as the present chunk, in place of what stood there.

        Args:
            detach: cut the graph, so that a later chunk's loss cannot reach this one, and each chunk's can be
                walked as soon as it is there. Words that have a graph are let go, for the next pass to hold
                anew: they learn from every chunk. Without, gradients flow through the cache as they do
                through one masked forward over all chunks.
        """
        assert self._offers, "nothing to commit: run a backbone with this cache first"
        for modality, tokens in self._offers.items():
            self._held.setdefault(modality, {})[self.chunk] = _kept(tokens, detach)
            if self.chunk == self.sinks:
                self._begins |= {(modality, name): _start(t) for name, t in _timed(tokens.fields).items()}
        if detach:
            learning = [
                m for m, chunks in self._held.items() if ALWAYS in chunks and _has_graph(chunks[ALWAYS])
            ]
            for modality in learning:
                del self._held[modality]
        self._offers = {}
        self._forget()

    def hold(self, modality: str, fields: Fields, pairs: Sequence[Pair], parts: tuple[str, ...] = ()) -> None:
        """Tokens outside of time, at once: text, whose pairs do not depend on chunks or noise.

        Their graph is kept, if there is one, until the next :meth:`commit` that detaches. To learn through
        the words, :meth:`drop` those that a pass without gradients left here.

        Args:
            parts: what lies side by side in each head, by name, where that is more than one thing.
        """
        assert len(pairs) == self.layers
        self._held[modality] = {ALWAYS: _kept(Tokens(dict(fields), tuple(pairs), parts), detach=False)}
        self._forget()

    def parts(self, modality: str) -> tuple[str, ...]:
        """As :meth:`hold` was told; nothing if the modality is not held."""
        held = self._held.get(modality, {}).get(ALWAYS)
        return () if held is None else held.parts

    def drop(self, modality: str) -> None:
        """Forget a modality: ``drop("text")`` before a new prompt.

        Chunks keep what they took from the old words until they are made anew from their clean latents,
        see :meth:`renew`.
        """
        self._held.pop(modality, None)
        self._forget()

    def renew(self) -> list[int]:
        """Forget all but the words, and return the chunks that were held, in order.

        Each is to be made anew from its clean latents (``begin``, forward, ``commit``), the oldest first. It
        then sees what of its past was held, as if nothing else had ever been; positions stay as they were.
        """
        chunks = sorted({c for held in self._held.values() for c in held if c != ALWAYS})
        self._held = {m: held for m, held in self._held.items() if ALWAYS in held}
        self._evicted = range(0)
        self._offers = {}
        self._forget()
        return chunks

    # --- reading ---

    def fields(self, modality: str) -> dict[str, Tensor]:
        """Facts of the past's tokens, end to end, (B or 1, P, ...); empty where there is no past.

        A field that only some chunks have is True in the others (``valid``).
        """
        return self.remember(("fields", modality), lambda: self._join_fields(modality))

    def past(self, modalities: Sequence[str], turn: Turn) -> Sequence[Past]:
        """What the present chunk reads, for each layer.

        The modalities lie one after the other, (B, P of all of them, H, D). The keys went through ``turn``,
        once for each commit: it must depend on nothing but the cache and the modality.
        """
        held = [self._held[m][c] for m in modalities for c in self.chunks(m)]
        if not held:
            return [()] * self.layers
        layers = _Layers(self.layers, lambda layer: self._join_layer(modalities, layer, turn))
        # A graph may be walked once only, so what has one is not kept.
        graph = any(_has_graph(tokens) for tokens in held)
        return layers if self.lean or graph else self.remember(("past", *modalities), lambda: list(layers))

    def shift(self, modality: str, name: str, present: Tensor) -> Tensor | None:
        """How far back the relative policy moves the present, and the past but for the sinks; (B or 1, 1), in
        the unit of the field's first column; None where nothing moves.

        The oldest chunk of the window then stands where the first chunk after the sinks once stood.
        """
        begin = self._begins.get((modality, name))
        if self.positions == "absolute" or begin is None or self.chunk <= self.sinks:
            return None
        beyond = [c for c in self.chunks(modality) if c >= self.sinks]
        oldest = self._held[modality][beyond[0]].fields[name] if beyond else present
        return _start(oldest) - begin

    def sink_tokens(self, modality: str) -> int:
        """How many of the past's tokens never move: the sinks'."""
        held = [self._held[modality][c] for c in self.chunks(modality) if c < self.sinks]
        return sum(next(iter(tokens.fields.values())).shape[1] for tokens in held)

    def remember(self, key: object, make: Callable[[], T]) -> T:
        """``make()``, computed once and kept until the cache changes."""
        if key not in self._memory:
            self._memory[key] = make()
        return self._memory[key]  # type: ignore[return-value]

    # --- going back, and what it costs ---

    def snapshot(self) -> Snapshot:
        """The state now; cheap, since tensors are shared and never written to."""
        held = {m: dict(chunks) for m, chunks in self._held.items()}
        return Snapshot(held, dict(self._begins), self._evicted, self.chunk)

    def restore(self, snapshot: Snapshot) -> None:
        """Back to a snapshot, as often as wanted."""
        self._held = {m: dict(chunks) for m, chunks in snapshot.held.items()}
        self._begins = dict(snapshot.begins)
        self._evicted, self.chunk = snapshot.evicted, snapshot.chunk
        self._offers = {}
        self._forget()

    def memory(self) -> int:
        """Bytes of all that is held, what attention reads at the moment included."""
        return nbytes(self.tensors())

    def tensors(self) -> Iterator[Tensor]:
        """Keys and values that it keeps alive: what :meth:`memory` counts."""
        held = (tokens for chunks in self._held.values() for tokens in chunks.values())
        yield from (t for e in chain(held, self._offers.values()) for t in e.tensors())
        for key, kept in self._memory.items():
            if isinstance(key, tuple) and key[0] == "past":
                yield from (t for pair in kept for t in pair)  # type: ignore[attr-defined]

    def _forget(self) -> None:
        self._memory = {}

    def _join_fields(self, modality: str) -> dict[str, Tensor]:
        held = [self._held[modality][c].fields for c in self.chunks(modality)]
        names = {name: t for fields in held for name, t in fields.items()}

        def column(name: str, like: Tensor) -> list[Tensor]:
            parts = []
            for fields in held:
                tokens = next(iter(fields.values())).shape[1]
                parts.append(fields.get(name, like.new_ones(1, tokens, *like.shape[2:])))
            batch = max(part.shape[0] for part in parts)
            return [part.expand(batch, *part.shape[1:]) for part in parts]

        return {name: torch.cat(column(name, like), dim=1) for name, like in names.items()}

    def _join_layer(self, modalities: Sequence[str], layer: int, turn: Turn) -> Pair:
        keys, values = [], []
        for modality in modalities:
            pairs = [self._held[modality][c].pairs[layer] for c in self.chunks(modality)]
            if pairs:
                keys.append(turn(modality, _end_to_end([k for k, _ in pairs])))
                values += [v for _, v in pairs]
        return _end_to_end(keys), _end_to_end(values)


class _Layers(Sequence[Past]):
    """The past of each layer, made when it is asked for."""

    def __init__(self, layers: int, make: Callable[[int], Pair]) -> None:
        self._layers, self._make = range(layers), make

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, layer: Any) -> Any:
        return self._make(self._layers[layer])


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that tensors keep alive; what they share counts once."""
    storages = (t.untyped_storage() for t in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def extend(past: Past, k: Tensor, v: Tensor) -> Pair:
    """[past, present] keys and values of a layer, (B, P + N, H, D)."""
    if not past:
        return k, v
    return torch.cat([past[0], k], dim=1), torch.cat([past[1], v], dim=1)


def _end_to_end(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _kept(tokens: Tokens, detach: bool) -> Tokens:
    # Contiguous: a view of a joint projection would keep its queries alive as well.
    pairs = (((k.detach(), v.detach()) if detach else (k, v)) for k, v in tokens.pairs)
    return replace(tokens, pairs=tuple((k.contiguous(), v.contiguous()) for k, v in pairs))


def _has_graph(tokens: Tokens) -> bool:
    return any(t.requires_grad for pair in tokens.pairs for t in pair)


def _timed(fields: Fields) -> dict[str, Tensor]:
    """The fields that the relative policy re-bases."""
    return {name: fields[name] for name in ("position", "index") if name in fields}


def _start(field: Tensor) -> Tensor:
    """The earliest time among the tokens, (B or 1, 1)."""
    return field[..., 0].amin(dim=1, keepdim=True)
