"""The maths of distillation: losses against closed forms, methods against what they say they do, and where
gradients end. Numbers in brackets are those of the list of proofs that the project keeps (13: analytic
distributions; 14: critic and judges; 15: gradients; 12: guidance).

Shapes: B batch, F token frames, S cells of a frame, C channels; K states of a teacher.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from motionloom.config.distil import DistilConfig
from motionloom.errors import UserError
from motionloom.flow import LINEAR, TimeSampling, sigma_schedule, warped_steps
from motionloom.generate import Model, Sampling, Task, recipe_sampling, rollout
from motionloom.methods.distil import losses
from motionloom.methods.distil.judge import Judge
from motionloom.methods.distil.lesson import Pupil, Teacher, guess, shared_draw
from motionloom.nn.norms import rms_norm
from motionloom.nn.patching import patchify
from motionloom.plans import NOTHING, Chunks, Streams, Text, Values, Visibility
from motionloom.plans.layout import GIVEN
from motionloom.rng import torch_generator
from toy_lesson import (
    Closed,
    Heard,
    Line,
    Listening,
    at,
    clips,
    gaussian_estimate,
    in_closed_form,
    knows_gaussian,
    listening,
    student_of,
    taught,
    tiny_wan,
    toy_judge,
)
from toy_model import toy_model

MEAN, DEVIATION = 2.0, 0.5
SMALL = (2, 8, 8)
"""A clip of one latent frame of 2 x 2 cells."""


def draw(*shape: int, key: str) -> Tensor:
    return torch.randn(shape, generator=torch_generator("test distil", key))


# --- losses -------------------------------------------------------------------------------------------------


def three() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """made, real, fake (B, F, S, C) and weights (B, F, S), of which some are 0."""
    made, real, fake = (draw(3, 2, 4, 5, key=key) for key in ("made", "real", "fake"))
    weight_BFS = (draw(3, 2, 4, key="weight") > -0.5).float()
    assert 0 < weight_BFS.mean() < 1
    return made.requires_grad_(), real, fake, weight_BFS


@pytest.mark.parametrize("normalise", [True, False])
def test_dmd_pulls_by_the_closed_form(normalise: bool) -> None:
    """13: the gradient is (fake - real) / mean |made - real| of the sample, over the numbers that count."""
    made, real, fake, weight_BFS = three()
    (found,) = torch.autograd.grad(losses.dmd(made, real, fake, weight_BFS, normalise=normalise).mean(), made)
    counted_BFS1 = weight_BFS[..., None]
    apart_B = ((made - real).abs().mean(-1) * weight_BFS).sum((1, 2)) / weight_BFS.sum((1, 2))
    divide_B = apart_B.detach() if normalise else torch.ones(3)
    numbers_B = weight_BFS.sum((1, 2)) * made.shape[-1]
    wanted = counted_BFS1 * (fake - real) / (3 * numbers_B * divide_B)[:, None, None, None]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-9)
    assert not found[(weight_BFS == 0)].any()


def test_the_normaliser_is_of_each_sample_and_forgets_the_scale() -> None:
    """13: a sample that is 32 times as large is pulled alike, and its neighbours do not notice."""
    made, real, fake, weight_BFS = three()
    scale_B = torch.tensor([1.0, 32.0, 1.0])[:, None, None, None]

    def pull(scale: Tensor) -> Tensor:
        x = (made.detach() * scale).requires_grad_()
        loss_B = losses.dmd(x, real * scale, fake * scale, weight_BFS)
        (found,) = torch.autograd.grad(loss_B.sum(), x)
        return found

    plain, scaled = pull(torch.ones(3, 1, 1, 1)), pull(scale_B)
    assert torch.equal(plain[[0, 2]], scaled[[0, 2]])
    torch.testing.assert_close(plain, scaled, rtol=1e-3, atol=1e-7)
    # Where nothing is to be done, nothing is divided by zero.
    same = losses.dmd(made, made.detach(), made.detach(), weight_BFS)
    assert torch.equal(same, torch.zeros(3))


def test_sid_is_its_formula_and_learns_through_both_estimates() -> None:
    made, real, fake, weight_BFS = three()
    real.requires_grad_()
    fake.requires_grad_()
    loss_B = losses.sid(made, real, fake, weight_BFS, alpha=1.2)
    for b in range(3):
        keep = weight_BFS[b] > 0
        x, r, f = (t[b][keep].double() for t in (made, real, fake))
        wanted = ((r - f) * ((r - x) - 1.2 * (r - f))).mean() / (x - r).abs().mean()
        assert loss_B[b].item() == pytest.approx(wanted.item(), rel=1e-5)
    grads = torch.autograd.grad(loss_B.sum(), (made, real, fake))
    x, r, f = (t.detach() for t in (made, real, fake))
    apart_B = ((x - r).abs().mean(-1) * weight_BFS).sum((1, 2)) / weight_BFS.sum((1, 2))
    share = weight_BFS[..., None] / (weight_BFS.sum((1, 2)) * 5 * apart_B)[:, None, None, None]
    # By x, r and f, of (r - f) ((r - x) - 1.2 (r - f)) with the divisor held.
    wanted3 = (-(r - f), (r - x) - 1.2 * (r - f) - 0.2 * (r - f), -(r - x) + 2.4 * (r - f))
    for grad, wanted in zip(grads, wanted3, strict=True):
        torch.testing.assert_close(grad, share * wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("form", ["softplus", "relativistic"])
def test_judge_and_student_want_opposite_things(form: Any) -> None:
    """And their words are those of the papers: log(1 + e^..)."""
    fake_B, real_B = torch.tensor([0.3, -1.0]), torch.tensor([-0.2, 2.0])
    student, judge = losses.gan_student(fake_B, real_B, form), losses.gan_judge(fake_B, real_B, form)
    for i, (f, r) in enumerate(zip(fake_B.tolist(), real_B.tolist(), strict=True)):
        if form == "softplus":
            wanted = math.log1p(math.exp(-f)), math.log1p(math.exp(f)) + math.log1p(math.exp(-r))
        else:
            wanted = math.log1p(math.exp(r - f)), math.log1p(math.exp(f - r))
        assert (float(student[i]), float(judge[i])) == pytest.approx(wanted, rel=1e-6)


def test_steepness_is_the_squared_slope() -> None:
    """Over many directions, of a judge that is a plane: |w|^2."""
    w_C = torch.tensor([0.5, -2.0, 1.0])
    x_NC, step = draw(200_000, 3, key="x"), 0.01
    moved_NC = x_NC + step * draw(200_000, 3, key="direction")
    found = losses.steepness((x_NC.double() @ w_C.double()), moved_NC.double() @ w_C.double(), step).mean()
    assert float(found) == pytest.approx(float(w_C.square().sum()), rel=0.02)


# --- analytic distributions (13, 14) ------------------------------------------------------------------------


def world_of(line: Line, critic: nn.Module | None = None, **distil: Any) -> tuple[Any, Model]:
    """The method over a student that is a line, a teacher that knows N(2, 0.5^2), and the exact critic."""
    options = {"num_steps": 1, **distil}
    student = in_closed_form(student_of(plan="text_to_video", distil=options), line)
    teacher = in_closed_form(toy_model(awake=False), knows_gaussian(lambda: (MEAN, DEVIATION)))
    return taught(student, teacher, critic=critic or knows_gaussian(line.law)), student


def falling(lr: float, end: float, part: float) -> float:
    """A rate that is held for half of the way, and then falls to its end."""
    return lr * (end / lr) ** max(0.0, 2 * part - 1)


def learn(method: Any, line: Line, model: Model, steps: int, lr: float = 0.06, end: float = 5e-5) -> None:
    """Adam with a falling rate. At the target the gradient is zero for every draw, so nothing rattles."""
    optimiser = torch.optim.Adam(line.parameters(), lr=lr, betas=(0.9, 0.95))
    batch = clips(model, 8, SMALL)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = falling(lr, end, step / steps)
        optimiser.zero_grad()
        method.losses(batch, at("student", step)).loss_B.mean().backward()
        optimiser.step()


@pytest.mark.parametrize(
    ("normalise", "shift"), [(True, 5.0), (False, 1.0), pytest.param(True, 8.0, marks=pytest.mark.slow)]
)
def test_dmd_with_analytic_scores_reaches_mean_and_deviation(normalise: bool, shift: float) -> None:
    """13: through the method itself, roll-out, levels, guess and all."""
    line = Line()
    method, model = world_of(line, normalise=normalise, score_shift=shift)
    learn(method, line, model, 200)
    assert line.mean.item() == pytest.approx(MEAN, abs=1e-3)
    assert abs(line.deviation.item()) == pytest.approx(DEVIATION, abs=1e-3)


def test_sid_with_analytic_scores_reaches_mean_and_deviation() -> None:
    """14."""
    line = Line()
    method, model = world_of(line, loss="sid")
    learn(method, line, model, 200)
    assert line.mean.item() == pytest.approx(MEAN, abs=1e-2)
    assert abs(line.deviation.item()) == pytest.approx(DEVIATION, abs=1e-2)


MODES = ((-1.5, 0.4, 0.65), (1.5, 0.4, 0.35))
"""Mean, deviation and weight of each mode."""


def mixture_estimate(x: Tensor, sigma: Tensor) -> Tensor:
    """E[clean | x] under the two modes."""
    parts, words = [], []
    for mean, deviation, weight in MODES:
        variance = ((1 - sigma) * deviation) ** 2 + sigma**2
        words.append(math.log(weight) - 0.5 * variance.log() - 0.5 * (x - (1 - sigma) * mean) ** 2 / variance)
        parts.append(gaussian_estimate(x, sigma, mean, deviation))
    share = torch.softmax(torch.stack(words), dim=0)
    return (share * torch.stack(parts)).sum(0)


def particles_estimate(x: Tensor, sigma: Tensor, particles_N: Tensor) -> Tensor:
    """E[clean | x] when clean is one of the particles: the exact score of a generator that makes them."""
    apart = x[..., None] - (1 - sigma[..., None]) * particles_N
    return torch.softmax(-0.5 * (apart / sigma[..., None]) ** 2, dim=-1) @ particles_N


def test_dmd_keeps_both_modes_of_a_mixture() -> None:
    """13: particles that start as one heap share themselves out between two modes of unequal weight."""
    count, steps, draws = 320, 420, 3
    levels = TimeSampling("uniform", shift=5.0, min=0.02, max=0.98, limits="clamp")
    x_N = nn.Parameter(torch.special.ndtri((torch.arange(count) + 0.5) / count))
    optimiser = torch.optim.Adam([x_N], lr=0.05)
    weight = torch.ones(count * draws, 1, 1)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 0.05 * 0.02 ** (step / steps)
        made = x_N.repeat(draws)[:, None, None, None]
        generator = torch_generator("particles", step)
        sigma = levels.sample((count * draws,), generator)[:, None, None, None]
        noised = LINEAR.mix(made.detach(), torch.randn(made.shape, generator=generator), sigma[..., 0])
        real, fake = mixture_estimate(noised, sigma), particles_estimate(noised, sigma, x_N.detach())
        optimiser.zero_grad()
        losses.dmd(made, real, fake, weight, normalise=False).sum().backward()
        optimiser.step()
    x_N = x_N.detach()
    mean = sum(w * m for m, _, w in MODES)
    deviation = math.sqrt(sum(w * (s * s + m * m) for m, s, w in MODES) - mean**2)
    assert float(x_N.mean()) == pytest.approx(mean, abs=1e-2)
    assert float(x_N.std()) == pytest.approx(deviation, abs=1e-2)
    for m, s, w in MODES:
        near = (x_N - m).abs() < 1.5
        assert float(near.float().mean()) == pytest.approx(w, abs=1e-2)
        # By quantiles: the few that are on their way between the modes are of neither.
        apart = (x_N[near] - x_N[near].median()).abs().median() / 0.6745
        assert float(apart) == pytest.approx(s, abs=0.06)


class Hats(Closed):
    """A critic that is a line in x whose two numbers are piecewise linear in sigma."""

    def __init__(self, knots: int = 17) -> None:
        super().__init__(self._estimate)
        self.table_K2 = nn.Parameter(torch.zeros(knots, 2))

    def _estimate(self, x: Tensor, sigma: Tensor) -> Tensor:
        place = sigma[..., 0] * (len(self.table_K2) - 1)
        low = place.long().clamp(0, len(self.table_K2) - 2)
        part = (place - low)[..., None]
        found = torch.lerp(self.table_K2[low], self.table_K2[low + 1], part)
        return found[..., :1] + found[..., 1:] * (x - (1 - sigma) * MEAN)


def test_a_critic_of_a_fixed_student_approaches_the_analytic_score() -> None:
    """14: by the critic's own turns alone."""
    line, critic = Line(MEAN, DEVIATION), Hats()
    method, model = world_of(line, critic=critic, score_shift=1.0)
    optimiser = torch.optim.Adam(critic.parameters(), lr=0.1)
    batch = clips(model, 40, SMALL)
    steps = 220
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = falling(0.1, 1e-3, step / steps)
        optimiser.zero_grad()
        loss_B = method.losses(batch, at("critic", step)).loss_B
        loss_B.mean().backward()
        optimiser.step()
    assert line.mean.grad is None
    assert line.deviation.grad is None
    for sigma in (0.2, 0.35, 0.5, 0.7, 0.9):
        spread = math.hypot((1 - sigma) * DEVIATION, sigma)
        x = ((1 - sigma) * MEAN + spread * torch.linspace(-2, 2, 41))[:, None]
        level = torch.full_like(x, sigma)
        found, wanted = critic.estimate(x, level), gaussian_estimate(x, level, MEAN, DEVIATION)
        assert float((found - wanted).square().mean().sqrt()) < 0.06 * DEVIATION + 0.01


