"""What stands beside the frames: sound, references and masks, from the files to the batch."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import wave
from dataclasses import replace
from pathlib import Path

import lance
import numpy as np
import pytest
import torch

from cached import FPS, make_clip, make_world
from cached import recipe as plain
from motionloom.config.recipe import Recipe
from motionloom.data.buckets import Bucket
from motionloom.data.cache import build_cache, open_cache
from motionloom.data.cache.masks import latent_mask
from motionloom.data.loader import Loader
from motionloom.data.manifest import ManifestEntry, read_manifest, write_manifest
from motionloom.data.media import read_clip, write_video
from motionloom.errors import UserError
from motionloom.rng import numpy_rng
from motionloom.tokenizers import TokenizerSpec, load_audio_tokenizer, load_tokenizer

RATE = 16_000
AUDIO = {"enabled": True, "sample_rate": RATE, "channels": 8, "latents_per_second": 16.0}


def recipe(**sections) -> Recipe:
    """Nine frames at 8 a second, the first alone (latent frames 0 | 1-4 | 5-8), no clip held out."""
    base = {
        "video": {"num_frames": 9},
        "tokenizer": {"first_alone": True},
        "audio": AUDIO,
        "train": {"heldout_fraction": 0.0},
    }
    merged = {name: {**base.get(name, {}), **value} for name, value in sections.items()}
    return plain(**{**base, **merged})


def make_sound(path: Path, key: int, seconds: float, rate: int = RATE) -> np.ndarray:
    """A 16-bit wav of noise with a rising pitch; returns (1, N) float32 as a reader must see it."""
    count = round(seconds * rate)
    time_N = np.arange(count) / rate
    tone = np.sin(2 * np.pi * (200 + 40 * key) * time_N * (1 + time_N / 4))
    sound = 0.4 * tone + 0.05 * numpy_rng("test sound", key).standard_normal(count)
    samples = np.round(sound * 32767).astype(np.int16)
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return (samples / 32768).astype(np.float32)[None]


def sounding(folder: Path, count: int, seconds: float = 2.0) -> list[ManifestEntry]:
    """Clips of 16 frames, each with a sound file beside it."""
    world = make_world(folder, count, frames=16)
    for key, entry in enumerate(world):
        make_sound(folder / f"{entry.id}.wav", key, seconds)
    return [replace(entry, audio=folder / f"{entry.id}.wav") for entry in world]


def batch_of(path: Path, settings: Recipe):
    """All clips of a cache in one batch, in order of id."""
    cache = open_cache(path)
    everything = settings.model_copy(
        update={"train": settings.train.model_copy(update={"batch_size": len(cache)})}
    )
    batch = Loader(cache, everything).batch(0)
    order = sorted(range(len(batch.ids)), key=batch.ids.__getitem__)
    return batch, order


# Sound


def test_sound_is_cut_to_the_clip_and_encoded(tmp_path: Path) -> None:
    world = sounding(tmp_path, 3)
    heard = make_sound(tmp_path / "clip001.wav", 7, 2.0)
    # One clip begins later: its sound does as well.
    world[1] = replace(world[1], start=0.5, end=1.75)
    report = build_cache(recipe(), world, tmp_path / "cache")
    assert "3 clips have sound, 0 are silent" in report.lines()
    cache = open_cache(tmp_path / "cache")
    assert cache.verify() == []
    encoder = load_audio_tokenizer(tmp_path / "cache" / "audio_tokenizer")
    seconds = 9 / FPS
    begin = round(0.5 * RATE)
    wanted = encoder.encode(
        torch.from_numpy(heard[None, :, begin : begin + round(seconds * RATE)].copy()), RATE
    )[0]
    (found,) = cache.sounds([1])
    assert found is not None
    torch.testing.assert_close(torch.from_numpy(found[0].astype(np.float32)), wanted, rtol=2**-10, atol=1e-3)

    batch, order = batch_of(tmp_path / "cache", recipe())
    sound = batch.latents["audio"]
    assert sound.x_BFHWC.shape == (3, 18, 1, 1, 8)  # 1.125 s of 16 a second
    torch.testing.assert_close(sound.x_BFHWC[order[1], :, 0, 0], wanted, rtol=2**-10, atol=1e-3)
    torch.testing.assert_close(sound.seconds_BF, ((torch.arange(18) + 0.5) / 16).expand(3, -1))
    assert torch.equal(sound.span_BF2[:, 1:, 0], sound.span_BF2[:, :-1, 1])
    assert (sound.scene_BF.unique().tolist(), sound.pixels, sound.present_B) == ([0], 0, None)
    assert batch.video.x_BFHWC.shape == (3, 3, 4, 4, 12)


def test_a_track_of_the_clips_own_file_is_taken_without_being_named(tmp_path: Path) -> None:
    time_N = np.arange(2 * RATE) / RATE
    tone = (0.5 * np.sin(2 * np.pi * 440 * time_N)).astype(np.float32)[None]
    world = sounding(tmp_path, 2)
    frames = read_clip(world[0].path).video_FHW3
    write_video(tmp_path / "own.mp4", frames, FPS, sound=tone, sample_rate=RATE)
    own = ManifestEntry("own", tmp_path / "own.mp4", "with a track")
    other = ManifestEntry("other", world[0].path, "the same, told apart", audio=tmp_path / "tone.wav")
    with wave.open(str(other.audio), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((tone[0] * 32767).astype(np.int16).tobytes())
    build_cache(recipe(), [*world, own, other], tmp_path / "cache")
    cache = open_cache(tmp_path / "cache")
    track, named = (
        torch.from_numpy(parts[0].astype(np.float32))
        for parts in cache.sounds([cache.ids.index("own"), cache.ids.index("other")])
        if parts is not None
    )
    # AAC has its losses, but the tone and its place are there.
    assert torch.corrcoef(torch.stack([track.flatten(), named.flatten()]))[0, 1] > 0.98


def test_silent_clips_stay_and_are_never_made_again(tmp_path: Path) -> None:
    world = sounding(tmp_path, 3)
    world[1] = replace(world[1], audio=None)
    report = build_cache(recipe(), world, tmp_path / "cache")
    assert (report.encoded, report.skipped.skipped) == (3, 0)
    assert "2 clips have sound, 1 are silent" in report.lines()
    batch, order = batch_of(tmp_path / "cache", recipe())
    sound = batch.latents["audio"]
    assert sound.present_B is not None
    assert sound.present_B[order].tolist() == [True, False, True]
    assert not sound.x_BFHWC[order[1]].any()
    again = build_cache(recipe(), world, tmp_path / "cache")
    assert (again.encoded, again.kept) == (0, 3)
    assert "2 clips have sound, 1 are silent" in again.lines()


def test_sound_that_ends_early_is_followed_by_silence(tmp_path: Path) -> None:
    world = sounding(tmp_path, 2)
    heard = make_sound(world[0].audio or Path(), 3, 0.5)
    report = build_cache(recipe(), world, tmp_path / "cache")
    assert report.ends_early == 1
    assert "the sound of 1 clips ends before the picture: silence follows" in report.lines()
    encoder = load_audio_tokenizer(tmp_path / "cache" / "audio_tokenizer")
    padded = np.pad(heard, ((0, 0), (0, 9 * RATE // 8 - heard.shape[1])))
    (found, _) = open_cache(tmp_path / "cache").sounds([0, 1])
    assert found is not None
    wanted = encoder.encode(torch.from_numpy(padded[None]), RATE)[0]
    torch.testing.assert_close(torch.from_numpy(found[0].astype(np.float32)), wanted, rtol=2**-10, atol=1e-3)


def test_sound_alone_is_sorted_by_its_length(tmp_path: Path) -> None:
    settings = recipe(
        bucketing={"enabled": True, "buckets": [(32, 32)], "frames": [5, 9]},
        train={"batch_size": 2},
        plan={"modalities": ["audio"]},
    )
    entries = []
    for key, seconds in enumerate((2.0, 1.2, 0.7, 0.65, 0.2)):
        make_sound(tmp_path / f"s{key}.wav", key, seconds)
        entries.append(ManifestEntry(f"s{key}", tmp_path / f"s{key}.wav", f"a sound {key}"))
    report = build_cache(settings, entries, tmp_path / "cache")
    assert [problem.kind for problem in report.skipped] == ["too short"]
    cache = open_cache(tmp_path / "cache")
    assert cache.verify() == []
    assert not cache.has_video
    assert {str(b): rows.tolist() for b, rows in cache.buckets.items()} == {
        "sound-5": [2, 3],
        "sound-9": [0, 1],
    }
    assert Bucket.parse("sound-9") == Bucket(0, 0, 9)
    loader = Loader(cache, settings)
    for n in range(4):
        batch = loader.batch(n)
        assert set(batch.latents) == {"audio"}
        assert batch.latents["audio"].x_BFHWC.shape[1:] in ((10, 1, 1, 8), (18, 1, 1, 8))
    assert sum(line.clips for line in loader.report()) == 4
    with pytest.raises(UserError, match="no clip can be used: all are sound alone"):
        Loader(cache, recipe(bucketing=settings.bucketing.model_dump()))
    again = build_cache(settings, entries, tmp_path / "cache")
    assert (again.encoded, again.kept) == (0, 4)
    with pytest.raises(UserError, match="holds sound alone"):
        cache.tokenizer()
    clip = make_world(tmp_path / "clips", 1, frames=16)
    with pytest.raises(UserError, match="holds sound alone, and the manifest has pictures"):
        build_cache(settings, [*entries, *clip], tmp_path / "cache")


def test_sound_alone_beside_clips_waits_for_a_recipe_that_hears(tmp_path: Path) -> None:
    world = sounding(tmp_path, 3)
    alone = ManifestEntry("alone", tmp_path / "clip000.wav", "a sound")
    build_cache(recipe(), [*world, alone], tmp_path / "cache")
    deaf = recipe(audio={"enabled": False})
    loader = Loader(open_cache(tmp_path / "cache"), deaf)
    assert [(line.shape, line.dropped) for line in loader.report()] == [("sound-9", 1), ("32x32x9", 0)]
    assert "alone" not in {id_ for n in range(6) for id_ in loader.batch(n).ids}
    assert set(loader.batch(0).latents) == {"video"}
    report = build_cache(deaf, [world[0], alone], tmp_path / "deaf")
    assert "audio.enabled" in str(report.skipped.items[0])


@pytest.mark.parametrize(
    ("modalities", "used", "dropped"),
    [
        (["video", "audio"], {"clip000", "clip001", "silent"}, {"sound-9": 2}),
        (["video"], {"clip000", "clip001", "silent"}, {"sound-9": 2}),
        (["audio"], {"clip000", "clip001", "alone0", "alone1"}, {"32x32x9": 1}),
    ],
)
def test_the_plan_says_which_clips_of_a_mixed_cache_are_used(
    modalities: list[str], used: set[str], dropped: dict[str, int], tmp_path: Path
) -> None:
    world = sounding(tmp_path, 3)
    world[2] = replace(world[2], id="silent", audio=None)
    world += [ManifestEntry(f"alone{k}", tmp_path / f"clip00{k}.wav", "a sound") for k in range(2)]
    settings = recipe(plan={"modalities": modalities}, train={"batch_size": 1})
    build_cache(settings, world, tmp_path / "cache")
    loader = Loader(open_cache(tmp_path / "cache"), settings)
    batches = [loader.batch(n) for n in range(12)]
    assert {id_ for batch in batches for id_ in batch.ids} == used
    assert all(set(modalities) <= set(batch.latents) for batch in batches)
    lost = [line for line in loader.report() if line.dropped]
    assert {line.shape: line.dropped for line in lost} == dropped
    assert all("plan.modalities" in line.why for line in lost)
    # The split is drawn among what is used: each side has some of it, whatever else there is.
    held = recipe(plan={"modalities": modalities}, train={"batch_size": 1, "heldout_fraction": 1e-9})
    sides = [Loader(open_cache(tmp_path / "cache"), held, split=split) for split in ("train", "heldout")]
    assert [side.clips for side in sides] == [len(used) - 1, 1]


@pytest.mark.parametrize("beside", ["audio", "reference", "mask"])
def test_what_stands_beside_is_part_of_the_fingerprint(beside: str, tmp_path: Path) -> None:
    world = sounding(tmp_path, 2)
    pictures = [
        write_video(tmp_path / f"{k}.png", np.full((1, 32, 32, 3), 255 * k, np.uint8), FPS) for k in range(2)
    ]
    if beside != "audio":
        world = [replace(entry, **{beside: pictures[0]}) for entry in world]
    settings = recipe(
        audio={"enabled": beside == "audio"},
        references={"enabled": beside == "reference"},
        masks={"enabled": beside == "mask"},
    )

    def fingerprint(entries: list[ManifestEntry]) -> str:
        build_cache(settings, entries, tmp_path / "cache")
        return Loader(open_cache(tmp_path / "cache"), settings).fingerprint()

    first = fingerprint(world)
    assert fingerprint(world) == first
    other = world[1].audio if beside == "audio" else pictures[1]
    assert fingerprint([replace(world[0], **{beside: other}), world[1]]) != first
    assert fingerprint(world) == first
    if beside == "reference":
        assert fingerprint([replace(world[0], reference_caption="a sea"), world[1]]) != first


def test_a_cache_without_sound_is_not_mixed_with_one_that_has_it(tmp_path: Path) -> None:
    world = sounding(tmp_path, 3)
    deaf = recipe(audio={"enabled": False})
    build_cache(deaf, world, tmp_path / "old")
    assert "sound" not in lance.dataset(str(tmp_path / "old" / "clips.lance")).schema.names
    assert set(Loader(open_cache(tmp_path / "old"), deaf).batch(0).latents) == {"video"}
    phrase = r"audio.enabled is false in the cache and true in the recipe \(it holds no sound\)"
    with pytest.raises(UserError, match=phrase):
        Loader(open_cache(tmp_path / "old"), recipe())
    with pytest.raises(UserError, match=phrase):
        build_cache(recipe(), world, tmp_path / "old")
    build_cache(recipe(), world, tmp_path / "new")
    with pytest.raises(UserError, match=r"audio.enabled is true in the cache and false in the recipe"):
        build_cache(deaf, world, tmp_path / "new")
    other = recipe(audio={"latents_per_second": 8.0})
    with pytest.raises(UserError, match=r"audio.latents_per_second is 16.0 in the cache and 8.0"):
        Loader(open_cache(tmp_path / "new"), other)


def test_no_sound_anywhere_is_said_before_hours_of_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not one of 2 clips has sound"):
        build_cache(recipe(), make_world(tmp_path, 2, frames=16), tmp_path / "cache")


def test_only_what_is_read_makes_a_clip_new(tmp_path: Path) -> None:
    world = sounding(tmp_path, 3)
    deaf = recipe(audio={"enabled": False})
    build_cache(recipe(), world, tmp_path / "cache")
    build_cache(deaf, world, tmp_path / "deaf")
    make_sound(world[1].audio or Path(), 99, 2.0)
    report = build_cache(recipe(), world, tmp_path / "cache")
    assert (report.encoded, report.kept) == (1, 2)
    report = build_cache(deaf, world, tmp_path / "deaf")
    assert (report.encoded, report.kept) == (0, 3)


# References


REFERENCES = {"enabled": True}


def referring(folder: Path, count: int) -> list[ManifestEntry]:
    """Clips of 16 frames with a reference of their length."""
    world = make_world(folder, count, frames=16)
    for key, entry in enumerate(world):
        make_clip(folder / f"{entry.id}_ref.mp4", 100 + key, frames=16)
    return [replace(entry, reference=folder / f"{entry.id}_ref.mp4") for entry in world]


def test_references_have_their_own_size_and_cover_the_clip(tmp_path: Path) -> None:
    settings = recipe(
        audio={"enabled": False},
        references={"enabled": True, "downscale": 2, "frame_stride": 2},
    )
    world = referring(tmp_path, 3)
    report = build_cache(settings, world, tmp_path / "cache")
    assert "3 clips have a reference to see, 0 have none" in report.lines()
    assert open_cache(tmp_path / "cache").verify() == []
    batch, order = batch_of(tmp_path / "cache", settings)
    (seen,) = batch.references["video"]
    # Frames 0, 2, 4, 6, 8 of the clip's nine: one alone and a group of four, at half the size.
    assert seen.x_BFHWC.shape == (3, 2, 2, 2, 12)
    assert seen.pixels == 16
    assert seen.pixels * seen.x_BFHWC.shape[2] == 32, "its cells cover the clip's pixels"
    assert torch.equal(seen.span_BF2, torch.tensor([[[0.0, 0.25], [0.25, 1.25]]]))
    assert (seen.scene_BF.tolist(), seen.present_B) == ([[0, 0]] * 3, None)
    pixels = read_clip(world[1].reference or "", frames=5, fps=FPS / 2, size=(16, 16)).video_FHW3
    tokens = load_tokenizer(tmp_path / "cache" / "tokenizer")
    wanted = tokens.encode(torch.from_numpy(pixels)[None])[0]
    torch.testing.assert_close(seen.x_BFHWC[order[1]], wanted, rtol=2**-10, atol=1e-3)


def test_pictures_and_clips_are_references_side_by_side(tmp_path: Path) -> None:
    settings = recipe(audio={"enabled": False}, references=REFERENCES)
    world = referring(tmp_path, 4)
    write_video(tmp_path / "picture.png", read_clip(world[0].path, frames=1).video_FHW3, FPS)
    world[1] = replace(world[1], reference=tmp_path / "picture.png", reference_caption="a still")
    world[2] = replace(world[2], reference=None)
    build_cache(settings, world, tmp_path / "cache")
    batch, order = batch_of(tmp_path / "cache", settings)
    still, moving = batch.references["video"]
    assert still.x_BFHWC.shape[1:] == (1, 4, 4, 12)
    assert moving.x_BFHWC.shape[1:] == (3, 4, 4, 12)
    for seen, has in ((still, [False, True, False, False]), (moving, [True, False, False, True])):
        assert seen.present_B is not None
        assert seen.present_B[order].tolist() == has
        assert [bool(x.any()) for x in seen.x_BFHWC[order]] == has
    assert batch.reference_captions is not None
    assert [batch.reference_captions[b] for b in order] == [None, "a still", None, None]


def test_a_still_reference_fills_a_latent_frame(tmp_path: Path) -> None:
    settings = recipe(
        audio={"enabled": False},
        references=REFERENCES,
        tokenizer={"first_alone": False},
        video={"num_frames": 8},
    )
    world = referring(tmp_path, 2)
    write_video(tmp_path / "picture.png", read_clip(world[0].path, frames=1).video_FHW3, FPS)
    world[0] = replace(world[0], reference=tmp_path / "picture.png")
    build_cache(settings, world, tmp_path / "cache")
    found, _ = open_cache(tmp_path / "cache").references([0, 1])
    assert found is not None
    held = read_clip(tmp_path / "picture.png", frames=4, fps=FPS, size=(32, 32), short="hold").video_FHW3
    tokens = load_tokenizer(tmp_path / "cache" / "tokenizer")
    wanted = tokens.encode(torch.from_numpy(held)[None])[0]
    torch.testing.assert_close(torch.from_numpy(found.astype(np.float32)), wanted, rtol=2**-10, atol=1e-3)


def test_references_bring_their_sound_when_asked(tmp_path: Path) -> None:
    settings = recipe(references={"enabled": True, "audio": True})
    world = sounding(tmp_path, 3)
    heard = make_sound(tmp_path / "said.wav", 50, 0.75)
    world[0] = replace(world[0], reference=tmp_path / "said.wav")
    tone = np.tile(np.float32(0.3) * np.sin(np.arange(2 * RATE) / 9).astype(np.float32), (1, 1))
    frames = read_clip(world[0].path).video_FHW3
    write_video(tmp_path / "film.mp4", frames, FPS, sound=tone, sample_rate=RATE)
    world[1] = replace(world[1], reference=tmp_path / "film.mp4")
    report = build_cache(settings, world, tmp_path / "cache")
    assert "2 clips have a reference to hear, 1 have none" in report.lines()
    assert open_cache(tmp_path / "cache").verify() == []
    batch, order = batch_of(tmp_path / "cache", settings)
    (seen,) = batch.references["video"]
    short, long = batch.references["audio"]
    assert seen.present_B is not None
    assert seen.present_B[order].tolist() == [False, True, False]
    assert (short.x_BFHWC.shape, long.x_BFHWC.shape) == ((3, 12, 1, 1, 8), (3, 18, 1, 1, 8))
    assert short.present_B is not None
    assert short.present_B[order].tolist() == [True, False, False]
    encoder = load_audio_tokenizer(tmp_path / "cache" / "audio_tokenizer")
    wanted = encoder.encode(torch.from_numpy(heard[None]), RATE)[0]
    torch.testing.assert_close(short.x_BFHWC[order[0], :, 0, 0], wanted, rtol=2**-10, atol=1e-3)


# Masks


def brute_force(given_PHW: np.ndarray, first_alone: bool, temporal: int, spatial: int) -> np.ndarray:
    """A latent cell is given if no pixel behind it is not: loops, and nothing of the code under test."""
    frames, height, width = given_PHW.shape
    groups = [[0]] if first_alone else []
    begin = len(groups)
    groups += [list(range(at, at + temporal)) for at in range(begin, frames, temporal)]
    found = np.ones((len(groups), height // spatial, width // spatial), bool)
    for group, members in enumerate(groups):
        for frame in members:
            for y in range(height):
                for x in range(width):
                    if not given_PHW[frame, y, x]:
                        found[group, y // spatial, x // spatial] = False
    return found


@pytest.mark.parametrize("first_alone", [True, False])
def test_a_latent_cell_is_given_only_if_all_of_it_is(first_alone: bool) -> None:
    spec = TokenizerSpec(12, 4, 4, first_alone)
    frames = 9 if first_alone else 8
    for key in range(5):
        given = numpy_rng("mask", key).random((frames, 8, 12)) > 0.004
        found = latent_mask(torch.from_numpy(given), spec, [frames]).numpy()
        assert (found == brute_force(given, first_alone, 4, 4)).all()
        assert found.any()
        assert not found.all()


def test_masks_are_grouped_as_a_causal_tokenizer_groups_frames() -> None:
    """Frames 1 to 8 given of 9, groups {0}, {1..8}: the first latent frame is not given, the second is.

    Groups of {0..7}, {8} would say the reverse.
    """
    spec = TokenizerSpec(12, 4, 8, first_alone=True)
    given = torch.ones(9, 4, 4, dtype=torch.bool)
    given[0] = False
    assert latent_mask(given, spec, [9]).flatten(1).all(dim=1).tolist() == [False, True]
    assert latent_mask(~given, spec, [9]).flatten(1).all(dim=1).tolist() == [True, False]
    # In each shot anew.
    twice = torch.cat([given, ~given])
    assert latent_mask(twice, spec, [9, 9]).flatten(1).all(dim=1).tolist() == [False, True, True, False]


def masked(folder: Path, frames: np.ndarray | None = None) -> list[ManifestEntry]:
    """Two clips of 9 frames of 48 x 32 pixels; the first has a mask, a lossless clip."""
    world = make_world(folder, 2, frames=9, width=48)
    if frames is not None:
        write_video(folder / "mask.webp", frames, FPS, quality=100)
        world[0] = replace(world[0], mask=folder / "mask.webp")
    return world


MASKED = {"audio": {"enabled": False}, "masks": {"enabled": True}}


def test_masks_follow_the_crop_of_the_frames(tmp_path: Path) -> None:
    """The centre 32 of 48 columns are taken: columns 8 to 39. White: columns 16 to 47, from frame 5 on."""
    frames = np.zeros((9, 32, 48, 3), np.uint8)
    frames[5:, :, 16:] = 255
    report = build_cache(recipe(**MASKED), masked(tmp_path, frames), tmp_path / "cache")
    assert "1 clips have a mask, 1 have none" in report.lines()
    assert open_cache(tmp_path / "cache").verify() == []
    batch, order = batch_of(tmp_path / "cache", recipe(**MASKED))
    given = batch.masks["video"]
    assert (given.shape, given.dtype) == ((2, 3, 4, 4), torch.bool)
    wanted = torch.zeros(3, 4, 4, dtype=torch.bool)
    wanted[2, :, 1:] = True  # frames 5 to 8; column 16 stands at 8 after the crop
    assert torch.equal(given[order[0]], wanted)
    assert not given[order[1]].any(), "a clip without a mask has nothing given"


def test_masks_follow_shifted_crops(tmp_path: Path) -> None:
    """Two crops at different places: the mask is the clip itself, so a white cell is a white latent."""
    settings = recipe(**MASKED, preprocess={"crop": "shifted", "num_crops": 3})
    frames = np.zeros((9, 32, 96, 3), np.uint8)
    frames[:, :, 24:72] = 255
    write_video(tmp_path / "clip.webp", frames, FPS, quality=100)
    entry = ManifestEntry("wide", tmp_path / "clip.webp", "stripes", mask=tmp_path / "clip.webp")
    build_cache(settings, [entry], tmp_path / "cache")
    cache = open_cache(tmp_path / "cache")
    tokens = load_tokenizer(tmp_path / "cache" / "tokenizer")
    kinds = set()
    for row, mask in zip(cache.rows(range(3)), cache.masks(range(3)), strict=True):
        white = row.decode(tokens).float().mean(dim=-1)[0] > 127
        cells = white.unflatten(1, (4, 8)).unflatten(0, (4, 8)).float().mean(dim=(1, 3))
        assert mask is not None
        assert torch.equal(torch.from_numpy(mask[0]), cells > 0.99)
        kinds.add(mask.tobytes())
    assert len(kinds) > 1, "the crops differ"


def test_one_picture_is_the_mask_of_all_frames_at_any_scale(tmp_path: Path) -> None:
    frames = np.zeros((1, 64, 96, 3), np.uint8)  # twice the clip
    frames[:, 32:] = 255
    world = masked(tmp_path)
    write_video(tmp_path / "mask.png", frames, FPS)
    world[0] = replace(world[0], mask=tmp_path / "mask.png")
    build_cache(recipe(**MASKED), world, tmp_path / "cache")
    batch, order = batch_of(tmp_path / "cache", recipe(**MASKED))
    given = batch.masks["video"][order[0]]
    assert given[:, 2:].all()
    assert not given[:, :2].any()


@pytest.mark.parametrize(
    ("name", "shape", "phrase"),
    [
        ("mask.webp", (9, 32, 32), "has 32x32 and the clip 48x32"),
        ("mask.webp", (9, 64, 96), "has 96x64 and the clip 48x32"),
        ("mask.webp", (7, 32, 48), r"lasts 0.875 s \(7 frames\) and the clip 1.125 s \(9\)"),
        ("mask.png", (1, 32, 32), "has 32x32 and the clip 48x32"),
    ],
)
def test_masks_that_would_be_stretched_are_refused(
    name: str, shape: tuple[int, int, int], phrase: str, tmp_path: Path
) -> None:
    world = masked(tmp_path)
    write_video(tmp_path / name, np.full((*shape, 3), 255, np.uint8), FPS, quality=100)
    world[0] = replace(world[0], mask=tmp_path / name)
    report = build_cache(recipe(**MASKED), world, tmp_path / "cache")
    assert [problem.kind for problem in report.skipped] == ["bad mask"]
    assert re.search(phrase, str(report.skipped.items[0]))
    assert open_cache(tmp_path / "cache").ids == ["clip001"]


# What is bad


def test_bad_files_beside_a_clip_cost_that_clip_and_no_other(tmp_path: Path) -> None:
    settings = recipe(references={"enabled": True}, masks={"enabled": True})
    world = sounding(tmp_path, 7)
    (tmp_path / "text.wav").write_text("not a sound")
    (tmp_path / "text.mp4").write_text("not a clip")
    write_video(tmp_path / "short.mp4", read_clip(world[0].path, frames=3).video_FHW3, FPS)
    world[1] = replace(world[1], audio=tmp_path / "text.wav")
    world[2] = replace(world[2], reference=tmp_path / "text.mp4")
    world[3] = replace(world[3], mask=tmp_path / "text.mp4")
    world[4] = replace(world[4], reference=world[4].audio)
    world[5] = replace(world[5], audio=world[6].path)  # named, and it has none
    report = build_cache(settings, world, tmp_path / "cache")
    assert open_cache(tmp_path / "cache").ids == ["clip000", "clip006"]
    lines = [str(problem) for problem in report.skipped]
    assert [line.partition(":")[0] for line in lines] == [f"clip00{i}" for i in range(1, 6)]
    for line, phrase in zip(
        lines,
        ("not a sound", "not a video", "not a video", "references.audio", "has no sound"),
        strict=True,
    ):
        assert phrase in line
        assert "\n" not in line


def test_the_manifest_names_what_stands_beside(tmp_path: Path) -> None:
    world = sounding(tmp_path, 2)
    picture = tmp_path / "m.png"
    write_video(picture, np.zeros((1, 8, 8, 3), np.uint8), FPS)
    world[0] = replace(world[0], reference=world[1].path, reference_caption="the other", mask=picture)
    write_manifest(tmp_path / "manifest.jsonl", world)
    assert '"audio": "clip000.wav"' in (tmp_path / "manifest.jsonl").read_text()
    entries, problems = read_manifest(tmp_path / "manifest.jsonl")
    assert entries == world
    assert not problems.items
    (tmp_path / "bad.jsonl").write_text(
        '{"path": "clip000.mp4", "caption": "a", "id": "1", "mask": 3}\n'
        '{"path": "clip000.mp4", "caption": "a", "id": "2", "audio": "gone.wav"}\n'
        '{"path": "clip000.mp4", "caption": "a", "id": "3", "reference_caption": "of what"}\n'
    )
    entries, problems = read_manifest(tmp_path / "bad.jsonl")
    assert entries == []
    for problem, phrase in zip(
        problems, ("mask is a number", "gone.wav does not exist", "no reference"), strict=True
    ):
        assert phrase in str(problem)


# Kill and resume

KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from test_cache_tracks import EVERYTHING, recipe
from motionloom.data.cache import build_cache
from motionloom.data.manifest import read_manifest
entries, _ = read_manifest({manifest!r})
build_cache(recipe(**EVERYTHING), entries, {out!r}, commit_seconds=0, on_progress=lambda *_: time.sleep(0.05))
"""
EVERYTHING = {"references": {"enabled": True, "downscale": 2}, "masks": {"enabled": True}}


