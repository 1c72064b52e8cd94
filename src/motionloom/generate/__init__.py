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
from motionloom.generate.rollout import rollout
from motionloom.generate.sources import Coders, Source
from motionloom.generate.stream import Ask, Piece, Stream
from motionloom.generate.task import Sampling, Task

__all__ = [
    "Ask",
    "Clip",
    "ClipRequest",
    "Coders",
    "Model",
    "Piece",
    "Sampling",
    "Source",
    "Stream",
    "Task",
    "decode",
    "generate",
    "generate_clips",
    "recipe_sampling",
    "request_shape",
    "rollout",
    "task_of",
]
