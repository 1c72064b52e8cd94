"""Sound to latents and back: the front end against independent references, the models against diffusers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from motionloom.errors import UserError
from motionloom.rng import torch_generator
from motionloom.tokenizers import load_audio_tokenizer
from motionloom.tokenizers.audio import AudioTokenizerSpec
from motionloom.tokenizers.ltx2_audio import LTX2Audio
from motionloom.tokenizers.sound import log_mel, mel_filters, resample

# Resampling


def sine(hertz: float, rate: int, seconds: float = 0.5) -> Tensor:
    t = torch.arange(round(rate * seconds), dtype=torch.float64) / rate
    return torch.sin(2 * math.pi * hertz * t).float()


@pytest.mark.parametrize(
    "rate, new", [(48000, 16000), (44100, 16000), (24000, 16000), (16000, 24000), (8000, 16000)]
)
def test_a_tone_keeps_its_pitch_phase_and_loudness(rate: int, new: int) -> None:
    for hertz in (50.0, 440.0, 2000.0):
        there, wanted = resample(sine(hertz, rate), rate, new), sine(hertz, new)
        assert there.shape == wanted.shape
        inside = slice(new // 50, -new // 50)  # the ends see silence beyond
        assert (there - wanted)[inside].abs().max() < 5e-3


def test_what_the_new_rate_cannot_hold_is_gone() -> None:
    loud = resample(sine(12000, 48000), 48000, 16000)[500:-500]
    assert loud.abs().max() < 0.01


def test_resampling_keeps_channels_apart_and_lengths_right() -> None:
    sound = torch.stack([sine(200, 44100), torch.zeros(22050)])[None].repeat(3, 1, 1)
    there = resample(sound, 44100, 16000)
    assert there.shape == (3, 2, 8000)
    assert torch.equal(there[0], there[2])
    assert there[:, 1].abs().max() == 0
    assert resample(sound, 44100, 44100) is sound
    assert resample(torch.zeros(1, 100), 3, 2).shape == (1, 67)


# Spectrogram


@pytest.mark.parametrize("rate, bins, n_fft", [(16000, 64, 1024), (24000, 80, 512)])
def test_the_mel_filters_are_slaneys(rate: int, bins: int, n_fft: int) -> None:
    from transformers.audio_utils import mel_filter_bank

    wanted = mel_filter_bank(n_fft // 2 + 1, bins, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney")
    assert wanted.max() > 0.01
    np.testing.assert_allclose(mel_filters(rate, bins, n_fft).numpy(), wanted, atol=1e-7)


def test_the_spectrogram_equals_numpys() -> None:
    sound = torch.randn(2, 1600, generator=torch_generator("spectrogram"))
    got = log_mel(sound, 16000)
    assert got.shape == (2, 11, 64)
    padded = np.pad(sound.numpy().astype(np.float64), ((0, 0), (512, 512)), mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    frames = np.stack([padded[:, 160 * i : 160 * i + 1024] for i in range(11)], axis=1)
    magnitudes = np.abs(np.fft.rfft(frames * window))
    wanted = np.log(np.maximum(magnitudes @ mel_filters(16000, 64, 1024).numpy(), 1e-5))
    np.testing.assert_allclose(got.numpy(), wanted, atol=1e-4)


def test_silence_is_the_floor_and_a_tone_is_in_its_bin() -> None:
    assert torch.equal(log_mel(torch.zeros(1, 3200), 16000), torch.full((1, 21, 64), math.log(1e-5)))
    loudest = log_mel(sine(1000, 16000)[None], 16000)[0, 25].argmax()
    centres = mel_filters(16000, 64, 1024).argmax(dim=0) * 16000 / 1024
    assert (centres[loudest] - 1000).abs() < 40


# The spec


def test_latents_become_seconds() -> None:
    spec = AudioTokenizerSpec(channels=128, sample_rate=16000, hop=160, temporal=4)
    assert spec.latents_per_second == 25
    # [0, .01), [.01, .05), [.05, .09): the first latent holds one frame of the spectrogram.
    torch.testing.assert_close(spec.seconds(3), torch.tensor([0.005, 0.03, 0.07]))
    assert [spec.latents(s) for s in (0.001, 0.5, 1.0, 5.04)] == [1, 12, 25, 126]
    assert [spec.frames(t) for t in (1, 2, 25)] == [1, 5, 97]


# The models


VAE = {"base_channels": 32, "latent_channels": 2, "ch_mult": [1, 1, 2], "num_res_blocks": 1}
VOCODER: dict[str, Any] = {"hidden_channels": 32, "resnet_kernel_sizes": [3], "resnet_dilations": [[1, 3]]}
BWE = VOCODER | {
    "hidden_channels": 64,
    "bwe_hidden_channels": 32,
    "bwe_resnet_kernel_sizes": [3],
    "bwe_resnet_dilations": [[1, 3]],
}
RATES = {"LTX2Vocoder": 24000, "LTX2VocoderWithBWE": 48000}


def with_weights(network: Any, key: str) -> Any:
    """Weights that keep signals of order 1."""
    generator = torch_generator("audio tests", key)
    for parameter in network.parameters():
        value = torch.randn(parameter.shape, generator=generator)
        matrix = parameter.ndim > 1
        parameter.data.copy_(value * (0.7 / parameter[0].numel() ** 0.5 if matrix else 0.1))
    for name, buffer in network.named_buffers():
        if "basis" in name:
            buffer.copy_(torch.rand(buffer.shape, generator=generator) / 100)
    return network.eval().requires_grad_(False)


@cache
def vae() -> Any:
    from diffusers import AutoencoderKLLTX2Audio

    network = with_weights(AutoencoderKLLTX2Audio(**VAE), "vae")
    generator = torch_generator("audio statistics")
    network.latents_mean.copy_(torch.randn(32, generator=generator))
    network.latents_std.copy_(torch.rand(32, generator=generator) + 0.5)
    return network


@cache
def vocoder(name: str = "LTX2Vocoder") -> Any:
    from diffusers.pipelines.ltx2 import vocoder as classes

    return with_weights(getattr(classes, name)(**(BWE if "BWE" in name else VOCODER)), name)


def tokenizer(name: str = "LTX2Vocoder") -> LTX2Audio:
    return LTX2Audio(vae(), vocoder(name))


def noise(samples: int, channels: int = 2, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, samples, generator=torch_generator("noise")) / 10


@pytest.mark.parametrize("name", RATES)
def test_it_equals_diffusers(name: str) -> None:
    tokens, sound = tokenizer(name), noise(24000)
    latents = tokens.encode(sound, 24000)
    assert (latents.shape, latents.dtype) == ((2, 25, 32), torch.float32)
    with torch.no_grad():
        mel = log_mel(resample(sound, 24000, 16000), 16000)[:, :, :97]
        z = vae().encode(mel).latent_dist.mode()  # B c T m
    wanted = (z.permute(0, 2, 1, 3).reshape(2, 25, 32) - vae().latents_mean) / vae().latents_std
    assert wanted.std() > 0.1
    assert (latents - wanted).abs().max() < 1e-5 * wanted.abs().max()
    with torch.no_grad():
        wave = vocoder(name)(vae().decode(z).sample).clamp(-1, 1)
    back, rate = tokens.decode(latents)
    assert rate == RATES[name]
    assert back.shape == (2, 2, 97 * rate // 100)
    assert wave.std() > 0.01
    assert (back - wave).abs().max() < 1e-4 * wave.abs().max()


def test_latents_look_back_only() -> None:
    tokens, sound = tokenizer(), noise(16000)
    latents = tokens.encode(sound, 16000)
    changed = sound.clone()
    changed[..., 9000:] = 0
    # A window reaches 512 samples ahead; latent i ends with spectrogram frame 4 i.
    kept = (9000 - 512) // 160 // 4 + 1
    after = tokens.encode(changed, 16000)
    assert torch.equal(after[:, :kept], latents[:, :kept])
    assert not torch.equal(after[:, kept + 2], latents[:, kept + 2])


def test_one_channel_is_heard_on_both_sides() -> None:
    tokens, mono = tokenizer(), noise(8000, channels=1)
    assert torch.equal(tokens.encode(mono, 16000), tokens.encode(mono.repeat(1, 2, 1), 16000))


@pytest.mark.parametrize("name", RATES)
def test_saved_and_loaded_it_is_the_same(name: str, tmp_path: Path) -> None:
    tokens = tokenizer(name)
    tokens.save(tmp_path / "a")
    loaded = load_audio_tokenizer(tmp_path / "a")
    loaded.save(tmp_path / "b")
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert {file.suffix for file in files} == {".json", ".safetensors"}
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    assert (loaded.spec, loaded.fingerprint()) == (tokens.spec, tokens.fingerprint())
    latents = tokens.encode(noise(8000), 16000)
    assert torch.equal(loaded.encode(noise(8000), 16000), latents)
    assert torch.equal(loaded.to("cpu").decode(latents)[0], tokens.decode(latents)[0])
    assert loaded.fingerprint() != tokenizer(next(n for n in RATES if n != name)).fingerprint()


def test_a_pipelines_folder_is_opened(tmp_path: Path) -> None:
    vae().save_pretrained(tmp_path / "audio_vae")
    vocoder().save_pretrained(tmp_path / "vocoder")
    assert load_audio_tokenizer(tmp_path).fingerprint() == tokenizer().fingerprint()


def edited(file: str, **changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> object:
        content = json.loads((folder / file).read_text()) | changes
        return (folder / file).write_text(json.dumps(content))

    return change


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda f: (f / "vocoder").rename(f / "elsewhere"), "no audio tokenizer here"),
        (lambda f: (f / "vocoder" / "config.json").unlink(), "config.json is missing"),
        (edited("vocoder/config.json", _class_name="LTX2Audio"), "holds LTX2Audio, not LTX2Vocoder or"),
        (edited("vocoder/config.json", in_channels=64), "cannot be loaded|weights do not fit"),
        (
            lambda f: (f / "audio_vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"\x80"),
            "cannot be loaded",
        ),
        (edited("audio_vae/config.json", causality_axis="none"), "causality_axis 'none' is not height"),
        (edited("audio_vae/config.json", mel_bins=32), "32 means for latents of 16 numbers"),
        (edited("audio_vae/config.json", mel_bins=None), "mel_bins is None, not a whole number above 0"),
        (edited("audio_vae/config.json", mel_hop_length=0), "mel_hop_length is 0"),
        (edited("audio_vae/config.json", sample_rate="16000"), "sample_rate is '16000'"),
        # As it would be played too slowly, or at another pitch than it was heard.
        (edited("vocoder/config.json", output_sampling_rate=16000), "its layers make 24000 Hz"),
        (edited("audio_vae/config.json", sample_rate=8000), "rate of the vocoder is 24000, .* make 12000 Hz"),
        (edited("vocoder/config.json", output_sampling_rate=None), "output_sampling_rate is None"),
        (edited("vocoder/config.json", upsample_factors=None), "cannot be loaded as LTX2Vocoder"),
        (edited("vocoder/config.json", upsample_factors=[]), "cannot be loaded as LTX2Vocoder"),
    ],
)
def test_a_damaged_folder_is_named(damage: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    tokenizer().save(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=said) as error:
        load_audio_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changes", [{"input_sampling_rate": 8000}, {"output_sampling_rate": 44100}])
def test_a_vocoder_that_widens_the_band_has_two_rates(changes: dict[str, int], tmp_path: Path) -> None:
    tokenizer("LTX2VocoderWithBWE").save(tmp_path)
    edited("vocoder/config.json", **changes)(tmp_path)
    with pytest.raises(UserError, match=r"its layers make (16000|24000|48000|96000) Hz"):
        load_audio_tokenizer(tmp_path)


def test_a_deviation_of_nothing_is_refused() -> None:
    import copy

    broken = copy.deepcopy(vae())
    broken.latents_std[5] = 0
    with pytest.raises(ValueError, match="deviations of its latents are not all above 0"):
        LTX2Audio(broken, vocoder())


def test_sound_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="sound of 6 channels: the tokenizer takes 1 or 2"):
        tokenizer().encode(noise(8000, channels=6), 16000)
    with pytest.raises(UserError, match=r"512 samples of sound are too short: give more than 0.032 s"):
        tokenizer().encode(noise(512), 16000)
