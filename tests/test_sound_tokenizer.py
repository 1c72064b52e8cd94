"""`spectral`: sound to latents and back, without a network; the registry of audio tokenizers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from motionloom.config.recipe import AudioConfig, Recipe
from motionloom.data.shapeworld import ClipSpec, World, hear, render_video, sound_agrees
from motionloom.data.shapeworld.sound import SAMPLE_RATE, synthesize
from motionloom.data.shapeworld.spec import bounce_times, trajectory
from motionloom.errors import UserError
from motionloom.rng import torch_generator
from motionloom.tokenizers import (
    AudioTokenizer,
    AudioTokenizerSpec,
    fit_audio_tokenizer,
    load_audio_tokenizer,
    open_audio_tokenizer,
)

WORLD = World.modes()


def sound_of(spec: ClipSpec) -> Tensor:
    return torch.from_numpy(synthesize((spec,)))


def tone(hertz: float, rate: int = 16_000, seconds: float = 1.0, amplitude: float = 0.4) -> Tensor:
    t = torch.arange(round(rate * seconds), dtype=torch.float64) / rate
    return (amplitude * torch.sin(2 * math.pi * hertz * t)).float()[None]


@cache
def tokenizer(channels: int = 24) -> AudioTokenizer:
    """Fitted on clips of the train split."""
    sounds = [sound_of(WORLD.sample(0, i)) for i in range(100)]
    return fit_audio_tokenizer(AudioConfig(channels=channels), sounds, SAMPLE_RATE)


@cache
def heldout() -> tuple[tuple[ClipSpec, ...], Tensor]:
    """Clips of combinations that no clip of the fit has, and their sounds (B, 1, N)."""
    specs = tuple(WORLD.sample(1, i, "test") for i in range(48))
    return specs, torch.stack([sound_of(spec) for spec in specs])


# Time


def test_latents_of_equal_length_become_seconds() -> None:
    spec = AudioTokenizerSpec.of(AudioConfig(latents_per_second=16))
    assert (spec.latents(2.125), spec.latents(0.001), spec.latents_per_second) == (34, 1, 16)
    torch.testing.assert_close(spec.spans(3), torch.tensor([[0, 1 / 16], [1 / 16, 2 / 16], [2 / 16, 3 / 16]]))
    torch.testing.assert_close(spec.seconds(3), torch.tensor([1 / 32, 3 / 32, 5 / 32]))


def test_the_first_latent_of_ltx2_is_short() -> None:
    spec = AudioTokenizerSpec.of(AudioConfig(type="ltx2_audio", channels=128, latents_per_second=25))
    assert spec == AudioTokenizerSpec(channels=128, sample_rate=16_000, hop=160, temporal=4)
    torch.testing.assert_close(spec.spans(3), torch.tensor([[0, 0.01], [0.01, 0.05], [0.05, 0.09]]))
    torch.testing.assert_close(spec.seconds(3), torch.tensor([0.005, 0.03, 0.07]))


def test_latents_stand_where_their_sound_is() -> None:
    """A beep within one latent's span moves that latent most."""
    spec, silence = tokenizer().spec, torch.zeros(1, 1, 16_000)
    still = tokenizer().encode(silence, 16_000)
    for index in (0, 7, 15):
        begin, end = (round(float(t) * 16_000) for t in spec.spans(16)[index])
        sound = silence.clone()
        sound[..., begin + 250 : end - 250] = tone(440, seconds=1.0)[:, : end - begin - 500]
        change = (tokenizer().encode(sound, 16_000) - still).norm(dim=-1)[0]
        assert change.argmax() == index
        assert change[[i for i in range(16) if abs(i - index) > 1]].max() < 1e-3


# Sound to latents and back


