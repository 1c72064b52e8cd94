"""Every backbone under every plan: what may influence what, that masks are exact, that nothing is dead."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

from laid import EXPAND, FIRST_FRAME, lay, noised, read_video
from motionloom.backbones import BACKBONES, build_backbone
from motionloom.backbones.base import LatentFacing
from motionloom.backbones.factorized import Block
from motionloom.config.recipe import ModelConfig
from motionloom.nn.windows import window_side
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
    dense_mask,
    full,
    spatial_window,
)
from motionloom.rng import torch_generator

CHANNELS, TEXT_DIM, WORDS = 4, 5, 3
PLANS: dict[str, Plan] = {
    "text_to_video": TextToVideo(),
    "first_frame": FIRST_FRAME,
    "scenes": Scenes(EXPAND),
    "diffusion forcing": Chunks(2),
    "teacher forcing": Chunks(2, window=2, sinks=1, forcing="teacher"),
}

every_backbone = pytest.mark.parametrize("kind", sorted(BACKBONES))
every_plan = pytest.mark.parametrize("plan", PLANS)


@dataclass
class Sample:
    """All that goes into the streams of a batch, so that tests can change one thing."""

    geometry: Geometry
    text: Text
    clean: Tensor
    noise: Tensor
    sigma: Tensor
    """Independent draws, (B, 8)."""
    given: Tensor | None = None

    def layout(self, plan: Plan) -> Layout:
        return lay(plan, self.geometry, self.text, self.given)

    def streams(self, plan: Plan) -> tuple[Layout, Streams]:
        layout = self.layout(plan)
        return layout, noised(layout, self.clean, self.noise, self.sigma, self.text)

    def run(self, model: nn.Module, plan: Plan) -> Tensor:
        """The prediction for the clip, (B, F, S, C)."""
        layout, streams = self.streams(plan)
        return read_video(layout, model(streams, layout.visibility)["video"])


def sample(
    scene_frames: tuple[int, ...] = (5,),
    rows: int = 3,
    columns: int = 4,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
) -> Sample:
    scene_F = torch.arange(len(scene_frames)).repeat_interleave(torch.tensor(scene_frames))
    frames, words = len(scene_F), WORDS * len(scene_frames)
    generator = torch_generator("sample", frames, rows, columns, batch)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    valid = torch.ones(batch, words, dtype=torch.bool)
    valid[0, -1] = False
    return Sample(
        geometry=Geometry(
            (frames, rows, columns),
            torch.arange(frames)[None] / 8.0,
            (8.0, 8.0),
            scene_F[None],
            batch,
            scenes=len(scene_frames),
        ),
        text=Text(
            draw(batch, words, TEXT_DIM),
            valid,
            torch.arange(len(scene_frames)).repeat_interleave(WORDS)[None],
        ),
        clean=draw(batch, frames, rows * columns, CHANNELS),
        noise=draw(batch, frames, rows * columns, CHANNELS),
        sigma=torch.rand(batch, 8, generator=generator, dtype=torch.float64).to(dtype),
    )


def build(kind: str, *, awake: bool = True, dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    """A tiny model; ``awake``: with values where adaLN-Zero starts from zero, so that everything matters."""
    config = {"dim": 24, "depth": 2, "num_heads": 2, "window_size": 2, "mlp_ratio": 2.0, **changes}
    model = build_backbone(ModelConfig(type=kind, **config), CHANNELS, TEXT_DIM).eval()
    if awake:
        generator = torch_generator("awake")
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.to(dtype)


def changed(tensor: Tensor, *index: object) -> Tensor:
    """A copy with other values at ``index``."""
    other = tensor.clone()
    other[index] = 3.0 - other[index]
    return other


@dataclass(frozen=True)
class Opaque(Visibility):
    """The same rule without the hints that allow short cuts: every mask is then built cell by cell."""

    rule: Visibility

    def allows(self, q, k):
        return self.rule.allows(q, k)

    @property
    def whole_frames(self) -> bool:
        return False


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return (a - b).abs().max().item() <= tolerance * max(1.0, b.abs().max().item())


# --- shapes, starts, dtypes ---------------------------------------------------------------------------------


@every_backbone
@every_plan
@pytest.mark.parametrize("scene_frames, rows, columns", [((3, 2), 3, 4), ((1,), 5, 7), ((4,), 1, 1)])
def test_any_plan_any_size(kind, plan, scene_frames, rows, columns):
    clip = sample(scene_frames, rows, columns)
    out = clip.run(build(kind, window_size=4), PLANS[plan])
    assert out.shape == clip.clean.shape
    assert out.dtype == torch.float32
    assert out.isfinite().all()


@every_backbone
def test_patches_make_the_tokens_wider_and_nothing_else(kind):
    model = build(kind, patch=(1, 2, 2))
    clip = sample()
    wide = replace(clip, clean=clip.clean.repeat(1, 1, 1, 4), noise=clip.noise.repeat(1, 1, 1, 4))
    assert wide.run(model, TextToVideo()).shape == wide.clean.shape


@every_backbone
def test_a_new_model_answers_zero_and_its_tokens_enter_at_scale_one(kind):
    model = build(kind, awake=False, dim=192)
    clip = sample(rows=8, columns=8)
    seen = []
    model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    assert not clip.run(model, TextToVideo()).any()
    assert 0.7 < seen[0].std() < 1.5


@every_backbone
def test_weights_come_from_the_generator_and_no_global_one_is_touched(kind):
    before = torch.get_rng_state()
    first = build(kind, awake=False).state_dict()
    torch.rand(1, generator=torch.default_generator)
    state = torch.get_rng_state()
    second = build(kind, awake=False)
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(before)
    for name, value in second.state_dict().items():
        assert value.isfinite().all()
        assert torch.equal(value, first[name]), name
    second.init_weights(torch_generator("another run"))
    changes = {n for n, v in second.state_dict().items() if not torch.equal(v, first[n])}
    assert {"entry.video.weight", "entry.proj.weight"} & changes
    assert "exit.out.weight" not in changes


@every_backbone
def test_bf16_autocast_follows_float32(kind):
    clip = sample()
    model = build(kind)
    layout, streams = clip.streams(Chunks(2))
    exact = model(streams, layout.visibility)["video"]
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(streams, layout.visibility)["video"]
    assert rough.dtype == streams["video"].x_BNC.dtype
    assert 1e-5 < (rough - exact).norm() / exact.norm() < 0.03


@every_backbone
def test_bf16_weights_run_too(kind):
    out = sample().run(build(kind).bfloat16(), FIRST_FRAME)
    assert out.isfinite().all()


# --- masks are exact ----------------------------------------------------------------------------------------


@every_backbone
@every_plan
def test_short_cuts_equal_masks_built_cell_by_cell(kind, plan):
    """Forward and gradients of all parameters, float64."""
    clip = sample((3, 2), rows=3, columns=5, dtype=torch.float64)
    layout, streams = clip.streams(PLANS[plan])
    found = []
    for visibility in (layout.visibility, Opaque(layout.visibility)):
        model = build(kind, dtype=torch.float64)
        out = model(streams, visibility)["video"]
        out.square().mean().backward()
        found.append((out, torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert close(found[0][0], found[1][0], 1e-10)
    assert close(found[0][1], found[1][1], 1e-10)


def reaching(clip: Sample, plan: Plan, rule: Visibility | None, size: int, parity: int) -> tuple:
    """A factorized block, the tokens that reach it, and its further inputs."""
    model = build("factorized", window_size=size, dtype=torch.float64)
    seen: list[tuple] = []
    model.layers[parity].register_forward_pre_hook(lambda module, args: seen.append(args))
    layout, streams = clip.streams(plan)
    model(streams, rule or layout.visibility)
    x, space, context, _ = seen[0]
    return model.layers[parity], x.detach(), space, context


def attended(block: Block, name: str, x: Tensor, tables, mask_BNN: Tensor, frames: int) -> Tensor:
    """One self-attention of a block over all tokens at once, under a dense mask."""
    layer = getattr(block, name)
    q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in layer.project(x.unflatten(1, (frames, -1)), tables))
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask_BNN[:, None], float("-inf"))
    return layer.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def with_gradient(function, x: Tensor, block: Block) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    weights = [leaf, *(p for p in block.parameters())]
    out = function(leaf)
    weight = torch.randn(out.shape, generator=torch_generator("w"), dtype=out.dtype)
    return [
        out,
        *(g for g in torch.autograd.grad((out * weight).sum(), weights, allow_unused=True) if g is not None),
    ]


def windows_of(rows: int, columns: int, size: int, shifted: bool) -> Tensor:
    """Which cells of a frame share a window, written out, (S, S)."""

    def group(i: int, side: int) -> int:
        window = window_side(side, size)
        return (i + (window // 2 if shifted and side > window else 0)) // window

    cells = [(group(r, rows), group(c, columns)) for r in range(rows) for c in range(columns)]
    return torch.tensor([[a == b for b in cells] for a in cells])


@pytest.mark.parametrize("rule", [full, spatial_window(3)])
@pytest.mark.parametrize("rows, columns, size", [(8, 8, 4), (4, 8, 4), (5, 7, 4), (6, 11, 4)])
@pytest.mark.parametrize("parity", [0, 1])
def test_windows_by_reordering_equal_dense_attention(rule, rows, columns, size, parity):
    """Also where windows are padded, and under a rule of its own within the frame."""
    clip = sample((2,), rows, columns, dtype=torch.float64)
    block, x, space, context = reaching(clip, TextToVideo(), rule, size, parity)
    a = clip.streams(TextToVideo())[1]["video"].attributes
    same_frame = a.cell_BN3[..., None, 0] == a.cell_BN3[..., None, :, 0]
    together = windows_of(rows, columns, size, shifted=bool(parity))
    if rows == columns:
        assert torch.equal(together, dense_mask(spatial_window(size, size // 2 * parity), a, a)[0, :64, :64])
    mask = same_frame & together.repeat(2, 2) & rule.allows(a.queries(), a.keys())
    fast = with_gradient(lambda t: block.across_space(t, space, context), x, block)
    dense = with_gradient(lambda t: attended(block, "space", t, space.rotary, mask, 2), x, block)
    for got, want in zip(fast, dense, strict=True):
        assert close(got, want, 1e-10)


@every_plan
@pytest.mark.parametrize("rows, columns", [(2, 3), (1, 1)])
def test_time_by_cells_equals_dense(plan, rows, columns):
    clip = sample((3, 2), rows, columns, dtype=torch.float64)
    block, x, _, context = reaching(clip, PLANS[plan], None, 2, 0)
    layout, streams = clip.streams(PLANS[plan])
    a = streams["video"].attributes
    same_cell = (a.cell_BN3[:, :, None, 1:] == a.cell_BN3[:, None, :, 1:]).all(-1)
    mask = layout.visibility.allows(a.queries(), a.keys()) & same_cell
    fast = with_gradient(lambda t: block.through_time(t, context), x, block)
    frames = streams["video"].grid[0]
    dense = with_gradient(lambda t: attended(block, "time", t, context.time_rotary, mask, frames), x, block)
    for got, want in zip(fast, dense, strict=True):
        assert close(got, want, 1e-10)


@every_backbone
@every_plan
def test_padding_in_the_text_has_no_influence(kind, plan):
    clip = sample((3, 2))
    model = build(kind)
    padded = changed(clip.text.x_BLC, ~clip.text.valid_BL)
    assert not torch.equal(padded, clip.text.x_BLC)
    other = replace(clip, text=replace(clip.text, x_BLC=padded))
    assert torch.equal(clip.run(model, PLANS[plan]), other.run(model, PLANS[plan]))


@every_backbone
@every_plan
def test_samples_of_a_batch_do_not_meet(kind, plan):
    clip = sample((3, 2))
    model = build(kind)
    other = replace(
        clip, noise=changed(clip.noise, 1), text=replace(clip.text, x_BLC=changed(clip.text.x_BLC, 1))
    )
    a, b = clip.run(model, PLANS[plan]), other.run(model, PLANS[plan])
    assert torch.equal(a[0], b[0])
    assert not torch.equal(a[1], b[1])


@every_backbone
def test_one_caption_for_the_whole_batch_is_that_caption_for_each(kind):
    clip = sample()
    one = Text(clip.text.x_BLC[1:], clip.text.valid_BL[1:], clip.text.scene_BL)
    each = Text(one.x_BLC.expand(2, -1, -1), one.valid_BL.expand(2, -1), one.scene_BL)
    model = build(kind)
    a, b = (replace(clip, text=t).run(model, TextToVideo()) for t in (one, each))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


# --- what the output must depend on -------------------------------------------------------------------------


@every_backbone
def test_noise_level_and_words_matter(kind):
    clip, model = sample(), build(kind)
    out = clip.run(model, TextToVideo())
    told = replace(clip, text=replace(clip.text, x_BLC=changed(clip.text.x_BLC, slice(None), 0)))
    assert (told.run(model, TextToVideo()) - out).abs().mean() > 1e-3
    layout, streams = clip.streams(TextToVideo())
    louder = {n: replace(s, sigma_BK=s.sigma_BK * 0.5) for n, s in streams.items()}
    changed_out = read_video(layout, model(louder, layout.visibility)["video"])
    assert (changed_out - out).abs().mean() > 1e-3


@every_backbone
def test_the_order_of_frames_matters(kind):
    clip, model = sample(), build(kind)
    back = replace(clip, clean=clip.clean.flip(1), noise=clip.noise.flip(1))
    assert (back.run(model, TextToVideo()).flip(1) - clip.run(model, TextToVideo())).abs().mean() > 1e-3


def moved(kind: str, *by: float) -> Tensor:
    """The prediction for a clip that begins elsewhere: ``by`` (seconds, pixels down, pixels right). Some
    backbones read its cells in the picture, of 8 pixels."""
    layout, streams = sample().streams(TextToVideo())
    cells = torch.tensor([0, int(by[1] / 8), int(by[2] / 8)])
    video = replace(
        streams["video"],
        position_BN3=streams["video"].position_BN3 + torch.tensor(by),
        cell_BN3=streams["video"].cell_BN3 + cells,
    )
    return build(kind)({**streams, "video": video}, layout.visibility)["video"]


@every_backbone
def test_the_place_in_the_picture_matters(kind):
    """Within windows rotary positions are the same everywhere: only a global position tells them apart."""
    still = moved(kind, 0.0, 0.0, 0.0)
    assert (moved(kind, 0.0, 64.0, 0.0) - still).abs().mean() > 1e-3
    assert (moved(kind, 0.0, 0.0, 64.0) - still).abs().mean() > 1e-3


def test_within_windows_places_are_relative_and_matter():
    def run(by: float, order: Tensor) -> Tensor:
        clip, model = sample(rows=4), build("factorized", window_size=4)
        nn.init.zeros_(model.entry.place.project.weight)
        clip = replace(clip, noise=clip.noise[:, :, order], clean=clip.clean[:, :, order])
        layout, streams = clip.streams(TextToVideo())
        position_BN3 = streams["video"].position_BN3 + torch.tensor([0.0, by, by])
        video = replace(streams["video"], position_BN3=position_BN3)
        return read_video(layout, model({**streams, "video": video}, full)["video"])

    order = torch.arange(16).view(4, 4).flip(0).flatten()
    still = run(0.0, torch.arange(16))
    torch.testing.assert_close(run(200.0, torch.arange(16)), still, rtol=0, atol=1e-4)
    assert (run(0.0, order)[:, :, order] - still).abs().mean() > 1e-3


@every_backbone
def test_the_layers_that_latents_go_through_are_named(kind: str) -> None:
    """They are those whose shape is the latents'; nothing else of a model depends on them."""
    sound = {"audio_dim": 16} if kind == "joint" else {}
    config = ModelConfig(type=kind, dim=24, depth=1, num_heads=2, **sound)

    def shapes(channels: int) -> dict[str, torch.Size]:
        model = build_backbone(config, channels, TEXT_DIM, audio_channels=channels if sound else 0)
        assert isinstance(model, LatentFacing)
        return {name: tensor.shape for name, tensor in model.state_dict().items()}

    few, many = shapes(CHANNELS), shapes(CHANNELS + 1)
    layers = {name.rpartition(".")[0] for name in few if few[name] != many[name]}
    model = build_backbone(config, CHANNELS, TEXT_DIM, audio_channels=CHANNELS if sound else 0)
    assert layers == set(model.latent_layers)