# The judge of a GAN on the same toy.


def log_ratio(x: Tensor, sigma: float, line: Line) -> Tensor:
    """log of the target's noised density over the student's: what the best judge says."""

    def log_density(mean: Any, deviation: Any) -> Tensor:
        variance = ((1 - sigma) * deviation) ** 2 + sigma**2
        log_variance = variance.log() if isinstance(variance, Tensor) else math.log(variance)
        return -0.5 * (x - (1 - sigma) * mean) ** 2 / variance - 0.5 * log_variance

    return log_density(MEAN, DEVIATION) - log_density(*line.law())


@pytest.mark.parametrize("form", ["softplus", "relativistic"])
def test_a_student_before_the_best_judge_reaches_mean_and_deviation(form: Any) -> None:
    """14: with the exact logit; at the target it says nothing more."""
    line, steps = Line(), 400
    optimiser = torch.optim.Adam(line.parameters(), lr=0.05)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = falling(0.05, 1e-4, step / steps)
        generator = torch_generator("best judge", step)
        z, noise, other, other_noise = torch.randn(4, 512, generator=generator)
        sigma = 0.1 + 0.8 * float(torch.rand((), generator=generator))
        made = (1 - sigma) * (line.mean + line.deviation * z) + sigma * noise
        real = (1 - sigma) * (MEAN + DEVIATION * other) + sigma * other_noise
        optimiser.zero_grad()
        words = log_ratio(made, sigma, line), log_ratio(real, sigma, line)
        losses.gan_student(*words, form).mean().backward()
        optimiser.step()
    assert line.mean.item() == pytest.approx(MEAN, abs=1e-2)
    assert abs(line.deviation.item()) == pytest.approx(DEVIATION, abs=1e-2)


