"""Video VAEs of the field as tokenizers: what they share; what differs is a :class:`VaeKind`.

Latents are the mean of the posterior, normalised per channel by the model's own statistics, so equal clips
give equal latents. Both directions run over time in pieces whose number in memory does not depend on the
clip's length, and over space in tiles if asked (``tiling.py``). A stream's state lives in the generator that
makes it, so any number of streams of one tokenizer may run at once.

Shapes: B batch, P pixel frames, H x W pixels; F latent frames, h x w latent cells, C channels, T frames.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from motionloom.config.entries import from_entries
from motionloom.config.recipe import TokenizerConfig
from motionloom.errors import UserError
from motionloom.tokenizers import checks, diffusers_folder
from motionloom.tokenizers.base import TokenizerSpec
from motionloom.tokenizers.tiling import Code, tiled

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def first_alone_groups(frames: int, spec: TokenizerSpec) -> list[int]:
    """How a clip goes into an encoder that takes the first frame alone: 1, t, t, ... frames."""
    return [1, *[spec.temporal] * ((frames - 1) // spec.temporal)]


def accept(vae: Any) -> None:
    """Nothing to say against any model of the class."""


@dataclass(frozen=True)
class VaeKind:
    """What sets one VAE class apart."""

    name: str
    """In recipes."""
    vae_class: str
    """In diffusers."""
    spec: Callable[[Any], TokenizerSpec]
    statistics: Callable[[Any], tuple[Tensor, Tensor]]
    """Mean and deviation (C,) of each latent channel."""
    encode: Callable[[Any, Iterator[Tensor]], Iterator[Tensor]]
    """Groups of pixel frames (B, 3, T, H, W) in [-1, 1] -> posterior means (B, C, t, h, w), in order."""
    decode: Callable[[Any, Iterator[Tensor]], Iterator[Tensor]]
    """Single latent frames (B, C, 1, h, w) -> pixel frames (B, 3, T, H, W) as soon as they are decided."""
    resume_from: Callable[[Any, int], int]
    """(model, latent frame) -> as ``Tokenizer.resume_from``."""
    groups: Callable[[int, TokenizerSpec], list[int]] = first_alone_groups
    """The sizes of those groups for a clip of so many pixel frames."""
    check: Callable[[Any], None] = accept
    """Raises ValueError for a model that this adapter cannot run exactly; it is called first."""


@dataclass(frozen=True)
class VaeSettings:
    """How a VAE is run; part of its identity, since it decides bits of the latents."""

    precision: Literal["fp32", "bf16"] = "fp32"
    tile: int = 0
    """Pixels of a square tile; 0: whole frames."""
    tile_overlap: int = 64
    """Pixels that neighbouring tiles share."""

    @staticmethod
    def of(config: TokenizerConfig) -> VaeSettings:
        """The recipe's."""
        return VaeSettings(config.precision, config.tile, config.tile_overlap)

    def check(self, spec: TokenizerSpec) -> None:
        """Raises ValueError for tiles that do not fit the cells."""
        for name, pixels in (("tile", self.tile), ("tile_overlap", self.tile_overlap)):
            if pixels < 0 or (self.tile and pixels % spec.spatial):
                raise ValueError(f"{name} {pixels} does not divide by the {spec.spatial} pixels of a cell")
        if self.tile and self.tile_overlap >= self.tile:
            raise ValueError(f"tile_overlap {self.tile_overlap} must be less than tile {self.tile}")


