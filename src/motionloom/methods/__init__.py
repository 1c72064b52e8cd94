"""Methods: what one training step optimises."""

from __future__ import annotations

from torch import nn

from motionloom.backbones import BackboneModule
from motionloom.config.recipe import Recipe
from motionloom.generate import Model
from motionloom.methods.denoise import Denoise
from motionloom.methods.distil.consistency import Consistency
from motionloom.methods.distil.judge import Judge
from motionloom.methods.distil.lesson import Teacher
from motionloom.methods.distil.matching import Matching
from motionloom.methods.distil.ode import Ode
from motionloom.train.method import Method

METHODS = {"denoise": Denoise, "ode": Ode, "consistency": Consistency, "matching": Matching}
"""Methods by name."""


def build_method(
    recipe: Recipe,
    model: Model,
    backbone: BackboneModule,
    teacher: Teacher | None = None,
    critic: nn.Module | None = None,
    judge: Judge | None = None,
    critic_model: Model | None = None,
) -> Method:
    """The recipe's method over modules that are in place (``parallel.parallelize``).

    Args:
        model: of what is trained.
        teacher: needed by ``consistency`` and ``matching``.
        critic, judge: needed by ``matching``, the judge where ``distil.loss`` is gan.
        critic_model: what the critic is the backbone of; none: the teacher's model.
    """
    match recipe.train.method:
        case "denoise":
            return Denoise(recipe, backbone, model.plan, model.text_encoder)
        case "ode":
            return Ode(recipe, model)
        case "consistency":
            assert teacher is not None
            return Consistency(recipe, model, teacher)
        case "matching":
            assert teacher is not None
            assert critic is not None
            return Matching(recipe, model, teacher, critic, judge, critic_model)
        case other:
            raise AssertionError(f"{other} trains no backbone")


__all__ = ["METHODS", "Denoise", "Method", "build_method"]