@pytest.mark.parametrize("kind", ["factorized", "lightning"])
def test_where_time_is_relative_a_stream_may_go_on_for_ever(kind):
    torch.testing.assert_close(moved(kind, 32.0, 0.0, 0.0), moved(kind, 0.0, 0.0, 0.0), rtol=0, atol=1e-4)


@every_backbone
def test_frame_rate_matters(kind):
    clip, model = sample(), build(kind)
    slow = replace(clip, geometry=replace(clip.geometry, seconds_BF=clip.geometry.seconds_BF * 2))
    assert (slow.run(model, TextToVideo()) - clip.run(model, TextToVideo())).abs().mean() > 1e-3


def test_windows_far_apart_meet_after_two_blocks():
    """Shifting carries a cell's news into the next window; without a shift it would stay in its own."""
    clip = sample((1,), rows=2, columns=12)
    news = replace(clip, noise=changed(clip.noise, slice(None), slice(None), 0))

    def reached(depth: int) -> set[int]:
        model = build("factorized", depth=depth, window_size=4)
        differs = clip.run(model, TextToVideo()) != news.run(model, TextToVideo())
        return {cell % 12 for cell in differs.any(dim=3)[0, 0].nonzero().flatten().tolist()}

    assert reached(1) == set(range(4))
    assert reached(2) == set(range(6))


