"""Video VAEs under the tokenizer protocol: equal to diffusers' own, streaming, in tiles, shot by shot."""

from __future__ import annotations

import json
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import cycle, zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from cached import make_clip, recipe
from motionloom.config.recipe import Recipe, TokenizerConfig
from motionloom.data.buckets import Bucket
from motionloom.data.cache import build_cache, open_cache
from motionloom.data.loader import Loader
from motionloom.data.manifest import ManifestEntry, Scene, read_entry
from motionloom.errors import UserError
from motionloom.evals.inspection import sheet_clips
from motionloom.rng import torch_generator
from motionloom.tokenizers import (
    VAES,
    VaeSettings,
    VaeTokenizer,
    decode_scenes,
    encode_scenes,
    fit_tokenizer,
    load_tokenizer,
    open_tokenizer,
)
from motionloom.tokenizers.ltx2_vae import lookahead
from motionloom.tokenizers.scenes import scene_latents
from motionloom.tokenizers.tiling import Span, spans, tiled

WEIGHTS = "diffusion_pytorch_model.safetensors"

WAN: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2, 2, 2],
    "num_res_blocks": 1,
    "latents_mean": [0.1, 0.2, -0.3, 0.4],
    "latents_std": [1.0, 2.0, 0.5, 1.5],
}
WAN22 = WAN | {
    "decoder_base_dim": 12,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}
COGVIDEOX = {
    "block_out_channels": [8, 8, 8, 8],
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "scaling_factor": 0.7,
}
LTX2: dict[str, Any] = {
    "latent_channels": 8,
    "block_out_channels": [8, 8, 16, 16],
    "decoder_block_out_channels": [8, 16, 32],
    "layers_per_block": [1, 1, 1, 1, 1],
    "decoder_layers_per_block": [1, 1, 1, 1],
    "decoder_causal": False,
}
# Strided downsamplers, upsamplers of single axes without a shortcut, blocks that change their width, and
# edges that are not mirrored.
LTX2_OTHER = LTX2 | {
    "decoder_block_out_channels": [8, 8, 8, 16],
    "decoder_layers_per_block": [1, 1, 1, 2, 1],
    "decoder_inject_noise": [False] * 5,
    "decoder_spatio_temporal_scaling": [True] * 4,
    "decoder_spatial_padding_mode": "zeros",
    "upsample_factor": [1, 1, 1, 1],
    "upsample_residual": [False, True, False, True],
    "downsample_type": ["spatial", "conv", "spatiotemporal", "temporal"],
    "upsample_type": ["temporal", "spatial", "spatiotemporal", "spatiotemporal"],
}


@dataclass(frozen=True)
class Case:
    """A tiny model of a class, and clip lengths that it takes."""

    kind: str
    config: dict[str, Any]
    shape: tuple[int, int, int]
    """Channels, pixels of a cell, frames of a latent."""
    lengths: tuple[int, ...]


CASES = {
    "wan2.1": Case("wan_vae", WAN, (4, 8, 4), (1, 5, 17)),
    "wan2.2": Case("wan_vae", WAN22, (4, 16, 4), (1, 5, 17)),
    "cogvideox": Case("cogvideox_vae", COGVIDEOX, (4, 8, 4), (1, 5, 9, 13, 17, 21)),
    "ltx2": Case("ltx2_vae", LTX2, (8, 32, 8), (1, 9, 41)),
    "ltx2-causal": Case("ltx2_vae", LTX2 | {"decoder_causal": True}, (8, 32, 8), (1, 9, 41)),
    "ltx2-other": Case("ltx2_vae", LTX2_OTHER, (8, 32, 8), (1, 9, 41)),
}
KINDS = ("wan2.1", "cogvideox", "ltx2")


@cache
def model(name: str) -> Any:
    """The case's model with weights that keep signals of order 1 and statistics that are not neutral."""
    import diffusers

    case = CASES[name]
    vae = getattr(diffusers, VAES[case.kind].vae_class)(**case.config).eval().requires_grad_(False)
    generator = torch_generator("vae tests", name)
    for key, parameter in vae.named_parameters():
        value = torch.randn(parameter.shape, generator=generator)
        matrix = parameter.ndim > 1 and "gamma" not in key
        value *= 0.7 / parameter[0].numel() ** 0.5 if matrix else 0.1
        parameter.data.copy_(value + float("norm" in key and not key.endswith("bias") and not matrix))
    if case.kind == "ltx2_vae":
        vae.latents_mean.copy_(torch.randn(8, generator=generator))
        vae.latents_std.copy_(torch.rand(8, generator=generator) + 0.5)
    return vae


def tokenizer(name: str, **settings: Any) -> VaeTokenizer:
    return VaeTokenizer(VAES[CASES[name].kind], model(name), VaeSettings(**settings))


