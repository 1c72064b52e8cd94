"""VTP's pre-training: one encoder learns to rebuild pixels, to agree with captions, and to agree with its own
average (arXiv 2512.13687, 3).

The loss is rec * (l1 * L1 + perceptual) + clip * contrast + ssl * (DINO + iBOT + KoLeo); a weight of 0 takes
a part out, and what it alone needs with it. All captions of the batch are contrasted; random parts of the
batch are rebuilt and distilled. Contrast and self-distillation read the encoder before the bottleneck, which
is trained by reconstruction alone (``vision_bottleneck_ae_only`` in the released models).

Shapes: B clips, P pixel frames, F latent frames, N patches, D width, E shared space; G global and L local
crops; K prototypes, M masked patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from motionloom.config.recipe import Recipe
from motionloom.config.vtp import VtpConfig
from motionloom.data.batch import Batch
from motionloom.methods.tokenizer import contrast, self_distil
from motionloom.methods.tokenizer.bag import BagOfWords
from motionloom.methods.tokenizer.crops import Crops, CropSpec, Masks, block_masks, multi_crop
from motionloom.methods.tokenizer.near import NearCaptions
from motionloom.methods.tokenizer.perceptual import Perceptual
from motionloom.methods.tokenizer.pixels import Share, captions, frames, latent_cells, unit_frames
from motionloom.methods.tokenizer.self_distil import Centre, DinoHead, Teacher
from motionloom.parallel import Ranks
from motionloom.rng import torch_generator
from motionloom.tokenizers.vtp import VTPModel, Words
from motionloom.tokenizers.vtp.layers import Drop
from motionloom.tokenizers.vtp.tokenizer import normalise, unit_pixels
from motionloom.tokenizers.vtp.towers import Features
from motionloom.train.method import Losses, StepContext
from motionloom.train.optim import make_optimizer

HEAD = "dino"


class Reconstruction:
    """rec * (l1, l2, perceptual) of what the decoder makes of clips."""

    def __init__(self, config: VtpConfig, device: torch.device) -> None:
        self._config = config
        self._perceptual: nn.Module | None = None
        if config.perceptual:
            self._perceptual = Perceptual(config.perceptual_net).to(device)

    def __call__(self, made_BP3HW: Tensor, real_BP3HW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Of normalised pixels: (B,) losses, weighted within but not by ``rec``; parts for the log."""
        c, made, real = self._config, made_BP3HW.float(), real_BP3HW.float()
        error = made - real
        parts = {"l1": error.abs().flatten(1).mean(dim=1)}
        total_B = c.l1 * parts["l1"]
        if c.l2:
            parts["l2"] = error.square().flatten(1).mean(dim=1)
            total_B = total_B + c.l2 * parts["l2"]
        shown, seen = (unit_pixels(x).clamp(0, 1) for x in (made, real))
        if self._perceptual is not None:
            parts["perceptual"] = self._perceptual(shown, seen)
            total_B = total_B + c.perceptual * parts["perceptual"]
        mse_B = (shown - seen).square().flatten(1).mean(dim=1).detach()
        parts["psnr"] = -10 * mse_B.clamp_min(1e-10).log10()
        return total_B, {name: part.detach().mean() for name, part in parts.items()}


