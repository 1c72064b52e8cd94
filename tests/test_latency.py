"""What the latency report says of streams whose every second is known: closed forms, no machine's clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import nn

from fake_stream import Clock, FakeStream, Step
from motionloom.errors import UserError
from motionloom.evals.latency import (
    Film,
    Recorder,
    counted,
    first_frame,
    gaps,
    judge_latency,
    latency,
    memory_growth,
    stall,
)
from motionloom.generate import Ask, ClipRequest, Stream, generate_clips, recipe_sampling
from toy_model import toy_model

OPENING = 0.5


def record(steps: Sequence[Step], seconds: float = 1.0, network: nn.Module | None = None) -> Film:
    clock = Clock()

    def open_stream() -> FakeStream:
        clock.now += OPENING
        return FakeStream(clock, steps)

    return Recorder(seconds, network, clock).record(open_stream, "000", "a prompt")


def held(memory: Sequence[int]) -> Film:
    return record([Step(memory=m) for m in memory], seconds=4 * len(memory) / 8)


# Recording


def test_a_roll_out_ends_with_the_chunk_that_makes_it_long_enough():
    film = record([Step(1), Step(4)], seconds=1.0)
    assert [chunk.frames for chunk in film.chunks] == [1, 4, 4]
    assert len(film.video_PHW3) == 9
    assert film.starts == (1, 5)
    assert film.whole_s == pytest.approx(OPENING + 3.0)


def test_exactly_enough_is_enough():
    assert len(record([Step(4)], seconds=1.0).video_PHW3) == 8
    assert len(record([Step(8)], seconds=0.1).video_PHW3) == 8


def test_borders_are_where_chunks_end_and_not_where_the_decoder_stops():
    # A decoder that keeps two frames back: chunks of 4 frames, of which 2, 4, 4 are out.
    waiting = [Step(2, made=4), Step(4), Step(4)]
    assert record(waiting, seconds=1.25).starts == (4, 8)
    # One that gives a chunk of 9 frames in three pieces.
    pieces = [Step(1, made=9), Step(4, made=0), Step(4, made=0), Step(4, made=12), Step(4, made=0)]
    film = record(pieces, seconds=17 / 8)
    assert film.starts == (9,)
    assert [(chunk.frames, chunk.wait_s) for chunk in film.chunks] == [(9, 3.0), (8, 2.0)]


def test_whoever_records_hears_how_far_it_is():
    told = []
    clock = Clock()
    recorder = Recorder(1.0, clock=clock, tell=lambda done, wanted: told.append((done, wanted)))
    recorder.record(lambda: FakeStream(clock, [Step(3)]), "000", "a prompt")
    assert told == [(3, 8), (6, 8), (8, 8)]


def test_a_stream_that_shows_nothing_is_given_up():
    with pytest.raises(UserError, match="64 chunks brought no frame"):
        record([Step(0)])


def test_a_roll_out_that_turns_to_nan_says_so():
    with pytest.raises(FloatingPointError, match="chunk 1 is not finite"):
        record([Step(4), Step(breaks=True)])


# The numbers


def test_the_first_frame_counts_opening_and_every_chunk_up_to_it():
    film = record([Step(0, wait=2.0), Step(1, wait=1.0), Step(7, wait=9.0)])
    assert first_frame(film) == pytest.approx(OPENING + 2.0 + 1.0)


def test_rates_leave_out_the_first_frame():
    film = record([Step(1, wait=100.0), Step(4, wait=2.0, decode=0.5), Step(4, wait=2.0, decode=0.5)])
    row = latency(film)
    assert row["frames/s"] == pytest.approx(8 / 4.0)
    assert row["frames/s without decoding"] == pytest.approx(8 / 3.0)
    assert row["times real time"] == pytest.approx(2.0 / 8.0)


def test_rates_are_of_whole_chunks_however_they_are_decoded():
    chunk = [Step(4, wait=5.0, network=4.0, decode=1.0, made=12), *[Step(4, wait=1.0, network=0, made=0)] * 2]
    first = [replace(step, wait=100.0) for step in chunk]
    whole = record([*first, *chunk, *chunk], seconds=36 / 8)
    assert latency(whole)["frames/s"] == pytest.approx(12 / 7)
    # Stopped where the last chunk was made and a third of it shown: it does not count.
    assert latency(record([*first, *chunk, *chunk], seconds=28 / 8))["frames/s"] == pytest.approx(12 / 7)
    # To a viewer it is pieces that arrive.
    assert gaps(whole)[-3:] == [5.0, 1.0, 1.0]


def test_a_single_chunk_has_a_rate_and_no_gap():
    row = latency(record([Step(8, wait=4.0)]))
    assert row["frames/s"] == pytest.approx(2.0)
    assert row["gap p50, s"] is None
    assert row["stall, s"] == 0


def test_shares_outside_network_and_decoder():
    row = latency(record([Step(1), *[Step(4, wait=1.0, network=0.7, decode=0.2)] * 2]))
    assert row["outside the network"] == pytest.approx(0.3)
    assert row["neither network nor decoding"] == pytest.approx(0.1)


def test_gaps_are_between_arrivals_of_frames():
    film = record([Step(2, wait=9.0), Step(2, wait=1.0), Step(0, wait=2.0), Step(4, wait=3.0)])
    assert gaps(film) == pytest.approx([1.0, 5.0])
    row = latency(film)
    assert row["gap p50, s"] == pytest.approx(3.0)
    assert row["gap p95, s"] == pytest.approx(1.0 + 0.95 * 4.0)


def test_a_stream_in_time_never_stalls_and_a_late_one_by_what_it_is_late():
    # Two frames at 8 a second play for a quarter of a second.
    assert stall(record([Step(2, wait=0.25)] * 4)) == 0
    assert stall(record([Step(2, wait=0.2)] * 4)) == 0
    # Three gaps, each a quarter of a second too long; the wait for the first frame is no stall.
    assert stall(record([Step(2, wait=0.5)] * 4)) == pytest.approx(0.75)
    # A long one in the middle is made good by nothing after it.
    assert stall(record([Step(2, wait=w) for w in (5.0, 1.0, 0.01, 0.01)])) == pytest.approx(0.75)


def test_memory_is_flat_where_a_ring_turns_and_grows_where_nothing_is_dropped():
    assert memory_growth(held([1, 2, 3, 4, *[4] * 12])) == 1
    assert memory_growth(held(range(1, 17))) == pytest.approx(16 / 12)
    assert memory_growth(held([1, 2, 3])) is None
    assert latency(held([3_000_000, 7_000_000]))["most memory, MB"] == pytest.approx(7.0)


# What the network was asked


@pytest.mark.parametrize("prompts, guidance", [(1, 1.0), (1, 3.0), (2, 3.0)])
def test_passes_are_clips_times_passes_times_steps(prompts, guidance):
    model = toy_model()
    network = model.predictor.backbone
    sampling = recipe_sampling(model.recipe, steps=3, guidance=guidance)
    with counted(network) as work:
        list(generate_clips(model, ClipRequest(("red",) * prompts), sampling))
    passes = 1 if guidance == 1 else 2
    assert work.passes == prompts * passes * 3
    assert work.tokens == work.passes * 4 * 4 * 6
    seen = work.passes
    list(generate_clips(model, ClipRequest(("red",)), sampling))
    assert work.passes == seen, "what comes afterwards is not counted"


def test_a_chunk_is_charged_with_its_own_passes():
    network = nn.Module()
    network.forward = lambda tokens: {"video": torch.zeros(1, tokens, 2)}  # type: ignore[method-assign]
    clock = Clock()

    class Asking(FakeStream):
        def next(self):
            for _ in range(5):
                network(6)
            return super().next()

    def open_stream() -> Asking:
        network(100)  # what opening asks for is no chunk's
        return Asking(clock, [Step(4)])

    film = Recorder(2.0, network, clock).record(open_stream, "000", "a prompt")
    assert [(c.passes, c.tokens) for c in film.chunks] == [(5, 30)] * 4
    row = latency(film, clip_frames=8)
    assert row["passes a clip"] == pytest.approx(5 * 4 * 8 / 16)
    assert row["evaluations a clip"] == pytest.approx(5), "every token was passed over five times"
    assert "evaluations a clip" not in latency(film)


def test_a_real_stream_is_recorded_as_it_is():
    model = toy_model(plan={"type": "chunks", "frames": 1})
    network = model.predictor.backbone
    film = Recorder(2.0, network).record(lambda: Stream(model, Ask("red", history=0)), "000", "red")
    assert len(film.video_PHW3) == 16
    assert film.starts == tuple(range(2, 16, 2))
    # Three steps, with and without words, behind a clean pass over the chunk before.
    passes = [chunk.passes for chunk in film.chunks]
    assert passes == [2 * 3] + [2 * (3 + 1)] * (len(passes) - 1)
    row = latency(film, clip_frames=8)
    assert row["evaluations a clip"] == pytest.approx(8 - 2 / 8), "the last of eight chunks is not remembered"
    assert row["passes a clip"] == pytest.approx(4 * 8 - 1)
    assert 0 < row["outside the network"] < 1
    # A window of a trained clip, four chunks: the ring turns.
    assert row["memory growth"] == 1
    again = Recorder(2.0).record(lambda: Stream(model, Ask("red", history=0)), "000", "red")
    assert (again.video_PHW3 == film.video_PHW3).all(), "being watched changes nothing"


# The report


def test_the_report_says_which_targets_are_met():
    good = [Step(memory=4, network=0.7, decode=0.25)] * 16
    bad = [Step(memory=n, network=0.5, decode=0.25) for n in range(1, 17)]
    met = {f.name: f.passed for f in judge_latency([record(good, 8.0)]).figures if f.target is not None}
    missed = {f.name: f.passed for f in judge_latency([record(bad, 8.0)]).figures if f.target is not None}
    assert met == {"neither network nor decoding": True, "memory growth": True}
    assert missed == {"neither network nor decoding": False, "memory growth": False}


def test_the_report_is_a_mean_over_roll_outs_and_keeps_what_each_chunk_took():
    films = [record([Step(4, wait=1.0)], 1.0), record([Step(4, wait=3.0)], 2.0)]
    report = judge_latency(films)
    assert report.value("first frame, s") == pytest.approx(OPENING + 2.0)
    chunks = report.details["chunks"]
    assert [row["chunk"] for row in chunks] == [0, 1, 2, 3]
    assert [row["wait_s"] for row in chunks] == pytest.approx([2.0, 2.0, 3.0, 3.0])
    assert report.record()["kind"] == "latency"
