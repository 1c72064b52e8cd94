"""A model ready to generate: the members of all axes that one recipe names, on one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from motionloom.backbones.prediction import Predictor
from motionloom.config.misfits import frame_rule, neighbours
from motionloom.config.recipe import Recipe
from motionloom.errors import UserError
from motionloom.plans import Geometry, Plan, Text
from motionloom.plans.geometry import token_geometry
from motionloom.text.base import TextEncoder, encode_scenes
from motionloom.tokenizers import VAES, Tokenizer, scene_seconds


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

    def latent_grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent (frames, rows, columns) of a clip of so many pixel frames and pixels.

        Raises:
            UserError: a size that the tokenizer or the patch cannot make; names the nearest that both can.
        """
        spec = self.tokenizer.spec
        rules = (
            ("frames", frames, *frame_rule(spec.temporal, spec.first_alone, self.patch[0])),
            ("height", height, spec.spatial * self.patch[1], 0),
            ("width", width, spec.spatial * self.patch[2], 0),
        )
        for name, size, step, rest in rules:
            if size < 1 or (size - rest) % step:
                after = " (the first frame fills one alone)" if rest else ""
                raise UserError(
                    f"{name} {size} does not fill latent cells{after} and tokens of model.patch "
                    f"{list(self.patch)}: use {neighbours(size, step, rest)}"
                )
        return spec.latent_grid(frames, height, width)

    def geometry(
        self, frames: int, height: int, width: int, fps: float, scene_frames: Sequence[int], batch: int
    ) -> Geometry:
        """The token geometry of clips of so many pixel frames and pixels.

        Several shots of a VAE stand as training has them, each with a first frame of its own.

        Args:
            frames: where shots are coded alone, their own lengths count instead.
            scene_frames: latent frames of each shot; their sum is the clip's latent frames.

        Raises:
            UserError: a size that the tokenizer or the patch cannot make; the nearest ones are named.
        """
        spec = self.tokenizer.spec
        alone = len(scene_frames) > 1 and self.recipe.tokenizer.type in VAES
        shots = [spec.pixel_frames(count) for count in scene_frames] if alone else [frames]
        grids = [self.latent_grid(shot, height, width) for shot in shots]
        latent = (sum(grid[0] for grid in grids), *grids[0][1:])
        assert latent[0] == sum(scene_frames), f"shots of {scene_frames} latent frames in {latent[0]}"
        seconds_F = scene_seconds(spec, shots, fps).to(self.device)
        scene_F = torch.repeat_interleave(torch.arange(len(scene_frames)), torch.tensor(list(scene_frames)))
        return token_geometry(
            latent, self.patch, seconds_F[None], scene_F[None].to(self.device), spec.spatial, batch
        )

    @torch.no_grad()
    def encode_text(self, captions: Sequence[Sequence[str]]) -> Text:
        """Captions, per sample and scene, on this model's device."""
        text = encode_scenes(self.text_encoder, captions)
        return Text(text.x_BLC.to(self.device), text.valid_BL.to(self.device), text.scene_BL.to(self.device))