def test_killed_while_writing_then_continued_with_all_tracks(tmp_path: Path) -> None:
    world = sounding(tmp_path, 8)
    picture = tmp_path / "mask.png"
    write_video(picture, np.full((1, 32, 32, 3), 255, np.uint8), FPS)
    world = [
        replace(entry, reference=other.path, mask=picture if number % 2 else None)
        for number, (entry, other) in enumerate(zip(world, [*world[1:], world[0]], strict=True))
    ]
    world[3] = replace(world[3], audio=None)
    write_manifest(tmp_path / "manifest.jsonl", world)
    out = tmp_path / "cache"
    code = KILLED.format(
        tests=str(Path(__file__).parent), manifest=str(tmp_path / "manifest.jsonl"), out=str(out)
    )
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
    versions, deadline = out / "clips.lance" / "_versions", time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if versions.is_dir() and len(list(versions.glob("*.manifest"))) >= 3:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    left = len(open_cache(out))
    assert 0 < left < 8
    assert open_cache(out).verify() == []
    report = build_cache(recipe(**EVERYTHING), world, out)
    assert (report.kept, report.encoded) == (left, 8 - left)
    own = {
        "tokenizer": {"name_or_path": str(out / "tokenizer")},
        "audio": {"name_or_path": str(out / "audio_tokenizer")},
    }
    build_cache(recipe(**EVERYTHING, **own), world, tmp_path / "straight")
    one, other = (
        sorted(lance.dataset(str(p / "clips.lance")).to_table().to_pylist(), key=lambda row: row["id"])
        for p in (out, tmp_path / "straight")
    )
    blobs = ("latents", "sound", "reference")
    assert [{**row, **dict.fromkeys(blobs)} for row in one] == [
        {**row, **dict.fromkeys(blobs)} for row in other
    ]
    for a, b in zip(one, other, strict=True):
        for name in blobs:
            x, y = (np.frombuffer(row[name], np.float16).astype(np.float32) for row in (a, b))
            np.testing.assert_allclose(x, y, rtol=2**-9, atol=1e-4)


def test_killed_before_the_first_commit(tmp_path: Path) -> None:
    """The moments between the files of a new cache with two tokenizers."""
    world = sounding(tmp_path, 2)
    build_cache(recipe(), world, tmp_path / "whole")
    for number, (renamed, noted) in enumerate([((), False), ((), True), (("tokenizer",), True)]):
        out = tmp_path / str(number)
        out.mkdir()
        for name in ("tokenizer", "audio_tokenizer"):
            shutil.copytree(tmp_path / "whole" / name, out / (name if name in renamed else f".{name}.new"))
        if noted:
            shutil.copy(tmp_path / "whole" / "cache.json", out)
        build_cache(recipe(), world, out)
        assert open_cache(out).verify() == []
        assert open_cache(out).identity == open_cache(tmp_path / "whole").identity
