"""What differs from block to block, and what stands beside the clip: rules by layer, skipped self-attention,
jumps, references and captions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

from motionloom.backbones import build_backbone
from motionloom.backbones.base import Perturbation
from motionloom.backbones.cogvideox import PRESETS as COGVIDEOX_PRESETS
from motionloom.backbones.cogvideox import CogVideoX
from motionloom.backbones.lightning import Lightning, LightningSizes
from motionloom.backbones.ltx2 import LTX2
from motionloom.backbones.ltx2 import PRESETS as LTX2_PRESETS
from motionloom.backbones.wan import PRESETS as WAN_PRESETS
from motionloom.backbones.wan import Wan
from motionloom.config.recipe import ModelConfig
from motionloom.errors import UserError
from motionloom.plans.lower import per_block
from motionloom.plans.packing import pack
from motionloom.plans.past import places
from motionloom.plans.stream import MODALITIES, Attributes, Stream, Streams, join_attributes
from motionloom.plans.visibility import (
    GLOBAL,
    TEXT,
    InLayers,
    Timeless,
    Visibility,
    causal_chunks,
    cinetrans,
    dense_mask,
    full,
    reference_captions,
    same_scene,
    same_scene_or_both_video,
    scene_summaries,
    separate_references,
)
from motionloom.rng import torch_generator

ROWS, COLUMNS, WORDS, SOUNDS, FPS, BATCH = 4, 6, 3, 2, 8.0, 2
"""Cells of a frame, words of a caption, audio tokens of a frame, frames of a second, samples."""


@dataclass(frozen=True)
class Kind:
    """A backbone, tiny."""

    make: Callable[[int], nn.Module]
    """From its depth."""
    channels: int
    """Numbers of a video token."""
    text_dim: int
    audio_channels: int = 0


def _factorized(depth: int) -> nn.Module:
    config = ModelConfig(type="factorized", dim=24, depth=depth, num_heads=2, window_size=2, mlp_ratio=2.0)
    return build_backbone(config, 4, 5)


_WAN, _LTX2 = WAN_PRESETS["tiny"], LTX2_PRESETS["tiny2.3"]
_COG = COGVIDEOX_PRESETS["tiny"]
_SINCOS = replace(_COG, use_rotary_positional_embeddings=False)
_LEARNED = replace(_COG, in_channels=32, use_learned_positional_embeddings=True)
_LIGHTNING = LightningSizes(2, 12, in_channels=4, text_dim=5, condition="text")
KINDS = {
    "factorized": Kind(_factorized, 4, 5),
    "wan": Kind(lambda depth: Wan(replace(_WAN, num_layers=depth)), 4 * _WAN.out_channels, _WAN.text_dim),
    "cogvideox": Kind(
        lambda depth: CogVideoX(replace(_COG, num_layers=depth)), 4 * _COG.out_channels, _COG.text_embed_dim
    ),
    "cogvideox sincos": Kind(
        lambda depth: CogVideoX(replace(_SINCOS, num_layers=depth)),
        4 * _COG.out_channels,
        _COG.text_embed_dim,
    ),
    "ltx2": Kind(
        lambda depth: LTX2(replace(_LTX2, num_layers=depth)),
        _LTX2.in_channels,
        sum(_LTX2.text_channels),
        _LTX2.audio_in_channels,
    ),
    "lightning": Kind(lambda depth: Lightning(replace(_LIGHTNING, num_layers=depth)), 4, 5),
    "lightning classes": Kind(
        lambda depth: Lightning(replace(_LIGHTNING, num_layers=depth, qk_norm=True, condition="class")), 4, 5
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_index = pytest.mark.parametrize("kind", ["wan", "cogvideox", "cogvideox sincos"])
"""The backbones that read cells."""


def build(kind: str, depth: int = 2) -> nn.Module:
    """With values where training starts from zero, so that everything matters; float64."""
    model = KINDS[kind].make(depth).eval()
    generator = torch_generator("layers")
    model.init_weights(generator)
    for parameter in model.parameters():
        if parameter.std() < 0.05 or not parameter.any():
            nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.double()


def draw(*shape: int, key: str) -> Tensor:
    return torch.randn(shape, generator=torch_generator("layers", key, *shape), dtype=torch.float64)


def stream(modality: str, channels: int, cell_BN3: Tensor, scene_BN: Tensor, **fields: object) -> Stream:
    """Tokens at their cells, at the first of two noise levels, but for what ``fields`` say."""
    nothing = torch.zeros_like(scene_BN)
    unit = torch.tensor([1 / FPS, 8.0, 8.0])
    return Stream(
        modality=modality,
        **{
            "grid": (1, 1, cell_BN3.shape[1]),
            "x_BNC": draw(BATCH, cell_BN3.shape[1], channels, key=modality),
            "sigma_BK": torch.tensor([[0.7, 0.0], [0.3, 0.0]], dtype=torch.float64),
            "level_BN": nothing,
            "position_BN3": cell_BN3 * unit,
            "cell_BN3": cell_BN3,
            "scene_BN": scene_BN,
            "chunk_BN": nothing,
            "context_BN": nothing.bool(),
            "loss_BN": nothing.double(),
            **fields,
        },
    )


def cells(frames: int, rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    return torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(columns))[None]


def clip(kind: str, scenes: tuple[int, ...] = (2, 2), whole: int = 0) -> dict[str, Stream]:
    """Scenes of so many frames, each its own chunk, with a caption each; ``whole``: words about all of it."""
    known, frames = KINDS[kind], sum(scenes)
    scene_F = torch.arange(len(scenes)).repeat_interleave(torch.tensor(scenes))
    first_F = torch.cat([torch.ones(1, dtype=torch.bool), scene_F.diff() > 0])
    side = ROWS * COLUMNS
    scene_L = torch.cat([torch.full((whole,), GLOBAL), torch.arange(len(scenes)).repeat_interleave(WORDS)])
    words = len(scene_L)
    streams = {
        "text": stream("text", known.text_dim, torch.zeros(1, words, 3).long(), scene_L[None]),
        "video": stream(
            "video",
            known.channels,
            cells(frames),
            scene_F.repeat_interleave(side)[None],
            grid=(frames, ROWS, COLUMNS),
            chunk_BN=scene_F.repeat_interleave(side)[None],
            first_BN=first_F.repeat_interleave(side)[None],
        ),
    }
    if known.audio_channels:
        scene_A = scene_F.repeat_interleave(SOUNDS)[None]
        streams["audio"] = stream(
            "audio",
            known.audio_channels,
            cells(frames * SOUNDS, 1, 1),
            scene_A,
            grid=(frames * SOUNDS, 1, 1),
            chunk_BN=scene_A,
            position_BN3=cells(frames * SOUNDS, 1, 1) / (FPS * SOUNDS),
            first_BN=first_F.repeat_interleave(SOUNDS)[None],
        )
    return streams


PER_TOKEN = ("x_BNC", "level_BN", "position_BN3", "cell_BN3", "scene_BN", "chunk_BN", "context_BN", "loss_BN")


def beside(front: Stream, behind: Stream) -> Stream:
    """Two streams of one modality, end to end."""
    names = (*PER_TOKEN, "first_BN")
    joined = {name: torch.cat([getattr(s, name) for s in (front, behind)], dim=1) for name in names}
    return replace(behind, grid=(1, 1, joined["cell_BN3"].shape[1]), **joined)


def with_reference(kind: str, rows: int, columns: int, scene: int = 0, frames: int = 1) -> dict[str, Stream]:
    """A clip with a clean reference of so many cells in front."""
    streams, cell = clip(kind), cells(frames, rows, columns)
    marked = torch.full(cell.shape[:2], scene)
    reference = stream(
        "video",
        KINDS[kind].channels,
        cell,
        marked,
        level_BN=torch.ones_like(marked),
        context_BN=torch.ones_like(marked).bool(),
        chunk_BN=torch.full_like(marked, -1),
        first_BN=cell[..., 0] == 0,
    )
    video = beside(reference, streams["video"])
    if (rows, columns) == (ROWS, COLUMNS):
        video = replace(video, grid=(frames + streams["video"].grid[0], rows, columns))
    return {**streams, "video": video}


def part(s: Stream, keep_N: Tensor) -> Stream:
    """Some tokens, in their order."""
    names = [n for n in (*PER_TOKEN, "first_BN", "valid_BN", "jump_BN") if getattr(s, n) is not None]
    tokens = int(keep_N.sum())
    side = s.grid[1] * s.grid[2]
    grid = (tokens // side, *s.grid[1:]) if s.grid[0] > 1 else (1, 1, tokens)
    return replace(s, grid=grid, **{name: getattr(s, name)[:, keep_N] for name in names})


def off(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference, relative to the largest value."""
    assert found.keys() == wanted.keys()
    return max(((found[m] - w).abs().max() / w.abs().max()).item() for m, w in wanted.items())


