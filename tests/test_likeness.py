"""A student is compared with its teacher on the same noise; what differs is seen, and equals are equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from motionloom.data.shapeworld import ClipSpec, World, prompt, render
from motionloom.evals.drift import Look
from motionloom.evals.encoders import ColorHistogram
from motionloom.evals.likeness import (
    Made,
    Maker,
    Pair,
    Size,
    judge_likeness,
    latent_distance,
    make_pairs,
    pixel_distance,
)
from motionloom.generate import Sampling, recipe_sampling
from toy_model import toy_model

WORLD = World.endless(frames=17)
LOOK = Look(17, WORLD, ColorHistogram())
PROMPTS = ["a red star", "a blue disc", "green"]

Video = np.ndarray


@cache
def spec(index: int, seed: int = 1) -> ClipSpec:
    known = {prompt(one): one for one in (WORLD.sample(seed, n, "test") for n in range(40))}
    return list(known.values())[index]


@cache
def clip(index: int, seed: int = 0) -> Video:
    """What the prompt of clip ``index`` asks for, elsewhere in the frame for every seed."""
    from motionloom.rng import numpy_rng

    wanted = [thing.attributes for thing in spec(index).objects]
    staged = WORLD.stage(wanted, spec(index).background, numpy_rng("likeness test", index, seed))
    return render(staged).video_FHW3


def pairs(
    student: Callable[[int, int], Video], teacher: Callable[[int, int], Video], seeds: int = 2
) -> list[Pair]:
    return [
        Pair(
            prompt(spec(i)),
            seed,
            Made(student(i, seed), evaluations=20, seconds=1.0),
            Made(teacher(i, seed), evaluations=100, seconds=10.0),
        )
        for i in range(4)
        for seed in range(seeds)
    ]


def recolored(index: int, seed: int) -> Video:
    """The right clip in another colour."""
    return clip(index, seed)[..., ::-1]


# Distances


def test_distances_are_root_mean_squares():
    a, b = np.zeros((2, 4, 4, 3), np.uint8), np.full((2, 4, 4, 3), 6, np.uint8)
    assert pixel_distance(a, b) == 6
    b[:1] = 0
    assert pixel_distance(a, b) == pytest.approx(np.sqrt(18))
    assert pixel_distance(a, b[:1]) is None
    x = np.ones((2, 3, 4), np.float32)
    assert latent_distance(1.5 * x, x) == pytest.approx(0.5)
    assert latent_distance(x, 2 * x) == pytest.approx(0.5), "a share of the teacher's own"
    assert latent_distance(x, None) is None
    assert latent_distance(x, x[:1]) is None


# Both at work


def sampling(steps: int) -> Sampling:
    return recipe_sampling(toy_model().recipe, steps=steps)


def test_equals_make_equal_clips_from_equal_noise():
    model = toy_model()
    made = make_pairs(Maker(model, sampling(3)), Maker(model, sampling(3)), PROMPTS, [0, 5], batch_size=2)
    assert [(pair.prompt, pair.seed) for pair in made] == [(p, s) for s in (0, 5) for p in PROMPTS]
    report = judge_likeness(made, Look(8))
    assert report.value("pixel distance") == report.value("latent distance") == 0
    assert report.value("latent distance, teacher of another seed") > 0.5
    assert report.value("times fewer evaluations") == 1
    assert report.value("pixel spread over teacher's") == pytest.approx(1.0)


def test_a_clip_does_not_depend_on_its_batch():
    model = toy_model()
    at_once, one_by_one = (
        make_pairs(Maker(model, sampling(2)), Maker(model, sampling(2)), PROMPTS, [3], batch_size=n)
        for n in (8, 1)
    )
    for a, b in zip(at_once, one_by_one, strict=True):
        assert latent_distance(a.student.latents_FSC, b.student.latents_FSC) < 1e-4


def test_costs_are_counted_for_each_alone():
    student, teacher = toy_model(plan="chunks"), toy_model()
    now = iter(range(1000))
    made = make_pairs(
        Maker(student, replace(sampling(2), guidance=recipe_sampling(student.recipe, guidance=1.0).guidance)),
        Maker(teacher, sampling(50)),
        PROMPTS,
        [0],
        batch_size=3,
        clock=lambda: float(next(now)),
    )
    pair = made[0]
    # Four chunks of a quarter of the clip: two steps each, and a clean pass behind each but the last.
    assert pair.student.evaluations == pytest.approx((4 * 2 + 3) / 4)
    assert pair.teacher.evaluations == 50 * 2
    assert pair.student.seconds == pytest.approx(1 / 3)
    report = judge_likeness(made, Look(8))
    assert report.value("times fewer evaluations") == pytest.approx(400 / 11)
    assert report.value("times less time") == 1
    assert report.value("latent distance") > 0, "another plan makes another clip"
    verdicts = {f.name: f.passed for f in report.figures if f.target is not None}
    assert verdicts == {"times fewer evaluations": True, "times less time": False}


def test_latents_of_other_tokenizers_do_not_compare():
    other = toy_model(tokenizer={"latent_f": 4, "latent_t": 2, "latent_d": 5})
    made = make_pairs(Maker(other, sampling(1)), Maker(toy_model(), sampling(1)), PROMPTS[:1], [0])
    assert made[0].student.latents_FSC is None
    report = judge_likeness(made, Look(8))
    assert "latent distance" not in {figure.name for figure in report.figures}
    assert report.value("pixel distance") >= 0


def test_both_make_the_students_size_and_report_as_they_go():
    told = []
    size = Size(frames=4, height=24, width=16)
    made = make_pairs(
        *[Maker(toy_model(), sampling(1))] * 2,
        PROMPTS,
        [0, 1],
        size,
        batch_size=2,
        tell=lambda done, total: told.append((done, total)),
    )
    assert {pair.teacher.video_PHW3.shape for pair in made} == {(4, 24, 16, 3)}
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


# What the oracle says


def test_a_student_as_good_as_its_teacher_has_no_gap():
    report = judge_likeness(pairs(clip, clip), LOOK)
    assert report.value("adherence gap") == 0
    assert report.value("student: all") == report.value("teacher: all") == 1
    assert report.value("agree: color") == report.value("agree: motion") == 1
    met = {f.name: f.passed for f in report.figures if f.target is not None}
    assert met == {"adherence gap": True, "times fewer evaluations": False, "times less time": True}
    assert report.value("times less time") == pytest.approx(10)


def test_a_student_of_wrong_colors_misses_and_disagrees_in_color_alone():
    report = judge_likeness(pairs(recolored, clip), LOOK)
    gap = next(figure for figure in report.figures if figure.name == "adherence gap")
    assert gap.interval.mean > 0.4
    assert gap.passed is False
    assert report.value("agree: color") < 0.6
    assert report.value("agree: motion") > 0.8


def test_both_may_be_wrong_alike():
    report = judge_likeness(pairs(recolored, recolored), LOOK)
    assert report.value("agree: color") == 1
    assert report.value("adherence gap") == 0
    assert report.value("student: color") == report.value("teacher: color") < 0.6


def test_prompts_of_no_known_world_are_compared_and_not_judged():
    made = [replace(pair, prompt=f"a cat {n % 2}") for n, pair in enumerate(pairs(clip, clip))]
    names = {figure.name for figure in judge_likeness(made, LOOK).figures}
    assert "agree: color" in names
    assert not names & {"adherence gap", "student: color"}


# Variety


def test_a_student_that_always_makes_the_same_has_no_spread():
    report = judge_likeness(pairs(lambda i, seed: clip(i, 0), clip), LOOK)
    assert report.value("student: spread in pixels") == 0
    assert report.value("teacher: spread in pixels") > 5
    assert report.value("pixel spread over teacher's") == 0
    assert report.value("encoder spread over teacher's") == pytest.approx(0, abs=1e-5)
    varied = judge_likeness(pairs(clip, clip), LOOK)
    assert varied.value("pixel spread over teacher's") == pytest.approx(1.0)
    figure = next(f for f in varied.figures if f.name == "encoder spread over teacher's")
    assert figure.encoder == "color-histogram-v1"


def test_with_one_seed_nothing_is_said_of_variety():
    report = judge_likeness(pairs(clip, clip, seeds=1), LOOK)
    assert not [
        figure.name for figure in report.figures if "spread" in figure.name or "another" in figure.name
    ]
    assert (report.details["prompts"], report.details["seeds"]) == (4, 1)