def clip(name: str, frames: int, *, batch: int = 2, cells: tuple[int, int] = (2, 3)) -> Tensor:
    """Noise, uint8 (batch, frames, H, W, 3) of so many cells."""
    spatial = CASES[name].shape[1]
    shape = (batch, frames, cells[0] * spatial, cells[1] * spatial, 3)
    return (torch.rand(shape, generator=torch_generator("clip", name)) * 255.999).to(torch.uint8)


def some_latents(name: str, frames: int, *, key: str = "latents", cells: tuple[int, int] = (2, 3)) -> Tensor:
    return torch.randn((1, frames, *cells, CASES[name].shape[0]), generator=torch_generator(key, name))


def floats(tokens: VaeTokenizer, latents: Tensor) -> Tensor:
    return torch.cat(list(tokens.stream_decode_float([latents])), dim=1)


# diffusers' own answers


def reference_latents(name: str, video: Tensor) -> Tensor:
    vae = model(name)
    with torch.no_grad():
        z = vae.encode((video.float() / 127.5 - 1).movedim(-1, 1)).latent_dist.mode().movedim(1, -1)
    if name == "cogvideox":
        return z * vae.config.scaling_factor
    if "ltx2" in name:
        return (z - vae.latents_mean) * vae.config.scaling_factor / vae.latents_std
    return (z - torch.tensor(vae.config.latents_mean)) / torch.tensor(vae.config.latents_std)


def reference_pixels(name: str, latents: Tensor) -> Tensor:
    """In [-1, 1]."""
    vae = model(name)
    if name == "cogvideox":
        z = latents / vae.config.scaling_factor
        if z.shape[1] % 2 == 0:  # diffusers makes four frames too many of these
            z = torch.cat([z, z[:, -1:]], dim=1)
    elif "ltx2" in name:
        z = latents * vae.latents_std / vae.config.scaling_factor + vae.latents_mean
    else:
        z = latents * torch.tensor(vae.config.latents_std) + torch.tensor(vae.config.latents_mean)
    with torch.no_grad():
        pixels = vae.decode(z.movedim(-1, 1)).sample.clamp(-1, 1).movedim(1, -1)
    return pixels[:, : 1 + CASES[name].shape[2] * (latents.shape[1] - 1)]


@pytest.mark.parametrize("name, frames", [(n, f) for n, case in CASES.items() for f in case.lengths])
def test_it_equals_diffusers(name: str, frames: int) -> None:
    tokens, video = tokenizer(name), clip(name, frames)
    spec = tokens.spec
    assert ((spec.channels, spec.spatial, spec.temporal), spec.first_alone) == (CASES[name].shape, True)
    latents, wanted = tokens.encode(video), reference_latents(name, video)
    assert latents.dtype == torch.float32
    assert latents.shape == (2, *spec.latent_grid(*video.shape[1:4]), spec.channels)
    assert wanted.std() > 0.03
    assert (latents - wanted).abs().max() < 1e-5 * wanted.abs().max()
    pixels, wanted = floats(tokens, latents), reference_pixels(name, latents)
    assert pixels.shape == video.shape
    assert wanted.std() > 0.03
    assert (pixels - wanted).abs().max() < 2e-5
    rounded = tokens.decode(latents)
    assert rounded.dtype == torch.uint8
    # Rounded, not cut: the nearest of 256 levels.
    assert ((rounded.float() / 127.5 - 1) - wanted).abs().max() < 0.51 / 127.5


