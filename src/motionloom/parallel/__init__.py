"""Ranks, sharding, gradients and state over many processes; the one place that knows ranks."""

from motionloom.parallel.gradients import Gradients, clip_, grad_norm
from motionloom.parallel.ranks import Ranks, start_ranks
from motionloom.parallel.shard import is_compiled, parallelize, why_not_compile
from motionloom.parallel.state import (
    fill,
    load_optimizer_state,
    local,
    named_optimizer_state,
    named_state,
    whole,
)
from motionloom.parallel.weights import load_weights, local_part

__all__ = [
    "Gradients",
    "Ranks",
    "clip_",
    "fill",
    "grad_norm",
    "is_compiled",
    "load_optimizer_state",
    "load_weights",
    "local",
    "local_part",
    "named_optimizer_state",
    "named_state",
    "parallelize",
    "start_ranks",
    "whole",
    "why_not_compile",
]
