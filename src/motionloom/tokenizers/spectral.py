"""`spectral`: magnitudes of two spectrograms in a basis fitted in closed form. No download, no training.

Encode: sound is mixed to one channel and looked at twice, below 1.5 kHz through long windows, which tell
pitches apart, and above through short ones, which tell moments apart. Square roots of the magnitudes of all
frames that fall into a latent are projected on their leading principal components.

Decode: the basis gives magnitudes back, and phases are made up for them: each peak of a frame is a tone that
goes on from where the frame before left it, and the frequencies about a peak move with it (phase locking,
Laroche and Dolson 1999). Overlap-add then gives T latents exactly T x ``spec.hop`` samples. Every latent
encodes by itself but for half a window on either side.

Shapes: B batch, S sound channels, N samples, T latents, C channels of a latent, D numbers of all frames in a
latent; L frames and K frequencies of a spectrogram.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import fold, pad

from motionloom.config.entries import from_entries
from motionloom.config.recipe import AudioConfig
from motionloom.durable import write_tensors
from motionloom.errors import UserError
from motionloom.tokenizers.audio import AudioTokenizerSpec
from motionloom.tokenizers.basis import Basis, Moments
from motionloom.tokenizers.sound import resample

_NOTE, _FILE = "audio_tokenizer.json", "audio_tokenizer.safetensors"
_EDGE_HZ = 1500.0
# Attacks are rare and short, and would be the last thing that the basis spends its channels on.
_WEIGHT_ABOVE = 3.0
_FRAMES_BELOW, _FRAMES_ABOVE = 4, 8  # spectrogram frames in a latent
_SECONDS_BELOW, _SECONDS_ABOVE = 0.032, 0.016  # length of a window, or two hops where that is longer
_QUIET = 1e-6  # of a full-scale tone: what lies below has no peaks


class SpectralAudio:
    """See the module's docstring. Build with :meth:`fit` or :meth:`open`."""

    def __init__(self, spec: AudioTokenizerSpec, basis: Basis) -> None:
        self.spec = spec
        self._basis = basis
        self._bands = _bands(spec)

    @staticmethod
    def fit(config: AudioConfig, sounds: Sequence[Tensor], sample_rate: int) -> SpectralAudio:
        """Fit on sounds (S, N) in [-1, 1] of one rate.

        Raises:
            UserError: no sounds, one without samples, or more channels than the frames of a latent have
                numbers.
        """
        spec = AudioTokenizerSpec.of(config)
        bands, moments = _bands(spec), Moments()
        most = sum(band.numbers for band in bands)
        if spec.channels > most:
            raise UserError(
                f"audio.channels {spec.channels} exceeds the {most} numbers of a latent's spectrum: set it "
                f"to {most} or less"
            )
        for sound_SN in sounds:
            moments.add(_features(_mono(sound_SN[None], sample_rate, spec), bands))
        if not moments.count:
            raise UserError(
                "tokenizer `spectral` has no sound to be fitted on: check that the clips have any"
            )
        return SpectralAudio(spec, Basis.of(moments, spec.channels, config.whiten))

    @staticmethod
    def open(folder: Path) -> SpectralAudio:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: a file is missing, damaged, or not the one that the json describes.
        """
        file, note = folder / _FILE, folder / _NOTE
        try:
            settings = json.loads(note.read_text())
            settings.pop("type")
            spec = from_entries(AudioTokenizerSpec, settings, str(note), "spectral")
            numbers = sum(band.numbers for band in _bands(spec))
            return SpectralAudio(spec, Basis.named(load_file(file), "sound", numbers, spec.channels))
        except (OSError, SafetensorError, AssertionError, KeyError, ValueError) as error:
            raise UserError(f"{file}: not a readable tokenizer ({error}): fit or copy it again") from None

    def encode(self, sound_BSN: Tensor, sample_rate: int) -> Tensor:
        """Sound (B, S, N), mixed to one channel -> float32 (B, T, C). Raises UserError for no samples."""
        features_BTD = _features(_mono(sound_BSN, sample_rate, self.spec), self._bands)
        return self._basis.to_latent(features_BTD).to(sound_BSN.device)

    def decode(self, latents_BTC: Tensor) -> tuple[Tensor, int]:
        """float (B, T, C) -> sound (B, 1, T x hop) float32 in [-1, 1], and its sample rate."""
        features_BTD = self._basis.to_patches(latents_BTC.float().cpu())
        parts = features_BTD.split([band.numbers for band in self._bands], dim=-1)
        sound_BN = sum(
            (band.sound(part) for band, part in zip(self._bands, parts, strict=True)), torch.zeros(())
        )
        return sound_BN[:, None].clamp(-1.0, 1.0).to(latents_BTC.device), self.spec.sample_rate

    def fingerprint(self) -> str:
        settings = {"type": "spectral", "spec": asdict(self.spec), "bands": [asdict(b) for b in self._bands]}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for name, tensor in sorted(self._basis.tensors("sound").items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / _FILE, self._basis.tensors("sound"))
        (folder / _NOTE).write_text(json.dumps({"type": "spectral", **asdict(self.spec)}, indent=1))


@dataclass(frozen=True)
class Band:
    """One spectrogram, of which a range of frequencies counts; frame l is centred on (l + 1/2) hops."""

    window: int
    """Samples of a window, Hann's."""
    hop: int
    frames: int
    """In a latent."""
    first: int
    """Its range of frequencies begins here,"""
    end: int
    """and ends before."""
    weight: float
    """Of its numbers, beside the other band's."""

    @property
    def numbers(self) -> int:
        """In a latent."""
        return self.frames * (self.end - self.first)

    def features(self, sound_BN: Tensor) -> Tensor:
        """Sound of whole latents -> weighted square roots of the magnitudes (B, T, numbers).

        A tone of amplitude 1 has magnitude 1 at its peak.
        """
        hann = torch.hann_window(self.window)
        before, after = self._reach
        frames_BLn = pad(sound_BN, (before, after)).unfold(1, self.window, self.hop) * hann
        magnitude_BLK = torch.fft.rfft(frames_BLn).abs()[..., self.first : self.end] * (2 / hann.sum())
        return (magnitude_BLK.sqrt() * self.weight).unflatten(1, (-1, self.frames)).flatten(2)

    def sound(self, features: Tensor) -> Tensor:
        """What :meth:`features` gave, or something like it -> sound (B, N)."""
        magnitude_BLK = (features.unflatten(2, (self.frames, -1)) / self.weight).clamp_min(0).square()
        magnitude_BLK = pad(magnitude_BLK.flatten(1, 2), (self.first, self.window // 2 + 1 - self.end))
        spectrum = torch.polar(magnitude_BLK, self._phases(magnitude_BLK))
        hann = torch.hann_window(self.window)
        frames_BLn = torch.fft.irfft(spectrum * (hann.sum() / 2), n=self.window) * hann
        added, energy = self._overlap(frames_BLn), self._overlap((hann**2).expand_as(frames_BLn[:1]))
        begin = self._reach[0]
        whole = slice(begin, begin + self.hop * magnitude_BLK.shape[1])
        return (added / energy.clamp_min(1e-3))[:, whole]

    @property
    def _reach(self) -> tuple[int, int]:
        """Samples that the first window begins before the sound, and the last ends after it."""
        before = (self.window - self.hop) // 2
        return before, self.window - self.hop - before

    def _overlap(self, frames_BLn: Tensor) -> Tensor:
        length = (frames_BLn.shape[1] - 1) * self.hop + self.window
        columns = frames_BLn.transpose(1, 2)
        return fold(columns, (1, length), (1, self.window), stride=(1, self.hop))[:, 0, 0]

    def _phases(self, magnitude_BLK: Tensor) -> Tensor:
        """Phases (B, L, K) by phase locking (Laroche and Dolson, Improved phase vocoder, 1999).

        The phase of a peak grows by its frequency, the mean of this frame's and the last one's.
        """
        batch, frames, count = magnitude_BLK.shape
        index_K = torch.arange(count)
        step = 2 * math.pi * self.hop / self.window  # radians in a hop at frequency 1
        phase_BK = torch.zeros(batch, count, dtype=torch.float64)
        before_BK = torch.zeros_like(phase_BK)
        phases = []
        for frame in range(frames):
            peak_BK, frequency_BK = _peaks(magnitude_BLK[:, frame])
            last_BK = before_BK.gather(1, peak_BK) if frame else frequency_BK
            phase_BK = phase_BK.gather(1, peak_BK) + step * (frequency_BK + last_BK) / 2
            before_BK = frequency_BK
            # Phases are those at the middle of the window, where the FFT's k-th wave has turned k halves.
            phases.append((phase_BK - math.pi * index_K).remainder(2 * math.pi))
        return torch.stack(phases, dim=1).float()


def _bands(spec: AudioTokenizerSpec) -> tuple[Band, Band]:
    samples = spec.hop * spec.temporal
    assert samples % _FRAMES_ABOVE == 0, f"{samples} samples in a latent do not divide by {_FRAMES_ABOVE}"
    sizes = (_FRAMES_BELOW, _SECONDS_BELOW), (_FRAMES_ABOVE, _SECONDS_ABOVE)
    hops = [samples // frames for frames, _ in sizes]
    below, above = (
        max(2 * round(seconds * spec.sample_rate / 2), 2 * hop)
        for hop, (_, seconds) in zip(hops, sizes, strict=True)
    )
    edges = [math.ceil(_EDGE_HZ * window / spec.sample_rate) for window in (below, above)]
    return (
        Band(below, hops[0], _FRAMES_BELOW, 0, edges[0], 1.0),
        Band(above, hops[1], _FRAMES_ABOVE, edges[1], above // 2 + 1, _WEIGHT_ABOVE),
    )


def _peaks(magnitude_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Of each frequency the peak that it belongs to, (B, K) int64, and that peak's exact frequency, float64.

    From a frequency uphill to the next peak. Where a peak lies between two frequencies, a parabola through
    the logarithms of its three magnitudes says (Smith and Serra 1987).
    """
    count = magnitude_BK.shape[1]
    index_K = torch.arange(count)
    level_BK = (magnitude_BK.double() + _QUIET).log()
    left, at, right = pad(level_BK, (1, 1), value=-math.inf).unfold(1, count, 1).unbind(1)
    is_peak = (at >= left) & (at > right)
    peak_BK = torch.where(is_peak, index_K, torch.where(right > left, index_K + 1, index_K - 1))
    peak_BK = peak_BK.clamp(0, count - 1)
    for _ in range(count.bit_length()):  # each time twice as far
        peak_BK = peak_BK.gather(1, peak_BK)
    bend = at - (left + right) / 2
    offset = ((right - left) / (4 * bend)).nan_to_num(0.0, 0.0, 0.0).clamp(-0.5, 0.5)
    return peak_BK, (index_K + offset).gather(1, peak_BK)


def _features(sound_BN: Tensor, bands: Sequence[Band]) -> Tensor:
    return torch.cat([band.features(sound_BN) for band in bands], dim=-1)


def _mono(sound_BSN: Tensor, rate: int, spec: AudioTokenizerSpec) -> Tensor:
    """(B, N) at the spec's rate, cut or filled with silence to whole latents. Raises UserError."""
    if not sound_BSN.shape[-1]:
        raise UserError("sound without samples: give at least one")
    mono_BN = resample(sound_BSN.float().cpu().mean(dim=1), rate, spec.sample_rate)
    samples = spec.latents(sound_BSN.shape[-1] / rate) * spec.hop * spec.temporal
    return pad(mono_BN[:, :samples], (0, max(0, samples - mono_BN.shape[1])))
