"""A teacher's walks from noise to a clip, and the states on the way at the levels of a student.

Shapes: B batch, K levels, F token frames (of latents: latent frames), S cells of a frame, C channels;
h x w latent cells; T latents of sound.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from motionloom.config.distil import DistilConfig
from motionloom.config.recipe import Recipe
from motionloom.data.buckets import Bucket
from motionloom.data.cache.pairs_note import SAME, shown
from motionloom.errors import UserError
from motionloom.flow.times import shift_sigma, sigma_schedule
from motionloom.generate.clip import ClipRequest, recipe_sampling, restricted, task_of
from motionloom.generate.model import Model
from motionloom.generate.rollout import rollout
from motionloom.generate.task import Sampling, Task
from motionloom.nn.patching import unpatchify
from motionloom.plans import Stage
from motionloom.rng import torch_generator
from motionloom.tokenizers import scene_sound

_MOST_STEPS = 1000
"""Grids that are looked through for one on which given levels lie."""

Latents = dict[str, Tensor]
"""By modality: video (B, F, h, w, C), sound (B, T, 1, 1, C); of states (B, K, ...)."""


@dataclass(frozen=True)
class Teacher:
    """A model that makes clips to be learned from."""

    model: Model
    where: str

    def weights(self) -> str:
        """SHA-256 of all that it computes with: the backbone's tensors, adapters included, and what reads the
        words."""
        parts = {"backbone": self.model.predictor.backbone, "text_encoder": self.model.text_encoder}
        # An encoder that is trained along says by its fingerprint what it began with.
        digest = hashlib.sha256(self.model.text_encoder.fingerprint().encode())
        for part, module in parts.items():
            tensors = module.state_dict() if isinstance(module, nn.Module) else {}
            for name, tensor in sorted(tensors.items()):
                digest.update(f"{part}.{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Wish:
    """Clips of one shape that a teacher is to make."""

    ids: tuple[str, ...]
    """They key the noise."""
    captions: tuple[tuple[str, ...], ...]
    """Per clip, per scene."""
    wholes: tuple[str, ...]
    """Per clip what is said of it beside the captions of its scenes; empty: nothing."""
    bucket: Bucket
    scene_frames: tuple[int, ...]
    fps: float

    def request(self, negative: str) -> ClipRequest:
        """As generation speaks of it."""
        shape: dict[str, Any] = {"fps": self.fps, "negative": negative}
        if not self.bucket.is_sound:
            shape |= {"height": self.bucket.height, "width": self.bucket.width}
        if len(self.scene_frames) == 1:
            return ClipRequest(tuple(said[0] for said in self.captions), frames=self.bucket.frames, **shape)
        return ClipRequest(self.wholes, scenes=self.captions, shots=self.scene_frames, **shape)

    def some(self, chosen: slice) -> Wish:
        """Some of the clips."""
        return replace(self, ids=self.ids[chosen], captions=self.captions[chosen], wholes=self.wholes[chosen])


@dataclass(frozen=True)
class Walked:
    """What came of a wish: where each walk ended, and its states."""

    latents: Latents
    states: Latents


def teacher_sampling(recipe: Recipe, teacher: Teacher) -> Sampling:
    """How a student's recipe wants the teacher to walk; the terms of guidance that the recipe does not speak
    of are the teacher's own.

    Raises:
        UserError: the teacher walks on noise levels of its own, or on another path.
    """
    distil, model = recipe.distil, teacher.model
    own = recipe_sampling(
        model.recipe, steps=distil.grid_steps, guidance=distil.scale, solver=distil.grid_solver
    )
    if (model.predictor.schedule or own.schedule) is not None:
        raise UserError(
            f"distil.teacher {teacher.where} was trained as DDPM and knows its own noise levels alone: take "
            "one that was trained with train.objective flow"
        )
    if own.path != recipe.flow_matching.path:
        raise UserError(
            f"flow_matching.path is {own.path} in distil.teacher {teacher.where} and "
            f"{recipe.flow_matching.path} in the recipe: set it to {own.path}"
        )
    return replace(own, shift=distil.shift)


def guidance_note(distil: DistilConfig, sampling: Sampling) -> dict[str, Any]:
    """Guidance as it is said, and as it acts."""
    return {"said": distil.guidance, "form": distil.guidance_form, **asdict(sampling.guidance)}


def levels_on_grid(distil: DistilConfig) -> tuple[int, ...]:
    """Where the student's levels stand on the grid of the teacher's walk.

    Raises:
        UserError: one of them is none of its points; names the nearest that are, and a grid that fits.
    """
    grid = sigma_schedule(distil.grid_steps, shift=distil.shift).tolist()
    nearest = [min(range(len(grid)), key=lambda i: abs(grid[i] - level)) for level in distil.levels]
    off = [level for level, i in zip(distil.levels, nearest, strict=True) if abs(level - grid[i]) > SAME]
    if not off:
        return tuple(nearest)
    mends = []
    if len(set(nearest)) == len(nearest) and nearest[-1] < distil.grid_steps and nearest[0] == 0:
        mends.append(f"distil.sigmas={shown([grid[i] for i in nearest])}")
    if (steps := _fitting_steps(distil)) is not None:
        mends.append(f"distil.grid_steps={steps}")
    raise UserError(
        f"the levels {shown(distil.levels)} do not lie on the teacher's grid (distil.grid_steps "
        f"{distil.grid_steps}, distil.shift {distil.shift:g}): {off[0]:.8g} is none of its points; set "
        f"{' or '.join(mends) or 'distil.sigmas to points of it'}"
    )


def _fitting_steps(distil: DistilConfig) -> int | None:
    """The number of steps nearest to the recipe's whose grid has all levels."""

    def fits(steps: int) -> bool:
        for level in distil.levels:
            u = shift_sigma(level, 1 / distil.shift)
            if abs(shift_sigma(round(u * steps) / steps, distil.shift) - level) > SAME / 2:
                return False
        return True

    near = sorted(range(len(distil.levels), _MOST_STEPS + 1), key=lambda n: abs(n - distil.grid_steps))
    return next((steps for steps in near if fits(steps)), None)