@pytest.mark.parametrize("form", ["softplus", "relativistic"])
def test_a_judge_of_a_fixed_student_approaches_the_log_ratio(form: Any) -> None:
    """14: a judge that is a parabola can say it exactly; the relativistic one up to a constant."""
    line, sigma = Line(1.0, 1.0), 0.4
    generator = torch_generator("judge", form)
    made, real = (
        (1 - sigma) * (m + s * torch.randn(20_000, generator=generator))
        + sigma * torch.randn(20_000, generator=generator)
        for m, s in ((1.0, 1.0), (MEAN, DEVIATION))
    )
    c = torch.zeros(3, requires_grad=True)
    optimiser = torch.optim.LBFGS([c], max_iter=100, line_search_fn="strong_wolfe")

    def word(x: Tensor) -> Tensor:
        return c[0] + c[1] * x + c[2] * x**2

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = losses.gan_judge(word(made), word(real), form).mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    x = torch.linspace(0.0, 2.0, 21)
    found, wanted = word(x).detach(), log_ratio(x, sigma, line)
    shift = (found - wanted).mean() if form == "relativistic" else 0.0
    assert float((found - shift - wanted).abs().max()) < 0.15


class Trunk(Closed):
    """A critic with one block that a judge can look at: smooth features of each number."""

    def __init__(self, width: int = 16) -> None:
        super().__init__(lambda x, sigma: x)
        self.block = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width))
        for i, p in enumerate(self.parameters()):
            if p.ndim:
                nn.init.normal_(p, std=0.4, generator=torch_generator("trunk", i))

    def forward(self, streams: Streams, visibility: Visibility) -> dict[str, Tensor]:
        x_BNC = streams["video"].x_BNC
        return {"video": x_BNC + 0 * self.block(x_BNC).sum() + 0 * self.unused}

    def blocks(self) -> list[nn.Module]:
        return [self.block]


@pytest.mark.parametrize("form", ["relativistic", pytest.param("softplus", marks=pytest.mark.slow)])
def test_a_student_and_a_learning_judge_meet_at_the_data(form: str) -> None:
    """14: the whole GAN turn by turn, on clips of the cache; its mean is the data's."""
    line, trunk = Line(), Trunk()
    student = student_of(
        plan="text_to_video", distil={"num_steps": 1, "loss": "gan", "gan_form": form, "gan_r1": 0.1}
    )
    judge = toy_judge(16, 1)
    teacher = in_closed_form(toy_model(awake=False), knows_gaussian(lambda: (MEAN, DEVIATION)))
    model = in_closed_form(student, line)
    method: Any = taught(model, teacher, critic=trunk, judge=judge)
    steps = 100
    slow = torch.optim.Adam(line.parameters(), lr=0.03, betas=(0.0, 0.9))
    quick = torch.optim.Adam([*trunk.parameters(), *judge.parameters()], lr=0.02, betas=(0.0, 0.9))
    for step in range(steps):
        batch = clips(model, 8, SMALL, key=step, law=(MEAN, DEVIATION))
        for turn, optimiser in (("critic", quick), ("student", slow)):
            for other in (slow, quick):
                other.zero_grad()
            method.losses(batch, at(turn, step)).loss_B.mean().backward()
            optimiser.step()
    assert line.mean.item() == pytest.approx(MEAN, abs=0.25)


def test_a_judge_hears_its_blocks_and_asks_them_once() -> None:
    """The attention of a head is a softmax over tokens: a judge is blind to their order."""
    judge = Judge(8, 4)
    judge.init_weights(torch_generator("judge"))
    assert judge.blocks == (1, 2, 3)
    with torch.no_grad():
        for head in judge.heads:
            head.question.normal_(generator=torch_generator("question"))  # type: ignore[union-attr, operator]
    features = {i: draw(2, 5, 8, key=f"block {i}") for i in judge.blocks}
    mixed = {i: x[:, [3, 1, 0, 4, 2]] for i, x in features.items()}
    torch.testing.assert_close(judge(features), judge(mixed))
    wanted = torch.zeros(2)
    for i, head in zip(judge.blocks, judge.heads, strict=True):
        x = rms_norm(features[i])
        share = torch.softmax((x * head.question).sum(-1), dim=1)  # type: ignore[union-attr, operator]
        pooled = sum(share[:, n, None] * head.value(x[:, n]) for n in range(5))  # type: ignore
        wanted += head.word(nn.functional.silu(pooled))[:, 0].detach() / 3  # type: ignore
    torch.testing.assert_close(judge(features), wanted)
    assert Judge(8, 30).blocks == (14, 21, 29)
    assert Judge(8, 4, (0,)).blocks == (0,)


# --- guidance (12) ------------------------------------------------------------------------------------------


def test_a_delta_of_3_5_is_a_scale_of_4_5_from_the_recipe_to_the_teacher() -> None:
    delta, scale = DistilConfig(guidance=3.5, guidance_form="delta"), DistilConfig(guidance=4.5)
    assert delta.scale == scale.scale == 4.5
    model, student = toy_model("joint", "text_to_video"), student_of(plan="text_to_video")
    asked = Pupil(student).ask(clips(student), at("student"))
    noise = Pupil(student).noise(asked.clean, at("student"), "noise")
    draws_B1 = torch.tensor([[0.3], [0.8]])

    def real(how: float) -> Tensor:
        found = Teacher(model, how, "a dull grey").guess(asked, asked.sample, asked.clean, draws_B1, noise)
        return found["video"].clean_BFSC

    cond = real(1.0)
    silent = replace(asked, batch=replace(asked.batch, captions=[["a dull grey"]] * 2))
    found = Teacher(model).guess(silent, asked.sample, asked.clean, draws_B1, noise)
    uncond = found["video"].clean_BFSC
    assert (cond - uncond).abs().max() > 1e-2
    torch.testing.assert_close(real(delta.scale), cond + 3.5 * (cond - uncond), rtol=1e-4, atol=1e-5)
    assert torch.equal(real(delta.scale), real(scale.scale))


# --- roll-outs: what each chunk looks at (2, 3) -------------------------------------------------------------

LEVELS = (1.0, 0.9, 0.7, 0.4)
ROLLS = {
    "window and sink": {"type": "chunks", "frames": 1, "window": 2, "sinks": 1},
    "pairs": {"type": "chunks", "frames": 2},
    "clean history": {"type": "chunks", "frames": 1, "forcing": "teacher"},
}


def double(model: Model) -> Model:
    assert isinstance(model.predictor.backbone, nn.Module)
    model.predictor.backbone.double()
    return model


def words(model: Model, *captions: str) -> Text:
    text = model.encode_text([[caption] for caption in captions])
    return replace(text, x_BLC=text.x_BLC.to(next(model.predictor.backbone.parameters()).dtype))  # type: ignore


def task_for(model: Model, frames: int = 8) -> Task:
    sample = model.sample((frames,), 16, 24, 8.0, 2)
    grid = sample.main.grid
    noise = draw(2, grid[0], grid[1] * grid[2], model.token_channels, key="noise")
    text = words(model, "a red star", "a blue circle")
    return Task(sample, text, {"video": noise.to(text.x_BLC.dtype)})


