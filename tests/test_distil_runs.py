"""Distillation as runs: whom a student learns from, what a checkpoint holds, kills, resumes, accumulation.

Every run here is of a few steps on ten tiny clips; what is proved is that nothing is lost, mixed or guessed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cached import make_world
from motionloom.cli.assemble import Parts, assemble, load_model
from motionloom.config import Recipe
from motionloom.data.batch import Batch
from motionloom.data.cache import Cache, build_cache, open_cache
from motionloom.data.cache.pairs import make_pairs
from motionloom.data.cache.trajectories import Teacher as Walker
from motionloom.errors import UserError
from motionloom.generate import Model, Sampling, Task, rollout
from motionloom.methods.distil.lesson import Pupil
from motionloom.parallel import Ranks
from motionloom.rng import torch_generator
from motionloom.train import checkpoint
from motionloom.train.loop import Trainer
from motionloom.train.lora import without_adapters
from test_resume import figures, finish, same_tensors, start
from toy_lesson import at, clips, listening, student_of, taught
from toy_model import toy_model, toy_recipe

PLAN = {"type": "chunks", "frames": 1, "window": 2, "sinks": 1}


def recipe_of(method: str = "denoise", teacher: str = "", **sections: Any) -> Recipe:
    """A few steps; a student is causal, a teacher sees all at once."""
    train = {
        "method": method,
        "batch_size": 2,
        "max_steps": 2,
        "lr": 1e-3,
        "log_every_steps": 1,
        "save_every_steps": 2,
        "keep_checkpoints": 50,
        "heldout_fraction": 0.2,
        **sections.pop("train", {}),
    }
    plan = sections.pop("plan", {"type": "text_to_video"} if method == "denoise" else PLAN)
    distil = {"teacher": teacher, "num_steps": 2, "guidance": 3.0, **sections.pop("distil", {})}
    return toy_recipe(plan=plan, train=train, distil=distil, **sections)


def train(recipe: Recipe, cache: Cache, folder: Path, *, resume: bool = False) -> Path:
    assemble(recipe, cache, Ranks()).trainer(folder).fit(resume)
    return folder


@dataclass(frozen=True)
class School:
    """A cache, and a teacher that was trained on it."""

    folder: Path
    cache: Cache
    teacher: str

    def student(self, method: str = "matching", **sections: Any) -> Recipe:
        return recipe_of(method, self.teacher, **sections)


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory) -> School:
    folder = tmp_path_factory.mktemp("school")
    world = make_world(folder / "clips", 10, height=16, width=24)
    build_cache(toy_recipe(), world, folder / "cache", tokenizer=toy_model().tokenizer)
    cache = open_cache(folder / "cache")
    return School(folder, cache, str(train(recipe_of(), cache, folder / "teacher")))


def line_of(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def saved_at(run: Path, step: int) -> checkpoint.Checkpoint:
    return checkpoint.load(run / "checkpoints" / checkpoint.name_of(step))


def same(a: checkpoint.Checkpoint, b: checkpoint.Checkpoint, name: str) -> bool:
    one, two = a.tensors(name), b.tensors(name)
    assert one.keys() == two.keys()
    return all(torch.equal(one[key], two[key]) for key in one)


# --- whom a student learns from -----------------------------------------------------------------------------


def test_the_teacher_and_its_guidance_come_from_the_recipe(school: School) -> None:
    """A delta of 3.5 is a scale of 4.5 in the teacher that training holds; its weights are the run's."""
    told = {"guidance": 3.5, "guidance_form": "delta", "negative": "dull"}
    parts = assemble(school.student(distil=told), school.cache, Ranks())
    assert parts.lesson is not None
    teacher, critic = parts.lesson.teacher, parts.lesson.critic
    assert (teacher.scale, teacher.negative) == (4.5, "dull")
    own, saved = teacher.model.predictor.backbone, load_model(school.teacher, device="cpu")
    wanted = saved.predictor.backbone.state_dict()  # type: ignore[attr-defined]
    assert critic is not None
    for module in (own, critic):
        found = module.state_dict()  # type: ignore[attr-defined]
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not any(p.requires_grad for p in own.parameters())  # type: ignore[attr-defined]
    assert all(p.requires_grad for p in critic.parameters())
    assert critic is not own


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "patch": (
        {"model": {"patch": [1, 2, 2]}},
        r"takes tokens of model.patch \[1, 2, 2\] of video, the student",
    ),
    "path": (
        {"flow_matching": {"path": "cosine"}},
        r"flow_matching.path linear is not that of distil.teacher",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_teacher_that_means_something_else_is_refused(what: str, school: School) -> None:
    sections, said = REFUSED[what]
    run = train(recipe_of(**sections, train={"max_steps": 1}), school.cache, school.folder / f"other {what}")
    with pytest.raises(UserError, match=said) as error:
        assemble(recipe_of("matching", str(run)), school.cache, Ranks())
    line_of(error)


def test_a_judge_of_blocks_that_are_not_there_is_refused(school: School) -> None:
    recipe = school.student(distil={"loss": "gan", "gan_blocks": (99,)})
    with pytest.raises(UserError, match=r"distil\.gan_blocks \[99\]: the critic has blocks 0 to") as error:
        assemble(recipe, school.cache, Ranks())
    line_of(error)


def test_a_teacher_of_another_tokenizer_is_refused(school: School, tmp_path: Path) -> None:
    world = make_world(tmp_path / "clips", 4, height=16, width=24)
    other = toy_model(tokenizer={"whiten": 0.5}).tokenizer
    build_cache(toy_recipe(), world, tmp_path / "cache", tokenizer=other)
    run = train(recipe_of(train={"max_steps": 1}), open_cache(tmp_path / "cache"), tmp_path / "run")
    with pytest.raises(UserError, match=r"works on latents of another tokenizer than the cache's") as error:
        assemble(recipe_of("matching", str(run)), school.cache, Ranks())
    assert "tokenizer.name_or_path=" in line_of(error)
    with pytest.raises(UserError, match="no such checkpoint") as missing:
        assemble(recipe_of("matching", str(tmp_path / "nobody")), school.cache, Ranks())
    line_of(missing)


def test_a_frozen_text_encoder_of_a_teacher_must_be_that_of_the_cache(school: School, tmp_path: Path) -> None:
    """Its words come from the cache: of another encoder they would be other words."""
    frozen = {"text_encoder": {"trainable": False}}
    world = make_world(tmp_path / "clips", 6, height=16, width=24)
    tokenizer = school.cache.tokenizer()
    caches, runs = [], []
    for seed in (42, 7):
        path = tmp_path / f"cache{seed}"
        build_cache(_seeded(frozen, seed), world, path, tokenizer=tokenizer)
        caches.append(open_cache(path))
        recipe = recipe_of(**frozen, train={"max_steps": 1}).model_copy(update={"seed": seed})
        runs.append(str(train(recipe, caches[-1], tmp_path / f"run{seed}")))
    assemble(recipe_of("matching", runs[0], **frozen), caches[0], Ranks())
    with pytest.raises(UserError, match="text_encoder") as error:
        assemble(recipe_of("matching", runs[1], **frozen), caches[0], Ranks())
    line_of(error)


def _seeded(sections: dict[str, Any], seed: int) -> Recipe:
    return toy_recipe(**sections).model_copy(update={"seed": seed})


@pytest.mark.parametrize("critic", ["full", "lora"])
def test_what_a_teacher_dropped_in_its_training_it_keeps_as_a_judge(critic: str, school: School) -> None:
    """Masks come from a generator that training lends: scores are not to be drawn."""
    dropping, folder = {"model": {"dropout": 0.3}}, school.folder / "dropping"
    if not folder.exists():
        train(recipe_of(**dropping, train={"max_steps": 1}), school.cache, folder)
    parts = assemble(recipe_of("matching", str(folder), distil={"critic": critic}), school.cache, Ranks())
    assert parts.lesson is not None
    assert parts.lesson.critic is not None
    batch, found = parts.loader.batch(0), []
    for training in (False, True):
        parts.lesson.critic.train(training)
        found.append(parts.method.losses(batch, at("critic")).loss_B.detach())
    assert torch.equal(*found)
    with pytest.raises(ValueError, match=r"model\.dropout"):
        school.student(**dropping)


# --- what a checkpoint holds --------------------------------------------------------------------------------


def test_averages_are_the_students_alone_and_it_moves_in_its_turns(school: School, tmp_path: Path) -> None:
    recipe = school.student(
        train={"max_steps": 4, "save_every_steps": 1}, distil={"critic_ratio": 3}, ema={"decay": 0.5}
    )
    run = train(recipe, school.cache, tmp_path / "run")
    saved = {step: saved_at(run, step) for step in range(1, 5)}
    model, ema, beside = (set(saved[4].tensors(name)) for name in ("model", "ema", "beside"))
    assert model == ema
    assert {name.split(".")[0] for name in model} == {"backbone", "text_encoder"}
    assert {name.split(".")[0] for name in beside} == {"critic"}
    # Turns 0 and 3 are the student's too.
    assert same(saved[1], saved[2], "model")
    assert same(saved[2], saved[3], "model")
    assert not same(saved[3], saved[4], "model")
    assert not any(same(saved[n], saved[n + 1], "beside") for n in (1, 2, 3))
    assert {name.split("/")[0] for name in saved[4].tensors("optimizer")} == {"student", "critic"}
    # The average of the weights after every step, by hand.
    name = next(name for name in sorted(model) if "weight" in name)
    average = saved[1].tensors("ema")[name]
    for step in (2, 3, 4):
        decay = min(0.5, (1 + step) / (10 + step))
        average = average.lerp(saved[step].tensors("model")[name], 1 - decay)
    torch.testing.assert_close(average, saved[4].tensors("ema")[name], rtol=1e-5, atol=1e-7)
    # The student is what is opened.
    opened = load_model(run, device="cpu", raw=True).predictor.backbone.state_dict()  # type: ignore
    found = saved[4].tensors("model")
    assert all(torch.equal(found[f"backbone.{name}"], t) for name, t in opened.items())


# --- a critic of adapters -----------------------------------------------------------------------------------


def says(parts: Parts, batch: Batch) -> Tensor:
    """What the teacher says, its critic's adapters aside."""
    assert parts.lesson is not None
    model = Pupil(parts.model())
    asked = model.ask(batch, at("student"))
    noise = model.noise(asked.clean, at("student"), "noise")
    with without_adapters(parts.lesson.critic):  # type: ignore[arg-type]
        found = parts.lesson.teacher.guess(asked, asked.sample, asked.clean, torch.tensor([[0.5]]), noise)
    return found["video"].clean_BFSC


def test_a_critic_of_adapters_learns_and_the_teacher_beside_it_does_not(
    school: School, tmp_path: Path
) -> None:
    steps = {"max_steps": 3, "save_every_steps": 3}
    recipe = school.student(train=steps, distil={"critic": "lora", "critic_rank": 3, "critic_lr": 1e-2})
    full = assemble(school.student(train=steps, distil={"critic_lr": 1e-2}), school.cache, Ranks())
    parts = assemble(recipe, school.cache, Ranks())
    assert parts.lesson is not None
    critic, own = parts.lesson.critic, parts.lesson.teacher.model.predictor.backbone
    assert critic is own, "one network is held for both"
    batch = parts.loader.batch(0)
    # Before the first step it is the teacher: all losses are those of a full critic, to rounding.
    for turn in ("student", "critic"):
        one, other = (p.method.losses(batch, at(turn)).loss_B for p in (parts, full))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    before = says(parts, batch)
    torch.testing.assert_close(before, says(full, batch), rtol=1e-4, atol=1e-6)
    loss = parts.method.losses(batch, at("critic")).loss_B.detach()
    parts.trainer(tmp_path / "run").fit()
    assert torch.equal(says(parts, batch), before)
    assert not torch.equal(parts.method.losses(batch, at("critic")).loss_B.detach(), loss)
    # Nor does the method ask it with them: a teacher that has none yet judges the student's clips alike.
    for name, p in critic.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=1.0, generator=torch_generator("loud", name))
    fresh = assemble(recipe, school.cache, Ranks())
    for name, module in parts.method.modules().items():
        fresh.method.modules()[name].load_state_dict(module.state_dict())
    away = [p.method.losses(batch, at("student")).logs["from_teacher"] for p in (parts, fresh)]
    assert torch.equal(*away)
    found = saved_at(tmp_path / "run", 3).tensors("beside")
    assert len(found) > 4
    assert all(".lora_" in name for name in found)
    whole = {name.replace("critic.", "", 1) for name in named(full)}
    assert not whole & {name.replace("critic.", "", 1) for name in found}
    assert any(found[name].any() for name in found if "lora_B" in name)