def judged(sounds: np.ndarray, specs: tuple[ClipSpec, ...]) -> tuple[list[float], int, int, int]:
    """Correlations of pitch and height of vertical movers; clicks right, wanted, and wrong."""
    correlations, right, wanted, wrong = [], 0, 0, 0
    for wave, spec in zip(sounds, specs, strict=True):
        heard, mover = hear(wave, SAMPLE_RATE), spec.objects[0]
        height = 1 - trajectory(mover, np.minimum(heard.seconds_T * spec.fps / (spec.frames - 1), 1))[1]
        if np.ptp(height) > 0.1:
            correlations.append(float(np.corrcoef(heard.height_T, height)[0, 1]))
        touches = bounce_times(mover) * (spec.frames - 1) / spec.fps
        near = np.abs(heard.clicks[:, None] - touches[None]) < 1 / 16
        right += int(near.any(axis=0).sum())
        wanted += len(touches)
        wrong += int((~near.any(axis=1)).sum())
    return correlations, right, wanted, wrong


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_pitch_and_clicks_come_back(noise: float) -> None:
    specs, sounds = heldout()
    latents = tokenizer().encode(sounds, SAMPLE_RATE)
    assert latents.shape == (48, 34, 24)
    latents = latents + noise * torch.randn(latents.shape, generator=torch_generator("latent noise"))
    back, rate = tokenizer().decode(latents)
    assert back.shape == sounds.shape
    assert rate == SAMPLE_RATE
    correlations, right, wanted, wrong = judged(back.numpy(), specs)
    assert len(correlations) > 15
    assert min(correlations) > 0.99
    assert wanted > 10
    assert right >= 0.98 * wanted
    assert wrong == 0


def test_the_oracle_hears_no_difference() -> None:
    specs, sounds = heldout()
    back, rate = tokenizer().decode(tokenizer().encode(sounds, SAMPLE_RATE))
    for spec, wave in zip(specs[:20], back.numpy(), strict=False):
        agrees = sound_agrees(render_video(spec), wave, rate, spec.fps, WORLD)
        assert agrees.correlation is None or agrees.correlation > 0.99
        assert agrees.error is not None
        assert agrees.error < 0.02
        assert agrees.clicks_right


def test_a_chord_keeps_its_tones_and_loudness() -> None:
    """Several tones at once, which the basis was fitted on but the phases know nothing of."""
    wanted = (300.0, 500.0, 900.0)
    chords = [sum((tone(h * k, amplitude=0.2) for h in wanted), torch.zeros(())) for k in (0.9, 1.0, 1.1)]
    tokens = fit_audio_tokenizer(AudioConfig(channels=32), chords, 16_000)
    back = tokens.decode(tokens.encode(chords[1][None], 16_000))[0][0, 0, 2000:-2000]
    spectrum = torch.fft.rfft(back * torch.hann_window(len(back))).abs() * 4 / len(back)
    hertz = torch.arange(len(spectrum)) * 16_000 / len(back)
    for tone_hz in wanted:
        near = (hertz - tone_hz).abs() < 30
        assert spectrum[near].max() == pytest.approx(0.2, rel=0.25)
        assert (hertz[near][spectrum[near].argmax()] - tone_hz).abs() < 5
    assert spectrum[(hertz > 1100) | (hertz < 200)].max() < 0.01


def test_strong_channels_come_first_and_their_scale_is_one() -> None:
    for whiten, flat in ((0.0, False), (1.0, True)):
        sounds = [sound_of(WORLD.sample(0, i)) for i in range(40)]
        tokens = fit_audio_tokenizer(AudioConfig(channels=12, whiten=whiten), sounds, SAMPLE_RATE)
        latents = tokens.encode(torch.stack(sounds), SAMPLE_RATE).flatten(0, 1)
        deviation = latents.std(dim=0)
        assert latents.mean(dim=0).abs().max() < 1e-3
        assert deviation.square().mean().sqrt() == pytest.approx(1.0, abs=0.01)
        assert (deviation[0] / deviation[-1] > 3) != flat
        assert bool((deviation.diff() < 1e-3).all())


def test_any_rate_and_stereo_are_heard_as_one() -> None:
    mono = tone(440, 16_000)[None]
    wanted = tokenizer().encode(mono, 16_000)
    for rate in (8_000, 22_050, 48_000):
        latents = tokenizer().encode(tone(440, rate)[None], rate)
        assert latents.shape == wanted.shape
        assert (latents - wanted)[:, 1:-1].abs().max() < 0.1 * wanted.abs().max()
    silent_left = torch.cat([torch.zeros_like(mono), 2 * mono], dim=1)
    torch.testing.assert_close(tokenizer().encode(silent_left, 16_000), wanted)


@pytest.mark.parametrize("samples", [1, 999, 15_600, 16_400, 17_001])
def test_every_length_becomes_whole_latents(samples: int) -> None:
    latents = tokenizer().encode(tone(440, seconds=2.0)[None, :, :samples], 16_000)
    assert latents.shape[1] == max(1, round(samples / 1000))
    assert tokenizer().decode(latents)[0].shape == (1, 1, 1000 * latents.shape[1])