# --- rules by layer -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Itself(Timeless):
    """Each token of video and sound sees itself, and nothing else of its own modality. ``words``: nor words,
    which still see everything: for backbones with one attention for all."""

    words: bool

    def allows(self, q: Attributes, k: Attributes) -> Tensor:
        other = q.modality_BN != k.modality_BN
        same = (q.cell_BN3 == k.cell_BN3).all(-1) & ~other
        return same | (q.modality_BN == TEXT) | (other & (not self.words))

    @property
    def whole_frames(self) -> bool:
        return False


@every_kind
def test_each_block_goes_by_its_own_rule(kind):
    """The second block fed with what the first makes under another rule: put together by hand."""
    model, streams = build(kind), clip(kind)
    second = model.blocks()[1]
    seen = []
    with torch.no_grad():
        handle = second.register_forward_pre_hook(lambda module, args: seen.append(args))
        found = model(streams, InLayers(same_scene, full, first=1, last=1))
        plain = model(streams, full)
        handle.remove()
        x = seen[1][0]
        handle = second.register_forward_pre_hook(lambda module, args: (x, *args[1:]))
        wanted = model(streams, same_scene)
        handle.remove()
    assert off(found, wanted) == 0
    assert off(found, plain) > 1e-3


def test_each_distinct_rule_is_made_once():
    made: list[Visibility] = []

    def make(rule: Visibility) -> object:
        made.append(rule)
        return object()

    given = per_block(cinetrans & separate_references, 30, make)
    assert made == [cinetrans.outside & separate_references, cinetrans.inside & separate_references]
    inside = [i for i, one in enumerate(given) if one is given[15]]
    assert inside == list(range(7, 29))
    assert len(set(map(id, given))) == 2
    made.clear()
    per_block(same_scene_or_both_video, 30, make)
    assert made == [same_scene_or_both_video]


