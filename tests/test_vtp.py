"""VTP: the released layout and numbers, time, the tokenizer protocol, words, and files that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from motionloom.config.recipe import TokenizerConfig
from motionloom.errors import UserError
from motionloom.nn.init import fill
from motionloom.rng import torch_generator
from motionloom.tokenizers import (
    PixelsTokenizer,
    fit_tokenizer,
    load_tokenizer,
    needs_clips,
    open_tokenizer,
    with_decoder,
)
from motionloom.tokenizers.vtp import PRESETS, VTPConfig, VTPModel, VtpTokenizer, Words
from motionloom.tokenizers.vtp.layers import Drop, Neighbours
from motionloom.tokenizers.vtp.tokenizer import model_fingerprint, normalised
from motionloom.tokenizers.vtp.towers import DecoderMemory

TINY = Path(__file__).parent / "vtp_tiny"
SMALL = VTPConfig(
    image_size=32,
    vision_patch_size=8,
    vision_embed_dim=32,
    vision_depth=2,
    vision_num_heads=2,
    vision_feature_bottleneck=6,
    text_context_length=12,
    text_vocab_size=300,
    text_embed_dim=16,
    text_num_heads=2,
    text_depth=1,
    decoder_embed_dim=32,
    decoder_num_heads=2,
    decoder_depth=2,
)


def awake(config: VTPConfig, seed: int = 1) -> VTPModel:
    """A model none of whose weights is 0, so that all of them count."""
    model = VTPModel(config, rope="fp32")
    model.init_weights(seed)
    generator = torch_generator("vtp tests", seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval().requires_grad_(False)


def clips(count: int, frames: int, height: int = 16, width: int = 24) -> Tensor:
    """Noise, uint8 (count, frames, height, width, 3)."""
    shape = (count, frames, height, width, 3)
    return torch.randint(0, 256, shape, generator=torch_generator("vtp clips"), dtype=torch.uint8)


OPTIONS = [(1, 0, 0), (2, 0, 0), (4, 0, 0), (1, 2, 0), (4, 1, 0), (1, 0, 3), (4, 1, 3)]


@pytest.fixture(params=OPTIONS, ids=lambda p: f"t{p[0]}-w{p[1]}-c{p[2]}")
def timed(request: pytest.FixtureRequest) -> VTPConfig:
    patch, window, kernel = request.param
    return replace(SMALL, temporal_patch=patch, temporal_window=window, conv_kernel=kernel)


@pytest.fixture
def tokenizer(timed: VTPConfig) -> VtpTokenizer:
    return VtpTokenizer.measured(awake(timed), list(clips(4, 9)))


# The released models


def test_all_seven_outputs_are_those_of_the_released_code() -> None:
    golden, model = load_file(TINY / "golden.safetensors"), VTPModel.from_pretrained(TINY)
    image, text = golden["image"], golden["text"]
    with torch.no_grad():
        features = model.get_last_layer_feature(image)
        found = {
            "latents": model.get_reconstruction_latents(image),
            "decoded": model.get_latents_decoded_images(golden["latents"]),
            "cls": features["cls_token"],
            "patch": features["patch_tokens"],
            "clip_image": model.get_clip_image_feature(image),
            "clip_text": model.get_clip_text_feature(text),
            "logits": model.get_clip_logits(image, text)[0],
        }
    assert set(found) | {"image", "text"} == set(golden)
    for name, value in found.items():
        torch.testing.assert_close(value, golden[name], atol=1e-4, rtol=0, msg=name)


def test_angles_in_fp32_differ_from_the_released_ones_a_little() -> None:
    golden = load_file(TINY / "golden.safetensors")
    with torch.no_grad():
        latents = VTPModel.from_pretrained(TINY, rope="fp32").get_reconstruction_latents(golden["image"])
    apart = (latents - golden["latents"]).abs().max()
    assert 1e-4 < apart < 0.1


def test_weights_of_a_training_begin_as_released_or_by_their_inputs() -> None:
    wide = replace(SMALL, vision_embed_dim=128, decoder_embed_dim=128, temporal_patch=2)
    model = VTPModel(wide)
    model.init_weights(3)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "text" not in n}
    inside = {n: m.weight for n, m in layers.items() if "blocks" in n}
    assert len(inside) == 2 * 2 * 5
    for name, weight in inside.items():
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.05), name
    model.init_weights(3, "fan_in")
    for name, weight in inside.items():
        # Two blocks add four times.
        back = 0.5 if name.endswith(("attn.proj", "w3")) else 1.0
        assert float(weight.detach().std()) == pytest.approx(back * weight.shape[1] ** -0.5, rel=0.05), name


@pytest.mark.parametrize(
    ("letter", "tensors", "millions"), [("S", 477, 167.18), ("B", 477, 295.64), ("L", 789, 731.57)]
)
def test_presets_have_the_released_tensors_and_sizes(letter: str, tensors: int, millions: float) -> None:
    with torch.device("meta"):
        model = VTPModel(PRESETS[letter])
    assert len(model.state_dict()) == tensors
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


def test_names_and_shapes_are_the_released_ones() -> None:
    """Those of the spec's list that no toy fixture pins: of the largest preset."""
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in VTPModel(PRESETS["L"]).state_dict().items()}
    assert shapes["trunk.patch_embed.proj.weight"] == (1024, 3, 16, 16)
    assert shapes["trunk.blocks.23.mlp.w1.weight"] == (2736, 1024)
    assert shapes["trunk.rope_embed.periods"] == (16,)
    assert shapes["trunk.feature_bottleneck.weight"] == (64, 1024)
    assert shapes["pixel_decoder.proj_in.weight"] == (1024, 64, 1, 1)
    assert shapes["pixel_decoder.proj_out.weight"] == (768, 1024, 1, 1)
    assert shapes["visual_proj.weight"] == (768, 1024)
    assert shapes["text_transformer.resblocks.11.attn.in_proj_weight"] == (2304, 768)
    assert shapes["token_embedding.weight"] == (49408, 768)
    assert shapes["logit_scale"] == ()


