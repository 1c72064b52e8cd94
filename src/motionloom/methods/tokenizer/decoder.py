"""VTP's second stage: the encoder is frozen, and the decoder learns to make what a judge takes for real
(arXiv 2512.13687, 3.3; the judge after VQGAN, arXiv 2012.09841, for the paper does not describe its own).

Latents stay what they were, so what was trained on them goes on working.

Shapes: B clips, P pixel frames.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from motionloom.config.recipe import Recipe
from motionloom.data.batch import Batch
from motionloom.methods.tokenizer.adversarial import (
    LeCam,
    PatchDiscriminator,
    adaptive_weight,
    hinge_discriminator,
    hinge_generator,
    r1,
)
from motionloom.methods.tokenizer.pixels import frames
from motionloom.methods.tokenizer.pretrain import Reconstruction
from motionloom.parallel import Ranks
from motionloom.rng import torch_generator
from motionloom.tokenizers.vtp import VTPModel
from motionloom.train.method import Losses, StepContext
from motionloom.train.optim import adamw, make_optimizer


class FinetuneDecoder:
    """Two turns a step: the decoder's, then the judge's: ``train.method: decoder``.

    Args:
        model: in place on its device; everything but its pixel decoder is frozen here.
    """

    def __init__(self, recipe: Recipe, model: VTPModel, ranks: Ranks) -> None:
        c, t = recipe.vtp, recipe.train
        self._config, self._model, self._ranks = c, model, ranks
        model.requires_grad_(False)
        model.pixel_decoder.requires_grad_(True)
        self._reconstruction = Reconstruction(c, ranks.device)
        self._judge = PatchDiscriminator(c.gan_layers, c.gan_width, c.gan_temporal)
        self._judge.init_weights(torch_generator(recipe.seed, "discriminator"))
        self._judge.to(ranks.device)
        self._lecam = LeCam().to(ranks.device)
        self._optimizers: dict[str, torch.optim.Optimizer] = {
            "decoder": make_optimizer({"vtp": model}, t),
            # It has no blocks, which another optimiser would ask for.
            "discriminator": adamw({"discriminator": self._judge}, c.gan_lr or t.lr, t.betas, t.weight_decay),
        }

    def modules(self) -> dict[str, nn.Module]:
        """``vtp``, whole."""
        return {"vtp": self._model}

    def beside(self) -> dict[str, nn.Module]:
        """The judge, and the averages of its words."""
        return {"discriminator": self._judge, "lecam": self._lecam}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """``decoder`` and ``discriminator``."""
        return self._optimizers

    def turns(self, step: int) -> tuple[str, ...]:
        """Both, always: a judge that does not count yet learns."""
        return ("decoder", "discriminator")

    def losses(self, batch: Batch, context: StepContext) -> Losses:
        """As :class:`~motionloom.train.method.Method`. Held out, the figure is the reconstruction's."""
        real_BP3HW = frames(batch)
        with torch.no_grad():
            z = self._model.latents(self._model.trunk(real_BP3HW))
        if context.turn == "discriminator" and context.phase == "train":
            with torch.no_grad():
                made_BP3HW = self._model.pixel_decoder(z)
            return self._judged(made_BP3HW, real_BP3HW, context)
        made_BP3HW = self._model.pixel_decoder(z)
        loss_B, logs = self._reconstruction(made_BP3HW, real_BP3HW)
        if context.phase == "train" and context.step >= self._config.gan_start:
            said_B = hinge_generator(self._judge(made_BP3HW))
            weight = self._config.gan * self._balance(loss_B.mean(), said_B.mean(), real_BP3HW.shape[1])
            logs |= {"gan": said_B.detach().mean(), "gan_weight": weight}
            loss_B = loss_B + weight * said_B
        return Losses(loss_B, num_tokens=z.shape[:4].numel(), logs=logs)

    def _balance(self, rebuilt: Tensor, said: Tensor, frames_in: int) -> Tensor:
        """By how much the judge counts at the last layer, which the first frame has to itself."""
        if not self._config.gan_adaptive:
            return rebuilt.new_ones(())
        decoder = self._model.pixel_decoder
        later = decoder.proj_out_later
        last = decoder.proj_out if later is None or frames_in == 1 else later
        return adaptive_weight(rebuilt, said, last.weight, self._ranks)

    def _judged(self, made_BP3HW: Tensor, real_BP3HW: Tensor, context: StepContext) -> Losses:
        c = self._config
        real, fake = self._judge(real_BP3HW), self._judge(made_BP3HW)
        loss_B = hinge_discriminator(real, fake)
        logs = {"real": real.detach().float().mean(), "made": fake.detach().float().mean()}
        if c.gan_lecam:
            if not context.rehearsal:
                self._lecam.update(real, fake, self._ranks)
            loss_B = loss_B + c.gan_lecam * self._lecam(real, fake)
        if c.gan_r1:
            slope_B = r1(self._judge, real_BP3HW)
            logs["r1"] = slope_B.detach().mean()
            loss_B = loss_B + 0.5 * c.gan_r1 * slope_B
        return Losses(loss_B, logs=logs)