@pytest.mark.parametrize("past", ["write through", "clean", "at a level"])
@pytest.mark.parametrize("plan", ["window and sink", "pairs"])
def test_few_steps_from_a_cache_are_the_masked_forward(plan: str, past: str) -> None:
    """2 and 3 of the list, on the walk that students are trained by. What a chunk looked at in its last step
    is put under the mask of all chunks: noisy as their last steps saw them, clean, or at a level."""
    model = double(toy_model("joint", ROLLS[plan]))
    task = task_for(model)
    context = 0.2 if past == "at a level" else 0.0
    sampling = Sampling("consistency", sigmas=LEVELS, write_through=past == "write through", context=context)
    states: dict[int, Tensor] = {}

    def watch(stage: Any, step: int, sigma: float, x: Any, clean: Any) -> None:
        states[stage["video"].start] = x["video"]

    generator = torch_generator("fresh")
    made = rollout(model.predictor, model.plan, task, sampling, generator=generator, watch=watch)
    last = torch.cat([states[key] for key in sorted(states)], dim=1)

    def masked(forcing: Any, level: float) -> Tensor:
        assert isinstance(model.plan, Chunks)
        plan = replace(model.plan, forcing=forcing)
        layout = plan.layout(task.sample, task.text, NOTHING)
        track = layout.tracks["video"]
        # The copies at a level of their own.
        context_N = track.geometry.cells
        copies_BN = track.context_T.repeat_interleave(context_N)[None]
        level_BN = torch.where(copies_BN, len(track.levels), track.level_BN)
        track = replace(track, levels=(*track.levels, GIVEN), level_BN=level_BN)
        layout = replace(layout, tracks={"video": track})
        draws_BD = torch.full((2, track.num_draws), LEVELS[-1], dtype=torch.float64)
        levels_BK = track.sigmas(draws_BD)
        levels_BK[:, -1] = level
        levels_BFS = torch.full(last.shape[:3], level)
        one = Values({"video": LINEAR.mix(made["video"], task.noise["video"], levels_BFS)})
        found = guess(
            model.predictor, layout, one, {"video": last}, {"video": levels_BK}, task.noise, task.text
        )
        return found["video"].clean_BFSC

    with torch.no_grad():
        ways = {
            "write through": masked("diffusion", 0.0),
            "clean": masked("teacher", 0.0),
            "at a level": masked("teacher", 0.2),
        }
    off = {name: float((way - made["video"]).abs().max()) for name, way in ways.items()}
    assert off.pop(past) < 1e-12
    assert min(off.values()) > 1e-4


# --- roll-outs: where gradients end (15) --------------------------------------------------------------------


def calls_by_chunk(ear: Listening, stages: list[slice], cached: bool) -> dict[int, list[Heard]]:
    """Calls with a graph, by the chunk that they made."""
    found: dict[int, list[Heard]] = {}
    for one in (one for one in ear.heard if one.graph):
        if cached:
            frame = int(one.cell_BN3[0, 0, 0])
        else:  # the noisy tokens of a forward over all frames
            noisy_N = one.sigma_BN[0] > 0
            frame = int(one.cell_BN3[0][noisy_N][0, 0])
        chunk = next(n for n, stage in enumerate(stages) if stage.start <= frame < stage.stop)
        found.setdefault(chunk, []).append(one)
    return found


@pytest.mark.parametrize("write_through", [False, True])
@pytest.mark.parametrize(
    ("backbone", "plan"),
    [
        ("joint", "window and sink"),
        ("joint", "pairs"),
        ("joint", "clean history"),
        ("factorized", "pairs"),
        ("wan", "window and sink"),
    ],
)
def test_a_chunk_learns_through_one_step_and_not_through_its_past(
    backbone: str, plan: str, write_through: bool
) -> None:
    """15: d loss(chunk) / d inputs of every other chunk is exactly zero, and one call a chunk has a graph."""
    model = tiny_wan(ROLLS[plan]) if backbone == "wan" else toy_model(backbone, ROLLS[plan])
    cached = backbone != "factorized"
    model, ear = listening(model, cached)
    task = task_for(model)
    stages = [stage["video"] for stage in model.plan.stages(task.sample)]
    exits = [1, 0, 3, 2][: len(stages)]
    sampling = Sampling("consistency", sigmas=LEVELS, write_through=write_through)
    made = rollout(
        model.predictor,
        model.plan,
        task,
        sampling,
        generator=torch_generator("fresh"),
        exits=exits,
    )["video"]
    # Steps up to the exit, and where the past is a cache a pass to remember by for all but the last chunk.
    remembered = (len(stages) - 1) * (cached and not write_through)
    assert len(ear.heard) == sum(exits) + len(stages) + remembered
    assert not any(one.linked for one in ear.heard)
    calls = calls_by_chunk(ear, stages, cached)
    assert {chunk: len(found) for chunk, found in calls.items()} == dict.fromkeys(range(len(stages)), 1)
    for chunk, stage in enumerate(stages):
        (call,) = calls[chunk]
        assert float(call.sigma_BN.max()) == pytest.approx(LEVELS[exits[chunk]])
        leaves = {id(one): one.streams["video"] for one in ear.heard}
        loss = made[:, stage].square().sum()
        grads = dict(
            zip(
                leaves,
                torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, allow_unused=True),
                strict=True,
            )
        )
        own = grads.pop(id(call))
        assert own is not None
        assert own.any()
        assert all(grad is None or not grad.any() for grad in grads.values())
        # The words are read anew in the step that learns, in every chunk.
        (word,) = torch.autograd.grad(loss, [call.streams["text"]], retain_graph=True)
        assert word.any()


def test_only_the_last_stages_have_a_graph_where_only_they_are_asked_for() -> None:
    model, ear = listening(toy_model("joint", ROLLS["window and sink"]))
    task = task_for(model)
    sampling = Sampling("consistency", sigmas=LEVELS)
    options: dict[str, Any] = {"exits": [1, 1, 1, 1], "generator": torch_generator("fresh")}
    made = rollout(model.predictor, model.plan, task, sampling, graph_from=2, **options)["video"]
    assert [int(one.cell_BN3[0, 0, 0]) for one in ear.heard if one.graph] == [2, 3]
    inputs = [one.streams["video"] for one in ear.heard if one.graph]
    # Frames before them are numbers without a graph, to the bit those of a roll-out that has one everywhere.
    assert all(not g.any() for g in torch.autograd.grad(made[:, :2].sum() + 0 * made.sum(), inputs))
    ear.heard.clear()
    options["generator"] = torch_generator("fresh")
    whole = rollout(model.predictor, model.plan, task, sampling, **options)["video"]
    assert torch.equal(whole, made)
    with torch.no_grad():
        options["generator"] = torch_generator("fresh")
        plain = rollout(model.predictor, model.plan, task, sampling, **options)["video"]
    assert torch.equal(plain, made)
    assert not plain.requires_grad


def grads_of(model: Model, method: Any, turn: str = "student", step: int = 0) -> dict[str, Tensor]:
    """Gradients of a turn over all that a student trains, by name."""
    for module in method.modules().values():
        module.zero_grad()
    method.losses(clips(model), at(turn, step)).loss_B.mean().backward()
    found = {}
    for name, module in method.modules().items():
        for own, p in module.named_parameters():
            found[f"{name}.{own}"] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
    return found


def recomputing(kind: str, on: bool) -> Model:
    if kind == "wan":
        return tiny_wan(ROLLS["window and sink"], method="matching", model={"checkpoint_blocks": on})
    return student_of("joint", ROLLS["window and sink"], model={"checkpoint_blocks": on})


