"""Tokenizers: what every member of the registry must do, and what the closed-form patch basis promises."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from motionloom.config.recipe import TokenizerConfig
from motionloom.data.shapeworld import World, facts, render_video
from motionloom.errors import UserError
from motionloom.evals.adherence import judge
from motionloom.rng import torch_generator
from motionloom.tokenizers import TOKENIZERS, Tokenizer, TokenizerSpec, fit_tokenizer, load_tokenizer

MEMBERS = [(kind, first_alone) for kind in TOKENIZERS for first_alone in (False, True)]


def config(kind: str = "patch", **changes: object) -> TokenizerConfig:
    """4 x 4 pixels and 2 frames to a cell of 8 channels."""
    return TokenizerConfig(type=kind, **{"latent_f": 4, "latent_t": 2, "latent_d": 8, **changes})  # type: ignore[arg-type]


def clips(count: int, frames: int, *, height: int = 16, width: int = 24, key: str = "clips") -> Tensor:
    """Smooth moving waves with a little grain, uint8 (count, frames, height, width, 3)."""
    generator = torch_generator("tokenizer tests", key)
    phase, speed = torch.rand(2, count, 1, 1, 1, 3, generator=generator) * 6
    t = torch.arange(frames)[:, None, None, None] / 8
    y, x = torch.arange(height)[:, None, None] / 16, torch.arange(width)[None, :, None] / 16
    grain = torch.randn(count, frames, height, width, 3, generator=generator)
    wave = torch.sin(phase + speed * (x + t)) + torch.cos(speed * y - phase)
    return (127.5 + 50 * wave + 4 * grain).clamp(0, 255).to(torch.uint8)


@pytest.fixture(params=MEMBERS, ids=lambda member: f"{member[0]}{'-first_alone' * member[1]}")
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    kind, first_alone = request.param
    frames = 9 if first_alone else 8
    return fit_tokenizer(config(kind, first_alone=first_alone), list(clips(12, frames)))


def some_clips(tokenizer: Tokenizer, latent_frames: int = 4, key: str = "others") -> Tensor:
    return clips(3, tokenizer.spec.pixel_frames(latent_frames), key=key)


# Every member


def test_shapes_and_types(tokenizer: Tokenizer) -> None:
    spec, video = tokenizer.spec, some_clips(tokenizer)
    latents = tokenizer.encode(video)
    assert latents.dtype == torch.float32
    assert latents.shape == (3, *spec.latent_grid(*video.shape[1:4]), spec.channels)
    back = tokenizer.decode(latents)
    assert (back.dtype, back.shape) == (torch.uint8, video.shape)


def test_reconstruction_is_near(tokenizer: Tokenizer) -> None:
    video = some_clips(tokenizer)
    error = (tokenizer.decode(tokenizer.encode(video)).float() - video.float()).square().mean().sqrt()
    assert error < 0.25 * video.float().std()


def test_equal_clips_give_equal_latents(tokenizer: Tokenizer) -> None:
    video = some_clips(tokenizer)
    assert torch.equal(tokenizer.encode(video), tokenizer.encode(video.clone()))


def test_saved_and_loaded_it_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "a")
    loaded = load_tokenizer(tmp_path / "a")
    loaded.save(tmp_path / "b")
    names = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
    video = some_clips(tokenizer)
    latents = tokenizer.encode(video)
    assert (loaded.spec, loaded.fingerprint()) == (tokenizer.spec, tokenizer.fingerprint())
    assert torch.equal(loaded.encode(video), latents)
    assert torch.equal(loaded.decode(latents), tokenizer.decode(latents))


@pytest.mark.parametrize("kind", sorted(TOKENIZERS.keys() - {"pixels"}))
def test_the_fingerprint_follows_the_content(kind: str) -> None:
    def fingerprint(key: str = "clips", **changes: object) -> str:
        return fit_tokenizer(config(kind, **changes), list(clips(4, 8, key=key))).fingerprint()

    same = fingerprint()
    assert fingerprint() == same
    assert len({same, fingerprint("other clips"), fingerprint(latent_d=7), fingerprint(latent_t=4)}) == 4


@pytest.mark.parametrize("lengths", [(5,), (1, 4), (1, 1, 1, 1, 1), (2, 3), (4, 1)])
def test_stream_decoding_equals_decoding(tokenizer: Tokenizer, lengths: tuple[int, ...]) -> None:
    latents = tokenizer.encode(some_clips(tokenizer, 5))
    chunks = list(tokenizer.stream_decode(latents.split(lengths, dim=1)))
    spec = tokenizer.spec
    ends = [spec.pixel_frames(sum(lengths[: n + 1])) for n in range(len(lengths))]
    assert [c.shape[1] for c in chunks] == [b - a for a, b in zip([0, *ends], ends, strict=False)]
    assert torch.equal(torch.cat(chunks, dim=1), tokenizer.decode(latents))


def test_a_stream_hands_out_frames_before_it_takes_the_next_chunk(tokenizer: Tokenizer) -> None:
    taken = []

    def source():  # type: ignore[no-untyped-def]
        for chunk in tokenizer.encode(some_clips(tokenizer, 3)).split(1, dim=1):
            taken.append(chunk)
            yield chunk

    frames = tokenizer.stream_decode(source())
    next(frames)
    assert len(taken) == 1


def test_sizes_that_do_not_divide_are_refused(tokenizer: Tokenizer) -> None:
    if tokenizer.spec.spatial == 1:  # any size divides by a pixel
        assert tokenizer.encode(clips(1, 5, height=14, width=23)).shape == (1, 5, 14, 23, 3)
        return
    frames = tokenizer.spec.pixel_frames(4)
    with pytest.raises(UserError, match=r"height 14 .* use 12 or 16"):
        tokenizer.encode(clips(1, frames, height=14))
    with pytest.raises(UserError, match=r"width 23 .* use 20 or 24"):
        tokenizer.encode(clips(1, frames, width=23))
    with pytest.raises(UserError, match=rf"{frames + 1} frames .* use {frames} or {frames + 2}"):
        tokenizer.encode(clips(1, frames + 1))


# The shape rule


@pytest.mark.parametrize(
    "first_alone, frames, grid, seconds",
    [
        (False, 8, 2, [0.25, 0.75]),
        (True, 9, 3, [0.0625, 0.375, 0.875]),
        (True, 1, 1, [0.0625]),
    ],
)
def test_frames_become_seconds(first_alone: bool, frames: int, grid: int, seconds: list[float]) -> None:
    spec = TokenizerSpec(channels=4, spatial=8, temporal=4, first_alone=first_alone)
    assert spec.latent_grid(frames, 16, 24) == (grid, 2, 3)
    assert spec.pixel_frames(grid) == frames
    # The centre of the pixel frames that a latent frame covers, at 8 a second.
    torch.testing.assert_close(spec.seconds(grid, 8.0), torch.tensor(seconds))


@pytest.mark.parametrize(
    "first_alone, frames, named",
    [(False, 3, "use 4"), (False, 0, "use 4"), (True, 0, "use 1"), (True, 4, "1 or 5")],
)
def test_the_nearest_lengths_are_named(first_alone: bool, frames: int, named: str) -> None:
    spec = TokenizerSpec(channels=4, spatial=8, temporal=4, first_alone=first_alone)
    with pytest.raises(UserError, match=named):
        spec.latent_grid(frames, 8, 8)


# Patch


def patch(channels: int, video: Tensor, **changes: object) -> Tokenizer:
    return fit_tokenizer(config(latent_d=channels, **changes), list(video))


@pytest.mark.parametrize("first_alone", [False, True])
def test_latents_of_the_fitted_clips_are_white(first_alone: bool) -> None:
    video = clips(24, 9 if first_alone else 8)
    latents = patch(24, video, first_alone=first_alone).encode(video)
    groups = [latents[:, :1], latents[:, 1:]] if first_alone else [latents]
    for group in groups:
        flat = group.flatten(0, -2)
        torch.testing.assert_close(flat.mean(dim=0), torch.zeros(24), atol=1e-3, rtol=0)
        torch.testing.assert_close(flat.T.cov(), torch.eye(24), atol=2e-3, rtol=0)


@pytest.mark.parametrize("whiten", [0.0, 0.5])
def test_the_dial_leaves_strong_channels_stronger(whiten: float) -> None:
    video = clips(12, 8)
    tokenizer = patch(24, video, whiten=whiten)
    latents = tokenizer.encode(video)
    white = patch(24, video).encode(video)
    std_C = latents.flatten(0, -2).std(dim=0)
    assert std_C.square().mean().sqrt() == pytest.approx(1, abs=0.01)
    assert std_C[0] > 2 * std_C[-1]
    torch.testing.assert_close(latents / std_C, white / white.flatten(0, -2).std(dim=0), atol=2e-3, rtol=0)
    assert (tokenizer.decode(latents).int() - patch(24, video).decode(white).int()).abs().max() <= 1


def test_more_channels_cost_less() -> None:
    video = clips(12, 8)

    def error(channels: int) -> float:
        tokenizer = patch(channels, video)
        return float((tokenizer.decode(tokenizer.encode(video)).float() - video.float()).square().mean())

    errors = [error(channels) for channels in (1, 4, 16, 48, 96)]
    assert all(more < less for less, more in pairwise(errors))


@pytest.mark.parametrize("first_alone", [False, True])
def test_with_all_channels_it_is_exact(first_alone: bool) -> None:
    numbers = 4 * 4 * 3 * (1 if first_alone else 2)
    tokenizer = patch(numbers, clips(40, 9 if first_alone else 8), first_alone=first_alone)
    unseen = some_clips(tokenizer)
    if first_alone:
        unseen = unseen[:, :1]
    assert torch.equal(tokenizer.decode(tokenizer.encode(unseen)), unseen)


def test_constant_clips_do_not_explode() -> None:
    grey = torch.full((4, 8, 16, 16, 3), 90, dtype=torch.uint8)
    tokenizer = patch(48, grey)
    assert torch.equal(tokenizer.decode(tokenizer.encode(grey)), grey)
    assert tokenizer.encode(grey).abs().max() < 1e-2
    other = clips(2, 8, height=16, width=16)
    latents = tokenizer.encode(other)
    # The cache keeps latents in half precision.
    assert latents.half().isfinite().all()


def test_single_images() -> None:
    images = clips(20, 1)
    tokenizer = patch(24, images, first_alone=True)
    latents = tokenizer.encode(images)
    assert latents.shape == (20, 1, 4, 6, 24)
    assert (tokenizer.decode(latents).float() - images.float()).square().mean().sqrt() < 6
    # Frames after the first were never seen in motion; a still stays one.
    still = images.expand(-1, 5, -1, -1, -1)
    back = tokenizer.decode(tokenizer.encode(still)).float()
    assert (back - still.float()).square().mean().sqrt() < 8


def test_images_and_videos_are_fitted_together() -> None:
    mixed = [*clips(6, 9), *clips(6, 1, key="images")]
    tokenizer = fit_tokenizer(config(first_alone=True), mixed)
    first = torch.cat([tokenizer.encode(clip[None])[:, :1].flatten(0, -2) for clip in mixed])
    torch.testing.assert_close(first.mean(dim=0), torch.zeros(8), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "changes, wrong",
    [({"latent_d": 97}, "at most|exceeds the 96"), ({"latent_d": 49, "first_alone": True}, "exceeds the 48")],
)
def test_more_channels_than_numbers_are_refused(changes: dict[str, object], wrong: str) -> None:
    with pytest.raises(UserError, match=wrong):
        fit_tokenizer(config(**changes), list(clips(2, 9 if "first_alone" in changes else 8)))


def test_a_fit_without_clips_is_refused() -> None:
    with pytest.raises(UserError, match="no clip to be fitted on"):
        fit_tokenizer(config(), [])


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def rewritten(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def respecified(**changes: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        file = folder / "tokenizer.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


@pytest.mark.parametrize(
    "damage, said",
    [
        (without("tokenizer.json"), "tokenizer.json is missing"),
        (without("tokenizer.safetensors"), "tokenizer.safetensors"),
        (rewritten("tokenizer.json", b"{"), "not a tokenizer's"),
        (rewritten("tokenizer.json", b"[]"), "not a tokenizer's"),
        (rewritten("tokenizer.safetensors", b"\x80\x04pickle"), "not a readable tokenizer"),
        (respecified(type="magic"), "type 'magic' is unknown: this version has patch"),
        (respecified(channels=9), r"shape \(96, 8\) instead of \(96, 9\)"),
        (respecified(first_alone=True), "first.mean_D"),
        (respecified(color="red"), "color"),
        (respecified(type=["patch"]), "it has no type"),
        (respecified(spatial=4.0), "spatial is 4.0, expected a whole number above 0"),
        (respecified(first_alone=0), "first_alone is 0, expected true or false"),
    ],
)
def test_a_damaged_folder_is_named(damage: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    patch(8, clips(4, 8)).save(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=said) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing: no such tokenizer"):
        load_tokenizer(tmp_path / "nothing")


def test_the_oracle_still_reads_shapeworld_behind_a_fitted_tokenizer() -> None:
    world = World.quickstart()

    def rendered(count: int, split: str) -> tuple[np.ndarray, list]:
        specs = [world.sample(0, n, split) for n in range(count)]  # type: ignore[arg-type]
        return np.stack([render_video(spec) for spec in specs]), [facts(spec) for spec in specs]

    tokenizer = fit_tokenizer(TokenizerConfig(), list(torch.from_numpy(rendered(256, "train")[0])))
    assert tokenizer.spec == TokenizerSpec(channels=48, spatial=8, temporal=4)
    video, wanted = rendered(160, "test")
    rebuilt = tokenizer.decode(tokenizer.encode(torch.from_numpy(video)))
    rates = judge(rebuilt.numpy(), wanted, world).rates()
    assert all(rate >= 0.97 for rate in rates.values()), rates
