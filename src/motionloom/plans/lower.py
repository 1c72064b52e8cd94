"""From a visibility to what attention computes with.

Shapes: B batch, Q query tokens, K key tokens.
"""

from __future__ import annotations

from torch import Tensor

from motionloom.nn.attention import prepare_mask
from motionloom.plans.stream import Attributes
from motionloom.plans.visibility import Visibility, dense_mask


def lower(
    visibility: Visibility, q: Attributes, k: Attributes, k_valid_BK: Tensor | None = None
) -> Tensor | None:
    """How queries with attributes ``q`` see keys with attributes ``k``, for ``nn.attention.attend``.

    Made once per forward and shared by all blocks; None when everything is seen.
    """
    mask_BQK = dense_mask(visibility, q, k, k_valid_BK)
    return None if mask_BQK is None else prepare_mask(mask_BQK[:, None])
