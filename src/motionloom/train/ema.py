"""Exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from motionloom.config.recipe import EmaConfig
from motionloom.parallel import local, named_state


class Ema:
    """A float32 shadow of every trainable parameter, cut over ranks as the parameter is.

    The decay is min(decay, (1 + n) / (10 + n)) at the n-th update, so that the start is forgotten soon. n
    follows from the step, so the shadows are all the state there is.
    """

    def __init__(self, modules: Mapping[str, nn.Module], config: EmaConfig) -> None:
        self._config = config
        self._modules = modules
        self._parameters = {
            f"{top}.{name}": p
            for top, module in modules.items()
            for name, p in module.named_parameters()
            if p.requires_grad
        }
        self.shadows = {name: p.detach().clone().float() for name, p in self._parameters.items()}

    def decay(self, update: int) -> float:
        """The decay of the n-th update, n from 1."""
        return min(self._config.decay, (1 + update) / (10 + update))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the weights after ``step`` optimiser steps; up to ``start_step`` the two are equal."""
        since = step - self._config.start_step
        shadows, weights = self._local(self.shadows), self._local(self._parameters)
        if since <= 0:
            torch._foreach_copy_(shadows, weights)
        elif since % self._config.update_every == 0:
            decay = self.decay(since // self._config.update_every)
            torch._foreach_lerp_(shadows, [w.float() for w in weights], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The modules hold the averaged weights inside, and their own again, bit for bit, after."""
        shadows, weights = self._local(self.shadows), self._local(self._parameters)
        own = [w.clone() for w in weights]
        with torch.no_grad():
            torch._foreach_copy_(weights, shadows)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(weights, own)

    def named_state(self) -> dict[str, Tensor]:
        """Like the modules' own state, with the averages in place of the trained weights."""
        return {**named_state(self._modules), **self.shadows}

    @staticmethod
    def _local(tensors: Mapping[str, Tensor]) -> list[Tensor]:
        return [local(t.detach()) for t in tensors.values()]
