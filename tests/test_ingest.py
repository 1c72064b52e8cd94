"""A folder of clips becomes a manifest: who is a clip, where its caption comes from, what is kept."""

import csv
import json
import time
import zipfile

import numpy as np
import pytest
from PIL import Image

from motionloom.data.ingest import ingest, summary
from motionloom.data.join import join
from motionloom.data.manifest import (
    ManifestEntry,
    Scene,
    check_id,
    read_entry,
    read_manifest,
    safe_id,
    write_manifest,
)
from motionloom.data.media import MediaError, probe, write_video
from motionloom.errors import UserError


def moving(frames=4, size=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, size, size, 3), np.uint8)


def clip(path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_video(path, moving(**options), 8)


def by_id(entries):
    return {entry.id: entry for entry in entries}


def test_every_kind_of_clip_is_found(tmp_path):
    for name in ("video.mp4", "film.webm", "loop.gif", "dance.webp", "walking"):
        clip(tmp_path / name)
    write_video(tmp_path / "red_ball.png", moving(1), 8)
    (tmp_path / "README").write_text("not a clip")
    entries, problems = ingest(tmp_path)
    assert problems.lines() == ["skipped 0 of 6 clips"]
    found = by_id(entries)
    kinds = {id: (entry.kind, entry.frames, entry.fps) for id, entry in found.items()}
    assert kinds == {
        "video": ("video", 4, 8.0),
        "film": ("video", 4, 8.0),
        "loop": ("animation", 4, pytest.approx(8.0, rel=0.03)),
        "dance": ("animation", 4, 8.0),
        "walking": ("frames", 4, 8.0),
        "red_ball": ("image", 1, None),
    }
    assert found["red_ball"].caption == "red ball"
    assert (found["dance"].width, found["dance"].height) == (16, 16)
    assert all(read_entry(entry, frames=2, fps=8, short="hold").video_FHW3.shape[0] == 2 for entry in entries)


def test_captions_by_the_first_source_that_has_one(tmp_path):
    for name in ("a", "b", "c", "d", "e", "f_the-last 02", "sub/g"):
        clip(tmp_path / f"{name}.webp")
    (tmp_path / "captions.json").write_text(
        json.dumps({"a.webp": " from \n json ", "b": {"text": "b", "tags": ["x"]}})
    )
    with open(tmp_path / "captions.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [("file_name", "text", "mood"), ("a.webp", "no", ""), ("c.webp", "csv", "sad")]
        )
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "d.webp", "text": "hugging face"}\n')
    (tmp_path / "metadata.csv").write_text("file_name,text\nsub/g.webp,from above\n")
    (tmp_path / "e.txt").write_text("beside\n")
    (tmp_path / "d.txt").write_text("no")
    entries, problems = ingest(tmp_path)
    assert not problems.items
    found = by_id(entries)
    assert {id: (entry.caption, entry.caption_from) for id, entry in found.items()} == {
        "a": ("from json", "captions.json"),
        "b": ("b", "captions.json"),
        "c": ("csv", "captions.csv"),
        "d": ("hugging face", "metadata.jsonl"),
        "e": ("beside", "text file"),
        "f_the-last 02": ("f the last", "file name"),
        "sub/g": ("from above", "metadata.csv"),
    }
    assert found["b"].attributes == {"tags": ["x"]}
    assert found["c"].attributes == {"mood": "sad"}
    assert summary(entries, problems)["captions"]["captions.json"] == 2


def test_emoji_pack_shape_and_the_filter(tmp_path):
    items = []
    for index, group in enumerate(["animals", "animals", "food"]):
        clip(tmp_path / f"1f4{index}.webp", seed=index)
        items.append(
            {"code": f"1f4{index}", "caption": f"thing {index}", "group": group, "tags": [f"t{index}", "all"]}
        )
    (tmp_path / "captions.json").write_text(json.dumps(items))
    entries, _ = ingest(tmp_path, keep={"group": "animals"})
    assert [entry.id for entry in entries] == ["1f40", "1f41"]
    assert [entry.id for entry in ingest(tmp_path, keep={"tags": "t2"})[0]] == ["1f42"]
    assert len(ingest(tmp_path, keep={"tags": "all"})[0]) == 3
    with pytest.raises(UserError, match=r'no clip has group = "animal".*animals \(2\), food \(1\)'):
        ingest(tmp_path, keep={"group": "animal"})


