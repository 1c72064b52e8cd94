"""A model ready to generate: the members of all axes that one recipe names, on one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from motionloom.backbones.prediction import Predictor
from motionloom.config.recipe import Recipe
from motionloom.errors import UserError
from motionloom.plans import Geometry, Plan, Text
from motionloom.plans.geometry import token_geometry
from motionloom.text.base import TextEncoder, encode_scenes
from motionloom.tokenizers import Tokenizer


@dataclass(frozen=True)
class Model:
    """What generation needs. ``predictor`` answers with velocities whatever the network was taught."""

    recipe: Recipe
    tokenizer: Tokenizer
    text_encoder: TextEncoder
    predictor: Predictor
    plan: Plan
    device: torch.device

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latent cells (frames, rows, columns) that make one token."""
        return self.recipe.model.patch

    @property
    def token_channels(self) -> int:
        """Numbers in one video token."""
        frames, rows, columns = self.patch
        return self.tokenizer.spec.channels * frames * rows * columns

    @property
    def fps(self) -> float:
        """Frames per second of its clips, as in training: every ``frame_stride``-th at ``video.fps``."""
        return self.recipe.video.fps / self.recipe.video.frame_stride

    @property
    def clip_shape(self) -> tuple[int, int, int]:
        """(frames, height, width) of the clip that the recipe trains on; with buckets the first size and the
        longest length."""
        video, bucketing = self.recipe.video, self.recipe.bucketing
        if not bucketing.enabled:
            return video.num_frames, video.height, video.width
        width, height = bucketing.buckets[0]
        return max(bucketing.frames, default=video.num_frames), height, width

    def autocast(self) -> torch.autocast:
        """The precision that the recipe trained in."""
        enabled = self.recipe.train.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def geometry(
        self, frames: int, height: int, width: int, fps: float, scene_frames: Sequence[int], batch: int
    ) -> Geometry:
        """The token geometry of clips of so many pixel frames and pixels.

        Args:
            scene_frames: latent frames of each shot; their sum is the clip's latent frames.

        Raises:
            UserError: a size that the tokenizer or the patch cannot make; the nearest ones are named.
        """
        spec = self.tokenizer.spec
        latent = spec.latent_grid(frames, height, width)
        for name, cells, cover in zip(("frames", "height", "width"), latent, self.patch, strict=True):
            if cells % cover:
                raise UserError(
                    f"{name}: {cells} latent cells do not divide by model.patch {cover}: "
                    f"use {cells // cover * cover or cover}"
                )
        seconds_F = spec.seconds(latent[0], fps).to(self.device)
        scene_F = torch.repeat_interleave(torch.arange(len(scene_frames)), torch.tensor(list(scene_frames)))
        return token_geometry(
            latent, self.patch, seconds_F[None], scene_F[None].to(self.device), spec.spatial, batch
        )

    @torch.no_grad()
    def encode_text(self, captions: Sequence[Sequence[str]]) -> Text:
        """Captions, per sample and scene, on this model's device."""
        text = encode_scenes(self.text_encoder, captions)
        return Text(text.x_BLC.to(self.device), text.valid_BL.to(self.device), text.scene_BL.to(self.device))