@pytest.mark.parametrize("kind", ["joint", "wan"])
def test_recomputed_blocks_learn_the_same(kind: str) -> None:
    """15: blocks that are run again in the backward pass read the past that they read before."""
    teacher = tiny_wan({"type": "text_to_video"}) if kind == "wan" else None
    found = {}
    for on in (False, True):
        model = recomputing(kind, on)
        model.predictor.backbone.train()  # type: ignore[attr-defined]
        found[on] = grads_of(model, taught(model, teacher, scale=3.0))
    assert any(grad.any() for grad in found[True].values())
    for name, grad in found[True].items():
        assert torch.equal(grad, found[False][name]), name


def test_a_trained_text_encoder_learns_from_roll_outs() -> None:
    model = student_of("joint", ROLLS["window and sink"])
    found = grads_of(model, taught(model, scale=3.0))
    words = {name: grad for name, grad in found.items() if name.startswith("text_encoder.")}
    assert any(grad.abs().max() > 1e-8 for grad in words.values())


# --- exits and lengths --------------------------------------------------------------------------------------


def graph_levels(ear: Listening, method: Any, model: Model, rank: int, step: int) -> list[float]:
    ear.heard.clear()
    method.losses(clips(model, key=rank), at("student", step, rank=rank))
    return [round(float(one.sigma_BN.max()), 6) for one in ear.heard if one.graph]


@pytest.mark.parametrize("how", ["same", "each", "last"])
def test_exits_are_those_of_all_ranks(how: str) -> None:
    """Collectives would wait for ever if one rank took a step more than another; their noise differs."""
    options = {"same_exit": how == "same", "last_exit": how == "last", "num_steps": 3}
    plan = {"type": "chunks", "frames": 1}
    model, ear = listening(student_of("joint", plan, distil=options))
    method = taught(model)
    levels = [round(level, 6) for level in model.recipe.distil.levels]
    seen = set()
    for step in range(8):
        found = [graph_levels(ear, method, model, rank, step) for rank in (0, 1)]
        assert found[0] == found[1]
        assert len(found[0]) == 4
        assert set(found[0]) <= set(levels)
        assert how == "each" or len(set(found[0])) == 1
        seen.add(tuple(found[0]))
    if how == "last":
        assert seen == {(levels[-1],) * 4}
    elif how == "same":
        assert len(seen) > 1
    else:
        assert any(len(set(one)) > 1 for one in seen)


def test_shared_draws_are_even_and_of_all_ranks() -> None:
    drawn = [shared_draw(at("student", step), "exit", 0, 4) for step in range(2000)]
    assert drawn == [shared_draw(at("student", step, rank=3), "exit", 0, 4) for step in range(2000)]
    counts = torch.bincount(torch.tensor(drawn), minlength=4)
    assert (counts - 500).abs().max() < 80  # four deviations
    assert drawn != [shared_draw(at("critic", step), "exit", 0, 4) for step in range(2000)]


def test_two_ranks_make_other_clips() -> None:
    model, ear = listening(student_of("joint", ROLLS["pairs"]))
    method = taught(model)
    batch, inputs = clips(model), []
    for rank in (0, 1):
        ear.heard.clear()
        method.losses(batch, at("student", rank=rank))
        inputs.append(ear.heard[0].streams["video"].detach())
    assert not torch.equal(*inputs)


def test_what_is_remembered_stands_at_the_level_of_the_recipe() -> None:
    for level in (0.0, 0.3):
        options = {"context_noise": level, "last_exit": True}
        model, ear = listening(student_of("joint", ROLLS["window and sink"], distil=options))
        method = taught(model)
        method.losses(clips(model), at("student"))
        found = {round(float(one.sigma_BN.max()), 6) for one in ear.heard}
        assert found == {*(round(one, 6) for one in model.recipe.distil.levels), level}


def test_what_the_last_step_saw_is_remembered_without_a_pass() -> None:
    """distil.write_through, while learning and while playing."""
    model, ear = listening(
        student_of(
            "joint",
            ROLLS["window and sink"],
            distil={"write_through": True, "last_exit": True, "num_steps": 3},
        )
    )
    taught(model).losses(clips(model), at("student"))
    chunks = 4
    assert len(ear.heard) == 3 * chunks
    assert {round(float(one.sigma_BN.max()), 6) for one in ear.heard} == {
        round(one, 6) for one in model.recipe.distil.levels
    }
    assert recipe_sampling(model.recipe).write_through
    with pytest.raises(ValueError, match=r"distil\.context_noise to 0"):
        student_of("joint", LONG, distil={"write_through": True, "context_noise": 0.1})


LONG = {"type": "chunks", "frames": 1, "window": 2, "sinks": 1}


@pytest.mark.parametrize("first_alone", [False, True])
def test_the_end_of_a_long_roll_out_stands_where_a_clip_without_its_head_stands(first_alone: bool) -> None:
    """Teacher and critic never saw a long clip: they are shown the last one's length of it."""
    tokenizer = {"first_alone": first_alone}
    frames = 9 if first_alone else 8  # one alone and four pairs; four pairs
    size = (frames, 16, 24)
    video = {"num_frames": frames}
    model, own = listening(
        student_of("joint", LONG, tokenizer=tokenizer, video=video, distil={"longest": 9, "num_steps": 2})
    )
    teacher, ear = listening(
        toy_model("joint", "text_to_video", tokenizer=tokenizer, video=video), cached=False
    )
    usual, tokens = 5 if first_alone else 4, 24
    plain = student_of("joint", LONG, tokenizer=tokenizer, video=video)
    taught(plain, teacher).losses(clips(plain, size=size), at("student"))
    (wanted,) = ear.heard
    method, lengths = taught(model, teacher), set()
    for step in range(8):
        ear.heard.clear()
        own.heard.clear()
        method.losses(clips(model, size=size), at("student", step))
        (call,) = ear.heard
        longer = 1 + max(int(one.cell_BN3[..., 0].max()) for one in own.heard) > usual
        count = usual - (longer and first_alone)
        lengths.add(longer)
        assert call.position_BN3.shape[1] == count * tokens
        behind = (usual - count) * tokens
        torch.testing.assert_close(call.position_BN3, wanted.position_BN3[:, behind:], rtol=0, atol=1e-5)
        assert torch.equal(call.cell_BN3, wanted.cell_BN3[:, behind:])
    assert lengths == {True, False}


def test_long_roll_outs_learn_at_their_end_alone() -> None:
    model, ear = listening(student_of("joint", LONG, distil={"longest": 9, "num_steps": 2}))
    method = taught(model)
    reached = set()
    for step in range(9):
        ear.heard.clear()
        method.losses(clips(model), at("student", step)).loss_B.mean().backward()
        frames = [int(one.cell_BN3[0, 0, 0]) for one in ear.heard if one.graph]
        total = 1 + max(int(one.cell_BN3[..., 0].max()) for one in ear.heard)
        assert frames == list(range(total - 4, total))
        reached.add(total)
    assert min(reached) == 4
    assert 6 < max(reached) <= 9