def test_a_zip_is_unpacked_once_and_read(tmp_path):
    clip(tmp_path / "in" / "cat.webp")
    (tmp_path / "in" / "captions.json").write_text('{"cat": "a cat"}')
    with zipfile.ZipFile(tmp_path / "pack.zip", "w") as archive:
        for path in sorted((tmp_path / "in").iterdir()):
            archive.write(path, path.name)
    with pytest.raises(UserError, match="is a zip"):
        ingest(tmp_path / "pack.zip")
    first, problems = ingest(tmp_path / "pack.zip", unpack_to=tmp_path / "cache")
    assert (first[0].id, first[0].caption, len(problems)) == ("cat", "a cat", 0)
    assert first[0].path.is_relative_to(tmp_path / "cache")
    unpacked = first[0].path.stat().st_mtime_ns
    assert ingest(tmp_path / "pack.zip", unpack_to=tmp_path / "cache")[0] == first
    assert first[0].path.stat().st_mtime_ns == unpacked


def test_numbered_pictures_are_frames_unless_each_has_a_caption(tmp_path):
    for index, frame in enumerate(moving(5)):
        for folder in ("jump", "stills", "holiday"):
            (tmp_path / folder).mkdir(exist_ok=True)
        Image.fromarray(frame).save(tmp_path / "jump" / f"{index:03d}.png")
        Image.fromarray(frame).save(tmp_path / "stills" / f"{index:03d}.png")
        Image.fromarray(frame).save(tmp_path / "holiday" / f"IMG {index * index * 3}.png")
        (tmp_path / "stills" / f"{index:03d}.txt").write_text(f"picture {index}")
    (tmp_path / "jump.txt").write_text("a jump")
    entries, problems = ingest(tmp_path)
    assert not problems.items
    kinds = sorted((entry.id, entry.kind, entry.caption) for entry in entries)
    assert kinds[0] == ("holiday/IMG 0", "image", "IMG")
    assert ("jump", "frames", "a jump") in kinds
    assert ("stills/003", "image", "picture 3") in kinds
    assert len(kinds) == 11


def test_numbered_animations_are_not_frames(tmp_path):
    for index in range(3):
        clip(tmp_path / "set" / f"cat{index}.webp", seed=index)
    assert [entry.kind for entry in ingest(tmp_path)[0]] == ["animation"] * 3


def test_a_manifest_is_taken_at_its_word(tmp_path):
    clip(tmp_path / "long.mp4", frames=24)
    clip(tmp_path / "other.mp4")
    lines = [
        {"id": "one", "path": "long.mp4", "caption": "first part", "start": 0, "end": 1},
        {"id": "two", "path": "long.mp4", "caption": "second part", "start": 1, "end": 3, "mood": "calm"},
    ]
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    entries, problems = ingest(tmp_path)
    assert [entry.id for entry in entries] == ["one", "two"]
    assert entries[1].attributes == {"mood": "calm"}
    assert len(read_entry(entries[1]).video_FHW3) == 16
    assert str(problems.items[0]).startswith(
        "manifest.jsonl: does not list clips that lie beside it: other.mp4"
    )
    assert problems.skipped == 0


def test_ids_keep_clips_of_one_name_apart(tmp_path):
    for name in ("cat.mp4", "cat.webm", "sub/cat.mp4", "wh?t.mp4", "what.mp4"):
        clip(tmp_path / name)
    entries, problems = ingest(tmp_path)
    assert not problems.items
    ids = [entry.id for entry in entries]
    assert {"cat.mp4", "cat.webm", "sub/cat", "what"} < set(ids)
    assert len(set(ids)) == 5
    assert all(check_id(id, "") for id in ids)


