"""The drift report sees what a film was made to do, and nothing in one that goes on as it began."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from fake_stream import Clock, FakeStream, Step
from motionloom.data.shapeworld import Attributes, Facts, World, facts, prompt, render
from motionloom.evals.drift import (
    COSINE,
    Curve,
    Look,
    appearance,
    borders,
    follow,
    judge_drift,
    ratio_of_means,
    slope,
    spans,
    visual_drift,
)
from motionloom.evals.encoders import ColorHistogram
from motionloom.evals.latency import Film, Recorder
from motionloom.evals.switch import Switched, judge_switches, switched
from motionloom.rng import numpy_rng

WORLD = World.endless()
LOOK = Look(16, WORLD)
FRAMES = 65  # four windows of two seconds

Video = np.ndarray


@cache
def real(index: int, frames: int = FRAMES) -> tuple[Video, Facts]:
    spec = replace(WORLD, frames=frames).sample(1, index, "test")
    return render(spec).video_FHW3, facts(spec)


def film(video: Video, name: str = "000", said: str = "a prompt", fps: float = 8.0) -> Film:
    return Film(name, said, video, fps)


def bent(index: int, change) -> Video:
    """A real film, each frame changed by how far it is along, from 0 to 1."""
    video, _ = real(index)
    parts = [
        change(frame.astype(np.float32), s)
        for frame, s in zip(video, np.linspace(0, 1, len(video)), strict=True)
    ]
    return np.clip(np.stack(parts), 0, 255).astype(np.uint8)


# Windows


@pytest.mark.parametrize(
    "frames, length, starts",
    [
        (490, 49, list(range(0, 490, 49))),
        (49, 17, [0, 16, 32]),
        (20, 16, [0]),
        (10, 16, [0]),
        (40, 16, [0, 24]),
    ],
)
def test_windows_begin_with_the_film_and_end_with_it(frames, length, starts):
    found = spans(frames, length)
    assert [span.start for span in found] == starts
    assert all(span.stop - span.start == min(frames, length) for span in found)
    assert len(found) == 1 or found[-1].stop == frames


def test_the_oracle_reads_a_period_and_a_frame():
    assert Look(49, WORLD).reading == 17
    assert Look(12, WORLD).reading == 12
    assert Look(49, World.quickstart()).reading == 49
    assert Look(49).reading == 49


def test_borders_are_counted_from_the_window():
    assert borders(slice(16, 32), (4, 16, 20, 28, 32, 40)) == [4, 12]


# One window


def flat(*color: int, frames: int = 4) -> Video:
    return np.broadcast_to(np.array(color, np.uint8), (frames, 6, 8, 3)).copy()


def test_appearance_of_flat_frames_is_what_they_are_painted():
    found = appearance(flat(255, 0, 0))
    assert found["red"] == 1
    assert found["green"] == found["blue"] == 0
    assert found["brightness"] == pytest.approx(0.2126)
    assert found["saturation"] == pytest.approx(1.0)
    nothing = ("contrast", "deviation", "sharpness", "near white", "near black", "flicker", "shimmer")
    assert [found[name] for name in nothing] == pytest.approx([0] * len(nothing), abs=1e-5)


@pytest.mark.parametrize("level, white, black", [(252, 1, 0), (248, 0, 0), (7, 0, 0), (3, 0, 1)])
def test_exposure_counts_pixels_that_show_nothing_any_more(level, white, black):
    found = appearance(flat(level, level, level))
    assert (found["near white"], found["near black"]) == (white, black)


def test_contrast_and_sharpness_of_stripes():
    video = flat(0, 0, 0)
    video[:, :, ::2] = 255
    found = appearance(video)
    assert found["contrast"] == pytest.approx(0.5)
    assert found["sharpness"] == pytest.approx(1.0)


def test_flicker_is_of_the_whole_frame_and_shimmer_of_what_should_stand_still():
    video = flat(100, 100, 100, frames=9)
    video[::2] += 10
    assert appearance(video)["flicker"] == pytest.approx(20, rel=1e-3)
    assert appearance(video)["shimmer"] == pytest.approx(20, rel=1e-3)
    board = (np.indices((9, 6, 8)).sum(0) % 2).astype(np.uint8)[..., None]
    still = flat(100, 100, 100, frames=9) + 10 * board
    assert appearance(still)["flicker"] == pytest.approx(0, abs=1e-3), "as many rise as fall"
    assert appearance(still)["shimmer"] == pytest.approx(20, rel=1e-3)
    assert appearance(still)["dynamic degree"] == pytest.approx(10)


def test_an_object_that_moves_neither_flickers_nor_shimmers():
    video, _ = next(real(i) for i in range(20) if real(i)[1].objects[0].motion == "circle")
    found = appearance(video)
    assert found["shimmer"] < 0.5
    assert found["flicker"] < 0.5
    assert found["dynamic degree"] > 0.5


# Slopes


def test_a_slope_is_the_line_that_was_drawn():
    assert slope([1, 3, 5, 7], [2.0, 3.0, 4.0, 5.0]) == pytest.approx(30.0)
    assert slope([1, 3, 5], [2.0, None, 4.0]) == pytest.approx(30.0)
    assert slope([1, 3], [None, 4.0]) is None


BENDS = {
    "brightness": lambda frame, s: frame + 60 * s,
    "red": lambda frame, s: frame + np.array([60, 0, 0]) * s,
    "contrast": lambda frame, s: frame.mean() + (frame - frame.mean()) * (1 + s),
    "saturation": lambda frame, s: (
        frame.mean(-1, keepdims=True) + (frame - frame.mean(-1, keepdims=True)) * (1 + s)
    ),
    "near white": lambda frame, s: np.where(np.arange(32)[:, None, None] < 16 * s, 255.0, frame),
    "near black": lambda frame, s: np.where(np.arange(32)[:, None, None] < 16 * s, 0.0, frame),
}


@pytest.mark.parametrize("name", BENDS)
def test_what_rises_has_a_slope_and_falls_backwards(name):
    video = bent(1, BENDS[name])
    up, down = (follow(film(v), Look(16)) for v in (video, video[::-1]))
    rises, falls, stays = (
        slope(c.seconds_W, c.values[name]) for c in (up, down, follow(film(real(1)[0]), Look(16)))
    )
    assert rises > 0 > falls
    assert abs(stays) < 0.2 * rises


def test_visual_drift_is_small_in_real_films_and_large_where_looks_change():
    kept = [visual_drift(follow(film(real(i)[0]), Look(16))) for i in range(4)]
    lost = [visual_drift(follow(film(bent(i, BENDS["contrast"])), Look(16))) for i in range(4)]
    assert max(kept) < 0.1 < 0.3 < min(lost)


def test_visual_drift_is_a_mean_of_four_changes():
    names = ("brightness", "saturation", "contrast", "sharpness")
    curve = Curve("000", "", (1.0, 2.0), {name: (0.5, 0.5 + 0.1 * n) for n, name in enumerate(names)})
    assert visual_drift(curve) == pytest.approx((0 + 0.2 + 0.4 + 0.6) / 4)


# Seams


def roll_out(video: Video, chunk: int = 4) -> Film:
    clock = Clock()
    stream = FakeStream(clock, [Step(1), Step(chunk)], video)
    return Recorder(len(video) / 8, clock=clock).record(lambda: stream, "000", "a prompt")


def test_seams_at_chunk_borders_are_seen_and_there_are_none_in_real_films():
    moving = next(real(i)[0] for i in range(20) if real(i)[1].objects[0].motion == "circle")
    jumps = moving.astype(int)
    chunk_P = (np.arange(len(moving)) + 3) // 4
    jumps += np.where(chunk_P % 2, 12, 0)[:, None, None, None]
    seamless, seamed = (
        follow(roll_out(np.clip(v, 0, 255).astype(np.uint8)), Look(16)).values["seam ratio"]
        for v in (moving, jumps)
    )
    assert all(0.7 < ratio < 1.4 for ratio in seamless)
    assert all(ratio > 2 for ratio in seamed)


def test_a_clip_without_chunks_has_no_seams():
    assert follow(film(real(0)[0]), Look(16)).values["seam ratio"] == (None,) * 4


def test_chunks_of_one_frame_leave_nothing_to_compare_with():
    assert set(follow(roll_out(real(0)[0], chunk=1), Look(16)).values["seam ratio"]) == {None}


# The oracle


def judged(parts: list[tuple[Video, Facts]], look: Look = LOOK):
    curves = [
        follow(film(video, f"{n:03d}", prompt(wanted)), look, wanted)
        for n, (video, wanted) in enumerate(parts)
    ]
    return judge_drift(curves, look)


def test_a_real_film_keeps_every_attribute():
    report = judged([real(i) for i in range(4)])
    for name in ("color", "shape", "motion", "size", "background", "all"):
        assert report.value(f"kept: {name}") == report.value(f"last window: {name}") == 1
        assert report.value(f"drift: {name}") == 0
    assert {f.name: f.passed for f in report.figures if f.target} == {"kept: all": True}


def test_a_film_that_becomes_another_loses_what_the_other_lacks():
    (red, wanted), *others = (real(i) for i in range(12))
    other = next(v for v, f in others if f.objects[0].color != wanted.objects[0].color)
    half = FRAMES // 2
    changed = np.concatenate([red[:half], other[half:]])
    report = judged([(red, wanted), (changed, wanted)])
    assert report.value("first window: color") == 1
    assert report.value("last window: color") == 0.5
    assert report.value("kept: color") == 0.5
    assert report.value("drift: color") == 0.5
    kept = next(f for f in report.figures if f.name == "kept: all")
    assert kept.passed is False


def test_a_film_that_stops_loses_its_motion_and_keeps_its_color():
    video, wanted = next(real(i) for i in range(20) if real(i)[1].objects[0].motion == "bounce")
    stopped = np.concatenate([video[:33], np.repeat(video[32:33], 32, axis=0)])
    report = judged([(stopped, wanted)])
    assert report.value("last window: motion") == 0
    assert report.value("last window: color") == 1
    curve = {
        row["window"]: row["mean"] for row in report.details["curves"] if row["name"] == "dynamic degree"
    }
    assert curve[0] > 0.5
    assert curve[3] == 0


def test_without_a_world_or_a_known_prompt_the_oracle_is_silent():
    for look, wanted in ((Look(16), real(0)[1]), (LOOK, None)):
        curve = follow(film(real(0)[0]), look, wanted)
        assert "color" not in curve.values
        assert not [f for f in judge_drift([curve], look).figures if f.encoder == "oracle"]


def test_the_cosine_with_the_first_window_falls_where_colors_go():
    look = Look(16, encoder=ColorHistogram())
    values = follow(film(bent(1, BENDS["brightness"])), look).values[COSINE]
    assert values[0] == pytest.approx(1.0)
    assert values[0] > values[1] > values[-1]
    report = judge_drift([follow(film(real(0)[0]), look)], look)
    figure = next(f for f in report.figures if f.name == "last " + COSINE)
    assert figure.encoder == "color-histogram-v1"
    assert figure.interval.mean > 0.95


# Other words


def of(motion: str, color: str) -> tuple[Video, Facts]:
    wanted = Attributes("circle", color, "large", motion)
    return render(WORLD.stage([wanted], "dark", numpy_rng("drift test"), frames=FRAMES)).video_FHW3, Facts(
        (wanted,), "dark"
    )


def over(late: int, new: tuple[Video, Facts], frames: int = FRAMES) -> dict[str, float | None]:
    """A roll-out in chunks of four that goes over to new words at frame 29, and obeys ``late`` frames on."""
    video, wanted = of("still", "red")
    shown = np.concatenate([video[: 29 + late], new[0][29 + late :]])
    clock = Clock()
    stream = FakeStream(clock, [Step(1), Step(4)], shown)
    recorder = Recorder(frames / 8, clock=clock, recache=True)
    film = recorder.record(lambda: stream, "000", prompt(wanted), then=[(3.5, prompt(new[1]))])
    assert film.switches == ((29, prompt(new[1])),)
    assert stream.said == [(8, prompt(new[1]), True)], "said once, at the border"
    (found,) = switched(film, LOOK)
    return dict(found.numbers)


def test_words_that_are_obeyed_at_once_are_seen_to_be():
    row = over(0, of("still", "blue"))
    assert {row[f"all, {when}"] for when in ("before", "0 chunks on", "1 chunks on", "2 chunks on")} == {1}


def test_words_may_be_obeyed_late_or_never():
    late = over(12, of("bounce", "blue"))
    assert late["all, 0 chunks on"] == 0
    assert late["all, 2 chunks on"] == late["color, 2 chunks on"] == late["motion, 2 chunks on"] == 1
    never = over(FRAMES, of("bounce", "blue"))
    assert never["all, before"] == 1
    assert never["all, 2 chunks on"] == never["color, 2 chunks on"] == 0


def test_what_both_prompts_have_in_common_says_nothing():
    row = over(0, of("still", "blue"))
    assert "color, 2 chunks on" in row
    assert not {"shape, 2 chunks on", "motion, 2 chunks on", "background, 2 chunks on"} & set(row)


def test_a_film_that_ends_too_soon_leaves_it_open():
    row = over(0, of("still", "blue"), frames=48)
    assert row["all, 0 chunks on"] == 1
    assert row["all, 2 chunks on"] is None


def test_the_report_of_switches_has_its_target():
    found = [
        Switched("000.0", ("a", "b"), over(0, of("still", "blue"))),
        Switched("001.0", ("b", "a"), over(FRAMES, of("still", "blue"))),
    ]
    report = judge_switches(found, LOOK)
    assert report.value("all, 2 chunks on") == 0.5
    assert {f.name: f.passed for f in report.figures if f.target} == {"all, 2 chunks on": False}
    assert judge_switches(found[:1], LOOK).value("all, before") == 1


# The report


def test_curves_are_means_by_window_over_the_films_that_have_it():
    short, long = (follow(film(real(0, n)[0], str(n)), Look(16)) for n in (33, FRAMES))
    rows = [r for r in judge_drift([short, long], Look(16)).details["curves"] if r["name"] == "brightness"]
    assert [(row["window"], row["films"]) for row in rows] == [(0, 2), (1, 2), (2, 1), (3, 1)]
    assert rows[0]["mean"] == pytest.approx(
        (short.values["brightness"][0] + long.values["brightness"][0]) / 2
    )
    assert rows[3]["second"] == pytest.approx((FRAMES - 8) / 8)


def test_a_ratio_of_means_is_of_the_means_and_its_interval_holds_it():
    above, below = np.array([1.0, 0, 1, 1, 0, 1]), np.array([1.0, 1, 1, 1, 0, 1])
    found = ratio_of_means(above, below, "test", groups=list("abcdef"))
    assert found.mean == pytest.approx(4 / 5)
    assert found.low < found.mean <= found.high <= 1
    assert found.count == 6
    same = ratio_of_means(above, below, "test", groups=list("abcdef"))
    assert same == found, "equal figures come with equal intervals"
    assert ratio_of_means(above, 0 * below, "test", groups=list("abcdef")) is None


def test_films_of_one_prompt_are_drawn_together():
    above = np.array([1.0, 1, 0, 0] * 4)
    apart = ratio_of_means(above, np.ones(16), "test", groups=list(range(16)))
    together = ratio_of_means(above, np.ones(16), "test", groups=["a", "a", "b", "b"] * 4)
    assert (together.low, together.high) == (0, 1)
    assert apart.low > 0.1


def test_one_window_is_compared_with_nothing() -> None:
    """49 frames of a clip of 49 do not drift: nothing is said, rather than that all is kept."""
    world = World.endless()
    spec = world.sample(1, 0, "test")
    curve = follow(film(render(spec).video_FHW3), Look(spec.frames, world), facts(spec))
    report = judge_drift([curve], Look(spec.frames, world))
    assert report.value("first window: color") == 1
    compared = ("kept", "last window", "drift", "visual drift", "last cosine")
    assert not any(figure.name.startswith(compared) for figure in report.figures)
