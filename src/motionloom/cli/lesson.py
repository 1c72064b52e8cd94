"""A student's teacher, critic and judge: the part of assembling that only distillation needs."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from motionloom.cli.adapters import FOLDERS
from motionloom.config import Recipe
from motionloom.config.recipe import LoraConfig
from motionloom.errors import UserError
from motionloom.generate import Model
from motionloom.methods.distil.judge import Judge
from motionloom.methods.distil.lesson import Teacher, same_path
from motionloom.parallel import Ranks, parallelize
from motionloom.rng import torch_generator
from motionloom.tokenizers import Tokenizer
from motionloom.tokenizers.audio import AudioTokenizer
from motionloom.train.lora import add_lora, fingerprint

if TYPE_CHECKING:
    from motionloom.cli.assemble import Opened


@dataclass(frozen=True)
class Lesson:
    """Whom a student learns from."""

    teacher: Teacher
    fingerprint: str
    """Of the teacher's weights: a resume with another teacher is refused."""
    critic: nn.Module | None = None
    judge: Judge | None = None
    critic_model: Model | None = None
    """What the critic is the backbone of, where that is not the teacher's."""


def make_lesson(recipe: Recipe, student: Model, ranks: Ranks, compile: bool) -> Lesson | None:
    """What a recipe's method needs besides the student; None: nothing.

    Raises:
        UserError: no such teacher, or it is of another tokenizer, shape or path.
    """
    method, d = recipe.train.method, recipe.distil
    if method not in ("consistency", "matching"):
        return None
    model = open_teacher(recipe, student, ranks)
    name = _hash(model, ranks)
    teacher = Teacher(model, d.scale, d.negative)
    own = model.predictor.backbone
    assert isinstance(own, nn.Module)
    if method == "consistency":
        parallelize({"teacher": own}, ranks, recipe.train.sharding, compile)
        return Lesson(teacher, name)
    other = None
    if d.critic_from and method == "matching":
        other = open_teacher(recipe, student, ranks, "critic_from")
        name += f"+{_hash(other, ranks)}"
    judge, start = None, other or model
    if d.loss == "gan":
        compile = False  # the judge looks into blocks
        depth = len(start.predictor.backbone.blocks())
        if beyond := [block for block in d.gan_blocks if block >= depth]:
            raise UserError(f"distil.gan_blocks {beyond}: the critic has blocks 0 to {depth - 1}")
        judge = Judge(_width(start), depth, d.gan_blocks)
        judge.init_weights(torch_generator(recipe.seed, "judge"))
        parallelize({"judge": judge}, ranks, "ddp")
    if d.critic == "lora":
        critic = _with_adapters(recipe, model, ranks, compile)
    else:
        critic = _copy(start)
        parallelize({"teacher": own, "critic": critic}, ranks, recipe.train.sharding, compile)
    return Lesson(teacher, name, critic, judge, other)


def _hash(model: Opened, ranks: Ranks) -> str:
    weights = model.weights
    assert weights is not None
    return ranks.main_does(lambda: fingerprint(weights, weights.read))


def open_teacher(recipe: Recipe, student: Model, ranks: Ranks, key: str = "teacher") -> Opened:
    """The model that ``distil.teacher`` or ``distil.critic_from`` names, found fit for the student.

    Raises:
        UserError: as :func:`make_lesson`.
    """
    from motionloom.cli.assemble import open_model

    where = getattr(recipe.distil, key)
    model = open_model(where, device=str(ranks.device))
    for name, mine, other in (
        ("tokenizer", student.tokenizer, model.tokenizer),
        ("audio_tokenizer", student.audio_tokenizer, model.audio_tokenizer),
    ):
        if mine is not None and _unlike(mine, other):
            raise UserError(
                f"distil.{key} {where} works on latents of another {name} than the cache's: make the cache "
                f"with {_key(name)}.name_or_path={where}/.../{FOLDERS.get(_key(name), name)}"
            )
    if model.patch != student.patch or set(student.modalities) - set(model.modalities):
        raise UserError(
            f"distil.{key} {where} takes tokens of model.patch {list(model.patch)} of "
            f"{' and '.join(model.modalities)}, the student {list(student.patch)} of "
            f"{' and '.join(student.modalities)}: they must be the same"
        )
    words = model.text_encoder
    if not words.trainable and words.fingerprint() != student.text_encoder.fingerprint():
        raise UserError(
            f"distil.{key} {where} reads the words of another text_encoder than the cache holds: make the "
            "cache, and the student, with the teacher's text_encoder"
        )
    same_path(student, model, key)
    schedule = model.predictor.schedule
    if schedule is not None and (noisiest := float(schedule.grid(1)[0])) < 1:
        raise UserError(
            f"distil.{key} {where} knows no noise beyond sigma {noisiest:.4f}, and students start at 1: "
            "take a teacher whose schedule ends in pure noise (diffusion.zero_terminal_snr)"
        )
    checkpointed = model.recipe.model.checkpoint_blocks
    if recipe.distil.loss == "sid" and recipe.distil.critic == "lora" and checkpointed:
        raise UserError(
            f"distil.{key} {where} recomputes its blocks, which would bring a LoRA critic back in: use "
            "distil.critic full with distil.loss sid"
        )
    if (masks := getattr(model.predictor.backbone, "dropout", None)) is not None:
        masks.p = 0.0  # a critic starts as it is, and what it learns is not to be drawn
    return model


def _copy(model: Opened) -> nn.Module:
    """A critic that starts as a model's backbone, in float32."""
    critic = copy.deepcopy(model.predictor.backbone)
    assert isinstance(critic, nn.Module)
    return critic.float().requires_grad_(True)


def _with_adapters(recipe: Recipe, model: Opened, ranks: Ranks, compile: bool) -> nn.Module:
    """A critic that is the teacher with adapters beside all linear layers of its blocks."""
    own = model.predictor.backbone
    assert isinstance(own, nn.Module)
    blocks = {id(block) for block in model.predictor.backbone.blocks()}
    inside = [name for name, part in own.named_modules() if id(part) in blocks]
    linear = [
        name
        for name, part in own.named_modules()
        if isinstance(part, nn.Linear) and any(name.startswith(f"{block}.") for block in inside)
    ]
    rank = recipe.distil.critic_rank
    wish = LoraConfig(enabled=True, rank=rank, alpha=float(rank), targets=tuple(linear))
    add_lora(own, wish, torch_generator(recipe.seed, "critic"))
    parallelize({"critic": own}, ranks, recipe.train.sharding, compile)
    return own


def _width(model: Opened) -> int:
    """Numbers in a token between two blocks."""
    from motionloom.cli.assemble import backbone_start

    sizes = backbone_start(model.recipe).sizes if model.recipe.model.imported else None
    return int(sizes.dim) if sizes is not None else model.recipe.model.dim  # type: ignore[attr-defined]


def _unlike(mine: Tokenizer | AudioTokenizer, theirs: Tokenizer | AudioTokenizer | None) -> bool:
    return theirs is None or mine.fingerprint() != theirs.fingerprint()


def _key(name: str) -> str:
    return "audio" if name == "audio_tokenizer" else "tokenizer"