# --- gradients ----------------------------------------------------------------------------------------------


@every_backbone
@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("awake", [False, True])
def test_every_parameter_gets_a_gradient(kind, frames, awake):
    """One frame included: a parameter without one stops distributed training at the second step."""
    model = build(kind, awake=awake)
    (sample((frames,)).run(model, TextToVideo()) - 1.0).square().sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    if awake:
        # With a single frame there is nothing to weigh in time: its softmax is constant.
        idle = (
            {f"layers.{i}.time.norm.gain" for i in (0, 1)} if (kind, frames) == ("factorized", 1) else set()
        )
        assert {n for n, p in model.named_parameters() if not p.grad.any()} <= idle


@every_backbone
@every_plan
def test_recomputed_blocks_have_the_same_gradients(kind, plan):
    found = []
    for checkpoint_blocks in (False, True):
        model = build(kind, checkpoint_blocks=checkpoint_blocks).train()
        sample((3, 2)).run(model, PLANS[plan]).square().mean().backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@every_backbone
def test_dropout_draws_from_its_generator_and_only_in_training(kind):
    model, clip = build(kind, dropout=0.5), sample()

    def run(key: str) -> Tensor:
        model.dropout.generator = torch_generator(key)
        return clip.run(model, TextToVideo())

    assert torch.equal(run("a"), run("b"))
    model.train()
    state = torch.get_rng_state()
    assert torch.equal(run("a"), run("a"))
    assert (run("a") - run("b")).abs().mean() > 1e-3
    assert torch.equal(torch.get_rng_state(), state)


