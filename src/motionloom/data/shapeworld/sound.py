"""Sound tied to motion: a tone whose pitch follows the first object's height, and a click at each bounce.

Sound is (channels, samples) float32 in [-1, 1]; this world's is mono.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from motionloom.data.shapeworld.spec import ClipSpec, bounce_times, trajectory

SAMPLE_RATE = 16_000
LOW_HZ, HIGH_HZ = 220.0, 880.0  # at the bottom and at the top of the frame; equal steps sound equal
TONE, CLICK = 0.3, 0.6  # amplitudes
CLICK_HZ, CLICK_SECONDS = 3500.0, 0.0015  # a click rings at this pitch and decays by 1/e in this time
FADE_SECONDS = 0.004  # at both ends, so that start and end do not click


@dataclass(frozen=True)
class Heard:
    """What a sound says: pitch in Hz at each time (0 where it is silent), and its clicks in seconds."""

    seconds_T: np.ndarray
    pitch_T: np.ndarray
    clicks: np.ndarray

    @property
    def height_T(self) -> np.ndarray:
        """Height of the object that makes this pitch: 0 at the bottom of the frame, 1 at the top."""
        return np.log(np.maximum(self.pitch_T, 1.0) / LOW_HZ) / np.log(HIGH_HZ / LOW_HZ)


def pitch(height: np.ndarray) -> np.ndarray:
    """Hz for a height of 0 (bottom) to 1 (top of the frame)."""
    return LOW_HZ * (HIGH_HZ / LOW_HZ) ** height


def synthesize(scenes: tuple[ClipSpec, ...], sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Sound (1, samples) of scenes in a row. The phase runs on over cuts: pitch jumps, the wave does not."""
    total = round(sum(scene.duration for scene in scenes) * sample_rate)
    seconds = np.arange(total) / sample_rate
    hertz, clicks = np.empty(total), np.zeros(total)
    start = 0.0
    for scene in scenes:
        here = slice(round(start * sample_rate), round((start + scene.duration) * sample_rate))
        # The last frame stays on screen for its own duration, hence the clip.
        s = np.minimum((seconds[here] - start) * scene.fps / (scene.frames - 1), 1.0)
        _, y, _, _ = trajectory(scene.objects[0], s)
        hertz[here] = pitch(1 - y * min(scene.height, scene.width) / scene.height)
        for touch in bounce_times(scene.objects[0]):
            after = seconds - (start + touch * (scene.frames - 1) / scene.fps)
            ring = np.sin(2 * np.pi * CLICK_HZ * after) * np.exp(-np.maximum(after, 0) / CLICK_SECONDS)
            clicks += np.where(after >= 0, ring, 0.0)
        start += scene.duration
    tone = np.sin(2 * np.pi * np.cumsum(hertz) / sample_rate)
    fade = np.clip(np.minimum(seconds, seconds[::-1]) / FADE_SECONDS, 0.0, 1.0)
    return (TONE * tone * fade + CLICK * clicks).astype(np.float32)[None]


def hear(sound: np.ndarray, sample_rate: int, hop_seconds: float = 0.02) -> Heard:
    """Read pitch and clicks back from sound (channels, samples) of at least 64 ms, at 8 kHz or more."""
    wave = np.asarray(sound, np.float64).mean(axis=0)
    window = round(0.064 * sample_rate)
    assert len(wave) >= window, "at least 64 ms of sound"
    starts = np.arange(0, len(wave) - window + 1, max(1, round(hop_seconds * sample_rate)))
    pieces = wave[starts[:, None] + np.arange(window)] * np.hanning(window)
    return Heard(
        (starts + window / 2) / sample_rate, _pitches(pieces, sample_rate), _clicks(wave, sample_rate)
    )


def _pitches(pieces: np.ndarray, sample_rate: int) -> np.ndarray:
    """Strongest tone of each piece between half an octave below and above the world's range; 0 if none."""
    points = 8 * pieces.shape[1]
    spectrum = np.abs(np.fft.rfft(pieces, points))
    hertz = np.fft.rfftfreq(points, 1 / sample_rate)
    spectrum[:, (hertz < LOW_HZ / 1.42) | (hertz > HIGH_HZ * 1.42)] = 0.0
    peak = np.clip(spectrum.argmax(axis=1), 1, spectrum.shape[1] - 2)
    row = np.arange(len(pieces))
    before, at, after = (np.log(spectrum[row, peak + k] + 1e-12) for k in (-1, 0, 1))
    bend = before - 2 * at + after
    offset = np.where(np.abs(bend) > 1e-9, 0.5 * (before - after) / np.where(bend == 0, 1, bend), 0.0)
    # A tone of amplitude a peaks at a * window / 4 under a Hann window.
    loud = spectrum[row, peak] > 0.02 * pieces.shape[1] / 4
    return np.where(loud, (peak + np.clip(offset, -0.5, 0.5)) * sample_rate / points, 0.0)


def _clicks(wave: np.ndarray, sample_rate: int) -> np.ndarray:
    """Onsets of bursts about CLICK_HZ, by demodulating that band and taking its peaks."""
    carrier = np.exp(-2j * np.pi * CLICK_HZ * np.arange(len(wave)) / sample_rate)
    width = round(0.004 * sample_rate)
    kernel = np.hanning(width + 2)[1:-1]
    envelope = 2 * np.abs(np.convolve(wave * carrier, kernel / kernel.sum(), mode="same"))
    apart = round(0.03 * sample_rate)
    times: list[float] = []
    for index in np.argsort(-envelope):
        if envelope[index] < 0.15 * CLICK:
            break
        if all(abs(index / sample_rate - t) > apart / sample_rate for t in times):
            times.append(index / sample_rate)
    return np.sort(np.asarray(times)) - CLICK_SECONDS / 2
