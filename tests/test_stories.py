"""Stories in cache and loader: shots encoded alone, windows of them, unrelated clips joined, what is said of
the whole."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cached import FPS, make_clip, make_world
from cached import recipe as plain
from motionloom.config.recipe import Recipe
from motionloom.data.buckets import Bucket
from motionloom.data.cache import Cache, build_cache, open_cache
from motionloom.data.loader import Loader
from motionloom.data.manifest import ManifestEntry, Scene, read_manifest, write_manifest
from motionloom.data.media import read_clip, read_sound, write_video
from motionloom.errors import UserError
from motionloom.plans.visibility import GLOBAL
from motionloom.text import build_text_encoder, encode_scenes
from motionloom.text.base import drop_captions
from motionloom.tokenizers import load_audio_tokenizer, load_tokenizer

RATE = 16_000
AUDIO = {"enabled": True, "sample_rate": RATE, "channels": 8, "latents_per_second": 16.0}


def recipe(**sections) -> Recipe:
    """Stories of up to 21 frames at 8 a second, 1 + 4 k frames in a shot; nothing held out."""
    base = {
        "plan": {"type": "scenes"},
        "video": {"num_frames": 21},
        "tokenizer": {"first_alone": True},
        "train": {"heldout_fraction": 0.0, "batch_size": 3},
    }
    merged = {name: {**base.get(name, {}), **value} for name, value in sections.items()}
    return plain(**{**base, **merged})


def tone(key: int, seconds: float = 3.0) -> np.ndarray:
    """(1, N) float32 in step with a clip, other in every eighth of a second."""
    time_N = np.arange(round(seconds * RATE)) / RATE
    return (0.4 * np.sin(2 * np.pi * (300 + 50 * key + 40 * np.floor(8 * time_N)) * time_N)).astype(
        np.float32
    )[None]


def story(folder: Path, key: int, *starts: float, sound: bool = False) -> ManifestEntry:
    """A film of 24 frames whose shots begin there."""
    path = make_clip(folder / f"story{key}.mp4", key, frames=24)
    if sound:
        frames = read_clip(path).video_FHW3
        path = write_video(folder / f"story{key}s.mp4", frames, FPS, sound=tone(key), sample_rate=RATE)
    ends = [*starts[1:], 3.0]
    scenes = tuple(
        Scene(a, b, f"shot {i} of {key}") for i, (a, b) in enumerate(zip(starts, ends, strict=True))
    )
    return ManifestEntry(f"story{key}", path, f"all of {key}", scenes=scenes)


def take(cache: Cache, settings: Recipe, count: int) -> list:
    loader = Loader(cache, settings)
    return [loader.batch(n) for n in range(count)]


# Shots encoded alone


@pytest.mark.parametrize("first_alone", [True, False])
def test_the_closed_form_tokenizer_encodes_shot_by_shot_for_scenes(first_alone: bool, tmp_path: Path) -> None:
    settings = recipe(tokenizer={"first_alone": first_alone}, video={"num_frames": 21 if first_alone else 24})
    # Cuts before frames 7 and 17: no latent frame of four ends there.
    told = story(tmp_path, 1, 0.0, 0.875, 2.125)
    lengths = [5, 9, 1] if first_alone else [4, 8, 4]
    report = build_cache(settings, [told], tmp_path / "cache")
    assert report.unused_seconds == pytest.approx((settings.video.num_frames - sum(lengths)) / FPS)
    cache = open_cache(tmp_path / "cache")
    assert cache.verify() == []
    row = cache.row(0)
    assert row.bucket.shots == tuple(lengths)
    pixels = read_clip(told.path, frames=24, fps=FPS, size=(32, 32)).video_FHW3
    begins = [round(scene.start * FPS) for scene in told.scenes]
    tokens = load_tokenizer(tmp_path / "cache" / "tokenizer")
    alone = [
        tokens.encode(torch.from_numpy(pixels[None, begin : begin + length].copy()))[0]
        for begin, length in zip(begins, lengths, strict=True)
    ]
    torch.testing.assert_close(row.latents_FhwC, torch.cat(alone), rtol=2**-10, atol=1e-3)
    (batch,) = take(cache, settings, 1)
    assert batch.video.scene_BF[0].tolist() == [s for s, x in enumerate(alone) for _ in range(len(x))]


def test_a_cache_of_whole_clips_is_not_one_of_shots(tmp_path: Path) -> None:
    told, clips = story(tmp_path, 1, 0.0, 1.125), make_world(tmp_path / "clips", 3, frames=24)
    whole = recipe(plan={"type": "text_to_video"})
    build_cache(whole, [told], tmp_path / "whole")
    assert open_cache(tmp_path / "whole").row(0).bucket == Bucket(32, 32, 21)
    with pytest.raises(UserError, match=r"plan.type is not set in the cache and set to scenes"):
        Loader(open_cache(tmp_path / "whole"), recipe())
    # Clips of one shot are the same either way.
    build_cache(whole, clips, tmp_path / "clips" / "cache")
    assert take(open_cache(tmp_path / "clips" / "cache"), recipe(), 1)[0].video.x_BFHWC.shape[0] == 3


def test_sound_is_encoded_shot_by_shot_as_well(tmp_path: Path) -> None:
    settings = recipe(audio=AUDIO)
    told = story(tmp_path, 1, 0.0, 0.875, sound=True)  # 7 and 14 frames: 5 and 13 are kept
    build_cache(settings, [told, story(tmp_path, 2, 0.0, 0.875, sound=True)], tmp_path / "cache")
    (batch,) = take(open_cache(tmp_path / "cache"), settings, 1)
    sound, b = batch.latents["audio"], batch.ids.index("story1")
    assert sound.x_BFHWC.shape == (3, 10 + 26, 1, 1, 8)
    assert sound.scene_BF[0].tolist() == [0] * 10 + [1] * 26
    # Seconds run on over the cut: 5 frames last 0.625 s.
    wanted = torch.cat([(torch.arange(10) + 0.5) / 16, 0.625 + (torch.arange(26) + 0.5) / 16])
    torch.testing.assert_close(sound.seconds_BF[b], wanted)
    # What is heard in the second shot is what belongs to its frames: from 0.875 s of the film on.
    encoder = load_audio_tokenizer(tmp_path / "cache" / "audio_tokenizer")
    first = encoder.encode(torch.from_numpy(tone(1)[None, :, : 10 * RATE // 16].copy()), RATE)[0]
    begin = round(0.875 * RATE)
    second = encoder.encode(torch.from_numpy(tone(1)[None, :, begin : begin + 26 * RATE // 16].copy()), RATE)[
        0
    ]
    heard = sound.x_BFHWC[b, :, 0, 0]
    for got, asked in ((heard[:10], first), (heard[10:], second)):
        assert torch.corrcoef(torch.stack([got.flatten(), asked.flatten()]))[0, 1] > 0.95  # AAC's losses


def test_windows_of_one_shot_have_one_scene_in_picture_and_sound(tmp_path: Path) -> None:
    """Whichever shot of its story a window is: 5 frames, or 13 that last longer than the story's first."""
    settings = recipe(audio=AUDIO, stories={"shots": 1}, plan={"modalities": ["video", "audio"]})
    build_cache(settings, [story(tmp_path, key, 0.0, 0.625, sound=True) for key in range(3)], tmp_path / "c")
    seen = set()
    for batch in take(open_cache(tmp_path / "c"), settings, 4):
        assert {len(captions) for captions in batch.captions} == {1}
        sound = batch.latents["audio"]
        seen.add(sound.x_BFHWC.shape[1])
        assert not batch.video.scene_BF.any()
        assert not sound.scene_BF.any()
    assert seen == {10, 26}