def why_not(teacher: Teacher, wish: Wish, latent_shape: Sequence[int]) -> str:
    """Why a teacher cannot make clips of this shape; empty if it can."""
    model = teacher.model
    if "video" not in model.modalities:
        return ""
    try:
        sample = model.sample(wish.scene_frames, wish.bucket.height, wish.bucket.width, wish.fps, 1)
    except UserError as error:
        return str(error)
    grid = tuple(n * p for n, p in zip(sample.tracks["video"].grid, model.patch, strict=True))
    if grid != tuple(latent_shape[:3]):
        return f"the teacher makes {grid} latent cells of it, and the cache has {tuple(latent_shape[:3])}"
    return ""


@torch.no_grad()
def walk_clips(
    teacher: Teacher, wish: Wish, sampling: Sampling, kept: Sequence[int], recipe: Recipe, seed: int
) -> Walked:
    """Make clips, and keep the states before the steps ``kept``.

    Values are as they come: they may be anything but finite.

    Raises:
        UserError: not even one clip fits into memory.
    """
    model = teacher.model
    task, _ = task_of(model, wish.request(recipe.distil.negative), sampling)
    task = replace(task, noise={m: _noise(task, m, wish.ids, seed, model.device) for m in task.noise})
    keep = _Keep(task, kept)
    with model.autocast():
        made = rollout(
            model.predictor,
            model.plan,
            task,
            replace(sampling, guidance=restricted(sampling, task, ())),
            watch=keep,
        )
    return Walked(
        {m: _as_latents(model, task, m, x.float().cpu()) for m, x in made.items()},
        {m: _as_latents(model, task, m, x) for m, x in keep.states.items()},
    )


def _noise(task: Task, modality: str, ids: Sequence[str], seed: int, device: torch.device) -> Tensor:
    """The start of every clip, keyed by its id: neither its neighbours nor who makes it matter."""
    shape = task.noise[modality].shape[1:]
    drawn = [
        torch.randn(shape, generator=torch_generator(seed, f"pairs {modality}", one), dtype=torch.float32)
        for one in ids
    ]
    return torch.stack(drawn).to(device)


class _Keep:
    """Listens to a roll-out: the states (B, K, F, S, C) of all its stages before some steps."""

    def __init__(self, task: Task, kept: Sequence[int]) -> None:
        self._place = {step: k for k, step in enumerate(kept)}
        # Not a number until it is known: a step that nobody took cannot pass for one.
        self.states = {
            m: torch.full((len(x), len(kept), *x.shape[1:]), math.nan) for m, x in task.noise.items()
        }

    def __call__(self, stage: Stage, step: int, sigma: float, states: Mapping[str, Tensor], _: Any) -> None:
        if (k := self._place.get(step)) is not None:
            for modality, x_BFSC in states.items():
                self.states[modality][:, k, stage[modality]] = x_BFSC.float().cpu()


def _as_latents(model: Model, task: Task, modality: str, x: Tensor) -> Tensor:
    """Tokens (..., F, S, C) to latents (..., F, h, w, C)."""
    grid = task.sample.tracks[modality].grid
    patch = model.patch if modality == "video" else (1, 1, 1)
    return unpatchify(x.flatten(0, -4), grid, patch).unflatten(0, x.shape[:-3])


def sound_counts(model: Model, wish: Wish) -> list[int]:
    """Latents of the sound of each part that is coded alone."""
    assert model.audio_tokenizer is not None
    return scene_sound(model.audio_tokenizer.spec, wish.bucket.alone, wish.fps)[0]


def in_halves(make: Callable[[Wish], Walked], wish: Wish) -> list[tuple[Wish, Walked]]:
    """A wish, in halves as long as it does not fit into memory.

    Raises:
        UserError: one clip alone does not.
    """
    try:
        return [(wish, make(wish))]
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
            raise
        reason = str(error).splitlines()[0][:120] if str(error) else "out of memory"
    if len(wish.ids) == 1:
        raise UserError(
            f"{wish.ids[0]}: one clip of {wish.bucket} and its teacher do not fit into memory ({reason}): "
            "make the teacher or the clips smaller"
        )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = len(wish.ids) // 2
    return [*in_halves(make, wish.some(slice(0, half))), *in_halves(make, wish.some(slice(half, None)))]
