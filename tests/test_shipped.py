"""The tokenizers that come along: small, of a known fingerprint, and as good as their cards say."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from motionloom.config.recipe import TokenizerConfig
from motionloom.data.media import read_clip, write_video
from motionloom.data.shapeworld import World, adherence, oracle, render_video, write_dataset
from motionloom.errors import UserError
from motionloom.evals.clips import Shape, open_set
from motionloom.evals.tokenizer import TokenizerViews, embed, judge_zero_shot, world_classes
from motionloom.tokenizers import Tokenizer, load_tokenizer, needs_clips, open_tokenizer, shipped_tokenizers

FINGERPRINTS = {
    "vtp_emoji": "5827a171a7ef97520d074618d2d9e81cf8722f8878152c50ee109e93f1ae0162",
    "vtp_shapeworld": "d3b1da346a7e8eec109cfc7b937f3be43cc7399969e7a34c245e9dcb42bf6832",
}
"""Other weights are other tokenizers: caches made with them do not go on with new ones."""
NAMES = tuple(FINGERPRINTS)
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
    assert by_name.fingerprint() == by_path.fingerprint() == FINGERPRINTS[name]
    config = TokenizerConfig(
        type="vtp", name_or_path=name, latent_f=4, latent_t=4, latent_d=13, first_alone=True
    )
    assert not needs_clips(config)
    assert open_tokenizer(config).fingerprint() == by_path.fingerprint()
    # What lies in the working folder comes first.
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="no tokenizer here"):
        load_tokenizer(name)


def test_a_name_that_is_none_is_told_with_those_that_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    for named, said in (
        ("vtp_shapword", "vtp_shapword: no such tokenizer: did you mean vtp_shapeworld?"),
        ("VTP-Large", "VTP-Large: no such tokenizer: name a saved one, or one of vtp_emoji, vtp_shapeworld"),
        ("run", "run: no tokenizer here .*: of a run that trained one, `motionloom convert` makes it"),
    ):
        with pytest.raises(UserError, match=said):
            load_tokenizer(named)
    for named in ("vtp_shapword", "VTP-Large"):
        # Before a clip is read.
        with pytest.raises(UserError, match=f"{named}: no such tokenizer"):
            needs_clips(TokenizerConfig(type="vtp", name_or_path=named))


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


def test_shapeworld_comes_back_as_its_card_says(tmp_path: Path) -> None:
    """On H.264, as `motionloom data shapeworld` writes it; the card has 35.4 dB of 200 clips."""
    tokenizer, found = load_tokenizer("vtp_shapeworld"), []
    for n in range(8):
        spec = replace(World().sample(11, n, "test"), frames=17, height=32, width=32)
        file = write_video(tmp_path / f"{n}.mp4", render_video(spec), 8.0)
        found.append(psnr(tokenizer, torch.from_numpy(read_clip(file).video_FHW3.copy())))
    assert sum(found) / len(found) >= 34


def test_words_tell_clips_of_held_out_combinations(tmp_path: Path) -> None:
    """Among 560 classes; the card has .96 of 302 clips."""
    world = World(objects=(1,), frames=17)
    clips = open_set(write_dataset(tmp_path, world, 24, 3, "test"))
    views = TokenizerViews(load_tokenizer("vtp_shapeworld"), "shipped")
    report = judge_zero_shot(views, embed(views, clips, Shape()), world_classes(clips, world))
    told = {figure.name: figure.interval.mean for figure in report.figures}
    assert told["color"] == told["motion"] == 1.0
    assert told["top-1"] >= 0.85


def test_a_drawn_face_comes_back_nearly_as_emoji_do() -> None:
    """It looks like emoji and is none; the card has 30.8 dB of held-out ones."""
    clip = torch.from_numpy(np.stack([face(4 * math.sin(2 * math.pi * n / 13)) for n in range(13)]))
    assert psnr(load_tokenizer("vtp_emoji"), clip) >= 28


def psnr(tokenizer: Tokenizer, clip_PHW3: Tensor) -> float:
    """dB of one clip."""
    rebuilt = tokenizer.decode(tokenizer.encode(clip_PHW3[None]))[0]
    return float(10 * torch.log10(255**2 / (rebuilt.float() - clip_PHW3.float()).square().mean()))


def face(shift: float) -> np.ndarray:
    """A yellow face on white, (64, 64, 3) uint8."""
    y, x = np.mgrid[:64, :64] + 0.5
    frame = np.full((64, 64, 3), 255.0)
    yellow, brown, red = (255, 200, 40), (90, 50, 30), (200, 60, 60)
    for at_x, at_y, radius, colour in (
        (32, 32, 26, yellow),
        (23, 27, 4, brown),
        (41, 27, 4, brown),
        (32, 42, 6, red),
    ):
        inside = np.clip(0.5 + radius - np.hypot(x - at_x - shift, y - at_y), 0, 1)[..., None]
        frame = frame + inside * (np.array(colour) - frame)
    return frame.astype(np.uint8)
