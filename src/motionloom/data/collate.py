"""From samples to tensors: the latents of a batch with their times and shots, pieces laid end to end.

Shapes: B batch, K levels, F latent frames (of sound: latents), h x w latent cells, C channels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from motionloom.config.recipe import Recipe
from motionloom.data.batch import Latents
from motionloom.data.buckets import Bucket
from motionloom.data.cache import Cache
from motionloom.data.samples import Piece, Sample
from motionloom.tokenizers import (
    AudioTokenizerSpec,
    latent_scenes,
    scene_latents,
    scene_seconds,
    scene_sound,
    scene_spans,
)

SceneFrames = Callable[[int], tuple[int, ...]]
"""Pixel frames of each scene of a row."""


class Collate:
    """Makes the latents of samples of one shape. Safe for threads."""

    def __init__(self, cache: Cache, recipe: Recipe, scene_frames: SceneFrames) -> None:
        self._cache, self._recipe, self._scene_frames = cache, recipe, scene_frames
        self._spec, self._fps = cache.identity.spec, cache.fps

    def latents(self, shape: str, samples: Sequence[Sample]) -> dict[str, Latents]:
        """By modality: ``video`` unless the shape is one of sound, and ``audio`` if the recipe wants it."""
        bucket = Bucket.parse(shape)
        found = {} if bucket.is_sound else {"video": self._video(bucket.alone, samples)}
        if self._recipe.audio.enabled:
            found["audio"] = self._audio(bucket.alone, samples)
        return found

    def references(self, samples: Sequence[Sample]) -> dict[str, tuple[Latents, ...]]:
        """By modality, one for each size that occurs among the samples, smallest first.

        They cover the clip: ``pixels`` of a smaller one counts for more, and its frames last longer.
        """
        rows = [sample[0].row for sample in samples]
        settings = self._recipe.references
        found: dict[str, tuple[Latents, ...]] = {}
        fps = self._fps / settings.frame_stride
        video = tuple(
            Latents(
                x_BFhwC,
                self._spec.seconds(x_BFhwC.shape[1], fps)[None],
                span_BF2 := self._spec.spans(x_BFhwC.shape[1], fps)[None],
                self._scenes_at(rows, span_BF2),
                self._spec.spatial * settings.downscale,
                present_B,
            )
            for x_BFhwC, present_B in _by_shape(self._cache.references(rows))
        )
        heard = self._cache.reference_sounds(rows) if settings.audio else []
        audio = tuple(self._sound_reference(x_BTC, present_B, rows) for x_BTC, present_B in _by_shape(heard))
        found |= {"video": video} if video else {}
        return found | ({"audio": audio} if audio else {})

    def masks(self, shape: str, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Bool (B, F, h, w): True where the latents are given; a sample without a mask is False."""
        bucket = Bucket.parse(shape)
        if bucket.is_sound:
            return {}
        given_BFhw = torch.zeros(len(samples), *bucket.latent_grid(self._spec), dtype=torch.bool)
        found = iter(self._cache.masks(_rows(samples)))
        for b, sample in enumerate(samples):
            begin = 0
            for piece in sample:
                frames, part = self._frames_of(piece)
                if (mask_Fhw := next(found)) is not None:
                    given_BFhw[b, begin : begin + frames] = torch.from_numpy(mask_Fhw[part])
                begin += frames
        return {"video": given_BFhw}

    def states(self, shape: str, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """By modality: states (B, K, F, h, w, C) of a teacher's walks; none in a cache without."""
        found: dict[str, Tensor] = {}
        if not self._cache.has_states:
            return found
        rows = _rows(samples)
        if not Bucket.parse(shape).is_sound:
            stored = iter(self._cache.states(rows))
            clips = [[next(stored)[:, self._frames_of(piece)[1]] for piece in sample] for sample in samples]
            found["video"] = _end_to_end(clips)
        if self._recipe.audio.enabled:
            heard = iter(self._cache.sound_states(rows))
            sounds = [
                [part for piece in sample for part in _part(next(heard), piece) or ()] for sample in samples
            ]
            found["audio"] = _end_to_end(sounds)[:, :, :, None, None]
        return found

    def _video(self, shots: Sequence[int], samples: Sequence[Sample]) -> Latents:
        clips, scenes = [], []
        stored = iter(self._cache.latents(_rows(samples)))
        for sample in samples:
            clips.append(np.concatenate([next(stored)[self._frames_of(piece)[1]] for piece in sample]))
            scenes.append(self._scenes_of(sample, shots))
        return Latents(
            torch.from_numpy(np.stack(clips)).float(),
            scene_seconds(self._spec, shots, self._fps).repeat(len(samples), 1),
            scene_spans(self._spec, shots, self._fps).repeat(len(samples), 1, 1),
            torch.tensor(scenes),
            self._spec.spatial,
        )

    def _frames_of(self, piece: Piece) -> tuple[int, slice]:
        """How many latent frames a piece has, and where they stand among its row's."""
        counts = scene_latents(self._spec, self._cache.bucket_of(piece.row).alone)
        begin = sum(counts[: piece.first])
        frames = sum(counts[piece.first : piece.first + piece.count])
        return frames, slice(begin, begin + frames)

    def _scenes_of(self, sample: Sample, shots: Sequence[int]) -> list[int]:
        """The shot of each latent frame of a sample."""
        scene_frames = self._scene_frames(sample[0].row)
        if len(shots) == 1 and len(scene_frames) > 1 and not self._cache.bucket_of(sample[0].row).shots:
            return list(latent_scenes(self._spec, scene_frames))
        return [shot for shot, count in enumerate(scene_latents(self._spec, shots)) for _ in range(count)]

    # Sound

    @property
    def _audio_spec(self) -> AudioTokenizerSpec:
        spec = self._cache.identity.audio_spec
        assert spec is not None, "the recipe's sound is the cache's"
        return spec

    def _audio(self, shots: Sequence[int], samples: Sequence[Sample]) -> Latents:
        """Sound of the same shots, each beginning with its frames. A sample of which a piece is silent lacks
        it: silence that nobody recorded is not to be learned."""
        spec = self._audio_spec
        counts, seconds_T, span_T2 = scene_sound(spec, shots, self._fps)
        x_BTC = np.zeros((len(samples), sum(counts), spec.channels), np.float32)
        present_B = torch.ones(len(samples), dtype=torch.bool)
        found = iter(self._cache.sounds(_rows(samples)))
        for b, sample in enumerate(samples):
            parts = [_part(next(found), piece) for piece in sample]
            present_B[b] = all(part is not None for part in parts)
            if present_B[b]:
                np.concatenate([x_TC for part in parts for x_TC in part or ()], out=x_BTC[b])
        scene_BT = torch.stack([self._sound_scenes_of(sample, counts, span_T2) for sample in samples])
        return Latents(
            torch.from_numpy(x_BTC)[:, :, None, None],
            seconds_T[None].repeat(len(samples), 1),
            span_T2[None].repeat(len(samples), 1, 1),
            scene_BT,
            0,
            None if present_B.all() else present_B,
        )

    def _sound_scenes_of(self, sample: Sample, counts: Sequence[int], span_T2: Tensor) -> Tensor:
        """The shot of each sound latent of a sample, (T,): a row's own scenes only where it was encoded as a
        whole."""
        if len(counts) == 1 and not self._cache.bucket_of(sample[0].row).shots:
            return self._scenes_at([sample[0].row], span_T2[None])[0]
        return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))

    def _sound_reference(self, x_BTC: Tensor, present_B: Tensor | None, rows: Sequence[int]) -> Latents:
        spec, latents = self._audio_spec, x_BTC.shape[1]
        span_BT2 = spec.spans(latents)[None]
        scene_BT = self._scenes_at(rows, span_BT2)
        return Latents(x_BTC[:, :, None, None], spec.seconds(latents)[None], span_BT2, scene_BT, 0, present_B)

    def _scenes_at(self, rows: Sequence[int], span_BF2: Tensor) -> Tensor:
        """The scene of each row that is on at the middle of these spans (1, F, 2); the last one after it."""
        middle_F = span_BF2[0].mean(dim=1)
        found: dict[tuple[int, ...], Tensor] = {}
        for frames in {self._scene_frames(row) for row in rows}:
            ends_S = torch.tensor(frames).cumsum(0) / self._fps
            found[frames] = torch.bucketize(middle_F, ends_S[:-1], right=True)
        return torch.stack([found[self._scene_frames(row)] for row in rows])