# --- scenes (Mask2DiT) --------------------------------------------------------------------------------------

THREE = (2, 3, 1)


def scene_clip(expand: bool = False) -> Sample:
    clip = sample(THREE)
    given = (clip.geometry.scene_BF < 2).expand(2, -1) if expand else torch.zeros(2, 6, dtype=torch.bool)
    return replace(clip, given=given)


def of_scene(clip: Sample, out: Tensor, scene: int) -> Tensor:
    return out[:, clip.geometry.scene_BF[0] == scene]


@every_backbone
def test_one_scene_is_plain_text_to_video(kind):
    clip, model = replace(sample(), given=torch.zeros(2, 5, dtype=torch.bool)), build(kind)
    assert close(clip.run(model, Scenes()), clip.run(model, TextToVideo()), 1e-5)


@every_backbone
@pytest.mark.parametrize("scene", range(3))
def test_a_caption_reaches_other_scenes_only_through_the_video(kind, scene):
    clip = scene_clip()
    own = clip.text.scene_BL[0] == scene
    told = replace(clip, text=replace(clip.text, x_BLC=changed(clip.text.x_BLC, slice(None), own)))
    for depth in (1, 2):
        model = build(kind, depth=depth)
        before, after = clip.run(model, Scenes()), told.run(model, Scenes())
        for other in range(3):
            same = torch.equal(of_scene(clip, before, other), of_scene(clip, after, other))
            # In lightning words are in the video before its first attention.
            deaf = other != scene and depth == 1 and kind != "lightning"
            assert same == deaf, (depth, other)


