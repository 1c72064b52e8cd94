"""What a backbone's output means: the one place where it becomes a velocity, in training and in sampling.

Shapes: B batch, N tokens of a stream, C channels of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from motionloom.backbones.base import Backbone
from motionloom.flow import LINEAR, Path, convert
from motionloom.plans.stream import Streams
from motionloom.plans.visibility import Visibility


@dataclass(frozen=True)
class Predictor:
    """A backbone and the meaning of its output on a path."""

    backbone: Backbone
    prediction: Literal["velocity", "clean", "noise"] = "velocity"
    path: Path = LINEAR

    def velocity(self, streams: Streams, visibility: Visibility) -> dict[str, Tensor]:
        """The velocity of every denoised stream, (B, N, C) by modality, in the dtype of the stream's latents.

        Each token is converted at its own noise level. Where a level says nothing about the missing half
        (``flow.to_pair``: clean at 0, noise at 1) that half is taken as 0, so the result is always finite.
        """
        return {
            modality: convert(
                output,
                streams[modality].x_BNC,
                streams[modality].sigma_BN,
                self.prediction,
                "velocity",
                self.path,
            )
            for modality, output in self.backbone(streams, visibility).items()
        }
