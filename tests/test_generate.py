"""Generation: the rollout engine under every plan and backbone, and prompts to clips."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from laid import frames_given
from motionloom.config.conditions import FirstFrame
from motionloom.errors import UserError
from motionloom.flow import SOLVERS, Guidance
from motionloom.generate import (
    ClipRequest,
    Model,
    Sampling,
    Source,
    Task,
    generate_clips,
    recipe_sampling,
    rollout,
)
from motionloom.plans import Streams, Values, Visibility
from motionloom.rng import torch_generator
from motionloom.tokenizers import TokenizerSpec, scene_seconds
from toy_model import BACKBONES, PLANS, altered, toy_model, toy_recipe

PROMPTS = ("a red circle moves left", "two cats sleep", "a blue star spins")
EACH_PLAN = pytest.mark.parametrize("plan", PLANS)
EACH_BACKBONE = pytest.mark.parametrize("backbone", BACKBONES)


def made(model: Model, request: ClipRequest | None = None, **options: Any) -> Tensor:
    """Clips (B, P, H, W, 3) of the three prompts, in the recipe's way of sampling."""
    sampling = options.pop("sampling", None) or recipe_sampling(model.recipe)
    return torch.stack(list(generate_clips(model, request or ClipRequest(PROMPTS), sampling, **options)))


def levels_apart(a: Tensor, b: Tensor) -> int:
    return int((a.int() - b.int()).abs().max())


def listening(model: Model) -> tuple[Model, list[Streams]]:
    """The model, and a list that fills with what its backbone is fed."""
    heard: list[Streams] = []

    def note(streams: Streams, visibility: Visibility) -> tuple[Streams, Visibility]:
        heard.append(streams)
        return streams, visibility

    return altered(model, note), heard


# Clips


@EACH_PLAN
@EACH_BACKBONE
def test_every_plan_and_backbone_makes_clips(backbone: str, plan: str) -> None:
    model = toy_model(backbone, plan)
    clips = made(model)
    assert (clips.dtype, clips.shape) == (torch.uint8, (3, 8, 16, 24, 3))
    assert torch.equal(clips, made(model)), "the seed decides"
    assert all(levels_apart(clip, other) > 10 for clip, other in zip(clips, clips.roll(1, 0), strict=True))
    assert levels_apart(clips, made(model, ClipRequest(PROMPTS, seed=1))) > 10


@EACH_BACKBONE
def test_a_clip_depends_on_neither_batch_size_nor_neighbours(backbone: str) -> None:
    model = toy_model(backbone)
    clips = made(model)
    for size in (1, 2):
        assert levels_apart(clips, made(model, batch_size=size)) <= 1
    neighbours = ("something else", PROMPTS[1], "and a much longer caption, to the last of its words")
    assert levels_apart(clips[1], made(model, ClipRequest(neighbours))[1]) <= 1


def test_the_prompt_matters() -> None:
    model = toy_model()
    assert levels_apart(made(model)[0], made(model, ClipRequest(("other words", *PROMPTS[1:])))[0]) > 1


def test_other_sizes_and_lengths_than_the_recipes() -> None:
    clips = made(toy_model("factorized"), ClipRequest(PROMPTS, frames=6, height=20, width=12))
    assert clips.shape == (3, 6, 20, 12, 3)


def test_a_recipe_with_buckets_makes_its_first_size_and_longest_clip() -> None:
    buckets = {"enabled": True, "buckets": [[24, 16], [16, 24]], "frames": [2, 6]}
    model = toy_model(video={"width": 100, "num_frames": 7}, bucketing=buckets)
    assert made(model).shape == (3, 6, 16, 24, 3)


def test_time_runs_as_in_training() -> None:
    model, heard = listening(toy_model(video={"frame_stride": 2}))
    made(model)
    # Every second frame of 8 a second: 4 frames a second, 2 to a latent frame.
    seconds = heard[0]["video"].position_BN3[0, :, 0].unique()
    torch.testing.assert_close(seconds, torch.tensor([0.25, 0.75, 1.25, 1.75]))
    assert model.fps == 4.0


