"""What stands beside a clip keeps its order, its length and its place in time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from motionloom.config.conditions import Reference
from motionloom.generate import ClipRequest, Source, recipe_sampling, task_of
from motionloom.generate.sources import encode_reference
from motionloom.plans import EXACT, NOTHING, Beside, Geometry, Given, Kind, Marks, Sample, Scenes, Text
from motionloom.plans.stream import Stream
from motionloom.plans.tokens import Values, to_streams_at
from motionloom.rng import torch_generator
from toy_model import toy_model


def pixels(frames: int, key: str, height: int = 16, width: int = 24) -> torch.Tensor:
    shape = (1, frames, height, width, 3)
    return torch.randint(0, 256, shape, generator=torch_generator(key), dtype=torch.uint8)


@pytest.mark.parametrize("noises", [(0.0, 0.5), (0.5, 0.0)])
def test_references_stand_in_the_order_of_the_request_whatever_their_noise(noises) -> None:
    model = toy_model("joint")
    sources = Source(pixels(8, "a")), Source(pixels(8, "b", 8, 12))
    request = ClipRequest(
        ("x",), conditions=tuple(Reference(noise=noise) for noise in noises), sources=sources
    )
    task, _ = task_of(model, request, recipe_sampling(model.recipe))
    assert task.values is not None
    for i, (source, noise) in enumerate(zip(sources, noises, strict=True)):
        same = torch.equal(
            task.values.references["video"][i], encode_reference(model.coders, source, "video")
        )
        assert same == (noise == 0.0)
        assert task.values.references["video"][i].shape[2] == task.sample.references["video"][i].cells
        level = task.given.references["video"][i].noise_B
        assert (0.0 if level is None else float(level[0])) == noise


@pytest.mark.parametrize("seconds", [0.55, 0.68, 0.8, 1.0])
def test_a_sound_that_is_referred_to_may_have_any_length(seconds: float) -> None:
    audio = {"enabled": True, "sample_rate": 4000, "channels": 4, "latents_per_second": 10.0}
    plan = {"type": "text_to_video", "modalities": ["video", "audio"]}
    model = toy_model("joint", audio=audio, model={"audio_dim": 24}, plan=plan)
    sound = torch.rand(1, 1, round(4000 * seconds), generator=torch_generator("sound")) * 2 - 1
    request = ClipRequest(
        ("x",),
        conditions=(Reference(modality="audio"),),
        sources=(Source(sound_BZM=sound, sample_rate=4000),),
    )
    task, _ = task_of(model, request, recipe_sampling(model.recipe))
    assert task.values is not None
    assert task.values.references["audio"][0].shape[1] == task.sample.references["audio"][0].grid[0]


def test_frames_that_are_made_later_are_exact_beside_a_noisy_memory() -> None:
    kind = Kind(1.0, 0.5)
    marks = Marks((EXACT, kind), torch.tensor([[0, 2, 0]]), torch.tensor([[0.0, 0.5]]))
    found = marks.and_given(torch.tensor([[False, False, True]]), EXACT)
    assert found.kinds[int(found.kind_BN[0, 2]) - 1] == EXACT
    assert found.kinds[int(found.kind_BN[0, 1]) - 1] == kind
    more = Marks((EXACT,), torch.tensor([[0, 1, 0]])).and_given(torch.tensor([[True, False, False]]), kind)
    assert more.noise_BG is not None
    levels = [float(more.noise_BG[0, int(k) - 1]) if k else None for k in more.kind_BN[0]]
    assert levels == [0.5, 0.0, None]


@pytest.mark.parametrize("positions", ["continuous", "jump", "gap", "reset"])
def test_a_reference_of_a_story_stands_beside_its_scenes(positions) -> None:
    """Where a plan sets scenes apart, what is referred to goes along: same seconds, same frames."""
    scene_1F = torch.tensor([[0, 0, 1, 1, 1]])
    begin_F = torch.arange(5.0) / 2
    geometry = Geometry(
        (5, 1, 1),
        begin_F[None] + 0.25,
        (8.0, 8.0),
        scene_1F,
        1,
        span_BF2=torch.stack([begin_F, begin_F + 0.5], dim=1)[None],
        scenes=2,
    )
    sample = Sample({"video": geometry}, {"video": (replace(geometry),)})
    text = Text(torch.zeros(1, 2, 3), torch.ones(1, 2, dtype=torch.bool), torch.tensor([[0, 1]]))
    layout = Scenes(positions=positions, gap=4.0).layout(
        sample, text, Given(NOTHING.marks, {"video": (Beside(),)})
    )
    x = {"video": torch.zeros(1, 5, 1, 2)}
    sigma = {"video": layout.tracks["video"].sigmas(torch.ones(1, 1))}
    values = Values(x, {"video": (x["video"],)})
    video: Stream = to_streams_at(layout, values, x, x, sigma, text, lambda clean, *_: clean)["video"]
    beside, clip = video.position_BN3[:, :5], video.position_BN3[:, 5:]
    assert torch.equal(beside, clip)
    if video.jump_BN is not None:
        assert torch.equal(video.jump_BN[:, :5], video.jump_BN[:, 5:])
    assert torch.equal(video.cell_BN3[:, :5], video.cell_BN3[:, 5:])
