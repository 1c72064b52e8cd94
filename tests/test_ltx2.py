"""LTX-2 against diffusers' class; and what that does not have: levels per token, causality, a cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from motionloom.backbones.base import Perturbation
from motionloom.backbones.ltx2 import LTX2, ORIGINAL_KEYS, PRESETS, LTX2Sizes
from motionloom.backbones.ltx2_reach import cross_levels
from motionloom.errors import UserError
from motionloom.nn.attention import pinned
from motionloom.plans import Visibility, causal_chunks, full, same_scene
from motionloom.plans.stream import Stream, Streams
from motionloom.plans.visibility import TeacherForcing
from motionloom.rng import torch_generator
from motionloom.tokenizers.base import TokenizerSpec

TINY, TINY23 = PRESETS["tiny"], PRESETS["tiny2.3"]
SIZES: dict[str, LTX2Sizes] = {
    "2.0": TINY,
    "2.0 interleaved": replace(TINY, rope_type="interleaved", rope_double_precision=False),
    "2.3": TINY23,
    # Heads of 20 leave pairs over when they are dealt to three axes.
    "2.3 interleaved": replace(TINY23, rope_type="interleaved", attention_head_dim=20),
    "2.3 other scales": replace(TINY23, cross_attn_timestep_scale_multiplier=1, pos_embed_max_pos=10),
    "2.5": replace(
        TINY23, ff_bias=False, use_prompt_adaln_single=False, use_keyframes_abs_pos_embedding=True
    ),
}
GRID, SOUND, WORDS, BATCH, FPS = (4, 2, 3), 9, 5, 2, 24.0
VIDEO = GRID[0] * GRID[1] * GRID[2]

every_size = pytest.mark.parametrize("kind", SIZES)


def reference(sizes: LTX2Sizes) -> nn.Module:
    """diffusers' model of these sizes, all of its parameters drawn."""
    from diffusers import LTX2VideoTransformer3DModel

    # diffusers skips self-attention only where it was built for that; the weights are the same.
    model = LTX2VideoTransformer3DModel.from_config({**sizes.to_diffusers(), "perturbed_attn": True})
    draw(model, "reference")
    return model


def draw(model: nn.Module, *key: object) -> None:
    """Every parameter anew, none of them zero, so that everything matters."""
    generator = torch_generator(*key)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def build(sizes: LTX2Sizes, **options: bool) -> LTX2:
    model = LTX2(sizes, **options)
    draw(model, "ours")
    return model


def twins(sizes: LTX2Sizes) -> tuple[LTX2, nn.Module]:
    """Our model and diffusers', with equal weights."""
    ours, theirs = LTX2(sizes), reference(sizes)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def stream(modality: str, x_BNC: Tensor, sigma_BK: Tensor, **fields: object) -> Stream:
    """Tokens of one chunk, one scene, one level and without a place, but for what ``fields`` say."""
    nothing = torch.zeros(1, x_BNC.shape[1], dtype=torch.long)
    given = {
        "grid": (1, 1, x_BNC.shape[1]),
        "level_BN": nothing,
        "position_BN3": torch.zeros(1, x_BNC.shape[1], 3),
        "cell_BN3": nothing[..., None].expand(-1, -1, 3),
        "scene_BN": nothing,
        "chunk_BN": nothing,
        "context_BN": nothing.bool(),
        "loss_BN": nothing.float(),
        **fields,
    }
    return Stream(modality=modality, x_BNC=x_BNC, sigma_BK=sigma_BK, **given)  # type: ignore[arg-type]


def video_cells() -> Tensor:
    return torch.cartesian_prod(*(torch.arange(side) for side in GRID))[None]


def video_positions() -> Tensor:
    """Centres, by the project's own rule: 32 pixels a cell, groups of 8 frames after a first one alone."""
    seconds = TokenizerSpec(128, 32, 8, first_alone=True).seconds(GRID[0], FPS)
    cells = video_cells()
    return torch.cat([seconds[cells[..., :1]], (cells[..., 1:] + 0.5) * 32], dim=-1)


def sound_positions() -> Tensor:
    """Centres of the causal audio latents: 4 mel frames of 10 ms each after a first one alone."""
    seconds = TokenizerSpec(128, 1, 4, first_alone=True).seconds(SOUND, 100.0)
    return nn.functional.pad(seconds[None, :, None], (0, 2))


