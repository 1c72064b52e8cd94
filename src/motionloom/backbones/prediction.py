"""What a backbone's output means: the one place where it becomes a velocity, in training and in sampling.

Shapes: B batch, N tokens of a stream, C channels of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor

from motionloom.backbones.base import Backbone, CachingBackbone
from motionloom.flow import LINEAR, DiscreteSchedule, Path, Perturbation, convert
from motionloom.nn.cache import KVCache
from motionloom.plans.stream import Streams
from motionloom.plans.visibility import Visibility


@dataclass(frozen=True)
class Predictor:
    """A backbone and the meaning of its output on a path."""

    backbone: Backbone
    prediction: Literal["velocity", "clean", "noise"] = "velocity"
    path: Path = LINEAR

    @property
    def schedule(self) -> DiscreteSchedule | None:
        """The noise levels that the backbone was trained on, when it knows no others (CogVideoX)."""
        return getattr(self.backbone, "schedule", None)

    def velocity(
        self,
        streams: Streams,
        visibility: Visibility,
        cache: KVCache | None = None,
        *,
        perturb: Perturbation | None = None,
    ) -> dict[str, Tensor]:
        """The velocity of every denoised stream, (B, N, C) by modality, in the dtype of the stream's latents.

        With a cache, which the backbone must know (``CachingBackbone``), the streams are its present chunk.
        ``perturb``: what the backbone leaves out, so that guidance can point away from it.

        Each token is converted at its own noise level. Where a level says nothing about the missing half
        (``flow.to_pair``: clean at 0, noise at 1) that half is taken as 0, so the result is always finite.
        """
        # A network that is never perturbed need not know how.
        how = {} if perturb is None else {"perturb": perturb}
        if cache is None:
            outputs = self.backbone(streams, visibility, **how)
        else:
            outputs = cast(CachingBackbone, self.backbone)(streams, visibility, cache, **how)
        return {
            modality: convert(
                output,
                streams[modality].x_BNC,
                streams[modality].sigma_BN,
                self.prediction,
                "velocity",
                self.path,
            )
            for modality, output in outputs.items()
        }
