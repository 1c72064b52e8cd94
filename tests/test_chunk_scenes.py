"""Chunks of several scenes: borders at the cuts, words for their own scene, cached as under the mask."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from motionloom.generate import Sampling, Task, rollout
from motionloom.plans import NOTHING, Chunks, Sample, Text, dense_mask
from motionloom.rng import torch_generator
from toy_model import altered, toy_model

FRAMES = 7


def scened(sample: Sample, lengths: tuple[int, ...]) -> Sample:
    """The sample's film cut into scenes of so many latent frames."""
    scene_BF = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    tracks = {m: replace(g, scene_BF=scene_BF, scenes=len(lengths)) for m, g in sample.tracks.items()}
    return replace(sample, tracks=tracks)


def two_captions(model) -> Text:
    return model.encode_text([["a red star", "a blue circle"]])


@pytest.mark.parametrize(
    ("first_alone", "wanted"),
    [(False, [0, 0, 1, 2, 2, 3, 3]), (True, [0, 1, 1, 2, 3, 3, 4])],
    ids=["even", "first alone"],
)
def test_no_chunk_straddles_a_cut(first_alone, wanted):
    model = toy_model("joint", {"type": "chunks", "frames": 2, "first_alone": first_alone})
    sample = scened(model.sample((14,), 16, 24, 8.0, 1), (3, 4))
    stages = model.plan.stages(sample)
    found = [n for n, stage in enumerate(stages) for _ in range(stage["video"].start, stage["video"].stop)]
    assert found == wanted
    layout = model.plan.layout(sample, two_captions(model), NOTHING)
    assert layout.tracks["video"].chunk_T.tolist() == wanted


def test_words_are_read_by_their_own_scene_alone():
    model = toy_model("joint", {"type": "chunks", "frames": 2})
    sample = scened(model.sample((14,), 16, 24, 8.0, 1), (3, 4))
    text, seen = two_captions(model), {}

    def look(streams, visibility):
        seen["mask"] = dense_mask(visibility, streams["video"].attributes, streams["text"].attributes)[0]
        seen["scenes"] = streams["video"].scene_BN[0], streams["text"].scene_BN[0]
        return streams, visibility

    _made(altered(model, look), sample, text)
    video_N, words_L = seen["scenes"]
    assert torch.equal(seen["mask"], video_N[:, None] == words_L[None])


@pytest.mark.parametrize("positions", ["continuous", "jump", "gap"])
@pytest.mark.parametrize("forcing", ["diffusion", "teacher"])
def test_scenes_from_the_cache_are_those_under_the_mask(forcing, positions):
    plan = {"type": "chunks", "frames": 2, "forcing": forcing, "positions": positions}
    model = toy_model("joint", plan)
    sample, text = scened(model.sample((14,), 16, 24, 8.0, 1), (3, 4)), two_captions(model)
    cached = _made(model, sample, text)
    masked = _made(altered(model, lambda streams, visibility: (streams, visibility)), sample, text)
    assert torch.allclose(cached, masked, atol=1e-5)
    other = _made(model, sample, model.encode_text([["a red star", "a green square"]]))
    assert torch.equal(cached[:, :3], other[:, :3]), "the first scene read the second one's words"
    assert not torch.allclose(cached[:, 3:], other[:, 3:], atol=1e-3)


def test_scenes_that_begin_at_one_time_are_refused():
    with pytest.raises(AssertionError, match="one time"):
        Chunks(positions="reset")


def _made(model, sample: Sample, text: Text) -> torch.Tensor:
    geometry = sample.tracks["video"]
    shape = (1, FRAMES, geometry.cells, model.token_channels)
    noise = torch.randn(shape, generator=torch_generator("scenes of chunks"))
    sampling = Sampling(solver="consistency", sigmas=(1.0, 0.6))
    generator = torch_generator("fresh")
    task = Task(sample, text, {"video": noise})
    return rollout(model.predictor, model.plan, task, sampling, generator=generator)["video"]
