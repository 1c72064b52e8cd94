"""Wan: equal to diffusers' network and to the original's names; exact under every plan and from the cache."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

from laid import EXPAND, FIRST_FRAME, lay, noised, read_video, video
from motionloom.backbones.wan import ORIGINAL_KEYS, PRESETS, Wan, WanSizes
from motionloom.errors import UserError
from motionloom.nn.attention import pinned
from motionloom.nn.modulation import at_levels, per_token
from motionloom.nn.patching import patchify
from motionloom.plans import (
    Chunks,
    Geometry,
    Layout,
    Plan,
    Scenes,
    Streams,
    Text,
    TextToVideo,
    Visibility,
    full,
)
from motionloom.plans.stream import Stream
from motionloom.rng import torch_generator

TINY = replace(PRESETS["tiny"], in_channels=3, out_channels=3, text_dim=7)
IMAGE = replace(TINY, in_channels=8, image_dim=6)
"""Image to video: 2 channels of mask and 3 of image latents beside the latents, and image tokens."""
KINDS = {
    "t2v": TINY,
    "i2v": IMAGE,
    "flf2v": replace(IMAGE, pos_embed_seq_len=10),
    "i2v without tokens": replace(IMAGE, image_dim=None),
}
PLANS: dict[str, Plan] = {
    "text_to_video": TextToVideo(),
    "first_frame": FIRST_FRAME,
    "scenes": Scenes(EXPAND),
    "diffusion forcing": Chunks(2),
    "teacher forcing": Chunks(2, window=2, sinks=1, forcing="teacher"),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_plan = pytest.mark.parametrize("plan", PLANS)


def draw(*shape: int, key: str = "") -> Tensor:
    return torch.randn(shape, generator=torch_generator("wan", key, *shape), dtype=torch.float64)


def build(sizes: WanSizes, *, dtype: torch.dtype = torch.float32, **options: Any) -> Wan:
    """A model in which every weight matters."""
    with torch.device("meta"):
        model = Wan(sizes, **options)
    model = model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        gain = "norm" in name and name.endswith("weight")
        nn.init.normal_(parameter, mean=float(gain), std=0.15, generator=torch_generator("wan", name))
    return model.to(dtype)


# --- parity with diffusers ----------------------------------------------------------------------------------

GRID, TEXT_LENGTH, IMAGE_LENGTH = (3, 2, 3), 512, 10
"""Diffusers tells image tokens from words by the words being 512."""


def diffusers_model(sizes: WanSizes) -> nn.Module:
    from diffusers import WanTransformer3DModel

    config = sizes.to_diffusers()
    del config["_class_name"]
    return WanTransformer3DModel(**config)


@dataclass
class Inputs:
    """The same inputs for both networks; leaves of the graph."""

    latents: Tensor
    """(B, C, F, H, W)."""
    extra: Tensor
    text: Tensor
    image: Tensor
    sigma: Tensor
    """(B, K)."""
    level: Tensor
    """(B, N)."""

    def leaves(self) -> list[Tensor]:
        return [self.latents, self.extra, self.text, self.image]

    def ours(self, model: Wan) -> Tensor:
        def tokens(t: Tensor) -> Tensor:
            return patchify(t.permute(0, 2, 3, 4, 1), model.patch).flatten(1, 2)

        streams = {
            "video": stream("video", tokens(self.latents), self.sigma, GRID),
            "text": stream("text", self.text, self.sigma),
        }
        video = replace(streams["video"], level_BN=self.level)
        if model.sizes.extra_channels:
            video = replace(video, extra_BNC=tokens(self.extra))
        streams["video"] = video
        if model.sizes.image_dim is not None:
            streams["image"] = stream("image", self.image, self.sigma)
        return model(streams, full)["video"]

    def theirs(self, model: nn.Module) -> Tensor:
        config = model.config
        with_extra = config.in_channels > config.out_channels
        t = self.sigma.gather(1, self.level) * 1000
        image = None if config.image_dim is None else self.image
        if config.pos_embed_seq_len is not None:
            # Diffusers takes the two pictures of a sample as two of the batch.
            image = self.image.reshape(2 * len(self.image), -1, self.image.shape[-1])
        out = model(
            torch.cat([self.latents, self.extra], dim=1) if with_extra else self.latents,
            t[:, 0] if self.sigma.shape[1] == 1 else t,
            self.text,
            image,
            return_dict=False,
        )[0]
        return patchify(out.permute(0, 2, 3, 4, 1), config.patch_size).flatten(1, 2)


def stream(modality: str, x: Tensor, sigma: Tensor, grid: tuple[int, int, int] | None = None) -> Stream:
    grid = grid or (1, 1, x.shape[1])
    cell = torch.cartesian_prod(*(torch.arange(side) for side in grid)).view(1, -1, 3)
    zero = torch.zeros(1, x.shape[1], dtype=torch.long)
    return Stream(
        modality=modality,
        grid=grid,
        x_BNC=x,
        sigma_BK=sigma,
        level_BN=zero,
        position_BN3=cell.float(),
        cell_BN3=cell,
        scene_BN=zero,
        chunk_BN=zero,
        context_BN=zero.bool(),
        loss_BN=zero.float(),
    )


def inputs(sizes: WanSizes, levels: int) -> Inputs:
    frames, rows, columns = GRID
    shape = (frames, 2 * rows, 2 * columns)
    level = torch.arange(frames * rows * columns) * levels // (frames * rows * columns)
    return Inputs(
        latents=draw(2, sizes.out_channels, *shape).float().requires_grad_(),
        extra=draw(2, 5, *shape, key="extra").float().requires_grad_(),
        text=draw(2, TEXT_LENGTH, sizes.text_dim).float().requires_grad_(),
        image=draw(2, IMAGE_LENGTH, sizes.image_dim or 1).float().requires_grad_(),
        sigma=torch.tensor([[0.731, 0.2, 0.0], [0.1, 1.0, 0.55]])[:, :levels],
        level=torch.stack([level, level.flip(0)]),
    )


def off(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize(
    "kind, levels", [("t2v", 1), ("t2v", 3), ("i2v", 1), ("flf2v", 1), ("i2v without tokens", 1), ("i2v", 3)]
)
def test_outputs_and_gradients_equal_diffusers(kind, levels):
    """One level per clip as Wan 2.1, one per token as Wan 2.2 5B; float32."""
    ours, theirs = build(KINDS[kind]), diffusers_model(KINDS[kind])
    theirs.load_state_dict(ours.state_dict(), strict=True)
    found = []
    for model, read in ((ours, Inputs.ours), (theirs, Inputs.theirs)):
        given = inputs(KINDS[kind], levels)
        out = read(given, model)
        (out * draw(*out.shape, key="weights").float()).sum().backward()
        grads = {f"input {i}": leaf.grad for i, leaf in enumerate(given.leaves())}
        found.append((out, grads | {name: p.grad for name, p in model.named_parameters()}))
    (out, grads), (expected, expected_grads) = found
    assert expected.std() > 0.1
    assert off(out, expected) <= 1e-5
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        if expected_grads[name] is None:
            assert grad is None, name
            assert name.startswith("input")
        else:
            assert off(grad, expected_grads[name]) <= 1e-4, name


PUBLISHED = {
    "wan2.1-t2v-1.3b": 1_418_996_800,
    "wan2.1-t2v-14b": 14_288_491_584,
    "wan2.1-i2v-14b": 16_394_878_784,
    "wan2.1-flf2v-14b": 16_395_536_704,
    "wan2.2-t2v-a14b": 14_288_491_584,
    "wan2.2-i2v-a14b": 14_288_901_184,
    "wan2.2-ti2v-5b": 4_999_787_712,
}


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


def test_all_presets_have_the_names_shapes_and_counts_of_diffusers():
    assert PUBLISHED.keys() | {"tiny"} == PRESETS.keys()
    for name, sizes in PRESETS.items():
        with torch.device("meta"):
            ours, theirs = Wan(sizes), diffusers_model(sizes)
        assert shapes(ours) == shapes(theirs), name
        count = sum(p.numel() for p in ours.parameters())
        assert count == sum(p.numel() for p in theirs.parameters())
        assert name == "tiny" or count == PUBLISHED[name]
        assert ours.latent_channels == (48 if name.endswith("5b") else 16)
        assert len(ours.blocks()) == sizes.num_layers


def test_the_published_config_files_round_trip():
    """What diffusers writes beside the weights of Wan 2.1 I2V 14B."""
    config = {
        "_class_name": "WanTransformer3DModel",
        "_diffusers_version": "0.33.0.dev0",
        "added_kv_proj_dim": 5120,
        "attention_head_dim": 128,
        "cross_attn_norm": True,
        "eps": 1e-06,
        "ffn_dim": 13824,
        "freq_dim": 256,
        "image_dim": 1280,
        "in_channels": 36,
        "num_attention_heads": 40,
        "num_layers": 40,
        "out_channels": 16,
        "patch_size": [1, 2, 2],
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": 4096,
    }
    sizes = WanSizes.from_diffusers(config)
    assert sizes == PRESETS["wan2.1-i2v-14b"]
    written = sizes.to_diffusers()
    assert written.items() >= {k: v for k, v in config.items() if k != "_diffusers_version"}.items()
    assert written.keys() - config.keys() == {"pos_embed_seq_len"}
    for preset in PRESETS.values():
        assert WanSizes.from_diffusers(preset.to_diffusers()) == preset
    assert WanSizes.from_diffusers({"in_channels": 8, "out_channels": None}).out_channels == 8
    assert WanSizes.from_diffusers({}) == PRESETS["wan2.1-t2v-14b"]


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"_class_name": "WanVACETransformer3DModel"}, "_class_name"),
        ({"qk_norm": None}, "qk_norm is None"),
        ({"vace_layers": [0]}, "does not know vace_layers"),
        ({"image_dim": 1280}, "added_kv_proj_dim is None"),
        ({"added_kv_proj_dim": 5120}, "added_kv_proj_dim is 5120"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_layers": "30"}, "num_layers is '30'"),
        ({"patch_size": [2, 2]}, r"patch_size is \(2, 2\)"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"out_channels": 32}, "in_channels 16"),
        ({"attention_head_dim": 15}, "must be even"),
    ],
)
def test_a_config_that_cannot_be_read_says_why(entry, message):
    with pytest.raises(UserError, match=message):
        WanSizes.from_diffusers(entry)


# --- original names -----------------------------------------------------------------------------------------


def test_original_names_lead_where_diffusers_own_converter_leads():
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    model = build(KINDS["flf2v"])
    weights = model.state_dict()
    origin = ORIGINAL_KEYS.to_original(weights)
    assert all(len(pieces) == 1 and pieces[0].of == 1 for pieces in origin.values())
    original = {name: weights[pieces[0].name] for name, pieces in origin.items()}
    block = {
        *("modulation", "norm3.weight", "norm3.bias", "ffn.0.weight", "ffn.0.bias", "ffn.2.weight"),
        *(f"self_attn.{n}" for n in ("q.weight", "k.bias", "o.weight", "norm_q.weight", "norm_k.weight")),
        *(f"cross_attn.{n}" for n in ("q.weight", "v.bias", "o.bias", "norm_q.weight", "norm_k.weight")),
        *(f"cross_attn.{n}" for n in ("k_img.weight", "v_img.bias", "norm_k_img.weight")),
    }
    assert original.keys() >= {
        *(f"blocks.{i}.{name}" for name in block for i in range(2)),
        *("patch_embedding.weight", "time_embedding.0.weight", "time_embedding.2.bias", "head.modulation"),
        *("time_projection.1.weight", "text_embedding.0.weight", "text_embedding.2.bias", "head.head.weight"),
        *("img_emb.proj.0.weight", "img_emb.proj.1.bias", "img_emb.proj.3.weight", "img_emb.proj.4.bias"),
        "img_emb.emb_pos",
    }
    assert set(ORIGINAL_KEYS.marks) <= original.keys()
    # Diffusers' converter does not know first-and-last-frame models.
    known = {name: t for name, t in original.items() if name != "img_emb.emb_pos"}
    theirs = convert_wan_transformer_to_diffusers(dict(known))
    ours = {name: original[pieces[0].name] for name, pieces in ORIGINAL_KEYS.to_diffusers(original).items()}
    assert ours.keys() == weights.keys()
    assert theirs.keys() == weights.keys() - {"condition_embedder.image_embedder.pos_embed"}
    assert all(t is weights[name] for name, t in ours.items())
    assert all(t is weights[name] for name, t in theirs.items())
    prefixed = ORIGINAL_KEYS.to_diffusers("model.diffusion_model." + name for name in original)
    assert prefixed.keys() == ours.keys()


# --- plans and visibilities ---------------------------------------------------------------------------------

WORDS = 3


@dataclass
class Clip:
    """All that goes into the streams of a batch, so that tests can change one thing."""

    geometry: Geometry
    text: Text
    clean: Tensor
    """(B, F, S, 4 x C)."""
    noise: Tensor
    sigma: Tensor
    """Independent draws, (B, 8)."""
    extra: Tensor
    image: Tensor
    """(B, 10, C), the same number for each scene."""

    def streams(self, plan: Plan, sizes: WanSizes) -> tuple[Layout, Streams]:
        layout = lay(plan, self.geometry, self.text)
        streams = noised(layout, self.clean, self.noise, self.sigma, self.text)
        levels = streams["video"].sigma_BK
        if sizes.extra_channels:
            extra = self.extra[:, video(layout).frame_T].flatten(1, 2)
            streams["video"] = replace(streams["video"], extra_BNC=extra)
        if sizes.image_dim is not None:
            scene_S = self.text.scene_BL[:, ::WORDS]
            scene = scene_S.repeat_interleave(IMAGE_LENGTH // scene_S.shape[1], dim=1)
            streams["image"] = replace(stream("image", self.image, levels), scene_BN=scene)
        return layout, streams

    def run(self, model: Wan, plan: Plan) -> Tensor:
        """The prediction for the clip, (B, F, S, C)."""
        layout, streams = self.streams(plan, model.sizes)
        return read_video(layout, model(streams, layout.visibility)["video"])


def clip(scene_frames: tuple[int, ...] = (5,), dtype: torch.dtype = torch.float32) -> Clip:
    scene_F = torch.arange(len(scene_frames)).repeat_interleave(torch.tensor(scene_frames))
    frames, scenes = len(scene_F), len(scene_frames)
    seconds = torch.arange(frames)[None] / 8.0
    scene_L = torch.arange(scenes).repeat_interleave(WORDS)
    valid = torch.ones(2, scenes * WORDS, dtype=torch.bool)
    valid[0, -1] = False
    return Clip(
        geometry=Geometry((frames, 2, 3), seconds, (16.0, 16.0), scene_F[None], 2, scenes=scenes),
        text=Text(draw(2, scenes * WORDS, 7).to(dtype), valid, scene_L[None]),
        clean=draw(2, frames, 6, 12, key="clean").to(dtype),
        noise=draw(2, frames, 6, 12, key="noise").to(dtype),
        sigma=draw(2, 8, key="sigma").sigmoid().to(dtype),
        extra=draw(2, frames, 6, 20, key="extra").to(dtype),
        image=draw(2, IMAGE_LENGTH, 6, key="image").to(dtype),
    )


def changed(tensor: Tensor, *index: object) -> Tensor:
    other = tensor.clone()
    other[index] = 3.0 - other[index]
    return other


def untouched(before: Tensor, after: Tensor) -> list[bool]:
    """Which frames of (B, F, S, C) are bit-identical."""
    return (before == after).flatten(2).all(dim=2).all(dim=0).tolist()


@dataclass(frozen=True)
class Opaque(Visibility):
    """The same rule without the hints that allow short cuts."""

    rule: Visibility

    def allows(self, q, k):
        return self.rule.allows(q, k)

    @property
    def whole_frames(self) -> bool:
        return False


@every_kind
@every_plan
def test_every_plan_runs_and_short_cuts_equal_masks(kind, plan):
    shots = clip((3, 2), dtype=torch.float64)
    model = build(KINDS[kind], dtype=torch.float64)
    layout, streams = shots.streams(PLANS[plan], model.sizes)
    found = []
    for rule in (layout.visibility, Opaque(layout.visibility)):
        model.zero_grad()
        out = model(streams, rule)["video"]
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad for p in model.parameters())])
    for fast, dense in zip(*found, strict=True):
        torch.testing.assert_close(fast, dense, rtol=1e-10, atol=1e-10)


@every_plan
@pytest.mark.parametrize("way", ["segments", "merge"])
@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_fast_ways_of_attention_equal_masks(plan, way, checkpoint_blocks):
    shots = clip((3, 2), dtype=torch.float64)
    found = []
    for chosen in ("dense", way):
        model = build(IMAGE, dtype=torch.float64, checkpoint_blocks=checkpoint_blocks)
        with pinned(chosen):
            out = shots.run(model, PLANS[plan])
            out.square().sum().backward()
        found.append([out.detach(), *(p.grad for p in model.parameters())])
    for fast, dense in zip(*found, strict=True):
        torch.testing.assert_close(fast, dense, rtol=1e-10, atol=1e-10)


@every_kind
@pytest.mark.parametrize("forcing", ["diffusion", "teacher"])
@pytest.mark.parametrize("chunk", range(3))
def test_a_chunk_changes_nothing_before_it(kind, forcing, chunk):
    """Latents, what stands beside them, noise and level of one chunk change; no gradient reaches back."""
    plan, video, model = Chunks(2, forcing=forcing), clip(), build(KINDS[kind])
    at = torch.arange(5) // 2 == chunk
    sigma = video.sigma.clone()
    sigma[:, chunk] /= 2
    parts = {name: changed(getattr(video, name), slice(None), at) for name in ("clean", "noise", "extra")}
    before = video.run(model, plan)
    after = replace(video, **parts, sigma=sigma).run(model, plan)
    assert untouched(before, after) == (torch.arange(5) // 2 < chunk).tolist()
    leaf = video.noise.clone().requires_grad_()
    out = replace(video, noise=leaf).run(model, plan)
    (grad,) = torch.autograd.grad(out[:, at].square().sum(), leaf)
    reached = grad.flatten(2).ne(0).any(dim=2)
    assert not reached[:, torch.arange(5) // 2 > chunk].any()
    assert reached[:, at].all()


def test_windows_and_sinks_bound_what_a_chunk_sees():
    plan, video, model = Chunks(1, window=2, sinks=1), clip((6,)), build(replace(IMAGE, num_layers=1))
    for frame, reaches in {0: {0, 1, 2, 3, 4, 5}, 1: {1, 2}, 3: {3, 4}}.items():
        news = replace(video, noise=changed(video.noise, slice(None), frame))
        same = untouched(video.run(model, plan), news.run(model, plan))
        assert {i for i, is_same in enumerate(same) if not is_same} == reaches


@pytest.mark.parametrize("forcing", ["diffusion", "teacher"])
def test_a_shown_picture_reaches_every_chunk_under_every_rule(forcing):
    plan = Chunks(1, window=1, forcing=forcing)
    video, model = clip((4,)), build(replace(IMAGE, num_layers=1))
    news = replace(video, image=changed(video.image, slice(None), 2))
    assert untouched(video.run(model, plan), news.run(model, plan)) == [False] * 4


@pytest.mark.parametrize("what", ["text", "image"])
@pytest.mark.parametrize("depth", [1, 2])
def test_captions_and_pictures_of_a_scene_reach_others_only_through_the_video(what, depth):
    shots, model = clip((2, 3)), build(replace(IMAGE, num_layers=depth))
    if what == "text":
        own = shots.text.scene_BL[0] == 0
        news = replace(shots, text=replace(shots.text, x_BLC=changed(shots.text.x_BLC, slice(None), own)))
    else:
        news = replace(shots, image=changed(shots.image, slice(None), slice(0, 5)))
    same = untouched(shots.run(model, Scenes()), news.run(model, Scenes()))
    assert same == [False, False, *([depth == 1] * 3)]


@every_plan
def test_padding_in_the_text_has_no_influence(plan):
    shots, model = clip((3, 2)), build(IMAGE)
    news = replace(shots, text=replace(shots.text, x_BLC=changed(shots.text.x_BLC, ~shots.text.valid_BL)))
    assert torch.equal(shots.run(model, PLANS[plan]), news.run(model, PLANS[plan]))


def test_all_words_valid_is_no_mask_at_all():
    video, model = clip(), build(TINY)
    every = replace(video, text=replace(video.text, valid_BL=torch.ones_like(video.text.valid_BL)))
    _, streams = every.streams(TextToVideo(), TINY)
    none = {**streams, "text": replace(streams["text"], valid_BN=None)}
    torch.testing.assert_close(model(streams, full), model(none, full), rtol=0, atol=1e-6)


# --- noise levels -------------------------------------------------------------------------------------------


def test_equal_levels_are_one_level():
    model, given = build(TINY), inputs(TINY, 3)
    one = replace(given, sigma=given.sigma[:, :1], level=torch.zeros_like(given.level))
    equal = replace(given, sigma=given.sigma[:, :1].expand(-1, 3))
    a, b, c = one.ours(model), equal.ours(model), given.ours(model)
    assert off(b, a) < 1e-6
    assert off(c, a) > 1e-2


@pytest.mark.parametrize("tables, levels", [(2, 1), (1, 2), (2, 2)])
def test_rows_of_levels_equal_the_product_with_a_one_hot_matrix(tables, levels):
    table = draw(tables, 3, 4, 5).requires_grad_()
    level = torch.tensor([[0, 2, 2, 1, 0, 2], [1, 1, 0, 0, 2, 1]])[:levels]
    found = []
    for rows in (at_levels(table, level), per_token(table, nn.functional.one_hot(level, 3).double())):
        weight = draw(2, 6, 5, key="w")
        (grad,) = torch.autograd.grad(sum((row * weight * i).sum() for i, row in enumerate(rows)), table)
        found.append((*rows, grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.autocast("cpu", torch.bfloat16):
        rows = at_levels(table.float(), level)
    assert torch.equal(torch.stack(rows, dim=2)[0, 1], table[0, 2].float())


# --- from the cache -----------------------------------------------------------------------------------------


def chunk_of(streams: Streams, chunk: int, *, context: bool = False) -> Streams:
    """One chunk of the video (of its clean copies: ``context``), everything else as it is."""
    video = streams["video"]
    chosen = (video.chunk_BN[0] == chunk) & (video.context_BN[0] == context)
    parts = {
        name: t[:, chosen] for name, t in vars(video).items() if isinstance(t, Tensor) and name != "sigma_BK"
    }
    frames = int(chosen.sum()) // (video.grid[1] * video.grid[2])
    return {**streams, "video": replace(video, grid=(frames, *video.grid[1:]), **parts)}


@every_kind
@pytest.mark.parametrize("checkpoint_blocks", [False, True])
@pytest.mark.parametrize("window, sinks", [(None, 0), (2, 1)])
def test_chunks_from_the_cache_equal_the_masked_forward(kind, checkpoint_blocks, window, sinks):
    """Written through: every chunk is kept as noisy as it is (causvid's first reference). Gradients too."""
    plan, sizes = Chunks(1, window=window, sinks=sinks), KINDS[kind]
    model = build(sizes, dtype=torch.float64, checkpoint_blocks=checkpoint_blocks)
    layout, streams = clip(dtype=torch.float64).streams(plan, sizes)
    whole = model(streams, layout.visibility)["video"]
    cache = model.new_cache(window=window, sinks=sinks)
    outs = []
    for chunk in range(5):
        cache.begin(chunk)
        for modality in ("text", "image"):
            cache.drop(modality)
        outs.append(model(chunk_of(streams, chunk), layout.visibility, cache)["video"])
        cache.commit(detach=False)
    assert (torch.cat(outs, dim=1) - whole).abs().max() < 1e-12
    weight = draw(*whole.shape, key="weights")
    wanted = torch.autograd.grad((whole * weight).sum(), list(model.parameters()))
    found = torch.autograd.grad((torch.cat(outs, dim=1) * weight).sum(), list(model.parameters()))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("positions", ["absolute", "relative"])
def test_generation_from_clean_chunks_equals_teacher_forcing(positions):
    plan = Chunks(1, window=2, sinks=1, forcing="teacher")
    model = build(IMAGE, dtype=torch.float64)
    layout, streams = clip(dtype=torch.float64).streams(plan, IMAGE)
    masked = read_video(layout, model(streams, layout.visibility)["video"])
    calls: list[int] = []
    model.condition_embedder.text_embedder.register_forward_hook(lambda *_: calls.append(1))
    # A cache sees its own chunks only; which of them a chunk may see is the same rule without the copies.
    rule = lay(Chunks(1, window=2, sinks=1), video(layout).geometry, clip().text).visibility
    cache = model.new_cache(window=2, sinks=1, positions=positions)
    same = []
    with torch.no_grad():
        for chunk in range(5):
            cache.begin(chunk)
            noisy = chunk_of(streams, chunk)
            for _ in range(2):
                out = model(noisy, rule, cache)["video"]
            same.append((out - masked[:, chunk]).abs().max() < 1e-12)
            model(chunk_of(streams, chunk, context=True), rule, cache)
            cache.commit()
    # RoPE is relative, so closing the gap behind the sink changes only what the sink is seen as.
    assert same == ([True] * 5 if positions == "absolute" else [True, True, True, False, False])
    assert len(calls) == 1


# --- dtypes, starts, memory, compilation --------------------------------------------------------------------


@every_kind
def test_a_new_model_answers_zero_and_draws_from_its_generator_alone(kind):
    state = torch.get_rng_state()
    models = []
    for seed in (1, 1, 2):
        with torch.device("meta"):
            model = Wan(KINDS[kind])
        model = model.to_empty(device="cpu")
        for parameter in model.parameters():
            nn.init.constant_(parameter, float("nan"))
        model.init_weights(torch_generator("wan", seed))
        models.append(model)
    assert torch.equal(torch.get_rng_state(), state)
    seen: list[Tensor] = []
    models[0].blocks()[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    assert not clip().run(models[0], FIRST_FRAME).any()
    assert 0.5 < seen[0].std() < 1.5
    first, again, other = (model.state_dict() for model in models)
    assert all(t.isfinite().all() and torch.equal(t, again[name]) for name, t in first.items())
    differ = {name for name, t in first.items() if not torch.equal(t, other[name])}
    assert differ >= {"patch_embedding.weight", "scale_shift_table", "blocks.1.attn2.to_k.weight"}


@every_kind
@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_every_parameter_gets_its_gradient_recomputed_or_not(kind, checkpoint_blocks):
    model = build(KINDS[kind], checkpoint_blocks=checkpoint_blocks)
    clip((3, 2)).run(model, Scenes()).square().sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    expected = build(KINDS[kind])
    clip((3, 2)).run(expected, Scenes()).square().sum().backward()
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_bf16_autocast_and_bf16_weights_follow_float32():
    video, model = clip(), build(IMAGE)
    exact = video.run(model, Chunks(2))
    with torch.autocast("cpu", torch.bfloat16):
        rough = video.run(model, Chunks(2))
    assert rough.dtype == torch.float32
    assert 1e-5 < off(rough, exact) < 0.03
    assert 1e-5 < off(video.run(model.bfloat16(), Chunks(2)), exact) < 0.03


@pytest.mark.parametrize(
    "kind, plan, way",
    [("t2v", "text_to_video", None), ("i2v", "teacher forcing", None), ("i2v", "teacher forcing", "merge")],
)
def test_blocks_compile_without_a_break_and_once_for_all(kind, plan, way):
    torch._dynamo.reset()
    video, model = clip((2, 1)), build(replace(KINDS[kind], num_layers=4))
    expected = video.run(model, PLANS[plan])
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for block in model.blocks():
        block.compile(fullgraph=True, backend=counter)
    with pinned(way) if way else nullcontext():
        out = video.run(model, PLANS[plan])
        out.sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_blocks_compile_with_a_cache():
    """First chunk and words, first chunk with held words, later chunks; then no more."""
    torch._dynamo.reset()
    model = build(TINY)
    layout, streams = clip().streams(Chunks(1), TINY)

    def generate() -> Tensor:
        cache, outs = model.new_cache(window=2), []
        with torch.no_grad():
            for chunk in range(5):
                cache.begin(chunk)
                for _ in range(2):
                    out = model(chunk_of(streams, chunk), layout.visibility, cache)["video"]
                cache.commit()
                outs.append(out)
        return torch.cat(outs, dim=1)

    expected = generate()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for block in model.blocks():
        block.compile(fullgraph=True, backend=counter)
    torch.testing.assert_close(generate(), expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 3
    torch._dynamo.reset()


# --- what does not fit --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights, streams, message",
    [
        ("i2v", "t2v", "read 5 channels beside the latents .* got 0"),
        ("t2v", "i2v without tokens", "read 0 channels beside the latents .* got 5"),
        ("i2v", "i2v without tokens", "read CLIP image tokens and the plan brings none"),
        ("i2v without tokens", "i2v", "read no CLIP image tokens and the plan brings some"),
    ],
)
def test_streams_that_do_not_fit_the_weights_say_so(weights, streams, message):
    layout, given = clip().streams(TextToVideo(), KINDS[streams])
    with pytest.raises(UserError, match=message):
        build(KINDS[weights])(given, layout.visibility)


def test_one_picture_for_weights_that_read_two_says_so():
    video, model = clip(), build(KINDS["flf2v"])
    with pytest.raises(UserError, match=r"10 image tokens \(two pictures\) and got 5"):
        replace(video, image=video.image[:, :5]).run(model, TextToVideo())