@pytest.mark.parametrize(
    "first, last, count, inside",
    [(7 / 30, 28 / 30, 6, [2, 3, 4, 5]), (1, 2, 4, [1, 2]), (0.0, 1.0, 3, [0, 1, 2]), (0, 0, 3, [0])],
)
def test_layers_by_index_and_by_fraction(first, last, count, inside):
    rule = InLayers(same_scene, full, first, last)
    assert [i for i in range(count) if rule.in_layer(i, count) == same_scene] == inside
    nested = (rule | causal_chunks()) & full
    assert nested.in_layer(inside[0], count) == (same_scene | causal_chunks()) & full


# --- skipped self-attention ---------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("skip", [(0,), (1,), (0, 1)])
def test_a_skipped_block_is_one_in_which_each_token_sees_itself(kind, skip):
    model, streams = build(kind), clip(kind, whole=2)
    itself = Itself(words="cogvideox" in kind)
    with torch.no_grad():
        found = model(streams, full, perturb=Perturbation(skip_self=skip))
        wanted = model(streams, InLayers(itself, full, first=skip[0], last=skip[-1]))
        plain = model(streams, full)
        assert off(model(streams, full, perturb=Perturbation()), plain) == 0
    assert off(found, wanted) < 1e-10
    assert off(found, plain) > 1e-3