def test_patches_of_several_cells() -> None:
    model = toy_model("factorized", model={"patch": [2, 2, 1]})
    assert made(model).shape == (3, 8, 16, 24, 3)
    with pytest.raises(UserError, match=r"height 20 .* model\.patch \[2, 2, 1\]: use 16 or 24"):
        made(model, ClipRequest(PROMPTS, height=20))
    # 7 is none of the tokenizer's lengths and 6 none of the patch's: both are told what both can.
    for frames in (7, 6):
        with pytest.raises(UserError, match=f"frames {frames} .* use 4 or 8"):
            made(model, ClipRequest(PROMPTS, frames=frames))


@pytest.mark.parametrize("frames, use", [(81, "77 or 85"), (80, "77 or 85"), (1, "5"), (86, "85 or 93")])
def test_advice_counts_pixel_frames_where_the_first_stands_alone(frames: int, use: str) -> None:
    """CogVideoX 1.5: four frames to a latent frame, two of these to a token."""
    model = toy_model(model={"patch": [2, 1, 1]})
    model = replace(model, tokenizer=SimpleNamespace(spec=TokenizerSpec(6, 4, 4, first_alone=True)))
    with pytest.raises(UserError, match=rf"frames {frames} .*: use {use}$"):
        model.geometry([frames], 16, 24, 8.0, batch=1)
    for good in map(int, use.split(" or ")):
        assert model.latent_grid(good, 16, 24)[0] % 2 == 0


