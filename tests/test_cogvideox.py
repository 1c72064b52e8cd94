"""CogVideoX against diffusers' class, its schedules, its positions, and Mask2DiT's rules on it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

from laid import EXPAND, FIRST_FRAME, lay, noised, read_video, video
from motionloom.backbones import cogvideox
from motionloom.backbones.cogvideox import ORIGINAL_KEYS, PRESETS, CogVideoX, CogVideoXSizes
from motionloom.backbones.cogvideox_sizes import SHIFTED_SCHEDULE, V1_SCHEDULE, schedule_from_diffusers
from motionloom.backbones.prediction import Predictor
from motionloom.config.recipe import Recipe
from motionloom.errors import UserError
from motionloom.flow import LINEAR, SOLVERS, DiscretePrediction, DiscreteSchedule, state_norm
from motionloom.generate import Sampling, Task, rollout
from motionloom.methods.objective import objective
from motionloom.nn.attention import Pattern, prepare_mask
from motionloom.nn.patching import patchify, unpatchify
from motionloom.plans import (
    Chunks,
    Geometry,
    Sample,
    Scenes,
    Text,
    TextToVideo,
    dense_mask,
    full,
)
from motionloom.plans.packing import pack
from motionloom.rng import torch_generator

TINY = PRESETS["tiny"]
ONE_FIVE = replace(TINY, patch_size_t=2, patch_bias=False, sample_height=20, sample_width=40)
KINDS: dict[str, CogVideoXSizes] = {
    "2b": replace(TINY, use_rotary_positional_embeddings=False, schedule=SHIFTED_SCHEDULE, norm_eps=1e-3),
    "5b": replace(TINY, attention_bias=False),
    "5b-i2v": replace(TINY, in_channels=32, use_learned_positional_embeddings=True),
    "1.5": replace(ONE_FIVE, out_channels=8, in_channels=8),
    "1.5-i2v": replace(ONE_FIVE, in_channels=32, ofs_embed_dim=16),
}
"""Everything that tells the published models apart, at toy size."""
WORDS = 8
every_kind = pytest.mark.parametrize("kind", KINDS)


def build(sizes: CogVideoXSizes, **options) -> CogVideoX:
    """A model in which every weight matters."""
    with torch.device("meta"):
        model = CogVideoX(sizes, **options)
    model = model.to_empty(device="cpu")
    generator = torch_generator("cogvideox")
    model.init_weights(generator)
    for name, tensor in model.state_dict().items():
        drawn = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(drawn * (0.2 if "norm" in name else max(tensor.shape[-1], 4) ** -0.5))
        if "norm" in name and name.endswith("norm.weight"):
            tensor.add_(1)
    return model


def theirs(model: CogVideoX) -> nn.Module:
    """diffusers' class with the same weights."""
    from diffusers import CogVideoXTransformer3DModel

    config = {key: value for key, value in model.sizes.to_diffusers().items() if not key.startswith("_")}
    other = CogVideoXTransformer3DModel(**config)
    other.load_state_dict(model.state_dict(), strict=True)
    return other.eval()


def rope(model: CogVideoX, frames: int, rows: int, columns: int) -> tuple[Tensor, Tensor] | None:
    """The tables that diffusers' pipeline makes for latents of this size."""
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import CogVideoXPipeline

    if not model.sizes.use_rotary_positional_embeddings:
        return None
    pipeline = SimpleNamespace(
        vae_scale_factor_spatial=8, transformer=SimpleNamespace(config=SimpleNamespace(**vars(model.sizes)))
    )
    make = CogVideoXPipeline._prepare_rotary_positional_embeddings
    return make(pipeline, rows * 8, columns * 8, frames, torch.device("cpu"))