def test_periods_are_those_of_the_released_file() -> None:
    stored = load_file(TINY / "model.safetensors")["trunk.rope_embed.periods"]
    own = VTPModel(VTPConfig.read(TINY / "config.json")).trunk.rope_embed.periods
    assert stored.dtype == own.dtype == torch.bfloat16
    assert torch.equal(stored, own)


def test_saved_loaded_and_saved_the_bytes_are_equal(tmp_path: Path) -> None:
    model = VTPModel.from_pretrained(TINY)
    model.save_pretrained(tmp_path / "a")
    VTPModel.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (TINY, tmp_path / "a"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    said = json.loads((tmp_path / "a" / "config.json").read_text())
    assert said.items() <= json.loads((TINY / "config.json").read_text()).items()


def test_the_text_mask_is_not_stored_and_ends_at_the_end_mark() -> None:
    model = awake(SMALL)
    assert not [name for name in model.state_dict() if "mask" in name and "mask_token" not in name]
    tokens = torch.tensor([[298, 5, 7, 299, 0, 0, 0, 0, 0, 0, 0, 0]])
    other = tokens.clone()
    other[0, 4:] = 9  # behind the end mark: not read
    assert torch.equal(model.clip_text(tokens), model.clip_text(other))
    torch.testing.assert_close(model.clip_text(tokens), model.clip_text(tokens[:, :4]), atol=1e-5, rtol=0)


def test_intermediate_layers_end_in_the_last_one() -> None:
    model, image = awake(SMALL), torch.randn(2, 3, 16, 24, generator=torch_generator("image"))
    last = model.get_last_layer_feature(image)
    (first, _), (second, second_cls) = model.get_intermediate_layers_feature(
        image, 2, return_class_token=True
    )
    assert torch.equal(second, last["patch_tokens"])
    assert torch.equal(second_cls, last["cls_token"])
    assert not torch.equal(first, second)
    (grid,) = model.get_intermediate_layers_feature(image, [1], reshape=True)
    assert isinstance(grid, Tensor)
    assert grid.shape == (2, 32, 2, 3)
    assert torch.equal(grid.flatten(2).movedim(1, 2), second)
    narrow = model.get_last_layer_feature(image, use_bottleneck=True)
    assert narrow["cls_token"].shape == (2, 6)
    assert torch.equal(model(image, forward_type="feature")["patch_tokens"], narrow["patch_tokens"])


def test_forward_has_the_three_released_ways() -> None:
    model, image = awake(SMALL), torch.randn(2, 3, 16, 24, generator=torch_generator("image"))
    made = model(image, forward_type="rec")
    assert made["latents"].shape == (2, 6, 2, 3)
    assert made["reconstructed_image"].shape == image.shape
    text = torch.tensor([[298, 5, 299] + [0] * 9])
    both = model(image, text)
    logits, transposed = model.get_clip_logits(image, text)
    torch.testing.assert_close(logits, both["logit_scale"] * both["image_features"] @ both["text_features"].T)
    assert torch.equal(logits, transposed.T)


# Time


def test_an_image_is_a_clip_of_one_frame_whatever_the_groups(timed: VTPConfig) -> None:
    plain, clip = awake(SMALL), awake(timed)
    own = clip.state_dict()
    own.update({name: value for name, value in plain.state_dict().items() if name in own})
    clip.load_state_dict(own)
    for part in (clip.trunk, clip.pixel_decoder):
        for layer in (*(part.look_back or ()), *(part.neighbours or ())):
            layer.init_start()  # type: ignore[operator]
    image = torch.randn(2, 3, 16, 24, generator=torch_generator("image"))
    torch.testing.assert_close(
        clip.get_reconstruction_latents(image), plain.get_reconstruction_latents(image), atol=1e-5, rtol=0
    )
    z = plain.get_reconstruction_latents(image)
    torch.testing.assert_close(
        clip.get_latents_decoded_images(z), plain.get_latents_decoded_images(z), atol=1e-5, rtol=0
    )


def test_without_groups_every_frame_is_an_image() -> None:
    model, x = awake(SMALL), normalised(clips(2, 3))
    images = torch.stack([model.get_reconstruction_latents(x[:, n]) for n in range(3)], dim=1)
    torch.testing.assert_close(model.encode(x).movedim(-1, 2), images, atol=1e-5, rtol=0)


def test_nothing_comes_from_later_frames(timed: VTPConfig) -> None:
    model, x = awake(timed), normalised(clips(1, 9))
    z = model.encode(x)
    changed = x.clone()
    changed[:, 5:] += 1.0  # the latent frames behind pixel frame 4
    keep = 5 if timed.temporal_patch == 1 else 1 + 4 // timed.temporal_patch
    assert torch.equal(model.encode(changed)[:, :keep], z[:, :keep])
    assert not torch.equal(model.encode(changed)[:, keep:], z[:, keep:])
    later = z.clone()
    later[:, keep:] += 1.0
    shown = model.pixel_decoder(z)
    assert torch.equal(model.pixel_decoder(later)[:, :5], shown[:, :5])
    assert not torch.equal(model.pixel_decoder(later)[:, 5:], shown[:, 5:])


def test_a_look_back_sees_as_far_as_its_window() -> None:
    model = awake(replace(SMALL, temporal_window=1, vision_depth=1, decoder_depth=1))
    x = normalised(clips(1, 4))
    changed = x.clone()
    changed[:, 0] += 1.0
    moved = [not torch.equal(a, b) for a, b in zip(model.encode(x)[0], model.encode(changed)[0], strict=True)]
    assert moved == [True, True, False, False]


def test_neighbours_are_a_square_of_patches_and_never_the_class_token() -> None:
    layer = Neighbours(2, 3)
    with torch.no_grad():
        fill(1.0, layer.conv.weight)
        fill(0.0, layer.conv.bias)
    x_BFND = torch.randn(1, 2, 1 + 3 * 4, 2, generator=torch_generator("neighbours"))
    added = layer(x_BFND, (3, 4)).detach()
    assert not added[:, :, 0].any()
    grid = x_BFND[:, :, 1:].unflatten(2, (3, 4))
    torch.testing.assert_close(added[0, 1, 1], grid[0, 1, :2, :2].sum(dim=(0, 1)))  # a corner
    torch.testing.assert_close(added[0, 1, 1 + 4 + 2], grid[0, 1, :3, 1:4].sum(dim=(0, 1)))  # inside
    torch.testing.assert_close(layer(x_BFND[:, :, 1:], (3, 4)).detach(), added[:, :, 1:])


def test_decoding_piece_by_piece_is_decoding_at_once(timed: VTPConfig) -> None:
    model = awake(timed)
    z, memory = model.encode(normalised(clips(2, 13))), DecoderMemory()
    pieces = [model.pixel_decoder.go_on(part, memory) for part in z.split([2, 1, z.shape[1] - 3], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model.pixel_decoder(z), atol=1e-5, rtol=0)


# The tokenizer


def test_latents_have_the_declared_shape_and_unit_statistics(tokenizer: VtpTokenizer) -> None:
    video = clips(4, 9)
    z = tokenizer.encode(video)
    assert z.shape == (4, *tokenizer.spec.latent_grid(9, 16, 24), 6)
    assert tokenizer.spec.pixel_frames(z.shape[1]) == 9
    for part in (z[:, :1], z[:, 1:]) if tokenizer.spec.first_alone else (z,):
        flat = part.flatten(0, 3)
        torch.testing.assert_close(flat.mean(dim=0), torch.zeros(6), atol=1e-4, rtol=0)
        torch.testing.assert_close(flat.std(dim=0, correction=0), torch.ones(6), atol=1e-3, rtol=0)
    back = tokenizer.decode(z)
    assert (back.dtype, back.shape) == (torch.uint8, video.shape)


def test_streams_are_decoded_as_the_whole_to_the_bit(tokenizer: VtpTokenizer) -> None:
    z = tokenizer.encode(clips(2, 13))
    whole = tokenizer.decode(z)
    for sizes in ([1] * z.shape[1], [2, z.shape[1] - 2]):
        assert torch.equal(torch.cat(list(tokenizer.stream_decode(z.split(sizes, dim=1))), dim=1), whole)


def test_a_tuned_decoder_reads_the_latents_of_a_model(tokenizer: VtpTokenizer, tmp_path: Path) -> None:
    """Its own statistics, of other clips, are not those of the model's latents."""
    tuned = VTPModel(tokenizer.model.config, rope="fp32")
    tuned.load_state_dict(tokenizer.model.state_dict())
    with torch.no_grad():
        for parameter in tuned.pixel_decoder.parameters():
            parameter.mul_(1.1)
    VtpTokenizer.measured(tuned, list(clips(3, 9) // 2)).save(tmp_path / "tuned")
    swapped = with_decoder(tokenizer, tmp_path / "tuned")
    latents = tokenizer.encode(clips(2, 5))
    assert torch.equal(swapped.encode(clips(2, 5)), latents)
    assert not torch.equal(swapped.decode(latents), tokenizer.decode(latents))
    same = VtpTokenizer(tuned.eval(), tokenizer.mean_KC.tolist(), tokenizer.std_KC.tolist())
    assert torch.equal(swapped.decode(latents), same.decode(latents))

    VtpTokenizer.measured(awake(tokenizer.model.config, 2), list(clips(3, 9))).save(tmp_path / "other")
    with pytest.raises(UserError, match="its encoder makes other latents than the model was trained on"):
        with_decoder(tokenizer, tmp_path / "other")
    with pytest.raises(UserError, match="only a VTP can be given the decoder of another"):
        with_decoder(PixelsTokenizer(), tmp_path / "tuned")


def test_a_stream_taken_up_again_gives_the_same_pixels(tokenizer: VtpTokenizer) -> None:
    z = tokenizer.encode(clips(1, 29))
    latent = z.shape[1] - 2
    begin = tokenizer.resume_from(latent)
    assert begin <= latent
    behind = tokenizer.spec.pixel_frames(z.shape[1]) - tokenizer.spec.pixel_frames(latent)
    again = torch.cat(list(tokenizer.stream_decode([z[:, begin:]])), dim=1)
    assert torch.equal(again[:, -behind:], tokenizer.decode(z)[:, -behind:])


def test_a_stream_keeps_no_more_than_its_window() -> None:
    model, memory = awake(replace(SMALL, temporal_window=2)), DecoderMemory()
    z = torch.randn(1, 9, 2, 3, 6, generator=torch_generator("z"))
    kept = []
    for frame in z.split(1, dim=1):
        model.pixel_decoder.go_on(frame, memory)
        assert memory.past is not None
        kept.append(sum(k.numel() + v.numel() for k, v in memory.past))
    assert kept[1:] == [kept[1]] * 8


def test_saved_and_loaded_it_is_the_same(tokenizer: VtpTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "a")
    loaded = load_tokenizer(tmp_path / "a")
    loaded.save(tmp_path / "b")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert len({file.stat().st_mode for file in (tmp_path / "a").iterdir()}) == 1, "weights can be shared too"
    assert loaded.fingerprint() == tokenizer.fingerprint()
    # RoPE in fp32, as the tests' models have it, is among what is remembered.
    assert torch.equal(loaded.encode(clips(1, 9)), tokenizer.encode(clips(1, 9)))


def test_a_folder_that_was_saved_shares_no_file_with_another(tmp_path: Path) -> None:
    """Its owner may write over it where it stands; what was saved from it must not change with it."""
    VtpTokenizer.measured(awake(SMALL), list(clips(2, 9))).save(tmp_path / "mine")
    load_tokenizer(tmp_path / "mine").save(tmp_path / "cache")
    load_tokenizer(tmp_path / "cache").save(tmp_path / "run")
    for file in (tmp_path / "mine").iterdir():
        assert len({(tmp_path / n / file.name).stat().st_ino for n in ("mine", "cache", "run")}) == 3, (
            file.name
        )
    kept = load_tokenizer(tmp_path / "run").fingerprint()
    awake(SMALL, 2).save_pretrained(tmp_path / "other")
    weights = tmp_path / "mine" / "model.safetensors"
    weights.write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    assert load_tokenizer(tmp_path / "mine").fingerprint() != kept
    assert {load_tokenizer(tmp_path / n).fingerprint() for n in ("cache", "run")} == {kept}


def test_fingerprints_tell_weights_and_settings_apart() -> None:
    first, same, other = awake(SMALL, 1), awake(SMALL, 1), awake(SMALL, 2)
    few, more = list(clips(2, 9)), list(clips(4, 9))
    a, b, c = (VtpTokenizer.measured(m, few).fingerprint() for m in (first, same, other))
    d = VtpTokenizer.measured(first, more).fingerprint()
    assert a == b
    assert len({a, c, d}) == 3
    assert d.startswith(model_fingerprint(first, "fp32"))
    assert not c.startswith(model_fingerprint(first, "fp32"))
    assert not a.startswith(model_fingerprint(first, "bf16"))


def test_bf16_is_near_fp32() -> None:
    model, video = awake(SMALL), clips(2, 9)
    fine = VtpTokenizer.measured(model, list(video))
    coarse = VtpTokenizer(model, fine.mean_KC.tolist(), fine.std_KC.tolist(), "bf16")
    z, rough = fine.encode(video), coarse.encode(video)
    assert 0 < (z - rough).square().mean().sqrt() < 0.05


def test_a_released_folder_is_measured_on_the_first_clips(tmp_path: Path) -> None:
    awake(SMALL).save_pretrained(tmp_path)
    config = TokenizerConfig(
        type="vtp", name_or_path=str(tmp_path), latent_f=8, latent_t=1, latent_d=6, rope="fp32"
    )
    assert needs_clips(config)
    with pytest.raises(UserError, match="have not been measured: cache clips with"):
        open_tokenizer(config)
    fitted = fit_tokenizer(config, list(clips(4, 9)))
    fitted.save(tmp_path / "measured")
    again = config.model_copy(update={"name_or_path": str(tmp_path / "measured")})
    assert not needs_clips(again)
    assert open_tokenizer(again).fingerprint() == fitted.fingerprint()
    coarse = open_tokenizer(again.model_copy(update={"precision": "bf16"}))
    assert coarse.fingerprint() != fitted.fingerprint()


# Training


def test_a_mask_hides_what_it_covers() -> None:
    model, x = awake(SMALL), normalised(clips(1, 2))
    mask = torch.zeros(1, 2, 6, dtype=torch.bool)
    mask[:, :, 0] = True
    changed = x.clone()
    changed[..., :8, :8] += 1.0
    hidden, shown = (model.trunk(v, mask).patches_BFND for v in (x, changed))
    assert torch.equal(hidden, shown)
    assert not torch.equal(model.trunk(x).patches_BFND, hidden)


def test_layers_left_out_of_a_batch_are_made_up_for() -> None:
    x, layer = torch.ones(1000, 1), lambda part: part
    drop = Drop(0.25, torch_generator("drop"))
    found = drop.add(x, layer)
    assert found.mean() == pytest.approx(2.0)
    assert sorted(found.unique().tolist()) == pytest.approx([1.0, 1 + 1000 / 750])
    assert torch.equal(Drop(0.0, torch_generator("drop")).add(x, layer), 2 * x)


# Words


def test_texts_are_clips_tokens() -> None:
    ids = Words(8)(["A Cat &amp; a dog", "a  photo\nof a very long sentence that goes on"])
    # Of CLIP's own vocabulary: a 320, cat 2368, & 261, dog 1929, photo 1125, of 539, very 1070, long 1538.
    assert ids.tolist() == [
        [49406, 320, 2368, 261, 320, 1929, 49407, 0],
        [49406, 320, 1125, 539, 320, 1070, 1538, 49407],
    ]


def test_a_vocabulary_of_ones_own_is_learned_saved_and_read(tmp_path: Path) -> None:
    texts = ["a red circle moves left", "a blue square moves right", "a red square stays"]
    words = Words.learned(texts, 12, 300)
    ids = words(texts)
    assert ids.shape == (3, 12)
    assert (ids.argmax(dim=1) == (ids == words.size - 1).int().argmax(dim=1)).all()
    words.save(tmp_path)
    assert torch.equal(Words.load(tmp_path, 12, words.size)(texts), ids)
    assert torch.equal(Words.learned(texts, 12, 300)(texts), ids)
    assert len({tuple(row) for row in ids.tolist()}) == 3
    with pytest.raises(UserError, match="they are not of one model"):
        Words.load(tmp_path, 12, 512)


@pytest.mark.parametrize("text", ["", "  \n"])
def test_empty_texts_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="caption 2 of 2 is empty"):
        Words(8)(["a cat", text])


def test_a_small_vocabulary_without_its_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"words\.json is missing and text_vocab_size is 300"):
        Words.load(tmp_path, 12, 300)


# What is refused


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((9, 16, 20), "width 20 does not divide by the tokenizer's 8 pixels per cell: use 16 or 24"),
        ((9, 4, 24), "height 4 does not divide by the tokenizer's 8 pixels per cell: use 8 or 16"),
        (
            (8, 16, 24),
            "8 frames do not divide into the tokenizer's groups of 4 after a first frame alone: use 5 or 9",
        ),
    ],
)
def test_other_sizes_are_refused_with_the_nearest_named(size: tuple[int, int, int], message: str) -> None:
    model = awake(replace(SMALL, temporal_patch=4))
    tokenizer = VtpTokenizer.measured(model, list(clips(2, 9)))
    with pytest.raises(UserError, match=message):
        tokenizer.encode(clips(1, *size))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 5, 3, 16, 20), "width 20 is no multiple of VTP's patch of 8: use 16 or 24"),
        ((1, 5, 3, 7, 16), "height 7 is no multiple of VTP's patch of 8: use 8 or 16"),
        ((1, 7, 3, 16, 16), "7 frames are not one and groups of 4: use 5 or 9"),
    ],
)
def test_the_model_refuses_them_as_well(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        awake(replace(SMALL, temporal_patch=4)).encode(torch.zeros(shape))


HUGE = 10**400
"""JSON has such numbers; floats have not."""


def folder(tmp_path: Path, **said: object) -> Path:
    """A whole folder, its config changed."""
    awake(SMALL).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text()) | said
    (tmp_path / "config.json").write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"model_type": "clip"}, "model_type is 'clip' and not 'vtp'"),
        ({"vision_registers": 4}, "vision_registers is unknown here"),
        ({"vision_depth": 0}, "vision_depth is 0, not a whole number above 0"),
        ({"vision_depth": "2"}, "vision_depth is '2', not a whole number above 0"),
        ({"vision_num_heads": 3}, "vision_embed_dim 32 is not 3 heads of a multiple of 4"),
        ({"vision_ffn_layer": "mlp"}, "vision_ffn_layer is 'mlp'; this version has 'swiglu'"),
        ({"text_pool_type": "last"}, "text_pool_type is 'last'"),
        ({"vision_bottleneck_ae_only": False}, "vision_bottleneck_ae_only is False; this version has True"),
        ({"init_logit_scale": "x"}, "init_logit_scale is 'x', not a number"),
        ({"init_logit_bias": HUGE}, "not a number that float32 holds"),
        ({"vision_init_values": 1e300}, r"vision_init_values is '1e\+300', not a number that float32 holds"),
        ({"vision_depth": HUGE}, "vision_depth is too large for any model"),
        ({"text_depth": 10**9}, "text_depth is 1000000000, more than 1024 blocks"),
        ({"vision_mlp_ratio": HUGE}, "too large for any model"),
        ({"text_mlp_ratio": 1e300}, "too wide for any model"),
        ({"temporal_window": HUGE}, "temporal_window is 1000"),
        ({"vision_mlp_ratio": "4"}, "vision_mlp_ratio is '4', not a number above 0"),
        ({"temporal_patch": 3}, "temporal_patch is 3, none of 1, 2, 4"),
        ({"temporal_window": -1}, "temporal_window is -1"),
        ({"conv_kernel": 4}, "conv_kernel is 4, none of 0, 3, 5, 7"),
        ({"conv_kernel": 3}, "it lacks pixel_decoder.neighbours.0.conv.bias"),
        ({"vision_depth": 3}, "it lacks trunk.blocks.2"),
        ({"vision_depth": 1}, "config.json knows no trunk.blocks.1"),
        ({"decoder_embed_dim": 64}, "and config.json says"),
    ],
)
def test_damaged_folders_are_refused(tmp_path: Path, said: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        VTPModel.from_pretrained(folder(tmp_path, **said))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_whole_numbers_are_numbers(tmp_path: Path) -> None:
    """As a hand writes them into a config."""
    given = {"init_logit_bias": -10, "init_logit_scale": 2, "decoder_init_values": 1, "vision_init_values": 1}
    awake(replace(SMALL, **given)).save_pretrained(tmp_path)  # type: ignore[arg-type]
    model = VTPModel.from_pretrained(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    fresh = VTPModel(VTPConfig.read(tmp_path / "config.json"))
    assert fresh.logit_bias is not None
    assert (fresh.logit_bias.item(), fresh.logit_scale.item()) == (-10.0, 2.0)
    assert fresh.pixel_decoder.blocks[0].ls1.gamma.eq(1.0).all()  # type: ignore[union-attr, operator]


def test_files_that_nest_without_end_are_refused(tmp_path: Path) -> None:
    VtpTokenizer.measured(awake(SMALL), list(clips(2, 9))).save(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"config\.json: not readable"):
        VTPModel.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer's"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: not a diffusers config"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "words.json").write_bytes(b'{"a": "\xff\xfe"}')
    with pytest.raises(UserError, match=r"words\.json: not readable .*: copy the folder again") as caught:
        Words.load(tmp_path, 12, 300)
    assert str(tmp_path) in str(caught.value)


IMAGE, TEXT = torch.zeros(2, 3, 16, 24), torch.tensor([[298, 5, 299] + [0] * 9])
DARK = torch.stack([torch.zeros(3, 16, 24), torch.full((3, 16, 24), torch.nan)])
CALLS: list[tuple[str, Callable[[VTPModel], object], str]] = [
    ("more blocks", lambda m: m.get_intermediate_layers_feature(IMAGE, 3), "n is 3 and the encoder has 2"),
    ("no blocks", lambda m: m.get_intermediate_layers_feature(IMAGE, 0), "ask for the last 1 to 2"),
    (
        "a block",
        lambda m: m.get_intermediate_layers_feature(IMAGE, [1, 5]),
        "n names block 5 and the encoder",
    ),
    ("the last", lambda m: m.get_intermediate_layers_feature(IMAGE, [-1]), "n names block -1"),
    ("another way", lambda m: m(IMAGE, forward_type="recon"), "forward_type is 'recon': it is clip, rec or"),
    ("no image", lambda m: m(text=TEXT, forward_type="rec"), "forward_type rec is of an image"),
    (
        "NaN, latents",
        lambda m: m.get_reconstruction_latents(DARK),
        "image 2 of 2 has pixels that are not fin",
    ),
    ("NaN, clip", lambda m: m.get_clip_image_feature(DARK), "image 2 of 2 has pixels that are not finite"),
    ("NaN, last", lambda m: m.get_last_layer_feature(DARK), "image 2 of 2 has pixels that are not finite"),
    (
        "NaN, blocks",
        lambda m: m.get_intermediate_layers_feature(DARK),
        "image 2 of 2 has pixels that are not",
    ),
    ("NaN, logits", lambda m: m.get_clip_logits(DARK, TEXT), "image 2 of 2 has pixels that are not finite"),
    ("NaN, forward", lambda m: m(DARK, forward_type="rec"), "image 2 of 2 has pixels that are not finite"),
    ("infinite clip", lambda m: m.encode(DARK[:, None].log()), "clip 1 of 2 has pixels that are not finite"),
    ("bytes", lambda m: m.get_last_layer_feature(IMAGE.byte()), r"floats of \(B, 3, H, W\)"),
    ("grey", lambda m: m.get_last_layer_feature(IMAGE[:, :1]), r"floats of \(B, 3, H, W\)"),
    ("an image as a clip", lambda m: m.encode(IMAGE), r"floats of \(B, P, 3, H, W\)"),
    ("long", lambda m: m.get_clip_text_feature(torch.ones(1, 13).long()), "13 tokens, and the model has 12"),
    (
        "strange",
        lambda m: m.get_clip_text_feature(TEXT + 1),
        "token 300 is not in the model's vocabulary of 3",
    ),
    ("below", lambda m: m.get_clip_logits(IMAGE, TEXT - 1), "token -1 is not in the model's vocabulary"),
    ("floats", lambda m: m.get_clip_text_feature(TEXT.float()), "give whole numbers"),
]


@pytest.mark.parametrize(("call", "message"), [c[1:] for c in CALLS], ids=[c[0] for c in CALLS])
def test_what_the_released_methods_cannot_take_is_told(
    call: Callable[[VTPModel], object], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        call(awake(SMALL))
    assert "\n" not in str(caught.value)


def test_towers_that_a_model_has_not_are_told() -> None:
    model = awake(replace(SMALL, train_clip=False, train_reconstruction=False))
    for call in (model.get_clip_image_feature, model.get_clip_text_feature, model.forward):
        with pytest.raises(UserError, match="reads no texts"):
            call(IMAGE)
    with pytest.raises(UserError, match="reads no texts"):
        model.get_clip_logits(IMAGE, TEXT)
    latents = model.get_reconstruction_latents(IMAGE)
    with pytest.raises(UserError, match="has no decoder"):
        model.get_latents_decoded_images(latents)
    with pytest.raises(UserError, match="has no decoder"):
        model(IMAGE, forward_type="rec")


def test_files_that_are_cut_or_not_finite_are_refused(tmp_path: Path) -> None:
    file = folder(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "logit_scale": torch.tensor(float("nan"))}, file)
    with pytest.raises(UserError, match="logit_scale is not finite"):
        VTPModel.from_pretrained(tmp_path)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model\.safetensors: not readable"):
        VTPModel.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"config\.json: not readable"):
        VTPModel.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"mean": [[0.0] * 5]}, "5 means for latents of 6 numbers"),
        ({"std": [[0.0] * 6]}, "deviations of its latents are not all above 0"),
        ({"mean": [[0.0] * 6, [0.0] * 6]}, "mean has not 1 rows of 6 numbers"),
        ({"mean": "none"}, "mean"),
        ({"std": [[HUGE, 1.0, 1.0, 1.0, 1.0, 1.0]]}, "a number of std is too large"),
        ({"mean": [[0.0, 0.0, 0.0, 0.0, 0.0, -HUGE]]}, "a number of mean is too large"),
        ({"rope": "fp16"}, "rope"),
    ],
)
def test_damaged_statistics_are_refused(tmp_path: Path, said: dict[str, object], message: str) -> None:
    VtpTokenizer.measured(awake(SMALL), list(clips(2, 9))).save(tmp_path)
    note = tmp_path / "tokenizer.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | said))
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(note) in str(caught.value)


def test_clips_without_variation_are_refused() -> None:
    with pytest.raises(UserError, match="a channel of VTP's latents is the same in all clips"):
        VtpTokenizer.measured(awake(SMALL), [torch.zeros(1, 8, 8, 3, dtype=torch.uint8)])
    with pytest.raises(UserError, match="there is none"):
        VtpTokenizer.measured(awake(SMALL), [])
