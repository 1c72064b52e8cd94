"""The backbone protocol: token streams in, one answer per token out.

Shapes: B batch, N tokens of a stream, C channels of a token.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from motionloom.flow import Perturbation as Perturbation
from motionloom.nn.cache import KVCache
from motionloom.plans.stream import Streams
from motionloom.plans.visibility import Visibility


class Backbone(Protocol):
    """A network over streams. Single-device maths: no autocast, no environment, no mesh."""

    patch: tuple[int, int, int]
    """Latent cells (frames, rows, columns) that make one token."""

    modalities: tuple[str, ...]
    """Streams that it can denoise: ``video``, or ``video`` and ``audio``."""

    def __call__(
        self, streams: Streams, visibility: Visibility, *, perturb: Perturbation | None = None
    ) -> dict[str, Tensor]:
        """The prediction for every stream that is denoised, (B, N, C) by modality (text has none).

        Blocks ask ``visibility.in_layer`` for their own rule.
        """
        ...

    def blocks(self) -> list[nn.Module]:
        """The repeated blocks in order: what a parallel plan shards, compiles and checkpoints."""
        ...


@runtime_checkable
class Growing(Protocol):
    """A module that can start from the weights of a smaller one, and answers as that one until it learns."""

    def grown(self) -> frozenset[str]:
        """Names of the tensors that such weights lack. They keep the values of ``init_weights``."""
        ...

    def init_weights(self, generator: torch.Generator) -> None:
        """Every weight anew."""
        ...


@runtime_checkable
class LatentFacing(Protocol):
    """A module that can go on from its own weights with the latents of another tokenizer."""

    latent_layers: tuple[str, ...]
    """The layers that latents go through, by name: where latents have another shape these begin anew."""


@runtime_checkable
class CachingBackbone(Backbone, Protocol):
    """A backbone that makes a clip chunk by chunk, reading the past from a cache.

    Whoever has ``new_cache`` also takes ``cache``: the streams are then one chunk, ``cache.chunk``. Keys and
    values of the words are held in the cache by the first pass, and not computed again before
    ``cache.drop("text")``; the chunk's own are offered, for ``cache.commit``.
    """

    def new_cache(self, **options: Any) -> KVCache:
        """An empty cache for this backbone; options as in :class:`~motionloom.nn.cache.KVCache`."""
        ...

    def __call__(
        self,
        streams: Streams,
        visibility: Visibility,
        cache: KVCache | None = None,
        *,
        perturb: Perturbation | None = None,
    ) -> dict[str, Tensor]:
        """As :class:`Backbone`. ``visibility`` is asked about [past, present] keys of the cache, exactly."""
        ...
