"""From a manifest entry to the pixels of its crops and what stands beside them, in threads: PyAV and Pillow
let go of the interpreter.

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
    longest_fit,
    whole_frames,
)
from motionloom.data.cache.identity import asked_spec, crop_seed
from motionloom.data.cache.tracks import NO_TRACKS, Shot, Tracks, read_tracks
from motionloom.data.manifest import ManifestEntry, Problem, Scene, read_entry
from motionloom.data.media import MediaError, is_sound, probe, random_offset, read_clip, sound_seconds
from motionloom.errors import UserError
from motionloom.rng import key_to_seed
from motionloom.tokenizers import TokenizerSpec, latent_scenes, shots_alone


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
    """Empty for sound alone."""
    unused_seconds: float
    """Length of the entry beyond the bucket's, where the manifest says it."""
    tracks: Tracks


@dataclass(frozen=True)
class _Seen:
    """The frames of a crop, and where they come from."""

    video_PHW3: Tensor
    captions: list[str]
    scene_frames: list[int]
    shots: list[Shot]
    unused_seconds: float


def decode_all(
    recipe: Recipe, entries: Sequence[ManifestEntry], *, beside: bool = True
) -> Iterator[list[Decoded] | Problem]:
    """The crops of each entry, or why there are none, in the entries' order."""
    threads = max(1, recipe.num_workers)
    ahead: deque[Future[list[Decoded] | Problem]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            for entry in entries:
                ahead.append(pool.submit(decode, recipe, entry, beside=beside))
                # Deep enough to keep the threads busy over one slow clip, shallow enough for the memory.
                if len(ahead) > 4 * threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def decode(recipe: Recipe, entry: ManifestEntry, *, beside: bool = True) -> list[Decoded] | Problem:
    """All crops of an entry, or why there are none.

    Its first seconds are taken, in the longest bucket that they fill. A clip shorter than the shortest bucket
    is a problem, never padded.

    Args:
        beside: whether its tracks are read as well.
    """
    try:
        if is_sound(entry.path):
            return [_decode_sound(recipe, entry)]
        size = _size(recipe, entry)
        return [
            _decode_crop(recipe, entry, crop, size, beside) for crop in range(recipe.preprocess.num_crops)
        ]
    except MediaError as error:
        return Problem.of(error, entry.id)
    except (ArithmeticError, ValueError) as error:
        # What a decoder makes of damaged headers; one clip must never stop the rest.
        return Problem(entry.id, f"cannot be read ({error})", "encode it again or leave it out", "unreadable")


def sample_for_fit(
    recipe: Recipe, entries: Sequence[ManifestEntry], on_progress: Callable[[str, int, int], None]
) -> list[Tensor]:
    """Clips (P, H, W, 3) to fit a tokenizer on: spread over the manifest by a hash, whatever its order. Shots
    that are encoded alone are clips of their own.

    Raises:
        UserError: not one can be used.
    """
    seen = [entry for entry in entries if not is_sound(entry.path)]
    wanted = min(recipe.tokenizer.fit_clips, len(seen))
    spread = sorted(seen, key=lambda entry: key_to_seed("fit", entry.id))
    clips: list[Tensor] = []
    used = 0
    first_problem: Problem | None = None
    for result in decode_all(recipe, spread, beside=False):
        if isinstance(result, Problem):
            first_problem = first_problem or result
            continue
        clips += result[0].video_PHW3.split(list(result[0].bucket.alone))
        used += 1
        on_progress("clips to fit the tokenizer on", used, wanted)
        if used == wanted:
            break
    if not clips:
        raise UserError(f"not one of {len(seen)} clips can be used; the first: {first_problem}")
    return clips


def _size(recipe: Recipe, entry: ManifestEntry) -> tuple[int, int]:
    sizes = bucket_sizes(recipe)
    if len(sizes) == 1:
        return sizes[0]
    info = probe(entry.path, fps=entry.fps)
    return closest_size(info.width * info.pixel_aspect, info.height, sizes)


def _decode_sound(recipe: Recipe, entry: ManifestEntry) -> Decoded:
    """A file of sound alone; its bucket says how long it is, in frames of the recipe's rate."""
    if not recipe.audio.enabled:
        fix = "set audio.enabled to true, or leave it out"
        raise MediaError(entry.id, "is sound alone, and the recipe takes none", fix, "sound alone")
    fps, lengths = cached_fps(recipe), bucket_lengths(recipe)
    seconds = (entry.end or sound_seconds(entry.path)) - entry.start
    has = int(seconds * fps + 0.1)
    frames = longest_fit(has, lengths)
    if frames is None:
        raise _too_short(entry, has, _shortest(lengths), fps)
    bucket, shots = Bucket(0, 0, frames), [Shot(entry.path, entry.start, frames)]
    unused = seconds - frames / fps
    return Decoded(
        entry,
        0,
        bucket,
        [entry.caption],
        [frames],
        torch.zeros(0, 0, 0, 3, dtype=torch.uint8),
        unused if unused >= 1 / fps else 0.0,
        read_tracks(recipe, entry, bucket, shots),
    )


def _decode_crop(
    recipe: Recipe, entry: ManifestEntry, crop: int, size: tuple[int, int], beside: bool
) -> Decoded:
    width, height = size
    offset = _offset(recipe, entry, crop)
    by_shot = entry.of_several_files or (entry.scenes and recipe.stories.frames is not None)
    seen = (_see_shots if by_shot else _see_clip)(recipe, entry, (height, width), offset)
    frames = [shot.frames for shot in seen.shots]
    bucket = Bucket(width, height, sum(frames), tuple(frames) if len(frames) > 1 else ())
    tracks = read_tracks(recipe, entry, bucket, seen.shots, offset) if beside else NO_TRACKS
    return Decoded(
        entry, crop, bucket, seen.captions, seen.scene_frames, seen.video_PHW3, seen.unused_seconds, tracks
    )


def _see_clip(
    recipe: Recipe, entry: ManifestEntry, size: tuple[int, int], offset: tuple[float, float]
) -> _Seen:
    """The first frames of a clip of one file, and the scenes that are seen in them."""
    fps, lengths, spec = cached_fps(recipe), bucket_lengths(recipe), asked_spec(recipe)
    clip = read_entry(
        entry,
        frames=lengths[-1],
        fps=fps,
        size=size,
        crop=offset,
        background=recipe.preprocess.background,
        short="trim",
    )
    frames = longest_fit(len(clip.video_FHW3), lengths)
    if frames is None:
        raise _too_short(entry, len(clip.video_FHW3), _shortest(lengths), fps)
    video_PHW3 = torch.from_numpy(clip.video_FHW3[:frames])
    unused = _unused(entry, frames, fps)
    captions, scene_frames = _scenes(entry, frames, fps)
    if len(scene_frames) == 1 or not shots_alone(recipe):
        _require_all(entry, scene_frames, set(latent_scenes(spec, tuple(scene_frames))), spec, fps)
        return _Seen(video_PHW3, captions, scene_frames, [Shot(entry.path, entry.start, frames)], unused)
    whole = [whole_frames(spec, count, recipe.model.patch[0]) for count in scene_frames]
    _require_all(entry, scene_frames, set(np.flatnonzero(whole)), spec, fps)
    begins = [0, *np.cumsum(scene_frames)[:-1].tolist()]
    shots = [
        Shot(entry.path, entry.start + begin / fps, keep) for begin, keep in zip(begins, whole, strict=True)
    ]
    kept = [shot[:keep] for shot, keep in zip(video_PHW3.split(scene_frames), whole, strict=True)]
    return _Seen(torch.cat(kept), captions, whole, shots, unused + (frames - sum(whole)) / fps)


def _see_shots(
    recipe: Recipe, entry: ManifestEntry, size: tuple[int, int], offset: tuple[float, float]
) -> _Seen:
    """Shot by shot, each from its own place: all of them, or as many as fill the longest clip."""
    fps, most, spec = cached_fps(recipe), recipe.stories.frames, asked_spec(recipe)
    left = bucket_lengths(recipe)[-1]
    pieces: list[Tensor] = []
    shots: list[Shot] = []
    unused = 0.0
    for scene in entry.scenes:
        allowed = most or left
        if not whole_frames(spec, allowed, recipe.model.patch[0]):
            unused += scene.end - scene.start
            continue
        shot, pixels_PHW3 = _see_shot(recipe, entry, scene, len(shots), allowed, size, offset)
        left -= shot.frames
        pieces.append(pixels_PHW3)
        shots.append(shot)
        unused += scene.end - scene.start - shot.frames / fps
    captions = [scene.caption for scene in entry.scenes[: len(shots)]]
    frames = [shot.frames for shot in shots]
    return _Seen(torch.cat(pieces), captions, frames, shots, unused if unused >= 1 / fps else 0.0)


def _see_shot(
    recipe: Recipe,
    entry: ManifestEntry,
    scene: Scene,
    number: int,
    most: int,
    size: tuple[int, int],
    offset: tuple[float, float],
) -> tuple[Shot, Tensor]:
    """At most so many frames of a scene, as many as fill latent frames."""
    fps, path = cached_fps(recipe), scene.path or entry.path
    clip = read_clip(
        path,
        start=scene.start,
        duration=scene.end - scene.start,
        frames=most,
        fps=fps,
        size=size,
        crop=offset,
        background=recipe.preprocess.background,
        source_fps=entry.fps,
        short="trim",
    )
    spec = asked_spec(recipe)
    keep = whole_frames(spec, len(clip.video_FHW3), recipe.model.patch[0])
    if not keep:
        raise _short_scene(entry, number, len(clip.video_FHW3), spec, fps)
    return Shot(path, scene.start, keep), torch.from_numpy(clip.video_FHW3[:keep])


def _offset(recipe: Recipe, entry: ManifestEntry, crop: int) -> tuple[float, float]:
    """Where the crop sits in the overhang, (down, right) in [0, 1]."""
    if recipe.preprocess.crop == "center":
        return 0.5, 0.5
    down, right = random_offset(crop_seed(recipe), entry.id, crop)
    reach = recipe.preprocess.shift_fraction
    return 0.5 + (down - 0.5) * reach, 0.5 + (right - 0.5) * reach


def _shortest(lengths: Sequence[int]) -> int:
    """The shortest length for a moving clip."""
    return min(lengths, key=lambda length: (length == 1, length))


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


def _require_all(
    entry: ManifestEntry, scene_frames: Sequence[int], present: set[int], spec: TokenizerSpec, fps: float
) -> None:
    """Raises MediaError unless every scene has a latent frame of its own."""
    for scene, frames in enumerate(scene_frames):
        if scene not in present:
            raise _short_scene(entry, scene, frames, spec, fps)


def _short_scene(
    entry: ManifestEntry, scene: int, frames: int, spec: TokenizerSpec, fps: float
) -> MediaError:
    what = f"scene {scene} ({frames} frames) is shorter than a latent frame"
    fix = f"let it last {spec.temporal / fps:.2g} s or more, or join it with its neighbour"
    return MediaError(entry.id, what, fix, "short scene")


def _unused(entry: ManifestEntry, frames: int, fps: float) -> float:
    """Seconds of the entry after the frames that are taken; 0 where the manifest does not say its length."""
    end = entry.end
    if end is None and entry.frames and entry.fps and entry.kind != "image":
        end = entry.frames / entry.fps
    left = 0.0 if end is None else end - entry.start - frames / fps
    return left if left >= 1 / fps else 0.0