@pytest.mark.parametrize("kind", ["factorized", "wan", "cogvideox", "ltx2", "lightning"])
def test_all_blocks_still_compile_whole(kind):
    model, streams = build(kind, depth=4), clip(kind)
    rule, skip = InLayers(same_scene, full, first=2, last=3), Perturbation(skip_self=(1,))
    counter = torch._dynamo.testing.CompileCounter()
    with torch.no_grad():
        wanted = model(streams, rule, perturb=skip)
        torch._dynamo.reset()
        for block in model.blocks():
            block.compile(backend=counter, fullgraph=True)
        assert off(model(streams, rule, perturb=skip), wanted) < 1e-10
        # All see all, all but themselves, and a scene; factorized has shifted windows of each but the last.
        graphs = counter.frame_count
        assert graphs <= (4 if kind == "factorized" else 3)
        model(streams, rule, perturb=skip)
    torch._dynamo.reset()
    assert counter.frame_count == graphs


# --- from a cache -------------------------------------------------------------------------------------------


def chunked(model: nn.Module, streams: Streams, rule: Visibility, **options) -> dict[str, Tensor]:
    """Chunk by chunk from a cache, written as the chunks went in."""
    cache, answers = model.new_cache(), []
    for c in range(int(streams["video"].chunk_BN.max()) + 1):
        cache.begin(c)
        chunk = {m: s if m == "text" else part(s, s.chunk_BN[0] == c) for m, s in streams.items()}
        answers.append(model(chunk, rule, cache, **options))
        cache.commit()
    return {m: torch.cat([answer[m] for answer in answers], dim=1) for m in answers[0]}


@pytest.mark.parametrize("kind", ["wan", "ltx2"])
@pytest.mark.parametrize("skip", [(), (1,)])
def test_a_cache_follows_the_masked_forward(kind, skip):
    """Rules by layer, a skipped block and jumps."""
    model, streams = build(kind), clip(kind, (2, 1, 2))
    streams["text"] = replace(streams["text"], sigma_BK=torch.zeros(BATCH, 2).double())
    streams["video"] = replace(streams["video"], jump_BN=streams["video"].scene_BN * 1.5)
    rule = InLayers(causal_chunks(window=1), causal_chunks(), first=0, last=0)
    with torch.no_grad():
        wanted = model(streams, rule, perturb=Perturbation(skip_self=skip))
        found = chunked(model, streams, rule, perturb=Perturbation(skip_self=skip))
        elsewhere = model(streams, causal_chunks(), perturb=Perturbation(skip_self=skip))
    assert off(found, wanted) < 1e-10
    assert off(wanted, elsewhere) > 1e-4


# --- jumps --------------------------------------------------------------------------------------------------


def later(streams: Streams, frames: float, scene: int, by_cell: bool = False) -> Streams:
    """One scene of the video later by so many frames: by a jump, or standing in other cells."""
    video = streams["video"]
    by_BN = (video.scene_BN == scene) * frames
    if not by_cell:
        return {**streams, "video": replace(video, jump_BN=by_BN.float())}
    cell = video.cell_BN3 + torch.tensor([1, 0, 0]) * by_BN.long()[..., None]
    return {**streams, "video": replace(video, cell_BN3=cell)}


