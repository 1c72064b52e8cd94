"""Matching distributions: what a few-step student makes is pulled towards what its teacher would make.

A critic learns the score of what the student makes now, and the difference to the teacher's score, at a
random noise level of the whole clip, is the pull (DMD, 2311.18828; CausVid, 2412.07772). The student may be
causal while teacher and critic see the whole clip: errors that pile up along a roll-out are then judged.

``distil.source``:
  rollout  the student's clips are its own: chunk after chunk from noise and its own past, one random step of
           each chunk with a gradient, which ends at the cache (Self-Forcing, 2506.08009, alg. 1). A plan that
           makes all at once has one such walk (backward simulation, DMD2, 2405.14867, sec. 4.5).
  data     one step from clips of the cache, made noisy, each chunk to a level of its own (CausVid).

``distil.longest``: roll-outs of a random length up to it; of a longer one the last clip's length is scored,
at the places of a clip that lacks its first frame, and has gradients (Self-Forcing++, 2510.02283).
``distil.switch``: what lies before that end may have been made under other words (LongLive, 2509.22622).

Shapes: B batch, F token frames, S cells of a frame, C channels.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from motionloom.config.recipe import Recipe
from motionloom.data.batch import Batch
from motionloom.errors import UserError
from motionloom.flow import WEIGHTINGS, TimeSampling
from motionloom.generate import Model, Task, recipe_sampling, rollout
from motionloom.generate.task import Tokens
from motionloom.generate.windows import head_alone, last_window, longer_sample
from motionloom.methods.distil import losses
from motionloom.methods.distil.judge import Judge, tapped
from motionloom.methods.distil.lesson import (
    Asked,
    Guess,
    Pupil,
    Teacher,
    guess,
    noised,
    shared_draw,
    table_draws,
)
from motionloom.methods.distil.ode import level_table, student_modules
from motionloom.plans import NOTHING, Sample, Text
from motionloom.train.lora import without_adapters
from motionloom.train.method import Losses, StepContext
from motionloom.train.optim import make_optimizer


@dataclass(frozen=True)
class Made:
    """What the student made, as teacher and critic see it."""

    asked: Asked
    sample: Sample
    x: Tokens


class Matching:
    """Two optimisers: the student's turn comes once in ``distil.critic_ratio`` steps, the critic's always.

    Args:
        critic: starts as the teacher; with ``distil.critic: lora`` the teacher's own module with adapters.
        judge: of ``distil.loss: gan``.
        critic_model: what the critic is the backbone of; none: the teacher's model.
    """

    def __init__(
        self,
        recipe: Recipe,
        student: Model,
        teacher: Teacher,
        critic: nn.Module,
        judge: Judge | None = None,
        critic_model: Model | None = None,
    ) -> None:
        d, t = recipe.distil, recipe.train
        self._config, self._teacher, self._pupil = d, teacher, Pupil(student)
        self._judge = judge
        both = len(recipe.plan.modalities) > 1
        self._weights = {"video": 1.0, "audio": recipe.plan.audio_loss if both else 1.0}
        self._modules = student_modules(student)
        self._beside: dict[str, nn.Module] = {"critic": critic}
        if judge is not None:
            self._beside["judge"] = judge
        model = critic_model or teacher.model
        predictor = replace(model.predictor, backbone=critic)  # type: ignore[arg-type]
        # Unguided: it knows the student's clips alone.
        self._critic = Teacher(replace(model, predictor=predictor))
        self._trunk = predictor.backbone
        self._sampling = recipe_sampling(recipe)
        low, high = d.score_range
        self._scores = TimeSampling("uniform", shift=d.score_shift, min=low, max=high, limits="clamp")
        self._schedule = teacher.model.predictor.schedule
        betas = d.betas or t.betas
        self._optimizers: dict[str, torch.optim.Optimizer] = {
            "student": make_optimizer(self._modules, t, betas=betas),
            "critic": make_optimizer(self._beside, t, d.critic_lr, betas),
        }

    def modules(self) -> dict[str, nn.Module]:
        """The student's."""
        return self._modules

    def beside(self) -> dict[str, nn.Module]:
        """The critic, and the judge if there is one."""
        return self._beside

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """``student`` and ``critic``; the judge learns with the critic."""
        return self._optimizers

    def turns(self, step: int) -> tuple[str, ...]:
        """The critic must keep up with the student, and so learns more often."""
        return ("student", "critic") if step % self._config.critic_ratio == 0 else ("critic",)

    def losses(self, batch: Batch, context: StepContext) -> Losses:
        """As :class:`~motionloom.train.method.Method`.

        Held out, the figure is the student's.
        """
        asked = self._pupil.ask(batch, context)
        if context.turn == "student":
            return self._student_losses(self._make(asked, context), context)
        with torch.no_grad():
            made = self._make(asked, context)
        return self._critic_losses(made, context)

    # --- what the student makes ---

    def _make(self, asked: Asked, context: StepContext) -> Made:
        if self._config.source == "data":
            return self._from_data(asked, context)
        return self._rolled_out(asked, context)

    def _from_data(self, asked: Asked, context: StepContext) -> Made:
        """One step from noised clips of the cache."""
        student = self._pupil.model
        layout = student.plan.layout(asked.sample, asked.text, asked.given)
        noise = self._pupil.noise(asked.clean, context, "noise")
        draws = max(track.num_draws for track in layout.tracks.values())
        table = level_table(self._config.levels, layout)
        _, sigma_BD = table_draws(table, (len(asked.batch.ids), draws), context)
        x, levels = noised(student.predictor, layout, asked.clean, sigma_BD, noise)
        found = guess(student.predictor, layout, asked.values(asked.clean), x, levels, noise, asked.text)
        return Made(asked, asked.sample, {m: one.clean_BFSC.float() for m, one in found.items()})

    def _rolled_out(self, asked: Asked, context: StepContext) -> Made:
        """The student's own clip, a gradient through one step of each chunk."""
        student = self._pupil.model
        switched = self._switched(context)
        longer = self._lengthened(asked, context, at_least=int(switched))
        sample, main = longer.sample, _main(longer.sample)
        noise = self._pupil.noise(longer.clean, context, "roll-out")
        stages = student.plan.stages(sample)
        seen = last_window(sample, asked.sample.main.grid[0], head_alone(student))
        judged_from = next(n for n, stage in enumerate(stages) if stage[main].stop > seen.first)
        task = Task(sample, longer.text, noise, given=longer.given, values=longer.values(longer.clean))
        if switched:
            task = replace(task, text=_of_another(longer), later={judged_from: longer.text})
        made = rollout(
            student.predictor,
            student.plan,
            task,
            self._sampling,
            generator=context.device_generator("fresh noise"),
            exits=self._exits(len(stages), context),
            graph_from=judged_from,
        )
        # What is given stands at the beginning, so of a later window nothing is.
        judged = asked if seen.first == 0 else replace(asked, given=NOTHING, references={})
        return Made(judged, seen.sample, {m: x[:, seen.frames[m]].float() for m, x in made.items()})

    def _exits(self, stages: int, context: StepContext) -> list[int]:
        """Which step of each stage is the one with a gradient; the same on all ranks."""
        d, last = self._config, len(self._config.levels) - 1
        if d.last_exit:
            return [last] * stages
        if d.same_exit:
            return [shared_draw(context, "exit", 0, last + 1)] * stages
        return [shared_draw(context, f"exit {n}", 0, last + 1) for n in range(stages)]

    def _switched(self, context: StepContext) -> bool:
        """Whether this roll-out changes its words; the same on all ranks."""
        generator = replace(context, rank=0).generator("switch")
        return bool(torch.rand((), generator=generator) < self._config.switch)

    def _lengthened(self, asked: Asked, context: StepContext, at_least: int) -> Asked:
        """The same, of a clip that goes on for a random number of chunks."""
        frames, student, longest = asked.sample.main.grid[0], self._pupil.model, self._config.longest
        if longest is None:
            return asked
        main = _main(asked.sample)
        step = max(stage[main].stop - stage[main].start for stage in student.plan.stages(asked.sample))
        chunks = (longest - frames) // step
        if chunks < 1:
            raise UserError(
                f"distil.longest {longest} holds no chunk of {step} besides the {frames} latent frames of a "
                f"clip: set {frames + step} or more, or leave it out"
            )
        more = step * shared_draw(context, "length", at_least, chunks + 1)
        if more == 0:
            return asked
        sample = longer_sample(student, asked.sample, frames + more)
        return replace(
            asked,
            sample=sample,
            clean={m: _longer(x, sample.tracks[m].grid[0]) for m, x in asked.clean.items()},
            given=replace(
                asked.given,
                marks={
                    m: replace(marks, kind_BN=_longer(marks.kind_BN, sample.tracks[m].tokens))
                    for m, marks in asked.given.marks.items()
                },
            ),
        )

    # --- what teacher and critic say ---

    def _noised(self, made: Made, context: StepContext, purpose: str) -> tuple[Tensor, Tokens]:
        """(B, 1) one level for the whole clip, and noise."""
        size = (len(made.asked.batch.ids), 1)
        sigma_B1 = self._scores.sample(size, context.generator(f"{purpose} level"))
        if self._schedule is not None:
            # A teacher trained by DDPM judges at the levels that it saw.
            sigma_B1 = self._schedule.sigma(self._schedule.timestep(sigma_B1).round())
        return sigma_B1, self._pupil.noise(made.x, context, purpose)

    def _fake(self, made: Made, sigma_B1: Tensor, noise: Tokens) -> dict[str, Guess]:
        return self._critic.guess(made.asked, made.sample, made.x, sigma_B1, noise, graph=True)

    def _real(self, made: Made, sigma_B1: Tensor, noise: Tokens, graph: bool = False) -> dict[str, Guess]:
        # With a LoRA critic the teacher is the same network without its adapters.
        with without_adapters(self._beside["critic"]):
            return self._teacher.guess(made.asked, made.sample, made.x, sigma_B1, noise, graph=graph)

    # --- turns ---

    def _student_losses(self, made: Made, context: StepContext) -> Losses:
        d = self._config
        sigma_B1, noise = self._noised(made, context, "score")
        logs: dict[str, Tensor] = {}
        total_B = torch.zeros(len(made.asked.batch.ids), device=sigma_B1.device)
        if d.loss == "gan":
            total_B = d.gan_weight * self._told_apart(made, sigma_B1, noise, context)
            logs["gan_student"] = total_B.mean().detach()
        if d.loss != "gan" or d.gan_dmd > 0:
            with nullcontext() if d.loss == "sid" else torch.no_grad():
                fake = self._fake(made, sigma_B1, noise)
                real = self._real(made, sigma_B1, noise, graph=d.loss == "sid")
            pull_B = self._pull(made, real, fake, logs)
            total_B = total_B.to(pull_B.device) + (d.gan_dmd if d.loss == "gan" else 1.0) * pull_B
        return Losses(total_B, num_tokens=sum(x.shape[:3].numel() for x in made.x.values()), logs=logs)

    def _pull(
        self, made: Made, real: dict[str, Guess], fake: dict[str, Guess], logs: dict[str, Tensor]
    ) -> Tensor:
        d, total = self._config, None
        for m, x in made.x.items():
            three = x, real[m].clean_BFSC, fake[m].clean_BFSC
            if d.loss == "sid":
                one_B = losses.sid(*three, real[m].weight_BFS, alpha=d.sid_alpha, normalise=d.normalise)
            else:
                one_B = losses.dmd(*three, real[m].weight_BFS, normalise=d.normalise)
            suffix = "" if len(made.x) == 1 else f"_{m}"
            apart = losses.mean((x - real[m].clean_BFSC).abs(), real[m].weight_BFS)
            logs[f"from_teacher{suffix}"] = apart.mean().detach()
            total = self._weights[m] * one_B if total is None else total + self._weights[m] * one_B
        assert total is not None
        return total

    def _critic_losses(self, made: Made, context: StepContext) -> Losses:
        """Flow matching on what the student makes now; and telling it from real clips."""
        sigma_B1, noise = self._noised(made, context, "critic")
        path = self._critic.model.predictor.path
        blocks = self._judge.blocks if self._judge is not None else ()
        with tapped(self._trunk, blocks) as features:
            fake = self._fake(made, sigma_B1, noise)
        loss_B, logs = None, {}
        for m, one in fake.items():
            target = path.velocity(made.x[m], noise[m], one.sigma_BFS)
            error_BFSC = (one.velocity_BFSC.float() - target.float()).square()
            if self._config.critic_loss == "clean":
                # Of one state a velocity error d is a clean error of s / W times d.
                error_BFSC = error_BFSC * WEIGHTINGS["sigma_squared"](one.sigma_BFS, path=path)[..., None]
            error_B = losses.mean(error_BFSC, one.weight_BFS)
            loss_B = self._weights[m] * error_B if loss_B is None else loss_B + self._weights[m] * error_B
        assert loss_B is not None
        if self._judge is not None:
            told_B = self._judge_losses(made, sigma_B1, noise, self._judge(dict(features)), context)
            logs["gan_judge"] = told_B.mean().detach()
            loss_B = loss_B + told_B
        tokens = sum(x.shape[:3].numel() for x in made.x.values())
        return Losses(loss_B, sigma_B=sigma_B1[:, 0].to(loss_B.device), num_tokens=tokens, logs=logs)

    # --- the judge ---

    def _word(self, made: Made, sigma_B1: Tensor, noise: Tokens) -> Tensor:
        """(B,) how real clips look at a noise level."""
        assert self._judge is not None
        with tapped(self._trunk, self._judge.blocks) as features:
            self._fake(made, sigma_B1, noise)
        return self._judge(dict(features))

    def _of_data(self, made: Made) -> Made:
        """The batch's own clips in the place of the student's."""
        own = made.asked.clean
        frames = {m: made.x[m].shape[1] for m in made.x}
        return replace(made, x={m: own[m][:, own[m].shape[1] - frames[m] :] for m in made.x})

    def _told_apart(self, made: Made, sigma_B1: Tensor, noise: Tokens, context: StepContext) -> Tensor:
        fake_B = self._word(made, sigma_B1, noise)
        with torch.no_grad():
            real_noise = self._pupil.noise(made.x, context, "real")
            real_B = self._word(self._of_data(made), sigma_B1, real_noise)
        return losses.gan_student(fake_B, real_B, self._config.gan_form)

    def _judge_losses(
        self, made: Made, sigma_B1: Tensor, noise: Tokens, fake_B: Tensor, context: StepContext
    ) -> Tensor:
        d, data = self._config, self._of_data(made)
        real_noise = self._pupil.noise(made.x, context, "real")
        real_B = self._word(data, sigma_B1, real_noise)
        loss_B = losses.gan_judge(fake_B, real_B, d.gan_form)
        for weight, clips, own_noise, purpose in (
            (d.gan_r1, data, real_noise, "steep real"),
            (d.gan_r2, made, noise, "steep made"),
        ):
            if weight > 0:
                directions = self._pupil.noise(made.x, context, purpose)
                moved = replace(clips, x={m: x + d.gan_sigma * directions[m] for m, x in clips.x.items()})
                before_B = real_B if clips is data else fake_B
                after_B = self._word(moved, sigma_B1, own_noise)
                loss_B = loss_B + weight * losses.steepness(before_B, after_B, d.gan_sigma)
        return loss_B


def _main(sample: Sample) -> str:
    return "video" if "video" in sample.tracks else "audio"


def _of_another(asked: Asked) -> Text:
    """The words of the next sample whose captions are others; where there is none, a sample's own."""
    text, said = asked.text, asked.batch.captions
    count = len(said)
    after = [[(n + k) % count for k in range(1, count)] for n in range(count)]
    index = [next((k for k in others if said[k] != said[n]), n) for n, others in enumerate(after)]

    def of(t_BL: Tensor) -> Tensor:
        return t_BL if len(t_BL) == 1 else t_BL[torch.tensor(index, device=t_BL.device)]

    context_BL = None if text.context_BL is None else of(text.context_BL)
    return Text(of(text.x_BLC), of(text.valid_BL), of(text.scene_BL), context_BL)


def _longer(t_BN: Tensor, length: int) -> Tensor:
    """Zeros at the end of the second dimension."""
    more = t_BN.new_zeros(len(t_BN), length - t_BN.shape[1], *t_BN.shape[2:])
    return torch.cat([t_BN, more], dim=1)
