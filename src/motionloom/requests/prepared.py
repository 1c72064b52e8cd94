"""From a request to what generation takes: files are read at the clip's size and rate, lengths are settled,
and what is given is told apart from what is made.

Shapes: P pixel frames, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np

from motionloom.config.guidance import ConditionScale
from motionloom.config.misfits import neighbours
from motionloom.config.recipe import Recipe
from motionloom.config.request import ExtendRequest, Request, SceneRequest
from motionloom.data.buckets import whole_frames
from motionloom.errors import UserError
from motionloom.generate import Clip, ClipRequest, Model, Sampling, generate, recipe_sampling
from motionloom.generate.clip import Progress
from motionloom.generate.extend import Extension, Memory, expand_scenes, extend_clip, most_kept
from motionloom.requests.sources import Given, Reader, disagreement
from motionloom.tokenizers import TokenizerSpec

Make = Callable[..., Iterator[Clip]]
"""``generate`` or what takes its place; called with (model, request, sampling, progress=...)."""


@dataclass(frozen=True)
class Prepared:
    """A request that is ready to be made."""

    clips: ClipRequest
    sampling: Sampling
    make: Make
    shots: tuple[int, ...]
    """Pixel frames of each scene."""
    roles: tuple[str, ...]
    """Of each scene; empty for a clip without scenes."""
    given: tuple[Given, ...]
    """One for each condition."""
    notes: tuple[str, ...]
    """What the user should know."""

    @property
    def in_rounds(self) -> bool:
        """Whether a clip takes more than one rollout."""
        return self.make is not generate

    def run(self, model: Model, progress: Progress | None = None) -> Iterator[Clip]:
        """The clips, in order. What is given whole comes back as it was handed in, not as it was coded."""
        for clip in self.make(model, self.clips, self.sampling, progress=progress):
            for one in self.given:
                clip = one.put_back(clip)
            yield clip

    def given_share(self) -> list[float]:
        """What part of each pixel frame is given to the bit."""
        shares = [one.where_PHW.mean(axis=(1, 2)) for one in self.given if one.exact_pixels]
        # Of overlapping ones the sheet shows the larger: it marks, it does not measure.
        return np.max(shares, axis=0).tolist() if shares else [0.0] * sum(self.shots)


def prepare(model: Model, wish: Request) -> Prepared:
    """A request with its files read.

    Raises:
        UserError: something of it cannot be made by this model; a file that is missing, cannot be read or
            does not fit. One line, with the key or file and a mend.
    """
    _check_modalities(model, wish)
    fps = wish.fps or model.fps
    height, width = wish.size or model.clip_shape[1:]
    notes: list[str] = []
    shots, how = _lengths(model, wish, fps, notes)
    reader = Reader(model, shots, height, width, fps)
    named = {f"conditions[{i}] ({c.type})": c for i, c in enumerate(wish.conditions)}
    read = {at: reader.condition(c, at) for at, c in named.items()}
    scenes = [(i, scene.source) for i, scene in enumerate(wish.scenes) if scene.role == "given"]
    read |= {f"scenes[{i}]": reader.scene(i, source) for i, source in scenes}
    _check_agreement(read)
    given = list(read.values())
    prompts = wish.all_prompts
    captions = tuple(scene.caption for scene in wish.scenes)
    clips = ClipRequest(
        prompts,
        None if captions else sum(shots),
        height,
        width,
        fps,
        wish.negative,
        scenes=(captions,) * len(prompts) if captions else (),
        shots=shots if captions else (),
        conditions=tuple(one.condition for one in given),
        sources=tuple(one.source(len(prompts)) for one in given),
        seed=wish.seed,
    )
    recipe = _guided(model, wish)
    roles = tuple(scene.role for scene in wish.scenes)
    notes += [note for one in given for note in one.notes]
    notes += _unknown_to(model, wish, given)
    sampling = recipe_sampling(recipe, steps=wish.steps, solver=wish.solver)
    return Prepared(clips, sampling, how, shots, roles, tuple(given), tuple(notes))


def _check_modalities(model: Model, wish: Request) -> None:
    makes = " and ".join(model.modalities)
    if wish.format == "wav" and "audio" not in model.modalities:
        raise UserError(
            f"format: wav is sound, and this model makes {makes} alone (plan.modalities): choose mp4, or a "
            "model with sound"
        )
    if wish.format != "wav" and "video" not in model.modalities:
        raise UserError(f"format: {wish.format} is a film, and this model makes sound alone: choose wav")
    for i, condition in enumerate(wish.conditions):
        if condition.modality != "all" and condition.modality not in model.modalities:
            raise UserError(
                f"conditions[{i}] ({condition.type}) gives {condition.modality}, this model makes {makes} "
                "alone: leave it out, or take a model with both (plan.modalities: [video, audio])"
            )


def _check_agreement(read: Mapping[str, Given]) -> None:
    """Refuses two things in one place, of which one would be left out and nothing would say so."""
    for (at, one), (other_at, other) in combinations(read.items(), 2):
        if where := disagreement(one, other):
            raise UserError(
                f"{at} and {other_at} both give {where} of the clip, {one.condition.source} and "
                f"{other.condition.source}, and a token holds one: leave one out, move it, or lower its "
                "strength"
            )


# Lengths


def _lengths(model: Model, wish: Request, fps: float, notes: list[str]) -> tuple[tuple[int, ...], Make]:
    """Pixel frames of each scene, all rounds together, and what makes them."""
    if wish.scenes:
        shots = tuple(_shot(model, wish, i, scene, fps, notes) for i, scene in enumerate(wish.scenes))
        if wish.memory is None:
            return shots, generate
        memory = Memory(wish.memory.policy, wish.memory.keep, wish.memory.noise)
        return shots, partial(expand_scenes, how=memory)
    frames = wish.frames or model.clip_shape[0]
    if wish.seconds is not None:
        frames = _nearest(model, wish.seconds, fps, "seconds", notes)
    _check_frames(model, frames, "frames")
    if wish.extend is None:
        return (frames,), generate
    total = frames + _added(model, wish.extend, frames, fps)
    extension = Extension(frames, wish.extend.direction, wish.extend.keep, wish.extend.noise)
    return (total,), partial(extend_clip, how=extension)


def _shot(model: Model, wish: Request, index: int, scene: SceneRequest, fps: float, notes: list[str]) -> int:
    key = f"scenes[{index}]"
    if scene.frames is not None:
        frames = scene.frames
    elif scene.seconds is not None:
        frames = _nearest(model, scene.seconds, fps, f"{key}.seconds", notes)
    else:
        frames = max(_whole(model, _usual_shot(model, len(wish.scenes))), _shortest(model))
    if model.shots_alone(len(wish.scenes)):
        _check_frames(model, frames, f"{key}.frames")
    return frames


def _usual_shot(model: Model, count: int) -> int:
    """How long a shot is in training: said, a whole clip that was joined to others, or a part of one."""
    stories, frames = model.recipe.stories, model.clip_shape[0]
    return stories.frames or (frames if stories.join[1] else frames // count)


def _nearest(model: Model, seconds: float, fps: float, key: str, notes: list[str]) -> int:
    """The length that can be made and is nearest to so many seconds."""
    wanted = seconds * fps
    below = max(_whole(model, max(1, int(wanted + 1e-6))), _shortest(model))
    above = below + _step(model)
    frames = below if abs(below - wanted) <= abs(above - wanted) else above
    if abs(frames - wanted) > 0.5:
        notes.append(f"{key}: {seconds:g} s are {wanted:g} frames; {frames} can be made, {frames / fps:g} s")
    return frames


def _check_frames(model: Model, frames: int, key: str) -> None:
    """Refuses lengths that the tokenizer or the patch cannot make."""
    if "video" not in model.modalities:
        return
    spec = model.tokenizer.spec
    try:
        model.latent_grid(frames, spec.spatial * model.patch[1], spec.spatial * model.patch[2])
    except UserError as error:
        raise UserError(f"{key}: {str(error).removeprefix('frames ')}") from None


def _whole(model: Model, frames: int) -> int:
    return (
        whole_frames(model.tokenizer.spec, frames, model.patch[0]) if "video" in model.modalities else frames
    )


def _step(model: Model) -> int:
    return model.tokenizer.spec.temporal * model.patch[0] if "video" in model.modalities else 1


def _shortest(model: Model) -> int:
    return model.tokenizer.spec.pixel_frames(model.patch[0]) if "video" in model.modalities else 1


def _added(model: Model, wish: ExtendRequest, frames: int, fps: float) -> int:
    """How many pixel frames all further rounds add."""
    step = _step(model)
    if wish.frames is not None:
        if wish.frames % step:
            raise UserError(
                f"extend.frames {wish.frames} does not fill latent frames of {step}: use "
                f"{neighbours(wish.frames, step)}"
            )
        return wish.frames
    assert wish.rounds is not None
    if "video" in model.modalities:
        window, head = _token_frames(model.tokenizer.spec, frames, model.patch[0])
        keep = wish.keep or max(1, (window - head) // 2)
        return max(0, most_kept(window, head) + 1 - keep) * step * wish.rounds
    assert model.audio_tokenizer is not None
    spec = model.audio_tokenizer.spec
    window, head = spec.latents(frames / fps), int(spec.first_alone)
    new = window - head - (wish.keep or max(1, (window - head) // 2))
    return max(0, math.ceil(new / spec.latents_per_second * fps)) * wish.rounds


def _token_frames(spec: TokenizerSpec, frames: int, patch: int) -> tuple[int, int]:
    """(of a clip, of its head that stands apart)."""
    return spec.latent_grid(frames, spec.spatial, spec.spatial)[0] // patch, int(spec.first_alone)


# Guidance and notes


def _guided(model: Model, wish: Request) -> Recipe:
    """The recipe with the request's scales in place of its own, for sound as well as for video."""
    recipe, said = model.recipe, wish.guidance
    train: dict[str, Any] = {}
    more: dict[str, Any] = {}
    if said.text is not None:
        train["sample_cfg_scale"], more["audio_scale"] = said.text, None
    if said.interval is not None:
        train["sample_cfg_interval"] = said.interval
    if said.rescale is not None:
        train["sample_cfg_rescale"], more["audio_rescale"] = said.rescale, None
    if said.skip is not None:
        more["skip_scale"], more["audio_skip_scale"] = said.skip, None
    if said.skip_blocks:
        more["skip_blocks"] = said.skip_blocks
    if said.cross is not None:
        more["cross_scale"], more["audio_cross_scale"] = said.cross, None
    own = [one for one in recipe.guidance.conditions if one.condition not in said.conditions]
    new = [ConditionScale.model_validate({"condition": k, "scale": v}) for k, v in said.conditions.items()]
    more["conditions"] = (*own, *new)
    changed = recipe.model_copy(
        update={
            "train": recipe.train.model_copy(update=train),
            "guidance": recipe.guidance.model_copy(update=more),
        }
    )
    _check_skip(model, changed)
    return changed