class VaeTokenizer:
    """A diffusers VAE under the tokenizer protocol. Build with :meth:`open` or :meth:`load`."""

    def __init__(self, kind: VaeKind, vae: nn.Module, settings: VaeSettings) -> None:
        """``vae`` is used as it is: its dtype must be that of ``settings.precision``.

        Raises ValueError for settings or a model that do not fit.
        """
        assert next(vae.parameters()).dtype == DTYPES[settings.precision]
        self.kind = kind
        self.settings = settings
        self.spec, self._mean_C, self._std_C = _described(kind, vae)
        settings.check(self.spec)
        self._vae = vae
        self._fingerprint = ""

    @staticmethod
    def open(kind: VaeKind, folder: Path, settings: VaeSettings) -> VaeTokenizer:
        """The VAE of a folder in diffusers' layout, or of a pipeline's folder that has it in ``vae/``.

        Raises:
            UserError: see :func:`diffusers_folder.load`; or settings that do not fit the model.
        """
        if not (folder / diffusers_folder.CONFIG).is_file() and (folder / "vae").is_dir():
            folder = folder / "vae"
        names = {kind.vae_class: "models"}
        vae = diffusers_folder.load(folder, names, DTYPES[settings.precision])
        try:
            return VaeTokenizer(kind, vae, settings)
        except ValueError as error:
            raise UserError(f"{folder}: tokenizer.{error}") from None

    @staticmethod
    def load(kind: VaeKind, folder: Path, settings: dict[str, Any]) -> VaeTokenizer:
        """Read what :meth:`save` wrote; ``settings`` is the content of its json without ``type``.

        Raises:
            UserError: as :meth:`open`; or settings of other names or types.
        """
        note = str(folder / "tokenizer.json")
        known = from_entries(VaeSettings, settings, note, kind.name, zero=("tile", "tile_overlap"))
        return VaeTokenizer.open(kind, folder, known)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self._vae.parameters()).device

    def to(self, device: torch.device | str) -> VaeTokenizer:
        """Move it; what it is given may stay elsewhere, results return there."""
        self._vae.to(device)
        return self

    @torch.no_grad()
    def encode(self, video_BPHW3: Tensor) -> Tensor:
        """uint8 (B, P, H, W, 3) -> float32 (B, F, h, w, C). Raises UserError for sizes that do not divide."""
        frames = video_BPHW3.shape[1]
        self.spec.latent_grid(*video_BPHW3.shape[1:4])
        groups = video_BPHW3.split(self.kind.groups(frames, self.spec), dim=1)
        code = self._code(self.kind.encode, pixels=True)
        mean_C, std_C = self._mean_C.to(self.device), self._std_C.to(self.device)
        parts = [
            ((means.movedim(1, -1).float() - mean_C) / std_C).to(video_BPHW3.device)
            for means in code(map(self._to_model_pixels, groups))
        ]
        return torch.cat(parts, dim=1)

    def decode(self, latents_BFhwC: Tensor) -> Tensor:
        """float (B, F, h, w, C) -> uint8 (B, P, H, W, 3)."""
        return torch.cat(list(self.stream_decode([latents_BFhwC])), dim=1)

    def stream_decode(self, latents: Iterable[Tensor]) -> Iterator[Tensor]:
        """Latent chunks (B, f, h, w, C) -> uint8 pixel frames (B, p, H, W, 3) as soon as they are decided.

        One piece per step of the decoder, so a chunk may give several, or none yet.
        """
        for pixels_BPHW3 in self.stream_decode_float(latents):
            yield ((pixels_BPHW3 + 1.0) * 127.5).round().to(torch.uint8)

    def stream_decode_float(self, latents: Iterable[Tensor]) -> Iterator[Tensor]:
        """As :meth:`stream_decode`, in float32 within [-1, 1], before rounding."""
        home: list[torch.device] = []
        code = self._code(self.kind.decode, pixels=False)
        pieces = code(self._to_model_latents(latents, home))
        while True:
            # Not around the loop: no_grad must not be held while the consumer runs.
            with torch.no_grad():
                x = next(pieces, None)
            if x is None:
                return
            if x.shape[2]:
                yield x.float().clamp(-1.0, 1.0).movedim(1, -1).to(home[0])

    def resume_from(self, latent: int) -> int:
        """As far before as the decoder's convolutions over time look back."""
        return self.kind.resume_from(self._vae, latent)

    def fingerprint(self) -> str:
        if not self._fingerprint:
            settings = {"type": self.kind.name, **asdict(self.settings)}
            self._fingerprint = diffusers_folder.digest(self._vae, extra=settings)
        return self._fingerprint

    def save(self, folder: Path) -> None:
        """A diffusers folder, and ``tokenizer.json`` with the settings."""
        diffusers_folder.save(self._vae, folder)
        settings = {"type": self.kind.name, **asdict(self.settings)}
        (folder / "tokenizer.json").write_text(json.dumps(settings, indent=1))

    def _code(self, code: Callable[[Any, Iterator[Tensor]], Iterator[Tensor]], pixels: bool) -> Code:
        """``code`` of this VAE, which takes pixels or else latents, in tiles if asked."""

        def whole(pieces: Iterator[Tensor]) -> Iterator[Tensor]:
            return code(self._vae, pieces)

        if not self.settings.tile:
            return whole
        tile, overlap, spatial = self.settings.tile, self.settings.tile_overlap, self.spec.spatial
        if pixels:
            return tiled(whole, tile, overlap, unit=spatial)
        return tiled(whole, tile // spatial, overlap // spatial)

    def _to_model_pixels(self, video_BPHW3: Tensor) -> Tensor:
        x = video_BPHW3.to(self.device).float() / 127.5 - 1.0
        return x.movedim(-1, 1).to(DTYPES[self.settings.precision])

    def _to_model_latents(self, chunks: Iterable[Tensor], home: list[torch.device]) -> Iterator[Tensor]:
        """Single frames (B, C, 1, h, w) as the model knows them; ``home`` gets the latents' device."""
        mean_C, std_C = self._mean_C.to(self.device), self._std_C.to(self.device)
        for chunk_BFhwC in chunks:
            home[:] = [chunk_BFhwC.device]
            for z_B1hwC in chunk_BFhwC.split(1, dim=1):
                z = z_B1hwC.to(self.device).float() * std_C + mean_C
                yield z.movedim(-1, 1).to(DTYPES[self.settings.precision])


def _described(kind: VaeKind, vae: Any) -> tuple[TokenizerSpec, Tensor, Tensor]:
    """The shape rule of a model, and the mean and deviation (C,) of its latents, float32 on the CPU.

    Raises ValueError for a model that this adapter cannot run, or whose config or statistics are damaged.
    """
    try:
        with checks.damage_as_value_error():
            kind.check(vae)
            spec = kind.spec(vae)
            checks.require_counts(channels=spec.channels, spatial=spec.spatial, temporal=spec.temporal)
            mean_C, std_C = (values.float().cpu() for values in kind.statistics(vae))
        checks.require_statistics(mean_C, std_C, spec.channels)
    except ValueError as error:
        raise ValueError(
            f"type {kind.name} cannot run this model: {error}: copy it again or name another"
        ) from None
    return spec, mean_C, std_C
