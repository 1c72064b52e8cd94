"""Clips of any length brought to one: windows of long clips, and the rate that short ones fill."""

from __future__ import annotations

from pathlib import Path

import pytest

from motionloom.data.manifest import ManifestEntry, Scene
from motionloom.data.windows import cut_into_windows, duration, fitting_fps


def entry(id: str, seconds: float, fps: float = 10.0, **fields) -> ManifestEntry:
    return ManifestEntry(id, Path("x.mp4"), "a clip", fps=fps, frames=round(seconds * fps), **fields)


def test_a_clip_of_two_windows_or_more_is_cut() -> None:
    cut = cut_into_windows([entry("long", 7.5), entry("short", 3.9), entry("even", 4.0)], 2.0)
    assert [e.id for e in cut] == ["long__w00", "long__w01", "long__w02", "short", "even__w00", "even__w01"]
    assert [(e.start, e.end) for e in cut[:3]] == [(0, 2), (2, 4), (4, 6)]
    assert (cut[3].start, cut[3].end) == (0, None)


def test_the_chosen_part_is_what_is_cut() -> None:
    cut = cut_into_windows([entry("part", 20, start=5.0, end=9.0)], 2.0)
    assert [(e.start, e.end) for e in cut] == [(5, 7), (7, 9)]


def test_stories_and_clips_of_unknown_length_stay_whole() -> None:
    story = entry("story", 20, scenes=(Scene(0, 5, "a"), Scene(5, 20, "b")))
    unknown = ManifestEntry("unknown", Path("x.mp4"), "a clip")
    assert cut_into_windows([story, unknown], 2.0) == [story, unknown]
    assert duration(unknown) is None


@pytest.mark.parametrize(
    ("lengths", "rate"),
    [
        ((5.0, 9.0), 8.0),  # all fill 16 frames at the usual rate
        ((1.0,), 16.0),  # one second needs 16 frames a second
        ((1.0, *[3.0] * 15), 8.0),  # the shortest tenth is given up
        ((), 8.0),
    ],
)
def test_the_rate_is_raised_until_all_but_the_shortest_tenth_fill_the_frames(lengths, rate) -> None:
    entries = [entry(str(i), seconds) for i, seconds in enumerate(lengths)]
    assert fitting_fps(entries, 16, 8.0) == rate


def test_stills_do_not_decide_the_rate_and_rounding_never_asks_for_too_much() -> None:
    still = ManifestEntry("still", Path("x.png"), "a picture", fps=10.0, frames=1)
    rate = fitting_fps([still, entry("a", 3.0)], 17, 2.0)
    assert 17 / rate <= 3.0
    assert rate == pytest.approx(17 / 3, abs=1e-3)