class Pretrain:
    """One optimiser, one turn: ``train.method: tokenizer``.

    Args:
        model: in place on its device (``parallel.parallelize``).
        words: turns captions into the model's tokens; needed where ``vtp.clip`` is above 0.
        known: captions of the training's clips, for ``vtp.clip_near`` and ``vtp.words``.
    """

    def __init__(
        self, recipe: Recipe, model: VTPModel, words: Words | None, ranks: Ranks, known: Sequence[str] = ()
    ) -> None:
        self._config, self._model, self._words, self._ranks = recipe.vtp, model, words, ranks
        self._near: NearCaptions | None = None
        self._bag: BagOfWords | None = None
        if words is not None and (recipe.vtp.clip_near or recipe.vtp.words):
            known_TL = words(known)
            if recipe.vtp.clip_near:
                self._near = NearCaptions(known_TL, torch_generator(recipe.seed, "near captions"))
            if recipe.vtp.words:
                self._bag = BagOfWords(
                    model.config.vision_embed_dim,
                    known_TL,
                    words.size,
                    torch_generator(recipe.seed, "bag of words"),
                ).to(ranks.device)
        self._steps = recipe.train.max_steps
        self._reconstruction = Reconstruction(recipe.vtp, ranks.device) if recipe.vtp.rec else None
        self._distil = Distillation(recipe, model, ranks) if recipe.vtp.ssl else None
        trained: dict[str, nn.Module] = {"vtp": model}
        if self._distil is not None:
            trained["head"] = self._distil.head
        if self._bag is not None:
            trained["bag"] = self._bag
        t = recipe.train
        self._optimizers = {"tokenizer": make_optimizer(trained, t)}

    def modules(self) -> dict[str, nn.Module]:
        """``vtp``."""
        return {"vtp": self._model}

    def beside(self) -> dict[str, nn.Module]:
        """Of self-distillation: its head, its teacher and its centres; and the map to words."""
        found = {} if self._distil is None else self._distil.modules()
        return found if self._bag is None else {**found, "bag": self._bag}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """One over the model and the head."""
        return self._optimizers

    def turns(self, step: int) -> tuple[str, ...]:
        """Always the same one."""
        return ("tokenizer",)

    def losses(self, batch: Batch, context: StepContext) -> Losses:
        """As :class:`~motionloom.train.method.Method`; each part is in the logs by its name.

        Raises:
            UserError: contrast of one clip, frames that do not divide, or a caption without words.
        """
        c = self._config
        if c.clip and context.phase == "train" and not context.rehearsal:
            contrast.clamp_scale_(self._model.logit_scale)
        x_BP3HW = frames(batch)
        loss_B = torch.zeros(len(batch.ids), device=x_BP3HW.device)
        logs: dict[str, Tensor] = {}
        # The last held-out batch may be a clip alone, which has nothing to be told apart from.
        contrasted = bool(c.clip) and (context.phase == "train" or len(batch.ids) > 1)
        # Where both losses would have the same features of a clip, it is encoded once.
        once = contrasted and not c.rec_drop and not c.clip_drop and self._chunks(x_BP3HW) == 1
        seen = self._model.trunk(x_BP3HW) if once else None
        if self._reconstruction is not None and context.step < int(c.rec_start * self._steps):
            loss_B = loss_B + self._resting()
        elif self._reconstruction is not None:
            part_B, found = self._rebuilt(self._reconstruction, batch, x_BP3HW, seen, context)
            loss_B, logs = loss_B + c.rec * part_B, logs | found
        if contrasted:
            part_B, found = self._contrasted(batch, x_BP3HW, seen, context)
            logs |= found | {"logit_scale": self._model.logit_scale.detach().exp()}
            loss_B = loss_B + part_B
        if self._distil is not None:
            part_B, found = self._distil(batch, context)
            loss_B, logs = loss_B + c.ssl * part_B, logs | found
        return Losses(loss_B, num_tokens=latent_cells(batch, self._model.config), logs=logs)

    def _chunks(self, x_BP3HW: Tensor) -> int:
        return -(-len(x_BP3HW) // (self._config.clip_chunk or len(x_BP3HW)))

    def _resting(self) -> Tensor:
        """0, with a gradient for what reconstruction alone trains: data parallelism waits for one."""
        parts = (self._model.pixel_decoder, self._model.trunk.feature_bottleneck)
        found = [0.0 * parameter.sum() for part in parts for parameter in part.parameters()]
        return torch.stack(found).sum()

    def _rebuilt(
        self,
        reconstruction: Reconstruction,
        batch: Batch,
        x_BP3HW: Tensor,
        seen: Features | None,
        context: StepContext,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        share = Share.of(batch, self._config.rec_share, context, "rebuilt")
        x_BP3HW = x_BP3HW[share.rows]
        if seen is not None:
            features = seen.of(share.rows)
        else:
            features = self._model.trunk(x_BP3HW, drop=drop_for(self._config.rec_drop, context, "rec drop"))
        made_BP3HW = self._model.pixel_decoder(self._model.latents(features))
        loss, logs = reconstruction(made_BP3HW, x_BP3HW)
        return share.spread(loss), logs

    def _contrasted(
        self, batch: Batch, x_BP3HW: Tensor, seen: Features | None, context: StepContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What clips and captions have to say of each other: (B,) losses, weighted, and their parts."""
        assert self._words is not None
        c, tokens_BL = self._config, self._words(captions(batch))
        near_NL = self._near_to(tokens_BL, context)
        device, chunks = x_BP3HW.device, self._chunks(x_BP3HW)
        tokens_BL, near_NL = tokens_BL.to(device), None if near_NL is None else near_NL.to(device)
        chunk = -(-len(x_BP3HW) // chunks)

        def embed(n: int) -> tuple[Tensor, ...]:
            """Of a chunk's clips what stands beside texts and what words are told from; its texts."""
            rows = slice(n * chunk, (n + 1) * chunk)
            features = seen
            if features is None:
                drop = drop_for(c.clip_drop, context, f"clip drop {n}")
                features = self._model.trunk(x_BP3HW[rows], drop=drop)
            clips = self._model.clip_image(features), features.clip_BD
            texts_NL = tokens_BL[rows]
            if near_NL is None:
                return *clips, self._model.clip_text(texts_NL)
            around_NL = near_NL[rows.start * c.clip_near : rows.stop * c.clip_near]
            texts_NE = self._model.clip_text(torch.cat([texts_NL, around_NL]))
            return *clips, *texts_NE.split([len(texts_NL), len(around_NL)])

        embedded = (
            embed(0) if chunks == 1 else contrast.embed_in_chunks(embed, chunks, self._model.parameters())
        )
        image_BE, feature_BD, text_BE = embedded[:3]
        # Held-out batches are not alike on all ranks, so each contrasts its own.
        ranks = self._ranks if context.phase == "train" else contrast.ALONE
        others = contrast.Others.of(tokens_BL, near_NL, embedded[3] if near_NL is not None else None, ranks)
        loss_B = self._told_apart(image_BE, text_BE, ranks, others)
        logs = {"clip": loss_B.detach().mean()}
        loss_B = c.clip * loss_B
        if self._bag is not None:
            words_B = self._bag(feature_BD, tokens_BL)
            logs["words"] = words_B.detach().mean()
            loss_B = loss_B + c.words * words_B
        return loss_B, logs

    def _told_apart(self, image_BE: Tensor, text_BE: Tensor, ranks: Ranks, others: contrast.Others) -> Tensor:
        scale = self._model.logit_scale
        if self._config.clip_loss == "infonce":
            return contrast.info_nce(image_BE, text_BE, scale, ranks, others)
        bias = self._model.logit_bias
        assert bias is not None
        return contrast.sigmoid(image_BE, text_BE, scale, bias, ranks, others)

    def _near_to(self, tokens_BL: Tensor, context: StepContext) -> Tensor | None:
        """Held out, a caption is told apart from those of its batch alone."""
        if self._near is None or context.phase != "train":
            return None
        return self._near.draw(tokens_BL, self._config.clip_near, context.generator("near captions"))


class Distillation:
    """DINO on crops, iBOT on hidden patches and KoLeo, against the model's own average.

    The teacher follows the student at the beginning of the next step, so that a checkpoint between two steps
    holds all there is.
    """

    def __init__(self, recipe: Recipe, model: VTPModel, ranks: Ranks) -> None:
        c = recipe.vtp
        self._config, self._model, self._ranks, self._steps = c, model, ranks, recipe.train.max_steps
        self.head = DinoHead(
            model.config.vision_embed_dim, c.prototypes, c.head_hidden, c.head_bottleneck, c.head_layers
        )
        self.head.init_weights(torch_generator(recipe.seed, "dino head"))
        self.head.to(ranks.device)
        self._teacher = Teacher(model.trunk, {HEAD: self.head})
        self._centres = nn.ModuleDict()
        if c.centring == "mean":
            self._centres = nn.ModuleDict({"crops": Centre(c.prototypes), "patches": Centre(c.prototypes)})
        self._centres.to(ranks.device)
        self._crops = CropSpec(
            model.config.vision_patch_size,
            c.global_size,
            c.local_size,
            2,
            c.local_crops,
            c.global_scale,
            c.local_scale,
            c.flips,
            c.colours,
            c.blur,
        )

    def modules(self) -> dict[str, nn.Module]:
        """What a resume needs."""
        return {"head": self.head, "teacher": self._teacher, "centres": self._centres}

    def __call__(self, batch: Batch, context: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """(B,) losses, weighted within but not by ``ssl``, and their parts for the log."""
        c = self._config
        self._follow(context)
        share = Share.of(batch, c.ssl_share, context, "distilled")
        views = self._views(unit_frames(batch)[share.rows], context)
        seen = self._look(views, context)
        temperature = self_distil.teacher_temperature(
            context.step, c.teacher_warmup_steps, *c.teacher_temperature
        )
        target_GBK = self._targets("crops", seen.teacher_GBK, temperature, context)
        frames_in = seen.student_GBK.shape[1] // len(share.rows)
        # Every latent frame has a class token of its own: a frame of one crop predicts that frame of another.
        dino = self_distil.dino_loss(seen.student_GBK, seen.local_LBK, target_GBK)
        total = dino.unflatten(0, (-1, frames_in)).mean(dim=1)
        logs = {"dino": total.detach().mean()}
        if c.ibot:
            ibot = self._ibot(seen, temperature, context)
            logs["ibot"] = ibot.detach().mean()
            total = total + c.ibot * ibot
        if c.koleo:
            spread = torch.stack([self_distil.koleo(clip) for clip in seen.clip_GBD]).sum(dim=0)
            logs["koleo"] = spread.detach().mean()
            total = total + c.koleo * spread
        usage_K = target_GBK.flatten(0, 1).mean(dim=0)
        logs["prototypes"] = torch.special.entr(usage_K).sum().exp()
        return share.spread(total), logs

    def _follow(self, context: StepContext) -> None:
        """Move the teacher to where the student stands, once a step."""
        if context.phase == "train" and not context.rehearsal and context.micro == 0:
            # Weights to start from may have come after the teacher was made.
            momentum = self_distil.teacher_momentum(context.step, self._steps, self._config.momentum)
            self._teacher.update(momentum if context.step else 0.0)

    def _views(self, x_BP3HW: Tensor, context: StepContext) -> Crops:
        shown = self._config.ssl_frames
        if shown and shown < x_BP3HW.shape[1]:
            generator = context.generator("frames shown")
            begin = int(torch.randint(x_BP3HW.shape[1] - shown + 1, (1,), generator=generator))
            x_BP3HW = x_BP3HW[:, begin : begin + shown]
        crops = multi_crop(x_BP3HW, self._crops, context.generator("crops"))
        return Crops(normalise(crops.global_GBP3SS), normalise(crops.local_LBP3SS))

    def _look(self, views: Crops, context: StepContext) -> Seen:
        c, whole = self._config, views.global_GBP3SS.flatten(0, 1)
        side = views.global_GBP3SS.shape[-1] // self._model.config.vision_patch_size
        with torch.no_grad():
            target = self._teacher(whole)
        latent_frames = target.cls_BFD.shape[1]
        masks = block_masks(
            len(whole),
            latent_frames,
            (side, side),
            context.generator("masks"),
            c.mask_share if c.ibot else 0.0,
            c.mask_ratio,
        ).to(whole.device)
        student = self._model.trunk(whole, masks.mask_BFN, drop_for(c.ssl_drop, context, "ssl drop"))
        parts = views.local_LBP3SS
        local_LBK = student.cls_BFD.new_zeros(0, 1, 1)
        if len(parts):
            own = self._model.trunk(
                parts.flatten(0, 1), drop=drop_for(c.ssl_drop, context, "ssl drop, parts")
            )
            local_LBK = self.head(own.cls_BFD.flatten(0, 1)).unflatten(0, (len(parts), -1))
        crops = len(views.global_GBP3SS)
        return Seen(
            self.head(student.cls_BFD.flatten(0, 1)).unflatten(0, (crops, -1)),
            local_LBK,
            self._teacher.logits(HEAD, target.cls_BFD.flatten(0, 1)).unflatten(0, (crops, -1)),
            student.clip_BD.unflatten(0, (crops, -1)),
            masks,
            self.head(masks.take(student.patches_BFND)),
            self._teacher.logits(HEAD, masks.take(target.patches_BFND)),
        )

    def _ibot(self, seen: Seen, temperature: float, context: StepContext) -> Tensor:
        target_MK = self._targets("patches", seen.hidden_MK, temperature, context)
        loss = self_distil.ibot_loss(seen.guess_MK, target_MK, seen.masks.image_M, seen.masks.weight_B)
        # Over all crops, as DINOv2's: those without a mask count as nothing.
        return loss.unflatten(0, (len(seen.student_GBK), -1)).mean(dim=0)

    def _targets(self, which: str, logits: Tensor, temperature: float, context: StepContext) -> Tensor:
        ranks = self._ranks if context.phase == "train" else self_distil.ALONE
        if self._config.centring == "sinkhorn":
            return self_distil.sinkhorn(logits, temperature, ranks)
        centre = self._centres[which]
        assert isinstance(centre, Centre)
        found = centre.targets(logits, temperature)
        if context.phase == "train" and not context.rehearsal:
            centre.update(logits, ranks)
        return found


@dataclass(frozen=True)
class Seen:
    """What student and teacher say of the views; the class tokens of all latent frames stand in B."""

    student_GBK: Tensor
    local_LBK: Tensor
    teacher_GBK: Tensor
    clip_GBD: Tensor
    masks: Masks
    guess_MK: Tensor
    hidden_MK: Tensor


def drop_for(rate: float, context: StepContext, purpose: str) -> Drop | None:
    """Stochastic depth in training."""
    return Drop(rate, context.generator(purpose)) if rate and context.phase == "train" else None