class Clip:
    """Latents, words and what a plan makes of them. Latent sizes; two scenes split the frames evenly."""

    def __init__(
        self,
        sizes: CogVideoXSizes,
        grid: tuple[int, int, int] = (3, 8, 12),
        scenes: int = 1,
        batch: int = 2,
        words: int = WORDS,
    ) -> None:
        generator = torch_generator("clip", *grid, scenes)
        channels = sizes.out_channels

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.grid, self.sizes, self.words = grid, sizes, words
        self.clean, self.noise = draw(batch, *grid, channels), draw(batch, *grid, channels)
        self.extra = draw(batch, *grid, sizes.extra_channels) if sizes.extra_channels else None
        self.text = draw(batch, scenes * words, sizes.text_embed_dim)
        self.tokens = tuple(n // p for n, p in zip(grid, sizes.patch, strict=True))
        scene_F = torch.arange(scenes).repeat_interleave(self.tokens[0] // scenes)
        seconds = torch.arange(self.tokens[0])[None] / 4.0
        self.geometry = Geometry(self.tokens, seconds, (16.0, 16.0), scene_F[None], batch, scenes=scenes)
        self.scene_L = torch.arange(scenes).repeat_interleave(words)[None]
        self.sigma = torch.rand(batch, 8, generator=generator) * 0.9 + 0.05

    def layout(self, plan, given=None):
        text = Text(self.text, torch.ones(self.text.shape[:2], dtype=torch.bool), self.scene_L)
        return lay(plan, self.geometry, text, given), text

    def streams(self, plan, given=None, sigma: Tensor | None = None):
        layout, text = self.layout(plan, given)
        clean, noise = (patchify(x, self.sizes.patch) for x in (self.clean, self.noise))
        streams = noised(layout, clean, noise, self.sigma if sigma is None else sigma, text)
        streams = {**streams, "text": replace(streams["text"], valid_BN=None)}
        if self.extra is not None:
            extra = patchify(self.extra, self.sizes.patch)[:, video(layout).frame_T].flatten(1, 2)
            streams["video"] = replace(streams["video"], extra_BNC=extra)
        return layout, streams

    def run(self, model: CogVideoX, plan, given=None, sigma: Tensor | None = None) -> Tensor:
        """Velocities of the clip, (B, F, S, C)."""
        layout, streams = self.streams(plan, given, sigma)
        return read_video(layout, model(streams, layout.visibility)["video"])

    def latents(self, x_BNC: Tensor) -> Tensor:
        """Tokens -> diffusers' (B, F, C, H, W)."""
        cells = self.tokens[1] * self.tokens[2]
        x_BFHWC = unpatchify(x_BNC.unflatten(1, (-1, cells)), self.tokens, self.sizes.patch)
        return x_BFHWC.permute(0, 1, 4, 2, 3)

    def ask(self, other: nn.Module, model: CogVideoX, x_BNC: Tensor, t_B: Tensor) -> Tensor:
        """diffusers' v at tokens ``x_BNC``, as latents (B, F, C, H, W)."""
        x = self.latents(x_BNC)
        if self.extra is not None:
            x = torch.cat([x, self.extra.permute(0, 1, 4, 2, 3)], dim=2)
        offset = torch.full((1,), 2.0) if self.sizes.ofs_embed_dim else None
        tables = rope(model, *self.grid)
        return other(x, self.text, t_B, ofs=offset, image_rotary_emb=tables, return_dict=False)[0]


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# --- parity -------------------------------------------------------------------------------------------------


@every_kind
def test_network_and_gradients_equal_diffusers(kind):
    sizes = KINDS[kind]
    model, clip = build(sizes), Clip(sizes, (4, 8, 12))
    other = theirs(model)
    layout, streams = clip.streams(TextToVideo())
    t_B = torch.tensor([17, 812])
    x_BNC = streams["video"].x_BNC
    v_BNC = model.network(streams, layout.visibility, x_BNC, t_B[:, None], t_B[:, None])
    found, wanted = clip.latents(v_BNC), clip.ask(other, model, x_BNC, t_B)
    assert relative(found, wanted) < 1e-5
    weight = torch.randn(wanted.shape, generator=torch_generator("weight"))
    (found * weight).sum().backward()
    (wanted * weight).sum().backward()
    known = {name: parameter.grad for name, parameter in other.named_parameters()}
    # Softmax does not feel a shift of all keys: without RoPE the gradient of their bias is rounding alone.
    floor = 1e-5 * max(grad.norm() for grad in known.values())
    for name, parameter in model.named_parameters():
        error = (parameter.grad - known[name]).norm()
        assert error < 1e-4 * max(known[name].norm(), floor), name


@every_kind
@pytest.mark.parametrize("grid", [(2, 8, 12), (4, 6, 6), (4, 4, 20), (2, 2, 12), (2, 12, 16)])
def test_other_sizes_equal_diffusers(kind, grid):
    """On both sides of the trained proportions, and of the trained size."""
    sizes = KINDS[kind]
    if sizes.use_learned_positional_embeddings and grid[1:] != (8, 12):
        with pytest.raises(UserError, match="learned positions"):
            Clip(sizes, grid).run(build(sizes), TextToVideo())
        return
    model, clip = build(sizes), Clip(sizes, grid)
    layout, streams = clip.streams(TextToVideo())
    t_B = torch.tensor([999, 3])
    x_BNC = streams["video"].x_BNC
    found = clip.latents(model.network(streams, layout.visibility, x_BNC, t_B[:, None], t_B[:, None]))
    other = theirs(model)
    if sizes.use_learned_positional_embeddings:
        # For fewer frames diffusers makes new tables; the original takes the first of its own, as here.
        kept = sizes.max_text_seq_length + grid[0] * 24
        other.patch_embed.pos_embedding = other.patch_embed.pos_embedding[:, :kept]
        other.patch_embed.sample_frames = (grid[0] - 1) * 4 + 1
    assert relative(found, clip.ask(other, model, x_BNC, t_B)) < 1e-5


@every_kind
def test_velocity_is_the_networks_v_on_the_linear_path(kind):
    sizes = KINDS[kind]
    model, clip = build(sizes), Clip(sizes, (4, 8, 12))
    t_B = torch.tensor([0, 640])
    sigma = sizes.schedule.sigma(t_B)[:, None]
    layout, streams = clip.streams(TextToVideo(), sigma=sigma)
    x_BNC = streams["video"].x_BNC
    v = clip.ask(theirs(model), model, x_BNC / state_norm(sigma)[..., None], t_B)
    prediction = DiscretePrediction(sizes.schedule, "v")
    wanted = prediction.velocity(v, clip.latents(x_BNC), sigma[:, 0])
    assert relative(clip.latents(model(streams, layout.visibility)["video"]), wanted) < 1e-4


@pytest.mark.parametrize("kind", ["2b", "1.5"])
def test_sampling_equals_diffusers_ddim(kind):
    from diffusers import CogVideoXDDIMScheduler

    sizes = KINDS[kind]
    model, clip = build(sizes), Clip(sizes, (4, 8, 12))
    steps = 5  # divides 1000: else diffusers steps to levels that it does not visit
    other = theirs(model)
    scheduler = CogVideoXDDIMScheduler(
        rescale_betas_zero_snr=True,
        snr_shift_scale=sizes.schedule.snr_shift,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
        clip_sample=False,
    )
    assert schedule_from_diffusers(scheduler.config) == sizes.schedule
    layout, streams = clip.streams(TextToVideo())
    start_BNC = patchify(clip.noise, sizes.patch).flatten(1, 2)

    def velocity(x_BNC: Tensor, sigma: float) -> Tensor:
        sigma_BK = torch.full((2, 1), sigma)
        now = {name: replace(stream, sigma_BK=sigma_BK) for name, stream in streams.items()}
        now["video"] = replace(now["video"], x_BNC=x_BNC)
        return model(now, layout.visibility)["video"]

    with torch.no_grad():
        grid = sizes.schedule.grid(steps)
        made = SOLVERS["ddim"].run(velocity, sizes.schedule.start(start_BNC), grid, path=LINEAR)
        scheduler.set_timesteps(steps)
        x = clip.latents(start_BNC)
        for t in scheduler.timesteps:
            tokens = patchify(x.permute(0, 1, 3, 4, 2), sizes.patch).flatten(1, 2)
            v = clip.ask(other, model, tokens, t.expand(2))
            x = scheduler.step(v, t, x, return_dict=False)[0]
    assert relative(clip.latents(made), x) < 1e-4


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("scheduler", ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"])
def test_schedule_equals_diffusers(scheduler, shift, zero):
    import diffusers

    wanted = getattr(diffusers, scheduler)(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=zero,
        snr_shift_scale=shift,
        timestep_spacing="trailing",
    )
    found = schedule_from_diffusers(wanted.config)
    assert (found.alpha_bar() - wanted.alphas_cumprod).abs().max() < 1e-6
    for steps in (1, 3, 50, 51, 1000):
        wanted.set_timesteps(steps)
        assert torch.equal(found.grid(steps)[:-1], found.sigma(wanted.timesteps))
    assert len(found.grid(5000)) == 1001


def test_schedules_of_other_worlds_are_refused():
    with pytest.raises(UserError, match="v_prediction"):
        schedule_from_diffusers({"prediction_type": "epsilon"})
    with pytest.raises(UserError, match="spacing 'leading'"):
        schedule_from_diffusers({"prediction_type": "v_prediction"})
    with pytest.raises(UserError, match="snr_shift"):
        DiscreteSchedule(snr_shift=0.0)


# --- sizes and names ----------------------------------------------------------------------------------------

PUBLISHED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 64,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 16,
    "max_text_seq_length": 226,
    "norm_elementwise_affine": True,
    "norm_eps": 1e-05,
    "num_attention_heads": 30,
    "num_layers": 30,
    "out_channels": 16,
    "patch_size": 2,
    "sample_frames": 49,
    "sample_height": 60,
    "sample_width": 90,
    "spatial_interpolation_scale": 1.875,
    "temporal_compression_ratio": 4,
    "temporal_interpolation_scale": 1.0,
    "text_embed_dim": 4096,
    "time_embed_dim": 512,
    "timestep_activation_fn": "silu",
}
FIVE = {
    **PUBLISHED,
    "num_attention_heads": 48,
    "num_layers": 42,
    "use_rotary_positional_embeddings": True,
    "use_learned_positional_embeddings": False,
}
FIVE_T2 = {
    **FIVE,
    "ofs_embed_dim": None,
    "patch_bias": False,
    "patch_size_t": 2,
    "sample_frames": 81,
    "sample_height": 300,
    "sample_width": 300,
}
CONFIGS = {
    "cogvideox-2b": (PUBLISHED, 1.69),
    "cogvideox-5b": (FIVE, 5.57),
    "cogvideox-5b-i2v": ({**FIVE, "in_channels": 32, "use_learned_positional_embeddings": True}, None),
    "cogvideox1.5-5b": (FIVE_T2, None),
    "cogvideox1.5-5b-i2v": ({**FIVE_T2, "in_channels": 32, "ofs_embed_dim": 512}, None),
}


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("preset", CONFIGS)
def test_presets_equal_the_published_models(preset):
    """Names, shapes and parameter counts, on the meta device."""
    from diffusers import CogVideoXTransformer3DModel

    config, billions = CONFIGS[preset]
    sizes = CogVideoXSizes.from_diffusers({"_class_name": "CogVideoXTransformer3DModel", **config})
    assert sizes == PRESETS[preset]
    assert CogVideoXSizes.from_diffusers(sizes.to_diffusers()) == sizes
    with torch.device("meta"):
        ours, others = CogVideoX(sizes), CogVideoXTransformer3DModel(**config)
    assert shapes(ours) == shapes(others)
    found = sum(p.numel() for p in ours.parameters())
    assert found == sum(p.numel() for p in others.parameters())
    assert billions in (None, round(found / 1e9, 2))


@pytest.mark.parametrize(
    "entries, told",
    [
        ({"beta_start": "0.1"}, "beta_start is '0.1', expected a number above 0"),
        ({"beta_end": None}, "beta_end is None"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps is '1000', expected a whole number above 0"),
        ({"snr_shift_scale": None}, "snr_shift_scale is None"),
        ({"rescale_betas_zero_snr": 1}, "rescale_betas_zero_snr is 1, expected true or false"),
        ({"beta_schedule": ["linear"]}, r"beta_schedule is \('linear',\), expected a text"),
        ({"timestep_spacing": 3}, "timestep_spacing is 3"),
    ],
)
def test_a_scheduler_of_wrong_types_is_one_line(entries, told):
    with pytest.raises(UserError, match=f"scheduler_config.json: {told}"):
        schedule_from_diffusers({"prediction_type": "v_prediction", **entries})


def test_config_files_of_other_models_are_refused():
    for change, words in {
        "num_layers": "num_layers is 'many'",
        "_class_name": "reads CogVideoXTransformer3DModel",
        "dropout": "dropout is 'many'",
        "rope_theta": "does not know rope_theta",
    }.items():
        with pytest.raises(UserError, match=words):
            CogVideoXSizes.from_diffusers({**PUBLISHED, change: "many"})
    with pytest.raises(UserError, match="multiple of 16"):
        CogVideoXSizes.from_diffusers({**PUBLISHED, "attention_head_dim": 24})
    with pytest.raises(UserError, match="v_prediction"):
        CogVideoXSizes.from_diffusers(PUBLISHED, {"prediction_type": "epsilon"})


def original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published checkpoint of these diffusers weights, written out for the tiny model's two blocks."""
    old = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "ofs_embed.0": "ofs_embedding.linear_1",
        "ofs_embed.2": "ofs_embedding.linear_2",
        "mixins.patch_embed.proj": "patch_embed.proj",
        "mixins.patch_embed.text_proj": "patch_embed.text_proj",
        "transformer.final_layernorm": "norm_final",
        "mixins.final_layer.norm_final": "norm_out.norm",
        "mixins.final_layer.adaLN_modulation.1": "norm_out.linear",
        "mixins.final_layer.linear": "proj_out",
    }
    for i in range(2):
        layer, block = f"transformer.layers.{i}", f"transformer_blocks.{i}"
        old[f"{layer}.input_layernorm"] = f"{block}.norm1.norm"
        old[f"{layer}.post_attention_layernorm"] = f"{block}.norm2.norm"
        old[f"{layer}.attention.dense"] = f"{block}.attn1.to_out.0"
        old[f"{layer}.mlp.dense_h_to_4h"] = f"{block}.ff.net.0.proj"
        old[f"{layer}.mlp.dense_4h_to_h"] = f"{block}.ff.net.2"
        old[f"mixins.adaln_layer.query_layernorm_list.{i}"] = f"{block}.attn1.norm_q"
        old[f"mixins.adaln_layer.key_layernorm_list.{i}"] = f"{block}.attn1.norm_k"
    found = {}
    for kind in ("weight", "bias"):
        found |= {f"{a}.{kind}": state[f"{b}.{kind}"] for a, b in old.items() if f"{b}.{kind}" in state}
        for i in range(2):
            block = f"transformer_blocks.{i}"
            qkv = [state[f"{block}.attn1.to_{n}.{kind}"] for n in "qkv"]
            found[f"transformer.layers.{i}.attention.query_key_value.{kind}"] = torch.cat(qkv)
            one, two = (state[f"{block}.norm{n}.linear.{kind}"].chunk(2) for n in (1, 2))
            rows = torch.cat([one[0], two[0], one[1], two[1]])
            found[f"mixins.adaln_layer.adaLN_modulations.{i}.1.{kind}"] = rows
    if "patch_embed.pos_embedding" in state:
        found["mixins.pos_embed.pos_embedding"] = state["patch_embed.pos_embedding"]
    return {f"model.diffusion_model.{name}": tensor for name, tensor in found.items()}


@pytest.mark.parametrize("kind", [k for k in KINDS if KINDS[k].attention_bias])
def test_original_names_both_ways(kind):
    state = build(KINDS[kind]).state_dict()
    published = original(state)

    def carried(origins, source):
        return {
            name: torch.cat([source[p.name].chunk(p.of)[p.index] for p in pieces])
            for name, pieces in origins.items()
        }

    junk = {"model.diffusion_model.mixins.pos_embed.freqs_sin": torch.zeros(1)}
    found = carried(ORIGINAL_KEYS.to_diffusers({**published, **junk}), published)
    back = carried(ORIGINAL_KEYS.to_original(state), state)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert back.keys() == published.keys()
    assert all(torch.equal(back[name], published[name]) for name in published)
    assert all(f"model.diffusion_model.{mark}" in published for mark in ORIGINAL_KEYS.marks)


# --- noise levels per token, and plans ----------------------------------------------------------------------


def changed(tensor: Tensor, *index: object) -> Tensor:
    other = tensor.clone()
    other[index] = 3.0 - other[index]
    return other


@every_kind
def test_equal_levels_per_token_are_one_level(kind):
    sizes = KINDS[kind]
    model, clip = build(sizes), Clip(sizes, (4, 8, 12))
    sigma = clip.sigma[:, :1]
    plan = Chunks(1)
    layout, _ = clip.layout(plan)
    _, streams = clip.streams(plan, sigma=sigma.expand(-1, video(layout).num_draws))
    assert streams["video"].sigma_BK.shape[1] > 1
    streams["text"] = replace(streams["text"], level_BN=torch.zeros_like(clip.scene_L))
    several = model(streams, full)["video"]
    assert relative(several, clip.run(model, TextToVideo(), sigma=sigma).flatten(1, 2)) < 1e-5
    streams["video"] = replace(streams["video"], sigma_BK=changed(streams["video"].sigma_BK, 0, -2))
    assert relative(model(streams, full)["video"], several) > 1e-3


@pytest.mark.parametrize("scenes", [2, 4])
def test_one_block_binds_captions_to_scenes(scenes):
    """Mask2DiT: text i reaches the video of scene j only through the video of scene i, so in block 2."""
    for layers in (1, 2):
        model = build(replace(TINY, num_layers=layers))
        clip = Clip(TINY, (4, 8, 12), scenes)
        before = clip.run(model, Scenes())
        clip.text = changed(clip.text, slice(None), slice(0, WORDS))
        moved = (clip.run(model, Scenes()) != before).flatten(2).any(2).any(0)
        own = clip.geometry.scene_BF[0] == 0
        assert moved[own].all()
        assert bool(moved[~own].any()) == (layers == 2)


def test_words_see_only_their_own_scene():
    """Mask2DiT: text i after one block does not depend on video j."""
    model, clip = build(replace(TINY, num_layers=1)), Clip(TINY, (4, 8, 12), 2)
    seen: list[Tensor] = []
    model.blocks()[0].register_forward_hook(lambda module, args, out: seen.append(out[:, : 2 * WORDS]))
    clip.run(model, Scenes())
    clip.clean = changed(clip.clean, slice(None), slice(2, 4))
    clip.run(model, Scenes())
    assert torch.equal(seen[0][:, :WORDS], seen[1][:, :WORDS])
    assert not torch.equal(seen[0][:, WORDS:], seen[1][:, WORDS:])


def test_one_scene_is_the_base():
    model, clip = build(TINY), Clip(TINY)
    assert relative(clip.run(model, Scenes()), clip.run(model, TextToVideo())) < 1e-5


def test_given_scenes_are_clean_and_at_level_zero():
    """Mask2DiT's second mask: no noise reaches given scenes, and they and their captions carry emb(0)."""
    model, clip = build(TINY), Clip(TINY, (4, 8, 12), 2)
    given = (clip.geometry.scene_BF == 0).expand(2, -1)
    levels: list[Tensor] = []
    model.time_embedding.register_forward_pre_hook(lambda module, args: levels.append(args[0]))
    _, streams = clip.streams(Scenes(EXPAND), given)
    video, text = streams["video"], streams["text"]
    clean = patchify(clip.clean, TINY.patch)
    assert torch.equal(video.x_BNC.unflatten(1, (4, -1))[:, :2], clean[:, :2])
    before = clip.run(model, Scenes(EXPAND), given)
    t_text, t_video = levels
    assert (t_text.gather(1, text.level_BN.expand(2, -1))[:, :WORDS] == 0).all()
    assert (t_video.gather(1, video.level_BN.expand(2, -1)).unflatten(1, (4, -1))[:, :2] == 0).all()
    assert (t_text.gather(1, text.level_BN.expand(2, -1))[:, WORDS:] > 0).all()
    clip.noise = changed(clip.noise, slice(None), slice(0, 2))
    assert torch.equal(clip.run(model, Scenes(EXPAND), given)[:, 2:], before[:, 2:])
    clip.clean = changed(clip.clean, slice(None), slice(0, 2))
    assert not torch.equal(clip.run(model, Scenes(EXPAND), given)[:, 2:], before[:, 2:])


def test_causal_chunks_do_not_see_the_future():
    model, clip = build(TINY), Clip(TINY, (4, 8, 12))
    plan = Chunks(2)
    before = clip.run(model, plan)
    clip.noise = changed(clip.noise, slice(None), slice(2, 4))
    after = clip.run(model, plan)
    assert torch.equal(after[:, :2], before[:, :2])
    assert not torch.equal(after[:, 2:], before[:, 2:])


@pytest.mark.parametrize(
    "plan, frames", [(Scenes(EXPAND), 6), (Chunks(2, window=1, sinks=1, forcing="teacher"), 4)]
)
def test_every_way_to_attend_equals_a_dense_mask(plan, frames, monkeypatch):
    """Forward and gradients in float64, at a size where structure is used."""

    def dense(visibility, q, k, valid_BK):
        mask_BQK = dense_mask(visibility, q, k, valid_BK)
        assert mask_BQK is not None
        return prepare_mask(mask_BQK[:, None])

    clip, found, lowered = Clip(TINY, (frames, 16, 24), 2, batch=1), [], []
    for lower in (cogvideox.lower, dense):
        monkeypatch.setattr(
            cogvideox, "lower", lambda *a, lower=lower: lowered.append(lower(*a)) or lowered[-1]
        )
        model = build(TINY).double()
        layout, streams = clip.streams(plan)
        streams = {name: replace(s, x_BNC=s.x_BNC.double()) for name, s in streams.items()}
        out = model(streams, layout.visibility)["video"]
        out.square().mean().backward()
        found.append([out, *(p.grad for p in model.parameters())])
    assert isinstance(lowered[0], Pattern)
    floor = 1e-6 * max(t.norm() for t in found[0][1:])
    for fast, slow in zip(*found, strict=True):
        assert (fast - slow).norm() < 1e-10 * max(slow.norm(), floor)


def test_padding_in_the_text_has_no_influence_when_it_is_marked():
    model, clip = build(TINY), Clip(TINY)
    found = []
    for _ in range(2):
        layout, streams = clip.streams(FIRST_FRAME)
        valid = torch.ones(2, WORDS, dtype=torch.bool)
        valid[0, 5:] = False
        streams["text"] = replace(streams["text"], valid_BN=valid)
        found.append(model(streams, layout.visibility)["video"])
        clip.text = changed(clip.text, 0, slice(5, None))
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", ["2b", "5b", "1.5"])
def test_a_packed_row_of_several_sizes_equals_its_samples(kind):
    """Positions go by the size of each sample."""
    sizes = KINDS[kind]
    model = build(sizes).double()
    samples = []
    for grid in ((2, 8, 12), (4, 4, 20), (2, 2, 12)):
        layout, streams = Clip(sizes, grid, batch=1).streams(FIRST_FRAME)
        samples.append({name: replace(s, x_BNC=s.x_BNC.double()) for name, s in streams.items()})
    alone = [model(streams, layout.visibility)["video"] for streams in samples]
    packed = pack(samples, layout.visibility)
    together = packed.unpack(model(packed.streams, packed.visibility))
    for one, answer in zip(alone, together, strict=True):
        assert relative(answer["video"], one) < 1e-10


def test_learned_positions_count_frames_not_copies_of_them():
    sizes = KINDS["5b-i2v"]
    model = build(sizes)
    teacher = Chunks(1, forcing="teacher")  # the past stands in the sequence twice
    assert Clip(sizes, (4, 8, 12)).run(model, teacher).isfinite().all()
    with pytest.raises(UserError, match=r"up to 4 x 4 x 6 .* is given 5 x 4 x 6"):
        Clip(sizes, (5, 8, 12)).run(model, TextToVideo())


def test_image_channels_must_come_where_they_are_read():
    _, plain = Clip(TINY).streams(TextToVideo())
    _, pictured = Clip(KINDS["5b-i2v"]).streams(TextToVideo())
    with pytest.raises(UserError, match="16 channels of a given image"):
        build(KINDS["5b-i2v"])(plain, full)
    with pytest.raises(UserError, match="0 channels of a given image"):
        build(TINY)(pictured, full)


# --- weights, compile, precision ----------------------------------------------------------------------------


@every_kind
def test_weights_come_from_the_generator_and_a_new_model_answers_v_zero(kind):
    with torch.device("meta"):
        empty = CogVideoX(KINDS[kind])
    state = torch.get_rng_state()
    models = []
    for _ in range(2):
        model = empty.to_empty(device="cpu")
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan"))
        model.init_weights(torch_generator("run"))
        models.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        empty = model
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert all(tensor.isfinite().all() for tensor in models[0].values())
    clip = Clip(KINDS[kind], (2, 8, 12))
    layout, streams = clip.streams(TextToVideo())
    t = torch.tensor([[5], [900]])
    assert not model.network(streams, layout.visibility, streams["video"].x_BNC, t, t).any()


def test_recomputed_blocks_have_the_same_gradients():
    clip, found = Clip(TINY), []
    for again in (False, True):
        model = build(TINY, checkpoint_blocks=again)
        clip.run(model, FIRST_FRAME).square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "kind, plan", [("2b", TextToVideo()), ("5b", Scenes(EXPAND)), ("1.5-i2v", FIRST_FRAME)]
)
def test_blocks_compile_without_a_graph_break(kind, plan):
    sizes = KINDS[kind]
    model, clip = build(sizes), Clip(sizes, (4, 8, 12), 2)
    wanted = clip.run(model, plan)
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    for block in model.blocks():
        block.compile(backend=counter, fullgraph=True)
    assert relative(clip.run(model, plan), wanted) < 1e-6
    assert counter.frame_count == 1, "one graph serves all blocks"


def test_bf16_autocast_follows_float32():
    model, clip = build(TINY), Clip(TINY)
    exact = clip.run(model, FIRST_FRAME)
    with torch.autocast("cpu", torch.bfloat16):
        rough = clip.run(model, FIRST_FRAME)
    assert rough.dtype == torch.float32
    assert 1e-5 < relative(rough, exact) < 0.03
    assert clip.run(model.bfloat16(), FIRST_FRAME).isfinite().all()


# --- its own noise levels, in sampling and in training ------------------------------------------------------


@pytest.mark.parametrize("solver, end", [("ddim", []), ("heun", [0.0])])
def test_rollouts_visit_trained_levels_only(solver, end):
    """Whatever the recipe's sampling says; frames of an even clip, no schedule asked for. Heun also asks at
    the clean end, which goes in as the cleanest level."""
    model, clip = build(TINY), Clip(TINY)
    asked: list[Tensor] = []
    model.time_embedding.register_forward_pre_hook(lambda module, args: asked.append(args[0]))
    _, text = clip.layout(TextToVideo())
    noise = patchify(clip.noise, TINY.patch)
    sampling = Sampling(solver=solver, steps=5, shift=7.0)
    task = Task(Sample({"video": clip.geometry}), text, {"video": noise})
    made = rollout(Predictor(model), TextToVideo(), task, sampling)["video"]
    assert made.isfinite().all()
    visited = sorted({round(t, 2) for t_BK in asked for t in t_BK.flatten().tolist()})
    assert visited == [*end, 199.0, 399.0, 599.0, 799.0, 999.0]


def test_training_draws_trained_levels_only():
    recipe = Recipe(
        model={"type": "cogvideox", "preset": "tiny", "patch": (1, 2, 2)}, train={"objective": "ddpm_v"}
    )
    levels = V1_SCHEDULE.sigma(torch.arange(1000))
    drawn = objective(recipe, build(TINY).schedule).draw((64, 2), torch_generator("levels"))
    assert torch.isin(drawn, levels).all()
    others = objective(recipe).draw((64, 2), torch_generator("levels"))
    assert not torch.isin(others, levels).all()
