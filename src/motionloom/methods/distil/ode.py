"""ODE regression: from any state of the teacher's trajectory to where it ends, in one step (CausVid,
arXiv 2412.07772, sec. 4.3; Salimans & Ho, 2202.00512).

The cache holds the teacher's states at the student's noise levels (``motionloom pairs``). Each chunk takes
the state of a level of its own; where chunks see each other's noise, level 0 is among them, as clean context
without a loss. A student that learned this starts the matching of distributions from clips and not from haze.

Shapes: B batch, T states, F token frames, S cells of a frame, C channels; K noise levels of a layout, D its
draws.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from motionloom.config.recipe import Recipe
from motionloom.data.batch import Batch
from motionloom.errors import UserError
from motionloom.generate import Model
from motionloom.methods.distil import losses
from motionloom.methods.distil.lesson import Guess, Pupil, fitted, guess, table_draws
from motionloom.nn.patching import patchify
from motionloom.plans import Layout
from motionloom.plans.layout import Track
from motionloom.train.method import Losses, StepContext
from motionloom.train.optim import make_optimizer


class Regression:
    """What ODE regression and consistency share: one optimiser, one turn, a student alone."""

    def __init__(self, recipe: Recipe, student: Model) -> None:
        self._pupil = Pupil(student)
        self._modules = student_modules(student)
        t = recipe.train
        self._optimizers: dict[str, torch.optim.Optimizer] = {t.method: make_optimizer(self._modules, t)}

    def modules(self) -> dict[str, nn.Module]:
        """The student's."""
        return self._modules

    def beside(self) -> dict[str, nn.Module]:
        """Nothing else is trained."""
        return {}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """One."""
        return self._optimizers

    def turns(self, step: int) -> tuple[str, ...]:
        """Always the same one."""
        return tuple(self._optimizers)


class Ode(Regression):
    """Mean squared error of the clean estimate against the end of the trajectory."""

    def __init__(self, recipe: Recipe, student: Model) -> None:
        super().__init__(recipe, student)
        self._levels = recipe.distil.levels

    def losses(self, batch: Batch, context: StepContext) -> Losses:
        """As :class:`~motionloom.train.method.Method`.

        Raises:
            UserError: the cache holds no states.
        """
        if not batch.states:
            raise UserError("train.method ode: the cache holds no states of a teacher: make it with pairs")
        asked, model = self._pupil.ask(batch, context), self._pupil.model
        layout = model.plan.layout(asked.sample, asked.text, asked.given)
        noise = self._pupil.noise(asked.clean, context, "noise")
        draws = max(track.num_draws for track in layout.tracks.values())
        table = level_table(self._levels, layout)
        index_BD, sigma_BD = table_draws(table, (len(batch.ids), draws), context)
        x, levels = {}, {}
        for m, track in layout.tracks.items():
            patch = model.patch if m == "video" else (1, 1, 1)
            states_BTFHWC = batch.states[m]
            parts = [patchify(states_BTFHWC[:, t], patch) for t in range(len(self._levels))]
            states_BTFSC = torch.stack([*parts, asked.clean[m]], dim=1)
            device = states_BTFSC.device
            x[m] = _chosen(states_BTFSC, track, index_BD.to(device))
            levels[m] = track.sigmas(fitted(sigma_BD, track).to(device))
        found = guess(model.predictor, layout, asked.values(asked.clean), x, levels, noise, asked.text)
        return clean_losses(found, asked.clean, layout)


def level_table(levels: tuple[float, ...], layout: Layout) -> tuple[float, ...]:
    """The levels that a chunk may stand at: with the clean one where there is no other clean context."""
    track = layout.tracks[layout.main]
    copies = len(track.frame_T) > track.geometry.grid[0]
    return (*levels, 0.0) if track.num_draws > 1 and not copies else levels


def clean_losses(found: dict[str, Guess], target: dict[str, Tensor], layout: Layout) -> Losses:
    """Mean squared error of clean estimates, each modality by its weight."""
    loss_B, main = torch.zeros(()), found[layout.main]
    logs = {}
    for m, one in found.items():
        error_B = losses.mean((one.clean_BFSC.float() - target[m].float()).square(), one.weight_BFS)
        loss_B = loss_B.to(error_B.device) + layout.tracks[m].loss * error_B
        if len(found) > 1:
            logs[f"loss_{m}"] = error_B.mean().detach()
    counted_B = main.weight_BFS.sum(dim=(1, 2))
    sigma_B = (main.sigma_BFS * main.weight_BFS).sum(dim=(1, 2)) / counted_B.clamp_min(losses.LEAST)
    return Losses(
        loss_B=loss_B,
        sigma_B=torch.where(counted_B > 0, sigma_B, -1.0),
        num_tokens=sum(one.weight_BFS.numel() for one in found.values()),
        logs=logs,
    )


def student_modules(student: Model) -> dict[str, nn.Module]:
    """What of a student is trained and saved."""
    modules: dict[str, nn.Module] = {}
    for name, part in (("backbone", student.predictor.backbone), ("text_encoder", student.text_encoder)):
        if name == "backbone" or student.text_encoder.trainable:
            assert isinstance(part, nn.Module)
            modules[name] = part
    return modules


def _chosen(states_BTFSC: Tensor, track: Track, index_BD: Tensor) -> Tensor:
    """Each token's state: that of its draw; the last one, the clean end, for what is given."""
    end = states_BTFSC.shape[1] - 1
    ends_B1 = torch.full_like(index_BD[:, :1], end)
    columns = [ends_B1 if level.draw is None else index_BD[:, level.draw, None] for level in track.levels]
    level_BN = track.target(track.level_BN).expand(len(index_BD), -1)
    which_BFS = torch.cat(columns, dim=1).gather(1, level_BN).unflatten(1, states_BTFSC.shape[2:4])
    index = which_BFS[:, None, :, :, None].expand(-1, 1, -1, -1, states_BTFSC.shape[-1])
    return states_BTFSC.gather(1, index)[:, 0]
