"""The player: what viewers get, what commands do, and that no viewer, image or network brings it down.

Most tests use a film that is drawn instead of generated. A "seen" viewer is one of the hub; an "online" one
comes through a real server and its socket.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import shutil
import signal
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from websockets.sync import client

from motionloom.data.media import probe, read_clip
from motionloom.errors import UserError
from motionloom.generate.stream import Ask, Stream
from motionloom.studio.stream import Hub, Session, Spool, messages
from motionloom.studio.stream.figures import Playout, quantile
from motionloom.studio.stream.hub import Viewer
from motionloom.studio.stream.messages import PICTURE, SOUND, Back, Block, Pause, Play, Refused, Restart, Say
from motionloom.studio.stream.serve import listen, serve
from motionloom.studio.stream.server import Door
from motionloom.studio.stream.session import MOST_COMMANDS, Show
from toy_film import CHUNK, COLORS, ToyFilm, slow
from toy_model import toy_model

PATIENCE = 20.0


def until(there: Callable[[], Any], what: str, patience: float = PATIENCE, step: float = 0.005) -> Any:
    """Wait for something to become true; looks every ``step`` seconds."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if value := there():
            return value
        time.sleep(step)
    raise AssertionError(f"never: {what}")


# A session without a network


@dataclass
class Seen:
    """A viewer of the hub that keeps all it takes."""

    hub: Hub
    viewer: Viewer
    news: list[dict[str, Any]] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)

    def look(self) -> Seen:
        """Take all that is there."""
        while (message := self.hub.take(self.viewer)) is not None:
            if isinstance(message, str):
                self.news.append(json.loads(message))
            else:
                self.blocks.append(Block.unpacked(message))
        return self

    def of(self, kind: str) -> list[dict[str, Any]]:
        """News of one type."""
        return [news for news in self.look().news if news["type"] == kind]

    def frames(self, epoch: int = 1) -> list[Block]:
        """Pictures; the first epoch is 1."""
        return [block for block in self.look().blocks if block.kind == PICTURE and block.epoch == epoch]

    def wait_for(self, kind: str) -> dict[str, Any]:
        """The first news of a type."""
        found = until(lambda: self.of(kind), f"{kind} among {[n['type'] for n in self.news]}")
        return found[0]

    def wait_for_frames(self, count: int, epoch: int = 1) -> list[Block]:
        """So many frames at least."""
        return until(lambda: len(self.frames(epoch)) >= count and self.frames(epoch), f"{count} frames")


def pixels(block: Block) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(block.body)).convert("RGB"))


@dataclass
class Studio:
    """A session with its films."""

    session: Session
    films: list[ToyFilm]
    log: list[str]

    @property
    def hub(self) -> Hub:
        return self.session.hub

    @property
    def film(self) -> ToyFilm:
        """The newest."""
        return self.films[-1]

    def watch(self) -> Seen:
        """Another viewer."""
        return Seen(self.hub, self.hub.join(lambda: None))

    @property
    def state(self) -> str:
        return str(self.session.figures()["state"])


@contextlib.contextmanager
def studio(
    prompt: str | None = "a red ball",
    *,
    begin: bool = True,
    frames: int = 96,
    viewers: int = 32,
    **options: Any,
) -> Iterator[Studio]:
    """A session that runs; ``lead`` and ``clock`` are its own, all else is the film's."""
    films: list[ToyFilm] = []
    log: list[str] = []

    def open_film(prompt: str, take: int) -> ToyFilm:
        films.append(ToyFilm(prompt, **film))
        return films[-1]

    own = {key: options.pop(key) for key in ("lead", "clock") if key in options}
    film = options
    session = Session(open_film, Hub(frames, viewers), Spool(), prompt=prompt, log=log.append, **own)
    if begin:
        session.start()
    try:
        yield Studio(session, films, log)
    finally:
        if begin:
            session.close()


FAST = {"lead": 1e9}
"""As fast as it can, whatever is shown."""


def test_frames_come_in_order_as_they_were_made() -> None:
    with studio(**FAST, sample_rate=16_000) as here:
        frames = here.watch().wait_for_frames(3 * CHUNK)
    assert [block.count for block in frames] == list(range(len(frames)))
    assert [block.seconds for block in frames] == [n / 8 for n in range(len(frames))]
    reference = torch.cat([ToyFilm("a red ball").next().video_PHW3 for _ in range(1)])
    assert np.array_equal(np.stack([pixels(block) for block in frames[:CHUNK]]), reference.numpy())


def test_sound_comes_with_its_place_in_the_film() -> None:
    with studio(**FAST, sample_rate=16_000) as here:
        seen = here.watch()
        seen.wait_for_frames(3 * CHUNK)
    sounds = [block for block in seen.blocks if block.kind == SOUND]
    assert [block.seconds for block in sounds[:3]] == [0, 0.5, 1.0]
    assert [(block.count, block.channels) for block in sounds[:2]] == [(8000, 1)] * 2
    wave = np.frombuffer(b"".join(block.body for block in sounds[:2]), "<f4")
    expected = 0.4 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    assert np.abs(wave - expected).max() < 1e-4


def test_all_viewers_see_the_same() -> None:
    with studio(**FAST) as here:
        one, two = here.watch(), here.watch()
        first, second = one.wait_for_frames(4 * CHUNK), two.wait_for_frames(4 * CHUNK)
    many = min(len(first), len(second))
    assert [block.packed() for block in first[:many]] == [block.packed() for block in second[:many]]


