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
from motionloom.flow import Guidance
from motionloom.generate.model import Model
from motionloom.generate.rollout import Given, Sampling, rollout
from motionloom.nn.patching import patchify, unpatchify
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
"""Called with (network passes done, network passes in all)."""


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
        guidance=Guidance(
            scale=train.sample_cfg_scale if guidance is None else guidance,
            rescale=train.sample_cfg_rescale,
            interval=train.sample_cfg_interval,
        ),
    )


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
        UserError: no prompt, or a size that the tokenizer cannot make.
    """
    if not request.prompts:
        raise UserError("nothing to generate: give at least one prompt")
    passes = -(-len(request.prompts) // batch_size) * sampling.steps
    for start in range(0, len(request.prompts), batch_size):
        done = start // batch_size * sampling.steps

        def report(step: int, _total: int, done: int = done) -> None:
            if progress is not None:
                progress(done + step, passes)

        latents = _latents(model, request, sampling, start, batch_size, report)
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
    video = model.recipe.video
    prompts = request.prompts[start : start + batch_size]
    frames = request.frames or video.num_frames
    height, width = request.height or video.height, request.width or video.width
    latent_frames = model.tokenizer.spec.latent_grid(frames, height, width)[0]
    geometry = model.geometry(
        frames, height, width, request.fps or video.fps, [latent_frames], batch=len(prompts)
    )
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
            given=_given(model, request, start, len(prompts), noise),
            generator=torch_generator(request.seed, "solver", start, device=model.device),
            progress=report,
        )
    return unpatchify(x_BFSC, geometry.grid, model.patch)


def _given(model: Model, request: ClipRequest, start: int, count: int, like: Tensor) -> Given | None:
    """The first frame as clean tokens, where one is given."""
    if request.first_frames is None:
        return None
    if not model.plan.knows_given:
        raise UserError(
            f"this model's plan is {model.recipe.plan.type}, which makes every frame: "
            "train with plan.type=first_frame to give the first one"
        )
    pixels = request.first_frames[start : start + count]
    first_BFSC = patchify(model.tokenizer.encode(pixels), model.patch).to(like.device)
    if first_BFSC.shape[2:] != like.shape[2:]:
        raise UserError("the given first frame has another size than the clip: resize it first")
    clean = torch.zeros_like(like)
    clean[:, : first_BFSC.shape[1]] = first_BFSC
    given_BF = torch.zeros(like.shape[:2], dtype=torch.bool, device=like.device)
    given_BF[:, : first_BFSC.shape[1]] = True
    return Given(clean, given_BF)
