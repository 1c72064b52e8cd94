"""`ltx2_audio`: LTX-2's audio VAE and vocoder: stereo at 16 kHz <-> 25 latents a second of 128 numbers.

Encode: log-mel spectrogram (64 bins, 100 frames a second) -> VAE, which looks back only; the mean of the
posterior; its channels and frequency rows laid side by side make a latent, normalised by the model's
statistics. Decode: VAE -> spectrogram -> vocoder (24 kHz; with bandwidth extension 48 kHz). T latents hold 4
T - 3 spectrogram frames, so the sound that comes back is 0.03 s shorter than T / 25 s. All of it in float32.

LTX-2: arXiv 2601.03233. Shapes: B batch, S sound channels, N samples, T latents, L spectrogram frames, M mel
bins, C numbers of a latent, c channels and m frequency rows of the VAE's latents.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from motionloom.errors import UserError
from motionloom.tokenizers import checks, diffusers_folder
from motionloom.tokenizers.audio import AudioTokenizerSpec
from motionloom.tokenizers.sound import log_mel, resample

_N_FFT = 1024
_NOTE = "audio_tokenizer.json"
_VAE, _VOCODER = "audio_vae", "vocoder"
_VOCODERS = dict.fromkeys(("LTX2Vocoder", "LTX2VocoderWithBWE"), "pipelines.ltx2.vocoder")


class LTX2Audio:
    """See the module's docstring. Build with :meth:`open`, or from the two models."""

    def __init__(self, vae: Any, vocoder: Any) -> None:
        """Both models in float32. Raises ValueError for models that do not fit each other or this adapter."""
        with checks.damage_as_value_error():
            self.spec = _spec(vae)
            checks.require_statistics(vae.latents_mean, vae.latents_std, self.spec.channels)
            self._output_rate = _output_rate(vae.config, vocoder.config)
        self._vae, self._vocoder = vae, vocoder
        self._fingerprint = ""

    @staticmethod
    def open(folder: Path) -> LTX2Audio:
        """The models in ``audio_vae/`` and ``vocoder/`` of a folder, as in LTX-2's pipeline.

        Raises:
            UserError: one is missing, damaged, of another class, or does not fit the other.
        """
        if not (folder / _VAE).is_dir() or not (folder / _VOCODER).is_dir():
            raise UserError(f"{folder}: no audio tokenizer here: name a folder with {_VAE}/ and {_VOCODER}/")
        vae = diffusers_folder.load(folder / _VAE, {"AutoencoderKLLTX2Audio": "models"}, torch.float32)
        vocoder = diffusers_folder.load(folder / _VOCODER, _VOCODERS, torch.float32)
        try:
            return LTX2Audio(vae, vocoder)
        except ValueError as error:
            raise UserError(f"{folder}: not an audio tokenizer for this version ({error})") from None

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self._vae.parameters()).device

    def to(self, device: torch.device | str) -> LTX2Audio:
        """Move it; what it is given may stay elsewhere, results return there."""
        self._vae.to(device)
        self._vocoder.to(device)
        return self

    def spectrogram(self, sound_BSN: Tensor, sample_rate: int) -> Tensor:
        """Sound (B, 1 or 2, N) -> log-mel (B, S, L, M); one channel is heard on both sides.

        Raises:
            UserError: more channels than the model has, or less sound than one window.
        """
        wanted, config = self._vae.config.in_channels, self._vae.config
        channels = sound_BSN.shape[1]
        if channels not in (1, wanted):
            raise UserError(
                f"sound of {channels} channels: the tokenizer takes 1 or {wanted}; mix it down first"
            )
        sound = resample(sound_BSN.to(self.device).float(), sample_rate, self.spec.sample_rate)
        if sound.shape[-1] <= _N_FFT // 2:
            least = _N_FFT / 2 / self.spec.sample_rate
            raise UserError(
                f"{sound_BSN.shape[-1]} samples of sound are too short: give more than {least:g} s"
            )
        mel = log_mel(sound, self.spec.sample_rate, bins=config.mel_bins, n_fft=_N_FFT, hop=self.spec.hop)
        return mel.expand(-1, wanted, -1, -1)

    @torch.no_grad()
    def encode(self, sound_BSN: Tensor, sample_rate: int) -> Tensor:
        """Sound (B, 1 or 2, N) -> float32 (B, T, C), ``spec.latents`` of its length. Raises UserError."""
        latents = self.spec.latents(sound_BSN.shape[-1] / sample_rate)
        # What the last latent does not hold is cut: the encoder looks back only, so the others do not change.
        mel_BSLM = self.spectrogram(sound_BSN, sample_rate)[:, :, : self.spec.frames(latents)]
        z_BcTm = self._vae.encode(mel_BSLM).latent_dist.mode()
        z_BTC = z_BcTm.transpose(1, 2).flatten(2)
        return ((z_BTC - self._vae.latents_mean) / self._vae.latents_std).to(sound_BSN.device)

    @torch.no_grad()
    def decode(self, latents_BTC: Tensor) -> tuple[Tensor, int]:
        """float (B, T, C) -> sound (B, S, N) float32 in [-1, 1], and its sample rate."""
        z_BTC = latents_BTC.to(self.device).float() * self._vae.latents_std + self._vae.latents_mean
        z_BcTm = z_BTC.unflatten(2, (self._vae.config.latent_channels, -1)).transpose(1, 2)
        sound = self._vocoder(self._vae.decode(z_BcTm.contiguous()).sample)
        return sound.clamp(-1.0, 1.0).to(latents_BTC.device), self._output_rate

    def fingerprint(self) -> str:
        if not self._fingerprint:
            settings = {"type": "ltx2_audio", "n_fft": _N_FFT}
            self._fingerprint = diffusers_folder.digest(self._vae, self._vocoder, extra=settings)
        return self._fingerprint

    def save(self, folder: Path) -> None:
        """Both models in diffusers' layout, and a note that says what they are."""
        diffusers_folder.save(self._vae, folder / _VAE)
        diffusers_folder.save(self._vocoder, folder / _VOCODER)
        (folder / _NOTE).write_text(json.dumps({"type": "ltx2_audio"}))


