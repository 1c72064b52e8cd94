"""The trainer: loop, state, checkpoints, optimisers, schedules, EMA, metrics; the Method protocol."""

from motionloom.train.loop import OnSample, Outcome, Trainer
from motionloom.train.method import HeldOut, Loader, Losses, Method, StepContext
from motionloom.train.report import Progress, Reporter, Silent

__all__ = [
    "HeldOut",
    "Loader",
    "Losses",
    "Method",
    "OnSample",
    "Outcome",
    "Progress",
    "Reporter",
    "Silent",
    "StepContext",
    "Trainer",
]
