"""Visibility: who may look at whom. Pure predicates over token attributes that compose with ``&`` and ``|``.

Every visibility has one dense reference, :func:`dense_mask`. Faster ways to compute the same attention are
free to exist; they are right when they equal it.

A rule may differ between the blocks of a backbone (:class:`InLayers`), so blocks ask for theirs by
:meth:`Visibility.in_layer`.

Shapes: B batch, Q query tokens, K key tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from motionloom.plans.stream import MODALITIES, Attributes

TEXT, VIDEO = MODALITIES.index("text"), MODALITIES.index("video")
GLOBAL = -1
"""In ``scene_BN`` of text: it speaks for the whole clip. Rules about scenes let all scenes see it, and it
sees all of them: it counts as part of every scene."""
_FLAT = ("modality_BN", "scene_BN", "chunk_BN", "context_BN", "first_BN", "sample_BN")


class Visibility(ABC):
    """A predicate over (query attributes, key attributes)."""

    @abstractmethod
    def allows(self, q: Attributes, k: Attributes) -> Tensor:
        """True where the query may see the key; ``q`` is shaped (B, Q, 1), ``k`` (B, 1, K) -> (B, Q, K)."""

    def labels(self, a: Attributes) -> tuple[Tensor, ...]:
        """All that ``allows`` reads of a token, (B or 1, N) integers or booleans each.

        Tokens with equal labels see, and are seen by, the same tokens: what makes fast ways possible. The
        fewer tokens differ, the faster.
        """
        return (*(getattr(a, name) for name in _FLAT), *a.cell_BN3.unbind(-1))

    def in_layer(self, index: int, count: int) -> Visibility:
        """The rule of block ``index`` of ``count``; the same in all of them unless a rule says otherwise."""
        return self

    @property
    def unrestricted(self) -> bool:
        """True only if ``allows`` is True for every pair: then no mask is built at all."""
        return False

    @property
    def whole_frames(self) -> bool:
        """True if two tokens of one frame of one stream always see each other.

        Factorized backbones then attend within a frame without a mask.
        """
        return True

    @property
    def by_chunk(self) -> bool:
        """True if causal chunks may make a difference to it: then what a token hears of the noise of others
        goes by chunks, too."""
        return not self.unrestricted

    def __and__(self, other: Visibility) -> Visibility:
        return Both(self, other)

    def __or__(self, other: Visibility) -> Visibility:
        return Either(self, other)


class Timeless(Visibility):
    """A rule to which causal chunks make no difference."""

    @property
    def by_chunk(self) -> bool:
        return False


@dataclass(frozen=True)
class Both(Visibility):
    """What ``a`` and ``b`` both allow."""

    a: Visibility
    b: Visibility

    def allows(self, q: Attributes, k: Attributes) -> Tensor:
        return self.a.allows(q, k) & self.b.allows(q, k)

    def labels(self, a: Attributes) -> tuple[Tensor, ...]:
        return (*self.a.labels(a), *self.b.labels(a))

    def in_layer(self, index: int, count: int) -> Visibility:
        return _parts_in_layer(self, index, count)

    @property
    def unrestricted(self) -> bool:
        return self.a.unrestricted and self.b.unrestricted

    @property
    def whole_frames(self) -> bool:
        return self.a.whole_frames and self.b.whole_frames

    @property
    def by_chunk(self) -> bool:
        return self.a.by_chunk or self.b.by_chunk


@dataclass(frozen=True)
class Either(Visibility):
    """What ``a`` or ``b`` allows."""

    a: Visibility
    b: Visibility

    def allows(self, q: Attributes, k: Attributes) -> Tensor:
        return self.a.allows(q, k) | self.b.allows(q, k)

    def labels(self, a: Attributes) -> tuple[Tensor, ...]:
        return (*self.a.labels(a), *self.b.labels(a))

    def in_layer(self, index: int, count: int) -> Visibility:
        return _parts_in_layer(self, index, count)

    @property
    def unrestricted(self) -> bool:
        return self.a.unrestricted or self.b.unrestricted

    @property
    def whole_frames(self) -> bool:
        return self.a.whole_frames or self.b.whole_frames

    @property
    def by_chunk(self) -> bool:
        return self.a.by_chunk or self.b.by_chunk


def _parts_in_layer(rule: Both | Either, index: int, count: int) -> Visibility:
    a, b = rule.a.in_layer(index, count), rule.b.in_layer(index, count)
    return rule if a is rule.a and b is rule.b else replace(rule, a=a, b=b)


@dataclass(frozen=True)
class Full(Visibility):
    """Everyone sees everyone."""

    def allows(self, q: Attributes, k: Attributes) -> Tensor:
        return torch.ones_like(q.scene_BN == k.scene_BN)

    def labels(self, a: Attributes) -> tuple[Tensor, ...]:
        return ()

    @property
    def unrestricted(self) -> bool:
        return True


@dataclass(frozen=True)
class SameScene(Timeless):
    """Tokens of one shot see each other and nothing else; text of :data:`GLOBAL` is of every shot."""

    def allows(self, q: Attributes, k: Attributes) -> Tensor:
        return _same_scene(q, k)

    def labels(self, a: Attributes) -> tuple[Tensor, ...]:
        return (a.scene_BN,)


@dataclass(frozen=True)
class SameSample(Timeless):
    """Tokens of one sample of a packed row see each other and nothing else: see ``packing.py``."""

    def allows(self, q: Attributes, k: Attributes) -> Tensor:
        return q.sample_BN == k.sample_BN

    def labels(self, a: Attributes) -> tuple[Tensor, ...]:
        return (a.sample_BN,)


@dataclass(frozen=True)
class BothVideo(Timeless):
    """Neither of the two is text."""

    def allows(self, q: Attributes, k: Attributes) -> Tensor:
        return (q.modality_BN != TEXT) & (k.modality_BN != TEXT)

    def labels(self, a: Attributes) -> tuple[Tensor, ...]:
        return (a.modality_BN == TEXT,)


@dataclass(frozen=True)
class SceneSummaries(Timeless):
    """Every token sees its own scene, its text included; video also sees the first latent frame of each other
    scene, a summary of it (HoloCine, arXiv 2510.20822). Text of other scenes is hidden, as in mask 1, and
    text of :data:`GLOBAL` is of every scene.

    The work grows with the sum of the squares of the scenes' lengths and not with the square of their sum.
    """

    def allows(self, q: Attributes, k: Attributes) -> Tensor:
        summary = (q.modality_BN != TEXT) & (k.modality_BN != TEXT) & k.first_BN
        return _same_scene(q, k) | summary

    def labels(self, a: Attributes) -> tuple[Tensor, ...]:
        return a.scene_BN, a.modality_BN == TEXT, a.first_BN


@dataclass(frozen=True)
class CausalChunks(Visibility):
    """Block-causal video: a chunk sees itself and earlier chunks (CausVid, arXiv 2412.07772, section 4.1).

    ``window``: how many chunks are visible, the present one included (None: all earlier ones).
    ``sinks``: how many of the first chunks stay visible whatever the window (StreamingLLM,
    arXiv 2309.17453). Text has no place in time: video sees all of it, and text sees only text, so that no
    future frame can reach the past through the text tokens of a joint backbone.
    """

    window: int | None = None
    sinks: int = 0

    def allows(self, q: Attributes, k: Attributes) -> Tensor:
        return _text_rule(q, k, self._in_time(q, k))

    def labels(self, a: Attributes) -> tuple[Tensor, ...]:
        return a.modality_BN == TEXT, a.chunk_BN

    def _in_time(self, q: Attributes, k: Attributes) -> Tensor:
        seen = k.chunk_BN <= q.chunk_BN
        if self.window is not None:
            seen = seen & ((k.chunk_BN > q.chunk_BN - self.window) | (k.chunk_BN < self.sinks))
        return seen


@dataclass(frozen=True)
class TeacherForcing(Visibility):
    """Causal chunks over ``[clean | noisy]``: clean sees clean up to its own chunk, noisy sees its own noisy
    chunk and the clean chunks before it (Self-Forcing, arXiv 2506.08009, teacher forcing baseline).

    Equal to generating from a cache written with clean latents. ``window`` and ``sinks`` as in
    :class:`CausalChunks`.
    """

    window: int | None = None
    sinks: int = 0

    def allows(self, q: Attributes, k: Attributes) -> Tensor:
        own = q.chunk_BN == k.chunk_BN
        near = CausalChunks(self.window, self.sinks)._in_time(q, k)
        clean_rule = k.context_BN & near
        noisy_rule = (k.context_BN & near & ~own) | (~k.context_BN & own)
        return _text_rule(q, k, torch.where(q.context_BN, clean_rule, noisy_rule))

    def labels(self, a: Attributes) -> tuple[Tensor, ...]:
        return a.modality_BN == TEXT, a.chunk_BN, a.context_BN


@dataclass(frozen=True)
class SpatialWindow(Timeless):
    """Tokens in the same ``size`` x ``size`` window of the frame, in any frame; text is unrestricted."""

    size: int
    shift: int = 0

    def allows(self, q: Attributes, k: Attributes) -> Tensor:
        same = self._window(q) == self._window(k)
        return (q.modality_BN == TEXT) | (k.modality_BN == TEXT) | same.all(-1)

    def labels(self, a: Attributes) -> tuple[Tensor, ...]:
        # One label for all text: its cells mean nothing.
        text = a.modality_BN == TEXT
        return text, *torch.where(text[..., None], 0, self._window(a)).unbind(-1)

    def _window(self, a: Attributes) -> Tensor:
        return (a.cell_BN3[..., 1:] + self.shift) // self.size

    @property
    def whole_frames(self) -> bool:
        return False


@dataclass(frozen=True)
class Opening(Timeless):
    """Whatever is not text sees the first latent frame of the clip, not that of references."""

    def allows(self, q: Attributes, k: Attributes) -> Tensor:
        return (q.modality_BN != TEXT) & _opens(k)

    def labels(self, a: Attributes) -> tuple[Tensor, ...]:
        return a.modality_BN == TEXT, _opens(a)

    @property
    def whole_frames(self) -> bool:
        return False


@dataclass(frozen=True)
class ReferenceCaptions(Timeless):
    """The caption of a reference and that reference see each other and themselves; nothing else sees such a
    caption, and it sees nothing else. It says nothing of all the rest: stands behind ``&``.

    References and their captions are the tokens with ``context_BN``; one scene index binds them.
    """

    def allows(self, q: Attributes, k: Attributes) -> Tensor:
        bound = q.context_BN & k.context_BN & (q.scene_BN == k.scene_BN)
        return bound | ~(self._captions(q) | self._captions(k))

    def labels(self, a: Attributes) -> tuple[Tensor, ...]:
        return self._captions(a), *_context_scene(a, a.context_BN)

    @staticmethod
    def _captions(a: Attributes) -> Tensor:
        return a.context_BN & (a.modality_BN == TEXT)


@dataclass(frozen=True)
class SeparateReferences(Timeless):
    """References, told apart by their scene index, do not see each other; the clip sees them and they see it.
    It says nothing of all the rest: stands behind ``&``.

    References are the tokens with ``context_BN`` that are no text and stand before all chunks, at -1: the
    copies of teacher forcing are of the clip's chunks. Sound and picture of one reference have one index.
    """

    def allows(self, q: Attributes, k: Attributes) -> Tensor:
        return ~(self._references(q) & self._references(k)) | (q.scene_BN == k.scene_BN)

    def labels(self, a: Attributes) -> tuple[Tensor, ...]:
        return _context_scene(a, self._references(a))

    @staticmethod
    def _references(a: Attributes) -> Tensor:
        return a.context_BN & (a.modality_BN != TEXT) & (a.chunk_BN < 0)


@dataclass(frozen=True)
class InLayers(Visibility):
    """``inside`` in the blocks from ``first`` to ``last``, both included, and ``outside`` in the others.

    ``first`` and ``last`` are indices of blocks if whole numbers (``int``), else fractions of the depth: a
    network of 30 and one of 6 blocks then differ in the same part. Asked for no block (``allows``), it says
    what some block may see.
    """

    inside: Visibility
    outside: Visibility
    first: float
    last: float

    def in_layer(self, index: int, count: int) -> Visibility:
        first, last = (index if isinstance(end, int) else index / count for end in (self.first, self.last))
        here = self.inside if first >= self.first and last <= self.last else self.outside
        return here.in_layer(index, count)

    def allows(self, q: Attributes, k: Attributes) -> Tensor:
        return self.inside.allows(q, k) | self.outside.allows(q, k)

    def labels(self, a: Attributes) -> tuple[Tensor, ...]:
        return (*self.inside.labels(a), *self.outside.labels(a))

    @property
    def unrestricted(self) -> bool:
        return self.inside.unrestricted or self.outside.unrestricted

    @property
    def whole_frames(self) -> bool:
        return self.inside.whole_frames or self.outside.whole_frames

    @property
    def by_chunk(self) -> bool:
        return self.inside.by_chunk or self.outside.by_chunk


def _same_scene(q: Attributes, k: Attributes) -> Tensor:
    return (q.scene_BN == k.scene_BN) | (q.scene_BN == GLOBAL) | (k.scene_BN == GLOBAL)


def _opens(a: Attributes) -> Tensor:
    return (a.modality_BN != TEXT) & ~a.context_BN & (a.cell_BN3[..., 0] == 0)


def _context_scene(a: Attributes, told_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Labels: ``told_BN``, and the scene of these tokens alone."""
    return told_BN, torch.where(told_BN, a.scene_BN, 0)