def _check_skip(model: Model, recipe: Recipe) -> None:
    guidance, count = recipe.guidance, len(model.predictor.backbone.blocks())
    if (guidance.skip_scale or guidance.audio_skip_scale) and not guidance.skip_blocks:
        raise UserError(
            "guidance.skip leaves out self-attention in no block: say guidance.skip_blocks, of 0 to "
            f"{count - 1}"
        )
    if wrong := [block for block in guidance.skip_blocks if block >= count]:
        raise UserError(
            f"guidance.skip_blocks names block {wrong[0]}, and this model has {count}: choose from 0 to "
            f"{count - 1}"
        )


def _unknown_to(model: Model, wish: Request, given: Sequence[Given]) -> Iterator[str]:
    """What the model was never shown in training, and may or may not do."""
    plan = model.recipe.plan
    trained = {condition.type for condition in plan.conditions}
    asked = dict.fromkeys(one.condition.type for one in given)
    if wish.extend is not None:
        asked |= {"prefix" if wish.extend.direction == "forwards" else "suffix": None}
    if wish.memory is not None:
        asked |= {"scene": None}
    if new := [kind for kind in asked if kind not in trained]:
        names = ", ".join(sorted(trained)) or "none"
        yield (
            f"this model was never trained with {' or '.join(new)} (plan.conditions has {names}): what is "
            "given stays exact, and how well the rest follows it is open"
        )
    if len(wish.scenes) > 1 and not model.recipe.of_shots:
        yield f"this model was trained on clips of one scene (plan.type: {plan.type}): cuts may not come"
    if wish.scenes and (wish.prompt or wish.prompts) and not model.recipe.stories.global_caption:
        yield "this model was trained without a caption of the whole (stories.global_caption)"
