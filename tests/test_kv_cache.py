"""Generation from a cache equals the masked forward, on every backbone that has one.

Two references: chunks written as they went in are the block-causal forward over noisy chunks (diffusion
forcing), and clean chunks in the cache are the clean half of teacher forcing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

from laid import frames_given, lay, levels_of, noised, sampled, stages, video
from motionloom.backbones import Backbone, build_backbone
from motionloom.backbones.base import CachingBackbone
from motionloom.backbones.ltx2 import LTX2
from motionloom.backbones.ltx2 import PRESETS as LTX2_PRESETS
from motionloom.backbones.prediction import Predictor
from motionloom.backbones.wan import PRESETS as WAN_PRESETS
from motionloom.backbones.wan import Wan
from motionloom.config.recipe import ModelConfig
from motionloom.flow import LINEAR, Guidance
from motionloom.generate import Sampling, Task, rollout
from motionloom.nn.cache import KVCache
from motionloom.plans import (
    Chunks,
    Geometry,
    Layout,
    Sample,
    Stream,
    Streams,
    Text,
    Values,
    Visibility,
    causal_chunks,
    dense_mask,
    full,
)
from motionloom.plans.past import facts, join_facts, past_facts
from motionloom.plans.visibility import TEXT
from motionloom.rng import torch_generator

ROWS, COLUMNS, WORDS, SOUNDS = 2, 3, 4, 2
"""Cells of a frame, words of a caption, audio tokens of a frame."""
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


@dataclass(frozen=True)
class Kind:
    """A backbone with a cache, tiny."""

    make: Callable[[int], nn.Module]
    """From its depth."""
    channels: int
    """Numbers of a video token."""
    text_dim: int
    audio_channels: int = 0
    """Numbers of an audio token; 0: it has no sound."""


def _joint(audio_dim: int) -> Callable[[int], nn.Module]:
    def make(depth: int) -> nn.Module:
        sizes = {"dim": 24, "audio_dim": audio_dim, "depth": depth, "num_heads": 2, "mlp_ratio": 2.0}
        return build_backbone(ModelConfig(type="joint", **sizes), 4, 5, audio_channels=3)

    return make


def _wan(depth: int) -> nn.Module:
    return Wan(replace(WAN_PRESETS["tiny"], num_layers=depth))


def _ltx2(preset: str) -> Callable[[int], nn.Module]:
    return lambda depth: LTX2(replace(LTX2_PRESETS[preset], num_layers=depth))


_WAN, _LTX2, _LTX23 = WAN_PRESETS["tiny"], LTX2_PRESETS["tiny"], LTX2_PRESETS["tiny2.3"]
KINDS = {
    "joint": Kind(_joint(0), 4, 5),
    "joint with sound": Kind(_joint(12), 4, 5, 3),
    "wan": Kind(_wan, 4 * _WAN.out_channels, _WAN.text_dim),
    "ltx2": Kind(_ltx2("tiny"), _LTX2.in_channels, sum(_LTX2.text_channels), _LTX2.audio_in_channels),
    "ltx2.3": Kind(_ltx2("tiny2.3"), _LTX23.in_channels, sum(_LTX23.text_channels), _LTX23.audio_in_channels),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
both_precisions = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32"])


def build(kind: str, dtype: torch.dtype = torch.float64, depth: int = 2) -> nn.Module:
    """With values where training starts from zero, so that everything matters."""
    model = KINDS[kind].make(depth).eval()
    generator = torch_generator("awake")
    model.init_weights(generator)
    for parameter in model.parameters():
        if parameter.std() < 0.05 or not parameter.any():
            nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.to(dtype)


# --- clips, whole and in chunks -----------------------------------------------------------------------------


def draw(dtype: torch.dtype, *shape: int, key: str) -> Tensor:
    return torch.randn(shape, generator=torch_generator(key, *shape), dtype=torch.float64).to(dtype)


def caption(kind: str, dtype: torch.dtype, batch: int = 2, key: str = "words") -> Text:
    """The first sample's last word is padding."""
    valid = torch.ones(batch, WORDS, dtype=torch.bool)
    valid[0, -1] = False
    x_BLC = draw(dtype, batch, WORDS, KINDS[kind].text_dim, key=key)
    return Text(x_BLC, valid, torch.zeros(1, WORDS, dtype=torch.long))


def geometry(frames: int, batch: int = 2) -> Geometry:
    seconds_F = torch.arange(frames) / 8.0
    scene_F = torch.zeros(frames, dtype=torch.long)
    return Geometry((frames, ROWS, COLUMNS), seconds_F[None], (8.0, 8.0), scene_F[None], batch)


@dataclass(frozen=True)
class Clip:
    """All streams of a clip under a plan, and what they were made from."""

    streams: Streams
    visibility: Visibility
    chunks: int

    def chunk(self, c: int, context: bool = False) -> Streams:
        """The streams of one chunk, or of its clean copy."""
        return {m: s if m == "text" else only(s, c, context) for m, s in self.streams.items()}