def test_who_comes_late_sees_the_newest_frame_at_once() -> None:
    with studio(lead=0.0, clock=lambda: 0.0) as here:
        here.watch().wait_for_frames(CHUNK)
        until(lambda: here.state == "ahead", "enough is made")
        late = here.watch().look()
    assert [block.count for block in late.blocks] == [CHUNK - 1]


def test_a_prompt_acts_from_the_next_chunk_on() -> None:
    with studio(**FAST, before=slow(0.01)) as here:
        seen = here.watch()
        seen.wait_for_frames(CHUNK)
        here.session.obey(Say(prompt="a blue ball", recache=True), seen.viewer)
        told = seen.wait_for("prompt")
        seen.wait_for_frames(round(told["at"] * 8) + CHUNK)
        switch = next(chunk for chunk in seen.of("chunk") if chunk["prompt"] == "a blue ball")
        assert until(lambda: here.session.figures()["prompt_s"], "the time that it took") < PATIENCE
    assert told["at"] == switch["at"]
    assert here.film.recached == [True]
    first = next(block for block in seen.frames() if block.seconds == switch["at"])
    for block, color in ((first, "blue"), (seen.frames()[first.count - 1], "red")):
        assert (pixels(block).reshape(-1, 3) == COLORS[color]).all(axis=1).any(), color


def test_no_prompt_no_film_until_one_is_said() -> None:
    with studio(None, **FAST) as here:
        seen = here.watch()
        until(lambda: here.state == "idle", "nothing to do")
        assert here.films == []
        here.session.obey(Say(prompt="a green ball"), seen.viewer)
        seen.wait_for_frames(CHUNK)
    assert here.film.prompt == "a green ball"


# Back


def test_going_back_begins_at_the_border_before_what_was_seen() -> None:
    # While the clock stands, chunks are begun as long as 2 s or less wait: five of half a second.
    with studio(lead=2.0, clock=lambda: 0.0) as here:
        seen = here.watch()
        before = {block.count: block.body for block in seen.wait_for_frames(5 * CHUNK)}
        # Seen: 2.2 s of 2.5 s. One second before it is 1.2 s, and the border before that 1.0 s.
        here.session.obey(Back(seconds=1.0, at=2.2), seen.viewer)
        cut = seen.wait_for("cut")
        again = seen.wait_for_frames(CHUNK, epoch=2)
    assert (cut["at"], cut["no_further"], cut["epoch"]) == (1.0, False, 2)
    assert [block.count for block in again[:CHUNK]] == [8, 9, 10, 11]
    assert again[0].body == before[8]


def test_going_back_before_the_start_is_the_start() -> None:
    with studio(**FAST, before=slow(0.01)) as here:
        seen = here.watch()
        seen.wait_for_frames(3 * CHUNK)
        here.session.obey(Back(seconds=1e6, at=1.0), seen.viewer)
        cut = seen.wait_for("cut")
        again = seen.wait_for_frames(1, epoch=2)
    assert (cut["at"], cut["no_further"]) == (0, True)
    assert again[0].count == 0


def test_what_was_gone_back_over_is_not_saved(tmp_path: Path) -> None:
    spool = Spool()
    spool.begin(8.0, 0)
    for n in range(4):
        spool.add(4 * n, np.full((4, 16, 24, 3), 60 * n, np.uint8), None)
    spool.cut(6)  # in the middle of the second
    spool.add(6, np.full((4, 16, 24, 3), 250, np.uint8), None)
    assert spool.save(tmp_path / "film.mp4") == spool.seconds == 10 / 8
    levels = read_clip(tmp_path / "film.mp4").video_FHW3.mean(axis=(1, 2, 3))
    assert levels == pytest.approx([0] * 4 + [60] * 2 + [250] * 4, abs=4)


# An image, and saving


def test_the_film_goes_on_from_an_image_and_back_no_further() -> None:
    green = torch.tensor(COLORS["green"], dtype=torch.uint8).expand(16, 24, 3)
    with studio(**FAST, before=slow(0.01)) as here:
        seen = here.watch()
        seen.wait_for_frames(2 * CHUNK)
        here.session.obey(Show(green), seen.viewer)
        at = seen.wait_for("image")["at"]
        first = round(at * 8)
        frames = seen.wait_for_frames(first + CHUNK)
        # The film itself counts from the image on.
        here.film.chunk = 1
        here.session.obey(Back(seconds=100), seen.viewer)
        cut = seen.wait_for("cut")
    assert (pixels(frames[first])[0, 0] == COLORS["green"]).all()
    assert (pixels(frames[first - 1])[0, 0] == 24).all()
    assert (cut["at"], cut["no_further"]) == (at, True)


def test_a_saved_film_holds_what_was_made_with_its_sound(tmp_path: Path) -> None:
    with studio(**FAST, sample_rate=16_000, size=(33, 48), before=slow(0.01)) as here:
        here.watch().wait_for_frames(5 * CHUNK)
    here.session.spool.save(tmp_path / "film.mp4")
    info = probe(tmp_path / "film.mp4", count=True)
    assert (info.width, info.height, info.fps, info.has_sound) == (48, 34, 8.0, True)
    assert info.frames == here.film.chunk * CHUNK
    shown = read_clip(tmp_path / "film.mp4").video_FHW3[:CHUNK, :33]
    made = ToyFilm("a red ball", size=(33, 48)).next().video_PHW3.numpy()
    assert np.abs(shown.astype(int) - made).mean() < 4


