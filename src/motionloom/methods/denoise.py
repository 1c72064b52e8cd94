"""Denoising: predict the velocity of noisy tokens. Full training of any backbone under any plan.

Shapes: B batch, F latent frames, H x W latent cells; T token frames, S cells of a frame, N = T x S tokens;
C channels; L text tokens; D independent noise levels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motionloom.backbones.base import Backbone
from motionloom.backbones.prediction import Predictor
from motionloom.config.recipe import Recipe
from motionloom.data.batch import Batch, dropped_captions
from motionloom.data.sample import batch_sample
from motionloom.errors import UserError
from motionloom.methods.objective import objective
from motionloom.methods.references import reference_tokens
from motionloom.nn.patching import patchify
from motionloom.plans import (
    Layout,
    Plan,
    Stream,
    Streams,
    Text,
    Values,
    to_streams,
)
from motionloom.plans.tokens import ByModality
from motionloom.text.base import TextEncoder, drop_captions, encode_scenes
from motionloom.train.method import Losses, StepContext
from motionloom.train.optim import make_optimizer


class Denoise:
    """One optimiser, one turn. Build it after ``parallel.parallelize``: it makes its optimiser at once.

    Args:
        backbone: an ``nn.Module`` as well.
        text_encoder: needed when it is trained; its embeddings then come from it and not from the cache.
    """

    def __init__(
        self,
        recipe: Recipe,
        backbone: Backbone,
        plan: Plan,
        text_encoder: TextEncoder | None = None,
    ) -> None:
        self._plan = plan
        self._fps = recipe.video.fps / recipe.video.frame_stride
        self._modalities = recipe.plan.modalities
        self._patch = backbone.patch
        self._caption_dropout = recipe.train.cfg_dropout_prob
        # A backbone with dropout draws its masks from a generator that it is lent for each step.
        self._masks = backbone.dropout if recipe.model.dropout > 0 else None  # type: ignore[attr-defined]
        self._direction = recipe.flow_matching.direction
        self._objective = objective(recipe, getattr(backbone, "schedule", None))
        self._predictor = Predictor(backbone, recipe.model.prediction, self._objective.path)
        self._text_encoder = text_encoder if text_encoder is not None and text_encoder.trainable else None
        assert isinstance(backbone, nn.Module)
        self._modules: dict[str, nn.Module] = {"backbone": backbone}
        if self._text_encoder is not None:
            assert isinstance(self._text_encoder, nn.Module)
            self._modules["text_encoder"] = self._text_encoder
        t = recipe.train
        self._optimizers: dict[str, torch.optim.Optimizer] = {"denoise": make_optimizer(self._modules, t)}

    def modules(self) -> dict[str, nn.Module]:
        """``backbone``, and ``text_encoder`` when it is trained."""
        return self._modules

    def beside(self) -> dict[str, nn.Module]:
        """Nothing else is trained."""
        return {}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """One AdamW over both."""
        return self._optimizers

    def turns(self, step: int) -> tuple[str, ...]:
        """Always the same one."""
        return ("denoise",)

    def losses(self, batch: Batch, context: StepContext) -> Losses:
        """Weighted mean squared velocity error of each sample over its counted tokens, and of its direction
        where the recipe asks for that.

        Of several modalities each has a mean of its own; they are added by the weights of the plan. A sample
        that the draw of conditions leaves nothing of is made whole, a silent clip whose film was given among
        them: ``given_whole`` in the logs is their share of the batch. ``nothing_to_learn`` is the share of
        samples without any token that counts, whose loss is 0.

        Raises:
            UserError: the cache holds no text embeddings and no text encoder is trained, or the conditions
                speak of what the data has not.
        """
        text = self._text(batch, context)
        sample = batch_sample(batch, self._patch, self._fps, self._modalities)
        given = self._plan.conditions.draw(sample, context.generator("given"))
        layout = self._plan.layout(sample, text, given)
        path = self._objective.path
        clean = {m: patchify(batch.latents[m].x_BFHWC, self._patch_of(m)) for m in layout.tracks}
        noise = {m: context.randn(x, _purpose("noise", m)) for m, x in clean.items()}
        references = reference_tokens(batch, given, context, self._patch, path.mix)
        values = Values(clean, {m: references[m] for m in layout.tracks if m in references})
        sigma = {}
        for m, track in layout.tracks.items():
            shape = (len(batch.ids), track.num_draws)
            draws_BD = self._objective.draw(shape, context.generator(_purpose("sigma", m)))
            sigma[m] = track.sigmas(draws_BD.to(clean[m].device))
        streams = to_streams(layout, values, noise, sigma, text, path.mix)
        if self._masks is not None:
            self._masks.generator = context.device_generator("dropout")
        logs = {} if given.freed_B is None else {"given_whole": given.freed_B.float().mean()}
        return self._score(layout, streams, clean, noise, logs)

    def _score(
        self,
        layout: Layout,
        streams: Streams,
        clean: ByModality,
        noise: ByModality,
        logs: dict[str, Tensor],
    ) -> Losses:
        velocity = self._predictor.velocity(streams, layout.visibility)
        found = {
            m: self._error(layout, streams[m], m, velocity[m], clean[m], noise[m]) for m in layout.tracks
        }
        loss_B = sum(track.loss * found[m].loss_B for m, track in layout.tracks.items())
        learns_B = torch.stack([part.learns_B for part in found.values()]).any(dim=0)
        main = found[layout.main]
        logs["nothing_to_learn"] = (~learns_B).float().mean()
        if len(found) > 1:
            logs |= {f"loss_{m}": part.loss_B.mean().detach() for m, part in found.items()}
        assert isinstance(loss_B, Tensor)
        return Losses(
            loss_B=loss_B,
            sigma_B=torch.where(main.learns_B, main.sigma_B, -1.0),
            num_tokens=sum(streams[m].x_BNC.shape[0] * streams[m].x_BNC.shape[1] for m in found),
            logs=logs,
        )

    def _error(
        self,
        layout: Layout,
        stream: Stream,
        modality: str,
        velocity_BNC: Tensor,
        clean_BFSC: Tensor,
        noise_BFSC: Tensor,
    ) -> _Error:
        """One modality's loss. Only the clip's own tokens can count; what stands before them is context."""
        tokens = layout.tracks[modality].geometry.tokens
        velocity_BNC = velocity_BNC[:, velocity_BNC.shape[1] - tokens :]
        sigma_BN = stream.sigma_BN[:, stream.level_BN.shape[1] - tokens :]
        clean_BNC, noise_BNC = clean_BFSC.flatten(1, 2), noise_BFSC.flatten(1, 2)
        target_BNC = self._objective.path.velocity(clean_BNC, noise_BNC, sigma_BN)
        error_BN = (velocity_BNC.float() - target_BNC.float()).square().mean(dim=-1)
        error_BN = error_BN * self._objective.weight(sigma_BN)
        if self._direction:
            cells = math.prod(self._patch_of(modality))
            error_BN = error_BN + self._direction * direction_error(velocity_BNC, target_BNC, cells)
        counted_BN = stream.loss_BN[:, stream.loss_BN.shape[1] - tokens :].expand(error_BN.shape)
        total_B = counted_BN.sum(dim=1)
        per_sample_B = total_B.clamp_min(1e-6)
        return _Error(
            (error_BN * counted_BN).sum(dim=1) / per_sample_B,
            (sigma_BN * counted_BN).sum(dim=1) / per_sample_B,
            total_B > 0,
        )

    def _patch_of(self, modality: str) -> tuple[int, int, int]:
        return self._patch if modality == "video" else (1, 1, 1)

    def _text(self, batch: Batch, context: StepContext) -> Text:
        """The captions' embeddings; a dropped caption is the empty one in every scene of its sample."""
        draw_B = torch.rand(len(batch.ids), generator=context.generator("caption dropout"))
        drop_B = draw_B < (self._caption_dropout if context.phase == "train" else 0.0)
        if self._text_encoder is not None:
            return encode_scenes(self._text_encoder, *dropped_captions(batch, drop_B.tolist()))
        if batch.text is None or batch.empty_text is None:
            raise UserError(
                "the cache holds no text embeddings and text_encoder.trainable is false: "
                "make it again with this recipe (motionloom cache)"
            )
        return drop_captions(batch.text, batch.empty_text, drop_B)


class _Error(NamedTuple):
    """A modality's loss, mean noise level and whether anything counts, (B,) each."""

    loss_B: Tensor
    sigma_B: Tensor
    learns_B: Tensor


def direction_error(velocity_BNC: Tensor, target_BNC: Tensor, cells: int) -> Tensor:
    """1 - cosine between predicted and true velocity over the channels of each of a token's latent cells,
    their mean, (B, N): the velocity direction loss of LightningDiT (2501.01423, section 4)."""
    v, target = (t.float().unflatten(-1, (cells, -1)) for t in (velocity_BNC, target_BNC))
    return (1 - F.cosine_similarity(v, target, dim=-1)).mean(dim=-1)


def _purpose(what: str, modality: str) -> str:
    """Video alone draws what it drew before there was sound."""
    return what if modality == "video" else f"{what} {modality}"
