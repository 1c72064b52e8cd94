"""The latent cache: what it holds, what it refuses, and that a killed run can go on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import lance
import numpy as np
import pytest
import torch

from cached import FPS, make_clip, make_world, recipe
from motionloom.data.buckets import Bucket, closest_size, longest_fit
from motionloom.data.cache import build_cache, open_cache, reader
from motionloom.data.cache.build import require_folder
from motionloom.data.manifest import ManifestEntry, Scene, read_entry
from motionloom.errors import UserError
from motionloom.text import build_text_encoder
from motionloom.tokenizers import TokenizerSpec, latent_scenes, load_tokenizer


def rows_of(path: Path) -> list[dict]:
    """Everything in the table of clips, in order of id."""
    return sorted(lance.dataset(str(path / "clips.lance")).to_table().to_pylist(), key=lambda row: row["id"])


def assert_same_rows(one: Path, other: Path) -> None:
    """Equal in all; latents to their last bits, which a matrix product over another batch may move."""
    left, right = rows_of(one), rows_of(other)
    assert [{**row, "latents": 0} for row in left] == [{**row, "latents": 0} for row in right]
    for a, b in zip(left, right, strict=True):
        x, y = (np.frombuffer(row["latents"], np.float16).astype(np.float32) for row in (a, b))
        np.testing.assert_allclose(x, y, rtol=2**-9, atol=1e-5)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> list[ManifestEntry]:
    return make_world(tmp_path_factory.mktemp("world"), 10)


@pytest.fixture(scope="module")
def built(world: list[ManifestEntry], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache, to be read only."""
    path = tmp_path_factory.mktemp("built") / "cache"
    build_cache(recipe(), world, path)
    return path


@pytest.fixture
def cache_path(built: Path, tmp_path: Path) -> Path:
    """A finished cache of one's own."""
    return Path(shutil.copytree(built, tmp_path / "cache"))


def test_rows_are_the_encoded_clips(world: list[ManifestEntry], built: Path) -> None:
    cache = open_cache(built)
    assert len(cache) == 10
    assert cache.ids == sorted(entry.id for entry in world)
    assert list(cache.buckets) == [Bucket(32, 32, 8)]
    assert cache.fps == FPS
    tokenizer = load_tokenizer(built / "tokenizer")
    row = cache.row(3)
    assert (row.id, row.clip, row.crop) == ("clip003", "clip003", 0)
    assert row.captions == ["a wave number 3"]
    assert row.scene_frames == [8]
    pixels = read_entry(world[3], frames=8, fps=FPS, size=(32, 32)).video_FHW3
    expected = tokenizer.encode(torch.from_numpy(pixels)[None])[0]
    torch.testing.assert_close(row.latents_FhwC, expected, rtol=2**-10, atol=1e-4)
    assert [r.id for r in cache.rows([5, 1, 5])] == ["clip005", "clip001", "clip005"]
    assert cache.verify() == []
    mean_C, std_C = cache.statistics()
    assert mean_C.abs().max() < 0.5
    assert std_C.mean().item() == pytest.approx(1.0, abs=0.35)


def test_a_second_run_does_nothing(world: list[ManifestEntry], cache_path: Path) -> None:
    before = rows_of(cache_path)
    seen = []
    report = build_cache(recipe(), world, cache_path, on_progress=lambda *step: seen.append(step))
    assert (report.encoded, report.kept, report.recaptioned) == (0, 10, 0)
    assert rows_of(cache_path) == before
    assert seen == []


def test_more_clips_are_added_and_the_tokenizer_stays(world: list[ManifestEntry], tmp_path: Path) -> None:
    build_cache(recipe(), world[:6], tmp_path / "cache")
    first = open_cache(tmp_path / "cache").identity
    report = build_cache(recipe(), world[4:], tmp_path / "cache")
    assert (report.encoded, report.kept, report.others) == (4, 2, 4)
    assert open_cache(tmp_path / "cache").identity == first
    assert len(open_cache(tmp_path / "cache")) == 10