def test_a_spool_keeps_the_newest(tmp_path: Path) -> None:
    spool = Spool(most_bytes=4000)
    spool.begin(8.0, 16_000)
    for n in range(10):
        spool.add(4 * n, np.full((4, 16, 24, 3), 20 * n, np.uint8), np.zeros((1, 500), np.float32))
    assert 0.5 <= spool.seconds < 5
    spool.save(tmp_path / "film.mp4")
    assert read_clip(tmp_path / "film.mp4").video_FHW3[-1].mean() == pytest.approx(180, abs=4)
    spool.begin(8.0, 0)
    assert spool.seconds == 0


def test_a_full_disk_is_told_when_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    spool = Spool()
    spool.begin(8.0, 0)
    spool.add(0, np.zeros((4, 16, 24, 3), np.uint8), None)
    monkeypatch.setattr("motionloom.studio.stream.spool.join_films", full)
    with pytest.raises(Refused, match="the disk is full; make room in"):
        spool.save(tmp_path / "film.mp4")
    monkeypatch.undo()
    assert spool.save(tmp_path / "film.mp4") == 0.5, "nothing was lost"


# For whom frames are made


def test_nothing_is_made_while_nobody_watches() -> None:
    with studio(**FAST) as here:
        until(lambda: here.state == "waiting", "nobody watches")
        assert here.film.chunk == 0
        seen = here.watch()
        seen.wait_for_frames(CHUNK)
        here.hub.leave(seen.viewer)
        until(lambda: here.state == "waiting", "nobody watches any more")
        made = here.film.chunk
        time.sleep(0.1)
        assert here.film.chunk == made


def test_a_pause_leaves_no_hole() -> None:
    with studio(**FAST, before=slow(0.02)) as here:
        seen = here.watch()
        seen.wait_for_frames(CHUNK)
        here.session.obey(Pause(), seen.viewer)
        until(lambda: here.state == "waiting", "the only viewer paused")
        made = here.film.chunk * CHUNK
        assert len(seen.frames()) <= made
        here.session.obey(Play(), seen.viewer)
        frames = seen.wait_for_frames(made + CHUNK)
    assert [block.count for block in frames] == list(range(len(frames)))


def test_the_film_passes_by_who_paused_while_others_watch() -> None:
    with studio(**FAST, before=slow(0.01)) as here:
        one, two = here.watch(), here.watch()
        one.wait_for_frames(CHUNK)
        here.session.obey(Pause(), one.viewer)
        held = len(one.blocks)
        two.wait_for_frames(20 * CHUNK)
        assert len(one.look().blocks) == held
        here.session.obey(Play(), one.viewer)
        until(lambda: len(one.look().blocks) > held, "frames again")
        assert one.blocks[held].count > one.blocks[held - 1].count + CHUNK
        assert one.viewer.dropped == 0


def test_no_more_is_made_than_the_lead() -> None:
    # 0.5 s a chunk. While the clock stands, chunks are begun as long as 1.2 s or less wait: 0, 0.5 and 1.0 s.
    with studio(lead=1.2, clock=lambda: 0.0) as here:
        here.watch().wait_for_frames(3 * CHUNK)
        until(lambda: here.state == "ahead", "enough is made")
        time.sleep(0.05)
        assert here.film.chunk == 3
        assert here.session.figures()["ahead_s"] == 1.5


def settle(here: Studio) -> None:
    """Wait until nothing is made any more."""
    before = None
    while (now := (here.film.chunk, here.state)) != before:
        before = now
        time.sleep(0.3)


def test_a_slow_viewer_drops_the_oldest_frames_and_is_told_and_the_other_drops_none() -> None:
    with studio(**FAST, frames=16) as here:
        slow_one, quick = here.watch(), here.watch()
        until(lambda: len(quick.frames()) >= 60, "frames")
        here.session.obey(Pause(), quick.viewer)
        settle(here)
        assert here.state == "full", "the slow one alone is nobody to make frames for"
        left = [block.count for block in slow_one.viewer.blocks]
        made = here.film.chunk * CHUNK
        here.session.obey(Pause(), slow_one.viewer)
        figures = until(lambda: slow_one.of("figures"), "figures")[-1]
    assert figures["dropped_here"] == slow_one.viewer.dropped == made - 16
    assert left == list(range(made - 16, made)), "the newest, in order"
    assert quick.viewer.dropped == 0
    assert here.hub.dropped == made - 16


def test_a_viewer_that_says_what_it_has_seen_is_not_sent_more_than_half_a_queue() -> None:
    with studio(**FAST, frames=16) as here:
        seen = here.watch()
        # The last is more than it was sent, and counts as all of that.
        for said, most in ((0, 8), (5, 5 + 8), (1000, 13 + 8)):
            here.session.obey(messages.Seen(frames=said), seen.viewer)
            seen.wait_for_frames(most)
            settle(here)
            assert len(seen.frames()) == most


def test_where_all_queues_are_full_the_maker_waits_and_nothing_is_dropped() -> None:
    with studio(**FAST, frames=16) as here:
        seen = here.watch()
        until(lambda: here.state == "full", "a full queue")
        assert here.film.chunk == 4
        assert seen.viewer.dropped == 0
        seen.wait_for_frames(5 * CHUNK)
        assert seen.viewer.dropped == 0


def test_a_queue_holds_some_chunks_however_long_they_are() -> None:
    with studio(**FAST, frames=1) as here:
        seen = here.watch()
        seen.wait_for_frames(6 * CHUNK)
        assert seen.viewer.dropped == 0


