"""Compile before the first step, and say what it cost: a rehearsal for every shape that training will see."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch._dynamo.utils import counters

from motionloom.data.batch import Batch
from motionloom.train.stepper import Stepper

ROOM = 8
"""Variants of a block beside those of training shapes: held-out batches, previews, other scene counts."""


def warm_up(stepper: Stepper, step: int, examples: Mapping[str, Batch]) -> str:
    """Forward and backward of every example without a step: weights, figures and randomness stay as they are.

    Blocks are compiled for each shape here, so that no step of the run stands still for it.

    Args:
        step: optimiser steps done; decides whose turns are rehearsed.
        examples: a micro-batch by the name of its shape (``Loader.examples``).

    Returns:
        A line for the user: shapes, compiled graphs, seconds; empty if there was nothing to compile.
    """
    # Past its limit dynamo runs a block uncompiled, with a warning that is easily overlooked.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 2 * len(examples) + ROOM)
    graphs = counters["stats"]["unique_graphs"]
    began = time.perf_counter()
    seconds = []
    for name, batch in examples.items():
        start = time.perf_counter()
        stepper.rehearse(step, batch)
        seconds.append(f"{name} {time.perf_counter() - start:.1f} s")
    graphs = counters["stats"]["unique_graphs"] - graphs
    if not graphs:
        return ""
    total = time.perf_counter() - began
    return f"compiled {graphs} graphs in {total:.1f} s ({', '.join(seconds)})"
