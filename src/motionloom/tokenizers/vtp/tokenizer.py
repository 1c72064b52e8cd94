"""A VTP model under the tokenizer protocol.

Latents are the encoder's, normalised per channel by statistics that are measured once and kept: raw ones are
small (deviations of .1 to .2 in the released models). With ``temporal_patch`` the first latent frame of a
clip, which stands alone, has statistics of its own.

A decoder works on a latent frame at a time, so streams are decoded exactly and in constant memory.

Shapes: B batch, P pixel frames, H x W pixels; F latent frames, h x w cells, C channels, K kinds of frames.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from motionloom.config.entries import from_entries
from motionloom.durable import write_atomic
from motionloom.errors import UserError
from motionloom.tokenizers import checks, diffusers_folder
from motionloom.tokenizers.base import TokenizerSpec
from motionloom.tokenizers.vtp.config import VTPConfig
from motionloom.tokenizers.vtp.model import MEAN, STD, VTPModel
from motionloom.tokenizers.vtp.towers import DecoderMemory
from motionloom.tokenizers.vtp.words import WORDS, Words

Precision = Literal["fp32", "bf16"]
NOTE = "tokenizer.json"
HALF = 32
"""Hex digits."""
TOKENS_AT_ONCE = 8192
"""How many an encoder takes at once, where clips are so short: more only fill the memory."""
TOKENS_AT_ONCE_CPU = 2048
"""There what lies between two layers must stay in the processor's cache: a quarter faster than 8,192."""


@dataclass(frozen=True)
class VtpSettings:
    """How a model is run; part of its identity, since it decides bits of the latents."""

    rope: Literal["bf16", "fp32"] = "bf16"
    precision: Literal["fp32", "bf16"] = "fp32"