# Figures


def test_gaps_are_those_of_a_screen_that_shows_each_frame_in_its_turn() -> None:
    quick, late = Playout(8.0), Playout(8.0)
    for chunk in range(10):
        quick.arrive(4, now=0.25 * chunk)  # twice as fast as it is shown
        late.arrive(4, now=1.0 * chunk)  # half as fast
    assert list(quick.gaps) == pytest.approx([1 / 8] * 39)
    assert quick.ahead(2.25) == pytest.approx(40 / 8 - 2.25)
    # 3 gaps of 1/8 s within a chunk, and one of the rest of the second.
    assert sorted(late.gaps)[:30] == pytest.approx([1 / 8] * 30)
    assert sorted(late.gaps)[30:] == pytest.approx([1 - 3 / 8] * 9)
    assert quantile(list(late.gaps), 0.5) == pytest.approx(1 / 8)
    assert quantile(list(late.gaps), 0.95) == pytest.approx(5 / 8)


def test_a_pause_is_no_gap_and_uses_up_nothing() -> None:
    playout = Playout(8.0)
    playout.arrive(8, now=0.0)
    playout.freeze(0.5)
    assert playout.ahead(100.0) == 0.5
    playout.arrive(4, now=50.0)
    playout.thaw(100.0)
    assert playout.ahead(100.0) == 1.0
    playout.arrive(4, now=100.0)
    assert max(playout.gaps) == pytest.approx(1 / 8)


def test_quantiles_are_nearest_ranks() -> None:
    assert quantile([3, 1, 2, 4], 0.5) == 2
    assert quantile(list(range(1, 101)), 0.95) == 95
    assert math.isnan(quantile([], 0.5))


def test_figures_tell_what_was_measured() -> None:
    with studio(**FAST, before=slow(0.05)) as here:
        seen = here.watch()
        seen.wait_for_frames(4 * CHUNK)
        figures = here.session.figures()
    assert 0.05 <= figures["first_frame_s"] < PATIENCE
    assert figures["made_per_second"] == pytest.approx(CHUNK / 0.01), "as the film says it"
    assert figures["network_share"] == pytest.approx(0.6)
    assert figures["decode_share"] == pytest.approx(0.3)
    assert figures["memory_bytes"] == 1_000_000
    assert (figures["viewers"], figures["dropped"]) == (1, 0)
    json.dumps(figures, allow_nan=False)


def test_figures_can_be_asked_while_they_change() -> None:
    with studio(**FAST) as here:
        seen, wrong = here.watch(), []

        def ask() -> None:
            try:
                for _ in range(400):
                    here.session.figures()
            except Exception as error:
                wrong.append(error)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            seen.look()
        count = len(seen.frames())
        seen.wait_for_frames(count + CHUNK)
    assert wrong == []


def test_waiting_for_a_viewer_is_no_time_to_the_first_frame() -> None:
    with studio(**FAST) as here:
        until(lambda: here.state == "waiting", "nobody watches")
        time.sleep(0.4)
        here.watch().wait_for_frames(CHUNK)
        assert until(lambda: here.session.figures()["first_frame_s"], "a first frame") < 0.4


# Faults of the network


def fails(chunk: int, error: Exception) -> Callable[[ToyFilm], object]:
    """Once, at a chunk."""
    left = [error]

    def before(film: ToyFilm) -> None:
        if film.chunk == chunk and left:
            raise left.pop()

    return before


NAN = "the network gave numbers that are none in chunk 2"


def test_numbers_that_are_none_stop_the_film_and_another_prompt_begins_one() -> None:
    with studio(**FAST, before=fails(2, FloatingPointError(NAN))) as here:
        seen = here.watch()
        assert seen.wait_for("stopped")["line"] == f"{NAN}; another prompt begins a new film"
        assert here.state == "stopped"
        assert len(seen.frames()) == 2 * CHUNK, "what was made is shown"
        here.session.obey(Say(prompt="a green ball"), seen.viewer)
        again = seen.wait_for_frames(CHUNK, epoch=2)
    assert [film.prompt for film in here.films] == ["a red ball", "a green ball"]
    assert again[0].count == 0
    assert here.log == [], "no defect"


def test_after_numbers_that_are_none_one_can_go_back() -> None:
    with studio(**FAST, before=fails(2, FloatingPointError(NAN))) as here:
        seen = here.watch()
        seen.wait_for("stopped")
        here.session.obey(Back(seconds=0.5), seen.viewer)
        frames = seen.wait_for_frames(2 * CHUNK, epoch=2)
    assert len(here.films) == 1
    assert [block.count for block in frames[: 2 * CHUNK]] == list(range(CHUNK, 3 * CHUNK))


def test_a_model_that_raises_is_told_in_one_line_and_logged_whole() -> None:
    with studio(**FAST, before=fails(1, RuntimeError("CUDA error: oops\nwith\nmore lines"))) as here:
        seen = here.watch()
        line = seen.wait_for("stopped")["line"]
        assert line == "the film stopped: RuntimeError: CUDA error: oops; another prompt begins a new film"
        assert "Traceback" in here.log[0]
        assert "more lines" in here.log[0]
        here.session.obey(Restart(), seen.viewer)
        seen.wait_for_frames(1, epoch=2)
    assert [film.prompt for film in here.films] == ["a red ball"] * 2