def test_shots_of_a_vae_stand_where_training_has_them() -> None:
    """Each is coded alone, with a first frame of its own."""
    model = toy_model()
    spec = TokenizerSpec(6, 4, 2, first_alone=True)
    tokenizer = model.recipe.tokenizer.model_copy(update={"type": "wan_vae", "first_alone": True})
    recipe = model.recipe.model_copy(update={"tokenizer": tokenizer})
    model = replace(model, recipe=recipe, tokenizer=SimpleNamespace(spec=spec))
    geometry = model.geometry([3, 5], 16, 24, 8.0, batch=1)
    assert geometry.grid == (5, 4, 6)
    assert torch.equal(geometry.seconds_BF[0], scene_seconds(spec, [3, 5], 8.0))
    assert geometry.scene_BF.tolist() == [[0, 0, 1, 1, 1]]


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"prompts": ()}, "at least one prompt"),
        ({"frames": 7}, "frames 7 .* use 6 or 8"),
        ({"height": 18}, "height 18 .* use 16 or 20"),
        ({"width": 3}, "width 3 .* use 4"),
        ({"conditions": (FirstFrame(),), "sources": (Source(),)}, "first_frame: its source has no pixels"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        made(toy_model(), replace(ClipRequest(PROMPTS), **wrong))


@pytest.mark.parametrize("batch_size, total", [(3, 5), (2, 10), (1, 15)])
def test_progress_counts_to_the_end(batch_size: int, total: int) -> None:
    told: list[tuple[int, int]] = []
    made(
        toy_model(),
        sampling=Sampling(steps=5),
        batch_size=batch_size,
        progress=lambda done, of: told.append((done, of)),
    )
    assert told == [(n + 1, total) for n in range(total)]


# Guidance and solvers


def test_without_guidance_the_network_is_asked_once_a_step_and_negatives_are_ignored() -> None:
    model, heard = listening(toy_model())
    plain = recipe_sampling(model.recipe, guidance=1.0)
    clips = made(model, sampling=plain)
    assert len(heard) == plain.steps
    assert torch.equal(clips, made(model, ClipRequest(PROMPTS, negative="cats"), sampling=plain))


def test_guidance_asks_twice_and_changes_the_clip() -> None:
    model, heard = listening(toy_model())
    plain = made(model, sampling=recipe_sampling(model.recipe, guidance=1.0))
    heard.clear()
    guided = made(model, sampling=recipe_sampling(model.recipe, guidance=6.0))
    assert len(heard) == 2 * model.recipe.train.sample_num_steps
    assert levels_apart(plain, guided) > 1
    away = made(
        model, ClipRequest(PROMPTS, negative="cats"), sampling=recipe_sampling(model.recipe, guidance=6.0)
    )
    assert levels_apart(guided, away) > 1


def test_guidance_acts_in_its_interval_alone() -> None:
    model, heard = listening(toy_model())
    made(model, sampling=Sampling(steps=4, guidance=Guidance(3.0, interval=(0.3, 0.8))))
    # The steps start at sigma 1, 3/4, 1/2 and 1/4.
    assert len(heard) == 4 + 2


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_walks_the_recipes_steps(solver: str) -> None:
    model, heard = listening(toy_model())
    sampling = recipe_sampling(model.recipe, steps=4, guidance=1.0, solver=solver)
    clips = made(model, sampling=replace(sampling, eta=0.5))
    assert len(heard) == 4 * SOLVERS[solver].evaluations
    assert torch.equal(clips, made(model, sampling=replace(sampling, eta=0.5))), "its noise has a key"
    if solver not in ("euler", "ddim"):
        assert levels_apart(clips, made(model, sampling=replace(sampling, solver="euler"))) > 1


def test_the_recipe_says_how_to_sample_unless_the_user_does() -> None:
    train = {
        "sample_num_steps": 7,
        "sample_solver": "heun",
        "sample_shift": 2.0,
        "sample_cfg_scale": 4.0,
        "sample_cfg_rescale": 0.5,
        "sample_cfg_interval": [0.1, 0.9],
        "sample_eta": 0.2,
    }
    recipe = toy_recipe(train=train, flow_matching={"path": "cosine"})
    guidance = Guidance(4.0, 0.5, (0.1, 0.9))
    assert recipe_sampling(recipe) == Sampling("heun", 7, 2.0, "cosine", 0.2, guidance)
    asked = recipe_sampling(recipe, steps=2, guidance=0.0, solver="ddim")
    assert (asked.steps, asked.guidance.scale, asked.solver) == (2, 0.0, "ddim")


# The rollout engine


def setting(model: Model, batch: int = 2) -> Task:
    """Clips of two scenes, and their first noise."""
    sample = model.sample([4, 4], 16, 24, 8.0, batch)
    shape = (batch, 4, 24, model.token_channels)
    noise_BFSC = torch.randn(shape, generator=torch_generator("generate tests"))
    return Task(sample, model.encode_text([list(PROMPTS[:2])] * batch), {"video": noise_BFSC})


def answer(position_BN3: Tensor, channels: int) -> Tensor:
    """A clean clip in which every token is another."""
    scale = torch.linspace(0.5, 1.5, channels)
    return torch.sin(position_BN3.sum(dim=-1, keepdim=True) * scale)


class Knowing(torch.nn.Module):
    """Knows the clean clip, and answers with the exact velocity towards it."""

    patch = (1, 1, 1)

    def forward(self, streams: Streams, visibility: Visibility) -> dict[str, Tensor]:
        video = streams["video"]
        clean_BNC = answer(video.position_BN3, video.x_BNC.shape[-1])
        sigma_BN1 = video.sigma_BN[..., None].clamp_min(1e-6)
        return {"video": (video.x_BNC - clean_BNC) / sigma_BN1}


GIVEN_BF = torch.tensor([[True, True, False, False], [True, False, False, False]])


@pytest.mark.parametrize("given", [False, True], ids=["made", "given"])
@EACH_PLAN
def test_the_right_velocity_leads_to_the_right_clip(plan: str, given: bool) -> None:
    model = toy_model(plan=plan)
    model = replace(model, predictor=replace(model.predictor, backbone=Knowing()))
    task = setting(model)
    geometry = task.sample.main
    if given:
        values = Values({"video": torch.full_like(task.noise["video"], 0.25)})
        task = replace(task, given=frames_given(geometry, GIVEN_BF), values=values)
    out = rollout(model.predictor, model.plan, task, Sampling(steps=3))["video"]
    down = (torch.arange(4).repeat_interleave(6) + 0.5) * 4
    right = (torch.arange(6).repeat(4) + 0.5) * 4
    seconds = geometry.seconds_BF[0]
    position = torch.stack([seconds[:, None].expand(4, 24), down.expand(4, 24), right.expand(4, 24)], dim=-1)
    wanted = answer(position[None], model.token_channels).expand_as(out).clone()
    if given:
        wanted[GIVEN_BF] = 0.25
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=0)