def test_changed_source_is_encoded_again(tmp_path: Path) -> None:
    world = make_world(tmp_path / "clips", 3)
    path = tmp_path / "cache"
    build_cache(recipe(), world, path)
    before = open_cache(path).rows([0, 1, 2])
    make_clip(world[1].path, 99)
    report = build_cache(recipe(), world, path)
    assert (report.encoded, report.kept) == (1, 2)
    after = open_cache(path).rows([0, 1, 2])
    assert [torch.equal(a.latents_FhwC, b.latents_FhwC) for a, b in zip(before, after, strict=True)] == [
        True,
        False,
        True,
    ]
    world[1].path.write_bytes(b"")
    report = build_cache(recipe(), world, path)
    assert [problem.kind for problem in report.skipped] == ["empty file"]
    assert open_cache(path).ids == ["clip000", "clip002"], "the row of what is gone is gone as well"


def test_new_caption_does_not_encode_again(world: list[ManifestEntry], cache_path: Path) -> None:
    before = open_cache(cache_path).row(2).latents_FhwC
    told = [
        replace(e, caption="something else", captions=("another wording",)) if e.id == "clip002" else e
        for e in world
    ]
    report = build_cache(recipe(), told, cache_path)
    assert (report.encoded, report.kept, report.recaptioned) == (0, 10, 1)
    row = open_cache(cache_path).row(2)
    assert row.captions == ["something else"]
    assert row.wordings == ["something else", "another wording"]
    assert torch.equal(row.latents_FhwC, before)
    assert open_cache(cache_path).verify() == []


@pytest.mark.parametrize(
    ("sections", "phrase"),
    [
        ({"video": {"fps": 4.0}}, r"video\.fps is 8\.0 in the cache and 4\.0 in the recipe"),
        ({"video": {"width": 64}}, r"video\.width is 32 in the cache and 64 in the recipe"),
        ({"video": {"num_frames": 4}}, r"video\.num_frames is 8 in the cache and 4 in the recipe"),
        ({"video": {"frame_stride": 2}}, r"video\.frame_stride is 1 in the cache and 2"),
        ({"tokenizer": {"latent_d": 16}}, r"tokenizer\.latent_d is 12 in the cache and 16 in the recipe"),
        (
            {"preprocess": {"background": (0, 0, 0)}},
            r"preprocess\.background is \[255, 255, 255\] in the cache",
        ),
        ({"preprocess": {"crop": "shifted"}}, r"preprocess\.crop is center in the cache and shifted"),
        (
            {"bucketing": {"enabled": True, "buckets": [(32, 32)]}},
            r"^[^;]*bucketing\.enabled is False in the cache and True in the recipe; give",
        ),
        (
            {"tokenizer": {"whiten": 0.5}},
            r"tokenizer\.whiten is 1\.0 in the cache and 0\.5 in the recipe",
        ),
    ],
)
def test_another_recipe_is_refused(
    world: list[ManifestEntry], built: Path, sections: dict, phrase: str
) -> None:
    with pytest.raises(UserError, match=phrase):
        build_cache(recipe(**sections), world, built)
    with pytest.raises(UserError, match=phrase):
        open_cache(built).require(recipe(**sections))
    assert open_cache(built).mismatches(recipe()) == []


def test_keys_that_decide_nothing_are_free(built: Path) -> None:
    other = recipe(
        seed=99, num_workers=0, model={"depth": 2}, train={"lr": 1.0}, tokenizer={"fit_clips": 3},
        preprocess={"shift_fraction": 0.5, "seed": 3},
    )  # fmt: skip
    assert open_cache(built).mismatches(other) == []


