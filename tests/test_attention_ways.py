"""Every way to compute every visibility against a plain dense softmax, forward and backward.

Shapes: B batch, H heads, N tokens, D channels of a head.
"""

from __future__ import annotations

import gc
import json
import weakref
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from laid import EXPAND
from motionloom.errors import UserError
from motionloom.nn.attention import CHOICES, Choices, Pattern, attend, kernels, pinned
from motionloom.nn.attention.choice import best
from motionloom.nn.attention.dispatch import EVERYTHING, chosen, everything, flops, problem, run, ways
from motionloom.plans import (
    Attributes,
    Chunks,
    Scenes,
    Visibility,
    causal_chunks,
    dense_mask,
    full,
    same_scene,
    spatial_window,
)
from motionloom.plans.lower import _kept, lower
from motionloom.plans.stream import MODALITIES, join_attributes
from motionloom.plans.visibility import (
    GLOBAL,
    SameSample,
    TeacherForcing,
    cinetrans,
    reference_captions,
    same_scene_or_both_video,
    scene_summaries,
    separate_references,
)
from motionloom.rng import torch_generator
from test_backbones import build, sample

BATCH, HEADS, DIM = 2, 2, 8
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}

VISIBILITIES: dict[str, Visibility] = {
    "full": full,
    "same scene": same_scene,
    "mask 1": same_scene_or_both_video,
    "summaries": scene_summaries,
    "chunks": causal_chunks(),
    "chunks, window": causal_chunks(window=2),
    "chunks, window, sinks": causal_chunks(window=2, sinks=1),
    "teacher": TeacherForcing(),
    "teacher, window, sinks": TeacherForcing(window=2, sinks=1),
    "windows": spatial_window(2),
    "windows, shifted": spatial_window(2, shift=1),
    "same scene and chunks": same_scene & causal_chunks(),
    "mask 1 or chunks": same_scene_or_both_video | causal_chunks(window=1),
    "windows and summaries": spatial_window(2) & scene_summaries,
    "packed mask 1": same_scene_or_both_video & SameSample(),
    "packed windows": spatial_window(2, shift=1) & SameSample(),
    "same scene, global": same_scene,
    "mask 1, global": same_scene_or_both_video,
    "summaries, global": scene_summaries,
    "packed mask 1, global": same_scene_or_both_video & SameSample(),
    "cinetrans": cinetrans,
    "cinetrans inside, global": cinetrans.in_layer(15, 30),
    "references": full & separate_references & reference_captions,
    "mask 1, references, global": same_scene_or_both_video & separate_references & reference_captions,
}