def _text_rule(q: Attributes, k: Attributes, in_time: Tensor) -> Tensor:
    """Every token sees text; text sees only text; the rest follows ``in_time``."""
    return (k.modality_BN == TEXT) | ((q.modality_BN != TEXT) & in_time)


full = Full()
same_scene = SameScene()
same_scene_or_both_video = SameScene() | BothVideo()
"""Mask 1 of Mask2DiT (arXiv 2503.19881): text_i with text_i and video_i, all video with all video. Text of
:data:`GLOBAL` with everything."""

scene_summaries = SceneSummaries()
cinetrans = InLayers(SameScene() | Opening(), same_scene_or_both_video, first=7 / 30, last=28 / 30)
"""CineTrans (arXiv 2508.11484): in blocks 7 to 28 of 30 a scene sees itself and the first frame of the clip,
in the others all video sees all video."""
reference_captions = ReferenceCaptions()
separate_references = SeparateReferences()


def causal_chunks(window: int | None = None, sinks: int = 0) -> Visibility:
    """See :class:`CausalChunks`."""
    return CausalChunks(window, sinks)


def spatial_window(size: int, shift: int = 0) -> Visibility:
    """See :class:`SpatialWindow`."""
    return SpatialWindow(size, shift)


def dense_mask(
    visibility: Visibility, q: Attributes, k: Attributes, k_valid_BK: Tensor | None = None
) -> Tensor | None:
    """The reference: a boolean mask (B, Q, K), True where attention is allowed; None if all of it is.

    Padding keys are hidden from everyone. A query that would see nothing at all (a padding query under a
    narrow rule, video without a caption) is shown every valid key, so that softmax stays finite.
    """
    k_valid_BK = some_valid(k_valid_BK)
    if visibility.unrestricted:
        return None if k_valid_BK is None else k_valid_BK[:, None, :]
    mask_BQK = visibility.allows(q.queries(), k.keys())
    if k_valid_BK is not None:
        mask_BQK = mask_BQK & k_valid_BK[:, None, :]
    nothing_BQ1 = ~mask_BQK.any(dim=-1, keepdim=True)
    return mask_BQK | (nothing_BQ1 if k_valid_BK is None else nothing_BQ1 & k_valid_BK[:, None, :])


def some_valid(valid_BK: Tensor | None) -> Tensor | None:
    """Samples without any valid key get all of them: a softmax over nothing is not finite."""
    return None if valid_BK is None else valid_BK | ~valid_BK.any(dim=1, keepdim=True)