def only(stream: Stream, chunk: int, context: bool) -> Stream:
    keep = (stream.chunk_BN[0] == chunk) & (stream.context_BN[0] == context)
    names = ("x_BNC", "level_BN", "position_BN3", "cell_BN3", "scene_BN", "chunk_BN", "context_BN", "loss_BN")
    parts = {name: getattr(stream, name)[:, keep] for name in names}
    cells = stream.grid[1] * stream.grid[2]
    grid = (int(keep.sum()) // cells, *stream.grid[1:])
    return replace(stream, grid=grid, first_BN=stream.attributes.first_BN[:, keep], **parts)


def clip_of(kind: str, plan: Chunks, frames: int, dtype: torch.dtype = torch.float64, batch: int = 2) -> Clip:
    """Chunk c at its own noise level; the same clean clip, noise and levels for every plan."""
    text, geo = caption(kind, dtype, batch), geometry(frames, batch)
    layout = lay(plan, geo, text)
    sigma_BD = torch.rand(8, 16, generator=torch_generator("sigma"))[:batch].to(dtype)
    shape = (batch, frames, ROWS * COLUMNS, KINDS[kind].channels)
    clean, noise = draw(dtype, *shape, key="clean"), draw(dtype, *shape, key="noise")
    streams = noised(layout, clean, noise, sigma_BD, text)
    if KINDS[kind].audio_channels:
        streams["audio"] = sound(layout, streams["video"].sigma_BK, KINDS[kind].audio_channels)
    double = {m: replace(s, position_BN3=s.position_BN3.to(dtype)) for m, s in streams.items()}
    return Clip(double, layout.visibility, int(video(layout).chunk_T.max()) + 1)


def sound(layout: Layout, sigma_BK: Tensor, channels: int) -> Stream:
    """``SOUNDS`` audio tokens beside each video frame, at its noise level."""
    track = video(layout)
    batch, frames = sigma_BK.shape[0], track.geometry.grid[0]

    def per_token(t_BT: Tensor) -> Tensor:
        return t_BT.repeat_interleave(SOUNDS, dim=1)

    place_T = (track.frame_T[:, None] * SOUNDS + torch.arange(SOUNDS)).flatten()
    shape = (batch, frames * SOUNDS, channels)
    dtype = sigma_BK.dtype
    clean, noise = draw(dtype, *shape, key="clean sound"), draw(dtype, *shape, key="sound's noise")
    level_BT = per_token(track.level_BN[:, :: ROWS * COLUMNS]).expand(batch, -1)
    sigma_BT1 = sigma_BK.gather(1, level_BT)[..., None]
    nothing_T = torch.zeros_like(place_T)
    return Stream(
        modality="audio",
        grid=(len(place_T), 1, 1),
        x_BNC=LINEAR.mix(clean[:, place_T], noise[:, place_T], sigma_BT1),
        sigma_BK=sigma_BK,
        level_BN=level_BT,
        position_BN3=torch.stack([place_T / (8.0 * SOUNDS), nothing_T, nothing_T], dim=-1)[None],
        cell_BN3=torch.stack([place_T, nothing_T, nothing_T], dim=-1)[None],
        scene_BN=nothing_T[None],
        chunk_BN=per_token(track.chunk_T[None]),
        context_BN=per_token(track.context_T[None]),
        loss_BN=torch.ones(1, len(place_T)),
    )


Outputs = dict[str, list[Tensor]]
"""Answers by modality, one per chunk."""


def masked(model: nn.Module, clip: Clip) -> Outputs:
    """One forward over everything; copies are left out."""
    found = {}
    for modality, out in model(clip.streams, clip.visibility).items():
        stream = clip.streams[modality]
        chunk_N = torch.where(stream.context_BN[0], -1, stream.chunk_BN[0])
        found[modality] = [out[:, chunk_N == c] for c in range(clip.chunks)]
    return found


def written_through(
    model: nn.Module, clip: Clip, cache: KVCache, rule: Visibility, **commit: bool
) -> Outputs:
    """Every chunk once, and into the cache as it is."""
    found: Outputs = {}
    for c in range(clip.chunks):
        cache.begin(c)
        for modality, out in model(clip.chunk(c), rule, cache).items():
            found.setdefault(modality, []).append(out)
        cache.commit(**commit)
    return found


def off(a: Outputs, b: Outputs) -> float:
    """The largest difference, relative to the largest value."""
    assert a.keys() == b.keys()
    pairs = [(x, y) for m in a for x, y in zip(a[m], b[m], strict=True)]
    return max(((x - y).abs().max() / y.abs().max().clamp_min(1.0)).item() for x, y in pairs)


def tail(outputs: Outputs, begin: int) -> Outputs:
    return {m: chunks[begin:] for m, chunks in outputs.items()}


PLANS = {
    "ragged": (Chunks(2), 5),
    "first alone": (Chunks(2, first_alone=True), 5),
    "window": (Chunks(1, window=3), 8),
    "window and sink": (Chunks(1, window=2, sinks=1), 8),
    "two sinks": (Chunks(2, window=2, sinks=2), 13),
    "window of one": (Chunks(2, window=1), 6),
}
every_plan = pytest.mark.parametrize("plan", PLANS)


def ring(plan: Chunks, **options: object) -> dict[str, object]:
    return {"window": plan.window, "sinks": plan.sinks, **options}


# --- what the cache holds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("frames", [4, 5, 9])
@every_plan
def test_the_past_is_the_brute_force_definition(plan, frames, padded):
    """Which chunks are held, and the mask over [words, past, present]: 1 of the specification's list."""
    plan, _ = PLANS[plan]
    text = caption("joint", torch.float32)
    text = text if padded else replace(text, valid_BL=torch.ones_like(text.valid_BL))
    clip = clip_of("joint", plan, frames, torch.float32)
    words = replace(clip.streams["text"], valid_BN=text.valid_BL)
    cache = KVCache(1, **ring(plan))

    def pair(tokens: int) -> tuple[Tensor, Tensor]:
        return (torch.zeros(2, tokens, 1, 2),) * 2

    cache.hold("text", facts(words), [pair(WORDS)])
    for c in range(clip.chunks):
        cache.begin(c)
        near = [o for o in range(c) if plan.window is None or c - o < plan.window or o < plan.sinks]
        assert cache.chunks("video") == near
        present = clip.chunk(c)["video"]
        keys, valid = join_facts([*past_facts(cache, "text", "video"), facts(present)])
        wanted = [o for o in [*near, c] for f in plan.chunk_of(frames).tolist() if f == o for _ in range(6)]
        assert keys.chunk_BN[0, WORDS:].tolist() == wanted
        seen = clip.visibility.allows(present.attributes.queries(), keys.keys())
        assert seen.all()
        mask = dense_mask(clip.visibility, present.attributes, keys, valid)
        assert mask is not None
        allowed = torch.ones(2, keys.chunk_BN.shape[1], dtype=torch.bool)
        allowed[:, :WORDS] = text.valid_BL
        assert torch.equal(mask, allowed[:, None].expand_as(mask))
        cache.offer("video", facts(present), [pair(present.x_BNC.shape[1])])
        cache.commit()


# --- equal to the masked forward ----------------------------------------------------------------------------


@both_precisions
@every_plan
@every_kind
def test_written_through_equals_block_causal(kind, plan, dtype):
    """Ragged, first frame alone, ring and sinks before and after it turned: 2 and 4 of the list."""
    plan, frames = PLANS[plan]
    model, clip = build(kind, dtype), clip_of(kind, plan, frames, dtype)
    with torch.no_grad():
        reference = masked(model, clip)
        for rule, lean in ((clip.visibility, False), (full, True)):
            found = written_through(model, clip, model.new_cache(**ring(plan, lean=lean)), rule)
            assert off(found, reference) < TOLERANCE[dtype]


@both_precisions
@pytest.mark.parametrize("plan", ["ragged", "window and sink"])
@every_kind
def test_a_clean_past_is_teacher_forcing_and_not_diffusion_forcing(kind, plan, dtype):
    """3 of the list. Denoising passes leave nothing behind: each chunk is asked twice."""
    plan, frames = PLANS[plan]
    model = build(kind, dtype)
    clip = clip_of(kind, replace(plan, forcing="teacher"), frames, dtype)
    cache, found = model.new_cache(**ring(plan)), {}
    with torch.no_grad():
        for c in range(clip.chunks):
            cache.begin(c)
            louder = {m: replace(s, sigma_BK=s.sigma_BK * 0.5) for m, s in clip.chunk(c).items()}
            model(louder, full, cache)
            for modality, out in model(clip.chunk(c), full, cache).items():
                found.setdefault(modality, []).append(out)
            model(clip.chunk(c, context=True), full, cache)
            cache.commit()
        teacher = masked(model, clip)
        diffusion = masked(model, clip_of(kind, plan, frames, dtype))
    assert off(found, teacher) < TOLERANCE[dtype]
    assert off(tail(found, 0), tail(diffusion, 0)) > 1e-2
    for modality, chunks in found.items():
        assert off({modality: chunks[:1]}, {modality: diffusion[modality][:1]}) < TOLERANCE[dtype]
        for c in range(1, clip.chunks):
            assert (chunks[c] - diffusion[modality][c]).abs().max() > 1e-3


@pytest.mark.parametrize("plan", ["ragged", "window and sink"])
@every_kind
def test_writing_a_chunk_twice_is_writing_it_once(kind, plan):
    plan, frames = PLANS[plan]
    model, clip = build(kind), clip_of(kind, plan, frames)
    once, twice = model.new_cache(**ring(plan)), model.new_cache(**ring(plan))
    with torch.no_grad():
        for c in range(clip.chunks):
            once.begin(c)
            wanted = model(clip.chunk(c), full, once)
            once.commit()
            twice.begin(c)
            model(
                {m: replace(s, x_BNC=s.x_BNC + (m != "text")) for m, s in clip.chunk(c).items()}, full, twice
            )
            twice.commit()
            for again in (False, True):
                if again:
                    twice.begin(c)
                for modality, out in model(clip.chunk(c), full, twice).items():
                    assert torch.equal(out, wanted[modality])
                twice.commit()
        assert once.memory() == twice.memory()


# --- causality ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["ragged", "window and sink"])
@every_kind
def test_a_chunk_reaches_no_earlier_one(kind, plan):
    """5 of the list: to the bit, and a gradient of exactly zero."""
    plan, frames = PLANS[plan]
    model, clip = build(kind), clip_of(kind, plan, frames)
    base = masked(model, clip)
    for modality, c in itertools.product(base, range(1, clip.chunks)):
        stream = clip.streams[modality]
        here_N = stream.chunk_BN[0] == c
        x_BNC = (stream.x_BNC + 3.0 * here_N[:, None]).requires_grad_()
        found = masked(model, replace(clip, streams={**clip.streams, modality: replace(stream, x_BNC=x_BNC)}))
        for m in base:
            assert all(torch.equal(found[m][o], base[m][o]) for o in range(c))
            assert not torch.equal(found[m][c], base[m][c])
        before = sum(out.sum() for m in base for out in found[m][:c])
        after = sum(out.sum() for m in base for out in found[m][c:])
        (early,) = torch.autograd.grad(before, x_BNC, retain_graph=True)
        assert early[:, ~here_N].any()
        assert not early[:, here_N].any()
        (late,) = torch.autograd.grad(after, x_BNC)
        assert late[:, here_N].any()


@every_kind
def test_gradients_end_at_the_cache_unless_they_are_let_through(kind):
    """Detached, a chunk's loss does not reach the chunks before it; with the graph kept, all gradients are
    those of the masked forward."""
    clip = clip_of(kind, Chunks(2), 5)

    def leaves(clip: Clip) -> tuple[Clip, dict[str, Tensor]]:
        x = {m: s.x_BNC.clone().requires_grad_() for m, s in clip.streams.items()}
        streams = {m: replace(s, x_BNC=x[m]) for m, s in clip.streams.items()}
        return replace(clip, streams=streams), x

    def gradients(outputs: Outputs, model: nn.Module, x: dict[str, Tensor]) -> Tensor:
        loss = sum(out.square().mean() for chunks in outputs.values() for out in chunks)
        wanted = [*x.values(), *model.parameters()]
        found = torch.autograd.grad(loss, wanted, allow_unused=True)
        return torch.cat([torch.zeros(0), *(g.flatten() for g in found if g is not None)])

    model = build(kind)
    whole, x = leaves(clip)
    reference = gradients(masked(model, whole), model, x)
    whole, x = leaves(clip)
    found = written_through(model, whole, model.new_cache(), whole.visibility, detach=False)
    through = gradients(found, model, x)
    # LTX-2 turns queries and keys in float32.
    tolerance = 1e-8 if kind.startswith("ltx2") else 1e-12
    assert ((through - reference).abs().max() / reference.abs().max()).item() < tolerance

    whole, x = leaves(clip)
    found = written_through(model, whole, model.new_cache(), full)
    for modality, c in itertools.product(found, range(clip.chunks)):
        grads = torch.autograd.grad(
            found[modality][c].sum(), [x[m] for m in found], retain_graph=True, allow_unused=True
        )
        for m, grad in zip(found, grads, strict=True):
            assert grad is not None
            chunk_N = whole.streams[m].chunk_BN[0]
            assert grad[:, chunk_N == c].any()
            assert not grad[:, chunk_N != c].any()


@every_kind
def test_each_chunk_s_loss_can_be_walked_as_soon_as_it_is_there(kind):
    """Chunk after chunk, begin, forward, commit, backward; the words learn from all of them."""
    model, clip = build(kind), clip_of(kind, Chunks(2), 5)

    def learn(cache: KVCache, c: int) -> None:
        cache.begin(c)
        outs = model(clip.chunk(c), full, cache)
        cache.commit()
        sum(out.square().mean() for out in outs.values()).backward()

    def gradients() -> Tensor:
        found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        return found

    cache = model.new_cache()
    for c in range(clip.chunks):
        learn(cache, c)
    found = gradients()
    for c in range(clip.chunks):
        cache = model.new_cache()
        with torch.no_grad():
            written_through(model, replace(clip, chunks=c), cache, full)
        cache.drop("text")
        learn(cache, c)
    torch.testing.assert_close(found, gradients(), rtol=1e-9, atol=1e-12)


# --- positions ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoWords(Visibility):
    """Text is hidden from everyone but text."""

    def allows(self, q, k):
        return (q.modality_BN == TEXT) == (k.modality_BN == TEXT)


def late(clip: Clip, seconds: float, frames: int) -> Clip:
    """The clip, later in its stream."""

    def moved(s: Stream) -> Stream:
        if s.modality == "text":
            return s
        count = frames * (SOUNDS if s.modality == "audio" else 1)
        by = s.position_BN3.new_tensor([seconds, 0.0, 0.0])
        return replace(s, position_BN3=s.position_BN3 + by, cell_BN3=s.cell_BN3 + torch.tensor([count, 0, 0]))

    return replace(clip, streams={m: moved(s) for m, s in clip.streams.items()})


@every_kind
def test_a_chunk_stands_where_it_starts(kind):
    """A cache that begins late is the masked forward of a clip that begins late, and another than one that
    begins at 0 (where anything absolute is read): 6 of the list."""
    model, clip = build(kind), late(clip_of(kind, Chunks(2), 5), 3.5, 28)
    with torch.no_grad():
        found = written_through(model, clip, model.new_cache(), clip.visibility)
        assert off(found, masked(model, clip)) < 1e-12
        # No table to run out of, whatever the index.
        far = late(clip, 3600.0, 28800)
        found = written_through(model, far, model.new_cache(), far.visibility)
        assert off(found, masked(model, far)) < 1e-12


@pytest.mark.parametrize("sinks", [0, 1])
@every_kind
def test_relative_positions_are_absolute_ones_by_shift_invariance(kind, sinks):
    """Once the ring has turned the window stands where the stream began, which changes nothing as long as all
    distances are kept: without sinks, or before the first eviction. 6 of the list, float64."""
    rule = NoWords() if kind.startswith("joint") else full
    model, clip = build(kind), clip_of(kind, Chunks(1, window=3, sinks=sinks), 9)
    kept, turned = 3 + sinks, range(3 + sinks, 9)
    with torch.no_grad():
        absolute, relative = (
            written_through(model, clip, model.new_cache(window=3, sinks=sinks, positions=p), rule)
            for p in ("absolute", "relative")
        )
    if sinks:
        for modality, chunks in relative.items():
            assert off({modality: chunks[:kept]}, {modality: absolute[modality][:kept]}) < 1e-12
            assert all((chunks[c] - absolute[modality][c]).abs().max() > 1e-6 for c in turned)
    else:
        assert off(relative, absolute) < 1e-11
        relative_again = written_through(
            model, late(clip, 100.0, 800), model.new_cache(window=3, positions="relative"), rule
        )
        assert off(relative_again, absolute) < 1e-11


@every_kind
def test_a_relative_window_counts_on_from_the_sinks(kind):
    """With one layer, and streams apart, keys depend on nothing but their own token, so the last chunk is the
    last of a short clip: the sink, then the window, without a gap."""
    model, clip = build(kind, depth=1), clip_of(kind, Chunks(2, window=2, sinks=1), 12)
    apart = StreamsApart()
    cache = model.new_cache(window=2, sinks=1, positions="relative")
    with torch.no_grad():
        found = written_through(model, clip, cache, apart)
        # Chunks 1, 2 and 3 are gone: 6 frames, 0.75 seconds.
        earlier = late(clip, -0.75, -6)
        parts = [clip.chunk(0), earlier.chunk(4), earlier.chunk(5)]
        names = ("x_BNC", "level_BN", "position_BN3", "cell_BN3", "scene_BN", "chunk_BN", "context_BN")
        short = {"text": clip.streams["text"]}
        for modality in found:
            three = [part[modality] for part in parts]
            joined = {name: torch.cat([getattr(s, name) for s in three], dim=1) for name in names}
            grid = (sum(s.grid[0] for s in three), *three[0].grid[1:])
            short[modality] = replace(three[0], grid=grid, first_BN=None, **joined)
        reference = model(short, causal_chunks() & apart)
        gap = model(
            {**short, **{m: replace(short[m], **_where(clip, m)) for m in found}}, causal_chunks() & apart
        )
    for modality, out in reference.items():
        last = {modality: found[modality][-1:]}
        assert off(last, {modality: [out.chunk(3, dim=1)[2]]}) < 1e-11
        assert off(last, {modality: [gap[modality].chunk(3, dim=1)[2]]}) > 1e-4


def _where(clip: Clip, modality: str) -> dict[str, Tensor]:
    """Where the first and the last two chunks stand in the whole clip."""
    parts = [clip.chunk(c)[modality] for c in (0, 4, 5)]
    return {n: torch.cat([getattr(s, n) for s in parts], dim=1) for n in ("position_BN3", "cell_BN3")}


@dataclass(frozen=True)
class StreamsApart(Visibility):
    """Sound and picture do not hear of each other."""

    def allows(self, q, k):
        return (q.modality_BN == k.modality_BN) | (k.modality_BN == TEXT)


# --- noise levels, masks of one chunk -----------------------------------------------------------------------


@every_kind
def test_equal_levels_are_one_level_and_one_chunk_is_bidirectional(kind):
    """7 of the list."""
    model, clip = build(kind), clip_of(kind, Chunks(2), 6)
    sigma_B1 = torch.rand(2, 1, generator=torch_generator("one level"), dtype=torch.float64)
    many = {m: replace(s, sigma_BK=sigma_B1.expand_as(s.sigma_BK)) for m, s in clip.streams.items()}
    one = {m: replace(s, sigma_BK=sigma_B1, level_BN=torch.zeros_like(s.level_BN)) for m, s in many.items()}
    with torch.no_grad():
        a, b = (masked(model, replace(clip, streams=streams)) for streams in (many, one))
        assert off(a, b) < 1e-12
        whole = clip_of(kind, Chunks(6), 6)
        causal, bidirectional = (model(whole.streams, rule) for rule in (whole.visibility, AllButWords()))
    for modality, out in causal.items():
        torch.testing.assert_close(out, bidirectional[modality], rtol=0, atol=1e-12)


@dataclass(frozen=True)
class AllButWords(Visibility):
    """Everyone sees everyone, and words see words."""

    def allows(self, q, k):
        return (q.modality_BN != TEXT) | (k.modality_BN == TEXT)


# --- batches and prompts ------------------------------------------------------------------------------------


@every_kind
def test_a_batch_is_its_samples(kind):
    """8 of the list; the captions are padded differently."""
    plan, frames = PLANS["window and sink"]
    model, clip = build(kind), clip_of(kind, plan, frames)

    def sample(b: int) -> Clip:
        def row(s: Stream) -> Stream:
            rows = {n: t[b : b + 1] for n, t in vars(s).items() if isinstance(t, Tensor) and len(t) == 2}
            return replace(s, **rows)

        return replace(clip, streams={m: row(s) for m, s in clip.streams.items()})

    with torch.no_grad():
        both = written_through(model, clip, model.new_cache(**ring(plan)), full)
        for b in range(2):
            alone = written_through(model, sample(b), model.new_cache(**ring(plan)), full)
            assert off(alone, {m: [out[b : b + 1] for out in chunks] for m, chunks in both.items()}) < 1e-12


@every_kind
def test_a_new_prompt_needs_new_words_and_a_new_past(kind):
    """8 of the list: the old words stay until they are dropped, and the past speaks of them until it is made
    anew. Where noise modulates the words (LTX-2.3) they are not held, and the past is all that is old."""
    model, clip = build(kind), clip_of(kind, Chunks(1), 4)
    other = replace(
        clip.streams["text"], x_BNC=draw(torch.float64, 2, WORDS, KINDS[kind].text_dim, key="new")
    )
    told = replace(clip, streams={**clip.streams, "text": other})

    def last(cache: KVCache, clip: Clip) -> Outputs:
        cache.begin(3)
        return {m: [out] for m, out in model(clip.chunk(3), full, cache).items()}

    def past(cache: KVCache, clip: Clip) -> KVCache:
        for c in range(3):
            cache.begin(c)
            model(clip.chunk(c), full, cache)
            cache.commit()
        return cache

    with torch.no_grad():
        cache = past(model.new_cache(), clip)
        old = last(cache, clip)
        assert ("text" in cache) == (kind != "ltx2.3")
        assert ("text" in cache) == (off(last(cache, told), old) == 0.0)
        fresh = last(past(model.new_cache(), told), told)
        cache.drop("text")
        half = last(cache, told)
        assert off(half, old) > 1e-3
        assert off(half, fresh) > 1e-3
        assert off(last(past(cache, told), told), fresh) == 0.0


@pytest.mark.parametrize("kind", ["joint", "joint with sound", "wan", "ltx2"])
def test_new_words_are_the_old_ones_until_these_are_dropped(kind):
    """Which of them are padding included; other words in number are refused."""
    model, clip = build(kind), clip_of(kind, Chunks(2), 4)
    text, chunk, cache = clip.streams["text"], clip.chunk(0), model.new_cache()
    assert text.valid_BN is not None
    assert not text.valid_BN.all()
    cut = {n: t[:, 1:] for n, t in vars(text).items() if isinstance(t, Tensor) and t.shape[1] == WORDS}
    fewer = replace(text, grid=(1, 1, WORDS - 1), **cut)
    unpadded = replace(text, x_BNC=text.x_BNC + 1, valid_BN=torch.ones_like(text.valid_BN))
    with torch.no_grad():
        cache.begin(0)
        old = model(chunk, full, cache)
        for modality, out in model({**chunk, "text": unpadded}, full, cache).items():
            assert torch.equal(out, old[modality])
        with pytest.raises(AssertionError, match="4 tokens of text are held and 3 given"):
            model({**chunk, "text": fewer}, full, cache)
        for words in (unpadded, fewer):
            cache.drop("text")
            for modality, out in model({**chunk, "text": words}, full, cache).items():
                assert off({modality: [out]}, {modality: [old[modality]]}) > 1e-3


# --- the cache itself ---------------------------------------------------------------------------------------


def test_a_chunk_whose_past_was_evicted_is_refused():
    """It would be made without what it once saw; a snapshot has it."""
    cache, states = KVCache(1, window=2, sinks=1), []

    def write(c: int) -> None:
        cache.begin(c)
        cache.offer("video", {"scene": torch.zeros(1, 3)}, [(torch.ones(1, 3, 1, 2),) * 2])
        cache.commit()

    for c in range(5):
        states.append(cache.snapshot())
        write(c)
    for c, gone in ((3, 2), (2, 1)):
        with pytest.raises(AssertionError, match=f"chunk {c} sees chunk {gone}, which was evicted"):
            cache.begin(c)
    cache.begin(4)
    assert cache.chunks("video") == [0, 3]
    cache.restore(states[3])
    cache.begin(3)
    assert cache.chunks("video") == [0, 2]
    # Chunk 1 sees the sink alone, and once it is there chunk 2 has all that it sees.
    for c in (1, 2):
        write(c)
        assert cache.chunks("video") == [0, 1][:c]


@every_kind
def test_going_back_to_a_snapshot_undoes_everything(kind):
    plan = Chunks(1, window=2, sinks=1)
    model, clip = build(kind), clip_of(kind, plan, 6)
    cache = model.new_cache(window=2, sinks=1, positions="relative")
    with torch.no_grad():
        first = written_through(model, replace(clip, chunks=4), cache, full)
        snapshot, bytes_then = cache.snapshot(), cache.memory()
        held = {t.data_ptr() for e in cache._held["video"].values() for k, v in e.pairs for t in (k, v)}

        def on() -> Outputs:
            found: Outputs = {}
            for c in (4, 5):
                cache.begin(c)
                for modality, out in model(clip.chunk(c), full, cache).items():
                    found.setdefault(modality, []).append(out)
                cache.commit()
            return found

        ahead = on()
        for _ in range(2):
            cache.restore(snapshot)
            assert cache.memory() <= bytes_then
            now = {t.data_ptr() for e in cache._held["video"].values() for k, v in e.pairs for t in (k, v)}
            assert now == held, "a snapshot shares its tensors"
            assert off(on(), ahead) == 0.0
    assert len(first["video"]) == 4


@every_kind
def test_a_ring_stops_growing_and_lean_is_smaller(kind):
    plan = Chunks(1, window=3, sinks=1)
    model, clip = build(kind, torch.float32), clip_of(kind, plan, 10, torch.float32)
    sizes = {}
    with torch.no_grad():
        for lean in (False, True):
            cache, sizes[lean] = model.new_cache(**ring(plan, lean=lean)), []
            for c in range(clip.chunks):
                cache.begin(c)
                model(clip.chunk(c), full, cache)
                cache.commit()
                sizes[lean].append(cache.memory())
    assert len(set(sizes[True][4:])) == 1 < len(set(sizes[True][:4]))
    cache.begin(clip.chunks)
    model(clip.chunk(clip.chunks - 1), full, cache)
    assert len({*sizes[False][4:]}) == 1


def test_what_is_held_is_two_numbers_a_channel_and_no_more():
    """Keys and values alone: not the projection that they are views of."""
    model, clip = build("joint", torch.float32), clip_of("joint", Chunks(1), 3, torch.float32)
    with torch.no_grad():
        cache = model.new_cache(lean=True)
        written_through(model, clip, cache, full)
    tokens = 3 * ROWS * COLUMNS + WORDS
    assert cache.memory() == 2 * 4 * 2 * 24 * 2 * tokens  # pairs, bytes, layers, width, batch


def test_a_lean_cache_makes_a_layer_s_past_when_it_is_asked_for():
    for lean, asked, again in ((True, 0, 4), (False, 2, 2)):
        cache, turned = KVCache(2, lean=lean), []

        def turn(modality: str, k: Tensor, turned: list[str] = turned) -> Tensor:
            turned.append(modality)
            return k

        cache.hold("text", {"scene": torch.zeros(1, 3)}, [(torch.ones(1, 3, 1, 2),) * 2] * 2)
        past = cache.past(("text",), turn)
        assert len(turned) == asked
        assert [k.shape for k, _ in past] == [(1, 3, 1, 2)] * 2
        list(cache.past(("text",), turn))
        assert len(turned) == again


def test_a_cache_that_was_offered_nothing_has_nothing_to_commit():
    cache = KVCache(2)
    cache.begin(0)
    with pytest.raises(AssertionError, match="nothing to commit"):
        cache.commit()


@every_kind
def test_bf16_autocast_follows_the_masked_forward(kind):
    plan, frames = PLANS["window and sink"]
    model, clip = build(kind, torch.float32), clip_of(kind, plan, frames, torch.float32)
    with torch.no_grad():
        exact = masked(model, clip)
        with torch.autocast("cpu", torch.bfloat16):
            found = written_through(model, clip, model.new_cache(**ring(plan)), full)
    for modality, chunks in exact.items():
        a, b = torch.cat(found[modality], dim=1), torch.cat(chunks, dim=1)
        assert 1e-6 < ((a - b).norm() / b.norm()).item() < 0.05


@pytest.mark.parametrize("kind", ["joint", "joint with sound", "wan", "ltx2"])
def test_blocks_with_a_past_compile_whole(kind):
    """No graph break, and no graph for every new length of the past."""
    model = build(kind, torch.float32, depth=1)
    clip = clip_of(kind, Chunks(1), 6, torch.float32)
    counter, graphs = torch._dynamo.testing.CompileCounter(), []
    cache = model.new_cache()
    with torch.no_grad():
        reference = written_through(model, clip, model.new_cache(), full)
        torch._dynamo.reset()
        for block in model.blocks():
            block.compile(backend=counter, fullgraph=True)
        for c in range(clip.chunks):
            cache.begin(c)
            for modality, out in model(clip.chunk(c), full, cache).items():
                assert off({modality: [out]}, {modality: [reference[modality][c]]}) < 1e-5
            cache.commit()
            graphs.append(counter.frame_count)
    torch._dynamo.reset()
    # Without a past, with one, with one of any length; joint runs its words alone.
    assert graphs[2:] == [graphs[2]] * 4
    assert graphs[2] <= (4 if kind.startswith("joint") else 3)


# --- rollout ------------------------------------------------------------------------------------------------


class WithoutCache(nn.Module):
    """A backbone that does not say that it has a cache."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.patch, self.tokens = backbone, backbone.patch, []
        self.modalities = backbone.modalities

    def forward(self, streams: Streams, visibility: Visibility) -> dict[str, Tensor]:
        self.tokens.append(streams["video"].x_BNC.shape[1])
        return self.backbone(streams, visibility)

    def blocks(self) -> list[nn.Module]:
        return self.backbone.blocks()


class WithCache(WithoutCache):
    """The same, and it does."""

    def forward(self, streams, visibility, cache=None):
        self.tokens.append(streams["video"].x_BNC.shape[1])
        return self.backbone(streams, visibility, cache)

    def new_cache(self, **options):
        return self.backbone.new_cache(**options)


@pytest.mark.parametrize("given", [False, True], ids=["made", "given"])
@pytest.mark.parametrize("first_alone", [False, True])
def test_a_stage_is_a_part_of_the_clip(first_alone, given):
    """Where its tokens stand, which scene and chunk they are of, and which frames begin a scene."""
    plan, text = Chunks(2, first_alone=first_alone), caption("joint", torch.float32)
    whole = replace(geometry(7), scene_BF=torch.tensor([[0, 0, 0, 1, 1, 2, 2]]))
    given_BF = torch.zeros(2, 7, dtype=torch.bool)
    given_BF[0, 2] = given
    x = draw(torch.float32, 2, 7, ROWS * COLUMNS, 4, key="x")
    clean, level = torch.zeros_like(x), torch.full((2, 8), 0.7)

    def fed(layout: Layout, frames: slice) -> Stream:
        sigma_BK = levels_of(layout, level)
        streams = sampled(layout, clean[:, frames], x[:, frames], sigma_BK, text)
        assert not streams["text"].sigma_BN.any()
        return streams["video"]

    everything = fed(lay(plan, whole, text, given_BF), slice(None))
    for frames in stages(plan, whole):
        part, cells = whole.part(frames), whole.cells
        what = frames_given(whole, given_BF).part({"video": slice(frames.start * cells, frames.stop * cells)})
        stage = fed(plan.stage_layout(Sample({"video": part}), what), frames)
        cells = slice(frames.start * ROWS * COLUMNS, frames.stop * ROWS * COLUMNS)
        for name, t in vars(stage.attributes).items():
            assert torch.equal(t, getattr(everything.attributes, name)[:, cells]), name
        for name in ("x_BNC", "position_BN3", "sigma_BN"):
            assert torch.equal(getattr(stage, name), getattr(everything, name)[:, cells]), name


@pytest.mark.parametrize(
    "plan",
    [
        Chunks(2, forcing="teacher"),
        Chunks(2, first_alone=True),
        Chunks(1, window=2, sinks=1),
        Chunks(1, window=2, sinks=1, forcing="teacher"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("given", [False, True], ids=["made", "given"])
@pytest.mark.parametrize("kind", ["joint", "wan", "ltx2"])
def test_a_rollout_from_the_cache_is_the_masked_rollout(kind, plan, given):
    dtype, frames = torch.float64, 5
    geo, text = geometry(frames), caption(kind, dtype)
    shape = (2, frames, ROWS * COLUMNS, KINDS[kind].channels)
    clean = draw(dtype, *shape, key="given")
    given_BF = torch.tensor([[True, True, True, False, False], [True, False, True, False, False]]) & given
    task = Task(
        Sample({"video": geo}),
        text,
        {"video": draw(dtype, *shape, key="noise")},
        negative=caption(kind, dtype, key="negative"),
        given=frames_given(geo, given_BF),
        values=Values({"video": clean}),
    )
    model = build(kind)
    clips, tokens = [], []
    for wrap in (WithoutCache, WithCache):
        backbone = wrap(model)
        out = rollout(
            Predictor(backbone),
            plan,
            task,
            Sampling("heun", 2, guidance=Guidance(3.0, rescale=0.7, interval=(0.2, 1.0))),
        )
        clips.append(out["video"])
        tokens.append(set(backbone.tokens))
    assert isinstance(backbone, CachingBackbone)
    assert ((clips[0] - clips[1]).abs().max() / clips[0].abs().max()).item() < 1e-12
    assert torch.equal(clips[1][given_BF], clean[given_BF])
    everything = ROWS * COLUMNS * frames * (2 if plan.forcing == "teacher" else 1)
    assert tokens[0] == {everything}
    assert tokens[1] == {ROWS * COLUMNS * (s.stop - s.start) for s in stages(plan, geo)}


@pytest.mark.parametrize("solver", ["ddim", "consistency"])
def test_stochastic_solvers_draw_the_same_with_and_without_a_cache(solver):
    geo, plan, model = geometry(5), Chunks(2), build("joint")
    noise = draw(torch.float64, 2, 5, ROWS * COLUMNS, KINDS["joint"].channels, key="noise")
    task, sampling = (
        Task(Sample({"video": geo}), caption("joint", torch.float64), {"video": noise}),
        Sampling(solver, 3, eta=1.0),
    )
    masked, cached, other = (
        rollout(Predictor(wrap(model)), plan, task, sampling, generator=torch_generator("draws", key))
        for wrap, key in ((WithoutCache, 0), (WithCache, 0), (WithCache, 1))
    )
    masked, cached, other = (made["video"] for made in (masked, cached, other))
    assert ((masked - cached).abs().max() / cached.abs().max()).item() < 1e-12
    assert (other - cached).abs().max() > 1e-3


def test_a_backbone_without_a_cache_runs_under_the_mask():
    config = ModelConfig(type="factorized", dim=24, depth=2, num_heads=2, window_size=2)
    factorized = build_backbone(config, 4, 5)
    assert not isinstance(factorized, CachingBackbone)
    assert isinstance(build("joint"), CachingBackbone)
    backbone: Backbone = WithoutCache(factorized)
    noise = draw(torch.float32, 2, 4, ROWS * COLUMNS, 4, key="noise")
    task = Task(Sample({"video": geometry(4)}), caption("joint", torch.float32), {"video": noise})
    rollout(Predictor(backbone), Chunks(2), task, Sampling(steps=2))
    assert backbone.tokens == [4 * ROWS * COLUMNS] * 4
