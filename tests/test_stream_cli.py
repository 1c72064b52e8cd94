"""``motionloom stream`` into files and pipes, and the films that grow, over a real model of toy size."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from motionloom.cli.main import main
from motionloom.data.media import probe, read_clip, write_video
from motionloom.data.media.film import FilmWriter, GrowingFilm, film_bytes, join_films
from motionloom.errors import UserError
from motionloom.generate import Model
from motionloom.generate.stream import Ask, Stream
from motionloom.studio.stream.record import Pipe, RawFrames, record
from toy_film import CHUNK, ToyFilm
from toy_model import toy_model

SIZE = (16, 24)


def levels(path: Path) -> list[float]:
    """The mean of each frame."""
    return [float(frame.mean()) for frame in read_clip(path).video_FHW3]


def flat(level: int, frames: int = 4, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.full((frames, *size, 3), level, np.uint8)


# Films that grow


def test_what_has_reached_the_file_plays_while_it_grows(tmp_path: Path) -> None:
    film = GrowingFilm(tmp_path / "a.mp4", 8.0, *SIZE)
    for n in range(1, 4):
        film.add(flat(60 * n))
        # The last frame is still held: how long it lasts is not known yet.
        assert levels(tmp_path / "a.part.mp4") == pytest.approx(
            [60 * (1 + i // 4) for i in range(4 * n - 1)], abs=4
        )
    assert not (tmp_path / "a.mp4").exists()
    assert film.close()
    assert levels(tmp_path / "a.mp4") == pytest.approx([60] * 4 + [120] * 4 + [180] * 4, abs=4)
    assert os.listdir(tmp_path) == ["a.mp4"]
    head = (tmp_path / "a.mp4").read_bytes()
    assert head.index(b"moov") < head.index(b"mdat"), "its index stands in front"
    assert b"moof" not in head


def test_sound_grows_with_the_picture(tmp_path: Path) -> None:
    rate, tone = 16_000, 440.0
    film = GrowingFilm(tmp_path / "a.mp4", 8.0, *SIZE, rate)
    for n in range(6):
        at = np.arange(8_000 * n, 8_000 * (n + 1)) / rate
        film.add(flat(9), 0.5 * np.sin(2 * np.pi * tone * at, dtype=np.float32)[None])
    film.close()
    with av.open(str(tmp_path / "a.mp4")) as container:
        samples = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)
    assert abs(samples.shape[1] / rate - 3.0) < 0.08
    at = np.arange(2 * rate) / rate + 0.5
    heard = samples[0, rate // 2 : rate // 2 + 2 * rate]
    expected = 0.5 * np.sin(2 * np.pi * tone * at)
    # In its place to a fraction of a millisecond: one of 440 Hz lasts 2.3 ms.
    assert np.corrcoef(heard, expected)[0, 1] > 0.99
    assert probe(tmp_path / "a.mp4", count=True).duration == pytest.approx(3.0, abs=0.08)


def test_odd_sides_are_padded(tmp_path: Path) -> None:
    film = GrowingFilm(tmp_path / "a.mp4", 7.5, 33, 35)
    film.add(flat(200, size=(33, 35)))
    film.close()
    info = probe(tmp_path / "a.mp4")
    assert (info.height, info.width, info.fps) == (34, 36, 7.5)
    assert levels(tmp_path / "a.mp4") == pytest.approx([200] * 4, abs=3)


def test_a_film_of_nothing_leaves_no_file(tmp_path: Path) -> None:
    film = GrowingFilm(tmp_path / "a.mp4", 8.0, *SIZE)
    film.add(flat(0, frames=0))
    assert film.close() is False
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"mine")
    with pytest.raises(UserError, match="is there already; name another file"):
        GrowingFilm(tmp_path / "a.mp4", 8.0, *SIZE)
    (tmp_path / "b.part.mp4").write_bytes(b"mine")
    with pytest.raises(UserError, match="from a run that was killed; it plays"):
        GrowingFilm(tmp_path / "b.mp4", 8.0, *SIZE)
    assert {file.read_bytes() for file in tmp_path.iterdir()} == {b"mine"}


def raised(kind: type[Exception], does: Callable[[], object]) -> Exception:
    with pytest.raises(kind) as told:
        does()
    return told.value


@contextlib.contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_what_was_written_and_plays(tmp_path: Path) -> None:
    rng = np.random.Generator(np.random.PCG64(0))
    noise = rng.integers(0, 256, (4, 64, 64, 3), np.uint8)
    film = GrowingFilm(tmp_path / "a.mp4", 8.0, 64, 64)
    with files_end_at(100_000):
        told = raised(UserError, lambda: [film.add(noise) for _ in range(50)])
    assert "a.mp4: cannot be written after" in str(told)
    assert "a.mp4 holds what was written before; free some space" in str(told)
    assert "\n" not in str(told)
    assert film.close()
    assert os.listdir(tmp_path) == ["a.mp4"]
    assert 8 <= probe(tmp_path / "a.mp4", count=True).frames < film.seconds * 8


def test_without_room_for_a_second_copy_the_fragments_take_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    film = GrowingFilm(tmp_path / "a.mp4", 8.0, *SIZE)
    film.add(flat(70, frames=8))
    monkeypatch.setattr("motionloom.data.media.film.rewrap", full)
    assert film.close()
    assert os.listdir(tmp_path) == ["a.mp4"]
    assert levels(tmp_path / "a.mp4") == pytest.approx([70] * 8, abs=3)


def test_films_are_joined_without_being_encoded_anew(tmp_path: Path) -> None:
    parts = [(film_bytes(flat(level, frames=n), 8.0), n) for level, n in ((40, 5), (90, 4), (140, 4))]
    join_films([parts[0], (parts[1][0], 2), parts[2]], tmp_path / "a.mp4")
    assert levels(tmp_path / "a.mp4") == pytest.approx([40] * 5 + [90] * 2 + [140] * 4, abs=3)
    assert probe(tmp_path / "a.mp4").duration == pytest.approx(11 / 8)


def test_fragments_can_be_read_from_a_pipe_while_they_come() -> None:
    buffer = io.BytesIO()
    writer = FilmWriter(buffer, 8.0, *SIZE, 16_000)
    for n in range(3):
        writer.add(flat(80 * n), np.zeros((2, 8_000), np.float32))
        with av.open(io.BytesIO(buffer.getvalue())) as film:
            shown = sum(1 for _ in film.decode(video=0))
        assert 4 * n + 2 <= shown <= 4 * n + 4
    assert b"moof" in buffer.getvalue()


# Recording


def test_a_recording_ends_to_the_frame() -> None:
    class Kept:
        frames = samples = 0

        def add(self, frames: Any, sound: Any = None) -> None:
            self.frames, self.samples = self.frames + len(frames), self.samples + sound.shape[1]

    kept, told = Kept(), []
    film = ToyFilm("a red ball", sample_rate=16_000)
    summary = record(film, kept, seconds=1.3, each=told.append)
    assert (summary.frames, kept.frames, summary.chunks, summary.ended) == (10, 10, 3, "done")
    assert kept.samples == round(10 / 8 * 16_000)
    assert [t.frames for t in told] == [CHUNK, CHUNK, 2]
    assert summary.made_per_second == pytest.approx(CHUNK / 0.01)
    assert (summary.network_share, summary.decode_share) == pytest.approx((0.6, 0.3))


def test_raw_frames_are_the_frames() -> None:
    reading, writing = os.pipe()
    with open(reading, "rb") as reader:
        got: list[bytes] = []
        thread = threading.Thread(target=lambda: got.append(reader.read()))
        thread.start()
        record(ToyFilm("a red ball"), RawFrames(Pipe(writing)), seconds=1.0)
        os.close(writing)
        thread.join()
    film = ToyFilm("a red ball")
    expected = torch.cat([film.next().video_PHW3, film.next().video_PHW3])
    assert got == [expected.numpy().tobytes()]


@pytest.mark.parametrize("reel", [RawFrames, lambda pipe: FilmWriter(pipe, 8.0, *SIZE)])
def test_a_reader_that_leaves_ends_the_recording(reel: Callable[[Pipe], Any]) -> None:
    reading, writing = os.pipe()
    film = ToyFilm("a red ball")
    made = reel(Pipe(writing))
    os.close(reading)
    summary = record(film, made, seconds=1e6)
    assert summary.ended == "the reader left"
    assert film.chunk < 100
    os.close(writing)


# The command


@pytest.fixture(scope="module")
def model() -> Model:
    return toy_model(plan="chunks")


@pytest.fixture
def folder(ctrl_c: None, tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the command finds a model whatever it is called."""
    monkeypatch.setattr("motionloom.cli.assemble.open_model", lambda *a, **k: model)
    monkeypatch.setattr("motionloom.cli.lora.into_weights", lambda *a, **k: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments: str, out: Any = None) -> tuple[int, str, str]:
    """Code, stdout and stderr of the command; stdout may be a file."""
    shown, err, before = out or io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["motionloom", "stream", "run", *arguments]
    code: Any = 0
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = before
    return code, shown.getvalue() if out is None else "", err.getvalue()