def test_words_do_not_see_the_video_of_other_scenes():
    clip = scene_clip()
    model = build("joint", depth=1)
    seen = []
    model.layers[0].register_forward_hook(lambda module, args, out: seen.append(out[:, : 3 * WORDS]))
    news = replace(clip, noise=changed(clip.noise, slice(None), clip.geometry.scene_BF[0] == 1))
    for one in (clip, news):
        one.run(model, Scenes())
    same = (seen[0] == seen[1]).all(dim=2).all(dim=0)
    assert same.tolist() == (clip.text.scene_BL[0] != 1).tolist()


@every_backbone
def test_given_scenes_enter_clean_and_their_noise_counts_for_nothing(kind):
    clip, model = scene_clip(expand=True), build(kind)
    _, streams = clip.streams(Scenes())
    given_N = clip.given.repeat_interleave(12, dim=1)
    assert torch.equal(streams["video"].x_BNC[given_N], clip.clean.flatten(1, 2)[given_N])
    assert not streams["video"].sigma_BN[given_N].any()
    assert not streams["text"].sigma_BN[:, clip.text.scene_BL[0] < 2].any()
    other = replace(clip, noise=changed(clip.noise, clip.given))
    assert torch.equal(clip.run(model, Scenes()), other.run(model, Scenes()))