def named(parts: Parts) -> set[str]:
    assert parts.lesson is not None
    assert parts.lesson.critic is not None
    return set(parts.lesson.critic.state_dict())


# --- kills and resumes --------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from motionloom.cli.assemble import assemble
from motionloom.config import Recipe
from motionloom.data.cache import open_cache
from motionloom.parallel import Ranks
class Killer:
    def step(self, progress):
        if progress.step == {step}:
            os.kill(os.getpid(), signal.SIGKILL)
    def note(self, message):
        pass
recipe = Recipe.model_validate_json({recipe!r})
assemble(recipe, open_cache({cache!r}), Ranks()).trainer(Path({run!r}), Killer()).fit()
"""

MATCHINGS: dict[str, dict[str, Any]] = {
    "judge": {"loss": "gan", "critic_ratio": 2, "gan_r1": 0.1, "gan_dmd": 0.5},
    "adapters": {"critic": "lora", "critic_rank": 3, "critic_ratio": 2, "same_exit": False, "longest": 6},
}


@pytest.mark.parametrize("how", ["judge", pytest.param("adapters", marks=pytest.mark.slow)])
def test_killed_and_resumed_equals_never_stopped(how: str, school: School, tmp_path: Path) -> None:
    """N steps are k + SIGKILL + N - k: student, critic, judge, averages and both optimisers, to the bit."""
    options = {"max_steps": 7, "save_every_steps": 2, "heldout_every_steps": 3}
    recipe = school.student(train=options, distil=MATCHINGS[how])
    whole, killed = train(recipe, school.cache, tmp_path / "whole"), tmp_path / "killed"
    facts = {"tests": str(Path(__file__).parent), "step": 5, "recipe": recipe.model_dump_json()}
    script = KILLED.format(**facts, cache=str(school.cache.path), run=str(killed))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert found.returncode == -9, found.stderr
    reached = checkpoint.latest(killed)
    assert reached is not None
    assert reached.name == checkpoint.name_of(4)
    train(recipe, school.cache, killed, resume=True)
    for name in ("model", "ema", "beside", "optimizer"):
        same_tensors(whole, killed, name)
    if how == "judge":
        assert any(name.startswith("judge.") for name in checkpoint.load(killed).tensors("beside"))
        assert any("judge." in name for name in checkpoint.load(killed).tensors("optimizer"))
    assert figures(killed) == figures(whole)


SHARED = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from motionloom.cli.assemble import assemble
from motionloom.config import Recipe
from motionloom.data.cache import open_cache
from motionloom.parallel import start_ranks
recipe = Recipe.model_validate_json(Path({recipe!r}).read_text())
with start_ranks("cpu") as ranks:
    assemble(recipe, open_cache({cache!r}), ranks).trainer(Path({run!r})).fit()
"""