def test_a_film_that_cannot_begin_is_told() -> None:
    def refuse(prompt: str, take: int) -> ToyFilm:
        raise UserError("this model makes clips whole")

    session = Session(refuse, Hub(), Spool(), prompt="a")
    seen = Seen(session.hub, session.hub.join(lambda: None))
    session.start()
    try:
        assert seen.wait_for("error")["line"] == "this model makes clips whole"
        assert session.figures()["state"] == "stopped"
    finally:
        session.close()


def test_a_new_film_that_cannot_begin_leaves_the_one_that_plays() -> None:
    def once(prompt: str, take: int) -> ToyFilm:
        if take:
            raise UserError("no room for another")
        return ToyFilm(prompt)

    session = Session(once, Hub(), Spool(), prompt="red")
    seen = Seen(session.hub, session.hub.join(lambda: None))
    session.start()
    try:
        seen.wait_for_frames(1)
        session.obey(Restart(prompt="blue"), seen.viewer)
        assert seen.wait_for("error")["line"] == "no room for another"
        made = session.figures()["seconds"]
        session.obey(Say(prompt="green"), seen.viewer)
        assert seen.wait_for("prompt")["prompt"] == "green"
        assert session.figures()["seconds"] >= made > 0
    finally:
        session.close()


def test_commands_without_a_film_are_refused() -> None:
    with studio(None) as here:
        seen = here.watch()
        here.session.obey(Back(seconds=1), seen.viewer)
        assert seen.wait_for("error")["line"] == "there is no film yet: say a prompt first"


def test_too_many_commands_are_refused() -> None:
    with studio(begin=False) as here:
        seen = here.watch()
        for _ in range(MOST_COMMANDS - 1):  # the film's own beginning waits as well
            here.session.obey(Say(prompt="a"), seen.viewer)
        with pytest.raises(Refused, match="16 commands wait already"):
            here.session.obey(Say(prompt="a"), seen.viewer)


def test_too_many_viewers_are_refused() -> None:
    with studio(viewers=2, **FAST) as here:
        here.watch()
        here.watch()
        with pytest.raises(Refused, match="2 watch already"):
            here.watch()


# Messages


def test_blocks_come_out_as_they_went_in() -> None:
    block = Block(SOUND, 7, 12345, 6.25, b"\x01\x02", channels=2)
    assert Block.unpacked(block.packed()) == block
    assert len(block.packed()) == 22


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("{", "the message is not JSON"),
        ("[" * 5000, "the message is not JSON"),
        ('"say"', "unknown command"),
        ("{}", "unknown command"),
        ('{"type": "format_disk"}', '"type" is one of say, restart, back, play, pause, seen'),
        ('{"type": "say"}', '"prompt" of the command: field required'),
        ('{"type": "say", "prompt": 7}', '"prompt" of the command'),
        ('{"type": "say", "prompt": "a", "seed": 1}', '"seed" of the command: extra inputs'),
        (json.dumps({"type": "say", "prompt": "a" * 2001}), "prompt has more than 2,000 characters"),
        (json.dumps({"type": "say", "prompt": "a" * 100_000}), "a message of 100,0"),
        ('{"type": "back", "seconds": -1}', '"seconds" of the command'),
        ('{"type": "back", "seconds": NaN}', '"seconds" of the command'),
        ('{"type": "back", "seconds": 1, "at": 1e999}', '"at" of the command'),
    ],
)
def test_wrong_messages_are_refused_in_one_line(text: str, line: str) -> None:
    with pytest.raises(Refused) as refused:
        messages.parse(text)
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 200


def test_the_longest_prompt_is_taken_in_any_script() -> None:
    command = messages.parse(json.dumps({"type": "say", "prompt": "雪" * 2000}))
    assert command == Say(prompt="雪" * 2000)


# Through a server