@every_index
def test_a_jump_of_whole_frames_is_a_later_cell(kind):
    model, streams = build(kind), clip(kind)
    with torch.no_grad():
        found = model(later(streams, 3.0, scene=1), full)
        assert off(found, model(later(streams, 3, scene=1, by_cell=True), full)) < 1e-12
        assert off(found, model(later(streams, 0.0, scene=1), full)) > 1e-4
        assert off(model(later(streams, 0.0, scene=1), full), model(streams, full)) == 0


def test_jumps_may_be_parts_of_frames():
    """Wan turns by differences: one scene half a frame later is the other half a frame earlier."""
    model, streams = build("wan"), clip("wan")
    with torch.no_grad():
        found = model(later(streams, 0.5, scene=1), full)
        assert off(found, model(later(streams, -0.5, scene=0), full)) < 1e-10
        for whole in (0.0, 1.0):
            assert off(found, model(later(streams, whole, scene=1), full)) > 1e-4


@pytest.mark.parametrize("positions", ["absolute", "relative"])
def test_a_window_that_is_re_based_keeps_its_jumps(positions):
    """As Wan turns by differences, nothing changes."""
    model, streams = build("wan"), clip("wan", (1, 1, 1))
    streams["video"] = replace(streams["video"], jump_BN=streams["video"].scene_BN * 1.5)
    wanted = model(streams, causal_chunks(window=2))["video"][:, -ROWS * COLUMNS :]
    cache = model.new_cache(window=2, positions=positions)
    for c in range(3):
        cache.begin(c)
        chunk = {m: s if m == "text" else part(s, s.chunk_BN[0] == c) for m, s in streams.items()}
        found = model(chunk, causal_chunks(window=2), cache)
        cache.commit()
    # What chunk 1 had seen of chunk 0 is in the cache either way.
    assert off(found, {"video": wanted}) < 1e-10
    before, here = places(chunk["video"], cache)
    assert before is not None
    stands = [place.index_BN3[0, 0, 0].item() for place in (before, here)]
    assert stands == ([2.5, 5.0] if positions == "absolute" else [0.0, 2.5])


def test_learned_positions_have_no_place_for_some_tokens():
    model = CogVideoX(replace(_LEARNED, num_layers=1))
    model.init_weights(torch_generator("learned"))
    streams = {m: replace(s, x_BNC=s.x_BNC.float()) for m, s in clip("cogvideox").items()}
    video = streams["video"]
    image = torch.zeros(BATCH, video.x_BNC.shape[1], 4 * _LEARNED.extra_channels)
    streams["video"] = replace(video, extra_BNC=image)
    assert model(later(streams, -2.0, scene=1), full)["video"].isfinite().all()
    for frames, told in ((-0.5, "between two frames"), (99.0, "is given 103 x"), (-3.0, "before the first")):
        with pytest.raises(UserError, match=told) as error:
            model(later(streams, frames, scene=1), full)
        assert "\n" not in str(error.value)


def test_packed_samples_keep_their_jumps():
    model = build("wan")
    samples = [
        {m: replace(s, x_BNC=s.x_BNC[:1], sigma_BK=s.sigma_BK[:1]) for m, s in streams.items()}
        for streams in (later(clip("wan"), 1.5, scene=1), clip("wan", (1, 2)))
    ]
    packed = pack(samples, full)
    with torch.no_grad():
        together = packed.unpack(model(packed.streams, packed.visibility))
        for streams, found in zip(samples, together, strict=True):
            assert off(found, model(streams, full)) < 1e-10


# --- references ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoContext(Timeless):
    """Nobody sees context but itself."""

    def allows(self, q: Attributes, k: Attributes) -> Tensor:
        return ~k.context_BN | q.context_BN


def target_of(streams: Streams, out: dict[str, Tensor]) -> dict[str, Tensor]:
    """The answer for what is no context."""
    return {m: t[:, ~streams[m].context_BN[0]] for m, t in out.items()}