def make(sizes: LTX2Sizes, *, frame_sigma: bool = False, mask: bool = True, batch: int = BATCH) -> Streams:
    """Video, audio and text; one noise level for all, and with ``frame_sigma`` a clean first frame."""
    generator = torch_generator("streams", batch)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    sigma_B1 = torch.rand(batch, 1, generator=generator) * 0.8 + 0.1
    cells = video_cells()
    given_1N = (cells[..., 0] == 0) & frame_sigma
    valid = torch.ones(batch, WORDS, dtype=torch.bool)
    valid[0, -2:] = not mask
    video = stream(
        "video",
        normal(VIDEO, sizes.in_channels),
        torch.cat([sigma_B1, torch.zeros_like(sigma_B1)], dim=1) if frame_sigma else sigma_B1,
        grid=GRID,
        level_BN=given_1N.long(),
        position_BN3=video_positions(),
        cell_BN3=cells,
    )
    audio = stream("audio", normal(SOUND, sizes.audio_in_channels), sigma_B1, position_BN3=sound_positions())
    text = stream("text", normal(WORDS, sum(sizes.text_channels)), sigma_B1, valid_BN=valid)
    return {"video": video, "audio": audio, "text": text}


def theirs_of(
    sizes: LTX2Sizes, model: nn.Module, streams: Streams, **options: object
) -> tuple[Tensor, Tensor]:
    """diffusers' answer for the same streams."""
    video, audio, text = (streams[m] for m in ("video", "audio", "text"))
    video_text, audio_text = text.x_BNC.split(sizes.text_channels, dim=-1)
    if sizes.use_keyframes_abs_pos_embedding:
        options["video_keyframes_mask"] = (video.cell_BN3[..., :1] == 0).expand(len(video.x_BNC), -1, -1)
    return model(
        hidden_states=video.x_BNC,
        audio_hidden_states=audio.x_BNC,
        encoder_hidden_states=video_text,
        audio_encoder_hidden_states=audio_text,
        timestep=video.sigma_BN * 1000,
        audio_timestep=audio.sigma_BN * 1000,
        sigma=video.sigma_BN.amax(1) * 1000,
        audio_sigma=audio.sigma_BN.amax(1) * 1000,
        encoder_attention_mask=text.valid_BN,
        audio_encoder_attention_mask=text.valid_BN,
        num_frames=GRID[0],
        height=GRID[1],
        width=GRID[2],
        fps=FPS,
        audio_num_frames=SOUND,
        return_dict=False,
        **{"use_cross_timestep": True, **options},
    )


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1e-20))


# --- parity -------------------------------------------------------------------------------------------------


@every_size
@pytest.mark.parametrize("frame_sigma", [False, True])
def test_answers_and_gradients_are_diffusers_own(kind, frame_sigma):
    """Both outputs, with padded text, one level or a clean first frame, positions by the project's rule."""
    sizes = SIZES[kind]
    ours, theirs = twins(sizes)
    streams = make(sizes, frame_sigma=frame_sigma)
    found = ours(streams, full)
    wanted = dict(zip(("video", "audio"), theirs_of(sizes, theirs, streams), strict=True))
    for modality in found:
        assert distance(found[modality], wanted[modality]) < 1e-5
    for answers in (found, wanted):
        sum(answer.square().mean() for answer in answers.values()).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert max(distance(p.grad, gradients[name]) for name, p in ours.named_parameters()) < 1e-4


@pytest.mark.parametrize("kind", ["2.0", "2.5"])
def test_streams_may_have_levels_of_their_own(kind):
    """A film given clean for a sound, and the reverse: each is modulated by the other's level."""
    sizes = SIZES[kind]
    ours, theirs = twins(sizes)
    streams = make(sizes)
    for modality in ("video", "audio"):
        given = replace(streams[modality], sigma_BK=torch.zeros(BATCH, 1))
        clean = {**streams, modality: given}
        wanted = theirs_of(sizes, theirs, clean)
        for found, want in zip(ours(clean, full).values(), wanted, strict=True):
            assert distance(found, want) < 1e-5


def test_equal_levels_are_the_originals_without_cross_timestep():
    """LTX-2's first release modulated by the stream's own level; where all are equal that is the same."""
    sizes = SIZES["2.0"]
    ours, theirs = twins(sizes)
    streams = make(sizes)
    wanted = theirs_of(sizes, theirs, streams, use_cross_timestep=False)
    for found, want in zip(ours(streams, full).values(), wanted, strict=True):
        assert distance(found, want) < 1e-5


