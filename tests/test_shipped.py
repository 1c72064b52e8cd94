"""The tokenizers that come along: small, of a known fingerprint, and as good as their cards say."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from motionloom.config.recipe import TokenizerConfig
from motionloom.data.shapeworld import World, adherence, oracle, render_video
from motionloom.errors import UserError
from motionloom.tokenizers import load_tokenizer, needs_clips, open_tokenizer, shipped_tokenizers

NAMES = ("vtp_emoji", "vtp_shapeworld")
MOST_BYTES = 8_000_000


def test_each_is_small_and_says_what_it_is() -> None:
    found = shipped_tokenizers()
    assert tuple(found) == NAMES
    for name, folder in found.items():
        assert (folder / "model.safetensors").stat().st_size < MOST_BYTES
        card = (folder / "README.md").read_text()
        for said in ("Data", "Licence", "Command", "Seed", "Figures"):
            assert re.search(rf"^#* ?\W*{said}", card, re.MULTILINE), f"{name}: {said}"
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert all(torch.isfinite(file.get_tensor(key)).all() for key in file.keys())  # noqa: SIM118


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_as_good_as_a_path(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    by_name, by_path = load_tokenizer(name), load_tokenizer(shipped_tokenizers()[name])
    assert by_name.fingerprint() == by_path.fingerprint()
    config = TokenizerConfig(
        type="vtp", name_or_path=name, latent_f=4, latent_t=4, latent_d=13, first_alone=True
    )
    assert not needs_clips(config)
    assert open_tokenizer(config).fingerprint() == by_path.fingerprint()
    # What lies in the working folder comes first.
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="no tokenizer here"):
        load_tokenizer(name)


def test_what_is_shown_comes_back_from_latents() -> None:
    tokenizer, world = load_tokenizer("vtp_shapeworld"), World()
    specs = [replace(world.sample(11, n, "test"), frames=17, height=32, width=32) for n in range(12)]
    clips = torch.stack([torch.from_numpy(render_video(spec).copy()) for spec in specs])
    rebuilt = tokenizer.decode(tokenizer.encode(clips))
    right = [
        all(adherence(oracle(video.numpy(), world), spec)[name] for name in ("color", "shape", "motion"))
        for video, spec in zip(rebuilt, specs, strict=True)
    ]
    assert sum(right) >= 11