@pytest.mark.slow
def test_two_ranks_learn_alike_whole_and_in_shards(school: School, tmp_path: Path) -> None:
    """DDP and FSDP2 on two processes: roll-outs of random length whose exits and switches are drawn for all
    ranks at once (one that went its own way would wait for the other for ever), and the same weights."""
    distil = {"longest": 6, "switch": 0.5, "critic_ratio": 2, "same_exit": False}
    options = {"max_steps": 6, "save_every_steps": 6, "heldout_every_steps": 3}
    runs = {}
    for sharding in ("ddp", "fsdp"):
        recipe = school.student(train=options | {"sharding": sharding}, distil=distil)
        (tmp_path / f"{sharding}.json").write_text(recipe.model_dump_json())
        facts = {"tests": str(Path(__file__).parent), "recipe": str(tmp_path / f"{sharding}.json")}
        runs[sharding] = tmp_path / sharding
        program = tmp_path / f"{sharding}.py"
        program.write_text(SHARED.format(**facts, cache=str(school.cache.path), run=str(runs[sharding])))
        finish(start(2, program=program), timeout=300)
    for part in ("model", "beside"):
        whole, shards = (saved_at(run, 6).tensors(part) for run in runs.values())
        assert whole.keys() == shards.keys()
        for name, t in whole.items():
            torch.testing.assert_close(shards[name], t, rtol=1e-3, atol=1e-4)
    alone = saved_at(train(recipe, school.cache, tmp_path / "alone"), 6).tensors("model")
    assert any(
        (alone[name] - t).abs().max() > 1e-3 for name, t in saved_at(runs["ddp"], 6).tensors("model").items()
    )