@every_size
@pytest.mark.parametrize("blocks, isolate", [((1,), False), ((0, 1), False), ((), True), ((0,), True)])
def test_perturbed_answers_are_diffusers_own(kind, blocks, isolate):
    sizes = SIZES[kind]
    ours, theirs = twins(sizes)
    streams = make(sizes)
    found = ours(streams, full, perturb=Perturbation(blocks, isolate))
    wanted = theirs_of(
        sizes, theirs, streams, isolate_modalities=isolate, spatio_temporal_guidance_blocks=list(blocks)
    )
    plain = ours(streams, full)
    for modality, want in zip(found, wanted, strict=True):
        assert distance(found[modality], want) < 1e-5
        assert distance(found[modality], plain[modality]) > 1e-3


@every_size
def test_one_stream_alone_is_the_isolated_one(kind):
    sizes = SIZES[kind]
    ours, theirs = twins(sizes)
    streams = make(sizes)
    wanted = theirs_of(sizes, theirs, streams, isolate_modalities=True)
    for modality, want in zip(("video", "audio"), wanted, strict=True):
        alone = {m: s for m, s in streams.items() if m in (modality, "text")}
        found = ours(alone, full)
        assert list(found) == [modality]
        assert distance(found[modality], want) < 1e-5


@pytest.mark.parametrize("frames, fps", [(1, 24.0), (16, 25.0), (12, 30.0)])
def test_positions_are_the_midpoints_of_the_originals_intervals(frames, fps):
    """In seconds, for common rates; the first latent frame covers one pixel frame."""
    theirs = reference(TINY)
    intervals = theirs.rope.prepare_video_coords(1, frames, 2, 2, "cpu", fps=fps)
    seconds = TokenizerSpec(128, 32, 8, first_alone=True).seconds(frames, fps)
    torch.testing.assert_close(intervals[0, 0].mean(-1).view(frames, 4)[:, 0], seconds)
    intervals = theirs.audio_rope.prepare_audio_coords(1, 25 * frames, "cpu")
    seconds = TokenizerSpec(128, 1, 4, first_alone=True).seconds(25 * frames, 100.0)
    torch.testing.assert_close(intervals[0, 0].mean(-1), seconds)


# --- sizes and names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, parameters",
    [*((kind, None) for kind in SIZES), ("ltx2-19b", 18_876_174_592), ("ltx2.3-22b", 18_988_838_144)],
)
def test_names_and_shapes_are_diffusers_own(kind, parameters):
    """And as many as published: 19 B; 22 B, of which 3,172,227,584 are the text connectors."""
    from diffusers import LTX2VideoTransformer3DModel

    sizes = SIZES.get(kind) or PRESETS[kind]
    with torch.device("meta"):
        ours, theirs = LTX2(sizes), LTX2VideoTransformer3DModel.from_config(sizes.to_diffusers())
    shapes = [{name: t.shape for name, t in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert parameters in (None, sum(p.numel() for p in ours.parameters()))


@pytest.mark.parametrize("kind", [*SIZES, *PRESETS])
def test_config_goes_out_and_comes_back(kind):
    from diffusers import LTX2VideoTransformer3DModel

    sizes = SIZES.get(kind) or PRESETS[kind]
    assert LTX2Sizes.from_diffusers(sizes.to_diffusers()) == sizes
    shallow = replace(sizes, num_layers=1)
    with torch.device("meta"):
        theirs = LTX2VideoTransformer3DModel.from_config(shallow.to_diffusers())
    assert LTX2Sizes.from_diffusers(dict(theirs.config)) == shallow


def test_defaults_are_diffusers_own():
    from diffusers import LTX2VideoTransformer3DModel

    with torch.device("meta"):
        theirs = LTX2VideoTransformer3DModel(num_layers=1)
    assert LTX2Sizes.from_diffusers(dict(theirs.config)) == LTX2Sizes(num_layers=1)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm'"),
        ({"out_channels": 3}, "out_channels is 3"),
        ({"cross_attention_dim": 3}, "cross_attention_dim is 3"),
        ({"rope_type": "flat"}, "rope_type is 'flat'"),
        ({"audio_num_attention_heads": 4}, "make them equal"),
        ({"num_experts": 8}, "does not know num_experts"),
        ({"num_layers": "many"}, "num_layers is 'many'"),
    ],
)
def test_what_is_not_built_is_refused_in_one_line(change, told):
    with pytest.raises(UserError) as error:
        LTX2Sizes.from_diffusers({**TINY.to_diffusers(), **change})
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_text_of_other_channels_is_refused():
    model, streams = build(TINY), make(TINY)
    text = replace(streams["text"], x_BNC=streams["text"].x_BNC[..., 1:])
    with pytest.raises(UserError, match="23 channels, these weights read 24: 12 for the video and 12 for"):
        model({**streams, "text": text}, full)


