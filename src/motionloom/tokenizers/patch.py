"""`patch`: space-time patches in a basis fitted in closed form. No download, no training.

A patch of t frames x s x s pixels x 3 colours is projected on the leading principal components of the patches
of the first clips, and whitened: every channel has mean 0 and deviation 1 on those clips (PCA whitening,
Hotelling 1933). With ``first_alone`` the first frame has a basis of its own for patches of 1 x s x s pixels.

Every latent frame decodes by itself, so stream decoding is exact.

Shapes: B batch, P pixel frames, H x W pixels; F latent frames, h x w latent cells, C channels, D numbers of a
patch (pixels x colours).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from motionloom.config.entries import from_entries
from motionloom.config.recipe import TokenizerConfig
from motionloom.durable import write_tensors
from motionloom.errors import UserError
from motionloom.tokenizers.base import TokenizerSpec
from motionloom.tokenizers.basis import Basis, Moments


class PatchTokenizer:
    """See the module's docstring. Build with :meth:`fit` or :meth:`load`."""

    def __init__(self, spec: TokenizerSpec, later: Basis, first: Basis | None) -> None:
        self.spec = spec
        self._later = later
        self._first = first

    @staticmethod
    def fit(config: TokenizerConfig, clips: Sequence[Tensor]) -> PatchTokenizer:
        """Fit on clips, each uint8 (P, H, W, 3).

        Raises:
            UserError: more channels than a patch has numbers, no clips, or a size that does not divide.
        """
        spec = TokenizerSpec(config.latent_d, config.latent_f, config.latent_t, config.first_alone)
        smallest = 3 * spec.spatial**2 * (1 if spec.first_alone else spec.temporal)
        if spec.channels > smallest:
            raise UserError(
                f"tokenizer.latent_d {spec.channels} exceeds the {smallest} numbers of a patch: "
                f"set it to {smallest} or less"
            )
        first, later = Moments(), Moments()
        for clip_PHW3 in clips:
            spec.latent_grid(*clip_PHW3.shape[:3])
            one, groups = _split(_unit(clip_PHW3[None]), spec)
            if one is not None:
                first.add(one)
            if groups is not None:
                later.add(groups)
        if not first.count and not later.count:
            raise UserError("tokenizer `patch` has no clip to be fitted on: check the manifest")
        if not later.count:
            # Only single images: groups of frames are then still pictures.
            for clip_PHW3 in clips:
                still = clip_PHW3.expand(spec.temporal, -1, -1, -1)
                later.add(_patch(_unit(still[None]), spec.temporal, spec.spatial))
        basis = Basis.of(first, spec.channels, config.whiten) if first.count else None
        return PatchTokenizer(spec, Basis.of(later, spec.channels, config.whiten), basis)

    def encode(self, video_BPHW3: Tensor) -> Tensor:
        """uint8 (B, P, H, W, 3) -> float32 (B, F, h, w, C). Raises UserError for sizes that do not divide."""
        self.spec.latent_grid(*video_BPHW3.shape[1:4])
        first, later = _split(_unit(video_BPHW3), self.spec)
        parts = []
        if first is not None:
            assert self._first is not None
            parts.append(self._first.to_latent(first))
        if later is not None:
            parts.append(self._later.to_latent(later))
        return torch.cat(parts, dim=1)

    def decode(self, latents_BFhwC: Tensor) -> Tensor:
        """float (B, F, h, w, C) -> uint8 (B, P, H, W, 3)."""
        return torch.cat(list(self.stream_decode([latents_BFhwC])), dim=1)

    def stream_decode(self, latents: Iterable[Tensor]) -> Iterator[Tensor]:
        """Chunks of latent frames -> their pixel frames; exact, since frames do not depend on each other."""
        at_start = True
        for chunk_BFhwC in latents:
            z = chunk_BFhwC.float()
            parts = []
            if at_start and self.spec.first_alone:
                assert self._first is not None
                parts.append(_unpatch(self._first.to_patches(z[:, :1]), self.spec.spatial))
                z = z[:, 1:]
            if z.shape[1]:
                parts.append(_unpatch(self._later.to_patches(z), self.spec.spatial))
            at_start = False
            yield _pixels(torch.cat(parts, dim=1))

    def resume_from(self, latent: int) -> int:
        """Frames stand alone; but one must come first where the first is of another kind."""
        return max(0, latent - int(self.spec.first_alone))

    def fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(asdict(self.spec), sort_keys=True).encode())
        for name, tensor in sorted(self._tensors().items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / "tokenizer.safetensors", self._tensors())
        (folder / "tokenizer.json").write_text(json.dumps({"type": "patch", **asdict(self.spec)}, indent=1))

    @staticmethod
    def load(folder: Path, settings: dict[str, Any]) -> PatchTokenizer:
        """Read what :meth:`save` wrote; ``settings`` is the content of its json without ``type``.

        Raises:
            UserError: the file is missing, damaged, or not the one that the json describes.
        """
        file, note = folder / "tokenizer.safetensors", folder / "tokenizer.json"
        try:
            spec, tensors = from_entries(TokenizerSpec, settings, str(note), "patch"), load_file(file)
            numbers = 3 * spec.spatial**2
            first = Basis.named(tensors, "first", numbers, spec.channels) if spec.first_alone else None
            return PatchTokenizer(
                spec, Basis.named(tensors, "later", numbers * spec.temporal, spec.channels), first
            )
        except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
            raise UserError(f"{file}: not a readable tokenizer ({error}): fit or copy it again") from None

    def _tensors(self) -> dict[str, Tensor]:
        return self._later.tensors("later") | (self._first.tensors("first") if self._first else {})


def _unit(video_u8: Tensor) -> Tensor:
    return video_u8.float() / 127.5 - 1.0


def _pixels(video: Tensor) -> Tensor:
    return ((video + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _split(video_BPHW3: Tensor, spec: TokenizerSpec) -> tuple[Tensor | None, Tensor | None]:
    """Patches of the first frame (if it stands alone) and of the groups after it, (B, F, h, w, D) each."""
    first = None
    if spec.first_alone:
        first = _patch(video_BPHW3[:, :1], 1, spec.spatial)
        video_BPHW3 = video_BPHW3[:, 1:]
    later = _patch(video_BPHW3, spec.temporal, spec.spatial) if video_BPHW3.shape[1] else None
    return first, later


def _patch(video_BPHW3: Tensor, t: int, s: int) -> Tensor:
    x = video_BPHW3.unflatten(3, (-1, s)).unflatten(2, (-1, s)).unflatten(1, (-1, t))
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4)  # B F t h s w s 3 -> B F h w (t s s 3)


def _unpatch(patches_BFhwD: Tensor, s: int) -> Tensor:
    x = patches_BFhwD.unflatten(4, (-1, s, s, 3))  # B F h w t s s 3
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).flatten(5, 6).flatten(3, 4).flatten(1, 2)
