"""Generation: requests to clips over one rollout engine."""

from motionloom.generate.clip import (
    Clip,
    ClipRequest,
    decode,
    generate,
    generate_clips,
    recipe_sampling,
    request_shape,
    task_of,
)
from motionloom.generate.model import Model
from motionloom.generate.rollout import Sampling, Task, rollout
from motionloom.generate.sources import Coders, Source

__all__ = [
    "Clip",
    "ClipRequest",
    "Coders",
    "Model",
    "Sampling",
    "Source",
    "Task",
    "decode",
    "generate",
    "generate_clips",
    "recipe_sampling",
    "request_shape",
    "rollout",
    "task_of",
]