def original_names(sizes: LTX2Sizes) -> list[str]:
    """The published names, spelled out from how the authors' modules are nested."""
    adaln = {"adaln_single", "av_ca_video_scale_shift_adaln_single", "av_ca_a2v_gate_adaln_single"}
    adaln |= {"audio_adaln_single", "av_ca_audio_scale_shift_adaln_single", "av_ca_v2a_gate_adaln_single"}
    if sizes.text_modulated:
        adaln |= {"prompt_adaln_single", "audio_prompt_adaln_single"}
    ends = {"patchify_proj", "audio_patchify_proj", "proj_out", "audio_proj_out"}
    ends |= {f"{a}.{part}" for a in adaln for part in ("linear", *_EMBEDDER)}
    if sizes.use_prompt_embeddings:
        ends |= {f"{p}caption_projection.linear_{i}" for p in ("", "audio_") for i in (1, 2)}
    names = {f"{end}.{kind}" for end in ends for kind in ("weight", "bias")}
    names |= {"scale_shift_table", "audio_scale_shift_table"}
    attentions = [
        "attn1",
        "attn2",
        "audio_attn1",
        "audio_attn2",
        "audio_to_video_attn",
        "video_to_audio_attn",
    ]
    layers = ["to_q", "to_k", "to_v", "to_out.0", *(["to_gate_logits"] if sizes.gated_attn else [])]
    for block in range(sizes.num_layers):
        inside = {
            f"{a}.{layer}.{kind}" for a in attentions for layer in layers for kind in ("weight", "bias")
        }
        inside |= {f"{a}.{norm}.weight" for a in attentions for norm in ("q_norm", "k_norm")}
        for ff in ("ff", "audio_ff"):
            inside |= {f"{ff}.net.{i}.{kind}" for i in ("0.proj", "2") for kind in ("weight", "bias")}
        inside |= {"scale_shift_table", "audio_scale_shift_table"}
        inside |= {"scale_shift_table_a2v_ca_video", "scale_shift_table_a2v_ca_audio"}
        if sizes.text_modulated:
            inside |= {"prompt_scale_shift_table", "audio_prompt_scale_shift_table"}
        names |= {f"transformer_blocks.{block}.{name}" for name in inside}
    return sorted(f"model.diffusion_model.{name}" for name in names)


_EMBEDDER = ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2")


@pytest.mark.parametrize("sizes", [TINY, TINY23])
def test_original_names_become_diffusers_names_and_return(sizes):
    names = original_names(sizes)
    others = [
        "vae.encoder.conv_in.conv.weight",
        "audio_vae.decoder.conv_in.conv.weight",
        "vocoder.ups.0.weight",
    ]
    others += ["model.diffusion_model.video_embeddings_connector.learnable_registers"]
    mapped = ORIGINAL_KEYS.to_diffusers([*names, *others])
    assert sorted(mapped) == sorted(LTX2(sizes).state_dict())
    assert sorted(ORIGINAL_KEYS.to_original(mapped)) == names
    bare = [name.removeprefix("model.diffusion_model.") for name in names]
    assert set(ORIGINAL_KEYS.marks) <= set(bare)


def test_original_names_map_as_diffusers_converts_them():
    from diffusers.loaders.single_file_utils import convert_ltx2_transformer_to_diffusers

    names = original_names(TINY)
    theirs = convert_ltx2_transformer_to_diffusers({name: name for name in names})
    ours = {new: origin[0].name for new, origin in ORIGINAL_KEYS.to_diffusers(names).items()}
    assert ours == theirs


# --- levels per token ---------------------------------------------------------------------------------------