@pytest.mark.parametrize("name", CASES)
def test_a_batch_is_its_samples(name: str) -> None:
    tokens, video = tokenizer(name), clip(name, CASES[name].lengths[1], batch=3)
    alone = torch.cat([tokens.encode(one[None]) for one in video])
    torch.testing.assert_close(tokens.encode(video), alone, atol=1e-5, rtol=1e-5)
    back = torch.cat([floats(tokens, one[None]) for one in alone])
    torch.testing.assert_close(floats(tokens, alone), back, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", KINDS)
def test_bfloat16(name: str) -> None:
    import copy

    family = VAES[CASES[name].kind]
    half = VaeTokenizer(family, copy.deepcopy(model(name)).bfloat16(), VaeSettings(precision="bf16"))
    video = clip(name, CASES[name].lengths[-1])
    exact = tokenizer(name).encode(video)
    latents = half.encode(video)
    assert latents.dtype == torch.float32
    error = (latents - exact).square().mean().sqrt() / exact.std()
    assert 1e-4 < error < 0.05
    assert half.decode(latents).shape == video.shape
    assert half.fingerprint() != tokenizer(name).fingerprint()


# Streams


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("lengths", [(6,), (2, 1, 3)])
def test_a_stream_equals_the_whole(name: str, lengths: tuple[int, ...]) -> None:
    tokens, latents = tokenizer(name), some_latents(name, 6)
    streamed = torch.cat(list(tokens.stream_decode_float(latents.split(lengths, dim=1))), dim=1)
    assert (streamed - reference_pixels(name, latents)).abs().max() < 2e-5
    assert torch.equal(
        torch.cat(list(tokens.stream_decode(latents.split(lengths, dim=1))), dim=1), tokens.decode(latents)
    )


def taken_per_piece(tokens: VaeTokenizer, latents: Tensor) -> list[tuple[int, int]]:
    """(latent frames taken, pixel frames handed out) after each piece of a stream."""
    taken = 0

    def source() -> Iterator[Tensor]:
        nonlocal taken
        for chunk in latents.split(1, dim=1):
            taken += 1
            yield chunk

    out, seen = 0, []
    for piece in tokens.stream_decode(source()):
        out += piece.shape[1]
        seen.append((taken, out))
    return seen


@pytest.mark.parametrize("name", ["wan2.1", "wan2.2", "ltx2-causal"])
def test_causal_decoders_hand_out_frames_at_once(name: str) -> None:
    temporal = CASES[name].shape[2]
    seen = taken_per_piece(tokenizer(name), some_latents(name, 5))
    assert seen == [(f + 1, 1 + temporal * f) for f in range(5)]


def test_cogvideox_decodes_three_latents_and_then_pairs() -> None:
    assert taken_per_piece(tokenizer("cogvideox"), some_latents("cogvideox", 8)) == [
        (3, 9),
        (5, 17),
        (7, 25),
        (8, 29),
    ]


@pytest.mark.parametrize("name", ["ltx2", "ltx2-other", "ltx2-causal"])
def test_the_lag_of_ltx2_is_what_its_decoder_sees_ahead(name: str) -> None:
    tokens, ahead = tokenizer(name), lookahead(model(name))
    assert (ahead == 0) == (name == "ltx2-causal")
    latents = some_latents(name, ahead + 4)
    # Frames 0 .. 8 belong to latents 0 and 1; what lies beyond their sight cannot move them, what is nearer
    # does.
    here = floats(tokens, latents)[:, :9]
    for distance, moves in ((ahead, True), (ahead + 1, False)):
        changed = latents.clone()
        changed[:, 1 + distance] += 100.0
        assert torch.equal(floats(tokens, changed)[:, :9], here) != moves
    # And the stream waits for no more than that.
    first_whole = next(taken for taken, out in taken_per_piece(tokens, latents) if out >= 9)
    assert first_whole == 2 + ahead


def test_lookahead_of_the_published_ltx2_decoder() -> None:
    """Four stages of five blocks; counted without weights."""
    import diffusers

    with torch.device("meta"):
        vae = diffusers.AutoencoderKLLTX2Video(decoder_causal=False)
    assert lookahead(vae) == 22


@pytest.mark.parametrize("name", CASES)
def test_streams_do_not_mix(name: str) -> None:
    """Two at once, of different sizes, and one that was left half-way."""
    tokens = tokenizer(name)
    left = iter(tokens.stream_decode(some_latents(name, 5, key="left").split(1, dim=1)))
    next(left)
    one, other = some_latents(name, 5, key="one"), some_latents(name, 4, key="other", cells=(3, 2))
    streams = [tokens.stream_decode_float(latents.split(1, dim=1)) for latents in (one, other)]
    both: list[list[Tensor]] = [[], []]
    for pieces in zip_longest(*streams):
        for mine, piece in zip(both, pieces, strict=True):
            mine.extend([] if piece is None else [piece])
        tokens.encode(clip(name, 1))
    for mine, latents in zip(both, (one, other), strict=True):
        assert torch.equal(torch.cat(mine, dim=1), floats(tokens, latents))


class Alive(TorchDispatchMode):
    """Counts the bytes that tensors made inside it keep alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.users: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return tree_map_only(Tensor, self.see, func(*args, **(kwargs or {})))

    def see(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        self.now += size * (not self.users[key])
        self.peak = max(self.peak, self.now)
        self.users[key] += 1
        weakref.finalize(tensor, self.forget, key, size)
        return tensor

    def forget(self, key: int, size: int) -> None:
        self.users[key] -= 1
        self.now -= size * (not self.users[key])


# Lengths that exceed what a decoder sees at once; odd ones, since CogVideoX doubles the last latent of an
# even.
SHORT, LONG = 13, 21


@pytest.mark.parametrize("name, tile", [*((name, 0) for name in (*KINDS, "ltx2-other")), ("wan2.1", 16)])
def test_memory_does_not_grow_with_the_length_of_a_stream(name: str, tile: int) -> None:
    tokens = tokenizer(name, tile=tile, tile_overlap=8 * bool(tile))

    def peak(frames: int) -> int:
        with Alive() as alive:
            for piece in tokens.stream_decode(some_latents(name, 1, key=f"z{n}") for n in range(frames)):
                del piece
        return alive.peak

    assert peak(LONG) == peak(SHORT)


@pytest.mark.parametrize("name", KINDS)
def test_encoding_a_longer_clip_takes_no_more_than_its_latents(name: str) -> None:
    tokens = tokenizer(name)

    def peak(latents: int) -> int:
        video = clip(name, tokens.spec.pixel_frames(latents), batch=1)
        with Alive() as alive:
            tokens.encode(video)
        return alive.peak - video.numel()

    # Room for the latents in parts and in one piece.
    assert peak(LONG) - peak(SHORT) <= 2 * 4 * (LONG - SHORT) * 2 * 3 * tokens.spec.channels


# Tiles


def test_tiles_cover_the_axis_and_share_what_they_should() -> None:
    assert spans(10, 16, 4) == [Span(0, 10, 0, 0)]
    assert spans(40, 16, 4) == [Span(0, 16, 0, 4), Span(12, 28, 4, 4), Span(24, 40, 4, 0)]
    # Rather three tiles of 13 than a last one that repeats most of its neighbour.
    assert spans(30, 16, 4) == [Span(0, 13, 0, 5), Span(8, 21, 5, 4), Span(17, 30, 4, 0)]
    for size in range(17, 80):
        found = spans(size, 16, 5)
        assert {s.end - s.begin for s in found} <= set(range(10, 17))
        assert len({s.end - s.begin for s in found}) == 1
        assert min(s.shared_after for s in found[:-1]) >= 5
        covered = [sum(s.begin <= i < s.end for s in found) for i in range(size)]
        assert (min(covered), max(covered)) == (1, 2)


def one_piece(code: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int) -> Tensor:
    return next(tiled(lambda pieces: map(code, pieces), tile, overlap)(iter([x])))


def test_a_constant_stays_a_constant() -> None:
    x = torch.full((1, 2, 1, 37, 50), 0.3)
    back = one_piece(lambda piece: piece.repeat_interleave(2, -1).repeat_interleave(2, -2), x, 16, 5)
    assert back.shape == (1, 2, 1, 74, 100)
    torch.testing.assert_close(back, torch.full_like(back, 0.3))


def test_a_network_that_sees_no_further_than_the_overlap_is_equal_where_one_tile_rules() -> None:
    generator = torch_generator("tiles")
    x, weight = (
        torch.randn(1, 1, 1, 40, 40, generator=generator),
        torch.randn(1, 1, 1, 9, 9, generator=generator),
    )

    def blur(piece: Tensor) -> Tensor:
        return torch.nn.functional.conv3d(piece, weight, padding=(0, 4, 4))

    difference = (one_piece(blur, x, 16, 4) - blur(x)).abs()
    alone = torch.tensor([sum(s.begin <= i < s.end for s in spans(40, 16, 4)) == 1 for i in range(40)])
    assert alone.sum() == 32
    assert difference[..., alone, :][..., alone].max() < 1e-5
    assert difference.max() > 0.1  # and elsewhere not: a tile does not see beyond its edge


@pytest.mark.parametrize("size", range(17, 60, 3))
def test_the_blend_has_no_seam(size: int) -> None:
    """Tiles that disagree wholly: each answers 0 or 1, in turn."""
    answers = cycle([0.0, 1.0])
    x = torch.zeros(1, 1, 1, 8, size)
    blended = one_piece(lambda piece: torch.full_like(piece, next(answers)), x, 16, 5)
    assert blended.diff(dim=-1).abs().max() <= 1 / 6 + 1e-6
    assert (blended.min(), blended.max()) == (0, 1)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("columns, tile, overlap", [(8, 4, 2), (6, 5, 1)])
def test_tokenizing_in_tiles(name: str, columns: int, tile: int, overlap: int) -> None:
    """Of both widths the tiles come out as 4 cells, of which the first alone has two to itself."""
    spatial = CASES[name].shape[1]
    whole = tokenizer(name)
    tiles = tokenizer(name, tile=tile * spatial, tile_overlap=overlap * spatial)
    small = clip(name, CASES[name].lengths[1], cells=(3, 4))
    assert torch.equal(tiles.encode(small), whole.encode(small))  # one tile
    video = clip(name, CASES[name].lengths[1], cells=(2, columns), batch=1)
    latents = tiles.encode(video)
    assert latents.shape == whole.encode(video).shape
    # All the frames of its own: the tiles go through time side by side.
    first = whole.encode(video[:, :, :, : 4 * spatial])
    torch.testing.assert_close(latents[:, :, :, :2], first[:, :, :, :2], atol=1e-5, rtol=1e-5)
    pixels = torch.cat(list(tiles.stream_decode_float(latents.split(1, dim=1))), dim=1)
    assert pixels.shape == video.shape
    left = floats(whole, latents[:, :, :, :4])[:, :, :, : 2 * spatial]
    torch.testing.assert_close(pixels[:, :, :, : 2 * spatial], left, atol=1e-5, rtol=1e-5)
    assert tiles.fingerprint() != whole.fingerprint()


# Shots


@pytest.mark.parametrize("name", CASES)
def test_nothing_crosses_a_cut(name: str) -> None:
    tokens, temporal = tokenizer(name), CASES[name].shape[2]
    shots = [1 + 2 * temporal, 1, 1 + temporal]
    assert scene_latents(tokens.spec, shots) == [3, 1, 2]
    video = clip(name, sum(shots), batch=1)
    latents = encode_scenes(tokens, video, shots)
    assert latents.shape[1] == 6
    assert torch.equal(latents[:, :3], tokens.encode(video[:, : shots[0]]))
    changed = video.clone()
    changed[:, : shots[0]] = 255 - changed[:, : shots[0]]
    after = encode_scenes(tokens, changed, shots)
    assert torch.equal(after[:, 3:], latents[:, 3:])
    assert not torch.equal(after[:, :3], latents[:, :3])
    pixels = decode_scenes(tokens, latents, shots)
    assert pixels.shape == video.shape
    moved = torch.cat([-latents[:, :3], latents[:, 3:]], dim=1)
    assert torch.equal(decode_scenes(tokens, moved, shots)[:, shots[0] :], pixels[:, shots[0] :])
    # As one clip it leaks, or the test above would show nothing.
    whole = floats(tokens, latents)
    assert not torch.equal(floats(tokens, moved)[:, -temporal:], whole[:, -temporal:])
    with pytest.raises(UserError, match="2 frames do not divide"):
        encode_scenes(tokens, video[:, :3], [1, 2])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A VAE as diffusers writes it."""
    model("wan2.1").save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def story(path: Path, *starts: float) -> ManifestEntry:
    """A film of 24 frames at 8 a second whose shots begin there."""
    clip = make_clip(path / "story.mp4", 0, frames=24)
    ends = [*starts[1:], 3.0]
    scenes = tuple(Scene(a, b, f"shot {a}") for a, b in zip(starts, ends, strict=True))
    return ManifestEntry("story", clip, "all", scenes=scenes)


def vae_recipe(folder: Path, **sections: Any) -> Recipe:
    """21 frames, or 1 + 4 k of each shot in them."""
    section = config(folder).model_dump()
    video = {"width": 32, "height": 32, "fps": 8.0, "num_frames": 21}
    return recipe(tokenizer=section, video=video, **sections)


def test_a_cache_encodes_shot_by_shot(folder: Path, tmp_path: Path) -> None:
    asked = vae_recipe(folder, train={"batch_size": 1, "heldout_fraction": 0.0})
    # Cuts at frames 7 and 17 of 21: shots of 7, 10 and 4 frames, of which 5, 9 and 1 fill latent frames.
    report = build_cache(asked, [story(tmp_path, 0.0, 0.875, 2.125)], tmp_path / "cache")
    assert report.unused_seconds == pytest.approx(6 / 8)
    cache = open_cache(tmp_path / "cache")
    assert cache.verify() == []
    row = cache.row(0)
    assert (str(row.bucket), row.scene_frames) == ("32x32x5+9+1", [5, 9, 1])
    assert Bucket.parse("32x32x5+9+1") == row.bucket == Bucket(32, 32, 15, (5, 9, 1))
    pixels = read_entry(story(tmp_path, 0.0), frames=21, fps=8.0, size=(32, 32)).video_FHW3
    shots = [torch.from_numpy(pixels[begin:end])[None] for begin, end in ((0, 5), (7, 16), (17, 18))]
    tokens = tokenizer("wan2.1")
    wanted = torch.cat([tokens.encode(shot) for shot in shots], dim=1)[0]
    torch.testing.assert_close(row.latents_FhwC, wanted, atol=2e-3, rtol=1e-3)
    seen = torch.cat([tokens.decode(z[None]) for z in row.latents_FhwC.split([2, 3, 1])], dim=1)[0]
    assert torch.equal(row.decode(tokens), seen)
    (shown,), _ = sheet_clips(cache)
    assert torch.equal(torch.from_numpy(shown), seen), "inspect shows what training sees"
    batch = Loader(cache, asked).batch(0)
    assert batch.video.scene_BF.tolist() == [[0, 0, 1, 1, 1, 2]]
    # Centres of frames 0, 1-4 | 5, 6-9, 10-13 | 14, laid end to end.
    torch.testing.assert_close(batch.video.seconds_BF[0] * 8, torch.tensor([0.5, 3, 5.5, 8, 12, 14.5]))


def test_tokens_of_two_frames_take_an_even_number_of_each_shot(folder: Path, tmp_path: Path) -> None:
    asked = vae_recipe(folder, model={"patch": [2, 2, 2]})
    # Shots of 11 and 10 frames: four latents would need 13, so both give two.
    build_cache(asked, [story(tmp_path, 0.0, 1.375)], tmp_path / "cache")
    assert open_cache(tmp_path / "cache").row(0).scene_frames == [5, 5]
    short = story(tmp_path, 0.0, 2.25)  # the second: 3 frames, one latent
    report = build_cache(asked, [story(tmp_path, 0.0, 1.375), replace(short, id="short")], tmp_path / "cache")
    assert [problem.kind for problem in report.skipped] == ["short scene"]


def test_a_cache_of_whole_clips(folder: Path, tmp_path: Path) -> None:
    whole = replace(story(tmp_path, 0.0), scenes=())
    build_cache(vae_recipe(folder), [whole], tmp_path / "cache")
    row = open_cache(tmp_path / "cache").row(0)
    assert (str(row.bucket), row.latents_FhwC.shape) == ("32x32x21", (6, 4, 4, 4))
    tiles = vae_recipe(folder).model_copy(update={"tokenizer": config(folder, tile=16, tile_overlap=8)})
    with pytest.raises(UserError, match=r"the tokenizer is .* in the cache and .* in the recipe"):
        build_cache(tiles, [whole], tmp_path / "cache")


# Folders


def config(folder: Path, **changes: Any) -> TokenizerConfig:
    """A recipe's tokenizer section for the tiny Wan."""
    known = {"type": "wan_vae", "latent_f": 8, "latent_t": 4, "latent_d": 4, "first_alone": True}
    return TokenizerConfig(**(known | {"name_or_path": str(folder)} | changes))


@pytest.mark.parametrize("name", CASES)
def test_saved_and_loaded_it_is_the_same(name: str, tmp_path: Path) -> None:
    import diffusers

    tokens, video = tokenizer(name, tile=64, tile_overlap=32), clip(name, CASES[name].lengths[1])
    tokens.save(tmp_path / "a")
    loaded = load_tokenizer(tmp_path / "a")
    loaded.save(tmp_path / "b")
    names = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert names == ["config.json", "diffusion_pytorch_model.safetensors", "tokenizer.json"]
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
    assert isinstance(loaded, VaeTokenizer)
    assert (loaded.spec, loaded.settings) == (tokens.spec, tokens.settings)
    assert loaded.fingerprint() == tokens.fingerprint()
    latents = tokens.encode(video)
    assert torch.equal(loaded.encode(video), latents)
    assert torch.equal(loaded.decode(latents), tokens.decode(latents))
    # It is a diffusers folder as well.
    theirs = getattr(diffusers, VAES[CASES[name].kind].vae_class).from_pretrained(tmp_path / "a")
    assert all(
        torch.equal(tensor, model(name).state_dict()[key]) for key, tensor in theirs.state_dict().items()
    )


def test_a_folder_that_was_saved_shares_no_file_with_another(folder: Path, tmp_path: Path) -> None:
    """Its owner may write to it; what was saved from it must not change with it."""
    import copy

    load_tokenizer(folder).save(tmp_path / "own")
    load_tokenizer(tmp_path / "own").save(tmp_path / "cache")
    for file in (tmp_path / "cache").iterdir():
        others = [place / file.name for place in (folder, tmp_path / "own")]
        assert not any(other.exists() and file.samefile(other) for other in others), file.name
    # Nor with what stands linked to a file that it writes over.
    weights, before = tmp_path / "own" / "diffusion_pytorch_model.safetensors", tmp_path / "before"
    before.hardlink_to(weights)
    held = before.read_bytes()
    other = copy.deepcopy(model("wan2.1"))
    other.decoder.conv_out.bias.data[0] += 1e-3
    VaeTokenizer(VAES["wan_vae"], other, VaeSettings()).save(tmp_path / "own")
    assert before.read_bytes() == held != weights.read_bytes()


def test_a_diffusers_folder_is_opened_by_a_recipe(folder: Path) -> None:
    opened = open_tokenizer(config(folder))
    assert opened.fingerprint() == tokenizer("wan2.1").fingerprint()
    assert open_tokenizer(config(folder.parent)).fingerprint() == opened.fingerprint()  # a pipeline's folder
    assert load_tokenizer(folder).fingerprint() == opened.fingerprint()
    half = open_tokenizer(config(folder, precision="bf16", tile=128, tile_overlap=32))
    assert isinstance(half, VaeTokenizer)
    assert half.settings == VaeSettings("bf16", 128, 32)
    assert half.encode(clip("wan2.1", 5)).dtype == torch.float32
    assert half.to("cpu").device == torch.device("cpu")


def test_sharded_weights_are_read(tmp_path: Path) -> None:
    model("wan2.1").save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert load_tokenizer(tmp_path).fingerprint() == tokenizer("wan2.1").fingerprint()


def test_the_fingerprint_follows_weights_and_config() -> None:
    import copy

    vae = copy.deepcopy(model("wan2.1"))
    same = VaeTokenizer(VAES["wan_vae"], vae, VaeSettings()).fingerprint()
    assert same == tokenizer("wan2.1").fingerprint()
    vae.decoder.conv_out.bias.data[0] += 1e-3
    assert VaeTokenizer(VAES["wan_vae"], vae, VaeSettings()).fingerprint() != same
    vae = copy.deepcopy(model("wan2.1"))
    vae.register_to_config(latents_std=[1.0, 2.0, 0.5, 1.6])
    assert VaeTokenizer(VAES["wan_vae"], vae, VaeSettings()).fingerprint() != same


def edited(file: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps(content))

    return change


def cut_short(folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:1000])


