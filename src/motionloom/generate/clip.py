"""Prompts to clips.

Shapes: B batch, P pixel frames, H x W pixels, F token frames, S cells of a frame, C channels of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from motionloom.config.recipe import Recipe
from motionloom.errors import UserError
from motionloom.flow import DiscreteSchedule, Guidance
from motionloom.generate.model import Model
from motionloom.generate.rollout import Given, Sampling, rollout
from motionloom.nn.patching import patchify, unpatchify
from motionloom.plans import Geometry
from motionloom.rng import torch_generator


@dataclass(frozen=True)
class ClipRequest:
    """What to make. ``None`` takes the recipe's value."""

    prompts: tuple[str, ...]
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    negative: str = ""
    first_frames: Tensor | None = None
    """uint8 (B, p, H, W, 3): pixels of the first latent frame, one per prompt."""
    seed: int = 0


Progress = Callable[[int, int], None]
"""Called with (solver steps done, solver steps in all), over all batches."""


def recipe_sampling(
    recipe: Recipe, *, steps: int | None = None, guidance: float | None = None, solver: str | None = None
) -> Sampling:
    """The recipe's way of sampling, with what the user wants otherwise."""
    train = recipe.train
    return Sampling(
        solver=solver or train.sample_solver,
        steps=steps or train.sample_num_steps,
        shift=train.sample_shift,
        path=recipe.flow_matching.path,
        eta=train.sample_eta,
        schedule=_ddpm_schedule(recipe),
        guidance=Guidance(
            scale=train.sample_cfg_scale if guidance is None else guidance,
            rescale=train.sample_cfg_rescale,
            interval=train.sample_cfg_interval,
        ),
    )


def _ddpm_schedule(recipe: Recipe) -> DiscreteSchedule | None:
    if recipe.train.objective == "flow":
        return None
    return DiscreteSchedule(**recipe.diffusion.schedule_terms)


def generate_clips(
    model: Model,
    request: ClipRequest,
    sampling: Sampling,
    *,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Iterator[Tensor]:
    """One uint8 clip (P, H, W, 3) per prompt, in order.

    The noise of clip i is keyed by (seed, i): neither the batch size nor the other prompts change a clip
    beyond rounding.

    Raises:
        UserError: no prompt, a size that the tokenizer cannot make, or a first frame that does not fit.
    """
    if not request.prompts:
        raise UserError("nothing to generate: give at least one prompt")
    assert request.first_frames is None or len(request.first_frames) == len(request.prompts)
    batches = -(-len(request.prompts) // batch_size)
    for n, start in enumerate(range(0, len(request.prompts), batch_size)):

        def report(step: int, steps: int, n: int = n) -> None:
            if progress is not None:
                progress(n * steps + step, batches * steps)

        try:
            latents = _latents(model, request, sampling, start, batch_size, report)
        except (MemoryError, RuntimeError) as error:
            if "memory" not in str(error).lower():
                raise
            raise UserError(
                f"clips of this size do not fit into memory ({str(error).splitlines()[0][:120]}): "
                "make them smaller or shorter"
            ) from error
        yield from model.tokenizer.decode(latents.cpu()).unbind(0)


def _latents(
    model: Model,
    request: ClipRequest,
    sampling: Sampling,
    start: int,
    batch_size: int,
    report: Callable[[int, int], None],
) -> Tensor:
    """Latents (B, f, h, w, C) for the prompts from ``start``."""
    prompts = request.prompts[start : start + batch_size]
    usual_frames, usual_height, usual_width = model.clip_shape
    frames = request.frames or usual_frames
    height, width = request.height or usual_height, request.width or usual_width
    latent_frames = model.latent_grid(frames, height, width)[0]
    geometry = model.geometry(
        frames, height, width, request.fps or model.fps, [latent_frames], batch=len(prompts)
    )
    given = None
    if request.first_frames is not None:
        given = _given(model, geometry, request.first_frames[start : start + batch_size], (height, width))
    shape = (geometry.grid[0], geometry.grid[1] * geometry.grid[2], model.token_channels)
    generators = [torch_generator(request.seed, "generate", start + i) for i in range(len(prompts))]
    noise = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(model.device)
    with model.autocast():
        x_BFSC = rollout(
            model.predictor,
            model.plan,
            geometry,
            model.encode_text([[prompt] for prompt in prompts]),
            noise,
            sampling,
            negative=model.encode_text([[request.negative]] * len(prompts)),
            given=given,
            generator=torch_generator(request.seed, "solver", start, device=model.device),
            progress=report,
        )
    return unpatchify(x_BFSC, geometry.grid, model.patch)


def _given(model: Model, geometry: Geometry, pixels_BPHW3: Tensor, size: tuple[int, int]) -> Given:
    """The first frame's pixels as clean tokens."""
    if not model.plan.knows_given:
        raise UserError(
            f"this model's plan is {model.recipe.plan.type}, which makes every frame: "
            "train with plan.type=first_frame to give the first one"
        )
    if pixels_BPHW3.shape[2:4] != size:
        has, needs = ("x".join(map(str, s)) for s in (pixels_BPHW3.shape[2:4], size))
        raise UserError(f"the given first frame is {has} pixels, the clip {needs}: resize it first")
    first_BFSC = patchify(model.tokenizer.encode(pixels_BPHW3), model.patch).to(model.device)
    count = first_BFSC.shape[1]
    assert count <= geometry.grid[0], "more is given than the clip has"
    clean_BFSC = first_BFSC.new_zeros(geometry.batch, geometry.grid[0], *first_BFSC.shape[2:])
    clean_BFSC[:, :count] = first_BFSC
    given_BF = torch.zeros(clean_BFSC.shape[:2], dtype=torch.bool, device=model.device)
    given_BF[:, :count] = True
    return Given(clean_BFSC, given_BF)