def test_progress_counts_every_clip(tmp_path):
    for index in range(3):
        clip(tmp_path / f"cat{index}.gif", seed=index)
    seen = []
    ingest(tmp_path, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_manifest_round_trip(tmp_path):
    inside, outside = clip(tmp_path / "data" / "a.gif"), clip(tmp_path / "b.gif")
    entries = [
        ManifestEntry("a", inside, "Ein Bär — 熊", fps=8.0, frames=4, width=16, height=16, kind="animation"),
        ManifestEntry(
            "sub/b",
            outside,
            "two scenes",
            start=0.1,
            end=0.5,
            scenes=(Scene(0.1, 0.3, "first"), Scene(0.3, 0.5, "then")),
            captions=("other words",),
            attributes={"tags": ["x"], "score": 0.5},
            caption_from="text file",
        ),
    ]
    write_manifest(tmp_path / "data" / "manifest.jsonl", entries)
    read, problems = read_manifest(tmp_path / "data" / "manifest.jsonl")
    assert read == entries
    assert problems.lines() == ["skipped 0 of 2 clips"]
    records = [json.loads(line) for line in (tmp_path / "data" / "manifest.jsonl").read_text().splitlines()]
    assert [record["path"] for record in records] == ["a.gif", str(outside)]
    (tmp_path / "data").rename(tmp_path / "moved")
    assert read_manifest(tmp_path / "moved" / "manifest.jsonl")[0][0].path == tmp_path / "moved" / "a.gif"


def test_manifests_are_joined_and_their_folders_name_the_clips(tmp_path):
    for folder in ("cats", "dogs"):
        clip(tmp_path / folder / "clips" / "0.mp4")
        lines = [
            {"id": "0", "path": "clips/0.mp4", "caption": folder},
            {"id": "1", "path": "gone.mp4", "caption": "x"},
        ]
        (tmp_path / folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    manifests = [tmp_path / folder / "manifest.jsonl" for folder in ("cats", "dogs")]
    entries, problems = join(manifests)
    assert [(entry.id, entry.caption) for entry in entries] == [("cats/0", "cats"), ("dogs/0", "dogs")]
    assert problems.lines()[-1].startswith("skipped 2 of 4 clips")
    assert problems.lines()[0].startswith("cats: manifest.jsonl line 2: /")
    write_manifest(tmp_path / "both.jsonl", entries)
    assert read_manifest(tmp_path / "both.jsonl")[0] == entries
    assert [entry.id for entry in join(manifests, (1, 3))[0]] == ["cats/0", "dogs/0", "dogs_2/0", "dogs_3/0"]
    with pytest.raises(UserError, match="its clips would be called cats/"):
        join([manifests[0], manifests[0]])


def test_lines_of_other_tools_are_understood(tmp_path):
    clip(tmp_path / "frames")
    write_video(tmp_path / "still.png", moving(1), 8)
    lines = [
        {"id": "v", "frames_dir": "frames", "caption": "moving"},
        {"id": "i", "image_path": "still.png", "caption": "still"},
        {"path": "frames", "captions": ["only one of several"]},
        {
            "id": "s",
            "path": "frames",
            "scenes": [
                {"start": 0.25, "end": 0.5, "caption": "b"},
                {"start": 0, "end": 0.25, "caption": "a"},
            ],
        },
    ]
    (tmp_path / "m.jsonl").write_text(
        "\ufeff" + "\n\n".join(map(json.dumps, lines)) + "\r\n", encoding="utf-8"
    )
    entries, problems = read_manifest(tmp_path / "m.jsonl")
    assert not problems.items
    assert [(entry.id, entry.caption) for entry in entries] == [
        ("v", "moving"),
        ("i", "still"),
        ("frames", "only one of several"),
        ("s", "a b"),
    ]
    assert [probe(entry.path).kind for entry in entries[:2]] == ["frames", "image"]


@pytest.mark.parametrize(
    "id",
    ["../x", "/etc/x", "a/../../x", "a\0b", "", "a//b", "con", "nul.txt", "x" * 201, "a\\b", "a. "],
)
def test_an_id_is_a_name_below_its_folder_everywhere(id):
    assert check_id("cats/1", "here") == "cats/1"
    with pytest.raises(MediaError):
        check_id(id, "here")
    assert check_id(safe_id(id), "here")


def test_a_hundred_small_clips_take_about_a_second(tmp_path):
    (tmp_path / "one").mkdir()
    data = clip(tmp_path / "one" / "cat.webp", frames=16, size=64).read_bytes()
    for index in range(100):
        (tmp_path / "one" / f"clip {index}.webp").write_bytes(data)
    began = time.perf_counter()
    entries, _ = ingest(tmp_path / "one")
    assert len(entries) == 101
    assert time.perf_counter() - began < 5  # 0.3 s on an idle core
