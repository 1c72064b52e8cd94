"""What student, teacher and critic have in common: a batch as a plan speaks of it, and clean estimates.

Shapes: B batch, F token frames, S cells of a frame, C channels; K noise levels of a layout, D its draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from motionloom.backbones.prediction import Predictor
from motionloom.data.batch import Batch, dropped_captions
from motionloom.data.sample import batch_sample
from motionloom.errors import UserError
from motionloom.flow import PATHS
from motionloom.generate import Model
from motionloom.generate.task import Tokens
from motionloom.methods.references import reference_tokens
from motionloom.nn.patching import patchify
from motionloom.plans import Given, Layout, Sample, Text, Values, read_clip, to_streams_at
from motionloom.plans.layout import Track
from motionloom.plans.tokens import clip_sigma
from motionloom.text.base import TextEncoder, encode_scenes
from motionloom.train.method import StepContext


@dataclass(frozen=True)
class Guess:
    """What a network takes for clean in one modality."""

    clean_BFSC: Tensor
    velocity_BFSC: Tensor
    weight_BFS: Tensor
    """What each token counts: 0 for what is given or missing, and for what stood at noise level 0."""
    sigma_BFS: Tensor


def guess(
    predictor: Predictor,
    layout: Layout,
    values: Values,
    x: Mapping[str, Tensor],
    levels: Mapping[str, Tensor],
    noise: Mapping[str, Tensor],
    text: Text,
) -> dict[str, Guess]:
    """One forward over whole clips.

    Args:
        values: what given tokens, clean copies and references show.
        x: states at the levels.
        levels: (B, K) by modality.
        noise: what given tokens are mixed with where they are shown at a noise level.
    """
    mix = predictor.path.mix
    streams = to_streams_at(layout, values, x, noise, levels, text, mix)
    out = predictor.velocity(streams, layout.visibility)
    found = {}
    for m in layout.tracks:
        stream, v_BFSC = streams[m], read_clip(layout, m, out[m])
        state_BFSC = read_clip(layout, m, stream.x_BNC)
        sigma_BFS, weight_BFS = (
            read_clip(layout, m, t_BN[..., None])[..., 0] for t_BN in (stream.sigma_BN, stream.loss_BN)
        )
        weight_BFS = weight_BFS * (sigma_BFS > 0)
        clean_BFSC = predictor.path.to_clean(state_BFSC, v_BFSC, sigma_BFS)
        found[m] = Guess(clean_BFSC, v_BFSC, weight_BFS, sigma_BFS)
    return found


def noised(
    predictor: Predictor,
    layout: Layout,
    clean: Mapping[str, Tensor],
    draws: Tensor,
    noise: Mapping[str, Tensor],
) -> tuple[Tokens, dict[str, Tensor]]:
    """Noised clips and the levels of their layout.

    Args:
        draws: (B, D) independent levels, or (B, 1): one for all.
    """
    x, levels = {}, {}
    for m, track in layout.tracks.items():
        levels[m] = track.sigmas(fitted(draws, track).to(clean[m].device))
        x[m] = predictor.path.mix(clean[m], noise[m], clip_sigma(track, levels[m], clean[m]))
    return x, levels


def fitted(draws: Tensor, track: Track) -> Tensor:
    """(B, D) levels for one track: one for all is repeated, and what it has no use for is left out."""
    return draws.expand(-1, track.num_draws) if draws.shape[1] == 1 else draws[:, : track.num_draws]


@dataclass(frozen=True)
class Asked:
    """A batch as a plan speaks of it."""

    batch: Batch
    sample: Sample
    clean: Tokens
    """The batch's own clips."""
    given: Given
    text: Text
    """The student's."""
    references: Mapping[str, tuple[Tensor, ...]]

    def values(self, clean: Mapping[str, Tensor]) -> Values:
        """Clips, beside the batch's references."""
        return Values(clean, self.references)


@dataclass(frozen=True)
class Pupil:
    """The student: what is trained."""

    model: Model

    def ask(self, batch: Batch, context: StepContext) -> Asked:
        """A batch, with what of it is given and the words that the student reads.

        Raises:
            UserError: the cache holds no text embeddings and no text encoder is trained, or the conditions
                speak of what the data has not.
        """
        model = self.model
        sample = batch_sample(batch, model.patch, model.fps, model.modalities)
        given = model.plan.conditions.draw(sample, context.generator("given"))
        clean = {
            m: patchify(batch.latents[m].x_BFHWC, model.patch if m == "video" else (1, 1, 1))
            for m in sample.tracks
        }
        mix = model.predictor.path.mix
        references = reference_tokens(batch, given, context, model.patch, mix)
        return Asked(batch, sample, clean, given, batch_text(model.text_encoder, batch), references)

    def noise(self, like: Mapping[str, Tensor], context: StepContext, purpose: str) -> Tokens:
        """Standard normal noise for every modality."""
        return {m: context.randn(x, f"{purpose} {m}") for m, x in like.items()}