def test_clips_encoded_as_a_whole_keep_the_scenes_of_their_sound(tmp_path: Path) -> None:
    settings = recipe(audio=AUDIO, plan={"type": "text_to_video"})
    build_cache(settings, [story(tmp_path, 1, 0.0, 0.875, sound=True)], tmp_path / "c")
    (batch,) = take(open_cache(tmp_path / "c"), settings, 1)
    # 0.875 s of 16 latents a second: the 14th ends there.
    assert batch.latents["audio"].scene_BF[0].tolist() == [0] * 14 + [1] * 28


# References beside shots


@pytest.mark.parametrize("stride", [1, 2])
def test_references_lose_what_the_shots_lose(stride: int, tmp_path: Path) -> None:
    """Shots from frames 0, 7, 17 on, of 5, 9 and 1 frames: the reference shows these moments alone."""
    settings = recipe(references={"enabled": True, "frame_stride": stride})
    told = story(tmp_path, 1, 0.0, 0.875, 2.125)
    other = make_clip(tmp_path / "other.mp4", 9, frames=24)
    build_cache(settings, [replace(told, reference=other)], tmp_path / "cache")
    cache = open_cache(tmp_path / "cache")
    assert cache.row(0).bucket.shots == (5, 9, 1)
    kept = [*range(5), *range(7, 16), 17][::stride]
    kept = kept[: 1 + (len(kept) - 1) // 4 * 4]  # as many as fill latent frames
    assert any(frame > 5 for frame in kept)
    pixels = read_clip(other, frames=24, fps=FPS, size=(32, 32)).video_FHW3[kept]
    wanted = load_tokenizer(tmp_path / "cache" / "tokenizer").encode(torch.from_numpy(pixels)[None])[0]
    (found,) = cache.references([0])
    assert found is not None
    torch.testing.assert_close(torch.from_numpy(found.astype(np.float32)), wanted, rtol=2**-10, atol=1e-3)


def test_references_end_where_they_end(tmp_path: Path) -> None:
    """In the second shot, before it, or at once as a picture does."""
    settings = recipe(references={"enabled": True})
    told = story(tmp_path, 1, 0.0, 0.875, 2.125)
    entries, frames = [], {"amid": 13, "before": 6, "still": 1}
    for name, count in frames.items():
        pixels = read_clip(told.path, frames=count).video_FHW3
        path = write_video(tmp_path / f"{name}.{'png' if count == 1 else 'mp4'}", pixels, FPS)
        entries.append(replace(told, id=name, reference=path))
    build_cache(settings, entries, tmp_path / "cache")
    cache = open_cache(tmp_path / "cache")
    found = dict(zip(cache.ids, cache.references(range(3)), strict=True))
    # 5 frames and 6 of the second shot fill 9; 5 of the first; a still is 1.
    assert {name: len(x) for name, x in found.items() if x is not None} == {
        "amid": 3,
        "before": 2,
        "still": 1,
    }


def test_references_of_several_files_run_through_all_of_them(tmp_path: Path) -> None:
    """The second scene begins at 0.5 s of its own file, and at 0.75 s of the story."""
    settings = recipe(references={"enabled": True}, stories={"frames": 5})
    paths = [make_clip(tmp_path / f"part{key}.mp4", key, frames=16) for key in range(2)]
    scenes = (Scene(0.0, 0.75, "one", paths[0]), Scene(0.5, 2.0, "two", paths[1]))
    other = make_clip(tmp_path / "other.mp4", 9, frames=24)
    build_cache(
        settings, [ManifestEntry("story", paths[0], "all", scenes=scenes, reference=other)], tmp_path / "c"
    )
    cache = open_cache(tmp_path / "c")
    pixels = read_clip(other, frames=24, fps=FPS, size=(32, 32)).video_FHW3[[*range(5), *range(6, 10)]]
    wanted = load_tokenizer(tmp_path / "c" / "tokenizer").encode(torch.from_numpy(pixels)[None])[0]
    (found,) = cache.references([0])
    assert found is not None
    torch.testing.assert_close(torch.from_numpy(found.astype(np.float32)), wanted, rtol=2**-10, atol=1e-3)


def test_the_sound_of_references_follows_the_shots(tmp_path: Path) -> None:
    settings = recipe(audio=AUDIO, references={"enabled": True, "audio": True})
    told = story(tmp_path, 1, 0.0, 0.875, sound=True)  # 7 and 14 frames: 5 and 13 are kept
    build_cache(settings, [replace(told, reference=told.path)], tmp_path / "cache")
    cache = open_cache(tmp_path / "cache")
    heard = read_sound(told.path, RATE)
    begin = round(0.875 * RATE)
    cut = np.concatenate([heard[:, : 5 * RATE // 8], heard[:, begin : begin + 13 * RATE // 8]], axis=1)
    encoder = load_audio_tokenizer(tmp_path / "cache" / "audio_tokenizer")
    wanted = encoder.encode(torch.from_numpy(cut[None]), RATE)[0]
    (found,) = cache.reference_sounds([0])
    assert found is not None
    torch.testing.assert_close(torch.from_numpy(found.astype(np.float32)), wanted, rtol=2**-10, atol=2e-3)


def test_stories_from_several_files(tmp_path: Path) -> None:
    settings = recipe(stories={"frames": 9}, audio=AUDIO)
    scenes = []
    for key, frames in enumerate((9, 16, 6)):
        path = make_clip(tmp_path / f"part{key}.mp4", key, frames=frames)
        seen = read_clip(path).video_FHW3
        if key != 1:  # one of the three is silent
            write_video(path, seen, FPS, sound=tone(key)[:, : frames * RATE // 8], sample_rate=RATE)
        scenes.append(Scene(0.0 if key != 1 else 0.5, frames / FPS, f"part {key}", path))
    told = ManifestEntry("story", scenes[0].path or Path(), "all parts", scenes=tuple(scenes))
    write_manifest(tmp_path / "manifest.jsonl", [told])
    (read,), problems = read_manifest(tmp_path / "manifest.jsonl")
    assert read == told
    assert not problems.items
    report = build_cache(settings, [told], tmp_path / "cache")
    assert report.unused_seconds == pytest.approx(4 / 8), "3 of the second's frames and 1 of the third's"
    cache = open_cache(tmp_path / "cache")
    assert cache.verify() == []
    row = cache.row(0)
    assert (row.bucket.shots, row.captions) == ((9, 9, 5), ["part 0", "part 1", "part 2"])
    tokens = load_tokenizer(tmp_path / "cache" / "tokenizer")
    pixels = [
        read_clip(scene.path or "", start=scene.start, frames=n, fps=FPS, size=(32, 32)).video_FHW3
        for scene, n in zip(told.scenes, (9, 9, 5), strict=True)
    ]
    alone = torch.cat([tokens.encode(torch.from_numpy(p)[None])[0] for p in pixels])
    torch.testing.assert_close(row.latents_FhwC, alone, rtol=2**-10, atol=1e-3)
    (parts,) = cache.sounds([0])
    assert parts is not None
    assert [len(part) for part in parts] == [18, 18, 10]
    assert report.ends_early == 1, "a silent part of a story that sounds"
    # A change of any of its files is seen.
    make_clip(scenes[2].path or Path(), 9, frames=6)
    assert build_cache(settings, [told], tmp_path / "cache").encoded == 1
    # Without a length for shots the story is cut to the clip's length.
    build_cache(recipe(), [told], tmp_path / "short")
    assert open_cache(tmp_path / "short").row(0).bucket.shots == (9, 9, 1)


# Windows


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Four stories of five shots of 5 frames (the last of 4 is cut to 1), one of two, and a single clip."""
    root = tmp_path_factory.mktemp("long")
    entries = [story(root, key, 0.0, 0.625, 1.25, 1.875, 2.5) for key in range(4)]
    entries.append(story(root, 4, 0.0, 0.625))
    entries.append(replace(story(root, 5, 0.0), scenes=()))
    build_cache(recipe(stories={"frames": 5}, text_encoder={"trainable": False}), entries, root / "cache")
    return open_cache(root / "cache")


def frozen(**stories) -> Recipe:
    return recipe(stories={"frames": 5, **stories}, text_encoder={"trainable": False})


def test_long_stories_are_used_by_windows_of_consecutive_shots(long: Cache) -> None:
    assert {str(b): len(rows) for b, rows in long.buckets.items()} == {
        "32x32x5+5": 1,
        "32x32x5+5+5+5+1": 4,
        "32x32x21": 1,
    }
    loader = Loader(long, frozen(shots=3))
    seen: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for n in range(80):
        batch = loader.batch(n)
        shapes = {x.shape for x in batch.video.x_BFHWC}
        assert len(shapes) == 1
        for b, (id_, captions) in enumerate(zip(batch.ids, batch.captions, strict=True)):
            seen[id_, tuple(captions)] += 1
            numbers = [int(caption.split()[1]) for caption in captions if caption.startswith("shot")]
            assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else True
            first = numbers[0] if len(numbers) == 3 else 0
            (whole,) = long.rows([long.ids.index(id_)])
            frames = batch.video.x_BFHWC.shape[1]
            assert torch.equal(batch.video.x_BFHWC[b], whole.latents_FhwC[2 * first : 2 * first + frames]), (
                "a slice of what was cached"
            )
        assert batch.video.seconds_BF[0, 0] == 0.5 / FPS, "a window begins at 0"
    stories = {
        (f"story{k}", tuple(f"shot {first + i} of {k}" for i in range(3)))
        for k in range(4)
        for first in range(3)
    }
    short = {("story4", ("shot 0 of 4", "shot 1 of 4")), ("story5", ("all of 5",))}
    assert set(seen) == stories | short, "every window of long stories; short ones and clips are whole"
    counts = [seen[key] for key in stories]
    assert max(counts) - min(counts) <= 2, "each once per epoch"
    told = {line.shape: line for line in loader.report()}
    assert told["32x32x5+5+5+5+1"].why == "used by 3 windows each, of at most 3 shots"
    assert (told["32x32x5+5+5"].clips, told["32x32x5+5+1"].clips) == (8, 4)


def test_windows_keep_to_the_budget_and_say_what_they_lose(long: Cache) -> None:
    loader = Loader(long, frozen(shots=3, max_latent_frames=4))
    frames = {loader.batch(n).video.x_BFHWC.shape[1] for n in range(40)}
    assert frames == {4, 3}
    told = {line.shape: line for line in loader.report()}
    assert told["32x32x5+5+5+5+1"].why == "used by 4 windows each, of at most 2 shots"
    assert told["32x32x21"].dropped == 1
    assert told["32x32x21"].why == "no shot fits stories.max_latent_frames 4"
    tiny = Loader(long, frozen(shots=3, max_latent_frames=1))
    lost = {line.shape: line for line in tiny.report()}["32x32x5+5+5+5+1"]
    assert "4 shots of each do not fit" in lost.why


def test_windows_restart_anywhere_and_ranks_share(long: Cache) -> None:
    settings = frozen(shots=3)
    straight = list(itertools.islice(Loader(long, settings).batches(), 12))
    again = list(itertools.islice(Loader(long, settings).batches(5), 7))
    for a, b in zip(straight[5:], again, strict=True):
        assert (a.ids, a.captions) == (b.ids, b.captions)
        assert torch.equal(a.video.x_BFHWC, b.video.x_BFHWC)
    plain_print = Loader(long, frozen()).fingerprint()
    assert Loader(long, settings).fingerprint() != plain_print


def test_heldout_stories_are_seen_by_windows_too(long: Cache) -> None:
    settings = frozen(shots=3)
    held = settings.model_copy(update={"train": settings.train.model_copy(update={"heldout_fraction": 0.5})})
    train, heldout = Loader(long, held), Loader(long, held, split="heldout")
    seen = {(id_, tuple(c)) for b in heldout.batches() for id_, c in zip(b.ids, b.captions, strict=True)}
    assert seen
    trained = {id_ for n in range(40) for id_ in train.batch(n).ids}
    assert not trained & {id_ for id_, _ in seen}
    assert sum(line.batches for line in heldout.report()) == len(heldout)


# What is said of the whole


def test_the_caption_of_the_whole_stands_in_front(long: Cache) -> None:
    settings = frozen(shots=3, global_caption=True)
    encoder = build_text_encoder(settings.text_encoder, settings.seed)
    loader = Loader(long, settings)
    kinds = set()
    for n in range(12):
        batch = loader.batch(n)
        assert batch.global_captions is not None
        for id_, whole, scenes in zip(batch.ids, batch.global_captions, batch.captions, strict=True):
            assert whole == ("" if len(scenes) == 1 else f"all of {id_.removeprefix('story')}")
            kinds.add(bool(whole))
        text, empty = batch.text, batch.empty_text
        assert text is not None
        assert empty is not None
        wanted = encode_scenes(encoder, batch.captions, batch.global_captions)
        assert torch.equal(text.valid_BL, wanted.valid_BL)
        assert torch.equal(text.scene_BL, wanted.scene_BL)
        torch.testing.assert_close(text.x_BLC[text.valid_BL], wanted.x_BLC[wanted.valid_BL])
        length = encoder.max_length
        assert (text.scene_BL[0, :length] == GLOBAL).all()
        assert text.scene_BL[0, length:].unique().tolist() == list(range(len(batch.captions[0])))
        said = [whole != "" for whole in batch.global_captions]
        assert text.valid_BL[:, :length].any(dim=1).tolist() == said
        # Dropped: the scenes say nothing, and nothing is said of the whole.
        dropped = drop_captions(text, empty, torch.tensor([True, False, True]))
        assert not dropped.valid_BL[0, :length].any()
        assert torch.equal(dropped.x_BLC[0][dropped.valid_BL[0]], empty.x_BLC[0][empty.valid_BL[0]])
        assert torch.equal(dropped.valid_BL[1], text.valid_BL[1])
        assert torch.equal(dropped.x_BLC[1], text.x_BLC[1])
    assert kinds == {True, False}
    assert Loader(long, frozen(shots=3)).batch(0).global_captions is None


def test_captions_of_references_are_context() -> None:
    encoder = build_text_encoder(plain().text_encoder, 0)
    text = encode_scenes(encoder, [["a", "b"], ["c"]], ["whole", ""], [None, "a still"])
    length = encoder.max_length
    assert text.context_BL is not None
    assert text.context_BL[0].tolist() == [True] * length + [False] * 3 * length
    assert text.scene_BL[0, length:].tolist() == [GLOBAL] * length + [0] * length + [1] * length
    said = text.valid_BL.unflatten(1, (4, length)).any(dim=2).tolist()
    assert said == [[False, True, True, True], [True, False, True, False]]
    alone, valid = encoder.encode(["a still"])
    assert torch.equal(text.x_BLC[1, :length][text.valid_BL[1, :length]], alone[0][valid[0]])
    assert encode_scenes(encoder, [["a"]]).context_BL is None


# Clips joined


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Ten clips of 9 and ten of 5 frames, six wide ones of 9, one story; every third clip is silent."""
    root = tmp_path_factory.mktemp("single")
    entries = []
    for key in range(26):
        wide, short = key >= 20, 10 <= key < 20
        frames, width = (6 if short else 9), (64 if wide else 32)
        path = make_clip(root / f"c{key:02d}.mp4", key, frames=frames, width=width)
        if key % 3:
            seen = read_clip(path).video_FHW3
            write_video(path, seen, FPS, sound=tone(key, frames / FPS), sample_rate=RATE)
        entries.append(ManifestEntry(f"c{key:02d}", path, f"clip {key}"))
    entries.append(story(root, 50, 0.0, 0.625))
    build_cache(joining((2, 4)), entries, root / "cache")
    return open_cache(root / "cache")


def joining(join: tuple[int, int], **stories) -> Recipe:
    return recipe(
        stories={"join": join, "frames": 9, **stories},
        bucketing={"enabled": True, "buckets": [(32, 32), (64, 32)], "frames": [5, 9]},
        audio=AUDIO,
    )


def test_unrelated_clips_are_laid_end_to_end_as_shots(single: Cache) -> None:
    settings = joining((2, 4), max_latent_frames=8)
    counts, shapes, used = set(), set(), Counter()
    for batch in take(single, settings, 60):
        video, sound = batch.video, batch.latents["audio"]
        assert len(batch.ids) == 3
        ids = [sample.split("+") for sample in batch.ids]
        shots = len(ids[0])
        counts.add(shots)
        shapes.add(tuple(video.x_BFHWC.shape[1:]))
        assert video.x_BFHWC.shape[1] <= 8
        for b, members in enumerate(ids):
            assert len(set(members)) == shots, "no clip twice in a sample"
            used.update(members)
            rows = single.rows([single.ids.index(id_) for id_ in members])
            assert torch.equal(video.x_BFHWC[b], torch.cat([row.latents_FhwC for row in rows]))
            assert batch.captions[b] == [f"clip {int(id_[1:])}" for id_ in members]
            wanted = [s for s, row in enumerate(rows) for _ in range(len(row.latents_FhwC))]
            assert video.scene_BF[b].tolist() == wanted
            # Seconds run on, without a gap, over every cut, in picture and sound.
            for track in (video, sound):
                spans = track.span_BF2[b]
                torch.testing.assert_close(spans[1:, 0], spans[:-1, 1])
                assert spans[0, 0] == 0
                torch.testing.assert_close(
                    spans[-1, 1], torch.tensor(sum(r.bucket.frames for r in rows) / FPS)
                )
            silent = any(int(id_[1:]) % 3 == 0 for id_ in members)
            present = True if sound.present_B is None else bool(sound.present_B[b])
            assert present == (not silent), "a silent piece: the sample has no sound"
            assert bool(sound.x_BFHWC[b].any()) == present
            for shot in range(shots):
                ends = [t.span_BF2[b][t.scene_BF[b] == shot][-1, 1] for t in (video, sound)]
                torch.testing.assert_close(*ends)
    assert counts == {2, 3, 4}
    assert len(shapes) > 4, "lengths and sizes vary"
    assert {shape[2] for shape in shapes} == {4, 8}
    assert len(used) == 26, "every clip of one shot has its turn"


def test_joined_batches_are_a_function_of_their_number(single: Cache) -> None:
    settings = joining((2, 3))
    straight = [batch.ids for batch in itertools.islice(Loader(single, settings).batches(), 10)]
    again = [batch.ids for batch in itertools.islice(Loader(single, settings).batches(6), 4)]
    assert straight[6:] == again
    assert len({tuple(ids) for ids in straight}) == 10
    small = settings.model_copy(update={"train": settings.train.model_copy(update={"batch_size": 2})})
    both = [Loader(single, small, rank, 2) for rank in range(2)]
    for n in range(6):
        one, other = (loader.batch(n) for loader in both)
        assert one.video.x_BFHWC.shape == other.video.x_BFHWC.shape
        assert one.ids != other.ids
    names = Loader(single, settings).examples()
    assert all(name == _shape(batch) for name, batch in names.items())


def _shape(batch) -> str:
    frames = [int(n) for n in batch.video.scene_BF[0].bincount()]
    height, width = (8 * n for n in batch.video.x_BFHWC.shape[2:4])
    return f"{width}x{height}x" + "+".join(str(1 + 4 * (n - 1)) for n in frames)


def test_what_cannot_be_joined_is_counted(single: Cache) -> None:
    lines = Loader(single, joining((2, 4), max_latent_frames=5)).report()
    told = {(line.shape, line.dropped > 0): line for line in lines}
    assert told["32x32x5", False].clips == 10
    lost = told["32x32x9", True]
    assert (lost.clips, lost.dropped) == (10, 10)
    assert lost.why == "2 of them exceed stories.max_latent_frames 5"
    shots = next(line for line in lines if "+" in line.shape)
    assert (shots.dropped, shots.why) == (1, "have several shots, and stories.join takes clips of one")
    assert sum(line.clips for line in lines) == 27
    with pytest.raises(UserError, match=r"stories.join \[2, 4\]: no clip can be joined"):
        Loader(single, joining((2, 4), max_latent_frames=3))


def test_joined_clips_are_held_out_in_order(single: Cache) -> None:
    settings = joining((2, 3))
    held = settings.model_copy(update={"train": settings.train.model_copy(update={"heldout_fraction": 0.4})})
    heldout = Loader(single, held, split="heldout")
    seen = [sample.split("+") for batch in heldout.batches() for sample in batch.ids]
    assert all(len(members) == 3 for members in seen)
    drawn = {id_ for n in range(60) for s in Loader(single, held).batch(n).ids for id_ in s.split("+")}
    assert not drawn & {id_ for members in seen for id_ in members}
    assert seen == [sample.split("+") for batch in heldout.batches() for sample in batch.ids]


@pytest.mark.parametrize(
    ("sections", "phrase"),
    [
        (
            {"plan": {"type": "text_to_video"}, "stories": {"shots": 3}},
            "stories.shots is for plan.type scenes",
        ),
        ({"stories": {"join": (3, 2)}}, r"stories.join \[3, 2\] is not \[least, most\]"),
        ({"stories": {"join": (0, 2)}}, r"stories.join \[0, 2\] is not"),
        ({"stories": {"frames": 6}}, "stories.frames 6 does not fill .*: use 5 or 9"),
        ({"stories": {"join": (2, 2)}, "references": {"enabled": True}}, "no place for the reference"),
        (
            {"stories": {"max_latent_frames": 3}, "references": {"enabled": True}},
            "stories.max_latent_frames leaves no place for the reference",
        ),
        ({"references": {"enabled": True, "audio": True}}, "references.audio is true but audio.enabled"),
        (
            {"references": {"enabled": True, "downscale": 4}, "video": {"width": 48, "num_frames": 9}},
            "downscale 4",
        ),
    ],
)
def test_recipes_that_do_not_fit_together(sections: dict, phrase: str) -> None:
    with pytest.raises(ValueError, match=phrase):
        recipe(**sections)