class VtpTokenizer:
    """See the module's docstring. Build with :meth:`measured` or :meth:`load`."""

    def __init__(
        self, model: VTPModel, mean: Any, std: Any, precision: Precision = "fp32", words: Path | None = None
    ) -> None:
        """Raises ValueError for statistics that do not fit the model.

        Args:
            mean, std: of raw latents, lists of numbers per channel: one for all frames, or with groups of
                frames one for the first and one for those behind.
            words: the folder that has the model's own vocabulary.
        """
        config = model.config
        if not config.train_reconstruction:
            raise ValueError("the model has no pixel decoder (train_reconstruction is false)")
        self.spec = TokenizerSpec(
            config.vision_feature_bottleneck,
            config.vision_patch_size,
            config.temporal_patch,
            first_alone=config.temporal_patch > 1,
        )
        self.settings, self._folder = VtpSettings(model.rope, precision), words
        self.mean_KC, self.std_KC = _statistics(mean, std, self.spec)
        self.model = model.eval().requires_grad_(False)
        self._fingerprint = ""

    @staticmethod
    def measured(
        model: VTPModel,
        clips: Iterable[Tensor],
        *,
        precision: Precision = "fp32",
        words: Path | None = None,
    ) -> VtpTokenizer:
        """A tokenizer whose statistics are those of clips, each uint8 (P, H, W, 3).

        Raises:
            UserError: no clips, sizes that do not divide, or a channel that is the same everywhere.
        """
        kinds = 2 if model.config.temporal_patch > 1 else 1
        channels = model.config.vision_feature_bottleneck
        bare = VtpTokenizer(model, [[0.0] * channels] * kinds, [[1.0] * channels] * kinds, precision)
        sums = torch.zeros(kinds, 3, channels, dtype=torch.float64)
        for clip_PHW3 in clips:
            z_FNC = bare.encode(clip_PHW3[None])[0].flatten(1, 2).double()
            for kind, z in enumerate((z_FNC[:1], z_FNC[1:]) if kinds == 2 else (z_FNC,)):
                flat = z.flatten(0, 1)
                sums[kind] += torch.stack(
                    [torch.full((channels,), float(len(flat))), flat.sum(0), flat.square().sum(0)]
                )
        if not sums[0, 0].any():
            raise UserError("VTP's latents are measured on clips, and there is none: check the manifest")
        if kinds == 2 and not sums[1, 0].any():
            sums[1] = sums[0]  # images alone
        count, mean = sums[:, 0], sums[:, 1] / sums[:, 0]
        std = (sums[:, 2] / count - mean.square()).clamp_min(0).sqrt()
        if (std < 1e-6).any():
            raise UserError(
                "a channel of VTP's latents is the same in all clips: measure more, or other ones"
            )
        return VtpTokenizer(model, mean.float().tolist(), std.float().tolist(), precision, words)

    @staticmethod
    def load(folder: Path, settings: dict[str, Any]) -> VtpTokenizer:
        """Read what :meth:`save` wrote; ``settings`` is the content of its json without ``type``.

        Raises:
            UserError: as :meth:`VTPModel.from_pretrained`; or settings that do not fit the model.
        """
        note = folder / NOTE
        mean, std = settings.pop("mean", None), settings.pop("std", None)
        known = from_entries(VtpSettings, settings, str(note), "vtp")
        model = VTPModel.from_pretrained(folder, rope=known.rope)
        try:
            return VtpTokenizer(model, mean, std, known.precision, folder)
        except ValueError as error:
            raise UserError(f"{note}: {error}: copy the folder again") from None

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.model.trunk.cls_token.device

    def to(self, device: torch.device | str) -> VtpTokenizer:
        """Move it; what it is given may stay elsewhere, results return there."""
        self.model.to(device)
        return self

    def decoded_by(self, other: VtpTokenizer) -> VtpTokenizer:
        """This tokenizer with the decoder of another one: latents stay what they are, to the bit.

        Raises:
            ValueError: the other one's encoder makes other latents.
        """
        mine, theirs = self.model, other.model
        if (
            self.settings != other.settings
            or _of_latents(mine.config) != _of_latents(theirs.config)
            or not _same(mine.trunk.state_dict(), theirs.trunk.state_dict())
        ):
            raise ValueError("its encoder makes other latents")
        mean, std = self.mean_KC.tolist(), self.std_KC.tolist()
        return VtpTokenizer(theirs, mean, std, self.settings.precision, other._folder)

    def words(self) -> Words:
        """What turns texts into the model's tokens.

        Raises:
            UserError: the vocabulary is missing; or the model reads no texts.
        """
        config = self.model.config
        if not config.train_clip:
            raise UserError("this VTP model reads no texts (train_clip is false): name one that does")
        size, context = config.text_vocab_size, config.text_context_length
        if self._folder is None:
            return Words(context, size)
        return Words.load(self._folder, context, size)

    @torch.no_grad()
    def encode(self, video_BPHW3: Tensor) -> Tensor:
        """uint8 (B, P, H, W, 3) -> float32 (B, F, h, w, C). Raises UserError for sizes that do not divide."""
        grid = self.spec.latent_grid(*video_BPHW3.shape[1:4])
        # Frames that do not see each other go through in parts, so that a long clip takes no more memory.
        alone = self.spec.temporal == 1 and not self.model.config.temporal_window
        at_once = TOKENS_AT_ONCE_CPU if self.device.type == "cpu" else TOKENS_AT_ONCE
        latent_frames = min(grid[0], max(1, at_once // (grid[1] * grid[2]))) if alone else grid[0]
        clips = max(1, at_once // (latent_frames * grid[1] * grid[2]))
        frames = latent_frames if alone else video_BPHW3.shape[1]
        raw = torch.cat(
            [
                torch.cat([self._encoded(part) for part in some.split(frames, dim=1)], dim=1)
                for some in video_BPHW3.split(clips)
            ]
        )
        mean_FC, std_FC = (table[self._kinds(raw.shape[1])] for table in (self.mean_KC, self.std_KC))
        return ((raw.float() - mean_FC[:, None, None]) / std_FC[:, None, None]).to(video_BPHW3.device)

    def _encoded(self, video_BPHW3: Tensor) -> Tensor:
        """Raw latents."""
        with self._precision():
            # Not by its `encode`, which looks for NaN: pixels from bytes have none.
            features = self.model.trunk(normalised(video_BPHW3.to(self.device)))
            return self.model.latents(features).float().cpu()

    def decode(self, latents_BFhwC: Tensor) -> Tensor:
        """float (B, F, h, w, C) -> uint8 (B, P, H, W, 3)."""
        return torch.cat(list(self.stream_decode([latents_BFhwC])), dim=1)

    def stream_decode(self, latents: Iterable[Tensor]) -> Iterator[Tensor]:
        """Latent chunks (B, f, h, w, C) -> their pixel frames, a piece per latent frame."""
        memory = DecoderMemory()
        for chunk_BFhwC in latents:
            for z_B1hwC in chunk_BFhwC.split(1, dim=1):
                kind = self._kinds(1, behind=memory.begun)
                raw = (
                    z_B1hwC.cpu().float() * self.std_KC[kind][:, None, None]
                    + self.mean_KC[kind][:, None, None]
                )
                # Not around the loop: no_grad must not be held while the consumer runs.
                with torch.no_grad(), self._precision():
                    x_BP3HW = self.model.pixel_decoder.go_on(raw.to(self.device), memory)
                yield as_pixels(x_BP3HW).to(chunk_BFhwC.device)

    def resume_from(self, latent: int) -> int:
        """As far before as the decoder's blocks look back, and one more that stands in for the first."""
        config = self.model.config
        reach = config.decoder_depth * config.temporal_window
        return max(0, latent - reach - int(self.spec.first_alone))

    def fingerprint(self) -> str:
        """Half of it says which model (:func:`model_fingerprint`), the other half its statistics."""
        if not self._fingerprint:
            settings = hashlib.sha256(json.dumps(self._note(), sort_keys=True).encode()).hexdigest()
            self._fingerprint = model_fingerprint(self.model, self.settings.precision) + settings[:HALF]
        return self._fingerprint

    def save(self, folder: Path) -> None:
        """A folder of the released layout, ``tokenizer.json`` with statistics and settings, and the words."""
        self.model.save_pretrained(folder)
        if self._folder is not None and (self._folder / WORDS).is_file():
            write_atomic(folder / WORDS, (self._folder / WORDS).read_bytes())
        write_atomic(folder / NOTE, json.dumps(self._note(), indent=1).encode())

    def _note(self) -> dict[str, Any]:
        """What ``tokenizer.json`` says."""
        statistics = {"mean": self.mean_KC.tolist(), "std": self.std_KC.tolist()}
        return {"type": "vtp", **asdict(self.settings), **statistics}

    def _kinds(self, frames: int, *, behind: bool = False) -> Tensor:
        """Which row of statistics each latent frame has."""
        kinds = torch.full((frames,), len(self.mean_KC) - 1)
        if not behind:
            kinds[:1] = 0
        return kinds

    def _precision(self) -> torch.autocast:
        on = self.settings.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=on)


def _of_latents(config: VTPConfig) -> dict[str, Any]:
    ours = ("vision_", "temporal_", "conv_")
    return {name: value for name, value in asdict(config).items() if name.startswith(ours)}


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name].cpu(), b[name].cpu()) for name in a)


