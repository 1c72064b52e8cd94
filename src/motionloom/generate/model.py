"""A model ready to generate: the members of all axes that one recipe names, on one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from motionloom.backbones.prediction import Predictor
from motionloom.config.misfits import frame_rule, neighbours
from motionloom.config.recipe import Recipe
from motionloom.errors import UserError
from motionloom.generate.sources import Coders
from motionloom.plans import Geometry, Plan, Sample, Text, token_geometry
from motionloom.text.base import TextEncoder, encode_scenes
from motionloom.tokenizers import (
    Tokenizer,
    latent_scenes,
    scene_seconds,
    scene_sound,
    scene_spans,
    shots_alone,
)
from motionloom.tokenizers.audio import AudioTokenizer


@dataclass(frozen=True)
class Model:
    """What generation needs. ``predictor`` answers with velocities whatever the network was taught."""

    recipe: Recipe
    tokenizer: Tokenizer
    text_encoder: TextEncoder
    predictor: Predictor
    plan: Plan
    device: torch.device
    audio_tokenizer: AudioTokenizer | None = None

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

    @property
    def modalities(self) -> tuple[str, ...]:
        """What its plan makes or is given: video, audio or both."""
        return self.recipe.plan.modalities

    @property
    def coders(self) -> Coders:
        """How clips become tokens."""
        return Coders(self.tokenizer, self.patch, self.audio_tokenizer)

    def shots_alone(self, count: int) -> bool:
        """Whether each of so many shots is coded as a clip of its own, as training had them."""
        return count > 1 and shots_alone(self.recipe)

    def sample(self, shots: Sequence[int], height: int, width: int, fps: float, batch: int) -> Sample:
        """The sample of clips of so many pixel frames per shot and so many pixels: all their tokens' places.

        Raises:
            UserError: a size that the tokenizer or the patch cannot make; the nearest ones are named.
        """
        tracks = {}
        if "video" in self.modalities:
            tracks["video"] = self.geometry(shots, height, width, fps, batch)
        if "audio" in self.modalities:
            tracks["audio"] = self.sound_geometry(shots, fps, batch)
        return Sample(tracks, fps=fps)

    def geometry(self, shots: Sequence[int], height: int, width: int, fps: float, batch: int) -> Geometry:
        """The token geometry of the video alone, as :meth:`sample`."""
        spec, alone = self.tokenizer.spec, self.shots_alone(len(shots))
        coded = list(shots) if alone else [sum(shots)]
        grids = [self.latent_grid(shot, height, width) for shot in coded]
        latent = (sum(grid[0] for grid in grids), *grids[0][1:])
        if alone:
            scene_F = torch.repeat_interleave(torch.arange(len(shots)), torch.tensor([g[0] for g in grids]))
        else:
            scene_F = torch.tensor(latent_scenes(spec, tuple(shots)))
        return token_geometry(
            latent,
            self.patch,
            scene_seconds(spec, coded, fps)[None].to(self.device),
            scene_F[None].to(self.device),
            spec.spatial,
            batch,
            span_BF2=scene_spans(spec, coded, fps)[None].to(self.device),
            scenes=len(shots),
        )

    def sound_geometry(self, shots: Sequence[float], fps: float, batch: int) -> Geometry:
        """The token geometry of the sound that lasts as long as the shots, in pixel frames.

        Raises:
            UserError: the model has no audio tokenizer.
        """
        if self.audio_tokenizer is None:
            raise UserError("this model has no audio tokenizer: train it with audio.enabled")
        coded = list(shots) if self.shots_alone(len(shots)) else [sum(shots)]
        counts, seconds_T, span_T2 = scene_sound(self.audio_tokenizer.spec, coded, fps)
        scene_T = torch.arange(len(coded)).repeat_interleave(torch.tensor(counts))
        if len(coded) < len(shots):
            ends = torch.tensor(shots).cumsum(0) / fps
            scene_T = torch.bucketize(span_T2.mean(dim=1), ends[:-1], right=True)
        return token_geometry(
            (sum(counts), 1, 1),
            (1, 1, 1),
            seconds_T[None].to(self.device),
            scene_T[None].to(self.device),
            0,
            batch,
            span_BF2=span_T2[None].to(self.device),
            scenes=len(shots),
        )

    @torch.no_grad()
    def encode_text(self, captions: Sequence[Sequence[str]], whole: Sequence[str] | None = None) -> Text:
        """Captions, per sample and scene, on this model's device.

        Args:
            whole: what is said of each sample as a whole.
        """
        text = encode_scenes(self.text_encoder, captions, whole)
        return replace(
            text,
            x_BLC=text.x_BLC.to(self.device),
            valid_BL=text.valid_BL.to(self.device),
            scene_BL=text.scene_BL.to(self.device),
        )
