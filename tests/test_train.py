"""The loop and its parts: schedule, optimiser, averages, guard, held-out loss, metrics, stopping."""

from __future__ import annotations

import json
import math
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from motionloom.config.recipe import EmaConfig
from motionloom.data.batch import Batch
from motionloom.errors import UserError
from motionloom.parallel import Ranks
from motionloom.rng import numpy_rng
from motionloom.train import Losses, Progress, StepContext, checkpoint
from motionloom.train.ema import Ema
from motionloom.train.groups import parameter_groups
from motionloom.train.guard import Guard, NotFinite
from motionloom.train.heldout import heldout_loss
from motionloom.train.metrics import Running
from motionloom.train.optim import adamw
from motionloom.train.schedule import lr_ratio
from toy_training import (
    CHANNELS,
    Listener,
    Regression,
    ToyBackbone,
    ToyLoader,
    metrics,
    toy_batch,
    toy_denoise,
    toy_recipe,
    toy_trainer,
)


@pytest.mark.parametrize(
    ("kind", "warmup", "wanted"),
    [
        ("constant", 0, {0: 1.0, 99: 1.0, 500: 1.0}),
        ("constant", 4, {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0}),
        ("linear", 10, {0: 0.1, 9: 1.0, 10: 1.0, 55: 0.6, 100: 0.2, 500: 0.2}),
        ("cosine", 0, {0: 1.0, 50: 0.6, 100: 0.2, 500: 0.2}),
    ],
)
def test_schedule(kind: Any, warmup: int, wanted: dict[int, float]) -> None:
    for step, ratio in wanted.items():
        assert lr_ratio(step, kind, warmup, 100, 0.2) == pytest.approx(ratio, abs=1e-12)


