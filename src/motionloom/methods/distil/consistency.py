"""Consistency from an autoregressive teacher: neighbours on the teacher's way lead to one clean clip (Song et
al., 2303.01469; causal: 2605.15141).

Two states of one trajectory, a step of the teacher apart, must give the same clean estimate; at the end of
the way that estimate is the clip itself. The answer at the cleaner state is the student's own, without a
gradient (Song & Dhariwal, 2310.14189, sec. 3.2, found no average of it is needed). No trajectories are
stored: the noisier state is the cache's clip with noise, the cleaner one a guided Euler step of the teacher
from there. With a teacher that saw clean history (``plan.forcing: teacher``) a causal student can follow the
way that it is shown, which it cannot where the teacher looked ahead (2602.02214).

Shapes: B batch, D draws of a layout.
"""

from __future__ import annotations

import torch

from motionloom.config.recipe import Recipe
from motionloom.data.batch import Batch
from motionloom.flow import sigma_schedule
from motionloom.generate import Model
from motionloom.methods.distil.lesson import Teacher, fitted, guess, noised, table_draws
from motionloom.methods.distil.ode import Regression, clean_losses
from motionloom.plans.tokens import clip_sigma
from motionloom.train.method import Losses, StepContext


class Consistency(Regression):
    """Mean squared difference of two clean estimates, a step of the teacher apart."""

    def __init__(self, recipe: Recipe, student: Model, teacher: Teacher) -> None:
        super().__init__(recipe, student)
        self._teacher = teacher
        self._grid = sigma_schedule(recipe.distil.grid_steps, shift=recipe.distil.shift).tolist()

    def losses(self, batch: Batch, context: StepContext) -> Losses:
        """As :class:`~motionloom.train.method.Method`."""
        asked, student = self._pupil.ask(batch, context), self._pupil.model
        noise = self._pupil.noise(asked.clean, context, "noise")
        layout = student.plan.layout(asked.sample, asked.text, asked.given)
        draws = max(track.num_draws for track in layout.tracks.values())
        if self._teacher.draws(asked) != draws:
            draws = 1  # a teacher that knows one level for the whole clip
        index_BD, now_BD = table_draws(self._grid[:-1], (len(batch.ids), draws), context)
        next_BD = torch.tensor(self._grid)[index_BD + 1]
        x, levels = noised(student.predictor, layout, asked.clean, now_BD, noise)
        shown = self._teacher.guess(asked, asked.sample, asked.clean, now_BD, noise, x)
        cleaner, targets = {}, {}
        for m, track in layout.tracks.items():
            targets[m] = track.sigmas(fitted(next_BD, track).to(x[m].device))
            step_BFS = clip_sigma(track, targets[m] - levels[m], x[m])
            cleaner[m] = x[m] + step_BFS[..., None] * shown[m].velocity_BFSC
        values = asked.values(asked.clean)
        with torch.no_grad():
            end = guess(student.predictor, layout, values, cleaner, targets, noise, asked.text)
        found = guess(student.predictor, layout, values, x, levels, noise, asked.text)
        return clean_losses(found, {m: one.clean_BFSC for m, one in end.items()}, layout)
