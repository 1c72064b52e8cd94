"""Prompts to clips.

Shapes: B batch, P pixel frames, H x W pixels, F token frames, S cells of a frame, C channels of a token.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from motionloom.config.conditions import Base, Reference
from motionloom.config.recipe import Recipe
from motionloom.errors import UserError
from motionloom.flow import PATHS, DiscreteSchedule, Guidance
from motionloom.generate.guided import recipe_guidance
from motionloom.generate.model import Model
from motionloom.generate.rollout import rollout
from motionloom.generate.sources import Source, as_long, source_values
from motionloom.generate.task import Sampling, Task
from motionloom.nn.patching import patchify_mask, unpatchify
from motionloom.plans import NOTHING, Conditions, Geometry, Given, Sample, Text, Values, as_shown
from motionloom.rng import torch_generator
from motionloom.tokenizers import decode_scenes, scene_sound


@dataclass(frozen=True)
class ClipRequest:
    """What to make: clips of one shape under one list of conditions. ``None`` takes the recipe's value."""

    prompts: tuple[str, ...]
    """One per clip: its caption, or what is said of the whole where ``scenes`` say the rest."""
    frames: int | None = None
    """Pixel frames of a clip of one shot."""
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    negative: str = ""
    scenes: tuple[tuple[str, ...], ...] = ()
    """Captions of the scenes, per clip; empty: the prompt is the caption of the only one."""
    shots: tuple[int, ...] = ()
    """Pixel frames of each scene; empty: they share the clip's evenly."""
    conditions: tuple[Base, ...] = ()
    sources: tuple[Source, ...] = ()
    """What each condition brings, one per prompt each."""
    seed: int = 0


@dataclass(frozen=True)
class Clip:
    """What came of a prompt."""

    video_PHW3: Tensor | None
    """uint8; None: the model makes sound alone."""
    sound_ZM: Tensor | None = None
    """float32 (channels, samples) in [-1, 1]."""
    sample_rate: int = 0
    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    """(F, S, C) by modality, as the rollout left them: what was given is in them to the bit."""


Progress = Callable[[int, int], None]
"""Called with (solver steps done, solver steps in all), over all batches."""

Make = Callable[[Model, ClipRequest, Sampling, int, Progress], Iterator[Clip]]
"""(model, request, sampling, index of the first prompt among all, progress of this batch) -> clips."""


def recipe_sampling(
    recipe: Recipe, *, steps: int | None = None, guidance: float | None = None, solver: str | None = None
) -> Sampling:
    """The recipe's way of sampling, with what the user wants otherwise."""
    train = recipe.train
    if train.method != "denoise":
        return _few_steps(recipe, steps, guidance, solver)
    return Sampling(
        solver=solver or train.sample_solver,
        steps=steps or train.sample_num_steps,
        shift=train.sample_shift,
        path=recipe.flow_matching.path,
        eta=train.sample_eta,
        schedule=_ddpm_schedule(recipe),
        guidance=recipe_guidance(recipe, guidance),
    )


