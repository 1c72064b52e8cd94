"""What stands beside a clip in training, as tokens.

Shapes: B batch, F token frames, S cells of a frame, C channels of a token.
"""

from __future__ import annotations

from torch import Tensor

from motionloom.data.batch import Batch
from motionloom.nn.patching import patchify
from motionloom.plans import Given, as_shown
from motionloom.plans.tokens import Mix
from motionloom.train.method import StepContext


def reference_tokens(
    batch: Batch, given: Given, context: StepContext, patch: tuple[int, int, int], mix: Mix
) -> dict[str, tuple[Tensor, ...]]:
    """References as they are shown, by modality: most of them clean, some at a noise level of their own."""
    found = {}
    for m, beside in given.references.items():
        shown = []
        for i, (how, clip) in enumerate(zip(beside, batch.references.get(m, ()), strict=False)):
            x_BFSC = patchify(clip.x_BFHWC, patch if m == "video" else (1, 1, 1))
            noise_BFSC = x_BFSC
            if how.noise_B is not None:
                noise_BFSC = context.randn(x_BFSC, f"noise reference {m} {i}")
            shown.append(as_shown(x_BFSC, noise_BFSC, how.noise_B, mix))
        found[m] = tuple(shown)
    return found