@dataclass
class Teacher:
    """A frozen model, guided: what judges, and whose steps are learned from.

    Args:
        scale: of guidance, as u + scale (c - u).
        negative: the text of u.
    """

    model: Model
    scale: float = 1.0
    negative: str = ""
    _negatives: dict[tuple[int, ...], Text] = field(default_factory=dict, repr=False)

    def text(self, batch: Batch) -> Text:
        """The captions as the teacher reads them."""
        return batch_text(self.model.text_encoder, batch)

    def against(self, batch: Batch) -> Text:
        """What guidance pushes away from, laid out as the captions of a batch."""
        scenes, whole = max(map(len, batch.captions)), batch.global_captions is not None
        if self.negative == "" and batch.empty_text is not None and not self.model.text_encoder.trainable:
            return batch.empty_text
        key = (len(batch.ids), scenes, int(whole))
        if key not in self._negatives:
            said = [[self.negative] * scenes] * len(batch.ids)
            found = encode_scenes(self.model.text_encoder, said, [""] * len(batch.ids) if whole else None)
            self._negatives[key] = _to(found, self.model.device)
        return self._negatives[key]

    def draws(self, asked: Asked) -> int:
        """How many noise levels of its own a clip has for this teacher."""
        layout = self.model.plan.layout(asked.sample, self.text(asked.batch), asked.given)
        return max(track.num_draws for track in layout.tracks.values())

    def guess(
        self,
        asked: Asked,
        sample: Sample,
        clean: Mapping[str, Tensor],
        draws: Tensor,
        noise: Mapping[str, Tensor],
        x: Mapping[str, Tensor] | None = None,
        *,
        graph: bool = False,
    ) -> dict[str, Guess]:
        """The guided clean estimate of clips at noise levels.

        Args:
            sample: where their tokens stand; the batch's own, or a part of a longer one.
            clean: the clips.
            x: their noised states, if they are not ``clean`` mixed with ``noise``.
            graph: for losses that learn through it, where gradients are on.
        """
        with torch.set_grad_enabled(graph and torch.is_grad_enabled()):
            predictor, plan = self.model.predictor, self.model.plan
            text = self.text(asked.batch)
            layout = plan.layout(sample, text, asked.given)
            states, levels = noised(predictor, layout, clean, draws, noise)
            states = states if x is None else dict(x)
            values = asked.values(clean)
            cond = guess(predictor, layout, values, states, levels, noise, text)
            if self.scale == 1:
                return cond
            against = self.against(asked.batch)
            layout = plan.layout(sample, against, asked.given)
            uncond = guess(predictor, layout, values, states, levels, noise, against)
            return {m: _guided(cond[m], uncond[m], self.scale) for m in cond}


def _guided(cond: Guess, uncond: Guess, scale: float) -> Guess:
    # Clean estimates and velocities of one state are tied by a line, so both are guided alike.
    return replace(
        cond,
        clean_BFSC=torch.lerp(uncond.clean_BFSC, cond.clean_BFSC, scale),
        velocity_BFSC=torch.lerp(uncond.velocity_BFSC, cond.velocity_BFSC, scale),
    )


def batch_text(encoder: TextEncoder, batch: Batch) -> Text:
    """The captions of a batch: embedded by an encoder that was trained, else from the cache.

    Raises:
        UserError: the cache holds no embeddings.
    """
    if encoder.trainable:
        device = next(iter(batch.latents.values())).x_BFHWC.device
        return _to(encode_scenes(encoder, *dropped_captions(batch, [False] * len(batch.ids))), device)
    if batch.text is None:
        raise UserError(
            "the cache holds no text embeddings and the text encoder is not a trained one: make it again "
            "with this recipe (motionloom cache)"
        )
    return batch.text


def _to(text: Text, device: torch.device) -> Text:
    context = None if text.context_BL is None else text.context_BL.to(device)
    return Text(text.x_BLC.to(device), text.valid_BL.to(device), text.scene_BL.to(device), context)


def same_path(student: Model, teacher: Model, key: str = "teacher") -> None:
    """Raises UserError where two models mean different things by a noise level.

    Args:
        key: of ``distil``, which names the second.
    """
    paths = [PATHS[model.recipe.flow_matching.path].name for model in (student, teacher)]
    if paths[0] != paths[1]:
        raise UserError(f"flow_matching.path {paths[0]} is not that of distil.{key} ({paths[1]}): use that")


def shared_draw(context: StepContext, purpose: str, low: int, high: int) -> int:
    """An integer in [low, high) that is the same on all ranks: they must run the same network calls."""
    generator = replace(context, rank=0).generator(purpose)
    return int(torch.randint(low, high, (), generator=generator))


def table_draws(
    table: Sequence[float], shape: tuple[int, int], context: StepContext
) -> tuple[Tensor, Tensor]:
    """(indices, levels) of shape (B, D), each draw even over the table."""
    index_BD = torch.randint(len(table), shape, generator=context.generator("level"))
    return index_BD, torch.tensor(table)[index_BD]
