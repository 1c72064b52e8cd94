"""Longer than one rollout: a clip extended forwards or backwards, and scenes made one after the other.

Both are rounds over one long clip. A round lays out some of its tokens as a clip of the usual length,
remembers those that are known by then (given, or made by earlier rounds) and makes the others. All of it
stays in latent space: what a round has made is given to the next one to the bit, and is decoded once, at the
end. Conditions and noise are those of the long clip.

Shapes: B batch, F token frames of the long clip, W token frames of a round, S cells of a frame, C channels of
a token, G kinds of giving.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from motionloom.errors import UserError
from motionloom.generate.clip import (
    Clip,
    ClipRequest,
    Progress,
    decode,
    generate,
    request_shape,
    request_text,
    restricted,
    task_of,
)
from motionloom.generate.model import Model
from motionloom.generate.rollout import rollout
from motionloom.generate.task import Sampling, Task, Tokens
from motionloom.generate.windows import head_alone, window
from motionloom.plans import Geometry, Given, Kind, Marks, Sample, StreamedPlan, Text, Values
from motionloom.rng import torch_generator


@dataclass(frozen=True)
class Extension:
    """A clip of ``ClipRequest.frames`` in rounds."""

    window: int
    """Pixel frames of a round: those of a clip as the model was trained on."""
    direction: Literal["forwards", "backwards"] = "forwards"
    keep: int | None = None
    """Token frames that a round is given of what is known; None: half of those it can hold."""
    noise: float = 0.0
    """Noise level at which they are shown; they stay what they are."""


@dataclass(frozen=True)
class Memory:
    """What a scene is shown of those that are known."""

    policy: Literal["last", "first_last", "similar", "all"] = "last"
    """``last``: the last ones before it. ``first_last``: the first one as well. ``similar``: those whose
    captions are nearest to its own, by the cosine between the means of their embeddings. ``all``."""
    keep: int = 1
    """How many; with ``first_last`` how many of the last."""
    noise: float = 0.0
    """As in :class:`Extension`."""


@dataclass(frozen=True)
class Round:
    """A part of the long clip, laid out to be made in one rollout."""

    sample: Sample
    frames: Mapping[str, Tensor]
    """The frames of the long clip that the sample's are, by modality, (W,)."""
    text: Text
    negative: Text | None