def test_words_change_at_the_stage_that_says_so_and_the_past_stays() -> None:
    """As ``Stream.say`` does it: held keys are those of the old words."""
    model, ear = listening(toy_model("joint", ROLLS["pairs"]))
    task = task_for(model)
    other = words(model, "a green square", "a white ring")

    def made(task: Task) -> Tensor:
        sampling = Sampling("consistency", sigmas=LEVELS)
        return rollout(model.predictor, model.plan, task, sampling, generator=torch_generator("fresh"))[
            "video"
        ]

    plain = made(task)
    ear.heard.clear()
    changed = made(replace(task, later={1: other}))
    heard = list(ear.heard)
    assert torch.equal(changed[:, :2], plain[:, :2])
    assert (changed[:, 2:] - plain[:, 2:]).abs().max() > 1e-3
    assert (changed[:, 2:] - made(replace(task, text=other))[:, 2:]).abs().max() > 1e-3, (
        "the past is of the old"
    )
    for one in heard:
        wanted = task.text if one.cell_BN3[0, 0, 0] < 2 else other
        assert torch.equal(one.streams["text"], wanted.x_BLC)
    whole = toy_model("joint", "text_to_video")
    with pytest.raises(UserError, match="from a cache"):
        rollout(whole.predictor, whole.plan, replace(task_for(whole), later={1: other}), Sampling(steps=1))


def test_a_switched_roll_out_is_judged_under_the_words_of_its_end() -> None:
    """distil.switch: what lies before the end is made under the neighbour's words."""
    options = {"longest": 6, "num_steps": 2, "switch": 1.0}
    model, own = listening(student_of("joint", LONG, distil=options))
    teacher, ear = listening(toy_model("joint", "text_to_video"), cached=False)
    method, batch = taught(model, teacher), clips(model)
    text = words(model, *(captions[0] for captions in batch.captions)).x_BLC
    lengths = set()
    for step in range(6):
        own.heard.clear()
        ear.heard.clear()
        method.losses(batch, at("student", step))
        total = 1 + max(int(one.cell_BN3[..., 0].max()) for one in own.heard)
        lengths.add(total)
        for one in own.heard:
            before = int(one.cell_BN3[0, 0, 0]) < total - 4
            assert torch.equal(one.streams["text"], text.roll(1, 0) if before else text)
        assert all(torch.equal(one.streams["text"], text) for one in ear.heard)
    assert lengths == {5, 6}
    # Whose captions are one: nothing to change to.
    alike = clips(model, captions=("a red star", "a red star"))
    own.heard.clear()
    method.losses(alike, at("student"))
    assert all(torch.equal(one.streams["text"][0], text[0]) for one in own.heard)


@pytest.mark.parametrize("longest", [1, 4])
def test_a_length_that_adds_no_chunk_is_refused_at_once(longest: int) -> None:
    never = student_of("joint", LONG, distil={"longest": longest})
    with pytest.raises(UserError, match=f"longest {longest} holds no chunk of 1 besides the 4 latent frames"):
        taught(never).losses(clips(never), at("student"))


def test_a_clip_that_ends_in_a_short_chunk_grows_by_whole_ones() -> None:
    plan = {"type": "chunks", "frames": 3}
    model, own = listening(student_of("joint", plan, distil={"longest": 7, "num_steps": 2, "switch": 1.0}))
    taught(model).losses(clips(model), at("student"))
    frames = [int(one.cell_BN3[0, 0, 0]) for one in own.heard]
    assert (min(frames), 1 + max(int(one.cell_BN3[..., 0].max()) for one in own.heard)) == (0, 7)
    first = next(one for one in own.heard if one.cell_BN3[0, 0, 0] == 0).streams["text"]
    last = own.heard[-1].streams["text"]
    assert torch.equal(first, last.roll(1, 0))
    assert not torch.equal(first, last)


# --- ODE regression -----------------------------------------------------------------------------------------


def test_the_levels_of_a_recipe_are_the_warped_steps() -> None:
    """10: 1000, 937.5, 833.3 and 625 at a shift of 5."""
    config = DistilConfig(num_steps=4, shift=5.0)
    assert config.levels == pytest.approx((1.0, 0.9375, 0.83333333, 0.625))
    for shift in (1.0, 5.0, 8.0):
        wanted = warped_steps((1000, 750, 500, 250), shift)
        assert DistilConfig(num_steps=4, shift=shift).levels == pytest.approx(wanted, rel=1e-12)
        assert sigma_schedule(4, shift).tolist() == pytest.approx([*wanted, 0.0], abs=1e-7)
    assert DistilConfig(sigmas=(1.0, 0.757, 0.522)).levels == (1.0, 0.757, 0.522)


@pytest.mark.parametrize("plan", ["window and sink", "clean history"])
def test_each_chunk_takes_the_state_of_its_level(plan: str) -> None:
    """And the loss is the mean squared error against the end, but for chunks that stand there already."""
    model, ear = listening(student_of("joint", ROLLS[plan], "ode"), cached=True)
    method = taught(model)
    batch = clips(model, levels=4)
    states = [patchify(batch.states["video"][:, k], (1, 1, 1)) for k in range(4)]
    clean_BFSC = patchify(batch.latents["video"].x_BFHWC, (1, 1, 1))
    levels = model.recipe.distil.levels
    met = set()
    for step in range(6):
        ear.heard.clear()
        loss_B = method.losses(batch, at("ode", step)).loss_B.detach()
        (call,) = ear.heard
        own = slice(call.sigma_BN.shape[1] - 96, None)  # behind the copies, if there are any
        sigma_BF = call.sigma_BN[:, own].unflatten(1, (4, 24))[:, :, 0]
        x_BFSC = call.streams["video"].detach()[:, own].unflatten(1, (4, 24))
        v_BFSC = call.out.detach()[:, own].unflatten(1, (4, 24))
        for b in range(2):
            errors = []
            for f in range(4):
                sigma = float(sigma_BF[b, f])
                met.add(round(sigma, 5))
                if sigma == 0:
                    assert torch.equal(x_BFSC[b, f], clean_BFSC[b, f])
                    continue
                k = next(k for k, level in enumerate(levels) if sigma == pytest.approx(level))
                assert torch.equal(x_BFSC[b, f], states[k][b, f])
                guess_SC = x_BFSC[b, f] - sigma * v_BFSC[b, f]
                errors.append((guess_SC - clean_BFSC[b, f]).square().mean())
            wanted = float(torch.stack(errors).mean()) if errors else 0.0
            assert float(loss_B[b]) == pytest.approx(wanted, rel=1e-4)
    wanted_levels = {round(level, 5) for level in levels} | ({0.0} if plan == "window and sink" else set())
    assert met == wanted_levels
    if plan == "clean history":
        copies = call.streams["video"].detach()[:, :96].unflatten(1, (4, 24))
        assert torch.equal(copies, clean_BFSC)


def test_ode_without_states_says_what_to_do() -> None:
    from motionloom.errors import UserError

    model = student_of("joint", "chunks", "ode")
    with pytest.raises(UserError, match="holds no states of a teacher: make it with pairs"):
        taught(model).losses(clips(model), at("ode"))


# --- consistency --------------------------------------------------------------------------------------------


class Guessing(Closed):
    """A student whose clean estimate is a x + b sigma."""

    def __init__(self) -> None:
        super().__init__(lambda x, sigma: self.a * x + self.b * sigma)
        self.a, self.b = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(-0.4))