def test_another_tokenizer_is_refused(world: list[ManifestEntry], built: Path, tmp_path: Path) -> None:
    build_cache(recipe(tokenizer={"fit_clips": 2}), world, tmp_path / "other")
    tokenizer = tmp_path / "other" / "tokenizer"
    named = recipe(tokenizer={"name_or_path": str(tokenizer)})
    with pytest.raises(UserError, match=r"the tokenizer is .* in the cache and .* in the recipe"):
        build_cache(named, world, built)
    with pytest.raises(UserError, match="the tokenizer is"):
        build_cache(recipe(), world, built, tokenizer=load_tokenizer(tokenizer))
    own = recipe(tokenizer={"name_or_path": str(built / "tokenizer")})
    assert open_cache(built).mismatches(own) == []
    wrong = recipe(tokenizer={"name_or_path": str(tokenizer), "latent_t": 2, "latent_d": 7})
    both = (
        r"latent_t is 4 in .* and 2 in .*, tokenizer.latent_d is \d+ in .* and 7 in .*: set .*latent_t=4 .*d="
    )
    with pytest.raises(UserError, match=both):
        build_cache(wrong, world, tmp_path / "wrong")


def test_foreign_and_damaged_folders_are_refused(
    world: list[ManifestEntry], cache_path: Path, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"not a cache and not empty .it holds thesis"):
        build_cache(recipe(), world, foreign)
    with pytest.raises(UserError, match=r"is not a cache .cache\.json is missing"):
        open_cache(foreign)
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="no such folder"):
        open_cache(tmp_path / "nothing")
    with pytest.raises(UserError, match="is a file"):
        build_cache(recipe(), world, foreign / "thesis.tex")

    note = cache_path / "cache.json"
    whole = note.read_text()
    note.write_text(whole[:40])
    with pytest.raises(UserError, match=r"cache\.json: is damaged"):
        open_cache(cache_path)
    note.write_text(whole.replace('"video.fps": 8.0', '"video.fps": 4.0'))
    with pytest.raises(UserError, match="edited by hand"):
        open_cache(cache_path)
    note.write_text(whole.replace('"format": 1', '"format": 9'))
    with pytest.raises(UserError, match="format 9"):
        open_cache(cache_path)
    note.unlink()
    with pytest.raises(UserError, match=r"it holds clips\.lance"):
        build_cache(recipe(), world, cache_path)
    note.write_text(whole)
    for file in (cache_path / "clips.lance" / "_versions").iterdir():
        file.write_bytes(b"junk")
    with pytest.raises(UserError, match=r"clips\.lance: cannot be read"):
        open_cache(cache_path)


class Spoiled:
    """A tokenizer that fails on one clip, as learned ones do in half precision."""

    def __init__(self, tokenizer, pixels: np.ndarray) -> None:
        self._tokenizer, self._pixels, self.spec = tokenizer, torch.from_numpy(pixels), tokenizer.spec
        self.fingerprint, self.save = tokenizer.fingerprint, tokenizer.save

    def encode(self, video_BPHW3: torch.Tensor) -> torch.Tensor:
        latents = self._tokenizer.encode(video_BPHW3)
        for i, video in enumerate(video_BPHW3):
            if torch.equal(video, self._pixels):
                latents[i, 0, 0, 0, 0] = 1e6  # finite here, infinite in half precision
        return latents


def test_latents_that_are_not_finite_are_skipped_and_listed(
    world: list[ManifestEntry], built: Path, tmp_path: Path
) -> None:
    pixels = read_entry(world[4], frames=8, fps=FPS, size=(32, 32)).video_FHW3
    spoiled = Spoiled(load_tokenizer(built / "tokenizer"), pixels)
    path = tmp_path / "cache"
    report = build_cache(recipe(), world, path, tokenizer=spoiled)
    assert [(problem.where, problem.kind) for problem in report.skipped] == [("clip004", "NaN latents")]
    assert report.encoded == 9
    assert "clip004" not in open_cache(path).ids
    listed = [json.loads(line) for line in (path / "skipped.jsonl").read_text().splitlines()]
    assert [problem["where"] for problem in listed] == ["clip004"]
    assert report.lines()[-1] == "skipped 1 of 10 clips: 1 NaN latents"
    # A tokenizer that is mended (here: the plain one, of the same fingerprint) makes up for it.
    assert build_cache(recipe(), world, path).encoded == 1
    assert_same_rows(path, built)


