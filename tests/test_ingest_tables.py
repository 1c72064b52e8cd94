"""Lists of other trainers' datasets: what becomes of each row."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from cached import FPS, make_clip, recipe
from motionloom.data.cache import build_cache, open_cache
from motionloom.data.ingest import ingest
from motionloom.data.manifest import read_manifest, write_manifest
from motionloom.data.media import read_clip, write_video
from motionloom.errors import UserError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six clips of 9 to 14 frames below ``videos``, one that is no clip, and a sound."""
    for key in range(6):
        make_clip(tmp_path / "videos" / f"v{key}.mp4", key, frames=9 + key)
    (tmp_path / "videos" / "broken.mp4").write_bytes(b"nothing")
    (tmp_path / "datasets").mkdir()
    return tmp_path


def table(path: Path, rows: list[dict]) -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_mask2dit_clips(root: Path) -> None:
    """Columns as in its pretrain.csv; paths start one folder above the list."""
    size = {"fps": 24.0, "width": 1280, "height": 720}
    rows = [
        {**size, "caption": f"clip, {key}", "path": f"videos/v{key}.mp4", "num_frame": 200}
        for key in range(3)
    ]
    rows.append({**size, "caption": "gone", "path": "videos/gone.mp4", "num_frame": 200})
    rows.append({**size, "caption": "", "path": "videos/v3.mp4", "num_frame": 200})
    rows.append({**size, "caption": "bad", "path": "videos/broken.mp4", "num_frame": 200})
    entries, problems = ingest(table(root / "datasets" / "pretrain.csv", rows))
    assert [(entry.id, entry.caption) for entry in entries] == [
        (f"videos/v{k}", f"clip, {k}") for k in range(3)
    ]
    # What the list says of a file is not believed: it is looked into.
    assert [(entry.fps, entry.frames, entry.width) for entry in entries] == [
        (FPS, 9 + k, 32) for k in range(3)
    ]
    assert (problems.skipped, problems.usable) == (3, 3)
    assert set(problems.counts()) == {"missing file", "empty caption", "not a video"}
    assert any("pretrain.csv row 4" in line for line in problems.lines())


def test_mask2dit_stories(root: Path) -> None:
    """As in its sft.json: every value is a shot in a file of its own, in order."""

    def shot(key: int, **more: object) -> dict:
        return {
            "vid": f"x{key}",
            "width": 1280,
            "height": 720,
            "duration": (9 + key) / FPS,
            "fps": 8.0,
            "url": f"videos/v{key}.mp4",
            "caption": f"shot {key}",
            **more,
        }

    stories = [
        {"prefix": "film/one", "values": [shot(2), shot(0), shot(5, duration=None)]},
        {"prefix": "film/two", "values": [shot(1), shot(2, url="videos/gone.mp4")]},
        {"prefix": "film/three", "values": []},
        {"prefix": "film/four", "values": [shot(3), shot(4, duration=99.0)]},
        {"prefix": "film/five", "values": [shot(3), shot(4, caption=" ")]},
    ]
    path = root / "datasets" / "sft.json"
    path.write_text(json.dumps(stories))
    entries, problems = ingest(path)
    (story,) = entries
    assert story.id == "film/one"
    assert [scene.caption for scene in story.scenes] == ["shot 2", "shot 0", "shot 5"]
    assert [scene.path for scene in story.scenes] == [root / "videos" / f"v{key}.mp4" for key in (2, 0, 5)]
    assert [scene.end * FPS for scene in story.scenes] == pytest.approx([11, 9, 14])
    assert (problems.skipped, len(problems)) == (4, 4)
    lines = "\n".join(problems.lines())
    for phrase in (
        "gone.mp4 does not exist",
        "has no shots",
        "end 99 s is after the end",
        "caption is empty",
    ):
        assert phrase in lines
    # And on into a cache, by way of a manifest.
    write_manifest(root / "datasets" / "manifest.jsonl", entries)
    read, _ = read_manifest(root / "datasets" / "manifest.jsonl")
    assert read == entries
    settings = recipe(
        plan={"type": "scenes"},
        stories={"frames": 9},
        video={"num_frames": 9},
        tokenizer={"first_alone": True},
    )
    build_cache(settings, read, root / "cache")
    assert open_cache(root / "cache").row(0).scene_frames == [9, 9, 9]


def test_videox_fun_metadata(root: Path) -> None:
    write_video(root / "videos" / "pic.png", np.zeros((1, 8, 8, 3), np.uint8), FPS)
    sound = np.zeros((1, 16_000), np.float32)
    frames = read_clip(root / "videos" / "v0.mp4").video_FHW3
    write_video(root / "videos" / "sound.mp4", frames, FPS, sound=sound, sample_rate=16_000)
    rows = [
        {"file_path": "v0.mp4", "text": "a clip", "type": "video", "width": 32, "height": 32},
        {"file_path": "pic.png", "text": "a picture", "type": "image"},
        {"file_path": "v1.mp4", "text": "controlled", "type": "video", "control_file_path": "v2.mp4"},
        {"file_path": "v2.mp4", "text": "heard", "type": "video", "audio_path": "sound.mp4"},
        {"file_path": "v3.mp4", "text": "one subject", "type": "video", "object_file_path": ["pic.png"]},
        {"file_path": "v4.mp4", "text": "two", "type": "video", "object_file_path": ["pic.png", "v0.mp4"]},
        {"file_path": "v5.mp4", "text": "silent", "type": "video", "audio_path": "v5.mp4"},
        {"text": "no file"},
        {"file_path": "v0.mp4", "text": "again"},
    ]
    path = root / "videos" / "metadata.json"
    path.write_text(json.dumps(rows))
    entries, problems = ingest(path)
    found = {entry.id: entry for entry in entries}
    assert set(found) == {"v0", "pic", "v1", "v2", "v3", "v4"}
    assert found["pic"].kind == "image"
    assert found["v1"].reference == root / "videos" / "v2.mp4"
    assert found["v2"].audio == root / "videos" / "sound.mp4"
    assert found["v3"].reference == root / "videos" / "pic.png"
    assert found["v4"].reference is None
    assert (problems.skipped, problems.usable) == (3, 6)
    assert set(problems.counts()) == {"references left out", "no path", "duplicate id", "no sound"}
    # The same as a table.
    flat = [{key: row.get(key, "") for key in ("file_path", "text", "type")} for row in rows[:2]]
    entries, problems = ingest(table(root / "videos" / "metadata.csv", flat))
    assert [entry.id for entry in entries] == ["v0", "pic"]


def test_a_list_of_something_else_is_one_line(root: Path) -> None:
    other = table(root / "datasets" / "other.csv", [{"a": 1, "b": 2}])
    with pytest.raises(UserError, match="has the columns a, b; it needs path and caption"):
        ingest(other)
    (root / "datasets" / "bad.json").write_text('{"a": ')
    with pytest.raises(UserError, match="is not JSON"):
        ingest(root / "datasets" / "bad.json")
    (root / "datasets" / "object.json").write_text("{}")
    with pytest.raises(UserError, match="is not a list of objects"):
        ingest(root / "datasets" / "object.json")
