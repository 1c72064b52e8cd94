"""The pieces of networks: attention against its definition, positions, windows, modulation, patching."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from motionloom.nn.attention import attend, fused_attention, matmul_attention, prepare_mask
from motionloom.nn.modulation import one_hot_levels, per_token
from motionloom.nn.norms import HeadNorm
from motionloom.nn.patching import patchify, unpatchify
from motionloom.nn.rope import SPACE, TIME, rotary, rotate
from motionloom.nn.windows import window_side, windows
from motionloom.rng import torch_generator

WAYS = {"matmul": matmul_attention, "fused": fused_attention, "attend": attend}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def draw(*shape: int, key: str = "x", dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch_generator(key), dtype=torch.float64).to(dtype)


def by_definition(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = torch.einsum("...nd,...md->...nm", q, k) / q.shape[-1] ** 0.5
    weights = scores.exp() if mask is None else scores.exp() * mask
    return torch.einsum("...nm,...md->...nd", weights / weights.sum(-1, keepdim=True), v)


def outcome(way, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Output and the three gradients, in float64."""
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    out = way(*leaves, mask)
    out.backward(draw(*out.shape, key="gradient", dtype=out.dtype))
    return [out.double(), *(leaf.grad.double() for leaf in leaves)]


def masks(queries: int, keys: int) -> dict[str, Tensor | None]:
    random = torch.rand(2, 1, queries, keys, generator=torch_generator("mask")) < 0.6
    random[..., 0] = True
    padding = torch.ones(2, 1, 1, keys, dtype=torch.bool)
    padding[1, ..., keys // 2 :] = False
    return {"none": None, "random": random, "padding": padding}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("mask", ["none", "random", "padding"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_equals_the_definition_forward_and_backward(way, mask, dtype):
    q, k, v = (draw(2, 3, n, 8, key=key).to(dtype) for key, n in (("q", 7), ("k", 5), ("v", 5)))
    mask_BHNM = masks(7, 5)[mask]
    wanted = outcome(by_definition, q.double(), k.double(), v.double(), mask_BHNM)
    for got, want in zip(outcome(WAYS[way], q, k, v, mask_BHNM), wanted, strict=True):
        assert (got - want).abs().max() <= TOLERANCE[dtype] * max(1.0, want.abs().max().item())


@pytest.mark.parametrize("way", WAYS)
def test_a_prepared_mask_is_the_same_mask(way):
    q, k, v = (draw(2, 3, 6, 8, key=key) for key in "qkv")
    mask = masks(6, 6)["random"]
    prepared = prepare_mask(mask)
    for a, b in zip(
        outcome(WAYS[way], q, k, v, mask),
        outcome(WAYS[way], q, k, v, prepared),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert prepare_mask(None) is None


@pytest.mark.parametrize("way", WAYS)
def test_leading_dimensions_and_a_mask_that_broadcasts_over_them(way):
    q, k, v = (draw(2, 4, 3, 2, 5, 8, key=key) for key in "qkv")
    mask = torch.rand(4, 1, 1, 5, 5, generator=torch_generator("m")) < 0.5
    mask = mask | torch.eye(5, dtype=torch.bool)
    got = WAYS[way](q, k, v, mask)
    for b, w, t in itertools.product(range(2), range(4), range(3)):
        want = by_definition(q[b, w, t], k[b, w, t], v[b, w, t], mask[w, 0])
        torch.testing.assert_close(got[b, w, t], want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_added_to_the_scores_is_learned(way, dtype):
    q, k, v = (draw(3, 2, 4, 8, key=key, dtype=dtype) for key in "qkv")
    exact = dtype if dtype == torch.float64 else torch.float32
    bias_HNM = draw(2, 4, 4, key="bias", dtype=exact).requires_grad_()
    hidden = torch.ones(4, 4, dtype=torch.bool).triu(1)
    WAYS[way](q, k, v, bias_HNM.masked_fill(hidden, float("-inf"))).square().sum().backward()
    same = bias_HNM.detach().double().requires_grad_()
    scores = torch.einsum("bhnd,bhmd->bhnm", q.double(), k.double()) / 8**0.5 + same
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    torch.einsum("bhnm,bhmd->bhnd", weights, v.double()).square().sum().backward()
    assert (bias_HNM.grad.double() - same.grad).abs().max() <= 3 * TOLERANCE[dtype] * same.grad.abs().max()


def test_one_mask_of_two_dimensions_is_for_all():
    q, k, v = (draw(2, 3, 5, 8, key=key) for key in "qkv")
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    for way in WAYS.values():
        torch.testing.assert_close(way(q, k, v, mask), by_definition(q, k, v, mask), rtol=0, atol=1e-10)


def test_hidden_keys_have_no_influence_at_all():
    q, k, v = (draw(2, 3, 6, 8, key=key, dtype=torch.bfloat16) for key in "qkv")
    mask = masks(6, 6)["padding"]
    k2, v2 = (torch.where(mask.transpose(-1, -2), t, 100.0) for t in (k, v))
    assert torch.equal(attend(q, k, v, mask), attend(q, k2, v2, mask))


# --- rotary positions ---------------------------------------------------------------------------------------


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    position = draw(1, 9, 3, key="where", dtype=torch.float32) * torch.tensor([2.0, 50.0, 50.0])
    q, k = (draw(1, 9, 64, key=key, dtype=torch.float32) for key in "qk")
    axes = (TIME, SPACE, SPACE)

    def scores(moved_by: Tensor) -> Tensor:
        tables = rotary(position + moved_by, axes, 64)
        a, b = rotate(q, tables), rotate(k, tables)
        torch.testing.assert_close(a.norm(dim=-1), q.norm(dim=-1))
        return a @ b.transpose(1, 2)

    still = scores(torch.zeros(3))
    torch.testing.assert_close(scores(torch.tensor([3.0, 40.0, -17.0])), still, rtol=0, atol=1e-3)
    assert (still - q @ k.transpose(1, 2)).abs().max() > 0.1


@pytest.mark.parametrize("axis", range(3))
def test_every_axis_turns_channels_of_its_own(axis):
    origin = rotary(torch.zeros(1, 1, 3), (TIME, SPACE, SPACE), 64)
    step = torch.zeros(1, 1, 3)
    step[..., axis] = 0.2 if axis == 0 else 10.0
    moved = rotary(step, (TIME, SPACE, SPACE), 64)
    turned = (moved[0] - origin[0]).abs()[0, 0, :32] > 1e-9
    share = (slice(0, 8), slice(8, 20), slice(20, 32))[axis]
    assert turned[share].all()
    assert turned.sum() == share.stop - share.start


def test_neighbours_are_told_apart_and_the_far_end_stays_unambiguous():
    """Latent frames 1/16 to 1/4 s apart and cells 8 to 16 pixels apart turn the quickest pair by 0.5 to 2."""
    quick = TIME.frequencies(8)[0], SPACE.frequencies(12)[0]
    assert [quick[0] / 16, quick[0] / 4, quick[1] * 8, quick[1] * 16] == pytest.approx([0.5, 2, 1, 2])
    slow = TIME.frequencies(8)[-1], SPACE.frequencies(12)[-1]
    assert 60 * slow[0] < torch.pi
    assert 3000 * slow[1] < torch.pi


def test_head_norm_bounds_the_logits():
    q, k = HeadNorm(16)(1000 * draw(3, 16, dtype=torch.float32), 1e-2 * draw(3, 16, dtype=torch.float32))
    torch.testing.assert_close(q.norm(dim=-1), torch.full((3,), 4.0))
    torch.testing.assert_close(k.norm(dim=-1), torch.full((3,), 4.0), rtol=1e-2, atol=0)


# --- windows ------------------------------------------------------------------------------------------------

SIZES = [(8, 8, 4), (5, 7, 4), (16, 28, 8), (3, 3, 8), (13, 6, 4), (1, 9, 2), (11, 11, 8)]


def test_window_sides_fit_the_side():
    assert [window_side(n, 8) for n in (1, 8, 10, 16, 28, 30, 60)] == [1, 8, 10, 8, 7, 10, 10]
    for side, size in itertools.product(range(1, 200), (2, 4, 7, 8, 16)):
        window = window_side(side, size)
        assert window == side or 3 * size / 4 <= window <= 5 * size / 4
    # Padding: under 15 % in a side of more than two windows of 8.
    assert max(-n % window_side(n, 8) / n for n in range(17, 500)) < 0.15


def expected_windows(rows: int, columns: int, size: int, shifted: bool) -> Tensor:
    """Written out: cells see each other if both their shifted coordinates fall into one window."""

    def group(i: int, side: int) -> int:
        window = window_side(side, size)
        return (i + (window // 2 if shifted and side > window else 0)) // window

    cells = [(group(r, rows), group(c, columns)) for r in range(rows) for c in range(columns)]
    return torch.tensor([[a == b for b in cells] for a in cells])


@pytest.mark.parametrize("rows, columns, size", SIZES)
@pytest.mark.parametrize("shifted", [False, True])
def test_windows_hold_every_cell_once_and_see_what_the_definition_says(rows, columns, size, shifted):
    layout = windows(rows, columns, size, shifted, torch.device("cpu"))
    cells = rows * columns
    assert torch.equal(layout.cell_I[layout.place_S], torch.arange(cells))
    mask = layout.mask(None)
    places = layout.cell_I.view(layout.count, -1)
    mask = torch.ones(*places.shape, places.shape[1], dtype=torch.bool) if mask is None else mask
    real = torch.zeros(layout.cell_I.shape, dtype=torch.bool)
    real[layout.place_S] = True
    real = real.view(layout.count, -1)
    sees = torch.zeros(cells, cells, dtype=torch.bool)
    for w in range(layout.count):
        assert mask[w].any(dim=1).all(), "an empty row would be NaN"
        assert not mask[w][real[w]][:, ~real[w]].any(), "padding is seen"
        here = places[w][real[w]]
        sees[here[:, None], here[None, :]] = mask[w][real[w]][:, real[w]]
    assert torch.equal(sees, expected_windows(rows, columns, size, shifted))


@pytest.mark.parametrize("rows, columns, size", SIZES)
@pytest.mark.parametrize("shifted", [False, True])
def test_gather_and_scatter_are_inverse_and_their_gradients_exact(rows, columns, size, shifted):
    layout = windows(rows, columns, size, shifted, torch.device("cpu"))
    x = draw(2, rows * columns, 3).requires_grad_()
    gathered = layout.gather(x)
    assert torch.equal(gathered, x[:, layout.cell_I])
    assert torch.equal(layout.scatter(gathered), x)
    # Through what attention does in between: padding is weighted by zero.
    real = torch.zeros(layout.cell_I.shape, dtype=torch.float64)
    real[layout.place_S] = 1.0
    weight = draw(*gathered.shape, key="weight") * real[:, None]
    (layout.scatter(gathered * weight).square().sum()).backward()
    direct = x.detach().clone().requires_grad_()
    (direct * weight[:, layout.place_S]).square().sum().backward()
    torch.testing.assert_close(x.grad, direct.grad, rtol=0, atol=1e-12)
    y = gathered.detach().clone().requires_grad_()
    layout.scatter(y).sum().backward()
    assert torch.equal(y.grad, real[:, None].expand_as(y))


# --- modulation and patches ---------------------------------------------------------------------------------


def test_per_token_is_a_lookup_with_its_gradient():
    modulation = draw(2, 3, 4, 5, dtype=torch.float32).requires_grad_()
    level_BN = torch.randint(3, (1, 6), generator=torch_generator("level"))
    vectors = per_token(modulation, one_hot_levels(level_BN, 3, torch.float32))
    weight = draw(4, 2, 6, 5, key="weight", dtype=torch.float32)
    (torch.stack(vectors) * weight).sum().backward()
    reference = modulation.detach().clone().requires_grad_()
    looked_up = reference[:, level_BN[0]]
    assert torch.equal(torch.stack(vectors), looked_up.movedim(2, 0))
    (looked_up.movedim(2, 0) * weight).sum().backward()
    torch.testing.assert_close(modulation.grad, reference.grad)


def test_one_level_is_not_spread_over_tokens():
    level_BN = torch.zeros(1, 6, dtype=torch.long)
    assert one_hot_levels(level_BN, 1, torch.float32) is None
    assert per_token(draw(2, 1, 3, 5), None)[0].shape == (2, 1, 5)


@pytest.mark.parametrize("patch", [(1, 1, 1), (2, 1, 3), (2, 2, 2)])
def test_patches_come_apart_and_together(patch):
    latents = torch.arange(2 * 4 * 2 * 6 * 5).view(2, 4, 2, 6, 5)
    tokens = patchify(latents, patch)
    grid = tuple(n // p for n, p in zip((4, 2, 6), patch, strict=True))
    assert tokens.shape == (2, grid[0], grid[1] * grid[2], 5 * patch[0] * patch[1] * patch[2])
    assert torch.equal(unpatchify(tokens, grid, patch), latents)
    corner = latents[1, : patch[0], : patch[1], : patch[2]]
    assert torch.equal(tokens[1, 0, 0], corner.flatten())