def extend_clip(
    model: Model,
    request: ClipRequest,
    sampling: Sampling,
    how: Extension,
    *,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Iterator[Clip]:
    """Clips of one scene that are longer than a rollout, one per prompt, as ``generate`` gives them.

    The first round is a clip as usual; each further one is given its last (first) ``how.keep`` token frames
    and makes what follows (comes before). Where the tokenizer's first frame stands alone, further rounds lack
    that one: their tokens stand where a clip's others do. Forwards, the first ``how.window`` frames are those
    of the clip that the same seed gives without extension, if the conditions there are the same.

    Args:
        request: ``frames`` counts those of all rounds.

    Raises:
        UserError: as ``generate``; more kept than a round can hold; scenes; a plan of chunks, whose clips may
            be of any length as they are.
    """
    if isinstance(model.plan, StreamedPlan):
        raise UserError("extend: a plan of chunks goes on by itself: ask for more frames instead")
    if request.scenes:
        raise UserError("extend goes on with one scene: list more scenes instead")
    rounds = partial(_extension, how=how)
    make = partial(_in_rounds, rounds=rounds, noise=how.noise)
    return generate(model, request, sampling, batch_size=batch_size, progress=progress, make=make)


def expand_scenes(
    model: Model,
    request: ClipRequest,
    sampling: Sampling,
    how: Memory,
    *,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Iterator[Clip]:
    """Clips of any number of scenes, made one after the other, one clip per prompt.

    A round is [remembered scenes, given | the new scene], in the order of the clip, laid out by the model's
    plan as a clip of so many scenes. Scenes that conditions give whole are known from the start; ``similar``
    and ``all`` look at those that come later too. What is remembered is chosen for all clips of a batch by
    the captions of its first.

    Raises:
        UserError: as ``generate``; the model codes several shots as one clip.
    """
    shots, _, _ = request_shape(model, request)
    if len(shots) > 1 and not model.shots_alone(len(shots)):
        raise UserError(
            "memory: this model does not code scenes apart, so they cannot be made one after the other: take "
            "one trained with plan.type: scenes, or leave memory out"
        )
    make = partial(_in_rounds, rounds=partial(_expansion, how=how), noise=how.noise)
    return generate(model, request, sampling, batch_size=batch_size, progress=progress, make=make)


Rounds = Callable[[Model, ClipRequest, Task, Sequence[int]], list[Round]]
"""(model, request, task of the long clip, its shots) -> rounds in order."""


def _in_rounds(
    model: Model,
    request: ClipRequest,
    sampling: Sampling,
    begin: int,
    report: Progress,
    *,
    rounds: Rounds,
    noise: float,
) -> Iterator[Clip]:
    """A batch of clips. Arguments as ``clip.Make``."""
    task, shots = task_of(model, request, sampling, begin)
    plan = rounds(model, request, task, shots)
    clean = {m: x.clone() for m, x in task.clean.clean.items()}
    known = {m: torch.zeros(x.shape[1], dtype=torch.bool, device=x.device) for m, x in clean.items()}
    for m in known:
        known[m] |= _given_whole(task, m)
    for n, one in enumerate(plan):

        def tell(step: int, steps: int, n: int = n) -> None:
            report(n * steps + step, len(plan) * steps)

        part = _part(task, one, clean, known, noise)
        guided = replace(sampling, guidance=restricted(sampling, part, request.conditions))
        generator = torch_generator(request.seed, "solver", begin, n, device=model.device)
        with model.autocast():
            made = rollout(model.predictor, model.plan, part, guided, generator=generator, progress=tell)
        for m, frame_W in one.frames.items():
            clean[m][:, frame_W] = made[m]
            known[m][frame_W] = True
    yield from decode(model, clean, task.sample, shots)


def _given_whole(task: Task, modality: str) -> Tensor:
    """(F,): frames of which all is given from the start, in every sample."""
    geometry, marks = task.sample.tracks[modality], task.given.marks.get(modality)
    if marks is None:
        return torch.zeros(geometry.grid[0], dtype=torch.bool, device=geometry.device)
    return ~marks.made_BN.unflatten(1, (geometry.grid[0], geometry.cells)).any(dim=2).any(dim=0)


def _part(task: Task, one: Round, clean: Tokens, known: Mapping[str, Tensor], noise: float) -> Task:
    """The long clip's task in one round."""
    remembered = {m: known[m][frame_W] for m, frame_W in one.frames.items()}

    def cut(given: Given) -> Given:
        marks = {
            m: _remembering(given.marks.get(m), one.sample.tracks[m], frame_W, remembered[m], noise)
            for m, frame_W in one.frames.items()
        }
        return replace(given, marks=marks)

    return Task(
        one.sample,
        one.text,
        {m: task.noise[m][:, frame_W] for m, frame_W in one.frames.items()},
        one.negative,
        cut(task.given),
        Values({m: clean[m][:, frame_W] for m, frame_W in one.frames.items()}, task.clean.references),
        {name: cut(given) for name, given in task.without.items()},
    )


def _remembering(
    marks: Marks | None, geometry: Geometry, frame_W: Tensor, known_W: Tensor, noise: float
) -> Marks:
    """What conditions give of some frames, and besides those that are known, shown at level ``noise``."""
    cells, device = geometry.cells, geometry.device
    if marks is None:
        marks = Marks((), torch.zeros(1, len(frame_W) * cells, dtype=torch.long, device=device))
    else:
        token_N = (frame_W[:, None] * cells + torch.arange(cells, device=device)).flatten()
        marks = replace(marks, kind_BN=marks.kind_BN[:, token_N])
    known_1N = known_W.repeat_interleave(cells)[None]
    return marks.and_given(known_1N, Kind(1.0, 1.0 - noise))


# Extension


def _extension(
    model: Model, request: ClipRequest, task: Task, shots: Sequence[int], how: Extension
) -> list[Round]:
    _, height, width = request_shape(model, request)
    usual = model.sample((how.window,), height, width, task.sample.fps or model.fps, 1).main.grid[0]
    head = int(head_alone(model))
    total = task.sample.main.grid[0]
    parts = windows(total, usual, how.keep, head, backwards=how.direction == "backwards")
    found = []
    for part in parts:
        sample, frames = window(task.sample, part, head)
        found.append(Round(sample, frames, task.text, task.negative))
    return found


def most_kept(window: int, head: int) -> int:
    """How many token frames a round of so many can be given at most."""
    return window - head - 1


def windows(total: int, window: int, keep: int | None, head: int, *, backwards: bool) -> list[slice]:
    """Which token frames of a long clip each round lays out.

    Args:
        total: token frames of the long clip.
        window: of a clip as usual.
        keep: of what is known in each further round; None: half of those it can hold.
        head: how many frames at a clip's beginning are of another kind, which only a round there can hold.

    Raises:
        UserError: so many are kept that a round makes nothing.
    """
    most = most_kept(window, head)
    keep = max(1, (window - head) // 2) if keep is None else keep
    if total > window and not 0 < keep <= most:
        raise UserError(
            f"extend.keep {keep} leaves nothing to make in a round of {window} latent frames"
            f"{', whose first stands apart' if head else ''}: "
            + (f"keep at most {most}" if most > 0 else "ask for a longer clip (--frames)")
        )
    new = window - head - keep
    if total <= window:
        return [slice(0, total)]
    if backwards:
        begin = total - (window - head)
        found = [slice(begin, total)]
        while begin > 0:
            # A round at the beginning holds the head as well.
            take = begin if begin <= window - keep else new
            found.append(slice(begin - take, begin + keep))
            begin -= take
        return found
    found, end = [slice(0, window)], window
    while end < total:
        found.append(slice(end - keep, min(end + new, total)))
        end += new
    return found


# Scenes


def _expansion(
    model: Model, request: ClipRequest, task: Task, shots: Sequence[int], how: Memory
) -> list[Round]:
    _, height, width = request_shape(model, request)
    scenes = {m: geometry.scene_BF[0] for m, geometry in task.sample.tracks.items()}
    whole = {m: _given_whole(task, m) for m in scenes}
    known = [z for z in range(len(shots)) if all(bool(whole[m][scenes[m] == z].all()) for m in scenes)]
    captions = list(request.scenes[0]) if request.scenes else [request.prompts[0]]
    near_ZZ = _similarity(model, captions) if how.policy == "similar" else None
    found = []
    for scene in [z for z in range(len(shots)) if z not in known]:
        remembered = chosen(how, scene, known, None if near_ZZ is None else near_ZZ[scene])
        shown = sorted([*remembered, scene])
        sample = model.sample(
            [shots[z] for z in shown], height, width, task.sample.fps or model.fps, task.sample.batch
        )
        frames = {m: torch.cat([(scenes[m] == z).nonzero().flatten() for z in shown]) for m in scenes}
        said = replace(
            request,
            scenes=tuple(tuple(one[z] for z in shown) for one in request.scenes),
            shots=tuple(shots[z] for z in shown),
        )
        text, negative = request_text(model, said)
        found.append(Round(replace(sample, references=task.sample.references), frames, text, negative))
        known = sorted([*known, scene])
    return found


def chosen(how: Memory, scene: int, known: Sequence[int], near_Z: Tensor | None = None) -> list[int]:
    """The scenes that one is shown, in order.

    Args:
        known: scenes that are there already, in order.
        near_Z: how near their captions are to the scene's own; needed by ``similar``.
    """
    if how.policy == "all":
        return list(known)
    if how.policy == "similar":
        assert near_Z is not None
        # Of equally near ones the later: it shows what happened since.
        nearest = sorted(known, key=lambda z: (float(near_Z[z]), z), reverse=True)
        return sorted(nearest[: how.keep])
    before = [z for z in known if z < scene]
    last = before[-how.keep :]
    return sorted({*before[:1], *last}) if how.policy == "first_last" else last


def _similarity(model: Model, captions: Sequence[str]) -> Tensor:
    """(Z, Z) cosines between the mean embeddings of captions."""
    texts = [model.encode_text([[caption]]) for caption in captions]
    mean_ZC = torch.cat([text.x_BLC[:, text.valid_BL[0]].float().mean(dim=1) for text in texts])
    # Rounded, so that captions of the same words are equally near whatever their order.
    return cosine_similarity(mean_ZC[:, None], mean_ZC[None], dim=-1).round(decimals=4)
