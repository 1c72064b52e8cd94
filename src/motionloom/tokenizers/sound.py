"""From a waveform to a log-mel spectrogram, with torch alone.

Shapes: B batch, S sound channels, N samples, L spectrogram frames, M mel bins, K frequencies of the
transform.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

# Zero crossings of the sinc on each side, and the share of the band that is kept, so that what folds back
# over the edge is damped by the window's skirt.
_CROSSINGS, _ROLLOFF = 6, 0.99


def resample(sound: Tensor, rate: int, new_rate: int) -> Tensor:
    """Sound (..., N) at ``rate`` Hz -> (..., ceil(N x new_rate / rate)) at ``new_rate`` Hz.

    Band-limited interpolation by a sinc under a Hann window (Smith and Gossett 1984), one filter for each of
    the positions that the new samples take between the old ones.
    """
    if rate == new_rate:
        return sound
    shared = math.gcd(rate, new_rate)
    old, new = rate // shared, new_rate // shared
    filters = _sinc_filters(old, new).to(sound.device, sound.dtype)
    reach = (filters.shape[-1] - old) // 2
    count = -(-sound.shape[-1] * new // old)
    padded = torch.nn.functional.pad(sound.reshape(-1, 1, sound.shape[-1]), (reach, reach + old))
    steps = torch.nn.functional.conv1d(padded, filters, stride=old)  # rows, new positions, blocks
    return steps.transpose(1, 2).flatten(1)[:, :count].reshape(*sound.shape[:-1], count)


@lru_cache(maxsize=16)
def _sinc_filters(old: int, new: int) -> Tensor:
    """(new, 1, taps) float32: filter p weighs old samples for a new one p / new of a block further on."""
    band = min(old, new) * _ROLLOFF
    reach = math.ceil(_CROSSINGS * old / band)
    taps = torch.arange(-reach, reach + old, dtype=torch.float64) / old
    positions = torch.arange(new, dtype=torch.float64) / new
    crossings = (taps - positions[:, None]) * band
    window = torch.cos(crossings.clamp(-_CROSSINGS, _CROSSINGS) * math.pi / (2 * _CROSSINGS)) ** 2
    return (torch.sinc(crossings) * window * band / old).float()[:, None]


def log_mel(sound: Tensor, rate: int, *, bins: int = 64, n_fft: int = 1024, hop: int = 160) -> Tensor:
    """Sound (..., N) -> natural log of the mel magnitudes (..., L, M), L = 1 + N // hop.

    Frame l is centred on sample l x hop; the ends are mirrored. N must exceed n_fft / 2. Magnitudes, not
    powers, and none below 1e-5: the front end of LTX-2's audio VAE.
    """
    window = torch.hann_window(n_fft, device=sound.device, dtype=sound.dtype)
    flat = sound.reshape(-1, sound.shape[-1])
    spectrum = torch.stft(
        flat, n_fft, hop, window=window, center=True, pad_mode="reflect", return_complex=True
    ).abs()
    mel = spectrum.transpose(1, 2) @ mel_filters(rate, bins, n_fft).to(spectrum)
    return mel.clamp_min(1e-5).log().reshape(*sound.shape[:-1], -1, bins)


@lru_cache(maxsize=16)
def mel_filters(rate: int, bins: int, n_fft: int) -> Tensor:
    """Triangles (K, M) from 0 to rate / 2 on Slaney's mel scale, each of area 1 (Auditory Toolbox, 1998)."""
    hertz_K = torch.linspace(0, rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    top = _mel(rate / 2)
    edges = torch.tensor([_hertz(top * i / (bins + 1)) for i in range(bins + 2)], dtype=torch.float64)
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    rise = (hertz_K[:, None] - low) / (centre - low)
    fall = (high - hertz_K[:, None]) / (high - centre)
    return (torch.minimum(rise, fall).clamp_min(0) * 2 / (high - low)).float()


# Slaney's scale: 3 mel for 200 Hz up to 1000 Hz, then 27 mel for a factor of 6.4.
_BREAK_HZ, _BREAK_MEL = 1000.0, 15.0


def _mel(hertz: float) -> float:
    if hertz < _BREAK_HZ:
        return hertz * 3 / 200
    return _BREAK_MEL + 27 * math.log(hertz / _BREAK_HZ) / math.log(6.4)


def _hertz(mel: float) -> float:
    if mel < _BREAK_MEL:
        return mel * 200 / 3
    return _BREAK_HZ * math.exp((mel - _BREAK_MEL) * math.log(6.4) / 27)