@every_kind
@pytest.mark.parametrize("rows, columns", [(ROWS, COLUMNS), (2, 3), (6, 8)])
def test_a_reference_that_nobody_sees_changes_nothing(kind, rows, columns):
    """Of the clip's size, smaller and larger: the clip stands where it stands without."""
    if kind == "factorized" and rows != ROWS:
        return
    model, streams = build(kind), with_reference(kind, rows, columns)
    with torch.no_grad():
        wanted = model(clip(kind), full)
        assert off(target_of(streams, model(streams, NoContext())), wanted) < 1e-10
        assert off(target_of(streams, model(streams, full)), wanted) > 1e-4


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"factorized"}))
def test_references_are_read_token_by_token(kind):
    """Neither their order nor a grid that they do not have matters; where they stand does."""
    model, streams = build(kind), with_reference(kind, 2, 3)
    video = streams["video"]
    order = torch.cat([torch.tensor([3, 0, 5, 1, 4, 2]), torch.arange(6, video.x_BNC.shape[1])])
    names = (*PER_TOKEN, "first_BN")
    mixed = replace(video, **{name: getattr(video, name)[:, order] for name in names})
    reference = video.context_BN[..., None]
    moved = replace(
        video,
        cell_BN3=torch.where(reference, video.cell_BN3 * 2, video.cell_BN3),
        position_BN3=torch.where(reference, video.position_BN3 * 2, video.position_BN3),
    )
    with torch.no_grad():
        wanted = target_of(streams, model(streams, full))
        assert off(target_of(streams, model({**streams, "video": mixed}, full)), wanted) < 1e-10
        assert off(target_of(streams, model({**streams, "video": moved}, full)), wanted) > 1e-5


@every_kind
def test_a_sample_may_lack_its_reference(kind):
    """Its answer is that of the clip alone, the other sample's that with the reference."""
    model, streams = build(kind), with_reference(kind, ROWS, COLUMNS)
    video = streams["video"]
    lacking = video.context_BN & torch.tensor([[True], [False]])
    with torch.no_grad():
        both = target_of(streams, model(streams, full))
        without = model(clip(kind), full)
        found = model({**streams, "video": replace(video, valid_BN=~lacking)}, full)
    assert all(t.isfinite().all() for t in found.values())
    wanted = {m: torch.cat([without[m][:1], both[m][1:]]) for m in both}
    assert off(target_of(streams, found), wanted) < 1e-10


def test_a_sample_may_lack_its_sound():
    model, streams = build("ltx2"), clip("ltx2")
    there = torch.tensor([[False], [True]]).expand(-1, streams["audio"].x_BNC.shape[1])
    lacking = {**streams, "audio": replace(streams["audio"], valid_BN=there)}
    silent = {m: s for m, s in streams.items() if m != "audio"}
    for rule in (full, cinetrans):
        with torch.no_grad():
            found = model(lacking, rule)["video"]
            wanted = torch.cat([model(silent, rule)["video"][:1], model(streams, rule)["video"][1:]])
        assert off({"video": found}, {"video": wanted}) < 1e-10


def test_sound_hears_of_the_same_noise_whether_references_see_each_other_or_not():
    """One reference has no other to be kept from: the rule must not change how the streams modulate."""
    model, streams = build("ltx2"), with_reference("ltx2", 2, 3)
    with torch.no_grad():
        assert off(model(streams, full & separate_references), model(streams, full)) < 1e-10


def test_factorized_refuses_what_is_no_whole_frame():
    model, streams = build("factorized"), with_reference("factorized", ROWS, COLUMNS)
    video = streams["video"]
    half = replace(video, valid_BN=torch.arange(video.x_BNC.shape[1])[None] >= COLUMNS)
    other = with_reference("factorized", 2, 3)["video"]
    for one, told in ((half, "a part of a frame"), (other, "as large as the video")):
        with pytest.raises(UserError, match=told) as error:
            model({**streams, "video": one}, full)
        assert "\n" not in str(error.value)
    # One row of one frame is a grid.
    row = part(clip("factorized", (1,))["video"], torch.arange(ROWS * COLUMNS) < COLUMNS)
    row = replace(row, grid=(1, 1, COLUMNS))
    assert model({**clip("factorized", (1,)), "video": row}, full)["video"].shape[1] == COLUMNS


