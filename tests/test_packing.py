"""Samples packed into one row give what each gives alone: values, gradients, and no way across."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from laid import EXPAND, FIRST_FRAME
from motionloom.nn.attention import pinned
from motionloom.plans import (
    Chunks,
    Plan,
    Scenes,
    Streams,
    TextToVideo,
    Visibility,
    full,
)
from motionloom.plans.packing import pack
from motionloom.plans.visibility import scene_summaries
from test_backbones import Sample, build, sample
from test_kv_cache import build as build_with_sound
from test_kv_cache import clip_of

PLANS: dict[str, Plan] = {
    "scenes": Scenes(EXPAND),
    "first_frame": FIRST_FRAME,
    "chunks": Chunks(2, window=2, sinks=1),
    "teacher": Chunks(2, forcing="teacher"),
}
SHAPES = (((2, 3), 3, 4), ((4,), 2, 5), ((1, 2, 1), 3, 4))


def streams_of(one: Sample, plan: Plan) -> tuple[Streams, Visibility]:
    layout, streams = one.streams(plan)
    return streams, layout.visibility


def rows(plan: Plan, dtype: torch.dtype = torch.float64) -> tuple[list[Streams], Visibility]:
    made = [streams_of(sample(*shape, batch=1, dtype=dtype), plan) for shape in SHAPES]
    return [streams for streams, _ in made], made[0][1]


def gradients(model: torch.nn.Module, outs: list[Tensor]) -> list[Tensor]:
    loss = sum((i + 1) * out.square().sum() for i, out in enumerate(outs))
    return list(
        torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    )


@pytest.mark.parametrize("way", [None, "segments", "merge", "dense"])
@pytest.mark.parametrize("plan", PLANS)
def test_a_packed_row_equals_its_samples_one_by_one(plan, way):
    model = build("joint", dtype=torch.float64)
    samples, visibility = rows(PLANS[plan])
    alone = [model(streams, visibility)["video"] for streams in samples]
    packed = pack(samples, visibility)
    if way is None:
        out = model(packed.streams, packed.visibility)
    else:
        with pinned(way):
            out = model(packed.streams, packed.visibility)
    together = [answer["video"] for answer in packed.unpack(out)]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    for a, b in zip(gradients(model, together), gradients(model, alone), strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seen", ["by the plan", "everything"])
@pytest.mark.parametrize("plan", [TextToVideo(), Chunks(2), Chunks(2, forcing="teacher")], ids=repr)
@pytest.mark.parametrize("kind", ["ltx2", "ltx2.3"])
def test_samples_with_sound_do_not_hear_of_each_other_s_noise(kind, plan, seen):
    """Sound is modulated by the picture's noise and the reverse: by that of its own sample."""
    model = build_with_sound(kind)
    clips = [clip_of(kind, plan, frames, batch=1) for frames in (3, 5)]
    visibility = clips[0].visibility if seen == "by the plan" else full
    samples = [
        {m: replace(s, sigma_BK=s.sigma_BK * louder) for m, s in clip.streams.items()}
        for clip, louder in zip(clips, (1.0, 0.3), strict=True)
    ]
    packed = pack(samples, visibility)
    with torch.no_grad():
        together = packed.unpack(model(packed.streams, packed.visibility))
        for streams, answers in zip(samples, together, strict=True):
            for modality, alone in model(streams, visibility).items():
                torch.testing.assert_close(answers[modality], alone, rtol=0, atol=1e-10)


def test_summaries_stay_within_their_sample():
    model = build("joint", dtype=torch.float64)
    samples, _ = rows(Scenes())
    packed = pack(samples, scene_summaries)
    together = packed.unpack(model(packed.streams, packed.visibility))
    for streams, answer in zip(samples, together, strict=True):
        torch.testing.assert_close(
            answer["video"], model(streams, scene_summaries)["video"], rtol=0, atol=1e-10
        )


def test_samples_must_come_alone_and_alike():
    one, _ = streams_of(sample(batch=2), TextToVideo())
    other, visibility = streams_of(sample(batch=1), TextToVideo())
    with pytest.raises(AssertionError, match="batch of one"):
        pack([one], visibility)
    with pytest.raises(AssertionError, match="same modalities"):
        pack([other, {"video": other["video"]}], visibility)
