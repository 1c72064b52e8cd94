"""Every way a clip, a caption or a manifest can be wrong: one clear line with its fix; the rest goes on."""

import errno
import functools
import io
import json
import os
import re
import struct
import tempfile
import zipfile
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from motionloom.data.ingest import ingest
from motionloom.data.manifest import ManifestEntry, read_entry, read_manifest, write_manifest
from motionloom.data.media import MediaError, probe, read_clip, read_sound, write_video
from motionloom.data.media import info as limits
from motionloom.data.sheets import contact_sheet
from motionloom.errors import UserError


def noise(frames=8, height=16, width=16):
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), np.uint8)


@functools.cache
def encoded(suffix):
    """The bytes of a good clip of 24 frames."""
    with tempfile.TemporaryDirectory() as folder:
        return write_video(Path(folder) / f"clip{suffix}", noise(24, 48, 64), 12).read_bytes()


def cut(suffix, part):
    data = encoded(suffix)
    return data[: int(len(data) * part)]


def index_first(data):
    """An mp4 with its index moved before the pictures, as a web download has it."""
    moov, mdat = data.index(b"moov") - 4, data.index(b"mdat") - 4
    index = bytearray(data[moov:])
    chunks = index.index(b"stco") + 12
    for number in range(struct.unpack_from(">I", index, chunks - 4)[0]):
        at = chunks + 4 * number
        struct.pack_into(">I", index, at, struct.unpack_from(">I", index, at)[0] + len(index))
    return data[:mdat] + bytes(index) + data[mdat:moov]


def holed(data):
    third = len(data) // 3
    return data[:third] + bytes(third) + data[2 * third :]


def patched(data, box, offset, value):
    at = data.index(box) + offset
    return data[:at] + struct.pack(">I", value) + data[at + 4 :]


def png_claiming(width, height):
    out = io.BytesIO()
    Image.new("RGB", (1, 1)).save(out, "PNG")
    data = bytearray(out.getvalue())
    struct.pack_into(">II", data, 16, width, height)
    struct.pack_into(">I", data, 29, zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]


def png(pixels_HW3):
    out = io.BytesIO()
    Image.fromarray(pixels_HW3).save(out, "PNG")
    return out.getvalue()


def sound_only():
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return out.getvalue()