def reference(model: Model, frames: int, **ask: Any) -> np.ndarray:
    """What the engine makes."""
    film = Stream(model, Ask("red", **ask))
    made: list[torch.Tensor] = []
    while sum(map(len, made)) < frames:
        made.append(film.next().video_PHW3)
    return torch.cat(made).numpy()[:frames]


def test_a_film_as_the_engine_makes_it(folder: Path, model: Model) -> None:
    code, out, err = call("--prompt", "red", "--out", "film.mp4", "--seconds", "1.25", "--seed", "3")
    assert code == 0, err
    assert out.startswith("film.mp4: 1.2 s, 10 frames (done); first frame after ")
    shown = read_clip("film.mp4").video_FHW3
    near, far = (luma_gap(shown, reference(model, 10, seed=seed)) for seed in (3, 4))
    # These films are noise, of which H.264 keeps the colours at half the size only.
    assert near < 6
    assert near < far / 4


def luma_gap(one: np.ndarray, other: np.ndarray) -> float:
    """Mean distance in brightness of two films of one shape, 0 to 255."""
    assert one.shape == other.shape
    weights = np.array([0.2126, 0.7152, 0.0722])
    return float(np.abs((one.astype(float) - other) @ weights).mean())


def test_json_is_a_line_a_chunk_and_an_answer(folder: Path) -> None:
    code, out, err = call("--prompt", "red", "--out", "film.mp4", "--seconds", "1", "--json")
    assert code == 0, err
    answer = json.loads(out)
    assert (answer["out"], answer["frames"], answer["fps"], answer["ended"]) == ("film.mp4", 8, 8.0, "done")
    chunks = [json.loads(line) for line in err.splitlines()]
    assert [chunk["chunk"] for chunk in chunks] == list(range(answer["chunks"]))
    assert sum(chunk["frames"] for chunk in chunks) == 8
    assert {"network_s", "decode_s", "whole_s", "memory_bytes", "prompt"} <= chunks[0].keys()


