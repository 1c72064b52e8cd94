"""`spectral`: a stopgap that projects frames of samples; the spectrum follows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from motionloom.config.recipe import AudioConfig
from motionloom.errors import UserError
from motionloom.tokenizers.audio import AudioTokenizerSpec
from motionloom.tokenizers.basis import Basis, Moments
from motionloom.tokenizers.sound import resample

_NOTE, _FILE = "audio_tokenizer.json", "audio_tokenizer.safetensors"


class SpectralAudio:
    """See the module's docstring. Build with :meth:`fit` or :meth:`open`."""

    def __init__(self, spec: AudioTokenizerSpec, basis: Basis) -> None:
        self.spec = spec
        self._basis = basis

    @staticmethod
    def fit(config: AudioConfig, sounds: Sequence[Tensor], sample_rate: int) -> SpectralAudio:
        spec = AudioTokenizerSpec.of(config)
        moments = Moments()
        for sound_SN in sounds:
            moments.add(_frames(sound_SN[None], sample_rate, spec))
        return SpectralAudio(spec, Basis.of(moments, spec.channels, config.whiten))

    @staticmethod
    def open(folder: Path) -> SpectralAudio:
        settings = json.loads((folder / _NOTE).read_text())
        settings.pop("type")
        spec = AudioTokenizerSpec(**settings)
        return SpectralAudio(spec, Basis.named(load_file(folder / _FILE), "sound", spec.hop, spec.channels))

    def encode(self, sound_BSN: Tensor, sample_rate: int) -> Tensor:
        return self._basis.to_latent(_frames(sound_BSN, sample_rate, self.spec))

    def decode(self, latents_BTC: Tensor) -> tuple[Tensor, int]:
        sound = self._basis.to_patches(latents_BTC.float()).flatten(1)[:, None]
        return sound.clamp(-1, 1), self.spec.sample_rate

    def fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(asdict(self.spec), sort_keys=True).encode())
        for name, tensor in sorted(self._basis.tensors("sound").items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self._basis.tensors("sound"), folder / _FILE)
        (folder / _NOTE).write_text(json.dumps({"type": "spectral", **asdict(self.spec)}, indent=1))


def _frames(sound_BSN: Tensor, rate: int, spec: AudioTokenizerSpec) -> Tensor:
    mono = resample(sound_BSN.float().mean(dim=1), rate, spec.sample_rate)
    wanted = spec.latents(sound_BSN.shape[-1] / rate) * spec.hop * spec.temporal
    if not sound_BSN.shape[-1]:
        raise UserError("no sound")
    mono = torch.nn.functional.pad(mono[:, :wanted], (0, max(0, wanted - mono.shape[1])))
    return mono.unflatten(1, (-1, spec.hop * spec.temporal))
