"""Randomness by key: every draw comes from a generator named by (seed, step, rank, purpose, ...).

Nothing in MotionLoom draws from a global generator, so a resumed run, a second rank or a new log line can
never shift somebody else's random numbers.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch

Key = int | str


def key_to_seed(*key: Key) -> int:
    """A 63-bit seed from a key of ints and strings. Equal keys give equal seeds on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def numpy_rng(*key: Key) -> np.random.Generator:
    """A NumPy generator (PCG64) for this key."""
    import numpy as np

    return np.random.Generator(np.random.PCG64(key_to_seed(*key)))


def torch_generator(*key: Key, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator for this key on ``device``."""
    import torch

    return torch.Generator(device=device).manual_seed(key_to_seed(*key))