@dataclass
class Online:
    """A server at an address."""

    studio: Studio
    port: int
    token: str | None

    def url(self, path: str = "", token: str | None = None) -> str:
        token = token if token is not None else self.token
        return f"http://127.0.0.1:{self.port}/{path}" + (f"?token={token}" if token else "")

    def get(self, path: str = "", data: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        """The status and the body of an answer."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        ask = urllib.request.Request(names.pop("url", self.url(path)), data, names)
        try:
            with urllib.request.urlopen(ask, timeout=PATIENCE) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def line(self, path: str, data: bytes | None = None, **headers: str) -> str:
        """Why it was refused."""
        status, body = self.get(path, data, **headers)
        assert 400 <= status < 500, (status, body[:200])
        value = json.loads(body)
        assert list(value) == ["error"]
        return str(value["error"])

    def socket(self, **headers: str) -> Any:
        """A viewer."""
        url = self.url("play").replace("http", "ws")
        return client.connect(
            url, additional_headers=headers, open_timeout=PATIENCE, compression=None, proxy=None
        )


@contextlib.contextmanager
def online(token: str | None = None, origins: tuple[str, ...] = (), **options: Any) -> Iterator[Online]:
    """A server in a thread of its own."""
    with studio(begin=False, **options) as here, listen("127.0.0.1", 0) as listener:
        end: list[Callable[[], None]] = []
        door = Door(token, origins)
        thread = threading.Thread(target=serve, args=(here.session, door, listener, end.append))
        thread.start()
        try:
            until(lambda: end, "the server answers")
            yield Online(here, listener.getsockname()[1], token)
        finally:
            end[0]()
            thread.join(PATIENCE)
            assert not thread.is_alive()


def hear(viewer: Any, kind: str) -> dict[str, Any]:
    """The next news of a type."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        message = viewer.recv(timeout=PATIENCE)
        if isinstance(message, str) and (news := json.loads(message))["type"] == kind:
            return news
    raise AssertionError(f"never: {kind}")


def see(viewer: Any) -> Block:
    """The next frame."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        message = viewer.recv(timeout=PATIENCE)
        if isinstance(message, bytes) and (block := Block.unpacked(message)).kind == PICTURE:
            return block
    raise AssertionError("never: a frame")


def png(width: int = 24, height: int = 16, color: tuple[int, int, int] = COLORS["green"]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), color).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def theatre() -> Iterator[Online]:
    """A server that the tests of faults share: each leaves it alive for the next."""
    with online(before=slow(0.01)) as server:
        yield server


def alive(server: Online) -> None:
    """Somebody who comes now sees frames."""
    with server.socket() as viewer:
        first = see(viewer)
        assert see(viewer).count == first.count + 1


def test_the_page_needs_nothing_from_elsewhere(theatre: Online) -> None:
    with urllib.request.urlopen(theatre.url(), timeout=PATIENCE) as answer:
        text, headers = answer.read().decode(), answer.headers
    assert "{{nonce}}" not in text
    assert text.count("nonce=") == 2
    links = text.replace("http://www.w3.org/2000/svg", "")
    assert "http://" not in links
    assert "https://" not in links
    assert "default-src 'none'" in headers["content-security-policy"]
    assert headers["x-frame-options"] == "DENY"


def test_a_viewer_online_plays_switches_goes_back_and_saves(tmp_path: Path) -> None:
    with online(before=slow(0.01), sample_rate=16_000) as server, server.socket() as viewer:
        film = hear(viewer, "film")
        assert (film["width"], film["height"], film["fps"], film["sample_rate"]) == (24, 16, 8, 16_000)
        assert see(viewer).count == 0
        viewer.send(json.dumps({"type": "say", "prompt": "a blue ball"}))
        told = hear(viewer, "prompt")
        while (block := see(viewer)).seconds < told["at"]:
            pass
        assert (pixels(block).reshape(-1, 3) == COLORS["blue"]).all(axis=1).any()
        viewer.send(json.dumps({"type": "back", "seconds": 0.5}))
        cut = hear(viewer, "cut")
        assert see(viewer).seconds == cut["at"]
        assert server.get("image", png())[0] == 202
        hear(viewer, "image")
        assert {"first_frame_s", "gap_p95_s", "memory_bytes", "dropped_here"} <= hear(
            viewer, "figures"
        ).keys()
        status, body = server.get("film.mp4")
        assert status == 200
        (tmp_path / "film.mp4").write_bytes(body)
        assert probe(tmp_path / "film.mp4", count=True).has_sound


def test_an_image_of_any_size_is_turned_and_cropped_to_the_film(theatre: Online) -> None:
    sideways = Image.new("RGB", (60, 90), COLORS["red"])
    sideways.paste(COLORS["blue"], (0, 45, 60, 90))
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees: its lower half is then on the left
    sideways.save(buffer, "JPEG", exif=exif, quality=95)
    with theatre.socket() as viewer:
        see(viewer)
        assert theatre.get("image", buffer.getvalue())[0] == 202
        hear(viewer, "image")
    until(lambda: theatre.studio.film.shown[-1][1] is not None, "the image")
    shown = theatre.studio.film.shown[-1][1].numpy().astype(int)
    assert np.abs(shown[8, 2] - COLORS["blue"]).max() < 12
    assert np.abs(shown[8, -3] - COLORS["red"]).max() < 12
    theatre.studio.film.shown = theatre.studio.film.shown[:1]


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises much and whose data are some bytes."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", b"x") + part(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"", "this is no image: send PNG, JPEG, WEBP, GIF or BMP"),
        (b"%PDF-1.4 hello", "this is no image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "this is no image"),
        (bomb(60_000, 60_000), "pixels"),
        (bomb(9_000, 10), "the image has 9000 x 10 pixels, more than 8192 a side: scale it down"),
        (bomb(8_000, 8_000), "the image: "),
        (png(200, 200)[:-40], "the image: truncated"),
        (bytes(20_000_001), "the image has more than 20 MB: scale it down"),
    ],
    ids=["nothing", "text", "postscript", "bomb", "wide", "empty", "cut", "heavy"],
)
def test_what_is_no_image_is_refused_in_one_line(theatre: Online, data: bytes, line: str) -> None:
    with theatre.socket() as viewer:
        see(viewer)
        said = theatre.line("image", data)
    assert line in said
    assert "\n" not in said
    assert "/tmp" not in said
    alive(theatre)


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (json.dumps({"type": "say", "prompt": "a" * 100_000}), "a message of 100,0"),
        ("now!", "the message is not JSON"),
        ('{"type": "fly"}', "unknown command"),
        (b"\x00\x01", "a binary message"),
    ],
    ids=["long", "text", "unknown", "binary"],
)
def test_wrong_messages_are_answered_and_the_viewer_goes_on(
    theatre: Online, message: str | bytes, line: str
) -> None:
    with theatre.socket() as viewer:
        see(viewer)
        viewer.send(message)
        assert line in hear(viewer, "error")["line"]
        assert see(viewer)


def test_a_viewer_that_vanishes_in_the_middle_of_a_frame(theatre: Online) -> None:
    viewer = theatre.socket()
    see(viewer)
    raw = viewer.socket
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # no goodbye: a reset
    raw.close()
    until(lambda: theatre.studio.hub.viewers == 0, "it is noticed")
    until(lambda: theatre.studio.state == "waiting", "and nothing is made any more")
    alive(theatre)


def test_a_viewer_that_stalls_does_not_hold_up_the_other() -> None:
    # Frames of noise are large, so that what the system holds for a connection is soon full.
    noise = torch.randint(
        0, 256, (180, 180, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    with online(**FAST, frames=16, size=(180, 180)) as server:
        stalled, quick = server.socket(), server.socket()
        see(quick)
        server.studio.session.obey(Show(noise))
        joined = server.studio.hub._viewers[:]
        end = time.monotonic() + PATIENCE
        while joined[0].dropped < 20 and time.monotonic() < end:
            block = see(quick)
        assert joined[0].dropped >= 20
        assert joined[0].waiting <= 16
        assert see(quick).count > block.count
        # It reads again, sees what is left for it, and is told.
        while (news := hear(stalled, "figures"))["dropped_here"] == 0:
            pass
        assert news["dropped_here"] >= 20
        quick.close()
        stalled.close()


def test_saving_before_the_first_frame_is_refused() -> None:
    with online(prompt=None) as server:
        assert server.line("film.mp4") == "nothing was made yet: play first, then save"
        assert server.line("image", png()) == "there is no film yet: say a prompt first"


def test_a_full_disk_when_saving_is_told_online(theatre: Online, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    alive(theatre)
    monkeypatch.setattr("motionloom.studio.stream.spool.join_films", full)
    assert "the film cannot be saved: the disk is full" in theatre.line("film.mp4")
    monkeypatch.undo()
    assert theatre.get("film.mp4")[0] == 200


def refused_socket(server: Online, **headers: str) -> tuple[int, str]:
    from websockets.exceptions import InvalidStatus

    with pytest.raises(InvalidStatus) as refused:
        server.socket(**headers)
    return refused.value.response.status_code, json.loads(refused.value.response.body)["error"]


def test_a_token_is_asked_of_pages_and_sockets() -> None:
    wrong = "the token is missing or wrong: open the address that the command printed"
    with online(token="geheim-ä", before=slow(0.01)) as server:
        bare = f"http://127.0.0.1:{server.port}/"
        for path in ("", "figures", "film.mp4", "image", "nowhere"):
            assert server.line("", url=bare + path) == wrong
            assert server.line("", url=bare + path + "?token=geheim") == wrong
        assert server.line("", X_Token="falsch", url=bare) == wrong
        assert refused_socket(Online(server.studio, server.port, "falsch")) == (401, wrong)
        assert refused_socket(Online(server.studio, server.port, None)) == (401, wrong)
        quoted = "geheim-%C3%A4"
        assert server.get("", url=f"{bare}?token={quoted}")[0] == 200
        with Online(server.studio, server.port, quoted).socket() as viewer:
            assert see(viewer).count == 0
        # With a token the name by which it is asked for does not matter.
        assert server.get("", url=f"{bare}?token={quoted}", Host="films.example.org")[0] == 200


def test_a_token_may_come_in_a_header() -> None:
    with online(token="secret") as server:
        bare = f"http://127.0.0.1:{server.port}/figures"
        assert server.get("", url=bare, Authorization="Bearer secret")[0] == 200
        assert server.get("", url=bare, X_Token="secret")[0] == 200


def test_pages_from_elsewhere_may_not_connect(theatre: Online) -> None:
    status, line = refused_socket(theatre, Origin="https://evil.example.org")
    assert status == 403
    assert line == "a page of https://evil.example.org may not connect: allow it with --origin"
    assert "may not connect" in theatre.line("image", png(), Origin="https://evil.example.org")
    with theatre.socket(Origin=f"http://127.0.0.1:{theatre.port}") as viewer:
        assert see(viewer)


def test_a_name_that_leads_here_is_not_this_machine(theatre: Online) -> None:
    assert "evil.example.org is not this machine" in theatre.line("", Host="evil.example.org")
    for host in ("localhost:1234", "127.0.0.1", "[::1]:7861"):
        assert theatre.get("", Host=host)[0] == 200


def test_an_origin_can_be_allowed() -> None:
    with online(origins=("https://films.example.org/",), before=slow(0.01)) as server:
        with server.socket(Origin="https://films.example.org") as viewer:
            assert see(viewer)
        assert server.get("", Host="films.example.org")[0] == 200
        assert refused_socket(server, Origin="https://films.example.com")[0] == 403


def test_one_viewer_too_many_is_told_why() -> None:
    with online(viewers=1, before=slow(0.01)) as server, server.socket() as first:
        see(first)
        with server.socket() as second:
            assert "1 watch already" in hear(second, "error")["line"]
        assert see(first)


def test_a_network_that_fails_leaves_the_server_alive() -> None:
    with (
        online(before=fails(1, FloatingPointError(NAN))) as server,
        server.socket() as one,
        server.socket() as two,
    ):
        for viewer in (one, two):
            # Whoever comes after it stopped is told as well.
            while not (problem := hear(viewer, "figures")["problem"]):
                pass
            assert problem == f"{NAN}; another prompt begins a new film"
        one.send(json.dumps({"type": "say", "prompt": "a green ball"}))
        for viewer in (one, two):
            assert hear(viewer, "film")["prompt"] == "a green ball"
            assert see(viewer).count == 0


# Addresses


def test_a_port_in_use_is_told() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port} is in use: name another, or 0"):
            listen("127.0.0.1", port)


@pytest.mark.parametrize("host", ["no such host", "192.0.2.7"])
def test_a_host_that_is_not_ours_is_told(host: str) -> None:
    with pytest.raises(UserError, match="--host"):
        listen(host, 0)


def test_ctrl_c_ends_server_viewers_and_threads(ctrl_c: None) -> None:
    with studio(begin=False, before=slow(0.01)) as here, listen("127.0.0.1", 0) as listener:
        seen: list[Any] = []
        before = set(threading.enumerate())

        def visit() -> None:
            viewer = Online(here, listener.getsockname()[1], None).socket()
            seen.append(see(viewer))
            os.kill(os.getpid(), signal.SIGINT)
            with contextlib.suppress(Exception):
                while True:
                    viewer.recv(timeout=PATIENCE)
            seen.append("closed")

        thread = threading.Thread(target=visit)
        serve(here.session, Door(None), listener, lambda end: thread.start())
        thread.join(PATIENCE)
    assert seen[1:] == ["closed"]
    assert not [t.name for t in set(threading.enumerate()) - before if t.name.startswith("stream ")]


# The engine itself


def test_the_engine_streams_through_a_session() -> None:
    model = toy_model(plan="chunks")
    session = Session(
        lambda prompt, take: Stream(model, Ask(prompt, seed=take)),
        Hub(),
        Spool(),
        prompt="a red ball",
        lead=1e9,
    )
    seen = Seen(session.hub, session.hub.join(lambda: None))
    session.start()
    try:
        frames = seen.wait_for_frames(8)
        reference = torch.cat(
            [piece.video_PHW3 for piece, _ in zip(Stream(model, Ask("a red ball")), range(4), strict=False)]
        )
        made = np.stack([pixels(block) for block in frames[:8]])
        assert np.array_equal(made, reference.numpy()[:8])
        session.obey(Back(seconds=0.5), seen.viewer)
        at = seen.wait_for("cut")["at"]
        again = seen.wait_for_frames(1, epoch=2)
        assert again[0].count == round(at * 8)
        known = {block.count: block.body for block in frames}
        assert again[0].body == known.get(again[0].count, again[0].body)
        image = torch.full((16, 24, 3), 200, dtype=torch.uint8)
        session.obey(Show(image), seen.viewer)
        seen.wait_for("image")
        session.obey(Say(prompt="a blue ball", recache=True), seen.viewer)
        told = seen.wait_for("prompt")
        until(lambda: seen.frames(2)[-1].seconds >= told["at"], "the film goes on")
        assert seen.of("error") == seen.of("stopped") == []
        assert session.figures()["memory_bytes"] > 0
    finally:
        session.close()


# The page


def browser_path() -> str | None:
    """A Chromium of this machine."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    return next(filter(None, map(shutil.which, names)), None)


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Any]:
    """A page of a real browser without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = browser_path()
    if path is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        shown = browser.new_page(viewport={"width": 1280, "height": 860})
        shown.problems = []
        shown.on("pageerror", lambda error: shown.problems.append(str(error)))
        shown.on("console", lambda said: said.type == "error" and shown.problems.append(said.text))
        yield shown
        browser.close()


CENTRE = """() => {
  const screen = document.getElementById("screen"), pen = screen.getContext("2d");
  const all = pen.getImageData(0, 0, screen.width, screen.height).data, colors = new Set();
  for (let i = 0; i < all.length; i += 4) colors.add([all[i], all[i + 1], all[i + 2]].join());
  return [...colors];
}"""


@pytest.mark.slow
def test_the_page_plays_switches_goes_back_takes_an_image_and_saves(page: Any, tmp_path: Path) -> None:
    def shows(color: str) -> bool:
        return ",".join(map(str, COLORS[color])) in page.evaluate(CENTRE)

    def played() -> float:
        minutes, seconds = page.inner_text("#time").split(":")
        return 60 * int(minutes) + float(seconds)

    shown_is = partial(until, patience=60.0, step=0.2)
    with online(size=(48, 48), before=slow(0.02), sample_rate=16_000, lead=0.6) as server:
        page.goto(server.url())
        shown_is(lambda: played() > 0.5 and shows("red"), "it plays")
        assert page.inner_text("#state") == "live"
        assert page.inner_text("#f-viewers") == "1"
        page.click("#play")
        shown_is(lambda: server.studio.state == "waiting", "it pauses")
        time.sleep(0.2)  # what was on its way
        at = played()
        time.sleep(0.3)
        assert played() == at
        page.press("#stage", "Space")
        shown_is(lambda: played() > at, "it goes on")
        page.fill("#prompt", "a blue ball")
        page.press("#prompt", "Enter")
        shown_is(lambda: shows("blue"), "the new prompt")
        assert page.inner_text("#now") == "a blue ball"
        before = played()
        page.fill("#seconds", "100")
        page.click("#back")
        shown_is(lambda: played() < before, "it went back")
        page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": png()})
        shown_is(lambda: shows("green"), "the image")
        page.click("#sound")
        page.set_input_files("#file", {"name": "a.txt", "mimeType": "image/png", "buffer": b"text"})
        shown_is(lambda: "this is no image" in page.inner_text("#toasts"), "a refusal")
        with page.expect_download() as saved:
            page.click("#save")
        saved.value.save_as(tmp_path / "film.mp4")
        assert probe(tmp_path / "film.mp4", count=True).frames >= CHUNK
    shown_is(lambda: page.inner_text("#state") == "reconnecting", "the server ended")
    ours = [line for line in page.problems if "400" not in line and "ERR_CONNECTION" not in line]
    assert ours == []