def _few_steps(recipe: Recipe, steps: int | None, guidance: float | None, solver: str | None) -> Sampling:
    """A student's: at its own noise levels with fresh noise between, unguided, since it has learned the
    guided clips."""
    distil = recipe.distil
    return Sampling(
        solver=solver or "consistency",
        steps=steps or len(distil.levels),
        shift=distil.shift,
        path=recipe.flow_matching.path,
        guidance=Guidance(1.0 if guidance is None else guidance),
        sigmas=() if steps else distil.levels,
        context=distil.context_noise,
        write_through=distil.write_through,
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
    """The pixels of :func:`generate`: one uint8 clip (P, H, W, 3) per prompt, in order."""
    for clip in generate(model, request, sampling, batch_size=batch_size, progress=progress):
        assert clip.video_PHW3 is not None, "this model makes sound alone"
        yield clip.video_PHW3


def generate(
    model: Model,
    request: ClipRequest,
    sampling: Sampling,
    *,
    batch_size: int = 32,
    progress: Progress | None = None,
    make: Make | None = None,
) -> Iterator[Clip]:
    """One clip per prompt, in order.

    The noise of clip i is keyed by (seed, i): neither the batch size nor the other prompts change a clip
    beyond rounding.

    Args:
        make: how a batch is made; None: all at once.

    Raises:
        UserError: no prompt, a size that the tokenizer cannot make, or a condition or source that does not
            fit.
    """
    if not request.prompts:
        raise UserError("nothing to generate: give at least one prompt")
    batches = -(-len(request.prompts) // batch_size)
    for n, begin in enumerate(range(0, len(request.prompts), batch_size)):

        def report(step: int, steps: int, n: int = n) -> None:
            if progress is not None:
                progress(n * steps + step, batches * steps)

        part = _part(request, slice(begin, begin + batch_size))
        try:
            yield from (make or at_once)(model, part, sampling, begin, report)
        except (MemoryError, RuntimeError) as error:
            if "memory" not in str(error).lower():
                raise
            raise UserError(
                f"clips of this size do not fit into memory ({str(error).splitlines()[0][:120]}): "
                "make them smaller or shorter"
            ) from error


def _part(request: ClipRequest, some: slice) -> ClipRequest:
    """The same of some of the prompts."""

    def cut(source: Source) -> Source:
        tensors = {f.name: getattr(source, f.name) for f in fields(source)}
        parts: dict[str, Any] = {n: t[some] for n, t in tensors.items() if isinstance(t, Tensor)}
        return replace(source, **parts)

    return replace(
        request,
        prompts=request.prompts[some],
        scenes=request.scenes[some],
        sources=tuple(map(cut, request.sources)),
    )


def at_once(
    model: Model, request: ClipRequest, sampling: Sampling, begin: int, report: Progress
) -> Iterator[Clip]:
    """A batch of clips in one rollout. Arguments as :data:`Make`."""
    task, shots = task_of(model, request, sampling, begin)
    with model.autocast():
        tokens = rollout(
            model.predictor,
            model.plan,
            task,
            replace(sampling, guidance=restricted(sampling, task, request.conditions)),
            generator=torch_generator(request.seed, "solver", begin, device=model.device),
            progress=report,
        )
    yield from decode(model, tokens, task.sample, shots)


def task_of(
    model: Model, request: ClipRequest, sampling: Sampling, begin: int = 0
) -> tuple[Task, tuple[int, ...]]:
    """A request as the plan speaks of it, and the pixel frames of its shots: what a training step makes of a
    batch, made of a request.

    Args:
        begin: index of the first prompt among all, which keys its noise.
    """
    shots, height, width = request_shape(model, request)
    batch = len(request.prompts)
    sample = model.sample(shots, height, width, request.fps or model.fps, batch)
    conditions = Conditions(request.conditions)
    sample = with_sources(model, sample, conditions, request.sources)
    text, negative = request_text(model, request)
    noise = {m: _noise(model, geometry, m, request.seed, begin) for m, geometry in sample.tracks.items()}
    values = source_values(model.coders, conditions, request.sources, sample, _coded(model, shots))
    given = conditions.fixed(sample) if request.conditions else NOTHING
    return Task(
        sample,
        text,
        noise,
        negative=negative,
        given=given,
        values=_shown(values, given, request.seed, sampling.path),
        without={name: conditions.without(name).fixed(sample) for name in sampling.guidance.conditions},
    ), shots


def request_shape(model: Model, request: ClipRequest) -> tuple[tuple[int, ...], int, int]:
    """Pixel frames of each shot, height and width.

    Raises:
        UserError: the clips have different numbers of scenes, or more than there are shots.
    """
    usual_frames, usual_height, usual_width = model.clip_shape
    counts = {len(captions) for captions in request.scenes} or {1}
    if len(counts) > 1:
        raise UserError("clips of one request have equally many scenes: make the others apart")
    count = counts.pop()
    frames = request.frames or usual_frames
    shots = request.shots or ((frames,) if count == 1 else (frames // count,) * count)
    if len(shots) != count:
        raise UserError(f"{count} scenes and {len(shots)} lengths: give one length for each scene")
    return tuple(shots), request.height or usual_height, request.width or usual_width


def with_sources(model: Model, sample: Sample, conditions: Conditions, sources: Sequence[Source]) -> Sample:
    """And what the sources say of where things stand: masks, and the places of references."""
    masks, references = dict(sample.masks), dict(sample.references)
    for condition, source in zip(conditions.all, sources, strict=True):
        kind, m = condition.type, condition.modality
        if kind == "mask" and source.mask_BFhw is not None:
            patch = model.patch if m == "video" else (1, 1, 1)
            masks[m] = patchify_mask(source.mask_BFhw, patch).to(model.device)
        if kind == "reference":
            references[m] = (*references.get(m, ()), _reference_geometry(model, sample, source, m))
    return replace(sample, masks=masks, references=references)


def _reference_geometry(model: Model, sample: Sample, source: Source, modality: str) -> Geometry:
    fps = sample.fps or model.fps
    if modality == "audio":
        assert source.sound_BZM is not None
        seconds = source.sound_BZM.shape[-1] / source.sample_rate
        # In frames of a second, so that its latents are those of its own length.
        return model.sound_geometry([seconds], 1.0, sample.batch)
    if source.video_BPHW3 is None:
        raise UserError("reference: its source has no pixels: name one that has")
    frames, height, width = source.video_BPHW3.shape[1:4]
    stride = model.recipe.references.frame_stride
    return model.geometry([frames], height, width, fps / stride, sample.batch)


def decode(
    model: Model, tokens: Mapping[str, Tensor], sample: Sample, shots: Sequence[int]
) -> Iterator[Clip]:
    """Tokens to clips, one per sample."""
    video_BPHW3 = sound_BZM = None
    rate = 0
    if "video" in tokens:
        latents = unpatchify(tokens["video"], sample.tracks["video"].grid, model.patch)
        video_BPHW3 = decode_scenes(model.tokenizer, latents.cpu(), _coded(model, shots))
    if "audio" in tokens:
        sound_BZM, rate = _decode_sound(model, tokens["audio"].flatten(1, 2).cpu(), shots, sample.fps)
    for i in range(sample.batch):
        yield Clip(
            None if video_BPHW3 is None else video_BPHW3[i],
            None if sound_BZM is None else sound_BZM[i],
            rate,
            {m: x[i] for m, x in tokens.items()},
        )


def _decode_sound(
    model: Model, latents_BTC: Tensor, shots: Sequence[int], fps: float | None
) -> tuple[Tensor, int]:
    """The sound of shots, each decoded as it was coded: alone and begun with its frames; and its rate."""
    assert model.audio_tokenizer is not None
    fps, coded = fps or model.fps, _coded(model, shots)
    counts, _, _ = scene_sound(model.audio_tokenizer.spec, coded, fps)
    parts, rate = [], 0
    for shot, part in zip(coded, latents_BTC.split(counts, dim=1), strict=True):
        sound_BZM, rate = model.audio_tokenizer.decode(part)
        parts.append(sound_BZM if len(coded) == 1 else as_long(sound_BZM, round(shot / fps * rate)))
    return torch.cat(parts, dim=-1), rate


def _coded(model: Model, shots: Sequence[int]) -> list[int]:
    """Pixel frames of what is coded alone."""
    return list(shots) if model.shots_alone(len(shots)) else [sum(shots)]


def request_text(model: Model, request: ClipRequest) -> tuple[Text, Text]:
    """What is said of the clips, and what guidance pushes them away from."""
    captions = [list(one) for one in request.scenes] or [[prompt] for prompt in request.prompts]
    # Beside captions of scenes the prompt is said of the whole.
    whole = list(request.prompts) if request.scenes and any(request.prompts) else None
    empty = None if whole is None else [""] * len(whole)
    negative = model.encode_text([[request.negative] * len(one) for one in captions], empty)
    return _text(model, request, captions, whole), negative


def _text(model: Model, request: ClipRequest, captions: list[list[str]], whole: list[str] | None) -> Text:
    """Captions of scenes and of the whole, and in front of them those of references."""
    text = model.encode_text(captions, whole)
    seen: Counter[str] = Counter()
    told: list[tuple[int, str]] = []
    for c in request.conditions:
        if isinstance(c, Reference):
            told += [(seen[c.modality], c.caption)] if c.caption else []
            seen[c.modality] += 1
    if not told:
        return text
    more = model.encode_text([[caption for _, caption in told]] * len(captions))
    # Sound and picture of one reference are of one scene, which their captions share.
    number_L = torch.tensor([number for number, _ in told], device=more.scene_BL.device)[more.scene_BL]
    context_BL = torch.zeros_like(text.valid_BL)
    return Text(
        torch.cat([more.x_BLC, text.x_BLC], dim=1),
        torch.cat([more.valid_BL, text.valid_BL], dim=1),
        torch.cat([number_L + len(captions[0]), text.scene_BL], dim=1),
        torch.cat([torch.ones_like(more.valid_BL), context_BL], dim=1),
    )


def _noise(model: Model, geometry: Geometry, modality: str, seed: int, begin: int) -> Tensor:
    """The start of every clip, keyed by its own number."""
    if modality == "audio":
        assert model.audio_tokenizer is not None
        channels, purpose = model.audio_tokenizer.spec.channels, "generate audio"
    else:
        channels, purpose = model.token_channels, "generate"
    shape = (geometry.grid[0], geometry.cells, channels)
    count = math.prod(shape)
    generators = [torch_generator(seed, purpose, begin + i) for i in range(geometry.batch)]
    # Drawn by sixteens, as torch makes them: a longer clip then begins with the noise of a shorter one.
    drawn = [torch.randn(-(-count // 16) * 16, generator=g)[:count].view(shape) for g in generators]
    return torch.stack(drawn).to(model.device)


def _shown(values: Values, given: Given, seed: int, path: str) -> Values:
    """References as the network is to see them."""
    found = {}
    for m, parts in values.references.items():
        shown = []
        for i, (x_BFSC, how) in enumerate(zip(parts, given.references.get(m, ()), strict=True)):
            generator = torch_generator(seed, f"noise reference {m} {i}")
            noise_BFSC = torch.randn(x_BFSC.shape, generator=generator).to(x_BFSC.device)
            shown.append(as_shown(x_BFSC, noise_BFSC, how.noise_B, PATHS[path].mix))
        found[m] = tuple(shown)
    return replace(values, references=found)


def restricted(sampling: Sampling, task: Task, conditions: Sequence[Base]) -> Guidance:
    """What of the guidance matters here: no pass is computed for the rest."""
    made = [
        m for m in task.sample.tracks if m not in task.given.marks or bool(task.given.marks[m].made_BN.any())
    ]
    held = {condition.type for condition in conditions}
    return sampling.guidance.restricted(list(task.sample.tracks), made, held)