def _spec(vae: Any) -> AudioTokenizerSpec:
    config = vae.config
    if config.causality_axis != "height":
        raise ValueError(f"causality_axis {config.causality_axis!r} is not height, the axis of time")
    names = ("sample_rate", "mel_hop_length", "mel_bins", "latent_channels", "in_channels", "output_channels")
    checks.require_counts(**{name: config[name] for name in names})
    return AudioTokenizerSpec(
        channels=config.latent_channels * (config.mel_bins // vae.mel_compression_ratio),
        sample_rate=config.sample_rate,
        hop=config.mel_hop_length,
        temporal=vae.temporal_compression_ratio,
    )


def _output_rate(config: Any, vocoder: Any) -> int:
    """Hz of the sound that the vocoder makes of the VAE's spectrograms. Raises ValueError.

    Its layers make so many samples of a spectrogram frame; a rate that says otherwise would play the sound
    too fast or too slow. With bandwidth extension there are two such steps.
    """
    heard = config.output_channels * config.mel_bins
    if vocoder.in_channels != heard:
        raise ValueError(f"the vocoder takes {vocoder.in_channels} channels, the VAE makes {heard}")
    steps = [(config.sample_rate, config.mel_hop_length, "output_sampling_rate", vocoder.upsample_factors)]
    if "bwe_upsample_factors" in vocoder:
        steps = [
            (config.sample_rate, config.mel_hop_length, "input_sampling_rate", vocoder.upsample_factors),
            (
                vocoder.input_sampling_rate,
                vocoder.hop_length,
                "output_sampling_rate",
                vocoder.bwe_upsample_factors,
            ),
        ]
    for rate, hop, said, factors in steps:
        checks.require_counts(**{said: vocoder[said]})
        made = rate / hop * math.prod(factors)
        if vocoder[said] != made:
            raise ValueError(f"{said} of the vocoder is {vocoder[said]}, and its layers make {made:g} Hz")
    return int(vocoder.output_sampling_rate)