@pytest.mark.parametrize("causal", [False, True])
def test_consistency_compares_two_points_of_the_teachers_way(causal: bool) -> None:
    """With a student and a teacher in closed form, the loss is the formula; a causal teacher gives each chunk
    a level of its own."""
    plan = {"type": "chunks", "frames": 1} if causal else {"type": "text_to_video"}
    own = Guessing()
    options = {"grid_steps": 3, "shift": 2.0}
    model, ear = listening(
        in_closed_form(student_of(plan=plan, method="consistency", distil=options), own), cached=False
    )
    teacher = in_closed_form(toy_model("joint", plan, awake=False), knows_gaussian(lambda: (MEAN, DEVIATION)))
    method = taught(model, teacher)
    grid = sigma_schedule(3, 2.0).tolist()
    seen = set()
    for step in range(10):
        ear.heard.clear()
        batch = clips(model)
        loss_B = method.losses(batch, at("consistency", step)).loss_B
        end, begin = ear.heard
        assert (end.graph, begin.graph) == (False, True)
        x, sigma = begin.streams["video"].detach(), begin.sigma_BN[..., None]
        now = [min(range(3), key=lambda i: abs(grid[i] - s)) for s in sigma.flatten().tolist()]
        after = torch.tensor([grid[i + 1] for i in now]).reshape(sigma.shape)
        seen |= set(now)
        assert causal == (len(set(now[:96])) > 1) or step > 0
        v = (x - gaussian_estimate(x, sigma, MEAN, DEVIATION)) / sigma
        cleaner = x + (after - sigma) * v
        torch.testing.assert_close(end.streams["video"].detach(), cleaner, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(end.sigma_BN[..., None], after, rtol=0, atol=1e-6)
        target = torch.where(after == 0, cleaner, 0.7 * cleaner - 0.4 * after)
        wanted_B = (0.7 * x - 0.4 * sigma - target).square().mean(dim=(1, 2))
        torch.testing.assert_close(loss_B.detach(), wanted_B, rtol=1e-4, atol=1e-5)
        (grad,) = torch.autograd.grad(loss_B.sum(), own.b)
        error = 0.7 * x - 0.4 * sigma - target
        torch.testing.assert_close(grad, (2 * error * sigma).mean(dim=(1, 2)).sum(), rtol=1e-4, atol=1e-4)
    assert seen == {0, 1, 2}


def test_a_student_that_knows_where_the_way_ends_has_no_loss() -> None:
    """Data that is a point: all ways are straight lines to it."""
    point = Closed(lambda x, sigma: torch.full_like(x, MEAN))
    student = in_closed_form(
        student_of(plan="text_to_video", method="consistency", distil={"grid_steps": 4}), point
    )
    teacher = in_closed_form(
        toy_model(awake=False), Closed(lambda x, sigma: torch.full_like(x, MEAN) + 0 * sigma)
    )
    batch = clips(student, law=(MEAN, 0.0))
    for step in range(4):
        loss_B = taught(student, teacher).losses(batch, at("consistency", step)).loss_B
        assert float(loss_B.max()) < 1e-8


# --- matching on noised clips (CausVid) ---------------------------------------------------------------------


def test_noised_clips_take_a_level_for_each_chunk_and_teacher_and_critic_one_for_all() -> None:
    model, ear = listening(student_of("joint", ROLLS["window and sink"], distil={"source": "data"}))
    teacher, judge_ear = listening(toy_model("joint", "text_to_video"), cached=False)
    method = taught(model, teacher)
    levels = {round(one, 5) for one in (*model.recipe.distil.levels, 0.0)}
    met: set[float] = set()
    mixed = False
    clean_BFSC = patchify(clips(model).latents["video"].x_BFHWC, (1, 1, 1))
    for step in range(8):
        ear.heard.clear()
        judge_ear.heard.clear()
        method.losses(clips(model), at("student", step))
        (call,), (judged,) = ear.heard, judge_ear.heard
        sigma_BF = call.sigma_BN.unflatten(1, (4, 24))[:, :, 0]
        found = {round(float(s), 5) for s in sigma_BF.flatten()}
        assert found <= levels
        met |= found
        mixed |= len({round(float(s), 5) for s in sigma_BF[0]}) > 1
        x_BFSC = call.streams["video"].detach().unflatten(1, (4, 24))
        assert torch.equal(x_BFSC[sigma_BF == 0], clean_BFSC[sigma_BF == 0])
        assert all(len(set(row)) == 1 for row in judged.sigma_BN.tolist())
        assert 0.02 - 1e-6 <= float(judged.sigma_BN.min()) <= float(judged.sigma_BN.max()) <= 0.98 + 1e-6
    assert met == levels
    assert mixed


def test_score_levels_are_clamped_after_the_shift() -> None:
    options = {"score_shift": 5.0, "score_range": (0.3, 0.5), "num_steps": 1}
    line = Line()
    method, model = world_of(line, **options)
    seen: list[float] = []
    exact = gaussian_estimate

    def estimate(x: Tensor, sigma: Tensor) -> Tensor:
        seen.extend(sigma[:, 0, 0].tolist())
        return exact(x, sigma, MEAN, DEVIATION)

    method._teacher.model.predictor.backbone.estimate = estimate
    for step in range(10):
        method.losses(clips(model, 8, SMALL), at("student", step))
    # U(0, 1) shifted by 5 lies above 0.5 in 5 of 6 draws: all those are moved onto the end.
    assert min(seen) >= 0.3 - 1e-6
    at_the_end = sum(abs(s - 0.5) < 1e-6 for s in seen) / len(seen)
    assert 0.65 < at_the_end < 0.98


# --- who learns in whose turn -------------------------------------------------------------------------------

TURNS: dict[str, dict[str, Any]] = {
    "dmd": {},
    "dmd on noised clips": {"source": "data"},
    "sid": {"loss": "sid"},
    "gan": {"loss": "gan", "gan_r1": 0.1, "gan_r2": 0.1, "gan_dmd": 0.5},
}


@pytest.mark.parametrize("how", TURNS)
def test_turns_reach_their_own_and_the_teacher_never_learns(how: str) -> None:
    options = TURNS[how]
    model = student_of("joint", ROLLS["window and sink"], distil={**options, "critic_ratio": 3})
    teacher = toy_model("joint", "text_to_video")
    judge = toy_judge() if how == "gan" else None
    method: Any = taught(model, teacher, judge=judge, scale=3.0)
    assert [method.turns(step) for step in range(4)] == [
        ("student", "critic"),
        ("critic",),
        ("critic",),
        ("student", "critic"),
    ]
    groups = method.optimizers()
    own = {turn: {id(p) for g in o.param_groups for p in g["params"]} for turn, o in groups.items()}
    assert not own["student"] & own["critic"]
    parts = {**method.modules(), **method.beside()}
    assert set(method.modules()) == {"backbone", "text_encoder"}
    everything = {id(p) for module in parts.values() for p in module.parameters()}
    assert own["student"] | own["critic"] == everything
    for turn in ("student", "critic"):
        for module in parts.values():
            module.zero_grad()
        found = method.losses(clips(model), at(turn))
        assert found.loss_B.shape == (2,)
        found.loss_B.mean().backward()
        learnt = {
            name: any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())
            for name, module in parts.items()
        }
        assert learnt["backbone"] == learnt["text_encoder"] == (turn == "student")
        assert learnt["critic"] or turn == "student"
        assert turn == "student" or learnt.get("judge", True)
        own_teacher = teacher.predictor.backbone
        assert all(p.grad is None for p in own_teacher.parameters())  # type: ignore[attr-defined]


