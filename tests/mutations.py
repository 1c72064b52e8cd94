"""Breaks the code of distillation on purpose, one small edit at a time, and asks that the named test fails.

python tests/mutations.py            # all; a line each, and how many were missed
python tests/mutations.py words      # those whose name has one of the words

An edit is made in memory, while the module is imported in a process of its own; no file is touched. An edit
whose text is gone says so: it is to be written anew with the code.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
MATHS, RUNS = "tests/test_distil.py::test_", "tests/test_distil_runs.py::test_"


class Mutation(NamedTuple):
    """``old`` becomes ``new`` in a module, and ``test`` must fail."""

    name: str
    module: str
    old: str
    new: str
    test: str


def _distil(name: str, module: str, old: str, new: str, test: str) -> Mutation:
    return Mutation(name, f"motionloom.methods.distil.{module}", old, new, test)


PULL = "the_pull_is_the_difference_of_critic_and_teacher_at_one_noised_copy"
STANDS = "the_end_of_a_long_roll_out_stands_where_a_clip_without_its_head_stands"
LEARNS = "a_chunk_learns_through_one_step_and_not_through_its_past"
FEW_STEPS = "few_steps_from_a_cache_are_the_masked_forward"
CONSISTENT = "consistency_compares_two_points_of_the_teachers_way[True]"
STATES = "each_chunk_takes_the_state_of_its_level"

MUTATIONS: tuple[Mutation, ...] = (
    _distil("switched under its own words", "matching", "text=_of_another(longer)", "text=longer.text",
            MATHS + "a_switched_roll_out_is_judged_under_the_words_of_its_end"),
    Mutation("words are not forgotten", "motionloom.generate.rollout",
             "            roller.forget_words()\n            task = replace(task, text=task.later[n])",
             "            roller.forget_words()",
             MATHS + "words_change_at_the_stage_that_says_so_and_the_past_stays"),
    Mutation("the last chunk is not remembered", "motionloom.generate.stream",
             "        self._settle()\n        border", "        self._owed = None\n        border",
             "tests/test_stream.py::test_the_first_chunks_are_the_rollout_of_the_same_noise[joint]"),
    _distil("wrong sign", "losses", "pull = fake - real", "pull = real - fake",
            MATHS + "dmd_pulls_by_the_closed_form"),
    _distil("wrong sign, seen from afar", "losses", "pull = fake - real", "pull = real - fake",
            MATHS + "dmd_with_analytic_scores_reaches_mean_and_deviation"),
    _distil("normaliser of the batch", "losses", "pull / distance(made, real, weight_BFS)",
            "pull / distance(made, real, weight_BFS).mean()",
            MATHS + "the_normaliser_is_of_each_sample_and_forgets_the_scale"),
    _distil("alpha added", "losses", "- alpha * apart", "+ alpha * apart",
            MATHS + "sid_is_its_formula_and_learns_through_both_estimates"),
    _distil("judge the wrong way round", "losses", "return softplus(fake_B - real_B)",
            "return softplus(real_B - fake_B)", MATHS + "judge_and_student_want_opposite_things"),
    _distil("slope not squared", "losses", "/ step).square()", "/ step).abs()",
            MATHS + "steepness_is_the_squared_slope"),
    Mutation("delta as scale", "motionloom.config.distil",
             'self.guidance + (self.guidance_form == "delta")', "self.guidance",
             MATHS + "a_delta_of_3_5_is_a_scale_of_4_5_from_the_recipe_to_the_teacher"),
    _distil("1 + w where w was meant", "lesson",
            "torch.lerp(uncond.clean_BFSC, cond.clean_BFSC, scale)",
            "torch.lerp(uncond.clean_BFSC, cond.clean_BFSC, scale + 1)",
            MATHS + "a_delta_of_3_5_is_a_scale_of_4_5_from_the_recipe_to_the_teacher"),
    Mutation("the cache keeps the graph", "motionloom.nn.cache", "[self.chunk] = _kept(tokens, detach)",
             "[self.chunk] = _kept(tokens, False)", MATHS + LEARNS + "[joint-window and sink-True]"),
    Mutation("words of a pass without gradients", "motionloom.generate.walk", 'cache.drop("text")', "pass",
             MATHS + LEARNS + "[joint-window and sink-False]"),
    Mutation("a graph in every step", "motionloom.generate.walk", "trained.graph and sigma == last",
             "trained.graph", MATHS + LEARNS + "[joint-pairs-False]"),
    Mutation("masked chunks learn through their past", "motionloom.generate.rollout", "{m: x.detach() for",
             "{m: x for", MATHS + LEARNS + "[factorized-pairs-False]"),
    Mutation("a graph before it is asked for", "motionloom.generate.rollout", "graph and n >= graph_from",
             "graph", MATHS + "only_the_last_stages_have_a_graph_where_only_they_are_asked_for"),
    Mutation("an exit too late", "motionloom.generate.walk", "sigmas[: trained.exit_step + 1]",
             "sigmas[: trained.exit_step + 2]", MATHS + LEARNS + "[joint-pairs-False]"),
    Mutation("write-through forgotten", "motionloom.generate.roller", "self.sampling.write_through and",
             "False and", MATHS + FEW_STEPS),
    Mutation("remembered clean whatever is said", "motionloom.generate.roller",
             "level = self.sampling.context", "level = 0.0",
             MATHS + "what_is_remembered_stands_at_the_level_of_the_recipe"),
    Mutation("a window one frame too long", "motionloom.generate.windows", "total - (usual - head)",
             "total - usual", MATHS + STANDS + "[True]"),
    Mutation("a window where clips begin", "motionloom.generate.windows", "slot = head if part.start else 0",
             "slot = 0", MATHS + STANDS + "[True]"),
    Mutation("a window at its own seconds", "motionloom.generate.windows",
             "seconds_BF=geometry.seconds_BF - seconds", "seconds_BF=geometry.seconds_BF",
             MATHS + STANDS + "[False]"),
    _distil("every rank its own exit", "lesson", "replace(context, rank=0).generator(purpose)",
            "context.generator(purpose)", MATHS + "exits_are_those_of_all_ranks[same]"),
    _distil("the first step instead of the last", "matching", "return [last] * stages", "return [0] * stages",
            MATHS + "exits_are_those_of_all_ranks[last]"),
    _distil("teacher and critic at different levels", "matching",
            "real = self._real(made, sigma_B1,", "real = self._real(made, 0.9 * sigma_B1,", MATHS + PULL),
    _distil("score levels cut and not clamped", "matching", 'limits="clamp"', 'limits="truncate"',
            MATHS + "score_levels_are_clamped_after_the_shift"),
    _distil("sound as heavy as the picture", "matching",
            "recipe.plan.audio_loss if both else 1.0", "1.0",
            MATHS + "picture_and_sound_are_matched_together"),
    _distil("turns out of step", "matching", "% self._config.critic_ratio == 0",
            "% self._config.critic_ratio == 1", MATHS + "turns_reach_their_own_and_the_teacher_never_learns"),
    _distil("a critic of the wrong velocity", "matching", "path.velocity(made.x[m], noise[m]",
            "path.velocity(noise[m], made.x[m]",
            MATHS + "a_critic_of_a_fixed_student_approaches_the_analytic_score"),
    _distil("clean chunks count", "lesson", "weight_BFS = weight_BFS * (sigma_BFS > 0)", "pass",
            MATHS + STATES + "[window and sink]"),
    _distil("one state for all chunks", "ode", "index_BD[:, level.draw, None]", "index_BD[:, 0, None]",
            MATHS + STATES),
    _distil("no clean chunks", "ode", "return (*levels, 0.0) if", "return levels if",
            MATHS + STATES + "[window and sink]"),
    _distil("the teacher's step forgotten", "consistency", "(self._grid)[index_BD + 1]",
            "(self._grid)[index_BD]", MATHS + CONSISTENT),
    _distil("both ends learn", "consistency", "with torch.no_grad():", "with torch.enable_grad():",
            MATHS + CONSISTENT),
    _distil("a teacher with the critic's adapters", "matching",
            'with without_adapters(self._beside["critic"]):', "with nullcontext():",
            RUNS + "a_critic_of_adapters_learns_and_the_teacher_beside_it_does_not"),
    Mutation("a run that does not know its teacher", "motionloom.cli.assemble", "self.lesson.fingerprint",
             '""', RUNS + "a_resume_with_another_teacher_is_refused"),
    Mutation("micro-batches summed", "motionloom.train.stepper",
             "losses.loss_B.mean() / len(micro_batches)", "losses.loss_B.mean()",
             RUNS + "four_micro_batches_of_one_equal_one_of_four"),
)  # fmt: skip


class _Edited(importlib.machinery.SourceFileLoader):
    """Loads a module from its edited text, and never from compiled code."""

    def __init__(self, mutation: Mutation, path: str) -> None:
        super().__init__(mutation.module, path)
        self._mutation = mutation

    def get_code(self, fullname: str) -> Any:
        text = Path(self.path).read_text(encoding="utf-8")
        found = text.count(self._mutation.old)
        if found != 1:
            print(f"{self._mutation.old!r} stands {found} times in {self.path}", flush=True)
            os._exit(4)
        return self.source_to_code(text.replace(self._mutation.old, self._mutation.new).encode(), self.path)


class _Finder:
    """Finds the one module that is edited."""

    def __init__(self, mutation: Mutation) -> None:
        self._mutation = mutation

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> Any:
        if name != self._mutation.module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.origin is not None
        loader = _Edited(self._mutation, spec.origin)
        return importlib.util.spec_from_file_location(name, spec.origin, loader=loader)


def survives(mutation: Mutation) -> str:
    """Empty if the test fails under the mutation, as it should; else what was wrong."""
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 2)
        import pytest

        sys.meta_path.insert(0, _Finder(mutation))  # type: ignore[arg-type]
        os.chdir(ROOT)
        sys.path.insert(0, str(ROOT / "tests"))
        kept = os.dup(1)
        os.dup2(quiet, 1)
        code = int(pytest.main([mutation.test, "-q", "-x", "-p", "no:cacheprovider", "--tb=no"]))
        os.dup2(kept, 1)
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    answers = {
        0: "the test passed all the same",
        1: "",
        4: "the text to edit, or the test, is not there",
        5: "there is no such test",
    }
    return answers.get(code, f"pytest ended with {code}")


def main(words: Sequence[str]) -> int:
    """How many mutations were missed."""
    assert "motionloom" not in sys.modules
    import torch

    torch.set_num_threads(1)
    wanted = [one for one in MUTATIONS if not words or any(word in one.name for word in words)]
    missed = 0
    for one in wanted:
        wrong = survives(one)
        missed += bool(wrong)
        print(f"{'MISSED' if wrong else 'found '}  {one.name}{': ' + wrong if wrong else ''}", flush=True)
    print(f"{len(wanted) - missed} of {len(wanted)} were found")
    return missed


if __name__ == "__main__":
    sys.exit(min(1, main(sys.argv[1:])))
