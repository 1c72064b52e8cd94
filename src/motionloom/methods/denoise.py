"""Denoising: predict the velocity of noisy tokens. Full training of any backbone under any plan.

Shapes: B batch, F latent frames, H x W latent cells; T token frames, S cells of a frame, N = T x S tokens;
C channels; L text tokens; D independent noise levels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from motionloom.backbones.base import Backbone
from motionloom.backbones.prediction import Predictor
from motionloom.config.recipe import Recipe
from motionloom.data.batch import Batch
from motionloom.errors import UserError
from motionloom.methods.objective import objective
from motionloom.nn.patching import patchify
from motionloom.plans import Layout, Plan, Streams, Text, to_streams
from motionloom.plans.geometry import token_geometry
from motionloom.text.base import TextEncoder, encode_scenes
from motionloom.tokenizers.base import TokenizerSpec
from motionloom.train.method import Losses, StepContext
from motionloom.train.muon import OPTIMIZERS


class Denoise:
    """One optimiser, one turn. Build it after ``parallel.parallelize``: it makes its optimiser at once.

    Args:
        backbone: an ``nn.Module`` as well.
        spec: of the tokenizer that made the latents.
        text_encoder: needed when it is trained; its embeddings then come from it and not from the cache.
    """

    def __init__(
        self,
        recipe: Recipe,
        backbone: Backbone,
        plan: Plan,
        spec: TokenizerSpec,
        text_encoder: TextEncoder | None = None,
    ) -> None:
        self._plan, self._spec = plan, spec
        self._patch = backbone.patch
        self._caption_dropout = recipe.train.cfg_dropout_prob
        # A backbone with dropout draws its masks from a generator that it is lent for each step.
        self._masks = backbone.dropout if recipe.model.dropout > 0 else None  # type: ignore[attr-defined]
        self._objective = objective(recipe, getattr(backbone, "schedule", None))
        self._predictor = Predictor(backbone, recipe.model.prediction, self._objective.path)
        self._text_encoder = text_encoder if text_encoder is not None and text_encoder.trainable else None
        assert isinstance(backbone, nn.Module)
        self._modules: dict[str, nn.Module] = {"backbone": backbone}
        if self._text_encoder is not None:
            assert isinstance(self._text_encoder, nn.Module)
            self._modules["text_encoder"] = self._text_encoder
        t = recipe.train
        self._optimizers: dict[str, torch.optim.Optimizer] = {
            "denoise": OPTIMIZERS[t.optimizer](self._modules, t.lr, t.betas, t.weight_decay)
        }

    def modules(self) -> dict[str, nn.Module]:
        """``backbone``, and ``text_encoder`` when it is trained."""
        return self._modules

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """One AdamW over both."""
        return self._optimizers

    def turns(self, step: int) -> tuple[str, ...]:
        """Always the same one."""
        return ("denoise",)

    def losses(self, batch: Batch, context: StepContext) -> Losses:
        """Weighted mean squared velocity error of each sample over its counted tokens.

        A sample whose every frame is given has nothing to learn: its loss is 0, and ``fully_given`` in the
        logs is their share of the batch.

        Raises:
            UserError: the cache holds no text embeddings and no text encoder is trained.
        """
        text = self._text(batch, context)
        layout = self._layout(batch, text, context)
        clean_BFSC = patchify(batch.video.x_BFHWC, self._patch)
        device, path = clean_BFSC.device, self._objective.path
        noise_BFSC = torch.randn(clean_BFSC.shape, generator=context.device_generator("noise"), device=device)
        sigma_BD = self._objective.draw((len(batch.ids), layout.num_draws), context.generator("sigma"))
        levels_BK = layout.levels(sigma_BD.to(device))
        streams = to_streams(layout, clean_BFSC, noise_BFSC, levels_BK, text, path.mix)
        target_BNC = path.velocity(
            clean_BFSC[:, layout.frame_T].flatten(1, 2),
            noise_BFSC[:, layout.frame_T].flatten(1, 2),
            streams["video"].sigma_BN,
        )
        if self._masks is not None:
            self._masks.generator = context.device_generator("dropout")
        return self._score(layout, streams, target_BNC)

    def _score(self, layout: Layout, streams: Streams, target_BNC: Tensor) -> Losses:
        video = streams["video"]
        velocity_BNC = self._predictor.velocity(streams, layout.visibility)["video"]
        error_BN = (velocity_BNC.float() - target_BNC.float()).square().mean(dim=-1)
        sigma_BN = video.sigma_BN
        counted_BN = video.loss_BN.expand(error_BN.shape)
        total_B = counted_BN.sum(dim=1)
        per_sample_B = total_B.clamp_min(1e-6)
        loss_B = (error_BN * self._objective.weight(sigma_BN) * counted_BN).sum(dim=1) / per_sample_B
        learns_B = total_B > 0
        sigma_B = torch.where(learns_B, (sigma_BN * counted_BN).sum(dim=1) / per_sample_B, -1.0)
        return Losses(
            loss_B=loss_B,
            sigma_B=sigma_B,
            num_tokens=error_BN.numel(),
            logs={"fully_given": (~learns_B).float().mean()},
        )

    def _layout(self, batch: Batch, text: Text, context: StepContext) -> Layout:
        size, grid = len(batch.ids), batch.video.x_BFHWC.shape[1:4]
        geometry = token_geometry(
            (grid[0], grid[1], grid[2]),
            self._patch,
            batch.video.seconds_BF,
            batch.video.scene_BF,
            self._spec.spatial,
            size,
        )
        given_BT = self._plan.draw_given(geometry, context.generator("given"))
        return self._plan.layout(geometry, text, given_BT)

    def _text(self, batch: Batch, context: StepContext) -> Text:
        """The captions' embeddings; a dropped caption is the empty one in every scene of its sample."""
        draw_B = torch.rand(len(batch.ids), generator=context.generator("caption dropout"))
        drop_B = draw_B < (self._caption_dropout if context.phase == "train" else 0.0)
        if self._text_encoder is not None:
            dropped = zip(batch.captions, drop_B.tolist(), strict=True)
            return encode_scenes(self._text_encoder, [[""] * len(c) if drop else c for c, drop in dropped])
        if batch.text is None or batch.empty_text is None:
            raise UserError(
                "the cache holds no text embeddings and text_encoder.trainable is false: "
                "make it again with this recipe (motionloom cache)"
            )
        return _drop(batch.text, batch.empty_text, batch.captions, drop_B)


def _drop(text: Text, empty: Text, captions: list[list[str]], drop_B: Tensor) -> Text:
    """``empty`` (batch 1) in the place of dropped captions; scenes that a sample lacks stay padding."""
    device = text.x_BLC.device
    scenes = max(len(sample) for sample in captions)
    exists_BS = torch.tensor([[i < len(sample) for i in range(scenes)] for sample in captions]).to(device)
    exists_BL = exists_BS.repeat_interleave(text.valid_BL.shape[1] // scenes, dim=1)
    drop_B1 = drop_B.to(device)[:, None]
    return Text(
        torch.where(drop_B1[..., None], empty.x_BLC.float(), text.x_BLC.float()),
        torch.where(drop_B1, empty.valid_BL & exists_BL, text.valid_BL),
        text.scene_BL,
    )