def test_verify_finds_what_is_wrong(cache_path: Path) -> None:
    table = lance.dataset(str(cache_path / "clips.lance")).to_table()
    rows = table.to_pylist()
    rows[0]["latents"] = np.full(2 * 4 * 4 * 12, np.nan, np.float16).tobytes()
    rows[1]["latents"] = rows[1]["latents"][:-2]
    rows[2]["captions"] = ["one", "two"]
    rows.append(rows[3])
    lance.write_dataset(
        type(table).from_pylist(rows, schema=table.schema), str(cache_path / "clips.lance"), mode="overwrite"
    )
    wrong = open_cache(cache_path).verify()
    assert [line.split(":")[0] for line in wrong] == [rows[3]["id"], *sorted(row["id"] for row in rows[:3])]


def test_bad_sources_do_not_stop_the_rest(world: list[ManifestEntry], tmp_path: Path) -> None:
    truncated = tmp_path / "truncated.mp4"
    truncated.write_bytes(world[0].path.read_bytes()[:300])
    text = tmp_path / "text.mp4"
    text.write_text("this is no video")
    short = make_clip(tmp_path / "short.mp4", 1, frames=5)
    picture = make_clip(tmp_path / "picture.png", 1, frames=1)
    bad = [
        ManifestEntry("missing", tmp_path / "missing.mp4", "x"),
        ManifestEntry("truncated", truncated, "x"),
        ManifestEntry("text", text, "x"),
        ManifestEntry("short", short, "x"),
        ManifestEntry("picture", picture, "x", kind="image"),
        ManifestEntry("late", world[0].path, "x", start=9.0),
    ]
    report = build_cache(recipe(), [*world[:2], *bad, *world[2:4]], tmp_path / "cache")
    assert report.encoded == 4
    assert {problem.where for problem in report.skipped} == {entry.id for entry in bad}
    lines = "\n".join(report.lines())
    assert (
        "short: is too short: 5 of 8 frames at 8 a second; lower video.num_frames or raise video.fps" in lines
    )
    assert "picture: is a still" in lines
    assert "skipped 6 of 10 clips" in lines
    with pytest.raises(UserError, match="not one of 6 clips can be used; the first: "):
        build_cache(recipe(), bad, tmp_path / "none")
    with pytest.raises(UserError, match="names no usable clip"):
        build_cache(recipe(), [], tmp_path / "none")


def test_a_cache_without_a_single_clip_is_an_error(
    world: list[ManifestEntry], built: Path, tmp_path: Path
) -> None:
    bad = [ManifestEntry("missing", tmp_path / "missing.mp4", "x")]
    with pytest.raises(UserError, match="not one of 1 clips could be cached; the first: missing"):
        build_cache(recipe(), bad, tmp_path / "none", tokenizer=load_tokenizer(built / "tokenizer"))
    with pytest.raises(UserError, match="holds no clip yet"):
        open_cache(tmp_path / "none")


