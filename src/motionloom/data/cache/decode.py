"""From a manifest entry to the pixels of its crops, in threads: PyAV and Pillow let go of the interpreter.

Shapes: P pixel frames, H x W pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from motionloom.config.recipe import Recipe
from motionloom.data.buckets import (
    Bucket,
    bucket_lengths,
    bucket_sizes,
    cached_fps,
    closest_size,
    latent_scenes,
    longest_fit,
)
from motionloom.data.cache.identity import crop_seed
from motionloom.data.manifest import ManifestEntry, Problem, read_entry
from motionloom.data.media import MediaError, probe, random_offset
from motionloom.errors import UserError
from motionloom.rng import key_to_seed
from motionloom.tokenizers import VAES, TokenizerSpec


@dataclass(frozen=True)
class Decoded:
    """One crop of a clip, ready to be encoded."""

    entry: ManifestEntry
    crop: int
    bucket: Bucket
    captions: list[str]
    """Of the scenes that are seen."""
    scene_frames: list[int]
    """Pixel frames of each of them."""
    video_PHW3: Tensor
    unused_seconds: float
    """Length of the entry beyond the bucket's, where the manifest says it."""


def decode_all(recipe: Recipe, entries: Sequence[ManifestEntry]) -> Iterator[list[Decoded] | Problem]:
    """The crops of each entry, or why there are none, in the entries' order."""
    threads = max(1, recipe.num_workers)
    ahead: deque[Future[list[Decoded] | Problem]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            for entry in entries:
                ahead.append(pool.submit(decode, recipe, entry))
                # Deep enough to keep the threads busy over one slow clip, shallow enough for the memory.
                if len(ahead) > 4 * threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def decode(recipe: Recipe, entry: ManifestEntry) -> list[Decoded] | Problem:
    """All crops of an entry, or why there are none.

    Its first seconds are taken, in the longest bucket that they fill. A clip shorter than the shortest bucket
    is a problem, never padded.
    """
    try:
        size = _size(recipe, entry)
        spec = _asked_spec(recipe)
        return [_decode_crop(recipe, entry, crop, size, spec) for crop in range(recipe.preprocess.num_crops)]
    except MediaError as error:
        return Problem.of(error, entry.id)
    except (ArithmeticError, ValueError) as error:
        # What a decoder makes of damaged headers; one clip must never stop the rest.
        return Problem(entry.id, f"cannot be read ({error})", "encode it again or leave it out", "unreadable")


def sample_for_fit(
    recipe: Recipe, entries: Sequence[ManifestEntry], on_progress: Callable[[str, int, int], None]
) -> list[Tensor]:
    """Clips (P, H, W, 3) to fit a tokenizer on: spread over the manifest by a hash, whatever its order.

    Raises:
        UserError: not one can be used.
    """
    wanted = min(recipe.tokenizer.fit_clips, len(entries))
    spread = sorted(entries, key=lambda entry: key_to_seed("fit", entry.id))
    clips: list[Tensor] = []
    first_problem: Problem | None = None
    for result in decode_all(recipe, spread):
        if isinstance(result, Problem):
            first_problem = first_problem or result
            continue
        clips.append(result[0].video_PHW3)
        on_progress("clips to fit the tokenizer on", len(clips), wanted)
        if len(clips) == wanted:
            break
    if not clips:
        raise UserError(f"not one of {len(entries)} clips can be used; the first: {first_problem}")
    return clips


def _size(recipe: Recipe, entry: ManifestEntry) -> tuple[int, int]:
    sizes = bucket_sizes(recipe)
    if len(sizes) == 1:
        return sizes[0]
    info = probe(entry.path, fps=entry.fps)
    return closest_size(info.width * info.pixel_aspect, info.height, sizes)


def _decode_crop(
    recipe: Recipe, entry: ManifestEntry, crop: int, size: tuple[int, int], spec: TokenizerSpec
) -> Decoded:
    width, height = size
    fps, lengths = cached_fps(recipe), bucket_lengths(recipe)
    clip = read_entry(
        entry,
        frames=lengths[-1],
        fps=fps,
        size=(height, width),
        crop=_offset(recipe, entry, crop),
        background=recipe.preprocess.background,
        short="trim",
    )
    frames = longest_fit(len(clip.video_FHW3), lengths)
    if frames is None:
        shortest = min(lengths, key=lambda length: (length == 1, length))
        raise _too_short(entry, len(clip.video_FHW3), shortest, fps)
    video_PHW3 = torch.from_numpy(clip.video_FHW3[:frames])
    unused = _unused(entry, frames, fps)
    captions, scene_frames = _scenes(entry, frames, fps)
    bucket = Bucket(width, height, frames)
    if len(scene_frames) > 1 and recipe.tokenizer.type in VAES:
        # A VAE mixes what it has seen into what follows, so every shot is encoded as a clip of its own.
        whole = [_whole_latents(spec, count, recipe.model.patch[0]) for count in scene_frames]
        _require_all(entry, scene_frames, set(np.flatnonzero(whole)), spec, fps)
        video_PHW3 = torch.cat(
            [shot[:keep] for shot, keep in zip(video_PHW3.split(scene_frames), whole, strict=True)]
        )
        unused += (frames - sum(whole)) / fps
        scene_frames, bucket = whole, Bucket(width, height, sum(whole), tuple(whole))
    else:
        _require_all(entry, scene_frames, set(latent_scenes(spec, tuple(scene_frames))), spec, fps)
    return Decoded(entry, crop, bucket, captions, scene_frames, video_PHW3, unused)


def _offset(recipe: Recipe, entry: ManifestEntry, crop: int) -> tuple[float, float]:
    """Where the crop sits in the overhang, (down, right) in [0, 1]."""
    if recipe.preprocess.crop == "center":
        return 0.5, 0.5
    down, right = random_offset(crop_seed(recipe), entry.id, crop)
    reach = recipe.preprocess.shift_fraction
    return 0.5 + (down - 0.5) * reach, 0.5 + (right - 0.5) * reach


def _too_short(entry: ManifestEntry, has: int, needs: int, fps: float) -> MediaError:
    if has == 1 and entry.kind == "image":
        what, fix = "is a still, and the recipe takes no clips of one frame", "add 1 to bucketing.frames"
    else:
        what = f"is too short: {has} of {needs} frames at {fps:g} a second"
        fix = "lower video.num_frames or raise video.fps"
    return MediaError(entry.id, what, f"{fix}, or leave it out", "too short")


def _scenes(entry: ManifestEntry, frames: int, fps: float) -> tuple[list[str], list[int]]:
    """Captions and lengths in frames of the scenes that are seen; a clip without scenes is one.

    A frame belongs to the last scene that has begun; those before the first scene belong to it as well.
    """
    if not entry.scenes:
        return [entry.caption], [frames]
    starts = [scene.start for scene in entry.scenes]
    # A cut due at 41.7 ms may be written as 42: a tenth of a frame is no difference.
    times = [entry.start + (i + 0.1) / fps for i in range(frames)]
    of_frame = [max(0, sum(start <= now for start in starts) - 1) for now in times]
    seen = of_frame[-1] + 1
    counts = [of_frame.count(scene) for scene in range(seen)]
    return [scene.caption for scene in entry.scenes[:seen]], counts


def _whole_latents(spec: TokenizerSpec, frames: int, patch: int) -> int:
    """How many of a shot's frames fill latent frames in groups of ``patch``, those of one token."""
    head = int(spec.first_alone)
    latents = head + (frames - head) // spec.temporal if frames else 0
    latents -= latents % patch
    return spec.pixel_frames(latents) if latents else 0


def _require_all(
    entry: ManifestEntry, scene_frames: Sequence[int], present: set[int], spec: TokenizerSpec, fps: float
) -> None:
    """Raises MediaError unless every scene has a latent frame of its own."""
    for scene, frames in enumerate(scene_frames):
        if scene not in present:
            what = f"scene {scene} ({frames} frames) is shorter than a latent frame"
            fix = f"let it last {spec.temporal / fps:.2g} s or more, or join it with its neighbour"
            raise MediaError(entry.id, what, fix, "short scene")


def _unused(entry: ManifestEntry, frames: int, fps: float) -> float:
    """Seconds of the entry after the frames that are taken; 0 where the manifest does not say its length."""
    end = entry.end
    if end is None and entry.frames and entry.fps and entry.kind != "image":
        end = entry.frames / entry.fps
    left = 0.0 if end is None else end - entry.start - frames / fps
    return left if left >= 1 / fps else 0.0


def _asked_spec(recipe: Recipe) -> TokenizerSpec:
    t = recipe.tokenizer
    return TokenizerSpec(t.latent_d, t.latent_f, t.latent_t, t.first_alone)