@EACH_PLAN
@EACH_BACKBONE
def test_given_frames_stay_exact_to_the_bit(backbone: str, plan: str) -> None:
    model, heard = listening(toy_model(backbone, plan))
    task = setting(model)
    clean_BFSC = torch.randn(task.noise["video"].shape, generator=torch_generator("given"))
    task = replace(
        task,
        negative=model.encode_text([["", ""]] * 2),
        given=frames_given(task.sample.main, GIVEN_BF),
        values=Values({"video": clean_BFSC}),
    )
    guided = Sampling("heun", 3, guidance=Guidance(4.0, rescale=0.7))
    out_BFSC = rollout(model.predictor, model.plan, task, guided)["video"]
    assert torch.equal(out_BFSC[GIVEN_BF], clean_BFSC[GIVEN_BF])
    assert not torch.isclose(out_BFSC[~GIVEN_BF], clean_BFSC[~GIVEN_BF]).all(dim=-1).any()
    stages = [s for s in model.plan.stages(task.sample) if not GIVEN_BF[:, s["video"]].all()]
    assert len(heard) == 12 * len(stages)
    for streams in heard:
        video = streams["video"]
        x_BFSC = video.x_BNC.unflatten(1, (video.grid[0], -1))[:, -4:]
        sigma_BFS = video.sigma_BN.unflatten(1, (video.grid[0], -1))[:, -4:]
        assert torch.equal(x_BFSC[GIVEN_BF], clean_BFSC[GIVEN_BF])
        assert not sigma_BFS[GIVEN_BF].any()


@pytest.mark.parametrize("plan", ["chunks", "teacher"])
@EACH_BACKBONE
def test_a_chunk_is_made_from_the_chunks_before_it_alone(backbone: str, plan: str) -> None:
    model = toy_model(backbone, plan)
    task = setting(model)
    first, *_, last = (stage["video"] for stage in model.plan.stages(task.sample))

    def made(changed: slice | None) -> torch.Tensor:
        noise = task.noise["video"].clone()
        if changed is not None:
            noise[:, changed] += 1.0
        louder = replace(task, noise={"video": noise})
        return rollout(model.predictor, model.plan, louder, Sampling(steps=2))["video"]

    base, late, early = made(None), made(last), made(first)
    assert torch.equal(late[:, : last.start], base[:, : last.start])
    assert not torch.isclose(late[:, last], base[:, last]).all()
    assert not torch.isclose(early[:, last], base[:, last]).all()


@EACH_BACKBONE
def test_a_given_first_frame_is_the_first_frame_of_the_clip(backbone: str) -> None:
    sections = {"tokenizer": {"first_alone": True, "latent_d": 48}, "video": {"num_frames": 9}}
    model = toy_model(backbone, "first_frame", **sections)
    generator = torch_generator("first frames")
    first = torch.randint(0, 256, (3, 1, 16, 24, 3), generator=generator, dtype=torch.uint8)
    request = ClipRequest(PROMPTS, conditions=(FirstFrame(),), sources=(Source(first),))
    clips = made(model, request, batch_size=2)
    assert clips.shape == (3, 9, 16, 24, 3)
    # With as many channels as a patch has numbers the tokenizer loses nothing.
    assert torch.equal(clips[:, :1], first)
    free = made(model)
    assert levels_apart(free[:, 1:], clips[:, 1:]) > 1, "the rest follows what is given"


def test_a_first_frame_of_another_size_is_refused() -> None:
    # 24 x 16 has as many tokens as 16 x 24.
    turned = torch.zeros(3, 2, 24, 16, 3, dtype=torch.uint8)
    request = ClipRequest(PROMPTS, conditions=(FirstFrame(),), sources=(Source(turned),))
    with pytest.raises(UserError, match="is 16x24 pixels, the clip 24x16"):
        made(toy_model(plan="first_frame"), request)
