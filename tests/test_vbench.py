"""The VBench-style protocol: closed forms where a dimension has one, its order of good and bad where not."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from motionloom.data.shapeworld import World, prompt, render
from motionloom.errors import UserError
from motionloom.evals.asked import Asked, Sample
from motionloom.evals.encoders import ColorHistogram, unit
from motionloom.evals.judges import Tools, judge
from motionloom.evals.vbench import (
    DIMENSIONS,
    Aesthetic,
    Eyes,
    between,
    consistency,
    flickering,
    judge_vbench,
    moves,
    normalised,
    scores,
    smoothness,
)
from motionloom.rng import numpy_rng

WORLD = World.endless(frames=17)
HISTOGRAM = ColorHistogram()
EYES = Eyes(HISTOGRAM, HISTOGRAM)

Video = np.ndarray


@cache
def sample(index: int) -> Sample:
    spec = WORLD.sample(1, index, "test")
    return Sample(f"{index:03d}", render(spec).video_FHW3, 8.0, Asked(prompt(spec)))


def of(motion: str) -> Sample:
    words = {"still": "stays still", "bounce": "bounces", "circle": "circles"}[motion]
    return next(sample(i) for i in range(30) if words in sample(i).asked.prompt)


def pan(step: int, frames: int = 9, side: int = 64) -> Video:
    """A texture that goes left by ``step`` pixels a frame."""
    coarse = numpy_rng("vbench test").integers(0, 256, (side // 4, side // 2, 3)).astype(np.uint8)
    wide = np.asarray(Image.fromarray(coarse).resize((2 * side, side), Image.Resampling.BICUBIC))
    return np.stack([wide[:, n * step : n * step + side] for n in range(frames)])


class Words(ColorHistogram):
    """An encoder that knows words: each is the mean vector of a colour."""

    name = "words-test"

    def embed_text(self, texts):
        paints = {"red": (220, 40, 40), "blue": (40, 40, 220)}
        frames = [np.full((8, 8, 3), paints[text], np.uint8) for text in texts]
        return self.embed(np.stack(frames))


# Dimensions


def test_consistency_is_the_mean_cosine_with_the_last_and_the_first_frame():
    a, b, c = unit(np.array([[1, 0], [1, 1], [0, 1]]))
    half = np.sqrt(0.5)
    assert consistency(np.stack([a, a, a])) == pytest.approx(1)
    assert consistency(np.stack([a, b, c])) == pytest.approx(((half + half) + (half + 0)) / 4)
    assert consistency(np.stack([a, -a])) == 0, "never below 0"
    assert consistency(a[None]) is None


def test_flickering_is_one_less_the_mean_change():
    video = np.full((4, 6, 6, 3), 100, np.uint8)
    assert flickering(video) == 1
    video[1::2] += 51
    assert flickering(video) == pytest.approx(0.8)


@pytest.mark.parametrize("step", [1, 2])
def test_a_steady_pan_is_smooth_and_better_made_than_by_the_plain_mean(step):
    video = pan(step)
    plain = (video[0].astype(float) + video[2]) / 2
    made = between(video[0], video[2])
    assert np.abs(made - video[1]).mean() < 0.3 * np.abs(plain - video[1]).mean()
    assert smoothness(video) > 0.99


def test_a_pan_that_stutters_is_less_smooth():
    stuttering = pan(2)[[0, 0, 2, 2, 4, 4, 6, 6, 8]]
    assert smoothness(stuttering) < smoothness(pan(2)) - 0.02


def test_a_picture_is_perfectly_smooth_and_two_frames_say_nothing():
    assert smoothness(np.repeat(pan(1)[:1], 5, axis=0)) == pytest.approx(1)
    assert smoothness(pan(1)[:2]) is None


def test_what_moves_is_told_from_what_does_not():
    assert moves(of("still").video_PHW3, 8.0) is False
    assert moves(of("bounce").video_PHW3, 8.0) is True
    assert moves(of("circle").video_PHW3, 8.0) is True
    assert moves(pan(1)[:1], 8.0) is None


def test_noise_does_not_move():
    noise = numpy_rng("vbench noise").integers(0, 256, (9, 64, 64, 3)).astype(np.uint8)
    assert moves(noise, 8.0) is False


def test_motion_is_looked_for_at_eight_frames_a_second():
    # One pixel of 64 a frame is too slow at 8 a second (6 of 256 are 1.5), and four times that is not.
    assert moves(pan(1, 17), 8.0) is False
    assert moves(pan(1, 17), 32.0) is True


def test_a_clip_must_move_in_a_quarter_of_its_steps():
    moving, still = pan(3), np.repeat(pan(3)[-1:], 30, axis=0)
    assert moves(moving, 8.0) is True
    assert moves(np.concatenate([moving, still[:16]]), 8.0) is True
    assert moves(np.concatenate([moving, still]), 8.0) is False


# Sums


def test_ranges_weights_and_sums_are_as_documented():
    assert normalised("subject consistency", 0.1462) == 0
    assert normalised("motion smoothness", 0.9975) == pytest.approx(1)
    assert normalised("scene", 0.8222) == pytest.approx(1)
    assert len(DIMENSIONS) == 16
    everything = {name: d.high for name, d in DIMENSIONS.items()}
    assert {kind: one["value"] for kind, one in scores(everything).items()} == pytest.approx(
        {"quality": 1, "semantic": 1, "weighted": 1}
    )
    # Dynamic degree weighs a half: of 6.5 parts of quality it is 0.5.
    still = scores(everything | {"dynamic degree": 0.0})
    assert still["quality"]["value"] == pytest.approx(6 / 6.5)
    assert still["weighted"]["value"] == pytest.approx((4 * 6 / 6.5 + 1) / 5)


def test_published_halves_give_the_published_total():
    found = scores({"imaging quality": 0.8565, "object class": 0.7875})
    assert found["weighted"]["value"] == pytest.approx(0.8427, abs=1e-4)


def test_sums_say_of_which_dimensions_they_are():
    found = scores({"dynamic degree": 1.0, "temporal flickering": 0.6293})
    assert found["quality"] == {
        "value": pytest.approx(0.5 / 1.5),
        "dimensions": ["temporal flickering", "dynamic degree"],
        "of": 7,
    }
    assert set(found) == {"quality"}


# The report


def test_every_dimension_is_given_or_left_out_with_a_reason():
    report = judge_vbench([sample(i) for i in range(6)], replace(EYES, world=WORLD))
    given = {figure.name for figure in report.figures}
    left = report.details["left_out"]
    assert given | set(left) == set(DIMENSIONS)
    assert not given & set(left)
    assert {"subject consistency", "motion smoothness", "dynamic degree", "color", "scene"} <= given
    assert left["imaging quality"] == "needs MUSIQ"
    assert "not its official score" in report.details["note"]
    assert report.details["scores"]["quality"]["of"] == 7


def test_figures_name_what_looked():
    report = judge_vbench([of("still"), of("bounce")], replace(EYES, world=WORLD))
    looked = {figure.name: figure.encoder for figure in report.figures}
    assert looked["subject consistency"] == looked["background consistency"] == "color-histogram-v1"
    assert looked["motion smoothness"] == looked["dynamic degree"] == "block-matching-v1"
    assert looked["color"] == "oracle"
    assert looked["temporal flickering"] == "pixels"


def test_flickering_is_of_clips_that_stand_still():
    report = judge_vbench([of("still"), of("bounce")], EYES)
    assert next(f for f in report.figures if f.name == "temporal flickering").interval.count == 1
    moving = judge_vbench([of("bounce")], EYES)
    assert moving.details["left_out"]["temporal flickering"] == "needs clips that stand still"


def test_real_clips_reach_the_top_where_the_oracle_looks_and_others_do_not():
    real = [sample(i) for i in range(4)]
    swapped = [replace(clip, video_PHW3=clip.video_PHW3[..., ::-1]) for clip in real]
    assert judge_vbench(real, replace(EYES, world=WORLD)).value("color") == 1
    assert judge_vbench(swapped, replace(EYES, world=WORLD)).value("color") < 0.7
    assert judge_vbench(real, EYES).details["left_out"]["color"] == "needs GRiT, or captions of ShapeWorld"


def test_an_encoder_that_knows_words_tells_overall_consistency():
    red = np.full((5, 8, 8, 3), (220, 40, 40), np.uint8)
    words = Words()
    right, wrong = (
        judge_vbench([Sample("a", red, 8.0, Asked(said))], Eyes(HISTOGRAM, words)).value(
            "overall consistency"
        )
        for said in ("red", "blue")
    )
    assert right == pytest.approx(1, abs=1e-5)
    assert wrong < 0.9


def test_an_aesthetic_head_is_a_linear_one_on_a_scale_of_ten(tmp_path: Path):
    weight = np.zeros((1, 4 * 6**3), np.float32)
    save_file({"weight": weight, "bias": np.array([5.5], np.float32)}, tmp_path / "head.safetensors")
    head = Aesthetic(tmp_path / "head.safetensors", HISTOGRAM)
    report = judge_vbench([of("still")], replace(EYES, aesthetic=head))
    assert report.value("aesthetic quality") == pytest.approx(0.55)
    figure = next(f for f in report.figures if f.name == "aesthetic quality")
    assert figure.encoder.startswith("color-histogram-v1 + head.safetensors@")


@pytest.mark.parametrize(
    "write, said",
    [
        (lambda path: None, "cannot be read"),
        (lambda path: path.write_bytes(b"not safetensors"), "is no safetensors file"),
        (lambda path: save_file({"weight": np.ones((1, 3), np.float32)}, path), "cannot be read ('bias')"),
    ],
)
def test_a_head_that_is_none_is_refused_in_one_line(tmp_path: Path, write, said):
    write(tmp_path / "head.safetensors")
    with pytest.raises(UserError) as caught:
        Aesthetic(tmp_path / "head.safetensors", HISTOGRAM)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_head_of_other_vectors_is_refused(tmp_path: Path):
    path = tmp_path / "head.safetensors"
    save_file({"weight": np.ones((1, 768), np.float32), "bias": np.zeros(1, np.float32)}, path)
    with pytest.raises(UserError, match="is for 768 numbers a frame"):
        judge_vbench([of("still")], replace(EYES, aesthetic=Aesthetic(path, HISTOGRAM)))


def test_it_runs_when_it_is_asked_for():
    tools = Tools(HISTOGRAM, WORLD)
    clips = [sample(0), sample(1)]
    assert [report.kind for report in judge(clips, tools, ["vbench"])] == ["vbench-style"]
    assert "vbench-style" not in [report.kind for report in judge(clips, tools)]