def test_ctrl_c_leaves_a_whole_film(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = Stream.next

    def interrupted(film: Stream) -> Any:
        if film.chunk == 3:
            signal.raise_signal(signal.SIGINT)
        return usual(film)

    monkeypatch.setattr(Stream, "next", interrupted)
    code, out, err = call("--prompt", "red", "--out", "film.mp4")
    assert code == 0, err
    assert "(interrupted)" in out
    assert "Ctrl-C ends the film and keeps it" in err
    assert os.listdir() == ["film.mp4"]
    assert probe("film.mp4", count=True).frames == 8, "four chunks, the one that was being made too"


def test_numbers_that_are_none_end_the_film_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = Stream.next

    def fails(film: Stream) -> Any:
        if film.chunk == 3:
            raise FloatingPointError("the network gave numbers that are none in chunk 3")
        return usual(film)

    monkeypatch.setattr(Stream, "next", fails)
    code, _, err = call("--prompt", "red", "--out", "film.mp4")
    assert code == 2
    assert err.splitlines()[-1] == (
        "error: the film stopped after 0.8 s: the network gave numbers that are none in chunk 3; film.mp4 "
        "holds what was made before"
    )
    assert probe("film.mp4", count=True).frames == 6


def test_rgb24_through_stdout_and_how_to_read_it(folder: Path, model: Model) -> None:
    with open("frames.rgb", "w") as file:
        args = ("--prompt", "red", "--out", "-", "--format", "rgb24", "--seconds", "1")
        code, _, err = call(*args, out=file)
    assert code == 0, err
    assert Path("frames.rgb").read_bytes() == reference(model, 8).tobytes()
    assert "ffmpeg -f rawvideo -pixel_format rgb24 -video_size 24x16 -framerate 8 -i -" in err


def test_fragments_through_stdout(folder: Path) -> None:
    with open("film.mp4", "w") as file:
        code, _, err = call("--prompt", "red", "--out", "-", "--seconds", "1", "--json", out=file)
    assert code == 0, err
    lines = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    assert lines[-1]["ended"] == "done", "stdout is the film's, so the answer goes to stderr"
    assert probe("film.mp4", count=True).frames == 8


def test_a_film_goes_on_from_an_image(folder: Path, model: Model) -> None:
    Image.new("RGB", (48, 32), (30, 200, 90)).save("green.png")
    code, _, err = call("--prompt", "red", "--out", "film.mp4", "--seconds", "1", "--image", "green.png")
    assert code == 0, err
    tokenizer = model.tokenizer
    image = torch.tensor([30, 200, 90], dtype=torch.uint8).expand(1, 2, *SIZE, 3)
    kept = tokenizer.decode(tokenizer.encode(image))[0, :1].numpy()
    first = read_clip("film.mp4").video_FHW3[:1]
    assert luma_gap(first, kept) < 6, "what the tokenizer keeps of it"
    assert luma_gap(first, reference(model, 1)) > 12


def test_a_film_is_redrawn(folder: Path) -> None:
    lighter = {}
    for name, order in (("falls", (220, 30)), ("rises", (30, 220))):
        write_video(f"{name}.mp4", np.concatenate([flat(level, 8) for level in order]), 8.0)
        args = ("--prompt", "red", "--video", f"{name}.mp4", "--out", f"{name}_anew.mp4")
        code, out, err = call(*args, "--strength", "0.01")
        assert code == 0, err
        assert "2.0 s, 16 frames" in out
        light = levels(Path(f"{name}_anew.mp4"))
        lighter[name] = np.mean(light[:8]) - np.mean(light[8:])
    # At hardly any noise what comes out follows what went in, also through weights that know nothing.
    assert lighter["falls"] > 8
    assert lighter["rises"] < -8


MISTAKES = [
    ((), "say where to: --out FILE.mp4"),
    (("--out", "a.mp4", "--serve"), "say where to"),
    (("--out", "a.mp4"), "--prompt is missing"),
    (("--prompt", "a", "--out", "a.avi"), "a.avi: films that grow are mp4; name it a.mp4"),
    (("--prompt", "a", "--out", "there.mp4"), "there.mp4: is there already"),
    (("--prompt", "a", "--out", "-", "--format", "webm"), "--format webm: choose mp4 or rgb24"),
    (("--prompt", "a", "--out", "a.mp4", "--format", "rgb24"), "--format rgb24 is for a pipe"),
    (("--prompt", "a", "--out", "a.mp4", "--size", "17"), "height 17 does not fill latent cells"),
    (("--prompt", "a" * 2001, "--out", "a.mp4"), "a prompt of 2001 characters"),
    (("--prompt", "a", "--out", "a.mp4", "--image", "text.png"), "text.png: is not a picture"),
    (("--prompt", "a", "--out", "a.mp4", "--video", "none.mp4"), "none.mp4: does not exist"),
    (("--prompt", "a", "--out", "a.mp4", "--video", "still.png"), "is a still, and --video is a film"),
    (("--prompt", "a", "--serve", "--video", "there.mp4"), "without --serve"),
    (("--prompt", "a", "--serve", "--token", ""), "--token is empty"),
    (("--prompt", "a", "--serve", "--host", "nowhere at all"), "no such address"),
    (("--prompt", "a", "--serve", "--seconds", "3"), "--seconds is the length of a file"),
    (("--prompt", "a", "--out", "a.mp4", "--port", "99"), "--port is of the page: say --serve"),
    (("--prompt", "a", "--out", "a.mp4", "--origin", "http://a"), "--origin is of the page"),
    (("--prompt", "a", "--out", "a.mp4", "--strength", "0.5"), "--strength is of a film that is redrawn"),
    (("--prompt", "a", "--out", "a.mp4", "--seconds", "inf"), "--seconds inf: say a number"),
    (("--prompt", "a", "--out", "a.mp4", "--fps", "1e-9"), "fps 1e-09: must be from 0.1 to 1000"),
    (("--prompt", "a", "--out", "a.mp4", "--size", "1000000"), "must be from 1 to 8192 pixels"),
    (("--prompt", "\udcff", "--out", "a.mp4"), "the prompt holds characters that are none"),
]


@pytest.mark.parametrize(("arguments", "line"), MISTAKES, ids=lambda value: str(value)[-40:])
def test_mistakes_end_in_one_line(folder: Path, arguments: tuple[str, ...], line: str) -> None:
    Path("there.mp4").write_bytes(b"mine")
    Path("text.png").write_text("text")
    Image.new("RGB", (8, 8)).save("still.png")
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert line in err.splitlines()[-1]
    assert "Traceback" not in err
    assert sorted(os.listdir()) == ["still.png", "text.png", "there.mp4"]
    assert Path("there.mp4").read_bytes() == b"mine"


def test_a_port_in_use_ends_in_one_line(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, _, err = call("--serve", "--port", port)
    assert code == 2
    assert err.splitlines()[-1] == f"error: --port {port} is in use: name another, or 0 for any that is free"


def test_a_model_that_makes_clips_whole_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("motionloom.cli.assemble.open_model", lambda *a, **k: toy_model())
    code, _, err = call("--prompt", "a", "--out", "a.mp4")
    assert code == 2
    assert "makes a clip whole and cannot stream: take one of plan.type: chunks" in err


def served(*arguments: str, visit: Callable[[str], Any]) -> tuple[dict[str, Any], Any]:
    """Serve, visit the page that it names, and press Ctrl-C: its first answer, and what the visit gave."""
    reading, writing = os.pipe()
    found: list[Any] = []

    def visitor() -> None:
        with open(reading) as lines:
            answer = json.loads(lines.readline())
            try:
                found.extend((answer, visit(answer["page"])))
            finally:
                os.kill(os.getpid(), signal.SIGINT)
                lines.read()

    thread = threading.Thread(target=visitor)
    thread.start()
    with open(writing, "w") as out:
        code, _, err = call("--serve", "--port", "0", "--json", *arguments, out=out)
    thread.join()
    assert code == 0, err
    return found[0], found[1]


def status(page: str) -> int:
    try:
        with urllib.request.urlopen(page, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_a_page_is_served_until_ctrl_c(folder: Path) -> None:
    answer, found = served("--prompt", "red", visit=status)
    assert answer["page"].startswith("http://127.0.0.1:")
    assert (answer["token"], found) == (None, 200)


def test_beyond_loopback_a_token_is_made_and_asked_for(folder: Path) -> None:
    def visit(page: str) -> tuple[int, int]:
        port = page.split(":")[2].split("/")[0]
        here = f"http://127.0.0.1:{port}/"
        return status(here), status(here + "?" + page.partition("?")[2])

    answer, found = served("--prompt", "red", "--host", "0.0.0.0", visit=visit)
    assert len(answer["token"]) >= 32
    assert answer["page"].endswith(f"?token={answer['token']}")
    assert found == (401, 200)


def test_the_command_line_says_the_extra_that_is_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "motionloom.studio.stream.server", None)
    monkeypatch.delitem(sys.modules, "motionloom.studio.stream.serve", raising=False)
    code, _, err = call("--serve", "--port", "0")
    assert code == 2
    assert "pip install 'motionloom[stream]'" in err


def test_files_and_pipes_need_no_server() -> None:
    script = (
        "import motionloom.cli.stream, motionloom.studio.stream.record, motionloom.data.media.film, sys;"
        "print({'fastapi', 'uvicorn', 'websockets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_errors_of_a_disk_keep_their_number() -> None:
    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    told = raised(OSError, lambda: FilmWriter(Full(), 8.0, *SIZE).add(flat(0)))
    assert isinstance(told, OSError)
    assert told.errno == errno.ENOSPC