@dataclass
class Divided:
    """The same samples in more, smaller micro-batches."""

    size: int

    def batches(self, start: int) -> Iterator[Batch]:
        for n in range(start, 1000):
            whole = toy_batch(4, n * self.size // 4)
            part = slice(n * self.size % 4, n * self.size % 4 + self.size)
            yield replace(
                whole,
                ids=whole.ids[part],
                captions=whole.captions[part],
                latents={"video": whole.video.map(lambda t, part=part: t[part])},
            )


def test_four_micro_batches_of_one_equal_one_of_four(tmp_path: Path) -> None:
    found = []
    for size, accumulate in ((4, 1), (1, 4)):
        recipe = toy_recipe(
            batch_size=size, grad_accum_steps=accumulate, max_steps=8, schedule="linear", warmup_steps=2
        )
        method = Regression()
        run = tmp_path / str(size)
        toy_trainer(recipe, run, method=method, loader=Divided(size)).fit()
        lines = metrics(run)
        found.append([[line[k] for line in lines] for k in ("lr", "loss", "grad_norm")])
        found[-1].append(method.net.weight.flatten().tolist())
    assert found[0][0] == found[1][0], "the rate must follow optimiser steps"
    for one, other in zip(found[0][1:], found[1][1:], strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_weight_decay_on_matrices_alone() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.conv = nn.Linear(2, 3), nn.Conv2d(2, 3, 1)
            self.words, self.norm = nn.Embedding(5, 2), nn.LayerNorm(2)
            self.table = nn.Parameter(torch.zeros(4, 2))
            self.frozen = nn.Linear(2, 2).requires_grad_(False)
            self.tied = self.linear

    module = Odd()
    names = {id(p): name for name, p in module.named_parameters()}
    groups = {
        group["weight_decay"]: {names[id(p)] for p in group["params"]}
        for group in parameter_groups([module, module.linear], 0.3)
    }
    assert groups[0.3] == {"linear.weight", "conv.weight"}
    assert groups[0.0] == {
        "linear.bias",
        "conv.bias",
        "words.weight",
        "norm.weight",
        "norm.bias",
        "table",
    }
    with pytest.raises(UserError, match="nothing to train: every parameter of a is frozen"):
        adamw({"a": module.frozen}, 1e-3, (0.9, 0.99), 0.0)


def test_ema_follows_by_hand() -> None:
    module = nn.Linear(1, 1, bias=False)
    ema = Ema({"m": module}, EmaConfig(decay=0.5, update_every=2, start_step=3))

    def at(step: int, weight: float) -> float:
        with torch.no_grad():
            module.weight.fill_(weight)
        ema.update(step)
        return float(ema.shadows["m.weight"])

    assert at(1, 5.0) == 5.0
    assert at(3, 8.0) == 8.0, "until it starts it is the weights"
    assert at(4, 100.0) == 8.0, "it moves every second step"
    first = min(0.5, 2 / 11)
    assert at(5, 10.0) == pytest.approx(first * 8 + (1 - first) * 10)
    shadow, second = float(ema.shadows["m.weight"]), min(0.5, 3 / 12)
    assert at(7, -4.0) == pytest.approx(second * shadow + (1 - second) * -4)
    assert ema.decay(1000) == 0.5


def test_ema_lends_itself_and_gives_the_weights_back_to_the_bit() -> None:
    backbone = ToyBackbone()
    ema = Ema({"b": backbone}, EmaConfig())
    with torch.no_grad():
        for p in backbone.parameters():
            p.mul_(math.pi)
    before = {name: t.clone() for name, t in backbone.state_dict().items()}
    with ema.applied():
        assert torch.equal(backbone.out.weight, ema.shadows["b.out.weight"])
    assert all(torch.equal(t, before[name]) for name, t in backbone.state_dict().items())
    assert not torch.equal(backbone.out.weight, ema.shadows["b.out.weight"])


class Poisoned(Regression):
    """Its loss, or only its gradient, is not finite from some step on."""

    def __init__(self, step: int, kind: str) -> None:
        super().__init__()
        self.step, self.kind = step, kind

    def losses(self, batch: Batch, context: StepContext) -> Losses:
        loss_B = super().losses(batch, context).loss_B
        if context.step < self.step:
            return Losses(loss_B)
        if self.kind == "loss":
            return Losses(loss_B * torch.tensor([1.0, 1.0, float("nan"), 1.0]))
        # The root has an infinite slope at 0, so the loss is finite and its gradient is not.
        return Losses(loss_B + (self.net.weight.sum() * 0).abs().sqrt())


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_what_is_not_finite_never_reaches_the_weights(tmp_path: Path, kind: str) -> None:
    good, bad = Regression(), Poisoned(5, kind)
    toy_trainer(toy_recipe(max_steps=5), tmp_path / "good", method=good).fit()
    recipe = toy_recipe(max_steps=20, save_every_steps=2)
    with pytest.raises(NotFinite, match=f"the {kind} of step 6 is not finite.*step_00000004.*lower train.lr"):
        toy_trainer(recipe, tmp_path / "bad", method=bad).fit()
    assert torch.equal(good.net.weight, bad.net.weight)
    assert checkpoint.load(tmp_path / "bad").step == 4
    for tensor in checkpoint.load(tmp_path / "bad").tensors("model").values():
        assert tensor.isfinite().all()


def test_a_warm_up_changes_nothing_and_says_what_it_cost(tmp_path: Path) -> None:
    """With and without compiled blocks: the same weights and figures; one graph per shape, before step 1."""
    runs, listener = {}, Listener()
    for compiled in (False, True):
        method = Regression()
        if compiled:
            method.net.compile(backend="eager")
        recipe = toy_recipe(compile=compiled, max_steps=4)
        toy_trainer(recipe, tmp_path / str(compiled), method=method, reporter=listener).fit()
        lines = [(line["loss"], line["grad_norm"]) for line in metrics(tmp_path / str(compiled))]
        runs[compiled] = (method.net.weight.tolist(), lines)
    assert runs[True] == runs[False]
    before, after = listener.notes
    assert before == "compiling for 1 shape before the first step"
    assert re.fullmatch(r"compiled \d+ graphs in [\d.]+ s \(toy [\d.]+ s\)", after)


def test_late_guard_holds_back_the_steps_that_it_has_not_yet_read() -> None:
    """As on an accelerator: the host reads a step late, and the optimiser obeys the device meanwhile."""
    net = nn.Linear(3, 1)
    optimizer = adamw({"net": net}, 0.1, (0.9, 0.99), 0.1)
    guard = Guard(Ranks(), late=True)

    def step(number: int, loss: float) -> Tensor:
        net(torch.ones(1, 3)).sum().backward()
        guard.step(optimizer, number, torch.tensor(loss), torch.tensor(1.0))
        optimizer.zero_grad()
        return net.weight.detach().clone()

    start = net.weight.detach().clone()
    good = step(0, 1.0)
    assert not torch.equal(good, start)
    assert guard.stopping() == 0
    assert torch.equal(step(1, float("inf")), good)
    assert guard.stopping() == 0, "not read yet"
    assert torch.equal(step(2, 1.0), good), "a finite step after it must not pass either"
    with pytest.raises(NotFinite, match="the loss of step 2"):
        guard.stopping()


def losses_of(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run)]


def test_previews_and_measurements_do_not_move_training(tmp_path: Path) -> None:
    """Losses and weights are bit-equal with and without, though the preview draws and uses both weights."""
    seen: list[tuple[int, float, float]] = []

    def preview(step: int, raw: Any, ema: Any) -> None:
        found = []
        for weights in (raw, ema):
            with weights(), torch.no_grad():
                assert not backbone.training
                torch.rand(step)
                found.append(float(backbone.out.weight.sum()))
        seen.append((step, found[0], found[1]))

    quiet = toy_trainer(toy_recipe(max_steps=12), tmp_path / "quiet")
    quiet.fit()
    recipe = toy_recipe(max_steps=12, sample_every_steps=3, heldout_every_steps=2, save_every_steps=4)
    method = toy_denoise(recipe, Ranks())
    backbone = method.modules()["backbone"]
    assert isinstance(backbone, ToyBackbone)
    busy = toy_trainer(
        recipe, tmp_path / "busy", method=method, heldout=ToyLoader(2, 0, "heldout"), on_sample=preview
    )
    busy.fit()
    assert losses_of(tmp_path / "quiet") == losses_of(tmp_path / "busy")
    for name in ("model", "ema", "optimizer"):
        a, b = (checkpoint.load(tmp_path / run).tensors(name) for run in ("quiet", "busy"))
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert [step for step, _, _ in seen] == [3, 6, 9, 12]
    assert all(raw != ema for _, raw, ema in seen)
    measured = [line["step"] for line in metrics(tmp_path / "busy") if "heldout_loss" in line]
    assert measured == [1, 2, 4, 6, 8, 10, 12]


def test_heldout_loss_depends_on_the_weights_alone() -> None:
    recipe = toy_recipe(cfg_dropout_prob=1.0)
    method = toy_denoise(recipe, Ranks())
    backbone = method.modules()["backbone"].eval()
    heldout, off = ToyLoader(4, 0, "heldout"), torch.autocast("cpu", enabled=False)

    def measure() -> float:
        return heldout_loss(method, heldout, Ranks(), recipe.seed, off)

    first = measure()
    torch.rand(7)
    assert measure() == first
    undropped = toy_denoise(toy_recipe(cfg_dropout_prob=0.0), Ranks())
    undropped.modules()["backbone"].eval()
    assert heldout_loss(undropped, heldout, Ranks(), recipe.seed, off) == first, "captions are kept"
    with torch.no_grad():
        next(backbone.parameters()).add_(1)
    assert measure() != first


def test_sigterm_saves_and_stops_and_the_resume_is_exact(tmp_path: Path) -> None:
    recipe = toy_recipe(max_steps=9, log_every_steps=4)

    class Interrupter(Listener):
        def step(self, progress: Progress) -> None:
            if progress.step == 5:
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    toy_trainer(recipe, tmp_path / "whole").fit()
    first = toy_trainer(recipe, tmp_path / "stopped", reporter=Interrupter()).fit()
    assert (first.reason, first.step) == ("signal", 6), "the step that was under way is finished"
    assert first.checkpoint.name == "step_00000006"
    assert signal.getsignal(signal.SIGTERM) is before
    second = toy_trainer(recipe, tmp_path / "stopped").fit(resume=True)
    assert (second.reason, second.step) == ("done", 9)
    for name in ("model", "ema", "optimizer"):
        a, b = (checkpoint.load(tmp_path / run).tensors(name) for run in ("whole", "stopped"))
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_time_limit_stops_with_a_checkpoint_and_a_resume_goes_on(tmp_path: Path) -> None:
    slow = Listener(pause=0.02)
    recipe = toy_recipe(max_steps=1000, max_minutes=0.1 / 60)
    outcome = toy_trainer(recipe, tmp_path, reporter=slow).fit()
    assert outcome.reason == "time"
    assert 1 < outcome.step < 100
    assert outcome.checkpoint.name == checkpoint.name_of(outcome.step)
    assert 0 <= slow.steps[1].seconds_left <= 0.1
    again = toy_trainer(recipe, tmp_path, reporter=slow).fit(resume=True)
    assert again.step > outcome.step
    assert checkpoint.load(tmp_path).state["train"]["seconds"] > outcome.seconds


def test_resume_of_a_finished_run_says_so(tmp_path: Path) -> None:
    recipe, listener = toy_recipe(max_steps=2), Listener()
    toy_trainer(recipe, tmp_path).fit()
    lines = metrics(tmp_path)
    outcome = toy_trainer(recipe, tmp_path, reporter=listener).fit(resume=True)
    assert (outcome.step, outcome.reason) == (2, "done")
    assert "all 2 steps are done: raise train.max_steps to go on" in listener.notes
    assert metrics(tmp_path) == lines


def test_rates_after_a_resume_count_this_session_alone(tmp_path: Path) -> None:
    toy_trainer(toy_recipe(max_steps=30), tmp_path).fit()
    toy_trainer(toy_recipe(max_steps=32, log_every_steps=2), tmp_path).fit(resume=True)
    line = metrics(tmp_path)[-1]
    assert line["tokens_per_second"] == pytest.approx(8 * line["samples_per_second"])


def test_metrics_after_a_resume_hold_no_step_twice(tmp_path: Path) -> None:
    recipe = toy_recipe(max_steps=4, save_every_steps=4)
    toy_trainer(recipe, tmp_path).fit()
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write(json.dumps({"step": 5, "loss": 9.0}) + "\n" + '{"step": 6, "lo')
    toy_trainer(toy_recipe(max_steps=6), tmp_path).fit(resume=True)
    found = metrics(tmp_path)
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
    assert found[4]["loss"] != 9.0


def test_metrics_hold_what_was_promised(tmp_path: Path) -> None:
    toy_trainer(toy_recipe(max_steps=10, log_every_steps=5), tmp_path).fit()
    found = metrics(tmp_path)
    assert [line["step"] for line in found] == [1, 5, 10]
    wanted = {"loss", "grad_norm", "lr", "samples_per_second", "tokens_per_second", "peak_memory_gib"}
    assert all(wanted <= line.keys() for line in found)
    tokens_per_sample = 2 * 2 * 2
    for line in found:
        assert line["tokens_per_second"] == pytest.approx(tokens_per_sample * line["samples_per_second"])
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_losses_are_filed_by_noise_level_and_averaged_over_micro_batches() -> None:
    running = Running(torch.device("cpu"))
    running.add("loss", torch.tensor(1.0))
    running.add("loss", torch.tensor(3.0))
    running.add_by_sigma(torch.tensor([1.0, 3.0, 7.0, 100.0]), torch.tensor([0.0, 0.05, 1.0, -1.0]))
    assert running.take(Ranks()) == {"loss": 2.0, "loss_by_sigma/0.0": 2.0, "loss_by_sigma/0.9": 7.0}
    assert running.take(Ranks()) == {}


class TwoTurns:
    """A generator and a critic in turn, as distillation has them."""

    def __init__(self) -> None:
        self.parts = {"generator": nn.Linear(CHANNELS, 1), "critic": nn.Linear(1, 1)}
        self._optimizers: dict[str, torch.optim.Optimizer] = {
            name: adamw({name: module}, 0.1, (0.9, 0.99), 0.0) for name, module in self.parts.items()
        }

    def modules(self) -> dict[str, nn.Module]:
        return dict(self.parts)

    def beside(self) -> dict[str, nn.Module]:
        return {}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return self._optimizers

    def turns(self, step: int) -> tuple[str, ...]:
        return ("critic", "generator") if step % 2 else ("critic",)

    def losses(self, batch: Batch, context: StepContext) -> Losses:
        score_B = self.parts["critic"](self.parts["generator"](batch.video.x_BFHWC)).mean(dim=(1, 2, 3, 4))
        return Losses(score_B if context.turn == "critic" else -score_B)


def test_turns_step_their_own_optimiser_only(tmp_path: Path) -> None:
    method = TwoTurns()
    before = {name: module.weight.detach().clone() for name, module in method.parts.items()}
    toy_trainer(toy_recipe(max_steps=1), tmp_path / "a", method=method).fit()
    assert torch.equal(method.parts["generator"].weight, before["generator"])
    assert not torch.equal(method.parts["critic"].weight, before["critic"])
    toy_trainer(toy_recipe(max_steps=2), tmp_path / "a", method=method).fit(resume=True)
    assert not torch.equal(method.parts["generator"].weight, before["generator"])
    assert {"loss/critic", "loss/generator", "grad_norm/critic"} <= metrics(tmp_path / "a")[-1].keys()


def test_golden_losses_are_finite_falling_and_the_same(tmp_path: Path) -> None:
    recipe = toy_recipe(max_steps=120, cfg_dropout_prob=0.0, lr=1e-2)
    toy_trainer(recipe, tmp_path, heldout=ToyLoader(8, 0, "heldout")).fit()
    losses = losses_of(tmp_path)
    assert all(math.isfinite(loss) for loss in losses)
    thirds = [sum(losses[i : i + 40]) / 40 for i in (0, 40, 80)]
    assert thirds[0] > 1.2 * thirds[1] > 1.2 * thirds[2]
    golden = json.loads(Path(__file__).with_name("golden_losses.json").read_text())
    assert losses[:: len(losses) // 12] == pytest.approx(golden, rel=2e-3)


def test_bf16_trains_with_float32_weights(tmp_path: Path) -> None:
    method = toy_denoise(toy_recipe(), Ranks())
    toy_trainer(toy_recipe(max_steps=5, precision="bf16"), tmp_path, method=method).fit()
    fp32 = toy_trainer(toy_recipe(max_steps=5), tmp_path / "fp32")
    fp32.fit()
    assert {p.dtype for m in method.modules().values() for p in m.parameters()} == {torch.float32}
    bf16, full = losses_of(tmp_path), losses_of(tmp_path / "fp32")
    assert bf16 != full
    assert bf16 == pytest.approx(full, rel=0.05)


def test_a_keyed_context_draws_the_same_and_only_the_same() -> None:
    def draw(**change: Any) -> float:
        context = StepContext(1, 2, 3, 4, torch.device("cpu"), "turn")
        return float(torch.rand((), generator=replace(context, **change).generator("x")))

    assert draw() == draw()
    changes = [{"seed": 9}, {"step": 9}, {"micro": 9}, {"rank": 9}, {"turn": "other"}, {"phase": "heldout"}]
    assert len({draw(), *(draw(**change) for change in changes)}) == 7
    assert float(numpy_rng("a").random()) != float(numpy_rng("b").random())