def tokens(frames=(3, 2, 2), rows=3, columns=5, words=3, chunk=2, context=False, samples=1) -> Attributes:
    """Text and video of scenes with so many ``frames``, laid as [text of every scene | video]; ``context``:
    the video twice; ``samples``: so many of these after each other."""
    scene_F = torch.arange(len(frames)).repeat_interleave(torch.tensor(frames))
    total, cells = len(scene_F), rows * columns
    video = torch.cartesian_prod(torch.arange(total), torch.arange(rows), torch.arange(columns))
    text = len(frames) * words
    copies = 2 if context else 1
    frame = video[:, 0].repeat(copies)
    starts = torch.tensor([0, *frames[:-1]]).cumsum(0)
    zeros = torch.zeros(text, dtype=torch.long)
    one = Attributes(
        modality_BN=torch.cat([zeros + MODALITIES.index("text"), frame * 0 + MODALITIES.index("video")]),
        scene_BN=torch.cat([torch.arange(len(frames)).repeat_interleave(words), scene_F[frame]]),
        chunk_BN=torch.cat([zeros, frame // chunk]),
        context_BN=torch.cat(
            [zeros.bool(), torch.arange(copies * total * cells) < (copies - 1) * total * cells]
        ),
        cell_BN3=torch.cat([torch.zeros(text, 3, dtype=torch.long), video.repeat(copies, 1)]),
        first_BN=torch.cat([zeros.bool(), starts[scene_F[frame]] == frame]),
        sample_BN=torch.cat([zeros, frame * 0]),
    )
    parts = [replace(one, sample_BN=one.sample_BN + i) for i in range(samples)]
    return Attributes(**{name: torch.cat([getattr(p, name) for p in parts])[None] for name in vars(one)})


def attributes_for(name: str) -> Attributes:
    a = tokens(context="teacher" in name, samples=2 if "packed" in name else 1)
    if "global" in name:
        # Of each sample's words, the last two.
        last = ((a.scene_BN == 2) & (a.modality_BN == MODALITIES.index("text"))).nonzero()[:, 1]
        a.scene_BN[:, last.unflatten(0, (-1, 3))[:, 1:].flatten()] = GLOBAL
    if "references" in name:
        beside = tokens(frames=(1, 2), rows=2, columns=3, words=2)
        context_BN = torch.ones_like(beside.context_BN)
        a = join_attributes([replace(beside, context_BN=context_BN, chunk_BN=-context_BN.long()), a])
    return a


def padding(a: Attributes) -> Tensor:
    """The last words of one scene are padding, other ones in each sample."""
    text = (a.modality_BN[0] == MODALITIES.index("text")).nonzero()[:, 0]
    valid = torch.ones(BATCH, a.scene_BN.shape[1], dtype=torch.bool)
    valid[0, text[1:3]] = False
    valid[1, text[5]] = False
    return valid


def draw(*shape: int, key: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch_generator(key), dtype=torch.float64).to(dtype)


def inputs(queries: int, keys: int, dtype: torch.dtype, batch: int = BATCH) -> list[Tensor]:
    """q, k, v, laid out as backbones lay them out."""
    sizes = {"q": queries, "k": keys, "v": keys}
    drawn = (draw(batch, n, HEADS, DIM, key=key, dtype=dtype) for key, n in sizes.items())
    return [t.transpose(1, 2).requires_grad_() for t in drawn]


def outcome(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    grad = draw(*out.shape, key="gradient", dtype=out.dtype)
    return [t.detach().double() for t in (out, *torch.autograd.grad(out, leaves, grad))]


def by_definition(mask: Tensor | None, leaves: list[Tensor]) -> list[Tensor]:
    q, k, v = (t.detach().double().requires_grad_() for t in leaves)
    scores = (q @ k.transpose(-1, -2)) / DIM**0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], float("-inf"))
    return outcome(scores.softmax(-1) @ v, [q, k, v])


def assert_close(got: list[Tensor], wanted: list[Tensor], dtype: torch.dtype, what: str) -> None:
    for a, b, name in zip(got, wanted, ("out", "dq", "dk", "dv"), strict=True):
        error = (a - b).abs().max().item()
        assert error <= TOLERANCE[dtype] * max(1.0, b.abs().max().item()), (
            f"{what}: {name} is off by {error:.1e}"
        )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", VISIBILITIES)
def test_every_way_equals_the_dense_softmax_forward_and_backward(name, padded, dtype):
    a = attributes_for(name)
    valid = padding(a) if padded else None
    n = a.scene_BN.shape[1]
    leaves = inputs(n, n, dtype)
    wanted = by_definition(dense_mask(VISIBILITIES[name], a, a, valid), leaves)
    with pinned("any"):
        pattern = lower(VISIBILITIES[name], a, a, valid)
    if pattern is None:
        assert name == "full"
        return
    names = ways(pattern.plan, leaves[0], needs_gradient=True)
    assert {"dense"} < set(names)
    for way in names:
        assert_close(outcome(run(pattern.plan, way, *leaves), leaves), wanted, dtype, way)


@pytest.mark.parametrize("name", ["mask 1", "windows, shifted"])
def test_flex_equals_the_dense_softmax_on_a_cpu(name):
    a = tokens(frames=(3, 4, 2), rows=5, columns=6, words=20)
    n, visibility = a.scene_BN.shape[1], VISIBILITIES[name]
    valid = padding(a)
    with pinned("any"):
        pattern = lower(visibility, a, a, valid)
    assert isinstance(pattern, Pattern)
    q, k, v = (draw(BATCH, HEADS, n, 16, key=key, dtype=torch.float32) for key in "qkv")
    mask = dense_mask(visibility, a, a, valid)
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
    torch.testing.assert_close(run(pattern.plan, "flex", q, k, v), wanted, rtol=0, atol=1e-5)


# --- structure ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VISIBILITIES)
def test_tokens_with_equal_labels_see_and_are_seen_alike(name):
    a = attributes_for(name)
    labels = torch.stack(
        [t.long().expand(1, a.scene_BN.shape[1]) for t in VISIBILITIES[name].labels(a)]
        or [torch.zeros_like(a.scene_BN)],
        dim=-1,
    )[0]
    _, group = labels.unique(dim=0, return_inverse=True)
    mask = VISIBILITIES[name].allows(a.queries(), a.keys())[0]
    same = group[:, None] == group[None]
    for i in range(len(group)):
        alike = same[i].nonzero()[:, 0]
        assert (mask[alike] == mask[i]).all()
        assert (mask[:, alike] == mask[:, i : i + 1]).all()


def test_a_rule_that_says_nothing_of_itself_is_exact_too():
    class Unlabelled(Visibility):
        def allows(self, q, k):
            return (q.cell_BN3[..., 1] + k.cell_BN3[..., 2] + q.scene_BN) % 2 == 0

    a = tokens()
    valid = padding(a)
    leaves = inputs(114, 114, torch.float64)
    with pinned("segments"):
        out = attend(*leaves, lower(Unlabelled(), a, a, valid))
    wanted = by_definition(dense_mask(Unlabelled(), a, a, valid), leaves)
    assert_close(outcome(out, leaves), wanted, torch.float64, "unlabelled")


def test_scene_attention_reads_keys_where_they_lie():
    a = tokens(frames=(4, 2, 3), rows=8, columns=8, words=6)
    with pinned("any"):
        pattern = lower(same_scene_or_both_video, a, a)
    [(_, calls)] = pattern.plan.calls("merge")
    assert all(call.k.start is not None and call.q.start is not None for call in calls)
    assert sum(call.pairs for call in calls) == pattern.plan.pairs


def test_no_pair_is_computed_that_is_hidden():
    for name, visibility in VISIBILITIES.items():
        a = attributes_for(name)
        with pinned("any"):
            pattern = lower(visibility, a, a, padding(a))
        for way in ("segments", "merge"):
            calls = pattern.plan.calls(way)
            if calls is not None:
                computed = sum(call.pairs for _, some in calls for call in some)
                seen = dense_mask(visibility, a, a, padding(a)).expand(-1, a.scene_BN.shape[1], -1)
                assert computed == pattern.plan.pairs == int(seen.sum()), name


def test_windows_of_equal_size_are_one_call():
    a = tokens(frames=(4,), rows=8, columns=8, words=6)
    with pinned("any"):
        pattern = lower(spatial_window(4), a, a)
    [(_, calls)] = pattern.plan.calls("segments")
    assert [call.q.index_GN.shape for call in calls] == [(4, 64), (1, 6)]


def test_summaries_leave_the_share_that_the_lengths_say():
    """Spec sizes: 13 latent frames of 1,350 tokens and 226 words a scene."""
    for scenes, cells, frames, words in ((3, 1350, 13, 226), (6, 1350, 13, 226), (12, 1350, 13, 226)):
        video, own = cells * frames, cells * frames + words
        share = (own**2 + video * (scenes - 1) * cells) / (scenes * own**2)
        a = tokens(frames=(frames,) * scenes, rows=30, columns=45, words=words)
        seen = lower(scene_summaries, a, a).plan.density
        assert seen == pytest.approx(share)


# --- padding and batches ------------------------------------------------------------------------------------


def test_text_that_is_padded_differently_in_each_sample_costs_a_call_each():
    video, text = tokens(words=1), tokens(frames=(1,), rows=1, columns=7, words=1)
    valid = torch.arange(8)[None] < torch.tensor([[3], [8]])
    leaves = inputs(video.scene_BN.shape[1], 8, torch.float64)
    with pinned("segments"):
        pattern = lower(full, video, text, valid)
    assert [call.k.index_GN.shape for _, some in pattern.plan.calls("segments") for call in some] == [
        (1, 3),
        (1, 8),
    ]
    wanted = by_definition(dense_mask(full, video, text, valid), leaves)
    assert_close(outcome(run(pattern.plan, "segments/flash", *leaves), leaves), wanted, torch.float64, "text")


def test_padding_that_hides_nothing_is_no_mask():
    a = tokens(frames=(20,), rows=5, columns=6)
    assert lower(full, a, a, torch.ones(2, a.scene_BN.shape[1], dtype=torch.bool)) is None
    one_scene = lower(same_scene, a, a)
    assert one_scene is None


def test_scenes_may_differ_between_samples():
    one, other = tokens(frames=(3, 2, 2)), tokens(frames=(1, 4, 2))
    a = Attributes(**{name: torch.cat([t, getattr(other, name)]) for name, t in vars(one).items()})
    n = a.scene_BN.shape[1]
    leaves = inputs(n, n, torch.float64)
    with pinned("any"):
        pattern = lower(same_scene_or_both_video, a, a)
    assert pattern.plan.batch == 2
    wanted = by_definition(dense_mask(same_scene_or_both_video, a, a), leaves)
    for way in ways(pattern.plan, leaves[0], needs_gradient=True):
        assert_close(outcome(run(pattern.plan, way, *leaves), leaves), wanted, torch.float64, way)


def test_the_last_patterns_are_remembered_by_what_the_attributes_say():
    a, b, c = tokens(), tokens(), tokens(frames=(2, 3, 2))
    with pinned("any"):
        assert lower(same_scene, a, a) is lower(same_scene, b, b)
        assert lower(same_scene, a, a) is not lower(same_scene, c, c)
        assert lower(same_scene, a, a) is not lower(scene_summaries, a, a)
        assert lower(same_scene, a, a, padding(a)) is not lower(same_scene, a, a)


# --- long bfloat16 on a CPU ---------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["segments/products", "segments/products+flash", "segments/flash"])
def test_long_bfloat16_attention_in_blocks_equals_the_dense_softmax(way, monkeypatch):
    monkeypatch.setattr(kernels, "SCORES", 2**14)
    leaves = inputs(70, 1100, torch.bfloat16)
    got = outcome(run(everything(70, 1100), way, *leaves), leaves)
    assert_close(got, by_definition(None, leaves), torch.bfloat16, way)
    assert_close(outcome(attend(*leaves), leaves), by_definition(None, leaves), torch.bfloat16, "attend")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("way", ["rule", "dense", "segments", "merge"])
@pytest.mark.parametrize("hidden", ["a sample's keys", "a scene's keys"])
def test_who_would_see_nothing_sees_all(hidden: str, way: str, dtype: torch.dtype) -> None:
    """All valid keys, or all there are if none is valid; alike by every way, and finite."""
    a = tokens()
    other = replace(a, scene_BN=a.scene_BN + (hidden == "a scene's keys"))
    valid = None
    if hidden == "a sample's keys":
        valid = torch.ones(BATCH, a.scene_BN.shape[1], dtype=torch.bool)
        valid[1] = False
    allowed = same_scene.allows(other.queries(), a.keys()).expand(BATCH, -1, -1)
    wanted_mask = allowed | ~allowed.any(-1, keepdim=True)
    assert not allowed.any(-1).all() or valid is not None
    leaves = inputs(a.scene_BN.shape[1], a.scene_BN.shape[1], dtype)
    with nullcontext() if way == "rule" else pinned(way):
        got = outcome(attend(*leaves, lower(same_scene, other, a, valid)), leaves)
    assert_close(got, by_definition(wanted_mask, leaves), dtype, way)


def test_gradients_of_gradients_are_refused_and_not_wrong() -> None:
    a = tokens()
    n = a.scene_BN.shape[1]
    for way, dtype in (("segments", torch.float32), ("dense", torch.bfloat16)):
        leaves = inputs(n, n, dtype)
        with pinned(way):
            out = attend(*leaves, lower(same_scene, a, a))
        (slope,) = torch.autograd.grad(out.float().square().sum(), leaves[0], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            slope.float().square().sum().backward()


# --- choice -------------------------------------------------------------------------------------------------


def test_small_problems_go_by_rule_and_are_not_measured():
    a = tokens(frames=(6, 6), rows=6, columns=8)
    pattern = lower(same_scene, a, a)
    assert isinstance(pattern, Pattern)
    before = CHOICES.measurements()
    leaves = inputs(a.scene_BN.shape[1], a.scene_BN.shape[1], torch.float32)
    assert chosen(pattern.plan, *leaves, needs_gradient=True) == "dense"
    assert CHOICES.measurements() == before


def test_large_problems_are_measured_once_and_a_resume_chooses_alike(monkeypatch, tmp_path):
    monkeypatch.setattr("motionloom.nn.attention.dispatch.SMALL_FLOPS", 0)
    table = Choices()
    monkeypatch.setattr("motionloom.nn.attention.dispatch.CHOICES", table)
    a = tokens(frames=(6, 6), rows=6, columns=8)
    n = a.scene_BN.shape[1]
    plan, leaves = lower(same_scene, a, a).plan, inputs(n, n, torch.float32)
    file = tmp_path / "run" / "attention-0.json"
    with table.keep_in(file, resume=False):
        way = chosen(plan, *leaves, needs_gradient=True)
        [(key, seconds)] = json.loads(file.read_text()).items()
    assert way == best(seconds)
    assert set(seconds) == set(ways(plan, leaves[0], needs_gradient=True))
    # Another process that resumes goes the way of the file, whatever its own clock would say.
    file.write_text(json.dumps({key: {name: 1.0 if name == "dense" else 2.0 for name in seconds}}))
    other = Choices()
    monkeypatch.setattr("motionloom.nn.attention.dispatch.CHOICES", other)
    with other.keep_in(file, resume=True):
        assert chosen(plan, *leaves, needs_gradient=True) == "dense"
    # A new run in the same folder owes nothing to an old one's.
    with Choices().keep_in(file, resume=False):
        assert not file.exists()
    # What this version does not know is measured anew.
    file.write_text(json.dumps({key: {"merge/bogus": 1.0}}))
    other = Choices()
    monkeypatch.setattr("motionloom.nn.attention.dispatch.CHOICES", other)
    with other.keep_in(file, resume=True):
        assert chosen(plan, *leaves, needs_gradient=True) in ways(plan, leaves[0], needs_gradient=True)
    file.write_text("[1, 2")
    with pytest.raises(UserError, match="is damaged"), Choices().keep_in(file, resume=True):
        pass
    # A caption that is a little longer is no new problem; no gradient, another size or dtype is.
    assert problem(plan, leaves[0], True) == key
    assert problem(plan, leaves[0], False) != key
    assert problem(plan, leaves[0].double(), True) != key


def test_leaner_ways_win_what_is_nearly_a_draw():
    assert best({"dense": 0.85, "segments/flash": 1.0, "merge/flash": 1.02}) == "merge/flash"
    assert best({"dense": 0.85, "segments/flash": 0.9, "merge/flash": 1.02}) == "segments/flash"
    assert best({"dense": 0.5, "flex": 0.9, "merge/flash": 1.0}) == "dense"
    assert best({"segments/products": 1.0, "segments/flash": 0.99}) == "segments/flash"


def test_flops_are_those_of_the_allowed_pairs():
    a = tokens()
    with pinned("any"):
        plan = lower(same_scene_or_both_video, a, a).plan
    q = inputs(114, 114, torch.float32)[0]
    seen = int(dense_mask(same_scene_or_both_video, a, a).sum())
    assert flops(plan, q) == 4 * BATCH * HEADS * DIM * seen


# --- compiled -----------------------------------------------------------------------------------------------


class Block(nn.Module):
    """What backbones do around attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48, bias=False, dtype=torch.float64)

    def forward(self, x_BND: Tensor, pattern: Pattern) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in self.qkv(x_BND).unflatten(-1, (3, HEADS, DIM)).unbind(2))
        return x_BND + attend(q, k, v, pattern).transpose(1, 2).flatten(2)


def test_compiled_blocks_take_any_pattern_without_a_break_and_hardly_compile_again():
    torch._dynamo.reset()
    block = Block()
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=count)
    for name in ("mask 1", "same scene", "summaries", "windows", "packed mask 1"):
        a = attributes_for(name)
        x = draw(BATCH, a.scene_BN.shape[1], 16, key="x").requires_grad_()
        for way in ("merge", "segments", "dense"):
            with pinned(way):
                pattern = lower(VISIBILITIES[name], a, a, padding(a))
                results = []
                for run_block in (block, compiled):
                    out = run_block(x, pattern)
                    leaves = [x, block.qkv.weight]
                    results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
            for got, wanted in zip(*results, strict=True):
                torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)
    # Once as it is, once for any number of tokens.
    assert count.frame_count <= 2


def test_compiled_code_counts_the_operations_of_the_allowed_pairs():
    a = tokens()
    q, k, v = inputs(114, 114, torch.float64)
    with pinned("merge"), FlopCounterMode(display=False) as counter:
        pattern = lower(same_scene_or_both_video, a, a)
        out, *_ = torch.ops.motionloom.attend(q, k, v, pattern.handle, True)
        out.sum().backward()
    assert counter.get_total_flops() == flops(pattern.plan, q) * 7 // 2


def test_a_plan_lives_as_long_as_a_graph_needs_it_and_no_longer():
    a = tokens(frames=(2, 2))
    with pinned("merge"):
        pattern = lower(same_scene_or_both_video, a, a)
        _kept.clear()
        plan = weakref.ref(pattern.plan)
        n = a.scene_BN.shape[1]
        out, *_ = torch.ops.motionloom.attend(*inputs(n, n, torch.float64), pattern.handle, True)
        del pattern
        gc.collect()
        assert plan() is not None
        out.sum().backward()
        del out
        gc.collect()
        assert plan() is None


# --- backbones ----------------------------------------------------------------------------------------------

BACKBONE_PLANS = {
    "scenes": Scenes(EXPAND),
    "chunks": Chunks(2, window=2, sinks=1),
    "teacher": Chunks(2, forcing="teacher"),
}


@pytest.mark.parametrize("way", ["segments", "merge"])
@pytest.mark.parametrize("plan", BACKBONE_PLANS)
@pytest.mark.parametrize("kind", ["joint", "factorized"])
def test_backbones_answer_and_learn_the_same_whatever_the_way(kind, plan, way):
    model = build(kind, dtype=torch.float64)
    one = sample((2, 3), dtype=torch.float64)
    outcomes = []
    for pin in ("dense", way):
        with pinned(pin):
            out = one.run(model, BACKBONE_PLANS[plan])
            parameters = [p for p in model.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(out.square().sum(), parameters, allow_unused=True)
            outcomes.append([out, *(g for g in gradients if g is not None)])
    for got, wanted in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_what_compiled_code_is_told_of_an_answers_layout_is_so() -> None:
    """Few scores and many, which go different ways; without a gradient too, as in sampling."""
    for batch in (3, 2000):
        generator = torch_generator("layout", batch)
        q = torch.randn(batch, 65, 3, 32, generator=generator).bfloat16().transpose(1, 2)
        for needs_gradient in (False, True):
            arguments = (q, q, q, EVERYTHING, needs_gradient)
            torch.library.opcheck(torch.ops.motionloom.attend, arguments, test_utils="test_faketensor")