@dataclass(frozen=True)
class SameSceneOnly(Visibility):
    """Nobody sees another scene, so that a given scene shows its own modulation and nothing else."""

    def allows(self, q, k):
        return q.scene_BN == k.scene_BN


@every_backbone
def test_given_tokens_and_their_words_are_modulated_at_noise_level_zero(kind):
    clip, model = scene_clip(expand=True), build(kind)
    outs = []
    for sigma in (clip.sigma, clip.sigma * 0.5):
        _, streams = replace(clip, sigma=sigma).streams(Scenes())
        outs.append(model(streams, SameSceneOnly())["video"].unflatten(1, (6, -1)))
    same = (outs[0] == outs[1]).flatten(2).all(dim=2).all(dim=0)
    assert same.tolist() == clip.given[0].tolist()


@every_backbone
def test_scenes_without_positions_have_no_order(kind):
    """With seconds that start anew in every scene, permuted scenes give permuted outputs."""
    clip = sample((2, 2, 2), dtype=torch.float64)
    seconds = torch.tensor([[0.0, 0.1] * 3])
    clip = replace(
        clip,
        geometry=replace(clip.geometry, seconds_BF=seconds),
        given=torch.zeros(2, 6, dtype=torch.bool),
        text=replace(clip.text, valid_BL=torch.ones_like(clip.text.valid_BL)),
    )
    frames, words = torch.tensor([4, 5, 0, 1, 2, 3]), torch.tensor([6, 7, 8, 0, 1, 2, 3, 4, 5])
    other = replace(
        clip,
        clean=clip.clean[:, frames],
        noise=clip.noise[:, frames],
        text=replace(clip.text, x_BLC=clip.text.x_BLC[:, words]),
    )
    model = build(kind, dtype=torch.float64)
    out = clip.run(model, Scenes())
    assert close(other.run(model, Scenes()), out[:, frames], 1e-10)
    assert not close(out[:, frames], out, 1e-3)


# --- causal chunks (CausVid) --------------------------------------------------------------------------------