def _rows(samples: Sequence[Sample]) -> list[int]:
    return [piece.row for sample in samples for piece in sample]


def _part(sound: list[NDArray[np.float16]] | None, piece: Piece) -> list[NDArray[np.float16]] | None:
    """The sound of a piece's shots, where its row has sound."""
    return None if sound is None else sound[piece.first : piece.first + piece.count]


def _end_to_end(clips: Sequence[Sequence[NDArray[np.float16]]]) -> Tensor:
    """States (K, F, ...) of the pieces of each sample -> (B, K, F, ...), float32."""
    return torch.from_numpy(np.stack([np.concatenate(parts, axis=1) for parts in clips])).float()


def _by_shape(found: Sequence[NDArray[np.float16] | None]) -> list[tuple[Tensor, Tensor | None]]:
    """Latents of each shape among them as (x_B..., present_B), the smallest first; zeros where one lacks it,
    or has another shape."""
    members: Mapping[tuple[int, ...], list[int]] = defaultdict(list)
    for b, x in enumerate(found):
        if x is not None:
            members[x.shape].append(b)
    stacked: list[tuple[Tensor, Tensor | None]] = []
    for shape in sorted(members):
        values, present_B = torch.zeros(len(found), *shape), torch.zeros(len(found), dtype=torch.bool)
        for b in members[shape]:
            values[b] = torch.from_numpy(np.asarray(found[b], np.float32))
            present_B[b] = True
        stacked.append((values, None if present_B.all() else present_B))
    return stacked
