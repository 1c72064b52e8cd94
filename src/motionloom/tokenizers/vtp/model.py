"""VTP: a visual tokenizer whose latents are pre-trained by contrast, self-distillation and reconstruction
(arXiv 2512.13687). Method names and the layout of weights are those of the released models.

Shapes: B batch, P pixel frames, H x W pixels; F latent frames, h x w grid, N = h * w; D width of the encoder,
C latent channels, L places of a text, E numbers of the space that images and texts share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motionloom.errors import UserError
from motionloom.nn.init import fill
from motionloom.rng import torch_generator
from motionloom.tokenizers.vtp.config import VTPConfig
from motionloom.tokenizers.vtp.folder import read_weights, write_folder
from motionloom.tokenizers.vtp.layers import RopePrecision, Start
from motionloom.tokenizers.vtp.text_tower import TextTransformer
from motionloom.tokenizers.vtp.towers import Features, PixelDecoder, Trunk

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's pixels in [0, 1]: what the released models were trained on."""
START_SCALE = math.log(1 / 0.07)
"""CLIP's first logit scale."""


class VTPModel(nn.Module):
    """Encoder, bottleneck, pixel decoder and text tower.

    Args:
        config: sizes; the weights are empty until :meth:`init_weights` or :meth:`from_pretrained`.
        rope: in what rotary angles are reckoned: ``bf16`` as the released models were trained, or ``fp32``.
    """

    saved_whole = True
    """Its second stage trains the decoder alone, and a checkpoint holds all of it."""

    def __init__(self, config: VTPConfig, rope: RopePrecision = "bf16") -> None:
        super().__init__()
        self.config, self.rope = config, rope
        self.trunk = Trunk(config, rope)
        if config.train_reconstruction:
            self.pixel_decoder = PixelDecoder(config, rope)
        if config.train_clip:
            width = config.text_embed_dim
            self.visual_proj = nn.Linear(config.vision_embed_dim, width, bias=False)
            self.token_embedding = nn.Embedding(config.text_vocab_size, width)
            self.positional_embedding = nn.Parameter(torch.zeros(config.text_context_length, width))
            self.text_transformer = TextTransformer(config)
            self.ln_final = nn.LayerNorm(width)
            self.text_projection = nn.Parameter(torch.zeros(width, width))
            start = START_SCALE if config.init_logit_scale is None else config.init_logit_scale
            bias = config.init_logit_bias
            self.logit_scale = nn.Parameter(torch.tensor(start, dtype=torch.float32))
            self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(bias, dtype=torch.float32))

    # Files

    @staticmethod
    def from_pretrained(folder: str | Path, rope: RopePrecision = "bf16") -> VTPModel:
        """Read ``config.json`` and ``model.safetensors`` of a released folder, or of one that was saved here.

        Raises:
            UserError: a file is missing or damaged, or a tensor is missing, too many or of another shape.
        """
        config = VTPConfig.read(Path(folder) / "config.json")
        model = VTPModel(config, rope)
        read_weights(model, Path(folder) / "model.safetensors")
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` in the released layout, each in one piece."""
        write_folder(self, self.config, Path(folder))

    @torch.no_grad()
    def init_weights(self, seed: int, start: Start = "released") -> None:
        """Weights for a training from the start, a pure function of the seed; ``start``: see
        :func:`~motionloom.tokenizers.vtp.layers.init_layers`."""
        self.trunk.init_weights(torch_generator(seed, "vtp trunk"), start)
        if self.config.train_reconstruction:
            self.pixel_decoder.init_weights(torch_generator(seed, "vtp decoder"), start)
        if not self.config.train_clip:
            return
        generator = torch_generator(seed, "vtp text")
        width = self.config.text_embed_dim
        self.visual_proj.weight.normal_(
            std=0.02 if start == "released" else self.visual_proj.in_features**-0.5, generator=generator
        )
        self.token_embedding.weight.normal_(std=0.02, generator=generator)
        self.positional_embedding.normal_(std=0.01, generator=generator)
        self.text_transformer.init_weights(generator)
        self.text_projection.normal_(std=width**-0.5, generator=generator)
        fill(1.0, self.ln_final.weight)
        fill(0.0, self.ln_final.bias)

    def blocks(self) -> list[nn.Module]:
        """The repeated parts of all towers."""
        towers = [self.trunk.blocks, self.trunk.look_back, self.trunk.neighbours]
        if self.config.train_reconstruction:
            decoder = self.pixel_decoder
            towers += [decoder.blocks, decoder.look_back, decoder.neighbours]
        if self.config.train_clip:
            towers.append(self.text_transformer.resblocks)
        return [block for tower in towers for block in tower or ()]

    # Clips

    def encode(self, x_BP3HW: Tensor) -> Tensor:
        """Normalised pixels -> raw latents (B, F, h, w, C).

        Raises:
            UserError: sides or frames that do not divide, or pixels that are not finite.
        """
        _require_pixels(x_BP3HW, "clip")
        return self.latents(self.trunk(x_BP3HW))

    def latents(self, features: Features) -> Tensor:
        """The bottleneck: features -> raw latents (B, F, h, w, C)."""
        return self.trunk.feature_bottleneck(features.patches_BFND).unflatten(2, features.grid)

    def clip_image(self, features: Features) -> Tensor:
        """What stands for a clip beside a text, (B, E), not normalised.

        From the mean of its class tokens, or of its patches (``vision_clip_feat: pooled``)."""
        pooled = self.config.vision_clip_feat == "pooled"
        return self.visual_proj(features.patches_BFND.mean(dim=(1, 2)) if pooled else features.clip_BD)

    def clip_text(self, tokens_BL: Tensor) -> Tensor:
        """What stands for texts, (B, E), not normalised. Read at the end mark, which has the highest id.

        The places are used as far as the texts go; the rest cannot be seen from the end mark.
        """
        x = self.token_embedding(tokens_BL) + self.positional_embedding[: tokens_BL.shape[1]]
        x = self.ln_final(self.text_transformer(x))
        end_B = tokens_BL.argmax(dim=-1)
        return x[torch.arange(len(x), device=x.device), end_B] @ self.text_projection

    # The released models' own names, for images (B, 3, H, W) normalised by MEAN and STD. All raise UserError
    # for images and tokens that are none, and for towers that the model has not.

    def get_reconstruction_latents(self, image: Tensor) -> Tensor:
        """Raw latents (B, C, h, w)."""
        _require_pixels(image, "image")
        return self.latents(self.trunk(image[:, None]))[:, 0].movedim(-1, 1)

    def get_latents_decoded_images(self, latents: Tensor) -> Tensor:
        """Raw latents (B, C, h, w) -> normalised pixels (B, 3, H, W), not clamped."""
        if not self.config.train_reconstruction:
            raise UserError("this VTP model has no decoder (train_reconstruction is false): name another")
        return self.pixel_decoder(latents.movedim(1, -1)[:, None])[:, 0]

    def get_clip_image_feature(self, image: Tensor, normalize: bool = True) -> Tensor:
        """(B, E)."""
        self._require_texts()
        _require_pixels(image, "image")
        found = self.clip_image(self.trunk(image[:, None]))
        return F.normalize(found, dim=-1) if normalize else found

    def get_clip_text_feature(self, text: Tensor, normalize: bool = True) -> Tensor:
        """Tokens (B, L), of at most ``text_context_length`` places, -> (B, E)."""
        self._require_texts()
        _require_tokens(text, self.config)
        found = self.clip_text(text)
        return F.normalize(found, dim=-1) if normalize else found

    def get_clip_logits(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """(images, texts), and the same transposed."""
        images, texts = self.get_clip_image_feature(image), self.get_clip_text_feature(text)
        logits = self.logit_scale.exp() * images @ texts.T
        if self.logit_bias is not None:
            logits = logits + self.logit_bias
        return logits, logits.T

    def get_last_layer_feature(self, image: Tensor, use_bottleneck: bool = False) -> dict[str, Tensor]:
        """``cls_token`` (B, D) and ``patch_tokens`` (B, N, D); of C numbers with the bottleneck."""
        _require_pixels(image, "image")
        found = self.trunk(image[:, None])
        cls, patches = found.cls_BFD[:, 0], found.patches_BFND[:, 0]
        if use_bottleneck:
            cls, patches = self.trunk.feature_bottleneck(cls), self.trunk.feature_bottleneck(patches)
        return {"cls_token": cls, "patch_tokens": patches}

    def get_intermediate_layers_feature(
        self,
        image: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor, ...] | tuple[tuple[Tensor, Tensor], ...]:
        """Patches (B, N, D), or (B, D, h, w) with ``reshape``, of the last ``n`` blocks or of those named.

        With their class tokens beside them where asked for. The last block stands last."""
        depth = self.config.vision_depth
        if isinstance(n, int) and not 1 <= n <= depth:
            raise UserError(f"n is {n} and the encoder has {depth} blocks: ask for the last 1 to {depth}")
        wanted = list(range(depth - n, depth)) if isinstance(n, int) else list(n)
        if strange := [index for index in wanted if index not in range(depth)]:
            raise UserError(f"n names block {strange[0]!r} and the encoder has 0 to {depth - 1}: name those")
        _require_pixels(image, "image")
        behind = self.trunk.intermediate(image[:, None], depth, norm)
        found: list[tuple[Tensor, Tensor]] = []
        for index in wanted:
            patches = behind[index].patches_BFND[:, 0]
            if reshape:
                patches = patches.unflatten(1, behind[index].grid).movedim(-1, 1)
            found.append((patches, behind[index].cls_BFD[:, 0]))
        return tuple(found) if return_class_token else tuple(patches for patches, _ in found)

    def forward(
        self,
        image: Tensor | None = None,
        text: Tensor | None = None,
        forward_type: Literal["clip", "rec", "feature"] = "clip",
    ) -> dict[str, Tensor]:
        """The released models' three ways: ``clip`` both features, normalised, and the logit scale; ``rec``
        latents, reconstruction and target; ``feature`` the tokens behind the bottleneck."""
        if forward_type not in ("clip", "rec", "feature"):
            raise UserError(f"forward_type is {forward_type!r}: it is clip, rec or feature")
        if forward_type == "clip":
            self._require_texts()
            found = {"logit_scale": self.logit_scale.exp()}
            if self.logit_bias is not None:
                found["logit_bias"] = self.logit_bias
            if image is not None:
                found["image_features"] = self.get_clip_image_feature(image)
            if text is not None:
                found["text_features"] = self.get_clip_text_feature(text)
            return found
        if image is None:
            raise UserError(f"forward_type {forward_type} is of an image, and none is given: give one")
        if forward_type == "feature":
            return self.get_last_layer_feature(image, use_bottleneck=True)
        latents = self.get_reconstruction_latents(image)
        made = self.get_latents_decoded_images(latents)
        return {"latents": latents, "reconstructed_image": made, "target_image": image}

    def _require_texts(self) -> None:
        if not self.config.train_clip:
            raise UserError("this VTP model reads no texts (train_clip is false): name one that does")


def _require_pixels(x: Tensor, what: str) -> None:
    """Raises UserError for what are no images (B, 3, H, W), or clips (B, P, 3, H, W), of finite numbers.

    It waits for the device, so trainings go by ``trunk`` itself.
    """
    shape = "(B, 3, H, W)" if what == "image" else "(B, P, 3, H, W)"
    if x.dim() != shape.count(",") + 1 or x.shape[-3] != 3 or not x.is_floating_point():
        raise UserError(
            f"{what}s are {x.dtype} of {tuple(x.shape)}: give normalised pixels, floats of {shape}"
        )
    if x.is_meta:
        return  # shapes alone, as for counting operations
    good_B = x.isfinite().flatten(1).all(dim=1)
    if not good_B.all():
        first = int(good_B.int().argmin()) + 1
        raise UserError(
            f"{what} {first} of {len(x)} has pixels that are not finite (NaN or infinite): mend it or leave "
            "it out"
        )


def _require_tokens(text: Tensor, config: VTPConfig) -> None:
    """Raises UserError for what are no tokens (B, L) of a model."""
    if text.dim() != 2 or text.is_floating_point() or text.is_complex() or text.dtype == torch.bool:
        raise UserError(f"tokens are {text.dtype} of {tuple(text.shape)}: give whole numbers of (B, L)")
    if not 1 <= text.shape[1] <= config.text_context_length:
        raise UserError(
            f"texts of {text.shape[1]} tokens, and the model has {config.text_context_length} places: cut "
            "them"
        )
    strange = text[(text < 0) | (text >= config.text_vocab_size)]
    if len(strange):
        raise UserError(
            f"token {int(strange[0])} is not in the model's vocabulary of {config.text_vocab_size}: make "
            "tokens with its own words"
        )