def test_a_resume_with_another_teacher_is_refused(school: School, tmp_path: Path) -> None:
    """Under the same name its weights have changed."""
    moved = Path(shutil.copytree(school.teacher, tmp_path / "teacher"))
    recipe = recipe_of("matching", str(moved), train={"max_steps": 1})
    run = train(recipe, school.cache, tmp_path / "run")
    longer = recipe_of("matching", str(moved), train={"max_steps": 2})
    other = train(recipe_of(train={"max_steps": 3}), school.cache, tmp_path / "other")
    shutil.rmtree(moved)
    other.rename(moved)
    with pytest.raises(UserError, match=r"base was distil.teacher .* \(sha256 .*\), is .*") as error:
        train(longer, school.cache, run, resume=True)
    assert "cannot be resumed exactly" in line_of(error)
    # The same teacher elsewhere is the same teacher.
    shutil.rmtree(moved)
    shutil.copytree(school.teacher, tmp_path / "elsewhere")
    again = recipe_of("matching", str(tmp_path / "elsewhere"), train={"max_steps": 2})
    train(again, school.cache, run, resume=True)
    assert checkpoint.load(run).step == 2


# --- accumulation -------------------------------------------------------------------------------------------


@dataclass
class Pieces:
    """Four clips at once, or one after the other."""

    model: Model
    whole: bool

    def batches(self, start: int) -> Iterator[Batch]:
        n = start
        while True:
            yield self.batch(n)
            n += 1

    def batch(self, n: int) -> Batch:
        four = clips(self.model, 4, key=n if self.whole else n // 4)
        if self.whole:
            return four
        keep = slice(n % 4, n % 4 + 1)
        video = four.video
        one = replace(video, x_BFHWC=video.x_BFHWC[keep])
        return Batch([four.ids[n % 4]], {"video": one}, four.captions[keep])

    def examples(self) -> dict[str, Batch]:
        return {"toy": self.batch(0)}


class HalfWay:
    """The level of every score."""

    def sample(self, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        return torch.full(size, 0.5)


def test_four_micro_batches_of_one_equal_one_of_four(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """16 of the list: the gradients of student and critic, with the draws of each clip held."""

    def noise(pupil: Pupil, like: Any, context: Any, purpose: str) -> dict[str, Tensor]:
        def of_clip(x_1FSC: Tensor, m: str) -> Tensor:
            key = str(round(float(x_1FSC.detach().abs().sum()), 2)) if purpose == "roll-out" else ""
            return torch.randn(x_1FSC.shape, generator=torch_generator(purpose, m, key))

        return {m: torch.stack([of_clip(one, m) for one in x]) for m, x in like.items()}

    monkeypatch.setattr(Pupil, "noise", noise)
    found = {}
    for whole in (True, False):
        options = {"batch_size": 4 if whole else 1, "grad_accum_steps": 1 if whole else 4}
        options |= {"max_steps": 1, "lr": 1e-4}
        model = student_of("joint", PLAN, train=options, distil={"num_steps": 1})
        method: Any = taught(model, scale=3.0)
        method._scores = HalfWay()
        run = tmp_path / str(whole)
        Trainer(model.recipe, method, Pieces(model, whole), Ranks(), run).fit()
        found[whole] = checkpoint.load(run).tensors("optimizer")
    names = [name for name in found[True] if name.endswith("exp_avg")]
    assert {name.split("/")[0] for name in names} == {"student", "critic"}
    assert any(found[True][name].any() for name in names)
    for name in names:
        one, four = found[True][name], found[False][name]
        torch.testing.assert_close(four, one, rtol=1e-3, atol=1e-5 * float(one.abs().max()) + 1e-9)


# --- from the teacher's walks to a student that rolls out ---------------------------------------------------


def test_from_a_teacher_to_pairs_to_a_student_that_makes_clips(school: School, tmp_path: Path) -> None:
    """17 in small: each stage starts from the one before, and a clip costs what the levels say."""
    few = {"num_steps": 2, "grid_steps": 4, "shift": 1.0}
    ode = recipe_of("ode", school.teacher, distil=few, train={"max_steps": 12, "lr": 3e-3})
    teacher = Walker(load_model(school.teacher, device="cpu"), school.teacher)
    make_pairs(ode, teacher, school.cache, tmp_path / "pairs")
    pairs = open_cache(tmp_path / "pairs")
    first = train(ode, pairs, tmp_path / "ode")
    lines = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert sum(losses[-4:]) < sum(losses[:4])

    tuned = recipe_of("consistency", school.teacher, distil=few, train={"max_steps": 1})
    train(tuned, pairs, tmp_path / "consistency")
    second = recipe_of(
        "matching", school.teacher, distil=few, train={"init_from": str(first), "max_steps": 1}
    )
    run = train(second, pairs, tmp_path / "matching")
    assert checkpoint.load(run).step == 1
    model, ear = listening(load_model(run, device="cpu"))
    sample = model.sample((8,), 16, 24, 8.0, 1)
    noise = {"video": torch.randn(1, 4, 24, 6, generator=torch_generator("clip"))}
    task = Task(sample, model.encode_text([["a wave number 1"]]), noise)
    with torch.no_grad():
        made = rollout(
            model.predictor,
            model.plan,
            task,
            Sampling("consistency", sigmas=second.distil.levels),
            generator=torch_generator("fresh"),
        )
    assert torch.isfinite(made["video"]).all()
    assert len(ear.heard) == 4 * 2 + 3, "two steps a chunk, and a pass to remember all but the last by"


def test_states_of_other_levels_or_none_are_refused_before_training(school: School, tmp_path: Path) -> None:
    few = {"num_steps": 2, "grid_steps": 4, "shift": 1.0}
    with pytest.raises(UserError, match="holds no states of a teacher") as none:
        assemble(recipe_of("ode", school.teacher, distil=few), school.cache, Ranks())
    line_of(none)
    teacher = Walker(load_model(school.teacher, device="cpu"), school.teacher)
    make_pairs(
        recipe_of("ode", school.teacher, distil=few), teacher, school.cache, tmp_path / "pairs", clips=4
    )
    wrong = {**few, "num_steps": 4}
    with pytest.raises(UserError, match=r"holds states at the levels \[1,0.5\]") as other:
        assemble(recipe_of("ode", school.teacher, distil=wrong), open_cache(tmp_path / "pairs"), Ranks())
    line_of(other)


@pytest.mark.slow
def test_each_of_these_tests_can_fail() -> None:
    """The code is broken in some thirty places, one at a time, and each time the test that is named fails."""
    script = Path(__file__).with_name("mutations.py")
    found = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
