"""How fast does a recipe train here? Real steps on real batches, with weights that are then thrown away."""

from __future__ import annotations

import time
from itertools import islice
from statistics import median

import torch

from motionloom.config.recipe import Recipe
from motionloom.parallel import Ranks
from motionloom.train.method import Loader, Method
from motionloom.train.metrics import Running
from motionloom.train.stepper import Stepper


def steps_per_second(
    method: Method, loader: Loader, recipe: Recipe, ranks: Ranks, steps: int, warm_up: int = 3
) -> float:
    """Optimiser steps per second after ``warm_up`` of them, compilation left out. Changes the weights.

    From the median, since a step that something else on the machine held up says nothing of the rest.
    """
    stepper = Stepper(method, recipe.train, recipe.seed, ranks, Running(ranks.device))
    batches, count = loader.batches(0), recipe.train.grad_accum_steps
    seconds = []
    for step in range(warm_up + steps):
        began = time.perf_counter()
        stepper.step(step, [batch.to(ranks.device) for batch in islice(batches, count)], 0)
        if ranks.device.type == "cuda":
            torch.cuda.synchronize(ranks.device)
        seconds.append(time.perf_counter() - began)
    return 1.0 / median(seconds[warm_up:])