def model_fingerprint(model: VTPModel, precision: Precision) -> str:
    """Digest of a model and of how it is run: the first half of its tokenizers' fingerprints."""
    digest = hashlib.sha256(f"{model.config.to_json()}{model.rope}{precision}".encode())
    for part in diffusers_folder.tensor_bytes(model.state_dict()):
        digest.update(part)
    return digest.hexdigest()[:HALF]


def normalised(video_BPHW3: Tensor) -> Tensor:
    """uint8 (B, P, H, W, 3) -> what VTP's encoder takes, float32 (B, P, 3, H, W)."""
    return normalise(video_BPHW3.movedim(-1, 2).float() / 255)


def normalise(x_BP3HW: Tensor) -> Tensor:
    """Pixels in [0, 1] by ImageNet's mean and deviation."""
    mean, std = x_BP3HW.new_tensor(MEAN), x_BP3HW.new_tensor(STD)
    return (x_BP3HW - mean[:, None, None]) / std[:, None, None]


def unit_pixels(x_BP3HW: Tensor) -> Tensor:
    """What VTP's decoder gives, in [0, 1] where it is right; not clamped."""
    mean, std = x_BP3HW.new_tensor(MEAN), x_BP3HW.new_tensor(STD)
    return x_BP3HW * std[:, None, None] + mean[:, None, None]


def as_pixels(x_BP3HW: Tensor) -> Tensor:
    """What VTP's decoder gives, rounded: uint8 (B, P, H, W, 3)."""
    return (unit_pixels(x_BP3HW.float()) * 255).round().clamp(0, 255).to(torch.uint8).movedim(2, -1)


def _statistics(mean: Any, std: Any, spec: TokenizerSpec) -> tuple[Tensor, Tensor]:
    """(K, C) each. Raises ValueError."""
    kinds = 2 if spec.first_alone else 1
    for name, rows in (("mean", mean), ("std", std)):
        if not isinstance(rows, list) or len(rows) != kinds:
            raise ValueError(f"{name} has not {kinds} rows of {spec.channels} numbers")
        for row in rows:
            checks.require_numbers(row, name)
    for mean_C, std_C in zip(mean, std, strict=True):
        checks.require_statistics(torch.tensor(mean_C).float(), torch.tensor(std_C).float(), spec.channels)
    return torch.tensor(mean).float(), torch.tensor(std).float()