def test_silence_stays_silent_and_equal_sounds_equal() -> None:
    quiet = tokenizer().encode(torch.zeros(1, 1, 16_000), 16_000)
    assert tokenizer().decode(quiet)[0].abs().max() < 0.02
    sound = heldout()[1][:2]
    latents = tokenizer().encode(sound, SAMPLE_RATE)
    assert torch.equal(latents, tokenizer().encode(sound, SAMPLE_RATE))
    assert torch.equal(tokenizer().decode(latents)[0], tokenizer().decode(latents)[0])


# On disk and in recipes


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    tokenizer().save(tmp_path)
    loaded = load_audio_tokenizer(tmp_path)
    assert (loaded.spec, loaded.fingerprint()) == (tokenizer().spec, tokenizer().fingerprint())
    latents = tokenizer().encode(heldout()[1][:2], SAMPLE_RATE)
    assert torch.equal(loaded.encode(heldout()[1][:2], SAMPLE_RATE), latents)
    assert torch.equal(loaded.decode(latents)[0], tokenizer().decode(latents)[0])
    assert tokenizer(16).fingerprint() != tokenizer(24).fingerprint()
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    config = AudioConfig(name_or_path=str(tmp_path))
    assert open_audio_tokenizer(config).fingerprint() == tokenizer().fingerprint()


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"channels": 16}, "audio.channels is 24 in the tokenizer and 16 in the recipe"),
        ({"sample_rate": 48_000}, "audio.sample_rate is 16000 in the tokenizer and 48000"),
        ({"latents_per_second": 20}, "audio.latents_per_second is 16 in the tokenizer and 20"),
        ({"type": "ltx2_audio"}, "is a spectral tokenizer and audio.type is ltx2_audio"),
    ],
)
def test_a_tokenizer_of_another_shape_is_refused(
    changes: dict[str, object], said: str, tmp_path: Path
) -> None:
    tokenizer().save(tmp_path)
    with pytest.raises(UserError, match=said):
        open_audio_tokenizer(AudioConfig(name_or_path=str(tmp_path), **changes))  # type: ignore[arg-type]


def edited(**changes: object) -> Callable[[Path], object]:
    def change(folder: Path) -> object:
        note = folder / "audio_tokenizer.json"
        return note.write_text(json.dumps(json.loads(note.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda f: (f / "audio_tokenizer.safetensors").unlink(), "not a readable tokenizer"),
        (lambda f: (f / "audio_tokenizer.safetensors").write_bytes(b"\x80"), "not a readable tokenizer"),
        (lambda f: (f / "audio_tokenizer.json").write_text("{"), "not a tokenizer's"),
        (lambda f: (f / "audio_tokenizer.json").unlink(), "no audio tokenizer here"),
        (edited(type="codec"), "type 'codec' is unknown: this version has spectral, ltx2_audio"),
        (edited(channels=23), "instead of"),
        (edited(hop=1001), "1001 samples in a latent do not divide by 8"),
        (edited(hop="x"), "hop is 'x'"),
    ],
)
def test_a_damaged_folder_is_named(damage: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    tokenizer().save(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=said) as error:
        load_audio_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(UserError, match="no sound to be fitted on"):
        fit_audio_tokenizer(AudioConfig(), [], 16_000)
    with pytest.raises(UserError, match=r"audio.channels 5000 exceeds the \d+ numbers"):
        fit_audio_tokenizer(AudioConfig(channels=5000), [tone(440)], 16_000)
    with pytest.raises(UserError, match="ltx2_audio comes with weights"):
        fit_audio_tokenizer(AudioConfig(type="ltx2_audio"), [tone(440)], 16_000)
    with pytest.raises(UserError, match="sound without samples"):
        tokenizer().encode(torch.zeros(1, 1, 0), 16_000)


@pytest.mark.parametrize(
    "audio, said",
    [
        ({"latents_per_second": 24}, "666.667 samples to a latent, .* set audio.sample_rate to 15936"),
        ({"sample_rate": 1280}, "sample_rate 1280 holds no pitch above 640 Hz, .* set it to 4000 or more"),
        ({"type": "ltx2_audio", "channels": 128}, "set audio.name_or_path to a folder with audio_vae/"),
    ],
)
def test_recipes_that_cannot_work_are_refused(audio: dict[str, object], said: str) -> None:
    Recipe.model_validate({"audio": {"enabled": True, "sample_rate": 15936, "latents_per_second": 24}})
    with pytest.raises(ValueError, match=said):
        Recipe.model_validate({"audio": {"enabled": True, **audio}})