def test_the_other_streams_level_is_the_highest_of_its_chunk():
    """With context copies apart, padding left out, and 0 where the other has nothing."""
    sigma = torch.tensor([[0.0, 0.9, 0.4], [0.5, 0.1, 0.7]])
    other = stream(
        "audio",
        torch.zeros(2, 6, 1),
        sigma,
        chunk_BN=torch.tensor([[0, 0, 0, 2, 2, 2]]),
        level_BN=torch.tensor([[0, 2, 1, 0, 2, 1]]),
        context_BN=torch.tensor([[False, False, True, False, False, False]]),
        valid_BN=torch.tensor([[True, True, True, True, True, False]] * 2),
    )
    mine = stream(
        "video",
        torch.zeros(2, 5, 1),
        sigma[:, :1],
        chunk_BN=torch.tensor([[0, 0, 1, 2, 2]]),
        context_BN=torch.tensor([[False, True, False, False, True]]),
    )
    levels, index = cross_levels(mine, other, one_chunk=False)
    assert torch.equal(levels.gather(1, index), torch.tensor([[0.4, 0.9, 0, 0.4, 0], [0.7, 0.1, 0, 0.7, 0]]))
    levels, index = cross_levels(mine, other, one_chunk=True)
    assert index is None
    assert torch.equal(levels, torch.tensor([[0.9], [0.7]]))


def test_many_equal_levels_are_one_level():
    """Four levels of the same value, in chunks that all see each other: the answer of one level."""
    model, streams = build(TINY23), make(TINY23)
    many: dict[str, Stream] = {}
    for name, one in streams.items():
        tokens = torch.arange(one.x_BNC.shape[1])[None]
        many[name] = replace(
            one,
            sigma_BK=one.sigma_BK.expand(-1, 4),
            level_BN=tokens % 4,
            chunk_BN=tokens * 4 // tokens.numel(),
        )
    for visibility in (full, causal_chunks() | same_scene):
        for found, want in zip(model(many, visibility).values(), model(streams, full).values(), strict=True):
            assert distance(found, want) < 1e-5


# --- visibility ---------------------------------------------------------------------------------------------


def chunked(streams: Streams, levels: bool = True) -> Streams:
    """The first two latent frames and what sounds with them are chunk 0, each later frame one chunk; every
    chunk has a level of its own and the text level 0."""
    chunk = {
        "video": (video_cells()[..., 0] - 1).clamp(min=0),
        "text": torch.zeros(1, WORDS, dtype=torch.long),
    }
    chunk["audio"] = (torch.arange(SOUND)[None] - 1).clamp(min=0) // 3
    sigma = torch.tensor([[0.0, 0.3, 0.8, 0.5]]).repeat(BATCH, 1)
    return {
        name: replace(
            one,
            chunk_BN=chunk[name],
            sigma_BK=sigma if levels else sigma[:, :1],
            level_BN=chunk[name] * 0 if name == "text" or not levels else chunk[name] + 1,
        )
        for name, one in streams.items()
    }


def reached(model: nn.Module, streams: Streams, visibility: Visibility, modality: str, chunk: int) -> dict:
    """The chunks of each modality whose answer changes when those tokens change."""
    before = model(streams, visibility)
    one = streams[modality]
    x = torch.where((one.chunk_BN == chunk)[..., None], one.x_BNC + 1, one.x_BNC)
    after = model({**streams, modality: replace(one, x_BNC=x)}, visibility)
    moved = {m: (after[m] - before[m]).abs().amax(-1) > 0 for m in before}
    return {m: set(streams[m].chunk_BN.expand_as(at)[at].tolist()) for m, at in moved.items()}


@pytest.mark.parametrize("kind", ["2.0", "2.3"])
@pytest.mark.parametrize("modality", ["video", "audio"])
def test_no_chunk_reaches_an_earlier_one_through_either_stream(kind, modality):
    model, streams = build(SIZES[kind]), chunked(make(SIZES[kind]))
    for chunk in range(3):
        later = set(range(chunk, 3))
        assert reached(model, streams, causal_chunks(), modality, chunk) == {"video": later, "audio": later}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Several may cut up a product of other values in another way, and round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("modality", ["video", "audio"])
