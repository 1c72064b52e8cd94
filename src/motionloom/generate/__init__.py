"""Generation: prompts to clips over one rollout engine."""

from motionloom.generate.clip import ClipRequest, generate_clips, recipe_sampling
from motionloom.generate.model import Model
from motionloom.generate.rollout import Given, Sampling, rollout

__all__ = [
    "ClipRequest",
    "Given",
    "Model",
    "Sampling",
    "generate_clips",
    "recipe_sampling",
    "rollout",
]