# --- captions -----------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("rule", [same_scene, same_scene_or_both_video, scene_summaries, cinetrans.inside])
def test_a_caption_of_the_whole_reaches_every_scene_at_once(kind, rule):
    """In one block, in which a scene's own caption reaches its scene alone."""
    if "lightning" in kind and rule is not same_scene:
        return  # its words are in the video that other scenes see in this very block
    model, streams = build(kind, depth=1), clip(kind, whole=2)
    # Sound hears words before the picture hears sound.
    streams.pop("audio", None)
    scene_N = streams["video"].scene_BN[0]

    def told(words: Tensor) -> list[bool]:
        """Which scenes hear of other words."""
        text = replace(streams["text"], x_BNC=torch.where(words[None, :, None], 3.0, streams["text"].x_BNC))
        with torch.no_grad():
            change = (model({**streams, "text": text}, rule)["video"] - model(streams, rule)["video"]).abs()
        return [change[:, scene_N == scene].max().item() > 1e-6 for scene in (0, 1)]

    scene_L = streams["text"].scene_BN[0]
    assert [told(scene_L == s) for s in (GLOBAL, 0, 1)] == [[True, True], [True, False], [False, True]]


def facts(*tokens: tuple[str, int, bool]) -> Attributes:
    """Tokens of (modality, scene, context), each the first of its frame and at the clip's beginning."""
    made = []
    for modality, scene, context in tokens:
        one = torch.tensor([[scene]])
        made.append(
            Attributes(
                modality_BN=torch.full_like(one, MODALITIES.index(modality)),
                scene_BN=one,
                chunk_BN=one * 0 - int(context),
                context_BN=one * 0 + context > 0,
                cell_BN3=torch.zeros(1, 1, 3).long() + scene,
                first_BN=one == one,
                sample_BN=one * 0,
            )
        )
    return join_attributes(made)


def table(rule: Visibility, a: Attributes) -> list[str]:
    mask = dense_mask(rule, a, a)
    assert mask is not None
    return ["".join(".x"[int(seen)] for seen in row) for row in mask[0]]


def test_references_and_their_captions_keep_to_themselves():
    a = facts(
        ("text", GLOBAL, False),
        ("text", 0, False),
        ("text", 0, True),
        ("text", 1, True),
        ("video", 0, True),
        ("audio", 0, True),
        ("video", 1, True),
        ("video", 0, False),
    )
    assert table(full & separate_references & reference_captions, a) == [
        "xx..xxxx",
        "xx..xxxx",
        "..x.xx..",
        "...x..x.",
        "xxx.xx.x",
        "xxx.xx.x",
        "xx.x..xx",
        "xx..xxxx",
    ]


def test_cinetrans_in_its_middle_layers_and_around_them():
    a = facts(
        ("text", GLOBAL, False),
        ("text", 0, False),
        ("text", 1, False),
        ("video", 0, True),
        ("video", 0, False),
        ("video", 1, False),
        ("video", 2, False),
    )
    assert table(cinetrans.in_layer(0, 30), a) == [
        "xxxxxxx",
        "xx.xx..",
        "x.x..x.",
        "xx.xxxx",
        "xx.xxxx",
        "x.xxxxx",
        "x..xxxx",
    ]
    assert table(cinetrans.in_layer(15, 30), a) == [
        "xxxxxxx",
        "xx.xx..",
        "x.x..x.",
        "xx.xx..",
        "xx.xx..",
        "x.x.xx.",
        "x...x.x",
    ]