def test_no_chunk_learns_of_the_noise_of_a_later_one(modality):
    model, streams = build(TINY23), chunked(make(TINY23))
    before = model(streams, causal_chunks())
    one = streams[modality]
    louder = replace(one, sigma_BK=torch.tensor([[0.0, 0.3, 0.8, 0.9]]))
    after = model({**streams, modality: louder}, causal_chunks())
    for m in before:
        early = (streams[m].chunk_BN < 2).expand(BATCH, -1)
        assert torch.equal(after[m][early], before[m][early])
        assert distance(after[m][~early], before[m][~early]) > 1e-3


def test_sound_that_starts_later_does_not_reach_the_first_frames():
    """Attention must look somewhere: a token that sees no key takes nothing from it."""
    model, streams = build(TINY23), chunked(make(TINY23))
    streams = {**streams, "audio": replace(streams["audio"], chunk_BN=streams["audio"].chunk_BN.clamp(min=1))}
    assert reached(model, streams, causal_chunks(), "audio", 1)["video"] == {1, 2}
    alone = model({m: streams[m] for m in ("video", "text")}, causal_chunks())["video"]
    first = streams["video"].chunk_BN.expand(BATCH, -1) == 0
    torch.testing.assert_close(model(streams, causal_chunks())["video"][first], alone[first])