@every_backbone
@pytest.mark.parametrize("forcing", ["diffusion", "teacher"])
@pytest.mark.parametrize("chunk", range(3))
def test_a_chunk_changes_nothing_before_it(kind, forcing, chunk):
    """Clean latents, noise and level of one chunk change; 5 frames in chunks of 2: the last is short."""
    plan, clip, model = Chunks(2, forcing=forcing), sample(), build(kind)
    frames = torch.arange(5) // 2 == chunk
    sigma = clip.sigma.clone()
    sigma[:, chunk] /= 2
    news = replace(
        clip,
        clean=changed(clip.clean, slice(None), frames),
        noise=changed(clip.noise, slice(None), frames),
        sigma=sigma,
    )
    before, after = clip.run(model, plan), news.run(model, plan)
    same = (before == after).flatten(2).all(dim=2).all(dim=0)
    assert same.tolist() == (torch.arange(5) // 2 < chunk).tolist()


@every_backbone
@pytest.mark.parametrize("forcing", ["diffusion", "teacher"])
@pytest.mark.parametrize("chunk", range(3))
def test_no_gradient_flows_to_later_chunks(kind, forcing, chunk):
    plan, model = Chunks(2, forcing=forcing), build(kind)
    clip = sample()
    clip = replace(clip, clean=clip.clean.requires_grad_(), noise=clip.noise.requires_grad_())
    frames = torch.arange(5) // 2
    clip.run(model, plan)[:, frames == chunk].square().sum().backward()
    for leaf in (clip.clean, clip.noise):
        reached = leaf.grad.flatten(2).ne(0).any(dim=2)
        assert not reached[:, frames > chunk].any()
    assert clip.noise.grad[:, frames == chunk].any()
    assert clip.clean.grad[:, frames < chunk].any() == (chunk > 0)


@every_backbone
def test_under_teacher_forcing_noise_never_reaches_another_chunk(kind):
    plan, clip, model = Chunks(2, forcing="teacher"), sample(), build(kind)
    news = replace(clip, noise=changed(clip.noise, slice(None), slice(0, 2)))
    same = (clip.run(model, plan) == news.run(model, plan)).flatten(2).all(dim=2).all(dim=0)
    assert same.tolist() == [False, False, True, True, True]


@every_backbone
def test_windows_and_sinks_bound_what_a_chunk_sees(kind):
    """Chunks of one frame, window 2, one sink. One block: what is out of sight is out of reach."""
    plan, clip, model = Chunks(1, window=2, sinks=1), sample((6,)), build(kind, depth=1)
    for frame, reaches in {0: {0, 1, 2, 3, 4, 5}, 1: {1, 2}, 3: {3, 4}}.items():
        news = replace(clip, noise=changed(clip.noise, slice(None), frame))
        differs = (clip.run(model, plan) != news.run(model, plan)).flatten(2).any(dim=2).any(dim=0)
        reached = set(differs.nonzero().flatten().tolist())
        # In a joint backbone video reaches no word, and in a factorized one none either.
        assert reached == reaches


@every_backbone
def test_equal_levels_in_one_chunk_are_the_bidirectional_model(kind):
    clip, model = sample(), build(kind)
    equal = replace(clip, sigma=clip.sigma[:, :1].expand(-1, 8))
    whole = equal.run(model, TextToVideo())
    # Words see video in the bidirectional joint model and not in the causal one; the rule is put back.
    layout, streams = equal.streams(Chunks(5))
    streams = {
        **streams,
        "text": replace(streams["text"], level_BN=torch.zeros_like(streams["text"].level_BN)),
    }
    rule = layout.visibility if kind == "factorized" else full
    assert close(read_video(layout, model(streams, rule)["video"]), whole, 1e-5)
    # Several chunks with equal levels differ from it by the mask alone.
    layout, streams = equal.streams(Chunks(2))
    streams = {
        **streams,
        "text": replace(streams["text"], level_BN=torch.zeros_like(streams["text"].level_BN)),
    }
    assert close(read_video(layout, model(streams, full)["video"]), whole, 1e-5)
    assert not close(read_video(layout, model(streams, layout.visibility)["video"]), whole, 1e-3)


# --- compilation --------------------------------------------------------------------------------------------


@every_backbone
@pytest.mark.parametrize("plan", ["text_to_video", "teacher forcing"])
def test_blocks_compile_without_a_break_and_once_for_all(kind, plan):
    torch._dynamo.reset()
    clip, model = sample((2, 1), rows=4), build(kind, depth=4)
    expected = clip.run(model, PLANS[plan])
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for block in model.blocks():
        block.compile(fullgraph=True, backend=counter)
    out = clip.run(model, PLANS[plan])
    out.sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    # The shifted windows of every other factorized block carry a mask: a second graph.
    assert counter.frame_count == {"factorized": 2}.get(kind, 1)
    torch._dynamo.reset()


@pytest.mark.slow
@every_backbone
def test_compiled_blocks_train_like_eager_ones(kind):
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        clip, model = sample(rows=5, columns=7), build(kind, window_size=4)
        if compiled:
            for block in model.blocks():
                block.compile(fullgraph=True)
        with torch.autocast("cpu", torch.bfloat16):
            out = clip.run(model, FIRST_FRAME)
        out.square().mean().backward()
        found.append((out, torch.cat([p.grad.flatten() for p in model.parameters()])))
    for eager, fast in zip(*found, strict=True):
        assert (fast - eager).norm() < 0.03 * eager.norm()
    torch._dynamo.reset()