def test_full_disk_is_one_clear_line(
    world: list[ManifestEntry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = lance.write_dataset, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise OSError("LanceError(IO): No space left on device (os error 28), /x/y.rs:190:9")
        return real(*args, **kwargs)

    monkeypatch.setattr(lance, "write_dataset", full)
    with pytest.raises(UserError, match="the disk is full; free some space and run again: it goes on"):
        build_cache(recipe(), world, tmp_path / "cache", commit_seconds=0)
    assert len(open_cache(tmp_path / "cache")) >= 1
    monkeypatch.undo()
    build_cache(recipe(), world, tmp_path / "cache")
    assert len(open_cache(tmp_path / "cache")) == 10


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from cached import recipe
from motionloom.data.cache import build_cache
from motionloom.data.manifest import read_manifest
entries, _ = read_manifest({manifest!r})
build_cache(recipe(), entries, {out!r}, commit_seconds=0, on_progress=lambda *_: time.sleep(0.05))
"""


def test_killed_while_writing_then_continued(world: list[ManifestEntry], tmp_path: Path) -> None:
    from motionloom.data.manifest import write_manifest

    write_manifest(tmp_path / "manifest.jsonl", world)
    out = tmp_path / "cache"
    code = KILLED.format(
        tests=str(Path(__file__).parent), manifest=str(tmp_path / "manifest.jsonl"), out=str(out)
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", code], env=env)
    versions, deadline = out / "clips.lance" / "_versions", time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if versions.is_dir() and len(list(versions.glob("*.manifest"))) >= 3:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    left = len(open_cache(out))
    assert 0 < left < 10
    assert open_cache(out).verify() == []
    report = build_cache(recipe(), world, out)
    assert (report.kept, report.encoded) == (left, 10 - left)
    own = recipe(tokenizer={"name_or_path": str(out / "tokenizer")})
    build_cache(own, world, tmp_path / "uninterrupted")
    assert_same_rows(out, tmp_path / "uninterrupted")
    fitted, named = (open_cache(path).identity for path in (out, tmp_path / "uninterrupted"))
    # The one notes how its tokenizer was fitted, the other was handed it.
    assert {**named.made_with, "tokenizer.whiten": 1.0} == fitted.made_with
    assert (fitted.tokenizer, fitted.spec) == (named.tokenizer, named.spec)


def test_killed_before_the_first_commit(world: list[ManifestEntry], built: Path, tmp_path: Path) -> None:
    """The moments between the files of a new cache: each leaves something that the next run can use."""
    identity = (built / "cache.json").read_text()
    for number, leftovers in enumerate(
        [("new",), ("new", "json"), ("json", "tokenizer"), ("json", "tokenizer", "data")]
    ):
        out = tmp_path / str(number)
        out.mkdir()
        if "new" in leftovers:
            shutil.copytree(built / "tokenizer", out / ".tokenizer.new")
        if "tokenizer" in leftovers:
            shutil.copytree(built / "tokenizer", out / "tokenizer")
        if "json" in leftovers:
            (out / "cache.json").write_text(identity)
        if "data" in leftovers:
            (out / "clips.lance" / "data").mkdir(parents=True)
            (out / "clips.lance" / "data" / "orphan.lance").write_bytes(b"half a file")
        build_cache(recipe(), world, out)
        assert_same_rows(out, built)


def test_many_small_commits_are_joined(world: list[ManifestEntry], tmp_path: Path) -> None:
    slow = {"commit_seconds": 0, "on_progress": lambda *_: time.sleep(0.002)}
    build_cache(recipe(), world[:8], tmp_path / "cache", **slow)
    table = lance.dataset(str(tmp_path / "cache" / "clips.lance"))
    assert (len(table.get_fragments()), len(table.versions())) == (1, 1)
    # A reader in the middle of its work keeps the files that it stands on, ...
    reading = open_cache(tmp_path / "cache")
    build_cache(recipe(), world, tmp_path / "cache", **slow)
    table = lance.dataset(str(tmp_path / "cache" / "clips.lance"))
    assert len(table.versions()) > 1
    assert len(reading.rows(range(8))) == 8
    del reading
    # ... and they are joined by the next run after it.
    build_cache(recipe(), world, tmp_path / "cache")
    assert len(lance.dataset(str(tmp_path / "cache" / "clips.lance")).get_fragments()) == 1
    assert open_cache(tmp_path / "cache").verify() == []


def test_two_writers_at_once_are_refused(world: list[ManifestEntry], cache_path: Path) -> None:
    import fcntl

    with open(cache_path / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run is writing this cache"):
            build_cache(recipe(), world, cache_path)


def test_shifted_crops(tmp_path: Path) -> None:
    wide = make_world(tmp_path / "clips", 2, width=96)
    shifted = recipe(preprocess={"crop": "shifted", "num_crops": 3})
    build_cache(shifted, wide, tmp_path / "cache")
    cache = open_cache(tmp_path / "cache")
    assert cache.ids == [f"clip00{i}__c0{c}" for i in range(2) for c in range(3)]
    assert [row.clip for row in cache.rows(range(6))] == ["clip000"] * 3 + ["clip001"] * 3
    crops = [row.latents_FhwC for row in cache.rows(range(3))]
    assert not torch.equal(crops[0], crops[1])
    own = recipe(
        preprocess={"crop": "shifted", "num_crops": 3},
        tokenizer={"name_or_path": str(tmp_path / "cache/tokenizer")},
    )
    build_cache(own, wide, tmp_path / "again")
    assert_same_rows(tmp_path / "again", tmp_path / "cache")  # crops follow the seed alone
    with pytest.raises(UserError, match=r"preprocess\.seed is 7 in the cache and 8 in the recipe"):
        cache.require(recipe(seed=8, preprocess={"crop": "shifted", "num_crops": 3}))
    with pytest.raises(UserError, match=r"makes equal crops: set preprocess\.crop=shifted"):
        build_cache(recipe(preprocess={"num_crops": 3}), wide, tmp_path / "equal")


def test_shift_fraction_zero_is_the_centre(tmp_path: Path) -> None:
    wide = make_world(tmp_path / "clips", 1, width=96)
    build_cache(recipe(), wide, tmp_path / "centre")
    still = recipe(
        preprocess={"crop": "shifted", "shift_fraction": 0.0},
        tokenizer={"name_or_path": str(tmp_path / "centre" / "tokenizer")},
    )
    build_cache(still, wide, tmp_path / "shifted")
    assert rows_of(tmp_path / "shifted")[0]["latents"] == rows_of(tmp_path / "centre")[0]["latents"]


def test_buckets_of_size_and_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = make_world(tmp_path / "wide", 2, width=64)
    long = [replace(e, id="long" + e.id) for e in make_world(tmp_path / "long", 2, frames=19)]
    short = [replace(e, id="short" + e.id) for e in make_world(tmp_path / "short", 1, frames=7)]
    pictures = [
        ManifestEntry(f"picture{i}", make_clip(tmp_path / f"{i}.png", i, frames=1), "a still", kind="image")
        for i in range(2)
    ]
    mixed = recipe(
        tokenizer={"first_alone": True},
        bucketing={"enabled": True, "buckets": [(32, 32), (64, 32), (32, 64)], "frames": [1, 5, 9]},
    )
    report = build_cache(mixed, [*wide, *long, *short, *pictures], tmp_path / "cache")
    assert len(report.skipped) == 0
    cache = open_cache(tmp_path / "cache")
    found = {str(bucket): [cache.ids[row] for row in rows] for bucket, rows in cache.buckets.items()}
    assert found == {
        "32x32x1": ["picture0", "picture1"],
        "32x32x5": ["shortclip000"],
        "32x32x9": ["longclip000", "longclip001"],
        "64x32x5": ["clip000", "clip001"],
    }
    assert cache.row(0).latents_FhwC.shape == (2, 4, 8, 12)
    assert cache.verify() == []
    order, tokenizer = [5, 2, 3, 4, 0, 6, 1, 1], cache.tokenizer()
    for at_once in (2**20, 1):
        monkeypatch.setattr(reader, "PIXELS_AT_ONCE", at_once)
        for row, pixels in zip(cache.rows(order), cache.decoded(order, tokenizer), strict=True):
            assert torch.equal(pixels, row.decode(tokenizer))


def test_stride_takes_every_nth_frame(tmp_path: Path) -> None:
    long = make_world(tmp_path / "clips", 1, frames=16)
    build_cache(recipe(video={"frame_stride": 2}), long, tmp_path / "cache")
    cache = open_cache(tmp_path / "cache")
    assert cache.fps == FPS / 2
    every = read_entry(long[0], frames=16, fps=FPS, size=(32, 32)).video_FHW3[::2]
    expected = cache.tokenizer().encode(torch.from_numpy(every.copy())[None])[0]
    torch.testing.assert_close(cache.row(0).latents_FhwC, expected, rtol=2**-10, atol=1e-4)


def test_unused_ends_are_reported(tmp_path: Path) -> None:
    world = [replace(e, frames=24, fps=FPS) for e in make_world(tmp_path / "clips", 2, frames=24)]
    report = build_cache(recipe(), world, tmp_path / "cache")
    assert (report.longer, report.unused_seconds) == (2, pytest.approx(4.0))
    assert "2 clips are longer" in "\n".join(report.lines())


def test_scenes_within_the_clip(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "story.mp4", 0, frames=24)
    scenes = (Scene(0.0, 0.5, "first"), Scene(0.5, 1.0, "second"), Scene(1.0, 3.0, "third"))
    story = ManifestEntry("story", path, "all", scenes=scenes)
    build_cache(recipe(), [story], tmp_path / "cache")
    row = open_cache(tmp_path / "cache").row(0)
    assert (row.captions, row.scene_frames, row.wordings) == (["first", "second"], [4, 4], ["all"])
    tiny = replace(story, id="tiny", scenes=(Scene(0.0, 0.8, "a"), Scene(0.8, 3.0, "b")))
    report = build_cache(recipe(), [story, tiny], tmp_path / "cache")
    assert [p.kind for p in report.skipped] == ["short scene"]
    whole = replace(tiny, scenes=(Scene(0.0, 1.0, "a"), Scene(1.0, 3.0, "b")))
    build_cache(recipe(), [whole], tmp_path / "cache")
    assert open_cache(tmp_path / "cache").row(1).captions == ["a"], "a scene after the window is not seen"


def test_latent_scenes() -> None:
    plain, alone = TokenizerSpec(4, 8, 4), TokenizerSpec(4, 8, 4, first_alone=True)
    assert latent_scenes(plain, (8,)) == (0, 0)
    assert latent_scenes(plain, (4, 8)) == (0, 1, 1)
    assert latent_scenes(plain, (3, 5)) == (0, 1), "a group belongs to the shot of its middle frame"
    assert latent_scenes(plain, (2, 6)) == (1, 1)
    assert latent_scenes(alone, (1, 8)) == (0, 1, 1)
    assert latent_scenes(alone, (5, 4)) == (0, 0, 1)


def test_bucket_choice() -> None:
    sizes = [(32, 32), (64, 32), (32, 64), (128, 64)]
    assert closest_size(1920, 1080, sizes) == (128, 64)
    assert closest_size(70, 35, sizes) == (64, 32)
    assert closest_size(1080, 1920, sizes) == (32, 64)
    assert closest_size(50, 48, sizes) == (32, 32)
    assert longest_fit(19, [1, 5, 9]) == 9
    assert longest_fit(8, [1, 5, 9]) == 5
    assert longest_fit(4, [5, 9]) is None


def test_reads_from_disk_and_from_memory_agree_in_threads(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from motionloom.data.cache import reader
    from motionloom.data.cache.tables import Blobs

    memory = open_cache(built)
    expected = [row.latents_FhwC for row in memory.rows(range(10))]
    monkeypatch.setattr(reader, "Blobs", lambda *args: Blobs(*args, limit=0))
    disk = open_cache(built)
    assert memory._latents.in_memory
    assert not disk._latents.in_memory
    wrong = []

    def read(seed: int) -> None:
        for numbers in np.random.Generator(np.random.PCG64(seed)).integers(0, 10, (20, 4)).tolist():
            found = disk.rows(numbers)
            wrong.extend(
                n
                for n, row in zip(numbers, found, strict=True)
                if not torch.equal(row.latents_FhwC, expected[n])
            )

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# Text


FROZEN = {"trainable": False}


def test_trained_encoders_are_not_cached(built: Path) -> None:
    assert not (built / "text.lance").exists()
    assert open_cache(built).text is None


def test_embeddings_are_those_of_the_encoder(world: list[ManifestEntry], cache_path: Path) -> None:
    frozen = recipe(text_encoder=FROZEN)
    report = build_cache(frozen, world, cache_path)
    assert (report.encoded, report.kept, report.captions) == (0, 10, 11)
    table = open_cache(cache_path).text
    assert table is not None
    encoder = build_text_encoder(frozen.text_encoder, frozen.seed)
    x_BLC, valid_BL = encoder.encode(["a wave number 3", ""])
    found = table.embed(["a wave number 3", ""])
    assert torch.equal(found[0], x_BLC[0][valid_BL[0]])
    assert torch.equal(found[1], x_BLC[1][valid_BL[1]])
    assert table.verify() == []
    assert table.missing(["a wave number 3", "never seen"]) == ["never seen"]


def test_text_is_made_again_without_the_latents(world: list[ManifestEntry], cache_path: Path) -> None:
    build_cache(recipe(text_encoder=FROZEN), world, cache_path)
    before = rows_of(cache_path)
    other = recipe(text_encoder={**FROZEN, "dim": 8})
    table = open_cache(cache_path).text
    assert table is not None
    assert table.mismatches(other) == ["text_encoder.dim is 16 in the cache and 8 in the recipe"]
    report = build_cache(other, world, cache_path)
    assert (report.encoded, report.captions) == (0, 11)
    again = open_cache(cache_path).text
    assert again is not None
    assert (again.dim, len(again)) == (8, 11)
    assert again.mismatches(other) == []
    assert rows_of(cache_path) == before
    assert build_cache(recipe(text_encoder=FROZEN), world[:1], cache_path).captions == 11, (
        "of all clips there"
    )
    build_cache(other, world, cache_path)
    more = [*world, replace(world[0], id="more", caption="a new caption of many many words")]
    report = build_cache(other, more, cache_path)
    assert (report.captions, report.captions_cut) == (1, 1)


def test_embeddings_keep_the_encoders_own_dtype(world: list[ManifestEntry], cache_path: Path) -> None:
    class Half:
        dim, max_length, trainable = 3, 6, False

        def encode(self, captions):
            x_BLC = torch.tensor([[float(len(c)), 0.1, -1e30] for c in captions], dtype=torch.bfloat16)
            valid_BL = torch.zeros(len(captions), 6, dtype=torch.bool)
            valid_BL[:, 0] = True
            return torch.nn.functional.pad(x_BLC[:, None], (0, 0, 0, 5)), valid_BL

        def count_cut(self, captions):
            return 0

        def fingerprint(self):
            return "half"

    build_cache(recipe(text_encoder=FROZEN), world, cache_path, text_encoder=Half())
    table = open_cache(cache_path).text
    assert table is not None
    assert torch.equal(table.embed(["abc wave"[:0]])[0], Half().encode([""])[0][0, :1].float())


def test_hf_embeddings_survive_a_moved_model(
    world: list[ManifestEntry], cache_path: Path, tmp_path: Path
) -> None:
    from test_text import save_model

    model = save_model(tmp_path / "t5", "t5")
    hf = {"type": "hf", "name_or_path": str(model), "max_length": 6, "dtype": "bfloat16"}
    assert build_cache(recipe(text_encoder=hf), world, cache_path).captions == 11
    moved = {**hf, "name_or_path": str(model.rename(tmp_path / "moved"))}
    table = open_cache(cache_path).text
    assert table is not None
    assert len(table.mismatches(recipe(text_encoder=moved))) == 1
    assert build_cache(recipe(text_encoder=moved), world, cache_path).captions == 0
    again = open_cache(cache_path).text
    assert again is not None
    assert again.mismatches(recipe(text_encoder=moved)) == []
    assert len(again) == 11


def test_a_cache_that_another_worker_makes_meanwhile_is_none_of_a_stranger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written between two looks at the folder."""
    listed = Path.iterdir

    def meanwhile(folder: Path):
        (folder / "cache.json").write_text("{}")
        (folder / "tokenizer").mkdir()
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", meanwhile)
    require_folder(tmp_path)