def without_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / WEIGHTS
    tensors = load_file(file)
    del tensors["encoder.conv_in.bias"]
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "damage, changes, said",
    [
        (lambda f: (f / "config.json").unlink(), {}, "config.json is missing"),
        (lambda f: (f / "config.json").write_text("{"), {}, "not a diffusers config"),
        (
            lambda f: (f / WEIGHTS).unlink(),
            {},
            "cannot be loaded as AutoencoderKLWan",
        ),
        (cut_short, {}, "cannot be loaded as AutoencoderKLWan"),
        (without_a_tensor, {}, r"missing keys encoder.conv_in.bias"),
        (edited("config.json", base_dim=16), {}, "cannot be loaded|weights do not fit"),
        (edited("config.json", _class_name="UNet2DModel"), {}, "holds UNet2DModel, not AutoencoderKLWan"),
        (edited("config.json", _class_name="AutoencoderKLCogVideoX"), {}, "set the type to cogvideox_vae"),
        (None, {"latent_d": 16}, "tokenizer.latent_d is 4 in the tokenizer and 16 in the recipe"),
        (None, {"latent_t": 8}, "tokenizer.latent_t is 4 in the tokenizer and 8 in the recipe"),
        (
            None,
            {"first_alone": False},
            "tokenizer.first_alone is True in the tokenizer and False in the recipe",
        ),
        (None, {"tile": 100}, "tokenizer.tile 100 does not divide by the 8 pixels of a cell"),
        (None, {"tile": 64, "tile_overlap": 64}, "tile_overlap 64 must be less than tile 64"),
    ],
)
def test_a_wrong_folder_or_recipe_is_named(
    damage: Callable[[Path], None] | None, changes: dict[str, Any], said: str, folder: Path
) -> None:
    if damage:
        damage(folder)
    with pytest.raises(UserError, match=said) as error:
        open_tokenizer(config(folder, **changes))
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_other_errors_in_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder; check the path"):
        open_tokenizer(config(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no diffusers model here"):
        open_tokenizer(config(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"wan_vae comes with weights and is not fitted"):
        fit_tokenizer(config(folder), [])
    with pytest.raises(UserError, match=r"is a wan_vae tokenizer and tokenizer.type is patch"):
        open_tokenizer(config(folder, type="patch"))
    tokens = tokenizer("wan2.1")
    with pytest.raises(UserError, match=r"width 20 does not divide .* 16 or 24"):
        tokens.encode(torch.zeros(1, 5, 16, 20, 3, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"6 frames do not divide .* use 5 or 9"):
        tokens.encode(torch.zeros(1, 6, 16, 16, 3, dtype=torch.uint8))
    tokens.save(tmp_path / "saved")
    edited("tokenizer.json", color="red")(tmp_path / "saved")
    with pytest.raises(UserError, match=r"tokenizer.json: wan_vae does not know color"):
        load_tokenizer(tmp_path / "saved")


@pytest.mark.parametrize(
    "name, file, changes, said",
    [
        ("wan2.1", "tokenizer.json", {"tile": "abc"}, "tile is 'abc', expected a whole number"),
        ("wan2.1", "tokenizer.json", {"tile": None}, "tile is None"),
        ("wan2.1", "tokenizer.json", {"tile": 64.5}, "tile is 64.5"),
        ("wan2.1", "tokenizer.json", {"tile": 64, "tile_overlap": "8"}, "tile_overlap is '8'"),
        ("wan2.1", "tokenizer.json", {"precision": ["fp32"]}, "expected fp32 or bf16"),
        ("wan2.1", "tokenizer.json", {"type": ["wan_vae"]}, "it has no type"),
        ("wan2.1", "config.json", {"dim_mult": []}, "cannot be loaded as AutoencoderKLWan"),
        ("wan2.1", "config.json", {"temperal_downsample": [True]}, "cannot be loaded as AutoencoderKLWan"),
        ("wan2.1", "config.json", {"temperal_downsample": [0, 1, 1]}, r"temperal_downsample is \[0, 1, 1\]"),
        ("wan2.1", "config.json", {"patch_size": "2"}, "patch_size is '2'"),
        ("wan2.1", "config.json", {"patch_size": 2}, "in_channels is 3, not the 3 x 2 x 2 of patch_size"),
        ("wan2.1", "config.json", {"latents_mean": None}, "latents_mean is None, not a list of numbers"),
        ("wan2.1", "config.json", {"latents_mean": [0.1]}, "1 means for latents of 4 numbers"),
        ("wan2.1", "config.json", {"latents_mean": [0.1, 0, float("nan"), 0]}, "means .* not all finite"),
        ("wan2.1", "config.json", {"latents_std": [1.0, 2.0]}, "2 deviations for latents of 4 numbers"),
        ("wan2.1", "config.json", {"latents_std": [1, 1, 0, 1]}, "deviations .* not all above 0"),
        ("wan2.1", "config.json", {"latents_std": ["1"] * 4}, "latents_std is .*, not a list of numbers"),
        ("cogvideox", "config.json", {"scaling_factor": 0}, "scaling_factor is 0, not a number above 0"),
        ("cogvideox", "config.json", {"scaling_factor": None}, "scaling_factor is None"),
        ("cogvideox", "config.json", {"shift_factor": "a"}, "shift_factor is .*'a'"),
        ("cogvideox", "config.json", {"norm_num_groups": 0}, "cannot be loaded as AutoencoderKLCogVideoX"),
        ("cogvideox", "config.json", {"temporal_compression_ratio": 0}, "AutoencoderKLCogVideoX"),
        ("cogvideox", "config.json", {"temporal_compression_ratio": 5}, "ratio is 5, not a power of 2"),
        ("ltx2", "config.json", {"scaling_factor": 0}, "scaling_factor is 0, not a number above 0"),
        ("ltx2", "config.json", {"decoder_causal": None}, "decoder_causal is None, neither true nor false"),
    ],
)
def test_a_wrong_value_in_a_saved_tokenizer_is_named(
    name: str, file: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    """Not a traceback from inside the model's class, nor other latents in silence."""
    tokenizer(name).save(tmp_path)
    edited(file, **changes)(tmp_path)
    with pytest.raises(UserError, match=said) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_statistics_in_the_weights_are_looked_at() -> None:
    import copy

    vae = copy.deepcopy(model("ltx2"))
    vae.latents_std[3] = 0
    with pytest.raises(ValueError, match="deviations of its latents are not all above 0"):
        VaeTokenizer(VAES["ltx2_vae"], vae, VaeSettings())


@pytest.mark.parametrize("cells", [(1, 3), (2, 1), (1, 1)])
def test_ltx2_decodes_what_it_encodes_down_to_one_cell(cells: tuple[int, int]) -> None:
    """Where its decoder mirrors edges it goes on beyond a lone row or column as if that were repeated."""
    tokens, video = tokenizer("ltx2"), clip("ltx2", 9, cells=cells)
    latents = tokens.encode(video)
    pixels = floats(tokens, latents)
    assert pixels.shape == video.shape
    wide = latents.repeat(1, 1, *(3 - min(2, n) for n in cells), 1).contiguous()
    wanted = reference_pixels("ltx2", wide)[:, :, : video.shape[2], : video.shape[3]]
    assert wanted.std() > 0.03
    assert (pixels - wanted).abs().max() < 2e-5
    # In tiles of one cell as well.
    assert tokenizer("ltx2", tile=32, tile_overlap=0).decode(latents).shape == video.shape
    # A decoder that mirrors nothing needs no such thing, and has an answer of its own.
    plain = some_latents("ltx2-other", 2, cells=cells)
    answer = floats(tokenizer("ltx2-other"), plain)
    assert (answer - reference_pixels("ltx2-other", plain)).abs().max() < 2e-5


def test_a_decoder_that_draws_noise_is_refused(tmp_path: Path) -> None:
    import diffusers

    noisy = diffusers.AutoencoderKLLTX2Video(**LTX2 | {"decoder_inject_noise": [True, False, False, False]})
    noisy.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="draws noise") as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)