def test_the_pull_is_the_difference_of_critic_and_teacher_at_one_noised_copy() -> None:
    """The student's loss is losses.dmd of what both say of the very same states."""
    model, own = listening(student_of("joint", ROLLS["pairs"]))
    teacher, real_ear = listening(toy_model("joint", "text_to_video"), cached=False)
    critic = listening(toy_model("joint", "text_to_video", model={"mlp_ratio": 3.0}), cached=False)[1]
    method = taught(model, teacher, critic=critic)
    loss_B = method.losses(clips(model), at("student")).loss_B.detach()
    (real,), (fake,) = real_ear.heard, critic.heard
    assert torch.equal(real.streams["video"], fake.streams["video"])
    assert torch.equal(real.sigma_BN, fake.sigma_BN)
    x, sigma = real.streams["video"].detach(), real.sigma_BN[..., None]
    r, f = (x - sigma * one.out.detach() for one in (real, fake))
    made = torch.cat([one.streams["video"] - one.sigma_BN[..., None] * one.out for one in own.heard
                      if one.graph], dim=1).detach()  # fmt: skip
    apart_B = (made - r).abs().mean(dim=(1, 2))
    wanted_B = 0.5 * ((f - r).square().mean(dim=(1, 2)) / apart_B**2)
    torch.testing.assert_close(loss_B, wanted_B, rtol=1e-4, atol=1e-6)


# --- any plan, any backbone, any stream ---------------------------------------------------------------------


def finite_and_learning(model: Model, method: Any, batch: Any) -> dict[str, dict[str, float]]:
    logs = {}
    for turn in method.turns(0):
        for module in (*method.modules().values(), *method.beside().values()):
            module.zero_grad()
        found = method.losses(batch, at(turn))
        found.loss_B.mean().backward()
        assert torch.isfinite(found.loss_B).all()
        part = method.modules()["backbone"] if turn == "student" else method.beside()["critic"]
        grads = [p.grad for p in part.parameters() if p.grad is not None]
        assert grads
        assert all(torch.isfinite(grad).all() for grad in grads)
        assert any(grad.any() for grad in grads)
        logs[turn] = {name: float(value) for name, value in found.logs.items()}
    return logs


@pytest.mark.parametrize("source", ["rollout", "data"])
@pytest.mark.parametrize("plan", ["scenes", "chunks"])
def test_scenes_are_matched(plan: str, source: str) -> None:
    """Two shots with a caption each; the teacher reads both."""
    student = student_of("joint", {"type": plan}, distil={"source": source})
    teacher, ear = listening(toy_model("joint", {"type": "scenes"}), cached=False)
    method = taught(student, teacher, scale=3.0)
    batch = clips(student, shots=(4, 4))
    finite_and_learning(student, method, batch)
    told = replace(batch, captions=[[one[0], "something else"] for one in batch.captions])
    first = ear.heard[0]
    ear.heard.clear()
    method.losses(told, at("student"))
    words, other = first.streams["text"], ear.heard[0].streams["text"]
    half = words.shape[1] // 2
    assert torch.equal(words[:, :half], other[:, :half])
    assert not torch.equal(words[:, half:], other[:, half:])


SOUND = {
    "audio": {"enabled": True, "channels": 5, "latents_per_second": 8.0, "sample_rate": 8000},
    "model": {"audio_dim": 8},
}


def test_picture_and_sound_are_matched_together() -> None:
    """Each is pulled by its own estimates; the plan says how much the sound's counts."""
    plan = {"type": "chunks", "frames": 1, "window": 2, "sinks": 1, "modalities": ["video", "audio"]}
    both = {"type": "text_to_video", "modalities": ["video", "audio"]}
    teacher, student = toy_model("joint", both, **SOUND), student_of("joint", plan, **SOUND)
    batch = clips(student)
    assert batch.latents["audio"].x_BFHWC.shape == (2, 8, 1, 1, 5)
    logs = finite_and_learning(student, taught(student, teacher, scale=3.0), batch)
    assert logs["student"].keys() == {"from_teacher_video", "from_teacher_audio"}
    assert all(value > 0 for value in logs["student"].values())
    totals = []
    for weight in (0.0, 1.0, 3.0):
        weighed = student.recipe.plan.model_copy(update={"audio_loss": weight})
        other = replace(student, recipe=student.recipe.model_copy(update={"plan": weighed}))
        method = taught(other, teacher, scale=3.0)
        found = [method.losses(batch, at(turn)).loss_B.detach() for turn in ("student", "critic")]
        totals.append(torch.stack(found))
    silent, once, thrice = totals
    assert (once > silent).all()
    torch.testing.assert_close(thrice - silent, 3 * (once - silent), rtol=1e-3, atol=1e-4)


def test_sound_alone_is_matched() -> None:
    own = {"type": "chunks", "frames": 2, "modalities": ["audio"]}
    student = student_of("joint", own, **SOUND)
    teacher = toy_model("joint", {"type": "text_to_video", "modalities": ["audio"]}, **SOUND)
    finite_and_learning(student, taught(student, teacher, scale=3.0), clips(student))


@pytest.mark.parametrize("loss", ["dmd", "sid", "gan"])
def test_wan_is_matched_and_rolls_from_its_cache(loss: str) -> None:
    plan = {"type": "chunks", "frames": 1, "window": 2, "sinks": 1}
    student = tiny_wan(plan, method="matching")
    distil = student.recipe.distil.model_copy(update={"loss": loss, "last_exit": True})
    student = replace(student, recipe=student.recipe.model_copy(update={"distil": distil}))
    student, ear = listening(student)
    judge = toy_judge(32, 2) if loss == "gan" else None
    method = taught(student, tiny_wan({"type": "text_to_video"}), scale=2.0, judge=judge)
    finite_and_learning(student, method, clips(student))
    # A frame at a time, of 2 x 3 tokens.
    assert {one.sigma_BN.shape[1] for one in ear.heard} == {6}


@pytest.mark.parametrize("backbone", ["joint", "factorized"])
@pytest.mark.parametrize("plan", ["text_to_video", "first_frame", "chunks", "teacher"])
def test_students_of_every_plan_learn(backbone: str, plan: str) -> None:
    student = student_of(backbone, plan)
    finite_and_learning(student, taught(student, scale=3.0), clips(student))


@pytest.mark.parametrize("plan", ["chunks", "teacher"])
def test_teachers_may_be_causal(plan: str) -> None:
    """A teacher that sees the past alone judges all chunks at one level."""
    teacher, ear = listening(toy_model("joint", plan), cached=True)
    student = student_of("joint", "chunks")
    method = taught(student, teacher, scale=2.0)
    finite_and_learning(student, method, clips(student))
    for one in ear.heard:
        own = one.sigma_BN[:, -96:]
        assert torch.equal(own, own[:, :1].expand_as(own))


def test_given_frames_are_given_to_teacher_and_critic_and_count_for_nothing() -> None:
    first = {"type": "first_frame", "probability": 1.0}
    student = student_of("joint", {"type": "chunks", "frames": 1, "conditions": [first]})
    plan = {"type": "text_to_video", "conditions": [first]}
    teacher, ear = listening(toy_model("joint", plan), cached=False)
    method = taught(student, teacher)
    batch = clips(student)
    method.losses(batch, at("student"))
    (call,) = ear.heard
    clean_BFSC = patchify(batch.latents["video"].x_BFHWC, (1, 1, 1))
    assert torch.equal(call.streams["video"][:, :24], clean_BFSC[:, 0])
    assert not call.sigma_BN[:, :24].any()
    assert (call.sigma_BN[:, 24:] > 0).all()


def test_a_critic_s_clean_error_is_its_velocity_s_by_sigma_squared() -> None:
    found = {}
    for kind in ("flow", "clean"):
        student = student_of(distil={"source": "data", "critic_loss": kind})
        found[kind] = taught(student).losses(clips(student, 4), at("critic"))
    sigma_B = found["flow"].sigma_B
    assert sigma_B.unique().numel() > 1
    torch.testing.assert_close(found["clean"].loss_B, sigma_B**2 * found["flow"].loss_B)