def test_scenes_hear_and_see_only_themselves():
    model, streams = build(TINY23), make(TINY23)
    scene = {"video": video_cells()[..., 0] // 2, "audio": torch.arange(SOUND)[None] // 5}
    scene["text"] = torch.arange(WORDS)[None] // 3
    streams = {m: replace(s, scene_BN=scene[m], valid_BN=None) for m, s in streams.items()}
    before = model(streams, same_scene)
    for modality in ("video", "audio", "text"):
        one = streams[modality]
        x = torch.where((one.scene_BN == 1)[..., None], one.x_BNC + 1, one.x_BNC)
        after = model({**streams, modality: replace(one, x_BNC=x)}, same_scene)
        for m in before:
            first = (scene[m] == 0).expand(BATCH, -1)
            assert torch.equal(before[m][first], after[m][first])
            assert not torch.equal(before[m][~first], after[m][~first])


@pytest.mark.parametrize("way", ["merge", "segments"])
def test_every_way_to_attend_gives_the_masked_answer_and_gradients(way):
    """Text, self and cross attention, without a mask; a rule that has no such form stays masked."""
    found = []
    for name in ("dense", way):
        model, streams = build(TINY23), chunked(make(TINY23))
        with pinned(name):
            answers = model(streams, causal_chunks())
            sum(answer.square().mean() for answer in answers.values()).backward()
        found.append([*answers.values(), *(p.grad for p in model.parameters())])
    assert max(distance(a, b) for a, b in zip(*found, strict=True)) < 1e-4


def test_a_sample_without_sound_is_as_if_alone_and_finite():
    """Clips with and without a sound track in one batch."""
    model, streams = build(TINY23), make(TINY23)
    silent = replace(streams["audio"], valid_BN=torch.tensor([[True], [False]]).expand(-1, SOUND))
    answers = model({**streams, "audio": silent}, full)
    alone = model({m: streams[m] for m in ("video", "text")}, full)
    assert distance(answers["video"][1], alone["video"][1]) < 1e-5
    assert distance(answers["video"][0], alone["video"][0]) > 1e-3
    sum(answer.square().mean() for answer in answers.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    # Not every way to attend is kind to a query that sees nothing.
    half = model.bfloat16()({**streams, "audio": silent}, full)
    assert all(answer.isfinite().all() for answer in half.values())


def test_a_given_stream_takes_part():
    """Sound given clean for a film: the film hears it, and its loss reaches the sound's layers."""
    model, streams = build(TINY23), make(TINY23)
    given = replace(
        streams["audio"], sigma_BK=torch.zeros(BATCH, 1), x_BNC=streams["audio"].x_BNC.requires_grad_()
    )
    model({**streams, "audio": given}, full)["video"].square().mean().backward()
    assert given.x_BNC.grad.abs().amax(-1).min() > 0


# --- training -----------------------------------------------------------------------------------------------


@every_size
def test_fresh_weights_are_small_repeatable_and_all_learn(kind):
    with torch.device("meta"):
        model = LTX2(SIZES[kind])
    model = model.to_empty(device="cpu")
    model.init_weights(torch_generator("weights"))
    again = LTX2(SIZES[kind])
    again.init_weights(torch_generator("weights"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    answers = model(make(SIZES[kind]), full)
    assert all(answer.abs().max() < 0.2 for answer in answers.values())
    sum((answer - 1).square().mean() for answer in answers.values()).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_recomputed_blocks_have_the_same_gradients():
    found = []
    for checkpoint_blocks in (False, True):
        model = build(TINY23, checkpoint_blocks=checkpoint_blocks)
        answers = model(make(TINY23, frame_sigma=True), full)
        sum(answer.square().mean() for answer in answers.values()).backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def compiled(sizes: LTX2Sizes) -> LTX2:
    model = build(replace(sizes, num_layers=1))
    torch._dynamo.reset()
    for block in model.blocks():
        block.compile(fullgraph=True, backend="aot_eager")
    return model


def test_blocks_compile_without_a_break():
    """Both streams, with levels per token and masks, forward and backward."""
    streams = chunked(make(TINY23))
    wanted = build(replace(TINY23, num_layers=1))(streams, causal_chunks())
    found = compiled(TINY23)(streams, causal_chunks())
    for m in wanted:
        assert distance(found[m], wanted[m]) < 1e-5
    sum(answer.square().mean() for answer in found.values()).backward()


@torch.no_grad()
def test_blocks_compile_with_a_past():
    streams = {m: s for m, s in chunked(make(TINY)).items() if m != "video"}
    wanted = build(replace(TINY, num_layers=1))(streams, causal_chunks())["audio"]
    model = compiled(TINY)
    cache = model.new_cache()
    for chunk in range(3):
        cache.begin(chunk)
        found = model(chunk_of(streams, chunk), causal_chunks(), cache)["audio"]
        cache.commit()
        assert distance(found, wanted[:, streams["audio"].chunk_BN[0] == chunk]) < 1e-5


def test_bfloat16_under_autocast_stays_near():
    model, streams = build(TINY23), make(TINY23, frame_sigma=True)
    wanted = model(streams, full)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(streams, full)
    for m in wanted:
        assert found[m].dtype == torch.float32
        assert distance(found[m], wanted[m]) < 0.1


# --- cache --------------------------------------------------------------------------------------------------


def tokens_of(one: Stream, at: Tensor) -> Stream:
    """The stream with only the tokens where ``at`` (N,) is True."""
    fields = {
        name: t[:, at]
        for name, t in vars(one).items()
        if isinstance(t, Tensor) and name != "sigma_BK" and t.shape[1] == at.shape[0]
    }
    return replace(one, grid=(1, 1, int(at.sum())), **fields)


def chunk_of(streams: Streams, chunk: int) -> Streams:
    """What stands in one chunk, and all words."""
    return {m: s if m == "text" else tokens_of(s, s.chunk_BN[0] == chunk) for m, s in streams.items()}


@pytest.mark.parametrize("modalities", [("video", "audio"), ("video",), ("audio",)])
@pytest.mark.parametrize("window, sinks", [(None, 0), (1, 1), (2, 0)])
@every_size
def test_chunks_from_a_cache_are_those_of_one_masked_forward(kind, window, sinks, modalities):
    """Diffusion forcing: every chunk at its own level, the past as noisy as it was made."""
    model = build(SIZES[kind])
    streams = {m: s for m, s in chunked(make(SIZES[kind])).items() if m in (*modalities, "text")}
    wanted = model(streams, causal_chunks(window, sinks))
    cache = model.new_cache(window=window, sinks=sinks)
    for chunk in range(3):
        cache.begin(chunk)
        found = model(chunk_of(streams, chunk), causal_chunks(window, sinks), cache)
        cache.commit()
        for m in modalities:
            assert distance(found[m], wanted[m][:, streams[m].chunk_BN[0] == chunk]) < 1e-5


@pytest.mark.parametrize("kind", ["2.0", "2.3 interleaved"])
def test_chunks_from_a_clean_cache_are_those_of_teacher_forcing(kind):
    """[clean | noisy] in one forward: clean halves are modulated by the clean, noisy ones by the noisy."""
    model, streams = build(SIZES[kind]), chunked(make(SIZES[kind]))
    clean = {
        m: s if m == "text" else replace(s, level_BN=torch.zeros_like(s.level_BN), x_BNC=s.x_BNC.flip(0))
        for m, s in streams.items()
    }
    twice = {m: s if m == "text" else behind(clean[m], s) for m, s in streams.items()}
    wanted = model(twice, TeacherForcing())
    cache = model.new_cache()
    for chunk in range(3):
        cache.begin(chunk)
        found = model(chunk_of(streams, chunk), causal_chunks(), cache)
        model(chunk_of(clean, chunk), causal_chunks(), cache)
        cache.commit()
        for m in found:
            noisy = wanted[m][:, streams[m].x_BNC.shape[1] :]
            assert distance(found[m], noisy[:, streams[m].chunk_BN[0] == chunk]) < 1e-5


def behind(clean: Stream, noisy: Stream) -> Stream:
    """[clean | noisy], the clean half as context."""
    tokens = noisy.x_BNC.shape[1]
    fields = {
        name: torch.cat([getattr(clean, name), t], dim=1)
        for name, t in vars(noisy).items()
        if isinstance(t, Tensor) and name != "sigma_BK" and t.shape[1] == tokens
    }
    return replace(noisy, **{**fields, "context_BN": torch.arange(2 * tokens)[None] < tokens})


def test_words_are_held_only_where_noise_does_not_modulate_them():
    for kind, held in (("2.0", True), ("2.3", False), ("2.5", True)):
        model, streams = build(SIZES[kind]), chunk_of(chunked(make(SIZES[kind])), 0)
        cache = model.new_cache()
        cache.begin(0)
        first = model(streams, causal_chunks(), cache)
        assert ("text" in cache) == held
        # Held words are read instead of the text; new ones are asked for by dropping them.
        other = {**streams, "text": replace(streams["text"], x_BNC=streams["text"].x_BNC + 1)}
        assert torch.equal(model(other, causal_chunks(), cache)["video"], first["video"]) == held
        cache.drop("text")
        assert not torch.equal(model(other, causal_chunks(), cache)["video"], first["video"])


def test_words_are_held_for_the_streams_that_asked():
    """Also where heads of both streams have one width."""
    model, streams = build(replace(TINY, audio_attention_head_dim=16)), chunk_of(chunked(make(TINY)), 0)
    cache = model.new_cache()
    cache.begin(0)
    for modality in ("video", "audio", "video"):
        alone = {m: streams[m] for m in (modality, "text")}
        found = model(alone, causal_chunks(), cache)[modality]
        assert torch.equal(found, model(alone, causal_chunks())[modality])
    model(streams, causal_chunks(), cache)


def test_chunks_from_a_cache_all_bring_the_same_streams():
    """What the sound of earlier chunks tells a silent one is not in the cache, nor the reverse."""
    model, streams = build(TINY), chunked(make(TINY))
    silent = {m: s for m, s in streams.items() if m != "audio"}
    for first, second, told in (
        (streams, silent, "earlier chunks have audio and this one has none"),
        (silent, streams, "chunks before this one have no video for audio"),
    ):
        cache = model.new_cache()
        cache.begin(0)
        model(chunk_of(first, 0), causal_chunks(), cache)
        cache.commit()
        cache.begin(1)
        with pytest.raises(AssertionError, match=told):
            model(chunk_of(second, 1), causal_chunks(), cache)


def test_isolated_streams_have_a_cache_of_their_own():
    model, streams, apart = build(TINY), chunked(make(TINY)), Perturbation(isolate=True)
    wanted = model(streams, causal_chunks(), perturb=apart)
    cache = model.new_cache()
    for chunk in range(3):
        cache.begin(chunk)
        found = model(chunk_of(streams, chunk), causal_chunks(), cache, perturb=apart)
        cache.commit()
        for m in found:
            assert distance(found[m], wanted[m][:, streams[m].chunk_BN[0] == chunk]) < 1e-5


def test_a_re_based_window_hears_and_sees_as_an_absolute_one():
    """Everything turns by differences: where sinks move with the window, nothing changes."""
    model, streams = build(TINY23), chunked(make(TINY23))
    answers = []
    for positions in ("absolute", "relative"):
        cache = model.new_cache(window=2, positions=positions)
        for chunk in range(3):
            cache.begin(chunk)
            found = model(chunk_of(streams, chunk), causal_chunks(2), cache)
            cache.commit()
        answers.append(found)
    for m in ("video", "audio"):
        # Not equal to the bit: the angles did change.
        assert 0 < distance(answers[1][m], answers[0][m]) < 1e-4