# --- files in a folder: what lies under which name, and what the line about it must say ---
FILES = {
    "truncated mp4, index at its end": ("bad.mp4", lambda: cut(".mp4", 0.6), "truncated.*index", "truncated"),
    "truncated mp4, index at its front": (
        "bad.mp4",
        lambda: index_first(encoded(".mp4"))[: len(encoded(".mp4")) // 2],
        r"truncated after \d+ of 24 frames; re-encode",
        "truncated",
    ),
    "truncated webm": (
        "bad.webm",
        lambda: cut(".webm", 0.5),
        r"truncated after \d+ frames, at 0\.\d+ s",
        "truncated",
    ),
    "truncated gif": ("bad.gif", lambda: cut(".gif", 0.5), "truncated", "truncated"),
    "truncated webp": ("bad.webp", lambda: cut(".webp", 0.5), "truncated", "truncated"),
    "truncated png": ("bad.png", lambda: png(noise()[0])[:500], "truncated", "truncated"),
    "zero bytes": ("bad.mp4", lambda: b"", r"is empty \(0 bytes\)", "empty file"),
    "text named mp4": ("bad.mp4", lambda: b"these are only words\n" * 50, "not a video", "not a video"),
    "playlist named mp4": (
        "bad.mp4",
        lambda: b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n",
        "not a video",
        "not a video",
    ),
    "text named png": ("bad.png", lambda: b"these are only words\n" * 50, "not a picture", "not a picture"),
    "sound without picture": ("bad.mp4", sound_only, "no picture", "not a video"),
    "all frames at time 0": (
        "bad.mp4",
        lambda: patched(encoded(".mp4"), b"stts", 16, 0),
        "frames a second; re-encode",
        "bad frame rate",
    ),
    "0 ticks a second": (
        "bad.mp4",
        lambda: patched(encoded(".mp4"), b"mdhd", 16, 0),
        "frames a second; re-encode",
        "bad frame rate",
    ),
    "60000 x 60000 claimed": ("bad.png", lambda: png_claiming(60_000, 60_000), "more pixels", "too large"),
    "9000 x 9000 claimed": ("bad.png", lambda: png_claiming(9_000, 9_000), "9000x9000 pixels", "too large"),
    "corrupt png": ("bad.png", lambda: flipped(png(noise()[0])), "cannot be decoded", "damaged"),
    "corrupt webp": ("bad.webp", lambda: holed(encoded(".webp")), "cannot be decoded", "damaged"),
    "unknown suffix": ("bad.psd", lambda: b"8BPS", r"is of no known kind \(\.psd\); convert", "unknown kind"),
    "empty caption": ("bad.txt", lambda: b" \n", "the caption is empty; write one", "empty caption"),
    "caption not UTF-8": ("bad.txt", lambda: b"caf\xe9", "not UTF-8.*0xe9 at 3", "not UTF-8"),
    "name that is no word": ("0017.mp4", lambda: encoded(".mp4"), "no caption.*0017.txt", "no caption"),
}


def good_folder(folder):
    write_video(folder / "first good.webp", noise(), 8)
    write_video(folder / "second good.gif", noise(), 8)


def assert_one_line(folder, where, says, kind):
    """Exactly one line that names the thing; both good clips are there; the count stands at the end."""
    entries, problems = ingest(folder)
    assert {entry.id for entry in entries} >= {"first good", "second good"}
    lines = problems.lines()
    assert len(lines) == 2, lines
    assert_clear(lines[0], where, says)
    total = problems.skipped + len(entries)
    assert lines[1] == f"skipped {problems.skipped} of {total} clips: 1 {kind}"
    return entries


def assert_clear(line, where, says):
    assert "\n" not in line
    assert where in line
    assert "; " in line  # what is wrong; what to do
    assert "Traceback" not in line
    assert re.search(says, line), line


@pytest.mark.parametrize("kind", list(FILES))
def test_a_bad_file_among_good_ones(tmp_path, kind):
    name, make, says, counted = FILES[kind]
    good_folder(tmp_path)
    (tmp_path / name).write_bytes(make())
    if name.endswith(".txt"):
        write_video(tmp_path / "bad.gif", noise(), 8)
    assert_one_line(tmp_path, name, says, counted)


def _empty_folder(folder):
    (folder / "bad.mp4").mkdir()


def _mixed_sizes(folder):
    write_video(folder / "bad", noise(4), 8)
    Image.fromarray(noise(1, 20, 24)[0]).save(folder / "bad" / "00002.png")


def _corrupt_first_frame(folder):
    write_video(folder / "bad", noise(4), 8)
    (folder / "bad" / "00000.png").write_bytes(flipped(png(noise()[0])))


def _bad_folder_rate(folder):
    write_video(folder / "bad", noise(4), 8)
    (folder / "bad" / "frames.json").write_text('{"fps": "fast"}')


def _link_to_itself(folder):
    (folder / "bad.mp4").symlink_to(folder / "bad.mp4")


def _link_round(folder):
    (folder / "bad").symlink_to(folder)


def _link_out(folder):
    outside = folder.parent / "outside.gif"
    write_video(outside, noise(), 8)
    (folder / "bad.gif").symlink_to(outside)


FOLDERS = {
    "directory named mp4": (_empty_folder, "bad.mp4: is a folder with nothing in it", "empty folder"),
    "frames of mixed sizes": (_mixed_sizes, "frame 00002.png is 24x20, the first is 16x16", "mixed sizes"),
    "corrupt first frame": (_corrupt_first_frame, "00000.png: cannot be decoded", "damaged"),
    "folder with a bad rate": (_bad_folder_rate, "frames.json does not read", "bad frame rate"),
    "link to itself": (_link_to_itself, "leads nowhere", "bad link"),
    "link that goes round": (_link_round, "is a link to a folder", "bad link"),
    "link out of the folder": (_link_out, "is a link out of the folder", "bad link"),
}


@pytest.mark.parametrize("kind", list(FOLDERS))
def test_a_bad_folder_among_good_ones(tmp_path, kind):
    make, says, counted = FOLDERS[kind]
    folder = tmp_path / "clips"
    folder.mkdir()
    good_folder(folder)
    make(folder)
    assert_one_line(folder, "bad", says, counted)


CAPTION_FILES = {
    "broken captions.json": (
        "captions.json",
        '{"first good": ',
        "is not JSON.*captions nothing",
        "broken JSON",
    ),
    "captions.json of numbers": ("captions.json", "[1, 2]", "neither an object nor a list", "broken JSON"),
    "caption that is a number": ("captions.json", '{"bad": 7}', 'key "bad".* is a number', "bad caption"),
    "caption that is null": ("captions.json", '[{"id": "bad"}]', "item 0: has no caption", "no caption"),
    "caption for no clip": ("captions.json", '{"gone.mp4": "x"}', "not there: gone.mp4", "missing file"),
    "table without columns": ("captions.csv", "a,b\n1,2\n", "has the columns a, b; name two", "bad table"),
    "broken metadata.jsonl": (
        "metadata.jsonl",
        '{"file_name"\n',
        "metadata.jsonl line 1.*not JSON",
        "broken JSON",
    ),
}


@pytest.mark.parametrize("kind", list(CAPTION_FILES))
def test_a_bad_caption_file(tmp_path, kind):
    name, text, says, counted = CAPTION_FILES[kind]
    good_folder(tmp_path)
    (tmp_path / name).write_text(text)
    if '"bad"' in text:
        write_video(tmp_path / "bad.gif", noise(), 8)
    assert_one_line(tmp_path, name, says, counted)


GOOD_LINE = {"id": "x", "path": "clip.gif", "caption": "a clip"}
LINES = {
    "broken JSON": (b'{"id": "x", "path"', "is not JSON", "broken JSON"),
    "half a line": (json.dumps(GOOD_LINE).encode()[:-9], "is not JSON", "broken JSON"),
    "a list": (b"[1, 2]", "is a list, not an object", "not an object"),
    "deeply nested": (b"[" * 100_000, "JSON", "broken JSON"),
    "not UTF-8": (b'{"id": "x", "caption": "caf\xe9"}', "is not UTF-8", "not UTF-8"),
    "half a character": ({"caption": "\ud800"}, "half a Unicode character", "bad caption"),
    "duplicate id": ({"id": "good1"}, 'id "good1" is that of line 1', "duplicate id"),
    "id that escapes": ({"id": "../../x"}, "would leave its folder; use letters", "unsafe id"),
    "absolute id": ({"id": "/etc/x"}, "would leave its folder", "unsafe id"),
    "NUL in the id": ({"id": "a\0b"}, "a character that file names cannot", "unsafe id"),
    "empty id": ({"id": " "}, "id is empty", "unsafe id"),
    "long id": ({"id": "x" * 300}, "longer than 200 bytes", "unsafe id"),
    "id of Windows": ({"id": "nul.mp4"}, "Windows", "unsafe id"),
    "id that is a number": ({"id": 7}, "id is a number, not text", "unsafe id"),
    "no path": ({"path": None}, "has no path", "no path"),
    "path that is a list": ({"path": ["a"]}, "path is a list", "no path"),
    "NUL in the path": ({"path": "a\0b"}, "path is text", "no path"),
    "missing file": ({"path": "gone.mp4"}, "gone.mp4 does not exist; correct", "missing file"),
    "missing caption": ({"caption": None}, 'has no caption; add "caption"', "no caption"),
    "empty caption": ({"caption": "  "}, "the caption is empty", "empty caption"),
    "caption that is a list": ({"caption": ["a"]}, "the caption is a list", "bad caption"),
    "captions that are text": ({"captions": "a"}, "captions is text, not a list", "bad caption"),
    "negative start": ({"start": -1}, "start is -1", "bad start"),
    "absurd start": ({"start": 1e18}, r"start is 1e\+18; correct it", "bad start"),
    "negative end": ({"end": -0.5}, "end is -0.5", "bad end"),
    "end before start": ({"start": 2, "end": 1}, "end 1 s is not after start 2 s", "bad times"),
    "fps NaN": ({"fps": float("nan")}, "fps is nan; give a number above 0", "bad fps"),
    "fps negative": ({"fps": -8}, "fps is -8", "bad fps"),
    "fps zero": ({"fps": 0}, "fps is 0", "bad fps"),
    "fps in words": ({"fps": "eight"}, "fps is text, not a number", "bad fps"),
    "half a frame": ({"frames": 7.5}, "frames is 7.5", "bad frames"),
    "attributes that are text": ({"attributes": "red"}, "attributes is text", "bad attributes"),
    "scenes that are text": ({"scenes": "two"}, "scenes is not a list", "bad scenes"),
    "scene without end": ({"scenes": [{"start": 0, "caption": "a"}]}, "scene 0: does not run", "bad scenes"),
    "scenes that overlap": (
        {"scenes": [{"start": 0, "end": 0.6, "caption": "a"}, {"start": 0.5, "end": 1, "caption": "b"}]},
        "scenes at 0 s and 0.5 s overlap",
        "bad scenes",
    ),
    "scene out of the part": (
        {"end": 0.5, "scenes": [{"start": 0, "end": 0.75, "caption": "a"}]},
        "reaches out of the clip's start and end",
        "bad scenes",
    ),
}


@pytest.mark.parametrize("kind", list(LINES))
def test_a_bad_line_in_a_manifest(tmp_path, kind):
    bad, says, counted = LINES[kind]
    write_video(tmp_path / "clip.gif", noise(), 8)
    raw = bad if isinstance(bad, bytes) else json.dumps({**GOOD_LINE, **bad}).encode()
    good = [json.dumps({**GOOD_LINE, "id": id}).encode() for id in ("good1", "good2")]
    (tmp_path / "manifest.jsonl").write_bytes(b"\n".join([good[0], raw, good[1]]))
    entries, problems = read_manifest(tmp_path / "manifest.jsonl")
    assert [entry.id for entry in entries] == ["good1", "good2"]
    lines = problems.lines()
    assert len(lines) == 2
    assert_clear(lines[0], "manifest.jsonl line 2", says)
    assert lines[1] == f"skipped 1 of 3 clips: 1 {counted}"


TIMES = {
    "start after the end": ({"start": 9}, r"start 9 s is after the end of the clip \(1 s\)", "bad times"),
    "end after the end": ({"end": 9}, "end 9 s is after the end of the clip", "bad times"),
    "scene after the end": (
        {"scenes": [{"start": 0, "end": 9, "caption": "a"}]},
        "a scene ends at 9 s, after the end",
        "bad scenes",
    ),
}


@pytest.mark.parametrize("kind", list(TIMES))
def test_times_are_held_against_the_file(tmp_path, kind):
    bad, says, counted = TIMES[kind]
    write_video(tmp_path / "clip.webp", noise(), 8)
    good = {**GOOD_LINE, "path": "clip.webp"}
    lines = [{**good, "id": "first good"}, {**good, "id": "second good"}, {**good, **bad}]
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert_one_line(tmp_path, "clip.webp", says, counted)


# --- archives ---


def _member(archive, name, data=b"x", mode=0):
    member = zipfile.ZipInfo(name)
    member.external_attr = mode << 16
    member.compress_type = zipfile.ZIP_DEFLATED
    archive.writestr(member, data)


MEMBERS = {
    "climbs out": ("../../bad.gif", b"x", 0, "outside its folder", "unsafe zip member"),
    "absolute": ("/bad.gif", b"x", 0, "outside its folder", "unsafe zip member"),
    "drive letter": ("C:/bad.gif", b"x", 0, "outside its folder", "unsafe zip member"),
    "link": ("bad.gif", b"/etc/passwd", 0o120777, "is a link", "unsafe zip member"),
    "bomb": ("bad.gif", bytes(8_000_000), 0, "fold when unpacked, as a zip bomb does", "zip bomb"),
}


@pytest.mark.parametrize("kind", list(MEMBERS))
def test_a_bad_member_of_a_zip(tmp_path, kind):
    name, data, mode, says, counted = MEMBERS[kind]
    good_folder(tmp_path)
    with zipfile.ZipFile(tmp_path / "pack.zip", "w") as archive:
        for good in ("first good.webp", "second good.gif"):
            archive.write(tmp_path / good, good)
        _member(archive, name, data, mode)
    cache = tmp_path / "deep" / "cache"
    entries, problems = ingest(tmp_path / "pack.zip", unpack_to=cache)
    assert len(entries) == 2
    assert_clear(problems.lines()[0], "bad.gif", says)
    assert problems.lines()[1] == f"skipped 1 of 3 clips: 1 {counted}"
    assert ingest(tmp_path / "pack.zip", unpack_to=cache)[1].lines() == problems.lines()
    assert not list(tmp_path.rglob("*bad.gif*"))
    assert not Path("/bad.gif").exists()


def test_a_damaged_member_and_a_zip_that_is_none(tmp_path):
    good_folder(tmp_path)
    with zipfile.ZipFile(tmp_path / "pack.zip", "w") as archive:
        for good in ("first good.webp", "second good.gif"):
            archive.write(tmp_path / good, good)
        _member(archive, "bad.gif", encoded(".gif"))
    data = bytearray((tmp_path / "pack.zip").read_bytes())
    at = data.index(b"bad.gif") + 200
    data[at : at + 50] = bytes(50)
    (tmp_path / "pack.zip").write_bytes(data)
    entries, problems = ingest(tmp_path / "pack.zip", unpack_to=tmp_path / "cache")
    assert len(entries) == 2
    assert_clear(problems.lines()[0], "pack.zip/bad.gif", "damaged in the zip; pack it again")
    (tmp_path / "no.zip").write_bytes(b"not a zip")
    with pytest.raises(UserError, match=r"no\.zip: is not a whole zip file"):
        ingest(tmp_path / "no.zip", unpack_to=tmp_path / "cache")


# --- reading one clip ---


def _video(folder, name="ok.mp4", **options):
    return write_video(folder / name, noise(**options), 8)


def _made(folder, text=None):
    folder.mkdir()
    if text is not None:
        (folder / "readme.txt").write_text(text)
    return folder


CALLS = {
    "missing": (lambda at: probe(at / "gone.mp4"), "gone.mp4", "does not exist; correct"),
    "one frame": (
        lambda at: read_clip(_video(at, frames=1), frames=4),
        "ok.mp4",
        "1 of 4 frames at 8 a second",
    ),
    "late start": (
        lambda at: read_clip(_video(at), start=99),
        "ok.mp4",
        "has no frame at 99 s.* choose an earlier",
    ),
    "silent": (lambda at: read_sound(_video(at)), "ok.mp4", "has no sound"),
    "empty frame folder": (lambda at: read_clip(_made(at / "none")), "none", "a folder without pictures"),
    "no manifest": (lambda at: read_manifest(at / "gone.jsonl"), "gone.jsonl", "is not a file; name a"),
    "no folder": (lambda at: ingest(at / "gone"), "gone", "is not a folder; name a"),
    "nothing in it": (lambda at: ingest(_made(at / "notes", "nothing")), "notes", "holds no clips; put"),
    "unknown format": (lambda at: _video(at, "a.xyz"), "a.xyz", r"cannot write \.xyz; name it \.mp4"),
    "fast gif": (lambda at: write_video(at / "a.gif", noise(), 60), "a.gif", "at most 50 frames"),
}


@pytest.mark.parametrize("kind", list(CALLS))
def test_a_call_that_cannot_be_met(tmp_path, kind):
    call, where, says = CALLS[kind]
    with pytest.raises(UserError) as raised:
        call(tmp_path)
    assert_clear(str(raised.value), where, says)


def test_odd_and_tiny_clips_are_no_problem(tmp_path):
    write_video(tmp_path / "one pixel.png", noise(1, 1, 1), 8)
    write_video(tmp_path / "tiny.webm", noise(3, 1, 1), 8)
    write_video(tmp_path / "odd.webp", noise(3, 33, 7), 8)
    write_video(tmp_path / "single.mp4", noise(1), 8)
    write_video(tmp_path / "single.webp", noise(1), 8)
    entries, problems = ingest(tmp_path)
    assert problems.lines() == ["skipped 0 of 5 clips"]
    for entry in entries:
        clip = read_entry(entry, frames=2, fps=8, size=(8, 12), short="hold")
        assert clip.video_FHW3.shape == (2, 8, 12, 3)


def test_a_clip_too_large_for_memory_is_refused_while_it_is_read(tmp_path, monkeypatch):
    path = write_video(tmp_path / "long.webp", noise(8, 32, 32), 8)
    monkeypatch.setattr("motionloom.data.media.read.MAX_CLIP_PIXELS", 5 * 32 * 32)
    with pytest.raises(MediaError, match="ask for fewer frames"):
        read_clip(path)
    assert read_clip(path, size=(8, 8)).video_FHW3.shape[0] == 8
    assert limits.MAX_CLIP_PIXELS == 2**30


# --- a full disk ---


def _write(folder, name):
    if name == "sheet.png":
        contact_sheet([noise()], ["a clip"], folder / name)
    elif name == "manifest.jsonl":
        write_manifest(folder / name, [ManifestEntry("x", folder / "clip.gif", "a clip")])
    else:
        write_video(folder / name, noise(), 8)


def _fill_at_write(monkeypatch):
    """Whatever is written lands on the device that is always full."""
    real = open
    monkeypatch.setattr(
        "builtins.open", lambda path, mode="r": real("/dev/full" if "w" in mode else path, mode)
    )


def _fill_at_sync(monkeypatch):
    """The system took the bytes, and finds no room for them when they must reach the disk."""

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webp", "clip.png", "clip", "manifest.jsonl", "sheet.png"])
@pytest.mark.parametrize("fill", [_fill_at_write, _fill_at_sync])
def test_a_full_disk_leaves_the_old_file_and_nothing_half_written(tmp_path, monkeypatch, name, fill):
    _write(tmp_path, name)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        fill(patch)
        with pytest.raises(UserError) as raised:
            _write(tmp_path, name)
    assert_clear(str(raised.value), name, "the disk is full; free some space")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        write_video(tmp_path / "file" / "clip.mp4", noise(), 8)
